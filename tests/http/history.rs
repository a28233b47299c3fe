//! History: what is kept, what goes by itself, and what happens when the store is full.

use serde_json::{Value, json};

use crate::support::{Server, wait_until};

fn compacted(server: &Server) -> u64 {
    server.get("/status").json()["compacted_revision"].as_u64().unwrap()
}

#[test]
fn history_beyond_the_count_is_forgotten_by_itself() {
    let server = Server::start_with(&["history.retain_revisions=10"]);
    for number in 0..50 {
        server.put("/a", &number.to_string());
    }
    wait_until(|| compacted(&server) == 41);
    server.get("/a?revision=40").refused(410, "compacted");
    assert_eq!(server.get("/a?revision=41").text(), "39");
    assert_eq!(server.get("/a").text(), "49");
}

#[test]
fn history_beyond_the_time_is_forgotten_by_itself() {
    let server = Server::start_with(&["history.retain=1s"]);
    server.put("/a", "old");
    let newest = || server.put("/a", "new").revision();
    // Which revision was current when is sampled once a second, so it takes some writes until the first is old.
    wait_until(|| {
        newest();
        compacted(&server) > 2
    });
    server.get("/a?revision=2").refused(410, "compacted");
    let last = newest();
    assert_eq!(server.get(&format!("/a?revision={last}")).text(), "new");
}

#[test]
fn a_full_store_that_nobody_writes_to_has_room_again_by_itself() {
    let server = Server::start_with(&["limits.max_store_bytes=100KiB", "history.retain=2s"]);
    let value = "x".repeat(10_000);
    // All within a second or little more: the last of it is in no sample of which revision was current when.
    let refused = (0..20).map(|_| server.put("/k", &value)).find(|answer| answer.status >= 400);
    refused.expect("a refusal").refused(507, "quota_exceeded");
    let newest = server.get("/status").json()["revision"].as_u64().unwrap();
    wait_until(|| compacted(&server) == newest);
    wait_until(|| server.put("/k", &value).status == 204);
}

#[test]
fn a_full_store_takes_deletes_and_compaction_and_then_writes_again() {
    let server = Server::start_with(&["limits.max_store_bytes=100KiB"]);
    let value = "x".repeat(10_000);
    let put = |number: u32| server.put(&format!("/k{number}"), &value);
    assert_eq!(server.put("/k0", "x").status, 201);
    let keyed = |key: &str| server.send("PUT", "/k0", &[("idempotency-key", key)], value.as_bytes());
    assert_eq!(keyed("before").status, 204);
    let full = (1..20).map(put).find(|answer| answer.status != 201).expect("a refusal");
    full.refused(507, "quota_exceeded");
    assert_eq!(full.json()["outcome"], "not_applied");
    assert_eq!(server.get("/k0").text(), value);
    // A retry of what was done when there was room.
    let again = keyed("before");
    assert_eq!((again.status, again.header("idempotent-replayed")), (204, "true"));
    keyed("after").refused(507, "quota_exceeded");
    server
        .post("/v1/txn", &json!({"then": [{"put": {"key": "t", "value": "x"}}]}))
        .refused(507, "quota_exceeded");
    assert_eq!(server.delete("/k0").status, 204);
    let revision = server.delete("/v1/kv?prefix=k").revision();
    // What is deleted is still history, which can be read.
    put(0).refused(507, "quota_exceeded");
    assert_eq!(server.post("/v1/compact", &json!({"revision": revision})).status, 200);
    assert_eq!(put(0).status, 201);
}

/// What is over a limit costs the log, and with it every member and its disk, nothing.
#[test]
fn what_is_over_a_limit_is_refused_before_it_is_proposed() {
    const TIMES: u64 = 100;
    let server = Server::start_with(&["limits.max_store_bytes=100KiB", "limits.max_value_bytes=1KiB"]);
    let last_index = || server.get("/status").json()["wal"]["last_index"].as_u64().unwrap();
    let costs_nothing = |what: &str, refused: &dyn Fn(u64)| {
        let before = last_index();
        (0..TIMES).for_each(refused);
        let grown = last_index() - before;
        // The cluster has entries of its own now and then.
        assert!(grown < 10, "{TIMES} times {what}: {grown} entries");
    };
    let put = |number: u64| json!({"put": {"key": format!("t{number}"), "value": "x"}});
    costs_nothing("too many operations", &|_| {
        let puts: Vec<Value> = (0..129).map(put).collect();
        server.post("/v1/txn", &json!({"then": puts})).refused(400, "invalid_request");
    });
    costs_nothing("too many compares", &|_| {
        let compare = json!({"key": "a", "target": "version", "op": "=", "value": 0});
        let txn = json!({"compare": vec![compare; 129], "then": [put(0)]});
        server.post("/v1/txn", &txn).refused(400, "invalid_request");
    });
    costs_nothing("a value that is too large", &|_| {
        server.put("/large", &"x".repeat(1025)).refused(413, "value_too_large");
    });
    let value = "x".repeat(1024);
    costs_nothing("a value that is too large in a transaction", &|_| {
        let put = json!({"put": {"key": "t", "value": format!("{value}x")}});
        server.post("/v1/txn", &json!({"then": [put]})).refused(413, "value_too_large");
    });

    let before = last_index();
    let written = (0..200)
        .take_while(|number| server.put(&format!("/k{number}"), &value).status == 201)
        .count();
    assert!((50..200).contains(&written), "{written}");
    assert!(last_index() - before >= written as u64, "what is written does cost entries");
    costs_nothing("a put into a full store", &|number| {
        server.put(&format!("/k{number}"), &value).refused(507, "quota_exceeded");
    });
    costs_nothing("a transaction that puts into a full store", &|number| {
        server
            .post("/v1/txn", &json!({"then": [put(number)]}))
            .refused(507, "quota_exceeded");
    });
}
