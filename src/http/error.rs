//! Every refusal of the client API, and the one place that knows its status code.
//!
//! The body is `application/problem+json` (RFC 9457) with a stable `code`. On a mutation it also says whether the change can still
//! happen: `outcome` is `unknown` for what may be applied now or later, `not_applied` for everything else, and it must be true.

use std::fmt::Write as _;

use axum::body::Body;
use axum::response::Response;
use http::{HeaderValue, StatusCode, header};

use super::respond;
use crate::leader::LeaderError;
use crate::node::{BarrierError, ProposeError};
use crate::state::StateError;
use crate::state::outcome::{ConflictCode, Refusal};
use crate::state::reader::ReadError;

/// What went wrong, as the client is told. The cause of an [`Internal`](Problem::Internal) is logged where it is found, never sent.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Problem {
    /// 400: malformed; the detail names the field.
    InvalidRequest(String),
    /// 400: no key, or a broken escape in it.
    InvalidKey(String),
    /// 400: a query parameter that the request does not take.
    UnknownParameter(String),
    /// 400.
    KeyTooLarge { bytes: usize },
    /// 400.
    FutureRevision { current: u64 },
    /// 403: a page of another origin.
    CrossOrigin(String),
    /// 403: a `Host` that is not this server's.
    UnknownHost(String),
    /// 404: no such key.
    NotFound,
    /// 404.
    LeaseNotFound { id: u64 },
    /// 404.
    MemberNotFound { id: u64 },
    /// 404.
    UnknownRoute,
    /// 405.
    MethodNotAllowed { allow: &'static str, detail: String },
    /// 405: the short form of a key that begins with a reserved segment.
    ReservedKey { allow: &'static str, detail: String },
    /// 408: the body did not come in time.
    RequestTimeout,
    /// 414: longer than any target that has a meaning.
    UriTooLong { bytes: usize, max: usize },
    /// 431: header fields over the bound.
    HeadersTooLarge { max: usize },
    /// 409: membership.
    Conflict { code: ConflictCode, detail: String },
    /// 410.
    Compacted { compacted_revision: u64 },
    /// 412, with the current revision of the key if it exists.
    PreconditionFailed { current: Option<u64> },
    /// 413: a value.
    ValueTooLarge { max: u64 },
    /// 413: any other body.
    RequestTooLarge { max: u64 },
    /// 422.
    IdempotencyKeyReused,
    /// 429: a queue or a table is full.
    Overloaded(&'static str),
    /// 429.
    TooManyWatchers { max: usize },
    /// 500: a bug or a failed disk.
    Internal,
    /// 503: never proposed.
    NoLeader,
    /// 503: never proposed.
    ShuttingDown,
    /// 503.
    NotReady(String),
    /// 503.
    Quarantined(String),
    /// 504: the outcome of a mutation is unknown.
    Timeout(&'static str),
    /// 507.
    QuotaExceeded(String),
}

impl Problem {
    /// Status and stable code.
    fn status_and_code(&self) -> (StatusCode, &'static str) {
        match self {
            Problem::InvalidRequest(_) => (StatusCode::BAD_REQUEST, "invalid_request"),
            Problem::InvalidKey(_) => (StatusCode::BAD_REQUEST, "invalid_key"),
            Problem::UnknownParameter(_) => (StatusCode::BAD_REQUEST, "unknown_parameter"),
            Problem::KeyTooLarge { .. } => (StatusCode::BAD_REQUEST, "key_too_large"),
            Problem::FutureRevision { .. } => (StatusCode::BAD_REQUEST, "future_revision"),
            Problem::CrossOrigin(_) => (StatusCode::FORBIDDEN, "cross_origin"),
            Problem::UnknownHost(_) => (StatusCode::FORBIDDEN, "unknown_host"),
            Problem::NotFound => (StatusCode::NOT_FOUND, "not_found"),
            Problem::LeaseNotFound { .. } => (StatusCode::NOT_FOUND, "lease_not_found"),
            Problem::MemberNotFound { .. } => (StatusCode::NOT_FOUND, "member_not_found"),
            Problem::UnknownRoute => (StatusCode::NOT_FOUND, "unknown_route"),
            Problem::MethodNotAllowed { .. } => (StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed"),
            Problem::ReservedKey { .. } => (StatusCode::METHOD_NOT_ALLOWED, "reserved_key"),
            Problem::RequestTimeout => (StatusCode::REQUEST_TIMEOUT, "request_timeout"),
            Problem::UriTooLong { .. } => (StatusCode::URI_TOO_LONG, "uri_too_long"),
            Problem::HeadersTooLarge { .. } => (StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "headers_too_large"),
            Problem::Conflict { code, .. } => (StatusCode::CONFLICT, conflict_code(*code)),
            Problem::Compacted { .. } => (StatusCode::GONE, "compacted"),
            Problem::PreconditionFailed { .. } => (StatusCode::PRECONDITION_FAILED, "precondition_failed"),
            Problem::ValueTooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, "value_too_large"),
            Problem::RequestTooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, "request_too_large"),
            Problem::IdempotencyKeyReused => (StatusCode::UNPROCESSABLE_ENTITY, "idempotency_key_reused"),
            Problem::Overloaded(_) => (StatusCode::TOO_MANY_REQUESTS, "overloaded"),
            Problem::TooManyWatchers { .. } => (StatusCode::TOO_MANY_REQUESTS, "too_many_watchers"),
            Problem::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "internal"),
            Problem::NoLeader => (StatusCode::SERVICE_UNAVAILABLE, "no_leader"),
            Problem::ShuttingDown => (StatusCode::SERVICE_UNAVAILABLE, "shutting_down"),
            Problem::NotReady(_) => (StatusCode::SERVICE_UNAVAILABLE, "not_ready"),
            Problem::Quarantined(_) => (StatusCode::SERVICE_UNAVAILABLE, "quarantined"),
            Problem::Timeout(_) => (StatusCode::GATEWAY_TIMEOUT, "timeout"),
            Problem::QuotaExceeded(_) => (StatusCode::INSUFFICIENT_STORAGE, "quota_exceeded"),
        }
    }

    /// The stable code.
    pub(super) fn code(&self) -> &'static str {
        self.status_and_code().1
    }

    /// The status.
    pub(super) fn status(&self) -> StatusCode {
        self.status_and_code().0
    }

    /// A sentence for people.
    pub(super) fn detail(&self) -> String {
        match self {
            Problem::InvalidRequest(detail)
            | Problem::InvalidKey(detail)
            | Problem::UnknownParameter(detail)
            | Problem::CrossOrigin(detail)
            | Problem::UnknownHost(detail)
            | Problem::MethodNotAllowed { detail, .. }
            | Problem::ReservedKey { detail, .. }
            | Problem::Conflict { detail, .. }
            | Problem::NotReady(detail)
            | Problem::QuotaExceeded(detail) => detail.clone(),
            Problem::KeyTooLarge { bytes } => format!("the key has {bytes} bytes, at most {} are allowed", super::route::MAX_KEY_BYTES),
            Problem::FutureRevision { current } => {
                format!("this revision is in the future: the current one is {current}")
            }
            Problem::NotFound => "there is no such key".to_owned(),
            Problem::LeaseNotFound { id } => format!("there is no lease {id} (one that `?ttl=` made belongs to its key, and is attached to nothing else)"),
            Problem::MemberNotFound { id } => format!("there is no member {id}"),
            Problem::UnknownRoute => "there is nothing here; the API is described at `/openapi.json`".to_owned(),
            Problem::UriTooLong { bytes, max } => format!("the request target has {bytes} bytes, at most {max} are allowed"),
            Problem::HeadersTooLarge { max } => format!("the header fields have more than {max} bytes"),
            Problem::RequestTimeout => "the request's body did not arrive in time".to_owned(),
            Problem::Compacted { compacted_revision } => format!(
                "history before revision {compacted_revision} is compacted: read at {compacted_revision} or later; watch from {} or later, after reading the keys anew",
                compacted_revision.saturating_add(1)
            ),
            Problem::PreconditionFailed { current: Some(current) } => {
                format!("the condition does not hold: the key is at revision {current}")
            }
            Problem::PreconditionFailed { current: None } => "the condition does not hold: there is no such key".to_owned(),
            Problem::ValueTooLarge { max } => format!("the value is larger than {max} bytes (`limits.max_value_bytes`)"),
            Problem::RequestTooLarge { max } => format!("the body is larger than {max} bytes (`limits.max_request_bytes`)"),
            Problem::IdempotencyKeyReused => {
                "this `Idempotency-Key` came before with another request: a new request needs a new one".to_owned()
            }
            Problem::Overloaded(detail) | Problem::Timeout(detail) => (*detail).to_owned(),
            Problem::TooManyWatchers { max } => format!("{max} watches and waits are open on this member (`limits.max_watchers`)"),
            Problem::Internal => "an internal error; the server's log has the cause".to_owned(),
            Problem::NoLeader => "no leader took this request within its timeout. Is there one (`GET /status`, `leader`)? Then allow more time with `?timeout=`; if not, are most of the members running? Reads with `?consistency=serializable` need no leader"
                    .to_owned(),
            Problem::ShuttingDown => "this member is shutting down".to_owned(),
            Problem::Quarantined(reason) => format!("this member is quarantined: {reason}"),
        }
    }

    /// Whether the mutation that this answers may still be applied.
    fn outcome_is_unknown(&self) -> bool {
        matches!(self, Problem::Timeout(_) | Problem::Internal)
    }

    /// Seconds for `Retry-After` where trying again is the thing to do.
    fn retry_after(&self) -> bool {
        matches!(self.status(), StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE)
    }
}

fn conflict_code(code: ConflictCode) -> &'static str {
    match code {
        ConflictCode::MemberExists => "member_exists",
        ConflictCode::MemberIdUsed => "member_id_used",
        ConflictCode::ChangeInProgress => "change_in_progress",
        ConflictCode::UnsafeChange => "unsafe_change",
        ConflictCode::NotALearner => "not_a_learner",
    }
}

/// A problem and what its answer carries besides.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ApiError {
    /// What.
    pub(super) problem: Problem,
    /// The revision the answer reflects, where one was read or made; otherwise the member's current one is sent.
    pub(super) revision: Option<u64>,
    /// `GET /health` says it in its own words too.
    pub(super) health: bool,
    /// The answer is a recorded one.
    pub(super) replayed: bool,
}

impl From<Problem> for ApiError {
    fn from(problem: Problem) -> ApiError {
        ApiError {
            problem,
            revision: None,
            health: false,
            replayed: false,
        }
    }
}

impl ApiError {
    /// With the revision it reflects.
    pub(super) fn at(problem: Problem, revision: u64) -> ApiError {
        ApiError {
            revision: Some(revision),
            ..problem.into()
        }
    }

    /// Says which part of a JSON body it is about.
    pub(super) fn within(mut self, part: &str) -> ApiError {
        if let Problem::InvalidRequest(detail) | Problem::InvalidKey(detail) = &mut self.problem {
            *detail = format!("{part}: {detail}");
        }
        self
    }

    /// The answer. `mutation`: the request would have changed something, so the body tells the outcome.
    pub(super) fn into_response(self, mutation: bool) -> Response {
        let mut response = Response::new(Body::from(self.body(mutation)));
        *response.status_mut() = self.problem.status();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some(revision) = self.revision {
            headers.insert(&respond::METCD_REVISION, HeaderValue::from(revision));
        }
        if self.replayed {
            headers.insert(&respond::IDEMPOTENT_REPLAYED, HeaderValue::from_static("true"));
        }
        if self.problem.retry_after() {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if let Problem::MethodNotAllowed { allow, .. } | Problem::ReservedKey { allow, .. } = &self.problem {
            headers.insert(header::ALLOW, HeaderValue::from_static(allow));
        }
        if let Problem::PreconditionFailed { current: Some(current) } = self.problem {
            headers.insert(header::ETAG, respond::etag(current, false));
        }
        response
    }

    fn body(&self, mutation: bool) -> String {
        let (status, code) = self.problem.status_and_code();
        let mut body = format!(
            r#"{{"type":"about:blank","title":"{}","status":{},"detail":{},"code":"{code}""#,
            status.canonical_reason().unwrap_or("Error"),
            status.as_u16(),
            serde_json::Value::from(self.problem.detail()),
        );
        if mutation {
            let outcome = if self.problem.outcome_is_unknown() {
                "unknown"
            } else {
                "not_applied"
            };
            let _ = write!(body, r#","outcome":"{outcome}""#);
        }
        if let Problem::Compacted { compacted_revision } = self.problem {
            let _ = write!(body, r#","compacted_revision":{compacted_revision}"#);
        }
        if self.health {
            let _ = write!(
                body,
                r#","health":false,"reason":{}"#,
                serde_json::Value::from(self.problem.detail())
            );
        }
        body.push('}');
        body
    }
}

impl From<ProposeError> for ApiError {
    fn from(error: ProposeError) -> ApiError {
        match error {
            ProposeError::NoLeader => Problem::NoLeader,
            ProposeError::Timeout => Problem::Timeout("the command was handed to raft, and its outcome is not known at the deadline"),
            ProposeError::Overloaded => Problem::Overloaded("the proposal queue is full"),
            ProposeError::ShuttingDown => Problem::ShuttingDown,
            ProposeError::Quarantined(reason) => Problem::Quarantined(reason),
            ProposeError::NotReady(reason) => Problem::NotReady(reason),
            ProposeError::Quota(detail) => Problem::QuotaExceeded(detail),
        }
        .into()
    }
}

impl From<BarrierError> for ApiError {
    fn from(error: BarrierError) -> ApiError {
        match error {
            BarrierError::NoLeader => Problem::NoLeader,
            BarrierError::Timeout => Problem::Timeout("a quorum did not confirm the read within the request's timeout"),
            BarrierError::ShuttingDown => Problem::ShuttingDown,
            BarrierError::Quarantined(reason) => Problem::Quarantined(reason),
            BarrierError::NotReady(reason) => Problem::NotReady(reason),
        }
        .into()
    }
}

impl From<ReadError> for ApiError {
    fn from(error: ReadError) -> ApiError {
        match error {
            ReadError::Compacted { compacted_revision } => Problem::Compacted { compacted_revision },
            ReadError::FutureRevision { current, .. } => Problem::FutureRevision { current },
            ReadError::State(StateError::Replaced) => Problem::NotReady("this member is installing a snapshot".into()),
            ReadError::State(cause) => {
                tracing::error!(%cause, "a read failed");
                Problem::Internal
            }
        }
        .into()
    }
}

impl From<LeaderError> for ApiError {
    fn from(error: LeaderError) -> ApiError {
        match error {
            LeaderError::NoLeader => Problem::NoLeader,
            LeaderError::Timeout => Problem::Timeout("not done within the request's timeout; it may still happen"),
            LeaderError::Conflict { code, detail } => Problem::Conflict { code, detail },
            LeaderError::MemberNotFound { id } => Problem::MemberNotFound { id },
            LeaderError::LeaseNotFound { id } => Problem::LeaseNotFound { id },
            LeaderError::Invalid(detail) => Problem::InvalidRequest(detail),
            LeaderError::ShuttingDown => Problem::ShuttingDown,
        }
        .into()
    }
}

impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Problem {
        match refusal {
            Refusal::NotFound => Problem::NotFound,
            Refusal::PreconditionFailed { current } => Problem::PreconditionFailed { current },
            Refusal::LeaseNotFound { id } => Problem::LeaseNotFound { id },
            Refusal::LeaseExists { id } => Problem::InvalidRequest(format!("there is a lease {id} already")),
            Refusal::RangeTooLarge { keys, max } => Problem::InvalidRequest(format!(
                "the range holds {keys} keys, at most {max} may go at once (`limits.max_range_delete`)"
            )),
            Refusal::AnswerTooLarge { max } => Problem::InvalidRequest(format!(
                "what the gets of this transaction would answer is more than {max} bytes: ask for fewer keys (`limit`), for `keys_only`, or list them with GET /v1/kv"
            )),
            Refusal::TooManyKeys { max } => Problem::InvalidRequest(format!(
                "the ranges of this transaction hold more than {max} keys, which is as many as it may look at: use narrower ranges, or GET /v1/kv"
            )),
            Refusal::IdempotencyKeyReused => Problem::IdempotencyKeyReused,
            Refusal::IdempotencyTableFull => Problem::Overloaded("the table of idempotency keys is full"),
            Refusal::FutureRevision { current } => Problem::FutureRevision { current },
            Refusal::Compacted { compacted_revision } => Problem::Compacted { compacted_revision },
            Refusal::MemberNotFound { id } => Problem::MemberNotFound { id },
            Refusal::Conflict { code, detail } => Problem::Conflict { code, detail },
            Refusal::AlreadyApplied => Problem::Timeout("the command was applied, and its result is no longer known"),
            Refusal::Void => {
                tracing::error!("a client's command came back void");
                Problem::Internal
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(error: ApiError, mutation: bool) -> serde_json::Value {
        serde_json::from_str(&error.body(mutation)).unwrap()
    }

    #[test]
    fn a_problem_has_the_members_of_rfc_9457_and_its_code() {
        let body = body(Problem::InvalidRequest("`limit` \"x\"".to_owned()).into(), false);
        assert_eq!(
            body,
            serde_json::json!({"type": "about:blank", "title": "Bad Request", "status": 400, "detail": "`limit` \"x\"", "code": "invalid_request"})
        );
    }

    #[test]
    fn the_outcome_is_unknown_only_where_the_change_may_still_happen() {
        for (problem, outcome) in [
            (Problem::Timeout("t"), "unknown"),
            (Problem::Internal, "unknown"),
            (Problem::NoLeader, "not_applied"),
            (Problem::Overloaded("o"), "not_applied"),
            (Problem::PreconditionFailed { current: None }, "not_applied"),
        ] {
            assert_eq!(body(problem.clone().into(), true)["outcome"], outcome, "{problem:?}");
            assert!(body(problem.into(), false).get("outcome").is_none());
        }
    }

    #[test]
    fn headers_follow_the_problem() {
        let failed = ApiError::at(Problem::PreconditionFailed { current: Some(7) }, 9).into_response(true);
        assert_eq!(failed.status(), 412);
        assert_eq!(failed.headers()["etag"], "\"7\"");
        assert_eq!(failed.headers()["metcd-revision"], "9");
        let full = ApiError::from(Problem::Overloaded("o")).into_response(true);
        assert_eq!(
            (full.status().as_u16(), &full.headers()["retry-after"]),
            (429, &HeaderValue::from_static("1"))
        );
        assert_eq!(full.headers()["content-type"], "application/problem+json");
    }

    #[test]
    fn compacted_names_the_revision() {
        assert_eq!(
            body(Problem::Compacted { compacted_revision: 5 }.into(), false)["compacted_revision"],
            5
        );
    }
}
