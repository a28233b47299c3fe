//! Members, failover, status.

use crate::support::{Server, metcd, run, until};

#[test]
fn a_single_node_describes_itself() {
    let server = Server::start();
    until("it has published its client URL", || {
        server.json(&["member", "list"])["members"][0]["client_url"] == server.url.as_str()
    });
    assert_eq!(server.json(&["member", "list"])["leader"], 1);
    assert_eq!(server.ok(&["leader", "show"]), "1\n");
    assert_eq!(server.ok(&["health"]), "healthy\n");
    let status = server.ok(&["status"]);
    assert!(
        status.starts_with("ENDPOINT") && status.contains("leader") && status.lines().count() == 2,
        "{status}"
    );
    assert_eq!(server.json(&["status"])["members"][0]["status"]["id"], 1);
    assert!(server.fails(3, &["member", "promote", "9"]).contains("no member 9"));
    assert!(server.fails(1, &["member", "remove", "1"]).contains("(unsafe_change)"));
    let nothing = server.fails(2, &["member", "update", "1"]);
    for flag in ["--peer-url", "--client-url", "--name"] {
        assert!(nothing.contains(flag), "{nothing}");
    }
    server.ok(&["member", "update", "1", "--name", "alpha"]);
    assert_eq!(server.json(&["member", "list"])["members"][0]["name"], "alpha");
}

#[test]
fn members_are_added_as_learners_and_removed() {
    let server = Server::start();
    let peer = format!("http://127.0.0.1:{}", crate::support::free_port());
    assert_eq!(
        server.ok(&["member", "add", &peer, "--id", "4", "--learner", "--name", "four"]),
        "member 4 added\n"
    );
    for address in [&[peer.as_str()][..], &["--peer-url", &peer]] {
        let again = server.ok(&[&["member", "add"], address, &["--id", "4", "--learner"]].concat());
        assert_eq!(again, "member 4 was there already, with this address\n");
    }
    let nowhere = server.fails(2, &["member", "add", "--id", "5"]);
    assert!(nowhere.contains("PEER_URL"), "{nowhere}");
    let twice = server.fails(2, &["member", "add", &peer, "--peer-url", &peer]);
    assert!(twice.contains("cannot be used with"), "{twice}");
    let list = server.ok(&["member", "list"]);
    assert!(list.contains("four") && list.contains("learner"), "{list}");
    assert!(
        server
            .fails(1, &["member", "add", &peer, "--id", "5", "--learner"])
            .contains("(member_exists)")
    );
    server.ok(&["member", "remove", "4"]);
    assert!(server.fails(1, &["member", "add", &peer, "--id", "4"]).contains("(member_id_used)"));
}

#[test]
fn any_member_serves_and_a_dead_one_is_passed_over() {
    let (mut servers, _dir) = Server::cluster(3);
    let endpoints = servers.iter().map(|server| server.url.clone()).collect::<Vec<_>>().join(",");
    let client = |args: &[&str]| run(metcd().args(["--endpoints", &endpoints, "--timeout", "20s"]).args(args), b"");
    assert_eq!(client(&["put", "a", "1"]).code, 0);
    assert_eq!(servers[2].ok(&["get", "a"]), "1");
    let status = servers[1].ok(&["status"]);
    assert_eq!(status.lines().count(), 4, "one endpoint knows the other members: {status}");

    let leader: usize = client(&["leader", "show"]).text().trim().parse().unwrap();
    let next = leader % 3 + 1;
    let moved = client(&["leader", "transfer", &next.to_string()]);
    assert_eq!(
        (moved.code, moved.text().trim()),
        (0, next.to_string().as_str()),
        "{}",
        moved.stderr
    );

    servers[next - 1].kill();
    let put = client(&["put", "a", "2"]);
    assert_eq!(put.code, 0, "an election is a delay, not an error: {}", put.stderr);
    assert_eq!(client(&["get", "a"]).text(), "2");
    let alive = &servers[next % 3];
    until("the dead member is seen as unreachable", || {
        let status = alive.ok(&["status"]);
        let dead = status.lines().find(|line| line.contains("unreachable"));
        dead.is_some_and(|line| line.split_whitespace().nth(1) == Some(next.to_string().as_str()))
    });

    // Without a quorum: a plain answer within the timeout, and serializable reads still work.
    let second = next % 3 + 1;
    servers[second - 1].kill();
    let put = run(metcd().args(["--endpoints", &endpoints, "--timeout", "1s", "put", "a", "3"]), b"");
    assert_eq!((put.code, put.stderr.lines().count()), (1, 1), "{}", put.stderr);
    assert_eq!(client(&["get", "a", "--serializable"]).text(), "2");
}
