//! `metcd wal dump DIR` and `metcd wal verify DIR`: what is in a log directory, and whether it is whole.
//!
//! Both look at a copy and change nothing. The log must not be open in a server.

use std::{
    io::{self, Write},
    path::Path,
};

use raft::eraftpb::{Entry, EntryType};

use crate::wal::{
    Wal, WalError,
    inspect::{Facts, inspect},
};

/// The log is whole.
pub const EXIT_WHOLE: u8 = 0;
/// The log is damaged or has lost entries.
pub const EXIT_DAMAGED: u8 = 1;
/// Entries read at once.
const READ_BYTES: u64 = 1024 * 1024;

/// Writes marker, fence, hard state and one line for each entry to `out`; returns the exit code.
///
/// # Errors
/// See [`LookError`]; damage is none.
pub fn dump(dir: &Path, out: &mut dyn Write) -> Result<u8, LookError> {
    look(dir, out, true)
}

/// Like [`dump`] without the entries: every one is read and verified all the same.
///
/// # Errors
/// See [`LookError`]; damage is none.
pub fn verify(dir: &Path, out: &mut dyn Write) -> Result<u8, LookError> {
    look(dir, out, false)
}

/// Why nothing can be said about a log.
#[derive(Debug, thiserror::Error)]
pub enum LookError {
    /// The directory holds none, or a server has it open.
    #[error(transparent)]
    Log(#[from] WalError),
    /// Where it should be said cannot be written to.
    #[error(transparent)]
    Out(#[from] io::Error),
}

fn look(dir: &Path, out: &mut dyn Write, with_entries: bool) -> Result<u8, LookError> {
    let inspected = inspect(dir)?;
    write_facts(inspected.facts(), out)?;
    match inspected.wal() {
        Ok(wal) => Ok(write_log(wal, out, with_entries)?),
        Err(error) => {
            writeln!(out, "damage      {error}")?;
            Ok(EXIT_DAMAGED)
        }
    }
}

fn write_facts(facts: &Facts, out: &mut dyn Write) -> io::Result<()> {
    writeln!(out, "engine      {}", facts.engine)?;
    match &facts.fence {
        Ok(fence) => {
            writeln!(
                out,
                "fence       unit {}, term {}, vote {}, last index {}",
                fence.seq, fence.term, fence.vote, fence.last_index
            )?;
            match fence.is_damaged {
                true => writeln!(
                    out,
                    "            one of its two copies is damaged, by a crash in its last write or by the disk; it is written anew at the next start"
                ),
                false => Ok(()),
            }
        }
        Err(error) => writeln!(out, "fence       {error}"),
    }
}

fn write_log(wal: &dyn Wal, out: &mut dyn Write, with_entries: bool) -> io::Result<u8> {
    let recovered = wal.recovered();
    let hard_state = &recovered.hard_state;
    writeln!(
        out,
        "hard state  term {}, vote {}, commit {}",
        hard_state.term, hard_state.vote, hard_state.commit
    )?;
    writeln!(
        out,
        "begins      after index {}, term {}",
        recovered.start.index, recovered.start.term
    )?;
    writeln!(out, "last index  {}", recovered.last_index)?;
    let mut next = recovered.start.index + 1;
    while next <= recovered.last_index {
        let entries = match wal.entries(next, recovered.last_index + 1, READ_BYTES) {
            Ok(entries) => entries,
            Err(error) => {
                writeln!(out, "damage      {error}")?;
                return Ok(EXIT_DAMAGED);
            }
        };
        next += entries.len() as u64;
        for entry in entries.iter().filter(|_| with_entries) {
            writeln!(
                out,
                "{:>12}  term {:>6}  {:<9}  {:>9} bytes",
                entry.index,
                entry.term,
                type_name(entry),
                entry.data.len()
            )?;
        }
    }
    writeln!(out, "whole")?;
    Ok(EXIT_WHOLE)
}

fn type_name(entry: &Entry) -> &'static str {
    match entry.get_entry_type() {
        EntryType::EntryNormal if entry.data.is_empty() => "empty",
        EntryType::EntryNormal => "normal",
        EntryType::EntryConfChange => "conf",
        EntryType::EntryConfChangeV2 => "conf-v2",
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, path::PathBuf};

    use raft::eraftpb::HardState;

    use super::*;
    use crate::{
        config::WalEngine,
        wal::{self, WalBatch},
    };

    /// The engines of this build, each with what is its own in a log's directory.
    const ENGINES: &[(WalEngine, &[&str])] = &[
        (WalEngine::Sled, &["sled", "journal-0", "journal-1"]),
        (WalEngine::RaftEngine, &["raft-engine"]),
        #[cfg(feature = "rocksdb")]
        (WalEngine::RocksDb, &["rocksdb"]),
    ];

    fn written(engine: WalEngine, dir: &Path) {
        let mut log = wal::open(engine, dir, false).unwrap();
        let entries = (1..=3)
            .map(|index| Entry {
                index,
                term: 2,
                data: vec![7; 10].into(),
                ..Entry::default()
            })
            .collect();
        log.append(&WalBatch { entries, hard_state: None }).unwrap();
    }

    /// Every file below `dir`, with its content.
    fn content(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut found = BTreeMap::new();
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => found.extend(content(&path)),
                false => drop(found.insert(path.clone(), std::fs::read(&path).unwrap())),
            }
        }
        found
    }

    /// The exit code and what was written.
    fn looked(look: fn(&Path, &mut dyn Write) -> Result<u8, LookError>, dir: &Path) -> (u8, String) {
        let mut out = Vec::new();
        let code = look(dir, &mut out).unwrap();
        (code, String::from_utf8(out).unwrap())
    }

    #[test]
    fn dump_lists_every_entry_and_leaves_the_log_as_it_is() {
        for (engine, _) in ENGINES {
            let place = tempfile::tempdir().unwrap();
            let dir = place.path().join("log");
            written(*engine, &dir);
            let before = content(&dir);
            for _ in 0..2 {
                let (code, text) = looked(dump, &dir);
                assert_eq!(code, EXIT_WHOLE);
                assert_eq!(text.matches("normal").count(), 3, "{text}");
                assert!(text.contains("last index  3"), "{text}");
                assert!(text.contains(&format!("engine      {}\n", engine.name())), "{text}");
            }
            assert!(content(&dir) == before, "{} was changed", engine.name());
        }
    }

    #[test]
    fn the_hard_state_is_shown_with_and_without_the_entries() {
        for (engine, _) in ENGINES {
            let place = tempfile::tempdir().unwrap();
            let dir = place.path().join("log");
            written(*engine, &dir);
            let mut log = wal::open(*engine, &dir, false).unwrap();
            let hard_state = HardState {
                term: 5,
                vote: 3,
                commit: 2,
                ..HardState::default()
            };
            log.append(&WalBatch {
                entries: Vec::new(),
                hard_state: Some(hard_state),
            })
            .unwrap();
            drop(log);
            for look in [dump, verify] {
                let (code, text) = looked(look, &dir);
                assert_eq!(code, EXIT_WHOLE);
                assert!(text.contains("hard state  term 5, vote 3, commit 2\n"), "{text}");
            }
        }
    }

    #[test]
    fn verify_names_what_was_lost() {
        for (engine, own_files) in ENGINES {
            let place = tempfile::tempdir().unwrap();
            let dir = place.path().join("log");
            written(*engine, &dir);
            let fence = std::fs::read(dir.join("fence")).unwrap();
            let (code, text) = looked(verify, &dir);
            assert_eq!(code, EXIT_WHOLE);
            assert!(!text.contains("damaged"), "{text}");
            std::fs::write(dir.join("fence"), &fence[..fence.len() / 2]).unwrap();
            let (code, text) = looked(verify, &dir);
            assert_eq!(code, EXIT_WHOLE);
            assert!(text.contains("one of its two copies is damaged"), "{text}");
            std::fs::write(dir.join("fence"), &fence).unwrap();
            for name in *own_files {
                let path = dir.join(name);
                match path.is_dir() {
                    true => std::fs::remove_dir_all(&path).unwrap(),
                    false => std::fs::write(&path, vec![0; 4096]).unwrap(),
                }
            }
            let (code, text) = looked(verify, &dir);
            assert_eq!(code, EXIT_DAMAGED, "{text}");
            assert!(text.contains("entry 3") && text.contains("new id"), "{text}");
        }
    }

    #[test]
    fn a_lost_sled_is_restored_by_its_journal() {
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().join("log");
        written(WalEngine::Sled, &dir);
        std::fs::remove_dir_all(dir.join("sled")).unwrap();
        let (code, text) = looked(verify, &dir);
        assert_eq!(code, EXIT_WHOLE, "{text}");
    }

    #[test]
    fn what_is_no_log_is_said_to_be_none() {
        let place = tempfile::tempdir().unwrap();
        let mut out = Vec::new();
        let error = verify(place.path(), &mut out).unwrap_err();
        assert!(
            matches!(error, LookError::Log(_)) && error.to_string().contains("FORMAT"),
            "{error}"
        );
    }
}
