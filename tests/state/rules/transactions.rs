//! Transactions and range deletes: all or nothing.

use super::*;

#[test]
fn compares_see_the_state_before_and_operations_see_the_earlier_ones() {
    let mut node = Node::new();
    node.put(b"a", b"1");
    let compare = Compare {
        key: Bytes::from_static(b"a"),
        number: 1,
        target: 1,
        ..Compare::default()
    };
    let get = metcd::state::command::TxnGet {
        span: KeySpan::prefix(b""),
        ..Default::default()
    };
    let all = DeleteRange {
        span: KeySpan::prefix(b""),
        max_keys: 0,
    };
    let ops = [
        TxnOpBody::Put(put(b"b", b"2")),
        TxnOpBody::Get(get.clone()),
        TxnOpBody::Delete(all),
        TxnOpBody::Get(get),
    ];
    let then = ops.into_iter().map(|body| TxnOp { body: Some(body) }).collect();
    let outcome = node.run(Body::Txn(Txn {
        compare: vec![compare],
        then,
        ..Txn::default()
    }));
    let Ok(Success::Txn {
        succeeded: true,
        responses,
    }) = outcome.result
    else {
        panic!("{outcome:?}")
    };
    let counts: Vec<u64> = responses
        .iter()
        .filter_map(|response| match response {
            TxnResponse::Get { count, .. } => Some(*count),
            TxnResponse::Put { .. } | TxnResponse::Delete { .. } => None,
        })
        .collect();
    assert_eq!(counts, [2, 0]);
    assert_eq!(outcome.revision, 3);
}

#[test]
fn a_txn_with_a_lease_that_is_gone_changes_nothing_at_all() {
    let mut node = Node::new();
    let outcome = node.run(txn_of(vec![
        TxnOpBody::Put(put(b"a", b"1")),
        TxnOpBody::Put(Put {
            lease: 99,
            ..put(b"b", b"1")
        }),
    ]));
    assert_eq!(refusal(&outcome), Some(&Refusal::LeaseNotFound { id: 99 }));
    assert_eq!((node.value(b"a"), node.reader().revision()), (None, 1));
}

#[test]
fn a_range_delete_of_too_many_keys_is_refused_whole() {
    let mut node = Node::new();
    node.put(b"a", b"1");
    node.put(b"b", b"1");
    let too_many = DeleteRange {
        span: KeySpan::prefix(b""),
        max_keys: 1,
    };
    let expected = Refusal::RangeTooLarge { keys: 2, max: 1 };
    assert_eq!(refusal(&node.run(Body::DeleteRange(too_many.clone()))), Some(&expected));
    assert_eq!(refusal(&node.run(txn_of(vec![TxnOpBody::Delete(too_many)]))), Some(&expected));
    assert_eq!(node.reader().revision(), 3);
}

#[test]
fn a_txn_that_would_answer_too_much_or_look_at_too_many_keys_is_refused_whole() {
    let mut node = Node::new();
    for key in [b"a", b"b"] {
        node.put(key, &[b'v'; 500]);
    }
    let get = |count_only, keys_only, limit| {
        TxnOpBody::Get(metcd::state::command::TxnGet {
            span: KeySpan::prefix(b""),
            count_only,
            keys_only,
            limit,
            ..Default::default()
        })
    };
    let mut run = |ops: Vec<TxnOpBody>| {
        let Body::Txn(txn) = txn_of(ops) else { panic!("a txn") };
        node.run(Body::Txn(Txn {
            max_answer_bytes: 1000,
            max_keys: 4,
            ..txn
        }))
        .result
    };
    let write = || TxnOpBody::Put(put(b"c", b"1"));
    assert_eq!(run(vec![write(), get(false, false, 0)]), Err(Refusal::AnswerTooLarge { max: 1000 }));
    assert!(run(vec![get(false, false, 1)]).is_ok());
    assert!(run(vec![get(false, true, 0)]).is_ok());
    assert!(run(vec![get(true, false, 0), get(true, false, 0)]).is_ok());
    let three = vec![write(), get(true, false, 0), get(true, false, 0), get(true, false, 0)];
    assert_eq!(run(three), Err(Refusal::TooManyKeys { max: 4 }));
    let deletes = TxnOpBody::Delete(DeleteRange {
        span: KeySpan::prefix(b""),
        max_keys: 0,
    });
    assert_eq!(
        run(vec![get(true, false, 0), get(true, false, 0), deletes]),
        Err(Refusal::TooManyKeys { max: 4 })
    );
    assert_eq!((node.value(b"c"), node.reader().revision()), (None, 3), "nothing was done");
}
