//! The replicated state machine: PURE. No socket, clock, disk, thread, global RNG or unordered map iteration in here; a command, its stamp
//! and the state before it decide everything (rule 12).
//!
//! [`State`] is owned by the apply thread; [`StateReader`] is its cheap, shared reading side.

pub mod command;
pub mod outcome;
pub mod reader;
pub mod watch;

use std::sync::Arc;

use raft::eraftpb::{ConfChangeV2, ConfState, Entry};

use crate::store::{KvStore, StoreError};
use command::{MemberRecord, MembershipChange};
use outcome::Outcome;
pub use reader::StateReader;

/// Who proposed a command: the key under which the waiting side is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProposalId {
    /// Member that proposed.
    pub member: u64,
    /// Its boot id.
    pub boot: u64,
    /// Sequence within the boot.
    pub seq: u64,
}

/// Where the state stands in the log.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Applied {
    /// Index of the last applied entry.
    pub index: u64,
    /// Its term.
    pub term: u64,
    /// The configuration after it.
    pub conf_state: ConfState,
}

/// A local failure while applying: the node stops with it.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The engine failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A record or a log entry cannot be decoded, or contradicts what is there.
    #[error("state: {0}")]
    Corrupt(String),
    /// An entry needs a newer feature level than this build has.
    #[error("state: entry {index} needs feature level {level}, this build has {own}: upgrade this member")]
    TooNew { index: u64, level: u32, own: u32 },
}

/// What a configuration entry came to.
#[derive(Debug, Clone, PartialEq)]
pub enum ConfDecision {
    /// Hand this to raft's `apply_conf_change`, then call [`State::finish_conf`] with the resulting `ConfState`.
    Apply(ConfChangeV2),
    /// Refused by the member table: raft is not told (`finish_conf` with the unchanged `ConfState`).
    Refuse,
}

/// The writing side.
pub struct State {
    #[allow(dead_code)]
    store: Arc<dyn KvStore>,
}

impl State {
    /// Opens what the store holds; an empty store is an uninitialised state (applied index 0, revision 1).
    pub fn open(store: Arc<dyn KvStore>) -> Result<State, StateError> {
        Ok(State { store })
    }

    /// Initialises an empty state as every founder does, identically: applied index 1, term 1, the founding members as voters.
    pub fn bootstrap(&mut self, _cluster_id: u64, _members: &[MemberRecord]) -> Result<(), StateError> {
        todo!()
    }

    /// Where the state stands.
    pub fn applied(&self) -> Applied {
        todo!()
    }

    /// Applies consecutive normal entries (including empty ones) in one atomic batch with the new applied index and term, publishes
    /// the revisions to readers and watchers, and returns the results in order. Commands already applied are left out of the results
    /// unless the caller may still wait for them (then `Refusal::AlreadyApplied`, or the recorded result).
    pub fn apply(&mut self, _entries: &[Entry]) -> Result<Vec<(ProposalId, Outcome)>, StateError> {
        todo!()
    }

    /// Looks at a configuration entry (also the empty one that leaves a joint configuration) and decides.
    pub fn begin_conf(&mut self, _entry: &Entry) -> Result<ConfDecision, StateError> {
        todo!()
    }

    /// Completes the configuration entry of [`begin_conf`](Self::begin_conf): members and `ConfState` with the applied index in one batch.
    pub fn finish_conf(&mut self, _entry: &Entry, _conf_state: ConfState) -> Result<Option<(ProposalId, Outcome)>, StateError> {
        todo!()
    }

    /// The reading side.
    pub fn reader(&self) -> StateReader {
        todo!()
    }

    /// A consistent view of everything at the applied index, O(1); read off the loop by [`crate::snapshot`].
    pub fn snapshot_view(&self) -> SnapshotView {
        todo!()
    }

    /// Removes some physically dead records (compacted and not pinned); at most about `budget` of them. Returns whether there is more.
    pub fn collect_garbage(&mut self, _budget: usize) -> Result<bool, StateError> {
        todo!()
    }
}

/// Everything a snapshot holds, as one moment: an iterator over the store's records, of one applied index.
pub struct SnapshotView {
    /// Where it stands.
    pub applied: Applied,
}

/// Decodes the membership change in the `context` of a `ConfChangeV2`.
pub fn membership_of(_change: &ConfChangeV2) -> Option<MembershipChange> {
    todo!()
}
