//! What the members of the simulation show of the history of the store.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use metcd::state::StateReader;
use metcd::state::reader::ReadError;
use metcd::state::watch::{Change, EventKind, Watcher};

pub use crate::common::history::{History, KeyChange};
use crate::watching::everything;

/// Sees every change of one process' state.
pub struct Auditor {
    watcher: Watcher,
    after: u64,
}

impl Auditor {
    /// From now on.
    pub fn open(reader: &StateReader) -> Option<Auditor> {
        let after = reader.revision();
        let watcher = reader.watch(everything(), after).ok()?;
        Some(Auditor { watcher, after })
    }
}

impl History {
    /// Takes in what a member's state has done since the last call. Opens the watch anew when the state was replaced by a snapshot.
    pub fn follow(&mut self, auditor: &mut Option<Auditor>, reader: &StateReader) -> Result<(), String> {
        let Some(Auditor { watcher, after }) = auditor else {
            *auditor = Auditor::open(reader);
            return Ok(());
        };
        loop {
            match poll_watch(watcher) {
                Poll::Pending => return Ok(()),
                Poll::Ready(Ok(changes)) => {
                    for change in &changes {
                        if change.revision <= *after {
                            return Err(format!("revision {} is delivered again after {after}", change.revision));
                        }
                        *after = change.revision;
                        self.take(change.revision, change.events.iter().map(key_change).collect())?;
                    }
                }
                Poll::Ready(Err(ReadError::Compacted { .. })) => {
                    *auditor = Auditor::open(reader);
                    return Ok(());
                }
                Poll::Ready(Err(error)) => return Err(format!("the history cannot be watched: {error}")),
            }
        }
    }
}

/// An event of a watch as a change.
pub fn key_change(event: &metcd::state::watch::Event) -> KeyChange {
    let key = String::from_utf8_lossy(&event.kv.key).into_owned();
    let value = (event.kind == EventKind::Put).then(|| String::from_utf8_lossy(&event.kv.value).into_owned());
    (key, value)
}

struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Asks a watch for what it has now.
pub fn poll_watch(watcher: &mut Watcher) -> Poll<Result<Vec<Change>, ReadError>> {
    let flag = Arc::new(Flag(AtomicBool::new(false)));
    let waker = Waker::from(flag.clone());
    let mut next = pin!(watcher.next());
    loop {
        match next.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(found) => return Poll::Ready(found),
            Poll::Pending if flag.0.swap(false, Ordering::Relaxed) => {}
            Poll::Pending => return Poll::Pending,
        }
    }
}
