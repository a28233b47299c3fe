//! A member whose log was replaced by a snapshot does not stand for election before that is durable and applied: raft-rs 0.7 looks for
//! configuration changes among committed entries that are not applied, and panics where a snapshot has taken their place. Found by the
//! simulation (seed 2551: the disk was full, so that the snapshot never became durable).

use metcd::consensus::{Consensus, Effects, Input};
use metcd::wal::LogStart;
use raft::eraftpb::{ConfState, Message, MessageType};

use crate::harness::{ELECTION_TICKS, founded, founding_disk, options, start};

const SNAPSHOT: LogStart = LogStart { index: 50, term: 5 };

fn conf() -> ConfState {
    ConfState::from((vec![1, 2, 3], Vec::new()))
}

fn from_leader(kind: MessageType) -> Message {
    let mut message = Message::default();
    message.set_msg_type(kind);
    (message.from, message.to, message.term) = (1, 3, SNAPSHOT.term);
    message
}

/// Member 3, behind, is sent a snapshot: what it is to write.
fn sent_a_snapshot() -> (Consensus, u64) {
    let mut core = start(options(3, 1), &founding_disk(), founded(conf())).expect("starts");
    let mut message = from_leader(MessageType::MsgSnapshot);
    let metadata = message.mut_snapshot().mut_metadata();
    (metadata.index, metadata.term) = (SNAPSHOT.index, SNAPSHOT.term);
    metadata.set_conf_state(conf());
    core.step(Input::Message(message));
    let Effects { persist, .. } = core.drain();
    let unit = persist.iter().find(|unit| unit.snapshot.is_some()).expect("a snapshot to write");
    assert_eq!(unit.snapshot, Some(SNAPSHOT));
    let number = unit.number;
    (core, number)
}

/// Whether it asks for votes within a few election timeouts.
fn campaigns(core: &mut Consensus) -> bool {
    (0..5 * ELECTION_TICKS).any(|_| {
        core.step(Input::Tick);
        let asks = |message: &Message| message.get_msg_type() == MessageType::MsgRequestPreVote;
        core.drain().messages.iter().any(asks)
    })
}

fn applied(core: &mut Consensus) {
    core.step(Input::Applied {
        index: SNAPSHOT.index,
        cluster_time_ms: 0,
        settled: Vec::new(),
    });
}

#[test]
fn not_before_the_snapshot_is_durable_and_applied() {
    let (mut core, number) = sent_a_snapshot();
    assert!(!campaigns(&mut core), "nothing of it is there yet");
    applied(&mut core);
    assert!(!campaigns(&mut core), "the state has it, the log does not");
    core.step(Input::Persisted(number));
    assert!(campaigns(&mut core), "the leader is silent, and nothing is in the way any more");
}

#[test]
fn not_even_when_it_is_told_to() {
    let (mut core, number) = sent_a_snapshot();
    core.step(Input::Message(from_leader(MessageType::MsgTimeoutNow)));
    core.drain();
    applied(&mut core);
    core.step(Input::Persisted(number));
    core.drain();
    core.step(Input::Message(from_leader(MessageType::MsgTimeoutNow)));
    let asks = |message: &Message| message.get_msg_type() == MessageType::MsgRequestVote;
    let persist = core.drain().persist;
    core.step(Input::Persisted(persist.last().expect("its vote for itself").number));
    assert!(core.drain().messages.iter().any(asks));
}
