//! The Rust client: what the command line, the shell and programs that embed it speak to a cluster with.
//!
//! ```no_run
//! # async fn example() -> Result<(), metcd::client::ClientError> {
//! use metcd::client::Client;
//!
//! let client = Client::new(["http://127.0.0.1:3379", "http://127.0.0.1:4379"])?;
//! client.put(b"greeting", "hello").await?;
//! let found = client.get(b"greeting").await?;
//! assert_eq!(found.map(|kv| kv.value), Some(b"hello".to_vec()));
//! # Ok(())
//! # }
//! ```
//!
//! Invariants:
//! - A request goes on to the next endpoint when nothing of it can have an effect there: connecting failed, or the answer was 429 or
//!   503 with `not_applied`.
//! - A mutation whose connection was lost, or whose answer did not come, may be applied. It is sent again only under the
//!   `Idempotency-Key` that all mutations carry for which the server takes one; otherwise, and at the deadline, the error says
//!   [`Outcome::Unknown`]. An error never says [`Outcome::NotApplied`] of a request that an earlier attempt may have applied.
//! - Every request has a deadline ([`Client::with_timeout`]), over all its attempts.
//! - A [`Watch`](watch::Watch) that breaks goes on where it stopped, on whichever endpoint answers.
//! - No proxy, no redirect, no retry that is not written here.
//!
//! Connections are HTTP/1.1 with keep-alive. They are made with hyper rather than reqwest, whose URL type folds the path segments `.`
//! and `..` also when they are percent-encoded: those are keys here.

mod cluster;
mod connection;
mod encode;
mod endpoint;
mod error;
mod json;
mod kv;
mod lease;
mod request;
mod scan;
mod stream;
#[cfg(test)]
mod tests;
pub mod watch;

use std::sync::Arc;
use std::time::Duration;

pub use cluster::{Leader, Member, Members, NewMember};
pub use encode::percent_encode;
pub use error::{ClientError, Outcome, Problem};
pub use json::KeyValue;
pub use kv::{Condition, Deleted, GetOptions, ListOptions, Page, Put, PutOptions, Range, Waited, put_operation};
pub use lease::{Lease, LeaseDetail};
pub use scan::Scan;
pub use stream::ByteStream;

use connection::Connections;
use endpoint::Endpoints;

/// The deadline of a request if none is set: the server's own default.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(5);
/// Where a server listens by default.
pub const DEFAULT_ENDPOINT: &str = "http://127.0.0.1:3379";

/// A handle on a cluster; cheap to clone. Clones share connections and the knowledge of which endpoint answers.
#[derive(Debug, Clone)]
pub struct Client {
    endpoints: Arc<Endpoints>,
    connections: Connections,
    timeout: Duration,
    serializable: bool,
}

impl Client {
    /// A client of the cluster whose members' client URLs are `endpoints`. Nothing is connected yet.
    ///
    /// # Errors
    /// No endpoint, or one that is not `http://host:port`.
    pub fn new<E: AsRef<str>>(endpoints: impl IntoIterator<Item = E>) -> Result<Client, ClientError> {
        Ok(Client {
            endpoints: Arc::new(Endpoints::parse(endpoints)?),
            connections: Connections::new(),
            timeout: DEFAULT_TIMEOUT,
            serializable: false,
        })
    }

    /// The same with another deadline for each request. It bounds streams until their first message only.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Client {
        self.timeout = timeout;
        self
    }

    /// The same with reads from the answering member's own state: they need no quorum and may be stale.
    #[must_use]
    pub fn with_serializable_reads(mut self, serializable: bool) -> Client {
        self.serializable = serializable;
        self
    }

    /// The same with only the endpoint at `index` of [`endpoints`](Client::endpoints).
    ///
    /// # Errors
    /// There is no such endpoint.
    pub fn only(&self, index: usize) -> Result<Client, ClientError> {
        let url = self.endpoints().nth(index).map(str::to_owned);
        let endpoints = Arc::new(Endpoints::parse(url)?);
        Ok(Client { endpoints, ..self.clone() })
    }

    /// The base URLs, as they are tried.
    pub fn endpoints(&self) -> impl Iterator<Item = &str> {
        self.endpoints.urls()
    }

    /// The deadline of a request.
    #[must_use]
    pub fn timeout(&self) -> Duration {
        self.timeout
    }
}
