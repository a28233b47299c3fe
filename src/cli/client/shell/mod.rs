//! `metcd shell`: the commands without their program, at a prompt or from a pipe.

mod complete;
mod words;

use std::ffi::OsString;
use std::future::pending;
use std::io::{self, BufRead as _, IsTerminal as _};
use std::path::PathBuf;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};
use rustyline::error::ReadlineError;
use rustyline::history::DefaultHistory;
use rustyline::{CompletionType, Config, Editor};
use serde_json::Value;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

use self::complete::Assistant;
use super::args::duration;
use super::output::Format;
use super::process::{ctrl_c, interrupted};
use super::{CLIENT_OPTIONS, ClientArgs, Session, kv, lease, member, ops, runtime, txn, watch};
use crate::cli::{CliError, print, usage};

const PROMPT: &str = "metcd> ";
const HISTORY_LINES: usize = 1000;

/// One line of the shell.
#[derive(Debug, Parser)]
#[command(
    name = "metcd",
    no_binary_name = true,
    disable_version_flag = true,
    help_template = "{subcommands}\n\nWords with blanks go in quotes; COMMAND --help says more; Ctrl-C ends a watch, Ctrl-D the shell.\n"
)]
struct ShellLine {
    #[command(flatten)]
    how: How,
    #[command(subcommand)]
    command: ShellCommand,
}

/// What one line may have otherwise than the shell was started with.
#[derive(Debug, Default, Args)]
struct How {
    /// How to print this line's answer.
    #[arg(long, short = 'o', global = true, value_enum, value_name = "FORMAT", help_heading = CLIENT_OPTIONS)]
    output: Option<Format>,
    /// How long to try.
    #[arg(long, global = true, value_parser = duration, value_name = "TIME", help_heading = CLIENT_OPTIONS)]
    timeout: Option<Duration>,
    /// Read the answering member's own state: needs no quorum, may be stale.
    #[arg(long, global = true, help_heading = CLIENT_OPTIONS)]
    serializable: bool,
}

impl How {
    fn of(&self, session: &Session) -> Session {
        let mut session = session.clone();
        session.format = self.output.unwrap_or(session.format);
        if let Some(timeout) = self.timeout {
            session.client = session.client.with_timeout(timeout);
            session.timeout = Some(timeout);
        }
        if self.serializable {
            session.client = session.client.with_serializable_reads(true);
        }
        session
    }
}

#[derive(Debug, Subcommand)]
enum ShellCommand {
    /// Set a key: set a hello-world
    #[command(alias = "put")]
    Set(kv::PutArgs),
    /// Print a value: get a
    Get(kv::GetArgs),
    /// Delete a key: del a, del --prefix session/
    Del(kv::DelArgs),
    /// List keys: ls, ls session/
    Ls(kv::LsArgs),
    /// Print changes until Ctrl-C: watch a, watch --prefix session/
    Watch(watch::WatchArgs),
    /// A transaction: txn {"then":[{"put":{"key":"a","value":"b"}}]}
    Txn {
        /// JSON.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        json: Vec<OsString>,
    },
    /// Leases: lease grant 30s, lease list
    #[command(subcommand)]
    Lease(lease::LeaseCommand),
    /// The members.
    Members,
    /// The same, and changes to them: member add http://127.0.0.1:6380
    #[command(subcommand)]
    Member(member::MemberCommand),
    /// The leader; leader transfer 2
    Leader {
        #[command(subcommand)]
        command: Option<member::LeaderCommand>,
    },
    /// How every member is.
    Status,
    /// Whether a linearizable read works.
    Health,
    /// The digest of the store's content: hash, hash --revision 12
    Hash(ops::HashArgs),
    /// Drop history before a revision: compact 12
    Compact(ops::CompactArgs),
    /// Leave.
    #[command(alias = "quit")]
    Exit,
}

/// The commands, with help that can be typed here: examples without the program's name, and none for another shell.
fn command() -> clap::Command {
    let mut command = ShellLine::command();
    command.build();
    command.mut_subcommands(typed_here).mut_subcommand("set", |set| {
        set.mut_args(|arg| match arg.get_id() == "value" {
            true => arg.help("The value"),
            false => arg,
        })
    })
}

fn typed_here(command: clap::Command) -> clap::Command {
    let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    let help = help_here(command.get_name(), &help);
    command.after_help(help).mut_subcommands(typed_here)
}

/// The help as it is here. `name` is the command's, which for `put` is another one.
fn help_here(name: &str, help: &str) -> String {
    let lines = help.lines().filter_map(|line| match line.strip_prefix("  ") {
        Some(example) if example.contains(['<', '|', '&', '$', ';']) => None,
        Some(example) => {
            let example = example.strip_prefix("metcd ").unwrap_or(example);
            let renamed = example.strip_prefix("put ").map(|rest| format!("{name} {rest}"));
            Some(format!("  {}", renamed.as_deref().unwrap_or(example)))
        }
        None => Some(line.to_owned()),
    });
    let lines: Vec<String> = lines.collect();
    match lines.as_slice() {
        [title] if title.starts_with("Example") => String::new(),
        lines => lines.join("\n"),
    }
}

/// Whether the shell goes on.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    Line,
    Exit,
}

/// Runs the shell until its end.
pub(super) fn run(args: &ClientArgs) -> Result<(), CliError> {
    let session = args.session()?;
    let runtime = Rc::new(runtime()?);
    if io::stdin().is_terminal() {
        converse(&session, &runtime)
    } else {
        carry_out(&session, &runtime)
    }
}

/// At a terminal: what fails is said, and the next line asked for.
fn converse(session: &Session, runtime: &Rc<Runtime>) -> Result<(), CliError> {
    let broken = |error: ReadlineError| CliError::Failed(format!("the terminal cannot be read: {error}"));
    let config = Config::builder()
        .completion_type(CompletionType::List)
        .max_history_size(HISTORY_LINES)
        .map_err(broken)?
        .build();
    let mut editor: Editor<Assistant, DefaultHistory> = Editor::with_config(config).map_err(broken)?;
    editor.set_helper(Some(Assistant::new(&session.client, runtime.clone())));
    let history = history_file();
    if let Some(history) = &history {
        // The first time there is none.
        let _ = editor.load_history(history);
    }
    loop {
        let line = match editor.readline(PROMPT) {
            Ok(line) => line,
            Err(ReadlineError::Interrupted) => continue,
            Err(ReadlineError::Eof) => break,
            Err(error) => return Err(broken(error)),
        };
        if line.trim().is_empty() {
            continue;
        }
        // The history is a convenience: a shell without it still works.
        let _ = editor.add_history_entry(line.as_str());
        // Ctrl-C ends the command, not the shell.
        match execute(session, runtime, &line, ctrl_c()) {
            Ok(Next::Line) => {}
            Ok(Next::Exit) => break,
            Err(error) => error.say(),
        }
    }
    if let Some(history) = &history {
        let _ = save_history(&mut editor, history);
    }
    Ok(())
}

/// From a pipe: every line is carried out; the exit code is that of the first one that failed. A signal ends the whole script, also while
/// it waits for a line: so lines are read in a thread, and signals are listened to from the beginning to the end.
fn carry_out(session: &Session, runtime: &Runtime) -> Result<(), CliError> {
    let mut first = None;
    let mut lines = read_ahead();
    let mut stop = pin!(interrupted());
    loop {
        let next = runtime.block_on(async {
            tokio::select! {
                line = lines.recv() => Ok(line),
                signal = &mut stop => Err(CliError::Interrupted(signal)),
            }
        });
        let Some(line) = next? else { break };
        let line = line.map_err(|error| CliError::Failed(format!("cannot read standard input: {error}")))?;
        let done = match String::from_utf8(line) {
            Ok(line) => execute(session, runtime, &line, stop.as_mut()),
            Err(error) => Err(CliError::Usage(format!(
                "a line is not UTF-8 and was passed over: {:?}; in double quotes \\xff is such a byte",
                String::from_utf8_lossy(error.as_bytes()),
            ))),
        };
        match done {
            Ok(Next::Line) => {}
            Ok(Next::Exit) => break,
            Err(CliError::ReaderGone) => break,
            Err(CliError::Interrupted(signal)) => return Err(CliError::Interrupted(signal)),
            Err(error) => {
                error.say();
                first = first.or(Some(error.exit_code()));
            }
        }
    }
    first.map_or(Ok(()), |code| Err(CliError::Reported(code)))
}

/// The lines of standard input, read one ahead of the one that is carried out; the reader waits while there are more.
fn read_ahead() -> mpsc::Receiver<io::Result<Vec<u8>>> {
    let (line_tx, line_rx) = mpsc::channel(1);
    std::thread::spawn(move || {
        for line in io::stdin().lock().split(b'\n') {
            // Nobody waits for more after `exit`.
            if line_tx.blocking_send(line).is_err() {
                break;
            }
        }
    });
    line_rx
}

/// Carries out a line; `stop` ends its command.
fn execute(session: &Session, runtime: &Runtime, line: &str, stop: impl Future<Output = u8>) -> Result<Next, CliError> {
    let (session, command) = match parse(line)? {
        Parsed::Nothing => return Ok(Next::Line),
        Parsed::Help(text) => return print(&text).map(|()| Next::Line),
        Parsed::Line(ShellLine {
            command: ShellCommand::Exit,
            ..
        }) => return Ok(Next::Exit),
        Parsed::Line(ShellLine { how, command }) => (how.of(session), command),
    };
    runtime.block_on(until(stop, &session, &command)).map(|()| Next::Line)
}

/// What a line says.
enum Parsed {
    Nothing,
    Help(String),
    Line(ShellLine),
}

fn parse(line: &str) -> Result<Parsed, CliError> {
    if let Some(json) = line
        .trim_start()
        .strip_prefix("txn ")
        .filter(|rest| rest.trim_start().starts_with('{'))
    {
        // As it stands: JSON has quotes of its own.
        let json = vec![OsString::from(json)];
        return Ok(Parsed::Line(ShellLine {
            how: How::default(),
            command: ShellCommand::Txn { json },
        }));
    }
    let words = words::split(line).map_err(CliError::Usage)?;
    if words.is_empty() {
        return Ok(Parsed::Nothing);
    }
    let parsed = command()
        .try_get_matches_from(&words)
        .and_then(|matches| ShellLine::from_arg_matches(&matches));
    match parsed {
        Ok(line) => Ok(Parsed::Line(line)),
        Err(error) if error.kind() == ErrorKind::DisplayHelp => Ok(Parsed::Help(error.to_string())),
        Err(_) if words.iter().any(|word| word.as_encoded_bytes().starts_with(b"--endpoints")) => Err(CliError::Usage(
            "the shell has its endpoints from its start: leave it, and start it with --endpoints URL".to_owned(),
        )),
        Err(error) => usage(&error, &command(), &words).map(|()| Parsed::Nothing),
    }
}

/// Carries out a command, unless `stop` comes first.
async fn until(stop: impl Future<Output = u8>, session: &Session, command: &ShellCommand) -> Result<(), CliError> {
    if let ShellCommand::Watch(args) = command
        && args.runs_a_command()
    {
        // It has a command of its own to stop before it ends.
        return watch::run(session, args, stop).await;
    }
    tokio::select! {
        result = dispatch(session, command) => result,
        signal = stop => Err(CliError::Interrupted(signal)),
    }
}

async fn dispatch(session: &Session, command: &ShellCommand) -> Result<(), CliError> {
    match command {
        ShellCommand::Set(args) if args.reads_stdin() => Err(CliError::Usage("write the value itself here, not -".to_owned())),
        ShellCommand::Set(args) => kv::put(session, args).await,
        ShellCommand::Get(args) => kv::get(session, args).await.and_then(|()| end_line(session)),
        ShellCommand::Del(args) => kv::del(session, args).await,
        ShellCommand::Ls(args) => kv::ls(session, args).await,
        ShellCommand::Watch(args) => watch::run(session, args, pending()).await,
        ShellCommand::Txn { json } => {
            let text = json.join(&OsString::from(" "));
            let txn = serde_json::from_slice(text.as_encoded_bytes());
            let txn: Value = txn.map_err(|error| CliError::Usage(format!("the transaction is not JSON: {error}")))?;
            txn::commit(session, &txn).await
        }
        ShellCommand::Lease(command) => lease::run(session, command).await,
        ShellCommand::Members => member::run(session, &member::MemberCommand::List).await,
        ShellCommand::Member(command) => member::run(session, command).await,
        ShellCommand::Leader { command } => member::leader(session, command.as_ref().unwrap_or(&member::LeaderCommand::Show)).await,
        ShellCommand::Status => ops::status(session).await,
        ShellCommand::Health => ops::health(session).await,
        ShellCommand::Hash(args) => ops::hash(session, args).await,
        ShellCommand::Compact(args) => ops::compact(session, args).await,
        ShellCommand::Exit => Ok(()),
    }
}

/// A value goes into a pipe as it is. Here the output of the next line follows it, so that it needs an end.
fn end_line(session: &Session) -> Result<(), CliError> {
    match session.format {
        Format::Plain if !io::stdout().is_terminal() => print("\n"),
        Format::Plain | Format::Json | Format::Table => Ok(()),
    }
}

/// `$XDG_STATE_HOME/metcd/history`, by default below `~/.local/state`.
fn history_file() -> Option<PathBuf> {
    let state = match std::env::var_os("XDG_STATE_HOME").filter(|dir| !dir.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None => PathBuf::from(std::env::var_os("HOME").filter(|dir| !dir.is_empty())?).join(".local/state"),
    };
    Some(state.join("metcd").join("history"))
}

fn save_history(editor: &mut Editor<Assistant, DefaultHistory>, file: &std::path::Path) -> rustyline::Result<()> {
    if let Some(directory) = file.parent() {
        std::fs::create_dir_all(directory)?;
    }
    editor.save_history(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_commands_are_consistent() {
        ShellLine::command().debug_assert();
    }

    #[test]
    fn help_names_every_command() {
        let error = command().try_get_matches_from(["help"]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::DisplayHelp);
        let help = error.to_string();
        for name in ["set", "get", "del", "ls", "watch", "txn", "members", "status", "help", "exit"] {
            assert!(
                help.contains(&format!("\n  {name} ")) || help.starts_with(&format!("  {name} ")),
                "{name}: {help}"
            );
        }
    }

    #[test]
    fn the_examples_of_every_command_can_be_typed_here() {
        fn examples(command: &clap::Command, found: &mut Vec<String>) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(!help.contains("metcd "), "{help}");
            let lines = help.lines().filter_map(|line| line.strip_prefix("  "));
            found.extend(lines.filter(|line| !line.starts_with(' ')).map(str::to_owned));
            command.get_subcommands().for_each(|command| examples(command, found));
        }
        let mut found = Vec::new();
        examples(&command(), &mut found);
        assert!(found.len() > 15 && found.contains(&"set greeting hello".to_owned()), "{found:?}");
        for line in found {
            let words = words::split(&line).unwrap();
            let parsed = command().try_get_matches_from(&words);
            assert!(parsed.is_ok(), "{line}: {}", parsed.err().unwrap());
        }
    }
}
