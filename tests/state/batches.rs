//! One call, one write: whatever an entry changes is in the store together with the index that says so, or not at all (rule 6).

use std::ops::Bound;
use std::sync::Arc;

use metcd::state::command::{Body, LeaseGrant, MembershipChange};
use metcd::state::{ConfDecision, State};
use metcd::store::{KvStore, MemoryStore, Op, Order, TABLES, Table, WriteBatch};
use prost::Message as _;
use protobuf::Message as _;
use raft::eraftpb::{ConfChangeSingle, ConfChangeType, ConfChangeV2, ConfState, Entry, EntryType};

use crate::observed::ObservedStore;
use crate::support::{Node, TERM, command, delete, entry, idempotency, member, payload, put, records_of};

/// A copy of what is in a store now.
fn copy_of(store: &dyn KvStore) -> MemoryStore {
    let mut batch = WriteBatch::default();
    for table in TABLES {
        let mut visit = |key: &[u8], value: &[u8]| {
            batch.put(table, key, value);
            std::ops::ControlFlow::Continue(())
        };
        store
            .scan(table, (Bound::Unbounded, Bound::Unbounded), Order::Asc, &mut visit)
            .unwrap();
    }
    let copy = MemoryStore::new();
    copy.write(batch).unwrap();
    copy
}

/// Members 1 to 3, and the store below them.
fn counted() -> (Node, Arc<ObservedStore>) {
    let store = Arc::new(ObservedStore::default());
    (Node::of(store.clone(), &[1, 2, 3]), store)
}

/// Runs `step`, which is to make one write: these tables are in it, and with nothing but it the state is what it has become.
fn makes_one_write(node: &mut Node, store: &ObservedStore, tables: &[Table], step: impl FnOnce(&mut Node)) {
    let before = copy_of(store);
    store.batches.lock().clear();
    step(node);
    let mut batches = std::mem::take(&mut *store.batches.lock());
    assert_eq!(batches.len(), 1, "{batches:?}");
    let batch = batches.remove(0);
    for &table in tables {
        assert!(batch.ops.iter().any(|op| op.table() == table), "{table:?} is not in {batch:?}");
    }
    let sets_meta = batch.ops.iter().filter(|op| matches!(op, Op::Put { table: Table::Meta, .. }));
    assert!(sets_meta.count() > 0, "{batch:?}");
    before.write(batch).unwrap();
    let reopened = State::open(Arc::new(before)).unwrap();
    assert_eq!(reopened.applied(), node.state.applied());
    assert_eq!(records_of(&reopened), node.records());
}

#[test]
fn rule_6_a_run_of_entries_is_one_write_with_the_applied_index_in_it() {
    let (mut node, store) = counted();
    node.put(b"gone", b"v");
    let tables = [
        Table::Meta,
        Table::Index,
        Table::Revision,
        Table::Lease,
        Table::Session,
        Table::Idempotency,
    ];
    makes_one_write(&mut node, &store, &tables, |node| {
        let first = node.next_index();
        let grant = Body::LeaseGrant(LeaseGrant {
            ttl_ms: 1000,
            ..LeaseGrant::default()
        });
        let mut once = command(4, Body::Put(put(b"once", b"v")));
        once.idempotency = Some(idempotency("key", b"request", 10));
        let commands = [
            vec![command(2, Body::Put(put(b"a", b"v"))), command(3, delete(b"gone"))],
            vec![once, command(5, grant)],
            vec![],
        ];
        let mut entries: Vec<Entry> = (first..)
            .zip(commands)
            .map(|(index, commands)| entry(index, 2000, &payload(1, 1, 2, commands)))
            .collect();
        // As a new leader writes one.
        let mut empty = Entry::default();
        (empty.index, empty.term) = (first + 3, TERM);
        entries.push(empty);
        let results = node.state.apply(&entries).unwrap();
        assert_eq!(results.len(), 4);
        assert!(results.iter().all(|(_, outcome)| outcome.result.is_ok()), "{results:?}");
        assert_eq!(node.state.applied().index, first + 3);
    });
    makes_one_write(&mut node, &store, &[Table::Meta], |node| {
        let mut empty = Entry::default();
        (empty.index, empty.term) = (node.next_index(), TERM);
        node.state.apply(&[empty]).unwrap();
    });
}

#[test]
fn rule_6_a_configuration_change_is_one_write_with_the_members_in_it() {
    let (mut node, store) = counted();
    let add = |index: u64| {
        let change = MembershipChange {
            add: vec![member(4)],
            proposer: 1,
            boot: 1,
            seq: 1,
            ..MembershipChange::default()
        };
        let mut single = ConfChangeSingle::default();
        single.set_change_type(ConfChangeType::AddLearnerNode);
        single.set_node_id(4);
        let mut raft_change = ConfChangeV2::default();
        raft_change.mut_changes().push(single);
        raft_change.context = change.encode_to_vec().into();
        let mut entry = Entry::default();
        entry.set_entry_type(EntryType::EntryConfChangeV2);
        (entry.index, entry.term) = (index, TERM);
        entry.data = raft_change.write_to_bytes().unwrap().into();
        entry
    };
    let with_learner = ConfState::from((vec![1, 2, 3], vec![4]));
    makes_one_write(&mut node, &store, &[Table::Meta, Table::Member], |node| {
        let entry = add(node.next_index());
        assert!(matches!(node.state.begin_conf(&entry).unwrap(), ConfDecision::Apply(_)));
        let (_, outcome) = node.state.finish_conf(&entry, with_learner.clone()).unwrap().unwrap();
        assert!(outcome.result.is_ok(), "{outcome:?}");
        assert_eq!(node.state.applied().conf_state, with_learner);
    });
    // The same again is refused, which moves the index all the same.
    makes_one_write(&mut node, &store, &[Table::Meta], |node| {
        let entry = add(node.next_index());
        assert_eq!(node.state.begin_conf(&entry).unwrap(), ConfDecision::Refuse);
        let (_, outcome) = node.state.finish_conf(&entry, with_learner.clone()).unwrap().unwrap();
        assert!(outcome.result.is_err(), "{outcome:?}");
        assert_eq!(node.state.applied().index, entry.index);
    });
}
