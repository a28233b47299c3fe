//! Leases. Grants and revocations are commands; keepalives and remaining times are questions to the leader, whose clock decides.

use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::call::{Call, Reply, odd_result};
use super::error::{ApiError, Problem};
use super::json::{invalid, parse, seconds};
use super::kv::MAX_TTL;
use super::params::decimal;
use super::respond;
use crate::leader::{LeaderReply, LeaderRequest};
use crate::state::command::{Body, LeaseGrant, LeaseRevoke};
use crate::state::outcome::Success;
use crate::state::reader::LeaseInfo;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct GrantJson {
    /// Seconds; a fraction is allowed, down to a millisecond.
    pub(super) ttl: f64,
}

/// `POST /v1/leases`
pub(super) async fn grant(call: &mut Call<'_>) -> Reply {
    let deadline = call.deadline()?;
    call.params.finish()?;
    call.refuse_conditions()?;
    let body = call.read_body(deadline).await?;
    let idempotency = call.idempotency(None, &body)?;
    let ttl_ms = ttl_ms(parse::<GrantJson>(&body)?.ttl)?;
    let applied = call
        .propose(Body::LeaseGrant(LeaseGrant { ttl_ms, id: 0 }), idempotency, deadline)
        .await?;
    let Success::LeaseGrant { id, ttl_ms } = applied.success else {
        return Err(odd_result(&applied.success));
    };
    let body = json!({"id": id.to_string(), "ttl": seconds(ttl_ms)});
    let mut response = respond::json(StatusCode::CREATED, &body);
    if let Ok(location) = http::HeaderValue::try_from(format!("/v1/leases/{id}")) {
        response.headers_mut().insert(http::header::LOCATION, location);
    }
    Ok(applied.respond(response))
}

/// Checked: 1 ms to [`MAX_TTL`].
pub(super) fn ttl_ms(ttl_seconds: f64) -> Result<u64, ApiError> {
    let range = 0.001..=MAX_TTL.as_secs_f64();
    if !range.contains(&ttl_seconds) {
        return Err(invalid(format!("`ttl` must be 0.001 to {} seconds", MAX_TTL.as_secs())));
    }
    Ok((ttl_seconds * 1000.0) as u64)
}

/// `GET /v1/leases`
pub(super) async fn list(call: &mut Call<'_>) -> Reply {
    let deadline = call.deadline()?;
    let consistency = call.consistency()?;
    call.params.finish()?;
    call.settle(consistency, deadline).await?;
    let reader = call.app.node.reader();
    let revision = reader.revision();
    let leases: Vec<Value> = reader.leases().iter().map(describe).collect();
    Ok(respond::at_revision(
        respond::json(StatusCode::OK, &json!({"revision": revision, "leases": leases})),
        revision,
    ))
}

fn describe(lease: &LeaseInfo) -> Value {
    let mut described = json!({"id": lease.id.to_string(), "ttl": seconds(lease.ttl_ms)});
    if lease.owned {
        // Made by a `?ttl=`: it lives and dies with its key.
        described["owned"] = true.into();
    }
    described
}

/// `GET /v1/leases/{id}`
pub(super) async fn show(call: &mut Call<'_>) -> Reply {
    let id = lease_id(call)?;
    let deadline = call.deadline()?;
    let consistency = call.consistency()?;
    call.params.finish()?;
    call.settle(consistency, deadline).await?;
    let reader = call.app.node.reader();
    let revision = reader.revision();
    let Some(lease) = reader.lease(id) else {
        return Err(ApiError::at(Problem::LeaseNotFound { id }, revision));
    };
    let mut described = describe(&lease);
    // The member's own state does not know the remaining time: only the leader's clock does.
    if !consistency.serializable {
        let reply = call.app.node.call_leader(LeaderRequest::TimeToLive { lease: id }, deadline).await?;
        let LeaderReply::Lease { remaining_ms, .. } = reply else {
            return Err(odd_reply(&reply));
        };
        described["remaining"] = seconds(remaining_ms).into();
    }
    let (mut texts, mut others) = (Vec::new(), Vec::new());
    for key in reader.lease_keys(id)? {
        match std::str::from_utf8(&key) {
            Ok(text) => texts.push(Value::from(text)),
            Err(_) => others.push(Value::from(super::json::to_base64(&key))),
        }
    }
    described["keys"] = texts.into();
    if !others.is_empty() {
        described["keys_base64"] = others.into();
    }
    Ok(respond::at_revision(respond::json(StatusCode::OK, &described), revision))
}

/// `POST /v1/leases/{id}/keepalive`
pub(super) async fn keep_alive(call: &mut Call<'_>) -> Reply {
    let id = lease_id(call)?;
    let deadline = call.deadline()?;
    call.params.finish()?;
    call.read_nothing(deadline).await?;
    let reply = call.app.node.call_leader(LeaderRequest::KeepAlive { lease: id }, deadline).await?;
    let LeaderReply::Lease { ttl_ms, .. } = reply else {
        return Err(odd_reply(&reply));
    };
    Ok(respond::json(
        StatusCode::OK,
        &json!({"id": id.to_string(), "ttl": seconds(ttl_ms)}),
    ))
}

/// `DELETE /v1/leases/{id}`
pub(super) async fn revoke(call: &mut Call<'_>) -> Reply {
    let id = lease_id(call)?;
    let deadline = call.deadline()?;
    call.params.finish()?;
    call.refuse_conditions()?;
    let idempotency = call.idempotency(None, b"")?;
    let applied = call.propose(Body::LeaseRevoke(LeaseRevoke { id }), idempotency, deadline).await?;
    let Success::LeaseRevoke { deleted } = applied.success else {
        return Err(odd_result(&applied.success));
    };
    Ok(applied.respond(respond::json(
        StatusCode::OK,
        &json!({"revision": applied.revision, "deleted": deleted}),
    )))
}

fn lease_id(call: &Call<'_>) -> Result<u64, ApiError> {
    decimal(&call.argument)
        .filter(|&id| id > 0)
        .ok_or_else(|| invalid("a lease's id is a decimal number from 1".to_owned()))
}

/// The leader's answer is not of the request's kind: a bug, and for the client an unknown outcome.
pub(super) fn odd_reply(reply: &LeaderReply) -> ApiError {
    tracing::error!(?reply, "the leader gave another request's answer");
    Problem::Internal.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ttl_is_in_seconds_and_bounded() {
        assert_eq!(ttl_ms(30.0).unwrap(), 30_000);
        assert_eq!(ttl_ms(0.25).unwrap(), 250);
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e10] {
            assert!(ttl_ms(bad).is_err(), "{bad}");
        }
        assert!(parse::<GrantJson>(br#"{"ttl":"30"}"#).is_err());
        assert!(parse::<GrantJson>(br#"{"ttl":30,"tll":1}"#).is_err());
    }
}
