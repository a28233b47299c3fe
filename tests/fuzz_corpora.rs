//! What the fuzzers kept, and the findings they once made, through the same entry points: see `scripts/fuzz`. The first corpora are made
//! here by the product's own encoders: `cargo test --test fuzz_corpora -- --ignored`.

#![allow(clippy::print_stdout, reason = "the input at which a target panics is named")]
#![allow(clippy::wildcard_enum_match_arm, reason = "most kinds of message carry nothing")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command as Program;
use std::sync::Arc;

use bytes::Bytes;
use metcd::snapshot::SnapshotWriter;
use metcd::state::State;
use metcd::state::command::{
    Body, Command, Delete, DeleteRange, EntryPayload, FEATURE_LEVEL, Idempotency, KeySpan, LeaseGrant, LeaseRevoke, MemberRecord,
    MembershipChange, Put, Txn, TxnOp, TxnOpBody,
};
use metcd::store::MemoryStore;
use prost::Message as _;
use protobuf::Message as _;
use raft::eraftpb::{ConfChangeSingle, ConfChangeType, ConfChangeV2, Entry, Message, MessageType};

fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target)
}

#[test]
fn every_input_that_was_kept_is_read_without_a_panic() {
    for (target, _) in metcd::fuzzing::TARGETS {
        let files = fs::read_dir(corpus(target)).unwrap_or_else(|e| panic!("fuzz/corpus/{target}: {e}"));
        let mut inputs = 0;
        for file in files {
            let path = file.unwrap().path();
            let data = fs::read(&path).unwrap();
            // A panic shows which file it was.
            println!("{}", path.display());
            assert!(metcd::fuzzing::run(target, &data));
            inputs += 1;
        }
        assert!(inputs > 0, "fuzz/corpus/{target} is empty");
    }
}

/// The fuzzers are a package of their own with a lock file of its own. A dependency that is added here makes it stale, and
/// `scripts/fuzz`, which no test runs, would refuse to build.
#[test]
fn the_fuzzers_lock_file_knows_every_dependency() {
    let read = |name: &str| -> toml::Table {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        text.parse().unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    };
    let (manifest, lock) = (read("Cargo.toml"), read("fuzz/Cargo.lock"));
    let mut wanted: Vec<&str> = Vec::new();
    for (name, dependency) in manifest["dependencies"].as_table().unwrap() {
        if dependency.get("optional").is_none() {
            wanted.push(name);
        }
    }
    let packages = lock["package"].as_array().unwrap();
    let own = packages.iter().find(|package| package["name"].as_str() == Some("metcd")).unwrap();
    // A name stands alone, or with its version where there are several.
    let dependencies = own["dependencies"].as_array().unwrap().iter();
    let mut locked: Vec<&str> = dependencies.filter_map(|name| name.as_str()?.split(' ').next()).collect();
    wanted.sort_unstable();
    locked.sort_unstable();
    assert_eq!(locked, wanted, "run: cargo update --workspace --manifest-path fuzz/Cargo.toml");
}

/// Mutations of each input in CI; `FUZZ_MUTATIONS` asks for another number.
const MUTATIONS: u64 = 60;

/// A generator whose sequence the seed decides.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % bound.max(1) as u64) as usize
    }
}

/// A few small changes: a flipped bit, another byte, a piece that is cut out, doubled or taken from another input.
fn mutated(input: &[u8], other: &[u8], random: &mut Random) -> Vec<u8> {
    let mut data = input.to_vec();
    for _ in 0..1 + random.below(4) {
        let at = random.below(data.len() + 1);
        let length = random.below((data.len() - at + 1).min(16));
        match random.below(5) {
            0 => {
                if let Some(byte) = data.get_mut(at) {
                    *byte ^= 1 << random.below(8);
                }
            }
            1 => {
                if let Some(byte) = data.get_mut(at) {
                    *byte = [0, 1, 0x7f, 0x80, 0xff, b'"', b'%', random.below(256) as u8][random.below(8)];
                }
            }
            2 => drop(data.drain(at..at + length)),
            3 => {
                let piece = data[at..at + length].to_vec();
                data.splice(at..at, piece);
            }
            _ => {
                let from = random.below(other.len() + 1);
                let piece = other[from..(from + 16).min(other.len())].to_vec();
                data.splice(at..at, piece);
            }
        }
    }
    data
}

#[test]
fn every_small_change_of_an_input_is_read_without_a_panic() {
    let mutations = std::env::var("FUZZ_MUTATIONS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(MUTATIONS);
    for (target, run) in metcd::fuzzing::TARGETS {
        let mut paths: Vec<PathBuf> = fs::read_dir(corpus(target)).unwrap().map(|file| file.unwrap().path()).collect();
        paths.sort();
        let inputs: Vec<Vec<u8>> = paths.iter().map(|path| fs::read(path).unwrap()).collect();
        for (input, path) in inputs.iter().zip(&paths) {
            for seed in 0..mutations {
                let mut random = Random(seed);
                let other = &inputs[random.below(inputs.len())];
                let data = mutated(input, other, &mut random);
                let outcome = std::panic::catch_unwind(|| run(&data));
                assert!(outcome.is_ok(), "{}, mutation {seed}: {data:?}", path.display());
            }
        }
    }
}

#[test]
fn what_the_fuzzers_found_is_read_without_a_panic() {
    for (target, run) in metcd::fuzzing::TARGETS {
        let packed = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("fuzz/found")
            .join(format!("{target}.tar.gz"));
        let place = tempfile::tempdir().unwrap();
        let unpacked = Program::new("tar").arg("-xzf").arg(&packed).arg("-C").arg(place.path()).status();
        assert!(unpacked.unwrap().success(), "{}", packed.display());
        let mut inputs = 0;
        for file in fs::read_dir(place.path()).unwrap() {
            let path = file.unwrap().path();
            let data = fs::read(&path).unwrap();
            let outcome = std::panic::catch_unwind(|| run(&data));
            assert!(outcome.is_ok(), "{target}: {}: {data:?}", path.display());
            inputs += 1;
        }
        assert!(inputs > 100, "{target}: {inputs} inputs");
    }
}

#[test]
fn every_target_has_a_program_of_its_own() {
    let programs = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/fuzz_targets");
    let mut names: Vec<String> = fs::read_dir(programs)
        .unwrap()
        .map(|file| file.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned())
        .collect();
    names.sort();
    let mut known: Vec<&str> = metcd::fuzzing::TARGETS.iter().map(|(name, _)| *name).collect();
    known.sort_unstable();
    assert_eq!(names, known);
}

fn write(target: &str, name: &str, data: &[u8]) {
    let dir = corpus(target);
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join(name), data).unwrap();
}

#[test]
#[ignore = "writes the first corpora"]
fn write_the_first_corpora() {
    peer_messages();
    wal_records();
    snapshot_stream();
    commands();
    texts();
}

fn entry(index: u64, term: u64) -> Entry {
    Entry {
        index,
        term,
        data: payload(vec![put("k", "v")]).into(),
        context: vec![0, 0, 0, 0, 0, 0, 1, 0].into(),
        ..Entry::default()
    }
}

fn peer_messages() {
    use MessageType::*;
    let kinds = [
        MsgAppend,
        MsgAppendResponse,
        MsgRequestVote,
        MsgRequestVoteResponse,
        MsgRequestPreVote,
        MsgRequestPreVoteResponse,
        MsgHeartbeat,
        MsgHeartbeatResponse,
        MsgTimeoutNow,
        MsgReadIndex,
        MsgReadIndexResp,
        MsgPropose,
        MsgTransferLeader,
    ];
    let message = |kind: MessageType| {
        let mut message = Message {
            from: 1,
            to: 2,
            term: if matches!(kind, MsgPropose | MsgReadIndex) { 0 } else { 2 },
            index: 1,
            log_term: 1,
            commit: 1,
            ..Message::default()
        };
        message.set_msg_type(kind);
        match kind {
            MsgAppend => message.set_entries(vec![entry(2, 2), entry(3, 2)].into()),
            MsgReadIndex | MsgReadIndexResp | MsgPropose => message.set_entries(vec![entry(0, 0)].into()),
            _ => {}
        }
        message
    };
    let frame = |out: &mut Vec<u8>, message: &Message| {
        let bytes = message.write_to_bytes().unwrap();
        prost::encoding::encode_varint(bytes.len() as u64, out);
        out.extend_from_slice(&bytes);
    };
    for (role, name) in [(0, "follower"), (1, "candidate"), (2, "leader")] {
        let mut all = vec![role];
        for kind in kinds {
            let mut one = vec![role];
            frame(&mut one, &message(kind));
            frame(&mut all, &message(kind));
            write("peer_messages", &format!("{name}-{kind:?}"), &one);
        }
        write("peer_messages", &format!("{name}-all"), &all);
    }
}

fn wal_records() {
    let mut data = 7u64.to_le_bytes().to_vec();
    data.extend_from_slice(&3u64.to_le_bytes());
    data.extend_from_slice(&entry(7, 3).write_to_bytes().unwrap());
    write("wal_records", "entry", &data);
    let mut meta = 0u64.to_le_bytes().to_vec();
    meta.extend_from_slice(&1u32.to_le_bytes());
    (1..=9u64).for_each(|number| meta.extend_from_slice(&number.to_le_bytes()));
    write("wal_records", "meta", &meta);
    let mut unit = 0u64.to_le_bytes().to_vec();
    // seq, kind, from, to, meta, one record.
    unit.extend_from_slice(&9u64.to_le_bytes());
    unit.extend_from_slice(&1u32.to_le_bytes());
    unit.extend_from_slice(&2u64.to_le_bytes());
    unit.extend_from_slice(&5u64.to_le_bytes());
    unit.extend_from_slice(&2u32.to_le_bytes());
    unit.extend_from_slice(b"mm");
    unit.extend_from_slice(&1u32.to_le_bytes());
    unit.extend_from_slice(&2u64.to_le_bytes());
    unit.extend_from_slice(&3u32.to_le_bytes());
    unit.extend_from_slice(b"rec");
    write("wal_records", "unit", &unit);
}

fn founded() -> State {
    let mut state = State::open(Arc::new(MemoryStore::new())).unwrap();
    let member = |id: u64| MemberRecord {
        id,
        peer_url: format!("http://machine-{id}:3380"),
        ..MemberRecord::default()
    };
    state.bootstrap(7, &[member(1), member(2), member(3)]).unwrap();
    state
}

fn command(seq: u64, body: Body) -> Command {
    Command {
        seq,
        idempotency: seq.is_multiple_of(2).then(|| Idempotency {
            key: format!("key-{seq}"),
            fingerprint: Bytes::from_static(b"f"),
            max_entries: 100,
            max_bytes: 1 << 20,
        }),
        body: Some(body),
    }
}

fn put(key: &str, value: &str) -> Body {
    Body::Put(Put {
        key: key.to_owned().into(),
        value: value.to_owned().into(),
        ..Put::default()
    })
}

fn payload(bodies: Vec<Body>) -> Vec<u8> {
    EntryPayload {
        feature_level: FEATURE_LEVEL,
        member: 1,
        boot: 1,
        low_water: 1,
        commands: (1..).zip(bodies).map(|(seq, body)| command(seq, body)).collect(),
    }
    .encode_to_vec()
}

fn bodies() -> Vec<Body> {
    let op = |key: &str| TxnOp {
        body: Some(TxnOpBody::Put(Put {
            key: key.to_owned().into(),
            ..Put::default()
        })),
    };
    vec![
        put("a", "1"),
        put("a", "2"),
        put("b", "3"),
        Body::LeaseGrant(LeaseGrant { ttl_ms: 500, id: 9 }),
        Body::Put(Put {
            key: "leased".into(),
            lease: 9,
            ..Put::default()
        }),
        Body::Txn(Txn {
            compare: Vec::new(),
            then: vec![op("x"), op("y")],
            or_else: vec![op("z")],
            ..Txn::default()
        }),
        Body::Delete(Delete {
            key: "b".into(),
            conditions: None,
            want_prev: true,
        }),
        Body::DeleteRange(DeleteRange {
            span: KeySpan::prefix(b"x"),
            max_keys: 10,
        }),
        Body::LeaseRevoke(LeaseRevoke { id: 9 }),
        Body::Compact(metcd::state::command::Compact { revision: 3 }),
    ]
}

fn commands() {
    let mut all = Vec::new();
    for (number, body) in bodies().into_iter().enumerate() {
        let data = payload(vec![body]);
        let mut one = (data.len() as u16).to_le_bytes().to_vec();
        one.extend_from_slice(&data);
        write("commands", &format!("body-{number}"), &one);
    }
    let data = payload(bodies());
    all.extend_from_slice(&(data.len() as u16).to_le_bytes());
    all.extend_from_slice(&data);
    write("commands", "all", &all);
    let change = MembershipChange {
        add: vec![MemberRecord {
            id: 4,
            peer_url: "http://machine-4:3380".into(),
            ..MemberRecord::default()
        }],
        ..MembershipChange::default()
    };
    let mut conf = ConfChangeV2 {
        context: change.encode_to_vec().into(),
        ..ConfChangeV2::default()
    };
    conf.set_changes(
        vec![ConfChangeSingle {
            change_type: ConfChangeType::AddLearnerNode,
            node_id: 4,
            ..ConfChangeSingle::default()
        }]
        .into(),
    );
    let data = conf.write_to_bytes().unwrap();
    let mut one = (data.len() as u16 | 0x8000).to_le_bytes().to_vec();
    one.extend_from_slice(&data);
    write("commands", "conf", &one);
}

fn snapshot_stream() {
    let mut state = founded();
    let entry = Entry {
        index: 2,
        term: 2,
        data: payload(bodies()).into(),
        ..Entry::default()
    };
    state.apply(&[entry]).unwrap();
    let mut writer = SnapshotWriter::new(state.snapshot_view());
    let mut pieces: Vec<Bytes> = Vec::new();
    while let Some(piece) = writer.next_chunk().unwrap() {
        pieces.push(piece);
    }
    write("snapshot_stream", "whole", &pieces.concat());
    // Without the magic and the frames' heads: what the target seals itself.
    const FRAME_HEAD: usize = 9;
    let (header, chunk) = (&pieces[0][8 + FRAME_HEAD..], &pieces[1][FRAME_HEAD..]);
    let mut bare = (header.len() as u16).to_le_bytes().to_vec();
    bare.extend_from_slice(header);
    bare.extend_from_slice(chunk);
    write("snapshot_stream", "bare", &bare);
}

fn texts() {
    let inputs: &[(&str, &[(&str, &str)])] = &[
        (
            "urls",
            &[
                ("key", "/a%2Fb/c?revision=3&consistency=serializable&timeout=2s"),
                ("long", "/v1/kv/%ff%00?ttl=1m&lease=7&prev=true"),
                (
                    "list",
                    "/v1/kv?prefix=a/&limit=10&after=AQAAAAAAAAAHAAAAAAAAAANh&order=desc&keys_only",
                ),
                ("watch", "/v1/watch?start=a&end=b&from_revision=2&only=put"),
                ("lease", "/v1/leases/7/keepalive?timeout=500ms"),
                ("member", "/members/3/promote"),
            ],
        ),
        (
            "json_bodies",
            &[
                (
                    "txn",
                    r#"{"compare":[{"key":"a","target":"value","op":"=","value":"1"},{"key_base64":"/w==","target":"lease","op":">","value":"7"}],"then":[{"put":{"key":"a","value":"2"}},{"get":{"prefix":"a","limit":3,"order":"desc"}}],"else":[{"delete":{"start":"a","end":"b"}}]}"#,
                ),
                ("grant", r#"{"ttl":1.5}"#),
                (
                    "add",
                    r#"{"id":4,"peer_url":"http://a:1","client_url":"http://b:2","name":"n","role":"learner","incarnation":"7"}"#,
                ),
                ("replace", r#"{"remove":1,"add":{"peer_url":"http://[::1]:1"}}"#),
                ("update", r#"{"peer_url":"http://a:1"}"#),
                ("transfer", r#"{"id":2}"#),
                ("compact", r#"{"revision":9}"#),
                ("call-keep-alive", r#"{"keep_alive":{"lease":7}}"#),
                (
                    "call-replace",
                    r#"{"replace":{"remove":1,"add":{"id":null,"peer_url":"http://a:1","client_url":null,"name":"n","voter":true,"incarnation":null}}}"#,
                ),
                ("call-progress", r#""progress""#),
                (
                    "table",
                    r#"{"cluster_id":"c1","applied_index":9,"members":[{"id":1,"peer_url":"http://a:1","client_url":"","name":"","incarnation":7,"wanted_role":1,"replaces":0,"feature_level":1}],"removed":[3],"departed":[3]}"#,
                ),
                ("answer-lease", r#"{"Ok":{"lease":{"ttl_ms":1000,"remaining_ms":1}}}"#),
                (
                    "answer-conflict",
                    r#"{"Err":{"conflict":{"code":"change_in_progress","detail":"d"}}}"#,
                ),
            ],
        ),
        (
            "headers",
            &[
                ("conditions", "if-match: \"7\", W/\"8-json\"\nif-none-match: *"),
                ("resume", "last-event-id: 42"),
                ("accept", "accept: application/json;q=0.5, */*\naccept: application/x-ndjson"),
                (
                    "peer",
                    "metcd-peer: cluster=00000000000000c1;from=1;incarnation=0000000000000007;to=2\nmetcd-stream: 1.2.3",
                ),
            ],
        ),
        (
            "config_file",
            &[
                (
                    "small",
                    "[node]\nid = 2\n[raft]\ntick = \"50ms\"\n[limits]\nmax_value_bytes = \"2MiB\"\n",
                ),
                (
                    "cluster",
                    "[node]\nid = 1\nname = \"n\"\n[cluster]\nmembers = [\"1=http://a:1\", \"2=http://b:2\"]\n[log]\nrotation = \"daily\"\n",
                ),
            ],
        ),
    ];
    for (target, texts) in inputs {
        for (name, text) in *texts {
            write(target, name, text.as_bytes());
        }
    }
    write("config_file", "defaults", metcd::config::DEFAULTS.as_bytes());
}
