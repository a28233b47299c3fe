//! Idempotency keys (rule 14).

use super::*;

#[test]
fn an_idempotency_key_gets_the_first_answer_again_and_changes_nothing() {
    let mut node = Node::new();
    let first = node.run_with(Body::Put(put(b"a", b"1")), idempotency("k", b"f", 10));
    node.put(b"a", b"2");
    let again = node.run_with(Body::Put(put(b"a", b"1")), idempotency("k", b"f", 10));
    assert_eq!(again, Outcome { replayed: true, ..first });
    assert_eq!(node.value(b"a").as_deref(), Some(&b"2"[..]));
    let other = node.run_with(Body::Put(put(b"a", b"3")), idempotency("k", b"another request", 10));
    assert_eq!(refusal(&other), Some(&Refusal::IdempotencyKeyReused));
}

#[test]
fn answers_that_take_too_many_bytes_fill_the_table_too() {
    let mut node = Node::new();
    node.put(b"a", &[b'v'; 1000]);
    let bounded = |key| metcd::state::command::Idempotency {
        max_bytes: 1000,
        ..idempotency(key, b"f", 10)
    };
    let with_prev = |value: &'static [u8]| {
        Body::Put(Put {
            want_prev: true,
            ..put(b"a", value)
        })
    };
    assert!(node.run_with(with_prev(b"1"), bounded("1")).result.is_ok());
    let refused = node.run_with(with_prev(b"2"), bounded("2"));
    assert_eq!(refusal(&refused), Some(&Refusal::IdempotencyTableFull));
    assert!(node.run_with(with_prev(b"1"), bounded("1")).replayed, "what is there is answered");
    let up_to_stamp = node.reader().oldest_idempotency_stamp().unwrap();
    node.run(Body::Evict(Evict { up_to_stamp, term: TERM }));
    assert!(node.run_with(with_prev(b"2"), bounded("2")).result.is_ok());
}

#[test]
fn a_full_idempotency_table_refuses_and_evicts_nothing_by_itself() {
    let mut node = Node::new();
    node.run_with(delete(b"none"), idempotency("1", b"f", 1));
    let refused = node.run_with(Body::Put(put(b"a", b"1")), idempotency("2", b"f", 1));
    assert_eq!(refusal(&refused), Some(&Refusal::IdempotencyTableFull));
    assert_eq!((node.value(b"a"), node.reader().idempotency_len()), (None, 1));
    let up_to_stamp = node.reader().oldest_idempotency_stamp().unwrap();
    node.run(Body::Evict(Evict {
        up_to_stamp: up_to_stamp - 1,
        term: TERM,
    }));
    node.run(Body::Evict(Evict {
        up_to_stamp,
        term: TERM + 1,
    }));
    assert_eq!(node.reader().idempotency_len(), 1);
    node.run(Body::Evict(Evict { up_to_stamp, term: TERM }));
    assert_eq!(node.reader().idempotency_len(), 0);
    assert!(created(&node.run_with(Body::Put(put(b"a", b"1")), idempotency("2", b"f", 1))));
}
