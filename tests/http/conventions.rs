//! Section 1: keys, values, parameters, headers of every answer, limits, origins.

use serde_json::json;

use crate::support::Server;

#[test]
fn a_key_is_everything_after_the_first_slash_decoded_once() {
    let server = Server::start();
    let spellings = [
        ("/a/b", "/a%2Fb"),
        ("//a/../b/.", "/v1/kv//a/../b/."),
        ("/p+q", "/p%2Bq"),
        ("/%00%ff", "/v1/kv/%00%FF"),
        ("/%2541", "/%25%34%31"),
    ];
    for (at, (one, other)) in spellings.into_iter().enumerate() {
        let value = format!("value {at}");
        assert_eq!(server.put(one, &value).status, 201, "{one}");
        assert_eq!(server.get(other).text(), value, "{one} read as {other}");
    }
    for (target, code) in [("/%zz", "invalid_key"), ("/a%", "invalid_key"), ("/v1/kv/", "invalid_key")] {
        server.get(target).refused(400, code);
        server.put(target, "").refused(400, code);
    }
    server.put("/", "x").refused(400, "invalid_key");
    let longest = "k".repeat(4096);
    assert_eq!(server.put(&format!("/{longest}"), "").status, 201);
    server.put(&format!("/{longest}k"), "").refused(400, "key_too_large");
}

#[test]
fn every_answer_says_who_and_every_data_answer_how_far() {
    let server = Server::start();
    let cases = [
        ("GET", "/nothing"),
        ("PUT", "/a"),
        ("GET", "/%zz"),
        ("PATCH", "/a"),
        ("GET", "/v2/x"),
        ("PUT", "/health"),
        ("GET", "/members"),
        ("OPTIONS", "/a"),
        ("HEAD", "/a"),
        ("GET", "/v1/kv?limit=0"),
        ("GET", "/"),
    ];
    for (method, target) in cases {
        let answer = server.send(method, target, &[], b"");
        assert_eq!(answer.header("metcd-member"), "1", "{method} {target}");
        assert_eq!(answer.header("x-content-type-options"), "nosniff", "{method} {target}");
        let is_data = !["/v2/x", "/health", "/members", "/"].contains(&target);
        assert_eq!(!answer.header("metcd-revision").is_empty(), is_data, "{method} {target}");
    }
}

#[test]
fn unknown_and_repeated_parameters_change_nothing() {
    let server = Server::start();
    let refused = server.put("/a?tll=30s", "x");
    refused.refused(400, "unknown_parameter");
    assert!(refused.json()["detail"].as_str().unwrap().contains("tll"));
    assert_eq!(refused.json()["outcome"], "not_applied");
    server.put("/a?ttl=30s&ttl=30s", "x").refused(400, "invalid_request");
    server.get("/a?timeout=61s").refused(400, "invalid_request");
    server.get("/a").refused(404, "not_found");
}

#[test]
fn a_body_over_the_limit_is_refused_while_it_streams() {
    let server = Server::start_with(&["limits.max_value_bytes=1000", "limits.max_request_bytes=2000"]);
    assert_eq!(server.put("/a", &"x".repeat(1000)).status, 201);
    server.put("/a", &"x".repeat(1001)).refused(413, "value_too_large");
    // No end in sight: the answer comes before the body is complete.
    let mut endless = server.begin("PUT", "/a", &[("Transfer-Encoding", "chunked")], b"");
    endless.write(format!("3e9\r\n{}\r\n", "x".repeat(1001)).as_bytes());
    endless.finish(false).refused(413, "value_too_large");
    // Promised too much: not even asked for.
    let promised = server.begin("PUT", "/a", &[("Content-Length", "1001"), ("Expect", "100-continue")], b"");
    let refused = promised.finish(false);
    refused.refused(413, "value_too_large");
    assert_eq!(refused.header("connection"), "close", "what was promised may never come");
    server
        .post("/v1/txn", &json!({"then": [], "pad": "x".repeat(2000)}))
        .refused(413, "request_too_large");
    assert_eq!(server.get("/a").body.len(), 1000);
}

#[test]
fn a_condition_that_is_not_looked_at_is_refused() {
    let server = Server::start();
    let condition = [("If-Match", "\"1\"")];
    server.send("POST", "/v1/txn", &condition, b"{}").refused(400, "invalid_request");
    server
        .send("POST", "/v1/leases", &condition, b"{\"ttl\":3}")
        .refused(400, "invalid_request");
    server
        .send("POST", "/v1/compact", &condition, b"{\"revision\":1}")
        .refused(400, "invalid_request");
    server
        .send("PUT", "/a", &[("Content-Range", "bytes 0-2/5")], b"abc")
        .refused(400, "invalid_request");
    assert_eq!(server.get("/a").status, 404);
}

#[test]
fn expect_100_continue_is_answered_before_the_body_is_sent() {
    let server = Server::start();
    let mut exchange = server.begin("PUT", "/a", &[("Content-Length", "1"), ("Expect", "100-continue")], b"");
    assert_eq!(exchange.head().status, 100);
    exchange.write(b"x");
    assert_eq!(exchange.finish(false).status, 201);
}

#[test]
fn pages_of_other_origins_and_unknown_hosts_are_kept_out() {
    let server = Server::start_with(&[
        "http.allowed_origins=[\"https://console.example\"]",
        "http.allowed_hosts=[\"kv.example\"]",
    ]);
    let own = format!("http://{}", server.address);
    let get = |headers: &[(&str, &str)]| server.send("GET", "/v1/kv", headers, b"");
    assert_eq!(get(&[("Origin", &own)]).status, 200);
    get(&[("Origin", "http://evil.example")]).refused(403, "cross_origin");
    get(&[("Origin", "null")]).refused(403, "cross_origin");
    get(&[("Sec-Fetch-Site", "cross-site")]).refused(403, "cross_origin");
    get(&[("Host", "evil.example")]).refused(403, "unknown_host");
    assert_eq!(get(&[("Host", "kv.example:3379")]).status, 200);
    assert_eq!(get(&[]).header("access-control-allow-origin"), "");
    assert!(
        get(&[]).header("vary").contains("Origin"),
        "a cache must not give this to a page of a listed origin"
    );
    let listed = get(&[("Origin", "https://console.example"), ("Sec-Fetch-Site", "cross-site")]);
    assert_eq!(
        (listed.status, listed.header("access-control-allow-origin")),
        (200, "https://console.example")
    );
    let preflight = server.send("OPTIONS", "/v1/kv", &[("Origin", "https://console.example")], b"");
    assert_eq!((preflight.status, preflight.header("access-control-max-age")), (204, "600"));
}

#[test]
fn methods_that_do_not_fit_are_405_with_allow_and_the_url_that_works() {
    let server = Server::start();
    for (method, target, code, allow) in [
        ("PATCH", "/hello", "method_not_allowed", "GET, HEAD, PUT, DELETE, OPTIONS"),
        ("POST", "/v1/kv/x", "method_not_allowed", "GET, HEAD, PUT, DELETE, OPTIONS"),
        ("GET", "/v1/txn", "method_not_allowed", "POST, OPTIONS"),
        ("PUT", "/members", "reserved_key", "GET, HEAD, POST, OPTIONS"),
        ("DELETE", "/v1/x%20y", "reserved_key", "OPTIONS"),
    ] {
        let answer = server.send(method, target, &[], b"");
        answer.refused(405, code);
        assert_eq!(answer.header("allow"), allow, "{method} {target}");
    }
    assert!(
        server.delete("/v1/x%20y").json()["detail"]
            .as_str()
            .unwrap()
            .contains("/v1/kv/v1/x%20y")
    );
    for method in ["GET", "OPTIONS"] {
        server.send(method, "/v1/nope", &[], b"").refused(404, "unknown_route");
    }
    assert_eq!(server.send("OPTIONS", "/a", &[], b"").status, 204);
    // `*` is the server as a whole, and no key.
    assert_eq!(server.send("OPTIONS", "*", &[], b"").status, 204);
    for method in ["GET", "PUT", "DELETE"] {
        server.send(method, "*", &[], b"").refused(400, "invalid_request");
    }
    assert_eq!(server.put("/*", "a key").status, 201);
}

#[test]
fn json_is_json_whatever_the_content_type_says() {
    let server = Server::start();
    let form = [("Content-Type", "application/x-www-form-urlencoded")];
    assert_eq!(server.send("POST", "/v1/txn", &form, b"{}").status, 200);
    let refused = server.send("POST", "/v1/leases", &[], br#"{"ttl":3,"tll":3}"#);
    refused.refused(400, "invalid_request");
    assert!(refused.json()["detail"].as_str().unwrap().contains("tll"));
    server
        .send("POST", "/v1/leases", &[], br#"{"ttl":3} x"#)
        .refused(400, "invalid_request");
    for (target, body) in [("/v1/txn", &b"[]"[..]), ("/v1/leases", b" [30]")] {
        server.send("POST", target, &[], body).refused(400, "invalid_request");
    }
    assert_eq!(server.get("/v1/leases").json()["leases"], serde_json::json!([]));
}

#[test]
fn json_has_its_fields_in_the_documented_order() {
    let server = Server::start();
    for (target, beginning) in [
        ("/status", r#"{"id":1,"name":"#),
        ("/leader", r#"{"id":1,"term":"#),
        ("/members", r#"{"cluster_id":"#),
        ("/v1/hash", r#"{"revision":1,"hash":"#),
    ] {
        let text = server.get(target).text();
        assert!(text.starts_with(beginning), "{target}: {text}");
    }
}

#[test]
fn a_head_that_is_too_large_is_told_which_part_of_it() {
    let server = Server::start();
    for length in [40_000, 70_000, 150_000] {
        server.get(&format!("/{}", "k".repeat(length))).refused(414, "uri_too_long");
        let field = "y".repeat(length);
        let answer = server.send("GET", "/a", &[("X-One", &field), ("X-Two", &field)], b"");
        answer.refused(431, "headers_too_large");
        assert_eq!(answer.header("metcd-member"), "1");
    }
    server.get(&format!("/{}", "k".repeat(20_000))).refused(400, "key_too_large");
    // The longest list there is: two keys and a token, every byte escaped.
    let bound = "%FF".repeat(4096);
    let token = "A".repeat(5_600);
    server
        .get(&format!("/v1/kv?start={bound}&end={bound}&after={token}"))
        .refused(400, "invalid_request");
}

#[test]
fn what_is_mistyped_is_named_also_where_something_else_is_missing() {
    let server = Server::start();
    let watch = server.get("/v1/watch?kye=a");
    watch.refused(400, "unknown_parameter");
    assert!(watch.text().contains("`kye`; did you mean `key`?"), "{}", watch.text());
    for then in [r#"{"put":{"key":"a","value":"b"},"x":{}}"#, r#"{"x":{}}"#] {
        let txn = server.send("POST", "/v1/txn", &[], format!(r#"{{"then":[{then}]}}"#).as_bytes());
        txn.refused(400, "invalid_request");
        assert!(txn.text().contains("then[0]") && txn.text().contains("`x`"), "{}", txn.text());
    }
    for then in ["{}", r#"{"put":{"key":"a","value":"b"},"get":{"key":"a"}}"#] {
        let txn = server.send("POST", "/v1/txn", &[], format!(r#"{{"then":[{then}]}}"#).as_bytes());
        txn.refused(400, "invalid_request");
        assert!(txn.text().contains("exactly one of"), "{}", txn.text());
    }
    let lease = server.send("POST", "/v1/leases", &[], br#"{"ttl":60}"#).json()["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let keepalive = format!("/v1/leases/{lease}/keepalive");
    let renewed = server.send("POST", &keepalive, &[], br#"{"tll":60}"#);
    renewed.refused(400, "invalid_request");
    assert!(renewed.text().contains("`tll`"), "{}", renewed.text());
    assert_eq!(server.send("POST", &keepalive, &[], b"{}").status, 200);
    server.get("/v1/watch?key=%zz").refused(400, "invalid_key");
}

#[test]
fn every_request_may_have_a_timeout() {
    let server = Server::start();
    for path in [
        "/",
        "/livez",
        "/readyz",
        "/health",
        "/status",
        "/version",
        "/metrics",
        "/openapi.json",
        "/members",
        "/leader",
    ] {
        assert_eq!(server.get(&format!("{path}?timeout=1s")).status, 200, "{path}");
        server.get(&format!("{path}?timeout=soon")).refused(400, "invalid_request");
    }
}

/// HTTP/2 has a limit of its own for lists of headers; the answer has to be the same.
#[test]
fn http2_heads_that_are_too_large_get_the_same_answer() {
    use http_body_util::{BodyExt as _, Empty};
    use hyper_util::rt::{TokioExecutor, TokioIo};
    let server = Server::start();
    let mut request = hyper::Request::get(format!("http://{}/a", server.address));
    for number in 0..17 {
        request = request.header(format!("x-{number}"), "y".repeat(4000));
    }
    let request = request.body(Empty::<bytes::Bytes>::new()).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (head, body) = runtime.block_on(async {
        let stream = tokio::net::TcpStream::connect(&server.address).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .unwrap();
        tokio::spawn(connection);
        let (head, body) = sender.send_request(request).await.unwrap().into_parts();
        (head, body.collect().await.unwrap().to_bytes())
    });
    assert_eq!((head.status.as_u16(), &head.headers["metcd-member"]), (431, &"1".parse().unwrap()));
    let problem: serde_json::Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(problem["code"], "headers_too_large");
}

/// A client that does not escape must not reach another key, or delete everything.
#[test]
fn a_hash_sign_in_a_target_is_refused() {
    let server = Server::start();
    server.put("/color", "keep");
    for (method, target) in [
        ("PUT", "/color#red"),
        ("DELETE", "/v1/kv?prefix=#tmp/"),
        ("GET", "/color?prev#=true"),
    ] {
        server.send(method, target, &[], b"x").refused(400, "invalid_request");
    }
    assert_eq!(server.get("/color").text(), "keep");
    server.put("/color%23red", "red");
    assert_eq!(
        (server.get("/color").text(), server.get("/color%23red").text()),
        ("keep".into(), "red".into())
    );
}

/// What a coding made of the body would be stored as the value.
#[test]
fn a_coding_other_than_chunked_is_refused() {
    let server = Server::start();
    for coding in ["gzip, chunked", "foo, chunked"] {
        let answer = server.send("PUT", "/a", &[("Transfer-Encoding", coding)], b"1\r\nx\r\n0\r\n\r\n");
        answer.refused(400, "invalid_request");
        assert_eq!(answer.json()["outcome"], "not_applied");
    }
    let answer = server.send("PUT", "/a", &[("Transfer-Encoding", "Chunked")], b"1\r\nx\r\n0\r\n\r\n");
    assert_eq!((answer.status, server.get("/a").text()), (201, "x".into()));
}
