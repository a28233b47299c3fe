//! The chore thread: slow work off the loop. One chore at a time.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::thread::JoinHandle;
use std::time::Instant;

use super::event::{Event, Fatal};
use crate::node::Shared;
use crate::state::SnapshotView;
use crate::{snapshot, snapshot_files};

/// Slow work.
pub enum Chore {
    /// Make the state of this view durable outside the log: a sync of a store that survives crashes, a snapshot file for any other.
    Durable(Box<SnapshotView>),
    /// Remove the snapshot files before this index.
    RemoveOlder(u64),
    /// Remove a file that nobody needs.
    Remove(PathBuf),
    /// End.
    Close,
}

pub(super) fn spawn(chores: Receiver<Chore>, shared: Arc<Shared>, dir: PathBuf) -> std::io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name("chores".into()).spawn(move || {
        while let Ok(chore) = chores.recv() {
            match chore {
                Chore::Durable(view) => make_durable(*view, &shared, &dir),
                Chore::RemoveOlder(index) => log_failure(&dir, snapshot_files::remove_older(&dir, index)),
                Chore::Remove(file) => log_failure(&file, std::fs::remove_file(&file)),
                Chore::Close => return,
            }
        }
    })
}

fn make_durable(view: SnapshotView, shared: &Shared, dir: &Path) {
    let index = view.applied.index;
    let begun = Instant::now();
    let result = if shared.store.survives_crashes() {
        shared.store.sync().map(|()| 0).map_err(|error| error.to_string())
    } else {
        let file = snapshot_files::path_of(dir, index);
        snapshot::write_file(view, &file)
            .map(|meta| meta.bytes)
            .map_err(|error| error.to_string())
    };
    match result {
        Ok(bytes) => {
            shared.metrics.snapshots_written.observe(begun.elapsed());
            // Also beside a store that was synced: what was received and installed is durable in it now, and the log goes on after it.
            log_failure(dir, snapshot_files::remove_older(dir, index));
            shared.send(Event::Durable { index, bytes });
        }
        // A store that cannot be synced is as lost as a log that cannot (rule 5); a snapshot file is tried again, the log keeps everything.
        Err(error) if shared.store.survives_crashes() => shared.fail(Fatal::new(error)),
        Err(error) => {
            tracing::warn!(%error, "could not write a snapshot; the log is kept until one succeeds");
            shared.send(Event::Durable { index: 0, bytes: 0 });
        }
    }
}

/// What could not be removed costs space and is tried again with the next snapshot or start.
fn log_failure(path: &Path, result: std::io::Result<()>) {
    if let Err(error) = result {
        tracing::warn!(path = %path.display(), %error, "could not remove a snapshot that is not needed any more");
    }
}
