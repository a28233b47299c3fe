//! Nodes without a raft: a peer server that records what it is handed, and a transport.

use std::{
    collections::HashMap,
    future::Future,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use metcd::{
    leader::{LeaderError, LeaderReply, LeaderRequest},
    serve::{ServeLimits, serve},
    transport::{
        Busy, Identity, Peer, PeerEvents, PeerServer, PeerService, Refusal, SenderIdentity, SnapshotSource, Transport, TransportLimits,
    },
};
use parking_lot::Mutex;
use raft::eraftpb::{Entry, Message, MessageType};
use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle};

pub const CLUSTER: u64 = 0xc1a5;
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until `holds`, and fails loudly if it never does.
pub async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < PATIENCE, "never: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// What a node was told.
#[derive(Default)]
pub struct Events {
    pub unreachable: Mutex<HashMap<u64, u64>>,
    pub snapshots: Mutex<Vec<(u64, bool)>>,
    pub removed: Mutex<Vec<String>>,
    pub refused: Mutex<Vec<(u64, String)>>,
    pub answered: Mutex<Vec<Message>>,
    pub unreached: Mutex<Vec<(u64, Option<Duration>)>>,
}

impl Events {
    pub fn unreachable_count(&self, peer: u64) -> u64 {
        self.unreachable.lock().get(&peer).copied().unwrap_or(0)
    }
}

impl PeerEvents for Events {
    fn unreachable(&self, peer: u64) {
        *self.unreachable.lock().entry(peer).or_default() += 1;
    }
    fn snapshot_sent(&self, peer: u64, ok: bool) {
        self.snapshots.lock().push((peer, ok));
    }
    fn answered(&self, _: &SenderIdentity<'_>, messages: Vec<Message>) {
        self.answered.lock().extend(messages);
    }
    fn unreached(&self, peer: u64, age: Option<Duration>) {
        self.unreached.lock().push((peer, age));
    }
    fn removed(&self, detail: String) {
        self.removed.lock().push(detail);
    }
    fn refused(&self, peer: u64, code: &str, _detail: String) {
        self.refused.lock().push((peer, code.to_owned()));
    }
}

/// A node's receiving side.
pub struct Recorder {
    pub id: u64,
    pub stepped: Mutex<Vec<Message>>,
    pub snapshots: Mutex<Vec<(u64, u64, Vec<u8>)>>,
    pub refusal: Mutex<Option<Refusal>>,
    /// Its own boot: any other one that is known is a later one.
    pub boot: Mutex<u64>,
    pub full: AtomicBool,
    pub calls: AtomicU64,
    pub directory: tempfile::TempDir,
}

impl Recorder {
    fn new(id: u64) -> Recorder {
        Recorder {
            id,
            stepped: Mutex::default(),
            snapshots: Mutex::default(),
            refusal: Mutex::default(),
            boot: Mutex::new(1),
            full: AtomicBool::new(false),
            calls: AtomicU64::new(0),
            directory: tempfile::tempdir().expect("a directory"),
        }
    }

    pub fn indexes(&self) -> Vec<u64> {
        self.stepped.lock().iter().map(|message| message.index).collect()
    }

    pub fn files(&self) -> usize {
        std::fs::read_dir(self.directory.path()).expect("readable").count()
    }
}

impl PeerService for Recorder {
    fn admit(&self, _: &SenderIdentity<'_>) -> Result<(), Refusal> {
        self.refusal.lock().clone().map_or(Ok(()), Err)
    }
    fn ends_as_outdated(&self, known: u64) -> bool {
        known != *self.boot.lock()
    }
    fn step(&self, _: u64, messages: Vec<Message>) -> Result<(), Busy> {
        if self.full.load(SeqCst) {
            return Err(Busy);
        }
        self.stepped.lock().extend(messages);
        Ok(())
    }
    fn call(&self, request: LeaderRequest, deadline: Duration) -> BoxFuture<'static, Result<LeaderReply, LeaderError>> {
        self.calls.fetch_add(1, SeqCst);
        Box::pin(async move {
            match request {
                LeaderRequest::KeepAlive { lease } => Ok(LeaderReply::Lease {
                    ttl_ms: lease,
                    remaining_ms: deadline.as_millis() as u64,
                }),
                LeaderRequest::Promote { id } => Err(LeaderError::MemberNotFound { id }),
                // Longer than any deadline.
                LeaderRequest::TimeToLive { .. }
                | LeaderRequest::AddMember(_)
                | LeaderRequest::Remove { .. }
                | LeaderRequest::Replace { .. }
                | LeaderRequest::Transfer { .. }
                | LeaderRequest::Progress => std::future::pending().await,
            }
        })
    }
    fn members(&self) -> serde_json::Value {
        serde_json::json!({ "answered_by": self.id })
    }
    fn snapshot_dir(&self) -> PathBuf {
        self.directory.path().to_owned()
    }
    fn verify_snapshot(&self, _: &Message, file: &Path) -> Result<(), String> {
        let bytes = std::fs::read(file).map_err(|err| err.to_string())?;
        if bytes.ends_with(b"end") { Ok(()) } else { Err("no end".into()) }
    }
    fn snapshot_received(&self, from: u64, message: Message, file: PathBuf) -> Result<(), Busy> {
        let bytes = std::fs::read(&file).expect("the file is there");
        self.snapshots
            .lock()
            .push((from, message.get_snapshot().get_metadata().index, bytes));
        std::fs::remove_file(file).expect("removable");
        Ok(())
    }
}

/// A listening node.
pub struct Node {
    pub recorder: Arc<Recorder>,
    pub address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    task: Option<JoinHandle<()>>,
}

pub fn identity(id: u64) -> Identity {
    Identity {
        cluster_id: CLUSTER,
        member: id,
        incarnation: 100 + id,
        boot: 1,
        peer_url: format!("http://127.0.0.1:{id}").into(),
    }
}

impl Node {
    pub async fn start(id: u64) -> Node {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        Node::start_at(listener, id, TransportLimits::default())
    }

    pub fn start_at(listener: TcpListener, id: u64, limits: TransportLimits) -> Node {
        Node::answering(listener, id, limits, None)
    }

    /// A node whose own messages may ride in its answers.
    pub fn answering(listener: TcpListener, id: u64, limits: TransportLimits, transport: Option<Transport>) -> Node {
        let address = listener.local_addr().expect("address");
        let recorder = Arc::new(Recorder::new(id));
        let (stop, stopped) = oneshot::channel::<()>();
        let server = PeerServer::new(recorder.clone(), identity(id), limits, transport);
        let task = tokio::spawn(serve(
            listener,
            server,
            ServeLimits {
                shutdown_grace: Duration::ZERO,
                ..ServeLimits::default()
            },
            async {
                let _ = stopped.await;
            },
        ));
        Node {
            recorder,
            address,
            stop: Some(stop),
            task: Some(task),
        }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn peer(&self) -> Peer {
        Peer {
            id: self.recorder.id,
            url: self.url(),
            boot: 0,
        }
    }

    /// Stops it and frees its port.
    pub async fn stop(mut self) -> SocketAddr {
        drop(self.stop.take());
        self.task.take().expect("runs").await.expect("no panic");
        self.address
    }
}

pub fn transport(id: u64, limits: TransportLimits, peers: Vec<Peer>) -> (Transport, Arc<Events>) {
    let events = Arc::new(Events::default());
    let transport = Transport::start(identity(id), limits, events.clone(), tokio::runtime::Handle::current()).expect("a transport");
    transport.set_peers(peers);
    (transport, events)
}

pub fn message(kind: MessageType, from: u64, to: u64, index: u64) -> Message {
    let mut message = Message {
        from,
        to,
        term: 3,
        index,
        ..Message::default()
    };
    message.set_msg_type(kind);
    message
}

pub fn append(from: u64, to: u64, index: u64, bytes: usize) -> Message {
    let mut message = message(MessageType::MsgAppend, from, to, index);
    message.log_term = 3;
    message.mut_entries().push(Entry {
        index: index + 1,
        term: 3,
        data: vec![index as u8; bytes].into(),
        ..Entry::default()
    });
    message
}

pub fn snapshot_message(from: u64, to: u64, index: u64) -> Message {
    let mut message = message(MessageType::MsgSnapshot, from, to, 0);
    let metadata = message.mut_snapshot().mut_metadata();
    (metadata.index, metadata.term) = (index, 3);
    metadata.mut_conf_state().voters = vec![1, 2, 3];
    message
}

/// Chunks, then perhaps a failure.
pub struct Chunks {
    pub left: usize,
    pub size: usize,
    pub then: Ending,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// With the mark that the recorder verifies.
    Whole,
    Corrupt,
    Failure,
}

impl SnapshotSource for Chunks {
    fn next_chunk(&mut self) -> io::Result<Option<Bytes>> {
        if self.left > 0 {
            self.left -= 1;
            return Ok(Some(vec![self.left as u8; self.size].into()));
        }
        match std::mem::replace(&mut self.then, Ending::Corrupt) {
            Ending::Whole => Ok(Some(Bytes::from_static(b"end"))),
            Ending::Corrupt => Ok(None),
            Ending::Failure => Err(io::Error::other("the disk failed")),
        }
    }
}

/// Runs `future`, at most for [`PATIENCE`].
pub async fn in_time<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("in time")
}
