//! Segments: files for the records that are too large for sled.
//!
//! sled copies and writes what it is given several times over; of entries of 64 KiB that was half of a member's processor time. So it is given only
//! the [`Place`] of a large record. The record itself is appended to a segment, once.
//!
//! ```text
//! segments/NUMBER-BOUND    16 hexadecimal digits each; records, one behind the other
//! ```
//!
//! *Invariants*
//! - One segment is written at a time, at its end. After opening a new one is begun: nothing follows an end that may be torn.
//! - When a segment is begun, every record of an older one that the log still has is of an index below its bound. Later ones are never written
//!   to an older one. So a segment is not needed any more when the log starts right before the bound of the next one, or behind it.
//! - A place that sled lost or holds too long (it may go back to what it held at its last checkpoint) is put right from the journal before anything is
//!   read; so a segment may go as soon as the journal has the meta record that makes it needless.
//! - After [`Segments::sync`] all that was appended is durable, names included.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;

use super::super::{
    WalError,
    checked::lost,
    files::{io_error, make_dir, sync_dir},
    record::Fields,
};

/// A segment that has so many bytes is followed by another one.
const SEGMENT_BYTES: u64 = 16 * 1024 * 1024;

/// Where a record lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    segment: u64,
    offset: u64,
    length: u32,
}

impl Place {
    /// Bytes in sled: fewer than any record has.
    pub(super) const BYTES: usize = 20;

    pub(super) fn encode(self) -> [u8; Self::BYTES] {
        let mut out = [0; Self::BYTES];
        out[..8].copy_from_slice(&self.segment.to_le_bytes());
        out[8..16].copy_from_slice(&self.offset.to_le_bytes());
        out[16..].copy_from_slice(&self.length.to_le_bytes());
        out
    }

    /// `None` if these bytes are a record, or the first piece of one.
    pub(super) fn decode(raw: &[u8]) -> Option<Self> {
        let mut fields = Fields((raw.len() == Self::BYTES).then_some(raw)?);
        Some(Self {
            segment: fields.u64()?,
            offset: fields.u64()?,
            length: fields.u32()?,
        })
    }
}

/// See the module. Clones are the same segments.
#[derive(Clone)]
pub(super) struct Segments(Arc<Shared>);

struct Shared {
    dir: PathBuf,
    sync: bool,
    syncs: AtomicU64,
    state: Mutex<State>,
}

struct State {
    segments: BTreeMap<u64, Segment>,
    /// Of the next one that is begun.
    next_number: u64,
    /// The one that is written, and its bytes.
    current: Option<(u64, u64)>,
    /// Something was appended to it since the last sync.
    is_dirty: bool,
    /// No entry of the log that is in any of them has a higher index.
    newest_index: u64,
}

struct Segment {
    bound: u64,
    file: Arc<File>,
    path: PathBuf,
}

impl Segments {
    /// Opens the segments in `dir`, which is made if it is not there.
    pub(super) fn open(dir: &Path, sync: bool) -> Result<Self, WalError> {
        make_dir(dir)?;
        let mut segments = BTreeMap::new();
        for entry in fs::read_dir(dir).map_err(io_error("list", dir))? {
            let path = entry.map_err(io_error("list", dir))?.path();
            // Whatever else lies there is not the log's.
            let Some((number, bound)) = path.file_name().and_then(|name| name.to_str()).and_then(number_and_bound) else {
                continue;
            };
            let file = Arc::new(File::open(&path).map_err(io_error("open", &path))?);
            segments.insert(number, Segment { bound, file, path });
        }
        Ok(Self(Arc::new(Shared {
            dir: dir.to_owned(),
            sync,
            syncs: AtomicU64::new(0),
            state: Mutex::new(State {
                next_number: segments.last_key_value().map_or(1, |(number, _)| number + 1),
                segments,
                current: None,
                is_dirty: false,
                newest_index: u64::MAX,
            }),
        })))
    }

    /// Appends the record of entry `index`. All records that the log has and that were appended before are of indices below `bound`.
    pub(super) fn append(&self, index: u64, bound: u64, record: &[u8]) -> Result<Place, WalError> {
        let mut state = self.0.state.lock();
        if state.current.is_none_or(|(_, end)| end >= SEGMENT_BYTES) {
            self.sync_current(&mut state)?;
            self.begin(&mut state, bound)?;
        }
        let too_large = || WalError::Engine(format!("entry {index} is larger than 4 GiB"));
        let length = u32::try_from(record.len()).map_err(|_| too_large())?;
        let (segment, offset) = state.current.ok_or_else(|| WalError::Engine("no segment is open".to_owned()))?;
        if let Some(Segment { file, path, .. }) = state.segments.get(&segment) {
            file.write_all_at(record, offset).map_err(io_error("write", path))?;
        }
        state.current = Some((segment, offset + u64::from(length)));
        state.is_dirty = true;
        state.newest_index = state.newest_index.max(index);
        Ok(Place { segment, offset, length })
    }

    fn begin(&self, state: &mut State, bound: u64) -> Result<(), WalError> {
        let number = state.next_number;
        let path = self.0.dir.join(format!("{number:016x}-{bound:016x}"));
        let opened = OpenOptions::new().read(true).write(true).create_new(true).open(&path);
        let file = Arc::new(opened.map_err(io_error("create", &path))?);
        if self.0.sync {
            sync_dir(&self.0.dir)?;
        }
        state.next_number += 1;
        state.segments.insert(number, Segment { bound, file, path });
        state.current = Some((number, 0));
        Ok(())
    }

    /// Reads the record at `place`, which sled has for entry `index`.
    pub(super) fn read(&self, index: u64, place: Place) -> Result<Vec<u8>, WalError> {
        let missing = || {
            lost(format!(
                "entry {index} is missing: its segment {:016x} is gone or too short",
                place.segment
            ))
        };
        let (file, path) = self.file(place.segment).ok_or_else(missing)?;
        // What a damaged place names is not trusted with memory.
        let file_bytes = file.metadata().map_err(io_error("look at", &path))?.len();
        if place.offset.checked_add(u64::from(place.length)).is_none_or(|end| end > file_bytes) {
            return Err(missing());
        }
        let mut record = vec![0; place.length as usize];
        match file.read_exact_at(&mut record, place.offset) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(missing()),
            read => read.map(|()| record).map_err(io_error("read", &path)),
        }
    }

    /// Whether `record` lies at `place`.
    pub(super) fn holds(&self, index: u64, place: Place, record: &[u8]) -> Result<bool, WalError> {
        if place.length as usize != record.len() {
            return Ok(false);
        }
        match self.read(index, place) {
            Err(WalError::Lost(_)) => Ok(false),
            found => Ok(found? == record),
        }
    }

    fn file(&self, number: u64) -> Option<(Arc<File>, PathBuf)> {
        let state = self.0.state.lock();
        let Segment { file, path, .. } = state.segments.get(&number)?;
        Some((Arc::clone(file), path.clone()))
    }

    /// Makes durable what was appended.
    pub(super) fn sync(&self) -> Result<(), WalError> {
        self.sync_current(&mut self.0.state.lock())
    }

    fn sync_current(&self, state: &mut State) -> Result<(), WalError> {
        let current = state.current.and_then(|(number, _)| state.segments.get(&number));
        if let Some(Segment { file, path, .. }) = current.filter(|_| state.is_dirty && self.0.sync) {
            file.sync_data().map_err(io_error("fdatasync", path))?;
            self.0.syncs.fetch_add(1, Ordering::Relaxed);
        }
        state.is_dirty = false;
        Ok(())
    }

    /// After opening: the log has the entries after `start` up to `last_index`.
    pub(super) fn settle(&self, start: u64, last_index: u64) -> Result<(), WalError> {
        self.0.state.lock().newest_index = last_index;
        self.release(start)
    }

    /// The log starts after `start` now, and the journal knows: removes the segments that it does not need any more.
    pub(super) fn release(&self, start: u64) -> Result<(), WalError> {
        let mut state = self.0.state.lock();
        if start >= state.newest_index {
            return Self::remove_all(&mut state);
        }
        while let Some((_, next)) = state.segments.iter().nth(1)
            && next.bound <= start.saturating_add(1)
            && let Some((_, oldest)) = state.segments.pop_first()
        {
            fs::remove_file(&oldest.path).map_err(io_error("remove", &oldest.path))?;
        }
        Ok(())
    }

    /// The log has none of the records any more, and the journal knows.
    pub(super) fn clear(&self) -> Result<(), WalError> {
        Self::remove_all(&mut self.0.state.lock())
    }

    fn remove_all(state: &mut State) -> Result<(), WalError> {
        (state.current, state.is_dirty, state.newest_index) = (None, false, 0);
        while let Some((_, segment)) = state.segments.pop_first() {
            fs::remove_file(&segment.path).map_err(io_error("remove", &segment.path))?;
        }
        Ok(())
    }

    /// fdatasyncs so far.
    pub(super) fn syncs(&self) -> u64 {
        self.0.syncs.load(Ordering::Relaxed)
    }
}

fn number_and_bound(name: &str) -> Option<(u64, u64)> {
    let (number, bound) = name.split_once('-')?;
    let hex = |digits: &str| (digits.len() == 16).then(|| u64::from_str_radix(digits, 16).ok())?;
    Some((hex(number)?, hex(bound)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::record::HEADER_BYTES;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn name(number: u64, bound: u64) -> String {
        format!("{number:016x}-{bound:016x}")
    }

    #[test]
    fn a_segment_goes_when_the_log_starts_right_before_the_bound_of_the_next() {
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().join("segments");
        let half = vec![7; SEGMENT_BYTES as usize / 2];
        let segments = Segments::open(&dir, false).unwrap();
        segments.settle(10, 10).unwrap();
        let places: Vec<Place> = (11..=16).map(|index| segments.append(index, index, &half).unwrap()).collect();
        assert_eq!(names(&dir), [name(1, 11), name(2, 13), name(3, 15)]);
        segments.release(11).unwrap();
        assert_eq!(names(&dir).len(), 3, "the first still has entry 12");
        segments.release(12).unwrap();
        assert_eq!(names(&dir), [name(2, 13), name(3, 15)]);
        assert_eq!(segments.read(13, places[2]).unwrap(), half);
        assert!(matches!(segments.read(12, places[1]), Err(WalError::Lost(_))));
        assert!(!segments.holds(12, places[1], &half).unwrap());
        segments.release(15).unwrap();
        assert_eq!(names(&dir), [name(3, 15)], "the newest still has entry 16");
        segments.release(16).unwrap();
        assert!(names(&dir).is_empty());
        let again = segments.append(17, 17, b"small").unwrap();
        assert_eq!(names(&dir), [name(4, 17)], "numbers are not used twice");
        assert!(segments.holds(17, again, b"small").unwrap());
        assert!(!segments.holds(17, again, b"other").unwrap());
    }

    #[test]
    fn after_opening_nothing_is_written_behind_what_was_there() {
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().join("segments");
        let first = Segments::open(&dir, false).unwrap().append(1, 1, b"one").unwrap();
        fs::write(dir.join("strange"), "not a segment").unwrap();
        let segments = Segments::open(&dir, false).unwrap();
        segments.settle(0, 1).unwrap();
        let second = segments.append(2, 2, b"two").unwrap();
        assert_eq!(names(&dir), [name(1, 1), name(2, 2), "strange".to_owned()]);
        assert_eq!(segments.read(1, first).unwrap(), b"one");
        assert_eq!(segments.read(2, second).unwrap(), b"two");
        let beyond = Place {
            length: u32::MAX,
            ..second
        };
        assert!(matches!(segments.read(2, beyond), Err(WalError::Lost(_))));
        segments.clear().unwrap();
        assert_eq!(names(&dir), ["strange"]);
    }

    #[test]
    fn a_place_is_told_from_a_record() {
        let place = Place {
            segment: 3,
            offset: 1 << 40,
            length: 70_000,
        };
        assert_eq!(Place::decode(&place.encode()), Some(place));
        assert_eq!(Place::decode(&[0; HEADER_BYTES]), None, "the shortest record");
    }
}
