//! Rules 7 and 9: a member starts only from a log and a state that are of one history, and knows as committed what either of them
//! knows; one whose log lacks what it acknowledged takes no part.

use metcd::consensus::StartError;
use metcd::state::Applied;
use raft::eraftpb::{ConfState, Entry, HardState, MessageType};

use crate::harness::{Cluster, Disk, ELECTION_TICKS, options, start};

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

#[test]
fn rule_9_a_member_whose_log_is_older_than_what_it_acknowledged_takes_no_part() {
    let mut cluster = Cluster::led_by(1, &[1, 2, 3]);
    let older = cluster.member(3).disk.clone();
    for _ in 0..5 {
        cluster.propose(1);
    }
    cluster.tick(1);
    assert!(!cluster.member(3).core.has_lost_log());
    cluster.member(3).disk = older;
    cluster.restart(3);
    cluster.tick(1);
    assert!(cluster.member(3).core.has_lost_log());
    let answers = [
        MessageType::MsgAppendResponse,
        MessageType::MsgRequestVoteResponse,
        MessageType::MsgRequestPreVoteResponse,
        MessageType::MsgRequestPreVote,
    ];
    let said = |cluster: &Cluster| answers.iter().map(|&kind| cluster.sent_by(3, kind).len()).sum::<usize>();
    let before = said(&cluster);
    // With 2 it would be a majority that lacks what 1 and 3 committed, had 2 not heard of it.
    cluster.isolate(1);
    cluster.tick(5 * ELECTION_TICKS);
    assert!(!cluster.member(2).core.is_leader());
    assert_eq!(said(&cluster), before, "no vote, no acknowledgement, no campaign");
}
