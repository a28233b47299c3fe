//! Snapshots: complete, equal, checked, and consistent while the state goes on.

use std::io::Cursor;
use std::sync::Arc;

use metcd::snapshot::{SnapshotError, SnapshotReader, SnapshotWriter, install, verify_file, write_file};
use metcd::state::command::{Body, Compact, LeaseGrant, Put};
use metcd::state::{Record, State};
use metcd::store::{KvStore, MemoryStore, Table};

use crate::support::{CLUSTER, Node, delete, idempotency, put};

/// A state with something in every table.
fn populated() -> Node {
    let mut node = Node::new();
    node.run(Body::LeaseGrant(LeaseGrant { ttl_ms: 5000, id: 0 }));
    for n in 0..300u32 {
        let value = vec![n as u8; 2000];
        node.run(Body::Put(Put {
            lease: u64::from(n % 3 == 0),
            ..put(&(n % 50).to_be_bytes(), &value)
        }));
    }
    node.run_with(delete(&7u32.to_be_bytes()), idempotency("retry", b"f", 10));
    node.run(Body::Compact(Compact { revision: 120 }));
    node
}

fn stream(state: &State) -> Vec<u8> {
    let mut writer = SnapshotWriter::new(state.snapshot_view());
    let mut bytes = Vec::new();
    while let Some(piece) = writer.next_chunk().unwrap() {
        bytes.extend_from_slice(&piece);
    }
    bytes
}

fn read(bytes: &[u8]) -> Result<Vec<Record>, SnapshotError> {
    let mut reader = SnapshotReader::new(Cursor::new(bytes))?;
    let mut all = Vec::new();
    while let Some(records) = reader.next_records()? {
        all.extend(records);
    }
    Ok(all)
}

#[test]
fn an_installed_snapshot_is_the_state_it_was_made_of() {
    let node = populated();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    let written = write_file(node.state.snapshot_view(), &path).unwrap();
    assert_eq!(verify_file(&path).unwrap(), written);
    assert_eq!(
        (written.cluster_id, &written.applied, written.revision),
        (CLUSTER, &node.state.applied(), node.reader().revision())
    );

    let store = Arc::new(MemoryStore::new());
    let mut garbage = metcd::store::WriteBatch::default();
    garbage.put(Table::Member, b"\x01whatever".to_vec(), Vec::new());
    store.write(garbage).unwrap();
    assert_eq!(install(&path, &*store).unwrap(), written);
    let copy = State::open(store).unwrap();
    let (copied, original) = (copy.reader(), node.reader());
    assert_eq!(copied.hash(None).unwrap(), original.hash(None).unwrap());
    assert_eq!(copied.recompute_hash(150).unwrap(), original.recompute_hash(150).unwrap());
    assert_eq!(crate::support::records_of(&copy), node.records());
    assert_eq!(
        (copied.leases(), copied.members(), copied.idempotency_len()),
        (original.leases(), original.members(), 1)
    );
    assert_eq!(copied.logical_bytes(), original.logical_bytes());
}

#[test]
fn every_table_is_in_a_snapshot() {
    let records = populated().records();
    for table in metcd::store::TABLES {
        assert!(records.iter().any(|record| record.table == table), "nothing of {table:?}");
    }
}

#[test]
fn a_view_stays_what_it_was_while_the_state_is_written_compacted_and_collected() {
    let mut node = populated();
    let expected = node.records();
    let mut view = node.state.snapshot_view();
    let mut seen = Vec::new();
    while let Some(records) = view.next_records(4000).unwrap() {
        seen.extend(records);
        node.put(&(seen.len() as u32 % 50).to_be_bytes(), b"later");
        node.run(delete(&((seen.len() as u32 + 13) % 50).to_be_bytes()));
        node.run(Body::Compact(Compact {
            revision: node.reader().revision(),
        }));
        node.collect_all_garbage();
    }
    assert_eq!(seen.len(), expected.len());
    assert!(seen.iter().all(|record| expected.contains(record)));
}

#[test]
fn a_chunk_is_bounded() {
    let node = populated();
    let mut writer = SnapshotWriter::new(node.state.snapshot_view());
    let mut pieces = 0;
    while let Some(piece) = writer.next_chunk().unwrap() {
        assert!(piece.len() <= metcd::snapshot::CHUNK_BYTES + 8192, "{} bytes", piece.len());
        pieces += 1;
    }
    assert!(pieces >= 4, "{pieces} pieces");
}

#[test]
fn a_truncated_snapshot_is_refused_wherever_it_ends() {
    let bytes = stream(&populated().state);
    assert!(read(&bytes).is_ok());
    for end in (0..bytes.len()).step_by(997).chain(bytes.len() - 60..bytes.len()) {
        assert!(
            matches!(read(&bytes[..end]), Err(SnapshotError::Corrupt(_))),
            "cut at {end} of {}",
            bytes.len()
        );
    }
}

#[test]
fn an_altered_snapshot_is_refused_whichever_bit_it_is() {
    let mut bytes = stream(&populated().state);
    for at in (0..bytes.len()).step_by(1009).chain(0..80).chain(bytes.len() - 60..bytes.len()) {
        bytes[at] ^= 0x10;
        assert!(read(&bytes).is_err(), "byte {at}");
        bytes[at] ^= 0x10;
    }
    bytes.push(0);
    assert!(matches!(read(&bytes), Err(SnapshotError::Corrupt(_))));
}

#[test]
fn a_damaged_file_leaves_the_store_as_it_was() {
    let node = populated();
    let before = node.records();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("snapshot");
    write_file(node.state.snapshot_view(), &path).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    assert!(install(&path, &*node.store).is_err());
    assert_eq!(crate::support::records_of(&State::open(node.store.clone()).unwrap()), before);
}

#[test]
fn writing_a_file_leaves_no_temporary_one() {
    let directory = tempfile::tempdir().unwrap();
    write_file(populated().state.snapshot_view(), &directory.path().join("snapshot")).unwrap();
    let names: Vec<_> = std::fs::read_dir(directory.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["snapshot"]);
}
