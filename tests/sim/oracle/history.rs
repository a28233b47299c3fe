//! The history of the store as any member ever showed it: revision by revision, gap-free, each value once, equal everywhere. Answers,
//! reads and watches are compared with it.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use metcd::state::StateReader;
use metcd::state::reader::ReadError;
use metcd::state::watch::{Change, EventKind, Watcher};

use crate::watching::everything;

/// A change of one key: its value, or that it went.
pub type KeyChange = (String, Option<String>);

/// A read to be compared at the end.
struct Seen {
    revision: u64,
    key: String,
    value: Option<String>,
    who: String,
}

/// Sees every change of one process' state.
pub struct Auditor {
    watcher: Watcher,
    after: u64,
}

impl Auditor {
    /// From now on.
    pub fn open(reader: &StateReader) -> Option<Auditor> {
        let after = reader.revision();
        let watcher = reader.watch(everything(), after).ok()?;
        Some(Auditor { watcher, after })
    }
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
    deletes: Deletes,
}

/// Whose deletes the history shows. A deletion has no value that would tell, so they are counted: each was answered to somebody, or
/// belongs to a request of which nobody knows what became of it.
#[derive(Default)]
struct Deletes {
    answered: BTreeSet<(u64, String)>,
    /// Of all keys at once.
    all_answered: BTreeSet<u64>,
    unknown: BTreeMap<String, u64>,
}

impl History {
    /// Takes in what a member's state has done since the last call. Opens the watch anew when the state was replaced by a snapshot.
    pub fn follow(&mut self, auditor: &mut Option<Auditor>, reader: &StateReader) -> Result<(), String> {
        let Some(Auditor { watcher, after }) = auditor else {
            *auditor = Auditor::open(reader);
            return Ok(());
        };
        loop {
            match poll_watch(watcher) {
                Poll::Pending => return Ok(()),
                Poll::Ready(Ok(changes)) => {
                    for change in &changes {
                        if change.revision <= *after {
                            return Err(format!("revision {} is delivered again after {after}", change.revision));
                        }
                        *after = change.revision;
                        self.take(change)?;
                    }
                }
                Poll::Ready(Err(ReadError::Compacted { .. })) => {
                    *auditor = Auditor::open(reader);
                    return Ok(());
                }
                Poll::Ready(Err(error)) => return Err(format!("the history cannot be watched: {error}")),
            }
        }
    }

    fn take(&mut self, change: &Change) -> Result<(), String> {
        let revision = change.revision;
        let changes: Vec<KeyChange> = change.events.iter().map(key_change).collect();
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

    /// The delete of this key was answered with success.
    pub fn note_deleted(&mut self, key: &str, revision: u64) -> Result<(), String> {
        match self.deletes.answered.insert((revision, key.to_owned())) && !self.deletes.all_answered.contains(&revision) {
            true => Ok(()),
            false => Err(format!("two deletes of {key} are answered with revision {revision}")),
        }
    }

    /// A delete of all keys was answered: so many were there.
    pub fn note_all_deleted(&mut self, deleted: u64, revision: u64) -> Result<(), String> {
        if deleted == 0 {
            return Ok(());
        }
        let of_this = (revision, String::new())..(revision + 1, String::new());
        let is_anothers = self.deletes.answered.range(of_this).next().is_some();
        match self.deletes.all_answered.insert(revision) && !is_anothers {
            true => Ok(()),
            false => Err(format!("two deletes are answered with revision {revision}, one of all keys")),
        }
    }

    /// Nobody knows whether this key was deleted for a request, once.
    pub fn note_delete_unknown(&mut self, key: &str) {
        *self.deletes.unknown.entry(key.to_owned()).or_default() += 1;
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
        self.check_deletes()?;
        self.check_seen()
    }

    /// Exactly once: no delete happened that nobody asked for.
    fn check_deletes(&mut self) -> Result<(), String> {
        let Deletes {
            answered,
            all_answered,
            unknown,
        } = &mut self.deletes;
        for (&revision, changes) in &self.revisions {
            for (key, value) in changes {
                // Keys that hang on a lease go with it.
                if value.is_some()
                    || !key.starts_with('k')
                    || all_answered.contains(&revision)
                    || answered.contains(&(revision, key.clone()))
                {
                    continue;
                }
                match unknown.get_mut(key) {
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

/// An event of a watch as a change.
pub fn key_change(event: &metcd::state::watch::Event) -> KeyChange {
    let key = String::from_utf8_lossy(&event.kv.key).into_owned();
    let value = (event.kind == EventKind::Put).then(|| String::from_utf8_lossy(&event.kv.value).into_owned());
    (key, value)
}

struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Asks a watch for what it has now.
pub fn poll_watch(watcher: &mut Watcher) -> Poll<Result<Vec<Change>, ReadError>> {
    let flag = Arc::new(Flag(AtomicBool::new(false)));
    let waker = Waker::from(flag.clone());
    let mut next = pin!(watcher.next());
    loop {
        match next.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(found) => return Poll::Ready(found),
            Poll::Pending if flag.0.swap(false, Ordering::Relaxed) => {}
            Poll::Pending => return Poll::Pending,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A history in which a key is put and deleted twice.
    fn deleted_twice() -> History {
        let mut history = History::default();
        for (revision, value) in [(2, Some("v1")), (3, None), (4, Some("v2")), (5, None)] {
            history.revisions.insert(revision, vec![("k".to_owned(), value.map(str::to_owned))]);
        }
        history
    }

    #[test]
    fn a_delete_that_happens_twice_for_one_request_is_noticed() {
        let mut history = deleted_twice();
        history.note_deleted("k", 3).unwrap();
        assert!(history.check_deletes().is_err());
        // Somebody else's may have been the other one, once.
        history.note_delete_unknown("k");
        assert_eq!(history.check_deletes(), Ok(()));
        let mut history = deleted_twice();
        history.note_delete_unknown("k");
        assert!(history.check_deletes().is_err());
        history.note_all_deleted(1, 5).unwrap();
        history.note_delete_unknown("k");
        assert_eq!(history.check_deletes(), Ok(()));
    }

    #[test]
    fn one_deletion_answers_one_request() {
        let mut history = deleted_twice();
        history.note_deleted("k", 3).unwrap();
        assert!(history.note_deleted("k", 3).is_err());
        assert!(history.note_all_deleted(1, 3).is_err());
        assert_eq!(history.note_all_deleted(0, 3), Ok(()), "it found nothing to delete");
        history.note_all_deleted(1, 5).unwrap();
        assert!(history.note_deleted("k", 5).is_err());
    }
}
