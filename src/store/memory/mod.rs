//! The memory engine: the default store, and the one that the simulation runs on.
//!
//! A table is a map of *pages*, each one allocation with some dozens of packed records. Against a map of records this saves the
//! allocation, the pointer and the reference counts of every record: a million keys with values of 256 bytes fit in about 1.1 times
//! their own size. Values above 1 KiB are kept apart and shared with the readers.
//!
//! *Invariants*
//! - Each table has a read-write lock of its own. A writer holds the locks of all tables that its batch touches, so that a batch of up to
//!   [`OPS_PER_HOLD`] changes appears as one. A longer one lets waiting readers in between: it may be seen half done, by readers
//!   that look at records without regard to their revision.
//! - A scan holds the lock for [`RECORDS_PER_HOLD`] records at a time, and resumes behind the last one.
//! - Nobody waits for a lock while holding another, but the one writer, in the order of the tables.

mod page;
mod separator;
mod table;

use std::{
    ops::Bound,
    sync::Arc,
    sync::atomic::{AtomicU64, Ordering},
};

use parking_lot::{Mutex, RwLock, RwLockWriteGuard};

use super::{KeyRange, KvStore, Op, Order, StoreError, TABLES, Table, Visitor, WriteBatch, check_keys};
use table::Step;

/// Changes that one hold of the locks applies; bounds how long a reader waits for the writer.
const OPS_PER_HOLD: usize = 1024;
/// Records that one hold of the lock visits.
const RECORDS_PER_HOLD: usize = 256;

/// Room of a page of records that come in ascending order.
const LARGE_PAGE: u16 = 16 * 1024;
/// Room of a page of records that come in any order: finding and inserting one touches a few lines of cache, not half of 16 KiB.
const SMALL_PAGE: u16 = 4 * 1024;

/// See the module.
#[derive(Debug)]
pub struct MemoryStore {
    tables: [RwLock<table::Table>; TABLES.len()],
    /// Serialises writers, see the last invariant.
    writing: Mutex<()>,
    heap: AtomicU64,
}

impl MemoryStore {
    /// An empty store.
    pub fn new() -> MemoryStore {
        let room = |table| match table {
            Table::Revision => LARGE_PAGE,
            Table::Meta | Table::Index | Table::Lease | Table::LeaseKey | Table::Session | Table::Idempotency | Table::Member => SMALL_PAGE,
        };
        MemoryStore {
            tables: TABLES.map(|table| RwLock::new(table::Table::new(room(table)))),
            writing: Mutex::new(()),
            heap: AtomicU64::new(0),
        }
    }

    fn table(&self, table: Table) -> &RwLock<table::Table> {
        &self.tables[slot(table)]
    }

    /// Locks the tables that the batch touches, in the order of their tags.
    fn lock_touched(&self, batch: &WriteBatch) -> [Option<RwLockWriteGuard<'_, table::Table>>; TABLES.len()] {
        let mut touched = [false; TABLES.len()];
        for op in &batch.ops {
            touched[slot(op.table())] = true;
        }
        std::array::from_fn(|i| touched[i].then(|| self.tables[i].write()))
    }
}

impl Default for MemoryStore {
    fn default() -> MemoryStore {
        MemoryStore::new()
    }
}

/// Position of a table in arrays over [`TABLES`].
fn slot(table: Table) -> usize {
    table as usize - 1
}

impl KvStore for MemoryStore {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Arc<[u8]>>, StoreError> {
        Ok(self.table(table).read().get(key))
    }

    fn scan(&self, table: Table, range: KeyRange<'_>, order: Order, visit: Visitor<'_>) -> Result<(), StoreError> {
        let table = self.table(table);
        let mut step = table.read().scan(range, order, RECORDS_PER_HOLD, visit);
        while let Step::After(key) = step {
            let rest = match order {
                Order::Asc => (Bound::Excluded(key.as_slice()), range.1),
                Order::Desc => (range.0, Bound::Excluded(key.as_slice())),
            };
            step = table.read().scan(rest, order, RECORDS_PER_HOLD, visit);
        }
        Ok(())
    }

    fn write(&self, batch: WriteBatch) -> Result<(), StoreError> {
        check_keys(&batch)?;
        let _writing = self.writing.lock();
        let mut tables = self.lock_touched(&batch);
        let heap_before: usize = tables.iter().flatten().map(|table| table.heap()).sum();
        for (i, op) in batch.ops.iter().enumerate() {
            if i > 0 && i % OPS_PER_HOLD == 0 {
                tables.iter_mut().flatten().for_each(RwLockWriteGuard::bump);
            }
            let Some(table) = &mut tables[slot(op.table())] else { continue };
            match op {
                Op::Put { key, value, .. } => table.put(key, value),
                Op::Delete { key, .. } => table.delete(key),
            }
        }
        let heap_after: usize = tables.iter().flatten().map(|table| table.heap()).sum();
        let grown = (heap_after as u64).wrapping_sub(heap_before as u64);
        self.heap.fetch_add(grown, Ordering::Relaxed);
        Ok(())
    }

    fn sync(&self) -> Result<(), StoreError> {
        Ok(())
    }

    fn survives_crashes(&self) -> bool {
        false
    }

    fn keeps_records(&self) -> bool {
        false
    }

    fn clear(&self) -> Result<(), StoreError> {
        let _writing = self.writing.lock();
        let mut tables: Vec<_> = self.tables.iter().map(RwLock::write).collect();
        let old: Vec<_> = tables.iter_mut().map(|table| table.take()).collect();
        self.heap.store(0, Ordering::Relaxed);
        drop(tables);
        drop(old);
        Ok(())
    }

    fn bytes(&self) -> u64 {
        self.heap.load(Ordering::Relaxed)
    }

    fn backend(&self) -> &'static str {
        "memory"
    }
}
