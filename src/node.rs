//! [`Node`]: what the front ends hold. Proposals, read barriers and requests to the leader go in here; nothing else does.

use tokio::time::Instant;

use crate::leader::{LeaderError, LeaderReply, LeaderRequest};
use crate::state::StateReader;
use crate::state::command::{Body, Idempotency};
use crate::state::outcome::Outcome;

/// Why a proposal has no outcome. `not_applied` or `unknown` follows from the variant, see each.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// The deadline passed and the command was never handed to raft: it never will be (`503 no_leader`, `not_applied`).
    #[error("no leader was elected within the request's timeout")]
    NoLeader,
    /// The deadline passed after it was handed to raft: it may be applied now or later (`504 timeout`, `unknown`).
    #[error("the command was proposed, and its outcome is not known at the deadline")]
    Timeout,
    /// The proposal queue is full (`429 overloaded`, `not_applied`).
    #[error("the proposal queue is full")]
    Overloaded,
    /// The node is stopping and had not handed it to raft (`503 shutting_down`, `not_applied`).
    #[error("the member is shutting down")]
    ShuttingDown,
    /// This member differs from a majority and does not serve (`503 quarantined`, `not_applied`).
    #[error("this member is quarantined: {0}")]
    Quarantined(String),
    /// The store is over `limits.max_store_bytes`, or the disk is nearly full (`507 quota_exceeded`, `not_applied`).
    #[error("{0}")]
    Quota(String),
}

/// Why a linearizable read cannot be served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BarrierError {
    /// No quorum confirmed within the deadline, and no leader is known (`503 no_leader`).
    #[error("no leader was elected within the request's timeout")]
    NoLeader,
    /// A leader is known, but the quorum or the own apply was too slow (`504 timeout`).
    #[error("the read was not confirmed by a quorum within the request's timeout")]
    Timeout,
    /// The node is stopping (`503 shutting_down`).
    #[error("the member is shutting down")]
    ShuttingDown,
    /// See [`ProposeError::Quarantined`].
    #[error("this member is quarantined: {0}")]
    Quarantined(String),
}

/// Raft's role of this member.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Leads.
    Leader,
    /// Follows (or knows nobody).
    Follower,
    /// Asks for votes.
    Candidate,
    /// Receives the log without voting.
    Learner,
}

/// One moment of the node, for `/status`, `/readyz`, `/members` and the metrics. Cheap to get: the loop publishes it.
#[derive(Debug, Clone, serde::Serialize)]
pub struct NodeStatus {
    /// Own id.
    pub id: u64,
    /// Role.
    pub role: Role,
    /// Current term.
    pub term: u64,
    /// Known leader.
    pub leader: Option<u64>,
    /// Commit index.
    pub commit_index: u64,
    /// Applied index.
    pub applied_index: u64,
    /// WAL engine.
    pub wal_engine: &'static str,
    /// Bytes of the WAL on disk.
    pub wal_bytes: u64,
    /// fdatasyncs of the WAL since the start.
    pub wal_syncs: u64,
    /// First index in the log.
    pub first_index: u64,
    /// Last index in the log.
    pub last_index: u64,
    /// Proposals that wait for their result on this member.
    pub proposals_pending: usize,
    /// Has a leader and has applied what was committed when it was last asked: `/readyz`.
    pub ready: bool,
    /// If not ready: why.
    pub not_ready_reason: Option<String>,
    /// Set while this member refuses to serve because its state differs from a majority's.
    pub quarantined: Option<String>,
    /// On the leader: what it knows of the others.
    pub peers: Vec<PeerProgress>,
}

/// The leader's view of a member.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PeerProgress {
    /// Member id.
    pub id: u64,
    /// Highest index known to be in its log.
    pub match_index: u64,
    /// Heard of within the last election timeout.
    pub active: bool,
    /// A snapshot is under way to it.
    pub snapshot: bool,
}

/// The handle. Cheap to clone.
#[derive(Clone)]
pub struct Node {}

impl Node {
    /// Own id.
    pub fn id(&self) -> u64 {
        todo!()
    }

    /// The state's reading side. Check [`ensure_serving`](Self::ensure_serving) before answering from it without a barrier.
    pub fn reader(&self) -> &StateReader {
        todo!()
    }

    /// Proposes a command and waits until it is committed and applied here, or `deadline`.
    pub async fn propose(&self, _body: Body, _idempotency: Option<Idempotency>, _deadline: Instant) -> Result<Outcome, ProposeError> {
        todo!()
    }

    /// Returns when a read of the local state is linearizable: joins the next ReadIndex round and waits for the apply (rule 16).
    pub async fn read_barrier(&self, _deadline: Instant) -> Result<(), BarrierError> {
        todo!()
    }

    /// An error while this member must not answer at all: quarantined, installing a snapshot, not (or no longer) a member.
    pub fn ensure_serving(&self) -> Result<(), BarrierError> {
        todo!()
    }

    /// Has the leader carry out a request, here or relayed over the peer listener.
    pub async fn call_leader(&self, _request: LeaderRequest, _deadline: Instant) -> Result<LeaderReply, LeaderError> {
        todo!()
    }

    /// The last published status.
    pub fn status(&self) -> NodeStatus {
        todo!()
    }

    /// Resolves when the node begins to shut down: waits and watches end with `shutting_down`.
    pub async fn shutting_down(&self) {
        todo!()
    }
}
