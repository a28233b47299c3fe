//! Rule 23: no joint configuration outlives ten seconds of a live quorum, whoever leads.

use metcd::leader::care::{Care, Caretaker};
use metcd::state::command::MemberRecord;
use raft::eraftpb::{ConfChangeType, ConfChangeV2};

use crate::harness::{Cluster, change_of};

/// Ten seconds in ticks of 100 ms.
const MAX_JOINT_TICKS: u64 = 100;

/// Five become three, and member 1, which leads, is cut off when it has entered the joint configuration: nobody has heard of its end.
fn cut_off_within_a_joint_configuration() -> Cluster {
    let mut cluster = Cluster::led_by(1, &[1, 2, 3, 4, 5]);
    let change = change_of(&[(ConfChangeType::RemoveNode, 4), (ConfChangeType::RemoveNode, 5)]);
    let proposed = cluster.member(1).core.propose_conf_change(&change);
    proposed.expect("the leader takes it");
    for _ in 0..100 {
        if cluster.view(1).joint {
            break;
        }
        cluster.step_all();
    }
    assert!(cluster.view(1).joint, "it is never entered");
    cluster.isolate(1);
    cluster
}

/// Every member looks after the others once per heartbeat, as its duties would.
fn tick_with_care(cluster: &mut Cluster, caretaker: &mut Caretaker, ids: &[u64]) {
    cluster.tick(1);
    let members: Vec<MemberRecord> = Vec::new();
    for &id in ids {
        let (view, peers) = (cluster.view(id), cluster.member(id).core.progress());
        if !cluster.member(id).core.is_leader() || !view.applied_current_term {
            continue;
        }
        match caretaker.look(id, &view, &peers, &members) {
            // Refused where one is under way already.
            Some(Care::LeaveJoint) => drop(cluster.change(id, &ConfChangeV2::default())),
            Some(other) => panic!("nothing else is to be done: {other:?}"),
            None => {}
        }
    }
}

#[test]
fn rule_23_the_next_leader_leaves_the_joint_configuration_that_it_inherits() {
    let mut cluster = cut_off_within_a_joint_configuration();
    let mut caretaker = Caretaker::default();
    let mut was_joint = false;
    let mut ticks = 0;
    while cluster.view(2).joint || cluster.view(3).joint || cluster.view(2).voters != [1, 2, 3] {
        ticks += 1;
        assert!(ticks <= MAX_JOINT_TICKS, "{:?}", cluster.view(2));
        tick_with_care(&mut cluster, &mut caretaker, &[2, 3, 4, 5]);
        was_joint |= cluster.view(2).joint;
    }
    assert!(was_joint, "they never entered it");
    assert!(cluster.view(1).joint, "whoever was cut off knows nothing of it");

    cluster.heal();
    cluster.tick(MAX_JOINT_TICKS);
    for id in [1, 2, 3] {
        assert!(!cluster.view(id).joint, "member {id}");
        assert_eq!(cluster.view(id).voters, [1, 2, 3], "member {id}");
    }
}
