//! The same for a cluster: three members, as the program runs them, with their data directories on one disk, so that one cut takes the power
//! of all of them at the same moment. What is on the disk is everything that a member keeps: identity, starts, fence, log, store, snapshots.
//!
//! An operation is a burst of puts and deletes through all members, and acknowledged when all of them are. Afterwards the members are started
//! from what the cut left, must become ready, hold what was acknowledged or what the next operation made of it, and agree on their content.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use super::Random;

const MEMBERS: usize = 3;
const KEYS: u64 = 400;
const WRITES_AT_ONCE: u64 = 6;
/// For three members to start, elect a leader and be ready on a slow disk.
const PATIENCE: Duration = Duration::from_secs(120);

/// Log and store engine behind a name such as `cluster-sled-memory`; `None` if it is no cluster's.
pub fn engines(name: &str) -> Option<(&str, &str)> {
    name.strip_prefix("cluster-")?.rsplit_once('-')
}

/// One write: of a key, and whether it is a put.
fn writes(seed: u64, op: u64) -> BTreeMap<u64, bool> {
    let mut random = Random(seed ^ (op << 32));
    (0..WRITES_AT_ONCE).map(|_| (random.below(KEYS), random.below(5) > 0)).collect()
}

fn value(seed: u64, op: u64, key: u64) -> Vec<u8> {
    let mut random = Random(seed ^ (op << 24) ^ key);
    let bytes = [20, 200, 200, 2_000, 9_000, 60_000][random.below(6) as usize];
    let mut value = format!("{op} ").into_bytes();
    value.extend(std::iter::repeat_with(|| b'a' + (random.draw() % 26) as u8).take(bytes));
    value
}

/// Three members that run. Killed when dropped.
struct Cluster {
    children: Vec<Option<Child>>,
    ports: Vec<u16>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for child in self.children.iter_mut().flatten() {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// `dir` is in a file system that is mounted in the place of this run, which is beside it.
fn place(dir: &Path) -> PathBuf {
    dir.ancestors().nth(2).unwrap_or(dir).to_owned()
}

/// The ports of a run: the members' records name them, so that they stay the same.
fn ports(dir: &Path) -> Vec<u16> {
    let file = place(dir).join("ports");
    if let Ok(text) = fs::read_to_string(&file) {
        return text.split(' ').map(|port| port.parse().unwrap()).collect();
    }
    // Held together, so that they differ.
    let listeners: Vec<TcpListener> = (0..2 * MEMBERS).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let ports: Vec<u16> = listeners.iter().map(|listener| listener.local_addr().unwrap().port()).collect();
    let text: Vec<String> = ports.iter().map(u16::to_string).collect();
    fs::write(&file, text.join(" ")).unwrap();
    ports
}

impl Cluster {
    /// Without member `but`, if it is one.
    fn start(name: &str, dir: &Path, sync: bool, but: Option<usize>) -> Cluster {
        let ports = ports(dir);
        let mut cluster = Cluster {
            children: (0..MEMBERS).map(|_| None).collect(),
            ports,
        };
        for at in (0..MEMBERS).filter(|at| Some(*at) != but) {
            cluster.start_member(name, dir, sync, at);
        }
        cluster
    }

    fn start_member(&mut self, name: &str, dir: &Path, sync: bool, at: usize) {
        let (wal, store) = engines(name).unwrap();
        let ports = &self.ports;
        // What ran there before may still be about to end.
        let begun = Instant::now();
        for port in &ports[2 * at..2 * at + 2] {
            while TcpListener::bind(("127.0.0.1", *port)).is_err() {
                assert!(begun.elapsed() < PATIENCE, "port {port} stays in use");
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        let founders = (0..MEMBERS).map(|at| format!("{}=http://127.0.0.1:{}", at + 1, ports[2 * at + 1]));
        let founders: Vec<String> = founders.collect();
        let mut command = Command::new(env!("CARGO_BIN_EXE_metcd"));
        command
            .args(["serve", "--id", &(at + 1).to_string(), "--wal", wal, "--store", store])
            .arg("--data-dir")
            .arg(dir.join((at + 1).to_string()))
            .args(["--listen-client", &format!("127.0.0.1:{}", ports[2 * at])])
            .args(["--listen-peer", &format!("127.0.0.1:{}", ports[2 * at + 1])])
            .args(founders.iter().flat_map(|founder| ["--member", founder.as_str()]))
            // Small, so that snapshots and cuts of the log happen between two power cuts.
            .args(["--set", "raft.snapshot_entries=60", "--set", "raft.keep_entries=20"])
            .args(["--set", "limits.min_free_disk=0", "--set", "history.retain_revisions=500"])
            .args(["--set", &format!("wal.sync={sync}")]);
        let log = fs::OpenOptions::new().create(true).append(true).open(log_file(dir, at)).unwrap();
        self.children[at] = Some(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap());
    }

    /// Waits until all members serve. An error is what the first one that ended has said.
    fn ready(&mut self, dir: &Path) -> Result<(), String> {
        let begun = Instant::now();
        for (at, child) in self.children.iter_mut().enumerate() {
            let Some(child) = child else { continue };
            while request(self.ports[2 * at], "GET", "/readyz", b"").is_none_or(|(status, _)| status != 200) {
                if let Ok(Some(status)) = child.try_wait() {
                    let said = fs::read_to_string(log_file(dir, at)).unwrap_or_default();
                    return Err(format!(
                        "member {} ended ({status}): {}",
                        at + 1,
                        said.lines().last().unwrap_or_default()
                    ));
                }
                if begun.elapsed() > PATIENCE {
                    return Err(format!("member {} is not ready", at + 1));
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(())
    }
}

fn log_file(dir: &Path, at: usize) -> PathBuf {
    place(dir).join(format!("member-{}.log", at + 1))
}

/// Status and body; `None` if the connection failed.
fn request(port: u16, method: &str, target: &str, body: &[u8]) -> Option<(u16, Vec<u8>)> {
    request_with(port, method, target, "", body)
}

/// With more header lines.
fn request_with(port: u16, method: &str, target: &str, more: &str, body: &[u8]) -> Option<(u16, Vec<u8>)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(30))).ok()?;
    let head = format!(
        "{method} {target} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n{more}content-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).ok()?;
    stream.write_all(body).ok()?;
    let mut answer = BufReader::new(stream);
    let mut line = String::new();
    answer.read_line(&mut line).ok()?;
    let status = line.split(' ').nth(1)?.parse().ok()?;
    let mut length = None;
    loop {
        line.clear();
        answer.read_line(&mut line).ok()?;
        match line.trim_end().split_once(": ") {
            Some((name, number)) if name.eq_ignore_ascii_case("content-length") => length = number.parse().ok(),
            Some(_) => {}
            None => break,
        }
    }
    let mut body = vec![0; length.unwrap_or(0)];
    answer.read_exact(&mut body).ok()?;
    Some((status, body))
}

/// Runs a cluster in `dir` and tells which operations are acknowledged, until it is killed.
pub fn append(name: &str, dir: &Path, seed: u64, sync: bool) {
    fs::create_dir_all(dir).unwrap();
    let mut cluster = Cluster::start(name, dir, sync, None);
    cluster.ready(dir).unwrap();
    // What was acknowledged before the last cut is on the disk. The newest operation in any value is done again: the cut may have come between
    // its writes, and those that are done keep their effect.
    let newest = (0..KEYS).filter_map(|key| op_of(&read(cluster.ports[0], key)?)).max();
    for op in newest.unwrap_or(1).. {
        std::thread::scope(|scope| {
            for (key, is_put) in writes(seed, op) {
                let ports = &cluster.ports;
                scope.spawn(move || write(ports, op, key, is_put.then(|| value(seed, op, key))));
            }
        });
        println!("acknowledged {op}");
        std::io::stdout().flush().unwrap();
    }
}

/// Until it is acknowledged, on one member after the other. Under one idempotency key, or a try whose outcome was unknown could be applied
/// after a later operation.
fn write(ports: &[u16], op: u64, key: u64, value: Option<Vec<u8>>) {
    let more = format!("idempotency-key: {op}-{key}\r\n");
    for attempt in op + key.. {
        let port = ports[2 * (attempt as usize % MEMBERS)];
        let method = if value.is_some() { "PUT" } else { "DELETE" };
        let answer = request_with(port, method, &format!("/k{key}"), &more, value.as_deref().unwrap_or_default());
        if answer.is_some_and(|(status, _)| matches!(status, 200 | 201 | 204 | 404)) {
            return;
        }
    }
}

fn read(port: u16, key: u64) -> Option<Vec<u8>> {
    let (status, body) = request(port, "GET", &format!("/k{key}"), b"")?;
    (status == 200).then_some(body)
}

fn op_of(value: &[u8]) -> Option<u64> {
    std::str::from_utf8(value).ok()?.split(' ').next()?.parse().ok()
}

/// Starts the cluster in `dir` again and compares it with what was acknowledged.
pub fn verify(name: &str, dir: &Path, seed: u64, acknowledged: u64) -> String {
    // Any two are a majority, and must hold all of it: a third one could make up for what one of them has lost.
    let absent = acknowledged as usize % MEMBERS;
    let mut cluster = Cluster::start(name, dir, true, Some(absent));
    if let Err(why) = cluster.ready(dir) {
        return format!("refused: {why}");
    }
    let present: Vec<u16> = (0..MEMBERS).filter(|at| *at != absent).map(|at| cluster.ports[2 * at]).collect();
    for key in 0..KEYS {
        let (status, body) = match request(present[key as usize % present.len()], "GET", &format!("/k{key}"), b"") {
            Some((status @ (200 | 404), body)) => (status, body),
            other => return format!("refused: GET of key {key}: {:?}", other.map(|(status, _)| status)),
        };
        let found = (status == 200).then_some(body);
        // As the last acknowledged operation left it, or one of those after it: the last word of one may not have been heard before the cut.
        let as_of = |op: u64| (1..=op).rev().find_map(|op| Some((op, *writes(seed, op).get(&key)?)));
        let allowed = [0, 1, 2, 3].map(|later| as_of(acknowledged + later));
        let is_allowed = allowed.iter().any(|last| match last {
            Some((op, true)) => found.as_ref().is_some_and(|found| *found == value(seed, *op, key)),
            Some((_, false)) | None => found.is_none(),
        });
        if !is_allowed {
            let found = found.map(|found| (op_of(&found), found.len()));
            return format!("silent: key {key} is {found:?} after operation {acknowledged}, allowed is one of {allowed:?}");
        }
    }
    cluster.start_member(name, dir, true, absent);
    if let Err(why) = cluster.ready(dir) {
        return format!("refused: {why}");
    }
    let hash = |at: usize| request(cluster.ports[2 * at], "GET", "/v1/hash", b"");
    let hashes: Vec<_> = (0..MEMBERS).map(hash).collect();
    let is_answer = matches!(hashes[0], Some((200, _)));
    if !is_answer || hashes.iter().any(|hash| *hash != hashes[0]) {
        return format!("silent: the members differ: {hashes:?}");
    }
    format!("whole: {acknowledged} operations")
}
