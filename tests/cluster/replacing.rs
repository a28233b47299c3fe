//! Members that take the place of others, while clients write.

use std::time::Duration;

use reqwest::Method;
use serde_json::json;

use crate::harness::{Cluster, SOON, Setup, eventually};
use crate::load::{Writers, check};
use crate::membership::voters_are;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replacement_goes_by_one_joint_change() {
    let mut cluster = Cluster::start(Setup::of(3)).await;
    let leader = cluster.leader().await;
    let writers = Writers::start_slow(&[cluster.url(leader % 3 + 1)], 8, "w", Duration::from_millis(5));
    writers.progress(50).await;
    // The leader itself is replaced, asked for on another member.
    let asked = leader % 3 + 1;
    let peer_url = cluster.joiner(Some(7)).peer_url.clone();
    cluster.node(7).start();
    let body = json!({ "remove": leader, "add": { "id": 7, "peer_url": peer_url } });
    let (status, answer) = cluster.call(Method::POST, asked, "/members/replace?timeout=20s", Some(body)).await;
    assert!(status == 200 || status == 202, "{status} {answer}");
    let mut wanted: Vec<u64> = (1..=3).filter(|&id| id != leader).collect();
    wanted.push(7);
    voters_are(&cluster, asked, &wanted).await;
    assert_eq!(cluster.node(leader).ended(SOON).await.code(), Some(1));
    cluster.ready(7).await;
    let record = writers.stop().await;
    assert!(
        record.unknown.is_empty() && record.refused.is_empty(),
        "{:?} {:?}",
        record.unknown.first(),
        record.refused.first()
    );
    check(&cluster, 7, "w", &record).await;
    cluster.same_content(&wanted).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_the_leader_was_replaced_its_successor_may_die_too_and_nothing_acknowledged_is_lost() {
    let mut cluster = Cluster::start(Setup::of(3)).await;
    let leader = cluster.leader().await;
    let (asked, dies) = (leader % 3 + 1, (leader + 1) % 3 + 1);
    let peer_url = cluster.joiner(Some(7)).peer_url.clone();
    let writers = Writers::start(&[cluster.url(asked)], 16, "w");
    writers.progress(100).await;
    cluster.node(7).start();
    let body = json!({ "remove": leader, "add": { "id": 7, "peer_url": peer_url } });
    let (status, answer) = cluster.call(Method::POST, asked, "/members/replace?timeout=25s", Some(body)).await;
    assert_eq!(status, 200, "{answer}");
    let mut voters = [asked, dies, 7];
    voters.sort_unstable();
    voters_are(&cluster, asked, &voters).await;
    // What was written before is now on a majority only with the new member, or with the one that is killed while it leads.
    eventually("the other founder to lead", SOON, async || {
        let _ = cluster.call(Method::POST, asked, "/leader", Some(json!({ "id": dies }))).await;
        (cluster.status(asked).await["leader"] == dies).then_some(())
    })
    .await;
    writers.progress(100).await;
    cluster.node(dies).kill();
    writers.progress(100).await;
    let record = writers.stop().await;
    assert!(record.unknown.is_empty(), "{:?}", record.unknown.first());
    assert!(record.refused.is_empty(), "{:?}", record.refused.first());
    assert_eq!(cluster.node(leader).ended(SOON).await.code(), Some(1));
    for id in [asked, 7] {
        check(&cluster, id, "w", &record).await;
    }
    cluster.node(dies).start();
    cluster.ready(dies).await;
    check(&cluster, dies, "w", &record).await;
    cluster.same_content(&voters).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_is_there_already_replaces_another_one() {
    let mut cluster = Cluster::start(Setup::of(3)).await;
    let leader = cluster.leader().await;
    let peer_url = cluster.joiner(Some(4)).peer_url.clone();
    cluster.node(4).start();
    cluster.ready(4).await;
    let body = json!({ "remove": leader, "add": { "id": 4, "peer_url": peer_url } });
    let (status, answer) = cluster.call(Method::POST, 4, "/members/replace?timeout=25s", Some(body)).await;
    assert_eq!((status, answer["id"].as_u64()), (200, Some(4)), "{answer}");
    let rest: Vec<u64> = (1..=4).filter(|&id| id != leader).collect();
    voters_are(&cluster, 4, &rest).await;
    assert_eq!(cluster.node(leader).ended(SOON).await.code(), Some(1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_joined_before_the_request_for_its_pair_came_replaces_too() {
    let mut cluster = Cluster::start(Setup::of(3)).await;
    let leader = cluster.leader().await;
    let peer_url = cluster.joiner(Some(7)).peer_url.clone();
    cluster.node(7).start();
    voters_are(&cluster, leader, &[1, 2, 3, 7]).await;
    let gone = leader % 3 + 1;
    let body = json!({ "remove": gone, "add": { "id": 7, "peer_url": peer_url } });
    let (status, answer) = cluster.call(Method::POST, leader, "/members/replace?timeout=20s", Some(body)).await;
    assert_eq!(status, 200, "{answer}");
    let wanted: Vec<u64> = [1, 2, 3, 7].into_iter().filter(|&id| id != gone).collect();
    voters_are(&cluster, leader, &wanted).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replacement_that_one_leader_began_is_completed_by_the_next() {
    let mut cluster = Cluster::start(Setup::of(3)).await;
    let leader = cluster.leader().await;
    let (gone, stays) = (leader % 3 + 1, (leader + 1) % 3 + 1);
    assert!(cluster.put(gone, "k", "v").await.unwrap().is_success());
    let peer_url = cluster.joiner(Some(7)).peer_url.clone();
    let body = json!({ "remove": gone, "add": { "id": 7, "peer_url": peer_url } });
    let (status, answer) = cluster
        .call(Method::POST, stays, "/members/replace?timeout=500ms", Some(body))
        .await;
    assert_eq!((status, answer["id"].as_u64()), (202, Some(7)), "{answer}");
    cluster.node(leader).kill();
    // Nobody asks again: whoever leads now goes on by itself.
    cluster.node(7).start();
    let mut wanted = [leader, stays, 7];
    wanted.sort_unstable();
    voters_are(&cluster, stays, &wanted).await;
    assert_eq!(cluster.node(gone).ended(SOON).await.code(), Some(1));
    cluster.ready(7).await;
    assert_eq!(cluster.get(7, "k").await, (200, "v".to_owned()));
    cluster.node(leader).start();
    cluster.ready(leader).await;
    voters_are(&cluster, leader, &wanted).await;
    assert!(cluster.put(leader, "k", "w").await.unwrap().is_success());
    cluster.same_content(&wanted).await;
}

/// Otherwise a cluster of three would end as one of two.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_replaces_one_other_and_not_two() {
    let mut cluster = Cluster::start(Setup::of(3)).await;
    let leader = cluster.leader().await;
    let (first, second) = (leader % 3 + 1, (leader + 1) % 3 + 1);
    let peer_url = cluster.joiner(Some(4)).peer_url.clone();
    let body = |remove: u64| Some(json!({ "remove": remove, "add": { "id": 4, "peer_url": peer_url } }));
    let (status, answer) = cluster
        .call(Method::POST, leader, "/members/replace?timeout=300ms", body(first))
        .await;
    assert_eq!(status, 202, "{answer}");
    for on in [leader, second] {
        let (status, answer) = cluster.call(Method::POST, on, "/members/replace?timeout=25s", body(second)).await;
        assert_eq!((status, &answer["code"]), (409, &json!("change_in_progress")), "{answer}");
    }
    cluster.node(4).start();
    let (status, answer) = cluster
        .call(Method::POST, leader, "/members/replace?timeout=25s", body(first))
        .await;
    assert_eq!(status, 200, "{answer}");
    voters_are(&cluster, leader, &[leader.min(second), leader.max(second), 4]).await;
}

/// Otherwise both would come to vote, and a cluster of three would end as one of four.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_is_replaced_by_one_other_and_not_by_two() {
    let mut cluster = Cluster::start(Setup::of(3)).await;
    let leader = cluster.leader().await;
    let gone = leader % 3 + 1;
    let newcomers = [7, 8].map(|id| (id, cluster.joiner(Some(id)).peer_url.clone()));
    let replace = async |(id, peer_url): &(u64, String), timeout: &str| {
        let body = json!({ "remove": gone, "add": { "id": id, "peer_url": peer_url } });
        let path = format!("/members/replace?timeout={timeout}");
        cluster.call(Method::POST, leader, &path, Some(body)).await
    };
    let answers = tokio::join!(replace(&newcomers[0], "1s"), replace(&newcomers[1], "1s"));
    let answers = [answers.0, answers.1];
    let at = answers.iter().position(|(status, _)| *status == 202).expect("one is under way");
    let (status, refused) = &answers[1 - at];
    assert_eq!((*status, &refused["code"]), (409, &json!("change_in_progress")), "{refused}");
    let (taken, other) = (newcomers[at].0, newcomers[1 - at].0);
    let advice = format!("DELETE /members/{taken}");
    assert!(refused["detail"].as_str().unwrap().contains(&advice), "{refused}");

    // It can be given up in favour of the other.
    let (status, answer) = cluster.call(Method::DELETE, leader, &format!("/members/{taken}"), None).await;
    assert_eq!(status, 200, "{answer}");
    let (status, answer) = replace(&newcomers[1 - at], "1s").await;
    assert_eq!(status, 202, "{answer}");
    cluster.node(other).start();
    let mut wanted: Vec<u64> = (1..=3).filter(|&id| id != gone).collect();
    wanted.push(other);
    voters_are(&cluster, leader, &wanted).await;
}

/// Of two requests at once that name a member which votes already, one takes it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_is_there_already_replaces_one_other_and_not_two() {
    let mut cluster = Cluster::start(Setup::of(3)).await;
    let leader = cluster.leader().await;
    let peer_url = cluster.joiner(Some(7)).peer_url.clone();
    cluster.node(7).start();
    voters_are(&cluster, leader, &[1, 2, 3, 7]).await;
    let others = [leader % 3 + 1, (leader + 1) % 3 + 1];
    let replace = async |remove: u64| {
        let body = json!({ "remove": remove, "add": { "id": 7, "peer_url": peer_url } });
        cluster.call(Method::POST, leader, "/members/replace?timeout=20s", Some(body)).await
    };
    let (one, two) = tokio::join!(replace(others[0]), replace(others[1]));
    let mut statuses = [one.0, two.0];
    statuses.sort_unstable();
    assert_eq!(statuses, [200, 409], "{one:?} {two:?}");
    let stays = if one.0 == 409 { others[0] } else { others[1] };
    let mut wanted = vec![leader, stays, 7];
    wanted.sort_unstable();
    voters_are(&cluster, leader, &wanted).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_founding_voter_replaces_nobody() {
    let cluster = Cluster::start(Setup::of(3)).await;
    let peer_url = cluster.nodes[2].peer_url.clone();
    for add in [json!({ "id": 3, "peer_url": peer_url }), json!({ "peer_url": peer_url })] {
        let body = json!({ "remove": 2, "add": add });
        let (status, answer) = cluster.call(Method::POST, 1, "/members/replace", Some(body)).await;
        assert_eq!((status, &answer["code"]), (409, &json!("member_exists")), "{answer}");
    }
    voters_are(&cluster, 1, &[1, 2, 3]).await;
}
