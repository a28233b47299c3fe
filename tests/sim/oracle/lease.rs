//! A lease never ends early: from each answered grant or renewal it lives for its full ttl, by the fastest clock there is.

use std::collections::BTreeMap;

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

    pub fn note_revoked(&mut self, id: u64) {
        self.leases.entry(id).or_default().is_revoked = true;
    }

    /// A member applied the begin or the end of a lease.
    pub fn note_change(&mut self, now: Micros, change: LeaseChange) {
        let LeaseChange::Removed { id } = change else { return };
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
