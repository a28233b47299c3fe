//! The commands that speak to a cluster.

mod args;
mod bench;
mod kv;
mod lease;
mod lock;
mod member;
mod ops;
pub mod output;
mod process;
mod shell;
mod snapshot;
mod transfer;
mod txn;
mod watch;
mod whole_file;

use std::time::Duration;

use clap::Subcommand;

pub use args::{CLIENT_OPTIONS, ClientArgs};

use self::output::Format;
use self::snapshot::SnapshotCommand;
use super::{CliError, print, print_bytes};
use crate::client::{Client, ClientError};

/// One command for a cluster.
#[derive(Debug, Subcommand)]
pub enum ClientCommand {
    /// Set a key.
    Put(kv::PutArgs),
    /// Print the value of a key.
    Get(kv::GetArgs),
    /// Delete a key, or all keys that begin so.
    Del(kv::DelArgs),
    /// List keys.
    Ls(kv::LsArgs),
    /// Print changes as they come, or run a command for each.
    Watch(watch::WatchArgs),
    /// Compare, then one of two branches, in one revision.
    Txn(txn::TxnArgs),
    /// Leases: keys that live as long as somebody says so.
    #[command(
        subcommand,
        after_help = "Examples:\n  metcd lease grant 30s\n  metcd lease list\n  metcd lease revoke 7"
    )]
    Lease(lease::LeaseCommand),
    /// Hold a lock, and run a command while it is held.
    Lock(lock::LockArgs),
    /// Stand for leader, and run a command while leading.
    Elect(lock::ElectArgs),
    /// The members of the cluster, and changes to them.
    #[command(
        subcommand,
        after_help = "Examples:\n  metcd member list\n  metcd member add http://127.0.0.1:6380\n  metcd member remove 3"
    )]
    Member(member::MemberCommand),
    /// The leader.
    #[command(subcommand, after_help = "Examples:\n  metcd leader show\n  metcd leader transfer 2")]
    Leader(member::LeaderCommand),
    /// How every member is, as a table.
    #[command(after_help = "Examples:\n  metcd status\n  metcd status --output json")]
    Status,
    /// Whether a linearizable read works.
    #[command(after_help = "Example:\n  metcd health --timeout 2s && echo fine")]
    Health,
    /// Drop history before a revision.
    Compact(ops::CompactArgs),
    /// The digest of the store's content, equal on all healthy members.
    Hash(ops::HashArgs),
    /// Write all keys as JSON lines.
    Export(transfer::ExportArgs),
    /// Read JSON lines and set their keys.
    Import(transfer::ImportArgs),
    /// Backups: save one, check one, begin a new cluster from one.
    #[command(
        subcommand,
        after_help = "Examples:\n  metcd snapshot save backup.metcd\n  metcd snapshot status backup.metcd\n  metcd snapshot restore backup.metcd --data-dir new"
    )]
    Snapshot(snapshot::SnapshotCommand),
    /// An interactive console with history and completion; reads commands from a pipe too.
    #[command(after_help = "Examples:\n  metcd shell\n  printf 'set a hello-world\\nget a\\n' | metcd shell")]
    Shell,
    /// Put load on a server and measure it.
    #[command(subcommand)]
    Bench(Box<bench::BenchCommand>),
}

/// What every command works with.
#[derive(Debug, Clone)]
struct Session {
    client: Client,
    format: Format,
    /// None if the user gave none: some commands have a better default.
    timeout: Option<Duration>,
}

/// Runs a command.
///
/// # Errors
/// What goes wrong, with its exit code.
pub fn run(args: &ClientArgs, command: &ClientCommand) -> Result<(), CliError> {
    if let ClientCommand::Bench(command) = command {
        return bench::run(args, command);
    }
    if let ClientCommand::Snapshot(SnapshotCommand::Status { file }) = command {
        return snapshot::status(file, args.format());
    }
    if let ClientCommand::Snapshot(SnapshotCommand::Restore(restore)) = command {
        return snapshot::restore(restore, args.format());
    }
    if let ClientCommand::Shell = command {
        return shell::run(args);
    }
    let runtime = runtime()?;
    let result = runtime.block_on(dispatch(&args.session()?, command));
    // Whoever interrupts a command does not wait for what it was still reading or writing.
    runtime.shutdown_background();
    result
}

async fn dispatch(session: &Session, command: &ClientCommand) -> Result<(), CliError> {
    match command {
        ClientCommand::Put(args) => kv::put(session, args).await,
        ClientCommand::Get(args) => kv::get(session, args).await,
        ClientCommand::Del(args) => kv::del(session, args).await,
        ClientCommand::Ls(args) => kv::ls(session, args).await,
        ClientCommand::Watch(args) => watch::run(session, args, process::interrupted()).await,
        ClientCommand::Txn(args) => txn::run(session, args).await,
        ClientCommand::Lease(command) => lease::run(session, command).await,
        ClientCommand::Lock(args) => lock::lock(session, args).await,
        ClientCommand::Elect(args) => lock::elect(session, args).await,
        ClientCommand::Member(command) => member::run(session, command).await,
        ClientCommand::Leader(command) => member::leader(session, command).await,
        ClientCommand::Status => ops::status(session).await,
        ClientCommand::Health => ops::health(session).await,
        ClientCommand::Compact(args) => ops::compact(session, args).await,
        ClientCommand::Hash(args) => ops::hash(session, args).await,
        ClientCommand::Export(args) => transfer::export(session, args).await,
        ClientCommand::Import(args) => transfer::import(session, args).await,
        ClientCommand::Snapshot(SnapshotCommand::Save(args)) => snapshot::save(session, args).await,
        // These need no session, or make their own: see `run`.
        ClientCommand::Bench(_) | ClientCommand::Shell | ClientCommand::Snapshot(_) => Ok(()),
    }
}

/// One thread is enough for a client, and starts fastest.
fn runtime() -> Result<tokio::runtime::Runtime, CliError> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| CliError::Failed(format!("cannot start: {error}")))
}

impl From<ClientError> for CliError {
    fn from(error: ClientError) -> CliError {
        if error.is_not_met() {
            let detail = error.problem().map(|problem| problem.detail.clone());
            return CliError::NotMet(detail.unwrap_or_default());
        }
        match &error {
            ClientError::Invalid(why) => CliError::Usage(why.clone()),
            ClientError::Unreachable(_)
            | ClientError::Lost { .. }
            | ClientError::Deadline { .. }
            | ClientError::Refused(_)
            | ClientError::Protocol(_) => CliError::Failed(error.to_string()),
        }
    }
}
