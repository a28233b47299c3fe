//! snapshot save, status, restore; recover; wal.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Stdio;

use crate::support::{Done, Running, Server, free_port, metcd, run, until};

fn tool(args: &[&str]) -> Done {
    run(metcd().args(args), b"")
}

/// A directory's files with their contents.
fn content(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(content(&path)),
            false => found.push((path.display().to_string(), fs::read(&path).unwrap())),
        }
    }
    found.sort();
    found
}

/// The JSON that a server answers with, whatever the status.
fn get(server: &Server, target: &str) -> serde_json::Value {
    let address = server.url.strip_prefix("http://").unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    // HTTP/1.0: the body ends with the connection.
    write!(stream, "GET {target} HTTP/1.0\r\nHost: {address}\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (_, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{answer}"));
    serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {answer}"))
}

/// A server with some history, and a backup of it.
fn saved(dir: &Path) -> (Server, String) {
    let server = Server::start();
    for value in ["1", "2", "3"] {
        server.ok(&["put", "a", value]);
    }
    server.ok(&["put", "leased", "x", "--ttl", "10m"]);
    server.ok(&["put", "gone", "x"]);
    server.ok(&["del", "gone"]);
    let file = dir.join("backup.snap").to_str().unwrap().to_owned();
    assert!(server.ok(&["snapshot", "save", &file]).starts_with("saved revision 7, "));
    (server, file)
}

#[test]
fn a_backup_begins_a_new_cluster_of_three_with_the_same_content() {
    let dir = tempfile::tempdir().unwrap();
    let (old, file) = saved(dir.path());
    let status = tool(&["snapshot", "status", &file]);
    assert!(status.code == 0 && status.text().starts_with("whole\n"), "{}", status.stderr);
    let hash = old.ok(&["hash"]);
    let hash = hash.split_whitespace().next().unwrap();
    assert!(status.text().contains(&format!("keys      2, hash {hash}\n")), "{}", status.text());

    let ports: Vec<(u16, u16)> = (0..3).map(|_| (free_port(), free_port())).collect();
    let members: Vec<String> = (1..)
        .zip(&ports)
        .map(|(id, (_, peer))| format!("--member={id}=http://127.0.0.1:{peer}"))
        .collect();
    let mut made = Vec::new();
    let mut servers = Vec::new();
    for (id, (client, peer)) in (1..).zip(&ports) {
        let data_dir = dir.path().join(format!("d{id}"));
        let own = [
            format!("--id={id}"),
            format!("--data-dir={}", data_dir.display()),
            format!("--listen-client=127.0.0.1:{client}"),
            format!("--listen-peer=127.0.0.1:{peer}"),
        ];
        let args: Vec<&str> = own.iter().chain(&members).map(String::as_str).collect();
        let restored = tool(&[&["snapshot", "restore", &file][..], &args].concat());
        assert_eq!(restored.code, 0, "{}", restored.stderr);
        made.push(restored.text().split("cluster ").nth(1).unwrap().to_owned());
        assert_eq!(
            tool(&[&["snapshot", "restore", &file][..], &args].concat()).code,
            1,
            "never over a member's data"
        );
        // Its own flags name it; the members are in its data.
        servers.push(Server::with(*client, *peer, &[own[0].as_str(), own[1].as_str()]));
    }
    assert!(made.iter().all(|cluster| *cluster == made[0]), "one cluster: {made:?}");
    servers.iter().for_each(Server::ready);
    let new = &servers[0];
    assert_eq!(new.ok(&["get", "a"]), "3");
    assert_eq!(new.json(&["get", "a"])["mod_revision"], 4);
    new.fails(3, &["get", "gone"]);
    let list = new.json(&["ls", "--count"]);
    assert_eq!((&list["revision"], &list["count"]), (&1_000_000_007u64.into(), &2.into()));
    for old_revision in ["4", "7", "500000000"] {
        assert!(new.fails(1, &["get", "a", "--revision", old_revision]).contains("(compacted)"));
        assert!(
            new.fails(1, &["watch", "a", "--from-revision", old_revision])
                .contains("(compacted)")
        );
    }
    assert_eq!(new.ok(&["put", "b", "1"]), "revision 1000000008\n");
    assert_ne!(
        new.json(&["member", "list"])["cluster_id"],
        old.json(&["member", "list"])["cluster_id"]
    );
    let hashes: Vec<_> = servers
        .iter()
        .map(|server| server.ok(&["hash", "--revision", "1000000008"]))
        .collect();
    assert!(hashes.iter().all(|hash| *hash == hashes[0]), "{hashes:?}");
    let lease = new.ok(&["lease", "list"]).trim().to_owned();
    new.ok(&["lease", "revoke", &lease]);
    new.fails(3, &["get", "leased"]);
}

#[test]
fn a_backup_begins_a_new_cluster_of_one_with_the_same_content() {
    let dir = tempfile::tempdir().unwrap();
    let (old, file) = saved(dir.path());
    let (client, peer) = (free_port(), free_port());
    let data_dir = format!("--data-dir={}", dir.path().join("d").display());
    let restored = tool(&["snapshot", "restore", &file, &data_dir, &format!("--listen-peer=127.0.0.1:{peer}")]);
    assert_eq!((restored.code, restored.stderr.as_str()), (0, ""));
    let new = Server::with(client, peer, &[&data_dir]);
    new.ready();
    assert_eq!(new.ok(&["ls", "--values"]), old.ok(&["ls", "--values"]));
    assert_eq!(new.ok(&["ls"]), "a\nleased\n");
    assert_eq!(
        new.json(&["get", "leased"])["lease"].to_string(),
        format!("\"{}\"", new.ok(&["lease", "list"]).trim())
    );
    assert_eq!(new.ok(&["put", "a", "4"]), "revision 1000000008\n");
    let members = new.json(&["member", "list"]);
    assert_eq!((members["members"].as_array().unwrap().len(), &members["leader"]), (1, &1.into()));
    assert_eq!(old.ok(&["get", "a"]), "3", "the old one is another cluster");
}

#[test]
fn the_status_of_a_backup_is_that_of_the_member_at_its_revision() {
    let dir = tempfile::tempdir().unwrap();
    let (server, file) = saved(dir.path());
    // What comes later is not in it.
    server.ok(&["put", "a", "later"]);
    let status = tool(&["snapshot", "status", &file, "-o", "json"]);
    assert_eq!((status.code, status.stderr.as_str()), (0, ""));
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    let hash = |revision: &str| get(&server, &format!("/v1/hash?revision={revision}"))["hash"].clone();
    assert_eq!((&status["revision"], &status["keys"]), (&7.into(), &2.into()), "{status}");
    assert_eq!(status["bytes"], fs::metadata(&file).unwrap().len());
    assert_eq!(status["hash"], hash("7"));
    assert_ne!(status["hash"], hash("8"));
    assert_eq!(status["cluster_id"], get(&server, "/status")["cluster_id"]);
}

#[test]
fn a_page_of_the_old_cluster_does_not_go_on_in_the_restored_one() {
    let dir = tempfile::tempdir().unwrap();
    let (old, file) = saved(dir.path());
    let first = get(&old, "/v1/kv?prefix=&limit=1");
    let after = format!("/v1/kv?prefix=&limit=1&after={}", first["next"].as_str().unwrap());
    assert_eq!(get(&old, &after)["kvs"][0]["key"], "leased");
    let (client, peer) = (free_port(), free_port());
    let data_dir = format!("--data-dir={}", dir.path().join("d").display());
    let restored = tool(&["snapshot", "restore", &file, &data_dir, &format!("--listen-peer=127.0.0.1:{peer}")]);
    assert_eq!((restored.code, restored.stderr.as_str()), (0, ""));
    let new = Server::with(client, peer, &[&data_dir]);
    new.ready();
    let refused = get(&new, &after);
    assert_eq!(
        (&refused["status"], &refused["code"]),
        (&410.into(), &"compacted".into()),
        "{refused}"
    );
    assert_eq!(get(&new, "/v1/kv?prefix=&limit=1")["kvs"][0]["key"], "a");
}

#[test]
fn a_backup_taken_under_load_is_the_same_content_on_three_fresh_members() {
    let dir = tempfile::tempdir().unwrap();
    let (old, _old_dir) = Server::cluster(3);
    old[0].ok(&["put", "before", "x"]);
    old[0].ok(&["put", "before", "y"]);
    old[0].ok(&["put", "gone", "x"]);
    old[0].ok(&["del", "gone"]);
    let load = [
        "bench",
        "put",
        "--keys",
        "500",
        "--duration",
        "5m",
        "--warm-up",
        "0s",
        "--connections",
        "8",
    ];
    let load = Running(
        old[1]
            .command()
            .args(load)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    let revision = |server: &Server| server.json(&["ls", "--count"])["revision"].as_u64().unwrap();
    until("the load has begun", || revision(&old[0]) > 200);
    let file = dir.path().join("backup.snap").to_str().unwrap().to_owned();
    old[2].ok(&["snapshot", "save", &file]);
    let saved = metcd::snapshot::verify_file(Path::new(&file)).unwrap().revision;
    until("the load goes on", || revision(&old[0]) > saved);
    drop(load);

    let ports: Vec<(u16, u16)> = (0..3).map(|_| (free_port(), free_port())).collect();
    let members: Vec<String> = (1..)
        .zip(&ports)
        .map(|(id, (_, peer))| format!("--member={id}=http://127.0.0.1:{peer}"))
        .collect();
    let new: Vec<Server> = (1..)
        .zip(&ports)
        .map(|(id, (client, peer))| {
            let own = [
                format!("--id={id}"),
                format!("--data-dir={}", dir.path().join(format!("n{id}")).display()),
            ];
            let args: Vec<&str> = own.iter().chain(&members).map(String::as_str).collect();
            let peer_port = format!("--listen-peer=127.0.0.1:{peer}");
            let restored = tool(&[&["snapshot", "restore", &file, &peer_port][..], &args].concat());
            assert_eq!(restored.code, 0, "{}", restored.stderr);
            Server::with(*client, *peer, &args)
        })
        .collect();
    new.iter().for_each(Server::ready);
    let hash = |server: &Server, revision: u64| {
        let revision = revision.to_string();
        server.json(&["hash", "--revision", &revision])["hash"].clone()
    };
    let then = hash(&old[0], saved);
    for server in &new {
        assert_eq!(hash(server, saved + 1_000_000_000), then);
        assert_eq!(server.ok(&["get", "before", "--serializable"]), "y");
        server.fails(3, &["get", "gone", "--serializable"]);
    }
    assert!(new[1].json(&["ls", "--count"])["count"].as_u64() > Some(100));
    // And it goes on from there, alike on all.
    new[0].ok(&["put", "before", "z"]);
    let now = revision(&new[0]);
    let hashes: Vec<_> = new.iter().map(|server| hash(server, now)).collect();
    assert!(hashes.iter().all(|hash| *hash == hashes[0] && *hash != then), "{hashes:?}");
}

#[test]
fn a_damaged_backup_is_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let (_server, file) = saved(dir.path());
    let whole = fs::read(&file).unwrap();
    let bad = dir.path().join("bad.snap");
    let bad_name = bad.to_str().unwrap();
    let data_dir = dir.path().join("d");
    let mut altered = whole.clone();
    altered[whole.len() / 2] ^= 1;
    for damaged in [
        &whole[..whole.len() - 1],
        &whole[..20],
        &b""[..],
        &altered[..],
        &[&whole[..], b"x"].concat()[..],
    ] {
        fs::write(&bad, damaged).unwrap();
        let status = tool(&["snapshot", "status", bad_name]);
        assert_eq!(
            (
                status.code,
                status.stderr.contains("use another backup"),
                status.stderr.contains("written")
            ),
            (1, true, false),
            "{}",
            status.stderr
        );
        let restored = tool(&["snapshot", "restore", bad_name, "--data-dir", data_dir.to_str().unwrap()]);
        assert_eq!(
            (restored.code, restored.stderr.contains("damaged")),
            (1, true),
            "{}",
            restored.stderr
        );
        assert!(!data_dir.exists());
    }
    assert_eq!(tool(&["snapshot", "restore", "/nonexistent", "--data-dir", "/nonexistent"]).code, 1);
    assert_eq!(tool(&["snapshot", "restore"]).code, 2);
}

#[test]
fn the_last_member_becomes_a_cluster_of_its_own_and_keeps_what_it_was() {
    for store in ["memory", "sled"] {
        let (mut servers, dir) = Server::cluster_with(3, &["--store", store]);
        servers[0].ok(&["put", "a", "1", "--timeout", "20s"]);
        until("the third member has it", || {
            servers[2].metcd(&["get", "a", "--serializable"]).stdout == b"1"
        });
        servers.iter_mut().for_each(Server::kill);
        let last = dir.path().join("d3");
        let last_name = last.to_str().unwrap();
        let unasked = tool(&["recover", "--data-dir", last_name]);
        assert_eq!((unasked.code, unasked.stderr.lines().count()), (2, 1), "not by accident");
        for part in ["gives up the old cluster", "--force-new-cluster", "start them again"] {
            assert!(unasked.stderr.contains(part), "{part}: {}", unasked.stderr);
        }
        for url in ["http://127.0.0.1:0", "http://0.0.0.0:5", "https://127.0.0.1:1", "x", ""] {
            let refused = tool(&["recover", "--data-dir", last_name, "--force-new-cluster", "--peer-url", url]);
            assert_eq!((refused.code, refused.stderr.lines().count()), (2, 1), "{url}: {}", refused.stderr);
            assert!(refused.stderr.contains("--peer-url"), "{url}: {}", refused.stderr);
        }
        assert!(!dir.path().join("d3.before-recovery-1").exists(), "nothing was touched");
        let recovered = tool(&["recover", "--data-dir", last_name, "--force-new-cluster"]);
        assert_eq!(recovered.code, 0, "{}", recovered.stderr);
        for part in [
            "warning: ",
            "are gone",
            "must stay stopped",
            "new members, with their old ids or with others",
        ] {
            assert!(recovered.stderr.contains(part), "{part}: {}", recovered.stderr);
        }
        let kept = dir.path().join("d3.before-recovery-1");
        assert!(kept.join("identity.toml").exists());
        assert_eq!(kept.join("store").join("CLEAN").exists(), store == "sled", "the tool has closed it");
        let (client, peer) = (free_port(), free_port());
        let alone = Server::with(client, peer, &["--id=3", "--data-dir", last_name, "--store", store]);
        alone.ready();
        assert_eq!(alone.ok(&["get", "a"]), "1");
        assert_eq!(alone.ok(&["put", "a", "2"]), "revision 1000000003\n");
        let members = alone.json(&["member", "list"]);
        assert_eq!((members["members"].as_array().unwrap().len(), &members["leader"]), (1, &3.into()));
        // As a survivor comes back, under the id it had.
        alone.ok(&["member", "update", "3", "--peer-url", &format!("http://127.0.0.1:{peer}")]);
        let again = dir.path().join("again");
        let _again = Server::with(
            free_port(),
            free_port(),
            &["--id=1", "--data-dir", again.to_str().unwrap(), "--join", &alone.url],
        );
        until("the old id is a voter again", || {
            let members = alone.json(&["member", "list", "--timeout", "20s"]);
            let mut members = members["members"].as_array().unwrap().iter();
            members.any(|member| member["id"] == 1 && member["role"] == "voter")
        });
    }
}

/// What is only in the log, and came in through a member that joined, is there as well: a configuration change counts as on a member.
#[test]
fn a_recovery_has_what_came_through_members_that_joined_and_left_since_the_last_snapshot() {
    for store in ["memory", "sled"] {
        let dir = tempfile::tempdir().unwrap();
        let path = |id: u64| dir.path().join(format!("d{id}")).to_str().unwrap().to_owned();
        let member = |id: u64, more: &[&str]| {
            let own = [format!("--id={id}"), format!("--data-dir={}", path(id)), format!("--store={store}")];
            let args: Vec<&str> = own.iter().map(String::as_str).chain(more.iter().copied()).collect();
            let server = Server::with(free_port(), free_port(), &args);
            server.ready();
            server
        };
        let mut first = member(1, &[]);
        first.ok(&["put", "first", "1"]);
        let mut others: Vec<Server> = (2..=3).map(|id| member(id, &["--join", &first.url])).collect();
        for (id, other) in (2..).zip(&others) {
            until("it votes", || {
                let members = first.json(&["member", "list"]);
                let mut members = members["members"].as_array().unwrap().iter();
                members.any(|member| member["id"] == id && member["role"] == "voter")
            });
            other.ok(&["put", &format!("through{id}"), "1", "--timeout", "20s"]);
        }
        first.ok(&["member", "remove", "3", "--timeout", "20s"]);
        others[0].ok(&["put", "after", "1", "--timeout", "20s"]);
        let before = first.ok(&["ls", "--timeout", "20s"]);
        assert_eq!(before, "after\nfirst\nthrough2\nthrough3\n");
        first.kill();
        others.iter_mut().for_each(Server::kill);
        let recovered = tool(&["recover", "--data-dir", &path(1), "--force-new-cluster"]);
        assert_eq!(recovered.code, 0, "{}", recovered.stderr);
        let alone = member(1, &[]);
        assert_eq!(alone.ok(&["ls"]), before, "{store}");
        assert_eq!(alone.json(&["member", "list"])["members"].as_array().unwrap().len(), 1);
    }
}

/// A file that is there whole or not at all takes the place of a file, and of nothing else.
#[test]
fn a_backup_and_an_export_go_to_where_a_link_leads_and_replace_no_pipe_or_directory() {
    let server = Server::start();
    server.ok(&["put", "a", "1"]);
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("real"), "old").unwrap();
    std::os::unix::fs::symlink(path("real"), path("link")).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(path("pipe")).status().unwrap().success());
    let commands: [&[&str]; 2] = [&["snapshot", "save"], &["export", "--file"]];
    for command in commands {
        std::fs::write(path("real"), "old").unwrap();
        server.ok(&[command, &[&path("link")]].concat());
        assert!(std::fs::symlink_metadata(path("link")).unwrap().is_symlink());
        assert!(std::fs::read(path("real")).unwrap().len() > 3, "{command:?}");
        for (name, what) in [("pipe", "a device or a pipe"), ("", "a directory")] {
            let refused = server.fails(1, &[command, &[&path(name)]].concat());
            assert!(refused.contains(what), "{refused}");
        }
        server.fails(1, &[command, &["/dev/null"]].concat());
    }
    assert!(!std::fs::metadata("/dev/null").unwrap().is_file());
    assert!(server.fails(2, &["snapshot", "save", "-"]).contains("/v1/snapshot"));
    let mut left: Vec<_> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    left.sort();
    assert_eq!(left, ["link", "pipe", "real"]);
}

/// Names in a directory.
fn listed(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<String> = names.map(|name| name.into_string().unwrap()).collect();
    names.sort();
    names
}

const TO_A_FILE: [&[&str]; 2] = [&["snapshot", "save"], &["export", "--file"]];

#[test]
fn a_link_to_a_pipe_or_to_nothing_is_not_replaced() {
    let server = Server::start();
    server.ok(&["put", "a", "1"]);
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    std::os::unix::fs::symlink("/proc/self/fd/1", path("stdout")).unwrap();
    for command in TO_A_FILE {
        for place in [path("stdout"), "/proc/self/fd/1".to_owned()] {
            // The harness reads it from a pipe.
            let refused = server.fails(1, &[command, &[&place]].concat());
            assert!(refused.contains("is a device or a pipe: name a file"), "{refused}");
            assert_eq!(refused.contains("- for standard output"), command[0] == "export", "{refused}");
        }
        std::os::unix::fs::symlink("target", path("dangling")).unwrap();
        server.ok(&[command, &[&path("dangling")]].concat());
        assert_eq!(fs::read_link(path("dangling")).unwrap(), Path::new("target"));
        assert!(fs::symlink_metadata(path("target")).unwrap().is_file());
        fs::remove_file(path("dangling")).unwrap();
        fs::remove_file(path("target")).unwrap();
    }
    assert_eq!(fs::read_link(path("stdout")).unwrap(), Path::new("/proc/self/fd/1"));
    assert_eq!(listed(dir.path()), ["stdout"]);
}

#[test]
fn a_backup_and_an_export_touch_no_other_file_and_keep_the_mode_of_the_one_they_replace() {
    let server = Server::start();
    server.ok(&["put", "a", "1"]);
    let dir = tempfile::tempdir().unwrap();
    // Nothing can be put behind a name of this length.
    let long = "f".repeat(255);
    for command in TO_A_FILE {
        let file = dir.path().join(&long);
        let neighbour = dir.path().join("f.partial");
        fs::write(&neighbour, "somebody's").unwrap();
        for name in [&long, "f"] {
            server.ok(&[command, &[dir.path().join(name).to_str().unwrap()]].concat());
        }
        let mode = || fs::metadata(&file).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(), 0o600, "all that there is is in it");
        for kept in [0o640, 0o600] {
            fs::set_permissions(&file, fs::Permissions::from_mode(kept)).unwrap();
            server.ok(&[command, &[file.to_str().unwrap()]].concat());
            assert_eq!(mode(), kept);
        }
        assert_eq!(fs::read_to_string(&neighbour).unwrap(), "somebody's");
        assert_eq!(listed(dir.path()), ["f", "f.partial", &long]);
        fs::remove_file(file).unwrap();
    }
}

/// A server that begins to answer and goes no further.
fn stalled() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        let mut kept = Vec::new();
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            // The other side may have given up.
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\nbegun");
            kept.push(stream);
        }
    });
    url
}

#[test]
fn what_is_interrupted_leaves_nothing_behind() {
    let url = stalled();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    for command in TO_A_FILE {
        for (signal, number) in [("-INT", 2), ("-TERM", 15), ("-HUP", 1)] {
            let mut child = metcd();
            child.args(["--endpoints", &url, "--timeout", "1h"]).args(command).arg(&file);
            let mut child = Running(child.stdin(Stdio::null()).spawn().unwrap());
            until("it is being written", || listed(dir.path()).len() == 1);
            let pid = child.0.id().to_string();
            assert!(std::process::Command::new("kill").args([signal, &pid]).status().unwrap().success());
            assert_eq!(child.0.wait().unwrap().code(), Some(128 + number), "{command:?}");
            assert_eq!(listed(dir.path()), [""; 0], "{command:?} {signal}");
        }
    }
}

#[test]
fn a_directory_in_use_or_of_nobody_is_not_recovered() {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("d");
    let name = data_dir.to_str().unwrap();
    let nothing = tool(&["recover", "--data-dir", name, "--force-new-cluster"]);
    assert_eq!((nothing.code, nothing.stderr.lines().count()), (1, 1), "{}", nothing.stderr);
    let server = Server::with(free_port(), free_port(), &["--data-dir", name]);
    server.ready();
    let used = tool(&["recover", "--data-dir", name, "--force-new-cluster"]);
    assert_eq!((used.code, used.stderr.contains("in use")), (1, true), "{}", used.stderr);
}

/// `own_files` are those of the engine in the log's directory.
fn a_log_is_dumped_and_verified_without_being_changed(engine: &str, own_files: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("d");
    let mut server = Server::with(
        free_port(),
        free_port(),
        &["--data-dir", data_dir.to_str().unwrap(), "--wal", engine],
    );
    server.ready();
    server.ok(&["put", "a", "1"]);
    let wal = data_dir.join("wal");
    // The fence is two blocks, of which the second is blank until it hears of the log: some milliseconds after an append. What is lost before
    // that is not known to be lost.
    until("the fence hears of the log", || {
        let fence = fs::read(wal.join("fence")).unwrap();
        fence[4096..].iter().any(|byte| *byte != 0)
    });
    server.kill();
    let before = content(&wal);
    let dump = tool(&["wal", "dump", wal.to_str().unwrap()]);
    let named = format!("engine      {engine}\n");
    assert!(dump.code == 0 && dump.text().starts_with(&named), "{}{}", dump.text(), dump.stderr);
    assert!(dump.text().contains(" normal "), "{}", dump.text());
    assert_eq!(tool(&["wal", "verify", wal.to_str().unwrap()]).code, 0);
    assert_eq!(
        tool(&["wal", "verify", data_dir.to_str().unwrap()]).code,
        0,
        "the directory above is understood too"
    );
    assert!(content(&wal) == before, "nothing was changed");
    assert_eq!(tool(&["wal", "verify", dir.path().to_str().unwrap()]).code, 1);
    for name in own_files {
        let path = wal.join(name);
        match path.is_dir() {
            true => fs::remove_dir_all(&path).unwrap(),
            false => fs::write(&path, vec![0; 4096]).unwrap(),
        }
    }
    for command in ["dump", "verify"] {
        let lost = tool(&["wal", command, wal.to_str().unwrap()]);
        assert!(
            lost.code == 1 && lost.text().contains("lost data"),
            "{}{}",
            lost.text(),
            lost.stderr
        );
    }
}

#[test]
fn a_log_of_sled_is_dumped_and_verified_without_being_changed() {
    a_log_is_dumped_and_verified_without_being_changed("sled", &["sled", "journal-0", "journal-1"]);
}

#[test]
fn a_log_of_raft_engine_is_dumped_and_verified_without_being_changed() {
    a_log_is_dumped_and_verified_without_being_changed("raft-engine", &["raft-engine"]);
}

#[cfg(feature = "rocksdb")]
#[test]
fn a_log_of_rocksdb_is_dumped_and_verified_without_being_changed() {
    a_log_is_dumped_and_verified_without_being_changed("rocksdb", &["rocksdb"]);
}

#[test]
fn every_answer_has_a_table_and_json() {
    let dir = tempfile::tempdir().unwrap();
    let (server, file) = saved(dir.path());
    let table = |args: &[&str]| server.ok(&[args, &["-o", "table"]].concat());
    let head = |args: &[&str]| table(args).lines().next().unwrap_or_default().to_owned();
    assert_eq!(head(&["health"]), "HEALTH");
    assert_eq!(head(&["compact", "3"]), "COMPACTED REVISION");
    assert!(head(&["hash"]).starts_with("REVISION"));
    assert!(head(&["ls", "--count"]).starts_with("REVISION"));
    let granted = table(&["lease", "grant", "1m"]);
    let id = granted.lines().nth(1).and_then(|line| line.split_whitespace().next()).unwrap();
    assert!(head(&["lease", "keepalive", id]).starts_with("ID"));
    assert!(head(&["lease", "revoke", id]).starts_with("ID"));
    let copy = dir.path().join("copy.snap");
    assert!(head(&["snapshot", "save", copy.to_str().unwrap()]).starts_with("FILE"));
    assert!(head(&["snapshot", "status", &file]).starts_with("CLUSTER"));

    let restored = dir.path().join("restored");
    let restored = restored.to_str().unwrap();
    let answer = server.json(&["snapshot", "restore", &file, "--data-dir", restored]);
    assert_eq!(answer["data_dir"], restored);
    assert_eq!(answer["id"], 1);
    assert_eq!(answer["revision"], 1_000_000_007);
}
