//! The reading side of the state: shared, cheap to clone, never holding a lock against the writer.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use super::apply::missing_row;
use super::command::{HashReport, KeySpan, MemberRecord};
use super::key::{IndexSpan, descending, escaped};
use super::kv::{self, Hit};
use super::outcome::KeyValue;
use super::row::{Row, Version, key_value, share};
pub use super::shared::Pin;
use super::shared::Shared;
use super::watch::{WatchFilter, Watcher};
use super::{Applied, StateError};
use crate::store::StoreError;

/// Why a read has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The revision is below the compacted one (410).
    #[error("history before revision {compacted_revision} is compacted")]
    Compacted {
        /// What is compacted.
        compacted_revision: u64,
    },
    /// The revision is not there yet (400).
    #[error("revision {revision} is in the future, the current one is {current}")]
    FutureRevision {
        /// The revision asked for.
        revision: u64,
        /// The current revision.
        current: u64,
    },
    /// The member's own failure.
    #[error(transparent)]
    State(#[from] StateError),
}

impl From<StoreError> for ReadError {
    fn from(error: StoreError) -> ReadError {
        ReadError::State(error.into())
    }
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

/// What the member table says of an id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// The table is empty: this node is not in a cluster yet.
    Uninitialized,
    /// A member; incarnation 0 is not bound to a data directory yet.
    Member {
        /// Its data directory.
        incarnation: u64,
    },
    /// Was removed.
    Removed,
    /// Never was a member.
    Unknown,
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

/// The reading side.
#[derive(Clone)]
pub struct StateReader {
    pub(super) shared: Arc<Shared>,
}

impl std::fmt::Debug for StateReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StateReader")
            .field("applied_index", &self.applied_index())
            .finish_non_exhaustive()
    }
}

impl StateReader {
    /// The current revision.
    pub fn revision(&self) -> u64 {
        self.shared.revision()
    }

    /// History below this revision is gone.
    pub fn compacted_revision(&self) -> u64 {
        self.shared.compacted_revision()
    }

    /// Where the state stands in the log.
    pub fn applied(&self) -> Applied {
        self.shared.with(|published| Applied {
            index: published.meta.applied_index,
            term: published.meta.applied_term,
            conf_state: (*published.conf_state).clone(),
        })
    }

    /// Index of the last applied entry: an atomic load.
    pub fn applied_index(&self) -> u64 {
        self.shared.applied_index()
    }

    /// Returns once the applied index is at least `index`.
    pub async fn wait_applied(&self, index: u64) {
        if self.applied_index() < index {
            self.shared.wait(|progress| progress.applied_index >= index).await;
        }
    }

    /// Returns once the revision is at least `revision`.
    pub async fn wait_revision(&self, revision: u64) {
        if self.revision() < revision {
            self.shared.wait(|progress| progress.revision >= revision).await;
        }
    }

    /// One key, now or at a revision; with the revision it was read at.
    pub fn get(&self, key: &[u8], revision: Option<u64>) -> Result<(u64, Option<KeyValue>), ReadError> {
        let store = &*self.shared.store;
        let mut scratch = Vec::with_capacity(key.len() + 16);
        loop {
            let epoch = self.shared.epoch();
            let at = self.readable_revision(revision)?;
            let read = kv::newest(store, key, at, &mut scratch).and_then(|version| {
                let version = version.filter(|version| !version.is_tombstone);
                let row = version.as_ref().map(|version| kv::row_of(store, version)).transpose()?;
                Ok((version, row.flatten()))
            });
            self.shared.check_epoch(epoch)?;
            let (version, row) = read?;
            // Compacted, perhaps removed, while it was read: the current revision is another one by now.
            if !self.shared.is_readable(at) {
                match revision {
                    None => continue,
                    Some(_) => return Err(self.compacted()),
                }
            }
            return match (version, row) {
                (None, _) => Ok((at, None)),
                (Some(version), Some(row)) => Ok((at, Some(key_value(version.revision, &share(row))?))),
                (Some(version), None) => Err(missing_row(&version).into()),
            };
        }
    }

    fn compacted(&self) -> ReadError {
        ReadError::Compacted {
            compacted_revision: self.compacted_revision(),
        }
    }

    /// The revision to read at, if it can be read.
    fn readable_revision(&self, wanted: Option<u64>) -> Result<u64, ReadError> {
        let current = self.revision();
        let revision = wanted.unwrap_or(current);
        if revision > current {
            return Err(ReadError::FutureRevision { revision, current });
        }
        if wanted.is_some() && !self.shared.is_readable(revision) {
            return Err(self.compacted());
        }
        Ok(revision)
    }

    /// A list. May read much: call it from a blocking thread when the backend is on disk or the span is large.
    pub fn range(&self, query: &RangeQuery) -> Result<RangePage, ReadError> {
        let pin = self.pin(query.revision)?;
        let page = self.read_range(query, pin.revision);
        pin.check()?;
        page
    }

    fn read_range(&self, query: &RangeQuery, at: u64) -> Result<RangePage, ReadError> {
        let store = &*self.shared.store;
        if query.count_only {
            let count = kv::count(store, IndexSpan::new(&query.span, None, false), at)?;
            return Ok(RangePage {
                revision: at,
                kvs: Vec::new(),
                count,
                more: false,
            });
        }
        let page_span = IndexSpan::new(&query.span, query.after.as_deref(), query.descending);
        let mut hits = kv::list(store, page_span, at, query.descending, query.limit.saturating_add(1))?;
        let mut more = hits.len() > query.limit;
        hits.truncate(query.limit);
        if !query.keys_only {
            more |= truncate_to_bytes(&mut hits, query.max_bytes);
        }
        let last = hits.last().map(|hit| hit.key.clone());
        let kvs = self.load(hits, query.keys_only)?;
        let mut count = kvs.len() as u64;
        if query.with_count && (more || query.after.is_some()) {
            let rest = match &query.after {
                None => IndexSpan::new(&query.span, last.as_deref(), query.descending),
                Some(_) => {
                    count = 0;
                    IndexSpan::new(&query.span, None, false)
                }
            };
            count += kv::count(store, rest, at)?;
        }
        Ok(RangePage {
            revision: at,
            kvs,
            count,
            more,
        })
    }

    fn load(&self, hits: Vec<Hit>, keys_only: bool) -> Result<Vec<KeyValue>, ReadError> {
        let mut kvs = Vec::with_capacity(hits.len());
        for Hit { key, version } in hits {
            kvs.push(if keys_only {
                version.without_value(key.into())
            } else {
                self.load_version(&version)?
            });
        }
        Ok(kvs)
    }

    fn load_version(&self, version: &Version) -> Result<KeyValue, ReadError> {
        let row = kv::row_of(&*self.shared.store, version)?.ok_or_else(|| missing_row(version))?;
        Ok(key_value(version.revision, &share(row))?)
    }

    /// Pins a revision (`None`: the current one) against compaction.
    pub fn pin(&self, revision: Option<u64>) -> Result<Pin, ReadError> {
        loop {
            let epoch = self.shared.epoch();
            let at = self.readable_revision(revision)?;
            if let Some(pin) = Pin::new(at, &self.shared) {
                return Ok(pin);
            }
            self.shared.check_epoch(epoch)?;
            if revision.is_some() {
                return Err(self.compacted());
            }
        }
    }

    /// Digest of the live content at a revision, equal on every member and backend. Reads everything unless it is the current one.
    pub fn hash(&self, revision: Option<u64>) -> Result<(u64, u128), ReadError> {
        let (current, hash) = self.shared.with(|published| (published.meta.revision, published.meta.hash()));
        match revision {
            None => Ok((current, hash)),
            Some(revision) if revision == current => Ok((current, hash)),
            Some(revision) => Ok((revision, self.recompute_hash(revision)?)),
        }
    }

    /// The hash of a revision from the stored rows themselves, in bounded memory. What is stored is thereby checked: a value that
    /// is not the one its index record speaks of is an error.
    pub fn recompute_hash(&self, revision: u64) -> Result<u128, ReadError> {
        let pin = self.pin(Some(revision))?;
        let hash = self.hash_rows(&pin);
        pin.check()?;
        hash
    }

    fn hash_rows(&self, pin: &Pin) -> Result<u128, ReadError> {
        const KEYS_AT_ONCE: usize = 1000;
        let store = &*self.shared.store;
        let mut scratch = Vec::new();
        let mut hash = 0u128;
        let mut lower = Bound::Unbounded;
        loop {
            let span = IndexSpan {
                lower,
                upper: Bound::Unbounded,
            };
            let hits = kv::list(store, span, pin.revision, false, KEYS_AT_ONCE)?;
            let Some(last) = hits.last() else {
                return Ok(hash);
            };
            let mut bound = escaped(&last.key);
            bound.extend_from_slice(&descending(0));
            lower = Bound::Excluded(bound);
            for hit in &hits {
                let record = kv::row_of(store, &hit.version)?.ok_or_else(|| missing_row(&hit.version))?;
                let row = Row::checked(hit.version.revision, &record)?;
                if row.key != hit.key || xxhash_rust::xxh3::xxh3_64(row.value) != hit.version.value_digest {
                    let detail = format!("the row of revision {} is not the one its index record names", hit.version.revision);
                    return Err(StateError::Corrupt(detail).into());
                }
                hash = hash.wrapping_add(hit.version.digest(&hit.key, &mut scratch));
            }
        }
    }

    /// One lease.
    pub fn lease(&self, id: u64) -> Option<LeaseInfo> {
        let lease = self.shared.with(|published| published.leases.get(id))?;
        Some(LeaseInfo {
            id,
            ttl_ms: lease.ttl_ms,
            owned: lease.is_owned,
        })
    }

    /// How many leases there are.
    pub fn lease_count(&self) -> usize {
        self.shared.with(|published| published.leases.len())
    }

    /// All leases, by id.
    pub fn leases(&self) -> Vec<LeaseInfo> {
        let leases = self.shared.with(|published| published.leases.clone());
        leases.all()
    }

    /// The keys attached to a lease, in byte order.
    pub fn lease_keys(&self, id: u64) -> Result<Vec<bytes::Bytes>, ReadError> {
        let leases = self.shared.with(|published| published.leases.clone());
        Ok(leases.keys(id))
    }

    /// The members, by id.
    pub fn members(&self) -> Vec<MemberRecord> {
        self.shared.with(|published| published.members.present.values().cloned().collect())
    }

    /// The newest boot id of each member that has proposed anything since it was started.
    pub fn boots(&self) -> Arc<BTreeMap<u64, u64>> {
        self.shared.with(|published| published.boots.clone())
    }

    /// Whether this id was a member once and was removed.
    pub fn is_removed(&self, id: u64) -> bool {
        self.shared.with(|published| published.members.removed.contains(&id))
    }

    /// The ids that were members once and were removed, ascending.
    pub fn removed(&self) -> Vec<u64> {
        self.shared.with(|published| published.members.removed.iter().copied().collect())
    }

    /// What the member table says of a sender; cheap, asked for every request of a peer.
    pub fn admission(&self, id: u64) -> Admission {
        self.shared.with(|published| {
            if published.members.present.is_empty() {
                Admission::Uninitialized
            } else if let Some(member) = published.members.present.get(&id) {
                Admission::Member {
                    incarnation: member.incarnation,
                }
            } else if published.members.removed.contains(&id) {
                Admission::Removed
            } else {
                Admission::Unknown
            }
        })
    }

    /// The cluster's id.
    pub fn cluster_id(&self) -> u64 {
        self.shared.with(|published| published.meta.cluster_id)
    }

    /// Cluster time in milliseconds: the highest stamp applied. A leader counts on from here by its monotonic clock.
    pub fn cluster_time_ms(&self) -> u64 {
        self.shared.with(|published| published.meta.cluster_time_ms)
    }

    /// The cluster's feature level: nothing above it may be proposed.
    pub fn feature_level(&self) -> u32 {
        self.shared.with(|published| published.meta.feature_level)
    }

    /// Logical bytes of live keys and values and history, counted in replicated state: what `limits.max_store_bytes` is compared with.
    ///
    /// Every version of a key that is not compacted counts its key, its value and 64 bytes; deletions count as versions.
    pub fn logical_bytes(&self) -> u64 {
        self.shared.with(|published| published.meta.logical_bytes())
    }

    /// When the current revision was last noted (cluster time in milliseconds), and which it was.
    pub fn last_sample(&self) -> Option<(u64, u64)> {
        self.shared.with(|published| published.samples.last())
    }

    /// The newest revision known to have been current at cluster time `stamp_ms` or before: compacting at it keeps all that was
    /// readable since. `None` if nothing is known of that time.
    pub fn revision_before(&self, stamp_ms: u64) -> Option<u64> {
        self.shared.with(|published| published.samples.revision_before(stamp_ms))
    }

    /// Cluster time (ms) at which the oldest idempotency record was made: what eviction looks at. `None` if there is none.
    pub fn oldest_idempotency_stamp(&self) -> Option<u64> {
        self.shared.with(|published| published.idempotency.0)
    }

    /// Whether the answer to this `Idempotency-Key` is recorded. An error of the store counts as no: the state machine meets it, too.
    pub fn has_answer(&self, key: &str) -> bool {
        self.shared
            .store
            .get(crate::store::Table::Idempotency, key.as_bytes())
            .is_ok_and(|record| record.is_some())
    }

    /// Number of idempotency records.
    pub fn idempotency_len(&self) -> usize {
        self.shared.with(|published| published.idempotency.1)
    }

    /// Why this member must not serve: its state differs from an agreeing majority's.
    pub fn divergence(&self, own_id: u64) -> Option<String> {
        self.shared
            .with(|published| published.reports.divergence(own_id, &published.conf_state.voters))
    }

    /// Why no member may take writes: the members' states differ, and no majority agrees.
    pub fn disagreement(&self) -> Option<String> {
        self.shared
            .with(|published| published.reports.disagreement(&published.conf_state.voters))
    }

    /// Whether this report is still to be proposed: the log does not have it, and its index is not forgotten yet.
    pub fn lacks_hash_report(&self, report: &HashReport) -> bool {
        self.shared.with(|published| published.reports.lacks(report.member, report.index))
    }

    /// Opens a watch that begins after `after_revision` (delivers `after_revision + 1` and on).
    /// `Compacted` or `FutureRevision` if that is not possible.
    pub fn watch(&self, filter: WatchFilter, after_revision: u64) -> Result<Watcher, ReadError> {
        Watcher::open(self.shared.clone(), filter, after_revision)
    }
}

/// Cuts a page that would be too large; at least one key-value stays. Returns whether it was cut.
fn truncate_to_bytes(hits: &mut Vec<Hit>, max_bytes: usize) -> bool {
    let mut bytes = 0u64;
    for (n, hit) in hits.iter().enumerate() {
        bytes += hit.key.len() as u64 + hit.version.value_len;
        if n > 0 && bytes > max_bytes as u64 {
            hits.truncate(n);
            return true;
        }
    }
    false
}
