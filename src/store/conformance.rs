//! One suite for every engine. A new engine adds one line to `engines!`.

use std::{
    collections::BTreeMap,
    ops::Bound,
    ops::ControlFlow,
    path::Path,
    sync::Arc,
    sync::atomic::{AtomicBool, Ordering},
};

use proptest::{prelude::*, test_runner::TestRunner};

use super::{KvStore, MAX_KEY_BYTES, Op, Order, StoreError, TABLES, Table, WriteBatch};
use crate::config::StoreBackend;

type Records = Vec<(Vec<u8>, Vec<u8>)>;
type Model = BTreeMap<(Table, Vec<u8>), Vec<u8>>;

fn open(backend: StoreBackend, dir: &Path) -> Arc<dyn KvStore> {
    super::open(backend, dir).unwrap()
}

fn get(store: &dyn KvStore, table: Table, key: &[u8]) -> Option<Vec<u8>> {
    store.get(table, key).unwrap().map(|value| value.to_vec())
}

fn put(store: &dyn KvStore, table: Table, key: &[u8], value: &[u8]) {
    let mut batch = WriteBatch::default();
    batch.put(table, key, value);
    store.write(batch).unwrap();
}

fn scan(store: &dyn KvStore, table: Table, range: (Bound<&[u8]>, Bound<&[u8]>), order: Order) -> Records {
    let mut found = Vec::new();
    let visit = &mut |key: &[u8], value: &[u8]| {
        found.push((key.to_vec(), value.to_vec()));
        ControlFlow::Continue(())
    };
    store.scan(table, range, order, visit).unwrap();
    found
}

fn scan_all(store: &dyn KvStore, table: Table) -> Records {
    scan(store, table, (Bound::Unbounded, Bound::Unbounded), Order::Asc)
}

/// A value whose every byte depends on its seed, and that does not compress.
fn value_of(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 56) as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

fn in_bounds(key: &[u8], (low, high): (Bound<&[u8]>, Bound<&[u8]>)) -> bool {
    let above = match low {
        Bound::Included(bound) => key >= bound,
        Bound::Excluded(bound) => key > bound,
        Bound::Unbounded => true,
    };
    let below = match high {
        Bound::Included(bound) => key <= bound,
        Bound::Excluded(bound) => key < bound,
        Bound::Unbounded => true,
    };
    above && below
}

fn model_scan(model: &Model, table: Table, range: (Bound<&[u8]>, Bound<&[u8]>), order: Order) -> Records {
    let in_range = model.iter().filter(|((t, key), _)| *t == table && in_bounds(key, range));
    let mut records: Records = in_range.map(|((_, key), value)| (key.clone(), value.clone())).collect();
    if order == Order::Desc {
        records.reverse();
    }
    records
}

fn apply_to_model(model: &mut Model, batch: &WriteBatch) {
    for op in &batch.ops {
        match op {
            Op::Put { table, key, value } => model.insert((*table, key.clone()), value.to_vec()),
            Op::Delete { table, key } => model.remove(&(*table, key.clone())),
        };
    }
}

fn what_is_put_is_read_and_what_is_deleted_is_gone(backend: StoreBackend) {
    let dir = tempfile::tempdir().unwrap();
    let store = open(backend, dir.path());
    assert_eq!(get(&*store, Table::Meta, b"a"), None);
    put(&*store, Table::Meta, b"a", b"1");
    put(&*store, Table::Meta, b"a", b"2");
    assert_eq!(get(&*store, Table::Meta, b"a").as_deref(), Some(&b"2"[..]));
    let mut batch = WriteBatch::default();
    batch.delete(Table::Meta, *b"a");
    batch.delete(Table::Meta, *b"never there");
    store.write(batch).unwrap();
    assert_eq!(get(&*store, Table::Meta, b"a"), None);
}

fn scans_keep_to_their_bounds_in_both_orders(backend: StoreBackend) {
    let dir = tempfile::tempdir().unwrap();
    let store = open(backend, dir.path());
    let keys: [&[u8]; 9] = [b"", b"\0", b"\0\0", b"a", b"a\0", b"a\0\0\x01", b"b", b"b\xff", b"\xff\xff"];
    let mut model = Model::new();
    let mut batch = WriteBatch::default();
    for (i, key) in keys.iter().enumerate() {
        for table in [Table::Meta, Table::Index, Table::Member] {
            batch.put(table, *key, vec![i as u8, table as u8]);
        }
    }
    apply_to_model(&mut model, &batch);
    store.write(batch).unwrap();
    let bounds = || {
        keys.iter()
            .flat_map(|key| [Bound::Included(*key), Bound::Excluded(*key)])
            .chain([Bound::Unbounded])
    };
    for range in bounds().flat_map(|low| bounds().map(move |high| (low, high))) {
        for order in [Order::Asc, Order::Desc] {
            let expected = model_scan(&model, Table::Index, range, order);
            assert_eq!(scan(&*store, Table::Index, range, order), expected, "{range:?} {order:?}");
        }
    }
}

fn a_scan_stops_where_the_visitor_breaks(backend: StoreBackend) {
    let dir = tempfile::tempdir().unwrap();
    let store = open(backend, dir.path());
    let mut batch = WriteBatch::default();
    for i in 0..2000_u32 {
        batch.put(Table::Index, i.to_be_bytes(), *b"x");
    }
    store.write(batch).unwrap();
    for (order, last) in [(Order::Asc, 699), (Order::Desc, 1300_u32)] {
        let mut seen = Vec::new();
        let visit = &mut |key: &[u8], _: &[u8]| {
            seen.push(key.to_vec());
            if seen.len() == 700 {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        };
        store
            .scan(Table::Index, (Bound::Unbounded, Bound::Unbounded), order, visit)
            .unwrap();
        assert_eq!((seen.len(), seen.last().unwrap().as_slice()), (700, &last.to_be_bytes()[..]));
    }
}

fn the_last_operation_of_a_batch_on_a_key_wins(backend: StoreBackend) {
    let dir = tempfile::tempdir().unwrap();
    let store = open(backend, dir.path());
    let mut batch = WriteBatch::default();
    batch.put(Table::Index, *b"put last", value_of(1, 20_000));
    batch.delete(Table::Index, *b"put last");
    batch.put(Table::Index, *b"put last", *b"short");
    batch.put(Table::Index, *b"deleted last", value_of(2, 20_000));
    batch.delete(Table::Index, *b"deleted last");
    store.write(batch).unwrap();
    assert_eq!(scan_all(&*store, Table::Index), [(b"put last".to_vec(), b"short".to_vec())]);
}

fn values_and_keys_of_every_size_come_back(backend: StoreBackend) {
    let dir = tempfile::tempdir().unwrap();
    let store = open(backend, dir.path());
    let mut model = Model::new();
    for (i, len) in [0, 1, 1023, 1024, 1025, 4079, 4080, 4081, 4095, 4096, 4097, 65_536, 1 << 20]
        .into_iter()
        .enumerate()
    {
        for key_len in [1, 100, 4108, MAX_KEY_BYTES] {
            let mut batch = WriteBatch::default();
            let mut key = vec![b'k'; key_len - 1];
            key.push(i as u8);
            batch.put(Table::Revision, key, value_of(i as u64, len));
            apply_to_model(&mut model, &batch);
            store.write(batch).unwrap();
        }
    }
    for ((table, key), value) in &model {
        assert!(
            get(&*store, *table, key).as_ref() == Some(value),
            "key of {} bytes, value of {}",
            key.len(),
            value.len()
        );
    }
    let expected = model_scan(&model, Table::Revision, (Bound::Unbounded, Bound::Unbounded), Order::Desc);
    assert!(scan(&*store, Table::Revision, (Bound::Unbounded, Bound::Unbounded), Order::Desc) == expected);
    // Long values replaced by short ones and short by long leave nothing behind.
    let (last, first) = (model.len() - 1, 0);
    for (i, ((table, key), value)) in model.iter_mut().enumerate() {
        *value = value_of(9, if i == first { 300_000 } else { last - i });
        put(&*store, *table, key, value);
    }
    let expected = model_scan(&model, Table::Revision, (Bound::Unbounded, Bound::Unbounded), Order::Asc);
    assert!(scan_all(&*store, Table::Revision) == expected);
}

fn a_key_over_the_limit_is_refused_and_nothing_of_its_batch_written(backend: StoreBackend) {
    let dir = tempfile::tempdir().unwrap();
    let store = open(backend, dir.path());
    let mut batch = WriteBatch::default();
    batch.put(Table::Meta, *b"a", *b"1");
    batch.put(Table::Meta, vec![0; MAX_KEY_BYTES + 1], *b"1");
    assert!(matches!(store.write(batch), Err(StoreError::Engine(_))));
    assert_eq!(get(&*store, Table::Meta, b"a"), None);
}

fn tables_are_apart_and_clear_empties_them_all(backend: StoreBackend) {
    let dir = tempfile::tempdir().unwrap();
    let store = open(backend, dir.path());
    let mut batch = WriteBatch::default();
    for table in TABLES {
        batch.put(table, *b"key", [table as u8]);
        batch.put(table, [0xff; 40], value_of(table as u64, 10_000));
    }
    store.write(batch).unwrap();
    for table in TABLES {
        assert_eq!(get(&*store, table, b"key"), Some(vec![table as u8]));
        assert_eq!(scan_all(&*store, table).len(), 2);
    }
    store.sync().unwrap();
    store.clear().unwrap();
    assert!(TABLES.iter().all(|table| scan_all(&*store, *table).is_empty()));
    put(&*store, Table::Lease, b"after", b"1");
    store.close().unwrap();
    drop(store);
    let reopened = open(backend, dir.path());
    let expected = usize::from(reopened.keeps_records());
    assert_eq!(
        TABLES.iter().map(|table| scan_all(&*reopened, *table).len()).sum::<usize>(),
        expected
    );
}

fn reopened_is_what_was_closed(backend: StoreBackend) {
    let dir = tempfile::tempdir().unwrap();
    let mut model = Model::new();
    for round in 0..3_u64 {
        let store = open(backend, dir.path());
        if !store.keeps_records() {
            return;
        }
        for i in 0..200 {
            let mut batch = WriteBatch::default();
            batch.put(Table::Revision, (round * 1000 + i).to_be_bytes(), value_of(i, (i * i / 4) as usize));
            batch.put(Table::Meta, *b"applied", i.to_be_bytes());
            batch.delete(Table::Revision, (round * 500 + i).to_be_bytes());
            apply_to_model(&mut model, &batch);
            store.write(batch).unwrap();
        }
        store.close().unwrap();
        drop(store);
        let store = open(backend, dir.path());
        for table in [Table::Meta, Table::Revision] {
            let expected = model_scan(&model, table, (Bound::Unbounded, Bound::Unbounded), Order::Asc);
            assert!(scan_all(&*store, table) == expected, "round {round}, {table:?}");
        }
        assert!(store.bytes() > 0);
        store.close().unwrap();
    }
}

/// All of it, or nothing at all if the engine promises no more.
fn what_is_synced_is_there_without_a_close_if_the_engine_says_so(backend: StoreBackend) {
    let dir = tempfile::tempdir().unwrap();
    let store = open(backend, dir.path());
    (0..100_u64).for_each(|i| put(&*store, Table::Index, &i.to_be_bytes(), &value_of(i, 300)));
    store.sync().unwrap();
    let expected = if store.survives_crashes() { 100 } else { 0 };
    drop(store);
    assert_eq!(scan_all(&*open(backend, dir.path()), Table::Index).len(), expected);
}

fn a_reader_beside_a_writer_sees_only_whole_values(backend: StoreBackend) {
    let dir = tempfile::tempdir().unwrap();
    let store = open(backend, dir.path());
    let done = AtomicBool::new(false);
    let keys = 40_u64;
    let write_all = |round: u64| {
        for key in 0..keys {
            let len = ((round * 7 + key) % 5 * 3000) as usize;
            put(&*store, Table::Index, &key.to_be_bytes(), &vec![round as u8; len + 1]);
        }
    };
    write_all(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            (1..100).for_each(write_all);
            done.store(true, Ordering::Release);
        });
        let is_whole = |value: &[u8]| value.iter().all(|byte| *byte == value[0]) && value.len() % 3000 == 1;
        let mut least = vec![0; keys as usize];
        while !done.load(Ordering::Acquire) {
            for key in 0..keys {
                let value = get(&*store, Table::Index, &key.to_be_bytes()).unwrap();
                assert!(is_whole(&value) && value[0] >= least[key as usize]);
                least[key as usize] = value[0];
            }
            let all = scan_all(&*store, Table::Index);
            assert!(all.len() == keys as usize && all.iter().all(|(_, value)| is_whole(value)));
        }
    });
}

fn a_scan_beside_inserts_and_deletes_keeps_order_and_what_stays(backend: StoreBackend) {
    let dir = tempfile::tempdir().unwrap();
    let store = open(backend, dir.path());
    let stays = |i: u32| i.is_multiple_of(10);
    let mut batch = WriteBatch::default();
    (0..5000_u32)
        .filter(|i| stays(*i))
        .for_each(|i| batch.put(Table::Index, i.to_be_bytes(), vec![1; 100]));
    store.write(batch).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..6 {
                for from in (0..5000_u32).step_by(50) {
                    let mut batch = WriteBatch::default();
                    for i in (from..from + 50).filter(|i| !stays(*i)) {
                        if round % 2 == 0 {
                            batch.put(Table::Index, i.to_be_bytes(), vec![2; 100])
                        } else {
                            batch.delete(Table::Index, i.to_be_bytes())
                        }
                    }
                    store.write(batch).unwrap();
                }
            }
            done.store(true, Ordering::Release);
        });
        while !done.load(Ordering::Acquire) {
            for order in [Order::Asc, Order::Desc] {
                let found = scan(&*store, Table::Index, (Bound::Unbounded, Bound::Unbounded), order);
                assert!(found.is_sorted_by(|a, b| if order == Order::Asc { a.0 < b.0 } else { a.0 > b.0 }));
                assert_eq!(found.iter().filter(|(_, value)| value[0] == 1).count(), 500);
            }
        }
    });
    assert_eq!(scan_all(&*store, Table::Index).len(), 500);
}

fn a_flipped_bit_is_an_error_and_never_other_data(backend: StoreBackend) {
    let dir = tempfile::tempdir().unwrap();
    let store = open(backend, dir.path());
    if !store.keeps_records() {
        return;
    }
    let records = 200_u64;
    let value = |i: u64| value_of(i, 500);
    for i in 0..records {
        put(&*store, Table::Revision, &i.to_be_bytes(), &value(i));
    }
    store.close().unwrap();
    drop(store);
    let needle = &value(100)[100..164];
    let (path, offset) = find_in_files(dir.path(), needle).expect("the value is in a file, uncompressed");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[offset] ^= 0x10;
    std::fs::write(&path, &bytes).unwrap();
    let Ok(store) = super::open(backend, dir.path()) else { return };
    if !store.survives_crashes() && scan_all(&*store, Table::Revision).is_empty() {
        // Noticed when it was opened, and discarded as a whole.
        return;
    }
    let mut errors = 0;
    for i in 0..records {
        match store.get(Table::Revision, &i.to_be_bytes()) {
            Ok(Some(found)) => assert_eq!(*found, *value(i), "record {i} is not what was written"),
            Ok(None) => panic!("record {i} is silently gone"),
            Err(_) => errors += 1,
        }
    }
    assert!(errors > 0, "the damage was not noticed");
}

/// Where `needle` begins, in the last file that holds it.
fn find_in_files(dir: &Path, needle: &[u8]) -> Option<(std::path::PathBuf, usize)> {
    let mut entries: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    entries.into_iter().rev().find_map(|path| {
        if path.is_dir() {
            return find_in_files(&path, needle);
        }
        let bytes = std::fs::read(&path).unwrap();
        let offset = bytes.windows(needle.len()).rposition(|window| window == needle)?;
        Some((path, offset))
    })
}

/// What the random test does to engine and model.
#[derive(Debug, Clone)]
enum Action {
    Write(Vec<(Table, u16, Option<usize>)>),
    Scan(Table, Bound<u16>, Bound<u16>, Order),
    Sync,
    Reopen,
    Clear,
}

fn any_action() -> impl Strategy<Value = Action> {
    let table = || prop::sample::select(vec![Table::Index, Table::Revision, Table::Session]);
    let value_len = prop_oneof![8 => 0..400_usize, 1 => 900..1200_usize, 1 => 4000..13_000_usize];
    let ops = prop::collection::vec((table(), 0..600_u16, prop::option::weighted(0.6, value_len)), 1..120);
    let bound = || {
        prop_oneof![
            Just(Bound::Unbounded),
            (0..600_u16).prop_map(Bound::Included),
            (0..600_u16).prop_map(Bound::Excluded)
        ]
    };
    let order = prop::sample::select(vec![Order::Asc, Order::Desc]);
    prop_oneof![
        12 => ops.prop_map(Action::Write),
        8 => (table(), bound(), bound(), order).prop_map(|(table, low, high, order)| Action::Scan(table, low, high, order)),
        1 => Just(Action::Sync),
        1 => Just(Action::Reopen),
        1 => Just(Action::Clear),
    ]
}

/// Keys of different lengths, some of them prefixes of others.
fn key_of(n: u16) -> Vec<u8> {
    let mut key = vec![b'/'; usize::from(n % 7) * 5];
    key.extend_from_slice(&(n / 7).to_be_bytes());
    key
}

fn key_bound(bound: &Bound<Vec<u8>>) -> Bound<&[u8]> {
    bound.as_ref().map(Vec::as_slice)
}

fn run_against_model(backend: StoreBackend, actions: Vec<Action>) {
    let dir = tempfile::tempdir().unwrap();
    let mut store = open(backend, dir.path());
    let mut model = Model::new();
    for (step, action) in actions.into_iter().enumerate() {
        match action {
            Action::Write(ops) => {
                let mut batch = WriteBatch::default();
                for (i, (table, key, len)) in ops.into_iter().enumerate() {
                    match len {
                        Some(len) => batch.put(table, key_of(key), value_of((step * 1000 + i) as u64, len)),
                        None => batch.delete(table, key_of(key)),
                    }
                }
                apply_to_model(&mut model, &batch);
                store.write(batch).unwrap();
            }
            Action::Scan(table, low, high, order) => {
                let (low, high) = (low.map(key_of), high.map(key_of));
                let range = (key_bound(&low), key_bound(&high));
                assert!(
                    scan(&*store, table, range, order) == model_scan(&model, table, range, order),
                    "step {step}: {range:?} {order:?}"
                );
            }
            Action::Sync => store.sync().unwrap(),
            Action::Reopen if store.keeps_records() => {
                store.close().unwrap();
                drop(store);
                store = open(backend, dir.path());
            }
            Action::Reopen => {}
            Action::Clear => {
                store.clear().unwrap();
                model.clear();
            }
        }
    }
    for table in TABLES {
        let expected = model_scan(&model, table, (Bound::Unbounded, Bound::Unbounded), Order::Asc);
        assert!(scan_all(&*store, table) == expected, "{table:?} at the end");
        for (key, value) in expected {
            assert!(get(&*store, table, &key) == Some(value));
        }
    }
}

/// The engines that are not ours run where they can be ended.
fn bounded(backend: StoreBackend, test: &str, body: impl FnOnce()) {
    match backend {
        StoreBackend::Memory => body(),
        StoreBackend::Sled | StoreBackend::RocksDb => crate::test_child::run(test.trim_start_matches("metcd::"), body),
    }
}

macro_rules! engines {
    ($($(#[$feature:meta])? $engine:ident: $backend:expr, $cases:expr;)*) => {$(
        $(#[$feature])?
        mod $engine {
            use super::*;

            engines!(@tests $backend;
                what_is_put_is_read_and_what_is_deleted_is_gone,
                scans_keep_to_their_bounds_in_both_orders,
                a_scan_stops_where_the_visitor_breaks,
                the_last_operation_of_a_batch_on_a_key_wins,
                values_and_keys_of_every_size_come_back,
                a_key_over_the_limit_is_refused_and_nothing_of_its_batch_written,
                tables_are_apart_and_clear_empties_them_all,
                reopened_is_what_was_closed,
                what_is_synced_is_there_without_a_close_if_the_engine_says_so,
                a_reader_beside_a_writer_sees_only_whole_values,
                a_scan_beside_inserts_and_deletes_keeps_order_and_what_stays,
                a_flipped_bit_is_an_error_and_never_other_data,
            );

            #[test]
            fn random_operations_agree_with_a_model() {
                bounded($backend, concat!(module_path!(), "::random_operations_agree_with_a_model"), || {
                    let config = ProptestConfig { cases: $cases, failure_persistence: None, ..ProptestConfig::default() };
                    let actions = prop::collection::vec(any_action(), 1..60);
                    let run = TestRunner::new(config).run(&actions, |actions| {
                        run_against_model($backend, actions);
                        Ok(())
                    });
                    run.unwrap_or_else(|error| panic!("{error}"));
                });
            }
        }
    )*};
    (@tests $backend:expr; $($name:ident,)*) => {$(
        #[test]
        fn $name() {
            bounded($backend, concat!(module_path!(), "::", stringify!($name)), || super::$name($backend));
        }
    )*};
}

engines! {
    memory: StoreBackend::Memory, 200;
    sled: StoreBackend::Sled, 12;
    #[cfg(feature = "rocksdb")]
    rocksdb: StoreBackend::RocksDb, 12;
}
