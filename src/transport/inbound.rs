//! [`PeerServer`]: everything peers say to this node, as a service for [`crate::serve`].
//!
//! A plain service instead of a router: four paths, and the first of them is the hot path of the whole cluster.

use std::{
    convert::Infallible,
    fmt::Display,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    body::HttpBody,
    http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header},
};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use http_body_util::Full;
use serde_json::json;

use super::{
    Busy, Identity, OUTDATED, PeerService, Refusal, Transport, TransportLimits,
    lane::{LaneKind, RefusalLog},
    ride,
    snapshot_in::{ReceiveError, Receiver},
    validate,
    window::{Delivered, Streams, WindowLimits},
    wire::{self, Addressing, StreamPosition},
};
use crate::{
    leader::LeaderRequest,
    serve::{ReadBodyError, read_body},
};

/// Bodies of `POST /raft/call`.
const MAX_CALL_BYTES: usize = 1 << 20;
/// What waits for an answer no longer than this is on its way.
const UNREACHED_AFTER: Duration = Duration::from_millis(500);
/// Longest deadline a relayed request may ask for.
const MAX_CALL_DEADLINE: Duration = Duration::from_secs(600);

type Answer = Response<Full<Bytes>>;

/// The peer listener's service. Cheap to clone.
#[derive(Clone)]
pub struct PeerServer(Arc<Inner>);

struct Inner {
    service: Arc<dyn PeerService>,
    identity: Identity,
    limits: TransportLimits,
    streams: Streams,
    snapshots: Receiver,
    refusals: RefusalLog,
    /// For answers that ride.
    transport: Option<Transport>,
}

/// What comes from somebody who takes this listener for the other one.
const UNKNOWN_ROUTE: &str = "unknown_route";

/// A request that gets no `200`.
struct Problem {
    status: StatusCode,
    code: &'static str,
    detail: String,
    /// With `405`: the method that works.
    allow: Option<Method>,
}

impl Problem {
    fn new(status: StatusCode, code: &'static str, detail: impl Display) -> Problem {
        Problem {
            status,
            code,
            detail: detail.to_string(),
            allow: None,
        }
    }

    fn invalid(detail: impl Display) -> Problem {
        Problem::new(StatusCode::BAD_REQUEST, "invalid_request", detail)
    }
}

impl From<Refusal> for Problem {
    fn from(Refusal { code, detail }: Refusal) -> Self {
        Problem::new(StatusCode::PRECONDITION_FAILED, code, detail)
    }
}

impl From<Busy> for Problem {
    fn from(busy: Busy) -> Self {
        Problem::new(StatusCode::TOO_MANY_REQUESTS, "overloaded", busy)
    }
}

impl From<ReceiveError> for Problem {
    fn from(err: ReceiveError) -> Self {
        let (status, code) = match &err {
            ReceiveError::Occupied | ReceiveError::Busy => (StatusCode::TOO_MANY_REQUESTS, "overloaded"),
            ReceiveError::Malformed(_) | ReceiveError::Invalid(_) | ReceiveError::Broken(_) => (StatusCode::BAD_REQUEST, "invalid_request"),
            ReceiveError::Corrupt(_) => (StatusCode::UNPROCESSABLE_ENTITY, "corrupt_snapshot"),
            ReceiveError::Stalled(_) => (StatusCode::REQUEST_TIMEOUT, "request_timeout"),
            ReceiveError::Io(err) if err.kind() == std::io::ErrorKind::StorageFull => (StatusCode::INSUFFICIENT_STORAGE, "disk_full"),
            ReceiveError::Io(_) => (StatusCode::INTERNAL_SERVER_ERROR, "internal"),
        };
        Problem::new(status, code, err)
    }
}

impl PeerServer {
    /// Serves `service` under `identity`. With the transport that sends to the same peers, its control lanes may put what they have for
    /// a peer into the answer to that peer's own request.
    pub fn new(service: Arc<dyn PeerService>, identity: Identity, limits: TransportLimits, transport: Option<Transport>) -> PeerServer {
        let (streams, snapshots, refusals) = (Streams::default(), Receiver::new(), RefusalLog::default());
        PeerServer(Arc::new(Inner {
            service,
            identity,
            limits,
            streams,
            snapshots,
            refusals,
            transport,
        }))
    }
}

impl<B> tower::Service<Request<B>> for PeerServer
where
    B: HttpBody<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Display + Send,
{
    type Response = Answer;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Answer, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let inner = self.0.clone();
        Box::pin(async move { Ok(inner.answer(request).await.unwrap_or_else(|problem| inner.refuse(&problem))) })
    }
}

impl Inner {
    async fn answer<B>(&self, request: Request<B>) -> Result<Answer, Problem>
    where
        B: HttpBody<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Display + Send,
    {
        let (head, body) = request.into_parts();
        let wanted = match head.uri.path() {
            "/raft" | "/raft/call" | "/raft/snapshot" => Method::POST,
            "/raft/members" => Method::GET,
            _ => {
                return Err(Problem::new(
                    StatusCode::NOT_FOUND,
                    UNKNOWN_ROUTE,
                    "this is the listener for other members; clients are served at listen.client (port 3379 unless configured)",
                ));
            }
        };
        if head.method != wanted {
            return Err(Problem {
                allow: Some(wanted.clone()),
                ..Problem::new(
                    StatusCode::METHOD_NOT_ALLOWED,
                    "method_not_allowed",
                    format!("only {wanted} works here"),
                )
            });
        }
        let addressing =
            Addressing::parse(&head.headers).ok_or_else(|| Problem::invalid("the metcd-peer header is missing or malformed"))?;
        self.check_cluster(&addressing)?;
        if wanted == Method::GET {
            // 0: whoever listens here.
            if addressing.to != 0 {
                self.check_receiver(&addressing)?;
            }
            // Open to whoever knows the cluster: a founder with an empty directory asks here whether its id is taken.
            return Ok(self.signed(json_answer(StatusCode::OK, &self.service.members())));
        }
        self.check_sender(&addressing)?;
        self.check_own_boot(&addressing, &head.headers)?;
        let from = addressing.sender.member;
        match head.uri.path() {
            "/raft" => self.take_messages(from, &head.headers, body).await,
            "/raft/call" => self.relay(&head.headers, body).await,
            _ => {
                let ends = (from, self.identity.member);
                self.snapshots
                    .receive(&self.service, ends, body, self.limits.snapshot_idle_timeout)
                    .await?;
                Ok(empty_answer())
            }
        }
    }

    fn check_cluster(&self, addressing: &Addressing<'_>) -> Result<(), Refusal> {
        let (theirs, own) = (addressing.sender.cluster_id, self.identity.cluster_id);
        if theirs == own {
            return Ok(());
        }
        let detail = format!(
            "member {} belongs to cluster {own:016x}, the sender to {theirs:016x}",
            self.identity.member
        );
        self.note(
            addressing,
            Refusal {
                code: "cluster_mismatch",
                detail,
            },
        )
    }

    fn check_receiver(&self, addressing: &Addressing<'_>) -> Result<(), Refusal> {
        if addressing.to == self.identity.member {
            return Ok(());
        }
        let detail = format!(
            "this is member {}, not {}: a peer URL is wrong",
            self.identity.member, addressing.to
        );
        self.note(
            addressing,
            Refusal {
                code: "wrong_receiver",
                detail,
            },
        )
    }

    fn check_sender(&self, addressing: &Addressing<'_>) -> Result<(), Refusal> {
        self.check_receiver(addressing)?;
        if addressing.sender.member == self.identity.member {
            let detail = format!("member {} is this node itself", addressing.sender.member);
            return self.note(
                addressing,
                Refusal {
                    code: "unknown_member",
                    detail,
                },
            );
        }
        self.service
            .admit(&addressing.sender)
            .or_else(|refusal| self.note(addressing, refusal))
    }

    /// The sender counts on what a later start of this member, or another one of the same number, has acknowledged.
    fn check_own_boot(&self, addressing: &Addressing<'_>, headers: &HeaderMap) -> Result<(), Refusal> {
        if !wire::known_boot(headers).is_some_and(|known| self.service.ends_as_outdated(known)) {
            return Ok(());
        }
        let detail = format!(
            "member {} runs on an older copy of its data directory, and stops",
            self.identity.member
        );
        self.note(addressing, Refusal { code: OUTDATED, detail })
    }

    fn note(&self, addressing: &Addressing<'_>, refusal: Refusal) -> Result<(), Refusal> {
        self.refusals.note(addressing.sender.member, refusal.code, &refusal.detail);
        Err(refusal)
    }

    async fn take_messages<B>(&self, from: u64, headers: &HeaderMap, body: B) -> Result<Answer, Problem>
    where
        B: HttpBody<Data = Bytes> + Unpin,
        B::Error: Display,
    {
        let position = StreamPosition::parse(headers).map_err(Problem::invalid)?;
        // A buffer of its own, of the body's size: the entries stay slices of it for as long as raft keeps them.
        let body = read_body(body, self.limits.max_body_bytes).await.map_err(body_problem)?;
        let messages = wire::decode_batch(&body).map_err(Problem::invalid)?;
        for message in &messages {
            validate::check(message, from, self.identity.member).map_err(Problem::invalid)?;
        }
        let asks = ride::asks(&messages);
        let step = |messages| self.service.step(from, messages);
        let Some(position) = position else {
            step(messages)?;
            return Ok(self.answer_messages(from, LaneKind::Control, asks).await);
        };
        let limits = WindowLimits {
            gap_timeout: self.limits.gap_timeout,
            max_held_bytes: self.limits.max_body_bytes,
        };
        match self.streams.of(from).deliver(position, messages, body.len(), limits, step).await? {
            Delivered::Stepped => Ok(self.answer_messages(from, LaneKind::Append, asks).await),
            Delivered::Stale => Err(Problem::new(
                StatusCode::CONFLICT,
                "stale_stream",
                format!("batch {position} is no longer wanted"),
            )),
        }
    }

    /// The `200` to messages, with what the node has for the sender if that comes soon.
    async fn answer_messages(&self, from: u64, kind: LaneKind, asks: bool) -> Answer {
        let mut answer = self.answer_with_ride(from, kind, asks).await;
        let fails_for = self.transport.as_ref().and_then(|transport| transport.fails_for(from));
        if let Some(age) = fails_for.filter(|age| *age >= UNREACHED_AFTER) {
            let age_ms = u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
            answer.headers_mut().insert(wire::UNREACHED_MS, age_ms.into());
        }
        answer
    }

    async fn answer_with_ride(&self, from: u64, kind: LaneKind, asks: bool) -> Answer {
        let link = self.transport.as_ref().filter(|_| asks).and_then(|transport| transport.link(from));
        let Some(link) = link else { return empty_answer() };
        let body = link.rides.wait(kind).await;
        if body.is_empty() {
            return empty_answer();
        }
        let mut answer = Response::new(Full::new(body));
        *answer.headers_mut() = wire::own_headers(&self.identity, from);
        answer
            .headers_mut()
            .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        answer
    }

    async fn relay<B>(&self, headers: &HeaderMap, body: B) -> Result<Answer, Problem>
    where
        B: HttpBody<Data = Bytes> + Unpin,
        B::Error: Display,
    {
        let deadline_ms = headers.get(wire::DEADLINE_MS).and_then(|value| value.to_str().ok()?.parse().ok());
        let deadline = Duration::from_millis(deadline_ms.ok_or_else(|| Problem::invalid("the metcd-deadline-ms header is missing"))?);
        let body = read_body(body, MAX_CALL_BYTES).await.map_err(body_problem)?;
        let request: LeaderRequest = serde_json::from_slice(&body).map_err(Problem::invalid)?;
        let outcome = self.service.call(request, deadline.min(MAX_CALL_DEADLINE)).await;
        Ok(json_answer(StatusCode::OK, &outcome))
    }

    fn refuse(&self, problem: &Problem) -> Answer {
        tracing::debug!(status = problem.status.as_u16(), code = problem.code, detail = %problem.detail, "peer request refused");
        let Problem {
            status,
            code,
            detail,
            allow,
        } = problem;
        let title = status.canonical_reason().unwrap_or("Error");
        let mut document = json!({ "type": "about:blank", "title": title, "status": status.as_u16(), "detail": detail, "code": code });
        if *code == UNKNOWN_ROUTE {
            // A client at the wrong port is to know that nothing was done.
            document["outcome"] = "not_applied".into();
        }
        let mut answer = json_answer(*status, &document);
        answer
            .headers_mut()
            .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if let Some(allow) = allow.as_ref().and_then(|method| HeaderValue::from_str(method.as_str()).ok()) {
            answer.headers_mut().insert(header::ALLOW, allow);
        }
        self.signed(answer)
    }

    /// Says who answers, as every answer of the client listener does. What members tell each other all the time goes without.
    fn signed(&self, mut answer: Answer) -> Answer {
        let headers = answer.headers_mut();
        headers.insert(wire::MEMBER, self.identity.member.into());
        headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        answer
    }
}

fn body_problem<E: Display>(err: ReadBodyError<E>) -> Problem {
    match err {
        ReadBodyError::TooLarge => Problem::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "request_too_large",
            "the body is larger than this member takes",
        ),
        ReadBodyError::Broken(err) => Problem::invalid(err),
    }
}

fn empty_answer() -> Answer {
    Response::new(Full::new(Bytes::new()))
}

fn json_answer(status: StatusCode, value: &impl serde::Serialize) -> Answer {
    let Ok(body) = serde_json::to_vec(value) else {
        let mut failed = empty_answer();
        *failed.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
        return failed;
    };
    let mut answer = Response::new(Full::new(Bytes::from(body)));
    *answer.status_mut() = status;
    answer
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}
