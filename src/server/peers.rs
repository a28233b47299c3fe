//! Between the transport and the node: what the peers' requests may do here, and what the transport reports.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use raft::eraftpb::Message;
use serde::Deserialize as _;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::admission::{Introduction, MemberTable, REINCARNATED};
use crate::driver::{Event, Fatal};
use crate::leader::{LeaderError, LeaderReply, LeaderRequest};
use crate::node::{Node, Phase, Shared};
use crate::snapshot;
use crate::state::reader::Admission;
use crate::transport::{Busy, PeerEvents, PeerService, Refusal, SenderIdentity, Transport};

/// Messages of peers that may wait for the driver; beyond it the sender hears `429` and takes this node for unreachable.
const MAX_QUEUED_MESSAGES: usize = 16_384;

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

    fn answered(&self, sender: &SenderIdentity<'_>, messages: Vec<Message>) {
        // Refused or no room: lost, as any message may be; raft sends again what still matters.
        if self.intake.admit(sender).is_ok() {
            let _ = self.intake.step(messages);
        }
    }

    fn unreached(&self, peer: u64, age: Option<Duration>) {
        self.shared.note_unreached(peer, age);
    }

    fn removed(&self, detail: String) {
        tracing::debug!(detail, "a peer says that this member was removed");
        self.shared.send(Event::ToldRemoved);
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

/// Between two questions.
const ASK_INTERVAL: Duration = Duration::from_secs(1);

/// A voter that was removed without hearing of it does when it campaigns. Three others never say anything by themselves, and would wait
/// in vain: a learner, which would serve what it last heard; a joiner whose directory is not the one that the cluster knows; and a member
/// that knows of its removal, and stays until nobody needs its vote any more. So they ask, the leader first. Whoever knows better
/// refuses, and that stops them.
pub async fn ask_whether_welcome(shared: Arc<Shared>, transport: Transport) {
    let mut phases = shared.phases();
    loop {
        tokio::select! {
            () = tokio::time::sleep(ASK_INTERVAL) => {}
            _ = phases.wait_for(|phase| *phase != Phase::Running) => return,
        }
        let view = shared.view();
        let is_voter = view.voters.contains(&shared.id);
        if is_voter && shared.applied_index() > 0 {
            continue;
        }
        let mut members = transport.peers();
        members.sort_by_key(|&member| Some(member) != view.leader);
        for member in members {
            match transport.call(member, &LeaderRequest::Progress, ASK_INTERVAL).await {
                // Not the leader, or not there: another one may know.
                Err(LeaderError::NoLeader | LeaderError::Timeout) => {}
                _ => break,
            }
        }
    }
}

/// Where members that were removed come back to a member that does not lead, it asks the leader whether they may go.
pub async fn ask_who_departed(shared: Arc<Shared>, transport: Transport) {
    let mut phases = shared.phases();
    loop {
        tokio::select! {
            () = tokio::time::sleep(ASK_INTERVAL) => {}
            _ = phases.wait_for(|phase| *phase != Phase::Running) => return,
        }
        if !shared.admissions.lock().take_wish_for_departed() {
            continue;
        }
        let Some(url) = leader_url(&shared) else { continue };
        match transport
            .fetch_members(&url, ASK_INTERVAL)
            .await
            .map_err(|error| error.to_string())
            .and_then(parse_table)
        {
            Ok(table) => shared.admissions.lock().learn_departed(&table),
            Err(error) => tracing::debug!(url, error, "the leader does not say who departed"),
        }
    }
}

fn leader_url(shared: &Shared) -> Option<String> {
    let leader = shared.view().leader?;
    let members = shared.reader.members();
    members.into_iter().find(|member| member.id == leader).map(|member| member.peer_url)
}

/// Between two tables that strangers are asked for.
const INTRODUCTION_INTERVAL: Duration = Duration::from_millis(200);
/// For one such table.
const INTRODUCTION_TIMEOUT: Duration = Duration::from_secs(1);

/// Somebody who is new here, and says where it is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stranger {
    member: u64,
    incarnation: u64,
    peer_url: String,
}

/// Asks strangers for their member table, one at a time and not often, whoever makes this member do so.
pub async fn meet_strangers(shared: Arc<Shared>, transport: Transport, mut strangers: mpsc::Receiver<Stranger>) {
    while let Some(stranger) = strangers.recv().await {
        let answer = transport.fetch_members(&stranger.peer_url, INTRODUCTION_TIMEOUT).await;
        match answer.map_err(|error| error.to_string()).and_then(parse_table) {
            Ok(table) => introduce(&shared, &stranger, table),
            Err(error) => tracing::debug!(?stranger, error, "a stranger does not say who its members are"),
        }
        tokio::time::sleep(INTRODUCTION_INTERVAL).await;
    }
}

fn parse_table(answer: serde_json::Value) -> Result<MemberTable, String> {
    MemberTable::deserialize(answer).map_err(|error| error.to_string())
}

fn introduce(shared: &Shared, stranger: &Stranger, table: MemberTable) {
    let from = (stranger.member, stranger.incarnation);
    let applied_index = table.applied_index;
    match shared.admissions.lock().introduce(&shared.reader, from, table) {
        Introduction::Accepted => tracing::info!(?stranger, applied_index, "learned of newer members"),
        Introduction::Removed => {
            tracing::info!(?stranger, "newer members say that this member was removed");
            shared.send(Event::ToldRemoved);
        }
        Introduction::Refused(why) => tracing::debug!(?stranger, why, "a stranger's member table proves nothing"),
    }
}

/// Where messages of peers come in, in requests and in answers: who may speak, and how much may wait.
pub struct Intake {
    shared: Arc<Shared>,
    /// To [`meet_strangers`]. Full: one waits to be asked already, and who is not asked now speaks again.
    strangers: mpsc::Sender<Stranger>,
    queued: Arc<AtomicUsize>,
}

impl Intake {
    pub fn new(shared: Arc<Shared>, strangers: mpsc::Sender<Stranger>) -> Intake {
        Intake {
            shared,
            strangers,
            queued: Arc::default(),
        }
    }

    fn admit(&self, sender: &SenderIdentity<'_>) -> Result<(), Refusal> {
        self.maybe_meet(sender);
        let shared = &self.shared;
        match shared.reader.admission(sender.member) {
            // Nearly every request: no lock.
            Admission::Member { incarnation } if incarnation != 0 && incarnation == sender.incarnation => Ok(()),
            Admission::Member { .. } | Admission::Uninitialized | Admission::Removed | Admission::Unknown => {
                shared.admissions.lock().admit(&shared.reader, sender, || shared.view())
            }
        }
    }

    fn maybe_meet(&self, sender: &SenderIdentity<'_>) {
        let shared = &self.shared;
        let is_led = shared.is_led();
        if is_led && shared.applied_index() > 0 {
            return;
        }
        if shared.admissions.lock().wants_introduction(&shared.reader, sender, is_led)
            && let Some(peer_url) = sender.peer_url
        {
            let stranger = Stranger {
                member: sender.member,
                incarnation: sender.incarnation,
                peer_url: peer_url.to_owned(),
            };
            // Full: see there.
            let _ = self.strangers.try_send(stranger);
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
    fn admit(&self, sender: &SenderIdentity<'_>) -> Result<(), Refusal> {
        self.intake.admit(sender)
    }

    fn ends_as_outdated(&self, known: u64) -> bool {
        self.node.shared().ends_as_outdated(known)
    }

    fn step(&self, _from: u64, messages: Vec<Message>) -> Result<(), Busy> {
        self.intake.step(messages)
    }

    fn call(&self, request: LeaderRequest, deadline: Duration) -> BoxFuture<'static, Result<LeaderReply, LeaderError>> {
        let (leader, shared) = (self.node.leader_service().clone(), self.node.shared().clone());
        async move {
            tokio::select! {
                result = leader.execute(request, Instant::now() + deadline) => result,
                () = shared.given_up() => Err(LeaderError::Timeout),
            }
        }
        .boxed()
    }

    fn members(&self) -> serde_json::Value {
        // A table of plain numbers and strings always has a JSON form.
        let stopping = *self.node.shared().phases().borrow() != Phase::Running;
        let shared = self.node.shared();
        let table = shared.admissions.lock().table(&shared.reader, || shared.view(), stopping);
        serde_json::to_value(table).unwrap_or_default()
    }

    fn snapshot_dir(&self) -> PathBuf {
        self.snapshot_dir.clone()
    }

    fn verify_snapshot(&self, message: &Message, file: &Path) -> Result<(), String> {
        let meta = snapshot::verify_file(file).map_err(|error| error.to_string())?;
        let own_cluster = self.node.shared().reader.cluster_id();
        if own_cluster != 0 && meta.cluster_id != own_cluster {
            return Err(format!("the file is of cluster {:016x}", meta.cluster_id));
        }
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
