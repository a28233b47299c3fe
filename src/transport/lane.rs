//! One direction to one peer for one kind of message: a bounded queue and the task that posts what is in it.

use std::{
    collections::{HashSet, VecDeque},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use axum::http::{HeaderMap, HeaderValue, StatusCode, header::CONTENT_TYPE};
use bytes::Bytes;
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use parking_lot::Mutex;
use protobuf::Message as _;
use raft::eraftpb::{Message, MessageType};
use reqwest::{Client, Method, Request, Url};
use tokio::{
    sync::Notify,
    time::{Instant, sleep},
};

use super::{
    Identity, MEMBER_REMOVED, Peer, PeerEvents, TransportLimits,
    ride::Rides,
    validate,
    wire::{self, Addressing, Epoch, RECEIVER_BOOT, StreamPosition, decode_batch, encode_into, own_headers},
};

/// Below this size a lane keeps two POSTs in flight and lets the rest gather: small batches cost processor time, not bandwidth.
const SMALL_BATCH_BYTES: usize = 32 * 1024;
const SMALL_IN_FLIGHT: usize = 2;
const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const MAX_BACKOFF: Duration = Duration::from_millis(500);
/// A peer that restarts is back sooner.
const WARN_AFTER: Duration = Duration::from_secs(5);

/// The two kinds of lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LaneKind {
    /// Small messages that may overtake each other.
    Control,
    /// Large ones, kept in order.
    Append,
}

impl LaneKind {
    /// Append responses are small and raft tells stale ones: on the control lane they never wait behind a forwarded proposal.
    pub(super) fn of(kind: MessageType) -> LaneKind {
        match kind {
            MessageType::MsgAppend | MessageType::MsgPropose | MessageType::MsgSnapshot => LaneKind::Append,
            MessageType::MsgHup
            | MessageType::MsgBeat
            | MessageType::MsgAppendResponse
            | MessageType::MsgRequestVote
            | MessageType::MsgRequestVoteResponse
            | MessageType::MsgHeartbeat
            | MessageType::MsgHeartbeatResponse
            | MessageType::MsgUnreachable
            | MessageType::MsgSnapStatus
            | MessageType::MsgCheckQuorum
            | MessageType::MsgTransferLeader
            | MessageType::MsgTimeoutNow
            | MessageType::MsgReadIndex
            | MessageType::MsgReadIndexResp
            | MessageType::MsgRequestPreVote
            | MessageType::MsgRequestPreVoteResponse => LaneKind::Control,
        }
    }
}

/// Counters of a lane.
#[derive(Debug, Default)]
struct Counters {
    posts: AtomicU64,
    messages: AtomicU64,
    bytes: AtomicU64,
    rides: AtomicU64,
    dropped: AtomicU64,
    failures: AtomicU64,
}

/// A reading of a lane.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LaneMetrics {
    /// Requests sent.
    pub posts: u64,
    /// Bodies that went in the answer to a request of the peer instead.
    pub rides: u64,
    /// Messages in both.
    pub messages: u64,
    /// Bytes of both.
    pub bytes: u64,
    /// Messages dropped: queue full, or the peer down.
    pub dropped: u64,
    /// POSTs that were not answered `200`.
    pub failures: u64,
    /// Messages waiting now.
    pub queued: usize,
    /// The peer did not take the last POST.
    pub down: bool,
}

/// The queue. Full, or the peer known to be down: what comes is dropped.
pub(super) struct Queue {
    kind: LaneKind,
    waiting: Mutex<Waiting>,
    arrived: Notify,
    down: AtomicBool,
    /// When the oldest POST began that is not answered yet.
    unanswered_since: Mutex<Option<Instant>>,
    counters: Counters,
    max_messages: usize,
    max_bytes: usize,
}

#[derive(Default)]
struct Waiting {
    messages: VecDeque<(Message, usize)>,
    bytes: usize,
    down_since: Option<Instant>,
    down_until: Option<Instant>,
    closed: bool,
}

/// What became of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pushed {
    /// Queued; the lane's task must be woken.
    First,
    /// Queued behind others.
    Behind,
    /// No room: report the peer unreachable.
    Full,
    /// The peer is down and was reported.
    Down,
}

impl Queue {
    pub(super) fn new(kind: LaneKind, limits: &TransportLimits) -> Queue {
        Queue {
            kind,
            waiting: Mutex::default(),
            arrived: Notify::new(),
            down: AtomicBool::new(false),
            unanswered_since: Mutex::default(),
            counters: Counters::default(),
            max_messages: limits.queue_messages,
            max_bytes: if kind == LaneKind::Append {
                limits.queue_bytes
            } else {
                limits.queue_bytes / 16
            },
        }
    }

    pub(super) fn push(&self, message: Message) -> Pushed {
        let bytes = message.compute_size() as usize;
        let mut waiting = self.waiting.lock();
        if self.down.load(Relaxed) && waiting.down_until.is_some_and(|until| Instant::now() < until) {
            self.counters.dropped.fetch_add(1, Relaxed);
            return Pushed::Down;
        }
        let first = waiting.messages.is_empty();
        if !first && (waiting.messages.len() >= self.max_messages || waiting.bytes + bytes > self.max_bytes) {
            self.counters.dropped.fetch_add(1, Relaxed);
            return Pushed::Full;
        }
        waiting.bytes += bytes;
        waiting.messages.push_back((message, bytes));
        if first { Pushed::First } else { Pushed::Behind }
    }

    pub(super) fn wake(&self) {
        self.arrived.notify_one();
    }

    /// Ends the lane's task.
    pub(super) fn close(&self) {
        self.waiting.lock().closed = true;
        self.arrived.notify_one();
    }

    pub(super) fn metrics(&self) -> LaneMetrics {
        LaneMetrics {
            posts: self.counters.posts.load(Relaxed),
            rides: self.counters.rides.load(Relaxed),
            messages: self.counters.messages.load(Relaxed),
            bytes: self.counters.bytes.load(Relaxed),
            dropped: self.counters.dropped.load(Relaxed),
            failures: self.counters.failures.load(Relaxed),
            queued: self.waiting.lock().messages.len(),
            down: self.down.load(Relaxed),
        }
    }

    /// How long the peer has not taken what was sent: it fails, or is not answered.
    pub(super) fn fails_for(&self) -> Option<Duration> {
        let unanswered = *self.unanswered_since.lock();
        let down_since = match self.down.load(Relaxed) {
            true => self.waiting.lock().down_since,
            false => None,
        };
        let since = [unanswered, down_since].into_iter().flatten().min()?;
        Some(since.elapsed())
    }

    /// When a peer that is down is to be tried again.
    fn next_try(&self) -> Option<Instant> {
        if !self.down.load(Relaxed) {
            return None;
        }
        self.waiting.lock().down_until
    }

    /// What the next POST carries, if `in_flight` allows one.
    fn take(&self, in_flight: usize, limits: &TransportLimits) -> Taken {
        let mut waiting = self.waiting.lock();
        if waiting.closed {
            return Taken::Closed;
        }
        let slots = match self.kind {
            LaneKind::Append if waiting.bytes >= SMALL_BATCH_BYTES => limits.append_in_flight,
            LaneKind::Append | LaneKind::Control => SMALL_IN_FLIGHT.min(limits.append_in_flight),
        };
        if waiting.messages.is_empty() || in_flight >= slots.max(1) {
            return Taken::Nothing;
        }
        let (mut count, mut bytes) = (0, 0);
        for (_, size) in &waiting.messages {
            if count > 0 && bytes + size > limits.batch_bytes {
                break;
            }
            (count, bytes) = (count + 1, bytes + size);
        }
        waiting.bytes = waiting.bytes.saturating_sub(bytes);
        // The usual case: all of it, without moving a message.
        let messages = if count == waiting.messages.len() {
            std::mem::take(&mut waiting.messages)
        } else {
            waiting.messages.drain(..count).collect()
        };
        Taken::Batch { messages, bytes }
    }

    /// What began then has failed.
    fn mark_down_since(&self, began: Instant) {
        self.waiting.lock().down_since.get_or_insert(began);
    }

    /// Drops what waits, and what comes until `backoff` is over.
    fn go_down(&self, backoff: Duration) {
        let mut waiting = self.waiting.lock();
        self.counters.dropped.fetch_add(waiting.messages.len() as u64, Relaxed);
        waiting.messages.clear();
        waiting.bytes = 0;
        let now = Instant::now();
        waiting.down_since.get_or_insert(now);
        waiting.down_until = Some(now + backoff);
        self.down.store(true, Relaxed);
    }

    /// Gives how long the peer was down, if it was.
    fn come_up(&self) -> Option<Duration> {
        if !self.down.swap(false, Relaxed) {
            return None;
        }
        let mut waiting = self.waiting.lock();
        waiting.down_until = None;
        waiting.down_since.take().map(|since| since.elapsed())
    }
}

enum Taken {
    Batch {
        messages: VecDeque<(Message, usize)>,
        bytes: usize,
    },
    Nothing,
    Closed,
}

/// The peer as its lanes address it.
#[derive(Clone)]
pub(super) struct Destination {
    pub(super) peer: u64,
    pub(super) url: Url,
    /// Who speaks to whom.
    addressing: HeaderMap,
    /// The newest start of the peer that is known; 0 for none.
    known_boot: Arc<AtomicU64>,
    pub(super) identity: Identity,
}

impl Destination {
    pub(super) fn new(identity: &Identity, peer: &Peer, url: Url) -> Destination {
        Destination {
            peer: peer.id,
            url,
            addressing: own_headers(identity, peer.id),
            known_boot: Arc::new(AtomicU64::new(peer.boot)),
            identity: identity.clone(),
        }
    }

    pub(super) fn set_known_boot(&self, boot: u64) {
        self.known_boot.store(boot, Relaxed);
    }

    /// The headers of every request: who speaks to whom, and to which start of it at least.
    pub(super) fn headers(&self) -> HeaderMap {
        let mut headers = self.addressing.clone();
        let known_boot = self.known_boot.load(Relaxed);
        if known_boot != 0 {
            headers.insert(RECEIVER_BOOT, known_boot.into());
        }
        headers
    }
}

/// Messages that came in the answer to a POST, and who says so.
struct Answer {
    headers: HeaderMap,
    body: Bytes,
}

/// The task of a lane.
///
/// Once its peer is down it tries by itself to reach it, with an empty batch where nothing waits: what a follower has for its leader may
/// ride in answers for ever, and the two would not notice that the way there is closed, nor that it is open again.
pub(super) struct Lane {
    queue: Arc<Queue>,
    client: Client,
    limits: Arc<TransportLimits>,
    events: Arc<dyn PeerEvents>,
    destination: Destination,
    epoch: u64,
    seq: u64,
    backoff: Duration,
    refusals: Arc<RefusalLog>,
    link: Arc<Link>,
    /// That the peer is down was said at a level that people read.
    warned: bool,
    /// What the peer said last of its own attempts.
    is_unreached: bool,
}

/// What the lanes to a peer have in common.
#[derive(Default)]
pub(super) struct Link {
    pub(super) rides: Rides,
    pub(super) reach: Reach,
}

/// When a peer last answered a POST, on either lane.
#[derive(Default)]
pub(super) struct Reach(Mutex<Option<Instant>>);

impl Reach {
    fn note_answer(&self) {
        *self.0.lock() = Some(Instant::now());
    }

    /// How long ago that was; `None`: never.
    pub(super) fn since_answer(&self) -> Option<Duration> {
        self.0.lock().map(|at| at.elapsed())
    }
}

/// How a POST ended.
enum Outcome {
    /// What came back with it: usually nothing, or the messages that answer those sent.
    Queued {
        answer: Option<Answer>,
        /// How long the peer has not been able to send to this node.
        unreached: Option<Duration>,
    },
    /// The receiver's queue is full.
    Busy,
    /// It is there, and says no.
    Refused { code: String, detail: String },
    /// It is not there, or not well.
    Failed(String),
}

impl Lane {
    pub(super) fn new(
        queue: Arc<Queue>,
        client: Client,
        limits: Arc<TransportLimits>,
        events: Arc<dyn PeerEvents>,
        destination: Destination,
        refusals: Arc<RefusalLog>,
        link: Arc<Link>,
    ) -> Lane {
        Lane {
            queue,
            client,
            limits,
            events,
            destination,
            epoch: 0,
            seq: 0,
            backoff: FIRST_BACKOFF,
            refusals,
            link,
            warned: false,
            is_unreached: false,
        }
    }

    /// Posts until the queue is closed.
    pub(super) async fn run(mut self) {
        let timeout = match self.queue.kind {
            LaneKind::Control => self.limits.control_timeout,
            LaneKind::Append => self.limits.append_timeout,
        };
        let mut in_flight = FuturesUnordered::new();
        let mut started: VecDeque<(u64, Instant)> = VecDeque::new();
        let mut post_id = 0;
        // One timer for the lane, pushed on only when it fires: a timer per POST would cost more than the rest of the bookkeeping.
        let mut watchdog = pin!(sleep(timeout));
        let mut probe = pin!(sleep(timeout));
        loop {
            let taken = self.in_flight_for_queue(in_flight.len());
            match self.queue.take(taken, &self.limits) {
                Taken::Closed => return,
                Taken::Batch { messages, bytes } => {
                    if let Some(body) = self.encode(&messages, bytes)
                        && let Some(body) = self.ride(body)
                    {
                        let request = self.request(body);
                        post_id += 1;
                        in_flight.push(post(post_id, self.epoch, self.client.clone(), request, self.limits.max_body_bytes));
                        started.push_back((post_id, Instant::now()));
                    }
                    continue;
                }
                Taken::Nothing => {}
            }
            *self.queue.unanswered_since.lock() = started.front().map(|(_, at)| *at);
            // While one is under way its end decides.
            let next_try = self.queue.next_try().filter(|_| in_flight.is_empty());
            if let Some(at) = next_try
                && probe.deadline() != at
            {
                probe.as_mut().reset(at);
            }
            tokio::select! {
                biased;
                Some((id, epoch, outcome)) = in_flight.next(), if !in_flight.is_empty() => {
                    started.retain(|(started_id, _)| *started_id != id);
                    self.settle(epoch, outcome);
                }
                () = self.queue.arrived.notified() => {}
                () = &mut probe, if next_try.is_some() => {
                    let request = self.request(Bytes::new());
                    post_id += 1;
                    in_flight.push(post(post_id, self.epoch, self.client.clone(), request, self.limits.max_body_bytes));
                    started.push_back((post_id, Instant::now()));
                }
                () = &mut watchdog => {
                    let oldest = started.front().map_or_else(Instant::now, |(_, at)| *at);
                    if oldest.elapsed() >= timeout {
                        // The peer hangs. Dropping the requests closes their connections.
                        in_flight.clear();
                        started.clear();
                        self.queue.mark_down_since(oldest);
                        self.settle(self.epoch, Outcome::Failed(format!("no answer within {timeout:?}")));
                        watchdog.as_mut().reset(Instant::now() + timeout);
                    } else {
                        watchdog.as_mut().reset(oldest + timeout);
                    }
                }
            }
        }
    }

    /// What counts as in flight for the next batch: one that can ride takes no place.
    fn in_flight_for_queue(&self, posts: usize) -> usize {
        if self.queue.kind == LaneKind::Control && self.link.rides.is_any() {
            0
        } else {
            posts
        }
    }

    /// Sends a body in the answer to a request of the peer, if one waits; otherwise it is given back.
    fn ride(&self, body: Bytes) -> Option<Bytes> {
        if self.queue.kind != LaneKind::Control {
            return Some(body);
        }
        let returned = self.link.rides.give(body).err();
        if returned.is_none() {
            self.queue.counters.rides.fetch_add(1, Relaxed);
        }
        returned
    }

    fn encode(&self, messages: &VecDeque<(Message, usize)>, bytes: usize) -> Option<Bytes> {
        let mut body = Vec::with_capacity(bytes + 5 * messages.len());
        for (message, _) in messages {
            if let Err(err) = encode_into(&mut body, message) {
                tracing::error!(peer = self.destination.peer, error = %err, "a raft message cannot be encoded");
                self.events.unreachable(self.destination.peer);
                return None;
            }
        }
        if body.len() > self.limits.max_body_bytes {
            tracing::error!(
                peer = self.destination.peer,
                bytes = body.len(),
                "a raft message is larger than a peer takes"
            );
            self.events.unreachable(self.destination.peer);
            return None;
        }
        let counters = &self.queue.counters;
        counters.messages.fetch_add(messages.len() as u64, Relaxed);
        counters.bytes.fetch_add(body.len() as u64, Relaxed);
        Some(body.into())
    }

    fn request(&mut self, body: Bytes) -> Request {
        self.queue.counters.posts.fetch_add(1, Relaxed);
        let mut request = Request::new(Method::POST, self.destination.url.clone());
        let headers = request.headers_mut();
        *headers = self.destination.headers();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        if self.queue.kind == LaneKind::Append {
            self.seq += 1;
            let position = StreamPosition {
                epoch: Epoch {
                    boot: self.destination.identity.boot,
                    count: self.epoch,
                },
                seq: self.seq,
            };
            headers.insert(super::wire::STREAM, position.header());
        }
        *request.body_mut() = Some(body.into());
        request
    }

    /// The messages of an answer, checked as those of a request are (rule 27).
    fn take_answer(&self, answer: Answer) {
        let Destination { peer, identity, .. } = &self.destination;
        let sender = Addressing::parse(&answer.headers).filter(|addressing| {
            (addressing.sender.cluster_id, addressing.sender.member, addressing.to) == (identity.cluster_id, *peer, identity.member)
        });
        let checked = sender
            .ok_or_else(|| "it does not say that it is from this peer to this member".to_owned())
            .and_then(|addressing| {
                let messages = decode_batch(&answer.body).map_err(|err| err.to_string())?;
                messages
                    .iter()
                    .try_for_each(|message| validate::check(message, *peer, identity.member))?;
                Ok((addressing.sender, messages))
            });
        match checked {
            Ok((sender, messages)) => self.events.answered(&sender, messages),
            Err(reason) => self.refusals.note(*peer, "invalid_answer", &reason),
        }
    }

    fn come_up(&mut self) {
        if let Some(was_down) = self.queue.come_up()
            && std::mem::take(&mut self.warned)
        {
            tracing::info!(peer = self.destination.peer, url = %self.destination.url, ?was_down, "the peer is reached again");
        }
    }

    fn settle(&mut self, epoch: u64, outcome: Outcome) {
        let peer = self.destination.peer;
        if let Outcome::Queued { answer, unreached } = outcome {
            self.backoff = FIRST_BACKOFF;
            self.come_up();
            self.link.reach.note_answer();
            // Nearly always it has nothing to say, and has not had before.
            if unreached.is_some() || self.is_unreached {
                self.is_unreached = unreached.is_some();
                self.events.unreached(peer, unreached);
            }
            if let Some(answer) = answer {
                self.take_answer(answer);
            }
            return;
        }
        self.queue.counters.failures.fetch_add(1, Relaxed);
        // Whatever was lost, the receiver must not wait for it. What was sent before the last new beginning asks for no other.
        if epoch == self.epoch {
            self.epoch += 1;
            self.seq = 0;
        }
        match outcome {
            Outcome::Queued { .. } => {}
            // It is there.
            Outcome::Busy => self.come_up(),
            Outcome::Refused { code, detail } => {
                self.queue.go_down(MAX_BACKOFF);
                self.refusals.note(peer, &code, &detail);
                if code == MEMBER_REMOVED {
                    self.events.removed(detail);
                } else {
                    self.events.refused(peer, &code, detail);
                }
            }
            Outcome::Failed(reason) => {
                if !self.queue.down.load(Relaxed) {
                    tracing::debug!(peer, %reason, lane = ?self.queue.kind, "peer unreachable");
                }
                self.queue.go_down(self.backoff);
                self.backoff = (self.backoff * 2).min(MAX_BACKOFF);
                if !self.warned && self.queue.kind == LaneKind::Control && self.queue.fails_for() >= Some(WARN_AFTER) {
                    self.warned = true;
                    tracing::warn!(peer, url = %self.destination.url, %reason, "the peer cannot be reached: is it running, is this its address, is the port open?");
                }
            }
        }
        self.events.unreachable(peer);
    }
}

/// One POST. Never repeated.
async fn post(id: u64, epoch: u64, client: Client, request: Request, max_answer_bytes: usize) -> (u64, u64, Outcome) {
    let outcome = match client.execute(request).await {
        Ok(response) if response.status() == StatusCode::OK => read_messages(response, max_answer_bytes).await,
        Ok(response) if response.status() == StatusCode::TOO_MANY_REQUESTS => Outcome::Busy,
        Ok(response) if response.status() == StatusCode::PRECONDITION_FAILED => {
            let (code, detail) = read_problem(response).await;
            Outcome::Refused { code, detail }
        }
        Ok(response) => {
            let status = response.status();
            let (code, detail) = read_problem(response).await;
            Outcome::Failed(format!("{status} {code}: {detail}"))
        }
        Err(err) => Outcome::Failed(super::outbound::with_sources(&err)),
    };
    (id, epoch, outcome)
}

/// The messages that came with a `200`.
async fn read_messages(mut response: reqwest::Response, max_bytes: usize) -> Outcome {
    let unreached = wire::unreached(response.headers());
    let queued = |answer| Outcome::Queued { answer, unreached };
    if response.content_length() == Some(0) {
        return queued(None);
    }
    let headers = std::mem::take(response.headers_mut());
    let mut body = Vec::new();
    loop {
        match response.chunk().await {
            Ok(Some(chunk)) if body.len() + chunk.len() <= max_bytes => body.extend_from_slice(&chunk),
            Ok(Some(_)) => return Outcome::Failed(format!("its answer is larger than {max_bytes} bytes")),
            Ok(None) => break,
            // What was sent is queued there; the answer is lost, as any message may be.
            Err(_) => return queued(None),
        }
    }
    queued((!body.is_empty()).then(|| Answer {
        headers,
        body: body.into(),
    }))
}

/// Code and detail of a problem document, as far as there is one. At most 64 KiB are read.
pub(super) async fn read_problem(mut response: reqwest::Response) -> (String, String) {
    let mut body = Vec::new();
    while let Ok(Some(chunk)) = response.chunk().await {
        body.extend_from_slice(&chunk);
        if body.len() > 64 * 1024 {
            break;
        }
    }
    let problem: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
    let text = |name: &str| problem.get(name).and_then(|value| value.as_str()).unwrap_or_default().to_owned();
    (text("code"), text("detail"))
}

/// Logs each refusal once.
#[derive(Default)]
pub(super) struct RefusalLog(Mutex<HashSet<(u64, String)>>);

/// Refusals remembered; beyond that nothing more is logged, so that strangers cannot fill the memory or the log.
const MAX_REFUSALS: usize = 256;

impl RefusalLog {
    pub(super) fn note(&self, peer: u64, code: &str, detail: &str) {
        let mut seen = self.0.lock();
        if seen.len() < MAX_REFUSALS && seen.insert((peer, code.to_owned())) {
            tracing::warn!(peer, code, detail, "refused between peers");
        }
    }
}
