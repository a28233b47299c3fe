//! The OpenAPI document and the server agree on parameters.

use serde_json::Value;

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
