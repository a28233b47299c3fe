//! Looking at the protocol from outside.

use raft::{ProgressState, StateRole};

use super::Consensus;
use crate::node::{PeerProgress, Role};
use crate::wal::LogStart;

/// One moment of the protocol.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// Role.
    pub role: Role,
    /// Current term.
    pub term: u64,
    /// Known leader.
    pub leader: Option<u64>,
    /// It is this member, or was heard of within the last election timeout.
    pub is_led: bool,
    /// Commit index.
    pub commit_index: u64,
    /// Index up to which the log is durable here.
    pub persisted_index: u64,
    /// Where the log begins.
    pub log_start: LogStart,
    /// Last index in the log.
    pub last_index: u64,
    /// An entry of the current term is applied here.
    pub applied_current_term: bool,
    /// Leadership is being handed over.
    pub transferring: bool,
    /// The configuration is joint.
    pub joint: bool,
    /// A configuration change is in the log and not applied.
    pub conf_pending: bool,
    /// Voters of the applied configuration (of both halves, if joint), ascending.
    pub voters: Vec<u64>,
    /// Its learners, ascending.
    pub learners: Vec<u64>,
    /// On the leader: removed members that still have to hear of it, ascending.
    pub leaving: Vec<u64>,
    /// It leads, and whoever was removed and is not in `leaving` is needed by nobody.
    pub knows_the_departed: bool,
}

impl Consensus {
    /// One moment of the protocol.
    pub fn view(&self) -> View {
        let raft = &self.node.raft;
        let conf = raft.prs().conf().to_conf_state();
        let mut voters: Vec<u64> = conf.voters.iter().chain(&conf.voters_outgoing).copied().collect();
        voters.sort_unstable();
        voters.dedup();
        let mut learners: Vec<u64> = conf.learners.iter().chain(&conf.learners_next).copied().collect();
        learners.sort_unstable();
        let role = match raft.state {
            StateRole::Leader => Role::Leader,
            StateRole::Candidate | StateRole::PreCandidate => Role::Candidate,
            StateRole::Follower if learners.contains(&raft.id) && !voters.contains(&raft.id) => Role::Learner,
            StateRole::Follower => Role::Follower,
        };
        View {
            role,
            term: raft.term,
            leader: (raft.leader_id != raft::INVALID_ID).then_some(raft.leader_id),
            is_led: self.is_led(),
            commit_index: raft.raft_log.committed,
            persisted_index: raft.raft_log.persisted,
            log_start: raft.store().start(),
            last_index: raft.raft_log.last_index(),
            applied_current_term: raft.apply_to_current_term(),
            transferring: raft.lead_transferee.is_some(),
            joint: !conf.voters_outgoing.is_empty(),
            conf_pending: raft.has_pending_conf(),
            voters,
            learners,
            leaving: self.leaving(),
            knows_the_departed: self.knows_the_departed(),
        }
    }

    /// Known leader and term: what changes seldom and is looked at often.
    pub fn leadership(&self) -> (u64, u64) {
        (self.node.raft.term, self.node.raft.leader_id)
    }

    /// Whether this member leads.
    pub fn is_leader(&self) -> bool {
        self.node.raft.state == StateRole::Leader
    }

    /// The leader's knowledge of the others (itself included); empty elsewhere.
    pub fn progress(&self) -> Vec<PeerProgress> {
        let raft = &self.node.raft;
        if raft.state != StateRole::Leader {
            return Vec::new();
        }
        let mut peers: Vec<PeerProgress> = raft
            .prs()
            .iter()
            .map(|(&id, progress)| PeerProgress {
                id,
                match_index: progress.matched,
                active: id == raft.id
                    || if mutant!(ForgetHeard) {
                        progress.recent_active
                    } else {
                        self.is_recent(self.answered.get(&id))
                    },
                snapshot: progress.state == ProgressState::Snapshot,
            })
            .collect();
        peers.sort_unstable_by_key(|peer| peer.id);
        peers
    }

    /// Whether this member leads, or heard its leader within the last election timeout.
    pub(super) fn is_led(&self) -> bool {
        let leader = self.node.raft.leader_id;
        leader != raft::INVALID_ID && (leader == self.options.id || self.is_recent(self.heard.get(&leader)))
    }

    /// Whether its term and its vote are durable. Before that nobody hears of anything it does in this term (rule 3); a sole voter, which
    /// raft-rs makes a leader within the call that gives it its own vote, may crash and never have led.
    pub fn is_bound(&self) -> bool {
        self.moving.is_none()
    }

    fn is_recent(&self, tick: Option<&u64>) -> bool {
        tick.is_some_and(|tick| self.tick - tick <= self.options.election_ticks as u64)
    }

    /// Proposals of this member that wait for their result.
    pub fn proposals_pending(&self) -> usize {
        self.proposals.waiting()
    }

    /// Bytes of the log in memory.
    pub fn cached_bytes(&self) -> usize {
        self.node.store().cached_bytes()
    }
}
