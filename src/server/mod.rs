//! A member from start to stop. [`run`] reads as the diagram of the node: what is on disk, the protocol over it, the two listeners, the
//! duties, and the way back in the opposite order.

pub mod admission;
mod clients;
mod join;
mod offline;
mod peer_thread;
mod peers;
mod recover;
mod stop;

use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::mpsc::{Sender, channel, unbounded_channel};

use admission::Admissions;
use clients::Clients;
use join::Settled;
use peer_thread::PeerThread;
use stop::Running;

pub use offline::latest_state;
pub(crate) use peers::Queued;

use crate::config::Config;
use crate::consensus::{self, Consensus};
use crate::datadir::advertised::Advertised;
use crate::datadir::disk::{self, RESERVE_BYTES, has_reserve};
use crate::datadir::{DataDir, WAY_OUT};
use crate::driver;
use crate::http::{self, AppState};
use crate::leader::{Duties, LeaderService, run_duties};
use crate::node::{Node, Phase, Shared, SharedParts};
use crate::serve::{self, ServeLimits};
use crate::snapshot::SnapshotError;
use crate::telemetry::LogHandle;
use crate::transport::{Identity, PeerServer, Transport, TransportLimits};
use crate::wal::WalError;

/// The whole stop takes no longer than this.
const STOP_WITHIN: Duration = Duration::from_secs(9);
/// Far beyond what a slow disk, or an engine that tidies up, takes for one thing.
const THREAD_PATIENCE: Duration = Duration::from_secs(60);
/// A removed member is accompanied, or goes on as a voter of the old configuration, so long at most.
const LINGER: Duration = Duration::from_secs(10);
/// Entries that wait for the state machine in memory. The replay at a start may hold more: the log is bounded by other limits.
const MAX_UNAPPLIED_BYTES: usize = 128 << 20;
/// Between two looks at the disk's free space.
const DISK_INTERVAL: Duration = Duration::from_secs(1);

/// Why a member did not start, or could not go on. One sentence with the way out.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The data directory, or what is in it.
    #[error(transparent)]
    DataDir(#[from] crate::datadir::DataDirError),
    /// The log.
    #[error("{}", of_the_log(.0))]
    Wal(#[from] WalError),
    /// The store.
    #[error(transparent)]
    Store(#[from] crate::store::StoreError),
    /// The state in the store.
    #[error(transparent)]
    State(#[from] crate::state::StateError),
    /// A snapshot file.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The snapshot file that the state is in.
    #[error("{}: {source}: put an intact copy of this file there, or {WAY_OUT}", file.display())]
    #[expect(missing_docs, reason = "the message says what each field is")]
    StateFile { file: PathBuf, source: SnapshotError },
    /// Log and state do not belong together.
    #[error(transparent)]
    Start(#[from] consensus::StartError),
    /// A socket.
    #[error("cannot listen on {address} for {what}: {source}. Is another process using the port? Choose another with {flag}")]
    #[expect(missing_docs, reason = "the message says what each field is")]
    Listen {
        what: &'static str,
        flag: &'static str,
        address: std::net::SocketAddr,
        source: std::io::Error,
    },
    /// Threads and the like.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// Joining, or a founder whose peers know better.
    #[error("{0}")]
    Refused(String),
    /// The member could not go on.
    #[error("{0}")]
    Failed(String),
}

/// Damage is found by the engines, which know of no cluster.
fn of_the_log(error: &WalError) -> String {
    match error {
        WalError::Corrupt(_) => format!("{error}: {WAY_OUT}"),
        WalError::Io { .. } | WalError::Engine(_) | WalError::Lost(_) | WalError::Compacted { .. } | WalError::Refused(_) => {
            error.to_string()
        }
    }
}

/// Runs a member until `stop` resolves (then in order, exit 0) or it cannot go on.
pub async fn run(config: Config, log: LogHandle, stop: impl Future<Output = ()>) -> Result<(), ServerError> {
    let mut data_dir = DataDir::open(&config)?;
    let clients = Clients::listen(&config, data_dir.node_id()).await?;
    let mut stop = pin!(stop);
    let settled = tokio::select! {
        settled = join::settle(&config, &mut data_dir) => settled.map(Some),
        () = &mut stop => Ok(None),
    };
    let started = match settled {
        Ok(Some(settled)) => start(config, log, &mut data_dir, settled, &clients).await.map(Some),
        Ok(None) => Ok(None),
        Err(error) => Err(error),
    };
    let (member, api) = match started {
        Ok(Some(started)) => started,
        not_started => {
            clients.give_up().await;
            return not_started.map(|_| ());
        }
    };
    let client_server = clients.started(api, member.shared.clone());

    let shared = member.shared.clone();
    let failure = tokio::select! {
        () = &mut stop => None,
        fatal = failed(&shared) => Some(fatal),
    };
    let noted = match failure.as_ref().map(|fatal| fatal.verdict) {
        Some(driver::Verdict::Removed) => data_dir.note_departure(),
        Some(driver::Verdict::Outdated) => data_dir.note_outdated(),
        Some(driver::Verdict::Startable) | None => Ok(()),
    };
    if let Err(error) = noted {
        // Whoever starts it again has to ask the others.
        tracing::warn!(%error, "could not note in the data directory that it must not be started again");
    }
    let orderly = stop::shut_down(member, client_server);
    if tokio::time::timeout(STOP_WITHIN, orderly).await.is_err() {
        tracing::warn!("the orderly stop took too long and was cut short; nothing acknowledged is lost");
    }
    match failure.or_else(|| failed_in_stopping(&shared)) {
        None => Ok(()),
        Some(fatal) => Err(ServerError::Failed(fatal.reason)),
    }
}

/// The last appends, what is written behind them, and what the store keeps, are synced while a member stops: a sync that fails then is no orderly
/// end (rule 5), although nothing acknowledged is lost.
fn failed_in_stopping(shared: &Shared) -> Option<driver::Fatal> {
    match &*shared.phases().borrow() {
        Phase::Failed(fatal) if fatal.verdict == driver::Verdict::Startable => Some(fatal.clone()),
        Phase::Failed(_) | Phase::Running | Phase::Stopping | Phase::GivenUp | Phase::Closed => None,
    }
}

/// Opens what is on disk, and sets the protocol, its peers and its duties going. What it returns is ready for clients.
async fn start(
    config: Config,
    log: LogHandle,
    data_dir: &mut DataDir,
    settled: Settled,
    clients: &Clients,
) -> Result<(Running, http::Api), ServerError> {
    let config = Arc::new(config);
    let id = settled.id;
    clients.set_member(id);
    let peer_listener = bind("peers", "--listen-peer", config.listen.peer).await?.into_std()?;
    // Not before it may: whoever is refused reads one line, the reason.
    tracing::info!(version = env!("CARGO_PKG_VERSION"), data_dir = %config.node.data_dir.display(), "starting");

    // The id is the data directory's, whatever the configuration's default says.
    let name = config.node.name.clone().unwrap_or_else(|| crate::config::default_name(id));
    log.set_node(&name);
    data_dir.check_log()?;
    let found = recover::open(&config, data_dir, settled)?;
    data_dir.set_cluster(settled.cluster_id, id)?;
    data_dir.note_log()?;
    let identity = Identity {
        cluster_id: settled.cluster_id,
        member: id,
        incarnation: data_dir.identity().incarnation,
        boot: data_dir.boot(),
        peer_url: config.advertise.peer_url.as_str().into(),
    };
    let (applied_index, committed_index) = (found.state.applied().index, found.committed_index);

    let (strangers_tx, strangers_rx) = channel(1);
    let protocol = start_protocol(&config, data_dir, &identity, found, strangers_tx)?;
    let (shared, transport) = (protocol.shared, protocol.transport);
    let leader = Arc::new(LeaderService::new(shared.clone(), transport.clone()));
    let node = Node::new(shared.clone(), leader.clone());
    let peer_service = Arc::new(peers::Service::new(node.clone(), protocol.intake, data_dir.snapshot_dir()));
    let peer_app = PeerServer::new(peer_service, identity.clone(), transport_limits(&config), Some(transport.clone()));
    let limits = serve_limits(&config, Arc::new(AtomicU64::new(id)));
    let peer_server = protocol
        .peer_thread
        .handle()
        .spawn(serve_peers(peer_listener, peer_app, limits, shared.clone()));

    tokio::spawn(peers::meet_strangers(shared.clone(), transport.clone(), strangers_rx));
    tokio::spawn(run_duties(shared.clone(), duties(&config, &identity, name, data_dir.path())));
    if applied_index == 0 {
        tokio::spawn(join::find_peers(config.clone(), shared.clone()));
    }
    tokio::spawn(peers::ask_whether_welcome(shared.clone(), transport.clone()));
    tokio::spawn(peers::ask_who_departed(shared.clone(), transport.clone()));
    tokio::spawn(watch_disk(shared.clone(), data_dir.path().to_owned(), config.limits.min_free_disk));
    tokio::spawn(compare_address(shared.clone(), committed_index, config.advertise.peer_url.clone()));
    tracing::info!(id, client = %config.advertise.client_url, peer = %config.advertise.peer_url, "serving");
    let api = http::service(AppState::new(node, config, clients.stats(), Some(Arc::new(log))));
    let running = Running {
        shared,
        leader,
        transport,
        threads: protocol.threads,
        peer_thread: protocol.peer_thread,
        peer_server,
    };
    Ok((running, api))
}

/// The protocol over what was found on disk, without anybody who asks it for something.
struct Protocol {
    shared: Arc<Shared>,
    transport: Transport,
    intake: Arc<peers::Intake>,
    threads: driver::Threads,
    peer_thread: PeerThread,
}

fn start_protocol(
    config: &Config,
    data_dir: &DataDir,
    identity: &Identity,
    found: recover::Found,
    strangers: Sender<peers::Stranger>,
) -> Result<Protocol, ServerError> {
    #[expect(clippy::disallowed_methods, reason = "its senders are bounded one by one: see the driver")]
    let (events_tx, events_rx) = unbounded_channel();
    let core = Consensus::start(
        protocol_options(config, identity),
        found.image,
        found.state.applied(),
        found.state.reader().cluster_time_ms(),
        &slog_bridge(),
    )?;
    let shared = Arc::new(Shared::new(SharedParts {
        id: identity.member,
        boot: identity.boot,
        reader: found.state.reader(),
        store: found.store,
        events: events_tx,
        view: core.view(),
        max_waiting: config.raft.proposal_queue,
        tick: config.raft.tick,
        serve_from_index: found.committed_index,
        max_store_bytes: config.limits.max_store_bytes,
        wal_engine: config.wal.engine.name(),
        admissions: Admissions::new(identity.member, identity.cluster_id, identity.incarnation),
    }));
    let peer_thread = PeerThread::start()?;
    let intake = Arc::new(peers::Intake::new(shared.clone(), strangers));
    let transport = Transport::start(
        identity.clone(),
        transport_limits(config),
        Arc::new(peers::Events::new(shared.clone(), intake.clone())),
        peer_thread.handle().clone(),
    )
    .map_err(|error| ServerError::Refused(format!("cannot make an HTTP client: {error}")))?;
    let options = driver::Options {
        tick: config.raft.tick,
        snapshot_entries: config.raft.snapshot_entries,
        keep_entries: config.raft.keep_entries,
        snapshot_dir: data_dir.snapshot_dir(),
        patience: THREAD_PATIENCE,
    };
    let threads = driver::start(
        core,
        found.wal,
        found.state,
        shared.clone(),
        transport.clone(),
        options,
        events_rx,
        found.durable_index,
        peer_thread.handle(),
    )?;
    Ok(Protocol {
        shared,
        transport,
        intake,
        threads,
        peer_thread,
    })
}

/// Serves the peers, on the runtime that polls this.
async fn serve_peers<S: serve::HttpService>(listener: std::net::TcpListener, app: S, limits: ServeLimits, shared: Arc<Shared>) {
    // Made anew, because a listener belongs to the runtime on which it was made.
    match TcpListener::from_std(listener) {
        Ok(listener) => serve::serve(listener, app, limits, closing(shared)).await,
        Err(error) => tracing::error!(%error, "cannot serve the peers"),
    }
}

/// The others go where the cluster's record says; another flag at a start does not change it.
async fn compare_address(shared: Arc<Shared>, from_index: u64, advertised: String) {
    shared.reader.wait_applied(from_index).await;
    let own = shared.reader.members().into_iter().find(|member| member.id == shared.id);
    if let Some(registered) = own.map(|own| own.peer_url).filter(|url| *url != advertised) {
        let id = shared.id;
        tracing::warn!(
            registered,
            advertised,
            "the cluster knows this member under another peer address and goes there; if it has moved: metcd member update {id} --peer-url {advertised} (and --client-url, if clients reach it elsewhere, too)"
        );
    }
}

async fn bind(what: &'static str, flag: &'static str, address: std::net::SocketAddr) -> Result<TcpListener, ServerError> {
    TcpListener::bind(address).await.map_err(|source| ServerError::Listen {
        what,
        flag,
        address,
        source,
    })
}

async fn failed(shared: &Shared) -> driver::Fatal {
    let mut phases = shared.phases();
    loop {
        if let Phase::Failed(fatal) = &*phases.borrow_and_update() {
            return fatal.clone();
        }
        if phases.changed().await.is_err() {
            return driver::Fatal::new("the node is gone");
        }
    }
}

/// Resolves when the peers need not be heard any more.
async fn closing(shared: Arc<Shared>) {
    let _ = shared
        .phases()
        .wait_for(|phase| matches!(phase, Phase::Closed | Phase::Failed(_)))
        .await;
}

/// Below `limits.min_free_disk` writes that grow the store are refused (507) until there is room again.
async fn watch_disk(shared: Arc<Shared>, path: std::path::PathBuf, min_free: u64) {
    let mut ticker = tokio::time::interval(DISK_INTERVAL);
    let mut refused = false;
    loop {
        ticker.tick().await;
        match disk::free_bytes(&path) {
            Ok(free) if free < min_free => {
                if !refused {
                    tracing::warn!(free, min_free, "the disk is nearly full: writes get 507 until there is room");
                }
                refused = true;
                shared.set_write_refusal(Some(format!(
                    "{free} bytes are free on this member's disk and limits.min_free_disk is {min_free}: make room to write again"
                )));
            }
            Ok(free) => {
                if refused {
                    refused = false;
                    tracing::info!("there is room on the disk again");
                    shared.set_write_refusal(None);
                }
                // A start on a full disk has used it up. Not if that alone would make the disk nearly full again.
                if free >= min_free + 2 * RESERVE_BYTES && !has_reserve(&path) {
                    let path = path.clone();
                    tokio::task::spawn_blocking(move || keep_reserve(&path));
                }
            }
            Err(error) => tracing::warn!(%error, "cannot ask for the free space of the data directory"),
        }
    }
}

fn keep_reserve(path: &std::path::Path) {
    if let Err(error) = disk::keep_reserve(path) {
        tracing::warn!(%error, "no space could be held in reserve for a full disk");
    }
}

fn protocol_options(config: &Config, identity: &Identity) -> consensus::Options {
    consensus::Options {
        id: identity.member,
        boot: identity.boot,
        heartbeat_ticks: config.raft.heartbeat_ticks,
        election_ticks: config.raft.election_ticks,
        max_inflight: config.raft.max_inflight,
        max_message_bytes: config.raft.max_message_bytes,
        max_unapplied_bytes: MAX_UNAPPLIED_BYTES,
        linger_ticks: (LINGER.as_millis() / config.raft.tick.as_millis().max(1)) as u64,
        seed: identity.incarnation ^ identity.boot,
    }
}

fn election_timeout(config: &Config) -> Duration {
    config.raft.tick * config.raft.election_ticks as u32
}

fn transport_limits(config: &Config) -> TransportLimits {
    // One append and one entry at once: an entry holds at least one request, whatever its size.
    let max_body_bytes = (2 * config.limits.max_request_bytes + config.raft.max_message_bytes + (1 << 20)) as usize;
    let defaults = TransportLimits::default();
    TransportLimits {
        max_body_bytes: max_body_bytes.max(defaults.max_body_bytes),
        control_timeout: election_timeout(config),
        append_timeout: 4 * election_timeout(config),
        ..defaults
    }
}

fn serve_limits(config: &Config, member: Arc<AtomicU64>) -> ServeLimits {
    ServeLimits {
        member,
        max_connections: config.limits.max_connections,
        header_timeout: config.limits.header_timeout,
        expose_remote_addr: config.log.access_log,
        ..ServeLimits::default()
    }
}

fn duties(config: &Config, identity: &Identity, name: String, data_dir: &std::path::Path) -> Duties {
    Duties {
        history: config.history.clone(),
        idempotency: config.idempotency.clone(),
        name,
        client_url: config.advertise.client_url.clone(),
        advertised: Advertised::read(data_dir),
        incarnation: identity.incarnation,
        tick: config.raft.tick,
        heartbeat_ticks: config.raft.heartbeat_ticks,
        election_timeout: election_timeout(config),
    }
}

/// raft-rs logs to slog: its lines go to tracing under the target `raft`, where the filter finds them.
fn slog_bridge() -> slog::Logger {
    struct Bridge;
    impl slog::Drain for Bridge {
        type Ok = ();
        type Err = slog::Never;
        fn log(&self, record: &slog::Record<'_>, _values: &slog::OwnedKVList) -> Result<(), slog::Never> {
            match record.level() {
                slog::Level::Critical | slog::Level::Error => tracing::error!(target: "raft", "{}", record.msg()),
                slog::Level::Warning => tracing::warn!(target: "raft", "{}", record.msg()),
                slog::Level::Info => tracing::debug!(target: "raft", "{}", record.msg()),
                slog::Level::Debug | slog::Level::Trace => tracing::trace!(target: "raft", "{}", record.msg()),
            }
            Ok(())
        }
    }
    slog::Logger::root(Bridge, slog::o!())
}
