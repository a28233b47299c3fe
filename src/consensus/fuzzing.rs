//! See [`crate::fuzzing`]. Messages that the transport let through are stepped by member 2 of three, whatever they say; its log is durable
//! and its state machine done at once.

use protobuf::Message as _;
use raft::eraftpb::{ConfChangeV2, ConfState, Entry, EntryType, HardState, Message, MessageType};

use super::{Consensus, Input, LogImage, Options};
use crate::state::Applied;
use crate::wal::{LogStart, Recovered};

/// The member that steps.
pub(crate) const OWN: u64 = 2;
/// The members that send.
pub(crate) const PEERS: [u64; 2] = [1, 3];

/// Steps all messages, after some that make the member what the number says: a follower, a candidate or the leader.
pub(crate) fn step_all(role: u8, messages: Vec<Message>) {
    let Some(mut member) = founder() else { return };
    let mut next = 2;
    let role = role % 3;
    if role >= 1 {
        member.step(Input::Campaign);
        settle(&mut member, &mut next);
    }
    if role == 2 {
        for kind in [MessageType::MsgRequestPreVoteResponse, MessageType::MsgRequestVoteResponse] {
            // A pre-vote speaks of the term to come.
            let (term, _) = member.leadership();
            let pre_vote = u64::from(kind == MessageType::MsgRequestPreVoteResponse);
            member.step(Input::Message(message(kind, term + pre_vote)));
            settle(&mut member, &mut next);
        }
        assert!(member.is_leader(), "the votes of a majority make a leader");
    }
    for message in messages {
        member.step(Input::Message(message));
        member.step(Input::Tick);
        settle(&mut member, &mut next);
    }
}

fn message(kind: MessageType, term: u64) -> Message {
    let mut message = Message {
        from: PEERS[0],
        to: OWN,
        term,
        ..Message::default()
    };
    message.set_msg_type(kind);
    message
}

/// A founder of three with a founding snapshot and an empty log.
fn founder() -> Option<Consensus> {
    let start = LogStart { index: 1, term: 1 };
    let mut conf_state = ConfState::default();
    conf_state.set_voters(vec![PEERS[0], OWN, PEERS[1]]);
    let hard_state = HardState {
        term: 1,
        commit: 1,
        ..HardState::default()
    };
    let image = LogImage {
        recovered: Recovered {
            hard_state,
            start,
            last_index: 1,
        },
        term_runs: Vec::new(),
        tail: Vec::new(),
    };
    let applied = Applied {
        index: 1,
        term: 1,
        conf_state,
    };
    let options = Options {
        id: OWN,
        boot: 1,
        heartbeat_ticks: 2,
        election_ticks: 10,
        max_inflight: 8,
        max_message_bytes: 1 << 20,
        seed: 1,
        linger_ticks: 100,
        max_unapplied_bytes: 64 << 20,
    };
    let logger = slog::Logger::root(slog::Discard, slog::o!());
    Consensus::start(options, image, applied, 0, &logger).ok()
}

/// Performs what follows: everything is durable and applied in the same moment. `next` is the index that is applied next.
fn settle(member: &mut Consensus, next: &mut u64) {
    loop {
        let effects = member.drain();
        if effects.persist.is_empty() && effects.apply.is_empty() {
            return;
        }
        for unit in effects.persist {
            member.step(Input::Persisted(unit.number));
        }
        for entry in effects.apply {
            assert_eq!(entry.index, *next, "entries are applied in order");
            *next += 1;
            apply(member, &entry);
        }
    }
}

fn apply(member: &mut Consensus, entry: &Entry) {
    if entry.get_entry_type() != EntryType::EntryNormal
        && let Ok(change) = ConfChangeV2::parse_from_bytes(&entry.data)
    {
        // The state machine lets only changes through that the members know; a refused one ends the process in the product.
        let _ = member.apply_conf_change(&change);
    }
    member.step(Input::Applied {
        index: entry.index,
        cluster_time_ms: 0,
        settled: Vec::new(),
    });
}
