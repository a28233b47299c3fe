//! Faults: one strikes now and then, and most are cured after a while.

use std::io;

use metcd::wal::memory::FaultAt;
use raft::eraftpb::{Entry, EntryType};

use crate::machine::{FASTEST_CLOCK, SLOWEST_CLOCK, Trap};
use crate::plan::{FaultKind, MS, Micros, SECOND};
use crate::world::{Event, World};

/// A shorter leap is nothing but a fast clock, and hidden in the time between two ticks: no process can see it.
const SHORTEST_LEAP: Micros = 1_001 * MS;
const LONGEST_LEAP: Micros = 300 * SECOND;

/// The end of a fault.
#[derive(Debug)]
pub enum Cure {
    Links,
    Link(usize, usize),
    Resume(usize),
    /// Together with its clock, which shows this; unless the process is not the one that was suspended.
    Wake {
        slot: usize,
        boot: u64,
        own_time: Micros,
    },
    Clock(usize),
    Disk(usize),
}

impl World {
    /// The next fault.
    pub fn strike(&mut self) {
        if !self.faults_are_on() {
            return;
        }
        let at = self.now + self.rng.range(100 * MS, self.plan.fault_pause);
        self.schedule(at, Event::Fault);
        let faults = self.plan.faults.clone();
        let Some(&kind) = self.rng.pick(&faults) else { return };
        let slot = match self.leader() {
            Some(leader) if self.rng.chance(self.plan.leader_per_mille) => leader,
            _ => self.rng.range(0, self.machines.len() as u64) as usize,
        };
        if self.strike_with(kind, slot) {
            self.trace(|| format!("FAULT {kind:?} n{}", slot + 1));
            *self.stats.faults.entry(kind).or_default() += 1;
        }
    }

    fn strike_with(&mut self, kind: FaultKind, slot: usize) -> bool {
        let until = self.now + self.rng.skewed(200 * MS, 12 * SECOND);
        let others: Vec<usize> = (0..self.machines.len()).filter(|&other| other != slot).collect();
        match kind {
            // In the plan from the beginning.
            FaultKind::Loss | FaultKind::Duplication | FaultKind::Delay => return true,
            FaultKind::Partition => {
                // Now and then it is one machine against all the others.
                let is_alone = self.rng.chance(400);
                let side: Vec<bool> = (0..self.machines.len())
                    .map(|other| if is_alone { other == slot } else { self.rng.chance(500) })
                    .collect();
                self.cut_where(|from, to| side[from] != side[to]);
                self.schedule(until, Event::Cure(Cure::Links));
            }
            FaultKind::Ring => {
                let count = self.machines.len();
                self.cut_where(|from, to| (from + 1) % count != to && (to + 1) % count != from);
                self.schedule(until, Event::Cure(Cure::Links));
            }
            FaultKind::OneWay => {
                let Some(&other) = self.rng.pick(&others) else { return false };
                self.network.cut(slot, other);
                self.schedule(until, Event::Cure(Cure::Link(slot, other)));
            }
            FaultKind::Swizzle => {
                for other in others {
                    for (from, to) in [(slot, other), (other, slot)] {
                        let end = self.now + self.rng.range(200 * MS, 12 * SECOND);
                        self.network.cut(from, to);
                        self.schedule(end, Event::Cure(Cure::Link(from, to)));
                    }
                }
            }
            FaultKind::Crash => return self.crash(slot),
            FaultKind::CrashPoint => {
                self.machines[slot].crash_points = self.rng.range(1, 20);
                return self.machines[slot].process.is_some();
            }
            FaultKind::Blackout => {
                for slot in 0..self.machines.len() {
                    self.crash(slot);
                }
            }
            FaultKind::Pause => {
                self.machines[slot].is_paused = self.machines[slot].process.is_some();
                self.schedule(until, Event::Cure(Cure::Resume(slot)));
            }
            FaultKind::Suspend => {
                let machine = &mut self.machines[slot];
                if machine.is_paused || machine.process.is_none() {
                    return false;
                }
                machine.is_paused = true;
                let (boot, own_time) = (machine.boot, machine.clock.at(self.now));
                self.schedule(until, Event::Cure(Cure::Wake { slot, boot, own_time }));
            }
            FaultKind::Clock => {
                let rate = self.rng.range(SLOWEST_CLOCK, FASTEST_CLOCK + 1);
                self.machines[slot].clock.set_rate(self.now, rate);
                self.schedule(until, Event::Cure(Cure::Clock(slot)));
            }
            FaultKind::ClockJump => self.leap(slot),
            FaultKind::SlowDisk => {
                self.machines[slot].is_slow = true;
                self.schedule(until, Event::Cure(Cure::Disk(slot)));
            }
            FaultKind::ChangeTrap => {
                self.machines[slot].trap = Trap::Set;
                return self.machines[slot].process.is_some();
            }
            FaultKind::FullSnapshotDisk => {
                self.machines[slot].is_full = true;
                self.schedule(until, Event::Cure(Cure::Disk(slot)));
            }
            FaultKind::FullDisk => return self.fail_disk(slot, FaultAt::Write, io::ErrorKind::StorageFull),
            FaultKind::FailedSync => return self.fail_disk(slot, FaultAt::Sync, io::ErrorKind::Other),
            FaultKind::BitFlip => return self.flip_bit(slot),
            FaultKind::Wipe => return self.wipe(slot),
        }
        true
    }

    /// The clock of a machine leaps forward; its driver makes up for a few ticks.
    fn leap(&mut self, slot: usize) {
        let by = self.rng.skewed(SHORTEST_LEAP, LONGEST_LEAP);
        let machine = &mut self.machines[slot];
        machine.clock.set(self.now, machine.clock.at(self.now) + by);
        if !machine.is_paused {
            self.with_process(slot, |process, world| process.tick(world, 3));
        }
    }

    fn cut_where(&mut self, is_cut: impl Fn(usize, usize) -> bool) {
        let count = self.machines.len();
        for (from, to) in (0..count).flat_map(|from| (0..count).map(move |to| (from, to))) {
            if from != to && is_cut(from, to) {
                self.network.cut(from, to);
            }
        }
    }

    fn crash(&mut self, slot: usize) -> bool {
        if self.machines[slot].process.is_none() {
            return false;
        }
        // A killed process leaves what it wrote; a power cut takes what was not synced, or leaves a part of it.
        let unsynced = self.machines[slot].disk.unsynced_bytes() as u64;
        let keep = match self.rng.range(0, 3) {
            0 => usize::MAX,
            1 => 0,
            _ => self.rng.range(0, unsynced + 1) as usize,
        };
        self.kill(slot, keep);
        let at = self.now + self.rng.skewed(50 * MS, 10 * SECOND);
        self.schedule(at, Event::Start { slot });
        true
    }

    /// A process passes a point between two steps that belong together: it may be the one at which it dies. The crash comes as an event
    /// of its own, before any other event of this process.
    pub fn pass_crash_point(&mut self, slot: usize) {
        let points = &mut self.machines[slot].crash_points;
        if *points == 0 {
            return;
        }
        *points -= 1;
        if *points == 0 && self.faults_are_on() {
            let boot = self.machines[slot].boot;
            self.schedule(self.now, Event::Crash { slot, boot });
        }
    }

    pub fn crash_at_point(&mut self, slot: usize, boot: u64) {
        if self.machines[slot].boot == boot && self.crash(slot) {
            self.trace(|| format!("FAULT CrashPoint n{} dies", slot + 1));
        }
    }

    /// A log writes this: the trap may be set for it.
    pub fn enter_trap(&mut self, slot: usize, entries: &[Entry]) {
        let trap = &mut self.machines[slot].trap;
        if *trap == Trap::Set && entries.iter().any(|entry| entry.get_entry_type() != EntryType::EntryNormal) {
            *trap = Trap::Entered;
        }
    }

    /// What a log wrote is durable.
    pub fn spring_trap(&mut self, slot: usize) {
        let machine = &mut self.machines[slot];
        if machine.trap == Trap::Entered && !self.is_healed {
            machine.trap = Trap::Sprung;
            let boot = machine.boot;
            let at = self.now + self.rng.range(200 * MS, 4 * SECOND);
            self.schedule(at, Event::PowerCut { slot, boot });
        }
    }

    pub fn cut_power(&mut self, slot: usize, boot: u64) {
        let machine = &mut self.machines[slot];
        machine.trap = Trap::None;
        if machine.boot == boot && machine.process.is_some() {
            self.trace(|| format!("FAULT ChangeTrap n{} dies", slot + 1));
            self.kill(slot, 0);
            let at = self.now + self.rng.range(50 * MS, 5 * SECOND);
            self.schedule(at, Event::Start { slot });
        }
    }

    fn fail_disk(&mut self, slot: usize, at: FaultAt, kind: io::ErrorKind) -> bool {
        if self.machines[slot].process.is_none() {
            return false;
        }
        let after = self.rng.range(0, 5);
        self.machines[slot].disk.fail(at, after, kind);
        true
    }

    /// Whether the cluster can do without this member's disk for ever. `false` while its membership is in motion.
    fn can_lose(&self, slot: usize) -> bool {
        let views = self.machines.iter().filter_map(|machine| machine.process.as_ref());
        let Some(newest) = views.max_by_key(|process| process.reader.applied_index()) else {
            return false;
        };
        let view = newest.core.view();
        let conf = newest.reader.applied().conf_state;
        if view.joint || view.conf_pending || !conf.voters_outgoing.is_empty() || self.oracle.raft.conf_in_flight() {
            return false;
        }
        // A replacement under way takes a voter away by itself, within moments and before anybody notices that this one is lost.
        if newest.reader.members().iter().any(|member| member.replaces != 0) {
            return false;
        }
        // By the newest configuration alone: a member with an older one may need more voters than that one counts.
        let has_conf = |id: &u64| {
            let process = self.machines[*id as usize - 1].process.as_ref();
            process.is_some_and(|process| process.reader.applied().conf_state == conf)
        };
        if !conf.voters.iter().all(|id| self.machines[*id as usize - 1].is_gone || has_conf(id)) {
            return false;
        }
        if !conf.voters.contains(&(slot as u64 + 1)) {
            // About to be promoted, perhaps.
            return false;
        }
        let is_lost = |id: &&u64| **id == slot as u64 + 1 || self.machines[**id as usize - 1].is_gone;
        let lost = conf.voters.iter().filter(is_lost).count();
        2 * lost < conf.voters.len()
    }

    fn flip_bit(&mut self, slot: usize) -> bool {
        let is_idle = self.machines[slot].is_gone || self.machines[slot].process.is_none();
        if is_idle || !self.can_lose(slot) {
            return false;
        }
        self.crash(slot);
        let machine = &mut self.machines[slot];
        machine.is_damaged = true;
        let bits = machine.disk.bytes() as u64 * 8;
        if bits > 0 {
            let bit = self.rng.range(0, bits);
            self.machines[slot].disk.flip_bit(bit as usize);
        }
        true
    }

    /// The disk is gone; the member's id is of no use any more. An administrator replaces it by another machine.
    fn wipe(&mut self, slot: usize) -> bool {
        if self.machines[slot].is_gone || self.machines[slot].process.is_none() || !self.can_lose(slot) {
            return false;
        }
        self.kill(slot, 0);
        self.machines[slot].is_gone = true;
        true
    }

    pub fn cure(&mut self, cure: Cure) {
        match cure {
            Cure::Links => self.network.join_all(),
            Cure::Link(from, to) => self.network.join(from, to),
            Cure::Resume(slot) => self.resume(slot),
            Cure::Wake { slot, boot, own_time } => {
                let machine = &mut self.machines[slot];
                if machine.is_paused && machine.boot == boot {
                    machine.clock.set(self.now, own_time);
                    self.resume(slot);
                }
            }
            Cure::Clock(slot) => self.machines[slot].clock.set_rate(self.now, 1000),
            Cure::Disk(slot) => {
                let machine = &mut self.machines[slot];
                (machine.is_slow, machine.is_full) = (false, false);
            }
        }
    }

    /// A process that stood still goes on: everything that came meanwhile reaches it at once, and it makes up for a few ticks.
    fn resume(&mut self, slot: usize) {
        let machine = &mut self.machines[slot];
        if !machine.is_paused {
            return;
        }
        machine.is_paused = false;
        for event in std::mem::take(&mut machine.stalled) {
            let at = self.now + self.rng.range(0, 2 * MS);
            self.schedule(at, event);
        }
        self.with_process(slot, |process, world| process.tick(world, 3));
    }

    /// No more faults: links work, clocks run, processes that can run do.
    pub fn heal(&mut self) {
        self.is_healed = true;
        self.network.heal_for_good();
        for slot in 0..self.machines.len() {
            self.resume(slot);
            let machine = &mut self.machines[slot];
            (machine.is_slow, machine.is_full, machine.trap) = (false, false, Trap::None);
            machine.clock.set_rate(self.now, 1000);
            self.schedule(self.now, Event::Start { slot });
        }
    }
}
