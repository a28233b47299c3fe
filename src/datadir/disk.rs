//! Files that are really there after a power cut, and the space that is left for them.
//!
//! A name is durable only after an fsync of the directory that holds it (rule 4), so everything that creates or renames goes through here.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::FallocateFlags;

/// Size of the reserve file: enough to open the engines, compact and stop in order on a disk that is otherwise full.
pub const RESERVE_BYTES: u64 = 16 << 20;

/// What a snapshot leaves free for the log.
const HEADROOM_BYTES: u64 = 8 << 20;

/// Bytes written between two looks at what is free; far less than [`HEADROOM_BYTES`].
const HEADROOM_INTERVAL: u64 = 1 << 20;

/// Name of the reserve file in the data directory.
const RESERVE_NAME: &str = "reserve";

/// Makes a directory and those above it, for this user only, and each one's name durable.
pub fn create_dir_durably(path: &Path) -> io::Result<()> {
    let path = std::path::absolute(path)?;
    let missing: Vec<&Path> = path.ancestors().take_while(|ancestor| !ancestor.is_dir()).collect();
    for directory in missing.into_iter().rev() {
        match DirBuilder::new().mode(0o700).create(directory) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && directory.is_dir() => {}
            Err(error) => return Err(error),
            Ok(()) => {}
        }
        sync_dir(directory)?;
        sync_parent(directory)?;
    }
    Ok(())
}

/// fsyncs a directory: the names in it are durable.
pub fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// fsyncs the directory that holds `path`.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) if parent != Path::new("") => sync_dir(parent),
        _ => sync_dir(Path::new(".")),
    }
}

/// Replaces a file so that at any moment, and after any crash, it has either the old content or the new.
pub fn write_atomically(path: &Path, content: &[u8]) -> io::Result<()> {
    let temporary = temporary_name(path);
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    sync_parent(path)
}

/// What [`write_atomically`] calls its file before the rename; a crash may leave it.
pub fn temporary_name(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    PathBuf::from(name)
}

/// Bytes on the disk that holds `path` which this user may still fill.
pub fn free_bytes(path: &Path) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(path)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Watches what is left of a disk while something large is written to it. What ends the last block ends the log as well, and with it the
/// member: a snapshot can be written later.
pub struct Headroom {
    path: PathBuf,
    unchecked: u64,
}

impl Headroom {
    /// For a file in this directory, or that file.
    pub fn new(path: &Path) -> Self {
        Headroom {
            path: path.to_owned(),
            // A file of less than an interval is written in any case: it may be what gives room back.
            unchecked: 0,
        }
    }

    /// So many bytes are about to be written.
    ///
    /// # Errors
    /// `StorageFull` if less than [`HEADROOM_BYTES`] are left now.
    pub fn check(&mut self, bytes: usize) -> io::Result<()> {
        self.check_by(bytes, free_bytes)
    }

    fn check_by(&mut self, bytes: usize, free_bytes: impl FnOnce(&Path) -> io::Result<u64>) -> io::Result<()> {
        self.unchecked += bytes as u64;
        if self.unchecked < HEADROOM_INTERVAL {
            return Ok(());
        }
        self.unchecked = 0;
        let free = free_bytes(&self.path)?;
        if free >= HEADROOM_BYTES {
            return Ok(());
        }
        let what = format!("{free} bytes are free, and {HEADROOM_BYTES} are left to the log");
        Err(io::Error::new(io::ErrorKind::StorageFull, what))
    }
}

/// Holds [`RESERVE_BYTES`] back for bad times, if the disk can spare them twice; whether the reserve is there now.
pub fn keep_reserve(data_dir: &Path) -> io::Result<bool> {
    if has_reserve(data_dir) {
        return Ok(true);
    }
    let path = data_dir.join(RESERVE_NAME);
    if free_bytes(data_dir)? < 2 * RESERVE_BYTES {
        return Ok(false);
    }
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path)?;
    allocate(&file)?;
    file.sync_all()?;
    sync_dir(data_dir)?;
    Ok(true)
}

/// Whether the reserve is there.
pub fn has_reserve(data_dir: &Path) -> bool {
    fs::metadata(data_dir.join(RESERVE_NAME)).is_ok_and(|meta| meta.len() >= RESERVE_BYTES)
}

/// Gives the reserve back to the disk; whether there was one.
pub fn release_reserve(data_dir: &Path) -> io::Result<bool> {
    match fs::remove_file(data_dir.join(RESERVE_NAME)) {
        Ok(()) => sync_dir(data_dir).map(|()| true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Blocks, not a hole: file systems that cannot allocate are written to.
fn allocate(mut file: &File) -> io::Result<()> {
    match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, RESERVE_BYTES) {
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {
            let block = vec![0; 1 << 20];
            (0..RESERVE_BYTES >> 20).try_for_each(|_| file.write_all(&block))
        }
        result => result.map_err(io::Error::from),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_are_made_with_those_above_and_for_this_user_only() {
        use std::os::unix::fs::PermissionsExt;
        let root = tempfile::tempdir().expect("tempdir");
        let path = root.path().join("a/b/c");
        create_dir_durably(&path).expect("create");
        create_dir_durably(&path).expect("again");
        let mode = fs::metadata(&path).expect("metadata").permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
    }

    #[test]
    fn a_file_is_replaced_whole_and_nothing_is_left_over() {
        let root = tempfile::tempdir().expect("tempdir");
        let path = root.path().join("f");
        write_atomically(&path, b"a long first content").expect("write");
        write_atomically(&path, b"second").expect("write");
        assert_eq!(fs::read(&path).expect("read"), b"second");
        assert_eq!(fs::read_dir(root.path()).expect("read_dir").count(), 1);
    }

    #[test]
    fn what_is_large_ends_before_it_takes_the_room_of_the_log() {
        let interval = HEADROOM_INTERVAL as usize;
        let mut headroom = Headroom::new(Path::new("/nowhere"));
        let mut check = |bytes, free| headroom.check_by(bytes, |_| free).map_err(|error| error.kind());
        assert_eq!(check(interval - 1, Ok(0)), Ok(()), "a small file is written on any disk");
        assert_eq!(check(1, Ok(HEADROOM_BYTES)), Ok(()));
        assert_eq!(check(interval - 1, Ok(0)), Ok(()), "not looked at again so soon");
        assert_eq!(check(1, Ok(HEADROOM_BYTES - 1)), Err(io::ErrorKind::StorageFull));
        assert_eq!(check(interval, Ok(HEADROOM_BYTES)), Ok(()), "there is room again");
        let unknown = io::Error::from(io::ErrorKind::PermissionDenied);
        assert_eq!(check(3 * interval, Err(unknown)), Err(io::ErrorKind::PermissionDenied));
    }

    #[test]
    fn headroom_is_that_of_the_disk_that_holds_the_file() {
        let root = tempfile::tempdir().expect("tempdir");
        let missing = root.path().join("missing");
        let is_roomy = free_bytes(root.path()).expect("free") >= 2 * HEADROOM_BYTES;
        assert!(!is_roomy || Headroom::new(root.path()).check(HEADROOM_INTERVAL as usize).is_ok());
        assert!(Headroom::new(&missing).check(HEADROOM_INTERVAL as usize).is_err());
    }

    #[test]
    fn the_reserve_takes_real_blocks_and_gives_them_back() {
        use std::os::unix::fs::MetadataExt;
        let root = tempfile::tempdir().expect("tempdir");
        assert!(keep_reserve(root.path()).expect("keep"));
        let blocks = fs::metadata(root.path().join(RESERVE_NAME)).expect("metadata").blocks();
        assert!(blocks * 512 >= RESERVE_BYTES, "{blocks} blocks");
        assert!(keep_reserve(root.path()).expect("keep again"));
        assert!(release_reserve(root.path()).expect("release"));
        assert!(!release_reserve(root.path()).expect("release again"));
    }
}
