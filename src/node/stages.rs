//! Where a request's time went, for the warning about a slow one.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::state::outcome::Outcome;

/// A command's result on its way from the apply thread to whoever waits.
#[derive(Debug)]
pub(crate) struct Applied {
    /// The result.
    pub(crate) outcome: Outcome,
    /// When, and how its last steps went.
    pub(crate) times: ApplyTimes,
}

/// The last steps of a command on this member.
#[derive(Debug, Clone, Copy)]
pub struct ApplyTimes {
    /// Its entry was known to be committed and was handed to the apply thread.
    pub committed: Instant,
    /// The apply thread began with its batch.
    pub begun: Instant,
    /// The batch was in the store.
    pub applied: Instant,
}

/// The stages of one request, filled in as it passes them: what it did not reach stays zero.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StageTimes {
    /// Reading the body, at the client's pace.
    pub receive: Duration,
    /// Until a quorum had confirmed the leader, and this member had applied what was committed.
    pub barrier: Duration,
    /// In the queue, until the command was handed to raft.
    pub queue: Duration,
    /// From there until the entry was committed: the logs of a quorum and the network between.
    pub replicate: Duration,
    /// Until the apply thread came to it.
    pub apply_wait: Duration,
    /// Its batch in the state machine and the store.
    pub apply: Duration,
    /// It asked to wait for something to happen.
    pub waited: bool,
}

/// See [`StageTimes`]. Shared along the request's way.
#[derive(Debug, Default)]
pub struct Stages(Mutex<StageTimes>);

impl Stages {
    /// What was noted so far.
    pub fn times(&self) -> StageTimes {
        *self.0.lock()
    }

    /// Notes something.
    pub fn note(&self, note: impl FnOnce(&mut StageTimes)) {
        note(&mut self.0.lock());
    }
}
