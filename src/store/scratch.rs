//! A store for a tool that rearranges a whole content once: on disk, so that its size is not the tool's memory, and gone with the tool.
//!
//! Nothing in it is durable, and it says so ([`KvStore::survives_crashes`]): what is made of it is a snapshot file.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::sled::SledStore;
use super::{KeyRange, KvStore, Order, StoreError, Table, Visitor, WriteBatch};

/// Pages in memory: less than a server's, because a tool goes over everything once.
const CACHE_BYTES: u64 = 16 << 20;

/// See the module. Fields are dropped in order: the engine before its files.
#[derive(Debug)]
pub struct Scratch {
    inner: SledStore,
    _dir: Removed,
}

/// A directory that goes with its owner.
#[derive(Debug)]
struct Removed(PathBuf);

impl Scratch {
    /// An empty store in `dir`, which is removed with it. What an earlier one left there is removed first.
    ///
    /// # Errors
    /// The directory cannot be made or written.
    pub fn create(dir: &Path) -> Result<Arc<Scratch>, StoreError> {
        remove(dir).map_err(|source| StoreError::Io {
            what: format!("removing {}", dir.display()),
            source,
        })?;
        Ok(Arc::new(Scratch {
            inner: SledStore::open(dir, CACHE_BYTES)?,
            _dir: Removed(dir.to_owned()),
        }))
    }
}

fn remove(dir: &Path) -> std::io::Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

impl Drop for Removed {
    fn drop(&mut self) {
        // What cannot be removed now is removed by the next tool that works here.
        let _ = remove(&self.0);
    }
}

impl KvStore for Scratch {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Arc<[u8]>>, StoreError> {
        self.inner.get(table, key)
    }

    fn scan(&self, table: Table, range: KeyRange<'_>, order: Order, visit: Visitor<'_>) -> Result<(), StoreError> {
        self.inner.scan(table, range, order, visit)
    }

    fn write(&self, batch: WriteBatch) -> Result<(), StoreError> {
        self.inner.write(batch)
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
        self.inner.clear()
    }

    fn bytes(&self) -> u64 {
        self.inner.bytes()
    }

    fn backend(&self) -> &'static str {
        "scratch"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_begins_empty_and_leaves_nothing_behind() {
        let parent = tempfile::tempdir().expect("tempdir");
        let dir = parent.path().join("scratch");
        std::fs::create_dir(&dir).expect("create");
        std::fs::write(dir.join("left"), b"over").expect("write");
        let scratch = Scratch::create(&dir).expect("create");
        let mut batch = WriteBatch::default();
        batch.put(Table::Meta, b"k".to_vec(), b"v".to_vec());
        scratch.write(batch).expect("write");
        assert_eq!(scratch.get(Table::Meta, b"k").expect("get").as_deref(), Some(&b"v"[..]));
        assert!(!scratch.survives_crashes() && !scratch.keeps_records() && !dir.join("left").exists());
        drop(scratch);
        assert!(!dir.exists());
    }
}
