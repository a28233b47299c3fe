//! Notices a thread that is at one thing for too long.

use std::time::Duration;

/// Looks at one thread, tick by tick.
///
/// Counted in ticks, not by a clock: a process that was stopped for a while has not waited for its disk.
#[derive(Debug, Default)]
pub struct Watchdog {
    /// What the thread is at, and the tick at which it was first seen at it.
    turn: Option<u64>,
    since: u64,
}

impl Watchdog {
    /// How long the thread has been at `turn`, what it is at in this tick (`None`: nothing).
    pub fn waited(&mut self, turn: Option<u64>, now: u64, tick: Duration) -> Duration {
        if turn.is_none() || turn != self.turn {
            (self.turn, self.since) = (turn, now);
        }
        tick.saturating_mul(u32::try_from(now - self.since).unwrap_or(u32::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_thing_that_lasts_is_waited_for() {
        let mut dog = Watchdog::default();
        let tick = Duration::from_secs(1);
        let waits: Vec<u64> = [None, None, Some(1), Some(1), Some(1), Some(3), None, Some(5), Some(5)]
            .into_iter()
            .zip(1..)
            .map(|(turn, now)| dog.waited(turn, now, tick).as_secs())
            .collect();
        assert_eq!(waits, [0, 0, 0, 1, 2, 0, 0, 0, 1]);
    }
}
