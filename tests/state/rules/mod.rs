//! One behaviour a test, named after what it promises; a file for each part of the state.

mod compaction;
mod entries;
mod exactly_once;
mod hash_reports;
mod idempotency;
mod leases;
mod members;
mod revisions;
mod transactions;

use std::sync::Arc;

use bytes::Bytes;
use metcd::state::command::{
    Body, Compact, Compare, DeleteRange, EntryPayload, Evict, FEATURE_LEVEL, HashReport, KeySpan, LeaseExpire, LeaseGrant, LeaseRevoke,
    MemberRecord, MemberUpdate, MembershipChange, Put, Txn, TxnOp, TxnOpBody,
};
use metcd::state::outcome::{ConflictCode, Outcome, Refusal, Success, TxnResponse};
use metcd::state::reader::{RangeQuery, ReadError};
use metcd::state::{ConfDecision, LeaseChange, State, StateError};
use metcd::store::{KvStore, MemoryStore, WriteBatch};
use prost::Message;
use protobuf::Message as ProtobufMessage;
use raft::eraftpb::{ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2, ConfState, Entry, EntryType};

use crate::support::{Node, TERM, all_keys, command, created, delete, delete_prefix, entry, idempotency, member, payload, put, refusal};

fn txn_of(ops: Vec<TxnOpBody>) -> Body {
    let then = ops.into_iter().map(|body| TxnOp { body: Some(body) }).collect();
    Body::Txn(Txn {
        compare: Vec::new(),
        then,
        ..Txn::default()
    })
}

fn lease_of(outcome: &Outcome) -> u64 {
    match &outcome.result {
        Ok(Success::Put { lease, .. }) => *lease,
        Ok(Success::LeaseGrant { id, .. }) => *id,
        other => panic!("no lease in {other:?}"),
    }
}
