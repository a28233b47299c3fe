//! Rule 7: a member starts only from a log and a state that are of one history, and knows as committed what either of them knows.

use metcd::consensus::StartError;
use metcd::state::Applied;
use raft::eraftpb::{ConfState, Entry, HardState};

use crate::harness::{Disk, options, start};

/// A log from 2 to 5, the last two of term 3, of which 4 is known to be committed.
fn disk() -> Disk {
    let entry = |index| Entry {
        index,
        term: if index < 4 { 2 } else { 3 },
        ..Entry::default()
    };
    Disk {
        entries: (2..=5).map(|index| (index, entry(index))).collect(),
        hard_state: HardState {
            term: 3,
            commit: 4,
            ..HardState::default()
        },
    }
}

fn applied(index: u64, term: u64) -> Applied {
    Applied {
        index,
        term,
        conf_state: ConfState::from((vec![1, 2, 3], vec![])),
    }
}

#[test]
fn rule_7_a_state_ahead_of_the_log_is_refused() {
    let refused = start(options(1, 1), &disk(), applied(6, 3)).err();
    assert!(
        matches!(refused, Some(StartError::StateAhead { applied: 6, last: 5 })),
        "{refused:?}"
    );
}

#[test]
fn rule_7_a_state_that_ends_before_the_log_begins_is_refused() {
    let refused = start(options(1, 1), &disk(), applied(0, 0)).err();
    assert!(
        matches!(refused, Some(StartError::StateBehind { applied: 0, start: 1 })),
        "{refused:?}"
    );
}

#[test]
fn rule_7_a_state_of_another_history_is_refused() {
    let refused = start(options(1, 1), &disk(), applied(4, 2)).err();
    assert!(
        matches!(
            refused,
            Some(StartError::TermMismatch {
                index: 4,
                state_term: 2,
                log_term: 3
            })
        ),
        "{refused:?}"
    );
}

#[test]
fn rule_7_the_commit_index_is_the_larger_of_the_durable_and_the_applied_one() {
    for (applied_index, term, committed) in [(3, 2, 4), (4, 3, 4), (5, 3, 5)] {
        let core = start(options(1, 1), &disk(), applied(applied_index, term)).expect("they agree");
        assert_eq!(core.view().commit_index, committed);
    }
}
