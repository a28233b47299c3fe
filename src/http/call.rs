//! [`Call`]: one request on its way through a handler, and what most handlers need of it.

use std::future::Future;
use std::sync::Arc;

use axum::response::Response;
use bytes::Bytes;
use http::header::{HeaderMap, HeaderName, HeaderValue, IF_MATCH, IF_NONE_MATCH};
use http::request::Parts;
use prost::Message as _;
use serde::de::DeserializeOwned;
use tokio::time::{Instant, timeout_at};

use super::App;
use super::body::{BodyLimits, RequestBody};
use super::error::{ApiError, Problem};
use super::json::{self, invalid};
use super::params::Params;
use super::respond;
use super::route::Route;
use crate::node::Stages;
use crate::state::command::{Body, Conditions, Idempotency};
use crate::state::outcome::Success;

static IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Longest `Idempotency-Key`.
const MAX_IDEMPOTENCY_KEY: usize = 64;
/// While the remembered answers take as many bytes, a new key is refused as when there are too many of them.
const MAX_IDEMPOTENCY_BYTES: u64 = 256 << 20;

/// What handlers return.
pub(super) type Reply = Result<Response, ApiError>;

/// One request, parsed as far as all requests are alike.
pub(super) struct Call<'a> {
    pub(super) app: &'a Arc<App>,
    pub(super) parts: &'a Parts,
    pub(super) body: &'a mut RequestBody,
    pub(super) route: Route,
    /// The key or id in the path.
    pub(super) argument: Bytes,
    pub(super) params: Params,
    /// Where its time goes.
    pub(super) stages: &'a Stages,
    pub(super) arrived: Instant,
}

/// What a read asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Consistency {
    /// `?consistency=serializable`: the member's own state, without a quorum.
    pub(super) serializable: bool,
    /// Wait until the member has applied this revision.
    min_revision: u64,
}

impl Consistency {
    /// Goes on where an answer of this revision ended, which may have come from another member.
    pub(super) fn follow(&mut self, revision: u64) {
        // A quorum's revision is not below it, unless the revision was made up.
        if self.serializable {
            self.min_revision = self.min_revision.max(revision);
        }
    }
}

/// A command that was applied, as this request asked or as an earlier one with its key did.
pub(super) struct Applied {
    pub(super) revision: u64,
    pub(super) replayed: bool,
    pub(super) success: Success,
}

impl Applied {
    /// Completes the answer.
    pub(super) fn respond(&self, response: Response) -> Response {
        let mut response = respond::at_revision(response, self.revision);
        if self.replayed {
            response
                .headers_mut()
                .insert(&respond::IDEMPOTENT_REPLAYED, HeaderValue::from_static("true"));
        }
        response
    }
}

impl Call<'_> {
    pub(super) fn headers(&self) -> &HeaderMap {
        &self.parts.headers
    }

    /// When the head of the answer is due, by `?timeout=`.
    pub(super) fn deadline(&mut self) -> Result<Instant, ApiError> {
        let limits = &self.app.config.limits;
        let timeout = self.params.duration("timeout", false, limits.max_timeout)?;
        Ok(self.arrived + timeout.unwrap_or(limits.request_timeout))
    }

    /// `?consistency=` and `?min_revision=`.
    pub(super) fn consistency(&mut self) -> Result<Consistency, ApiError> {
        let serializable = match self.params.bytes("consistency").as_deref() {
            None | Some(b"linearizable") => false,
            Some(b"serializable") => true,
            Some(_) => return Err(invalid("`consistency` must be `linearizable` or `serializable`".to_owned())),
        };
        let min_revision = self.params.number("min_revision")?.unwrap_or(0);
        Ok(Consistency {
            serializable,
            min_revision,
        })
    }

    /// Returns when the member's state may be read as asked.
    pub(super) async fn settle(&self, consistency: Consistency, deadline: Instant) -> Result<(), ApiError> {
        let node = &self.app.node;
        if consistency.serializable {
            node.ensure_serving()?;
        } else {
            let begun = Instant::now();
            let confirmed = node.read_barrier(deadline).await;
            self.stages.note(|times| times.barrier = begun.elapsed());
            confirmed?;
        }
        if node.reader().revision() < consistency.min_revision {
            self.note_wait();
            let late = Problem::Timeout(
                "this member has not reached the revision that `min_revision` asks for, or that of the page before, within the request's timeout: does it exist (`GET /status`, `revision`)?",
            );
            self.by(deadline, late, node.reader().wait_revision(consistency.min_revision))
                .await?;
        }
        Ok(())
    }

    /// The request asked to wait: however long it takes, it is not slow.
    pub(super) fn note_wait(&self) {
        self.stages.note(|times| times.waited = true);
    }

    /// Waits for something until the deadline or the shutdown.
    pub(super) async fn by<T>(&self, deadline: Instant, late: Problem, wanted: impl Future<Output = T>) -> Result<T, ApiError> {
        tokio::select! {
            result = timeout_at(deadline, wanted) => result.map_err(|_elapsed| late.into()),
            () = self.app.node.shutting_down() => Err(Problem::ShuttingDown.into()),
        }
    }

    /// The body of a PUT: a value.
    pub(super) async fn read_value(&mut self, deadline: Instant) -> Result<Bytes, ApiError> {
        let limits = self.body_limits(self.app.config.limits.max_value_bytes, deadline);
        self.receive(limits, |max| Problem::ValueTooLarge { max }).await
    }

    /// Any other body.
    pub(super) async fn read_body(&mut self, deadline: Instant) -> Result<Bytes, ApiError> {
        let limits = self.body_limits(self.app.config.limits.max_request_bytes, deadline);
        self.receive(limits, |max| Problem::RequestTooLarge { max }).await
    }

    /// Reads the body of a request that has none to give: nothing, or `{}`. A field that would be ignored is a mistake to be told of.
    pub(super) async fn read_nothing(&mut self, deadline: Instant) -> Result<(), ApiError> {
        #[derive(serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Nothing {}
        let body = self.read_body(deadline).await?;
        if !body.is_empty() {
            let Nothing {} = super::json::parse(&body)?;
        }
        Ok(())
    }

    /// For mutations that are not about one key: a condition that is passed over would be taken for one that holds.
    pub(super) fn refuse_conditions(&self) -> Result<(), ApiError> {
        if self.headers().contains_key(IF_MATCH) || self.headers().contains_key(IF_NONE_MATCH) {
            return Err(invalid(
                "`If-Match` and `If-None-Match` are about one key; for more use the compares of `POST /v1/txn`".to_owned(),
            ));
        }
        Ok(())
    }

    async fn receive(&mut self, limits: BodyLimits, too_large: fn(u64) -> Problem) -> Result<Bytes, ApiError> {
        let begun = Instant::now();
        let body = self.body.read(limits, too_large).await;
        self.stages.note(|times| times.receive = begun.elapsed());
        body
    }

    /// A body that is JSON, whatever its `Content-Type` says.
    pub(super) async fn read_json<T: DeserializeOwned>(&mut self, deadline: Instant) -> Result<T, ApiError> {
        json::parse(&self.read_body(deadline).await?)
    }

    fn body_limits(&self, max_bytes: u64, deadline: Instant) -> BodyLimits {
        BodyLimits {
            max_bytes,
            idle: self.app.config.limits.header_timeout,
            deadline,
        }
    }

    /// The request's `Idempotency-Key` with the identity it is bound to.
    pub(super) fn idempotency(&self, conditions: Option<&Conditions>, body: &[u8]) -> Result<Option<Idempotency>, ApiError> {
        let mut keys = self.headers().get_all(&IDEMPOTENCY_KEY).iter();
        let Some(key) = keys.next() else { return Ok(None) };
        let printable = key.as_bytes().iter().all(|byte| (b' '..=b'~').contains(byte));
        if keys.next().is_some() || key.is_empty() || key.len() > MAX_IDEMPOTENCY_KEY || !printable {
            return Err(invalid(format!(
                "`Idempotency-Key` must be 1 to {MAX_IDEMPOTENCY_KEY} printable ASCII characters, given once"
            )));
        }
        Ok(Some(Idempotency {
            key: String::from_utf8_lossy(key.as_bytes()).into_owned(),
            fingerprint: self.fingerprint(conditions, body),
            max_entries: self.app.config.idempotency.max_entries,
            max_bytes: MAX_IDEMPOTENCY_BYTES,
        }))
    }

    /// Digest of method, decoded key, conditions, parameters but `timeout`, and body; every piece with its length, so that none
    /// can pass for part of another.
    fn fingerprint(&self, conditions: Option<&Conditions>, body: &[u8]) -> Bytes {
        let mut hasher = blake3::Hasher::new();
        let mut add = |piece: &[u8]| {
            hasher.update(&(piece.len() as u64).to_le_bytes());
            hasher.update(piece);
        };
        add(self.parts.method.as_str().as_bytes());
        // Both forms of a key's URL are the same request.
        let route = if self.route == Route::ShortKey { Route::Key } else { self.route };
        add(route.template().as_bytes());
        add(&self.argument);
        add(&conditions.map(Conditions::encode_to_vec).unwrap_or_default());
        add(body);
        for (name, value) in self.params.identity() {
            add(name);
            add(value);
        }
        Bytes::copy_from_slice(hasher.finalize().as_bytes())
    }

    /// Proposes a command and waits for its result.
    pub(super) async fn propose(&self, body: Body, idempotency: Option<Idempotency>, deadline: Instant) -> Result<Applied, ApiError> {
        let outcome = self.app.node.propose(body, idempotency, deadline, self.stages).await?;
        match outcome.result {
            Ok(success) => Ok(Applied {
                revision: outcome.revision,
                replayed: outcome.replayed,
                success,
            }),
            Err(refusal) => Err(ApiError {
                replayed: outcome.replayed,
                ..ApiError::at(refusal.into(), outcome.revision)
            }),
        }
    }
}

/// The result of a command is not of the command's kind: a bug, and for the client an unknown outcome.
pub(super) fn odd_result(success: &Success) -> ApiError {
    tracing::error!(?success, "a command came back with another command's result");
    Problem::Internal.into()
}
