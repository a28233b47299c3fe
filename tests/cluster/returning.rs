//! Members that were away while the cluster became another one.

use reqwest::Method;
use serde_json::json;

use crate::harness::{Cluster, SOON, Setup, eventually};
use crate::membership::voters_are;

/// 1, 2 and 3 found; 1 is away while 2 and 3 are replaced by 4 and 5.
async fn all_but_one_replaced() -> Cluster {
    let mut cluster = Cluster::start(Setup::of(3).set("raft.snapshot_entries=50").set("raft.keep_entries=5")).await;
    assert!(cluster.put(1, "before", "v").await.unwrap().is_success());
    cluster.node(1).kill();
    for (old, new, asked) in [(2, 4, 3), (3, 5, 4)] {
        let peer_url = cluster.joiner(Some(new)).peer_url.clone();
        cluster.node(new).start();
        let body = json!({ "remove": old, "add": { "id": new, "peer_url": peer_url } });
        let (status, answer) = cluster.call(Method::POST, asked, "/members/replace?timeout=25s", Some(body)).await;
        assert!(status == 200 || status == 202, "{status} {answer}");
        voters_are(&cluster, new, &if new == 4 { [1, 3, 4] } else { [1, 4, 5] }).await;
        assert_eq!(cluster.node(old).ended(SOON).await.code(), Some(1));
    }
    for number in 0..100 {
        assert!(cluster.put(4, &format!("while-away-{number}"), "v").await.unwrap().is_success());
    }
    cluster
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_28_a_member_catches_up_although_every_peer_it_knew_was_replaced() {
    let mut cluster = all_but_one_replaced().await;
    cluster.node(1).start();
    cluster.ready(1).await;
    assert_eq!(cluster.get(1, "while-away-99").await, (200, "v".to_owned()));
    cluster.same_content(&[1, 4, 5]).await;
    // It counts: the cluster goes on with it and one of the others.
    cluster.node(5).kill();
    eventually("writes by the rest", SOON, async || {
        cluster.put(1, "after", "v").await.ok()?.is_success().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_28_the_vote_of_a_member_whose_peers_were_all_replaced_counts() {
    let mut cluster = all_but_one_replaced().await;
    cluster.node(4).kill();
    cluster.node(5).kill();
    // Nobody leads, and 4 alone is no majority: the vote must come from 1, which does not know 4.
    cluster.node(4).start();
    cluster.node(1).start();
    assert_eq!(cluster.leader_of(&[1, 4]).await, 4, "1 lacks what was committed without it");
    cluster.ready(1).await;
    assert_eq!(cluster.get(1, "while-away-99").await, (200, "v".to_owned()));
}
