//! [`Node`]: what the front ends hold. Proposals, read barriers and requests to the leader go in here; nothing else does.

mod histogram;
mod read_gate;
mod shared;
mod stages;
mod steady;
mod turns;
mod wal_metrics;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use prost::Message as _;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::consensus::View;
use crate::consensus::proposals::{Gate, Proposal};
use crate::driver::{Event, Reply};
use crate::leader::{LeaderError, LeaderReply, LeaderRequest, LeaderService};
use crate::state::command::{Body, Command, Idempotency, TxnOpBody};
use crate::state::outcome::{Outcome, Refusal};
use crate::state::{SnapshotView, StateReader};
use crate::transport::PeerMetrics;

pub use histogram::{Histogram, HistogramView};
pub use read_gate::ReadGate;
pub use shared::{NodeMetrics, Phase, Shared, SharedParts};
pub(crate) use stages::Applied;
pub use stages::{ApplyTimes, StageTimes, Stages};
pub use steady::SteadyClock;
pub use wal_metrics::{WalMetrics, WalShare};

/// A member this close to the commit index counts as caught up.
pub const CAUGHT_UP_ENTRIES: u64 = 1000;

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
    /// This member differs from a majority and does not serve, or no majority agrees (`503 quarantined`, `not_applied`).
    #[error("this member is quarantined: {0}")]
    Quarantined(String),
    /// This member is not in its cluster's configuration yet (`503 not_ready`, `not_applied`).
    #[error("{0}")]
    NotReady(String),
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
    /// Joining, replaying or installing a snapshot (`503 not_ready`).
    #[error("{0}")]
    NotReady(String),
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
    /// Set while this member refuses to serve because its state differs from a majority's, or takes no writes because no majority agrees.
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
    /// It answered within the last election timeout.
    pub active: bool,
    /// A snapshot is under way to it.
    pub snapshot: bool,
}

/// The handle. Cheap to clone.
#[derive(Clone)]
pub struct Node {
    shared: Arc<Shared>,
    leader: Arc<LeaderService>,
}

/// Counts a request that waits, as long as it waits.
/// Nobody waits any more, for whatever reason: what was not handed to raft never is.
struct GivenUp<'a>(&'a Gate);

impl Drop for GivenUp<'_> {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

impl Node {
    /// Over the shared parts of a running node.
    pub fn new(shared: Arc<Shared>, leader: Arc<LeaderService>) -> Node {
        Node { shared, leader }
    }

    /// Own id.
    pub fn id(&self) -> u64 {
        self.shared.id
    }

    /// The state's reading side. Check [`ensure_serving`](Self::ensure_serving) before answering from it without a barrier.
    pub fn reader(&self) -> &StateReader {
        &self.shared.reader
    }

    /// The shared parts.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Proposes a command and waits until it is committed and applied here, or `deadline`. Where the time goes is noted in `stages`.
    pub async fn propose(
        &self,
        body: Body,
        idempotency: Option<Idempotency>,
        deadline: Instant,
        stages: &Stages,
    ) -> Result<Outcome, ProposeError> {
        self.admit(&body, idempotency.as_ref(), deadline).await?;
        // Counted until raft's side lets go of it, too: a client that goes away does not make room for the next one before that.
        let gate = Arc::new(Gate::counted(&self.shared.waiting));
        if self.shared.waiting.load(Ordering::Relaxed) > self.shared.max_waiting {
            return Err(ProposeError::Overloaded);
        }
        let _given_up = GivenUp(&gate);
        let command = Command {
            seq: 0,
            idempotency,
            body: Some(body),
        };
        let ttl = deadline.saturating_duration_since(Instant::now());
        let ttl_ticks = (ttl.as_millis() / self.shared.tick.as_millis().max(1)) as u64 + 1;
        let proposal = Proposal {
            body: command.encode_to_vec().into(),
            gate: gate.clone(),
            ttl_ticks,
        };
        let (reply, applied) = oneshot::channel();
        let queued = std::time::Instant::now();
        self.shared.send(Event::Propose {
            proposal,
            reply: Some(Reply(reply)),
        });
        let applied = tokio::time::timeout_at(deadline, applied).await;
        let times = applied.as_ref().ok().and_then(|applied| Some(applied.as_ref().ok()?.times));
        self.note_stages(stages, queued, &gate, times);
        match applied {
            Ok(Ok(applied)) if applied.outcome.result == Err(Refusal::AlreadyApplied) => Err(ProposeError::Timeout),
            Ok(Ok(applied)) => Ok(applied.outcome),
            Ok(Err(_)) if gate.cancel() => Err(self.stopped_or(ProposeError::NoLeader)),
            Ok(Err(_)) => Err(ProposeError::Timeout),
            Err(_) if gate.cancel() => Err(ProposeError::NoLeader),
            Err(_) => Err(ProposeError::Timeout),
        }
    }

    /// Where the time of a proposal went, as far as it came.
    fn note_stages(&self, stages: &Stages, queued: std::time::Instant, gate: &Gate, times: Option<ApplyTimes>) {
        // The protocol's clock counts in milliseconds.
        let handed = gate.handed_ms().map(|ms| self.shared.moment_of(ms).max(queued));
        let now = std::time::Instant::now();
        stages.note(|noted| {
            noted.queue = handed.unwrap_or(now).saturating_duration_since(queued);
            let Some(handed) = handed else { return };
            noted.replicate = times.map_or(now, |times| times.committed).saturating_duration_since(handed);
            if let Some(times) = times {
                noted.apply_wait = times.begun.saturating_duration_since(times.committed);
                noted.apply = times.applied.saturating_duration_since(times.begun);
            }
        });
    }

    /// The queues to the other members, by id.
    pub fn peer_queues(&self) -> Vec<PeerMetrics> {
        self.leader.peer_queues()
    }

    fn stopped_or(&self, error: ProposeError) -> ProposeError {
        if *self.shared.phase.borrow() == Phase::Running {
            error
        } else {
            ProposeError::ShuttingDown
        }
    }

    /// What refuses a command before it is proposed.
    async fn admit(&self, body: &Body, idempotency: Option<&Idempotency>, deadline: Instant) -> Result<(), ProposeError> {
        match self.shared.serving() {
            Ok(()) => {}
            Err(BarrierError::Quarantined(reason)) => return Err(ProposeError::Quarantined(reason)),
            Err(BarrierError::ShuttingDown) => return Err(ProposeError::ShuttingDown),
            // A member that replays or installs takes commands in: they are applied in their turn, and answered then.
            Err(BarrierError::NotReady(_)) if self.shared.applied_index() > 0 => {}
            Err(BarrierError::NotReady(reason)) => return Err(ProposeError::NotReady(reason)),
            Err(BarrierError::NoLeader | BarrierError::Timeout) => {}
        }
        if let Some(reason) = self.shared.reader.disagreement() {
            return Err(ProposeError::Quarantined(reason));
        }
        if *self.shared.phase.borrow() != Phase::Running {
            return Err(ProposeError::ShuttingDown);
        }
        let refused = if grows(body) { self.shared.check_quota() } else { Ok(()) };
        let (Err(refusal), Some(idempotency)) = (&refused, idempotency) else {
            return refused;
        };
        // A retry of what was done when there was room gets its answer, and needs none. Looked for in the state as it is now on the leader:
        // this member may not have applied it yet.
        self.read_barrier(deadline).await.map_err(|error| match error {
            BarrierError::NoLeader => ProposeError::NoLeader,
            BarrierError::ShuttingDown => ProposeError::ShuttingDown,
            BarrierError::Timeout | BarrierError::NotReady(_) | BarrierError::Quarantined(_) => refusal.clone(),
        })?;
        if self.shared.reader.has_answer(&idempotency.key) {
            Ok(())
        } else {
            refused
        }
    }

    /// Returns when a read of the local state is linearizable: joins the next ReadIndex round and waits for the apply (rule 16).
    pub async fn read_barrier(&self, deadline: Instant) -> Result<(), BarrierError> {
        self.shared.read_barrier(deadline).await
    }

    /// A view of everything at one moment, for a backup: after a [`read_barrier`](Self::read_barrier) it holds all that was answered
    /// before.
    pub async fn snapshot_view(&self, deadline: Instant) -> Result<SnapshotView, BarrierError> {
        self.shared.serving()?;
        let (reply, view) = oneshot::channel();
        self.shared.send(Event::Backup(reply));
        match tokio::time::timeout_at(deadline, view).await {
            Ok(Ok(view)) => Ok(view),
            Ok(Err(_)) => Err(BarrierError::ShuttingDown),
            Err(_) => Err(BarrierError::Timeout),
        }
    }

    /// An error while this member must not answer at all: quarantined, installing a snapshot, not (or no longer) a member.
    pub fn ensure_serving(&self) -> Result<(), BarrierError> {
        self.shared.serving()
    }

    /// Has the leader carry out a request, here or relayed over the peer listener.
    pub async fn call_leader(&self, request: LeaderRequest, deadline: Instant) -> Result<LeaderReply, LeaderError> {
        tokio::select! {
            result = self.leader.call(request, deadline) => result,
            () = self.shared.given_up() => Err(LeaderError::Timeout),
        }
    }

    /// The leader service, for the peer listener.
    pub fn leader_service(&self) -> &Arc<LeaderService> {
        &self.leader
    }

    /// The last published status.
    pub fn status(&self) -> NodeStatus {
        let published = self.shared.published.read().clone();
        let view = &published.view;
        let stats = self.shared.wal_metrics.stats();
        let applied_index = self.shared.applied_index();
        let not_ready_reason = self.not_ready_reason(view, applied_index);
        NodeStatus {
            id: self.shared.id,
            role: view.role,
            term: view.term,
            leader: self.shared.leader(),
            commit_index: view.commit_index.max(applied_index),
            applied_index,
            wal_engine: self.shared.wal_engine,
            wal_bytes: stats.bytes,
            wal_syncs: stats.syncs,
            first_index: view.log_start.index + 1,
            last_index: view.last_index.max(applied_index),
            proposals_pending: published.proposals_pending,
            ready: not_ready_reason.is_none(),
            not_ready_reason,
            quarantined: self.shared.quarantine(),
            peers: published.peers.clone(),
        }
    }

    fn not_ready_reason(&self, view: &View, applied_index: u64) -> Option<String> {
        if *self.shared.phase.borrow() != Phase::Running {
            return Some("shutting down".into());
        }
        if let Err(reason) = self.shared.serving() {
            return Some(reason.to_string());
        }
        if self.shared.leader().is_none() {
            return Some("no leader is known".into());
        }
        if applied_index + CAUGHT_UP_ENTRIES < view.commit_index {
            return Some(format!("applied {applied_index} of {} committed entries", view.commit_index));
        }
        let members = self.shared.reader.members();
        if members
            .iter()
            .any(|member| member.id == self.shared.id && member.client_url.is_empty())
        {
            return Some("the other members do not know this one's client URL yet".into());
        }
        None
    }

    /// Resolves when the node begins to shut down: waits and watches end with `shutting_down`.
    pub async fn shutting_down(&self) {
        let mut phases = self.shared.phases();
        // An error means that the node is gone altogether.
        let _ = phases.wait_for(|phase| *phase != Phase::Running).await;
    }
}

/// Whether a command may make the store larger: these are refused over the quota, the others make room.
fn grows(body: &Body) -> bool {
    match body {
        Body::Put(_) | Body::LeaseGrant(_) => true,
        Body::Txn(txn) => txn
            .then
            .iter()
            .chain(&txn.or_else)
            .any(|op| matches!(op.body, Some(TxnOpBody::Put(_)))),
        Body::Delete(_)
        | Body::DeleteRange(_)
        | Body::LeaseRevoke(_)
        | Body::LeaseExpire(_)
        | Body::Compact(_)
        | Body::Evict(_)
        | Body::MemberUpdate(_)
        | Body::HashReport(_) => false,
    }
}
