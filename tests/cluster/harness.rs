//! Real processes on free loopback ports and temporary directories. Whatever is started here is killed here, also on panic; a panic
//! prints the end of every member's log.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use reqwest::StatusCode;
use serde_json::Value;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::proxy::Links;

/// For whatever should happen soon; generous, because the machine may be busy.
pub const SOON: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(20);

/// One cluster at a time: figures of one test are not to be disturbed by another's processes.
fn turn() -> Arc<Semaphore> {
    static TURN: std::sync::OnceLock<Arc<Semaphore>> = std::sync::OnceLock::new();
    TURN.get_or_init(|| Arc::new(Semaphore::new(1))).clone()
}

/// The build that is tried: this one, or another that `scripts/chaos --bin` names.
fn binary() -> OsString {
    std::env::var_os("METCD_CHAOS_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_metcd").into())
}

/// A port below the ephemeral range that is free now: outgoing connections do not take it meanwhile.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let base = 10_000 + (std::process::id() % 1_000) as u16 * 20;
    loop {
        let port = base + NEXT.fetch_add(1, Ordering::Relaxed) % 2_000;
        if TcpListener::bind(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
}

/// How a cluster is to be.
#[derive(Clone)]
pub struct Setup {
    pub founders: u64,
    pub store: &'static str,
    pub wal: &'static str,
    pub sets: Vec<String>,
    pub proxied: bool,
}

impl Default for Setup {
    fn default() -> Setup {
        Setup {
            founders: 3,
            store: "memory",
            wal: "sled",
            sets: Vec::new(),
            proxied: false,
        }
    }
}

impl Setup {
    pub fn of(founders: u64) -> Setup {
        Setup {
            founders,
            ..Setup::default()
        }
    }

    pub fn set(mut self, setting: &str) -> Setup {
        self.sets.push(setting.to_owned());
        self
    }

    pub fn engines(mut self, wal: &'static str, store: &'static str) -> Setup {
        (self.wal, self.store) = (wal, store);
        self
    }

    pub fn proxied(mut self) -> Setup {
        self.proxied = true;
        self
    }
}

/// A member, running or not.
pub struct Node {
    /// What it is called in the cluster; 0 while the cluster has not assigned one.
    pub id: u64,
    pub client_port: u16,
    /// Where it listens for peers.
    pub peer_port: u16,
    /// What it advertises: its own, or the proxy's before it.
    pub peer_url: String,
    pub data_dir: PathBuf,
    pub log: PathBuf,
    args: Vec<String>,
    envs: Vec<(&'static str, OsString)>,
    child: Option<Child>,
}

impl Node {
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.client_port)
    }

    pub fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().map(Child::id).expect("the member was started")
    }

    pub fn log_text(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn start(&mut self) {
        assert!(!self.is_running(), "member {} runs already", self.id);
        let log = OpenOptions::new().create(true).append(true).open(&self.log).unwrap();
        let child = Command::new(binary())
            .args(&self.args)
            .env_clear()
            .envs(self.envs.iter().cloned())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.child = Some(child);
    }

    fn signal(&self, name: &str) {
        let done = Command::new("kill")
            .args([&format!("-{name}"), &self.pid().to_string()])
            .status()
            .unwrap();
        assert!(done.success(), "kill -{name} of member {}", self.id);
    }

    pub fn pause(&self) {
        self.signal("STOP");
    }

    pub fn resume(&self) {
        self.signal("CONT");
    }

    pub fn terminate(&self) {
        self.signal("TERM");
    }

    /// What a closed terminal sends.
    pub fn hang_up(&self) {
        self.signal("HUP");
    }

    /// What Ctrl-C sends.
    pub fn interrupt(&self) {
        self.signal("INT");
    }

    /// SIGKILL, and gone when this returns.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Waits until the process has ended by itself.
    pub async fn ended(&mut self, within: Duration) -> ExitStatus {
        let deadline = Instant::now() + within;
        loop {
            let child = self.child.as_mut().expect("the member was started");
            if let Some(status) = child.try_wait().unwrap() {
                self.child = None;
                return status;
            }
            assert!(Instant::now() < deadline, "member {} did not end within {within:?}", self.id);
            tokio::time::sleep(POLL).await;
        }
    }

    pub fn add_args(&mut self, args: &[&str]) {
        self.args.extend(args.iter().map(|&arg| arg.to_owned()));
    }

    /// Everything else of the environment stays empty.
    pub fn add_env(&mut self, name: &'static str, value: impl Into<OsString>) {
        self.envs.push((name, value.into()));
    }

    pub fn drop_args(&mut self, flag: &str) {
        while let Some(at) = self.args.iter().position(|arg| arg == flag) {
            self.args.drain(at..at + 2);
        }
    }

    /// The most resident bytes count from now on: see proc(5), `clear_refs`.
    pub fn forget_peak(&self) {
        std::fs::write(format!("/proc/{}/clear_refs", self.pid()), "5").unwrap();
    }

    /// Figures of /proc: resident bytes now, resident bytes at most, open descriptors.
    pub fn figures(&self) -> (u64, u64, usize) {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap_or_default();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap_or_default();
            line.split_whitespace()
                .nth(1)
                .and_then(|text| text.parse::<u64>().ok())
                .unwrap_or(0)
                * 1024
        };
        let descriptors = std::fs::read_dir(format!("/proc/{}/fd", self.pid())).map_or(0, Iterator::count);
        (field("VmRSS:"), field("VmHWM:"), descriptors)
    }
}

/// Several members.
pub struct Cluster {
    pub nodes: Vec<Node>,
    pub http: reqwest::Client,
    pub links: Arc<Links>,
    setup: Setup,
    dir: tempfile::TempDir,
    _turn: OwnedSemaphorePermit,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            if let Some(child) = &mut node.child {
                // Both fail only if it has ended already.
                let _ = child.kill();
                let _ = child.wait();
            }
            if std::thread::panicking() {
                let text = node.log_text();
                let from = text.len().saturating_sub(6_000);
                let from = (from..text.len()).find(|&at| text.is_char_boundary(at)).unwrap_or(0);
                println!("---- the end of the log of member {} ----\n{}", node.id, &text[from..]);
            }
        }
    }
}

impl Cluster {
    /// Founds a cluster and waits until every member is ready.
    pub async fn start(setup: Setup) -> Cluster {
        let mut cluster = Cluster::prepare(setup).await;
        for node in &mut cluster.nodes {
            node.start();
        }
        cluster.all_ready().await;
        cluster
    }

    /// Everything but the processes.
    pub async fn prepare(setup: Setup) -> Cluster {
        let turn = turn().acquire_owned().await.unwrap();
        let http = client();
        let mut cluster = Cluster {
            nodes: Vec::new(),
            http,
            links: Links::new(),
            dir: tempfile::tempdir().unwrap(),
            setup,
            _turn: turn,
        };
        let founders: Vec<Node> = (1..=cluster.setup.founders).map(|id| cluster.new_node(Some(id))).collect();
        let members: Vec<String> = founders.iter().map(|node| format!("{}={}", node.id, node.peer_url)).collect();
        cluster.nodes = founders;
        for node in &mut cluster.nodes {
            for member in &members {
                node.add_args(&["--member", member]);
            }
        }
        cluster
    }

    fn new_node(&self, id: Option<u64>) -> Node {
        let (client_port, peer_port) = (free_port(), free_port());
        let name = id.map_or_else(|| format!("new{client_port}"), |id| format!("{id}-{client_port}"));
        let data_dir = self.dir.path().join(format!("data{name}"));
        let direct = format!("http://127.0.0.1:{peer_port}");
        let peer_url = match id {
            Some(id) if self.setup.proxied => self.links.listen(id, peer_port),
            _ => direct,
        };
        let mut args: Vec<String> = vec!["serve".into()];
        if let Some(id) = id {
            args.extend(["--id".into(), id.to_string()]);
        }
        let pairs = [
            ("--data-dir", data_dir.display().to_string()),
            ("--listen-client", format!("127.0.0.1:{client_port}")),
            ("--listen-peer", format!("127.0.0.1:{peer_port}")),
            ("--advertise-peer-url", peer_url.clone()),
            ("--store", self.setup.store.to_owned()),
            ("--wal", self.setup.wal.to_owned()),
        ];
        args.extend(pairs.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]));
        args.extend(self.setup.sets.iter().flat_map(|set| ["--set".to_owned(), set.clone()]));
        Node {
            id: id.unwrap_or(0),
            client_port,
            peer_port,
            peer_url,
            data_dir,
            log: self.dir.path().join(format!("{name}.log")),
            args,
            envs: Vec::new(),
            child: None,
        }
    }

    /// A member that is to join by `--join`; not started yet.
    pub fn joiner(&mut self, id: Option<u64>) -> &mut Node {
        let mut node = self.new_node(id);
        let urls: Vec<String> = self.nodes.iter().map(Node::url).collect();
        for url in urls {
            node.add_args(&["--join", &url]);
        }
        self.nodes.push(node);
        self.nodes.last_mut().unwrap()
    }

    pub fn node(&mut self, id: u64) -> &mut Node {
        self.nodes
            .iter_mut()
            .find(|node| node.id == id)
            .unwrap_or_else(|| panic!("no member {id}"))
    }

    pub fn url(&self, id: u64) -> String {
        self.nodes
            .iter()
            .find(|node| node.id == id)
            .unwrap_or_else(|| panic!("no member {id}"))
            .url()
    }

    pub fn urls(&self) -> Vec<String> {
        self.nodes.iter().map(Node::url).collect()
    }

    pub fn ids(&self) -> Vec<u64> {
        self.nodes.iter().map(|node| node.id).collect()
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub async fn all_ready(&mut self) {
        let running: Vec<u64> = {
            let mut ids = Vec::new();
            for node in &mut self.nodes {
                if node.is_running() {
                    ids.push(node.id);
                }
            }
            ids
        };
        for id in running {
            self.ready(id).await;
        }
    }

    pub async fn ready(&mut self, id: u64) {
        let deadline = Instant::now() + SOON;
        let url = format!("{}/readyz", self.url(id));
        loop {
            let last = match self.http.get(&url).send().await {
                Ok(answer) if answer.status().is_success() => return,
                Ok(answer) => answer.text().await.unwrap_or_default(),
                Err(error) => error.to_string(),
            };
            assert!(self.node(id).is_running(), "member {id} ended instead of becoming ready");
            assert!(Instant::now() < deadline, "member {id} is not ready: {last}");
            tokio::time::sleep(POLL).await;
        }
    }

    pub async fn get_json(&self, id: u64, path: &str) -> Option<Value> {
        let answer = self.http.get(format!("{}{path}", self.url(id))).send().await.ok()?;
        answer.json().await.ok()
    }

    pub async fn status(&self, id: u64) -> Value {
        self.get_json(id, "/status").await.unwrap_or(Value::Null)
    }

    /// Waits until all of these members name the same leader, and it is one of them.
    pub async fn leader_of(&self, ids: &[u64]) -> u64 {
        let deadline = Instant::now() + SOON;
        loop {
            let mut named = Vec::new();
            for &id in ids {
                named.push(self.status(id).await["leader"].as_u64());
            }
            if let Some(Some(leader)) = named.first()
                && ids.contains(leader)
                && named.iter().all(|other| *other == Some(*leader))
            {
                return *leader;
            }
            assert!(Instant::now() < deadline, "members {ids:?} do not agree on a leader: {named:?}");
            tokio::time::sleep(POLL).await;
        }
    }

    pub async fn leader(&self) -> u64 {
        self.leader_of(&self.ids()).await
    }

    pub async fn put(&self, id: u64, key: &str, value: &str) -> reqwest::Result<StatusCode> {
        let answer = self
            .http
            .put(format!("{}/{key}", self.url(id)))
            .body(value.to_owned())
            .send()
            .await?;
        Ok(answer.status())
    }

    pub async fn get(&self, id: u64, key: &str) -> (u16, String) {
        match self.http.get(format!("{}/{key}", self.url(id))).send().await {
            Ok(answer) => (answer.status().as_u16(), answer.text().await.unwrap_or_default()),
            Err(error) => (0, error.to_string()),
        }
    }

    /// A request with a JSON body (or none) and its JSON answer.
    pub async fn call(&self, method: reqwest::Method, id: u64, path: &str, body: Option<Value>) -> (u16, Value) {
        let mut request = self.http.request(method, format!("{}{path}", self.url(id)));
        if let Some(body) = body {
            request = request.json(&body);
        }
        match request.send().await {
            Ok(answer) => (answer.status().as_u16(), answer.json().await.unwrap_or(Value::Null)),
            Err(error) => (0, Value::String(error.to_string())),
        }
    }

    /// Key → value of a prefix, as `id` sees it: one linearizable read.
    pub async fn all(&self, id: u64, prefix: &str) -> BTreeMap<String, (String, u64)> {
        let answer = self
            .http
            .get(format!("{}/v1/kv?prefix={prefix}&timeout=20s", self.url(id)))
            .header("accept", "application/x-ndjson")
            .send()
            .await
            .unwrap();
        let (status, text) = (answer.status(), answer.text().await.unwrap());
        assert!(status.is_success(), "{status} {text}");
        let mut found = BTreeMap::new();
        let mut ended = false;
        for line in text.lines() {
            let line: Value = serde_json::from_str(line).unwrap();
            if line["end"].as_bool() == Some(true) {
                assert_eq!(line["count"].as_u64(), Some(found.len() as u64));
                ended = true;
                break;
            }
            let text = |name: &str| line[name].as_str().unwrap_or_default().to_owned();
            found.insert(text("key"), (text("value"), line["version"].as_u64().unwrap()));
        }
        assert!(ended, "the list of {prefix} broke off");
        found
    }

    /// Waits until all of these members have one content.
    pub async fn same_content(&self, ids: &[u64]) {
        eventually("members to have the same content", SOON, async || {
            let mut seen = Vec::new();
            for &id in ids {
                let hash = self.get_json(id, "/v1/hash").await?;
                seen.push((hash["revision"].as_u64()?, hash["hash"].to_string()));
            }
            seen.windows(2).all(|pair| pair[0] == pair[1]).then_some(())
        })
        .await;
    }
}

pub fn client() -> reqwest::Client {
    reqwest::Client::builder()
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never())
        .connect_timeout(Duration::from_secs(2))
        .timeout(Duration::from_secs(30))
        .build()
        .unwrap()
}

/// Polls until there is something.
pub async fn eventually<T>(what: &str, within: Duration, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + within;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(Instant::now() < deadline, "waited {within:?} in vain for {what}");
        tokio::time::sleep(POLL).await;
    }
}

/// A seeded stream of numbers (splitmix64).
pub struct Seed(pub u64);

impl Seed {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// Copies a directory with everything in it.
pub fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            std::io::copy(&mut File::open(entry.path()).unwrap(), &mut File::create(target).unwrap()).unwrap();
        }
    }
}
