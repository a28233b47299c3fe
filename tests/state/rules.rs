//! One behaviour a test, named after what it promises.

use std::sync::Arc;

use bytes::Bytes;
use metcd::state::command::{
    Body, Compact, Compare, DeleteRange, EntryPayload, Evict, FEATURE_LEVEL, HashReport, KeySpan, LeaseExpire, LeaseGrant, LeaseRevoke,
    MemberRecord, MemberUpdate, MembershipChange, Put, Txn, TxnOp, TxnOpBody,
};
use metcd::state::outcome::{ConflictCode, Outcome, Refusal, Success, TxnResponse};
use metcd::state::reader::{RangeQuery, ReadError};
use metcd::state::{ConfDecision, LeaseChange, State, StateError};
use metcd::store::{KvStore, MemoryStore, WriteBatch};
use prost::Message;
use protobuf::Message as ProtobufMessage;
use raft::eraftpb::{ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2, ConfState, Entry, EntryType};

use crate::support::{Node, TERM, all_keys, command, created, delete, delete_prefix, entry, idempotency, member, payload, put, refusal};

fn txn_of(ops: Vec<TxnOpBody>) -> Body {
    let then = ops.into_iter().map(|body| TxnOp { body: Some(body) }).collect();
    Body::Txn(Txn {
        compare: Vec::new(),
        then,
        or_else: Vec::new(),
    })
}

fn lease_of(outcome: &Outcome) -> u64 {
    match &outcome.result {
        Ok(Success::Put { lease, .. }) => *lease,
        Ok(Success::LeaseGrant { id, .. }) => *id,
        other => panic!("no lease in {other:?}"),
    }
}

// ---- revisions

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

// ---- transactions

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
        or_else: Vec::new(),
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

// ---- leases

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

// ---- exactly once (rules 13 to 15)

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

// ---- idempotency keys (rule 14)

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

// ---- time

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

// ---- compaction

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

// ---- entries

#[test]
fn an_entry_of_a_newer_feature_level_stops_the_node() {
    let mut node = Node::new();
    let newer = EntryPayload {
        feature_level: FEATURE_LEVEL + 1,
        ..payload(1, 1, 1, Vec::new())
    };
    let error = node.state.apply(&[entry(2, 1, &newer)]).unwrap_err();
    assert!(matches!(error, StateError::TooNew { index: 2, level, own } if level == own + 1));
}

#[test]
fn a_hole_in_the_log_stops_the_node() {
    let mut node = Node::new();
    assert!(matches!(
        node.state.apply(&[entry(3, 1, &payload(1, 1, 1, Vec::new()))]),
        Err(StateError::Corrupt(_))
    ));
}

#[test]
fn an_entry_that_cannot_be_decoded_stops_the_node_without_a_panic() {
    let mut node = Node::new();
    let mut damaged = entry(2, 1, &payload(1, 1, 1, Vec::new()));
    damaged.data = Bytes::from_static(b"\xff\xff\xff");
    assert!(matches!(node.state.apply(&[damaged]), Err(StateError::Corrupt(_))));
}

#[test]
fn an_empty_entry_moves_the_applied_index_only() {
    let mut node = Node::new();
    let mut empty = Entry::default();
    (empty.index, empty.term) = (2, 9);
    assert_eq!(node.state.apply(&[empty]).unwrap(), []);
    let applied = node.reader().applied();
    assert_eq!((applied.index, applied.term, node.reader().revision()), (2, 9, 1));
}

#[tokio::test]
async fn waiters_are_woken_when_their_index_and_revision_are_applied() {
    let mut node = Node::new();
    let reader = node.reader();
    let waiting = tokio::spawn(async move {
        reader.wait_applied(3).await;
        reader.wait_revision(3).await;
        (reader.applied_index(), reader.revision())
    });
    tokio::task::yield_now().await;
    node.put(b"a", b"1");
    tokio::task::yield_now().await;
    assert!(!waiting.is_finished());
    node.put(b"a", b"2");
    let (applied, revision) = tokio::time::timeout(std::time::Duration::from_secs(10), waiting)
        .await
        .unwrap()
        .unwrap();
    assert!(applied >= 3 && revision >= 3);
}

// ---- hash reports

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

// ---- members (rules 21 to 25)

fn conf_entry(index: u64, change: &MembershipChange, transition: ConfChangeTransition) -> Entry {
    let mut raft_change = ConfChangeV2::default();
    raft_change.set_transition(transition);
    let ids = |kind, ids: Vec<u64>| ids.into_iter().map(move |id| (kind, id));
    let singles = ids(ConfChangeType::AddLearnerNode, change.add.iter().map(|member| member.id).collect())
        .chain(ids(ConfChangeType::AddNode, change.promote.clone()))
        .chain(ids(ConfChangeType::RemoveNode, change.remove.clone()));
    for (kind, id) in singles {
        let mut single = ConfChangeSingle::default();
        single.set_change_type(kind);
        single.set_node_id(id);
        raft_change.mut_changes().push(single);
    }
    raft_change.context = change.encode_to_vec().into();
    raw_conf_entry(index, &raft_change)
}

fn raw_conf_entry(index: u64, raft_change: &ConfChangeV2) -> Entry {
    let mut entry = Entry::default();
    entry.set_entry_type(EntryType::EntryConfChangeV2);
    (entry.index, entry.term) = (index, TERM);
    entry.data = raft_change.write_to_bytes().unwrap().into();
    entry
}

fn conf_state(voters: &[u64], learners: &[u64], outgoing: &[u64]) -> ConfState {
    let mut conf = ConfState::from((voters.to_vec(), learners.to_vec()));
    conf.set_voters_outgoing(outgoing.to_vec());
    conf
}

fn change() -> MembershipChange {
    MembershipChange {
        proposer: 1,
        boot: 1,
        seq: 1,
        ..MembershipChange::default()
    }
}

impl Node {
    /// Runs a change as raft would; `after` is the configuration it comes to.
    fn change(&mut self, change: &MembershipChange, after: ConfState) -> Result<Success, Refusal> {
        let entry = conf_entry(self.next_index(), change, ConfChangeTransition::Auto);
        let conf = match self.state.begin_conf(&entry).unwrap() {
            ConfDecision::Apply(_) => after,
            ConfDecision::Refuse => self.state.applied().conf_state,
        };
        self.state.finish_conf(&entry, conf).unwrap().unwrap().1.result
    }

    fn member_ids(&self) -> Vec<u64> {
        self.reader().members().iter().map(|member| member.id).collect()
    }
}

fn code_of(result: &Result<Success, Refusal>) -> Option<ConflictCode> {
    match result {
        Err(Refusal::Conflict { code, .. }) => Some(*code),
        _ => None,
    }
}

#[test]
fn a_member_joins_as_a_learner_is_promoted_and_removed_and_its_id_never_comes_back() {
    let mut node = Node::new();
    let add = MembershipChange {
        add: vec![member(4)],
        ..change()
    };
    assert_eq!(node.change(&add, conf_state(&[1, 2, 3], &[4], &[])), Ok(Success::Done));
    assert_eq!(code_of(&node.change(&add, ConfState::default())), Some(ConflictCode::MemberExists));
    let promote = MembershipChange {
        promote: vec![4],
        ..change()
    };
    assert_eq!(node.change(&promote, conf_state(&[1, 2, 3, 4], &[], &[])), Ok(Success::Done));
    assert_eq!(
        code_of(&node.change(&promote, ConfState::default())),
        Some(ConflictCode::NotALearner)
    );
    let remove = MembershipChange {
        remove: vec![4],
        ..change()
    };
    assert_eq!(node.change(&remove, conf_state(&[1, 2, 3], &[], &[])), Ok(Success::Done));
    assert_eq!(node.member_ids(), [1, 2, 3]);
    node.state = State::open(node.store.clone()).unwrap();
    assert!(node.reader().is_removed(4));
    assert_eq!(code_of(&node.change(&add, ConfState::default())), Some(ConflictCode::MemberIdUsed));
    assert_eq!(node.reader().applied().conf_state.voters, [1, 2, 3]);
}

#[test]
fn one_that_leaves_by_joint_consensus_stays_known_until_the_joint_configuration_is_left() {
    let mut node = Node::new();
    node.change(
        &MembershipChange {
            add: vec![member(4)],
            replaces: 2,
            ..change()
        },
        conf_state(&[1, 2, 3], &[4], &[]),
    )
    .unwrap();
    assert_eq!(node.reader().members().last().unwrap().replaces, 2);
    let swap = MembershipChange {
        promote: vec![4],
        remove: vec![2],
        ..change()
    };
    node.change(&swap, conf_state(&[1, 3, 4], &[], &[1, 2, 3])).unwrap();
    assert_eq!((node.member_ids(), node.reader().is_removed(2)), (vec![1, 2, 3, 4], false));
    let meanwhile = MembershipChange {
        add: vec![member(5)],
        ..change()
    };
    assert_eq!(
        code_of(&node.change(&meanwhile, ConfState::default())),
        Some(ConflictCode::ChangeInProgress)
    );
    let leave = raw_conf_entry(node.next_index(), &ConfChangeV2::default());
    assert!(matches!(node.state.begin_conf(&leave).unwrap(), ConfDecision::Apply(_)));
    assert_eq!(node.state.finish_conf(&leave, conf_state(&[1, 3, 4], &[], &[])).unwrap(), None);
    assert_eq!((node.member_ids(), node.reader().is_removed(2)), (vec![1, 3, 4], true));
    assert_eq!(node.reader().members().last().unwrap().replaces, 0);
}

#[test]
fn changes_that_cannot_be_are_refused_and_leave_everything_as_it_was() {
    let mut node = Node::of(std::sync::Arc::new(metcd::store::MemoryStore::new()), &[1]);
    let before = node.records();
    let last = MembershipChange {
        remove: vec![1],
        ..change()
    };
    assert_eq!(code_of(&node.change(&last, ConfState::default())), Some(ConflictCode::UnsafeChange));
    let same_address = MembershipChange {
        add: vec![MemberRecord { id: 9, ..member(1) }],
        ..change()
    };
    assert_eq!(
        code_of(&node.change(&same_address, ConfState::default())),
        Some(ConflictCode::MemberExists)
    );
    let nobody = MembershipChange {
        promote: vec![8],
        ..change()
    };
    assert_eq!(node.change(&nobody, ConfState::default()), Err(Refusal::MemberNotFound { id: 8 }));
    let leave = raw_conf_entry(node.next_index(), &ConfChangeV2::default());
    assert_eq!(node.state.begin_conf(&leave).unwrap(), ConfDecision::Refuse);
    let differs = |after: &metcd::state::Record| after.table != metcd::store::Table::Meta && !before.contains(after);
    assert_eq!(node.records().iter().filter(|record| differs(record)).count(), 0);
    assert_eq!(node.reader().applied().conf_state.voters, [1]);
}

#[test]
fn a_raft_change_that_says_something_else_than_its_membership_change_is_refused() {
    let mut node = Node::new();
    let honest = conf_entry(
        2,
        &MembershipChange {
            add: vec![member(4)],
            ..change()
        },
        ConfChangeTransition::Auto,
    );
    let mut forged = ConfChangeV2::parse_from_bytes(&honest.data).unwrap();
    forged.mut_changes()[0].set_change_type(ConfChangeType::AddNode);
    assert_eq!(node.state.begin_conf(&raw_conf_entry(2, &forged)).unwrap(), ConfDecision::Refuse);
    forged.context = Bytes::new();
    assert_eq!(node.state.begin_conf(&raw_conf_entry(2, &forged)).unwrap(), ConfDecision::Refuse);
    assert!(matches!(node.state.begin_conf(&honest).unwrap(), ConfDecision::Apply(_)));
}

#[test]
fn a_removed_members_late_proposals_are_void() {
    let mut node = Node::new();
    node.apply(&payload(3, 1, 1, vec![command(1, Body::Put(put(b"a", b"1")))]));
    node.change(
        &MembershipChange {
            remove: vec![3],
            ..change()
        },
        conf_state(&[1, 2], &[], &[]),
    )
    .unwrap();
    assert_eq!(node.apply(&payload(3, 1, 1, vec![command(1, Body::Put(put(b"a", b"again")))])), []);
    assert_eq!(node.value(b"a").as_deref(), Some(&b"1"[..]));
}

#[test]
fn a_member_is_bound_to_its_first_data_directory() {
    let mut node = Node::new();
    let bind = |incarnation| {
        Body::MemberUpdate(MemberUpdate {
            id: 2,
            incarnation: Some(incarnation),
            ..MemberUpdate::default()
        })
    };
    assert_eq!(node.run(bind(5)).result, Ok(Success::Done));
    assert_eq!(node.run(bind(5)).result, Ok(Success::Done));
    assert_eq!(code_of(&node.run(bind(6)).result), Some(ConflictCode::MemberIdUsed));
    let unknown = Body::MemberUpdate(MemberUpdate {
        id: 9,
        ..MemberUpdate::default()
    });
    assert_eq!(refusal(&node.run(unknown)), Some(&Refusal::MemberNotFound { id: 9 }));
}

#[test]
fn the_clusters_feature_level_is_the_lowest_of_all_members_and_never_falls() {
    let mut node = Node::new();
    let level = |id, level| {
        Body::MemberUpdate(MemberUpdate {
            id,
            feature_level: Some(level),
            ..MemberUpdate::default()
        })
    };
    node.run(level(1, 3));
    node.run(level(2, 2));
    assert_eq!(node.reader().feature_level(), 1);
    node.run(level(3, 4));
    assert_eq!(node.reader().feature_level(), 2);
    node.run(level(3, 1));
    assert_eq!(node.reader().feature_level(), 2);
}
