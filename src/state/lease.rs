//! Leases and the keys attached to them. When a lease's time is over is the leader's business (its clock); what that means is decided here.

use std::collections::BTreeSet;

use bytes::Bytes;
use imbl::{OrdMap, OrdSet};
use prost::Message;

use super::StateError;
use super::reader::LeaseInfo;
use crate::store::{KvStore, Table, WriteBatch};

/// What happened to a lease: what the leader's deadlines follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseChange {
    /// A lease began, with its full time to live in milliseconds.
    Granted {
        /// Its id.
        id: u64,
        /// Its time to live in milliseconds.
        ttl_ms: u64,
    },
    /// A lease is gone: revoked, expired, or its only key was rewritten, detached or deleted.
    Removed {
        /// Its id.
        id: u64,
    },
}

/// A granted lease.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub(super) struct Lease {
    #[prost(uint64, tag = "1")]
    pub(super) ttl_ms: u64,
    /// Belongs to a single key (`?ttl=`) and goes with it.
    #[prost(bool, tag = "2")]
    pub(super) is_owned: bool,
}

/// All leases. Clones share their memory.
#[derive(Debug, Clone, Default)]
pub(super) struct Leases {
    by_id: OrdMap<u64, Lease>,
    keys: OrdSet<(u64, Bytes)>,
    /// What to write: a lease, or one of its keys.
    dirty: BTreeSet<(u64, Option<Bytes>)>,
    changes: Vec<LeaseChange>,
}

impl Leases {
    pub(super) fn load(store: &dyn KvStore) -> Result<Leases, StateError> {
        let mut leases = Leases::default();
        super::tables::read_all(store, Table::Lease, &mut |key, record| {
            let id = u64::from_be_bytes(key.try_into().ok()?);
            leases.by_id.insert(id, Lease::decode(record).ok()?);
            Some(())
        })?;
        super::tables::read_all(store, Table::LeaseKey, &mut |key, _| {
            let (id, key) = key.split_first_chunk::<8>()?;
            leases.keys.insert((u64::from_be_bytes(*id), Bytes::copy_from_slice(key)));
            Some(())
        })?;
        Ok(leases)
    }

    pub(super) fn get(&self, id: u64) -> Option<Lease> {
        self.by_id.get(&id).copied()
    }

    /// Whether a key other than its own may be attached to the lease.
    pub(super) fn is_attachable(&self, id: u64) -> bool {
        self.get(id).is_some_and(|lease| !lease.is_owned)
    }

    pub(super) fn grant(&mut self, id: u64, ttl_ms: u64, is_owned: bool) {
        self.by_id.insert(id, Lease { ttl_ms, is_owned });
        self.dirty.insert((id, None));
        self.changes.push(LeaseChange::Granted { id, ttl_ms });
    }

    /// Removes a lease whose keys are detached already.
    pub(super) fn remove(&mut self, id: u64) {
        if self.by_id.remove(&id).is_some() {
            self.dirty.insert((id, None));
            self.changes.push(LeaseChange::Removed { id });
        }
    }

    pub(super) fn attach(&mut self, id: u64, key: &[u8]) {
        let key = Bytes::copy_from_slice(key);
        self.keys.insert((id, key.clone()));
        self.dirty.insert((id, Some(key)));
    }

    /// Detaches a key; a lease that belonged to it goes.
    pub(super) fn detach(&mut self, id: u64, key: &[u8]) {
        let entry = (id, Bytes::copy_from_slice(key));
        if self.keys.remove(&entry).is_some() {
            self.dirty.insert((id, Some(entry.1)));
        }
        if self.get(id).is_some_and(|lease| lease.is_owned) {
            self.remove(id);
        }
    }

    /// The keys of a lease, in byte order.
    pub(super) fn keys(&self, id: u64) -> Vec<Bytes> {
        self.keys
            .range((id, Bytes::new())..)
            .take_while(|(owner, _)| *owner == id)
            .map(|(_, key)| key.clone())
            .collect()
    }

    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Every lease, by id.
    pub(super) fn all(&self) -> Vec<LeaseInfo> {
        self.by_id
            .iter()
            .map(|(id, lease)| LeaseInfo {
                id: *id,
                ttl_ms: lease.ttl_ms,
                owned: lease.is_owned,
            })
            .collect()
    }

    /// What happened since the last call.
    pub(super) fn take_changes(&mut self) -> Vec<LeaseChange> {
        std::mem::take(&mut self.changes)
    }

    /// Writes what changed since the last call. Returns whether anything did.
    pub(super) fn store(&mut self, batch: &mut WriteBatch) -> bool {
        let was_dirty = !self.dirty.is_empty();
        while let Some((id, key)) = self.dirty.pop_first() {
            match key {
                None => match self.by_id.get(&id) {
                    Some(lease) => batch.put(Table::Lease, id.to_be_bytes(), lease.encode_to_vec()),
                    None => batch.delete(Table::Lease, id.to_be_bytes()),
                },
                Some(key) => {
                    let record_key = key_record(id, &key);
                    if self.keys.contains(&(id, key)) {
                        batch.put(Table::LeaseKey, record_key, Vec::new());
                    } else {
                        batch.delete(Table::LeaseKey, record_key);
                    }
                }
            }
        }
        was_dirty
    }

    /// The record of [`Table::Lease`] that follows `after`, for snapshots.
    pub(super) fn record_after(&self, after: Option<&[u8]>) -> Option<(Vec<u8>, Vec<u8>)> {
        let from = match after {
            None => 0,
            Some(key) => u64::from_be_bytes(key.try_into().ok()?).checked_add(1)?,
        };
        let (id, lease) = self.by_id.range(from..).next()?;
        Some((id.to_be_bytes().to_vec(), lease.encode_to_vec()))
    }

    /// The record of [`Table::LeaseKey`] that follows `after`, for snapshots.
    pub(super) fn key_record_after(&self, after: Option<&[u8]>) -> Option<(Vec<u8>, Vec<u8>)> {
        let from = match after {
            None => (0, Bytes::new()),
            Some(record_key) => {
                let (id, key) = record_key.split_first_chunk::<8>()?;
                let mut next = key.to_vec();
                next.push(0);
                (u64::from_be_bytes(*id), next.into())
            }
        };
        let (id, key) = self.keys.range(from..).next()?;
        Some((key_record(*id, key), Vec::new()))
    }
}

fn key_record(id: u64, key: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(8 + key.len());
    out.extend_from_slice(&id.to_be_bytes());
    out.extend_from_slice(key);
    out
}
