//! The transport between real listeners on loopback.

mod harness;
mod snapshots;

use std::{
    sync::atomic::Ordering::SeqCst,
    time::{Duration, Instant},
};

use harness::*;
use metcd::{
    leader::{LeaderError, LeaderReply, LeaderRequest},
    transport::{FetchError, Identity, MEMBER_REMOVED, Peer, Refusal, Transport, TransportLimits},
};
use raft::eraftpb::{Message, MessageType};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn appends_arrive_in_order_whatever_their_size() {
    let node = Node::start(2).await;
    let (transport, events) = transport(1, TransportLimits::default(), vec![node.peer()]);
    for index in 0..400 {
        transport.send(vec![append(1, 2, index, if index % 7 == 0 { 100_000 } else { 10 })]);
        if index % 3 == 0 {
            tokio::task::yield_now().await;
        }
    }
    eventually("400 appends", || node.recorder.stepped.lock().len() == 400).await;
    assert_eq!(node.recorder.indexes(), (0..400).collect::<Vec<_>>());
    assert_eq!(events.unreachable_count(2), 0);
    let lane = transport.metrics()[0].append;
    assert_eq!((lane.messages, lane.dropped, lane.failures), (400, 0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_arrives_is_in_order_also_when_some_is_lost() {
    let node = Node::start(2).await;
    let (transport, events) = transport(1, TransportLimits::default(), vec![node.peer()]);
    for index in 0..3000 {
        node.recorder.full.store(index % 50 < 5, SeqCst);
        transport.send(vec![append(1, 2, index, if index % 7 == 0 { 50_000 } else { 10 })]);
        if index % 10 == 0 {
            tokio::time::sleep(Duration::from_micros(500)).await;
        }
    }
    node.recorder.full.store(false, SeqCst);
    let last = || node.recorder.stepped.lock().last().map(|message| message.index);
    eventually("the queue is empty", || transport.metrics()[0].append.queued == 0).await;
    transport.send(vec![append(1, 2, 9000, 10)]);
    eventually("the last one", || last() == Some(9000)).await;
    let indexes = node.recorder.indexes();
    assert!(indexes.is_sorted(), "{indexes:?}");
    assert!(events.unreachable_count(2) > 0 && indexes.len() > 1000, "{} of 3000", indexes.len());
}

#[tokio::test]
async fn control_messages_arrive_unchanged() {
    let node = Node::start(2).await;
    let (transport, _) = transport(1, TransportLimits::default(), vec![node.peer()]);
    let mut heartbeat = message(MessageType::MsgHeartbeat, 1, 2, 0);
    heartbeat.context = vec![7; 24].into();
    heartbeat.commit = 5;
    let sent = vec![heartbeat, message(MessageType::MsgAppendResponse, 1, 2, 9)];
    transport.send(sent.clone());
    eventually("both", || node.recorder.stepped.lock().len() == 2).await;
    assert_eq!(*node.recorder.stepped.lock(), sent);
}

#[tokio::test]
async fn a_dead_peer_is_reported_and_served_again_soon_after_it_is_back() {
    let node = Node::start(2).await;
    let (transport, events) = transport(1, TransportLimits::default(), vec![node.peer()]);
    transport.send(vec![append(1, 2, 1, 10)]);
    eventually("the first", || node.recorder.stepped.lock().len() == 1).await;
    let address = node.stop().await;
    let begin = Instant::now();
    while events.unreachable_count(2) == 0 {
        assert!(begin.elapsed() < PATIENCE);
        transport.send(vec![append(1, 2, 2, 10)]);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Dropped while it is down, without a queue that grows.
    for index in 0..1000 {
        transport.send(vec![append(1, 2, index, 10)]);
    }
    assert!(transport.metrics()[0].append.queued < 1000);
    let listener = TcpListener::bind(address).await.expect("the port is free again");
    let node = Node::start_at(listener, 2, TransportLimits::default());
    let back = Instant::now();
    while node.recorder.stepped.lock().is_empty() {
        assert!(back.elapsed() < Duration::from_secs(5), "still not reached");
        transport.send(vec![append(1, 2, 5, 10)]);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(!transport.metrics()[0].append.down);
}

#[tokio::test]
async fn a_full_receiver_makes_its_sender_report_it_unreachable() {
    let node = Node::start(2).await;
    let (transport, events) = transport(1, TransportLimits::default(), vec![node.peer()]);
    node.recorder.full.store(true, SeqCst);
    transport.send(vec![append(1, 2, 1, 10)]);
    eventually("unreachable", || events.unreachable_count(2) == 1).await;
    node.recorder.full.store(false, SeqCst);
    transport.send(vec![append(1, 2, 2, 10)]);
    eventually("the next", || node.recorder.indexes() == [2]).await;
}

/// Accepts connections and reads nothing: a stopped process.
async fn stopped_peer() -> (TcpListener, Peer) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let url = format!("http://{}", listener.local_addr().expect("address"));
    (listener, Peer { id: 2, url, boot: 0 })
}

#[tokio::test]
async fn a_full_lane_drops_and_reports() {
    let (_listener, peer) = stopped_peer().await;
    let limits = TransportLimits {
        queue_messages: 10,
        ..TransportLimits::default()
    };
    let (transport, events) = transport(1, limits, vec![peer]);
    for index in 0..100 {
        transport.send(vec![append(1, 2, index, 10)]);
        tokio::task::yield_now().await;
    }
    assert!(transport.metrics()[0].append.queued <= 10);
    assert!(events.unreachable_count(2) >= 1);
}

#[tokio::test]
async fn a_stopped_peer_holds_a_lane_no_longer_than_its_timeout() {
    let (_listener, peer) = stopped_peer().await;
    let limits = TransportLimits {
        append_timeout: Duration::from_millis(200),
        control_timeout: Duration::from_millis(200),
        ..TransportLimits::default()
    };
    let (transport, events) = transport(1, limits, vec![peer]);
    transport.send(vec![append(1, 2, 1, 10), message(MessageType::MsgHeartbeat, 1, 2, 0)]);
    eventually("both lanes gave up", || events.unreachable_count(2) == 2).await;
}

#[tokio::test]
async fn a_message_to_nobody_is_reported() {
    let (transport, events) = transport(1, TransportLimits::default(), vec![]);
    transport.send(vec![append(1, 9, 1, 10)]);
    assert_eq!(events.unreachable_count(9), 1);
}

#[tokio::test]
async fn rule_27_wrong_cluster_wrong_receiver_and_unknown_senders_are_refused() {
    let node = Node::start(2).await;
    let refused_as = async |identity: Identity, peer: Peer| {
        let events = std::sync::Arc::new(Events::default());
        let from = identity.member;
        let transport = Transport::start(
            identity,
            TransportLimits::default(),
            events.clone(),
            tokio::runtime::Handle::current(),
        )
        .expect("a transport");
        let to = peer.id;
        transport.set_peers(vec![peer]);
        transport.send(vec![append(from, to, 1, 10)]);
        eventually("refused", || !events.refused.lock().is_empty()).await;
        events.refused.lock()[0].1.clone()
    };
    assert_eq!(
        refused_as(
            Identity {
                cluster_id: 1,
                ..identity(1)
            },
            node.peer()
        )
        .await,
        "cluster_mismatch"
    );
    assert_eq!(refused_as(identity(1), Peer { id: 3, ..node.peer() }).await, "wrong_receiver");
    *node.recorder.refusal.lock() = Some(Refusal {
        code: "member_reincarnated",
        detail: "another directory".into(),
    });
    assert_eq!(refused_as(identity(1), node.peer()).await, "member_reincarnated");
    assert!(node.recorder.stepped.lock().is_empty());
}

#[tokio::test]
async fn a_removed_member_is_told_so() {
    let node = Node::start(2).await;
    *node.recorder.refusal.lock() = Some(Refusal {
        code: MEMBER_REMOVED,
        detail: "member 1 was removed".into(),
    });
    let (transport, events) = transport(1, TransportLimits::default(), vec![node.peer()]);
    transport.send(vec![message(MessageType::MsgRequestVote, 1, 2, 1)]);
    eventually("told", || !events.removed.lock().is_empty()).await;
    assert_eq!(events.removed.lock()[0], "member 1 was removed");
}

async fn post_raw(node: &Node, path: &str, body: Vec<u8>) -> u16 {
    let header = format!("cluster={CLUSTER:016x};from=1;incarnation={:016x};to=2", 101);
    let client = reqwest::Client::builder().no_proxy().build().expect("a client");
    let sent = client
        .post(format!("{}{path}", node.url()))
        .header("metcd-peer", header)
        .body(body)
        .send();
    in_time(sent).await.expect("an answer").status().as_u16()
}

fn encoded(message: &Message) -> Vec<u8> {
    use protobuf::Message as _;
    message.write_length_delimited_to_bytes().expect("encodes")
}

#[tokio::test]
async fn rule_27_malformed_forged_and_oversized_bodies_are_refused() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let node = Node::start_at(
        listener,
        2,
        TransportLimits {
            max_body_bytes: 10_000,
            ..TransportLimits::default()
        },
    );
    assert_eq!(post_raw(&node, "/raft", b"\xff\xff\xff".to_vec()).await, 400);
    assert_eq!(
        post_raw(&node, "/raft", encoded(&append(3, 2, 1, 10))).await,
        400,
        "from somebody else"
    );
    assert_eq!(
        post_raw(&node, "/raft", encoded(&message(MessageType::MsgHup, 1, 2, 1))).await,
        400,
        "local"
    );
    assert_eq!(
        post_raw(&node, "/raft", encoded(&snapshot_message(1, 2, 5))).await,
        400,
        "a snapshot"
    );
    assert_eq!(post_raw(&node, "/raft", vec![0; 20_000]).await, 413);
    assert_eq!(post_raw(&node, "/other", vec![]).await, 404);
    assert_eq!(post_raw(&node, "/raft/members", vec![]).await, 405);
    let put = reqwest::Client::new()
        .put(format!("{}/raft", node.url()))
        .send()
        .await
        .expect("an answer");
    assert_eq!(
        (put.status().as_u16(), &put.headers()["allow"]),
        (405, &"POST".parse().expect("a header"))
    );
    let misaddressed = format!("cluster={CLUSTER:016x};from=1;incarnation=0000000000000065;to=3");
    let table = reqwest::Client::new().get(format!("{}/raft/members", node.url()));
    let answer = table.header("metcd-peer", misaddressed).send().await.expect("an answer");
    assert_eq!(answer.status(), 412, "whom it asks for is somebody else");
    assert!(node.recorder.stepped.lock().is_empty());
    assert_eq!(post_raw(&node, "/raft", encoded(&append(1, 2, 1, 10))).await, 200);
    assert_eq!(node.recorder.indexes(), [1]);
}

/// Rule 17: raft takes the second copy of a read's request for another read, so that nothing below it may send twice.
#[tokio::test]
async fn rule_17_what_was_sent_is_not_sent_again_by_the_transport() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let url = format!("http://{}", listener.local_addr().expect("address"));
    let (transport, events) = transport(1, TransportLimits::default(), vec![Peer { id: 2, url, boot: 0 }]);
    let received = std::sync::Arc::new(parking_lot::Mutex::new(Vec::new()));
    let kept = received.clone();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.expect("accepted");
            let mut request = Vec::new();
            // The whole request, and then the connection ends without an answer.
            while !is_whole(&request) && stream.read_buf(&mut request).await.is_ok_and(|n| n > 0) {}
            kept.lock().push(request);
        }
    });
    let holding = |context: &[u8]| {
        let received = received.lock();
        received
            .iter()
            .filter(|request| request.windows(context.len()).any(|part| part == context))
            .count()
    };
    let read = |context: &'static [u8]| Message {
        context: context.into(),
        ..message(MessageType::MsgReadIndex, 1, 2, 0)
    };
    transport.send(vec![read(b"the first read")]);
    eventually("its failure to be known", || events.unreachable_count(2) > 0).await;
    // On the same lane behind it: whatever was to be sent again was sent by then.
    eventually("the next to come", || {
        transport.send(vec![read(b"a later read")]);
        holding(b"a later read") > 0
    })
    .await;
    assert_eq!(holding(b"the first read"), 1);
}

/// Whether these bytes are an HTTP/1 request with all of its body.
fn is_whole(request: &[u8]) -> bool {
    let Some(end) = request.windows(4).position(|end| end == b"\r\n\r\n") else {
        return false;
    };
    let head = String::from_utf8_lossy(&request[..end]).to_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
    request.len() >= end + 4 + length.unwrap_or(0usize)
}

#[tokio::test]
async fn a_client_at_the_wrong_port_hears_where_to_go_and_that_nothing_was_done() {
    let node = Node::start(2).await;
    let client = reqwest::Client::builder().no_proxy().build().expect("a client");
    let answer = in_time(client.put(format!("{}/hello", node.url())).body("world").send())
        .await
        .expect("an answer");
    assert_eq!(answer.status(), 404);
    let problem: serde_json::Value = serde_json::from_slice(&answer.bytes().await.expect("a body")).expect("JSON");
    assert_eq!(
        (&problem["code"], &problem["outcome"]),
        (&"unknown_route".into(), &"not_applied".into()),
        "{problem}"
    );
    assert!(problem["detail"].as_str().expect("a text").contains("listen.client"), "{problem}");
}

#[tokio::test]
async fn a_peer_that_points_elsewhere_is_not_followed() {
    let elsewhere = Node::start(2).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let url = format!("http://{}", listener.local_addr().expect("address"));
    let target = elsewhere.url();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.expect("accepted");
            let answer =
                format!("HTTP/1.1 307 Temporary Redirect\r\nlocation: {target}/raft\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            // Read first, or the answer may be lost with the rest of the request.
            let _ = stream.read(&mut [0; 65536]).await;
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    let (transport, events) = transport(1, TransportLimits::default(), vec![Peer { id: 2, url, boot: 0 }]);
    transport.send(vec![append(1, 2, 1, 10)]);
    eventually("its failure to be known", || events.unreachable_count(2) > 0).await;
    assert!(elsewhere.recorder.stepped.lock().is_empty());
}

#[tokio::test]
async fn relayed_requests_are_answered_and_bounded() {
    let node = Node::start(2).await;
    let (transport, _) = transport(1, TransportLimits::default(), vec![node.peer()]);
    let second = Duration::from_secs(1);
    let alive = transport.call(2, &LeaderRequest::KeepAlive { lease: 30 }, second).await;
    assert_eq!(
        alive,
        Ok(LeaderReply::Lease {
            ttl_ms: 30,
            remaining_ms: 1000
        })
    );
    let promoted = transport.call(2, &LeaderRequest::Promote { id: 8 }, second).await;
    assert_eq!(promoted, Err(LeaderError::MemberNotFound { id: 8 }));
    assert_eq!(
        transport.call(9, &LeaderRequest::Progress, second).await,
        Err(LeaderError::NoLeader)
    );
    let late = transport.call(2, &LeaderRequest::Progress, Duration::from_millis(100)).await;
    assert_eq!(late, Err(LeaderError::Timeout), "it was begun");
    *node.recorder.refusal.lock() = Some(Refusal {
        code: "unknown_member",
        detail: String::new(),
    });
    assert_eq!(
        transport.call(2, &LeaderRequest::Progress, second).await,
        Err(LeaderError::NoLeader),
        "it was never begun"
    );
    let address = node.stop().await;
    transport.set_peers(vec![Peer {
        id: 2,
        url: format!("http://{address}"),
        boot: 0,
    }]);
    assert_eq!(
        transport.call(2, &LeaderRequest::Progress, second).await,
        Err(LeaderError::NoLeader),
        "nobody there"
    );
}

#[tokio::test]
async fn the_member_list_is_open_to_whoever_knows_the_cluster() {
    let node = Node::start(2).await;
    *node.recorder.refusal.lock() = Some(Refusal {
        code: "member_reincarnated",
        detail: String::new(),
    });
    let (transport, _) = transport(1, TransportLimits::default(), vec![]);
    let members = transport.fetch_members(&node.url(), PATIENCE).await;
    assert_eq!(members, Ok(serde_json::json!({ "answered_by": 2 })));
    for path in ["raft/members", "raft/nowhere"] {
        let answer = reqwest::get(format!("{}/{path}", node.url())).await.expect("an answer");
        assert_eq!(answer.headers()["metcd-member"], "2", "{path}");
        assert_eq!(answer.headers()["x-content-type-options"], "nosniff", "{path}");
    }
    let stranger = Identity {
        cluster_id: 9,
        ..identity(1)
    };
    let stranger = Transport::start(
        stranger,
        TransportLimits::default(),
        std::sync::Arc::new(Events::default()),
        tokio::runtime::Handle::current(),
    )
    .expect("a transport");
    let refused = stranger.fetch_members(&node.url(), PATIENCE).await;
    assert!(
        matches!(refused, Err(FetchError::Refused { status: 412, ref code, .. }) if code == "cluster_mismatch"),
        "{refused:?}"
    );
    assert!(matches!(
        transport.fetch_members("nonsense", PATIENCE).await,
        Err(FetchError::BadUrl(_))
    ));
}

#[tokio::test]
async fn peers_that_change_their_address_get_new_lanes() {
    let (first, second) = (Node::start(2).await, Node::start(2).await);
    let (transport, _) = transport(1, TransportLimits::default(), vec![first.peer()]);
    transport.send(vec![append(1, 2, 1, 10)]);
    eventually("the first", || first.recorder.indexes() == [1]).await;
    transport.set_peers(vec![second.peer()]);
    transport.send(vec![append(1, 2, 2, 10)]);
    eventually("the second", || second.recorder.indexes() == [2]).await;
    assert_eq!(first.recorder.indexes(), [1]);
}

#[tokio::test]
async fn what_answers_a_request_rides_in_its_answer() {
    let limits = TransportLimits::default;
    let (back, _) = transport(2, limits(), vec![]);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let node = Node::answering(listener, 2, limits(), Some(back.clone()));
    let (there, events) = transport(1, limits(), vec![node.peer()]);
    // Where nobody listens: only a ride can arrive.
    back.set_peers(vec![Peer {
        id: 1,
        url: "http://127.0.0.1:9".into(),
        boot: 0,
    }]);
    there.send(vec![append(1, 2, 4, 10)]);
    eventually("the append", || node.recorder.indexes() == [4]).await;
    let acknowledgement = message(MessageType::MsgAppendResponse, 2, 1, 5);
    back.send(vec![acknowledgement.clone()]);
    eventually("its answer", || *events.answered.lock() == [acknowledgement.clone()]).await;
    let lane = back.metrics()[0].control;
    assert_eq!((lane.rides, lane.posts), (1, 0));
}

#[tokio::test]
async fn whoever_is_sent_to_and_cannot_send_back_says_so_until_it_can() {
    let limits = TransportLimits::default;
    let (back, _) = transport(2, limits(), vec![]);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let node = Node::answering(listener, 2, limits(), Some(back.clone()));
    let (there, events) = transport(1, limits(), vec![node.peer()]);
    let way_back = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = way_back.local_addr().expect("address");
    drop(way_back);
    back.set_peers(vec![Peer {
        id: 1,
        url: format!("http://{address}"),
        boot: 0,
    }]);
    let beat = || vec![message(MessageType::MsgHeartbeat, 1, 2, 0)];
    there.send(beat());
    eventually("the first", || node.recorder.stepped.lock().len() == 1).await;
    assert!(events.unreached.lock().is_empty(), "it has not tried yet");

    back.send(vec![message(MessageType::MsgPropose, 2, 1, 0)]);
    eventually("it to have failed", || back.metrics()[0].append.down).await;
    // Nothing more is sent that way, and the age grows all the same.
    eventually("a growing age", || {
        there.send(beat());
        let unreached = events.unreached.lock();
        unreached.iter().all(|(peer, _)| *peer == 2) && unreached.iter().any(|(_, age)| *age > Some(Duration::from_millis(700)))
    })
    .await;

    // The way is open again, and whoever found it closed notices by itself.
    let listener = TcpListener::bind(address).await.expect("bind");
    let _there = Node::answering(listener, 1, limits(), None);
    eventually("it to be up", || !back.metrics()[0].append.down).await;
    eventually("it to be told that all is well", || {
        there.send(beat());
        events.unreached.lock().last() == Some(&(2, None))
    })
    .await;
}

#[tokio::test]
async fn rule_9_a_member_on_an_older_copy_of_its_directory_hears_of_its_later_start_with_every_request() {
    let node = Node::start(2).await;
    *node.recorder.boot.lock() = 7;
    let known = |boot| Peer { boot, ..node.peer() };
    let (transport, events) = transport(1, TransportLimits::default(), vec![known(7)]);
    let beat = |term| Message {
        term,
        ..message(MessageType::MsgHeartbeat, 1, 2, 0)
    };
    transport.send(vec![beat(1)]);
    eventually("it is taken", || node.recorder.stepped.lock().len() == 1).await;
    // The lanes stay; what they know is replaced.
    transport.set_peers(vec![known(8)]);
    transport.send(vec![beat(2)]);
    eventually("refused", || *events.refused.lock() == [(2, "member_outdated".to_owned())]).await;
    let called = transport.call(2, &LeaderRequest::Progress, Duration::from_secs(1)).await;
    assert_eq!(called, Err(LeaderError::NoLeader));
    assert_eq!(node.recorder.stepped.lock().len(), 1, "nothing of it is stepped");
    assert_eq!(node.recorder.calls.load(SeqCst), 0);
}

#[tokio::test]
async fn rule_27_messages_in_an_answer_need_the_right_sender_receiver_and_cluster() {
    let limits = TransportLimits::default;
    // Who answers calls itself 3, and is asked as 2.
    let (back, _) = transport(3, limits(), vec![]);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let node = Node::answering(listener, 2, limits(), Some(back.clone()));
    let (there, events) = transport(1, limits(), vec![node.peer()]);
    back.set_peers(vec![Peer {
        id: 1,
        url: "http://127.0.0.1:9".into(),
        boot: 0,
    }]);
    there.send(vec![append(1, 2, 4, 10)]);
    eventually("the append", || node.recorder.indexes() == [4]).await;
    back.send(vec![message(MessageType::MsgAppendResponse, 3, 1, 5)]);
    eventually("the ride", || back.metrics()[0].control.rides == 1).await;
    there.send(vec![append(1, 2, 6, 10)]);
    eventually("the next append", || node.recorder.indexes() == [4, 6]).await;
    back.send(vec![message(MessageType::MsgAppendResponse, 2, 1, 7)]);
    eventually("a right one", || events.answered.lock().len() == 1).await;
    assert_eq!(events.answered.lock()[0].index, 7);
}
