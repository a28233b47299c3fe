//! Readers gather here for the next ReadIndex round.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;
use tokio::sync::Notify;

/// One moment of the read rounds: who waits for an index.
#[derive(Debug, Default)]
pub(super) struct Round {
    /// 0 until it is confirmed (an index is never 0).
    pub(super) index: AtomicU64,
    pub(super) confirmed: Notify,
}

/// Gathers readers for the next ReadIndex round: however many wait, raft sees one read.
#[derive(Debug, Default)]
pub struct ReadGate {
    gathering: Mutex<Gathering>,
    /// No round is confirmed any more.
    closed: AtomicBool,
    sent: Mutex<HashMap<u64, Arc<Round>>>,
}

#[derive(Debug, Default)]
struct Gathering {
    round: Arc<Round>,
    wanted: bool,
    next_token: u64,
}

impl ReadGate {
    /// Joins the round that is being gathered. `true`: the first to do so, who tells the driver.
    pub(super) fn join(&self) -> (Arc<Round>, bool) {
        let mut gathering = self.gathering.lock();
        let first = !std::mem::replace(&mut gathering.wanted, true);
        (gathering.round.clone(), first)
    }

    /// Whether anybody waits for the next round.
    pub(crate) fn is_wanted(&self) -> bool {
        self.gathering.lock().wanted
    }

    /// The round begins now: whoever comes later joins the next one (rule 16).
    pub(crate) fn gather(&self) -> Option<u64> {
        let mut gathering = self.gathering.lock();
        if !std::mem::take(&mut gathering.wanted) {
            return None;
        }
        gathering.next_token += 1;
        let round = std::mem::take(&mut gathering.round);
        self.sent.lock().insert(gathering.next_token, round);
        Some(gathering.next_token)
    }

    /// Whoever waits is woken without an index, and nobody waits from now on.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.gathering.lock().round.confirmed.notify_waiters();
        for (_, round) in self.sent.lock().drain() {
            round.confirmed.notify_waiters();
        }
    }

    /// To be asked after enlisting for the notification: [`close`](Self::close) sets this first.
    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// A quorum confirmed: readers of this round may read at `index`.
    pub(crate) fn confirm(&self, token: u64, index: u64) {
        if let Some(round) = self.sent.lock().remove(&token) {
            round.index.store(index, Ordering::Release);
            round.confirmed.notify_waiters();
        }
    }
}
