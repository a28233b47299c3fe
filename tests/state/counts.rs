//! What reads cost: a count the rows of its span in the index, each at most once, and no value; one key its own rows and no other's.

use std::collections::BTreeMap;
use std::sync::Arc;

use metcd::state::command::{Body, Compact, DeleteRange, KeySpan};
use metcd::state::outcome::Refusal;
use metcd::state::reader::RangeQuery;
use metcd::store::Table;

use crate::observed::{ObservedStore, Reads};
use crate::support::{Node, all_keys, command, payload, put, refusal};

/// More than one scan of the store looks at.
const KEYS: usize = 2500;

/// Versions of one key that are looked at one by one before a seek passes the rest.
const RUN: usize = 16;

fn observed() -> (Node, Arc<ObservedStore>) {
    let store = Arc::new(ObservedStore::default());
    (Node::of(store.clone(), &[1]), store)
}

fn key(number: usize) -> Vec<u8> {
    format!("k/{number:04}").into_bytes()
}

/// Applies these puts, many to an entry.
fn put_all(node: &mut Node, keys: impl Iterator<Item = Vec<u8>>, value: &[u8]) {
    let keys: Vec<Vec<u8>> = keys.collect();
    for keys in keys.chunks(500) {
        let first = node.seq;
        let commands = (first..).zip(keys).map(|(seq, key)| command(seq, Body::Put(put(key, value))));
        let outcomes = node.apply(&payload(1, 1, first, commands.collect()));
        assert!(outcomes.iter().all(|outcome| outcome.result.is_ok()));
        node.seq += keys.len() as u64;
    }
}

/// `KEYS` keys of one version each, between others.
fn filled() -> (Node, Arc<ObservedStore>) {
    let (mut node, store) = observed();
    put_all(&mut node, (0..KEYS).map(key), &[7; 1000]);
    for outside in [b"a", b"z"] {
        node.put(outside, b"outside the span");
    }
    (node, store)
}

fn of_the_span() -> RangeQuery {
    RangeQuery {
        span: KeySpan::prefix(b"k/"),
        ..all_keys()
    }
}

fn rows(reads: &BTreeMap<Table, Reads>) -> usize {
    reads[&Table::Index].rows
}

#[test]
fn a_count_alone_reads_each_row_of_the_index_once_and_no_value() {
    let (node, store) = filled();
    let query = RangeQuery {
        count_only: true,
        ..of_the_span()
    };
    let (page, reads) = store.reads_of(|| node.reader().range(&query).unwrap());
    assert_eq!((page.count, page.kvs.len()), (KEYS as u64, 0));
    assert_eq!(reads.keys().collect::<Vec<_>>(), [&Table::Index]);
    assert_eq!(rows(&reads), KEYS);
    // A scan may run under the engine's lock: it looks at a thousand records at most, and may find only then that there are no more.
    let Reads { gets, scans, .. } = reads[&Table::Index];
    assert!(gets == 0 && scans <= KEYS / 1000 + 1, "{reads:?}");
}

#[test]
fn a_page_with_the_count_of_its_span_reads_the_values_that_it_returns_and_no_other() {
    let (node, store) = filled();
    let reader = node.reader();
    for (descending, keys_only) in [(false, false), (false, true), (true, false), (true, true)] {
        let first = RangeQuery {
            limit: 10,
            with_count: true,
            descending,
            keys_only,
            ..of_the_span()
        };
        let (page, reads) = store.reads_of(|| reader.range(&first).unwrap());
        assert_eq!((page.count, page.kvs.len(), page.more), (KEYS as u64, 10, true));
        // The page looks one key ahead, and from its end one row further.
        assert!((KEYS..=KEYS + 2).contains(&rows(&reads)), "{reads:?}");
        let values = reads.get(&Table::Revision).copied().unwrap_or_default();
        let wanted = if keys_only { 0 } else { 10 };
        assert_eq!(
            (values.gets, values.scans),
            (wanted, 0),
            "descending {descending}, keys only {keys_only}"
        );
        assert!(
            reads.keys().all(|table| matches!(table, Table::Index | Table::Revision)),
            "{reads:?}"
        );

        // Without the count the next page costs what it shows, however large the span.
        let next = RangeQuery {
            after: page.kvs.last().map(|kv| kv.key.to_vec()),
            with_count: false,
            ..first.clone()
        };
        let (page, reads) = store.reads_of(|| reader.range(&next).unwrap());
        assert_eq!((page.kvs.len(), page.more), (10, true));
        assert!(rows(&reads) <= 12, "{reads:?}");

        let counted = RangeQuery { with_count: true, ..next };
        let (page, reads) = store.reads_of(|| reader.range(&counted).unwrap());
        assert_eq!((page.count, page.kvs.len()), (KEYS as u64, 10));
        assert!((KEYS..=KEYS + 12).contains(&rows(&reads)), "{reads:?}");
        assert_eq!(reads.get(&Table::Revision).map_or(0, |values| values.gets), wanted);
    }
}

#[test]
fn many_versions_of_a_key_cost_a_count_no_more_than_a_run_of_them() {
    const VERSIONS: usize = 200;
    let (mut node, store) = observed();
    let keys = 20;
    for _ in 0..VERSIONS {
        put_all(&mut node, (0..keys).map(key), b"v");
    }
    let reader = node.reader();
    let counted = |revision: Option<u64>| {
        let query = RangeQuery {
            revision,
            count_only: true,
            ..of_the_span()
        };
        let (page, reads) = store.reads_of(|| reader.range(&query).unwrap());
        assert_eq!(page.count, keys as u64);
        assert_eq!(reads.keys().collect::<Vec<_>>(), [&Table::Index]);
        rows(&reads)
    };
    assert!(counted(None) <= keys * RUN, "{} rows", counted(None));
    // In the past: a run of what came later, and a run of what was there.
    let middle = 1 + (keys * VERSIONS / 2) as u64;
    assert!(counted(Some(middle)) <= 2 * keys * RUN, "{} rows", counted(Some(middle)));
}

#[test]
fn a_range_delete_over_its_limit_is_refused_without_a_look_at_a_value() {
    let (mut node, store) = filled();
    let delete = DeleteRange {
        span: KeySpan::prefix(b"k/"),
        max_keys: 100,
    };
    let (outcome, reads) = store.reads_of(|| node.run(Body::DeleteRange(delete)));
    let too_large = Refusal::RangeTooLarge {
        keys: KEYS as u64,
        max: 100,
    };
    assert_eq!(refusal(&outcome), Some(&too_large));
    // Those that it would have deleted and one more, and then all, to say how many they are.
    assert!(rows(&reads) <= KEYS + 102, "{reads:?}");
    assert_eq!(reads.get(&Table::Revision), None);
}

#[test]
fn a_look_at_one_key_ends_with_its_own_rows_whatever_lies_behind() {
    let (mut node, store) = filled();
    let reader = node.reader();
    let index_rows = |step: &dyn Fn()| store.reads_of(step).1.get(&Table::Index).map_or(0, |index| index.rows);
    let absent = || assert_eq!(reader.get(b"b", None).unwrap().1, None);
    assert_eq!(index_rows(&absent), 0);
    let there = || assert!(reader.get(b"a", None).unwrap().1.is_some());
    assert_eq!(index_rows(&there), 1);
    let not_yet = || assert_eq!(reader.get(b"z", Some(1)).unwrap().1, None);
    assert_eq!(index_rows(&not_yet), 0);
    for (key, rows) in [(b"b", 0), (b"a", 1)] {
        let (_, reads) = store.reads_of(|| node.put(key, b"v"));
        assert_eq!(reads.get(&Table::Index).map_or(0, |index| index.rows), rows);
    }
}

#[test]
fn garbage_of_a_key_is_found_without_a_look_at_the_next_key() {
    let (mut node, store) = filled();
    put_all(&mut node, (0..KEYS).map(key), b"again");
    let revision = node.reader().revision();
    assert!(node.run(Body::Compact(Compact { revision })).result.is_ok());
    let (is_more, reads) = store.reads_of(|| node.state.collect_garbage(10 * KEYS).unwrap());
    assert!(!is_more);
    // Both versions of each key that was overwritten. What made its key ended nothing.
    assert_eq!(rows(&reads), 2 * KEYS);
    assert_eq!(node.value(&key(KEYS - 1)), Some(b"again".to_vec()));
}
