//! No quorum, partitions, strangers, full disks.

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::harness::{Cluster, SOON, Setup, eventually};
use crate::load::{Writers, check};
use crate::small_disk::SmallDisk;

async fn code_of(answer: reqwest::Response) -> (u16, String, String) {
    let status = answer.status().as_u16();
    let body: Value = answer.json().await.unwrap_or(Value::Null);
    let text = |name: &str| body[name].as_str().unwrap_or_default().to_owned();
    (status, text("code"), text("outcome"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_quorum_the_answers_are_true_and_recovery_is_by_itself() {
    let mut cluster = Cluster::start(Setup::of(3)).await;
    let leader = cluster.leader().await;
    let others: Vec<u64> = cluster.ids().into_iter().filter(|&id| id != leader).collect();
    assert!(cluster.put(leader, "k", "before").await.unwrap().is_success());
    for &id in &others {
        cluster.node(id).kill();
    }
    let put = |key: &str, timeout: &str| {
        let url = format!("{}/{key}?timeout={timeout}", cluster.url(leader));
        cluster.http.put(url).body("during").send()
    };
    // The leader has not noticed yet: handed to raft, so nobody can tell.
    assert_eq!(
        code_of(put("early", "800ms").await.unwrap()).await,
        (504, "timeout".into(), "unknown".into())
    );
    eventually("the leader of a minority to step down", SOON, async || {
        cluster.status(leader).await["leader"].is_null().then_some(())
    })
    .await;
    let term = cluster.status(leader).await["term"].as_u64().unwrap();
    assert_eq!(
        code_of(put("late", "500ms").await.unwrap()).await,
        (503, "no_leader".into(), "not_applied".into())
    );

    let url = cluster.url(leader);
    let http = cluster.http.clone();
    let get = |path: &str| http.get(format!("{url}{path}")).send();
    assert_eq!(get("/k?consistency=serializable").await.unwrap().text().await.unwrap(), "before");
    assert_eq!(code_of(get("/k?timeout=500ms").await.unwrap()).await.0, 503);
    assert_eq!(get("/livez").await.unwrap().status(), 200);
    assert_eq!(get("/readyz").await.unwrap().status(), 503);
    let health = get("/health?timeout=500ms").await.unwrap();
    assert_eq!(health.status(), 503);
    let health: Value = health.json().await.unwrap();
    assert_eq!(health["health"], false, "{health}");
    assert!(health["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{health}");
    assert_eq!(get("/leader?timeout=500ms").await.unwrap().status(), 503);
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(
        cluster.status(leader).await["term"].as_u64(),
        Some(term),
        "rule 20: failed pre-votes do not raise the term"
    );

    for &id in &others {
        cluster.node(id).start();
    }
    cluster.all_ready().await;
    assert_eq!(get("/health").await.unwrap().status(), 200);
    assert_eq!(cluster.get(leader, "late").await.0, 404);
    let early = cluster.get(leader, "early").await;
    for &id in &others {
        assert_eq!(cluster.get(id, "early").await, early, "there or not, but the same everywhere");
    }
    assert!(cluster.put(others[0], "k", "after").await.unwrap().is_success());
}

/// The limits of a listener are the peers' too, and both are a real member's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_30_both_listeners_bound_heads_bodies_and_connections() {
    const MAX: usize = 6;
    let setup = Setup::of(1).set("limits.header_timeout=\"1s\"").set("limits.max_connections=6");
    let mut cluster = Cluster::start(setup).await;
    let (client_port, peer_port) = (cluster.node(1).client_port, cluster.node(1).peer_port);
    for port in [client_port, peer_port] {
        for half in ["", "POST /raft HTTP/1.1\r\nhost: loc", "PRI * HTTP/2.0\r\n"] {
            let answer = said_until_closed(port, half).await;
            assert!(
                answer.starts_with("HTTP/1.1 408 ") && answer.contains("request_timeout"),
                "port {port}, {half:?}: {answer}"
            );
        }
        // Each stays open when it has its answer; the harness has one or two of its own.
        let mut open = Vec::new();
        for _ in 0..=MAX {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            stream.write_all(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
            let mut answer = [0; 12];
            timeout(SOON, stream.read_exact(&mut answer)).await.unwrap().unwrap();
            open.push(stream);
            if &answer == b"HTTP/1.1 429" {
                break;
            }
        }
        let mut last = open.pop().unwrap();
        let mut rest = String::new();
        timeout(SOON, last.read_to_string(&mut rest)).await.unwrap().unwrap();
        assert!(
            rest.starts_with(" Too Many Requests\r\n") && rest.contains("overloaded"),
            "port {port}: {rest}"
        );
    }
    cluster.ready(1).await;
}

/// What a listener answers to these bytes by itself, until it closes.
async fn said_until_closed(port: u16, sent: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    stream.write_all(sent.as_bytes()).await.unwrap();
    let mut answer = String::new();
    // A reset after the answer is no matter here.
    let _ = timeout(SOON, stream.read_to_string(&mut answer)).await.expect("it closes");
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_20_an_isolated_member_never_raises_the_term_and_a_minority_leader_steps_down() {
    let cluster = Cluster::start(Setup::of(3).proxied()).await;
    let writers = Writers::start(&cluster.urls(), 12, "w");
    writers.progress(100).await;
    let leader = cluster.leader().await;
    let follower = leader % 3 + 1;
    let term = cluster.status(leader).await["term"].clone();
    cluster.links.isolate(follower, &cluster.ids());
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(cluster.status(follower).await["term"], term);
    cluster.links.heal();
    cluster.leader().await;
    assert_eq!(
        cluster.status(leader).await["term"],
        term,
        "the return of an isolated follower disturbs nobody"
    );

    let begun = Instant::now();
    cluster.links.isolate(leader, &cluster.ids());
    let rest: Vec<u64> = cluster.ids().into_iter().filter(|&id| id != leader).collect();
    eventually("the majority to elect a leader", SOON, async || {
        let named = cluster.status(rest[0]).await["leader"].as_u64()?;
        rest.contains(&named).then_some(())
    })
    .await;
    println!("FIG isolation of the leader: a new one after {:?}", begun.elapsed());
    eventually("the leader of a minority to step down", SOON, async || {
        (cluster.status(leader).await["role"] != "leader").then_some(())
    })
    .await;
    cluster.links.heal();
    cluster.leader().await;
    writers.progress(50).await;
    let record = writers.stop().await;
    println!(
        "FIG partitions: {} acknowledged, {} unknown, {} refused",
        record.acknowledged.len(),
        record.unknown.len(),
        record.refused.len()
    );
    check(&cluster, leader, "w", &record).await;
    cluster.same_content(&cluster.ids()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_cut_in_one_direction_does_not_stop_the_cluster_for_ever() {
    let cluster = Cluster::start(Setup::of(3).proxied()).await;
    let leader = cluster.leader().await;
    let follower = leader % 3 + 1;
    for (from, to) in [(leader, follower), (follower, leader)] {
        cluster.links.cut_one_way(from, to);
        let writers = Writers::start(&[cluster.url(follower % 3 + 1)], 4, &format!("w{from}-"));
        tokio::time::sleep(Duration::from_secs(2)).await;
        writers.progress(100).await;
        cluster.links.heal();
        let record = writers.stop().await;
        println!("FIG one-way cut {from} → {to}: longest gap {:?}", record.longest_gap());
        assert!(record.unknown.is_empty() && record.refused.is_empty());
    }
    cluster.same_content(&cluster.ids()).await;
}

/// Longer than a round of reads takes that is given up as lost, were it not known that the way is long.
const LONG_WAY: Duration = Duration::from_millis(120);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_that_are_far_from_each_other_write_and_read() {
    let cluster = Cluster::start(Setup::of(3).proxied()).await;
    for id in cluster.ids() {
        cluster.links.slow_down(id, LONG_WAY);
    }
    for round in 0..3 {
        for id in cluster.ids() {
            let value = format!("v{round}-{id}");
            assert!(cluster.put(id, "k?timeout=20s", &value).await.unwrap().is_success());
            let next = id % 3 + 1;
            let begun = Instant::now();
            assert_eq!(cluster.get(next, "k?timeout=20s").await, (200, value), "on {next}, after {id}");
            println!("FIG a read over links of {LONG_WAY:?}: {:?}", begun.elapsed());
        }
    }
}

/// It reaches the others, and their answers reach it: without more it would lead for ever, and everything they forward would be lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_nobody_can_send_to_hands_over_and_no_request_fails() {
    let mut cluster = Cluster::start(Setup::of(3).proxied()).await;
    let leader = cluster.leader().await;
    let others: Vec<u64> = cluster.ids().into_iter().filter(|&id| id != leader).collect();
    let urls: Vec<String> = others.iter().map(|&id| cluster.url(id)).collect();
    let writers = Writers::start(&urls, 4, "w");
    writers.progress(20).await;
    for &other in &others {
        cluster.links.cut_one_way(other, leader);
    }
    eventually("another leader", SOON, async || {
        let seen = cluster.status(others[0]).await["leader"].as_u64()?;
        (seen != leader).then_some(())
    })
    .await;
    writers.progress(100).await;
    eventually("the log to say why", SOON, async || {
        let log = cluster.node(leader).log_text();
        log.contains("cannot send to this leader").then_some(())
    })
    .await;
    cluster.links.heal();
    let record = writers.stop().await;
    println!("FIG a leader that nobody can send to: longest gap {:?}", record.longest_gap());
    assert!(record.unknown.is_empty() && record.refused.is_empty());
    cluster.same_content(&cluster.ids()).await;
}

/// Rule 24: heard of is not reached. Where its address is wrong a member sends to the leader, and nobody sends to it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_24_a_member_that_can_send_and_cannot_be_reached_does_not_count_as_healthy() {
    let cluster = Cluster::start(Setup::of(3).proxied()).await;
    let leader = cluster.leader().await;
    let (mute, other) = (leader % 3 + 1, (leader + 1) % 3 + 1);
    cluster.links.cut_one_way(leader, mute);
    eventually("it to count as unhealthy", SOON, async || {
        let table = cluster.get_json(leader, "/members").await?;
        let members = table["members"].as_array()?.clone();
        members
            .iter()
            .any(|member| member["id"] == mute && member["healthy"] == false)
            .then_some(())
    })
    .await;
    let (status, answer) = cluster
        .call(Method::DELETE, leader, &format!("/members/{other}?timeout=5s"), None)
        .await;
    assert_eq!((status, &answer["code"]), (409, &"unsafe_change".into()), "{answer}");
    cluster.links.heal();
    cluster.same_content(&cluster.ids()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_27_strangers_on_either_port_change_nothing() {
    let mut cluster = Cluster::start(Setup::of(3)).await;
    let leader = cluster.leader().await;
    let term = cluster.status(leader).await["term"].clone();
    let ports: Vec<u16> = cluster.nodes.iter().flat_map(|node| [node.client_port, node.peer_port]).collect();
    let mut seed = crate::harness::Seed(3);
    for port in ports {
        for size in [1, 10, 1_000, 100_000] {
            let mut garbage: Vec<u8> = (0..size).map(|_| seed.next() as u8).collect();
            if size == 1_000 {
                garbage.splice(0..0, *b"POST /raft HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n");
            }
            let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            // Being cut off in the middle is the right answer.
            let _ = stream.write_all(&garbage).await;
            let _ = stream.shutdown().await;
            let mut answer = Vec::new();
            let _ = tokio::time::timeout(Duration::from_secs(2), stream.read_to_end(&mut answer)).await;
        }
    }
    let cluster_id = cluster.get_json(1, "/members").await.unwrap()["cluster_id"]
        .as_str()
        .unwrap()
        .to_owned();
    let peer = format!("http://127.0.0.1:{}/raft", cluster.node(leader).peer_port);
    let other = leader % 3 + 1;
    let forged = [
        (
            format!("cluster=00000000deadbeef;from={other};incarnation=0000000000000001;to={leader}"),
            412,
        ),
        (format!("cluster={cluster_id};from=9;incarnation=0000000000000001;to={leader}"), 412),
        (
            format!("cluster={cluster_id};from={other};incarnation=0000000000000001;to={leader}"),
            412,
        ),
        (format!("cluster={cluster_id};from={other};incarnation=0000000000000001;to=9"), 412),
        ("cluster=;;;".to_owned(), 400),
    ];
    eventually("incarnations to be known", SOON, async || {
        let table = cluster.get_json(leader, "/members").await?;
        table["members"]
            .as_array()?
            .iter()
            .all(|m| m["name"].as_str().is_some_and(|n| !n.is_empty()))
            .then_some(())
    })
    .await;
    for (addressing, wanted) in forged.iter().chain(&forged) {
        for path in ["", "/call", "/snapshot"] {
            let request = cluster
                .http
                .request(Method::POST, format!("{peer}{path}"))
                .header("metcd-peer", addressing);
            let status = request
                .header("metcd-deadline-ms", "500")
                .body("{\"progress\":null}")
                .send()
                .await
                .unwrap()
                .status();
            assert_eq!(status, *wanted, "{path} as {addressing}");
        }
    }
    for node in &mut cluster.nodes {
        assert!(node.is_running());
    }
    assert_eq!(cluster.status(leader).await["term"], term);
    assert!(cluster.put(other, "k", "v").await.unwrap().is_success());

    // Each forgery came six times, and its reason is logged once. The log is complete when the member has ended.
    cluster.node(leader).terminate();
    assert_eq!(cluster.node(leader).ended(SOON).await.code(), Some(0));
    let log = cluster.node(leader).log_text();
    for (from, code) in [
        (other, "cluster_mismatch"),
        (9, "unknown_member"),
        (other, "member_reincarnated"),
        (other, "wrong_receiver"),
    ] {
        let parts = ["refused between peers", &format!("peer={from} "), &format!("code=\"{code}\"")];
        let is_it = |line: &&str| parts.iter().all(|part| line.contains(part));
        assert_eq!(log.lines().filter(is_it).count(), 1, "{code} of {from}: {log}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_30_overload_is_refused_and_the_leader_stays() {
    let cluster = Cluster::start(Setup::of(3).set("raft.proposal_queue=8")).await;
    let leader = cluster.leader().await;
    let term = cluster.status(leader).await["term"].clone();
    let writers = Writers::start(&cluster.urls(), 96, "w");
    writers.progress(3_000).await;
    let record = writers.stop().await;
    let overloaded = record
        .refused
        .iter()
        .filter(|(_, reason)| reason.contains("\"overloaded\""))
        .count();
    assert!(overloaded > 0, "nobody was refused");
    assert_eq!(overloaded, record.refused.len(), "{:?}", record.refused.first());
    assert!(record.unknown.is_empty(), "{:?}", record.unknown.first());
    assert_eq!(cluster.leader().await, leader);
    assert_eq!(cluster.status(leader).await["term"], term, "leadership was never lost");
    check(&cluster, leader, "w", &record).await;
}

async fn status_of_put(cluster: &Cluster, key: &str) -> Option<u16> {
    Some(cluster.put(1, key, "v").await.ok()?.as_u16())
}

/// Values of a MiB that are deleted on a full disk.
const BULK: u64 = 40;

/// What the metric says of member 1's disk.
async fn disk_full(cluster: &Cluster) -> String {
    let (status, page) = cluster.get(1, "metrics").await;
    let line = page.lines().find_map(|line| line.strip_prefix("metcd_disk_full "));
    line.unwrap_or_else(|| panic!("{status}: {page}")).to_owned()
}

/// Nearly full: writes get 507, deletes and compaction go on, and room heals it. Full to the last byte: a member that is started on it
/// serves what it has, and room heals that too.
async fn lives_through_a_full_disk(wal: &'static str, store: &'static str) {
    let setup = Setup::of(1)
        .engines(wal, store)
        .set("limits.min_free_disk=128MiB")
        .set("raft.snapshot_entries=20")
        .set("raft.keep_entries=5");
    let mut cluster = Cluster::prepare(setup).await;
    let Some(disk) = SmallDisk::mount(&mut cluster, 512) else { return };
    cluster.node(1).start();
    cluster.ready(1).await;
    for key in ["k", "stays"] {
        assert_eq!(status_of_put(&cluster, key).await, Some(201));
    }

    disk.fill(120 << 20);
    eventually("writes to be refused", SOON, async || {
        (status_of_put(&cluster, "k2").await? == 507).then_some(())
    })
    .await;
    assert_eq!(disk_full(&cluster).await, "1");
    assert_eq!(cluster.get(1, "k").await.0, 200);
    let deleted = cluster.http.delete(format!("{}/k", cluster.url(1))).send().await.unwrap();
    assert_eq!(deleted.status(), 204);
    let (status, answer) = cluster.call(Method::POST, 1, "/v1/compact", Some(json!({ "revision": 3 }))).await;
    assert_eq!(status, 200, "{answer}");
    disk.make_room();
    eventually("writes to be taken again", SOON, async || {
        (status_of_put(&cluster, "k3").await? == 201).then_some(())
    })
    .await;
    assert_eq!(disk_full(&cluster).await, "0");

    // sled's files keep their size.
    if store != "sled" {
        deletes_make_room(&cluster, &disk).await;
    }

    cluster.node(1).kill();
    disk.fill(0);
    cluster.node(1).start();
    cluster.ready(1).await;
    assert_eq!(cluster.get(1, "stays").await, (200, "v".to_owned()));
    assert_eq!(cluster.get(1, "k").await.0, 404);
    eventually("writes to be refused", SOON, async || {
        (status_of_put(&cluster, "k4").await? == 507).then_some(())
    })
    .await;
    assert_eq!(disk_full(&cluster).await, "1");
    disk.make_room();
    eventually("writes to be taken again", SOON, async || {
        (status_of_put(&cluster, "k5").await? == 201).then_some(())
    })
    .await;
    assert_eq!(disk_full(&cluster).await, "0");
    cluster.node(1).kill();
    drop(disk);
}

/// On a disk that is nearly full deletes and compaction give room back by themselves: no further entry is needed, and nothing from outside.
async fn deletes_make_room(cluster: &Cluster, disk: &SmallDisk) {
    let mut seed = crate::harness::Seed(5);
    for n in 0..BULK {
        let put = cluster.http.put(format!("{}/bulk/{n}", cluster.url(1)));
        let value: Vec<u8> = (0..1 << 17).flat_map(|_| seed.next().to_le_bytes()).collect();
        assert_eq!(put.body(value).send().await.unwrap().status(), 201);
    }
    eventually("writes to be refused", SOON, async || {
        // Again and again: a snapshot may be under way, and give back what it took.
        disk.fill(120 << 20);
        (status_of_put(cluster, "k3").await? == 507).then_some(())
    })
    .await;
    let (status, deleted) = cluster.call(Method::DELETE, 1, "/v1/kv?prefix=bulk/", None).await;
    assert_eq!((status, &deleted["deleted"]), (200, &BULK.into()), "{deleted}");
    let revision = &deleted["revision"];
    let (status, answer) = cluster
        .call(Method::POST, 1, "/v1/compact", Some(json!({ "revision": revision })))
        .await;
    assert_eq!(status, 200, "{answer}");
    eventually("writes to be taken again", SOON, async || {
        (status_of_put(cluster, "k3").await? == 204).then_some(())
    })
    .await;
    disk.make_room();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sled_lives_through_a_full_disk() {
    lives_through_a_full_disk("sled", "memory").await;
    lives_through_a_full_disk("sled", "sled").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn raft_engine_lives_through_a_full_disk() {
    lives_through_a_full_disk("raft-engine", "memory").await;
}

#[cfg(feature = "rocksdb")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rocksdb_lives_through_a_full_disk() {
    lives_through_a_full_disk("rocksdb", "rocksdb").await;
}
