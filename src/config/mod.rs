//! One checked [`Config`] out of defaults, file, environment and flags.
//!
//! The layers, later ones win: `config/metcd.toml` (compiled in) → a TOML file → `METCD__SECTION__KEY` → flags. Each layer is checked
//! against the table of keys in `schema.rs` while it is known where a value was written; then they are merged; then [`Config`] is built and what only shows
//! between values is checked.
//!
//! *Invariants*
//! - A [`Config`] that exists is valid. Nothing behind it checks again, nothing in the program reads the environment or a file for settings.
//! - An unknown key, or a value out of range, is never ignored: a mistyped limit must not silently be the default.
//! - No key holds a secret: those that would (`tls`, `auth`) are refused until they are built.

mod check;
mod error;
pub(crate) mod fuzzing;
mod layer;
mod load;
mod schema;
mod show;
pub mod units;
mod url;

use std::{net::SocketAddr, path::PathBuf, time::Duration};

pub use error::{ConfigError, Problem};
pub use layer::{Flag, FlagValue};
pub use load::{DEFAULTS, Loaded, Sources, load};
pub use schema::MAX_MEMBER_ID;
pub use show::show;
pub use url::parse_peer_url;

/// Longest name of a member or a cluster, in bytes.
pub const MAX_NAME_BYTES: usize = 128;

/// The whole configuration, every value checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// `[node]`
    pub node: NodeConfig,
    /// `[listen]`
    pub listen: ListenConfig,
    /// `[advertise]`, filled in from `listen` where absent.
    pub advertise: AdvertiseConfig,
    /// `[cluster]`
    pub cluster: ClusterConfig,
    /// `[raft]`
    pub raft: RaftConfig,
    /// `[wal]`
    pub wal: WalConfig,
    /// `[store]`
    pub store: StoreConfig,
    /// `[history]`
    pub history: HistoryConfig,
    /// `[limits]`
    pub limits: LimitsConfig,
    /// `[idempotency]`
    pub idempotency: IdempotencyConfig,
    /// `[http]`
    pub http: HttpConfig,
    /// `[log]`
    pub log: LogConfig,
}

impl Config {
    /// The member's name: as configured, else `node<id>`; `None` while a joiner has no id.
    pub fn name(&self) -> Option<String> {
        self.node.name.clone().or_else(|| self.node.id.map(default_name))
    }
}

/// The name of a member that was given none.
pub fn default_name(id: u64) -> String {
    format!("node{id}")
}

impl Default for Config {
    /// The built-in defaults: a single node on loopback with its data in `./metcd-data`.
    ///
    /// # Panics
    /// If `config/metcd.toml` as compiled in is not valid, which a test rules out.
    fn default() -> Self {
        match load(&Sources::default()) {
            Ok(loaded) => loaded.config,
            Err(error) => panic!("built-in defaults: {error}"),
        }
    }
}

/// `[node]`
#[derive(Debug, Clone, PartialEq)]
pub struct NodeConfig {
    /// `None` only with `cluster.join`: the cluster assigns one.
    pub id: Option<u64>,
    /// Whether `id` was set by somebody: only then must a data directory agree, otherwise the directory's id is the member's.
    pub id_is_given: bool,
    /// Default `node<id>`.
    pub name: Option<String>,
    /// Data directory.
    pub data_dir: PathBuf,
}

/// `[listen]`
#[derive(Debug, Clone, PartialEq)]
pub struct ListenConfig {
    /// Client API.
    pub client: SocketAddr,
    /// Peer API.
    pub peer: SocketAddr,
}

/// `[advertise]`
#[derive(Debug, Clone, PartialEq)]
pub struct AdvertiseConfig {
    /// Where clients reach this member.
    pub client_url: String,
    /// Where peers reach this member.
    pub peer_url: String,
}

/// A founding member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundingMember {
    /// Id, not 0.
    pub id: u64,
    /// Its peer URL.
    pub peer_url: String,
}

/// `[cluster]`
#[derive(Debug, Clone, PartialEq)]
pub struct ClusterConfig {
    /// Part of the cluster id, so that neighbours do not mix.
    pub name: String,
    /// Founding members, sorted by id; just this node if none are given and `join` is empty.
    pub members: Vec<FoundingMember>,
    /// Client URLs of a running cluster to join.
    pub join: Vec<String>,
}

/// `[raft]`
#[derive(Debug, Clone, PartialEq)]
pub struct RaftConfig {
    /// Length of a tick.
    pub tick: Duration,
    /// Ticks between heartbeats.
    pub heartbeat_ticks: usize,
    /// Election timeout T in ticks; each is drawn from [T, 1.4 T).
    pub election_ticks: usize,
    /// Append messages in flight to one follower.
    pub max_inflight: usize,
    /// Size of one append message.
    pub max_message_bytes: u64,
    /// Proposals that may wait in the queue before `429`.
    pub proposal_queue: usize,
    /// Take a snapshot (and compact the log) after so many entries.
    pub snapshot_entries: u64,
    /// Entries kept behind it for slow followers.
    pub keep_entries: u64,
}

/// Engine of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WalEngine {
    /// Default.
    Sled,
    /// TiKV's.
    RaftEngine,
    /// Needs the cargo feature.
    RocksDb,
}

/// The engines by name.
const WAL_ENGINES: [(&str, WalEngine); 3] = [
    ("sled", WalEngine::Sled),
    ("raft-engine", WalEngine::RaftEngine),
    ("rocksdb", WalEngine::RocksDb),
];

/// The names of all WAL engines.
pub fn wal_engines() -> Vec<&'static str> {
    WAL_ENGINES.iter().map(|(name, _)| *name).collect()
}

impl WalEngine {
    /// The name in configuration files, `/status` and data directories.
    pub fn name(self) -> &'static str {
        name_of(self, &WAL_ENGINES)
    }
}

/// `[wal]`
#[derive(Debug, Clone, PartialEq)]
pub struct WalConfig {
    /// Engine.
    pub engine: WalEngine,
    /// `false` is for tests and says so at every start.
    pub sync: bool,
}

/// Backend of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreBackend {
    /// Default.
    Memory,
    /// On disk.
    Sled,
    /// On disk; needs the cargo feature.
    RocksDb,
}

/// The backends by name.
const STORE_BACKENDS: [(&str, StoreBackend); 3] = [
    ("memory", StoreBackend::Memory),
    ("sled", StoreBackend::Sled),
    ("rocksdb", StoreBackend::RocksDb),
];

/// The names of all store backends.
pub fn store_backends() -> Vec<&'static str> {
    STORE_BACKENDS.iter().map(|(name, _)| *name).collect()
}

impl StoreBackend {
    /// The name in configuration files, `/status` and data directories.
    pub fn name(self) -> &'static str {
        name_of(self, &STORE_BACKENDS)
    }
}

/// `[store]`
#[derive(Debug, Clone, PartialEq)]
pub struct StoreConfig {
    /// Backend.
    pub backend: StoreBackend,
}

/// `[history]`
#[derive(Debug, Clone, PartialEq)]
pub struct HistoryConfig {
    /// Keep at least so long ...
    pub retain: Duration,
    /// ... or so many revisions, whichever bound is reached first.
    pub retain_revisions: u64,
}

/// `[limits]`
#[derive(Debug, Clone, PartialEq)]
pub struct LimitsConfig {
    /// One value.
    pub max_value_bytes: u64,
    /// Operations of one txn branch, and compares.
    pub max_txn_ops: usize,
    /// One JSON body.
    pub max_request_bytes: u64,
    /// Keys one range delete may remove.
    pub max_range_delete: u64,
    /// How long an NDJSON list may pin its revision.
    pub max_stream: Duration,
    /// Below this much free disk, writes get 507.
    pub min_free_disk: u64,
    /// Logical bytes of the store before writes get 507; 0 = no limit.
    pub max_store_bytes: u64,
    /// Connections per listener.
    pub max_connections: usize,
    /// Open watches.
    pub max_watchers: usize,
    /// Default of `?timeout=`.
    pub request_timeout: Duration,
    /// Largest `?timeout=`.
    pub max_timeout: Duration,
    /// From accept (or the last response) to a complete request head.
    pub header_timeout: Duration,
}

/// `[idempotency]`
#[derive(Debug, Clone, PartialEq)]
pub struct IdempotencyConfig {
    /// How long a result is kept.
    pub retain: Duration,
    /// Bound of the table.
    pub max_entries: u64,
}

/// `[http]`
#[derive(Debug, Clone, PartialEq, Default)]
pub struct HttpConfig {
    /// Origins let in besides the server's own.
    pub allowed_origins: Vec<String>,
    /// Host names let in besides IP literals, localhost and the advertised host.
    pub allowed_hosts: Vec<String>,
}

/// Form of the log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For machines.
    Json,
}

/// The forms by name.
const LOG_FORMATS: [(&str, LogFormat); 2] = [("text", LogFormat::Text), ("json", LogFormat::Json)];

impl LogFormat {
    /// The name in configuration files.
    pub fn name(self) -> &'static str {
        name_of(self, &LOG_FORMATS)
    }
}

fn name_of<T: PartialEq>(value: T, names: &[(&'static str, T)]) -> &'static str {
    names.iter().find(|(_, named)| *named == value).map_or("", |(name, _)| name)
}

/// When a log file is closed and a new one begun: at whichever comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LogRotation {
    /// At the turn of an hour or day.
    pub period: Option<LogPeriod>,
    /// At so many bytes.
    pub max_bytes: Option<u64>,
}

/// See [`LogRotation`]. Both are of UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogPeriod {
    /// Every hour.
    Hourly,
    /// Every day.
    Daily,
}

/// `[log]`
#[derive(Debug, Clone, PartialEq)]
pub struct LogConfig {
    /// tracing filter.
    pub level: String,
    /// Form.
    pub format: LogFormat,
    /// `None`: stderr.
    pub directory: Option<PathBuf>,
    /// Rotation of files.
    pub rotation: LogRotation,
    /// Old files kept.
    pub keep_files: usize,
    /// One line per request.
    pub access_log: bool,
}
