//! The product as users run it: real processes, real signals, real disks. `cargo test --features rocksdb --test cluster`.
//!
//! Each test is named after the promise it holds the product to. Clusters run one after the other, so that the figures that are
//! printed (`-- --nocapture`) are not disturbed by a neighbour.

#![allow(clippy::print_stdout, reason = "figures, for whoever looks with --nocapture")]
#![allow(clippy::disallowed_methods, reason = "processes are polled, with a deadline")]

#[path = "../common/mod.rs"]
mod common;
mod harness;
mod load;
mod proxy;
mod small_disk;
mod wrong_clock;

mod anywhere;
mod chaos;
mod compaction;
mod failover;
mod figures;
mod hashes;
mod membership;
mod mixed;
mod quarantine;
mod recovery;
mod replacing;
mod resuming;
mod returning;
mod trouble;
mod wall_clocks;
