//! What a member answers while it asks to join, opens its log and loads its store: that the process runs, and that it is not ready. Whoever
//! looks after it must not take it for dead, however long that takes.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::response::Response;
use http::{HeaderValue, Method, Request, StatusCode, Version, header};

use super::error::{ApiError, Problem};
use super::guard::Guard;
use super::respond;
use super::route::{self, Route};
use crate::config::Config;

/// `/livez` is `200`, everything else `503 not_ready`. Cheap to clone.
#[derive(Clone)]
pub struct Starting {
    guard: Arc<Guard>,
    /// Its id; a joiner may have none yet.
    member: Option<HeaderValue>,
}

impl Starting {
    /// For a member of this configuration and, if it is known, this id.
    pub fn new(config: &Config, member: Option<u64>) -> Starting {
        Starting {
            guard: Arc::new(Guard::new(config)),
            member: member.map(HeaderValue::from),
        }
    }

    fn answer<B>(&self, request: Request<B>) -> Response {
        let (parts, _) = request.into_parts();
        let is_read = matches!(parts.method, Method::GET | Method::HEAD);
        let reply = self.guard.check(&parts).and_then(|_| {
            let target = route::resolve(parts.uri.path())?;
            if target.route == Route::Livez && is_read {
                return Ok(respond::with_body(StatusCode::OK, respond::TEXT, "ok\n"));
            }
            let reason = "this member is starting: it joins, or opens its log and loads its store".to_owned();
            Err(ApiError::from(Problem::NotReady(reason)))
        });
        let mut response = reply.unwrap_or_else(|error| error.into_response(!is_read && parts.method != Method::OPTIONS));
        let headers = response.headers_mut();
        headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        if let Some(member) = &self.member {
            headers.insert(&respond::METCD_MEMBER, member.clone());
        }
        if parts.version <= Version::HTTP_11 {
            // The next request is for the member itself, on a connection of its own.
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        if parts.method == Method::HEAD {
            super::strip_body(&mut response);
        }
        response
    }
}

impl<B> tower::Service<Request<B>> for Starting {
    type Response = Response;
    type Error = Infallible;
    type Future = Ready<Result<Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        ready(Ok(self.answer(request)))
    }
}
