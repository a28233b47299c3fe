//! A member's data for a tool, while no server runs on it.

use std::sync::Arc;

use raft::eraftpb::{Entry, EntryType};

use super::ServerError;
use super::join::Settled;
use super::recover;
use crate::config::Config;
use crate::datadir::DataDir;
use crate::snapshot::CHUNK_BYTES;
use crate::state::{ConfDecision, Record, State};
use crate::store::{KvStore, MemoryStore, WriteBatch};

/// The state after everything that is in the log, whether it is known to be committed or not: what a quorum has acknowledged is among it,
/// as far as this member has it. Configuration changes are passed over; the members are as they were. It is a copy in memory: nothing of
/// it is written to the directory.
///
/// # Errors
/// What a server would refuse to start with.
pub fn latest_state(config: &Config, data_dir: &DataDir) -> Result<State, ServerError> {
    let identity = data_dir.identity();
    let (Some(cluster_id), Some(id)) = (identity.cluster_id, identity.node_id) else {
        return Err(ServerError::Refused(
            "this member has not founded or joined a cluster: there is nothing to recover".into(),
        ));
    };
    let settled = Settled {
        id,
        cluster_id,
        founds: false,
    };
    let found = recover::open(config, data_dir, settled)?;
    let mut state = copy(&found.state)?;
    let mut normal: Vec<Entry> = Vec::new();
    for entry in found.image.tail {
        if entry.get_entry_type() == EntryType::EntryNormal {
            normal.push(entry);
            continue;
        }
        state.apply(&std::mem::take(&mut normal))?;
        pass_over(&mut state, &entry)?;
    }
    state.apply(&normal)?;
    Ok(state)
}

fn copy(state: &State) -> Result<State, ServerError> {
    let copy: Arc<dyn KvStore> = Arc::new(MemoryStore::new());
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

fn pass_over(state: &mut State, entry: &Entry) -> Result<(), ServerError> {
    let unchanged = state.applied().conf_state;
    match state.begin_conf(entry)? {
        ConfDecision::Apply(_) | ConfDecision::Refuse => {}
    }
    state.finish_conf(entry, unchanged)?;
    Ok(())
}
