//! What the child writes, as a function of a seed and the number of the operation, so that whoever knows the number knows what the log must hold.

use std::{collections::VecDeque, io::Write, path::Path};

use bytes::Bytes;
use metcd::{
    config::WalEngine,
    wal::{self, LogStart, Wal, WalBatch, WalError},
};
use raft::eraftpb::{Entry, HardState};

use super::Random;

/// Compaction keeps so many entries: few, so that removal, and with it the engines' own cleaning, is always busy.
const KEPT: u64 = 300;
const COMPACT_EVERY: u64 = 20;

/// What the log must hold after an operation.
#[derive(Default)]
pub struct Model {
    seed: u64,
    op: u64,
    start: LogStart,
    /// The start before the compaction that belongs to `op`.
    start_before: LogStart,
    /// Operation that wrote each entry behind `start_before`.
    writers: VecDeque<u64>,
}

/// Far less than the log that lives, so that a cut hits what only sled has.
const SMALL_JOURNAL_BYTES: u64 = 64 * 1024;

pub fn open(engine: &str, dir: &Path, sync: bool) -> Result<Box<dyn Wal>, WalError> {
    let engine = match engine {
        "sled" => WalEngine::Sled,
        "sled-small-journal" => return wal::open_sled_with_journal(dir, sync, SMALL_JOURNAL_BYTES),
        "raft-engine" => WalEngine::RaftEngine,
        "rocksdb" => WalEngine::RocksDb,
        other => panic!("no engine {other}"),
    };
    wal::open(engine, dir, sync)
}

fn term_of(op: u64) -> u64 {
    1 + op / 40
}

fn entry(seed: u64, index: u64, op: u64) -> Entry {
    let mut random = Random(seed ^ (op << 20) ^ index);
    let sizes = [20, 300, 300, 300, 2000, 2000, 9000, 9000];
    let bytes = if random.below(150) == 0 {
        200_000
    } else {
        sizes[random.below(8) as usize]
    };
    let data: Vec<u8> = std::iter::repeat_with(|| random.draw().to_le_bytes())
        .flatten()
        .take(bytes)
        .collect();
    Entry {
        index,
        term: term_of(op),
        data: Bytes::from(data),
        ..Entry::default()
    }
}

impl Model {
    pub fn after(seed: u64, op: u64) -> Self {
        let mut model = Self { seed, ..Self::default() };
        for _ in 0..op {
            model.step();
        }
        model
    }

    fn last(&self) -> u64 {
        self.start_before.index + self.writers.len() as u64
    }

    fn term_at(&self, index: u64) -> u64 {
        term_of(self.writers[(index - self.start_before.index - 1) as usize])
    }

    /// Goes on by one operation; returns the first index it writes.
    fn step(&mut self) -> u64 {
        self.writers.drain(..(self.start.index - self.start_before.index) as usize);
        self.start_before = self.start;
        self.op += 1;
        let mut random = Random(self.seed ^ (self.op << 32));
        let back = if random.below(12) == 0 && self.writers.len() > 10 {
            1 + random.below(5)
        } else {
            0
        };
        let first = self.last() + 1 - back;
        self.writers.truncate(self.writers.len() - back as usize);
        let count = if random.below(30) == 0 { 40 } else { 1 + random.below(8) };
        self.writers.extend((0..count).map(|_| self.op));
        if self.op.is_multiple_of(COMPACT_EVERY) && self.writers.len() as u64 > KEPT {
            let index = self.last() - KEPT;
            self.start = LogStart {
                index,
                term: self.term_at(index),
            };
        }
        first
    }

    /// Whether `wal` holds exactly this.
    pub fn check(&self, wal: &dyn Wal) -> Result<(), String> {
        let found = wal.recovered();
        let start = found.start;
        if (start != self.start && start != self.start_before) || found.last_index != self.last() {
            return Err(format!(
                "{:?}..={} instead of {:?}..={}",
                start,
                found.last_index,
                self.start,
                self.last()
            ));
        }
        let mut next = start.index + 1;
        while next <= found.last_index {
            for read in wal
                .entries(next, found.last_index + 1, 1 << 20)
                .map_err(|error| error.to_string())?
            {
                let writer = self.writers[(next - self.start_before.index - 1) as usize];
                if read != entry(self.seed, next, writer) {
                    return Err(format!("entry {next} is not the one of operation {writer}"));
                }
                next += 1;
            }
        }
        Ok(())
    }
}

/// Appends until killed; prints the number of each operation once it is durable.
pub fn append(engine: &str, dir: &Path, seed: u64, sync: bool) {
    let mut wal = open(engine, dir, sync).unwrap();
    let mut model = Model::after(seed, wal.recovered().hard_state.commit);
    wal.compact(model.start).unwrap();
    let mut out = std::io::stdout();
    loop {
        let first = model.step();
        let entries = (first..=model.last()).map(|index| entry(seed, index, model.op)).collect();
        let hard_state = HardState {
            term: term_of(model.op),
            vote: 1,
            commit: model.op,
            ..HardState::default()
        };
        wal.append(&WalBatch {
            entries,
            hard_state: Some(hard_state),
        })
        .unwrap();
        if model.start != model.start_before {
            wal.compact(model.start).unwrap();
        }
        if writeln!(out, "\nacknowledged {}", model.op).and_then(|()| out.flush()).is_err() {
            return;
        }
    }
}

/// Opens the log after a cut and prints the verdict in one line: `whole OP`, `refused WHY` or `silent WHAT`.
pub fn verify(engine: &str, dir: &Path, seed: u64, acknowledged: u64) {
    tracing_subscriber::fmt().with_writer(std::io::stdout).init();
    println!(
        "\n{}",
        match open(engine, dir, true) {
            Err(error) if acknowledged == 0 => format!("whole 0 ({error})"),
            Err(error) => format!("refused {error}"),
            Ok(wal) => {
                let op = wal.recovered().hard_state.commit;
                match Model::after(seed, op).check(wal.as_ref()) {
                    Ok(()) if op >= acknowledged => format!("whole {op}"),
                    Ok(()) => format!("silent: operation {acknowledged} was acknowledged, the log ends with {op}"),
                    Err(what) => format!("silent: after operation {op}: {what}"),
                }
            }
        }
    );
}
