//! The promises of Raft (thesis, figure 3.2), checked at every event: one leader a term, one vote a term, log matching, leader
//! completeness, and state machine safety: no committed entry is ever another one. And of durability: what is committed is on the
//! synced disks of a majority of the voters.

use std::collections::{BTreeMap, BTreeSet};

use metcd::consensus::Consensus;
use metcd::state::SnapshotView;
use metcd::wal::LogStart;
use raft::eraftpb::{ConfState, Entry, EntryType, Message, MessageType};

/// An entry on its way to a disk.
#[derive(Clone, Copy)]
pub struct Written {
    index: u64,
    term: u64,
    digest: u64,
}

impl From<&Entry> for Written {
    fn from(entry: &Entry) -> Written {
        Written {
            index: entry.index,
            term: entry.term,
            digest: digest(entry),
        }
    }
}

/// What a log holds beyond the reach of a power cut.
#[derive(Default)]
struct Synced {
    /// Everything up to here is in a snapshot.
    start: u64,
    /// Index → term.
    terms: BTreeMap<u64, u64>,
}

impl Synced {
    fn holds(&self, index: u64, term: u64) -> bool {
        index <= self.start || self.terms.get(&index) == Some(&term)
    }
}

/// What was seen of the protocol.
#[derive(Default)]
pub struct RaftOracle {
    leaders: BTreeMap<u64, u64>,
    /// (voter, term) → candidate.
    votes: BTreeMap<(u64, u64), u64>,
    /// (index, term) → digest of the entry.
    entries: BTreeMap<(u64, u64), u64>,
    /// Index → (term, digest).
    committed: BTreeMap<u64, (u64, u64)>,
    /// (term, node) that was checked for completeness.
    checked: (u64, u64),
    /// Indexes at which somebody appended a configuration entry.
    conf_entries: BTreeSet<u64>,
    /// Applied index → the configuration from there on.
    confs: BTreeMap<u64, ConfState>,
    /// By member.
    synced: BTreeMap<u64, Synced>,
    fault: Option<String>,
}

impl RaftOracle {
    pub fn take_fault(&mut self) -> Option<String> {
        self.fault.take()
    }

    pub fn committed_index(&self) -> u64 {
        self.committed.last_key_value().map_or(0, |(&index, _)| index)
    }

    /// A configuration entry is in some log and not known to be committed.
    pub fn conf_in_flight(&self) -> bool {
        self.conf_entries.last().is_some_and(|&index| index > self.committed_index())
    }

    pub fn elections(&self) -> usize {
        self.leaders.len()
    }

    fn fault(&mut self, what: String) {
        self.fault.get_or_insert(what);
    }

    /// A node leads, and will remember it: a sole voter that crashes before its own vote is durable has led nobody.
    pub fn note_leader(&mut self, node: u64, term: u64, core: &Consensus) {
        if self.checked == (term, node) {
            return;
        }
        self.checked = (term, node);
        let first = *self.leaders.entry(term).or_insert(node);
        if first != node {
            return self.fault(format!("two leaders in term {term}: n{first} and n{node}"));
        }
        // With log matching, the last committed entry stands for all before it.
        if let Some((&index, &(committed_term, _))) = self.committed.last_key_value()
            && committed_term < term
            && index > core.view().log_start.index
            && core.term_at(index) != Some(committed_term)
        {
            let found = core.term_at(index);
            self.fault(format!(
                "n{node} leads in term {term} without the committed entry {index} of term {committed_term} (it has {found:?})"
            ));
        }
    }

    /// A message leaves.
    pub fn note_sent(&mut self, node: u64, message: &Message) {
        let candidate = match message.get_msg_type() {
            MessageType::MsgRequestVote => node,
            MessageType::MsgRequestVoteResponse if !message.reject => message.to,
            MessageType::MsgAppend => return message.entries.iter().for_each(|entry| self.note_entry(node, entry.into())),
            _ => return,
        };
        let first = *self.votes.entry((node, message.term)).or_insert(candidate);
        if first != candidate {
            self.fault(format!(
                "n{node} voted twice in term {}: for n{first} and for n{candidate}",
                message.term
            ));
        }
    }

    /// Entries are about to be appended to a log.
    pub fn note_appended(&mut self, entries: &[Entry]) {
        let changes = entries.iter().filter(|entry| entry.get_entry_type() != EntryType::EntryNormal);
        self.conf_entries.extend(changes.map(|entry| entry.index));
    }

    /// These entries are in the log of a process now, the last of those written at their indexes: it knows their terms.
    pub fn note_known<'a>(&mut self, node: u64, entries: impl Iterator<Item = &'a Entry>, core: &Consensus) {
        for entry in entries {
            let (index, term) = (entry.index, entry.term);
            if let Some(found) = core.term_at(index).filter(|found| *found != term) {
                self.fault(format!(
                    "n{node} wrote entry {index} of term {term}, and takes it for one of {found}"
                ));
            }
        }
    }

    /// An entry left its node or is on a synced disk: from now on it is the only one of its index and term. (One that a sole voter lost
    /// before its sync, together with the term it elected itself in, was seen by nobody, and another one may come under both.)
    fn note_entry(&mut self, node: u64, entry: Written) {
        let Written { index, term, digest } = entry;
        if *self.entries.entry((index, term)).or_insert(digest) != digest {
            self.fault(format!(
                "n{node} has another entry at index {index} of term {term} than somebody else"
            ));
        }
    }

    /// The configuration from this applied index on.
    pub fn note_conf(&mut self, index: u64, conf: &ConfState) {
        self.confs.entry(index).or_insert_with(|| conf.clone());
    }

    /// A log begins here: everything before is in a snapshot, and nothing follows yet.
    pub fn note_begin(&mut self, node: u64, start: LogStart) {
        let terms = BTreeMap::new();
        self.synced.insert(node, Synced { start: start.index, terms });
    }

    /// A process starts from this log: it knows the terms that are in it. All matching of logs rests on them.
    pub fn note_started(&mut self, node: u64, log: &[Written], core: &Consensus) {
        if let Some(entry) = log.iter().find(|entry| core.term_at(entry.index) != Some(entry.term)) {
            let (index, term, found) = (entry.index, entry.term, core.term_at(entry.index));
            self.fault(format!(
                "n{node} starts with entry {index} of term {term} in its log, and takes it for one of {found:?}"
            ));
        }
    }

    /// These entries, in the order of their writing, are synced.
    pub fn note_synced(&mut self, node: u64, entries: &[Written]) {
        let mut next = 0;
        for &entry in entries {
            self.note_entry(node, entry);
            let terms = &mut self.synced.entry(node).or_default().terms;
            if entry.index != next {
                // Rule 10: whatever was there from here on is gone.
                terms.split_off(&entry.index);
            }
            terms.insert(entry.index, entry.term);
            next = entry.index + 1;
        }
    }

    /// Only a majority of the voters that counted may have committed this: that of the newest configuration before it, or, if whoever
    /// counted had not applied that one yet, of the one before. It cannot be an older one: a change is proposed by a leader that has
    /// applied the one before, goes out with a commit index behind that one, and is written together with it; so whoever has two changes
    /// in its log has the first one committed, also after a crash, and does not campaign before it has applied it. Majorities of two
    /// neighbouring configurations have a member in common.
    fn check_quorum(&mut self, index: u64, term: u64) {
        let holds = |id: &&u64| self.synced.get(*id).is_some_and(|log| log.holds(index, term));
        let agree = |voters: &[u64]| voters.is_empty() || 2 * voters.iter().filter(holds).count() > voters.len();
        // A configuration is noted wherever somebody applied, or began, with it: the same one at several indexes.
        let mut confs = self.confs.range(..index).rev().map(|(_, conf)| conf);
        let agrees = |conf: &ConfState| agree(&conf.voters) && agree(&conf.voters_outgoing);
        let Some(newest) = confs.next() else { return };
        if agrees(newest) || confs.find(|conf| voters_of(conf) != voters_of(newest)).is_some_and(agrees) {
            return;
        }
        let holders: Vec<u64> = self
            .synced
            .iter()
            .filter(|(_, log)| log.holds(index, term))
            .map(|(&id, _)| id)
            .collect();
        let conf = self.confs.range(..index).next_back();
        self.fault(format!(
            "entry {index} of term {term} is committed, and only {holders:?} hold it on a synced disk: no majority of {conf:?}"
        ));
    }

    /// Entries are committed, says this node.
    pub fn note_committed(&mut self, node: u64, entries: &[Entry]) {
        for entry in entries {
            let now = (entry.term, digest(entry));
            let is_new = !self.committed.contains_key(&entry.index);
            let first = *self.committed.entry(entry.index).or_insert(now);
            if is_new {
                self.check_quorum(entry.index, entry.term);
            }
            if first != now {
                self.fault(format!(
                    "n{node} commits another entry at index {}: of term {}, it was of term {}",
                    entry.index, entry.term, first.0
                ));
            }
        }
    }
}

/// The two halves, ascending.
fn voters_of(conf: &ConfState) -> (Vec<u64>, Vec<u64>) {
    let (mut incoming, mut outgoing) = (conf.voters.clone(), conf.voters_outgoing.clone());
    incoming.sort_unstable();
    outgoing.sort_unstable();
    (incoming, outgoing)
}

/// A snapshot that does not name its receiver is thrown away there, without a word, and offered again for ever.
pub fn check_offer(message: &Message, view: &SnapshotView) -> Result<(), String> {
    let conf = &view.applied.conf_state;
    let mut named = conf
        .voters
        .iter()
        .chain(&conf.learners)
        .chain(&conf.voters_outgoing)
        .chain(&conf.learners_next);
    if named.any(|&id| id == message.to) {
        return Ok(());
    }
    Err(format!(
        "n{} sends n{} a snapshot of index {} that does not name it",
        message.from, message.to, view.applied.index
    ))
}

fn digest(entry: &Entry) -> u64 {
    let kind = entry.get_entry_type() as u64;
    xxhash_rust::xxh3::xxh3_64(&entry.data) ^ xxhash_rust::xxh3::xxh3_64_with_seed(&entry.context, kind + 1).rotate_left(7)
}
