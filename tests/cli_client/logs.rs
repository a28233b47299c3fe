//! What a member writes into its logs about requests.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;

use serde_json::Value;

use crate::support::{SOON, Server, free_port, until};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

/// One request, whatever a client library would do; returns the answer.
fn ask(port: u16, request: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    let request = request.replacen("\r\n", "\r\nHost: localhost\r\nConnection: close\r\n", 1);
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// Waits for a JSON line of a log that is wanted, and returns it.
fn line(file: &Path, wanted: impl Fn(&Value) -> bool) -> Value {
    let mut found = None;
    until("the line is in the log", || {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        let mut lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        found = lines.find(&wanted);
        found.is_some()
    });
    found.unwrap()
}

#[test]
fn a_request_is_a_span_with_its_trace_once_the_filter_asks_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let (client, peer) = (free_port(), free_port());
    let logs = dir.path().join("logs");
    let server = Server::with(
        client,
        peer,
        &[
            &format!("--data-dir={}", dir.path().join("d").display()),
            "--set=log.format=json",
            "--set=log.access_log=true",
            &format!("--set=log.directory={}", logs.display()),
        ],
    );
    server.ready();
    let get = |path: &str| {
        ask(
            client,
            &format!("GET {path} HTTP/1.1\r\ntraceparent: 00-{TRACE}-00f067aa0ba902b7-01\r\n\r\n"),
        )
    };
    get("/before");
    let logged = line(&logs.join("access.log"), |line| line["fields"]["target"] == "/before");
    assert_eq!(logged["fields"]["trace_id"], TRACE, "{logged}");
    let sent = logged["fields"]["sent"].as_u64().expect("bytes of the answer");
    assert!(sent > 0 && logged["fields"]["received"] == 0, "{logged}");
    let client_addr = logged["fields"]["client"].as_str().expect("who asked");
    assert!(client_addr.starts_with("127.0.0.1:"), "{logged}");

    let set = ask(client, "PUT /debug/log HTTP/1.1\r\nContent-Length: 18\r\n\r\nwarn,request=debug");
    assert!(set.starts_with("HTTP/1.1 200"), "{set}");
    get("/after?consistency=serializable");
    let ended = line(&logs.join("metcd.log"), |line| line["target"] == "request");
    let span = &ended["span"];
    assert_eq!(
        (&span["trace_id"], &span["parent_id"], &span["method"]),
        (&TRACE.into(), &"00f067aa0ba902b7".into(), &"GET".into()),
        "{ended}"
    );
    assert_eq!(ended["fields"]["status"], 404);
    let text = std::fs::read_to_string(logs.join("metcd.log")).unwrap();
    assert!(!text.contains("/before"), "the span is off until it is asked for: {text}");
}

#[test]
fn a_slow_request_is_told_with_its_breakdown_but_a_wait_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let ports: Vec<(u16, u16)> = (0..3).map(|_| (free_port(), free_port())).collect();
    let members: Vec<String> = (1..)
        .zip(&ports)
        .map(|(id, (_, peer))| format!("--member={id}=http://127.0.0.1:{peer}"))
        .collect();
    let logs = dir.path().join("logs");
    let own = [
        "--id=1".to_owned(),
        format!("--data-dir={}", dir.path().join("d").display()),
        "--set=log.format=json".to_owned(),
        format!("--set=log.directory={}", logs.display()),
    ];
    let args: Vec<&str> = own.iter().chain(&members).map(String::as_str).collect();
    let (client, peer) = ports[0];
    // One of three: there is no leader, so what waits for one is slow.
    let _server = Server::with(client, peer, &args);
    until("it answers", || TcpStream::connect(("127.0.0.1", client)).is_ok());
    let traced = format!("traceparent: 00-{TRACE}-00f067aa0ba902b7-00\r\n");
    let waited = ask(
        client,
        &format!("GET /waits?consistency=serializable&wait=300ms HTTP/1.1\r\n{traced}\r\n"),
    );
    assert!(waited.starts_with("HTTP/1.1 304"), "{waited}");
    let refused = ask(
        client,
        &format!("PUT /a?timeout=400ms HTTP/1.1\r\n{traced}Content-Length: 1\r\n\r\nx"),
    );
    assert!(refused.starts_with("HTTP/1.1 503"), "{refused}");
    let told = line(&logs.join("metcd.log"), |line| line["fields"]["message"] == "slow request");
    let fields = &told["fields"];
    assert_eq!(
        (&fields["trace_id"], &fields["target"], &fields["status"]),
        (&TRACE.into(), &"/a?timeout=400ms".into(), &503.into()),
        "{told}"
    );
    let ms = |name: &str| fields[name].as_u64().unwrap();
    assert!(ms("took_ms") >= 100 && ms("queue_ms") >= ms("took_ms") / 2, "{told}");
    assert_eq!((&fields["replicate_ms"], &fields["apply_ms"]), (&0.into(), &0.into()), "{told}");
}
