//! The state machine from outside: against a model, by its rules, its watches and its snapshots.

mod backends;
mod batches;
mod counts;
mod model;
mod observed;
mod property;
mod rules;
mod snapshots;
mod support;
mod watches;
