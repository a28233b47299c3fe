//! A single node under strace, and what its trace says.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

pub const SOON: Duration = Duration::from_secs(60);

/// Looks again after a moment until there is something.
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + SOON;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Where a node lives, from one start to the next.
pub struct Place {
    dir: tempfile::TempDir,
    client: String,
    peer: String,
}

fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

impl Place {
    pub fn new() -> Place {
        Place {
            // As the kernel names it: strace compares names, and cannot resolve those of files that are not there yet.
            dir: tempfile::tempdir_in(std::env::temp_dir().canonicalize().unwrap()).unwrap(),
            client: free_address(),
            peer: free_address(),
        }
    }

    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// Starts the node with these arguments, and strace with these, and waits until it serves.
    pub fn start(&self, serve: &[&str], strace: &[String]) -> Traced<'_> {
        let said = std::fs::File::create(self.dir.path().join("said")).unwrap();
        let started = Command::new("strace")
            .args(["-f", "-y", "-s", "64", "-e", "signal=none"])
            .args(strace)
            .arg("-o")
            .arg(self.dir.path().join("trace"))
            .arg(env!("CARGO_BIN_EXE_metcd"))
            .args(["serve", "--listen-client", &self.client, "--listen-peer", &self.peer])
            .args(serve)
            .arg("--data-dir")
            .arg(self.data())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(said)
            .spawn();
        let strace = started.unwrap_or_else(|error| panic!("strace cannot be run ({error}): install it, e.g. apt-get install strace"));
        let mut traced = Traced { strace, place: self };
        wait_for("the node is not ready", || {
            let ended = traced.strace.try_wait().unwrap();
            assert!(
                ended.is_none(),
                "strace ended with {ended:?}: tracing must be allowed (in a container: --cap-add SYS_PTRACE)\n{}",
                self.said()
            );
            traced
                .request("GET /readyz", "")
                .filter(|answer| answer.starts_with("HTTP/1.1 200"))
        });
        traced
    }

    /// What the node has written to stderr since its last start.
    pub fn said(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("said")).unwrap()
    }

    /// What strace has seen since the last start. Whatever a client has heard of is in it.
    pub fn trace(&self) -> String {
        let raw = std::fs::read(self.dir.path().join("trace")).unwrap();
        String::from_utf8_lossy(&raw).into_owned()
    }
}

/// A node under strace; ended when dropped.
pub struct Traced<'a> {
    strace: Child,
    place: &'a Place,
}

impl Drop for Traced<'_> {
    fn drop(&mut self) {
        // strace ends with what it traces, and would only let go of it if it were killed itself.
        self.signal("KILL");
        let _ = self.strace.wait();
    }
}

impl Traced<'_> {
    /// Sends a signal to the node.
    pub fn signal(&self, name: &str) {
        let pid = self.strace.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        for child in children.split_whitespace() {
            let _ = Command::new("kill").args([&format!("-{name}"), child]).status();
        }
    }

    /// Waits for the node's end; strace ends as what it traced.
    pub fn ended(&mut self) -> ExitStatus {
        wait_for("the node goes on", || self.strace.try_wait().unwrap())
    }

    /// Sends a request on a connection of its own and reads the whole answer.
    pub fn request(&self, line: &str, body: &str) -> Option<String> {
        let client = &self.place.client;
        let mut stream = TcpStream::connect(client).ok()?;
        stream.set_read_timeout(Some(SOON)).ok()?;
        let length = body.len();
        let request = format!("{line} HTTP/1.1\r\nhost: {client}\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}");
        stream.write_all(request.as_bytes()).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        Some(answer)
    }
}

/// One line of the trace: thread, call and the rest. A call that another thread's line interrupts has two lines.
#[derive(Debug, PartialEq)]
pub enum Line<'a> {
    Whole(&'a str),
    Begins(&'a str),
    Ends(&'a str),
}

pub fn parse(line: &str) -> Option<(&str, Line<'_>)> {
    let (thread, rest) = line.split_once(' ')?;
    let rest = rest.trim_start();
    let parsed = if let Some(begin) = rest.strip_suffix("<unfinished ...>") {
        Line::Begins(begin)
    } else if rest.starts_with("<... ") {
        Line::Ends(rest)
    } else {
        Line::Whole(rest)
    };
    Some((thread, parsed))
}

/// A call that has returned, put together from its lines, and the numbers of these.
pub struct Call {
    pub text: String,
    pub begun: usize,
    pub ended: usize,
}

/// The calls of a trace, in the order in which they returned.
pub fn calls(trace: &str) -> Vec<Call> {
    let mut begun: BTreeMap<&str, (usize, &str)> = BTreeMap::new();
    let mut calls = Vec::new();
    for (number, (thread, line)) in trace.lines().filter_map(parse).enumerate() {
        match line {
            Line::Whole(call) => calls.push(Call {
                text: call.to_owned(),
                begun: number,
                ended: number,
            }),
            Line::Begins(call) => drop(begun.insert(thread, (number, call))),
            Line::Ends(rest) => {
                let end = rest.split_once("resumed>").map(|(_, end)| end);
                if let (Some((at, call)), Some(end)) = (begun.remove(thread), end) {
                    calls.push(Call {
                        text: format!("{}{end}", call.trim_end()),
                        begun: at,
                        ended: number,
                    });
                }
            }
        }
    }
    calls
}

impl Call {
    pub fn name(&self) -> &str {
        self.text.split_once('(').map_or("", |(name, _)| name)
    }

    pub fn is_one_of(&self, names: &[&str]) -> bool {
        names.contains(&self.name())
    }

    pub fn succeeded(&self) -> bool {
        let result = self.text.rsplit_once("= ").map_or("", |(_, result)| result);
        result.starts_with(|first: char| first.is_ascii_digit())
    }

    /// The file behind the descriptor that is the first argument.
    pub fn file(&self) -> Option<&Path> {
        let (_, rest) = self.text.split_once('<')?;
        Some(Path::new(rest.split_once('>')?.0))
    }

    /// The paths among the arguments: what is in quotes, and absolute.
    pub fn paths(&self) -> Vec<&Path> {
        let quoted = self.text.split('"').skip(1).step_by(2);
        quoted.filter(|text| text.starts_with('/')).map(Path::new).collect()
    }
}
