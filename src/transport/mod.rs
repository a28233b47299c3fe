//! Between the members: HTTP POSTs over `reqwest`, a listener of its own, nothing stepped that was not checked.
//!
//! Sending: [`Transport`] holds two [lanes](lane) per peer, each a bounded queue and a task with connections of its own. *Control*
//! carries what is small and may overtake (heartbeats, votes, append responses, read indexes); *append* carries what is large and
//! should stay in order (appends, forwarded proposals). Everything queued goes in one `POST /raft`.
//!
//! Receiving: [`PeerServer`] is a service for [`crate::serve`]: checks who speaks to whom, decodes, validates, restores the order of the
//! append stream ([`window`]) and hands the messages to the node's queue.
//!
//! *Invariants*
//! - `send` never blocks. A full queue, a dead or refusing peer: the messages are dropped and the peer is reported unreachable;
//!   raft retries what still matters.
//! - A body is sent at most once (rule 17): no retries here, none in `reqwest`, no redirects, no proxies.
//! - `200` means queued, never persisted. It may carry messages of the receiver, which are checked like those of a request ([`ride`]).
//! - Only a known sender, the right receiver, the right cluster and a bounded size get through (rule 27).
//! - A snapshot handed in is reported sent or failed exactly once, on every path (rule 28).
//!
//! *Missing*: TLS. The client is built in one place ([`http_client`]) and the listener's byte stream is the acceptor's, so it goes there.

pub(crate) mod fuzzing;
mod inbound;
mod lane;
mod outbound;
mod ride;
mod snapshot_in;
mod snapshot_out;
mod validate;
mod window;
mod wire;

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use raft::eraftpb::Message;

use crate::leader::{LeaderError, LeaderReply, LeaderRequest};

pub use inbound::PeerServer;
pub use lane::LaneMetrics;
pub use outbound::{FetchError, PeerMetrics, Transport, with_sources};
pub use wire::{SenderIdentity, WireError};

/// Who this node is to its peers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The cluster.
    pub cluster_id: u64,
    /// Own id; 0 before one is assigned (then only [`Transport::fetch_members`] works).
    pub member: u64,
    /// Of the data directory.
    pub incarnation: u64,
    /// Grows with every start: append streams of an earlier start never mix with this one's.
    pub boot: u64,
    /// Where this node is reached: told with every request, so that a member which does not know it can ask it who it is.
    pub peer_url: Arc<str>,
}

/// A member to send to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its id.
    pub id: u64,
    /// Its peer URL, e.g. `http://127.0.0.1:3380`.
    pub url: String,
    /// The newest start of it that this node knows of; 0 for none.
    pub boot: u64,
}

/// Sizes and times. The defaults suit an election timeout of a second.
#[derive(Debug, Clone)]
pub struct TransportLimits {
    /// Largest body of `POST /raft` that is taken. Must hold one append (`raft.max_message_bytes`) and one entry
    /// (`limits.max_request_bytes`, base64 and framing included) at once.
    pub max_body_bytes: usize,
    /// A batch is closed at this size, but always carries at least one message.
    pub batch_bytes: usize,
    /// Messages waiting per lane.
    pub queue_messages: usize,
    /// Bytes waiting per append lane (a sixteenth of it per control lane); one message always fits.
    pub queue_bytes: usize,
    /// POSTs in flight per append lane.
    pub append_in_flight: usize,
    /// Until a connection is given up.
    pub connect_timeout: Duration,
    /// Until a control POST is given up: about an election timeout, after it the content is worthless.
    pub control_timeout: Duration,
    /// Until an append POST is given up. A stopped peer holds the lane so long.
    pub append_timeout: Duration,
    /// How long the receiver waits for a batch that others overtook.
    pub gap_timeout: Duration,
    /// A snapshot transfer without any progress for so long is given up, on both sides.
    pub snapshot_idle_timeout: Duration,
    /// From the last byte of a snapshot to the receiver's word that it is verified and durable.
    pub snapshot_finish_timeout: Duration,
}

impl Default for TransportLimits {
    fn default() -> Self {
        TransportLimits {
            max_body_bytes: 32 << 20,
            batch_bytes: 1 << 20,
            queue_messages: 4096,
            queue_bytes: 64 << 20,
            append_in_flight: 4,
            connect_timeout: Duration::from_millis(500),
            control_timeout: Duration::from_secs(1),
            append_timeout: Duration::from_secs(4),
            gap_timeout: Duration::from_millis(50),
            snapshot_idle_timeout: Duration::from_secs(30),
            snapshot_finish_timeout: Duration::from_secs(300),
        }
    }
}

/// What the transport tells the driver. Implementations only enqueue.
pub trait PeerEvents: Send + Sync + 'static {
    /// Messages to this peer were lost, or it is still not reached: `RawNode::report_unreachable`.
    fn unreachable(&self, peer: u64);
    /// `RawNode::report_snapshot`; exactly once for each snapshot handed in.
    fn snapshot_sent(&self, peer: u64, ok: bool);
    /// Checked messages that came in the answer to a request. Dropped if the sender is not admitted or the queue is full.
    fn answered(&self, sender: &SenderIdentity<'_>, messages: Vec<Message>);
    /// A peer answers, and says that it has not been able to send to this node for so long; `None` after that: it is.
    fn unreached(&self, peer: u64, age: Option<Duration>);
    /// A peer knows this member as removed: the node must stop and say so.
    fn removed(&self, detail: String);
    /// A peer refuses this node (`412`) for another reason. Called each time; the transport logs it once per peer and code.
    fn refused(&self, peer: u64, code: &str, detail: String);
}

/// A request refused by who sent it; answered `412` with the code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// `cluster_mismatch`, `wrong_receiver`, `unknown_member`, `member_removed`, `member_reincarnated` or `member_outdated`.
    pub code: &'static str,
    /// A sentence.
    pub detail: String,
}

/// The code of a member that was started from an older copy of its data directory: it says so, and stops.
const OUTDATED: &str = "member_outdated";

/// Sent to a removed member: it stops on it.
pub const MEMBER_REMOVED: &str = "member_removed";

/// The node's queue is full: `429`, and the sender takes this node for unreachable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the node's queue of peer messages is full")]
pub struct Busy;

/// What the peer listener asks of the node. Cluster id and receiver are checked before any of it.
pub trait PeerService: Send + Sync + 'static {
    /// Whether the sender is a member with this incarnation. Called for every request: must be cheap.
    fn admit(&self, sender: &SenderIdentity<'_>) -> Result<(), Refusal>;
    /// A member knows of the start `known` of this node: ends it, and returns true, if it runs on an older copy of its data directory.
    fn ends_as_outdated(&self, known: u64) -> bool;
    /// Enqueues checked messages. A heartbeat's or append's commit is *not* checked against the log here.
    fn step(&self, from: u64, messages: Vec<Message>) -> Result<(), Busy>;
    /// Carries out a relayed request, if this node leads.
    fn call(&self, request: LeaderRequest, deadline: Duration) -> BoxFuture<'static, Result<LeaderReply, LeaderError>>;
    /// The members as this node knows them, for `GET /raft/members`.
    fn members(&self) -> serde_json::Value;
    /// Where incoming snapshots are put. Leftovers named `incoming-*.tmp` may be deleted at start.
    fn snapshot_dir(&self) -> PathBuf;
    /// Verifies a received snapshot from end to end. Runs on a blocking thread; the error is the reason.
    fn verify_snapshot(&self, message: &Message, file: &Path) -> Result<(), String>;
    /// A verified, durable snapshot: enqueue it (and own the file from now on).
    fn snapshot_received(&self, from: u64, message: Message, file: PathBuf) -> Result<(), Busy>;
}

/// A snapshot as it leaves: pulled on a blocking thread, a few chunks ahead of the network.
pub trait SnapshotSource: Send + 'static {
    /// The next piece, best between 64 KiB and 1 MiB; `None` at the end.
    fn next_chunk(&mut self) -> io::Result<Option<Bytes>>;
}

/// The one place that builds clients for peers. Nothing is ever sent twice or anywhere else than asked.
fn http_client(limits: &TransportLimits, max_idle: usize) -> reqwest::Result<reqwest::Client> {
    reqwest::Client::builder()
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never())
        .referer(false)
        .http1_only()
        .tcp_nodelay(true)
        .connect_timeout(limits.connect_timeout)
        .pool_max_idle_per_host(max_idle)
        // Shorter than the listener's idle timeout, so that it is this side that closes.
        .pool_idle_timeout(Duration::from_secs(60))
        .build()
}
