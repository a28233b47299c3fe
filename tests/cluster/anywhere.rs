//! What one member promised, every other one keeps: retries, watches and leases across members, leaders and restarts.

use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use reqwest::Method;
use serde_json::json;

use crate::harness::{Cluster, SOON, Setup, client, eventually};

const LEASE: Duration = Duration::from_secs(4);

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

/// The revision after which a new watch begins, as its first message says.
async fn opens_after(cluster: &Cluster, id: u64) -> u64 {
    let url = format!("{}/v1/watch?prefix=w", cluster.url(id));
    let mut answer = client().get(url).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    let mut text = String::new();
    while !text.contains("\n\n") {
        let piece = answer.chunk().await.expect("it does not break").expect("the stream goes on");
        text.push_str(std::str::from_utf8(&piece).expect("text"));
    }
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name));
    assert_eq!(field("event: "), Some("open"), "{text}");
    field("id: ").expect("an id").parse().expect("a revision")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_watch_on_any_member_begins_after_all_that_was_acknowledged_on_another() {
    let cluster = Cluster::start(Setup::of(3)).await;
    for round in 0..30 {
        let writer = round % 3 + 1;
        // Each of the others in turn.
        let watched = (writer + round / 3 % 2) % 3 + 1;
        let put = client().put(format!("{}/w", cluster.url(writer))).body(format!("v{round}"));
        let put = put.send().await.unwrap();
        assert!(put.status().is_success(), "{put:?}");
        let revision: u64 = put.headers()["metcd-revision"].to_str().unwrap().parse().unwrap();
        let opened = opens_after(&cluster, watched).await;
        assert!(
            opened >= revision,
            "member {watched} opens after {opened}, member {writer} had acknowledged {revision}"
        );
    }
}

/// Waits until less than half of a lease is left, or it is gone already, as `id` has it from the leader. Whether it is still there.
async fn is_half_over(cluster: &Cluster, id: u64, path: &str) -> bool {
    eventually("half of the lease to pass", SOON, async || {
        let (status, lease) = cluster.call(Method::GET, id, path, None).await;
        assert!(status == 200 || status == 404, "{status} {lease}");
        let is_there = status == 200;
        let few = lease["remaining"].as_f64().is_some_and(|left| left < LEASE.as_secs_f64() / 2.0);
        (few || !is_there).then_some(is_there)
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_has_its_whole_length_again_under_each_new_leader_and_then_ends_on_every_member() {
    let mut cluster = Cluster::start(Setup::of(3)).await;
    let leader = cluster.leader().await;
    let (other, third) = (leader % 3 + 1, (leader + 1) % 3 + 1);
    // Nobody that leads after this moment can have counted a part of the lease before it.
    let mut begun = Instant::now();
    let (status, lease) = cluster
        .call(Method::POST, other, "/v1/leases", Some(json!({ "ttl": LEASE.as_secs() })))
        .await;
    assert_eq!(status, 201, "{lease}");
    let lease = lease["id"].as_str().unwrap();
    let path = format!("/v1/leases/{lease}");
    for key in ["held/a", "held/b"] {
        let put = format!("{key}?lease={lease}");
        assert!(cluster.put(third, &put, "v").await.unwrap().is_success());
    }
    let revision = cluster.status(third).await["revision"].as_u64().unwrap();

    // A leader that dies, then one that hands over. On a machine that stood still for so long the lease may have ended in its time before.
    if is_half_over(&cluster, other, &path).await {
        begun = Instant::now();
        cluster.node(leader).kill();
        let second = cluster.leader_of(&[other, third]).await;
        let last = if second == other { third } else { other };
        if is_half_over(&cluster, other, &path).await {
            let asked = Instant::now();
            let (status, answer) = cluster.call(Method::POST, other, "/leader", Some(json!({ "id": last }))).await;
            assert_eq!((status, answer["id"].as_u64()), (200, Some(last)), "{answer}");
            // Had it ended before it was asked, that would have been early, too.
            if cluster.call(Method::GET, other, &path, None).await.0 == 200 {
                begun = asked;
            }
        }
    }
    let lived = eventually("the lease to end", SOON, async || {
        let (status, _) = cluster.get(other, "held/a?timeout=10s").await;
        assert!(status == 200 || status == 404, "{status}");
        (status == 404).then(|| begun.elapsed())
    })
    .await;
    println!("FIG a lease of {LEASE:?} ended {lived:?} after the last change of the leader");
    assert!(lived >= LEASE, "a new leader ended it after {lived:?}");

    if !cluster.node(leader).is_running() {
        cluster.node(leader).start();
    }
    cluster.all_ready().await;
    for id in cluster.ids() {
        for key in ["held/a", "held/b"] {
            assert_eq!(cluster.get(id, key).await.0, 404, "{key} on member {id}");
        }
        let (status, answer) = cluster.call(Method::GET, id, &path, None).await;
        assert_eq!((status, answer["code"].as_str()), (404, Some("lease_not_found")), "on member {id}");
        assert_eq!(cluster.status(id).await["revision"], revision + 1, "both keys go at once, and once");
    }
    cluster.same_content(&cluster.ids()).await;
}

/// What a client sees of an answer to a mutation, and whether it is a replay.
async fn answer_to(cluster: &Cluster, id: u64, (method, path, condition, body): &Mutation, key: &str) -> (Vec<String>, bool) {
    let mut request = client()
        .request(method.clone(), format!("{}{path}", cluster.url(id)))
        .header("idempotency-key", key)
        .body(*body);
    if !condition.is_empty() {
        request = request.header("if-match", *condition);
    }
    let answer = request.send().await.unwrap();
    let header = |name: &str| {
        let value = answer.headers().get(name).map(|value| value.to_str().unwrap());
        format!("{name}: {}", value.unwrap_or_default())
    };
    let replayed = answer.headers().contains_key("idempotent-replayed");
    let mut seen: Vec<String> = ["metcd-revision", "etag", "location"].iter().map(|&name| header(name)).collect();
    seen.insert(0, answer.status().as_u16().to_string());
    seen.push(answer.text().await.unwrap());
    (seen, replayed)
}

/// Method, target, `If-Match` and body.
type Mutation = (Method, &'static str, &'static str, &'static str);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_14_every_kind_of_mutation_gets_its_first_answer_again_after_all_members_were_killed() {
    let mut cluster = Cluster::start(Setup::of(3).set("raft.snapshot_entries=5").set("raft.keep_entries=1")).await;
    for key in ["old", "gone", "range/1", "range/2"] {
        assert!(cluster.put(1, key, "v").await.unwrap().is_success());
    }
    let txn = r#"{"compare":[{"key":"old","target":"version","op":"=","value":1}],"then":[{"put":{"key":"txn","value":"v"}},{"get":{"key":"old"}}]}"#;
    let mutations: [(Mutation, &str); 9] = [
        ((Method::PUT, "/new", "", "v"), "201"),
        ((Method::PUT, "/new?ttl=10m&prev=true", "", "v2"), "200"),
        ((Method::POST, "/v1/txn", "", txn), "200"),
        ((Method::PUT, "/old", "*", "v2"), "204"),
        ((Method::PUT, "/absent", "*", "v"), "412"),
        ((Method::DELETE, "/gone", "", ""), "204"),
        ((Method::DELETE, "/never", "", ""), "404"),
        ((Method::DELETE, "/v1/kv?prefix=range/", "", ""), "200"),
        ((Method::POST, "/v1/leases", "", r#"{"ttl":600}"#), "201"),
    ];
    let mut first = Vec::new();
    for (n, (mutation, status)) in mutations.iter().enumerate() {
        let (answer, replayed) = answer_to(&cluster, n as u64 % 3 + 1, mutation, &format!("once-{n}")).await;
        assert_eq!((answer[0].as_str(), replayed), (*status, false), "{mutation:?} {answer:?}");
        first.push(answer);
    }
    let (_, before) = cluster.call(Method::GET, 1, "/v1/hash", None).await;
    for node in &mut cluster.nodes {
        node.kill();
    }
    for node in &mut cluster.nodes {
        node.start();
    }
    cluster.all_ready().await;
    for (n, (mutation, _)) in mutations.iter().enumerate() {
        let (asked, key) = ((n as u64 + 1) % 3 + 1, format!("once-{n}"));
        let again = answer_to(&cluster, asked, mutation, &key).await;
        assert_eq!(again, (first[n].clone(), true), "{mutation:?} on member {asked}");
        // The one before, or the last, under this one's key.
        let (another, _) = &mutations[(n + mutations.len() - 1) % mutations.len()];
        let (refused, replayed) = answer_to(&cluster, asked, another, &key).await;
        assert_eq!((refused[0].as_str(), replayed), ("422", false), "{another:?}");
        assert!(refused[4].contains("\"idempotency_key_reused\""), "{refused:?}");
    }
    for id in cluster.ids() {
        assert_eq!(
            cluster.call(Method::GET, id, "/v1/hash", None).await.1,
            before,
            "nothing changed on member {id}"
        );
        let (_, leases) = cluster.call(Method::GET, id, "/v1/leases", None).await;
        // The one that was granted, and the one that belongs to its key.
        assert_eq!(leases["leases"].as_array().unwrap().len(), 2, "{leases}");
    }
}
