//! The loop around [`Consensus`]: queues in, effects out. One task, on the thread of the peers, owns the protocol; one thread owns the log,
//! one the state machine, one makes snapshots. This file is the first of them and the wiring of all four.
//!
//! ```text
//!  Node ──propose/read──▶ Driver ──Persist──▶ WAL thread ──Persisted──▶ Driver
//!  peers ──messages─────▶   │    ──messages─▶ Transport ─▶ peers
//!                           └────committed──▶ apply thread ──Applied──▶ Driver, results ─▶ Node
//! ```
//!
//! Queues: events to the driver are unbounded in themselves and bounded at their sources (`raft.proposal_queue` proposals, one gathered
//! read, the transport's windows, one unit per thread below). Work for the WAL thread is bounded by raft: uncommitted bytes, in-flight
//! appends. Work for the apply thread by the protocol: see [`crate::consensus::Options::max_unapplied_bytes`].

mod apply;
mod chores;
mod event;
mod log_size;
mod pace;
#[cfg(test)]
mod tests;
mod wal;
mod watchdog;

use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use bytes::Bytes;
use raft::eraftpb::{Message, MessageType, Snapshot};
use tokio::runtime::Handle;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::JoinHandle;

use log_size::LogSize;
use pace::{Pace, Since};
use watchdog::Watchdog;

pub use apply::ApplyJob;
pub use chores::Chore;
pub use event::{Event, Fatal, Reply, Verdict};
pub use wal::WalJob;

use crate::consensus::log::compaction_point;
use crate::consensus::{Consensus, Effects, Input, Persist, is_answer};
use crate::node::Shared;
use crate::snapshot::SnapshotWriter;
use crate::state::{SnapshotView, State};
use crate::transport::{Peer, SnapshotSource, Transport};
use crate::wal::{LogStart, Wal};

/// Events taken in before effects are drained: bounds the latency of what is already in.
const MAX_EVENTS_PER_ROUND: usize = 4096;
/// Ticks made up for after a pause (a stopped process, a suspended machine): more would only start needless elections.
const MAX_TICKS_MADE_UP: u32 = 3;
/// Followers that do not wait for a commit hear of it with the next append, or after this time.
const ANNOUNCE_AFTER: Duration = Duration::from_millis(2);
/// Bytes of the log kept behind a snapshot for slow followers, whatever `raft.keep_entries` allows.
const MAX_KEPT_BYTES: u64 = 64 << 20;
/// How long an offered snapshot is kept for followers that may ask for it again.
const OFFER_TICKS: u64 = 600;

/// What the driver needs besides the protocol.
pub struct Options {
    /// Length of a tick.
    pub tick: Duration,
    /// Snapshot (or store sync) after so many applied entries.
    pub snapshot_entries: u64,
    /// Entries kept in the log behind it.
    pub keep_entries: u64,
    /// Where snapshot files live.
    pub snapshot_dir: PathBuf,
    /// A log or a state machine that is at one thing for so long hangs: the process ends, so that others lead and this one can be started again.
    pub patience: Duration,
}

/// The task and the threads, to be joined after [`Event::Stop`].
pub struct Threads {
    driver: JoinHandle<()>,
    others: Vec<std::thread::JoinHandle<()>>,
}

impl Threads {
    /// Waits until all of them have ended.
    pub async fn join(self) {
        if let Err(error) = self.driver.await {
            tracing::error!(%error, "the driver ended abnormally");
        }
        let others = self.others;
        let joined = tokio::task::spawn_blocking(move || others.into_iter().all(|thread| thread.join().is_ok()));
        if !matches!(joined.await, Ok(true)) {
            tracing::error!("a thread of the driver ended abnormally");
        }
    }
}

/// A snapshot that followers may have.
struct Offer {
    index: u64,
    view: SnapshotView,
    since_tick: u64,
    streams: usize,
}

/// A snapshot of the leader that is being installed: everything for the WAL waits behind it.
struct Installing {
    persist: Persist,
    deferred: VecDeque<Persist>,
}

impl SnapshotSource for SnapshotWriter {
    fn next_chunk(&mut self) -> std::io::Result<Option<Bytes>> {
        SnapshotWriter::next_chunk(self).map_err(std::io::Error::other)
    }
}

struct Driver {
    core: Consensus,
    shared: Arc<Shared>,
    transport: Transport,
    options: Options,
    events: UnboundedReceiver<Event>,
    wal_tx: Sender<WalJob>,
    apply_tx: Sender<ApplyJob>,
    chore_tx: Sender<Chore>,
    ticks: u64,
    next_tick: Instant,
    log_watch: Watchdog,
    apply_watch: Watchdog,
    /// When those who have not heard of the commit index are told.
    announce_at: Option<Instant>,
    offer: Option<Offer>,
    view_requested: bool,
    /// A snapshot that arrived, until the state machine is at rest.
    arrived: Option<(Message, PathBuf)>,
    received: Option<(LogStart, PathBuf)>,
    installing: Option<Installing>,
    /// Last index that is durable outside the log, and bytes logged since.
    durable_index: u64,
    log_size: LogSize,
    pace: Pace,
    /// Since when a snapshot goes to which member, for the figures.
    sending_since: HashMap<u64, Instant>,
    peers: Vec<Peer>,
    /// The leader that was last published, for the log.
    led_by: u64,
    given_up: bool,
}

/// Starts the driver on `runtime` and the threads around it. `events` is the receiving end of what `shared` sends to.
#[allow(clippy::too_many_arguments, reason = "the wiring of the node: each is a station of its own")]
#[expect(
    clippy::disallowed_methods,
    reason = "these queues are bounded at their sources: see the beginning of this file"
)]
pub fn start(
    core: Consensus,
    wal: Box<dyn Wal>,
    state: State,
    shared: Arc<Shared>,
    transport: Transport,
    options: Options,
    events: UnboundedReceiver<Event>,
    durable_index: u64,
    runtime: &Handle,
) -> std::io::Result<Threads> {
    let (wal_tx, wal_rx) = channel();
    let (apply_tx, apply_rx) = channel();
    let (chore_tx, chore_rx) = channel();
    let wal_thread = wal::spawn(wal, wal_rx, shared.clone())?;
    let apply_thread = apply::spawn(state, apply_rx, shared.clone(), options.snapshot_dir.clone())?;
    let chore_thread = chores::spawn(chore_rx, shared.clone(), options.snapshot_dir.clone())?;
    let now = Instant::now();
    let pace = Pace::new(options.snapshot_entries, snapshot_bytes(&shared));
    let driver = Driver {
        core,
        shared,
        transport,
        next_tick: now + options.tick,
        log_watch: Watchdog::default(),
        apply_watch: Watchdog::default(),
        options,
        events,
        wal_tx,
        apply_tx,
        chore_tx,
        ticks: 0,
        announce_at: None,
        offer: None,
        view_requested: false,
        arrived: None,
        received: None,
        installing: None,
        durable_index,
        log_size: LogSize::default(),
        pace,
        sending_since: HashMap::new(),
        peers: Vec::new(),
        led_by: raft::INVALID_ID,
        given_up: false,
    };
    Ok(Threads {
        driver: runtime.spawn(driver.run()),
        others: vec![wal_thread, apply_thread, chore_thread],
    })
}

/// About the size of a snapshot of the state as it is; 0 where the store only has to be synced.
fn snapshot_bytes(shared: &Shared) -> u64 {
    match shared.store.survives_crashes() {
        true => 0,
        false => shared.reader.logical_bytes(),
    }
}

impl Driver {
    async fn run(mut self) {
        if self.core.view().voters == [self.shared.id] {
            self.core.step(Input::Campaign);
        }
        self.update_peers();
        let mut timer = pin!(tokio::time::sleep_until(self.next_tick.into()));
        loop {
            self.perform();
            let wake_at = self.announce_at.map_or(self.next_tick, |at| at.min(self.next_tick)).into();
            if timer.deadline() != wake_at {
                timer.as_mut().reset(wake_at);
            }
            tokio::select! {
                event = self.events.recv() => match event {
                    Some(event) => if self.take_events(event) {
                        return self.stop();
                    },
                    None => return self.stop(),
                },
                () = &mut timer => {}
            }
            self.make_ticks();
        }
    }

    /// Takes this event and whatever else is queued. `true`: stop.
    fn take_events(&mut self, first: Event) -> bool {
        self.core.set_now(self.shared.now_ms());
        let mut next = Some(first);
        for _ in 0..MAX_EVENTS_PER_ROUND {
            let Some(event) = next.take() else { break };
            if self.handle(event) {
                return true;
            }
            next = self.events.try_recv().ok();
        }
        if let Some(event) = next {
            return self.handle(event);
        }
        false
    }

    fn handle(&mut self, event: Event) -> bool {
        match event {
            // Neither proposed nor answered: the one who waits sees that it never will be.
            Event::Propose { .. } if self.given_up => {}
            Event::Propose { proposal, reply } => {
                let seq = self.core.propose(proposal);
                if let Some(Reply(reply)) = reply {
                    self.shared.replies.lock().insert(seq, reply);
                }
            }
            Event::ReadWanted => {}
            Event::Messages { messages, queued } => {
                drop(queued);
                if let Some(answer) = messages.iter().find(|message| is_answer(message)) {
                    self.shared.note_answered(answer.from);
                }
                for message in messages {
                    self.core.step(Input::Message(message));
                }
            }
            Event::PeersFound(peers) => {
                // Until its first snapshot a joiner does not know where to answer. Afterwards it knows better.
                if self.peers.is_empty() {
                    self.transport.set_peers(peers);
                }
            }
            Event::Persisted(number) => self.handle_persisted(number),
            Event::Applied {
                index,
                cluster_time_ms,
                settled,
            } => {
                self.core.step(Input::Applied {
                    index,
                    cluster_time_ms,
                    settled,
                });
                self.take_arrived_snapshot();
            }
            Event::ConfChange { change, reply } => {
                let result = self.core.apply_conf_change(&change);
                // Before anybody is told that it is done: the next request judges by it.
                self.publish();
                // If nobody waits, the process is ending.
                let _ = reply.send(result);
            }
            Event::ProposeConf { change, reply } => {
                let _ = reply.send(self.core.propose_conf_change(&change));
            }
            Event::Fetched(wish, entries) => self.core.step(Input::Fetched(wish, entries)),
            Event::View { view, for_chore: true } => self.chore(Chore::Durable(view)),
            Event::View { view, for_chore: false } => self.handle_view(*view),
            Event::Backup(reply) => self.to_apply(ApplyJob::Backup(reply)),
            Event::SnapshotReceived { message, file } => self.handle_snapshot_received(message, file),
            Event::SnapshotSent { to, ok } => {
                if let Some(offer) = &mut self.offer {
                    offer.streams = offer.streams.saturating_sub(1);
                    offer.since_tick = self.ticks;
                }
                if let Some(since) = self.sending_since.remove(&to).filter(|_| ok) {
                    self.shared.metrics.snapshots_sent.observe(since.elapsed());
                }
                self.core.step(Input::SnapshotSent { to, ok });
            }
            Event::Installed(start) => self.handle_installed(start),
            Event::Durable { index, bytes } => self.handle_durable(index, bytes),
            Event::Unreachable(peer) => self.core.step(Input::Unreachable(peer)),
            Event::ToldRemoved => self.core.step(Input::ToldRemoved),
            Event::Transfer(to) => self.core.step(Input::TransferLeader(to)),
            Event::GiveUp => {
                self.given_up = true;
                self.shared.replies.lock().clear();
            }
            Event::Stop => return true,
        }
        false
    }

    fn make_ticks(&mut self) {
        if self.announce_at.take_if(|at| *at <= Instant::now()).is_some() {
            self.core.step(Input::Announce);
        }
        let mut made = 0;
        while Instant::now() >= self.next_tick {
            self.next_tick += self.options.tick;
            if made < MAX_TICKS_MADE_UP {
                made += 1;
                self.ticks += 1;
                self.core.step(Input::Tick);
            }
        }
        if made > 0 {
            self.core.set_now(self.shared.now_ms());
            self.after_tick();
        }
    }

    fn after_tick(&mut self) {
        if self
            .offer
            .as_ref()
            .is_some_and(|offer| offer.streams == 0 && self.ticks - offer.since_tick > OFFER_TICKS)
        {
            self.offer = None;
            self.core.step(Input::SnapshotOffered(None));
        }
        self.maybe_make_durable();
        self.update_peers();
        self.check_membership();
        self.check_threads();
        self.publish();
    }

    fn publish(&self) {
        self.shared.publish(
            self.core.view(),
            self.core.progress(),
            self.core.proposals_pending(),
            self.core.stamp().0,
        );
    }

    /// Performs everything that follows from the inputs so far. A read round that ends in it makes room for the next one at once: those
    /// who wait for it have announced themselves already.
    fn perform(&mut self) {
        self.perform_once();
        while self.core.can_begin_read() && self.shared.reads.is_wanted() {
            self.perform_once();
        }
    }

    fn perform_once(&mut self) {
        if self.core.can_begin_read()
            && let Some(token) = self.shared.reads.gather()
        {
            self.core.step(Input::Read(token));
        }
        let effects = self.core.drain();
        let Effects {
            messages,
            persist,
            apply,
            reads,
            fetch,
            snapshot_wanted,
            expired,
            commit_unannounced,
        } = effects;
        self.announce_at = commit_unannounced.then(|| self.announce_at.unwrap_or_else(|| Instant::now() + ANNOUNCE_AFTER));
        self.send(messages);
        for unit in persist {
            self.persist(unit);
        }
        if !apply.is_empty() {
            self.to_apply(ApplyJob::Entries(apply, Instant::now()));
        }
        for (token, index) in reads {
            self.shared.reads.confirm(token, index);
        }
        for wish in fetch {
            self.to_wal(WalJob::Fetch(wish));
        }
        if snapshot_wanted && !self.view_requested {
            self.view_requested = true;
            self.to_apply(ApplyJob::View(false));
        }
        if !expired.is_empty() {
            let mut replies = self.shared.replies.lock();
            for seq in expired {
                replies.remove(&seq);
            }
        }
        self.drop_refused_snapshot();
        self.publish_leadership();
    }

    /// One line when leadership changes, for whoever reads the log.
    fn publish_leadership(&mut self) {
        let (term, leader) = self.core.leadership();
        if !self.shared.publish_leadership((term, leader)) {
            return;
        }
        self.publish();
        if leader == self.shared.id {
            tracing::info!(term, "became leader");
        } else if leader != raft::INVALID_ID {
            tracing::info!(term, leader, "follows a leader");
        } else if self.led_by != raft::INVALID_ID {
            tracing::info!(term, last_leader = self.led_by, "lost its leader");
        }
        self.led_by = leader;
    }

    fn send(&mut self, messages: Vec<Message>) {
        if messages.is_empty() {
            return;
        }
        let (snapshots, others): (Vec<_>, Vec<_>) = messages
            .into_iter()
            .partition(|message| message.get_msg_type() == MessageType::MsgSnapshot);
        for message in snapshots {
            self.send_snapshot(message);
        }
        self.transport.send(others);
    }

    fn send_snapshot(&mut self, message: Message) {
        let index = message.get_snapshot().get_metadata().index;
        match &mut self.offer {
            Some(offer) if offer.index == index => {
                offer.streams += 1;
                self.sending_since.insert(message.to, Instant::now());
                let writer = SnapshotWriter::new(offer.view.fork());
                self.transport.send_snapshot(message, Box::new(writer));
            }
            // Withdrawn meanwhile: raft asks again. Not an event, which would count a stream of the present offer as ended.
            _ => self.core.step(Input::SnapshotSent { to: message.to, ok: false }),
        }
    }

    fn persist(&mut self, unit: Persist) {
        self.log_size.note(&unit.entries);
        if let Some(installing) = &mut self.installing {
            installing.deferred.push_back(unit);
            return;
        }
        let Some(start) = unit.snapshot else {
            return self.to_wal(WalJob::Persist(unit));
        };
        match self.received.take() {
            Some((received, file)) if received == start => {
                self.to_apply(ApplyJob::Install { file, start });
                self.installing = Some(Installing {
                    persist: unit,
                    deferred: VecDeque::new(),
                });
            }
            other => self
                .shared
                .fail(Fatal::new(format!("raft installs snapshot {start:?}, received was {other:?}"))),
        }
    }

    /// The state holds the snapshot durably: now the old log may go (rule 11).
    fn handle_installed(&mut self, start: LogStart) {
        let Some(installing) = self.installing.take() else { return };
        // Its view is of the state that was replaced, and can be read by nobody any more.
        if self.offer.take().is_some() {
            self.core.step(Input::SnapshotOffered(None));
        }
        self.durable_index = start.index;
        self.log_size.forget(start.index);
        // What it replaced is worthless, and takes the room that the next one needs.
        self.chore(Chore::RemoveOlder(start.index));
        self.pace.installed(snapshot_bytes(&self.shared));
        self.to_wal(WalJob::Persist(installing.persist));
        for unit in installing.deferred {
            self.persist(unit);
        }
        self.core.step(Input::Applied {
            index: start.index,
            cluster_time_ms: 0,
            settled: Vec::new(),
        });
    }

    fn handle_persisted(&mut self, number: u64) {
        self.core.step(Input::Persisted(number));
    }

    fn handle_view(&mut self, view: SnapshotView) {
        self.view_requested = false;
        let mut snapshot = Snapshot::default();
        let metadata = snapshot.mut_metadata();
        metadata.index = view.applied.index;
        metadata.term = view.applied.term;
        metadata.set_conf_state(view.applied.conf_state.clone());
        self.offer = Some(Offer {
            index: view.applied.index,
            view,
            since_tick: self.ticks,
            streams: 0,
        });
        self.core.step(Input::SnapshotOffered(Some(snapshot)));
    }

    fn handle_snapshot_received(&mut self, message: Message, file: PathBuf) {
        if self.installing.is_some() || self.received.is_some() || self.arrived.is_some() {
            self.chore(Chore::Remove(file));
            return;
        }
        self.arrived = Some((message, file));
        self.take_arrived_snapshot();
    }

    /// Hands raft the snapshot that arrived, once nothing is on its way to the state machine any more.
    fn take_arrived_snapshot(&mut self) {
        if self.core.is_applying() {
            return;
        }
        let Some((message, file)) = self.arrived.take() else { return };
        let metadata = message.get_snapshot().get_metadata();
        self.received = Some((
            LogStart {
                index: metadata.index,
                term: metadata.term,
            },
            file,
        ));
        self.core.step(Input::Message(message));
    }

    /// A received snapshot that raft did not want (older than what is here): its file goes.
    fn drop_refused_snapshot(&mut self) {
        if let Some((_, file)) = self.received.take() {
            self.chore(Chore::Remove(file));
        }
    }

    /// Makes the state durable outside the log when enough was logged since, so that the log can be cut.
    fn maybe_make_durable(&mut self) {
        let state_bytes = self.shared.reader.logical_bytes();
        let since = Since {
            entries: self.shared.applied_index().saturating_sub(self.durable_index),
            log_bytes: self.log_size.bytes_after(self.durable_index),
            state_bytes,
        };
        let now = Instant::now();
        if self.installing.is_none() && self.pace.is_due(since, self.shared.is_refusing_writes(), now) {
            self.pace.begin(state_bytes, now);
            self.to_apply(ApplyJob::View(true));
        }
    }

    /// The state at `index` outlives a power cut without the log: cut the log behind it, but not what a snapshot under way builds on.
    fn handle_durable(&mut self, index: u64, bytes: u64) {
        self.pace.end((index > 0).then_some(bytes), Instant::now());
        if index == 0 {
            return;
        }
        self.durable_index = self.durable_index.max(index);
        let offered = self.offer.as_ref().map(|offer| offer.index);
        let by_bytes = self.log_size.keep_after(index, MAX_KEPT_BYTES);
        let keep_from = compaction_point(index, self.options.keep_entries, by_bytes, offered);
        let Some(term) = self.core.term_at(keep_from) else { return };
        if keep_from <= self.core.view().log_start.index {
            return;
        }
        let to = LogStart { index: keep_from, term };
        self.log_size.forget(to.index);
        self.core.step(Input::Compacted(to));
        self.to_wal(WalJob::Compact(to));
    }

    fn update_peers(&mut self) {
        let peers = self.shared.admissions.lock().peers(&self.shared.reader, &self.core.leaving());
        if peers != self.peers {
            self.peers.clone_from(&peers);
            self.transport.set_peers(peers);
        }
    }

    /// A disk that neither answers nor fails. A leader would go on with its heartbeats and answer nobody: what is not durable on its own
    /// disk it does not apply, and what is not applied it does not answer. sled 0.34.7 can hang by itself, too: all its writers wait for a
    /// lock whose holder waits for one of them.
    fn check_threads(&mut self) {
        let shared = &self.shared;
        let threads = [
            ("log", &mut self.log_watch, &shared.wal_metrics.turns, shared.wal_engine),
            ("store", &mut self.apply_watch, &shared.apply_turns, shared.store.backend()),
        ];
        for (what, watch, turns, engine) in threads {
            let waited = watch.waited(turns.current(), self.ticks, self.options.tick);
            if waited >= self.options.patience {
                shared.fail(Fatal::new(format!(
                    "the {what} has not finished a write for {} s: its disk, or its engine ({engine}), hangs. Look at the disk, then start the member again; nothing acknowledged is lost",
                    waited.as_secs(),
                )));
            }
        }
    }

    /// A member that was removed, or that lost its log, stops; it must not campaign, vote or serve again.
    fn check_membership(&mut self) {
        if self.core.has_left() {
            self.shared.fail(Fatal::removed(self.shared.id));
        }
        if self.core.has_lost_log() {
            self.shared.fail(Fatal::outdated(format!(
                "the log lacks entries that this member acknowledged to the leader: its data directory is an older copy of itself, or its disk lost what was synced. \
                 Remove the member (metcd member remove {}), and add it anew with an empty data directory",
                self.shared.id,
            )));
        }
    }

    fn stop(mut self) {
        self.perform();
        let unit = Persist {
            hard_state: self.core.take_lazy_hard_state(),
            ..Persist::default()
        };
        self.to_wal(WalJob::Persist(unit));
        self.to_wal(WalJob::Close);
        self.to_apply(ApplyJob::Close);
        self.chore(Chore::Close);
    }

    // A thread that is gone has reported why; the process is ending.
    fn to_wal(&self, job: WalJob) {
        let _ = self.wal_tx.send(job);
    }

    fn to_apply(&self, job: ApplyJob) {
        let _ = self.apply_tx.send(job);
    }

    fn chore(&self, chore: Chore) {
        let _ = self.chore_tx.send(chore);
    }
}
