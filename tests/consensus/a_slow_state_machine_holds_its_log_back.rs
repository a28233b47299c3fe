//! What is committed and not applied yet is held in memory: a member whose state machine lags takes no more entries in, and its leader
//! sends them again when it has caught up.

use crate::harness::{Cluster, MAX_UNAPPLIED_BYTES};

const MIB: usize = 1 << 20;

#[test]
fn a_follower_that_applies_slowly_takes_in_what_it_can_hold_and_the_rest_later() {
    let mut cluster = Cluster::led_by(1, &[1, 2, 3]);
    cluster.member(3).holds_applies = true;
    for _ in 0..60 {
        cluster.propose_bytes(1, MIB);
        cluster.tick(1);
    }
    let (leader, follower) = (cluster.view(1), cluster.view(3));
    assert_eq!(leader.commit_index, leader.last_index, "the other two go on");
    assert!(follower.last_index < leader.last_index);
    // What was applied stays for other members, up to 16 MiB.
    let held = cluster.member(3).core.cached_bytes();
    assert!(held < MAX_UNAPPLIED_BYTES + 18 * MIB, "{held} bytes in memory");

    cluster.member(3).holds_applies = false;
    cluster.tick(120);
    assert_eq!(cluster.view(3).last_index, cluster.view(1).last_index);
    assert_eq!(cluster.member(3).applied.len(), cluster.member(1).applied.len());
}

#[test]
fn a_leader_that_applies_slowly_proposes_no_more_than_it_can_hold() {
    let mut cluster = Cluster::led_by(1, &[1, 2, 3]);
    cluster.member(1).holds_applies = true;
    for _ in 0..60 {
        cluster.propose_bytes(1, MIB);
        cluster.tick(1);
    }
    let held = cluster.member(1).core.cached_bytes();
    assert!(held < MAX_UNAPPLIED_BYTES + 18 * MIB, "{held} bytes in memory");
    assert!(cluster.member(1).core.is_leader());

    cluster.member(1).holds_applies = false;
    cluster.tick(120);
    assert_eq!(cluster.member(1).core.proposals_pending(), 0, "what waited was proposed");
}
