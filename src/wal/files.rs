//! A log directory: its lock, its marker file, and the syncs that creating and renaming need (rule 4).
//!
//! ```text
//! LOCK         held by the process that has the log open
//! FORMAT       engine, format version and a random id, one checksummed line; written last when a directory is made
//! CREATING     there while a directory is made; with it and without FORMAT the directory holds nothing worth keeping
//! fence        see the fence module
//! journal-0/1  sled only, see the journal module
//! segments/    sled only, see the segments module
//! sled/ raft-engine/ rocksdb/   the engine's own files
//! ```

use std::{
    cell::Cell,
    fs::{self, File, OpenOptions, TryLockError},
    hash::{BuildHasher, Hasher, RandomState},
    io::{self, Read as _},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use super::WalError;

/// Version of everything under a log directory that is ours. Since 2, sled may hold the places of large records instead of the records.
fn format_version(engine: &str) -> u32 {
    if engine == "sled" { 2 } else { 1 }
}

/// `map_err` helper: what was being done, to which path.
pub(crate) fn io_error(what: &str, path: &Path) -> impl FnOnce(io::Error) -> WalError {
    let what = format!("{what} {}", path.display());
    move |source| WalError::Io { what, source }
}

/// Reads a file that was made with the log. That it is not there any more is damage.
pub(crate) fn read_own(path: &Path) -> Result<Vec<u8>, WalError> {
    let mut content = Vec::new();
    open_own(path)?.read_to_end(&mut content).map_err(io_error("read", path))?;
    Ok(content)
}

/// Opens a file that was made with the log, for reading.
pub(crate) fn open_own(path: &Path) -> Result<File, WalError> {
    File::open(path).map_err(|error| {
        if error.kind() == io::ErrorKind::NotFound {
            WalError::Corrupt(format!("{} is missing", path.display()))
        } else {
            io_error("open", path)(error)
        }
    })
}

/// fsync of a directory, so that names made or removed in it are durable.
pub(crate) fn sync_dir(dir: &Path) -> Result<(), WalError> {
    File::open(dir)
        .and_then(|file| file.sync_all())
        .map_err(io_error("fsync directory", dir))
}

/// fsync of `dir`, everything below it, and its parent. For what an engine just created without syncing it.
pub(crate) fn sync_tree(dir: &Path) -> Result<(), WalError> {
    for entry in fs::read_dir(dir).map_err(io_error("list", dir))? {
        let path = entry.map_err(io_error("list", dir))?.path();
        if path.is_dir() {
            sync_tree(&path)?;
        } else {
            File::open(&path)
                .and_then(|file| file.sync_all())
                .map_err(io_error("fsync", &path))?;
        }
    }
    sync_dir(dir)
}

/// Lets the kernel forget what it holds of the files below `dir`, so that what is read next comes from the disk.
///
/// After a write failed the kernel may keep the pages and call them clean: they are read, and synced, as if the disk had them (rule 5). A log
/// that came back from such pages would be acknowledged on top of what is lost with the next power cut. With `sync`, what waits to be
/// written is written first; without, it may stay. It is advice: pages that another process maps stay.
pub(crate) fn forget_cached(dir: &Path, sync: bool) -> Result<(), WalError> {
    for entry in fs::read_dir(dir).map_err(io_error("list", dir))? {
        let entry = entry.map_err(io_error("list", dir))?;
        let (path, kind) = (entry.path(), entry.file_type().map_err(io_error("look at", &entry.path()))?);
        if kind.is_dir() {
            forget_cached(&path, sync)?;
        }
        // Whatever else lies there is not the log's, nor is what may not be read: if the log needs it, its engine says so.
        if !kind.is_file() {
            continue;
        }
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => continue,
            opened => opened.map_err(io_error("open", &path))?,
        };
        if sync {
            file.sync_data().map_err(io_error("fdatasync", &path))?;
        }
        if let Err(error) = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed) {
            tracing::debug!(path = %path.display(), %error, "the kernel may still show what it kept of this file instead of what the disk has");
        }
    }
    Ok(())
}

/// How long a size that was looked up is good enough for a status page.
const SIZE_GOOD_FOR: Duration = Duration::from_secs(1);

/// Sum of the sizes of the files in some directories (not below). Asked after every batch, so it is looked up at most once a second.
pub(crate) struct DirBytes {
    dirs: Vec<PathBuf>,
    known: Cell<Option<(Instant, u64)>>,
}

impl DirBytes {
    pub(crate) fn new(dirs: Vec<PathBuf>) -> Self {
        Self {
            dirs,
            known: Cell::new(None),
        }
    }

    pub(crate) fn get(&self) -> u64 {
        let now = Instant::now();
        match self.known.get() {
            Some((at, bytes)) if now.duration_since(at) < SIZE_GOOD_FOR => bytes,
            _ => {
                let bytes = self.dirs.iter().map(|dir| dir_bytes(dir)).sum();
                self.known.set(Some((now, bytes)));
                bytes
            }
        }
    }
}

fn dir_bytes(dir: &Path) -> u64 {
    fs::read_dir(dir).map_or(0, |entries| {
        entries.flatten().filter_map(|e| e.metadata().ok()).map(|m| m.len()).sum()
    })
}

/// An open, locked log directory.
pub(crate) struct Claim {
    dir: PathBuf,
    engine: &'static str,
    /// Random, made with the directory: frames of another log are not taken for ours.
    pub(crate) id: u64,
    /// The directory holds no log yet: the engine creates its files, then calls [`Claim::commit`].
    pub(crate) fresh: bool,
    _lock: File,
}

impl Claim {
    /// Locks `dir` (created if need be) for `engine`. `Refused` if it is in use, of another engine, of a newer format, or no log directory.
    /// A log that exists is read from the disk, whatever an earlier process left in memory, unless `sync` is false.
    pub(crate) fn take(dir: &Path, engine: &'static str, sync: bool) -> Result<Self, WalError> {
        make_dir(dir)?;
        let lock = lock(dir)?;
        let format_path = dir.join("FORMAT");
        let creating_path = dir.join("CREATING");
        if format_path.exists() {
            let format = read_format(&format_path, Some(engine))?;
            if format.version < format_version(engine) {
                write_format(dir, engine, format.id)?;
            }
            remove_if_there(&creating_path)?;
            if sync {
                forget_cached(dir, true)?;
            }
            return Ok(Self {
                dir: dir.to_owned(),
                engine,
                id: format.id,
                fresh: false,
                _lock: lock,
            });
        }
        if creating_path.exists() {
            empty(dir)?;
        } else if let Some(name) = first_stranger(dir)? {
            return Err(WalError::Refused(format!(
                "{} is not a log directory: it holds {name} but no FORMAT file. Restore the file or name an empty directory",
                dir.display()
            )));
        }
        write_synced(&creating_path, b"")?;
        sync_dir(dir)?;
        Ok(Self {
            dir: dir.to_owned(),
            engine,
            id: RandomState::new().build_hasher().finish(),
            fresh: true,
            _lock: lock,
        })
    }

    /// Makes a fresh directory a valid one, after everything in it is durable.
    pub(crate) fn commit(&mut self) -> Result<(), WalError> {
        if !self.fresh {
            return Ok(());
        }
        sync_tree(&self.dir)?;
        write_format(&self.dir, self.engine, self.id)?;
        remove_if_there(&self.dir.join("CREATING"))?;
        sync_dir(&self.dir)?;
        self.fresh = false;
        Ok(())
    }
}

/// Writes the marker of this program's version, durably and in one step.
fn write_format(dir: &Path, engine: &str, id: u64) -> Result<(), WalError> {
    let version = format_version(engine);
    let head = format!("metcd-wal format={version} engine={engine} id={id:016x}");
    let line = format!("{head} crc={:08x}\n", crc32c::crc32c(head.as_bytes()));
    let (path, new_path) = (dir.join("FORMAT"), dir.join("FORMAT.new"));
    write_synced(&new_path, line.as_bytes())?;
    fs::rename(&new_path, &path).map_err(io_error("rename", &new_path))?;
    sync_dir(dir)
}

/// What the marker says.
pub(crate) struct Format {
    /// At most what this program writes.
    version: u32,
    /// Name of the engine.
    pub(crate) engine: String,
    /// See [`Claim::id`].
    pub(crate) id: u64,
}

/// Reads the marker; with `engine` given, another one is refused.
pub(crate) fn read_format(path: &Path, engine: Option<&str>) -> Result<Format, WalError> {
    let raw = fs::read(path).map_err(io_error("read", path))?;
    let damaged = || WalError::Corrupt(format!("{} is not a marker of this program or is damaged", path.display()));
    let text = std::str::from_utf8(&raw).map_err(|_| damaged())?;
    let rest = text.strip_prefix("metcd-wal format=").ok_or_else(damaged)?;
    let (version, _) = rest.split_once(' ').ok_or_else(damaged)?;
    let version: u32 = version.parse().map_err(|_| damaged())?;
    let named = rest.split(' ').find_map(|field| field.strip_prefix("engine="));
    let newest = format_version(named.unwrap_or_default());
    if version > newest {
        return Err(WalError::Refused(format!(
            "{} has format {version}, this program knows up to {newest}: use the newer program",
            path.display()
        )));
    }
    let (head, crc) = text
        .strip_suffix('\n')
        .and_then(|line| line.rsplit_once(" crc="))
        .ok_or_else(damaged)?;
    if crc != format!("{:08x}", crc32c::crc32c(head.as_bytes())) {
        return Err(damaged());
    }
    let field = |name: &str| head.split(' ').find_map(|field| field.strip_prefix(name));
    let found = field("engine=").ok_or_else(damaged)?;
    if let Some(engine) = engine.filter(|engine| *engine != found) {
        return Err(WalError::Refused(format!(
            "{} holds a log of engine {found}, not {engine}: set wal.engine = \"{found}\", or give the member an empty data directory",
            path.parent().unwrap_or(path).display()
        )));
    }
    let id = u64::from_str_radix(field("id=").ok_or_else(damaged)?, 16).map_err(|_| damaged())?;
    Ok(Format {
        version,
        engine: found.to_owned(),
        id,
    })
}

/// Creates `dir` and its ancestors and makes their names durable.
pub(crate) fn make_dir(dir: &Path) -> Result<(), WalError> {
    if dir.is_dir() {
        return Ok(());
    }
    if let Some(parent) = dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        make_dir(parent)?;
        fs::create_dir_all(dir).map_err(io_error("create", dir))?;
        return sync_dir(parent);
    }
    fs::create_dir_all(dir).map_err(io_error("create", dir))?;
    sync_dir(Path::new("."))
}

fn lock(dir: &Path) -> Result<File, WalError> {
    let path = dir.join("LOCK");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(io_error("open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(WalError::Refused(format!("{} is in use by another process", dir.display()))),
        Err(TryLockError::Error(source)) => Err(io_error("lock", &path)(source)),
    }
}

/// The first name in `dir` that a new log directory would not have.
fn first_stranger(dir: &Path) -> Result<Option<String>, WalError> {
    let mut names = names(dir)?;
    names.sort();
    Ok(names.into_iter().find(|name| name != "LOCK"))
}

fn names(dir: &Path) -> Result<Vec<String>, WalError> {
    let entries = fs::read_dir(dir).map_err(io_error("list", dir))?;
    entries
        .map(|entry| {
            entry
                .map(|e| e.file_name().to_string_lossy().into_owned())
                .map_err(io_error("list", dir))
        })
        .collect()
}

/// Removes what an interrupted creation left.
fn empty(dir: &Path) -> Result<(), WalError> {
    for name in names(dir)?.iter().filter(|name| *name != "LOCK" && *name != "CREATING") {
        let path = dir.join(name);
        let removed = if path.is_dir() {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
        removed.map_err(io_error("remove", &path))?;
    }
    sync_dir(dir)
}

fn remove_if_there(path: &Path) -> Result<(), WalError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(io_error("remove", path)(e)),
        _ => Ok(()),
    }
}

/// Creates `path` with `content`, synced; its name is not durable until the directory is synced.
pub(crate) fn write_synced(path: &Path, content: &[u8]) -> Result<(), WalError> {
    fs::write(path, content)
        .and_then(|()| File::open(path)?.sync_all())
        .map_err(io_error("write", path))
}
