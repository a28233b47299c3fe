//! Figures of the WAL thread.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::RwLock;

use crate::wal::WalStats;

/// Figures of the WAL thread.
#[derive(Debug, Default)]
pub struct WalMetrics {
    stats: RwLock<WalStats>,
    /// Durations of durable appends, by upper bound in microseconds; see [`WAL_BUCKETS_US`].
    pub append_buckets: [AtomicU64; WAL_BUCKETS_US.len() + 1],
    /// Sum of the durations in microseconds.
    pub append_us: AtomicU64,
    /// Entries appended.
    pub entries: AtomicU64,
}

/// Upper bounds of the histogram of durable appends, in microseconds.
pub const WAL_BUCKETS_US: [u64; 12] = [100, 200, 400, 800, 1_600, 3_200, 6_400, 12_800, 25_600, 51_200, 102_400, 1_000_000];

/// A durable append that takes longer is worth a warning.
const SLOW_APPEND: Duration = Duration::from_millis(100);

impl WalMetrics {
    pub(crate) fn record(&self, took: Duration, entries: usize, stats: WalStats) {
        let us = took.as_micros() as u64;
        let bucket = WAL_BUCKETS_US.partition_point(|&bound| bound < us);
        self.append_buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.append_us.fetch_add(us, Ordering::Relaxed);
        self.entries.fetch_add(entries as u64, Ordering::Relaxed);
        *self.stats.write() = stats;
        if took > SLOW_APPEND {
            tracing::warn!(
                took_ms = took.as_millis() as u64,
                entries,
                "slow disk: a durable append of the log took more than 100 ms"
            );
        }
    }

    pub(crate) fn set_stats(&self, stats: WalStats) {
        *self.stats.write() = stats;
    }

    /// The log's own figures.
    pub fn stats(&self) -> WalStats {
        *self.stats.read()
    }
}
