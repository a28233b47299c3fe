//! Figures of the WAL thread.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};

use super::{Histogram, turns::Turns};
use crate::wal::WalStats;

/// A durable append that takes longer is worth a warning.
const SLOW_APPEND: Duration = Duration::from_millis(100);
/// An append that takes longer is remembered for a while: it may be why a request is slow.
const NOTABLE_APPEND: Duration = Duration::from_millis(10);
/// So many of them.
const REMEMBERED_APPENDS: usize = 64;

/// Figures of the WAL thread.
#[derive(Debug, Default)]
pub struct WalMetrics {
    stats: RwLock<WalStats>,
    /// Durations of durable appends: write and sync.
    pub appends: Histogram,
    /// The syncs among it, with the write where that waits for the disk, too: raft-engine and RocksDB write and sync in one call, sled's journal
    /// goes past the page cache.
    pub syncs: Histogram,
    /// Entries appended.
    pub entries: AtomicU64,
    /// Bytes of their content.
    pub entry_bytes: AtomicU64,
    /// The last [`NOTABLE_APPEND`]s, oldest first.
    notable: Mutex<VecDeque<Append>>,
    /// What the thread is at.
    pub(crate) turns: Turns,
}

/// One durable append.
#[derive(Debug, Clone, Copy)]
struct Append {
    ended: Instant,
    took: Duration,
    sync: Duration,
}

/// What the log's notable appends had to do with a span of time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WalShare {
    /// Time in them without their syncs.
    pub write: Duration,
    /// Time in their syncs.
    pub sync: Duration,
}

impl WalMetrics {
    /// Notes an append that has just ended. `stats` are the log's figures after it.
    pub(crate) fn record(&self, took: Duration, entries: usize, bytes: usize, stats: WalStats) {
        let before = std::mem::replace(&mut *self.stats.write(), stats);
        let sync = stats.sync_time.saturating_sub(before.sync_time).min(took);
        self.appends.observe(took);
        self.syncs.observe(sync);
        self.entries.fetch_add(entries as u64, Ordering::Relaxed);
        self.entry_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        if took > NOTABLE_APPEND {
            self.remember(Append {
                ended: Instant::now(),
                took,
                sync,
            });
        }
        if took > SLOW_APPEND {
            tracing::warn!(
                took_ms = took.as_millis() as u64,
                write_ms = (took - sync).as_millis() as u64,
                sync_ms = sync.as_millis() as u64,
                entries,
                bytes,
                "slow disk: a durable append of the log took more than 100 ms"
            );
        }
    }

    fn remember(&self, append: Append) {
        let mut notable = self.notable.lock();
        if notable.len() >= REMEMBERED_APPENDS {
            notable.pop_front();
        }
        notable.push_back(append);
    }

    /// Time that notable appends (over 10 ms) which overlap this span took, as far as they are remembered.
    pub fn share_of(&self, from: Instant, to: Instant) -> WalShare {
        let mut share = WalShare::default();
        for append in self.notable.lock().iter() {
            let begun = append.ended.checked_sub(append.took).unwrap_or(append.ended);
            if begun < to && append.ended > from {
                share.write += append.took.saturating_sub(append.sync);
                share.sync += append.sync;
            }
        }
        share
    }

    pub(crate) fn set_stats(&self, stats: WalStats) {
        *self.stats.write() = stats;
    }

    /// The log's own figures.
    pub fn stats(&self) -> WalStats {
        *self.stats.read()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(sync_ms: u64) -> WalStats {
        WalStats {
            sync_time: Duration::from_millis(sync_ms),
            ..WalStats::default()
        }
    }

    #[test]
    fn the_sync_is_told_from_the_write_and_only_slow_appends_are_remembered() {
        let metrics = WalMetrics::default();
        let before = Instant::now();
        metrics.record(Duration::from_millis(2), 1, 10, stats(1));
        metrics.record(Duration::from_millis(50), 3, 90, stats(41));
        let share = metrics.share_of(before, Instant::now());
        assert_eq!((share.write, share.sync), (Duration::from_millis(10), Duration::from_millis(40)));
        assert_eq!(metrics.syncs.view().sum_seconds, 0.041);
        assert_eq!(metrics.entry_bytes.load(Ordering::Relaxed), 100);
        let earlier = before - Duration::from_secs(60);
        assert_eq!(metrics.share_of(earlier, earlier + Duration::from_secs(1)), WalShare::default());
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let metrics = WalMetrics::default();
        let before = Instant::now();
        for _ in 0..REMEMBERED_APPENDS + 9 {
            metrics.record(Duration::from_millis(11), 1, 1, stats(0));
        }
        let all = metrics.share_of(before, Instant::now());
        assert_eq!(all.write, Duration::from_millis(11 * REMEMBERED_APPENDS as u64));
    }

    /// What is logged, as JSON lines.
    #[derive(Clone, Default)]
    struct Captured(std::sync::Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Captured {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_slow_append_is_warned_of_with_what_it_was_slow_at() {
        let captured = Captured::default();
        let writer = captured.clone();
        let subscriber = tracing_subscriber::fmt().json().with_writer(move || writer.clone()).finish();
        let metrics = WalMetrics::default();
        tracing::subscriber::with_default(subscriber, || {
            metrics.record(Duration::from_millis(100), 1, 10, stats(90));
            metrics.record(Duration::from_millis(150), 3, 900, stats(90 + 120));
        });
        let text = String::from_utf8(captured.0.lock().clone()).unwrap();
        let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 1, "only of the one that took longer than 100 ms: {text}");
        assert_eq!(lines[0]["level"], "WARN");
        let fields = lines[0]["fields"].as_object().unwrap();
        assert!(fields["message"].as_str().unwrap().starts_with("slow disk"), "{text}");
        let breakdown = [("took_ms", 150), ("write_ms", 30), ("sync_ms", 120), ("entries", 3), ("bytes", 900)];
        for (name, value) in breakdown {
            assert_eq!(fields[name], value, "{name}: {text}");
        }
    }
}
