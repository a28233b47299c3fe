//! Section 5: leases.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::{PATIENCE, Server, wait_until};

#[test]
fn a_lease_is_granted_shown_kept_alive_and_revoked() {
    let server = Server::start();
    let granted = server.post("/v1/leases", &json!({"ttl": 60}));
    assert_eq!((granted.status, &granted.json()["ttl"], granted.revision()), (201, &json!(60), 1));
    let id = granted.json()["id"].as_str().unwrap().to_owned();
    assert_eq!(server.put(&format!("/a?lease={id}"), "x").status, 201);
    assert_eq!(server.put(&format!("/%ff?lease={id}"), "x").status, 201);
    let shown = server.get(&format!("/v1/leases/{id}")).json();
    assert_eq!(
        (&shown["id"], &shown["keys"], &shown["keys_base64"]),
        (&json!(id), &json!(["a"]), &json!(["/w=="]))
    );
    let remaining = shown["remaining"].as_f64().unwrap();
    assert!(remaining > 0.0 && remaining <= 60.0, "{remaining}");
    assert_eq!(server.get("/v1/leases").json()["leases"], json!([{"id": id, "ttl": 60}]));
    assert_eq!(
        server.post(&format!("/v1/leases/{id}/keepalive"), &json!({})).json(),
        json!({"id": id, "ttl": 60})
    );
    let object = server.send("GET", "/a", &[("Accept", "application/json")], b"").json();
    assert_eq!(object["lease"], json!(id));
    let revoked = server.delete(&format!("/v1/leases/{id}"));
    assert_eq!(revoked.json(), json!({"revision": 4, "deleted": 2}));
    server.get("/a").refused(404, "not_found");
    server.delete(&format!("/v1/leases/{id}")).refused(404, "lease_not_found");
    server
        .post(&format!("/v1/leases/{id}/keepalive"), &json!({}))
        .refused(404, "lease_not_found");
    server.put(&format!("/a?lease={id}"), "x").refused(404, "lease_not_found");
    server.get("/v1/leases/abc").refused(400, "invalid_request");
    server.post("/v1/leases", &json!({"ttl": 0})).refused(400, "invalid_request");
}

#[test]
fn a_key_with_a_ttl_goes_by_itself_unless_it_is_rewritten() {
    let server = Server::start();
    server.put("/goes?ttl=300ms", "x");
    server.put("/stays?ttl=300ms", "x");
    server.put("/stays", "y");
    let deadline = Instant::now() + PATIENCE;
    while server.get("/goes").status != 404 {
        assert!(Instant::now() < deadline, "the key is still there");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(server.get("/stays").text(), "y");
    assert_eq!(server.get("/v1/leases").json()["leases"], json!([]));
    server.put("/a?ttl=1s&lease=1", "").refused(400, "invalid_request");
    server.put("/a?ttl=1x", "").refused(400, "invalid_request");
}

#[test]
fn an_expired_lease_takes_all_its_keys_in_one_revision() {
    let server = Server::start();
    let id = server.post("/v1/leases", &json!({"ttl": 0.3})).json()["id"]
        .as_str()
        .unwrap()
        .to_owned();
    for key in ["a", "b", "c"] {
        assert_eq!(server.put(&format!("/{key}?lease={id}"), "x").status, 201);
    }
    wait_until(|| server.get("/a").status == 404);
    let left = server.get("/v1/kv");
    assert_eq!((&left.json()["kvs"], left.revision()), (&json!([]), 5));
    server.get(&format!("/v1/leases/{id}")).refused(404, "lease_not_found");
}

#[test]
fn a_lease_that_is_kept_alive_stays() {
    let server = Server::start();
    let id = server.post("/v1/leases", &json!({"ttl": 2})).json()["id"]
        .as_str()
        .unwrap()
        .to_owned();
    server.put(&format!("/a?lease={id}"), "x");
    let remaining = || server.get(&format!("/v1/leases/{id}")).json()["remaining"].as_f64().unwrap();
    wait_until(|| remaining() < 1.5);
    let before = remaining();
    assert_eq!(server.post(&format!("/v1/leases/{id}/keepalive"), &json!({})).status, 200);
    assert!(remaining() > before, "a renewal gives the full ttl again");
}
