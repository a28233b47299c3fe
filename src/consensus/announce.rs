//! Who knows of which commit index. raft-rs tells every follower of every commit at once, by an empty append of its own; under load the
//! next append says the same a moment later. So a follower is told at once only if it waits: it forwarded a command that is committed
//! now. The others hear of it with the next append, and [`super::Input::Announce`] brings it to those to whom none went for a while.

use std::collections::BTreeMap;

use raft::eraftpb::{Message, MessageType};

use super::Consensus;

/// What the leader has told the others.
#[derive(Debug, Default)]
pub(super) struct Announcements {
    /// Highest commit index in an append or heartbeat to a peer.
    told: BTreeMap<u64, u64>,
    /// Peer → the last entry that holds commands it forwarded and waits for.
    waits_for: BTreeMap<u64, u64>,
}

impl Announcements {
    pub(super) fn forwarded(&mut self, peer: u64, index: u64) {
        self.waits_for.insert(peer, index);
    }

    pub(super) fn note(&mut self, messages: &[Message]) {
        for message in messages {
            if matches!(message.get_msg_type(), MessageType::MsgAppend | MessageType::MsgHeartbeat) {
                let told = self.told.entry(message.to).or_default();
                *told = message.commit.max(*told);
            }
        }
    }

    fn knows(&self, peer: u64, commit: u64) -> bool {
        self.told.get(&peer).is_some_and(|&told| told >= commit)
    }

    pub(super) fn clear(&mut self) {
        self.told.clear();
        self.waits_for.clear();
    }
}

impl Consensus {
    /// Tells those who wait for this commit; notes whether others are still to be told.
    pub(super) fn announce_to_waiting(&mut self) {
        if !self.is_leader() {
            self.announcements.clear();
            self.effects.commit_unannounced = false;
            return;
        }
        let commit = self.node.raft.raft_log.committed;
        let mut waiting = Vec::new();
        self.announcements.waits_for.retain(|&peer, &mut index| {
            let is_committed = index <= commit;
            if is_committed {
                waiting.push(peer);
            }
            !is_committed
        });
        for peer in waiting {
            self.tell(peer, commit);
        }
        let is_incomplete = self.unaware(commit).next().is_some();
        self.effects.commit_unannounced = is_incomplete;
    }

    /// Tells everybody who was not told by an append yet.
    pub(super) fn announce_to_all(&mut self) {
        if self.is_leader() {
            let commit = self.node.raft.raft_log.committed;
            let unaware: Vec<u64> = self.unaware(commit).collect();
            for peer in unaware {
                self.tell(peer, commit);
            }
        }
    }

    fn unaware(&self, commit: u64) -> impl Iterator<Item = u64> {
        let own = self.options.id;
        let peers = self.node.raft.prs().iter().map(|(&id, _)| id);
        peers.filter(move |&id| id != own && !self.announcements.knows(id, commit))
    }

    fn tell(&mut self, peer: u64, commit: u64) {
        if !self.announcements.knows(peer, commit) && self.node.raft.prs().get(peer).is_some() {
            self.node.raft.send_append(peer);
            // Also if raft holds the message back: such a peer is told when it is heard of again.
            self.announcements.told.insert(peer, commit);
        }
    }
}
