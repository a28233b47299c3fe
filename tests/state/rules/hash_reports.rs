//! Reports of the own state, and who differs from the majority.

use super::*;

#[test]
fn a_report_of_the_own_state_is_due_every_ten_thousand_entries_and_equal_on_equal_states() {
    let run = |slice: usize| {
        let mut node = Node::new();
        let log: Vec<Entry> = (2..=10_001)
            .map(|index| entry(index, index, &payload(1, 1, 1, Vec::new())))
            .collect();
        for entries in log.chunks(slice) {
            node.state.apply(entries).unwrap();
        }
        let report = node.state.take_hash_report(1).unwrap();
        assert_eq!(node.state.take_hash_report(1), None);
        report
    };
    let report = run(7);
    assert_eq!((report.index, report.hash.len()), (10_000, 16));
    assert_eq!(report, run(9_999));
}

#[test]
fn a_member_that_differs_from_the_majority_learns_it_from_the_log() {
    let mut node = Node::new();
    for (member, hash) in [(1, b"same"), (2, b"same"), (3, b"else")] {
        node.run(Body::HashReport(HashReport {
            member,
            index: 10_000,
            hash: Bytes::from_static(hash),
        }));
    }
    assert!(node.reader().divergence(3).is_some());
    assert_eq!((node.reader().divergence(1), node.reader().disagreement()), (None, None));
}

#[test]
fn a_member_that_was_found_to_differ_is_so_after_a_restart_and_to_whoever_gets_a_snapshot() {
    let mut node = Node::new();
    for (member, hash) in [(1, b"same"), (2, b"same"), (3, b"else")] {
        node.run(Body::HashReport(HashReport {
            member,
            index: 10_000,
            hash: Bytes::from_static(hash),
        }));
    }
    let restarted = State::open(node.store.clone()).unwrap();
    assert_eq!(restarted.reader().divergence(3), node.reader().divergence(3));
    let copied: Arc<dyn KvStore> = Arc::new(MemoryStore::new());
    let mut batch = WriteBatch::default();
    node.records()
        .into_iter()
        .for_each(|record| batch.put(record.table, record.key, record.value));
    copied.write(batch).unwrap();
    let copy = State::open(copied).unwrap().reader();
    assert_eq!(copy.divergence(3), node.reader().divergence(3));
    assert!(copy.divergence(3).is_some() && copy.divergence(1).is_none());
}

#[test]
fn a_report_that_the_log_does_not_have_comes_again_after_a_restart_and_is_due_until_it_is_recorded() {
    let mut node = Node::new();
    let mut empty = Entry {
        term: TERM,
        ..Entry::default()
    };
    let log: Vec<Entry> = (node.next_index()..=10_000)
        .map(|index| {
            empty.index = index;
            empty.clone()
        })
        .collect();
    node.state.apply(&log).unwrap();
    let report = node.state.take_hash_report(1).unwrap();
    assert!(node.reader().lacks_hash_report(&report));
    let mut restarted = State::open(node.store.clone()).unwrap();
    assert_eq!(restarted.take_hash_report(1).as_ref(), Some(&report));
    node.run(Body::HashReport(report.clone()));
    assert!(!node.reader().lacks_hash_report(&report));
    assert_eq!(State::open(node.store.clone()).unwrap().take_hash_report(1), None);
    // One for an index that is forgotten would never be recorded: it is not due either.
    for index in 2..=6 {
        node.run(Body::HashReport(HashReport {
            index: index * 10_000,
            ..report.clone()
        }));
    }
    assert!(!node.reader().lacks_hash_report(&HashReport { member: 2, ..report }));
}
