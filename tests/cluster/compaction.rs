//! History that is forgotten by itself, on all members at the same revision.

use std::path::Path;

use serde_json::{Value, json};

use crate::harness::{Cluster, SOON, Setup, eventually};

/// Writes one key so often, through all members in turn.
async fn write(cluster: &Cluster, ids: &[u64], values: std::ops::Range<usize>) {
    for value in values {
        let id = ids[value % ids.len()];
        assert!(cluster.put(id, "k", &format!("v{value}")).await.unwrap().is_success());
    }
}

/// Waits until each of these members has forgotten what is before `revision`, and nothing else; asks each of them for it.
async fn is_compacted_at(cluster: &Cluster, ids: &[u64], revision: u64, value: &str) {
    eventually(&format!("history before {revision} to be forgotten"), SOON, async || {
        let mut compacted = Vec::new();
        for &id in ids {
            compacted.push(cluster.status(id).await["compacted_revision"].as_u64());
        }
        compacted.iter().all(|at| *at == Some(revision)).then_some(())
    })
    .await;
    for &id in ids {
        let (status, problem) = cluster.get(id, &format!("k?revision={}", revision - 1)).await;
        assert_eq!(status, 410, "on member {id}: {problem}");
        let problem: Value = serde_json::from_str(&problem).unwrap();
        assert_eq!(problem["code"], "compacted", "on member {id}");
        assert_eq!(problem["compacted_revision"], revision, "on member {id}");
        let oldest = cluster.get(id, &format!("k?revision={revision}")).await;
        assert_eq!(oldest, (200, value.to_owned()), "on member {id}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn history_beyond_the_count_is_forgotten_by_itself_on_every_member_and_under_every_leader() {
    let mut cluster = Cluster::start(Setup::of(3).set("history.retain_revisions=10")).await;
    let all = cluster.ids();
    // An empty store is at revision 1.
    write(&cluster, &all, 0..50).await;
    is_compacted_at(&cluster, &all, 41, "v39").await;

    let leader = cluster.leader().await;
    cluster.node(leader).kill();
    let rest: Vec<u64> = all.iter().copied().filter(|&id| id != leader).collect();
    cluster.leader_of(&rest).await;
    write(&cluster, &rest, 50..70).await;
    is_compacted_at(&cluster, &rest, 61, "v59").await;
    cluster.node(leader).start();
    cluster.ready(leader).await;
    is_compacted_at(&cluster, &all, 61, "v59").await;
    cluster.same_content(&all).await;
}

/// Bytes of the snapshots that a member keeps.
fn snapshot_bytes(dir: &Path) -> u64 {
    let files = std::fs::read_dir(dir.join("snapshots")).unwrap();
    files.map(|file| file.unwrap().metadata().map_or(0, |file| file.len())).sum()
}

/// Of a store in memory, the disk has the snapshot: it goes with what it holds, although hardly anything is written.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_deleted_and_compacted_leaves_the_disk() {
    const KEYS: usize = 30;
    let mut cluster = Cluster::start(Setup::of(1).set("raft.snapshot_entries=25")).await;
    let dir = cluster.node(1).data_dir.clone();
    let value = "x".repeat(1_000_000);
    for key in 0..KEYS {
        assert!(cluster.put(1, &format!("k{key}"), &value).await.unwrap().is_success());
    }
    eventually("a snapshot of most of it", SOON, async || {
        (snapshot_bytes(&dir) > 17_500_000).then_some(())
    })
    .await;
    let (status, _) = cluster.call(reqwest::Method::DELETE, 1, "/v1/kv?prefix=k", None).await;
    assert_eq!(status, 200);
    let revision = cluster.status(1).await["revision"].clone();
    let (status, _) = cluster
        .call(reqwest::Method::POST, 1, "/v1/compact", Some(json!({ "revision": revision })))
        .await;
    assert_eq!(status, 200);
    // Not on the heels of the last one, whose making took its time.
    eventually("the snapshot to shrink", 4 * SOON, async || {
        (snapshot_bytes(&dir) < 1_000_000).then_some(())
    })
    .await;
}
