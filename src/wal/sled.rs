//! The sled engine (the default): entries live in one sled tree, a redo journal in front of it makes them durable.
//!
//! sled 0.34.7 alone does not survive a power cut: its `flush` ends in `sync_file_range`, it may write over a freed segment before what
//! replaced it is durable, it never syncs a directory, and it reports none of that. So it is never trusted with the newest data:
//!
//! 1. A unit is written to the [journal](super::journal) with one fdatasync. Then it is durable and `append` returns.
//! 2. A thread, the *keeper*, puts it into sled: entries in records of at most [`CHUNK_BYTES`] (larger items, and then whole leaves, would go to
//!    `blobs/`, which sled never syncs; the directory is asserted to be empty). After each [`CHECKPOINT_BYTES`] it flushes sled and then calls
//!    fdatasync on a descriptor of its own of `sled/db`. The step is far smaller than a segment of sled (512 KiB), so that a segment that
//!    was freed is not filled again before an fdatasync covered what replaced it.
//! 3. A half of the journal is used again only when a checkpoint covered all its units.
//! 4. At open the units in the journal are compared with sled, what differs is put again, then a checkpoint follows. So whatever sled lost of
//!    the last half to whole journal is repaired. Older losses are noticed by the scan that every engine gets, and refused.
//!
//! Why not sync sled itself before `append` returns, with the fence behind it? That is two fdatasyncs and sled's own path for each
//! append, and it notices sled's losses without repairing any.
//!
//! `flush_async` is never called (it can hang), nor `apply_batch` (it takes the keys in random order and seals sled's buffer twice; the journal
//! already makes units atomic). Removal goes in steps of [`STEP_RECORDS`] records. Entries that the keeper has not put yet are read from memory; the journal bounds them.

use std::{
    collections::{BTreeMap, VecDeque},
    fs::{File, OpenOptions},
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use ::sled::Db;
use bytes::Bytes;
use parking_lot::{Condvar, Mutex};

use super::{
    WalError, WalStats,
    checked::{Backend, Visit, lost},
    fence::Fence,
    files::{Claim, DirBytes, io_error, sync_dir, sync_tree},
    journal::{self, Journal},
    record::{Meta, Remove, Unit, record_length},
};

/// Largest value put into sled.
const CHUNK_BYTES: usize = 4000;
/// Bytes put into sled between two checkpoints.
const CHECKPOINT_BYTES: usize = 64 * 1024;
/// Records removed in one step.
const STEP_RECORDS: usize = 256;
/// Bytes of journal that may wait for the keeper. Smaller than a half, so that appends are slowed to the keeper's pace one by one instead of
/// all stopping when the journal is full.
const BACKLOG_BYTES: u64 = 4 * 1024 * 1024;
/// Bytes of journal at which the keeper starts: many small units together cost far less than each alone.
const WAKE_BYTES: u64 = 256 * 1024;
const CACHE_BYTES: u64 = 16 * 1024 * 1024;
const META_KEY: &[u8] = b"m";

/// What can be chosen.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Options {
    /// `false`: no fdatasync, for tests.
    pub sync: bool,
    /// Size of each half of the journal. May differ from one opening to the next.
    pub half_bytes: u64,
}

impl Options {
    pub(crate) fn new(sync: bool) -> Self {
        Self {
            sync,
            half_bytes: journal::HALF_BYTES,
        }
    }
}

/// The backend; see the module. Fields are dropped in order: the keeper first, the lock last.
pub(crate) struct SledBackend {
    keeper: Option<JoinHandle<()>>,
    shared: Arc<Shared>,
    journal: Journal,
    half_bytes: u64,
    wake_bytes: u64,
    /// Records the keeper may not have put yet: index, seq of their unit, record. Ascending in both; they hide what sled has at and after the first.
    tail: VecDeque<(u64, u64, Bytes)>,
    meta: Option<Vec<u8>>,
    table: Table,
    fence: Fence,
    files: DirBytes,
    _claim: Claim,
}

impl SledBackend {
    /// Opens or creates the log and brings sled up to the journal.
    pub(crate) fn open(dir: &Path, options: Options) -> Result<Self, WalError> {
        let mut claim = Claim::take(dir, "sled", options.sync)?;
        let fence_path = dir.join("fence");
        if claim.fresh {
            journal::create(dir, options.half_bytes)?;
            Fence::create(&fence_path)?;
        }
        let table = Table::open(&dir.join("sled"), options.sync)?;
        if claim.fresh {
            table.checkpoint()?;
            claim.commit()?;
        }
        let (journal, units) = Journal::open(dir, claim.id, options.half_bytes, options.sync)?;
        let durable_seq = units.last().map_or(0, |unit| unit.seq);
        table.restore(units)?;
        let meta = table.meta()?;
        let leftovers_to = meta.as_deref().and_then(Meta::decode).map_or(0, |meta| meta.start.index);
        let shared = Arc::new(Shared::new(durable_seq, leftovers_to));
        let wake_bytes = WAKE_BYTES.min(options.half_bytes / 4);
        let keeper = Keeper {
            shared: Arc::clone(&shared),
            table: table.clone(),
            wake_bytes,
            unsynced_bytes: 0,
            removals_due: 0,
        };
        let keeper = std::thread::Builder::new()
            .name("wal-keeper".to_owned())
            .spawn(move || keeper.run())
            .map_err(io_error("start the thread for", dir))?;
        let fence = Fence::open(&fence_path, options.sync)?;
        Ok(Self {
            keeper: Some(keeper),
            shared,
            journal,
            half_bytes: options.half_bytes,
            wake_bytes,
            tail: VecDeque::new(),
            meta,
            table,
            fence,
            files: DirBytes::new(vec![dir.to_owned(), dir.join("sled")]),
            _claim: claim,
        })
    }

    /// Waits until the half that the next append needs is free, and lets go of what the keeper has put.
    fn make_room(&mut self) -> Result<(), WalError> {
        let needed_seq = self.journal.must_be_kept_elsewhere();
        let mut state = self.shared.state.lock();
        state.wanted_seq = state.wanted_seq.max(needed_seq);
        if needed_seq > state.durable_seq {
            self.shared.work.notify_all();
        }
        let backlog_bytes = BACKLOG_BYTES.min(self.half_bytes / 2);
        while state.failed.is_none() && (state.durable_seq < needed_seq || state.queued_bytes > backlog_bytes) {
            self.shared.done.wait(&mut state);
        }
        state.check()?;
        let put_seq = state.put_seq;
        drop(state);
        while self.tail.front().is_some_and(|(_, seq, _)| *seq <= put_seq) {
            self.tail.pop_front();
        }
        Ok(())
    }

    /// Waits until the keeper has put what is queued, or failed. Whatever it did not get done is in the journal.
    fn end_keeper(&mut self) {
        self.shared.state.lock().closing = true;
        self.shared.work.notify_all();
        if let Some(keeper) = self.keeper.take() {
            let _ = keeper.join();
        }
    }

    /// Does to the tail what `unit` does to the log.
    fn apply_to_tail(&mut self, unit: &Unit) {
        let from = removed_at_once(unit.remove).map_or(u64::MAX, |(from, _)| from);
        while self.tail.back().is_some_and(|(index, ..)| *index >= from) {
            self.tail.pop_back();
        }
        self.tail
            .extend(unit.records.iter().map(|(index, record)| (*index, unit.seq, record.clone())));
    }
}

impl Backend for SledBackend {
    fn name(&self) -> &'static str {
        "sled"
    }

    fn meta(&self) -> Result<Option<Vec<u8>>, WalError> {
        Ok(self.meta.clone())
    }

    fn fence(&self) -> Result<Option<Meta>, WalError> {
        Ok(Some(self.fence.found().clone()))
    }

    fn raise_fence(&mut self, meta: &Meta) -> Result<(), WalError> {
        self.fence.raise(meta)
    }

    fn read(&self, low: u64, high: u64, visit: &mut Visit<'_>) -> Result<(), WalError> {
        let tail_first = self.tail.front().map_or(u64::MAX, |(index, ..)| *index);
        if low < tail_first && self.table.read(low, high.min(tail_first), visit)?.is_break() {
            return Ok(());
        }
        let skip = usize::try_from(low.saturating_sub(tail_first)).unwrap_or(usize::MAX);
        for (index, _, record) in self.tail.iter().skip(skip).take_while(|(index, ..)| *index < high) {
            if visit(*index, record)?.is_break() {
                break;
            }
        }
        Ok(())
    }

    fn commit(&mut self, unit: Unit) -> Result<(), WalError> {
        self.make_room()?;
        let bytes = self.journal.append(&unit)?;
        self.apply_to_tail(&unit);
        self.meta = None;
        let mut state = self.shared.state.lock();
        state.queued_bytes += bytes;
        state.queue.push_back((unit, bytes));
        if state.queued_bytes >= self.wake_bytes {
            self.shared.work.notify_all();
        }
        Ok(())
    }

    fn check_background(&self) -> Result<(), WalError> {
        self.fence.check()?;
        self.shared.state.lock().check()
    }

    fn close(&mut self) -> Result<(), WalError> {
        self.end_keeper();
        let fence = self.fence.close();
        self.shared.state.lock().check()?;
        fence
    }

    fn stats(&self) -> WalStats {
        let syncs = self.journal.syncs() + self.table.syncs.load(Ordering::Relaxed) + self.fence.syncs();
        WalStats {
            bytes: self.files.get(),
            syncs,
            sync_time: self.journal.sync_time(),
        }
    }
}

impl Drop for SledBackend {
    fn drop(&mut self) {
        self.end_keeper();
    }
}

struct Shared {
    state: Mutex<KeeperState>,
    /// There is something for the keeper to do.
    work: Condvar,
    /// The keeper put a unit, made a checkpoint or failed.
    done: Condvar,
}

struct KeeperState {
    /// Units and their bytes in the journal. Bounded: `commit` waits while there are more than [`BACKLOG_BYTES`].
    queue: VecDeque<(Unit, u64)>,
    /// Journal bytes of the units in the queue.
    queued_bytes: u64,
    /// Newest unit that sled holds, readable but perhaps not durable.
    put_seq: u64,
    /// Newest unit that a checkpoint covered.
    durable_seq: u64,
    /// A checkpoint that covers this one is waited for.
    wanted_seq: u64,
    /// Entries up to here are compacted but may still be in sled; 0 if none.
    leftovers_to: u64,
    closing: bool,
    failed: Option<String>,
}

impl Shared {
    fn new(durable_seq: u64, leftovers_to: u64) -> Self {
        let state = KeeperState {
            queue: VecDeque::new(),
            queued_bytes: 0,
            put_seq: durable_seq,
            durable_seq,
            wanted_seq: 0,
            leftovers_to,
            closing: false,
            failed: None,
        };
        Self {
            state: Mutex::new(state),
            work: Condvar::new(),
            done: Condvar::new(),
        }
    }
}

impl KeeperState {
    /// An error once the keeper has failed.
    fn check(&self) -> Result<(), WalError> {
        match &self.failed {
            Some(reason) => Err(WalError::Engine(reason.clone())),
            None => Ok(()),
        }
    }

    /// Takes units off the queue until they have `enough_bytes`.
    fn take(&mut self, enough_bytes: u64) -> Vec<Unit> {
        let (mut units, mut taken_bytes) = (Vec::new(), 0);
        while taken_bytes < enough_bytes
            && let Some((unit, bytes)) = self.queue.pop_front()
        {
            taken_bytes += bytes;
            units.push(unit);
        }
        self.queued_bytes -= taken_bytes;
        units
    }
}

/// The thread that puts units into sled.
struct Keeper {
    shared: Arc<Shared>,
    table: Table,
    wake_bytes: u64,
    unsynced_bytes: usize,
    /// Compacted records to remove before more units are put: twice what was put last, so that removal keeps up under any load.
    removals_due: usize,
}

enum Task {
    Put(Vec<Unit>),
    Checkpoint,
    RemoveLeftovers { to: u64 },
    Close,
}

impl Keeper {
    fn run(mut self) {
        loop {
            let task = self.next();
            let closing = matches!(task, Task::Close);
            if let Err(error) = self.carry_out(task) {
                self.shared.state.lock().failed = Some(format!("sled took no more entries: {error}"));
                self.shared.done.notify_all();
                return;
            }
            if closing {
                return;
            }
        }
    }

    fn next(&mut self) -> Task {
        let mut state = self.shared.state.lock();
        loop {
            if state.leftovers_to == 0 {
                self.removals_due = 0;
            } else if self.removals_due > 0 {
                return Task::RemoveLeftovers { to: state.leftovers_to };
            }
            let wanted = state.wanted_seq > state.durable_seq;
            if wanted && state.put_seq >= state.wanted_seq {
                return Task::Checkpoint;
            }
            if !state.queue.is_empty() && (wanted || state.closing || state.queued_bytes >= self.wake_bytes) {
                return Task::Put(state.take(self.wake_bytes));
            }
            if state.closing {
                return Task::Close;
            }
            if state.leftovers_to > 0 {
                return Task::RemoveLeftovers { to: state.leftovers_to };
            }
            self.shared.work.wait(&mut state);
        }
    }

    fn carry_out(&mut self, task: Task) -> Result<(), WalError> {
        match task {
            Task::Put(units) => {
                self.put(&units)?;
                self.removals_due = 2 * units
                    .iter()
                    .flat_map(|unit| &unit.records)
                    .map(|(_, record)| record.len().div_ceil(CHUNK_BYTES))
                    .sum::<usize>();
                let mut state = self.shared.state.lock();
                for unit in units {
                    state.put_seq = unit.seq;
                    match unit.remove {
                        Remove::Prefix { to } => state.leftovers_to = to,
                        // Nothing is left over, and the indices may be used again.
                        Remove::All => state.leftovers_to = 0,
                        Remove::Nothing | Remove::Suffix { .. } => {}
                    }
                }
                self.shared.done.notify_all();
            }
            Task::Checkpoint | Task::Close => self.checkpoint()?,
            Task::RemoveLeftovers { to } => {
                let removed = self.table.remove_step(0, to)?;
                self.removals_due = self.removals_due.saturating_sub(STEP_RECORDS);
                self.count(removed * CHUNK_BYTES)?;
                let mut state = self.shared.state.lock();
                if removed == 0 && state.leftovers_to == to {
                    state.leftovers_to = 0;
                }
            }
        }
        Ok(())
    }

    fn put(&mut self, units: &[Unit]) -> Result<(), WalError> {
        for unit in units {
            if let Some((from, to)) = removed_at_once(unit.remove) {
                self.remove(from, to)?;
            }
            for (index, record) in &unit.records {
                for (chunk, value) in chunks(record) {
                    self.table.insert(&entry_key(*index, chunk), value)?;
                    self.count(value.len())?;
                }
            }
        }
        match units.last() {
            Some(newest) => self.table.insert(META_KEY, &newest.meta),
            None => Ok(()),
        }
    }

    fn remove(&mut self, from: u64, to: u64) -> Result<(), WalError> {
        loop {
            let removed = self.table.remove_step(from, to)?;
            self.count(removed * CHUNK_BYTES)?;
            if removed == 0 {
                return Ok(());
            }
        }
    }

    /// Makes a checkpoint when enough was written since the last.
    fn count(&mut self, bytes: usize) -> Result<(), WalError> {
        self.unsynced_bytes += bytes;
        if self.unsynced_bytes >= CHECKPOINT_BYTES {
            self.checkpoint()
        } else {
            Ok(())
        }
    }

    /// Everything put so far is durable afterwards. Units are only counted when they were put as a whole.
    fn checkpoint(&mut self) -> Result<(), WalError> {
        let put_seq = self.shared.state.lock().put_seq;
        self.table.checkpoint()?;
        self.unsynced_bytes = 0;
        self.shared.state.lock().durable_seq = put_seq;
        self.shared.done.notify_all();
        Ok(())
    }
}

/// The entries that must be gone before the unit's records are put.
fn removed_at_once(remove: Remove) -> Option<(u64, u64)> {
    match remove {
        Remove::Nothing | Remove::Prefix { .. } => None,
        Remove::Suffix { from, to } => Some((from, to)),
        Remove::All => Some((0, u64::MAX)),
    }
}

/// sled's tree and our descriptor of its file.
#[derive(Clone)]
pub(crate) struct Table {
    db: Db,
    file: Arc<File>,
    path: PathBuf,
    sync: bool,
    syncs: Arc<AtomicU64>,
}

const KEY_BYTES: usize = 13;

/// Sorts by index, then by chunk.
fn entry_key(index: u64, chunk: u32) -> [u8; KEY_BYTES] {
    let mut key = [b'e'; KEY_BYTES];
    key[1..9].copy_from_slice(&index.to_be_bytes());
    key[9..].copy_from_slice(&chunk.to_be_bytes());
    key
}

fn entry_position(key: &[u8]) -> Option<(u64, u32)> {
    let rest = key.strip_prefix(b"e")?;
    let (index, chunk) = rest.split_first_chunk::<8>()?;
    Some((u64::from_be_bytes(*index), u32::from_be_bytes(chunk.try_into().ok()?)))
}

fn chunks(record: &[u8]) -> impl Iterator<Item = (u32, &[u8])> {
    (0_u32..).zip(record.chunks(CHUNK_BYTES))
}

impl Table {
    /// Opens sled in `dir`, hardened, and makes sure that its files' names are durable.
    fn open(dir: &Path, sync: bool) -> Result<Self, WalError> {
        let db = open_patiently(dir)?;
        if sync {
            sync_tree(dir)?;
            sync_dir(dir.parent().unwrap_or(dir))?;
        }
        let file_path = dir.join("db");
        let file = OpenOptions::new()
            .write(true)
            .open(&file_path)
            .map_err(io_error("open", &file_path))?;
        let table = Self {
            db,
            file: Arc::new(file),
            path: dir.to_owned(),
            sync,
            syncs: Arc::default(),
        };
        table.check_blobs()?;
        Ok(table)
    }

    fn meta(&self) -> Result<Option<Vec<u8>>, WalError> {
        Ok(self.db.get(META_KEY).map_err(sled_error)?.map(|value| value.to_vec()))
    }

    /// Flush, then our own fdatasync, without which the flush is not durable.
    fn checkpoint(&self) -> Result<(), WalError> {
        let synced = self.db.flush().map_err(sled_error).and_then(|_| self.sync());
        if synced.is_err() {
            // The last handle of sled syncs its file once more when it is given up, whose sync has failed (rule 5): it is kept to the end.
            std::mem::forget(self.db.clone());
        }
        synced?;
        self.check_blobs()
    }

    fn sync(&self) -> Result<(), WalError> {
        if self.sync {
            self.file.sync_data().map_err(io_error("fdatasync", &self.path))?;
            self.syncs.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// What sled moves to `blobs/` it never syncs. Our records are too small for that; if one is there all the same, nothing is safe.
    fn check_blobs(&self) -> Result<(), WalError> {
        let path = self.path.join("blobs");
        match std::fs::read_dir(&path).map_err(io_error("list", &path))?.next() {
            Some(_) => Err(WalError::Engine(format!(
                "sled moved a record to {}, where it does not sync it",
                path.display()
            ))),
            None => Ok(()),
        }
    }

    /// Visits the records of `low..high`.
    fn read(&self, low: u64, high: u64, visit: &mut Visit<'_>) -> Result<ControlFlow<()>, WalError> {
        let mut record: Vec<u8> = Vec::new();
        let mut current = None;
        for item in self.db.range(entry_key(low, 0)..entry_key(high, 0)) {
            let (key, value) = item.map_err(sled_error)?;
            let (index, chunk) = entry_position(&key).ok_or_else(|| WalError::Corrupt(format!("strange key {key:?}")))?;
            let expected = current.unwrap_or((index, 0));
            if (index, chunk) != expected {
                return Err(lost(format!("piece {} of entry {} is missing", expected.1, expected.0)));
            }
            record.extend_from_slice(&value);
            if record_length(&record).is_some_and(|length| length <= record.len()) {
                if visit(index, &record)?.is_break() {
                    return Ok(ControlFlow::Break(()));
                }
                record.clear();
                current = None;
            } else {
                current = Some((index, chunk + 1));
            }
        }
        match current {
            Some((index, chunk)) => Err(lost(format!("piece {chunk} of entry {index} is missing"))),
            None => Ok(ControlFlow::Continue(())),
        }
    }

    /// Removes at most [`STEP_RECORDS`] records of entries `from..=to`; returns how many there were.
    fn remove_step(&self, from: u64, to: u64) -> Result<usize, WalError> {
        let mut removed = 0;
        for key in self
            .db
            .range(entry_key(from, 0)..=entry_key(to, u32::MAX))
            .keys()
            .take(STEP_RECORDS)
        {
            self.db.remove(key.map_err(sled_error)?).map_err(sled_error)?;
            removed += 1;
        }
        Ok(removed)
    }

    fn insert(&self, key: &[u8], value: &[u8]) -> Result<(), WalError> {
        self.db.insert(key, value).map(drop).map_err(sled_error)
    }

    /// Whether sled has exactly `record` at `index`.
    fn holds(&self, index: u64, record: Option<&Bytes>) -> Result<bool, WalError> {
        let mut expected = record.map(|record| chunks(record)).into_iter().flatten();
        for item in self.db.range(entry_key(index, 0)..=entry_key(index, u32::MAX)) {
            let (key, value) = item.map_err(sled_error)?;
            match expected.next() {
                Some((chunk, bytes)) if key == entry_key(index, chunk) && value == bytes => {}
                _ => return Ok(false),
            }
        }
        Ok(expected.next().is_none())
    }

    /// Makes sled equal to what it is after `units`, whichever of them it has seen already, and durable. Putting a unit again is harmless:
    /// the last word on each index is the newest unit's.
    fn restore(&self, units: Vec<Unit>) -> Result<(), WalError> {
        let Some(newest) = units.last().map(|unit| unit.meta.clone()) else {
            return Ok(());
        };
        let mut last_word: BTreeMap<u64, Option<Bytes>> = BTreeMap::new();
        let mut from_scratch = false;
        for unit in units {
            match unit.remove {
                Remove::Nothing | Remove::Prefix { .. } => {}
                Remove::Suffix { from, to } => last_word.extend((from..=to).map(|index| (index, None))),
                Remove::All => {
                    last_word.clear();
                    from_scratch = true;
                }
            }
            last_word.extend(unit.records.into_iter().map(|(index, record)| (index, Some(record))));
        }
        let mut restored = 0_u64;
        if from_scratch {
            restored += self.remove_others(&last_word)?;
        }
        let mut unsynced_bytes = 0;
        for (index, record) in &last_word {
            if self.holds(*index, record.as_ref())? {
                continue;
            }
            restored += 1;
            while self.remove_step(*index, *index)? > 0 {}
            for (chunk, value) in record.iter().flat_map(|record| chunks(record)) {
                self.insert(&entry_key(*index, chunk), value)?;
                unsynced_bytes += value.len();
                if unsynced_bytes >= CHECKPOINT_BYTES {
                    self.checkpoint()?;
                    unsynced_bytes = 0;
                }
            }
        }
        self.insert(META_KEY, &newest)?;
        self.checkpoint()?;
        if restored > 0 {
            tracing::info!(entries = restored, path = %self.path.display(), "the journal brought entries back into sled");
        }
        Ok(())
    }

    /// Removes all entries that `kept` does not name.
    fn remove_others(&self, kept: &BTreeMap<u64, Option<Bytes>>) -> Result<u64, WalError> {
        let mut removed = 0;
        for key in self.db.range(entry_key(0, 0)..=entry_key(u64::MAX, u32::MAX)).keys() {
            let key = key.map_err(sled_error)?;
            if entry_position(&key).is_some_and(|(index, _)| !kept.contains_key(&index)) {
                self.db.remove(key).map_err(sled_error)?;
                removed += 1;
            }
        }
        Ok(removed)
    }
}

/// Opens sled. Its threads may hold the lock of a log that was closed in this process for a moment longer.
#[expect(
    clippy::disallowed_methods,
    reason = "only while a member starts, with an end, on a thread that does nothing else"
)]
fn open_patiently(dir: &Path) -> Result<Db, WalError> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let opened = ::sled::Config::new()
            .path(dir)
            .mode(::sled::Mode::HighThroughput)
            .cache_capacity(CACHE_BYTES)
            .flush_every_ms(None)
            .use_compression(false)
            .open();
        match opened {
            Err(error) if error.to_string().contains("could not acquire lock") && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            other => return other.map_err(sled_error),
        }
    }
}

fn sled_error(error: ::sled::Error) -> WalError {
    match error {
        ::sled::Error::Io(source) => WalError::Io {
            what: "sled".to_owned(),
            source,
        },
        ::sled::Error::Corruption { at, .. } => WalError::Corrupt(format!("sled's file fails its checksum at {at:?}")),
        other @ (::sled::Error::CollectionNotFound(_) | ::sled::Error::Unsupported(_) | ::sled::Error::ReportableBug(_)) => {
            WalError::Engine(format!("sled: {other}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::WalEngine, wal};

    /// sled never syncs what it moves there.
    #[test]
    fn a_record_in_sleds_blobs_is_refused_at_open_and_at_a_checkpoint() {
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().join("log");
        drop(wal::open(WalEngine::Sled, &dir, false).unwrap());
        let blob = dir.join("sled/blobs/1");

        let table = Table::open(&dir.join("sled"), false).unwrap();
        table.checkpoint().unwrap();
        std::fs::write(&blob, "a record").unwrap();
        let error = table.checkpoint().unwrap_err();
        assert!(error.to_string().contains("sled/blobs"), "{error}");
        drop(table);

        std::fs::write(&blob, "a record").unwrap();
        let error = wal::open(WalEngine::Sled, &dir, false).map(drop).unwrap_err();
        assert!(
            matches!(error, WalError::Engine(_)) && error.to_string().contains("sled/blobs"),
            "{error}"
        );
        std::fs::remove_file(&blob).unwrap();
        wal::open(WalEngine::Sled, &dir, false).map(drop).unwrap();
    }
}
