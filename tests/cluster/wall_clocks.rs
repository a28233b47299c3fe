//! A machine whose clock is wrong, and is set while its member runs: nothing that the cluster decides may notice.

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::json;

use crate::harness::{Cluster, SOON, Setup, eventually};
use crate::wrong_clock::WallClock;

const LEASE: Duration = Duration::from_secs(4);

/// The year in which a member believes to be, as its answers' `Date` has it.
async fn year(cluster: &Cluster, id: u64) -> u32 {
    let answer = cluster.http.get(format!("{}/livez", cluster.url(id))).send().await.unwrap();
    let date = answer.headers()["date"].to_str().unwrap();
    let year = date.split(' ').nth(3).unwrap_or_else(|| panic!("{date}"));
    year.parse().unwrap_or_else(|error| panic!("{date}: {error}"))
}

async fn hand_over(cluster: &Cluster, to: u64) {
    let (status, answer) = cluster.call(Method::POST, 2, "/leader", Some(json!({ "id": to }))).await;
    assert_eq!((status, answer["id"].as_u64()), (200, Some(to)), "{answer}");
}

/// A new lease with a key of this name.
async fn grant(cluster: &Cluster, key: &str) {
    let ttl = Some(json!({ "ttl": LEASE.as_secs() }));
    let (status, lease) = cluster.call(Method::POST, 2, "/v1/leases", ttl).await;
    assert_eq!(status, 201, "{lease}");
    let put = format!("{key}?lease={}", lease["id"].as_str().unwrap());
    assert!(cluster.put(3, &put, "v").await.unwrap().is_success());
}

/// Waits for the end of a lease by its key; it has to be whole since `begun`.
async fn ends_whole(cluster: &Cluster, key: &str, begun: Instant) {
    let lived = eventually("the lease to end", SOON, async || {
        let (status, _) = cluster.get(2, &format!("{key}?timeout=10s")).await;
        assert!(status == 200 || status == 404, "{status}");
        (status == 404).then(|| begun.elapsed())
    })
    .await;
    println!("FIG {key}: a lease of {LEASE:?} ended after {lived:?}");
    assert!(lived >= LEASE, "{key} ended after {lived:?}");
}

/// Whether a PUT under an idempotency key is answered as the first time.
async fn is_replayed(cluster: &Cluster, id: u64) -> bool {
    let put = cluster.http.put(format!("{}/once", cluster.url(id)));
    let answer = put.header("idempotency-key", "once").body("v").send().await.unwrap();
    assert_eq!(answer.status(), 201, "the first answer, and each time the same");
    answer.headers().contains_key("idempotent-replayed")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_and_an_answer_are_kept_for_their_time_although_the_leaders_wall_clock_jumps_by_a_year() {
    let mut cluster = Cluster::prepare(Setup::of(3)).await;
    let Some(clock) = WallClock::of(&mut cluster, 1) else {
        return;
    };
    for node in &mut cluster.nodes {
        node.start();
    }
    cluster.all_ready().await;
    hand_over(&cluster, 1).await;
    assert!(!is_replayed(&cluster, 3).await);

    // By the wall's clock it is over at once.
    let begun = Instant::now();
    grant(&cluster, "forward").await;
    clock.set("+366d");
    let right = year(&cluster, 2).await;
    eventually("the clock to be wrong", SOON, async || {
        (year(&cluster, 1).await > right).then_some(())
    })
    .await;
    ends_whole(&cluster, "forward", begun).await;

    // By the wall's clock it would last for two years.
    let begun = Instant::now();
    grant(&cluster, "back").await;
    clock.set("-366d");
    ends_whole(&cluster, "back", begun).await;

    // What a leader with a wrong clock granted ends under one with a right clock, and the other way round.
    for (key, from, to) in [("to a right clock", 1, 2), ("to a wrong clock", 2, 1)] {
        let key = key.replace(' ', "-");
        hand_over(&cluster, from).await;
        grant(&cluster, &key).await;
        let begun = Instant::now();
        hand_over(&cluster, to).await;
        ends_whole(&cluster, &key, begun).await;
    }
    // An answer's `Date` is made anew only when time goes on; the log has written down the changes of the leader.
    let log = cluster.node(1).log_text();
    let is_set_back = |years: u32| log.contains(&format!("\nnode1 {}-", right - years));
    // On the first of January 366 days are two years.
    assert!(is_set_back(1) || is_set_back(2), "the clock was never set back: {log}");
    for id in cluster.ids() {
        assert!(is_replayed(&cluster, id).await, "on member {id}");
    }
    cluster.same_content(&cluster.ids()).await;
}
