//! The protocol as a value: PURE. [`Consensus::step`] takes inputs, [`Consensus::drain`] gives the effects that follow from them; no
//! socket, clock, disk, thread or RNG in here. The driver performs effects, the simulator does the same from one seeded queue.
//!
//! *Invariants*
//! - Effects are to be performed in the order of [`Effects`]' fields, and those of one drain before those of the next.
//! - No vote, pre-vote or append reply leaves before what it stands on is durable (rules 2 and 3): such messages come out of
//!   [`Input::Persisted`], never earlier.
//! - Between raft's `ready()` and its `advance_append_async` nothing else is called on the node.
//! - A configuration change that is committed goes to the state machine, and an acknowledgement that covers it leaves, when it is
//!   durable here *that* it is committed. Any other commit index is learned again after a crash; this one perhaps not, since those
//!   whom the old configuration needs may be gone by then.
//! - One ReadIndex round is in flight at a time, each under a context that was never used before (rule 17): raft-rs 0.7 answers a
//!   context that is sent twice with a stale index.

mod announce;
pub(crate) mod fuzzing;
mod leaving;
pub mod log;
pub mod proposals;
mod reads;
mod ready;
mod status;
pub mod validate;

pub use status::View;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use raft::eraftpb::{ConfChangeV2, ConfState, Entry, HardState, Message, MessageType, Snapshot};
use raft::{Error, RawNode, SnapshotStatus, StateRole, Storage};

use crate::state::Applied;
use crate::state::command::Stamp;
use crate::wal::{LogStart, Recovered};
use log::{FetchWish, LogCache};
use proposals::{Proposal, Proposals};
use reads::Reads;
use validate::Implausible;

/// Bytes of commands that are packed into one raft entry.
const MAX_ENTRY_BYTES: usize = 1 << 20;
/// Bytes of the log kept in memory. Larger lags are read back from the WAL.
const MAX_CACHED_BYTES: usize = 16 << 20;
/// Raft refuses proposals while so many bytes are uncommitted.
const MAX_UNCOMMITTED_BYTES: u64 = 128 << 20;
/// Bytes of committed entries given to apply at once.
const MAX_COMMITTED_BYTES: u64 = 8 << 20;

/// Refusals logged in a process's life; further ones only at level debug.
const MAX_REFUSALS_NOTED: usize = 100;

/// What the protocol needs to know; all of it constant.
#[derive(Debug, Clone)]
pub struct Options {
    /// This member.
    pub id: u64,
    /// Its boot id.
    pub boot: u64,
    /// Ticks between heartbeats.
    pub heartbeat_ticks: usize,
    /// T: elections start after [T, 1.4 T) ticks without a leader.
    pub election_ticks: usize,
    /// Append messages in flight to one follower.
    pub max_inflight: usize,
    /// Bytes of one append message.
    pub max_message_bytes: u64,
    /// How long the leader goes on with a removed member that does not acknowledge its removal.
    pub linger_ticks: u64,
    /// Bytes of entries that may wait for the state machine in memory. Beyond it a follower takes no appends in, as if they were lost
    /// on the way, and a leader hands nothing over: both go on as soon as the state machine does.
    pub max_unapplied_bytes: usize,
    /// Seed of the election timeouts.
    pub seed: u64,
}

/// The log as it was found: what the WAL recovered, the terms of everything in it and its tail from the applied index on.
#[derive(Debug, Clone, Default)]
pub struct LogImage {
    /// As the WAL gave it.
    pub recovered: Recovered,
    /// (first index, term) of each run of equal terms.
    pub term_runs: Vec<(u64, u64)>,
    /// Entries after the applied index at least, up to the last one.
    pub tail: Vec<Entry>,
}

/// Why a node cannot start from what is on its disk (rule 7).
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the fields say what they are")]
pub enum StartError {
    /// The state is ahead of the log.
    #[error(
        "the state has applied index {applied}, but the log ends at {last}: the log lost data. Remove this member and add it again under a new id"
    )]
    StateAhead { applied: u64, last: u64 },
    /// The log begins after the state ends.
    #[error(
        "the state has applied index {applied}, but the log begins after {start}: the store lost data. Remove this member and add it again under a new id"
    )]
    StateBehind { applied: u64, start: u64 },
    /// They disagree about the past.
    #[error("the state applied index {index} in term {state_term}, the log has it in term {log_term}: they are not of one history")]
    TermMismatch { index: u64, state_term: u64, log_term: u64 },
    /// Raft refused.
    #[error("raft: {0}")]
    Raft(#[from] Error),
}

/// Inputs.
#[derive(Debug)]
#[expect(missing_docs, reason = "the fields say what they are")]
pub enum Input {
    /// One tick passed.
    Tick,
    /// A message of a peer, admitted by the transport. Snapshots come the same way once their data is complete and verified.
    Message(Message),
    /// Reads gathered under this token want an index.
    Read(u64),
    /// The WAL has made the batch of this number, and all before, durable.
    Persisted(u64),
    /// The state machine stands here; these sequences of this member are settled.
    Applied {
        index: u64,
        cluster_time_ms: u64,
        settled: Vec<u64>,
    },
    /// Entries that were wished for.
    Fetched(FetchWish, Vec<Entry>),
    /// A snapshot to offer to followers (metadata only), or none any more.
    SnapshotOffered(Option<Snapshot>),
    /// The stream to a follower ended.
    SnapshotSent { to: u64, ok: bool },
    /// A peer could not be reached.
    Unreachable(u64),
    /// The log is (about to be) compacted up to here; the driver orders the WAL to do it.
    Compacted(LogStart),
    /// Hand leadership to this member.
    TransferLeader(u64),
    /// A peer says that this member was removed and that nobody needs it: see [`Consensus::has_left`].
    ToldRemoved,
    /// Tell those who have not heard of the commit index; the driver's answer to [`Effects::commit_unannounced`].
    Announce,
    /// Start an election now (a sole voter does at start).
    Campaign,
}

/// Why a configuration change was not proposed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConfRefused {
    /// This member does not lead (or is handing leadership over).
    NotLeader,
    /// Another change is pending, or nothing of this term is applied yet.
    Busy,
}

/// One unit for the WAL.
#[derive(Debug, Default)]
pub struct Persist {
    /// Comes back as [`Input::Persisted`].
    pub number: u64,
    /// Install the snapshot received under this (index, term) first, and begin the log anew after it.
    pub snapshot: Option<LogStart>,
    /// Entries to append.
    pub entries: Vec<Entry>,
    /// Hard state to note.
    pub hard_state: Option<HardState>,
}

/// What is to be done, in this order.
#[derive(Debug, Default)]
pub struct Effects {
    /// Send now.
    pub messages: Vec<Message>,
    /// Make durable, then report.
    pub persist: Vec<Persist>,
    /// Committed entries for the state machine.
    pub apply: Vec<Entry>,
    /// Reads (tokens) that may be answered once this index is applied.
    pub reads: Vec<(u64, u64)>,
    /// Entries to fetch from the WAL.
    pub fetch: Vec<FetchWish>,
    /// Some followers have not heard of the commit index: unless an append goes out soon, step [`Input::Announce`].
    pub commit_unannounced: bool,
    /// A follower needs a snapshot: offer one.
    pub snapshot_wanted: bool,
    /// Own proposals whose deadline passed: nobody waits for them any more.
    pub expired: Vec<u64>,
}

/// Whether its sender has heard of this member: it answers something that was sent to it.
pub fn is_answer(message: &Message) -> bool {
    matches!(
        message.get_msg_type(),
        MessageType::MsgAppendResponse
            | MessageType::MsgHeartbeatResponse
            | MessageType::MsgRequestVoteResponse
            | MessageType::MsgRequestPreVoteResponse
    )
}

/// The protocol.
pub struct Consensus {
    options: Options,
    node: RawNode<LogCache>,
    proposals: Proposals,
    reads: Reads,
    tick: u64,
    now_ms: u64,
    /// Tick at which each peer was last heard of.
    heard: BTreeMap<u64, u64>,
    /// Tick at which each peer last answered, which shows that it is reached: one that only sends may have a wrong address, or a firewall.
    /// Raft's own note of it is wiped once per election timeout, so it says "never" for a moment.
    answered: BTreeMap<u64, u64>,
    /// Counts campaigns: a failed pre-vote does not move the term, and two nodes must not draw equal timeouts for ever.
    attempt: u64,
    /// Messages that wait for a batch to be durable, by its number.
    held: VecDeque<(u64, Vec<Message>)>,
    /// Numbers of Readies that await durability: (number, needs the WAL).
    unpersisted: VecDeque<(u64, bool)>,
    /// Term and vote as raft last gave them.
    promised: (u64, u64),
    /// The Ready that last moved them, until it is durable.
    moving: Option<u64>,
    /// A hard state that only moved its commit index: goes with the next batch, no sync of its own, unless a configuration change is
    /// committed by it.
    lazy_hard_state: Option<HardState>,
    /// The highest commit index that was looked through for configuration changes.
    noted_commit: u64,
    /// The Ready that committed a configuration change, until it is durable that it is committed; committed entries wait for that.
    conf_gate: Option<u64>,
    gated: Vec<Entry>,
    /// Committed entries up to here were taken from raft for the state machine.
    handed_index: u64,
    /// The state machine stands here; raft is told as soon as its log is durable that far.
    applied_index: u64,
    /// Cluster time as the state knows it, and the base of this leader's clock: (state's time, own time) at its first applied entry of the term.
    cluster_time_ms: u64,
    leader_clock: Option<(u64, u64, u64)>,
    announcements: announce::Announcements,
    leaving: leaving::Leaving,
    /// Refusals that were logged.
    refused: BTreeSet<(u64, Implausible)>,
    /// See [`has_lost_log`](Self::has_lost_log).
    has_lost_log: bool,
    effects: Effects,
}

impl Consensus {
    /// Starts from what the disk holds; checks that log and state are of one history (rule 7).
    pub fn start(
        options: Options,
        image: LogImage,
        applied: Applied,
        cluster_time_ms: u64,
        logger: &slog::Logger,
    ) -> Result<Consensus, StartError> {
        let start = image.recovered.start;
        let last = image.recovered.last_index;
        if applied.index > last {
            return Err(StartError::StateAhead {
                applied: applied.index,
                last,
            });
        }
        if applied.index < start.index {
            return Err(StartError::StateBehind {
                applied: applied.index,
                start: start.index,
            });
        }
        let mut hard_state = image.recovered.hard_state;
        hard_state.commit = hard_state.commit.max(applied.index).min(last);
        if mutant!(ForgetVote) {
            hard_state.vote = 0;
        }
        let promised = (hard_state.term, hard_state.vote);
        let noted_commit = hard_state.commit;
        let mut conf_state = applied.conf_state.clone();
        if mutant!(LearnerVotes) {
            conf_state.voters.append(&mut conf_state.learners);
        }
        let cache = LogCache::new(hard_state, conf_state, start, image.term_runs, image.tail);
        let log_term = cache.term(applied.index)?;
        if log_term != applied.term {
            return Err(StartError::TermMismatch {
                index: applied.index,
                state_term: applied.term,
                log_term,
            });
        }
        let node = RawNode::new(&raft_config(&options, applied.index), cache, logger)?;
        let mut consensus = Consensus {
            proposals: Proposals::new(options.id, options.boot),
            reads: Reads::new(options.id, options.boot),
            options,
            node,
            tick: 0,
            now_ms: 0,
            heard: BTreeMap::new(),
            answered: BTreeMap::new(),
            attempt: 0,
            held: VecDeque::new(),
            unpersisted: VecDeque::new(),
            promised,
            moving: None,
            lazy_hard_state: None,
            noted_commit,
            conf_gate: None,
            gated: Vec::new(),
            handed_index: applied.index,
            applied_index: applied.index,
            cluster_time_ms,
            leader_clock: None,
            announcements: announce::Announcements::default(),
            leaving: leaving::Leaving::default(),
            refused: BTreeSet::new(),
            has_lost_log: false,
            effects: Effects::default(),
        };
        consensus.note_own_membership();
        consensus.draw_election_timeout();
        Ok(consensus)
    }

    /// Takes one input. Effects are collected until [`drain`](Self::drain).
    pub fn step(&mut self, input: Input) {
        match input {
            Input::Tick => self.handle_tick(),
            Input::Message(message) => self.handle_message(message),
            Input::Read(token) => self.reads.add(token),
            Input::Persisted(number) => self.handle_persisted(number),
            Input::Applied {
                index,
                cluster_time_ms,
                settled,
            } => self.handle_applied(index, cluster_time_ms, &settled),
            Input::Fetched(wish, entries) => {
                self.node.mut_store().fetched(entries);
                self.node.on_entries_fetched(wish.context);
            }
            Input::SnapshotOffered(snapshot) => self.node.mut_store().offer_snapshot(snapshot),
            Input::SnapshotSent { to, ok } => {
                let status = if ok { SnapshotStatus::Finish } else { SnapshotStatus::Failure };
                self.node.report_snapshot(to, status);
            }
            Input::Unreachable(peer) => self.node.report_unreachable(peer),
            Input::Compacted(to) => self.node.mut_store().compact(to),
            Input::ToldRemoved => self.handle_told_removed(),
            Input::Announce => self.announce_to_all(),
            Input::TransferLeader(to) => self.node.transfer_leader(to),
            Input::Campaign => {
                if let Err(error) = self.node.campaign() {
                    tracing::debug!(%error, "campaign refused");
                }
            }
        }
        self.draw_election_timeout();
    }

    /// The current time of the driver's monotonic clock; only differences count.
    pub fn set_now(&mut self, now_ms: u64) {
        self.now_ms = self.now_ms.max(now_ms);
        self.proposals.set_now(self.now_ms);
    }

    /// Adds a proposal and tells its sequence.
    pub fn propose(&mut self, proposal: Proposal) -> u64 {
        self.proposals.add(proposal, self.tick)
    }

    /// Proposes a configuration change; only on the leader, and only if none is pending: raft would swallow a second one (rule 21).
    /// Returns the index at which it was appended; it took effect only if that very entry, in this term, is applied.
    pub fn propose_conf_change(&mut self, change: &ConfChangeV2) -> Result<(u64, u64), ConfRefused> {
        let raft = &self.node.raft;
        if raft.state != StateRole::Leader || raft.lead_transferee.is_some() {
            return Err(ConfRefused::NotLeader);
        }
        let leaving = change.changes.is_empty();
        if raft.has_pending_conf()
            || !raft.apply_to_current_term()
            || (raft.prs().conf().to_conf_state().voters_outgoing.is_empty() == leaving)
        {
            return Err(ConfRefused::Busy);
        }
        let term = raft.term;
        let context = self.stamp().encode().to_vec();
        match self.node.propose_conf_change(context, change.clone()) {
            Ok(()) => {
                if mutant!(ConfAtAppend) {
                    // Raft's answer does not matter to a bug.
                    let _ = self.node.apply_conf_change(change);
                }
                Ok((self.node.raft.raft_log.last_index(), term))
            }
            Err(_) => Err(ConfRefused::Busy),
        }
    }

    /// To be called exactly when the state machine applies the entry (rule 22).
    pub fn apply_conf_change(&mut self, change: &ConfChangeV2) -> Result<ConfState, Error> {
        let before = self.matched_before_change();
        let conf_state = self.node.apply_conf_change(change)?;
        self.note_departures(before);
        self.note_own_membership();
        // A snapshot from before the change does not name a member that it added, and raft refuses a snapshot that does not name the receiver.
        if !mutant!(OldOffer) {
            self.node.mut_store().offer_snapshot(None);
        }
        let raft = &mut self.node.raft;
        if raft.state == StateRole::Leader && !raft.promotable() && !mutant!(RemovedLeader) {
            // raft-rs lets a leader that was removed go on, and panics at the next acknowledgement.
            raft.become_follower(raft.term, raft::INVALID_ID);
        }
        self.draw_election_timeout();
        Ok(conf_state)
    }

    /// The leader counts on entries that are not here: the log is not the one that acknowledged them (an older copy of the data directory, or
    /// a disk that lost what it had synced). No votes and no acknowledgements any more, rule 9: they would count twice.
    pub fn has_lost_log(&self) -> bool {
        self.has_lost_log
    }

    /// Entries are on their way to the state machine. A snapshot waits for them: taken in now it would be installed in front of them,
    /// and a configuration change among them would be applied to the snapshot's configuration, which has it already.
    pub fn is_applying(&self) -> bool {
        self.handed_index > self.applied_index
    }

    /// Everything that follows from the inputs since the last call.
    pub fn drain(&mut self) -> Effects {
        self.run_leader_clock();
        self.hand_over_proposals();
        self.begin_read_round();
        self.handle_readies();
        self.announce_to_waiting();
        self.handle_readies();
        self.draw_election_timeout();
        let store = self.node.mut_store();
        self.effects.fetch = store.take_fetch_wishes();
        self.effects.snapshot_wanted |= store.take_snapshot_wish();
        std::mem::take(&mut self.effects)
    }

    fn handle_readies(&mut self) {
        while self.node.has_ready() {
            self.handle_ready();
        }
    }

    fn handle_tick(&mut self) {
        self.tick += 1;
        if self.has_lost_log {
            return;
        }
        let expired = self.proposals.expire(self.tick);
        self.effects.expired.extend(expired);
        let raft = &self.node.raft;
        if self.resubmission_is_safe() {
            let patience = self.options.election_ticks as u64;
            self.proposals.requeue(raft.term, self.tick, patience);
        }
        let heartbeat_ticks = self.options.heartbeat_ticks.max(2) as u64;
        let most = 2 * (self.options.election_ticks as u64).max(heartbeat_ticks);
        self.reads.handle_tick(self.tick, 2 * heartbeat_ticks, most);
        let raft = &self.node.raft;
        if raft.state != StateRole::Leader && raft.raft_log.persisted < raft.raft_log.last_index() && raft.prs().is_singleton() {
            // raft-rs asserts that a new leader's log is durable; a sole voter elects itself within one call.
            return;
        }
        let campaigning = |raft: &raft::Raft<LogCache>| matches!(raft.state, StateRole::PreCandidate | StateRole::Candidate);
        if self.is_installing() && raft.election_elapsed + 1 >= raft.randomized_election_timeout() {
            // As long as it would have waited, so that it holds nobody else back.
            self.node.raft.election_elapsed = self.options.election_ticks.max(raft.election_elapsed);
        } else if self.node.tick() && campaigning(&self.node.raft) {
            self.attempt += 1;
        }
        self.announce_to_all();
        self.accompany_the_departing();
        let settled = self.applied_index.min(self.node.raft.raft_log.persisted);
        self.node.mut_store().trim(settled, MAX_CACHED_BYTES);
    }

    /// A snapshot has taken the log's place, and is not durable and applied yet. Whoever stands for election now makes raft-rs 0.7 look for
    /// configuration changes in entries that the snapshot covers, which it cannot find: it panics.
    fn is_installing(&self) -> bool {
        self.node
            .store()
            .first_index()
            .is_ok_and(|first| self.node.raft.raft_log.applied + 1 < first)
    }

    /// A new leader's first entry is applied: whatever survived of the old terms is applied before it, so that what still waits now
    /// is truly to be proposed again.
    fn resubmission_is_safe(&self) -> bool {
        self.node.raft.leader_id != raft::INVALID_ID && self.node.raft.apply_to_current_term()
    }

    fn handle_message(&mut self, mut message: Message) {
        if self.has_lost_log {
            return;
        }
        if let Err(reason) = validate::check(&self.node, &message) {
            self.has_lost_log |= reason == validate::LOST_LOG;
            let kind = message.get_msg_type();
            // Once per sender and reason: some come with every heartbeat.
            if self.refused.len() < MAX_REFUSALS_NOTED && self.refused.insert((message.from, reason)) {
                tracing::warn!(from = message.from, ?kind, %reason, "refused a raft message");
            } else {
                tracing::debug!(from = message.from, ?kind, %reason, "refused a raft message");
            }
            return;
        }
        self.heard.insert(message.from, self.tick);
        if is_answer(&message) {
            self.answered.insert(message.from, self.tick);
        }
        self.note_departing(&message);
        if message.get_msg_type() == MessageType::MsgTimeoutNow && self.is_installing() {
            return;
        }
        let brings_entries =
            matches!(message.get_msg_type(), MessageType::MsgAppend | MessageType::MsgPropose) && !message.entries.is_empty();
        if brings_entries && self.is_apply_behind() {
            return;
        }
        if message.get_msg_type() == MessageType::MsgPropose {
            self.stamp_entries(&mut message);
        }
        let (kind, from) = (message.get_msg_type(), message.from);
        match self.node.step(message) {
            Ok(()) if kind == MessageType::MsgPropose => self.announcements.forwarded(from, self.node.raft.raft_log.last_index()),
            Ok(()) => {}
            Err(error) => tracing::debug!(%error, ?kind, "raft did not step a message"),
        }
    }

    fn handle_persisted(&mut self, number: u64) {
        let mut upto = number;
        while let Some(&(next, needs_wal)) = self.unpersisted.front() {
            if next > number && needs_wal {
                break;
            }
            upto = upto.max(next);
            self.unpersisted.pop_front();
        }
        self.node.on_persist_ready(upto);
        self.moving.take_if(|moving| *moving <= upto);
        if self.conf_gate.take_if(|gate| *gate <= upto).is_some() {
            self.effects.apply.append(&mut self.gated);
        }
        while self.held.front().is_some_and(|&(held, _)| held <= upto) {
            if let Some((_, messages)) = self.held.pop_front() {
                self.effects.messages.extend(messages);
            }
        }
        self.advance_apply();
    }

    fn handle_applied(&mut self, index: u64, cluster_time_ms: u64, settled: &[u64]) {
        self.applied_index = self.applied_index.max(index);
        self.advance_apply();
        self.cluster_time_ms = self.cluster_time_ms.max(cluster_time_ms);
        for &seq in settled {
            self.proposals.settle(seq);
        }
    }

    /// Raft insists that what is applied is durable in its log; after a snapshot the state machine may be ahead of that for a moment.
    fn advance_apply(&mut self) {
        let log = &self.node.raft.raft_log;
        let reachable = self.applied_index.min(log.persisted).min(log.committed);
        if reachable > log.applied {
            self.node.advance_apply_to(reachable);
        }
    }

    fn run_leader_clock(&mut self) {
        let raft = &self.node.raft;
        if raft.state != StateRole::Leader {
            self.leader_clock = None;
            return;
        }
        if raft.apply_to_current_term() && self.leader_clock.is_none_or(|(term, _, _)| term != raft.term) {
            self.leader_clock = Some((raft.term, self.cluster_time_ms, self.now_ms));
        }
    }

    /// Cluster time: the last applied stamp, plus this leader's monotonic time since it applied its first entry of the term.
    /// Before that it stands still. No wall clock enters.
    pub fn stamp(&self) -> Stamp {
        match self.leader_clock {
            Some((_, base_ms, since_ms)) => Stamp(self.cluster_time_ms.max(base_ms + self.now_ms.saturating_sub(since_ms))),
            None => Stamp(self.cluster_time_ms),
        }
    }

    fn stamp_entries(&self, message: &mut Message) {
        let stamp = self.stamp().encode();
        for entry in message.mut_entries() {
            entry.context = stamp.clone();
        }
    }

    /// More waits for the state machine than is to be held in memory. What is applied leaves the cache down to [`MAX_CACHED_BYTES`], so
    /// what is above has not been.
    fn is_apply_behind(&self) -> bool {
        self.node.store().cached_bytes() > MAX_CACHED_BYTES + self.options.max_unapplied_bytes
    }

    fn hand_over_proposals(&mut self) {
        if self.is_leader() && self.is_apply_behind() {
            return;
        }
        if !self.proposals.has_queued() || self.node.raft.leader_id == raft::INVALID_ID || self.node.raft.lead_transferee.is_some() {
            return;
        }
        let term = self.node.raft.term;
        // A follower's entries are a message of their own each and have a longer way: they do not wait for each other.
        if self.is_leader() && self.proposals.is_gathering(self.tick) {
            return;
        }
        while let Some((data, seqs)) = self.proposals.pack(MAX_ENTRY_BYTES, term, self.tick) {
            let context = self.stamp().encode().to_vec();
            if self.node.propose(context, data).is_err() {
                self.proposals.dropped(&seqs);
                return;
            }
        }
    }

    /// Whether a read handed in now would be sent at once: the moment to gather all that wait.
    pub fn can_begin_read(&self) -> bool {
        self.reads.is_idle() && self.takes_reads()
    }

    /// Before the first commit in the term raft-rs drops the request silently (rule 19): what an earlier leader acknowledged may be ahead
    /// of the commit index that a new one knows.
    fn takes_reads(&self) -> bool {
        let raft = &self.node.raft;
        raft.leader_id != raft::INVALID_ID && (raft.commit_to_current_term() || mutant!(ReadInAnyTerm))
    }

    fn begin_read_round(&mut self) {
        let raft = &self.node.raft;
        let takes_reads = self.takes_reads();
        self.reads.watch_leader(raft.term, raft.leader_id);
        if takes_reads && let Some(context) = self.reads.begin_round(self.tick) {
            if mutant!(ReadInAnyTerm) && self.is_leader() && !self.node.raft.commit_to_current_term() {
                let index = self.node.raft.raft_log.committed;
                self.effects.reads.extend(self.reads.finish_round(&context, index));
                return;
            }
            if mutant!(ReadWithoutQuorum) {
                let index = self.applied_index;
                self.effects.reads.extend(self.reads.finish_round(&context, index));
                return;
            }
            self.node.read_index(context);
        }
    }

    fn draw_election_timeout(&mut self) {
        let base = self.options.election_ticks as u64;
        let draw = mix(&[self.options.seed, self.options.id, self.node.raft.term, self.attempt]) % election_spread(base);
        self.node.raft.set_randomized_election_timeout((base + draw) as usize);
    }
}

/// Election timeouts are drawn from [T, 1.4 T).
fn election_spread(base_ticks: u64) -> u64 {
    (base_ticks * 2 / 5).max(1)
}

/// A well-mixed number out of several (splitmix64's finaliser over their sum).
fn mix(parts: &[u64]) -> u64 {
    parts.iter().fold(0x9e37_79b9_7f4a_7c15, |state, &part| {
        let mut z = state ^ part.wrapping_add(0x9e37_79b9_7f4a_7c15).wrapping_add(state << 6);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    })
}

/// raft-rs' defaults are unsafe or unbounded in several places: everything that matters is set.
fn raft_config(options: &Options, applied_index: u64) -> raft::Config {
    raft::Config {
        id: options.id,
        election_tick: options.election_ticks,
        heartbeat_tick: options.heartbeat_ticks,
        min_election_tick: options.election_ticks,
        max_election_tick: options.election_ticks + election_spread(options.election_ticks as u64) as usize + 1,
        applied: applied_index,
        max_size_per_msg: options.max_message_bytes,
        max_inflight_msgs: options.max_inflight,
        check_quorum: true,
        pre_vote: true,
        read_only_option: raft::ReadOnlyOption::Safe,
        skip_bcast_commit: true,
        batch_append: true,
        priority: 0,
        max_uncommitted_size: MAX_UNCOMMITTED_BYTES,
        max_committed_size_per_ready: MAX_COMMITTED_BYTES,
    }
}
