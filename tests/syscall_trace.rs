//! What the kernel saw: between the receipt of a PUT and the first byte of its answer lies an fdatasync of the log, begun and ended. A sync
//! that fails ends the process (`failing_sync`), and what is created or renamed is durable by name (`durable_names`).
//!
//! Needs strace, and leave to trace: where either is missing this fails and says what to do.

#![allow(clippy::print_stdout, reason = "what was seen is worth reading")]
#![allow(
    clippy::disallowed_methods,
    reason = "no runtime here: a condition is looked at again after a moment, until a deadline"
)]

use std::collections::BTreeMap;
use std::path::Path;

#[path = "syscall_trace/durable_names.rs"]
mod durable_names;
#[path = "syscall_trace/failing_sync.rs"]
mod failing_sync;
#[path = "syscall_trace/traced.rs"]
mod traced;

use traced::{Call, Line, Place, calls, parse};

const CALLS: &str = "trace=fsync,fdatasync,read,readv,recvfrom,recvmsg,write,writev,sendto,sendmsg";

/// Whether the request was read, then a sync of a file below `wal` began and ended well, then the answer was written, in this order.
fn synced_between(trace: &str, wal: &Path, request: &str, answer: &str) -> Result<String, String> {
    let wal = wal.display().to_string();
    let is_sync = |call: &str| (call.starts_with("fdatasync(") || call.starts_with("fsync(")) && call.contains(&wal);
    let mut lines = trace.lines().filter_map(parse);
    let was_read = lines.any(|(_, line)| match line {
        Line::Whole(call) => call.contains(request) && !call.starts_with("write"),
        // The content stands where the call ends.
        Line::Ends(call) => call.contains(request),
        Line::Begins(_) => false,
    });
    if !was_read {
        return Err(format!("{request:?} was never read"));
    }
    let mut begun: BTreeMap<&str, &str> = BTreeMap::new();
    let mut synced = None;
    for (thread, line) in lines {
        match line {
            Line::Whole(call) if is_sync(call) && call.ends_with("= 0") => synced = Some(call.to_owned()),
            Line::Begins(call) if is_sync(call) => drop(begun.insert(thread, call)),
            Line::Ends(call) => {
                if let Some(sync) = begun.remove(thread)
                    && call.ends_with("= 0")
                {
                    synced = Some(sync.to_owned());
                }
            }
            Line::Whole(call) | Line::Begins(call) if call.contains(answer) => {
                return synced.ok_or_else(|| format!("{answer:?} left before a sync of the log had ended"));
            }
            Line::Whole(_) | Line::Begins(_) => {}
        }
    }
    Err(format!("{answer:?} was never written"))
}

fn a_put_is_answered_after_its_sync(engine: &str) {
    let place = Place::new();
    let traced = place.start(&["--wal", engine], &["-e".to_owned(), CALLS.to_owned()]);
    let wal = place.data().join("wal");
    for number in 0..5 {
        let line = format!("PUT /traced-{number}");
        let answer = traced.request(&line, "").unwrap();
        assert!(answer.starts_with("HTTP/1.1 201"), "{answer}");
        let trace = place.trace();
        // Whatever follows the last answer is not written yet; this answer is, for it was read.
        match synced_between(&trace, &wal, &line, "HTTP/1.1 201") {
            Ok(sync) => println!("{engine}: {line}: {sync}"),
            Err(fault) => panic!("{engine}: {fault}\n{}", trace.lines().rev().take(60).collect::<Vec<_>>().join("\n")),
        }
    }
}

#[test]
fn sled_syncs_between_receipt_and_answer_of_a_put() {
    a_put_is_answered_after_its_sync("sled");
}

#[test]
fn sleds_journal_goes_past_the_page_cache_where_the_file_system_allows_it() {
    let place = Place::new();
    let halves = ["journal-0", "journal-1"].map(|name| place.data().join("wal").join(name));
    let mut strace = vec!["-e".to_owned(), "trace=openat".to_owned()];
    strace.extend(halves.iter().flat_map(|half| ["-P".to_owned(), half.display().to_string()]));
    drop(place.start(&["--wal", "sled"], &strace));
    let trace = place.trace();
    for half in &halves {
        let opened: Vec<Call> = calls(&trace)
            .into_iter()
            .filter(|call| call.paths().contains(&half.as_path()))
            .collect();
        let written = opened
            .iter()
            .rfind(|call| call.text.contains("O_RDWR"))
            .expect("it is opened to be written");
        let is_refused = opened
            .iter()
            .any(|call| call.text.contains("O_DIRECT") && call.text.contains("EINVAL"));
        assert!(written.text.contains("O_DIRECT") || is_refused, "{trace}");
    }
}

#[test]
fn raft_engine_syncs_between_receipt_and_answer_of_a_put() {
    a_put_is_answered_after_its_sync("raft-engine");
}

#[cfg(feature = "rocksdb")]
#[test]
fn rocksdb_syncs_between_receipt_and_answer_of_a_put() {
    a_put_is_answered_after_its_sync("rocksdb");
}

#[test]
fn this_test_notices_a_sync_that_is_missing_or_late() {
    let wal = Path::new("/d/wal");
    let read = "7 recvfrom(9<socket:[1]>, \"PUT /k HTTP/1.1\", 8192) = 20\n";
    let answer = "7 writev(9<socket:[1]>, [{iov_base=\"HTTP/1.1 201 Created\"}], 1) = 50\n";
    let sync = "8 fdatasync(5</d/wal/journal-0>) = 0\n";
    let between = |parts: &[&str]| synced_between(&parts.concat(), wal, "PUT /k", "HTTP/1.1 201").is_ok();
    assert!(between(&[read, sync, answer]));
    assert!(!between(&[sync, read, answer]), "the sync of somebody else");
    assert!(!between(&[read, answer, sync]), "too late");
    assert!(!between(&[read, "8 fdatasync(5</d/store/db>) = 0\n", answer]), "another file");
    assert!(
        !between(&[read, "8 fdatasync(5</d/wal/journal-0>) = -1 EIO\n", answer]),
        "a sync that failed"
    );
    let (begins, ends) = ("8 fdatasync(5</d/wal/x> <unfinished ...>\n", "8 <... fdatasync resumed>) = 0\n");
    assert!(between(&[read, begins, ends, answer]));
    assert!(!between(&[begins, read, ends, answer]), "begun before the request came");
    assert!(!between(&[read, begins, answer, ends]), "not ended when the answer left");
}
