//! See [`crate::fuzzing`].

use std::sync::Arc;

use raft::eraftpb::{Entry, EntryType};

use super::State;
use super::command::{MemberRecord, Stamp};
use crate::store::MemoryStore;

/// Entries of the log: two states apply them, one by one and all at once, and must agree. An entry is its length (u16, whose highest bit
/// makes it a configuration change) and its data.
pub(crate) fn commands(data: &[u8]) {
    let entries = entries(data);
    let (Some(mut one_by_one), Some(mut at_once)) = (founded(), founded()) else {
        return;
    };
    for entry in &entries {
        if entry.get_entry_type() == EntryType::EntryNormal {
            if one_by_one.apply(std::slice::from_ref(entry)).is_err() {
                return;
            }
        } else {
            // What raft would make of it is not asked here: it must only not panic.
            let _ = one_by_one.begin_conf(entry);
            return;
        }
    }
    assert!(
        at_once.apply(&entries).is_ok(),
        "what can be applied one by one can be applied at once"
    );
    let hash = |state: &State| state.reader().hash(None).ok();
    assert_eq!(hash(&one_by_one), hash(&at_once));
    // Whatever was applied can be read and collected.
    assert!(at_once.collect_garbage(1000).is_ok());
    assert_eq!(hash(&one_by_one), hash(&at_once));
}

fn entries(mut data: &[u8]) -> Vec<Entry> {
    let mut entries = Vec::new();
    while let Some((head, rest)) = data.split_first_chunk::<2>() {
        let head = u16::from_le_bytes(*head);
        let (content, after) = rest.split_at(usize::from(head & 0x7fff).min(rest.len()));
        data = after;
        let index = 2 + entries.len() as u64;
        let mut entry = Entry {
            index,
            term: 2,
            data: content.to_vec().into(),
            context: Stamp(index * 500).encode(),
            ..Entry::default()
        };
        if head & 0x8000 != 0 {
            entry.set_entry_type(EntryType::EntryConfChangeV2);
        }
        entries.push(entry);
    }
    entries
}

fn founded() -> Option<State> {
    let member = |id: u64| MemberRecord {
        id,
        peer_url: format!("http://machine-{id}:3380"),
        ..MemberRecord::default()
    };
    let mut state = State::open(Arc::new(MemoryStore::new())).ok()?;
    state.bootstrap(7, &[member(1), member(2), member(3)]).ok()?;
    Some(state)
}
