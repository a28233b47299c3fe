//! bench, export, import, completions.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{Server, free_port, metcd, run, until};

fn report(server: &Server, args: &[&str]) -> Value {
    server.json(&[&["bench"], args].concat())
}

#[test]
fn every_bench_measures_something() {
    let server = Server::start();
    let few = ["--keys", "100", "--connections", "4", "--duration", "300ms", "--warm-up", "100ms"];
    let put = report(&server, &[&["put"][..], &few].concat());
    assert!(put["requests"].as_u64().unwrap() > 0 && put["failed"] == 0, "{put}");
    let latency = &put["latency_us"]["put"];
    assert!(
        latency["p50"].as_u64() <= latency["p99.99"].as_u64() && latency["p50"].as_u64() > Some(0),
        "{put}"
    );
    let get = report(&server, &[&["get", "--distribution", "zipf", "--serializable"][..], &few].concat());
    assert_eq!(
        (&get["statuses"]["404"], get["statuses"]["200"].as_u64() > Some(0)),
        (&Value::Null, true),
        "filled first: {get}"
    );
    let mixed = report(&server, &[&["mixed", "--reads", "50", "--threads", "2"][..], &few].concat());
    assert!(
        mixed["latency_us"]["put"]["count"].as_u64() > Some(0) && mixed["latency_us"]["get"]["count"].as_u64() > Some(0),
        "{mixed}"
    );
    let watch = report(&server, &["watch", "--watchers", "3", "--rate", "50", "--duration", "300ms"]);
    assert_eq!(
        watch["latency_us"]["watch"]["count"].as_u64().unwrap(),
        3 * watch["latency_us"]["put"]["count"].as_u64().unwrap(),
        "{watch}"
    );
}

#[test]
fn a_bench_keeps_its_rate_and_its_number_of_requests() {
    let server = Server::start();
    let rated = report(
        &server,
        &[
            "put",
            "--rate",
            "100",
            "--duration",
            "1s",
            "--warm-up",
            "100ms",
            "--connections",
            "4",
        ],
    );
    assert_eq!(
        rated["requests"], 100,
        "as many as are due in a second, however long they take: {rated}"
    );
    let counted = report(&server, &["put", "-n", "50", "--connections", "4", "--warm-up", "10ms"]);
    assert_eq!(counted["requests"], 50, "{counted}");
    let text = server.ok(&["bench", "put", "-n", "50", "--warm-up", "10ms"]);
    assert!(text.contains("p99.99") && text.contains('█') && !text.contains('\x1b'), "{text}");
}

#[test]
fn a_bench_without_a_server_fails() {
    let done = run(
        metcd().args([
            "bench",
            "put",
            "--endpoints",
            "http://127.0.0.1:9",
            "--duration",
            "100ms",
            "--warm-up",
            "10ms",
        ]),
        b"",
    );
    assert_eq!((done.code, done.stderr.contains("refused")), (1, true), "{}", done.stderr);
    for args in [
        &["--theta", "1"][..],
        &["--theta=-0.1"],
        &["--rate", "0"],
        &["--key-size", "3"],
        &["--prefix", "a b"],
    ] {
        assert_eq!(run(metcd().args(["bench", "put"]).args(args), b"").code, 2, "{args:?}");
    }
}

#[test]
fn a_zipf_without_inequality_is_uniform() {
    let server = Server::start();
    let load = [
        "put",
        "--distribution",
        "zipf",
        "--theta",
        "0",
        "-n",
        "400",
        "--keys",
        "20",
        "--warm-up",
        "0s",
    ];
    assert_eq!(report(&server, &load)["requests"], 400);
    let written = server.json(&["ls", "bench-"])["kvs"].as_array().unwrap().clone();
    assert_eq!(written.len(), 20, "each key has its share");
    assert!(
        written.iter().all(|kv| (4..60).contains(&kv["version"].as_u64().unwrap())),
        "{written:?}"
    );
}

/// A server that accepts and says nothing.
fn silent() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    (listener, url)
}

#[test]
fn what_is_tried_for_so_long_is_given_up_then() {
    let (_listener, url) = silent();
    for (args, less_than) in [
        // Twice the time if one question came after the other.
        (&["status", "--timeout", "6s"][..], 11),
        (&["bench", "put", "-d", "500ms", "-n", "5", "--warm-up", "0s", "--timeout", "1s"], 9),
        (&["bench", "get", "--keys", "20", "--timeout", "1s"], 9),
        (&["bench", "watch", "--timeout", "6s"], 11),
    ] {
        let start = Instant::now();
        let done = run(metcd().args(args).args(["--endpoints", &url]), b"");
        assert_eq!((done.code, done.stderr.lines().count()), (1, 1), "{}", done.stderr);
        let took = start.elapsed();
        assert!(took < Duration::from_secs(less_than), "{args:?}: {took:?}");
    }
}

#[test]
fn a_dash_is_standard_output() {
    let server = Server::start();
    server.ok(&["put", "a", "1"]);
    let dir = tempfile::tempdir().unwrap();
    let mut export = server.command();
    let done = run(export.args(["export", "--file", "-"]).current_dir(dir.path()), b"");
    assert_eq!((done.code, done.text()), (0, server.ok(&["export"])), "{}", done.stderr);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn what_is_exported_can_be_imported() {
    let (one, two) = (Server::start(), Server::start());
    let every_byte: Vec<u8> = (0..=255).collect();
    one.metcd_with(&["put", "bytes", "-"], &every_byte);
    one.ok(&["put", "a", "old"]);
    let then = one.ok(&["export"]);
    one.ok(&["put", "a", "new", "--ttl", "1m"]);
    assert_eq!(one.ok(&["export", "--revision", "3"]), then);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("all.jsonl");
    let file = file.to_str().unwrap();
    assert_eq!(one.ok(&["export", "--file", file]), "exported 2 keys\n");
    let import = two.metcd(&["import", file]);
    assert_eq!((import.code, import.text().as_str()), (0, "imported 2 keys\n"));
    assert!(import.stderr.contains("keys that had one: 1"), "{}", import.stderr);
    assert_eq!(two.ok(&["get", "a"]), "new");
    assert_eq!(two.metcd(&["get", "bytes"]).stdout, every_byte);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no partial file is left");
    assert_eq!(one.ok(&["export", "b"]).lines().count(), 2);
}

#[test]
fn a_large_import_takes_a_key_for_a_hundred_lines() {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = format!("--data-dir={}", dir.path().join("d").display());
    // Every transaction of the import carries an Idempotency-Key: 200 of them for 20,000 lines, and nothing to spare.
    let settings = [&data_dir, "--set=idempotency.max_entries=200", "--set=wal.sync=false"];
    let server = Server::with(free_port(), free_port(), &settings);
    server.ready();
    let lines: String = (0..20_000).map(|n| format!("{{\"key\":\"k{n}\",\"value\":\"{n}\"}}\n")).collect();
    let file = dir.path().join("all.jsonl");
    std::fs::write(&file, format!("{lines}{{\"end\":true,\"count\":20000}}\n")).unwrap();
    assert_eq!(server.ok(&["import", file.to_str().unwrap()]), "imported 20000 keys\n");
    let list = server.json(&["ls", "--count"]);
    assert_eq!((&list["count"], &list["revision"]), (&20_000.into(), &201.into()));
    // The table is full now, which a load without keys does not mind.
    assert!(server.fails(1, &["put", "a", "b", "--timeout", "1s"]).contains("idempotency"));
    let load = report(&server, &["put", "-n", "300", "--warm-up", "0s"]);
    assert_eq!((&load["requests"], &load["failed"]), (&300.into(), &0.into()), "{load}");
}

#[test]
fn a_damaged_import_names_the_line() {
    let server = Server::start();
    let good = "{\"key\":\"a\",\"value\":\"1\"}\n";
    for (input, why) in [
        (format!("{good}{{\"key\":\n"), "line 2: not JSON"),
        (format!("{good}{{\"key\":\"b\"}}\n"), "line 2: there is no value"),
        (format!("{good}{{\"value\":\"b\"}}\n"), "line 2: missing field `key`"),
        (format!("{good}{{\"end\":true,\"count\":2}}\n"), "line 2: there should be 2 keys"),
        (format!("{{\"end\":true,\"count\":0}}\n{good}"), "line 2: something follows"),
    ] {
        let done = server.metcd_with(&["import"], input.as_bytes());
        assert_eq!((done.code, done.stderr.contains(why)), (1, true), "{}", done.stderr);
    }
    let cut = server.metcd_with(&["import"], good.as_bytes());
    assert_eq!((cut.code, cut.stdout.as_slice()), (1, &b""[..]));
    for part in ["cut off", "the 1 keys in it were imported", "{\"end\":true}"] {
        assert!(cut.stderr.contains(part), "{part}: {}", cut.stderr);
    }
    assert_eq!(server.ok(&["get", "a"]), "1", "what is there is imported");
    let twice = format!("{good}{}{{\"end\":true}}\n", good.replace('1', "2"));
    assert_eq!(server.metcd_with(&["import"], twice.as_bytes()).code, 0);
    assert_eq!(server.ok(&["get", "a"]), "2", "the later line wins");
    for no_file in ["/nonexistent", "/proc"] {
        let done = server.metcd(&["import", no_file]);
        assert!(
            done.code == 1 && done.stderr.contains(no_file) && done.stderr.contains("name a file"),
            "{}",
            done.stderr
        );
    }
}

#[test]
fn what_is_too_large_to_import_is_named_with_its_line() {
    let server = Server::start();
    let line = |key: &str, value: &str| format!("{{\"key\":\"{key}\",\"value\":\"{value}\"}}\n");
    for (bytes, code) in [(1_500_000, "value_too_large"), (9_500_000, "request_too_large")] {
        let input = [line("small", "1"), line("big", &"x".repeat(bytes)), line("after", "1")].concat();
        let done = server.metcd_with(&["import"], input.as_bytes());
        let wanted = format!("line 2, key big, a value of {bytes} bytes: ");
        assert!(
            done.code == 1 && done.stderr.contains(&wanted) && done.stderr.contains(code),
            "{}",
            done.stderr
        );
    }
    let done = server.metcd_with(&["import"], line(&"k".repeat(5000), "1").as_bytes());
    assert!(done.code == 1 && done.stderr.contains("line 1, key kkk"), "{}", done.stderr);
    let done = server.metcd_with(&["import"], line("", "1").as_bytes());
    assert!(
        done.code == 1 && done.stderr.contains("line 1: the key is empty"),
        "{}",
        done.stderr
    );
}

/// Starts a load, interrupts it, and returns how it ended.
fn interrupted(server: &Server, args: &[&str]) -> (Option<i32>, String, String) {
    let mut load = server.command();
    load.arg("bench").args(args).args(["--duration", "10m"]);
    let load = load.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let revision = || server.json(&["ls", "--count"])["revision"].as_u64().unwrap();
    let before = revision();
    until("the load is under way", || revision() > before + 20);
    let sent = Command::new("kill").args(["-INT", &load.id().to_string()]).status().unwrap();
    assert!(sent.success());
    let Output { status, stdout, stderr } = load.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code(), text(stdout), text(stderr))
}

#[test]
fn an_interrupted_bench_reports_what_it_has_measured() {
    let server = Server::start();
    for args in [
        &["put", "--warm-up", "0s", "--threads", "2", "-o", "json"][..],
        &["watch", "--watchers", "2", "-o", "json"],
    ] {
        let (code, stdout, stderr) = interrupted(&server, args);
        let report: Value = serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{error}: {stdout}{stderr}"));
        assert_eq!((code, stderr.lines().count()), (Some(130), 1), "{stderr}");
        assert!(stderr.contains("interrupted"), "{stderr}");
        assert!(report["latency_us"]["put"]["count"].as_u64() > Some(0), "{report}");
        assert_eq!(report["interrupted"], true);
        assert!(report["seconds"].as_f64() < Some(300.0), "{report}");
    }
}

#[test]
fn a_bench_has_a_table() {
    let server = Server::start();
    let few = ["--duration", "300ms", "-o", "table"];
    let watch = server.ok(&[&["bench", "watch", "--watchers", "2"][..], &few].concat());
    let first: Vec<&str> = watch.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(first[..3], ["KIND", "put", "watch"], "{watch}");
    assert!(watch.contains("P99.99") && !watch.contains('█'), "{watch}");
    let nobody = run(
        metcd()
            .args(["bench", "put", "--endpoints", "http://127.0.0.1:9", "--warm-up", "0s"])
            .args(few),
        b"",
    );
    assert!(nobody.code == 1 && nobody.text().contains("TROUBLE"), "{}", nobody.text());
}

#[test]
fn completions_know_the_client_commands() {
    for shell in ["bash", "zsh", "fish"] {
        let script = run(metcd().args(["completions", shell]), b"").text();
        for word in ["watch", "elect", "if-absent", "endpoints", "bench", "transfer"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
    }
}

/// The candidates that bash would offer for the last of these words, by a script that it sources.
fn offered_by_bash(script: &[u8], words: &str) -> Vec<String> {
    let ask = format!(
        "source /dev/stdin && complete -p metcd && COMP_WORDS=({words}) COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)) && \
         _metcd metcd \"${{COMP_WORDS[COMP_CWORD]}}\" \"${{COMP_WORDS[COMP_CWORD - 1]}}\" && printf '%s\\n' \"${{COMPREPLY[@]}}\""
    );
    let done = run(Command::new("bash").args(["--norc", "--noprofile", "-c", &ask]), script);
    assert_eq!((done.code, done.stderr.as_str()), (0, ""), "{ask}: {}", done.text());
    let text = done.text();
    let mut lines = text.lines().map(str::to_owned);
    let registered = lines.next().unwrap_or_default();
    assert!(
        registered.starts_with("complete ") && registered.ends_with(" metcd"),
        "{registered}"
    );
    lines.collect()
}

/// Whether this shell is here; said loudly if it is not.
fn is_installed(shell: &str) -> bool {
    let started = Command::new(shell).args(["-c", "true"]).status();
    let is_there = started.is_ok_and(|status| status.success());
    if !is_there {
        // Written past the harness, which shows nothing of a test that passes.
        let _ = writeln!(
            std::io::stderr(),
            "!!! NOT TESTED: the completions of {shell}. There is no {shell} here"
        );
    }
    is_there
}

#[test]
fn the_shells_take_their_completions() {
    let script = |shell: &str| run(metcd().args(["completions", shell]), b"").stdout;
    if is_installed("bash") {
        let bash = script("bash");
        assert_eq!(offered_by_bash(&bash, "metcd le"), ["lease", "leader"]);
        assert_eq!(offered_by_bash(&bash, "metcd lease k"), ["keepalive"]);
        assert_eq!(offered_by_bash(&bash, "metcd put --if-a"), ["--if-absent"]);
        for (words, values) in [
            ("metcd serve --store \"\"", &["memory", "sled", "rocksdb"][..]),
            ("metcd serve --wal r", &["raft-engine", "rocksdb"]),
            ("metcd config show --store s", &["sled"]),
            ("metcd watch --only \"\"", &["put", "delete"]),
            ("metcd ls --output t", &["table"]),
            ("metcd bench put --distribution \"\"", &["uniform", "zipf"]),
        ] {
            assert_eq!(offered_by_bash(&bash, words), values, "{words}");
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let file = |shell: &str| {
        let file = dir.path().join(shell);
        std::fs::write(&file, script(shell)).unwrap();
        file
    };
    if is_installed("fish") {
        let fish = file("fish");
        assert_eq!(offered_by_fish(&fish, "metcd lea"), ["leader", "lease"]);
        assert_eq!(offered_by_fish(&fish, "metcd lease k"), ["keepalive"]);
        assert_eq!(offered_by_fish(&fish, "metcd put --if-a"), ["--if-absent"]);
    }
    if is_installed("zsh") {
        let asked = ["metcd leas", "metcd lease k", "metcd put --if-a"];
        let completed = ["metcd lease ", "metcd lease keepalive ", "metcd put --if-absent "];
        assert_eq!(completed_by_zsh(&file("zsh"), &asked), completed);
    }
}

/// The candidates of fish, without their descriptions.
fn offered_by_fish(script: &Path, line: &str) -> Vec<String> {
    let ask = format!("source {} && complete --do-complete '{line}'", script.display());
    let done = run(Command::new("fish").args(["--no-config", "-c", &ask]), b"");
    assert_eq!((done.code, done.stderr.as_str()), (0, ""), "{line}");
    let text = done.text();
    let mut offered: Vec<_> = text.lines().filter_map(|line| line.split('\t').next()).map(str::to_owned).collect();
    offered.sort();
    offered
}

/// What the Tab key makes of these lines in a zsh behind a pseudo-terminal. A key that is bound for it tells what the line is then.
fn completed_by_zsh(script: &Path, lines: &[&str]) -> Vec<String> {
    const DRIVER: &str = r#"
        zmodload zsh/zpty || exit
        zpty shell zsh -f -i
        zpty -w shell "PS1=; autoload -U compinit; compinit -u -D; source $1 || exit"
        zpty -w shell 'tell() { print -r -- "line<$BUFFER>"; BUFFER=; }; zle -N tell; bindkey "^X" tell; print re""ady'
        zpty -r shell said '*ready*' || exit
        shift
        for line; do
            zpty -n -w shell "$line"$'\t\x18'
            zpty -r shell said '*line<*>*' || exit
            print -r -- "${${said##*line<}%%>*}"
        done
        zpty -d shell"#;
    let driver = ["30", "zsh", "-f", "-c", DRIVER, "driver"];
    let done = run(
        Command::new("timeout").args(driver).arg(script).args(lines).env("TERM", "xterm"),
        b"",
    );
    assert_eq!((done.code, done.stderr.as_str()), (0, ""), "{}", done.text());
    done.text().lines().map(str::to_owned).collect()
}

/// A request that a [`slow_server`] got: its first line, and the bytes of its body.
type Got = (String, usize);

/// Some server, of another kind: answers every request after `pause`, one after another on each connection.
fn slow_server(pause: Duration) -> (String, Arc<Mutex<Vec<Got>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let got = Arc::new(Mutex::new(Vec::new()));
    let seen = got.clone();
    std::thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            let seen = seen.clone();
            // It ends with the connection.
            std::thread::spawn(move || answer_slowly(BufReader::new(stream), pause, &seen));
        }
    });
    (url, got)
}

#[expect(clippy::disallowed_methods, reason = "the server has to be slow, on a thread of its own")]
fn answer_slowly(mut stream: BufReader<TcpStream>, pause: Duration, seen: &Mutex<Vec<Got>>) {
    loop {
        let (mut first, mut length) = (String::new(), 0);
        loop {
            let mut line = String::new();
            if stream.read_line(&mut line).unwrap_or(0) == 0 {
                return;
            }
            let line = line.trim_end();
            if let Some(bytes) = line.strip_prefix("content-length: ") {
                length = bytes.parse().unwrap();
            } else if line.is_empty() {
                break;
            } else if first.is_empty() {
                first = line.to_owned();
            }
        }
        let mut body = vec![0; length];
        stream.read_exact(&mut body).unwrap();
        seen.lock().unwrap().push((first, length));
        std::thread::sleep(pause);
        // The other side may have given up.
        let _ = stream.get_mut().write_all(b"HTTP/1.1 204 No Content\r\n\r\n");
    }
}

/// 100 requests are due within half a second, and one connection to this server takes two for them.
#[test]
fn a_rate_that_the_server_cannot_keep_is_in_the_latencies() {
    let (url, got) = slow_server(Duration::from_millis(20));
    let bench = [
        "bench",
        "put",
        "-o",
        "json",
        "-c",
        "1",
        "--rate",
        "200",
        "--duration",
        "500ms",
        "--warm-up",
        "0s",
    ];
    let done = run(metcd().args(bench).args(["--endpoints", &url]), b"");
    assert_eq!((done.code, done.stderr.as_str()), (0, ""));
    let report: Value = serde_json::from_str(&done.text()).unwrap();
    assert_eq!((&report["requests"], &report["failed"]), (&100.into(), &0.into()), "{report}");
    assert_eq!(got.lock().unwrap().len(), 100, "late or not, each was sent");
    let put = &report["latency_us"]["put"];
    // The fiftieth was due after 245 ms, and answered after 1 s at the earliest; the last but one after 490 ms, and 1.98 s.
    assert!(put["p50"].as_u64() >= Some(740_000), "{report}");
    assert!(put["p99"].as_u64() >= Some(1_450_000), "{report}");
    assert!(put["min"].as_u64() >= Some(19_900), "{report}");

    // Without a rate nothing waits: the same server is as slow as it is.
    let bench = ["bench", "put", "-o", "json", "-c", "1", "-n", "20", "--warm-up", "0s"];
    let done = run(metcd().args(bench).args(["--endpoints", &url]), b"");
    let report: Value = serde_json::from_str(&done.text()).unwrap();
    assert!(report["latency_us"]["put"]["p50"].as_u64() < Some(740_000), "{report}");
}

#[test]
fn a_bench_asks_any_server_below_a_path_with_keys_and_values_of_the_size_that_was_said() {
    let (url, got) = slow_server(Duration::ZERO);
    for below in ["/kv", "/kv/"] {
        let base = format!("{url}{below}");
        let mixed = [
            "bench",
            "mixed",
            "--reads",
            "50",
            "-n",
            "60",
            "-c",
            "2",
            "--warm-up",
            "0s",
            "--no-fill",
        ];
        let sizes = ["--key-size", "20", "--value-size", "321", "--keys", "50"];
        let done = run(metcd().args(mixed).args(sizes).args(["--endpoints", &base]), b"");
        assert_eq!((done.code, done.stderr.as_str()), (0, ""));
        let got = std::mem::take(&mut *got.lock().unwrap());
        let puts = got.iter().filter(|(first, _)| first.starts_with("PUT ")).count();
        assert!(got.len() == 60 && puts > 10 && puts < 50, "{puts} of {}", got.len());
        for (first, bytes) in got {
            let (method, rest) = first.split_once(' ').unwrap();
            let key = rest.strip_prefix("/kv/").and_then(|rest| rest.strip_suffix(" HTTP/1.1"));
            assert!(key.is_some_and(|key| key.starts_with("bench-") && key.len() == 20), "{first}");
            assert_eq!(bytes, if method == "PUT" { 321 } else { 0 }, "{first}");
        }
    }
}
