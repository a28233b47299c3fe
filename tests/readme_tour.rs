//! The tour in README.md, executed as it stands there, on free ports and in a directory of its own.
//!
//! In a `console` block a line that begins with `$ ` is a command (`> ` continues it); each line below it must appear in its output,
//! `…` standing for anything. `<!-- tour: command -->` is run without being shown.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Command, Stdio};

const README: &str = include_str!("../README.md");
/// Client ports in the text; each peer port is one above.
const PORTS: [&str; 3] = ["3379", "4379", "5379"];
/// The whole tour takes seconds; a hang must end too.
const LIMIT_SECONDS: &str = "180";

#[derive(Debug, PartialEq)]
struct Step {
    command: String,
    expected: Vec<String>,
}

fn steps(text: &str) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    let mut in_console = false;
    for line in text.lines() {
        let hidden = line.strip_prefix("<!-- tour: ").and_then(|rest| rest.strip_suffix(" -->"));
        if line.starts_with("```") {
            in_console = line == "```console";
        } else if let Some(command) = hidden.or_else(|| line.strip_prefix("$ ").filter(|_| in_console)) {
            steps.push(Step {
                command: command.to_owned(),
                expected: Vec::new(),
            });
        } else if let (true, Some(step)) = (in_console, steps.last_mut()) {
            match line.strip_prefix("> ") {
                Some(more) => step.command.extend(["\n", more]),
                None => step.expected.push(line.to_owned()),
            }
        }
    }
    steps
}

/// Whether `line` is `pattern` with every `…` replaced by some text, perhaps empty; blanks around it do not count.
fn matches(pattern: &str, line: &str) -> bool {
    let parts: Vec<&str> = pattern.trim().split('…').map(str::trim).collect();
    let Some((first, rest)) = parts.split_first() else { return false };
    let Some(mut tail) = line.trim().strip_prefix(first) else {
        return false;
    };
    let Some((last, middle)) = rest.split_last() else {
        return tail.is_empty();
    };
    for part in middle {
        let Some(at) = tail.find(part) else { return false };
        tail = &tail[at + part.len()..];
    }
    tail.ends_with(last)
}

/// Client ports whose neighbours are free too. All are held until the last one is found: none is given twice.
fn free_pairs(count: usize) -> Vec<u16> {
    let mut pairs = Vec::new();
    for _ in 0..100 {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
        let port = listener.local_addr().expect("local_addr").port();
        if port < u16::MAX
            && let Ok(neighbour) = TcpListener::bind((Ipv4Addr::LOCALHOST, port + 1))
        {
            pairs.push((port, listener, neighbour));
        }
        if pairs.len() == count {
            return pairs.into_iter().map(|(port, ..)| port).collect();
        }
    }
    panic!("no two neighbouring ports are free");
}

fn with_ports(text: &str, ports: &[u16]) -> String {
    PORTS.iter().zip(ports).fold(text.to_owned(), |text, (written, port)| {
        let peer = format!("{}80", &written[..2]);
        text.replace(written, &port.to_string()).replace(&peer, &(port + 1).to_string())
    })
}

/// One script for all steps, because later commands see the jobs of earlier ones; `@n` begins the output of step n.
fn script(steps: &[Step]) -> String {
    let mut script = String::from("trap 'kill $(jobs -p) 2>/dev/null; scripts/cluster clean' EXIT\n");
    for (number, step) in steps.iter().enumerate() {
        writeln!(script, "printf '\\n@{number}\\n'\n{}", step.command).expect("a string");
    }
    script
}

fn run(script: &str, directory: &Path, ports: &[u16]) -> String {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR"));
    let binary = Path::new(env!("CARGO_BIN_EXE_metcd"));
    std::os::unix::fs::symlink(repository.join("scripts"), directory.join("scripts")).expect("symlink");
    std::fs::write(directory.join("tour.sh"), script).expect("write");
    // In a terminal curl shows its progress only where it does not disturb.
    std::fs::write(directory.join(".curlrc"), "silent\nshow-error\n").expect("write");
    let output = std::fs::File::create(directory.join("output")).expect("create");
    let path = format!(
        "{}:{}",
        binary.parent().expect("a directory").display(),
        std::env::var("PATH").unwrap_or_default()
    );
    let status = Command::new("timeout")
        .args([LIMIT_SECONDS, "bash", "tour.sh"])
        .current_dir(directory)
        .env("PATH", path)
        .env("CURL_HOME", directory)
        .env("METCD_BIN", binary)
        .env("METCD_CLUSTER_DIR", directory.join("cluster"))
        .env(
            "METCD_CLUSTER_PORTS",
            ports.iter().map(u16::to_string).collect::<Vec<_>>().join(" "),
        )
        .stdin(Stdio::null())
        .stdout(output.try_clone().expect("clone"))
        .stderr(output)
        .status()
        .expect("bash runs");
    let text = std::fs::read(directory.join("output")).expect("read");
    assert_ne!(status.code(), Some(124), "the tour hangs:\n{}", String::from_utf8_lossy(&text));
    String::from_utf8_lossy(&text).into_owned()
}

#[test]
fn the_tour_in_the_readme_does_what_it_shows() {
    let directory = tempfile::tempdir().expect("tempdir");
    let ports = free_pairs(PORTS.len());
    let steps = steps(&with_ports(README, &ports));
    let output = run(&script(&steps), directory.path(), &ports);
    for (number, step) in steps.iter().enumerate() {
        let after = output.split_once(&format!("\n@{number}\n")).map_or("", |(_, after)| after);
        let own = after.split_once(&format!("\n@{}\n", number + 1)).map_or(after, |(own, _)| own);
        for expected in &step.expected {
            assert!(
                own.lines().any(|line| matches(expected, line)),
                "$ {}\nlacks {expected:?}:\n{own}\n\nall of it:\n{output}",
                step.command
            );
        }
    }
}

#[test]
fn steps_are_read_with_their_continuations_and_expectations() {
    let text = "x\n<!-- tour: a & -->\n```sh\n$ not this\n```\n```console\n$ b '1\n> 2'\nout\n…\n$ c\n```\n$ nor this\n";
    let step = |command: &str, expected: &[&str]| Step {
        command: command.to_owned(),
        expected: expected.iter().map(|s| (*s).to_owned()).collect(),
    };
    assert_eq!(steps(text), [step("a &", &[]), step("b '1\n2'", &["out", "…"]), step("c", &[])]);
}

#[test]
fn an_ellipsis_stands_for_anything_and_nothing_else_does() {
    for (pattern, line) in [
        ("abc", " abc\r"),
        ("…", ""),
        ("a…c", "abc"),
        ("a…", "a"),
        ("{…,\"x\":1…}", "{\"y\":2,\"x\":1,\"z\":3}"),
    ] {
        assert!(matches(pattern, line), "{pattern} ~ {line}");
    }
    for (pattern, line) in [("abc", "abcd"), ("a…c", "abd"), ("…b…", "acd"), ("", "x")] {
        assert!(!matches(pattern, line), "{pattern} !~ {line}");
    }
    assert_eq!(with_ports("3379 3380 4380", &[7000, 8000, 9000]), "7000 7001 8001");
}
