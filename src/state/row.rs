//! Records of the two revision tables.
//!
//! An index record says everything of a version but its value; a row of the revision table has the value too. Both leave out what is
//! zero or follows from the key, because a million of them are held.

use std::sync::Arc;

use bytes::Bytes;
use prost::encoding::{decode_varint, encode_varint};
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use super::StateError;
use super::outcome::KeyValue;

const TOMBSTONE: u8 = 1;
const HAS_POSITION: u8 = 2;
/// The key existed before: creation revision and version follow. Otherwise they are the row's own revision and 1.
const REWRITTEN: u8 = 4;
const HAS_LEASE: u8 = 8;

/// Counted for each version besides its key and value: about what its two records cost.
const VERSION_OVERHEAD: u64 = 64;

/// What the index knows of one version of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Version {
    pub(super) revision: u64,
    pub(super) position: u32,
    pub(super) create_revision: u64,
    pub(super) version: u64,
    pub(super) lease: u64,
    pub(super) value_len: u64,
    /// xxh3-64 of the value, so that the state hash can be updated without reading it again.
    pub(super) value_digest: u64,
    pub(super) is_tombstone: bool,
}

impl Version {
    /// A deletion.
    pub(super) fn tombstone(revision: u64, position: u32) -> Version {
        Version {
            revision,
            position,
            create_revision: 0,
            version: 0,
            lease: 0,
            value_len: 0,
            value_digest: 0,
            is_tombstone: true,
        }
    }

    /// The next version of a key after `old` (which is live, if there is one).
    pub(super) fn next(old: Option<&Version>, revision: u64, position: u32, value: &[u8], lease: u64) -> Version {
        Version {
            revision,
            position,
            create_revision: old.map_or(revision, |old| old.create_revision),
            version: old.map_or(1, |old| old.version + 1),
            lease,
            value_len: value.len() as u64,
            value_digest: xxh3_64(value),
            is_tombstone: false,
        }
    }

    fn flags(&self) -> u8 {
        let mut flags = 0;
        if self.is_tombstone {
            flags |= TOMBSTONE;
        } else if self.version != 1 || self.create_revision != self.revision {
            flags |= REWRITTEN;
        }
        if self.position != 0 {
            flags |= HAS_POSITION;
        }
        if self.lease != 0 {
            flags |= HAS_LEASE;
        }
        flags
    }

    /// The index record, written over `out`.
    pub(super) fn encode_index(&self, out: &mut Vec<u8>) {
        out.clear();
        out.push(self.flags());
        if self.position != 0 {
            encode_varint(u64::from(self.position), out);
        }
        self.encode_history(out);
        if !self.is_tombstone {
            encode_varint(self.value_len, out);
            out.extend_from_slice(&self.value_digest.to_le_bytes());
        }
    }

    /// The row of the revision table, written over `out`. `dead_bytes`: see [`Row::dead_bytes`].
    pub(super) fn encode_row(&self, key: &[u8], value: &[u8], dead_bytes: u64, out: &mut Vec<u8>) {
        out.clear();
        out.push(self.flags() & !HAS_POSITION);
        self.encode_history(out);
        encode_varint(dead_bytes, out);
        encode_varint(key.len() as u64, out);
        out.extend_from_slice(key);
        out.extend_from_slice(value);
    }

    fn encode_history(&self, out: &mut Vec<u8>) {
        let flags = self.flags();
        if flags & REWRITTEN != 0 {
            encode_varint(self.create_revision, out);
            encode_varint(self.version, out);
        }
        if flags & HAS_LEASE != 0 {
            encode_varint(self.lease, out);
        }
    }

    /// Reads an index record.
    pub(super) fn decode_index(revision: u64, record: &[u8]) -> Option<Version> {
        let (flags, mut rest) = record.split_first()?;
        let position = if flags & HAS_POSITION != 0 {
            u32::try_from(decode_varint(&mut rest).ok()?).ok()?
        } else {
            0
        };
        let (create_revision, version, lease) = decode_history(*flags, revision, &mut rest)?;
        if flags & TOMBSTONE != 0 {
            return Some(Version::tombstone(revision, position));
        }
        let value_len = decode_varint(&mut rest).ok()?;
        let value_digest = u64::from_le_bytes(rest.try_into().ok()?);
        Some(Version {
            revision,
            position,
            create_revision,
            version,
            lease,
            value_len,
            value_digest,
            is_tombstone: false,
        })
    }

    /// The key-value without its value, from the index alone.
    pub(super) fn without_value(&self, key: Bytes) -> KeyValue {
        KeyValue {
            key,
            value: Bytes::new(),
            create_revision: self.create_revision,
            mod_revision: self.revision,
            version: self.version,
            lease: self.lease,
        }
    }

    /// Bytes this version counts for in [`StateReader::logical_bytes`](super::StateReader::logical_bytes).
    pub(super) fn logical_size(&self, key: &[u8]) -> u64 {
        key.len() as u64 + self.value_len + VERSION_OVERHEAD
    }

    /// This version's part of the state hash, which is the wrapping sum over all live keys.
    pub(super) fn digest(&self, key: &[u8], scratch: &mut Vec<u8>) -> u128 {
        scratch.clear();
        for number in [self.create_revision, self.revision, self.version, self.lease, self.value_digest] {
            scratch.extend_from_slice(&number.to_le_bytes());
        }
        scratch.extend_from_slice(key);
        xxh3_128(scratch)
    }
}

fn decode_history(flags: u8, revision: u64, rest: &mut &[u8]) -> Option<(u64, u64, u64)> {
    let (mut create_revision, mut version, mut lease) = (revision, 1, 0);
    if flags & REWRITTEN != 0 {
        create_revision = decode_varint(rest).ok()?;
        version = decode_varint(rest).ok()?;
    }
    if flags & HAS_LEASE != 0 {
        lease = decode_varint(rest).ok()?;
    }
    Some((create_revision, version, lease))
}

/// A decoded row of the revision table; key and value are slices of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Row<'a> {
    pub(super) key: &'a [u8],
    pub(super) value: &'a [u8],
    pub(super) create_revision: u64,
    pub(super) version: u64,
    pub(super) lease: u64,
    pub(super) is_tombstone: bool,
    /// Logical bytes of all versions that a compaction at this row's revision makes forgettable, counted from the beginning of the
    /// store. Thus a compaction knows what it frees without looking at every row.
    pub(super) dead_bytes: u64,
}

impl<'a> Row<'a> {
    /// Reads a row.
    pub(super) fn decode(revision: u64, record: &'a [u8]) -> Option<Row<'a>> {
        let (flags, mut rest) = record.split_first()?;
        let (create_revision, version, lease) = decode_history(*flags, revision, &mut rest)?;
        let dead_bytes = decode_varint(&mut rest).ok()?;
        let key_len = usize::try_from(decode_varint(&mut rest).ok()?).ok()?;
        let (key, value) = rest.split_at_checked(key_len)?;
        Some(Row {
            key,
            value,
            create_revision,
            version,
            lease,
            is_tombstone: flags & TOMBSTONE != 0,
            dead_bytes,
        })
    }

    /// As [`decode`](Self::decode), with the error that stops the node.
    pub(super) fn checked(revision: u64, record: &'a [u8]) -> Result<Row<'a>, StateError> {
        Row::decode(revision, record).ok_or_else(|| StateError::Corrupt(format!("a row of revision {revision} cannot be decoded")))
    }
}

/// The key-value of a row, sharing its memory. A tombstone has its key and revision only.
pub(super) fn key_value(revision: u64, record: &Bytes) -> Result<KeyValue, StateError> {
    let row = Row::checked(revision, record)?;
    let (key, value) = (record.slice_ref(row.key), record.slice_ref(row.value));
    let live = !row.is_tombstone;
    Ok(KeyValue {
        key,
        value,
        create_revision: if live { row.create_revision } else { 0 },
        mod_revision: revision,
        version: if live { row.version } else { 0 },
        lease: row.lease,
    })
}

/// A record as bytes that share it.
pub(super) fn share(record: Arc<[u8]>) -> Bytes {
    Bytes::from_owner(record)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn records_of_a_version_decode_to_it(
            position: u32, created in 1u64..9, later in 0u64..9, version in 1u64..9, lease in prop_oneof![Just(0u64), any::<u64>()],
            key: Vec<u8>, value: Vec<u8>, dead: u64,
        ) {
            let version = Version {
                revision: created + later, position, create_revision: created, version, lease,
                value_len: value.len() as u64, value_digest: xxh3_64(&value), is_tombstone: false,
            };
            let mut record = Vec::new();
            version.encode_index(&mut record);
            prop_assert_eq!(Version::decode_index(version.revision, &record), Some(version));
            version.encode_row(&key, &value, dead, &mut record);
            let row = Row::decode(version.revision, &record).unwrap();
            prop_assert_eq!((row.key, row.value, row.dead_bytes), (&key[..], &value[..], dead));
            prop_assert_eq!((row.create_revision, row.version, row.lease), (version.create_revision, version.version, lease));
        }

        #[test]
        fn damaged_records_are_refused_not_panicked_on(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            let _ = Version::decode_index(5, &bytes);
            let _ = Row::decode(5, &bytes);
        }
    }

    #[test]
    fn a_tombstone_decodes_to_one() {
        let tombstone = Version::tombstone(7, 3);
        let mut record = Vec::new();
        tombstone.encode_index(&mut record);
        assert_eq!(Version::decode_index(7, &record), Some(tombstone));
        tombstone.encode_row(b"k", b"", 9, &mut record);
        assert!(Row::decode(7, &record).is_some_and(|row| row.is_tombstone && row.key == b"k"));
    }
}
