//! The half of a log that is the same in every engine: records, hash chain, meta record, fence, verification.
//!
//! An engine is a [`Backend`]: it keeps opaque records by index and commits a [`Unit`] atomically and durably. [`Checked`] makes a
//! [`Wal`] of it. What an engine says is never believed: each record is verified on every read, and at open the whole log is read
//! and compared with the meta record, and the meta record with the fence.

use std::ops::ControlFlow;

use raft::eraftpb::HardState;

use super::{
    LogStart, Recovered, Wal, WalBatch, WalError, WalStats,
    record::{Meta, Remove, Unit, decode_entry, encode_entry},
};

/// Called for each record with its index; `Break` ends the reading.
pub(crate) type Visit<'a> = dyn FnMut(u64, &[u8]) -> Result<ControlFlow<()>, WalError> + 'a;

/// An engine that keeps records.
pub(crate) trait Backend: Send {
    /// As in [`Wal::engine`].
    fn name(&self) -> &'static str;

    /// The newest meta record as stored, `None` in a new directory.
    fn meta(&self) -> Result<Option<Vec<u8>>, WalError>;

    /// What the fence had at open.
    fn fence(&self) -> Result<Option<Meta>, WalError>;

    /// Notes what is durable now. Called after the commit returned.
    fn raise_fence(&mut self, meta: &Meta) -> Result<(), WalError>;

    /// Visits the records of `low..high` in ascending order, whichever exist.
    fn read(&self, low: u64, high: u64, visit: &mut Visit<'_>) -> Result<(), WalError>;

    /// Carries the unit out. Atomic, and durable on return (unless the log was opened without sync).
    fn commit(&mut self, unit: Unit) -> Result<(), WalError>;

    /// At open, the whole log was read and is whole: what nothing was read from may go.
    fn verified(&mut self) -> Result<(), WalError> {
        Ok(())
    }

    /// As in [`Wal::check_background`].
    fn check_background(&self) -> Result<(), WalError>;

    /// As in [`Wal::close`].
    fn close(&mut self) -> Result<(), WalError>;

    /// As in [`Wal::stats`].
    fn stats(&self) -> WalStats;
}

/// A [`Wal`] over a [`Backend`].
pub(crate) struct Checked<B> {
    backend: B,
    meta: Meta,
    recovered: Recovered,
    poisoned: bool,
}

impl<B: Backend> Checked<B> {
    /// Reads and verifies everything. `Lost` if the engine is behind its fence or has a hole, `Corrupt` if a record is damaged.
    pub(crate) fn open(mut backend: B) -> Result<Self, WalError> {
        let meta = agree(backend.meta()?, backend.fence()?)?;
        verify(&backend, &meta)?;
        backend.raise_fence(&meta)?;
        backend.verified()?;
        let recovered = Recovered {
            hard_state: meta.hard_state.clone(),
            start: meta.start,
            last_index: meta.last_index,
        };
        Ok(Self {
            backend,
            meta,
            recovered,
            poisoned: false,
        })
    }

    /// The unit that appends `batch`, and the meta record after it. `None` if there is nothing to write.
    pub(crate) fn prepare(&self, batch: &WalBatch) -> Result<Option<(Unit, Meta)>, WalError> {
        let mut meta = self.meta.clone();
        let mut remove = Remove::Nothing;
        let mut records = Vec::with_capacity(batch.entries.len());
        if let Some(first) = batch.entries.first() {
            assert!(
                first.index > meta.start.index && first.index <= meta.last_index + 1,
                "wal: entry {} does not follow {}..={}",
                first.index,
                meta.start.index,
                meta.last_index
            );
            if first.index <= meta.last_index {
                remove = Remove::Suffix {
                    from: first.index,
                    to: meta.last_index,
                };
            }
            let mut chain = self.point(first.index - 1)?.1;
            for (offset, entry) in batch.entries.iter().enumerate() {
                assert_eq!(entry.index, first.index + offset as u64, "wal: entries of a batch are consecutive");
                let (record, next) = encode_entry(entry, chain)?;
                records.push((entry.index, record));
                chain = next;
                meta.last_index = entry.index;
            }
            meta.last_chain = chain;
        }
        match &batch.hard_state {
            Some(hard_state) => meta.hard_state = plain(hard_state),
            None if records.is_empty() => return Ok(None),
            None => {}
        }
        meta.seq += 1;
        Ok(Some((
            Unit {
                seq: meta.seq,
                meta: meta.encode(),
                remove,
                records,
            },
            meta,
        )))
    }

    /// Carries a unit out, raises the fence, and only then takes `meta` as the truth.
    fn carry_out(&mut self, unit: Unit, meta: Meta) -> Result<(), WalError> {
        let done = self.backend.commit(unit).and_then(|()| self.backend.raise_fence(&meta));
        self.poisoned = done.is_err();
        self.meta = meta;
        done
    }

    /// Takes `meta` as the truth of the moment: a unit was staged in the backend.
    pub(crate) fn adopt(&mut self, meta: Meta) {
        self.meta = meta;
    }

    /// What was appended last, durable or not.
    pub(crate) fn meta(&self) -> &Meta {
        &self.meta
    }

    pub(crate) fn backend(&self) -> &B {
        &self.backend
    }

    pub(crate) fn backend_mut(&mut self) -> &mut B {
        &mut self.backend
    }

    /// From now on every call fails.
    pub(crate) fn poison(&mut self) {
        self.poisoned = true;
    }

    /// An error once the log is poisoned.
    pub(crate) fn check_usable(&self) -> Result<(), WalError> {
        match self.poisoned {
            true => Err(WalError::Engine(
                "the log failed before or was closed, and takes nothing more".to_owned(),
            )),
            false => Ok(()),
        }
    }

    /// Term and chain hash at `index`, which is the start or an entry. The term of the last entry is read too.
    fn point(&self, index: u64) -> Result<(Option<u64>, u64), WalError> {
        if index == self.meta.start.index {
            return Ok((Some(self.meta.start.term), self.meta.start_chain));
        }
        if index == self.meta.last_index {
            return Ok((None, self.meta.last_chain));
        }
        let decoded = self.read_one(index)?;
        Ok((Some(decoded.0), decoded.1))
    }

    fn read_one(&self, index: u64) -> Result<(u64, u64), WalError> {
        let mut found = None;
        self.backend.read(index, index + 1, &mut |at, record| {
            let decoded = decode_entry(at, record)?;
            found = Some((decoded.entry.term, decoded.chain));
            Ok(ControlFlow::Break(()))
        })?;
        found.ok_or_else(|| WalError::Corrupt(format!("entry {index} is missing")))
    }

    fn restart_at(&mut self, start: LogStart, hard_state: HardState) -> Result<(), WalError> {
        let meta = Meta::empty(self.meta.seq + 1, start, hard_state);
        let unit = Unit {
            seq: meta.seq,
            meta: meta.encode(),
            remove: Remove::All,
            records: Vec::new(),
        };
        self.carry_out(unit, meta)
    }
}

impl<B: Backend> Wal for Checked<B> {
    fn recovered(&self) -> &Recovered {
        &self.recovered
    }

    fn append(&mut self, batch: &WalBatch) -> Result<(), WalError> {
        self.check_usable()?;
        match self.prepare(batch)? {
            Some((unit, meta)) => self.carry_out(unit, meta),
            None => Ok(()),
        }
    }

    fn entries(&self, low: u64, high: u64, max_bytes: u64) -> Result<Vec<raft::eraftpb::Entry>, WalError> {
        self.check_usable()?;
        if low <= self.meta.start.index {
            return Err(WalError::Compacted {
                index: low,
                start: self.meta.start.index,
            });
        }
        let high = high.min(self.meta.last_index + 1);
        let mut entries = Vec::new();
        if low >= high {
            return Ok(entries);
        }
        // What is before `low` is not read for this alone: elsewhere the first record's predecessor is not known.
        let before = (low == self.meta.start.index + 1).then_some(self.meta.start_chain);
        let (mut bytes, mut chain, mut full) = (0_u64, before, false);
        self.backend.read(low, high, &mut |index, record| {
            let expected = low + entries.len() as u64;
            if index != expected {
                return Err(WalError::Corrupt(format!("entry {expected} is missing")));
            }
            let decoded = decode_entry(index, record)?;
            if chain.is_some_and(|chain| chain != decoded.prev) {
                return Err(WalError::Corrupt(format!("entry {index} does not follow its predecessor")));
            }
            bytes += decoded.size;
            full = !entries.is_empty() && bytes > max_bytes;
            if full {
                return Ok(ControlFlow::Break(()));
            }
            chain = Some(decoded.chain);
            entries.push(decoded.entry);
            Ok(ControlFlow::Continue(()))
        })?;
        let next = low + entries.len() as u64;
        if !full && next != high {
            return Err(WalError::Corrupt(format!("entry {next} is missing")));
        }
        if next > self.meta.last_index && chain != Some(self.meta.last_chain) {
            return Err(WalError::Corrupt(format!(
                "entry {} is not the one that was acknowledged",
                self.meta.last_index
            )));
        }
        Ok(entries)
    }

    fn compact(&mut self, to: LogStart) -> Result<(), WalError> {
        self.check_usable()?;
        if to.index <= self.meta.start.index {
            return Ok(());
        }
        if to.index > self.meta.last_index {
            return self.restart_at(to, self.meta.hard_state.clone());
        }
        let (term, chain) = self.read_one(to.index)?;
        assert_eq!(
            term, to.term,
            "wal: compaction to index {} names another term than the log has",
            to.index
        );
        let meta = Meta {
            seq: self.meta.seq + 1,
            start: to,
            start_chain: chain,
            ..self.meta.clone()
        };
        let unit = Unit {
            seq: meta.seq,
            meta: meta.encode(),
            remove: Remove::Prefix { to: to.index },
            records: Vec::new(),
        };
        self.carry_out(unit, meta)
    }

    fn reset(&mut self, start: LogStart, hard_state: &HardState) -> Result<(), WalError> {
        self.check_usable()?;
        self.restart_at(start, plain(hard_state))
    }

    fn check_background(&self) -> Result<(), WalError> {
        self.backend.check_background()
    }

    fn close(&mut self) -> Result<(), WalError> {
        self.poisoned = true;
        self.backend.close()
    }

    fn stats(&self) -> WalStats {
        self.backend.stats()
    }

    fn engine(&self) -> &'static str {
        self.backend.name()
    }
}

/// The three fields a meta record keeps.
fn plain(hard_state: &HardState) -> HardState {
    HardState {
        term: hard_state.term,
        vote: hard_state.vote,
        commit: hard_state.commit,
        ..HardState::default()
    }
}

/// The meta record of the engine, if the fence does not contradict it (rule 9).
fn agree(stored: Option<Vec<u8>>, fence: Option<Meta>) -> Result<Meta, WalError> {
    let fence = fence.unwrap_or_else(|| Meta::empty(0, LogStart::default(), HardState::default()));
    let meta = match stored {
        Some(raw) => Meta::decode(&raw).ok_or_else(|| WalError::Corrupt("the meta record fails its checksum".to_owned()))?,
        None => Meta::empty(0, LogStart::default(), HardState::default()),
    };
    if meta.seq < fence.seq {
        return Err(lost(format!(
            "the log ends at unit {} with entry {} in term {}, but unit {} with entry {} in term {} was acknowledged",
            meta.seq, meta.last_index, meta.hard_state.term, fence.seq, fence.last_index, fence.hard_state.term
        )));
    }
    if meta.seq == fence.seq && meta != fence {
        return Err(WalError::Corrupt(format!("log and fence differ about unit {}", meta.seq)));
    }
    Ok(meta)
}

/// Reads the whole log: contiguous, in chain, terms not falling, ending where the meta record says.
fn verify<B: Backend>(backend: &B, meta: &Meta) -> Result<(), WalError> {
    let (mut index, mut term, mut chain) = (meta.start.index, meta.start.term, meta.start_chain);
    backend.read(meta.start.index + 1, u64::MAX, &mut |at, record| {
        if at != index + 1 {
            return Err(lost(format!("entry {} is missing, entry {at} is there", index + 1)));
        }
        if at > meta.last_index {
            return Err(WalError::Corrupt(format!(
                "entry {at} is behind the end of the log, {}",
                meta.last_index
            )));
        }
        let decoded = decode_entry(at, record)?;
        if decoded.prev != chain {
            return Err(WalError::Corrupt(format!("entry {at} does not follow its predecessor")));
        }
        if decoded.entry.term < term {
            return Err(WalError::Corrupt(format!(
                "entry {at} has term {} after term {term}",
                decoded.entry.term
            )));
        }
        (index, term, chain) = (at, decoded.entry.term, decoded.chain);
        Ok(ControlFlow::Continue(()))
    })?;
    if index != meta.last_index {
        return Err(lost(format!(
            "the log ends at entry {index}, but entry {} was acknowledged",
            meta.last_index
        )));
    }
    match chain == meta.last_chain {
        true => Ok(()),
        false => Err(WalError::Corrupt(format!("entry {index} is not the one that was acknowledged"))),
    }
}

/// Acknowledged data is gone: says so, and what to do.
pub(crate) fn lost(what: String) -> WalError {
    WalError::Lost(format!(
        "{what}; this member may have voted for or promised what it no longer knows, so it must not go on under its id: \
         remove it from the cluster, empty its data directory and let it join under a new id"
    ))
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, sync::Arc};

    use bytes::Bytes;
    use parking_lot::Mutex;
    use raft::eraftpb::Entry;

    use super::*;
    use crate::wal::record::HEADER_BYTES;

    const LAST: u64 = 5;

    /// Records by index, which a test changes under an open log.
    type Records = Arc<Mutex<BTreeMap<u64, Bytes>>>;

    /// An engine that believes everything.
    struct Credulous(Records);

    impl Backend for Credulous {
        fn name(&self) -> &'static str {
            "credulous"
        }
        fn meta(&self) -> Result<Option<Vec<u8>>, WalError> {
            Ok(None)
        }
        fn fence(&self) -> Result<Option<Meta>, WalError> {
            Ok(None)
        }
        fn raise_fence(&mut self, _meta: &Meta) -> Result<(), WalError> {
            Ok(())
        }
        fn read(&self, low: u64, high: u64, visit: &mut Visit<'_>) -> Result<(), WalError> {
            let records = self.0.lock().clone();
            for (index, record) in records.range(low..high) {
                if visit(*index, record)?.is_break() {
                    break;
                }
            }
            Ok(())
        }
        fn commit(&mut self, unit: Unit) -> Result<(), WalError> {
            self.0.lock().extend(unit.records);
            Ok(())
        }
        fn check_background(&self) -> Result<(), WalError> {
            Ok(())
        }
        fn close(&mut self) -> Result<(), WalError> {
            Ok(())
        }
        fn stats(&self) -> WalStats {
            WalStats::default()
        }
    }

    fn entry(index: u64, content: &'static [u8]) -> Entry {
        Entry {
            index,
            term: 7,
            data: Bytes::from_static(content),
            ..Entry::default()
        }
    }

    /// An open log of [`LAST`] entries, and what its engine holds.
    fn opened() -> (Checked<Credulous>, Records) {
        let records = Records::default();
        let mut log = Checked::open(Credulous(records.clone())).unwrap();
        let entries = (1..=LAST).map(|index| entry(index, b"as it was written")).collect();
        log.append(&WalBatch { entries, hard_state: None }).unwrap();
        (log, records)
    }

    fn is_corrupt(log: &Checked<Credulous>, low: u64, high: u64) -> bool {
        match log.entries(low, high, u64::MAX) {
            Err(WalError::Corrupt(_)) => true,
            Ok(_) => false,
            Err(other) => panic!("{other:?}"),
        }
    }

    /// The record with another checksum: as if it had been written like this.
    fn sealed(mut record: Vec<u8>) -> Bytes {
        let crc = crc32c::crc32c(&record[4..]);
        record[..4].copy_from_slice(&crc.to_le_bytes());
        Bytes::from(record)
    }

    #[test]
    fn rule_8_every_bit_that_flips_under_an_open_log_is_noticed_when_it_is_read() {
        let (log, records) = opened();
        let intact = records.lock().clone();
        for (index, record) in &intact {
            for bit in 0..8 * record.len() {
                let mut flipped = record.to_vec();
                flipped[bit / 8] ^= 1 << (bit % 8);
                records.lock().insert(*index, Bytes::from(flipped));
                assert!(is_corrupt(&log, *index, index + 1), "bit {bit} of entry {index}");
            }
            records.lock().insert(*index, record.clone());
        }
        assert_eq!(log.entries(1, LAST + 1, u64::MAX).unwrap().len() as u64, LAST);
    }

    #[test]
    fn rule_8_a_record_with_a_fitting_checksum_in_the_wrong_place_is_noticed_when_it_is_read() {
        let (log, records) = opened();
        let intact = records.lock().clone();
        let fields = [
            ("length", 4),
            ("index", 8),
            ("term", 16),
            ("predecessor", 24),
            ("payload", HEADER_BYTES),
        ];
        for index in 1..=LAST {
            for (field, at) in fields {
                let mut other = intact[&index].to_vec();
                other[at] ^= 1;
                records.lock().insert(index, sealed(other));
                assert!(is_corrupt(&log, 1, LAST + 1), "{field} of entry {index}");
            }
            // One of another history, whole in itself: its successor does not fit, or behind the last one the end of the log.
            let prev = decode_entry(index, &intact[&index]).unwrap().prev;
            let (other, _) = encode_entry(&entry(index, b"of another history"), prev).unwrap();
            records.lock().insert(index, other);
            assert!(is_corrupt(&log, 1, LAST + 1), "content of entry {index}");
            records.lock().remove(&index);
            assert!(is_corrupt(&log, 1, LAST + 1), "entry {index} is gone");
            records.lock().insert(index, intact[&index].clone());
        }
        assert_eq!(log.entries(1, LAST + 1, u64::MAX).unwrap().len() as u64, LAST);
    }
}
