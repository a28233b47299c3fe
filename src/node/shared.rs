//! What the threads of a node share.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;

use crate::consensus::View;
use crate::datadir;
use crate::driver::{Event, Fatal};
use crate::leader::clock::LeaseClock;
use crate::server::admission::Admissions;
use crate::state::StateReader;
use crate::state::command::HashReport;
use crate::store::KvStore;

use super::{Applied, BarrierError, Histogram, PeerProgress, ProposeError, ReadGate, SteadyClock, WalMetrics, turns::Turns};

/// A report so long after another one does not go on from it: it may be from an earlier time as the leader.
const SAME_SERIES_WITHIN: Duration = Duration::from_secs(5);

/// What a member said of its attempts to send to this one.
pub(super) struct Unreached {
    /// For how long they have failed.
    age: Duration,
    /// Since when it has said so with every answer.
    since: std::time::Instant,
    told: std::time::Instant,
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
    /// What the apply thread is at; nothing while it installs a snapshot, which takes as long as the snapshot is large.
    pub(crate) apply_turns: Turns,
    /// What the other threads did.
    pub metrics: NodeMetrics,
    pub(crate) replies: Mutex<HashMap<u64, oneshot::Sender<Applied>>>,
    pub(crate) reads: ReadGate,
    /// When a member last answered: it was reached then, and reached this one.
    pub(super) answered: Mutex<HashMap<u64, std::time::Instant>>,
    /// Since when members cannot send to this one, and when they said so.
    pub(super) unreached: Mutex<HashMap<u64, Unreached>>,
    pub(super) events: tokio::sync::mpsc::UnboundedSender<Event>,
    pub(super) published: RwLock<Arc<Published>>,
    pub(super) leadership: watch::Sender<(u64, u64)>,
    pub(super) phase: watch::Sender<Phase>,
    pub(super) waiting: Arc<AtomicUsize>,
    pub(super) max_waiting: usize,
    pub(super) tick: Duration,
    /// Nothing is served below this applied index: what was committed before the last stop is replayed first (rule 19).
    pub(super) serve_from_index: u64,
    pub(super) installing: AtomicBool,
    pub(super) hash_report: Mutex<Option<HashReport>>,
    pub(super) write_refusal: RwLock<Option<String>>,
    pub(super) max_store_bytes: u64,
    pub(crate) wal_engine: &'static str,
    pub(super) started: std::time::Instant,
    /// Read together with the clock it follows.
    pub(super) steady: Mutex<SteadyClock>,
    /// By how much it is behind that one.
    pub(super) leapt_ms: AtomicU64,
    /// Who may speak to this member.
    pub(crate) admissions: Mutex<Admissions>,
    /// When leases end; runs only while this member leads.
    pub(crate) lease_clock: Mutex<LeaseClock>,
}

/// Figures of the driver's threads, besides those of the WAL.
#[derive(Debug, Default)]
pub struct NodeMetrics {
    /// Batches of committed entries in the state machine and the store.
    pub applies: Histogram,
    /// Making the state durable outside the log: a snapshot file, or a sync of a store on disk.
    pub snapshots_written: Histogram,
    /// Snapshots sent to other members, to their end.
    pub snapshots_sent: Histogram,
    /// Snapshots of a leader put in place of the state.
    pub snapshots_installed: Histogram,
    /// How often another leader, or none, was known than before.
    pub leader_changes: AtomicU64,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Published {
    pub(super) view: View,
    pub(super) peers: Vec<PeerProgress>,
    pub(super) proposals_pending: usize,
    pub(super) cluster_time_ms: u64,
}

/// Where the process is in its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Phase {
    /// Serving.
    Running,
    /// Asked to stop: no new work.
    Stopping,
    /// The same, and what waits for a quorum is answered without one.
    GivenUp,
    /// Stopped in order.
    Closed,
    /// Cannot go on.
    Failed(Fatal),
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
    pub events: tokio::sync::mpsc::UnboundedSender<Event>,
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
    /// Who may speak to this member.
    pub admissions: Admissions,
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
            apply_turns: Turns::default(),
            metrics: NodeMetrics::default(),
            replies: Mutex::default(),
            reads: ReadGate::default(),
            answered: Mutex::default(),
            unreached: Mutex::default(),
            events: parts.events,
            published: RwLock::new(Arc::new(published)),
            leadership: watch::Sender::new(leadership),
            phase: watch::Sender::new(Phase::Running),
            waiting: Arc::default(),
            max_waiting: parts.max_waiting,
            tick: parts.tick,
            serve_from_index: parts.serve_from_index,
            installing: AtomicBool::new(false),
            hash_report: Mutex::default(),
            write_refusal: RwLock::new(None),
            max_store_bytes: parts.max_store_bytes,
            wal_engine: parts.wal_engine,
            started: std::time::Instant::now(),
            steady: Mutex::new(SteadyClock::new(0, parts.tick.as_millis() as u64)),
            leapt_ms: AtomicU64::new(0),
            admissions: Mutex::new(parts.admissions),
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

    /// Ends this member if the cluster knows of a start of it, `known`, that this data directory does not: it is an older copy of
    /// itself, and lacks what that start has acknowledged (rule 9). Returns whether it is.
    pub(crate) fn ends_as_outdated(&self, known: u64) -> bool {
        let is_outdated = datadir::is_outdated(self.boot, known);
        if is_outdated {
            self.fail(Fatal::outdated(format!(
                "the data directory is an older copy of itself: the cluster knows of a later start of this member, and counts on what it acknowledged then. \
                 Remove the member (metcd member remove {}), and add it anew with an empty data directory",
                self.id,
            )));
        }
        is_outdated
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

    /// There is no quorum any more: whoever waits for one is answered with what is known. Only for a member that stops.
    pub fn give_up(&self) {
        self.phase.send_if_modified(|phase| {
            let stopping = *phase == Phase::Stopping;
            if stopping {
                *phase = Phase::GivenUp;
            }
            stopping
        });
        self.reads.close();
        self.send(Event::GiveUp);
    }

    /// Resolves when nothing that waits for a quorum is waited for any more.
    pub async fn given_up(&self) {
        let is_over = |phase: &Phase| !matches!(phase, Phase::Running | Phase::Stopping);
        // An error means that the node is gone altogether.
        let _ = self.phases().wait_for(is_over).await;
    }

    /// Everything has ended; the peers need not be heard any more.
    pub fn close(&self) {
        self.phase.send_if_modified(|phase| {
            let stopping = matches!(phase, Phase::Stopping | Phase::GivenUp);
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

    /// `limits.max_store_bytes`; 0 is no limit.
    pub fn max_store_bytes(&self) -> u64 {
        self.max_store_bytes
    }

    /// Whether writes are refused because the disk is nearly full.
    pub fn is_refusing_writes(&self) -> bool {
        self.write_refusal.read().is_some()
    }

    pub(super) fn check_quota(&self) -> Result<(), ProposeError> {
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

    /// The own report that the log does not have yet: proposed again until it does.
    pub(crate) fn due_hash_report(&self) -> Option<HashReport> {
        let mut report = self.hash_report.lock();
        report.take_if(|report| !self.reader.lacks_hash_report(report));
        report.clone()
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
            if now.1 != leadership.1 {
                self.metrics.leader_changes.fetch_add(1, Ordering::Relaxed);
            }
            *now = leadership;
            changed
        })
    }

    /// A message of this member that answers one of this member's arrived now.
    pub(crate) fn note_answered(&self, member: u64) {
        self.answered.lock().insert(member, std::time::Instant::now());
    }

    /// Whether this member answered since then. One reaches oneself always.
    pub(crate) fn answered_since(&self, member: u64, since: std::time::Instant) -> bool {
        member == self.id || self.answered.lock().get(&member).is_some_and(|&at| at >= since)
    }

    /// This member says, in an answer, that it has not been able to send to this one for so long; `None`: that it is.
    pub(crate) fn note_unreached(&self, member: u64, age: Option<Duration>) {
        let mut unreached = self.unreached.lock();
        let Some(age) = age else {
            unreached.remove(&member);
            return;
        };
        let told = std::time::Instant::now();
        let before = unreached.get(&member).filter(|report| report.told.elapsed() < SAME_SERIES_WITHIN);
        let since = before.map_or(told, |report| report.since);
        unreached.insert(member, Unreached { age, since, told });
    }

    /// The members that cannot send to this one for twice `patience`, and have said so for `patience`: whoever was stopped with its members
    /// hears of it once, from before it went on. A report is repeated with every answer; one that is older than `patience` says nothing any more.
    pub(crate) fn unreached_by(&self, patience: Duration) -> Vec<u64> {
        let mut unreached = self.unreached.lock();
        unreached.retain(|_, report| report.told.elapsed() <= patience);
        let lasting = unreached
            .iter()
            .filter(|(_, report)| report.age >= 2 * patience && report.told.duration_since(report.since) >= patience);
        lasting.map(|(&member, _)| member).collect()
    }

    /// The protocol as it was at the last tick.
    pub fn view(&self) -> View {
        self.published.read().view.clone()
    }

    /// Whether this member leads or heard its leader within the last election timeout, as of the last tick.
    pub(crate) fn is_led(&self) -> bool {
        self.published.read().view.is_led
    }

    /// The leader's knowledge of the members as of the last tick; empty elsewhere.
    pub fn peers(&self) -> Vec<PeerProgress> {
        self.published.read().peers.clone()
    }

    /// Cluster time as of the last tick.
    pub fn cluster_time_ms(&self) -> u64 {
        self.published.read().cluster_time_ms
    }

    /// Milliseconds that have passed for certain by this process's monotonic clock: what leases and cluster time go by.
    pub fn now_ms(&self) -> u64 {
        let mut steady = self.steady.lock();
        let shown_ms = self.started.elapsed().as_millis() as u64;
        let passed_ms = steady.at(shown_ms);
        let leapt_ms = shown_ms.saturating_sub(passed_ms);
        let before_ms = self.leapt_ms.swap(leapt_ms, Ordering::Relaxed);
        drop(steady);
        if leapt_ms > before_ms {
            tracing::warn!(
                ms = leapt_ms - before_ms,
                "this member stood still, or its clock leapt: leases and idempotency records last so much longer if it leads"
            );
        }
        passed_ms
    }

    /// When [`Self::now_ms`] was this, for figures.
    pub(super) fn moment_of(&self, now_ms: u64) -> std::time::Instant {
        self.started + Duration::from_millis(now_ms.saturating_add(self.leapt_ms.load(Ordering::Relaxed)))
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

    pub(super) async fn barrier(&self) -> Result<(), BarrierError> {
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
        if index == 0 && !self.reads.is_closed() {
            confirmed.await;
            index = round.index.load(Ordering::Acquire);
        }
        if index == 0 {
            return Err(BarrierError::ShuttingDown);
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

    /// Why this member does not serve, or why nobody takes writes: the members' states differ.
    pub(crate) fn quarantine(&self) -> Option<String> {
        self.reader.divergence(self.id).or_else(|| self.reader.disagreement())
    }

    /// Why nothing may be answered from this member's state now, or that it may.
    pub(super) fn serving(&self) -> Result<(), BarrierError> {
        match &*self.phase.borrow() {
            Phase::Running | Phase::Stopping | Phase::GivenUp => {}
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
