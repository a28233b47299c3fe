//! The WAL, apply and chore threads, played by events: each takes time, and a crash may come at any point in between.

use std::sync::Arc;

use metcd::consensus::Persist;
use metcd::snapshot::SnapshotError;
use metcd::state::outcome::Outcome;
use metcd::state::{ConfDecision, ProposalId, SnapshotView, StateError};
use metcd::wal::{LogStart, Wal, WalBatch, WalError};
use raft::eraftpb::{ConfChangeV2, ConfState, Entry, EntryType};

use super::start::{install, write_snapshot};
use super::{ApplyJob, Applying, Chore, Failure, Input, Process, WalJob};
use crate::oracle::raft::Written;
use crate::plan::MS;
use crate::world::{Event, World};

/// Records that one step of garbage collection looks at.
const GARBAGE_STEP: usize = 64;

// ---- the WAL thread

impl Process {
    pub(super) fn to_wal(&mut self, world: &mut World, job: WalJob) {
        self.wal_jobs.push_back(job);
        if self.syncing.is_none() {
            self.run_wal(world);
        }
    }

    /// Writes what is queued, as one group, and begins its sync.
    fn run_wal(&mut self, world: &mut World) {
        if let Err(error) = self.write_group(world) {
            self.fail_disk(error);
        }
    }

    pub(super) fn fail_disk(&mut self, error: WalError) {
        let failure = match error {
            WalError::Io { .. } => Failure::Disk(error.to_string()),
            other => Failure::Bug(other.to_string()),
        };
        // After the first failure the log takes nothing more, and says so.
        self.failed.get_or_insert(failure);
    }

    fn write_group(&mut self, world: &mut World) -> Result<(), WalError> {
        let mut number = None;
        while let Some(job) = self.wal_jobs.pop_front() {
            match job {
                WalJob::Persist(unit) if unit.snapshot.is_none() => {
                    number = Some(unit.number);
                    self.unsynced.extend(unit.entries.iter().map(Written::from));
                    world.enter_trap(self.slot, &unit.entries);
                    self.wal.append_unsynced(&WalBatch {
                        entries: unit.entries,
                        hard_state: unit.hard_state,
                    })?;
                }
                other if number.is_some() => {
                    // Whatever is not an append waits for the sync before it.
                    self.wal_jobs.push_front(other);
                    break;
                }
                WalJob::Persist(unit) => number = Some(self.begin_anew(world, unit)?),
                WalJob::Compact(to) => {
                    self.wal.compact(to)?;
                    world.pass_crash_point(self.slot);
                }
                WalJob::Fetch(wish) => {
                    let entries = match self.wal.entries(wish.low, wish.high, wish.max_bytes) {
                        Ok(entries) => entries,
                        Err(WalError::Compacted { .. }) => Vec::new(),
                        Err(error) => return Err(error),
                    };
                    world.stats.fetches += 1;
                    self.enqueue_later(world, Input::Fetched(wish, entries));
                }
            }
        }
        if let Some(number) = number {
            self.syncing = Some(number);
            world.pass_crash_point(self.slot);
            let at = world.now + world.sync_duration(self.slot);
            world.schedule(at, self.event(|slot, boot| Event::Synced { slot, boot }));
        }
        Ok(())
    }

    /// The log begins anew after an installed snapshot.
    fn begin_anew(&mut self, world: &mut World, unit: Persist) -> Result<u64, WalError> {
        if let (Some(start), Some(hard_state)) = (unit.snapshot, &unit.hard_state) {
            self.wal.reset(start, hard_state)?;
            world.oracle.raft.note_begin(self.id, start);
            world.pass_crash_point(self.slot);
        }
        self.unsynced.extend(unit.entries.iter().map(Written::from));
        if !unit.entries.is_empty() {
            self.wal.append(&WalBatch {
                entries: unit.entries,
                hard_state: None,
            })?;
        }
        Ok(unit.number)
    }

    /// The sync is over.
    pub fn synced(&mut self, world: &mut World) {
        let Some(number) = self.syncing.take() else { return };
        if let Err(error) = self.wal.sync() {
            return self.fail_disk(error);
        }
        world.oracle.raft.note_synced(self.id, &self.unsynced);
        self.unsynced.clear();
        world.pass_crash_point(self.slot);
        world.spring_trap(self.slot);
        self.run_wal(world);
        if self.failed.is_none() {
            self.enqueue(world, Input::Persisted(number));
        }
    }

    fn event(&self, make: impl FnOnce(usize, u64) -> Event) -> Event {
        make(self.slot, self.boot)
    }

    /// An input that comes from within the driver's own call: it is taken a moment later.
    fn enqueue_later(&mut self, world: &mut World, input: Input) {
        self.inbox.push_back(input);
        if !self.is_wake_due {
            self.is_wake_due = true;
            let at = world.now + world.rng.skewed(1, MS);
            world.schedule(at, self.event(|slot, boot| Event::Wake { slot, boot }));
        }
    }
}

// ---- the apply thread

impl Process {
    pub(super) fn to_apply(&mut self, world: &mut World, job: ApplyJob) {
        self.apply_jobs.push_back(job);
        self.schedule_apply(world);
    }

    fn schedule_apply(&mut self, world: &mut World) {
        if !self.is_apply_due {
            self.is_apply_due = true;
            let longest = match self.applying {
                // A snapshot is written and synced first.
                Some(Applying::Adopting(..)) => 400 * MS,
                _ if world.machines[self.slot].is_slow => 200 * MS,
                _ => 4 * MS,
            };
            let at = world.now + world.rng.skewed(10, longest);
            world.schedule(at, self.event(|slot, boot| Event::Apply { slot, boot }));
        }
    }

    /// One step of the apply thread.
    pub fn apply_step(&mut self, world: &mut World) {
        self.is_apply_due = false;
        if let Err(error) = self.apply_some(world) {
            self.failed = Some(Failure::Bug(format!("apply: {error}")));
            return;
        }
        if matches!(self.applying, Some(Applying::Conf(..))) {
            return;
        }
        if !self.apply_jobs.is_empty() || self.applying.is_some() {
            self.schedule_apply(world);
        } else if world.rng.chance(100) {
            match self.state.collect_garbage(GARBAGE_STEP) {
                Ok(_) => {}
                Err(error) => self.failed = Some(Failure::Bug(format!("garbage: {error}"))),
            }
        }
    }

    fn apply_some(&mut self, world: &mut World) -> Result<(), StateError> {
        match self.applying.take() {
            Some(Applying::Adopting(file, start)) => {
                world.machines[self.slot].snapshots.insert(start.index, file.clone());
                self.applying = Some(Applying::Adopted(file, start));
                world.pass_crash_point(self.slot);
                return Ok(());
            }
            Some(Applying::Adopted(file, start)) => return self.complete_install(world, &file, start),
            Some(Applying::Conf(entry)) => {
                self.applying = Some(Applying::Conf(entry));
                return Ok(());
            }
            None => {}
        }
        let mut run: Vec<Entry> = Vec::new();
        while let Some(job) = self.apply_jobs.pop_front() {
            match job {
                ApplyJob::Entries(mut entries) => {
                    if let Some(at) = entries.iter().position(|entry| entry.get_entry_type() != EntryType::EntryNormal) {
                        let mut rest = entries.split_off(at);
                        run.extend(entries);
                        self.apply_run(world, &run)?;
                        let conf = rest.remove(0);
                        if !rest.is_empty() {
                            self.apply_jobs.push_front(ApplyJob::Entries(rest));
                        }
                        return self.begin_conf(world, conf);
                    }
                    run.extend(entries);
                }
                special => {
                    self.apply_run(world, &run)?;
                    self.special(world, special);
                    return Ok(());
                }
            }
        }
        self.apply_run(world, &run)
    }

    fn special(&mut self, world: &mut World, job: ApplyJob) {
        match job {
            ApplyJob::Entries(_) => {}
            ApplyJob::View(for_chore) => {
                let view = Box::new(self.state.snapshot_view());
                self.enqueue(world, Input::View { view, for_chore });
            }
            ApplyJob::Install { file, start } => {
                self.is_installing = true;
                self.applying = Some(Applying::Adopting(file, start));
                world.pass_crash_point(self.slot);
            }
        }
    }

    fn complete_install(&mut self, world: &mut World, file: &Arc<[u8]>, start: LogStart) -> Result<(), StateError> {
        if let Err(error) = install(file, self.store.as_ref()) {
            self.failed = Some(Failure::Bug(format!("a verified snapshot does not install: {error}")));
            return Ok(());
        }
        self.state.reload()?;
        self.is_installing = false;
        world.stats.installs += 1;
        world.oracle.raft.note_conf(start.index, &self.state.applied().conf_state);
        world.pass_crash_point(self.slot);
        world.trace(|| format!("n{} installed snapshot {start:?}", self.id));
        self.audit(world);
        self.report_applied(world);
        self.enqueue(world, Input::Installed(start));
        Ok(())
    }

    fn apply_run(&mut self, world: &mut World, entries: &[Entry]) -> Result<(), StateError> {
        if entries.is_empty() {
            return Ok(());
        }
        let results = self.state.apply(entries)?;
        world.pass_crash_point(self.slot);
        self.follow_leases(world);
        self.audit(world);
        self.answer(world, results);
        self.report_applied(world);
        Ok(())
    }

    /// Before anybody hears of a grant, the leader's clock knows it.
    fn follow_leases(&mut self, world: &mut World) {
        let now_ms = self.now_ms(world);
        for change in self.state.take_lease_changes() {
            self.lease_clock.handle(change, now_ms);
            world.oracle.lease.note_change(world.now, change);
        }
    }

    fn report_applied(&mut self, world: &mut World) {
        let settled = std::mem::take(&mut self.settled);
        let applied = self.state.applied();
        world.oracle.state.note(self.id, applied.index, &self.reader);
        self.enqueue(
            world,
            Input::Applied {
                index: applied.index,
                cluster_time_ms: self.reader.cluster_time_ms(),
                settled,
            },
        );
    }

    /// Rule 1: the only place from which a write is answered.
    fn answer(&mut self, world: &mut World, results: Vec<(ProposalId, Outcome)>) {
        for (id, outcome) in results {
            if id.member == self.id && id.boot == self.boot {
                self.settled.push(id.seq);
                if let Some(call) = self.replies.remove(&id.seq) {
                    world.answer_outcome(call, outcome);
                }
            }
        }
    }

    /// Rule 22: raft hears of a configuration change exactly when it is applied.
    fn begin_conf(&mut self, world: &mut World, entry: Entry) -> Result<(), StateError> {
        match self.state.begin_conf(&entry)? {
            ConfDecision::Refuse => {
                let unchanged = self.state.applied().conf_state;
                self.finish_conf(world, &entry, unchanged)
            }
            ConfDecision::Apply(change) => {
                self.applying = Some(Applying::Conf(entry));
                self.enqueue(world, Input::ConfChange(change));
                Ok(())
            }
        }
    }

    /// The driver's side of it.
    pub(super) fn take_conf(&mut self, world: &mut World, change: &ConfChangeV2) {
        match self.core.apply_conf_change(change) {
            Ok(conf_state) => {
                if let Some(Applying::Conf(entry)) = &self.applying {
                    // From now on raft counts by it.
                    world.oracle.raft.note_conf(entry.index, &conf_state);
                }
                // Before anybody is told that it is done: the next request judges by it.
                self.view = self.core.view();
                let at = world.now + world.rng.skewed(1, MS);
                world.schedule(at, self.event(|slot, boot| Event::ConfDone { slot, boot, conf_state }));
            }
            Err(error) => self.failed = Some(Failure::Bug(format!("raft refused a committed configuration change: {error}"))),
        }
    }

    /// The apply thread goes on.
    pub fn answer_conf(&mut self, world: &mut World, conf_state: ConfState) {
        let Some(Applying::Conf(entry)) = self.applying.take() else {
            return;
        };
        match self.finish_conf(world, &entry, conf_state) {
            Ok(()) => self.schedule_apply(world),
            Err(error) => self.failed = Some(Failure::Bug(error.to_string())),
        }
    }

    fn finish_conf(&mut self, world: &mut World, entry: &Entry, conf_state: ConfState) -> Result<(), StateError> {
        world.trace(|| format!("n{} conf at {}: {conf_state:?}", self.id, entry.index));
        self.state.finish_conf(entry, conf_state)?;
        world.stats.conf_changes += 1;
        world.pass_crash_point(self.slot);
        let settled = std::mem::take(&mut self.settled);
        let applied = self.state.applied();
        world.oracle.state.note(self.id, applied.index, &self.reader);
        self.enqueue_later(
            world,
            Input::Applied {
                index: applied.index,
                cluster_time_ms: self.reader.cluster_time_ms(),
                settled,
            },
        );
        Ok(())
    }

    /// Shows the oracles every change of keys.
    fn audit(&mut self, world: &mut World) {
        if let Err(fault) = world.oracle.history.follow(&mut self.auditor, &self.reader) {
            world.violation(format!("n{}: {fault}", self.id));
        }
    }
}

// ---- the chore thread

impl Process {
    pub(super) fn chore(&mut self, world: &mut World, chore: Chore) {
        self.chores.push_back(chore);
        if self.chores.len() == 1 {
            self.begin_chore(world);
        }
    }

    fn begin_chore(&mut self, world: &mut World) {
        let longest = match self.chores.front() {
            Some(Chore::Durable(_)) => 500 * MS,
            Some(Chore::RemoveOlder(_)) => 4 * MS,
            None => return,
        };
        let at = world.now + world.rng.skewed(MS, longest);
        world.schedule(at, self.event(|slot, boot| Event::Chore { slot, boot }));
    }

    /// The first chore is done.
    pub fn finish_chore(&mut self, world: &mut World) {
        match self.chores.pop_front() {
            Some(Chore::Durable(view)) => self.make_durable(world, view),
            Some(Chore::RemoveOlder(index)) => self.remove_older(world, index),
            None => {}
        }
        self.begin_chore(world);
    }

    /// As `snapshot_files::remove_older`.
    fn remove_older(&self, world: &mut World, index: u64) {
        let snapshots = &mut world.machines[self.slot].snapshots;
        *snapshots = snapshots.split_off(&index);
    }

    /// The snapshot is written, synced and has its name.
    fn make_durable(&mut self, world: &mut World, view: Box<SnapshotView>) {
        let index = view.applied.index;
        if world.machines[self.slot].is_full {
            // Tried again; until then the log keeps everything.
            return self.enqueue(world, Input::Durable { index: 0 });
        }
        match write_snapshot(*view) {
            Ok(file) => {
                world.machines[self.slot].snapshots.insert(index, file);
                world.pass_crash_point(self.slot);
                self.remove_older(world, index);
                world.stats.snapshots += 1;
                world.pass_crash_point(self.slot);
                self.enqueue(world, Input::Durable { index });
            }
            // A snapshot of the leader took the state's place meanwhile.
            Err(SnapshotError::State(StateError::Replaced)) => self.enqueue(world, Input::Durable { index: 0 }),
            Err(error) => self.failed = Some(Failure::Bug(format!("a snapshot cannot be written: {error}"))),
        }
    }
}
