//! Answers: header names, tags, and the few shapes a body can have.

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use http::{HeaderName, HeaderValue, StatusCode, header};

/// The member that answered.
pub(super) static METCD_MEMBER: HeaderName = HeaderName::from_static("metcd-member");
/// The revision an answer reflects.
pub(super) static METCD_REVISION: HeaderName = HeaderName::from_static("metcd-revision");
/// Set on the answer to a retry.
pub(super) static IDEMPOTENT_REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");
/// About how long a backup will be, for a progress bar.
pub(super) static METCD_SNAPSHOT_BYTES_ESTIMATE: HeaderName = HeaderName::from_static("metcd-snapshot-bytes-estimate");

/// `application/octet-stream`: every raw value.
pub(super) const RAW: HeaderValue = HeaderValue::from_static("application/octet-stream");
/// `application/json`
pub(super) const JSON: HeaderValue = HeaderValue::from_static("application/json");
/// `application/x-ndjson`
pub(super) const NDJSON: HeaderValue = HeaderValue::from_static("application/x-ndjson");
/// `text/plain`
pub(super) const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");

/// The entity tag of a key at a revision, in its raw or its JSON form.
pub(super) fn etag(mod_revision: u64, json: bool) -> HeaderValue {
    let mut digits = itoa::Buffer::new();
    let digits = digits.format(mod_revision).as_bytes();
    let mut tag = Vec::with_capacity(digits.len() + 7);
    tag.push(b'"');
    tag.extend_from_slice(digits);
    tag.extend_from_slice(if json { b"-json\"" } else { b"\"" });
    // Quotes, digits and `-json` are legal in a header value.
    HeaderValue::from_maybe_shared(Bytes::from(tag)).unwrap_or(HeaderValue::from_static("\"\""))
}

/// An answer without a body.
pub(super) fn empty(status: StatusCode) -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    response
}

/// An answer with a body in memory.
pub(super) fn with_body(status: StatusCode, content_type: HeaderValue, body: impl Into<Body>) -> Response {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, content_type);
    response
}

/// A JSON answer.
pub(super) fn json(status: StatusCode, value: &serde_json::Value) -> Response {
    with_body(status, JSON, value.to_string())
}

/// Sets `Metcd-Revision`.
pub(super) fn at_revision(mut response: Response, revision: u64) -> Response {
    response.headers_mut().insert(&METCD_REVISION, HeaderValue::from(revision));
    response
}
