//! Rule 22: raft's configuration changes exactly when the state machine applies the entry; neither when it is appended nor when it is
//! committed.

use crate::harness::{Cluster, removal};

#[test]
fn rule_22_the_configuration_changes_when_the_entry_is_applied_on_each_member_by_itself() {
    let mut cluster = Cluster::led_by(1, &[1, 2, 3]);
    for id in [1, 2, 3] {
        cluster.member(id).holds_applies = true;
    }
    let (index, _) = cluster.change(1, &removal(3)).expect("the leader takes it");
    cluster.tick(2);
    for id in [1, 2] {
        assert!(cluster.view(id).commit_index >= index, "member {id} knows that it is committed");
        assert_eq!(cluster.view(id).voters, [1, 2, 3], "and still counts by the old configuration");
    }

    cluster.member(2).holds_applies = false;
    cluster.settle();
    assert_eq!(cluster.view(2).voters, [1, 2]);
    assert_eq!(cluster.view(1).voters, [1, 2, 3], "the leader has not applied it yet");

    cluster.member(1).holds_applies = false;
    cluster.settle();
    assert_eq!(cluster.view(1).voters, [1, 2]);
}
