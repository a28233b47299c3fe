//! metcd: an HTTP key-value server replicated by Raft.
//!
//! This crate is the program's inside; `src/main.rs` is two lines over [`cli`]. `ARCHITECTURE.md` says what must always hold and which test
//! says so; each module begins with its own invariants. In reading order:
//!
//! | Module | What it is |
//! |---|---|
//! | [`cli`] | arguments in, exit code out: the server, the client commands, the tools |
//! | [`config`], [`datadir`], [`telemetry`] | what a member needs first: one checked configuration, one locked directory, logs |
//! | [`server`] | a member from start to stop: recover, bind, wire, run, shut down. The wiring is one function |
//! | [`serve`], [`http`] | connections, then the client API; the one place that knows status codes |
//! | [`node`] | the handle that front ends hold: propose, read barrier, requests to the leader |
//! | [`driver`] | around the protocol: a task on the thread of the peers (queues in, effects out), and threads for log, apply and chores |
//! | [`consensus`] | PURE: the protocol as a value over raft-rs, inputs in and effects out |
//! | [`wal`], [`recovery`] | the durable log with its fence; how log and state are made to agree at a start |
//! | [`transport`] | between the members: lanes, windows, snapshot streams, every message checked first |
//! | [`state`] | PURE: the replicated state machine: revisions, leases, sessions, idempotency, members, watches |
//! | [`store`] | ordered byte-keyed engines behind the state machine: memory, sled, RocksDB |
//! | [`snapshot`], [`snapshot_files`] | the state as a stream of checksummed bytes, and as files whose names are commit points |
//! | [`leader`] | what only a leader does: membership, transfers, lease clock, standing duties |
//! | [`client`] | the Rust client, which the command line uses |
//!
//! # A PUT, from the socket down and back
//!
//! 1. [`http`] decodes the key, reads the body up to its limit and makes a command; [`node::Node::propose`] refuses it if too many wait
//!    (`429`) and hands it to the driver with a slot for the result.
//! 2. [`driver`] takes all events that are queued, steps [`consensus`] with them and performs the effects. The commands become one raft
//!    entry, under the member's sequence numbers; a follower's go to the leader inside raft messages.
//! 3. The leader's appends leave through [`transport`] at once; its own log thread and those of the followers write to the [`wal`], one
//!    sync for all that is queued. A follower acknowledges only after its sync.
//! 4. A majority has the entry: it is committed, and goes to the apply thread. Members where somebody waits hear of the commit at once,
//!    the others with the next append.
//! 5. The apply thread runs the commands on the [`state`], one atomic batch into the [`store`] for all entries that are there (up to
//!    4 MiB), with applied index and results in it, and puts the result into the slot of the one who waits on this member.
//! 6. [`http`] makes an answer of it. Nothing else ever answers a write.
//!
//! # A linearizable GET
//!
//! 1. [`node::Node::read_barrier`] joins the next ReadIndex round, never one that was sent already.
//! 2. [`consensus`] asks the leader under a fresh context; the leader is confirmed by a majority and names its commit index.
//! 3. When this member has applied that index, the barrier opens and [`http`] reads the current view of the [`state`], holding no
//!    lock against writers. `?consistency=serializable` reads the view without a barrier.

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
#[doc(hidden)]
pub mod fuzzing;
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
#[cfg(test)]
mod test_child;
pub mod transport;
pub mod wal;
