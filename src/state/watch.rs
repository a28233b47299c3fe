//! Watches: every revision's events, once, in order, whole.

use std::sync::Arc;

use super::command::KeySpan;
use super::outcome::KeyValue;
use super::reader::ReadError;

/// What a watcher wants.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct WatchFilter {
    /// Which keys.
    pub span: KeySpan,
    /// Deliver puts.
    pub puts: bool,
    /// Deliver deletes.
    pub deletes: bool,
    /// With the previous key-value.
    pub want_prev: bool,
}

/// Put or delete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    /// The key was set.
    Put,
    /// The key was deleted (by a request, a txn or its lease); its `kv` has the key and `mod_revision` only.
    Delete,
}

/// One key's change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// What happened.
    pub kind: EventKind,
    /// The key after it.
    pub kv: KeyValue,
    /// Before it, if asked for and there was one that is not compacted.
    pub prev: Option<KeyValue>,
}

/// All events of one revision that pass the filter; never empty.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    /// The revision.
    pub revision: u64,
    /// Its events, in the order of the command.
    pub events: Arc<[Event]>,
}

/// One open watch, fed from the newest revisions in memory while it keeps up, and from history when it fell behind: never
/// blocks the writer and never holds more than one batch.
pub struct Watcher {}

impl Watcher {
    /// Waits for the next changes (at least one, a batch if there are more), in order.
    /// `Compacted` if history was compacted beyond the watcher's position.
    /// Cancel safe: nothing is lost if the future is dropped.
    pub async fn next(&mut self) -> Result<Vec<Change>, ReadError> {
        todo!()
    }

    /// Every change up to this revision was returned by [`next`](Self::next) or does not pass the filter: the `id:` of a progress event.
    pub fn position(&self) -> u64 {
        todo!()
    }
}
