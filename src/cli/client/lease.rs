//! `metcd lease …`.

use std::time::Duration;

use clap::Subcommand;
use tokio::time::sleep;

use super::args::duration;
use super::output::{self, Format, Table};
use super::{Session, print};
use crate::cli::CliError;
use crate::client::{Lease, LeaseDetail};

/// `metcd lease …`
#[derive(Debug, Subcommand)]
pub enum LeaseCommand {
    /// Make a lease; prints its id.
    #[command(after_help = "Example:\n  id=$(metcd lease grant 30s) && metcd put session/7 alice --lease $id")]
    Grant {
        /// How long it lives without a keepalive.
        #[arg(value_parser = duration)]
        ttl: Duration,
    },
    /// List all leases.
    #[command(after_help = "Example:\n  metcd lease list --output table")]
    List,
    /// Print a lease's remaining time and keys.
    #[command(after_help = "Example:\n  metcd lease show 7587862094")]
    Show {
        /// The lease.
        id: String,
    },
    /// Start a lease's time anew.
    #[command(after_help = "Examples:\n  metcd lease keepalive 7587862094\n  metcd lease keepalive 7587862094 --forever")]
    Keepalive {
        /// The lease.
        id: String,
        /// Go on until stopped, or until the lease is lost.
        #[arg(long)]
        forever: bool,
    },
    /// End a lease and delete its keys.
    #[command(after_help = "Example:\n  metcd lease revoke 7587862094")]
    Revoke {
        /// The lease.
        id: String,
    },
}

pub(super) async fn run(session: &Session, command: &LeaseCommand) -> Result<(), CliError> {
    match command {
        LeaseCommand::Grant { ttl } => grant(session, *ttl).await,
        LeaseCommand::List => list(session, &session.client.leases().await?),
        LeaseCommand::Show { id } => show(session, &session.client.lease(id).await?),
        LeaseCommand::Keepalive { id, forever } => keep_alive(session, id, *forever).await,
        LeaseCommand::Revoke { id } => {
            session.client.revoke_lease(id).await?;
            match session.format {
                Format::Json => output::json(&serde_json::json!({"id": id, "revoked": true})),
                Format::Plain => print(&format!("lease {id} revoked\n")),
                Format::Table => output::row(["ID", "REVOKED"], [id.clone(), "true".to_owned()]),
            }
        }
    }
}

async fn grant(session: &Session, ttl: Duration) -> Result<(), CliError> {
    let lease = session.client.grant_lease(ttl).await?;
    match session.format {
        Format::Json => output::json(&lease),
        Format::Plain => print(&format!("{}\n", lease.id)),
        Format::Table => output::row(["ID", "TTL"], [lease.id, seconds(lease.ttl)]),
    }
}

fn list(session: &Session, leases: &[LeaseDetail]) -> Result<(), CliError> {
    match session.format {
        // The list does not say what hangs on them.
        Format::Json => {
            let mut listed = serde_json::json!({"leases": leases});
            for lease in listed["leases"].as_array_mut().into_iter().flatten() {
                lease.as_object_mut().and_then(|lease| lease.shift_remove("keys"));
            }
            output::json(&listed)
        }
        Format::Plain => print(&leases.iter().map(|lease| format!("{}\n", lease.id)).collect::<String>()),
        Format::Table => {
            let mut table = Table::new(&["ID", "TTL", "BELONGS TO"]);
            for lease in leases {
                let owner = if lease.owned { "its key" } else { "whoever made it" };
                table.row([lease.id.clone(), seconds(lease.ttl), owner.to_owned()]);
            }
            table.print()
        }
    }
}

fn show(session: &Session, lease: &LeaseDetail) -> Result<(), CliError> {
    if session.format == Format::Json {
        return output::json(lease);
    }
    let remaining = lease.remaining.map_or_else(|| "?".to_owned(), seconds);
    let keys: Vec<&str> = lease.keys.iter().chain(&lease.keys_base64).map(String::as_str).collect();
    if session.format == Format::Plain {
        let keys: String = keys.iter().map(|key| format!("{key}\n")).collect();
        return print(&format!("lease {}, {remaining} of {} left\n{keys}", lease.id, seconds(lease.ttl)));
    }
    output::row(
        ["ID", "TTL", "REMAINING", "KEYS"],
        [lease.id.clone(), seconds(lease.ttl), remaining, keys.join(" ")],
    )
}

async fn keep_alive(session: &Session, id: &str, forever: bool) -> Result<(), CliError> {
    loop {
        let lease = session.client.keep_lease_alive(id).await?;
        match session.format {
            Format::Json => output::json(&lease)?,
            Format::Plain => print(&format!("lease {id} has {} again\n", seconds(lease.ttl)))?,
            Format::Table => output::row(["ID", "TTL"], [id.to_owned(), seconds(lease.ttl)])?,
        }
        if !forever {
            return Ok(());
        }
        sleep(renewal(&lease)).await;
    }
}

/// How long to wait between two keepalives: a third of the lease, so that two may fail.
pub(super) fn renewal(lease: &Lease) -> Duration {
    Duration::try_from_secs_f64(lease.ttl / 3.0)
        .unwrap_or(Duration::from_secs(1))
        .max(Duration::from_millis(50))
}

fn seconds(seconds: f64) -> String {
    format!("{} s", (seconds * 10.0).round() / 10.0)
}
