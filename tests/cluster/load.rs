//! Writers that keep a record of what was acknowledged, and the checks against it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::task::JoinSet;

use crate::harness::{Cluster, client};

/// What became of the writes of one key prefix.
#[derive(Default)]
pub struct Record {
    /// Key → revision.
    pub acknowledged: BTreeMap<String, u64>,
    /// May be there or not.
    pub unknown: Vec<String>,
    /// Must not be there.
    pub refused: Vec<(String, String)>,
    pub acknowledged_at: Vec<Instant>,
    /// The longest acknowledged request.
    pub slowest: Duration,
}

impl Record {
    /// The longest time without any acknowledgement.
    pub fn longest_gap(&self) -> Duration {
        let mut times = self.acknowledged_at.clone();
        times.sort_unstable();
        times.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default()
    }
}

/// Tasks that put keys of their own as fast as they are acknowledged.
pub struct Writers {
    record: Arc<Mutex<Record>>,
    stop: Arc<AtomicBool>,
    tasks: JoinSet<()>,
}

impl Writers {
    /// `count` writers, spread over `urls`. Each key is written once.
    pub fn start(urls: &[String], count: usize, prefix: &str) -> Writers {
        Writers::start_slow(urls, count, prefix, Duration::ZERO)
    }

    /// With a pause after each write.
    pub fn start_slow(urls: &[String], count: usize, prefix: &str, pause: Duration) -> Writers {
        Writers::begin(urls, count, prefix, pause, "")
    }

    /// Requests that may wait for 25 s.
    pub fn start_patient(urls: &[String], count: usize, prefix: &str) -> Writers {
        Writers::begin(urls, count, prefix, Duration::ZERO, "?timeout=25s")
    }

    fn begin(urls: &[String], count: usize, prefix: &str, pause: Duration, query: &'static str) -> Writers {
        let record = Arc::new(Mutex::new(Record::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let mut tasks = JoinSet::new();
        for writer in 0..count {
            let (record, stop, url) = (record.clone(), stop.clone(), urls[writer % urls.len()].clone());
            let prefix = prefix.to_owned();
            tasks.spawn(async move {
                let http = client();
                let mut number = 0;
                while !stop.load(Ordering::Relaxed) {
                    number += 1;
                    write_one(&http, (&url, query), &format!("{prefix}{writer}-{number}"), &record).await;
                    if !pause.is_zero() {
                        tokio::time::sleep(pause).await;
                    }
                }
            });
        }
        Writers { record, stop, tasks }
    }

    pub fn acknowledged(&self) -> usize {
        self.record.lock().acknowledged.len()
    }

    /// Waits until so many more were acknowledged.
    pub async fn progress(&self, more: usize) {
        let goal = self.acknowledged() + more;
        crate::harness::eventually("acknowledgements", crate::harness::SOON, async || {
            (self.acknowledged() >= goal).then_some(())
        })
        .await;
    }

    pub async fn stop(mut self) -> Record {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(ended) = self.tasks.join_next().await {
            ended.unwrap();
        }
        std::mem::take(&mut self.record.lock())
    }
}

/// What the writers put there.
pub fn value_of(key: &str) -> String {
    format!("value of {key}")
}

async fn write_one(http: &reqwest::Client, (url, query): (&str, &str), key: &str, record: &Mutex<Record>) {
    let begun = Instant::now();
    let sent = http.put(format!("{url}/{key}{query}")).body(value_of(key)).send().await;
    let took = begun.elapsed();
    match sent {
        Ok(answer) if answer.status().is_success() => {
            let revision = answer.headers().get("metcd-revision").unwrap().to_str().unwrap().parse().unwrap();
            let mut record = record.lock();
            record.acknowledged.insert(key.to_owned(), revision);
            record.acknowledged_at.push(Instant::now());
            record.slowest = record.slowest.max(took);
        }
        Ok(answer) => {
            let status = answer.status();
            let body = answer.text().await.unwrap_or_default();
            if body.contains("\"not_applied\"") {
                record
                    .lock()
                    .refused
                    .push((key.to_owned(), format!("{status} after {took:?}: {body}")));
            } else {
                record.lock().unknown.push(key.to_owned());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Err(error) if error.is_connect() => {
            record.lock().refused.push((key.to_owned(), error.to_string()));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Err(_) => {
            record.lock().unknown.push(key.to_owned());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Acknowledged means there, `not_applied` means not there, and every key was applied at most once.
pub async fn check(cluster: &Cluster, id: u64, prefix: &str, record: &Record) {
    let found = cluster.all(id, prefix).await;
    let lost: Vec<_> = record.acknowledged.keys().filter(|key| !found.contains_key(*key)).collect();
    assert!(
        lost.is_empty(),
        "member {id} lost {} acknowledged writes, e.g. {:?}",
        lost.len(),
        lost.first()
    );
    for (key, reason) in &record.refused {
        assert!(
            !found.contains_key(key),
            "{key} was refused as not applied ({reason}), and is there"
        );
    }
    for (key, (value, version)) in &found {
        assert_eq!(*value, value_of(key));
        assert_eq!(*version, 1, "{key} was applied more than once");
    }
    let known = record.acknowledged.len() + record.unknown.len();
    assert!(found.len() <= known, "{} keys are there, at most {known} were written", found.len());
    let mut revisions: Vec<u64> = record.acknowledged.values().copied().collect();
    revisions.sort_unstable();
    let count = revisions.len();
    revisions.dedup();
    assert_eq!(revisions.len(), count, "two writes were given one revision");
}
