//! Tests of the disk engines run in a process of their own that may be ended: their code is not ours, and was seen to stand still
//! for ever (sled 0.34.7 in a lock among its own threads; RocksDB reading a damaged manifest again and again).

use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;

/// Far beyond what a test of an engine takes on a busy machine.
const DEADLINE: Duration = Duration::from_secs(240);
/// A fault that is seen once in twenty runs is not seen three times in a row; one of ours is.
const ATTEMPTS: usize = 3;
const CHILD: &str = "METCD_TEST_CHILD";

/// Runs the body of the test of this name (its path without the crate) in a child process. A failed assertion fails the test; only a child
/// that does not end is tried again, and that is printed.
pub(crate) fn run(test: &str, body: impl FnOnce()) {
    if std::env::var_os(CHILD).is_some() {
        return body();
    }
    for attempt in 1..=ATTEMPTS {
        if let Some((passed, output)) = attempted(test) {
            assert!(passed && output.contains("1 passed"), "{test} in a process of its own:\n{output}");
            return;
        }
        eprintln!(
            "{test}: the engine stood still for {} s (attempt {attempt} of {ATTEMPTS})",
            DEADLINE.as_secs()
        );
    }
    panic!("{test}: the engine stood still {ATTEMPTS} times");
}

/// Whether it passed, and what it printed; `None` if it did not end.
fn attempted(test: &str) -> Option<(bool, String)> {
    let mut child = Command::new(std::env::current_exe().expect("this test's own file"))
        .args(["--exact", test, "--nocapture"])
        .env(CHILD, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("a child process");
    let (done, ended) = sync_channel(2);
    let (stdout, stderr) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
    let pipes: [Box<dyn Read + Send>; 2] = [Box::new(stdout), Box::new(stderr)];
    for mut pipe in pipes {
        let done = done.clone();
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = pipe.read_to_end(&mut bytes);
            let _ = done.send(String::from_utf8_lossy(&bytes).into_owned());
        });
    }
    let mut output = String::new();
    for _ in 0..2 {
        match ended.recv_timeout(DEADLINE) {
            Ok(text) => output += &text,
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                child.kill().expect("our own child");
                child.wait().expect("our own child");
                return None;
            }
        }
    }
    Some((child.wait().expect("our own child").success(), output))
}
