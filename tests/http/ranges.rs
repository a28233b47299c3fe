//! Section 3: lists, streams, range deletes, transactions.

use serde_json::{Value, json};

use crate::support::{Answer, Server};

const NDJSON: (&str, &str) = ("Accept", "application/x-ndjson");

fn filled(keys: u32) -> Server {
    let server = Server::start();
    for key in 0..keys {
        server.put(&format!("/p/{key}"), &format!("v{key}"));
    }
    server
}

fn keys(answer: &Answer) -> Vec<String> {
    let page = answer.json();
    page["kvs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|kv| kv["key"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn pages_are_of_one_revision_and_their_tokens_of_one_query() {
    let server = filled(5);
    let first = server.get("/v1/kv?prefix=p/&limit=2");
    assert_eq!(keys(&first), ["p/0", "p/1"]);
    let (page, revision) = (first.json(), first.revision());
    assert_eq!(
        (&page["revision"], &page["count"], &page["more"]),
        (&json!(revision), &json!(5), &json!(true))
    );
    let next = page["next"].as_str().unwrap();
    assert_eq!(
        first.header("link"),
        format!("</v1/kv?prefix=p/&limit=2&after={next}>; rel=\"next\"")
    );
    // What happens between two pages does not show.
    server.put("/p/2", "changed");
    server.put("/p/20", "new");
    server.delete("/p/3");
    let second = server.get(&format!("/v1/kv?prefix=p/&limit=9&after={next}"));
    assert_eq!(keys(&second), ["p/2", "p/3", "p/4"]);
    let page = second.json();
    assert_eq!(
        (&page["revision"], &page["count"], &page["more"], &page["next"]),
        (&json!(revision), &json!(5), &json!(false), &Value::Null)
    );
    assert_eq!(page["kvs"][0]["value"], "v2");
    server
        .get(&format!("/v1/kv?prefix=q/&after={next}"))
        .refused(400, "invalid_request");
    server
        .get(&format!("/v1/kv?prefix=p/&order=desc&after={next}"))
        .refused(400, "invalid_request");
    server.get("/v1/kv?prefix=p/&after=rubbish").refused(400, "invalid_request");
    let now = server.get("/a").revision();
    server.post("/v1/compact", &json!({"revision": now}));
    server.get(&format!("/v1/kv?prefix=p/&after={next}")).refused(410, "compacted");
}

#[test]
fn ranges_orders_and_parts() {
    let server = filled(4);
    assert_eq!(keys(&server.get("/v1/kv")).len(), 4);
    assert_eq!(keys(&server.get("/v1/kv?prefix=")).len(), 4);
    assert_eq!(keys(&server.get("/v1/kv?start=p/1&end=p/3")), ["p/1", "p/2"]);
    assert_eq!(keys(&server.get("/v1/kv?start=p/2")), ["p/2", "p/3"]);
    assert_eq!(keys(&server.get("/v1/kv?prefix=p/&order=desc&limit=2")), ["p/3", "p/2"]);
    assert_eq!(keys(&server.get("/v1/kv?prefix=p/&revision=3")), ["p/0", "p/1"]);
    let only_keys = server.get("/v1/kv?prefix=p/&keys_only=true&limit=1").json();
    assert!(only_keys["kvs"][0].get("value").is_none() && only_keys["kvs"][0]["mod_revision"] == 2);
    let counted = server.get("/v1/kv?prefix=p/&count_only=true").json();
    assert_eq!((&counted["kvs"], &counted["count"]), (&json!([]), &json!(4)));
    for bad in ["prefix=p&start=p", "limit=0", "limit=10001", "order=up", "revision=0"] {
        server.get(&format!("/v1/kv?{bad}")).refused(400, "invalid_request");
    }
}

#[test]
fn a_stream_holds_the_whole_range_and_says_when_it_is_complete() {
    let server = filled(3);
    let streamed = server.send("GET", "/v1/kv?prefix=p/", &[NDJSON], b"");
    assert_eq!((streamed.header("content-type"), streamed.revision()), ("application/x-ndjson", 4));
    let text = streamed.text();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(
        (lines.len(), &lines[2]["value"], &lines[3]),
        (4, &json!("v2"), &json!({"end": true, "count": 3}))
    );
    server
        .send("GET", "/v1/kv?revision=99", &[NDJSON], b"")
        .refused(400, "future_revision");
}

#[test]
fn a_large_stream_is_whole_and_of_one_revision() {
    let server = Server::start();
    let value = "x".repeat(1000);
    for batch in 0..12 {
        let puts: Vec<Value> = (0..100)
            .map(|at| json!({"put": {"key": format!("{batch:02}-{at:02}"), "value": value}}))
            .collect();
        assert_eq!(server.post("/v1/txn", &json!({"then": puts})).status, 200);
    }
    let mut stream = server.begin("GET", "/v1/kv", &[NDJSON], b"");
    let head = stream.head();
    assert_eq!(server.delete("/v1/kv?prefix=").json()["deleted"], 1200);
    let mut body = Vec::new();
    while let Some(chunk) = stream.chunk() {
        body.extend(chunk);
    }
    let text = String::from_utf8(body).unwrap();
    assert_eq!(
        (text.lines().count(), text.lines().last()),
        (1201, Some("{\"end\":true,\"count\":1200}"))
    );
    assert_eq!(head.revision(), 13);
}

#[test]
fn a_range_delete_needs_a_range_and_knows_its_limit() {
    let server = Server::start_with(&["limits.max_range_delete=2"]);
    for key in ["a", "b", "c"] {
        server.put(&format!("/{key}"), "");
    }
    server.delete("/v1/kv").refused(400, "invalid_request");
    server.delete("/v1/kv?prefix=").refused(400, "invalid_request");
    assert_eq!(keys(&server.get("/v1/kv")).len(), 3);
    assert_eq!(server.delete("/v1/kv?start=b").json(), json!({"revision": 5, "deleted": 2}));
    assert_eq!(server.delete("/v1/kv?prefix=zzz").json(), json!({"revision": 5, "deleted": 0}));
}

#[test]
fn a_transaction_compares_and_runs_one_branch_in_one_revision() {
    let server = filled(2);
    let txn = json!({
        "compare": [{"key": "p/0", "target": "mod_revision", "op": "=", "value": 2}, {"key": "none", "target": "version", "op": "=", "value": 0}],
        "then": [{"put": {"key": "a", "value": "1"}}, {"get": {"prefix": ""}}, {"delete": {"prefix": "p/"}}],
        "else": [{"get": {"key": "p/0"}}],
    });
    let done = server.post("/v1/txn", &txn);
    let answer = done.json();
    assert_eq!(
        (&answer["revision"], &answer["succeeded"], done.revision()),
        (&json!(4), &json!(true), 4)
    );
    assert_eq!(answer["responses"][0], json!({"put": {"created": true}}));
    assert_eq!(answer["responses"][1]["get"]["count"], 3);
    assert_eq!(answer["responses"][2], json!({"delete": {"deleted": 2}}));
    let otherwise = server.post("/v1/txn", &txn).json();
    assert_eq!(
        (&otherwise["succeeded"], &otherwise["responses"][0]["get"]["kvs"]),
        (&json!(false), &json!([]))
    );
    let put = json!({"put": {"key": "a", "value": ""}});
    server.post("/v1/txn", &json!({"then": [put, put]})).refused(400, "invalid_request");
    server
        .post("/v1/txn", &json!({"then": vec![json!({"get": {"key": "a"}}); 129]}))
        .refused(400, "invalid_request");
    server
        .post("/v1/txn", &json!({"then": [{"put": {"key": "l", "value": "", "lease": "99"}}]}))
        .refused(404, "lease_not_found");
}
