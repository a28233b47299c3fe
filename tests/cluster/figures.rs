//! What `/metrics` says of members that are away and come back.

use std::time::Duration;

use crate::harness::{Cluster, SOON, Setup, eventually};
use crate::load::{Writers, check};

/// A sample of a member's `/metrics`, by its name and labels.
async fn sample(cluster: &Cluster, id: u64, name: &str) -> Option<f64> {
    let page = cluster.http.get(format!("{}/metrics", cluster.url(id))).send().await.ok()?;
    let page = page.text().await.ok()?;
    let value = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
    value.parse().ok()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_lag_of_a_member_that_is_away_grows_and_its_way_back_by_snapshot_is_counted() {
    const INSTALLED: &str = "metcd_snapshot_duration_seconds_count{kind=\"install\"}";
    const SENT: &str = "metcd_snapshot_duration_seconds_count{kind=\"send\"}";
    let setup = Setup::of(3).set("raft.snapshot_entries=100").set("raft.keep_entries=20");
    let mut cluster = Cluster::start(setup).await;
    let leader = cluster.leader().await;
    let (away, here) = (leader % 3 + 1, (leader + 1) % 3 + 1);
    let of_peer = |name: &str, id: u64| format!("metcd_peer_{name}{{id=\"{id}\"}}");
    assert_eq!(sample(&cluster, away, INSTALLED).await, Some(0.0));
    let writers = Writers::start_slow(&[cluster.url(leader)], 8, "w", Duration::from_millis(2));
    writers.progress(50).await;

    cluster.node(away).kill();
    let mut lag = 0.0;
    for more in [50.0, 200.0] {
        lag = eventually("the lag to grow", SOON, async || {
            let now = sample(&cluster, leader, &of_peer("lag_entries", away)).await?;
            (now >= lag + more).then_some(now)
        })
        .await;
    }
    eventually("it to be seen as away", SOON, async || {
        (sample(&cluster, leader, &of_peer("active", away)).await? == 0.0).then_some(())
    })
    .await;
    eventually("the other one to be seen as there", SOON, async || {
        (sample(&cluster, leader, &of_peer("active", here)).await? == 1.0).then_some(())
    })
    .await;
    // Only a snapshot brings it back then.
    let applied = cluster.status(leader).await["applied_index"].as_u64().unwrap();
    eventually("the log to be cut", SOON, async || {
        (cluster.status(leader).await["wal"]["first_index"].as_u64()? > applied).then_some(())
    })
    .await;
    cluster.node(away).start();
    cluster.ready(away).await;
    eventually("the installation to be counted", SOON, async || {
        (sample(&cluster, away, INSTALLED).await? >= 1.0).then_some(())
    })
    .await;
    let record = writers.stop().await;
    check(&cluster, away, "w", &record).await;
    eventually("the transfer to be counted by whoever sent it", SOON, async || {
        (sample(&cluster, leader, SENT).await? >= 1.0).then_some(())
    })
    .await;
    eventually("the lag to end", SOON, async || {
        (sample(&cluster, leader, &of_peer("lag_entries", away)).await? == 0.0).then_some(())
    })
    .await;
}
