//! What the leader decides about members: PURE, so that the simulator runs the same. [`super::duties`] and [`super::membership`] carry it out.

use std::collections::BTreeMap;

use prost::Message as _;
use raft::eraftpb::{ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2};

use crate::consensus::View;
use crate::node::{CAUGHT_UP_ENTRIES, PeerProgress};
use crate::state::command::{MemberRecord, MemberRole, MembershipChange};

/// A learner is promoted after being caught up for so many looks in a row.
const LOOKS_BEFORE_PROMOTION: u32 = 5;

/// What is to be done for the members.
#[derive(Debug, Clone, PartialEq)]
pub enum Care {
    /// Leave a joint configuration that an earlier leader entered (rule 23).
    LeaveJoint,
    /// Hand leadership to this member: the leader itself is to be replaced, and its successor looks after that.
    HandOver(u64),
    /// Promote a learner, and remove whom it replaces.
    Change(MembershipChange),
}

/// The leader's standing care: one change at a time.
#[derive(Debug, Default)]
pub struct Caretaker {
    /// Looks in a row at which a learner was caught up.
    caught_up: BTreeMap<u64, u32>,
}

impl Caretaker {
    /// This member does not lead (any more).
    pub fn forget(&mut self) {
        self.caught_up.clear();
    }

    /// One look, by the leader and once per heartbeat: leave a joint configuration, complete a replacement, promote.
    pub fn look(&mut self, own_id: u64, view: &View, peers: &[PeerProgress], members: &[MemberRecord]) -> Option<Care> {
        if view.conf_pending || view.transferring {
            return None;
        }
        if view.joint {
            return Some(Care::LeaveJoint);
        }
        let learners: Vec<&MemberRecord> = members
            .iter()
            .filter(|member| view.learners.contains(&member.id) && member.wanted_role == MemberRole::Voter as i32)
            .collect();
        self.caught_up.retain(|id, _| learners.iter().any(|learner| learner.id == *id));
        for learner in learners {
            let looks = self.caught_up.entry(learner.id).or_insert(0);
            *looks = if is_caught_up(view, peers, learner.id) { *looks + 1 } else { 0 };
            if *looks >= LOOKS_BEFORE_PROMOTION {
                self.caught_up.remove(&learner.id);
                return Some(advance(own_id, view, peers, learner));
            }
        }
        let replacing = members
            .iter()
            .find(|member| view.voters.contains(&member.id) && is_there(view, member.replaces));
        replacing.map(|member| complete(own_id, view, peers, member))
    }
}

fn is_there(view: &View, id: u64) -> bool {
    view.voters.contains(&id) || view.learners.contains(&id)
}

/// The replacement votes already; whom it replaces is to go.
fn complete(own_id: u64, view: &View, peers: &[PeerProgress], member: &MemberRecord) -> Care {
    if member.replaces == own_id {
        return Care::HandOver(best_successor(own_id, view, peers).unwrap_or(member.id));
    }
    Care::Change(MembershipChange {
        remove: vec![member.replaces],
        ..Default::default()
    })
}

/// Whom a leader hands over to whose state differs from a majority's: one that is not known to differ as well, if it can be reached.
pub fn sound_successor(own_id: u64, view: &View, peers: &[PeerProgress], is_sound: impl Fn(u64) -> bool) -> Option<u64> {
    let voters = peers
        .iter()
        .filter(|peer| peer.active && view.voters.contains(&peer.id) && peer.id != own_id);
    voters
        .filter(|peer| is_sound(peer.id))
        .max_by_key(|peer| peer.match_index)
        .map(|peer| peer.id)
}

/// Whom a leader hands over to that a majority of the voters cannot send to, although it reaches them: the answers to what it sends keep
/// it in office, and whatever they forward to it is lost. `None` while others than a majority say so: they could not go on without it.
pub fn reached_successor(own_id: u64, view: &View, peers: &[PeerProgress], unreached_by: &[u64]) -> Option<u64> {
    let cut_off = view
        .voters
        .iter()
        .filter(|&&voter| voter != own_id && unreached_by.contains(&voter));
    if cut_off.count() <= view.voters.len() / 2 {
        return None;
    }
    sound_successor(own_id, view, peers, |id| unreached_by.contains(&id))
}

fn best_successor(own_id: u64, view: &View, peers: &[PeerProgress]) -> Option<u64> {
    sound_successor(own_id, view, peers, |_| true)
}

fn advance(own_id: u64, view: &View, peers: &[PeerProgress], learner: &MemberRecord) -> Care {
    let replaced = Some(learner.replaces).filter(|&id| is_there(view, id));
    if replaced == Some(own_id) {
        // A leader never removes itself: it would stop before the others know that the change is committed, and they may need its vote.
        return match best_successor(own_id, view, peers) {
            Some(best) => Care::HandOver(best),
            None => Care::Change(MembershipChange {
                promote: vec![learner.id],
                ..Default::default()
            }),
        };
    }
    Care::Change(MembershipChange {
        promote: vec![learner.id],
        remove: replaced.into_iter().collect(),
        ..Default::default()
    })
}

/// Raft's side of a membership change: a single step where that is enough, a joint configuration otherwise.
pub fn conf_change(change: &MembershipChange) -> ConfChangeV2 {
    let single = |kind: ConfChangeType, node_id: u64| ConfChangeSingle {
        change_type: kind,
        node_id,
        ..Default::default()
    };
    let mut changes = Vec::new();
    changes.extend(change.add.iter().map(|member| single(ConfChangeType::AddLearnerNode, member.id)));
    changes.extend(change.promote.iter().map(|&id| single(ConfChangeType::AddNode, id)));
    changes.extend(change.remove.iter().map(|&id| single(ConfChangeType::RemoveNode, id)));
    let mut conf_change = ConfChangeV2::default();
    conf_change.set_transition(ConfChangeTransition::Auto);
    conf_change.set_changes(changes.into());
    conf_change.context = change.encode_to_vec().into();
    conf_change
}

/// Active, close to the end of the log, no snapshot under way.
pub fn is_caught_up(view: &View, peers: &[PeerProgress], id: u64) -> bool {
    // In a short log everything is close to its end: what counts is that the member holds some of it, and says so.
    let near = |peer: &PeerProgress| peer.match_index > 0 && peer.match_index + CAUGHT_UP_ENTRIES >= view.last_index;
    peers
        .iter()
        .any(|peer| peer.id == id && peer.active && !peer.snapshot && near(peer))
}

/// Rule 24: why a member must not be removed: what remains would have no majority that is reachable now.
pub fn quorum_lost_without(view: &View, peers: &[PeerProgress], id: u64) -> Option<String> {
    if !view.voters.contains(&id) {
        return None;
    }
    let rest: Vec<u64> = view.voters.iter().copied().filter(|&voter| voter != id).collect();
    if rest.is_empty() {
        return Some(format!("member {id} is the last voter"));
    }
    let is_active = |voter: &&u64| peers.iter().any(|peer| peer.id == **voter && peer.active);
    let healthy = rest.iter().filter(is_active).count();
    let needed = rest.len() / 2 + 1;
    (healthy < needed).then(|| {
        format!(
            "only {healthy} of the {} remaining voters are reachable and {needed} are needed for a quorum; `?force=true` (on the command line --force) overrides",
            rest.len()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::Role;
    use crate::wal::LogStart;

    /// Of a leader that has learners beside these voters.
    fn leading(voters: &[u64]) -> View {
        View {
            role: Role::Leader,
            term: 2,
            leader: Some(1),
            is_led: true,
            commit_index: 5,
            persisted_index: 5,
            log_start: LogStart { index: 1, term: 1 },
            last_index: 5,
            applied_current_term: true,
            transferring: false,
            joint: false,
            conf_pending: false,
            voters: voters.to_vec(),
            learners: vec![2],
            leaving: vec![],
            knows_the_departed: true,
        }
    }

    #[test]
    fn a_leader_that_differs_hands_over_to_the_furthest_that_does_not() {
        let peer = |id, match_index, active| PeerProgress {
            id,
            match_index,
            active,
            snapshot: false,
        };
        let peers = [
            peer(2, 9, true),
            peer(3, 7, true),
            peer(4, 8, false),
            peer(5, 6, true),
            peer(6, 9, true),
        ];
        let view = leading(&[1, 2, 3, 4, 5]);
        assert_eq!(sound_successor(1, &view, &peers, |id| id != 2), Some(3));
        assert_eq!(sound_successor(1, &view, &peers, |id| id == 4), None, "it cannot be reached");
    }

    #[test]
    fn a_leader_that_a_majority_cannot_send_to_hands_over_to_one_of_it() {
        let peer = |id, match_index| PeerProgress {
            id,
            match_index,
            active: true,
            snapshot: false,
        };
        let peers = [peer(1, 9), peer(2, 9), peer(3, 8), peer(4, 7), peer(5, 9)];
        let to = |voters: &[u64], by: &[u64]| reached_successor(1, &leading(voters), &peers, by);
        assert_eq!(to(&[1, 2, 3], &[]), None);
        assert_eq!(to(&[1, 2, 3], &[3]), None, "2 and 3 may be unable to reach each other");
        assert_eq!(to(&[1, 2, 3], &[2, 3]), Some(2));
        assert_eq!(to(&[1, 2], &[2]), None, "2 alone is no majority");
        assert_eq!(to(&[1, 2, 3, 4, 5], &[3, 4]), None);
        assert_eq!(to(&[1, 2, 3, 4, 5], &[3, 4, 9]), None, "9 does not vote");
        assert_eq!(to(&[1, 2, 3, 4, 5], &[3, 4, 5]), Some(5));
    }

    /// Of a leader whose log ends at 2000, with a learner that is to vote in the place of member 3.
    fn replacing() -> (View, Vec<MemberRecord>) {
        let mut view = leading(&[1, 2, 3]);
        (view.last_index, view.learners) = (2000, vec![4]);
        let record = |id, role: MemberRole, replaces| MemberRecord {
            id,
            wanted_role: role as i32,
            replaces,
            ..Default::default()
        };
        let voters = (1..=3).map(|id| record(id, MemberRole::Voter, 0));
        (view, voters.chain([record(4, MemberRole::Voter, 3)]).collect())
    }

    fn learner_at(match_index: u64) -> [PeerProgress; 1] {
        [PeerProgress {
            id: 4,
            match_index,
            active: true,
            snapshot: false,
        }]
    }

    #[test]
    fn a_replacement_votes_and_whom_it_replaces_goes_in_one_joint_change() {
        let (view, members) = replacing();
        let mut caretaker = Caretaker::default();
        let mut look = |match_index| caretaker.look(1, &view, &learner_at(match_index), &members);
        for _ in 1..LOOKS_BEFORE_PROMOTION {
            assert_eq!(look(2000), None);
        }
        // One look at which it lags, and it is counted anew.
        assert_eq!(look(2000 - CAUGHT_UP_ENTRIES - 1), None);
        for _ in 1..LOOKS_BEFORE_PROMOTION {
            assert_eq!(look(2000 - CAUGHT_UP_ENTRIES), None);
        }
        let Some(Care::Change(change)) = look(2000) else {
            panic!("it has been caught up for long enough");
        };
        assert_eq!((&change.promote[..], &change.remove[..]), (&[4][..], &[3][..]));

        let changes = conf_change(&change);
        let steps: Vec<(ConfChangeType, u64)> = changes.changes.iter().map(|step| (step.change_type, step.node_id)).collect();
        assert_eq!(steps, [(ConfChangeType::AddNode, 4), (ConfChangeType::RemoveNode, 3)]);
        assert_eq!(changes.enter_joint(), Some(true), "left by itself");
    }

    #[test]
    fn a_learner_is_replaced_too() {
        let (mut view, mut members) = replacing();
        view.learners.push(5);
        members.push(MemberRecord {
            id: 5,
            wanted_role: MemberRole::Learner as i32,
            ..Default::default()
        });
        members[3].replaces = 5;
        let mut caretaker = Caretaker::default();
        let done = (0..LOOKS_BEFORE_PROMOTION).find_map(|_| caretaker.look(1, &view, &learner_at(2000), &members));
        let Some(Care::Change(change)) = done else { panic!("{done:?}") };
        assert_eq!((&change.promote[..], &change.remove[..]), (&[4][..], &[5][..]));
        // Promoted by itself before that was asked.
        (view.voters, view.learners) = (vec![1, 2, 3, 4], vec![5]);
        let done = caretaker.look(1, &view, &learner_at(2000), &members);
        let Some(Care::Change(change)) = done else { panic!("{done:?}") };
        assert_eq!((&change.promote[..], &change.remove[..]), (&[][..], &[5][..]));
    }

    #[test]
    fn a_leader_that_is_replaced_hands_over_first() {
        let (view, mut members) = replacing();
        members[3].replaces = 1;
        let mut peers = learner_at(2000).to_vec();
        peers.extend([2, 3].map(|id| PeerProgress {
            id,
            match_index: 1990 + id,
            active: true,
            snapshot: false,
        }));
        let mut caretaker = Caretaker::default();
        let done = (0..LOOKS_BEFORE_PROMOTION).find_map(|_| caretaker.look(1, &view, &peers, &members));
        assert_eq!(done, Some(Care::HandOver(3)), "the furthest of the others");
    }

    #[test]
    fn a_learner_that_holds_nothing_is_not_caught_up_with_a_short_log() {
        let view = leading(&[1]);
        let peer = |match_index, active, snapshot| PeerProgress {
            id: 2,
            match_index,
            active,
            snapshot,
        };
        assert!(!is_caught_up(&view, &[peer(0, true, false)], 2));
        assert!(!is_caught_up(&view, &[peer(5, false, false)], 2));
        assert!(!is_caught_up(&view, &[peer(5, true, true)], 2));
        assert!(is_caught_up(&view, &[peer(5, true, false)], 2));
    }
}
