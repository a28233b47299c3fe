//! An administrator: adds, removes and replaces members, and moves leadership, through whoever leads; as `src/leader/membership.rs` does.

use metcd::leader::care::{conf_change, quorum_lost_without};
use metcd::state::command::{MemberRecord, MemberRole, MembershipChange};

use crate::machine::Machine;
use crate::node::{Input, peer_url};
use crate::plan::SECOND;
use crate::world::{Event, World};

/// Machines there are at most, the founders included.
const MAX_EXTRA_MACHINES: u64 = 5;

/// It will not come back, or may not: an administrator takes nobody else away before it is replaced.
fn is_lost(machine: &Machine) -> bool {
    machine.is_gone || machine.is_damaged
}

impl World {
    /// The slot of a process that leads.
    pub fn leader(&self) -> Option<usize> {
        let leading = |slot: &usize| {
            let machine = &self.machines[*slot];
            !machine.is_paused && machine.process.as_ref().is_some_and(|process| process.core.is_leader())
        };
        (0..self.machines.len()).filter(leading).max_by_key(|&slot| {
            let process = self.machines[slot].process.as_ref();
            process.map_or(0, |process| process.core.leadership().0)
        })
    }

    pub fn administer(&mut self) {
        if self.is_healed {
            return;
        }
        let at = self.now + self.rng.range(SECOND / 2, self.plan.admin_pause);
        self.schedule(at, Event::Admin);
        let Some(leader) = self.leader() else { return };
        if self.rng.chance(200) {
            let to = self.rng.range(1, self.machines.len() as u64 + 1);
            return self.with_process(leader, |process, world| {
                if process.view.voters.contains(&to) {
                    process.enqueue(world, Input::Transfer(to));
                }
            });
        }
        let has_lost = self.machines.iter().any(is_lost);
        if self.plan.membership || has_lost {
            self.change_members(leader);
        }
    }

    fn change_members(&mut self, leader: usize) {
        let Some(process) = &self.machines[leader].process else { return };
        let (view, progress, reader) = (process.view.clone(), process.progress.clone(), process.reader.clone());
        let members: Vec<u64> = reader.members().iter().map(|member| member.id).collect();
        let gone = members.iter().copied().find(|&id| is_lost(&self.machines[id as usize - 1]));
        let can_add = (self.machines.len() as u64) < self.plan.founders + MAX_EXTRA_MACHINES;
        let victim = gone.or_else(|| self.rng.pick(&members).copied());
        let is_replacement = can_add && self.rng.chance(500);
        if can_add && (is_replacement || self.rng.chance(300)) {
            let replaces = if is_replacement { victim.unwrap_or(0) } else { 0 };
            return self.add_member(leader, replaces);
        }
        let Some(victim) = victim else { return };
        // The leader hands over before it goes; here simply nothing is done.
        if victim == leader as u64 + 1 || quorum_lost_without(&view, &progress, victim).is_some() {
            return;
        }
        self.oracle.removals.insert(victim);
        let change = MembershipChange {
            remove: vec![victim],
            ..Default::default()
        };
        self.propose_change(leader, &change);
        if self.rng.chance(300) {
            // Another administrator wants the very same member to lead: it may apply its own removal as the leader.
            self.with_process(leader, |process, world| process.enqueue(world, Input::Transfer(victim)));
        }
    }

    fn add_member(&mut self, leader: usize, replaces: u64) {
        let slot = self.add_machine();
        let id = slot as u64 + 1;
        let is_voter = replaces != 0 || self.rng.chance(700);
        let role = if is_voter { MemberRole::Voter } else { MemberRole::Learner };
        let record = MemberRecord {
            id,
            peer_url: peer_url(id),
            wanted_role: role as i32,
            replaces,
            ..MemberRecord::default()
        };
        if replaces != 0 {
            self.oracle.removals.insert(replaces);
        }
        let change = MembershipChange {
            add: vec![record],
            ..Default::default()
        };
        self.propose_change(leader, &change);
        let at = self.now + self.rng.range(1, 3 * SECOND);
        self.schedule(at, Event::Start { slot });
    }

    fn propose_change(&mut self, leader: usize, change: &MembershipChange) {
        self.trace(|| format!("ADMIN {change:?}"));
        let conf_change = conf_change(change);
        self.with_process(leader, |process, world| process.enqueue(world, Input::ProposeConf(conf_change)));
    }
}
