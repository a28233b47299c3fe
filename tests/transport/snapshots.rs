//! Snapshots on their way: whole or not at all, in pieces, and reported once (rule 28).

use std::{
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
    time::Duration,
};

use metcd::transport::{SnapshotSource, TransportLimits};
use tokio::{io::AsyncWriteExt as _, net::TcpListener};

use crate::{encoded, harness::*, stopped_peer};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_arrives_whole_and_is_reported_once() {
    let node = Node::start(2).await;
    let (transport, events) = transport(1, TransportLimits::default(), vec![node.peer()]);
    transport.send_snapshot(
        snapshot_message(1, 2, 77),
        Box::new(Chunks {
            left: 40,
            size: 100_000,
            then: Ending::Whole,
        }),
    );
    eventually("reported", || !events.snapshots.lock().is_empty()).await;
    assert_eq!(*events.snapshots.lock(), [(2, true)]);
    let received = node.recorder.snapshots.lock();
    let [(1, 77, bytes)] = &received[..] else {
        panic!("one snapshot of index 77 from 1")
    };
    assert_eq!(bytes.len(), 40 * 100_000 + 3);
    drop(received);
    assert_eq!(node.recorder.files(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_28_a_snapshot_that_fails_is_reported_once_and_leaves_nothing_behind() {
    let node = Node::start(2).await;
    let (transport, events) = transport(1, TransportLimits::default(), vec![node.peer()]);
    for (round, then) in [Ending::Corrupt, Ending::Failure].into_iter().enumerate() {
        transport.send_snapshot(
            snapshot_message(1, 2, 5),
            Box::new(Chunks {
                left: 20,
                size: 50_000,
                then,
            }),
        );
        eventually("reported", || events.snapshots.lock().len() == round + 1).await;
        eventually("cleaned up", || node.recorder.files() == 0).await;
    }
    // Nobody there at all.
    transport.send_snapshot(
        snapshot_message(1, 9, 5),
        Box::new(Chunks {
            left: 1,
            size: 1,
            then: Ending::Whole,
        }),
    );
    assert_eq!(*events.snapshots.lock(), [(2, false), (2, false), (9, false)]);
    assert!(node.recorder.snapshots.lock().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_28_a_snapshot_that_cannot_be_stored_is_reported() {
    let node = Node::start(2).await;
    std::fs::remove_dir(node.recorder.directory.path()).expect("empty");
    let (transport, events) = transport(1, TransportLimits::default(), vec![node.peer()]);
    transport.send_snapshot(
        snapshot_message(1, 2, 5),
        Box::new(Chunks {
            left: 20,
            size: 50_000,
            then: Ending::Whole,
        }),
    );
    eventually("reported", || *events.snapshots.lock() == [(2, false)]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_28_a_snapshot_to_a_stopped_peer_is_given_up() {
    let (_listener, peer) = stopped_peer().await;
    let limits = TransportLimits {
        snapshot_idle_timeout: Duration::from_millis(200),
        ..TransportLimits::default()
    };
    let (transport, events) = transport(1, limits, vec![peer]);
    transport.send_snapshot(
        snapshot_message(1, 2, 5),
        Box::new(Chunks {
            left: 10_000,
            size: 100_000,
            then: Ending::Whole,
        }),
    );
    // A second one at the same time fails at once.
    transport.send_snapshot(
        snapshot_message(1, 2, 6),
        Box::new(Chunks {
            left: 1,
            size: 1,
            then: Ending::Whole,
        }),
    );
    assert_eq!(*events.snapshots.lock(), [(2, false)]);
    eventually("given up", || *events.snapshots.lock() == [(2, false), (2, false)]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_28_a_sender_that_ends_within_a_snapshot_leaves_nothing_behind() {
    let node = Node::start(2).await;
    let head = encoded(&snapshot_message(1, 2, 5));
    let mut stream = tokio::net::TcpStream::connect(node.address).await.expect("connect");
    let request = format!(
        "POST /raft/snapshot HTTP/1.1\r\nhost: a\r\nmetcd-peer: cluster={CLUSTER:016x};from=1;incarnation=0000000000000065;to=2\r\n\
         content-length: 1000000\r\n\r\n"
    );
    stream
        .write_all(&[request.as_bytes(), &head, b"half of it"].concat())
        .await
        .expect("sent");
    eventually("a file", || node.recorder.files() == 1).await;
    let client = reqwest::Client::builder().no_proxy().build().expect("a client");
    let second = client
        .post(format!("{}/raft/snapshot", node.url()))
        .header(
            "metcd-peer",
            format!("cluster={CLUSTER:016x};from=1;incarnation=0000000000000065;to=2"),
        )
        .body(head)
        .send();
    assert_eq!(in_time(second).await.expect("an answer").status(), 429, "one at a time");
    drop(stream);
    eventually("cleaned up", || node.recorder.files() == 0).await;
    assert!(node.recorder.snapshots.lock().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_28_a_sender_that_stands_still_within_a_snapshot_holds_the_place_no_longer_than_its_timeout() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let limits = TransportLimits {
        snapshot_idle_timeout: Duration::from_millis(200),
        ..TransportLimits::default()
    };
    let node = Node::start_at(listener, 2, limits);
    let mut stream = tokio::net::TcpStream::connect(node.address).await.expect("connect");
    let request = format!(
        "POST /raft/snapshot HTTP/1.1\r\nhost: a\r\nmetcd-peer: cluster={CLUSTER:016x};from=1;incarnation=0000000000000065;to=2\r\n\
         content-length: 1000000\r\n\r\n"
    );
    let head = encoded(&snapshot_message(1, 2, 5));
    stream
        .write_all(&[request.as_bytes(), &head, b"half of it"].concat())
        .await
        .expect("sent");
    eventually("a file", || node.recorder.files() == 1).await;
    eventually("given up", || node.recorder.files() == 0).await;
    let (transport, events) = transport(1, TransportLimits::default(), vec![node.peer()]);
    transport.send_snapshot(
        snapshot_message(1, 2, 6),
        Box::new(Chunks {
            left: 3,
            size: 1000,
            then: Ending::Whole,
        }),
    );
    eventually("the next arrives", || *events.snapshots.lock() == [(2, true)]).await;
    // It was connected all the time.
    drop(stream);
}

/// As [`Chunks`] without an end, and how many were asked for.
struct Counted(std::sync::Arc<AtomicUsize>);

impl SnapshotSource for Counted {
    fn next_chunk(&mut self) -> std::io::Result<Option<bytes::Bytes>> {
        self.0.fetch_add(1, SeqCst);
        Ok(Some(vec![0; 256 << 10].into()))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rule_28_a_receiver_that_takes_nothing_makes_its_sender_read_no_further() {
    let (_listener, peer) = stopped_peer().await;
    let limits = TransportLimits {
        snapshot_idle_timeout: Duration::from_millis(500),
        ..TransportLimits::default()
    };
    let (transport, events) = transport(1, limits, vec![peer]);
    let read = std::sync::Arc::new(AtomicUsize::new(0));
    transport.send_snapshot(snapshot_message(1, 2, 5), Box::new(Counted(read.clone())));
    eventually("given up", || *events.snapshots.lock() == [(2, false)]).await;
    // What is read ahead, what the client's buffer holds, and what two sockets take (several MB at most).
    let read = read.load(SeqCst);
    assert!((1..100).contains(&read), "{read} chunks of 256 KiB");
}
