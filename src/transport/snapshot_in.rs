//! Receiving a snapshot: streamed to a file of its own, verified, made durable, handed over. One at a time.

use std::{
    future::Future,
    io::{self, ErrorKind},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use axum::body::HttpBody;
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt as _;
use parking_lot::Mutex;
use raft::eraftpb::Message;
use tokio::{fs::File, io::AsyncWriteExt as _, sync::Semaphore, time::timeout};

use crate::datadir::disk::Headroom;

use super::{
    PeerService, validate,
    wire::{self, WireError},
};

/// The raft message in front of the snapshot: metadata, a few bytes per member.
const MAX_HEAD_BYTES: usize = 64 << 10;

/// The leader sends again as soon as it may; a disk that is full stays so for a while, and is not to be filled up each time.
const FULL_DISK_REST: Duration = Duration::from_secs(10);

static NEXT_FILE: AtomicU64 = AtomicU64::new(0);

/// Why a snapshot was not taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReceiveError {
    #[error("another snapshot is being received")]
    Occupied,
    #[error("the node's queue of peer messages is full")]
    Busy,
    #[error("malformed: {0}")]
    Malformed(#[from] WireError),
    #[error("invalid: {0}")]
    Invalid(String),
    #[error("the transfer broke off: {0}")]
    Broken(String),
    #[error("no progress for {0:?}")]
    Stalled(Duration),
    #[error("it does not verify: {0}")]
    Corrupt(String),
    #[error("cannot store it: {0}")]
    Io(#[from] io::Error),
}

/// Receives one snapshot at a time.
pub(super) struct Receiver {
    place: Arc<Semaphore>,
    /// When the disk was last too full for one.
    full: Mutex<Option<Instant>>,
}

impl Receiver {
    pub(super) fn new() -> Receiver {
        Receiver {
            place: Arc::new(Semaphore::new(1)),
            full: Mutex::default(),
        }
    }

    /// Takes a snapshot that `from` sends to `to`. Nothing is left on disk if it fails or is cancelled.
    pub(super) async fn receive<B>(
        &self,
        service: &Arc<dyn PeerService>,
        (from, to): (u64, u64),
        body: B,
        idle_timeout: Duration,
    ) -> Result<(), ReceiveError>
    where
        B: HttpBody<Data = Bytes> + Unpin,
        B::Error: std::fmt::Display,
    {
        let place = self.place.clone().try_acquire_owned().map_err(|_| ReceiveError::Occupied)?;
        let mut pieces = Pieces { body, idle_timeout };
        let (message, rest) = read_head(&mut pieces).await?;
        validate::check_snapshot(&message, from, to).map_err(ReceiveError::Invalid)?;
        let directory = service.snapshot_dir();
        let mut incoming = Incoming::new(&directory, from, message.get_snapshot().get_metadata().index);
        if self.full.lock().is_some_and(|at| at.elapsed() < FULL_DISK_REST) {
            let what = format!("the disk was full less than {FULL_DISK_REST:?} ago");
            return Err(io::Error::new(ErrorKind::StorageFull, what).into());
        }
        let written = write_durably(incoming.path(), rest, &mut pieces).await;
        if let Err(ReceiveError::Io(error)) = &written
            && matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
        {
            *self.full.lock() = Some(Instant::now());
        }
        written?;
        let service = service.clone();
        // From here on it goes to its end also if the sender goes away and this future is dropped: the place and the file go along.
        let accept = move || {
            let _place = place;
            service.verify_snapshot(&message, incoming.path()).map_err(ReceiveError::Corrupt)?;
            // The name must survive a power cut as well: the node acts on the file once it has it.
            std::fs::File::open(&directory)?.sync_all()?;
            service
                .snapshot_received(from, message, incoming.path().to_owned())
                .map_err(|_| ReceiveError::Busy)?;
            incoming.keep();
            Ok(())
        };
        tokio::task::spawn_blocking(accept)
            .await
            .map_err(|err| ReceiveError::Io(io::Error::other(err)))?
    }
}

/// The body's data, piece by piece, none of them long in coming.
struct Pieces<B> {
    body: B,
    idle_timeout: Duration,
}

impl<B> Pieces<B>
where
    B: HttpBody<Data = Bytes> + Unpin,
    B::Error: std::fmt::Display,
{
    async fn next(&mut self) -> Result<Option<Bytes>, ReceiveError> {
        loop {
            let frame = within(self.idle_timeout, self.body.frame()).await?;
            let Some(frame) = frame else { return Ok(None) };
            if let Ok(data) = frame.map_err(|err| ReceiveError::Broken(err.to_string()))?.into_data() {
                return Ok(Some(data));
            }
        }
    }
}

async fn within<T>(limit: Duration, future: impl Future<Output = T>) -> Result<T, ReceiveError> {
    timeout(limit, future).await.map_err(|_| ReceiveError::Stalled(limit))
}

/// The message in front, and what came with it of the snapshot itself.
async fn read_head<B>(pieces: &mut Pieces<B>) -> Result<(Message, Bytes), ReceiveError>
where
    B: HttpBody<Data = Bytes> + Unpin,
    B::Error: std::fmt::Display,
{
    let mut begin = BytesMut::new();
    while let Some(piece) = pieces.next().await? {
        begin.extend_from_slice(&piece);
        let so_far = begin.split().freeze();
        if let Some((message, end)) = wire::decode_first(&so_far, MAX_HEAD_BYTES)? {
            return Ok((message, so_far.slice(end..)));
        }
        begin.extend_from_slice(&so_far);
    }
    Err(ReceiveError::Malformed(WireError("the body ends within the message".into())))
}

async fn write_durably<B>(path: &Path, first: Bytes, pieces: &mut Pieces<B>) -> Result<(), ReceiveError>
where
    B: HttpBody<Data = Bytes> + Unpin,
    B::Error: std::fmt::Display,
{
    let mut file = File::create(path).await?;
    let mut headroom = Headroom::new(path);
    headroom.check(first.len())?;
    file.write_all(&first).await?;
    while let Some(piece) = pieces.next().await? {
        headroom.check(piece.len())?;
        file.write_all(&piece).await?;
    }
    file.flush().await?;
    file.sync_all().await?;
    Ok(())
}

/// A file that is removed unless it is kept.
struct Incoming {
    path: PathBuf,
    keep: bool,
}

impl Incoming {
    /// A name nobody else uses in this process; a leftover of an earlier one is overwritten.
    fn new(directory: &Path, from: u64, snapshot_index: u64) -> Incoming {
        let name = format!("incoming-{from}-{snapshot_index}-{}.tmp", NEXT_FILE.fetch_add(1, Relaxed));
        Incoming {
            path: directory.join(name),
            keep: false,
        }
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn keep(&mut self) {
        self.keep = true;
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if !self.keep
            && let Err(err) = std::fs::remove_file(&self.path)
            && err.kind() != ErrorKind::NotFound
        {
            tracing::warn!(path = %self.path.display(), error = %err, "cannot remove an incomplete snapshot");
        }
    }
}
