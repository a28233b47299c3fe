//! See [`crate::fuzzing`].

use super::record::{self, Meta, Unit};

/// An entry record, a meta record and a unit: as they come, and behind a checksum that fits.
pub(crate) fn wal_records(data: &[u8]) {
    let Some((index, payload)) = data.split_first_chunk::<8>() else {
        return;
    };
    let index = u64::from_le_bytes(*index);
    read_entry(index, payload);
    read_entry(index, &sealed_entry(index, payload));
    // It must only not panic.
    let _ = Meta::decode(payload);
    if let Some(meta) = Meta::decode(&sealed(payload)) {
        assert_eq!(Meta::decode(&meta.encode()), Some(meta));
    }
    if let Some(unit) = Unit::decode(payload) {
        let mut again = Vec::new();
        unit.encode(&mut again);
        assert_eq!(Unit::decode(&again), Some(unit));
    }
}

fn read_entry(index: u64, bytes: &[u8]) {
    let Ok(decoded) = record::decode_entry(index, bytes) else { return };
    assert_eq!(decoded.entry.index, index);
    let Ok((again, _)) = record::encode_entry(&decoded.entry, decoded.prev) else {
        return;
    };
    assert!(record::decode_entry(index, &again).is_ok_and(|read| read.entry == decoded.entry && read.prev == decoded.prev));
}

/// Checksum in front.
fn sealed(content: &[u8]) -> Vec<u8> {
    let mut bytes = crc32c::crc32c(content).to_le_bytes().to_vec();
    bytes.extend_from_slice(content);
    bytes
}

/// A record of this index whose term and content are `payload`.
fn sealed_entry(index: u64, payload: &[u8]) -> Vec<u8> {
    let (term, content) = payload.split_first_chunk::<8>().unwrap_or((&[0; 8], payload));
    let mut rest = ((record::HEADER_BYTES + content.len()) as u32).to_le_bytes().to_vec();
    rest.extend_from_slice(&index.to_le_bytes());
    rest.extend_from_slice(term);
    rest.extend_from_slice(&[7; 8]);
    rest.extend_from_slice(content);
    sealed(&rest)
}
