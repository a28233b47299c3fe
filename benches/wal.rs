//! How long a durable append takes, for each engine.
//!
//! `cargo bench --bench wal [-- ENGINE...] [DIR]`: the directory decides which file system is measured (default: the current one).

#![allow(clippy::print_stdout, reason = "figures are printed")]

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use bytes::Bytes;
use metcd::{
    config::WalEngine,
    wal::{self, LogStart, Wal, WalBatch},
};
use raft::eraftpb::{Entry, HardState};

const ENGINES: [(&str, WalEngine); 3] = [
    ("sled", WalEngine::Sled),
    ("raft-engine", WalEngine::RaftEngine),
    ("rocksdb", WalEngine::RocksDb),
];
/// Entries of a batch, bytes of an entry, batches.
const SHAPES: [(u64, usize, u32); 5] = [
    (1, 300, 3000),
    (16, 300, 2000),
    (128, 300, 1000),
    (1, 20 * 1024, 2000),
    (1, 1024 * 1024, 60),
];
/// Compaction keeps so many entries.
const KEPT: u64 = 10_000;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let (names, dirs): (Vec<&String>, Vec<&String>) = arguments.iter().partition(|a| ENGINES.iter().any(|(name, _)| name == a));
    let dir = dirs
        .first()
        .map_or_else(|| PathBuf::from("."), PathBuf::from)
        .join(format!("wal-bench-{}", std::process::id()));
    println!(
        "{:<12} {:>6} {:>9} {:>9} {:>9} {:>9} {:>9} {:>10} {:>8}",
        "engine", "batch", "bytes", "mean µs", "p50", "p99", "max", "cpu µs", "MiB disk"
    );
    for (name, engine) in ENGINES {
        if !names.is_empty() && !names.iter().any(|wanted| *wanted == name) {
            continue;
        }
        for shape in SHAPES {
            let place = dir.join(name);
            match wal::open(engine, &place, true) {
                Ok(wal) => measure(name, wal, shape, &place),
                Err(error) => println!("{name:<12} {error}"),
            }
            // Left over only if the engine was refused before it made anything.
            let _ = std::fs::remove_dir_all(&place);
        }
    }
    let _ = std::fs::remove_dir_all(&dir);
}

fn measure(name: &str, mut wal: Box<dyn Wal>, (count, bytes, batches): (u64, usize, u32), _place: &Path) {
    let data = Bytes::from((0..bytes).map(|at| (at * 31 % 251) as u8).collect::<Vec<u8>>());
    let (mut next, mut kept_from) = (1, 0);
    let mut took = Vec::new();
    let cpu_before = cpu_time();
    for _ in 0..batches {
        let entries = (next..next + count)
            .map(|index| Entry {
                index,
                term: 1,
                data: data.clone(),
                ..Entry::default()
            })
            .collect();
        next += count;
        let batch = WalBatch {
            entries,
            hard_state: Some(HardState {
                term: 1,
                vote: 1,
                commit: next - 1,
                ..HardState::default()
            }),
        };
        let start = Instant::now();
        wal.append(&batch).unwrap_or_else(|error| panic!("{error}"));
        took.push(start.elapsed());
        if next - kept_from > 2 * KEPT {
            kept_from = next - 1 - KEPT;
            wal.compact(LogStart { index: kept_from, term: 1 })
                .unwrap_or_else(|error| panic!("{error}"));
        }
    }
    let cpu = cpu_time().saturating_sub(cpu_before) / batches;
    took.sort();
    let micros = |duration: Duration| duration.as_secs_f64() * 1e6;
    let mean = took.iter().sum::<Duration>() / batches;
    let at = |part: f64| micros(took[((took.len() - 1) as f64 * part) as usize]);
    let disk = wal.stats().bytes >> 20;
    println!(
        "{name:<12} {count:>6} {bytes:>9} {:>9.0} {:>9.0} {:>9.0} {:>9.0} {:>10.0} {disk:>8}",
        micros(mean),
        at(0.5),
        at(0.99),
        at(1.0),
        micros(cpu)
    );
}

/// User and system time of the process.
fn cpu_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let ticks: u64 = after_name
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse::<u64>().ok())
        .sum();
    Duration::from_millis(ticks * 10)
}
