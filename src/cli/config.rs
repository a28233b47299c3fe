//! `metcd config check` and `metcd config show`.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::Subcommand;

use super::serve::ConfigArgs;
use super::{CliError, print};
use crate::config::{self, ConfigError, Sources};

/// `metcd config …`
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Read a file as `serve` would, over the defaults and nothing else; every problem is a line on stderr.
    #[command(after_help = "Example:\n  metcd config check config/node1.toml")]
    Check {
        /// The TOML file.
        file: PathBuf,
    },
    /// Print every key with its value in force and where that comes from; takes the flags of `serve`.
    #[command(
        after_help = "Examples:\n  metcd config show\n  METCD__RAFT__TICK=100ms metcd config show --config config/node1.toml --set log.level=debug"
    )]
    Show(Box<ConfigArgs>),
}

/// Runs the command.
pub fn run(command: &ConfigCommand) -> Result<(), CliError> {
    match command {
        ConfigCommand::Check { file } => check(file.clone()),
        ConfigCommand::Show(args) => print(&config::show(&args.load()?)),
    }
}

fn check(file: PathBuf) -> Result<(), CliError> {
    let name = file.display().to_string();
    let sources = Sources {
        file: Some(file),
        ..Sources::default()
    };
    let loaded = config::load(&sources).map_err(|error| report(&name, &error))?;
    let warnings = loaded.warnings.iter().map(|warning| format!("{name}: warning: {warning}\n"));
    print(&warnings.chain([format!("{name}: ok\n")]).collect::<String>())
}

/// One problem is the error; of several each is a line, then the verdict.
fn report(name: &str, error: &ConfigError) -> CliError {
    if let [problem] = &error.problems[..] {
        return CliError::Failed(problem.to_string());
    }
    let mut stderr = io::stderr().lock();
    for problem in &error.problems {
        // Nobody is left to tell if stderr is gone.
        let _ = writeln!(stderr, "{problem}");
    }
    let count = error.problems.len();
    CliError::Failed(format!("{name} is not accepted: {count} problems to correct"))
}
