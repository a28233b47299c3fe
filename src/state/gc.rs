//! Removing what is compacted, in small steps.
//!
//! A cursor goes once through the history, in order of revision, and never returns: each change of a key ends the life of the version
//! before it, so looking at the changes up to the compacted revision finds everything that is dead. Readers see nothing of it.

use std::ops::{Bound, ControlFlow};

use super::StateError;
use super::key::{ROW_KEY_LEN, descending, escaped, last_of, row_key, split_index_key, split_row_key};
use super::row::{Row, Version};
use crate::store::{KvStore, Order, Table, WriteBatch};

/// Key of the cursor in [`Table::Meta`]. It is this store's own business: a snapshot begins with one that says "nothing to do".
pub(super) const CURSOR_KEY: &[u8] = b"garbage";

/// How far this store's garbage is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cursor {
    /// Key of the last row looked at.
    at: [u8; ROW_KEY_LEN],
}

/// The part of a row that matters here.
struct Candidate {
    revision: u64,
    position: u32,
    key: Vec<u8>,
    /// It made its key: what was there before, if anything, ended with a deletion, whose row the cursor has met before.
    is_first: bool,
}

impl Cursor {
    /// Nothing at or below this revision is garbage.
    pub(super) fn clean_until(revision: u64) -> Cursor {
        Cursor {
            at: row_key(revision, u32::MAX),
        }
    }

    pub(super) fn load(store: &dyn KvStore) -> Result<Cursor, StateError> {
        match store.get(Table::Meta, CURSOR_KEY)? {
            None => Ok(Cursor { at: row_key(0, 0) }),
            Some(record) => match record[..].try_into() {
                Ok(at) => Ok(Cursor { at }),
                Err(_) => Err(StateError::Corrupt("the garbage cursor cannot be decoded".into())),
            },
        }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        self.at.to_vec()
    }

    /// Looks at up to `budget` rows of at most revision `limit` and removes what is dead. Returns whether there is more to do.
    pub(super) fn step(&mut self, store: &dyn KvStore, limit: u64, budget: usize) -> Result<bool, StateError> {
        let end = row_key(limit, u32::MAX);
        if self.at >= end {
            return Ok(false);
        }
        let candidates = self.candidates(store, &end, budget)?;
        let is_finished = candidates.len() < budget;
        let mut batch = WriteBatch::default();
        for (at, candidate) in candidates.iter().enumerate() {
            if candidate.is_first && candidate.position == 0 {
                // Nothing older is left, and it stays unless the same revision goes on to overwrite it: a store that only grows is looked
                // through without a look at its index.
                let is_alone = candidates.get(at + 1).is_some_and(|next| next.revision != candidate.revision);
                if is_alone {
                    continue;
                }
            }
            collect(store, candidate, &mut batch)?;
        }
        self.at = match candidates.last() {
            Some(last) if !is_finished => row_key(last.revision, last.position),
            _ => end,
        };
        batch.put(Table::Meta, CURSOR_KEY, self.encode());
        store.write(batch)?;
        Ok(!is_finished)
    }

    fn candidates(&self, store: &dyn KvStore, end: &[u8], budget: usize) -> Result<Vec<Candidate>, StateError> {
        let mut candidates = Vec::new();
        let mut error = None;
        store.scan(
            Table::Revision,
            (Bound::Excluded(&self.at), Bound::Included(end)),
            Order::Asc,
            &mut |key, record| {
                let row = split_row_key(key).and_then(|at| Some((at, Row::decode(at.0, record)?)));
                let Some(((revision, position), row)) = row else {
                    error = Some(StateError::Corrupt("a row of the history cannot be decoded".into()));
                    return ControlFlow::Break(());
                };
                candidates.push(Candidate {
                    revision,
                    position,
                    key: row.key.to_vec(),
                    is_first: row.version == 1 && !row.is_tombstone,
                });
                if candidates.len() >= budget {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            },
        )?;
        error.map_or(Ok(candidates), Err)
    }
}

/// Removes what this change made obsolete: the key's older versions, itself if it is a deletion or was overwritten in its own revision.
fn collect(store: &dyn KvStore, candidate: &Candidate, batch: &mut WriteBatch) -> Result<(), StateError> {
    let Candidate {
        revision, position, key, ..
    } = candidate;
    let user = escaped(key);
    let end = last_of(&user);
    let mut from = user.clone();
    from.extend_from_slice(&descending(*revision));
    let mut versions = Vec::new();
    let mut is_damaged = false;
    store.scan(
        Table::Index,
        (Bound::Included(&from), Bound::Included(&end)),
        Order::Asc,
        &mut |index_key, record| match split_index_key(index_key).and_then(|(_, made)| Version::decode_index(made, record)) {
            Some(version) => {
                versions.push(version);
                ControlFlow::Continue(())
            }
            None => {
                is_damaged = true;
                ControlFlow::Break(())
            }
        },
    )?;
    if is_damaged {
        return Err(StateError::Corrupt("a record of the key index cannot be decoded".into()));
    }
    let own = versions.first().filter(|version| version.revision == *revision);
    if own.is_none_or(|own| own.position != *position) {
        // Overwritten within its own revision; the row that did it takes care of the older ones.
        batch.delete(Table::Revision, row_key(*revision, *position));
        return Ok(());
    }
    let keeps_own = own.is_some_and(|own| !own.is_tombstone);
    for version in versions.iter().skip(usize::from(keeps_own)) {
        let mut index_key = user.clone();
        index_key.extend_from_slice(&descending(version.revision));
        batch.delete(Table::Index, index_key);
        batch.delete(Table::Revision, row_key(version.revision, version.position));
    }
    Ok(())
}
