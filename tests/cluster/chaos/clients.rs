//! Clients: each does one thing after the other, on any member, and tells the book what it heard.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};

use super::asking::{Answer, ask};
use super::book::{ACCOUNTS, Account, Book, DEPOSIT, SLOTS, account, text_of};
use crate::common::linear::Expect;
use crate::harness::{Seed, client};

/// How long a client waits beyond what it has told the server: then it does not know.
const PATIENCE: Duration = Duration::from_secs(2);

pub struct Client {
    pub book: Arc<Book>,
    pub seed: Seed,
    http: reqwest::Client,
    urls: Arc<[String]>,
    /// Key → revision and value as last read.
    known: BTreeMap<String, (u64, u64)>,
}

impl Client {
    pub fn new(book: Arc<Book>, urls: Arc<[String]>, seed: u64) -> Client {
        Client {
            book,
            seed: Seed(seed),
            http: client(),
            urls,
            known: BTreeMap::new(),
        }
    }

    /// Single keys, until told to stop.
    pub async fn use_keys(mut self, stop: Arc<AtomicBool>) {
        while !stop.load(Ordering::Relaxed) {
            self.act().await;
            self.think(10).await;
        }
    }

    /// Transfers and looks at the bank, until told to stop.
    pub async fn use_bank(mut self, stop: Arc<AtomicBool>) {
        while !stop.load(Ordering::Relaxed) {
            let is_linearizable = self.seed.below(10) > 0;
            if let Some(accounts) = self.read_bank(is_linearizable).await
                && self.seed.below(3) > 0
            {
                self.transfer(&accounts).await;
            }
            self.think(30).await;
        }
    }

    /// Increments by rewriting: under one `Idempotency-Key` each, retried on any member until acknowledged, so the version counts them.
    pub async fn count(mut self, counter: u64, stop: Arc<AtomicBool>) -> u64 {
        for number in 1.. {
            if stop.load(Ordering::Relaxed) {
                return number - 1;
            }
            let (key, text) = (format!("counter{counter}"), format!("{counter}-{number}"));
            let asked = self.book.asked();
            loop {
                let request = self.request(Method::PUT, &format!("/{key}"));
                let answer = self.ask(request.header("idempotency-key", &text).body(text.clone())).await;
                if matches!(answer, Answer::Done(_)) {
                    self.book.own_put(asked, &key, &text, &answer);
                    break;
                }
                self.book.tally(|tallies| tallies.retries += 1);
                self.think(100).await;
            }
            self.think(10).await;
        }
        unreachable!("numbers do not end")
    }

    pub async fn think(&mut self, at_most: u64) {
        tokio::time::sleep(Duration::from_millis(1 + self.seed.below(at_most))).await;
    }

    /// A request to any member, which is to be answered within some time.
    pub fn request(&mut self, method: Method, path: &str) -> RequestBuilder {
        let url = &self.urls[self.seed.below(self.urls.len() as u64) as usize];
        let millis = 300 + self.seed.below(2_700);
        let separator = if path.contains('?') { '&' } else { '?' };
        let request = self.http.request(method, format!("{url}{path}{separator}timeout={millis}ms"));
        request.timeout(Duration::from_millis(millis) + PATIENCE)
    }

    pub async fn ask(&self, request: RequestBuilder) -> Answer {
        let answer = ask(request).await.unwrap_or_else(|fault| {
            self.book.fault(fault);
            Answer::Unknown
        });
        match &answer {
            Answer::Done(done) if done.is_replayed => self.book.tally(|tallies| tallies.replayed += 1),
            // Whoever refuses is asked again, but not at once.
            Answer::NotApplied => tokio::time::sleep(Duration::from_millis(20)).await,
            Answer::Done(_) | Answer::Refused { .. } | Answer::Unknown => {}
        }
        answer
    }

    async fn act(&mut self) {
        let slot = self.seed.below(SLOTS);
        let key = self.book.key(slot);
        let known = self.known.get(&key).copied();
        match (self.seed.below(100), known) {
            (0..22, _) => self.put(&key, Expect::Anything, None).await,
            (22..30, _) => self.put(&key, Expect::Absent, None).await,
            (30..46, Some((revision, value))) => self.put(&key, Expect::Is(value), Some(revision)).await,
            (30..46, None) => self.put(&key, Expect::Present, None).await,
            (46..54, _) => self.delete(&key, Expect::Present, None).await,
            (54..58, Some((revision, value))) => self.delete(&key, Expect::Is(value), Some(revision)).await,
            (58..66, Some((_, seen))) => {
                let other = self.book.key((slot + 1) % SLOTS);
                self.swap(&key, seen, &other).await;
            }
            (number, _) => self.read(&key, number < 92).await,
        }
    }

    async fn read(&mut self, key: &str, is_linearizable: bool) {
        let consistency = if is_linearizable { "" } else { "?consistency=serializable" };
        let asked = self.book.asked();
        let request = self.request(Method::GET, &format!("/{key}{consistency}"));
        let answer = self.ask(request).await;
        match self.book.read(asked, key, is_linearizable, &answer) {
            Some(found) => self.known.insert(key.to_owned(), found),
            None => self.known.remove(key),
        };
    }

    async fn put(&mut self, key: &str, expect: Expect, revision: Option<u64>) {
        let value = self.book.new_value();
        let is_retried = self.seed.below(10) < 4;
        let asked = self.book.asked();
        let make = |client: &mut Client| {
            let request = client.request(Method::PUT, &format!("/{key}")).body(text_of(value));
            let request = if is_retried {
                request.header("idempotency-key", format!("put-{value}"))
            } else {
                request
            };
            conditional(request, expect, revision)
        };
        let answer = self.write(make, is_retried).await;
        if let Answer::Done(done) = &answer {
            self.known.insert(key.to_owned(), (done.revision, value));
        }
        self.book.put(asked, key, value, expect, &answer);
    }

    async fn delete(&mut self, key: &str, expect: Expect, revision: Option<u64>) {
        let asked = self.book.asked();
        let number = self.book.new_value();
        let is_retried = self.seed.below(10) < 4;
        let make = |client: &mut Client| {
            let request = client.request(Method::DELETE, &format!("/{key}"));
            let request = if is_retried {
                request.header("idempotency-key", format!("delete-{number}"))
            } else {
                request
            };
            // Absence is answered by itself.
            let expect = if expect == Expect::Present { Expect::Anything } else { expect };
            conditional(request, expect, revision)
        };
        let answer = self.write(make, is_retried).await;
        self.book.delete(asked, key, expect, &answer);
    }

    async fn swap(&mut self, key: &str, seen: u64, other: &str) {
        let (value, other_value) = (self.book.new_value(), self.book.new_value());
        let body = json!({
            "compare": [{ "key": key, "target": "value", "op": "=", "value": text_of(seen) }],
            "then": [put(key, &text_of(value)), put(other, &text_of(other_value))],
        });
        let asked = self.book.asked();
        let request = self.request(Method::POST, "/v1/txn").json(&body);
        let answer = self.ask(request).await;
        self.book.swap(asked, (key, seen, value), (other, other_value), &answer);
    }

    /// A write; under an `Idempotency-Key` it is mostly asked for again, on any member, until something is known.
    async fn write(&mut self, make: impl Fn(&mut Client) -> RequestBuilder, is_retried: bool) -> Answer {
        let mut was_unknown = false;
        loop {
            let request = make(self);
            let answer = self.ask(request).await;
            let has_failed = matches!(answer, Answer::Unknown | Answer::NotApplied);
            was_unknown |= matches!(answer, Answer::Unknown);
            if has_failed && is_retried && self.seed.below(10) < 8 {
                self.book.tally(|tallies| tallies.retries += 1);
                continue;
            }
            // What an earlier try may have done is not undone by a later refusal.
            return if has_failed && was_unknown { Answer::Unknown } else { answer };
        }
    }

    pub async fn read_bank(&mut self, is_linearizable: bool) -> Option<Vec<Account>> {
        let consistency = if is_linearizable { "" } else { "&consistency=serializable" };
        let asked = self.book.asked();
        let request = self.request(Method::GET, &format!("/v1/kv?prefix=bank/{consistency}"));
        let answer = self.ask(request).await;
        self.book.bank(asked, is_linearizable, &answer)
    }

    /// Before anybody looks.
    pub async fn found_bank(&mut self) {
        let writes: Vec<(String, String)> = (0..ACCOUNTS).map(|n| (account(n), format!("{DEPOSIT}:{n}-0"))).collect();
        let puts: Vec<Value> = writes.iter().map(|(key, text)| put(key, text)).collect();
        let asked = self.book.asked();
        let request = self.request(Method::POST, "/v1/txn").json(&json!({ "then": puts }));
        let answer = self.ask(request).await;
        assert!(matches!(answer, Answer::Done(_)), "the bank is not founded");
        self.book.transfer(asked, &writes, &answer);
    }

    async fn transfer(&mut self, accounts: &[Account]) {
        let from = self.seed.below(ACCOUNTS as u64) as usize;
        let to = (from + 1 + self.seed.below(ACCOUNTS as u64 - 1) as usize) % ACCOUNTS;
        let amount = 1 + self.seed.below(20) as i64;
        let id = self.book.new_value();
        let is_unchanged = |n: usize| {
            let revision = accounts[n].mod_revision;
            json!({ "key": account(n), "target": "mod_revision", "op": "=", "value": revision })
        };
        let write = |n: usize, change: i64| (account(n), format!("{}:{id}-{n}", accounts[n].amount + change));
        let writes = [write(from, -amount), write(to, amount)];
        let body = json!({
            "compare": [is_unchanged(from), is_unchanged(to)],
            "then": writes.iter().map(|(key, text)| put(key, text)).collect::<Vec<Value>>(),
        });
        let asked = self.book.asked();
        let request = self.request(Method::POST, "/v1/txn").json(&body);
        let answer = self.ask(request).await;
        self.book.transfer(asked, &writes, &answer);
    }
}

fn put(key: &str, text: &str) -> Value {
    json!({ "put": { "key": key, "value": text } })
}

fn conditional(request: RequestBuilder, expect: Expect, revision: Option<u64>) -> RequestBuilder {
    match (expect, revision) {
        (Expect::Anything, _) => request,
        (Expect::Absent, _) => request.header("if-none-match", "*"),
        (Expect::Is(_), Some(revision)) => request.header("if-match", format!("\"{revision}\"")),
        (Expect::Present | Expect::Is(_), _) => request.header("if-match", "*"),
    }
}
