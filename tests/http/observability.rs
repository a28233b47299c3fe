//! What can be watched: metrics that dashboard, alerts and documentation agree on, and traces.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

use crate::support::Server;

fn repository(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Every word that begins with `metcd_`.
fn names_in(text: &str) -> BTreeSet<String> {
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

/// The names of all samples that these metrics have.
fn samples(metrics: &[(String, String)]) -> BTreeSet<String> {
    let of = |(name, kind): &(String, String)| match kind.as_str() {
        "histogram" => ["_bucket", "_sum", "_count"]
            .iter()
            .map(|suffix| format!("{name}{suffix}"))
            .collect(),
        _ => vec![name.clone()],
    };
    metrics.iter().flat_map(of).collect()
}

/// The texts of all `"expr"` fields.
fn expressions(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            found.extend(fields.get("expr").and_then(Value::as_str).map(str::to_owned));
            fields.values().for_each(|field| expressions(field, found));
        }
        Value::Array(elements) => elements.iter().for_each(|element| expressions(element, found)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[test]
fn dashboard_and_alerts_ask_only_for_what_there_is() {
    let there = samples(&metrics());
    let dashboard: Value = serde_json::from_str(&repository("config/grafana/metcd.json")).expect("the dashboard is JSON");
    let mut asked = Vec::new();
    expressions(&dashboard, &mut asked);
    assert!(asked.len() > 20, "{asked:?}");
    let alerts = repository("config/prometheus/alerts.yml");
    asked.push(alerts.clone());
    for text in &asked {
        let unknown: Vec<_> = names_in(text).into_iter().filter(|name| !there.contains(name)).collect();
        assert!(unknown.is_empty(), "{unknown:?} in {text}");
    }
    for alert in [
        "MetcdNoLeader",
        "MetcdSlowDisk",
        "MetcdPeerBehind",
        "MetcdDiskFull",
        "MetcdQuarantined",
    ] {
        assert!(alerts.contains(&format!("- alert: {alert}\n")), "{alert}");
    }
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

#[test]
fn metrics_follow_what_happens() {
    let server = Server::start();
    let sample = |name: &str| {
        let page = server.get("/metrics").text();
        let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{name} in {page}")).parse::<f64>().unwrap()
    };
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
