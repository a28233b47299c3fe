//! Seeded, overlapping faults for a while: `scripts/chaos --seconds 300 --seed 1 --nodes 5`. What clients and watches hear is held against
//! the oracles of the simulation (`tests/common`): each key is linearizable, by search; the history of revisions has no gap, and in it is
//! what was acknowledged, once, and nothing that was answered `not_applied`.

mod asking;
mod book;
mod clients;
mod faults;
mod leases;
mod watching;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use crate::harness::{Cluster, SOON, Setup, eventually};
use crate::load::{Record, Writers, check, value_of};
use crate::small_disk::{FILLER, SmallDisk};
use book::Book;
use clients::Client;
use faults::Faults;
use watching::Watch;

const KEY_CLIENTS: u64 = 12;
const BANK_CLIENTS: u64 = 2;
const LEASE_CLIENTS: u64 = 6;
const COUNTERS: u64 = 4;
/// What is watched: everything, by three who begin with different members, and two prefixes.
const WATCHED: [&str; 5] = ["", "", "", "counter", "k"];
/// For the last leases to end, and the last requests to be answered, once everybody is well.
const END_WITHIN: Duration = Duration::from_secs(120);
/// How often it is looked at what the members take.
const LOOK_EVERY: Duration = Duration::from_secs(30);

fn parameter(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
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

/// Everybody is asked for everything.
async fn read_everything(cluster: &Cluster, book: &Book) {
    for id in cluster.ids() {
        let asked = book.asked();
        let found = cluster.all(id, "k").await;
        book.read_all(asked, &found);
    }
}

fn summary(book: &Book, record: &Record) {
    let tallies = book.tallies();
    println!(
        "writers: {} acknowledged, {} unknown, {} not applied, longest gap {:?}",
        record.acknowledged.len(),
        record.unknown.len(),
        record.refused.len(),
        record.longest_gap()
    );
    println!(
        "clients: {} operations ({} refused, {} not applied, {} unknown), {} tried again under their Idempotency-Key, {} answered as before",
        tallies.operations, tallies.refused, tallies.not_applied, tallies.unknown, tallies.retries, tallies.replayed
    );
    println!(
        "bank: {} transfers, {} reads; leases: {} granted, {} renewals, {} ended; watches: {} streams, {} revisions delivered",
        tallies.transfers, tallies.bank_reads, tallies.leases, tallies.renewals, tallies.expired, tallies.streams, tallies.watched
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "as long as one likes: scripts/chaos"]
async fn chaos() {
    let seconds = parameter("METCD_CHAOS_SECONDS", 60);
    let number = parameter("METCD_CHAOS_SEED", 1);
    let founders = parameter("METCD_CHAOS_NODES", 3);
    chaos_of(seconds, number, founders).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chaos_for_a_short_while() {
    let faults = chaos_of(25, 7, 3).await;
    faults.check_kinds(&["kill -9", "SIGSTOP", "isolation", "one-way cut", "slow links", "membership churn"]);
}

async fn chaos_of(seconds: u64, number: u64, founders: u64) -> Faults {
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
    report(&cluster, "at the start");
    let urls: Arc<[String]> = cluster.urls().into();
    let book = Arc::new(Book::new());
    let someone = |salt: u64| Client::new(book.clone(), urls.clone(), number * 1_000 + salt);
    someone(0).found_bank().await;

    let writers = Writers::start_slow(&urls, 8, "w", Duration::from_millis(5));
    let (stop, stop_watches) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let (mut clients, mut counters, mut watches) = (JoinSet::new(), JoinSet::new(), JoinSet::new());
    (0..KEY_CLIENTS).for_each(|n| drop(clients.spawn(someone(100 + n).use_keys(stop.clone()))));
    (0..BANK_CLIENTS).for_each(|n| drop(clients.spawn(someone(200 + n).use_bank(stop.clone()))));
    (0..LEASE_CLIENTS).for_each(|n| drop(clients.spawn(someone(300 + n).use_leases(stop.clone()))));
    for counter in 0..COUNTERS {
        let counting = someone(400 + counter).count(counter, stop.clone());
        counters.spawn(async move { (format!("counter{counter}"), counting.await) });
    }
    let mut positions = Vec::new();
    for (first, prefix) in WATCHED.into_iter().enumerate() {
        let position = Arc::new(AtomicU64::new(1));
        positions.push((prefix, position.clone()));
        let watch = Watch {
            book: book.clone(),
            prefix,
            position,
            stop: stop_watches.clone(),
        };
        watches.spawn(watch.follow(urls.clone(), first));
    }

    let mut faults = Faults::new(number, disk);
    let begun = Instant::now();
    let until = begun + Duration::from_secs(seconds);
    let mut looked_at = begun;
    while Instant::now() < until {
        faults.step(&mut cluster).await;
        book.check();
        if looked_at.elapsed() > LOOK_EVERY {
            looked_at = Instant::now();
            // Each revision is a write.
            let writes = positions
                .iter()
                .map(|(_, position)| position.load(Ordering::Relaxed))
                .max()
                .unwrap_or(0);
            println!("FIG after {} s: {writes} revisions", begun.elapsed().as_secs());
            check_bounds(&mut cluster, writes);
        }
        tokio::time::sleep(faults.pause()).await;
    }
    faults.end_all(&mut cluster);
    for id in cluster.ids() {
        let url = format!("{}/readyz", cluster.url(id));
        eventually("every member to be ready", SOON, async || {
            faults.tend(&mut cluster);
            let answer = cluster.http.get(&url).send().await.ok()?;
            answer.status().is_success().then_some(())
        })
        .await;
    }
    writers.progress(100).await;
    stop.store(true, Ordering::Relaxed);
    let record = writers.stop().await;
    let counted = tokio::time::timeout(END_WITHIN, async {
        clients.join_all().await;
        counters.join_all().await
    });
    let counted = counted.await.expect("every client hears an answer and every lease ends");
    read_everything(&cluster, &book).await;
    someone(1).read_bank(true).await;
    report(&cluster, "at the end");
    let writes = positions.iter().map(|(_, position)| position.load(Ordering::Relaxed)).max();
    check_bounds(&mut cluster, writes.unwrap_or(0));
    summary(&book, &record);
    faults.print();

    for id in cluster.ids() {
        check(&cluster, id, "w", &record).await;
        let found = cluster.all(id, "counter").await;
        for (counter, done) in &counted {
            let (_, version) = &found[counter];
            assert_eq!(version, done, "{counter} on member {id}");
        }
    }
    cluster.same_content(&cluster.ids()).await;
    for (key, revision) in &record.acknowledged {
        book.note_acknowledged(key, &value_of(key), *revision);
    }
    for (key, _) in &record.refused {
        book.note_refused(&value_of(key));
    }
    let hash = cluster.get_json(cluster.ids()[0], "/v1/hash").await.unwrap();
    let end = hash["revision"].as_u64().unwrap();
    eventually("the watches to have seen everything", SOON, async || {
        book.check();
        let mut all = positions.iter();
        all.all(|(prefix, position)| {
            let last = if prefix.is_empty() { end } else { book.last_change(prefix, end) };
            position.load(Ordering::Relaxed) >= last
        })
        .then_some(())
    })
    .await;
    stop_watches.store(true, Ordering::Relaxed);
    watches.join_all().await;
    let checked = book.check_end(end).unwrap_or_else(|fault| panic!("{fault}"));
    println!(
        "checked: {} operations on {} keys for linearizability, {} given up; {end} revisions for gaps, order and repetition on {} watches",
        checked.operations,
        book.keys().len(),
        checked.given_up,
        positions.len()
    );
    assert_eq!(checked.given_up, 0, "too much was unknown of some key");
    faults.check_overlap();
    faults
}
