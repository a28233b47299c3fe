//! Members that die, stop and come back while clients write through the survivors.

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::harness::{Cluster, SOON, Setup, eventually};
use crate::load::{Record, Writers, check};

const WRITERS: usize = 32;

/// The gap that an election may cost: detection (1 to 1.4 s), the votes, and a busy machine.
const ELECTION_GAP: Duration = Duration::from_millis(4_500);

fn assert_unharmed(record: &Record, what: &str, gap: Duration) {
    println!(
        "{what}: {} writes, longest gap {:?}, slowest request {:?}",
        record.acknowledged.len(),
        record.longest_gap(),
        record.slowest
    );
    assert!(record.refused.is_empty(), "{what}: refused {:?}", record.refused.first());
    assert!(record.unknown.is_empty(), "{what}: unknown {:?}", record.unknown.first());
    assert!(
        record.longest_gap() < gap,
        "{what}: nothing was acknowledged for {:?}",
        record.longest_gap()
    );
}

fn others(cluster: &Cluster, id: u64) -> (Vec<u64>, Vec<String>) {
    let ids: Vec<u64> = cluster.ids().into_iter().filter(|&other| other != id).collect();
    let urls = ids.iter().map(|&id| cluster.url(id)).collect();
    (ids, urls)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_on_any_member_is_read_on_any_other_at_once() {
    let cluster = Cluster::start(Setup::of(3)).await;
    for round in 0..30 {
        let (writer, reader) = (round % 3 + 1, (round / 3) % 3 + 1);
        let value = format!("v{round}");
        assert!(cluster.put(writer, "k", &value).await.unwrap().is_success());
        assert_eq!(cluster.get(reader, "k").await, (200, value));
    }
    cluster.same_content(&[1, 2, 3]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_1_whoever_answers_a_write_has_applied_it() {
    let cluster = Cluster::start(Setup::of(3)).await;
    for round in 0..30 {
        let (writer, next) = (round % 3 + 1, (round + 1) % 3 + 1);
        let value = format!("v{round}");
        let put = cluster
            .http
            .put(format!("{}/k", cluster.url(writer)))
            .body(value.clone())
            .send()
            .await
            .unwrap();
        assert!(put.status().is_success(), "{put:?}");
        let revision = put.headers()["metcd-revision"].to_str().unwrap();
        // Of its own state, at once; and what the answer says is enough to find it in another's, which may be late.
        assert_eq!(
            cluster.get(writer, "k?consistency=serializable").await,
            (200, value.clone()),
            "on {writer}, which answered"
        );
        let later = format!("k?consistency=serializable&min_revision={revision}");
        assert_eq!(cluster.get(next, &later).await, (200, value), "on {next}, after {writer}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_of_the_leader_under_load_fails_no_request_and_loses_no_acknowledgement() {
    let mut cluster = Cluster::start(Setup::of(3)).await;
    let leader = cluster.leader().await;
    let (ids, urls) = others(&cluster, leader);
    let writers = Writers::start(&urls, WRITERS, "w");
    writers.progress(500).await;
    cluster.node(leader).kill();
    writers.progress(500).await;
    let record = writers.stop().await;
    assert_unharmed(&record, "kill -9 of the leader", ELECTION_GAP);
    for &id in &ids {
        check(&cluster, id, "w", &record).await;
    }
    cluster.node(leader).start();
    cluster.ready(leader).await;
    check(&cluster, leader, "w", &record).await;
    cluster.same_content(&cluster.ids()).await;
}

/// A leader that hangs keeps its connections and says nothing: what only a leader can do goes on to the next one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_hangs_fails_no_keepalive_and_no_membership_request() {
    let mut cluster = Cluster::start(Setup::of(3)).await;
    let leader = cluster.leader().await;
    let (ids, _) = others(&cluster, leader);
    let ttl = Some(serde_json::json!({"ttl": 600}));
    let (status, lease) = cluster.call(reqwest::Method::POST, ids[0], "/v1/leases", ttl).await;
    assert_eq!(status, 201, "{lease}");
    cluster.node(leader).pause();
    let keepalive = format!("/v1/leases/{}/keepalive?timeout=20s", lease["id"].as_str().unwrap());
    let (status, renewed) = cluster.call(reqwest::Method::POST, ids[0], &keepalive, None).await;
    assert_eq!(status, 200, "{renewed}");
    let name = Some(serde_json::json!({"name": "renamed"}));
    let path = format!("/members/{}?timeout=20s", ids[1]);
    let (status, member) = cluster.call(reqwest::Method::PATCH, ids[1], &path, name).await;
    assert_eq!(status, 200, "{member}");
    cluster.node(leader).resume();
    cluster.ready(leader).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_16_a_paused_ex_leader_never_answers_stale() {
    let mut cluster = Cluster::start(Setup::of(3)).await;
    let leader = cluster.leader().await;
    let (ids, urls) = others(&cluster, leader);
    assert!(cluster.put(leader, "k", "old").await.unwrap().is_success());
    let writers = Writers::start(&urls, WRITERS, "w");
    writers.progress(500).await;
    cluster.node(leader).pause();
    writers.progress(500).await;
    let record = writers.stop().await;
    assert_unharmed(&record, "SIGSTOP of the leader", ELECTION_GAP);
    assert!(cluster.put(ids[0], "k", "new").await.unwrap().is_success());
    // The reads are on their way to the ex-leader before it wakes up.
    let reads: Vec<_> = (0..16)
        .map(|_| {
            let request = cluster.http.get(format!("{}/k", cluster.url(leader)));
            tokio::spawn(async move { request.send().await.unwrap().text().await.unwrap() })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(50)).await;
    cluster.node(leader).resume();
    for read in reads {
        assert_eq!(read.await.unwrap(), "new");
    }
    check(&cluster, leader, "w", &record).await;
    cluster.same_content(&cluster.ids()).await;
}

/// One keepalive on an open connection; its answer is left to be read.
async fn send_keepalive(connection: &mut TcpStream, lease: &str) {
    let request = format!("POST /v1/leases/{lease}/keepalive?timeout=20s HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n");
    connection.write_all(request.as_bytes()).await.unwrap();
}

/// Status and body of the next answer.
async fn receive(connection: &mut TcpStream) -> (u16, serde_json::Value) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(connection.read_u8().await.expect("an answer"));
    }
    let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.unwrap_or_else(|| panic!("{head}")).parse().unwrap()];
    connection.read_exact(&mut body).await.unwrap();
    (head[9..12].parse().unwrap(), serde_json::from_slice(&body).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_16_a_paused_ex_leader_renews_no_lease_that_is_gone() {
    let mut cluster = Cluster::start(Setup::of(3)).await;
    // More than once: which comes first when it wakes up, the keepalives or its peers' words, is chance.
    for _ in 0..4 {
        let leader = cluster.leader().await;
        let (ids, _) = others(&cluster, leader);
        let ttl = Some(serde_json::json!({"ttl": 600}));
        let (status, lease) = cluster.call(reqwest::Method::POST, leader, "/v1/leases", ttl).await;
        assert_eq!(status, 201, "{lease}");
        let lease = lease["id"].as_str().unwrap();
        let mut connections = Vec::new();
        for _ in 0..16 {
            let address = ("127.0.0.1", cluster.node(leader).client_port);
            let mut connection = TcpStream::connect(address).await.unwrap();
            send_keepalive(&mut connection, lease).await;
            let (status, renewed) = receive(&mut connection).await;
            assert_eq!(status, 200, "{renewed}");
            connections.push(connection);
        }

        cluster.node(leader).pause();
        let path = format!("/v1/leases/{lease}?timeout=20s");
        let (status, revoked) = cluster.call(reqwest::Method::DELETE, ids[0], &path, None).await;
        assert_eq!(status, 200, "{revoked}");
        // On loopback what is written is there: the ex-leader finds them when it wakes up, on connections that it knows.
        for connection in &mut connections {
            send_keepalive(connection, lease).await;
        }
        cluster.node(leader).resume();
        for connection in &mut connections {
            let (status, problem) = receive(connection).await;
            let is_gone = (status, problem["code"].as_str()) == (404, Some("lease_not_found"));
            assert!(is_gone || problem["outcome"] == "not_applied", "{status} {problem}");
        }
        cluster.ready(leader).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_of_the_leader_hands_over_and_answers_what_is_in_flight() {
    let mut cluster = Cluster::start(Setup::of(3)).await;
    let leader = cluster.leader().await;
    let (_, urls) = others(&cluster, leader);
    let survivors = Writers::start(&urls, WRITERS, "w");
    let own = Writers::start(&[cluster.url(leader)], 8, "x");
    survivors.progress(500).await;
    let begun = Instant::now();
    cluster.node(leader).terminate();
    let status = cluster.node(leader).ended(Duration::from_secs(10)).await;
    println!("SIGTERM of the leader: ended with {status} after {:?}", begun.elapsed());
    assert_eq!(status.code(), Some(0));
    survivors.progress(500).await;
    let record = survivors.stop().await;
    assert_unharmed(&record, "SIGTERM of the leader", Duration::from_secs(1));
    let own = own.stop().await;
    let any = cluster.ids().into_iter().find(|&id| id != leader).unwrap();
    // A request that meets the closing of its idle connection has no answer (HTTP/1.1 has no way around that); it was not begun.
    let there = cluster.all(any, "x").await;
    let dropped: Vec<_> = own.unknown.iter().filter(|key| there.contains_key(*key)).collect();
    assert!(dropped.is_empty(), "carried out and not answered: {dropped:?}");
    check(&cluster, any, "w", &record).await;
    check(&cluster, any, "x", &own).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_of_a_follower_is_not_noticed_by_the_clients_of_the_others() {
    let mut cluster = Cluster::start(Setup::of(3)).await;
    let leader = cluster.leader().await;
    let follower = cluster.ids().into_iter().find(|&id| id != leader).unwrap();
    let (_, urls) = others(&cluster, follower);
    let writers = Writers::start(&urls, WRITERS, "w");
    writers.progress(500).await;
    cluster.node(follower).kill();
    writers.progress(500).await;
    cluster.node(follower).start();
    cluster.ready(follower).await;
    writers.progress(200).await;
    let record = writers.stop().await;
    assert_unharmed(&record, "kill -9 of a follower", Duration::from_secs(1));
    check(&cluster, follower, "w", &record).await;
    cluster.same_content(&cluster.ids()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_killed_at_once_come_back_with_everything_acknowledged() {
    let mut cluster = Cluster::start(Setup::of(3)).await;
    let mut records = Vec::new();
    for round in 0..3 {
        let prefix = format!("r{round}-");
        let writers = Writers::start(&cluster.urls(), WRITERS, &prefix);
        writers.progress(300).await;
        for node in &mut cluster.nodes {
            node.kill();
        }
        let record = writers.stop().await;
        let begun = Instant::now();
        for node in &mut cluster.nodes {
            node.start();
        }
        cluster.all_ready().await;
        println!("all killed: ready again after {:?}", begun.elapsed());
        records.push((prefix, record));
        for (prefix, record) in &records {
            check(&cluster, 1 + round % 3, prefix, record).await;
        }
    }
    cluster.same_content(&cluster.ids()).await;
}

/// Reads a key of a member that is starting, until it is ready: before, it may refuse. How often it did.
async fn refusals_until_ready(cluster: &Cluster, id: u64, key: &str, value: &str) -> usize {
    let mut refusals = 0;
    eventually(&format!("member {id} to be ready"), SOON, async || {
        let is_ready = cluster.get(id, "readyz").await.0 == 200;
        match cluster.get(id, &format!("{key}?timeout=300ms")).await {
            // It does not listen yet.
            (0, _) => {}
            (200, found) => assert_eq!(found, value, "{key} on member {id}"),
            // There is a leader already, and it has not heard from it in time.
            (503 | 504, _) => refusals += 1,
            (status, answer) => panic!("{key} on member {id}: {status} {answer}"),
        }
        is_ready.then_some(())
    })
    .await;
    refusals
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_19_before_a_member_is_ready_it_gives_what_was_acknowledged_or_nothing() {
    let mut cluster = Cluster::start(Setup::of(3)).await;
    for round in 0..3 {
        // The one is overwritten in each round, the other is new.
        let (value, new) = (format!("v{round}"), format!("new{round}"));
        for number in 0..20 {
            let old = format!("old{number}");
            assert!(cluster.put(number % 3 + 1, "k", &old).await.unwrap().is_success());
        }
        assert!(cluster.put(1, &new, &value).await.unwrap().is_success());
        assert!(cluster.put(2, "k", &value).await.unwrap().is_success());
        for node in &mut cluster.nodes {
            node.kill();
        }
        for node in &mut cluster.nodes {
            node.start();
        }
        let ids = cluster.ids();
        let reads = ids
            .iter()
            .flat_map(|&id| ["k", &new].map(|key| refusals_until_ready(&cluster, id, key, &value)));
        let refusals: usize = futures_util::future::join_all(reads).await.into_iter().sum();
        println!("all killed: {refusals} reads refused before all were ready");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_terminated_at_once_end_in_order_within_ten_seconds() {
    let mut cluster = Cluster::start(Setup::of(3)).await;
    for round in 0..3 {
        // Whoever waited for these writes' deadlines would be cut off in the middle of the stop.
        let prefix = format!("r{round}-");
        let writers = Writers::start_patient(&cluster.urls(), WRITERS, &prefix);
        writers.progress(300).await;
        let begun = Instant::now();
        for node in &cluster.nodes {
            match round {
                1 => node.hang_up(),
                2 => node.interrupt(),
                _ => node.terminate(),
            }
        }
        for node in &mut cluster.nodes {
            let status = node.ended(Duration::from_secs(10)).await;
            println!("a stop of all: {status} after {:?}", begun.elapsed());
            assert_eq!(status.code(), Some(0));
            assert!(!node.log_text().contains("took too long"), "{}", node.log_text());
        }
        let record = writers.stop().await;
        for node in &mut cluster.nodes {
            node.start();
        }
        cluster.all_ready().await;
        check(&cluster, 1 + round % 3, &prefix, &record).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_member_to_stop_answers_what_can_not_be_committed_any_more() {
    let mut cluster = Cluster::start(Setup::of(3)).await;
    let leader = cluster.leader().await;
    let (others, _) = others(&cluster, leader);
    for id in others {
        cluster.node(id).kill();
    }
    let put = |key: &str| {
        let request = cluster.http.put(format!("{}/{key}?timeout=25s", cluster.url(leader))).body("v");
        tokio::spawn(async move {
            let answer = request.send().await.expect("an answer");
            let status = answer.status().as_u16();
            let problem: serde_json::Value = answer.json().await.unwrap_or_default();
            (status, problem["code"].to_string(), problem["outcome"].to_string())
        })
    };
    // Handed to raft by a leader that has not noticed yet; and, when it has stepped down, never handed to anybody.
    let proposed = put("early");
    eventually("the leader of a minority to step down", SOON, async || {
        cluster.status(leader).await["leader"].is_null().then_some(())
    })
    .await;
    let pending = cluster.status(leader).await["proposals_pending"].as_u64();
    let waiting = put("late");
    let read = cluster.http.get(format!("{}/late?timeout=25s", cluster.url(leader)));
    // It may come too late to be taken in at all.
    let read = tokio::spawn(async move { read.send().await.map_or(503, |answer| answer.status().as_u16()) });
    eventually("the second write to wait", SOON, async || {
        (cluster.status(leader).await["proposals_pending"].as_u64() > pending).then_some(())
    })
    .await;

    cluster.node(leader).terminate();
    assert_eq!(cluster.node(leader).ended(Duration::from_secs(10)).await.code(), Some(0));
    let log = cluster.node(leader).log_text();
    assert!(!log.contains("took too long"), "{log}");
    let answer = |status: u16, code: &str, outcome: &str| (status, format!("{code:?}"), format!("{outcome:?}"));
    assert_eq!(proposed.await.unwrap(), answer(504, "timeout", "unknown"));
    assert_eq!(waiting.await.unwrap(), answer(503, "shutting_down", "not_applied"));
    assert_eq!(read.await.unwrap(), 503);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_ends_watches_and_waits_with_their_reason() {
    let mut cluster = Cluster::start(Setup::of(1)).await;
    assert!(cluster.put(1, "k", "v").await.unwrap().is_success());
    let url = cluster.url(1);
    let get = |path: &str, accept: &str| {
        let request = cluster.http.get(format!("{url}{path}")).header("accept", accept);
        tokio::spawn(async move {
            let answer = request.send().await.unwrap();
            (answer.status().as_u16(), answer.text().await.unwrap())
        })
    };
    let events = get("/v1/watch?prefix=", "text/event-stream");
    let lines = get("/v1/watch?prefix=", "application/x-ndjson");
    let wait = get("/k?wait=20s", "*/*");
    eventually("all of them to wait", SOON, async || {
        let metrics = cluster.get(1, "metrics").await.1;
        metrics.lines().any(|line| line == "metcd_watchers 3").then_some(())
    })
    .await;
    cluster.node(1).terminate();
    assert_eq!(cluster.node(1).ended(Duration::from_secs(10)).await.code(), Some(0));

    let (status, text) = events.await.unwrap();
    assert_eq!(status, 200);
    let last = text.trim_end().rsplit("\n\n").next().unwrap();
    let data = last.strip_prefix("event: error\ndata: ").unwrap_or_else(|| panic!("{text}"));
    let (status, text) = lines.await.unwrap();
    assert_eq!(status, 200);
    let line = text.lines().last().unwrap();
    let (status, problem) = wait.await.unwrap();
    assert_eq!(status, 503, "{problem}");
    for message in [data, line, &problem] {
        let message: serde_json::Value = serde_json::from_str(message).unwrap();
        assert_eq!(message["code"], "shutting_down", "{message}");
    }
    assert!(line.contains("\"type\":\"error\""), "{line}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_sigterm_ends_a_member_that_is_still_held_up() {
    let mut cluster = Cluster::start(Setup::of(1)).await;
    // A request that was taken in, and whose body goes on and never ends.
    let mut held = TcpStream::connect(("127.0.0.1", cluster.node(1).client_port)).await.unwrap();
    let head = "PUT /k?timeout=25s HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\ncontent-length: 100000\r\n\r\n";
    held.write_all(head.as_bytes()).await.unwrap();
    let mut answer = [0; 25];
    held.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 100 Continue\r\n\r\n");
    let held = tokio::spawn(async move {
        while held.write_all(b"x").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });

    cluster.node(1).terminate();
    // Of two signals that come together the second is lost.
    eventually("the first signal to be heard", SOON, async || {
        cluster.node(1).log_text().contains("stopping in order").then_some(())
    })
    .await;
    assert!(cluster.node(1).is_running(), "it waits for the request");
    cluster.node(1).terminate();
    let status = cluster.node(1).ended(SOON).await;
    assert_eq!(status.code(), Some(1), "at once, and not in order");
    held.await.unwrap();
    let log = cluster.node(1).log_text();
    assert!(!log.contains("took too long"), "{log}");
    cluster.node(1).start();
    cluster.ready(1).await;
    assert_eq!(cluster.get(1, "k").await.0, 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_members_go_on_without_two() {
    let mut cluster = Cluster::start(Setup::of(5)).await;
    let leader = cluster.leader().await;
    let second = leader % 5 + 1;
    let rest: Vec<u64> = cluster.ids().into_iter().filter(|&id| id != leader && id != second).collect();
    let urls: Vec<String> = rest.iter().map(|&id| cluster.url(id)).collect();
    let writers = Writers::start(&urls, WRITERS, "w");
    writers.progress(500).await;
    cluster.node(second).kill();
    cluster.node(leader).kill();
    writers.progress(500).await;
    let record = writers.stop().await;
    assert_unharmed(&record, "kill -9 of two of five", ELECTION_GAP + Duration::from_secs(2));
    for id in rest {
        check(&cluster, id, "w", &record).await;
    }
    cluster.node(leader).start();
    cluster.node(second).start();
    cluster.all_ready().await;
    cluster.same_content(&cluster.ids()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transfer_of_leadership_is_hardly_noticed() {
    let cluster = Cluster::start(Setup::of(3)).await;
    let writers = Writers::start(&cluster.urls(), WRITERS, "w");
    writers.progress(300).await;
    for _ in 0..5 {
        let leader = cluster.leader().await;
        let to = leader % 3 + 1;
        let (status, answer) = cluster
            .call(reqwest::Method::POST, leader, "/leader", Some(serde_json::json!({ "id": to })))
            .await;
        assert_eq!((status, answer["id"].as_u64()), (200, Some(to)), "{answer}");
        eventually("the transfer", SOON, async || (cluster.leader().await == to).then_some(())).await;
        writers.progress(100).await;
    }
    let record = writers.stop().await;
    assert_unharmed(&record, "five transfers", Duration::from_millis(1_500));
    check(&cluster, 1, "w", &record).await;
}
