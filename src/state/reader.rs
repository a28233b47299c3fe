//! The reading side of the state: shared, cheap to clone, never holding a lock against the writer.

use super::command::{KeySpan, MemberRecord};
use super::outcome::KeyValue;
use super::watch::{WatchFilter, Watcher};
use super::{Applied, StateError};

/// Why a read has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The revision is below the compacted one (410).
    #[error("history before revision {compacted_revision} is compacted")]
    Compacted { compacted_revision: u64 },
    /// The revision is not there yet (400).
    #[error("revision {revision} is in the future, the current one is {current}")]
    FutureRevision { revision: u64, current: u64 },
    /// The member's own failure.
    #[error(transparent)]
    State(#[from] StateError),
}

/// A list.
#[derive(Debug, Clone, PartialEq)]
pub struct RangeQuery {
    /// Which keys.
    pub span: KeySpan,
    /// `None`: the current revision.
    pub revision: Option<u64>,
    /// At most so many key-values in the answer.
    pub limit: usize,
    /// Continue after this key (in the direction of the order).
    pub after: Option<Vec<u8>>,
    /// Descending byte order.
    pub descending: bool,
    /// Leave the values empty, and do not read them.
    pub keys_only: bool,
    /// No key-values at all, only the count.
    pub count_only: bool,
    /// Count all keys of the span (costs a scan of the index). If false, `count` is the number of key-values returned.
    pub with_count: bool,
    /// Stop when the key-values returned exceed so many bytes (at least one is returned).
    pub max_bytes: usize,
}

/// Its answer.
#[derive(Debug, Clone, PartialEq)]
pub struct RangePage {
    /// The revision it was read at.
    pub revision: u64,
    /// The key-values.
    pub kvs: Vec<KeyValue>,
    /// Keys in the whole span (see `with_count`).
    pub count: u64,
    /// There are more after the last one.
    pub more: bool,
}

/// A lease as seen by readers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseInfo {
    /// Id.
    pub id: u64,
    /// Granted time to live, ms.
    pub ttl_ms: u64,
    /// Belongs to a single key (`?ttl=`).
    pub owned: bool,
}

/// Holds history at `revision` against compaction while it lives.
pub struct Pin {
    /// The pinned revision.
    pub revision: u64,
}

/// The reading side.
#[derive(Clone)]
pub struct StateReader {}

impl StateReader {
    /// The current revision.
    pub fn revision(&self) -> u64 {
        todo!()
    }

    /// History below this revision is gone.
    pub fn compacted_revision(&self) -> u64 {
        todo!()
    }

    /// Where the state stands in the log.
    pub fn applied(&self) -> Applied {
        todo!()
    }

    /// Index of the last applied entry: an atomic load.
    pub fn applied_index(&self) -> u64 {
        todo!()
    }

    /// Returns once the applied index is at least `index`.
    pub async fn wait_applied(&self, _index: u64) {
        todo!()
    }

    /// Returns once the revision is at least `revision`.
    pub async fn wait_revision(&self, _revision: u64) {
        todo!()
    }

    /// One key, now or at a revision; with the revision it was read at.
    pub fn get(&self, _key: &[u8], _revision: Option<u64>) -> Result<(u64, Option<KeyValue>), ReadError> {
        todo!()
    }

    /// A list. May read much: call it from a blocking thread when the backend is on disk or the span is large.
    pub fn range(&self, _query: &RangeQuery) -> Result<RangePage, ReadError> {
        todo!()
    }

    /// Pins a revision (`None`: the current one) against compaction.
    pub fn pin(&self, _revision: Option<u64>) -> Result<Pin, ReadError> {
        todo!()
    }

    /// Digest of the live content at a revision, equal on every member and backend. Reads everything unless it is the current one.
    pub fn hash(&self, _revision: Option<u64>) -> Result<(u64, u128), ReadError> {
        todo!()
    }

    /// One lease.
    pub fn lease(&self, _id: u64) -> Option<LeaseInfo> {
        todo!()
    }

    /// All leases, by id.
    pub fn leases(&self) -> Vec<LeaseInfo> {
        todo!()
    }

    /// The keys attached to a lease, in byte order.
    pub fn lease_keys(&self, _id: u64) -> Result<Vec<bytes::Bytes>, ReadError> {
        todo!()
    }

    /// The members, by id.
    pub fn members(&self) -> Vec<MemberRecord> {
        todo!()
    }

    /// Whether this id was a member once and was removed.
    pub fn is_removed(&self, _id: u64) -> bool {
        todo!()
    }

    /// The cluster's id.
    pub fn cluster_id(&self) -> u64 {
        todo!()
    }

    /// Logical bytes of live keys and values and history, counted in replicated state: what `limits.max_store_bytes` is compared with.
    pub fn logical_bytes(&self) -> u64 {
        todo!()
    }

    /// Opens a watch that begins after `after_revision` (delivers `after_revision + 1` and on).
    /// `Compacted` or `FutureRevision` if that is not possible.
    pub fn watch(&self, _filter: WatchFilter, _after_revision: u64) -> Result<Watcher, ReadError> {
        todo!()
    }
}
