//! What every member does at a tick, and a leader besides. The twin of `src/leader/duties.rs`.

use metcd::leader::care::{Care, conf_change};
use metcd::node::Role;
use metcd::state::command::{Body, Compact, Evict, FEATURE_LEVEL, LeaseExpire, MemberUpdate};
use raft::eraftpb::ConfChangeV2;

use super::{Input, Process};
use crate::network::PacketBody;
use crate::plan::{ELECTION_TICKS, TICK};
use crate::world::World;

const MAX_ENDS_PER_TICK: usize = 1_000;
/// Ticks between two looks at history, idempotency records and the own member record.
const SLOW_TICKS: u64 = 10;

impl Process {
    pub(super) fn run_duties(&mut self, world: &mut World) {
        let leads = self.view.role == Role::Leader && self.view.applied_current_term;
        self.run_lease_clock(world, leads);
        self.renew_again(world);
        let is_slow = self.ticks.is_multiple_of(SLOW_TICKS);
        if is_slow {
            self.ask_whether_welcome(world);
            self.ask_who_departed(world);
            self.publish_self(world);
            if let Some(report) = self.state.take_hash_report(self.id) {
                self.propose_duty(world, Body::HashReport(report));
            }
        }
        if !leads {
            self.caretaker.forget();
            return;
        }
        self.beats += 1;
        if self.beats >= world.plan.heartbeat_ticks {
            self.beats = 0;
            self.look_after_members(world);
        }
        if is_slow {
            self.forget_history(world);
            self.evict_idempotency(world);
        }
    }

    fn ask_whether_welcome(&mut self, world: &mut World) {
        if self.view.voters.contains(&self.id) && self.reader.applied_index() > 0 {
            return;
        }
        for to in self.peers.clone() {
            self.send_packet(world, to, PacketBody::AskWhetherWelcome);
        }
    }

    fn ask_who_departed(&mut self, world: &mut World) {
        if !self.admissions.take_wish_for_departed() {
            return;
        }
        if let Some(leader) = self.view.leader.filter(|&leader| leader != self.id) {
            self.asked_leader = Some(leader);
            self.send_packet(world, leader, PacketBody::AskMembers);
        }
    }

    fn run_lease_clock(&mut self, world: &mut World, leads: bool) {
        if !leads && !known_bug!(ExpireOnFollowers) {
            self.lease_clock.follow();
            return;
        }
        let now_ms = self.now_ms(world);
        let term = self.view.term;
        if self.lease_clock.term() != Some(term) {
            self.lease_clock.lead(term, &self.reader.leases(), now_ms);
        }
        let patience_ms = 2 * ELECTION_TICKS * TICK / 1000;
        for id in self.lease_clock.due(now_ms, MAX_ENDS_PER_TICK, patience_ms) {
            self.propose_duty(world, Body::LeaseExpire(LeaseExpire { id, term }));
        }
    }

    fn look_after_members(&mut self, world: &mut World) {
        let care = self.caretaker.look(self.id, &self.view, &self.progress, &self.reader.members());
        match care {
            None => {}
            Some(Care::LeaveJoint) => self.enqueue(world, Input::ProposeConf(ConfChangeV2::default())),
            Some(Care::HandOver(to)) => self.enqueue(world, Input::Transfer(to)),
            Some(Care::Change(change)) => self.enqueue(world, Input::ProposeConf(conf_change(&change))),
        }
    }

    fn forget_history(&mut self, world: &mut World) {
        let revision = self.reader.revision().saturating_sub(world.plan.retain_revisions);
        if revision > self.reader.compacted_revision() {
            self.propose_duty(world, Body::Compact(Compact { revision }));
        }
    }

    fn evict_idempotency(&mut self, world: &mut World) {
        let Some(up_to_stamp) = self.cluster_time_ms.checked_sub(world.plan.idempotency_retain_ms) else {
            return;
        };
        if self.reader.oldest_idempotency_stamp().is_some_and(|oldest| oldest <= up_to_stamp) {
            let term = self.view.term;
            self.propose_duty(world, Body::Evict(Evict { up_to_stamp, term }));
        }
    }

    /// A member's record follows what the member says of itself.
    fn publish_self(&mut self, world: &mut World) {
        if self.view.leader.is_none() {
            return;
        }
        let members = self.reader.members();
        let Some(record) = members.iter().find(|member| member.id == self.id) else {
            return;
        };
        let incarnation = world.machines[self.slot].incarnation;
        let update = MemberUpdate {
            id: self.id,
            incarnation: (record.incarnation == 0).then_some(incarnation),
            feature_level: (record.feature_level != FEATURE_LEVEL).then_some(FEATURE_LEVEL),
            ..MemberUpdate::default()
        };
        if update.incarnation.is_some() || update.feature_level.is_some() {
            self.propose_duty(world, Body::MemberUpdate(update));
        }
    }
}
