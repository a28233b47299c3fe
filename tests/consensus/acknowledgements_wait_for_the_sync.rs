//! Rule 2: what a member promises is on its disk before anybody hears of the promise.

use raft::eraftpb::MessageType;

use crate::harness::Cluster;

#[test]
fn rule_2_no_append_is_acknowledged_before_it_is_durable() {
    let mut cluster = Cluster::led_by(1, &[1, 2, 3]);
    cluster.member(2).holds_syncs = true;
    cluster.cut(1, 3);
    cluster.sent.clear();
    cluster.propose(1);
    assert!(!cluster.sent_by(1, MessageType::MsgAppend).is_empty(), "it went out");
    assert!(cluster.sent_by(2, MessageType::MsgAppendResponse).is_empty(), "{:?}", cluster.sent);
    let (last, committed) = (cluster.view(1).last_index, cluster.view(1).commit_index);
    assert!(committed < last, "nobody else has it durably");

    cluster.member(2).holds_syncs = false;
    cluster.settle();
    let acknowledged = cluster
        .sent_by(2, MessageType::MsgAppendResponse)
        .iter()
        .map(|message| message.index)
        .max();
    assert_eq!(acknowledged, Some(last));
    assert_eq!(cluster.view(1).commit_index, last);
}

#[test]
fn rule_2_no_vote_leaves_before_it_is_durable() {
    let mut cluster = Cluster::of(&[1, 2, 3]);
    // 1 needs the vote of 3.
    cluster.cut(1, 2);
    cluster.member(3).holds_syncs = true;
    cluster.campaign(1);
    assert!(
        cluster
            .sent
            .iter()
            .any(|message| message.get_msg_type() == MessageType::MsgRequestVote && message.to == 3),
        "it was asked"
    );
    assert!(
        cluster.sent_by(3, MessageType::MsgRequestVoteResponse).is_empty(),
        "{:?}",
        cluster.sent
    );
    assert!(!cluster.member(1).core.is_leader());

    cluster.member(3).holds_syncs = false;
    cluster.settle();
    assert!(!cluster.sent_by(3, MessageType::MsgRequestVoteResponse).is_empty());
    assert!(cluster.member(1).core.is_leader());
}

#[test]
fn rule_2_a_vote_that_was_given_survives_a_restart() {
    let mut cluster = Cluster::of(&[1, 2, 3]);
    cluster.cut(1, 2);
    cluster.campaign(1);
    assert!(cluster.member(1).core.is_leader());
    let term = cluster.view(1).term;
    cluster.restart(3);
    let hard_state = &cluster.member(3).disk.hard_state;
    assert_eq!((hard_state.term, hard_state.vote), (term, 1));
    assert_eq!(cluster.view(3).term, term);
}
