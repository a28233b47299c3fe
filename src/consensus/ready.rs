//! Raft's Ready in the one safe order. Where order is safety it is written flat.

use raft::Storage;
use raft::eraftpb::HardState;

use super::{Consensus, Persist};
use crate::wal::LogStart;

impl Consensus {
    pub(super) fn handle_ready(&mut self) {
        let mut ready = self.node.ready();
        let number = ready.number();
        let must_sync = ready.must_sync();

        for state in ready.take_read_states() {
            self.effects.reads.extend(self.reads.finish_round(&state.request_ctx, state.index));
        }

        let hard_state = ready.hs().cloned();
        let moved = hard_state.as_ref().is_some_and(|now| (now.term, now.vote) != self.promised);
        let mut commits_conf = false;
        if let Some(now) = hard_state {
            self.promised = (now.term, now.vote);
            commits_conf = self.node.store().changes_conf_within(self.noted_commit, now.commit) && !mutant!(LazyConfCommit);
            self.noted_commit = self.noted_commit.max(now.commit);
            self.lazy_hard_state = Some(now);
        }
        if commits_conf {
            self.conf_gate = Some(number);
        }

        // What the state machine may see was durable before this Ready: raft gives committed entries only from the durable part of the log.
        let committed = ready.take_committed_entries();
        self.handed_index = committed.last().map_or(self.handed_index, |entry| entry.index);
        if self.conf_gate.is_some() {
            self.gated.extend(committed);
        } else {
            self.effects.apply.extend(committed);
        }

        let messages = ready.take_messages();
        let mut held = ready.take_persisted_messages();
        if moved {
            self.moving = Some(number);
        }
        if self.moving.is_some() {
            // Rule 3: a Ready that moves term or vote sends nothing before the sync, not even a leader's messages; nor do those
            // that follow it before the sync has returned.
            held.extend(messages);
        } else {
            self.announcements.note(&messages);
            self.effects.messages.extend(messages);
        }

        if mutant!(SendBeforeSync) {
            self.effects.messages.append(&mut held);
        }

        let mut persist = Persist {
            number,
            ..Persist::default()
        };
        if !ready.snapshot().is_empty() {
            let metadata = ready.snapshot().get_metadata();
            let start = LogStart {
                index: metadata.index,
                term: metadata.term,
            };
            self.node.mut_store().reset(start);
            persist.snapshot = Some(start);
        }
        persist.entries = ready.take_entries();
        self.node.mut_store().append(&persist.entries);

        if mutant!(ApplyAtAppend) {
            let normal = |entry: &&raft::eraftpb::Entry| entry.get_entry_type() == raft::eraftpb::EntryType::EntryNormal;
            self.effects.apply.extend(persist.entries.iter().take_while(normal).cloned());
        }

        self.node.advance_append_async(ready);

        if must_sync || commits_conf {
            persist.hard_state = self.lazy_hard_state.take();
            if persist.snapshot.is_some() && persist.hard_state.is_none() {
                // The log begins anew: its term and vote must come along.
                persist.hard_state = Some(self.node.raft.hard_state());
            }
            if mutant!(DropHardState) && persist.snapshot.is_none() {
                persist.hard_state = None;
            }
            self.effects.persist.push(persist);
            if mutant!(CountBeforeSync) {
                self.node.on_persist_ready(number);
            }
            self.unpersisted.push_back((number, true));
            self.held.push_back((number, held));
        } else if self.unpersisted.is_empty() {
            // Nothing to write and nothing before it under way. A commit index that moved is not worth a sync: it is learned again.
            self.effects.messages.extend(held);
            self.node.on_persist_ready(number);
        } else {
            self.unpersisted.push_back((number, false));
            self.held.push_back((number, held));
        }
    }

    /// The newest hard state that is not with the WAL yet: written at an orderly stop, so that the next start knows the commit index.
    pub fn take_lazy_hard_state(&mut self) -> Option<HardState> {
        self.lazy_hard_state.take()
    }

    /// Term of an index in the log, if it is still there.
    pub fn term_at(&self, index: u64) -> Option<u64> {
        self.node.store().term(index).ok()
    }
}

#[cfg(test)]
mod tests {
    use raft::eraftpb::{ConfState, HardState};

    use super::super::{Consensus, Input, LogImage, Options};
    use crate::state::Applied;
    use crate::wal::{LogStart, Recovered};

    /// A sole voter elects itself within one call, and has a learner to send to.
    fn sole_voter_with_a_learner() -> Consensus {
        let options = Options {
            id: 1,
            boot: 1,
            heartbeat_ticks: 2,
            election_ticks: 20,
            max_inflight: 64,
            max_message_bytes: 1 << 20,
            linger_ticks: 100,
            max_unapplied_bytes: 1 << 20,
            seed: 7,
        };
        let hard_state = HardState {
            term: 1,
            commit: 1,
            ..Default::default()
        };
        let start = LogStart { index: 1, term: 1 };
        let recovered = Recovered {
            hard_state,
            start,
            last_index: 1,
        };
        let image = LogImage {
            recovered,
            ..LogImage::default()
        };
        let applied = Applied {
            index: 1,
            term: 1,
            conf_state: ConfState::from((vec![1], vec![2])),
        };
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        Consensus::start(options, image, applied, 0, &logger).unwrap()
    }

    #[test]
    fn rule_3_nothing_of_a_new_term_is_sent_before_the_term_is_durable() {
        let mut core = sole_voter_with_a_learner();
        core.step(Input::Campaign);
        let first = core.drain();
        assert!(core.is_leader());
        assert!(first.messages.is_empty(), "sent before the sync: {:?}", first.messages);
        // More work before the sync has returned: it sends nothing either.
        core.step(Input::Tick);
        core.step(Input::Tick);
        let second = core.drain();
        assert!(second.messages.is_empty(), "sent before the sync: {:?}", second.messages);
        for unit in first.persist.iter().chain(&second.persist) {
            core.step(Input::Persisted(unit.number));
        }
        assert!(!core.drain().messages.is_empty());
    }
}
