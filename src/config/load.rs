//! Merges the layers into one [`Config`].

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::Value;

use super::error::ConfigError;
use super::layer::{self, Flag, Layer, Setting};
use super::{check, schema, url, *};

/// The text of the lowest layer: the documented configuration is the default one.
pub const DEFAULTS: &str = include_str!("../../config/metcd.toml");

/// The origin of values nobody set.
pub(super) const DEFAULT_ORIGIN: &str = "default";

/// Where settings come from, lowest layer first; the built-in defaults are below all of them.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// A TOML file.
    pub file: Option<PathBuf>,
    /// The environment, as [`std::env::vars_os`] gives it.
    pub env: Vec<(OsString, OsString)>,
    /// The command line.
    pub flags: Vec<Flag>,
}

/// A checked configuration and what is to be said about it.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    /// Sentences to log at every start: what is allowed and dangerous.
    pub warnings: Vec<String>,
    /// `section.key` → where its value was written.
    pub origins: BTreeMap<String, String>,
}

/// Reads, merges and checks all layers.
///
/// # Errors
/// Every problem of the first layer that has any, with file and line, variable or flag; else those that only show between values.
pub fn load(sources: &Sources) -> Result<Loaded, ConfigError> {
    let file = sources.file.as_deref().map(read_file).transpose()?;
    let env = Layer::from_env(sources.env.iter().cloned()).map_err(|problems| ConfigError { problems })?;
    let flags = Layer::from_flags(&sources.flags).map_err(|problems| ConfigError { problems })?;
    merge(file, env, flags)
}

/// Puts the layers over the defaults and checks what only shows between values.
pub(super) fn merge(file: Option<Layer>, env: Layer, flags: Layer) -> Result<Loaded, ConfigError> {
    let mut builder = config::Config::builder().add_source(defaults()?);
    if let Some(file) = file {
        builder = builder.add_source(file);
    }
    let merged = builder
        .add_source(env)
        .add_source(flags)
        .build()
        .map_err(|e| ConfigError::one("configuration", e.to_string()))?;
    let settings = Settings(layer::from_merged(merged.cache));
    let config = settings.build()?;
    let warnings = check::between_values(&config, &settings)?;
    let origins = settings.0.into_iter().map(|(path, setting)| (path, setting.origin)).collect();
    Ok(Loaded { config, warnings, origins })
}

fn defaults() -> Result<Layer, ConfigError> {
    let mut layer = Layer::from_toml(DEFAULT_ORIGIN, DEFAULTS).map_err(|problems| ConfigError { problems })?;
    layer.set_origin(DEFAULT_ORIGIN);
    Ok(layer)
}

fn read_file(path: &Path) -> Result<Layer, ConfigError> {
    let name = path.display().to_string();
    let bytes = std::fs::read(path).map_err(|e| ConfigError::one(&name, format!("cannot be read: {e}: check the path")))?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let line = 1 + error.as_bytes()[..error.utf8_error().valid_up_to()]
            .iter()
            .filter(|&&byte| byte == b'\n')
            .count();
        ConfigError::one(
            format!("{name}:{line}"),
            "this line is not UTF-8, as TOML must be: save the file in that encoding",
        )
    })?;
    Layer::from_toml(&name, &text).map_err(|problems| ConfigError { problems })
}

/// Merged settings by path.
pub(super) struct Settings(BTreeMap<String, Setting>);

impl Settings {
    /// Where the value of `path` was written.
    pub(super) fn origin(&self, path: &str) -> &str {
        self.0.get(path).map_or(DEFAULT_ORIGIN, |setting| setting.origin.as_str())
    }

    /// Whether some layer above the defaults gave `path`.
    pub(super) fn is_given(&self, path: &str) -> bool {
        self.origin(path) != DEFAULT_ORIGIN
    }

    fn optional<T>(&self, path: &str, read: impl Fn(&Value) -> Result<T, String>) -> Result<Option<T>, ConfigError> {
        let Some(setting) = self.0.get(path) else { return Ok(None) };
        let wrong = |message| ConfigError::one(&setting.origin, format!("{path}: {message}"));
        read(&setting.value).map(Some).map_err(wrong)
    }

    fn get<T>(&self, path: &str, read: impl Fn(&Value) -> Result<T, String>) -> Result<T, ConfigError> {
        self.optional(path, read)?
            .ok_or_else(|| ConfigError::one(path, "has no value and no default"))
    }

    fn count(&self, path: &str) -> Result<usize, ConfigError> {
        self.get(path, |value| usize::try_from(schema::integer(value)?).map_err(|e| e.to_string()))
    }

    fn number(&self, path: &str) -> Result<u64, ConfigError> {
        self.get(path, schema::integer)
    }

    fn size(&self, path: &str) -> Result<u64, ConfigError> {
        self.get(path, schema::size)
    }

    fn duration(&self, path: &str) -> Result<Duration, ConfigError> {
        self.get(path, schema::duration)
    }

    fn flag(&self, path: &str) -> Result<bool, ConfigError> {
        self.get(path, |value| value.as_bool().ok_or_else(|| "expected true or false".to_owned()))
    }

    fn text(&self, path: &str) -> Result<String, ConfigError> {
        self.get(path, |value| schema::text(value).map(str::to_owned))
    }

    fn path(&self, path: &str) -> Result<Option<PathBuf>, ConfigError> {
        self.optional(path, |value| schema::text(value).map(PathBuf::from))
    }

    fn address(&self, path: &str) -> Result<SocketAddr, ConfigError> {
        self.get(path, |value| {
            schema::text(value)?.parse().map_err(|_| "not an IP address and port".to_owned())
        })
    }

    fn texts(&self, path: &str, read: impl Fn(&str) -> Result<String, String>) -> Result<Vec<String>, ConfigError> {
        self.get(path, |value| {
            schema::list(value)?.iter().map(|item| read(schema::text(item)?)).collect()
        })
    }

    /// The value behind a word of a [`schema::Kind::Choice`].
    fn choice<T: Copy>(&self, path: &str, words: &[(&str, T)]) -> Result<T, ConfigError> {
        let word = self.text(path)?;
        let found = words.iter().find(|(name, _)| *name == word);
        found
            .map(|(_, value)| *value)
            .ok_or_else(|| ConfigError::one(self.origin(path), format!("{path}: {word:?} is not known")))
    }

    fn build(&self) -> Result<Config, ConfigError> {
        let listen = ListenConfig {
            client: self.address("listen.client")?,
            peer: self.address("listen.peer")?,
        };
        let join = self.texts("cluster.join", url::parse_join_url)?;
        let node = self.node(!join.is_empty())?;
        let given_members = self.members()?;
        let advertise = self.advertise(&listen, &node, &given_members)?;
        let cluster = self.cluster(&node, &advertise, given_members, join)?;
        Ok(Config {
            node,
            listen,
            advertise,
            cluster,
            raft: self.raft()?,
            wal: WalConfig {
                engine: self.choice("wal.engine", &WAL_ENGINES)?,
                sync: self.flag("wal.sync")?,
            },
            store: StoreConfig {
                backend: self.choice("store.backend", &STORE_BACKENDS)?,
            },
            history: HistoryConfig {
                retain: self.duration("history.retain")?,
                retain_revisions: self.number("history.retain_revisions")?,
            },
            limits: self.limits()?,
            idempotency: IdempotencyConfig {
                retain: self.duration("idempotency.retain")?,
                max_entries: self.number("idempotency.max_entries")?,
            },
            http: self.http()?,
            log: self.log()?,
        })
    }

    /// A joiner without an explicit id is given one by the cluster.
    fn node(&self, joins: bool) -> Result<NodeConfig, ConfigError> {
        let id_is_given = self.is_given("node.id");
        let id = if joins && !id_is_given {
            None
        } else {
            Some(self.number("node.id")?)
        };
        let name = self.optional("node.name", |value| schema::text(value).map(str::to_owned))?;
        let data_dir = PathBuf::from(self.text("node.data_dir")?);
        Ok(NodeConfig {
            id,
            id_is_given,
            name,
            data_dir,
        })
    }

    fn members(&self) -> Result<Vec<FoundingMember>, ConfigError> {
        let mut members = self.optional("cluster.members", schema::members)?.unwrap_or_default();
        members.sort_by_key(|member| member.id);
        Ok(members)
    }

    fn advertise(&self, listen: &ListenConfig, node: &NodeConfig, members: &[FoundingMember]) -> Result<AdvertiseConfig, ConfigError> {
        // A list of founders that data has outlived says nothing about today's addresses.
        let founds = !crate::datadir::has_a_cluster(&node.data_dir);
        let own_entry = members.iter().find(|member| founds && Some(member.id) == node.id);
        let client_url = match self.optional("advertise.client_url", |value| url::parse_client_url(schema::text(value)?))? {
            Some(given) => given,
            None => self.derive_url("client", listen.client)?,
        };
        let peer_url = match (
            self.optional("advertise.peer_url", |value| url::parse_peer_url(schema::text(value)?))?,
            own_entry,
        ) {
            (Some(given), _) => given,
            (None, Some(own)) => own.peer_url.clone(),
            (None, None) => self.derive_url("peer", listen.peer)?,
        };
        Ok(AdvertiseConfig { client_url, peer_url })
    }

    /// `http://` and the listening address, if that is one that others can use.
    fn derive_url(&self, side: &str, address: SocketAddr) -> Result<String, ConfigError> {
        if address.ip().to_canonical().is_unspecified() || address.port() == 0 {
            let message = format!(
                "listen.{side} = \"{address}\" is not an address that others can connect to: set advertise.{side}_url (--advertise-{side}-url) to one"
            );
            return Err(ConfigError::one(self.origin(&format!("listen.{side}")), message).refusing());
        }
        Ok(format!("http://{address}"))
    }

    fn cluster(
        &self,
        node: &NodeConfig,
        advertise: &AdvertiseConfig,
        given_members: Vec<FoundingMember>,
        join: Vec<String>,
    ) -> Result<ClusterConfig, ConfigError> {
        let alone = || {
            node.id.map(|id| FoundingMember {
                id,
                peer_url: advertise.peer_url.clone(),
            })
        };
        let members = match (join.is_empty(), given_members.is_empty()) {
            (true, true) => alone().into_iter().collect(),
            (_, _) => given_members,
        };
        Ok(ClusterConfig {
            name: self.text("cluster.name")?,
            members,
            join,
        })
    }

    fn raft(&self) -> Result<RaftConfig, ConfigError> {
        Ok(RaftConfig {
            tick: self.duration("raft.tick")?,
            heartbeat_ticks: self.count("raft.heartbeat_ticks")?,
            election_ticks: self.count("raft.election_ticks")?,
            max_inflight: self.count("raft.max_inflight")?,
            max_message_bytes: self.size("raft.max_message_bytes")?,
            proposal_queue: self.count("raft.proposal_queue")?,
            snapshot_entries: self.number("raft.snapshot_entries")?,
            keep_entries: self.number("raft.keep_entries")?,
        })
    }

    fn limits(&self) -> Result<LimitsConfig, ConfigError> {
        Ok(LimitsConfig {
            max_value_bytes: self.size("limits.max_value_bytes")?,
            max_txn_ops: self.count("limits.max_txn_ops")?,
            max_request_bytes: self.size("limits.max_request_bytes")?,
            max_range_delete: self.number("limits.max_range_delete")?,
            max_stream: self.duration("limits.max_stream")?,
            min_free_disk: self.size("limits.min_free_disk")?,
            max_store_bytes: self.size("limits.max_store_bytes")?,
            max_connections: self.count("limits.max_connections")?,
            max_watchers: self.count("limits.max_watchers")?,
            request_timeout: self.duration("limits.request_timeout")?,
            max_timeout: self.duration("limits.max_timeout")?,
            header_timeout: self.duration("limits.header_timeout")?,
        })
    }

    fn http(&self) -> Result<HttpConfig, ConfigError> {
        Ok(HttpConfig {
            allowed_origins: self.texts("http.allowed_origins", |text| Ok(text.to_owned()))?,
            allowed_hosts: self.texts("http.allowed_hosts", |text| Ok(text.to_ascii_lowercase()))?,
        })
    }

    fn log(&self) -> Result<LogConfig, ConfigError> {
        Ok(LogConfig {
            level: self.text("log.level")?,
            format: self.choice("log.format", &LOG_FORMATS)?,
            directory: self.path("log.directory")?,
            rotation: self.get("log.rotation", |value| schema::parse_rotation(schema::text(value)?))?,
            keep_files: self.count("log.keep_files")?,
            access_log: self.flag("log.access_log")?,
        })
    }
}
