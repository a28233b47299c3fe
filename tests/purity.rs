//! The line between the protocol and the world: the pure modules see no socket, clock, disk, thread, global randomness or unordered
//! map. The simulator runs them from one seed, so a single leak makes a failure that cannot be repeated. And nothing at all, pure or not,
//! knows the time of day, unless it is listed here with its reason.

use std::fs;
use std::path::{Path, PathBuf};

/// Files and directories under `src/` that are pure.
const PURE: &[&str] = &[
    "consensus",
    "state",
    "store/memory",
    "leader/clock.rs",
    "node/steady.rs",
    "recovery.rs",
    "server/admission.rs",
];

/// What must not appear there, and why.
const FORBIDDEN: &[(&str, &str)] = &[
    ("Instant::now", "a clock: time comes in as an input"),
    ("SystemTime", "a clock: time comes in as an input"),
    ("tokio::time", "a clock: time comes in as an input"),
    ("thread::", "a thread: the caller decides what runs where"),
    ("tokio::spawn", "a task: the caller decides what runs where"),
    ("task::spawn", "a task: the caller decides what runs where"),
    ("tokio::net", "a socket"),
    ("std::net::Tcp", "a socket"),
    ("reqwest", "a socket"),
    ("axum", "a socket"),
    ("std::fs", "the disk"),
    ("tokio::fs", "the disk"),
    ("File::", "the disk"),
    ("std::env", "the environment"),
    ("thread_rng", "global randomness: it comes in as a seed"),
    ("rand::rng", "global randomness: it comes in as a seed"),
    ("rand::random", "global randomness: it comes in as a seed"),
    ("HashMap", "its order differs from run to run: use BTreeMap"),
    ("HashSet", "its order differs from run to run: use BTreeSet"),
    ("RandomState", "its order differs from run to run"),
];

/// What tells the time of day. Nothing that decides may know it: a machine's clock may be wrong by years, and jump.
const WALL_CLOCKS: &[&str] = &[
    "SystemTime",
    "UNIX_EPOCH",
    "OffsetDateTime::now",
    "UtcDateTime::now",
    "Utc::now",
    "Local::now",
    "chrono",
    "CLOCK_REALTIME",
    "gettimeofday",
    "libc::time(",
    // Of a file, by the same clock.
    ".modified()",
    ".accessed()",
    ".created()",
];

/// Who may know it, and what for.
const MAY_TELL_THE_TIME: &[(&str, &str)] = &[("telemetry/files.rs", "the names of log files, and when a new one is due")];

/// A line that must have one of these names although the module is pure says so, with the reason: `// pure: the name of a type only`.
const EXEMPTION: &str = "// pure: ";

fn rust_files(path: &Path, files: &mut Vec<PathBuf>) {
    if path.is_file() {
        files.push(path.to_owned());
    } else if path.is_dir() {
        let entries = fs::read_dir(path).expect("read_dir");
        entries.for_each(|entry| rust_files(&entry.expect("entry").path(), files));
    }
}

/// The part of a file that is compiled into the program: tests at the end may use what they like.
fn shipped(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let is_code = |line: &str| !line.trim_start().starts_with("//");
    let numbered = text.lines().enumerate().map(|(at, line)| (at + 1, line));
    numbered
        .take_while(|(_, line)| line.trim() != "#[cfg(test)]")
        .filter(move |(_, line)| is_code(line))
}

fn violations(file: &Path, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (number, line) in shipped(text).filter(|(_, line)| !line.contains(EXEMPTION)) {
        for (name, why) in FORBIDDEN.iter().filter(|(name, _)| line.contains(name)) {
            found.push(format!("{}:{number}: {name}: {why}", file.display()));
        }
    }
    found
}

#[test]
fn pure_modules_see_no_clock_disk_socket_thread_randomness_or_unordered_map() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    PURE.iter().for_each(|pure| rust_files(&source.join(pure), &mut files));
    for pure in PURE {
        assert!(
            files.iter().any(|file| file.starts_with(source.join(pure))),
            "src/{pure} is not there"
        );
    }
    let found: Vec<String> = files
        .iter()
        .flat_map(|file| violations(file, &fs::read_to_string(file).expect("read")))
        .collect();
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

/// Tests are looked at, too: what they are given of the time of day, a function that they call takes.
fn wall_clocks(file: &Path, text: &str) -> Vec<String> {
    let is_code = |line: &str| !line.trim_start().starts_with("//");
    let lines = text.lines().enumerate().filter(|(_, line)| is_code(line));
    let found = lines.flat_map(|(at, line)| {
        let names = WALL_CLOCKS.iter().filter(move |name| line.contains(**name));
        names.map(move |name| format!("{}:{}: {name}", file.display(), at + 1))
    });
    found.collect()
}

#[test]
fn nothing_but_the_logs_knows_the_time_of_day() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    rust_files(&source, &mut files);
    assert!(files.len() > 100, "{files:?}");
    let (excused, others): (Vec<PathBuf>, Vec<PathBuf>) = files
        .into_iter()
        .partition(|file| MAY_TELL_THE_TIME.iter().any(|(excused, _)| *file == source.join(excused)));
    let read = |file: &PathBuf| fs::read_to_string(file).expect("read");
    let found: Vec<String> = others.iter().flat_map(|file| wall_clocks(file, &read(file))).collect();
    assert!(found.is_empty(), "\na wall clock, which may be wrong:\n{}", found.join("\n"));
    // An excuse that is not needed any more hides the next one.
    assert_eq!(excused.len(), MAY_TELL_THE_TIME.len(), "{MAY_TELL_THE_TIME:?}");
    for file in excused {
        assert!(!wall_clocks(&file, &read(&file)).is_empty(), "{} needs no excuse", file.display());
    }
}

#[test]
fn a_wall_clock_is_found_in_code_and_tests_and_not_in_comments() {
    let text = "// SystemTime\nlet now = SystemTime::now();\n#[cfg(test)]\nmod tests { fn f() { Utc::now(); } }\n";
    assert_eq!(wall_clocks(Path::new("x.rs"), text), ["x.rs:2: SystemTime", "x.rs:4: Utc::now"]);
}

#[test]
fn the_check_finds_a_leak_and_heeds_comments_tests_and_exemptions() {
    let text = "// HashMap\nuse std::collections::HashMap;\nlet x = HashSet::new(); // pure: never iterated\n#[cfg(test)]\nmod tests { fn f() { std::fs::read(\"x\"); } }\n";
    let found = violations(Path::new("x.rs"), text);
    assert_eq!(found, ["x.rs:2: HashMap: its order differs from run to run: use BTreeMap"]);
}
