//! Power cuts: nothing that a log, or a cluster, acknowledged, or a store made durable, may be missing afterwards, whatever the disk had not
//! flushed. A store that does not promise as much may be empty, but never anything else.
//!
//! A child process appends and compacts as fast as it can, on an ext4 on a [`disk`] that knows what was flushed. At random moments the disk is
//! copied as a power cut would leave it; the copy is mounted, the log in it is opened by another process and compared with
//! what the acknowledged operations must have made. Every fourth time the child is killed and goes on from the copy.
//!
//! The same log on a disk that refuses writes for a moment, [`failing`].
//!
//! Controls without sync, of a log, a store and a cluster, show that the same harness sees losses. Needs root, FUSE and loop devices; elsewhere a weaker test with
//! `kill -9` runs instead and says so.
//!
//! `scripts/power-cut --engine sled --cuts 500` runs it for long.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "processes of this test report to each other so, and the figures are printed"
)]
#![allow(
    clippy::disallowed_methods,
    reason = "random moments are waited for; children end with a code that says what they found"
)]

use std::{
    env,
    io::{self, BufRead, BufReader, Write},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

#[path = "power_cut/cluster.rs"]
mod cluster;
#[path = "power_cut/disk.rs"]
mod disk;
#[path = "power_cut/failing.rs"]
mod failing;
#[path = "power_cut/store.rs"]
mod store;
#[path = "power_cut/workload.rs"]
mod workload;

use disk::{Disk, Mounted};

const DISK_BYTES: u64 = 320 * 1024 * 1024;
/// Of three members.
const CLUSTER_DISK_BYTES: u64 = 768 * 1024 * 1024;
const KILL_EVERY: u64 = 4;
/// Exit code of a runner that could not set up its disk.
const NO_DISK: i32 = 77;
/// Exit code of a runner that found something missing.
const LOST: i32 = 78;
/// For whatever a process is to do soon.
const PATIENCE: Duration = Duration::from_secs(120);
const ROLE: &str = "METCD_POWER_CUT_ROLE";

/// Tests may not run beside each other: they would share the loop devices and, worse, the processor.
static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());

/// A generator whose sequence the seed decides.
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.draw() % bound
    }
}

/// What a process of this test is to do; handed down in one environment variable.
#[derive(Clone)]
struct Task {
    role: &'static str,
    engine: String,
    dir: PathBuf,
    seed: u64,
    /// Cuts of a runner, the acknowledged operation of a verifier.
    number: u64,
    sync: bool,
}

impl Task {
    fn from_env() -> Option<Self> {
        let text = env::var(ROLE).ok()?;
        let fields: Vec<&str> = text.split('|').collect();
        let role = ["run", "fail", "append", "verify"].into_iter().find(|role| *role == fields[0])?;
        Some(Self {
            role,
            engine: fields[1].to_owned(),
            dir: PathBuf::from(fields[2]),
            seed: fields[3].parse().ok()?,
            number: fields[4].parse().ok()?,
            sync: fields[5] == "true",
        })
    }

    /// This test binary again, with the task; `before` is put in front of it.
    fn command(&self, before: &[&str]) -> Command {
        let exe = env::current_exe().unwrap();
        let mut words: Vec<String> = before.iter().map(|word| (*word).to_owned()).collect();
        words.push(exe.to_string_lossy().into_owned());
        let mut command = Command::new(&words[0]);
        command
            .args(&words[1..])
            .args(["--exact", "task_of_a_child_process", "--nocapture", "--test-threads=1"]);
        let Self {
            role,
            engine,
            dir,
            seed,
            number,
            sync,
        } = self;
        command.env(ROLE, format!("{role}|{engine}|{}|{seed}|{number}|{sync}", dir.display()));
        command
    }
}

/// Does nothing unless the environment names a task.
#[test]
fn task_of_a_child_process() {
    let Some(task) = Task::from_env() else { return };
    if cluster::engines(&task.engine).is_some() {
        match task.role {
            "append" => cluster::append(&task.engine, &task.dir, task.seed, task.sync),
            "verify" => println!("\n{}", cluster::verify(&task.engine, &task.dir, task.seed, task.number)),
            _ => std::process::exit(run(&task)),
        }
        return;
    }
    match (task.role, store::backend(&task.engine)) {
        ("append", Some(backend)) => store::append(backend, &task.dir, task.seed, task.sync),
        ("verify", Some(backend)) => println!("\n{}", store::verify(backend, &task.dir, task.seed, task.number)),
        ("append", None) => workload::append(&task.engine, &task.dir, task.seed, task.sync),
        ("verify", None) => workload::verify(&task.engine, &task.dir, task.seed, task.number),
        ("fail", None) => std::process::exit(failing::run(&task)),
        _ => std::process::exit(run(&task)),
    }
}

/// A child that appends, and what it acknowledged.
struct Appender {
    child: Child,
    acknowledged: Arc<AtomicU64>,
    reader: Option<JoinHandle<()>>,
}

impl Appender {
    fn start(task: &Task, dir: &Path) -> Self {
        // On a disk that is to fail, its last words are no news.
        let may_say_why = task.role != "fail";
        let task = Task {
            role: "append",
            dir: dir.to_owned(),
            ..task.clone()
        };
        let mut command = task.command(&[]);
        if !may_say_why {
            command.stderr(Stdio::null());
        }
        let mut child = command.stdout(Stdio::piped()).process_group(0).spawn().unwrap();
        let acknowledged = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&acknowledged);
        let out = BufReader::new(child.stdout.take().unwrap());
        let reader = std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                if let Some(op) = line.strip_prefix("acknowledged ").and_then(|op| op.parse().ok()) {
                    counter.store(op, Ordering::SeqCst);
                }
            }
        });
        Self {
            child,
            acknowledged,
            reader: Some(reader),
        }
    }

    fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::SeqCst)
    }

    /// Waits until `op` is acknowledged, so that every cut sees new operations.
    fn wait_for(&mut self, op: u64) {
        assert!(self.reaches(op), "the appending process ended");
    }

    /// Waits until `op` is acknowledged; false if it ends before.
    fn reaches(&mut self, op: u64) -> bool {
        let deadline = Instant::now() + PATIENCE;
        while self.acknowledged() < op {
            assert!(Instant::now() < deadline, "nothing more is acknowledged");
            if self.child.try_wait().unwrap().is_some() {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }

    /// Waits for its end; false if it goes on.
    fn ends_within(&mut self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            if self.child.try_wait().unwrap().is_some() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        false
    }
}

impl Appender {
    /// Ends it, and whatever it has started.
    fn end(&mut self) {
        // Nobody hears the child when it is killed: what it started is in its process group.
        let group = format!("-{}", self.child.id());
        let _ = Command::new("kill").args(["-KILL", "--", &group]).stderr(Stdio::null()).status();
        let _ = self.child.wait();
    }

    /// Ends it; all that it acknowledged.
    fn end_and_count(mut self) -> u64 {
        self.end();
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
        self.acknowledged()
    }
}

impl Drop for Appender {
    fn drop(&mut self) {
        self.end();
    }
}

/// Printed at the end of a run.
#[derive(Debug, Default)]
struct Tally {
    cuts: u64,
    operations: u64,
    /// Everything acknowledged was there.
    whole: u64,
    /// A store that does not survive crashes was open, and noticed it.
    empty: u64,
    /// The log noticed a loss and would not open.
    refused: u64,
    /// Something was missing and nobody noticed.
    silent: u64,
    /// Whole because the journal brought back what sled had lost or never got.
    restored: u64,
    unflushed_writes: u64,
    flushes: u64,
}

impl Tally {
    fn count(&mut self, cut: u64, verdict: &str) {
        match verdict.split([' ', ':']).next() {
            Some("whole") => self.whole += 1,
            Some("empty") => self.empty += 1,
            Some("refused") => {
                self.refused += 1;
                println!("cut {cut}: {verdict}");
            }
            _ => {
                self.silent += 1;
                println!("cut {cut}: {verdict}");
            }
        }
    }
}

/// Opens the log in `dir` in a process of its own. One that dies counts as refused: the server would not have started.
fn verify(task: &Task, dir: &Path, acknowledged: u64, tally: &mut Tally) -> String {
    let task = Task {
        role: "verify",
        dir: dir.to_owned(),
        number: acknowledged,
        ..task.clone()
    };
    let output = task.command(&[]).env("RUST_BACKTRACE", "0").output().unwrap();
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    tally.restored += u64::from(out.contains("the journal brought"));
    let verdict = out
        .lines()
        .find(|line| ["whole", "empty", "refused", "silent"].iter().any(|word| line.starts_with(word)));
    let verdict = verdict.map_or_else(
        || format!("refused: the process died: {}", String::from_utf8_lossy(&output.stderr).trim()),
        str::to_owned,
    );
    if !verdict.starts_with("whole") && !verdict.starts_with("empty") {
        // What the log's engine had to say when it was opened.
        print!("{out}");
    }
    verdict
}

/// A running log on a disk. Dropped in order: the process, the mounts, the disk.
struct Live {
    appender: Appender,
    _mounted: Mounted,
    disk: Arc<Disk>,
}

impl Live {
    fn start(task: &Task, content: Vec<u8>) -> io::Result<Self> {
        let disk = Arc::new(Disk::new(content));
        let mounted = disk::mount(&disk, &task.dir)?;
        Ok(Self {
            appender: Appender::start(task, &mounted.dir.join("log")),
            _mounted: mounted,
            disk,
        })
    }
}

/// The runner: cuts the power `task.number` times. Returns its exit code: 0, [`LOST`] or [`NO_DISK`].
fn run(task: &Task) -> i32 {
    // A cluster has its ports, and cannot run twice.
    let is_cluster = cluster::engines(&task.engine).is_some();
    let (disk_bytes, kill_every, millis) = match is_cluster {
        true => (CLUSTER_DISK_BYTES, 1, 2_000),
        false => (DISK_BYTES, KILL_EVERY, 250),
    };
    let started = disk::format(disk_bytes, &task.dir).and_then(|content| Live::start(task, content));
    let mut live = match started {
        Ok(live) => live,
        Err(error) => {
            println!("no disk: {error}");
            return NO_DISK;
        }
    };
    let mut random = Random(task.seed);
    let mut tally = Tally::default();
    let mut floor = 0;
    for cut in 1..=task.number {
        live.appender.wait_for(floor + 1);
        std::thread::sleep(Duration::from_millis(random.below(millis)));
        let acknowledged = live.appender.acknowledged();
        let (image, unflushed) = live.disk.cut(&mut random);
        tally.cuts += 1;
        tally.operations += acknowledged - floor;
        tally.unflushed_writes += unflushed as u64;
        floor = acknowledged;
        if is_cluster {
            live.appender.end();
        }
        let verdict = match disk::mount_image(&image, &task.dir) {
            Ok(after) => verify(task, &after.dir.join("log"), acknowledged, &mut tally),
            Err(error) => format!("refused: the file system: {error}"),
        };
        tally.count(cut, &verdict);
        if cut % kill_every == 0 {
            let went_on = verdict.starts_with("whole") || verdict.starts_with("empty");
            floor = if verdict.starts_with("whole") { floor } else { 0 };
            let content = if went_on {
                image
            } else {
                disk::format(disk_bytes, &task.dir).unwrap()
            };
            tally.flushes += live.disk.flushes();
            drop(live);
            live = Live::start(task, content).unwrap();
        }
    }
    tally.flushes += live.disk.flushes();
    drop(live);
    println!("{}{}: {tally:?}", task.engine, if task.sync { "" } else { " without sync" });
    if tally.refused + tally.silent > 0 { LOST } else { 0 }
}

/// How a run in a mount namespace of its own ended.
#[derive(Debug, PartialEq)]
enum Outcome {
    NothingLost,
    Lost,
    NoDisk(String),
}

fn number_from_env(name: &str, default: u64) -> u64 {
    env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn cut_power(engine: &str, default_cuts: u64, sync: bool) -> Outcome {
    in_a_runner("run", engine, default_cuts, sync)
}

fn in_a_runner(role: &'static str, engine: &str, default_cuts: u64, sync: bool) -> Outcome {
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let place = tempfile::tempdir().unwrap();
    let task = Task {
        role,
        engine: engine.to_owned(),
        dir: place.path().to_owned(),
        seed: number_from_env("METCD_POWER_CUT_SEED", 1),
        number: number_from_env("METCD_POWER_CUT_CUTS", default_cuts),
        sync,
    };
    // Mounts in it vanish with the last process.
    let ran = task
        .command(&["unshare", "--mount", "--propagation", "private"])
        .stderr(Stdio::inherit())
        .output();
    let output = match ran {
        Ok(output) => output,
        Err(error) => return Outcome::NoDisk(format!("unshare: {error}")),
    };
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    print!("{out}");
    match output.status.code() {
        Some(0) => Outcome::NothingLost,
        Some(LOST) => Outcome::Lost,
        Some(NO_DISK) => Outcome::NoDisk(out),
        // unshare itself.
        Some(1) => Outcome::NoDisk("unshare is not allowed".to_owned()),
        _ => panic!("the runner ended with {}", output.status),
    }
}

fn survives(engine: &str) {
    // A cluster takes its time to start.
    let cuts = if cluster::engines(engine).is_some() { 2 } else { 8 };
    match cut_power(engine, cuts, true) {
        Outcome::NothingLost => {}
        Outcome::Lost => panic!("{engine} lost acknowledged entries; repeat with scripts/power-cut --engine {engine}"),
        Outcome::NoDisk(why) => survives_kills(engine, &why),
    }
}

/// Past the test harness, which shows nothing of a test that passes.
fn say_loudly(what: &str) {
    // A closed stderr hears nothing.
    let _ = writeln!(io::stderr(), "!!! {what}");
}

/// The weaker test for machines on which no disk can be made.
fn survives_kills(engine: &str, why: &str) {
    say_loudly(&format!(
        "NOT TESTED: POWER CUTS OF {engine}. This needs root, /dev/fuse, loop devices, mkfs.ext4 and unshare. Here: {why}\n\
         !!! Instead: kill -9, and one fdatasync or more counted for each append."
    ));
    let place = tempfile::tempdir().unwrap();
    std::fs::create_dir(place.path().join("live")).unwrap();
    let dir = place.path().join("live").join("log");
    let task = Task {
        role: "run",
        engine: engine.to_owned(),
        dir: dir.clone(),
        seed: 1,
        number: 0,
        sync: true,
    };
    let mut random = Random(task.seed);
    let mut floor = 0;
    for kill in 0..8 {
        let mut appender = Appender::start(&task, &dir);
        appender.wait_for(floor + 1 + random.below(200));
        floor = appender.acknowledged();
        drop(appender);
        let verdict = verify(&task, &dir, floor, &mut Tally::default());
        assert!(
            verdict.starts_with("whole") || verdict.starts_with("empty"),
            "kill {kill}: {verdict}"
        );
        floor = if verdict.starts_with("whole") { floor } else { 0 };
    }
    if store::backend(engine).is_some() || cluster::engines(engine).is_some() {
        return;
    }
    let mut wal = workload::open(&task.engine, &place.path().join("counted"), true).unwrap();
    for term in 1..=20 {
        let before = wal.stats().syncs;
        let hard_state = raft::eraftpb::HardState {
            term,
            ..Default::default()
        };
        wal.append(&metcd::wal::WalBatch {
            entries: Vec::new(),
            hard_state: Some(hard_state),
        })
        .unwrap();
        assert!(wal.stats().syncs > before, "an append without a sync");
    }
}

#[test]
fn sled_loses_nothing_in_a_power_cut() {
    survives("sled");
}

#[test]
fn sled_small_journal_loses_nothing_in_a_power_cut() {
    survives("sled-small-journal");
}

#[test]
fn raft_engine_loses_nothing_in_a_power_cut() {
    survives("raft-engine");
}

#[cfg(feature = "rocksdb")]
#[test]
fn rocksdb_loses_nothing_in_a_power_cut() {
    survives("rocksdb");
}

#[test]
fn store_sled_loses_nothing_in_a_power_cut() {
    survives("store-sled");
}

#[cfg(feature = "rocksdb")]
#[test]
fn store_rocksdb_loses_nothing_in_a_power_cut() {
    survives("store-rocksdb");
}

#[test]
fn cluster_sled_memory_loses_nothing_in_a_power_cut() {
    survives("cluster-sled-memory");
}

#[test]
fn cluster_raft_engine_sled_loses_nothing_in_a_power_cut() {
    survives("cluster-raft-engine-sled");
}

#[cfg(feature = "rocksdb")]
#[test]
fn cluster_rocksdb_rocksdb_loses_nothing_in_a_power_cut() {
    survives("cluster-rocksdb-rocksdb");
}

#[test]
fn sled_goes_on_after_a_failed_write_without_what_the_disk_never_got() {
    stands_on_the_disk("sled");
}

#[test]
fn sled_small_journal_goes_on_after_a_failed_write_without_what_the_disk_never_got() {
    stands_on_the_disk("sled-small-journal");
}

#[test]
fn raft_engine_goes_on_after_a_failed_write_without_what_the_disk_never_got() {
    stands_on_the_disk("raft-engine");
}

#[cfg(feature = "rocksdb")]
#[test]
fn rocksdb_goes_on_after_a_failed_write_without_what_the_disk_never_got() {
    stands_on_the_disk("rocksdb");
}

fn stands_on_the_disk(engine: &str) {
    match in_a_runner("fail", engine, 4, true) {
        Outcome::NothingLost => {}
        Outcome::Lost => panic!("{engine} went on from what only the kernel's memory held"),
        Outcome::NoDisk(why) => say_loudly(&format!("NOT TESTED: WRITES THAT FAIL, of {engine}. {why}")),
    }
}

#[test]
fn without_sync_this_test_sees_losses() {
    sees_losses("raft-engine");
}

#[test]
fn without_sync_this_test_sees_losses_of_sled() {
    sees_losses("sled");
}

#[test]
fn without_sync_this_test_sees_losses_of_a_cluster() {
    sees_losses("cluster-raft-engine-sled");
}

#[cfg(feature = "rocksdb")]
#[test]
fn without_sync_this_test_sees_losses_of_a_store() {
    sees_losses("store-rocksdb");
}

fn sees_losses(engine: &str) {
    // Of a cluster, each cut takes something; and each takes its time.
    let cuts = if cluster::engines(engine).is_some() { 2 } else { 6 };
    match cut_power(engine, cuts, false) {
        Outcome::Lost => {}
        Outcome::NothingLost => panic!("nothing was lost without a single sync: the test proves nothing"),
        Outcome::NoDisk(why) => say_loudly(&format!("NOT TESTED: whether the power-cut test sees losses. {why}")),
    }
}
