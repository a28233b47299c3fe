//! What a snapshot's records add up to, without a state of them.

use super::key::unescape;
use super::refound::Newest;
use super::{Record, StateError};

/// Number and digest of the keys that live at a snapshot's revision: the digest is that of `/v1/hash` at this revision.
#[derive(Debug, Default)]
pub struct ContentTally {
    keys: u64,
    hash: u128,
    newest: Newest,
    scratch: Vec<u8>,
}

impl ContentTally {
    /// Takes note of a record. Those of the index must come in the order of a snapshot: by key, the newest first.
    ///
    /// # Errors
    /// It cannot be decoded.
    pub fn note(&mut self, record: &Record) -> Result<(), StateError> {
        if let Some((escaped, version)) = self.newest.take(record)? {
            let key = unescape(escaped).ok_or_else(|| StateError::Corrupt("a key of the index cannot be decoded".into()))?;
            self.keys += 1;
            self.hash = self.hash.wrapping_add(version.digest(&key, &mut self.scratch));
        }
        Ok(())
    }

    /// How many keys there are.
    pub fn keys(&self) -> u64 {
        self.keys
    }

    /// Their digest.
    pub fn hash(&self) -> u128 {
        self.hash
    }
}
