//! The member table: who is in the cluster, who was, and which configuration changes may be.
//!
//! *Invariants*
//! - An id that was removed is never accepted again (rule 25): it is remembered for ever, through snapshots too.
//! - A member is in the table exactly as long as raft's configuration knows it in any role. So one that leaves by joint consensus stays
//!   reachable until the joint configuration is left, whose quorum may need it.
//! - A change is checked against the table before raft is told; refusing is a result like any other, equal on every member (rule 24).

use std::collections::BTreeSet;

use imbl::{OrdMap, OrdSet};
use prost::Message;
use raft::eraftpb::{ConfChangeType, ConfChangeV2};

use super::StateError;
use super::command::{MemberRecord, MemberRole, MemberUpdate, MembershipChange};
use super::meta::ConfRecord;
use super::outcome::{ConflictCode, Refusal};
use crate::store::{KvStore, Table, WriteBatch};

const PRESENT: u8 = 1;
const REMOVED: u8 = 2;

/// The table. Clones share their memory.
#[derive(Debug, Clone, Default)]
pub(super) struct Members {
    pub(super) present: OrdMap<u64, MemberRecord>,
    pub(super) removed: OrdSet<u64>,
    dirty: BTreeSet<u64>,
}

fn conflict(code: ConflictCode, detail: String) -> Refusal {
    Refusal::Conflict { code, detail }
}

impl Members {
    pub(super) fn load(store: &dyn KvStore) -> Result<Members, StateError> {
        let mut members = Members::default();
        super::tables::read_all(store, Table::Member, &mut |key, record| {
            let (kind, id) = key.split_first()?;
            let id = u64::from_be_bytes(id.try_into().ok()?);
            match *kind {
                PRESENT => drop(members.present.insert(id, MemberRecord::decode(record).ok()?)),
                REMOVED => drop(members.removed.insert(id)),
                _ => return None,
            }
            Some(())
        })?;
        Ok(members)
    }

    pub(super) fn insert(&mut self, member: MemberRecord) {
        self.dirty.insert(member.id);
        self.present.insert(member.id, member);
    }

    /// Brings the table in line with raft's configuration: who is not in it has left, and whom they were replaced by is done.
    /// Returns the ids that left.
    pub(super) fn retain(&mut self, conf: &ConfRecord) -> Vec<u64> {
        let gone: Vec<u64> = self.present.keys().copied().filter(|id| !conf.contains(*id)).collect();
        for id in &gone {
            self.present.remove(id);
            self.removed.insert(*id);
            self.dirty.insert(*id);
        }
        let done: Vec<MemberRecord> = self
            .present
            .values()
            .filter(|member| gone.contains(&member.replaces))
            .cloned()
            .collect();
        for member in done {
            self.insert(MemberRecord { replaces: 0, ..member });
        }
        gone
    }

    /// The feature level all members have; 0 while one has not said.
    pub(super) fn common_feature_level(&self) -> u32 {
        self.present.values().map(|member| member.feature_level).min().unwrap_or(0)
    }

    /// Applies an update.
    pub(super) fn update(&mut self, update: &MemberUpdate) -> Result<(), Refusal> {
        let Some(known) = self.present.get(&update.id) else {
            return Err(Refusal::MemberNotFound { id: update.id });
        };
        let mut member = known.clone();
        if let Some(incarnation) = update.incarnation {
            if member.incarnation != 0 && member.incarnation != incarnation {
                let detail = format!(
                    "member {} is bound to another data directory; remove it and join under a new id",
                    update.id
                );
                return Err(conflict(ConflictCode::MemberIdUsed, detail));
            }
            member.incarnation = incarnation;
        }
        if let Some(peer_url) = &update.peer_url {
            self.check_peer_url(update.id, peer_url)?;
            member.peer_url.clone_from(peer_url);
        }
        if let Some(name) = &update.name {
            member.name.clone_from(name);
        }
        if let Some(client_url) = &update.client_url {
            member.client_url.clone_from(client_url);
        }
        if let Some(feature_level) = update.feature_level {
            member.feature_level = feature_level;
        }
        if let Some(wanted_role) = update.wanted_role {
            member.wanted_role = wanted_role;
        }
        if member != *known {
            self.insert(member);
        }
        Ok(())
    }

    fn check_peer_url(&self, id: u64, peer_url: &str) -> Result<(), Refusal> {
        match self.present.values().find(|other| other.id != id && other.peer_url == peer_url) {
            Some(other) => Err(conflict(
                ConflictCode::MemberExists,
                format!("member {} has the address {peer_url} already", other.id),
            )),
            None => Ok(()),
        }
    }

    /// Whether a membership change may be, given raft's current configuration and what raft would be told.
    pub(super) fn check(&self, conf: &ConfRecord, raft_change: &ConfChangeV2, change: &MembershipChange) -> Result<(), Refusal> {
        if conf.is_joint() {
            return Err(conflict(
                ConflictCode::ChangeInProgress,
                "another membership change is under way".into(),
            ));
        }
        for member in &change.add {
            self.check_add(member)?;
        }
        for id in &change.promote {
            if !self.present.contains_key(id) {
                return Err(Refusal::MemberNotFound { id: *id });
            }
            if !conf.learners.contains(id) {
                return Err(conflict(ConflictCode::NotALearner, format!("member {id} is no learner")));
            }
        }
        for id in &change.remove {
            if !self.present.contains_key(id) {
                return Err(Refusal::MemberNotFound { id: *id });
            }
        }
        if change.replaces != 0 && !self.present.contains_key(&change.replaces) {
            return Err(Refusal::MemberNotFound { id: change.replaces });
        }
        check_agreement(raft_change, change)?;
        let keeps_a_voter = conf.voters.iter().any(|id| !change.remove.contains(id)) || !change.promote.is_empty();
        if !keeps_a_voter {
            return Err(conflict(
                ConflictCode::UnsafeChange,
                "the cluster would be left without a voter".into(),
            ));
        }
        Ok(())
    }

    fn check_add(&self, member: &MemberRecord) -> Result<(), Refusal> {
        if member.id == 0 {
            return Err(conflict(ConflictCode::UnsafeChange, "0 is no member id".into()));
        }
        if self.removed.contains(&member.id) {
            return Err(conflict(
                ConflictCode::MemberIdUsed,
                format!("id {} was removed once and is never used again", member.id),
            ));
        }
        if self.present.contains_key(&member.id) {
            return Err(conflict(ConflictCode::MemberExists, format!("member {} exists already", member.id)));
        }
        self.check_peer_url(member.id, &member.peer_url)
    }

    /// Writes what changed since the last call. Returns whether anything did.
    pub(super) fn store(&mut self, batch: &mut WriteBatch) -> bool {
        let was_dirty = !self.dirty.is_empty();
        while let Some(id) = self.dirty.pop_first() {
            match self.present.get(&id) {
                Some(member) => batch.put(Table::Member, record_key(PRESENT, id), member.encode_to_vec()),
                None => batch.delete(Table::Member, record_key(PRESENT, id)),
            }
            if self.removed.contains(&id) {
                batch.put(Table::Member, record_key(REMOVED, id), Vec::new());
            }
        }
        was_dirty
    }

    /// The record that follows `after`, for snapshots.
    pub(super) fn record_after(&self, after: Option<&[u8]>) -> Option<(Vec<u8>, Vec<u8>)> {
        // `None`: no id can follow the last one.
        let (kind, from) = match after {
            None => (PRESENT, Some(0)),
            Some(key) => {
                let (kind, id) = key.split_first()?;
                (*kind, u64::from_be_bytes(id.try_into().ok()?).checked_add(1))
            }
        };
        if kind == PRESENT {
            if let Some((id, member)) = from.and_then(|from| self.present.range(from..).next()) {
                return Some((record_key(PRESENT, *id), member.encode_to_vec()));
            }
            if mutant!(SnapshotWithoutRemoved) {
                return None;
            }
            return self.removed.get_min().map(|id| (record_key(REMOVED, *id), Vec::new()));
        }
        self.removed.range(from?..).next().map(|id| (record_key(REMOVED, *id), Vec::new()))
    }
}

fn record_key(kind: u8, id: u64) -> Vec<u8> {
    let mut key = vec![kind];
    key.extend_from_slice(&id.to_be_bytes());
    key
}

/// What raft is told and what the member table is told must be the same change, each id once.
fn check_agreement(raft_change: &ConfChangeV2, change: &MembershipChange) -> Result<(), Refusal> {
    let ids_of = |kind| {
        let changes = raft_change.get_changes().iter();
        let mut ids: Vec<u64> = changes
            .filter(|single| single.get_change_type() == kind)
            .map(|single| single.node_id)
            .collect();
        ids.sort_unstable();
        ids
    };
    let sorted = |ids: &mut dyn Iterator<Item = u64>| {
        let mut ids: Vec<u64> = ids.collect();
        ids.sort_unstable();
        ids
    };
    let entering = sorted(&mut change.add.iter().map(|member| member.id));
    let promoted = sorted(&mut change.promote.iter().copied());
    let removed = sorted(&mut change.remove.iter().copied());
    let is_same = entering == ids_of(ConfChangeType::AddLearnerNode)
        && promoted == ids_of(ConfChangeType::AddNode)
        && removed == ids_of(ConfChangeType::RemoveNode);
    let all: BTreeSet<u64> = entering.iter().chain(&promoted).chain(&removed).copied().collect();
    let is_unique = all.len() == entering.len() + promoted.len() + removed.len();
    let urls: BTreeSet<&str> = change.add.iter().map(|member| member.peer_url.as_str()).collect();
    if !is_same || !is_unique || all.is_empty() || urls.len() != change.add.len() {
        return Err(conflict(ConflictCode::UnsafeChange, "the change contradicts itself".into()));
    }
    Ok(())
}

/// The record of a member that enters: what it asked for, with the role and pair that the change names.
pub(super) fn entering(member: &MemberRecord, change: &MembershipChange) -> MemberRecord {
    let mut member = member.clone();
    if change.replaces != 0 {
        member.replaces = change.replaces;
        member.wanted_role = MemberRole::Voter as i32;
    }
    member
}
