//! `/v1/hash`: equal on all members for one revision, whatever they store it in and whatever happened to them.

use reqwest::Method;

use crate::harness::{Cluster, SOON, Setup, eventually};
use crate::load::Writers;

/// The content's hash at a revision, as a member recomputes it from what it has stored; without one, as it keeps it while it applies.
async fn hash(cluster: &Cluster, id: u64, revision: Option<u64>) -> (u64, String) {
    let query = revision.map_or_else(String::new, |revision| format!("?revision={revision}"));
    let (status, answer) = cluster.call(Method::GET, id, &format!("/v1/hash{query}"), None).await;
    assert_eq!(status, 200, "{answer}");
    (answer["revision"].as_u64().unwrap(), answer["hash"].as_str().unwrap().to_owned())
}

/// Takes a revision from one member under load, and has all of them tell its hash. Returns it.
async fn agreed(cluster: &Cluster, from: u64) -> (u64, String) {
    let kept = hash(cluster, from, None).await;
    // There is more by now.
    assert!(cluster.put(from, "later", &kept.1).await.unwrap().is_success());
    for id in cluster.ids() {
        assert_eq!(hash(cluster, id, Some(kept.0)).await, kept, "member {id}, told by {from}");
    }
    kept
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_hash_of_a_revision_is_the_same_on_every_member_and_engine_under_load_and_after_restarts() {
    let mut cluster = Cluster::prepare(Setup::of(3).set("raft.snapshot_entries=50").set("raft.keep_entries=10")).await;
    let third = if cfg!(feature = "rocksdb") { "rocksdb" } else { "memory" };
    for (id, store) in [(1, "memory"), (2, "sled"), (3, third)] {
        let node = cluster.node(id);
        node.drop_args("--store");
        node.add_args(&["--store", store]);
        node.start();
    }
    cluster.all_ready().await;
    let mut told = Vec::new();
    for restarted in 1..=3 {
        let stays = restarted % 3 + 1;
        let writers = Writers::start(&[cluster.url(stays)], 8, &format!("w{restarted}-"));
        writers.progress(100).await;
        for from in cluster.ids() {
            told.push(agreed(&cluster, from).await);
        }
        // Every kind of change, not only new keys: a rewrite, a lease's key, a deletion of many.
        assert!(cluster.put(stays, "leased?ttl=10m", "v").await.unwrap().is_success());
        let deleted = cluster
            .call(Method::DELETE, stays, &format!("/v1/kv?prefix=w{restarted}-1"), None)
            .await;
        assert_eq!(deleted.0, 200, "{}", deleted.1);
        cluster.node(restarted).kill();
        writers.progress(100).await;
        cluster.node(restarted).start();
        cluster.ready(restarted).await;
        told.push(agreed(&cluster, restarted).await);
        writers.progress(50).await;
        writers.stop().await;
    }
    // What was once told of a revision stays true of it on all of them.
    for kept in &told {
        for id in cluster.ids() {
            assert_eq!(hash(&cluster, id, Some(kept.0)).await, *kept, "member {id}");
        }
    }
    told.dedup_by(|one, other| one.1 == other.1);
    assert!(told.len() > 9, "the content changed between the looks: {told:?}");
    eventually("one hash of now", SOON, async || {
        let now = [
            hash(&cluster, 1, None).await,
            hash(&cluster, 2, None).await,
            hash(&cluster, 3, None).await,
        ];
        now.windows(2).all(|pair| pair[0] == pair[1]).then_some(())
    })
    .await;
}
