//! The HTTP contract, sentence by sentence, against a real single-node server over loopback. Requests are written as bytes, so that
//! no client library normalises a path or adds a header.

#![allow(clippy::disallowed_methods, reason = "processes are polled, with a deadline")]

mod support;

mod conventions;
mod history;
mod keys;
mod leases;
mod monitoring;
mod observability;
mod openapi;
mod operations;
mod promql;
mod ranges;
mod schema;
mod watches;
