//! When the state is made durable outside the log, so that the log can be cut: in the ordinary course, when the state has shrunk, on a disk that
//! is nearly full, and after a failure.

use std::time::{Duration, Instant};

/// Due after so many bytes of log, or the size of the last snapshot if that is larger.
const MIN_BYTES_BETWEEN: u64 = 128 << 20;
/// On a disk that is nearly full one follows another no sooner, nor sooner than ten times as long as the last one took.
const MIN_REST: Duration = Duration::from_secs(10);
/// One that failed is tried again after [`MIN_REST`], then after twice that, and so on up to this: one that does not fit fills the disk each time.
const MAX_REST: Duration = Duration::from_secs(160);
/// Due, too, when a third of what the last one held is gone, if that was so much: a snapshot is to take no more than half again of what
/// the state has. Not on the heels of the one before.
const MIN_SHRUNK_BYTES: u64 = 16 << 20;
/// What has to be gained for one on a disk that is nearly full.
const MIN_GAIN: u64 = 1 << 20;

/// What has changed since the last one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Since {
    /// Entries applied.
    pub entries: u64,
    /// Bytes of log, as far as they were appended since the start.
    pub log_bytes: u64,
    /// Keys and values in the state now.
    pub state_bytes: u64,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Pace {
    snapshot_entries: u64,
    begun: Option<Instant>,
    ended: Option<Instant>,
    rest: Duration,
    failed: bool,
    /// Bytes of the last one; 0 for a store that only has to be synced.
    last_bytes: u64,
    /// Bytes of keys and values in it. At the start, and after one that failed, as many as there are numbers: what may be gained is not known.
    last_state_bytes: u64,
}

impl Pace {
    /// `snapshot_entries` as configured, and about how many bytes a snapshot has; 0 for a store that only has to be synced.
    pub(super) fn new(snapshot_entries: u64, snapshot_bytes: u64) -> Pace {
        Pace {
            snapshot_entries,
            begun: None,
            ended: None,
            rest: Duration::ZERO,
            failed: false,
            last_bytes: snapshot_bytes,
            last_state_bytes: u64::MAX,
        }
    }

    /// A snapshot of another member has taken the state's place, as [`Pace::new`] has it.
    pub(super) fn installed(&mut self, snapshot_bytes: u64) {
        *self = Pace {
            begun: self.begun,
            ..Pace::new(self.snapshot_entries, snapshot_bytes)
        };
    }

    /// Whether one is under way.
    pub(super) fn is_busy(&self) -> bool {
        self.begun.is_some()
    }

    /// Whether it is time for one.
    pub(super) fn is_due(&self, since: Since, is_disk_full: bool, now: Instant) -> bool {
        if self.is_busy() || since.entries == 0 {
            return false;
        }
        let is_much = since.entries >= self.snapshot_entries || since.log_bytes >= MIN_BYTES_BETWEEN.max(self.last_bytes);
        // Nothing else gives back what was deleted of a store in memory, and what the log holds.
        let deleted = self.last_state_bytes.saturating_sub(since.state_bytes);
        let gain = deleted.saturating_add(since.log_bytes);
        let held = self.last_state_bytes.min(self.last_bytes);
        let has_shrunk = held >= MIN_SHRUNK_BYTES && since.state_bytes < held / 3 * 2;
        let is_worth_it = has_shrunk || (is_disk_full && gain >= MIN_GAIN.max(self.last_bytes / 4));
        let has_rested = self.ended.is_none_or(|ended| now.saturating_duration_since(ended) >= self.rest);
        match self.failed {
            true => has_rested && (is_much || is_worth_it),
            false => is_much || (has_rested && is_worth_it),
        }
    }

    /// It is under way, of a state with so many bytes of keys and values.
    pub(super) fn begin(&mut self, state_bytes: u64, now: Instant) {
        self.begun = Some(now);
        self.last_state_bytes = state_bytes;
    }

    /// It has ended: its size, or that it failed.
    pub(super) fn end(&mut self, bytes: Option<u64>, now: Instant) {
        let took = self
            .begun
            .take()
            .map_or(Duration::ZERO, |begun| now.saturating_duration_since(begun));
        self.ended = Some(now);
        self.rest = match (bytes, self.failed) {
            (None, true) => (self.rest * 2).min(MAX_REST),
            (None, false) => MIN_REST,
            (Some(_), _) => MIN_REST.max(took * 10),
        };
        self.failed = bytes.is_none();
        match bytes {
            Some(bytes) => self.last_bytes = bytes,
            // What it would have given back is still to be gained.
            None => self.last_state_bytes = u64::MAX,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn since(entries: u64, log_bytes: u64, state_bytes: u64) -> Since {
        Since {
            entries,
            log_bytes,
            state_bytes,
        }
    }

    #[test]
    fn entries_or_bytes_make_one_due_and_nothing_new_does_not() {
        let (pace, now) = (Pace::new(100, 0), Instant::now());
        assert!(!pace.is_due(since(99, 127 * MIB, 0), false, now));
        assert!(pace.is_due(since(100, 0, 0), false, now));
        assert!(pace.is_due(since(1, 128 * MIB, 0), false, now));
        assert!(!pace.is_due(since(0, 0, 0), true, now));
    }

    #[test]
    fn on_a_full_disk_one_is_made_for_what_it_gives_back_and_not_too_often() {
        let (mut pace, start) = (Pace::new(100, 40 * MIB), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(!pace.is_due(since(3, 100, 40 * MIB), false, start), "there is room");
        assert!(
            pace.is_due(since(3, 100, 40 * MIB), true, start),
            "nobody knows what the start has found"
        );
        pace.begin(40 * MIB, start - Duration::from_secs(60));
        pace.end(Some(40 * MIB), start - Duration::from_secs(60));
        assert!(!pace.is_due(since(3, 100, 40 * MIB), true, start), "nothing is gained");
        assert!(pace.is_due(since(3, 100, 2 * MIB), true, start));
        pace.begin(2 * MIB, at(0));
        assert!(!pace.is_due(since(3, 100, 0), true, at(1)), "one is under way");
        pace.end(Some(2 * MIB), at(3));
        assert!(!pace.is_due(since(3, 9 * MIB, 2 * MIB), true, at(32)), "it took three seconds");
        assert!(pace.is_due(since(3, 9 * MIB, 2 * MIB), true, at(33)));
        assert!(!pace.is_due(since(3, 100, 2 * MIB), true, at(33)), "nothing is gained");
        assert!(pace.is_due(since(100, 100, 2 * MIB), true, at(4)), "the ordinary course goes on");
    }

    #[test]
    fn a_state_that_has_shrunk_gives_the_disk_back_what_its_last_snapshot_takes() {
        let (mut pace, start) = (Pace::new(100, 30 * MIB), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(!pace.is_due(since(1, 0, 20 * MIB), false, start));
        assert!(
            pace.is_due(since(1, 0, 19 * MIB), false, start),
            "the start knows the size of the last one"
        );
        pace.begin(19 * MIB, start);
        // Rows take more than keys and values.
        pace.end(Some(29 * MIB), at(1));
        assert!(!pace.is_due(since(1, 0, 19 * MIB), false, at(60)), "nothing is gone");
        assert!(
            !pace.is_due(since(1, 0, 12 * MIB), false, at(10)),
            "not on the heels of the last one"
        );
        assert!(pace.is_due(since(1, 0, 12 * MIB), false, at(11)));
        assert!(!pace.is_due(since(0, 0, 12 * MIB), false, at(11)), "it would be the same one");
        pace.begin(12 * MIB, at(11));
        pace.end(Some(13 * MIB), at(12));
        assert!(!pace.is_due(since(1, 0, 0), false, at(60)), "what is so small may stay");
        let synced = Pace::new(100, 0);
        assert!(
            !synced.is_due(since(1, 0, 0), false, start),
            "a store on disk has no snapshot that could shrink"
        );
    }

    #[test]
    fn one_that_fails_is_tried_again_ever_more_seldom() {
        let (mut pace, mut now) = (Pace::new(100, 0), Instant::now());
        let much = since(100, 0, 0);
        for seconds in [10, 20, 40, 80, 160, 160] {
            pace.begin(0, now);
            pace.end(None, now);
            now += Duration::from_secs(seconds) - Duration::from_millis(1);
            assert!(!pace.is_due(much, true, now), "{seconds}");
            now += Duration::from_millis(1);
            assert!(pace.is_due(much, true, now), "{seconds}");
            assert!(pace.is_due(since(1, 0, 0), true, now), "it may give room");
        }
        pace.begin(0, now);
        pace.end(None, now);
        assert!(
            !pace.is_due(much, false, now + MIN_REST),
            "what was written of it has filled the disk, and is gone"
        );
        assert!(pace.is_due(much, false, now + MAX_REST));
        pace.installed(0);
        assert!(pace.is_due(much, false, now));
    }
}
