//! RocksDB as the log (cargo feature `rocksdb`).
//!
//! A unit is one write batch, written with `sync`. RocksDB syncs the files and directories it creates. Its own log is recovered up to the first
//! damage in its tail, which the fence notices when it was more than a torn write.

use std::{
    ops::ControlFlow,
    path::Path,
    time::{Duration, Instant},
};

use ::rocksdb::{DB, DBRecoveryMode, Direction, IteratorMode, Options, ReadOptions, WriteBatch, WriteOptions};

use super::{
    WalError, WalStats,
    checked::{Backend, Visit},
    fence::Fence,
    files::{Claim, DirBytes},
    record::{Meta, Remove, Unit},
};

const META_KEY: &[u8] = b"m";
const MEMTABLE_BYTES: usize = 16 * 1024 * 1024;
const LOG_BYTES: u64 = 32 * 1024 * 1024;
const KEY_BYTES: usize = 9;

/// The backend; see the module.
pub(crate) struct RocksDbBackend {
    db: DB,
    write: WriteOptions,
    sync: bool,
    syncs: u64,
    sync_time: Duration,
    fence: Fence,
    files: DirBytes,
    _claim: Claim,
}

impl RocksDbBackend {
    /// Opens or creates the log.
    pub(crate) fn open(dir: &Path, sync: bool) -> Result<Self, WalError> {
        let mut claim = Claim::take(dir, "rocksdb", sync)?;
        let fence_path = dir.join("fence");
        if claim.fresh {
            Fence::create(&fence_path)?;
        }
        let files = dir.join("rocksdb");
        let db = DB::open(&options(), &files).map_err(engine_error)?;
        claim.commit()?;
        let mut write = WriteOptions::default();
        write.set_sync(sync);
        let fence = Fence::open(&fence_path, sync)?;
        Ok(Self {
            db,
            write,
            sync,
            syncs: 0,
            sync_time: Duration::ZERO,
            fence,
            files: DirBytes::new(vec![files]),
            _claim: claim,
        })
    }
}

fn options() -> Options {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.set_paranoid_checks(true);
    options.set_wal_recovery_mode(DBRecoveryMode::TolerateCorruptedTailRecords);
    options.set_write_buffer_size(MEMTABLE_BYTES);
    options.set_max_write_buffer_number(2);
    options.set_max_total_wal_size(LOG_BYTES);
    options.set_max_background_jobs(2);
    options.set_keep_log_file_num(2);
    options.set_max_open_files(64);
    options
}

fn entry_key(index: u64) -> [u8; KEY_BYTES] {
    let mut key = [b'e'; KEY_BYTES];
    key[1..].copy_from_slice(&index.to_be_bytes());
    key
}

impl Backend for RocksDbBackend {
    fn name(&self) -> &'static str {
        "rocksdb"
    }

    fn meta(&self) -> Result<Option<Vec<u8>>, WalError> {
        self.db.get(META_KEY).map_err(engine_error)
    }

    fn fence(&self) -> Result<Option<Meta>, WalError> {
        Ok(Some(self.fence.found().clone()))
    }

    fn raise_fence(&mut self, meta: &Meta) -> Result<(), WalError> {
        self.fence.raise(meta)
    }

    fn read(&self, low: u64, high: u64, visit: &mut Visit<'_>) -> Result<(), WalError> {
        let mut read = ReadOptions::default();
        read.set_verify_checksums(true);
        read.set_iterate_upper_bound(entry_key(high).to_vec());
        for item in self.db.iterator_opt(IteratorMode::From(&entry_key(low), Direction::Forward), read) {
            let (key, record) = item.map_err(engine_error)?;
            let index = key.strip_prefix(b"e").and_then(|rest| rest.try_into().ok()).map(u64::from_be_bytes);
            let index = index.ok_or_else(|| WalError::Corrupt(format!("strange key {key:?}")))?;
            if visit(index, &record)? == ControlFlow::Break(()) {
                break;
            }
        }
        Ok(())
    }

    fn commit(&mut self, unit: Unit) -> Result<(), WalError> {
        let mut batch = WriteBatch::default();
        match unit.remove {
            Remove::Nothing => {}
            Remove::Suffix { from, to } => batch.delete_range(entry_key(from), entry_key(to + 1)),
            Remove::Prefix { to } => batch.delete_range(entry_key(0), entry_key(to + 1)),
            Remove::All => batch.delete_range(entry_key(0), entry_key(u64::MAX)),
        }
        for (index, record) in &unit.records {
            batch.put(entry_key(*index), record);
        }
        batch.put(META_KEY, &unit.meta);
        let begun = Instant::now();
        self.db.write_opt(batch, &self.write).map_err(engine_error)?;
        if self.sync {
            self.syncs += 1;
            self.sync_time += begun.elapsed();
        }
        if let Remove::Prefix { to } = unit.remove {
            // Whole files below the start go at once instead of waiting for a compaction.
            self.db.delete_file_in_range(entry_key(0), entry_key(to)).map_err(engine_error)?;
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
fn engine_error(error: ::rocksdb::Error) -> WalError {
    match error.kind() {
        ::rocksdb::ErrorKind::Corruption => WalError::Corrupt(error.into_string()),
        ::rocksdb::ErrorKind::IOError => WalError::Io {
            what: "rocksdb".to_owned(),
            source: std::io::Error::other(error.into_string()),
        },
        _ => WalError::Engine(format!("rocksdb: {}", error.into_string())),
    }
}
