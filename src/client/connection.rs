//! One attempt at one endpoint.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper_util::client::legacy::{self, connect::HttpConnector};
use hyper_util::rt::{TokioExecutor, TokioTimer};

/// After this long without a connection an endpoint counts as unreachable.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Kept for reuse per endpoint; shorter than servers keep theirs.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// No answer that is read whole is larger: a page has 16 MiB of data at most, which JSON and base64 can blow up sixfold.
const MAX_ANSWER_BYTES: usize = 128 << 20;

/// Keep-alive connections to all endpoints.
#[derive(Debug, Clone)]
pub(super) struct Connections {
    pool: legacy::Client<HttpConnector, Full<Bytes>>,
}

/// How an attempt failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// No connection, so nothing was sent.
    NotConnected(String),
    /// Something may have been sent, and no complete answer came.
    Broken(String),
    /// The request is not one: a program's mistake.
    Malformed(String),
}

/// What came back.
pub(super) struct Received<B> {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: B,
}

impl Connections {
    pub(super) fn new() -> Connections {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
        // The pool sends a request again only if the kept connection had closed before a byte of it was written.
        let pool = legacy::Client::builder(TokioExecutor::new())
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_timer(TokioTimer::new())
            .build(connector);
        Connections { pool }
    }

    /// Sends a request; returns with the head of the answer.
    pub(super) async fn open(&self, url: &str, method: &Method, headers: &HeaderMap, body: Bytes) -> Result<Received<Incoming>, Failure> {
        let mut request = Request::builder()
            .method(method)
            .uri(url)
            .body(Full::new(body))
            .map_err(|error| Failure::Malformed(error.to_string()))?;
        request.headers_mut().extend(headers.clone());
        let answer = self.pool.request(request).await.map_err(|error| {
            let cause = root_cause(&error);
            if error.is_connect() {
                Failure::NotConnected(cause)
            } else {
                Failure::Broken(cause)
            }
        })?;
        let (head, body) = answer.into_parts();
        Ok(Received {
            status: head.status,
            headers: head.headers,
            body,
        })
    }
}

pub(super) async fn read_whole(body: Incoming) -> Result<Bytes, Failure> {
    match Limited::new(body, MAX_ANSWER_BYTES).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) => Err(Failure::Broken(error.to_string())),
    }
}

/// The innermost error: "connection refused" rather than "client error (Connect)".
pub(super) fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
