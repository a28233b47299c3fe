//! Who must be told of which change: watchers in groups of equal span, and the newest changes in memory, shared by all.
//!
//! *Invariants*
//! - The writer only appends to the ring, notes the revision in the groups it matches, and wakes those groups once per batch: its cost
//!   follows the changes that interest somebody, not the number of idle watchers.
//! - `revisions` of a group are all revisions after `base` that touch its span. A watcher at or after `base` therefore reads exactly
//!   what it wants, from the ring or row by row from history, and is up to date with everything when nothing is left of them.
//! - Everything is bounded: the ring in bytes and revisions, a group's list in revisions. What falls out is read from history.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::apply::RowEvent;
use super::command::KeySpan;
use super::row::Row;
use super::watch::Shareable;

/// Bytes of rows held in the ring, at most (but one revision always fits). Events and encoded forms that watchers asked for come on top,
/// about thrice as much.
const RING_BYTES: usize = 16 << 20;
/// Revisions held in the ring, at most.
const RING_REVISIONS: usize = 16_384;
/// Revisions noted per group, at most.
const GROUP_REVISIONS: usize = 512;

/// Watchers of one span.
pub(super) struct Group {
    span: KeySpan,
    wake: Notify,
    pub(super) state: Mutex<GroupState>,
}

pub(super) struct GroupState {
    /// `revisions` is complete after this revision.
    pub(super) base: u64,
    pub(super) revisions: VecDeque<u64>,
    watchers: usize,
    is_touched: bool,
}

impl Group {
    pub(super) fn wake(&self) {
        self.wake.notify_waiters();
    }

    pub(super) fn woken(&self) -> tokio::sync::futures::Notified<'_> {
        self.wake.notified()
    }
}

/// How a span is found from a key.
enum Kind {
    /// One key.
    Single,
    /// A prefix, of this length.
    Prefix(usize),
    /// Any other range, tried one by one: only programs that ask for odd ranges pay for it.
    Range,
}

impl Kind {
    fn of(span: &KeySpan) -> Kind {
        if *span == KeySpan::single(&span.start) {
            Kind::Single
        } else if *span == KeySpan::prefix(&span.start) {
            Kind::Prefix(span.start.len())
        } else {
            Kind::Range
        }
    }
}

/// The writer's side of all watches. Under one lock, held shortly.
pub(super) struct Hub {
    /// The newest revision appended, whether or not anybody watched.
    head: u64,
    ring: VecDeque<Arc<Shareable>>,
    ring_bytes: usize,
    singles: BTreeMap<Bytes, Arc<Group>>,
    prefixes: BTreeMap<Bytes, Arc<Group>>,
    /// Length of prefixes → how many groups have it.
    prefix_lengths: BTreeMap<usize, usize>,
    ranges: Vec<Arc<Group>>,
}

impl Hub {
    pub(super) fn new(head: u64) -> Hub {
        Hub {
            head,
            ring: VecDeque::new(),
            ring_bytes: 0,
            singles: BTreeMap::new(),
            prefixes: BTreeMap::new(),
            prefix_lengths: BTreeMap::new(),
            ranges: Vec::new(),
        }
    }

    pub(super) fn head(&self) -> u64 {
        self.head
    }

    fn is_watched(&self) -> bool {
        !(self.singles.is_empty() && self.prefixes.is_empty() && self.ranges.is_empty())
    }

    /// Takes the changes of one batch. Returns the groups to wake once their revision is published.
    pub(super) fn append(&mut self, head: u64, events: Vec<RowEvent>) -> Vec<Arc<Group>> {
        self.head = head;
        if !self.is_watched() {
            self.ring.clear();
            self.ring_bytes = 0;
            return Vec::new();
        }
        let mut touched = Vec::new();
        let mut events = events.into_iter().peekable();
        while let Some((revision, row)) = events.next() {
            let mut rows = vec![row];
            while let Some((_, row)) = events.next_if(|(next, _)| *next == revision) {
                rows.push(row);
            }
            for row in &rows {
                if let Some(row) = Row::decode(revision, row) {
                    self.note(revision, row.key, &mut touched);
                }
            }
            self.push(Shareable::new(revision, rows));
        }
        for group in &touched {
            group.state.lock().is_touched = false;
        }
        touched
    }

    fn push(&mut self, change: Shareable) {
        self.ring_bytes += change.bytes();
        self.ring.push_back(Arc::new(change));
        while self.ring.len() > RING_REVISIONS || (self.ring_bytes > RING_BYTES && self.ring.len() > 1) {
            if let Some(oldest) = self.ring.pop_front() {
                self.ring_bytes -= oldest.bytes();
            }
        }
    }

    fn note(&self, revision: u64, key: &[u8], touched: &mut Vec<Arc<Group>>) {
        let single = self.singles.get(key);
        let lengths = self.prefix_lengths.range(..=key.len()).map(|(length, _)| *length);
        let prefixes = lengths.filter_map(|length| self.prefixes.get(&key[..length]));
        let ranges = self.ranges.iter().filter(|group| group.span.contains(key));
        for group in single.into_iter().chain(prefixes).chain(ranges) {
            let mut state = group.state.lock();
            if state.revisions.back() != Some(&revision) {
                state.revisions.push_back(revision);
                if state.revisions.len() > GROUP_REVISIONS
                    && let Some(oldest) = state.revisions.pop_front()
                {
                    state.base = oldest;
                }
            }
            if !std::mem::replace(&mut state.is_touched, true) {
                touched.push(group.clone());
            }
        }
    }

    /// The change of a revision, if it is still in memory. Revisions in the ring have no gaps.
    pub(super) fn recent(&self, revision: u64) -> Option<Arc<Shareable>> {
        let first = self.ring.front()?.revision();
        let at = usize::try_from(revision.checked_sub(first)?).ok()?;
        self.ring.get(at).cloned()
    }

    /// The changes after `position`, of any key, if all of them are still in memory.
    pub(super) fn recent_after(&self, position: u64) -> Option<impl Iterator<Item = &Arc<Shareable>>> {
        let first = self.ring.front()?.revision();
        let at = usize::try_from((position + 1).checked_sub(first)?).ok()?;
        (at < self.ring.len()).then(|| self.ring.range(at..))
    }

    /// The state was replaced: nothing in memory is of use. Returns all groups, to be woken.
    pub(super) fn restart(&mut self, head: u64) -> Vec<Arc<Group>> {
        self.head = head;
        self.ring.clear();
        self.ring_bytes = 0;
        let groups: Vec<_> = self
            .singles
            .values()
            .chain(self.prefixes.values())
            .chain(&self.ranges)
            .cloned()
            .collect();
        for group in &groups {
            let mut state = group.state.lock();
            state.revisions.clear();
            state.base = head;
        }
        groups
    }

    /// Adds a watcher of `span`.
    pub(super) fn join(&mut self, span: &KeySpan) -> Arc<Group> {
        let group = match Kind::of(span) {
            Kind::Single => self
                .singles
                .entry(span.start.clone())
                .or_insert_with(|| new_group(span, self.head))
                .clone(),
            Kind::Prefix(length) => {
                let head = self.head;
                let lengths = &mut self.prefix_lengths;
                let add = || {
                    *lengths.entry(length).or_default() += 1;
                    new_group(span, head)
                };
                self.prefixes.entry(span.start.clone()).or_insert_with(add).clone()
            }
            Kind::Range => match self.ranges.iter().find(|group| group.span == *span) {
                Some(group) => group.clone(),
                None => {
                    let group = new_group(span, self.head);
                    self.ranges.push(group.clone());
                    group
                }
            },
        };
        group.state.lock().watchers += 1;
        group
    }

    /// Removes a watcher of the group.
    pub(super) fn leave(&mut self, group: &Arc<Group>) {
        let is_last = {
            let mut state = group.state.lock();
            state.watchers -= 1;
            state.watchers == 0
        };
        if !is_last {
            return;
        }
        match Kind::of(&group.span) {
            Kind::Single => drop(self.singles.remove(&group.span.start)),
            Kind::Prefix(length) => {
                self.prefixes.remove(&group.span.start);
                if let Some(count) = self.prefix_lengths.get_mut(&length) {
                    *count -= 1;
                    if *count == 0 {
                        self.prefix_lengths.remove(&length);
                    }
                }
            }
            Kind::Range => self.ranges.retain(|other| !Arc::ptr_eq(other, group)),
        }
    }
}

fn new_group(span: &KeySpan, head: u64) -> Arc<Group> {
    let state = GroupState {
        base: head,
        revisions: VecDeque::new(),
        watchers: 0,
        is_touched: false,
    };
    // Copies: the filter's bytes may be slices of a request.
    let span = KeySpan {
        start: Bytes::copy_from_slice(&span.start),
        end: span.end.as_deref().map(Bytes::copy_from_slice),
    };
    Arc::new(Group {
        span,
        wake: Notify::new(),
        state: Mutex::new(state),
    })
}
