//! The client API of a member that has no state yet: it asks to join, opens its log, or loads its store. It says that the process runs, so
//! that whoever looks after it does not take it for dead, however long that takes; and requests wait for the member, as they wait for a leader.

use std::convert::Infallible;
use std::future::ready;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::HttpBody;
use axum::response::Response;
use bytes::Bytes;
use http::request::Parts;
use http::{HeaderValue, Method, Request, StatusCode, header};
use tokio::sync::SetOnce;
use tokio::time::{Instant, timeout};

use super::error::{ApiError, Problem};
use super::guard::{self, Guard};
use super::params::Params;
use super::respond;
use super::route::{self, Route};
use super::{Api, Arrived};
use crate::config::Config;

/// Passes requests on to the member once it is there. Cheap to clone.
#[derive(Clone)]
pub struct Starting(Arc<Inner>);

struct Inner {
    guard: Guard,
    /// Its id; 0 while a joiner has none.
    member: Arc<AtomicU64>,
    request_timeout: Duration,
    max_timeout: Duration,
    /// `None`: it could not start.
    api: SetOnce<Option<Api>>,
}

impl Starting {
    /// For a member of this configuration and this id, which is 0 until it is known.
    pub fn new(config: &Config, member: Arc<AtomicU64>) -> Starting {
        Starting(Arc::new(Inner {
            guard: Guard::new(config),
            member,
            request_timeout: config.limits.request_timeout,
            max_timeout: config.limits.max_timeout,
            api: SetOnce::new(),
        }))
    }

    /// The member is there.
    pub fn started(&self, api: Api) {
        // It starts once.
        let _ = self.0.api.set(Some(api));
    }

    /// The member will not be there: whoever waits for it is told now.
    pub fn give_up(&self) {
        let _ = self.0.api.set(None);
    }
}

impl Inner {
    /// What can be said without the member; `Ok(None)` if it has to be waited for.
    fn answer(&self, parts: &Parts) -> Result<Option<Response>, ApiError> {
        guard::check_head(parts)?;
        self.guard.check(parts)?;
        let route = route::resolve(parts.uri.path())?.route;
        if route == Route::Livez && route.allows(&parts.method) {
            return Ok(Some(respond::with_body(StatusCode::OK, respond::TEXT, "ok\n")));
        }
        if route.is_data() {
            return Ok(None);
        }
        // Whoever asks how it is, or has it do something as a member, wants to know now.
        Err(ApiError {
            health: route == Route::Health,
            ..not_ready()
        })
    }

    fn patience(&self, parts: &Parts) -> Result<Duration, ApiError> {
        let asked = Params::parse(parts.uri.query())?.duration("timeout", false, self.max_timeout)?;
        Ok(asked.unwrap_or(self.request_timeout))
    }

    fn finish(&self, parts: &Parts, reply: Result<Response, ApiError>) -> Response {
        let mutation = !matches!(parts.method, Method::GET | Method::HEAD | Method::OPTIONS);
        let mut response = reply.unwrap_or_else(|error| error.into_response(mutation));
        let headers = response.headers_mut();
        headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        match self.member.load(Ordering::Relaxed) {
            0 => {}
            id => drop(headers.insert(&respond::METCD_MEMBER, id.into())),
        }
        if parts.method == Method::HEAD {
            super::strip_body(&mut response);
        }
        response
    }
}

fn not_ready() -> ApiError {
    let reason = "this member is starting: it joins, or opens its log and loads its store".to_owned();
    Problem::NotReady(reason).into()
}

fn not_started() -> ApiError {
    let reason = "this member ended before it had started; if nobody stopped it, its log says why".to_owned();
    Problem::NotReady(reason).into()
}

impl<B> tower::Service<Request<B>> for Starting
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
        if let Some(Some(api)) = self.0.api.get() {
            return api.clone().call(request);
        }
        let arrived = Arrived(Instant::now());
        let (parts, body) = request.into_parts();
        let inner = self.0.clone();
        let patience = match inner.answer(&parts) {
            Ok(Some(response)) => return Box::pin(ready(Ok(inner.finish(&parts, Ok(response))))),
            Ok(None) => inner.patience(&parts),
            Err(error) => Err(error),
        };
        let patience = match patience {
            Ok(patience) => patience,
            Err(error) => return Box::pin(ready(Ok(inner.finish(&parts, Err(error))))),
        };
        Box::pin(async move {
            match timeout(patience, inner.api.wait()).await {
                Ok(Some(api)) => {
                    let mut api = api.clone();
                    let mut request = Request::from_parts(parts, body);
                    // What it has waited counts.
                    request.extensions_mut().insert(arrived);
                    api.call(request).await
                }
                Ok(None) => Ok(inner.finish(&parts, Err(not_started()))),
                Err(_) => Ok(inner.finish(&parts, Err(not_ready()))),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::body::to_bytes;
    use futures_util::FutureExt as _;
    use tower::Service as _;

    use super::*;

    fn starting() -> Starting {
        Starting::new(&Config::default(), Arc::default())
    }

    fn put() -> Request<Body> {
        let request = Request::put("/k").header(header::HOST, "127.0.0.1");
        request.body(Body::from("v")).expect("a request")
    }

    #[tokio::test]
    async fn who_waits_for_a_member_that_cannot_start_is_told_so() {
        let starting = starting();
        let mut early = starting.clone().call(put());
        assert!((&mut early).now_or_never().is_none(), "it waits");
        starting.give_up();
        for answer in [early, starting.clone().call(put())] {
            let answer = answer.await.expect("infallible");
            assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
            let body = to_bytes(answer.into_body(), 1 << 16).await.expect("a body");
            let problem: serde_json::Value = serde_json::from_slice(&body).expect("JSON");
            assert_eq!(
                (&problem["code"], &problem["outcome"]),
                (&"not_ready".into(), &"not_applied".into())
            );
            assert!(problem["detail"].as_str().expect("a text").contains("ended before it had started"));
        }
    }
}
