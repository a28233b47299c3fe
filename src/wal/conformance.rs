//! One suite for all engines. A test here is named after what every log must do; at the end it is run for each engine.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use bytes::Bytes;
use protobuf::Message;
use raft::eraftpb::{Entry, HardState};

use super::{
    LogStart, Wal, WalBatch, WalError,
    checked::Checked,
    fence,
    inspect::copy_tree,
    memory::{self, Disk},
    raft_engine::RaftEngineBackend,
    sled::{Options, SledBackend},
};

type Opened = Result<Box<dyn Wal>, WalError>;

/// Small, so that the tests turn the journal over.
const SLED_OPTIONS: Options = Options {
    sync: false,
    half_bytes: 64 * 1024,
    segment_bytes: 32 * 1024,
};

/// A place for one log, and how to open it.
struct Place {
    open: Box<dyn Fn() -> Opened>,
    /// Turns to what a killed process leaves, while the log is open. `None` if the engine cannot be copied while it runs.
    kill: Box<dyn FnMut()>,
    _dir: Option<tempfile::TempDir>,
}

fn memory_place() -> Place {
    let disk = Disk::new();
    let for_kill = disk.clone();
    Place {
        open: Box::new(move || Ok(Box::new(memory::open(&disk)?))),
        kill: Box::new(move || for_kill.crash(usize::MAX)),
        _dir: None,
    }
}

/// A place in a directory. A kill copies the directory while the log is open and goes on in the copy.
fn dir_place(open: fn(&Path) -> Opened) -> Place {
    let dir = tempfile::tempdir().unwrap();
    let current = std::rc::Rc::new(std::cell::RefCell::new(dir.path().join("0")));
    let for_kill = std::rc::Rc::clone(&current);
    let mut kills = 0;
    Place {
        open: Box::new(move || open(&current.borrow())),
        kill: Box::new(move || {
            kills += 1;
            let next = for_kill.borrow().with_file_name(kills.to_string());
            copy_when_still(&for_kill.borrow(), &next);
            for_kill.replace(next);
        }),
        _dir: Some(dir),
    }
}

/// Copies a directory as it was at one moment, though threads of the engine write to it: until nothing changed meanwhile.
fn copy_when_still(from: &Path, to: &Path) {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        // A file may vanish while it is copied.
        let copied = copy_tree(from, to).is_ok();
        let mut files = Vec::new();
        files_below(to, &mut files);
        let same = |file: &PathBuf| std::fs::read(file).ok() == std::fs::read(from.join(file.strip_prefix(to).unwrap())).ok();
        if copied && files.iter().all(same) {
            return;
        }
        assert!(Instant::now() < deadline, "the log never comes to rest");
        std::fs::remove_dir_all(to).unwrap();
    }
}

fn open_sled(dir: &Path) -> Opened {
    Ok(Box::new(Checked::open(SledBackend::open(dir, SLED_OPTIONS)?)?))
}

fn open_raft_engine(dir: &Path) -> Opened {
    Ok(Box::new(Checked::open(RaftEngineBackend::open(dir, false)?)?))
}

#[cfg(feature = "rocksdb")]
fn open_rocksdb(dir: &Path) -> Opened {
    Ok(Box::new(Checked::open(super::rocksdb::RocksDbBackend::open(dir, false)?)?))
}

/// A generator whose sequence the seed decides.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

fn entry(index: u64, term: u64, bytes: usize) -> Entry {
    let mut random = Random(index * 1_000_003 + term);
    let data: Vec<u8> = std::iter::repeat_with(|| random.next().to_le_bytes())
        .flatten()
        .take(bytes)
        .collect();
    Entry {
        index,
        term,
        data: Bytes::from(data),
        context: Bytes::from_static(b"c"),
        ..Entry::default()
    }
}

fn entries(from: u64, to: u64, term: u64) -> Vec<Entry> {
    (from..=to).map(|index| entry(index, term, 100)).collect()
}

fn hard_state(term: u64, vote: u64, commit: u64) -> HardState {
    HardState {
        term,
        vote,
        commit,
        ..HardState::default()
    }
}

fn batch(entries: Vec<Entry>) -> WalBatch {
    WalBatch { entries, hard_state: None }
}

/// The log's content, read in pieces.
fn all(wal: &dyn Wal, start: u64, last: u64) -> Vec<Entry> {
    let mut found: Vec<Entry> = Vec::new();
    while start + (found.len() as u64) < last {
        found.extend(wal.entries(start + 1 + found.len() as u64, last + 1, 10_000).unwrap());
    }
    found
}

/// What a log must hold, kept beside it.
#[derive(Clone, Default)]
struct Model {
    start: LogStart,
    entries: Vec<Entry>,
    hard_state: HardState,
}

impl Model {
    fn last(&self) -> u64 {
        self.start.index + self.entries.len() as u64
    }

    fn append(&mut self, wal: &mut dyn Wal, batch: &WalBatch) {
        wal.append(batch).unwrap();
        if let Some(first) = batch.entries.first() {
            self.entries.truncate((first.index - self.start.index - 1) as usize);
            self.entries.extend(batch.entries.iter().cloned());
        }
        if let Some(hard_state) = &batch.hard_state {
            self.hard_state = hard_state.clone();
        }
    }

    fn compact(&mut self, wal: &mut dyn Wal, to_index: u64) {
        let offset = (to_index - self.start.index) as usize;
        let to = LogStart {
            index: to_index,
            term: self.entries[offset - 1].term,
        };
        wal.compact(to).unwrap();
        self.entries.drain(..offset);
        self.start = to;
    }

    fn reset(&mut self, wal: &mut dyn Wal, start: LogStart) {
        wal.reset(start, &hard_state(start.term, 0, start.index)).unwrap();
        *self = Self {
            start,
            entries: Vec::new(),
            hard_state: hard_state(start.term, 0, start.index),
        };
    }

    fn check_recovered(&self, wal: &dyn Wal) {
        let found = wal.recovered();
        assert_eq!(
            (found.start, found.last_index, &found.hard_state),
            (self.start, self.last(), &self.hard_state)
        );
    }

    fn check_entries(&self, wal: &dyn Wal) {
        let found = all(wal, self.start.index, self.last());
        assert!(found == self.entries, "the entries differ");
    }
}

fn an_empty_log_recovers_to_nothing(place: &mut Place) {
    for _ in 0..2 {
        let wal = (place.open)().unwrap();
        Model::default().check_recovered(wal.as_ref());
        assert!(wal.entries(1, 5, u64::MAX).unwrap().is_empty());
        assert!(matches!(
            wal.entries(0, 1, u64::MAX),
            Err(WalError::Compacted { index: 0, start: 0 })
        ));
    }
}

fn appended_entries_are_there_after_close_and_after_kill(place: &mut Place) {
    let mut model = Model::default();
    for round in 0..4 {
        let mut wal = (place.open)().unwrap();
        model.check_recovered(wal.as_ref());
        model.check_entries(wal.as_ref());
        for step in 0..5 {
            let last = model.last();
            model.append(wal.as_mut(), &batch(entries(last + 1, last + 1 + step, round + 1)));
        }
        model.check_entries(wal.as_ref());
        if round % 2 == 1 {
            (place.kill)();
        }
    }
}

fn appending_inside_the_log_replaces_its_end(place: &mut Place) {
    let mut model = Model::default();
    let mut wal = (place.open)().unwrap();
    model.append(wal.as_mut(), &batch(entries(1, 10, 1)));
    model.append(wal.as_mut(), &batch(entries(6, 7, 2)));
    model.check_entries(wal.as_ref());
    assert_eq!(wal.entries(8, 9, u64::MAX).unwrap(), [], "nothing behind the new end");
    drop(wal);
    let mut wal = (place.open)().unwrap();
    model.check_recovered(wal.as_ref());
    model.append(wal.as_mut(), &batch(entries(1, 1, 3)));
    model.append(wal.as_mut(), &batch(entries(2, 4, 3)));
    model.check_entries(wal.as_ref());
    drop(wal);
    let wal = (place.open)().unwrap();
    model.check_recovered(wal.as_ref());
    model.check_entries(wal.as_ref());
}

fn hard_state_comes_back_with_the_entries_of_its_batch(place: &mut Place) {
    let mut model = Model::default();
    let mut wal = (place.open)().unwrap();
    model.append(
        wal.as_mut(),
        &WalBatch {
            entries: entries(1, 3, 4),
            hard_state: Some(hard_state(4, 2, 1)),
        },
    );
    model.append(
        wal.as_mut(),
        &WalBatch {
            entries: Vec::new(),
            hard_state: Some(hard_state(5, 3, 2)),
        },
    );
    drop(wal);
    let wal = (place.open)().unwrap();
    model.check_recovered(wal.as_ref());
    model.check_entries(wal.as_ref());
}

fn reading_stops_at_the_size_and_gives_at_least_one(place: &mut Place) {
    let mut wal = (place.open)().unwrap();
    wal.append(&batch(entries(1, 10, 1))).unwrap();
    let size = u64::from(entry(5, 1, 100).compute_size());
    let count = |low, high, max| wal.entries(low, high, max).unwrap().len();
    assert_eq!(count(5, 11, 0), 1);
    assert_eq!(count(5, 11, size), 1);
    assert_eq!(count(5, 11, 2 * size), 2);
    assert_eq!(count(5, 11, u64::MAX), 6);
    assert_eq!(count(5, 5, u64::MAX), 0);
    assert_eq!(count(5, 8, u64::MAX), 3);
    assert_eq!(count(11, 12, u64::MAX), 0);
}

fn compaction_and_reset_survive_reopening(place: &mut Place) {
    let mut model = Model::default();
    let mut wal = (place.open)().unwrap();
    model.append(wal.as_mut(), &batch(entries(1, 600, 1)));
    model.compact(wal.as_mut(), 580);
    assert!(matches!(
        wal.entries(580, 600, 1),
        Err(WalError::Compacted { index: 580, start: 580 })
    ));
    model.check_entries(wal.as_ref());
    wal.compact(LogStart { index: 10, term: 1 }).unwrap();
    drop(wal);
    let mut wal = (place.open)().unwrap();
    model.check_recovered(wal.as_ref());
    model.check_entries(wal.as_ref());
    model.compact(wal.as_mut(), 600);
    model.append(wal.as_mut(), &batch(entries(601, 605, 2)));
    model.check_entries(wal.as_ref());
    for start in [LogStart { index: 1000, term: 7 }, LogStart { index: 50, term: 9 }] {
        model.reset(wal.as_mut(), start);
        assert!(wal.entries(start.index + 1, start.index + 9, 9).unwrap().is_empty());
        model.append(wal.as_mut(), &batch(entries(start.index + 1, start.index + 3, start.term)));
        model.check_entries(wal.as_ref());
        drop(wal);
        wal = (place.open)().unwrap();
        model.check_recovered(wal.as_ref());
        model.check_entries(wal.as_ref());
    }
    wal.compact(LogStart { index: 2000, term: 11 }).unwrap();
    drop(wal);
    let wal = (place.open)().unwrap();
    assert_eq!(
        (wal.recovered().start.index, wal.recovered().last_index),
        (2000, 2000),
        "compaction past the end"
    );
}

fn a_reset_to_below_a_compaction_keeps_its_new_entries(place: &mut Place) {
    let mut model = Model::default();
    let mut wal = (place.open)().unwrap();
    for life in 0..10 {
        let from = model.last() + 1;
        model.append(wal.as_mut(), &batch(entries(from, from + 2000, 20 * life + 1)));
        model.compact(wal.as_mut(), from + 1990);
        model.reset(
            wal.as_mut(),
            LogStart {
                index: 5,
                term: 20 * life + 2,
            },
        );
        for index in 6..30 {
            model.append(wal.as_mut(), &batch(vec![entry(index, 20 * life + 3, 5000)]));
        }
        model.check_entries(wal.as_ref());
    }
    drop(wal);
    let wal = (place.open)().unwrap();
    model.check_recovered(wal.as_ref());
    model.check_entries(wal.as_ref());
}

fn entries_and_batches_of_megabytes_come_back(place: &mut Place) {
    let mut model = Model::default();
    let mut wal = (place.open)().unwrap();
    model.append(
        wal.as_mut(),
        &batch(vec![entry(1, 1, 3 << 20), entry(2, 1, 0), entry(3, 1, 1 << 20), entry(4, 1, 4000)]),
    );
    model.append(wal.as_mut(), &batch((5..=1500).map(|index| entry(index, 1, 300)).collect()));
    model.append(wal.as_mut(), &batch(vec![entry(4, 2, 100)]));
    model.append(wal.as_mut(), &batch(vec![entry(5, 2, 4096 - 32)]));
    model.check_entries(wal.as_ref());
    drop(wal);
    let mut wal = (place.open)().unwrap();
    model.check_recovered(wal.as_ref());
    model.check_entries(wal.as_ref());
    model.append(wal.as_mut(), &batch(vec![entry(3, 3, 10)]));
    drop(wal);
    model.check_entries((place.open)().unwrap().as_ref());
}

fn stats_count_bytes(place: &mut Place) {
    let mut wal = (place.open)().unwrap();
    wal.append(&batch(vec![entry(1, 1, 100_000)])).unwrap();
    assert!(wal.stats().bytes >= 100_000, "{:?}", wal.stats());
}

fn a_random_history_matches_the_model(place: &mut Place) {
    for seed in 0..6 {
        println!("seed {seed}");
        let mut random = Random(seed);
        let mut model = Model::default();
        let mut wal = (place.open)().unwrap();
        let first = LogStart {
            index: random.below(100),
            term: 1,
        };
        model.reset(wal.as_mut(), first);
        for _ in 0..120 {
            random_step(&mut random, &mut model, &mut wal, place);
        }
        model.check_entries(wal.as_ref());
        drop(wal);
        let wal = (place.open)().unwrap();
        model.check_recovered(wal.as_ref());
        model.check_entries(wal.as_ref());
    }
}

fn random_step(random: &mut Random, model: &mut Model, wal: &mut Box<dyn Wal>, place: &mut Place) {
    let term = model.entries.last().map_or(model.start.term, |entry| entry.term) + random.below(2);
    match random.below(20) {
        0..=9 => {
            let from = model.last() + 1;
            let sizes = [10, 300, 300, 4000, 9000, 70_000];
            let new = (from..from + 1 + random.below(12))
                .map(|index| entry(index, term, sizes[random.below(6) as usize]))
                .collect();
            let hard_state = (random.below(2) == 0).then(|| hard_state(term, random.below(4), from - 1));
            model.append(wal.as_mut(), &WalBatch { entries: new, hard_state });
        }
        10..=11 if !model.entries.is_empty() => {
            let from = model.start.index + 1 + random.below(model.entries.len() as u64);
            model.append(wal.as_mut(), &batch(entries(from, from + random.below(20), term + 1)));
        }
        12 => model.append(
            wal.as_mut(),
            &WalBatch {
                entries: Vec::new(),
                hard_state: Some(hard_state(term, 1, 0)),
            },
        ),
        13..=14 if !model.entries.is_empty() => {
            let to = model.start.index + 1 + random.below(model.entries.len() as u64);
            model.compact(wal.as_mut(), to);
        }
        15 if random.below(4) == 0 => {
            let start = LogStart {
                index: model.last() + random.below(50),
                term,
            };
            model.reset(wal.as_mut(), start);
        }
        16 => {
            if random.below(2) == 0 {
                (place.kill)();
            }
            // The old one is closed before the new one is opened.
            *wal = Box::new(memory::open(&Disk::new()).unwrap());
            *wal = (place.open)().unwrap();
            model.check_recovered(wal.as_ref());
        }
        _ if !model.entries.is_empty() => {
            let low = model.start.index + 1 + random.below(model.entries.len() as u64);
            let found = wal.entries(low, low + random.below(30), 20_000).unwrap();
            let offset = (low - model.start.index - 1) as usize;
            assert!(found == model.entries[offset..offset + found.len()]);
        }
        _ => {}
    }
}

/// A closed log with a history, and what it holds.
fn written(dir: &Path, open: fn(&Path) -> Opened) -> Model {
    let mut model = Model::default();
    for round in 0..3_u64 {
        let mut wal = open(dir).unwrap();
        for _ in 0..12 {
            let last = model.last();
            let new = vec![
                entry(last + 1, round + 1, 300),
                entry(last + 2, round + 1, 5000),
                entry(last + 3, round + 1, 10),
            ];
            model.append(
                wal.as_mut(),
                &WalBatch {
                    entries: new,
                    hard_state: Some(hard_state(round + 1, 2, last)),
                },
            );
        }
        let last = model.last();
        model.append(wal.as_mut(), &batch(entries(last - 1, last + 2, round + 2)));
        model.compact(wal.as_mut(), last - 20);
    }
    model
}

/// Opens a damaged copy. It must refuse, or hold everything that was acknowledged: never less.
fn refuses_or_holds_everything(dir: &Path, open: fn(&Path) -> Opened, model: &Model, what: &str) -> bool {
    let held = catch_unwind(AssertUnwindSafe(|| {
        let wal = open(dir).ok()?;
        let found = wal.recovered().clone();
        let entries = catch_unwind(AssertUnwindSafe(|| all(wal.as_ref(), found.start.index, found.last_index)));
        Some((found, entries.ok()?))
    }));
    // A panic inside an engine ends the process with its message: refused.
    let Ok(Some((found, entries))) = held else { return false };
    assert_eq!(
        (found.start, found.last_index),
        (model.start, model.last()),
        "{what}: silently another log"
    );
    assert_eq!(found.hard_state, model.hard_state, "{what}: silently another hard state");
    assert!(entries == model.entries, "{what}: silently other entries");
    true
}

fn files_below(dir: &Path, found: &mut Vec<PathBuf>) {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    for path in paths {
        if path.is_dir() {
            files_below(&path, found)
        } else {
            found.push(path)
        }
    }
}

/// Does `damage` to a copy of the log for each of its files and each of `rounds`.
fn damage_every_file(open: fn(&Path) -> Opened, rounds: u64, damage: impl Fn(&mut Vec<u8>, &mut Random, u64) -> bool) {
    let place = tempfile::tempdir().unwrap();
    let origin = place.path().join("origin");
    let model = written(&origin, open);
    let mut files = Vec::new();
    files_below(&origin, &mut files);
    let (mut harmless, mut refused) = (0, 0);
    for file in files {
        let name = file.strip_prefix(&origin).unwrap().to_owned();
        for round in 0..rounds {
            let copy = place.path().join("copy");
            copy_tree(&origin, &copy).unwrap();
            let mut content = std::fs::read(&file).unwrap();
            if damage(&mut content, &mut Random(round), round) {
                std::fs::write(copy.join(&name), &content).unwrap();
                match refuses_or_holds_everything(&copy, open, &model, &format!("{}, round {round}", name.display())) {
                    true => harmless += 1,
                    false => refused += 1,
                }
            }
            std::fs::remove_dir_all(&copy).unwrap();
        }
    }
    println!("{harmless} harmless, {refused} refused");
    assert!(refused > 0);
}

fn a_flipped_bit_in_any_file_is_refused_or_harmless(open: fn(&Path) -> Opened) {
    damage_every_file(open, 40, |content, random, round| {
        // Half of the flips go where there is something.
        let used: Vec<usize> = (0..content.len()).filter(|at| content[*at] != 0).collect();
        let at = match (content.len(), used.len()) {
            (0, _) => return false,
            (_, count) if count > 0 && round % 4 != 0 => used[random.below(count as u64) as usize],
            (count, _) => random.below(count as u64) as usize,
        };
        content[at] ^= 1 << random.below(8);
        true
    });
}

fn a_cut_file_is_refused_or_harmless(open: fn(&Path) -> Opened) {
    damage_every_file(open, 6, |content, random, round| {
        let bytes = content.len();
        if bytes == 0 {
            return false;
        }
        content.truncate(match round {
            0 => 0,
            1 => bytes - 1,
            2 => bytes / 2,
            _ => random.below(bytes as u64) as usize,
        });
        true
    });
}

fn a_directory_of_another_engine_or_format_is_refused(open: fn(&Path) -> Opened) {
    let place = tempfile::tempdir().unwrap();
    let dir = place.path().join("log");
    drop(open(&dir).unwrap());
    let marker = dir.join("FORMAT");
    let intact = std::fs::read_to_string(&marker).unwrap();
    let other: fn(&Path) -> Opened = if intact.contains("engine=sled") {
        open_raft_engine
    } else {
        open_sled
    };
    let reason = |opened: Opened| match opened.err() {
        Some(WalError::Refused(reason)) => reason,
        other => panic!("{other:?}"),
    };
    assert!(reason(other(&dir)).contains("wal.engine"));
    let newer = intact.split_once("format=").map(|(head, rest)| format!("{head}format=9{rest}"));
    std::fs::write(&marker, newer.unwrap()).unwrap();
    assert!(reason(open(&dir)).contains("has format 9"));
    std::fs::remove_file(&marker).unwrap();
    assert!(reason(open(&dir)).contains("FORMAT"));
    std::fs::write(&marker, intact).unwrap();
    let held = open(&dir).unwrap();
    assert!(reason(open(&dir)).contains("in use"));
    drop(held);
}

/// An open log in `dir` with an entry more than its copy in `old`.
fn ahead_of_its_copy(open: fn(&Path) -> Opened, dir: &Path, old: &Path) -> Box<dyn Wal> {
    let mut wal = open(dir).unwrap();
    wal.append(&batch(entries(1, 3, 1))).unwrap();
    drop(wal);
    copy_tree(dir, old).unwrap();
    let mut wal = open(dir).unwrap();
    wal.append(&batch(entries(4, 4, 1))).unwrap();
    wal
}

fn an_engine_behind_its_fence_is_a_lost_disk(open: fn(&Path) -> Opened) {
    let place = tempfile::tempdir().unwrap();
    let (dir, old) = (place.path().join("log"), place.path().join("old"));
    let wal = ahead_of_its_copy(open, &dir, &old);
    drop(wal);
    std::fs::copy(dir.join("fence"), old.join("fence")).unwrap();
    match open(&old).err() {
        Some(WalError::Lost(reason)) => assert!(reason.contains("new id"), "{reason}"),
        other => panic!("{other:?}"),
    }
}

fn the_fence_of_an_open_log_follows_it(open: fn(&Path) -> Opened) {
    let place = tempfile::tempdir().unwrap();
    let (dir, old) = (place.path().join("log"), place.path().join("old"));
    let wal = ahead_of_its_copy(open, &dir, &old);
    let fence = dir.join("fence");
    let deadline = Instant::now() + Duration::from_secs(20);
    while fence::read(&fence).unwrap().0.last_index < 4 {
        assert!(Instant::now() < deadline, "the fence stays behind while the log is open");
        std::thread::yield_now();
    }
    std::fs::copy(&fence, old.join("fence")).unwrap();
    match open(&old).err() {
        Some(WalError::Lost(reason)) => assert!(reason.contains("entry 4"), "{reason}"),
        other => panic!("{other:?}"),
    }
    drop(wal);
}

macro_rules! in_a_child {
    ($test:ident, $body:expr) => {
        crate::test_child::run(
            concat!(module_path!(), "::", stringify!($test)).trim_start_matches("metcd::"),
            || $body,
        )
    };
}

macro_rules! suite {
    ($engine:ident, $place:expr) => {
        mod $engine {
            use super::*;
            suite!(@tests $place;
                an_empty_log_recovers_to_nothing
                appended_entries_are_there_after_close_and_after_kill
                appending_inside_the_log_replaces_its_end
                hard_state_comes_back_with_the_entries_of_its_batch
                reading_stops_at_the_size_and_gives_at_least_one
                compaction_and_reset_survive_reopening
                a_reset_to_below_a_compaction_keeps_its_new_entries
                entries_and_batches_of_megabytes_come_back
                stats_count_bytes
                a_random_history_matches_the_model
            );
        }
    };
    ($engine:ident, dir $open:expr) => {
        mod $engine {
            use super::*;
            suite!(@child dir_place($open);
                an_empty_log_recovers_to_nothing
                appended_entries_are_there_after_close_and_after_kill
                appending_inside_the_log_replaces_its_end
                hard_state_comes_back_with_the_entries_of_its_batch
                reading_stops_at_the_size_and_gives_at_least_one
                compaction_and_reset_survive_reopening
                a_reset_to_below_a_compaction_keeps_its_new_entries
                entries_and_batches_of_megabytes_come_back
                stats_count_bytes
                a_random_history_matches_the_model
            );
            suite!(@dir $open;
                a_flipped_bit_in_any_file_is_refused_or_harmless
                a_cut_file_is_refused_or_harmless
                a_directory_of_another_engine_or_format_is_refused
                an_engine_behind_its_fence_is_a_lost_disk
                the_fence_of_an_open_log_follows_it
            );
        }
    };
    (@tests $place:expr; $($test:ident)*) => { $(#[test] fn $test() { super::$test(&mut $place); })* };
    (@child $place:expr; $($test:ident)*) => { $(#[test] fn $test() { in_a_child!($test, super::$test(&mut $place)); })* };
    (@dir $open:expr; $($test:ident)*) => { $(#[test] fn $test() { in_a_child!($test, super::$test($open)); })* };
}

suite!(on_memory, memory_place());
suite!(on_sled, dir open_sled);
suite!(on_raft_engine, dir open_raft_engine);
#[cfg(feature = "rocksdb")]
suite!(on_rocksdb, dir open_rocksdb);
