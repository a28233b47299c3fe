//! The listener for clients. It is there before the member is, and outlives a start that fails: see [`http::Starting`].

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::{ServerError, bind, serve_limits};
use crate::config::Config;
use crate::http::{self, Api};
use crate::node::{Phase, Shared};
use crate::serve::{self, Plain, ServeStats};

/// How long a process that cannot start waits for its last answers to be taken.
const LAST_ANSWERS_WITHIN: Duration = Duration::from_secs(1);

/// Serves clients while the member starts.
pub(super) struct Clients {
    api: http::Starting,
    member: Arc<AtomicU64>,
    stats: Arc<ServeStats>,
    running: oneshot::Sender<Arc<Shared>>,
    server: JoinHandle<()>,
}

impl Clients {
    /// Listens for a member of this configuration and, if it is known already, this id.
    pub async fn listen(config: &Config, id: Option<u64>) -> Result<Clients, ServerError> {
        let listener = bind("clients", "--listen-client", config.listen.client).await?;
        let member = Arc::new(AtomicU64::new(id.unwrap_or(0)));
        let api = http::Starting::new(config, member.clone());
        let stats = Arc::new(ServeStats::default());
        let (running, is_running) = oneshot::channel();
        let server = tokio::spawn(serve::serve_with(
            listener,
            Plain,
            api.clone(),
            serve_limits(config, member.clone()),
            stats.clone(),
            async {
                // An error: the start has failed.
                if let Ok(shared) = is_running.await {
                    stopping(shared).await;
                }
            },
        ));
        Ok(Clients {
            api,
            member,
            stats,
            running,
            server,
        })
    }

    /// A joiner without an id of its own was given one.
    pub fn set_member(&self, id: u64) {
        self.member.store(id, Ordering::Relaxed);
    }

    pub fn stats(&self) -> Arc<ServeStats> {
        self.stats.clone()
    }

    /// The member serves, until it is to stop. What comes back ends when the last client is gone then.
    pub fn started(self, api: Api, shared: Arc<Shared>) -> JoinHandle<()> {
        self.api.started(api);
        // The receiver is gone only if the server is.
        let _ = self.running.send(shared);
        self.server
    }

    /// There will be no member: whoever waits for it is told so before the process ends.
    pub async fn give_up(self) {
        self.api.give_up();
        drop(self.running);
        // Who does not take the answer by then has lost the connection, as with any process that ends.
        let _ = timeout(LAST_ANSWERS_WITHIN, self.server).await;
    }
}

/// Resolves when no new requests are to be taken in.
async fn stopping(shared: Arc<Shared>) {
    // An error means that the node is gone altogether.
    let _ = shared.phases().wait_for(|phase| *phase != Phase::Running).await;
}
