//! Comparison of the members' state hashes, which they report through the log at agreed applied indexes.
//!
//! Derived from the log alone and not stored: after a restart the next reports fill it again.

use std::collections::BTreeMap;

use super::command::HashReport;

/// Agreed indexes: those divisible by this.
pub const HASH_REPORT_INTERVAL: u64 = 10_000;
/// Agreed indexes remembered.
const KEPT: usize = 4;

/// The latest reports.
#[derive(Debug, Clone, Default)]
pub(super) struct Reports {
    /// Applied index → member → hash.
    by_index: BTreeMap<u64, BTreeMap<u64, Vec<u8>>>,
}

impl Reports {
    pub(super) fn note(&mut self, report: &HashReport) {
        self.by_index
            .entry(report.index)
            .or_default()
            .insert(report.member, report.hash.to_vec());
        while self.by_index.len() > KEPT {
            self.by_index.pop_first();
        }
    }

    /// Why `own_id` must not serve: its state differs from an agreeing majority of the voters.
    pub(super) fn divergence(&self, own_id: u64, voters: &[u64]) -> Option<String> {
        self.by_index.iter().find_map(|(index, reports)| {
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
        self.by_index.iter().find_map(|(index, reports)| {
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
