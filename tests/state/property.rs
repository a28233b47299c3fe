//! Random histories: the state machine against the model, sliced, stopped and copied in random ways.

use std::sync::Arc;

use bytes::Bytes;
use metcd::state::command::{
    Body, Command, Compact, Compare, Conditions, Delete, DeleteRange, Evict, Idempotency, KeySpan, LeaseExpire, LeaseGrant, LeaseRevoke,
    Put, Txn, TxnGet, TxnOp, TxnOpBody,
};
use metcd::state::outcome::{Outcome, Success};
use metcd::state::reader::{RangeQuery, ReadError};
use metcd::state::watch::{Change, Event, WatchFilter};
use metcd::state::{State, StateReader};
use metcd::store::MemoryStore;
use metcd::store::{KvStore, WriteBatch};
use proptest::prelude::*;
use raft::eraftpb::Entry;

use crate::model::{Keys, Model};
use crate::support::{CLUSTER, TERM, all_keys, command, drain, entry, everything, member, payload, records_of};

/// The keys of the random commands: awkward to order and to escape.
pub const KEYS: [&[u8]; 9] = [b"a", b"a\0", b"a\0b", b"ab", b"b/1", b"b/2", b"b/3", b"\0", b"\xff\xff"];

fn key() -> impl Strategy<Value = Bytes> {
    (0..KEYS.len()).prop_map(|at| Bytes::from_static(KEYS[at]))
}

fn value() -> impl Strategy<Value = Bytes> {
    proptest::collection::vec(prop_oneof![Just(0u8), Just(b'x'), any::<u8>()], 0..4).prop_map(Bytes::from)
}

fn span() -> impl Strategy<Value = KeySpan> {
    prop_oneof![
        key().prop_map(|key| KeySpan::single(&key)),
        key().prop_map(|key| KeySpan::prefix(&key[..1])),
        Just(KeySpan::prefix(b"")),
        (key(), key()).prop_map(|(start, end)| KeySpan { start, end: Some(end) }),
        key().prop_map(|start| KeySpan { start, end: None }),
    ]
}

fn conditions() -> impl Strategy<Value = Option<Conditions>> {
    let some = (any::<u8>(), 1u64..20).prop_map(|(which, revision)| {
        let mut conditions = Conditions::default();
        match which % 5 {
            0 => conditions.if_match_any = true,
            1 => conditions.if_match = vec![revision, revision + 1, revision + 2],
            2 => conditions.if_none_match_any = true,
            3 => conditions.if_none_match = vec![revision, revision + 1],
            _ => conditions.if_match_never = true,
        }
        conditions
    });
    proptest::option::weighted(0.25, some)
}

fn put() -> impl Strategy<Value = Put> {
    let lease = prop_oneof![4 => Just(0u64), 2 => 1u64..6];
    let ttl_ms = prop_oneof![4 => Just(0u64), 1 => Just(5000u64)];
    (key(), value(), conditions(), lease, ttl_ms, any::<bool>()).prop_map(|(key, value, conditions, lease, ttl_ms, want_prev)| Put {
        key,
        value,
        conditions,
        lease,
        ttl_ms,
        want_prev,
    })
}

fn delete_range() -> impl Strategy<Value = DeleteRange> {
    (span(), 0u64..6).prop_map(|(span, max_keys)| DeleteRange { span, max_keys })
}

fn txn_op() -> impl Strategy<Value = TxnOp> {
    let get = (span(), 0u64..4, any::<[bool; 3]>()).prop_map(|(span, limit, [descending, keys_only, count_only])| TxnGet {
        span,
        limit,
        descending,
        keys_only,
        count_only,
        single: false,
    });
    let unconditional = put().prop_map(|put| Put {
        conditions: None,
        want_prev: false,
        ..put
    });
    prop_oneof![
        3 => unconditional.prop_map(TxnOpBody::Put),
        1 => get.prop_map(TxnOpBody::Get),
        1 => delete_range().prop_map(TxnOpBody::Delete),
    ]
    .prop_map(|body| TxnOp { body: Some(body) })
}

fn txn() -> impl Strategy<Value = Txn> {
    let compare = (key(), 0..5i32, 0..4i32, 0u64..8, value()).prop_map(|(key, target, op, number, value)| Compare {
        key,
        target,
        op,
        number,
        value,
    });
    let ops = || proptest::collection::vec(txn_op(), 0..5);
    (proptest::collection::vec(compare, 0..3), ops(), ops()).prop_map(|(compare, then, or_else)| Txn {
        compare,
        then,
        or_else,
        ..Txn::default()
    })
}

fn body() -> impl Strategy<Value = Body> {
    let delete = (key(), conditions(), any::<bool>()).prop_map(|(key, conditions, want_prev)| {
        Body::Delete(Delete {
            key,
            conditions,
            want_prev,
        })
    });
    let term = prop_oneof![3 => Just(TERM), 1 => Just(TERM - 1)];
    prop_oneof![
        10 => put().prop_map(Body::Put),
        4 => delete,
        2 => delete_range().prop_map(Body::DeleteRange),
        5 => txn().prop_map(Body::Txn),
        2 => (prop_oneof![3 => Just(0u64), 1 => 1u64..8]).prop_map(|id| Body::LeaseGrant(LeaseGrant { ttl_ms: 7000, id })),
        1 => (1u64..8).prop_map(|id| Body::LeaseRevoke(LeaseRevoke { id })),
        1 => (1u64..8, term).prop_map(|(id, term)| Body::LeaseExpire(LeaseExpire { id, term })),
        1 => (0u64..40).prop_map(|revision| Body::Compact(Compact { revision })),
        1 => (0u64..1500).prop_map(|up_to_stamp| Body::Evict(Evict { up_to_stamp, term: TERM })),
    ]
}

fn idempotency() -> impl Strategy<Value = Option<Idempotency>> {
    let some = (0u8..4, 0u8..2).prop_map(|(key, fingerprint)| Idempotency {
        key: format!("key-{key}"),
        fingerprint: Bytes::copy_from_slice(&[fingerprint]),
        max_entries: 3,
        max_bytes: 0,
    });
    proptest::option::weighted(0.2, some)
}

/// One entry of the log: new commands, and how many of the earlier ones are proposed once more before them.
#[derive(Debug, Clone)]
pub struct Step {
    pub commands: Vec<(Body, Option<Idempotency>)>,
    again: usize,
    /// Ends the call of `apply`.
    pub ends_call: bool,
    /// After the call: open the store anew.
    pub reopens: bool,
    /// After the call: look for garbage in so many rows.
    pub garbage: usize,
}

pub fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = (
        proptest::collection::vec((body(), idempotency()), 0..4),
        prop_oneof![4 => Just(0usize), 1 => 1usize..4],
        any::<bool>(),
        prop_oneof![5 => Just(false), 1 => Just(true)],
        0usize..4,
    )
        .prop_map(|(commands, again, ends_call, reopens, garbage)| Step {
            commands,
            again,
            ends_call,
            reopens,
            garbage,
        });
    proptest::collection::vec(step, 1..25)
}

/// The log of the steps from `first_index` on, and what the model says of each command as it comes (`None`: applied before).
pub fn log_of(steps: &[Step], first_index: u64, model: &mut Model) -> Vec<(Entry, Vec<Option<Outcome>>)> {
    let mut log = Vec::new();
    let mut proposed: Vec<Command> = Vec::new();
    for (n, step) in steps.iter().enumerate() {
        let time_ms = 100 * (n as u64 + 1);
        let repeated: Vec<Command> = proposed.iter().rev().take(step.again).cloned().collect();
        let mut expected: Vec<Option<Outcome>> = repeated.iter().map(|_| None).collect();
        let mut commands = repeated;
        for (body, idempotency) in &step.commands {
            let new = Command {
                idempotency: idempotency.clone(),
                ..command(proposed.len() as u64 + 1, body.clone())
            };
            expected.push(Some(model.run(&new, TERM, time_ms)));
            proposed.push(new.clone());
            commands.push(new);
        }
        let low_water = (proposed.len() as u64).saturating_sub(8);
        log.push((
            entry(first_index + n as u64, time_ms, &payload(1, 1, low_water, commands)),
            expected,
        ));
    }
    log
}

fn fresh() -> (Arc<dyn KvStore>, State) {
    let store: Arc<dyn KvStore> = Arc::new(MemoryStore::new());
    let mut state = State::open(store.clone()).unwrap();
    state.bootstrap(CLUSTER, &[member(1), member(2), member(3)]).unwrap();
    (store, state)
}

pub fn check_reads(reader: &StateReader, model: &Model) {
    let compacted = model.compacted_revision;
    assert_eq!((reader.revision(), reader.compacted_revision()), (model.revision(), compacted));
    for (revision, keys) in model.at.iter().enumerate().skip(1) {
        let revision = revision as u64;
        if revision < compacted {
            assert!(matches!(reader.get(b"a", Some(revision)), Err(ReadError::Compacted { .. })));
            assert!(matches!(
                reader.range(&RangeQuery {
                    revision: Some(revision),
                    ..all_keys()
                }),
                Err(ReadError::Compacted { .. })
            ));
            continue;
        }
        for key in KEYS {
            let (at, kv) = reader.get(key, Some(revision)).unwrap();
            assert_eq!((at, kv.as_ref()), (revision, keys.get(key)), "{key:?} at {revision}");
        }
        check_lists(reader, keys, revision);
    }
    assert!(matches!(
        reader.get(b"a", Some(model.revision() + 1)),
        Err(ReadError::FutureRevision { .. })
    ));
}

fn check_lists(reader: &StateReader, keys: &Keys, revision: u64) {
    for (span, descending) in [
        (KeySpan::prefix(b""), false),
        (KeySpan::prefix(b""), true),
        (KeySpan::prefix(b"a"), true),
        (KeySpan::prefix(b"b"), false),
    ] {
        let mut expected: Vec<_> = keys.values().filter(|kv| span.contains(&kv.key)).cloned().collect();
        let query = RangeQuery {
            span: span.clone(),
            revision: Some(revision),
            with_count: true,
            limit: 2,
            descending,
            ..all_keys()
        };
        let count_only = reader
            .range(&RangeQuery {
                count_only: true,
                ..query.clone()
            })
            .unwrap();
        assert_eq!((count_only.kvs.len(), count_only.count), (0, expected.len() as u64));
        if descending {
            expected.reverse();
        }
        let mut listed = Vec::new();
        let mut after = None;
        loop {
            let page = reader
                .range(&RangeQuery {
                    after: after.clone(),
                    ..query.clone()
                })
                .unwrap();
            assert_eq!(page.count, expected.len() as u64);
            listed.extend(page.kvs);
            assert_eq!(page.more, listed.len() < expected.len());
            if !page.more {
                break;
            }
            after = listed.last().map(|kv| kv.key.to_vec());
        }
        assert_eq!(listed, expected, "{span:?} at {revision}");
    }
}

fn expected_changes(model: &Model, filter: &WatchFilter, after: u64) -> Vec<Change> {
    let prev_of = |revision: u64, event: &Event| {
        let before = usize::try_from(revision - 1).unwrap();
        let is_known = filter.want_prev && before as u64 >= model.compacted_revision;
        is_known.then(|| model.at[before].get(&event.kv.key[..]).cloned()).flatten()
    };
    let changes = model.events.range(after + 1..).map(|(revision, events)| {
        let events = events.iter().filter(|event| filter.span.contains(&event.kv.key));
        Change::new(
            *revision,
            events
                .map(|event| Event {
                    prev: prev_of(*revision, event),
                    ..event.clone()
                })
                .collect(),
        )
    });
    changes.filter(|change| !change.events.is_empty()).collect()
}

pub fn check_watches_from_history(reader: &StateReader, model: &Model) {
    let b_only = WatchFilter {
        span: KeySpan::prefix(b"b"),
        ..everything(true)
    };
    for after in model.compacted_revision..=model.revision() {
        for filter in [everything(false), everything(true), b_only.clone()] {
            // Opened before anything else happens, so all of it is history.
            let mut watcher = reader.watch(filter.clone(), after).unwrap();
            assert_eq!(drain(&mut watcher), expected_changes(model, &filter, after));
            assert_eq!(watcher.position(), model.revision());
        }
    }
    if model.compacted_revision > 0 {
        let refused = reader.watch(everything(false), model.compacted_revision - 1);
        assert!(matches!(refused, Err(ReadError::Compacted { .. })));
    }
}

pub fn check_the_rest(reader: &StateReader, model: &Model) {
    let leases: Vec<(u64, (u64, bool))> = reader
        .leases()
        .iter()
        .map(|lease| (lease.id, (lease.ttl_ms, lease.owned)))
        .collect();
    assert_eq!(leases, model.leases.iter().map(|(id, lease)| (*id, *lease)).collect::<Vec<_>>());
    for id in model.leases.keys() {
        let keys: Vec<Vec<u8>> = reader.lease_keys(*id).unwrap().iter().map(|key| key.to_vec()).collect();
        assert_eq!(keys, model.lease_keys(*id), "keys of lease {id}");
    }
    assert_eq!(reader.logical_bytes(), model.logical_bytes());
    let (revision, hash) = reader.hash(None).unwrap();
    assert_eq!(reader.recompute_hash(revision).unwrap(), hash);
}

pub fn check_outcome(found: &Outcome, expected: &Option<Outcome>) {
    match expected {
        Some(expected) => assert_eq!(found, expected),
        None => assert!(found.replayed, "applied twice: {found:?}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn everything_observable_is_as_in_the_model(steps in steps()) {
        let mut model = Model::new();
        let log = log_of(&steps, 2, &mut model);
        let (store, mut state) = fresh();
        let live_filter = WatchFilter { span: KeySpan::prefix(b"b"), ..everything(false) };
        let mut live = state.reader().watch(live_filter.clone(), 1).unwrap();
        let (mut seen, mut live_from) = (Vec::new(), 1);
        let mut call: Vec<Entry> = Vec::new();
        let mut expected = Vec::new();
        for (step, (entry, outcomes)) in steps.iter().zip(&log) {
            call.push(entry.clone());
            expected.extend(outcomes.iter().cloned());
            if !step.ends_call && entry.index <= log.len() as u64 {
                continue;
            }
            let results = state.apply(&call).unwrap();
            assert_eq!(results.len(), expected.len());
            results.iter().zip(&expected).for_each(|((_, found), expected)| check_outcome(found, expected));
            seen.extend(drain(&mut live));
            assert_eq!(live.position(), state.reader().revision());
            if step.garbage > 0 {
                state.collect_garbage(step.garbage).unwrap();
            }
            if step.reopens {
                // As after a crash: everything since an older index comes again, and is not applied again.
                state = State::open(store.clone()).unwrap();
                assert_eq!(state.apply(&call).unwrap(), Vec::new());
                assert_eq!(seen.split_off(0), expected_until(&model, &live_filter, live_from, state.reader().revision()));
                live_from = state.reader().revision();
                live = state.reader().watch(live_filter.clone(), live_from).unwrap();
            }
            call.clear();
            expected.clear();
        }
        assert_eq!(seen, expected_changes(&model, &live_filter, live_from));
        let reader = state.reader();
        check_reads(&reader, &model);
        check_watches_from_history(&reader, &model);
        check_the_rest(&reader, &model);
        while state.collect_garbage(2).unwrap() {}
        check_reads(&reader, &model);
        check_watches_from_history(&reader, &model);
        check_the_rest(&reader, &model);
    }

    #[test]
    fn equal_logs_make_equal_states_however_they_are_sliced_collected_and_copied(steps in steps()) {
        let mut model = Model::new();
        let log = log_of(&steps, 2, &mut model);
        let entries: Vec<Entry> = log.into_iter().map(|(entry, _)| entry).collect();
        let (_, mut at_once) = fresh();
        at_once.apply(&entries).unwrap();
        let (_, mut one_by_one) = fresh();
        for entry in &entries {
            one_by_one.apply(std::slice::from_ref(entry)).unwrap();
            one_by_one.collect_garbage(3).unwrap();
        }
        let records = records_of(&at_once);
        assert_eq!(records, records_of(&one_by_one));
        assert_eq!(at_once.reader().hash(None).unwrap(), one_by_one.reader().hash(None).unwrap());

        // A copy made in the middle goes on like the original.
        let (first, rest) = entries.split_at(entries.len() / 2);
        let (_, mut origin) = fresh();
        origin.apply(first).unwrap();
        let store = Arc::new(MemoryStore::new());
        let mut batch = WriteBatch::default();
        records_of(&origin).into_iter().for_each(|record| batch.put(record.table, record.key, record.value));
        store.write(batch).unwrap();
        let mut copy = State::open(store).unwrap();
        copy.apply(rest).unwrap();
        while copy.collect_garbage(2).unwrap() {}
        assert_eq!(records, records_of(&copy));
        check_reads(&copy.reader(), &model);
        check_watches_from_history(&copy.reader(), &model);
        check_the_rest(&copy.reader(), &model);
    }
}

fn expected_until(model: &Model, filter: &WatchFilter, after: u64, until: u64) -> Vec<Change> {
    expected_changes(model, filter, after)
        .into_iter()
        .filter(|change| change.revision <= until)
        .collect()
}

#[test]
fn a_replayed_result_is_the_first_one_where_it_is_kept() {
    let (_, mut state) = fresh();
    let commands = vec![command(1, Body::Put(crate::support::put(b"k", b"v")))];
    let first = state.apply(&[entry(2, 1, &payload(1, 1, 1, commands.clone()))]).unwrap();
    let again = state.apply(&[entry(3, 2, &payload(1, 1, 1, commands))]).unwrap();
    assert_eq!(
        first[0].1.result,
        Ok(Success::Put {
            created: true,
            prev: None,
            lease: 0
        })
    );
    assert_eq!(
        again[0],
        (
            first[0].0,
            Outcome {
                replayed: true,
                ..first[0].1.clone()
            }
        )
    );
}
