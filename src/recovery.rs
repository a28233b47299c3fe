//! Making the log agree with the state at start (rule 7). PURE but for the log it is given: the simulator starts its nodes with it too.

use raft::eraftpb::{Entry, HardState};

use crate::consensus::LogImage;
use crate::state::Applied;
use crate::wal::{LogStart, Recovered, Wal, WalError};

/// Bytes read from the log at once while it is looked through.
const READ_BYTES: u64 = 8 << 20;

/// What the log holds, as the protocol wants it. `snapshot_index` is the newest complete snapshot, already in the state.
///
/// If that snapshot was installed and the crash came before the log began anew, the log begins anew now.
pub fn reconcile(wal: &mut dyn Wal, applied: &Applied, snapshot_index: Option<u64>) -> Result<LogImage, WalError> {
    let recovered = settle(wal, applied, snapshot_index)?;
    let (term_runs, tail) = read_log(wal, recovered.start, recovered.last_index, applied.index)?;
    Ok(LogImage {
        recovered,
        term_runs,
        tail,
    })
}

/// The first half of [`reconcile`], for whoever reads the entries piece by piece: where the log begins and ends.
pub fn settle(wal: &mut dyn Wal, applied: &Applied, snapshot_index: Option<u64>) -> Result<Recovered, WalError> {
    let Recovered {
        mut hard_state,
        mut start,
        mut last_index,
    } = wal.recovered().clone();
    // A log that begins behind the state was cut too far, or the snapshot it was cut for is gone. To begin anew would be to forget
    // what this member has acknowledged: the log stays as it is, and the protocol refuses to start on it.
    let is_installed = snapshot_index == Some(applied.index) && applied.index >= start.index;
    if is_installed && !agrees(wal, start, last_index, applied)? {
        start = LogStart {
            index: applied.index,
            term: applied.term,
        };
        hard_state = HardState {
            term: hard_state.term.max(applied.term),
            commit: applied.index,
            ..hard_state
        };
        wal.reset(start, &hard_state)?;
        last_index = start.index;
    }
    Ok(Recovered {
        hard_state,
        start,
        last_index,
    })
}

/// Whether the log knows the applied index under the applied term.
fn agrees(wal: &dyn Wal, start: LogStart, last_index: u64, applied: &Applied) -> Result<bool, WalError> {
    let index = applied.index;
    if index == start.index {
        return Ok(applied.term == start.term);
    }
    if index < start.index || index > last_index {
        return Ok(false);
    }
    let entries = wal.entries(index, index + 1, u64::MAX)?;
    Ok(entries.first().is_some_and(|entry| entry.term == applied.term))
}

/// (first index, term) of each run of equal terms, and the entries after an index.
type LogParts = (Vec<(u64, u64)>, Vec<Entry>);

/// The terms of the whole log, and its entries after `applied_index`; the last one always, for that is how its end is known.
fn read_log(wal: &dyn Wal, start: LogStart, last_index: u64, applied_index: u64) -> Result<LogParts, WalError> {
    let mut term_runs: Vec<(u64, u64)> = Vec::new();
    let mut tail = Vec::new();
    let mut next = start.index + 1;
    while next <= last_index {
        for entry in wal.entries(next, last_index + 1, READ_BYTES)? {
            next = entry.index + 1;
            if term_runs.last().is_none_or(|&(_, term)| term != entry.term) {
                term_runs.push((entry.index, entry.term));
            }
            if entry.index > applied_index || (entry.index == last_index && !mutant!(ForgetLogEnd)) {
                tail.push(entry);
            }
        }
    }
    Ok((term_runs, tail))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consensus::{Consensus, Options, StartError};
    use crate::wal::WalBatch;
    use crate::wal::memory::{Disk, open};

    fn log(last: u64) -> Disk {
        let disk = Disk::new();
        let mut wal = open(&disk).unwrap();
        let hard_state = HardState {
            term: 3,
            vote: 2,
            ..HardState::default()
        };
        wal.reset(LogStart { index: 1, term: 1 }, &hard_state).unwrap();
        let entries = (2..=last).map(|index| Entry {
            index,
            term: 3,
            ..Entry::default()
        });
        wal.append(&WalBatch {
            entries: entries.collect(),
            hard_state: None,
        })
        .unwrap();
        disk
    }

    fn at(index: u64, term: u64) -> Applied {
        Applied {
            index,
            term,
            ..Applied::default()
        }
    }

    #[test]
    fn a_log_that_is_wholly_applied_still_knows_its_end() {
        let mut wal = open(&log(5)).unwrap();
        let image = reconcile(&mut wal, &at(5, 3), Some(5)).unwrap();
        assert_eq!(image.recovered.last_index, 5);
        assert_eq!(image.tail.iter().map(|entry| entry.index).collect::<Vec<_>>(), [5]);
    }

    #[test]
    fn rule_7_a_state_behind_the_log_is_refused_and_the_log_stays() {
        let disk = log(5);
        open(&disk).unwrap().compact(LogStart { index: 4, term: 3 }).unwrap();
        let mut wal = open(&disk).unwrap();
        let image = reconcile(&mut wal, &at(3, 3), Some(3)).unwrap();
        assert_eq!((image.recovered.start.index, image.recovered.last_index), (4, 5));
        assert_eq!(open(&disk).unwrap().recovered(), &image.recovered, "nothing was thrown away");
        let options = Options {
            id: 1,
            boot: 1,
            heartbeat_ticks: 2,
            election_ticks: 20,
            max_inflight: 64,
            max_message_bytes: 1 << 20,
            seed: 7,
            linger_ticks: 100,
            max_unapplied_bytes: 64 << 20,
        };
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let refused = Consensus::start(options, image, at(3, 3), 0, &logger).err();
        assert!(
            matches!(refused, Some(StartError::StateBehind { applied: 3, start: 4 })),
            "{refused:?}"
        );
    }

    #[test]
    fn a_snapshot_whose_log_did_not_begin_anew_yet_gets_it_and_keeps_the_vote() {
        let mut wal = open(&log(5)).unwrap();
        let image = reconcile(&mut wal, &at(9, 3), Some(9)).unwrap();
        assert_eq!(image.recovered.start, LogStart { index: 9, term: 3 });
        assert_eq!((image.recovered.hard_state.vote, image.recovered.hard_state.commit), (2, 9));
        assert!(image.tail.is_empty());
    }
}
