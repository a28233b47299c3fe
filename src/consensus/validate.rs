//! What raft-rs would step or panic on, and a healthy peer never sends: refused before `step` (rules 20 and 27).

use raft::eraftpb::{Entry, EntryType, Message, MessageType};
use raft::{RawNode, Storage, StorageError};

use super::log::LogCache;

/// Why a message was not stepped. A sentence for the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
#[error("{0}")]
pub struct Implausible(&'static str);

/// A leader names no more than what this member acknowledged to it, after a sync.
pub const LOST_LOG: Implausible = Implausible("a heartbeat commits entries that this member acknowledged and does not have");

/// Checks a message against this node's state. Identity, cluster and membership were checked when it was received.
pub fn check(node: &RawNode<LogCache>, message: &Message) -> Result<(), Implausible> {
    check_term(message)?;
    let last_index = node.raft.raft_log.last_index();
    match message.get_msg_type() {
        MessageType::MsgHup
        | MessageType::MsgBeat
        | MessageType::MsgUnreachable
        | MessageType::MsgSnapStatus
        | MessageType::MsgCheckQuorum
        | MessageType::MsgTransferLeader => Err(Implausible("a local message came from a peer")),
        MessageType::MsgPropose => check_propose(message),
        MessageType::MsgAppend => check_append(node, message),
        MessageType::MsgHeartbeat if message.commit > last_index && message.term >= node.raft.term => Err(LOST_LOG),
        MessageType::MsgAppendResponse if !message.reject && message.index > last_index && message.term >= node.raft.term => {
            Err(Implausible("an acknowledgement of entries that were never sent"))
        }
        MessageType::MsgSnapshot => check_snapshot(message),
        MessageType::MsgReadIndex | MessageType::MsgReadIndexResp if message.entries.len() != 1 => {
            Err(Implausible("a read index message without its context"))
        }
        MessageType::MsgTimeoutNow if message.from != node.raft.leader_id => {
            Err(Implausible("somebody who does not lead asks for an election"))
        }
        MessageType::MsgHeartbeat
        | MessageType::MsgAppendResponse
        | MessageType::MsgReadIndex
        | MessageType::MsgReadIndexResp
        | MessageType::MsgTimeoutNow
        | MessageType::MsgRequestVote
        | MessageType::MsgRequestVoteResponse
        | MessageType::MsgRequestPreVote
        | MessageType::MsgRequestPreVoteResponse
        | MessageType::MsgHeartbeatResponse => Ok(()),
    }
}

fn check_term(message: &Message) -> Result<(), Implausible> {
    let forwarded = matches!(message.get_msg_type(), MessageType::MsgPropose | MessageType::MsgReadIndex);
    match (message.term, forwarded) {
        (0, true) => Ok(()),
        (0, false) => Err(Implausible("a message without a term")),
        (_, true) => Err(Implausible("a forwarded request with a term")),
        (_, false) => Ok(()),
    }
}

/// Only commands are forwarded; configuration changes are proposed by the leader itself.
fn check_propose(message: &Message) -> Result<(), Implausible> {
    if message.entries.is_empty() {
        return Err(Implausible("a proposal without entries"));
    }
    if message
        .entries
        .iter()
        .any(|entry| entry.get_entry_type() != EntryType::EntryNormal || entry.data.is_empty())
    {
        return Err(Implausible("a forwarded proposal that is not a command"));
    }
    Ok(())
}

fn check_append(node: &RawNode<LogCache>, message: &Message) -> Result<(), Implausible> {
    if message.index == 0 {
        // Founders begin with one identical snapshot: no log anywhere starts at 1, so nobody can be fed from there.
        return Err(Implausible("an append from before the first snapshot"));
    }
    if message.log_term == 0 {
        // Every index from 1 has a term. raft-rs says 0 of what is behind its log, and would take the two for a match.
        return Err(Implausible("an append after an entry without a term"));
    }
    check_entries(message.index, message.log_term, message.term, &message.entries)?;
    if message.term < node.raft.term {
        return Ok(());
    }
    let committed = node.raft.raft_log.committed;
    let contradicts = |entry: &Entry| match node.raft.raft_log.store.term(entry.index) {
        Ok(term) => term != entry.term,
        Err(raft::Error::Store(StorageError::Compacted)) => false,
        Err(_) => false,
    };
    if message.entries.iter().take_while(|entry| entry.index <= committed).any(contradicts) {
        return Err(Implausible("an append that contradicts committed entries"));
    }
    Ok(())
}

fn check_entries(index: u64, log_term: u64, term: u64, entries: &[Entry]) -> Result<(), Implausible> {
    let mut previous = (index, log_term);
    for entry in entries {
        if Some(entry.index) != previous.0.checked_add(1) {
            return Err(Implausible("entries that are not consecutive"));
        }
        if entry.term < previous.1 || entry.term > term {
            return Err(Implausible("entries whose terms go back or beyond the sender's"));
        }
        previous = (entry.index, entry.term);
    }
    Ok(())
}

fn check_snapshot(message: &Message) -> Result<(), Implausible> {
    let metadata = message.get_snapshot().get_metadata();
    if metadata.index == 0 || metadata.term == 0 || metadata.term > message.term {
        return Err(Implausible("a snapshot of nothing"));
    }
    if metadata.get_conf_state().voters.is_empty() {
        return Err(Implausible("a snapshot without voters"));
    }
    Ok(())
}
