//! The program as a shell meets it: exit codes, one line on stderr, help.

use std::process::{Command, Output};

fn metcd(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_metcd"));
    command.args(args).env_clear().output().expect("the program runs")
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("UTF-8")
}

/// Asserts the exit code and that stderr is one line; returns that line.
fn fails_with(code: i32, args: &[&str]) -> String {
    let output = metcd(args);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {text}");
    assert_eq!(text.lines().count(), 1, "{args:?}: {text}");
    text
}

#[test]
fn help_has_examples_and_goes_to_stdout() {
    for args in [
        &["--help"][..],
        &["serve", "--help"],
        &["config", "check", "--help"],
        &["config", "show", "--help"],
        &["completions", "--help"],
    ] {
        let output = metcd(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert!(stdout(&output).contains("Example"), "{args:?}");
    }
}

#[test]
fn version_is_given_by_flag_and_command() {
    assert_eq!(stdout(&metcd(&["--version"])), concat!("metcd ", env!("CARGO_PKG_VERSION"), "\n"));
    assert!(stdout(&metcd(&["version"])).starts_with(concat!("metcd ", env!("CARGO_PKG_VERSION"), "\n")));
}

#[test]
fn version_is_given_as_json_too() {
    let answer: serde_json::Value = serde_json::from_str(&stdout(&metcd(&["version", "--output", "json"]))).unwrap();
    assert_eq!(answer["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(answer["wal_engines"][0], "sled");
    assert!(stdout(&metcd(&["version", "-o", "table"])).starts_with("VERSION"));
}

#[test]
fn help_lists_the_flags_that_the_command_takes() {
    for (args, takes) in [
        (&["serve", "--help"][..], &[][..]),
        (&["config", "show", "--help"], &[]),
        (&["wal", "verify", "--help"], &[]),
        (&["version", "--help"], &["--output"]),
        (&["get", "--help"], &["--output", "--endpoints", "--timeout", "--serializable"]),
        (
            &["member", "list", "--help"],
            &["--output", "--endpoints", "--timeout", "--serializable"],
        ),
    ] {
        let help = stdout(&metcd(args));
        for flag in ["--output", "--endpoints", "--timeout", "--serializable"] {
            assert_eq!(help.contains(flag), takes.contains(&flag), "{args:?} {flag}: {help}");
        }
    }
}

#[test]
fn wrong_usage_is_exit_code_2() {
    assert!(fails_with(2, &["serv"]).contains("'serve'"));
    assert!(fails_with(2, &["gte", "a"]).contains("did you mean 'get'?"));
    assert!(fails_with(2, &["bench", "pt"]).contains("did you mean 'put'?"));
    assert!(!fails_with(2, &["zzzzz"]).contains("mean"));
    for (typed, meant) in [
        (&["set", "a", "b"][..], "did you mean 'put'?"),
        (&["rm", "a"], "did you mean 'del'?"),
        (&["members"], "did you mean 'member list'?"),
        (&["restore", "x"], "did you mean 'snapshot restore'?"),
        (&["lock", "backup", "./backup.sh"], "(a command to run stands after --)"),
        (&["leader"], "no command given (show, transfer"),
        (&["get", "a", "-x"], "found (to pass '-x' as a value, use '-- -x')"),
    ] {
        let line = fails_with(2, typed);
        assert!(line.contains(meant), "{line}");
    }
    assert!(fails_with(2, &["serve", "--data_dir", "x"]).contains("'--data-dir'"));
    assert!(fails_with(2, &["serve", "--id", "zero"]).contains("--id: "));
    assert!(fails_with(2, &["serve", "--store", "slde"]).starts_with("metcd: --store: \"slde\" is not one of"));
    assert!(fails_with(2, &["watch", "a", "--only", "puts"]).contains("put, delete"));
    assert!(fails_with(2, &["get", "a", "--endpoints", "http://a:99999"]).contains("a number from 1 to 65535"));
    assert!(fails_with(2, &["zzzzz"]).ends_with(": see --help\n"));
    assert!(fails_with(2, &["serve", "--member", "http://a:1"]).contains("write it like 2=http://10.0.0.2:3380"));
    assert!(fails_with(1, &["serve", "--set", "raft.tik=1s"]).contains("did you mean \"raft.tick\"?"));
    assert_eq!(metcd(&[]).status.code(), Some(2));
}

#[test]
fn a_refused_configuration_is_exit_code_1() {
    assert!(fails_with(1, &["serve", "--config", "/nonexistent/metcd.toml"]).contains("/nonexistent/metcd.toml: cannot be read"));
    let directory = tempfile::tempdir().expect("tempdir");
    let file = directory.path().join("bad.toml");
    std::fs::write(&file, "[raft]\ntik = \"50ms\"\ntick = \"5ms\"\n").expect("write");
    let file = file.to_str().expect("UTF-8");
    let line = fails_with(1, &["serve", "--config", file]);
    assert!(
        line.contains("bad.toml:2: unknown key") && line.contains("(and 1 more: see `metcd config check`)"),
        "{line}"
    );
    let check = metcd(&["config", "check", file]);
    assert_eq!(
        (check.status.code(), stderr(&check).lines().count()),
        (Some(1), 3),
        "{}",
        stderr(&check)
    );
}

#[test]
fn a_member_that_cannot_start_says_why_once() {
    let directory = tempfile::tempdir().expect("tempdir");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("its address").to_string();
    let data_dir = directory.path().join("data");
    let data_dir = data_dir.to_str().expect("UTF-8");
    let args = ["serve", "--data-dir", data_dir, "--listen-client", &address];
    let line = fails_with(1, &args);
    assert!(
        line.starts_with("metcd: cannot listen on") && line.contains("--listen-client"),
        "{line}"
    );
    let logs = directory.path().join("logs");
    let in_logs = format!("log.directory={}", logs.display());
    let said = fails_with(1, &[&args[..], &["--set", &in_logs]].concat());
    let logged = std::fs::read_to_string(logs.join("metcd.log")).expect("a log");
    assert!(said == line && logged.contains("cannot listen on"), "{said}{logged}");
}

#[test]
fn a_variable_that_is_wrong_is_exit_code_1() {
    let output = Command::new(env!("CARGO_BIN_EXE_metcd"))
        .args(["config", "show"])
        .env("METCD__RAFT__TICK", "5ms")
        .output()
        .expect("runs");
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).starts_with("metcd: METCD__RAFT__TICK: 5ms is out of range"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn check_accepts_the_files_of_the_repository() {
    for name in ["metcd", "node1", "node2", "node3"] {
        let file = format!("{}/config/{name}.toml", env!("CARGO_MANIFEST_DIR"));
        let output = metcd(&["config", "check", &file]);
        assert_eq!(
            (output.status.code(), stdout(&output)),
            (Some(0), format!("{file}: ok\n")),
            "{}",
            stderr(&output)
        );
    }
}

#[test]
fn show_takes_the_flags_of_serve() {
    let output = metcd(&[
        "config",
        "show",
        "--id",
        "4",
        "--join",
        "http://127.0.0.1:3379",
        "--listen-client",
        "127.0.0.1:6379",
    ]);
    let text = stdout(&output);
    assert!(text.contains("id = 4  # --id\n"), "{text}");
    assert!(text.contains("client_url = \"http://127.0.0.1:6379\"  # default\n"), "{text}");
    assert!(text.contains("join = [\"http://127.0.0.1:3379\"]  # --join\n"), "{text}");
}

#[test]
fn completions_are_a_script() {
    for shell in ["bash", "zsh", "fish"] {
        assert!(stdout(&metcd(&["completions", shell])).contains("data-dir"), "{shell}");
    }
}

#[test]
fn what_is_refused_is_exit_code_1_wherever_it_was_said() {
    for refused in [
        &["serve", "--member", "1=https://127.0.0.1:1"][..],
        &["serve", "--join", "https://127.0.0.1:1"],
        &["serve", "--advertise-client-url", "http://0.0.0.0:1"],
        &["serve", "--listen-client", "0.0.0.0:1"],
        &["serve", "--set", "raft.tikc=50ms"],
        &["serve", "--set", "tls.client.cert=x"],
    ] {
        fails_with(1, refused);
    }
    for unreadable in [
        &["serve", "--id", "zero"][..],
        &["serve", "--member", "nobody"],
        &["serve", "--set", "raft.tick"],
    ] {
        fails_with(2, unreadable);
    }
    if !cfg!(feature = "rocksdb") {
        let line = fails_with(1, &["serve", "--store", "rocksdb"]);
        assert!(line.contains("cargo build --release --features rocksdb"), "{line}");
    }
}

#[test]
fn one_problem_of_a_file_is_one_line() {
    let directory = tempfile::tempdir().expect("tempdir");
    let file = directory.path().join("bad.toml");
    std::fs::write(&file, "[raft]\ntik = \"50ms\"\n").expect("write");
    let line = fails_with(1, &["config", "check", file.to_str().expect("UTF-8")]);
    assert!(line.contains("bad.toml:2: unknown key \"raft.tik\""), "{line}");
}

#[test]
fn a_section_that_is_not_built_yet_is_named_with_its_line() {
    let directory = tempfile::tempdir().expect("tempdir");
    let file = directory.path().join("tls.toml");
    for (text, named) in [
        (
            "[node]\nid = 1\n\n[tls.client]\ncert = \"x\"\n",
            "tls.toml:4: \"tls.client\" sets TLS",
        ),
        ("[node]\nid = 1\n[tls]\n", "tls.toml:3: \"tls\" sets TLS"),
        (
            "[node]\nid = 1\n[auth]\n\nusers = 1\n",
            "tls.toml:5: \"auth.users\" sets TLS or users",
        ),
    ] {
        std::fs::write(&file, text).expect("write");
        let line = fails_with(1, &["config", "check", file.to_str().expect("UTF-8")]);
        assert!(line.contains(named), "{line}");
    }
}

#[test]
fn a_log_that_cannot_be_looked_at_is_an_error_on_stderr() {
    for command in ["dump", "verify"] {
        let output = metcd(&["wal", command, "/nonexistent"]);
        assert_eq!((output.status.code(), stdout(&output).as_str()), (Some(1), ""));
        let line = stderr(&output);
        assert!(line.contains("/nonexistent") && line.contains("name the data directory"), "{line}");
    }
}

/// The warnings of a start are also said to somebody who asked for errors only.
#[test]
fn warnings_of_a_start_cannot_be_turned_off() {
    let directory = tempfile::tempdir().expect("tempdir");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("its address").to_string();
    let data_dir = directory.path().join("data").display().to_string();
    let output = metcd(&[
        "serve",
        "--data-dir",
        &data_dir,
        "--listen-client",
        &address,
        "--set",
        "log.level=error",
        "--set",
        "wal.sync=false",
    ]);
    let said = stderr(&output);
    assert!(
        said.contains("warning: wal.sync = false") && said.contains("cannot listen on"),
        "{said}"
    );
}
