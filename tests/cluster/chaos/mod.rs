//! Seeded, overlapping faults for a while: `scripts/chaos --seconds 300 --seed 1 --nodes 5`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::harness::{Cluster, Seed, Setup, client};
use crate::load::{Writers, check};
use crate::small_disk::{FILLER, SmallDisk};

const COUNTERS: u64 = 4;
/// How often it is looked at what the members take.
const LOOK_EVERY: Duration = Duration::from_secs(30);

fn parameter(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Increments by rewriting: under one `Idempotency-Key` each, retried on any member until acknowledged, so the version counts them.
async fn count(urls: Vec<String>, counter: u64, stop: Arc<AtomicBool>, done: Arc<AtomicU64>) {
    let http = client();
    let mut turn = counter as usize;
    for number in 1.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        loop {
            let url = format!("{}/counter{counter}", urls[turn % urls.len()]);
            let request = http
                .put(url)
                .header("idempotency-key", format!("{counter}-{number}"))
                .body(number.to_string());
            match request.send().await {
                Ok(answer) if answer.status().is_success() => break,
                Ok(_) | Err(_) => turn += 1,
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        done.store(number, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Follows the counters, on another member after each loss, until told to stop; checks order and completeness as it goes.
async fn follow(urls: Vec<String>, stop: Arc<AtomicBool>, seen: Arc<parking_lot::Mutex<BTreeMap<String, u64>>>) {
    let http = client();
    let mut revision = 1;
    for turn in 0.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let url = format!("{}/v1/watch?prefix=counter&from_revision={}", urls[turn % urls.len()], revision + 1);
        let sent = http
            .get(url)
            .header("accept", "application/x-ndjson")
            .timeout(Duration::from_secs(5))
            .send()
            .await;
        let Ok(mut answer) = sent else { continue };
        assert_ne!(answer.status().as_u16(), 410, "the history is kept for an hour");
        if !answer.status().is_success() {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        }
        let mut text = Vec::new();
        while let Ok(Some(chunk)) = answer.chunk().await {
            text.extend_from_slice(&chunk);
            while let Some(end) = text.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = text.drain(..=end).collect();
                let message: Value = serde_json::from_slice(&line).unwrap();
                if message["type"] != "change" {
                    continue;
                }
                let now = message["revision"].as_u64().unwrap();
                assert!(now > revision, "revision {now} after {revision}");
                revision = now;
                for event in message["events"].as_array().unwrap() {
                    let key = event["kv"]["key"].as_str().unwrap().to_owned();
                    let version = event["kv"]["version"].as_u64().unwrap();
                    let before = seen.lock().insert(key.clone(), version).unwrap_or(0);
                    assert_eq!(version, before + 1, "the watch of {key} has a gap or a duplicate");
                }
            }
        }
    }
}

/// What is wrong with a member at the moment, and until when.
enum Fault {
    Killed,
    Paused,
    Cut,
    Full,
}

struct Faults {
    seed: Seed,
    /// Where member 1 lives, if this may be arranged.
    disk: Option<SmallDisk>,
    current: BTreeMap<u64, (Fault, Instant)>,
    /// Members whose links are slow, besides whatever else is wrong with them.
    slow: BTreeMap<u64, Instant>,
    counts: BTreeMap<&'static str, u64>,
    /// The most members that were hit at one time, slow links counted by themselves.
    most_at_once: usize,
    next_id: u64,
}

impl Faults {
    async fn step(&mut self, cluster: &mut Cluster) {
        let now = Instant::now();
        let over: Vec<u64> = self
            .current
            .iter()
            .filter(|(_, (_, until))| *until <= now)
            .map(|(&id, _)| id)
            .collect();
        for id in over {
            self.end(cluster, id);
        }
        self.end_slow_links(cluster, now);
        let ids: Vec<u64> = cluster.ids();
        let id = ids[self.seed.below(ids.len() as u64) as usize];
        let until = now + Duration::from_millis(200 + self.seed.below(3_000));
        let kind = self.seed.below(13);
        if kind == 12 {
            self.fill_disk(until);
            return;
        }
        if kind >= 10 {
            let delay = Duration::from_millis(10 + self.seed.below(150));
            cluster.links.slow_down(id, delay);
            self.slow.insert(id, until + Duration::from_secs(3));
            self.count("slow links");
            return;
        }
        if self.current.contains_key(&id) {
            return;
        }
        let (name, fault) = match kind {
            0..=2 => {
                cluster.node(id).kill();
                ("kill -9", Some(Fault::Killed))
            }
            3..=4 => {
                cluster.node(id).pause();
                ("SIGSTOP", Some(Fault::Paused))
            }
            5..=6 => {
                cluster.links.isolate(id, &ids);
                ("isolation", Some(Fault::Cut))
            }
            7 => {
                let other = ids[self.seed.below(ids.len() as u64) as usize];
                cluster.links.cut_one_way(id, other);
                ("one-way cut", Some(Fault::Cut))
            }
            8 => {
                // A change of membership waits for a quorum: it begins when everybody is well.
                for other in ids {
                    self.end(cluster, other);
                }
                self.end_slow_links(cluster, now + Duration::from_secs(60));
                self.churn(cluster).await;
                ("membership churn", None)
            }
            _ => {
                // Refused without a leader, which is as good.
                let _ = cluster
                    .call(Method::POST, id, "/leader?timeout=2s", Some(json!({ "id": id })))
                    .await;
                ("transfer", None)
            }
        };
        if let Some(fault) = fault {
            self.current.insert(id, (fault, until));
        }
        self.count(name);
    }

    /// A member whose writes fail ends; it is started again when there is room.
    fn fill_disk(&mut self, until: Instant) {
        let Some(disk) = self.disk.as_ref().filter(|_| !self.current.contains_key(&1)) else {
            return;
        };
        // Now and then it has room for a little.
        disk.fill(self.seed.below(3) << 20);
        self.current.insert(1, (Fault::Full, until));
        self.count("full disk");
    }

    fn count(&mut self, name: &'static str) {
        *self.counts.entry(name).or_insert(0) += 1;
        self.most_at_once = self.most_at_once.max(self.current.len() + self.slow.len());
    }

    fn end_slow_links(&mut self, cluster: &Cluster, now: Instant) {
        self.slow.retain(|&id, until| {
            let is_over = *until <= now;
            if is_over {
                cluster.links.slow_down(id, Duration::ZERO);
            }
            !is_over
        });
    }

    fn end(&mut self, cluster: &mut Cluster, id: u64) {
        match self.current.remove(&id) {
            Some((Fault::Killed, _)) => cluster.node(id).start(),
            Some((Fault::Paused, _)) => cluster.node(id).resume(),
            // All links heal at once: the others' cuts end early.
            Some((Fault::Cut, _)) => cluster.links.heal(),
            Some((Fault::Full, _)) => {
                if let Some(disk) = &self.disk {
                    disk.make_room();
                }
                let node = cluster.node(id);
                if !node.is_running() {
                    node.kill();
                    node.start();
                }
            }
            None => {}
        }
    }

    /// A member comes, catches up, and goes for ever.
    async fn churn(&mut self, cluster: &mut Cluster) {
        self.next_id += 1;
        let id = self.next_id;
        let asked = cluster.ids()[0];
        cluster.joiner(Some(id)).start();
        cluster.ready(id).await;
        let (status, answer) = cluster
            .call(Method::DELETE, asked, &format!("/members/{id}?timeout=20s"), None)
            .await;
        assert_eq!(status, 200, "removal of {id}: {answer}");
        let status = cluster.node(id).ended(Duration::from_secs(30)).await;
        assert_eq!(status.code(), Some(1), "removed member {id}");
        cluster.nodes.retain(|node| node.id != id);
    }
}

fn disk_bytes(dir: &std::path::Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => disk_bytes(&entry.path()),
            Ok(_) if entry.file_name() == FILLER => 0,
            Ok(meta) => meta.len(),
            Err(_) => 0,
        })
        .sum()
}

/// What a member may take at the most, however long it runs: so much for itself, and so much for each write there ever was, all of which
/// it keeps (history is kept for an hour).
const OWN_BYTES: u64 = 192 << 20;
const BYTES_PER_WRITE: u64 = 3 << 10;
const MAX_DESCRIPTORS: usize = 300;
/// More than a member takes in half an hour.
const DISK_MEGABYTES: u64 = 2048;

/// No member takes more than it may.
fn check_bounds(cluster: &mut Cluster, writes: u64) {
    let allowed = OWN_BYTES + writes * BYTES_PER_WRITE;
    for node in &mut cluster.nodes {
        if !node.is_running() {
            continue;
        }
        let (resident, _, descriptors) = node.figures();
        let on_disk = disk_bytes(&node.data_dir);
        let id = node.id;
        assert!(resident <= allowed, "member {id}: {resident} bytes resident after {writes} writes");
        assert!(on_disk <= allowed, "member {id}: {on_disk} bytes on disk after {writes} writes");
        assert!(descriptors <= MAX_DESCRIPTORS, "member {id}: {descriptors} descriptors");
    }
}

fn report(cluster: &Cluster, when: &str) {
    for node in &cluster.nodes {
        let (resident, peak, descriptors) = node.figures();
        println!(
            "FIG {when}: member {}: {} MiB resident, peak {} MiB, {descriptors} descriptors, {} MiB on disk",
            node.id,
            resident >> 20,
            peak >> 20,
            disk_bytes(&node.data_dir) >> 20
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "as long as one likes: scripts/chaos"]
async fn chaos() {
    let seconds = parameter("METCD_CHAOS_SECONDS", 60);
    let number = parameter("METCD_CHAOS_SEED", 1);
    let founders = parameter("METCD_CHAOS_NODES", 3);
    println!("scripts/chaos --seconds {seconds} --seed {number} --nodes {founders}");
    let setup = Setup::of(founders)
        .proxied()
        .set("raft.snapshot_entries=500")
        .set("raft.keep_entries=100");
    let mut cluster = Cluster::prepare(setup).await;
    let disk = SmallDisk::mount(&mut cluster, DISK_MEGABYTES);
    for node in &mut cluster.nodes {
        node.start();
    }
    cluster.all_ready().await;
    let urls = cluster.urls();
    let writers = Writers::start_slow(&urls, 8, "w", Duration::from_millis(5));
    let stop = Arc::new(AtomicBool::new(false));
    let done: Vec<Arc<AtomicU64>> = (0..COUNTERS).map(|_| Arc::default()).collect();
    let mut counters = JoinSet::new();
    for counter in 0..COUNTERS {
        counters.spawn(count(urls.clone(), counter, stop.clone(), done[counter as usize].clone()));
    }
    let seen = Arc::new(parking_lot::Mutex::new(BTreeMap::new()));
    let stop_watch = Arc::new(AtomicBool::new(false));
    let watch = tokio::spawn(follow(urls.clone(), stop_watch.clone(), seen.clone()));
    report(&cluster, "at the start");

    let mut faults = Faults {
        seed: Seed(number),
        disk,
        current: BTreeMap::new(),
        slow: BTreeMap::new(),
        counts: BTreeMap::new(),
        most_at_once: 0,
        next_id: 100,
    };
    let begun = Instant::now();
    let until = begun + Duration::from_secs(seconds);
    let mut looked_at = begun;
    while Instant::now() < until {
        faults.step(&mut cluster).await;
        if looked_at.elapsed() > LOOK_EVERY {
            looked_at = Instant::now();
            let counted: u64 = done.iter().map(|done| done.load(Ordering::Relaxed)).sum();
            let writes = writers.acknowledged() as u64 + counted;
            println!("FIG after {} s: {writes} writes acknowledged", begun.elapsed().as_secs());
            check_bounds(&mut cluster, writes);
        }
        tokio::time::sleep(Duration::from_millis(100 + faults.seed.below(500))).await;
    }
    for id in cluster.ids() {
        faults.end(&mut cluster, id);
    }
    faults.end_slow_links(&cluster, Instant::now() + Duration::from_secs(60));
    cluster.links.heal();
    cluster.all_ready().await;
    writers.progress(100).await;
    stop.store(true, Ordering::Relaxed);
    while let Some(ended) = counters.join_next().await {
        ended.unwrap();
    }
    let record = writers.stop().await;
    println!("FIG faults: {:?}, up to {} at once", faults.counts, faults.most_at_once);
    println!(
        "FIG {} acknowledged, {} unknown, {} refused, longest gap {:?}",
        record.acknowledged.len(),
        record.unknown.len(),
        record.refused.len(),
        record.longest_gap()
    );
    report(&cluster, "at the end");
    for id in cluster.ids() {
        check(&cluster, id, "w", &record).await;
        let found = cluster.all(id, "counter").await;
        for (counter, done) in done.iter().enumerate() {
            let (value, version) = &found[&format!("counter{counter}")];
            let done = done.load(Ordering::Relaxed);
            assert_eq!(
                (value.as_str(), *version),
                (done.to_string().as_str(), done),
                "counter {counter} on member {id}"
            );
        }
    }
    cluster.same_content(&cluster.ids()).await;
    crate::harness::eventually("the watch to have seen everything", crate::harness::SOON, async || {
        let seen = seen.lock();
        let complete = |counter: usize| seen.get(&format!("counter{counter}")) == Some(&done[counter].load(Ordering::Relaxed));
        (0..done.len()).all(complete).then_some(())
    })
    .await;
    stop_watch.store(true, Ordering::Relaxed);
    watch.await.unwrap();
}
