//! The command line: one binary is the server, the client and the tools.
//!
//! Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 not found or condition not met. What goes wrong is one line on stderr
//! that says what to do next.

mod backup;
mod client;
mod config;
mod serve;
mod signals;
mod wal;

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use clap_complete::Shell;
use serde_json::json;

use client::output::{self, Format};

/// A replicated key-value server with etcd's guarantees, spoken to with plain HTTP.
#[derive(Debug, Parser)]
#[command(name = "metcd", version, about, after_help = EXAMPLES, arg_required_else_help = true, max_term_width = 120)]
struct Cli {
    #[command(flatten)]
    client: client::ClientArgs,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  metcd serve                               # a single node on 127.0.0.1:3379, data in ./metcd-data
  metcd serve --config config/node1.toml    # the first of three
  metcd config check config/node1.toml      # would this file be accepted?
  metcd put greeting hello                  # set a key
  metcd get greeting                        # read it
  metcd status                              # how every member is
  metcd shell                               # an interactive console

Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 not found or condition not met.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a member of a cluster, or a single node.
    Serve(Box<serve::ServeArgs>),
    /// Check a configuration file, or show the configuration in force.
    #[command(
        subcommand,
        after_help = "Examples:\n  metcd config check config/node1.toml\n  metcd config show --set log.level=debug"
    )]
    Config(config::ConfigCommand),
    #[command(flatten)]
    Client(client::ClientCommand),
    /// Make the one member that is left a cluster of its own, when a quorum is lost for ever.
    Recover(backup::RecoverArgs),
    /// Look into a log directory that no server has open; nothing in it is changed.
    #[command(
        subcommand,
        after_help = "Examples:\n  metcd wal verify metcd-data\n  metcd wal dump metcd-data | less"
    )]
    Wal(WalCommand),
    /// Print the version and what this build contains.
    #[command(after_help = "Examples:\n  metcd version\n  metcd version --output json")]
    Version,
    /// Print the completion script of a shell.
    #[command(after_help = "Example:\n  metcd completions bash > /etc/bash_completion.d/metcd")]
    Completions {
        /// The shell.
        shell: Shell,
    },
}

/// `metcd wal …`
#[derive(Debug, Subcommand)]
enum WalCommand {
    /// Print what the log holds, one line an entry.
    #[command(after_help = "Example:\n  metcd wal dump metcd-data/wal")]
    Dump {
        /// The log's directory.
        dir: PathBuf,
    },
    /// Check that the log is whole: exit code 1 if it is not.
    #[command(after_help = "Example:\n  metcd wal verify metcd-data/wal")]
    Verify {
        /// The log's directory.
        dir: PathBuf,
    },
}

/// Why a command did not succeed; becomes the exit code.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// Refused or failed: exit code 1.
    #[error("{0}")]
    Failed(String),
    /// The command line is wrong: exit code 2.
    #[error("{0}")]
    Usage(String),
    /// Not found, or a condition is not met: exit code 3.
    #[error("{0}")]
    NotMet(String),
    /// A command that was run for the user failed: its own exit code.
    #[error("{trouble}")]
    Command {
        /// Its exit code.
        code: u8,
        /// What to say.
        trouble: String,
    },
    /// What went wrong was said when it did; the exit code.
    #[error("failed")]
    Reported(u8),
    /// A signal of this number ended it: the exit code that a shell would tell of a process that it kills.
    #[error("interrupted")]
    Interrupted(u8),
    /// Nobody reads stdout any more (`metcd watch … | head`): no error, and nothing more to do.
    #[error("stdout was closed")]
    ReaderGone,
}

impl CliError {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Failed(_) => 1,
            Self::Usage(_) => 2,
            Self::NotMet(_) => 3,
            Self::Command { code, .. } | Self::Reported(code) => *code,
            Self::Interrupted(signal) => signal.saturating_add(128),
            Self::ReaderGone => 0,
        }
    }

    /// One line on stderr, unless there is nothing to say.
    fn say(&self) {
        if !matches!(self, Self::Reported(_) | Self::Interrupted(_) | Self::ReaderGone) {
            // Nobody is left to tell if stderr is gone.
            let _ = writeln!(io::stderr(), "metcd: {}", one_line(&self.to_string()));
        }
    }
}

/// Runs the command line `args`, the program's name first.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    let parsed = command()
        .try_get_matches_from(&args)
        .and_then(|matches| Cli::from_arg_matches(&matches));
    let served = matches!(&parsed, Ok(cli) if matches!(cli.command, Command::Serve(_)));
    let result = match parsed {
        Ok(cli) => run(&cli),
        Err(error) => usage(&error, &Cli::command(), &args),
    };
    let code = match result {
        Ok(()) => 0,
        Err(error) => {
            error.say();
            error.exit_code()
        }
    };
    if served {
        serve::end_process(code);
    }
    ExitCode::from(code)
}

/// The command line, where the help of each command lists what it takes: clap shows global flags everywhere.
fn command() -> clap::Command {
    let mut command = Cli::command();
    command.build();
    let clients = client::ClientCommand::augment_subcommands(clap::Command::new("clients"));
    let is_client = |name: &str| clients.get_subcommands().any(|client| client.get_name() == name);
    command.mut_subcommands(|subcommand| match subcommand.get_name() {
        name if is_client(name) => subcommand,
        "version" => hide_client_options(subcommand, &["output"]),
        _ => hide_client_options(subcommand, &[]),
    })
}

fn hide_client_options(command: clap::Command, but: &[&str]) -> clap::Command {
    let hide = |argument: clap::Arg| {
        let hidden = argument.get_help_heading() == Some(client::CLIENT_OPTIONS) && !but.contains(&argument.get_id().as_str());
        argument.hide(hidden)
    };
    command
        .mut_args(hide)
        .mut_subcommands(|subcommand| hide_client_options(subcommand, but))
}

fn run(cli: &Cli) -> Result<(), CliError> {
    if !matches!(cli.command, Command::Client(_)) {
        cli.client.refuse_elsewhere(matches!(cli.command, Command::Version))?;
    }
    match &cli.command {
        Command::Serve(args) => serve::run(args),
        Command::Config(command) => config::run(command),
        Command::Client(command) => client::run(&cli.client, command),
        Command::Recover(args) => backup::recover(args),
        Command::Wal(command) => look_into_wal(command),
        Command::Version => version(cli.client.format()),
        Command::Completions { shell } => completions(*shell),
    }
}

/// Help and version are answers; everything else is wrong usage, in one line instead of clap's several.
fn usage(error: &clap::Error, command: &clap::Command, args: &[OsString]) -> Result<(), CliError> {
    if [ErrorKind::DisplayHelp, ErrorKind::DisplayVersion].contains(&error.kind()) {
        return print(&error.to_string());
    }
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let level = level(command, args, "");
        let names = level.get_subcommands().map(clap::Command::get_name);
        let names: Vec<&str> = names.filter(|name| *name != "help").collect();
        // The program's own are too many for a line.
        let choice = match level.get_name() == command.get_name() {
            true => String::new(),
            false => format!(" ({})", names.join(", ")),
        };
        return Err(CliError::Usage(format!("no command given{choice}: see --help")));
    }
    let text = error.to_string();
    let message = text
        .split("\n\nUsage:")
        .next()
        .unwrap_or_default()
        .split("\n\nFor more")
        .next()
        .unwrap_or_default();
    let message = message.trim_start_matches("error: ");
    let (what, tips) = match message.split_once("tip: ") {
        Some((what, tips)) => (what, Some(tips.split("tip: ").map(one_line).collect::<Vec<_>>().join("; "))),
        None => (message, None),
    };
    let advice = by_habit(error, command, args)
        .or_else(|| before_the_dashes(error, command, args))
        .or(tips)
        .or_else(|| meant(error, command, args));
    let advice = advice.map(|advice| format!(" ({advice})")).unwrap_or_default();
    // In the shell that would be a command of its own.
    let is_no_command = command.is_no_binary_name_set() && error.kind() == ErrorKind::InvalidSubcommand;
    let help = if is_no_command { "help" } else { "--help" };
    Err(CliError::Usage(format!("{}{advice}: see {help}", one_line(what))))
}

/// What other programs call a command, and what it is called here.
const HABITS: [(&str, &str); 10] = [
    ("set", "put"),
    ("delete", "del"),
    ("remove", "del"),
    ("rm", "del"),
    ("list", "ls"),
    ("keys", "ls"),
    ("members", "member list"),
    ("start", "serve"),
    ("backup", "snapshot save"),
    ("restore", "snapshot restore"),
];

/// A command that was typed by the name it has elsewhere, which no likeness of letters would find.
fn by_habit(error: &clap::Error, command: &clap::Command, args: &[OsString]) -> Option<String> {
    let typed = text(error, ContextKind::InvalidSubcommand)?;
    let (_, name) = HABITS.iter().find(|(habit, _)| *habit == typed)?;
    let first = name.split(' ').next()?;
    let is_here = level(command, args, typed).find_subcommand(first).is_some();
    is_here.then(|| format!("did you mean '{name}'?"))
}

/// A word too many where a command to run may stand, as in `metcd lock backup ./backup.sh`.
fn before_the_dashes(error: &clap::Error, command: &clap::Command, args: &[OsString]) -> Option<String> {
    let typed = text(error, ContextKind::InvalidArg).filter(|typed| !typed.starts_with('-'))?;
    let takes_a_command = level(command, args, typed).get_positionals().any(clap::Arg::is_last_set);
    takes_a_command.then(|| "a command to run stands after --".to_owned())
}

/// The subcommand that is two slips of the fingers or less from the one that was typed. clap's own guess does not see letters that have
/// changed their places.
fn meant(error: &clap::Error, command: &clap::Command, args: &[OsString]) -> Option<String> {
    let typed = text(error, ContextKind::InvalidSubcommand)?;
    let names = level(command, args, typed).get_subcommands().map(clap::Command::get_name);
    names
        .map(|name| (strsim::damerau_levenshtein(name, typed), name))
        .filter(|(slips, _)| *slips <= 2 && *slips < typed.len())
        .min()
        .map(|(_, name)| format!("did you mean '{name}'?"))
}

fn text(error: &clap::Error, kind: ContextKind) -> Option<&str> {
    let Some(ContextValue::String(text)) = error.get(kind) else {
        return None;
    };
    Some(text)
}

/// The command within `command` that the words before `typed` name.
fn level<'a>(command: &'a clap::Command, args: &[OsString], typed: &str) -> &'a clap::Command {
    let before = args.iter().filter_map(|arg| arg.to_str()).take_while(|arg| *arg != typed);
    before.fold(command, |level, arg| level.find_subcommand(arg).unwrap_or(level))
}

fn look_into_wal(command: &WalCommand) -> Result<(), CliError> {
    let mut stdout = io::stdout().lock();
    let (WalCommand::Dump { dir } | WalCommand::Verify { dir }) = command;
    // Whoever names the data directory means the log in it.
    let inside = dir.join("wal");
    let dir = if inside.is_dir() { &inside } else { dir };
    let looked = match command {
        WalCommand::Dump { .. } => wal::dump(dir, &mut stdout),
        WalCommand::Verify { .. } => wal::verify(dir, &mut stdout),
    };
    match looked {
        Ok(wal::EXIT_WHOLE) => Ok(()),
        Ok(_) => Err(CliError::Failed(format!(
            "the log in {} is not whole (what is wrong is on stdout): add this member anew under another id",
            dir.display()
        ))),
        Err(wal::LookError::Out(error)) if error.kind() == io::ErrorKind::BrokenPipe => Err(CliError::ReaderGone),
        Err(wal::LookError::Out(error)) => Err(CliError::Failed(format!("cannot write to stdout: {error}"))),
        Err(wal::LookError::Log(error)) => Err(CliError::Failed(format!(
            "{error}: name the data directory, or the log in it, of a member that is not running"
        ))),
    }
}

fn version(format: Format) -> Result<(), CliError> {
    let rocksdb = cfg!(feature = "rocksdb").then_some("rocksdb");
    let number = env!("CARGO_PKG_VERSION");
    let wals: Vec<&str> = ["sled", "raft-engine"].into_iter().chain(rocksdb).collect();
    let stores: Vec<&str> = ["memory", "sled"].into_iter().chain(rocksdb).collect();
    match format {
        Format::Json => output::json(&json!({"version": number, "wal_engines": wals, "store_backends": stores})),
        Format::Plain => print(&format!(
            "metcd {number}\nwal engines: {}\nstore backends: {}\n",
            wals.join(", "),
            stores.join(", ")
        )),
        Format::Table => output::row(
            ["VERSION", "WAL ENGINES", "STORE BACKENDS"],
            [number.to_owned(), wals.join(" "), stores.join(" ")],
        ),
    }
}

fn completions(shell: Shell) -> Result<(), CliError> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command(), "metcd", &mut script);
    print(&String::from_utf8_lossy(&script))
}

/// Writes to stdout.
fn print(text: &str) -> Result<(), CliError> {
    print_bytes(text.as_bytes())
}

fn print_bytes(bytes: &[u8]) -> Result<(), CliError> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(CliError::ReaderGone),
        Err(error) => Err(CliError::Failed(format!("cannot write to stdout: {error}"))),
    }
}

fn one_line(text: &str) -> String {
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    /// The words of the commands of this program in a piece of shell, without its comments. Whatever the shell would put in the place of
    /// `$name` is 7.
    fn commands(script: &str) -> Vec<Vec<String>> {
        let mut words: Vec<Option<String>> = Vec::new();
        let mut rest = script.chars().peekable();
        let mut word: Option<String> = None;
        while let Some(c) = rest.next() {
            match c {
                '\'' | '"' => {
                    let quoted = rest.by_ref().take_while(|next| *next != c);
                    word.get_or_insert_default().extend(quoted);
                }
                '\\' if rest.next_if_eq(&'\n').is_some() => {}
                '$' if rest.peek().is_some_and(char::is_ascii_alphabetic) => {
                    while rest.next_if(char::is_ascii_alphabetic).is_some() {}
                    word.get_or_insert_default().push('7');
                }
                '#' if word.is_none() => while rest.next_if(|next| *next != '\n').is_some() {},
                ' ' => words.extend(word.take().map(Some)),
                '\n' | '|' | '&' | ';' | '<' | '>' | '(' | ')' => {
                    words.extend(word.take().map(Some));
                    words.push(None);
                }
                c => word.get_or_insert_default().push(c),
            }
        }
        words.extend(word.map(Some));
        let simple = words.split(Option::is_none).map(|words| words.iter().flatten());
        let own = simple.map(|words| words.skip_while(|word| *word != "metcd").cloned().collect::<Vec<_>>());
        own.filter(|words| !words.is_empty()).collect()
    }

    #[test]
    fn the_examples_of_every_command_can_be_pasted_into_a_shell() {
        /// Each command's path with the lines of its help that are indented, as they come when nobody knows how wide they may be.
        fn examples(command: &clap::Command, path: &str, found: &mut Vec<(String, String)>) {
            let path = format!("{path} {}", command.get_name());
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            let lines: Vec<&str> = help.lines().filter(|line| line.starts_with("  ")).collect();
            let shown = command.clone().term_width(100).render_long_help().to_string();
            for line in &lines {
                assert!(line.chars().count() <= 100, "{path}: {line}");
                assert!(shown.lines().any(|shown| shown == *line), "{path}: it is broken: {line}");
            }
            found.push((path.clone(), lines.iter().map(|line| format!("{}\n", line.trim())).collect()));
            command.get_subcommands().for_each(|command| examples(command, &path, found));
        }
        let mut found = Vec::new();
        examples(&command(), "", &mut found);
        let found: Vec<(String, Vec<String>)> = found
            .into_iter()
            .flat_map(|(path, script)| commands(&script).into_iter().map(move |words| (path.clone(), words)))
            .collect();
        assert!(found.len() > 70, "{found:?}");
        for (path, words) in found {
            let parsed = command().try_get_matches_from(&words);
            let why = parsed.err().map(|error| error.to_string());
            assert_eq!(why, None, "the help of{path}: {words:?}");
        }
    }

    #[test]
    fn the_commands_of_an_example_are_what_a_shell_makes_of_it() {
        let script = "id=$(metcd lease grant 30s) && A=1 metcd put a 'b # c' --lease $id # why\nzcat x | metcd a \\\nb > c\n# metcd x\n";
        let words = commands(script);
        let words: Vec<String> = words.iter().map(|words| words.join(",")).collect();
        assert_eq!(words, ["metcd,lease,grant,30s", "metcd,put,a,b # c,--lease,7", "metcd,a,b"]);
    }

    #[test]
    fn wrong_usage_is_one_line_with_the_nearest_flag() {
        let error = Cli::try_parse_from(["metcd", "serve", "--confg", "x"]).expect_err("no such flag");
        let error = usage(&error, &Cli::command(), &[]).expect_err("wrong usage");
        assert_eq!(error.exit_code(), 2);
        let line = one_line(&error.to_string());
        assert!(
            line.contains("'--confg'") && line.contains("'--config'") && !line.contains("Usage"),
            "{line}"
        );
    }
}
