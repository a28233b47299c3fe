//! One moment of the state, to be read record by record while the state goes on.
//!
//! The small tables are clones of persistent maps. The revision tables are read from the store, limited to what the moment could see:
//! their records never change, and a pin keeps those that compaction would remove. What comes out depends on the applied
//! entries alone, not on how far this store's garbage is removed: the newest version at the compacted revision of each
//! key, and all history after it.

use std::ops::{Bound, ControlFlow};
use std::sync::Arc;

use prost::Message;

use super::apply::{Core, missing_row};
use super::divergence::REPORTS_KEY;
use super::gc::{CURSOR_KEY, Cursor};
use super::key::{row_key, split_index_key};
use super::kv::row_of;
use super::meta::{META_KEY, SAMPLES_KEY};
use super::row::Version;
use super::shared::{Pin, Shared};
use super::{Applied, StateError};
use crate::store::{Order, Table};

/// Records of the store looked at in one step.
const STEP: usize = 1000;

/// A record of a snapshot: what [`KvStore::write`](crate::store::KvStore::write) is given when it is installed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Table.
    pub table: Table,
    /// Key within it.
    pub key: Vec<u8>,
    /// Value.
    pub value: Arc<[u8]>,
}

/// Everything a snapshot holds, as one moment: an iterator over the store's records, of one applied index.
///
/// While it lives, history is not removed from the store beyond the revision that was compacted at that moment.
pub struct SnapshotView {
    /// Where it stands.
    pub applied: Applied,
    /// The revision of that moment.
    pub revision: u64,
    /// History below this revision is not in it.
    pub compacted_revision: u64,
    /// The cluster it belongs to.
    pub cluster_id: u64,
    core: Core,
    shared: Arc<Shared>,
    pin: Pin,
    stage: Stage,
    /// Key of the last record of the stage that was looked at.
    after: Option<Vec<u8>>,
    /// Whether the key at hand has given its version at the compacted revision.
    is_key_done: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Meta,
    Session,
    Lease,
    LeaseKey,
    Idempotency,
    Member,
    /// The index, and the rows of versions from before the history.
    Index,
    /// The rows of the history.
    History,
    End,
}

impl Stage {
    fn next(self) -> Stage {
        match self {
            Stage::Meta => Stage::Session,
            Stage::Session => Stage::Lease,
            Stage::Lease => Stage::LeaseKey,
            Stage::LeaseKey => Stage::Idempotency,
            Stage::Idempotency => Stage::Member,
            Stage::Member => Stage::Index,
            Stage::Index => Stage::History,
            Stage::History | Stage::End => Stage::End,
        }
    }
}

impl SnapshotView {
    pub(super) fn new(core: Core, applied: Applied, shared: Arc<Shared>, pin: Pin) -> SnapshotView {
        SnapshotView {
            applied,
            revision: core.meta.revision,
            compacted_revision: core.meta.compacted_revision,
            cluster_id: core.meta.cluster_id,
            core,
            shared,
            pin,
            stage: Stage::Meta,
            after: None,
            is_key_done: false,
        }
    }

    /// About the bytes of its records: what keys, values and history count for. Sessions, leases and idempotency records are not in it.
    pub fn logical_bytes(&self) -> u64 {
        self.core.meta.logical_bytes()
    }

    /// Another view of the same moment, from its beginning: one for each that reads it.
    pub fn fork(&self) -> SnapshotView {
        SnapshotView::new(self.core.clone(), self.applied.clone(), self.shared.clone(), self.pin.fork())
    }

    /// The next records, about `max_bytes` of them; `None` when there are no more. Reads the store: not for an async thread.
    ///
    /// # Errors
    /// [`StateError::Replaced`] once a snapshot has taken the state's place: the moment cannot be read to its end any more.
    pub fn next_records(&mut self, max_bytes: usize) -> Result<Option<Vec<Record>>, StateError> {
        let read = self.read_records(max_bytes);
        // First of all, and also before an error: a record that is missing is no damage then.
        self.pin.check()?;
        read
    }

    fn read_records(&mut self, max_bytes: usize) -> Result<Option<Vec<Record>>, StateError> {
        let mut records = Vec::new();
        let mut bytes = 0;
        while self.stage != Stage::End && bytes < max_bytes {
            let before = records.len();
            let has_more = match self.stage {
                Stage::Meta => self.read_meta(&mut records),
                Stage::Session | Stage::Lease | Stage::LeaseKey | Stage::Idempotency | Stage::Member => self.read_small(&mut records),
                Stage::Index => self.read_index(&mut records, max_bytes - bytes)?,
                Stage::History => self.read_history(&mut records, max_bytes - bytes)?,
                Stage::End => false,
            };
            bytes += records
                .iter()
                .skip(before)
                .map(|record| record.key.len() + record.value.len())
                .sum::<usize>();
            if !has_more {
                self.stage = self.stage.next();
                self.after = None;
            }
        }
        Ok((!records.is_empty()).then_some(records))
    }

    fn read_meta(&self, records: &mut Vec<Record>) -> bool {
        let mut push = |key: &[u8], value: Vec<u8>| {
            records.push(Record {
                table: Table::Meta,
                key: key.to_vec(),
                value: value.into(),
            })
        };
        push(META_KEY, self.core.meta.encode_to_vec());
        push(SAMPLES_KEY, self.core.samples.encode());
        push(REPORTS_KEY, self.core.reports.encode());
        push(CURSOR_KEY, Cursor::clean_until(self.compacted_revision).encode());
        false
    }

    /// One record of a table that is held in memory.
    fn read_small(&mut self, records: &mut Vec<Record>) -> bool {
        let after = self.after.as_deref();
        let owned = |record: Option<(Vec<u8>, Vec<u8>)>| record.map(|(key, value)| (key, value.into()));
        let (table, record) = match self.stage {
            Stage::Session if mutant!(SnapshotWithoutSessions) => return false,
            Stage::Lease if mutant!(SnapshotWithoutLeases) => return false,
            Stage::Idempotency if mutant!(SnapshotWithoutIdempotency) => return false,
            Stage::Session => (Table::Session, owned(self.core.sessions.record_after(after))),
            Stage::Lease => (Table::Lease, owned(self.core.leases.record_after(after))),
            Stage::LeaseKey => (Table::LeaseKey, owned(self.core.leases.key_record_after(after))),
            Stage::Idempotency => (Table::Idempotency, self.core.idempotency.record_after(after)),
            Stage::Member => (Table::Member, owned(self.core.members.record_after(after))),
            Stage::Meta | Stage::Index | Stage::History | Stage::End => return false,
        };
        let Some((key, value)) = record else { return false };
        self.after = Some(key.clone());
        records.push(Record { table, key, value });
        true
    }

    fn lower_bound(after: Option<&[u8]>) -> Bound<&[u8]> {
        after.map_or(Bound::Unbounded, Bound::Excluded)
    }

    fn read_index(&mut self, records: &mut Vec<Record>, max_bytes: usize) -> Result<bool, StateError> {
        let (revision, compacted) = (self.revision, self.compacted_revision);
        let mut last = self.after.clone();
        let mut is_key_done = self.is_key_done;
        let mut rows: Vec<Version> = Vec::new();
        let (mut seen, mut bytes, mut has_more, mut is_damaged) = (0, 0u64, false, false);
        self.shared.store.scan(
            Table::Index,
            (Self::lower_bound(self.after.as_deref()), Bound::Unbounded),
            Order::Asc,
            &mut |key, record| {
                if seen >= STEP || bytes >= max_bytes as u64 {
                    has_more = true;
                    return ControlFlow::Break(());
                }
                seen += 1;
                let Some((user, made)) = split_index_key(key) else {
                    is_damaged = true;
                    return ControlFlow::Break(());
                };
                let is_same_key = last
                    .as_deref()
                    .and_then(split_index_key)
                    .is_some_and(|(last_user, _)| last_user == user);
                is_key_done &= is_same_key;
                last = Some(key.to_vec());
                if made > revision || is_key_done {
                    return ControlFlow::Continue(());
                }
                let Some(version) = Version::decode_index(made, record) else {
                    is_damaged = true;
                    return ControlFlow::Break(());
                };
                let is_history = made > compacted;
                is_key_done = !is_history;
                if is_history || !version.is_tombstone {
                    records.push(Record {
                        table: Table::Index,
                        key: key.to_vec(),
                        value: record.into(),
                    });
                    bytes += (key.len() + record.len()) as u64;
                }
                if !is_history && !version.is_tombstone {
                    bytes += version.value_len;
                    rows.push(version);
                }
                ControlFlow::Continue(())
            },
        )?;
        if is_damaged {
            return Err(StateError::Corrupt("a record of the key index cannot be decoded".into()));
        }
        (self.after, self.is_key_done) = (last, is_key_done);
        for version in &rows {
            let value = row_of(&*self.shared.store, version)?.ok_or_else(|| missing_row(version))?;
            records.push(Record {
                table: Table::Revision,
                key: row_key(version.revision, version.position).to_vec(),
                value,
            });
        }
        Ok(has_more)
    }

    fn read_history(&mut self, records: &mut Vec<Record>, max_bytes: usize) -> Result<bool, StateError> {
        let begin = row_key(self.compacted_revision, u32::MAX);
        let end = row_key(self.revision, u32::MAX);
        let from = self.after.as_deref().unwrap_or(&begin);
        let (mut bytes, mut has_more) = (0, false);
        let before = records.len();
        self.shared.store.scan(
            Table::Revision,
            (Bound::Excluded(from), Bound::Included(&end)),
            Order::Asc,
            &mut |key, record| {
                if records.len() - before >= STEP || bytes >= max_bytes {
                    has_more = true;
                    return ControlFlow::Break(());
                }
                bytes += key.len() + record.len();
                records.push(Record {
                    table: Table::Revision,
                    key: key.to_vec(),
                    value: record.into(),
                });
                ControlFlow::Continue(())
            },
        )?;
        if let Some(last) = records.last() {
            self.after = Some(last.key.clone());
        }
        Ok(has_more)
    }
}

impl std::fmt::Debug for SnapshotView {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SnapshotView")
            .field("applied", &self.applied)
            .field("revision", &self.revision)
            .finish_non_exhaustive()
    }
}
