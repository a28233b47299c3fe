//! Requests of clients, as `metcd::node::Node` and `metcd::leader::LeaderService` serve them.

use std::sync::Arc;

use metcd::consensus::proposals::{Gate, Proposal};
use metcd::leader::clock;
use metcd::state::command::Command;
use prost::Message as _;

use super::{Input, Process};
use crate::calls::Request;
use crate::network::PacketBody;
use crate::plan::{Micros, TICK};
use crate::world::World;

/// Somebody who waits behind a read barrier.
#[derive(Debug, Clone, Copy)]
pub enum Waiter {
    /// A linearizable read.
    Read(u64),
    /// A watch that begins now.
    Watch(usize),
    /// A renewal: the leader proves itself first. With the term at its arrival.
    Renewal(Renewal, u64),
}

/// A renewal of a lease, on the leader.
#[derive(Debug, Clone, Copy)]
pub struct Renewal {
    pub lease: u64,
    pub of: RenewalFor,
    /// Given up then.
    pub until: Micros,
}

/// Who asked for it.
#[derive(Debug, Clone, Copy)]
pub enum RenewalFor {
    /// A client of this process.
    Local(u64),
    /// A client of another member.
    Remote(u64, u64),
}

impl Process {
    /// A client's request arrived.
    pub fn request(&mut self, world: &mut World, call: u64, request: Request) {
        if let Request::Write(command, patience) = request {
            return self.propose(world, call, &command, patience);
        }
        if self.reader.applied_index() == 0 {
            return world.refuse(call);
        }
        match request {
            Request::Write(..) => {}
            Request::Read { barrier: true, .. } => self.join_barrier(world, Waiter::Read(call)),
            Request::Read { barrier: false, .. } => self.waiting.push((0, Waiter::Read(call))),
            Request::KeepAlive(_) => self.relay(world, call),
        }
        self.serve_reads(world);
    }

    fn propose(&mut self, world: &mut World, call: u64, command: &Command, patience: Micros) {
        if self.reader.applied_index() == 0 {
            return world.refuse(call);
        }
        let gate = Arc::new(Gate::default());
        world.calls.note_gate(call, gate.clone());
        let proposal = Proposal {
            body: command.encode_to_vec().into(),
            gate,
            ttl_ticks: patience / TICK + 1,
        };
        let call = Some(call);
        self.enqueue(world, Input::Propose { proposal, call });
    }

    /// A proposal that nobody waits for.
    pub(super) fn propose_duty(&mut self, world: &mut World, body: metcd::state::command::Body) {
        let command = Command {
            seq: 0,
            idempotency: None,
            body: Some(body),
        };
        let proposal = Proposal {
            body: command.encode_to_vec().into(),
            gate: Arc::default(),
            ttl_ticks: 200,
        };
        self.enqueue(world, Input::Propose { proposal, call: None });
    }

    /// Joins the next ReadIndex round.
    pub fn join_barrier(&mut self, world: &mut World, waiter: Waiter) {
        self.gathering.push(waiter);
        if self.gathering.len() == 1 {
            self.enqueue(world, Input::ReadWanted);
        }
    }

    /// Nothing may be answered from this state now.
    fn is_serving(&self) -> bool {
        let applied = self.reader.applied_index();
        !self.is_installing && applied > 0 && applied >= self.serve_from && self.reader.divergence(self.id).is_none()
    }

    /// Answers whoever's index is applied.
    pub(super) fn serve_reads(&mut self, world: &mut World) {
        if self.waiting.is_empty() || !self.is_serving() {
            return;
        }
        let applied = self.reader.applied_index();
        for (index, waiter) in std::mem::take(&mut self.waiting) {
            if index > applied || !self.serve(world, waiter) {
                self.waiting.push((index, waiter));
            }
        }
    }

    /// `false`: not yet.
    fn serve(&mut self, world: &mut World, waiter: Waiter) -> bool {
        match waiter {
            Waiter::Read(call) => return world.answer_read(call, &self.reader),
            Waiter::Watch(watch) => world.open_watch(watch, self.slot, &self.reader),
            Waiter::Renewal(renewal, term) if self.leadership == (term, self.id) => self.renew(world, renewal),
            Waiter::Renewal(renewal, _) => self.answer_renewal(world, renewal, None, false),
        }
        true
    }

    // ---- renewals

    /// Finds the leader and has it renew the lease; looked at again at each tick while there is none.
    pub fn relay(&mut self, world: &mut World, call: u64) {
        let Some((lease, until)) = world.calls.renewal(call) else { return };
        let (term, leader) = self.leadership;
        if leader == self.id {
            let of = RenewalFor::Local(call);
            self.join_barrier(world, Waiter::Renewal(Renewal { lease, of, until }, term));
        } else if leader != 0 {
            self.send_packet(world, leader, PacketBody::ToLeader { call, lease });
        }
    }

    /// Another member's client asks this one, as the leader.
    pub fn renew_for(&mut self, world: &mut World, member: u64, call: u64, lease: u64) {
        let (term, leader) = self.leadership;
        if leader == self.id {
            let renewal = Renewal {
                lease,
                of: RenewalFor::Remote(member, call),
                until: world.now + 20 * TICK,
            };
            self.join_barrier(world, Waiter::Renewal(renewal, term));
        }
    }

    fn renew(&mut self, world: &mut World, renewal: Renewal) {
        let now_ms = self.now_ms(world);
        match self.lease_clock.renew(renewal.lease, now_ms) {
            clock::Renewal::Renewed { ttl_ms } => self.answer_renewal(world, renewal, Some(ttl_ms), false),
            clock::Renewal::Gone => self.answer_renewal(world, renewal, None, true),
            // Its end is on its way through the log: the answer is what becomes of that.
            clock::Renewal::Expiring => self.renewals.push(renewal),
            clock::Renewal::NotLeader => self.answer_renewal(world, renewal, None, false),
        }
    }

    pub(super) fn renew_again(&mut self, world: &mut World) {
        for renewal in std::mem::take(&mut self.renewals) {
            if world.now < renewal.until {
                self.renew(world, renewal);
            }
        }
    }

    fn answer_renewal(&mut self, world: &mut World, renewal: Renewal, ttl_ms: Option<u64>, gone: bool) {
        match renewal.of {
            RenewalFor::Local(call) => world.answer_renewal(call, ttl_ms, gone),
            RenewalFor::Remote(member, call) => self.send_packet(world, member, PacketBody::FromLeader { call, ttl_ms, gone }),
        }
    }
}
