//! The data directory: one process at a time, one member for ever.
//!
//! ```text
//! metcd-data/
//! ├─ LOCK            held while a process uses the directory; holds its pid
//! ├─ identity.toml   whose data this is
//! ├─ boot            how often it was started
//! ├─ advertised.toml what the member last told its cluster of its name and its URL for clients
//! ├─ reserve         space held back for a full disk
//! ├─ departed        only once its member was removed from the cluster, and knows that nobody needs it
//! ├─ outdated        only once its member has heard that it lacks what it acknowledged: an older copy, or a disk that lost writes
//! ├─ wal/  store/  snapshots/
//! ```
//!
//! *Invariants*
//! - A directory is opened by at most one process.
//! - It is never opened as another cluster's or another member's, or by another engine than it was written by.
//! - The incarnation is drawn once; [`boot`](DataDir::boot) is greater at every start, durably, before anything is sent: a pair of
//!   (incarnation, boot) never comes twice, not even from a copy of the directory (`boot.rs`).
//! - Until [`set_cluster`](DataDir::set_cluster) the directory [is new](DataDir::is_new), however often it was opened: a founder that was
//!   refused by its peers, or crashed while founding, asks them again the next time.

pub mod advertised;
mod boot;
pub mod disk;
mod identity;

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::Xxh3Default;

use crate::config::{Config, FoundingMember};
pub use boot::is_outdated;
use disk::RESERVE_BYTES;
pub use identity::{FORMAT, Identity};

const LOCK_NAME: &str = "LOCK";
const WAL_NAME: &str = "wal";
const DEPARTED_NAME: &str = "departed";
const OUTDATED_NAME: &str = "outdated";

/// What is to be done about a member that has lost something that it acknowledged.
pub const WAY_OUT: &str = "remove this member from the cluster and add it under a new id with an empty directory, or, if it is all there is of the cluster, restore a snapshot (`metcd snapshot restore`)";

/// Why a directory cannot be used; each says the way out.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what each field is")]
pub enum DataDirError {
    /// The operating system refused.
    #[error("data directory: {path}: {source}: --data-dir needs a directory that this user can write to, on a disk with room")]
    Io { path: String, source: io::Error },
    /// Another process has it.
    #[error("data directory {path} is in use by {holder}: stop that process, or choose another --data-dir")]
    InUse { path: String, holder: String },
    /// Not empty, and not ours.
    #[error("data directory {path} is not metcd's: it holds {found} and no identity.toml: choose another --data-dir, or empty this one")]
    Foreign { path: String, found: String },
    /// A tool was given another directory.
    #[error("{0} is not the data directory of a member: it has no identity.toml. Name the one that `metcd serve --data-dir` was given")]
    NoMembers(String),
    /// Its member was removed for good.
    #[error(
        "data directory {path} is of member {id}, which was removed from the cluster: to come back, start with an empty directory under a new id and --join"
    )]
    Departed { path: String, id: u64 },
    /// Its member has acknowledged what it does not hold.
    #[error(
        "data directory {path} is an older copy of itself, or its disk lost writes: member {id} found it to lack what it acknowledged. Remove the member (metcd member remove {id}), and add it anew with an empty directory"
    )]
    Outdated { path: String, id: u64 },
    /// Written by a newer program.
    #[error("{path} has format {format}, this program knows formats up to {FORMAT}: start the newer version of metcd that wrote it")]
    NewerFormat { path: String, format: i64 },
    /// A checksum does not fit.
    #[error(
        "{path} is damaged ({why}): {WAY_OUT}. An older copy of the directory is no way out: it would vote again on what it has voted on"
    )]
    Damaged { path: String, why: String },
    /// The log was made, and is not there.
    #[error("the log of this member is gone: {0} holds none, and with it entries that this member acknowledged. Put it back, or {WAY_OUT}")]
    LogLost(String),
    /// Belongs to something else than what is configured.
    #[error("data directory {path} belongs to {what} {theirs}, the configuration says {ours}: {way_out}")]
    Mismatch {
        path: String,
        what: &'static str,
        theirs: String,
        ours: String,
        way_out: &'static str,
    },
}

impl DataDirError {
    fn io(path: &Path, source: io::Error) -> Self {
        Self::Io {
            path: path.display().to_string(),
            source,
        }
    }

    fn damaged(path: &Path, why: &str) -> Self {
        Self::Damaged {
            path: path.display().to_string(),
            why: why.trim().replace('\n', "; "),
        }
    }
}

/// An opened directory. The lock is held until this is dropped or the process ends.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    identity: Identity,
    boot: u64,
    _lock: File,
}

impl DataDir {
    /// Makes the directory if need be, locks it, checks that it is this member's, and counts the start.
    ///
    /// # Errors
    /// See [`DataDirError`]; nothing in the directory was changed then, except that a full disk's reserve may be released.
    pub fn open(config: &Config) -> Result<Self, DataDirError> {
        let path = &config.node.data_dir;
        let io_error = |source| DataDirError::io(path, source);
        refuse_foreign(path, config)?;
        disk::create_dir_durably(path).map_err(io_error)?;
        let lock = lock(path)?;
        let found = Identity::read(path)?;
        if let Some(identity) = &found {
            check(path, identity, config)?;
            refuse_marked(path, identity)?;
        }
        make_room(path).map_err(io_error)?;
        let identity = match found {
            Some(identity) if identity.cluster_id.is_some() => identity,
            unfinished => begin(path, config, unfinished)?,
        };
        let boot = start(path, &identity)?;
        // Without a reserve a member still works; it is only worse off on a full disk.
        if !disk::keep_reserve(path).unwrap_or(false) {
            tracing::warn!(data_dir = %path.display(), "no space is held in reserve: the disk is nearly full, or cannot be allocated on");
        }
        Ok(Self {
            path: path.clone(),
            identity,
            boot,
            _lock: lock,
        })
    }

    /// Opens an existing directory for a tool while no member runs on it. Nothing is checked against a configuration, no start is counted.
    ///
    /// # Errors
    /// As [`open`](Self::open); [`DataDirError::NoMembers`] if it is none, empty or absent.
    pub fn open_offline(path: &Path) -> Result<Self, DataDirError> {
        let foreign = || DataDirError::NoMembers(path.display().to_string());
        if !path.join(identity::IDENTITY_NAME).exists() {
            return Err(foreign());
        }
        let lock = lock(path)?;
        let identity = Identity::read(path)?.ok_or_else(foreign)?;
        let starts = identity::read_boot(path)?.unwrap_or(0);
        Ok(Self {
            path: path.to_owned(),
            identity,
            boot: boot::boot_id(starts, 0).unwrap_or(u64::MAX),
            _lock: lock,
        })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the log's engine keeps its files.
    pub fn wal_dir(&self) -> PathBuf {
        self.path.join(WAL_NAME)
    }

    /// Where the store's engine keeps its files.
    pub fn store_dir(&self) -> PathBuf {
        self.path.join("store")
    }

    /// Where snapshots are.
    pub fn snapshot_dir(&self) -> PathBuf {
        self.path.join("snapshots")
    }

    /// Whose data this is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The member's id: the directory's, or while it is new the configured one; `None` while a joiner waits for its id.
    pub fn node_id(&self) -> Option<u64> {
        self.identity.node_id
    }

    /// The id of this start; greater at every start.
    pub fn boot(&self) -> u64 {
        self.boot
    }

    /// Whether the member has not yet founded or joined a cluster from this directory.
    pub fn is_new(&self) -> bool {
        self.identity.cluster_id.is_none()
    }

    /// Notes durably which cluster and member this directory is from now on. A founder calls this after its peers have been asked
    /// and its first snapshot is durable; a joiner as soon as it is registered. The same again is no change.
    ///
    /// # Errors
    /// [`DataDirError::Mismatch`] if it is another cluster's or member's already.
    pub fn set_cluster(&mut self, cluster_id: u64, node_id: u64) -> Result<(), DataDirError> {
        if let Some(theirs) = self.identity.cluster_id {
            let way_out = "a directory never changes its cluster or member: use an empty one";
            agree(
                &self.path,
                "cluster id",
                format!("{theirs:016x}"),
                format!("{cluster_id:016x}"),
                way_out,
            )?;
            let theirs = self.identity.node_id.unwrap_or_default();
            return agree(&self.path, "node id", theirs.to_string(), node_id.to_string(), way_out);
        }
        let identity = Identity {
            cluster_id: Some(cluster_id),
            node_id: Some(node_id),
            ..self.identity.clone()
        };
        identity.write(&self.path)?;
        self.identity = identity;
        Ok(())
    }

    /// Refuses a directory whose log was made once and is not there any more: a fresh one in its place would forget entries that this
    /// member acknowledged, and with another member that missed them it would be a majority without them.
    pub fn check_log(&self) -> Result<(), DataDirError> {
        let is_gone = self.identity.has_log && !self.wal_dir().join("FORMAT").exists();
        if is_gone {
            Err(DataDirError::LogLost(self.wal_dir().display().to_string()))
        } else {
            Ok(())
        }
    }

    /// Notes durably that the log is made.
    pub fn note_log(&mut self) -> Result<(), DataDirError> {
        if self.identity.has_log {
            return Ok(());
        }
        let identity = Identity {
            has_log: true,
            ..self.identity.clone()
        };
        identity.write(&self.path)?;
        self.identity = identity;
        Ok(())
    }

    /// Notes durably that the member was removed and that nobody needs it: from now on [`open`](Self::open) refuses the directory.
    pub fn note_departure(&self) -> io::Result<()> {
        disk::write_atomically(&self.path.join(DEPARTED_NAME), b"This member was removed from its cluster.\n")
    }

    /// Notes durably that the directory lacks what its member has acknowledged: from now on [`open`](Self::open) refuses it. A start more
    /// would look like a later one than the cluster knows of.
    pub fn note_outdated(&self) -> io::Result<()> {
        disk::write_atomically(
            &self.path.join(OUTDATED_NAME),
            b"This directory lacks what its member has acknowledged.\n",
        )
    }
}

fn refuse_marked(path: &Path, identity: &Identity) -> Result<(), DataDirError> {
    let has = |name: &str| path.join(name).try_exists().map_err(|source| DataDirError::io(path, source));
    let (path_name, id) = (path.display().to_string(), identity.node_id.unwrap_or_default());
    if has(DEPARTED_NAME)? {
        return Err(DataDirError::Departed { path: path_name, id });
    }
    if has(OUTDATED_NAME)? {
        return Err(DataDirError::Outdated { path: path_name, id });
    }
    Ok(())
}

/// Whether this directory is that of a member of some cluster: then `cluster.members` has done its work. What is wrong with it, if it cannot
/// be read, is for [`DataDir::open`] to say.
pub fn has_a_cluster(path: &Path) -> bool {
    matches!(Identity::read(path), Ok(Some(identity)) if identity.cluster_id.is_some())
}

/// The id of the cluster these members found: the same on all of them, different for another name, member or address.
pub fn founding_cluster_id(name: &str, members: &[FoundingMember]) -> u64 {
    let mut members: Vec<&FoundingMember> = members.iter().collect();
    members.sort_by_key(|member| member.id);
    let mut hash = Xxh3Default::new();
    let mut add = |bytes: &[u8]| {
        hash.update(&bytes.len().to_le_bytes());
        hash.update(bytes);
    };
    add(name.as_bytes());
    for member in members {
        add(&member.id.to_le_bytes());
        add(member.peer_url.as_bytes());
    }
    // 0 is what an absent id looks like on the wire.
    hash.digest().max(1)
}

/// Looks before anything is written: a mistyped path must not get a LOCK file among somebody's photographs.
fn refuse_foreign(path: &Path, config: &Config) -> Result<(), DataDirError> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(DataDirError::io(path, error)),
    };
    let identity = path.join(identity::IDENTITY_NAME);
    if identity.exists() {
        return Ok(());
    }
    // Never to be emptied because it looks like somebody else's: this was a member.
    if path.join(identity::BOOT_NAME).exists() && path.join(WAL_NAME).exists() {
        return Err(DataDirError::damaged(&identity, "it is missing"));
    }
    let names = entries
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<io::Result<Vec<_>>>();
    let names = names.map_err(|source| DataDirError::io(path, source))?;
    let mut foreign: Vec<String> = names
        .iter()
        .filter(|name| !is_ours(&path.join(name), config))
        .map(|name| name.to_string_lossy().into_owned())
        .collect();
    foreign.sort();
    if foreign.is_empty() {
        return Ok(());
    }
    let more = if foreign.len() > 3 {
        format!(" and {} more", foreign.len() - 3)
    } else {
        String::new()
    };
    let found = format!(
        "{}{more}",
        foreign.iter().take(3).map(String::as_str).collect::<Vec<_>>().join(", ")
    );
    Err(DataDirError::Foreign {
        path: path.display().to_string(),
        found,
    })
}

/// What may be in a directory that has no identity yet: what a crash in the first moments leaves, a mount point's own, and our logs.
fn is_ours(entry: &Path, config: &Config) -> bool {
    let name = entry.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let temporary = disk::temporary_name(Path::new(identity::IDENTITY_NAME));
    let is_known = [LOCK_NAME, "lost+found"].contains(&name) || Path::new(name) == temporary;
    let (entry, logs) = (
        std::path::absolute(entry).ok(),
        config.log.directory.as_ref().and_then(|dir| std::path::absolute(dir).ok()),
    );
    let is_log = entry
        .zip(logs)
        .is_some_and(|(entry, logs)| logs.starts_with(&entry) || entry.parent() == Some(&logs));
    is_known || is_log
}

/// Takes the lock and leaves our pid for whoever is refused.
fn lock(path: &Path) -> Result<File, DataDirError> {
    let name = path.join(LOCK_NAME);
    let io_error = |source| DataDirError::io(&name, source);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&name)
        .map_err(io_error)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            return Err(DataDirError::InUse {
                path: path.display().to_string(),
                holder: holder(&mut file),
            });
        }
        Err(TryLockError::Error(source)) => return Err(io_error(source)),
    }
    // The pid is a courtesy: on a full disk the lock holds without it.
    let noted = file
        .set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| writeln!(file, "{}", std::process::id()));
    if let Err(error) = noted {
        tracing::warn!(file = %name.display(), %error, "cannot note the pid");
    }
    Ok(file)
}

fn holder(file: &mut File) -> String {
    let mut text = String::new();
    match file
        .take(32)
        .read_to_string(&mut text)
        .ok()
        .and_then(|_| text.trim().parse::<u32>().ok())
    {
        Some(pid) => format!("process {pid}"),
        None => "another process".to_owned(),
    }
}

/// Refuses a directory that is another's. While it is new, nothing but the format binds it.
fn check(path: &Path, identity: &Identity, config: &Config) -> Result<(), DataDirError> {
    if identity.cluster_id.is_none() {
        return Ok(());
    }
    let other_directory = "choose the --data-dir of this member, or an empty one for a new member";
    if !identity.cluster_name.is_empty() {
        agree(
            path,
            "a cluster named",
            format!("{:?}", identity.cluster_name),
            format!("{:?}", config.cluster.name),
            other_directory,
        )?;
    }
    if let (Some(theirs), Some(ours), true) = (identity.node_id, config.node.id, config.node.id_is_given) {
        agree(path, "node id", theirs.to_string(), ours.to_string(), other_directory)?;
    }
    let engine_stays =
        "start with the engine it was written by; to change it, add a new member with an empty directory and remove this one";
    agree(
        path,
        "the WAL engine",
        identity.wal_engine.clone(),
        config.wal.engine.name().to_owned(),
        engine_stays,
    )?;
    agree(
        path,
        "the store backend",
        identity.store_backend.clone(),
        config.store.backend.name().to_owned(),
        engine_stays,
    )
}

fn agree(path: &Path, what: &'static str, theirs: String, ours: String, way_out: &'static str) -> Result<(), DataDirError> {
    if theirs == ours {
        return Ok(());
    }
    Err(DataDirError::Mismatch {
        path: path.display().to_string(),
        what,
        theirs,
        ours,
        way_out,
    })
}

/// On a full disk gives the reserve back before the first write of this start needs it.
fn make_room(path: &Path) -> io::Result<()> {
    if disk::free_bytes(path)? < RESERVE_BYTES && disk::release_reserve(path)? {
        tracing::warn!(data_dir = %path.display(), "the disk is full: the reserve was released so that the member can open, compact and stop");
    }
    Ok(())
}

/// The identity of a directory that has not founded or joined yet: what is configured now, under the incarnation it was given first.
fn begin(path: &Path, config: &Config, unfinished: Option<Identity>) -> Result<Identity, DataDirError> {
    let identity = Identity {
        format: FORMAT,
        cluster_name: match config.cluster.join.is_empty() {
            true => config.cluster.name.clone(),
            false => String::new(),
        },
        cluster_id: None,
        node_id: config.node.id,
        incarnation: unfinished.as_ref().map_or_else(draw_incarnation, |identity| identity.incarnation),
        wal_engine: config.wal.engine.name().to_owned(),
        store_backend: config.store.backend.name().to_owned(),
        has_log: false,
    };
    if unfinished.as_ref() != Some(&identity) {
        identity.write(path)?;
    }
    Ok(identity)
}

/// Random, not 0: that is what an absent one looks like on the wire.
fn draw_incarnation() -> u64 {
    rand::random::<u64>().max(1)
}

/// Counts a start durably, and names it. A count that is gone cannot be guessed: a smaller one would be refused by the others.
fn start(path: &Path, identity: &Identity) -> Result<u64, DataDirError> {
    let last = match (identity::read_boot(path)?, identity.cluster_id) {
        (Some(last), _) => last,
        (None, None) => 0,
        (None, Some(_)) => return Err(DataDirError::damaged(&path.join(identity::BOOT_NAME), "it is missing")),
    };
    let count = last.saturating_add(1);
    let boot =
        boot::boot_id(count, rand::random()).ok_or_else(|| DataDirError::damaged(&path.join(identity::BOOT_NAME), "no number follows"))?;
    identity::write_boot(path, count)?;
    Ok(boot)
}

#[cfg(test)]
mod tests;
