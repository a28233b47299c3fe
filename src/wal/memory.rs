//! The engine of the simulation: deterministic, single-threaded, on a disk that can crash.
//!
//! A [`Disk`] outlives the log: it is one append-only sequence of bytes, of which a prefix is synced. Power cuts, torn records, flipped
//! bits and failing calls are done to the disk; then the log is opened again with [`open`] and has to cope, through the same
//! verification as the engines on real disks. Between [`MemoryWal::append_unsynced`] and [`MemoryWal::sync`] a simulator can let time
//! pass. The fence of this engine is raised with every sync, so loss and damage are always noticed.

use std::{collections::BTreeMap, io, ops::ControlFlow, sync::Arc, time::Duration};

use bytes::Bytes;
use parking_lot::Mutex;
use raft::eraftpb::{Entry, HardState};

use super::{
    LogStart, Recovered, Wal, WalBatch, WalError, WalStats,
    checked::{Backend, Checked, Visit},
    record::{Fields, Meta, Remove, Unit},
};

const FRAME_HEADER_BYTES: usize = 16;
const MAGIC: u32 = 0x6d63_6d66;
/// The file is rewritten at a compaction when it is larger than this and twice what lives.
const REWRITE_BYTES: usize = 64 * 1024;

/// Which call fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultAt {
    /// A write; nothing of it reaches the disk.
    Write,
    /// A sync; what was written stays unsynced.
    Sync,
}

/// A disk that holds one log. Cloning it gives another handle on the same disk.
#[derive(Debug, Clone, Default)]
pub struct Disk(Arc<Mutex<DiskState>>);

#[derive(Debug, Default)]
struct DiskState {
    file: Vec<u8>,
    synced: usize,
    fence: Option<Meta>,
    boot: u64,
    faults: Vec<(FaultAt, u64, io::ErrorKind)>,
    syncs: u64,
}

impl Disk {
    /// An empty disk.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A power cut. Of the unsynced bytes the first `keep` survive (`usize::MAX`: all of them, as when only the process dies); a cut inside
    /// a record leaves it torn. The log that was open on this disk is dead: all its calls fail.
    pub fn crash(&self, keep: usize) {
        let mut state = self.0.lock();
        let kept = state.synced + keep.min(state.file.len() - state.synced);
        state.file.truncate(kept);
        state.synced = kept;
        state.boot += 1;
        state.faults.clear();
    }

    /// Bytes on the disk.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.0.lock().file.len()
    }

    /// Bytes of [`Disk::bytes`] that a power cut would not take.
    #[must_use]
    pub fn unsynced_bytes(&self) -> usize {
        let state = self.0.lock();
        state.file.len() - state.synced
    }

    /// Flips bit `bit` (0 is the lowest bit of the first byte). False if the disk is smaller.
    pub fn flip_bit(&self, bit: usize) -> bool {
        let mut state = self.0.lock();
        match state.file.get_mut(bit / 8) {
            Some(byte) => {
                *byte ^= 1 << (bit % 8);
                true
            }
            None => false,
        }
    }

    /// Syncs that were tried, whether they succeeded or not.
    pub fn syncs(&self) -> u64 {
        self.0.lock().syncs
    }

    /// Lets the call after the next `after` calls of this kind fail, once, for example with `StorageFull` (ENOSPC) or `Other` (EIO).
    pub fn fail(&self, at: FaultAt, after: u64, kind: io::ErrorKind) {
        self.0.lock().faults.push((at, after, kind));
    }
}

impl DiskState {
    fn call(&mut self, boot: u64, at: FaultAt) -> Result<(), WalError> {
        let error = |what: &str, kind| {
            Err(WalError::Io {
                what: what.to_owned(),
                source: io::Error::from(kind),
            })
        };
        if boot != self.boot {
            return error("the disk crashed under this log", io::ErrorKind::BrokenPipe);
        }
        if let Some(due) = self.faults.iter().position(|(which, after, _)| *which == at && *after == 0) {
            let (_, _, kind) = self.faults.remove(due);
            return error(if at == FaultAt::Write { "write" } else { "fdatasync" }, kind);
        }
        self.faults
            .iter_mut()
            .filter(|(which, ..)| *which == at)
            .for_each(|(_, after, _)| *after -= 1);
        Ok(())
    }
}

/// A log on a [`Disk`].
pub struct MemoryWal(Checked<MemoryBackend>);

/// Opens the log on `disk`. Errors as for the other engines.
pub fn open(disk: &Disk) -> Result<MemoryWal, WalError> {
    Ok(MemoryWal(Checked::open(MemoryBackend::open(disk)?)?))
}

impl MemoryWal {
    /// Like [`Wal::append`], but the batch is not durable until [`MemoryWal::sync`] returned. It is readable at once.
    pub fn append_unsynced(&mut self, batch: &WalBatch) -> Result<(), WalError> {
        self.0.check_usable()?;
        let Some((unit, meta)) = self.0.prepare(batch)? else {
            return Ok(());
        };
        let staged = self.0.backend_mut().stage(&unit);
        if staged.is_err() {
            self.0.poison();
        }
        self.0.adopt(meta);
        staged
    }

    /// Makes everything appended so far durable.
    pub fn sync(&mut self) -> Result<(), WalError> {
        self.0.check_usable()?;
        let meta = self.0.meta().clone();
        let backend = self.0.backend_mut();
        let synced = backend.sync().and_then(|()| backend.raise_fence(&meta));
        if synced.is_err() {
            self.0.poison();
        }
        synced
    }

    /// Index of the last entry, durable or not.
    #[must_use]
    pub fn last_index(&self) -> u64 {
        self.0.meta().last_index
    }

    /// The hard state that was appended last, durable or not.
    #[must_use]
    pub fn hard_state(&self) -> &HardState {
        &self.0.meta().hard_state
    }

    /// The disk below.
    #[must_use]
    pub fn disk(&self) -> &Disk {
        &self.0.backend().disk
    }
}

impl Wal for MemoryWal {
    fn recovered(&self) -> &Recovered {
        self.0.recovered()
    }
    fn append(&mut self, batch: &WalBatch) -> Result<(), WalError> {
        self.0.append(batch)
    }
    fn entries(&self, low: u64, high: u64, max_bytes: u64) -> Result<Vec<Entry>, WalError> {
        self.0.entries(low, high, max_bytes)
    }
    fn compact(&mut self, to: LogStart) -> Result<(), WalError> {
        self.0.compact(to)
    }
    fn reset(&mut self, start: LogStart, hard_state: &HardState) -> Result<(), WalError> {
        self.0.reset(start, hard_state)
    }
    fn check_background(&self) -> Result<(), WalError> {
        self.0.check_background()
    }
    fn close(&mut self) -> Result<(), WalError> {
        self.0.close()
    }
    fn stats(&self) -> WalStats {
        self.0.stats()
    }
    fn engine(&self) -> &'static str {
        self.0.engine()
    }
}

struct MemoryBackend {
    disk: Disk,
    boot: u64,
    meta: Option<Vec<u8>>,
    records: BTreeMap<u64, Bytes>,
}

impl MemoryBackend {
    /// Replays the disk. A torn last frame is dropped; a damaged one before an intact one is `Corrupt`.
    fn open(disk: &Disk) -> Result<Self, WalError> {
        let mut state = disk.0.lock();
        let mut log = Self {
            disk: disk.clone(),
            boot: state.boot,
            meta: None,
            records: BTreeMap::new(),
        };
        let mut at = 0;
        while let Some((unit, bytes)) = decode_frame(&state.file[at..]) {
            log.apply(&unit);
            at += bytes;
        }
        if (at + 1..state.file.len()).any(|later| decode_frame(&state.file[later..]).is_some()) {
            return Err(WalError::Corrupt(format!("the frame at byte {at} is damaged and others follow")));
        }
        state.file.truncate(at);
        state.synced = at;
        drop(state);
        Ok(log)
    }

    fn apply(&mut self, unit: &Unit) {
        match unit.remove {
            Remove::Nothing => {}
            Remove::Suffix { from, .. } => drop(self.records.split_off(&from)),
            Remove::Prefix { to } => self.records = self.records.split_off(&(to + 1)),
            Remove::All => self.records.clear(),
        }
        self.records.extend(unit.records.iter().cloned());
        self.meta = Some(unit.meta.clone());
    }

    fn stage(&mut self, unit: &Unit) -> Result<(), WalError> {
        let mut state = self.disk.0.lock();
        state.call(self.boot, FaultAt::Write)?;
        encode_frame(unit, &mut state.file);
        drop(state);
        self.apply(unit);
        Ok(())
    }

    fn sync(&mut self) -> Result<(), WalError> {
        let mut state = self.disk.0.lock();
        state.call(self.boot, FaultAt::Sync)?;
        state.synced = state.file.len();
        state.syncs += 1;
        Ok(())
    }

    /// Replaces the file by one frame with everything that lives, as an atomic rename would.
    fn rewrite(&mut self, seq: u64) {
        let mut state = self.disk.0.lock();
        let live: usize = self.records.values().map(Bytes::len).sum();
        if state.file.len() < REWRITE_BYTES || state.file.len() < 2 * live {
            return;
        }
        let records = self.records.iter().map(|(index, record)| (*index, record.clone())).collect();
        let unit = Unit {
            seq,
            meta: self.meta.clone().unwrap_or_default(),
            remove: Remove::All,
            records,
        };
        state.file.clear();
        encode_frame(&unit, &mut state.file);
        state.synced = state.file.len();
    }
}

impl Backend for MemoryBackend {
    fn name(&self) -> &'static str {
        "memory"
    }

    fn meta(&self) -> Result<Option<Vec<u8>>, WalError> {
        Ok(self.meta.clone())
    }

    fn fence(&self) -> Result<Option<Meta>, WalError> {
        Ok(self.disk.0.lock().fence.clone())
    }

    fn raise_fence(&mut self, meta: &Meta) -> Result<(), WalError> {
        self.disk.0.lock().fence = Some(meta.clone());
        Ok(())
    }

    fn read(&self, low: u64, high: u64, visit: &mut Visit<'_>) -> Result<(), WalError> {
        for (index, record) in self.records.range(low..high) {
            if visit(*index, record)? == ControlFlow::Break(()) {
                break;
            }
        }
        Ok(())
    }

    fn commit(&mut self, unit: Unit) -> Result<(), WalError> {
        self.stage(&unit)?;
        self.sync()?;
        if matches!(unit.remove, Remove::Prefix { .. } | Remove::All) {
            self.rewrite(unit.seq);
        }
        Ok(())
    }

    fn check_background(&self) -> Result<(), WalError> {
        // Nothing is written behind an append.
        Ok(())
    }

    fn close(&mut self) -> Result<(), WalError> {
        Ok(())
    }

    fn stats(&self) -> WalStats {
        let state = self.disk.0.lock();
        WalStats {
            bytes: state.file.len() as u64,
            // Time does not pass here.
            sync_time: Duration::ZERO,
            syncs: state.syncs,
        }
    }
}

/// Frame: magic, CRC32C of the rest, length of the unit, 0; then the unit.
fn encode_frame(unit: &Unit, file: &mut Vec<u8>) {
    let start = file.len();
    file.extend_from_slice(&[0; FRAME_HEADER_BYTES]);
    unit.encode(file);
    let bytes = (file.len() - start - FRAME_HEADER_BYTES) as u64;
    file[start..start + 4].copy_from_slice(&MAGIC.to_le_bytes());
    file[start + 8..start + 16].copy_from_slice(&bytes.to_le_bytes());
    let crc = crc32c::crc32c(&file[start + 8..]);
    file[start + 4..start + 8].copy_from_slice(&crc.to_le_bytes());
}

/// The unit at the front of `raw` and the bytes of its frame.
fn decode_frame(raw: &[u8]) -> Option<(Unit, usize)> {
    let mut fields = Fields(raw);
    if fields.u32()? != MAGIC {
        return None;
    }
    let crc = fields.u32()?;
    let bytes = usize::try_from(fields.u64()?).ok()?;
    let unit = fields.take(bytes)?;
    let end = FRAME_HEADER_BYTES + bytes;
    if crc32c::crc32c(raw.get(8..end)?) != crc {
        return None;
    }
    Some((Unit::decode(unit)?, end))
}
