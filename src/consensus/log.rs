//! raft-rs' view of the log: a cached tail in memory, the terms of everything, and wishes for what must be fetched from outside.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};

use protobuf::Message as _;
use raft::eraftpb::{ConfState, Entry, EntryType, HardState, Snapshot};
use raft::{Error, GetEntriesContext, RaftState, Result, Storage, StorageError};

use crate::wal::LogStart;

/// Entries that raft asked for and that are no longer in the cache.
#[derive(Debug)]
pub struct FetchWish {
    /// First wanted index.
    pub low: u64,
    /// The index after the last one.
    pub high: u64,
    /// Stop after so many bytes.
    pub max_bytes: u64,
    /// Handed back to raft when they are there.
    pub context: GetEntriesContext,
}

/// Where raft reads the log. The cache always holds everything that is not yet both applied and durable;
/// what is older may be dropped, since it can be fetched.
pub struct LogCache {
    initial: RaftState,
    start: LogStart,
    /// (first index, term) of each run of equal terms in the log, the start's own first.
    term_runs: Vec<(u64, u64)>,
    entries: VecDeque<Entry>,
    cached_bytes: usize,
    fetch_wishes: RefCell<Vec<FetchWish>>,
    fetched: RefCell<BTreeMap<u64, Vec<Entry>>>,
    snapshot: RefCell<Option<Snapshot>>,
    snapshot_wanted: Cell<bool>,
}

impl LogCache {
    /// The log begins after `start`; `term_runs` covers (start, last], `tail` is its cached end.
    pub fn new(hard_state: HardState, conf_state: ConfState, start: LogStart, term_runs: Vec<(u64, u64)>, tail: Vec<Entry>) -> LogCache {
        let mut log = LogCache {
            initial: RaftState { hard_state, conf_state },
            start,
            term_runs: vec![(start.index, start.term)],
            entries: VecDeque::new(),
            cached_bytes: 0,
            fetch_wishes: RefCell::default(),
            fetched: RefCell::default(),
            snapshot: RefCell::default(),
            snapshot_wanted: Cell::new(false),
        };
        // The tail brings the runs that begin in it: noted twice, they would not ascend, and terms are looked up by bisection.
        let tail_begins = tail
            .first()
            .filter(|_| !mutant!(NoteTermsTwice))
            .map_or(u64::MAX, |entry| entry.index);
        for (index, term) in term_runs.into_iter().take_while(|&(index, _)| index < tail_begins) {
            log.push_term(index, term);
        }
        for entry in tail {
            log.push(entry);
        }
        log
    }

    fn push_term(&mut self, index: u64, term: u64) {
        if self.term_runs.last().is_none_or(|&(_, last)| last != term) {
            self.term_runs.push((index, term));
        }
    }

    fn push(&mut self, entry: Entry) {
        self.push_term(entry.index, entry.term);
        self.cached_bytes += weight(&entry);
        self.entries.push_back(entry);
    }

    fn last(&self) -> u64 {
        self.entries.back().map_or(self.start.index, |entry| entry.index)
    }

    pub(super) fn first_cached(&self) -> u64 {
        self.entries.front().map_or(self.start.index + 1, |entry| entry.index)
    }

    /// Takes entries of a Ready: everything from the first one's index on is replaced (rule 10).
    pub fn append(&mut self, entries: &[Entry]) {
        let Some(first) = entries.first() else { return };
        assert!(
            first.index > self.start.index && first.index <= self.last() + 1,
            "log gap: {} after {}",
            first.index,
            self.last()
        );
        while self.entries.back().is_some_and(|entry| entry.index >= first.index) {
            self.cached_bytes -= self.entries.pop_back().as_ref().map_or(0, weight);
        }
        while self.term_runs.len() > 1 && self.term_runs.last().is_some_and(|&(index, _)| index >= first.index) {
            self.term_runs.pop();
        }
        self.fetched.borrow_mut().clear();
        for entry in entries {
            self.push(entry.clone());
        }
    }

    /// The log was replaced by a snapshot.
    pub fn reset(&mut self, start: LogStart) {
        self.start = start;
        self.term_runs = vec![(start.index, start.term)];
        self.entries.clear();
        self.cached_bytes = 0;
        self.fetched.borrow_mut().clear();
    }

    /// Forgets entries up to `to`; they are gone from the log itself as well.
    pub fn compact(&mut self, to: LogStart) {
        if to.index <= self.start.index {
            return;
        }
        while self.entries.front().is_some_and(|entry| entry.index <= to.index) {
            self.cached_bytes -= self.entries.pop_front().as_ref().map_or(0, weight);
        }
        self.start = to;
        let kept = self.term_runs.partition_point(|&(index, _)| index <= to.index);
        self.term_runs.drain(..kept);
        self.term_runs.insert(0, (to.index, to.term));
    }

    /// Drops cached entries up to `settled` (applied and durable) while the cache is larger than `max_bytes`.
    pub fn trim(&mut self, settled: u64, max_bytes: usize) {
        while self.cached_bytes > max_bytes && self.entries.len() > 1 && self.entries.front().is_some_and(|entry| entry.index <= settled) {
            self.cached_bytes -= self.entries.pop_front().as_ref().map_or(0, weight);
        }
    }

    /// Takes the wishes noted since the last call.
    pub fn take_fetch_wishes(&mut self) -> Vec<FetchWish> {
        self.fetch_wishes.take()
    }

    /// Puts fetched entries where raft's next look finds them, once.
    pub fn fetched(&mut self, entries: Vec<Entry>) {
        if let Some(first) = entries.first() {
            self.fetched.borrow_mut().insert(first.index, entries);
        }
    }

    /// Whether raft asked for a snapshot since the last call.
    pub fn take_snapshot_wish(&mut self) -> bool {
        self.snapshot_wanted.take()
    }

    /// Offers (or withdraws) a snapshot: metadata only, the data is streamed.
    pub fn offer_snapshot(&mut self, snapshot: Option<Snapshot>) {
        *self.snapshot.borrow_mut() = snapshot;
    }

    /// Whether a configuration change is among the cached entries in (after, upto].
    pub(super) fn changes_conf_within(&self, after: u64, upto: u64) -> bool {
        let skipped = (after + 1).saturating_sub(self.first_cached()) as usize;
        let mut entries = self.entries.iter().skip(skipped).take_while(|entry| entry.index <= upto);
        entries.any(|entry| entry.get_entry_type() != EntryType::EntryNormal)
    }

    /// Where the log begins.
    pub fn start(&self) -> LogStart {
        self.start
    }

    /// Bytes cached.
    pub fn cached_bytes(&self) -> usize {
        self.cached_bytes
    }
}

/// The index up to which the log can go once the state is durable at `durable_index`: `keep_entries` stay for followers that are a
/// little behind, unless those are too many bytes (all up to `bulky_index` go), and what a snapshot offered at `offered_index` builds on
/// stays in any case. Never beyond `durable_index` (rule 11).
pub fn compaction_point(durable_index: u64, keep_entries: u64, bulky_index: u64, offered_index: Option<u64>) -> u64 {
    if mutant!(CompactTooFar) {
        return durable_index + 2;
    }
    let wanted = durable_index.saturating_sub(keep_entries).max(bulky_index);
    wanted.min(offered_index.unwrap_or(u64::MAX)).min(durable_index)
}

fn weight(entry: &Entry) -> usize {
    entry.data.len() + entry.context.len() + 64
}

impl Storage for LogCache {
    fn initial_state(&self) -> Result<RaftState> {
        Ok(self.initial.clone())
    }

    fn entries(&self, low: u64, high: u64, max_size: impl Into<Option<u64>>, context: GetEntriesContext) -> Result<Vec<Entry>> {
        let max_bytes = max_size.into().unwrap_or(u64::MAX);
        if low <= self.start.index {
            return Err(Error::Store(StorageError::Compacted));
        }
        assert!(
            high <= self.last() + 1,
            "entries {low}..{high} asked for, the last one is {}",
            self.last()
        );
        if low >= self.first_cached() {
            let from = (low - self.first_cached()) as usize;
            let upto = (high - self.first_cached()) as usize;
            return Ok(limit(self.entries.range(from..upto).cloned(), max_bytes));
        }
        if let Some(entries) = self.fetched.borrow_mut().remove(&low) {
            return Ok(limit(entries.into_iter().take_while(|entry| entry.index < high), max_bytes));
        }
        if !context.can_async() {
            return Err(Error::Store(StorageError::Unavailable));
        }
        self.fetch_wishes.borrow_mut().push(FetchWish {
            low,
            high,
            max_bytes,
            context,
        });
        Err(Error::Store(StorageError::LogTemporarilyUnavailable))
    }

    fn term(&self, index: u64) -> Result<u64> {
        if index < self.start.index {
            return Err(Error::Store(StorageError::Compacted));
        }
        if index > self.last() {
            return Err(Error::Store(StorageError::Unavailable));
        }
        let run = self.term_runs.partition_point(|&(first, _)| first <= index);
        Ok(self.term_runs[run - 1].1)
    }

    fn first_index(&self) -> Result<u64> {
        Ok(self.start.index + 1)
    }

    fn last_index(&self) -> Result<u64> {
        Ok(self.last())
    }

    fn snapshot(&self, request_index: u64, to: u64) -> Result<Snapshot> {
        // Raft on the other side throws a snapshot away whose configuration does not have it, without a word: one that was made
        // before the receiver was added is of no use to it.
        let suits = |snapshot: &Snapshot| {
            let metadata = snapshot.get_metadata();
            let conf = metadata.get_conf_state();
            let mut members = conf
                .voters
                .iter()
                .chain(&conf.learners)
                .chain(&conf.voters_outgoing)
                .chain(&conf.learners_next);
            metadata.index >= request_index.max(self.start.index) && members.any(|&member| member == to || mutant!(OldOffer))
        };
        match self.snapshot.borrow().as_ref() {
            Some(snapshot) if suits(snapshot) => Ok(snapshot.clone()),
            _ => {
                self.snapshot_wanted.set(true);
                Err(Error::Store(StorageError::SnapshotTemporarilyUnavailable))
            }
        }
    }
}

fn limit(entries: impl Iterator<Item = Entry>, max_bytes: u64) -> Vec<Entry> {
    let mut size = 0u64;
    let mut taken = Vec::new();
    for entry in entries {
        size = size.saturating_add(u64::from(entry.compute_size()));
        if !taken.is_empty() && size > max_bytes {
            break;
        }
        taken.push(entry);
    }
    taken
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(index: u64, term: u64) -> Entry {
        Entry {
            index,
            term,
            ..Default::default()
        }
    }

    fn log() -> LogCache {
        let tail = (6..=10).map(|index| entry(index, 2 + index / 8)).collect();
        LogCache::new(
            HardState::default(),
            ConfState::default(),
            LogStart { index: 3, term: 1 },
            vec![(4, 1), (5, 2)],
            tail,
        )
    }

    #[test]
    fn terms_of_uncached_entries_are_known() {
        let log = log();
        let terms: Vec<u64> = (3..=10).map(|index| log.term(index).unwrap()).collect();
        assert_eq!(terms, [1, 1, 2, 2, 2, 3, 3, 3]);
        assert_eq!(log.term(2), Err(Error::Store(StorageError::Compacted)));
        assert_eq!(log.term(11), Err(Error::Store(StorageError::Unavailable)));
    }

    #[test]
    fn terms_are_right_when_the_tail_spans_several() {
        let tail = [(6, 2), (7, 2), (8, 3), (9, 3), (10, 5)].map(|(index, term)| entry(index, term));
        let runs = vec![(4, 1), (5, 2), (8, 3), (10, 5)];
        let start = LogStart { index: 3, term: 1 };
        let mut log = LogCache::new(HardState::default(), ConfState::default(), start, runs, tail.to_vec());
        let terms = |log: &LogCache| (3..=log.last()).map(|index| log.term(index).unwrap()).collect::<Vec<u64>>();
        assert_eq!(terms(&log), [1, 1, 2, 2, 2, 3, 3, 5]);
        log.append(&[entry(9, 6)]);
        assert_eq!(terms(&log), [1, 1, 2, 2, 2, 3, 6]);
    }

    #[test]
    fn appending_replaces_the_suffix_with_its_terms() {
        let mut log = log();
        log.append(&[entry(7, 5)]);
        assert_eq!(log.last_index().unwrap(), 7);
        assert_eq!(log.term(6).unwrap(), 2);
        assert_eq!(log.term(7).unwrap(), 5);
    }

    #[test]
    fn what_left_the_cache_is_wished_for_and_served_once() {
        let mut log = log();
        let wanted = log.entries(4, 6, None, GetEntriesContext::empty(true));
        assert_eq!(wanted, Err(Error::Store(StorageError::LogTemporarilyUnavailable)));
        let wish = log.take_fetch_wishes().remove(0);
        assert_eq!((wish.low, wish.high), (4, 6));
        log.fetched(vec![entry(4, 1), entry(5, 2)]);
        assert_eq!(log.entries(4, 6, None, GetEntriesContext::empty(true)).unwrap().len(), 2);
        assert!(log.entries(4, 6, None, GetEntriesContext::empty(true)).is_err());
    }

    #[test]
    fn compaction_keeps_the_term_before_the_first_entry() {
        let mut log = log();
        log.compact(LogStart { index: 8, term: 3 });
        assert_eq!(log.first_index().unwrap(), 9);
        assert_eq!(log.term(8).unwrap(), 3);
        assert_eq!(log.term(9).unwrap(), 3);
        assert_eq!(
            log.entries(8, 9, None, GetEntriesContext::empty(true)),
            Err(Error::Store(StorageError::Compacted))
        );
    }

    #[test]
    fn a_snapshot_from_before_a_member_was_added_is_not_for_it() {
        let mut log = log();
        let mut snapshot = Snapshot::default();
        snapshot.mut_metadata().index = 9;
        snapshot.mut_metadata().mut_conf_state().set_voters(vec![1, 2]);
        log.offer_snapshot(Some(snapshot));
        assert!(log.snapshot(0, 2).is_ok());
        assert!(!log.take_snapshot_wish());
        assert_eq!(log.snapshot(0, 3), Err(Error::Store(StorageError::SnapshotTemporarilyUnavailable)));
        assert!(log.take_snapshot_wish());
        assert_eq!(log.snapshot(10, 2), Err(Error::Store(StorageError::SnapshotTemporarilyUnavailable)));
    }

    #[test]
    fn rule_11_nothing_is_cut_beyond_what_is_durable() {
        assert_eq!(compaction_point(100, 30, 0, None), 70);
        assert_eq!(compaction_point(100, 30, 90, None), 90, "fewer are kept where they are large");
        assert_eq!(compaction_point(100, 30, 90, Some(60)), 60, "a snapshot under way builds on them");
        assert_eq!(compaction_point(100, 0, 0, Some(250)), 100);
        assert_eq!(compaction_point(100, 0, 120, None), 100);
        assert_eq!(compaction_point(10, 30, 0, None), 0);
    }

    #[test]
    fn only_settled_entries_are_trimmed() {
        let mut log = log();
        log.trim(7, 0);
        assert_eq!(log.first_cached(), 8);
        assert_eq!(log.entries(8, 11, None, GetEntriesContext::empty(false)).unwrap().len(), 3);
    }
}
