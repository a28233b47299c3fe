//! What the reaper knows of each connection, and the orders it gives.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, SetOnce},
    time::Instant,
};

use super::ServeLimits;

/// Counters of one listener, for the metrics.
#[derive(Debug, Default)]
pub struct ServeStats {
    open: AtomicUsize,
    accepted: AtomicU64,
    turned_away: AtomicU64,
    accept_errors: AtomicU64,
    head_timeouts: AtomicU64,
    write_timeouts: AtomicU64,
}

/// One reading of [`ServeStats`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ServeStatsView {
    /// Connections open now.
    pub open: usize,
    /// Connections served since the start.
    pub accepted: u64,
    /// Connections answered `429` because there were too many.
    pub turned_away: u64,
    /// Failures of `accept` that made the listener pause.
    pub accept_errors: u64,
    /// Connections ended because a request head did not arrive in time.
    pub head_timeouts: u64,
    /// Connections ended because their peer did not take its answer.
    pub write_timeouts: u64,
}

impl ServeStats {
    /// The current figures.
    pub fn view(&self) -> ServeStatsView {
        ServeStatsView {
            open: self.open.load(Relaxed),
            accepted: self.accepted.load(Relaxed),
            turned_away: self.turned_away.load(Relaxed),
            accept_errors: self.accept_errors.load(Relaxed),
            head_timeouts: self.head_timeouts.load(Relaxed),
            write_timeouts: self.write_timeouts.load(Relaxed),
        }
    }

    pub(super) fn note_accept_error(&self) {
        self.accept_errors.fetch_add(1, Relaxed);
    }

    pub(super) fn note_turned_away(&self) {
        self.turned_away.fetch_add(1, Relaxed);
    }
}

/// How long a write or a body may stand still, or half a head may take, when its connection was told to end.
pub(super) const DRAIN_PATIENCE: Duration = Duration::from_secs(1);

/// What a connection without a request in flight waits for.
const FIRST_HEAD: u8 = 0;
const NEXT_REQUEST: u8 = 1;
const REST_OF_HEAD: u8 = 2;

/// Orders, growing in severity; a connection never goes back to a milder one.
const NO_ORDER: u8 = 0;
const DRAIN: u8 = 1;
const HEAD_TIMED_OUT: u8 = 2;
const CUT: u8 = 3;

/// What a connection is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// Go on.
    None,
    /// Finish what is in flight, then close.
    Drain,
    /// The request head is late: say so and close.
    HeadTimedOut,
    /// Close now.
    Cut,
}

/// One connection as the reaper sees it. Written by the connection's task (and the tasks of its HTTP/2 streams), read by the reaper.
/// Relaxed throughout: a value seen late only makes a timeout late; orders travel with the waker's own synchronisation.
pub(super) struct Activity {
    clock: Arc<Clock>,
    in_flight: AtomicU32,
    /// Requests so far, modulo 2^32.
    begun: AtomicU32,
    waiting_for: AtomicU8,
    waiting_since_ms: AtomicU64,
    /// 0: no write is stalled.
    stalled_since_ms: AtomicU64,
    /// How long a write may be stalled.
    patience_ms: AtomicU64,
    /// The end of an answer may not be written out yet.
    unflushed: AtomicBool,
    http2: AtomicBool,
    background: AtomicBool,
    order: AtomicU8,
    drained_since_ms: AtomicU64,
    /// Since when the other end has closed its side while its request is under way; or when something was last written to it since. 0: it has not.
    half_closed_since_ms: AtomicU64,
    waker: AtomicWaker,
    /// Set when all connections of the listener are told to end.
    draining: Arc<SetOnce<()>>,
}

impl Activity {
    /// Whether the connection takes turns with others of its kind.
    pub(super) fn is_background(&self) -> bool {
        self.background.load(Relaxed)
    }

    pub(super) fn set_background(&self, is_background: bool) {
        self.background.store(is_background, Relaxed);
    }

    pub(super) fn set_patience(&self, patience: Duration) {
        self.patience_ms.store(millis(patience), Relaxed);
    }

    /// Of several answers under way the most patient one decides.
    pub(super) fn extend_patience(&self, patience: Duration) {
        let now = self.patience_ms.load(Relaxed);
        // The answer's own figure, also a shorter one, if it is the only one.
        let ms = if self.in_flight.load(Relaxed) > 1 {
            now.max(millis(patience))
        } else {
            millis(patience)
        };
        self.patience_ms.store(ms, Relaxed);
    }

    fn new(clock: Arc<Clock>, draining: Arc<SetOnce<()>>) -> Activity {
        Activity {
            in_flight: AtomicU32::new(0),
            begun: AtomicU32::new(0),
            waiting_for: AtomicU8::new(FIRST_HEAD),
            waiting_since_ms: AtomicU64::new(clock.now_ms()),
            stalled_since_ms: AtomicU64::new(0),
            patience_ms: AtomicU64::new(u64::MAX),
            unflushed: AtomicBool::new(false),
            http2: AtomicBool::new(false),
            background: AtomicBool::new(false),
            order: AtomicU8::new(NO_ORDER),
            drained_since_ms: AtomicU64::new(0),
            half_closed_since_ms: AtomicU64::new(0),
            waker: AtomicWaker::new(),
            draining,
            clock,
        }
    }

    /// Set when all connections of the listener are told to end: for what waits in a request.
    pub(super) fn draining(&self) -> &Arc<SetOnce<()>> {
        &self.draining
    }

    /// A complete request head arrived.
    pub(super) fn begin_request(&self, http2: bool) {
        if http2 {
            self.http2.store(true, Relaxed);
        }
        // Of a request that was sent together with the one before, the body may be here already.
        self.half_closed_since_ms.store(0, Relaxed);
        self.in_flight.fetch_add(1, Relaxed);
        self.begun.fetch_add(1, Relaxed);
    }

    /// How many requests there were, to tell one head from the next.
    pub(super) fn begun(&self) -> u32 {
        self.begun.load(Relaxed)
    }

    /// Its answer was handed over completely, or given up.
    pub(super) fn end_request(&self) {
        self.unflushed.store(true, Relaxed);
        self.wait_for(NEXT_REQUEST);
        self.in_flight.fetch_sub(1, Relaxed);
    }

    /// Bytes came in.
    pub(super) fn note_read(&self) {
        if self.waiting_for.load(Relaxed) == NEXT_REQUEST && self.is_waiting() && !self.is_http2() {
            self.wait_for(REST_OF_HEAD);
        }
    }

    /// The other end sends nothing more. Whether that is to be kept from hyper, because a request is under way whose answer it may still want: of a
    /// watch it is taken for its end.
    pub(super) fn note_half_closed(&self) -> bool {
        let is_answered = self.is_waiting() && !self.unflushed.load(Relaxed);
        if is_answered || self.is_http2() || self.is_background() {
            return false;
        }
        let _ = self
            .half_closed_since_ms
            .compare_exchange(0, self.clock.now_ms().max(1), Relaxed, Relaxed);
        true
    }

    pub(super) fn is_half_closed(&self) -> bool {
        self.half_closed_since_ms.load(Relaxed) != 0
    }

    pub(super) fn note_write_stalled(&self) {
        if self.stalled_since_ms.load(Relaxed) == 0 {
            self.stalled_since_ms.store(self.clock.now_ms().max(1), Relaxed);
        }
    }

    pub(super) fn note_written(&self) {
        if self.stalled_since_ms.load(Relaxed) != 0 {
            self.stalled_since_ms.store(0, Relaxed);
        }
        if self.is_half_closed() {
            self.half_closed_since_ms.store(self.clock.now_ms().max(1), Relaxed);
        }
    }

    pub(super) fn note_flushed(&self) {
        if self.unflushed.load(Relaxed) && self.is_waiting() {
            self.unflushed.store(false, Relaxed);
            if self.is_half_closed() {
                // Nothing comes in that would have hyper look for the end that was kept from it.
                self.waker.wake();
            }
        }
    }

    /// Nothing that a handler made is being written: a write now is hyper's own answer to a head it could not take.
    pub(super) fn nothing_to_say(&self) -> bool {
        self.is_waiting() && !self.unflushed.load(Relaxed) && !self.is_http2()
    }

    pub(super) fn is_http2(&self) -> bool {
        self.http2.load(Relaxed)
    }

    pub(super) fn note_http2(&self) {
        self.http2.store(true, Relaxed);
    }

    pub(super) fn is_waiting(&self) -> bool {
        self.in_flight.load(Relaxed) == 0
    }

    fn wait_for(&self, what: u8) {
        self.waiting_since_ms.store(self.clock.now_ms(), Relaxed);
        self.waiting_for.store(what, Relaxed);
    }

    /// Call with the task's waker before [`order`](Self::order), so that no order is missed.
    pub(super) fn register(&self, waker: &std::task::Waker) {
        self.waker.register(waker);
    }

    pub(super) fn order(&self) -> Order {
        match self.order.load(Relaxed) {
            NO_ORDER => Order::None,
            DRAIN => Order::Drain,
            HEAD_TIMED_OUT => Order::HeadTimedOut,
            _ => Order::Cut,
        }
    }

    fn give(&self, order: u8) {
        if self.order.fetch_max(order, Relaxed) < order {
            self.drained_since_ms.store(self.clock.now_ms(), Relaxed);
            self.waker.wake();
        }
    }

    /// The reaper's look at one connection.
    fn check(&self, now_ms: u64, limits: &ServeLimits, stats: &ServeStats) {
        let over = |since_ms: u64, limit: Duration| u128::from(now_ms.saturating_sub(since_ms)) > limit.as_millis();
        let stalled_since_ms = self.stalled_since_ms.load(Relaxed);
        let mut patience = Duration::from_millis(self.patience_ms.load(Relaxed));
        if self.order.load(Relaxed) != NO_ORDER {
            // The process is to end: what is not taken now is not taken in time.
            patience = patience.min(DRAIN_PATIENCE);
        }
        if stalled_since_ms != 0 && over(stalled_since_ms, patience) {
            stats.write_timeouts.fetch_add(1, Relaxed);
            return self.give(CUT);
        }
        if !self.is_waiting() {
            let half_closed_since_ms = self.half_closed_since_ms.load(Relaxed);
            // Who has something to take has the time that a stalled write has.
            let is_gone = stalled_since_ms == 0 && over(half_closed_since_ms, limits.half_closed_timeout);
            if half_closed_since_ms != 0 && (self.is_background() || is_gone) {
                self.give(CUT);
            }
            return;
        }
        if self.order.load(Relaxed) != NO_ORDER {
            // It was told to close and has nothing to do: half a head is no request that was taken in, but the end of an answer may be under way.
            if !self.unflushed.load(Relaxed) && over(self.drained_since_ms.load(Relaxed), limits.header_timeout.min(DRAIN_PATIENCE)) {
                self.give(CUT);
            }
            return;
        }
        let since_ms = self.waiting_since_ms.load(Relaxed);
        if self.waiting_for.load(Relaxed) == NEXT_REQUEST {
            if over(since_ms, limits.idle_timeout) {
                self.give(DRAIN);
            }
        } else if over(since_ms, limits.header_timeout) {
            stats.head_timeouts.fetch_add(1, Relaxed);
            self.give(if self.is_http2() { CUT } else { HEAD_TIMED_OUT });
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// A clock that costs one load: set by the reaper.
struct Clock {
    start: Instant,
    now_ms: AtomicU64,
}

impl Clock {
    fn now_ms(&self) -> u64 {
        self.now_ms.load(Relaxed)
    }

    fn advance(&self) -> u64 {
        let now_ms = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.now_ms.store(now_ms, Relaxed);
        now_ms
    }
}

/// All connections of a listener.
pub(super) struct Connections {
    clock: Arc<Clock>,
    open: Mutex<HashMap<u64, Arc<Activity>>>,
    next_id: AtomicU64,
    emptied: Notify,
    draining: Arc<SetOnce<()>>,
    turning_away: AtomicUsize,
    stats: Arc<ServeStats>,
}

impl Connections {
    pub(super) fn new(stats: Arc<ServeStats>) -> Connections {
        Connections {
            clock: Arc::new(Clock {
                start: Instant::now(),
                now_ms: AtomicU64::new(0),
            }),
            open: Mutex::default(),
            next_id: AtomicU64::new(0),
            emptied: Notify::new(),
            draining: Arc::default(),
            turning_away: AtomicUsize::new(0),
            stats,
        }
    }

    pub(super) fn stats(&self) -> &ServeStats {
        &self.stats
    }

    /// Counts a connection in, unless there are `max` already.
    pub(super) fn enter(&self, max: usize) -> Option<(u64, Arc<Activity>)> {
        let mut open = self.open.lock();
        if open.len() >= max {
            return None;
        }
        let id = self.next_id.fetch_add(1, Relaxed);
        let activity = Arc::new(Activity::new(self.clock.clone(), self.draining.clone()));
        open.insert(id, activity.clone());
        self.stats.open.store(open.len(), Relaxed);
        self.stats.accepted.fetch_add(1, Relaxed);
        Some((id, activity))
    }

    pub(super) fn leave(&self, id: u64) {
        let mut open = self.open.lock();
        open.remove(&id);
        self.stats.open.store(open.len(), Relaxed);
        if open.is_empty() {
            self.emptied.notify_waiters();
        }
    }

    /// Takes one of the few places for connections that are turned away politely.
    pub(super) fn enter_turning_away(&self, max: usize) -> bool {
        self.stats.note_turned_away();
        self.turning_away
            .fetch_update(Relaxed, Relaxed, |now| (now < max).then_some(now + 1))
            .is_ok()
    }

    pub(super) fn leave_turning_away(&self) {
        self.turning_away.fetch_sub(1, Relaxed);
    }

    /// Advances the clock and ends what is over its time.
    pub(super) fn reap(&self, limits: &ServeLimits) {
        let now_ms = self.clock.advance();
        for activity in self.open.lock().values() {
            activity.check(now_ms, limits, &self.stats);
        }
    }

    pub(super) fn order_drain(&self) {
        // It is ordered once.
        let _ = self.draining.set(());
        for activity in self.open.lock().values() {
            activity.give(DRAIN);
        }
    }

    /// Cuts off all that are left, and says how many.
    pub(super) fn order_cut(&self) -> usize {
        let open = self.open.lock();
        for activity in open.values() {
            activity.give(CUT);
        }
        open.len()
    }

    /// Returns when no connection is left.
    pub(super) async fn empty(&self) {
        loop {
            let emptied = self.emptied.notified();
            if self.open.lock().is_empty() {
                return;
            }
            emptied.await;
        }
    }
}
