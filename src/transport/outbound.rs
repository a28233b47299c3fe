//! [`Transport`]: everything this node says to its peers.

use std::{collections::HashMap, error::Error as StdError, sync::Arc, time::Duration};

use axum::http::StatusCode;
use parking_lot::{Mutex, RwLock};
use raft::eraftpb::{Message, MessageType};
use reqwest::{Client, Url};
use tokio::runtime::Handle;

use super::{
    Identity, Peer, PeerEvents, SnapshotSource, TransportLimits, http_client,
    lane::{Destination, Lane, LaneKind, LaneMetrics, Link, Pushed, Queue, RefusalLog, read_problem},
    snapshot_out::{self, Report},
    wire,
};
use crate::leader::{LeaderError, LeaderReply, LeaderRequest};

/// How much longer than the deadline a relayed request waits for its answer: the way back.
const CALL_SLACK: Duration = Duration::from_millis(100);
/// Bodies read from peers by [`Transport::call`] and [`Transport::fetch_members`].
const MAX_ANSWER_BYTES: usize = 4 << 20;

/// Sends to the peers. Cheap to clone; the lanes end with [`Transport::set_peers`] of an empty list or with the last clone.
#[derive(Clone)]
pub struct Transport(Arc<Inner>);

struct Inner {
    identity: Identity,
    limits: Arc<TransportLimits>,
    events: Arc<dyn PeerEvents>,
    peers: RwLock<HashMap<u64, Arc<PeerHandle>>>,
    /// For what is neither message nor stream of messages: relayed requests, snapshots, the member list.
    side_client: Client,
    runtime: Handle,
    refusals: Arc<RefusalLog>,
}

struct PeerHandle {
    url: String,
    destination: Destination,
    control: Arc<Queue>,
    append: Arc<Queue>,
    link: Arc<Link>,
    snapshot_underway: Arc<Mutex<bool>>,
}

impl PeerHandle {
    fn lane(&self, kind: LaneKind) -> &Arc<Queue> {
        match kind {
            LaneKind::Control => &self.control,
            LaneKind::Append => &self.append,
        }
    }
}

impl Drop for PeerHandle {
    fn drop(&mut self) {
        self.control.close();
        self.append.close();
    }
}

/// A reading of one peer's lanes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerMetrics {
    /// The peer.
    pub peer: u64,
    /// Its control lane.
    pub control: LaneMetrics,
    /// Its append lane.
    pub append: LaneMetrics,
}

/// Why the member list of a peer could not be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FetchError {
    /// The URL is none.
    #[error("{0} is not a peer URL")]
    BadUrl(String),
    /// Nobody answered in time.
    #[error("{0}")]
    Unreachable(String),
    /// It answered something else.
    #[error("{status} {code}: {detail}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// The problem's code, e.g. `cluster_mismatch`.
        code: String,
        /// Its sentence.
        detail: String,
    },
}

impl Transport {
    /// Makes a transport without peers, whose tasks run on `runtime`.
    pub fn start(identity: Identity, limits: TransportLimits, events: Arc<dyn PeerEvents>, runtime: Handle) -> reqwest::Result<Transport> {
        Ok(Transport(Arc::new(Inner {
            side_client: http_client(&limits, 2)?,
            identity,
            limits: Arc::new(limits),
            events,
            peers: RwLock::default(),
            runtime,
            refusals: Arc::default(),
        })))
    }

    /// Replaces the peers. Those that stay at their URL keep their lanes, the others' queues are dropped. The own id is skipped.
    pub fn set_peers(&self, peers: Vec<Peer>) {
        let mut current = self.0.peers.write();
        current.retain(|id, handle| peers.iter().any(|peer| peer.id == *id && peer.url == handle.url));
        for peer in peers {
            if let Some(handle) = current.get(&peer.id) {
                handle.destination.set_known_boot(peer.boot);
                continue;
            }
            if peer.id == self.0.identity.member {
                continue;
            }
            match self.connect(&peer) {
                Ok(handle) => drop(current.insert(peer.id, Arc::new(handle))),
                Err(err) => tracing::error!(peer = peer.id, url = peer.url, error = %err, "cannot send to this peer"),
            }
        }
    }

    fn connect(&self, peer: &Peer) -> Result<PeerHandle, FetchError> {
        let inner = &self.0;
        let destination = Destination::new(&inner.identity, peer, url_of(&peer.url, "raft")?);
        let link = Arc::new(Link::default());
        let lane = |kind| {
            let queue = Arc::new(Queue::new(kind, &inner.limits));
            // A client each, so that no lane's connections serve another.
            let client =
                http_client(&inner.limits, inner.limits.append_in_flight).map_err(|err| FetchError::Unreachable(with_sources(&err)))?;
            let lane = Lane::new(
                queue.clone(),
                client,
                inner.limits.clone(),
                inner.events.clone(),
                destination.clone(),
                inner.refusals.clone(),
                link.clone(),
            );
            inner.runtime.spawn(lane.run());
            Ok(queue)
        };
        let control = lane(LaneKind::Control)?;
        let append = lane(LaneKind::Append)?;
        Ok(PeerHandle {
            url: peer.url.clone(),
            control,
            append,
            link,
            snapshot_underway: Arc::default(),
            destination,
        })
    }

    /// Queues messages for their receivers and returns. What cannot be queued is dropped and reported. A snapshot has its own way:
    /// [`send_snapshot`](Self::send_snapshot).
    pub fn send(&self, messages: Vec<Message>) {
        let peers = self.0.peers.read();
        // Woken after everything is queued, so that a lane finds all of it at once.
        let mut wake: [Option<&Arc<Queue>>; 8] = [None; 8];
        let mut waiting = 0;
        for message in messages {
            let (to, kind) = (message.to, message.get_msg_type());
            debug_assert_ne!(kind, MessageType::MsgSnapshot, "snapshots go through send_snapshot");
            let Some(peer) = peers.get(&to) else {
                // Not (or no longer) a peer with a URL: raft must not wait for it.
                self.0.events.unreachable(to);
                continue;
            };
            let queue = peer.lane(LaneKind::of(kind));
            match queue.push(message) {
                Pushed::First => match wake.get_mut(waiting) {
                    Some(slot) => (*slot, waiting) = (Some(queue), waiting + 1),
                    None => queue.wake(),
                },
                Pushed::Behind | Pushed::Down => {}
                Pushed::Full => self.0.events.unreachable(to),
            }
        }
        wake.into_iter().flatten().for_each(|queue| queue.wake());
    }

    /// Streams a snapshot to `message.to`. Reported through [`PeerEvents::snapshot_sent`] exactly once; at most one per peer is under
    /// way, a further one fails at once.
    pub fn send_snapshot(&self, message: Message, body: Box<dyn SnapshotSource>) {
        let report = Report::new(message.to, self.0.events.clone());
        let Some(peer) = self.0.peers.read().get(&message.to).cloned() else {
            return;
        };
        let Some(underway) = snapshot_out::Underway::begin(&peer.snapshot_underway) else {
            return;
        };
        let (client, limits, refusals) = (self.0.side_client.clone(), self.0.limits.clone(), self.0.refusals.clone());
        let (destination, own_events) = (peer.destination.clone(), self.0.events.clone());
        self.0.runtime.spawn(async move {
            let _underway = underway;
            match snapshot_out::send(&client, &destination, &message, body, &limits).await {
                Ok(()) => report.sent(),
                Err(snapshot_out::SendError::Refused { code, detail }) => {
                    refusals.note(destination.peer, &code, &detail);
                    if code == super::MEMBER_REMOVED {
                        own_events.removed(detail);
                    }
                }
                Err(snapshot_out::SendError::Failed { status, code, detail }) => {
                    tracing::debug!(peer = destination.peer, %status, code, detail, "snapshot not taken");
                    // Once: it is tried again and again.
                    refusals.note(destination.peer, &code, &detail);
                }
                Err(err) => tracing::warn!(peer = destination.peer, error = %err, "snapshot not sent"),
            }
        });
    }

    /// Has `to` carry out a request, if it leads. `NoLeader`: it never began (not reached, refused). `Timeout`: it may have.
    pub async fn call(&self, to: u64, request: &LeaderRequest, deadline: Duration) -> Result<LeaderReply, LeaderError> {
        let Some(peer) = self.0.peers.read().get(&to).cloned() else {
            return Err(LeaderError::NoLeader);
        };
        let url = url_of(&peer.url, "raft/call").map_err(|_| LeaderError::NoLeader)?;
        let sent = self
            .0
            .side_client
            .post(url)
            .headers(peer.destination.headers())
            .header(wire::DEADLINE_MS, deadline.as_millis().to_string())
            .timeout(deadline + CALL_SLACK)
            .json(request)
            .send()
            .await;
        let response = match sent {
            Ok(response) => response,
            Err(err) if err.is_connect() || err.is_builder() => return Err(LeaderError::NoLeader),
            Err(_) => return Err(LeaderError::Timeout),
        };
        match response.status() {
            StatusCode::OK => {}
            StatusCode::PRECONDITION_FAILED => {
                // Refused before it was begun.
                let (code, detail) = read_problem(response).await;
                self.0.refusals.note(to, &code, &detail);
                if code == super::MEMBER_REMOVED {
                    self.0.events.removed(detail);
                } else {
                    self.0.events.refused(to, &code, detail);
                }
                return Err(LeaderError::NoLeader);
            }
            status if status.is_client_error() => return Err(LeaderError::NoLeader),
            _ => return Err(LeaderError::Timeout),
        }
        let Ok(body) = read_answer(response).await else {
            return Err(LeaderError::Timeout);
        };
        serde_json::from_slice(&body).unwrap_or(Err(LeaderError::Timeout))
    }

    /// `GET /raft/members` of whoever listens at `url`, also before this node is a member.
    pub async fn fetch_members(&self, url: &str, timeout: Duration) -> Result<serde_json::Value, FetchError> {
        let unreachable = |err: &reqwest::Error| FetchError::Unreachable(with_sources(err));
        let response = self
            .0
            .side_client
            .get(url_of(url, "raft/members")?)
            .headers(wire::own_headers(&self.0.identity, 0))
            .timeout(timeout)
            .send()
            .await
            .map_err(|err| unreachable(&err))?;
        let status = response.status();
        if status != StatusCode::OK {
            let (code, detail) = read_problem(response).await;
            return Err(FetchError::Refused {
                status: status.as_u16(),
                code,
                detail,
            });
        }
        let body = read_answer(response).await.map_err(FetchError::Unreachable)?;
        serde_json::from_slice(&body).map_err(|err| FetchError::Unreachable(format!("its answer is no JSON: {err}")))
    }

    /// What the lanes to this peer have in common, if it is one.
    pub(super) fn link(&self, peer: u64) -> Option<Arc<Link>> {
        self.0.peers.read().get(&peer).map(|handle| handle.link.clone())
    }

    /// How long this node has not been able to send to this peer; `None` if it is, or has not tried. A slow link is none that fails: what
    /// waits for long on one lane may be large, and others arrive meanwhile.
    pub(super) fn fails_for(&self, peer: u64) -> Option<Duration> {
        let peers = self.0.peers.read();
        let handle = peers.get(&peer)?;
        let fails_for = handle.control.fails_for().max(handle.append.fails_for())?;
        Some(handle.link.reach.since_answer().map_or(fails_for, |since| since.min(fails_for)))
    }

    /// Whom this node sends to, ascending.
    pub fn peers(&self) -> Vec<u64> {
        let mut ids: Vec<u64> = self.0.peers.read().keys().copied().collect();
        ids.sort_unstable();
        ids
    }

    /// The current figures of all lanes, by peer id.
    pub fn metrics(&self) -> Vec<PeerMetrics> {
        let of = |(&peer, handle): (&u64, &Arc<PeerHandle>)| PeerMetrics {
            peer,
            control: handle.control.metrics(),
            append: handle.append.metrics(),
        };
        let mut all: Vec<_> = self.0.peers.read().iter().map(of).collect();
        all.sort_by_key(|metrics| metrics.peer);
        all
    }
}

/// `path` under a peer's URL.
pub(super) fn url_of(base: &str, path: &str) -> Result<Url, FetchError> {
    Url::parse(&format!("{}/{path}", base.trim_end_matches('/'))).map_err(|_| FetchError::BadUrl(base.to_owned()))
}

async fn read_answer(mut response: reqwest::Response) -> Result<Vec<u8>, String> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|err| with_sources(&err))? {
        body.extend_from_slice(&chunk);
        if body.len() > MAX_ANSWER_BYTES {
            return Err("the answer is too large".into());
        }
    }
    Ok(body)
}

/// An error with its causes: reqwest's own text stops at "error sending request".
pub fn with_sources(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text.push_str(": ");
        text.push_str(&source.to_string());
        next = source.source();
    }
    text
}
