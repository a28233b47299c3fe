//! Between the transport and the node: what the peers' requests may do here, and what the transport reports.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use raft::eraftpb::Message;
use serde_json::json;
use tokio::time::Instant;

use crate::driver::{Event, Fatal};
use crate::leader::{LeaderError, LeaderReply, LeaderRequest};
use crate::node::{Node, Phase, Role, Shared};
use crate::snapshot;
use crate::state::reader::Admission;
use crate::transport::{Busy, MEMBER_REMOVED, PeerEvents, PeerService, Refusal, SenderIdentity, Transport};

/// Messages of peers that may wait for the driver; beyond it the sender hears `429` and takes this node for unreachable.
const MAX_QUEUED_MESSAGES: usize = 16_384;

const REINCARNATED: &str = "member_reincarnated";
const UNKNOWN: &str = "unknown_member";

/// Reports of the transport: each becomes an event for the driver.
pub struct Events {
    shared: Arc<Shared>,
    intake: Arc<Intake>,
}

impl Events {
    pub fn new(shared: Arc<Shared>, intake: Arc<Intake>) -> Events {
        Events { shared, intake }
    }
}

impl PeerEvents for Events {
    fn unreachable(&self, peer: u64) {
        self.shared.send(Event::Unreachable(peer));
    }

    fn snapshot_sent(&self, peer: u64, ok: bool) {
        self.shared.send(Event::SnapshotSent { to: peer, ok });
    }

    fn answered(&self, sender: &SenderIdentity, messages: Vec<Message>) {
        // Refused or no room: lost, as any message may be; raft sends again what still matters.
        if self.intake.admit(sender).is_ok() {
            let _ = self.intake.step(messages);
        }
    }

    fn removed(&self, detail: String) {
        tracing::warn!(detail, "a peer says that this member was removed");
        self.shared.fail(Fatal::removed(self.shared.id));
    }

    fn refused(&self, _peer: u64, code: &str, detail: String) {
        // The transport has logged it. Only one refusal is final: this directory is not the one the cluster knows under this id.
        if code == REINCARNATED {
            self.shared.fail(Fatal::new(format!(
                "{detail}. This data directory is not the one the cluster knows under this id: remove the member, then start with an empty directory, a new id and --join"
            )));
        }
    }
}

/// Between two questions of a learner.
const ASK_INTERVAL: Duration = Duration::from_secs(2);

/// A voter that was removed hears of it when it campaigns. A learner never says anything by itself and would wait for ever, serving what
/// it last heard; nor does a joiner whose directory is not the one that the cluster knows. So they ask the members they know, until one
/// answers. Whoever knows better refuses, and that stops them.
pub async fn ask_whether_welcome(shared: Arc<Shared>, transport: Transport) {
    let mut phases = shared.phases();
    loop {
        tokio::select! {
            () = tokio::time::sleep(ASK_INTERVAL) => {}
            _ = phases.wait_for(|phase| *phase != Phase::Running) => return,
        }
        if shared.view().role != Role::Learner && shared.applied_index() > 0 {
            continue;
        }
        for member in transport.peers() {
            match transport.call(member, &LeaderRequest::Progress, ASK_INTERVAL).await {
                // Not the leader, or not there: another one may know.
                Err(LeaderError::NoLeader | LeaderError::Timeout) => {}
                _ => break,
            }
        }
    }
}

/// Where messages of peers come in, in requests and in answers: who may speak, and how much may wait.
pub struct Intake {
    shared: Arc<Shared>,
    /// Members whose data directory is not in the replicated table yet: bound to the first one seen.
    first_contact: Mutex<HashMap<u64, u64>>,
    queued: Arc<AtomicUsize>,
}

impl Intake {
    pub fn new(shared: Arc<Shared>) -> Intake {
        Intake {
            shared,
            first_contact: Mutex::default(),
            queued: Arc::default(),
        }
    }

    fn admit(&self, sender: &SenderIdentity) -> Result<(), Refusal> {
        let refuse = |code: &'static str, detail: String| Err(Refusal { code, detail });
        let member = sender.member;
        match self.shared.reader.admission(member) {
            // A joiner knows nobody yet: it believes whoever speaks for its cluster, until its first snapshot tells it the members.
            Admission::Uninitialized => Ok(()),
            Admission::Removed => refuse(MEMBER_REMOVED, format!("member {member} was removed from the cluster")),
            Admission::Unknown => refuse(UNKNOWN, format!("member {member} is not in the cluster")),
            Admission::Member { incarnation: 0 } => {
                let bound = *self.first_contact.lock().entry(member).or_insert(sender.incarnation);
                if bound == sender.incarnation {
                    Ok(())
                } else {
                    refuse(REINCARNATED, reincarnated(member))
                }
            }
            Admission::Member { incarnation } if incarnation == sender.incarnation => Ok(()),
            Admission::Member { .. } => refuse(REINCARNATED, reincarnated(member)),
        }
    }

    fn step(&self, messages: Vec<Message>) -> Result<(), Busy> {
        let count = messages.len();
        if self.queued.fetch_add(count, Ordering::Relaxed) > MAX_QUEUED_MESSAGES {
            self.queued.fetch_sub(count, Ordering::Relaxed);
            return Err(Busy);
        }
        self.shared.send(Event::Messages {
            messages,
            queued: Queued {
                count,
                total: self.queued.clone(),
            },
        });
        Ok(())
    }
}

/// What the peer listener asks of this node.
pub struct Service {
    node: Node,
    intake: Arc<Intake>,
    snapshot_dir: PathBuf,
}

impl Service {
    pub fn new(node: Node, intake: Arc<Intake>, snapshot_dir: PathBuf) -> Service {
        Service {
            node,
            intake,
            snapshot_dir,
        }
    }
}

impl PeerService for Service {
    fn admit(&self, sender: &SenderIdentity) -> Result<(), Refusal> {
        self.intake.admit(sender)
    }

    fn step(&self, _from: u64, messages: Vec<Message>) -> Result<(), Busy> {
        self.intake.step(messages)
    }

    fn call(&self, request: LeaderRequest, deadline: Duration) -> BoxFuture<'static, Result<LeaderReply, LeaderError>> {
        let leader = self.node.leader_service().clone();
        async move { leader.execute(request, Instant::now() + deadline).await }.boxed()
    }

    fn members(&self) -> serde_json::Value {
        let reader = self.node.reader();
        json!({ "cluster_id": format!("{:016x}", reader.cluster_id()), "members": reader.members(), "removed": reader.removed() })
    }

    fn snapshot_dir(&self) -> PathBuf {
        self.snapshot_dir.clone()
    }

    fn verify_snapshot(&self, message: &Message, file: &Path) -> Result<(), String> {
        let meta = snapshot::verify_file(file).map_err(|error| error.to_string())?;
        let announced = message.get_snapshot().get_metadata();
        if (meta.applied.index, meta.applied.term) != (announced.index, announced.term) {
            return Err(format!(
                "the file is of index {}, the message of index {}",
                meta.applied.index, announced.index
            ));
        }
        Ok(())
    }

    fn snapshot_received(&self, _from: u64, message: Message, file: PathBuf) -> Result<(), Busy> {
        self.node.shared().send(Event::SnapshotReceived { message, file });
        Ok(())
    }
}

fn reincarnated(member: u64) -> String {
    format!(
        "member {member} is known under another data directory; a wiped or copied one may have voted or acknowledged what this one forgot"
    )
}

/// Messages on their way to the driver; counted until it has taken them.
pub struct Queued {
    count: usize,
    total: Arc<AtomicUsize>,
}

impl Drop for Queued {
    fn drop(&mut self) {
        self.total.fetch_sub(self.count, Ordering::Relaxed);
    }
}
