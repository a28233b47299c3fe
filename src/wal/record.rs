//! The bytes of an entry record, of the meta record and of a unit, the same in every engine.
//!
//! An entry record is a 32-byte header and the entry as protobuf. Everything behind the CRC32C is covered by it; `prev` is the
//! chain hash of the record before, and the chain hash of a record is XXH3 over all but the CRC, so over `prev` too: two logs with
//! equal hashes at an index are equal up to it, and a record out of an older life of the log does not fit between its neighbours.
//!
//! The meta record says, in the same atomic unit as the entries, what the log must hold: hard state, start, last index and the last
//! chain hash, under a sequence number that grows with every unit and never falls.

use bytes::Bytes;
use protobuf::Message;
use raft::eraftpb::{Entry, HardState};
use xxhash_rust::xxh3::xxh3_64;

use super::{LogStart, WalError};

/// Bytes in front of the protobuf: CRC32C, length of the record, index, term, chain hash of the predecessor.
pub(crate) const HEADER_BYTES: usize = 32;
const META_BYTES: usize = 80;
const META_VERSION: u32 = 1;

/// A verified entry record.
pub(crate) struct Decoded {
    /// The entry.
    pub entry: Entry,
    /// Its protobuf size in bytes.
    pub size: u64,
    /// Chain hash of the record before.
    pub prev: u64,
    /// Chain hash of this record.
    pub chain: u64,
}

/// Encodes `entry` behind `prev`; returns the record and its chain hash.
pub(crate) fn encode_entry(entry: &Entry, prev: u64) -> Result<(Bytes, u64), WalError> {
    let payload_bytes = entry.compute_size() as usize;
    let total = HEADER_BYTES + payload_bytes;
    let length = u32::try_from(total).map_err(|_| WalError::Engine(format!("entry {} is larger than 4 GiB", entry.index)))?;
    let mut record = Vec::with_capacity(total);
    record.extend_from_slice(&[0; 4]);
    record.extend_from_slice(&length.to_le_bytes());
    record.extend_from_slice(&entry.index.to_le_bytes());
    record.extend_from_slice(&entry.term.to_le_bytes());
    record.extend_from_slice(&prev.to_le_bytes());
    entry
        .write_to_vec(&mut record)
        .map_err(|e| WalError::Engine(format!("entry {} cannot be encoded: {e}", entry.index)))?;
    let crc = crc32c::crc32c(&record[4..]);
    record[..4].copy_from_slice(&crc.to_le_bytes());
    let chain = xxh3_64(&record[4..]);
    Ok((Bytes::from(record), chain))
}

/// Length of the record that begins with `head`, if `head` holds so much of it.
pub(crate) fn record_length(head: &[u8]) -> Option<usize> {
    Some(u32::from_le_bytes(head.get(4..8)?.try_into().ok()?) as usize)
}

/// Verifies the record found at `index`.
pub(crate) fn decode_entry(index: u64, record: &[u8]) -> Result<Decoded, WalError> {
    let damaged = |what: &str| WalError::Corrupt(format!("entry {index}: {what}"));
    if record.len() < HEADER_BYTES || record_length(record) != Some(record.len()) {
        return Err(damaged("wrong length"));
    }
    let (header, payload) = record.split_at(HEADER_BYTES);
    let mut fields = Fields(header);
    let crc = fields.u32().unwrap_or_default();
    if crc != crc32c::crc32c(&record[4..]) {
        return Err(damaged("checksum differs"));
    }
    let _length = fields.u32();
    let (stored_index, stored_term, prev) = match (fields.u64(), fields.u64(), fields.u64()) {
        (Some(index), Some(term), Some(prev)) => (index, term, prev),
        _ => return Err(damaged("short header")),
    };
    let entry = Entry::parse_from_bytes(payload).map_err(|e| damaged(&format!("not an entry: {e}")))?;
    if stored_index != index || entry.index != index || entry.term != stored_term {
        return Err(damaged(&format!("the record is of index {stored_index}, term {stored_term}")));
    }
    Ok(Decoded {
        size: payload.len() as u64,
        prev,
        chain: xxh3_64(&record[4..]),
        entry,
    })
}

/// What the log holds after a unit.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Meta {
    /// Number of the unit; 0 is the empty log of a new directory.
    pub seq: u64,
    /// The hard state.
    pub hard_state: HardState,
    /// Where the log begins.
    pub start: LogStart,
    /// Chain hash at `start`.
    pub start_chain: u64,
    /// Index of the last entry, `start.index` if there is none.
    pub last_index: u64,
    /// Chain hash at `last_index`.
    pub last_chain: u64,
}

impl Meta {
    /// An empty log after `start`.
    pub(crate) fn empty(seq: u64, start: LogStart, hard_state: HardState) -> Self {
        let chain = genesis(start);
        Self {
            seq,
            hard_state,
            start,
            start_chain: chain,
            last_index: start.index,
            last_chain: chain,
        }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(META_BYTES);
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&META_VERSION.to_le_bytes());
        for field in [
            self.seq,
            self.hard_state.term,
            self.hard_state.vote,
            self.hard_state.commit,
            self.start.index,
            self.start.term,
            self.start_chain,
            self.last_index,
            self.last_chain,
        ] {
            out.extend_from_slice(&field.to_le_bytes());
        }
        let crc = crc32c::crc32c(&out[4..]);
        out[..4].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// `None` unless the bytes are exactly one intact meta record of this version.
    pub(crate) fn decode(raw: &[u8]) -> Option<Self> {
        if raw.len() != META_BYTES {
            return None;
        }
        let mut fields = Fields(raw);
        if fields.u32()? != crc32c::crc32c(&raw[4..]) || fields.u32()? != META_VERSION {
            return None;
        }
        let seq = fields.u64()?;
        let hard_state = HardState {
            term: fields.u64()?,
            vote: fields.u64()?,
            commit: fields.u64()?,
            ..HardState::default()
        };
        let start = LogStart {
            index: fields.u64()?,
            term: fields.u64()?,
        };
        Some(Self {
            seq,
            hard_state,
            start,
            start_chain: fields.u64()?,
            last_index: fields.u64()?,
            last_chain: fields.u64()?,
        })
    }
}

/// Chain hash of a log that begins after `start` and knows nothing older.
fn genesis(start: LogStart) -> u64 {
    let mut raw = [0; 16];
    raw[..8].copy_from_slice(&start.index.to_le_bytes());
    raw[8..].copy_from_slice(&start.term.to_le_bytes());
    xxh3_64(&raw)
}

/// What a unit removes before its records are put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Remove {
    /// Nothing.
    Nothing,
    /// Entries `from..=to`, the old end of the log.
    Suffix { from: u64, to: u64 },
    /// Entries up to and including `to`. An engine may do this later and in steps: the meta record has the new start already.
    Prefix { to: u64 },
    /// All entries.
    All,
}

/// One atomic change of a log: remove, then put, then the new meta record.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Unit {
    /// [`Meta::seq`] of `meta`.
    pub seq: u64,
    /// The encoded meta record.
    pub meta: Vec<u8>,
    /// What goes.
    pub remove: Remove,
    /// What comes: index and entry record, ascending.
    pub records: Vec<(u64, Bytes)>,
}

impl Unit {
    /// Appends the unit's bytes to `out`. No checksum: the frame around it has one.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let (kind, from, to) = match self.remove {
            Remove::Nothing => (0_u32, 0, 0),
            Remove::Suffix { from, to } => (1, from, to),
            Remove::Prefix { to } => (2, 0, to),
            Remove::All => (3, 0, 0),
        };
        out.extend_from_slice(&self.seq.to_le_bytes());
        out.extend_from_slice(&kind.to_le_bytes());
        out.extend_from_slice(&from.to_le_bytes());
        out.extend_from_slice(&to.to_le_bytes());
        out.extend_from_slice(&(self.meta.len() as u32).to_le_bytes());
        out.extend_from_slice(&self.meta);
        out.extend_from_slice(&(self.records.len() as u32).to_le_bytes());
        for (index, record) in &self.records {
            out.extend_from_slice(&index.to_le_bytes());
            out.extend_from_slice(&(record.len() as u32).to_le_bytes());
            out.extend_from_slice(record);
        }
    }

    /// `None` unless `raw` is exactly one unit.
    pub(crate) fn decode(raw: &[u8]) -> Option<Self> {
        let mut fields = Fields(raw);
        let seq = fields.u64()?;
        let (kind, from, to) = (fields.u32()?, fields.u64()?, fields.u64()?);
        let remove = match kind {
            0 => Remove::Nothing,
            1 => Remove::Suffix { from, to },
            2 => Remove::Prefix { to },
            3 => Remove::All,
            _ => return None,
        };
        let meta = fields.prefixed()?.to_vec();
        let count = fields.u32()?;
        let mut records = Vec::new();
        for _ in 0..count {
            let index = fields.u64()?;
            records.push((index, Bytes::copy_from_slice(fields.prefixed()?)));
        }
        fields.0.is_empty().then_some(Self {
            seq,
            meta,
            remove,
            records,
        })
    }
}

/// Little-endian fields off the front of a slice; `None` when it is too short.
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl<'a> Fields<'a> {
    pub(crate) fn take(&mut self, bytes: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(bytes)?;
        self.0 = rest;
        Some(head)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }

    fn prefixed(&mut self) -> Option<&'a [u8]> {
        let bytes = self.u32()? as usize;
        self.take(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(index: u64, term: u64, data: &[u8]) -> Entry {
        Entry {
            index,
            term,
            data: Bytes::copy_from_slice(data),
            ..Entry::default()
        }
    }

    #[test]
    fn an_entry_record_comes_back_and_every_flipped_bit_is_seen() {
        let (record, chain) = encode_entry(&entry(7, 3, b"hello"), 42).unwrap();
        let decoded = decode_entry(7, &record).unwrap();
        assert_eq!(
            (decoded.entry.data.as_ref(), decoded.prev, decoded.chain),
            (b"hello".as_ref(), 42, chain)
        );
        assert!(decode_entry(8, &record).is_err(), "a record under another index");
        for bit in 0..record.len() * 8 {
            let mut copy = record.to_vec();
            copy[bit / 8] ^= 1 << (bit % 8);
            assert!(decode_entry(7, &copy).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn the_chain_hash_covers_the_predecessor() {
        let one = encode_entry(&entry(7, 3, b"x"), 1).unwrap().1;
        let two = encode_entry(&entry(7, 3, b"x"), 2).unwrap().1;
        assert_ne!(one, two);
    }

    #[test]
    fn meta_and_unit_come_back_and_damage_is_seen() {
        let hard_state = HardState {
            term: 5,
            vote: 2,
            commit: 9,
            ..HardState::default()
        };
        let meta = Meta::empty(11, LogStart { index: 8, term: 4 }, hard_state);
        let raw = meta.encode();
        assert_eq!(Meta::decode(&raw), Some(meta));
        for bit in 0..raw.len() * 8 {
            let mut copy = raw.clone();
            copy[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Meta::decode(&copy), None, "bit {bit}");
        }
        let unit = Unit {
            seq: 11,
            meta: raw,
            remove: Remove::Suffix { from: 3, to: 9 },
            records: vec![(3, Bytes::from_static(b"r"))],
        };
        let mut out = Vec::new();
        unit.encode(&mut out);
        assert_eq!(Unit::decode(&out), Some(unit));
        for cut in 0..out.len() {
            assert_eq!(Unit::decode(&out[..cut]), None, "cut at {cut}");
        }
    }
}
