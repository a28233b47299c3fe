//! [`Node`]: what the front ends hold. Proposals, read barriers and requests to the leader go in here; nothing else does.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use prost::Message as _;
use tokio::sync::{Notify, oneshot, watch};
use tokio::time::Instant;

use crate::consensus::View;
use crate::consensus::proposals::{Gate, Proposal};
use crate::driver::{Event, Fatal};
use crate::leader::clock::LeaseClock;
use crate::leader::{LeaderError, LeaderReply, LeaderRequest, LeaderService};
use crate::state::command::{Body, Command, HashReport, Idempotency, TxnOpBody};
use crate::state::outcome::{Outcome, Refusal};
use crate::state::{SnapshotView, StateReader};
use crate::store::KvStore;
use crate::wal::WalStats;

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
    /// This member differs from a majority and does not serve (`503 quarantined`, `not_applied`).
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

/// One moment of the read rounds: who waits for an index.
#[derive(Debug, Default)]
struct Round {
    /// 0 until it is confirmed (an index is never 0).
    index: AtomicU64,
    confirmed: Notify,
}

/// Gathers readers for the next ReadIndex round: however many wait, raft sees one read.
#[derive(Debug, Default)]
pub struct ReadGate {
    gathering: Mutex<Gathering>,
    sent: Mutex<HashMap<u64, Arc<Round>>>,
}

#[derive(Debug, Default)]
struct Gathering {
    round: Arc<Round>,
    wanted: bool,
    next_token: u64,
}

impl ReadGate {
    /// Joins the round that is being gathered. `true`: the first to do so, who tells the driver.
    fn join(&self) -> (Arc<Round>, bool) {
        let mut gathering = self.gathering.lock();
        let first = !std::mem::replace(&mut gathering.wanted, true);
        (gathering.round.clone(), first)
    }

    /// Whether anybody waits for the next round.
    pub(crate) fn is_wanted(&self) -> bool {
        self.gathering.lock().wanted
    }

    /// The round begins now: whoever comes later joins the next one (rule 16).
    pub(crate) fn gather(&self) -> Option<u64> {
        let mut gathering = self.gathering.lock();
        if !std::mem::take(&mut gathering.wanted) {
            return None;
        }
        gathering.next_token += 1;
        let round = std::mem::take(&mut gathering.round);
        self.sent.lock().insert(gathering.next_token, round);
        Some(gathering.next_token)
    }

    /// A quorum confirmed: readers of this round may read at `index`.
    pub(crate) fn confirm(&self, token: u64, index: u64) {
        if let Some(round) = self.sent.lock().remove(&token) {
            round.index.store(index, Ordering::Release);
            round.confirmed.notify_waiters();
        }
    }
}

/// What the threads of a node share. Everything here is small, and no lock is held across work.
pub struct Shared {
    /// Own id.
    pub id: u64,
    /// Own boot id.
    pub boot: u64,
    /// The reading side of the state.
    pub reader: StateReader,
    /// The store, for syncs off the loop.
    pub store: Arc<dyn KvStore>,
    /// What the WAL thread did.
    pub wal_metrics: WalMetrics,
    pub(crate) replies: Mutex<HashMap<u64, oneshot::Sender<Outcome>>>,
    pub(crate) reads: ReadGate,
    /// When a member was last heard of.
    heard: Mutex<HashMap<u64, std::time::Instant>>,
    events: std::sync::mpsc::Sender<Event>,
    published: RwLock<Arc<Published>>,
    leadership: watch::Sender<(u64, u64)>,
    phase: watch::Sender<Phase>,
    waiting: AtomicUsize,
    max_waiting: usize,
    tick: Duration,
    /// Nothing is served below this applied index: what was committed before the last stop is replayed first (rule 19).
    serve_from_index: u64,
    installing: AtomicBool,
    hash_report: Mutex<Option<HashReport>>,
    write_refusal: RwLock<Option<String>>,
    max_store_bytes: u64,
    wal_engine: &'static str,
    started: std::time::Instant,
    /// When leases end; runs only while this member leads.
    pub(crate) lease_clock: Mutex<LeaseClock>,
}

#[derive(Debug, Clone, PartialEq)]
struct Published {
    view: View,
    peers: Vec<PeerProgress>,
    proposals_pending: usize,
    cluster_time_ms: u64,
}

/// Where the process is in its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Phase {
    /// Serving.
    Running,
    /// Asked to stop: no new work.
    Stopping,
    /// Stopped in order.
    Closed,
    /// Cannot go on.
    Failed(Fatal),
}

/// Figures of the WAL thread.
#[derive(Debug, Default)]
pub struct WalMetrics {
    stats: RwLock<WalStats>,
    /// Durations of durable appends, by upper bound in microseconds; see [`WAL_BUCKETS_US`].
    pub append_buckets: [AtomicU64; WAL_BUCKETS_US.len() + 1],
    /// Sum of the durations in microseconds.
    pub append_us: AtomicU64,
    /// Entries appended.
    pub entries: AtomicU64,
}

/// Upper bounds of the histogram of durable appends, in microseconds.
pub const WAL_BUCKETS_US: [u64; 12] = [100, 200, 400, 800, 1_600, 3_200, 6_400, 12_800, 25_600, 51_200, 102_400, 1_000_000];

/// A durable append that takes longer is worth a warning.
const SLOW_APPEND: Duration = Duration::from_millis(100);

impl WalMetrics {
    pub(crate) fn record(&self, took: Duration, entries: usize, stats: WalStats) {
        let us = took.as_micros() as u64;
        let bucket = WAL_BUCKETS_US.partition_point(|&bound| bound < us);
        self.append_buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.append_us.fetch_add(us, Ordering::Relaxed);
        self.entries.fetch_add(entries as u64, Ordering::Relaxed);
        *self.stats.write() = stats;
        if took > SLOW_APPEND {
            tracing::warn!(
                took_ms = took.as_millis() as u64,
                entries,
                "slow disk: a durable append of the log took more than 100 ms"
            );
        }
    }

    pub(crate) fn set_stats(&self, stats: WalStats) {
        *self.stats.write() = stats;
    }

    /// The log's own figures.
    pub fn stats(&self) -> WalStats {
        *self.stats.read()
    }
}

/// What [`Shared`] is made of.
pub struct SharedParts {
    /// Own id.
    pub id: u64,
    /// Own boot id.
    pub boot: u64,
    /// Reading side of the state.
    pub reader: StateReader,
    /// The store.
    pub store: Arc<dyn KvStore>,
    /// To the driver.
    pub events: std::sync::mpsc::Sender<Event>,
    /// The protocol at the start.
    pub view: View,
    /// `raft.proposal_queue`.
    pub max_waiting: usize,
    /// `raft.tick`.
    pub tick: Duration,
    /// Durable commit index at the start.
    pub serve_from_index: u64,
    /// `limits.max_store_bytes`.
    pub max_store_bytes: u64,
    /// `wal.engine`.
    pub wal_engine: &'static str,
}

impl Shared {
    /// Puts it together.
    pub fn new(parts: SharedParts) -> Shared {
        let leadership = (parts.view.term, parts.view.leader.unwrap_or(0));
        let published = Published {
            view: parts.view,
            peers: Vec::new(),
            proposals_pending: 0,
            cluster_time_ms: 0,
        };
        Shared {
            id: parts.id,
            boot: parts.boot,
            reader: parts.reader,
            store: parts.store,
            wal_metrics: WalMetrics::default(),
            replies: Mutex::default(),
            reads: ReadGate::default(),
            heard: Mutex::default(),
            events: parts.events,
            published: RwLock::new(Arc::new(published)),
            leadership: watch::Sender::new(leadership),
            phase: watch::Sender::new(Phase::Running),
            waiting: AtomicUsize::new(0),
            max_waiting: parts.max_waiting,
            tick: parts.tick,
            serve_from_index: parts.serve_from_index,
            installing: AtomicBool::new(false),
            hash_report: Mutex::default(),
            write_refusal: RwLock::new(None),
            max_store_bytes: parts.max_store_bytes,
            wal_engine: parts.wal_engine,
            started: std::time::Instant::now(),
            lease_clock: Mutex::default(),
        }
    }

    /// Queues an event for the driver. If the driver is gone the process is ending and the event has no meaning.
    pub fn send(&self, event: Event) {
        let _ = self.events.send(event);
    }

    /// The node cannot go on: nothing more is answered, and the process ends with this reason.
    pub fn fail(&self, fatal: Fatal) {
        self.phase.send_if_modified(|phase| {
            let first = !matches!(phase, Phase::Failed(_));
            if first {
                tracing::error!(reason = %fatal.reason, "this member cannot go on");
                *phase = Phase::Failed(fatal);
            }
            first
        });
        // Nothing is applied here any more: who waits need not wait for the deadline to hear that the outcome is unknown.
        self.replies.lock().clear();
    }

    /// No new work from now on.
    pub fn begin_stop(&self) {
        self.phase.send_if_modified(|phase| {
            let running = *phase == Phase::Running;
            if running {
                *phase = Phase::Stopping;
            }
            running
        });
    }

    /// Everything has ended; the peers need not be heard any more.
    pub fn close(&self) {
        self.phase.send_if_modified(|phase| {
            let stopping = *phase == Phase::Stopping;
            if stopping {
                *phase = Phase::Closed;
            }
            stopping
        });
    }

    /// Follows the process's life.
    pub fn phases(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    /// Follows (term, leader); leader 0 is none.
    pub fn leaderships(&self) -> watch::Receiver<(u64, u64)> {
        self.leadership.subscribe()
    }

    /// Index of the last applied entry.
    pub fn applied_index(&self) -> u64 {
        self.reader.applied_index()
    }

    fn check_quota(&self) -> Result<(), ProposeError> {
        let bytes = self.reader.logical_bytes();
        if self.max_store_bytes > 0 && bytes >= self.max_store_bytes {
            return Err(ProposeError::Quota(format!(
                "the store holds {bytes} bytes and limits.max_store_bytes is {}: delete keys or compact history to write again",
                self.max_store_bytes
            )));
        }
        match &*self.write_refusal.read() {
            Some(reason) => Err(ProposeError::Quota(reason.clone())),
            None => Ok(()),
        }
    }

    /// While a snapshot replaces the state, nothing is read from it.
    pub(crate) fn set_installing(&self, installing: bool) {
        self.installing.store(installing, Ordering::Release);
    }

    pub(crate) fn set_hash_report(&self, report: HashReport) {
        *self.hash_report.lock() = Some(report);
    }

    pub(crate) fn take_hash_report(&self) -> Option<HashReport> {
        self.hash_report.lock().take()
    }

    /// Why writes that grow the store are refused (507), or that they are not.
    pub(crate) fn set_write_refusal(&self, reason: Option<String>) {
        *self.write_refusal.write() = reason;
    }

    pub(crate) fn publish(&self, view: View, peers: Vec<PeerProgress>, proposals_pending: usize, cluster_time_ms: u64) {
        *self.published.write() = Arc::new(Published {
            view,
            peers,
            proposals_pending,
            cluster_time_ms,
        });
    }

    /// Tells whether it is news.
    pub(crate) fn publish_leadership(&self, leadership: (u64, u64)) -> bool {
        self.leadership.send_if_modified(|now| {
            let changed = *now != leadership;
            *now = leadership;
            changed
        })
    }

    /// A message of this member arrived now.
    pub(crate) fn note_heard(&self, member: u64) {
        self.heard.lock().insert(member, std::time::Instant::now());
    }

    /// Whether a message of this member arrived since then. One hears of oneself always.
    pub(crate) fn heard_since(&self, member: u64, since: std::time::Instant) -> bool {
        member == self.id || self.heard.lock().get(&member).is_some_and(|&at| at >= since)
    }

    /// The protocol as it was at the last tick.
    pub fn view(&self) -> View {
        self.published.read().view.clone()
    }

    /// The leader's knowledge of the members as of the last tick; empty elsewhere.
    pub fn peers(&self) -> Vec<PeerProgress> {
        self.published.read().peers.clone()
    }

    /// Cluster time as of the last tick.
    pub fn cluster_time_ms(&self) -> u64 {
        self.published.read().cluster_time_ms
    }

    /// Milliseconds of this process's monotonic clock.
    pub fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// Known leader, now.
    pub fn leader(&self) -> Option<u64> {
        let (_, leader) = *self.leadership.borrow();
        (leader != 0).then_some(leader)
    }

    /// Returns when a read of the local state is linearizable: joins the next ReadIndex round and waits for the apply (rule 16).
    pub async fn read_barrier(&self, deadline: Instant) -> Result<(), BarrierError> {
        match tokio::time::timeout_at(deadline, self.barrier()).await {
            Ok(done) => done,
            Err(_) => match self.serving() {
                Err(reason) => Err(reason),
                Ok(()) if self.leader().is_none() => Err(BarrierError::NoLeader),
                Ok(()) => Err(BarrierError::Timeout),
            },
        }
    }

    async fn barrier(&self) -> Result<(), BarrierError> {
        if let Err(refused @ (BarrierError::Quarantined(_) | BarrierError::ShuttingDown)) = self.serving() {
            return Err(refused);
        }
        let (round, first) = self.reads.join();
        let mut confirmed = pin!(round.confirmed.notified());
        confirmed.as_mut().enable();
        if first {
            self.send(Event::ReadWanted);
        }
        let mut index = round.index.load(Ordering::Acquire);
        if index == 0 {
            confirmed.await;
            index = round.index.load(Ordering::Acquire);
        }
        if self.applied_index() < index {
            self.reader.wait_applied(index).await;
        }
        loop {
            match self.serving() {
                Err(BarrierError::NotReady(_)) => tokio::time::sleep(self.tick).await,
                other => return other,
            }
        }
    }

    /// Why nothing may be answered from this member's state now, or that it may.
    fn serving(&self) -> Result<(), BarrierError> {
        match &*self.phase.borrow() {
            Phase::Running | Phase::Stopping => {}
            Phase::Closed | Phase::Failed(_) => return Err(BarrierError::ShuttingDown),
        }
        if let Some(reason) = self.reader.divergence(self.id) {
            return Err(BarrierError::Quarantined(reason));
        }
        if self.installing.load(Ordering::Acquire) {
            return Err(BarrierError::NotReady("this member is installing a snapshot".into()));
        }
        let applied = self.applied_index();
        if applied == 0 {
            return Err(BarrierError::NotReady(
                "this member is not in its cluster's configuration yet".into(),
            ));
        }
        if applied < self.serve_from_index {
            return Err(BarrierError::NotReady(format!(
                "this member is replaying its log ({applied} of {})",
                self.serve_from_index
            )));
        }
        Ok(())
    }
}

/// The handle. Cheap to clone.
#[derive(Clone)]
pub struct Node {
    shared: Arc<Shared>,
    leader: Arc<LeaderService>,
}

/// Counts a request that waits, as long as it waits.
struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
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

    /// Proposes a command and waits until it is committed and applied here, or `deadline`.
    pub async fn propose(&self, body: Body, idempotency: Option<Idempotency>, deadline: Instant) -> Result<Outcome, ProposeError> {
        self.admit(&body)?;
        let waiting = self.shared.waiting.fetch_add(1, Ordering::Relaxed);
        let _waiting = Waiting(&self.shared.waiting);
        if waiting >= self.shared.max_waiting {
            return Err(ProposeError::Overloaded);
        }
        let command = Command {
            seq: 0,
            idempotency,
            body: Some(body),
        };
        let gate = Arc::new(Gate::default());
        let ttl = deadline.saturating_duration_since(Instant::now());
        let ttl_ticks = (ttl.as_millis() / self.shared.tick.as_millis().max(1)) as u64 + 1;
        let proposal = Proposal {
            body: command.encode_to_vec().into(),
            gate: gate.clone(),
            ttl_ticks,
        };
        let (reply, outcome) = oneshot::channel();
        self.shared.send(Event::Propose {
            proposal,
            reply: Some(reply),
        });
        match tokio::time::timeout_at(deadline, outcome).await {
            Ok(Ok(outcome)) if outcome.result == Err(Refusal::AlreadyApplied) => Err(ProposeError::Timeout),
            Ok(Ok(outcome)) => Ok(outcome),
            Ok(Err(_)) if gate.cancel() => Err(self.stopped_or(ProposeError::NoLeader)),
            Ok(Err(_)) => Err(ProposeError::Timeout),
            Err(_) if gate.cancel() => Err(ProposeError::NoLeader),
            Err(_) => Err(ProposeError::Timeout),
        }
    }

    fn stopped_or(&self, error: ProposeError) -> ProposeError {
        if *self.shared.phase.borrow() == Phase::Running {
            error
        } else {
            ProposeError::ShuttingDown
        }
    }

    /// What refuses a command before it is proposed.
    fn admit(&self, body: &Body) -> Result<(), ProposeError> {
        match self.shared.serving() {
            Ok(()) => {}
            Err(BarrierError::Quarantined(reason)) => return Err(ProposeError::Quarantined(reason)),
            Err(BarrierError::ShuttingDown) => return Err(ProposeError::ShuttingDown),
            // A member that replays or installs takes commands in: they are applied in their turn, and answered then.
            Err(BarrierError::NotReady(_)) if self.shared.applied_index() > 0 => {}
            Err(BarrierError::NotReady(reason)) => return Err(ProposeError::NotReady(reason)),
            Err(BarrierError::NoLeader | BarrierError::Timeout) => {}
        }
        if *self.shared.phase.borrow() != Phase::Running {
            return Err(ProposeError::ShuttingDown);
        }
        if grows(body) { self.shared.check_quota() } else { Ok(()) }
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
        self.leader.call(request, deadline).await
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
            quarantined: self.shared.reader.divergence(self.shared.id),
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
