//! What can be said about a message before raft sees it: raft 0.7 steps messages from anybody and panics on several that cannot be
//! (an empty proposal, a read index without its context, ...).
//!
//! What only the log can tell, a commit or heartbeat beyond the last index, is checked by the consensus before it steps.

use raft::eraftpb::{Entry, Message, MessageType};

/// No index or term of a real cluster comes near it; far below overflow in raft's own arithmetic.
const MAX_PLAUSIBLE: u64 = 1 << 60;
/// A read index context is a member, a boot and a counter.
const MAX_CONTEXT_BYTES: usize = 1024;

/// Checks a message that came from `from` for `to` in `POST /raft`. The error is the reason.
pub(super) fn check(message: &Message, from: u64, to: u64) -> Result<(), String> {
    if message.from != from || message.to != to {
        return Err(format!(
            "a message from {} to {} in a request from {from} to {to}",
            message.from, message.to
        ));
    }
    check_numbers(message)?;
    let kind = message.get_msg_type();
    match kind {
        MessageType::MsgAppend => {
            needs_term(message)?;
            needs(
                message.index == 0 || message.log_term > 0,
                "an append after an entry without a term",
            )?;
            check_entries(message)
        }
        MessageType::MsgPropose => needs(!message.entries.is_empty(), "a proposal without entries"),
        MessageType::MsgReadIndex | MessageType::MsgReadIndexResp => {
            needs(kind == MessageType::MsgReadIndex || message.term > 0, "a message without a term")?;
            let [entry] = message.get_entries() else {
                return Err("a read index without exactly one context".into());
            };
            needs(
                !entry.data.is_empty() && entry.data.len() <= MAX_CONTEXT_BYTES,
                "a read index with an odd context",
            )
        }
        MessageType::MsgAppendResponse
        | MessageType::MsgRequestVote
        | MessageType::MsgRequestVoteResponse
        | MessageType::MsgRequestPreVote
        | MessageType::MsgRequestPreVoteResponse
        | MessageType::MsgHeartbeat
        | MessageType::MsgHeartbeatResponse
        | MessageType::MsgTransferLeader
        | MessageType::MsgTimeoutNow => {
            needs_term(message)?;
            needs(message.entries.is_empty(), "entries where none belong")?;
            needs(message.context.len() <= MAX_CONTEXT_BYTES, "an oversized context")
        }
        MessageType::MsgSnapshot => Err("a snapshot outside /raft/snapshot".into()),
        MessageType::MsgHup
        | MessageType::MsgBeat
        | MessageType::MsgUnreachable
        | MessageType::MsgSnapStatus
        | MessageType::MsgCheckQuorum => Err(format!("a local message ({kind:?})")),
    }?;
    needs(
        kind == MessageType::MsgSnapshot || message.get_snapshot().data.is_empty(),
        "snapshot data where none belongs",
    )
}

/// Checks the message in front of a snapshot stream.
pub(super) fn check_snapshot(message: &Message, from: u64, to: u64) -> Result<(), String> {
    if message.from != from || message.to != to {
        return Err(format!(
            "a snapshot from {} to {} in a request from {from} to {to}",
            message.from, message.to
        ));
    }
    needs(
        message.get_msg_type() == MessageType::MsgSnapshot,
        "no snapshot message in front of the snapshot",
    )?;
    check_numbers(message)?;
    needs_term(message)?;
    let metadata = message.get_snapshot().get_metadata();
    needs(
        plausible(metadata.index) && plausible(metadata.term),
        "implausible snapshot metadata",
    )?;
    needs(metadata.index > 0 && metadata.term > 0, "a snapshot of nothing")?;
    needs(!metadata.get_conf_state().voters.is_empty(), "a snapshot without voters")?;
    needs(
        message.entries.is_empty() && message.get_snapshot().data.is_empty(),
        "a snapshot message with content",
    )
}

fn needs(holds: bool, otherwise: &str) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise.into()) }
}

/// Term 0 means "local" to raft; from outside it would bypass every check of terms.
fn needs_term(message: &Message) -> Result<(), String> {
    needs(message.term > 0, "a message without a term")
}

fn plausible(number: u64) -> bool {
    number <= MAX_PLAUSIBLE
}

fn check_numbers(message: &Message) -> Result<(), String> {
    let Message {
        term,
        log_term,
        index,
        commit,
        commit_term,
        request_snapshot,
        reject_hint,
        ..
    } = message;
    let all = [term, log_term, index, commit, commit_term, request_snapshot, reject_hint];
    needs(all.into_iter().all(|&number| plausible(number)), "an implausible number")
}

/// The entries follow the message's index without a gap, and their terms never fall nor exceed the message's.
fn check_entries(message: &Message) -> Result<(), String> {
    let mut last = (message.index, message.log_term);
    for Entry { index, term, .. } in message.entries.iter() {
        if *index != last.0 + 1 || *term < last.1 || *term > message.term {
            return Err(format!("entry {index} of term {term} after entry {} of term {}", last.0, last.1));
        }
        last = (*index, *term);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: MessageType) -> Message {
        let mut message = Message {
            from: 1,
            to: 2,
            term: 5,
            ..Message::default()
        };
        message.set_msg_type(kind);
        message
    }

    fn entry(index: u64, term: u64) -> Entry {
        Entry {
            index,
            term,
            data: vec![1].into(),
            ..Entry::default()
        }
    }

    #[test]
    fn rule_27_sender_and_receiver_must_agree_with_the_request() {
        let heartbeat = message(MessageType::MsgHeartbeat);
        assert_eq!(check(&heartbeat, 1, 2), Ok(()));
        assert!(check(&heartbeat, 3, 2).is_err() && check(&heartbeat, 1, 3).is_err());
    }

    #[test]
    fn messages_that_panic_raft_are_refused() {
        for kind in [MessageType::MsgPropose, MessageType::MsgReadIndex, MessageType::MsgReadIndexResp] {
            assert!(check(&message(kind), 1, 2).is_err(), "{kind:?} without entries");
        }
        let mut read_index = message(MessageType::MsgReadIndex);
        read_index.term = 0;
        read_index.mut_entries().push(entry(0, 0));
        assert_eq!(check(&read_index, 1, 2), Ok(()));
    }

    #[test]
    fn local_and_snapshot_messages_are_refused() {
        use MessageType::{MsgBeat, MsgCheckQuorum, MsgHup, MsgSnapStatus, MsgSnapshot, MsgUnreachable};
        for kind in [MsgHup, MsgBeat, MsgUnreachable, MsgSnapStatus, MsgCheckQuorum, MsgSnapshot] {
            assert!(check(&message(kind), 1, 2).is_err(), "{kind:?}");
        }
    }

    #[test]
    fn term_zero_and_absurd_numbers_are_refused() {
        let mut vote = message(MessageType::MsgRequestVote);
        vote.term = 0;
        assert!(check(&vote, 1, 2).is_err());
        let mut append = message(MessageType::MsgAppend);
        (append.index, append.log_term) = (u64::MAX, 3);
        append.mut_entries().push(entry(0, 5));
        assert!(check(&append, 1, 2).is_err());
        let mut behind_the_log = message(MessageType::MsgAppend);
        (behind_the_log.index, behind_the_log.commit) = (8, 8);
        assert!(
            check(&behind_the_log, 1, 2).is_err(),
            "raft takes term 0 for a match, and panics on the commit"
        );
        behind_the_log.log_term = 3;
        assert_eq!(check(&behind_the_log, 1, 2), Ok(()));
    }

    #[test]
    fn entries_must_follow_each_other() {
        let append = |entries: &[(u64, u64)]| {
            let mut append = message(MessageType::MsgAppend);
            (append.index, append.log_term) = (7, 3);
            append.set_entries(entries.iter().map(|&(index, term)| entry(index, term)).collect::<Vec<_>>().into());
            check(&append, 1, 2)
        };
        assert_eq!(append(&[(8, 3), (9, 5)]), Ok(()));
        for wrong in [&[(9, 3)][..], &[(8, 3), (10, 3)], &[(8, 2)], &[(8, 4), (9, 3)], &[(8, 6)]] {
            assert!(append(wrong).is_err(), "{wrong:?}");
        }
    }
}
