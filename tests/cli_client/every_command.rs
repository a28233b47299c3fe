//! Every command that `metcd --help` lists: once as it should go and once as it should not, by a cluster's follower.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::support::{Done, Running, Server, free_port, metcd, run, until};

/// Nobody listens there.
const NOWHERE: &str = "http://127.0.0.1:9";
/// No revision is as high.
const FUTURE: &str = "999999999";

/// A cluster of three whose follower is asked. What one command leaves behind another one may need: they come in the order of the table.
struct Stage {
    founders: Vec<Server>,
    /// Members that came later.
    joined: Vec<Server>,
    /// The id of the member that is asked.
    follower: u64,
    /// The revision of `stage/a`. History is compacted at the one before, so that it can be watched from here on.
    revision: u64,
    dir: tempfile::TempDir,
    _data: tempfile::TempDir,
}

impl Stage {
    fn new() -> Stage {
        let (founders, data) = Server::cluster(3);
        let leader: u64 = founders[0].ok(&["leader", "show", "--timeout", "20s"]).trim().parse().unwrap();
        let mut stage = Stage {
            founders,
            joined: Vec::new(),
            follower: leader % 3 + 1,
            revision: 0,
            dir: tempfile::tempdir().unwrap(),
            _data: data,
        };
        for value in ["1", "2", "3"] {
            let put = stage.ok(&["put", "stage/a", value]);
            stage.revision = put.trim().trim_start_matches("revision ").parse().unwrap();
        }
        stage.ok(&["compact", &(stage.revision - 1).to_string()]);
        stage
    }

    fn server(&self) -> &Server {
        &self.founders[self.follower as usize - 1]
    }

    /// Succeeds, an election or not; returns stdout.
    fn ok(&self, args: &[&str]) -> String {
        self.server().ok(&[&["--timeout", "20s"], args].concat())
    }

    fn json(&self, args: &[&str]) -> Value {
        self.server().json(&[&["--timeout", "20s"], args].concat())
    }

    /// Fails, with one line on stderr that has this in it.
    fn fails(&self, code: i32, args: &[&str], told: &str) {
        let line = self.server().fails(code, args);
        assert!(line.starts_with("metcd: ") && line.contains(told), "{args:?}: {line}");
    }

    /// What fails only where there is no server.
    fn fails_nowhere(&self, args: &[&str]) {
        self.fails(1, &[&["--endpoints", NOWHERE], args].concat(), "refused");
    }

    /// A path that other cases of this table may know.
    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    fn leader(&self) -> u64 {
        self.ok(&["leader", "show"]).trim().parse().unwrap()
    }

    /// A voter that is neither asked nor leads.
    fn bystander(&self) -> u64 {
        let members = self.json(&["member", "list"]);
        let voters = members["members"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|member| member["role"] == "voter");
        let mut ids = voters.map(|member| member["id"].as_u64().unwrap());
        ids.find(|id| *id != self.follower && members["leader"] != *id).unwrap()
    }

    /// An election on a busy machine may have made a leader of the member that is asked.
    fn asks_a_follower(&self) {
        until("a follower is asked", || {
            let is_one = self.leader() != self.follower;
            if !is_one {
                // If it does not work it is tried again.
                self.server().metcd(&["leader", "transfer", &self.bystander().to_string()]);
            }
            is_one
        });
    }

    /// Starts a member that joins by the follower; returns where its peers reach it.
    fn join(&mut self, id: &str) -> String {
        let (client, peer) = (free_port(), free_port());
        let data_dir = self.path(&format!("d{id}"));
        let args = ["--id", id, "--data-dir", &data_dir, "--join", &self.server().url];
        self.joined.push(Server::with(client, peer, &args));
        format!("http://127.0.0.1:{peer}")
    }

    fn role_of(&self, id: u64) -> String {
        let members = self.json(&["member", "list"]);
        let mut members = members["members"].as_array().unwrap().iter();
        let member = members.find(|member| member["id"] == id);
        member.map_or("none", |member| member["role"].as_str().unwrap()).to_owned()
    }
}

/// The name, how it goes, and how it does not.
type Case = (&'static str, fn(&mut Stage), fn(&mut Stage));

const CASES: &[Case] = &[
    (
        "put",
        |stage| assert!(stage.ok(&["put", "put", "1"]).starts_with("revision ")),
        |stage| stage.fails(3, &["put", "put", "2", "--if-absent"], ""),
    ),
    (
        "get",
        |stage| assert_eq!(stage.ok(&["get", "stage/a"]), "3"),
        |stage| stage.fails(3, &["get", "missing"], "no such key"),
    ),
    (
        "del",
        |stage| {
            stage.ok(&["put", "del", "1"]);
            assert!(stage.ok(&["del", "del"]).starts_with("revision "));
        },
        |stage| stage.fails(3, &["del", "del"], "no such key"),
    ),
    (
        "ls",
        |stage| assert_eq!(stage.ok(&["ls", "stage/"]), "stage/a\n"),
        |stage| stage.fails(1, &["ls", "--revision", FUTURE], "(future_revision)"),
    ),
    (
        "watch",
        |stage| {
            let from = stage.revision.to_string();
            let seen = stage.ok(&["watch", "stage/a", "--from-revision", &from, "--count", "1"]);
            assert_eq!(seen, format!("{from}\tput\tstage/a\t3\n"));
        },
        |stage| stage.fails(1, &["watch", "stage/a", "--from-revision", "1"], "(compacted)"),
    ),
    (
        "txn",
        |stage| {
            let txn = r#"{"compare":[{"key":"stage/a","target":"value","op":"=","value":"3"}],"then":[{"get":{"key":"stage/a"}}]}"#;
            let done = stage.ok(&["txn", txn]);
            assert!(done.starts_with("revision ") && done.contains(r#""value":"3""#), "{done}");
        },
        |stage| {
            let txn = r#"{"compare":[{"key":"stage/a","target":"value","op":"=","value":"4"}]}"#;
            stage.fails(3, &["txn", txn], "comparison failed");
        },
    ),
    (
        "lease grant",
        |stage| assert!(stage.ok(&["lease", "grant", "10m"]).trim().parse::<u64>().is_ok()),
        |stage| stage.fails(2, &["lease", "grant", "soon"], "30s"),
    ),
    (
        "lease list",
        |stage| {
            let id = stage.ok(&["lease", "grant", "10m"]);
            assert!(stage.ok(&["lease", "list"]).contains(&id));
        },
        |stage| stage.fails_nowhere(&["lease", "list"]),
    ),
    (
        "lease show",
        |stage| {
            let id = stage.ok(&["lease", "grant", "10m"]).trim().to_owned();
            stage.ok(&["put", "leased", "1", "--lease", &id]);
            let shown = stage.ok(&["lease", "show", &id]);
            assert!(shown.contains("of 600 s left\nleased\n"), "{shown}");
        },
        |stage| stage.fails(3, &["lease", "show", "9"], "no lease"),
    ),
    ("lease keepalive", lease_keepalive, |stage| {
        stage.fails(3, &["lease", "keepalive", "9"], "no lease");
    }),
    (
        "lease revoke",
        |stage| {
            let id = stage.ok(&["lease", "grant", "10m"]).trim().to_owned();
            assert_eq!(stage.ok(&["lease", "revoke", &id]), format!("lease {id} revoked\n"));
        },
        |stage| stage.fails(3, &["lease", "revoke", "9"], "no lease"),
    ),
    (
        "lock",
        |stage| {
            let key = stage.ok(&["lock", "l", "--", "sh", "-c", "echo $METCD_LOCK_KEY"]);
            assert!(key.starts_with("lock/l/"), "{key}");
        },
        |stage| {
            let mut holder = stage.server().command();
            let _holder = Running(holder.args(["lock", "held"]).stdout(Stdio::null()).spawn().unwrap());
            until("the lock is held", || stage.ok(&["ls", "lock/held/", "--count"]) == "1\n");
            stage.fails(3, &["lock", "held", "--wait", "300ms", "--", "true"], "somebody else");
        },
    ),
    (
        "elect",
        |stage| {
            let key = stage.ok(&["elect", "e", "one", "--", "sh", "-c", "echo $METCD_LOCK_KEY"]);
            assert!(key.starts_with("elect/e/"), "{key}");
        },
        |stage| stage.fails(3, &["elect", "e"], "nobody leads"),
    ),
    (
        "leader show",
        |stage| {
            until("all members name the same leader", || {
                let leader = stage.ok(&["leader", "show"]);
                let named = |member: &Server| member.ok(&["leader", "show", "--timeout", "20s"]);
                stage.founders.iter().all(|member| named(member) == leader)
            });
        },
        |stage| stage.fails_nowhere(&["leader", "show"]),
    ),
    (
        "leader transfer",
        |stage| {
            let next = stage.bystander().to_string();
            assert_eq!(stage.ok(&["leader", "transfer", &next]), format!("{next}\n"));
        },
        |stage| stage.fails(3, &["leader", "transfer", "99"], "99"),
    ),
    (
        "status",
        |stage| {
            let status = stage.ok(&["status"]);
            assert!(status.starts_with("ENDPOINT") && status.lines().count() == 4, "{status}");
            assert!(stage.founders.iter().all(|member| status.contains(&member.url)), "{status}");
        },
        |stage| stage.fails_nowhere(&["status"]),
    ),
    (
        "health",
        |stage| assert_eq!(stage.ok(&["health"]), "healthy\n"),
        |stage| stage.fails_nowhere(&["health"]),
    ),
    (
        "compact",
        |stage| {
            for (revision, note) in [(stage.revision - 1, " already"), (stage.revision, "")] {
                let compacted = stage.ok(&["compact", &revision.to_string()]);
                assert_eq!(compacted, format!("compacted to revision {revision}{note}\n"));
            }
        },
        |stage| stage.fails(1, &["compact", FUTURE], "(future_revision)"),
    ),
    (
        "hash",
        |stage| {
            let revision = stage.json(&["hash"])["revision"].to_string();
            let hash = |server: &Server| server.ok(&["hash", "--revision", &revision, "--timeout", "20s"]);
            assert!(stage.founders.iter().all(|member| hash(member) == hash(stage.server())));
        },
        |stage| stage.fails(1, &["hash", "--revision", FUTURE], "(future_revision)"),
    ),
    (
        "export",
        |stage| {
            let text = stage.ok(&["export", "stage/"]);
            assert!(text.starts_with("{\"key\":\"stage/a\",\"value\":\"3\"") && text.ends_with("{\"end\":true,\"count\":1}\n"));
            assert_eq!(
                stage.ok(&["export", "stage/", "--file", &stage.path("export.jsonl")]),
                "exported 1 keys\n"
            );
        },
        |stage| stage.fails(1, &["export", "--revision", FUTURE], "(future_revision)"),
    ),
    (
        "import",
        |stage| assert_eq!(stage.ok(&["import", &stage.path("export.jsonl")]), "imported 1 keys\n"),
        |stage| stage.fails(1, &["import", &stage.path("absent")], "absent"),
    ),
    (
        "snapshot save",
        |stage| {
            assert!(
                stage
                    .ok(&["snapshot", "save", &stage.path("backup.snap")])
                    .starts_with("saved revision ")
            )
        },
        |stage| stage.fails(1, &["snapshot", "save", &stage.path("absent/backup.snap")], "cannot write"),
    ),
    (
        "snapshot status",
        |stage| assert!(stage.ok(&["snapshot", "status", &stage.path("backup.snap")]).starts_with("whole\n")),
        |stage| stage.fails(1, &["snapshot", "status", &stage.path("absent")], "absent"),
    ),
    (
        "snapshot restore",
        |stage| {
            let data_dir = stage.path("restored");
            let restored = stage.ok(&["snapshot", "restore", &stage.path("backup.snap"), "--data-dir", &data_dir]);
            assert!(restored.contains("is member 1 of the new cluster"), "{restored}");
        },
        |stage| {
            let over = [
                "snapshot",
                "restore",
                &stage.path("backup.snap"),
                "--data-dir",
                &stage.path("restored"),
            ];
            stage.fails(1, &over, "restored");
        },
    ),
    (
        "shell",
        |stage| {
            let done = stage.server().metcd_with(&["shell"], b"set shell 1\nget shell\n");
            assert_eq!((done.code, done.stderr.as_str()), (0, ""));
            assert!(done.text().ends_with("\n1\n"), "{}", done.text());
        },
        |stage| {
            let done = stage.server().metcd_with(&["shell"], b"get missing\n");
            assert_eq!((done.code, done.stderr.lines().count()), (3, 1), "{}", done.stderr);
        },
    ),
    ("bench put", |stage| bench(stage, "put"), |stage| bench_nowhere(stage, "put")),
    ("bench get", |stage| bench(stage, "get"), |stage| bench_nowhere(stage, "get")),
    ("bench mixed", |stage| bench(stage, "mixed"), |stage| bench_nowhere(stage, "mixed")),
    (
        "bench watch",
        |stage| {
            let report = stage.json(&["bench", "watch", "--watchers", "2", "--rate", "20", "--duration", "300ms"]);
            assert!(report["latency_us"]["watch"]["count"].as_u64() > Some(0), "{report}");
        },
        |stage| stage.fails_nowhere(&["bench", "watch", "--duration", "100ms"]),
    ),
    (
        "member list",
        |stage| {
            let list = stage.ok(&["member", "list"]);
            assert!(list.starts_with("ID") && list.matches("voter").count() == 3, "{list}");
        },
        |stage| stage.fails_nowhere(&["member", "list"]),
    ),
    (
        "member add",
        |stage| {
            // Nobody is there yet, and nobody comes.
            let add = ["member", "add", "http://127.0.0.1:9", "--id", "9", "--learner"];
            assert_eq!(stage.ok(&add), "member 9 added\n");
            assert_eq!(stage.role_of(9), "learner");
        },
        |stage| {
            stage.fails(
                1,
                &["member", "add", "http://127.0.0.1:9", "--id", "8", "--learner"],
                "(member_exists)",
            )
        },
    ),
    (
        "member update",
        |stage| {
            assert_eq!(stage.ok(&["member", "update", "9", "--name", "nine"]), "member 9 updated\n");
            assert!(stage.ok(&["member", "list"]).contains("nine"));
        },
        |stage| stage.fails(3, &["member", "update", "99", "--name", "x"], "99"),
    ),
    (
        "member remove",
        |stage| {
            assert_eq!(stage.ok(&["member", "remove", "9"]), "member 9 removed\n");
            assert_eq!(stage.role_of(9), "none");
        },
        |stage| stage.fails(3, &["member", "remove", "99"], "99"),
    ),
    ("member promote", member_promote, |stage| {
        stage.fails(1, &["member", "promote", "4"], "(not_a_learner)");
    }),
    ("member replace", member_replace, |stage| {
        stage.fails(3, &["member", "replace", "99", "http://127.0.0.1:9", "--id", "98"], "99");
    }),
    (
        "completions",
        |stage| assert!(stage.server().ok(&["completions", "bash"]).contains("complete ")),
        |stage| stage.fails(2, &["completions", "csh"], "csh"),
    ),
    (
        "version",
        |stage| assert!(stage.server().ok(&["version"]).starts_with("metcd ")),
        |stage| stage.fails(2, &["version", "--timeout", "3s"], "--timeout"),
    ),
    (
        "config check",
        |_| {
            let file = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("config/node1.toml");
            succeeds(&["config", "check", file.to_str().unwrap()]);
        },
        |stage| stage.fails(1, &["config", "check", &stage.path("absent")], "absent"),
    ),
    (
        "config show",
        |_| assert!(succeeds(&["config", "show"]).contains("[raft]")),
        |stage| stage.fails(1, &["config", "show", "--set", "raft.tik=1s"], "raft.tick"),
    ),
    ("serve", serve, |stage| {
        stage.fails(1, &["serve", "--set", "raft.tik=1s"], "raft.tick");
    }),
    (
        "wal dump",
        |stage| assert!(succeeds(&["wal", "dump", &stage.path("alone")]).starts_with("engine")),
        |stage| stage.fails(1, &["wal", "dump", &stage.path("absent")], "absent"),
    ),
    (
        "wal verify",
        |stage| {
            succeeds(&["wal", "verify", &stage.path("alone")]);
        },
        |stage| stage.fails(1, &["wal", "verify", &stage.path("absent")], "absent"),
    ),
    (
        "recover",
        |stage| {
            let done = run(
                metcd().args(["recover", "--force-new-cluster", "--data-dir", &stage.path("alone")]),
                b"",
            );
            assert_eq!(
                (done.code, done.text().contains("is the only member, 1,")),
                (0, true),
                "{}",
                done.stderr
            );
        },
        |stage| stage.fails(2, &["recover", "--data-dir", &stage.path("alone")], "--force-new-cluster"),
    ),
];

fn lease_keepalive(stage: &mut Stage) {
    let id = stage.ok(&["lease", "grant", "10m"]).trim().to_owned();
    assert_eq!(stage.ok(&["lease", "keepalive", &id]), format!("lease {id} has 600 s again\n"));

    let id = stage.ok(&["lease", "grant", "4s"]).trim().to_owned();
    let begin = |ends: Stdio| {
        let mut keeper = stage.server().command();
        let keeper = keeper.args(["lease", "keepalive", &id, "--forever", "--timeout", "20s"]);
        let mut keeper = Running(keeper.stdout(Stdio::piped()).stderr(ends).spawn().unwrap());
        let lines = BufReader::new(keeper.0.stdout.take().unwrap()).lines();
        (keeper, lines.map(Result::unwrap))
    };
    // Three keepalives are the lease's whole time: it would have ended without them.
    let (mut keeper, mut lines) = begin(Stdio::null());
    for _ in 0..5 {
        assert_eq!(lines.next().unwrap(), format!("lease {id} has 4 s again"));
    }
    assert!(keeper.0.try_wait().unwrap().is_none(), "it goes on");
    let (other, mut lines) = begin(Stdio::piped());
    assert!(lines.next().is_some());
    drop(other);
    // Killed or not, the lease is there as long as one keeps it.
    assert!(keeper.0.try_wait().unwrap().is_none(), "it goes on");
    stage.ok(&["lease", "revoke", &id]);
    assert_eq!(keeper.0.wait().unwrap().code(), Some(3), "a lease that is gone cannot be kept");
}

fn bench(stage: &Stage, what: &str) {
    let few = ["--keys", "20", "-c", "2", "-n", "20", "--warm-up", "0s"];
    let report = stage.json(&[&["bench", what], &few[..]].concat());
    assert_eq!((&report["requests"], &report["failed"]), (&20.into(), &0.into()), "{report}");
}

fn bench_nowhere(stage: &Stage, what: &str) {
    stage.fails_nowhere(&["bench", what, "--keys", "20", "--duration", "100ms", "--warm-up", "0s"]);
}

fn member_promote(stage: &mut Stage) {
    let (client, peer) = (free_port(), free_port());
    let peer_url = format!("http://127.0.0.1:{peer}");
    stage.ok(&["member", "add", &peer_url, "--id", "4", "--learner"]);
    let data_dir = stage.path("d4");
    let args = ["--id", "4", "--data-dir", &data_dir, "--join", &stage.server().url];
    stage.joined.push(Server::with(client, peer, &args));
    stage.joined.last().unwrap().ready();
    assert_eq!(stage.role_of(4), "learner", "it waits to be asked");
    until("it is caught up, as its leader sees it", || {
        let done = stage.server().metcd(&["member", "promote", "4", "--timeout", "20s"]);
        assert!(done.code == 0 || done.stderr.contains("(unsafe_change)"), "{}", done.stderr);
        done.code == 0
    });
    assert_eq!(stage.role_of(4), "voter");
}

fn member_replace(stage: &mut Stage) {
    let leaves = stage.bystander();
    let peer_url = stage.join("5");
    let replaced = stage.ok(&["member", "replace", &leaves.to_string(), &peer_url, "--id", "5"]);
    assert!(replaced.starts_with("member 5 "), "{replaced}");
    until("it has taken the other's place", || {
        stage.role_of(5) == "voter" && stage.role_of(leaves) == "none"
    });
    let new = stage.joined.last().unwrap();
    new.ready();
    assert_eq!(new.ok(&["get", "stage/a", "--timeout", "20s"]), "3");
}

fn serve(stage: &mut Stage) {
    let client = free_port();
    let mut server = metcd();
    server.args(["serve", "--data-dir", &stage.path("alone")]);
    server.args([
        "--listen-client",
        &format!("127.0.0.1:{client}"),
        "--listen-peer",
        &format!("127.0.0.1:{}", free_port()),
    ]);
    let mut server = Running(server.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    let url = format!("http://127.0.0.1:{client}");
    until("it is healthy", || {
        run(metcd().args(["--endpoints", &url, "--timeout", "1s", "health"]), b"").code == 0
    });
    let pid = server.0.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    assert_eq!(server.0.wait().unwrap().code(), Some(0));
}

/// A tool that speaks to no server.
fn succeeds(args: &[&str]) -> String {
    let done: Done = run(metcd().args(args), b"");
    assert_eq!((done.code, done.stderr.as_str()), (0, ""), "{args:?}");
    done.text()
}

/// The commands, below the words of `path`, that the help lists and that have none below them, each with all its words.
fn listed(path: &[&str]) -> BTreeSet<String> {
    let help = succeeds(&[path, &["--help"]].concat());
    let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let names = commands.take_while(|line| !line.is_empty()).filter_map(|line| {
        let line = line.strip_prefix("  ").filter(|line| !line.starts_with(' '))?;
        line.split_whitespace().next().filter(|name| *name != "help")
    });
    let names: Vec<&str> = names.collect();
    if names.is_empty() {
        return BTreeSet::from([path.join(" ")]);
    }
    names.into_iter().flat_map(|name| listed(&[path, &[name]].concat())).collect()
}

#[test]
fn every_command_does_what_it_says_by_a_follower_and_fails_with_its_exit_code_and_one_line() {
    let tried: BTreeSet<String> = CASES.iter().map(|(name, _, _)| (*name).to_owned()).collect();
    assert_eq!(tried, listed(&[]), "what is tried, and what the help lists");
    let mut stage = Stage::new();
    for (_, goes, fails) in CASES {
        stage.asks_a_follower();
        goes(&mut stage);
        fails(&mut stage);
    }
}
