//! A member without listeners: the real threads over a log whose disk can fail, and the directory of snapshots.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use raft::eraftpb::{Entry, HardState, Message, MessageType};
use tokio::runtime::Handle;
use tokio::sync::mpsc::unbounded_channel;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::{Event, Options, Threads, start};
use crate::consensus::{self, Consensus};
use crate::leader::LeaderService;
use crate::node::{Node, Phase, ProposeError, Shared, SharedParts, Stages};
use crate::server::admission::Admissions;
use crate::state::State;
use crate::state::command::{Body, MemberRecord, Put};
use crate::store::{KeyRange, KvStore, MemoryStore, Order, StoreError, Table, Visitor, WriteBatch};
use crate::transport::{Identity, PeerEvents, SenderIdentity, Transport, TransportLimits};
use crate::wal::memory::{self, Disk, FaultAt, MemoryWal};
use crate::wal::{LogStart, Recovered, Wal, WalBatch, WalError, WalStats};
use crate::{recovery, snapshot, snapshot_files};

const SNAPSHOT_ENTRIES: u64 = 5;
const PATIENCE: Duration = Duration::from_secs(20);
/// Nothing that memory does takes so long, however busy the machine is.
const THREAD_PATIENCE: Duration = Duration::from_secs(3);

struct Nobody;

impl PeerEvents for Nobody {
    fn unreachable(&self, _peer: u64) {}
    fn snapshot_sent(&self, _peer: u64, _ok: bool) {}
    fn answered(&self, _sender: &SenderIdentity<'_>, _messages: Vec<Message>) {}
    fn unreached(&self, _: u64, _: Option<std::time::Duration>) {}
    fn removed(&self, _detail: String) {}
    fn refused(&self, _peer: u64, _code: &str, _detail: String) {}
}

/// What was seen of the log's compactions: up to where, and the newest complete snapshot at that moment.
type Compactions = Arc<Mutex<Vec<(u64, Option<u64>)>>>;

/// A log that looks at the directory of snapshots before it forgets anything.
struct WatchedWal {
    wal: MemoryWal,
    snapshots: PathBuf,
    compactions: Compactions,
    /// Held by a test: appends hang.
    gate: Arc<Mutex<()>>,
    /// Set by a test: what is written behind the appends has failed.
    is_broken_behind: Arc<AtomicBool>,
}

impl Wal for WatchedWal {
    fn recovered(&self) -> &Recovered {
        self.wal.recovered()
    }
    fn append(&mut self, batch: &WalBatch) -> Result<(), WalError> {
        drop(self.gate.lock());
        self.wal.append(batch)
    }
    fn entries(&self, low: u64, high: u64, max_bytes: u64) -> Result<Vec<Entry>, WalError> {
        self.wal.entries(low, high, max_bytes)
    }
    fn compact(&mut self, to: LogStart) -> Result<(), WalError> {
        let newest = snapshot_files::newest(&self.snapshots).ok().flatten();
        let complete = newest.and_then(|(_, file)| snapshot::verify_file(&file).ok());
        self.compactions.lock().push((to.index, complete.map(|meta| meta.applied.index)));
        self.wal.compact(to)
    }
    fn reset(&mut self, start: LogStart, hard_state: &HardState) -> Result<(), WalError> {
        self.wal.reset(start, hard_state)
    }
    fn check_background(&self) -> Result<(), WalError> {
        match self.is_broken_behind.load(Ordering::Relaxed) {
            true => Err(WalError::Engine("the fence cannot be written".to_owned())),
            false => self.wal.check_background(),
        }
    }
    fn close(&mut self) -> Result<(), WalError> {
        self.wal.close()
    }
    fn stats(&self) -> WalStats {
        self.wal.stats()
    }
    fn engine(&self) -> &'static str {
        self.wal.engine()
    }
}

/// A store whose writes a test can make hang.
struct GatedStore {
    store: MemoryStore,
    gate: Arc<Mutex<()>>,
}

impl KvStore for GatedStore {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Arc<[u8]>>, StoreError> {
        self.store.get(table, key)
    }
    fn scan(&self, table: Table, range: KeyRange<'_>, order: Order, visit: Visitor<'_>) -> Result<(), StoreError> {
        self.store.scan(table, range, order, visit)
    }
    fn write(&self, batch: WriteBatch) -> Result<(), StoreError> {
        drop(self.gate.lock());
        self.store.write(batch)
    }
    fn sync(&self) -> Result<(), StoreError> {
        self.store.sync()
    }
    fn survives_crashes(&self) -> bool {
        self.store.survives_crashes()
    }
    fn keeps_records(&self) -> bool {
        self.store.keeps_records()
    }
    fn clear(&self) -> Result<(), StoreError> {
        self.store.clear()
    }
    fn bytes(&self) -> u64 {
        self.store.bytes()
    }
    fn backend(&self) -> &'static str {
        self.store.backend()
    }
}

/// A member, the sole voter if it has no other founders.
struct Member {
    node: Node,
    disk: Disk,
    /// Held by a test: appends to the log hang.
    log_gate: Arc<Mutex<()>>,
    /// Set by a test: what the log writes behind its appends has failed.
    is_log_broken_behind: Arc<AtomicBool>,
    /// Held by a test: writes of the store hang.
    store_gate: Arc<Mutex<()>>,
    compactions: Compactions,
    snapshots: tempfile::TempDir,
    threads: Threads,
}

fn begin() -> Member {
    begin_among(&[1])
}

/// A state that these founded.
fn founded(store: Arc<dyn KvStore>, founders: &[u64]) -> State {
    let mut state = State::open(store).expect("opens");
    let founder = |&id: &u64| MemberRecord {
        id,
        ..MemberRecord::default()
    };
    state
        .bootstrap(1, &founders.iter().map(founder).collect::<Vec<_>>())
        .expect("founds");
    state
}

/// Member 1 of these founders.
fn begin_among(founders: &[u64]) -> Member {
    let disk = Disk::new();
    let snapshots = tempfile::tempdir().expect("a directory");
    let (log_gate, store_gate) = (Arc::<Mutex<()>>::default(), Arc::<Mutex<()>>::default());
    let store = Arc::new(GatedStore {
        store: MemoryStore::new(),
        gate: store_gate.clone(),
    });
    let state = founded(store.clone(), founders);
    let mut wal = memory::open(&disk).expect("opens");
    let applied = state.applied();
    let image = recovery::reconcile(&mut wal, &applied, Some(1)).expect("reconciles");
    let options = consensus::Options {
        id: 1,
        boot: 1,
        heartbeat_ticks: 1,
        // A sole voter waits for nobody; what is under way for so long would be proposed again.
        election_ticks: 1_000,
        max_inflight: 64,
        max_message_bytes: 1 << 20,
        linger_ticks: 100,
        max_unapplied_bytes: 1 << 20,
        seed: 1,
    };
    let core = Consensus::start(options, image, applied, 0, &slog::Logger::root(slog::Discard, slog::o!())).expect("starts");
    #[expect(clippy::disallowed_methods, reason = "as in the server: its senders are bounded one by one")]
    let (events_tx, events_rx) = unbounded_channel();
    let tick = Duration::from_millis(10);
    let shared = Arc::new(Shared::new(SharedParts {
        id: 1,
        boot: 1,
        reader: state.reader(),
        store,
        events: events_tx,
        view: core.view(),
        max_waiting: 100,
        tick,
        serve_from_index: 1,
        max_store_bytes: 0,
        wal_engine: "memory",
        admissions: Admissions::new(1, 1, 1),
    }));
    let identity = Identity {
        cluster_id: 1,
        member: 1,
        incarnation: 1,
        boot: 1,
        peer_url: "http://127.0.0.1:1".into(),
    };
    let transport = Transport::start(identity, TransportLimits::default(), Arc::new(Nobody), Handle::current()).expect("a client");
    let compactions = Compactions::default();
    let is_log_broken_behind = Arc::<AtomicBool>::default();
    let wal = WatchedWal {
        wal,
        snapshots: snapshots.path().to_owned(),
        compactions: compactions.clone(),
        gate: log_gate.clone(),
        is_broken_behind: is_log_broken_behind.clone(),
    };
    let options = Options {
        tick,
        snapshot_entries: SNAPSHOT_ENTRIES,
        keep_entries: 0,
        snapshot_dir: snapshots.path().to_owned(),
        patience: THREAD_PATIENCE,
    };
    let runtime = Handle::current();
    let threads = start(
        core,
        Box::new(wal),
        state,
        shared.clone(),
        transport.clone(),
        options,
        events_rx,
        1,
        &runtime,
    )
    .expect("threads");
    let leader = Arc::new(LeaderService::new(shared.clone(), transport));
    Member {
        node: Node::new(shared, leader),
        disk,
        log_gate,
        is_log_broken_behind,
        store_gate,
        compactions,
        snapshots,
        threads,
    }
}

/// Keeps a gate shut until it is dropped.
struct Held {
    open: Option<SyncSender<()>>,
    holder: Option<std::thread::JoinHandle<()>>,
}

fn hold(gate: Arc<Mutex<()>>) -> Held {
    let (holds, held) = sync_channel::<()>(1);
    let (open, opened) = sync_channel::<()>(1);
    let holder = std::thread::spawn(move || {
        let _hangs = gate.lock();
        let _ = holds.send(());
        let _ = opened.recv();
    });
    held.recv().expect("held");
    Held {
        open: Some(open),
        holder: Some(holder),
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.open = None;
        if let Some(holder) = self.holder.take() {
            holder.join().expect("the holder ends");
        }
    }
}

async fn put_value(node: Node, value: Bytes) -> Result<(), ProposeError> {
    let put = Put {
        key: "k".into(),
        value,
        ..Put::default()
    };
    node.propose(Body::Put(put), None, Instant::now() + PATIENCE, &Stages::default())
        .await
        .map(drop)
}

impl Member {
    async fn put(&self) -> Result<(), ProposeError> {
        put_value(self.node.clone(), "v".into()).await
    }

    /// A put that is answered later; it is in the log, as an entry of its own, when this returns.
    async fn begin_put(&self, value: Bytes) -> JoinHandle<Result<(), ProposeError>> {
        let last_index = self.node.status().last_index;
        let put = tokio::spawn(put_value(self.node.clone(), value));
        let deadline = Instant::now() + PATIENCE;
        while self.node.status().last_index == last_index {
            assert!(Instant::now() < deadline, "it is never handed to the log");
            tokio::task::yield_now().await;
        }
        assert_eq!(self.node.status().last_index, last_index + 1);
        put
    }

    fn has_failed_with(&self, reason: &str) {
        let phase = self.node.shared().phases().borrow().clone();
        let Phase::Failed(fatal) = phase else {
            panic!("the member goes on: {phase:?}");
        };
        assert!(fatal.reason.contains(reason), "{}", fatal.reason);
    }

    /// Writes until the log was compacted so many times.
    async fn compacted(&self, times: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.compactions.lock().len() < times {
            assert!(Instant::now() < deadline, "the log is never compacted");
            self.put().await.expect("a healthy disk");
        }
    }

    async fn end(self) {
        self.node.shared().send(Event::Stop);
        self.threads.join().await;
    }
}

#[tokio::test]
async fn rule_11_the_log_is_compacted_only_behind_a_complete_snapshot() {
    let member = begin();
    member.compacted(5).await;
    for (to, snapshot) in member.compactions.lock().iter() {
        assert!(
            snapshot.is_some_and(|index| index >= *to),
            "compacted up to {to}, the newest snapshot is {snapshot:?}"
        );
    }
    // No snapshot can be written any more: the log keeps everything, however long it grows.
    std::fs::remove_dir_all(member.snapshots.path()).expect("removed");
    // One may have been complete before.
    for _ in 0..SNAPSHOT_ENTRIES {
        member.put().await.expect("a healthy disk");
    }
    let compactions = member.compactions.lock().len();
    for _ in 0..10 * SNAPSHOT_ENTRIES {
        member.put().await.expect("a healthy disk");
    }
    let later = member.compactions.lock().split_off(compactions);
    assert!(
        later.iter().all(|(to, snapshot)| snapshot.is_some_and(|index| index >= *to)),
        "{later:?}"
    );
    member.end().await;
}

#[tokio::test]
async fn an_installed_snapshot_takes_the_place_of_the_older_file() {
    let founders = [1, 2];
    let member = begin_among(&founders);
    let dir = member.snapshots.path();
    let mut leaders = founded(Arc::new(MemoryStore::new()), &founders);
    let older = snapshot_files::path_of(dir, 1);
    snapshot::write_file(leaders.snapshot_view(), &older).expect("written");
    let entry = Entry {
        index: 2,
        term: 2,
        ..Entry::default()
    };
    leaders.apply(&[entry]).expect("applies");
    let received = dir.join("incoming-2-2.tmp");
    snapshot::write_file(leaders.snapshot_view(), &received).expect("written");

    let mut message = Message::default();
    message.set_msg_type(MessageType::MsgSnapshot);
    (message.from, message.to, message.term) = (2, 1, 2);
    let metadata = message.mut_snapshot().mut_metadata();
    (metadata.index, metadata.term) = (2, 2);
    metadata.set_conf_state(leaders.applied().conf_state);
    member.node.shared().send(Event::SnapshotReceived { message, file: received });

    let deadline = Instant::now() + PATIENCE;
    while older.exists() {
        assert!(Instant::now() < deadline, "the snapshot that was replaced stays");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let newer = snapshot_files::path_of(dir, 2);
    assert_eq!(snapshot_files::newest(dir).expect("listed"), Some((2, newer)));
    assert_eq!(member.node.shared().reader.applied_index(), 2);
    member.end().await;
}

async fn ends_at(fault: FaultAt, named: &str) {
    let member = begin();
    member.put().await.expect("a healthy disk");
    member.disk.fail(fault, 0, std::io::ErrorKind::Other);
    assert_eq!(
        member.put().await,
        Err(ProposeError::Timeout),
        "handed to raft: nobody knows what became of it"
    );
    member.has_failed_with(named);
    // Nothing is tried again, and nothing is answered: whatever a second fdatasync said, it would prove nothing.
    let syncs = member.disk.syncs();
    assert_eq!(member.put().await, Err(ProposeError::ShuttingDown));
    let (disk, shared) = (member.disk.clone(), member.node.shared().clone());
    member.end().await;
    assert_eq!(disk.syncs(), syncs);
    assert!(matches!(*shared.phases().borrow(), Phase::Failed(_)));
}

#[tokio::test]
async fn rule_5_a_failed_sync_ends_the_member_and_is_not_tried_again() {
    ends_at(FaultAt::Sync, "fdatasync").await;
}

#[tokio::test]
async fn rule_5_a_failed_write_ends_the_member() {
    ends_at(FaultAt::Write, "write").await;
}

#[tokio::test]
async fn rule_5_a_sync_that_failed_behind_the_appends_ends_a_member_that_appends_nothing() {
    let member = begin();
    member.put().await.expect("a healthy disk");
    member.is_log_broken_behind.store(true, Ordering::Relaxed);
    let mut phases = member.node.shared().phases();
    let failed = phases.wait_for(|phase| matches!(phase, Phase::Failed(_)));
    let ended = tokio::time::timeout(PATIENCE, failed).await;
    assert!(ended.is_ok_and(|phase| phase.is_ok()), "it goes on");
    member.has_failed_with("the fence cannot be written");
    member.end().await;
}

/// Whoever hangs is named, and nobody is told that the command was not applied.
async fn ends_when_hung(gate: impl Fn(&Member) -> Arc<Mutex<()>>, named: &str) {
    let member = begin();
    member.put().await.expect("a healthy disk");
    let held = hold(gate(&member));
    assert_eq!(
        member.put().await,
        Err(ProposeError::Timeout),
        "handed to raft: nobody knows what became of it"
    );
    member.has_failed_with(named);
    drop(held);
    member.end().await;
}

#[tokio::test]
async fn a_log_that_hangs_ends_the_member() {
    ends_when_hung(|member| member.log_gate.clone(), "the log has not finished a write").await;
}

#[tokio::test]
async fn a_store_that_hangs_ends_the_member() {
    ends_when_hung(|member| member.store_gate.clone(), "the store has not finished a write").await;
}

/// Long enough for a put of it to be proposed at once: shorter ones wait for each other while one is under way.
const LONG_VALUE_BYTES: usize = 256 << 10;
/// Together less than what goes into one sync at most.
const PUTS_AT_ONCE: usize = 20;

#[tokio::test]
async fn what_comes_while_the_log_is_busy_shares_one_sync() {
    let member = begin();
    member.put().await.expect("a healthy disk");
    let held = hold(member.log_gate.clone());
    let mut puts = Vec::new();
    for _ in 0..PUTS_AT_ONCE {
        puts.push(member.begin_put(vec![0; LONG_VALUE_BYTES].into()).await);
    }
    let syncs = member.disk.syncs();
    drop(held);
    for put in puts {
        put.await.expect("it ends").expect("a healthy disk");
    }
    let syncs = member.disk.syncs() - syncs;
    // The entry that the log was busy with, all the others, and perhaps a compaction.
    assert!((2..=3).contains(&syncs), "{syncs} syncs for {PUTS_AT_ONCE} entries");
    member.end().await;
}

/// On more than one thread: a loop that waits is found out, instead of stopping the test.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_loop_goes_on_while_the_log_is_busy() {
    let member = begin();
    member.put().await.expect("a healthy disk");
    let held = hold(member.log_gate.clone());
    let put = member.begin_put("v".into()).await;
    let syncs = member.disk.syncs();
    for _ in 0..10 {
        let read = member.node.read_barrier(Instant::now() + THREAD_PATIENCE).await;
        assert_eq!(read, Ok(()), "reads need no disk");
    }
    assert!(!put.is_finished(), "nothing is answered that is not durable");
    assert_eq!(member.disk.syncs(), syncs);
    drop(held);
    assert_eq!(put.await.expect("it ends"), Ok(()));
    member.end().await;
}
