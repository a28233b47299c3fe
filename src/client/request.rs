//! One request over as many attempts as its deadline and its nature allow.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use hyper::body::Incoming;
use rand::RngExt as _;
use tokio::time::{Instant, sleep, timeout_at};

use super::connection::{Failure, Received, read_whole};
use super::encode::Target;
use super::error::{ClientError, Outcome, Problem};
use super::kv::millis;
use super::{Client, json};

/// The server takes no longer timeout than this unless it is configured otherwise.
const MAX_SERVER_TIMEOUT: Duration = Duration::from_secs(60);
/// With several endpoints, no attempt that may be repeated gets more than half of the time that is left, but at least this, which is enough
/// for an election, or three quarters of a shorter time: a member that hangs does not use up the whole deadline.
const MIN_SHARE: Duration = Duration::from_secs(2);
/// The answer has this long to travel after the server's own timeout.
const TRAVEL: Duration = Duration::from_millis(250);
/// Pause after all endpoints were tried; doubled up to the maximum, with jitter.
const FIRST_PAUSE: Duration = Duration::from_millis(25);
const MAX_PAUSE: Duration = Duration::from_secs(1);

/// May a request whose outcome is in doubt be sent again?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Repeat {
    /// It changes nothing, or the same thing again.
    Harmless,
    /// It carries an idempotency key, so the server sees to it.
    Keyed,
    /// No: it is a mutation without a key.
    Never,
}

/// A request before it is sent.
#[derive(Debug, Clone)]
pub(super) struct Call {
    pub(super) method: Method,
    pub(super) target: Target,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
    repeat: Repeat,
    /// The server takes `?timeout=` here.
    timed: bool,
    /// How long the server is asked to wait for something, on top of the timeout.
    pub(super) wait: Duration,
}

impl Call {
    /// A read.
    pub(super) fn read(target: Target) -> Call {
        Call {
            method: Method::GET,
            target,
            headers: HeaderMap::new(),
            body: Bytes::new(),
            repeat: Repeat::Harmless,
            timed: true,
            wait: Duration::ZERO,
        }
    }

    /// A mutation with a fresh idempotency key.
    pub(super) fn keyed(method: Method, target: Target, body: impl Into<Bytes>) -> Call {
        let mut call = Call::once(method, target, body);
        call.repeat = Repeat::Keyed;
        if let Ok(key) = HeaderValue::try_from(format!("{:032x}", rand::rng().random::<u128>())) {
            call.headers.insert(HeaderName::from_static("idempotency-key"), key);
        }
        call
    }

    /// A mutation that is sent again only if it was surely not applied.
    pub(super) fn once(method: Method, target: Target, body: impl Into<Bytes>) -> Call {
        Call {
            method,
            body: body.into(),
            repeat: Repeat::Never,
            ..Call::read(target)
        }
    }

    /// The same as something that may be done twice.
    pub(super) fn harmless(mut self) -> Call {
        self.repeat = Repeat::Harmless;
        self
    }

    /// The same for a route that takes no `?timeout=`.
    pub(super) fn untimed(mut self) -> Call {
        self.timed = false;
        self
    }

    pub(super) fn header(mut self, name: HeaderName, value: impl AsRef<[u8]>) -> Result<Call, ClientError> {
        let value = HeaderValue::from_bytes(value.as_ref()).map_err(|error| ClientError::Invalid(error.to_string()))?;
        self.headers.insert(name, value);
        Ok(self)
    }

    pub(super) fn accept(mut self, kind: &'static str) -> Call {
        self.headers.insert(header::ACCEPT, HeaderValue::from_static(kind));
        self
    }

    fn is_mutation(&self) -> bool {
        self.method != Method::GET && self.repeat != Repeat::Harmless
    }

    /// What is known if an attempt ends without an answer.
    fn outcome_in_doubt(&self) -> Outcome {
        if self.is_mutation() {
            Outcome::Unknown
        } else {
            Outcome::NotApplied
        }
    }

    /// The URL of an attempt that has `left`; `timeout` is the client's, without a wait.
    fn url(&self, base: &str, left: Duration, timeout: Duration, takes_timeouts: bool) -> String {
        let mut target = self.target.clone();
        // A second attempt waits only for what is left of the first one's time.
        let wait = left.saturating_sub(timeout).min(self.wait);
        if !self.wait.is_zero() {
            target.set("wait", millis(wait));
        }
        if self.timed && takes_timeouts {
            // The server gives up first: its answer says more than our own impatience could.
            let left = left - wait;
            let server = left.saturating_sub(TRAVEL.min(left / 4));
            target.set("timeout", millis(server.min(MAX_SERVER_TIMEOUT)));
        }
        format!("{base}{}", target.as_str())
    }
}

/// A whole answer, 2xx or 304.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

impl Answer {
    pub(super) fn revision(&self) -> Result<u64, ClientError> {
        number(&self.headers, "metcd-revision").ok_or_else(|| ClientError::Protocol("no Metcd-Revision".to_owned()))
    }

    pub(super) fn json<T: serde::de::DeserializeOwned>(&self) -> Result<T, ClientError> {
        json::parse(&self.body)
    }
}

pub(super) fn number(headers: &HeaderMap, name: &str) -> Option<u64> {
    headers.get(name)?.to_str().ok()?.parse().ok()
}

/// How one attempt went wrong.
struct Mishap {
    error: ClientError,
    /// Nothing of this attempt has or will have an effect.
    harmless: bool,
    /// It is no use to ask again, here or elsewhere.
    is_final: bool,
    not_connected: bool,
}

/// Where a request stands between its attempts.
struct Attempts {
    deadline: Instant,
    endpoint: usize,
    tried: usize,
    pause: Duration,
    /// An attempt was made whose outcome is not known.
    in_doubt: bool,
    /// The last attempt may have said how long the server is to take.
    named_timeout: bool,
    /// Endpoints that could not be connected to since one could, and why.
    refused: BTreeMap<usize, String>,
}

impl Client {
    /// Sends a request and reads the whole answer; everything but 2xx and 304 is an error.
    pub(super) async fn answer(&self, call: &Call) -> Result<Answer, ClientError> {
        self.repeat(call, async |client, call, endpoint, until| {
            let received = client.attempt(call, endpoint, until).await?;
            let Received { status, headers, body } = received;
            let body = match timeout_at(until, read_whole(body)).await {
                Ok(Ok(body)) => body,
                Ok(Err(failure)) => return Err(client.mishap(call, endpoint, failure)),
                Err(_elapsed) => return Err(client.too_late(call)),
            };
            judge(call, status, headers, body)
        })
        .await
    }

    /// Sends a request and returns with the head of a 2xx answer, its body still to come.
    pub(super) async fn stream(&self, call: &Call) -> Result<Received<Incoming>, ClientError> {
        self.repeat(call, async |client, call, endpoint, until| {
            let received = client.attempt(call, endpoint, until).await?;
            if received.status.is_success() {
                return Ok(received);
            }
            let body = match timeout_at(until, read_whole(received.body)).await {
                Ok(Ok(body)) => body,
                Ok(Err(failure)) => return Err(client.mishap(call, endpoint, failure)),
                Err(_elapsed) => return Err(client.too_late(call)),
            };
            match judge(call, received.status, received.headers, body) {
                Err(mishap) => Err(mishap),
                Ok(answer) => Err(Mishap::fatal(ClientError::Protocol(format!("status {}", answer.status)))),
            }
        })
        .await
    }

    async fn repeat<T>(
        &self,
        call: &Call,
        attempt: impl AsyncFn(&Client, &Call, usize, Instant) -> Result<T, Mishap>,
    ) -> Result<T, ClientError> {
        let mut attempts = Attempts {
            deadline: Instant::now() + self.timeout + call.wait,
            endpoint: self.endpoints.preferred(),
            tried: 0,
            pause: FIRST_PAUSE,
            in_doubt: false,
            named_timeout: true,
            refused: BTreeMap::new(),
        };
        loop {
            let until = self.share(call, attempts.deadline);
            attempts.named_timeout = self.endpoints.takes_timeout(attempts.endpoint);
            let mishap = match attempt(self, call, attempts.endpoint, until).await {
                Ok(done) => return Ok(done),
                Err(mishap) => mishap,
            };
            self.after_mishap(call, &mut attempts, mishap).await?;
        }
    }

    /// Decides whether to go on; an error is the request's result.
    async fn after_mishap(&self, call: &Call, attempts: &mut Attempts, mishap: Mishap) -> Result<(), ClientError> {
        if is_timeout_refused(&mishap.error) && attempts.named_timeout {
            self.endpoints.leave_timeout_to_server(attempts.endpoint);
            return Ok(());
        }
        let allowed = mishap.harmless || call.repeat != Repeat::Never;
        attempts.in_doubt |= !mishap.harmless && call.is_mutation();
        if mishap.not_connected {
            let why = format!("{}: {}", self.endpoints.url(attempts.endpoint), mishap.error);
            attempts.refused.insert(attempts.endpoint, why);
        } else {
            attempts.refused.clear();
        }
        attempts.tried += 1;
        let whole_round = attempts.tried.is_multiple_of(self.endpoints.len());
        let all_refused = attempts.refused.len() >= self.endpoints.len() && !attempts.in_doubt;
        let pause = if whole_round { attempts.next_pause() } else { Duration::ZERO };
        let no_time = Instant::now() + pause >= attempts.deadline;
        if mishap.is_final || !allowed || all_refused || no_time {
            let error = match mishap.not_connected {
                true => ClientError::Unreachable(attempts.refused.values().map(String::as_str).collect::<Vec<_>>().join(", ")),
                false => mishap.error,
            };
            return Err(if attempts.in_doubt { error.unsettle() } else { error });
        }
        attempts.endpoint = self.endpoints.after(attempts.endpoint);
        sleep(pause).await;
        Ok(())
    }

    /// Until when the next attempt may take.
    fn share(&self, call: &Call, deadline: Instant) -> Instant {
        if call.repeat == Repeat::Never || self.endpoints.len() == 1 || !call.wait.is_zero() {
            return deadline;
        }
        let now = Instant::now();
        let left = deadline.saturating_duration_since(now);
        now + (left / 2).max(MIN_SHARE.min(left * 3 / 4))
    }

    /// One attempt, to the head of the answer.
    async fn attempt(&self, call: &Call, endpoint: usize, until: Instant) -> Result<Received<Incoming>, Mishap> {
        let left = until.saturating_duration_since(Instant::now());
        let url = call.url(
            self.endpoints.url(endpoint),
            left,
            self.timeout,
            self.endpoints.takes_timeout(endpoint),
        );
        let opened = self.connections.open(&url, &call.method, &call.headers, call.body.clone());
        match timeout_at(until, opened).await {
            Ok(Ok(received)) => Ok(received),
            Ok(Err(failure)) => Err(self.mishap(call, endpoint, failure)),
            Err(_elapsed) => Err(self.too_late(call)),
        }
    }

    fn mishap(&self, call: &Call, endpoint: usize, failure: Failure) -> Mishap {
        match failure {
            Failure::NotConnected(cause) => Mishap {
                error: ClientError::Invalid(cause),
                harmless: true,
                is_final: false,
                not_connected: true,
            },
            Failure::Malformed(cause) => Mishap::fatal(ClientError::Invalid(cause)),
            Failure::Broken(cause) => Mishap {
                error: ClientError::Lost {
                    endpoint: self.endpoints.url(endpoint).to_owned(),
                    cause,
                    outcome: call.outcome_in_doubt(),
                },
                harmless: false,
                is_final: false,
                not_connected: false,
            },
        }
    }

    fn too_late(&self, call: &Call) -> Mishap {
        Mishap {
            error: ClientError::Deadline {
                timeout: self.timeout + call.wait,
                outcome: call.outcome_in_doubt(),
            },
            harmless: false,
            is_final: false,
            not_connected: false,
        }
    }
}

impl Attempts {
    fn next_pause(&mut self) -> Duration {
        let pause = self.pause.mul_f64(rand::rng().random_range(0.5..1.0));
        self.pause = (self.pause * 2).min(MAX_PAUSE);
        pause
    }
}

/// The server allows less than is usual (`limits.max_timeout`); its own default is as good.
fn is_timeout_refused(error: &ClientError) -> bool {
    let refused = |problem: &Problem| problem.status == 400 && problem.detail.starts_with("`timeout` must be at most");
    error.problem().is_some_and(refused)
}

impl Mishap {
    fn fatal(error: ClientError) -> Mishap {
        Mishap {
            error,
            harmless: true,
            is_final: true,
            not_connected: false,
        }
    }
}

/// An answer or a refusal, and whether the refusal is worth another attempt.
fn judge(call: &Call, status: StatusCode, headers: HeaderMap, body: Bytes) -> Result<Answer, Mishap> {
    if status.is_success() || status == StatusCode::NOT_MODIFIED {
        return Ok(Answer { status, headers, body });
    }
    let problem = Problem::read(status, &headers, &body);
    let busy = matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE);
    let late = status == StatusCode::GATEWAY_TIMEOUT;
    // A refusal without a word on the outcome (a proxy's 503) leaves a mutation in doubt.
    let harmless = !call.is_mutation() || problem.outcome == Some(Outcome::NotApplied);
    let outcome = problem.outcome.or((!harmless).then_some(Outcome::Unknown));
    Err(Mishap {
        error: ClientError::Refused(Box::new(Problem { outcome, ..problem })),
        harmless,
        is_final: !busy && !late,
        not_connected: false,
    })
}
