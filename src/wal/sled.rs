//! The sled engine (the default): entries live in one sled tree, a redo journal in front of it makes them durable.
//!
//! sled 0.34.7 alone does not survive a power cut: its `flush` ends in `sync_file_range`, it may write over a freed segment before what
//! replaced it is durable, it never syncs a directory, and it reports none of that. So it is never trusted with the newest data:
//!
//! 1. A unit is written to the [journal](super::journal) with one fdatasync. Then it is durable and `append` returns.
//! 2. A thread, the *keeper*, puts it into sled: records of at most [`SMALL_BYTES`], and of a larger one the place in a [segment](segments), to
//!    which it appends it. (Larger items, and then whole leaves, would go to `blobs/`, which sled never syncs; the directory is asserted to be
//!    empty.) After each [`CHECKPOINT_BYTES`] it syncs the segment, flushes sled and then calls fdatasync on a descriptor of its own of
//!    `sled/db`. The step is far smaller than a segment of sled (512 KiB), so that a segment that was freed is not filled again before an
//!    fdatasync covered what replaced it.
//! 3. A half of the journal is used again only when a checkpoint covered all its units.
//! 4. At open the units in the journal are compared with sled, what differs is put again, then a checkpoint follows. So whatever sled lost of
//!    the last half to whole journal is repaired. Older losses are noticed by the scan that every engine gets, and refused.
//!
//! Why not sync sled itself before `append` returns, with the fence behind it? That is two fdatasyncs and sled's own path for each
//! append, and it notices sled's losses without repairing any.
//!
//! `flush_async` is never called (it can hang), nor `apply_batch` (it takes the keys in random order and seals sled's buffer twice; the journal
//! already makes units atomic). Removal goes in steps of [`STEP_RECORDS`] records. Entries that the keeper has not put yet are read from memory; the journal bounds them.

mod segments;
mod table;

use std::{collections::VecDeque, path::Path, sync::Arc, thread::JoinHandle};

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};

use super::{
    WalError, WalStats,
    checked::{Backend, Visit},
    fence::Fence,
    files::{Claim, DirBytes, io_error},
    journal::{self, Journal},
    record::{Meta, Remove, Unit},
};
use table::{STEP_RECORDS, Table};

/// Largest record that is put into sled itself. Between 1 and 4 KB the rate is the same, and memory and sled's file are smaller with 1.
const SMALL_BYTES: usize = 1024;
/// Default size of a segment.
const SEGMENT_BYTES: u64 = 16 * 1024 * 1024;
/// What a removed record counts for: sled writes its leaf again.
const LEAF_BYTES: usize = 4000;
/// Bytes put into sled between two checkpoints.
const CHECKPOINT_BYTES: usize = 64 * 1024;
/// Bytes of journal that may wait for the keeper. Smaller than a half, so that appends are slowed to the keeper's pace one by one instead of
/// all stopping when the journal is full.
const BACKLOG_BYTES: u64 = 4 * 1024 * 1024;
/// Bytes of journal at which the keeper starts: many small units together cost far less than each alone.
const WAKE_BYTES: u64 = 256 * 1024;

/// What can be chosen.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Options {
    /// `false`: no fdatasync, for tests.
    pub sync: bool,
    /// Size of each half of the journal. May differ from one opening to the next.
    pub half_bytes: u64,
    /// A segment that has so many bytes is followed by another one. May differ, too.
    pub segment_bytes: u64,
}

impl Options {
    pub(crate) fn new(sync: bool) -> Self {
        Self {
            sync,
            half_bytes: journal::HALF_BYTES,
            segment_bytes: SEGMENT_BYTES,
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
        let table = Table::open(dir, options.segment_bytes, options.sync)?;
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
            files: DirBytes::new(vec![dir.to_owned(), dir.join("sled"), dir.join("segments")]),
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

    fn verified(&mut self) -> Result<(), WalError> {
        self.table.settle()
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
        let syncs = self.journal.syncs() + self.table.syncs() + self.fence.syncs();
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
                self.removals_due = 2 * units.iter().map(|unit| unit.records.len()).sum::<usize>();
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
                self.count(removed * LEAF_BYTES)?;
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
            match unit.remove {
                Remove::All => self.table.release_all()?,
                Remove::Prefix { to } => self.table.release(to)?,
                Remove::Nothing | Remove::Suffix { .. } => {}
            }
            for (index, record) in &unit.records {
                let bytes = self.table.put(*index, record)?;
                self.count(bytes)?;
            }
        }
        match units.last() {
            Some(newest) => self.table.put_meta(&newest.meta),
            None => Ok(()),
        }
    }

    fn remove(&mut self, from: u64, to: u64) -> Result<(), WalError> {
        loop {
            let removed = self.table.remove_step(from, to)?;
            self.count(removed * LEAF_BYTES)?;
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
