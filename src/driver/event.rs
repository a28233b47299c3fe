//! What reaches the driver, and how a node fails.

use std::path::PathBuf;
use std::sync::mpsc::SyncSender;

use raft::eraftpb::{ConfChangeV2, ConfState, Entry, Message};
use tokio::sync::oneshot;

use crate::consensus::ConfRefused;
use crate::consensus::log::FetchWish;
use crate::consensus::proposals::Proposal;
use crate::node::Applied;
use crate::server::Queued;
use crate::state::SnapshotView;
use crate::transport::Peer;
use crate::wal::LogStart;

/// Where the result of a proposal goes.
pub struct Reply(pub(crate) oneshot::Sender<Applied>);

/// Everything the driver reacts to besides the passing of time.
pub enum Event {
    /// A command; its result goes to `reply`.
    Propose {
        /// The command.
        proposal: Proposal,
        /// Where the result goes, if anybody waits.
        reply: Option<Reply>,
    },
    /// Somebody waits in [`crate::node::ReadGate`].
    ReadWanted,
    /// Admitted messages of one peer, in order.
    Messages {
        /// The messages.
        messages: Vec<Message>,
        /// Counts them as queued until it is dropped.
        queued: Queued,
    },
    /// Where the members are, as the cluster tells a joiner that has no state of its own yet.
    PeersFound(Vec<Peer>),
    /// The WAL holds everything up to this batch.
    Persisted(u64),
    /// The state machine stands here.
    Applied {
        /// Applied index.
        index: u64,
        /// Cluster time of the state.
        cluster_time_ms: u64,
        /// Own sequences that are settled.
        settled: Vec<u64>,
    },
    /// The state machine is at this configuration entry and waits for the answer (rule 22).
    ConfChange {
        /// The change.
        change: ConfChangeV2,
        /// Raft's configuration after it.
        reply: SyncSender<raft::Result<ConfState>>,
    },
    /// Propose a configuration change, if this member leads.
    ProposeConf {
        /// The change.
        change: ConfChangeV2,
        /// (index, term) of its entry.
        reply: oneshot::Sender<Result<(u64, u64), ConfRefused>>,
    },
    /// Entries read back from the WAL.
    Fetched(FetchWish, Vec<Entry>),
    /// A view of the state: for a chore, or to offer to followers.
    View {
        /// The view.
        view: Box<SnapshotView>,
        /// To be made durable.
        for_chore: bool,
    },
    /// A view of the state for a backup.
    Backup(oneshot::Sender<SnapshotView>),
    /// A snapshot arrived completely and its checksums hold.
    SnapshotReceived {
        /// Raft's message, without data.
        message: Message,
        /// The file.
        file: PathBuf,
    },
    /// A snapshot stream ended.
    SnapshotSent {
        /// Receiver.
        to: u64,
        /// Whether it arrived.
        ok: bool,
    },
    /// A received snapshot is in the state, durably.
    Installed(LogStart),
    /// The state at this index is durable outside the log (0: it failed and is tried again later).
    Durable {
        /// Applied index.
        index: u64,
        /// Bytes of the snapshot file, 0 for a store on disk.
        bytes: u64,
    },
    /// A peer could not be reached.
    Unreachable(u64),
    /// A peer says that this member was removed.
    ToldRemoved,
    /// Hand leadership over.
    Transfer(u64),
    /// There is no quorum any more and this member stops: nobody waits for results from now on.
    GiveUp,
    /// End all threads in order.
    Stop,
}

/// Why the node cannot go on. The process ends with it: nothing more is answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Fatal {
    /// A sentence, with the way out.
    pub reason: String,
    /// What it means for the data directory.
    pub verdict: Verdict,
}

/// Whether a data directory may be started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It may: this was a failure, which may be over then.
    Startable,
    /// Not a failure of this machine, but the end of the membership.
    Removed,
    /// It lacks what its member has acknowledged, and must not vote again (rule 9).
    Outdated,
}

impl Fatal {
    /// A failure.
    pub fn new(reason: impl ToString) -> Fatal {
        Fatal {
            reason: reason.to_string(),
            verdict: Verdict::Startable,
        }
    }

    /// The data directory lacks what the member has acknowledged.
    pub fn outdated(reason: String) -> Fatal {
        Fatal {
            reason,
            verdict: Verdict::Outdated,
        }
    }

    /// The member was removed from the cluster.
    pub fn removed(id: u64) -> Fatal {
        let reason = format!(
            "member {id} was removed from the cluster and stops. Its data directory is of no further use: to come back, start with an empty one under a new id and --join"
        );
        Fatal {
            reason,
            verdict: Verdict::Removed,
        }
    }
}
