//! What one member promised, every other one keeps: retries, watches and leases across members, leaders and restarts.

use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use reqwest::Method;
use serde_json::json;

use crate::harness::{Cluster, SOON, Setup, client, eventually};

const LEASE: Duration = Duration::from_secs(3);

/// A PUT under an idempotency key: status, revision, and whether the answer is a replay.
async fn keyed_put(cluster: &Cluster, id: u64, key: &str, value: &str) -> (u16, String, bool) {
    let answer = client()
        .put(format!("{}/{key}?timeout=20s", cluster.url(id)))
        .header("idempotency-key", "retry-1")
        .body(value.to_owned())
        .send()
        .await
        .unwrap();
    let header = |name: &str| {
        let value = answer.headers().get(name).and_then(|value| value.to_str().ok());
        value.unwrap_or_default().to_owned()
    };
    (
        answer.status().as_u16(),
        header("metcd-revision"),
        header("idempotent-replayed") == "true",
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_14_an_idempotency_key_holds_on_other_members_under_other_leaders_and_after_restarts() {
    let mut cluster = Cluster::start(Setup::of(3)).await;
    let leader = cluster.leader().await;
    let (status, revision, replayed) = keyed_put(&cluster, leader, "k", "first").await;
    assert_eq!((status, replayed), (201, false));
    cluster.node(leader).kill();
    let other = leader % 3 + 1;
    assert_eq!(keyed_put(&cluster, other, "k", "first").await, (201, revision.clone(), true));
    // Another request under the same key is refused there too.
    assert_eq!(keyed_put(&cluster, other, "k", "second").await.0, 422);
    cluster.node(leader).start();
    cluster.all_ready().await;
    for id in 1..=3 {
        cluster.node(id).kill();
    }
    for id in 1..=3 {
        cluster.node(id).start();
    }
    cluster.all_ready().await;
    for id in 1..=3 {
        assert_eq!(
            keyed_put(&cluster, id, "k", "first").await,
            (201, revision.clone(), true),
            "on {id}"
        );
    }
    assert_eq!(cluster.get(1, "k").await, (200, "first".into()));
}

/// The revisions of a prefix's changes, from the one after `last` on, until `upto` has come.
async fn watch(cluster: &Cluster, id: u64, last: u64, upto: u64) -> Vec<u64> {
    let answer = client()
        .get(format!("{}/v1/watch?prefix=w", cluster.url(id)))
        .header("last-event-id", last.to_string())
        .send()
        .await
        .unwrap();
    assert_eq!(answer.status(), 200);
    let (mut stream, mut text, mut seen) = (answer.bytes_stream(), String::new(), Vec::new());
    loop {
        let piece = stream.next().await.expect("the stream goes on").expect("it does not break");
        text.push_str(std::str::from_utf8(&piece).expect("text"));
        while let Some(end) = text.find("\n\n") {
            let message: String = text.drain(..end + 2).collect();
            if message.contains("event: change") {
                let id = message.lines().find_map(|line| line.strip_prefix("id: ")).expect("an id");
                seen.push(id.parse().expect("a revision"));
                if seen.last() == Some(&upto) {
                    return seen;
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_29_a_watch_resumes_on_any_member_where_another_one_left_it() {
    let mut cluster = Cluster::start(Setup::of(3)).await;
    for n in 0..60 {
        assert!(cluster.put(n % 3 + 1, &format!("w{n}"), "v").await.unwrap().is_success());
    }
    // An empty store is at revision 1.
    let first = watch(&cluster, 1, 1, 21).await;
    let second = watch(&cluster, 2, 21, 41).await;
    let leader = cluster.leader().await;
    cluster.node(leader).kill();
    let third = watch(&cluster, leader % 3 + 1, 41, 61).await;
    assert_eq!([first, second, third].concat(), (2..=61).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_outlives_its_leader_by_its_whole_length_and_then_ends() {
    let mut cluster = Cluster::start(Setup::of(3)).await;
    let leader = cluster.leader().await;
    let other = leader % 3 + 1;
    let (status, lease) = cluster
        .call(Method::POST, other, "/v1/leases", Some(json!({ "ttl": LEASE.as_secs() })))
        .await;
    assert_eq!(status, 201, "{lease}");
    let path = format!("held?lease={}", lease["id"].as_str().unwrap());
    assert!(cluster.put(other, &path, "v").await.unwrap().is_success());
    // Nobody that leads after this moment can have counted a part of the lease before it.
    let killed = Instant::now();
    cluster.node(leader).kill();
    let lived = eventually("the lease to end", SOON, async || {
        let (status, _) = cluster.get(other, "held?timeout=10s").await;
        assert!(status == 200 || status == 404, "{status}");
        (status == 404).then(|| killed.elapsed())
    })
    .await;
    assert!(lived >= LEASE, "a new leader ended it after {lived:?}");
}
