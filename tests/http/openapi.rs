//! The OpenAPI document and the server agree on parameters and on the bodies of answers.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::schema::Schemas;
use crate::support::{Answer, Server};

/// The description itself, behind a reference.
fn resolved<'a>(document: &'a Value, value: &'a Value) -> &'a Value {
    let Some(reference) = value["$ref"].as_str() else {
        return value;
    };
    document.pointer(reference.trim_start_matches('#')).unwrap()
}

/// The names of an operation's parameters that stand in the query, with a value for each.
fn query_parameters(document: &Value, item: &Value, operation: &Value) -> Vec<(String, String)> {
    let lists = [&item["parameters"], &operation["parameters"]];
    let parameters = lists.into_iter().filter_map(Value::as_array).flatten();
    let parameters = parameters.map(|parameter| resolved(document, parameter));
    parameters
        .filter(|parameter| parameter["in"] == "query")
        .map(|parameter| (parameter["name"].as_str().unwrap().to_owned(), plausible(document, parameter)))
        .collect()
}

/// A value that the schema allows, and for which nobody waits long.
fn plausible(document: &Value, parameter: &Value) -> String {
    if parameter["name"] == "wait" {
        return "1ms".to_owned();
    }
    let schema = resolved(document, &parameter["schema"]);
    for listed in [&schema["enum"][0], &schema["examples"][0]] {
        if let Some(text) = listed.as_str() {
            return text.to_owned();
        }
    }
    match schema["type"].as_str() {
        Some("boolean") => "true",
        // A string may be the id of a lease.
        Some("integer" | "string") => "1",
        other => panic!("{other:?}: {parameter}"),
    }
    .to_owned()
}

/// What an operation needs before it looks at anything else, unless `name` gives it: which keys, and a body.
fn needed(path: &str, method: &str, name: &str) -> (&'static str, &'static str) {
    let query = match (path, method, name) {
        ("/v1/kv" | "/v1/watch", "get" | "head" | "delete", "end") => "start=0&",
        ("/v1/kv", "delete", "prefix" | "start") | ("/v1/watch", _, "key" | "prefix" | "start") => "",
        ("/v1/kv", "delete", _) | ("/v1/watch", _, _) => "prefix=a&",
        _ => "",
    };
    let body = match (path, method) {
        ("/v1/txn", _) => r#"{"then":[]}"#,
        ("/v1/leases", "post") => r#"{"ttl":30}"#,
        ("/v1/compact", _) => r#"{"revision":1}"#,
        ("/debug/log", "put") => "info",
        (_, "post" | "put" | "patch") => "{}",
        _ => "",
    };
    (query, body)
}

/// Head and, of a refusal, body: a watch would go on for ever.
fn ask(server: &Server, method: &str, target: &str, body: &str) -> Answer {
    let mut exchange = server.begin(&method.to_uppercase(), target, &[], body.as_bytes());
    let mut answer = exchange.head();
    if answer.status >= 400 && method != "head" {
        exchange.body_of(&mut answer);
    }
    answer
}

#[test]
fn the_parameters_of_the_document_are_those_that_the_server_takes() {
    let server = Server::start();
    let document = server.get("/openapi.json").json();
    let (mut operations, mut asked) = (0, 0);
    for (path, item) in document["paths"].as_object().unwrap() {
        // No member and no lease has this id: nothing is changed.
        let concrete = path.replace("{key}", "no-such-key").replace("{id}", "99");
        let methods = item.as_object().unwrap().iter();
        for (method, operation) in methods.filter(|(method, _)| !["parameters", "summary"].contains(&method.as_str())) {
            operations += 1;
            let (query, body) = needed(path, method, "");
            let mistyped = ask(&server, method, &format!("{concrete}?{query}tiemout=1s"), body);
            assert_eq!(mistyped.status, 400, "{method} {path}: {mistyped:?}");
            if method != "head" {
                mistyped.refused(400, "unknown_parameter");
                assert!(mistyped.text().contains("tiemout"), "{method} {path}: {mistyped:?}");
            }
            for (name, value) in query_parameters(&document, item, operation) {
                asked += 1;
                let (query, body) = needed(path, method, &name);
                let target = format!("{concrete}?{query}{name}={value}");
                let answer = ask(&server, method, &target, body);
                if answer.status == 400 && method != "head" {
                    assert_ne!(answer.json()["code"], "unknown_parameter", "{method} {target}: {answer:?}");
                }
                // What only reads is refused for nothing else either, but for a token that no page gave.
                if ["get", "head"].contains(&method.as_str()) && name != "after" {
                    assert!(answer.status < 400 || answer.status == 404, "{method} {target}: {answer:?}");
                }
            }
        }
    }
    assert!(operations > 50 && asked > 100, "{operations} operations, {asked} parameters");
}

/// Holds answers against the document that the server itself hands out.
struct Judge<'a> {
    server: &'a Server,
    schemas: Schemas<'a>,
    judged: usize,
}

impl<'a> Judge<'a> {
    /// Sends a request of the operation `path`; its answer has this status, a documented one, and a body as documented.
    #[track_caller]
    fn send(&mut self, status: u16, request: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
        let (method, target) = request.split_once(' ').unwrap();
        let answer = self.server.send(method, target, headers, body.as_bytes());
        assert_eq!(answer.status, status, "{request}: {answer:?}");
        let document: &'a Value = self.schemas.document;
        let responses = &document["paths"][path][method.to_lowercase()]["responses"];
        let response = responses.get(status.to_string()).or(responses.get("default"));
        let response = resolved(
            document,
            response.unwrap_or_else(|| panic!("{request}: {status} is not documented")),
        );
        self.judged += 1;
        let Some(content) = response["content"].as_object() else {
            assert!(answer.body.is_empty(), "{request}: a body is not documented: {answer:?}");
            return answer;
        };
        let kind = answer.header("content-type").split(';').next().unwrap().trim();
        let described = content.get(kind).unwrap_or_else(|| panic!("{request}: {kind} is not documented"));
        if kind.ends_with("json") {
            let verdict = self.schemas.check(&described["schema"], &answer.json(), "");
            verdict.unwrap_or_else(|why| panic!("{request}: {why}"));
        } else {
            assert_eq!(described["schema"]["type"], "string", "{request}");
        }
        answer
    }

    fn get(&mut self, status: u16, target: &str, path: &str) -> Answer {
        self.send(status, &format!("GET {target}"), path, &[], "")
    }
}

const AS_JSON: [(&str, &str); 1] = [("Accept", "application/json")];

fn keys_and_ranges(judge: &mut Judge) {
    let key = "/v1/kv/{key}";
    judge.send(201, "PUT /v1/kv/a?ttl=10m", key, &[], "1");
    judge.send(204, "PUT /v1/kv/a", key, &[], "2");
    judge.send(200, "PUT /b?prev=true", "/{key}", &[], "1");
    judge.send(200, "PUT /b?prev=true", "/{key}", &[], "2");
    judge.send(201, "PUT /%ff", "/{key}", &[("Idempotency-Key", "k")], "");
    judge.get(200, "/a", "/{key}");
    judge.send(200, "GET /v1/kv/b", key, &AS_JSON, "");
    judge.server.send("PUT", "/%ff", &[], b"\xff");
    judge.send(200, "GET /%ff", "/{key}", &AS_JSON, "");
    judge.send(200, "PUT /leased?ttl=10m&prev=true", "/{key}", &[], "1");
    let leased = judge.send(200, "GET /leased", "/{key}", &AS_JSON, "").json();
    let owned = leased["lease"].as_str().unwrap();
    judge.get(200, &format!("/v1/leases/{owned}"), "/v1/leases/{id}");
    judge.get(200, "/v1/kv?prefix=&limit=1", "/v1/kv");
    judge.get(200, "/v1/kv?prefix=", "/v1/kv");
    judge.get(200, "/v1/kv?prefix=&count_only=true", "/v1/kv");
    judge.get(200, "/v1/kv?prefix=&keys_only=true", "/v1/kv");
    judge.send(200, "DELETE /b?prev=true", "/{key}", &[], "");
    judge.send(204, "DELETE /v1/kv/a", key, &[], "");
    judge.send(200, "DELETE /v1/kv?prefix=b", "/v1/kv", &[], "");
    let everything = r#"{"compare":[{"key":"t","target":"version","op":"=","value":0}],
        "then":[{"put":{"key":"t","value":"1"}},{"get":{"prefix":"t"}},{"delete":{"key":"u"}}]}"#;
    judge.send(200, "POST /v1/txn", "/v1/txn", &[], everything);
    judge.get(200, "/v1/hash", "/v1/hash");
    judge.send(200, "POST /v1/compact", "/v1/compact", &[], r#"{"revision":3}"#);
}

fn leases_and_members(judge: &mut Judge) {
    let granted = judge.send(201, "POST /v1/leases", "/v1/leases", &[], r#"{"ttl":60}"#).json();
    let id = granted["id"].as_str().unwrap();
    judge.send(201, &format!("PUT /held?lease={id}"), "/{key}", &[], "1");
    judge.send(201, &format!("PUT /held%ff?lease={id}"), "/{key}", &[], "1");
    let one = "/v1/leases/{id}";
    judge.get(200, "/v1/leases", "/v1/leases");
    judge.get(200, &format!("/v1/leases/{id}"), one);
    judge.send(
        200,
        &format!("POST /v1/leases/{id}/keepalive"),
        "/v1/leases/{id}/keepalive",
        &[],
        "",
    );
    judge.send(200, &format!("DELETE /v1/leases/{id}"), one, &[], "");
    judge.get(404, &format!("/v1/leases/{id}"), one);

    judge.get(200, "/members", "/members");
    let nobody = r#"{"id":7,"peer_url":"http://127.0.0.1:9"}"#;
    judge.send(201, "POST /members", "/members", &[], nobody);
    judge.send(200, "POST /members", "/members", &[], nobody);
    judge.get(200, "/members", "/members");
    judge.send(409, "POST /members", "/members", &[], r#"{"id":1,"peer_url":"http://127.0.0.1:9"}"#);
    judge.send(200, "PATCH /members/1", "/members/{id}", &[], r#"{"name":"bob"}"#);
    judge.send(200, "DELETE /members/7", "/members/{id}", &[], "");
    judge.send(404, "DELETE /members/9", "/members/{id}", &[], "");
    judge.send(409, "POST /members/1/promote", "/members/{id}/promote", &[], "");
    judge.get(200, "/leader", "/leader");
    judge.send(200, "POST /leader", "/leader", &[], r#"{"id":1}"#);
    judge.send(404, "POST /leader", "/leader", &[], r#"{"id":9}"#);
}

fn the_member_itself(judge: &mut Judge) {
    for path in [
        "/",
        "/health",
        "/livez",
        "/readyz",
        "/status",
        "/version",
        "/metrics",
        "/openapi.json",
        "/debug/log",
    ] {
        judge.get(200, path, path);
    }
    judge.send(200, "PUT /debug/log", "/debug/log", &[], "info");
    judge.send(400, "PUT /debug/log", "/debug/log", &[], "metcd=loud");
}

fn refusals(judge: &mut Judge) {
    let key = "/{key}";
    judge.get(404, "/nothing", key);
    judge.get(410, "/leased?revision=2", key);
    judge.get(400, "/leased?revision=x", key);
    judge.get(504, "/leased?min_revision=999999&timeout=50ms", key);
    judge.send(412, "PUT /leased", key, &[("If-Match", "\"1\"")], "1");
    judge.send(422, "PUT /leased", key, &[("Idempotency-Key", "k")], "1");
    judge.send(413, "PUT /big", key, &[], &"v".repeat(2048));
    judge.send(404, "PUT /leased?lease=99", key, &[], "1");
    judge.get(400, "/v1/kv?prefix=&limit=0", "/v1/kv");
    judge.get(400, "/v1/hash?revision=999999", "/v1/hash");
    judge.send(400, "POST /v1/txn", "/v1/txn", &[], "{");
    judge.send(410, "POST /v1/compact", "/v1/compact", &[], r#"{"revision":2}"#);
}

/// A watch has no end: its lines, one by one, up to the last change.
fn a_watch(judge: &mut Judge) {
    let server = judge.server;
    let first = server.put("/watched", "1").revision();
    server.put("/watched", "2");
    server.delete("/watched");
    server.put("/watched%ff", "1");
    server.delete("/watched%ff");
    let ndjson = [("Accept", "application/x-ndjson")];
    let mut watch = server.begin(
        "GET",
        &format!("/v1/watch?prefix=watched&prev=true&from_revision={first}"),
        &ndjson,
        b"",
    );
    assert_eq!(watch.head().status, 200);
    let content = &judge.schemas.document["paths"]["/v1/watch"]["get"]["responses"]["200"]["content"];
    let (mut text, mut changes) = (String::new(), 0);
    while changes < 5 {
        text.push_str(&String::from_utf8(watch.chunk().expect("more")).unwrap());
        while let Some((line, rest)) = text.split_once('\n') {
            let message: Value = serde_json::from_str(line).unwrap();
            changes += usize::from(message["type"] == "change");
            let verdict = judge.schemas.check(&content["application/x-ndjson"]["schema"], &message, "");
            verdict.unwrap_or_else(|why| panic!("{why}"));
            text = rest.to_owned();
        }
    }
}

/// Both ways: nothing comes that is not documented, and what is documented does come.
#[test]
fn the_bodies_of_answers_are_as_the_document_says() {
    let server = Server::start_with(&["limits.max_value_bytes=1KiB"]);
    let document = server.get("/openapi.json").json();
    let mut judge = Judge {
        server: &server,
        schemas: Schemas {
            document: &document,
            seen: BTreeSet::new(),
        },
        judged: 0,
    };
    keys_and_ranges(&mut judge);
    leases_and_members(&mut judge);
    the_member_itself(&mut judge);
    refusals(&mut judge);
    a_watch(&mut judge);
    assert!(judge.judged > 60, "{}", judge.judged);

    // What a single node that is well never says: other tests look at these.
    let elsewhere: BTreeSet<_> = [
        "Member.replaces",
        "Problem.health",
        "Problem.reason",
        "WatchMessage.code",
        "WatchMessage.detail",
        "WatchMessage.compacted_revision",
    ]
    .map(str::to_owned)
    .into();
    let of_requests = ["Txn", "Compare", "Operation", "NewMember"];
    let schemas = document["components"]["schemas"].as_object().unwrap().iter();
    let documented: BTreeSet<String> = schemas
        .filter(|(name, _)| !of_requests.contains(&name.as_str()))
        .flat_map(|(name, schema)| {
            let fields = schema["properties"].as_object().into_iter().flatten();
            fields.map(move |(field, _)| format!("{name}.{field}"))
        })
        .collect();
    let never: Vec<_> = documented
        .difference(&judge.schemas.seen)
        .filter(|field| !elsewhere.contains(*field))
        .collect();
    assert!(never.is_empty(), "documented and never seen: {never:?}");
}
