//! See [`crate::fuzzing`].

use std::sync::Arc;

use super::{
    CHUNK, HEADER, HeaderRecord, MAGIC, Message, SnapshotReader, SnapshotWriter, TRAILER, TrailerRecord, load, push_frame, verify,
};
use crate::state::State;
use crate::store::MemoryStore;

/// A stream as it comes; then one with checksums that fit, whose header and records are the input.
pub(crate) fn snapshot_stream(data: &[u8]) {
    install(data);
    if let Some(stream) = sealed(data) {
        install(&stream);
    }
}

/// Verifies it, loads it, opens the state on it and writes it again.
fn install(stream: &[u8]) {
    let Ok(meta) = SnapshotReader::new(stream).and_then(verify) else {
        return;
    };
    let store = Arc::new(MemoryStore::new());
    let loaded = SnapshotReader::new(stream).and_then(|reader| load(reader, store.as_ref()));
    assert!(loaded.is_ok(), "what verifies can be loaded");
    let Ok(state) = State::open(store) else { return };
    let mut writer = SnapshotWriter::new(state.snapshot_view());
    let mut again = Vec::new();
    while let Ok(Some(piece)) = writer.next_chunk() {
        again.extend_from_slice(&piece);
    }
    drop((meta, SnapshotReader::new(&again[..]).map(verify)));
}

/// Length of the header (u16), header, records: framed as a writer does.
fn sealed(data: &[u8]) -> Option<Vec<u8>> {
    let (length, rest) = data.split_first_chunk::<2>()?;
    let (header, records) = rest.split_at_checked(usize::from(u16::from_le_bytes(*length)))?;
    let mut stream = MAGIC.to_vec();
    push_frame(&mut stream, HEADER, header).ok()?;
    push_frame(&mut stream, CHUNK, records).ok()?;
    // As many as the reader will count.
    let mut rest = records;
    let count = std::iter::from_fn(|| super::read_record(&mut rest)).count();
    let trailer = TrailerRecord {
        chunks: 1,
        records: count as u64,
        blake3: blake3::hash(&stream).as_bytes().to_vec().into(),
    };
    push_frame(&mut stream, TRAILER, &trailer.encode_to_vec()).ok()?;
    // A header that cannot be decoded is refused before anything else is looked at.
    HeaderRecord::decode(header).ok().map(|_| stream)
}
