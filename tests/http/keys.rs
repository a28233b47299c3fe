//! Section 2: one key.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::{Server, wait_until};

const JSON: (&str, &str) = ("Accept", "application/json");

#[test]
fn put_get_head_delete() {
    let server = Server::start();
    let created = server.put("/a", "one");
    assert_eq!((created.status, created.header("etag"), created.revision()), (201, "\"2\"", 2));
    let replaced = server.put("/v1/kv/a", "");
    assert_eq!((replaced.status, replaced.header("etag"), replaced.revision()), (204, "\"3\"", 3));
    server.put("/a", "three");
    let got = server.get("/a");
    assert_eq!(
        (got.status, got.text().as_str(), got.header("etag"), got.revision()),
        (200, "three", "\"4\"", 4)
    );
    assert_eq!(
        (got.header("content-type"), got.header("vary")),
        ("application/octet-stream", "Accept")
    );
    let head = server.send("HEAD", "/a", &[], b"");
    assert_eq!(
        (head.status, head.header("content-length"), head.header("etag"), head.body.len()),
        (200, "5", "\"4\"", 0)
    );
    let object = server.send("GET", "/a", &[JSON], b"");
    assert_eq!(object.header("etag"), "\"4-json\"");
    assert_eq!(
        object.json(),
        json!({"key": "a", "value": "three", "create_revision": 2, "mod_revision": 4, "version": 3})
    );
    let gone = server.delete("/a");
    assert_eq!((gone.status, gone.revision()), (204, 5));
    let again = server.delete("/a");
    again.refused(404, "not_found");
    assert_eq!(again.revision(), 5);
    server.get("/a").refused(404, "not_found");
    assert_eq!(server.send("HEAD", "/a", &[], b"").status, 404);
}

#[test]
fn bytes_that_are_not_text_come_as_base64_in_json() {
    let server = Server::start();
    server.send("PUT", "/%ff", &[], b"\0\xfe");
    let object = server.send("GET", "/%ff", &[JSON], b"").json();
    assert_eq!((&object["key_base64"], &object["value_base64"]), (&json!("/w=="), &json!("AP4=")));
    assert!(object.get("key").is_none() && object.get("value").is_none());
}

#[test]
fn conditions_are_decided_at_apply_and_leave_everything_as_it_was() {
    let server = Server::start();
    let put = |name, tag| server.send("PUT", "/a", &[(name, tag)], b"x");
    put("If-Match", "*").refused(412, "precondition_failed");
    assert_eq!(put("If-None-Match", "*").status, 201);
    let failed = put("If-None-Match", "*");
    failed.refused(412, "precondition_failed");
    assert_eq!(
        (failed.header("etag"), failed.json()["outcome"].as_str(), failed.revision()),
        ("\"2\"", Some("not_applied"), 2)
    );
    put("If-Match", "\"9\"").refused(412, "precondition_failed");
    put("If-Match", "W/\"2\"").refused(412, "precondition_failed");
    assert_eq!(put("If-Match", "\"9\", \"2-json\"").status, 204);
    put("If-Match", "3").refused(400, "invalid_request");
    let delete = |tag| server.send("DELETE", "/a", &[("If-Match", tag)], b"");
    delete("\"2\"").refused(412, "precondition_failed");
    assert_eq!(delete("\"3\"").status, 204);
}

#[test]
fn a_delete_takes_if_none_match_as_a_put_does() {
    let server = Server::start();
    let delete = |tag| server.send("DELETE", "/a", &[("If-None-Match", tag)], b"");
    // Nothing is there, as it asks for; and then there is nothing to delete.
    delete("*").refused(404, "not_found");
    server.put("/a", "x");
    for tag in ["*", "\"2\"", "\"2-json\"", "W/\"2\"", "\"9\", \"2\""] {
        let failed = delete(tag);
        failed.refused(412, "precondition_failed");
        assert_eq!((failed.header("etag"), failed.revision()), ("\"2\"", 2), "{tag}");
    }
    assert_eq!(server.get("/a").text(), "x");
    assert_eq!(delete("\"9\"").status, 204);
    server.get("/a").refused(404, "not_found");
}

#[test]
fn conditional_gets_accept_both_forms_and_lists() {
    let server = Server::start();
    server.put("/a", "x");
    for tags in ["\"2\"", "\"2-json\"", "W/\"2\"", "\"8\", \"2\"", "*"] {
        let answer = server.send("GET", "/a", &[("If-None-Match", tags)], b"");
        assert_eq!((answer.status, answer.header("etag")), (304, "\"2\""), "{tags}");
    }
    assert_eq!(server.send("GET", "/a", &[("If-None-Match", "\"3\"")], b"").status, 200);
    server
        .send("GET", "/a", &[("If-Match", "\"3\"")], b"")
        .refused(412, "precondition_failed");
}

#[test]
fn prev_answers_with_the_key_as_it_was() {
    let server = Server::start();
    assert_eq!(server.put("/a?prev=true", "one").json(), json!({"revision": 2, "prev": null}));
    let second = server.put("/a?prev=true", "two");
    assert_eq!((second.status, &second.json()["prev"]["value"]), (200, &json!("one")));
    let deleted = server.delete("/a?prev=true").json();
    assert_eq!((&deleted["revision"], &deleted["prev"]["value"]), (&json!(4), &json!("two")));
}

#[test]
fn the_past_can_be_read_until_it_is_compacted() {
    let server = Server::start();
    server.put("/a", "one");
    server.put("/a", "two");
    let past = server.get("/a?revision=2");
    assert_eq!((past.text().as_str(), past.revision()), ("one", 2));
    server.get("/a?revision=9").refused(400, "future_revision");
    assert_eq!(
        server.post("/v1/compact", &json!({"revision": 3})).json(),
        json!({"revision": 3, "compacted_revision": 3})
    );
    let gone = server.get("/a?revision=2");
    gone.refused(410, "compacted");
    assert_eq!(gone.json()["compacted_revision"], 3);
    server.post("/v1/compact", &json!({"revision": 9})).refused(400, "future_revision");
}

#[test]
fn wait_blocks_until_the_key_is_no_longer_where_it_was() {
    let server = Server::start();
    server.put("/a", "one");
    let at_2 = [("If-None-Match", "\"2\"")];
    let begun = Instant::now();
    let unchanged = server.send("GET", "/a?wait=200ms", &at_2, b"");
    assert_eq!((unchanged.status, unchanged.header("etag")), (304, "\"2\""));
    assert!(begun.elapsed().as_millis() >= 200);
    let waiting = server.begin("GET", "/a?wait=20s", &at_2, b"");
    server.put("/a", "two");
    let changed = waiting.finish(false);
    assert_eq!((changed.status, changed.text().as_str()), (200, "two"));
    // Already elsewhere: at once.
    assert_eq!(server.send("GET", "/a?wait=20s", &at_2, b"").text(), "two");
    let waiting = server.begin("GET", "/a?wait=20s", &[("If-None-Match", "\"3\"")], b"");
    server.delete("/a");
    waiting.finish(false).refused(404, "not_found");
    server.get("/a?wait=11m").refused(400, "invalid_request");
    server.get("/a?wait=1s&revision=2").refused(400, "invalid_request");
}

#[test]
fn an_idempotency_key_gets_the_first_answer_again() {
    let server = Server::start();
    let put = |target, body: &[u8]| server.send("PUT", target, &[("Idempotency-Key", "k1")], body);
    let first = put("/a", b"one");
    assert_eq!((first.status, first.header("idempotent-replayed")), (201, ""));
    server.put("/a", "two");
    // The other form of the URL and another timeout are the same request.
    let again = put("/v1/kv/a?timeout=9s", b"one");
    assert_eq!(
        (again.status, again.header("idempotent-replayed"), again.header("etag")),
        (201, "true", "\"2\"")
    );
    assert_eq!(server.get("/a").text(), "two");
    for (target, body) in [("/a", "other"), ("/b", "one"), ("/a?prev=true", "one")] {
        put(target, body.as_bytes()).refused(422, "idempotency_key_reused");
    }
    let delete = || server.send("DELETE", "/none", &[("Idempotency-Key", "k2")], b"");
    delete().refused(404, "not_found");
    server.put("/none", "x");
    let replayed = delete();
    replayed.refused(404, "not_found");
    assert_eq!(replayed.header("idempotent-replayed"), "true");
    for bad in ["", &"k".repeat(65), "\u{e9}"] {
        server
            .send("PUT", "/a", &[("Idempotency-Key", bad)], b"")
            .refused(400, "invalid_request");
    }
}

/// Method, target and conditions of a request without a body.
type Asked<'a> = (&'a str, &'a str, &'a [(&'a str, &'a str)]);

#[test]
fn an_idempotency_key_is_bound_to_method_conditions_and_parameters() {
    let server = Server::start();
    let leases = [(); 2].map(|()| {
        let granted = server.post("/v1/leases", &json!({"ttl": 600})).json();
        format!("/l?lease={}", granted["id"].as_str().unwrap())
    });
    let send = |key: &str, (method, target, condition): Asked<'_>| {
        let headers: Vec<(&str, &str)> = condition.iter().copied().chain([("Idempotency-Key", key)]).collect();
        server.send(method, target, &headers, b"")
    };
    let none: &[(&str, &str)] = &[];
    let (exists, is_2): (&[_], &[_]) = (&[("If-Match", "*")], &[("If-Match", "\"2\"")]);
    let (is_3, is_new): (&[_], &[_]) = (&[("If-Match", "\"3\"")], &[("If-None-Match", "*")]);
    let is_not_2: &[_] = &[("If-None-Match", "\"2\"")];
    let both: &[_] = &[("If-Match", "\"2\""), ("If-None-Match", "\"9\"")];
    // The first of each line is answered and remembered; each of the others, under its key, is another request. No body tells them apart.
    let lines: [Vec<Asked<'_>>; 5] = [
        vec![
            ("PUT", "/a", none),
            ("DELETE", "/a", none),
            ("PUT", "/a", exists),
            ("PUT", "/a", is_2),
            ("PUT", "/a", is_new),
            ("PUT", "/a", is_not_2),
            ("PUT", "/a?prev=true", none),
            ("PUT", "/a?ttl=10m", none),
            ("PUT", "/a?lease=1", none),
        ],
        vec![
            ("PUT", "/a", is_2),
            ("PUT", "/a", none),
            ("PUT", "/a", exists),
            ("PUT", "/a", is_3),
            ("PUT", "/a", is_not_2),
            ("PUT", "/a", both),
            ("DELETE", "/a", is_2),
        ],
        vec![
            ("PUT", "/t?ttl=10m", none),
            ("PUT", "/t", none),
            ("PUT", "/t?ttl=20m", none),
            ("PUT", "/t?ttl=10m&prev=true", none),
        ],
        vec![("PUT", &leases[0], none), ("PUT", "/l", none), ("PUT", &leases[1], none)],
        vec![("DELETE", "/t", none), ("DELETE", "/t?prev=true", none), ("PUT", "/t", none)],
    ];
    for (number, line) in lines.iter().enumerate() {
        let key = format!("line {number}");
        let first = send(&key, line[0]);
        assert!(first.status < 300, "{:?}: {first:?}", line[0]);
        for &another in &line[1..] {
            let refused = send(&key, another);
            refused.refused(422, "idempotency_key_reused");
            assert_eq!(
                (refused.header("idempotent-replayed"), refused.revision()),
                ("", first.revision()),
                "{another:?}"
            );
        }
        // How long a client waits is not what it asks for.
        let (method, target, condition) = line[0];
        let separator = if target.contains('?') { '&' } else { '?' };
        let again = send(&key, (method, &format!("{target}{separator}timeout=9s"), condition));
        assert_eq!(
            (again.status, again.header("idempotent-replayed"), again.revision()),
            (first.status, "true", first.revision()),
            "{method} {target}"
        );
    }
}

#[test]
fn serializable_reads_wait_for_the_revision_they_are_given() {
    let server = Server::start();
    let revision = server.put("/a", "x").revision();
    assert_eq!(
        server.get(&format!("/a?consistency=serializable&min_revision={revision}")).text(),
        "x"
    );
    server
        .get("/a?consistency=serializable&min_revision=99&timeout=100ms")
        .refused(504, "timeout");
    server.get("/a?consistency=eventual").refused(400, "invalid_request");
}

#[test]
fn a_wait_without_a_tag_waits_for_the_next_change() {
    let server = Server::start();
    server.put("/a", "one");
    let unchanged = server.get("/a?wait=100ms");
    assert_eq!((unchanged.status, unchanged.header("etag")), (304, "\"2\""));
    let watching = || server.get("/status").json()["watchers"] == 1;
    let waiting = server.begin("GET", "/a?wait=20s", &[], b"");
    wait_until(watching);
    server.put("/b", "another key");
    server.put("/a", "two");
    let changed = waiting.finish(false);
    assert_eq!(
        (changed.status, changed.text().as_str(), changed.header("etag")),
        (200, "two", "\"4\"")
    );
}

#[test]
fn a_key_with_a_ttl_takes_its_lease_along_and_a_put_that_fails_leaves_none() {
    let server = Server::start();
    let leases = || server.get("/v1/leases").json()["leases"].as_array().unwrap().len();
    server.put("/a?ttl=60s", "x");
    assert_eq!(leases(), 1);
    server
        .send("PUT", "/a?ttl=60s", &[("If-None-Match", "*")], b"y")
        .refused(412, "precondition_failed");
    assert_eq!(leases(), 1);
    // Rewritten with another ttl: one lease again, not two.
    server.put("/a?ttl=90s", "y");
    assert_eq!(leases(), 1);
    let shared = server.post("/v1/leases", &json!({"ttl": 60})).json()["id"]
        .as_str()
        .unwrap()
        .to_owned();
    server.put(&format!("/a?lease={shared}"), "z");
    assert_eq!(leases(), 1);
    server.put("/b?ttl=60s", "x");
    server.delete("/b");
    assert_eq!(leases(), 1);
    // A lease that was attached stays when its key goes.
    server.delete("/a");
    assert_eq!(server.get("/v1/leases").json()["leases"], json!([{"id": shared, "ttl": 60}]));
}

#[test]
fn every_mutation_takes_an_idempotency_key_and_what_was_decided_is_recorded() {
    let server = Server::start();
    let send = |method, target, key, body: &str| server.send(method, target, &[("Idempotency-Key", key)], body.as_bytes());
    let twice = |method, target, key, body: &str| {
        let (first, again) = (send(method, target, key, body), send(method, target, key, body));
        assert_eq!(
            (again.status, &again.body, again.header("idempotent-replayed")),
            (first.status, &first.body, "true")
        );
        first
    };
    let txn = json!({"then": [{"put": {"key": "a", "value": "1"}}]}).to_string();
    assert_eq!(twice("POST", "/v1/txn", "txn", &txn).status, 200);
    assert_eq!(server.get("/a").header("etag"), "\"2\"");
    assert_eq!(twice("POST", "/v1/leases", "grant", r#"{"ttl":60}"#).status, 201);
    assert_eq!(server.get("/v1/leases").json()["leases"].as_array().unwrap().len(), 1);
    assert_eq!(twice("PUT", "/b?prev=true", "prev", "x").json()["prev"], json!(null));
    assert_eq!(twice("DELETE", "/v1/kv?prefix=b", "range", "").json()["deleted"], 1);
    let conditional = || server.send("PUT", "/a", &[("Idempotency-Key", "412"), ("If-None-Match", "*")], b"x");
    conditional().refused(412, "precondition_failed");
    server.delete("/a");
    let replayed = conditional();
    replayed.refused(412, "precondition_failed");
    assert_eq!(replayed.header("idempotent-replayed"), "true");
    // Refused before it was decided: not recorded, and the key is free.
    send("PUT", "/c?ttl=1x", "refused", "x").refused(400, "invalid_request");
    assert_eq!(send("PUT", "/c", "refused", "x").status, 201);
}

#[test]
fn a_full_table_of_idempotency_keys_refuses_new_ones_and_forgets_none_early() {
    let server = Server::start_with(&["idempotency.max_entries=2"]);
    let put = |key| server.send("PUT", "/a", &[("Idempotency-Key", key)], b"x");
    assert_eq!((put("one").status, put("two").status), (201, 204));
    let full = put("three");
    full.refused(429, "overloaded");
    assert_eq!(
        (full.json()["outcome"].as_str(), full.header("retry-after")),
        (Some("not_applied"), "1")
    );
    assert_eq!(put("one").header("idempotent-replayed"), "true");
    assert_eq!(server.put("/a", "y").status, 204);
}

#[test]
fn an_idempotency_key_is_free_again_after_its_time_and_not_before() {
    let server = Server::start_with(&["idempotency.retain=4s"]);
    let entries = || {
        let metrics = server.get("/metrics").text();
        let value = metrics.lines().find_map(|line| line.strip_prefix("metcd_idempotency_entries "));
        value.expect("the metric").to_owned()
    };
    let put = |body: &[u8]| server.send("PUT", "/a", &[("Idempotency-Key", "k")], body);
    let begun = Instant::now();
    assert_eq!(put(b"one").status, 201);
    wait_until(|| {
        let again = put(b"one");
        assert_eq!((again.status, again.header("idempotent-replayed")), (201, "true"));
        begun.elapsed() >= Duration::from_secs(2)
    });
    put(b"two").refused(422, "idempotency_key_reused");
    assert_eq!(entries(), "1");
    wait_until(|| entries() == "0");
    let fresh = put(b"two");
    assert_eq!((fresh.status, fresh.header("idempotent-replayed")), (204, ""));
    assert_eq!(server.get("/a").text(), "two");
    assert_eq!(entries(), "1", "and is remembered anew");
}

#[test]
fn a_wait_goes_on_while_the_condition_names_the_key_and_ends_at_once_where_if_match_fails() {
    let server = Server::start();
    server.put("/a", "1");
    server.put("/a", "2");
    let failed = server.send("GET", "/a?wait=30s", &[("If-Match", "\"2\"")], b"");
    failed.refused(412, "precondition_failed");
    let waited = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| server.send("GET", "/a?wait=30s", &[("If-None-Match", "*")], b""));
        wait_until(|| server.get("/status").json()["watchers"] == 1);
        // Still what `*` names: no reason to answer.
        server.put("/a", "3");
        server.delete("/a");
        waiting.join().unwrap()
    });
    waited.refused(404, "not_found");
    assert_eq!(waited.revision(), 5);
}
