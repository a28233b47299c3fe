//! Figures of one storage engine: operations per second, memory and disk, with the record shapes of the state machine.
//!
//! `cargo bench --features rocksdb --bench store -- memory|sled|rocksdb [user keys, default 100000] [seconds to settle, default 0]`
//! Each engine deserves a process of its own: memory once taken is seldom given back.

#![allow(clippy::print_stdout, reason = "figures are printed")]
#![allow(clippy::disallowed_methods, reason = "the engine is left alone for a while")]

use std::{
    ops::{Bound, ControlFlow},
    time::{Duration, Instant},
};

use metcd::config::StoreBackend;
use metcd::store::{KvStore, Order, Table, WriteBatch, open};

/// User keys per batch; each is one `Index` and one `Revision` record.
const KEYS_PER_BATCH: u64 = 64;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let backend = match arguments.first().map(String::as_str) {
        Some("sled") => StoreBackend::Sled,
        Some("rocksdb") => StoreBackend::RocksDb,
        _ => StoreBackend::Memory,
    };
    let number = |i: usize, default: u64| arguments.get(i).map_or(default, |text: &String| text.parse().expect("a number"));
    let (keys, settle) = (
        number(1, 100_000_u64).next_multiple_of(KEYS_PER_BATCH),
        Duration::from_secs(number(2, 0)),
    );
    let dir = tempfile::tempdir().expect("a temporary directory");
    let store = open(backend, dir.path()).expect("the store opens");
    let store = &*store;

    report(store, "load", keys, || load(store, keys));
    report(store, "sync", 1, || store.sync().expect("sync"));
    report(store, "get", 200_000, || get_at_random(store, 200_000, keys));
    report(store, "scan index", keys, || scan(store, Table::Index));
    report(store, "scan revisions", keys, || scan(store, Table::Revision));
    report(store, "overwrite and compact", keys, || overwrite(store, keys));
    report(store, "sync", 1, || store.sync().expect("sync"));
    report(store, "settle", 1, || std::thread::sleep(settle));
}

fn report(store: &dyn KvStore, what: &str, operations: u64, run: impl FnOnce()) {
    let start = Instant::now();
    run();
    let seconds = start.elapsed().as_secs_f64();
    let rate = operations as f64 / seconds;
    println!(
        "{:8} {what:22} {rate:>12.0}/s {seconds:>8.2} s   RSS {:>5} MB   bytes {:>5} MB",
        store.backend(),
        resident_mb(),
        store.bytes() / 1_000_000
    );
}

fn load(store: &dyn KvStore, keys: u64) {
    for first in (0..keys).step_by(KEYS_PER_BATCH as usize) {
        let mut batch = WriteBatch::default();
        (first..first + KEYS_PER_BATCH).for_each(|i| put(&mut batch, i, i));
        store.write(batch).expect("write");
    }
}

/// Rewrites every key once, in random order, and removes the old version as the compaction of history does.
fn overwrite(store: &dyn KvStore, keys: u64) {
    for first in (0..keys).step_by(KEYS_PER_BATCH as usize) {
        let mut batch = WriteBatch::default();
        for i in first..first + KEYS_PER_BATCH {
            let key = i * 7919 % keys;
            put(&mut batch, key, keys + i);
            batch.delete(Table::Index, index_key(key, key));
            batch.delete(Table::Revision, revision_key(key));
        }
        store.write(batch).expect("write");
    }
}

fn get_at_random(store: &dyn KvStore, reads: u64, keys: u64) {
    for i in 0..reads {
        let found = store.get(Table::Revision, &revision_key(mix(i) % keys)).expect("get");
        assert!(found.is_some());
    }
}

fn scan(store: &dyn KvStore, table: Table) {
    let mut bytes = 0;
    let visit = &mut |key: &[u8], value: &[u8]| {
        bytes += key.len() + value.len();
        ControlFlow::Continue(())
    };
    store
        .scan(table, (Bound::Unbounded, Bound::Unbounded), Order::Asc, visit)
        .expect("scan");
    std::hint::black_box(bytes);
}

fn put(batch: &mut WriteBatch, key: u64, revision: u64) {
    let mut value: Vec<u8> = (0..32).flat_map(|i| mix(revision * 32 + i).to_le_bytes()).collect();
    value.extend_from_slice(format!("{:016x}", mix(key)).as_bytes());
    value.extend_from_slice(&[0; 28]);
    batch.put(Table::Index, index_key(key, revision), [1; 24]);
    batch.put(Table::Revision, revision_key(revision), value);
}

fn index_key(key: u64, revision: u64) -> Vec<u8> {
    let mut bytes = format!("{:016x}", mix(key)).into_bytes();
    bytes.extend_from_slice(&[0, 0]);
    bytes.extend_from_slice(&revision.to_be_bytes());
    bytes
}

fn revision_key(revision: u64) -> Vec<u8> {
    [&revision.to_be_bytes()[..], &[0; 4]].concat()
}

/// splitmix64: distinct, and nothing a compressor finds.
fn mix(n: u64) -> u64 {
    let mut z = n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn resident_mb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line
        .and_then(|line| line.split_whitespace().next())
        .and_then(|kib| kib.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024 / 1_000_000
}
