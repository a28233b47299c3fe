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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_member_stops_with_its_removal_on_its_own_disk() {
    let mut cluster = Cluster::start(Setup::of(3)).await;
    let leader = cluster.leader().await;
    let gone = leader % 3 + 1;
    let (status, answer) = cluster
        .call(Method::DELETE, leader, &format!("/members/{gone}?timeout=20s"), None)
        .await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(cluster.node(gone).ended(SOON).await.code(), Some(1));
    for node in &mut cluster.nodes {
        node.kill();
    }
    // Nobody is there to tell it.
    let first_run = cluster.node(gone).log_text().len();
    cluster.node(gone).start();
    assert_eq!(cluster.node(gone).ended(SOON).await.code(), Some(1));
    let log = cluster.node(gone).log_text().split_off(first_run);
    assert!(log.contains("was removed from the cluster: to come back"), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_id_added_by_hand_belongs_to_what_comes_from_its_address() {
    let mut cluster = Cluster::start(Setup::of(1)).await;
    let peer_url = cluster.joiner(Some(2)).peer_url.clone();
    let (status, answer) = cluster
        .call(Method::POST, 1, "/members", Some(json!({ "id": 2, "peer_url": peer_url })))
        .await;
    assert_eq!(status, 201, "{answer}");
    // Somebody else under this id, from another address: refused at the registration, and on the peer port.
    let impostor = cluster.joiner(Some(2));
    impostor.start();
    assert_eq!(impostor.ended(SOON).await.code(), Some(1));
    let cluster_id = cluster.get_json(1, "/members").await.unwrap()["cluster_id"]
        .as_str()
        .unwrap()
        .to_owned();
    let (http, peer_port) = (cluster.http.clone(), cluster.node(1).peer_port);
    let speak = |url: String| {
        let request = http.post(format!("http://127.0.0.1:{peer_port}/raft"));
        let request = request.header(
            "metcd-peer",
            format!("cluster={cluster_id};from=2;incarnation=0000000000000009;to=1"),
        );
        request.header("metcd-peer-url", url).send()
    };
    assert_eq!(speak("http://127.0.0.1:9".to_owned()).await.unwrap().status(), 412);
    cluster.nodes.pop();

    cluster.node(2).start();
    cluster.ready(2).await;
    assert_eq!(
        speak(peer_url).await.unwrap().status(),
        412,
        "the address alone is not enough once the directory is known"
    );
}
