//! Servers and commands. Whatever is started here is stopped here.

use std::io::Write as _;
use std::net::{Ipv4Addr, TcpListener};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

/// For whatever should happen soon; generous, because the machine may be busy.
pub const SOON: Duration = Duration::from_secs(30);

/// A port below the ephemeral range that is free now.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let base = 18_000 + (std::process::id() % 600) as u16 * 20;
    loop {
        let port = base + NEXT.fetch_add(1, Ordering::Relaxed) % 2_000;
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
}

pub fn metcd() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_metcd"));
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command
}

/// Waits for a condition.
#[expect(clippy::disallowed_methods, reason = "a poll with a deadline, in a process that does nothing else")]
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {SOON:?}: {what}");
        std::thread::sleep(Duration::from_millis(30));
    }
}

/// A process that is killed with its handle.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// One member.
pub struct Server {
    pub url: String,
    process: Option<Running>,
    _dir: Option<tempfile::TempDir>,
}

impl Server {
    /// A single node, ready.
    pub fn start() -> Server {
        let dir = tempfile::tempdir().unwrap();
        let data_dir = dir.path().join("data").to_str().unwrap().to_owned();
        let mut server = Server::with(free_port(), free_port(), &["--data-dir", &data_dir]);
        server._dir = Some(dir);
        server.ready();
        server
    }

    pub fn with(client: u16, peer: u16, args: &[&str]) -> Server {
        let child = metcd()
            .args([
                "serve",
                "--listen-client",
                &format!("127.0.0.1:{client}"),
                "--listen-peer",
                &format!("127.0.0.1:{peer}"),
            ])
            .args(["--set", "log.level=warn"])
            .args(args)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Server {
            url: format!("http://127.0.0.1:{client}"),
            process: Some(Running(child)),
            _dir: None,
        }
    }

    /// The founding members of a cluster, ready.
    pub fn cluster(count: u16) -> (Vec<Server>, tempfile::TempDir) {
        Server::cluster_with(count, &[])
    }

    pub fn cluster_with(count: u16, more: &[&str]) -> (Vec<Server>, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let ports: Vec<(u16, u16)> = (0..count).map(|_| (free_port(), free_port())).collect();
        let members: Vec<String> = (1..)
            .zip(&ports)
            .map(|(id, (_, peer))| format!("--member={id}=http://127.0.0.1:{peer}"))
            .collect();
        let servers: Vec<Server> = (1..)
            .zip(&ports)
            .map(|(id, (client, peer))| {
                let own = [
                    format!("--id={id}"),
                    format!("--data-dir={}", dir.path().join(format!("d{id}")).display()),
                ];
                let args: Vec<&str> = own.iter().chain(&members).map(String::as_str).chain(more.iter().copied()).collect();
                Server::with(*client, *peer, &args)
            })
            .collect();
        servers.iter().for_each(Server::ready);
        (servers, dir)
    }

    pub fn ready(&self) {
        until("the server is healthy", || self.metcd(&["health", "--timeout", "1s"]).code == 0);
    }

    /// kill -9
    pub fn kill(&mut self) {
        self.process = None;
    }

    pub fn command(&self) -> Command {
        let mut command = metcd();
        command.env("METCD_ENDPOINTS", &self.url);
        command
    }

    pub fn metcd(&self, args: &[&str]) -> Done {
        run(self.command().args(args), b"")
    }

    pub fn metcd_with(&self, args: &[&str], input: &[u8]) -> Done {
        run(self.command().args(args), input)
    }

    /// Succeeds; returns stdout.
    pub fn ok(&self, args: &[&str]) -> String {
        let done = self.metcd(args);
        assert_eq!((done.code, done.stderr.as_str()), (0, ""), "{args:?}");
        done.text()
    }

    /// Succeeds with JSON.
    pub fn json(&self, args: &[&str]) -> serde_json::Value {
        let text = self.ok(&[args, &["--output", "json"]].concat());
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{args:?}: {error}: {text}"))
    }

    /// Fails with one line on stderr; returns that line.
    pub fn fails(&self, code: i32, args: &[&str]) -> String {
        let done = self.metcd(args);
        assert_eq!(done.code, code, "{args:?}: {}", done.stderr);
        assert_eq!(done.stderr.lines().count(), 1, "{args:?}: {}", done.stderr);
        done.stderr
    }
}

/// A command that has ended.
pub struct Done {
    pub code: i32,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Done {
    pub fn text(&self) -> String {
        String::from_utf8(self.stdout.clone()).unwrap()
    }
}

pub fn run(command: &mut Command, input: &[u8]) -> Done {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let feeder = std::thread::spawn(move || {
        // A command that does not read its input is fine.
        let _ = stdin.write_all(&input);
    });
    let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
    feeder.join().unwrap();
    Done {
        code: status.code().unwrap_or(-1),
        stdout,
        stderr: String::from_utf8_lossy(&stderr).into_owned(),
    }
}
