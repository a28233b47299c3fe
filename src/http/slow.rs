//! The warning about a request that took long, with its breakdown.
//!
//! What is not the server's is not counted: the time in which the client sent its body. Requests that asked to wait, and streams, are
//! not slow however long they take.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use http::StatusCode;
use http::request::Parts;

use super::App;
use super::route::Route;
use super::trace::TraceContext;
use crate::node::{StageTimes, WalShare};

/// A request that takes longer to answer is worth a warning.
const SLOW: Duration = Duration::from_millis(100);
/// Warnings in one second. Where everything is slow, more of them tell nothing and cost what is short; the counter goes on.
const MAX_PER_SECOND: u64 = 10;

/// How many requests were slow, and how many of them were said.
#[derive(Debug, Default)]
pub(super) struct SlowRequests {
    total: AtomicU64,
    /// Second since the start, and warnings in it: second * 2^16 + warnings.
    second: AtomicU64,
}

impl SlowRequests {
    /// Slow requests so far.
    pub(super) fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    /// Counts one; whether it may be said.
    fn admit(&self, second: u64) -> bool {
        self.total.fetch_add(1, Ordering::Relaxed);
        let admit = |state: u64| match (state >> 16 == second, state & 0xffff) {
            (false, _) => Some(second << 16 | 1),
            (true, said) if said < MAX_PER_SECOND => Some(state + 1),
            (true, _) => None,
        };
        self.second.fetch_update(Ordering::Relaxed, Ordering::Relaxed, admit).is_ok()
    }
}

/// Warns if a request that was answered after `took` was slow.
pub(super) fn check(app: &App, route: Route, parts: &Parts, status: StatusCode, took: Duration, times: &StageTimes, trace: &TraceContext) {
    if took <= SLOW || !is_slow(route, took, times) || !app.slow.admit(app.started.elapsed().as_secs()) {
        return;
    }
    let now = Instant::now();
    let replicated = now.checked_sub(times.apply + times.apply_wait).unwrap_or(now);
    let since = replicated.checked_sub(times.replicate).unwrap_or(replicated);
    let wal = if times.replicate.is_zero() {
        WalShare::default()
    } else {
        app.node.shared().wal_metrics.share_of(since, now)
    };
    let ms = |duration: Duration| duration.as_millis() as u64;
    tracing::warn!(
        trace_id = %trace.trace,
        method = %parts.method,
        target = %parts.uri,
        status = status.as_u16(),
        took_ms = ms(took),
        receive_ms = ms(times.receive),
        barrier_ms = ms(times.barrier),
        queue_ms = ms(times.queue),
        replicate_ms = ms(times.replicate),
        wal_write_ms = ms(wal.write),
        wal_sync_ms = ms(wal.sync),
        apply_wait_ms = ms(times.apply_wait),
        apply_ms = ms(times.apply),
        "slow request"
    );
}

/// Whether it is the server that was slow.
fn is_slow(route: Route, took: Duration, times: &StageTimes) -> bool {
    let is_stream = matches!(route, Route::Watch | Route::Snapshot);
    !is_stream && !times.waited && took.saturating_sub(times.receive) > SLOW
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_streams_and_slow_clients_are_not_slow() {
        let long = Duration::from_secs(1);
        let none = StageTimes::default();
        assert!(is_slow(Route::Key, long, &none));
        assert!(!is_slow(Route::Watch, long, &none) && !is_slow(Route::Snapshot, long, &none));
        assert!(!is_slow(Route::Key, long, &StageTimes { waited: true, ..none }));
        let receive = Duration::from_millis(950);
        assert!(!is_slow(Route::Key, long, &StageTimes { receive, ..none }));
    }

    #[test]
    fn all_are_counted_and_few_are_said() {
        let slow = SlowRequests::default();
        let said = |second| (0..100).filter(|_| slow.admit(second)).count() as u64;
        assert_eq!((said(0), said(0), said(7)), (MAX_PER_SECOND, 0, MAX_PER_SECOND));
        assert_eq!(slow.total(), 300);
    }
}
