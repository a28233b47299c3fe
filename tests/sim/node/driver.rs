//! The driver's loop: inputs in, effects performed in the order of their fields. The twin of `src/driver/mod.rs`.

use std::collections::VecDeque;
use std::sync::Arc;

use metcd::consensus::log::compaction_point;
use metcd::consensus::{Effects, Input as Step, Persist};
use metcd::server::admission::{Introduction, MemberTable};
use metcd::snapshot::{self, SnapshotReader};
use metcd::state::SnapshotView;
use metcd::transport::{MEMBER_REMOVED, SenderIdentity};
use metcd::wal::{LogStart, Wal as _};
use raft::eraftpb::{Message, MessageType, Snapshot};

use super::start::{CLUSTER_ID, peer_url};
use super::{ApplyJob, Chore, Failure, Input, Installing, Offer, Process, WalJob};
use crate::network::{Packet, PacketBody};
use crate::plan::MS;
use crate::world::{Event, World};

/// How long an offered snapshot is kept.
const OFFER_TICKS: u64 = 50;
/// Between two tables that strangers are asked for.
const ASK_TICKS: u64 = 2;

impl Process {
    /// Queues an input; the driver takes it now or a little later, together with whatever came meanwhile.
    pub fn enqueue(&mut self, world: &mut World, input: Input) {
        self.inbox.push_back(input);
        if self.is_wake_due {
            return;
        }
        if world.rng.chance(700) {
            self.take_inputs(world);
        } else {
            self.is_wake_due = true;
            let at = world.now + world.rng.skewed(1, 2 * MS);
            world.schedule(
                at,
                Event::Wake {
                    slot: self.slot,
                    boot: self.boot,
                },
            );
        }
    }

    /// The driver takes everything that is queued and performs what follows.
    pub fn take_inputs(&mut self, world: &mut World) {
        self.is_wake_due = false;
        let now_ms = self.now_ms(world);
        self.core.set_now(now_ms);
        while let Some(input) = self.inbox.pop_front() {
            self.handle(world, input);
        }
        self.perform(world);
    }

    fn handle(&mut self, world: &mut World, input: Input) {
        match input {
            Input::Propose { proposal, call } => {
                let seq = self.core.propose(proposal);
                if let Some(call) = call {
                    self.replies.insert(seq, call);
                }
            }
            Input::Message(message) => self.core.step(Step::Message(message)),
            Input::ReadWanted => {}
            Input::Persisted(number) => self.core.step(Step::Persisted(number)),
            Input::Applied {
                index,
                cluster_time_ms,
                settled,
            } => {
                self.core.step(Step::Applied {
                    index,
                    cluster_time_ms,
                    settled,
                });
                self.take_arrived_snapshot();
            }
            Input::ConfChange(change) => self.take_conf(world, &change),
            Input::ProposeConf(change) => {
                // Whether it took effect is seen in the member table, as in the product.
                let answer = self.core.propose_conf_change(&change);
                world.trace(|| format!("n{} proposes a configuration change: {answer:?}", self.id));
            }
            Input::Fetched(wish, entries) => self.core.step(Step::Fetched(wish, entries)),
            Input::View { view, for_chore: true } => self.chore(world, Chore::Durable(view)),
            Input::View { view, for_chore: false } => self.handle_view(*view),
            Input::SnapshotReceived { message, file } => self.handle_snapshot_received(message, file),
            Input::SnapshotSent { to, ok } => {
                if let Some(offer) = &mut self.offer {
                    offer.streams = offer.streams.saturating_sub(1);
                    offer.since_tick = self.ticks;
                }
                self.core.step(Step::SnapshotSent { to, ok });
            }
            Input::Installed(start) => self.handle_installed(world, start),
            Input::Durable { index } => self.handle_durable(world, index),
            Input::Unreachable(peer) => self.core.step(Step::Unreachable(peer)),
            Input::ToldRemoved => self.core.step(Step::ToldRemoved),
            Input::Transfer(to) => self.core.step(Step::TransferLeader(to)),
        }
    }

    /// What leases and cluster time go by.
    pub(super) fn now_ms(&mut self, world: &World) -> u64 {
        self.steady.at(world.clock_ms(self.slot))
    }

    /// A tick of the driver, then what the duties do at it.
    pub fn tick(&mut self, world: &mut World, ticks: u64) {
        if std::mem::take(&mut self.is_commit_unannounced) {
            self.core.step(Step::Announce);
        }
        for _ in 0..ticks {
            self.ticks += 1;
            self.core.step(Step::Tick);
        }
        let now_ms = self.now_ms(world);
        self.core.set_now(now_ms);
        self.after_tick(world);
        self.perform(world);
        if self.failed.is_none() {
            self.run_duties(world);
        }
    }

    fn after_tick(&mut self, world: &mut World) {
        let is_old = |offer: &Offer| offer.streams == 0 && self.ticks - offer.since_tick > OFFER_TICKS;
        if self.offer.as_ref().is_some_and(is_old) {
            self.offer = None;
            self.core.step(Step::SnapshotOffered(None));
        }
        self.maybe_make_durable(world);
        self.peers = self
            .admissions
            .peers(&self.reader, &self.core.leaving())
            .iter()
            .map(|peer| peer.id)
            .collect();
        self.view = self.core.view();
        self.progress = self.core.progress();
        self.cluster_time_ms = self.core.stamp().0;
        if self.core.has_left() {
            self.failed = Some(Failure::Removed);
        }
        if self.core.has_lost_log() {
            self.failed = Some(Failure::Bug("the log lacks what was acknowledged".to_owned()));
        }
    }

    /// Performs everything that follows from the inputs so far. A read round that ends in it makes room for the next one at once.
    pub fn perform(&mut self, world: &mut World) {
        self.perform_once(world);
        while self.failed.is_none() && !self.gathering.is_empty() && self.core.can_begin_read() {
            self.perform_once(world);
        }
    }

    fn perform_once(&mut self, world: &mut World) {
        if self.failed.is_some() {
            return;
        }
        if !self.gathering.is_empty() && self.core.can_begin_read() {
            self.next_token += 1;
            let round = std::mem::take(&mut self.gathering);
            self.asked.insert(self.next_token, round);
            self.core.step(Step::Read(self.next_token));
        }
        let Effects {
            messages,
            persist,
            apply,
            reads,
            fetch,
            snapshot_wanted,
            expired,
            commit_unannounced,
        } = self.core.drain();
        self.is_commit_unannounced = commit_unannounced;
        self.send(world, messages);
        let replaced_from = |unit: &Persist| unit.entries.first().map_or(u64::MAX, |entry| entry.index);
        for (i, unit) in persist.iter().enumerate() {
            let later = persist[i + 1..].iter().map(replaced_from).min().unwrap_or(u64::MAX);
            let kept = unit.entries.iter().filter(|entry| entry.index < later);
            world.oracle.raft.note_appended(&unit.entries);
            world.oracle.raft.note_known(self.id, kept, &self.core);
        }
        for unit in persist {
            self.persist(world, unit);
        }
        if !apply.is_empty() {
            world.oracle.raft.note_committed(self.id, &apply);
            self.to_apply(world, ApplyJob::Entries(apply));
        }
        for (token, index) in reads {
            for waiter in self.asked.remove(&token).unwrap_or_default() {
                self.waiting.push((index, waiter));
            }
        }
        for wish in fetch {
            self.to_wal(world, WalJob::Fetch(wish));
        }
        if snapshot_wanted && !self.is_view_requested {
            self.is_view_requested = true;
            self.to_apply(world, ApplyJob::View(false));
        }
        for seq in expired {
            if let Some(call) = self.replies.remove(&seq) {
                world.give_up(call);
            }
        }
        // A received snapshot that raft did not want goes.
        self.received = None;
        self.publish_leadership(world);
        self.serve_reads(world);
    }

    fn publish_leadership(&mut self, world: &mut World) {
        let now = self.core.leadership();
        if self.leadership != now {
            self.leadership = now;
            self.view = self.core.view();
            world.trace(|| format!("n{} term {} leader {}", self.id, now.0, now.1));
        }
        if self.core.is_leader() && self.core.is_bound() {
            world.oracle.raft.note_leader(self.id, now.0, &self.core);
        }
    }

    fn send(&mut self, world: &mut World, messages: Vec<Message>) {
        for message in messages {
            world.oracle.raft.note_sent(self.id, &message);
            if message.get_msg_type() == MessageType::MsgSnapshot {
                self.send_snapshot(world, message);
            } else {
                let to = message.to;
                self.send_packet(world, to, PacketBody::Raft(message));
            }
        }
    }

    /// Hands something to the transport, which knows the members' addresses.
    pub fn send_packet(&self, world: &mut World, to: u64, body: PacketBody) {
        if self.peers.contains(&to) {
            self.send_to_address(world, to, body);
        }
    }

    /// Sends to an address that somebody named, or answers over the same connection.
    fn send_to_address(&self, world: &mut World, to: u64, body: PacketBody) {
        world.send(Packet {
            from_slot: self.slot,
            from_member: self.id,
            from_incarnation: world.machines[self.slot].incarnation,
            to_member: to,
            body,
        });
    }

    fn send_snapshot(&mut self, world: &mut World, message: Message) {
        let index = message.get_snapshot().get_metadata().index;
        match &mut self.offer {
            Some(offer) if offer.index == index => {
                offer.streams += 1;
                let view = offer.view.fork();
                world.begin_stream(self.slot, self.boot, message, view);
            }
            _ => self.core.step(Step::SnapshotSent { to: message.to, ok: false }),
        }
    }

    /// A packet arrived: who may speak is decided as `src/server/peers.rs` does.
    pub fn receive(&mut self, world: &mut World, packet: Packet) {
        if packet.to_member != self.id {
            return;
        }
        if self.receive_openly(world, &packet) || !self.admits(world, &packet) {
            return;
        }
        match packet.body {
            PacketBody::Raft(message) => self.enqueue(world, Input::Message(message)),
            PacketBody::ToLeader { call, lease } => self.renew_for(world, packet.from_member, call, lease),
            PacketBody::FromLeader { call, ttl_ms, gone } => world.answer_renewal(call, ttl_ms, gone),
            PacketBody::AskWhetherWelcome | PacketBody::Removed | PacketBody::AskMembers | PacketBody::Members(_) => {}
        }
    }

    /// What is not for members alone. `true`: it was that.
    fn receive_openly(&mut self, world: &mut World, packet: &Packet) -> bool {
        match &packet.body {
            PacketBody::Removed => self.enqueue(world, Input::ToldRemoved),
            PacketBody::AskMembers => {
                let table = self.admissions.table(&self.reader, || self.view.clone(), false);
                self.send_to_address(world, packet.from_member, PacketBody::Members(table));
            }
            PacketBody::Members(table) if self.asked_leader.take_if(|leader| *leader == packet.from_member).is_some() => {
                self.admissions.learn_departed(table);
            }
            PacketBody::Members(table) => self.be_introduced(world, packet, table.clone()),
            PacketBody::Raft(_) | PacketBody::AskWhetherWelcome | PacketBody::ToLeader { .. } | PacketBody::FromLeader { .. } => {
                return false;
            }
        }
        true
    }

    fn be_introduced(&mut self, world: &mut World, packet: &Packet, table: MemberTable) {
        // The answer comes over the connection that was made to ask: nobody else can give it.
        if !self.strangers.remove(&(packet.from_member, packet.from_incarnation)) {
            return;
        }
        let from = (packet.from_member, packet.from_incarnation);
        let introduction = self.admissions.introduce(&self.reader, from, table);
        world.trace(|| format!("n{} is introduced to n{}: {introduction:?}", self.id, packet.from_member));
        match introduction {
            Introduction::Accepted => world.stats.introductions += 1,
            Introduction::Removed => self.enqueue(world, Input::ToldRemoved),
            Introduction::Refused(_) => {}
        }
    }

    /// Whether the sender may speak to this member.
    pub fn admits(&mut self, world: &mut World, packet: &Packet) -> bool {
        let url = peer_url(packet.from_member);
        let sender = SenderIdentity {
            cluster_id: CLUSTER_ID,
            member: packet.from_member,
            incarnation: packet.from_incarnation,
            peer_url: Some(&url),
        };
        let is_stranger = self.admissions.wants_introduction(&self.reader, &sender, self.view.is_led);
        if is_stranger && self.ticks >= self.may_ask_at {
            self.may_ask_at = self.ticks + ASK_TICKS;
            self.strangers.insert((packet.from_member, packet.from_incarnation));
            self.send_to_address(world, packet.from_member, PacketBody::AskMembers);
        }
        match self.admissions.admit(&self.reader, &sender, || self.view.clone()) {
            Ok(()) => true,
            Err(refusal) => {
                if refusal.code == MEMBER_REMOVED {
                    self.send_to_address(world, packet.from_member, PacketBody::Removed);
                }
                false
            }
        }
    }

    /// A snapshot arrived completely: it is verified before anything hears of it.
    pub fn receive_snapshot(&mut self, world: &mut World, message: Message, file: Arc<[u8]>) -> bool {
        let announced = message.get_snapshot().get_metadata();
        let (index, term) = (announced.index, announced.term);
        let verified = SnapshotReader::new(&file[..]).and_then(snapshot::verify);
        match verified {
            Ok(meta) if (meta.applied.index, meta.applied.term) == (index, term) => {
                self.enqueue(world, Input::SnapshotReceived { message, file });
                true
            }
            _ => false,
        }
    }

    fn persist(&mut self, world: &mut World, unit: Persist) {
        if let Some(installing) = &mut self.installing {
            installing.deferred.push_back(unit);
            return;
        }
        let Some(start) = unit.snapshot else {
            return self.to_wal(world, WalJob::Persist(unit));
        };
        match self.received.take() {
            Some((received, file)) if received == start => {
                self.clear_log_first(&unit, start);
                self.to_apply(world, ApplyJob::Install { file, start });
                self.installing = Some(Installing {
                    persist: unit,
                    deferred: VecDeque::new(),
                });
            }
            other => {
                let other = other.map(|(start, _)| start);
                self.failed = Some(Failure::Bug(format!("raft installs snapshot {start:?}, received was {other:?}")));
            }
        }
    }

    /// The wrong order, which the simulation has to notice: the log begins anew before the snapshot it begins with is on the disk.
    fn clear_log_first(&mut self, unit: &Persist, start: LogStart) {
        if known_bug!(ClearLogFirst)
            && let Some(hard_state) = &unit.hard_state
            && let Err(error) = self.wal.reset(start, hard_state)
        {
            self.fail_disk(error);
        }
    }

    fn handle_installed(&mut self, world: &mut World, start: LogStart) {
        let Some(installing) = self.installing.take() else { return };
        if self.offer.take().is_some() {
            self.core.step(Step::SnapshotOffered(None));
        }
        self.durable_index = start.index;
        self.chore(world, Chore::RemoveOlder(start.index));
        self.to_wal(world, WalJob::Persist(installing.persist));
        for unit in installing.deferred {
            self.persist(world, unit);
        }
        self.core.step(Step::Applied {
            index: start.index,
            cluster_time_ms: 0,
            settled: Vec::new(),
        });
    }

    fn handle_view(&mut self, view: SnapshotView) {
        self.is_view_requested = false;
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
        self.core.step(Step::SnapshotOffered(Some(snapshot)));
    }

    fn handle_snapshot_received(&mut self, message: Message, file: Arc<[u8]>) {
        if self.installing.is_some() || self.received.is_some() || self.arrived.is_some() {
            return;
        }
        self.arrived = Some((message, file));
        self.take_arrived_snapshot();
    }

    fn take_arrived_snapshot(&mut self) {
        if self.core.is_applying() && !known_bug!(InstallInFront) {
            return;
        }
        let Some((message, file)) = self.arrived.take() else { return };
        let metadata = message.get_snapshot().get_metadata();
        let start = LogStart {
            index: metadata.index,
            term: metadata.term,
        };
        self.received = Some((start, file));
        self.core.step(Step::Message(message));
    }

    fn maybe_make_durable(&mut self, world: &mut World) {
        let applied = self.reader.applied_index();
        let is_due = applied.saturating_sub(self.durable_index) >= world.plan.snapshot_entries;
        if is_due && !self.is_chore_running && self.installing.is_none() {
            self.is_chore_running = true;
            self.to_apply(world, ApplyJob::View(true));
        }
    }

    fn handle_durable(&mut self, world: &mut World, index: u64) {
        self.is_chore_running = false;
        if index == 0 {
            return;
        }
        self.durable_index = self.durable_index.max(index);
        let offered = self.offer.as_ref().map(|offer| offer.index);
        let keep_from = compaction_point(index, world.plan.keep_entries, 0, offered);
        let Some(term) = self.core.term_at(keep_from) else { return };
        if keep_from <= self.core.view().log_start.index {
            return;
        }
        let to = LogStart { index: keep_from, term };
        self.core.step(Step::Compacted(to));
        self.to_wal(world, WalJob::Compact(to));
    }
}
