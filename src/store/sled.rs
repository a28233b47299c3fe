//! The sled engine, hardened: sled 0.34 alone is not durable on Linux and can lose flushed data without a word. After a power cut it may also
//! bring back any part of what was written since it was last synced, so what it holds is believed only after an orderly close.
//!
//! Tree keys (one tree, so that `apply_batch` is atomic across tables):
//! ```text
//! tag | key                    head: the record's first bytes, and how many there are in all
//! tag + 0x80 | key | n (u16)   chunk n = 1, 2, … of a value longer than a head
//! 0                            number of the newest batch
//! ```
//!
//! *Invariants*
//! - Every tree value carries a CRC32C over its tree key, the number of the batch that wrote it and its bytes, verified whenever it
//!   is read (rule 8). A record whose chunks come from different batches is read again, and is damage if that persists.
//! - `sync` is: sled's flush (which only writes), fsync of anything in `blobs/`, fdatasync of `db` by a descriptor of our own.
//! - `close` syncs, once sled has nothing left to write, and leaves the mark `CLEAN` with the newest batch; nothing is written afterwards.
//!   `open` takes the mark away before sled touches a file. A generation without its mark, or that is not at the batch of the mark, is
//!   discarded: its owner rebuilds it from a snapshot and the log.
//! - Values are cut at 4 KiB and segments are 2 MiB, so that a leaf of 17 records with the longest keys stays below sled's blob threshold (a quarter
//!   of a segment). Only an inner node of long keys that differ late can exceed it; such blobs are synced like the rest.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    ops::{Bound, ControlFlow},
    os::unix::fs::MetadataExt,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::{Mutex, RwLock};

use super::files::{StoreDir, disk_bytes, io_error, sync_dir};
use super::{KeyRange, KvStore, Op, Order, StoreError, Table, Visitor, WriteBatch, check_keys};

/// Page cache, unless asked for otherwise.
pub(super) const DEFAULT_CACHE_BYTES: u64 = 64 << 20;
const SEGMENT_BYTES: usize = 2 << 20;
/// Payload of a head or chunk; with headers a tree value stays within 4 KiB.
const CHUNK_BYTES: usize = 4096 - HEAD_HEADER;
/// CRC32C (u32), batch (u64), total length (u32).
const HEAD_HEADER: usize = 16;
/// CRC32C (u32), batch (u64).
const CHUNK_HEADER: usize = 12;
/// Tag bit of chunks behind the head.
const CHUNK_TAG: u8 = 0x80;
const BATCH_KEY: &[u8] = &[0];
const MAX_VALUE_BYTES: usize = CHUNK_BYTES * u16::MAX as usize;
/// Reads of a record that changes meanwhile. Each repetition needs another write to exactly that record in between.
const READ_ATTEMPTS: usize = 100;

/// See the module.
#[derive(Debug)]
pub struct SledStore {
    files: StoreDir,
    cache_bytes: u64,
    /// Replaced as a whole when the store is cleared.
    engine: RwLock<Engine>,
    /// Serialises writers.
    writer: Mutex<Writer>,
    /// Size of `blobs/` when it was last looked at.
    blob_bytes: AtomicU64,
}

#[derive(Debug)]
struct Writer {
    newest_batch: u64,
    /// The mark of an orderly close is on the disk: another write would make it a lie.
    closed: bool,
}

/// One generation: the database and our own descriptor of its file.
#[derive(Debug)]
struct Engine {
    db: sled::Db,
    file: File,
}

impl SledStore {
    /// Opens or creates the store in `dir`. It is empty unless it was closed.
    pub(super) fn open(dir: &Path, cache_bytes: u64) -> Result<SledStore, StoreError> {
        let files = StoreDir::open(dir, "sled")?;
        let was_new = files.is_new()?;
        let whole = match files.take_clean()? {
            Some(batch) => Engine::open_at(&files.current(), cache_bytes, batch)?.map(|engine| (engine, batch)),
            None => None,
        };
        let (engine, newest_batch) = match whole {
            Some(whole) => whole,
            None => {
                if !was_new {
                    tracing::warn!(
                        store = %files.current().display(),
                        "the sled store was not closed in order; it is rebuilt from the newest snapshot and the log"
                    );
                    files.discard()?;
                }
                (Engine::open(&files.current(), cache_bytes)?, 0)
            }
        };
        let store = SledStore {
            files,
            cache_bytes,
            engine: RwLock::new(engine),
            writer: Mutex::new(Writer {
                newest_batch,
                closed: false,
            }),
            blob_bytes: AtomicU64::new(0),
        };
        store.measure_blobs();
        Ok(store)
    }

    fn measure_blobs(&self) {
        self.blob_bytes
            .store(disk_bytes(&self.files.current().join("blobs")), Ordering::Relaxed);
    }

    /// Adds one operation to the tree's batch: heads and chunks to write, chunks of the former value to remove.
    fn plan(engine: &Engine, op: &Op, number: u64, tree: &mut sled::Batch) -> Result<(), StoreError> {
        let head_key = head_key(op.table(), op.key());
        let chunks_before = match engine.db.get(&head_key).map_err(failed)? {
            Some(head) => Head::decode(&head_key, &head)?.chunks(),
            None => 0,
        };
        let chunks_now = match op {
            Op::Put { value, .. } => put_record(tree, op, &head_key, value, number)?,
            Op::Delete { .. } => {
                tree.remove(head_key);
                0
            }
        };
        for n in chunks_now + 1..=chunks_before {
            tree.remove(chunk_key(op.table(), op.key(), n));
        }
        Ok(())
    }
}

impl Writer {
    fn check_open(&self) -> Result<(), StoreError> {
        if self.closed {
            return Err(StoreError::Engine("sled: a write after the store was closed".into()));
        }
        Ok(())
    }
}

/// Writes head and chunks; returns the number of chunks behind the head.
fn put_record(tree: &mut sled::Batch, op: &Op, head_key: &[u8], value: &[u8], number: u64) -> Result<usize, StoreError> {
    if value.len() > MAX_VALUE_BYTES {
        return Err(StoreError::Engine(format!(
            "a value of {} bytes is over the limit of {MAX_VALUE_BYTES}",
            value.len()
        )));
    }
    let mut parts = value.chunks(CHUNK_BYTES);
    let total = (value.len() as u32).to_le_bytes();
    tree.insert(head_key, seal(head_key, number, &[&total, parts.next().unwrap_or_default()]));
    let mut chunks = 0;
    for part in parts {
        chunks += 1;
        let key = chunk_key(op.table(), op.key(), chunks);
        let sealed = seal(&key, number, &[part]);
        tree.insert(key, sealed);
    }
    Ok(chunks)
}

impl Engine {
    fn open(dir: &Path, cache_bytes: u64) -> Result<Engine, StoreError> {
        let config = sled::Config::new()
            .path(dir)
            .cache_capacity(cache_bytes)
            .segment_size(SEGMENT_BYTES)
            .flush_every_ms(None);
        let db = open_when_unlocked(&config)?;
        let path = dir.join("db");
        let file = File::options()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(|error| io_error("opening", &path, error))?;
        file.sync_all().map_err(|error| io_error("syncing", &path, error))?;
        sync_dir(&dir.join("blobs"))?;
        sync_dir(dir)?;
        Ok(Engine { db, file })
    }

    /// Opens what was closed at `batch`; `None` if it is at another one or damaged, so that it is not what was closed.
    fn open_at(dir: &Path, cache_bytes: u64, batch: u64) -> Result<Option<Engine>, StoreError> {
        let opened = Engine::open(dir, cache_bytes).and_then(|engine| Ok((engine.newest_batch()?, engine)));
        match opened {
            Ok((found, engine)) if found == batch => Ok(Some(engine)),
            Ok((found, _)) => {
                tracing::warn!(
                    found,
                    closed = batch,
                    "the sled store came back at another batch than it was closed at"
                );
                Ok(None)
            }
            Err(error @ StoreError::Corrupt(_)) => {
                tracing::warn!(%error, "the sled store came back damaged");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn newest_batch(&self) -> Result<u64, StoreError> {
        let Some(value) = self.db.get(BATCH_KEY).map_err(failed)? else {
            return Ok(0);
        };
        Ok(unseal(BATCH_KEY, &value)?.0)
    }

    /// Everything written before the call is on the disk when it returns.
    fn sync(&self, dir: &Path) -> Result<(), StoreError> {
        // Until nothing is left: what sled would otherwise write when it is dropped.
        while self.db.flush().map_err(failed)? > 0 {}
        sync_files(&dir.join("blobs"))?;
        self.file.sync_data().map_err(|error| io_error("syncing", &dir.join("db"), error))
    }

    /// The whole value whose head is `head`, or `None` if the record changed meanwhile.
    fn assemble(&self, table: Table, key: &[u8], head: &Head<'_>) -> Result<Option<Vec<u8>>, StoreError> {
        let mut value = Vec::with_capacity(head.total);
        value.extend_from_slice(head.bytes);
        for n in 1..=head.chunks() {
            let chunk_key = chunk_key(table, key, n);
            let Some(chunk) = self.db.get(&chunk_key).map_err(failed)? else {
                return Ok(None);
            };
            let (batch, bytes) = unseal(&chunk_key, &chunk)?;
            if batch != head.batch {
                return Ok(None);
            }
            value.extend_from_slice(bytes);
        }
        if value.len() != head.total {
            return Err(damaged("the chunks do not add up", &head_key(table, key)));
        }
        Ok(Some(value))
    }

    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Arc<[u8]>>, StoreError> {
        let head_key = head_key(table, key);
        for _ in 0..READ_ATTEMPTS {
            let Some(sealed) = self.db.get(&head_key).map_err(failed)? else {
                return Ok(None);
            };
            let head = Head::decode(&head_key, &sealed)?;
            if head.chunks() == 0 {
                return head.whole(&head_key).map(|bytes| Some(bytes.into()));
            }
            if let Some(value) = self.assemble(table, key, &head)? {
                return Ok(Some(value.into()));
            }
        }
        Err(damaged("chunks are missing", &head_key))
    }

    /// Hands one record of a scan to the visitor. A record removed while the scan runs is left out.
    fn visit(&self, table: Table, tree_key: &[u8], sealed: &[u8], visit: Visitor<'_>) -> Result<ControlFlow<()>, StoreError> {
        let key = tree_key.get(1..).unwrap_or_default();
        let head = Head::decode(tree_key, sealed)?;
        if head.chunks() == 0 {
            return Ok(visit(key, head.whole(tree_key)?));
        }
        match self.get(table, key)? {
            Some(value) => Ok(visit(key, &value)),
            None => Ok(ControlFlow::Continue(())),
        }
    }
}

/// Syncs the files in a directory, and their names. One that vanishes meanwhile is sled's to remove.
fn sync_files(dir: &Path) -> Result<(), StoreError> {
    let sync = || -> std::io::Result<()> {
        for entry in fs::read_dir(dir)? {
            match File::open(entry?.path()) {
                Ok(file) => file.sync_all()?,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    };
    sync().map_err(|error| io_error("syncing", dir, error))?;
    sync_dir(dir)
}

/// Opens the database. sled's threads give the lock of a closed one back only after a while.
#[expect(
    clippy::disallowed_methods,
    reason = "only while a member starts, with an end, on a thread that does nothing else"
)]
fn open_when_unlocked(config: &sled::Config) -> Result<sled::Db, StoreError> {
    const ATTEMPTS: u32 = 50;
    let mut attempt = 0;
    loop {
        match config.open() {
            Ok(db) => return Ok(db),
            Err(sled::Error::Io(error)) if attempt < ATTEMPTS && error.to_string().contains("lock") => {
                attempt += 1;
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(error) => return Err(failed(error)),
        }
    }
}

impl KvStore for SledStore {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Arc<[u8]>>, StoreError> {
        self.engine.read().get(table, key)
    }

    fn scan(&self, table: Table, range: KeyRange<'_>, order: Order, visit: Visitor<'_>) -> Result<(), StoreError> {
        let Some(range) = tree_range(table, range) else { return Ok(()) };
        let engine = self.engine.read();
        let mut records = engine.db.range::<Vec<u8>, _>(range);
        loop {
            let next = match order {
                Order::Asc => records.next(),
                Order::Desc => records.next_back(),
            };
            let Some(record) = next else { return Ok(()) };
            let (tree_key, sealed) = record.map_err(failed)?;
            if engine.visit(table, &tree_key, &sealed, visit)?.is_break() {
                return Ok(());
            }
        }
    }

    fn write(&self, batch: WriteBatch) -> Result<(), StoreError> {
        check_keys(&batch)?;
        let mut writer = self.writer.lock();
        writer.check_open()?;
        let engine = self.engine.read();
        let number = writer.newest_batch + 1;
        let last_ops: BTreeMap<_, _> = batch.ops.iter().map(|op| ((op.table(), op.key()), op)).collect();
        let mut tree = sled::Batch::default();
        for op in last_ops.values() {
            SledStore::plan(&engine, op, number, &mut tree)?;
        }
        tree.insert(BATCH_KEY, seal(BATCH_KEY, number, &[]));
        engine.db.apply_batch(tree).map_err(failed)?;
        writer.newest_batch = number;
        Ok(())
    }

    fn sync(&self) -> Result<(), StoreError> {
        let engine = self.engine.read();
        engine.sync(&self.files.current())?;
        self.measure_blobs();
        Ok(())
    }

    fn survives_crashes(&self) -> bool {
        false
    }

    fn keeps_records(&self) -> bool {
        true
    }

    fn close(&self) -> Result<(), StoreError> {
        let mut writer = self.writer.lock();
        if writer.closed {
            return Ok(());
        }
        let dir = self.files.current();
        self.engine.read().sync(&dir)?;
        // sled's own snapshots of its page table are beside `db`.
        sync_files(&dir)?;
        self.files.mark_clean(writer.newest_batch)?;
        writer.closed = true;
        Ok(())
    }

    fn clear(&self) -> Result<(), StoreError> {
        let mut writer = self.writer.lock();
        writer.check_open()?;
        let mut engine = self.engine.write();
        let dir = self.files.prepare_next()?;
        let next = Engine::open(&dir, self.cache_bytes)?;
        next.sync(&dir)?;
        self.files.switch_to_next()?;
        drop(std::mem::replace(&mut *engine, next));
        writer.newest_batch = 0;
        self.files.remove_other_generations()?;
        self.measure_blobs();
        Ok(())
    }

    fn bytes(&self) -> u64 {
        let log = self.engine.read().file.metadata().map_or(0, |metadata| metadata.blocks() * 512);
        log + self.blob_bytes.load(Ordering::Relaxed)
    }

    fn backend(&self) -> &'static str {
        "sled"
    }
}

fn head_key(table: Table, key: &[u8]) -> Vec<u8> {
    [&[table as u8], key].concat()
}

fn chunk_key(table: Table, key: &[u8], n: usize) -> Vec<u8> {
    [&[table as u8 | CHUNK_TAG], key, &(n as u16).to_be_bytes()].concat()
}

type TreeRange = (Bound<Vec<u8>>, Bound<Vec<u8>>);

/// The range in the tree, or `None` if it is empty: sled panics on a range that ends before it begins.
fn tree_range(table: Table, (low, high): KeyRange<'_>) -> Option<TreeRange> {
    let low = match low {
        Bound::Included(key) => Bound::Included(head_key(table, key)),
        Bound::Excluded(key) => Bound::Excluded(head_key(table, key)),
        Bound::Unbounded => Bound::Included(vec![table as u8]),
    };
    let high = match high {
        Bound::Included(key) => Bound::Included(head_key(table, key)),
        Bound::Excluded(key) => Bound::Excluded(head_key(table, key)),
        Bound::Unbounded => Bound::Excluded(vec![table as u8 + 1]),
    };
    let is_empty = match (&low, &high) {
        (Bound::Included(low), Bound::Included(high)) => low > high,
        (Bound::Included(low) | Bound::Excluded(low), Bound::Included(high) | Bound::Excluded(high)) => low >= high,
        _ => false,
    };
    (!is_empty).then_some((low, high))
}

/// A decoded head.
struct Head<'a> {
    batch: u64,
    total: usize,
    bytes: &'a [u8],
}

impl<'a> Head<'a> {
    fn decode(tree_key: &[u8], sealed: &'a [u8]) -> Result<Head<'a>, StoreError> {
        let (batch, rest) = unseal(tree_key, sealed)?;
        let (total, bytes) = rest.split_first_chunk::<4>().ok_or_else(|| damaged("too short", tree_key))?;
        Ok(Head {
            batch,
            total: u32::from_le_bytes(*total) as usize,
            bytes,
        })
    }

    /// Number of chunks behind the head.
    fn chunks(&self) -> usize {
        self.total.div_ceil(CHUNK_BYTES).saturating_sub(1)
    }

    /// The value of a record without further chunks.
    fn whole(&self, tree_key: &[u8]) -> Result<&'a [u8], StoreError> {
        if self.bytes.len() == self.total {
            Ok(self.bytes)
        } else {
            Err(damaged("wrong length", tree_key))
        }
    }
}

/// CRC32C over tree key, batch and parts; then batch and parts.
fn seal(tree_key: &[u8], batch: u64, parts: &[&[u8]]) -> Vec<u8> {
    let mut sealed = Vec::with_capacity(CHUNK_HEADER + parts.iter().map(|part| part.len()).sum::<usize>());
    sealed.extend_from_slice(&[0; 4]);
    sealed.extend_from_slice(&batch.to_le_bytes());
    parts.iter().for_each(|part| sealed.extend_from_slice(part));
    let crc = crc32c::crc32c_append(crc32c::crc32c(tree_key), &sealed[4..]);
    sealed[..4].copy_from_slice(&crc.to_le_bytes());
    sealed
}

/// Batch and bytes of a sealed tree value.
fn unseal<'a>(tree_key: &[u8], sealed: &'a [u8]) -> Result<(u64, &'a [u8]), StoreError> {
    let (crc, covered) = sealed.split_first_chunk::<4>().ok_or_else(|| damaged("too short", tree_key))?;
    if u32::from_le_bytes(*crc) != crc32c::crc32c_append(crc32c::crc32c(tree_key), covered) {
        return Err(damaged("its checksum does not match", tree_key));
    }
    let (batch, bytes) = covered.split_first_chunk::<8>().ok_or_else(|| damaged("too short", tree_key))?;
    Ok((u64::from_le_bytes(*batch), bytes))
}

fn damaged(what: &str, tree_key: &[u8]) -> StoreError {
    let shown = &tree_key[..tree_key.len().min(64)];
    StoreError::Corrupt(format!("sled: {what} (tree key {})", shown.escape_ascii()))
}

fn failed(error: sled::Error) -> StoreError {
    match error {
        sled::Error::Corruption { .. } => StoreError::Corrupt(format!("sled: {error}")),
        sled::Error::Io(source) => StoreError::Io {
            what: "sled".into(),
            source,
        },
        other @ (sled::Error::CollectionNotFound(_) | sled::Error::Unsupported(_) | sled::Error::ReportableBug(_)) => {
            StoreError::Engine(format!("sled: {other}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(store: &SledStore, keys: std::ops::Range<u64>, key_len: usize, value_len: usize) {
        for i in keys {
            let mut key = i.to_be_bytes().to_vec();
            key.resize(key_len, b'k');
            let mut batch = WriteBatch::default();
            batch.put(Table::Revision, key, vec![i as u8; value_len]);
            store.write(batch).unwrap();
        }
    }

    fn blobs(store: &SledStore) -> usize {
        fs::read_dir(store.files.current().join("blobs")).unwrap().count()
    }

    #[test]
    fn large_values_and_long_keys_leave_no_blobs() {
        let dir = tempfile::tempdir().unwrap();
        let store = SledStore::open(dir.path(), DEFAULT_CACHE_BYTES).unwrap();
        write(&store, 0..8, 12, 1 << 20);
        write(&store, 100..400, super::super::MAX_KEY_BYTES, 5000);
        write(&store, 0..8, 12, 1 << 19);
        store.sync().unwrap();
        assert_eq!(blobs(&store), 0);
    }

    fn open(dir: &Path) -> SledStore {
        SledStore::open(dir, DEFAULT_CACHE_BYTES).unwrap()
    }

    fn records(store: &SledStore) -> usize {
        let mut count = 0;
        let all = (Bound::Unbounded, Bound::Unbounded);
        let count_one = &mut |_: &[u8], _: &[u8]| {
            count += 1;
            ControlFlow::Continue(())
        };
        store.scan(Table::Revision, all, Order::Asc, count_one).unwrap();
        count
    }

    #[test]
    fn what_was_closed_is_there_and_its_mark_is_gone_as_soon_as_it_is_open() {
        let dir = tempfile::tempdir().unwrap();
        let mark = dir.path().join("CLEAN");
        for round in 0..3 {
            let store = open(dir.path());
            assert!(!mark.exists(), "a crash from here on must be seen");
            assert_eq!(records(&store), round as usize * 10);
            write(&store, round * 10..(round + 1) * 10, 12, 6000);
            store.close().unwrap();
            store.close().unwrap();
            assert!(mark.exists());
            assert_eq!(records(&store), (round as usize + 1) * 10, "it can still be read");
        }
    }

    #[test]
    fn rule_13_what_was_not_closed_is_discarded_however_well_it_was_synced() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        write(&store, 0..10, 12, 100);
        store.close().unwrap();
        drop(store);
        let store = open(dir.path());
        assert_eq!(records(&store), 10);
        write(&store, 10..20, 12, 100);
        store.sync().unwrap();
        drop(store);
        let store = open(dir.path());
        assert_eq!(records(&store), 0);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "STORE and one generation");
        write(&store, 0..5, 12, 100);
        store.close().unwrap();
        drop(store);
        assert_eq!(records(&open(dir.path())), 5);
    }

    #[test]
    fn a_store_that_came_back_older_or_damaged_is_discarded() {
        type Harm = fn(&Path, &Path);
        let older: Harm = |db, before| assert!(fs::copy(before, db).unwrap() > 0);
        let truncated: Harm = |db, _| File::options().write(true).open(db).unwrap().set_len(SEGMENT_BYTES as u64).unwrap();
        for harm in [older, truncated] {
            let dir = tempfile::tempdir().unwrap();
            let store = open(dir.path());
            write(&store, 0..10, 12, 100);
            store.sync().unwrap();
            let (db, before) = (store.files.current().join("db"), dir.path().join("before"));
            fs::copy(&db, &before).unwrap();
            write(&store, 10..1000, 12, 5000);
            store.close().unwrap();
            drop(store);
            // sled gives its file back only a while after it was dropped.
            drop(open_when_unlocked(&sled::Config::new().path(db.parent().unwrap()).segment_size(SEGMENT_BYTES)).unwrap());
            harm(&db, &before);
            // sled answers some damage with a panic of its own: that ends the process, and serves nothing either.
            let found = std::panic::catch_unwind(|| records(&open(dir.path())));
            assert!(matches!(found, Ok(0) | Err(_)), "{found:?}");
        }
    }

    #[test]
    fn nothing_is_written_after_the_close() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        write(&store, 0..1, 12, 100);
        store.close().unwrap();
        let mut batch = WriteBatch::default();
        batch.put(Table::Revision, *b"late", *b"1");
        assert!(store.write(batch).is_err() && store.clear().is_err());
        drop(store);
        assert_eq!(records(&open(dir.path())), 1);
    }
}
