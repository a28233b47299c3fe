//! metcd: an HTTP key-value server replicated by Raft.

// Here and not in Cargo.toml, because tests may: that is how they fail.
#![cfg_attr(not(test), warn(clippy::expect_used, clippy::unwrap_used))]

#[macro_use]
pub mod mutants;

pub mod cli;
pub mod client;
pub mod config;
pub mod consensus;
pub mod datadir;
pub mod driver;
pub mod http;
pub mod leader;
pub mod node;
pub mod recovery;
pub mod restore;
pub mod serve;
pub mod server;
pub mod snapshot;
pub mod snapshot_files;
pub mod state;
pub mod store;
pub mod telemetry;
pub mod transport;
pub mod wal;
