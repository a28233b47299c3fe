//! `GET /v1/snapshot`: one moment of everything, as a stream with checksums of its own.

use std::io;

use axum::body::Body;
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderValue, StatusCode, header};

use super::WatchSlot;
use super::call::{Call, Reply};
use super::respond;
use crate::serve::Patience;
use crate::snapshot::SnapshotWriter;

/// `GET /v1/snapshot`
pub(super) async fn snapshot(call: &mut Call<'_>) -> Reply {
    let deadline = call.deadline()?;
    let consistency = call.consistency()?;
    call.params.finish()?;
    // It holds history against removal as long as it is read: it counts among the open watches.
    let slot = call.app.watch_slot()?;
    call.settle(consistency, deadline).await?;
    let view = call.app.node.snapshot_view(deadline).await?;
    let (revision, estimate) = (view.revision, view.logical_bytes());
    let backup = Backup {
        slot,
        writer: SnapshotWriter::new(view),
    };
    let body = Body::from_stream(stream::unfold(Some(backup), |backup| async move {
        let (backup, piece) = backup?.next_piece().await;
        Some((piece?, backup))
    }));
    let mut response = respond::at_revision(respond::with_body(StatusCode::OK, respond::RAW, body), revision);
    // How long it is nobody knows before it is read.
    let headers = response.headers_mut();
    headers.insert(&respond::METCD_SNAPSHOT_BYTES_ESTIMATE, HeaderValue::from(estimate));
    response.extensions_mut().insert(Patience(Some(call.app.config.limits.max_stream)));
    if let Ok(name) = HeaderValue::try_from(format!("attachment; filename=\"metcd-{revision}.snapshot\"")) {
        response.headers_mut().insert(header::CONTENT_DISPOSITION, name);
    }
    Ok(response)
}

/// A backup on its way out; pulled, so that it is never whole in memory.
struct Backup {
    slot: WatchSlot,
    writer: SnapshotWriter,
}

impl Backup {
    /// The next piece, and itself unless it is over. An error breaks the body off, and without its trailer no restore takes it.
    async fn next_piece(mut self) -> (Option<Backup>, Option<io::Result<Bytes>>) {
        let app = self.slot.0.clone();
        let reading = tokio::task::spawn_blocking(move || {
            let piece = self.writer.next_chunk();
            (self, piece)
        });
        let read = tokio::select! {
            read = reading => read,
            () = app.node.shutting_down() => return (None, Some(Err(io::Error::other("shutting_down")))),
        };
        match read {
            Ok((backup, Ok(Some(piece)))) => (Some(backup), Some(Ok(piece))),
            Ok((_, Ok(None))) => (None, None),
            Ok((_, Err(cause))) => {
                tracing::error!(%cause, "a backup broke off");
                (None, Some(Err(io::Error::other("internal"))))
            }
            Err(cause) => {
                tracing::error!(%cause, "a blocking read did not finish");
                (None, Some(Err(io::Error::other("internal"))))
            }
        }
    }
}
