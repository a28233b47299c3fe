//! A memory store that keeps what it was told to write and what was read of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use metcd::store::{KeyRange, KvStore, MemoryStore, Order, StoreError, Table, Visitor, WriteBatch};
use parking_lot::Mutex;

/// What was read of a table.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Reads {
    pub gets: usize,
    pub scans: usize,
    /// Records that the scans showed.
    pub rows: usize,
}

#[derive(Default)]
pub struct ObservedStore {
    store: MemoryStore,
    pub batches: Mutex<Vec<WriteBatch>>,
    reads: Mutex<BTreeMap<Table, Reads>>,
}

impl ObservedStore {
    /// What is read in the course of `step`, by table; one that is not touched is not there.
    pub fn reads_of<T>(&self, step: impl FnOnce() -> T) -> (T, BTreeMap<Table, Reads>) {
        self.reads.lock().clear();
        let done = step();
        (done, std::mem::take(&mut *self.reads.lock()))
    }
}

impl KvStore for ObservedStore {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Arc<[u8]>>, StoreError> {
        self.reads.lock().entry(table).or_default().gets += 1;
        self.store.get(table, key)
    }
    fn scan(&self, table: Table, range: KeyRange<'_>, order: Order, visit: Visitor<'_>) -> Result<(), StoreError> {
        let mut rows = 0;
        let scanned = self.store.scan(table, range, order, &mut |key, value| {
            rows += 1;
            visit(key, value)
        });
        let mut reads = self.reads.lock();
        let reads = reads.entry(table).or_default();
        reads.scans += 1;
        reads.rows += rows;
        scanned
    }
    fn write(&self, batch: WriteBatch) -> Result<(), StoreError> {
        self.batches.lock().push(batch.clone());
        self.store.write(batch)
    }
    fn sync(&self) -> Result<(), StoreError> {
        self.store.sync()
    }
    fn survives_crashes(&self) -> bool {
        self.store.survives_crashes()
    }
    fn keeps_records(&self) -> bool {
        self.store.keeps_records()
    }
    fn clear(&self) -> Result<(), StoreError> {
        self.store.clear()
    }
    fn bytes(&self) -> u64 {
        self.store.bytes()
    }
    fn backend(&self) -> &'static str {
        self.store.backend()
    }
}
