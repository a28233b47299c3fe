//! Exactly once, for deletes. A deletion has no value that would tell whose it is, so they are counted: each was answered to somebody, or
//! belongs to a request of which nobody knows what became of it.

use std::collections::{BTreeMap, BTreeSet};

use crate::common::history::History;

/// Keys that clients delete; those of leases go with their lease.
const PREFIX: &str = "k";

#[derive(Default)]
pub struct Deletes {
    answered: BTreeSet<(u64, String)>,
    /// Of all keys at once.
    all_answered: BTreeSet<u64>,
    unknown: BTreeMap<String, u64>,
}

impl Deletes {
    /// The delete of this key was answered with success.
    pub fn note(&mut self, key: &str, revision: u64) -> Result<(), String> {
        match self.answered.insert((revision, key.to_owned())) && !self.all_answered.contains(&revision) {
            true => Ok(()),
            false => Err(format!("two deletes of {key} are answered with revision {revision}")),
        }
    }

    /// A delete of all keys was answered: so many were there.
    pub fn note_all(&mut self, deleted: u64, revision: u64) -> Result<(), String> {
        if deleted == 0 {
            return Ok(());
        }
        let of_this = (revision, String::new())..(revision + 1, String::new());
        let is_anothers = self.answered.range(of_this).next().is_some();
        match self.all_answered.insert(revision) && !is_anothers {
            true => Ok(()),
            false => Err(format!("two deletes are answered with revision {revision}, one of all keys")),
        }
    }

    /// Nobody knows whether this key was deleted for a request, once.
    pub fn note_unknown(&mut self, key: &str) {
        *self.unknown.entry(key.to_owned()).or_default() += 1;
    }

    /// No delete happened that nobody asked for.
    pub fn check_end(&self, history: &History) -> Result<(), String> {
        let mut unknown = self.unknown.clone();
        for (revision, changes) in history.between(PREFIX, 0, u64::MAX) {
            for (key, value) in changes {
                if value.is_some() || self.all_answered.contains(&revision) || self.answered.contains(&(revision, key.clone())) {
                    continue;
                }
                match unknown.get_mut(&key) {
                    Some(left) if *left > 0 => *left -= 1,
                    Some(_) | None => {
                        return Err(format!(
                            "{key} was deleted in revision {revision}, for no request that was not answered otherwise"
                        ));
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A history in which a key is put and deleted twice.
    fn deleted_twice() -> History {
        let mut history = History::default();
        for (revision, value) in [(2, Some("v1")), (3, None), (4, Some("v2")), (5, None)] {
            history.take(revision, vec![("k".to_owned(), value.map(str::to_owned))]).unwrap();
        }
        history
    }

    #[test]
    fn a_delete_that_happens_twice_for_one_request_is_noticed() {
        let history = deleted_twice();
        let mut deletes = Deletes::default();
        deletes.note("k", 3).unwrap();
        assert!(deletes.check_end(&history).is_err());
        // Somebody else's may have been the other one, once.
        deletes.note_unknown("k");
        assert_eq!(deletes.check_end(&history), Ok(()));
        let mut deletes = Deletes::default();
        deletes.note_unknown("k");
        assert!(deletes.check_end(&history).is_err());
        deletes.note_all(1, 5).unwrap();
        assert_eq!(deletes.check_end(&history), Ok(()));
    }

    #[test]
    fn one_deletion_answers_one_request() {
        let mut deletes = Deletes::default();
        deletes.note("k", 3).unwrap();
        assert!(deletes.note("k", 3).is_err());
        assert!(deletes.note_all(1, 3).is_err());
        assert_eq!(deletes.note_all(0, 3), Ok(()), "it found nothing to delete");
        deletes.note_all(1, 5).unwrap();
        assert!(deletes.note("k", 5).is_err());
    }
}
