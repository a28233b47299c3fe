//! What the apply thread publishes and everybody else reads.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use parking_lot::{Mutex, RwLock};
use raft::eraftpb::ConfState;
use tokio::sync::watch;

use super::StateError;
use super::apply::RowEvent;
use super::divergence::Reports;
use super::hub::Hub;
use super::lease::Leases;
use super::member::Members;
use super::meta::{MetaRecord, Samples};
use crate::store::KvStore;

/// Shared by the state, its readers, watchers and pins.
///
/// *Invariants*
/// - Published after the batch is in the store: whoever sees a revision or applied index sees everything up to it.
/// - The revision is published before the applied index, and both before anybody is woken.
pub(super) struct Shared {
    pub(super) store: Arc<dyn KvStore>,
    revision: AtomicU64,
    compacted_revision: AtomicU64,
    applied_index: AtomicU64,
    published: RwLock<Published>,
    progress: watch::Sender<Progress>,
    pins: Mutex<BTreeMap<u64, usize>>,
    /// How often a snapshot began or ended to take the place of the store's content: odd while it does.
    epoch: AtomicU64,
    pub(super) hub: Mutex<Hub>,
}

/// What waiters wait for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Progress {
    pub(super) applied_index: u64,
    pub(super) revision: u64,
}

/// The state's smaller parts as of the last published batch; the maps share their memory with the writer's.
#[derive(Clone)]
pub(super) struct Published {
    pub(super) meta: MetaRecord,
    pub(super) conf_state: Arc<ConfState>,
    pub(super) leases: Leases,
    pub(super) members: Members,
    /// The newest boot id of each member that has proposed anything.
    pub(super) boots: Arc<BTreeMap<u64, u64>>,
    pub(super) reports: Reports,
    pub(super) samples: Samples,
    /// Stamp of the oldest idempotency record, and their number.
    pub(super) idempotency: (Option<u64>, usize),
}

impl Shared {
    pub(super) fn new(store: Arc<dyn KvStore>, published: Published) -> Shared {
        let meta = &published.meta;
        let progress = Progress {
            applied_index: meta.applied_index,
            revision: meta.revision,
        };
        Shared {
            store,
            revision: AtomicU64::new(meta.revision),
            compacted_revision: AtomicU64::new(meta.compacted_revision),
            applied_index: AtomicU64::new(meta.applied_index),
            hub: Mutex::new(Hub::new(meta.revision)),
            published: RwLock::new(published),
            progress: watch::Sender::new(progress),
            pins: Mutex::new(BTreeMap::new()),
            epoch: AtomicU64::new(0),
        }
    }

    pub(super) fn revision(&self) -> u64 {
        self.revision.load(Ordering::Acquire)
    }

    pub(super) fn compacted_revision(&self) -> u64 {
        self.compacted_revision.load(Ordering::Acquire)
    }

    pub(super) fn applied_index(&self) -> u64 {
        self.applied_index.load(Ordering::Acquire)
    }

    /// Looks at what is published. Short: the writer waits meanwhile.
    pub(super) fn with<T>(&self, look: impl FnOnce(&Published) -> T) -> T {
        look(&self.published.read())
    }

    /// Publishes a batch that is in the store, with its changes of keys, and wakes whoever waits for it.
    pub(super) fn publish(&self, update: impl FnOnce(&mut Published), events: Vec<RowEvent>) {
        let progress = {
            let mut published = self.published.write();
            update(&mut published);
            Progress {
                applied_index: published.meta.applied_index,
                revision: published.meta.revision,
            }
        };
        // Under the hub's lock, so that no watcher delivers a revision that readers do not see yet.
        let touched = {
            let mut hub = self.hub.lock();
            let touched = hub.append(progress.revision, events);
            self.store_progress(progress);
            touched
        };
        for group in touched {
            group.wake();
        }
        self.progress.send_replace(progress);
    }

    // ---- replacement by a snapshot

    /// Taken before the store is read; [`check_epoch`](Self::check_epoch) tells afterwards whether what was read is to be believed.
    pub(super) fn epoch(&self) -> Epoch {
        Epoch(self.epoch.load(Ordering::Acquire))
    }

    /// An error if a snapshot took the state's place since `epoch`, or was about to.
    pub(super) fn check_epoch(&self, epoch: Epoch) -> Result<(), StateError> {
        // What was read before is read before this load.
        fence(Ordering::Acquire);
        if epoch.is_replacing() || self.epoch() != epoch {
            return Err(StateError::Replaced);
        }
        Ok(())
    }

    /// The store is about to be emptied. No pin holds anything any more.
    pub(super) fn begin_replacement(&self) {
        let mut pins = self.pins.lock();
        if !self.epoch().is_replacing() {
            self.epoch.fetch_add(1, Ordering::AcqRel);
            pins.clear();
        }
    }

    fn end_replacement(&self) {
        if self.epoch().is_replacing() {
            self.epoch.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Publishes a state that was replaced as a whole: its history has nothing to do with what watchers have in hand.
    pub(super) fn republish(&self, published: Published) {
        self.begin_replacement();
        let progress = Progress {
            applied_index: published.meta.applied_index,
            revision: published.meta.revision,
        };
        *self.published.write() = published;
        let touched = {
            let mut hub = self.hub.lock();
            let touched = hub.restart(progress.revision);
            self.store_progress(progress);
            self.end_replacement();
            touched
        };
        for group in touched {
            group.wake();
        }
        self.progress.send_replace(progress);
    }

    fn store_progress(&self, progress: Progress) {
        let compacted_revision = self.with(|published| published.meta.compacted_revision);
        self.compacted_revision.store(compacted_revision, Ordering::Release);
        self.revision.store(progress.revision, Ordering::Release);
        self.applied_index.store(progress.applied_index, Ordering::Release);
    }

    /// Returns once `is_reached` holds of the published progress.
    pub(super) async fn wait(&self, is_reached: impl FnMut(&Progress) -> bool) {
        let mut progress = self.progress.subscribe();
        // The sender lives in here, so it cannot be closed.
        let _ = progress.wait_for(is_reached).await;
    }

    // ---- pins

    /// Holds `revision` against garbage collection, if it can be read now.
    fn try_pin(&self, revision: u64, wanted: Option<Epoch>) -> Option<Epoch> {
        let mut pins = self.pins.lock();
        let epoch = self.epoch();
        if epoch.is_replacing() || wanted.is_some_and(|wanted| wanted != epoch) {
            return None;
        }
        if revision < self.compacted_revision() && !pins.contains_key(&revision) {
            return None;
        }
        *pins.entry(revision).or_default() += 1;
        Some(epoch)
    }

    pub(super) fn unpin(&self, revision: u64, epoch: Epoch) {
        let mut pins = self.pins.lock();
        // The pins of a state that was replaced went with it.
        if self.epoch() != epoch {
            return;
        }
        if let Some(count) = pins.get_mut(&revision) {
            *count -= 1;
            if *count == 0 {
                pins.remove(&revision);
            }
        }
    }

    /// Whether the revision can be read: not compacted, or held by a pin.
    pub(super) fn is_readable(&self, revision: u64) -> bool {
        revision >= self.compacted_revision() || self.pins.lock().contains_key(&revision)
    }

    /// Up to where garbage may be removed: what is compacted, but nothing that a pin needs.
    pub(super) fn garbage_limit(&self) -> u64 {
        let pins = self.pins.lock();
        let pinned = pins.keys().next().copied().unwrap_or(u64::MAX);
        self.compacted_revision().min(pinned)
    }
}

/// Holds history at a revision against compaction while it lives.
pub struct Pin {
    /// The pinned revision. Reads at it work, though it may be compacted for everybody else.
    pub revision: u64,
    shared: Arc<Shared>,
    epoch: Epoch,
}

impl Pin {
    /// `None` if the revision is compacted, or the state about to be replaced.
    pub(super) fn new(revision: u64, shared: &Arc<Shared>) -> Option<Pin> {
        let epoch = shared.try_pin(revision, None)?;
        let shared = shared.clone();
        Some(Pin { revision, shared, epoch })
    }

    /// For a view of the whole state; one that is made while the state is replaced can never be read.
    pub(super) fn of_view(revision: u64, shared: &Arc<Shared>) -> Pin {
        Pin::new(revision, shared).unwrap_or_else(|| Pin {
            revision,
            shared: shared.clone(),
            epoch: Epoch::NEVER,
        })
    }

    /// The same once more.
    pub(super) fn fork(&self) -> Pin {
        // If it fails, the state was replaced meanwhile: both say so when they are read by.
        let _ = self.shared.try_pin(self.revision, Some(self.epoch));
        Pin {
            revision: self.revision,
            shared: self.shared.clone(),
            epoch: self.epoch,
        }
    }

    /// After each read: whether it saw the state that was pinned.
    pub(super) fn check(&self) -> Result<(), StateError> {
        self.shared.check_epoch(self.epoch)
    }
}

/// Between two replacements of the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Epoch(u64);

impl Epoch {
    /// No state was ever of it: odd, and out of reach.
    const NEVER: Epoch = Epoch(u64::MAX);

    pub(super) fn is_replacing(self) -> bool {
        self.0 % 2 == 1
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.shared.unpin(self.revision, self.epoch);
    }
}

impl std::fmt::Debug for Pin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pin").field("revision", &self.revision).finish_non_exhaustive()
    }
}
