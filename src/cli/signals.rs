//! SIGTERM and SIGINT: the first asks the member to stop in order, the second ends it at once.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

/// What ends the process.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// Catches both signals from now on; called inside the runtime.
    ///
    /// # Errors
    /// When the operating system refuses a handler.
    pub fn catch() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }

    /// Tells `stop` at the first signal; returns at the second.
    pub async fn run(mut self, stop: oneshot::Sender<()>) {
        let first = self.next().await;
        tracing::info!(signal = first, "stopping in order; once more to stop at once");
        // A server that has ended already has nothing left to be told.
        let _ = stop.send(());
        let second = self.next().await;
        tracing::warn!(signal = second, "stopping at once");
    }
}
