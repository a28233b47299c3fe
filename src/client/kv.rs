//! Keys: put, get, delete, list, transactions.

use std::time::Duration;

use bytes::Bytes;
use http::{Method, StatusCode, header};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::encode::Target;
use super::request::Call;
use super::{Client, ClientError, KeyValue, json};

/// What must hold of a key for a put or a delete to happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Condition {
    /// Nothing.
    #[default]
    Always,
    /// Its mod_revision is this.
    Revision(u64),
    /// It exists.
    Exists,
    /// It does not exist.
    Absent,
}

impl Condition {
    fn apply(self, call: Call) -> Result<Call, ClientError> {
        match self {
            Self::Always => Ok(call),
            Self::Revision(revision) => call.header(header::IF_MATCH, format!("\"{revision}\"")),
            Self::Exists => call.header(header::IF_MATCH, "*"),
            Self::Absent => call.header(header::IF_NONE_MATCH, "*"),
        }
    }
}

/// How to put.
#[derive(Debug, Clone, Copy, Default)]
pub struct PutOptions {
    /// A lease of this length that belongs to the key.
    pub ttl: Option<Duration>,
    /// An existing lease.
    pub lease: Option<u64>,
    /// When.
    pub condition: Condition,
    /// Return what was there before.
    pub prev: bool,
}

/// A put that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Put {
    /// The revision it made.
    pub revision: u64,
    /// Whether the key is new.
    pub created: bool,
    /// What was there before, if it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prev: Option<KeyValue>,
}

/// A deletion that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deleted {
    /// The revision after it.
    pub revision: u64,
    /// How many keys.
    pub deleted: u64,
}

/// How to get.
#[derive(Debug, Clone, Copy, Default)]
pub struct GetOptions {
    /// The past.
    pub revision: Option<u64>,
    /// Wait until the member has applied this revision.
    pub min_revision: Option<u64>,
}

/// What a wait for a change ended with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Waited {
    /// The key is there, and changed.
    Changed(KeyValue),
    /// It is not there.
    Absent,
    /// The time is over without a change.
    TimedOut,
}

/// A set of keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Range {
    /// All that begin so; an empty prefix is every key.
    Prefix(Vec<u8>),
    /// From `start` to before `end`; `None` is open.
    Between {
        /// The first.
        start: Option<Vec<u8>>,
        /// The first that is not meant.
        end: Option<Vec<u8>>,
    },
}

impl Range {
    pub(super) fn set(&self, target: &mut Target) {
        match self {
            Self::Prefix(prefix) => target.set("prefix", prefix),
            Self::Between { start, end } => {
                for (name, bound) in [("start", start), ("end", end)] {
                    if let Some(bound) = bound {
                        target.set(name, bound);
                    }
                }
            }
        }
    }
}

/// How to list.
#[derive(Debug, Clone, Default)]
pub struct ListOptions {
    /// Keys a page; the server's default is 1000.
    pub limit: Option<u64>,
    /// The `next` of the page before.
    pub after: Option<String>,
    /// The past.
    pub revision: Option<u64>,
    /// No values.
    pub keys_only: bool,
    /// Only how many there are.
    pub count_only: bool,
    /// From the last to the first.
    pub descending: bool,
}

/// One page of a list.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub struct Page {
    /// The revision all pages are of.
    pub revision: u64,
    /// The keys, in byte order.
    pub kvs: Vec<KeyValue>,
    /// How many the whole range has.
    pub count: u64,
    /// Whether a page follows.
    pub more: bool,
    /// For [`ListOptions::after`].
    pub next: Option<String>,
}

#[derive(Deserialize)]
struct WithPrev {
    revision: u64,
    prev: Option<KeyValue>,
}

pub(super) fn millis(duration: Duration) -> String {
    format!("{}ms", duration.as_millis().max(1))
}

impl Client {
    /// Sets a key.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn put(&self, key: &[u8], value: impl Into<Bytes>) -> Result<Put, ClientError> {
        self.put_with(key, value, &PutOptions::default()).await
    }

    /// Sets a key on a condition, with a lease, or telling what was there.
    ///
    /// # Errors
    /// See [`ClientError`]; a condition that does not hold is `precondition_failed`.
    pub async fn put_with(&self, key: &[u8], value: impl Into<Bytes>, options: &PutOptions) -> Result<Put, ClientError> {
        let mut target = Target::key(check(key)?);
        if let Some(ttl) = options.ttl {
            target.set("ttl", millis(ttl));
        }
        target.set_number("lease", options.lease);
        target.set_flag("prev", options.prev);
        let call = options.condition.apply(Call::keyed(Method::PUT, target, value))?;
        let answer = self.answer(&call).await?;
        if !options.prev {
            let created = answer.status == StatusCode::CREATED;
            let revision = answer.revision()?;
            return Ok(Put {
                revision,
                created,
                prev: None,
            });
        }
        let WithPrev { revision, prev } = answer.json()?;
        Ok(Put {
            revision,
            created: prev.is_none(),
            prev,
        })
    }

    /// Reads a key; `None` if there is none.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn get(&self, key: &[u8]) -> Result<Option<KeyValue>, ClientError> {
        self.get_with(key, &GetOptions::default()).await
    }

    /// Reads a key in the past, or not before a revision.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn get_with(&self, key: &[u8], options: &GetOptions) -> Result<Option<KeyValue>, ClientError> {
        let mut target = Target::key(check(key)?);
        target.set_number("revision", options.revision);
        target.set_number("min_revision", options.min_revision);
        let call = self.reading(target).accept("application/json");
        found(self.answer(&call).await.and_then(|answer| answer.json()))
    }

    /// Waits at most `wait` until the key is no longer at revision `seen`; without one, until its next change (one that falls between
    /// a broken connection and the next attempt is missed then: give `seen` to be sure).
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn wait(&self, key: &[u8], seen: Option<u64>, wait: Duration) -> Result<Waited, ClientError> {
        let mut call = self.reading(Target::key(check(key)?)).accept("application/json");
        call.wait = wait;
        if let Some(seen) = seen {
            call = call.header(header::IF_NONE_MATCH, format!("\"{seen}-json\""))?;
        }
        match self.answer(&call).await {
            Ok(answer) if answer.status == StatusCode::NOT_MODIFIED => Ok(Waited::TimedOut),
            Ok(answer) => answer.json().map(Waited::Changed),
            Err(error) if error.code() == Some("not_found") => Ok(Waited::Absent),
            Err(error) => Err(error),
        }
    }

    /// Deletes a key; `None` if there was none.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn delete(&self, key: &[u8], condition: Condition) -> Result<Option<Deleted>, ClientError> {
        let call = Call::keyed(Method::DELETE, Target::key(check(key)?), Bytes::new());
        let answer = self.answer(&condition.apply(call)?).await;
        let revision = found(answer.and_then(|answer| answer.revision()))?;
        Ok(revision.map(|revision| Deleted { revision, deleted: 1 }))
    }

    /// Deletes all keys of a range in one revision.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn delete_range(&self, range: &Range) -> Result<Deleted, ClientError> {
        let mut target = Target::new("/v1/kv");
        range.set(&mut target);
        self.answer(&Call::keyed(Method::DELETE, target, Bytes::new())).await?.json()
    }

    /// One page of the keys of a range.
    ///
    /// # Errors
    /// See [`ClientError`]; a page of history that is gone is `compacted`.
    pub async fn list(&self, range: &Range, options: &ListOptions) -> Result<Page, ClientError> {
        self.answer(&self.list_call(range, options)).await?.json()
    }

    pub(super) fn list_call(&self, range: &Range, options: &ListOptions) -> Call {
        let mut target = Target::new("/v1/kv");
        range.set(&mut target);
        target.set_number("limit", options.limit);
        if let Some(after) = &options.after {
            target.set("after", after);
        }
        target.set_number("revision", options.revision);
        target.set_flag("keys_only", options.keys_only);
        target.set_flag("count_only", options.count_only);
        if options.descending {
            target.set("order", "desc");
        }
        self.reading(target)
    }

    /// Compares, then one of two branches, all in one revision: JSON in and out, as the HTTP contract has it.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn txn(&self, txn: &Value) -> Result<Value, ClientError> {
        let call = Call::keyed(Method::POST, Target::new("/v1/txn"), json::to_bytes(txn)?);
        self.answer(&call).await?.json()
    }

    /// A read that is linearizable unless this client is not.
    pub(super) fn reading(&self, mut target: Target) -> Call {
        if self.serializable {
            target.set("consistency", "serializable");
        }
        Call::read(target)
    }
}

/// The operation of a transaction that sets a key.
#[must_use]
pub fn put_operation(key: &[u8], value: &[u8]) -> Value {
    let mut put = serde_json::Map::new();
    json::set_bytes(&mut put, "key", key);
    json::set_bytes(&mut put, "value", value);
    serde_json::json!({"put": put})
}

/// The path of an empty key would be that of the whole range.
fn check(key: &[u8]) -> Result<&[u8], ClientError> {
    if key.is_empty() {
        return Err(ClientError::Invalid("a key is not empty".to_owned()));
    }
    Ok(key)
}

fn found<T>(result: Result<T, ClientError>) -> Result<Option<T>, ClientError> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.code() == Some("not_found") => Ok(None),
        Err(error) => Err(error),
    }
}
