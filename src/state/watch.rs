//! Watches: every revision's events, once, in order, whole.

use std::collections::BTreeMap;
use std::ops::{Bound, ControlFlow};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;

use super::StateError;
use super::command::KeySpan;
use super::hub::{Group, Hub};
use super::key::{row_key, split_row_key};
use super::kv;
use super::outcome::KeyValue;
use super::reader::ReadError;
use super::row::{Row, key_value, share};
use super::shared::Shared;
use crate::store::{KvStore, Order, Table};

/// Changes returned at once, at most.
const BATCH_CHANGES: usize = 128;
/// Bytes of rows returned at once, at most (but one change always fits).
const BATCH_BYTES: usize = 1 << 20;
/// Rows of history looked at in one step.
const STEP_ROWS: usize = 1000;
/// Bytes of rows taken from history in one step; a revision is never cut.
const STEP_BYTES: usize = 256 << 10;

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

impl WatchFilter {
    fn passes(&self, event: &Event) -> bool {
        let is_kind_wanted = match event.kind {
            EventKind::Put => self.puts,
            EventKind::Delete => self.deletes,
        };
        is_kind_wanted && self.span.contains(&event.kv.key)
    }
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
#[derive(Debug, Clone)]
pub struct Change {
    /// The revision.
    pub revision: u64,
    /// Its events, in the order of the command.
    pub events: Arc<[Event]>,
    /// Encoded forms, shared by all watchers that were given the same events: whoever needs one first fills it in.
    pub encoded: Arc<Encoded>,
}

/// Encoded forms of a [`Change`], filled by the front that sends them.
#[derive(Debug, Default)]
pub struct Encoded {
    /// As a message of a `text/event-stream`.
    pub event_stream: OnceLock<Bytes>,
    /// As a line of `application/x-ndjson`.
    pub json_line: OnceLock<Bytes>,
}

impl Change {
    /// A change with nothing encoded yet.
    pub fn new(revision: u64, events: Arc<[Event]>) -> Change {
        Change {
            revision,
            events,
            encoded: Arc::default(),
        }
    }
}

/// Equal if revision and events are; what happens to be encoded does not count.
impl PartialEq for Change {
    fn eq(&self, other: &Change) -> bool {
        self.revision == other.revision && self.events == other.events
    }
}

/// One revision's rows, with the events made of them once for all watchers.
pub(super) struct Shareable {
    revision: u64,
    rows: Vec<Arc<[u8]>>,
    plain: OnceLock<Change>,
    with_prev: OnceLock<Change>,
}

impl Shareable {
    pub(super) fn new(revision: u64, rows: Vec<Arc<[u8]>>) -> Shareable {
        Shareable {
            revision,
            rows,
            plain: OnceLock::new(),
            with_prev: OnceLock::new(),
        }
    }

    pub(super) fn revision(&self) -> u64 {
        self.revision
    }

    pub(super) fn bytes(&self) -> usize {
        self.rows.iter().map(|row| row.len() + 64).sum()
    }

    /// All events of the revision, before any filter.
    fn change(&self, shared: &Shared, want_prev: bool) -> Result<Change, StateError> {
        let slot = if want_prev { &self.with_prev } else { &self.plain };
        if let Some(change) = slot.get() {
            return Ok(change.clone());
        }
        let mut events = Vec::with_capacity(self.rows.len());
        for row in &self.rows {
            let record = share(row.clone());
            let is_tombstone = Row::checked(self.revision, &record)?.is_tombstone;
            let kv = key_value(self.revision, &record)?;
            let prev = if want_prev {
                previous(shared, self.revision, &kv.key)?
            } else {
                None
            };
            events.push(Event {
                kind: if is_tombstone { EventKind::Delete } else { EventKind::Put },
                kv,
                prev,
            });
        }
        Ok(slot.get_or_init(|| Change::new(self.revision, events.into())).clone())
    }

    fn filtered(&self, shared: &Shared, filter: &WatchFilter) -> Result<Option<Change>, StateError> {
        let change = self.change(shared, filter.want_prev)?;
        let passing = change.events.iter().filter(|event| filter.passes(event)).count();
        Ok(match passing {
            0 => None,
            all if all == change.events.len() => Some(change),
            _ => Some(Change::new(
                self.revision,
                change.events.iter().filter(|event| filter.passes(event)).cloned().collect(),
            )),
        })
    }
}

/// The key as it was before `revision`; `None` if it was not there, or that history is compacted.
fn previous(shared: &Shared, revision: u64, key: &[u8]) -> Result<Option<KeyValue>, StateError> {
    let before = revision - 1;
    let version = kv::newest(&*shared.store, key, before, &mut Vec::new())?.filter(|version| !version.is_tombstone);
    let row = match &version {
        Some(version) => kv::row_of(&*shared.store, version)?,
        None => None,
    };
    match (version, row) {
        _ if before < shared.compacted_revision() => Ok(None),
        (Some(version), Some(row)) => Ok(Some(key_value(version.revision, &share(row))?)),
        (Some(version), None) => Err(super::apply::missing_row(&version)),
        (None, _) => Ok(None),
    }
}

/// One open watch, fed from the newest revisions in memory while it keeps up, and from history when it fell behind: never
/// blocks the writer and never holds more than one batch.
pub struct Watcher {
    shared: Arc<Shared>,
    group: Arc<Group>,
    filter: WatchFilter,
    /// Everything up to here is delivered or does not pass the filter.
    position: u64,
}

/// What one look brought.
enum Look {
    /// Changes to return.
    Changes(Vec<Change>),
    /// Nothing yet, but there may be more: look again.
    Again,
    /// Up to date.
    Idle,
}

/// What to read, decided under the hub's lock and read without it.
enum Plan {
    /// These revisions, from memory or history; afterwards everything up to `until` is seen.
    Exact {
        revisions: Vec<(u64, Option<Arc<Shareable>>)>,
        until: u64,
    },
    /// History up to this revision.
    History { until: u64 },
}

impl Watcher {
    pub(super) fn open(shared: Arc<Shared>, filter: WatchFilter, after_revision: u64) -> Result<Watcher, ReadError> {
        let group = {
            let mut hub = shared.hub.lock();
            let current = hub.head();
            if after_revision > current {
                return Err(ReadError::FutureRevision {
                    revision: after_revision,
                    current,
                });
            }
            let compacted_revision = shared.compacted_revision();
            if after_revision < compacted_revision {
                return Err(ReadError::Compacted { compacted_revision });
            }
            hub.join(&filter.span)
        };
        Ok(Watcher {
            shared,
            group,
            filter,
            position: after_revision,
        })
    }

    /// Waits for the next changes (at least one, a batch if there are more), in order.
    /// `Compacted` if history was compacted beyond the watcher's position.
    /// Cancel safe: nothing is lost if the future is dropped.
    pub async fn next(&mut self) -> Result<Vec<Change>, ReadError> {
        let group = self.group.clone();
        loop {
            let mut woken = std::pin::pin!(group.woken());
            // Before the look, so that no change between look and wait is missed.
            woken.as_mut().enable();
            match self.look()? {
                Look::Changes(changes) => return Ok(changes),
                Look::Again => tokio::task::yield_now().await, // pure: gives way to others, starts nothing
                Look::Idle => woken.await,
            }
        }
    }

    /// Every change up to this revision was returned by [`next`](Self::next) or does not pass the filter: the `id:` of a progress event.
    pub fn position(&self) -> u64 {
        let hub = self.shared.hub.lock();
        let state = self.group.state.lock();
        if self.position < state.base {
            return self.position;
        }
        let pending = state.revisions.partition_point(|revision| *revision <= self.position);
        match state.revisions.get(pending) {
            Some(revision) => revision - 1,
            None => hub.head().max(self.position),
        }
    }

    fn look(&mut self) -> Result<Look, ReadError> {
        let epoch = self.shared.epoch();
        if epoch.is_replacing() {
            // Every group is woken when the new state is published.
            return Ok(Look::Idle);
        }
        let before = self.position;
        let looked = match self.plan() {
            Plan::Exact { revisions, until } => self.read_exact(revisions, until),
            Plan::History { until } => self.read_history(until),
        };
        if self.shared.check_epoch(epoch).is_err() {
            // What was missing may have been gone from the store for the moment: the new state tells, it has the same revisions.
            self.position = before;
            return Ok(Look::Again);
        }
        looked
    }

    fn plan(&self) -> Plan {
        let hub = self.shared.hub.lock();
        let state = self.group.state.lock();
        if self.position < state.base {
            return self.plan_behind(&hub, state.base);
        }
        let again = u64::from(mutant!(WatchTwice) && self.position.is_multiple_of(16));
        let from = state.revisions.partition_point(|revision| *revision + again <= self.position);
        let mut until = hub.head().max(self.position);
        let mut bytes = 0;
        let mut revisions = Vec::new();
        for revision in state.revisions.range(from..) {
            if revisions.len() >= BATCH_CHANGES || bytes > BATCH_BYTES {
                until = revisions.last().map_or(self.position, |(revision, _)| *revision);
                break;
            }
            let recent = hub.recent(*revision);
            bytes += recent.as_ref().map_or(STEP_BYTES, |change| change.bytes());
            revisions.push((*revision, recent));
        }
        Plan::Exact { revisions, until }
    }

    /// The group's list does not reach back to the position. As long as the changes are in memory they are taken from there, with what
    /// other watchers made of them: many watchers that fall behind together would otherwise each decode and encode the same history.
    fn plan_behind(&self, hub: &Hub, base: u64) -> Plan {
        // What is compacted is not delivered, though it may still be in memory: the answer must not depend on that.
        let is_kept = self.position >= self.shared.compacted_revision();
        let Some(recent) = hub.recent_after(self.position).filter(|_| is_kept) else {
            return Plan::History { until: base };
        };
        let mut bytes = 0;
        let mut revisions: Vec<(u64, Option<Arc<Shareable>>)> = Vec::new();
        for change in recent.take(BATCH_CHANGES).take_while(|change| change.revision() <= base) {
            if bytes > BATCH_BYTES {
                break;
            }
            bytes += change.bytes();
            revisions.push((change.revision(), Some(change.clone())));
        }
        let until = revisions.last().map_or(self.position, |(revision, _)| *revision);
        Plan::Exact { revisions, until }
    }

    fn read_exact(&mut self, revisions: Vec<(u64, Option<Arc<Shareable>>)>, until: u64) -> Result<Look, ReadError> {
        let is_idle = revisions.is_empty();
        let mut changes = Vec::with_capacity(revisions.len());
        for (revision, recent) in revisions {
            if mutant!(WatchSkips) && revision.is_multiple_of(16) {
                continue;
            }
            let change = match recent {
                Some(change) => change,
                None => match self.read_revision(revision) {
                    Ok(change) => Arc::new(change),
                    // What was read before it goes out first; the error comes with the next call.
                    Err(_) if !changes.is_empty() => return Ok(Look::Changes(changes)),
                    Err(error) => return Err(error),
                },
            };
            changes.extend(change.filtered(&self.shared, &self.filter)?);
            self.position = revision;
        }
        self.position = self.position.max(until);
        Ok(match (changes.is_empty(), is_idle) {
            (false, _) => Look::Changes(changes),
            (true, false) => Look::Again,
            (true, true) => Look::Idle,
        })
    }

    /// One revision that is no longer in memory.
    fn read_revision(&self, revision: u64) -> Result<Shareable, ReadError> {
        let mut rows = Vec::new();
        let span = (row_key(revision, 0), row_key(revision, u32::MAX));
        self.shared.store.scan(
            Table::Revision,
            (Bound::Included(&span.0), Bound::Included(&span.1)),
            Order::Asc,
            &mut |_, record| {
                rows.push(record.into());
                ControlFlow::Continue(())
            },
        )?;
        self.check_history(revision - 1)?;
        Ok(Shareable::new(revision, rows))
    }

    /// Whether history is complete after `position`. Asked after reading: what was there then had not been removed.
    fn check_history(&self, position: u64) -> Result<(), ReadError> {
        let compacted_revision = self.shared.compacted_revision();
        if position < compacted_revision {
            Err(ReadError::Compacted { compacted_revision })
        } else {
            Ok(())
        }
    }

    fn read_history(&mut self, until: u64) -> Result<Look, ReadError> {
        let step = history_step(&*self.shared.store, self.position, until, &self.filter.span)?;
        self.check_history(self.position)?;
        let mut changes = Vec::with_capacity(step.changes.len());
        for (revision, rows) in step.changes {
            changes.extend(Shareable::new(revision, rows).filtered(&self.shared, &self.filter)?);
        }
        self.position = step.seen_until;
        Ok(if changes.is_empty() { Look::Again } else { Look::Changes(changes) })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.shared.hub.lock().leave(&self.group);
    }
}

impl std::fmt::Debug for Watcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watcher")
            .field("filter", &self.filter)
            .field("position", &self.position)
            .finish_non_exhaustive()
    }
}

struct HistoryStep {
    /// Revision → its rows within the span.
    changes: BTreeMap<u64, Vec<Arc<[u8]>>>,
    seen_until: u64,
}

/// Reads a bounded part of the history after `after` and up to `until`, whole revisions only.
fn history_step(store: &dyn KvStore, after: u64, until: u64, span: &KeySpan) -> Result<HistoryStep, StateError> {
    let mut step = HistoryStep {
        changes: BTreeMap::new(),
        seen_until: until,
    };
    let (mut rows, mut bytes, mut last) = (0, 0, after);
    let mut error = None;
    let bounds = (row_key(after.saturating_add(1), 0), row_key(until, u32::MAX));
    store.scan(
        Table::Revision,
        (Bound::Included(&bounds.0), Bound::Included(&bounds.1)),
        Order::Asc,
        &mut |key, record| {
            let Some((revision, _)) = split_row_key(key) else {
                error = Some(StateError::Corrupt("a key of the history cannot be decoded".into()));
                return ControlFlow::Break(());
            };
            if revision != last && (rows >= STEP_ROWS || bytes >= STEP_BYTES) {
                step.seen_until = last;
                return ControlFlow::Break(());
            }
            (rows, last) = (rows + 1, revision);
            match Row::checked(revision, record) {
                Ok(row) if span.contains(row.key) => {
                    bytes += record.len();
                    step.changes.entry(revision).or_default().push(record.into());
                    ControlFlow::Continue(())
                }
                Ok(_) => ControlFlow::Continue(()),
                Err(damage) => {
                    error = Some(damage);
                    ControlFlow::Break(())
                }
            }
        },
    )?;
    error.map_or(Ok(step), Err)
}
