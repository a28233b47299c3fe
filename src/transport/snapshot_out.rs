//! Sending a snapshot: the raft message in front, then the chunks as they come from a blocking thread, a few ahead of the network.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use axum::http::StatusCode;
use bytes::Bytes;
use parking_lot::Mutex;
use raft::eraftpb::Message;
use reqwest::{Body, Client};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};

use super::{
    PeerEvents, SnapshotSource, TransportLimits,
    lane::{Destination, read_problem},
    outbound::with_sources,
    wire::{WireError, encode_into},
};

/// Chunks read ahead of the network.
const READ_AHEAD: usize = 4;

/// The promise to report one snapshot exactly once: kept by [`sent`](Self::sent), or as a failure when dropped.
pub(super) struct Report {
    peer: u64,
    events: Option<Arc<dyn PeerEvents>>,
}

impl Report {
    pub(super) fn new(peer: u64, events: Arc<dyn PeerEvents>) -> Report {
        Report {
            peer,
            events: Some(events),
        }
    }

    pub(super) fn sent(mut self) {
        if let Some(events) = self.events.take() {
            events.snapshot_sent(self.peer, true);
        }
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        if let Some(events) = self.events.take() {
            events.snapshot_sent(self.peer, false);
        }
    }
}

/// Holds a peer's only place for a snapshot under way.
pub(super) struct Underway(Arc<Mutex<bool>>);

impl Underway {
    pub(super) fn begin(place: &Arc<Mutex<bool>>) -> Option<Underway> {
        let mut taken = place.lock();
        let free = !std::mem::replace(&mut *taken, true);
        free.then(|| Underway(place.clone()))
    }
}

impl Drop for Underway {
    fn drop(&mut self) {
        *self.0.lock() = false;
    }
}

/// Why a snapshot did not arrive.
#[derive(Debug, thiserror::Error)]
pub(super) enum SendError {
    #[error("refused ({code}): {detail}")]
    Refused { code: String, detail: String },
    #[error("{status} {code}: {detail}")]
    Failed { status: StatusCode, code: String, detail: String },
    #[error("{0}")]
    Broken(String),
    #[error("no progress for {0:?}")]
    Stalled(Duration),
    #[error(transparent)]
    Encode(#[from] WireError),
}

/// Sends, and waits until the receiver has verified it and made it durable.
pub(super) async fn send(
    client: &Client,
    destination: &Destination,
    message: &Message,
    source: Box<dyn SnapshotSource>,
    limits: &TransportLimits,
) -> Result<(), SendError> {
    let mut url = destination.url.clone();
    url.set_path(&format!("{}/snapshot", url.path()));
    let mut head = Vec::new();
    encode_into(&mut head, message)?;
    let progress = Arc::new(Progress::default());
    let body = Body::wrap_stream(stream_of(head.into(), source, progress.clone()));
    let request = client.post(url).headers(destination.headers()).body(body).send();
    let response = tokio::select! {
        response = request => response.map_err(|err| SendError::Broken(with_sources(&err)))?,
        stalled = progress.stall(limits) => return Err(stalled),
    };
    let status = response.status();
    if status == StatusCode::OK {
        return Ok(());
    }
    let (code, detail) = read_problem(response).await;
    match status {
        StatusCode::PRECONDITION_FAILED => Err(SendError::Refused { code, detail }),
        _ => Err(SendError::Failed { status, code, detail }),
    }
}

/// The body. The blocking thread ends when the stream is dropped, at the latest with the chunk it is reading.
fn stream_of(
    head: Bytes,
    mut source: Box<dyn SnapshotSource>,
    progress: Arc<Progress>,
) -> impl futures_util::Stream<Item = io::Result<Bytes>> + Send + 'static {
    let (chunk_tx, chunk_rx) = mpsc::channel::<io::Result<Bytes>>(READ_AHEAD);
    tokio::task::spawn_blocking(move || {
        while let Some(chunk) = source.next_chunk().transpose() {
            let failed = chunk.is_err();
            if chunk_tx.blocking_send(chunk).is_err() || failed {
                return;
            }
        }
    });
    let first = (Some(head), chunk_rx, progress);
    futures_util::stream::unfold(first, |(head, mut chunk_rx, progress)| async move {
        let chunk = match head {
            Some(head) => Some(Ok(head)),
            None => chunk_rx.recv().await,
        };
        progress.note(chunk.is_none());
        chunk.map(|chunk| (chunk, (None, chunk_rx, progress)))
    })
}

/// How far the network has pulled.
#[derive(Default)]
struct Progress(AtomicU64);

/// The body is out; only the answer is missing.
const FINISHED: u64 = u64::MAX;

impl Progress {
    fn note(&self, finished: bool) {
        self.0.store(if finished { FINISHED } else { self.0.load(Relaxed) + 1 }, Relaxed);
    }

    /// Returns when nothing has moved for too long.
    async fn stall(&self, limits: &TransportLimits) -> SendError {
        let mut seen = 0;
        let mut since = Instant::now();
        loop {
            let limit = if seen == FINISHED {
                limits.snapshot_finish_timeout
            } else {
                limits.snapshot_idle_timeout
            };
            sleep_until(since + limit).await;
            let now = self.0.load(Relaxed);
            if now == seen {
                return SendError::Stalled(limit);
            }
            (seen, since) = (now, Instant::now());
        }
    }
}
