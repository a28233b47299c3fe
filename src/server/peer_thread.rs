//! The thread on which a member talks to its peers: the driver of the protocol, the lanes to each peer and the peer listener are tasks of
//! one single-threaded runtime.
//!
//! A put passes driver, lane, listener, driver, lane, listener and driver before it is committed. On threads of their own each of these
//! steps costs a wake-up of another thread, more than the work it does; here they are queue operations. Clients are served elsewhere
//! (`tokio`'s worker threads), the log and the state machine have their own threads: nothing here may block.

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

/// The thread. It ends with [`stop`](Self::stop) or when this is dropped, and with it every task that is still on it.
pub struct PeerThread {
    handle: Handle,
    stop: oneshot::Sender<()>,
    thread: std::thread::JoinHandle<()>,
}

impl PeerThread {
    /// Starts it.
    pub fn start() -> std::io::Result<PeerThread> {
        let runtime = Builder::new_current_thread().enable_all().thread_name("metcd-peer-io").build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new().name("peers".into()).spawn(move || {
            // An error means that the other end was dropped: that is a stop, too.
            let _ = runtime.block_on(stopped);
            // A task in the blocking pool (a snapshot being read) is not waited for.
            runtime.shutdown_background();
        })?;
        Ok(PeerThread { handle, stop, thread })
    }

    /// Where its tasks are spawned.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Ends its tasks and waits for the thread.
    pub async fn stop(self) {
        let _ = self.stop.send(());
        let thread = self.thread;
        if !matches!(tokio::task::spawn_blocking(move || thread.join()).await, Ok(Ok(()))) {
            tracing::error!("the thread of the peers ended abnormally");
        }
    }
}
