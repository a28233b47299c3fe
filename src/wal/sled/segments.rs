//! Segments: files for the records that are too large for sled.
//!
//! sled copies and writes what it is given several times over; of entries of 64 KiB that was half of a member's processor time. So it is given only
//! the [`Place`] of a large record. The record itself is appended to a segment, once.
//!
//! ```text
//! segments/NUMBER    16 hexadecimal digits; records, one behind the other
//! ```
//!
//! *Invariants*
//! - One segment is written at a time, at its end. After opening a new one is begun, and after a sync a new block: what was synced shares no
//!   block with what comes later, so a torn write can only hurt what nobody relies on yet.
//! - A segment goes when the log starts at or behind the newest index that it was ever given; at opening, when no place that the verified log
//!   uses names it. sled may go back to what it held at its last checkpoint, so that a record was written again elsewhere says nothing meanwhile.
//! - A place that sled lost or holds too long is put right from the journal before anything is read; so a segment may go as soon as the journal
//!   has the meta record that makes it needless.
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

const BLOCK_BYTES: u64 = 4096;

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
    /// A segment that has so many bytes is followed by another one.
    segment_bytes: u64,
    sync: bool,
    syncs: AtomicU64,
    state: Mutex<State>,
}

struct State {
    /// Newest index that each was given, or that was read from it; 0 if none.
    newest: BTreeMap<u64, u64>,
    /// Of the next one that is begun.
    next_number: u64,
    /// The one that is written. Only one thread does.
    current: Option<Current>,
    /// The one that was read last.
    read: Option<(u64, Arc<File>)>,
}

#[derive(Clone)]
struct Current {
    number: u64,
    file: Arc<File>,
    end: u64,
    synced: u64,
}

impl Segments {
    /// Opens the segments in `dir`, which is made if it is not there.
    pub(super) fn open(dir: &Path, segment_bytes: u64, sync: bool) -> Result<Self, WalError> {
        make_dir(dir)?;
        let mut newest = BTreeMap::new();
        for entry in fs::read_dir(dir).map_err(io_error("list", dir))? {
            let entry = entry.map_err(io_error("list", dir))?;
            let is_file = entry.file_type().map_err(io_error("look at", &entry.path()))?.is_file();
            // Whatever else lies there is not the log's.
            if let Some(number) = entry.file_name().to_str().and_then(number).filter(|_| is_file) {
                newest.insert(number, 0);
            }
        }
        if sync {
            // Whoever copied the directory, or wrote it without syncs, may not have.
            sync_dir(dir)?;
        }
        let next_number = match newest.last_key_value() {
            None => Some(1),
            Some((number, _)) => number.checked_add(1),
        };
        Ok(Self(Arc::new(Shared {
            dir: dir.to_owned(),
            segment_bytes,
            sync,
            syncs: AtomicU64::new(0),
            state: Mutex::new(State {
                newest,
                next_number: next_number.ok_or_else(|| WalError::Corrupt(format!("{}: a segment has the last number", dir.display())))?,
                current: None,
                read: None,
            }),
        })))
    }

    /// Appends the record of entry `index`. By one thread at a time.
    pub(super) fn append(&self, index: u64, record: &[u8]) -> Result<Place, WalError> {
        let length = u32::try_from(record.len()).map_err(|_| WalError::Engine(format!("entry {index} is larger than 4 GiB")))?;
        let current = self.0.state.lock().current.clone();
        let mut current = match current {
            Some(current) if current.end < self.0.segment_bytes => current,
            full => {
                if let Some(full) = full {
                    self.sync_file(&full)?;
                }
                self.begin()?
            }
        };
        let place = Place {
            segment: current.number,
            offset: current.end,
            length,
        };
        let path = self.path(current.number);
        current.file.write_all_at(record, current.end).map_err(io_error("write", &path))?;
        current.end += u64::from(length);
        let mut state = self.0.state.lock();
        state.note(index, current.number);
        state.current = Some(current);
        Ok(place)
    }

    /// A new one.
    fn begin(&self) -> Result<Current, WalError> {
        let mut state = self.0.state.lock();
        let number = state.next_number;
        state.next_number = number
            .checked_add(1)
            .ok_or_else(|| WalError::Engine("there are no more numbers of segments".to_owned()))?;
        let path = self.path(number);
        let opened = OpenOptions::new().read(true).write(true).create_new(true).open(&path);
        let file = Arc::new(opened.map_err(io_error("create", &path))?);
        state.newest.insert(number, 0);
        drop(state);
        if self.0.sync {
            sync_dir(&self.0.dir)?;
        }
        Ok(Current {
            number,
            file,
            end: 0,
            synced: 0,
        })
    }

    /// Reads the record at `place`, which sled has for entry `index` of the log.
    pub(super) fn read(&self, index: u64, place: Place) -> Result<Vec<u8>, WalError> {
        let record = self.content(index, place)?;
        self.0.state.lock().note(index, place.segment);
        Ok(record)
    }

    fn content(&self, index: u64, place: Place) -> Result<Vec<u8>, WalError> {
        let missing = || {
            lost(format!(
                "entry {index} is missing: its segment {:016x} is gone or too short",
                place.segment
            ))
        };
        let path = self.path(place.segment);
        let Some(file) = self.file(place.segment)? else {
            return Err(missing());
        };
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
        match self.content(index, place) {
            Err(WalError::Lost(_)) => Ok(false),
            found => Ok(found? == record),
        }
    }

    /// `None` if there is none of this number.
    fn file(&self, number: u64) -> Result<Option<Arc<File>>, WalError> {
        let mut state = self.0.state.lock();
        if let Some(current) = state.current.as_ref().filter(|current| current.number == number) {
            return Ok(Some(Arc::clone(&current.file)));
        }
        if let Some((_, file)) = state.read.as_ref().filter(|(read, _)| *read == number) {
            return Ok(Some(Arc::clone(file)));
        }
        if !state.newest.contains_key(&number) {
            return Ok(None);
        }
        let path = self.path(number);
        let file = Arc::new(File::open(&path).map_err(io_error("open", &path))?);
        state.read = Some((number, Arc::clone(&file)));
        Ok(Some(file))
    }

    /// Makes durable what was appended.
    pub(super) fn sync(&self) -> Result<(), WalError> {
        let current = self.0.state.lock().current.clone();
        let Some(mut current) = current else { return Ok(()) };
        self.sync_file(&current)?;
        if current.end > current.synced {
            current.end = current.end.next_multiple_of(BLOCK_BYTES);
            current.synced = current.end;
            self.0.state.lock().current = Some(current);
        }
        Ok(())
    }

    fn sync_file(&self, current: &Current) -> Result<(), WalError> {
        if current.end > current.synced && self.0.sync {
            let synced = current.file.sync_data();
            synced.map_err(io_error("fdatasync", &self.path(current.number)))?;
            self.0.syncs.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// After opening: what the log has was read. Removes the segments of which nothing was.
    pub(super) fn settle(&self) -> Result<(), WalError> {
        self.release(0)
    }

    /// The log starts after `start` now, and the journal knows: removes the segments that it does not need any more.
    pub(super) fn release(&self, start: u64) -> Result<(), WalError> {
        let mut state = self.0.state.lock();
        let needless: Vec<u64> = state
            .newest
            .iter()
            .filter(|(_, newest)| **newest <= start)
            .map(|(number, _)| *number)
            .collect();
        for number in needless {
            self.remove(&mut state, number)?;
        }
        Ok(())
    }

    /// The log has none of the records any more, and the journal knows.
    pub(super) fn clear(&self) -> Result<(), WalError> {
        self.release(u64::MAX)
    }

    fn remove(&self, state: &mut State, number: u64) -> Result<(), WalError> {
        state.newest.remove(&number);
        state.current.take_if(|current| current.number == number);
        state.read.take_if(|(read, _)| *read == number);
        let path = self.path(number);
        fs::remove_file(&path).map_err(io_error("remove", &path))
    }

    fn path(&self, number: u64) -> PathBuf {
        self.0.dir.join(format!("{number:016x}"))
    }

    /// fdatasyncs so far.
    pub(super) fn syncs(&self) -> u64 {
        self.0.syncs.load(Ordering::Relaxed)
    }
}

impl State {
    fn note(&mut self, index: u64, segment: u64) {
        if let Some(newest) = self.newest.get_mut(&segment) {
            *newest = index.max(*newest);
        }
    }
}

fn number(name: &str) -> Option<u64> {
    let is_one = name.len() == 16 && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    is_one.then(|| u64::from_str_radix(name, 16).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::record::HEADER_BYTES;

    const BYTES: u64 = 64 * 1024;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn name(number: u64) -> String {
        format!("{number:016x}")
    }

    #[test]
    fn a_segment_goes_when_the_log_starts_behind_all_that_is_in_it() {
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().join("segments");
        let half = vec![7; BYTES as usize / 2];
        let segments = Segments::open(&dir, BYTES, false).unwrap();
        segments.settle().unwrap();
        let places: Vec<Place> = (11..=16).map(|index| segments.append(index, &half).unwrap()).collect();
        assert_eq!(names(&dir), [name(1), name(2), name(3)]);
        segments.release(11).unwrap();
        assert_eq!(names(&dir).len(), 3, "the first still has entry 12");
        segments.release(12).unwrap();
        assert_eq!(names(&dir), [name(2), name(3)]);
        assert_eq!(segments.read(13, places[2]).unwrap(), half);
        assert!(matches!(segments.read(12, places[1]), Err(WalError::Lost(_))));
        assert!(!segments.holds(12, places[1], &half).unwrap());
        segments.release(15).unwrap();
        assert_eq!(names(&dir), [name(3)], "the newest still has entry 16");
        segments.release(16).unwrap();
        assert!(names(&dir).is_empty());
        let again = segments.append(17, b"small").unwrap();
        assert_eq!(names(&dir), [name(4)], "numbers are not used twice");
        assert!(segments.holds(17, again, b"small").unwrap());
        assert!(!segments.holds(17, again, b"other").unwrap());
        segments.clear().unwrap();
        assert!(names(&dir).is_empty());
    }

    #[test]
    fn after_opening_nothing_is_written_behind_what_was_there_and_what_is_not_read_goes() {
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().join("segments");
        let first = Segments::open(&dir, BYTES, false).unwrap().append(1, b"one").unwrap();
        Segments::open(&dir, BYTES, false).unwrap().append(1, b"one again").unwrap();
        let strangers = ["strange", "000000000000000A"];
        for stranger in strangers {
            fs::write(dir.join(stranger), "not a segment").unwrap();
        }
        fs::create_dir(dir.join(name(7))).unwrap();
        let segments = Segments::open(&dir, BYTES, false).unwrap();
        let second = segments.append(2, b"two").unwrap();
        assert_eq!(segments.read(1, first).unwrap(), b"one");
        segments.settle().unwrap();
        assert_eq!(names(&dir), [&name(1), &name(3), &name(7), strangers[1], strangers[0]]);
        assert_eq!(segments.read(2, second).unwrap(), b"two");
        let beyond = Place {
            length: u32::MAX,
            ..second
        };
        assert!(matches!(segments.read(2, beyond), Err(WalError::Lost(_))));
        segments.release(1).unwrap();
        assert_eq!(names(&dir), [&name(3), &name(7), strangers[1], strangers[0]]);
    }

    #[test]
    fn what_was_synced_shares_no_block_with_what_comes_later() {
        let place = tempfile::tempdir().unwrap();
        let segments = Segments::open(&place.path().join("segments"), BYTES, true).unwrap();
        let offsets: Vec<u64> = (1..=4)
            .map(|index| {
                let place = segments.append(index, &[1; 5_000]).unwrap();
                if index % 2 == 0 {
                    segments.sync().unwrap();
                    segments.sync().unwrap();
                }
                place.offset
            })
            .collect();
        assert_eq!(offsets, [0, 5_000, 3 * 4_096, 3 * 4_096 + 5_000]);
        assert_eq!(segments.syncs(), 2);
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
