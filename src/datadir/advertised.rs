//! What a member last told its cluster of itself out of its configuration: its name and the URL for clients. A flag that has changed since is
//! told; one that has not does not undo what was said by `PATCH /members/{id}` meanwhile. The note is made once the cluster knows: whoever is killed within
//! that second, and is started with the flags of before again, is known by those in between.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::disk::write_atomically;

const ADVERTISED_NAME: &str = "advertised.toml";

/// What a configuration says of its member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    /// Name.
    pub name: String,
    /// Where clients reach it.
    pub client_url: String,
}

/// The note of it in the data directory.
#[derive(Debug)]
pub struct Advertised {
    path: PathBuf,
    told: Option<Told>,
}

impl Advertised {
    /// Reads the note. Without one, or with one that cannot be read, nothing counts as changed.
    pub fn read(data_dir: &Path) -> Advertised {
        let path = data_dir.join(ADVERTISED_NAME);
        let told = match std::fs::read_to_string(&path) {
            Ok(text) => toml::from_str(&text).map_err(|error| error.message().to_owned()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.to_string()),
        };
        let told = told.unwrap_or_else(|error| {
            let file = path.display();
            tracing::warn!(%file, error, "cannot read what this member last told of itself: a changed name or client URL is not noticed");
            None
        });
        Advertised { path, told }
    }

    /// What the cluster is to be told of a field whose record there is `record` and whose value in the configuration is `now`.
    pub fn news(&self, field: fn(&Told) -> &str, record: &str, now: &str) -> Option<String> {
        let has_changed = self.told.as_ref().is_some_and(|told| field(told) != now);
        ((record.is_empty() || has_changed) && record != now).then(|| now.to_owned())
    }

    /// The cluster knows this. Gives what is to be written down, if it is not yet.
    pub fn note(&mut self, told: Told) -> Option<impl FnOnce() -> io::Result<()> + Send + 'static> {
        if self.told.as_ref() == Some(&told) {
            return None;
        }
        let path = self.path.clone();
        self.told = Some(told.clone());
        Some(move || {
            let body = toml::to_string(&told).map_err(io::Error::other)?;
            write_atomically(
                &path,
                format!("# What this member last told its cluster of itself. Written by metcd.\n{body}").as_bytes(),
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(name: &str) -> Told {
        Told {
            name: name.to_owned(),
            client_url: "http://a:1".to_owned(),
        }
    }

    #[test]
    fn a_changed_flag_is_told_and_an_unchanged_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let name = |advertised: &Advertised, record: &str, now: &str| advertised.news(|told| &told.name, record, now);
        let mut advertised = Advertised::read(dir.path());
        assert_eq!(name(&advertised, "", "one"), Some("one".to_owned()), "nobody has said anything");
        assert_eq!(name(&advertised, "by hand", "one"), None, "somebody has");
        advertised.note(told("one")).expect("it is new")().unwrap();
        assert!(advertised.note(told("one")).is_none(), "it is known");

        // The next start.
        let advertised = Advertised::read(dir.path());
        assert_eq!(name(&advertised, "one", "one"), None);
        assert_eq!(name(&advertised, "renamed since", "one"), None);
        assert_eq!(name(&advertised, "renamed since", "two"), Some("two".to_owned()));
        assert_eq!(name(&advertised, "two", "two"), None, "it is told");
    }

    #[test]
    fn a_note_that_cannot_be_read_is_none() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(ADVERTISED_NAME), b"name = 7\xff").unwrap();
        let advertised = Advertised::read(dir.path());
        assert_eq!(advertised.news(|told| &told.name, "a", "b"), None);
    }
}
