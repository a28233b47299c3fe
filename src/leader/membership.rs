//! Membership changes on the leader: one at a time, each refused if it would cost the quorum.

use std::time::Duration;

use raft::eraftpb::ConfChangeV2;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::care::{conf_change, is_caught_up};
use super::{LeaderError, LeaderReply, LeaderService, NewMember};
use crate::config::MAX_MEMBER_ID;
use crate::consensus::ConfRefused;
use crate::driver::Event;
use crate::node::Shared;
use crate::state::command::{MemberRecord, MemberRole, MembershipChange};
use crate::state::outcome::ConflictCode;

/// Between two looks at whether a change has come to its end.
const POLL: Duration = Duration::from_millis(10);
/// A voter that answers nothing for so long is not reachable.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);
/// `replace` answers this long before its deadline if it is not done.
const UNDERWAY_MARGIN: Duration = Duration::from_millis(200);

impl LeaderService {
    pub(super) async fn add_member(&self, member: NewMember, deadline: Instant) -> Result<LeaderReply, LeaderError> {
        self.enter(member, 0, deadline).await
    }

    /// Brings a member in as a learner; with `replaces`, the pair is remembered with it.
    async fn enter(&self, member: NewMember, replaces: u64, deadline: Instant) -> Result<LeaderReply, LeaderError> {
        let reader = &self.shared.reader;
        let members = reader.members();
        if let Some(there) = members
            .iter()
            .find(|there| Some(there.id) == member.id || there.peer_url == member.peer_url)
        {
            let same_id = member.id.is_none_or(|id| id == there.id);
            let same_place = there.peer_url == member.peer_url;
            let same_disk = member
                .incarnation
                .is_none_or(|incarnation| there.incarnation == 0 || there.incarnation == incarnation);
            if same_id && same_place && same_disk {
                return Ok(LeaderReply::Member {
                    id: there.id,
                    existed: true,
                });
            }
            let detail = match (same_id, same_place) {
                (true, true) => format!(
                    "member {} at {} is bound to another data directory: remove it first, then add it under a new id",
                    there.id, there.peer_url
                ),
                (true, false) => format!("member {} is already there with the address {}", there.id, there.peer_url),
                (false, _) => format!("the address {} belongs to member {}", there.peer_url, there.id),
            };
            return Err(conflict(ConflictCode::MemberExists, detail));
        }
        let id = match member.id {
            Some(id) if reader.is_removed(id) => {
                return Err(conflict(
                    ConflictCode::MemberIdUsed,
                    format!("member id {id} was used and removed: ids are never used again"),
                ));
            }
            Some(id) => id,
            None => free_id(&self.shared, &members),
        };
        let again = member.clone();
        let wanted_role = if member.voter { MemberRole::Voter } else { MemberRole::Learner };
        let record = MemberRecord {
            id,
            name: member.name.unwrap_or_default(),
            peer_url: member.peer_url,
            client_url: member.client_url.unwrap_or_default(),
            incarnation: member.incarnation.unwrap_or(0),
            bound_by_url: member.incarnation.is_none(),
            wanted_role: wanted_role as i32,
            replaces,
            feature_level: 0,
        };
        let change = MembershipChange {
            add: vec![record],
            ..Default::default()
        };
        self.shared.change(change, deadline).await?;
        match reader.members().into_iter().find(|there| there.id == id) {
            Some(there) if there.peer_url == again.peer_url => Ok(LeaderReply::Member { id, existed: false }),
            // Another request has given this id away meanwhile: what there is now decides.
            Some(_) => Box::pin(self.enter(again, replaces, deadline)).await,
            None => Err(conflict(
                ConflictCode::ChangeInProgress,
                format!("another change came first; member {id} was not added"),
            )),
        }
    }

    pub(super) async fn promote(&self, id: u64, deadline: Instant) -> Result<LeaderReply, LeaderError> {
        let view = self.shared.view();
        if !self.shared.reader.members().iter().any(|member| member.id == id) {
            return Err(LeaderError::MemberNotFound { id });
        }
        if view.voters.contains(&id) {
            return Err(conflict(
                ConflictCode::NotALearner,
                format!("member {id} votes already: there is nothing to promote"),
            ));
        }
        if !is_caught_up(&view, &self.shared.peers(), id) {
            return Err(conflict(
                ConflictCode::UnsafeChange,
                format!("member {id} is not caught up with the log yet: try again later (`GET /members` shows its match_index)"),
            ));
        }
        self.shared
            .change(
                MembershipChange {
                    promote: vec![id],
                    ..Default::default()
                },
                deadline,
            )
            .await?;
        if self.shared.reader.applied().conf_state.voters.contains(&id) {
            return Ok(LeaderReply::Done);
        }
        Err(conflict(
            ConflictCode::ChangeInProgress,
            format!("another change came first; member {id} was not promoted"),
        ))
    }

    pub(super) async fn remove(&self, id: u64, force: bool, deadline: Instant) -> Result<LeaderReply, LeaderError> {
        let reader = &self.shared.reader;
        if !reader.members().iter().any(|member| member.id == id) {
            return Err(LeaderError::MemberNotFound { id });
        }
        let rest = self.check_remaining_quorum(id, force, deadline).await?;
        if id == self.shared.id {
            // The leader hands over before it goes; its successor carries the request out.
            self.hand_over(&rest, deadline).await?;
            return Err(LeaderError::NoLeader);
        }
        self.shared
            .change(
                MembershipChange {
                    remove: vec![id],
                    ..Default::default()
                },
                deadline,
            )
            .await?;
        if reader.is_removed(id) {
            return Ok(LeaderReply::Done);
        }
        Err(conflict(
            ConflictCode::ChangeInProgress,
            format!("another change came first; member {id} was not removed"),
        ))
    }

    /// Rule 24: what remains must have a majority that is reachable now. A member that died just now still counts as active, so this
    /// waits for an answer from after the request (heartbeats are answered within one interval). A member that is merely heard of may have
    /// an address at which nobody reaches it. Gives the voters that remain.
    async fn check_remaining_quorum(&self, id: u64, force: bool, deadline: Instant) -> Result<Vec<u64>, LeaderError> {
        let view = self.shared.view();
        let rest: Vec<u64> = view.voters.iter().copied().filter(|&voter| voter != id).collect();
        if rest.is_empty() {
            return Err(conflict(
                ConflictCode::UnsafeChange,
                format!("member {id} is the last voter: add another one first, or stop it and delete its data directory"),
            ));
        }
        if force || !view.voters.contains(&id) {
            return Ok(rest);
        }
        let since = Instant::now();
        let needed = rest.len() / 2 + 1;
        loop {
            let alive = rest
                .iter()
                .filter(|&&voter| self.shared.answered_since(voter, since.into_std()))
                .count();
            if alive >= needed {
                return Ok(rest);
            }
            if since.elapsed() >= ANSWER_WITHIN || Instant::now() + POLL >= deadline {
                let detail = format!(
                    "only {alive} of the {} remaining voters are reachable and {needed} are needed for a quorum; `?force=true` (on the command line --force) overrides",
                    rest.len()
                );
                return Err(conflict(ConflictCode::UnsafeChange, detail));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Hands leadership to the candidate that is furthest along.
    pub async fn hand_over(&self, candidates: &[u64], deadline: Instant) -> Result<(), LeaderError> {
        let peers = self.shared.peers();
        let best = peers
            .iter()
            .filter(|peer| peer.active && candidates.contains(&peer.id))
            .max_by_key(|peer| peer.match_index);
        let Some(best) = best else {
            return Err(conflict(
                ConflictCode::UnsafeChange,
                "no other voter is reachable to take over leadership".into(),
            ));
        };
        self.transfer(best.id, deadline).await.map(|_| ())
    }

    /// Learner first, then one joint change; the leader's standing duties carry it through, whoever leads then.
    pub(super) async fn replace(&self, remove: u64, add: NewMember, deadline: Instant) -> Result<LeaderReply, LeaderError> {
        let reader = &self.shared.reader;
        let leaves = reader.members().iter().any(|member| member.id == remove);
        if !leaves && !reader.is_removed(remove) {
            return Err(LeaderError::MemberNotFound { id: remove });
        }
        if !leaves {
            let entered = reader
                .members()
                .into_iter()
                .find(|member| Some(member.id) == add.id && member.peer_url == add.peer_url);
            return match entered {
                Some(member) => Ok(LeaderReply::Member {
                    id: member.id,
                    existed: true,
                }),
                None => Err(LeaderError::MemberNotFound { id: remove }),
            };
        }
        // Of two requests at once the second one sees what the first one did.
        let held = tokio::time::timeout_at(deadline, self.changing_voters.lock()).await;
        let Ok(held) = held else {
            return Err(conflict(
                ConflictCode::ChangeInProgress,
                "another replacement is under way: nothing was done for this one; try again".to_owned(),
            ));
        };
        let is_new = |member: &MemberRecord| Some(member.id) == add.id || member.peer_url == add.peer_url;
        if let Some(other) = reader
            .members()
            .into_iter()
            .find(|member| member.replaces == remove && !is_new(member))
        {
            // Both would come to vote, and only one would go.
            return Err(conflict(
                ConflictCode::ChangeInProgress,
                format!(
                    "member {} at {} is about to replace member {remove} already: wait until that is done, or give it up by DELETE /members/{}",
                    other.id, other.peer_url, other.id
                ),
            ));
        }
        let voters = self.shared.view().voters;
        let there = reader.members().into_iter().find(is_new);
        if let Some(MemberRecord { id, replaces, .. }) = there
            && replaces != remove
            && voters.contains(&id)
            && voters.len() % 2 == 1
        {
            // It may have joined by itself before this request, which makes their number even. Otherwise nothing would be added: the cluster
            // would survive one failure less, and whoever mistyped an id would not notice.
            return Err(conflict(
                ConflictCode::MemberExists,
                match add.id {
                    Some(given) if given == id => format!(
                        "member {id} votes already and replaces nobody: give a new id, or remove {remove} by DELETE /members/{remove}"
                    ),
                    _ => format!(
                        "the address {} belongs to member {id}, which votes already and replaces nobody: give the address of the new member, or remove {remove} by DELETE /members/{remove}",
                        add.peer_url
                    ),
                },
            ));
        }
        let LeaderReply::Member { id, .. } = self.enter(NewMember { voter: true, ..add }, remove, deadline).await? else {
            return Err(LeaderError::Timeout);
        };
        drop(held);
        // It may have been there before this request, and another one may be about to put it in somebody else's place.
        let other = reader
            .members()
            .into_iter()
            .find(|member| member.id == id)
            .map_or(0, |member| member.replaces);
        if other != 0 && other != remove && reader.members().iter().any(|member| member.id == other) {
            return Err(conflict(
                ConflictCode::ChangeInProgress,
                format!("member {id} is about to replace member {other}: give another new member, or wait until that is done"),
            ));
        }
        let voters_wanted = voters.iter().filter(|&&voter| voter != id).count();
        loop {
            if reader.is_removed(remove) && self.shared.view().voters.contains(&id) {
                return Ok(LeaderReply::Member { id, existed: false });
            }
            if Instant::now() + UNDERWAY_MARGIN >= deadline {
                return Ok(LeaderReply::Underway { id });
            }
            if self.shared.leader() != Some(self.shared.id) {
                // It is remembered with the new member: whoever leads now goes on, and answers whoever asks again.
                return Err(LeaderError::Timeout);
            }
            if self.entered_alone(id, remove) {
                self.carry_on_pair(id, remove, voters_wanted, deadline).await?;
            }
            tokio::time::sleep(POLL).await;
        }
    }
}

impl LeaderService {
    /// The new member was there before the replacement was asked for (it registered itself, perhaps): nothing remembers the pair, so
    /// the request carries out the second half itself.
    fn entered_alone(&self, id: u64, remove: u64) -> bool {
        let members = self.shared.reader.members();
        members.iter().any(|member| member.id == id && member.replaces != remove) && members.iter().any(|member| member.id == remove)
    }

    /// The next step of such a pair, if it is time for it.
    async fn carry_on_pair(&self, id: u64, remove: u64, voters_wanted: usize, deadline: Instant) -> Result<(), LeaderError> {
        let held = tokio::time::timeout_at(deadline, self.changing_voters.lock()).await;
        let Ok(_held) = held else { return Err(LeaderError::Timeout) };
        let voters = self.shared.view().voters;
        if self.shared.reader.is_removed(remove) {
            return Ok(());
        }
        if voters.contains(&id) && voters.len() <= voters_wanted {
            return Err(conflict(
                ConflictCode::ChangeInProgress,
                format!("another change came first, and removed another voter: member {remove} stays"),
            ));
        }
        if voters.contains(&id) {
            return self.remove(remove, false, deadline).await.map(|_| ());
        }
        // A learner by wish waits to be told; others are promoted by the leader's standing duties.
        let is_content = |member: &MemberRecord| member.id == id && member.wanted_role == MemberRole::Learner as i32;
        if self.shared.reader.members().iter().any(is_content) && is_caught_up(&self.shared.view(), &self.shared.peers(), id) {
            self.promote(id, deadline).await?;
        }
        Ok(())
    }
}

impl Shared {
    /// Proposes a membership change and waits until the entry that carries it is applied here. Whether it took effect is for the caller
    /// to see in the member table: raft may have swallowed it, and the table may refuse it.
    pub(super) async fn change(&self, change: MembershipChange, deadline: Instant) -> Result<(), LeaderError> {
        let conf_change = conf_change(&change);
        let index = loop {
            let (reply, answer) = oneshot::channel();
            self.send(Event::ProposeConf {
                change: conf_change.clone(),
                reply,
            });
            match answer.await {
                Ok(Ok((index, _term))) => break index,
                Ok(Err(ConfRefused::NotLeader)) | Err(_) => return Err(LeaderError::NoLeader),
                Ok(Err(ConfRefused::Busy)) if Instant::now() + POLL < deadline => tokio::time::sleep(POLL).await,
                Ok(Err(ConfRefused::Busy)) => {
                    return Err(conflict(
                        ConflictCode::ChangeInProgress,
                        "another membership change is under way: try again when it is done".into(),
                    ));
                }
            }
        };
        match tokio::time::timeout_at(deadline, self.reader.wait_applied(index)).await {
            Ok(()) => Ok(()),
            Err(_) => Err(LeaderError::Timeout),
        }
    }

    /// Proposes to leave a joint configuration that an earlier leader entered (rule 23).
    pub(super) fn leave_joint(&self) {
        let (reply, _) = oneshot::channel();
        self.send(Event::ProposeConf {
            change: ConfChangeV2::default(),
            reply,
        });
    }
}

/// The one after the highest; or, where that is the last there is, the lowest that was never used.
fn free_id(shared: &Shared, members: &[MemberRecord]) -> u64 {
    let highest = members.iter().map(|member| member.id).max().unwrap_or(0);
    let is_free = |id: &u64| !shared.reader.is_removed(*id) && members.iter().all(|member| member.id != *id);
    let mut ids = (highest.saturating_add(1)..=MAX_MEMBER_ID).chain(1..=MAX_MEMBER_ID);
    // The table of members has not room for so many.
    ids.find(is_free).unwrap_or(MAX_MEMBER_ID)
}

fn conflict(code: ConflictCode, detail: String) -> LeaderError {
    LeaderError::Conflict { code, detail }
}
