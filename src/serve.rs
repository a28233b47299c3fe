//! The connection server of both listeners: accept, HTTP/1.1 or HTTP/2 (prior knowledge), timeouts, shutdown.
//!
//! axum's own server arms no timeout and no limit, so the connections are driven here, over hyper's builder.
//!
//! *Invariants*
//! - From accept to the first complete request head at most `header_timeout` passes, in both protocols, whatever was sent: nothing,
//!   half an HTTP/2 preface, half a header block. The same bound holds from the first byte of every later HTTP/1 head to its end.
//! - A kept-alive connection without a request lives `idle_timeout`; a peer that takes no byte of its answer for `write_timeout` (or as long as the
//!   answer allows: [`Patience`])
//!   is cut off; a request body that stands still for `body_timeout` ends with an error in the handler ([`is_body_timeout`]).
//! - At most `max_connections` are served. Beyond that the listener still accepts and answers a short `429` itself: a health check
//!   then hears "overloaded" at once instead of hanging in the backlog.
//! - A client that closes its side after its request is answered (HTTP/1), except a watch; if nothing is sent to it for `half_closed_timeout`,
//!   it is taken for gone.
//! - A failing `accept` (out of descriptors) waits instead of spinning.
//! - After the shutdown future resolves only who waits to be accepted still is; requests in flight are answered, and so is the next one that an
//!   idle connection was sent before (HTTP/2: GOAWAY); at `shutdown_grace` the rest is cut off. [`serve`] returns when the last connection is gone.
//!
//! *Cost.* No timer and no clock read belongs to a request: a request moves a few relaxed atomics, and one reaper task per listener
//! looks at all connections a few times per timeout. Hence a timeout may come up to one reaper period ([`reaper_period`]) late.
//!
//! *TLS* plugs in as another [`Acceptor`]; its handshake runs in the connection's task, under `header_timeout`.

mod activity;
mod body;
mod connection;
mod io;
mod problem;
mod request_line;

use std::{
    convert::Infallible, future::Future, io::Result as IoResult, net::SocketAddr, pin::pin, sync::Arc, sync::atomic::AtomicU64,
    time::Duration,
};

use axum::http::{Request, Response};
use http_body_util::BodyExt as _;
use hyper_util::{rt::TokioExecutor, rt::TokioTimer, server::conn::auto};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{MissedTickBehavior, interval, sleep, timeout},
};

use activity::Connections;
pub use activity::{ServeStats, ServeStatsView};
pub use body::{BodyError, RequestBody, is_body_timeout};
pub use connection::{Background, Patience};
use connection::{Shared, background_turns, run_connection};

/// Bounds of one listener.
#[derive(Debug, Clone)]
pub struct ServeLimits {
    /// Connections served at a time.
    pub max_connections: usize,
    /// From accept to the first complete request head, and from the first byte of a later HTTP/1 head to its end.
    pub header_timeout: Duration,
    /// How long a connection without a request is kept. Longer than the pools of usual clients (60 to 90 s), so that they close first.
    pub idle_timeout: Duration,
    /// Longest pause within a request body.
    pub body_timeout: Duration,
    /// Longest time a peer may take no byte of what is being sent to it.
    pub write_timeout: Duration,
    /// How long one who has closed its side while its request is under way is waited for if nothing is sent to it. It may want its answer, and it
    /// may be gone: that is known only from sending. For so long its request keeps what it holds.
    pub half_closed_timeout: Duration,
    /// From the shutdown to cutting off what is still in flight.
    pub shutdown_grace: Duration,
    /// One request head in bytes. HTTP/2: the header list; beyond: `431`. HTTP/1 buffers up to four times as much before `431`, so that
    /// a service can refuse a long target (`414`) or long fields in its own words.
    pub max_header_bytes: usize,
    /// Concurrent requests of one HTTP/2 connection.
    pub max_streams: u32,
    /// Put [`RemoteAddr`] into each request's extensions (one allocation; for access logs).
    pub expose_remote_addr: bool,
    /// Member id for `Metcd-Member` in the answers given here; left out while it is 0, which it may be until the member has joined.
    pub member: Arc<AtomicU64>,
}

impl Default for ServeLimits {
    fn default() -> Self {
        ServeLimits {
            max_connections: 10_000,
            header_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(120),
            body_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(60),
            half_closed_timeout: Duration::from_secs(5),
            shutdown_grace: Duration::from_secs(8),
            max_header_bytes: 64 * 1024,
            max_streams: 256,
            expose_remote_addr: false,
            member: Arc::default(),
        }
    }
}

/// The other end of the connection a request came over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RemoteAddr(pub SocketAddr);

/// Makes a byte stream of an accepted TCP connection: itself, or a TLS session over it.
pub trait Acceptor: Clone + Send + Sync + 'static {
    /// The stream.
    type Io: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// The handshake. Bounded by the caller.
    fn accept(&self, stream: TcpStream) -> impl Future<Output = IoResult<Self::Io>> + Send;
}

/// No TLS.
#[derive(Debug, Clone, Copy, Default)]
pub struct Plain;

impl Acceptor for Plain {
    type Io = TcpStream;

    async fn accept(&self, stream: TcpStream) -> IoResult<TcpStream> {
        Ok(stream)
    }
}

/// The service a listener serves: every axum `Router` is one.
pub trait HttpService:
    tower::Service<Request<RequestBody>, Response = Response<Self::Body>, Error = Infallible, Future: Send + 'static> + Clone + Send + 'static
{
    /// Body of the answers.
    type Body: axum::body::HttpBody<Data: Send, Error: Into<axum::BoxError>> + Send + 'static;
}

impl<S, B> HttpService for S
where
    S: tower::Service<Request<RequestBody>, Response = Response<B>, Error = Infallible, Future: Send + 'static> + Clone + Send + 'static,
    B: axum::body::HttpBody<Data: Send, Error: Into<axum::BoxError>> + Send + 'static,
{
    type Body = B;
}

/// Serves plain TCP until `shutdown` resolves and the connections are gone. See the module for what is bounded.
pub async fn serve<S: HttpService>(listener: TcpListener, service: S, limits: ServeLimits, shutdown: impl Future<Output = ()>) {
    serve_with(listener, Plain, service, limits, Arc::default(), shutdown).await;
}

/// [`serve`] over any [`Acceptor`], counting into `stats`.
pub async fn serve_with<A: Acceptor, S: HttpService>(
    listener: TcpListener,
    acceptor: A,
    service: S,
    limits: ServeLimits,
    stats: Arc<ServeStats>,
    shutdown: impl Future<Output = ()>,
) {
    let shared = Arc::new(Shared {
        http: http_builder(&limits),
        connections: Connections::new(stats),
        turns: Semaphore::new(background_turns()),
        limits,
    });
    let reaping = reap(&shared);
    let mut reaping = pin!(reaping);
    tokio::select! {
        biased;
        () = shutdown => {}
        () = &mut reaping => {}
        () = accept_all(&listener, &acceptor, &service, &shared) => {}
    }
    // Who has connected already waits to be accepted, and would be cut off.
    let _ = timeout(LAST_ACCEPTS, accept_all(&listener, &acceptor, &service, &shared)).await;
    drop(listener);
    tokio::select! {
        () = drain(&shared) => {}
        () = reaping => {}
    }
}

/// For so long connections are accepted after the shutdown began.
const LAST_ACCEPTS: Duration = Duration::from_millis(5);

/// Looks at the connections for as long as it is polled.
async fn reap(shared: &Shared) {
    let mut ticks = interval(reaper_period(&shared.limits));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        shared.connections.reap(&shared.limits);
    }
}

/// How often the connections are looked at: eight times per shortest timeout, within 10 ms and 1 s.
fn reaper_period(limits: &ServeLimits) -> Duration {
    let shortest = limits.header_timeout.min(limits.idle_timeout).min(limits.write_timeout);
    (shortest / 8).clamp(Duration::from_millis(10), Duration::from_secs(1))
}

/// Accepts for as long as it is polled. Errors of one connection are skipped; when the process is out of descriptors or memory, trying
/// again at once would only burn the processor that could free them.
async fn accept_all<A: Acceptor, S: HttpService>(listener: &TcpListener, acceptor: &A, service: &S, shared: &Arc<Shared>) {
    use std::io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    loop {
        match listener.accept().await {
            Ok((stream, remote)) => start_connection(stream, remote, acceptor, service, shared),
            Err(err) if matches!(err.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted) => {}
            Err(err) => {
                shared.connections.stats().note_accept_error();
                tracing::warn!(error = %err, "cannot accept a connection, waiting 100 ms");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

fn start_connection<A: Acceptor, S: HttpService>(stream: TcpStream, remote: SocketAddr, acceptor: &A, service: &S, shared: &Arc<Shared>) {
    // An answer is one write; waiting for more to send would only cost latency. A socket that refuses is about to fail anyway.
    let _ = stream.set_nodelay(true);
    match shared.connections.enter(shared.limits.max_connections) {
        Some(entry) => {
            tokio::spawn(run_connection(
                stream,
                remote,
                acceptor.clone(),
                service.clone(),
                entry,
                shared.clone(),
            ));
        }
        None => problem::turn_away(stream, shared),
    }
}

/// Asks every connection to finish, then waits for them at most `shutdown_grace`.
async fn drain(shared: &Shared) {
    shared.connections.order_drain();
    let deadline = sleep(shared.limits.shutdown_grace);
    tokio::select! {
        () = shared.connections.empty() => return,
        () = deadline => {}
    }
    let left = shared.connections.order_cut();
    tracing::warn!(connections = left, "cut off at the end of the shutdown's grace");
    shared.connections.empty().await;
}

/// The HTTP/1 read buffer in multiples of `max_header_bytes`.
const HEAD_ROOM: usize = 4;

/// hyper's settings. Its own header timer stays off: it allocates and registers a timer for every request, covers HTTP/1 only and not
/// the sniffing of the version; the reaper covers all of it.
fn http_builder(limits: &ServeLimits) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    // The read buffer bounds the head; bodies pass through it in pieces of at most that size. hyper panics below 8 KiB. A head over
    // the buffer is all one to hyper (431); with room above the limit it, and the service, can tell a long target (414) from it.
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(None)
        .max_buf_size((HEAD_ROOM * limits.max_header_bytes).max(8 * 1024));
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(20))
        .max_concurrent_streams(limits.max_streams)
        // With the same room: a stream that this setting refuses is answered by hyper, with a bare status.
        .max_header_list_size(u32::try_from(HEAD_ROOM * limits.max_header_bytes).unwrap_or(u32::MAX))
        // "Rapid reset": streams reset by the client before they were served, and by us because the client erred.
        .max_pending_accept_reset_streams(20)
        .max_local_error_reset_streams(128);
    builder
}

/// Reads a whole request body of at most `max_bytes` into one buffer of its own: hyper's read buffer is not kept alive by it.
pub async fn read_body<B>(body: B, max_bytes: usize) -> Result<bytes::Bytes, ReadBodyError<B::Error>>
where
    B: axum::body::HttpBody<Data = bytes::Bytes> + Unpin,
{
    let mut body = body;
    let announced = usize::try_from(body.size_hint().lower()).unwrap_or(usize::MAX);
    if announced > max_bytes {
        return Err(ReadBodyError::TooLarge);
    }
    // The announcement is not trusted with memory: a large body grows as it arrives.
    let mut buffer = Vec::with_capacity(announced.min(256 * 1024));
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(ReadBodyError::Broken)?.into_data() else {
            continue;
        };
        if buffer.len() + data.len() > max_bytes {
            return Err(ReadBodyError::TooLarge);
        }
        buffer.extend_from_slice(&data);
    }
    Ok(buffer.into())
}

/// Why [`read_body`] stopped.
#[derive(Debug, thiserror::Error)]
pub enum ReadBodyError<E> {
    /// More than allowed.
    #[error("the body is too large")]
    TooLarge,
    /// The connection or a timeout ended it.
    #[error("the body broke off")]
    Broken(E),
}

#[cfg(test)]
mod tests;
