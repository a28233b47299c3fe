//! What happened in a run, counted.

use std::collections::BTreeMap;

use crate::plan::{FaultKind, Micros};

#[derive(Debug, Clone, Default)]
pub struct Stats {
    pub simulated: Micros,
    pub events: u64,
    pub messages: u64,
    pub operations: u64,
    pub retries: u64,
    pub retries_elsewhere: u64,
    pub retries_in_later_terms: u64,
    /// Retries that were answered with what an earlier try had come to.
    pub replays: BTreeMap<&'static str, u64>,
    pub unknown: u64,
    pub not_applied: u64,
    pub checked: u64,
    /// Operations on keys whose search for an order was given up.
    pub given_up: u64,
    pub watched: u64,
    pub renewals: u64,
    pub leases: u64,
    pub expired: u64,
    pub elections: u64,
    pub snapshots: u64,
    pub installs: u64,
    pub introductions: u64,
    pub conf_changes: u64,
    pub fetches: u64,
    pub removed: u64,
    pub compared: u64,
    pub faults: BTreeMap<FaultKind, u64>,
}

impl Stats {
    pub fn add(&mut self, other: &Stats) {
        self.simulated += other.simulated;
        self.events += other.events;
        self.messages += other.messages;
        self.operations += other.operations;
        self.retries += other.retries;
        self.retries_elsewhere += other.retries_elsewhere;
        self.retries_in_later_terms += other.retries_in_later_terms;
        self.unknown += other.unknown;
        self.not_applied += other.not_applied;
        self.checked += other.checked;
        self.given_up += other.given_up;
        self.watched += other.watched;
        self.renewals += other.renewals;
        self.leases += other.leases;
        self.expired += other.expired;
        self.elections += other.elections;
        self.snapshots += other.snapshots;
        self.installs += other.installs;
        self.introductions += other.introductions;
        self.conf_changes += other.conf_changes;
        self.fetches += other.fetches;
        self.removed += other.removed;
        self.compared += other.compared;
        for (&kind, count) in &other.replays {
            *self.replays.entry(kind).or_default() += count;
        }
        for (&kind, count) in &other.faults {
            *self.faults.entry(kind).or_default() += count;
        }
    }
}
