//! From a machine's disk to a running process, as `src/server/recover.rs` does it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use metcd::consensus::{Consensus, Input as Step, Options};
use metcd::leader::care::Caretaker;
use metcd::leader::clock::LeaseClock;
use metcd::node::SteadyClock;
use metcd::recovery::reconcile;
use metcd::server::admission::Admissions;
use metcd::snapshot::{self, SnapshotReader, SnapshotWriter};
use metcd::state::command::{MemberRecord, MemberRole};
use metcd::state::{SnapshotView, State};
use metcd::store::{KvStore, MemoryStore};
use metcd::wal::{Wal as _, memory};

use super::{Failure, Process};
use crate::machine::Machine;
use crate::oracle::history::Auditor;
use crate::oracle::raft::{RaftOracle, Written};
use crate::plan::{ELECTION_TICKS, MS, Micros, Plan, TICK};

/// A removed member is accompanied, or goes on, so long at most.
const LINGER_TICKS: u64 = 100;

pub const CLUSTER_ID: u64 = 0xc1;

/// The snapshot that every founder makes, identically: index 1, term 1, the founders as voters.
pub fn founding_snapshot(founders: u64) -> Arc<[u8]> {
    let voter = |id| MemberRecord {
        id,
        peer_url: peer_url(id),
        wanted_role: MemberRole::Voter as i32,
        ..MemberRecord::default()
    };
    let members: Vec<MemberRecord> = (1..=founders).map(voter).collect();
    let mut state = State::open(Arc::new(MemoryStore::new())).expect("an empty store opens");
    state.bootstrap(CLUSTER_ID, &members).expect("an empty state can be founded");
    write_snapshot(state.snapshot_view()).expect("a snapshot of memory")
}

pub fn peer_url(id: u64) -> String {
    format!("http://machine-{id}:3380")
}

/// The whole stream.
pub fn write_snapshot(view: SnapshotView) -> Result<Arc<[u8]>, snapshot::SnapshotError> {
    let mut writer = SnapshotWriter::new(view);
    let mut file = Vec::new();
    while let Some(piece) = writer.next_chunk()? {
        file.extend_from_slice(&piece);
    }
    Ok(file.into())
}

/// Verifies a snapshot, then replaces the store's content by it.
pub fn install(file: &[u8], store: &dyn KvStore) -> Result<(), snapshot::SnapshotError> {
    snapshot::verify(SnapshotReader::new(file)?)?;
    snapshot::load(SnapshotReader::new(file)?, store)?;
    Ok(())
}

impl Process {
    /// Starts on what the machine's disk holds.
    pub fn start(machine: &mut Machine, plan: &Plan, seed: u64, now: Micros, oracle: &mut RaftOracle) -> Result<Process, Failure> {
        let disk = |error: &dyn std::fmt::Display| Failure::Disk(error.to_string());
        machine.boot += 1;
        let mut wal = memory::open(&machine.disk).map_err(|error| disk(&error))?;
        let store = Arc::new(MemoryStore::new());
        let mut state = State::open(store.clone()).map_err(|error| disk(&error))?;
        let newest = machine.snapshots.last_key_value().map(|(&index, file)| (index, file.clone()));
        if let Some((_, file)) = &newest {
            install(file, store.as_ref()).map_err(|error| disk(&error))?;
            state.reload().map_err(|error| disk(&error))?;
        }
        let applied = state.applied();
        let image = reconcile(&mut wal, &applied, newest.map(|(index, _)| index)).map_err(|error| disk(&error))?;
        let log = &image.recovered;
        let entries = wal.entries(log.start.index + 1, log.last_index + 1, u64::MAX);
        let held = entries.map_err(|error| disk(&error))?;
        let held: Vec<Written> = held.iter().map(Written::from).collect();
        oracle.note_begin(machine.member, log.start);
        oracle.note_synced(machine.member, &held);
        oracle.note_conf(applied.index, &applied.conf_state);
        let serve_from = log.hard_state.commit.max(applied.index).min(log.last_index);
        let options = Options {
            id: machine.member,
            boot: machine.boot,
            heartbeat_ticks: plan.heartbeat_ticks,
            election_ticks: ELECTION_TICKS as usize,
            max_inflight: plan.max_inflight,
            max_message_bytes: plan.max_message_bytes,
            linger_ticks: LINGER_TICKS,
            max_unapplied_bytes: 1 << 20,
            seed: seed ^ machine.incarnation ^ machine.boot,
        };
        let reader = state.reader();
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let mut core = Consensus::start(options, image, applied.clone(), reader.cluster_time_ms(), &logger)
            .map_err(|error| Failure::Disk(error.to_string()))?;
        oracle.note_started(machine.member, &held, &core);
        let view = core.view();
        if view.voters == [machine.member] {
            core.step(Step::Campaign);
        }
        let leadership = core.leadership();
        Ok(Process {
            slot: machine.member as usize - 1,
            id: machine.member,
            boot: machine.boot,
            core,
            state,
            reader: reader.clone(),
            store,
            wal,
            steady: SteadyClock::new(machine.clock.now_ms(now), TICK / MS),
            lease_clock: LeaseClock::default(),
            caretaker: Caretaker::default(),
            inbox: VecDeque::new(),
            is_wake_due: false,
            wal_jobs: VecDeque::new(),
            syncing: None,
            unsynced: Vec::new(),
            apply_jobs: VecDeque::new(),
            is_apply_due: false,
            applying: None,
            settled: Vec::new(),
            chores: VecDeque::new(),
            ticks: 0,
            beats: 0,
            offer: None,
            is_view_requested: false,
            arrived: None,
            received: None,
            installing: None,
            durable_index: applied.index,
            is_chore_running: false,
            is_commit_unannounced: false,
            peers: Vec::new(),
            admissions: Admissions::new(machine.member, CLUSTER_ID, machine.incarnation),
            strangers: BTreeSet::new(),
            may_ask_at: 0,
            asked_leader: None,
            view,
            progress: Vec::new(),
            cluster_time_ms: 0,
            leadership,
            replies: BTreeMap::new(),
            gathering: Vec::new(),
            asked: BTreeMap::new(),
            next_token: 0,
            waiting: Vec::new(),
            renewals: Vec::new(),
            serve_from,
            is_installing: false,
            auditor: Auditor::open(&reader),
            failed: None,
        })
    }
}
