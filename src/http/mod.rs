//! The client API over HTTP.
//!
//! A request goes [`route::resolve`] (raw path bytes to a route) → `Guard` (is the caller allowed to be here) → one handler → `finish`
//! (headers that every answer carries, metrics). Handlers see a [`call::Call`] and the [`Node`]; they return a response or an
//! [`error::ApiError`], which is the one type that knows status codes.
//!
//! Invariants:
//! - The path is decoded once, as bytes; nothing folds dot segments or slashes. Query parameters likewise.
//! - Nothing is buffered beyond a limit, in or out: bodies are refused while they stream, lists and watches are pulled.
//! - A handler has no effect before its request is parsed to the last parameter.
//! - `outcome` is never `not_applied` for a command that was handed to raft.
//!
//! Not here: accepting connections, header timeouts and TLS ([`crate::serve`] calls [`Api`]).

mod accept;
mod backup;
mod body;
mod call;
mod conditions;
mod error;
pub(crate) mod fuzzing;
mod guard;
mod json;
mod kv;
mod lease;
mod list;
mod member;
mod metrics;
mod ops;
mod page;
mod params;
mod percent;
mod respond;
mod route;
mod slow;
mod span;
mod starting;
mod trace;
mod txn;
mod watch;

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use http::request::Parts;
use http::{HeaderValue, Method, Request, StatusCode, Version, header};
use hyper::body::Body as HttpBody;
use tokio::time::Instant;
use tracing::Instrument as _;

pub use starting::Starting;

use self::body::RequestBody;
use self::call::{Call, Reply};
use self::error::{ApiError, Problem};
use self::guard::Guard;
use self::metrics::Metrics;
use self::params::Params;
use self::route::{Route, Target};
use self::slow::SlowRequests;
use self::trace::TraceContext;
use crate::config::Config;
use crate::node::{Node, Stages};
use crate::serve::{RemoteAddr, ServeStats};
use crate::telemetry::{ACCESS_TARGET, LogHandle};

impl LogControl for LogHandle {
    fn filter(&self) -> String {
        LogHandle::filter(self)
    }

    fn set_filter(&self, filter: &str) -> Result<(), String> {
        LogHandle::set_filter(self, filter)
    }

    fn dropped_lines(&self) -> u64 {
        LogHandle::dropped_lines(self) as u64
    }
}

/// What the handlers share. Cheap to clone.
#[derive(Clone)]
pub struct AppState(Arc<App>);

/// See [`AppState`].
pub(in crate::http) struct App {
    node: Node,
    config: Arc<Config>,
    guard: Guard,
    member: HeaderValue,
    watchers: AtomicUsize,
    metrics: Metrics,
    connections: Arc<ServeStats>,
    slow: SlowRequests,
    log: Option<Arc<dyn LogControl>>,
    started: Instant,
}

/// The tracing filter at run time: `GET` and `PUT /debug/log`.
pub trait LogControl: Send + Sync {
    /// The filter in force.
    fn filter(&self) -> String;
    /// Sets another one; the error says what is wrong with it.
    fn set_filter(&self, filter: &str) -> Result<(), String>;
    /// Lines lost since the start because the log's disk or pipe was too slow.
    fn dropped_lines(&self) -> u64;
}

impl AppState {
    /// Over a node, with a checked configuration. `connections` is what the listener counts. Without a `log`, `/debug/log` is not
    /// served.
    pub fn new(node: Node, config: Arc<Config>, connections: Arc<ServeStats>, log: Option<Arc<dyn LogControl>>) -> AppState {
        let member = HeaderValue::from(node.id());
        let guard = Guard::new(&config);
        AppState(Arc::new(App {
            node,
            config,
            guard,
            member,
            watchers: AtomicUsize::new(0),
            metrics: Metrics::default(),
            connections,
            slow: SlowRequests::default(),
            log,
            started: Instant::now(),
        }))
    }
}

impl App {
    /// Takes a place among the open watches and waits (`limits.max_watchers`).
    fn watch_slot(self: &Arc<App>) -> Result<WatchSlot, ApiError> {
        let max = self.config.limits.max_watchers;
        if self.watchers.fetch_add(1, Ordering::Relaxed) >= max {
            self.watchers.fetch_sub(1, Ordering::Relaxed);
            return Err(Problem::TooManyWatchers { max }.into());
        }
        Ok(WatchSlot(self.clone()))
    }
}

/// A place among the open watches.
struct WatchSlot(Arc<App>);

impl Drop for WatchSlot {
    fn drop(&mut self) {
        self.0.watchers.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An extension of a request that has waited: since when.
#[derive(Debug, Clone, Copy)]
struct Arrived(Instant);

/// The whole client API as a service: call it per connection. It is always ready and never fails.
#[derive(Clone)]
pub struct Api(AppState);

/// The client API as a service.
pub fn service(state: AppState) -> Api {
    Api(state)
}

/// The client API as an axum router, to nest or to layer. [`service`] is the same without axum's own matching.
pub fn router(state: AppState) -> axum::Router {
    axum::Router::new().fallback_service(service(state))
}

impl<B> tower::Service<Request<B>> for Api
where
    B: HttpBody<Data = Bytes> + Send + 'static,
    B::Error: Into<axum::BoxError>,
{
    type Response = Response;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let state = self.0.clone();
        Box::pin(async move { Ok(serve(&state.0, request.map(Body::new)).await) })
    }
}

async fn serve(app: &Arc<App>, request: Request<Body>) -> Response {
    let (parts, body) = request.into_parts();
    let arrived = parts.extensions.get().map_or_else(Instant::now, |&Arrived(at)| at);
    let mut trace = TraceContext::of(&parts.headers);
    let span = trace.span(&parts, app.config.log.access_log);
    let stages = Stages::default();
    let mut body = RequestBody::new(body, parts.headers.contains_key(header::EXPECT));
    let path = match parts.uri.path() {
        "*" if parts.method == Method::OPTIONS => "/",
        path => path,
    };
    let target = guard::check_head(&parts).and_then(|()| route::resolve(path));
    // A path that is too long or cannot be decoded is a key that cannot be read.
    let route = target.as_ref().map_or(Route::ShortKey, |target| target.route);
    let (cors, reply) = match (app.guard.check(&parts), target) {
        (Err(refused), _) => (None, Err(refused)),
        (Ok(cors), Err(invalid)) => (cors, Err(invalid)),
        (Ok(cors), Ok(target)) => {
            let reply = dispatch(app, &parts, &mut body, target, &stages, arrived);
            (cors, reply.instrument(span.clone()).await)
        }
    };
    let received = body.received();
    let is_unread = body.discard();
    let mutation = !matches!(parts.method, Method::GET | Method::HEAD | Method::OPTIONS);
    let mut response = reply.unwrap_or_else(|error| error.into_response(mutation));
    if let Some(origin) = cors {
        guard::add_cors(response.headers_mut(), origin, &parts.method, route.allow());
    }
    if app.guard.depends_on_origin() {
        response.headers_mut().append(header::VARY, HeaderValue::from_static("Origin"));
    }
    // The rest of a body would stand before the next request.
    if is_unread && parts.version <= Version::HTTP_11 {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    let response = finish(app, route, &parts, &trace, response);
    let took = arrived.elapsed();
    app.metrics.observe(route, response.status(), took);
    if app.config.log.access_log {
        log_access(&parts, &response, received, took, &trace);
    }
    if !span.is_disabled() {
        let (status, micros) = (response.status().as_u16(), took.as_micros() as u64);
        span.in_scope(|| tracing::debug!(target: trace::TARGET, status, micros, "answered"));
    }
    slow::check(app, route, &parts, response.status(), took, &stages.times(), &trace);
    response
}

/// One line of the access log, when the answer is about to be sent. A stream's length is not known then.
fn log_access(parts: &Parts, response: &Response, received: u64, took: Duration, trace: &TraceContext) {
    let client = parts.extensions.get::<RemoteAddr>().map(|remote| tracing::field::display(remote.0));
    let (method, target, status) = (&parts.method, &parts.uri, response.status().as_u16());
    let sent = response.body().size_hint().exact();
    let micros = took.as_micros() as u64;
    tracing::info!(target: ACCESS_TARGET, client, %method, %target, status, received, sent, micros, trace_id = %trace.trace);
}

async fn dispatch(app: &Arc<App>, parts: &Parts, body: &mut RequestBody, target: Target, stages: &Stages, arrived: Instant) -> Reply {
    if parts.method == Method::OPTIONS && target.route != Route::Unknown {
        let mut response = respond::empty(StatusCode::NO_CONTENT);
        response
            .headers_mut()
            .insert(header::ALLOW, HeaderValue::from_static(target.route.allow()));
        return Ok(response);
    }
    if !target.route.allows(&parts.method) {
        return Err(route::refuse_method(&target, &parts.method, parts.uri.path()));
    }
    let params = Params::parse(parts.uri.query())?;
    let route = target.route;
    let mut call = Call {
        app,
        parts,
        body,
        route,
        argument: target.argument,
        params,
        stages,
        arrived,
    };
    let call = &mut call;
    match (route, parts.method.as_str()) {
        (Route::ShortKey | Route::Key, "PUT") => kv::put(call).await,
        (Route::ShortKey | Route::Key, "DELETE") => kv::delete(call).await,
        (Route::ShortKey | Route::Key, _) => kv::get(call).await,
        (Route::Range, "DELETE") => list::delete_range(call).await,
        (Route::Range, _) => list::list(call).await,
        (Route::Txn, _) => txn::txn(call).await,
        (Route::Watch, _) => watch::watch(call).await,
        (Route::Leases, "POST") => lease::grant(call).await,
        (Route::Leases, _) => lease::list(call).await,
        (Route::Lease, "DELETE") => lease::revoke(call).await,
        (Route::Lease, _) => lease::show(call).await,
        (Route::KeepAlive, _) => lease::keep_alive(call).await,
        (Route::Compact, _) => ops::compact(call).await,
        (Route::Hash, _) => list::hash(call).await,
        (Route::Members, "POST") => member::add(call).await,
        (Route::Members, _) => member::list(call).await,
        (Route::Replace, _) => member::replace(call).await,
        (Route::Member, "PATCH") => member::update(call).await,
        (Route::Member, _) => member::remove(call).await,
        (Route::Promote, _) => member::promote(call).await,
        (Route::Leader, "POST") => member::transfer(call).await,
        (Route::Leader, _) => member::leader(call).await,
        (Route::Root, _) => ops::welcome(call),
        (Route::Health, _) => ops::health(call).await,
        (Route::Livez, _) => ops::livez(call),
        (Route::Readyz, _) => ops::readyz(call).await,
        (Route::Status, _) => ops::status(call),
        (Route::Version, _) => ops::version(call),
        (Route::Metrics, _) => ops::metrics(call),
        (Route::OpenApi, _) => ops::openapi(call),
        (Route::DebugLog, "PUT") => ops::set_log_filter(call).await,
        (Route::DebugLog, _) => ops::log_filter(call),
        (Route::Snapshot, _) => backup::snapshot(call).await,
        (Route::Unknown, _) => Err(Problem::UnknownRoute.into()),
    }
}

/// What every answer carries.
fn finish(app: &App, route: Route, parts: &Parts, trace: &TraceContext, mut response: Response) -> Response {
    let headers = response.headers_mut();
    headers.insert(&trace::TRACEPARENT, trace.header());
    headers.insert(&respond::METCD_MEMBER, app.member.clone());
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if route.is_data() && !headers.contains_key(&respond::METCD_REVISION) {
        headers.insert(&respond::METCD_REVISION, HeaderValue::from(app.node.reader().revision()));
    }
    if parts.method == Method::HEAD {
        strip_body(&mut response);
    }
    response
}

/// A HEAD is answered as the GET would be, with its length and without its body.
fn strip_body(response: &mut Response) {
    if let Some(length) = response.body().size_hint().exact()
        && response.status() != StatusCode::NOT_MODIFIED
    {
        response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    }
    *response.body_mut() = Body::empty();
}
