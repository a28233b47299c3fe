use std::sync::Arc;

use axum::{
    Router,
    body::{Body, Bytes},
    http::StatusCode,
    routing::{get, post},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::{Notify, oneshot},
    task::JoinHandle,
    time::{Instant, timeout},
};

use super::*;

mod http2;

const PATIENCE: Duration = Duration::from_secs(20);

struct Server {
    address: SocketAddr,
    stats: Arc<ServeStats>,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

impl Server {
    async fn start(router: Router, limits: ServeLimits) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("address");
        let (stop, stopped) = oneshot::channel::<()>();
        let stats = Arc::new(ServeStats::default());
        let task = tokio::spawn(serve_with(listener, Plain, router, limits, stats.clone(), async move {
            let _ = stopped.await;
        }));
        Server {
            address,
            stats,
            stop: Some(stop),
            task,
        }
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.expect("connect")
    }

    fn order_stop(&mut self) {
        self.stop.take().expect("not stopped yet").send(()).expect("the server runs");
    }

    async fn stopped(self) {
        timeout(PATIENCE, self.task).await.expect("stops in time").expect("no panic");
    }
}

fn router() -> Router {
    Router::new()
        .route("/", get(|| async { "hello" }))
        .route(
            "/echo",
            post(|body: Body| async move {
                match axum::body::to_bytes(body, 1 << 20).await {
                    Ok(bytes) => Ok(bytes),
                    Err(err) if is_body_timeout(&err) => Err(StatusCode::REQUEST_TIMEOUT),
                    Err(_) => Err(StatusCode::BAD_REQUEST),
                }
            }),
        )
        .route("/large", get(|| async { Bytes::from(vec![b'x'; 64 << 20]) }))
}

fn short(limit: Duration) -> ServeLimits {
    ServeLimits {
        header_timeout: limit,
        member: Arc::new(3.into()),
        ..ServeLimits::default()
    }
}

const SHORT: Duration = Duration::from_millis(300);

/// Everything until the server closes; a reset counts as closed.
async fn read_to_end(stream: &mut TcpStream) -> Vec<u8> {
    let mut all = Vec::new();
    let _ = timeout(PATIENCE, stream.read_to_end(&mut all))
        .await
        .expect("the server closes the connection");
    all
}

/// One answer with a `content-length`.
async fn read_answer(stream: &mut TcpStream) -> String {
    let mut text = Vec::new();
    loop {
        let mut buffer = [0; 4096];
        let n = timeout(PATIENCE, stream.read(&mut buffer))
            .await
            .expect("an answer in time")
            .expect("readable");
        assert!(n > 0, "closed within an answer: {}", String::from_utf8_lossy(&text));
        text.extend_from_slice(&buffer[..n]);
        let so_far = String::from_utf8_lossy(&text).into_owned();
        if let Some((head, body)) = so_far.split_once("\r\n\r\n") {
            let length = head
                .lines()
                .find_map(|line| line.strip_prefix("content-length: "))
                .map_or(0, |n| n.parse().expect("a number"));
            if body.len() >= length {
                return so_far;
            }
        }
    }
}

fn assert_problem(answer: &[u8], status: u16, code: &str) {
    let text = String::from_utf8_lossy(answer);
    assert!(text.starts_with(&format!("HTTP/1.1 {status} ")), "{text}");
    assert!(
        text.contains("application/problem+json") && text.contains(&format!(r#""code":"{code}""#)),
        "{text}"
    );
    assert!(text.contains("metcd-member: 3"), "{text}");
}

#[tokio::test]
async fn a_connection_without_a_complete_first_head_is_ended() {
    let server = Server::start(router(), short(SHORT)).await;
    for sent in [&b""[..], b"GET / HT", b"GET / HTTP/1.1\r\nhost: a\r\n"] {
        let begin = Instant::now();
        let mut stream = server.connect().await;
        stream.write_all(sent).await.expect("sent");
        assert_problem(&read_to_end(&mut stream).await, 408, "request_timeout");
        assert!(
            begin.elapsed() >= SHORT - Duration::from_millis(60),
            "too early: {:?}",
            begin.elapsed()
        );
    }
    assert_eq!(server.stats.view().head_timeouts, 3);
}

#[tokio::test]
async fn half_an_http2_preface_or_header_block_is_ended() {
    let server = Server::start(router(), short(SHORT)).await;
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".as_slice();
    let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0].as_slice();
    // HEADERS without END_HEADERS: a CONTINUATION is owed.
    let half_headers = [0, 0, 1, 1, 0, 0, 0, 0, 1, 0x82].as_slice();
    for sent in [
        preface[..12].to_vec(),
        preface.to_vec(),
        [preface, settings].concat(),
        [preface, settings, half_headers].concat(),
    ] {
        let mut stream = server.connect().await;
        stream.write_all(&sent).await.expect("sent");
        read_to_end(&mut stream).await;
    }
    assert_eq!(server.stats.view().head_timeouts, 4);
}

/// Preface, SETTINGS and `GET /` on stream 1.
fn http2_get_root() -> Vec<u8> {
    let get_root = [0x82, 0x84, 0x86, 0x41, 1, b'a'];
    let mut sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    sent.extend([0, 0, 0, 4, 0, 0, 0, 0, 0]);
    sent.extend([0, 0, get_root.len() as u8, 1, 5, 0, 0, 0, 1]);
    sent.extend(get_root);
    sent
}

const HEADERS: u8 = 1;
const GOAWAY: u8 = 7;

/// The payload of the next HTTP/2 frame of that type.
async fn next_frame(stream: &mut TcpStream, wanted: u8) -> Vec<u8> {
    loop {
        let mut head = [0; 9];
        timeout(PATIENCE, stream.read_exact(&mut head))
            .await
            .expect("a frame in time")
            .expect("a frame");
        let mut payload = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
        stream.read_exact(&mut payload).await.expect("its payload");
        if head[3] == wanted {
            return payload;
        }
    }
}

#[tokio::test]
async fn http2_with_prior_knowledge_is_served() {
    let server = Server::start(router(), ServeLimits::default()).await;
    let mut stream = server.connect().await;
    stream.write_all(&http2_get_root()).await.expect("sent");
    assert_eq!(next_frame(&mut stream, HEADERS).await.first(), Some(&0x88), ":status 200");
}

#[tokio::test]
async fn shutdown_says_goaway_on_http2_and_answers_what_is_in_flight() {
    let (router, running, go) = gated();
    let mut server = Server::start(router, ServeLimits::default()).await;
    let mut stream = server.connect().await;
    stream.write_all(&http2_get_root()).await.expect("sent");
    running.notified().await;
    server.order_stop();
    next_frame(&mut stream, GOAWAY).await;
    go.notify_one();
    assert_eq!(next_frame(&mut stream, HEADERS).await.first(), Some(&0x88), ":status 200");
    drop(stream);
    server.stopped().await;
}

#[tokio::test]
async fn the_rest_of_a_later_head_is_awaited_no_longer_than_the_first() {
    let server = Server::start(router(), short(SHORT)).await;
    let mut stream = server.connect().await;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("sent");
    assert!(read_answer(&mut stream).await.ends_with("hello"));
    // Idle for longer than the head timeout is fine.
    tokio::time::sleep(SHORT * 2).await;
    stream.write_all(b"GET / HT").await.expect("sent");
    assert_problem(&read_to_end(&mut stream).await, 408, "request_timeout");
}

#[tokio::test]
async fn an_idle_connection_is_closed_without_a_word() {
    let server = Server::start(
        router(),
        ServeLimits {
            idle_timeout: SHORT,
            ..ServeLimits::default()
        },
    )
    .await;
    let mut stream = server.connect().await;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("sent");
    assert!(read_answer(&mut stream).await.ends_with("hello"));
    assert!(read_to_end(&mut stream).await.is_empty());
}

#[tokio::test]
async fn heads_that_hyper_refuses_get_a_problem_document() {
    let server = Server::start(router(), short(PATIENCE)).await;
    let long_header = format!("GET / HTTP/1.1\r\nhost: a\r\nx: {}\r\n\r\n", "y".repeat(300_000));
    let long_target = format!("GET /{} HTTP/1.1\r\nhost: a\r\n\r\n", "k".repeat(70_000));
    let many_headers = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(200));
    for (sent, status, code) in [
        (long_header.as_str(), 431, "headers_too_large"),
        (many_headers.as_str(), 431, "headers_too_large"),
        (long_target.as_str(), 414, "uri_too_long"),
        ("NONSENSE\r\n\r\n", 400, "invalid_request"),
    ] {
        let mut stream = server.connect().await;
        // It answers before it has read everything, so the rest may not be taken.
        let _ = stream.write_all(sent.as_bytes()).await;
        assert_problem(&read_to_end(&mut stream).await, status, code);
    }
}

#[tokio::test]
async fn a_refused_head_after_an_answered_request_gets_a_problem_document_too() {
    let server = Server::start(router(), short(PATIENCE)).await;
    let mut stream = server.connect().await;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("sent");
    assert!(read_answer(&mut stream).await.ends_with("hello"));
    stream.write_all(b"BAD\x01REQUEST\r\n\r\n").await.expect("sent");
    assert_problem(&read_to_end(&mut stream).await, 400, "invalid_request");
}

#[tokio::test]
async fn a_value_that_looks_like_hypers_answer_is_sent_untouched() {
    const LOOKALIKE: &str = "HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\n\r\n";
    let server = Server::start(Router::new().route("/", get(|| async { LOOKALIKE })), short(PATIENCE)).await;
    let mut stream = server.connect().await;
    for _ in 0..3 {
        stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("sent");
        assert!(read_answer(&mut stream).await.ends_with(LOOKALIKE));
    }
}

#[tokio::test]
async fn a_body_that_stands_still_ends_in_the_handler() {
    let server = Server::start(
        router(),
        ServeLimits {
            body_timeout: SHORT,
            ..ServeLimits::default()
        },
    )
    .await;
    let mut stream = server.connect().await;
    stream
        .write_all(b"POST /echo HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\nhalf")
        .await
        .expect("sent");
    assert!(String::from_utf8_lossy(&read_to_end(&mut stream).await).starts_with("HTTP/1.1 408"));
}

#[tokio::test]
async fn a_peer_that_takes_nothing_of_its_answer_is_cut_off() {
    let server = Server::start(
        router(),
        ServeLimits {
            write_timeout: SHORT,
            ..ServeLimits::default()
        },
    )
    .await;
    let mut stream = server.connect().await;
    stream.write_all(b"GET /large HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("sent");
    let begin = Instant::now();
    while server.stats.view().open > 0 || server.stats.view().accepted == 0 {
        assert!(begin.elapsed() < PATIENCE, "still open");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(server.stats.view().write_timeouts, 1);
}

#[tokio::test]
async fn an_answer_may_have_more_patience_with_its_reader_than_others() {
    let patient = |patience| {
        move || async move {
            let pieces = (0..64).map(|_| Ok::<_, std::convert::Infallible>(Bytes::from(vec![b'x'; 256 << 10])));
            let mut response = axum::response::Response::new(Body::from_stream(futures_util::stream::iter(pieces)));
            response.extensions_mut().insert(Patience(patience));
            response
        }
    };
    let router = router()
        .route("/patient", get(patient(None)))
        .route("/impatient", get(patient(Some(SHORT))));
    let server = Server::start(
        router,
        ServeLimits {
            write_timeout: 2 * SHORT,
            ..ServeLimits::default()
        },
    )
    .await;
    let mut patient = server.connect().await;
    patient
        .write_all(b"GET /patient HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        .await
        .expect("sent");
    // Both of the others are cut off meanwhile, which takes longer than either may stand still.
    for (path, accepted) in [("/impatient", 2), ("/large", 3)] {
        let mut stream = server.connect().await;
        let request = format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("sent");
        let begin = Instant::now();
        while server.stats.view().open > 1 || server.stats.view().accepted < accepted {
            assert!(begin.elapsed() < PATIENCE, "{path} is still open");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    assert_eq!(server.stats.view().write_timeouts, 2);
    assert!(read_to_end(&mut patient).await.len() > 16 << 20);
}

#[tokio::test]
async fn connections_over_the_limit_hear_429_at_once() {
    let server = Server::start(
        router(),
        ServeLimits {
            max_connections: 1,
            member: Arc::new(3.into()),
            ..ServeLimits::default()
        },
    )
    .await;
    let mut first = server.connect().await;
    first.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("sent");
    assert!(read_answer(&mut first).await.ends_with("hello"));
    let mut second = server.connect().await;
    second.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("sent");
    let turned_away = read_to_end(&mut second).await;
    assert_problem(&turned_away, 429, "overloaded");
    let text = String::from_utf8_lossy(&turned_away);
    assert!(
        text.contains("\r\nretry-after: 1\r\n") && text.contains(r#""outcome":"not_applied""#),
        "{text}"
    );
    drop(first);
    let begin = Instant::now();
    while server.stats.view().open > 0 {
        assert!(begin.elapsed() < PATIENCE, "the first is still counted");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let mut third = server.connect().await;
    third.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("sent");
    assert!(read_answer(&mut third).await.ends_with("hello"));
}

/// A route that reports when it runs and answers when it may.
fn gated() -> (Router, Arc<Notify>, Arc<Notify>) {
    let (running, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (inner_running, inner_go) = (running.clone(), go.clone());
    let handler = move || {
        let (running, go) = (inner_running.clone(), inner_go.clone());
        async move {
            running.notify_one();
            go.notified().await;
            "done"
        }
    };
    (Router::new().route("/", get(handler)), running, go)
}

#[tokio::test]
async fn shutdown_answers_what_is_in_flight_and_refuses_new_connections() {
    let (router, running, go) = gated();
    let mut server = Server::start(router, ServeLimits::default()).await;
    let mut idle = server.connect().await;
    let mut busy = server.connect().await;
    busy.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("sent");
    running.notified().await;
    server.order_stop();
    assert!(read_to_end(&mut idle).await.is_empty(), "an idle connection is closed");
    let begin = Instant::now();
    while TcpStream::connect(server.address).await.is_ok() {
        assert!(begin.elapsed() < PATIENCE, "still accepting");
    }
    go.notify_one();
    assert!(String::from_utf8_lossy(&read_to_end(&mut busy).await).ends_with("done"));
    server.stopped().await;
}

#[tokio::test]
async fn shutdown_is_bounded_by_its_grace() {
    let (router, running, _go) = gated();
    let mut server = Server::start(
        router,
        ServeLimits {
            shutdown_grace: SHORT,
            ..ServeLimits::default()
        },
    )
    .await;
    let mut busy = server.connect().await;
    busy.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("sent");
    running.notified().await;
    server.order_stop();
    assert!(read_to_end(&mut busy).await.is_empty());
    server.stopped().await;
}

/// `/background` goes on for long and says so.
fn with_background() -> Router {
    let answer = || async {
        let pieces = (0..64).map(|_| Ok::<_, std::convert::Infallible>(Bytes::from(vec![b'x'; 256 << 10])));
        let mut response = axum::response::Response::new(Body::from_stream(futures_util::stream::iter(pieces)));
        response.extensions_mut().insert(Background);
        response
    };
    router().route("/background", get(answer))
}

const GET_BACKGROUND: &[u8] = b"GET /background HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";

#[tokio::test]
async fn background_answers_take_turns_and_one_that_is_not_read_holds_none() {
    let server = Server::start(with_background(), ServeLimits::default()).await;
    let mut stopped = Vec::new();
    for _ in 0..8 {
        let mut stream = server.connect().await;
        stream.write_all(GET_BACKGROUND).await.expect("sent");
        stopped.push(stream);
    }
    for _ in 0..3 {
        let mut stream = server.connect().await;
        stream.write_all(GET_BACKGROUND).await.expect("sent");
        assert!(read_to_end(&mut stream).await.len() > 16 << 20);
        let mut other = server.connect().await;
        other.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("sent");
        assert!(read_answer(&mut other).await.ends_with("hello"));
    }
    for mut stream in stopped {
        assert!(read_to_end(&mut stream).await.len() > 16 << 20);
    }
}

#[tokio::test]
async fn shutdown_ends_background_answers_that_wait_for_their_turn() {
    let limits = ServeLimits {
        shutdown_grace: SHORT,
        ..ServeLimits::default()
    };
    let mut server = Server::start(with_background(), limits).await;
    let mut streams = Vec::new();
    for _ in 0..8 {
        let mut stream = server.connect().await;
        stream.write_all(GET_BACKGROUND).await.expect("sent");
        streams.push(stream);
    }
    server.order_stop();
    server.stopped().await;
}

#[tokio::test]
async fn a_fragment_in_a_target_is_refused_and_not_dropped() {
    let server = Server::start(router(), short(PATIENCE)).await;
    for target in ["/#", "/?a=#b", "/echo#"] {
        let mut stream = server.connect().await;
        // On a connection that has served, and in pieces.
        stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nx: #\r\n\r\n").await.expect("sent");
        assert!(read_answer(&mut stream).await.ends_with("hello"));
        for piece in ["GET ", &target[..1], &target[1..], " HTTP/1.1\r\nhost: a\r\n\r\n"] {
            stream.write_all(piece.as_bytes()).await.expect("sent");
            stream.flush().await.expect("flushed");
            tokio::task::yield_now().await;
        }
        let answer = String::from_utf8_lossy(&read_to_end(&mut stream).await).into_owned();
        assert!(
            answer.starts_with("HTTP/1.1 400 ") && answer.contains("escape blanks, quotes, #"),
            "{answer}"
        );
    }
    let mut stream = server.connect().await;
    stream
        .write_all(b"POST /echo HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\na#b")
        .await
        .expect("sent");
    assert!(read_answer(&mut stream).await.ends_with("a#b"), "a body is not looked at");
}

#[tokio::test]
async fn a_body_that_stands_still_does_not_hold_the_shutdown_back() {
    let limits = ServeLimits {
        shutdown_grace: PATIENCE * 2,
        body_timeout: PATIENCE * 2,
        ..ServeLimits::default()
    };
    let (taken_in, mut arrived) = tokio::sync::mpsc::channel(2);
    let echo = router().layer(axum::middleware::map_request(move |request: Request<Body>| {
        taken_in.try_send(()).expect("the test listens");
        std::future::ready(request)
    }));
    let mut server = Server::start(echo, limits).await;
    let mut one = server.connect().await;
    one.write_all(b"POST /echo HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nhalf")
        .await
        .expect("sent");
    arrived.recv().await.expect("taken in");
    // The same over HTTP/2, whose requests run in tasks of their own.
    let post_echo = [&[0x83, 0x86, 0x44, 5][..], b"/echo", &[0x41, 1, b'a']].concat();
    let mut two = server.connect().await;
    let mut sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    sent.extend([0, 0, 0, 4, 0, 0, 0, 0, 0]);
    sent.extend([0, 0, post_echo.len() as u8, HEADERS, 4, 0, 0, 0, 1]);
    sent.extend(post_echo);
    two.write_all(&sent).await.expect("sent");
    arrived.recv().await.expect("taken in");

    server.order_stop();
    let answer = read_to_end(&mut one).await;
    assert!(answer.starts_with(b"HTTP/1.1 408 "), "{}", String::from_utf8_lossy(&answer));
    // `:status` of an index in the static table (RFC 7541, appendix A) that has another value.
    let head = next_frame(&mut two, HEADERS).await;
    assert!(head.windows(3).any(|status| status == b"408") || head[0] & 0x3f == 8, "{head:?}");
    drop(two);
    server.stopped().await;
}

#[tokio::test]
async fn what_was_sent_before_the_shutdown_is_answered() {
    let mut server = Server::start(router(), ServeLimits::default()).await;
    let mut kept = server.connect().await;
    let request = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";
    kept.write_all(request).await.expect("sent");
    assert!(read_answer(&mut kept).await.ends_with("hello"));
    // Nothing of the server runs between here and the order.
    let mut waiting = std::net::TcpStream::connect(server.address).expect("in the backlog");
    std::io::Write::write_all(&mut waiting, request).expect("sent");
    kept.try_write(request).expect("sent");
    server.order_stop();

    waiting.set_nonblocking(true).expect("set");
    let mut waiting = TcpStream::from_std(waiting).expect("a socket");
    for (name, stream) in [("kept", &mut kept), ("waiting", &mut waiting)] {
        let answer = read_to_end(stream).await;
        assert!(answer.ends_with(b"hello"), "{name}: {}", String::from_utf8_lossy(&answer));
    }
    server.stopped().await;
}

#[tokio::test]
async fn a_client_that_closes_its_side_is_answered() {
    let server = Server::start(router(), ServeLimits::default()).await;
    for (request, status, end) in [
        ("GET / HTTP/1.1\r\nhost: a\r\n\r\n", "200", "hello"),
        ("POST /echo HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc", "200", "abc"),
        (
            "GET / HTTP/1.1\r\nhost: a\r\n\r\nPOST /echo HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc",
            "200",
            "abc",
        ),
        (
            "POST /echo HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
            "200",
            "abc",
        ),
        ("POST /echo HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nhalf", "400", ""),
    ] {
        let mut stream = server.connect().await;
        stream.write_all(request.as_bytes()).await.expect("sent");
        stream.shutdown().await.expect("closed");
        let answer = read_to_end(&mut stream).await;
        let answer = String::from_utf8_lossy(&answer);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")) && answer.ends_with(end),
            "{request:?}: {answer}"
        );
    }
}

#[tokio::test]
async fn a_client_that_closes_its_side_gets_an_answer_that_fills_every_buffer() {
    let server = Server::start(router(), ServeLimits::default()).await;
    let mut stream = server.connect().await;
    stream.write_all(b"GET /large HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("sent");
    stream.shutdown().await.expect("closed");
    // Nothing is taken for a while.
    tokio::time::sleep(SHORT).await;
    let answer = read_to_end(&mut stream).await;
    assert!(answer.len() > 64 << 20, "{} bytes", answer.len());
}

#[tokio::test]
async fn a_client_that_closes_its_side_long_before_its_answer_gets_it_and_the_end_of_the_connection() {
    let (router, running, go) = gated();
    let server = Server::start(router, ServeLimits::default()).await;
    let mut stream = server.connect().await;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("sent");
    running.notified().await;
    stream.shutdown().await.expect("closed");
    // Until the server has read that it was closed; should it not have, then this proves less.
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    go.notify_one();
    assert!(read_to_end(&mut stream).await.ends_with(b"done"));
}

#[tokio::test]
async fn a_client_that_closes_its_side_is_not_waited_for_for_ever() {
    let (router, running, _go) = gated();
    let watch = get(|| async {
        (
            axum::Extension(Background),
            Body::from_stream(futures_util::stream::pending::<Result<Bytes, Infallible>>()),
        )
    });
    let limits = ServeLimits {
        half_closed_timeout: SHORT,
        // The reaper goes by it.
        header_timeout: SHORT,
        ..ServeLimits::default()
    };
    let server = Server::start(router.route("/watch", watch), limits).await;
    for path in ["/", "/watch"] {
        let mut stream = server.connect().await;
        let request = format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("sent");
        if path == "/" {
            running.notified().await;
        }
        stream.shutdown().await.expect("closed");
        read_to_end(&mut stream).await;
    }
    let begin = Instant::now();
    while server.stats.view().open > 0 {
        assert!(begin.elapsed() < PATIENCE, "it is still counted");
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn half_a_head_does_not_hold_the_shutdown_back() {
    let limits = ServeLimits {
        shutdown_grace: PATIENCE * 2,
        header_timeout: PATIENCE * 2,
        ..ServeLimits::default()
    };
    let mut server = Server::start(router(), limits).await;
    let mut streams = Vec::new();
    for half in ["", "GET / HT", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"] {
        let mut stream = server.connect().await;
        stream.write_all(half.as_bytes()).await.expect("sent");
        streams.push(stream);
    }
    let mut stream = server.connect().await;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("sent");
    assert!(read_answer(&mut stream).await.ends_with("hello"));
    server.order_stop();
    server.stopped().await;
}
