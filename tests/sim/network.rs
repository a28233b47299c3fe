//! Links between machines: each direction has a state of its own. A message is delayed, lost or sent twice as the plan and the faults
//! say. Later messages overtake earlier ones freely: more than TCP would allow, and all that raft allows.

use std::collections::BTreeSet;

use metcd::server::admission::MemberTable;
use raft::eraftpb::Message;

use crate::plan::{Micros, Plan, SECOND};
use crate::rng::Rng;

/// What travels from machine to machine.
#[derive(Debug, Clone)]
pub struct Packet {
    pub from_slot: usize,
    pub from_member: u64,
    pub from_incarnation: u64,
    pub to_member: u64,
    pub body: PacketBody,
}

/// Its content.
#[derive(Debug, Clone)]
pub enum PacketBody {
    /// A raft message.
    Raft(Message),
    /// A refusal: the receiver was removed from the cluster.
    Removed,
    /// A member that is not a voter asks whether it is still one of them: an answer comes only if it is not.
    AskWhetherWelcome,
    /// `GET /raft/members`, at the address that the receiver named when it spoke under this incarnation.
    AskMembers,
    /// Its answer.
    Members(MemberTable),
    /// A request that only the leader answers, on behalf of this call of the sender.
    ToLeader { call: u64, lease: u64 },
    /// Its answer: the lease's ttl, or nothing.
    FromLeader { call: u64, ttl_ms: Option<u64>, gone: bool },
}

/// The links.
pub struct Network {
    latency: (Micros, Micros),
    loss_per_mille: u64,
    duplicate_per_mille: u64,
    /// Directions that carry nothing.
    cut: BTreeSet<(usize, usize)>,
}

impl Network {
    pub fn new(plan: &Plan) -> Network {
        Network {
            latency: plan.latency,
            loss_per_mille: plan.loss_per_mille,
            duplicate_per_mille: plan.duplicate_per_mille,
            cut: BTreeSet::new(),
        }
    }

    /// From now on nothing is lost, doubled or cut.
    pub fn heal_for_good(&mut self) {
        self.loss_per_mille = 0;
        self.duplicate_per_mille = 0;
        self.latency = (self.latency.0, self.latency.0 * 5);
        self.cut.clear();
    }

    pub fn cut(&mut self, from: usize, to: usize) {
        self.cut.insert((from, to));
    }

    pub fn join(&mut self, from: usize, to: usize) {
        self.cut.remove(&(from, to));
    }

    pub fn join_all(&mut self) {
        self.cut.clear();
    }

    pub fn is_cut(&self, from: usize, to: usize) -> bool {
        self.cut.contains(&(from, to))
    }

    /// The delays after which copies of a message arrive: none if it is lost.
    pub fn route(&self, from: usize, to: usize, rng: &mut Rng) -> Vec<Micros> {
        if self.is_cut(from, to) || rng.chance(self.loss_per_mille) {
            return Vec::new();
        }
        let mut delays = vec![self.delay(rng)];
        if rng.chance(self.duplicate_per_mille) {
            // Some lie around for long.
            let is_late = rng.chance(50);
            delays.push(if is_late {
                rng.range(SECOND, 40 * SECOND)
            } else {
                self.delay(rng) * 3
            });
        }
        delays
    }

    /// One way.
    pub fn delay(&self, rng: &mut Rng) -> Micros {
        rng.skewed(self.latency.0, self.latency.1 + 1)
    }
}
