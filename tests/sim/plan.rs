//! What a seed decides before anything happens: how large the cluster is, how slow its parts are, and which faults it meets.

use crate::rng::Rng;

/// Microseconds of virtual time.
pub use crate::common::Micros;
pub const MS: Micros = 1_000;
pub const SECOND: Micros = 1_000_000;

/// Length of a driver's tick.
pub const TICK: Micros = 100 * MS;
/// T of the election timeout, in ticks.
pub const ELECTION_TICKS: u64 = 10;

/// Kinds of fault. Shrinking switches them off one by one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum FaultKind {
    /// Messages are lost.
    Loss,
    /// Messages come twice.
    Duplication,
    /// Links that are far slower than others: what is sent later overtakes.
    Delay,
    /// The cluster falls into two parts.
    Partition,
    /// One direction of a link is dead.
    OneWay,
    /// Each node sees its neighbours only.
    Ring,
    /// All links of a node come and go one by one.
    Swizzle,
    /// A process dies; what was not synced may be lost, the last record torn.
    Crash,
    /// All processes die at once.
    Blackout,
    /// A process dies between two steps that belong together: a written record and its sync, an adopted snapshot and the log's new
    /// beginning, an entry and what follows from it.
    CrashPoint,
    /// A process stands still and goes on later.
    Pause,
    /// A monotonic clock runs too fast or too slow.
    Clock,
    /// A machine stands still, its monotonic clock too: afterwards that clock is behind by as much.
    Suspend,
    /// A monotonic clock leaps forward, and nothing else happens meanwhile.
    ClockJump,
    /// Syncs take long, and so does whatever the state machine writes.
    SlowDisk,
    /// A disk stops just after a configuration change has become durable on it, and the process dies before anything else does: it
    /// comes back without knowing that the change is committed.
    ChangeTrap,
    /// The log's disk refuses a write.
    FullDisk,
    /// Snapshots that are written or received find no room; the log goes on.
    FullSnapshotDisk,
    /// A sync fails.
    FailedSync,
    /// A bit on a disk flips.
    BitFlip,
    /// A disk is gone: the machine comes back under a new id.
    Wipe,
}

/// All of them.
pub const FAULT_KINDS: [FaultKind; 21] = [
    FaultKind::Loss,
    FaultKind::Duplication,
    FaultKind::Delay,
    FaultKind::Partition,
    FaultKind::OneWay,
    FaultKind::Ring,
    FaultKind::Swizzle,
    FaultKind::Crash,
    FaultKind::Blackout,
    FaultKind::CrashPoint,
    FaultKind::Pause,
    FaultKind::Clock,
    FaultKind::SlowDisk,
    FaultKind::FullDisk,
    FaultKind::FailedSync,
    FaultKind::BitFlip,
    FaultKind::Wipe,
    FaultKind::Suspend,
    FaultKind::ChangeTrap,
    FaultKind::FullSnapshotDisk,
    FaultKind::ClockJump,
];

/// What a run is asked to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    pub seed: u64,
    /// Faults end here at the latest (shrinking lowers it).
    pub faults_until: Micros,
    /// Kinds that do not happen.
    pub without: Vec<FaultKind>,
    /// Print every event.
    pub trace: bool,
    /// A known bug that is put back in.
    #[cfg(feature = "mutants")]
    pub mutant: Option<metcd::mutants::Mutant>,
}

impl Settings {
    pub fn new(seed: u64) -> Settings {
        Settings {
            seed,
            faults_until: Micros::MAX,
            without: Vec::new(),
            trace: false,
            #[cfg(feature = "mutants")]
            mutant: None,
        }
    }
}

/// The world of a seed.
#[derive(Debug, Clone)]
pub struct Plan {
    pub founders: u64,
    pub clients: usize,
    /// The safety phase: faults and work.
    pub safety_for: Micros,
    /// The liveness phase: everything outstanding finishes within this.
    pub liveness_for: Micros,
    pub heartbeat_ticks: usize,
    pub max_inflight: usize,
    pub max_message_bytes: u64,
    pub snapshot_entries: u64,
    pub keep_entries: u64,
    /// One-way delay of a message, at least and at most.
    pub latency: (Micros, Micros),
    pub loss_per_mille: u64,
    pub duplicate_per_mille: u64,
    /// Duration of a sync, at least and at most.
    pub sync: (Micros, Micros),
    /// Pause of a client between two operations, at most.
    pub think: Micros,
    /// Pause between two faults, at most.
    pub fault_pause: Micros,
    /// How often a fault that hits one machine hits the leader's.
    pub leader_per_mille: u64,
    /// Pause between two acts of the administrator, at most.
    pub admin_pause: Micros,
    /// How much of the clients' work is about leases, in per cent.
    pub lease_share: u64,
    pub faults: Vec<FaultKind>,
    /// Members are added, removed and replaced.
    pub membership: bool,
    pub keys: u64,
    pub retain_revisions: u64,
    pub idempotency_retain_ms: u64,
}

impl Plan {
    /// Clients hold leases and keep them alive, across whatever happens to the leader.
    pub fn keeps_leases(&self) -> bool {
        self.lease_share > 50
    }

    pub fn new(settings: &Settings, rng: &mut Rng) -> Plan {
        let mut founders = [1, 1, 2, 3, 3, 3, 3, 3, 3, 3, 4, 5, 5, 5, 6, 7][rng.range(0, 16) as usize];
        let mut faults = Vec::new();
        // A few kinds each time: some bugs need a single kind undisturbed by the others.
        let share = [150, 300, 500, 800][rng.range(0, 4) as usize];
        for kind in FAULT_KINDS {
            if rng.chance(share) && !settings.without.contains(&kind) {
                faults.push(kind);
            }
        }
        let has = |kind| faults.contains(&kind);
        let base = [200, MS, 10 * MS][rng.range(0, 3) as usize];
        let loss = if has(FaultKind::Loss) {
            [5, 30, 100][rng.range(0, 3) as usize]
        } else {
            0
        };
        let duplicate = if has(FaultKind::Duplication) {
            [10, 100][rng.range(0, 2) as usize]
        } else {
            0
        };
        let slow = has(FaultKind::Delay);
        let traps = has(FaultKind::ChangeTrap);
        if traps && rng.chance(300) {
            // Where every vote is needed.
            founders = 2;
        }
        Plan {
            founders,
            clients: rng.range(2, 7) as usize,
            safety_for: rng.range(40, 120) * SECOND,
            liveness_for: 90 * SECOND,
            heartbeat_ticks: rng.range(1, 4) as usize,
            max_inflight: [1, 4, 64][rng.range(0, 3) as usize],
            max_message_bytes: [0, 200, 1 << 20][rng.range(0, 3) as usize],
            snapshot_entries: [5, 20, 100][rng.range(0, 3) as usize],
            keep_entries: [0, 3, 30][rng.range(0, 3) as usize],
            latency: (base, if slow { 400 * MS } else { 5 * base }),
            loss_per_mille: loss,
            duplicate_per_mille: duplicate,
            sync: (100, [MS, 20 * MS][rng.range(0, 2) as usize]),
            think: [500 * MS, 2 * SECOND, 8 * SECOND][rng.range(0, 3) as usize],
            fault_pause: [SECOND, 4 * SECOND, 12 * SECOND][rng.range(0, 3) as usize],
            leader_per_mille: [0, 400, 800][rng.range(0, 3) as usize],
            admin_pause: [2 * SECOND, 10 * SECOND][rng.range(0, 2) as usize],
            lease_share: [9, 9, 60][rng.range(0, 3) as usize],
            membership: rng.chance(400) || traps,
            keys: [1, 3, 8][rng.range(0, 3) as usize],
            retain_revisions: [20, 100, 100_000][rng.range(0, 3) as usize],
            idempotency_retain_ms: 600_000,
            faults,
        }
    }
}
