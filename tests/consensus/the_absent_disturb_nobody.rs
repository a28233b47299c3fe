//! Rule 20: whoever was away, or was removed without hearing of it, neither raises the term nor ends a leader's office.

use crate::harness::{Cluster, ELECTION_TICKS, LINGER_TICKS, removal};

/// A long time, in election timeouts.
const LONG: u64 = 5;

#[test]
fn rule_20_a_member_that_was_cut_off_finds_the_leader_in_office() {
    let mut cluster = Cluster::led_by(1, &[1, 2, 3]);
    let term = cluster.view(1).term;
    cluster.isolate(3);
    cluster.tick(LONG * ELECTION_TICKS);
    assert_eq!(cluster.view(3).leader, None, "it misses its leader");
    cluster.heal();
    cluster.tick(LONG * ELECTION_TICKS);
    for id in [1, 2, 3] {
        let view = cluster.view(id);
        assert_eq!((view.leader, view.term), (Some(1), term), "member {id}");
    }
}

#[test]
fn rule_20_a_removed_member_that_was_told_by_nobody_does_not_either() {
    let mut cluster = Cluster::led_by(1, &[1, 2, 3]);
    let term = cluster.view(1).term;
    cluster.isolate(3);
    cluster.change(1, &removal(3)).expect("removed");
    // The leader gives up to wait for it, and then it comes back.
    cluster.tick(LINGER_TICKS);
    assert!(cluster.view(1).leaving.is_empty());
    cluster.heal();
    cluster.tick(LONG * ELECTION_TICKS);
    assert_eq!(cluster.view(3).voters, [1, 2, 3], "it knows of nothing");
    assert_eq!(cluster.view(3).leader, None, "and asks for votes");
    for id in [1, 2] {
        let view = cluster.view(id);
        assert_eq!((view.leader, view.term), (Some(1), term), "member {id}");
    }
}
