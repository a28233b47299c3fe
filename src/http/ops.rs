//! Operations: what people, probes and dashboards ask a member. Each takes a `timeout`, as every request does, also where nothing is
//! waited for.

use std::time::Duration;

use http::{HeaderValue, StatusCode};
use serde::Deserialize;
use serde_json::json;
use tokio::time::Instant;

use super::call::{Call, Reply, odd_result};
use super::error::{ApiError, Problem};
use super::json::invalid;
use super::member::cluster_id;
use super::metrics as scrape_metrics;
use super::{LogControl, respond};
use crate::config::StoreBackend;
use crate::node::Role;
use crate::state::command::{Body, Compact};
use crate::state::outcome::Success;

const VERSION: &str = env!("CARGO_PKG_VERSION");
const OPENAPI: &str = include_str!("openapi.json");
const PROMETHEUS: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
const OPENMETRICS: HeaderValue = HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");

/// `GET /`
pub(super) fn welcome(call: &mut Call<'_>) -> Reply {
    call.deadline()?;
    call.params.finish()?;
    let (id, url) = (call.app.node.id(), &call.app.config.advertise.client_url);
    let text = format!(
        "metcd {VERSION}, member {id}\n\n\
         set a key         curl -X PUT --data-binary world {url}/hello\n\
         get it            curl {url}/hello\n\
         list all keys     curl {url}/v1/kv\n\
         the cluster       curl {url}/members\n\
         this member       curl {url}/status\n\
         everything else   curl {url}/openapi.json\n"
    );
    Ok(respond::with_body(StatusCode::OK, respond::TEXT, text))
}

/// `GET /livez`
pub(super) fn livez(call: &mut Call<'_>) -> Reply {
    call.deadline()?;
    call.params.flag("verbose")?;
    call.params.finish()?;
    Ok(respond::with_body(StatusCode::OK, respond::TEXT, "ok\n"))
}

/// How long `/readyz` waits for the leader's word on what is committed: several heartbeats.
const READY_WITHIN: Duration = Duration::from_millis(500);

/// `GET /readyz`. What a member knows to be committed may be old (it has just started): only a read that its leader confirmed shows that it
/// is caught up.
pub(super) async fn readyz(call: &mut Call<'_>) -> Reply {
    call.deadline()?;
    let verbose = call.params.flag("verbose")?;
    call.params.finish()?;
    let node = &call.app.node;
    let status = node.status();
    let leader = status.leader.map_or_else(|| "none".to_owned(), |id| id.to_string());
    let (applied, committed) = (status.applied_index, status.commit_index);
    let not_ready = |reason: String| {
        let seen = || format!("{reason} (leader: {leader}, applied: {applied}, committed: {committed})");
        Err(Problem::NotReady(if verbose { seen() } else { reason }).into())
    };
    if let Some(reason) = status.quarantined {
        return Err(Problem::Quarantined(reason).into());
    }
    if !status.ready {
        let reason = status
            .not_ready_reason
            .unwrap_or_else(|| "not caught up with the leader yet".to_owned());
        return not_ready(reason);
    }
    if node.read_barrier(Instant::now() + READY_WITHIN).await.is_err() {
        return not_ready("not caught up with what its leader has committed yet".to_owned());
    }
    if !verbose {
        return Ok(respond::with_body(StatusCode::OK, respond::TEXT, "ready\n"));
    }
    let text = format!("leader: ok ({leader})\ncaught up: ok (applied {applied}, committed {committed})\nready\n");
    Ok(respond::with_body(StatusCode::OK, respond::TEXT, text))
}

/// `GET /health`
pub(super) async fn health(call: &mut Call<'_>) -> Reply {
    let deadline = call.deadline()?;
    call.params.finish()?;
    match call.app.node.read_barrier(deadline).await {
        Ok(()) => Ok(respond::json(StatusCode::OK, &json!({"health": true}))),
        Err(error) => {
            let mut problem = ApiError::from(error).problem;
            // A probe asks about this member, not about a gateway.
            if let Problem::Timeout(detail) = problem {
                problem = Problem::NotReady(detail.to_owned());
            }
            Err(ApiError {
                health: true,
                ..problem.into()
            })
        }
    }
}

/// `GET /status`
pub(super) fn status(call: &mut Call<'_>) -> Reply {
    call.deadline()?;
    call.params.finish()?;
    let app = call.app;
    let status = app.node.status();
    let reader = app.node.reader();
    let own = reader.members().into_iter().find(|member| member.id == status.id);
    let own_name = own.map(|member| member.name).filter(|name| !name.is_empty());
    let name = own_name
        .or_else(|| app.config.node.name.clone())
        .unwrap_or_else(|| format!("node{}", status.id));
    let body = json!({
        "id": status.id,
        "name": name,
        "version": VERSION,
        "cluster_id": cluster_id(reader.cluster_id()),
        "role": role(status.role),
        "term": status.term,
        "leader": status.leader,
        "commit_index": status.commit_index,
        "applied_index": status.applied_index,
        "revision": reader.revision(),
        "compacted_revision": reader.compacted_revision(),
        "store": {"backend": backend(app.config.store.backend), "bytes": reader.logical_bytes()},
        "wal": {
            "engine": status.wal_engine,
            "bytes": status.wal_bytes,
            "first_index": status.first_index,
            "last_index": status.last_index,
            "syncs": status.wal_syncs,
        },
        "ready": status.ready,
        "not_ready_reason": status.not_ready_reason,
        "quarantined": status.quarantined,
        "proposals_pending": status.proposals_pending,
        "leases": reader.lease_count(),
        "watchers": app.watchers.load(std::sync::atomic::Ordering::Relaxed),
        "peers": status.peers,
        "uptime_seconds": app.started.elapsed().as_secs(),
    });
    Ok(respond::json(StatusCode::OK, &body))
}

fn role(role: Role) -> &'static str {
    match role {
        Role::Leader => "leader",
        Role::Follower => "follower",
        Role::Candidate => "candidate",
        Role::Learner => "learner",
    }
}

fn backend(backend: StoreBackend) -> &'static str {
    match backend {
        StoreBackend::Memory => "memory",
        StoreBackend::Sled => "sled",
        StoreBackend::RocksDb => "rocksdb",
    }
}

/// `GET /version`
pub(super) fn version(call: &mut Call<'_>) -> Reply {
    call.deadline()?;
    call.params.finish()?;
    Ok(respond::json(StatusCode::OK, &json!({"version": VERSION, "api": "v1"})))
}

/// `GET /metrics`
pub(super) fn metrics(call: &mut Call<'_>) -> Reply {
    call.deadline()?;
    call.params.finish()?;
    match scrape_metrics::scrape(call.app) {
        Ok(page) if wants_openmetrics(call) => Ok(respond::with_body(StatusCode::OK, OPENMETRICS, page)),
        Ok(page) => Ok(respond::with_body(StatusCode::OK, PROMETHEUS, scrape_metrics::plain(&page))),
        Err(cause) => {
            tracing::error!(%cause, "the metrics could not be written");
            Err(Problem::Internal.into())
        }
    }
}

/// Scrapers that know OpenMetrics say so.
fn wants_openmetrics(call: &Call<'_>) -> bool {
    let accepted = call.headers().get(http::header::ACCEPT).and_then(|accept| accept.to_str().ok());
    accepted.is_some_and(|accepted| accepted.contains("application/openmetrics-text"))
}

/// `GET /openapi.json`
pub(super) fn openapi(call: &mut Call<'_>) -> Reply {
    call.deadline()?;
    call.params.finish()?;
    Ok(respond::with_body(StatusCode::OK, respond::JSON, OPENAPI))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CompactJson {
    revision: u64,
}

/// `POST /v1/compact`
pub(super) async fn compact(call: &mut Call<'_>) -> Reply {
    let deadline = call.deadline()?;
    call.params.finish()?;
    call.refuse_conditions()?;
    let body = call.read_body(deadline).await?;
    let idempotency = call.idempotency(None, &body)?;
    let CompactJson { revision } = super::json::parse(&body)?;
    if revision == 0 {
        return Err(invalid("`revision` must be at least 1".to_owned()));
    }
    let applied = call.propose(Body::Compact(Compact { revision }), idempotency, deadline).await?;
    let Success::Compact { compacted_revision } = applied.success else {
        return Err(odd_result(&applied.success));
    };
    let body = json!({"revision": applied.revision, "compacted_revision": compacted_revision});
    Ok(applied.respond(respond::json(StatusCode::OK, &body)))
}

/// `GET /debug/log`
pub(super) fn log_filter(call: &mut Call<'_>) -> Reply {
    call.deadline()?;
    call.params.finish()?;
    Ok(respond::with_body(
        StatusCode::OK,
        respond::TEXT,
        format!("{}\n", log_control(call)?.filter()),
    ))
}

/// `PUT /debug/log`
pub(super) async fn set_log_filter(call: &mut Call<'_>) -> Reply {
    let deadline = call.deadline()?;
    call.params.finish()?;
    let body = call.read_body(deadline).await?;
    let filter = std::str::from_utf8(&body)
        .map_err(|_| invalid("the filter is not UTF-8".to_owned()))?
        .trim();
    if filter.is_empty() {
        return Err(invalid(
            "the filter is empty; write it as in `info` or `info,metcd::http=debug`".to_owned(),
        ));
    }
    let log = log_control(call)?;
    log.set_filter(filter).map_err(|why| invalid(format!("the filter: {why}")))?;
    tracing::info!(filter, "the log filter was changed");
    Ok(respond::with_body(StatusCode::OK, respond::TEXT, format!("{}\n", log.filter())))
}

fn log_control<'a>(call: &Call<'a>) -> Result<&'a dyn LogControl, ApiError> {
    call.app.log.as_deref().ok_or_else(|| Problem::UnknownRoute.into())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;

    use super::*;
    use crate::http::route::Route;

    /// `METHOD path` of everything the document describes.
    fn described() -> BTreeSet<String> {
        let document: Value = serde_json::from_str(OPENAPI).unwrap();
        let mut described = BTreeSet::new();
        for (path, item) in document["paths"].as_object().unwrap() {
            for method in item
                .as_object()
                .unwrap()
                .keys()
                .filter(|key| *key != "parameters" && *key != "summary")
            {
                described.insert(format!("{} {path}", method.to_uppercase()));
            }
        }
        described
    }

    #[test]
    fn the_openapi_document_has_every_route_and_method_and_no_other() {
        let mut served = BTreeSet::new();
        for route in Route::ALL.into_iter().filter(|&route| route != Route::Unknown) {
            for method in route.allow().split(", ").filter(|&method| method != "OPTIONS") {
                served.insert(format!("{method} {}", route.template()));
            }
        }
        assert_eq!(described(), served);
    }

    #[test]
    fn every_operation_has_a_name_of_its_own_and_head_takes_what_get_takes() {
        let document: Value = serde_json::from_str(OPENAPI).unwrap();
        let mut names = BTreeSet::new();
        for (path, item) in document["paths"].as_object().unwrap() {
            let operations = item.as_object().unwrap().iter().filter(|(method, _)| *method != "parameters");
            for (method, operation) in operations {
                let name = operation["operationId"].as_str().unwrap_or_else(|| panic!("{method} {path}"));
                assert!(names.insert(name.to_owned()), "{name}");
            }
            if !item["head"].is_null() {
                assert_eq!(item["head"]["parameters"], item["get"]["parameters"], "{path}");
            }
        }
    }

    #[test]
    fn every_code_of_a_problem_is_in_the_openapi_document() {
        // As they stand in the tables of the two places that make problems.
        let sources = [include_str!("error.rs"), include_str!("../serve/problem.rs")].concat();
        let document: Value = serde_json::from_str(OPENAPI).unwrap();
        let listed = document.pointer("/components/schemas/Problem/properties/code/examples").unwrap();
        let listed: BTreeSet<&str> = listed.as_array().unwrap().iter().filter_map(Value::as_str).collect();
        let in_use = |code: &&&str| sources.contains(&format!("\"{code}\""));
        let unused: Vec<_> = listed.iter().filter(|code| !in_use(code)).collect();
        assert_eq!(unused, [&"permission_denied", &"unauthenticated"]);
        let table = sources.split("fn status_and_code").nth(1).unwrap();
        let table = table.split("fn code").next().unwrap();
        let codes: Vec<&str> = table.split('"').skip(1).step_by(2).collect();
        assert!(codes.len() > 25, "{codes:?}");
        for code in codes {
            assert!(listed.contains(code), "{code}");
        }
    }

    #[test]
    fn every_reference_in_the_openapi_document_resolves() {
        fn references<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
            match value {
                Value::Object(fields) => {
                    found.extend(fields.get("$ref").and_then(Value::as_str));
                    fields.values().for_each(|field| references(field, found));
                }
                Value::Array(elements) => elements.iter().for_each(|element| references(element, found)),
                Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
            }
        }
        let document: Value = serde_json::from_str(OPENAPI).unwrap();
        let mut found = Vec::new();
        references(&document, &mut found);
        assert!(!found.is_empty());
        for reference in found {
            let pointer = reference.strip_prefix('#').unwrap_or(reference);
            assert!(document.pointer(pointer).is_some(), "{reference}");
        }
        assert_eq!(document["openapi"], "3.1.0");
        assert_eq!(document["info"]["version"], VERSION);
    }
}
