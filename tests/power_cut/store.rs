//! The same for the disk stores: batches as fast as they go, made durable now and then, and every batch a function of a seed and its number.
//!
//! A store that survives crashes is synced, as before the log is cut: what a sync covered must be there afterwards, and of what came later any
//! number of whole batches. Any other is closed, left so for a moment, and opened again: afterwards it must be exactly as at a close that
//! was not before the last one acknowledged, or empty.

use std::{collections::BTreeMap, io::Write, ops::Bound, ops::ControlFlow, path::Path, sync::Arc, time::Duration};

use metcd::{
    config::StoreBackend,
    store::{self, KvStore, Order, StoreError, Table, WriteBatch},
};

use super::Random;

const KEYS: u64 = 3_000;
const COUNTER: &[u8] = b"batch";

/// The store behind a name such as `store-sled`; `None` if it is no store's.
pub fn backend(engine: &str) -> Option<StoreBackend> {
    match engine {
        "store-sled" => Some(StoreBackend::Sled),
        "store-rocksdb" => Some(StoreBackend::RocksDb),
        _ => None,
    }
}

/// Key → number of the batch that wrote it.
type Model = BTreeMap<Vec<u8>, u64>;

fn key(number: u64) -> Vec<u8> {
    let mut key = format!("key/{number:06}").into_bytes();
    // Some are long.
    key.extend(std::iter::repeat_n(b'x', if number.is_multiple_of(50) { 2_000 } else { 0 }));
    key
}

fn value(seed: u64, batch: u64, key: &[u8]) -> Arc<[u8]> {
    let mut random = Random(seed ^ (batch << 24) ^ key.iter().fold(7, |sum: u64, &byte| sum.wrapping_mul(31) ^ u64::from(byte)));
    let bytes = [10, 200, 200, 4_000, 9_000, 60_000][random.below(6) as usize];
    let words = std::iter::repeat_with(|| random.draw().to_le_bytes());
    words.flatten().take(bytes).collect()
}

/// Writes a batch into the model; returns the keys it puts (`true`) or deletes.
fn step(model: &mut Model, seed: u64, number: u64) -> Vec<(Vec<u8>, bool)> {
    let mut random = Random(seed ^ (number << 32));
    let changes: Vec<(Vec<u8>, bool)> = (0..1 + random.below(12))
        .map(|_| (key(random.below(KEYS)), random.below(4) > 0))
        .collect();
    for (key, is_put) in &changes {
        match is_put {
            true => model.insert(key.clone(), number),
            false => model.remove(key),
        };
    }
    changes
}

fn batch(seed: u64, number: u64, changes: Vec<(Vec<u8>, bool)>) -> WriteBatch {
    let mut batch = WriteBatch::default();
    for (key, is_put) in changes {
        if is_put {
            let value = value(seed, number, &key);
            batch.put(Table::Revision, key, value);
        } else {
            batch.delete(Table::Revision, key);
        }
    }
    batch.put(Table::Meta, COUNTER, number.to_le_bytes().to_vec());
    batch
}

fn newest(store: &dyn KvStore) -> Result<u64, StoreError> {
    let counter = store.get(Table::Meta, COUNTER)?;
    Ok(counter.map_or(0, |raw| u64::from_le_bytes(raw[..].try_into().unwrap())))
}

/// Whether the store is made durable after this batch.
fn is_last(seed: u64, number: u64) -> bool {
    Random(seed ^ number).below(10) == 0
}

/// Writes until killed; prints the number of the newest batch after each sync or close. Without `sync` it claims what it never did.
pub fn append(backend: StoreBackend, dir: &Path, seed: u64, sync: bool) {
    let mut store = store::open(backend, dir).unwrap();
    let closes = sync && !store.survives_crashes();
    let mut model = Model::new();
    let first = newest(store.as_ref()).unwrap();
    (1..=first).for_each(|number| drop(step(&mut model, seed, number)));
    let mut out = std::io::stdout();
    for number in first + 1.. {
        store.write(batch(seed, number, step(&mut model, seed, number))).unwrap();
        if !is_last(seed, number) {
            continue;
        }
        if closes {
            store.close().unwrap();
        } else if sync {
            store.sync().unwrap();
        }
        if writeln!(out, "\nacknowledged {number}").and_then(|()| out.flush()).is_err() {
            return;
        }
        if closes {
            // A cut that falls in here must leave it whole.
            std::thread::sleep(Duration::from_millis(Random(!seed ^ number).below(60)));
            drop(store);
            store = store::open(backend, dir).unwrap();
            assert_eq!(newest(store.as_ref()).unwrap(), number, "closed and opened again");
        }
    }
}

/// Opens the store after a cut, and closes it; the verdict as for a log, or `empty` if a store may be.
pub fn verify(backend: StoreBackend, dir: &Path, seed: u64, acknowledged: u64) -> String {
    let store = match store::open(backend, dir) {
        Ok(store) => store,
        Err(error) if acknowledged == 0 => return format!("whole 0 ({error})"),
        Err(error) => return format!("refused {error}"),
    };
    let verdict = match check(store.as_ref(), seed) {
        Ok(0) if !store.survives_crashes() => "empty".to_owned(),
        Ok(newest) if newest < acknowledged => format!("silent: batch {acknowledged} was made durable, the newest is {newest}"),
        Ok(newest) if !store.survives_crashes() && !is_last(seed, newest) => format!("silent: it was never closed at batch {newest}"),
        Ok(newest) => format!("whole {newest}"),
        Err(what) => format!("silent: {what}"),
    };
    match store.close() {
        Ok(()) => verdict,
        Err(error) => format!("refused {error}"),
    }
}

/// The number of the newest batch, if the store holds exactly what all up to it have made.
fn check(store: &dyn KvStore, seed: u64) -> Result<u64, String> {
    let newest = newest(store).map_err(|error| error.to_string())?;
    let mut model = Model::new();
    (1..=newest).for_each(|number| drop(step(&mut model, seed, number)));
    let mut fault = None;
    let all = (Bound::Unbounded, Bound::Unbounded);
    let scanned = store.scan(Table::Revision, all, Order::Asc, &mut |key, found| {
        let is_right = model.remove(key).is_some_and(|batch| value(seed, batch, key)[..] == *found);
        if is_right {
            return ControlFlow::Continue(());
        }
        fault = Some(format!(
            "after batch {newest}: {} is not as it was written",
            String::from_utf8_lossy(key)
        ));
        ControlFlow::Break(())
    });
    scanned.map_err(|error| error.to_string())?;
    match (fault, model.pop_first()) {
        (Some(fault), _) => Err(fault),
        (None, Some((key, batch))) => Err(format!(
            "after batch {newest}: {} of batch {batch} is missing",
            String::from_utf8_lossy(&key)
        )),
        (None, None) => Ok(newest),
    }
}
