//! Members that come back: from their own disk, from the leader's log, from a snapshot.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::harness::{Cluster, SOON, Seed, Setup, eventually, free_port};
use crate::load::{Writers, check};

const WALS: [&str; 3] = ["sled", "raft-engine", "rocksdb"];
const STORES: [&str; 3] = ["memory", "sled", "rocksdb"];

/// Engines that this build has.
fn built(engines: &'static [&'static str]) -> impl Iterator<Item = &'static str> {
    engines
        .iter()
        .copied()
        .filter(|&engine| cfg!(feature = "rocksdb") || engine != "rocksdb")
}

/// `METCD_TEST_ROUNDS` makes the loops longer: 2 in CI, 20 for a release.
fn rounds() -> u64 {
    std::env::var("METCD_TEST_ROUNDS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(2)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_13_a_single_node_killed_at_random_moments_keeps_what_it_acknowledged() {
    let mut seed = Seed(7);
    for wal in built(&WALS) {
        for store in built(&STORES) {
            let setup = Setup::of(1)
                .engines(wal, store)
                .set("raft.snapshot_entries=200")
                .set("raft.keep_entries=50");
            let mut cluster = Cluster::start(setup).await;
            let mut records = Vec::new();
            for round in 0..rounds() {
                let prefix = format!("r{round}-");
                let writers = Writers::start(&cluster.urls(), 8, &prefix);
                writers.progress(20).await;
                tokio::time::sleep(Duration::from_millis(seed.below(400))).await;
                cluster.node(1).kill();
                let record = writers.stop().await;
                cluster.node(1).start();
                cluster.ready(1).await;
                records.push((prefix, record));
                for (prefix, record) in &records {
                    check(&cluster, 1, prefix, record).await;
                }
            }
            println!("FIG {wal} × {store}: {} restarts", records.len());
        }
    }
}

/// What a member has logged since its log was so long.
fn logged_since(cluster: &mut Cluster, id: u64, length: usize) -> String {
    cluster.node(id).log_text().get(length..).unwrap_or_default().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_13_a_sled_store_is_rebuilt_after_a_crash_and_used_as_it_is_after_a_stop() {
    const REBUILT: &str = "rebuilt from the newest snapshot and the log";
    const LOADED: &str = "loading a snapshot";
    let setup = Setup::of(3)
        .engines("sled", "sled")
        .set("raft.snapshot_entries=100")
        .set("raft.keep_entries=20");
    let mut cluster = Cluster::start(setup).await;
    let ids = cluster.ids();
    let member = cluster.leader().await % 3 + 1;
    let mark = cluster.node(member).data_dir.join("store").join("CLEAN");
    let mut records = Vec::new();

    // One member, then all at once: each has only a snapshot file and its log.
    for (prefix, killed) in [("one-", vec![member]), ("all-", ids.clone())] {
        let writers = Writers::start(&cluster.urls(), 12, prefix);
        writers.progress(400).await;
        let length = cluster.node(member).log_text().len();
        for &id in &killed {
            cluster.node(id).kill();
        }
        assert!(!mark.exists());
        for &id in &killed {
            cluster.node(id).start();
        }
        cluster.all_ready().await;
        let log = logged_since(&mut cluster, member, length);
        assert!(log.contains(REBUILT) && log.contains(LOADED), "{log}");
        writers.progress(100).await;
        records.push((prefix, writers.stop().await));
        for (prefix, record) in &records {
            check(&cluster, member, prefix, record).await;
        }
        cluster.same_content(&ids).await;
    }

    let length = cluster.node(member).log_text().len();
    cluster.node(member).terminate();
    assert!(cluster.node(member).ended(SOON).await.success());
    assert!(mark.exists());
    cluster.node(member).start();
    cluster.ready(member).await;
    assert!(!mark.exists());
    let log = logged_since(&mut cluster, member, length);
    assert!(!log.contains(REBUILT) && !log.contains(LOADED), "{log}");
    let first = cluster.status(member).await["wal"]["first_index"].as_u64().unwrap();
    let snapshots = cluster.node(member).data_dir.join("snapshots");
    let (newest, _) = metcd::snapshot_files::newest(&snapshots)
        .unwrap()
        .expect("it stays beside the store");
    assert!(first <= newest + 1, "the log begins at {first}, the newest snapshot is {newest}");

    // What it came back with was newer than that file, and is lost again.
    let length = cluster.node(member).log_text().len();
    cluster.node(member).kill();
    cluster.node(member).start();
    cluster.ready(member).await;
    assert!(logged_since(&mut cluster, member, length).contains(REBUILT));
    for (prefix, record) in &records {
        check(&cluster, member, prefix, record).await;
    }
    cluster.same_content(&ids).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_28_a_member_that_missed_a_compacted_log_catches_up_by_snapshot_under_load() {
    for store in built(&STORES) {
        let setup = Setup::of(3)
            .engines("sled", store)
            .set("raft.snapshot_entries=100")
            .set("raft.keep_entries=20");
        let mut cluster = Cluster::start(setup).await;
        let leader = cluster.leader().await;
        let away = leader % 3 + 1;
        let urls: Vec<String> = cluster
            .ids()
            .into_iter()
            .filter(|&id| id != away)
            .map(|id| cluster.url(id))
            .collect();
        let writers = Writers::start_slow(&urls, 16, "w", Duration::from_millis(2));
        writers.progress(100).await;
        cluster.node(away).kill();
        compacted_beyond(
            &cluster,
            leader,
            cluster.status(leader).await["last_index"].as_u64().unwrap_or(0),
            &writers,
        )
        .await;
        let begun = Instant::now();
        cluster.node(away).start();
        cluster.ready(away).await;
        println!("FIG {store}: caught up by snapshot under load after {:?}", begun.elapsed());

        // Once more, killed in the middle of it.
        cluster.node(away).kill();
        let last = cluster.status(leader).await["wal"]["last_index"].as_u64().unwrap_or(0);
        compacted_beyond(&cluster, leader, last, &writers).await;
        for delay in [5, 60, 120, 250] {
            cluster.node(away).start();
            tokio::time::sleep(Duration::from_millis(delay)).await;
            cluster.node(away).kill();
        }
        cluster.node(away).start();
        cluster.ready(away).await;
        let record = writers.stop().await;
        assert!(
            record.unknown.is_empty() && record.refused.is_empty(),
            "{:?}",
            record.refused.first()
        );
        check(&cluster, away, "w", &record).await;
        cluster.same_content(&cluster.ids()).await;
        cluster.node(away).kill();
        cluster.node(away).start();
        cluster.ready(away).await;
        check(&cluster, away, "w", &record).await;
    }
}

/// Writes until the leader's log begins after `index`.
async fn compacted_beyond(cluster: &Cluster, leader: u64, index: u64, writers: &Writers) {
    writers.progress(100).await;
    eventually("the log to be compacted", SOON * 2, async || {
        let first = cluster.status(leader).await["wal"]["first_index"].as_u64()?;
        (first > index.max(100)).then_some(())
    })
    .await;
}

/// What a member that joins costs the one that sends it a snapshot, and itself.
struct CatchUp {
    took: Duration,
    /// Resident bytes more than before, at most.
    sender_grew: u64,
    /// Resident bytes at most.
    receiver_peak: u64,
}

/// One member with so many keys; another joins, while clients go on to write.
async fn join_a_full_member(setup: Setup, keys: u64, value_bytes: usize) -> CatchUp {
    const WRITERS: u64 = 16;
    const BATCH: u64 = 32;
    let mut cluster = Cluster::start(setup).await;
    let url = cluster.url(1);
    let mut tasks = tokio::task::JoinSet::new();
    for writer in 0..WRITERS {
        let (http, url) = (crate::harness::client(), url.clone());
        tasks.spawn(async move {
            for batch in 0..keys.div_ceil(WRITERS * BATCH) {
                let put = |n: u64| json!({ "put": { "key": format!("k{writer}-{batch}-{n}"), "value": "v".repeat(value_bytes) } });
                let txn = json!({ "compare": [], "then": (0..BATCH).map(put).collect::<Vec<_>>(), "else": [] });
                let answer = http.post(format!("{url}/v1/txn?timeout=30s")).json(&txn).send().await.unwrap();
                assert!(answer.status().is_success(), "{}", answer.text().await.unwrap());
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    // What was written left its traces in memory, which a start does away with.
    cluster.node(1).terminate();
    assert!(cluster.node(1).ended(SOON).await.success());
    cluster.node(1).start();
    cluster.ready(1).await;
    let writers = Writers::start_slow(&[url], 4, "w", Duration::from_millis(10));
    writers.progress(20).await;
    let before = cluster.node(1).figures().0;
    cluster.node(1).forget_peak();
    let begun = Instant::now();
    cluster.joiner(Some(2)).start();
    eventually("the new member to catch up", Duration::from_secs(600), async || {
        let answer = cluster.http.get(format!("{}/readyz", cluster.url(2))).send().await.ok()?;
        answer.status().is_success().then_some(())
    })
    .await;
    let took = begun.elapsed();
    let (sender, receiver) = (cluster.node(1).figures(), cluster.node(2).figures());
    let record = writers.stop().await;
    assert!(
        record.unknown.is_empty() && record.refused.is_empty(),
        "{:?}",
        record.refused.first()
    );
    let metrics = cluster.http.get(format!("{}/metrics", cluster.url(2))).send().await.unwrap();
    let metrics = metrics.text().await.unwrap();
    assert!(
        metrics.contains("metcd_snapshot_duration_seconds_count{kind=\"install\"} 1\n"),
        "by a snapshot, and by one: {metrics}"
    );
    check(&cluster, 2, "w", &record).await;
    cluster.same_content(&[1, 2]).await;
    CatchUp {
        took,
        sender_grew: sender.1.saturating_sub(before),
        receiver_peak: receiver.1,
    }
}

impl CatchUp {
    fn print(&self, keys: u64, store: &str) {
        println!(
            "FIG {keys} keys, {store}: caught up in {:?}; the sender grew by {} MiB, the receiver had {} MiB at most",
            self.took,
            self.sender_grew >> 20,
            self.receiver_peak >> 20
        );
    }
}

/// Rule 28: memory is bounded by pieces, not by the size of the store.
#[cfg(feature = "rocksdb")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_28_a_store_goes_to_a_new_member_in_pieces() {
    const KEYS: u64 = 8192;
    const VALUE: usize = 24 << 10;
    let setup = Setup::of(1).engines("raft-engine", "rocksdb");
    let costs = join_a_full_member(setup, KEYS, VALUE).await;
    costs.print(KEYS, "rocksdb");
    let all = KEYS * VALUE as u64;
    assert!(costs.sender_grew < all / 2, "the sender grew by {}", costs.sender_grew);
    assert!(costs.receiver_peak < all, "the receiver had {}", costs.receiver_peak);
}

/// `METCD_TEST_KEYS=1000000 METCD_TEST_STORE=rocksdb cargo test --release --features rocksdb --test cluster a_million -- --ignored --nocapture`
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "minutes long: see its comment for the command"]
async fn a_million_keys_reach_a_new_member() {
    let keys = std::env::var("METCD_TEST_KEYS").ok().and_then(|text| text.parse().ok());
    let keys: u64 = keys.unwrap_or(1_000_000);
    let store = std::env::var("METCD_TEST_STORE").unwrap_or_default();
    let store = built(&STORES).find(|known| *known == store).unwrap_or("memory");
    join_a_full_member(Setup::of(1).engines("sled", store), keys, 256)
        .await
        .print(keys, store);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_moved_is_reached_where_the_cluster_is_told() {
    let mut cluster = Cluster::start(Setup::of(3)).await;
    let leader = cluster.leader().await;
    let moved = leader % 3 + 1;
    let stays = cluster.ids().into_iter().find(|id| ![leader, moved].contains(id)).unwrap();
    cluster.node(moved).terminate();
    assert!(cluster.node(moved).ended(SOON).await.success());
    let peer = format!("127.0.0.1:{}", free_port());
    let peer_url = format!("http://{peer}");
    for flag in ["--listen-peer", "--advertise-peer-url"] {
        cluster.node(moved).drop_args(flag);
    }
    cluster
        .node(moved)
        .add_args(&["--listen-peer", &peer, "--advertise-peer-url", &peer_url]);
    assert!(cluster.put(leader, "k", "while it was away").await.unwrap().is_success());
    cluster.node(moved).start();
    // By the member that does not lead: it is the cluster's affair.
    let path = format!("/members/{moved}");
    let (status, member) = cluster
        .call(reqwest::Method::PATCH, stays, &path, Some(json!({ "peer_url": peer_url })))
        .await;
    assert_eq!((status, &member["peer_url"]), (200, &json!(peer_url)), "{member}");
    cluster.ready(moved).await;
    assert_eq!(cluster.get(moved, "k").await, (200, "while it was away".to_owned()));
    // Of two members it is half of the majority.
    cluster.node(stays).kill();
    assert!(cluster.put(moved, "k", "with it").await.unwrap().is_success());
}

/// What the flags say counts from the start on; what was said by PATCH since stays.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_client_url_and_name_are_told_at_the_next_start() {
    let mut cluster = Cluster::start(Setup::of(3)).await;
    let leader = cluster.leader().await;
    let changed = leader % 3 + 1;
    let advertised = cluster.node(changed).data_dir.join("advertised.toml");
    eventually("what it told to be written down", SOON, async || advertised.exists().then_some(())).await;
    cluster.node(changed).terminate();
    assert!(cluster.node(changed).ended(SOON).await.success());
    let port = free_port();
    let url = format!("http://127.0.0.1:{port}");
    cluster.node(changed).drop_args("--listen-client");
    cluster.node(changed).client_port = port;
    cluster
        .node(changed)
        .add_args(&["--listen-client", &format!("127.0.0.1:{port}"), "--name", "moved"]);
    cluster.node(changed).start();
    cluster.ready(changed).await;
    eventually("the others to know", SOON, async || {
        let table = cluster.get_json(leader, "/members").await?;
        let member = table["members"].as_array()?.iter().find(|member| member["id"] == changed)?.clone();
        (member["client_url"] == url && member["name"] == "moved").then_some(())
    })
    .await;
}

/// Made anew, the log would forget what this member acknowledged, and with one that missed it be a majority without it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_whose_log_is_gone_does_not_start() {
    let mut cluster = Cluster::start(Setup::of(1)).await;
    assert!(cluster.put(1, "k", "v").await.unwrap().is_success());
    cluster.node(1).kill();
    let wal = cluster.node(1).data_dir.join("wal");
    assert!(wal.is_dir(), "{}", wal.display());
    let aside = cluster.dir().join("wal-aside");
    std::fs::rename(&wal, &aside).unwrap();
    cluster.node(1).start();
    assert_eq!(cluster.node(1).ended(SOON).await.code(), Some(1));
    assert!(cluster.node(1).log_text().contains("the log of this member is gone"));
    assert!(!wal.exists(), "nothing is made in its place");
    std::fs::rename(&aside, &wal).unwrap();
    cluster.node(1).start();
    cluster.ready(1).await;
    assert_eq!(cluster.get(1, "k").await, (200, "v".to_owned()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_moved_without_telling_is_told_what_to_do() {
    let mut cluster = Cluster::start(Setup::of(1)).await;
    cluster.node(1).terminate();
    assert!(cluster.node(1).ended(SOON).await.success());
    assert!(!cluster.node(1).log_text().contains("another peer address"));
    let elsewhere = format!("127.0.0.1:{}", free_port());
    for flag in ["--listen-peer", "--advertise-peer-url"] {
        cluster.node(1).drop_args(flag);
    }
    cluster.node(1).add_args(&["--listen-peer", &elsewhere]);
    cluster.node(1).start();
    cluster.ready(1).await;
    let advice = format!("metcd member update 1 --peer-url http://{elsewhere}");
    eventually("the warning", SOON, async || {
        cluster.node(1).log_text().contains(&advice).then_some(())
    })
    .await;
}

/// A task that is still being dropped may close the store when the process has begun to end: RocksDB aborted it then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_soon_after_a_start_ends_with_exit_code_0() {
    for store in built(&STORES) {
        let mut cluster = Cluster::start(Setup::of(1).engines("sled", store)).await;
        for _ in 0..8 {
            assert!(cluster.put(1, "k", "v").await.unwrap().is_success());
            cluster.node(1).terminate();
            let status = cluster.node(1).ended(SOON).await;
            assert_eq!(status.code(), Some(0), "{store}: {status}");
            cluster.node(1).start();
            cluster.ready(1).await;
        }
    }
}

/// Whoever reads the reason must not be led to empty the directory of the only member there is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_lacks_a_file_names_it_and_the_way_out() {
    let mut cluster = Cluster::start(Setup::of(1)).await;
    cluster.node(1).terminate();
    assert!(cluster.node(1).ended(SOON).await.success());
    let data_dir = cluster.node(1).data_dir.clone();
    for name in ["wal/fence", "wal/journal-0", "identity.toml", "boot"] {
        let (file, aside) = (data_dir.join(name), data_dir.with_extension("aside"));
        std::fs::rename(&file, &aside).unwrap();
        cluster.node(1).start();
        assert_eq!(cluster.node(1).ended(SOON).await.code(), Some(1), "{name}");
        let log = cluster.node(1).log_text();
        let last = log.lines().last().unwrap_or_default();
        assert!(last.contains(name) && last.contains("is missing"), "{last}");
        assert!(last.contains("under a new id") && last.contains("metcd snapshot restore"), "{last}");
        std::fs::rename(&aside, &file).unwrap();
    }
    let snapshots = std::fs::read_dir(data_dir.join("snapshots")).unwrap();
    let newest = snapshots.map(|entry| entry.unwrap().path()).max().unwrap();
    let intact = std::fs::read(&newest).unwrap();
    std::fs::write(&newest, &intact[..intact.len() - 9]).unwrap();
    cluster.node(1).start();
    assert_eq!(cluster.node(1).ended(SOON).await.code(), Some(1));
    let log = cluster.node(1).log_text();
    let last = log.lines().last().unwrap_or_default();
    assert!(
        last.contains(&newest.display().to_string()) && last.contains("put an intact copy of this file there"),
        "{last}"
    );
    std::fs::write(&newest, &intact).unwrap();
    cluster.node(1).start();
    cluster.ready(1).await;
}
