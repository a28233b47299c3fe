//! From what is on the disk to a state and a log that agree (rules 7 and 11).
//!
//! A snapshot file named by its index is the commit point of an installation: it is complete and verified before it has that name. As
//! long as it is there and newer than the store, it is (re)installed and the log begins after it.
//!
//! Beside a store that does not survive crashes (memory, sled) the newest snapshot file stays: the log is never cut beyond it, so the store
//! can always be rebuilt. A sled store that was closed in order is newer than that file and is used as it is.

use std::path::Path;
use std::sync::Arc;

use super::ServerError;
use super::join::Settled;
use crate::config::Config;
use crate::consensus::LogImage;
use crate::datadir::DataDir;
use crate::snapshot::SnapshotError;
use crate::state::State;
use crate::state::command::{MemberRecord, MemberRole};
use crate::store::{self, KvStore};
use crate::wal::{self, Recovered, Wal};
use crate::{recovery, snapshot, snapshot_files};

/// Applied index of a cluster that was just founded.
const FOUNDED_INDEX: u64 = 1;

/// What was found.
pub struct Found {
    pub store: Arc<dyn KvStore>,
    pub state: State,
    pub wal: Box<dyn Wal>,
    pub image: LogImage,
    /// Known to be committed when the member last ran.
    pub committed_index: u64,
    /// The state outlives a crash without the log up to here.
    pub durable_index: u64,
}

pub fn open(config: &Config, data_dir: &DataDir, settled: Settled) -> Result<Found, ServerError> {
    let snapshot_dir = data_dir.snapshot_dir();
    crate::datadir::disk::create_dir_durably(&snapshot_dir)?;
    let store = store::open(config.store.backend, &data_dir.store_dir())?;
    let mut wal = wal::open(config.wal.engine, &data_dir.wal_dir(), config.wal.sync)?;
    let recovered = wal.recovered().clone();

    snapshot_files::remove_incomplete(&snapshot_dir)?;
    let mut state = open_state(&store, &snapshot_dir)?;
    if settled.founds && recovered.last_index == 0 && snapshot_files::newest(&snapshot_dir)?.is_none() {
        if state.applied().index == FOUNDED_INDEX {
            // The first start ended between the store and the snapshot: nothing has happened since.
            store.clear()?;
            state.reload()?;
        }
        if state.applied().index == 0 {
            found_cluster(config, data_dir, settled.cluster_id, &mut state)?;
        }
    }
    let newest = snapshot_files::newest(&snapshot_dir)?;
    let applied = state.applied();
    let image = recovery::reconcile(wal.as_mut(), &applied, newest.as_ref().map(|(index, _)| *index))?;
    if let Some((_, file)) = &newest
        && store.survives_crashes()
    {
        store.sync()?;
        std::fs::remove_file(file)?;
    }
    let log = &image.recovered;
    let committed_index = log.hard_state.commit.max(applied.index).min(log.last_index);
    let durable_index = match &newest {
        _ if store.survives_crashes() => log.start.index,
        Some((index, _)) => *index,
        None => 0,
    };
    Ok(Found {
        store,
        state,
        wal,
        image,
        committed_index,
        durable_index,
    })
}

/// What a member has left, for a tool: its state as it was made durable, and the log that goes on after it. An installation of a snapshot
/// that was cut off is brought to its end, and a sled store that was not closed is rebuilt, as a start would do; otherwise nothing is
/// changed. The store is closed: the state is for reading, unless the store keeps nothing anyway.
pub fn open_offline(config: &Config, data_dir: &DataDir) -> Result<(State, Box<dyn Wal>, Recovered), ServerError> {
    let snapshot_dir = data_dir.snapshot_dir();
    let store = store::open(config.store.backend, &data_dir.store_dir())?;
    let mut wal = wal::open(config.wal.engine, &data_dir.wal_dir(), config.wal.sync)?;
    let state = open_state(&store, &snapshot_dir)?;
    let newest = snapshot_files::newest(&snapshot_dir)?.map(|(index, _)| index);
    let recovered = recovery::settle(wal.as_mut(), &state.applied(), newest)?;
    store.close()?;
    Ok((state, wal, recovered))
}

/// The state of the store, or of a snapshot that is newer. Beside a store that survives crashes a snapshot file is only while it is being
/// installed: a crash in the middle leaves half of it in the store, whatever index that half names, so it is installed again from the
/// beginning. Any other store is empty after such a crash.
fn open_state(store: &Arc<dyn KvStore>, snapshot_dir: &Path) -> Result<State, ServerError> {
    let opened = State::open(store.clone());
    let Some((index, file)) = snapshot_files::newest(snapshot_dir)? else {
        return Ok(opened?);
    };
    let is_older = |state: &State| {
        let applied_index = state.applied().index;
        index > applied_index || (store.survives_crashes() && index == applied_index)
    };
    match opened {
        Ok(state) if !is_older(&state) => return Ok(state),
        Ok(_) => tracing::info!(index, "loading a snapshot"),
        Err(error) if store.survives_crashes() => {
            tracing::warn!(index, %error, "the store was left in the middle of a snapshot; loading it again")
        }
        Err(error) => return Err(error.into()),
    }
    match snapshot::install(&file, store.as_ref()) {
        Err(source @ SnapshotError::Corrupt(_)) => return Err(ServerError::StateFile { file, source }),
        result => result?,
    };
    Ok(State::open(store.clone())?)
}

/// Every founder makes the same first snapshot: index 1, term 1, the founding members as voters. No log begins at 1, so nobody can be
/// fed a log from nothing.
fn found_cluster(config: &Config, data_dir: &DataDir, cluster_id: u64, state: &mut State) -> Result<(), ServerError> {
    let voter = |id: u64, peer_url: &str| MemberRecord {
        id,
        peer_url: peer_url.to_owned(),
        wanted_role: MemberRole::Voter as i32,
        ..MemberRecord::default()
    };
    let members: Vec<MemberRecord> = config
        .cluster
        .members
        .iter()
        .map(|member| voter(member.id, &member.peer_url))
        .collect();
    state.bootstrap(cluster_id, &members)?;
    let view = state.snapshot_view();
    let file = snapshot_files::path_of(&data_dir.snapshot_dir(), view.applied.index);
    snapshot::write_file(view, &file)?;
    Ok(())
}
