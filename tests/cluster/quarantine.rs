//! A member whose state is not the others' any more. The members compare their hashes every ten thousand entries of the log: the one that
//! differs from a majority says so and stops serving, the others go on.
//!
//! How a state comes to differ here: a member with a sled store is stopped in order, one key is taken out of its store's index with the
//! crate's own library (a write that an engine lost without a word), and it is started again. Nothing notices, because every record that is
//! left has its checksum. The next write of that key makes another version of it there than anywhere else.

use std::ops::{Bound, ControlFlow};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use metcd::config::StoreBackend;
use metcd::state::command::HashReport;
use metcd::state::divergence::HASH_REPORT_INTERVAL;
use metcd::store::{self, KvStore, Order, Table, WriteBatch};
use prost::Message as _;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::harness::{Cluster, SOON, Setup, eventually};
use crate::load::{Writers, check};
use crate::membership::voters_are;

/// Before the entry at which the members compare: room for two that join, and for what a restart and an election add.
const ROOM: u64 = 400;

/// Brings the log to `index` by deletes of nothing, each an entry of its own or nearly so: a connection sends many requests at once, and the
/// member carries out one after the other.
async fn pass(cluster: &Cluster, id: u64, index: u64, connections: usize) {
    const AT_ONCE: usize = 50;
    let port = cluster.nodes.iter().find(|node| node.id == id).unwrap().client_port;
    let stop = Arc::new(AtomicBool::new(false));
    let mut tasks = JoinSet::new();
    for _ in 0..connections {
        let stop = stop.clone();
        tasks.spawn(async move {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            let requests = "DELETE /nothing HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".repeat(AT_ONCE);
            while !stop.load(Ordering::Relaxed) {
                stream.write_all(requests.as_bytes()).await.unwrap();
                let mut answers = Vec::new();
                while String::from_utf8_lossy(&answers).matches("\"not_found\"").count() < AT_ONCE {
                    let read = stream.read_buf(&mut answers).await.unwrap();
                    assert_ne!(read, 0, "member {id} hung up: {}", String::from_utf8_lossy(&answers));
                }
            }
        });
    }
    eventually(&format!("index {index}"), SOON * 3, async || {
        (cluster.status(id).await["applied_index"].as_u64()? >= index).then_some(())
    })
    .await;
    stop.store(true, Ordering::Relaxed);
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap();
    }
}

/// Stops a member in order, changes its store behind its back, and starts it again.
async fn tamper(cluster: &mut Cluster, id: u64, change: impl Fn(&dyn KvStore) -> WriteBatch) {
    cluster.node(id).terminate();
    assert!(cluster.node(id).ended(SOON).await.success());
    let store = store::open(StoreBackend::Sled, &cluster.node(id).data_dir.join("store")).unwrap();
    store.write(change(&*store)).unwrap();
    store.close().unwrap();
    drop(store);
    cluster.node(id).start();
}

/// Forgets the only version of a key.
fn losing(store: &dyn KvStore, key: &str) -> WriteBatch {
    let mut batch = WriteBatch::default();
    let everything = (Bound::Unbounded, Bound::Unbounded);
    store
        .scan(Table::Index, everything, Order::Asc, &mut |index_key, _| {
            if index_key.starts_with(key.as_bytes()) {
                batch.delete(Table::Index, index_key);
            }
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(batch.ops.len(), 1, "{key} has one version");
    batch
}

/// A cluster of 1, 2 and 3 whose log is about to reach the index at which the members compare. 2 and 3 have sled stores.
async fn about_to_compare() -> Cluster {
    // Ten thousand entries are quicker on one member, without a sync for each, and the others get them as a snapshot.
    let mut cluster = Cluster::start(Setup::of(1).set("wal.sync=false")).await;
    assert!(cluster.put(1, "victim", "first").await.unwrap().is_success());
    pass(&cluster, 1, HASH_REPORT_INTERVAL - ROOM, 2).await;
    for id in [2, 3] {
        let node = cluster.joiner(Some(id));
        node.drop_args("--store");
        node.add_args(&["--store", "sled"]);
        node.start();
        cluster.ready(id).await;
    }
    voters_are(&cluster, 1, &[1, 2, 3]).await;
    let applied = cluster.status(1).await["applied_index"].as_u64().unwrap();
    assert!(applied + ROOM / 4 < HASH_REPORT_INTERVAL, "the log is at {applied} already");
    cluster
}

/// Status, code and outcome of a refusal, and whether it says when to come again.
async fn refusal(request: reqwest::RequestBuilder) -> (u16, String, String, bool) {
    let answer = request.send().await.unwrap();
    let status = answer.status().as_u16();
    let retry = answer.headers().contains_key("retry-after");
    let problem: Value = answer.json().await.unwrap_or_default();
    let text = |name: &str| problem[name].as_str().unwrap_or_default().to_owned();
    (status, text("code"), text("outcome"), retry)
}

async fn metric(cluster: &Cluster, id: u64, name: &str) -> Option<String> {
    let text = cluster.get(id, "metrics").await.1;
    let line = text.lines().find(|line| line.split([' ', '{']).next() == Some(name))?;
    line.rsplit(' ').next().map(str::to_owned)
}

async fn quarantined(cluster: &Cluster, id: u64) -> String {
    eventually(&format!("member {id} to be quarantined"), SOON, async || {
        cluster.status(id).await["quarantined"].as_str().map(str::to_owned)
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_state_differs_from_the_majoritys_hands_over_and_stops_serving_while_the_others_go_on() {
    let mut cluster = about_to_compare().await;
    let (status, lease) = cluster.call(Method::POST, 3, "/v1/leases", Some(json!({ "ttl": 600 }))).await;
    assert_eq!(status, 201, "{lease}");
    let lease: u64 = lease["id"].as_str().unwrap().parse().unwrap();
    let its_time = format!("/v1/leases/{lease}?timeout=25s");
    // A linearizable read there: it has applied the grant, and will not do so after the loss.
    assert_eq!(cluster.get(2, "victim").await, (200, "first".to_owned()));
    tamper(&mut cluster, 2, |store| {
        let mut batch = losing(store, "victim");
        let key = lease.to_be_bytes();
        assert!(store.get(Table::Lease, &key).unwrap().is_some(), "there is a lease to lose");
        batch.delete(Table::Lease, key);
        batch
    })
    .await;
    cluster.ready(2).await;
    // Every member takes this one for its own truth; only 2 makes a new key of it.
    assert_eq!(cluster.get(2, "victim").await.0, 404, "the store is used as it is");
    assert!(cluster.put(1, "victim", "second").await.unwrap().is_success());
    eventually("member 2 to lead", SOON, async || {
        let _ = cluster.call(Method::POST, 1, "/leader", Some(json!({ "id": 2 }))).await;
        (cluster.status(1).await["leader"] == 2).then_some(())
    })
    .await;
    assert!(cluster.status(2).await["quarantined"].is_null());
    assert_eq!(
        cluster.call(Method::GET, 2, &its_time, None).await.0,
        404,
        "it has lost the lease, too"
    );
    let watch = cluster
        .http
        .get(format!("{}/v1/watch?prefix=never", cluster.url(2)))
        .timeout(Duration::from_secs(600))
        .send()
        .await
        .unwrap();
    assert_eq!(watch.status(), 200);
    let watch = tokio::spawn(watch.text());

    let writers = Writers::start_slow(&cluster.urls(), 6, "w", Duration::from_millis(20));
    writers.progress(20).await;
    pass(&cluster, 3, HASH_REPORT_INTERVAL, 1).await;
    let reason = quarantined(&cluster, 2).await;
    let told = format!("the state of member 2 at index {HASH_REPORT_INTERVAL} differs from that of 2 of 3 voters");
    assert_eq!(reason, told);
    // What only a leader answers waits for one that is right.
    let keep = format!("/v1/leases/{lease}/keepalive?timeout=25s");
    for (method, path) in [(Method::GET, &its_time), (Method::POST, &keep)] {
        let (status, answer) = cluster.call(method, 3, path, None).await;
        assert_eq!(status, 200, "{path}: {answer}");
    }

    // It says so wherever one may look, and answers nothing from its state.
    let (http, url) = (cluster.http.clone(), cluster.url(2));
    let refused = |outcome: &str| (503, "quarantined".to_owned(), outcome.to_owned(), true);
    for read in [
        "/victim",
        "/victim?consistency=serializable",
        "/v1/kv?prefix=",
        "/v1/watch?key=a",
        "/v1/hash",
        "/readyz",
    ] {
        assert_eq!(refusal(http.get(format!("{url}{read}"))).await, refused(""), "{read}");
    }
    assert_eq!(refusal(http.put(format!("{url}/k")).body("v")).await, refused("not_applied"));
    let txn = json!({ "then": [{ "put": { "key": "k", "value": "v" } }] });
    assert_eq!(refusal(http.post(format!("{url}/v1/txn")).json(&txn)).await, refused("not_applied"));
    assert_eq!(http.get(format!("{url}/health")).send().await.unwrap().status(), 503);
    assert_eq!(http.get(format!("{url}/livez")).send().await.unwrap().status(), 200);
    let flags = [
        metric(&cluster, 1, "metcd_quarantined").await,
        metric(&cluster, 2, "metcd_quarantined").await,
    ];
    assert_eq!(flags, [Some("0".to_owned()), Some("1".to_owned())]);
    eventually("the log to say so", SOON, async || {
        cluster
            .node(2)
            .log_text()
            .lines()
            .any(|line| line.contains("ERROR") && line.contains(&told))
            .then_some(())
    })
    .await;

    // The others go on, under a leader that is one of them.
    eventually("member 2 to hand over", SOON, async || {
        (cluster.status(1).await["leader"].as_u64()? != 2).then_some(())
    })
    .await;
    writers.progress(50).await;
    let record = writers.stop().await;
    assert!(record.unknown.is_empty(), "{:?}", record.unknown.first());
    let other = record.refused.iter().find(|(_, reason)| !reason.contains("\"quarantined\""));
    assert_eq!(other, None);
    for id in [1, 3] {
        check(&cluster, id, "w", &record).await;
        assert_eq!(cluster.get(id, "victim").await, (200, "second".to_owned()));
        cluster.ready(id).await;
    }
    cluster.same_content(&[1, 3]).await;

    // A watch that was open has ended, too.
    let stream = tokio::time::timeout(SOON, watch).await.expect("it ends").unwrap().unwrap();
    assert!(stream.contains("event: error") && stream.contains("\"quarantined\""), "{stream}");

    // A restart is no way out. Being replaced is.
    cluster.node(2).kill();
    cluster.node(2).start();
    assert_eq!(quarantined(&cluster, 2).await, told);
    let peer_url = cluster.joiner(Some(4)).peer_url.clone();
    cluster.node(4).start();
    let body = json!({ "remove": 2, "add": { "id": 4, "peer_url": peer_url } });
    let (status, answer) = cluster.call(Method::POST, 1, "/members/replace?timeout=25s", Some(body)).await;
    assert!(status == 200 || status == 202, "{status} {answer}");
    voters_are(&cluster, 1, &[1, 3, 4]).await;
    assert_eq!(cluster.node(2).ended(SOON).await.code(), Some(1));
    cluster.ready(4).await;
    check(&cluster, 4, "w", &record).await;
    cluster.same_content(&[1, 3, 4]).await;
}

/// The record of the members' reports, as a store has it.
#[derive(Clone, PartialEq, prost::Message)]
struct Reports {
    #[prost(message, repeated, tag = "1")]
    reports: Vec<HashReport>,
}

/// Which of them is right, nobody can know then. The reports are put into all three stores alike: how members come to report is shown above.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_whose_states_all_differ_take_no_writes_until_one_is_replaced() {
    let mut cluster = Cluster::start(Setup::of(3).engines("sled", "sled")).await;
    assert!(cluster.put(1, "k", "before").await.unwrap().is_success());
    for id in 1..=3 {
        tamper(&mut cluster, id, |_| {
            let report = |member: u64| HashReport {
                member,
                index: HASH_REPORT_INTERVAL,
                hash: vec![member as u8; 16].into(),
            };
            let mut batch = WriteBatch::default();
            let record = Reports {
                reports: (1..=3).map(report).collect(),
            };
            batch.put(Table::Meta, &b"reports"[..], record.encode_to_vec());
            batch
        })
        .await;
        if id < 3 {
            eventually("a leader", SOON, async || cluster.status(id).await["leader"].as_u64()).await;
        }
    }
    cluster.leader().await;
    let told = format!("the voters' states differ at index {HASH_REPORT_INTERVAL}, without a majority that agrees");
    let http = cluster.http.clone();
    for id in 1..=3 {
        assert_eq!(quarantined(&cluster, id).await, told);
        let put = http.put(format!("{}/k", cluster.url(id))).body("during");
        assert_eq!(refusal(put).await, (503, "quarantined".into(), "not_applied".into(), true));
        assert_eq!(metric(&cluster, id, "metcd_quarantined").await, Some("1".to_owned()));
        eventually("the log to say so", SOON, async || {
            cluster
                .node(id)
                .log_text()
                .lines()
                .any(|line| line.contains("ERROR") && line.contains(&told))
                .then_some(())
        })
        .await;
    }
    // Reads have no worse an answer anywhere else. Once an operator has said by a replacement whom to believe, writes go on.
    let leader = cluster.leader().await;
    let gone = leader % 3 + 1;
    assert_eq!(cluster.get(gone, "k").await, (200, "before".to_owned()));
    let peer_url = cluster.joiner(Some(4)).peer_url.clone();
    cluster.node(4).start();
    let body = json!({ "remove": gone, "add": { "id": 4, "peer_url": peer_url } });
    let (status, answer) = cluster.call(Method::POST, leader, "/members/replace?timeout=25s", Some(body)).await;
    assert!(status == 200 || status == 202, "{status} {answer}");
    let voters: Vec<u64> = (1..=4).filter(|&id| id != gone).collect();
    voters_are(&cluster, leader, &voters).await;
    assert!(cluster.put(leader, "k", "after").await.unwrap().is_success());
    cluster.ready(4).await;
    assert_eq!(cluster.get(4, "k").await, (200, "after".to_owned()));
}
