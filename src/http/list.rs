//! Many keys: lists with pages, the NDJSON stream of a whole range, and the range delete.

use std::io;
use std::sync::Arc;

use axum::body::Body;
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderValue, StatusCode, header};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep_until};

use super::App;
use super::accept::{Form, negotiate};
use super::call::{Call, Reply, odd_result};
use super::error::{ApiError, Problem};
use super::json::{self, invalid};
use super::page::PageToken;
use super::respond;
use super::span;
use crate::serve::Patience;
use crate::state::StateReader;
use crate::state::command::{Body as CommandBody, DeleteRange, KeySpan};
use crate::state::outcome::Success;
use crate::state::reader::{Pin, RangePage, RangeQuery, ReadError};

/// Key-values of a JSON page: by default, and at most.
pub(super) const DEFAULT_LIMIT: u64 = 1000;
pub(super) const MAX_LIMIT: u64 = 10_000;
/// A JSON page ends early, with `more`, when its keys and values exceed this.
const MAX_PAGE_BYTES: usize = 16 << 20;
/// What is read at a time for a stream.
const CHUNK_KEYS: usize = 512;
const CHUNK_BYTES: usize = 256 << 10;

/// `GET /v1/kv`
pub(super) async fn list(call: &mut Call<'_>) -> Reply {
    let deadline = call.deadline()?;
    let mut consistency = call.consistency()?;
    let mut query = RangeQuery {
        span: span::from_params(&mut call.params)?.unwrap_or_else(|| KeySpan::prefix(b"")),
        revision: call.params.revision("revision")?,
        limit: 0,
        after: None,
        descending: descending(call.params.bytes("order").as_deref())?,
        keys_only: call.params.flag("keys_only")?,
        count_only: call.params.flag("count_only")?,
        with_count: true,
        max_bytes: MAX_PAGE_BYTES,
    };
    let limit = call.params.number("limit")?;
    let after = call.params.bytes("after");
    call.params.finish()?;
    if limit.is_some_and(|limit| !(1..=MAX_LIMIT).contains(&limit)) {
        return Err(invalid(format!("`limit` must be 1 to {MAX_LIMIT}")));
    }
    let counted = match &after {
        Some(after) => Some(continue_after(&mut query, after)?),
        None => None,
    };
    if counted.is_some() {
        consistency.follow(query.revision.unwrap_or(0));
    }
    let form = negotiate(call.headers(), Form::Json, Form::Ndjson);
    call.settle(consistency, deadline).await?;
    let reader = call.app.node.reader().clone();
    if form == Form::Ndjson {
        return stream_range(call.app, reader, query, limit, counted).await;
    }
    query.limit = usize::try_from(limit.unwrap_or(DEFAULT_LIMIT)).unwrap_or(usize::MAX);
    let links = Links {
        query: call.params.without("after"),
    };
    blocking(move || Ok(answer_page(&query, &reader.range(&query)?, counted, &links))).await
}

fn descending(order: Option<&[u8]>) -> Result<bool, ApiError> {
    match order {
        None | Some(b"asc") => Ok(false),
        Some(b"desc") => Ok(true),
        Some(_) => Err(invalid("`order` must be `asc` or `desc`".to_owned())),
    }
}

/// Sets a query to go on where a page ended; the answer is the count of the whole range.
fn continue_after(query: &mut RangeQuery, after: &[u8]) -> Result<u64, ApiError> {
    let token = PageToken::decode(after, &query.span, query.descending)?;
    if query.revision.is_some_and(|revision| revision != token.revision) {
        return Err(invalid("`revision` is another than that of the page before".to_owned()));
    }
    query.revision = Some(token.revision);
    query.after = Some(token.last_key);
    query.with_count = false;
    Ok(token.count)
}

/// Makes the `Link` to the next page.
struct Links {
    query: String,
}

impl Links {
    fn next(&self, token: &str) -> Option<HeaderValue> {
        let separator = if self.query.is_empty() { "" } else { "&" };
        HeaderValue::try_from(format!("</v1/kv?{}{separator}after={token}>; rel=\"next\"", self.query)).ok()
    }
}

fn next_token(query: &RangeQuery, page: &RangePage, count: u64) -> Option<String> {
    let last = page.kvs.last().filter(|_| page.more)?;
    let token = PageToken {
        revision: page.revision,
        count,
        last_key: last.key.to_vec(),
    };
    Some(token.encode(&query.span, query.descending))
}

fn answer_page(query: &RangeQuery, page: &RangePage, counted: Option<u64>, links: &Links) -> axum::response::Response {
    let count = counted.unwrap_or(page.count);
    let next = next_token(query, page, count);
    let bytes: usize = page.kvs.iter().map(|kv| kv.key.len() + kv.value.len() + 120).sum();
    let mut body = Vec::with_capacity(bytes + 128);
    json::write_number(&mut body, "{\"revision\":", page.revision);
    body.extend_from_slice(b",\"kvs\":[");
    for (at, kv) in page.kvs.iter().enumerate() {
        if at > 0 {
            body.push(b',');
        }
        json::write_kv(&mut body, kv, !query.keys_only);
    }
    json::write_number(&mut body, "],\"count\":", count);
    body.extend_from_slice(if next.is_some() {
        b",\"more\":true,\"next\":"
    } else {
        b",\"more\":false,\"next\":"
    });
    match &next {
        Some(token) => json::write_text(&mut body, token),
        None => body.extend_from_slice(b"null"),
    }
    body.push(b'}');
    let mut response = respond::at_revision(respond::with_body(StatusCode::OK, respond::JSON, body), page.revision);
    response.headers_mut().insert(header::VARY, HeaderValue::from_static("Accept"));
    if let Some(link) = next.and_then(|token| links.next(&token)) {
        response.headers_mut().insert(header::LINK, link);
    }
    response
}

/// Runs what may read much on a thread that may block.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, ApiError> + Send + 'static) -> Result<T, ApiError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(cause) => {
            tracing::error!(%cause, "a blocking read did not finish");
            Err(Problem::Internal.into())
        }
    }
}

/// A range on its way out, line by line, all of one pinned revision.
struct Lines {
    app: Arc<App>,
    reader: StateReader,
    query: RangeQuery,
    /// Key-values still wanted; `None` for all.
    remaining: Option<u64>,
    /// Keys of the whole range, if there is a limit: the token of what a limit cut off carries it.
    counted: Option<u64>,
    sent: u64,
    deadline: Instant,
    ended: bool,
    /// Its drop releases the pin.
    _pinned: oneshot::Sender<()>,
}

async fn stream_range(app: &Arc<App>, reader: StateReader, mut query: RangeQuery, limit: Option<u64>, counted: Option<u64>) -> Reply {
    let pin = reader.pin(query.revision)?;
    let revision = pin.revision;
    let deadline = Instant::now() + app.config.limits.max_stream;
    query.revision = Some(revision);
    query.max_bytes = CHUNK_BYTES;
    query.with_count = query.count_only || (limit.is_some() && counted.is_none());
    let _pinned = hold(pin, deadline);
    let lines = Lines {
        app: app.clone(),
        reader,
        query,
        remaining: limit,
        counted,
        sent: 0,
        deadline,
        ended: false,
        _pinned,
    };
    let body = Body::from_stream(stream::unfold(lines, |mut lines| async move {
        let chunk = lines.next().await?;
        Some((chunk, lines))
    }));
    let mut response = respond::at_revision(respond::with_body(StatusCode::OK, respond::NDJSON, body), revision);
    response.extensions_mut().insert(Patience(Some(app.config.limits.max_stream)));
    response.headers_mut().insert(header::VARY, HeaderValue::from_static("Accept"));
    Ok(response)
}

/// Keeps a revision pinned until its stream is dropped, but no longer than the deadline: a client that reads nothing at all must
/// not keep the history for ever.
fn hold(pin: Pin, deadline: Instant) -> oneshot::Sender<()> {
    let (held, dropped) = oneshot::channel();
    tokio::spawn(async move {
        let _pin = pin;
        tokio::select! {
            _ = dropped => {}
            () = sleep_until(deadline) => {}
        }
    });
    held
}

impl Lines {
    /// The next piece of the body. An error breaks the body off without its last chunk, so that no client takes it for whole.
    async fn next(&mut self) -> Option<Result<Bytes, io::Error>> {
        if self.ended {
            return None;
        }
        let chunk = match self.read_chunk().await {
            Ok(chunk) => Ok(chunk),
            Err(error) => {
                self.ended = true;
                Err(io::Error::other(error.problem.code()))
            }
        };
        Some(chunk)
    }

    async fn read_chunk(&mut self) -> Result<Bytes, ApiError> {
        if Instant::now() >= self.deadline {
            return Err(Problem::Timeout("the stream took longer than `limits.max_stream`").into());
        }
        self.query.limit = self
            .remaining
            .map_or(CHUNK_KEYS, |left| usize::try_from(left).unwrap_or(CHUNK_KEYS).min(CHUNK_KEYS));
        let (reader, query) = (self.reader.clone(), self.query.clone());
        let page = tokio::select! {
            page = blocking(move || Ok(reader.range(&query)?)) => page?,
            () = self.app.node.shutting_down() => return Err(Problem::ShuttingDown.into()),
        };
        Ok(self.encode(&page))
    }

    fn encode(&mut self, page: &RangePage) -> Bytes {
        let mut out = Vec::with_capacity(CHUNK_BYTES);
        for kv in &page.kvs {
            json::write_kv(&mut out, kv, !self.query.keys_only);
            out.push(b'\n');
        }
        self.sent += page.kvs.len() as u64;
        if let Some(left) = &mut self.remaining {
            *left = left.saturating_sub(page.kvs.len() as u64);
        }
        if self.query.with_count {
            self.counted = Some(page.count);
        }
        match page.kvs.last().filter(|_| page.more && self.remaining != Some(0)) {
            Some(last) => {
                self.query.after = Some(last.key.to_vec());
                self.query.with_count = self.query.count_only;
            }
            None => {
                self.ended = true;
                let count = if self.query.count_only { page.count } else { self.sent };
                json::write_number(&mut out, "{\"end\":true,\"count\":", count);
                // A `limit` cut it short: it goes on with `after`, in either form.
                if let Some(token) = next_token(&self.query, page, self.counted.unwrap_or(count)) {
                    out.extend_from_slice(b",\"more\":true,\"next\":");
                    json::write_text(&mut out, &token);
                }
                out.extend_from_slice(b"}\n");
            }
        }
        out.into()
    }
}

/// `DELETE /v1/kv`
pub(super) async fn delete_range(call: &mut Call<'_>) -> Reply {
    let deadline = call.deadline()?;
    let span = span::from_params(&mut call.params)?;
    let (start, end) = (call.params.bytes("start"), call.params.bytes("end"));
    span::refuse_bare_start(start.as_deref(), end.as_deref())?;
    if call.params.is_bare("prefix") {
        return Err(invalid(
            "`prefix` has no value, which would delete everything; say so with `prefix=`".to_owned(),
        ));
    }
    call.params.finish()?;
    let Some(span) = span else {
        return Err(invalid(
            "a `prefix`, or a `start` or `end`, is required; `prefix=` deletes everything".to_owned(),
        ));
    };
    call.refuse_conditions()?;
    let idempotency = call.idempotency(None, b"")?;
    let delete = DeleteRange {
        span,
        max_keys: call.app.config.limits.max_range_delete,
    };
    let applied = call.propose(CommandBody::DeleteRange(delete), idempotency, deadline).await?;
    let Success::DeleteRange { deleted } = applied.success else {
        return Err(odd_result(&applied.success));
    };
    let body = serde_json::json!({"revision": applied.revision, "deleted": deleted});
    Ok(applied.respond(respond::json(StatusCode::OK, &body)))
}

/// `GET /v1/hash`
pub(super) async fn hash(call: &mut Call<'_>) -> Reply {
    let deadline = call.deadline()?;
    let consistency = call.consistency()?;
    let revision = call.params.revision("revision")?;
    call.params.finish()?;
    call.settle(consistency, deadline).await?;
    let reader = call.app.node.reader().clone();
    let (revision, hash) = blocking(move || Ok::<_, ReadError>(reader.hash(revision)?).map_err(ApiError::from)).await?;
    let body = serde_json::json!({"revision": revision, "hash": format!("{hash:032x}")});
    Ok(respond::at_revision(respond::json(StatusCode::OK, &body), revision))
}
