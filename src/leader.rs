//! What only the leader does: membership changes, transfers, lease clocks; and its standing duties. Requests reach it from any
//! member through [`crate::node::Node::call_leader`], relayed over the peer listener as JSON.

use serde::{Deserialize, Serialize};

use crate::node::PeerProgress;
use crate::state::outcome::ConflictCode;

/// A member to add.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewMember {
    /// Wanted id; `None`: the cluster assigns one.
    pub id: Option<u64>,
    /// Where peers reach it.
    pub peer_url: String,
    /// Where clients reach it, if known.
    pub client_url: Option<String>,
    /// Name, if known.
    pub name: Option<String>,
    /// Wanted as a voter (promoted by itself once caught up) or as a learner.
    pub voter: bool,
    /// The data directory it will come from; `None` when added by hand: bound at first contact.
    pub incarnation: Option<u64>,
}

/// Requests that the leader carries out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LeaderRequest {
    /// Renews a lease to its full ttl. Answered only by a leader proven to be one after the request arrived.
    KeepAlive { lease: u64 },
    /// Remaining ttl of a lease.
    TimeToLive { lease: u64 },
    /// `POST /members`.
    AddMember(NewMember),
    /// `POST /members/{id}/promote`.
    Promote { id: u64 },
    /// `DELETE /members/{id}`.
    Remove { id: u64, force: bool },
    /// `POST /members/replace`: answered when done, or with [`LeaderReply::Underway`] shortly before the deadline.
    Replace { remove: u64, add: NewMember },
    /// `POST /leader`: answered when the new leader is in place.
    Transfer { to: u64 },
    /// The leader's view of the members, for `GET /members`.
    Progress,
}

/// Their answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LeaderReply {
    /// Granted and remaining ttl in milliseconds.
    Lease { ttl_ms: u64, remaining_ms: u64 },
    /// The member that was added (`existed`: it was there already with the same address).
    Member { id: u64, existed: bool },
    /// The change is applied.
    Done,
    /// Accepted; the leader goes on by itself.
    Underway { id: u64 },
    /// See [`LeaderRequest::Progress`].
    Progress { term: u64, peers: Vec<PeerProgress> },
    /// Leadership is at `id` in `term`.
    Transferred { id: u64, term: u64 },
}

/// Why not. Serialised too: the relaying member passes it on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum LeaderError {
    /// No leader within the deadline; nothing was begun.
    #[error("no leader was elected within the request's timeout")]
    NoLeader,
    /// Begun, and not known to be done at the deadline.
    #[error("not done within the request's timeout; it may still happen")]
    Timeout,
    /// 409.
    #[error("{detail}")]
    Conflict { code: ConflictCode, detail: String },
    /// 404 for a member.
    #[error("there is no member {id}")]
    MemberNotFound { id: u64 },
    /// 404 for a lease.
    #[error("there is no lease {id}")]
    LeaseNotFound { id: u64 },
    /// 400.
    #[error("{0}")]
    Invalid(String),
    /// The node is stopping; nothing was begun.
    #[error("the member is shutting down")]
    ShuttingDown,
}
