//! A running process: the product's protocol, state machine, log and lease clock, with the threads around them played by events.
//!
//! It does what `src/driver` does, in the same order: [`driver`] is the loop, [`threads`] the WAL, apply and chore threads,
//! [`serve`] the requests of clients, [`duties`] what happens at each tick.

mod driver;
mod duties;
mod serve;
mod start;
mod threads;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use metcd::consensus::proposals::Proposal;
use metcd::consensus::{Consensus, Persist, View};
use metcd::leader::care::Caretaker;
use metcd::leader::clock::LeaseClock;
use metcd::node::{PeerProgress, SteadyClock};
use metcd::server::admission::Admissions;
use metcd::state::{SnapshotView, State, StateReader};
use metcd::store::MemoryStore;
use metcd::wal::LogStart;
use metcd::wal::memory::MemoryWal;
use raft::eraftpb::{ConfChangeV2, Entry, Message};

use crate::oracle::history::Auditor;
use crate::oracle::raft::Written;

pub use serve::{Renewal, Waiter};
pub use start::{founding_snapshot, peer_url};

/// What reaches the driver, as `metcd::driver::Event`.
pub enum Input {
    Propose {
        proposal: Proposal,
        call: Option<u64>,
    },
    Message(Message),
    ReadWanted,
    Persisted(u64),
    Applied {
        index: u64,
        cluster_time_ms: u64,
        settled: Vec<u64>,
    },
    ConfChange(ConfChangeV2),
    ProposeConf(ConfChangeV2),
    Fetched(metcd::consensus::log::FetchWish, Vec<Entry>),
    View {
        view: Box<SnapshotView>,
        for_chore: bool,
    },
    SnapshotReceived {
        message: Message,
        file: Arc<[u8]>,
    },
    SnapshotSent {
        to: u64,
        ok: bool,
    },
    Installed(LogStart),
    Durable {
        index: u64,
    },
    Unreachable(u64),
    ToldRemoved,
    Transfer(u64),
}

/// Work for the WAL thread.
pub enum WalJob {
    Persist(Persist),
    Compact(LogStart),
    Fetch(metcd::consensus::log::FetchWish),
}

/// Work for the apply thread.
pub enum ApplyJob {
    Entries(Vec<Entry>),
    View(bool),
    Install { file: Arc<[u8]>, start: LogStart },
}

/// Work for the chore thread, one at a time.
pub enum Chore {
    /// Write a snapshot file of this view; those before it go.
    Durable(Box<SnapshotView>),
    /// Remove the snapshot files before this index.
    RemoveOlder(u64),
}

/// What the apply thread is in the middle of.
pub enum Applying {
    /// A configuration entry: the driver is asked.
    Conf(Entry),
    /// The snapshot is being written, and has no name on the disk yet.
    Adopting(Arc<[u8]>, LogStart),
    /// The snapshot has its name on the disk, and is not in the store yet.
    Adopted(Arc<[u8]>, LogStart),
}

struct Offer {
    index: u64,
    view: SnapshotView,
    since_tick: u64,
    streams: usize,
}

struct Installing {
    persist: Persist,
    deferred: VecDeque<Persist>,
}

/// One process.
pub struct Process {
    pub slot: usize,
    pub id: u64,
    pub boot: u64,
    pub core: Consensus,
    pub state: State,
    pub reader: StateReader,
    store: Arc<MemoryStore>,
    wal: MemoryWal,
    /// The machine's clock as the process follows it.
    steady: SteadyClock,
    lease_clock: LeaseClock,
    caretaker: Caretaker,

    inbox: VecDeque<Input>,
    is_wake_due: bool,
    wal_jobs: VecDeque<WalJob>,
    /// A sync is under way; afterwards this number is reported.
    syncing: Option<u64>,
    /// The entries it covers.
    unsynced: Vec<Written>,
    apply_jobs: VecDeque<ApplyJob>,
    is_apply_due: bool,
    applying: Option<Applying>,
    settled: Vec<u64>,
    /// The first one is under way.
    chores: VecDeque<Chore>,

    ticks: u64,
    beats: usize,
    offer: Option<Offer>,
    is_view_requested: bool,
    /// A snapshot that arrived, until the state machine is at rest.
    arrived: Option<(Message, Arc<[u8]>)>,
    received: Option<(LogStart, Arc<[u8]>)>,
    installing: Option<Installing>,
    durable_index: u64,
    is_chore_running: bool,
    /// Some do not know of the commit index: they are told at the next tick.
    is_commit_unannounced: bool,
    /// Members it can send to.
    peers: Vec<u64>,
    admissions: Admissions,
    /// Who was asked for a member table and has not answered: member and data directory.
    strangers: BTreeSet<(u64, u64)>,
    may_ask_at: u64,
    /// The leader was asked who departed, and has not answered.
    asked_leader: Option<u64>,

    /// As published at the last tick.
    pub view: View,
    pub progress: Vec<PeerProgress>,
    cluster_time_ms: u64,
    pub leadership: (u64, u64),

    /// Sequence → call that waits for its outcome.
    replies: BTreeMap<u64, u64>,
    gathering: Vec<Waiter>,
    asked: BTreeMap<u64, Vec<Waiter>>,
    next_token: u64,
    waiting: Vec<(u64, Waiter)>,
    renewals: Vec<Renewal>,
    serve_from: u64,
    is_installing: bool,

    /// Sees every change of this process' state, for the oracles.
    pub auditor: Option<Auditor>,
    /// Why it cannot go on.
    pub failed: Option<Failure>,
}

/// Why a process ended by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// It was removed from the cluster.
    Removed,
    /// Its disk.
    Disk(String),
    /// Anything that must not happen.
    Bug(String),
}
