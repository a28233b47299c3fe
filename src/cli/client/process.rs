//! Commands that are run for a user, and stopped when they must be; the signals that say so.

use std::ffi::{OsStr, OsString};
use std::io::{IsTerminal as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process, kill_process_group, test_kill_process_group};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep, timeout_at};

use crate::cli::CliError;
use crate::cli::signals::{is_ignored, is_in_foreground};

/// How often a command is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// From the polite signal to the other one.
const GRACE: Duration = Duration::from_secs(5);

/// A command before it runs.
pub(super) struct Command {
    name: OsString,
    inner: std::process::Command,
}

/// A command that runs. Dropping it kills it.
pub(super) struct Running {
    name: OsString,
    child: Child,
    ended: bool,
    /// It leads a process group of its own, and what it started is in it.
    leads_group: bool,
}

/// How a command ended.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ended(ExitStatus);

impl Command {
    pub(super) fn new(command: &[OsString]) -> Result<Command, CliError> {
        let (name, args) = command
            .split_first()
            .ok_or_else(|| CliError::Usage("no command given after --".to_owned()))?;
        let mut inner = std::process::Command::new(name);
        inner.args(args);
        Ok(Command { name: name.clone(), inner })
    }

    pub(super) fn env(&mut self, name: &str, value: impl AsRef<OsStr>) {
        self.inner.env(name, value);
    }

    pub(super) fn stdin(&mut self, stdin: Stdio) {
        self.inner.stdin(stdin);
    }

    /// Starts it: in a process group of its own, so that what it starts is stopped with it. At a terminal it stays in the user's, which alone
    /// may read the terminal and is what Ctrl-C goes to.
    pub(super) fn spawn(mut self) -> Result<Running, CliError> {
        let leads_group = !std::io::stdin().is_terminal();
        if leads_group {
            self.inner.process_group(0);
        }
        let child = self
            .inner
            .spawn()
            .map_err(|error| CliError::Failed(format!("cannot run {}: {error}", self.name.display())))?;
        Ok(Running {
            name: self.name,
            child,
            ended: false,
            leads_group,
        })
    }
}

impl Running {
    /// Writes its standard input in the background. A command that does not read it is its own business.
    pub(super) fn feed(mut self, input: Vec<u8>) -> Running {
        if let Some(mut stdin) = self.child.stdin.take() {
            std::thread::spawn(move || {
                let _ = stdin.write_all(&input);
            });
        }
        self
    }

    /// Waits for its end. May be cancelled and called again.
    pub(super) async fn wait(&mut self) -> Result<Ended, CliError> {
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => {
                    self.ended = true;
                    return Ok(Ended(status));
                }
                Ok(None) => sleep(LOOK_EVERY).await,
                Err(error) => return Err(CliError::Failed(format!("lost sight of {}: {error}", self.name.display()))),
            }
        }
    }

    /// Sends SIGTERM, and SIGKILL if that does not help in time; returns when it has ended.
    pub(super) async fn stop(&mut self) -> Result<Ended, CliError> {
        self.stop_with(SignalKind::terminate().as_raw_value()).await
    }

    /// The same with the signal of this number first. A command may take another one than SIGTERM for something else than its end: half of
    /// its time later it gets that one as well.
    pub(super) async fn stop_with(&mut self, number: i32) -> Result<Ended, CliError> {
        // Ctrl-C at a terminal goes to everybody there, and a second one tells many programs to drop everything.
        let is_from_terminal = [SignalKind::interrupt(), SignalKind::quit()]
            .map(|kind| kind.as_raw_value())
            .contains(&number);
        let has_it = is_from_terminal && !self.leads_group && is_in_foreground();
        if let Some(signal) = Signal::from_named_raw(number).filter(|_| !has_it) {
            self.signal(signal);
        }
        let begun = Instant::now();
        let deadline = begun + GRACE;
        let mut ended = timeout_at(begun + GRACE / 2, self.wait()).await;
        if ended.is_err() {
            if number != SignalKind::terminate().as_raw_value() {
                self.signal(Signal::TERM);
            }
            ended = timeout_at(deadline, self.wait()).await;
        }
        let ended = match ended {
            Ok(ended) => ended?,
            Err(_elapsed) => {
                self.signal(Signal::KILL);
                self.wait().await?
            }
        };
        self.stop_group(deadline).await;
        Ok(ended)
    }

    /// What the command started and left behind: the group is there as long as one of them is.
    async fn stop_group(&self, deadline: Instant) {
        let Some(group) = self.pid().filter(|_| self.leads_group) else {
            return;
        };
        while test_kill_process_group(group).is_ok() {
            if Instant::now() >= deadline {
                let _ = kill_process_group(group, Signal::KILL);
                return;
            }
            sleep(LOOK_EVERY).await;
        }
    }

    fn pid(&self) -> Option<Pid> {
        i32::try_from(self.child.id()).ok().and_then(Pid::from_raw)
    }

    fn signal(&self, signal: Signal) {
        // The child is not reaped before `ended` is set, so its id is its own. It may have ended by itself.
        if let Some(pid) = self.pid().filter(|_| !self.ended) {
            let _ = if self.leads_group {
                kill_process_group(pid, signal)
            } else {
                kill_process(pid, signal)
            };
        }
    }
}

/// Resolves at SIGINT, SIGTERM, SIGQUIT or SIGHUP, to the signal's number. From when it is first polled, they do not end the process by
/// themselves.
pub(super) async fn interrupted() -> u8 {
    tokio::select! {
        number = arrival(SignalKind::interrupt()) => number,
        number = arrival(SignalKind::terminate()) => number,
        number = unless_ignored(SignalKind::quit()) => number,
        number = unless_ignored(SignalKind::hangup()) => number,
    }
}

/// Works, unless a signal comes first: then what has been begun is dropped, and with it what cleans up after it.
pub(super) async fn unless_interrupted<T>(work: impl Future<Output = Result<T, CliError>>) -> Result<T, CliError> {
    tokio::select! {
        // The signals first: they are listened to before anything begins.
        biased;
        number = interrupted() => Err(CliError::Interrupted(number)),
        done = work => done,
    }
}

async fn unless_ignored(kind: SignalKind) -> u8 {
    if is_ignored(kind) {
        return std::future::pending().await;
    }
    arrival(kind).await
}

/// The same for SIGINT alone.
pub(super) async fn ctrl_c() -> u8 {
    arrival(SignalKind::interrupt()).await
}

async fn arrival(kind: SignalKind) -> u8 {
    // If it cannot be listened to, it does what it always did.
    let Ok(mut arrivals) = signal(kind) else {
        return std::future::pending().await;
    };
    arrivals.recv().await;
    u8::try_from(kind.as_raw_value()).unwrap_or(0)
}

impl Drop for Running {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

impl Ended {
    /// As a shell would tell it: 128 and the signal's number for a command that was ended by one.
    pub(super) fn code(self) -> u8 {
        use std::os::unix::process::ExitStatusExt as _;
        let code = self.0.code().or_else(|| self.0.signal().map(|signal| 128 + signal));
        code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
    }

    /// What to say if it did not go well.
    pub(super) fn trouble(self) -> Option<String> {
        use std::os::unix::process::ExitStatusExt as _;
        match (self.0.code(), self.0.signal()) {
            (Some(0), _) => None,
            (Some(code), _) => Some(format!("ended with exit code {code}")),
            (None, signal) => Some(format!("was ended by signal {}", signal.unwrap_or(0))),
        }
    }
}
