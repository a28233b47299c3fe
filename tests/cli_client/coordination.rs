//! watch, lease, lock, elect.

use std::io::{BufRead as _, BufReader};
use std::process::Stdio;

use metcd::client::watch::{Message, WatchOptions};
use metcd::client::{Client, Range};

use crate::support::{Running, SOON, Server, metcd, until};

/// A watch whose lines can be read one by one. It is open when this returns.
fn watch(server: &Server, args: &[&str]) -> (Running, impl FnMut() -> String + use<>) {
    let from = (server.json(&["ls", "--count"])["revision"].as_u64().unwrap() + 1).to_string();
    let mut child = server
        .command()
        .arg("watch")
        .args(["--from-revision", &from])
        .args(args)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    (Running(child), move || lines.next().unwrap().unwrap())
}

#[test]
fn a_watch_prints_every_change_in_order() {
    let server = Server::start();
    let (_one, mut one) = watch(&server, &["a"]);
    let (_all, mut all) = watch(&server, &["--prefix", "", "--prev", "-o", "json"]);
    server.ok(&["put", "a", "1"]);
    server.ok(&["put", "b", "2"]);
    server.ok(&["del", "a"]);
    assert_eq!(one(), "2\tput\ta\t1");
    assert_eq!(one(), "4\tdelete\ta");
    let changes: Vec<serde_json::Value> = (0..3).map(|_| serde_json::from_str(&all()).unwrap()).collect();
    assert_eq!(changes[1]["events"][0]["kv"]["key"], "b");
    assert_eq!(
        changes[2]["events"][0],
        serde_json::json!({"type": "delete", "kv": {"key": "a", "mod_revision": 4},
        "prev": {"key": "a", "value": "1", "create_revision": 2, "mod_revision": 2, "version": 1}})
    );
}

#[test]
fn a_watch_runs_a_command_for_each_change() {
    let server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let script = format!("echo \"$METCD_REVISION $METCD_EVENT $METCD_KEY $(cat)\" >> {}", out.display());
    server.ok(&["put", "a", "1"]);
    server.ok(&["del", "a"]);
    server.ok(&["watch", "a", "--from-revision", "2", "--count", "2", "--", "sh", "-c", &script]);
    assert_eq!(std::fs::read_to_string(out).unwrap(), "2 put a 1\n3 delete a \n");
    let failing = [
        "watch",
        "a",
        "--from-revision",
        "2",
        "--count",
        "2",
        "--",
        "sh",
        "-c",
        "test $METCD_EVENT = put",
    ];
    let done = server.metcd(&failing);
    assert_eq!((done.code, done.stderr.lines().count()), (1, 2), "{}", done.stderr);
    assert!(done.stderr.contains("the command failed for 1 of 2 changes"), "{}", done.stderr);
}

/// A command that the watch has started does not outlive it, though no Ctrl-C reaches its process group.
#[test]
fn a_watch_that_is_interrupted_stops_its_command() {
    let server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    server.ok(&["put", "a", "1"]);
    for (signal, number) in [("-INT", 2), ("-TERM", 15), ("-HUP", 1), ("-QUIT", 3)] {
        let script = format!(
            "cd {} && rm -f began stopped && trap 'touch stopped; exit' TERM && touch began && while :; do sleep 0.05; done",
            dir.path().display()
        );
        let mut watch = server.command();
        watch
            .args(["watch", "a", "--from-revision", "2", "--", "sh", "-c", &script])
            .stdin(Stdio::null())
            .stderr(Stdio::null());
        let mut watch = Running(watch.spawn().unwrap());
        until("the command runs", || dir.path().join("began").exists());
        let pid = watch.0.id().to_string();
        assert!(std::process::Command::new("kill").args([signal, &pid]).status().unwrap().success());
        assert_eq!(watch.0.wait().unwrap().code(), Some(128 + number), "as a shell tells it");
        assert!(dir.path().join("stopped").exists(), "it was told politely");
        std::fs::remove_file(dir.path().join("began")).unwrap();
    }
}

#[test]
fn a_watch_goes_on_after_the_server_was_away_and_ends_at_compacted_history() {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("data").to_str().unwrap().to_owned();
    let (client, peer) = (crate::support::free_port(), crate::support::free_port());
    let mut server = Server::with(client, peer, &["--data-dir", &data_dir]);
    server.ready();
    let (_watch, mut line) = watch(&server, &["a"]);
    server.ok(&["put", "a", "1"]);
    assert_eq!(line(), "2\tput\ta\t1");
    server.kill();
    let server = Server::with(client, peer, &["--data-dir", &data_dir]);
    server.ready();
    server.ok(&["put", "a", "2"]);
    assert_eq!(line(), "3\tput\ta\t2", "nothing lost, nothing twice");
    server.ok(&["compact", "3"]);
    assert!(server.fails(1, &["watch", "a", "--from-revision", "1"]).contains("(compacted)"));
}

#[test]
fn leases_are_granted_shown_kept_and_revoked() {
    let server = Server::start();
    let id = server.ok(&["lease", "grant", "30s"]).trim().to_owned();
    server.ok(&["put", "a", "1", "--lease", &id]);
    assert_eq!(server.json(&["lease", "show", &id])["keys"], serde_json::json!(["a"]));
    assert_eq!(server.json(&["lease", "keepalive", &id])["ttl"], 30.0);
    assert_eq!(server.ok(&["lease", "list"]), format!("{id}\n"));
    server.ok(&["lease", "revoke", &id]);
    server.fails(3, &["get", "a"]);
    for verb in ["show", "keepalive", "revoke"] {
        assert!(server.fails(3, &["lease", verb, &id]).contains("no lease"), "{verb}");
    }
    assert!(server.fails(3, &["put", "a", "1", "--lease", "999"]).contains("no lease"));
    server.fails(1, &["lease", "show", "x"]);
}

#[test]
fn a_lock_runs_one_command_at_a_time_with_growing_tokens_and_passes_exit_codes_on() {
    let server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    let script = format!(
        "cd {} && mkdir held && echo $METCD_FENCING_TOKEN >> tokens && sleep 0.1 && rmdir held",
        dir.path().display()
    );
    let mut children: Vec<Running> = (0..4)
        .map(|_| Running(server.command().args(["lock", "l", "--", "sh", "-c", &script]).spawn().unwrap()))
        .collect();
    for child in &mut children {
        assert!(
            child.0.wait().unwrap().success(),
            "two commands at a time would have met in `mkdir held`"
        );
    }
    let tokens = std::fs::read_to_string(dir.path().join("tokens")).unwrap();
    let tokens: Vec<u64> = tokens.lines().map(|token| token.parse().unwrap()).collect();
    assert!(tokens.len() == 4 && tokens.is_sorted_by(|a, b| a < b), "{tokens:?}");
    assert!(server.fails(7, &["lock", "l", "--", "sh", "-c", "exit 7"]).contains("exit code 7"));
    server.fails(1, &["lock", "l", "--", "/nonexistent"]);
    assert_eq!(server.ok(&["ls", "lock/", "--count"]), "0\n", "every lease was revoked");
}

/// The command decides how it ends, and what comes of that.
#[test]
fn a_signal_is_passed_on_to_the_command_and_its_exit_code_back() {
    let server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    let began = dir.path().join("began");
    let cases = [
        ("-TERM", "trap 'exit 5' TERM", 5),
        ("-INT", "trap 'exit 6' INT; trap 'exit 9' TERM", 6),
        ("-HUP", "trap 'exit 7' HUP; trap 'exit 9' TERM", 7),
        ("-TERM", "trap 'exit 0' TERM", 0),
        ("-TERM", "true", 128 + 15),
        ("-HUP", "trap 'exit 9' TERM", 128 + 1),
        ("-HUP", "trap 'echo read anew' HUP; trap 'exit 8' TERM", 8),
    ];
    for hold in [&["lock", "l"][..], &["elect", "l", "me"]] {
        for (signal, trap, code) in cases {
            let script = format!("{trap}; touch {}; while :; do sleep 0.05; done", began.display());
            let mut holder = server.command();
            holder.args(hold).args(["--ttl", "1h", "--", "sh", "-c", &script]);
            holder.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
            let mut holder = Running(holder.spawn().unwrap());
            until("the command runs", || began.exists());
            let pid = holder.0.id().to_string();
            assert!(std::process::Command::new("kill").args([signal, &pid]).status().unwrap().success());
            assert_eq!(holder.0.wait().unwrap().code(), Some(code), "{hold:?} {signal} {trap}");
            let stderr = std::io::read_to_string(holder.0.stderr.take().unwrap()).unwrap();
            let said = stderr.lines().filter(|line| line.starts_with("metcd: ")).count();
            assert_eq!(said, usize::from(code != 0), "{stderr}");
            assert_eq!(server.ok(&["lease", "list"]), "", "it holds nothing any more");
            std::fs::remove_file(&began).unwrap();
        }
    }
}

#[test]
fn a_lock_that_is_held_is_exit_code_3_and_is_free_when_its_holder_is_told_to_stop() {
    let server = Server::start();
    for signal in ["-TERM", "-HUP"] {
        let mut holder = Running(server.command().args(["lock", "l"]).stdout(Stdio::null()).spawn().unwrap());
        until("the lock is held", || server.ok(&["ls", "lock/", "--count"]) == "1\n");
        assert!(
            server
                .fails(3, &["lock", "l", "--wait", "300ms", "--", "true"])
                .contains("somebody else")
        );
        assert_eq!(server.ok(&["ls", "lock/", "--count"]), "1\n", "whoever gave up left the queue");
        let pid = holder.0.id().to_string();
        assert!(std::process::Command::new("kill").args([signal, &pid]).status().unwrap().success());
        assert!(holder.0.wait().unwrap().success());
        server.ok(&["lock", "l", "--wait", "10s", "--", "true"]);
    }
}

/// Runs a command while something is held, takes that away, and sees the command stopped. The file `began` has the command's environment.
fn stopped_when_it_is_taken_away(hold: &[&str], take: impl FnOnce(&mut Server, &str)) -> String {
    let mut server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    let script = format!(
        "cd {} && trap 'touch stopped; exit' TERM && env > new && mv new began && while :; do sleep 0.05; done",
        dir.path().display()
    );
    let mut holder = server.command();
    holder
        .args(hold)
        .args(["--", "sh", "-c", &script])
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    let mut holder = Running(holder.spawn().unwrap());
    let began = dir.path().join("began");
    until("the command runs", || began.exists());
    take(&mut server, &std::fs::read_to_string(began).unwrap());
    until("the command is stopped", || holder.0.try_wait().unwrap().is_some());
    let stderr = std::io::read_to_string(holder.0.stderr.take().unwrap()).unwrap();
    assert_eq!(holder.0.wait().unwrap().code(), Some(1), "{stderr}");
    assert!(dir.path().join("stopped").exists(), "it was told politely");
    // The shell says "Terminated" of what it ran.
    assert_eq!(stderr.lines().filter(|line| line.starts_with("metcd: ")).count(), 1, "{stderr}");
    stderr
}

#[test]
fn what_the_command_started_is_stopped_with_it() {
    let server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    let started = dir.path().join("started");
    let script = format!("sleep 600 & echo $! > {0}.new; mv {0}.new {0}; wait", started.display());
    let mut holder = server.command();
    holder
        .args(["lock", "l", "--", "sh", "-c", &script])
        .stdin(Stdio::null())
        .stderr(Stdio::piped());
    let holder = holder.spawn().unwrap();
    until("the command runs", || started.exists());
    let pid = std::fs::read_to_string(&started).unwrap();
    let lease = server.ok(&["lease", "list"]).trim().to_owned();
    server.ok(&["lease", "revoke", &lease]);
    assert_eq!(holder.wait_with_output().unwrap().status.code(), Some(1));
    // A zombie until whoever adopted it looks: it runs no more.
    let state = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
    assert!(state.is_empty() || state.contains(") Z "), "{state}");
}

/// What an environment, as `env` prints it, says.
fn variable<'a>(environment: &'a str, name: &str) -> &'a str {
    let of_name = |line: &'a str| line.strip_prefix(name)?.strip_prefix('=');
    environment
        .lines()
        .find_map(of_name)
        .unwrap_or_else(|| panic!("no {name}: {environment}"))
}

const LOCK: &[&str] = &["lock", "l", "--ttl", "1s"];

#[test]
fn a_command_is_stopped_when_its_lease_is_lost() {
    let stderr = stopped_when_it_is_taken_away(LOCK, |server, _| {
        let lease = server.ok(&["lease", "list"]).trim().to_owned();
        server.ok(&["lease", "revoke", &lease]);
    });
    assert!(stderr.contains("lease is lost"), "{stderr}");
}

#[test]
fn a_command_is_stopped_when_its_key_is_deleted_and_not_when_it_is_written() {
    let stderr = stopped_when_it_is_taken_away(LOCK, |server, _| {
        let key = server.ok(&["ls", "lock/"]).trim().to_owned();
        server.ok(&["put", &key, "a note"]);
        server.ok(&["del", &key]);
    });
    assert!(stderr.contains("deleted the key lock/l/"), "{stderr}");
}

/// Nobody says that the lease is lost: whoever holds it has to count its time.
#[test]
fn a_command_is_stopped_when_the_server_is_killed_and_its_lease_cannot_be_kept() {
    let stderr = stopped_when_it_is_taken_away(&["lock", "l", "--ttl", "2s"], |server, _| server.kill());
    assert!(stderr.contains("lease is lost"), "{stderr}");
}

#[test]
fn a_leaders_command_knows_token_key_and_lease_and_is_stopped_when_the_lease_is_revoked() {
    let stderr = stopped_when_it_is_taken_away(&["elect", "e", "one"], |server, environment| {
        let key = variable(environment, "METCD_LOCK_KEY");
        let lease = variable(environment, "METCD_LEASE_ID");
        assert_eq!(key, format!("elect/e/{lease}"));
        assert_eq!(server.ok(&["lease", "list"]), format!("{lease}\n"));
        let kv = server.json(&["get", key]);
        assert_eq!((&kv["value"], &kv["lease"]), (&"one".into(), &lease.into()));
        assert_eq!(kv["create_revision"].to_string(), variable(environment, "METCD_FENCING_TOKEN"));
        assert_eq!(server.ok(&["elect", "e"]), "one");
        server.ok(&["lease", "revoke", lease]);
    });
    assert!(stderr.contains("lease is lost"), "{stderr}");
}

#[test]
fn a_leaders_command_passes_its_exit_code_on_and_nobody_leads_after_it() {
    let server = Server::start();
    assert!(
        server
            .fails(7, &["elect", "e", "one", "--", "sh", "-c", "exit 7"])
            .contains("exit code 7")
    );
    assert!(server.fails(3, &["elect", "e"]).contains("nobody leads"));
    assert_eq!(server.ok(&["ls", "elect/", "--count"]), "0\n", "its lease was revoked");
}

/// The key whose change is the last one.
const END: &str = "end";

/// The library's watch: revision and keys of every change, the one of [`END`] the last. It is open when the receiver has heard so.
fn watch_in_the_library(endpoints: &str, opened: std::sync::mpsc::SyncSender<()>) -> std::thread::JoinHandle<Vec<(u64, Vec<String>)>> {
    let endpoints: Vec<String> = endpoints.split(',').map(str::to_owned).collect();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let client = Client::new(&endpoints).unwrap().with_timeout(SOON);
            let mut watch = client.watch(WatchOptions::range(Range::Prefix(Vec::new()))).await.unwrap();
            let mut changes = Vec::new();
            loop {
                let (revision, events) = match tokio::time::timeout(SOON * 2, watch.next()).await.expect("a message").unwrap() {
                    Message::Open { .. } => {
                        opened.send(()).unwrap();
                        continue;
                    }
                    Message::Change { revision, events } => (revision, events),
                    Message::Progress { .. } | Message::Interrupted { .. } => continue,
                };
                let keys = events.into_iter().map(|event| String::from_utf8(event.kv.key).unwrap());
                let keys: Vec<String> = keys.collect();
                let is_end = keys.iter().any(|key| key == END);
                changes.push((revision, keys));
                if is_end {
                    return changes;
                }
            }
        })
    })
}

#[test]
fn watches_whose_member_is_killed_go_on_at_another_one_without_gap_or_repetition() {
    let (mut servers, _dir) = Server::cluster(3);
    let endpoints = servers.iter().map(|server| server.url.clone()).collect::<Vec<_>>().join(",");
    let watchers_of = |url: &str| {
        let status = servers[1].json(&["status"]);
        let mut members = status["members"].as_array().unwrap().iter();
        // A member that has just started tells the others where it is reached a little later.
        let member = members.find(|member| member["endpoint"] == url);
        member.and_then(|member| member["status"]["watchers"].as_u64()).unwrap_or(0)
    };
    let first = servers[1].json(&["ls", "--count"])["revision"].as_u64().unwrap() + 1;
    let (opened_tx, opened) = std::sync::mpsc::sync_channel(1);
    let library = watch_in_the_library(&endpoints, opened_tx);
    opened.recv_timeout(SOON).unwrap();
    let mut child = metcd()
        .args([
            "--endpoints",
            &endpoints,
            "watch",
            "--prefix",
            "",
            "--from-revision",
            &first.to_string(),
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let _child = Running(child);
    until("the first member serves both", || watchers_of(&servers[0].url) == 2);

    let put = |on: &Server, key: &str| {
        let revision = on.ok(&["put", key, "x", "--timeout", "20s"]);
        let revision = revision.trim().trim_start_matches("revision ").parse().unwrap();
        (revision, vec![key.to_owned()])
    };
    let mut written: Vec<(u64, Vec<String>)> = (0..10).map(|n| put(&servers[1], &format!("before{n}"))).collect();
    servers[0].kill();
    written.extend((0..10).map(|n| put(&servers[1], &format!("after{n}"))));
    written.push(put(&servers[1], END));

    assert_eq!(library.join().unwrap(), written);
    for (revision, keys) in &written {
        assert_eq!(lines.next().unwrap().unwrap(), format!("{revision}\tput\t{}\tx", keys[0]));
    }
}

#[test]
fn an_election_has_one_leader_that_others_can_ask_for() {
    let server = Server::start();
    assert!(server.fails(3, &["elect", "e"]).contains("nobody leads"));
    let leader = Running(
        server
            .command()
            .args(["elect", "e", "one", "--ttl", "1s"])
            .stdout(Stdio::null())
            .spawn()
            .unwrap(),
    );
    until("one leads", || server.metcd(&["elect", "e"]).stdout == b"one");
    let _second = Running(server.command().args(["elect", "e", "two"]).stdout(Stdio::null()).spawn().unwrap());
    until("two candidates", || server.ok(&["ls", "elect/", "--count"]) == "2\n");
    assert_eq!(server.ok(&["elect", "e"]), "one");
    // It cannot say goodbye: its lease has to end.
    drop(leader);
    until("two leads", || server.metcd(&["elect", "e"]).stdout == b"two");
}
