//! The RocksDB engine.
//!
//! One column family, a tag byte in front of each key, and no log of RocksDB's own: the raft log is the durability, and
//! [`sync`](KvStore::sync) flushes the memtable. Without a log a crash takes back whole memtables, newest first, so what is left is
//! always a prefix of the batches.
//!
//! *Invariants*
//! - Each batch carries its number under the key `0`, and the fence is raised after a flush: an engine that comes back behind it is refused.
//! - Blocks are checksummed (XXH3) and verified on every read; paranoid checks make damage an error, never a shorter answer (rule 8).

use std::{ops::Bound, path::Path, sync::Arc};

use parking_lot::{Mutex, RwLock};
use rocksdb::{BlockBasedOptions, Cache, DB, DBCompressionType, FlushOptions, Options, ReadOptions, WriteOptions};

use super::files::StoreDir;
use super::{KeyRange, KvStore, Op, Order, StoreError, Table, Visitor, WriteBatch, check_keys};

const BLOCK_CACHE_BYTES: usize = 64 << 20;
const MEMTABLE_BYTES: usize = 16 << 20;
const MAX_MEMTABLES: i32 = 3;
const BATCH_KEY: &[u8] = &[0];

/// See the module.
pub struct RocksDbStore {
    files: StoreDir,
    /// Replaced as a whole when the store is cleared.
    db: RwLock<DB>,
    /// Serialises writers; holds the number of the newest batch.
    newest_batch: Mutex<u64>,
}

impl RocksDbStore {
    /// Opens or creates the store in `dir`.
    pub(super) fn open(dir: &Path) -> Result<RocksDbStore, StoreError> {
        let files = StoreDir::open(dir, "rocksdb")?;
        let db = open_db(&files.current())?;
        let batch = newest_batch(&db)?;
        files.check_fence(batch)?;
        Ok(RocksDbStore {
            files,
            db: RwLock::new(db),
            newest_batch: Mutex::new(batch),
        })
    }
}

fn open_db(dir: &Path) -> Result<DB, StoreError> {
    DB::open(&options(), dir).map_err(failed)
}

/// Options for a bounded memory (cache, memtables, open files) and a disk close to the live bytes.
fn options() -> Options {
    let mut blocks = BlockBasedOptions::default();
    blocks.set_block_cache(&Cache::new_lru_cache(BLOCK_CACHE_BYTES));
    blocks.set_block_size(16 << 10);
    blocks.set_bloom_filter(10.0, false);
    blocks.set_cache_index_and_filter_blocks(true);
    blocks.set_pin_l0_filter_and_index_blocks_in_cache(true);
    blocks.set_format_version(6);

    let mut options = Options::default();
    options.create_if_missing(true);
    options.set_block_based_table_factory(&blocks);
    options.set_write_buffer_size(MEMTABLE_BYTES);
    options.set_max_write_buffer_number(MAX_MEMTABLES);
    options.set_target_file_size_base(16 << 20);
    options.set_max_bytes_for_level_base(64 << 20);
    options.set_level_compaction_dynamic_level_bytes(true);
    options.set_compression_type(DBCompressionType::Lz4);
    options.set_max_background_jobs(2);
    options.set_max_open_files(256);
    options.set_keep_log_file_num(2);
    options.set_max_log_file_size(1 << 20);
    options.set_paranoid_checks(true);
    // History is deleted in the order in which it was written: files that are mostly tombstones are compacted at once, which
    // gives their space back without anybody asking.
    options.add_compact_on_deletion_collector_factory(4096, 1024, 0.5);
    options
}

fn newest_batch(db: &DB) -> Result<u64, StoreError> {
    match db.get_pinned(BATCH_KEY).map_err(failed)? {
        Some(bytes) => match <[u8; 8]>::try_from(&*bytes) {
            Ok(bytes) => Ok(u64::from_le_bytes(bytes)),
            Err(_) => Err(StoreError::Corrupt("rocksdb: the batch number is not 8 bytes".into())),
        },
        None => Ok(0),
    }
}

impl KvStore for RocksDbStore {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Arc<[u8]>>, StoreError> {
        let db = self.db.read();
        let value = db.get_pinned(tagged(table, key)).map_err(failed)?;
        Ok(value.map(|bytes| Arc::from(&*bytes)))
    }

    fn scan(&self, table: Table, range: KeyRange<'_>, order: Order, visit: Visitor<'_>) -> Result<(), StoreError> {
        let (low, high) = (lower_bound(table, range.0), upper_bound(table, range.1));
        if low >= high {
            return Ok(());
        }
        let mut read = ReadOptions::default();
        read.set_iterate_lower_bound(low);
        read.set_iterate_upper_bound(high);
        let db = self.db.read();
        let mut records = db.raw_iterator_opt(read);
        match order {
            Order::Asc => records.seek_to_first(),
            Order::Desc => records.seek_to_last(),
        }
        while let Some((key, value)) = records.item() {
            if visit(key.get(1..).unwrap_or_default(), value).is_break() {
                return Ok(());
            }
            match order {
                Order::Asc => records.next(),
                Order::Desc => records.prev(),
            }
        }
        records.status().map_err(failed)
    }

    fn write(&self, batch: WriteBatch) -> Result<(), StoreError> {
        check_keys(&batch)?;
        let mut newest = self.newest_batch.lock();
        let number = *newest + 1;
        let mut changes = rocksdb::WriteBatch::default();
        for op in &batch.ops {
            match op {
                Op::Put { table, key, value } => changes.put(tagged(*table, key), value),
                Op::Delete { table, key } => changes.delete(tagged(*table, key)),
            }
        }
        changes.put(BATCH_KEY, number.to_le_bytes());
        let mut unlogged = WriteOptions::default();
        unlogged.disable_wal(true);
        self.db.read().write_opt(changes, &unlogged).map_err(failed)?;
        *newest = number;
        Ok(())
    }

    fn sync(&self) -> Result<(), StoreError> {
        let newest = self.newest_batch.lock();
        let db = self.db.read();
        let batch = *newest;
        drop(newest);
        let mut wait = FlushOptions::default();
        wait.set_wait(true);
        db.flush_opt(&wait).map_err(failed)?;
        self.files.raise_fence(batch)
    }

    fn survives_crashes(&self) -> bool {
        true
    }

    fn keeps_records(&self) -> bool {
        true
    }

    fn clear(&self) -> Result<(), StoreError> {
        let mut newest = self.newest_batch.lock();
        let mut db = self.db.write();
        let next = open_db(&self.files.prepare_next()?)?;
        self.files.switch_to_next()?;
        drop(std::mem::replace(&mut *db, next));
        *newest = 0;
        self.files.remove_other_generations()
    }

    fn bytes(&self) -> u64 {
        let db = self.db.read();
        let property = |name| db.property_int_value(name).ok().flatten().unwrap_or(0);
        property("rocksdb.total-sst-files-size") + property("rocksdb.size-all-mem-tables")
    }

    fn backend(&self) -> &'static str {
        "rocksdb"
    }
}

fn tagged(table: Table, key: &[u8]) -> Vec<u8> {
    [&[table as u8], key].concat()
}

/// The least engine key right behind `key`.
fn behind(table: Table, key: &[u8]) -> Vec<u8> {
    [&[table as u8], key, &[0]].concat()
}

/// The first engine key of the range.
fn lower_bound(table: Table, low: Bound<&[u8]>) -> Vec<u8> {
    match low {
        Bound::Included(key) => tagged(table, key),
        Bound::Excluded(key) => behind(table, key),
        Bound::Unbounded => tagged(table, &[]),
    }
}

/// The first engine key behind the range.
fn upper_bound(table: Table, high: Bound<&[u8]>) -> Vec<u8> {
    match high {
        Bound::Included(key) => behind(table, key),
        Bound::Excluded(key) => tagged(table, key),
        Bound::Unbounded => vec![table as u8 + 1],
    }
}

fn failed(error: rocksdb::Error) -> StoreError {
    if error.kind() == rocksdb::ErrorKind::Corruption {
        StoreError::Corrupt(format!("rocksdb: {error}"))
    } else {
        StoreError::Engine(format!("rocksdb: {error}"))
    }
}
