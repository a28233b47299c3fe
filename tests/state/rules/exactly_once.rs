//! A command is applied once, however often it is proposed (rules 13 to 15).

use super::*;

#[test]
fn a_command_proposed_again_is_applied_once_and_answered_with_its_first_result() {
    let mut node = Node::new();
    let first = node.apply(&payload(1, 1, 1, vec![command(1, Body::Put(put(b"a", b"1")))]));
    node.apply(&payload(2, 1, 1, vec![command(1, Body::Put(put(b"a", b"2")))]));
    let again = node.apply(&payload(1, 1, 1, vec![command(1, Body::Put(put(b"a", b"1")))]));
    assert_eq!(
        again,
        [Outcome {
            replayed: true,
            ..first[0].clone()
        }]
    );
    assert_eq!(node.value(b"a").as_deref(), Some(&b"2"[..]));
}

#[test]
fn a_repeated_command_whose_result_is_not_kept_says_so() {
    let mut node = Node::new();
    let range = payload(1, 1, 1, vec![command(1, delete_prefix(b"x"))]);
    node.apply(&range);
    assert_eq!(refusal(&node.apply(&range)[0]), Some(&Refusal::AlreadyApplied));
}

#[test]
fn below_the_low_water_mark_nothing_is_applied() {
    let mut node = Node::new();
    node.apply(&payload(1, 1, 1000, vec![command(1000, Body::Put(put(b"a", b"1")))]));
    let late = node.apply(&payload(1, 1, 5, vec![command(999, Body::Put(put(b"a", b"late")))]));
    assert_eq!(late, []);
    assert_eq!(node.value(b"a").as_deref(), Some(&b"1"[..]));
}

#[test]
fn a_newer_boot_supersedes_the_older_one() {
    let mut node = Node::new();
    node.apply(&payload(1, 7, 1, vec![command(1, Body::Put(put(b"a", b"7")))]));
    let newer = node.apply(&payload(1, 8, 1, vec![command(1, Body::Put(put(b"a", b"8")))]));
    assert!(!newer[0].replayed);
    assert_eq!(node.apply(&payload(1, 7, 1, vec![command(2, Body::Put(put(b"a", b"old")))])), []);
    assert_eq!(node.value(b"a").as_deref(), Some(&b"8"[..]));
}

#[test]
fn the_newest_start_of_each_member_is_known_to_readers_and_after_a_restart() {
    let mut node = Node::new();
    assert_eq!(node.reader().boots().len(), 0);
    // An empty payload, too: a start that changes nothing.
    node.apply(&payload(1, 7, 1, vec![]));
    node.apply(&payload(2, 3, 1, vec![command(1, Body::Put(put(b"a", b"3")))]));
    node.apply(&payload(1, 8, 1, vec![]));
    node.apply(&payload(1, 7, 1, vec![]));
    let known = [(1, 8), (2, 3)];
    assert!(node.reader().boots().iter().map(|(id, boot)| (*id, *boot)).eq(known));
    node.state = State::open(node.store.clone()).unwrap();
    assert!(node.reader().boots().iter().map(|(id, boot)| (*id, *boot)).eq(known));
}

/// Whoever looks after the thread sees that it goes on, however expensive the commands of an entry are.
#[test]
fn each_command_of_an_entry_gives_a_sign_of_life() {
    let mut node = Node::new();
    let commands = (1..=30).map(|seq| command(seq, Body::Put(put(b"a", b"1")))).collect();
    let entry = crate::support::entry(node.next_index(), 1, &payload(1, 1, 1, commands));
    let signs = std::cell::Cell::new(0);
    node.state.apply_watched(&[entry], &|| signs.set(signs.get() + 1)).unwrap();
    assert_eq!(signs.get(), 30);
}

#[test]
fn sessions_survive_a_restart_of_the_state() {
    let mut node = Node::new();
    let commands: Vec<_> = (1..=700)
        .map(|seq| command(seq, Body::Put(put(b"a", &seq.to_be_bytes()))))
        .collect();
    node.apply(&payload(1, 1, 1, commands.clone()));
    let revision = node.reader().revision();
    node.state = State::open(node.store.clone()).unwrap();
    let again = node.apply(&payload(1, 1, 300, commands));
    assert_eq!(again.len(), 401);
    assert!(again.iter().all(|outcome| outcome.replayed));
    assert_eq!(node.reader().revision(), revision);
    let sessions = node
        .records()
        .into_iter()
        .filter(|record| record.table == metcd::store::Table::Session)
        .count();
    assert_eq!(sessions, 1 + 2, "a header, and the blocks that hold 300 to 700");
}
