//! The configuration as a user meets it: layers, messages, the documented file.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use metcd::config::{self, Config, ConfigError, DEFAULTS, Flag, FlagValue, Loaded, LogPeriod, Sources, WalEngine};

/// Loads `text` as a file named `node.toml`, under the given environment and `section.key=value` settings.
fn load(text: &str, env: &[(&str, &str)], sets: &[&str]) -> Result<Loaded, ConfigError> {
    let directory = tempfile::tempdir().expect("tempdir");
    let file = directory.path().join("node.toml");
    std::fs::write(&file, text).expect("write");
    let env = env
        .iter()
        .map(|(name, value)| (OsString::from(name), OsString::from(value)))
        .collect();
    let flags = sets
        .iter()
        .map(|set| {
            let (path, value) = set.split_once('=').expect("section.key=value");
            Flag {
                path: path.to_owned(),
                value: FlagValue::Text(value.to_owned()),
                origin: format!("--set {path}"),
            }
        })
        .collect();
    config::load(&Sources {
        file: Some(file),
        env,
        flags,
    })
}

/// The first problem as `place: message`, the directory of the file cut off.
fn refusal(text: &str, env: &[(&str, &str)], sets: &[&str]) -> String {
    refusals(text, env, sets).swap_remove(0)
}

fn refusals(text: &str, env: &[(&str, &str)], sets: &[&str]) -> Vec<String> {
    let error = load(text, env, sets).expect_err("must be refused");
    let short = |origin: &str| {
        Path::new(origin)
            .file_name()
            .map_or(origin.to_owned(), |name| name.to_string_lossy().into_owned())
    };
    error
        .problems
        .iter()
        .map(|problem| format!("{}: {}", short(&problem.origin), problem.message))
        .collect()
}

#[test]
fn nothing_given_is_a_working_single_node() {
    let loaded = config::load(&Sources::default()).expect("defaults");
    let config = loaded.config;
    assert_eq!(config, Config::default());
    assert_eq!(loaded.warnings, Vec::<String>::new());
    assert_eq!((config.node.id, config.name().as_deref()), (Some(1), Some("node1")));
    assert_eq!(config.node.data_dir, PathBuf::from("metcd-data"));
    assert_eq!(
        (config.listen.client.to_string(), config.listen.peer.to_string()),
        ("127.0.0.1:3379".into(), "127.0.0.1:3380".into())
    );
    assert_eq!(config.advertise.client_url, "http://127.0.0.1:3379");
    assert_eq!(config.cluster.members.len(), 1);
    assert_eq!(config.cluster.members[0].peer_url, "http://127.0.0.1:3380");
    assert_eq!(
        (config.raft.tick, config.raft.heartbeat_ticks, config.raft.election_ticks),
        (Duration::from_millis(50), 2, 20)
    );
    assert_eq!((config.raft.snapshot_entries, config.raft.keep_entries), (100_000, 10_000));
    assert_eq!(
        (config.history.retain, config.history.retain_revisions),
        (Duration::from_secs(3600), 1_000_000)
    );
    assert_eq!(
        (
            config.limits.max_value_bytes,
            config.limits.max_request_bytes,
            config.limits.max_range_delete
        ),
        (1 << 20, 8 << 20, 100_000)
    );
    assert_eq!(
        (config.limits.request_timeout, config.limits.max_timeout),
        (Duration::from_secs(5), Duration::from_secs(60))
    );
    assert_eq!(config.idempotency.retain, Duration::from_secs(600));
    assert_eq!(
        (config.wal.engine, config.wal.sync, config.store.backend.name()),
        (WalEngine::Sled, true, "memory")
    );
    let rotation = config.log.rotation;
    assert_eq!(
        (rotation.period, rotation.max_bytes, config.log.keep_files),
        (Some(LogPeriod::Daily), None, 14)
    );
}

#[test]
fn later_layers_win_key_by_key() {
    let file = "[node]\nname = \"file\"\n[raft]\ntick = \"20ms\"\nheartbeat_ticks = 3\nelection_ticks = 30\n";
    let env = [
        ("METCD__RAFT__HEARTBEAT_TICKS", "4"),
        ("METCD__RAFT__ELECTION_TICKS", "40"),
        ("METCD_ENDPOINTS", "http://a:1"),
        ("PATH", "/"),
    ];
    let loaded = load(file, &env, &["raft.election_ticks=50"]).expect("load");
    let raft = &loaded.config.raft;
    assert_eq!(
        (raft.tick, raft.heartbeat_ticks, raft.election_ticks),
        (Duration::from_millis(20), 4, 50)
    );
    assert_eq!(loaded.config.node.name.as_deref(), Some("file"));
    assert!(loaded.origins["raft.tick"].ends_with("node.toml:4"));
    assert_eq!(loaded.origins["raft.heartbeat_ticks"], "METCD__RAFT__HEARTBEAT_TICKS");
    assert_eq!(loaded.origins["raft.election_ticks"], "--set raft.election_ticks");
}

#[test]
fn an_unknown_key_names_file_line_and_the_nearest_key() {
    assert_eq!(
        refusal("[raft]\n\ntik = \"50ms\"\n", &[], &[]),
        "node.toml:3: unknown key \"raft.tik\": did you mean \"raft.tick\"?"
    );
    assert_eq!(
        refusal("# x\n[rafft]\ntick = \"50ms\"\n", &[], &[]),
        "node.toml:2: unknown section [rafft]: did you mean [raft]?"
    );
    assert_eq!(
        refusal("data_dir = \"d\"\n", &[], &[]),
        "node.toml:1: \"data_dir\" is not a section: did you mean \"node.data_dir\"?"
    );
    assert!(refusal("[NODE]\nid = 1\n", &[], &[]).ends_with("unknown section [NODE]: did you mean [node]?"));
    assert!(refusal("", &[], &["RAFT.TICK=100ms"]).ends_with("did you mean \"raft.tick\"?"));
    assert!(refusal("[wal]\nengine = \"SLED\"\n", &[], &[]).ends_with("(did you mean \"sled\"?)"));
}

#[test]
fn unknown_and_bad_variables_and_flags_are_named() {
    assert_eq!(
        refusal("", &[("METCD__RAFT__TICKS", "50ms")], &[]),
        "METCD__RAFT__TICKS: unknown key \"raft.ticks\": did you mean \"raft.tick\"?"
    );
    assert_eq!(
        refusal("", &[("METCD__NODE__ID", "one")], &[]),
        "METCD__NODE__ID: expected a whole number, found \"one\""
    );
    assert_eq!(
        refusal(
            "",
            &[("METCD_RAFT_TICK", "50ms"), ("METCD_ENDPOINTS", "http://127.0.0.1:3379")],
            &[]
        ),
        "METCD_RAFT_TICK: two underscores stand between the parts of a setting's name: did you mean METCD__RAFT__TICK?"
    );
    assert_eq!(
        refusal("", &[], &["wal.sync=maybe"]),
        "--set wal.sync: expected true or false, found \"maybe\""
    );
    assert_eq!(
        refusal("", &[], &["raft.tick=50ms", "raft.tick=60ms"]),
        "--set raft.tick: raft.tick is already given by --set raft.tick"
    );
}

#[test]
fn a_value_out_of_range_names_file_line_and_range() {
    assert_eq!(
        refusal("[raft]\ntick = \"5ms\"", &[], &[]),
        "node.toml:2: raft.tick: 5ms is out of range: allowed is 10ms to 1s"
    );
    assert_eq!(
        refusal("[limits]\nmax_timeout = 60", &[], &[]),
        "node.toml:2: limits.max_timeout: expected a duration with its unit, like \"10s\", found the number 60"
    );
    for number in ["-1", "18446744073709551616", "9223372036854775807"] {
        let id = refusal("", &[("METCD__NODE__ID", number)], &[]);
        assert_eq!(
            id,
            format!("METCD__NODE__ID: {number} is out of range: allowed is 1 to 9007199254740991")
        );
    }
    let election = refusal("[raft]\nheartbeat_ticks = 20\n", &[], &[]);
    assert_eq!(
        election,
        "node.toml:2: raft.election_ticks = 20 must be more than raft.heartbeat_ticks = 20: allowed here is 21 to 1000"
    );
}

#[test]
fn every_problem_of_a_file_is_found_at_once_in_order() {
    let found = refusals(
        "[raft]\ntick = \"5ms\"\ntok = 1\n[wal]\nengine = \"leveldb\"\n[http]\nallowed_hosts = [\n  \"a\",\n  \"b/c\",\n]\n",
        &[],
        &[],
    );
    let places: Vec<&str> = found.iter().filter_map(|problem| problem.split(": ").next()).collect();
    assert_eq!(places, ["node.toml:2", "node.toml:3", "node.toml:5", "node.toml:9"], "{found:#?}");
}

#[test]
fn broken_toml_and_a_key_given_twice_name_the_line() {
    assert!(refusal("[raft]\ntick = \n", &[], &[]).starts_with("node.toml:2: not valid TOML"));
    assert!(refusal("[raft]\ntick = \"20ms\"\ntick = \"30ms\"\n", &[], &[]).starts_with("node.toml:3: not valid TOML"));
}

#[test]
fn tls_users_and_https_peers_are_refused_until_they_are_built() {
    for (text, line) in [
        ("[tls.client]\ncert = \"a\"", 1),
        ("\n[tls.peer]\ncert = \"a\"", 2),
        // The key itself is named, not the section it stands in.
        ("[auth]\nusers = []", 2),
        ("tls.client.cert = 1", 1),
    ] {
        let refused = refusal(text, &[], &[]);
        assert!(
            refused.starts_with(&format!("node.toml:{line}: ")) && refused.contains("not built yet"),
            "{refused}"
        );
    }
    assert!(refusal("", &[("METCD__TLS__CLIENT__CERT", "a")], &[]).contains("not built yet"));
    assert!(refusal("", &[], &["auth.users=a"]).contains("not built yet"));
    assert!(refusal("[advertise]\npeer_url = \"https://a:1\"", &[], &[]).contains("TLS is not built yet"));
    assert!(refusal("[advertise]\nclient_url = \"https://a:1\"", &[], &[]).contains("TLS is not built yet"));
    assert!(refusal("[cluster]\nmembers = [{ id = 1, peer_url = \"https://a:1\" }]", &[], &[]).contains("TLS is not built yet"));
}

#[test]
fn an_open_listener_warns_and_a_wildcard_needs_an_advertised_address() {
    let refused = refusal("[listen]\npeer = \"0.0.0.0:3380\"", &[], &[]);
    assert!(
        refused.starts_with("node.toml:2: ") && refused.contains("--advertise-peer-url"),
        "{refused}"
    );
    assert!(refusal("", &[], &["listen.client=127.0.0.1:0"]).contains("set advertise.client_url"));
    for wildcard in ["[::]", "0.0.0.0", "[::ffff:0.0.0.0]"] {
        assert!(refusal(&format!("[advertise]\nclient_url = \"http://{wildcard}:3379\""), &[], &[]).contains("wildcard"));
        assert!(refusal("", &[], &[&format!("listen.peer={wildcard}:3380")]).contains("set advertise.peer_url"));
    }
    assert!(refusal("[advertise]\nclient_url = \"http://a:0\"", &[], &[]).contains("port 0"));
    let open = load(
        "[listen]\npeer = \"0.0.0.0:3380\"\n[advertise]\npeer_url = \"http://10.0.0.1:3380\"",
        &[],
        &[],
    )
    .expect("load");
    assert!(
        open.warnings
            .iter()
            .any(|w| w.starts_with("listen.peer = \"0.0.0.0:3380\" is open to other machines")),
        "{:?}",
        open.warnings
    );
    let chosen = load("", &[], &["listen.client=127.0.0.1:0", "advertise.client_url=http://127.0.0.1:9"]).expect("load");
    assert_eq!(chosen.config.advertise.client_url, "http://127.0.0.1:9");
}

const THREE: &str =
    "members = [{ id = 3, peer_url = \"http://c:1\" }, { id = 1, peer_url = \"http://a:1/\" }, { id = 2, peer_url = \"http://b:1\" }]";

#[test]
fn founding_members_are_sorted_and_give_the_advertised_address() {
    let loaded = load(&format!("[node]\nid = 2\n[cluster]\n{THREE}"), &[], &[]).expect("load");
    let ids: Vec<u64> = loaded.config.cluster.members.iter().map(|member| member.id).collect();
    assert_eq!(ids, [1, 2, 3]);
    assert_eq!(loaded.config.cluster.members[0].peer_url, "http://a:1");
    assert_eq!(loaded.config.advertise.peer_url, "http://b:1");
    assert!(
        loaded.warnings.iter().any(|w| w.contains("listen.peer has port 3380")),
        "{:?}",
        loaded.warnings
    );
}

#[test]
fn founding_members_that_do_not_fit_are_refused() {
    let cluster = format!("[cluster]\n{THREE}");
    assert!(refusal(&cluster, &[], &[]).contains("set node.id (--id) to say which"));
    assert_eq!(
        refusal(&cluster, &[], &["node.id=4"]),
        "--set node.id: node.id = 4 is not in cluster.members (ids 1, 2, 3): set node.id (--id) to this member's, or add it there"
    );
    let twice = |second: &str| {
        refusal(
            &format!("[cluster]\nmembers = [{{ id = 1, peer_url = \"http://a:1\" }}, {second}]"),
            &[],
            &["node.id=1"],
        )
    };
    assert!(twice("{ id = 1, peer_url = \"http://b:1\" }").contains("the id 1 twice"));
    assert!(twice("{ id = 2, peer_url = \"http://a:1/\" }").contains("the peer_url \"http://a:1\" twice"));
    assert!(twice("{ id = 0, peer_url = \"http://b:1\" }").contains("allowed is the id 1 to"));
    assert!(twice("{ id = 2, url = \"http://b:1\" }").contains("not \"url\""));
    assert!(twice("{ id = 2 }").contains("member 2 needs a peer_url"));
}

#[test]
fn members_and_joins_come_from_every_layer() {
    let env = [("METCD__CLUSTER__MEMBERS", "1=http://a:1,2=http://b:1"), ("METCD__NODE__ID", "2")];
    assert_eq!(load("", &env, &[]).expect("env").config.cluster.members.len(), 2);
    let inline = "cluster.members=[{id = 1, peer_url = \"http://a:1\"}, {id = 2, peer_url = \"http://b:1\"}]";
    assert_eq!(load("", &[], &[inline, "node.id=1"]).expect("set").config.cluster.members.len(), 2);
    let joining = load("", &[("METCD__CLUSTER__JOIN", "http://a:1, http://b:1/")], &[])
        .expect("join")
        .config;
    assert_eq!(joining.cluster.join, ["http://a:1", "http://b:1"]);
    assert_eq!(
        (joining.node.id, joining.cluster.members.len()),
        (None, 0),
        "a joiner without an id is given one"
    );
    assert_eq!(
        load("[node]\nid = 4", &[], &["cluster.join=http://a:1"])
            .expect("join")
            .config
            .node
            .id,
        Some(4)
    );
}

#[test]
fn what_is_dangerous_is_said_at_every_start() {
    let warnings = |sets: &[&str]| load("", &[], sets).expect("load").warnings.join("\n");
    assert!(warnings(&["wal.sync=false"]).contains("acknowledged writes can be lost"));
    assert!(warnings(&["raft.election_ticks=5"]).contains("less than five heartbeats"));
    assert!(warnings(&["cluster.members=1=http://127.0.0.1:3380", "cluster.join=http://a:1"]).contains("cluster.members is ignored"));
}

/// `config/metcd.toml` with the commented-out keys set as its comments say.
fn documented() -> String {
    let is_setting = |line: &str| {
        let name = line.split(" = ").next().unwrap_or_default();
        line.contains(" = ") && !name.is_empty() && name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')
    };
    let mut in_list = false;
    let mut text = String::new();
    for line in DEFAULTS.lines() {
        let bare = line.strip_prefix("# ").unwrap_or(line);
        in_list = (in_list || bare == "members = [") && !(in_list && bare == "]");
        let uncomment = in_list || bare == "]" || is_setting(bare);
        text.push_str(if uncomment { bare } else { line });
        text.push('\n');
    }
    text
}

#[test]
fn the_documented_file_has_every_key_and_says_the_defaults() {
    let all = documented();
    let table: toml::Table = toml::from_str(&all).expect("the uncommented file is TOML");
    let shown: toml::Table = toml::from_str(&config::show(&load(&all, &[], &[]).expect("load"))).expect("show is TOML");
    for (section, keys) in &shown {
        for name in keys.as_table().expect("a section").keys() {
            assert!(table[section].get(name).is_some(), "{section}.{name} is not in config/metcd.toml");
        }
    }
    assert!(
        !config::show(&load(&all, &[], &[]).expect("load")).contains("is not set"),
        "every key has a value there"
    );
    assert_eq!(load(DEFAULTS, &[], &[]).expect("load").config.raft, Config::default().raft);
}

#[test]
fn what_show_prints_is_the_same_configuration_when_read_again() {
    let file = format!(
        "[node]\nid = 3\nname = \"three\"\n[cluster]\n{THREE}\n[log]\nrotation = \"hourly,100MiB\"\ndirectory = \"/tmp/x\"\n[http]\nallowed_hosts = [\"KV.example\"]\n"
    );
    let first = load(&file, &[("METCD__LIMITS__MAX_VALUE_BYTES", "2MiB")], &["history.retain=1h30m"]).expect("load");
    let again = load(&config::show(&first), &[], &[]).expect("what show prints");
    assert_eq!(first.config, again.config);
    assert!(config::show(&first).contains("max_value_bytes = \"2MiB\"  # METCD__LIMITS__MAX_VALUE_BYTES"));
}

/// A value that differs from the default, for each key.
const OTHER: &[(&str, &str)] = &[
    ("node.id", "1"),
    ("node.name", "other"),
    ("node.data_dir", "other"),
    ("listen.client", "127.0.0.1:17"),
    ("listen.peer", "127.0.0.1:18"),
    ("advertise.client_url", "http://other:1"),
    ("advertise.peer_url", "http://other:2"),
    ("cluster.name", "other"),
    ("cluster.members", "1=http://other:3"),
    ("cluster.join", "http://other:4"),
    ("raft.tick", "51ms"),
    ("raft.heartbeat_ticks", "3"),
    ("raft.election_ticks", "21"),
    ("raft.max_inflight", "7"),
    ("raft.max_message_bytes", "2MiB"),
    ("raft.proposal_queue", "7"),
    ("raft.snapshot_entries", "7"),
    ("raft.keep_entries", "7"),
    ("wal.engine", "raft-engine"),
    ("wal.sync", "false"),
    ("store.backend", "sled"),
    ("history.retain", "7s"),
    ("history.retain_revisions", "7"),
    ("limits.max_value_bytes", "7"),
    ("limits.max_txn_ops", "7"),
    ("limits.max_request_bytes", "7KiB"),
    ("limits.max_range_delete", "7"),
    ("limits.max_stream", "7s"),
    ("limits.min_free_disk", "7"),
    ("limits.max_store_bytes", "7"),
    ("limits.max_connections", "7"),
    ("limits.max_watchers", "7"),
    ("limits.request_timeout", "7s"),
    ("limits.max_timeout", "7s"),
    ("limits.header_timeout", "7s"),
    ("idempotency.retain", "7s"),
    ("idempotency.max_entries", "7"),
    ("http.allowed_origins", "http://other"),
    ("http.allowed_hosts", "other"),
    ("log.level", "debug"),
    ("log.format", "json"),
    ("log.directory", "other"),
    ("log.rotation", "never"),
    ("log.keep_files", "7"),
    ("log.access_log", "true"),
];

#[test]
fn every_key_reaches_the_configuration() {
    let lines = config::show(&config::load(&Sources::default()).expect("defaults"))
        .lines()
        .filter(|line| line.contains('=') || line.ends_with("not set"))
        .count();
    assert_eq!(lines, OTHER.len(), "a key is missing in this test");
    for (path, value) in OTHER {
        let changed = load("", &[], &[&format!("{path}={value}")]).expect(path).config;
        assert_ne!(changed, Config::default(), "{path} = {value} changes nothing");
    }
}

#[test]
fn the_three_node_files_are_one_cluster() {
    let load = |n: u64| {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("config/node{n}.toml"));
        config::load(&Sources {
            file: Some(file),
            ..Sources::default()
        })
        .expect("node file")
    };
    for (id, client, peer) in [(1, 3379, 3380), (2, 4379, 4380), (3, 5379, 5380)] {
        let Loaded { config, warnings, .. } = load(id);
        assert_eq!(
            (config.node.id, config.listen.client.port(), config.listen.peer.port()),
            (Some(id), client, peer)
        );
        assert_eq!(config.cluster, load(1).config.cluster);
        assert_eq!(config.advertise.peer_url, format!("http://127.0.0.1:{peer}"));
        assert_eq!(warnings, Vec::<String>::new());
    }
}
