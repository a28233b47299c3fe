//! `metcd shell`: the commands without their program, at a prompt or from a pipe.

mod complete;
mod words;

use std::ffi::OsString;
use std::io::{self, BufRead as _, IsTerminal as _};
use std::path::PathBuf;
use std::rc::Rc;

use clap::error::ErrorKind;
use clap::{CommandFactory as _, Parser};
use rustyline::error::ReadlineError;
use rustyline::history::DefaultHistory;
use rustyline::{CompletionType, Config, Editor};
use serde_json::Value;
use tokio::runtime::Runtime;

use self::complete::Assistant;
use super::output::Format;
use super::{ClientArgs, Session, kv, lease, member, ops, runtime, txn, watch};
use crate::cli::{CliError, print, usage};

const PROMPT: &str = "metcd> ";
const HISTORY_LINES: usize = 1000;

/// One line of the shell.
#[derive(Debug, Parser)]
#[command(
    name = "metcd",
    no_binary_name = true,
    disable_version_flag = true,
    help_template = "{subcommands}\n\nWords with blanks go in quotes; COMMAND --help says more; Ctrl-C ends a watch, Ctrl-D the shell.\n",
    subcommand_required = true
)]
enum ShellLine {
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
    /// The leader.
    Leader,
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
        match execute(session, runtime, &line) {
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

/// From a pipe: every line is carried out; the exit code is that of the first one that failed.
fn carry_out(session: &Session, runtime: &Runtime) -> Result<(), CliError> {
    let mut first = None;
    for line in io::stdin().lock().lines() {
        let line = line.map_err(|error| CliError::Failed(format!("cannot read standard input: {error}")))?;
        match execute(session, runtime, &line) {
            Ok(Next::Line) => {}
            Ok(Next::Exit) => break,
            Err(CliError::ReaderGone) => break,
            Err(error) => {
                error.say();
                first = first.or(Some(error.exit_code()));
            }
        }
    }
    first.map_or(Ok(()), |code| Err(CliError::Reported(code)))
}

fn execute(session: &Session, runtime: &Runtime, line: &str) -> Result<Next, CliError> {
    if let Some(json) = line
        .trim_start()
        .strip_prefix("txn ")
        .filter(|rest| rest.trim_start().starts_with('{'))
    {
        // As it stands: JSON has quotes of its own.
        let txn: Value = serde_json::from_str(json).map_err(|error| CliError::Usage(format!("the transaction is not JSON: {error}")))?;
        runtime.block_on(txn::commit(session, &txn))?;
        return Ok(Next::Line);
    }
    let words = words::split(line).map_err(CliError::Usage)?;
    if words.is_empty() {
        return Ok(Next::Line);
    }
    match ShellLine::try_parse_from(&words) {
        Ok(ShellLine::Exit) => Ok(Next::Exit),
        Ok(command) => runtime.block_on(until_interrupted(session, &command)).map(|()| Next::Line),
        Err(error) if error.kind() == ErrorKind::DisplayHelp => print(&error.to_string()).map(|()| Next::Line),
        Err(error) => usage(&error, &ShellLine::command(), &words).map(|()| Next::Line),
    }
}

/// Ctrl-C ends the command, not the shell.
async fn until_interrupted(session: &Session, command: &ShellLine) -> Result<(), CliError> {
    if !io::stdin().is_terminal() {
        return dispatch(session, command).await;
    }
    tokio::select! {
        result = dispatch(session, command) => result,
        _ = tokio::signal::ctrl_c() => Ok(()),
    }
}

async fn dispatch(session: &Session, command: &ShellLine) -> Result<(), CliError> {
    match command {
        ShellLine::Set(args) if args.reads_stdin() => Err(CliError::Usage("write the value itself here, not -".to_owned())),
        ShellLine::Set(args) => kv::put(session, args).await,
        ShellLine::Get(args) => kv::get(session, args).await.and_then(|()| end_line(session)),
        ShellLine::Del(args) => kv::del(session, args).await,
        ShellLine::Ls(args) => kv::ls(session, args).await,
        ShellLine::Watch(args) => watch::run(session, args).await,
        ShellLine::Txn { json } => {
            let text = json.join(&OsString::from(" "));
            let txn = serde_json::from_slice(text.as_encoded_bytes());
            let txn: Value = txn.map_err(|error| CliError::Usage(format!("the transaction is not JSON: {error}")))?;
            txn::commit(session, &txn).await
        }
        ShellLine::Lease(command) => lease::run(session, command).await,
        ShellLine::Members => member::run(session, &member::MemberCommand::List).await,
        ShellLine::Leader => member::leader(session, &member::LeaderCommand::Show).await,
        ShellLine::Status => ops::status(session).await,
        ShellLine::Health => ops::health(session).await,
        ShellLine::Hash(args) => ops::hash(session, args).await,
        ShellLine::Compact(args) => ops::compact(session, args).await,
        ShellLine::Exit => Ok(()),
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
        let error = ShellLine::try_parse_from(["help"]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::DisplayHelp);
        let help = error.to_string();
        for name in ["set", "get", "del", "ls", "watch", "txn", "members", "status", "help", "exit"] {
            assert!(
                help.contains(&format!("\n  {name} ")) || help.starts_with(&format!("  {name} ")),
                "{name}: {help}"
            );
        }
    }
}
