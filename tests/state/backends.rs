//! The three engines under one random log: whatever can be observed of the state is equal on all of them, and as in the model.
//!
//! The engines on disk are closed and opened again on the way, and one engine's snapshot replaces another's content.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use metcd::config::StoreBackend;
use metcd::snapshot::{install, write_file};
use metcd::state::command::{Body, HashReport, Put, TxnOpBody};
use metcd::state::divergence::HASH_REPORT_INTERVAL;
use metcd::state::reader::LeaseInfo;
use metcd::state::watch::{Change, Watcher};
use metcd::state::{Record, State};
use metcd::store::{KvStore, open};
use proptest::prelude::*;
use raft::eraftpb::Entry;
use tempfile::TempDir;

use crate::model::Model;
use crate::property::{Step, check_outcome, check_reads, check_the_rest, check_watches_from_history, log_of, steps};
use crate::support::{CLUSTER, TERM, drain, everything, member, records_of};

#[cfg(feature = "rocksdb")]
const BACKENDS: [StoreBackend; 3] = [StoreBackend::Memory, StoreBackend::Sled, StoreBackend::RocksDb];
#[cfg(not(feature = "rocksdb"))]
const BACKENDS: [StoreBackend; 2] = [StoreBackend::Memory, StoreBackend::Sled];

/// The log begins here, so that the report of the rolling hash falls due within it.
const FIRST_INDEX: u64 = HASH_REPORT_INTERVAL - 2;

/// A member's state on one engine.
struct Engine {
    backend: StoreBackend,
    directory: TempDir,
    store: Arc<dyn KvStore>,
    state: State,
    live: Watcher,
}

/// What an engine can be asked besides what the model knows.
#[derive(Debug, PartialEq)]
struct Observed {
    applied: metcd::state::Applied,
    revision: u64,
    compacted_revision: u64,
    /// `/v1/hash` at every revision that can be read.
    hashes: Vec<(u64, u128)>,
    leases: Vec<(LeaseInfo, Vec<Bytes>)>,
    logical_bytes: u64,
    idempotency: (Option<u64>, usize),
    revision_before: Vec<Option<u64>>,
    cluster_time_ms: u64,
    /// All that a snapshot holds: sessions, members and idempotency records too.
    snapshot: Vec<Record>,
}

impl Engine {
    fn new(backend: StoreBackend) -> Engine {
        let directory = tempfile::tempdir().unwrap();
        let store = open(backend, directory.path()).unwrap();
        let mut state = State::open(store.clone()).unwrap();
        state.bootstrap(CLUSTER, &[member(1), member(2), member(3)]).unwrap();
        let empty: Vec<Entry> = (2..FIRST_INDEX).map(empty_entry).collect();
        state.apply(&empty).unwrap();
        Engine {
            live: state.reader().watch(everything(true), 1).unwrap(),
            backend,
            directory,
            store,
            state,
        }
    }

    /// As after a stop and a start; the memory engine keeps its store.
    fn reopened(self) -> Engine {
        let Engine {
            backend,
            directory,
            mut store,
            state,
            live,
        } = self;
        drop((state, live));
        if store.keeps_records() {
            store.close().unwrap();
            drop(store);
            store = open(backend, directory.path()).unwrap();
        }
        let mut state = State::open(store.clone()).unwrap();
        // A report that was due before is due again, but not on an engine that was replaced since; it was compared when it was new.
        state.take_hash_report(1);
        let reader = state.reader();
        Engine {
            backend,
            directory,
            store,
            state,
            live: reader.watch(everything(true), reader.revision()).unwrap(),
        }
    }

    fn replace_by(&mut self, snapshot: &Path) {
        install(snapshot, &*self.store).unwrap();
        self.state.reload().unwrap();
    }

    fn observe(&self) -> Observed {
        let reader = self.state.reader();
        let (revision, compacted_revision) = (reader.revision(), reader.compacted_revision());
        let hash_at = |revision| reader.hash(Some(revision)).unwrap();
        let lease_with_keys = |lease: LeaseInfo| {
            let keys = reader.lease_keys(lease.id).unwrap();
            (lease, keys)
        };
        Observed {
            applied: reader.applied(),
            revision,
            compacted_revision,
            hashes: (compacted_revision..=revision).map(hash_at).collect(),
            leases: reader.leases().into_iter().map(lease_with_keys).collect(),
            logical_bytes: reader.logical_bytes(),
            idempotency: (reader.oldest_idempotency_stamp(), reader.idempotency_len()),
            revision_before: (0..3000).step_by(250).map(|stamp_ms| reader.revision_before(stamp_ms)).collect(),
            cluster_time_ms: reader.cluster_time_ms(),
            snapshot: records_of(&self.state),
        }
    }
}

fn empty_entry(index: u64) -> Entry {
    let mut entry = Entry::default();
    (entry.index, entry.term) = (index, TERM);
    entry
}

/// Some values become long enough for the engines to treat them in another way: cut in pieces, or kept apart.
fn with_long_values(mut steps: Vec<Step>) -> Vec<Step> {
    let lengthen = |put: &mut Put| {
        let times = match put.value.last() {
            Some(b'x') => 700,
            Some(0) => 3000,
            _ => 1,
        };
        put.value = put.value.repeat(times).into();
    };
    for (body, _) in steps.iter_mut().flat_map(|step| &mut step.commands) {
        match body {
            Body::Put(put) => lengthen(put),
            Body::Txn(txn) => {
                for op in txn.then.iter_mut().chain(&mut txn.or_else) {
                    if let Some(TxnOpBody::Put(put)) = &mut op.body {
                        lengthen(put);
                    }
                }
            }
            Body::Delete(_) | Body::DeleteRange(_) | Body::LeaseGrant(_) | Body::LeaseRevoke(_) | Body::LeaseExpire(_) => {}
            Body::Compact(_) | Body::Evict(_) | Body::MemberUpdate(_) | Body::HashReport(_) => {}
        }
    }
    steps
}

/// What each engine gives must be the same; that is returned.
fn same<T: PartialEq + std::fmt::Debug>(engines: &mut [Engine], mut ask: impl FnMut(&mut Engine) -> T) -> T {
    let mut answers = engines.iter_mut().map(|engine| (engine.backend, ask(engine)));
    let (first, expected) = answers.next().unwrap();
    for (backend, answer) in answers {
        assert_eq!(answer, expected, "{backend:?} (left) is not as {first:?} (right)");
    }
    expected
}

/// A snapshot of one engine's state replaces another's, which must not be seen from outside.
fn copy(engines: &mut [Engine], from: usize, to: usize) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    let (from, to) = (from % engines.len(), to % engines.len());
    write_file(engines[from].state.snapshot_view(), &path).unwrap();
    engines[to].replace_by(&path);
}

/// Cuts the log into the calls of `apply` that the steps ask for: the last step of each, with its entries.
fn calls<'a, T>(steps: &'a [Step], log: &'a [T]) -> Vec<(&'a Step, &'a [T])> {
    let mut calls = Vec::new();
    let mut begin = 0;
    for (n, step) in steps.iter().enumerate() {
        if step.ends_call || n + 1 == steps.len() {
            calls.push((step, &log[begin..=n]));
            begin = n + 1;
        }
    }
    calls
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_engine_gives_the_same_answers(
        steps in steps().prop_map(with_long_values),
        copy_before in 0usize..12, from in 0usize..3, to in 0usize..3,
    ) {
        let mut model = Model::new();
        let log = log_of(&steps, FIRST_INDEX, &mut model);
        let mut engines: Vec<Engine> = BACKENDS.into_iter().map(Engine::new).collect();
        for (n, (step, call)) in calls(&steps, &log).into_iter().enumerate() {
            if n == copy_before {
                copy(&mut engines, from, to);
                same(&mut engines, |engine| engine.observe());
            }
            let entries: Vec<Entry> = call.iter().map(|(entry, _)| entry.clone()).collect();
            let results = same(&mut engines, |engine| engine.state.apply(&entries).unwrap());
            let expected = call.iter().flat_map(|(_, outcomes)| outcomes);
            results.iter().zip(expected).for_each(|((_, found), expected)| check_outcome(found, expected));
            let _: Vec<Change> = same(&mut engines, |engine| drain(&mut engine.live));
            let report: Option<HashReport> = same(&mut engines, |engine| engine.state.take_hash_report(1));
            assert_eq!(report.is_some(), entries.iter().any(|entry| entry.index == HASH_REPORT_INTERVAL));
            for engine in &mut engines {
                engine.state.collect_garbage(step.garbage).unwrap();
            }
            if step.reopens {
                engines = engines.into_iter().map(Engine::reopened).collect();
                same(&mut engines, |engine| engine.observe());
                assert!(same(&mut engines, |engine| engine.state.apply(&entries).unwrap()).is_empty());
            }
        }
        same(&mut engines, |engine| engine.observe());
        for engine in &mut engines {
            while engine.state.collect_garbage(100).unwrap() {}
            let reader = engine.state.reader();
            check_reads(&reader, &model);
            check_watches_from_history(&reader, &model);
            check_the_rest(&reader, &model);
        }
        same(&mut engines, |engine| engine.observe());
    }
}
