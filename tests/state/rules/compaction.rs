//! Time, compaction and what garbage collection leaves.

use super::*;

#[test]
fn cluster_time_never_goes_back_and_tells_which_revision_was_current_when() {
    let mut node = Node::new();
    let at = |index, stamp_ms, seq| entry(index, stamp_ms, &payload(1, 1, 1, vec![command(seq, Body::Put(put(b"a", b"1")))]));
    node.state.apply(&[at(2, 10_000, 1), at(3, 4_000, 2), at(4, 20_000, 3)]).unwrap();
    let reader = node.reader();
    assert_eq!(reader.cluster_time_ms(), 20_000);
    assert_eq!(reader.revision_before(9_999), None);
    assert_eq!(reader.revision_before(15_000), Some(1));
    assert_eq!(reader.revision_before(20_000), Some(3));
}

#[test]
fn compaction_is_refused_beyond_the_current_revision_and_for_what_is_compacted() {
    let mut node = Node::new();
    (0..5).for_each(|_| drop(node.put(b"a", b"1")));
    let compact = |revision| Body::Compact(Compact { revision });
    assert_eq!(refusal(&node.run(compact(9))), Some(&Refusal::FutureRevision { current: 6 }));
    assert_eq!(node.run(compact(4)).result, Ok(Success::Compact { compacted_revision: 4 }));
    assert_eq!(refusal(&node.run(compact(4))), Some(&Refusal::Compacted { compacted_revision: 4 }));
    assert!(matches!(
        node.reader().get(b"a", Some(3)),
        Err(ReadError::Compacted { compacted_revision: 4 })
    ));
    assert!(node.reader().get(b"a", Some(4)).unwrap().1.is_some());
}

#[test]
fn a_pinned_revision_stays_readable_though_it_is_compacted() {
    let mut node = Node::new();
    node.put(b"a", b"old");
    node.put(b"b", b"old");
    let pin = node.reader().pin(None).unwrap();
    node.put(b"a", b"new");
    node.run(delete(b"b"));
    node.run(Body::Compact(Compact { revision: 5 }));
    node.collect_all_garbage();
    let page = node
        .reader()
        .range(&RangeQuery {
            revision: Some(pin.revision),
            ..all_keys()
        })
        .unwrap();
    assert_eq!(page.kvs.iter().map(|kv| &kv.value[..]).collect::<Vec<_>>(), [b"old", b"old"]);
    let revision = pin.revision;
    drop(pin);
    assert!(matches!(node.reader().pin(Some(revision)), Err(ReadError::Compacted { .. })));
}

#[test]
fn garbage_collection_leaves_what_a_snapshot_holds_and_nothing_else() {
    let mut node = Node::new();
    for round in 0..10u8 {
        node.put(b"a", &[round]);
        node.put(b"b", &[round]);
        node.run(delete(b"b"));
    }
    node.run(Body::Compact(Compact {
        revision: node.reader().revision(),
    }));
    node.collect_all_garbage();
    let rows = |table| {
        let mut rows = 0;
        let all = (std::ops::Bound::Unbounded, std::ops::Bound::Unbounded);
        let count = &mut |_: &[u8], _: &[u8]| {
            rows += 1;
            std::ops::ControlFlow::Continue(())
        };
        node.store.scan(table, all, metcd::store::Order::Asc, count).unwrap();
        rows
    };
    assert_eq!((rows(metcd::store::Table::Index), rows(metcd::store::Table::Revision)), (1, 1));
    assert_eq!(node.reader().logical_bytes(), 1 + 1 + 64);
}
