//! Executing commands: the state before, the entry, and nothing else decide.
//!
//! The changes of one [`State::apply`](super::State::apply) gather in a [`Batch`]; an overlay makes the earlier ones visible to the later ones.

mod txn;

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;
use prost::Message;
use raft::eraftpb::Entry;

use super::command::{Body, Command, Conditions, Delete, DeleteRange, EntryPayload, FEATURE_LEVEL, KeySpan, LeaseGrant, Put, Stamp};
use super::divergence::Reports;
use super::idempotency::IdempotencyTable;
use super::key::{IndexSpan, descending, push_escaped, row_key};
use super::kv;
use super::lease::Leases;
use super::member::Members;
use super::meta::{MetaRecord, Samples};
use super::outcome::{KeyValue, Outcome, Refusal, Success};
use super::row::{Version, key_value, share};
use super::session::{Seen, Sessions};
use super::{ProposalId, StateError};
use crate::store::{KvStore, Table, WriteBatch};

/// All of the state that is not in the two revision tables: in memory as a whole, and in the store.
#[derive(Clone)]
pub(super) struct Core {
    pub(super) meta: MetaRecord,
    pub(super) samples: Samples,
    pub(super) sessions: Sessions,
    pub(super) leases: Leases,
    pub(super) idempotency: IdempotencyTable,
    pub(super) members: Members,
    pub(super) reports: Reports,
}

impl Core {
    pub(super) fn load(store: &dyn KvStore) -> Result<Core, StateError> {
        Ok(Core {
            meta: MetaRecord::load(store)?,
            samples: Samples::load(store)?,
            sessions: Sessions::load(store)?,
            leases: Leases::load(store)?,
            idempotency: IdempotencyTable::load(store)?,
            members: Members::load(store)?,
            reports: Reports::load(store)?,
        })
    }

    /// Moves cluster time to an entry's stamp.
    pub(super) fn advance_time(&mut self, entry: &Entry) {
        if let Some(Stamp(stamp_ms)) = Stamp::decode(&entry.context) {
            self.meta.cluster_time_ms = self.meta.cluster_time_ms.max(stamp_ms);
            self.samples.note(self.meta.cluster_time_ms, self.meta.revision);
        }
    }

    /// Raises the cluster's feature level to what all members have. It never falls.
    pub(super) fn raise_feature_level(&mut self) {
        self.meta.feature_level = self.meta.feature_level.max(self.members.common_feature_level());
    }
}

/// The newest version of a key that this batch has written.
struct Pending {
    version: Version,
    row: Arc<[u8]>,
    /// The store, which has nothing of this batch yet, has the key live.
    is_live_in_store: bool,
}

/// A key's newest version, live, as the batch has left it so far.
pub(super) struct Current {
    pub(super) version: Version,
    /// Its row if this batch wrote it.
    row: Option<Arc<[u8]>>,
}

/// A change of a key as readers are told of it: revision and row.
pub(super) type RowEvent = (u64, Arc<[u8]>);

/// What a finished [`Batch`] asks for.
pub(super) struct Gathered {
    /// To be written.
    pub(super) write: WriteBatch,
    /// To be published.
    pub(super) events: Vec<RowEvent>,
}

/// The changes of one call of `apply`, not yet written.
pub(super) struct Batch<'a> {
    store: &'a dyn KvStore,
    pub(super) core: &'a mut Core,
    write: WriteBatch,
    overlay: BTreeMap<Bytes, Pending>,
    /// The changes of keys, in order.
    events: Vec<RowEvent>,
    /// Changes of the command at hand: their revision is the next one, taken when the command is done.
    position: u32,
    /// Term of the entry at hand.
    term: u64,
    escaped: Vec<u8>,
    scratch: Vec<u8>,
    /// Called before each command.
    pulse: &'a dyn Fn(),
}

impl<'a> Batch<'a> {
    pub(super) fn new(store: &'a dyn KvStore, core: &'a mut Core, pulse: &'a dyn Fn()) -> Batch<'a> {
        Batch {
            store,
            core,
            write: WriteBatch::default(),
            overlay: BTreeMap::new(),
            events: Vec::new(),
            position: 0,
            term: 0,
            escaped: Vec::new(),
            scratch: Vec::new(),
            pulse,
        }
    }

    /// What is to be written and published.
    pub(super) fn finish(self) -> Gathered {
        Gathered {
            write: self.write,
            events: self.events,
        }
    }

    /// Applies one normal entry; the results go to `results`.
    pub(super) fn apply_entry(&mut self, entry: &Entry, results: &mut Vec<(ProposalId, Outcome)>) -> Result<(), StateError> {
        self.core.advance_time(entry);
        self.term = entry.term;
        if entry.data.is_empty() {
            return Ok(());
        }
        let payload = EntryPayload::decode(entry.data.clone())
            .map_err(|error| StateError::Corrupt(format!("entry {} cannot be decoded: {error}", entry.index)))?;
        if payload.feature_level > FEATURE_LEVEL {
            return Err(StateError::TooNew {
                index: entry.index,
                level: payload.feature_level,
                own: FEATURE_LEVEL,
            });
        }
        let (member, boot) = (payload.member, payload.boot);
        // A removed member's session is forgotten, so its late proposals could be applied twice: they are void instead.
        if self.core.members.removed.contains(&member) || !self.core.sessions.enter(member, boot, payload.low_water) {
            return Ok(());
        }
        results.reserve(payload.commands.len());
        self.write.ops.reserve(payload.commands.len() * 2 + 4);
        for command in &payload.commands {
            (self.pulse)();
            let proposal = ProposalId {
                member,
                boot,
                seq: command.seq,
            };
            match self.core.sessions.seen(member, command.seq) {
                Seen::Dropped => {}
                Seen::Applied(done) => results.push((proposal, self.again(command, done.outcome())?)),
                Seen::Fresh => {
                    let outcome = self.execute_once(command, entry.index)?;
                    self.core.sessions.record(member, command, &outcome);
                    results.push((proposal, outcome));
                }
            }
        }
        Ok(())
    }

    /// The outcome of a command that was applied before: the session's, or if that does not know it, its idempotency record's.
    fn again(&self, command: &Command, known: Outcome) -> Result<Outcome, StateError> {
        match &command.idempotency {
            Some(wanted) if known.result == Err(Refusal::AlreadyApplied) => match self.core.idempotency.answer(wanted, known.revision)? {
                Some(recorded) if recorded.replayed => Ok(recorded),
                Some(_) | None => Ok(known),
            },
            Some(_) | None => Ok(known),
        }
    }

    fn execute_once(&mut self, command: &Command, entry_index: u64) -> Result<Outcome, StateError> {
        let Some(body) = &command.body else {
            return Err(StateError::Corrupt(format!(
                "entry {entry_index} holds a command this build does not know"
            )));
        };
        if let Some(wanted) = &command.idempotency
            && !(mutant!(DeleteAgain) && matches!(body, Body::Delete(_)))
            && !(mutant!(TxnAgain) && matches!(body, Body::Txn(_)))
            && let Some(answer) = self.core.idempotency.answer(wanted, self.core.meta.revision)?
        {
            return Ok(answer);
        }
        let outcome = self.execute(body)?;
        if let Some(wanted) = &command.idempotency {
            self.core.idempotency.record(wanted, self.core.meta.cluster_time_ms, &outcome);
        }
        Ok(outcome)
    }

    fn execute(&mut self, body: &Body) -> Result<Outcome, StateError> {
        self.position = 0;
        let result = match body {
            Body::Put(put) => self.put(put)?,
            Body::Delete(delete) => self.delete(delete)?,
            Body::DeleteRange(delete) => self.delete_range(delete)?,
            Body::Txn(txn) => self.txn(txn)?,
            Body::LeaseGrant(grant) => self.lease_grant(grant),
            Body::LeaseRevoke(revoke) => self.lease_end(revoke.id)?,
            Body::LeaseExpire(expire) if expire.term != self.term && !mutant!(ExpireInAnyTerm) => Err(Refusal::Void),
            Body::LeaseExpire(expire) => self.lease_end(expire.id)?,
            Body::Compact(compact) => self.compact(compact.revision)?,
            Body::Evict(evict) if evict.term != self.term => Err(Refusal::Void),
            Body::Evict(evict) => {
                self.core.idempotency.evict(evict.up_to_stamp);
                Ok(Success::Done)
            }
            Body::MemberUpdate(update) => self.core.members.update(update).map(|()| {
                self.core.raise_feature_level();
                Success::Done
            }),
            Body::HashReport(report) => {
                self.core.reports.note(report);
                Ok(Success::Done)
            }
        };
        if self.position > 0 {
            self.core.meta.revision += 1;
            if mutant!(TwoRevisions) && self.position > 1 {
                self.core.meta.revision += 1;
            }
        }
        Ok(Outcome {
            revision: self.core.meta.revision,
            replayed: false,
            result,
        })
    }

    // ---- reading what the batch has left so far

    fn current(&mut self, key: &[u8]) -> Result<Option<Current>, StateError> {
        if let Some(pending) = self.overlay.get(key) {
            return Ok((!pending.version.is_tombstone).then(|| Current {
                version: pending.version,
                row: Some(pending.row.clone()),
            }));
        }
        let version = kv::newest(self.store, key, u64::MAX, &mut self.escaped)?;
        Ok(version
            .filter(|version| !version.is_tombstone)
            .map(|version| Current { version, row: None }))
    }

    fn load(&self, current: &Current) -> Result<KeyValue, StateError> {
        let version = &current.version;
        let row = match &current.row {
            Some(row) => row.clone(),
            None => kv::row_of(self.store, version)?.ok_or_else(|| missing_row(version))?,
        };
        key_value(version.revision, &share(row))
    }

    fn load_if(&self, is_wanted: bool, current: Option<&Current>) -> Result<Option<KeyValue>, StateError> {
        match current {
            Some(current) if is_wanted => Ok(Some(self.load(current)?)),
            Some(_) | None => Ok(None),
        }
    }

    fn pending_in(&self, span: &KeySpan) -> impl Iterator<Item = (&Bytes, &Pending)> {
        let end = span.end.as_ref().map_or(Bound::Unbounded, |end| Bound::Excluded(&end[..]));
        let is_empty = span.end.as_ref().is_some_and(|end| *end <= span.start);
        let range = (!is_empty).then(|| self.overlay.range::<[u8], _>((Bound::Included(&span.start[..]), end)));
        range.into_iter().flatten()
    }

    fn count(&self, span: &KeySpan) -> Result<u64, StateError> {
        let in_store = kv::count(self.store, IndexSpan::new(span, None, false), u64::MAX)?;
        let replaced = self.pending_in(span).filter(|(_, pending)| pending.is_live_in_store).count() as u64;
        let pending = self.pending_in(span).filter(|(_, pending)| !pending.version.is_tombstone).count() as u64;
        Ok(in_store - replaced + pending)
    }

    /// At least how many live keys the span has, counted no further than just beyond `max`.
    fn count_within(&self, span: &KeySpan, max: u64) -> Result<u64, StateError> {
        let pending = self.pending_in(span).count() as u64;
        let in_store = kv::count_within(self.store, IndexSpan::new(span, None, false), u64::MAX, max)?;
        Ok(in_store.saturating_add(pending))
    }

    /// The first `limit` live keys of the span in order.
    fn list(&self, span: &KeySpan, is_descending: bool, limit: usize) -> Result<Vec<(Bytes, Current)>, StateError> {
        // What the store says of keys in the overlay is out of date: so many more are read from it.
        let from_store = limit.saturating_add(self.pending_in(span).count());
        let hits = kv::list(
            self.store,
            IndexSpan::new(span, None, is_descending),
            u64::MAX,
            is_descending,
            from_store,
        )?;
        let untouched = hits.into_iter().filter(|hit| !self.overlay.contains_key(&hit.key[..]));
        let mut keys: Vec<(Bytes, Current)> = untouched
            .map(|hit| {
                (
                    Bytes::from(hit.key),
                    Current {
                        version: hit.version,
                        row: None,
                    },
                )
            })
            .collect();
        let pending = self.pending_in(span).filter(|(_, pending)| !pending.version.is_tombstone);
        keys.extend(pending.map(|(key, pending)| {
            (
                key.clone(),
                Current {
                    version: pending.version,
                    row: Some(pending.row.clone()),
                },
            )
        }));
        keys.sort_unstable_by(|(a, _), (b, _)| if is_descending { b.cmp(a) } else { a.cmp(b) });
        keys.truncate(limit);
        Ok(keys)
    }

    // ---- changing keys

    fn write_key(&mut self, key: &Bytes, value: &[u8], old: Option<&Version>, lease: u64) {
        let version = Version::next(old, self.core.meta.revision + 1, self.position, value, lease);
        self.count_hash(key, old, Some(&version));
        if let Some(old) = old
            && old.lease != 0
            && old.lease != lease
        {
            self.core.leases.detach(old.lease, key);
        }
        if lease != 0 && old.is_none_or(|old| old.lease != lease) {
            self.core.leases.attach(lease, key);
        }
        self.push_version(key, value, old, version);
    }

    fn delete_key(&mut self, key: &Bytes, old: &Version) {
        self.count_hash(key, Some(old), None);
        if old.lease != 0 {
            self.core.leases.detach(old.lease, key);
        }
        let tombstone = Version::tombstone(self.core.meta.revision + 1, self.position);
        self.push_version(key, &[], Some(old), tombstone);
    }

    fn count_hash(&mut self, key: &[u8], old: Option<&Version>, new: Option<&Version>) {
        let mut hash = self.core.meta.hash();
        if let Some(old) = old {
            hash = hash.wrapping_sub(old.digest(key, &mut self.scratch));
        }
        if let Some(new) = new {
            hash = hash.wrapping_add(new.digest(key, &mut self.scratch));
        }
        self.core.meta.set_hash(hash);
    }

    fn push_version(&mut self, key: &Bytes, value: &[u8], old: Option<&Version>, version: Version) {
        let meta = &mut self.core.meta;
        let size = version.logical_size(key);
        meta.written_bytes += size;
        meta.dead_bytes += old.map_or(0, |old| old.logical_size(key)) + if version.is_tombstone { size } else { 0 };

        self.escaped.clear();
        push_escaped(&mut self.escaped, key);
        self.escaped.extend_from_slice(&descending(version.revision));
        version.encode_index(&mut self.scratch);
        self.write.put(Table::Index, &self.escaped[..], &self.scratch[..]);

        version.encode_row(key, value, meta.dead_bytes, &mut self.scratch);
        let row: Arc<[u8]> = self.scratch[..].into();
        self.write
            .put(Table::Revision, row_key(version.revision, version.position), row.clone());
        self.events.push((version.revision, row.clone()));
        self.position += 1;

        match self.overlay.get_mut(&key[..]) {
            Some(pending) => (pending.version, pending.row) = (version, row),
            None => drop(self.overlay.insert(
                key.clone(),
                Pending {
                    version,
                    row,
                    is_live_in_store: old.is_some(),
                },
            )),
        }
    }

    // ---- commands

    fn put(&mut self, put: &Put) -> Result<Result<Success, Refusal>, StateError> {
        let current = self.current(&put.key)?;
        if let Some(conditions) = &put.conditions
            && let Err(refusal) = check_conditions(conditions, current.as_ref())
        {
            return Ok(Err(refusal));
        }
        if put.ttl_ms == 0 && put.lease != 0 && !self.core.leases.is_attachable(put.lease) {
            return Ok(Err(Refusal::LeaseNotFound { id: put.lease }));
        }
        let prev = self.load_if(put.want_prev, current.as_ref())?;
        let lease = self.put_key(put, current.as_ref());
        Ok(Ok(Success::Put {
            created: current.is_none(),
            prev,
            lease,
        }))
    }

    /// The put itself, after all checks. Returns the attached lease.
    fn put_key(&mut self, put: &Put, current: Option<&Current>) -> u64 {
        let lease = if put.ttl_ms != 0 {
            self.new_lease(put.ttl_ms, true)
        } else {
            put.lease
        };
        self.write_key(&put.key, &put.value, current.map(|current| &current.version), lease);
        lease
    }

    fn delete(&mut self, delete: &Delete) -> Result<Result<Success, Refusal>, StateError> {
        let current = self.current(&delete.key)?;
        if let Some(conditions) = &delete.conditions
            && let Err(refusal) = check_conditions(conditions, current.as_ref())
        {
            return Ok(Err(refusal));
        }
        let Some(current) = current else {
            return Ok(Err(Refusal::NotFound));
        };
        let prev = self.load_if(delete.want_prev, Some(&current))?;
        self.delete_key(&delete.key, &current.version);
        Ok(Ok(Success::Delete { prev }))
    }

    fn delete_range(&mut self, delete: &DeleteRange) -> Result<Result<Success, Refusal>, StateError> {
        let max = if delete.max_keys == 0 { u64::MAX } else { delete.max_keys };
        let limit = usize::try_from(max).unwrap_or(usize::MAX).saturating_add(1);
        let keys = self.list(&delete.span, false, limit)?;
        if keys.len() as u64 > max {
            return Ok(Err(Refusal::RangeTooLarge {
                keys: self.count(&delete.span)?,
                max,
            }));
        }
        for (n, (key, current)) in keys.iter().enumerate() {
            if mutant!(DeleteLess) && n == 1 {
                continue;
            }
            self.delete_key(key, &current.version);
        }
        Ok(Ok(Success::DeleteRange {
            deleted: keys.len() as u64,
        }))
    }

    fn new_lease(&mut self, ttl_ms: u64, is_owned: bool) -> u64 {
        let meta = &mut self.core.meta;
        // The counter alone makes ids unique; only an id that a user chose can be in its way.
        loop {
            meta.last_lease_id += 1;
            if self.core.leases.get(meta.last_lease_id).is_none() {
                break;
            }
        }
        let id = meta.last_lease_id;
        self.core.leases.grant(id, ttl_ms, is_owned);
        id
    }

    fn lease_grant(&mut self, grant: &LeaseGrant) -> Result<Success, Refusal> {
        let id = if grant.id == 0 {
            self.new_lease(grant.ttl_ms, false)
        } else if self.core.leases.get(grant.id).is_some() {
            return Err(Refusal::LeaseExists { id: grant.id });
        } else {
            self.core.leases.grant(grant.id, grant.ttl_ms, false);
            grant.id
        };
        Ok(Success::LeaseGrant { id, ttl_ms: grant.ttl_ms })
    }

    /// Revoked or expired: the lease and its keys go in one revision.
    fn lease_end(&mut self, id: u64) -> Result<Result<Success, Refusal>, StateError> {
        if self.core.leases.get(id).is_none() {
            return Ok(Err(Refusal::LeaseNotFound { id }));
        }
        let keys = self.core.leases.keys(id);
        for key in &keys {
            let current = self.current(key)?.filter(|current| current.version.lease == id);
            let current = current.ok_or_else(|| StateError::Corrupt(format!("lease {id} has a key that does not know it")))?;
            self.delete_key(key, &current.version);
        }
        self.core.leases.remove(id);
        Ok(Ok(Success::LeaseRevoke {
            deleted: keys.len() as u64,
        }))
    }

    fn compact(&mut self, revision: u64) -> Result<Result<Success, Refusal>, StateError> {
        let MetaRecord {
            revision: current,
            compacted_revision,
            ..
        } = self.core.meta;
        if revision > current {
            return Ok(Err(Refusal::FutureRevision { current }));
        }
        if revision <= compacted_revision {
            return Ok(Err(Refusal::Compacted { compacted_revision }));
        }
        self.core.meta.forgotten_bytes = self.dead_bytes_at(revision)?;
        self.core.meta.compacted_revision = revision;
        self.core.samples.forget_before(revision);
        Ok(Ok(Success::Compact {
            compacted_revision: revision,
        }))
    }

    /// Logical bytes that a compaction at `revision`, which is not compacted yet, makes forgettable: noted in that revision's last row.
    fn dead_bytes_at(&self, revision: u64) -> Result<u64, StateError> {
        if let Some((revision, row)) = self.events.iter().rev().find(|(made, _)| *made <= revision) {
            return Ok(super::row::Row::checked(*revision, row)?.dead_bytes);
        }
        dead_bytes_until(self.store, revision)
    }
}

/// The same from what is written: noted in the last row at or before `revision`.
pub(super) fn dead_bytes_until(store: &dyn KvStore, revision: u64) -> Result<u64, StateError> {
    let mut found = Ok(0);
    let end = row_key(revision, u32::MAX);
    store.scan(
        Table::Revision,
        (Bound::Unbounded, Bound::Included(&end)),
        crate::store::Order::Desc,
        &mut |key, record| {
            let revision = super::key::split_row_key(key).map_or(revision, |(revision, _)| revision);
            found = super::row::Row::checked(revision, record).map(|row| row.dead_bytes);
            std::ops::ControlFlow::Break(())
        },
    )?;
    found
}

pub(super) fn missing_row(version: &Version) -> StateError {
    StateError::Corrupt(format!(
        "the row of revision {} at {} is missing",
        version.revision, version.position
    ))
}

/// The conditions of a PUT or DELETE against the key as it is.
fn check_conditions(conditions: &Conditions, current: Option<&Current>) -> Result<(), Refusal> {
    let mod_revision = current.map(|current| current.version.revision);
    let is_one_of = |revisions: &[u64]| mod_revision.is_some_and(|revision| revisions.contains(&revision));
    let match_fails = conditions.if_match_never
        || (conditions.if_match_any && mod_revision.is_none())
        || (!conditions.if_match.is_empty() && !conditions.if_match_any && !is_one_of(&conditions.if_match));
    let none_match_fails = (conditions.if_none_match_any && mod_revision.is_some()) || is_one_of(&conditions.if_none_match);
    if (match_fails || none_match_fails) && !mutant!(IgnoreConditions) {
        Err(Refusal::PreconditionFailed { current: mod_revision })
    } else {
        Ok(())
    }
}
