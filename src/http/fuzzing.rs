//! See [`crate::fuzzing`]. Only what is parsed before a request has any effect.

use std::time::Duration;

use http::HeaderMap;
use prost::Message as _;

use super::accept::{Form, negotiate};
use super::conditions::ConditionHeaders;
use super::lease::{GrantJson, ttl_ms};
use super::member::{AddJson, ReplaceJson, TransferJson, UpdateJson, check_url, new_member};
use super::ops::CompactJson;
use super::page::PageToken;
use super::params::Params;
use super::route::{Route, resolve};
use super::{json, percent, span, txn, watch};
use crate::config::{Config, Sources};
use crate::leader::NewMember;
use crate::state::command::Txn;

/// A path and, behind the first `?`, a query.
pub(crate) fn urls(data: &[u8]) {
    // hyper lets only such bytes through.
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (path, query) = text.split_once('?').unwrap_or((text, ""));
    if let Ok(target) = resolve(path)
        && matches!(target.route, Route::Key | Route::ShortKey)
    {
        let long = format!("/v1/kv/{}", percent::encode(&target.argument));
        let again = resolve(&long).ok().map(|target| target.argument);
        assert_eq!(again.as_ref(), Some(&target.argument), "every key has a URL");
    }
    let Ok(mut params) = Params::parse(Some(query)) else { return };
    let again = Params::parse(Some(&params.without("timeout")));
    assert!(again.is_ok_and(|again| again.identity() == params.identity()));
    read_params(&mut params);
}

/// Every kind of parameter that a route takes. They must only not panic.
fn read_params(params: &mut Params) {
    let max = Duration::from_secs(3600);
    let _ = (
        params.revision("revision"),
        params.revision("from_revision"),
        params.number("min_revision"),
    );
    let _ = (
        params.duration("timeout", false, max),
        params.duration("ttl", true, max),
        params.number("lease"),
    );
    let _ = (params.flag("prev"), params.text("order"), params.number("limit"));
    if let (Ok(Some(span)), Some(after)) = (span::from_params(params), params.bytes("after"))
        && let Ok(token) = PageToken::decode(&after, &span, false)
    {
        assert_eq!(
            PageToken::decode(token.encode(&span, false).as_bytes(), &span, false).ok(),
            Some(token)
        );
    }
    let _ = params.finish();
}

/// Every body that is JSON: each parser gets it.
pub(crate) fn json_bodies(data: &[u8]) {
    thread_local! {
        static CONFIG: Option<Config> = crate::config::load(&Sources::default()).ok().map(|loaded| loaded.config);
    }
    CONFIG.with(|config| {
        let Some(config) = config else { return };
        if let Ok(command) = json::parse(data).and_then(|body| txn::into_command(body, &config.limits)) {
            assert_eq!(Txn::decode(&command.encode_to_vec()[..]).ok(), Some(command));
        }
    });
    if let Ok(ms) = json::parse::<GrantJson>(data).and_then(|grant| ttl_ms(grant.ttl)) {
        assert!(ms >= 1, "a lease lives for a while");
    }
    if let Ok(NewMember { peer_url, .. }) = json::parse::<AddJson>(data).and_then(new_member) {
        assert_eq!(check_url("peer_url", &peer_url).ok(), Some(peer_url));
    }
    // They must only not panic.
    let _ = json::parse::<UpdateJson>(data);
    let _ = json::parse::<ReplaceJson>(data).map(|replace| new_member(replace.add.0));
    let _ = json::parse::<TransferJson>(data);
    let _ = json::parse::<CompactJson>(data);
}

/// The headers of a client that are parsed here.
pub(crate) fn headers(headers: &HeaderMap) {
    if let Ok(conditions) = ConditionHeaders::parse(headers)
        && let Some(command) = conditions.into_command()
    {
        assert!(command.if_match.is_sorted() && command.if_none_match.is_sorted());
    }
    let _ = negotiate(headers, Form::Json, Form::Ndjson);
    let _ = negotiate(headers, Form::Raw, Form::Json);
    if let Ok(Some(after)) = watch::resume_point(headers, None) {
        let text = headers.get("last-event-id").and_then(|id| id.to_str().ok());
        assert_eq!(text.and_then(|id| id.parse().ok()), Some(after));
    }
}
