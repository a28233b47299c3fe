//! Bodies on their way through: a request's with an idle timeout, an answer's that tells when it is done.

use std::{
    error::Error as StdError,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::body::HttpBody;
use bytes::Bytes;
use hyper::body::{Frame, Incoming, SizeHint};
use tokio::time::{Instant, Sleep, sleep};

use super::activity::{Activity, DRAIN_PATIENCE};

/// A request body that fails when nothing arrives for a while, which is shorter once the process is to end.
///
/// The timer exists only while a reader waits: a body that came with its head costs none.
pub struct RequestBody {
    inner: Incoming,
    timeout: Duration,
    activity: Arc<Activity>,
    patience: Option<Patience>,
}

/// How long a reader goes on to wait.
struct Patience {
    timer: Pin<Box<Sleep>>,
    /// `None` once the process is to end.
    drained: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl RequestBody {
    pub(super) fn new(inner: Incoming, timeout: Duration, activity: Arc<Activity>) -> RequestBody {
        RequestBody {
            inner,
            timeout,
            activity,
            patience: None,
        }
    }

    /// Until nothing has come for too long: ready with how long that was.
    fn poll_timeout(&mut self, cx: &mut Context<'_>) -> Poll<Duration> {
        let timeout = self.timeout;
        let activity = &self.activity;
        let patience = self.patience.get_or_insert_with(|| {
            let draining = activity.draining().clone();
            Patience {
                timer: Box::pin(sleep(timeout)),
                drained: Some(Box::pin(async move {
                    draining.wait().await;
                })),
            }
        });
        if let Some(drained) = &mut patience.drained
            && drained.as_mut().poll(cx).is_ready()
        {
            patience.drained = None;
            self.timeout = timeout.min(DRAIN_PATIENCE);
            patience.timer.as_mut().reset(Instant::now() + self.timeout);
        }
        patience.timer.as_mut().poll(cx).map(|()| self.timeout)
    }
}

/// Why a request body broke off.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// Nothing came for the body timeout: `408`.
    #[error("no data for {} ms", .0.as_millis())]
    Timeout(Duration),
    /// The client has closed its side before the end of its body.
    #[error("the connection ended within the body")]
    CutOff,
    /// The connection failed or the framing is wrong.
    #[error(transparent)]
    Connection(#[from] hyper::Error),
}

/// Whether an error, or one of its sources, is a body that stood still: `408 request_timeout`.
pub fn is_body_timeout(error: &(dyn StdError + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(BodyError::Timeout(_)) = error.downcast_ref() {
            return true;
        }
        next = error.source();
    }
    false
}

impl HttpBody for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        if let Poll::Ready(frame) = Pin::new(&mut this.inner).poll_frame(cx) {
            if let Some(patience) = &mut this.patience {
                patience.timer.as_mut().reset(Instant::now() + this.timeout);
            }
            return Poll::Ready(frame.map(|result| result.map_err(BodyError::from)));
        }
        if this.activity.is_half_closed() {
            return Poll::Ready(Some(Err(BodyError::CutOff)));
        }
        this.poll_timeout(cx).map(|timeout| Some(Err(BodyError::Timeout(timeout))))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// Marks one request as in flight until it is dropped.
pub(super) struct InFlight(Arc<Activity>);

impl InFlight {
    pub(super) fn begin(activity: &Arc<Activity>, http2: bool) -> InFlight {
        activity.begin_request(http2);
        InFlight(activity.clone())
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.end_request();
    }
}

pin_project_lite::pin_project! {
    /// An answer's body; the request is in flight until it is dropped.
    pub(super) struct AnswerBody<B> {
        #[pin]
        inner: B,
        in_flight: InFlight,
    }
}

impl<B> AnswerBody<B> {
    pub(super) fn new(inner: B, in_flight: InFlight) -> AnswerBody<B> {
        AnswerBody { inner, in_flight }
    }
}

impl<B: HttpBody> HttpBody for AnswerBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        self.project().inner.poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
