//! What can be watched: metrics that are documented and say what is so, and traces.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

use crate::support::{Server, wait_until};

pub fn repository(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Every word that begins with `metcd_`.
pub fn names_in(text: &str) -> BTreeSet<String> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    text.split(|c: char| !is_part(c))
        .filter(|word| word.starts_with("metcd_"))
        .map(str::to_owned)
        .collect()
}

/// Name and type of each metric of `GET /metrics`.
fn metrics() -> Vec<(String, String)> {
    let server = Server::start();
    let page = server.get("/metrics").text();
    let types = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    types.map(|(name, kind)| (name.to_owned(), kind.to_owned())).collect()
}

#[test]
fn every_metric_is_documented_and_nothing_else_is() {
    let there: BTreeSet<String> = metrics().into_iter().map(|(name, _)| name).collect();
    let documented = names_in(&repository("docs/metrics.md"));
    let missing: Vec<_> = there.difference(&documented).collect();
    let gone: Vec<_> = documented.difference(&there).collect();
    assert!(
        missing.is_empty() && gone.is_empty(),
        "not documented: {missing:?}; not there: {gone:?}"
    );
}

#[test]
fn the_figures_that_operators_rely_on_are_there() {
    let there: BTreeSet<String> = metrics().into_iter().map(|(name, _)| name).collect();
    for name in [
        "http_requests_total",
        "http_request_duration_seconds",
        "http_slow_requests_total",
        "proposals_pending",
        "raft_term",
        "raft_leader",
        "raft_is_leader",
        "raft_commit_index",
        "raft_applied_index",
        "raft_leader_changes_total",
        "peer_lag_entries",
        "peer_queue_messages",
        "wal_append_duration_seconds",
        "wal_sync_duration_seconds",
        "wal_bytes",
        "snapshot_duration_seconds",
        "store_bytes",
        "store_limit_bytes",
        "disk_full",
        "watchers",
        "leases",
        "idempotency_entries",
        "build_info",
    ] {
        assert!(there.contains(&format!("metcd_{name}")), "metcd_{name} in {there:?}");
    }
}

/// The value of a sample, named with its labels.
fn value_in(page: &str, name: &str) -> f64 {
    let value = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("{name} in {page}")).parse().unwrap()
}

/// What an idle member says of itself, here and there: nothing happens between the two.
#[test]
fn the_metrics_of_an_idle_member_are_what_its_status_says() {
    let server = Server::start_with(&[
        "wal.sync=true",
        "limits.max_store_bytes=64MiB",
        "raft.snapshot_entries=20",
        "raft.keep_entries=5",
    ]);
    for n in 0..25 {
        assert_eq!(server.put(&format!("/k{n}"), "x").status, 201);
    }
    let status = || {
        let mut status = server.get("/status").json();
        status["uptime_seconds"].take();
        status
    };
    let (mut page, mut told) = (String::new(), status());
    wait_until(|| {
        let before = std::mem::replace(&mut told, Value::Null);
        page = server.get("/metrics").text();
        told = status();
        let snapshots = value_in(&page, "metcd_snapshot_duration_seconds_count{kind=\"write\"}");
        before == told && told["proposals_pending"] == 0 && value_in(&page, "metcd_proposals_pending") == 0.0 && snapshots > 0.0
    });
    for (metric, pointer) in [
        ("metcd_raft_term", "/term"),
        ("metcd_raft_leader", "/leader"),
        ("metcd_raft_commit_index", "/commit_index"),
        ("metcd_raft_applied_index", "/applied_index"),
        ("metcd_raft_last_index", "/wal/last_index"),
        ("metcd_store_bytes", "/store/bytes"),
        ("metcd_store_revision", "/revision"),
        ("metcd_wal_bytes", "/wal/bytes"),
        ("metcd_wal_syncs_total", "/wal/syncs"),
    ] {
        let told = told.pointer(pointer).and_then(Value::as_f64);
        assert!(told > Some(0.0), "{pointer}: {told:?}");
        assert_eq!(Some(value_in(&page, metric)), told, "{metric}");
    }
    assert_eq!(value_in(&page, "metcd_raft_is_leader"), 1.0);
    assert_eq!(
        value_in(&page, "metcd_raft_applied_index"),
        value_in(&page, "metcd_raft_commit_index")
    );
    assert_eq!(value_in(&page, "metcd_store_limit_bytes"), f64::from(64 << 20));
    assert_eq!(value_in(&page, "metcd_disk_full"), 0.0);
    assert!(value_in(&page, "metcd_wal_sync_duration_seconds_count") >= 1.0);
    assert!(value_in(&page, "metcd_wal_append_duration_seconds_count") >= 1.0);
    // More than 20 entries and fewer than twice as many.
    assert_eq!(value_in(&page, "metcd_snapshot_duration_seconds_count{kind=\"write\"}"), 1.0);
    for kind in ["send", "install"] {
        assert_eq!(
            value_in(&page, &format!("metcd_snapshot_duration_seconds_count{{kind=\"{kind}\"}}")),
            0.0
        );
    }
}

#[test]
fn metrics_follow_what_happens() {
    let server = Server::start();
    let sample = |name: &str| value_in(&server.get("/metrics").text(), name);
    server.put("/a?ttl=10m", "x");
    assert_eq!(sample("metcd_leases"), 1.0);
    assert_eq!(
        sample(concat!(
            "metcd_build_info{version=\"",
            env!("CARGO_PKG_VERSION"),
            "\",wal=\"sled\",store=\"memory\"}"
        )),
        1.0
    );
    assert!(sample("metcd_wal_append_duration_seconds_count") >= 1.0);
    assert!(sample("metcd_apply_duration_seconds_count") >= 1.0);
    assert!(sample("metcd_wal_entry_bytes_total") > 1.0);
    assert!(sample("metcd_process_resident_bytes") > 1e6);
    server.send("PUT", "/b", &[("Idempotency-Key", "k")], b"x");
    assert_eq!(sample("metcd_idempotency_entries"), 1.0);
}

#[test]
fn a_trace_is_taken_up_or_begun_and_named_in_every_answer() {
    let server = Server::start();
    let traced = |given: &str| {
        let answer = server.send("GET", "/nothing", &[("traceparent", given)], b"");
        assert_eq!(answer.status, 404);
        answer.header("traceparent").to_owned()
    };
    let taken = traced("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
    assert!(
        taken.starts_with("00-4bf92f3577b34da6a3ce929d0e0e4736-") && taken.ends_with("-01"),
        "{taken}"
    );
    assert!(!taken.contains("00f067aa0ba902b7"), "the span is the server's own: {taken}");
    let unsampled = traced("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00");
    assert!(unsampled.ends_with("-00"), "{unsampled}");
    for bad in ["", "00-x", "00-00000000000000000000000000000000-00f067aa0ba902b7-01"] {
        let begun = traced(bad);
        assert!(begun.len() == 55 && begun.starts_with("00-") && begun.ends_with("-00"), "{begun}");
        assert!(!begun.starts_with("00-00000000000000000000000000000000"), "{begun}");
    }
    for (method, target) in [
        ("PUT", "/a"),
        ("GET", "/livez"),
        ("OPTIONS", "/a"),
        ("GET", "/%zz"),
        ("POST", "/v1/txn"),
    ] {
        assert_eq!(
            server.send(method, target, &[], b"").header("traceparent").len(),
            55,
            "{method} {target}"
        );
    }
}
