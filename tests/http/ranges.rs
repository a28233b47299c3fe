//! Section 3: lists, streams, range deletes, transactions.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::{Answer, Server, wait_until};

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
fn a_stream_takes_the_order_and_the_parts_that_a_page_takes() {
    let server = filled(3);
    let lines = |query: &str| -> Vec<Value> {
        let streamed = server.send("GET", &format!("/v1/kv?prefix=p/&{query}"), &[NDJSON], b"");
        assert_eq!((streamed.status, streamed.header("content-type")), (200, "application/x-ndjson"));
        streamed.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let seen = |query: &str| -> Vec<String> {
        let mut lines = lines(query);
        let end = lines.pop().expect("an end line");
        assert_eq!((&end["end"], &end["count"]), (&json!(true), &json!(lines.len())), "{query}");
        let key = |line: &Value| format!("{}={}", line["key"].as_str().unwrap(), line.get("value").unwrap_or(&Value::Null));
        lines.iter().map(key).collect()
    };
    assert_eq!(lines("count_only=true"), [json!({"end": true, "count": 3})]);
    assert_eq!(lines("count_only=true&limit=2"), [json!({"end": true, "count": 3})]);
    assert_eq!(seen("order=asc"), ["p/0=\"v0\"", "p/1=\"v1\"", "p/2=\"v2\""]);
    assert_eq!(seen("order=desc"), ["p/2=\"v2\"", "p/1=\"v1\"", "p/0=\"v0\""]);
    assert_eq!(seen("order=desc&limit=2&keys_only=true"), ["p/2=null", "p/1=null"]);
    assert_eq!(seen("keys_only=true"), ["p/0=null", "p/1=null", "p/2=null"]);
    assert_eq!(seen("order=desc&revision=3"), ["p/1=\"v1\"", "p/0=\"v0\""]);
    assert_eq!(
        lines("keys_only=true")[0],
        json!({"key": "p/0", "create_revision": 2, "mod_revision": 2, "version": 1})
    );
}

#[test]
fn a_page_has_a_thousand_keys_unless_told_otherwise_and_never_more_than_ten_thousand() {
    let server = large(100);
    server.put("/zzz", "");
    let page = |query: &str| {
        let page = server.get(&format!("/v1/kv?keys_only=true{query}")).json();
        assert_eq!(page["count"], 10_001, "{query}");
        (page["kvs"].as_array().unwrap().len(), page["more"].as_bool().unwrap())
    };
    assert_eq!(page(""), (1000, true));
    assert_eq!(page("&limit=1001"), (1001, true));
    assert_eq!(page("&limit=10000"), (10_000, true));
    server.get("/v1/kv?limit=10001").refused(400, "invalid_request");
    server.delete("/v1/kv?start=zzz");
    let all = server.get("/v1/kv?keys_only=true&limit=10000").json();
    assert_eq!((all["kvs"].as_array().unwrap().len(), &all["more"]), (10_000, &json!(false)));
    server.delete("/v1/kv?start=010-01");
    let all = server.get("/v1/kv?keys_only=true&limit=1001").json();
    assert_eq!((all["kvs"].as_array().unwrap().len(), &all["more"]), (1001, &json!(false)));
    let page = server.get("/v1/kv?keys_only=true").json();
    assert_eq!(
        (page["kvs"].as_array().unwrap().len(), &page["more"], &page["count"]),
        (1000, &json!(true), &json!(1001))
    );
}

#[test]
fn a_stream_that_a_limit_cuts_short_says_how_to_go_on_in_either_form() {
    let server = filled(5);
    let end_of = |target: &str| -> Value {
        let streamed = server.send("GET", target, &[NDJSON], b"");
        serde_json::from_str(streamed.text().lines().last().expect("an end line")).unwrap()
    };
    let first = end_of("/v1/kv?prefix=p/&limit=2");
    assert_eq!((&first["count"], &first["more"]), (&json!(2), &json!(true)));
    let next = first["next"].as_str().expect("a token");
    assert_eq!(server.delete("/v1/kv?prefix=p/").json()["deleted"], 5);
    let page = server.get(&format!("/v1/kv?prefix=p/&limit=2&after={next}")).json();
    assert_eq!(
        (&page["revision"], &page["count"], &page["more"]),
        (&json!(6), &json!(5), &json!(true))
    );
    assert_eq!(page["kvs"][0]["value"], "v2");
    let second = end_of(&format!("/v1/kv?prefix=p/&limit=2&after={next}"));
    assert_eq!(second["next"], page["next"], "the same page, the same token");
    let last = end_of(&format!(
        "/v1/kv?prefix=p/&limit=2&after={}",
        second["next"].as_str().expect("a token")
    ));
    assert_eq!(last, json!({"end": true, "count": 1}));
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
    // A variable that was not set, and everything would be gone: the limit of this server does not say so.
    let bare = server.delete("/v1/kv?start=");
    bare.refused(400, "invalid_request");
    assert!(bare.text().contains("`start` is empty"), "{bare:?}");
    let bare = server.delete("/v1/kv?prefix");
    bare.refused(400, "invalid_request");
    assert!(bare.text().contains("say so with `prefix=`"), "{bare:?}");
    let bare = server.post("/v1/txn", &json!({"then": [{"delete": {"start": ""}}]}));
    assert!(bare.text().contains("`start` is empty"), "{bare:?}");
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

#[test]
fn a_stream_goes_on_in_its_revision_while_that_is_compacted() {
    let server = large(100);
    let mut stream = server.begin("GET", "/v1/kv", &[NDJSON], b"");
    let revision = stream.head().revision();
    assert_eq!(server.delete("/v1/kv?prefix=").json()["deleted"], 10_000);
    let now = server.get("/a").revision();
    assert_eq!(server.post("/v1/compact", &json!({"revision": now})).status, 200);
    server.get(&format!("/v1/kv?revision={}", revision - 1)).refused(410, "compacted");
    let mut body = Vec::new();
    while let Some(chunk) = stream.chunk() {
        body.extend(chunk);
    }
    assert!(body.ends_with(b"{\"end\":true,\"count\":10000}\n"));
}

#[test]
fn a_stream_that_takes_too_long_breaks_off_without_its_end() {
    let server = large_with(100, &["limits.max_stream=1s"]);
    let mut stream = server.begin("GET", "/v1/kv", &[NDJSON], b"");
    assert_eq!(stream.head().status, 200);
    // Unread, it is more than the buffers of the sockets hold.
    let begun = Instant::now();
    wait_until(|| begun.elapsed() > Duration::from_millis(1500));
    let (mut body, mut is_broken) = (Vec::new(), false);
    loop {
        match stream.try_chunk() {
            Ok(Some(chunk)) => body.extend(chunk),
            Ok(None) => break,
            Err(_) => {
                is_broken = true;
                break;
            }
        }
    }
    assert!(is_broken, "{} bytes came, and an end", body.len());
    assert!(!body.windows(7).any(|part| part == b"{\"end\":"));
}

/// 100 keys in each transaction, of 1,000 bytes each.
fn large(batches: u32) -> Server {
    large_with(batches, &[])
}

fn large_with(batches: u32, settings: &[&str]) -> Server {
    let server = Server::start_with(settings);
    let value = "x".repeat(1000);
    for batch in 0..batches {
        let puts: Vec<Value> = (0..100)
            .map(|at| json!({"put": {"key": format!("{batch:03}-{at:02}"), "value": value}}))
            .collect();
        assert_eq!(server.post("/v1/txn", &json!({"then": puts})).status, 200);
    }
    server
}

#[test]
fn a_transaction_compares_every_target_with_every_operator() {
    let server = Server::start();
    server.put("/other", "");
    server.put("/a", "m");
    server.put("/a", "n");
    let id = server.post("/v1/leases", &json!({"ttl": 60})).json()["id"]
        .as_str()
        .unwrap()
        .to_owned();
    server.put(&format!("/b?lease={id}"), "");
    let holds = |key: &str, target: &str, op: &str, value: Value| {
        let compare = json!({"key": key, "target": target, "op": op, "value": value});
        server.post("/v1/txn", &json!({"compare": [compare]})).json()["succeeded"]
            .as_bool()
            .unwrap()
    };
    for (target, low, is, high) in [
        ("value", json!("m"), json!("n"), json!("o")),
        ("version", json!(1), json!(2), json!(3)),
        ("create_revision", json!(2), json!(3), json!(4)),
        ("mod_revision", json!(3), json!(4), json!(5)),
    ] {
        let results = |value: &Value| ["=", "!=", "<", ">"].map(|op| holds("a", target, op, value.clone()));
        assert_eq!(results(&low), [false, true, false, true], "{target}");
        assert_eq!(results(&is), [true, false, false, false], "{target}");
        assert_eq!(results(&high), [false, true, true, false], "{target}");
    }
    assert!(holds("b", "lease", "=", json!(id)) && !holds("a", "lease", "=", json!(id)));
    for target in ["version", "create_revision", "mod_revision"] {
        assert!(holds("absent", target, "=", json!(0)), "{target}");
    }
    let compare = json!({"key": "a", "target": "version", "op": "=", "value": 2});
    let many = |count: usize| server.post("/v1/txn", &json!({"compare": vec![compare.clone(); count]}));
    assert_eq!(many(128).status, 200);
    many(129).refused(400, "invalid_request");
    let get = json!({"get": {"key": "a"}});
    assert_eq!(server.post("/v1/txn", &json!({"then": vec![get; 128]})).status, 200);
    assert_eq!(server.get("/a").revision(), 5);
}

/// A page may come from a member that is ahead of the one that is asked for the next.
#[test]
fn a_serializable_page_waits_for_the_revision_of_the_page_before() {
    let (ahead, behind) = (Server::start(), Server::start());
    for server in [&ahead, &behind] {
        for key in ["/a", "/b"] {
            server.put(key, "1");
        }
    }
    ahead.put("/c", "1");
    let token = ahead.get("/v1/kv?limit=1&keys_only=true").json()["next"]
        .as_str()
        .unwrap()
        .to_owned();
    let next = |timeout: &str| {
        let target = format!("/v1/kv?limit=1&keys_only=true&consistency=serializable&timeout={timeout}&after={token}");
        behind.get(&target)
    };
    next("50ms").refused(504, "timeout");
    std::thread::scope(|scope| {
        let page = scope.spawn(|| next("30s"));
        behind.put("/c", "1");
        assert_eq!(page.join().unwrap().json()["kvs"][0]["key"], "b");
    });
}
