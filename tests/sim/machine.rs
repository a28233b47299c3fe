//! What survives a process: the disk, the identity and the clock of a machine.

use std::collections::BTreeMap;
use std::sync::Arc;

use metcd::wal::memory::Disk;

use crate::node::Process;
use crate::plan::Micros;

/// The fastest that any clock ever runs, per mille of real time. Promises about leases are checked against it.
pub const FASTEST_CLOCK: u64 = 1200;
/// The slowest.
pub const SLOWEST_CLOCK: u64 = 850;

/// A machine. Its slot is its member's id minus one: ids are never used again, so neither are slots.
#[derive(Default)]
pub struct Machine {
    pub member: u64,
    pub incarnation: u64,
    pub boot: u64,
    pub disk: Disk,
    /// Complete snapshot files by index.
    pub snapshots: BTreeMap<u64, Arc<[u8]>>,
    pub process: Option<Box<Process>>,
    pub is_paused: bool,
    /// Points between two steps that its process still passes before it dies at one; 0: it does not.
    pub crash_points: u64,
    /// Events that reached a paused process.
    pub stalled: Vec<crate::world::Event>,
    pub clock: Clock,
    pub is_slow: bool,
    /// Snapshots find no room on the disk.
    pub is_full: bool,
    pub trap: Trap,
    /// The disk was damaged or wiped on purpose: the machine may refuse to start.
    pub is_damaged: bool,
    /// Removed, wiped or refusing to start: it never comes back under this id.
    pub is_gone: bool,
}

/// See [`FaultKind::ChangeTrap`](crate::plan::FaultKind::ChangeTrap).
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum Trap {
    #[default]
    None,
    /// Waits for a configuration change.
    Set,
    /// One is on its way to the disk.
    Entered,
    /// It is durable, and nothing more will be before the process is dead.
    Sprung,
}

/// A monotonic clock at a rate of its own. There is no wall clock: nothing in a node can read one.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    base: Micros,
    since: Micros,
    rate: u64,
}

impl Default for Clock {
    fn default() -> Clock {
        Clock {
            base: 0,
            since: 0,
            rate: 1000,
        }
    }
}

impl Clock {
    pub fn now_ms(&self, now: Micros) -> u64 {
        self.at(now) / 1000
    }

    pub fn at(&self, now: Micros) -> Micros {
        self.base + (now - self.since) * self.rate / 1000
    }

    pub fn set_rate(&mut self, now: Micros, rate: u64) {
        *self = Clock {
            base: self.at(now),
            since: now,
            rate,
        };
    }

    /// It shows this now.
    pub fn set(&mut self, now: Micros, own_time: Micros) {
        *self = Clock {
            base: own_time,
            since: now,
            rate: self.rate,
        };
    }

    /// Real duration of what this clock takes for `own`.
    pub fn real(&self, own: Micros) -> Micros {
        own * 1000 / self.rate
    }
}
