//! The directory of a store: one engine directory per *generation*, and the `STORE` file that names the current one.
//!
//! ```text
//! store/STORE        engine, format, generation, fence (checksummed, replaced atomically)
//! store/CLEAN        generation and newest batch (checksummed): only while a store that was closed in order is not open
//! store/<engine>-3/  the engine's own files
//! ```
//!
//! *Invariants*
//! - Clearing a store begins a new generation: the new directory is complete before `STORE` names it, the old one is removed after.
//!   A crash in between leaves one of the two, whole.
//! - The **fence** is the number of the last batch that a `sync` made durable. Each batch also stores its number in the engine; RocksDB, if it
//!   comes back with a lower one, has lost acknowledged records, and the store refuses to open (rule 11 would be broken otherwise).
//! - An engine that a power cut may leave as it never was (sled) uses **`CLEAN`** instead of the fence: it is written when everything is
//!   durable and nothing will follow, and it is durably gone before the engine is opened again. A store without it is discarded.
//! - Create, rename and remove are followed by fsync of file, directory and parent (rule 4).

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use parking_lot::Mutex;

use super::StoreError;

const FILE_NAME: &str = "STORE";
const CLEAN_NAME: &str = "CLEAN";

/// The format that this build writes and reads. Format 1 of sled knew no `CLEAN`, and its member kept no snapshot to rebuild it from: a
/// build of one format must not touch a store of the other.
fn format_of(engine: &str) -> u64 {
    if engine == "sled" { 2 } else { 1 }
}

/// What the `STORE` file says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Marker {
    /// Which engine directory is the current one.
    pub(super) generation: u64,
    /// Number of the last batch known to be durable in it.
    pub(super) fence: u64,
}

/// Of a new store.
const FIRST: Marker = Marker { generation: 1, fence: 0 };

/// A store's directory, opened for one engine.
#[derive(Debug)]
pub(super) struct StoreDir {
    dir: PathBuf,
    engine: &'static str,
    marker: Mutex<Marker>,
}

impl StoreDir {
    /// Opens the directory, or creates it, and removes what an interrupted `clear` left.
    pub(super) fn open(dir: &Path, engine: &'static str) -> Result<StoreDir, StoreError> {
        let marker = match read(dir, engine)? {
            Some(marker) => marker,
            None => {
                create_dir_durably(&engine_dir(dir, engine, FIRST.generation))?;
                replace(dir, engine, FIRST)?;
                FIRST
            }
        };
        let opened = StoreDir {
            dir: dir.to_owned(),
            engine,
            marker: Mutex::new(marker),
        };
        opened.remove_other_generations()?;
        Ok(opened)
    }

    /// The current marker.
    pub(super) fn marker(&self) -> Marker {
        *self.marker.lock()
    }

    /// The current engine directory.
    pub(super) fn current(&self) -> PathBuf {
        engine_dir(&self.dir, self.engine, self.marker().generation)
    }

    /// Whether the current generation has no files yet.
    pub(super) fn is_new(&self) -> Result<bool, StoreError> {
        let current = self.current();
        let mut entries = fs::read_dir(&current).map_err(|error| io_error("listing", &current, error))?;
        Ok(entries.next().is_none())
    }

    /// Notes that the current generation is durable up to `batch`, and that nothing follows before the next [`take_clean`](Self::take_clean).
    pub(super) fn mark_clean(&self, batch: u64) -> Result<(), StoreError> {
        write_durably(
            &self.dir,
            CLEAN_NAME,
            &format!("generation {}\nbatch {batch}", self.marker().generation),
        )
    }

    /// Removes the mark of an orderly close, durably. The newest batch at that close, if there was one of the current generation.
    pub(super) fn take_clean(&self) -> Result<Option<u64>, StoreError> {
        let path = self.dir.join(CLEAN_NAME);
        let batch = match fs::read(&path) {
            Ok(bytes) => clean_batch(&bytes, self.marker().generation),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error("reading", &path, error)),
        };
        fs::remove_file(&path).map_err(|error| io_error("removing", &path, error))?;
        sync_dir(&self.dir)?;
        Ok(batch)
    }

    /// Gives up the current generation: an empty one follows.
    pub(super) fn discard(&self) -> Result<(), StoreError> {
        self.prepare_next()?;
        self.switch_to_next()?;
        self.remove_other_generations()
    }

    /// Refuses an engine that came back behind the fence; `batch` is the newest batch it holds.
    #[cfg(any(test, feature = "rocksdb"))]
    pub(super) fn check_fence(&self, batch: u64) -> Result<(), StoreError> {
        let fence = self.marker().fence;
        if batch >= fence {
            return Ok(());
        }
        Err(StoreError::Refused(format!(
            "{} lost data: it came back at batch {batch}, but batch {fence} had been made durable. The disk or the file system dropped \
             acknowledged writes. Remove this member and add it again under a new id with an empty data directory",
            self.current().display()
        )))
    }

    /// Notes that the batches up to `batch` are durable. Call it after the sync that made them so.
    #[cfg(any(test, feature = "rocksdb"))]
    pub(super) fn raise_fence(&self, batch: u64) -> Result<(), StoreError> {
        let mut marker = self.marker.lock();
        if batch > marker.fence {
            let raised = Marker { fence: batch, ..*marker };
            replace(&self.dir, self.engine, raised)?;
            *marker = raised;
        }
        Ok(())
    }

    /// Creates the directory of the next generation, empty.
    pub(super) fn prepare_next(&self) -> Result<PathBuf, StoreError> {
        let next = engine_dir(&self.dir, self.engine, self.marker().generation + 1);
        remove_tree(&next)?;
        create_dir_durably(&next)?;
        Ok(next)
    }

    /// Makes the next generation the current one, durably.
    pub(super) fn switch_to_next(&self) -> Result<(), StoreError> {
        let mut marker = self.marker.lock();
        let next = Marker {
            generation: marker.generation + 1,
            fence: 0,
        };
        replace(&self.dir, self.engine, next)?;
        *marker = next;
        Ok(())
    }

    /// Removes every engine directory but the current one.
    pub(super) fn remove_other_generations(&self) -> Result<(), StoreError> {
        let current = self.current();
        let prefix = format!("{}-", self.engine);
        let failed = |error| io_error("listing", &self.dir, error);
        for entry in fs::read_dir(&self.dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if entry.file_name().to_string_lossy().starts_with(&prefix) && entry.path() != current {
                remove_tree(&entry.path())?;
            }
        }
        Ok(())
    }
}

/// Notes that the directory belongs to an engine that keeps no files; refuses one that belongs to another.
pub(super) fn claim(dir: &Path, engine: &str) -> Result<(), StoreError> {
    if read(dir, engine)?.is_none() {
        create_dir_durably(dir)?;
        replace(dir, engine, FIRST)?;
    }
    Ok(())
}

/// The marker, if there is one.
fn read(dir: &Path, engine: &str) -> Result<Option<Marker>, StoreError> {
    let path = dir.join(FILE_NAME);
    match fs::read_to_string(&path) {
        Ok(text) => parse(&text, engine, &path).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(StoreError::Corrupt(format!("{} is damaged", path.display()))),
        Err(error) => Err(io_error("reading", &path, error)),
    }
}

fn engine_dir(dir: &Path, engine: &str, generation: u64) -> PathBuf {
    dir.join(format!("{engine}-{generation}"))
}

fn parse(text: &str, engine: &str, path: &Path) -> Result<Marker, StoreError> {
    let damaged = || StoreError::Corrupt(format!("{} is damaged", path.display()));
    let body = checked_body(text).ok_or_else(damaged)?;
    let number = |name: &str| field(body, name).and_then(|value| value.parse::<u64>().ok()).ok_or_else(damaged);
    let found = field(body, "engine").ok_or_else(damaged)?;
    let (format, known) = (number("format")?, format_of(found));
    if format > known {
        return Err(StoreError::Refused(format!(
            "{} has format {format}, this build reads up to {known}: start the newer version, or use another data directory",
            path.display()
        )));
    }
    if format < known {
        return Err(StoreError::Refused(format!(
            "{} has format {format}, this build reads {known}: start the older version and take a backup to restore with this one, or remove \
             this member and add it again under a new id with an empty data directory",
            path.display()
        )));
    }
    if found != engine {
        return Err(StoreError::Refused(format!(
            "{} belongs to the engine {found}, not {engine}: set store.backend = \"{found}\", or use another data directory",
            path.display()
        )));
    }
    Ok(Marker {
        generation: number("generation")?,
        fence: number("fence")?,
    })
}

/// What stands before the checksum, if that is right.
fn checked_body(text: &str) -> Option<&str> {
    let (body, crc) = text.trim_end().rsplit_once("\ncrc32c ")?;
    (u32::from_str_radix(crc, 16).ok()? == crc32c::crc32c(body.as_bytes())).then_some(body)
}

fn field<'a>(body: &'a str, name: &str) -> Option<&'a str> {
    body.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
}

/// The batch that a `CLEAN` file names, if it is whole and of that generation.
fn clean_batch(bytes: &[u8], generation: u64) -> Option<u64> {
    let body = checked_body(str::from_utf8(bytes).ok()?)?;
    let number = |name: &str| field(body, name)?.parse::<u64>().ok();
    if number("generation")? == generation {
        number("batch")
    } else {
        None
    }
}

fn replace(dir: &Path, engine: &str, marker: Marker) -> Result<(), StoreError> {
    let Marker { generation, fence } = marker;
    let format = format_of(engine);
    write_durably(
        dir,
        FILE_NAME,
        &format!("metcd-store\nformat {format}\nengine {engine}\ngeneration {generation}\nfence {fence}"),
    )
}

/// Writes a file with a checksum beside its name, syncs it and renames it into place.
fn write_durably(dir: &Path, name: &str, body: &str) -> Result<(), StoreError> {
    let text = format!("{body}\ncrc32c {:08x}\n", crc32c::crc32c(body.as_bytes()));
    let (path, new) = (dir.join(name), dir.join(format!("{name}.new")));
    let write = || -> io::Result<()> {
        let mut file = File::create(&new)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&new, &path)
    };
    write().map_err(|error| io_error("writing", &path, error))?;
    sync_dir(dir)
}

/// Creates a directory (and its parents); it survives a power cut.
pub(super) fn create_dir_durably(dir: &Path) -> Result<(), StoreError> {
    if dir.is_dir() {
        return Ok(());
    }
    let parent = match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    create_dir_durably(parent)?;
    match fs::create_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(io_error("creating", dir, error)),
        _ => {}
    }
    sync_dir(dir)?;
    sync_dir(parent)
}

/// Makes the entries of a directory durable.
pub(super) fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(|error| io_error("syncing", dir, error))
}

/// The bytes of all files below a directory, as the file system counts them.
pub(super) fn disk_bytes(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => disk_bytes(&entry.path()),
            Ok(metadata) => metadata.blocks() * 512,
            Err(_) => 0,
        })
        .sum()
}

fn remove_tree(dir: &Path) -> Result<(), StoreError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("removing", dir, error)),
        _ => Ok(()),
    }
}

/// An [`StoreError::Io`] that names the file.
pub(super) fn io_error(what: &str, path: &Path, source: io::Error) -> StoreError {
    StoreError::Io {
        what: format!("{what} {}", path.display()),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(result: Result<StoreDir, StoreError>) -> String {
        match result {
            Err(StoreError::Refused(text)) => text,
            other => panic!("not refused: {other:?}"),
        }
    }

    #[test]
    fn another_engine_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        StoreDir::open(dir.path(), "sled").unwrap();
        let text = refusal(StoreDir::open(dir.path(), "rocksdb"));
        assert!(text.contains("store.backend = \"sled\""), "{text}");
        assert!(claim(dir.path(), "memory").is_err());
    }

    #[test]
    fn another_format_is_refused_and_touched_by_nobody() {
        for (format, engine, advice) in [
            (3, "sled", "start the newer version"),
            (1, "sled", "add it again under a new id"),
            (2, "rocksdb", "start the newer version"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let body = format!("metcd-store\nformat {format}\nengine {engine}\ngeneration 1\nfence 0");
            write_durably(dir.path(), FILE_NAME, &body).unwrap();
            let data = engine_dir(dir.path(), engine, 1).join("db");
            create_dir_durably(data.parent().unwrap()).unwrap();
            fs::write(&data, b"x").unwrap();
            let text = refusal(StoreDir::open(dir.path(), engine));
            assert!(text.contains(&format!("format {format}")) && text.contains(advice), "{text}");
            assert!(data.exists());
        }
    }

    #[test]
    fn a_clean_mark_is_taken_once_and_only_whole_and_of_its_generation() {
        let dir = tempfile::tempdir().unwrap();
        let opened = StoreDir::open(dir.path(), "sled").unwrap();
        assert_eq!(opened.take_clean().unwrap(), None);
        opened.mark_clean(7).unwrap();
        let path = dir.path().join(CLEAN_NAME);
        let good = fs::read(&path).unwrap();
        assert_eq!(opened.take_clean().unwrap(), Some(7));
        assert!(!path.exists());
        assert_eq!(opened.take_clean().unwrap(), None);
        for i in 0..good.len() - 1 {
            let mut bad = good.clone();
            bad[i] ^= 1;
            fs::write(&path, &bad).unwrap();
            assert_eq!(opened.take_clean().unwrap(), None, "byte {i}");
        }
        fs::write(&path, &good[..good.len() / 2]).unwrap();
        assert_eq!(opened.take_clean().unwrap(), None);
        fs::write(&path, &good).unwrap();
        opened.discard().unwrap();
        assert_eq!(opened.take_clean().unwrap(), None, "it is another generation's");
        assert!(opened.is_new().unwrap());
    }

    #[test]
    fn every_damaged_byte_of_the_marker_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        StoreDir::open(dir.path(), "sled").unwrap().raise_fence(77).unwrap();
        let path = dir.path().join(FILE_NAME);
        let good = fs::read(&path).unwrap();
        for i in 0..good.len() - 1 {
            let mut bad = good.clone();
            bad[i] ^= 1;
            fs::write(&path, &bad).unwrap();
            let result = StoreDir::open(dir.path(), "sled");
            assert!(matches!(result, Err(StoreError::Corrupt(_))), "byte {i}: {result:?}");
        }
    }

    #[test]
    fn an_engine_behind_the_fence_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        StoreDir::open(dir.path(), "sled").unwrap().raise_fence(5).unwrap();
        let opened = StoreDir::open(dir.path(), "sled").unwrap();
        assert!(opened.check_fence(5).is_ok() && opened.check_fence(9).is_ok());
        let error = opened.check_fence(4).unwrap_err().to_string();
        assert!(error.contains("lost data") && error.contains("new id"), "{error}");
    }

    #[test]
    fn an_interrupted_clear_leaves_the_old_generation() {
        let dir = tempfile::tempdir().unwrap();
        let opened = StoreDir::open(dir.path(), "sled").unwrap();
        let next = opened.prepare_next().unwrap();
        let reopened = StoreDir::open(dir.path(), "sled").unwrap();
        assert_eq!(reopened.marker().generation, 1);
        assert!(!next.exists() && reopened.current().exists());
    }
}
