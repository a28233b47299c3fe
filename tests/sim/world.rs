//! The world of one seed: machines, links, clients and one queue of events. One thread; the order of events is the order of their times,
//! and among equals that of their making. So a seed has one history.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::Arc;

use metcd::snapshot::{SnapshotError, SnapshotWriter};
use metcd::state::{SnapshotView, StateError};
use raft::eraftpb::{ConfState, Message};

use crate::calls::{Answer, Calls};
use crate::clients::Client;
use crate::faults::Cure;
use crate::machine::{Machine, Trap};
use crate::network::{Network, Packet, PacketBody};
use crate::node::{Failure, Input, Process, founding_snapshot};
use crate::oracle::Oracle;
use crate::plan::{MS, Micros, Plan, SECOND, Settings, TICK};
use crate::rng::Rng;
use crate::stats::Stats;
use crate::watching::Watching;

/// What is going to happen.
#[derive(Debug)]
pub enum Event {
    Tick { slot: usize, boot: u64 },
    Wake { slot: usize, boot: u64 },
    Synced { slot: usize, boot: u64 },
    Apply { slot: usize, boot: u64 },
    Chore { slot: usize, boot: u64 },
    ConfDone { slot: usize, boot: u64, conf_state: ConfState },
    Deliver(Box<Packet>),
    Unreachable { slot: usize, boot: u64, peer: u64 },
    Stream { stream: u64 },
    Start { slot: usize },
    Crash { slot: usize, boot: u64 },
    PowerCut { slot: usize, boot: u64 },
    Request { call: u64 },
    CallTimeout { call: u64 },
    Answer { client: usize, call: u64, answer: Answer },
    Act { client: usize },
    Retry { client: usize },
    Watch { watch: usize },
    Admin,
    Fault,
    Cure(Cure),
}

struct Due {
    at: Micros,
    number: u64,
    event: Event,
}

impl PartialEq for Due {
    fn eq(&self, other: &Due) -> bool {
        (self.at, self.number) == (other.at, other.number)
    }
}
impl Eq for Due {}
impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Due) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Due {
    fn cmp(&self, other: &Due) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

/// A snapshot on its way.
struct Stream {
    from: usize,
    boot: u64,
    message: Message,
    writer: SnapshotWriter,
    sent: Vec<u8>,
}

/// Everything.
pub struct World {
    pub settings: Settings,
    pub plan: Plan,
    pub rng: Rng,
    pub now: Micros,
    queue: BinaryHeap<Reverse<Due>>,
    scheduled: u64,
    pub machines: Vec<Machine>,
    pub network: Network,
    pub clients: Vec<Client>,
    pub watches: Vec<Watching>,
    pub calls: Calls,
    streams: BTreeMap<u64, Stream>,
    last_stream: u64,
    pub oracle: Oracle,
    pub stats: Stats,
    pub is_healed: bool,
    /// The hash of the whole trace.
    pub trace_hash: u64,
    pub violation: Option<String>,
    pub last_value: u64,
}

impl World {
    pub fn new(settings: Settings) -> World {
        let mut rng = Rng::new(settings.seed);
        let plan = Plan::new(&settings, &mut rng);
        let network = Network::new(&plan);
        let mut world = World {
            settings,
            rng,
            now: 0,
            queue: BinaryHeap::new(),
            scheduled: 0,
            machines: Vec::new(),
            network,
            clients: (0..plan.clients).map(|_| Client::default()).collect(),
            watches: Vec::new(),
            calls: Calls::default(),
            streams: BTreeMap::new(),
            last_stream: 0,
            oracle: Oracle::default(),
            stats: Stats::default(),
            is_healed: false,
            trace_hash: 0xcbf2_9ce4_8422_2325,
            violation: None,
            last_value: 0,
            plan,
        };
        world.found();
        world
    }

    fn found(&mut self) {
        let snapshot = founding_snapshot(self.plan.founders);
        for _ in 0..self.plan.founders {
            let slot = self.add_machine();
            self.machines[slot].snapshots.insert(1, snapshot.clone());
            let at = self.rng.range(0, 500 * MS);
            self.schedule(at, Event::Start { slot });
        }
        for client in 0..self.clients.len() {
            let at = self.rng.range(0, 3 * SECOND);
            self.schedule(at, Event::Act { client });
        }
        for _ in 0..2 {
            self.add_watch();
        }
        self.schedule(5 * SECOND, Event::Admin);
        self.schedule(3 * SECOND, Event::Fault);
    }

    /// A machine with an empty disk, not started.
    pub fn add_machine(&mut self) -> usize {
        let slot = self.machines.len();
        self.machines.push(Machine {
            member: slot as u64 + 1,
            incarnation: self.rng.next() | 1,
            ..Machine::default()
        });
        slot
    }

    pub fn schedule(&mut self, at: Micros, event: Event) {
        self.scheduled += 1;
        self.queue.push(Reverse(Due {
            at: at.max(self.now),
            number: self.scheduled,
            event,
        }));
    }

    pub fn faults_are_on(&self) -> bool {
        !self.is_healed && self.now < self.settings.faults_until
    }

    /// A line of the trace.
    pub fn trace(&self, line: impl FnOnce() -> String) {
        if self.settings.trace {
            println!("{:>12.6} {}", self.now as f64 / 1e6, line());
        }
    }

    /// The first thing that must not be; the run ends with it.
    pub fn violation(&mut self, what: String) {
        self.trace(|| format!("VIOLATION {what}"));
        self.violation.get_or_insert(what);
    }

    fn mix(&mut self, values: &[u64]) {
        for value in values {
            self.trace_hash = (self.trace_hash ^ value).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(29);
        }
    }

    /// Lets everything happen until then, or until something must not be.
    pub fn run_until(&mut self, end: Micros) {
        while self.violation.is_none() {
            match self.queue.peek() {
                Some(Reverse(due)) if due.at <= end => {}
                Some(_) | None => break,
            }
            let Some(Reverse(due)) = self.queue.pop() else { break };
            self.now = due.at;
            self.stats.events += 1;
            self.mix(&[due.at, due.number]);
            self.happen(due.event);
            if self.violation.is_none()
                && let Some(fault) = self.oracle.raft.take_fault()
            {
                self.violation(fault);
            }
            if self.violation.is_none()
                && let Some(fault) = self.oracle.take_fault()
            {
                self.violation(fault);
            }
        }
        self.now = self.now.max(end);
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Tick { slot, boot } => self.tick(slot, boot),
            Event::Wake { slot, boot } => self.at_process(slot, boot, event, |process, world| process.take_inputs(world)),
            Event::Synced { slot, boot } => self.at_process(slot, boot, event, |process, world| process.synced(world)),
            Event::Apply { slot, boot } => self.at_process(slot, boot, event, |process, world| process.apply_step(world)),
            Event::ConfDone {
                slot,
                boot,
                ref conf_state,
            } => {
                let conf_state = conf_state.clone();
                self.at_process(slot, boot, event, |process, world| process.answer_conf(world, conf_state));
            }
            Event::Chore { slot, boot } => self.at_process(slot, boot, event, |process, world| process.finish_chore(world)),
            Event::Unreachable { slot, boot, peer } => self.at_process(slot, boot, event, |process, world| {
                process.enqueue(world, Input::Unreachable(peer));
            }),
            Event::Deliver(packet) => self.deliver(*packet),
            Event::Stream { stream } => self.continue_stream(stream),
            Event::Start { slot } => self.start(slot),
            Event::Crash { slot, boot } => self.crash_at_point(slot, boot),
            Event::PowerCut { slot, boot } => self.cut_power(slot, boot),
            Event::Request { call } => self.deliver_request(call),
            Event::CallTimeout { call } => self.call_timeout(call),
            Event::Answer { client, call, answer } => self.hear(client, call, answer),
            Event::Act { client } => self.act(client),
            Event::Retry { client } => self.ask_again_now(client),
            Event::Watch { watch } => self.poll_watch(watch),
            Event::Admin => self.administer(),
            Event::Fault => self.strike(),
            Event::Cure(cure) => self.cure(cure),
        }
    }

    // ---- processes

    /// Hands the process in this slot out together with the world; afterwards sees whether it lives.
    pub fn with_process(&mut self, slot: usize, act: impl FnOnce(&mut Process, &mut World)) {
        let Some(mut process) = self.machines[slot].process.take() else {
            return;
        };
        act(&mut process, self);
        match process.failed.take() {
            None => self.machines[slot].process = Some(process),
            Some(failure) => {
                self.machines[slot].process = Some(process);
                self.end_process(slot, failure);
            }
        }
    }

    /// For an event of a certain start of a process. One that stands still gets it when it goes on.
    fn at_process(&mut self, slot: usize, boot: u64, event: Event, act: impl FnOnce(&mut Process, &mut World)) {
        let machine = &mut self.machines[slot];
        if machine.boot != boot || machine.process.is_none() {
            return;
        }
        if machine.is_paused {
            machine.stalled.push(event);
            return;
        }
        self.with_process(slot, act);
    }

    fn tick(&mut self, slot: usize, boot: u64) {
        let machine = &self.machines[slot];
        if machine.boot != boot || machine.process.is_none() {
            return;
        }
        let at = self.now + machine.clock.real(TICK);
        self.schedule(at, Event::Tick { slot, boot });
        if !self.machines[slot].is_paused {
            self.with_process(slot, |process, world| process.tick(world, 1));
        }
    }

    pub fn clock_ms(&self, slot: usize) -> u64 {
        self.machines[slot].clock.now_ms(self.now)
    }

    /// How long a sync takes now.
    pub fn sync_duration(&mut self, slot: usize) -> Micros {
        let (low, high) = self.plan.sync;
        let machine = &self.machines[slot];
        let factor = match machine.trap {
            // Longer than the process lives.
            Trap::Sprung => return 10 * SECOND,
            Trap::None | Trap::Set | Trap::Entered if machine.is_slow => 50,
            Trap::None | Trap::Set | Trap::Entered => 1,
        };
        self.rng.skewed(low, high + 1) * factor
    }

    fn start(&mut self, slot: usize) {
        let machine = &mut self.machines[slot];
        if machine.process.is_some() || machine.is_gone {
            return;
        }
        let seed = self.settings.seed;
        match Process::start(machine, &self.plan, seed, self.now, &mut self.oracle.raft) {
            Ok(process) => {
                let (member, boot) = (machine.member, machine.boot);
                machine.process = Some(Box::new(process));
                self.trace(|| format!("n{member} starts, boot {boot}"));
                self.schedule(self.now + 1, Event::Wake { slot, boot });
                let at = self.now + self.rng.range(1, TICK);
                self.schedule(at, Event::Tick { slot, boot });
            }
            Err(failure) => {
                let (member, is_damaged) = (machine.member, machine.is_damaged);
                machine.is_gone = true;
                self.trace(|| format!("n{member} does not start: {failure:?}"));
                if !is_damaged {
                    self.violation(format!("n{member} does not start, though its disk was not damaged: {failure:?}"));
                }
            }
        }
    }

    /// A process ends by itself.
    fn end_process(&mut self, slot: usize, failure: Failure) {
        let member = self.machines[slot].member;
        self.trace(|| format!("n{member} ends: {failure:?}"));
        match failure {
            Failure::Removed => {
                self.kill(slot, usize::MAX);
                self.machines[slot].is_gone = true;
                self.stats.removed += 1;
                if !self.oracle.removals.contains(&member) {
                    self.violation(format!("n{member} believes that it was removed, and it was not"));
                }
            }
            Failure::Disk(_) => {
                self.kill(slot, usize::MAX);
                let at = self.now + self.rng.range(SECOND, 5 * SECOND);
                self.schedule(at, Event::Start { slot });
            }
            Failure::Bug(what) => self.violation(format!("n{member} stopped: {what}")),
        }
    }

    /// The process is gone; of the log's unsynced bytes the first `keep` survive.
    pub fn kill(&mut self, slot: usize, keep: usize) {
        self.drop_calls_of(slot);
        let machine = &mut self.machines[slot];
        machine.process = None;
        machine.is_paused = false;
        machine.crash_points = 0;
        machine.stalled.clear();
        machine.disk.crash(keep);
        self.close_watches_of(slot);
    }

    // ---- packets

    pub fn send(&mut self, packet: Packet) {
        let Some(to) = (packet.to_member as usize).checked_sub(1).filter(|&to| to < self.machines.len()) else {
            return;
        };
        self.stats.messages += 1;
        let from = packet.from_slot;
        let delays = self.network.route(from, to, &mut self.rng);
        let is_dead = self.machines[to].process.is_none();
        if (is_dead || delays.is_empty()) && matches!(packet.body, PacketBody::Raft(_)) && self.rng.chance(300) {
            let boot = self.machines[from].boot;
            let at = self.now + self.rng.skewed(MS, SECOND);
            let peer = packet.to_member;
            self.schedule(at, Event::Unreachable { slot: from, boot, peer });
        }
        if is_dead {
            return;
        }
        for delay in delays {
            let at = self.now + delay;
            self.schedule(at, Event::Deliver(Box::new(packet.clone())));
        }
    }

    fn deliver(&mut self, packet: Packet) {
        let slot = packet.to_member as usize - 1;
        if let PacketBody::Raft(message) = &packet.body {
            self.mix(&[message.get_msg_type() as u64, message.from, message.to, message.term, message.index]);
            if self.settings.trace {
                self.trace(|| crate::trace::message(message));
            }
        }
        let machine = &mut self.machines[slot];
        if machine.process.is_none() {
            return;
        }
        if machine.is_paused {
            machine.stalled.push(Event::Deliver(Box::new(packet)));
            return;
        }
        self.with_process(slot, |process, world| process.receive(world, packet));
    }

    // ---- snapshots on their way

    pub fn begin_stream(&mut self, from: usize, boot: u64, message: Message, view: SnapshotView) {
        if let Err(fault) = crate::oracle::raft::check_offer(&message, &view) {
            return self.violation(fault);
        }
        self.last_stream += 1;
        let stream = self.last_stream;
        self.streams.insert(
            stream,
            Stream {
                from,
                boot,
                message,
                writer: SnapshotWriter::new(view),
                sent: Vec::new(),
            },
        );
        let at = self.now + self.network.delay(&mut self.rng);
        self.schedule(at, Event::Stream { stream });
    }

    fn continue_stream(&mut self, id: u64) {
        let Some(mut stream) = self.streams.remove(&id) else { return };
        let from = stream.from;
        let to = stream.message.to as usize - 1;
        if self.machines[from].boot != stream.boot || self.machines[from].process.is_none() {
            return;
        }
        let is_broken = self.network.is_cut(from, to)
            || self.machines.get(to).is_none_or(|machine| machine.process.is_none())
            || self.rng.chance(if self.faults_are_on() { 20 } else { 0 });
        if is_broken {
            return self.report_stream(&stream, false);
        }
        match stream.writer.next_chunk() {
            Ok(Some(piece)) => {
                stream.sent.extend_from_slice(&piece);
                self.streams.insert(id, stream);
                let at = self.now + self.network.delay(&mut self.rng);
                self.schedule(at, Event::Stream { stream: id });
            }
            Ok(None) => {
                let file: Arc<[u8]> = std::mem::take(&mut stream.sent).into();
                let message = stream.message.clone();
                let mut is_taken = false;
                let packet = Packet {
                    from_slot: from,
                    from_member: from as u64 + 1,
                    from_incarnation: self.machines[from].incarnation,
                    to_member: message.to,
                    body: PacketBody::Raft(Message::default()),
                };
                if !self.machines[to].is_paused {
                    self.with_process(to, |process, world| {
                        is_taken =
                            !world.machines[to].is_full && process.admits(world, &packet) && process.receive_snapshot(world, message, file);
                    });
                }
                self.report_stream(&stream, is_taken);
            }
            // The sender had a snapshot installed meanwhile.
            Err(SnapshotError::State(StateError::Replaced)) => self.report_stream(&stream, false),
            Err(error) => self.violation(format!("a snapshot cannot be streamed: {error}")),
        }
    }

    /// A snapshot's sender always reports (rule 28).
    fn report_stream(&mut self, stream: &Stream, ok: bool) {
        let to = stream.message.to;
        let (slot, boot) = (stream.from, stream.boot);
        let machine = &mut self.machines[slot];
        if machine.boot != boot {
            return;
        }
        self.with_process(slot, |process, world| process.enqueue(world, Input::SnapshotSent { to, ok }));
    }
}
