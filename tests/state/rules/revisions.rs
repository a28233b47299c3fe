//! What moves the revision, and by how much.

use super::*;

#[test]
fn an_empty_store_is_at_revision_1_and_each_request_that_changes_something_adds_one() {
    let mut node = Node::new();
    assert_eq!(node.reader().revision(), 1);
    assert_eq!(node.put(b"a", b"1").revision, 2);
    let both = txn_of(vec![TxnOpBody::Put(put(b"a", b"2")), TxnOpBody::Put(put(b"b", b"2"))]);
    assert_eq!(node.run(both).revision, 3);
    assert_eq!(node.run(delete_prefix(b"")).revision, 4);
}

#[test]
fn what_changes_nothing_keeps_the_revision() {
    let mut node = Node::new();
    node.put(b"a", b"1");
    assert_eq!(refusal(&node.run(delete(b"none"))), Some(&Refusal::NotFound));
    node.run(delete_prefix(b"none"));
    node.run(txn_of(Vec::new()));
    node.run(Body::LeaseGrant(LeaseGrant { ttl_ms: 1, id: 0 }));
    assert_eq!(node.reader().revision(), 2);
}

#[test]
fn version_counts_from_1_again_after_a_delete() {
    let mut node = Node::new();
    node.put(b"a", b"1");
    node.put(b"a", b"2");
    assert_eq!(node.reader().get(b"a", None).unwrap().1.unwrap().version, 2);
    node.run(delete(b"a"));
    assert!(created(&node.put(b"a", b"3")));
    let kv = node.reader().get(b"a", None).unwrap().1.unwrap();
    assert_eq!((kv.version, kv.create_revision, kv.mod_revision), (1, 5, 5));
}

#[test]
fn a_put_that_was_told_to_answers_with_the_previous_value_also_within_one_entry() {
    let mut node = Node::new();
    let want_prev = |value: &[u8]| {
        Body::Put(Put {
            want_prev: true,
            ..put(b"a", value)
        })
    };
    let outcomes = node.apply(&payload(1, 1, 1, vec![command(1, want_prev(b"1")), command(2, want_prev(b"2"))]));
    let prev_of = |outcome: &Outcome| match &outcome.result {
        Ok(Success::Put { prev, .. }) => prev.as_ref().map(|kv| kv.value.clone()),
        other => panic!("{other:?}"),
    };
    assert_eq!(prev_of(&outcomes[0]), None);
    assert_eq!(prev_of(&outcomes[1]), Some(Bytes::from_static(b"1")));
}
