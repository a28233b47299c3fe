//! Rule 5 on the real engines: syncs that the kernel answers with EIO, which strace says in its place, from some moment on.
//!
//! A failed sync ends the process, with a status and a word that say so; nobody is told that what it should have made durable is; it is not
//! tried again; and what was acknowledged before is there at the next start.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::traced::{Call, Place, Traced, calls, wait_for};

const SYNCS: [&str; 4] = ["fsync", "fdatasync", "sync_file_range", "msync"];

/// Which syncs fail.
struct Fault<'a> {
    /// Names of calls, with commas.
    calls: &'a str,
    /// In the data directory. No other file's calls are seen or counted.
    files: Vec<String>,
    /// The first one of each thread that fails, counted from 1; all later ones fail, too.
    from: u32,
}

impl Fault<'_> {
    fn options(&self, data: &Path) -> Vec<String> {
        let mut options = vec!["-e".to_owned(), format!("trace={}", SYNCS.join(","))];
        for file in &self.files {
            options.extend(["-P".to_owned(), data.join(file).display().to_string()]);
        }
        options.extend(["-e".to_owned(), format!("inject={}:error=EIO:when={}+", self.calls, self.from)]);
        options
    }
}

fn all_syncs() -> String {
    SYNCS.join(",")
}

fn files(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// Whatever number RocksDB gives it.
#[cfg(feature = "rocksdb")]
fn numbered(dir: &str, extension: &str) -> Vec<String> {
    (1..=60).map(|number| format!("{dir}/{number:06}.{extension}")).collect()
}

fn has_failed(place: &Place) -> bool {
    place.trace().contains("(INJECTED)")
}

/// Puts one key after the other; how many were acknowledged until one was not, or until `enough`.
fn put_until(traced: &Traced<'_>, value: &str, mut enough: impl FnMut() -> bool) -> usize {
    for number in 0..5_000 {
        let answer = traced.request(&format!("PUT /k{number}"), value);
        if !answer.is_some_and(|answer| answer.starts_with("HTTP/1.1 2")) {
            return number;
        }
        if enough() {
            return number + 1;
        }
    }
    panic!("no sync fails");
}

/// The call that failed first, after which nothing was tried again.
fn failed_once(place: &Place) -> PathBuf {
    let trace = place.trace();
    let calls = calls(&trace);
    let is_sync = |call: &&Call| call.is_one_of(&SYNCS);
    let failed = calls.iter().filter(is_sync).find(|call| !call.succeeded()).expect("a sync failed");
    let file = failed.file().expect("a sync is of a file");
    let later = calls
        .iter()
        .filter(is_sync)
        .find(|call| call.begun > failed.ended && call.file() == Some(file));
    assert!(later.is_none(), "{} and then {}", failed.text, later.map_or("", |call| &call.text));
    file.to_owned()
}

fn ended_and_said_why(traced: &mut Traced<'_>, place: &Place, named: &str) {
    let status = traced.ended();
    assert!(!status.success(), "{status}");
    let said = place.said();
    assert!(said.contains(named), "{said}");
}

/// A start without faults: all that was acknowledged is there.
fn holds(place: &Place, serve: &[&str], acknowledged: usize, value: &str) {
    let traced = place.start(serve, &["-e".to_owned(), "trace=none".to_owned()]);
    assert!(acknowledged > 0, "nothing was acknowledged before the fault");
    for number in 0..acknowledged {
        let answer = traced.request(&format!("GET /k{number}"), "").expect("it serves");
        assert!(
            answer.starts_with("HTTP/1.1 200") && answer.ends_with(value),
            "key {number} of {acknowledged}: {answer}"
        );
    }
}

/// The log of an engine, whose next sync fails while a client waits for it. `named` is what the last words have of it.
fn a_failed_sync_of_the_log_ends_the_member(engine: &str, files: Vec<String>, named: &str) {
    let place = Place::new();
    let fault = Fault {
        calls: &all_syncs(),
        files,
        // A start needs fewer.
        from: 20,
    };
    let serve = ["--wal", engine];
    let mut traced = place.start(&serve, &fault.options(&place.data()));
    assert!(!has_failed(&place), "it failed before it served");
    let acknowledged = put_until(&traced, "v", || {
        assert!(!has_failed(&place), "a put was acknowledged although its sync had failed");
        false
    });
    ended_and_said_why(&mut traced, &place, named);
    drop(traced);
    let file = failed_once(&place);
    println!("{engine}: {acknowledged} puts, then EIO for {}", file.display());
    holds(&place, &serve, acknowledged, "v");
}

#[test]
fn rule_5_a_failed_sync_of_sleds_journal_ends_the_member() {
    a_failed_sync_of_the_log_ends_the_member("sled", files(&["wal/journal-0", "wal/journal-1"]), "fdatasync");
}

#[test]
fn rule_5_a_failed_sync_of_raft_engine_ends_the_member() {
    let log = files(&["wal/raft-engine/0000000000000001.raftlog"]);
    a_failed_sync_of_the_log_ends_the_member("raft-engine", log, "fdatasync");
}

#[cfg(feature = "rocksdb")]
#[test]
fn rule_5_a_failed_sync_of_rocksdbs_log_ends_the_member() {
    a_failed_sync_of_the_log_ends_the_member("rocksdb", numbered("wal/rocksdb", "log"), "fdatasync");
}

/// What fails is not on the way of a put: it may be acknowledged, for its own sync was made. The member ends all the same, although nobody
/// writes any more.
fn a_failed_sync_behind_the_appends_ends_the_member(engine: &str, fault: &Fault<'_>, value: &str, named: &str) {
    let place = Place::new();
    let serve = ["--wal", engine];
    let mut traced = place.start(&serve, &fault.options(&place.data()));
    let acknowledged = put_until(&traced, value, || has_failed(&place));
    ended_and_said_why(&mut traced, &place, named);
    drop(traced);
    failed_once(&place);
    holds(&place, &serve, acknowledged, value);
}

#[test]
fn rule_5_a_failed_sync_of_the_fence_ends_the_member() {
    let fault = Fault {
        calls: "fdatasync",
        files: files(&["wal/fence"]),
        from: 4,
    };
    a_failed_sync_behind_the_appends_ends_the_member("raft-engine", &fault, "v", "the fence cannot be written");
}

#[test]
fn rule_5_a_failed_sync_of_what_sled_is_given_ends_the_member() {
    let fault = Fault {
        calls: "fdatasync",
        files: files(&["wal/sled/db"]),
        from: 3,
    };
    a_failed_sync_behind_the_appends_ends_the_member("sled", &fault, &"x".repeat(60_000), "sled took no more entries");
}

#[test]
fn rule_5_a_failed_sync_of_a_segment_ends_the_member() {
    let fault = Fault {
        calls: "fdatasync",
        files: files(&["wal/segments/0000000000000001"]),
        from: 1,
    };
    a_failed_sync_behind_the_appends_ends_the_member("sled", &fault, &"x".repeat(60_000), "sled took no more entries");
}

fn fdatasyncs_of(place: &Place, name: &str) -> usize {
    let file = place.data().join(name);
    let trace = place.trace();
    let calls = calls(&trace);
    let of_file = calls
        .iter()
        .filter(|call| call.is_one_of(&["fdatasync"]) && call.file() == Some(&file));
    of_file.count()
}

fn put(traced: &Traced<'_>, number: usize, value: &str) {
    let answer = traced.request(&format!("PUT /k{number}"), value).expect("it answers");
    assert!(answer.starts_with("HTTP/1.1 2"), "{answer}");
}

/// What is synced last is synced when everything has been acknowledged; without it nothing is lost, but a later loss may not be noticed.
fn a_stop_says_that_its_last_sync_failed(place: &Place, serve: &[&str], traced: &mut Traced<'_>, puts: usize, value: &str, named: &str) {
    traced.signal("TERM");
    ended_and_said_why(traced, place, named);
    assert!(has_failed(place));
    failed_once(place);
    holds(place, serve, puts, value);
}

#[test]
fn rule_5_a_stop_whose_last_sync_of_the_fence_failed_says_so() {
    const FROM: u32 = 12;
    let place = Place::new();
    let fault = Fault {
        calls: "fdatasync",
        files: files(&["wal/fence"]),
        from: FROM,
    };
    let serve = ["--wal", "raft-engine"];
    let mut traced = place.start(&serve, &fault.options(&place.data()));
    let mut puts = 0;
    loop {
        let before = fdatasyncs_of(&place, "wal/fence");
        if before + 1 >= FROM as usize {
            break;
        }
        put(&traced, puts, "v");
        puts += 1;
        wait_for("a put raises the fence", || {
            (fdatasyncs_of(&place, "wal/fence") > before).then_some(())
        });
    }
    assert!(!has_failed(&place));
    // The fence follows within 50 ms, or at the end if that is sooner.
    put(&traced, puts, "v");
    a_stop_says_that_its_last_sync_failed(&place, &serve, &mut traced, puts + 1, "v", "the fence cannot be written");
}

/// The keeper begins when 64 blocks of the journal wait and puts as many. Three times that makes two checkpoints; the rest waits for the end.
#[test]
fn rule_5_a_stop_whose_last_sync_of_sleds_file_failed_says_so() {
    let place = Place::new();
    let fault = Fault {
        calls: "fdatasync",
        files: files(&["wal/sled/db"]),
        // Of the keeper's; the start makes one, on a thread of its own.
        from: 3,
    };
    let serve = ["--wal", "sled"];
    let mut traced = place.start(&serve, &fault.options(&place.data()));
    // A block each, and small enough for sled itself.
    let value = "x".repeat(800);
    let puts = 200;
    for number in 0..puts {
        put(&traced, number, &value);
    }
    let deadline = Instant::now() + Duration::from_secs(30);
    while fdatasyncs_of(&place, "wal/sled/db") < 1 + 2 {
        assert!(Instant::now() < deadline, "the keeper does not begin");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(!has_failed(&place), "it fails at the end only");
    a_stop_says_that_its_last_sync_failed(&place, &serve, &mut traced, puts, &value, "sled took no more entries");
}

#[cfg(feature = "rocksdb")]
#[test]
fn rule_5_a_failed_sync_of_rocksdb_as_the_store_ends_the_member() {
    let place = Place::new();
    let fault = Fault {
        // RocksDB asks of each file whether it has sync_file_range, and does without.
        calls: "fsync,fdatasync",
        files: numbered("store/rocksdb-1", "sst"),
        // The first start makes one.
        from: 2,
    };
    let serve = ["--store", "rocksdb", "--set", "raft.snapshot_entries=20"];
    let mut traced = place.start(&serve, &fault.options(&place.data()));
    assert!(!has_failed(&place), "it failed before it served");
    let acknowledged = put_until(&traced, "v", || has_failed(&place));
    ended_and_said_why(&mut traced, &place, ".sst");
    drop(traced);
    failed_once(&place);
    holds(&place, &serve, acknowledged, "v");
}

/// It is synced at an orderly end only. What sled itself syncs after that when it is dropped is of no account: without its mark of an orderly
/// end the store is discarded at the next start.
#[test]
fn rule_5_a_stop_whose_sync_of_the_sled_store_failed_is_no_orderly_end() {
    let place = Place::new();
    let fault = Fault {
        calls: "fdatasync",
        files: files(&["store/sled-1/db"]),
        from: 1,
    };
    let serve = ["--store", "sled"];
    let mut traced = place.start(&serve, &fault.options(&place.data()));
    let mut puts = 0;
    let acknowledged = put_until(&traced, "v", || {
        puts += 1;
        puts == 20
    });
    assert!(!has_failed(&place) && acknowledged == 20, "it is synced before the end");
    traced.signal("TERM");
    ended_and_said_why(&mut traced, &place, "store/sled-1/db");
    assert!(has_failed(&place));
    drop(traced);
    assert!(!place.data().join("store/CLEAN").exists());
    holds(&place, &serve, acknowledged, "v");
}
