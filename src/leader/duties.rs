//! What a leader does without being asked: ends leases, promotes learners that caught up, completes replacements and joint
//! configurations, forgets history. And what every member does: publishes its name and address, reports its state hash, and raises the alarm
//! when the members' states differ.

use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use tokio::time::Instant;

use super::care::{Care, Caretaker, reached_successor, sound_successor};
use crate::config::{HistoryConfig, IdempotencyConfig};
use crate::consensus::View;
use crate::consensus::proposals::{Gate, Proposal};
use crate::datadir::advertised::{Advertised, Told};
use crate::driver::Event;
use crate::node::{Phase, Role, Shared};
use crate::state::command::{Body, Command, Compact, Evict, FEATURE_LEVEL, LeaseExpire, MemberUpdate, MembershipChange};

/// Leases ended at one tick at most: a million leases that end together do not fill the queue at once.
const MAX_ENDS_PER_TICK: usize = 1_000;
/// Between two looks at history, idempotency records, hashes and the own member record.
const SLOW_INTERVAL: Duration = Duration::from_secs(1);
/// A leader that was reached by nobody leads again, perhaps because nobody else can: it does not hand over again so soon, and each time less
/// soon, up to [`MAX_HAND_OVER_INTERVAL`].
const HAND_OVER_INTERVAL: Duration = Duration::from_secs(60);
/// See there.
const MAX_HAND_OVER_INTERVAL: Duration = Duration::from_secs(3600);
/// How long a membership change of the leader's own may take before it is tried again.
const CHANGE_PATIENCE: Duration = Duration::from_secs(5);
/// A duty's proposal is dropped after so many ticks; the duty is looked at again anyway.
const PROPOSAL_TICKS: u64 = 200;

/// What the duties need to know.
pub struct Duties {
    /// `[history]`
    pub history: HistoryConfig,
    /// `[idempotency]`
    pub idempotency: IdempotencyConfig,
    /// Own name.
    pub name: String,
    /// Own client URL.
    pub client_url: String,
    /// What was told of both before.
    pub advertised: Advertised,
    /// Own data directory.
    pub incarnation: u64,
    /// Length of a tick.
    pub tick: Duration,
    /// Ticks between heartbeats.
    pub heartbeat_ticks: usize,
    /// Election timeout.
    pub election_timeout: Duration,
}

/// Runs until the node stops.
pub async fn run(shared: Arc<Shared>, duties: Duties) {
    let mut phases = shared.phases();
    let mut ticker = tokio::time::interval(duties.tick);
    ticker.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut round = Round {
        shared,
        duties,
        caretaker: Caretaker::default(),
        looked: Instant::now(),
        changing: None,
        heartbeat: 0,
        published_self: None,
        quarantine: None,
        hand_overs: HandOvers::default(),
    };
    loop {
        tokio::select! {
            _ = ticker.tick() => round.tick(),
            _ = phases.wait_for(|phase| *phase != Phase::Running) => return,
        }
    }
}

/// Lets the allocator give freed memory back. mimalloc does so a second after it was freed, but only when it is given back a block as
/// large as one of its pages: an idle member would keep for ever what a burst, a start or a compaction took.
fn release_memory() {
    drop(std::hint::black_box(Vec::<u8>::with_capacity(1 << 20)));
}

struct Round {
    shared: Arc<Shared>,
    duties: Duties,
    caretaker: Caretaker,
    looked: Instant,
    changing: Option<tokio::task::JoinHandle<()>>,
    heartbeat: usize,
    /// When the own record was last looked at: at once when a leader is known, then at intervals.
    published_self: Option<Instant>,
    /// What was last said of [`Shared::quarantine`].
    quarantine: Option<String>,
    /// Whether it may hand over because nobody reaches it.
    hand_overs: HandOvers,
}

/// Those of a leader that nobody reaches.
#[derive(Debug, Default)]
struct HandOvers {
    /// Term and time of the last one.
    last: Option<(u64, Instant)>,
    interval: Duration,
}

impl HandOvers {
    /// One that was tried in this term and did not succeed is tried again after `retry`.
    fn may_try(&self, term: u64, retry: Duration, now: Instant) -> bool {
        self.last.is_none_or(|(last_term, at)| {
            let wait = if last_term == term { retry } else { self.interval };
            now.saturating_duration_since(at) >= wait
        })
    }

    fn note(&mut self, term: u64, now: Instant) {
        if self.last.is_none_or(|(last_term, _)| last_term != term) {
            self.interval = (self.interval * 2).clamp(HAND_OVER_INTERVAL, MAX_HAND_OVER_INTERVAL);
        }
        self.last = Some((term, now));
    }
}

impl Round {
    fn tick(&mut self) {
        let view = self.shared.view();
        let leads = view.role == Role::Leader && view.applied_current_term;
        self.run_lease_clock(leads, &view);
        let slow = self.looked.elapsed() >= SLOW_INTERVAL;
        if slow {
            self.looked = Instant::now();
            self.report_hash();
            self.look_at_own_state(leads, &view);
            release_memory();
        }
        self.publish_self(&view);
        if !leads {
            self.caretaker.forget();
            return;
        }
        self.heartbeat += 1;
        if self.heartbeat >= self.duties.heartbeat_ticks {
            self.heartbeat = 0;
            self.look_after_members(&view);
            self.look_at_own_reach(&view);
        }
        if slow {
            self.forget_history();
            self.stamp_idle(&view);
            self.evict_idempotency(&view);
        }
    }

    fn run_lease_clock(&self, leads: bool, view: &View) {
        let now_ms = self.shared.now_ms();
        let mut clock = self.shared.lease_clock.lock();
        if !leads {
            clock.follow();
            return;
        }
        if clock.term() != Some(view.term) {
            clock.lead(view.term, &self.shared.reader.leases(), now_ms);
        }
        // Its table may be wrong. The next leader gives each lease its whole length.
        if self.shared.reader.divergence(self.shared.id).is_some() {
            return;
        }
        let patience_ms = 2 * self.duties.election_timeout.as_millis() as u64;
        for id in clock.due(now_ms, MAX_ENDS_PER_TICK, patience_ms) {
            self.propose(Body::LeaseExpire(LeaseExpire { id, term: view.term }));
        }
    }

    fn look_after_members(&mut self, view: &View) {
        if self.changing.as_ref().is_some_and(|task| !task.is_finished()) {
            return;
        }
        let care = self
            .caretaker
            .look(self.shared.id, view, &self.shared.peers(), &self.shared.reader.members());
        match care {
            None => {}
            Some(Care::LeaveJoint) => self.shared.leave_joint(),
            Some(Care::HandOver(to)) => self.shared.send(Event::Transfer(to)),
            Some(Care::Change(change)) => self.change(change),
        }
    }

    fn change(&mut self, change: MembershipChange) {
        tracing::info!(promote = ?change.promote, remove = ?change.remove, "promoting a learner that is caught up");
        let shared = self.shared.clone();
        self.changing = Some(tokio::spawn(async move {
            if let Err(error) = shared.change(change, Instant::now() + CHANGE_PATIENCE).await {
                tracing::warn!(%error, "a promotion did not succeed and is tried again");
            }
        }));
    }

    fn forget_history(&self) {
        let reader = &self.shared.reader;
        let by_count = reader.revision().saturating_sub(self.duties.history.retain_revisions);
        let retain_ms = self.duties.history.retain.as_millis() as u64;
        let before = self.shared.cluster_time_ms().checked_sub(retain_ms);
        let by_age = before.and_then(|stamp_ms| reader.revision_before(stamp_ms)).unwrap_or(0);
        let revision = by_count.max(by_age);
        if revision > reader.compacted_revision() {
            self.propose(Body::Compact(Compact { revision }));
        }
    }

    /// Entries tell the time, and an idle store has none: one that changes nothing follows the last change, or that would stay for twice
    /// `history.retain`, and a store that is full of it would be full as long.
    fn stamp_idle(&self, view: &View) {
        let reader = &self.shared.reader;
        if is_unsampled(
            reader.last_sample(),
            reader.revision(),
            self.shared.cluster_time_ms(),
            self.duties.history.retain,
        ) {
            self.propose(Body::Evict(Evict {
                up_to_stamp: 0,
                term: view.term,
            }));
        }
    }

    fn evict_idempotency(&self, view: &View) {
        let retain_ms = self.duties.idempotency.retain.as_millis() as u64;
        let Some(up_to_stamp) = self.shared.cluster_time_ms().checked_sub(retain_ms) else {
            return;
        };
        if self
            .shared
            .reader
            .oldest_idempotency_stamp()
            .is_some_and(|oldest| oldest <= up_to_stamp)
        {
            self.propose(Body::Evict(Evict {
                up_to_stamp,
                term: view.term,
            }));
        }
    }

    /// A member's record follows what the member says of itself.
    fn publish_self(&mut self, view: &View) {
        let waiting = self.published_self.is_some_and(|at| at.elapsed() < SLOW_INTERVAL);
        if view.leader.is_none() || waiting {
            return;
        }
        self.published_self = Some(Instant::now());
        let members = self.shared.reader.members();
        let Some(record) = members.iter().find(|member| member.id == self.shared.id) else {
            return;
        };
        let known_boot = self.shared.reader.boots().get(&self.shared.id).copied();
        if known_boot.is_some_and(|known| self.shared.ends_as_outdated(known)) {
            return;
        }
        let duties = &mut self.duties;
        let update = MemberUpdate {
            id: self.shared.id,
            name: duties.advertised.news(|told| &told.name, &record.name, &duties.name),
            client_url: duties
                .advertised
                .news(|told| &told.client_url, &record.client_url, &duties.client_url),
            peer_url: None,
            incarnation: (record.incarnation == 0).then_some(duties.incarnation),
            feature_level: (record.feature_level != FEATURE_LEVEL).then_some(FEATURE_LEVEL),
            wanted_role: None,
        };
        if update.name.is_none() && update.client_url.is_none() {
            let told = Told {
                name: duties.name.clone(),
                client_url: duties.client_url.clone(),
            };
            if let Some(write) = duties.advertised.note(told) {
                tokio::task::spawn_blocking(|| {
                    if let Err(error) = write() {
                        tracing::warn!(%error, "cannot write down what this member told of itself: the next start may tell it again, or not tell a change");
                    }
                });
            }
        }
        // Each start is told, although nothing changed: whoever comes back on an older copy of the directory is known by that.
        let is_told = known_boot == Some(self.shared.boot);
        if !is_told
            || update.name.is_some()
            || update.client_url.is_some()
            || update.incarnation.is_some()
            || update.feature_level.is_some()
        {
            self.propose(Body::MemberUpdate(update));
        }
    }

    /// Says it when the members' states begin to differ. A leader that is the one in the wrong hands over: leases end by its table, and it
    /// would send its state to others as a snapshot.
    fn look_at_own_state(&mut self, leads: bool, view: &View) {
        let quarantine = self.shared.quarantine();
        if quarantine != self.quarantine {
            match &quarantine {
                Some(reason) => {
                    tracing::error!(%reason, "quarantined: keep the data directory for the search of the cause, and replace the member")
                }
                None => tracing::info!("the members' states do not differ any more"),
            }
            self.quarantine = quarantine;
        }
        let differs = |id| self.shared.reader.divergence(id).is_some();
        if !leads || view.transferring || !differs(self.shared.id) {
            return;
        }
        if let Some(to) = sound_successor(self.shared.id, view, &self.shared.peers(), |id| !differs(id)) {
            self.shared.send(Event::Transfer(to));
        }
    }

    /// A leader whose peer port is closed to the others hears their answers, and nothing that they forward.
    fn look_at_own_reach(&mut self, view: &View) {
        let (patience, now) = (self.duties.election_timeout, Instant::now());
        if view.transferring || !self.hand_overs.may_try(view.term, 2 * patience, now) {
            return;
        }
        let differs = |id: &u64| self.shared.reader.divergence(*id).is_some();
        let mut unreached_by = self.shared.unreached_by(patience);
        unreached_by.retain(|id| !differs(id));
        if let Some(to) = reached_successor(self.shared.id, view, &self.shared.peers(), &unreached_by) {
            tracing::warn!(
                ?unreached_by,
                to,
                "a majority of the members cannot send to this leader, which hands over: is its peer port open, is its peer URL right?"
            );
            self.hand_overs.note(view.term, now);
            self.shared.send(Event::Transfer(to));
        }
    }

    fn report_hash(&self) {
        if let Some(report) = self.shared.due_hash_report() {
            self.propose(Body::HashReport(report));
        }
    }

    fn propose(&self, body: Body) {
        let command = Command {
            seq: 0,
            idempotency: None,
            body: Some(body),
        };
        let proposal = Proposal {
            body: command.encode_to_vec().into(),
            gate: Arc::new(Gate::default()),
            ttl_ticks: PROPOSAL_TICKS,
        };
        self.shared.send(Event::Propose { proposal, reply: None });
    }
}

/// Whether the moment since when `revision` is current must be noted: nothing has noted it for an eighth of the time that history is kept,
/// and a second at least. `last` is the newest sample, its stamp and revision.
fn is_unsampled(last: Option<(u64, u64)>, revision: u64, now_ms: u64, retain: Duration) -> bool {
    let patience_ms = (retain / 8).max(SLOW_INTERVAL).as_millis() as u64;
    last.is_some_and(|(stamp_ms, sampled)| sampled < revision && now_ms >= stamp_ms.saturating_add(patience_ms))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leader_that_nobody_reaches_hands_over_again_ever_more_seldom() {
        let (mut hand_overs, mut now) = (HandOvers::default(), Instant::now());
        let retry = Duration::from_secs(2);
        assert!(hand_overs.may_try(3, retry, now));
        hand_overs.note(3, now);
        assert!(!hand_overs.may_try(3, retry, now));
        assert!(hand_overs.may_try(3, retry, now + retry), "it did not succeed");
        hand_overs.note(3, now);
        for (term, seconds) in [
            (5, 60),
            (7, 120),
            (9, 240),
            (11, 480),
            (13, 960),
            (15, 1920),
            (17, 3600),
            (19, 3600),
        ] {
            now += Duration::from_secs(seconds - 1);
            assert!(!hand_overs.may_try(term, retry, now), "{term}");
            now += Duration::from_secs(1);
            assert!(hand_overs.may_try(term, retry, now), "{term}");
            hand_overs.note(term, now);
        }
    }

    #[test]
    fn the_last_change_before_a_pause_is_stamped_once_and_soon() {
        let hour = Duration::from_secs(3600);
        assert!(!is_unsampled(None, 1, 5_000, hour), "nothing was ever written");
        assert!(!is_unsampled(Some((1_000, 7)), 7, 10_000_000, hour), "the newest is sampled");
        assert!(!is_unsampled(Some((1_000, 6)), 7, 450_999, hour), "the next change may do it");
        assert!(is_unsampled(Some((1_000, 6)), 7, 451_000, hour), "an eighth of an hour later");
        assert!(!is_unsampled(Some((1_000, 6)), 7, 1_999, Duration::from_secs(2)));
        assert!(
            is_unsampled(Some((1_000, 6)), 7, 2_000, Duration::from_secs(2)),
            "a second at least"
        );
    }
}
