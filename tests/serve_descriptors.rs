//! Out of descriptors: the listener waits, and goes on when some are free again. A process of its own, because the limit is the process's.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{Router, routing::get};
use metcd::serve::{Plain, ServeLimits, ServeStats, serve_with};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::timeout,
};

fn open_descriptors() -> u64 {
    std::fs::read_dir("/proc/self/fd").expect("procfs").count() as u64
}

/// Sets the soft limit of this process.
fn limit_descriptors(soft: u64) {
    let maximum = getrlimit(Resource::Nofile).maximum;
    let limit = Rlimit {
        current: Some(soft),
        maximum,
    };
    setrlimit(Resource::Nofile, limit).expect("a limit may be lowered");
}

#[tokio::test]
async fn a_listener_out_of_descriptors_waits_and_goes_on() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    let mut clients = Vec::new();
    for _ in 0..30 {
        clients.push(TcpStream::connect(address).await.expect("the backlog takes it"));
    }
    limit_descriptors(open_descriptors() + 10);
    let stats = Arc::new(ServeStats::default());
    let router = Router::new().route("/", get(|| async { "hello" }));
    tokio::spawn(serve_with(
        listener,
        Plain,
        router,
        ServeLimits::default(),
        stats.clone(),
        std::future::pending(),
    ));
    let begin = Instant::now();
    while stats.view().accept_errors < 3 {
        assert!(begin.elapsed() < Duration::from_secs(20), "it never ran out of descriptors");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(
        begin.elapsed() >= Duration::from_millis(200),
        "it does not wait between its attempts"
    );
    // The first in the backlog were accepted: with them goes the shortage.
    clients.drain(..20);
    let client = clients.last_mut().expect("some are left");
    client
        .write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        .await
        .expect("sent");
    let mut answer = String::new();
    timeout(Duration::from_secs(20), client.read_to_string(&mut answer))
        .await
        .expect("in time")
        .expect("an answer");
    assert!(answer.ends_with("hello"), "{answer}");
}
