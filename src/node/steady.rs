//! The time that leases and cluster time go by. PURE; times are milliseconds of the caller's monotonic clock.
//!
//! A clock that leaps shows time that perhaps nobody lived through: a virtual machine was set forward, or this process stood still. From
//! within the two look the same. So a leap counts as nothing: leases, idempotency records and history last longer than was promised
//! for once, and never shorter. Steps that a slow machine may make are believed.

/// Nothing that happens to a healthy process keeps it from its clock for so long.
const LONGEST_STEP_MS: u64 = 1_000;
/// Nor for so many ticks: each tick looks at the clock.
const LONGEST_STEP_TICKS: u64 = 3;

/// A monotonic clock without its leaps.
#[derive(Debug)]
pub struct SteadyClock {
    longest_step_ms: u64,
    last_ms: u64,
    passed_ms: u64,
}

impl SteadyClock {
    /// Begins at 0, when the clock shows `now_ms`. It is looked at once a tick at least.
    pub fn new(now_ms: u64, tick_ms: u64) -> SteadyClock {
        SteadyClock {
            longest_step_ms: LONGEST_STEP_MS.max(tick_ms.saturating_mul(LONGEST_STEP_TICKS)),
            last_ms: now_ms,
            passed_ms: 0,
        }
    }

    /// What has passed for certain, when the clock shows `now_ms`.
    pub fn at(&mut self, now_ms: u64) -> u64 {
        let step_ms = now_ms.saturating_sub(self.last_ms);
        self.last_ms = now_ms;
        if step_ms <= self.longest_step_ms || mutant!(TrustLeaps) {
            self.passed_ms += step_ms;
        }
        self.passed_ms
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leap_counts_as_nothing_and_time_goes_on_behind_it() {
        let mut clock = SteadyClock::new(5_000, 100);
        assert_eq!(clock.at(5_000), 0);
        assert_eq!(clock.at(5_100), 100);
        assert_eq!(clock.at(6_100), 1_100, "a step as long as that may be a slow machine's");
        assert_eq!(clock.at(60_000), 1_100, "forward");
        assert_eq!(clock.at(60_100), 1_200);
        assert_eq!(clock.at(10_000), 1_200, "back");
        assert_eq!(clock.at(10_100), 1_300);
    }

    #[test]
    fn long_ticks_are_no_leaps() {
        let mut clock = SteadyClock::new(0, 5_000);
        assert_eq!(clock.at(5_000), 5_000);
        assert_eq!(clock.at(12_000), 12_000);
        assert_eq!(clock.at(112_000), 12_000);
    }
}
