//! The history of the store as any member ever showed it: revision by revision, gap-free, each value once, equal everywhere. Answers,
//! reads and watches are compared with it.

use std::collections::{BTreeMap, BTreeSet};

/// A change of one key: its value, or that it went.
pub type KeyChange = (String, Option<String>);

/// A read to be compared at the end.
struct Seen {
    revision: u64,
    key: String,
    value: Option<String>,
    who: String,
}

#[derive(Default)]
pub struct History {
    revisions: BTreeMap<u64, Vec<KeyChange>>,
    values: BTreeMap<String, u64>,
    /// Values of writes that were answered: they must be in the history, at this revision.
    acknowledged: Vec<(KeyChange, u64)>,
    /// Values of writes that were refused for good.
    refused: BTreeSet<String>,
    seen: Vec<Seen>,
}

impl History {
    /// A member showed the changes of a revision.
    pub fn take(&mut self, revision: u64, changes: Vec<KeyChange>) -> Result<(), String> {
        if let Some(known) = self.revisions.get(&revision) {
            return if *known == changes {
                Ok(())
            } else {
                Err(format!("revision {revision} is {changes:?} here and {known:?} elsewhere"))
            };
        }
        for (_, value) in &changes {
            let Some(value) = value else { continue };
            if let Some(first) = self.values.insert(value.clone(), revision)
                && first != revision
            {
                return Err(format!("{value} was written twice: in revisions {first} and {revision}"));
            }
            if self.refused.contains(value) {
                return Err(format!(
                    "{value} was answered with not_applied and is written in revision {revision}"
                ));
            }
        }
        self.revisions.insert(revision, changes);
        Ok(())
    }

    /// The write of this value was answered with not_applied.
    pub fn note_refused(&mut self, value: &str) -> Result<(), String> {
        self.refused.insert(value.to_owned());
        match self.values.get(value) {
            Some(revision) => Err(format!(
                "{value} is answered with not_applied and was written in revision {revision}"
            )),
            None => Ok(()),
        }
    }

    /// A change was acknowledged at this revision.
    pub fn note_acknowledged(&mut self, key: &str, value: Option<&str>, revision: u64) {
        self.acknowledged.push(((key.to_owned(), value.map(str::to_owned)), revision));
    }

    /// A key was read at this revision.
    pub fn note_seen(&mut self, revision: u64, key: &str, value: Option<&str>, who: &str) {
        self.seen.push(Seen {
            revision,
            key: key.to_owned(),
            value: value.map(str::to_owned),
            who: who.to_owned(),
        });
    }

    /// The changes of keys with this prefix in (after, until], for a watch to be compared with.
    pub fn between(&self, prefix: &str, after: u64, until: u64) -> Vec<(u64, Vec<KeyChange>)> {
        let mut found = Vec::new();
        for (&revision, changes) in self.revisions.range(after + 1..).take_while(|(revision, _)| **revision <= until) {
            let changes: Vec<KeyChange> = changes.iter().filter(|(key, _)| key.starts_with(prefix)).cloned().collect();
            if !changes.is_empty() {
                found.push((revision, changes));
            }
        }
        found
    }

    pub fn check_end(&mut self) -> Result<(), String> {
        for (expected, &revision) in (2..).zip(self.revisions.keys()) {
            if revision != expected {
                return Err(format!("the history has a gap: revision {expected} is missing"));
            }
        }
        for (change, revision) in &self.acknowledged {
            let is_there = self.revisions.get(revision).is_some_and(|changes| changes.contains(change));
            if !is_there {
                let found = self.revisions.get(revision);
                return Err(format!(
                    "{change:?} was acknowledged at revision {revision}, where there is {found:?}"
                ));
            }
        }
        self.check_seen()
    }

    fn check_seen(&mut self) -> Result<(), String> {
        self.seen.sort_by_key(|seen| seen.revision);
        let mut store: BTreeMap<&str, &str> = BTreeMap::new();
        let mut history = self.revisions.iter().peekable();
        for seen in &self.seen {
            while let Some((_, changes)) = history.next_if(|(revision, _)| **revision <= seen.revision) {
                for (key, value) in changes {
                    match value {
                        Some(value) => store.insert(key, value),
                        None => store.remove(key.as_str()),
                    };
                }
            }
            let value = store.get(seen.key.as_str()).copied();
            if value != seen.value.as_deref() {
                return Err(format!(
                    "{} read {:?} for {} at revision {}, where it is {value:?}",
                    seen.who, seen.value, seen.key, seen.revision
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(key: &str, value: &str) -> KeyChange {
        (key.to_owned(), Some(value.to_owned()))
    }

    /// Three revisions, as a member showed them.
    fn three() -> History {
        let mut history = History::default();
        history.take(2, vec![put("a", "v1"), put("b", "v2")]).unwrap();
        history.take(3, vec![("a".to_owned(), None)]).unwrap();
        history.take(4, vec![put("a", "v3")]).unwrap();
        history
    }

    #[test]
    fn a_history_that_all_members_share_is_accepted() {
        let mut history = three();
        history.take(3, vec![("a".to_owned(), None)]).unwrap();
        history.note_refused("v4").unwrap();
        history.note_acknowledged("a", Some("v3"), 4);
        history.note_acknowledged("a", None, 3);
        for (revision, value) in [(2, Some("v1")), (3, None), (4, Some("v3"))] {
            history.note_seen(revision, "a", value, "c");
        }
        assert_eq!(history.check_end(), Ok(()));
        assert_eq!(history.between("b", 1, 4), [(2, vec![put("b", "v2")])]);
        assert_eq!(history.between("", 2, 3), [(3, vec![("a".to_owned(), None)])]);
    }

    #[test]
    fn a_value_that_is_written_twice_is_refused() {
        assert!(three().take(5, vec![put("a", "v1")]).is_err());
    }

    #[test]
    fn a_write_that_was_not_applied_and_is_there_is_refused_whichever_is_known_first() {
        assert!(three().note_refused("v2").is_err());
        let mut history = three();
        history.note_refused("v4").unwrap();
        assert!(history.take(5, vec![put("a", "v4")]).is_err());
    }

    #[test]
    fn members_that_disagree_are_refused() {
        assert!(three().take(4, vec![put("a", "v9")]).is_err());
        assert!(three().take(2, vec![put("a", "v1")]).is_err());
    }

    #[test]
    fn a_gap_a_lost_write_and_a_stale_read_are_refused_at_the_end() {
        let mut history = three();
        history.take(6, vec![put("a", "v6")]).unwrap();
        assert!(history.check_end().is_err());

        for (value, revision) in [("v1", 4), ("v8", 3), ("v3", 5)] {
            let mut history = three();
            history.note_acknowledged("a", Some(value), revision);
            assert!(history.check_end().is_err());
        }

        for (revision, value) in [(4, Some("v1")), (3, Some("v1")), (2, None)] {
            let mut history = three();
            history.note_seen(revision, "a", value, "c");
            assert!(history.check_end().is_err());
        }
    }
}
