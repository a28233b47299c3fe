//! The decoders of everything that comes from outside, each as a function of arbitrary bytes, for the fuzzers in `fuzz/` and for
//! `tests/fuzz_corpora.rs`, which replays what they kept. No part of the interface: nothing else calls this.
//!
//! A target returns whatever it is given; a panic is a finding. So is a decoder that does not understand what it has written itself:
//! targets assert that where they can. What a checksum guards is tried twice, as it comes and with a checksum that fits, because no fuzzer
//! guesses one.

use std::fmt::Debug;

use serde::{Serialize, de::DeserializeOwned};

use crate::leader::{LeaderError, LeaderReply, LeaderRequest};
use crate::server::admission::MemberTable;

/// A target: its name, which is that of its corpus under `fuzz/corpus/`, and the function.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: &[Target] = &[
    ("peer_messages", peer_messages),
    ("wal_records", crate::wal::fuzzing::wal_records),
    ("snapshot_stream", crate::snapshot::fuzzing::snapshot_stream),
    ("commands", crate::state::fuzzing::commands),
    ("urls", crate::http::fuzzing::urls),
    ("json_bodies", json_bodies),
    ("headers", headers),
    ("config_file", crate::config::fuzzing::config_file),
];

/// Runs one target by its name; `false` if there is none.
pub fn run(name: &str, data: &[u8]) -> bool {
    match TARGETS.iter().find(|(known, _)| *known == name) {
        Some((_, target)) => {
            target(data);
            true
        }
        None => false,
    }
}

/// The body of a `POST /raft`: decoded, checked as the transport does, then stepped by a member.
fn peer_messages(data: &[u8]) {
    let Some((&role, body)) = data.split_first() else { return };
    crate::consensus::fuzzing::step_all(role, crate::transport::fuzzing::received(body));
}

/// A body that is JSON: of a client, or of a peer that asks the leader, is answered by it, or tells of the members it knows.
fn json_bodies(data: &[u8]) {
    crate::http::fuzzing::json_bodies(data);
    read_again::<LeaderRequest>(data);
    read_again::<Result<LeaderReply, LeaderError>>(data);
    read_again::<MemberTable>(data);
}

/// What one member writes, another one reads.
fn read_again<T: Serialize + DeserializeOwned + PartialEq + Debug>(data: &[u8]) {
    if let Ok(read) = serde_json::from_slice::<T>(data) {
        let again = serde_json::to_vec(&read).and_then(|written| serde_json::from_slice(&written));
        assert_eq!(again.map_err(|error| error.to_string()), Ok(read));
    }
}

/// Lines of `name: value`, as headers of a client and of a peer.
fn headers(data: &[u8]) {
    let headers = header_map(data);
    crate::http::fuzzing::headers(&headers);
    crate::transport::fuzzing::headers(&headers);
}

fn header_map(data: &[u8]) -> http::HeaderMap {
    let mut headers = http::HeaderMap::new();
    for line in data.split(|&byte| byte == b'\n') {
        let Some(colon) = line.iter().position(|&byte| byte == b':') else {
            continue;
        };
        let name = http::HeaderName::from_bytes(&line[..colon]);
        let value = http::HeaderValue::from_bytes(line[colon + 1..].trim_ascii());
        if let (Ok(name), Ok(value)) = (name, value) {
            headers.append(name, value);
        }
    }
    headers
}
