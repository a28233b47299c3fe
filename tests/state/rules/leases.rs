//! Leases: what ends with them, and what does not.

use super::*;

#[test]
fn revoking_a_lease_deletes_its_keys_in_one_revision() {
    let mut node = Node::new();
    let id = lease_of(&node.run(Body::LeaseGrant(LeaseGrant { ttl_ms: 5000, id: 0 })));
    for key in [b"a", b"b"] {
        node.run(Body::Put(Put {
            lease: id,
            ..put(key, b"1")
        }));
    }
    assert_eq!(node.reader().lease_keys(id).unwrap(), [&b"a"[..], &b"b"[..]]);
    let outcome = node.run(Body::LeaseRevoke(LeaseRevoke { id }));
    assert_eq!((outcome.revision, outcome.result), (4, Ok(Success::LeaseRevoke { deleted: 2 })));
    assert_eq!((node.value(b"a"), node.reader().lease(id)), (None, None));
}

#[test]
fn an_expiry_decided_in_another_term_is_void() {
    let mut node = Node::new();
    let id = lease_of(&node.run(Body::Put(Put {
        ttl_ms: 5000,
        ..put(b"a", b"1")
    })));
    assert_eq!(
        refusal(&node.run(Body::LeaseExpire(LeaseExpire { id, term: TERM - 1 }))),
        Some(&Refusal::Void)
    );
    assert!(node.value(b"a").is_some());
    node.run(Body::LeaseExpire(LeaseExpire { id, term: TERM }));
    assert_eq!(node.value(b"a"), None);
}

#[test]
fn an_owned_lease_goes_with_its_key_whichever_way_that_ends() {
    let endings: [fn() -> Body; 4] = [
        || Body::Put(put(b"a", b"2")),
        || {
            Body::Put(Put {
                ttl_ms: 9000,
                ..put(b"a", b"2")
            })
        },
        || delete(b"a"),
        || {
            txn_of(vec![TxnOpBody::Delete(DeleteRange {
                span: KeySpan::prefix(b"a"),
                max_keys: 0,
            })])
        },
    ];
    for end in endings {
        let mut node = Node::new();
        let id = lease_of(&node.run(Body::Put(Put {
            ttl_ms: 5000,
            ..put(b"a", b"1")
        })));
        assert_eq!(node.state.take_lease_changes(), [LeaseChange::Granted { id, ttl_ms: 5000 }]);
        node.run(end());
        assert!(node.state.take_lease_changes().contains(&LeaseChange::Removed { id }));
        assert_eq!(node.reader().lease(id), None);
        assert_eq!(node.reader().lease_keys(id).unwrap(), Vec::<Bytes>::new());
    }
}

#[test]
fn a_refused_put_with_ttl_makes_no_lease() {
    let mut node = Node::new();
    node.put(b"a", b"1");
    let conditions = Some(metcd::state::command::Conditions {
        if_none_match_any: true,
        ..Default::default()
    });
    let outcome = node.run(Body::Put(Put {
        ttl_ms: 5000,
        conditions,
        ..put(b"a", b"2")
    }));
    assert_eq!(refusal(&outcome), Some(&Refusal::PreconditionFailed { current: Some(2) }));
    assert_eq!(node.reader().leases(), []);
}

#[test]
fn an_owned_lease_takes_no_other_key() {
    let mut node = Node::new();
    let id = lease_of(&node.run(Body::Put(Put {
        ttl_ms: 5000,
        ..put(b"a", b"1")
    })));
    let outcome = node.run(Body::Put(Put {
        lease: id,
        ..put(b"b", b"1")
    }));
    assert_eq!(refusal(&outcome), Some(&Refusal::LeaseNotFound { id }));
}

#[test]
fn assigned_lease_ids_are_never_used_again() {
    let mut node = Node::new();
    node.run(Body::LeaseGrant(LeaseGrant { ttl_ms: 1, id: 2 }));
    let first = lease_of(&node.run(Body::LeaseGrant(LeaseGrant { ttl_ms: 1, id: 0 })));
    node.run(Body::LeaseRevoke(LeaseRevoke { id: first }));
    let second = lease_of(&node.run(Body::LeaseGrant(LeaseGrant { ttl_ms: 1, id: 0 })));
    assert!(second != first && second != 2);
    assert_eq!(
        refusal(&node.run(Body::LeaseGrant(LeaseGrant { ttl_ms: 1, id: second }))),
        Some(&Refusal::LeaseExists { id: second })
    );
}
