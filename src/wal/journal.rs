//! The redo journal in front of sled: the place where a unit becomes durable.
//!
//! Two preallocated files, the halves, written in turn. A unit is one frame: written in one `pwrite`, made durable by one `fdatasync`
//! that finds no metadata to write (the blocks exist and hold zeros or older frames). A frame begins at a multiple of 4 KiB and shares no block with
//! another, so a torn write can only hurt the frame that was being written.
//!
//! ```text
//! frame: magic u32 · CRC32C u32 of all that follows · id u64 of the log · generation u64 · number u64 in its generation · seq u64 · length u64 · unit
//! ```
//!
//! A generation is one filling of a half. A half is used again only when sled holds, durably, all units of its last filling. After opening, the
//! frames of both halves are put in order by sequence number; the run that ends with the newest is replayed. A frame that is not intact
//! ends the run: at the end it was torn (nobody was told about it; the fence knows), before the end it is damage, and then sled has to
//! hold what is missing, which the scan of the log decides.
//!
//! Where the file system allows it, frames go past the page cache (`O_DIRECT`): what is written once and synced at once gains nothing from it.
//! The sync that follows has only the disk's own cache to flush then, and what the file system has to note of a file that grew.
//!
//! A unit larger than what is left of a half is written past its nominal end; the file is cut back when the half is used again.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use super::{
    WalError,
    files::{io_error, open_own},
    record::{Fields, Unit},
};

/// Default size of a half.
pub(crate) const HALF_BYTES: u64 = 8 * 1024 * 1024;
const BLOCK_BYTES: usize = 4096;
/// A buffer for larger frames is not kept.
const KEPT_BUFFER_BYTES: usize = 4 * 1024 * 1024;
const HEADER_BYTES: usize = 48;
const MAGIC: u32 = 0x6d63_6a31;
const DIRECT: i32 = rustix::fs::OFlags::DIRECT.bits().cast_signed();

/// The open journal.
pub(crate) struct Journal {
    halves: [File; 2],
    paths: [PathBuf; 2],
    id: u64,
    half_bytes: u64,
    sync: bool,
    /// The half being filled.
    current: usize,
    generation: u64,
    number: u64,
    offset: u64,
    /// Newest seq in each half, 0 if none.
    last_seq: [u64; 2],
    /// The frame being written is at [`Journal::frame`], which begins at a multiple of [`BLOCK_BYTES`] in memory, too.
    buffer: Vec<u8>,
    frame: usize,
    syncs: u64,
    sync_time: Duration,
}

struct Frame {
    generation: u64,
    half: usize,
    unit: Unit,
}

/// Creates both halves, full of zeros and synced. The caller syncs the directory.
pub(crate) fn create(dir: &Path, half_bytes: u64) -> Result<(), WalError> {
    let zeros = [0; 16 * BLOCK_BYTES];
    for path in &paths(dir) {
        let write = || {
            let mut file = File::create(path)?;
            let mut left = half_bytes as usize;
            while left > 0 {
                let bytes = left.min(zeros.len());
                file.write_all(&zeros[..bytes])?;
                left -= bytes;
            }
            file.sync_all()
        };
        write().map_err(io_error("write", path))?;
    }
    Ok(())
}

impl Journal {
    /// Opens the journal and returns it with all units still in it: oldest first, without gap, ending with the newest. Nothing may be
    /// appended before all those units are durable elsewhere: the first append begins a new generation in the half with the older frames.
    pub(crate) fn open(dir: &Path, id: u64, half_bytes: u64, sync: bool) -> Result<(Self, Vec<Unit>), WalError> {
        let paths = paths(dir);
        let frames = frames(&paths, id)?;
        let newest = frames
            .iter()
            .max_by_key(|frame| frame.generation)
            .map(|frame| (frame.half, frame.generation));
        let (newest_half, generation) = newest.unwrap_or((1, 0));
        let open = |path: &PathBuf| open_half(path, sync).map_err(io_error("open", path));
        let journal = Self {
            halves: [open(&paths[0])?, open(&paths[1])?],
            paths,
            id,
            half_bytes,
            sync,
            current: newest_half,
            generation,
            number: 0,
            offset: u64::MAX,
            last_seq: [0; 2],
            buffer: Vec::new(),
            frame: 0,
            syncs: 0,
            sync_time: Duration::ZERO,
        };
        Ok((journal, newest_run(frames).into_iter().map(|frame| frame.unit).collect()))
    }

    /// The seq that sled must durably hold before the next append; 0 if there is room.
    pub(crate) fn must_be_kept_elsewhere(&self) -> u64 {
        if self.offset < self.half_bytes {
            0
        } else {
            self.last_seq[1 - self.current]
        }
    }

    /// Writes one unit and makes it durable; returns the bytes it takes in the journal.
    pub(crate) fn append(&mut self, unit: &Unit) -> Result<u64, WalError> {
        if self.offset >= self.half_bytes {
            self.turn_over()?;
        }
        self.encode(unit);
        let (file, path) = (&self.halves[self.current], &self.paths[self.current]);
        let frame = &self.buffer[self.frame..];
        // Past the page cache it is the write that waits for the disk.
        let begun = Instant::now();
        file.write_all_at(frame, self.offset).map_err(io_error("write", path))?;
        let bytes = frame.len() as u64;
        if self.sync {
            file.sync_data().map_err(io_error("fdatasync", path))?;
            self.syncs += 1;
            self.sync_time += begun.elapsed();
        }
        self.offset += bytes;
        self.number += 1;
        self.last_seq[self.current] = unit.seq;
        if self.buffer.capacity() > KEPT_BUFFER_BYTES {
            self.buffer = Vec::new();
        }
        Ok(bytes)
    }

    /// fdatasyncs so far.
    pub(crate) fn syncs(&self) -> u64 {
        self.syncs
    }

    /// Time in them.
    pub(crate) fn sync_time(&self) -> Duration {
        self.sync_time
    }

    fn turn_over(&mut self) -> Result<(), WalError> {
        self.current = 1 - self.current;
        self.generation += 1;
        self.number = 0;
        self.offset = 0;
        let (file, path) = (&self.halves[self.current], &self.paths[self.current]);
        let bytes = file.metadata().map_err(io_error("stat", path))?.len();
        if bytes > self.half_bytes {
            file.set_len(self.half_bytes).map_err(io_error("truncate", path))?;
        }
        Ok(())
    }

    fn encode(&mut self, unit: &Unit) {
        loop {
            let out = &mut self.buffer;
            let begin = out.as_ptr().align_offset(BLOCK_BYTES);
            out.clear();
            out.resize(begin, 0);
            out.extend_from_slice(&MAGIC.to_le_bytes());
            out.extend_from_slice(&[0; 4]);
            for field in [self.id, self.generation, self.number, unit.seq, 0] {
                out.extend_from_slice(&field.to_le_bytes());
            }
            unit.encode(out);
            let frame = &mut out[begin..];
            let length = (frame.len() - HEADER_BYTES) as u64;
            frame[HEADER_BYTES - 8..HEADER_BYTES].copy_from_slice(&length.to_le_bytes());
            let crc = crc32c::crc32c(&frame[8..]);
            frame[4..8].copy_from_slice(&crc.to_le_bytes());
            let whole_blocks = frame.len().next_multiple_of(BLOCK_BYTES);
            out.resize(begin + whole_blocks, 0);
            // It may have moved as it grew; soon it is large enough.
            if out.as_ptr().align_offset(BLOCK_BYTES) == begin {
                self.frame = begin;
                return;
            }
        }
    }
}

/// Opens a half for writing past the page cache, or through it where that cannot be had, or gains nothing because nothing is synced.
fn open_half(path: &Path, sync: bool) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    if sync && let Ok(file) = options.clone().custom_flags(DIRECT).open(path) {
        // Some file systems refuse when it is used, not when it is asked for.
        let mut block = vec![0; 2 * BLOCK_BYTES];
        let begin = block.as_ptr().align_offset(BLOCK_BYTES);
        if file.read_at(&mut block[begin..begin + BLOCK_BYTES], 0).is_ok() {
            return Ok(file);
        }
    }
    options.open(path)
}

/// Paths of the two halves.
pub(crate) fn paths(dir: &Path) -> [PathBuf; 2] {
    [dir.join("journal-0"), dir.join("journal-1")]
}

/// The intact frames of each half's newest generation.
fn frames(paths: &[PathBuf; 2], id: u64) -> Result<Vec<Frame>, WalError> {
    let mut all = Vec::new();
    for (half, path) in paths.iter().enumerate() {
        let file = open_own(path)?;
        let file_bytes = file.metadata().map_err(io_error("look at", path))?.len();
        // Frame by frame: of two halves of zeros, say, nothing is worth the memory.
        let (mut raw, mut found, mut at) = (Vec::new(), Vec::new(), 0);
        while at < file_bytes {
            let left = (file_bytes - at) as usize;
            read_to(&file, at, left.min(BLOCK_BYTES), &mut raw).map_err(io_error("read", path))?;
            if let Some(frame_bytes) = frame_bytes(&raw, id).filter(|bytes| (raw.len()..=left).contains(bytes)) {
                read_to(&file, at, frame_bytes, &mut raw).map_err(io_error("read", path))?;
            }
            at += match decode(&raw, id, half) {
                Some((frame, bytes)) => {
                    found.push(frame);
                    bytes.next_multiple_of(BLOCK_BYTES) as u64
                }
                None => BLOCK_BYTES as u64,
            };
        }
        let newest = found.iter().map(|frame| frame.generation).max();
        all.extend(found.into_iter().filter(|frame| Some(frame.generation) == newest));
    }
    Ok(all)
}

/// The longest run without a gap in the sequence numbers that ends with the highest.
fn newest_run(mut frames: Vec<Frame>) -> Vec<Frame> {
    frames.sort_by_key(|frame| (frame.unit.seq, frame.generation));
    let gap = frames.windows(2).rposition(|pair| pair[0].unit.seq + 1 != pair[1].unit.seq);
    frames.split_off(gap.map_or(0, |before| before + 1))
}

/// Reads so many bytes from `at` on, in place of what is in `out`.
fn read_to(file: &File, at: u64, bytes: usize, out: &mut Vec<u8>) -> io::Result<()> {
    out.resize(bytes, 0);
    file.read_exact_at(out, at)
}

/// The length that the header of a frame of this log names.
fn frame_bytes(raw: &[u8], id: u64) -> Option<usize> {
    let mut fields = Fields(raw);
    let (magic, _crc, frame_id) = (fields.u32()?, fields.u32()?, fields.u64()?);
    let (_generation, _number, _seq, length) = (fields.u64()?, fields.u64()?, fields.u64()?, fields.u64()?);
    let is_ours = magic == MAGIC && frame_id == id;
    HEADER_BYTES.checked_add(usize::try_from(length).ok().filter(|_| is_ours)?)
}

fn decode(raw: &[u8], id: u64, half: usize) -> Option<(Frame, usize)> {
    let mut fields = Fields(raw);
    let (magic, crc, frame_id) = (fields.u32()?, fields.u32()?, fields.u64()?);
    if magic != MAGIC || frame_id != id {
        return None;
    }
    let (generation, _number, seq, length) = (fields.u64()?, fields.u64()?, fields.u64()?, fields.u64()?);
    let unit = fields.take(usize::try_from(length).ok()?)?;
    let end = HEADER_BYTES + unit.len();
    if crc32c::crc32c(raw.get(8..end)?) != crc {
        return None;
    }
    let unit = Unit::decode(unit).filter(|unit| unit.seq == seq)?;
    Some((Frame { generation, half, unit }, end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::record::Remove;
    use bytes::Bytes;

    const HALF: u64 = 16 * 1024;

    fn read(dir: &Path, id: u64) -> Vec<Unit> {
        Journal::open(dir, id, HALF, false).unwrap().1
    }

    fn unit(seq: u64, bytes: usize) -> Unit {
        Unit {
            seq,
            meta: vec![1; 80],
            remove: Remove::Nothing,
            records: vec![(seq, Bytes::from(vec![seq as u8; bytes]))],
        }
    }

    fn seqs(dir: &Path) -> Vec<u64> {
        read(dir, 9).iter().map(|unit| unit.seq).collect()
    }

    /// `O_DIRECT` takes nothing else.
    #[test]
    fn frames_of_any_size_are_whole_blocks_in_memory_and_on_disk() {
        let dir = tempfile::tempdir().unwrap();
        create(dir.path(), HALF).unwrap();
        let (mut journal, _) = Journal::open(dir.path(), 9, HALF, true).unwrap();
        for (seq, bytes) in (1..).zip([0, 1, 3_950, 5_000, 100, 200_000, 7, 1_000_000]) {
            let written = journal.append(&unit(seq, bytes)).unwrap();
            let frame = &journal.buffer[journal.frame..];
            assert_eq!(frame.as_ptr().align_offset(BLOCK_BYTES), 0);
            assert_eq!((frame.len() % BLOCK_BYTES, frame.len() as u64), (0, written));
            assert_eq!(read(dir.path(), 9).last(), Some(&unit(seq, bytes)));
        }
    }

    #[test]
    fn units_come_back_in_order_over_many_turns_and_none_newer_than_one_half_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        create(dir.path(), HALF).unwrap();
        let (mut journal, found) = Journal::open(dir.path(), 9, HALF, true).unwrap();
        assert!(found.is_empty());
        for seq in 1..=30 {
            journal.append(&unit(seq, 100)).unwrap();
            let found = seqs(dir.path());
            assert_eq!(found.last(), Some(&seq));
            assert!(found.len() as u64 >= seq.min(4), "{found:?}");
            assert!(found.windows(2).all(|pair| pair[0] + 1 == pair[1]));
        }
        assert!(read(dir.path(), 8).is_empty(), "frames of another log");
    }

    #[test]
    fn a_half_is_only_taken_again_when_its_units_are_kept_elsewhere() {
        let dir = tempfile::tempdir().unwrap();
        create(dir.path(), HALF).unwrap();
        let (mut journal, _) = Journal::open(dir.path(), 9, HALF, true).unwrap();
        for seq in 1..=8 {
            assert_eq!(journal.must_be_kept_elsewhere(), 0, "before {seq}");
            journal.append(&unit(seq, 100)).unwrap();
        }
        assert_eq!(journal.must_be_kept_elsewhere(), 4);
    }

    #[test]
    fn a_unit_larger_than_a_half_fits_and_the_file_shrinks_again() {
        let dir = tempfile::tempdir().unwrap();
        create(dir.path(), HALF).unwrap();
        let (mut journal, _) = Journal::open(dir.path(), 9, HALF, true).unwrap();
        journal.append(&unit(1, 100_000)).unwrap();
        assert_eq!(read(dir.path(), 9), [unit(1, 100_000)]);
        (2..=7).for_each(|seq| assert!(journal.append(&unit(seq, 100)).is_ok()));
        assert!(paths(dir.path()).iter().all(|path| path.metadata().unwrap().len() == HALF));
    }

    #[test]
    fn a_damaged_frame_ends_the_run() {
        let dir = tempfile::tempdir().unwrap();
        create(dir.path(), HALF).unwrap();
        let (mut journal, _) = Journal::open(dir.path(), 9, HALF, true).unwrap();
        (1..=3).for_each(|seq| assert!(journal.append(&unit(seq, 100)).is_ok()));
        let path = &paths(dir.path())[journal.current];
        let mut raw = std::fs::read(path).unwrap();
        raw[BLOCK_BYTES + 100] ^= 4;
        std::fs::write(path, &raw).unwrap();
        assert_eq!(seqs(dir.path()), [3]);
        raw[2 * BLOCK_BYTES + 100] ^= 4;
        std::fs::write(path, &raw).unwrap();
        assert_eq!(seqs(dir.path()), [1]);
    }
}
