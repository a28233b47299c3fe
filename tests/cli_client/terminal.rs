//! What is shown at a terminal, and only there.

use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crate::support::{Running, Server, until};

/// A command behind a pseudo-terminal.
pub struct Terminal {
    _process: Running,
    keyboard: ChildStdin,
    screen: Arc<Mutex<Vec<u8>>>,
    watched: JoinHandle<()>,
}

impl Terminal {
    /// None, said loudly, where nothing gives a command a terminal.
    pub fn open(server: &Server, args: &str, state: &Path) -> Option<Terminal> {
        Terminal::open_with(server, args, state, &[])
    }

    fn open_with(server: &Server, args: &str, state: &Path, environment: &[(&str, &str)]) -> Option<Terminal> {
        // util-linux's `script` gives a command a terminal.
        let mut command = Command::new("script");
        command.args(["-qfec", &format!("{} {args}", env!("CARGO_BIN_EXE_metcd")), "/dev/null"]);
        command
            .env("METCD_ENDPOINTS", &server.url)
            .env("XDG_STATE_HOME", state)
            .env("TERM", "xterm")
            .env_remove("NO_COLOR")
            .envs(environment.iter().copied());
        let started = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
        let Ok(mut child) = started else {
            // Written past the harness, which shows nothing of a test that passes.
            let _ = writeln!(
                std::io::stderr(),
                "!!! NOT TESTED: `metcd {args}` at a terminal. There is no `script` here (package bsdutils)"
            );
            return None;
        };
        let keyboard = child.stdin.take()?;
        let mut output = child.stdout.take()?;
        let screen = Arc::new(Mutex::new(Vec::new()));
        let shown = screen.clone();
        let watched = std::thread::spawn(move || {
            let mut piece = [0; 1024];
            while let Ok(read @ 1..) = output.read(&mut piece) {
                shown.lock().unwrap().extend_from_slice(&piece[..read]);
            }
        });
        Some(Terminal {
            _process: Running(child),
            keyboard,
            screen,
            watched,
        })
    }

    pub fn types(&mut self, text: &str) {
        self.screen.lock().unwrap().clear();
        self.keyboard.write_all(text.as_bytes()).unwrap();
        self.keyboard.flush().unwrap();
    }

    pub fn shows(&self, text: &str) {
        until(text, || self.screen().contains(text));
    }

    /// Everything that was shown when the command has ended.
    fn end(self) -> String {
        until("the command ends", || self.watched.is_finished());
        self.screen()
    }

    fn screen(&self) -> String {
        String::from_utf8_lossy(&self.screen.lock().unwrap()).into_owned()
    }
}

#[test]
fn a_table_has_a_bold_head_at_a_terminal_unless_no_color_is_set() {
    let server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    let Some(bold) = Terminal::open(&server, "status", dir.path()) else {
        return;
    };
    let bold = bold.end();
    assert!(bold.contains("\x1b[1mENDPOINT") && bold.contains("\x1b[0m"), "{bold:?}");
    let plain = Terminal::open_with(&server, "status", dir.path(), &[("NO_COLOR", "1")])
        .unwrap()
        .end();
    assert!(plain.contains("ENDPOINT") && !plain.contains('\x1b'), "{plain:?}");
    let piped = server.ok(&["status"]);
    assert!(piped.starts_with("ENDPOINT") && !piped.contains('\x1b'), "{piped:?}");
}

#[test]
fn a_bench_at_a_terminal_shows_how_far_it_is_before_it_reports() {
    let server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    let Some(bench) = Terminal::open(&server, "bench put --duration 1s --warm-up 0s", dir.path()) else {
        return;
    };
    let shown = bench.end();
    let (live, report) = (shown.find("/s, "), shown.find("p99.99"));
    assert!(live.is_some() && report.is_some() && live < report, "{shown:?}");
    assert!(shown.contains(" requests, 0 failed"), "{shown:?}");
    // `ok` sees to it that nothing is on stderr.
    let piped = server.ok(&["bench", "put", "--duration", "1s", "--warm-up", "0s"]);
    assert!(!piped.contains("requests, 0 failed"), "{piped}");
}

#[test]
fn a_backup_at_a_terminal_shows_how_much_of_about_how_much_has_arrived() {
    let server = Server::start();
    let line = |n: u32| format!("{{\"key\":\"k{n}\",\"value\":\"{}\"}}\n", "v".repeat(10_000));
    let lines: String = (0..300).map(line).collect();
    let done = server.metcd_with(&["import"], format!("{lines}{{\"end\":true}}\n").as_bytes());
    assert_eq!(done.code, 0, "{}", done.stderr);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("backup.snap");
    let file = file.to_str().unwrap();
    let Some(save) = Terminal::open(&server, &format!("snapshot save {file}"), dir.path()) else {
        return;
    };
    let shown = save.end();
    let progress = shown.split("saved revision").next().unwrap_or_default();
    // 300 values of 10,000 bytes, with what belongs to each.
    assert!(progress.contains("save ") && progress.contains(" of about 2.88 MiB, "), "{shown:?}");
    assert!(shown.contains("saved revision"), "{shown:?}");
    // `ok` sees to it that nothing is on stderr.
    server.ok(&["snapshot", "save", file]);
}

#[test]
fn an_export_and_an_import_at_a_terminal_show_how_much_of_how_much_is_done() {
    let server = Server::start();
    let line = |n: u32| format!("{{\"key\":\"k{n}\",\"value\":\"{}\"}}\n", "v".repeat(10_000));
    let lines: String = (0..300).map(line).collect();
    let dir = tempfile::tempdir().unwrap();
    let (given, taken) = (dir.path().join("given.jsonl"), dir.path().join("taken.jsonl"));
    std::fs::write(&given, format!("{lines}{{\"end\":true}}\n")).unwrap();
    let Some(import) = Terminal::open(&server, &format!("import {}", given.display()), dir.path()) else {
        return;
    };
    let shown = import.end();
    let progress = shown.split("imported 300 keys").next().unwrap_or_default();
    // Ten thousand bytes of value and what is around it, three hundred times.
    assert!(progress.contains("import ") && progress.contains(" of 2.87 MiB, "), "{shown:?}");
    assert!(shown.contains("imported 300 keys"), "{shown:?}");

    let export = Terminal::open(&server, &format!("export --file {}", taken.display()), dir.path()).unwrap();
    let shown = export.end();
    let progress = shown.split("exported 300 keys").next().unwrap_or_default();
    assert!(progress.contains("export ") && progress.contains(" of 300 keys, "), "{shown:?}");
    assert!(shown.contains("exported 300 keys"), "{shown:?}");

    // `ok` sees to it that nothing is on stderr.
    server.ok(&["import", given.to_str().unwrap()]);
    server.ok(&["export", "--file", taken.to_str().unwrap()]);
}

/// A second one would tell many programs to drop everything.
#[test]
fn ctrl_c_comes_once_to_the_command_of_a_lock_which_ends_as_it_will() {
    let server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("script");
    std::fs::write(
        &script,
        "trap 'echo got it' INT; echo ready; sleep 60; sleep 0.5; echo finished; exit 4\n",
    )
    .unwrap();
    let args = format!("lock l -- sh {}", script.display());
    let Some(mut lock) = Terminal::open(&server, &args, dir.path()) else {
        return;
    };
    lock.shows("ready");
    lock.types("\x03");
    let shown = lock.end();
    assert_eq!(shown.matches("got it").count(), 1, "{shown:?}");
    assert!(shown.contains("finished") && shown.contains("ended with exit code 4"), "{shown:?}");
    assert_eq!(server.ok(&["lease", "list"]), "");
}
