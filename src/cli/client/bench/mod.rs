//! stub
use super::ClientArgs;
use crate::cli::CliError;
use clap::Subcommand;
/// b
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// x
    X,
}
pub(super) fn run(_: &ClientArgs, _: &BenchCommand) -> Result<(), CliError> {
    Ok(())
}
