//! Everything that clients do besides plain puts, through the survivors of a leader that is killed: none of it fails, and none of it
//! happens twice.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use reqwest::Method;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::harness::{Cluster, SOON, Seed, Setup, client, eventually};

const ACCOUNTS: u64 = 8;
const BALANCE: u64 = 100;
/// Of those leases and keys that are to be there at the end.
const LONG: u64 = 600;

/// A client of one member. Requests have the default timeout.
#[derive(Clone)]
struct Client {
    http: reqwest::Client,
    url: String,
}

impl Client {
    /// The answer to a request that must not fail.
    async fn call(&self, method: Method, path: &str, body: Option<Value>) -> Value {
        let mut request = self.http.request(method.clone(), format!("{}{path}", self.url));
        if let Some(body) = body {
            request = request.json(&body);
        }
        let answer = request.send().await.unwrap_or_else(|error| panic!("{method} {path}: {error}"));
        let status = answer.status();
        let text = answer.text().await.unwrap();
        assert!(status.is_success(), "{method} {path}: {status} {text}");
        serde_json::from_str(&text).unwrap_or(Value::Null)
    }

    /// Value and revision of each key of a prefix, in order: one linearizable read.
    async fn list(&self, prefix: &str) -> Vec<(u64, u64)> {
        let list = self.call(Method::GET, &format!("/v1/kv?prefix={prefix}"), None).await;
        let number = |kv: &Value| {
            let value = kv["value"].as_str().unwrap().parse().unwrap();
            (value, kv["mod_revision"].as_u64().unwrap())
        };
        list["kvs"].as_array().unwrap().iter().map(number).collect()
    }

    /// Whether the transaction's comparison held.
    async fn txn(&self, compare: Value, then: Value) -> bool {
        let body = json!({ "compare": compare, "then": then });
        let answer = self.call(Method::POST, "/v1/txn", Some(body)).await;
        answer["succeeded"].as_bool().unwrap()
    }

    /// Adds one to the counter, which others do as well. Counted only when the answer says that it was done.
    async fn increment(&self, done: &AtomicU64) {
        loop {
            let now = self.list("counter").await[0].0;
            let is_unchanged = json!([{ "key": "counter", "target": "value", "op": "=", "value": now.to_string() }]);
            let put = json!([{ "put": { "key": "counter", "value": (now + 1).to_string() } }]);
            if self.txn(is_unchanged, put).await {
                done.fetch_add(1, Ordering::Relaxed);
                return;
            }
        }
    }

    /// Moves something between two accounts if neither has changed. However it ends, no list may ever show another total.
    async fn transfer(&self, seed: &mut Seed) {
        let accounts = self.list("account/").await;
        let total: u64 = accounts.iter().map(|(balance, _)| balance).sum();
        assert_eq!(total, ACCOUNTS * BALANCE, "{accounts:?}");
        let from = seed.below(ACCOUNTS) as usize;
        let to = (from + 1 + seed.below(ACCOUNTS - 1) as usize) % ACCOUNTS as usize;
        let amount = seed.below(accounts[from].0 + 1);
        let is_unchanged = |n: usize| json!({ "key": format!("account/{n}"), "target": "mod_revision", "op": "=", "value": accounts[n].1 });
        let put = |n: usize, balance: u64| json!({ "put": { "key": format!("account/{n}"), "value": balance.to_string() } });
        let then = json!([put(from, accounts[from].0 - amount), put(to, accounts[to].0 + amount)]);
        self.txn(json!([is_unchanged(from), is_unchanged(to)]), then).await;
    }
}

/// Clients of all kinds, at work until they are stopped. Whatever fails there fails the test.
struct Clients {
    stop: Arc<AtomicBool>,
    rounds: Vec<(&'static str, Arc<AtomicU64>)>,
    tasks: JoinSet<()>,
}

impl Clients {
    /// One task that does something again and again.
    fn add<Doing: Future<Output = ()> + Send>(&mut self, kind: &'static str, mut again: impl FnMut(u64) -> Doing + Send + 'static) {
        let (stop, rounds) = (self.stop.clone(), Arc::<AtomicU64>::default());
        self.rounds.push((kind, rounds.clone()));
        self.tasks.spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                let round = rounds.load(Ordering::Relaxed);
                again(round).await;
                rounds.store(round + 1, Ordering::Relaxed);
            }
        });
    }

    /// Waits until every one of them has gone so many rounds further, unless one fails.
    async fn progress(&mut self, more: u64) {
        let goals: Vec<u64> = self
            .rounds
            .iter()
            .map(|(_, rounds)| rounds.load(Ordering::Relaxed) + more)
            .collect();
        eventually("every kind of request to go on", SOON, async || {
            while let Some(ended) = self.tasks.try_join_next() {
                ended.unwrap();
            }
            let reached = self
                .rounds
                .iter()
                .zip(&goals)
                .all(|((_, rounds), goal)| rounds.load(Ordering::Relaxed) >= *goal);
            reached.then_some(())
        })
        .await;
    }

    async fn stop(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(ended) = self.tasks.join_next().await {
            ended.unwrap();
        }
        let of = |kind: &str| {
            self.rounds
                .iter()
                .filter(|(other, _)| *other == kind)
                .map(|(_, rounds)| rounds.load(Ordering::Relaxed))
                .sum::<u64>()
        };
        for kind in ["increment", "transfer", "ttl put", "grant", "keepalive"] {
            println!("FIG kill -9 of the leader: {} rounds of {kind}", of(kind));
        }
        of("grant")
    }
}

/// Two of each kind through each of these members.
async fn begin(cluster: &Cluster, ids: &[u64], increments: &Arc<AtomicU64>) -> Clients {
    let mut clients = Clients {
        stop: Arc::default(),
        rounds: Vec::new(),
        tasks: JoinSet::new(),
    };
    for (n, id) in ids.iter().flat_map(|id| [id, id]).enumerate() {
        let client = Client {
            http: client(),
            url: cluster.url(*id),
        };
        let (me, done) = (client.clone(), increments.clone());
        clients.add("increment", move |_| {
            let (me, done) = (me.clone(), done.clone());
            async move { me.increment(&done).await }
        });
        let me = client.clone();
        clients.add("transfer", move |round| {
            let (me, mut seed) = (me.clone(), Seed(round * 100 + n as u64));
            async move { me.transfer(&mut seed).await }
        });
        let me = client.clone();
        clients.add("ttl put", move |round| {
            let me = me.clone();
            async move {
                // A new key, and one whose lease takes the place of the one before.
                for key in [format!("ttl/{n}-{round}"), format!("ttl/{n}")] {
                    me.call(Method::PUT, &format!("/{key}?ttl={LONG}s"), Some(json!(round))).await;
                }
            }
        });
        let me = client.clone();
        clients.add("grant", move |round| {
            let me = me.clone();
            async move {
                let lease = me.call(Method::POST, "/v1/leases", Some(json!({ "ttl": LONG }))).await;
                let id = lease["id"].as_str().unwrap();
                me.call(Method::PUT, &format!("/granted/{n}-{round}?lease={id}"), Some(json!(id)))
                    .await;
            }
        });
        let lease = client.call(Method::POST, "/v1/leases", Some(json!({ "ttl": LONG }))).await;
        let keep = format!("/v1/leases/{}/keepalive", lease["id"].as_str().unwrap());
        clients.add("keepalive", move |_| {
            let (me, keep) = (client.clone(), keep.clone());
            async move {
                let kept = me.call(Method::POST, &keep, None).await;
                assert_eq!(kept["ttl"], LONG);
            }
        });
    }
    clients
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kill_of_the_leader_fails_no_transaction_lease_list_or_keepalive_and_each_happens_once() {
    let mut cluster = Cluster::start(Setup::of(3).set("raft.snapshot_entries=50").set("raft.keep_entries=10")).await;
    assert!(cluster.put(1, "counter", "0").await.unwrap().is_success());
    for n in 0..ACCOUNTS {
        let account = format!("account/{n}");
        assert!(cluster.put(1, &account, &BALANCE.to_string()).await.unwrap().is_success());
    }
    let leader = cluster.leader().await;
    let survivors: Vec<u64> = cluster.ids().into_iter().filter(|&id| id != leader).collect();
    let increments = Arc::<AtomicU64>::default();
    let mut clients = begin(&cluster, &survivors, &increments).await;
    clients.progress(10).await;
    cluster.node(leader).kill();
    clients.progress(10).await;
    cluster.node(leader).start();
    cluster.ready(leader).await;
    clients.progress(5).await;
    let grants = clients.stop().await;

    let counted = increments.load(Ordering::Relaxed);
    for id in cluster.ids() {
        let me = Client {
            http: client(),
            url: cluster.url(id),
        };
        assert_eq!(me.list("counter").await[0].0, counted, "on member {id}");
        let total: u64 = me.list("account/").await.iter().map(|(balance, _)| balance).sum();
        assert_eq!(total, ACCOUNTS * BALANCE, "on member {id}");
        // A grant that was applied twice would have left a lease of which no answer told. Those of puts belong to their keys.
        let leases = me.call(Method::GET, "/v1/leases", None).await;
        let (owned, granted): (Vec<&Value>, Vec<&Value>) = leases["leases"]
            .as_array()
            .unwrap()
            .iter()
            .partition(|lease| lease["owned"] == true);
        assert_eq!(granted.len() as u64, grants + 2 * survivors.len() as u64, "on member {id}");
        assert_eq!(owned.len(), cluster.all(id, "ttl/").await.len(), "on member {id}");
        assert_eq!(cluster.all(id, "granted/").await.len() as u64, grants, "on member {id}");
    }
    cluster.same_content(&cluster.ids()).await;
}
