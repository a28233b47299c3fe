//! One connection from its handshake to its end.

use std::{
    future::{Future, poll_fn},
    net::SocketAddr,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::http::{Request, Response, Version};
use hyper::body::Incoming;
use hyper_util::{rt::TokioExecutor, server::conn::auto};
use tokio::{net::TcpStream, sync::Semaphore, time::sleep};
use tower::util::Oneshot;

use super::{
    Acceptor, HttpService, RemoteAddr, ServeLimits,
    activity::{Activity, Connections, Order},
    body::{AnswerBody, InFlight, RequestBody},
    io::Watched,
};

/// What the connections of a listener have in common.
pub(super) struct Shared {
    pub(super) http: auto::Builder<TokioExecutor>,
    pub(super) connections: Connections,
    pub(super) limits: ServeLimits,
    /// Turns of the connections whose answers are [`Background`]: so many of them run at a time.
    pub(super) turns: Semaphore,
}

/// An extension of a response that goes on for long and whose pieces nobody waits for more than anybody else: a watch. While it is
/// under way its connection takes turns with the others of that kind, [`background_turns`] of them at a time, so that ten thousand of them that are
/// woken by one change do not stand in the runtime's queue before the requests that come meanwhile.
#[derive(Debug, Clone, Copy)]
pub struct Background;

/// An extension of a response: how long its reader may take nothing of it, if that is not [`ServeLimits::write_timeout`]; `None` for as
/// long as it likes. Only for bodies that are made while they are taken, so that one who waits costs what the socket holds.
#[derive(Debug, Clone, Copy)]
pub struct Patience(pub Option<Duration>);

/// A connection that is told to end and has nothing to do is looked at once more after this time: what its client sent before is read, and
/// answered, and not lost with the connection.
const LAST_LOOK: Duration = Duration::from_millis(5);

/// Half of the runtime's threads, but one at least.
pub(super) fn background_turns() -> usize {
    (tokio::runtime::Handle::current().metrics().num_workers() / 2).max(1)
}

/// Counts the connection out, however its task ends.
struct Leave<'a>(&'a Connections, u64);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.0.leave(self.1);
    }
}

/// Serves one connection.
pub(super) async fn run_connection<A: Acceptor, S: HttpService>(
    stream: TcpStream,
    remote: SocketAddr,
    acceptor: A,
    service: S,
    (id, activity): (u64, Arc<Activity>),
    shared: Arc<Shared>,
) {
    let _leave = Leave(&shared.connections, id);
    let Some(Ok(io)) = unless_ordered_away(&activity, acceptor.accept(stream)).await else {
        return;
    };
    let service = Tracked {
        inner: service,
        activity: activity.clone(),
        body_timeout: shared.limits.body_timeout,
        write_timeout: shared.limits.write_timeout,
        remote: shared.limits.expose_remote_addr.then_some(RemoteAddr(remote)),
    };
    let io = Watched::new(io, activity.clone(), shared.limits.member.clone());
    let mut connection = pin!(shared.http.serve_connection(io, service));
    let mut draining = false;
    let mut last_look = pin!(None);
    let mut turn = pin!(None);
    poll_fn(|cx| {
        activity.register(cx.waker());
        match activity.order() {
            Order::None | Order::HeadTimedOut => {}
            Order::Drain if draining => {}
            Order::Drain => {
                if last_look.is_none() {
                    last_look.set(Some(sleep(LAST_LOOK)));
                }
                let looked = last_look.as_mut().as_pin_mut().is_none_or(|look| look.poll(cx).is_ready());
                if looked || !activity.is_waiting() {
                    if connection.as_mut().poll(cx).is_ready() {
                        return Poll::Ready(());
                    }
                    draining = true;
                    connection.as_mut().graceful_shutdown();
                }
            }
            Order::Cut => return Poll::Ready(()),
        }
        // Held while the connection runs, which is not for long: it stops when its buffers are full.
        let mut _turn = None;
        if activity.is_background() {
            if turn.is_none() {
                turn.set(Some(shared.turns.acquire()));
            }
            if let Some(waiting) = turn.as_mut().as_pin_mut() {
                _turn = ready!(waiting.poll(cx)).ok();
                turn.set(None);
            }
        }
        // How a connection fails is its client's affair; what matters here is that it is over.
        connection.as_mut().poll(cx).map(|outcome| {
            if let Err(err) = outcome {
                tracing::trace!(%remote, error = %err, "connection ended");
            }
        })
    })
    .await;
}

/// `None` if the connection is told to go before `future` is done.
async fn unless_ordered_away<F: Future>(activity: &Activity, future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    poll_fn(|cx| {
        activity.register(cx.waker());
        // A connection that needs nothing before its first request may hold one already.
        if let Poll::Ready(done) = future.as_mut().poll(cx) {
            return Poll::Ready(Some(done));
        }
        match activity.order() {
            Order::None => Poll::Pending,
            Order::Drain | Order::HeadTimedOut | Order::Cut => Poll::Ready(None),
        }
    })
    .await
}

/// The service with its requests counted.
struct Tracked<S> {
    inner: S,
    activity: Arc<Activity>,
    body_timeout: Duration,
    write_timeout: Duration,
    remote: Option<RemoteAddr>,
}

impl<S: HttpService> hyper::service::Service<Request<Incoming>> for Tracked<S> {
    type Response = Response<AnswerBody<S::Body>>;
    type Error = std::convert::Infallible;
    type Future = TrackedFuture<Oneshot<S, Request<RequestBody>>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        // On HTTP/2 other answers of the connection may be under way, and what they asked for stays.
        if self.activity.is_waiting() {
            self.activity.set_background(false);
            self.activity.set_patience(self.write_timeout);
        }
        let in_flight = InFlight::begin(&self.activity, request.version() == Version::HTTP_2);
        let mut request = request.map(|body| RequestBody::new(body, self.body_timeout, self.activity.clone()));
        if let Some(remote) = self.remote {
            request.extensions_mut().insert(remote);
        }
        TrackedFuture {
            inner: Oneshot::new(self.inner.clone(), request),
            in_flight: Some(in_flight),
            activity: self.activity.clone(),
        }
    }
}

pin_project_lite::pin_project! {
    /// The answer on its way; hands the in-flight mark over to the answer's body.
    struct TrackedFuture<F> {
        #[pin]
        inner: F,
        in_flight: Option<InFlight>,
        activity: Arc<Activity>,
    }
}

impl<F, B, E> Future for TrackedFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
{
    type Output = Result<Response<AnswerBody<B>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let response = ready!(this.inner.poll(cx))?;
        if response.extensions().get::<Background>().is_some() {
            this.activity.set_background(true);
        }
        if let Some(Patience(patience)) = response.extensions().get() {
            this.activity.extend_patience(patience.unwrap_or(Duration::MAX));
        }
        // A future is not polled after it is done, so the mark is there.
        let Some(in_flight) = this.in_flight.take() else {
            return Poll::Pending;
        };
        Poll::Ready(Ok(response.map(|body| AnswerBody::new(body, in_flight))))
    }
}
