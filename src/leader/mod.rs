//! What only the leader does: membership changes, transfers, lease clocks; and its standing duties. Requests reach it from any
//! member through [`crate::node::Node::call_leader`], relayed over the peer listener as JSON.

pub mod care;
pub mod clock;
mod duties;
mod membership;

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

pub use duties::{Duties, run as run_duties};

use clock::Renewal;

use crate::node::{PeerProgress, Shared};
use crate::state::outcome::ConflictCode;
use crate::transport::{PeerMetrics, Transport};

/// A new leader has the answers of all live members to its first heartbeats; so long a transfer waits for that.
const ANSWERS_WITHIN: Duration = Duration::from_millis(500);
const ANSWERS_POLL: Duration = Duration::from_millis(10);

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
#[expect(missing_docs, reason = "the fields say what they are")]
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
#[expect(missing_docs, reason = "the fields say what they are")]
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
#[expect(missing_docs, reason = "the fields say what they are")]
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

/// The answer to a request that was asked again because an earlier try may have carried it out.
fn found_done(request: &LeaderRequest, result: Result<LeaderReply, LeaderError>) -> Result<LeaderReply, LeaderError> {
    match (request, result) {
        (LeaderRequest::Remove { .. }, Err(LeaderError::MemberNotFound { .. })) => Ok(LeaderReply::Done),
        (
            LeaderRequest::Promote { .. },
            Err(LeaderError::Conflict {
                code: ConflictCode::NotALearner,
                ..
            }),
        ) => Ok(LeaderReply::Done),
        (_, result) => result,
    }
}

/// How long a relayed request waits before it looks for the leader again.
const RETRY: Duration = Duration::from_millis(50);

/// Carries requests to the leader, and out on the leader.
pub struct LeaderService {
    shared: Arc<Shared>,
    transport: Transport,
    /// Held by every replacement from its look at the members until the new one has entered; and by one whose new member was there before from its
    /// look at the voters to the end of the removal that follows.
    changing_voters: tokio::sync::Mutex<()>,
}

impl LeaderService {
    /// Over the shared parts of a node.
    pub fn new(shared: Arc<Shared>, transport: Transport) -> LeaderService {
        LeaderService {
            shared,
            transport,
            changing_voters: tokio::sync::Mutex::default(),
        }
    }

    /// The queues to the other members, by id.
    pub fn peer_queues(&self) -> Vec<PeerMetrics> {
        self.transport.metrics()
    }

    /// Finds the leader, waiting for one, and has it carry the request out. A leader that is lost on the way may have begun: the next
    /// one is asked the same again (every request may be repeated), and what it finds done already counts as done.
    pub async fn call(&self, request: LeaderRequest, deadline: Instant) -> Result<LeaderReply, LeaderError> {
        let mut begun = false;
        loop {
            let leader = match self.wait_for_leader(deadline).await {
                Ok(leader) => leader,
                Err(_) if begun => return Err(LeaderError::Timeout),
                Err(error) => return Err(error),
            };
            let result = if leader == self.shared.id {
                self.execute(request.clone(), deadline).await
            } else {
                let left = deadline.saturating_duration_since(Instant::now());
                // A leader that hangs keeps the connection and says nothing; the next one can answer long before the deadline.
                tokio::select! {
                    result = self.transport.call(leader, &request, left) => result,
                    () = self.another_leads(leader) => Err(LeaderError::Timeout),
                }
            };
            let result = if begun { found_done(&request, result) } else { result };
            begun |= result == Err(LeaderError::Timeout);
            match result {
                // Conflicts and the like are answers, whatever was begun before.
                Err(LeaderError::NoLeader | LeaderError::ShuttingDown | LeaderError::Timeout) if Instant::now() + RETRY < deadline => {
                    tokio::time::sleep(RETRY).await;
                }
                Err(LeaderError::NoLeader | LeaderError::ShuttingDown) if begun => return Err(LeaderError::Timeout),
                other => return other,
            }
        }
    }

    /// Carries a request out on this member; [`LeaderError::NoLeader`] if it does not lead.
    pub async fn execute(&self, request: LeaderRequest, deadline: Instant) -> Result<LeaderReply, LeaderError> {
        if self.shared.leader() != Some(self.shared.id) {
            return Err(LeaderError::NoLeader);
        }
        // A leader in quarantine is about to hand over, and what its table says of a lease may be wrong: the next one answers.
        let asks_state = matches!(request, LeaderRequest::KeepAlive { .. } | LeaderRequest::TimeToLive { .. });
        if asks_state && self.shared.reader.divergence(self.shared.id).is_some() {
            return Err(LeaderError::NoLeader);
        }
        match request {
            LeaderRequest::KeepAlive { lease } => self.keep_alive(lease, deadline).await,
            LeaderRequest::TimeToLive { lease } => self.time_to_live(lease),
            LeaderRequest::AddMember(member) => self.add_member(member, deadline).await,
            LeaderRequest::Promote { id } => self.promote(id, deadline).await,
            LeaderRequest::Remove { id, force } => self.remove(id, force, deadline).await,
            LeaderRequest::Replace { remove, add } => self.replace(remove, add, deadline).await,
            LeaderRequest::Transfer { to } => self.transfer(to, deadline).await,
            LeaderRequest::Progress => {
                let (term, _) = *self.shared.leaderships().borrow();
                Ok(LeaderReply::Progress {
                    term,
                    peers: self.shared.peers(),
                })
            }
        }
    }

    async fn wait_for_leader(&self, deadline: Instant) -> Result<u64, LeaderError> {
        let mut leaderships = self.shared.leaderships();
        let known = leaderships.wait_for(|&(_, leader)| leader != 0);
        match tokio::time::timeout_at(deadline, known).await {
            Ok(Ok(now)) => Ok(now.1),
            Ok(Err(_)) => Err(LeaderError::ShuttingDown),
            Err(_) => Err(LeaderError::NoLeader),
        }
    }

    /// Returns when a leader other than `leader` is known.
    async fn another_leads(&self, leader: u64) {
        let mut leaderships = self.shared.leaderships();
        let known = leaderships.wait_for(|&(_, now)| now != 0 && now != leader).await.is_ok();
        if !known {
            // The member is stopping; the request ends by itself.
            std::future::pending::<()>().await;
        }
    }

    /// Renews a lease: only after a quorum confirmed, later than the request came, that this member leads.
    async fn keep_alive(&self, lease: u64, deadline: Instant) -> Result<LeaderReply, LeaderError> {
        let (term, _) = *self.shared.leaderships().borrow();
        self.shared.read_barrier(deadline).await.map_err(|_| LeaderError::Timeout)?;
        if *self.shared.leaderships().borrow() != (term, self.shared.id) {
            return Err(LeaderError::NoLeader);
        }
        loop {
            let renewed = self.shared.lease_clock.lock().renew(lease, self.shared.now_ms());
            match renewed {
                Renewal::Renewed { ttl_ms } => {
                    return Ok(LeaderReply::Lease {
                        ttl_ms,
                        remaining_ms: ttl_ms,
                    });
                }
                Renewal::Gone => return Err(LeaderError::LeaseNotFound { id: lease }),
                // Its end is already on its way through the log: the answer is what becomes of that.
                Renewal::Expiring if Instant::now() < deadline => tokio::time::sleep(Duration::from_millis(10)).await,
                Renewal::Expiring => return Err(LeaderError::Timeout),
                Renewal::NotLeader => return Err(LeaderError::NoLeader),
            }
        }
    }

    fn time_to_live(&self, lease: u64) -> Result<LeaderReply, LeaderError> {
        let info = self.shared.reader.lease(lease).ok_or(LeaderError::LeaseNotFound { id: lease })?;
        let remaining_ms = self
            .shared
            .lease_clock
            .lock()
            .remaining_ms(lease, self.shared.now_ms())
            .unwrap_or(info.ttl_ms);
        Ok(LeaderReply::Lease {
            ttl_ms: info.ttl_ms,
            remaining_ms,
        })
    }

    /// Whether this member has answered lately. A leader that is new has no answer yet and waits a moment.
    async fn has_answered(&self, member: u64, deadline: Instant) -> bool {
        let until = deadline.min(Instant::now() + ANSWERS_WITHIN);
        loop {
            if member == self.shared.id || self.shared.peers().iter().any(|peer| peer.id == member && peer.active) {
                return true;
            }
            if Instant::now() >= until {
                return false;
            }
            tokio::time::sleep(ANSWERS_POLL).await;
        }
    }

    /// Hands leadership over and waits until the new leader is in place.
    async fn transfer(&self, to: u64, deadline: Instant) -> Result<LeaderReply, LeaderError> {
        let view = self.shared.view();
        if !view.voters.contains(&to) {
            let known = view.learners.contains(&to);
            return Err(if known {
                LeaderError::Conflict {
                    code: ConflictCode::UnsafeChange,
                    detail: format!("member {to} is a learner and cannot lead: promote it first"),
                }
            } else {
                LeaderError::MemberNotFound { id: to }
            });
        }
        if !self.has_answered(to, deadline).await {
            let detail = format!("member {to} has not answered within the last election timeout");
            return Err(LeaderError::Conflict {
                code: ConflictCode::UnsafeChange,
                detail,
            });
        }
        let mut leaderships = self.shared.leaderships();
        loop {
            let (term, leader) = *leaderships.borrow_and_update();
            if leader == to {
                return Ok(LeaderReply::Transferred { id: to, term });
            }
            if leader == self.shared.id {
                self.shared.send(crate::driver::Event::Transfer(to));
            }
            let changed = tokio::time::timeout_at(deadline.min(Instant::now() + Duration::from_millis(500)), leaderships.changed()).await;
            match changed {
                Ok(Err(_)) => return Err(LeaderError::ShuttingDown),
                Err(_) if Instant::now() >= deadline => return Err(LeaderError::Timeout),
                Ok(Ok(())) | Err(_) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_earlier_try_did_counts_as_done_and_a_refusal_stays_one() {
        let gone = Err(LeaderError::MemberNotFound { id: 2 });
        assert_eq!(
            found_done(&LeaderRequest::Remove { id: 2, force: false }, gone.clone()),
            Ok(LeaderReply::Done)
        );
        assert_eq!(found_done(&LeaderRequest::Promote { id: 2 }, gone.clone()), gone);
        let unsafe_change = Err(LeaderError::Conflict {
            code: ConflictCode::UnsafeChange,
            detail: String::new(),
        });
        assert_eq!(found_done(&LeaderRequest::Promote { id: 2 }, unsafe_change.clone()), unsafe_change);
    }
}
