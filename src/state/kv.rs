//! Reading the index: the newest version of a key, and walks over the live keys of a span, both as of a revision.

use std::ops::{Bound, ControlFlow};
use std::sync::Arc;

use super::StateError;
use super::key::{IndexSpan, REVISION_LEN, as_bound, descending, last_of, push_escaped, row_key, split_index_key, unescape};
use super::row::Version;
use crate::store::{KvStore, Order, Table};

/// Records looked at in one scan of the store, so that a scan never holds an engine's lock for long.
const STEP: usize = 1000;
/// Versions of one key looked at one by one; then a seek skips the rest.
const RUN: usize = 16;

fn corrupt_index() -> StateError {
    StateError::Corrupt("a record of the key index cannot be decoded".into())
}

/// The newest version of `key` at or below `at`, tombstones too. `scratch` is overwritten; afterwards it begins with the escaped key.
pub(super) fn newest(store: &dyn KvStore, key: &[u8], at: u64, scratch: &mut Vec<u8>) -> Result<Option<Version>, StateError> {
    scratch.clear();
    push_escaped(scratch, key);
    newest_of_escaped(store, at, scratch)
}

/// As [`newest`], for the escaped key in `scratch`. The revision is appended to it and taken away again.
fn newest_of_escaped(store: &dyn KvStore, at: u64, scratch: &mut Vec<u8>) -> Result<Option<Version>, StateError> {
    let (user_len, end) = (scratch.len(), last_of(scratch));
    scratch.extend_from_slice(&descending(at));
    let mut found = Ok(None);
    let visit = &mut |index_key: &[u8], record: &[u8]| {
        let version = split_index_key(index_key).and_then(|(_, revision)| Version::decode_index(revision, record));
        found = version.map(Some).ok_or_else(corrupt_index);
        ControlFlow::Break(())
    };
    store.scan(Table::Index, (Bound::Included(scratch), Bound::Included(&end)), Order::Asc, visit)?;
    scratch.truncate(user_len);
    found
}

/// The row of a version.
pub(super) fn row_of(store: &dyn KvStore, version: &Version) -> Result<Option<Arc<[u8]>>, StateError> {
    Ok(store.get(Table::Revision, &row_key(version.revision, version.position))?)
}

/// A live key found by a walk.
#[derive(Debug, Clone)]
pub(super) struct Hit {
    pub(super) key: Vec<u8>,
    pub(super) version: Version,
}

/// Calls `visit` with the escaped key and version of each live key of the span as of revision `at`, in order, until it breaks.
/// `visit` may run under the engine's lock: short, and no calls of the store.
pub(super) fn walk(
    store: &dyn KvStore,
    mut span: IndexSpan,
    at: u64,
    is_descending: bool,
    visit: &mut dyn FnMut(&[u8], Version) -> ControlFlow<()>,
) -> Result<(), StateError> {
    let mut walk = Walk {
        at,
        is_descending,
        user: Vec::new(),
        run: 0,
        is_decided: true,
        candidate: None,
        resume: Resume::Done,
        error: None,
    };
    while !span.is_empty() {
        let mut seen = 0;
        walk.resume = Resume::Done;
        let order = if is_descending { Order::Desc } else { Order::Asc };
        store.scan(
            Table::Index,
            (as_bound(&span.lower), as_bound(&span.upper)),
            order,
            &mut |index_key, record| {
                seen += 1;
                let flow = walk.see(index_key, record, visit);
                if flow.is_continue() && seen >= STEP {
                    walk.resume = Resume::Behind(index_key.to_vec());
                    return ControlFlow::Break(());
                }
                flow
            },
        )?;
        if let Some(error) = walk.error.take() {
            return Err(error);
        }
        match std::mem::replace(&mut walk.resume, Resume::Done) {
            Resume::Stopped => return Ok(()),
            Resume::Done => break,
            Resume::Behind(bound) if is_descending => span.upper = Bound::Excluded(bound),
            Resume::Behind(bound) => span.lower = Bound::Excluded(bound),
            Resume::From(bound) => span.lower = Bound::Included(bound),
            Resume::Resolve => {
                let mut user = walk.user.clone();
                walk.candidate = newest_of_escaped(store, at, &mut user)?;
                if walk.deliver_candidate(visit).is_break() {
                    return Ok(());
                }
                span.upper = Bound::Excluded(user);
            }
        }
    }
    let _ = walk.deliver_candidate(visit);
    Ok(())
}

/// Where a walk goes on after a scan of the store ended.
enum Resume {
    /// The span is finished.
    Done,
    /// The visitor has enough.
    Stopped,
    /// Behind this record, in the direction of the walk.
    Behind(Vec<u8>),
    /// Ascending only: at this record.
    From(Vec<u8>),
    /// Descending only: the key at hand has many versions; seek its newest, then go on with the next key.
    Resolve,
}

struct Walk {
    at: u64,
    is_descending: bool,
    /// Escaped key whose versions are being passed.
    user: Vec<u8>,
    /// Versions of it seen so far.
    run: usize,
    /// Nothing more is needed of this key.
    is_decided: bool,
    /// Descending only, where the oldest version comes first: the newest one seen so far.
    candidate: Option<Version>,
    resume: Resume,
    error: Option<StateError>,
}

impl Walk {
    fn see(&mut self, index_key: &[u8], record: &[u8], visit: &mut dyn FnMut(&[u8], Version) -> ControlFlow<()>) -> ControlFlow<()> {
        let Some((user, revision)) = split_index_key(index_key) else {
            self.error = Some(corrupt_index());
            return ControlFlow::Break(());
        };
        if user != self.user {
            if self.deliver_candidate(visit).is_break() {
                self.resume = Resume::Stopped;
                return ControlFlow::Break(());
            }
            self.user.clear();
            self.user.extend_from_slice(user);
            self.run = 0;
            self.is_decided = false;
        }
        self.run += 1;
        if !self.is_decided && revision <= self.at {
            let Some(version) = Version::decode_index(revision, record) else {
                self.error = Some(corrupt_index());
                return ControlFlow::Break(());
            };
            self.candidate = Some(version);
            if !self.is_descending {
                self.is_decided = true;
                if self.deliver_candidate(visit).is_break() {
                    self.resume = Resume::Stopped;
                    return ControlFlow::Break(());
                }
            }
        }
        if self.run >= RUN { self.skip() } else { ControlFlow::Continue(()) }
    }

    /// Leaves the many versions of one key by a seek.
    fn skip(&mut self) -> ControlFlow<()> {
        self.run = 0;
        if self.is_descending {
            self.is_decided = true;
            self.resume = Resume::Resolve;
            return ControlFlow::Break(());
        }
        let mut bound = Vec::with_capacity(self.user.len() + REVISION_LEN);
        bound.extend_from_slice(&self.user);
        bound.extend_from_slice(&descending(if self.is_decided { 0 } else { self.at }));
        self.resume = Resume::From(bound);
        ControlFlow::Break(())
    }

    fn deliver_candidate(&mut self, visit: &mut dyn FnMut(&[u8], Version) -> ControlFlow<()>) -> ControlFlow<()> {
        match self.candidate.take() {
            Some(version) if !version.is_tombstone => visit(&self.user, version),
            Some(_) | None => ControlFlow::Continue(()),
        }
    }
}

/// The first `limit` live keys of the span, in order.
pub(super) fn list(store: &dyn KvStore, span: IndexSpan, at: u64, is_descending: bool, limit: usize) -> Result<Vec<Hit>, StateError> {
    let mut hits = Vec::new();
    let mut is_damaged = false;
    if limit == 0 {
        return Ok(hits);
    }
    walk(store, span, at, is_descending, &mut |user, version| {
        match unescape(user) {
            Some(key) => hits.push(Hit { key, version }),
            None => is_damaged = true,
        }
        if is_damaged || hits.len() >= limit {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    })?;
    if is_damaged { Err(corrupt_index()) } else { Ok(hits) }
}

/// How many live keys the span has.
pub(super) fn count(store: &dyn KvStore, span: IndexSpan, at: u64) -> Result<u64, StateError> {
    count_within(store, span, at, u64::MAX)
}

/// The same, counted no further than just beyond `max`.
pub(super) fn count_within(store: &dyn KvStore, span: IndexSpan, at: u64, max: u64) -> Result<u64, StateError> {
    let mut keys = 0;
    walk(store, span, at, false, &mut |_, _| {
        keys += 1;
        if keys > max {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    })?;
    Ok(keys)
}
