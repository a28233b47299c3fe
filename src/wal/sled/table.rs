//! sled's tree and our descriptor of its file, and the [`Segments`] for what is too large for it.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use ::sled::Db;
use bytes::Bytes;

use super::{
    super::{
        WalError,
        checked::{Visit, lost},
        files::{io_error, sync_dir, sync_tree},
        record::{Meta, Remove, Unit, record_length},
    },
    CHECKPOINT_BYTES, SMALL_BYTES,
    segments::{Place, Segments},
};

/// Records removed in one step.
pub(super) const STEP_RECORDS: usize = 256;
const CACHE_BYTES: u64 = 16 * 1024 * 1024;
const META_KEY: &[u8] = b"m";
/// What a byte in a segment weighs against one in sled, whose own segments set the step between two checkpoints: of these, 1 MiB may wait.
const SEGMENT_SHARE: usize = 16;

/// See the module. Clones are the same table.
#[derive(Clone)]
pub(super) struct Table {
    db: Db,
    segments: Segments,
    file: Arc<File>,
    path: PathBuf,
    sync: bool,
    sled_syncs: Arc<AtomicU64>,
}

const KEY_BYTES: usize = 13;

/// Sorts by index, then by chunk. Logs of the first format had large records in several chunks; chunk 0 has a whole one since, or its [`Place`].
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

impl Table {
    /// Opens sled and the segments of the log in `log_dir`, hardened, and makes sure that their files' names are durable.
    pub(super) fn open(log_dir: &Path, segment_bytes: u64, sync: bool) -> Result<Self, WalError> {
        let dir = &log_dir.join("sled");
        let db = open_patiently(dir)?;
        let segments = Segments::open(&log_dir.join("segments"), segment_bytes, sync)?;
        if sync {
            sync_tree(dir)?;
            sync_dir(log_dir)?;
        }
        let file_path = dir.join("db");
        let file = OpenOptions::new()
            .write(true)
            .open(&file_path)
            .map_err(io_error("open", &file_path))?;
        let table = Self {
            db,
            segments,
            file: Arc::new(file),
            path: dir.to_owned(),
            sync,
            sled_syncs: Arc::default(),
        };
        table.check_blobs()?;
        Ok(table)
    }

    /// fdatasyncs so far.
    pub(super) fn syncs(&self) -> u64 {
        self.sled_syncs.load(Ordering::Relaxed) + self.segments.syncs()
    }

    pub(super) fn meta(&self) -> Result<Option<Vec<u8>>, WalError> {
        Ok(self.db.get(META_KEY).map_err(sled_error)?.map(|value| value.to_vec()))
    }

    /// Sets the meta record.
    pub(super) fn put_meta(&self, meta: &[u8]) -> Result<(), WalError> {
        self.insert(META_KEY, meta)
    }

    /// Puts the record of entry `index`, of which nothing may be there. Returns the bytes it counts for.
    pub(super) fn put(&self, index: u64, record: &[u8]) -> Result<usize, WalError> {
        let key = entry_key(index, 0);
        if record.len() <= SMALL_BYTES {
            self.insert(&key, record)?;
            return Ok(record.len());
        }
        let place = self.segments.append(index, record)?;
        self.insert(&key, &place.encode())?;
        Ok(Place::BYTES + record.len() / SEGMENT_SHARE)
    }

    /// The whole log was read, and found whole.
    pub(super) fn settle(&self) -> Result<(), WalError> {
        self.segments.settle()
    }

    /// The log starts after `start` now, and the journal knows.
    pub(super) fn release(&self, start: u64) -> Result<(), WalError> {
        self.segments.release(start)
    }

    /// The log has no entries now, and the journal knows.
    pub(super) fn release_all(&self) -> Result<(), WalError> {
        self.segments.clear()
    }

    /// What has been put is durable afterwards: the segments, then sled, which names them: flush, then our own fdatasync, without which the
    /// flush is not durable.
    pub(super) fn checkpoint(&self) -> Result<(), WalError> {
        self.segments.sync()?;
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
            self.sled_syncs.fetch_add(1, Ordering::Relaxed);
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
    pub(super) fn read(&self, low: u64, high: u64, visit: &mut Visit<'_>) -> Result<ControlFlow<()>, WalError> {
        let mut record: Vec<u8> = Vec::new();
        let mut current = None;
        for item in self.db.range(entry_key(low, 0)..entry_key(high, 0)) {
            let (key, value) = item.map_err(sled_error)?;
            let (index, chunk) = entry_position(&key).ok_or_else(|| WalError::Corrupt(format!("strange key {key:?}")))?;
            let expected = current.unwrap_or((index, 0));
            if (index, chunk) != expected {
                return Err(lost(format!("piece {} of entry {} is missing", expected.1, expected.0)));
            }
            match Place::decode(&value).filter(|_| chunk == 0) {
                Some(place) => record = self.segments.read(index, place)?,
                None => record.extend_from_slice(&value),
            }
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
    pub(super) fn remove_step(&self, from: u64, to: u64) -> Result<usize, WalError> {
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
        let mut found: Option<Vec<u8>> = None;
        for item in self.db.range(entry_key(index, 0)..=entry_key(index, u32::MAX)) {
            let (_, value) = item.map_err(sled_error)?;
            match (Place::decode(&value), record) {
                (Some(place), Some(record)) if found.is_none() && self.segments.holds(index, place, record)? => {
                    found = Some(record.to_vec());
                }
                _ => found.get_or_insert_default().extend_from_slice(&value),
            }
        }
        Ok(found.as_deref() == record.map(|record| &record[..]))
    }

    /// Makes sled equal to what it is after `units`, whichever of them it has seen already, and durable. Putting a unit again is harmless:
    /// the last word on each index is the newest unit's.
    pub(super) fn restore(&self, units: Vec<Unit>) -> Result<(), WalError> {
        let Some(newest) = units.last().map(|unit| unit.meta.clone()) else {
            return Ok(());
        };
        let start = Meta::decode(&newest).map_or(0, |meta| meta.start.index);
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
        // What was compacted since is never read, and the keeper removes it.
        last_word.retain(|index, _| *index > start);
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
            if let Some(record) = record {
                unsynced_bytes += self.put(*index, record)?;
                if unsynced_bytes >= CHECKPOINT_BYTES {
                    self.checkpoint()?;
                    unsynced_bytes = 0;
                }
            }
        }
        self.put_meta(&newest)?;
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
    use raft::eraftpb::Entry;

    use super::*;
    use crate::{
        config::WalEngine,
        wal::{self, LogStart, WalBatch},
    };

    fn entries(indices: std::ops::RangeInclusive<u64>, bytes: usize) -> Vec<Entry> {
        let entry = |index| Entry {
            index,
            term: 1,
            data: vec![index as u8; bytes].into(),
            ..Entry::default()
        };
        indices.map(entry).collect()
    }

    fn segments(dir: &Path) -> usize {
        std::fs::read_dir(dir.join("segments")).unwrap().count()
    }

    #[test]
    fn large_records_lie_in_segments_which_go_with_them() {
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().join("log");
        let expected = [entries(1..=2, 20), entries(3..=60, 1_000_000)].concat();
        let mut log = wal::open(WalEngine::Sled, &dir, false).unwrap();
        for entry in &expected {
            let batch = WalBatch {
                entries: vec![entry.clone()],
                hard_state: None,
            };
            log.append(&batch).unwrap();
        }
        assert_eq!(log.entries(1, 61, u64::MAX).unwrap(), expected, "as they are being put");
        drop(log);
        assert_eq!(segments(&dir), 4);
        let sled_bytes = std::fs::metadata(dir.join("sled/db")).unwrap().len();
        assert!(sled_bytes < 4_000_000, "sled has {sled_bytes} bytes");

        let mut log = wal::open(WalEngine::Sled, &dir, false).unwrap();
        assert_eq!(log.entries(1, 61, u64::MAX).unwrap(), expected);
        log.compact(LogStart { index: 40, term: 1 }).unwrap();
        drop(log);
        assert_eq!(segments(&dir), 2);
        let mut log = wal::open(WalEngine::Sled, &dir, false).unwrap();
        assert_eq!(log.entries(41, 61, u64::MAX).unwrap(), expected[40..]);
        log.compact(LogStart { index: 60, term: 1 }).unwrap();
        drop(log);
        assert_eq!(segments(&dir), 0);
    }

    fn unit(seq: u64, start: u64, records: &[(u64, Bytes)]) -> Unit {
        let last_index = records.last().unwrap().0;
        let meta = Meta {
            last_index,
            ..Meta::empty(seq, LogStart { index: start, term: 1 }, raft::eraftpb::HardState::default())
        };
        Unit {
            seq,
            meta: meta.encode(),
            remove: Remove::Suffix { from: 20, to: last_index },
            records: records.to_vec(),
        }
    }

    fn read_all(table: &Table, start: u64) -> Vec<u64> {
        let mut found = Vec::new();
        let mut visit = |index, record: &[u8]| {
            assert_eq!(record[HEADER..], [index as u8; 10_000]);
            found.push(index);
            Ok(ControlFlow::Continue(()))
        };
        assert!(table.read(start + 1, u64::MAX, &mut visit).unwrap().is_continue());
        found
    }

    const HEADER: usize = crate::wal::record::HEADER_BYTES;

    /// A record as the engine sees it: its length, and 10,000 bytes.
    fn record(index: u64) -> Bytes {
        let mut record = vec![index as u8; HEADER + 10_000];
        let length = record.len() as u32;
        record[4..8].copy_from_slice(&length.to_le_bytes());
        record.into()
    }

    /// A tail that is replaced, and then replaced again by what it was: the second time it was written elsewhere, which sled has forgotten.
    #[test]
    fn a_segment_stays_that_sled_names_after_a_crash_although_its_records_were_written_again() {
        let place = tempfile::tempdir().unwrap();
        let records: Vec<(u64, Bytes)> = (1..=60).map(|index| (index, record(index))).collect();
        let table = Table::open(place.path(), 1 << 20, false).unwrap();
        table.restore(vec![unit(1, 0, &records)]).unwrap();
        drop(table);
        let lost = Table::open(place.path(), 1 << 20, false).unwrap();
        for (index, record) in &records[19..] {
            lost.segments.append(*index, record).unwrap();
        }
        drop(lost);
        assert_eq!(segments(place.path()), 2);

        let table = Table::open(place.path(), 1 << 20, false).unwrap();
        table.restore(vec![unit(2, 0, &records[19..])]).unwrap();
        assert_eq!(read_all(&table, 0), Vec::from_iter(1..=60));
        table.settle().unwrap();
        assert_eq!(segments(place.path()), 1, "one is needed by nobody");
        table.release(30).unwrap();
        assert_eq!(read_all(&table, 30), Vec::from_iter(31..=60));
        table.release(60).unwrap();
        assert_eq!(segments(place.path()), 0);
    }

    #[test]
    fn what_was_compacted_is_not_put_again() {
        let place = tempfile::tempdir().unwrap();
        let records: Vec<(u64, Bytes)> = (1..=60).map(|index| (index, record(index))).collect();
        for _ in 0..3 {
            let table = Table::open(place.path(), 1 << 20, false).unwrap();
            table.restore(vec![unit(1, 0, &records), unit(2, 58, &records[58..])]).unwrap();
            assert_eq!(read_all(&table, 0), [59, 60]);
            table.settle().unwrap();
            assert_eq!(segments(place.path()), 1);
        }
    }

    /// Logs of the first format had large records in pieces.
    #[test]
    fn a_log_of_the_first_format_is_read_and_becomes_one_of_this() {
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().join("log");
        let expected = entries(1..=5, 9_000);
        let mut log = wal::open(WalEngine::Sled, &dir, false).unwrap();
        log.append(&WalBatch {
            entries: expected.clone(),
            hard_state: None,
        })
        .unwrap();
        drop(log);
        let table = Table::open(&dir, 1 << 20, false).unwrap();
        let mut records = Vec::new();
        let mut visit = |index, record: &[u8]| {
            records.push((index, record.to_vec()));
            Ok(ControlFlow::Continue(()))
        };
        assert!(table.read(1, 6, &mut visit).unwrap().is_continue());
        while table.remove_step(1, 5).unwrap() > 0 {}
        for (index, record) in records {
            for (chunk, piece) in (0..).zip(record.chunks(4000)) {
                table.insert(&entry_key(index, chunk), piece).unwrap();
            }
        }
        table.release_all().unwrap();
        table.checkpoint().unwrap();
        drop(table);
        let marker = dir.join("FORMAT");
        let text = std::fs::read_to_string(&marker).unwrap();
        let (head, _) = text.rsplit_once(" crc=").unwrap();
        let head = head.replace("format=2", "format=1");
        std::fs::write(&marker, format!("{head} crc={:08x}\n", crc32c::crc32c(head.as_bytes()))).unwrap();

        for _ in 0..2 {
            let log = wal::open(WalEngine::Sled, &dir, false).unwrap();
            assert_eq!(log.entries(1, 6, u64::MAX).unwrap(), expected);
            assert_eq!(std::fs::read_to_string(&marker).unwrap(), text);
        }
        assert_eq!(segments(&dir), 0, "nothing was put again");
    }

    /// sled never syncs what it moves there.
    #[test]
    fn a_record_in_sleds_blobs_is_refused_at_open_and_at_a_checkpoint() {
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().join("log");
        drop(wal::open(WalEngine::Sled, &dir, false).unwrap());
        let blob = dir.join("sled/blobs/1");

        let table = Table::open(&dir, 1 << 20, false).unwrap();
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
