//! Members that come and go, while clients write. How one takes the place of another is in `replacing.rs`.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::harness::{Cluster, SOON, Setup, copy_dir, eventually};
use crate::load::{Record, Writers, check};

async fn roles(cluster: &Cluster, asked: u64) -> Option<Vec<(u64, String)>> {
    let table = cluster.get_json(asked, "/members").await?;
    let roles = table["members"].as_array()?.iter();
    Some(
        roles
            .filter_map(|m| Some((m["id"].as_u64()?, m["role"].as_str()?.to_owned())))
            .collect(),
    )
}

/// Waits until `asked` knows exactly these voters and nobody else.
pub async fn voters_are(cluster: &Cluster, asked: u64, voters: &[u64]) {
    let wanted: Vec<(u64, String)> = voters.iter().map(|&id| (id, "voter".to_owned())).collect();
    eventually(&format!("voters {voters:?}"), SOON, async || {
        let mut found = roles(cluster, asked).await?;
        found.sort_unstable();
        (found == wanted).then_some(())
    })
    .await;
}

fn assert_unharmed(record: &Record) {
    assert!(record.refused.is_empty(), "refused {:?}", record.refused.first());
    assert!(record.unknown.is_empty(), "unknown {:?}", record.unknown.first());
}

/// `DELETE`, waiting out a change that is under way.
async fn remove(cluster: &Cluster, asked: u64, id: u64) -> (u16, Value) {
    cluster
        .call(Method::DELETE, asked, &format!("/members/{id}?timeout=20s"), None)
        .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_becomes_three_becomes_five_becomes_three_under_load() {
    let mut cluster = Cluster::start(Setup::of(1)).await;
    let founders = Writers::start_slow(&[cluster.url(1)], 8, "v", Duration::from_millis(5));
    founders.progress(100).await;

    // By --join alone, with an id and without.
    cluster.joiner(Some(2)).start();
    cluster.ready(2).await;
    let joiner = cluster.joiner(None);
    joiner.start();
    let client_port = joiner.client_port;
    let id = eventually("the assigned id", SOON, async || {
        let status: Value = cluster
            .http
            .get(format!("http://127.0.0.1:{client_port}/status"))
            .send()
            .await
            .ok()?
            .json()
            .await
            .ok()?;
        status["id"].as_u64().filter(|&id| id != 0)
    })
    .await;
    assert_eq!(id, 3);
    cluster.nodes.last_mut().unwrap().id = 3;
    // Answers that are given below HTTP name it too, although it had no id when it began to listen.
    let mut stream = TcpStream::connect(("127.0.0.1", client_port)).await.unwrap();
    stream.write_all(b"no request\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    timeout(SOON, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert!(
        answer.starts_with("HTTP/1.1 400 ") && answer.contains("metcd-member: 3\r\n"),
        "{answer}"
    );
    voters_are(&cluster, 1, &[1, 2, 3]).await;

    // Through those that stay: member 1 is removed later.
    let writers = Writers::start_slow(&[cluster.url(2), cluster.url(3)], 16, "w", Duration::from_millis(5));
    founders.progress(50).await;
    let founding = founders.stop().await;
    assert_unharmed(&founding);
    writers.progress(100).await;

    // By hand first, then started with --join.
    for id in [4, 5] {
        let peer_url = cluster.joiner(Some(id)).peer_url.clone();
        let body = json!({ "id": id, "peer_url": peer_url });
        let (status, answer) = cluster.call(Method::POST, 2, "/members", Some(body.clone())).await;
        assert_eq!((status, answer["id"].as_u64()), (201, Some(id)), "{answer}");
        let (status, answer) = cluster.call(Method::POST, 3, "/members", Some(body)).await;
        assert_eq!((status, answer["id"].as_u64()), (200, Some(id)), "posting the same again: {answer}");
        cluster.node(id).start();
        cluster.ready(id).await;
    }
    voters_are(&cluster, 3, &[1, 2, 3, 4, 5]).await;
    check_all_members_named(&cluster).await;

    // The leader goes, and one more.
    let (leader, second, asked) = (1, 5, 2);
    eventually("the founder to lead", SOON, async || {
        let _ = cluster.call(Method::POST, asked, "/leader", Some(json!({ "id": leader }))).await;
        (cluster.status(asked).await["leader"] == leader).then_some(())
    })
    .await;
    for gone in [leader, second] {
        let (status, answer) = remove(&cluster, asked, gone).await;
        assert_eq!(status, 200, "{answer}");
        writers.progress(100).await;
        let ended = cluster.node(gone).ended(SOON).await;
        assert_eq!(ended.code(), Some(1), "a removed member ends as refused");
        let log = cluster.node(gone).log_text();
        assert!(log.contains(&format!("member {gone} was removed from the cluster")), "{log}");
    }
    let rest: Vec<u64> = cluster.ids().into_iter().filter(|&id| id != leader && id != second).collect();
    voters_are(&cluster, asked, &rest).await;
    let record = writers.stop().await;
    assert_unharmed(&record);
    println!(
        "membership walk: {} writes, longest gap {:?}",
        record.acknowledged.len(),
        record.longest_gap()
    );
    for id in &rest {
        check(&cluster, *id, "v", &founding).await;
        check(&cluster, *id, "w", &record).await;
    }

    // An id is never used again; an address that is taken is not given away.
    let body = json!({ "id": leader, "peer_url": "http://127.0.0.1:9" });
    let (status, answer) = cluster.call(Method::POST, asked, "/members", Some(body)).await;
    assert_eq!((status, answer["code"].as_str()), (409, Some("member_id_used")));
    let body = json!({ "id": asked, "peer_url": "http://127.0.0.1:9" });
    let (status, answer) = cluster.call(Method::POST, asked, "/members", Some(body)).await;
    assert_eq!((status, answer["code"].as_str()), (409, Some("member_exists")));
    assert_eq!(remove(&cluster, asked, leader).await.0, 404);

    // A removed member that is started again is told so.
    cluster.node(second).start();
    assert_eq!(cluster.node(second).ended(SOON).await.code(), Some(1));

    // A restart takes the membership from the data, not from the founding list.
    for &id in &rest {
        cluster.node(id).kill();
    }
    for &id in &rest {
        cluster.node(id).start();
    }
    for &id in &rest {
        cluster.ready(id).await;
    }
    voters_are(&cluster, asked, &rest).await;
    cluster.same_content(&rest).await;
}

async fn check_all_members_named(cluster: &Cluster) {
    eventually("every member's name and client URL", SOON, async || {
        let table = cluster.get_json(2, "/members").await?;
        let members = table["members"].as_array()?;
        let named =
            |m: &Value| m["name"].as_str().is_some_and(|s| !s.is_empty()) && m["client_url"].as_str().is_some_and(|s| !s.is_empty());
        let healthy = |m: &Value| m["healthy"].as_bool() == Some(true);
        (members.len() == 5 && members.iter().all(|m| named(m) && healthy(m))).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_24_the_last_voter_and_the_reachable_quorum_stay() {
    let mut cluster = Cluster::start(Setup::of(3)).await;
    let leader = cluster.leader().await;
    let dead = leader % 3 + 1;
    let alive = dead % 3 + 1;
    cluster.node(dead).kill();
    // At once: the leader may not take it for alive any more.
    let (status, answer) = cluster.call(Method::DELETE, leader, &format!("/members/{alive}"), None).await;
    assert_eq!((status, answer["code"].as_str()), (409, Some("unsafe_change")), "{answer}");
    // The dead one may go; then there are two, and one of them may go as well, but not the last.
    let (status, answer) = remove(&cluster, leader, dead).await;
    assert_eq!(status, 200, "{answer}");
    voters_are(&cluster, leader, &{
        let mut rest = [leader, alive];
        rest.sort_unstable();
        rest
    })
    .await;
    let (status, answer) = remove(&cluster, leader, alive).await;
    assert_eq!(status, 200, "{answer}");
    cluster.node(alive).ended(SOON).await;
    let (status, answer) = remove(&cluster, leader, leader).await;
    assert_eq!((status, answer["code"].as_str()), (409, Some("unsafe_change")));
    let (status, answer) = cluster
        .call(Method::DELETE, leader, &format!("/members/{leader}?force=true"), None)
        .await;
    assert_eq!(
        (status, answer["code"].as_str()),
        (409, Some("unsafe_change")),
        "not even by force: {answer}"
    );
    assert!(cluster.put(leader, "k", "v").await.unwrap().is_success());
}

/// Where in a member's log it says this first, with these fields, after the line at `from`.
fn line_of(log: &str, from: usize, parts: &[&str]) -> Option<usize> {
    let mut lines = log.lines().enumerate().skip(from);
    lines.find_map(|(at, line)| parts.iter().all(|part| line.contains(part)).then_some(at))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_24_a_leader_hands_over_before_it_is_removed_and_no_request_fails() {
    let mut cluster = Cluster::start(Setup::of(3)).await;
    let leader = cluster.leader().await;
    let rest: Vec<u64> = cluster.ids().into_iter().filter(|&id| id != leader).collect();
    let urls: Vec<String> = rest.iter().map(|&id| cluster.url(id)).collect();
    let writers = Writers::start(&urls, 8, "w");
    writers.progress(200).await;
    let term = cluster.status(leader).await["term"].as_u64().unwrap();
    let (status, answer) = remove(&cluster, rest[0], leader).await;
    assert_eq!(status, 200, "{answer}");
    writers.progress(200).await;
    let record = writers.stop().await;
    println!("removal of the leader: longest gap {:?}", record.longest_gap());
    assert_unharmed(&record);
    assert_eq!(cluster.node(leader).ended(SOON).await.code(), Some(1));
    voters_are(&cluster, rest[0], &rest).await;
    check(&cluster, rest[1], "w", &record).await;

    // Nobody waited until it was missed: it led until another one did, and was removed as a follower.
    let log = cluster.node(leader).log_text();
    let led = line_of(&log, 0, &["became leader", &format!("term={term}")]).expect("it led");
    let followed = line_of(&log, led, &["follows a leader", &format!("term={}", term + 1)]);
    let removed = line_of(&log, led, &["this member was removed"]);
    assert!(followed.is_some() && removed > followed, "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_24_force_removes_a_member_that_the_reachable_quorum_needs() {
    let mut cluster = Cluster::start(Setup::of(3)).await;
    let leader = cluster.leader().await;
    let (dead, alive) = (leader % 3 + 1, (leader + 1) % 3 + 1);
    assert!(cluster.put(leader, "k", "v").await.unwrap().is_success());
    cluster.node(dead).kill();
    let (status, answer) = cluster.call(Method::DELETE, leader, &format!("/members/{alive}"), None).await;
    assert_eq!((status, answer["code"].as_str()), (409, Some("unsafe_change")), "{answer}");
    let (status, answer) = cluster
        .call(Method::DELETE, leader, &format!("/members/{alive}?force=true&timeout=20s"), None)
        .await;
    assert_eq!(status, 200, "{answer}");
    // One of the two that remain is dead: there is no quorum until it is back.
    cluster.node(dead).start();
    cluster.ready(dead).await;
    let mut rest = [leader, dead];
    rest.sort_unstable();
    voters_are(&cluster, dead, &rest).await;
    assert_eq!(cluster.node(alive).ended(SOON).await.code(), Some(1));
    assert_eq!(cluster.get(dead, "k").await, (200, "v".to_owned()));
    assert!(cluster.put(leader, "k", "w").await.unwrap().is_success());
    cluster.same_content(&rest).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_learner_that_nobody_reaches_is_not_promoted() {
    let cluster = Cluster::start(Setup::of(3)).await;
    // Nobody listens there.
    let body = json!({ "id": 4, "peer_url": "http://127.0.0.1:9", "role": "learner" });
    let (status, answer) = cluster.call(Method::POST, 1, "/members", Some(body)).await;
    assert_eq!(status, 201, "{answer}");
    for asked in 1..=3 {
        let (status, answer) = cluster.call(Method::POST, asked, "/members/4/promote", None).await;
        assert_eq!((status, answer["code"].as_str()), (409, Some("unsafe_change")), "{answer}");
    }
    let mut roles = roles(&cluster, 1).await.unwrap();
    roles.sort_unstable();
    let voter = |id| (id, "voter".to_owned());
    assert_eq!(roles, [voter(1), voter(2), voter(3), (4, "learner".to_owned())]);
}

/// Of the others, the leader knows how much of its log they have; of a member that is dead, how much it had.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn match_index_is_how_much_of_the_log_a_member_has() {
    let mut cluster = Cluster::start(Setup::of(3)).await;
    let leader = cluster.leader().await;
    let others: Vec<u64> = cluster.ids().into_iter().filter(|&id| id != leader).collect();
    let (dead, alive) = (others[0], others[1]);
    let match_index = |table: &Value, id: u64| {
        let members = table["members"].as_array().unwrap();
        members.iter().find(|member| member["id"] == id).unwrap()["match_index"].as_u64()
    };
    cluster.node(dead).kill();
    let before = cluster.status(leader).await["wal"]["last_index"].as_u64().unwrap();
    for n in 0..20 {
        assert!(cluster.put(leader, "k", &n.to_string()).await.unwrap().is_success());
    }
    let written = cluster.status(leader).await["applied_index"].as_u64().unwrap();
    assert!(written >= before + 20);
    eventually("the one alive to have everything", SOON, async || {
        let table = cluster.get_json(alive, "/members").await?;
        assert!(match_index(&table, dead)? <= before, "{table}");
        (match_index(&table, alive)? >= written).then_some(())
    })
    .await;
    cluster.node(dead).start();
    cluster.ready(dead).await;
    eventually("the other one to have everything, too", SOON, async || {
        let table = cluster.get_json(leader, "/members").await?;
        (match_index(&table, dead)? >= written).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn healthy_members_are_healthy_at_every_look_and_any_of_them_may_go() {
    let cluster = Cluster::start(Setup::of(3)).await;
    let leader = cluster.leader().await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    // Raft forgets whom it heard of once per election timeout: looks over three of them.
    for _ in 0..150 {
        let table = cluster.get_json(leader, "/members").await.unwrap();
        for member in table["members"].as_array().unwrap() {
            assert_eq!(member["healthy"], true, "{table}");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_21_of_changes_at_once_each_takes_effect_or_is_refused() {
    let cluster = Cluster::start(Setup::of(3)).await;
    for round in 0..3 {
        let adding = (1..=8).map(|n| {
            let id = 10 * (round + 1) + n;
            // Nobody listens there: they stay learners that were never heard of.
            let body = json!({ "id": id, "peer_url": format!("http://127.0.0.1:{}", 1_000 + id), "role": "learner" });
            // Some do not wait for the others' changes to be done.
            let timeout = if n % 2 == 0 { "20s" } else { "60ms" };
            let path = format!("/members?timeout={timeout}");
            let cluster = &cluster;
            async move { (id, cluster.call(Method::POST, id % 3 + 1, &path, Some(body)).await) }
        });
        let answers = futures_util::future::join_all(adding).await;
        let present: Vec<u64> = roles(&cluster, 1).await.unwrap().into_iter().map(|(id, _)| id).collect();
        assert!(answers.iter().any(|(_, (status, _))| *status == 201), "{answers:?}");
        for (id, (status, answer)) in answers {
            match status {
                201 => assert!(present.contains(&id), "{id} was added, and is not there: {answer}"),
                409 => assert!(!present.contains(&id), "{id} was refused, and is there: {answer}"),
                // Not known at the deadline, or never begun.
                503 | 504 => {}
                other => panic!("{other} {answer}"),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_21_a_change_that_another_one_outlasts_is_told_so_and_not_made() {
    let cluster = Cluster::start(Setup::of(3).proxied()).await;
    let leader = cluster.leader().await;
    // What is agreed on takes longer than the second one waits.
    for id in cluster.ids().into_iter().filter(|&id| id != leader) {
        cluster.links.slow_down(id, Duration::from_millis(150));
    }
    let mut next = 10;
    let refused = eventually("a change to meet another one", SOON, async || {
        let add = |id: u64, timeout: &str| {
            let body = json!({ "id": id, "peer_url": format!("http://127.0.0.1:{}", 1_000 + id), "role": "learner" });
            let path = format!("/members?timeout={timeout}");
            let cluster = &cluster;
            async move { cluster.call(Method::POST, leader, &path, Some(body)).await }
        };
        let (first, second) = (next, next + 1);
        next += 2;
        let (one, two) = tokio::join!(add(first, "20s"), add(second, "100ms"));
        assert_eq!(one.0, 201, "{}", one.1);
        // The one that is in a hurry may have come first, and has begun.
        (two.0 == 409).then_some((second, two.1))
    })
    .await;
    for id in cluster.ids() {
        cluster.links.slow_down(id, Duration::ZERO);
    }
    let (id, answer) = refused;
    assert_eq!(answer["code"], "change_in_progress", "{answer}");
    let present = roles(&cluster, leader).await.unwrap();
    assert!(present.iter().all(|(there, _)| *there != id), "{id} was refused: {present:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_21_of_those_who_want_one_id_at_once_one_gets_it() {
    let cluster = Cluster::start(Setup::of(3)).await;
    let add = async |n: u64, id: Option<u64>| {
        let mut body = json!({ "peer_url": format!("http://127.0.0.1:{}", 1_000 + n), "role": "learner" });
        if let Some(id) = id {
            body["id"] = json!(id);
        }
        cluster.call(Method::POST, n % 3 + 1, "/members?timeout=20s", Some(body)).await
    };
    // The same id for different addresses.
    let answers = futures_util::future::join_all((1..=6).map(|n| add(n, Some(50)))).await;
    let (added, refused): (Vec<_>, Vec<_>) = answers.iter().partition(|(status, _)| *status == 201);
    assert_eq!(added.len(), 1, "{answers:?}");
    assert!(refused.iter().all(|(status, _)| *status == 409), "{refused:?}");
    // No id: each gets one of its own.
    let answers = futures_util::future::join_all((11..=16).map(|n| add(n, None))).await;
    let mut ids: Vec<u64> = answers
        .iter()
        .map(|(status, answer)| if *status == 201 { answer["id"].as_u64().unwrap() } else { 0 })
        .collect();
    ids.sort_unstable();
    ids.dedup();
    assert!(ids.len() == 6 && !ids.contains(&0), "{answers:?}");
}

/// An id that no node may have would leave no id for whoever lets the cluster choose.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ids_are_those_that_a_node_may_have() {
    let cluster = Cluster::start(Setup::of(1)).await;
    let add = async |body: Value| cluster.call(Method::POST, 1, "/members", Some(body)).await;
    let highest = (1u64 << 53) - 1;
    for id in [0, highest + 1, u64::MAX] {
        let (status, answer) = add(json!({ "id": id, "peer_url": "http://127.0.0.1:9", "role": "learner" })).await;
        assert_eq!((status, &answer["code"]), (400, &json!("invalid_request")), "{answer}");
    }
    let (status, answer) = add(json!({ "id": highest, "peer_url": "http://127.0.0.1:9", "role": "learner" })).await;
    assert_eq!(status, 201, "{answer}");
    let (status, answer) = add(json!({ "peer_url": "http://127.0.0.1:10", "role": "learner" })).await;
    assert_eq!((status, &answer["id"]), (201, &json!(2)), "{answer}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_learner_stays_one_until_it_is_promoted_and_a_removed_learner_stops() {
    let mut cluster = Cluster::start(Setup::of(1)).await;
    for id in [2, 3] {
        let peer_url = cluster.joiner(Some(id)).peer_url.clone();
        let body = json!({ "id": id, "peer_url": peer_url, "role": "learner" });
        assert_eq!(cluster.call(Method::POST, 1, "/members", Some(body)).await.0, 201);
        cluster.node(id).start();
        cluster.ready(id).await;
    }
    assert!(cluster.put(2, "k", "through a learner").await.unwrap().is_success());
    assert_eq!(cluster.get(3, "k").await, (200, "through a learner".to_owned()));
    tokio::time::sleep(Duration::from_secs(2)).await;
    let roles = roles(&cluster, 1).await.unwrap();
    assert_eq!(roles.iter().filter(|(_, role)| role == "learner").count(), 2, "{roles:?}");

    let (status, answer) = cluster.call(Method::POST, 3, "/members/2/promote", None).await;
    assert_eq!(status, 200, "{answer}");
    let (status, answer) = cluster.call(Method::POST, 3, "/members/2/promote", None).await;
    assert_eq!((status, answer["code"].as_str()), (409, Some("not_a_learner")));
    assert_eq!(cluster.call(Method::POST, 3, "/members/9/promote", None).await.0, 404);

    let (status, answer) = cluster.call(Method::PATCH, 2, "/members/3", Some(json!({ "name": "third" }))).await;
    assert_eq!(status, 200, "{answer}");
    let table = cluster.get_json(1, "/members").await.unwrap();
    assert!(table["members"].as_array().unwrap().iter().any(|m| m["name"] == "third"), "{table}");

    assert_eq!(remove(&cluster, 1, 3).await.0, 200);
    assert_eq!(cluster.node(3).ended(SOON).await.code(), Some(1));
}

/// Longer than three of the longest election timeouts, each of 1 to 1.4 s.
const SECONDS_WITHOUT_A_LEADER: f64 = 5.0;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_26_a_joiner_that_hears_no_leader_neither_serves_nor_campaigns() {
    let mut cluster = Cluster::start(Setup::of(3).proxied()).await;
    assert!(cluster.put(1, "k", "v").await.unwrap().is_success());
    let term = cluster.status(1).await["term"].clone();
    for id in 1..=3 {
        cluster.links.cut_one_way(id, 4);
    }
    cluster.joiner(Some(4)).start();
    let asked = [
        "/k?timeout=200ms",
        "/k?consistency=serializable",
        "/v1/kv?prefix=&consistency=serializable",
    ];
    let begun = eventually("the joiner to run", SOON, async || {
        cluster.status(4).await["uptime_seconds"].as_f64()
    })
    .await;
    eventually("three election timeouts to pass", SOON, async || {
        for path in asked {
            let (status, answer) = cluster.call(Method::GET, 4, path, None).await;
            assert_eq!((status, answer["code"].as_str()), (503, Some("not_ready")), "{path}: {answer}");
        }
        let answer = cluster
            .http
            .put(format!("{}/k?timeout=200ms", cluster.url(4)))
            .body("w")
            .send()
            .await
            .unwrap();
        let status = answer.status().as_u16();
        let problem: Value = answer.json().await.unwrap();
        assert_eq!((status, problem["outcome"].as_str()), (503, Some("not_applied")), "{problem}");
        let uptime = cluster.status(4).await["uptime_seconds"].as_f64()?;
        (uptime >= begun + SECONDS_WITHOUT_A_LEADER).then_some(())
    })
    .await;
    let learner = (4, "learner".to_owned());
    assert!(
        roles(&cluster, 1).await.unwrap().contains(&learner),
        "it is known, and has heard nothing"
    );
    for id in 1..=3 {
        assert_eq!(cluster.status(id).await["term"], term, "member {id}");
    }
    cluster.links.heal();
    cluster.ready(4).await;
    assert_eq!(cluster.get(4, "k").await, (200, "v".to_owned()));
    assert_eq!(cluster.status(1).await["term"], term, "nor when it is reached");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_9_a_founder_that_lost_its_disk_does_not_start_again() {
    let mut cluster = Cluster::start(Setup::of(3)).await;
    for id in 1..=3 {
        assert!(cluster.put(id, "k", "v").await.unwrap().is_success());
    }
    let wiped = cluster.leader().await;
    bound(&cluster).await;
    cluster.node(wiped).kill();
    std::fs::remove_dir_all(&cluster.node(wiped).data_dir).unwrap();
    cluster.node(wiped).start();
    assert_eq!(cluster.node(wiped).ended(SOON).await.code(), Some(1));
    let log = cluster.node(wiped).log_text();
    assert!(log.contains("another data directory") && log.contains("--join"), "{log}");
    // Nothing was founded: it is refused again.
    cluster.node(wiped).start();
    assert_eq!(cluster.node(wiped).ended(SOON).await.code(), Some(1));

    // The way out that the message names.
    let asked = wiped % 3 + 1;
    let (status, answer) = remove(&cluster, asked, wiped).await;
    assert_eq!(status, 200, "{answer}");
    cluster.joiner(Some(4)).start();
    cluster.ready(4).await;
    assert_eq!(cluster.get(4, "k").await, (200, "v".to_owned()));
}

/// Waits until every member's data directory is known to all.
async fn bound(cluster: &Cluster) {
    eventually("every member to be bound to its directory", SOON, async || {
        let table = cluster.get_json(cluster.ids()[0], "/members").await?;
        table["members"]
            .as_array()?
            .iter()
            .all(|m| m["name"].as_str().is_some_and(|n| !n.is_empty()))
            .then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_9_a_joiner_that_lost_its_disk_is_refused() {
    let mut cluster = Cluster::start(Setup::of(1)).await;
    cluster.joiner(Some(2)).start();
    cluster.ready(2).await;
    voters_are(&cluster, 1, &[1, 2]).await;
    cluster.joiner(Some(3)).start();
    cluster.ready(3).await;
    voters_are(&cluster, 1, &[1, 2, 3]).await;
    bound(&cluster).await;
    cluster.node(3).kill();
    std::fs::remove_dir_all(&cluster.node(3).data_dir).unwrap();
    cluster.node(3).start();
    assert_eq!(cluster.node(3).ended(SOON).await.code(), Some(1));
    let log = cluster.node(3).log_text();
    assert!(log.contains("data directory"), "{log}");
    assert!(cluster.put(1, "k", "v").await.unwrap().is_success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copied_directory_is_not_a_second_member() {
    let mut cluster = Cluster::start(Setup::of(3)).await;
    bound(&cluster).await;
    // A copy that claims another id is refused by the directory itself.
    cluster.node(2).terminate();
    cluster.node(2).ended(SOON).await;
    let (from, to) = (cluster.node(2).data_dir.clone(), cluster.dir().join("copy"));
    copy_dir(&from, &to);
    let members: Vec<String> = cluster.nodes.iter().map(|node| format!("{}={}", node.id, node.peer_url)).collect();
    let copy = cluster.joiner(Some(9));
    copy.drop_args("--join");
    copy.drop_args("--data-dir");
    copy.add_args(&["--data-dir", &to.display().to_string()]);
    for member in &members {
        copy.add_args(&["--member", member]);
    }
    copy.start();
    let code = copy.ended(SOON).await.code();
    assert!(matches!(code, Some(1 | 2)), "{code:?} {}", copy.log_text());
    let log = copy.log_text();
    assert!(!log.contains("serving"), "{log}");
    cluster.node(2).start();
    cluster.ready(2).await;
}

/// Its log lacks what it acknowledged: a majority that counts on it may be none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_9_a_member_on_an_older_copy_of_its_directory_stops_and_says_why() {
    let mut cluster = Cluster::start(Setup::of(3)).await;
    bound(&cluster).await;
    let leader = cluster.leader().await;
    let member = cluster.ids().into_iter().find(|&id| id != leader).unwrap();
    let (own, copy) = (cluster.node(member).data_dir.clone(), cluster.dir().join("older"));
    cluster.node(member).terminate();
    cluster.node(member).ended(SOON).await;
    copy_dir(&own, &copy);
    cluster.node(member).start();
    cluster.ready(member).await;
    for number in 0..20 {
        assert!(cluster.put(member, &format!("k{number}"), "v").await.unwrap().is_success());
    }
    cluster.node(member).terminate();
    cluster.node(member).ended(SOON).await;
    std::fs::remove_dir_all(&own).unwrap();
    std::fs::rename(&copy, &own).unwrap();
    // Nothing is written meanwhile: the first thing that it hears is a heartbeat.
    cluster.node(member).start();
    assert_eq!(cluster.node(member).ended(SOON).await.code(), Some(1));
    let log = cluster.node(member).log_text();
    assert!(log.contains(&format!("metcd member remove {member}")), "{log}");
    assert!(cluster.put(leader, "k", "v").await.unwrap().is_success());
    cluster.node(member).start();
    assert_eq!(cluster.node(member).ended(SOON).await.code(), Some(1), "nor at the next start");
}

/// The leader that it acknowledged to leads no more, so no heartbeat tells it what it lacks: the others know of its later start, although
/// nothing was written through it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_9_a_member_on_an_older_copy_of_its_directory_is_known_by_its_start_when_the_leader_has_changed() {
    let mut cluster = Cluster::start(Setup::of(3)).await;
    bound(&cluster).await;
    let leader = cluster.leader().await;
    let others: Vec<u64> = cluster.ids().into_iter().filter(|&id| id != leader).collect();
    let (member, successor) = (others[0], others[1]);
    let (own, copy) = (cluster.node(member).data_dir.clone(), cluster.dir().join("older"));
    cluster.node(member).terminate();
    cluster.node(member).ended(SOON).await;
    copy_dir(&own, &copy);
    let before = cluster.status(leader).await["commit_index"].as_u64().unwrap();
    cluster.node(member).start();
    cluster.ready(member).await;
    eventually("the start is told", SOON, async || {
        let status = cluster.status(successor).await;
        (status["applied_index"].as_u64()? > before).then_some(())
    })
    .await;
    assert!(cluster.put(leader, "k", "v").await.unwrap().is_success());
    cluster.node(member).terminate();
    cluster.node(member).ended(SOON).await;
    std::fs::remove_dir_all(&own).unwrap();
    std::fs::rename(&copy, &own).unwrap();
    let (code, answer) = cluster
        .call(Method::POST, leader, "/leader?timeout=20s", Some(json!({ "id": successor })))
        .await;
    assert_eq!(code, 200, "{answer}");
    cluster.node(member).start();
    assert_eq!(cluster.node(member).ended(SOON).await.code(), Some(1));
    let log = cluster.node(member).log_text();
    assert!(
        log.contains("older copy of itself") && log.contains(&format!("metcd member remove {member}")),
        "{log}"
    );
    // Whoever starts it again, as a supervisor would, gets no further: one start more, and it would seem to be a later one.
    for _ in 0..3 {
        cluster.node(member).start();
        assert_eq!(cluster.node(member).ended(SOON).await.code(), Some(1));
    }
    assert!(cluster.put(successor, "k", "w").await.unwrap().is_success());
}

/// Whoever looks after the process must not take it for dead while it waits for a cluster that is not there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_waits_to_join_is_alive_and_not_ready() {
    let mut cluster = Cluster::start(Setup::of(1)).await;
    let elsewhere = format!("http://127.0.0.1:{}", crate::harness::free_port());
    let node = cluster.joiner(Some(2));
    node.drop_args("--join");
    node.add_args(&["--join", &elsewhere]);
    node.start();
    let url = cluster.url(2);
    eventually("the process to answer", SOON, async || {
        let answer = cluster.http.get(format!("{url}/livez")).send().await.ok()?;
        assert_eq!(
            (answer.status().as_u16(), answer.headers()["metcd-member"].to_str().unwrap()),
            (200, "2")
        );
        Some(())
    })
    .await;
    for path in ["/readyz", "/health", "/k?timeout=50ms"] {
        let answer = cluster.http.get(format!("{url}{path}")).send().await.unwrap();
        assert_eq!(answer.status(), 503, "{path}");
        assert!(answer.headers().contains_key("retry-after"));
        let problem: Value = answer.json().await.unwrap();
        assert_eq!((&problem["code"], problem.get("outcome")), (&json!("not_ready"), None), "{path}");
    }
    let put = cluster.http.put(format!("{url}/k?timeout=50ms")).body("v").send().await.unwrap();
    assert_eq!(put.json::<Value>().await.unwrap()["outcome"], "not_applied");
    let node = cluster.node(2);
    node.terminate();
    assert!(node.ended(SOON).await.success());
    node.drop_args("--join");
    let first = cluster.url(1);
    cluster.node(2).add_args(&["--join", &first]);
    cluster.node(2).start();
    cluster.ready(2).await;

    cluster.node(2).terminate();
    assert!(cluster.node(2).ended(SOON).await.success());
    cluster.node(2).start();
    eventually("the process to answer", SOON, async || {
        cluster.http.get(format!("{url}/livez")).send().await.ok()
    })
    .await;
    // A request that comes while it starts is a little late.
    let put = cluster.http.put(format!("{url}/k?timeout=25s")).body("v").send().await.unwrap();
    assert_eq!(put.status(), 201);
}
