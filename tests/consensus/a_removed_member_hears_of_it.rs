//! A member that was removed goes only when it knows, and when nobody needs it any more.

use metcd::consensus::Input;
use raft::eraftpb::ConfChangeV2;

use crate::harness::{Cluster, ELECTION_TICKS, LINGER_TICKS, removal};

#[test]
fn the_leader_goes_on_with_a_removed_member_until_it_knows() {
    let mut cluster = Cluster::led_by(1, &[1, 2, 3]);
    cluster.member(3).holds_applies = true;
    let (index, _) = cluster.change(1, &removal(3)).expect("removed");
    assert_eq!(cluster.view(1).voters, [1, 2]);
    assert_eq!(cluster.view(1).leaving, [3], "it has not heard of the commit");
    cluster.tick(3);
    assert!(cluster.view(3).commit_index >= index, "now it has");
    assert!(cluster.view(1).leaving.is_empty());

    cluster.member(3).holds_applies = false;
    cluster.settle();
    assert_eq!(cluster.view(3).voters, [1, 2]);
    assert!(cluster.member(3).disk.hard_state.commit >= index, "and its disk knows");
    cluster.tick(2 * LINGER_TICKS);
    assert!(!cluster.member(3).core.has_left(), "somebody may need its vote");
    cluster.member(3).core.step(Input::ToldRemoved);
    assert!(cluster.member(3).core.has_left(), "nobody does");
}

#[test]
fn a_removed_member_that_was_cut_off_gets_the_entries_it_lacks() {
    let mut cluster = Cluster::led_by(1, &[1, 2, 3]);
    cluster.cut(1, 3);
    cluster.cut(2, 3);
    for _ in 0..5 {
        cluster.propose(1);
    }
    let (index, _) = cluster.change(1, &removal(3)).expect("removed");
    assert!(cluster.view(3).last_index < index);
    cluster.heal();
    cluster.tick(4);
    assert_eq!(cluster.view(3).voters, [1, 2]);
    assert!(cluster.member(3).disk.hard_state.commit >= index);
    assert!(cluster.view(1).leaving.is_empty());
}

/// Seed 2172 of the simulation: raft-rs panics when entries are asked for that are not in memory.
#[test]
fn a_removed_member_that_lags_beyond_the_leaders_memory_does_not_end_the_leader() {
    let mut cluster = Cluster::led_by(1, &[1, 2, 3]);
    cluster.cut(1, 3);
    cluster.cut(2, 3);
    for _ in 0..20 {
        cluster.propose_bytes(1, 1 << 20);
    }
    // What everybody who counts has is let go of, down to what may be kept.
    cluster.tick(2);
    cluster.change(1, &removal(3)).expect("removed");
    cluster.heal();
    cluster.tick(LINGER_TICKS);
    assert!(cluster.view(1).leaving.is_empty(), "its patience has ended");
    assert_eq!(cluster.view(1).voters, [1, 2]);
}

#[test]
fn the_patience_of_the_leader_ends() {
    let mut cluster = Cluster::led_by(1, &[1, 2, 3]);
    cluster.cut(1, 3);
    cluster.cut(2, 3);
    cluster.change(1, &removal(3)).expect("removed");
    cluster.tick(LINGER_TICKS - 1);
    assert_eq!(cluster.view(1).leaving, [3]);
    cluster.tick(1);
    assert!(cluster.view(1).leaving.is_empty());
}

#[test]
fn a_member_that_is_told_before_its_log_says_so_waits_for_its_log_while_it_is_led() {
    let mut cluster = Cluster::led_by(1, &[1, 2, 3]);
    cluster.member(3).holds_applies = true;
    cluster.change(1, &removal(3)).expect("removed");
    cluster.member(3).core.step(Input::ToldRemoved);
    cluster.tick(2);
    assert!(!cluster.member(3).core.has_left());
    cluster.member(3).holds_applies = false;
    cluster.settle();
    assert!(cluster.member(3).core.has_left());
}

#[test]
fn a_member_that_is_told_and_led_by_nobody_goes() {
    let mut cluster = Cluster::led_by(1, &[1, 2, 3]);
    cluster.isolate(3);
    cluster.tick(2 * ELECTION_TICKS);
    cluster.member(3).core.step(Input::ToldRemoved);
    assert!(!cluster.member(3).core.has_left(), "a leader may be about to be elected");
    cluster.tick(ELECTION_TICKS);
    assert!(cluster.member(3).core.has_left());
}

#[test]
fn a_removed_member_knows_it_after_a_restart_too() {
    let mut cluster = Cluster::led_by(1, &[1, 2, 3]);
    cluster.change(1, &removal(3)).expect("removed");
    cluster.tick(LINGER_TICKS / 2);
    cluster.isolate(3);
    cluster.restart(3);
    assert_eq!(cluster.view(3).voters, [1, 2], "its own disk says so");
    assert!(!cluster.member(3).core.has_left());
    cluster.member(3).core.step(Input::ToldRemoved);
    assert!(cluster.member(3).core.has_left());
}

/// Until member 1, which leads, has counted the acknowledgements of the change, and has done nothing yet that follows from it.
fn propose_until_committed(cluster: &mut Cluster, change: &ConfChangeV2) -> u64 {
    let proposed = cluster.member(1).core.propose_conf_change(change);
    let (index, _) = proposed.expect("the leader takes it");
    for _ in 0..100 {
        cluster.step_all();
        if cluster.view(1).commit_index >= index {
            return index;
        }
    }
    panic!("the change is never committed");
}

/// Two become one, and the one that stays has not got its sync back: if it crashed now, it would need the vote of the other.
#[test]
fn nobody_is_told_before_the_removal_is_durably_known_to_most() {
    let mut cluster = Cluster::led_by(1, &[1, 2]);
    cluster.member(2).holds_applies = true;
    // The change itself becomes durable on both; that it is committed does not.
    propose_until_committed(&mut cluster, &removal(2));
    cluster.member(1).holds_syncs = true;
    cluster.settle();
    assert_eq!(cluster.view(1).voters, [1, 2], "not in force: the commit index is not durable");
    assert!(cluster.member(1).unapplied.is_empty());
    cluster.member(1).holds_syncs = false;
    cluster.settle();
    assert_eq!(cluster.view(1).voters, [1]);
    let change = cluster.view(1).commit_index;
    assert!(cluster.member(1).disk.hard_state.commit >= change, "and its disk knows");
}

#[test]
fn an_acknowledgement_that_covers_a_change_waits_for_the_disk() {
    let mut cluster = Cluster::led_by(1, &[1, 2, 3, 4]);
    let index = propose_until_committed(&mut cluster, &removal(4));
    // The others have the entry, and hear only now that it is committed.
    assert!(cluster.view(2).commit_index < index);
    cluster.member(2).holds_syncs = true;
    cluster.isolate(3);
    cluster.sent.clear();
    cluster.tick(3);
    assert!(cluster.view(2).commit_index >= index);
    let tells = |cluster: &Cluster| cluster.sent.iter().any(|message| message.from == 2 && message.commit >= index);
    assert!(!tells(&cluster), "it says so before its disk knows: {:?}", cluster.sent);
    assert!(cluster.view(1).leaving.contains(&4), "one of three knows for sure");
    cluster.member(2).holds_syncs = false;
    cluster.settle();
    cluster.tick(2);
    assert!(tells(&cluster));
    assert!(cluster.view(1).leaving.is_empty());
}

#[test]
fn a_leader_of_a_later_term_knows_the_departed_when_an_entry_of_its_term_is_committed() {
    let mut cluster = Cluster::led_by(1, &[1, 2, 3, 4]);
    cluster.change(1, &removal(4)).expect("removed");
    cluster.tick(3);
    assert!(cluster.view(1).knows_the_departed);
    assert!(!cluster.view(2).knows_the_departed, "it does not lead");
    cluster.isolate(1);
    let leader = cluster.elect(&[2, 3]);
    cluster.settle();
    assert!(cluster.view(leader).knows_the_departed);
    assert!(cluster.view(leader).leaving.is_empty());
}

#[test]
fn whoever_does_not_know_of_a_removal_has_the_vote_of_the_removed_member() {
    let mut cluster = Cluster::led_by(1, &[1, 2, 3, 4]);
    cluster.cut(1, 3);
    cluster.member(2).holds_syncs = true;
    cluster.change(1, &removal(4)).expect("the leader takes it");
    cluster.cut_one_way(1, 2);
    cluster.member(2).holds_syncs = false;
    cluster.settle();
    assert_eq!(cluster.view(1).voters, [1, 2, 3], "the acknowledgement of 2 made it committed");
    // The leader is gone before 2 hears of the commit. Without 4 the other two are half of the old configuration.
    cluster.isolate(1);
    cluster.elect(&[2, 4]);
    assert!(!cluster.member(4).core.has_left());
}
