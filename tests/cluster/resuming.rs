//! What a client began with one member and goes on with at another, because the first was killed: watches and lists.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::harness::{Cluster, SOON, Setup, client, eventually};
use crate::load::Writers;

/// What a stream delivered: the revision and keys of each change.
type Changes = Vec<(u64, Vec<String>)>;

/// The key after which nothing more is awaited.
const END: &str = "end";

#[derive(Clone, Copy, Debug)]
enum Form {
    /// Resumed by `Last-Event-ID`.
    Events,
    /// Resumed by `from_revision`.
    Lines,
}

impl Form {
    fn request(self, url: &str, last: u64) -> reqwest::RequestBuilder {
        // A stream ends when its member does, and not before.
        let get = |query: &str| {
            client()
                .get(format!("{url}/v1/watch?prefix={query}"))
                .timeout(Duration::from_secs(600))
        };
        match self {
            Form::Events => get("").header("last-event-id", last.to_string()),
            Form::Lines => get(&format!("&from_revision={}", last + 1)).header("accept", "application/x-ndjson"),
        }
    }

    fn delimiter(self) -> &'static str {
        match self {
            Form::Events => "\n\n",
            Form::Lines => "\n",
        }
    }

    /// A change, if the message is one.
    fn change(self, message: &str) -> Option<Value> {
        match self {
            Form::Events => {
                let field = |name: &str| message.lines().find_map(|line| line.strip_prefix(name));
                if field("event: ") != Some("change") {
                    return None;
                }
                let change: Value = serde_json::from_str(field("data: ").unwrap()).unwrap();
                assert_eq!(change["revision"].to_string(), field("id: ").unwrap());
                Some(change)
            }
            Form::Lines => {
                let message: Value = serde_json::from_str(message).unwrap();
                (message["type"] == "change").then_some(message)
            }
        }
    }
}

/// Reads a watch of everything from the change after `last` on, until its member is gone or [`END`] has come. A message that broke off is
/// none.
async fn follow(form: Form, url: String, last: u64, seen_upto: Arc<AtomicU64>) -> Changes {
    let mut answer = form.request(&url, last).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    let (mut bytes, mut changes) = (Vec::new(), Vec::new());
    while let Ok(Some(piece)) = answer.chunk().await {
        bytes.extend_from_slice(&piece);
        let delimiter = form.delimiter().as_bytes();
        while let Some(at) = bytes.windows(delimiter.len()).position(|found| found == delimiter) {
            let message = bytes.drain(..at + delimiter.len()).take(at).collect();
            let Some(change) = form.change(&String::from_utf8(message).unwrap()) else {
                continue;
            };
            let revision = change["revision"].as_u64().unwrap();
            let keys = change["events"].as_array().unwrap().iter();
            let keys: Vec<String> = keys.map(|event| event["kv"]["key"].as_str().unwrap().to_owned()).collect();
            let is_end = keys.iter().any(|key| key == END);
            changes.push((revision, keys));
            seen_upto.store(revision, Ordering::Relaxed);
            if is_end {
                return changes;
            }
        }
    }
    changes
}

/// A client that watches, on one member after the other.
struct Watching {
    form: Form,
    seen_upto: Arc<AtomicU64>,
    stream: JoinHandle<Changes>,
    changes: Changes,
}

impl Watching {
    fn begin(form: Form, url: String) -> Watching {
        // An empty store is at revision 1.
        let seen_upto = Arc::new(AtomicU64::new(1));
        let stream = tokio::spawn(follow(form, url, 1, seen_upto.clone()));
        Watching {
            form,
            seen_upto,
            stream,
            changes: Vec::new(),
        }
    }

    /// Waits until so many more changes have come.
    async fn progress(&self, more: u64) {
        let goal = self.seen_upto.load(Ordering::Relaxed) + more;
        eventually(&format!("changes by {:?}", self.form), SOON, async || {
            (self.seen_upto.load(Ordering::Relaxed) >= goal).then_some(())
        })
        .await;
    }

    /// The member is gone: on with another one, from the last whole message.
    async fn resume(&mut self, url: String) {
        self.changes.append(&mut (&mut self.stream).await.unwrap());
        let last = self.changes.last().map_or(1, |(revision, _)| *revision);
        self.stream = tokio::spawn(follow(self.form, url, last, self.seen_upto.clone()));
    }

    async fn end(mut self) -> Changes {
        let rest = tokio::time::timeout(SOON, self.stream).await.expect("the end comes").unwrap();
        self.changes.extend(rest);
        self.changes
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_29_watches_whose_members_are_killed_in_mid_stream_resume_on_others_without_gap_or_duplicate() {
    // A memory store comes back from a snapshot, its member's own or the leader's, and with it the history that it serves.
    let mut cluster = Cluster::start(Setup::of(3).set("raft.snapshot_entries=50").set("raft.keep_entries=10")).await;
    // Those of the member that is killed do not know what became of a write; the others' all succeed.
    let writers = Writers::start(&cluster.urls(), 12, "w");
    let mut watched = cluster.leader().await;
    let mut clients = [Form::Events, Form::Lines].map(|form| Watching::begin(form, cluster.url(watched)));
    for round in 0..3 {
        for client in &clients {
            client.progress(150).await;
        }
        cluster.node(watched).kill();
        let next = watched % 3 + 1;
        for client in &mut clients {
            client.resume(cluster.url(next)).await;
        }
        for n in 0..10 {
            let put = |half: &str| json!({ "put": { "key": format!("pair/{round}-{n}/{half}"), "value": "v" } });
            let txn = json!({ "then": [put("a"), put("b")] });
            assert_eq!(cluster.call(Method::POST, next, "/v1/txn", Some(txn)).await.0, 200);
        }
        cluster.node(watched).start();
        cluster.ready(watched).await;
        watched = next;
    }
    writers.progress(100).await;
    let record = writers.stop().await;
    let end = cluster
        .http
        .put(format!("{}/{END}", cluster.url(1)))
        .body("v")
        .send()
        .await
        .unwrap();
    let last: u64 = end.headers()["metcd-revision"].to_str().unwrap().parse().unwrap();
    for client in clients {
        let form = client.form;
        let changes = client.end().await;
        // A watch of everything sees every revision there is.
        let revisions: Vec<u64> = changes.iter().map(|(revision, _)| *revision).collect();
        assert_eq!(revisions, (2..=last).collect::<Vec<_>>(), "{form:?}");
        let mut seen = BTreeMap::new();
        for (revision, keys) in changes {
            if let Some(pair) = keys[0].strip_suffix("/a") {
                assert_eq!(keys, [format!("{pair}/a"), format!("{pair}/b")], "{form:?}: a transaction is torn");
            } else {
                assert_eq!(keys.len(), 1, "{form:?}: {keys:?}");
            }
            for key in keys {
                assert_eq!(seen.insert(key.clone(), revision), None, "{form:?}: {key} comes twice");
            }
        }
        for (key, revision) in &record.acknowledged {
            assert_eq!(seen.get(key), Some(revision), "{form:?}: {key}");
        }
        for (key, reason) in &record.refused {
            assert!(!seen.contains_key(key), "{form:?}: {key} was refused: {reason}");
        }
    }
}

/// One page: its keys with their values, the revision it is of, and where the next one begins.
async fn page(cluster: &Cluster, id: u64, query: &str, after: Option<&str>) -> (Vec<(String, String)>, u64, Option<String>) {
    let after = after.map_or_else(String::new, |token| format!("&after={token}"));
    let path = format!("/v1/kv?prefix=p/&limit=20{query}{after}");
    let (status, list) = cluster.call(Method::GET, id, &path, None).await;
    assert_eq!(status, 200, "{list}");
    let text = |kv: &Value, name: &str| kv[name].as_str().unwrap().to_owned();
    let kvs = list["kvs"].as_array().unwrap().iter();
    let kvs = kvs.map(|kv| (text(kv, "key"), text(kv, "value"))).collect();
    (kvs, list["revision"].as_u64().unwrap(), list["next"].as_str().map(str::to_owned))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_of_a_list_are_of_one_revision_whichever_members_give_them_while_writes_and_kills_go_on() {
    const KEYS: usize = 100;
    let mut cluster = Cluster::start(Setup::of(3)).await;
    let mut wanted: Vec<(String, String)> = (0..KEYS).map(|n| (format!("p/{n:03}"), format!("old {n}"))).collect();
    for (key, value) in &wanted {
        assert!(cluster.put(1, key, value).await.unwrap().is_success());
    }
    let first = cluster.leader().await;
    let (second, third) = (first % 3 + 1, (first + 1) % 3 + 1);
    let (mut ascending, revision, mut next) = page(&cluster, first, "", None).await;
    let (mut descending, _, mut next_down) = page(&cluster, first, "&order=desc", None).await;

    // Rewrites, deletions and new keys all over the range, until the last page is there.
    let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let writing = {
        let (stop, rounds, url) = (stop.clone(), rounds.clone(), cluster.url(third));
        tokio::spawn(async move {
            let http = client();
            while !stop.load(Ordering::Relaxed) {
                let n = rounds.fetch_add(1, Ordering::Relaxed) * 7 % KEYS as u64;
                let put = |key: String| http.put(format!("{url}/{key}")).body("new").send();
                assert!(put(format!("p/{n:03}")).await.unwrap().status().is_success());
                assert!(put(format!("p/{n:03}-new")).await.unwrap().status().is_success());
                let gone = http.delete(format!("{url}/p/{:03}", (n + 1) % KEYS as u64)).send().await.unwrap();
                assert!(matches!(gone.status().as_u16(), 204 | 404), "{}", gone.status());
            }
        })
    };
    let progress = async || {
        let goal = rounds.load(Ordering::Relaxed) + KEYS as u64 / 2;
        eventually("writes", SOON, async || (rounds.load(Ordering::Relaxed) >= goal).then_some(())).await;
    };
    progress().await;
    let mut asked = [second, third, second, first].into_iter();
    let mut turn = 0;
    while let Some(token) = next {
        turn += 1;
        match turn {
            // Who gave the token dies, and is asked again when it is back.
            2 => cluster.node(first).kill(),
            4 => {
                cluster.node(first).start();
                cluster.ready(first).await;
            }
            _ => {}
        }
        let id = asked.next().expect("five pages");
        let (kvs, of, after) = page(&cluster, id, "", Some(&token)).await;
        assert_eq!(of, revision, "the page that member {id} gave");
        ascending.extend(kvs);
        next = after;
        let (kvs, of, after) = page(&cluster, id, "&order=desc", next_down.as_deref()).await;
        assert_eq!(of, revision, "the page that member {id} gave");
        descending.extend(kvs);
        next_down = after;
        progress().await;
    }
    stop.store(true, Ordering::Relaxed);
    writing.await.unwrap();
    assert_eq!(ascending, wanted);
    assert_eq!(next_down, None);
    wanted.reverse();
    assert_eq!(descending, wanted);
    assert_ne!(
        page(&cluster, second, "", None).await.0,
        ascending[..20],
        "the list of now is another one"
    );
}
