//! Figures, not checks: `cargo test --test state bench -- --ignored --nocapture --test-threads=1` (with `CARGO_PROFILE_DEV_OPT_LEVEL=3`).

use std::ops::ControlFlow;
use std::sync::Arc;

use metcd::state::command::{Body, EntryPayload, KeySpan, LeaseExpire, Put};
use metcd::state::reader::RangeQuery;
use metcd::state::watch::WatchFilter;
use metcd::store::{KeyRange, KvStore, Order, StoreError, Table, WriteBatch};
use raft::eraftpb::Entry;

use crate::support::{Node, TERM, all_keys, command, drain, entry, everything, payload, put};

const PUTS_PER_ENTRY: u64 = 64;
const VALUE: [u8; 256] = [7; 256];

fn key(n: u64) -> Vec<u8> {
    format!("bench/key-{n:09}").into_bytes()
}

/// Entries of 64 puts; keys in an order that looks random.
fn entries(first_index: u64, count: u64, keys: u64) -> Vec<Entry> {
    let payload_of = |n: u64| -> EntryPayload {
        let seq = |at: u64| n * PUTS_PER_ENTRY + at + 1;
        let commands =
            (0..PUTS_PER_ENTRY).map(|at| command(seq(at), Body::Put(put(&key(seq(at).wrapping_mul(2_654_435_761) % keys), &VALUE))));
        payload(1, 1, seq(0).saturating_sub(2000), commands.collect())
    };
    (0..count).map(|n| entry(first_index + n, 1000 + n * 2, &payload_of(n))).collect()
}

/// Processor time of this thread: other work on the machine does not count.
struct Cpu(u64);

impl Cpu {
    fn now() -> Cpu {
        let schedstat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
        Cpu(schedstat.split(' ').next().and_then(|nanos| nanos.parse().ok()).unwrap())
    }

    fn elapsed(&self) -> std::time::Duration {
        std::time::Duration::from_nanos(Cpu::now().0 - self.0)
    }
}

fn resident_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/statm").unwrap();
    status.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap() * 4 / 1024
}

#[test]
#[ignore = "prints figures"]
fn bench_apply_get_list_and_memory() {
    const KEYS: u64 = 1_000_000;
    let mut node = Node::new();
    let before = resident_mib();
    let mut done = 0;
    for round in 0..16 {
        let count = KEYS / PUTS_PER_ENTRY / 8;
        let mut batch = entries(node.next_index(), count, KEYS);
        for (n, entry) in batch.iter_mut().enumerate() {
            // Sequences go on over the rounds.
            let mut again = <EntryPayload as prost::Message>::decode(&entry.data[..]).unwrap();
            let shift = (done + n as u64) * PUTS_PER_ENTRY;
            again.low_water = shift.saturating_sub(2000);
            for (at, command) in again.commands.iter_mut().enumerate() {
                command.seq = shift + at as u64 + 1;
                if let Some(Body::Put(put)) = &mut command.body {
                    put.key = key(command.seq.wrapping_mul(2_654_435_761) % KEYS).into();
                }
            }
            entry.data = prost::Message::encode_to_vec(&again).into();
        }
        done += count;
        let start = Cpu::now();
        for entry in &batch {
            node.state.apply(std::slice::from_ref(entry)).unwrap();
        }
        let took = start.elapsed();
        drop(batch);
        println!(
            "round {round}: {:.2} µs per put, {} revisions, {} MiB more resident",
            took.as_secs_f64() * 1e6 / (count * PUTS_PER_ENTRY) as f64,
            node.reader().revision(),
            resident_mib() - before
        );
    }
    let reader = node.reader();
    let start = Cpu::now();
    let gets = 300_000u64;
    for n in 0..gets {
        let (_, kv) = reader.get(&key(n.wrapping_mul(2_654_435_761) % KEYS), None).unwrap();
        assert!(kv.is_some());
    }
    println!("get: {:.2} µs", start.elapsed().as_secs_f64() * 1e6 / gets as f64);
    let query = RangeQuery {
        span: KeySpan::prefix(b"bench/key-0005"),
        ..all_keys()
    };
    for descending in [false, true] {
        let start = Cpu::now();
        let page = reader
            .range(&RangeQuery {
                descending,
                ..query.clone()
            })
            .unwrap();
        println!(
            "list of {} (descending {descending}): {:.0} µs",
            page.kvs.len(),
            start.elapsed().as_secs_f64() * 1e6
        );
    }
    let start = Cpu::now();
    let count = reader
        .range(&RangeQuery {
            count_only: true,
            ..all_keys()
        })
        .unwrap()
        .count;
    println!("count of {count}: {:.0} ms", start.elapsed().as_secs_f64() * 1e3);

    let revision = reader.revision();
    node.seq = done * PUTS_PER_ENTRY + 1;
    node.run(Body::Compact(metcd::state::command::Compact { revision }));
    let start = Cpu::now();
    let mut steps = 0;
    while node.state.collect_garbage(1000).unwrap() {
        steps += 1;
    }
    println!(
        "garbage of {revision} revisions: {:.2} s in {steps} steps, {} MiB more resident",
        start.elapsed().as_secs_f64(),
        resident_mib() - before
    );
    let start = Cpu::now();
    let mut writer = metcd::snapshot::SnapshotWriter::new(node.state.snapshot_view());
    let mut bytes = 0;
    while let Some(piece) = writer.next_chunk().unwrap() {
        bytes += piece.len();
    }
    println!("snapshot of {} MiB: {:.2} s", bytes >> 20, start.elapsed().as_secs_f64());
}

#[test]
#[ignore = "prints figures"]
fn bench_watchers() {
    let mut node = Node::new();
    let rounds = 200;
    let log = entries(node.next_index(), rounds, 10_000);
    let reader = node.reader();
    let start = Cpu::now();
    let mut busy: Vec<_> = (0..1000).map(|_| reader.watch(everything(false), 1).unwrap()).collect();
    let filter = |n: u64| WatchFilter {
        span: KeySpan::prefix(&format!("idle/{n}/").into_bytes()),
        ..everything(false)
    };
    let idle: Vec<_> = (0..10_000).map(|n| reader.watch(filter(n), 1).unwrap()).collect();
    println!("11,000 watches opened in {:.1} ms", start.elapsed().as_secs_f64() * 1e3);
    let start = Cpu::now();
    for entry in &log {
        node.state.apply(std::slice::from_ref(entry)).unwrap();
    }
    let puts = rounds * PUTS_PER_ENTRY;
    println!(
        "apply with them: {:.2} µs per put",
        start.elapsed().as_secs_f64() * 1e6 / puts as f64
    );
    let start = Cpu::now();
    let delivered: usize = busy.iter_mut().map(|watcher| drain(watcher).len()).sum();
    println!(
        "{delivered} changes delivered to 1,000 watchers: {:.3} µs each",
        start.elapsed().as_secs_f64() * 1e6 / delivered as f64
    );
    assert!(idle.iter().all(|watcher| watcher.position() == reader.revision()));
}

/// Keeps nothing: what the state machine itself costs.
struct NoStore;

impl KvStore for NoStore {
    fn get(&self, _: Table, _: &[u8]) -> Result<Option<Arc<[u8]>>, StoreError> {
        Ok(None)
    }

    fn scan(&self, _: Table, _: KeyRange<'_>, _: Order, _: &mut dyn FnMut(&[u8], &[u8]) -> ControlFlow<()>) -> Result<(), StoreError> {
        Ok(())
    }

    fn write(&self, _: WriteBatch) -> Result<(), StoreError> {
        Ok(())
    }

    fn sync(&self) -> Result<(), StoreError> {
        Ok(())
    }

    fn is_persistent(&self) -> bool {
        false
    }

    fn clear(&self) -> Result<(), StoreError> {
        Ok(())
    }

    fn bytes(&self) -> u64 {
        0
    }

    fn backend(&self) -> &'static str {
        "none"
    }
}

#[test]
#[ignore = "prints figures"]
fn bench_without_store() {
    let mut node = Node::of(Arc::new(NoStore), &[1, 2, 3]);
    for _ in 0..3 {
        let log = entries(node.next_index(), 2000, 1_000_000);
        let start = Cpu::now();
        for entry in &log {
            node.state.apply(std::slice::from_ref(entry)).unwrap();
        }
        println!(
            "without a store: {:.2} µs per put",
            start.elapsed().as_secs_f64() * 1e6 / (2000 * PUTS_PER_ENTRY) as f64
        );
        node = Node::of(Arc::new(NoStore), &[1, 2, 3]);
    }
}

#[test]
#[ignore = "prints figures"]
fn bench_leases() {
    let mut node = Node::new();
    let owned = |n: u64| {
        let seq = |at: u64| n * PUTS_PER_ENTRY + at + 1;
        let put_of = |at: u64| Put {
            ttl_ms: 60_000,
            ..put(&key(seq(at)), b"session")
        };
        payload(
            1,
            1,
            seq(0),
            (0..PUTS_PER_ENTRY).map(|at| command(seq(at), Body::Put(put_of(at)))).collect(),
        )
    };
    let log: Vec<Entry> = (0..1600).map(|n| entry(2 + n, 1000, &owned(n))).collect();
    let start = Cpu::now();
    for entry in &log {
        node.state.apply(std::slice::from_ref(entry)).unwrap();
    }
    let leases = node.reader().leases().len() as u64;
    println!(
        "{leases} puts with a ttl: {:.2} µs each",
        start.elapsed().as_secs_f64() * 1e6 / leases as f64
    );
    node.seq = leases + 1;
    let start = Cpu::now();
    for lease in node.reader().leases().iter().take(10_000) {
        node.run(Body::LeaseExpire(LeaseExpire { id: lease.id, term: TERM }));
    }
    println!("an expiry each: {:.2} µs", start.elapsed().as_secs_f64() * 1e6 / 10_000.0);
}
