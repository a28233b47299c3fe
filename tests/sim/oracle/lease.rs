//! A lease never ends early: from each answered grant or renewal it lives for its full ttl, by the fastest clock there is.

use std::collections::{BTreeMap, BTreeSet};

use metcd::state::LeaseChange;

use super::at;
use crate::machine::FASTEST_CLOCK;
use crate::plan::{MS, Micros};

#[derive(Default)]
struct Lease {
    /// It must live until then.
    until: Micros,
    removed: Option<Micros>,
    /// A client asked for its end.
    is_revoked: bool,
}

#[derive(Default)]
pub struct LeaseOracle {
    leases: BTreeMap<u64, Lease>,
    fault: Option<String>,
    pub expired: u64,
    /// Leases that a member has seen begin.
    begun: BTreeSet<u64>,
    /// Those that somebody was told of.
    granted: BTreeSet<u64>,
    /// Requests for one of which nobody knows what became of them.
    unknown_grants: usize,
}

impl LeaseOracle {
    pub fn take_fault(&mut self) -> Option<String> {
        self.fault.take()
    }

    /// A client was told that the lease has its full ttl, in answer to a request of this moment.
    pub fn note_alive(&mut self, id: u64, asked: Micros, ttl_ms: u64) {
        let lease = self.leases.entry(id).or_default();
        let until = (asked + ttl_ms * MS * 1000 / FASTEST_CLOCK).saturating_sub(2 * MS);
        lease.until = lease.until.max(until);
        self.check(id);
    }

    /// A client was told that it has a lease of its own.
    pub fn note_granted(&mut self, id: u64) -> Result<(), String> {
        match self.granted.insert(id) {
            true => Ok(()),
            false => Err(format!("lease {id} is granted to two requests")),
        }
    }

    pub fn note_grant_unknown(&mut self) {
        self.unknown_grants += 1;
    }

    /// Exactly once: no lease was granted that nobody asked for.
    pub fn check_end(&self) -> Result<(), String> {
        let nobodys = self.begun.difference(&self.granted).count();
        match nobodys <= self.unknown_grants {
            true => Ok(()),
            false => Err(format!(
                "{nobodys} leases began for nobody, and of {} requests for one nobody knows what became of them",
                self.unknown_grants
            )),
        }
    }

    pub fn note_revoked(&mut self, id: u64) {
        self.leases.entry(id).or_default().is_revoked = true;
    }

    /// A member applied the begin or the end of a lease.
    pub fn note_change(&mut self, now: Micros, change: LeaseChange) {
        let id = match change {
            LeaseChange::Removed { id } => id,
            LeaseChange::Granted { id, .. } => {
                self.begun.insert(id);
                return;
            }
        };
        let lease = self.leases.entry(id).or_default();
        if lease.removed.is_none() {
            lease.removed = Some(now);
            self.expired += u64::from(!lease.is_revoked);
            self.check(id);
        }
    }

    fn check(&mut self, id: u64) {
        let Some(lease) = self.leases.get(&id) else { return };
        if let Some(removed) = lease.removed
            && removed < lease.until
            && !lease.is_revoked
        {
            let (removed, until) = (at(removed), at(lease.until));
            self.fault = Some(format!("lease {id} ended at {removed}, and was promised until {until}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_that_is_granted_twice_for_one_request_is_noticed() {
        let mut oracle = LeaseOracle::default();
        for id in [7, 8] {
            oracle.note_change(0, LeaseChange::Granted { id, ttl_ms: 1_000 });
        }
        oracle.note_granted(7).unwrap();
        assert!(oracle.note_granted(7).is_err());
        assert!(oracle.check_end().is_err());
        oracle.note_grant_unknown();
        assert_eq!(oracle.check_end(), Ok(()));
    }
}
