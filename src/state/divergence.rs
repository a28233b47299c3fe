//! Comparison of the members' state hashes, which they report through the log at agreed applied indexes.
//!
//! The reports are replicated state: stored with the batch that brings them, and part of every snapshot. So a member that was found to differ
//! is still quarantined after a restart, and a new leader knows what the old one knew. What a member still has to report is kept in its own
//! store until the log has it ([`Due`]): neither a restart nor a time without a leader loses the comparison of an index.

use std::collections::BTreeMap;

use prost::Message;

use super::StateError;
use super::command::HashReport;
use crate::store::{KvStore, Table, WriteBatch};

/// Agreed indexes: those divisible by this.
pub const HASH_REPORT_INTERVAL: u64 = 10_000;
/// Agreed indexes remembered.
const KEPT: usize = 4;
/// Key of the reports in [`Table::Meta`].
pub(super) const REPORTS_KEY: &[u8] = b"reports";
/// Key of the store's own report that is due. It is this store's business alone: no snapshot has it.
const DUE_KEY: &[u8] = b"report";

/// This store's own hash at the newest agreed index it has passed: to be reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Due {
    pub(super) index: u64,
    pub(super) hash: u128,
}

impl Due {
    pub(super) fn load(store: &dyn KvStore) -> Result<Option<Due>, StateError> {
        let Some(record) = store.get(Table::Meta, DUE_KEY)? else {
            return Ok(None);
        };
        match record.split_first_chunk::<8>() {
            Some((index, hash)) if hash.len() == 16 => Ok(hash.try_into().ok().map(|hash| Due {
                index: u64::from_be_bytes(*index),
                hash: u128::from_be_bytes(hash),
            })),
            Some(_) | None => Err(StateError::Corrupt("the due hash report cannot be decoded".into())),
        }
    }

    pub(super) fn store(&self, batch: &mut WriteBatch) {
        batch.put(
            Table::Meta,
            DUE_KEY,
            [&self.index.to_be_bytes()[..], &self.hash.to_be_bytes()].concat(),
        );
    }
}

/// The latest reports.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Reports {
    /// Applied index → member → hash.
    by_index: BTreeMap<u64, BTreeMap<u64, Vec<u8>>>,
    is_dirty: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ReportsRecord {
    #[prost(message, repeated, tag = "1")]
    reports: Vec<HashReport>,
}

impl Reports {
    pub(super) fn load(store: &dyn KvStore) -> Result<Reports, StateError> {
        let mut reports = Reports::default();
        if let Some(record) = store.get(Table::Meta, REPORTS_KEY)? {
            let record = ReportsRecord::decode(&record[..]).map_err(|error| StateError::Corrupt(format!("hash reports: {error}")))?;
            record.reports.iter().for_each(|report| reports.note(report));
            reports.is_dirty = false;
        }
        Ok(reports)
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let of_index = |(index, reports): (&u64, &BTreeMap<u64, Vec<u8>>)| -> Vec<HashReport> {
            let report = |(member, hash): (&u64, &Vec<u8>)| HashReport {
                member: *member,
                index: *index,
                hash: hash.clone().into(),
            };
            reports.iter().map(report).collect()
        };
        let reports = self.by_index.iter().flat_map(of_index).collect();
        ReportsRecord { reports }.encode_to_vec()
    }

    /// Writes what changed since the last call. Returns whether anything did.
    pub(super) fn store(&mut self, batch: &mut WriteBatch) -> bool {
        let was_dirty = std::mem::take(&mut self.is_dirty);
        if was_dirty {
            batch.put(Table::Meta, REPORTS_KEY, self.encode());
        }
        was_dirty
    }

    /// Whether a report of `member` at `index` would add something: it is not known, and the index is not forgotten already.
    pub(super) fn lacks(&self, member: u64, index: u64) -> bool {
        match self.by_index.get(&index) {
            Some(reports) => !reports.contains_key(&member),
            None => self.by_index.len() < KEPT || self.by_index.first_key_value().is_some_and(|(oldest, _)| *oldest < index),
        }
    }

    /// They were about other members.
    pub(super) fn forget(&mut self) {
        *self = Reports {
            by_index: BTreeMap::new(),
            is_dirty: true,
        };
    }

    pub(super) fn note(&mut self, report: &HashReport) {
        self.is_dirty = true;
        self.by_index
            .entry(report.index)
            .or_default()
            .insert(report.member, report.hash.to_vec());
        while self.by_index.len() > KEPT {
            self.by_index.pop_first();
        }
    }

    /// Where not all reports are the same. Every request asks, and nearly always there is nothing.
    fn differing(&self) -> impl Iterator<Item = (&u64, &BTreeMap<u64, Vec<u8>>)> {
        self.by_index.iter().filter(|(_, reports)| {
            let mut hashes = reports.values();
            let first = hashes.next();
            hashes.any(|hash| Some(hash) != first)
        })
    }

    /// Why `own_id` must not serve: its state differs from an agreeing majority of the voters.
    pub(super) fn divergence(&self, own_id: u64, voters: &[u64]) -> Option<String> {
        self.differing().find_map(|(index, reports)| {
            let own = reports.get(&own_id)?;
            let (hash, agreeing) = most_frequent(reports, voters)?;
            (agreeing > voters.len() / 2 && hash != own).then(|| {
                format!(
                    "the state of member {own_id} at index {index} differs from that of {agreeing} of {} voters",
                    voters.len()
                )
            })
        })
    }

    /// Why no member may take writes: the voters' states differ, and no majority can agree any more.
    pub(super) fn disagreement(&self, voters: &[u64]) -> Option<String> {
        self.differing().find_map(|(index, reports)| {
            let (_, agreeing) = most_frequent(reports, voters)?;
            let missing = voters.iter().filter(|id| !reports.contains_key(id)).count();
            (agreeing + missing <= voters.len() / 2)
                .then(|| format!("the voters' states differ at index {index}, without a majority that agrees"))
        })
    }
}

/// The hash that most voters reported, and how many did.
fn most_frequent<'a>(reports: &'a BTreeMap<u64, Vec<u8>>, voters: &[u64]) -> Option<(&'a Vec<u8>, usize)> {
    let mut votes: BTreeMap<&Vec<u8>, usize> = BTreeMap::new();
    for hash in voters.iter().filter_map(|id| reports.get(id)) {
        *votes.entry(hash).or_default() += 1;
    }
    votes.into_iter().max_by_key(|(_, count)| *count)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reports(hashes: &[(u64, &'static [u8])]) -> Reports {
        let mut reports = Reports::default();
        for (member, hash) in hashes {
            reports.note(&HashReport {
                member: *member,
                index: 10_000,
                hash: bytes::Bytes::from_static(hash),
            });
        }
        reports
    }

    #[test]
    fn only_the_one_that_differs_from_an_agreeing_majority_is_quarantined() {
        let reports = reports(&[(1, b"a"), (2, b"a"), (3, b"b")]);
        let diverged: Vec<u64> = (1..=3).filter(|id| reports.divergence(*id, &[1, 2, 3]).is_some()).collect();
        assert_eq!(diverged, [3]);
        assert_eq!(reports.disagreement(&[1, 2, 3]), None);
    }

    #[test]
    fn one_of_two_that_differ_is_not_blamed_before_a_majority_is_known() {
        let reports = reports(&[(1, b"a"), (3, b"b")]);
        assert_eq!(reports.divergence(3, &[1, 2, 3]), None);
        assert_eq!(reports.disagreement(&[1, 2, 3]), None);
    }

    #[test]
    fn without_a_majority_all_are_told() {
        let reports = reports(&[(1, b"a"), (2, b"c"), (3, b"b")]);
        assert!((1..=3).all(|id| reports.divergence(id, &[1, 2, 3]).is_none()));
        assert!(reports.disagreement(&[1, 2, 3]).is_some());
    }

    #[test]
    fn old_reports_are_forgotten() {
        let mut reports = reports(&[(1, b"a"), (2, b"a"), (3, b"b")]);
        for index in 2..=5 {
            reports.note(&HashReport {
                member: 3,
                index: index * 10_000,
                hash: bytes::Bytes::from_static(b"b"),
            });
        }
        assert_eq!(reports.divergence(3, &[1, 2, 3]), None);
    }
}
