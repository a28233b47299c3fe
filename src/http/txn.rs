//! `POST /v1/txn`: compares, then one of two branches, as one command.
//!
//! A branch runs in order; a get sees what the operations before it did. A key may be changed by one operation of a branch only: two
//! puts of it, or a put and a delete that covers it, would need two changes of one key in one revision.

use http::StatusCode;
use serde::Deserialize;

use super::call::{Call, Reply, odd_result};
use super::error::ApiError;
use super::json::{self, Object, bytes_of, invalid};
use super::list::{DEFAULT_LIMIT, MAX_LIMIT};
use super::params::decimal;
use super::respond;
use super::route::check_key;
use super::span;
use crate::config::LimitsConfig;
use crate::state::command::{Body, Compare, CompareOp, CompareTarget, DeleteRange, KeySpan, Put, Txn, TxnGet, TxnOp, TxnOpBody};
use crate::state::outcome::{Success, TxnResponse};

/// What the gets of a transaction may answer together, unless one request or one value may be larger: as much as a page of a list.
const MAX_ANSWER_BYTES: u64 = 16 << 20;
/// Keys that its gets and deletes may look at together, unless one delete may remove more: about a fifth of a second during which nothing else is applied.
const MAX_KEYS: u64 = 1_000_000;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TxnJson {
    #[serde(default)]
    compare: Vec<Object<CompareJson>>,
    #[serde(default)]
    then: Vec<Object<OpJson>>,
    #[serde(default, rename = "else")]
    or_else: Vec<Object<OpJson>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CompareJson {
    key: Option<String>,
    key_base64: Option<String>,
    target: TargetJson,
    op: OperatorJson,
    value: Option<ScalarJson>,
    value_base64: Option<String>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum TargetJson {
    Value,
    Version,
    CreateRevision,
    ModRevision,
    Lease,
}

#[derive(Clone, Copy, Deserialize)]
enum OperatorJson {
    #[serde(rename = "=")]
    Equal,
    #[serde(rename = "!=")]
    NotEqual,
    #[serde(rename = "<")]
    Less,
    #[serde(rename = ">")]
    Greater,
}

/// A number or a text: revisions are numbers, values are texts, lease ids may be either.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string or a number from 0")]
enum ScalarJson {
    Number(u64),
    Text(String),
}

/// Exactly one of them. Not an enum: serde would refuse a second field without naming it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OpJson {
    put: Option<Object<PutJson>>,
    get: Option<Object<GetJson>>,
    delete: Option<Object<DeleteJson>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PutJson {
    key: Option<String>,
    key_base64: Option<String>,
    value: Option<String>,
    value_base64: Option<String>,
    lease: Option<ScalarJson>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GetJson {
    key: Option<String>,
    key_base64: Option<String>,
    prefix: Option<String>,
    prefix_base64: Option<String>,
    start: Option<String>,
    start_base64: Option<String>,
    end: Option<String>,
    end_base64: Option<String>,
    limit: Option<u64>,
    order: Option<OrderJson>,
    #[serde(default)]
    keys_only: bool,
    #[serde(default)]
    count_only: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DeleteJson {
    key: Option<String>,
    key_base64: Option<String>,
    prefix: Option<String>,
    prefix_base64: Option<String>,
    start: Option<String>,
    start_base64: Option<String>,
    end: Option<String>,
    end_base64: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum OrderJson {
    Asc,
    Desc,
}

/// `POST /v1/txn`
pub(super) async fn txn(call: &mut Call<'_>) -> Reply {
    let deadline = call.deadline()?;
    call.params.finish()?;
    call.refuse_conditions()?;
    let body = call.read_body(deadline).await?;
    let idempotency = call.idempotency(None, &body)?;
    let txn = into_command(json::parse(&body)?, &call.app.config.limits)?;
    let keys_only = [keys_only_of(&txn.then), keys_only_of(&txn.or_else)];
    let applied = call.propose(Body::Txn(txn), idempotency, deadline).await?;
    let Success::Txn { succeeded, responses } = &applied.success else {
        return Err(odd_result(&applied.success));
    };
    let [then, or_else] = keys_only;
    let keys_only = if *succeeded { then } else { or_else };
    let body = encode(applied.revision, *succeeded, responses, &keys_only);
    Ok(applied.respond(respond::with_body(StatusCode::OK, respond::JSON, body)))
}

pub(super) fn into_command(txn: TxnJson, limits: &LimitsConfig) -> Result<Txn, ApiError> {
    let max = limits.max_txn_ops;
    for (name, length) in [
        ("compare", txn.compare.len()),
        ("then", txn.then.len()),
        ("else", txn.or_else.len()),
    ] {
        if length > max {
            return Err(invalid(format!("`{name}` has {length} elements, at most {max} are allowed")));
        }
    }
    let compare = each("compare", txn.compare, compare)?;
    let then = each("then", txn.then, |op| operation(op, limits))?;
    let or_else = each("else", txn.or_else, |op| operation(op, limits))?;
    for (name, branch) in [("then", &then), ("else", &or_else)] {
        changes_each_key_once(name, branch)?;
    }
    Ok(Txn {
        compare,
        then,
        or_else,
        max_answer_bytes: MAX_ANSWER_BYTES.max(limits.max_request_bytes).max(limits.max_value_bytes),
        max_keys: MAX_KEYS.max(limits.max_range_delete),
    })
}

/// Converts the elements of an array; an error says which one it is about.
fn each<T, U>(name: &str, elements: Vec<Object<T>>, convert: impl Fn(T) -> Result<U, ApiError>) -> Result<Vec<U>, ApiError> {
    let numbered = elements.into_iter().enumerate();
    numbered
        .map(|(at, Object(element))| convert(element).map_err(|error| error.within(&format!("{name}[{at}]"))))
        .collect()
}

fn key_of(text: Option<String>, base64: Option<String>) -> Result<Vec<u8>, ApiError> {
    let key = bytes_of("key", text, base64)?;
    check_key(&key)?;
    Ok(key)
}

fn compare(compare: CompareJson) -> Result<Compare, ApiError> {
    let key = key_of(compare.key, compare.key_base64)?;
    let (target, lease) = match compare.target {
        TargetJson::Value => (CompareTarget::Value, false),
        TargetJson::Version => (CompareTarget::Version, false),
        TargetJson::CreateRevision => (CompareTarget::CreateRevision, false),
        TargetJson::ModRevision => (CompareTarget::ModRevision, false),
        TargetJson::Lease => (CompareTarget::Lease, true),
    };
    let (number, value) = match (target, compare.value, compare.value_base64) {
        (CompareTarget::Value, Some(ScalarJson::Text(text)), None) => (0, text.into_bytes()),
        (CompareTarget::Value, None, base64 @ Some(_)) => (0, bytes_of("value", None, base64)?),
        (CompareTarget::Value, _, _) => return Err(invalid("exactly one of `value` (a string) and `value_base64` is needed".to_owned())),
        (_, Some(scalar), None) => (number_of("value", &scalar, lease)?, Vec::new()),
        _ => return Err(invalid("`value` must be a number".to_owned())),
    };
    let op = match compare.op {
        OperatorJson::Equal => CompareOp::Equal,
        OperatorJson::NotEqual => CompareOp::NotEqual,
        OperatorJson::Less => CompareOp::Less,
        OperatorJson::Greater => CompareOp::Greater,
    };
    Ok(Compare {
        key: key.into(),
        target: target as i32,
        op: op as i32,
        number,
        value: value.into(),
    })
}

/// A number; a lease's id may be written as the string it is elsewhere.
fn number_of(name: &str, scalar: &ScalarJson, lease: bool) -> Result<u64, ApiError> {
    match scalar {
        ScalarJson::Number(number) => Ok(*number),
        ScalarJson::Text(text) if lease => {
            decimal(text.as_bytes()).ok_or_else(|| invalid(format!("`{name}` must be a lease's id: decimal digits")))
        }
        ScalarJson::Text(_) => Err(invalid(format!("`{name}` must be a number"))),
    }
}

fn operation(op: OpJson, limits: &LimitsConfig) -> Result<TxnOp, ApiError> {
    let body = match (op.put, op.get, op.delete) {
        (Some(Object(op)), None, None) => TxnOpBody::Put(put(op, limits).map_err(|error| error.within("put"))?),
        (None, Some(Object(op)), None) => TxnOpBody::Get(get(op).map_err(|error| error.within("get"))?),
        (None, None, Some(Object(op))) => TxnOpBody::Delete(delete(op, limits).map_err(|error| error.within("delete"))?),
        _ => return Err(invalid("exactly one of `put`, `get` and `delete` is required".to_owned())),
    };
    Ok(TxnOp { body: Some(body) })
}

fn put(put: PutJson, limits: &LimitsConfig) -> Result<Put, ApiError> {
    let value = bytes_of("value", put.value, put.value_base64)?;
    if value.len() as u64 > limits.max_value_bytes {
        return Err(super::error::Problem::ValueTooLarge {
            max: limits.max_value_bytes,
        }
        .into());
    }
    let lease = match put.lease {
        None => 0,
        Some(lease) => match number_of("lease", &lease, true)? {
            0 => return Err(invalid("`lease` must be a lease's id; leave it out for none".to_owned())),
            id => id,
        },
    };
    let key = key_of(put.key, put.key_base64)?.into();
    Ok(Put {
        key,
        value: value.into(),
        conditions: None,
        lease,
        ttl_ms: 0,
        want_prev: false,
    })
}

fn get(get: GetJson) -> Result<TxnGet, ApiError> {
    if get.limit.is_some_and(|limit| !(1..=MAX_LIMIT).contains(&limit)) {
        return Err(invalid(format!("`limit` must be 1 to {MAX_LIMIT}")));
    }
    let bounds = Bounds {
        prefix: optional("prefix", get.prefix, get.prefix_base64)?,
        start: optional("start", get.start, get.start_base64)?,
        end: optional("end", get.end, get.end_base64)?,
    };
    let (span, single) = key_or_range(optional("key", get.key, get.key_base64)?, bounds)?;
    Ok(TxnGet {
        span,
        limit: get.limit.unwrap_or(DEFAULT_LIMIT),
        descending: get.order == Some(OrderJson::Desc),
        keys_only: get.keys_only,
        count_only: get.count_only,
        single,
    })
}

fn delete(delete: DeleteJson, limits: &LimitsConfig) -> Result<DeleteRange, ApiError> {
    let bounds = Bounds {
        prefix: optional("prefix", delete.prefix, delete.prefix_base64)?,
        start: optional("start", delete.start, delete.start_base64)?,
        end: optional("end", delete.end, delete.end_base64)?,
    };
    span::refuse_bare_start(bounds.start.as_deref(), bounds.end.as_deref())?;
    let (span, _single) = key_or_range(optional("key", delete.key, delete.key_base64)?, bounds)?;
    Ok(DeleteRange {
        span,
        max_keys: limits.max_range_delete,
    })
}

/// What can bound a range.
struct Bounds {
    prefix: Option<Vec<u8>>,
    start: Option<Vec<u8>>,
    end: Option<Vec<u8>>,
}

fn optional(name: &str, text: Option<String>, base64: Option<String>) -> Result<Option<Vec<u8>>, ApiError> {
    if text.is_none() && base64.is_none() {
        return Ok(None);
    }
    bytes_of(name, text, base64).map(Some)
}

/// The span, and whether it is a single key.
fn key_or_range(key: Option<Vec<u8>>, bounds: Bounds) -> Result<(KeySpan, bool), ApiError> {
    match (key, span::from_bounds(bounds.prefix, bounds.start, bounds.end)?) {
        (Some(key), None) => {
            check_key(&key)?;
            Ok((KeySpan::single(&key), true))
        }
        (None, Some(span)) => Ok((span, false)),
        (Some(_), Some(_)) => Err(invalid("`key` and a range exclude each other".to_owned())),
        (None, None) => Err(invalid("a `key`, a `prefix`, or a `start` or `end` is needed".to_owned())),
    }
}

fn changes_each_key_once(branch: &str, ops: &[TxnOp]) -> Result<(), ApiError> {
    let bodies = || ops.iter().filter_map(|op| op.body.as_ref());
    let mut put_keys: Vec<&[u8]> = bodies()
        .filter_map(|body| if let TxnOpBody::Put(put) = body { Some(&put.key[..]) } else { None })
        .collect();
    put_keys.sort_unstable();
    let shown = |key: &[u8]| String::from_utf8_lossy(key).chars().take(64).collect::<String>();
    if let Some(pair) = put_keys.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(invalid(format!("`{branch}` puts the key `{}` twice", shown(pair[0]))));
    }
    for body in bodies() {
        let TxnOpBody::Delete(delete) = body else { continue };
        if let Some(key) = put_keys.iter().find(|key| delete.span.contains(key)) {
            return Err(invalid(format!("`{branch}` puts and deletes the key `{}`", shown(key))));
        }
    }
    Ok(())
}

fn keys_only_of(ops: &[TxnOp]) -> Vec<bool> {
    ops.iter()
        .map(|op| matches!(&op.body, Some(TxnOpBody::Get(get)) if get.keys_only))
        .collect()
}

fn encode(revision: u64, succeeded: bool, responses: &[TxnResponse], keys_only: &[bool]) -> Vec<u8> {
    let mut body = Vec::with_capacity(256);
    json::write_number(&mut body, "{\"revision\":", revision);
    body.extend_from_slice(if succeeded {
        b",\"succeeded\":true,\"responses\":["
    } else {
        b",\"succeeded\":false,\"responses\":["
    });
    for (at, response) in responses.iter().enumerate() {
        if at > 0 {
            body.push(b',');
        }
        encode_response(&mut body, response, keys_only.get(at).copied().unwrap_or(false));
    }
    body.extend_from_slice(b"]}");
    body
}

fn encode_response(body: &mut Vec<u8>, response: &TxnResponse, keys_only: bool) {
    match response {
        TxnResponse::Put { created: true } => body.extend_from_slice(b"{\"put\":{\"created\":true}}"),
        TxnResponse::Put { created: false } => body.extend_from_slice(b"{\"put\":{\"created\":false}}"),
        TxnResponse::Get { kvs, count, more } => {
            body.extend_from_slice(b"{\"get\":{\"kvs\":[");
            for (at, kv) in kvs.iter().enumerate() {
                if at > 0 {
                    body.push(b',');
                }
                json::write_kv(body, kv, !keys_only);
            }
            json::write_number(body, "],\"count\":", *count);
            body.extend_from_slice(if *more { b",\"more\":true}}" } else { b",\"more\":false}}" });
        }
        TxnResponse::Delete { deleted } => {
            json::write_number(body, "{\"delete\":{\"deleted\":", *deleted);
            body.extend_from_slice(b"}}");
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::state::outcome::KeyValue;

    fn limits() -> LimitsConfig {
        let second = std::time::Duration::from_secs(1);
        LimitsConfig {
            max_value_bytes: 8,
            max_txn_ops: 3,
            max_request_bytes: 1 << 20,
            max_range_delete: 100,
            max_stream: second,
            min_free_disk: 0,
            max_store_bytes: 0,
            max_connections: 1,
            max_watchers: 1,
            request_timeout: second,
            max_timeout: second,
            header_timeout: second,
        }
    }

    fn parse(body: &Value) -> Result<Txn, String> {
        json::parse(body.to_string().as_bytes())
            .and_then(|txn| into_command(txn, &limits()))
            .map_err(|error| error.problem.detail())
    }

    fn refused(body: Value, named: &str) {
        let detail = parse(&body).expect_err(&body.to_string());
        assert!(detail.contains(named), "{body}: {detail}");
    }

    #[test]
    fn the_example_of_the_contract_parses() {
        let txn = parse(&json!({
            "compare": [{"key": "a", "target": "mod_revision", "op": "=", "value": 3},
                        {"key_base64": "/w==", "target": "value", "op": "!=", "value_base64": "AA=="},
                        {"key": "l", "target": "lease", "op": ">", "value": "17"}],
            "then": [{"put": {"key": "a", "value": "x", "lease": "17"}}, {"get": {"prefix": "a/"}}, {"delete": {"prefix": "b/"}}],
            "else": [{"get": {"key": "a"}}],
        }))
        .unwrap();
        assert_eq!((txn.compare[0].number, txn.compare[2].number), (3, 17));
        assert_eq!((&txn.compare[1].key[..], &txn.compare[1].value[..]), (&b"\xff"[..], &b"\0"[..]));
        assert!(matches!(&txn.then[0].body, Some(TxnOpBody::Put(put)) if put.lease == 17));
        assert!(matches!(&txn.or_else[0].body, Some(TxnOpBody::Get(get)) if get.single && get.span == KeySpan::single(b"a")));
        parse(&json!({})).unwrap();
    }

    #[test]
    fn mistakes_are_named() {
        refused(json!({"thn": []}), "thn");
        refused(json!({"then": [{"put": {"key": "a", "value": "", "ttl": 3}}]}), "ttl");
        refused(json!({"then": [{"put": {"key": "a"}}]}), "then[0]: put: ");
        refused(json!({"then": [{"put": {"key": "", "value": ""}}]}), "then[0]: put: ");
        refused(
            json!({"then": [{"put": {"key": "a", "value": ""}, "get": {"key": "a"}}]}),
            "then[0]",
        );
        refused(json!({"then": [{"move": {}}]}), "move");
        refused(json!({"else": [{"delete": {}}]}), "else[0]: delete: ");
        refused(json!({"else": [{"get": {"key": "a", "prefix": "b"}}]}), "exclude");
        refused(
            json!({"compare": [{"key": "a", "target": "version", "op": "=", "value": "3"}]}),
            "compare[0]",
        );
        refused(
            json!({"compare": [{"key": "a", "target": "value", "op": "=", "value": 3}]}),
            "compare[0]",
        );
        refused(
            json!({"compare": [{"key": "a", "target": "version", "op": "==", "value": 3}]}),
            "==",
        );
        refused(
            json!({"compare": [{"key": "a", "target": "version", "op": "=", "value": -1}]}),
            "number",
        );
    }

    #[test]
    fn a_key_is_changed_once_a_branch() {
        let put = json!({"put": {"key": "a", "value": ""}});
        refused(json!({"then": [put, put]}), "twice");
        refused(json!({"else": [put, {"delete": {"prefix": ""}}]}), "puts and deletes");
        parse(&json!({"then": [put], "else": [put]})).unwrap();
    }

    #[test]
    fn limits_hold() {
        let get = json!({"get": {"key": "a"}});
        parse(&json!({"then": [get, get, get]})).unwrap();
        refused(json!({"then": [get, get, get, get]}), "at most 3");
        refused(json!({"then": [{"put": {"key": "a", "value": "123456789"}}]}), "8 bytes");
        refused(json!({"then": [{"get": {"prefix": "a", "limit": 0}}]}), "limit");
    }

    #[test]
    fn one_response_an_operation() {
        let kv = KeyValue {
            key: "a".into(),
            value: "x".into(),
            create_revision: 2,
            mod_revision: 3,
            version: 2,
            lease: 0,
        };
        let responses = [
            TxnResponse::Put { created: true },
            TxnResponse::Get {
                kvs: vec![kv],
                count: 1,
                more: false,
            },
            TxnResponse::Delete { deleted: 4 },
        ];
        let body: Value = serde_json::from_slice(&encode(9, true, &responses, &[false, true, false])).unwrap();
        assert_eq!(
            body,
            json!({"revision": 9, "succeeded": true, "responses": [
                {"put": {"created": true}},
                {"get": {"kvs": [{"key": "a", "create_revision": 2, "mod_revision": 3, "version": 2}], "count": 1, "more": false}},
                {"delete": {"deleted": 4}},
            ]})
        );
    }
}
