//! Request bodies: read within a size and a time, never buffered beyond the limit.

use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::Body as _;
use parking_lot::Mutex;
use tokio::time::{Instant, timeout_at};

use super::error::{ApiError, Problem};
use crate::serve::is_body_timeout;

/// How long, and how much of, a body that nobody wants is taken off the wire so that its sender gets to read the answer.
const DRAIN_TIME: Duration = Duration::from_secs(5);
const DRAIN_BYTES: usize = 64 << 20;

/// The body of one request.
pub(super) struct RequestBody {
    /// Never locked, only ever reached through `&mut`: the mutex makes the request shareable between awaits (`Sync`).
    body: Mutex<Body>,
    /// `Expect: 100-continue`, and nothing was read yet: the client has not begun to send.
    awaits_continue: bool,
    done: bool,
    received: u64,
}

/// Bounds on reading a body.
#[derive(Debug, Clone, Copy)]
pub(super) struct BodyLimits {
    /// Bytes.
    pub(super) max_bytes: u64,
    /// Between two pieces.
    pub(super) idle: Duration,
    /// For the whole.
    pub(super) deadline: Instant,
}

impl RequestBody {
    /// `expects_continue`: the request has `Expect: 100-continue`.
    pub(super) fn new(body: Body, expects_continue: bool) -> RequestBody {
        RequestBody {
            body: Mutex::new(body),
            awaits_continue: expects_continue,
            done: false,
            received: 0,
        }
    }

    /// Bytes of it that were read so far.
    pub(super) fn received(&self) -> u64 {
        self.received
    }

    /// Reads it whole into memory of its own (a slice would pin the connection's read buffer). `too_large` is the answer beyond
    /// the limit: at once if `Content-Length` says so, otherwise as soon as the limit is passed.
    pub(super) async fn read(&mut self, limits: BodyLimits, too_large: fn(u64) -> Problem) -> Result<Bytes, ApiError> {
        let declared = self.body.get_mut().size_hint().lower();
        if declared > limits.max_bytes {
            return Err(too_large(limits.max_bytes).into());
        }
        // Reserves what is promised up to 64 KiB only: memory is given for bytes that arrived, not for a header.
        let mut bytes = Vec::with_capacity(usize::try_from(declared).unwrap_or(0).min(64 << 10));
        while let Some(piece) = self.next(limits).await? {
            if (bytes.len() + piece.len()) as u64 > limits.max_bytes {
                return Err(too_large(limits.max_bytes).into());
            }
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes.into())
    }

    async fn next(&mut self, limits: BodyLimits) -> Result<Option<Bytes>, ApiError> {
        let body = self.body.get_mut();
        if self.done || body.is_end_stream() {
            self.done = true;
            return Ok(None);
        }
        self.awaits_continue = false;
        let until = limits.deadline.min(Instant::now() + limits.idle);
        loop {
            match timeout_at(until, body.frame()).await {
                Ok(Some(Ok(frame))) => {
                    // Trailers mean nothing here.
                    if let Ok(data) = frame.into_data() {
                        self.received += data.len() as u64;
                        return Ok(Some(data));
                    }
                }
                Ok(None) => {
                    self.done = true;
                    return Ok(None);
                }
                Ok(Some(Err(cause))) if is_body_timeout(&cause) => return Err(Problem::RequestTimeout.into()),
                Ok(Some(Err(cause))) => {
                    tracing::debug!(%cause, "a request's body broke off");
                    self.done = true;
                    return Err(Problem::InvalidRequest("the request's body broke off".to_owned()).into());
                }
                Err(_elapsed) => return Err(Problem::RequestTimeout.into()),
            }
        }
    }

    /// Called once the answer is made. A server that closes while its client still sends makes the client's system discard the
    /// answer, so the rest is taken off the wire in the background, within bounds.
    ///
    /// Whether there was a rest: if it does not come soon, HTTP/1 cannot use the connection for another request.
    pub(super) fn discard(self) -> bool {
        let mut body = self.body.into_inner();
        if self.done || body.is_end_stream() {
            return false;
        }
        if self.awaits_continue {
            return true;
        }
        tokio::spawn(async move {
            let mut left = DRAIN_BYTES;
            let drained = async {
                while let Some(Ok(frame)) = body.frame().await
                    && left > 0
                {
                    left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
                }
            };
            // Whatever is still to come after that is cut off with the connection.
            let _ = timeout_at(Instant::now() + DRAIN_TIME, drained).await;
        });
        true
    }
}

#[cfg(test)]
mod tests {
    use futures_util::stream;

    use super::*;

    fn limits(max_bytes: u64, idle_ms: u64) -> BodyLimits {
        BodyLimits {
            max_bytes,
            idle: Duration::from_millis(idle_ms),
            deadline: Instant::now() + Duration::from_secs(10),
        }
    }

    fn too_large(max: u64) -> Problem {
        Problem::ValueTooLarge { max }
    }

    async fn read(body: Body, limits: BodyLimits) -> Result<Bytes, Problem> {
        RequestBody::new(body, false)
            .read(limits, too_large)
            .await
            .map_err(|error| error.problem)
    }

    #[tokio::test]
    async fn a_declared_length_over_the_limit_is_refused_unread() {
        assert_eq!(
            read(Body::from(vec![0; 11]), limits(10, 50)).await,
            Err(Problem::ValueTooLarge { max: 10 })
        );
        assert_eq!(read(Body::from(vec![7; 10]), limits(10, 50)).await.unwrap(), vec![7; 10]);
        assert_eq!(read(Body::empty(), limits(0, 50)).await.unwrap(), "");
    }

    #[tokio::test]
    async fn an_endless_body_is_refused_when_it_passes_the_limit() {
        let endless = stream::repeat_with(|| Ok::<_, std::io::Error>(Bytes::from_static(b"abcd")));
        assert_eq!(
            read(Body::from_stream(endless), limits(10, 50)).await,
            Err(Problem::ValueTooLarge { max: 10 })
        );
    }

    #[tokio::test]
    async fn a_body_that_stalls_times_out() {
        let stalled = stream::pending::<Result<Bytes, std::io::Error>>();
        assert_eq!(read(Body::from_stream(stalled), limits(10, 50)).await, Err(Problem::RequestTimeout));
    }

    #[tokio::test]
    async fn a_broken_body_is_an_error_not_a_short_value() {
        let broken = stream::iter([Ok(Bytes::from_static(b"ab")), Err(std::io::Error::other("gone"))]);
        assert!(matches!(
            read(Body::from_stream(broken), limits(10, 50)).await,
            Err(Problem::InvalidRequest(_))
        ));
    }
}
