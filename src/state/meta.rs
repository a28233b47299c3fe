//! The singletons of the state, in one record that is written with every batch; and the samples of revision over time.

use std::collections::VecDeque;

use prost::Message;
use raft::eraftpb::ConfState;

use super::StateError;
use crate::store::{KvStore, Table, WriteBatch};

/// Key of [`MetaRecord`] in [`Table::Meta`].
pub(super) const META_KEY: &[u8] = b"state";
/// Key of [`Samples`].
pub(super) const SAMPLES_KEY: &[u8] = b"samples";
/// The layout of the tables. A store with another one is refused.
pub(super) const FORMAT: u32 = 1;

/// Everything replicated that is there once.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct MetaRecord {
    #[prost(uint32, tag = "1")]
    pub(super) format: u32,
    #[prost(uint64, tag = "2")]
    pub(super) applied_index: u64,
    #[prost(uint64, tag = "3")]
    pub(super) applied_term: u64,
    #[prost(message, required, tag = "4")]
    pub(super) conf: ConfRecord,
    #[prost(uint64, tag = "5")]
    pub(super) cluster_id: u64,
    /// The current revision.
    #[prost(uint64, tag = "6")]
    pub(super) revision: u64,
    #[prost(uint64, tag = "7")]
    pub(super) compacted_revision: u64,
    /// The highest stamp applied.
    #[prost(uint64, tag = "8")]
    pub(super) cluster_time_ms: u64,
    /// Lease ids given so far.
    #[prost(uint64, tag = "9")]
    pub(super) last_lease_id: u64,
    /// Logical size of all versions ever written.
    #[prost(uint64, tag = "10")]
    pub(super) written_bytes: u64,
    /// Logical size of those that some compaction can forget, see `Row::dead_bytes`.
    #[prost(uint64, tag = "11")]
    pub(super) dead_bytes: u64,
    /// Logical size of those that are compacted.
    #[prost(uint64, tag = "12")]
    pub(super) forgotten_bytes: u64,
    /// The state hash, two halves of a `u128`.
    #[prost(fixed64, tag = "13")]
    pub(super) hash_high: u64,
    #[prost(fixed64, tag = "14")]
    pub(super) hash_low: u64,
    /// The cluster's feature level: the lowest that all members advertise; never falls.
    #[prost(uint32, tag = "15")]
    pub(super) feature_level: u32,
}

impl MetaRecord {
    /// Of an empty store.
    pub(super) fn initial() -> MetaRecord {
        MetaRecord {
            format: FORMAT,
            revision: 1,
            feature_level: 1,
            ..MetaRecord::default()
        }
    }

    pub(super) fn load(store: &dyn KvStore) -> Result<MetaRecord, StateError> {
        let Some(record) = store.get(Table::Meta, META_KEY)? else {
            return Ok(MetaRecord::initial());
        };
        let meta = MetaRecord::decode(&record[..]).map_err(|error| StateError::Corrupt(format!("the state's meta record: {error}")))?;
        if meta.format != FORMAT {
            return Err(StateError::Corrupt(format!(
                "the store has table format {}, this build reads {FORMAT}",
                meta.format
            )));
        }
        Ok(meta)
    }

    pub(super) fn store(&self, batch: &mut WriteBatch) {
        batch.put(Table::Meta, META_KEY, self.encode_to_vec());
    }

    pub(super) fn hash(&self) -> u128 {
        u128::from(self.hash_high) << 64 | u128::from(self.hash_low)
    }

    pub(super) fn set_hash(&mut self, hash: u128) {
        self.hash_high = (hash >> 64) as u64;
        self.hash_low = hash as u64;
    }

    /// See [`StateReader::logical_bytes`](super::StateReader::logical_bytes).
    pub(super) fn logical_bytes(&self) -> u64 {
        self.written_bytes.saturating_sub(self.forgotten_bytes)
    }

    /// What members compare in band: everything in here that must be equal at equal applied index.
    pub(super) fn fingerprint(&self) -> u128 {
        xxhash_rust::xxh3::xxh3_128(&self.encode_to_vec())
    }
}

/// raft's `ConfState`, sorted: raft gives it in no defined order, and equal states shall have equal records.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ConfRecord {
    #[prost(uint64, repeated, tag = "1")]
    pub(super) voters: Vec<u64>,
    #[prost(uint64, repeated, tag = "2")]
    pub(super) learners: Vec<u64>,
    #[prost(uint64, repeated, tag = "3")]
    pub(super) voters_outgoing: Vec<u64>,
    #[prost(uint64, repeated, tag = "4")]
    pub(super) learners_next: Vec<u64>,
    #[prost(bool, tag = "5")]
    pub(super) auto_leave: bool,
}

impl ConfRecord {
    pub(super) fn is_joint(&self) -> bool {
        !self.voters_outgoing.is_empty()
    }

    /// Whether the configuration knows `id` in any role.
    pub(super) fn contains(&self, id: u64) -> bool {
        [&self.voters, &self.learners, &self.voters_outgoing, &self.learners_next]
            .iter()
            .any(|ids| ids.contains(&id))
    }
}

impl From<&ConfState> for ConfRecord {
    fn from(conf: &ConfState) -> ConfRecord {
        let sorted = |ids: &[u64]| {
            let mut ids = ids.to_vec();
            ids.sort_unstable();
            ids
        };
        ConfRecord {
            voters: sorted(&conf.voters),
            learners: sorted(&conf.learners),
            voters_outgoing: sorted(&conf.voters_outgoing),
            learners_next: sorted(&conf.learners_next),
            auto_leave: conf.auto_leave,
        }
    }
}

impl From<&ConfRecord> for ConfState {
    fn from(record: &ConfRecord) -> ConfState {
        let mut conf = ConfState::default();
        conf.set_voters(record.voters.clone());
        conf.set_learners(record.learners.clone());
        conf.set_voters_outgoing(record.voters_outgoing.clone());
        conf.set_learners_next(record.learners_next.clone());
        conf.set_auto_leave(record.auto_leave);
        conf
    }
}

/// Which revision was current when: what keeping history by time needs. At most one sample a second of cluster time; when there
/// are too many, every second one goes, so that the past is known less and less finely.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Samples {
    /// (stamp in ms, revision current at that time), both ascending.
    list: VecDeque<(u64, u64)>,
    is_dirty: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
struct SamplesRecord {
    #[prost(uint64, repeated, tag = "1")]
    stamps_ms: Vec<u64>,
    #[prost(uint64, repeated, tag = "2")]
    revisions: Vec<u64>,
}

impl Samples {
    /// Cluster time between two samples, at least.
    const INTERVAL_MS: u64 = 1000;
    /// Samples kept. The record is rewritten for each new one, so it stays small.
    const MAX: usize = 1024;

    pub(super) fn load(store: &dyn KvStore) -> Result<Samples, StateError> {
        let Some(record) = store.get(Table::Meta, SAMPLES_KEY)? else {
            return Ok(Samples::default());
        };
        let record = SamplesRecord::decode(&record[..]).map_err(|error| StateError::Corrupt(format!("revision samples: {error}")))?;
        Ok(Samples {
            list: record.stamps_ms.into_iter().zip(record.revisions).collect(),
            is_dirty: false,
        })
    }

    /// At cluster time `stamp_ms`, before anything of that time is applied, `revision` is current.
    pub(super) fn note(&mut self, stamp_ms: u64, revision: u64) {
        if let Some((last_ms, last_revision)) = self.list.back()
            && (stamp_ms < last_ms + Self::INTERVAL_MS || revision == *last_revision)
        {
            return;
        }
        if self.list.len() >= Self::MAX {
            let mut keep = false;
            self.list.retain(|_| {
                keep = !keep;
                keep
            });
        }
        self.list.push_back((stamp_ms, revision));
        self.is_dirty = true;
    }

    /// History below `revision` is gone: samples of it are of no more use.
    pub(super) fn forget_before(&mut self, revision: u64) {
        while self.list.front().is_some_and(|(_, sampled)| *sampled < revision) {
            self.list.pop_front();
            self.is_dirty = true;
        }
    }

    /// The newest sample: cluster time in milliseconds, and the revision that was current.
    pub(super) fn last(&self) -> Option<(u64, u64)> {
        self.list.back().copied()
    }

    /// The newest revision known to have been current at `stamp_ms` or before.
    pub(super) fn revision_before(&self, stamp_ms: u64) -> Option<u64> {
        let after = self.list.partition_point(|(sampled_ms, _)| *sampled_ms <= stamp_ms);
        after.checked_sub(1).and_then(|at| self.list.get(at)).map(|(_, revision)| *revision)
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let (stamps_ms, revisions) = self.list.iter().copied().unzip();
        SamplesRecord { stamps_ms, revisions }.encode_to_vec()
    }

    /// Writes what changed since the last call. Returns whether anything did.
    pub(super) fn store(&mut self, batch: &mut WriteBatch) -> bool {
        let was_dirty = std::mem::take(&mut self.is_dirty);
        if was_dirty {
            batch.put(Table::Meta, SAMPLES_KEY, self.encode());
        }
        was_dirty
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_revision_of_a_past_time_is_never_one_made_later() {
        let mut samples = Samples::default();
        for second in 0..10_000u64 {
            samples.note(second * 1000, 1 + second * 7);
        }
        assert!(samples.list.len() <= Samples::MAX);
        for stamp_ms in [0, 500, 5_000_000, 9_999_000, 20_000_000] {
            let found = samples.revision_before(stamp_ms).unwrap();
            assert!(found <= 1 + (stamp_ms / 1000) * 7, "at {stamp_ms} ms: {found}");
        }
        assert_eq!(samples.revision_before(9_999_500), Some(1 + 9_999 * 7));
    }

    #[test]
    fn nothing_is_known_of_the_time_before_the_first_sample() {
        let mut samples = Samples::default();
        samples.note(5000, 3);
        assert_eq!(samples.revision_before(4999), None);
        assert_eq!(samples.revision_before(5000), Some(3));
    }

    #[test]
    fn a_quiet_store_adds_no_samples() {
        let mut samples = Samples::default();
        samples.note(1000, 3);
        samples.note(9000, 3);
        assert_eq!(samples.list.len(), 1);
    }
}
