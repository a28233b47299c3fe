//! `metcd serve`: flags → configuration → logging → runtime → server → exit code.

use std::ffi::OsStr;
use std::io::Write as _;
use std::path::PathBuf;

use clap::Args;
use clap::builder::{PossibleValue, StringValueParser, TypedValueParser};
use tokio::signal::unix::{SignalKind, signal};

use super::signals::is_ignored;

use super::CliError;
use crate::config::{self, Config, Flag, FlagValue, Loaded, Sources};
use crate::telemetry::{self, LogHandle};

const EXAMPLES: &str = "\
Examples:
  # A single node: clients on 127.0.0.1:3379, data in ./metcd-data
  metcd serve
  # A file, with one key changed
  metcd serve --config config/node2.toml --data-dir /var/lib/metcd
  # The first of three founding members
  metcd serve --id 1 --listen-client 10.0.0.1:3379 --listen-peer 10.0.0.1:3380 \\
      --member 1=http://10.0.0.1:3380 \\
      --member 2=http://10.0.0.2:3380 \\
      --member 3=http://10.0.0.3:3380
  # One more member for a running cluster
  metcd serve --id 4 --data-dir d4 --join http://127.0.0.1:3379 \\
      --listen-client 127.0.0.1:6379 --listen-peer 127.0.0.1:6380
  # Any key; all of them are in config/metcd.toml
  metcd serve --set raft.tick=100ms --set log.level=debug

Layers, later ones win: built-in defaults, --config, METCD__SECTION__KEY in the environment, flags.";

/// Flags of `metcd serve`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ServeArgs {
    #[command(flatten)]
    config: ConfigArgs,
}

/// The flags that are settings. All are texts here: the configuration's own checks speak about ranges and spelling.
#[derive(Debug, Default, Args)]
pub struct ConfigArgs {
    /// Read settings from a TOML file.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// This member's id [node.id].
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    id: Option<String>,
    /// This member's name [node.name].
    #[arg(long, value_name = "S")]
    name: Option<String>,
    /// Where its data lives [node.data_dir].
    #[arg(long, value_name = "DIR")]
    data_dir: Option<String>,
    /// Where clients are served [listen.client].
    #[arg(long, value_name = "ADDR")]
    listen_client: Option<String>,
    /// Where the other members are served [listen.peer].
    #[arg(long, value_name = "ADDR")]
    listen_peer: Option<String>,
    /// How clients reach this member [advertise.client_url].
    #[arg(long, value_name = "URL")]
    advertise_client_url: Option<String>,
    /// How the other members reach it [advertise.peer_url].
    #[arg(long, value_name = "URL")]
    advertise_peer_url: Option<String>,
    /// A founding member; once for each, the same on all of them [cluster.members].
    #[arg(long = "member", value_name = "ID=PEER_URL")]
    members: Vec<String>,
    /// A client URL of the running cluster to join; may be repeated [cluster.join].
    #[arg(long, value_name = "CLIENT_URL")]
    join: Vec<String>,
    /// memory, sled or rocksdb [store.backend].
    #[arg(long, value_name = "BACKEND", value_parser = WellKnown(config::store_backends), hide_possible_values = true)]
    store: Option<String>,
    /// sled, raft-engine or rocksdb [wal.engine].
    #[arg(long, value_name = "ENGINE", value_parser = WellKnown(config::wal_engines), hide_possible_values = true)]
    wal: Option<String>,
    /// Set any key; may be repeated.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    sets: Vec<String>,
}

/// A text whose usual values completions offer. Whether it is one of them is for the configuration's own check to say.
#[derive(Debug, Clone)]
struct WellKnown(fn() -> Vec<&'static str>);

impl TypedValueParser for WellKnown {
    type Value = String;

    fn parse_ref(&self, command: &clap::Command, arg: Option<&clap::Arg>, value: &OsStr) -> Result<String, clap::Error> {
        StringValueParser::new().parse_ref(command, arg, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new((self.0)().into_iter().map(PossibleValue::new)))
    }
}

impl ConfigArgs {
    /// The configuration these flags, the file they name and the environment make.
    ///
    /// # Errors
    /// Wrong usage if only flags are to blame, else refused.
    pub fn load(&self) -> Result<Loaded, CliError> {
        let sources = Sources {
            file: self.config.clone(),
            env: std::env::vars_os().collect(),
            flags: self.flags()?,
        };
        config::load(&sources).map_err(|error| {
            let text = error.to_string();
            if error.is_usage() {
                CliError::Usage(text)
            } else {
                CliError::Failed(text)
            }
        })
    }

    fn flags(&self) -> Result<Vec<Flag>, CliError> {
        let texts = [
            ("--id", "node.id", &self.id),
            ("--name", "node.name", &self.name),
            ("--data-dir", "node.data_dir", &self.data_dir),
            ("--listen-client", "listen.client", &self.listen_client),
            ("--listen-peer", "listen.peer", &self.listen_peer),
            ("--advertise-client-url", "advertise.client_url", &self.advertise_client_url),
            ("--advertise-peer-url", "advertise.peer_url", &self.advertise_peer_url),
            ("--store", "store.backend", &self.store),
            ("--wal", "wal.engine", &self.wal),
        ];
        let lists = [
            ("--member", "cluster.members", &self.members),
            ("--join", "cluster.join", &self.join),
        ];
        let texts = texts
            .into_iter()
            .filter_map(|(name, path, value)| Some(flag(name, path, FlagValue::Text(value.clone()?))));
        let lists = lists.into_iter().filter(|(_, _, items)| !items.is_empty());
        let lists = lists.map(|(name, path, items)| flag(name, path, FlagValue::List(items.clone())));
        texts
            .chain(lists)
            .map(Ok)
            .chain(self.sets.iter().map(|set| parse_set(set)))
            .collect()
    }
}

fn flag(name: &str, path: &str, value: FlagValue) -> Flag {
    Flag {
        path: path.to_owned(),
        value,
        origin: name.to_owned(),
    }
}

fn parse_set(set: &str) -> Result<Flag, CliError> {
    let wrong = || CliError::Usage(format!("--set {set}: write it like --set raft.tick=100ms"));
    let (path, value) = set.split_once('=').ok_or_else(wrong)?;
    Ok(flag(&format!("--set {path}"), path.trim(), FlagValue::Text(value.to_owned())))
}

/// Runs a member until it is told to stop.
pub fn run(args: &ServeArgs) -> Result<(), CliError> {
    let Loaded { config, warnings, .. } = args.config.load()?;
    let name = config.name().unwrap_or_else(|| "joining".to_owned());
    let has_log_file = config.log.directory.is_some();
    let log = telemetry::init(&config.log, &name).map_err(|error| CliError::Failed(error.to_string()))?;
    warn(&warnings, has_log_file);
    let result = run_to_the_end(config, log.clone());
    // On stderr it is said once, as of every command: by whoever is told the result.
    if let Err(error) = &result
        && has_log_file
    {
        tracing::error!("{error}");
    }
    log.close();
    result
}

/// What is said at every start: in the log and, where that goes to a file or leaves warnings out, on stderr as well.
fn warn(warnings: &[String], has_log_file: bool) {
    let is_seen = tracing::enabled!(tracing::Level::WARN) && !has_log_file;
    for warning in warnings {
        tracing::warn!("{warning}");
        if !is_seen {
            // Nobody is left to tell if stderr is gone.
            let _ = writeln!(std::io::stderr(), "metcd: warning: {warning}");
        }
    }
}

fn run_to_the_end(config: Config, log: LogHandle) -> Result<(), CliError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("metcd-worker")
        .build()
        .map_err(|error| CliError::Failed(format!("cannot start the runtime's threads: {error}")))?;
    let result = runtime.block_on(serve(config, log)).map_err(CliError::Failed);
    // Whatever is still waiting for a disk or a peer is not waited for.
    runtime.shutdown_background();
    result
}

/// Runs the member; it returns when the member has stopped in order.
async fn serve(config: Config, log: LogHandle) -> Result<(), String> {
    let stop = stop_signal().map_err(|error| format!("cannot listen for signals: {error}"))?;
    crate::server::run(config, log, stop).await.map_err(|error| error.to_string())
}

/// Resolves at the first SIGTERM, SIGINT or SIGHUP (its terminal was closed: no reason to leave without a word to the others, unless it was
/// started by `nohup`). A second one ends the process at once.
fn stop_signal() -> std::io::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hang_up = match is_ignored(SignalKind::hangup()) {
        true => None,
        false => Some(signal(SignalKind::hangup())?),
    };
    let (first, stopped) = tokio::sync::oneshot::channel();
    tokio::spawn(async move {
        let mut next = async || {
            tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
                Some(_) = async { hang_up.as_mut()?.recv().await } => "SIGHUP",
            }
        };
        let name = next().await;
        tracing::info!(signal = name, "stopping in order; a second signal ends the process at once");
        // The receiver is gone only when the server has ended already.
        let _ = first.send(());
        next().await;
        end_process(1);
    });
    Ok(async {
        let _ = stopped.await;
    })
}

/// Ends the process as the kernel ends one that was killed: without the destructors that libraries have registered for its end. Log and store
/// are closed before, or survive this as they survive kill -9; but a task or a thread that is still being dropped may hold the store, and
/// RocksDB aborts the process when its destructors run while a database is open.
pub(super) fn end_process(code: u8) -> ! {
    signal_hook::low_level::exit(i32::from(code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flag_names_a_key_and_itself() {
        let some = |text: &str| Some(text.to_owned());
        let args = ConfigArgs {
            config: None,
            id: some("2"),
            name: some("n"),
            data_dir: some("d"),
            listen_client: some("127.0.0.1:1"),
            listen_peer: some("127.0.0.1:2"),
            advertise_client_url: some("http://a:1"),
            advertise_peer_url: some("http://a:2"),
            members: vec!["2=http://a:2".to_owned(), "1=http://b:2".to_owned()],
            join: Vec::new(),
            store: some("sled"),
            wal: some("raft-engine"),
            sets: vec!["raft.tick=20ms".to_owned()],
        };
        let flags = args.flags().expect("flags");
        let config = config::load(&Sources {
            flags,
            ..Sources::default()
        })
        .expect("load")
        .config;
        assert_eq!(
            (config.node.id, config.node.name.as_deref(), config.node.data_dir.to_str()),
            (Some(2), Some("n"), Some("d"))
        );
        assert_eq!((config.listen.client.port(), config.listen.peer.port()), (1, 2));
        assert_eq!(
            (config.advertise.client_url.as_str(), config.advertise.peer_url.as_str()),
            ("http://a:1", "http://a:2")
        );
        assert_eq!(config.cluster.members.iter().map(|m| m.id).collect::<Vec<_>>(), [1, 2]);
        assert_eq!((config.store.backend.name(), config.wal.engine.name()), ("sled", "raft-engine"));
        assert_eq!(config.raft.tick.as_millis(), 20);
    }

    #[test]
    fn a_flag_that_is_wrong_is_wrong_usage() {
        let args = ConfigArgs {
            id: Some("zero".to_owned()),
            ..ConfigArgs::default()
        };
        let flags = args.flags().expect("flags");
        let error = config::load(&Sources {
            flags,
            ..Sources::default()
        })
        .expect_err("not a number");
        assert!(error.is_usage() && error.to_string().starts_with("--id: "), "{error}");
        assert!(parse_set("raft.tick").is_err_and(|e| e.to_string().contains("--set raft.tick=100ms")));
    }
}
