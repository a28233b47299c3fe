//! A request, and what is known after it.

use bytes::Bytes;
use reqwest::header::{ETAG, HeaderMap};
use reqwest::{RequestBuilder, Response};
use serde_json::Value;

pub struct Done {
    pub status: u16,
    /// What the answer reflects.
    pub revision: u64,
    /// Of the key.
    pub mod_revision: u64,
    /// It is the answer to an earlier request with the same `Idempotency-Key`.
    pub is_replayed: bool,
    pub body: Bytes,
}

pub enum Answer {
    Done(Done),
    /// It was decided upon, and nothing was changed: `precondition_failed`, `not_found`, `lease_not_found`.
    Refused {
        code: String,
        revision: u64,
    },
    /// Nothing happened, and nothing will.
    NotApplied,
    /// Nobody knows.
    Unknown,
}

/// Asks once. What no server in trouble should answer is an error.
pub async fn ask(request: RequestBuilder) -> Result<Answer, String> {
    match request.send().await {
        Ok(response) if response.status().is_success() => Ok(done(response).await),
        Ok(response) => failed(response).await,
        // Nobody has seen the request.
        Err(error) if error.is_connect() => Ok(Answer::NotApplied),
        Err(_) => Ok(Answer::Unknown),
    }
}

async fn done(response: Response) -> Answer {
    let status = response.status().as_u16();
    let revision = revision_of(response.headers());
    let tag = response.headers().get(ETAG).and_then(|tag| tag.to_str().ok());
    let mod_revision = tag.and_then(|tag| tag.trim_matches('"').parse().ok()).unwrap_or(0);
    let is_replayed = response.headers().contains_key("idempotent-replayed");
    match response.bytes().await {
        Ok(body) => Answer::Done(Done {
            status,
            revision,
            mod_revision,
            is_replayed,
            body,
        }),
        Err(_) => Answer::Unknown,
    }
}

async fn failed(response: Response) -> Result<Answer, String> {
    let (status, revision) = (response.status(), revision_of(response.headers()));
    let Ok(body) = response.bytes().await else {
        return Ok(Answer::Unknown);
    };
    let problem: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let code = problem["code"].as_str().unwrap_or_default();
    match (code, problem["outcome"].as_str()) {
        ("precondition_failed" | "not_found" | "lease_not_found", None | Some("not_applied")) => Ok(Answer::Refused {
            code: code.to_owned(),
            revision,
        }),
        ("overloaded" | "no_leader" | "shutting_down" | "not_ready" | "quota_exceeded" | "request_timeout", Some("not_applied")) => {
            Ok(Answer::NotApplied)
        }
        ("timeout" | "internal", Some("unknown")) => Ok(Answer::Unknown),
        // A read, which has no outcome to tell.
        ("overloaded" | "no_leader" | "shutting_down" | "not_ready" | "timeout" | "internal", None) => Ok(Answer::Unknown),
        _ => Err(format!("an answer that should not be: {status} {}", String::from_utf8_lossy(&body))),
    }
}

fn revision_of(headers: &HeaderMap) -> u64 {
    let revision = headers.get("metcd-revision").and_then(|revision| revision.to_str().ok());
    revision.and_then(|revision| revision.parse().ok()).unwrap_or(0)
}
