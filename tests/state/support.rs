//! A log in miniature: commands become entries, entries are applied.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::FutureExt;
use metcd::state::command::{
    Body, Command, Delete, DeleteRange, EntryPayload, FEATURE_LEVEL, Idempotency, KeySpan, MemberRecord, Put, Stamp,
};
use metcd::state::outcome::{Outcome, Refusal, Success};
use metcd::state::reader::RangeQuery;
use metcd::state::watch::{Change, WatchFilter, Watcher};
use metcd::state::{Record, State, StateReader};
use metcd::store::KvStore;
use metcd::store::MemoryStore;
use prost::Message;
use raft::eraftpb::Entry;

pub const TERM: u64 = 3;
pub const CLUSTER: u64 = 77;

pub fn member(id: u64) -> MemberRecord {
    MemberRecord {
        id,
        peer_url: format!("http://127.0.0.1:{}", 2000 + id),
        feature_level: FEATURE_LEVEL,
        ..MemberRecord::default()
    }
}

pub fn payload(member: u64, boot: u64, low_water: u64, commands: Vec<Command>) -> EntryPayload {
    EntryPayload {
        feature_level: FEATURE_LEVEL,
        member,
        boot,
        low_water,
        commands,
    }
}

pub fn entry(index: u64, stamp_ms: u64, payload: &EntryPayload) -> Entry {
    let mut entry = Entry::default();
    (entry.index, entry.term) = (index, TERM);
    entry.data = payload.encode_to_vec().into();
    entry.context = Stamp(stamp_ms).encode();
    entry
}

pub fn command(seq: u64, body: Body) -> Command {
    Command {
        seq,
        idempotency: None,
        body: Some(body),
    }
}

pub fn put(key: &[u8], value: &[u8]) -> Put {
    Put {
        key: Bytes::copy_from_slice(key),
        value: Bytes::copy_from_slice(value),
        ..Put::default()
    }
}

pub fn delete(key: &[u8]) -> Body {
    Body::Delete(Delete {
        key: Bytes::copy_from_slice(key),
        ..Delete::default()
    })
}

pub fn delete_prefix(prefix: &[u8]) -> Body {
    Body::DeleteRange(DeleteRange {
        span: KeySpan::prefix(prefix),
        max_keys: 0,
    })
}

pub fn idempotency(key: &str, fingerprint: &'static [u8], max_entries: u64) -> Idempotency {
    Idempotency {
        key: key.into(),
        fingerprint: Bytes::from_static(fingerprint),
        max_entries,
        max_bytes: 0,
    }
}

/// A state over a memory store, with the index and sequence that come next.
pub struct Node {
    pub store: Arc<dyn KvStore>,
    pub state: State,
    pub seq: u64,
    pub time_ms: u64,
}

impl Node {
    pub fn new() -> Node {
        Node::of(Arc::new(MemoryStore::new()), &[1, 2, 3])
    }

    pub fn of(store: Arc<dyn KvStore>, members: &[u64]) -> Node {
        let mut state = State::open(store.clone()).unwrap();
        let members: Vec<MemberRecord> = members.iter().map(|id| member(*id)).collect();
        state.bootstrap(CLUSTER, &members).unwrap();
        Node {
            store,
            state,
            seq: 1,
            time_ms: 1000,
        }
    }

    pub fn reader(&self) -> StateReader {
        self.state.reader()
    }

    pub fn next_index(&self) -> u64 {
        self.state.applied().index + 1
    }

    /// Applies one payload as the next entry.
    pub fn apply(&mut self, payload: &EntryPayload) -> Vec<Outcome> {
        self.time_ms += 10;
        let entry = entry(self.next_index(), self.time_ms, payload);
        self.state
            .apply(&[entry])
            .unwrap()
            .into_iter()
            .map(|(_, outcome)| outcome)
            .collect()
    }

    /// Applies one command of member 1 as the next entry.
    pub fn run(&mut self, body: Body) -> Outcome {
        self.run_command(|seq| command(seq, body))
    }

    pub fn run_with(&mut self, body: Body, idempotency: Idempotency) -> Outcome {
        self.run_command(|seq| Command {
            idempotency: Some(idempotency),
            ..command(seq, body)
        })
    }

    fn run_command(&mut self, make: impl FnOnce(u64) -> Command) -> Outcome {
        let command = make(self.seq);
        let outcome = self.apply(&payload(1, 1, self.seq, vec![command])).pop().unwrap();
        self.seq += 1;
        outcome
    }

    pub fn put(&mut self, key: &[u8], value: &[u8]) -> Outcome {
        self.run(Body::Put(put(key, value)))
    }

    /// The value of a key now.
    pub fn value(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.reader().get(key, None).unwrap().1.map(|kv| kv.value.to_vec())
    }

    pub fn collect_all_garbage(&mut self) {
        while self.state.collect_garbage(3).unwrap() {}
    }

    pub fn records(&self) -> Vec<Record> {
        records_of(&self.state)
    }
}

/// Everything a snapshot of the state holds.
pub fn records_of(state: &State) -> Vec<Record> {
    let mut view = state.snapshot_view();
    let mut all = Vec::new();
    while let Some(records) = view.next_records(100).unwrap() {
        all.extend(records);
    }
    all
}

pub fn all_keys() -> RangeQuery {
    RangeQuery {
        span: KeySpan::prefix(b""),
        revision: None,
        limit: 1000,
        after: None,
        descending: false,
        keys_only: false,
        count_only: false,
        with_count: false,
        max_bytes: usize::MAX,
    }
}

pub fn everything(want_prev: bool) -> WatchFilter {
    WatchFilter {
        span: KeySpan::prefix(b""),
        puts: true,
        deletes: true,
        want_prev,
    }
}

/// All that a watcher has to say now, without waiting for more.
pub fn drain(watcher: &mut Watcher) -> Vec<Change> {
    let mut changes = Vec::new();
    loop {
        let before = watcher.position();
        match watcher.next().now_or_never() {
            Some(next) => changes.extend(next.unwrap()),
            None if watcher.position() == before => return changes,
            None => {}
        }
    }
}

pub fn created(outcome: &Outcome) -> bool {
    matches!(outcome.result, Ok(Success::Put { created: true, .. }))
}

pub fn refusal(outcome: &Outcome) -> Option<&Refusal> {
    outcome.result.as_ref().err()
}
