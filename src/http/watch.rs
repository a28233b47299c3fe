//! `GET /v1/watch`: changes as they come, as server-sent events or NDJSON.
//!
//! The body is pulled: the next piece is made when the connection asks for it, from a [`Watcher`] that holds one batch at most. So a
//! slow reader costs neither memory nor anybody's time; it is fed from history at its own pace, until that is compacted.
//!
//! Invariants: one message a revision; `open` first; a `progress` only when every change up to its revision was sent; after `error`
//! nothing.

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use futures_util::stream;
use http::header::{HeaderMap, HeaderName};
use http::{HeaderValue, StatusCode, header};
use tokio::time::{Instant, sleep_until};

use super::accept::{Form, negotiate};
use super::call::{Call, Reply};
use super::error::{ApiError, Problem};
use super::json::{self, invalid};
use super::params::decimal;
use super::respond;
use super::route::check_key;
use super::span;
use super::{App, WatchSlot};
use crate::serve::{Background, Patience};
use crate::state::command::KeySpan;
use crate::state::outcome::KeyValue;
use crate::state::watch::{Change, Event, EventKind, WatchFilter, Watcher};

static LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// How long without a change until a `progress`.
const PROGRESS_EVERY: Duration = Duration::from_secs(10);
/// A change of so many events is encoded once for all its watchers; a larger one (a range delete) piece by piece for each of them.
const SHARED_EVENTS: usize = 128;
/// Such a piece ends after the event that makes it at least this long.
const PIECE_BYTES: usize = 64 << 10;

/// `GET /v1/watch`
pub(super) async fn watch(call: &mut Call<'_>) -> Reply {
    let deadline = call.deadline()?;
    let consistency = call.consistency()?;
    let from_revision = call.params.revision("from_revision")?;
    let filter = filter(call)?;
    let resumed = resume_point(call.headers(), from_revision)?;
    let form = negotiate(call.headers(), Form::EventStream, Form::Ndjson);
    let slot = call.app.watch_slot()?;
    call.settle(consistency, deadline).await?;
    let reader = call.app.node.reader();
    let after = resumed.unwrap_or_else(|| reader.revision());
    let watcher = reader.watch(filter, after)?;
    let progress_at = Instant::now() + PROGRESS_EVERY;
    let feed = Feed {
        slot,
        watcher,
        format: Format(form),
        changes: VecDeque::new(),
        next_event: 0,
        progress_at,
        after,
        state: FeedState::Begin,
    };
    let content_type = if form == Form::Ndjson {
        respond::NDJSON
    } else {
        HeaderValue::from_static("text/event-stream")
    };
    let body = Body::from_stream(stream::unfold(feed, |mut feed| async move {
        let piece = feed.next_piece().await?;
        Some((piece, feed))
    }));
    let mut response = respond::at_revision(respond::with_body(StatusCode::OK, content_type, body), after);
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::VARY, HeaderValue::from_static("Accept"));
    response.extensions_mut().insert(Background);
    // Who does not read is fed from history when it does again, at its own pace; until then it costs its socket's buffers.
    response.extensions_mut().insert(Patience(None));
    Ok(response)
}

/// The last of the parameters: a mistyped `key` is called that, and not a missing one.
fn filter(call: &mut Call<'_>) -> Result<WatchFilter, ApiError> {
    let (key, range) = (call.params.bytes("key"), span::from_params(&mut call.params)?);
    let (puts, deletes) = match call.params.bytes("only").as_deref() {
        None => (true, true),
        Some(b"put") => (true, false),
        Some(b"delete") => (false, true),
        Some(_) => return Err(invalid("`only` must be `put` or `delete`".to_owned())),
    };
    let want_prev = call.params.flag("prev")?;
    call.params.finish()?;
    let span = match (key, range) {
        (Some(key), None) => {
            check_key(&key)?;
            KeySpan::single(&key)
        }
        (None, Some(span)) => span,
        (None, None) => return Err(invalid("a `key` or a `prefix` is required; `prefix=` is everything".to_owned())),
        (Some(_), Some(_)) => return Err(invalid("`key` and a range exclude each other".to_owned())),
    };
    Ok(WatchFilter {
        span,
        puts,
        deletes,
        want_prev,
    })
}

/// The revision to begin after. `Last-Event-ID` wins over `from_revision`: a browser that reconnects repeats the first URL and adds
/// the header.
pub(super) fn resume_point(headers: &HeaderMap, from_revision: Option<u64>) -> Result<Option<u64>, ApiError> {
    if headers.get_all(&LAST_EVENT_ID).iter().count() > 1 {
        return Err(invalid("`Last-Event-ID` is given twice".to_owned()));
    }
    match headers.get(&LAST_EVENT_ID) {
        Some(id) => {
            let id =
                decimal(id.as_bytes()).ok_or_else(|| invalid("`Last-Event-ID` must be the `id` of an event: a revision".to_owned()))?;
            Ok(Some(id))
        }
        None => Ok(from_revision.map(|revision| revision - 1)),
    }
}

/// One open watch on its way out.
struct Feed {
    slot: WatchSlot,
    watcher: Watcher,
    format: Format,
    /// Changes still to be sent.
    changes: VecDeque<Change>,
    /// Within the first of them: a change of many keys goes out in several pieces.
    next_event: usize,
    progress_at: Instant,
    /// The revision the watch begins after.
    after: u64,
    state: FeedState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FeedState {
    Begin,
    Open,
    Ended,
}

/// What woke a feed up.
enum Wake {
    Changes(Vec<Change>),
    Progress,
    Failed(ApiError),
}

impl Feed {
    async fn next_piece(&mut self) -> Option<Result<Bytes, io::Error>> {
        match self.state {
            FeedState::Ended => None,
            FeedState::Begin => {
                self.state = FeedState::Open;
                Some(Ok(self.format.mark("open", self.after)))
            }
            FeedState::Open => Some(self.go_on().await),
        }
    }

    async fn go_on(&mut self) -> Result<Bytes, io::Error> {
        if self.changes.is_empty() {
            match self.wake().await {
                Wake::Changes(changes) => self.changes.extend(changes),
                Wake::Progress => {
                    self.progress_at = Instant::now() + PROGRESS_EVERY;
                    return Ok(self.format.mark("progress", self.watcher.position()));
                }
                Wake::Failed(error) => return self.end(&error),
            }
        }
        self.progress_at = Instant::now() + PROGRESS_EVERY;
        Ok(self.piece())
    }

    async fn wake(&mut self) -> Wake {
        let node = &self.slot.app().node;
        let wake = tokio::select! {
            // In this order: a connection that could not be written to for a while has changes waiting, and needs no progress.
            biased;
            () = node.shutting_down() => Wake::Failed(Problem::ShuttingDown.into()),
            changes = self.watcher.next() => match changes {
                Ok(changes) => Wake::Changes(changes),
                Err(error) => Wake::Failed(error.into()),
            },
            () = sleep_until(self.progress_at) => Wake::Progress,
        };
        match node.ensure_serving() {
            Ok(()) => wake,
            Err(error) => Wake::Failed(error.into()),
        }
    }

    /// Ends with an `error` message; an error of the server itself breaks the body off instead.
    fn end(&mut self, error: &ApiError) -> Result<Bytes, io::Error> {
        self.state = FeedState::Ended;
        if error.problem == Problem::Internal {
            return Err(io::Error::other(error.problem.code()));
        }
        Ok(self.format.error(&error.problem))
    }

    /// The messages of the next changes that are encoded once for all: a single one as it is, several as one piece, because each piece costs
    /// the connection more than copying does.
    fn shared_messages(&mut self) -> Bytes {
        let mut pieces = Vec::new();
        let mut bytes = 0;
        while bytes < PIECE_BYTES
            && let Some(change) = self.changes.front().filter(|change| change.events.len() <= SHARED_EVENTS)
        {
            let message = self.format.shared(change);
            bytes += message.len();
            pieces.push(message);
            self.changes.pop_front();
        }
        match pieces.len() {
            1 => pieces.swap_remove(0),
            _ => pieces.concat().into(),
        }
    }

    /// Some of what waits to be sent: the next change, or a part of it if it is large.
    fn piece(&mut self) -> Bytes {
        let Some(change) = self.changes.front() else { return Bytes::new() };
        if change.events.len() <= SHARED_EVENTS {
            return self.shared_messages();
        }
        let mut out = Vec::with_capacity(PIECE_BYTES);
        if self.next_event == 0 {
            self.format.begin_change(&mut out, change.revision);
        }
        while let Some(event) = change.events.get(self.next_event) {
            if self.next_event > 0 {
                out.push(b',');
            }
            write_event(&mut out, event);
            self.next_event += 1;
            if out.len() >= PIECE_BYTES && self.next_event < change.events.len() {
                return out.into();
            }
        }
        self.format.end_change(&mut out);
        self.changes.pop_front();
        self.next_event = 0;
        out.into()
    }
}

/// How messages are framed: server-sent events, or lines of JSON.
struct Format(Form);

impl Format {
    fn is_ndjson(&self) -> bool {
        self.0 == Form::Ndjson
    }

    /// `open` and `progress`: a revision and nothing else.
    fn mark(&self, kind: &str, revision: u64) -> Bytes {
        if self.is_ndjson() {
            format!("{{\"type\":\"{kind}\",\"revision\":{revision}}}\n").into()
        } else {
            format!("id: {revision}\nevent: {kind}\ndata: {{\"revision\":{revision}}}\n\n").into()
        }
    }

    /// The last message. It has no `id`, so that a client resumes after the last change it saw.
    fn error(&self, problem: &Problem) -> Bytes {
        let mut fields = format!(
            "\"code\":\"{}\",\"detail\":{}",
            problem.code(),
            serde_json::Value::from(problem.detail())
        );
        if let Problem::Compacted { compacted_revision } = problem {
            fields.push_str(&format!(",\"compacted_revision\":{compacted_revision}"));
        }
        if self.is_ndjson() {
            format!("{{\"type\":\"error\",{fields}}}\n").into()
        } else {
            format!("event: error\ndata: {{{fields}}}\n\n").into()
        }
    }

    /// The whole message of a change, encoded by the first watcher that sends it.
    fn shared(&self, change: &Change) -> Bytes {
        let slot = if self.is_ndjson() {
            &change.encoded.json_line
        } else {
            &change.encoded.event_stream
        };
        let encode = || {
            let mut out = Vec::with_capacity(256);
            self.begin_change(&mut out, change.revision);
            for (at, event) in change.events.iter().enumerate() {
                if at > 0 {
                    out.push(b',');
                }
                write_event(&mut out, event);
            }
            self.end_change(&mut out);
            out.into()
        };
        slot.get_or_init(encode).clone()
    }

    fn begin_change(&self, out: &mut Vec<u8>, revision: u64) {
        if self.is_ndjson() {
            json::write_number(out, "{\"type\":\"change\",\"revision\":", revision);
        } else {
            json::write_number(out, "id: ", revision);
            json::write_number(out, "\nevent: change\ndata: {\"revision\":", revision);
        }
        out.extend_from_slice(b",\"events\":[");
    }

    fn end_change(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(if self.is_ndjson() { b"]}\n" } else { b"]}\n\n" });
    }
}

fn write_event(out: &mut Vec<u8>, event: &Event) {
    match event.kind {
        EventKind::Put => {
            out.extend_from_slice(b"{\"type\":\"put\",\"kv\":");
            json::write_kv(out, &event.kv, true);
        }
        EventKind::Delete => {
            out.extend_from_slice(b"{\"type\":\"delete\",\"kv\":");
            write_deleted(out, &event.kv);
        }
    }
    if let Some(prev) = &event.prev {
        out.extend_from_slice(b",\"prev\":");
        json::write_kv(out, prev, true);
    }
    out.push(b'}');
}

/// A deleted key has a key and the revision of its end.
fn write_deleted(out: &mut Vec<u8>, kv: &KeyValue) {
    out.push(b'{');
    json::write_bytes(out, "key", &kv.key);
    json::write_number(out, ",\"mod_revision\":", kv.mod_revision);
    out.push(b'}');
}

impl WatchSlot {
    fn app(&self) -> &App {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: EventKind, prev: bool) -> Event {
        let kv = KeyValue {
            key: "a".into(),
            value: "x\ny".into(),
            create_revision: 2,
            mod_revision: 43,
            version: 1,
            lease: 0,
        };
        Event {
            kind,
            prev: prev.then(|| kv.clone()),
            kv,
        }
    }

    fn written(event: &Event) -> serde_json::Value {
        let mut out = Vec::new();
        write_event(&mut out, event);
        serde_json::from_slice(&out).unwrap()
    }

    #[test]
    fn messages_are_framed_as_the_contract_shows_them() {
        let sse = Format(Form::EventStream);
        assert_eq!(sse.mark("open", 42), "id: 42\nevent: open\ndata: {\"revision\":42}\n\n");
        let mut out = Vec::new();
        sse.begin_change(&mut out, 43);
        sse.end_change(&mut out);
        assert_eq!(out, b"id: 43\nevent: change\ndata: {\"revision\":43,\"events\":[]}\n\n");
        let ndjson = Format(Form::Ndjson);
        assert_eq!(ndjson.mark("progress", 42), "{\"type\":\"progress\",\"revision\":42}\n");
        let error = ndjson.error(&Problem::Compacted { compacted_revision: 9 });
        let error: serde_json::Value = serde_json::from_slice(&error).unwrap();
        assert_eq!(
            (&error["type"], &error["code"], &error["compacted_revision"]),
            (&"error".into(), &"compacted".into(), &9.into())
        );
    }

    #[test]
    fn a_line_break_in_a_value_does_not_break_the_framing() {
        let mut out = Vec::new();
        write_event(&mut out, &event(EventKind::Put, true));
        assert!(!out.contains(&b'\n'));
    }

    #[test]
    fn a_delete_has_key_and_revision_only_and_prev_where_asked() {
        assert_eq!(
            written(&event(EventKind::Delete, false)),
            serde_json::json!({"type": "delete", "kv": {"key": "a", "mod_revision": 43}})
        );
        assert_eq!(written(&event(EventKind::Delete, true))["prev"]["value"], "x\ny");
        assert!(written(&event(EventKind::Put, false)).get("prev").is_none());
    }
}
