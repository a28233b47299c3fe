//! TiKV's raft-engine as the log.
//!
//! Records are its entries, under a *region* per life of the log: a reset moves to the next region number, so that one atomic batch both ends the
//! old life and begins the new one. Meta record and region number are its key-values under region [`META_REGION`].
//!
//! What raft-engine 0.4 leaves to us: it does not sync the directory when it creates its first files (later ones it does), so that is
//! done at open; the sync of an empty batch does nothing, so every unit is a batch of its own; its recovery cuts the last file
//! at the first damaged batch, whatever follows, which the fence notices.

use std::{
    ops::ControlFlow,
    path::Path,
    time::{Duration, Instant},
};

use ::raft_engine::{Command, Config, Engine, LogBatch, MessageExt, ReadableSize, RecoveryMode};
use raft::eraftpb::Entry;

use super::{
    WalError, WalStats,
    checked::{Backend, Visit},
    fence::Fence,
    files::{Claim, DirBytes, sync_tree},
    record::{Meta, Remove, Unit},
};

/// Holds the key-values; entries are in regions above it.
const META_REGION: u64 = 1;
const META_KEY: &[u8] = b"meta";
const REGION_KEY: &[u8] = b"region";
const FILE_BYTES: u64 = 16 * 1024 * 1024;
/// Files are purged when the log is larger; two files can hold live entries that lie between.
const PURGE_BYTES: u64 = 64 * 1024 * 1024;
/// Entries fetched at once.
const FETCH_ENTRIES: u64 = 64;

/// An entry of raft's carries our record as its data.
struct Stored;

impl MessageExt for Stored {
    type Entry = Entry;

    fn index(entry: &Entry) -> u64 {
        entry.index
    }
}

/// The backend; see the module.
pub(crate) struct RaftEngineBackend {
    engine: Engine,
    region: u64,
    sync: bool,
    syncs: u64,
    sync_time: Duration,
    fence: Fence,
    files: DirBytes,
    _claim: Claim,
}

impl RaftEngineBackend {
    /// Opens or creates the log.
    pub(crate) fn open(dir: &Path, sync: bool) -> Result<Self, WalError> {
        let mut claim = Claim::take(dir, "raft-engine", sync)?;
        let fence_path = dir.join("fence");
        if claim.fresh {
            Fence::create(&fence_path)?;
        }
        let files = dir.join("raft-engine");
        let config = Config {
            dir: files.to_string_lossy().into_owned(),
            recovery_mode: RecoveryMode::TolerateTailCorruption,
            recovery_threads: 2,
            batch_compression_threshold: ReadableSize(0),
            target_file_size: ReadableSize(FILE_BYTES),
            purge_threshold: ReadableSize(PURGE_BYTES),
            // A recycled file would end in frames of an older life.
            enable_log_recycle: false,
            ..Config::default()
        };
        let engine = Engine::open(config).map_err(engine_error)?;
        if sync {
            sync_tree(&files)?;
        }
        claim.commit()?;
        let region = match engine.get(META_REGION, REGION_KEY) {
            Some(raw) => u64::from_le_bytes(
                raw.try_into()
                    .map_err(|_| WalError::Corrupt("the region number is damaged".to_owned()))?,
            ),
            None => META_REGION + 1,
        };
        let fence = Fence::open(&fence_path, sync)?;
        Ok(Self {
            engine,
            region,
            sync,
            syncs: 0,
            sync_time: Duration::ZERO,
            fence,
            files: DirBytes::new(vec![files]),
            _claim: claim,
        })
    }
}

impl Backend for RaftEngineBackend {
    fn name(&self) -> &'static str {
        "raft-engine"
    }

    fn meta(&self) -> Result<Option<Vec<u8>>, WalError> {
        Ok(self.engine.get(META_REGION, META_KEY))
    }

    fn fence(&self) -> Result<Option<Meta>, WalError> {
        Ok(Some(self.fence.found().clone()))
    }

    fn raise_fence(&mut self, meta: &Meta) -> Result<(), WalError> {
        self.fence.raise(meta)
    }

    fn read(&self, low: u64, high: u64, visit: &mut Visit<'_>) -> Result<(), WalError> {
        let Some((first, last)) = self.engine.first_index(self.region).zip(self.engine.last_index(self.region)) else {
            return Ok(());
        };
        let (mut next, end) = (low.max(first), high.min(last + 1));
        let mut fetched = Vec::new();
        while next < end {
            fetched.clear();
            let to = end.min(next + FETCH_ENTRIES);
            self.engine
                .fetch_entries_to::<Stored>(self.region, next, to, None, &mut fetched)
                .map_err(engine_error)?;
            for entry in &fetched {
                if visit(entry.index, &entry.data)? == ControlFlow::Break(()) {
                    return Ok(());
                }
            }
            next = to;
        }
        Ok(())
    }

    fn commit(&mut self, unit: Unit) -> Result<(), WalError> {
        let mut batch = LogBatch::with_capacity(unit.records.len() + 4);
        match unit.remove {
            // Entries that begin inside the log replace its end.
            Remove::Nothing | Remove::Suffix { .. } => {}
            Remove::Prefix { to } => batch.add_command(self.region, Command::Compact { index: to + 1 }),
            Remove::All => {
                batch.add_command(self.region, Command::Clean);
                self.region += 1;
                batch
                    .put(META_REGION, REGION_KEY.to_vec(), self.region.to_le_bytes().to_vec())
                    .map_err(engine_error)?;
            }
        }
        let entries: Vec<Entry> = unit
            .records
            .into_iter()
            .map(|(index, record)| Entry {
                index,
                data: record,
                ..Entry::default()
            })
            .collect();
        batch.add_entries::<Stored>(self.region, &entries).map_err(engine_error)?;
        batch.put(META_REGION, META_KEY.to_vec(), unit.meta).map_err(engine_error)?;
        let begun = Instant::now();
        self.engine.write(&mut batch, self.sync).map_err(engine_error)?;
        if self.sync {
            self.syncs += 1;
            self.sync_time += begun.elapsed();
        }
        if matches!(unit.remove, Remove::Prefix { .. } | Remove::All) {
            self.engine.purge_expired_files().map_err(engine_error)?;
        }
        Ok(())
    }

    fn check_background(&self) -> Result<(), WalError> {
        self.fence.check()
    }

    fn close(&mut self) -> Result<(), WalError> {
        self.fence.close()
    }

    fn stats(&self) -> WalStats {
        WalStats {
            bytes: self.files.get(),
            syncs: self.syncs + self.fence.syncs(),
            sync_time: self.sync_time,
        }
    }
}

#[expect(clippy::wildcard_enum_match_arm, reason = "whatever else the engine says is its own")]
fn engine_error(error: ::raft_engine::Error) -> WalError {
    match error {
        ::raft_engine::Error::Io(source) => WalError::Io {
            what: "raft-engine".to_owned(),
            source,
        },
        ::raft_engine::Error::Corruption(what) => WalError::Corrupt(what),
        other => WalError::Engine(format!("raft-engine: {other}")),
    }
}
