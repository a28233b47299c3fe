//! Idempotency-Key records: the first result of a request, kept for its retries (rule 14).

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use imbl::{OrdMap, OrdSet};
use prost::Message;

use super::StateError;
use super::command::Idempotency;
use super::outcome::{Outcome, Refusal};
use super::record::OutcomeRecord;
use crate::store::{KvStore, Table, WriteBatch};

#[derive(Clone, PartialEq, prost::Message)]
struct IdempotencyRecord {
    #[prost(uint64, tag = "1")]
    stamp_ms: u64,
    #[prost(bytes = "bytes", tag = "2")]
    fingerprint: Bytes,
    #[prost(message, required, tag = "3")]
    outcome: OutcomeRecord,
}

/// All records. Clones share their memory.
#[derive(Debug, Clone, Default)]
pub(super) struct IdempotencyTable {
    by_key: OrdMap<String, Arc<[u8]>>,
    by_stamp: OrdSet<(u64, String)>,
    /// Of all keys and records.
    bytes: u64,
    dirty: BTreeSet<String>,
}

impl IdempotencyTable {
    pub(super) fn load(store: &dyn KvStore) -> Result<IdempotencyTable, StateError> {
        let mut table = IdempotencyTable::default();
        super::tables::read_all(store, Table::Idempotency, &mut |key, record| {
            let key = String::from_utf8(key.to_vec()).ok()?;
            table
                .by_stamp
                .insert((IdempotencyRecord::decode(record).ok()?.stamp_ms, key.clone()));
            table.bytes += (key.len() + record.len()) as u64;
            table.by_key.insert(key, record.into());
            Some(())
        })?;
        Ok(table)
    }

    /// The answer that needs no execution: the first one again, or a refusal. `None`: execute.
    pub(super) fn answer(&self, wanted: &Idempotency, revision: u64) -> Result<Option<Outcome>, StateError> {
        let refuse = |refusal| {
            Ok(Some(Outcome {
                revision,
                replayed: false,
                result: Err(refusal),
            }))
        };
        if mutant!(ForgetIdempotency) {
            return Ok(None);
        }
        let Some(record) = self.by_key.get(&wanted.key) else {
            let is_full = self.by_key.len() as u64 >= wanted.max_entries || (wanted.max_bytes != 0 && self.bytes >= wanted.max_bytes);
            return if is_full { refuse(Refusal::IdempotencyTableFull) } else { Ok(None) };
        };
        let record = IdempotencyRecord::decode(Bytes::from_owner(record.clone()))
            .map_err(|error| StateError::Corrupt(format!("an idempotency record: {error}")))?;
        if record.fingerprint != wanted.fingerprint {
            return refuse(Refusal::IdempotencyKeyReused);
        }
        let outcome = record
            .outcome
            .into_outcome()
            .ok_or_else(|| StateError::Corrupt("an idempotency record has no outcome".into()))?;
        Ok(Some(Outcome { replayed: true, ..outcome }))
    }

    /// Keeps an executed command's outcome, if it is of those that are replayed (2xx, 404, 412).
    pub(super) fn record(&mut self, wanted: &Idempotency, stamp_ms: u64, outcome: &Outcome) {
        let Some(outcome) = OutcomeRecord::from_outcome(outcome) else {
            return;
        };
        let record = IdempotencyRecord {
            stamp_ms,
            fingerprint: wanted.fingerprint.clone(),
            outcome,
        };
        let record = record.encode_to_vec();
        self.bytes += (wanted.key.len() + record.len()) as u64;
        self.by_key.insert(wanted.key.clone(), record.into());
        self.by_stamp.insert((stamp_ms, wanted.key.clone()));
        self.dirty.insert(wanted.key.clone());
    }

    /// Removes the records made at `up_to_stamp_ms` or before.
    pub(super) fn evict(&mut self, up_to_stamp_ms: u64) {
        while self.by_stamp.get_min().is_some_and(|(stamp_ms, _)| *stamp_ms <= up_to_stamp_ms)
            && let Some((_, key)) = self.by_stamp.remove_min()
        {
            if let Some(record) = self.by_key.remove(&key) {
                self.bytes -= (key.len() + record.len()) as u64;
            }
            self.dirty.insert(key);
        }
    }

    /// Stamp of the oldest record, and how many there are.
    pub(super) fn oldest(&self) -> (Option<u64>, usize) {
        (self.by_stamp.get_min().map(|(stamp_ms, _)| *stamp_ms), self.by_key.len())
    }

    /// Writes what changed since the last call. Returns whether anything did.
    pub(super) fn store(&mut self, batch: &mut WriteBatch) -> bool {
        let was_dirty = !self.dirty.is_empty();
        while let Some(key) = self.dirty.pop_first() {
            match self.by_key.get(&key) {
                Some(record) => batch.put(Table::Idempotency, key, record.clone()),
                None => batch.delete(Table::Idempotency, key),
            }
        }
        was_dirty
    }

    /// The record that follows `after`, for snapshots.
    pub(super) fn record_after(&self, after: Option<&[u8]>) -> Option<(Vec<u8>, Arc<[u8]>)> {
        let from = match after {
            None => String::new(),
            Some(key) => format!("{}\0", std::str::from_utf8(key).ok()?),
        };
        self.by_key
            .range(from..)
            .next()
            .map(|(key, record)| (key.clone().into_bytes(), record.clone()))
    }
}
