//! A few [`Consensus`] values with a wire, logs and state machines between them, all of it in the test's hands: nothing happens but
//! what the test lets happen, and [`Cluster::settle`] lets everything happen that is not held back.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use metcd::consensus::proposals::{Gate, Proposal};
use metcd::consensus::{ConfRefused, Consensus, Effects, Input, LogImage, Options, Persist, StartError, View};
use metcd::state::Applied;
use metcd::state::command::{Body, Command, Delete, EntryPayload};
use metcd::wal::{LogStart, Recovered};
use prost::Message as _;
use protobuf::Message as _;
use raft::eraftpb::{ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2, ConfState, Entry, EntryType, HardState};
use raft::eraftpb::{Message, MessageType};

pub const ELECTION_TICKS: u64 = 10;
pub const HEARTBEAT_TICKS: u64 = 1;
pub const LINGER_TICKS: u64 = 100;
pub const MAX_UNAPPLIED_BYTES: usize = 4 << 20;

/// Rounds of messages within one moment: nobody talks for ever.
const MAX_ROUNDS: usize = 1_000;

/// What a member's disk holds.
#[derive(Clone, Default)]
pub struct Disk {
    pub entries: BTreeMap<u64, Entry>,
    pub hard_state: HardState,
}

/// One member.
pub struct Member {
    id: u64,
    boot: u64,
    pub core: Consensus,
    pub disk: Disk,
    /// Units that wait for a sync.
    pub unsynced: VecDeque<Persist>,
    /// Committed entries that wait for the state machine.
    pub unapplied: VecDeque<Entry>,
    pub applied: Vec<Entry>,
    /// No sync returns.
    pub holds_syncs: bool,
    /// Nothing is applied.
    pub holds_applies: bool,
}

pub struct Cluster {
    pub members: BTreeMap<u64, Member>,
    wire: VecDeque<Message>,
    /// Everything that was sent, whether it arrives or not.
    pub sent: Vec<Message>,
    cut: BTreeSet<(u64, u64)>,
    founders: ConfState,
    next_boot: u64,
}

pub fn options(id: u64, boot: u64) -> Options {
    Options {
        id,
        boot,
        heartbeat_ticks: HEARTBEAT_TICKS as usize,
        election_ticks: ELECTION_TICKS as usize,
        max_inflight: 64,
        max_message_bytes: 1 << 20,
        linger_ticks: LINGER_TICKS,
        max_unapplied_bytes: MAX_UNAPPLIED_BYTES,
        seed: id,
    }
}

/// Starts from a disk and a state that was applied up to here.
pub fn start(options: Options, disk: &Disk, applied: Applied) -> Result<Consensus, StartError> {
    let mut term_runs: Vec<(u64, u64)> = Vec::new();
    for entry in disk.entries.values() {
        if term_runs.last().is_none_or(|&(_, term)| term != entry.term) {
            term_runs.push((entry.index, entry.term));
        }
    }
    let image = LogImage {
        recovered: Recovered {
            hard_state: disk.hard_state.clone(),
            start: LogStart { index: 1, term: 1 },
            last_index: disk.entries.last_key_value().map_or(1, |(&index, _)| index),
        },
        term_runs,
        tail: disk.entries.values().cloned().collect(),
    };
    let logger = slog::Logger::root(slog::Discard, slog::o!());
    Consensus::start(options, image, applied, 0, &logger)
}

/// Index 1, where every cluster begins.
pub fn founded(conf_state: ConfState) -> Applied {
    Applied {
        index: 1,
        term: 1,
        conf_state,
    }
}

pub fn founding_disk() -> Disk {
    Disk {
        entries: BTreeMap::new(),
        hard_state: HardState {
            term: 1,
            commit: 1,
            ..HardState::default()
        },
    }
}

pub fn change_of(changes: &[(ConfChangeType, u64)]) -> ConfChangeV2 {
    let single = |&(kind, node_id): &(ConfChangeType, u64)| ConfChangeSingle {
        change_type: kind,
        node_id,
        ..ConfChangeSingle::default()
    };
    let mut change = ConfChangeV2::default();
    change.set_transition(ConfChangeTransition::Auto);
    change.set_changes(changes.iter().map(single).collect::<Vec<_>>().into());
    change
}

pub fn removal(id: u64) -> ConfChangeV2 {
    change_of(&[(ConfChangeType::RemoveNode, id)])
}

impl Cluster {
    /// These voters, and nobody leads.
    pub fn of(voters: &[u64]) -> Cluster {
        let mut cluster = Cluster {
            members: BTreeMap::new(),
            wire: VecDeque::new(),
            sent: Vec::new(),
            cut: BTreeSet::new(),
            founders: ConfState::from((voters.to_vec(), Vec::new())),
            next_boot: 0,
        };
        for &id in voters {
            cluster.start(id, founding_disk());
        }
        cluster
    }

    /// These voters, and `leader` leads.
    pub fn led_by(leader: u64, voters: &[u64]) -> Cluster {
        let mut cluster = Cluster::of(voters);
        cluster.campaign(leader);
        // The others hear of the commit of its first entry.
        cluster.tick(1);
        assert!(cluster.member(leader).core.is_leader());
        cluster
    }

    pub fn campaign(&mut self, id: u64) {
        self.member(id).core.step(Input::Campaign);
        self.settle();
    }

    fn start(&mut self, id: u64, disk: Disk) {
        self.next_boot += 1;
        let core = start(options(id, self.next_boot), &disk, founded(self.founders.clone())).expect("starts");
        let member = Member {
            id,
            boot: self.next_boot,
            core,
            disk,
            unsynced: VecDeque::new(),
            unapplied: VecDeque::new(),
            applied: Vec::new(),
            holds_syncs: false,
            holds_applies: false,
        };
        self.members.insert(id, member);
    }

    /// What was not synced is lost; the state begins at index 1 again and is made anew from the log.
    pub fn restart(&mut self, id: u64) {
        let disk = self.member(id).disk.clone();
        self.start(id, disk);
        self.settle();
    }

    pub fn member(&mut self, id: u64) -> &mut Member {
        self.members.get_mut(&id).expect("a member")
    }

    pub fn view(&mut self, id: u64) -> View {
        self.member(id).core.view()
    }

    /// Nothing goes between the two any more.
    pub fn cut(&mut self, one: u64, other: u64) {
        self.cut.extend([(one, other), (other, one)]);
    }

    /// Nothing gets from the one to the other any more.
    pub fn cut_one_way(&mut self, from: u64, to: u64) {
        self.cut.insert((from, to));
    }

    pub fn isolate(&mut self, id: u64) {
        for other in self.members.keys().copied().collect::<Vec<_>>() {
            self.cut(id, other);
        }
    }

    pub fn heal(&mut self) {
        self.cut.clear();
    }

    /// Time passes for everybody.
    pub fn tick(&mut self, ticks: u64) {
        for _ in 0..ticks {
            for member in self.members.values_mut() {
                member.core.step(Input::Tick);
            }
            self.settle();
        }
    }

    /// Time passes until one of these leads.
    pub fn elect(&mut self, candidates: &[u64]) -> u64 {
        for _ in 0..10 * ELECTION_TICKS {
            self.tick(1);
            if let Some(&leader) = candidates
                .iter()
                .find(|&&id| self.members.get(&id).is_some_and(|member| member.core.is_leader()))
            {
                return leader;
            }
        }
        panic!("none of {candidates:?} is elected");
    }

    /// A command of this member; its sequence.
    pub fn propose(&mut self, id: u64) -> u64 {
        self.propose_bytes(id, 1)
    }

    /// A command of this size.
    pub fn propose_bytes(&mut self, id: u64, bytes: usize) -> u64 {
        let delete = Delete {
            key: vec![0; bytes].into(),
            ..Delete::default()
        };
        let command = Command {
            body: Some(Body::Delete(delete)),
            ..Command::default()
        };
        let proposal = Proposal {
            body: command.encode_to_vec().into(),
            gate: Arc::new(Gate::default()),
            ttl_ticks: 1_000,
        };
        let seq = self.member(id).core.propose(proposal);
        self.settle();
        seq
    }

    pub fn change(&mut self, leader: u64, change: &ConfChangeV2) -> Result<(u64, u64), ConfRefused> {
        let proposed = self.member(leader).core.propose_conf_change(change);
        self.settle();
        proposed
    }

    /// Messages sent by `from` since the test last cleared [`Cluster::sent`].
    pub fn sent_by(&self, from: u64, kind: MessageType) -> Vec<&Message> {
        let is_it = |message: &&Message| message.from == from && message.get_msg_type() == kind;
        self.sent.iter().filter(is_it).collect()
    }

    /// One round of work for everybody, and the messages that came of it arrive. `false`: there was nothing.
    pub fn step_all(&mut self) -> bool {
        let mut has_worked = false;
        for id in self.members.keys().copied().collect::<Vec<_>>() {
            has_worked |= self.work(id);
        }
        while let Some(message) = self.wire.pop_front() {
            has_worked = true;
            let is_cut = self.cut.contains(&(message.from, message.to));
            if let Some(member) = self.members.get_mut(&message.to).filter(|_| !is_cut) {
                member.core.step(Input::Message(message));
            }
        }
        has_worked
    }

    /// Until nothing is left to be done but what is held back.
    pub fn settle(&mut self) {
        for _ in 0..MAX_ROUNDS {
            if !self.step_all() {
                return;
            }
        }
        let last: Vec<&Message> = self.sent.iter().rev().take(6).collect();
        panic!("the members never come to rest; last sent: {last:?}");
    }

    /// Performs what follows from a member's inputs. `true`: something did.
    fn work(&mut self, id: u64) -> bool {
        let member = self.members.get_mut(&id).expect("a member");
        let Effects {
            messages,
            persist,
            apply,
            fetch,
            ..
        } = member.core.drain();
        let mut has_worked = !messages.is_empty() || !persist.is_empty() || !apply.is_empty() || !fetch.is_empty();
        self.sent.extend(messages.iter().cloned());
        self.wire.extend(messages);
        member.unsynced.extend(persist);
        member.unapplied.extend(apply);
        for wish in fetch {
            let entries = member
                .disk
                .entries
                .range(wish.low..wish.high)
                .map(|(_, entry)| entry.clone())
                .collect();
            member.core.step(Input::Fetched(wish, entries));
        }
        if !member.holds_syncs {
            has_worked |= member.sync();
        }
        if !member.holds_applies {
            has_worked |= member.apply();
        }
        has_worked
    }
}

impl Member {
    /// Everything that waits becomes durable, in order.
    fn sync(&mut self) -> bool {
        let has_work = !self.unsynced.is_empty();
        while let Some(unit) = self.unsynced.pop_front() {
            assert!(unit.snapshot.is_none(), "no log is short enough here to need a snapshot");
            if let Some(first) = unit.entries.first() {
                self.disk.entries.split_off(&first.index);
            }
            self.disk.entries.extend(unit.entries.into_iter().map(|entry| (entry.index, entry)));
            if let Some(hard_state) = unit.hard_state {
                self.disk.hard_state = hard_state;
            }
            self.core.step(Input::Persisted(unit.number));
        }
        has_work
    }

    /// The state machine: it keeps the entries, and hands configuration changes to raft in their turn (rule 22).
    fn apply(&mut self) -> bool {
        let has_work = !self.unapplied.is_empty();
        while let Some(entry) = self.unapplied.pop_front() {
            let mut settled = Vec::new();
            if entry.get_entry_type() == EntryType::EntryNormal {
                let payload = EntryPayload::decode(&*entry.data).unwrap_or_default();
                if (payload.member, payload.boot) == (self.id, self.boot) {
                    settled.extend(payload.commands.iter().map(|command| command.seq));
                }
            } else {
                let change = ConfChangeV2::parse_from_bytes(&entry.data).expect("a change");
                self.core.apply_conf_change(&change).expect("raft takes what is committed");
            }
            let index = entry.index;
            self.applied.push(entry);
            self.core.step(Input::Applied {
                index,
                cluster_time_ms: 0,
                settled,
            });
        }
        has_work
    }
}
