//! The WAL thread: whatever is queued goes into one sync (group commit).

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use raft::eraftpb::Entry;

use super::event::{Event, Fatal};
use crate::consensus::Persist;
use crate::consensus::log::FetchWish;
use crate::node::Shared;
use crate::wal::{LogStart, Wal, WalBatch, WalError};

/// Bytes of entries that go into one sync at most; more waits for the next.
const MAX_BATCH_BYTES: usize = 8 << 20;

/// The log is asked so often whether what it writes behind its appends failed.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Work for the WAL thread, done in order.
pub enum WalJob {
    /// Make durable. With a snapshot, the log begins anew after it.
    Persist(Persist),
    /// Remove old entries.
    Compact(LogStart),
    /// Read entries back.
    Fetch(FetchWish),
    /// End.
    Close,
}

pub(super) fn spawn(wal: Box<dyn Wal>, jobs: Receiver<WalJob>, shared: Arc<Shared>) -> std::io::Result<JoinHandle<()>> {
    shared.wal_metrics.set_stats(wal.stats());
    let thread = WalThread {
        wal,
        shared,
        batch: WalBatch::default(),
        bytes: 0,
        number: None,
    };
    std::thread::Builder::new().name("wal".into()).spawn(move || thread.run(&jobs))
}

struct WalThread {
    wal: Box<dyn Wal>,
    shared: Arc<Shared>,
    batch: WalBatch,
    bytes: usize,
    number: Option<u64>,
}

impl WalThread {
    /// A failed write or sync ends the process: after a failed fsync nobody knows what is on the disk (rule 5).
    fn run(mut self, jobs: &Receiver<WalJob>) {
        if let Err(error) = self.work(jobs) {
            self.shared.fail(Fatal::new(error));
        }
    }

    fn work(&mut self, jobs: &Receiver<WalJob>) -> Result<(), WalError> {
        let mut checked = Instant::now();
        loop {
            if checked.elapsed() >= CHECK_INTERVAL {
                checked = Instant::now();
                self.wal.check_background()?;
            }
            let mut next = match jobs.recv_timeout(CHECK_INTERVAL) {
                Ok(job) => Some(job),
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            };
            while let Some(job) = next.take() {
                self.shared.wal_metrics.turns.begin();
                match job {
                    WalJob::Persist(unit) if unit.snapshot.is_none() => self.gather(unit),
                    WalJob::Persist(unit) => {
                        self.flush()?;
                        self.reset(unit)?;
                    }
                    WalJob::Compact(to) => {
                        self.flush()?;
                        self.wal.compact(to)?;
                        self.shared.wal_metrics.set_stats(self.wal.stats());
                    }
                    WalJob::Fetch(wish) => {
                        self.flush()?;
                        self.fetch(wish)?;
                    }
                    WalJob::Close => {
                        self.flush()?;
                        return self.wal.close();
                    }
                }
                if self.bytes < MAX_BATCH_BYTES {
                    next = jobs.try_recv().ok();
                }
            }
            self.flush()?;
            self.shared.wal_metrics.turns.end();
        }
    }

    fn gather(&mut self, unit: Persist) {
        merge(&mut self.batch.entries, unit.entries, &mut self.bytes);
        if unit.hard_state.is_some() {
            self.batch.hard_state = unit.hard_state;
        }
        self.number = Some(unit.number);
    }

    fn flush(&mut self) -> Result<(), WalError> {
        let Some(number) = self.number.take() else { return Ok(()) };
        let batch = std::mem::take(&mut self.batch);
        let bytes = std::mem::take(&mut self.bytes);
        if !batch.entries.is_empty() || batch.hard_state.is_some() {
            let begun = Instant::now();
            self.wal.append(&batch)?;
            self.shared
                .wal_metrics
                .record(begun.elapsed(), batch.entries.len(), bytes, self.wal.stats());
        }
        self.shared.send(Event::Persisted(number));
        Ok(())
    }

    fn reset(&mut self, unit: Persist) -> Result<(), WalError> {
        if let (Some(start), Some(hard_state)) = (unit.snapshot, &unit.hard_state) {
            self.wal.reset(start, hard_state)?;
        }
        if !unit.entries.is_empty() {
            self.wal.append(&WalBatch {
                entries: unit.entries,
                hard_state: None,
            })?;
        }
        self.shared.send(Event::Persisted(unit.number));
        Ok(())
    }

    fn fetch(&self, wish: FetchWish) -> Result<(), WalError> {
        let entries = match self.wal.entries(wish.low, wish.high, wish.max_bytes) {
            Ok(entries) => entries,
            // Compacted meanwhile: raft asks again and then falls back to a snapshot.
            Err(WalError::Compacted { .. }) => Vec::new(),
            Err(error) => return Err(error),
        };
        self.shared.send(Event::Fetched(wish, entries));
        Ok(())
    }
}

/// Appends `newer` to `entries`; a suffix that it overwrites goes first.
fn merge(entries: &mut Vec<Entry>, newer: Vec<Entry>, bytes: &mut usize) {
    let Some(first) = newer.first() else { return };
    while entries.last().is_some_and(|entry| entry.index >= first.index) {
        *bytes -= entries.pop().map_or(0, |entry| entry.data.len());
    }
    *bytes += newer.iter().map(|entry| entry.data.len()).sum::<usize>();
    entries.extend(newer);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_batch_overwrites_the_suffix_of_an_earlier_one() {
        let entry = |index, term| Entry {
            index,
            term,
            ..Default::default()
        };
        let mut merged = vec![entry(1, 1), entry(2, 1), entry(3, 1)];
        let mut bytes = 0;
        merge(&mut merged, vec![entry(2, 2)], &mut bytes);
        assert_eq!(
            merged.iter().map(|entry| (entry.index, entry.term)).collect::<Vec<_>>(),
            [(1, 1), (2, 2)]
        );
    }
}
