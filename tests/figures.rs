//! Figures, not checks: `cargo test --release --test figures -- --ignored --nocapture --test-threads 1`.
//! Those of the server need `wrk` in the path.

#![allow(clippy::print_stdout, reason = "figures are printed")]
#![allow(clippy::disallowed_methods, reason = "no more wait in the queue than were sent")]

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Body,
    http::{HeaderValue, Response},
    routing::get,
};
use futures_util::future::BoxFuture;
use hyper_util::rt::TokioIo;
use metcd::{
    leader::{LeaderError, LeaderReply, LeaderRequest},
    serve::{ServeLimits, serve},
    transport::{Busy, Identity, Peer, PeerEvents, PeerServer, PeerService, Refusal, SenderIdentity, Transport, TransportLimits},
};
use raft::eraftpb::{Entry, Message, MessageType};
use tokio::{net::TcpListener, sync::mpsc};

const FOR: Duration = Duration::from_secs(3);

/// Processor time of this process (finished threads excepted).
fn processor_time() -> Duration {
    let tasks = std::fs::read_dir("/proc/self/task").expect("procfs");
    let of_task = |task: PathBuf| -> u64 {
        let text = std::fs::read_to_string(task.join("schedstat")).unwrap_or_default();
        text.split(' ').next().and_then(|ns| ns.parse().ok()).unwrap_or(0)
    };
    Duration::from_nanos(tasks.filter_map(|task| Some(of_task(task.ok()?.path()))).sum())
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime")
}

struct Echo {
    id: u64,
    transport: OnceLock<Transport>,
    arrived_tx: mpsc::UnboundedSender<usize>,
}

impl PeerService for Echo {
    fn admit(&self, _: &SenderIdentity) -> Result<(), Refusal> {
        Ok(())
    }
    fn ends_as_outdated(&self, _: u64) -> bool {
        false
    }
    fn step(&self, from: u64, messages: Vec<Message>) -> Result<(), Busy> {
        if self.id == 1 {
            let _ = self.arrived_tx.send(messages.len());
            return Ok(());
        }
        let answer = |message: Message| {
            let mut answer = Message {
                from: self.id,
                to: from,
                term: 3,
                index: message.index,
                ..Message::default()
            };
            answer.set_msg_type(MessageType::MsgAppendResponse);
            answer
        };
        self.transport.get().expect("set").send(messages.into_iter().map(answer).collect());
        Ok(())
    }
    fn call(&self, _: LeaderRequest, _: Duration) -> BoxFuture<'static, Result<LeaderReply, LeaderError>> {
        Box::pin(async { Err(LeaderError::NoLeader) })
    }
    fn members(&self) -> serde_json::Value {
        serde_json::Value::Null
    }
    fn snapshot_dir(&self) -> PathBuf {
        PathBuf::new()
    }
    fn verify_snapshot(&self, _: &Message, _: &Path) -> Result<(), String> {
        Err(String::new())
    }
    fn snapshot_received(&self, _: u64, _: Message, _: PathBuf) -> Result<(), Busy> {
        Err(Busy)
    }
}

impl PeerEvents for Echo {
    fn unreachable(&self, peer: u64) {
        panic!("{peer} is unreachable");
    }
    fn snapshot_sent(&self, _: u64, _: bool) {}
    fn answered(&self, _: &SenderIdentity<'_>, messages: Vec<Message>) {
        let _ = self.arrived_tx.send(messages.len());
    }
    fn unreached(&self, _: u64, _: Option<Duration>) {}
    fn removed(&self, _: String) {}
    fn refused(&self, _: u64, _: &str, _: String) {}
}

/// A sends appends, B answers each: `window` of them under way.
async fn exchange(window: usize, bytes: usize) {
    let (arrived_tx, mut arrived_rx) = mpsc::unbounded_channel();
    let mut nodes = Vec::new();
    for id in [1, 2] {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let url = format!("http://{}", listener.local_addr().expect("address"));
        let identity = Identity {
            cluster_id: 1,
            member: id,
            incarnation: id,
            boot: 1,
            peer_url: url.as_str().into(),
        };
        let echo = Arc::new(Echo {
            id,
            transport: OnceLock::new(),
            arrived_tx: arrived_tx.clone(),
        });
        let transport = Transport::start(
            identity.clone(),
            TransportLimits::default(),
            echo.clone(),
            tokio::runtime::Handle::current(),
        )
        .expect("a transport");
        let _ = echo.transport.set(transport.clone());
        let server = PeerServer::new(echo, identity, TransportLimits::default(), Some(transport.clone()));
        tokio::spawn(serve(listener, server, ServeLimits::default(), std::future::pending()));
        nodes.push((transport, Peer { id, url, boot: 0 }));
    }
    let peers: Vec<_> = nodes.iter().map(|(_, peer)| peer.clone()).collect();
    nodes.iter().for_each(|(transport, _)| transport.set_peers(peers.clone()));
    let transport = &nodes[0].0;
    let mut append = Message {
        from: 1,
        to: 2,
        term: 3,
        index: 7,
        log_term: 3,
        ..Message::default()
    };
    append.set_msg_type(MessageType::MsgAppend);
    append.mut_entries().push(Entry {
        index: 8,
        term: 3,
        data: vec![1; bytes].into(),
        ..Entry::default()
    });
    for _ in 0..window {
        transport.send(vec![append.clone()]);
    }
    let (begin, cpu, posts) = (Instant::now(), processor_time(), posts_of(&nodes));
    let mut round_trips = 0;
    while begin.elapsed() < FOR {
        let answered = arrived_rx.recv().await.expect("open");
        round_trips += answered;
        transport.send(vec![append.clone(); answered]);
    }
    let (wall, cpu, posts) = (begin.elapsed(), processor_time() - cpu, posts_of(&nodes) - posts);
    println!(
        "{window:4} under way, {bytes:5} bytes: {:8.0} round trips/s, {:6.1} us each at one, {:5.1} us cpu/POST, {:4.1} us cpu/message, {:.1} messages/POST",
        round_trips as f64 / wall.as_secs_f64(),
        wall.as_secs_f64() * 1e6 / round_trips as f64,
        cpu.as_secs_f64() * 1e6 / posts as f64,
        cpu.as_secs_f64() * 1e6 / (2 * round_trips) as f64,
        (2 * round_trips) as f64 / posts as f64,
    );
}

fn posts_of(nodes: &[(Transport, Peer)]) -> u64 {
    nodes
        .iter()
        .flat_map(|(transport, _)| transport.metrics())
        .map(|metrics| metrics.control.posts + metrics.append.posts)
        .sum()
}

#[test]
#[ignore = "figures"]
fn append_and_its_answer() {
    for (window, bytes) in [(1, 100), (1, 4096), (16, 300), (256, 300), (64, 4096)] {
        runtime().block_on(async { exchange(window, bytes).await });
    }
}

async fn hello() -> Response<Body> {
    let mut response = Response::new(Body::from("hello"));
    response.headers_mut().insert("metcd-revision", HeaderValue::from_static("7"));
    response
}

/// Requests per second, and processor time of the server (not of `wrk`) per request in microseconds.
async fn load(address: SocketAddr, connections: u32) -> (f64, f64) {
    let cpu = processor_time();
    let arguments = ["-t1", &format!("-c{connections}"), "-d2s", &format!("http://{address}/")].map(str::to_owned);
    let wrk = tokio::task::spawn_blocking(move || Command::new("wrk").args(arguments).output());
    let output = wrk.await.expect("no panic").expect("wrk runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let requests = text
        .lines()
        .find_map(|line| line.split_once(" requests in "))
        .and_then(|(n, _)| n.trim().parse().ok());
    let requests: f64 = requests.expect("wrk says how many");
    (requests / 2.0, (processor_time() - cpu).as_secs_f64() * 1e6 / requests)
}

async fn serve_ours(listener: TcpListener) {
    serve(
        listener,
        Router::new().route("/", get(hello)),
        ServeLimits::default(),
        std::future::pending(),
    )
    .await;
}

async fn serve_plainly(listener: TcpListener, header_timeout: Option<Duration>) {
    let service = hyper_util::service::TowerToHyperService::new(Router::new().route("/", get(hello)));
    while let Ok((stream, _)) = listener.accept().await {
        let _ = stream.set_nodelay(true);
        let mut builder = hyper::server::conn::http1::Builder::new();
        builder.timer(hyper_util::rt::TokioTimer::new()).header_read_timeout(header_timeout);
        tokio::spawn(builder.serve_connection(TokioIo::new(stream), service.clone()));
    }
}

/// Our server, hyper alone, and hyper with its own header timer; in turns, because the machine has moods.
#[test]
#[ignore = "figures"]
fn requests_per_second() {
    const ROUNDS: usize = 5;
    for connections in [1, 64] {
        let mut figures: [Vec<(f64, f64)>; 3] = Default::default();
        for _ in 0..ROUNDS {
            for (variant, figures) in figures.iter_mut().enumerate() {
                figures.push(runtime().block_on(async {
                    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
                    let address = listener.local_addr().expect("address");
                    match variant {
                        0 => drop(tokio::spawn(serve_ours(listener))),
                        1 => drop(tokio::spawn(serve_plainly(listener, None))),
                        _ => drop(tokio::spawn(serve_plainly(listener, Some(Duration::from_secs(10))))),
                    }
                    load(address, connections).await
                }));
            }
        }
        for (name, mut figures) in ["serve", "hyper http1", "hyper http1, header timer"].into_iter().zip(figures) {
            figures.sort_by(|a, b| a.1.total_cmp(&b.1));
            let (rate, cpu) = figures[ROUNDS / 2];
            let (best, _) = figures[0];
            println!("{connections:3} connections, {name:26}: median {rate:8.0} requests/s, {cpu:5.2} us cpu each (best {best:8.0}/s)");
        }
    }
}
