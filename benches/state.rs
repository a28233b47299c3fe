//! Figures of the state machine over the memory store: applying commands, feeding watchers, encoding what goes through the log.
//!
//! `cargo bench --bench state -- [apply|watch_fanout|leases|encode] [keys, default 1000000]`
//! Processor time of the thread is what counts, so other work on the machine disturbs little. Memory is the process's: one bench a run for that.

#![allow(clippy::print_stdout, reason = "figures are printed")]

use std::{future::Future, hint::black_box, pin::pin, task::Context, task::Poll, task::Waker, time::Duration};

use metcd::snapshot::SnapshotWriter;
use metcd::state::command::{Body, Command, Compact, EntryPayload, FEATURE_LEVEL, KeySpan, LeaseExpire, MemberRecord, Put, Stamp};
use metcd::state::reader::RangeQuery;
use metcd::state::watch::{WatchFilter, Watcher};
use metcd::state::{State, StateReader};
use metcd::store::MemoryStore;
use prost::Message;
use raft::eraftpb::Entry;

/// As the program.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const TERM: u64 = 3;
const PUTS_PER_ENTRY: u64 = 64;
const VALUE: [u8; 256] = [7; 256];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let keys = arguments.get(1).map_or(1_000_000, |text| text.parse().expect("a number of keys"));
    match arguments.first().map(String::as_str) {
        Some("apply") => apply(keys),
        Some("watch_fanout") => watch_fanout(),
        Some("leases") => leases(),
        Some("encode") => encode(),
        _ => {
            encode();
            leases();
            watch_fanout();
            apply(keys);
        }
    }
}

/// A log in miniature.
struct Log {
    state: State,
    seq: u64,
}

impl Log {
    fn new() -> Log {
        let mut state = State::open(std::sync::Arc::new(MemoryStore::new())).expect("the state opens");
        let member = MemberRecord {
            id: 1,
            feature_level: FEATURE_LEVEL,
            ..MemberRecord::default()
        };
        state.bootstrap(77, &[member]).expect("bootstrap");
        Log { state, seq: 1 }
    }

    /// The next entry, of so many commands.
    fn entry(&mut self, bodies: impl Iterator<Item = Body>) -> Entry {
        let low_water = self.seq.saturating_sub(2000);
        let command = |body| {
            let seq = self.seq;
            self.seq += 1;
            Command {
                seq,
                idempotency: None,
                body: Some(body),
            }
        };
        let payload = EntryPayload {
            feature_level: FEATURE_LEVEL,
            member: 1,
            boot: 1,
            low_water,
            commands: bodies.map(command).collect(),
        };
        Entry {
            term: TERM,
            data: payload.encode_to_vec().into(),
            ..Entry::default()
        }
    }

    /// Applies the entries one by one and returns the processor time of that.
    fn apply(&mut self, entries: &mut [Entry]) -> Duration {
        let start = Cpu::now();
        for entry in entries {
            entry.index = self.state.applied().index + 1;
            entry.context = Stamp(1000 + entry.index * 2).encode();
            self.state.apply(std::slice::from_ref(entry)).expect("apply");
        }
        start.elapsed()
    }

    fn puts(&mut self, entries: u64, keys: u64) -> Vec<Entry> {
        (0..entries)
            .map(|_| {
                let first = self.seq;
                self.entry((first..first + PUTS_PER_ENTRY).map(|n| put(scattered(n) % keys, 0)))
            })
            .collect()
    }

    fn reader(&self) -> StateReader {
        self.state.reader()
    }
}

fn key(n: u64) -> Vec<u8> {
    format!("k{n:015}").into_bytes()
}

/// Distinct for distinct numbers below 2^32, in an order that looks random.
fn scattered(n: u64) -> u64 {
    n.wrapping_mul(2_654_435_761) & 0xffff_ffff
}

fn put(key_number: u64, ttl_ms: u64) -> Body {
    Body::Put(Put {
        key: key(key_number).into(),
        value: VALUE.to_vec().into(),
        ttl_ms,
        ..Put::default()
    })
}

/// Processor time of this thread.
struct Cpu(u64);

impl Cpu {
    fn now() -> Cpu {
        let schedstat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
        Cpu(schedstat.split(' ').next().and_then(|nanos| nanos.parse().ok()).unwrap_or(0))
    }

    fn elapsed(&self) -> Duration {
        Duration::from_nanos(Cpu::now().0 - self.0)
    }
}

fn resident_mb() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    pages * 4096 / 1_000_000
}

fn report(what: &str, took: Duration, operations: u64) {
    println!("{what:40} {:>9.3} µs each", took.as_secs_f64() * 1e6 / operations as f64);
}

/// Twice as many puts as keys, then reads, lists, compaction and a snapshot.
fn apply(keys: u64) {
    let mut log = Log::new();
    let before = resident_mb();
    let entries = keys / PUTS_PER_ENTRY / 8;
    for round in 0..16 {
        let mut batch = log.puts(entries, keys);
        let took = log.apply(&mut batch);
        drop(batch);
        let what = format!("apply, round {round}, {} MB more", resident_mb() - before);
        report(&what, took, entries * PUTS_PER_ENTRY);
    }
    let reader = log.reader();
    let start = Cpu::now();
    let gets = 300_000;
    let found = (1..=gets)
        .filter(|n| reader.get(&key(scattered(*n) % keys), None).is_ok_and(|(_, kv)| kv.is_some()))
        .count();
    report(&format!("get, {found} found"), start.elapsed(), gets);
    let everything = RangeQuery {
        span: KeySpan::prefix(b""),
        revision: None,
        limit: 1000,
        after: None,
        descending: false,
        keys_only: false,
        count_only: false,
        with_count: false,
        max_bytes: usize::MAX,
    };
    for descending in [false, true] {
        let start = Cpu::now();
        let page = reader
            .range(&RangeQuery {
                descending,
                ..everything.clone()
            })
            .expect("a list");
        report(&format!("list, descending {descending}"), start.elapsed(), page.kvs.len() as u64);
    }
    let start = Cpu::now();
    let count = reader
        .range(&RangeQuery {
            count_only: true,
            ..everything
        })
        .expect("a count")
        .count;
    report("count", start.elapsed(), count);
    let start = Cpu::now();
    let mut writer = SnapshotWriter::new(log.state.snapshot_view());
    let mut bytes = 0;
    while let Some(piece) = writer.next_chunk().expect("a snapshot") {
        bytes += piece.len();
    }
    report(&format!("snapshot of {} MB", bytes / 1_000_000), start.elapsed(), count);
    drop(writer);

    let revision = reader.revision();
    let compact = log.entry(std::iter::once(Body::Compact(Compact { revision })));
    log.apply(&mut [compact]);
    let start = Cpu::now();
    while log.state.collect_garbage(1000).expect("garbage") {}
    report("garbage collection, a revision", start.elapsed(), revision);
    println!("after it {} MB more than at the start", resident_mb() - before);
}

/// Everything that the watcher has to say now.
fn drain(watcher: &mut Watcher) -> usize {
    let mut changes = 0;
    let mut context = Context::from_waker(Waker::noop());
    while let Poll::Ready(next) = pin!(watcher.next()).poll(&mut context) {
        changes += next.expect("a watch").len();
    }
    changes
}

/// 1,000 watchers of everything and 10,000 of other prefixes beside the puts; the former fall behind first, then keep up.
fn watch_fanout() {
    let mut log = Log::new();
    let filter = |prefix: String| WatchFilter {
        span: KeySpan::prefix(prefix.as_bytes()),
        puts: true,
        deletes: true,
        want_prev: false,
    };
    let reader = log.reader();
    let mut busy: Vec<_> = (0..1000)
        .map(|_| reader.watch(filter(String::new()), 1).expect("a watch"))
        .collect();
    let idle: Vec<_> = (0..10_000)
        .map(|n| reader.watch(filter(format!("idle/{n}/")), 1).expect("a watch"))
        .collect();
    let mut behind = log.puts(100, 10_000);
    let puts = behind.len() as u64 * PUTS_PER_ENTRY;
    report("apply beside 11,000 watches", log.apply(&mut behind), puts);
    let start = Cpu::now();
    let delivered: usize = busy.iter_mut().map(drain).sum();
    report("delivery of a change, 6,400 behind", start.elapsed(), delivered as u64);
    let (mut took, mut delivered) = (Duration::ZERO, 0);
    for mut entry in log.puts(20, 10_000) {
        log.apply(std::slice::from_mut(&mut entry));
        let start = Cpu::now();
        delivered += busy.iter_mut().map(drain).sum::<usize>();
        took += start.elapsed();
    }
    report("delivery of a change, 64 at a time", took, delivered as u64);
    black_box(idle);
}

fn leases() {
    let mut log = Log::new();
    let mut entries: Vec<Entry> = (0..1600)
        .map(|_| {
            let first = log.seq;
            log.entry((first..first + PUTS_PER_ENTRY).map(|n| put(n, 60_000)))
        })
        .collect();
    let took = log.apply(&mut entries);
    let leases = log.reader().leases();
    report("put with a ttl", took, leases.len() as u64);
    let ends = leases
        .iter()
        .map(|lease| Body::LeaseExpire(LeaseExpire { id: lease.id, term: TERM }));
    let bodies: Vec<Body> = ends.collect();
    let mut entries: Vec<Entry> = bodies.chunks(64).map(|some| log.entry(some.iter().cloned())).collect();
    report("expiry of a lease with a key", log.apply(&mut entries), leases.len() as u64);
}

/// An entry of 64 puts, to its bytes and back.
fn encode() {
    const ROUNDS: u64 = 20_000;
    let mut log = Log::new();
    let entry = log.puts(1, 1000).remove(0);
    let payload = EntryPayload::decode(entry.data.clone()).expect("a payload");
    let start = Cpu::now();
    for _ in 0..ROUNDS {
        black_box(black_box(&payload).encode_to_vec());
    }
    report("encode a put into an entry", start.elapsed(), ROUNDS * PUTS_PER_ENTRY);
    let start = Cpu::now();
    for _ in 0..ROUNDS {
        black_box(EntryPayload::decode(black_box(entry.data.clone())).expect("a payload"));
    }
    report("decode a put of an entry", start.elapsed(), ROUNDS * PUTS_PER_ENTRY);
}
