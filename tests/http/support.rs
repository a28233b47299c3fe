//! A server of its own for each test, and a client that sends exactly what it is told.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// How long anything may take before a test gives up.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Waits for something that will be so.
#[track_caller]
pub fn wait_until(mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "it does not happen");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A running single node, stopped when dropped.
pub struct Server {
    child: Child,
    pub address: String,
    _data: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An answer, read whole.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HashMap<String, String>,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn revision(&self) -> u64 {
        self.header("metcd-revision")
            .parse()
            .unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Asserts a refusal with this status and code, well formed.
    #[track_caller]
    pub fn refused(&self, status: u16, code: &str) {
        assert_eq!(self.status, status, "{self:?}");
        assert_eq!(self.header("content-type"), "application/problem+json");
        let problem = self.json();
        assert_eq!(
            (&problem["code"], &problem["status"], &problem["type"]),
            (&code.into(), &status.into(), &"about:blank".into())
        );
    }
}

impl Server {
    /// Starts one with default settings and waits until it is ready.
    pub fn start() -> Server {
        Server::start_with(&[])
    }

    /// Starts one with `--set` arguments, on ports that are free now.
    pub fn start_with(settings: &[&str]) -> Server {
        for _ in 0..5 {
            if let Some(server) = Server::try_start(settings) {
                return server;
            }
        }
        panic!("the server did not start in five attempts");
    }

    fn try_start(settings: &[&str]) -> Option<Server> {
        let data = tempfile::tempdir().unwrap();
        // Both are held at once, so that they differ.
        let sockets = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [client, peer] = sockets.map(|socket| socket.local_addr().unwrap().to_string());
        let mut command = Command::new(env!("CARGO_BIN_EXE_metcd"));
        command
            .arg("serve")
            .arg("--data-dir")
            .arg(data.path().join("d"))
            .args(["--listen-client", &client, "--listen-peer", &peer]);
        if !settings.iter().any(|setting| setting.starts_with("wal.sync=")) {
            command.args(["--set", "wal.sync=false"]);
        }
        for setting in settings {
            command.args(["--set", setting]);
        }
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let mut server = Server {
            child,
            address: client,
            _data: data,
        };
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if server.child.try_wait().unwrap().is_some() {
                return None;
            }
            if TcpStream::connect(&server.address).is_ok() && server.get("/readyz").status == 200 {
                return Some(server);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        None
    }

    pub fn get(&self, target: &str) -> Answer {
        self.send("GET", target, &[], b"")
    }

    pub fn put(&self, target: &str, body: &str) -> Answer {
        self.send("PUT", target, &[], body.as_bytes())
    }

    pub fn delete(&self, target: &str) -> Answer {
        self.send("DELETE", target, &[], b"")
    }

    pub fn post(&self, target: &str, body: &Value) -> Answer {
        self.send("POST", target, &[], body.to_string().as_bytes())
    }

    /// One request on a connection of its own.
    pub fn send(&self, method: &str, target: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        self.begin(method, target, headers, body).finish(method == "HEAD")
    }

    /// Sends a request and leaves the answer to be read.
    pub fn begin(&self, method: &str, target: &str, headers: &[(&str, &str)], body: &[u8]) -> Exchange {
        let mut head = format!("{method} {target} HTTP/1.1\r\nConnection: close\r\n");
        let has = |name: &str| headers.iter().any(|(given, _)| given.eq_ignore_ascii_case(name));
        if !has("host") {
            head.push_str(&format!("Host: {}\r\n", self.address));
        }
        if !has("transfer-encoding") && !has("content-length") && !matches!(method, "GET" | "HEAD" | "OPTIONS") {
            head.push_str(&format!("Content-Length: {}\r\n", body.len()));
        }
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(body).unwrap();
        Exchange {
            reader: BufReader::new(stream),
        }
    }
}

/// An answer on its way.
pub struct Exchange {
    reader: BufReader<TcpStream>,
}

impl Exchange {
    /// More of the request.
    pub fn write(&mut self, bytes: &[u8]) {
        self.reader.get_mut().write_all(bytes).unwrap();
    }

    /// The next line without its end; `None` at the end.
    pub fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        let read = self.reader.read_line(&mut line).unwrap();
        (read > 0).then(|| line.trim_end_matches(['\r', '\n']).to_owned())
    }

    /// Status and headers.
    pub fn head(&mut self) -> Answer {
        let status_line = self.line().expect("an answer");
        let status = status_line
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok())
            .unwrap_or_else(|| panic!("{status_line}"));
        let mut headers = HashMap::new();
        while let Some(line) = self.line().filter(|line| !line.is_empty()) {
            let (name, value) = line.split_once(": ").unwrap_or((&line, ""));
            headers.insert(name.to_ascii_lowercase(), value.to_owned());
        }
        Answer {
            status,
            headers,
            body: Vec::new(),
        }
    }

    /// The next chunk of a chunked body; `None` after the last one. Panics if the body breaks off.
    pub fn chunk(&mut self) -> Option<Vec<u8>> {
        self.try_chunk().expect("a chunk")
    }

    /// As [`chunk`](Self::chunk), with an error if the body breaks off.
    pub fn try_chunk(&mut self) -> std::io::Result<Option<Vec<u8>>> {
        let mut size = String::new();
        self.reader.read_line(&mut size)?;
        let size = usize::from_str_radix(size.trim_end(), 16).map_err(|_| std::io::ErrorKind::UnexpectedEof)?;
        let mut chunk = vec![0; size + 2];
        self.reader.read_exact(&mut chunk)?;
        chunk.truncate(size);
        Ok((size > 0).then_some(chunk))
    }

    /// The whole answer.
    pub fn finish(mut self, head_only: bool) -> Answer {
        let mut answer = self.head();
        while answer.status == 100 {
            answer = self.head();
        }
        if head_only {
            self.reader.read_to_end(&mut answer.body).unwrap();
            return answer;
        }
        self.body_of(&mut answer);
        answer
    }

    /// The body that follows this head.
    pub fn body_of(&mut self, answer: &mut Answer) {
        if answer.header("transfer-encoding") == "chunked" {
            while let Some(chunk) = self.chunk() {
                answer.body.extend_from_slice(&chunk);
            }
        } else if let Ok(length) = answer.header("content-length").parse() {
            answer.body = vec![0; length];
            self.reader.read_exact(&mut answer.body).unwrap();
        }
    }
}
