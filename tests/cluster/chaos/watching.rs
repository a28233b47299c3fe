//! Watches from the first revision on, resumed on another member after each loss.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use serde_json::Value;

use super::book::Book;
use crate::common::history::KeyChange;
use crate::harness::client;

/// A stream is left for another member's after so long at the latest.
const STREAM_FOR: Duration = Duration::from_secs(5);

pub struct Watch {
    pub book: Arc<Book>,
    /// Empty: everything.
    pub prefix: &'static str,
    /// Everything up to here was delivered. An empty store is at revision 1.
    pub position: Arc<AtomicU64>,
    pub stop: Arc<AtomicBool>,
}

impl Watch {
    pub async fn follow(self, urls: Arc<[String]>, first: usize) {
        let http = client();
        for turn in first.. {
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            let from = self.position.load(Ordering::Relaxed) + 1;
            let url = format!("{}/v1/watch?prefix={}&from_revision={from}", urls[turn % urls.len()], self.prefix);
            let sent = http
                .get(url)
                .header("accept", "application/x-ndjson")
                .timeout(STREAM_FOR)
                .send()
                .await;
            match sent {
                Ok(answer) if answer.status().is_success() => self.read(answer).await,
                Ok(answer) if answer.status().as_u16() == 410 => {
                    self.book
                        .fault(format!("revision {from} is compacted, though history is kept for an hour"));
                    return;
                }
                // Behind, in trouble, or gone.
                Ok(_) | Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// Reads a stream until it breaks off. A message that broke off is none.
    async fn read(&self, mut answer: reqwest::Response) {
        self.book.tally(|tallies| tallies.streams += 1);
        let mut text = Vec::new();
        while !self.stop.load(Ordering::Relaxed)
            && let Ok(Some(chunk)) = answer.chunk().await
        {
            text.extend_from_slice(&chunk);
            while let Some(end) = text.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = text.drain(..=end).collect();
                if let Err(fault) = self.take(&line) {
                    return self.book.fault(fault);
                }
            }
        }
    }

    fn take(&self, line: &[u8]) -> Result<(), String> {
        let odd = || format!("a watch delivered {}", String::from_utf8_lossy(line));
        let message: Value = serde_json::from_slice(line).map_err(|_| odd())?;
        match message["type"].as_str() {
            Some("change") => {}
            Some("error") if message["code"] == "compacted" => return Err(odd()),
            _ => return Ok(()),
        }
        let (revision, events) = message["revision"].as_u64().zip(message["events"].as_array()).ok_or_else(odd)?;
        let position = self.position.load(Ordering::Relaxed);
        // Somebody changes something in every revision.
        let is_next = if self.prefix.is_empty() {
            revision == position + 1
        } else {
            revision > position
        };
        if !is_next {
            return Err(format!(
                "a watch of {:?} delivered revision {revision} after {position}",
                self.prefix
            ));
        }
        let changes: Option<Vec<KeyChange>> = events.iter().map(change).collect();
        self.book.watched(self.prefix, revision, changes.ok_or_else(odd)?);
        self.position.store(revision, Ordering::Relaxed);
        Ok(())
    }
}

fn change(event: &Value) -> Option<KeyChange> {
    let text = |name: &str| event["kv"][name].as_str().map(str::to_owned);
    match event["type"].as_str()? {
        "put" => Some((text("key")?, Some(text("value")?))),
        "delete" => Some((text("key")?, None)),
        _ => None,
    }
}
