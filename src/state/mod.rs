//! The replicated state machine: PURE. No socket, clock, disk, thread, global RNG or unordered map iteration in here; a command, its stamp
//! and the state before it decide everything (rule 12).
//!
//! [`State`] is owned by the apply thread; [`StateReader`] is its cheap, shared reading side.
//!
//! In reading order: [`command`] (what comes in), `apply` (what it does), [`outcome`] (what came of it), `key`, `row` and `kv` (how versions of
//! keys lie in the store), `session`, `idempotency`, `lease`, `member` (the smaller tables), [`reader`] and [`watch`] (what others see), `gc`
//! and `view` (forgetting and copying).

mod apply;
pub mod command;
pub mod divergence;
pub(crate) mod fuzzing;
mod gc;
mod hub;
mod idempotency;
mod key;
mod kv;
pub mod lease;
mod member;
mod meta;
pub mod outcome;
pub mod reader;
mod record;
mod refound;
mod row;
mod session;
mod shared;
mod tables;
mod tally;
mod view;
pub mod watch;

use std::sync::Arc;

use bytes::Bytes;
use prost::Message;
use protobuf::Message as ProtobufMessage;
use raft::eraftpb::ConfChangeSingle;
use raft::eraftpb::{ConfChange, ConfChangeV2, ConfState, Entry, EntryType};

use crate::store::{KvStore, StoreError, WriteBatch};
use apply::{Batch, Core, Gathered, RowEvent};
use command::{HashReport, MemberRecord, MemberRole, MembershipChange};
use divergence::{Due, HASH_REPORT_INTERVAL};
use gc::Cursor;
pub use lease::LeaseChange;
use meta::ConfRecord;
use outcome::{ConflictCode, Outcome, Refusal, Success};
pub use reader::{Pin, StateReader};
pub use refound::LiveVersions;
use shared::{Published, Shared};
pub use tally::ContentTally;
pub use view::{Record, SnapshotView};

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
    /// A snapshot took the state's place while it was read: what was read is of neither. Reading again helps.
    #[error("state: it was replaced by a snapshot while it was read")]
    Replaced,
    /// An entry needs a newer feature level than this build has.
    #[error("state: entry {index} needs feature level {level}, this build has {own}: upgrade this member")]
    TooNew {
        /// Index of the entry.
        index: u64,
        /// The level it needs.
        level: u32,
        /// This build's level.
        own: u32,
    },
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
    store: Arc<dyn KvStore>,
    core: Core,
    shared: Arc<Shared>,
    garbage: Cursor,
    lease_changes: Vec<LeaseChange>,
    hash_report: Option<Due>,
}

/// A configuration entry, looked at.
struct Conf {
    raft_change: ConfChangeV2,
    change: MembershipChange,
    verdict: Result<(), Refusal>,
}

impl State {
    /// Opens what the store holds; an empty store is an uninitialised state (applied index 0, revision 1).
    pub fn open(store: Arc<dyn KvStore>) -> Result<State, StateError> {
        let mut core = Core::load(&*store)?;
        let garbage = Cursor::load(&*store)?;
        let hash_report = Due::load(&*store)?;
        let shared = Arc::new(Shared::new(store.clone(), published(&mut core)));
        Ok(State {
            store,
            core,
            shared,
            garbage,
            lease_changes: Vec::new(),
            hash_report,
        })
    }

    /// Reads the store anew after a snapshot was installed into it. Readers, watchers and waiters stay and see the new state; a
    /// watcher whose position that state's history does not reach gets `Compacted`.
    pub fn reload(&mut self) -> Result<(), StateError> {
        self.core = Core::load(&*self.store)?;
        self.garbage = Cursor::load(&*self.store)?;
        self.lease_changes.clear();
        self.hash_report = Due::load(&*self.store)?;
        self.shared.republish(published(&mut self.core));
        Ok(())
    }

    /// To be called before the store is emptied for a snapshot: whoever reads it from now on, until [`reload`](Self::reload), hears
    /// [`StateError::Replaced`] instead of taking what is left of it for the whole.
    pub fn begin_replacement(&mut self) {
        self.shared.begin_replacement();
    }

    /// Initialises an empty state as every founder does, identically: applied index 1, term 1, the founding members as voters.
    pub fn bootstrap(&mut self, cluster_id: u64, members: &[MemberRecord]) -> Result<(), StateError> {
        if self.core.meta.applied_index != 0 {
            return Err(StateError::Corrupt("bootstrap of a state that is not empty".into()));
        }
        let mut voters: Vec<u64> = members.iter().map(|member| member.id).collect();
        voters.sort_unstable();
        voters.dedup();
        if voters.len() != members.len() || voters.first().is_none_or(|id| *id == 0) {
            return Err(StateError::Corrupt("founding members need ids of their own, from 1".into()));
        }
        let meta = &mut self.core.meta;
        (meta.applied_index, meta.applied_term, meta.cluster_id) = (1, 1, cluster_id);
        meta.conf = ConfRecord {
            voters,
            ..ConfRecord::default()
        };
        for member in members {
            self.core.members.insert(MemberRecord {
                wanted_role: MemberRole::Voter as i32,
                ..member.clone()
            });
        }
        self.core.raise_feature_level();
        self.commit(WriteBatch::default(), Vec::new(), None)
    }

    /// Where the state stands.
    pub fn applied(&self) -> Applied {
        let meta = &self.core.meta;
        Applied {
            index: meta.applied_index,
            term: meta.applied_term,
            conf_state: (&meta.conf).into(),
        }
    }

    /// Applies consecutive normal entries (including empty ones) in one atomic batch with the new applied index and term, publishes
    /// the revisions to readers and watchers, and returns the results in order. Commands already applied are left out of the results
    /// unless the caller may still wait for them (then `Refusal::AlreadyApplied`, or the recorded result).
    ///
    /// Entries at or below the applied index are passed over. After an error the state must not be used any more: the node stops.
    pub fn apply(&mut self, entries: &[Entry]) -> Result<Vec<(ProposalId, Outcome)>, StateError> {
        self.apply_watched(entries, &|| {})
    }

    /// The same, calling `pulse` before each command: entries of expensive commands take long, and somebody may want to see that it goes on.
    pub fn apply_watched(&mut self, entries: &[Entry], pulse: &dyn Fn()) -> Result<Vec<(ProposalId, Outcome)>, StateError> {
        let mut results = Vec::new();
        let mut due = None;
        let mut batch = Batch::new(&*self.store, &mut self.core, pulse);
        for entry in entries {
            if entry.index <= batch.core.meta.applied_index {
                continue;
            }
            check_next(batch.core.meta.applied_index, entry)?;
            if entry.get_entry_type() != EntryType::EntryNormal {
                return Err(StateError::Corrupt(format!(
                    "entry {} is a configuration change where none is expected",
                    entry.index
                )));
            }
            batch.apply_entry(entry, &mut results)?;
            due = batch.core.pass(entry).or(due);
        }
        let Gathered { write, events } = batch.finish();
        self.commit(write, events, due)?;
        Ok(results)
    }

    /// Writes the batch with all that changed besides, and publishes it. `due`: the own report, if an agreed index was passed.
    fn commit(&mut self, mut write: WriteBatch, events: Vec<RowEvent>, due: Option<Due>) -> Result<(), StateError> {
        if let Some(due) = due {
            due.store(&mut write);
            self.hash_report = Some(due);
        }
        let core = &mut self.core;
        core.sessions.store(&mut write);
        let boots = core.sessions.changed_boots();
        let has_samples = core.samples.store(&mut write);
        let has_leases = core.leases.store(&mut write);
        let has_idempotency = core.idempotency.store(&mut write);
        let has_members = core.members.store(&mut write);
        let has_reports = core.reports.store(&mut write);
        core.meta.store(&mut write);
        self.store.write(write)?;
        self.lease_changes = core.leases.take_changes();
        self.shared.publish(
            |published| {
                if published.meta.conf != core.meta.conf {
                    published.conf_state = Arc::new((&core.meta.conf).into());
                }
                published.meta.clone_from(&core.meta);
                if has_samples {
                    published.samples.clone_from(&core.samples);
                }
                if has_leases {
                    published.leases.clone_from(&core.leases);
                }
                if has_idempotency {
                    published.idempotency = core.idempotency.oldest();
                }
                if has_members {
                    published.members.clone_from(&core.members);
                }
                if has_reports {
                    published.reports.clone_from(&core.reports);
                }
                if let Some(boots) = boots {
                    published.boots = boots;
                }
            },
            events,
        );
        Ok(())
    }

    /// Looks at a configuration entry (also the empty one that leaves a joint configuration) and decides.
    pub fn begin_conf(&mut self, entry: &Entry) -> Result<ConfDecision, StateError> {
        let conf = self.look_at_conf(entry)?;
        Ok(match conf.verdict {
            Ok(()) => ConfDecision::Apply(conf.raft_change),
            Err(_) => ConfDecision::Refuse,
        })
    }

    fn look_at_conf(&self, entry: &Entry) -> Result<Conf, StateError> {
        check_next(self.core.meta.applied_index, entry)?;
        let raft_change = decode_conf(entry)?;
        let change = membership_of(&raft_change);
        let conf = &self.core.meta.conf;
        let refuse = |code, detail: &str| {
            Err(Refusal::Conflict {
                code,
                detail: detail.into(),
            })
        };
        let verdict = match &change {
            _ if raft_change.leave_joint() && conf.is_joint() => Ok(()),
            _ if raft_change.leave_joint() => refuse(ConflictCode::UnsafeChange, "there is no joint configuration to leave"),
            None => refuse(ConflictCode::UnsafeChange, "the change does not say what it means to the members"),
            Some(change) => self.core.members.check(conf, &raft_change, change),
        };
        Ok(Conf {
            raft_change,
            change: change.unwrap_or_default(),
            verdict,
        })
    }

    /// Completes the configuration entry of [`begin_conf`](Self::begin_conf): members and `ConfState` with the applied index in one batch.
    /// `None` if nobody waits for it (proposer 0).
    pub fn finish_conf(&mut self, entry: &Entry, conf_state: ConfState) -> Result<Option<(ProposalId, Outcome)>, StateError> {
        let Conf {
            raft_change,
            change,
            verdict,
        } = self.look_at_conf(entry)?;
        let core = &mut self.core;
        core.advance_time(entry);
        if verdict.is_ok() {
            core.meta.conf = ConfRecord::from(&conf_state);
            core.change_members(&change);
        }
        let due = core.pass(entry);
        self.commit(WriteBatch::default(), Vec::new(), due)?;
        if change.proposer == 0 || raft_change.leave_joint() {
            return Ok(None);
        }
        let proposal = ProposalId {
            member: change.proposer,
            boot: change.boot,
            seq: change.seq,
        };
        let outcome = Outcome {
            revision: self.core.meta.revision,
            replayed: false,
            result: verdict.map(|()| Success::Done),
        };
        Ok(Some((proposal, outcome)))
    }

    /// The reading side.
    pub fn reader(&self) -> StateReader {
        StateReader {
            shared: self.shared.clone(),
        }
    }

    /// A consistent view of everything at the applied index, O(1); read off the loop by [`crate::snapshot`].
    pub fn snapshot_view(&self) -> SnapshotView {
        // History after the compacted revision is part of it, so that is what must stay. The state is the only one that compacts.
        let revision = self.core.meta.compacted_revision;
        let pin = Pin::of_view(revision, &self.shared);
        SnapshotView::new(self.core.clone(), self.applied(), self.shared.clone(), pin)
    }

    /// Removes some physically dead records (compacted and not pinned); looks at no more than `budget` changes. Returns whether there is more.
    pub fn collect_garbage(&mut self, budget: usize) -> Result<bool, StateError> {
        let limit = self.shared.garbage_limit();
        self.garbage.step(&*self.store, limit, budget.max(1))
    }

    /// What the last [`apply`](Self::apply) or [`finish_conf`](Self::finish_conf) did to leases. A member that begins to lead starts from
    /// [`StateReader::leases`] and follows these; others need not take them, they are replaced with each call.
    pub fn take_lease_changes(&mut self) -> Vec<LeaseChange> {
        std::mem::take(&mut self.lease_changes)
    }

    /// This member's report of its own state, once after each applied index that is a multiple of [`HASH_REPORT_INTERVAL`]: to be proposed
    /// until [`StateReader::lacks_hash_report`] says that it is not needed any more. After a restart one that the log does not have comes again.
    pub fn take_hash_report(&mut self, own_id: u64) -> Option<HashReport> {
        let Due { index, hash } = self.hash_report.take()?;
        self.core.reports.lacks(own_id, index).then(|| HashReport {
            member: own_id,
            index,
            hash: Bytes::copy_from_slice(&hash.to_be_bytes()),
        })
    }
}

impl Core {
    /// Moves past an entry. Returns the report due after it, if one is.
    fn pass(&mut self, entry: &Entry) -> Option<Due> {
        (self.meta.applied_index, self.meta.applied_term) = (entry.index, entry.term);
        entry.index.is_multiple_of(HASH_REPORT_INTERVAL).then(|| Due {
            index: entry.index,
            hash: self.meta.fingerprint(),
        })
    }

    /// Brings the member table in line with the configuration that has just become the current one.
    fn change_members(&mut self, change: &MembershipChange) {
        for member in &change.add {
            self.members.insert(member::entering(member, change));
        }
        for id in &change.promote {
            if let Some(member) = self.members.present.get(id).cloned() {
                self.members.insert(MemberRecord {
                    wanted_role: MemberRole::Voter as i32,
                    ..member
                });
            }
        }
        for id in self.members.retain(&self.meta.conf) {
            self.sessions.remove(id);
        }
        self.raise_feature_level();
    }
}

/// The published form of a state that has just been read.
fn published(core: &mut Core) -> Published {
    Published {
        meta: core.meta.clone(),
        conf_state: Arc::new((&core.meta.conf).into()),
        leases: core.leases.clone(),
        members: core.members.clone(),
        boots: core.sessions.boots(),
        samples: core.samples.clone(),
        reports: core.reports.clone(),
        idempotency: core.idempotency.oldest(),
    }
}

/// An entry that does not follow the applied one would leave a hole.
fn check_next(applied_index: u64, entry: &Entry) -> Result<(), StateError> {
    if entry.index == applied_index + 1 {
        return Ok(());
    }
    Err(StateError::Corrupt(format!(
        "entry {} does not follow the applied index {applied_index}",
        entry.index
    )))
}

fn decode_conf(entry: &Entry) -> Result<ConfChangeV2, StateError> {
    let damaged = |error| StateError::Corrupt(format!("configuration entry {} cannot be decoded: {error}", entry.index));
    match entry.get_entry_type() {
        EntryType::EntryConfChange => Ok(as_v2(ConfChange::parse_from_bytes(&entry.data).map_err(damaged)?)),
        EntryType::EntryConfChangeV2 => ConfChangeV2::parse_from_bytes(&entry.data).map_err(damaged),
        EntryType::EntryNormal => Err(StateError::Corrupt(format!("entry {} is no configuration change", entry.index))),
    }
}

/// The older form of a configuration change, which raft itself still writes for a single change.
fn as_v2(mut old: ConfChange) -> ConfChangeV2 {
    let mut single = ConfChangeSingle::default();
    single.set_node_id(old.get_node_id());
    single.set_change_type(old.get_change_type());
    let mut change = ConfChangeV2::default();
    change.mut_changes().push(single);
    change.set_context(old.take_context());
    change
}

/// Decodes the membership change in the `context` of a `ConfChangeV2`. `None` if there is none, or it cannot be decoded.
pub fn membership_of(change: &ConfChangeV2) -> Option<MembershipChange> {
    if change.context.is_empty() {
        return None;
    }
    MembershipChange::decode(&change.context[..]).ok()
}
