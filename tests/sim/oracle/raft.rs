//! The promises of Raft (thesis, figure 3.2), checked at every event: one leader a term, one vote a term, log matching, leader
//! completeness, and state machine safety: no committed entry is ever another one.

use std::collections::{BTreeMap, BTreeSet};

use metcd::consensus::Consensus;
use raft::eraftpb::{Entry, EntryType, Message, MessageType};

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

    /// A node believes that it leads.
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
    pub fn note_entries(&mut self, node: u64, entries: &[Entry]) {
        for entry in entries {
            if entry.get_entry_type() != EntryType::EntryNormal {
                self.conf_entries.insert(entry.index);
            }
            let digest = digest(entry);
            let first = *self.entries.entry((entry.index, entry.term)).or_insert(digest);
            if first != digest {
                let (index, term) = (entry.index, entry.term);
                self.fault(format!(
                    "n{node} has another entry at index {index} of term {term} than somebody else"
                ));
            }
        }
    }

    /// Entries are committed, says this node.
    pub fn note_committed(&mut self, node: u64, entries: &[Entry]) {
        for entry in entries {
            let now = (entry.term, digest(entry));
            let first = *self.committed.entry(entry.index).or_insert(now);
            if first != now {
                self.fault(format!(
                    "n{node} commits another entry at index {}: of term {}, it was of term {}",
                    entry.index, entry.term, first.0
                ));
            }
        }
    }
}

fn digest(entry: &Entry) -> u64 {
    let kind = entry.get_entry_type() as u64;
    xxhash_rust::xxh3::xxh3_64(&entry.data) ^ xxhash_rust::xxh3::xxh3_64_with_seed(&entry.context, kind + 1).rotate_left(7)
}
