//! The apply thread: committed entries into the state machine, results to those who wait, and nothing else writes there.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use raft::eraftpb::{Entry, EntryType};
use tokio::sync::oneshot;

use super::event::{Event, Fatal};
use crate::node::{Applied, ApplyTimes, Shared};
use crate::state::outcome::Outcome;
use crate::state::{ConfDecision, ProposalId, SnapshotView, State, StateError};
use crate::wal::LogStart;
use crate::{snapshot, snapshot_files};

/// Records that one step of garbage collection looks at: at most, and at least.
const GARBAGE_STEP: usize = 512;
const MIN_GARBAGE_STEP: usize = 16;
/// About what a step takes: commands that come meanwhile wait for its end. How much is done in it differs from engine to engine.
const GARBAGE_TURN: Duration = Duration::from_millis(1);
/// Entries beyond this many bytes are written to the store apart: bounds a batch, and with it what a thread may be at for long.
const MAX_RUN_BYTES: usize = 4 << 20;

/// Work for the apply thread, done in order.
pub enum ApplyJob {
    /// Committed entries, and when they were handed over.
    Entries(Vec<Entry>, Instant),
    /// Give a view of the state: for a chore (`true`) or for followers (`false`).
    View(bool),
    /// Give a view of the state to whoever asked for a backup.
    Backup(oneshot::Sender<SnapshotView>),
    /// Replace the state by a received snapshot.
    Install {
        /// Verified file.
        file: PathBuf,
        /// Where it stands.
        start: LogStart,
    },
    /// End: close the store.
    Close,
}

/// Why the apply thread gave up.
#[derive(Debug, thiserror::Error)]
enum ApplyError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Store(#[from] crate::store::StoreError),
    #[error(transparent)]
    Snapshot(#[from] snapshot::SnapshotError),
    #[error("snapshot: {0}")]
    Io(#[from] std::io::Error),
    #[error("raft refused a committed configuration change: {0}")]
    Raft(#[from] raft::Error),
    #[error("the driver has ended")]
    Stopped,
}

pub(super) fn spawn(state: State, jobs: Receiver<ApplyJob>, shared: Arc<Shared>, snapshot_dir: PathBuf) -> std::io::Result<JoinHandle<()>> {
    let thread = ApplyThread {
        state,
        shared,
        snapshot_dir,
        settled: Vec::new(),
        garbage: true,
        garbage_step: MIN_GARBAGE_STEP,
    };
    std::thread::Builder::new().name("apply".into()).spawn(move || thread.run(&jobs))
}

struct ApplyThread {
    state: State,
    shared: Arc<Shared>,
    snapshot_dir: PathBuf,
    settled: Vec<u64>,
    /// There may be garbage to collect when nothing else is to do.
    garbage: bool,
    /// Records that the next step of that looks at.
    garbage_step: usize,
}

/// How many records the next step looks at, after one of `step` records took so long.
fn next_garbage_step(step: usize, took: Duration) -> usize {
    if took > 2 * GARBAGE_TURN {
        (step / 2).max(MIN_GARBAGE_STEP)
    } else if took < GARBAGE_TURN {
        (step * 2).min(GARBAGE_STEP)
    } else {
        step
    }
}

impl ApplyThread {
    /// A local failure ends the process (house rule: two kinds of failure).
    fn run(mut self, jobs: &Receiver<ApplyJob>) {
        match self.work(jobs) {
            Ok(()) => {}
            // The process is ending: what is left is applied at the next start, to a store that was closed.
            Err(ApplyError::Stopped) => {
                if let Err(error) = self.shared.store.close() {
                    self.shared.fail(Fatal::new(error));
                }
            }
            Err(error) => self.shared.fail(Fatal::new(error)),
        }
    }

    fn work(&mut self, jobs: &Receiver<ApplyJob>) -> Result<(), ApplyError> {
        let mut queue = VecDeque::new();
        while self.next_jobs(jobs, &mut queue)? {
            let mut entries = Vec::new();
            let mut committed = None;
            while let Some(job) = queue.pop_front() {
                match job {
                    ApplyJob::Entries(more, at) => {
                        // What is taken together has waited together: since the first of it came.
                        committed.get_or_insert(at);
                        entries.extend(more);
                    }
                    other @ (ApplyJob::View(_) | ApplyJob::Backup(_) | ApplyJob::Install { .. } | ApplyJob::Close) => {
                        self.apply(std::mem::take(&mut entries), committed.take())?;
                        if self.special(other)? {
                            return Ok(());
                        }
                    }
                }
            }
            self.apply(entries, committed)?;
        }
        Ok(())
    }

    /// Waits for work, collecting garbage meanwhile; takes everything that is queued. `false`: the driver is gone.
    fn next_jobs(&mut self, jobs: &Receiver<ApplyJob>, queue: &mut VecDeque<ApplyJob>) -> Result<bool, ApplyError> {
        while self.garbage {
            match jobs.try_recv() {
                Ok(job) => {
                    queue.push_back(job);
                    break;
                }
                Err(TryRecvError::Empty) => {
                    self.shared.apply_turns.begin();
                    let begun = Instant::now();
                    self.garbage = self.state.collect_garbage(self.garbage_step)?;
                    self.garbage_step = next_garbage_step(self.garbage_step, begun.elapsed());
                }
                Err(TryRecvError::Disconnected) => return Ok(false),
            }
        }
        if queue.is_empty() {
            self.shared.apply_turns.end();
            match jobs.recv() {
                Ok(job) => queue.push_back(job),
                Err(_) => return Ok(false),
            }
        }
        queue.extend(jobs.try_iter());
        Ok(true)
    }

    /// `true`: end.
    fn special(&mut self, job: ApplyJob) -> Result<bool, ApplyError> {
        match job {
            ApplyJob::Entries(entries, committed) => self.apply(entries, Some(committed))?,
            ApplyJob::View(for_chore) => {
                let view = self.state.snapshot_view();
                self.shared.send(Event::View {
                    view: Box::new(view),
                    for_chore,
                });
            }
            ApplyJob::Backup(reply) => {
                // Whoever asked may have given up.
                let _ = reply.send(self.state.snapshot_view());
            }
            ApplyJob::Install { file, start } => {
                let begun = Instant::now();
                self.shared.apply_turns.end();
                self.shared.set_installing(true);
                let file = snapshot_files::adopt(&file, &self.snapshot_dir, start.index)?;
                self.state.begin_replacement();
                snapshot::install(&file, self.shared.store.as_ref())?;
                self.state.reload()?;
                self.shared.set_installing(false);
                self.shared.metrics.snapshots_installed.observe(begun.elapsed());
                self.report_applied();
                self.shared.send(Event::Installed(start));
            }
            ApplyJob::Close => {
                self.shared.store.close()?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn apply(&mut self, entries: Vec<Entry>, committed: Option<Instant>) -> Result<(), ApplyError> {
        if entries.is_empty() {
            return Ok(());
        }
        let begun = Instant::now();
        let committed = committed.unwrap_or(begun);
        let mut rest = &entries[..];
        while let Some(first) = rest.first() {
            self.shared.apply_turns.begin();
            let run = run_length(rest);
            if run == 0 {
                self.apply_conf(first)?;
                rest = &rest[1..];
                continue;
            }
            // A turn for each command: one may read a million keys, and an entry holds many.
            let results = self.state.apply_watched(&rest[..run], &|| self.shared.apply_turns.begin())?;
            self.follow_leases();
            let applied = Instant::now();
            let times = ApplyTimes { committed, begun, applied };
            self.answer(results, times);
            rest = &rest[run..];
        }
        self.shared.metrics.applies.observe(begun.elapsed());
        self.garbage = true;
        self.report_applied();
        Ok(())
    }

    /// Before anybody hears of a grant, the leader's clock knows it.
    fn follow_leases(&mut self) {
        let changes = self.state.take_lease_changes();
        if changes.is_empty() {
            return;
        }
        let now_ms = self.shared.now_ms();
        let mut clock = self.shared.lease_clock.lock();
        for change in changes {
            clock.handle(change, now_ms);
        }
    }

    fn report_applied(&mut self) {
        let settled = std::mem::take(&mut self.settled);
        if let Some(report) = self.state.take_hash_report(self.shared.id) {
            self.shared.set_hash_report(report);
        }
        let cluster_time_ms = self.shared.reader.cluster_time_ms();
        self.shared.send(Event::Applied {
            index: self.state.applied().index,
            cluster_time_ms,
            settled,
        });
    }

    /// Rule 1: the only place from which a write is answered.
    fn answer(&mut self, results: Vec<(ProposalId, Outcome)>, times: ApplyTimes) {
        let own = results
            .into_iter()
            .filter(|(id, _)| id.member == self.shared.id && id.boot == self.shared.boot);
        let mut replies = self.shared.replies.lock();
        for (id, outcome) in own {
            self.settled.push(id.seq);
            if let Some(reply) = replies.remove(&id.seq) {
                // Nobody waits any more: the request's deadline has passed.
                let _ = reply.send(Applied { outcome, times });
            }
        }
    }

    /// Rule 22: raft hears of a configuration change exactly when it is applied, and the state notes raft's answer with the same index.
    fn apply_conf(&mut self, entry: &Entry) -> Result<(), ApplyError> {
        let conf_state = match self.state.begin_conf(entry)? {
            ConfDecision::Refuse => self.state.applied().conf_state,
            ConfDecision::Apply(change) => {
                let (reply, answer) = sync_channel(1);
                self.shared.send(Event::ConfChange { change, reply });
                answer.recv().map_err(|_| ApplyError::Stopped)??
            }
        };
        self.state.finish_conf(entry, conf_state)?;
        Ok(())
    }
}

/// How many entries go into the store's next batch; none before a configuration change, which goes alone.
fn run_length(entries: &[Entry]) -> usize {
    let mut bytes = 0;
    let fits = |entry: &&Entry| {
        let fits = bytes < MAX_RUN_BYTES;
        bytes += entry.data.len();
        fits && entry.get_entry_type() == EntryType::EntryNormal
    };
    entries.iter().take_while(fits).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_of_garbage_collection_is_as_large_as_the_engine_is_fast() {
        let (fast, slow) = (Duration::from_micros(100), Duration::from_millis(20));
        let after = |step, times, took| (0..times).fold(step, |step, _| next_garbage_step(step, took));
        assert_eq!(after(MIN_GARBAGE_STEP, 2, fast), 4 * MIN_GARBAGE_STEP);
        assert_eq!(after(MIN_GARBAGE_STEP, 100, fast), GARBAGE_STEP);
        assert_eq!(after(GARBAGE_STEP, 1, slow), GARBAGE_STEP / 2);
        assert_eq!(after(GARBAGE_STEP, 100, slow), MIN_GARBAGE_STEP);
        assert_eq!(after(100, 100, GARBAGE_TURN), 100);
    }

    #[test]
    fn a_batch_is_bounded_and_ends_before_a_configuration_change() {
        let entry = |bytes: usize| Entry {
            data: vec![0; bytes].into(),
            ..Entry::default()
        };
        let mut change = entry(1);
        change.set_entry_type(EntryType::EntryConfChangeV2);
        assert_eq!(
            run_length(&[entry(1), entry(MAX_RUN_BYTES), entry(1)]),
            2,
            "the last one is past the limit"
        );
        assert_eq!(
            run_length(&[entry(9 * MAX_RUN_BYTES), entry(1)]),
            1,
            "a large one goes alone, and goes"
        );
        assert_eq!(run_length(&[entry(1), entry(1), change.clone(), entry(1)]), 2);
        assert_eq!(run_length(&[change, entry(1)]), 0);
    }
}
