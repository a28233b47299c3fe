//! Rule 21: raft-rs takes a second configuration change in and makes an empty entry of it. So none is proposed while one is under way.

use metcd::consensus::ConfRefused;
use raft::eraftpb::ConfChangeType;

use crate::harness::{Cluster, change_of, removal};

#[test]
fn rule_21_a_second_change_waits_until_the_first_is_applied() {
    let mut cluster = Cluster::led_by(1, &[1, 2, 3]);
    cluster.member(1).holds_applies = true;
    let (first, _) = cluster.change(1, &removal(3)).expect("the first");
    let learner = change_of(&[(ConfChangeType::AddLearnerNode, 4)]);
    assert_eq!(cluster.change(1, &learner), Err(ConfRefused::Busy), "committed, and not applied");
    assert_eq!(cluster.view(1).last_index, first, "nothing was appended for it");

    cluster.member(1).holds_applies = false;
    cluster.settle();
    assert!(cluster.change(1, &learner).is_ok());
    assert_eq!((cluster.view(1).voters, cluster.view(1).learners), (vec![1, 2], vec![4]));
}

#[test]
fn rule_21_a_new_leader_waits_for_the_change_that_it_inherits() {
    let mut cluster = Cluster::led_by(1, &[1, 2, 3]);
    for id in [2, 3] {
        cluster.member(id).holds_syncs = true;
    }
    cluster.change(1, &removal(1)).expect("the leader takes it");
    cluster.isolate(1);
    for id in [2, 3] {
        let member = cluster.member(id);
        (member.holds_syncs, member.holds_applies) = (false, true);
    }
    let leader = cluster.elect(&[2, 3]);
    let learner = change_of(&[(ConfChangeType::AddLearnerNode, 4)]);
    assert_eq!(cluster.change(leader, &learner), Err(ConfRefused::Busy));
    for id in [2, 3] {
        cluster.member(id).holds_applies = false;
    }
    cluster.settle();
    assert_eq!(cluster.view(leader).voters, [2, 3], "the inherited one took effect");
    assert!(cluster.change(leader, &learner).is_ok());
}

#[test]
fn rule_21_who_does_not_lead_proposes_none() {
    let mut cluster = Cluster::led_by(1, &[1, 2, 3]);
    assert_eq!(cluster.change(2, &removal(3)), Err(ConfRefused::NotLeader));
}
