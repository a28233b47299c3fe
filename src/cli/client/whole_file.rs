//! A file that is there whole or not at all: it is written under a name of its own, beside the one that it gets when it is whole.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, fchown};
use std::path::{Path, PathBuf};

use rand::RngExt as _;

use crate::cli::CliError;
use crate::datadir::disk::sync_parent;

/// Links that lead to links are followed so far, as the kernel does.
const MOST_LINKS: usize = 40;
/// All that the server keeps is in it: it is for nobody else, unless the file that it replaces was.
const MODE: u32 = 0o600;
/// The part of a mode that is about the owner.
const OWNER_MODE: u32 = 0o700;

/// A file that is being written. Dropped before [`keep`](WholeFile::keep) it leaves nothing behind.
#[derive(Debug)]
pub(super) struct WholeFile {
    /// As the user called it.
    named: PathBuf,
    target: PathBuf,
    partial: PathBuf,
    file: File,
}

impl WholeFile {
    /// Begins a file that will be at `named`, or where that leads to. `otherwise` is what to do if that cannot be one.
    pub(super) fn create(named: &Path, otherwise: &str) -> Result<WholeFile, CliError> {
        let target = target_of(named, otherwise)?;
        // Two may be under way to the same place, and what is there under another name is somebody's.
        let partial = target.with_file_name(format!("metcd-{:016x}.partial", rand::rng().random::<u64>()));
        let created = OpenOptions::new().write(true).create_new(true).mode(MODE).open(&partial);
        let file = created.map_err(|error| unwritable(named, &error))?;
        Ok(WholeFile {
            named: named.to_owned(),
            target,
            partial,
            file,
        })
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Where it is until it is kept.
    pub(super) fn partial(&self) -> &Path {
        &self.partial
    }

    /// Of what went wrong while it was written.
    pub(super) fn unwritable(&self, error: &io::Error) -> CliError {
        unwritable(&self.named, error)
    }

    /// Gives it its name, once it is on the disk, and the mode of the file that had it.
    pub(super) async fn keep(self) -> Result<(), CliError> {
        let file = self.file.try_clone().map_err(|error| self.unwritable(&error))?;
        self.be_for_whom_the_replaced_was().map_err(|error| self.unwritable(&error))?;
        // This takes long for a large file, and whoever interrupts it shall not wait.
        let synced = tokio::task::spawn_blocking(move || file.sync_all()).await;
        synced
            .map_err(io::Error::from)
            .flatten()
            .and_then(|()| self.rename())
            .map_err(|error| self.unwritable(&error))
    }

    /// Its owner, its group and its mode; where the first two cannot be had, for the owner alone: the mode would let others in.
    fn be_for_whom_the_replaced_was(&self) -> io::Result<()> {
        let Ok(replaced) = fs::metadata(&self.target) else {
            return Ok(());
        };
        let own = self.file.metadata()?;
        let is_anothers = (replaced.uid(), replaced.gid()) != (own.uid(), own.gid());
        let may_have_mode = !is_anothers || fchown(&self.file, Some(replaced.uid()), Some(replaced.gid())).is_ok();
        let mode = if may_have_mode {
            replaced.mode()
        } else {
            replaced.mode() & OWNER_MODE
        };
        self.file.set_permissions(fs::Permissions::from_mode(mode))
    }

    fn rename(&self) -> io::Result<()> {
        fs::rename(&self.partial, &self.target)?;
        sync_parent(&self.target)
    }
}

impl Drop for WholeFile {
    fn drop(&mut self) {
        // What is left of it helps nobody. Once it has its name, there is none by this one.
        let _ = fs::remove_file(&self.partial);
    }
}

fn unwritable(named: &Path, error: &io::Error) -> CliError {
    CliError::Failed(format!("cannot write {}: {error}", named.display()))
}

/// The file to write, behind any symbolic links. What is no file cannot be there whole or not at all, and must not be replaced by one.
fn target_of(named: &Path, otherwise: &str) -> Result<PathBuf, CliError> {
    let found = match fs::metadata(named) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let end = end_of_links(named).map_err(|error| unwritable(named, &error))?;
            // Otherwise it would fail when everything is there, and gets its name.
            if end.as_os_str().as_bytes().ends_with(b"/") || end.file_name().is_none() {
                return Err(CliError::Failed(format!(
                    "{} is a directory that does not exist: name a file",
                    named.display()
                )));
            }
            return Ok(end);
        }
        Err(error) => return Err(unwritable(named, &error)),
    };
    if found.is_file() {
        // The links of /proc lead to files that may have lost their names.
        return named.canonicalize().map_err(|error| unwritable(named, &error));
    }
    let what = if found.is_dir() { "a directory" } else { "a device or a pipe" };
    Err(CliError::Failed(format!("{} is {what}: {otherwise}", named.display())))
}

/// Where links that lead to nothing lead to.
fn end_of_links(named: &Path) -> io::Result<PathBuf> {
    let mut path = named.to_owned();
    for _ in 0..MOST_LINKS {
        match fs::read_link(&path) {
            // What is absolute replaces all of it.
            Ok(next) => path = path.parent().unwrap_or(Path::new("")).join(next),
            Err(_) => return Ok(path),
        }
    }
    Err(io::ErrorKind::TooManyLinks.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is in a directory, with its mode.
    fn listed(dir: &Path) -> Vec<(String, u32)> {
        let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
        let mut all: Vec<_> = entries
            .map(|entry| {
                let mode = entry.metadata().unwrap().permissions().mode() & 0o777;
                (entry.file_name().into_string().unwrap(), mode)
            })
            .collect();
        all.sort();
        all
    }

    #[tokio::test]
    async fn a_file_is_for_its_owner_unless_the_one_it_replaces_was_for_others() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        WholeFile::create(&path, "").unwrap().keep().await.unwrap();
        assert_eq!(listed(dir.path()), [("f".to_owned(), 0o600)]);
        for mode in [0o640, 0o400] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let begun = WholeFile::create(&path, "").unwrap();
            assert!(
                listed(dir.path()).iter().any(|(name, mode)| name != "f" && *mode == 0o600),
                "nobody else reads it before it is whole"
            );
            begun.keep().await.unwrap();
            assert_eq!(listed(dir.path()), [("f".to_owned(), mode)]);
        }
    }

    #[tokio::test]
    async fn two_that_are_under_way_to_one_name_do_not_meet_and_one_that_is_given_up_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        // As long as a name may be.
        let path = dir.path().join("f".repeat(255));
        let begun: Vec<WholeFile> = (0..3).map(|_| WholeFile::create(&path, "").unwrap()).collect();
        assert_eq!(listed(dir.path()).len(), 3);
        let mut begun = begun.into_iter();
        for number in ["1", "2"] {
            let one = begun.next().unwrap();
            fs::write(one.partial(), number).unwrap();
            one.keep().await.unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), number);
        }
        drop(begun);
        assert_eq!(listed(dir.path()).len(), 1);
    }

    #[tokio::test]
    async fn a_link_to_nothing_is_written_through_and_one_to_itself_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("sub")).unwrap();
        let links = [("first", "sub/second"), ("sub/second", "third"), ("round", "round")];
        for (link, to) in links {
            std::os::unix::fs::symlink(to, dir.path().join(link)).unwrap();
        }
        WholeFile::create(&dir.path().join("first"), "").unwrap().keep().await.unwrap();
        assert!(dir.path().join("sub/third").is_file());
        for (link, to) in links {
            assert_eq!(fs::read_link(dir.path().join(link)).unwrap(), Path::new(to));
        }
        let refused = WholeFile::create(&dir.path().join("absent/"), "").unwrap_err().to_string();
        assert!(refused.contains("absent/ is a directory that does not exist"), "{refused}");
        let refused = WholeFile::create(&dir.path().join("round"), "").unwrap_err().to_string();
        assert!(refused.starts_with("cannot write ") && refused.contains("round"), "{refused}");
    }
}
