//! The write-ahead log: raft's entries and hard state, durable before anything is said about them.
//!
//! *Invariants*
//! - When [`Wal::append`] returns `Ok`, everything in the batch, and everything before it, survives a power cut (rules 2 and 5):
//!   an fdatasync that covers it has returned. The fence, which guards it against later damage, follows within 50 ms.
//! - Entries and hard state of one batch are one atomic unit (rule 6); appending at index i removes all entries ≥ i in the same unit (rule 10).
//! - Every record is checksummed and verified whenever it is read (rule 8). Damage is an error, never a shorter log.
//! - A failed write or sync poisons the log: the caller ends the process, nothing is retried (rule 5), and the next one reads from the disk,
//!   not what the kernel kept of a write that failed (as far as the kernel forgets when it is asked to: not what another process maps).
//!
//! The parts, downwards: [`open`] chooses an engine · `checked` is what all engines share (records in a hash chain, a meta record in each
//! atomic unit, verification) · `record` is the bytes · `fence` is a witness outside the engine of what was acknowledged · `files` is
//! the directory, its lock and its marker · `sled` (with `journal`, and `sled::segments` for large records), `raft_engine`, `rocksdb` and [`memory`] keep records ·
//! [`inspect`] looks into a log without changing it.

mod checked;
#[cfg(test)]
mod conformance;
mod fence;
mod files;
pub(crate) mod fuzzing;
pub mod inspect;
mod journal;
pub mod memory;
mod raft_engine;
mod record;
#[cfg(feature = "rocksdb")]
mod rocksdb;
mod sled;

use std::path::Path;
use std::time::Duration;

use raft::eraftpb::{Entry, HardState};

use crate::config::WalEngine;

/// What one sync makes durable.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct WalBatch {
    /// Consecutive entries. If the first has index i, every older entry with index ≥ i is removed first.
    pub entries: Vec<Entry>,
    /// The newest hard state, if it changed.
    pub hard_state: Option<HardState>,
}

/// The point just before the first entry: where a snapshot or compaction ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LogStart {
    /// Index of the last entry that is no longer in the log. The first entry has `index + 1`.
    pub index: u64,
    /// Its term.
    pub term: u64,
}

/// What a log holds when it is opened, after every record was verified.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Recovered {
    /// The durable hard state (default if none was ever written).
    pub hard_state: HardState,
    /// Where the log begins.
    pub start: LogStart,
    /// Index of the last entry; equal to `start.index` when the log is empty.
    pub last_index: u64,
}

/// For `/status` and the metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WalStats {
    /// Bytes on disk (or in memory, for the in-memory engine).
    pub bytes: u64,
    /// fdatasync (or equal) calls that have returned since the start.
    pub syncs: u64,
    /// Time that appends and compactions spent waiting for their syncs. The write counts, too, where it waits for the disk.
    pub sync_time: Duration,
}

/// Why a log could not be opened, read or written.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the fields say what they are")]
pub enum WalError {
    /// The operating system refused. Poisons the log.
    #[error("wal: {what}: {source}")]
    Io { what: String, source: std::io::Error },
    /// The engine failed for a reason of its own. Poisons the log.
    #[error("wal: {0}")]
    Engine(String),
    /// A record fails its checksum, its hash chain or its order; the text names the first bad index.
    #[error("wal: damaged: {0}")]
    Corrupt(String),
    /// The engine came back behind its fence, or with a hole: acknowledged data is gone (rule 9). The text names the way out.
    #[error("wal: lost data: {0}")]
    Lost(String),
    /// Entries below the log's start were asked for.
    #[error("wal: entry {index} is compacted (the log begins after {start})")]
    Compacted { index: u64, start: u64 },
    /// The directory belongs to another engine or a newer format, or this build lacks the engine.
    #[error("wal: {0}")]
    Refused(String),
}

/// One engine. It is owned by the WAL thread; nothing here is called from two threads at once.
pub trait Wal: Send {
    /// What was found at open. Stays as it was then.
    fn recovered(&self) -> &Recovered;

    /// Writes the batch and makes it durable (see the module). An entry whose index is not ≤ last + 1, or not above the start, is a bug: panics.
    fn append(&mut self, batch: &WalBatch) -> Result<(), WalError>;

    /// Entries `low..high`, at least one, then as many as fit in `max_bytes` (sum of protobuf sizes).
    /// `Compacted` if `low` is not above the start; entries missing inside the log are `Corrupt`.
    fn entries(&self, low: u64, high: u64, max_bytes: u64) -> Result<Vec<Entry>, WalError>;

    /// Removes the entries up to and including `to.index`, durably recording the new start first. In small steps where the engine
    /// would stall otherwise. The caller has made a snapshot or store at ≥ `to.index` durable (rule 11).
    fn compact(&mut self, to: LogStart) -> Result<(), WalError>;

    /// Empties the log after a snapshot was installed: it begins anew after `start`, with `hard_state`. One atomic unit, durable on return.
    fn reset(&mut self, start: LogStart, hard_state: &HardState) -> Result<(), WalError>;

    /// An error if what is written behind the appends (the fence, what sled is given) could not be made durable. The next append says so,
    /// too: this is for a log to which nothing is appended (rule 5).
    fn check_background(&self) -> Result<(), WalError>;

    /// The end: makes durable what is still written behind the appends (the fence, what sled is given), and says so if that fails. Nothing may be
    /// appended afterwards. A log that is dropped without it does the same and says nothing. What the engines' libraries do with their files
    /// when they are dropped after that was durable before.
    fn close(&mut self) -> Result<(), WalError>;

    /// The figures; cheap. Sizes of files may be a second old.
    fn stats(&self) -> WalStats;

    /// `sled`, `raft-engine`, `rocksdb` or `memory`.
    fn engine(&self) -> &'static str;
}

/// Opens the log in `dir`, creating it if the directory is empty or missing, and verifies every record.
///
/// With `sync` false nothing is synced: a power cut loses data. For tests.
///
/// # Errors
/// `Refused`: the directory is of another engine or a newer format, is in use, or this build lacks the engine. `Lost`: acknowledged data
/// is gone (rule 9). `Corrupt`: a record is damaged. In these cases the directory's entries are left as they are.
pub fn open(engine: WalEngine, dir: &Path, sync: bool) -> Result<Box<dyn Wal>, WalError> {
    if !sync {
        tracing::warn!(path = %dir.display(), "wal.sync = false: a power cut loses acknowledged writes");
    }
    open_quietly(engine, dir, sync)
}

/// As [`open`], without a word about a log that is not synced.
fn open_quietly(engine: WalEngine, dir: &Path, sync: bool) -> Result<Box<dyn Wal>, WalError> {
    Ok(match engine {
        WalEngine::Sled => Box::new(checked::Checked::open(sled::SledBackend::open(dir, sled::Options::new(sync))?)?),
        WalEngine::RaftEngine => Box::new(checked::Checked::open(raft_engine::RaftEngineBackend::open(dir, sync)?)?),
        WalEngine::RocksDb => open_rocksdb(dir, sync)?,
    })
}

/// Opens the sled engine with another size of its journal's halves (default: 8 MiB). A small journal restores less after a
/// power cut and leaves more to sled, and its segments are small, too; tests use that to put sled's own losses to the proof.
///
/// # Errors
/// As for [`open`].
pub fn open_sled_with_journal(dir: &Path, sync: bool, half_bytes: u64) -> Result<Box<dyn Wal>, WalError> {
    Ok(Box::new(checked::Checked::open(sled::SledBackend::open(
        dir,
        sled::Options {
            half_bytes,
            segment_bytes: 16 * half_bytes,
            ..sled::Options::new(sync)
        },
    )?)?))
}

#[cfg(feature = "rocksdb")]
fn open_rocksdb(dir: &Path, sync: bool) -> Result<Box<dyn Wal>, WalError> {
    Ok(Box::new(checked::Checked::open(rocksdb::RocksDbBackend::open(dir, sync)?)?))
}

#[cfg(not(feature = "rocksdb"))]
fn open_rocksdb(_dir: &Path, _sync: bool) -> Result<Box<dyn Wal>, WalError> {
    Err(WalError::Refused(
        "this build has no RocksDB: rebuild with `cargo build --release --features rocksdb`, or choose another wal.engine".to_owned(),
    ))
}
