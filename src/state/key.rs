//! Keys of the two revision tables.
//!
//! *Invariants*
//! - [`Table::Index`](crate::store::Table::Index): the byte order of index keys is (user key, revision descending). So all versions of one
//!   user key are neighbours, the newest first, and "newest at or below R" is one forward seek.
//! - A zero byte of a user key is written as `00 FF` and the key ends with `00 01`: no index key's user part is a prefix of another's.
//! - [`Table::Revision`](crate::store::Table::Revision): (revision, position) big endian: the order in which things happened.

use std::ops::Bound;

use super::command::KeySpan;

const ZERO: u8 = 0x00;
const ESCAPED_ZERO: u8 = 0xff;
const END: u8 = 0x01;
/// Bytes of the revision at the end of an index key.
pub(super) const REVISION_LEN: usize = 8;
/// Bytes of a key of the revision table.
pub(super) const ROW_KEY_LEN: usize = 12;

/// Appends the escaped user key with its end mark.
pub(super) fn push_escaped(out: &mut Vec<u8>, key: &[u8]) {
    for (n, part) in key.split(|byte| *byte == ZERO).enumerate() {
        if n > 0 {
            out.extend_from_slice(&[ZERO, ESCAPED_ZERO]);
        }
        out.extend_from_slice(part);
    }
    out.extend_from_slice(&[ZERO, END]);
}

/// The user part of `key`'s index keys.
pub(super) fn escaped(key: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(key.len() + 2 + REVISION_LEN);
    push_escaped(&mut out, key);
    out
}

/// The user key of an escaped part with its end mark.
pub(super) fn unescape(escaped: &[u8]) -> Option<Vec<u8>> {
    let body = escaped.strip_suffix(&[ZERO, END])?;
    let mut out = Vec::with_capacity(body.len());
    let mut rest = body;
    while let Some(zero) = rest.iter().position(|byte| *byte == ZERO) {
        out.extend_from_slice(&rest[..zero]);
        out.push(ZERO);
        rest = rest[zero + 1..].strip_prefix(&[ESCAPED_ZERO])?;
    }
    out.extend_from_slice(rest);
    Some(out)
}

/// The revision part of an index key.
pub(super) fn descending(revision: u64) -> [u8; REVISION_LEN] {
    (!revision).to_be_bytes()
}

/// The end of a user key's index keys: behind all of its versions, and before every other key's. Whoever looks for one key stops here. An
/// engine that keeps deleted records for a while would otherwise go through all that were deleted behind it, to the next one that is there.
pub(super) fn last_of(user: &[u8]) -> Vec<u8> {
    [user, &descending(0)].concat()
}

/// Splits an index key into its escaped user part and its revision.
pub(super) fn split_index_key(index_key: &[u8]) -> Option<(&[u8], u64)> {
    let (user, revision) = index_key.split_last_chunk::<REVISION_LEN>()?;
    Some((user, !u64::from_be_bytes(*revision)))
}

/// The key of a row of the revision table.
pub(super) fn row_key(revision: u64, position: u32) -> [u8; ROW_KEY_LEN] {
    let mut out = [0; ROW_KEY_LEN];
    out[..8].copy_from_slice(&revision.to_be_bytes());
    out[8..].copy_from_slice(&position.to_be_bytes());
    out
}

/// The parts of a key of the revision table.
pub(super) fn split_row_key(row_key: &[u8]) -> Option<(u64, u32)> {
    let (revision, position) = row_key.split_first_chunk::<8>()?;
    Some((u64::from_be_bytes(*revision), u32::from_be_bytes(position.try_into().ok()?)))
}

/// A span of user keys as bounds of the index.
#[derive(Debug, Clone)]
pub(super) struct IndexSpan {
    pub(super) lower: Bound<Vec<u8>>,
    pub(super) upper: Bound<Vec<u8>>,
}

impl IndexSpan {
    /// The bounds of `span`; with `after`, only what follows it in the direction of the order.
    pub(super) fn new(span: &KeySpan, after: Option<&[u8]>, is_descending: bool) -> IndexSpan {
        let mut lower = Bound::Included(escaped(&span.start));
        let mut upper = span.end.as_ref().map_or(Bound::Unbounded, |end| Bound::Excluded(escaped(end)));
        match after {
            Some(after) if is_descending => {
                if span.end.as_ref().is_none_or(|end| after < &end[..]) {
                    upper = Bound::Excluded(escaped(after));
                }
            }
            Some(after) if after >= &span.start[..] => {
                let mut bound = escaped(after);
                bound.extend_from_slice(&descending(0));
                lower = Bound::Excluded(bound);
            }
            Some(_) | None => {}
        }
        IndexSpan { lower, upper }
    }

    /// Whether no key can lie within. Engines may refuse inverted bounds, so callers ask first.
    pub(super) fn is_empty(&self) -> bool {
        match (&self.lower, &self.upper) {
            (Bound::Included(low), Bound::Excluded(high)) | (Bound::Excluded(low), Bound::Excluded(high)) => low >= high,
            _ => false,
        }
    }
}

/// Borrows a bound.
pub(super) fn as_bound(bound: &Bound<Vec<u8>>) -> Bound<&[u8]> {
    match bound {
        Bound::Included(key) => Bound::Included(key),
        Bound::Excluded(key) => Bound::Excluded(key),
        Bound::Unbounded => Bound::Unbounded,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn index_key(key: &[u8], revision: u64) -> Vec<u8> {
        let mut out = escaped(key);
        out.extend_from_slice(&descending(revision));
        out
    }

    fn small_key() -> impl Strategy<Value = Vec<u8>> {
        proptest::collection::vec(prop_oneof![Just(0u8), Just(1u8), Just(0xffu8), any::<u8>()], 0..6)
    }

    proptest! {
        #[test]
        fn index_keys_sort_by_user_key_then_newest_first(a in small_key(), b in small_key(), ra: u64, rb: u64) {
            let expected = a.cmp(&b).then(rb.cmp(&ra));
            prop_assert_eq!(index_key(&a, ra).cmp(&index_key(&b, rb)), expected);
        }

        #[test]
        fn any_key_survives_escaping(key in small_key(), revision: u64) {
            let encoded = index_key(&key, revision);
            let (user, found) = split_index_key(&encoded).unwrap();
            prop_assert_eq!(unescape(user), Some(key));
            prop_assert_eq!(found, revision);
        }

        #[test]
        fn damaged_index_keys_are_refused_not_panicked_on(bytes in proptest::collection::vec(any::<u8>(), 0..20)) {
            if let Some((user, _)) = split_index_key(&bytes) {
                let _ = unescape(user);
            }
        }
    }
}
