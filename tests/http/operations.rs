//! Sections 6 and 7 on a single node: members, leader, probes, status, metrics.

use serde_json::json;

use crate::support::Server;

#[test]
fn the_cluster_describes_itself() {
    let server = Server::start();
    let members = server.get("/members").json();
    assert_eq!(
        (&members["leader"], &members["members"][0]["id"], &members["members"][0]["role"]),
        (&json!(1), &json!(1), &json!("voter"))
    );
    assert_eq!(
        (&members["members"][0]["healthy"], members["members"].as_array().unwrap().len()),
        (&json!(true), 1)
    );
    assert_eq!(members["members"][0]["client_url"], json!(format!("http://{}", server.address)));
    let leader = server.get("/leader").json();
    assert_eq!(
        (&leader["id"], &leader["client_url"]),
        (&json!(1), &json!(format!("http://{}", server.address)))
    );
    assert_eq!(server.get("/members?consistency=serializable").status, 200);
}

#[test]
fn membership_requests_are_checked() {
    let server = Server::start();
    let add = |body| server.post("/members", &body);
    add(json!({"id": 4})).refused(400, "invalid_request");
    add(json!({"id": 0, "peer_url": "http://127.0.0.1:1"})).refused(400, "invalid_request");
    let https = add(json!({"id": 4, "peer_url": "https://127.0.0.1:1"}));
    https.refused(400, "invalid_request");
    assert!(https.json()["detail"].as_str().unwrap().contains("https"));
    add(json!({"id": 4, "peer_url": "http://0.0.0.0:1"})).refused(400, "invalid_request");
    add(json!({"id": 1, "peer_url": "http://127.0.0.1:1"})).refused(409, "member_exists");
    server.delete("/members/1").refused(409, "unsafe_change");
    server.delete("/members/9").refused(404, "member_not_found");
    server.delete("/members/x").refused(400, "invalid_request");
    let learner = json!({"remove": 1, "add": {"peer_url": "http://127.0.0.1:9", "role": "learner"}});
    let learner = server.post("/members/replace", &learner);
    learner.refused(400, "invalid_request");
    assert!(learner.text().contains("`add.role`"), "{learner:?}");
    server.post("/members/1/promote", &json!({})).refused(409, "not_a_learner");
    server.post("/leader", &json!({"id": 9})).refused(404, "member_not_found");
    server.send("PATCH", "/members/1", &[], b"{}").refused(400, "invalid_request");
    let renamed = server.send("PATCH", "/members/1", &[], br#"{"name":"bob"}"#);
    assert_eq!((renamed.status, &renamed.json()["name"]), (200, &json!("bob")));
}

#[test]
fn probes_status_and_version_answer() {
    let server = Server::start();
    assert_eq!(server.get("/livez").status, 200);
    assert_eq!(server.get("/readyz").status, 200);
    assert!(server.get("/readyz?verbose").text().contains("leader"));
    assert_eq!(server.get("/health").json(), json!({"health": true}));
    let status = server.get("/status").json();
    for field in [
        "id",
        "name",
        "version",
        "cluster_id",
        "role",
        "term",
        "leader",
        "commit_index",
        "applied_index",
        "revision",
        "compacted_revision",
        "uptime_seconds",
    ] {
        assert!(status.get(field).is_some(), "{field}");
    }
    assert_eq!(
        (&status["role"], &status["store"]["backend"], &status["wal"]["engine"]),
        (&json!("leader"), &json!("memory"), &json!("sled"))
    );
    assert_eq!(server.get("/version").json()["version"], status["version"]);
    let welcome = server.get("/");
    assert!(
        welcome.header("content-type").starts_with("text/plain") && welcome.text().contains("member 1"),
        "{welcome:?}"
    );
    server.get("/ui").refused(404, "unknown_route");
    server.get("/favicon.ico").refused(404, "unknown_route");
    assert_eq!(server.get("/openapi.json").json()["openapi"], "3.1.0");
}

#[test]
fn metrics_count_requests() {
    let server = Server::start();
    server.put("/a", "x");
    let metrics = server.get("/metrics");
    assert!(metrics.header("content-type").starts_with("text/plain"));
    let text = metrics.text();
    for line in [
        "metcd_http_requests_total{route=\"/{key}\",status=\"201\"} 1",
        "metcd_store_revision 2",
        "metcd_raft_is_leader 1",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} in {text}");
    }
}

#[test]
fn every_sample_of_the_metrics_has_a_type_of_its_name() {
    let server = Server::start();
    server.put("/a", "x");
    let text = server.get("/metrics").text();
    let typed: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next())
        .collect();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let name = line.split(['{', ' ']).next().unwrap();
        let histogram = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
        assert!(
            typed.contains(&name) || histogram.is_some_and(|base| typed.contains(&base)),
            "{line}"
        );
    }
    for name in [
        "metcd_wal_append_duration_seconds",
        "metcd_wal_entries_total",
        "metcd_connections_accepted_total",
    ] {
        assert!(typed.contains(&name), "{name} in {typed:?}");
    }
    let accept = [("Accept", "application/openmetrics-text; version=1.0.0")];
    let open = server.send("GET", "/metrics", &accept, b"");
    assert!(open.header("content-type").starts_with("application/openmetrics-text") && open.text().ends_with("# EOF\n"));
}

#[test]
fn a_member_that_is_ready_leads_in_every_answer_and_is_known_by_its_url() {
    let server = Server::start();
    let status = server.get("/status").json();
    assert_eq!((&status["role"], &status["leader"]), (&json!("leader"), &json!(1)), "{status}");
    assert!(status["wal"]["last_index"].as_u64() >= status["applied_index"].as_u64(), "{status}");
    let url = json!(format!("http://{}", server.address));
    assert_eq!(server.get("/members").json()["members"][0]["client_url"], url);
    assert_eq!(server.get("/leader").json()["client_url"], url);
}

#[test]
fn the_hash_is_of_the_content() {
    let server = Server::start();
    let empty = server.get("/v1/hash").json();
    server.put("/a", "x");
    let one = server.get("/v1/hash").json();
    assert_eq!((&one["revision"], one["hash"].as_str().unwrap().len()), (&json!(2), 32));
    assert_ne!(one["hash"], empty["hash"]);
    server.put("/b", "y");
    assert_eq!(server.get("/v1/hash?revision=2").json(), one);
    server.get("/v1/hash?revision=9").refused(400, "future_revision");
}

#[test]
fn the_log_filter_changes_at_run_time() {
    let server = Server::start();
    assert_eq!(server.get("/debug/log").text(), "info\n");
    assert_eq!(server.put("/debug/log", "info,metcd=debug\n").text(), "info,metcd=debug\n");
    assert_eq!(server.get("/debug/log").text(), "info,metcd=debug\n");
    server.put("/debug/log", "metcd=loud").refused(400, "invalid_request");
}

#[test]
fn a_backup_is_a_snapshot_whose_checksums_hold() {
    let server = Server::start();
    server.put("/a", "x");
    let backup = server.get("/v1/snapshot");
    assert_eq!((backup.status, backup.revision()), (200, 2));
    assert_eq!(backup.header("content-length"), "", "its length is not known before its end");
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &backup.body).unwrap();
    assert_eq!(metcd::snapshot::verify_file(file.path()).unwrap().revision, 2);
    std::fs::write(file.path(), &backup.body[..backup.body.len() - 1]).unwrap();
    assert!(metcd::snapshot::verify_file(file.path()).is_err());
}

#[test]
fn a_backup_estimates_its_length_before_it_begins() {
    let server = Server::start();
    let estimate = |method: &str| {
        let answer = server.send(method, "/v1/snapshot", &[], b"");
        let bytes: usize = answer.header("metcd-snapshot-bytes-estimate").parse().unwrap();
        (bytes, answer.body.len())
    };
    assert_eq!(estimate("GET").0, 0);
    // History counts, on both sides.
    for n in 0..400 {
        server.put(&format!("/key-{}", n % 100), &"v".repeat(1000));
    }
    let (estimated, bytes) = estimate("GET");
    assert!((bytes / 2..bytes * 2).contains(&estimated), "{estimated} of {bytes}");
    assert_eq!(estimate("HEAD"), (estimated, 0));
}

#[test]
fn every_field_of_the_status_has_its_type() {
    let server = Server::start();
    server.put("/a", "x");
    let status = server.get("/status").json();
    let field = |pointer: &str| status.pointer(pointer).unwrap_or_else(|| panic!("no {pointer} in {status}"));
    for text in ["/name", "/version", "/cluster_id", "/role", "/store/backend", "/wal/engine"] {
        assert!(field(text).as_str().is_some_and(|text| !text.is_empty()), "{text}: {status}");
    }
    for number in [
        "/id",
        "/term",
        "/leader",
        "/commit_index",
        "/applied_index",
        "/revision",
        "/compacted_revision",
        "/store/bytes",
        "/wal/bytes",
        "/wal/first_index",
        "/wal/last_index",
        "/uptime_seconds",
    ] {
        assert!(field(number).is_u64(), "{number}: {status}");
    }
    for above_0 in [
        "/id",
        "/term",
        "/leader",
        "/commit_index",
        "/revision",
        "/store/bytes",
        "/wal/bytes",
    ] {
        assert!(field(above_0).as_u64() > Some(0), "{above_0}: {status}");
    }
}
