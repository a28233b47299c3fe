//! Members on their way out.
//!
//! raft-rs forgets a member at the moment its removal is applied: it would never hear that the removal is committed. That matters to
//! others than itself. Whoever has not heard of it either counts by the old configuration, and may need its vote; and a member that is
//! stopped before its own disk knows comes back as a voter. So:
//!
//! - the leader goes on sending to it until it has acknowledged the commit of its removal, at most for
//!   [`Options::linger_ticks`](super::Options::linger_ticks).
//! - it may be told that it was removed, which ends it for good, when nobody can need its vote any more: when it is durable on a
//!   majority of those that remain that the removal is committed. Whoever else of them leads one day, has their votes, and hears of it.
//!   Only a leader knows that ([`Consensus::knows_the_departed`]); the others ask it (`server::admission`).
//! - a member that is told so goes on while its own log does not say it and somebody leads it: the commit is on its way.
//! - a member whose log says it stays until it is told.
//!
//! The leader knows by two ways. It has applied the removal while it led, and acknowledgements show the commit index of the others: one
//! that covers a configuration change leaves when that is durable (`ready`). Or it had applied it before it was elected, and an entry of
//! its term is committed: whoever acknowledged that entry received it with a commit index behind the removal, and wrote both at once.

use std::collections::BTreeMap;

use raft::eraftpb::{Message, MessageType};
use raft::{GetEntriesContext, StateRole};

use super::Consensus;

/// A member that was removed, as the leader sees it.
#[derive(Debug)]
struct Departing {
    term: u64,
    since_tick: u64,
    /// The commit index that it has to hear of: its removal's, or a little more.
    target: u64,
    /// Its log holds everything up to here.
    matched: u64,
    acknowledged: bool,
}

/// Who is leaving.
#[derive(Debug, Default)]
pub(super) struct Leaving {
    departing: BTreeMap<u64, Departing>,
    /// This member's own configuration names it no longer.
    is_out: bool,
    /// When another member first said that this one was removed and is not needed.
    told_at: Option<u64>,
    ticks: usize,
}

impl Consensus {
    /// Members that were removed and still have to hear of it from this leader: they are not to be told to stop yet.
    pub fn leaving(&self) -> Vec<u64> {
        self.leaving.departing.keys().copied().collect()
    }

    /// Whether this member leads and knows of everybody who was removed, and is not [`leaving`](Self::leaving), that nobody needs them.
    pub fn knows_the_departed(&self) -> bool {
        self.is_leader() && self.node.raft.commit_to_current_term()
    }

    /// This member was removed from the cluster, and nothing is lost any more if it stops for good.
    pub fn has_left(&self) -> bool {
        let Some(told_at) = self.leaving.told_at else { return false };
        let waited = self.tick.saturating_sub(told_at);
        let is_alone = waited >= self.options.election_ticks as u64 && !self.is_led();
        self.leaving.is_out || is_alone || waited >= self.options.linger_ticks
    }

    /// Another member says that this one was removed.
    pub(super) fn handle_told_removed(&mut self) {
        if self.leaving.told_at.is_none() {
            self.leaving.told_at = Some(self.tick);
        }
    }

    /// The configuration of this member does not name it, or no longer.
    pub(super) fn note_own_membership(&mut self) {
        let prs = self.node.raft.prs();
        // A joiner has no configuration at all.
        let is_out = prs.get(self.options.id).is_none() && prs.iter().next().is_some();
        if is_out && !self.leaving.is_out {
            tracing::info!(
                id = self.options.id,
                "this member was removed; it stops when the leader says that nobody needs its vote any more"
            );
        }
        self.leaving.is_out = is_out;
    }

    /// On the leader, before a configuration change: who is in, and how far each log matches.
    pub(super) fn matched_before_change(&self) -> Vec<(u64, u64)> {
        if self.node.raft.state != StateRole::Leader {
            return Vec::new();
        }
        let peers = self.node.raft.prs().iter();
        peers.map(|(&id, progress)| (id, progress.matched)).collect()
    }

    /// After the change: those who are out are to hear of it.
    pub(super) fn note_departures(&mut self, before: Vec<(u64, u64)>) {
        let raft = &self.node.raft;
        for (id, matched) in before {
            if id != self.options.id && raft.prs().get(id).is_none() {
                let departing = Departing {
                    term: raft.term,
                    since_tick: self.tick,
                    target: raft.raft_log.committed,
                    matched,
                    acknowledged: false,
                };
                self.leaving.departing.insert(id, departing);
            }
        }
    }

    /// What a departing member answers; raft does not know it any more.
    pub(super) fn note_departing(&mut self, message: &Message) {
        let Some(departing) = self.leaving.departing.get_mut(&message.from) else {
            return;
        };
        let kind = message.get_msg_type();
        if message.term != departing.term || !matches!(kind, MessageType::MsgAppendResponse | MessageType::MsgHeartbeatResponse) {
            return;
        }
        if kind == MessageType::MsgAppendResponse {
            departing.matched = if message.reject {
                departing.matched.min(message.reject_hint)
            } else {
                departing.matched.max(message.index)
            };
        }
        departing.acknowledged |= message.commit >= departing.target;
    }

    /// Once per heartbeat: goes on with those who have to hear of their removal, and lets go of those who have.
    pub(super) fn accompany_the_departing(&mut self) {
        if self.leaving.departing.is_empty() {
            return;
        }
        let (term, is_leader, now, patience) = (self.node.raft.term, self.is_leader(), self.tick, self.options.linger_ticks);
        let mut departing = std::mem::take(&mut self.leaving.departing);
        departing.retain(|_, member| {
            let is_accompanied = member.acknowledged || now.saturating_sub(member.since_tick) >= patience;
            let is_done = is_accompanied && self.is_commit_known_to_most(member.target);
            is_leader && member.term == term && !is_done
        });
        self.leaving.ticks += 1;
        if self.leaving.ticks >= self.options.heartbeat_ticks {
            self.leaving.ticks = 0;
            for (&id, member) in &departing {
                self.accompany(id, member);
            }
        }
        self.leaving.departing = departing;
    }

    /// This member knows it, durably: it has applied the change.
    fn is_commit_known_to_most(&self, target: u64) -> bool {
        let prs = self.node.raft.prs();
        let conf = prs.conf().to_conf_state();
        let knows = |id: &&u64| **id == self.options.id || prs.get(**id).is_some_and(|progress| progress.committed_index >= target);
        let has_majority = |voters: &[u64]| voters.iter().filter(knows).count() > voters.len() / 2;
        has_majority(&conf.voters) && (conf.voters_outgoing.is_empty() || has_majority(&conf.voters_outgoing))
    }

    /// A heartbeat with as much of the commit as its log holds, and the entries it lacks, if they are in memory. Whoever lags further
    /// is told at the end of the leader's patience.
    fn accompany(&mut self, id: u64, member: &Departing) {
        let log = &self.node.raft.raft_log;
        let message = |kind: MessageType, commit: u64| {
            let mut message = Message {
                from: self.options.id,
                to: id,
                term: member.term,
                commit,
                ..Message::default()
            };
            message.set_msg_type(kind);
            message
        };
        let mut messages = vec![message(MessageType::MsgHeartbeat, member.matched.min(member.target))];
        // Entries that left memory must not be asked for: raft-rs takes it for a damaged log that they are not at hand, and panics.
        let is_at_hand = member.matched + 1 >= log.store.first_cached().max(log.store.start().index + 1);
        if member.matched < member.target
            && is_at_hand
            && let Ok(log_term) = log.term(member.matched)
            && let Ok(entries) = log.slice(
                member.matched + 1,
                member.target + 1,
                self.options.max_message_bytes,
                GetEntriesContext::empty(false),
            )
        {
            let mut append = message(MessageType::MsgAppend, member.target);
            (append.index, append.log_term) = (member.matched, log_term);
            append.set_entries(entries.into());
            messages.push(append);
        }
        self.effects.messages.extend(messages);
    }
}
