//! Section 4: watches.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::{Exchange, Server, wait_until};

const NDJSON: (&str, &str) = ("Accept", "application/x-ndjson");

/// Lines of a chunked body as they come.
struct Lines {
    exchange: Exchange,
    buffered: Vec<u8>,
}

impl Lines {
    fn open(server: &Server, target: &str, headers: &[(&str, &str)]) -> Lines {
        let mut exchange = server.begin("GET", target, headers, b"");
        let head = exchange.head();
        assert_eq!((head.status, head.header("cache-control")), (200, "no-store"));
        Lines {
            exchange,
            buffered: Vec::new(),
        }
    }

    fn next(&mut self) -> String {
        loop {
            if let Some(end) = self.buffered.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.buffered.drain(..=end).collect();
                return String::from_utf8(line).unwrap().trim_end().to_owned();
            }
            self.buffered.extend(self.exchange.chunk().expect("the stream goes on"));
        }
    }

    fn json(&mut self) -> Value {
        serde_json::from_str(&self.next()).unwrap()
    }
}

#[test]
fn a_watch_opens_and_sends_one_message_a_revision() {
    let server = Server::start();
    server.put("/a/0", "before");
    let mut watch = Lines::open(&server, "/v1/watch?prefix=a/", &[]);
    for expected in ["id: 2", "event: open", "data: {\"revision\":2}", ""] {
        assert_eq!(watch.next(), expected);
    }
    server.put("/b", "elsewhere");
    server.post(
        "/v1/txn",
        &json!({"then": [{"put": {"key": "a/1", "value": "x"}}, {"delete": {"key": "a/0"}}, {"put": {"key": "b", "value": ""}}]}),
    );
    assert_eq!((watch.next(), watch.next()), ("id: 4".to_owned(), "event: change".to_owned()));
    let data = watch.next();
    let change: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!(
        change,
        json!({"revision": 4, "events": [
            {"type": "put", "kv": {"key": "a/1", "value": "x", "create_revision": 4, "mod_revision": 4, "version": 1}},
            {"type": "delete", "kv": {"key": "a/0", "mod_revision": 4}},
        ]})
    );
    assert_eq!(watch.next(), "");
}

#[test]
fn a_watch_resumes_where_it_stopped() {
    let server = Server::start();
    for value in ["one", "two", "three"] {
        server.put("/a", value);
    }
    server.delete("/a");
    let mut from = Lines::open(&server, "/v1/watch?key=a&from_revision=3&prev=true", &[NDJSON]);
    assert_eq!(from.json(), json!({"type": "open", "revision": 2}));
    let change = from.json();
    assert_eq!((&change["type"], &change["revision"]), (&json!("change"), &json!(3)));
    assert_eq!(
        (&change["events"][0]["kv"]["value"], &change["events"][0]["prev"]["value"]),
        (&json!("two"), &json!("one"))
    );
    assert_eq!(
        (from.json()["revision"].clone(), from.json()["events"][0]["type"].clone()),
        (json!(4), json!("delete"))
    );
    // The header wins over the parameter.
    let mut resumed = Lines::open(&server, "/v1/watch?key=a&from_revision=2", &[NDJSON, ("Last-Event-ID", "4")]);
    assert_eq!(resumed.json(), json!({"type": "open", "revision": 4}));
    assert_eq!(resumed.json()["revision"], 5);
    let mut deletes = Lines::open(&server, "/v1/watch?prefix=&from_revision=2&only=delete", &[NDJSON]);
    deletes.json();
    assert_eq!(deletes.json()["revision"], 5);
    server
        .send("GET", "/v1/watch?key=a", &[("Last-Event-ID", "6")], b"")
        .refused(400, "future_revision");
    let twice = [("Last-Event-ID", "4"), ("Last-Event-ID", "5")];
    server.send("GET", "/v1/watch?key=a", &twice, b"").refused(400, "invalid_request");
    server.post("/v1/compact", &json!({"revision": 4}));
    let gone = server.get("/v1/watch?key=a&from_revision=2");
    gone.refused(410, "compacted");
    assert_eq!(gone.json()["compacted_revision"], 4);
}

#[test]
fn a_watch_without_changes_reports_progress_ten_seconds_after_its_last_message() {
    let server = Server::start();
    let mut watch = Lines::open(&server, "/v1/watch?key=a", &[NDJSON]);
    let opened = Instant::now();
    assert_eq!(watch.json(), json!({"type": "open", "revision": 1}));
    server.put("/b", "elsewhere");
    // Counted from when it opened, the progress would come too early.
    wait_until(|| opened.elapsed() > Duration::from_secs(3));
    let changed = Instant::now();
    server.put("/a", "x");
    assert_eq!(watch.json()["revision"], 3);
    server.put("/b", "elsewhere");
    assert_eq!(watch.json(), json!({"type": "progress", "revision": 4}));
    let quiet = changed.elapsed();
    // 10 s, on a machine that has other work as well.
    let about_ten = Duration::from_secs(9)..Duration::from_secs(15);
    assert!(about_ten.contains(&quiet), "progress after {quiet:?}");
}

#[test]
fn watches_are_counted_and_checked() {
    let server = Server::start_with(&["limits.max_watchers=1"]);
    let watch = Lines::open(&server, "/v1/watch?key=a", &[]);
    let full = server.get("/v1/watch?key=a");
    full.refused(429, "too_many_watchers");
    assert_eq!(full.header("retry-after"), "1");
    drop(watch);
    for bad in ["", "key=a&prefix=b", "key=a&only=both", "key=a&from_revision=0", "key="] {
        assert_eq!(server.get(&format!("/v1/watch?{bad}")).status, 400, "{bad}");
    }
}

#[test]
fn a_watch_of_puts_passes_deletes_over_and_still_tells_how_far_it_is() {
    let server = Server::start();
    let mut puts = Lines::open(&server, "/v1/watch?prefix=&only=put", &[NDJSON]);
    assert_eq!(puts.json(), json!({"type": "open", "revision": 1}));
    server.put("/a", "x");
    server.delete("/a");
    server.put("/a", "y");
    assert_eq!(
        (puts.json()["revision"].clone(), puts.json()["revision"].clone()),
        (json!(2), json!(4))
    );
}

#[test]
fn a_reader_that_stops_is_fed_from_history_when_it_returns() {
    let server = Server::start();
    let mut stopped = Lines::open(&server, "/v1/watch?prefix=k", &[NDJSON]);
    assert_eq!(stopped.json()["type"], "open");
    // More than the sockets' buffers hold, and more revisions than a group of watchers remembers.
    let value = "x".repeat(20_000);
    for number in 0..1200u32 {
        assert!(server.put(&format!("/k{}", number % 7), &value).status < 300);
    }
    for revision in 2..=1201u32 {
        let change = stopped.json();
        assert_eq!((&change["type"], &change["revision"]), (&json!("change"), &json!(revision)));
        assert_eq!(change["events"][0]["kv"]["value"].as_str().map(str::len), Some(20_000));
    }
}

#[test]
fn a_reader_that_stops_beyond_compaction_is_told_so_within_the_stream() {
    let server = Server::start();
    let mut stopped = Lines::open(&server, "/v1/watch?prefix=k", &[NDJSON]);
    assert_eq!(stopped.json()["type"], "open");
    let value = "x".repeat(20_000);
    let mut last = 0;
    for number in 0..1200u32 {
        last = server.put(&format!("/k{}", number % 7), &value).revision();
    }
    assert_eq!(server.post("/v1/compact", &json!({"revision": last})).status, 200);
    let mut seen = 1;
    loop {
        let message = stopped.json();
        if message["type"] == "error" {
            assert_eq!(
                (&message["code"], &message["compacted_revision"]),
                (&json!("compacted"), &json!(last))
            );
            break;
        }
        seen += 1;
        assert_eq!((&message["type"], &message["revision"]), (&json!("change"), &json!(seen)));
    }
    assert!(seen < last, "what was compacted cannot all have been delivered");
    assert_eq!(stopped.exchange.chunk(), None);
}
