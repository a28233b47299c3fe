//! A member's data for a tool, while no server runs on it.

use std::path::Path;
use std::sync::Arc;

use raft::RawNode;
use raft::eraftpb::{ConfChangeV2, ConfState, Entry, EntryType};
use raft::storage::MemStorage;

use super::ServerError;
use super::recover;
use crate::config::{Config, StoreBackend};
use crate::datadir::DataDir;
use crate::snapshot::CHUNK_BYTES;
use crate::state::{ConfDecision, Record, State};
use crate::store::{KvStore, Scratch, WriteBatch};

/// Bytes of the log read at once.
const READ_BYTES: u64 = 4 << 20;

/// The state after everything that is in the log, whether it is known to be committed or not: what a quorum has acknowledged is among it,
/// as far as this member has it. Configuration changes count as they do on a member: what came in through one that joined is applied, and
/// what came through one that was removed is void, or later commands would find another state than they were answered from.
///
/// Nothing of it is written to the member's own files: a memory store is only filled from them, and the content of one on disk is copied
/// into a store of its own in `scratch`, which goes with the state. The log is read in pieces.
///
/// # Errors
/// What a server would refuse to start with.
pub fn latest_state(config: &Config, data_dir: &DataDir, scratch: &Path) -> Result<State, ServerError> {
    let identity = data_dir.identity();
    if identity.cluster_id.is_none() || identity.node_id.is_none() {
        return Err(ServerError::Refused(
            "this member has not founded or joined a cluster: there is nothing to recover".into(),
        ));
    }
    let (found, wal, log) = recover::open_offline(config, data_dir)?;
    let mut state = match config.store.backend {
        StoreBackend::Memory => found,
        StoreBackend::Sled | StoreBackend::RocksDb => copy(&found, Scratch::create(scratch)?)?,
    };
    let mut next = state.applied().index + 1;
    while next <= log.last_index {
        let entries = wal.entries(next, log.last_index + 1, READ_BYTES)?;
        next += entries.len() as u64;
        replay(&mut state, entries)?;
    }
    Ok(state)
}

fn replay(state: &mut State, entries: Vec<Entry>) -> Result<(), ServerError> {
    let mut normal: Vec<Entry> = Vec::new();
    for entry in entries {
        if entry.get_entry_type() == EntryType::EntryNormal {
            normal.push(entry);
            continue;
        }
        state.apply(&std::mem::take(&mut normal))?;
        reconfigure(state, &entry)?;
    }
    state.apply(&normal)?;
    Ok(())
}

fn copy(state: &State, copy: Arc<dyn KvStore>) -> Result<State, ServerError> {
    let mut view = state.snapshot_view();
    while let Some(records) = view.next_records(CHUNK_BYTES)? {
        let mut batch = WriteBatch::default();
        for Record { table, key, value } in records {
            batch.put(table, key, value);
        }
        copy.write(batch)?;
    }
    Ok(State::open(copy)?)
}

fn reconfigure(state: &mut State, entry: &Entry) -> Result<(), ServerError> {
    let current = state.applied().conf_state;
    let conf_state = match state.begin_conf(entry)? {
        ConfDecision::Refuse => current,
        ConfDecision::Apply(change) => conf_after(current, &change).map_err(|error| {
            ServerError::Refused(format!(
                "the configuration change at index {} cannot be applied: {error}",
                entry.index
            ))
        })?,
    };
    state.finish_conf(entry, conf_state)?;
    Ok(())
}

/// What raft makes of a change: asked of a node that does nothing else, because raft-rs gives nobody else the whole of it.
fn conf_after(current: ConfState, change: &ConfChangeV2) -> raft::Result<ConfState> {
    let config = raft::Config {
        id: current.voters.first().copied().unwrap_or(1),
        ..raft::Config::default()
    };
    let storage = MemStorage::new_with_conf_state(current);
    let logger = slog::Logger::root(slog::Discard, slog::o!());
    RawNode::new(&config, storage, &logger)?.apply_conf_change(change)
}
