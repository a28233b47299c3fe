//! The fence: a second witness, outside the engine, of how far the log was acknowledged.
//!
//! An engine that finds damage at its end drops it as a torn write, and a log that ends early looks like a shorter log. The fence
//! tells the two apart: it holds a copy of the newest meta record. A log whose sequence number is below the fence's has lost what it
//! acknowledged (rule 9). The number only grows, also when a suffix is replaced or the log starts anew, so the fence never has to be
//! lowered before a truncation, and an engine ahead of it is the normal case.
//!
//! The file is two 4 KiB slots, written in turn and synced before the other one is touched, so that a torn write costs one slot.
//!
//! **Not in the path of an append.** A unit is durable when the engine's own sync returned; the fence guards it against *later*
//! damage. A thread writes it [`LAG`] after the first change and at close, so that no append waits for a second sync (it would cost
//! about 100 µs each). What that gives up: if a unit is damaged on the medium *and* the process ends within [`LAG`] of its
//! acknowledgement, the loss of that unit is not noticed.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::Path,
    sync::Arc,
    thread::JoinHandle,
    time::Duration,
};

use parking_lot::{Condvar, Mutex};

use super::{
    WalError,
    files::{io_error, read_own},
    record::Meta,
};

const SLOT_BYTES: usize = 4096;
const MAGIC: &[u8; 8] = b"mcfence1";

/// How far the file may be behind the log.
pub(crate) const LAG: Duration = Duration::from_millis(50);

/// The open fence.
pub(crate) struct Fence {
    found: Meta,
    shared: Arc<Shared>,
    writer: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    newest: Option<Meta>,
    closing: bool,
    failed: Option<String>,
    syncs: u64,
}

impl State {
    fn check(&self) -> Result<(), WalError> {
        match &self.failed {
            Some(reason) => Err(WalError::Engine(format!("the fence cannot be written: {reason}"))),
            None => Ok(()),
        }
    }
}

impl Fence {
    /// Creates the file of an empty log. The caller syncs the directory.
    pub(crate) fn create(path: &Path) -> Result<(), WalError> {
        let empty = Meta::empty(0, super::LogStart::default(), raft::eraftpb::HardState::default());
        let mut content = slot(&empty);
        content.resize(2 * SLOT_BYTES, 0);
        super::files::write_synced(path, &content)
    }

    /// Opens the file. `Corrupt` if it is missing or neither slot is intact.
    pub(crate) fn open(path: &Path, sync: bool) -> Result<Self, WalError> {
        let (found, newest_slot) = read(path)?;
        let file = OpenOptions::new().write(true).open(path).map_err(io_error("open", path))?;
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let for_writer = Arc::clone(&shared);
        let writer = std::thread::Builder::new()
            .name("wal-fence".to_owned())
            .spawn(move || for_writer.run(&file, 1 - newest_slot, sync))
            .map_err(io_error("start the thread for", path))?;
        Ok(Self {
            found,
            shared,
            writer: Some(writer),
        })
    }

    /// What the file had when it was opened.
    pub(crate) fn found(&self) -> &Meta {
        &self.found
    }

    /// Notes `meta` as durable; an error if an earlier write of the file failed.
    pub(crate) fn raise(&self, meta: &Meta) -> Result<(), WalError> {
        let mut state = self.shared.state.lock();
        state.check()?;
        let was_idle = state.newest.replace(meta.clone()).is_none();
        if was_idle {
            self.shared.changed.notify_all();
        }
        Ok(())
    }

    /// An error if a write of the file failed.
    pub(crate) fn check(&self) -> Result<(), WalError> {
        self.shared.state.lock().check()
    }

    /// Writes what is newest and ends; an error if that, or a write before it, failed.
    pub(crate) fn close(&mut self) -> Result<(), WalError> {
        self.end();
        self.check()
    }

    fn end(&mut self) {
        self.shared.state.lock().closing = true;
        self.shared.changed.notify_all();
        if let Some(writer) = self.writer.take() {
            // A panic of the writer leaves the fence behind the log, which is allowed.
            let _ = writer.join();
        }
    }

    /// fdatasyncs of the file so far.
    pub(crate) fn syncs(&self) -> u64 {
        self.shared.state.lock().syncs
    }
}

impl Drop for Fence {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    /// Writes the newest meta record to the slots in turn until the fence is dropped.
    fn run(&self, file: &File, mut next_slot: u64, sync: bool) {
        while let Some(meta) = self.next() {
            let written = write_slot(file, next_slot, &meta, sync);
            let mut state = self.state.lock();
            match written {
                Ok(()) => state.syncs += u64::from(sync),
                Err(error) => {
                    state.failed = Some(error.to_string());
                    return;
                }
            }
            next_slot = 1 - next_slot;
        }
    }

    /// Waits for a change, then [`LAG`] more so that many changes make one write. `None` when the fence is dropped and all is written.
    fn next(&self) -> Option<Meta> {
        let mut state = self.state.lock();
        while state.newest.is_none() && !state.closing {
            self.changed.wait(&mut state);
        }
        if !state.closing {
            self.changed.wait_while_for(&mut state, |state| !state.closing, LAG);
        }
        state.newest.take()
    }
}

fn write_slot(file: &File, slot_number: u64, meta: &Meta, sync: bool) -> io::Result<()> {
    file.write_all_at(&slot(meta), slot_number * SLOT_BYTES as u64)?;
    if sync { file.sync_data() } else { Ok(()) }
}

fn slot(meta: &Meta) -> Vec<u8> {
    let mut raw = MAGIC.to_vec();
    raw.extend_from_slice(&meta.encode());
    raw.resize(SLOT_BYTES, 0);
    raw
}

/// The newer intact slot and its number.
pub(crate) fn read(path: &Path) -> Result<(Meta, u64), WalError> {
    let raw = read_own(path)?;
    slots(&raw).flatten().max_by_key(|(meta, _)| meta.seq).ok_or_else(|| {
        WalError::Corrupt(format!(
            "{}: neither slot is intact, so it cannot be told what was acknowledged",
            path.display()
        ))
    })
}

/// Whether a slot that was written is damaged: by a crash within its last write, or by the disk. The other one is a little older.
pub(crate) fn has_damage(path: &Path) -> Result<bool, WalError> {
    let raw = std::fs::read(path).map_err(io_error("read", path))?;
    let is_blank = |slot: &[u8]| slot.len() == SLOT_BYTES && slot.iter().all(|&byte| byte == 0);
    let written = raw.chunks(SLOT_BYTES).zip(slots(&raw)).filter(|(slot, _)| !is_blank(slot));
    Ok(raw.len() != 2 * SLOT_BYTES || written.into_iter().any(|(_, meta)| meta.is_none()))
}

/// The two slots, each with its number, as far as they are intact.
fn slots(raw: &[u8]) -> impl Iterator<Item = Option<(Meta, u64)>> {
    let meta_bytes = slot_meta_bytes();
    raw.chunks(SLOT_BYTES).take(2).enumerate().map(move |(number, slot)| {
        let meta = slot.strip_prefix(MAGIC)?.get(..meta_bytes)?;
        Some((Meta::decode(meta)?, number as u64))
    })
}

fn slot_meta_bytes() -> usize {
    Meta::empty(0, super::LogStart::default(), raft::eraftpb::HardState::default())
        .encode()
        .len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::LogStart;

    fn meta(seq: u64) -> Meta {
        Meta::empty(seq, LogStart { index: seq, term: 1 }, raft::eraftpb::HardState::default())
    }

    #[test]
    fn the_newest_meta_is_there_after_close_and_one_damaged_slot_costs_only_the_newest() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fence");
        Fence::create(&path).unwrap();
        assert!(!has_damage(&path).unwrap(), "the second slot was never written");
        for seq in 1..=3 {
            let fence = Fence::open(&path, true).unwrap();
            assert_eq!(fence.found().seq, seq - 1);
            fence.raise(&meta(seq)).unwrap();
        }
        let (newest, slot_number) = read(&path).unwrap();
        assert_eq!(newest, meta(3));
        assert!(!has_damage(&path).unwrap());
        let mut raw = std::fs::read(&path).unwrap();
        raw[slot_number as usize * SLOT_BYTES + 20] ^= 1;
        std::fs::write(&path, &raw).unwrap();
        assert_eq!(read(&path).unwrap().0, meta(2));
        assert!(has_damage(&path).unwrap());
        raw[(1 - slot_number as usize) * SLOT_BYTES + 20] ^= 1;
        std::fs::write(&path, &raw).unwrap();
        assert!(matches!(Fence::open(&path, true), Err(WalError::Corrupt(_))));
    }
}
