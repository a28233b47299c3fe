//! Leases: each lives for its whole ttl after the last answered grant or renewal, and ends at last.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};

use super::asking::Answer;
use super::clients::Client;
use crate::common::Micros;

/// A lease and the key that is attached to it.
struct Lease {
    id: String,
    key: String,
}

impl Client {
    /// One lease after the other, until told to stop.
    pub async fn use_leases(mut self, stop: Arc<AtomicBool>) {
        while !stop.load(Ordering::Relaxed) {
            if let Some(lease) = self.grant().await {
                self.live(lease).await;
            } else {
                self.think(50).await;
            }
        }
    }

    async fn grant(&mut self) -> Option<Lease> {
        let ttl_ms = 1_500 + self.seed.below(3_000);
        let asked = self.book.now();
        let request = self.request(Method::POST, "/v1/leases");
        let body = json!({ "ttl": ttl_ms as f64 / 1e3 });
        let Answer::Done(done) = self.ask(request.json(&body)).await else {
            return None;
        };
        let granted: Value = serde_json::from_slice(&done.body).unwrap_or(Value::Null);
        let Some(id) = granted["id"].as_str().map(str::to_owned) else {
            self.book.fault(format!("a grant was answered with {granted}"));
            return None;
        };
        self.book.tally(|tallies| tallies.leases += 1);
        let key = format!("lease/{id}");
        self.book.promised(&key, asked + ttl_of(&granted));
        Some(Lease { id, key })
    }

    async fn live(&mut self, lease: Lease) {
        let text = format!("lease:{}", lease.id);
        let asked = self.book.asked();
        let request = self.request(Method::PUT, &format!("/{}?lease={}", lease.key, lease.id));
        let answer = self.ask(request.body(text.clone())).await;
        self.book.own_put(asked, &lease.key, &text, &answer);
        match answer {
            Answer::Done(_) => {}
            Answer::Refused { .. } => return self.book.gone(&lease.key),
            Answer::NotApplied | Answer::Unknown => return,
        }
        for _ in 0..self.seed.below(5) {
            self.think(1_500).await;
            if !self.renew(&lease).await {
                break;
            }
        }
        while !self.is_gone(&lease).await {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        self.book.gone(&lease.key);
        self.book.tally(|tallies| tallies.expired += 1);
    }

    /// Whether the lease lives, as far as is known.
    async fn renew(&mut self, lease: &Lease) -> bool {
        let asked = self.book.now();
        let request = self.request(Method::POST, &format!("/v1/leases/{}/keepalive", lease.id));
        match self.ask(request).await {
            Answer::Done(done) => {
                let renewed: Value = serde_json::from_slice(&done.body).unwrap_or(Value::Null);
                self.book.promised(&lease.key, asked + ttl_of(&renewed));
                self.book.tally(|tallies| tallies.renewals += 1);
                true
            }
            Answer::Refused { .. } => {
                self.book.gone(&lease.key);
                false
            }
            Answer::NotApplied | Answer::Unknown => true,
        }
    }

    async fn is_gone(&mut self, lease: &Lease) -> bool {
        let asked = self.book.asked();
        let request = self.request(Method::GET, &format!("/{}", lease.key));
        let answer = self.ask(request).await;
        self.book.own_read(asked, &lease.key, &answer);
        matches!(answer, Answer::Refused { .. })
    }
}

fn ttl_of(lease: &Value) -> Micros {
    (lease["ttl"].as_f64().unwrap_or(0.0) * 1e6) as Micros
}
