//! From a backup, or from what one member has left, to the data directory of a member of a new cluster.
//!
//! Invariants:
//! - A file is verified to its last byte before anything is written.
//! - The same file and the same members make the same cluster, whichever member is restored first: its id comes from both.
//! - The snapshot is durable in the new directory before the identity says whose it is. A crash in between leaves a directory in which
//!   restore can be run again.
//! - Revisions jump by [`REVISION_JUMP`], and everything before is compacted: what clients know of the lost cluster cannot be mistaken
//!   for something of the new one.
//! - A restore reads the file three times (verify, choose, copy) and holds pieces of it, besides the small tables and some 24 bytes for each
//!   key. A recovery needs the state itself: a memory store once, as its member did; one on disk is copied on the disk.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufReader};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::config::Config;
use crate::datadir::disk::{create_dir_durably, sync_parent};
use crate::datadir::{DataDir, DataDirError};
use crate::server::{self, ServerError};
use crate::snapshot::{self, RecordSource, SnapshotError, SnapshotMeta, SnapshotReader};
use crate::snapshot_files;
use crate::state::command::MemberRecord;
use crate::state::{LiveVersions, Record, State, StateError};
use crate::store::{KvStore as _, MemoryStore, StoreError, Table, WriteBatch};

/// More changes than a cluster can have made that its backup does not know of.
pub const REVISION_JUMP: u64 = 1_000_000_000;

/// Why nothing was restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The file is no whole snapshot.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The directory.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// What the snapshot holds is no state.
    #[error(transparent)]
    State(#[from] StateError),
    /// The scratch store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What is left of the member.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// Not as asked.
    #[error("{0}")]
    Refused(String),
    /// The operating system.
    #[error("{path}: {source}")]
    Io {
        /// Where.
        path: String,
        /// What it says.
        source: io::Error,
    },
}

/// What was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// The new cluster's id.
    pub cluster_id: u64,
    /// The member this directory is of.
    pub id: u64,
    /// The new revision.
    pub revision: u64,
    /// The first directory, where it was moved to; only after a recovery.
    pub kept: Option<PathBuf>,
}

/// Makes `config.node.data_dir` the directory of one member of a new cluster with the content of `file`. Call it for each member, with
/// the same file and the same `cluster.members`.
///
/// # Errors
/// See [`RestoreError`].
pub fn restore(file: &Path, config: &Config) -> Result<Restored, RestoreError> {
    let meta = snapshot::verify_file(file)?;
    if config.cluster.members.is_empty() {
        return Err(RestoreError::Refused(
            "a restored cluster is founded by --member, not joined by --join".into(),
        ));
    }
    let data_dir = new_directory(config)?;
    let (state, live) = read_small(file)?;
    let more = Kept {
        reader: snapshot::open_reader(file)?,
        live,
    };
    begin(state, Some(more), data_dir, new_cluster_id(&meta, config), config)
}

/// The state without its content: the small tables, and the last row, which has the sums; and which versions are kept of the content.
fn read_small(file: &Path) -> Result<(State, LiveVersions), RestoreError> {
    let store = Arc::new(MemoryStore::new());
    let mut live = LiveVersions::default();
    let mut last_row: Option<Record> = None;
    let mut reader = snapshot::open_reader(file)?;
    while let Some(records) = reader.next_records()? {
        let mut batch = WriteBatch::default();
        for record in records {
            live.note(&record)?;
            match record.table {
                Table::Index => {}
                Table::Revision if last_row.as_ref().is_some_and(|last| last.key >= record.key) => {}
                Table::Revision => last_row = Some(record),
                Table::Meta | Table::Lease | Table::LeaseKey | Table::Session | Table::Idempotency | Table::Member => {
                    batch.put(record.table, record.key, record.value);
                }
            }
        }
        store.write(batch)?;
    }
    let mut batch = WriteBatch::default();
    if let Some(Record { table, key, value }) = last_row {
        batch.put(table, key, value);
    }
    store.write(batch)?;
    Ok((State::open(store)?, live))
}

/// What is kept of a file's content, read a second time.
struct Kept {
    reader: SnapshotReader<BufReader<File>>,
    live: LiveVersions,
}

impl RecordSource for Kept {
    fn next_records(&mut self, _: usize) -> Result<Option<Vec<Record>>, SnapshotError> {
        while let Some(records) = self.reader.next_records()? {
            let mut kept = Vec::with_capacity(records.len());
            for record in records {
                if self.live.keeps(&record)? {
                    kept.push(record);
                }
            }
            // No records would be the end.
            if !kept.is_empty() {
                return Ok(Some(kept));
            }
        }
        Ok(None)
    }
}

/// The directory that a member of the new cluster is to begin with; nobody's so far.
fn new_directory(config: &Config) -> Result<DataDir, RestoreError> {
    let data_dir = DataDir::open(config)?;
    if !data_dir.is_new() {
        let path = data_dir.path().display();
        return Err(RestoreError::Refused(format!(
            "{path} has a member's data already: give an empty --data-dir"
        )));
    }
    Ok(data_dir)
}

fn new_cluster_id(meta: &SnapshotMeta, config: &Config) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&meta.digest);
    for member in &config.cluster.members {
        hasher.update(&member.id.to_le_bytes());
        hasher.update(&(member.peer_url.len() as u64).to_le_bytes());
        hasher.update(member.peer_url.as_bytes());
    }
    let mut id = [0; 8];
    hasher.finalize_xof().fill(&mut id);
    // 0 is what an absent id looks like on the wire.
    u64::from_le_bytes(id).max(1)
}

/// With `more`, the content is not in the state but there.
fn begin(mut state: State, more: Option<Kept>, mut data_dir: DataDir, cluster_id: u64, config: &Config) -> Result<Restored, RestoreError> {
    let id = data_dir
        .node_id()
        .ok_or_else(|| RestoreError::Refused("which member is this? Give --id".into()))?;
    let founders = config.cluster.members.iter().map(|member| MemberRecord {
        id: member.id,
        peer_url: member.peer_url.clone(),
        ..MemberRecord::default()
    });
    state.refound(cluster_id, &founders.collect::<Vec<_>>(), REVISION_JUMP)?;
    let view = state.snapshot_view();
    let revision = view.revision;
    let snapshot_dir = data_dir.snapshot_dir();
    create_dir_durably(&snapshot_dir).map_err(io_error(&snapshot_dir))?;
    let file = snapshot_files::path_of(&snapshot_dir, state.applied().index);
    match more {
        Some(more) => snapshot::write_file_with(view, more, &file)?,
        None => snapshot::write_file(view, &file)?,
    };
    data_dir.set_cluster(cluster_id, id)?;
    Ok(Restored {
        cluster_id,
        id,
        revision,
        kept: None,
    })
}

/// Makes the member whose directory is `config.node.data_dir` the only member of a new cluster with everything it has. The directory as
/// it was is kept beside it. Its peer URL is `peer_url`, or the one it had. For when a quorum is lost for ever; what only the lost members had is lost.
///
/// # Errors
/// See [`RestoreError`].
pub fn force_new_cluster(config: &Config, peer_url: Option<&str>) -> Result<Restored, RestoreError> {
    let path = &config.node.data_dir;
    let (old, new) = (free_name(path, "before-recovery"), free_name(path, "recovering"));
    let data_dir = DataDir::open_offline(path)?;
    let mut begun = config.clone();
    begun.node.data_dir.clone_from(&new);
    let restored = refound(config, &data_dir, begun, peer_url);
    if restored.is_err() {
        // What is left of it helps nobody; the member's own directory is as it was.
        let _ = fs::remove_dir_all(&new);
    }
    let restored = restored?;
    drop(data_dir);
    fs::rename(path, &old).map_err(io_error(path))?;
    fs::rename(&new, path).map_err(io_error(&new))?;
    sync_parent(path).map_err(io_error(path))?;
    Ok(Restored {
        kept: Some(old),
        ..restored
    })
}

/// Everything that is in `data_dir` as the beginning of the cluster that `begun` describes.
fn refound(config: &Config, data_dir: &DataDir, mut begun: Config, peer_url: Option<&str>) -> Result<Restored, RestoreError> {
    let new_dir = new_directory(&begun)?;
    // On the disk that the content ends up on.
    let state = server::latest_state(config, data_dir, &new_dir.path().join("scratch"))?;
    let members = state.reader().members();
    for founder in &mut begun.cluster.members {
        let known = members
            .iter()
            .find(|member| member.id == founder.id)
            .map(|member| member.peer_url.as_str());
        if let Some(peer_url) = peer_url.or(known) {
            peer_url.clone_into(&mut founder.peer_url);
        }
    }
    begin(state, None, new_dir, rand::random::<u64>().max(1), &begun)
}

/// A name beside `path` that is not taken.
fn free_name(path: &Path, suffix: &str) -> PathBuf {
    let named = |number: u32| {
        let mut name: OsString = path.components().as_path().as_os_str().to_owned();
        name.push(format!(".{suffix}-{number}"));
        PathBuf::from(name)
    };
    (1..u32::MAX)
        .map(named)
        .find(|path| !path.exists())
        .unwrap_or_else(|| named(u32::MAX))
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> RestoreError {
    let path = path.display().to_string();
    move |source| RestoreError::Io { path, source }
}
