//! The content of one cluster as the beginning of another: after a restore from a backup, or when a quorum is lost for ever.

use std::collections::BTreeSet;
use std::ops::{Bound, ControlFlow};

use super::command::{MemberRecord, MemberRole};
use super::key::{split_index_key, split_row_key};
use super::member::Members;
use super::meta::ConfRecord;
use super::row::Version;
use super::session::Sessions;
use super::{Record, State, StateError};
use crate::store::{KvStore, Order, Table, WriteBatch};

impl State {
    /// Makes this the state of another cluster, founded by `members`: their ids and addresses, nothing of the old members and their
    /// sessions. The revision grows by `revision_jump`, and all before counts as compacted: whoever holds a revision, a page or a watch
    /// of the old cluster is told so (410) instead of being given something else under a number it knows.
    ///
    /// The same on every founder, from the same state.
    ///
    /// # Errors
    /// Members without ids of their own from 1; a state that was never initialised; the store's.
    pub fn refound(&mut self, cluster_id: u64, members: &[MemberRecord], revision_jump: u64) -> Result<(), StateError> {
        let mut voters: Vec<u64> = members.iter().map(|member| member.id).collect();
        voters.sort_unstable();
        voters.dedup();
        if voters.len() != members.len() || voters.first().is_none_or(|id| *id == 0) {
            return Err(StateError::Corrupt("founding members need ids of their own, from 1".into()));
        }
        if self.core.meta.applied_index == 0 {
            return Err(StateError::Corrupt("there is nothing in this state".into()));
        }
        let mut write = WriteBatch::default();
        for table in [Table::Member, Table::Session] {
            empty(&*self.store, table, &mut write)?;
        }
        let dead_bytes = super::apply::dead_bytes_until(&*self.store, u64::MAX)?;
        let core = &mut self.core;
        core.members = Members::default();
        core.sessions = Sessions::default();
        core.reports.forget();
        for member in members {
            core.members.insert(MemberRecord {
                wanted_role: MemberRole::Voter as i32,
                ..member.clone()
            });
        }
        let meta = &mut core.meta;
        meta.cluster_id = cluster_id;
        meta.conf = ConfRecord {
            voters,
            ..ConfRecord::default()
        };
        meta.revision += revision_jump;
        meta.compacted_revision = meta.revision;
        meta.forgotten_bytes = dead_bytes;
        core.samples.forget_before(core.meta.revision);
        self.commit(write, Vec::new(), None)
    }
}

/// Which versions a state keeps when it is refounded: the newest of each key, unless that is a deletion. Told of a snapshot's records in
/// one pass, it knows them again in a second one, so that nobody has to hold the content. Costs about 24 bytes a key.
#[derive(Debug, Default)]
pub struct LiveVersions {
    live: BTreeSet<(u64, u32)>,
    newest: Newest,
}

impl LiveVersions {
    /// Takes note of a record. Those of the index must come in the order of a snapshot: by key, the newest first.
    ///
    /// # Errors
    /// It cannot be decoded.
    pub fn note(&mut self, record: &Record) -> Result<(), StateError> {
        if let Some((_, version)) = self.newest.take(record)? {
            self.live.insert((version.revision, version.position));
        }
        Ok(())
    }

    /// Whether a record of the index or the revisions is one of a version that is kept.
    ///
    /// # Errors
    /// It cannot be decoded.
    pub fn keeps(&self, record: &Record) -> Result<bool, StateError> {
        let at = match record.table {
            Table::Index => index_version(record).map(|(_, version)| (version.revision, version.position))?,
            Table::Revision => split_row_key(&record.key).ok_or_else(undecodable)?,
            Table::Meta | Table::Lease | Table::LeaseKey | Table::Session | Table::Idempotency | Table::Member => return Ok(false),
        };
        Ok(self.live.contains(&at))
    }
}

/// Picks the version that lives of each key out of a snapshot's records, which come by key, the newest first.
#[derive(Debug, Default)]
pub(super) struct Newest {
    /// The user key of the last index record, as it is written there.
    last_key: Option<Vec<u8>>,
}

impl Newest {
    /// The escaped key and its version, if this record is the newest of its key and no deletion.
    pub(super) fn take<'a>(&mut self, record: &'a Record) -> Result<Option<(&'a [u8], Version)>, StateError> {
        if record.table != Table::Index {
            return Ok(None);
        }
        let (key, version) = index_version(record)?;
        if self.last_key.as_deref() == Some(key) {
            return Ok(None);
        }
        self.last_key = Some(key.to_vec());
        Ok((!version.is_tombstone).then_some((key, version)))
    }
}

fn index_version(record: &Record) -> Result<(&[u8], Version), StateError> {
    let (key, revision) = split_index_key(&record.key).ok_or_else(undecodable)?;
    let version = Version::decode_index(revision, &record.value).ok_or_else(undecodable)?;
    Ok((key, version))
}

fn undecodable() -> StateError {
    StateError::Corrupt("a record of the revision tables cannot be decoded".into())
}

fn empty(store: &dyn KvStore, table: Table, write: &mut WriteBatch) -> Result<(), StateError> {
    store.scan(table, (Bound::Unbounded, Bound::Unbounded), Order::Asc, &mut |key, _| {
        write.delete(table, key.to_vec());
        ControlFlow::Continue(())
    })?;
    Ok(())
}
