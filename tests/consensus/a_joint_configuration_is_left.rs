//! Rule 23: no joint configuration outlives ten seconds of a live quorum, whoever leads.

use metcd::leader::care::{Care, Caretaker};
use raft::eraftpb::{ConfChangeTransition, ConfChangeType, ConfChangeV2};

use crate::harness::{Cluster, change_of};

/// Ten seconds in ticks of 100 ms.
const MAX_JOINT_TICKS: u64 = 100;

/// Five become three, and member 1, which leads, is cut off when it has entered the joint configuration: nobody has heard of its end.
fn cut_off_within_a_joint_configuration(transition: ConfChangeTransition) -> Cluster {
    let mut cluster = Cluster::led_by(1, &[1, 2, 3, 4, 5]);
    let mut change = change_of(&[(ConfChangeType::RemoveNode, 4), (ConfChangeType::RemoveNode, 5)]);
    change.set_transition(transition);
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

/// The others leave the configuration, with `care` after each tick, and member 1 does when it is back.
fn is_left(mut cluster: Cluster, mut care: impl FnMut(&mut Cluster)) {
    let (mut was_joint, mut ticks) = (false, 0);
    while [2, 3]
        .iter()
        .any(|&id| cluster.view(id).joint || cluster.view(id).voters != [1, 2, 3])
    {
        ticks += 1;
        assert!(ticks <= MAX_JOINT_TICKS, "{:?}", cluster.view(2));
        cluster.tick(1);
        was_joint |= cluster.view(2).joint;
        care(&mut cluster);
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

/// As every change is proposed: raft leaves it by itself.
#[test]
fn rule_23_the_next_leader_leaves_the_joint_configuration_that_it_inherits() {
    let cluster = cut_off_within_a_joint_configuration(ConfChangeTransition::Auto);
    is_left(cluster, |_| {});
}

/// Where raft does not, the leader's standing care does.
#[test]
fn rule_23_a_joint_configuration_that_raft_would_stay_in_is_left_by_the_next_leaders_care() {
    let cluster = cut_off_within_a_joint_configuration(ConfChangeTransition::Explicit);
    let mut caretaker = Caretaker::default();
    is_left(cluster, |cluster| {
        for id in [2, 3] {
            let view = cluster.view(id);
            if !cluster.member(id).core.is_leader() || !view.applied_current_term {
                continue;
            }
            let peers = cluster.member(id).core.progress();
            match caretaker.look(id, &view, &peers, &[]) {
                Some(Care::LeaveJoint) => drop(cluster.change(id, &ConfChangeV2::default()).expect("nothing else is pending")),
                Some(other) => panic!("nothing else is to be done: {other:?}"),
                None => {}
            }
        }
    });
}
