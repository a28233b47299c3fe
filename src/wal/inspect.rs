//! A look into a log directory that changes nothing in it.
//!
//! The engines repair and write when they open, so a copy is opened, made beside the system's temporary files and removed afterwards.

use std::{
    fs::{self, File, TryLockError},
    io::ErrorKind,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use super::{
    Wal, WalError, fence,
    files::{forget_cached, io_error, read_format},
};
use crate::config::WalEngine;

/// A log opened from a copy.
pub struct Inspected {
    wal: Result<Box<dyn Wal>, WalError>,
    facts: Facts,
    _copy: Copy,
}

/// What the directory's own files say, whether or not the log can be opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// The engine that the marker file names.
    pub engine: String,
    /// What the fence says was acknowledged, or why it cannot be read.
    pub fence: Result<FenceFacts, String>,
}

/// The newest state that the fence knows to be acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FenceFacts {
    /// Number of atomic changes the log had seen.
    pub seq: u64,
    /// Term of the hard state.
    pub term: u64,
    /// Vote of the hard state, 0 for none.
    pub vote: u64,
    /// Index of the last entry.
    pub last_index: u64,
    /// One of its two copies is damaged: what it had noted last may be missing here.
    pub is_damaged: bool,
}

impl Inspected {
    /// What is known without opening the log.
    #[must_use]
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// The log, opened and verified as the server would, or why it would refuse it.
    pub fn wal(&self) -> Result<&dyn Wal, &WalError> {
        self.wal.as_deref()
    }
}

/// The error as it would be told of the log itself: nobody finds the copy.
fn in_place_of(error: WalError, copy: &Path, dir: &Path) -> WalError {
    let told = |text: String| text.replace(&copy.display().to_string(), &dir.display().to_string());
    match error {
        WalError::Io { what, source } => WalError::Io { what: told(what), source },
        WalError::Engine(text) => WalError::Engine(told(text)),
        WalError::Corrupt(text) => WalError::Corrupt(told(text)),
        WalError::Lost(text) => WalError::Lost(told(text)),
        WalError::Refused(text) => WalError::Refused(told(text)),
        WalError::Compacted { .. } => error,
    }
}

/// Copies the log in `dir` and opens the copy.
///
/// # Errors
/// When `dir` is no log directory, is in use by a server, or cannot be copied. Damage inside the log is no error here: see [`Inspected::wal`].
pub fn inspect(dir: &Path) -> Result<Inspected, WalError> {
    let format = read_format(&dir.join("FORMAT"), None)?;
    let _lock = lock_shared(&dir.join("LOCK"))?;
    forget_cached(dir, false)?;
    let copy = Copy::of(dir)?;
    let fence = fence::read(&dir.join("fence"))
        .map_err(|e| e.to_string())
        .map(|(meta, _)| FenceFacts {
            seq: meta.seq,
            term: meta.hard_state.term,
            vote: meta.hard_state.vote,
            last_index: meta.last_index,
            is_damaged: fence::has_damage(&dir.join("fence")).unwrap_or(true),
        });
    let engine = match format.engine.as_str() {
        "sled" => WalEngine::Sled,
        "raft-engine" => WalEngine::RaftEngine,
        "rocksdb" => WalEngine::RocksDb,
        other => return Err(WalError::Refused(format!("this program knows no engine {other}"))),
    };
    let wal = super::open_quietly(engine, &copy.0, false).map_err(|error| in_place_of(error, &copy.0, dir));
    Ok(Inspected {
        wal,
        facts: Facts {
            engine: format.engine,
            fence,
        },
        _copy: copy,
    })
}

fn lock_shared(path: &Path) -> Result<Option<File>, WalError> {
    let Ok(file) = File::open(path) else { return Ok(None) };
    match file.try_lock_shared() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Err(WalError::Refused(format!(
            "{} is in use by a running server",
            path.parent().unwrap_or(path).display()
        ))),
        Err(TryLockError::Error(source)) => Err(io_error("lock", path)(source)),
    }
}

/// A temporary copy of a directory, removed when dropped.
struct Copy(PathBuf);

impl Copy {
    fn of(dir: &Path) -> Result<Self, WalError> {
        for n in 0..u32::MAX {
            let target = std::env::temp_dir().join(format!("metcd-wal-{}-{n}", std::process::id()));
            // Making it is what claims it: whoever looks first and makes it later may meet another thread that did the same.
            match fs::DirBuilder::new().mode(0o700).create(&target) {
                Ok(()) => {
                    let copy = Self(target);
                    copy_content(dir, &copy.0)?;
                    return Ok(copy);
                }
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(io_error("create", &target)(error)),
            }
        }
        Err(WalError::Refused(format!(
            "{} is full of copies of logs: remove metcd-wal-*",
            std::env::temp_dir().display()
        )))
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "a temporary copy of a log could not be removed");
        }
    }
}

/// Copies files and directories, byte for byte.
pub(crate) fn copy_tree(from: &Path, to: &Path) -> Result<(), WalError> {
    fs::create_dir(to).map_err(io_error("create", to))?;
    copy_content(from, to)
}

fn copy_content(from: &Path, to: &Path) -> Result<(), WalError> {
    for entry in fs::read_dir(from).map_err(io_error("list", from))? {
        let path = entry.map_err(io_error("list", from))?.path();
        let Some(name) = path.file_name() else { continue };
        if path.is_dir() {
            copy_tree(&path, &to.join(name))?;
        } else {
            fs::copy(&path, to.join(name)).map_err(io_error("copy", &path))?;
        }
    }
    Ok(())
}
