//! The directory of snapshot files. A file has its name `<index>.snap` only when it is complete, verified and durable: the name is the
//! commit point.

use std::path::{Path, PathBuf};
use std::{fs, io};

use crate::datadir::disk::sync_dir;

const SUFFIX: &str = "snap";

/// Where the snapshot of an applied index is, or will be.
pub fn path_of(dir: &Path, index: u64) -> PathBuf {
    dir.join(format!("{index:020}.{SUFFIX}"))
}

fn index_of(path: &Path) -> Option<u64> {
    if path.extension()? != SUFFIX {
        return None;
    }
    path.file_stem()?.to_str()?.parse().ok()
}

/// The newest complete snapshot.
pub fn newest(dir: &Path) -> io::Result<Option<(u64, PathBuf)>> {
    Ok(list(dir)?.into_iter().filter_map(|path| Some((index_of(&path)?, path))).max())
}

/// Gives a received, verified and synced file its name.
pub fn adopt(received: &Path, dir: &Path, index: u64) -> io::Result<PathBuf> {
    let path = path_of(dir, index);
    fs::rename(received, &path)?;
    sync_dir(dir)?;
    Ok(path)
}

/// Removes the snapshots older than `index`.
pub fn remove_older(dir: &Path, index: u64) -> io::Result<()> {
    for path in list(dir)? {
        if index_of(&path).is_some_and(|older| older < index) {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

/// Removes what a crash left half written or half received.
pub fn remove_incomplete(dir: &Path) -> io::Result<()> {
    for path in list(dir)? {
        if index_of(&path).is_none() && path.is_file() {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

fn list(dir: &Path) -> io::Result<Vec<PathBuf>> {
    fs::read_dir(dir)?.map(|entry| entry.map(|entry| entry.path())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_complete_snapshots_count_and_the_newest_wins() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["incoming-1-7.tmp", "00000000000000000007.snap", "00000000000000000012.snap"] {
            fs::write(dir.path().join(name), b"x").unwrap();
        }
        remove_incomplete(dir.path()).unwrap();
        assert_eq!(list(dir.path()).unwrap().len(), 2);
        assert_eq!(newest(dir.path()).unwrap(), Some((12, path_of(dir.path(), 12))));
        remove_older(dir.path(), 12).unwrap();
        assert_eq!(list(dir.path()).unwrap(), [path_of(dir.path(), 12)]);
        let received = dir.path().join("incoming");
        fs::write(&received, b"y").unwrap();
        assert_eq!(adopt(&received, dir.path(), 20).unwrap(), path_of(dir.path(), 20));
        assert_eq!(newest(dir.path()).unwrap(), Some((20, path_of(dir.path(), 20))));
    }
}
