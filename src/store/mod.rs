//! The storage engines behind the state machine: a small, ordered, byte-keyed [`KvStore`] and its three implementations.
//!
//! *Invariants*
//! - [`KvStore::write`] is atomic: after a crash either the whole batch is there or nothing of it.
//! - A batch is visible to every reader when `write` returns; it is *durable* only after [`KvStore::sync`]. The write-ahead log is
//!   what makes a commit durable; the store only has to be durable before the log below it is compacted (rule 11).
//! - What a `sync` covered survives a crash only in an engine that says so ([`KvStore::survives_crashes`]). One that does not is there again
//!   only after [`KvStore::close`], and empty otherwise: never with a part of what it held.
//! - Engines know nothing of revisions. Readers get a consistent view because the records they read are immutable and carry the
//!   revision that made them (see [`crate::state`]); no engine needs snapshots of its own.

mod files;
mod memory;
#[cfg(feature = "rocksdb")]
mod rocksdb;
mod scratch;
mod sled;

#[cfg(test)]
mod conformance;

use std::{ops::Bound, ops::ControlFlow, path::Path, sync::Arc};

pub use memory::MemoryStore;
pub use scratch::Scratch;

use crate::config::StoreBackend;

/// Longest key of a record. A user's key has at most 4 KiB; escaping doubles it at worst, and the revision is added.
pub const MAX_KEY_BYTES: usize = 12 * 1024;

/// Opens the store in `dir`, which is created if it is not there. The memory engine keeps nothing but a note that the
/// directory is its own.
///
/// `Refused` if the directory belongs to another engine or another format, if this build lacks the engine, or if an engine that
/// [survives crashes](KvStore::survives_crashes) came back without records that a [`sync`](KvStore::sync) had covered; the text says what to
/// do. One that does not is empty unless it was [closed](KvStore::close).
pub fn open(backend: StoreBackend, dir: &Path) -> Result<Arc<dyn KvStore>, StoreError> {
    match backend {
        StoreBackend::Memory => {
            files::claim(dir, "memory")?;
            Ok(Arc::new(MemoryStore::new()))
        }
        StoreBackend::Sled => Ok(Arc::new(sled::SledStore::open(dir, sled::DEFAULT_CACHE_BYTES)?)),
        #[cfg(feature = "rocksdb")]
        StoreBackend::RocksDb => Ok(Arc::new(rocksdb::RocksDbStore::open(dir)?)),
        #[cfg(not(feature = "rocksdb"))]
        StoreBackend::RocksDb => Err(StoreError::Refused(
            "this build has no RocksDB; build it with `cargo build --release --features rocksdb`, or choose store.backend = \"sled\""
                .into(),
        )),
    }
}

/// A key space of the store. Engines keep the tables apart (a prefix byte will do) and each in byte order of its keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Table {
    /// Singletons: applied index and term, `ConfState`, revision counters, state hash, cluster time, identity.
    Meta = 1,
    /// (user key, revision) → what a reader must know of that version without its value.
    Index = 2,
    /// (revision, position) → key, value and metadata: the history, in the order in which it happened.
    Revision = 3,
    /// lease id → ttl and kind.
    Lease = 4,
    /// (lease id, user key) → nothing.
    LeaseKey = 5,
    /// member id → what is applied of its proposals.
    Session = 6,
    /// Idempotency-Key records.
    Idempotency = 7,
    /// member id → names, addresses, incarnation, wanted role; removed ids too.
    Member = 8,
}

/// Every table, in the order of its tag.
pub const TABLES: [Table; 8] = [
    Table::Meta,
    Table::Index,
    Table::Revision,
    Table::Lease,
    Table::LeaseKey,
    Table::Session,
    Table::Idempotency,
    Table::Member,
];

/// One change in a [`WriteBatch`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields say what they are")]
pub enum Op {
    /// Sets `key` to `value`, whatever was there.
    Put { table: Table, key: Vec<u8>, value: Arc<[u8]> },
    /// Removes `key`; nothing happens if it is absent.
    Delete { table: Table, key: Vec<u8> },
}

impl Op {
    /// The table it changes.
    pub fn table(&self) -> Table {
        match self {
            Op::Put { table, .. } | Op::Delete { table, .. } => *table,
        }
    }

    /// The key it changes.
    pub fn key(&self) -> &[u8] {
        match self {
            Op::Put { key, .. } | Op::Delete { key, .. } => key,
        }
    }
}

/// An ordered list of changes that become visible together. A later operation on the same key wins.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WriteBatch {
    /// The changes, in order.
    pub ops: Vec<Op>,
}

impl WriteBatch {
    /// Appends a put.
    pub fn put(&mut self, table: Table, key: impl Into<Vec<u8>>, value: impl Into<Arc<[u8]>>) {
        self.ops.push(Op::Put {
            table,
            key: key.into(),
            value: value.into(),
        });
    }

    /// Appends a delete.
    pub fn delete(&mut self, table: Table, key: impl Into<Vec<u8>>) {
        self.ops.push(Op::Delete { table, key: key.into() });
    }
}

/// Every engine's limit, checked before anything is changed.
fn check_keys(batch: &WriteBatch) -> Result<(), StoreError> {
    match batch.ops.iter().find(|op| op.key().len() > MAX_KEY_BYTES) {
        Some(op) => Err(StoreError::Engine(format!(
            "a key of {} bytes is over the limit of {MAX_KEY_BYTES}",
            op.key().len()
        ))),
        None => Ok(()),
    }
}

/// Which way a scan goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Ascending byte order.
    Asc,
    /// Descending byte order.
    Desc,
}

/// A range of keys within one table.
pub type KeyRange<'a> = (Bound<&'a [u8]>, Bound<&'a [u8]>);

/// Called with key and value of each record of a scan.
pub type Visitor<'a> = &'a mut (dyn FnMut(&[u8], &[u8]) -> ControlFlow<()> + 'a);

/// A local failure of the engine. It is never an answer for a client: the node stops (house rule: two kinds of failure).
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the fields say what they are")]
pub enum StoreError {
    /// The operating system refused; the engine's own words are kept.
    #[error("store: {what}: {source}")]
    Io { what: String, source: std::io::Error },
    /// The engine failed for a reason of its own.
    #[error("store: {0}")]
    Engine(String),
    /// A record fails its checksum or cannot be decoded.
    #[error("store: damaged record: {0}")]
    Corrupt(String),
    /// The directory cannot be used by this build or configuration; the text says why and what to do.
    #[error("store: {0}")]
    Refused(String),
}

/// An ordered byte-keyed store. See the module for what must hold.
pub trait KvStore: Send + Sync + 'static {
    /// The value of `key`, or `None`.
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Arc<[u8]>>, StoreError>;

    /// Calls `visit` with each record of the range in order, until it breaks or the range ends.
    ///
    /// The visitor may run under the engine's read lock: it must be short, must not call the store, and callers cut long scans
    /// into steps (a thousand records or 256 KiB) so that a writer never waits long. Records written while a scan goes on
    /// may or may not be seen.
    fn scan(&self, table: Table, range: KeyRange<'_>, order: Order, visit: Visitor<'_>) -> Result<(), StoreError>;

    /// Applies the batch atomically; visible to all readers on return, durable after the next [`sync`](Self::sync).
    fn write(&self, batch: WriteBatch) -> Result<(), StoreError>;

    /// Makes everything written before the call durable (an fdatasync that covers it has returned).
    /// The memory engine has nothing to do and keeps nothing: [`keeps_records`](Self::keeps_records) says so.
    fn sync(&self) -> Result<(), StoreError>;

    /// Whether what a [`sync`](Self::sync) covered is there after a crash or a power cut. If not, the node keeps snapshot files to rebuild
    /// the store from, and cuts its log only behind them.
    fn survives_crashes(&self) -> bool;

    /// Whether what was written is there when the store is opened after a [`close`](Self::close).
    fn keeps_records(&self) -> bool;

    /// The orderly end: makes everything durable, and nothing may be written afterwards. What was written can still be read.
    fn close(&self) -> Result<(), StoreError> {
        self.sync()
    }

    /// Removes every record of every table, durably. Used before a snapshot is loaded.
    fn clear(&self) -> Result<(), StoreError>;

    /// Bytes held: on disk for a disk engine, an estimate of the heap for memory. For `/status`; cheap.
    fn bytes(&self) -> u64;

    /// `memory`, `sled` or `rocksdb`: as in the configuration and in `/status`.
    fn backend(&self) -> &'static str;
}
