//! put, get, del, ls, txn, compact, hash.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;

use serde_json::json;

use crate::support::{Running, Server, metcd, run, until};

#[test]
fn a_value_comes_back_byte_for_byte_from_arguments_and_from_stdin() {
    let server = Server::start();
    assert_eq!(server.ok(&["put", "greeting", "hello"]), "revision 2\n");
    assert_eq!(server.ok(&["get", "greeting"]), "hello", "no newline into a pipe");
    let every_byte: Vec<u8> = (0..=255).collect();
    assert_eq!(server.metcd_with(&["put", "bytes", "-"], &every_byte).code, 0);
    assert_eq!(server.metcd(&["get", "bytes"]).stdout, every_byte);
    assert_eq!(server.ok(&["put", "empty", ""]), "revision 4\n");
    assert_eq!(server.ok(&["get", "empty"]), "");
}

#[test]
fn keys_are_bytes_and_none_is_folded() {
    let server = Server::start();
    let keys: [&[u8]; 9] = [b".", b"..", b"a/../b", b"//", b"a b+c%2F", b"\xff\xfe", b"v1", b"-x", b"?a=b&c#d"];
    for (number, key) in keys.iter().enumerate() {
        let value = number.to_string();
        let mut put = server.command();
        put.args(["put", "--"]).arg(OsStr::from_bytes(key)).arg(&value);
        assert_eq!(run(&mut put, b"").code, 0, "{key:?}");
    }
    for (number, key) in keys.iter().enumerate() {
        let mut get = server.command();
        get.args(["get", "--"]).arg(OsStr::from_bytes(key));
        assert_eq!(run(&mut get, b"").text(), number.to_string(), "{key:?}");
    }
    let mut sorted = keys.to_vec();
    sorted.sort_unstable();
    assert_eq!(server.metcd(&["ls"]).stdout, [sorted.join(&b"\n"[..]), b"\n".to_vec()].concat());
}

#[test]
fn not_found_and_unmet_conditions_are_exit_code_3() {
    let server = Server::start();
    assert_eq!(server.fails(3, &["get", "a"]), "metcd: there is no such key: a\n");
    assert_eq!(server.fails(3, &["del", "a"]), "metcd: there is no such key: a\n");
    server.ok(&["put", "a", "1", "--if-absent"]);
    assert!(
        server
            .fails(3, &["put", "a", "2", "--if-absent"])
            .contains("condition does not hold")
    );
    assert!(server.fails(3, &["put", "a", "2", "--if-match", "7"]).contains("revision 2"));
    assert!(server.fails(3, &["del", "a", "--if-match", "7"]).contains("revision 2"));
    assert_eq!(server.ok(&["put", "a", "2", "--if-match", "2"]), "revision 3\n");
    assert_eq!(server.ok(&["put", "a", "3", "--if-match", "*"]), "revision 4\n");
    assert!(server.fails(3, &["get", "a", "--wait", "50ms"]).contains("did not change"));
    assert_eq!(server.ok(&["get", "a"]), "3");
}

#[test]
fn wrong_usage_is_exit_code_2_and_nothing_is_sent() {
    let server = Server::start();
    for args in [
        &["put", "a"][..],
        &["put", "", "x"],
        &["put", "a", "b", "--ttl", "soon"],
        &["put", "a", "b", "--ttl", "1s", "--lease", "1"],
        &["put", "a", "b", "--if-match", "x"],
        &["get", "a", "--output", "xml"],
        &["get", "a", "--endpoints", "127.0.0.1:1"],
        &["get", "a", "--endpoints", "https://127.0.0.1:1"],
        &["ls", "--limit", "0"],
        &["watch"],
        &["txn", "--frobnicate"],
        &["serve", "--timeout", "3s"],
        &["config", "show", "--endpoints", "http://127.0.0.1:1"],
        &["elect", "e", "--", "true"],
    ] {
        server.fails(2, args);
    }
    assert_eq!(server.metcd_with(&["txn"], b"{").code, 2);
    assert_eq!(server.json(&["ls", "--count"])["revision"], 1);
}

#[test]
fn a_server_that_allows_little_time_is_asked_without_naming_any() {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("data").to_str().unwrap().to_owned();
    let times = ["--set", "limits.max_timeout=1s", "--set", "limits.request_timeout=1s"];
    let server = Server::with(
        crate::support::free_port(),
        crate::support::free_port(),
        &[&["--data-dir", &data_dir], &times[..]].concat(),
    );
    server.ready();
    assert_eq!(server.ok(&["put", "a", "1"]), "revision 2\n");
    assert_eq!(server.ok(&["get", "a", "--timeout", "20s"]), "1");
    assert_eq!(
        server.ok(&["get", "a", "--timeout", "20s", "-o", "json", "--timeout", "10s", "-o", "plain"]),
        "1"
    );
}

#[test]
fn a_server_that_is_not_there_is_exit_code_1_and_says_what_to_do() {
    let began = std::time::Instant::now();
    let output = run(
        metcd().args(["get", "a", "--endpoints", "http://127.0.0.1:9", "--timeout", "5m"]),
        b"",
    );
    assert_eq!(output.code, 1);
    assert!(began.elapsed() < crate::support::SOON, "a refused connection is not waited for");
    assert!(
        output.stderr.contains("refused") && output.stderr.contains("--endpoints"),
        "{}",
        output.stderr
    );
    assert_eq!(output.stderr.lines().count(), 1);
}

#[test]
fn old_revisions_are_read_until_they_are_compacted() {
    let server = Server::start();
    server.ok(&["put", "a", "1"]);
    server.ok(&["put", "a", "2"]);
    assert_eq!(server.ok(&["get", "a", "--revision", "2"]), "1");
    assert_eq!(server.ok(&["compact", "3"]), "compacted to revision 3\n");
    // What was to go is gone: that is what was asked.
    for again in ["3", "2"] {
        assert_eq!(server.ok(&["compact", again]), "compacted to revision 3 already\n");
        assert_eq!(server.json(&["compact", again])["compacted_revision"], 3);
    }
    server.fails(1, &["compact", "99"]);
    assert!(server.fails(1, &["get", "a", "--revision", "2"]).contains("(compacted)"));
    assert!(server.fails(1, &["get", "a", "--revision", "99"]).contains("(future_revision)"));
    let hash = server.json(&["hash"]);
    assert_eq!((&hash["revision"], hash["hash"].as_str().unwrap().len()), (&json!(3), 32));
}

#[test]
fn ls_pages_counts_turns_round_and_shows_values() {
    let server = Server::start();
    let lines: String = (0..1_500)
        .map(|n| format!("{{\"key\":\"k/{n:04}\",\"value\":\"v{n}\"}}\n"))
        .chain(["{\"end\":true}\n".to_owned()])
        .collect();
    assert_eq!(
        server.metcd_with(&["import", "-o", "json"], lines.as_bytes()).text(),
        "{\"imported\":1500}\n"
    );
    assert_eq!(server.ok(&["ls"]).lines().count(), 1_500, "more than one page");
    assert_eq!(server.ok(&["ls", "k/001"]).lines().count(), 10);
    assert_eq!(server.ok(&["ls", "--count"]), "1500\n");
    assert_eq!(server.ok(&["ls", "--desc", "--limit", "2"]), "k/1499\nk/1498\n");
    assert_eq!(server.ok(&["ls", "k/0007", "--values"]), "k/0007\tv7\n");
    assert_eq!(server.json(&["ls", "k/0007"])["kvs"][0].get("value"), None);
    assert_eq!(server.json(&["ls", "k/0007", "--values"])["kvs"][0]["value"], "v7");
    assert_eq!(server.ok(&["ls", "nothing"]), "");
    let table = server.ok(&["ls", "k/0007", "--output", "table"]);
    assert!(
        table.starts_with("KEY ") && table.contains("k/0007") && !table.contains('\x1b'),
        "{table}"
    );
    assert_eq!(server.ok(&["del", "--prefix", "k/1"]), "deleted 500, revision 17\n");
    assert_eq!(server.ok(&["ls", "--count"]), "1000\n");
}

#[test]
fn a_ttl_ends_a_key_and_prev_tells_what_was() {
    let server = Server::start();
    server.ok(&["put", "session", "alice", "--ttl", "1s"]);
    assert!(server.json(&["get", "session"])["lease"].is_string());
    assert_eq!(server.ok(&["put", "session", "bob", "--ttl", "1s", "--prev"]), "alice");
    let waited = server.fails(3, &["get", "session", "--wait", "20s"]);
    assert_eq!(waited, "metcd: there is no such key: session\n");
}

#[test]
fn json_has_its_fields_in_one_order() {
    let server = Server::start();
    server.ok(&["put", "a", "1"]);
    server.ok(&["put", "b", "2", "--ttl", "10m"]);
    server.ok(&["del", "a"]);
    server.ok(&["put", "a", "1"]);
    let order = r#"{"revision":5,"count":2,"kvs":[{"key":"a","create_revision":5,"mod_revision":5,"version":1},{"key":"b","create_revision":3,"mod_revision":3,"version":1,"lease":"#;
    let listed = server.ok(&["ls", "-o", "json"]);
    assert!(listed.starts_with(order), "{listed}");
}

#[test]
fn a_table_is_asked_for_and_had() {
    let server = Server::start();
    let table = |args: &[&str]| {
        let text = server.ok(&[args, &["-o", "table"]].concat());
        let rows = text
            .lines()
            .map(|line| line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()));
        rows.map(|row| row.map(str::to_owned).collect::<Vec<_>>()).collect::<Vec<_>>()
    };
    let head = ["REVISION", "CREATED", "REVISION BEFORE", "VALUE BEFORE"];
    assert_eq!(table(&["put", "a", "1", "--prev"]), [head, ["2", "true", "-", "-"]]);
    assert_eq!(table(&["put", "a", "2", "--prev"]), [head, ["3", "false", "2", "1"]]);
    server.ok(&["del", "a"]);
    let watched = ["watch", "--prefix", "", "--from-revision", "2", "--count", "3"];
    assert_eq!(
        table(&watched),
        [
            ["REVISION", "EVENT", "KEY", "VALUE"],
            ["2", "put", "a", "1"],
            ["3", "put", "a", "2"],
            ["4", "delete", "a", "-"]
        ]
    );
    let with_prev = table(&[&watched[..], &["--prev"]].concat());
    assert_eq!(
        (with_prev[0][4].as_str(), with_prev[2][4].as_str()),
        ("BEFORE", "1"),
        "{with_prev:?}"
    );
}

#[test]
fn a_transaction_takes_one_branch_and_says_which() {
    let server = Server::start();
    let txn = br#"{"compare":[{"key":"a","target":"version","op":"=","value":0}],
                   "then":[{"put":{"key":"a","value":"1"}}],"else":[{"get":{"key":"a"}}]}"#;
    let first = server.metcd_with(&["txn", "-o", "json"], txn);
    assert_eq!(
        (first.code, first.text().contains("\"succeeded\":true")),
        (0, true),
        "{}",
        first.stderr
    );
    let second = server.metcd_with(&["txn", "-o", "json"], txn);
    assert_eq!((second.code, second.text().contains("\"succeeded\":false")), (3, true));
    server.ok(&["txn", r#"{"then":[{"put":{"key":"inline","value":"x"}}]}"#]);
    assert_eq!(server.ok(&["get", "inline"]), "x");
    let wrong = server.metcd_with(&["txn"], br#"{"then":[{"frob":{}}]}"#);
    assert_eq!(wrong.code, 1);
    assert!(wrong.stderr.contains("frob"), "{}", wrong.stderr);
}

#[test]
fn flags_may_stand_before_the_command_and_in_the_environment() {
    let server = Server::start();
    let done = run(metcd().args(["--endpoints", &server.url, "--output", "json", "put", "a", "b"]), b"");
    assert_eq!(done.text(), "{\"revision\":2,\"created\":true}\n", "{}", done.stderr);
    let done = run(
        metcd()
            .env("METCD_ENDPOINTS", format!("http://127.0.0.1:9, {}", server.url))
            .args(["get", "a", "--serializable"]),
        b"",
    );
    assert_eq!(done.text(), "b", "{}", done.stderr);
}

#[test]
fn a_watch_ends_in_peace_when_nobody_reads_it_any_more() {
    use std::io::BufRead as _;
    let server = Server::start();
    let mut watch = server.command();
    watch.args(["watch", "--prefix", "x/"]).stdout(std::process::Stdio::piped());
    let mut watch = Running(watch.spawn().unwrap());
    let mut reader = std::io::BufReader::new(watch.0.stdout.take().unwrap());
    let (line_tx, line_rx) = std::sync::mpsc::sync_channel(1);
    std::thread::spawn(move || {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        drop(reader);
        // The other side may have given up.
        let _ = line_tx.send(line);
    });
    // The watch begins when it does: put until it has seen one.
    until("the first line is read", || {
        server.ok(&["put", "x/1", "1"]);
        line_rx.try_recv().is_ok()
    });
    until("the watch has ended", || {
        server.ok(&["put", "x/2", "2"]);
        watch.0.try_wait().unwrap().is_some_and(|status| status.success())
    });
}
