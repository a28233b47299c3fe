//! metcd: an HTTP key-value server replicated by Raft.

pub mod cli;
pub mod config;
pub mod consensus;
pub mod http;
pub mod leader;
pub mod node;
pub mod serve;
pub mod snapshot;
pub mod state;
pub mod store;
pub mod transport;
pub mod wal;
