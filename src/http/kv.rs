//! One key: PUT, GET, HEAD, DELETE, and GET's long poll.

use std::time::Duration;

use axum::response::Response;
use http::{HeaderValue, StatusCode, header};
use tokio::time::{Instant, sleep_until};

use super::accept::{Form, negotiate};
use super::call::{Applied, Call, Reply, odd_result};
use super::conditions::{ConditionHeaders, Tags};
use super::error::{ApiError, Problem};
use super::json::{self, invalid};
use super::respond;
use super::route::check_key;
use crate::state::command::{Body, Delete, KeySpan, Put};
use crate::state::outcome::{KeyValue, Success};
use crate::state::reader::ReadError;
use crate::state::watch::WatchFilter;

/// Longest `?wait=`.
const MAX_WAIT: Duration = Duration::from_secs(600);
/// Longest time to live of a lease: etcd's bound, 285 years.
pub(super) const MAX_TTL: Duration = Duration::from_secs(9_000_000_000);

/// `PUT /{key}`
pub(super) async fn put(call: &mut Call<'_>) -> Reply {
    check_key(&call.argument)?;
    let deadline = call.deadline()?;
    let ttl = call.params.duration("ttl", false, MAX_TTL)?;
    let lease = call.params.number("lease")?;
    let want_prev = call.params.flag("prev")?;
    call.params.finish()?;
    match (lease, ttl) {
        (Some(_), Some(_)) => return Err(invalid("`ttl` and `lease` exclude each other".to_owned())),
        (Some(0), None) => return Err(invalid("`lease` must be a lease's id; leave it out for none".to_owned())),
        _ => {}
    }
    if call.headers().contains_key(header::CONTENT_RANGE) {
        // RFC 9110 §14.5: a part taken for the whole would replace it.
        return Err(invalid("`Content-Range`: a value is put as a whole".to_owned()));
    }
    let conditions = ConditionHeaders::parse(call.headers())?.into_command();
    // Before the body is read: a malformed request is not worth its upload.
    call.idempotency(conditions.as_ref(), b"")?;
    let value = call.read_value(deadline).await?;
    let idempotency = call.idempotency(conditions.as_ref(), &value)?;
    let put = Put {
        key: call.argument.clone(),
        value,
        conditions,
        lease: lease.unwrap_or(0),
        ttl_ms: ttl.map_or(0, |ttl| u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX)),
        want_prev,
    };
    let applied = call.propose(Body::Put(put), idempotency, deadline).await?;
    let Success::Put { created, prev, .. } = &applied.success else {
        return Err(odd_result(&applied.success));
    };
    let mut response = match (want_prev, created) {
        (true, _) => with_prev(&applied, prev.as_ref()),
        (false, true) => respond::empty(StatusCode::CREATED),
        (false, false) => respond::empty(StatusCode::NO_CONTENT),
    };
    // The revision a put makes is the key's new mod_revision.
    response.headers_mut().insert(header::ETAG, respond::etag(applied.revision, false));
    Ok(applied.respond(response))
}

/// `DELETE /{key}`
pub(super) async fn delete(call: &mut Call<'_>) -> Reply {
    check_key(&call.argument)?;
    let deadline = call.deadline()?;
    let want_prev = call.params.flag("prev")?;
    call.params.finish()?;
    let conditions = ConditionHeaders::parse(call.headers())?.into_command();
    let idempotency = call.idempotency(conditions.as_ref(), b"")?;
    let delete = Delete {
        key: call.argument.clone(),
        conditions,
        want_prev,
    };
    let applied = call.propose(Body::Delete(delete), idempotency, deadline).await?;
    let Success::Delete { prev } = &applied.success else {
        return Err(odd_result(&applied.success));
    };
    let response = if want_prev {
        with_prev(&applied, prev.as_ref())
    } else {
        respond::empty(StatusCode::NO_CONTENT)
    };
    Ok(applied.respond(response))
}

/// `{"revision":…,"prev":<KV object or null>}`
fn with_prev(applied: &Applied, prev: Option<&KeyValue>) -> Response {
    let mut body = Vec::with_capacity(256);
    json::write_number(&mut body, "{\"revision\":", applied.revision);
    body.extend_from_slice(b",\"prev\":");
    match prev {
        Some(prev) => json::write_kv(&mut body, prev, true),
        None => body.extend_from_slice(b"null"),
    }
    body.push(b'}');
    respond::with_body(StatusCode::OK, respond::JSON, body)
}

/// `GET /{key}` and `HEAD /{key}`
pub(super) async fn get(call: &mut Call<'_>) -> Reply {
    check_key(&call.argument)?;
    let deadline = call.deadline()?;
    let consistency = call.consistency()?;
    let revision = call.params.revision("revision")?;
    let wait = call.params.duration("wait", true, MAX_WAIT)?;
    call.params.finish()?;
    if wait.is_some() && revision.is_some() {
        return Err(invalid(
            "`wait` and `revision` exclude each other: the past does not change".to_owned(),
        ));
    }
    let conditions = ConditionHeaders::parse(call.headers())?;
    let form = negotiate(call.headers(), Form::Raw, Form::Json);
    call.settle(consistency, deadline).await?;
    let (at, kv) = call.app.node.reader().get(&call.argument, revision)?;
    let Some(wait) = wait else {
        return answer(at, kv, &conditions, form);
    };
    let (until, known) = (Instant::now() + wait, conditions.if_none_match.as_ref());
    if !conditions.if_match_holds(kv.as_ref()) || known.is_some_and(|tags| !still_names(tags, kv.as_ref())) {
        return answer(at, kv, &conditions, form);
    }
    let (mut at, mut kv) = (at, kv);
    while let Some(changed) = wait_for_change(call, at, until).await? {
        (at, kv) = changed;
        // `*` and a list may name the new revision as well: only a 304 before its time would say so.
        if !known.is_some_and(|tags| still_names(tags, kv.as_ref())) {
            return answer(at, kv, &conditions, form);
        }
    }
    Ok(not_modified(call.app.node.reader().revision().max(at), kv.as_ref(), form))
}

/// Whether the key is where the client knows it to be. A key that does not exist is nowhere.
fn still_names(tags: &Tags, kv: Option<&KeyValue>) -> bool {
    kv.is_some_and(|kv| tags.matches_weakly(kv.mod_revision))
}

/// Blocks until the key changes after a revision; `None` when the time is over.
async fn wait_for_change(call: &Call<'_>, after: u64, until: Instant) -> Result<Option<(u64, Option<KeyValue>)>, ApiError> {
    let node = &call.app.node;
    call.note_wait();
    let _slot = call.app.watch_slot()?;
    let filter = WatchFilter {
        span: KeySpan::single(&call.argument),
        puts: true,
        deletes: true,
        want_prev: false,
    };
    match node.reader().watch(filter, after) {
        Ok(mut watcher) => {
            let changed = tokio::select! {
                changed = watcher.next() => changed,
                () = sleep_until(until) => return Ok(None),
                () = node.shutting_down() => return Err(Problem::ShuttingDown.into()),
            };
            match changed {
                // Compacted past the wait: whatever happened, the key as it is now is the answer.
                Ok(_) | Err(ReadError::Compacted { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(ReadError::Compacted { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    node.ensure_serving()?;
    Ok(Some(node.reader().get(&call.argument, None)?))
}

fn answer(at: u64, kv: Option<KeyValue>, conditions: &ConditionHeaders, form: Form) -> Reply {
    let Some(kv) = kv else {
        return Err(ApiError::at(Problem::NotFound, at));
    };
    if !conditions.if_match_holds(Some(&kv)) {
        return Err(ApiError::at(
            Problem::PreconditionFailed {
                current: Some(kv.mod_revision),
            },
            at,
        ));
    }
    if conditions
        .if_none_match
        .as_ref()
        .is_some_and(|tags| tags.matches_weakly(kv.mod_revision))
    {
        return Ok(not_modified(at, Some(&kv), form));
    }
    let response = if form == Form::Json {
        let mut body = Vec::with_capacity(kv.value.len() + kv.key.len() + 128);
        json::write_kv(&mut body, &kv, true);
        respond::with_body(StatusCode::OK, respond::JSON, body)
    } else {
        respond::with_body(StatusCode::OK, respond::RAW, kv.value.clone())
    };
    Ok(tagged(response, at, Some(&kv), form))
}

fn not_modified(at: u64, kv: Option<&KeyValue>, form: Form) -> Response {
    tagged(respond::empty(StatusCode::NOT_MODIFIED), at, kv, form)
}

fn tagged(response: Response, at: u64, kv: Option<&KeyValue>, form: Form) -> Response {
    let mut response = respond::at_revision(response, at);
    let headers = response.headers_mut();
    if let Some(kv) = kv {
        headers.insert(header::ETAG, respond::etag(kv.mod_revision, form == Form::Json));
    }
    headers.insert(header::VARY, HeaderValue::from_static("Accept"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::conditions::Tag;

    fn kv() -> Option<KeyValue> {
        Some(KeyValue {
            key: "k".into(),
            value: "v".into(),
            create_revision: 2,
            mod_revision: 7,
            version: 3,
            lease: 0,
        })
    }

    fn names(revision: u64) -> Option<Tags> {
        Some(Tags::List(vec![Tag { revision, weak: false }]))
    }

    #[test]
    fn each_form_has_a_tag_of_its_own() {
        let none = ConditionHeaders::default();
        let raw = answer(9, kv(), &none, Form::Raw).unwrap();
        assert_eq!(
            (&raw.headers()["etag"], &raw.headers()["content-type"]),
            (&"\"7\"".parse().unwrap(), &respond::RAW)
        );
        assert_eq!(raw.headers()["metcd-revision"], "9");
        assert_eq!(raw.headers()["vary"], "Accept");
        let json = answer(9, kv(), &none, Form::Json).unwrap();
        assert_eq!(json.headers()["etag"], "\"7-json\"");
    }

    #[test]
    fn conditions_of_a_get() {
        let same = ConditionHeaders {
            if_match: None,
            if_none_match: names(7),
        };
        let unchanged = answer(9, kv(), &same, Form::Raw).unwrap();
        assert_eq!(
            (unchanged.status().as_u16(), unchanged.headers()["etag"].to_str().unwrap()),
            (304, "\"7\"")
        );
        let other = ConditionHeaders {
            if_match: names(8),
            if_none_match: None,
        };
        assert_eq!(
            answer(9, kv(), &other, Form::Raw).unwrap_err().problem,
            Problem::PreconditionFailed { current: Some(7) }
        );
        assert_eq!(answer(9, None, &other, Form::Raw).unwrap_err(), ApiError::at(Problem::NotFound, 9));
    }

    #[test]
    fn a_deleted_key_is_not_where_the_client_left_it() {
        assert!(!still_names(&Tags::Any, None));
        assert!(still_names(&Tags::Any, kv().as_ref()));
        assert!(!still_names(&names(6).unwrap(), kv().as_ref()));
    }
}
