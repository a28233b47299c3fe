//! When leases end: a clock that only the leader runs. PURE; times are milliseconds of the caller's monotonic clock.
//!
//! *Invariants*
//! - A lease ends no earlier than its full ttl after the later of: its grant or last answered renewal was applied or proven here, and
//!   this member began to lead. A new leader gives every lease its full ttl again: it cannot know when the old one renewed it.
//! - Once the end is proposed, a renewal waits for what becomes of it instead of being answered (a renewal that is answered holds).

use std::collections::{BTreeMap, BTreeSet};

use crate::state::lease::LeaseChange;
use crate::state::reader::LeaseInfo;

/// What a renewal came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields say what they are")]
pub enum Renewal {
    /// Full ttl again.
    Renewed { ttl_ms: u64 },
    /// No such lease.
    Gone,
    /// Its end was proposed and is not applied yet.
    Expiring,
    /// This member does not run the clock.
    NotLeader,
}

#[derive(Debug, Clone, Copy)]
struct Running {
    ttl_ms: u64,
    ends_ms: u64,
    expiring: bool,
}

/// The clock of the leases; empty on a member that does not lead.
#[derive(Debug, Default)]
pub struct LeaseClock {
    term: Option<u64>,
    leases: BTreeMap<u64, Running>,
    /// (end, id): the next one to end comes first, so a tick looks at nothing that is not due.
    by_end: BTreeSet<(u64, u64)>,
}

impl LeaseClock {
    /// The term in which this member runs the clock.
    pub fn term(&self) -> Option<u64> {
        self.term
    }

    /// This member leads now and has applied an entry of its term: every lease gets its full ttl.
    pub fn lead(&mut self, term: u64, leases: &[LeaseInfo], now_ms: u64) {
        self.follow();
        self.term = Some(term);
        for lease in leases {
            let ttl_ms = if mutant!(ShortLeases) { lease.ttl_ms / 2 } else { lease.ttl_ms };
            self.start(lease.id, ttl_ms, now_ms);
        }
    }

    /// This member does not lead (any more).
    pub fn follow(&mut self) {
        self.term = None;
        self.leases.clear();
        self.by_end.clear();
    }

    /// A lease began or is gone, as applied.
    pub fn handle(&mut self, change: LeaseChange, now_ms: u64) {
        if self.term.is_none() {
            return;
        }
        match change {
            LeaseChange::Granted { id, ttl_ms } => self.start(id, ttl_ms, now_ms),
            LeaseChange::Removed { id } => self.forget(id),
        }
    }

    fn start(&mut self, id: u64, ttl_ms: u64, now_ms: u64) {
        self.forget(id);
        let ends_ms = now_ms.saturating_add(ttl_ms);
        self.leases.insert(
            id,
            Running {
                ttl_ms,
                ends_ms,
                expiring: false,
            },
        );
        self.by_end.insert((ends_ms, id));
    }

    fn forget(&mut self, id: u64) {
        if let Some(lease) = self.leases.remove(&id) {
            self.by_end.remove(&(lease.ends_ms, id));
        }
    }

    /// Gives a lease its full ttl again.
    pub fn renew(&mut self, id: u64, now_ms: u64) -> Renewal {
        if self.term.is_none() {
            return Renewal::NotLeader;
        }
        match self.leases.get(&id).copied() {
            None => Renewal::Gone,
            Some(lease) if mutant!(RenewNothing) => Renewal::Renewed { ttl_ms: lease.ttl_ms },
            Some(lease) if lease.expiring && !mutant!(RenewExpiring) => Renewal::Expiring,
            Some(lease) => {
                self.start(id, lease.ttl_ms, now_ms);
                Renewal::Renewed { ttl_ms: lease.ttl_ms }
            }
        }
    }

    /// Leases whose time is over, at most `max`; each is looked at again `patience_ms` later if it is still there then.
    pub fn due(&mut self, now_ms: u64, max: usize, patience_ms: u64) -> Vec<u64> {
        let due: Vec<(u64, u64)> = self
            .by_end
            .iter()
            .take_while(|&&(ends_ms, _)| ends_ms <= now_ms)
            .take(max)
            .copied()
            .collect();
        for &(ends_ms, id) in &due {
            if let Some(lease) = self.leases.get_mut(&id) {
                self.by_end.remove(&(ends_ms, id));
                lease.expiring = true;
                lease.ends_ms = now_ms.saturating_add(patience_ms);
                self.by_end.insert((lease.ends_ms, id));
            }
        }
        due.into_iter().map(|(_, id)| id).collect()
    }

    /// Time left, if the clock runs here.
    pub fn remaining_ms(&self, id: u64, now_ms: u64) -> Option<u64> {
        let lease = self.leases.get(&id)?;
        Some(if lease.expiring { 0 } else { lease.ends_ms.saturating_sub(now_ms) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leading(ttl_ms: u64) -> LeaseClock {
        let mut clock = LeaseClock::default();
        clock.lead(
            3,
            &[LeaseInfo {
                id: 7,
                ttl_ms,
                owned: false,
            }],
            1_000,
        );
        clock
    }

    #[test]
    fn a_lease_ends_after_its_ttl_and_not_before() {
        let mut clock = leading(500);
        assert!(clock.due(1_499, 10, 100).is_empty());
        assert_eq!(clock.due(1_500, 10, 100), [7]);
        assert!(clock.due(1_501, 10, 100).is_empty());
        assert_eq!(clock.due(1_600, 10, 100), [7]);
    }

    #[test]
    fn a_renewal_gives_the_full_ttl_again() {
        let mut clock = leading(500);
        assert_eq!(clock.renew(7, 1_400), Renewal::Renewed { ttl_ms: 500 });
        assert!(clock.due(1_899, 10, 100).is_empty());
        assert_eq!(clock.remaining_ms(7, 1_800), Some(100));
    }

    #[test]
    fn a_lease_whose_end_is_proposed_is_not_renewed() {
        let mut clock = leading(500);
        clock.due(1_500, 10, 100);
        assert_eq!(clock.renew(7, 1_501), Renewal::Expiring);
        clock.handle(LeaseChange::Removed { id: 7 }, 1_502);
        assert_eq!(clock.renew(7, 1_503), Renewal::Gone);
    }

    #[test]
    fn a_new_leader_gives_every_lease_its_full_ttl() {
        let mut clock = leading(500);
        clock.follow();
        assert_eq!(clock.renew(7, 1_100), Renewal::NotLeader);
        clock.lead(
            4,
            &[LeaseInfo {
                id: 7,
                ttl_ms: 500,
                owned: false,
            }],
            1_450,
        );
        assert!(clock.due(1_949, 10, 100).is_empty());
        assert_eq!(clock.due(1_950, 10, 100), [7]);
    }
}
