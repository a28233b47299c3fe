//! `metcd snapshot status|restore` and `metcd recover`: tools for files, not for a running cluster.

use std::path::{Path, PathBuf};

use clap::Args;

use super::client::output::warn;
use super::serve::ConfigArgs;
use super::{CliError, print};
use crate::config::{self, Flag, FlagValue, Loaded, Sources};
use crate::datadir::DataDir;
use crate::restore::{self, Restored};
use crate::snapshot::{SnapshotError, verify_file};

/// `metcd snapshot restore`
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  metcd snapshot restore backup.snap --data-dir metcd-data\n  \
                        # The first of its members, and so on for each\n  \
                        metcd snapshot restore backup.snap --config config/node1.toml\n  \
                        metcd snapshot restore backup.snap --id 1 --data-dir d1 --listen-peer 127.0.0.1:3380 \\\n      \
                        --member 1=http://127.0.0.1:3380 --member 2=http://127.0.0.1:4380 \\\n      \
                        --member 3=http://127.0.0.1:5380\n\n\
                        Run it once for each new member with the same file and the same members, then start them as usual. It is a new \
                        cluster: revisions jump by 1,000,000,000, and watches and pages of the old one end with 410.")]
pub struct RestoreArgs {
    /// The snapshot.
    file: PathBuf,
    #[command(flatten)]
    config: ConfigArgs,
}

/// `metcd recover`
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  metcd recover --data-dir metcd-data --force-new-cluster\n\n\
                        Only when a quorum of members is lost for ever. All other members must stay stopped and be joined anew with empty \
                        directories. What only they had is lost.")]
pub struct RecoverArgs {
    /// The directory of the member that is left; it must be stopped.
    #[arg(long, value_name = "DIR")]
    data_dir: PathBuf,
    /// Make it the only member of a new cluster; nothing is done without it.
    #[arg(long)]
    force_new_cluster: bool,
    /// Where other members will reach it; as before if left out.
    #[arg(long, value_name = "URL")]
    peer_url: Option<String>,
}

/// Makes a data directory from a snapshot; says where, and what it is.
pub fn restore(args: &RestoreArgs) -> Result<(PathBuf, Restored), CliError> {
    // A file that is no snapshot is named before anything else that may be wrong.
    verify_file(&args.file).map_err(|error| unusable(&args.file, &error))?;
    let Loaded { config, .. } = args.config.load()?;
    let restored = restore::restore(&args.file, &config).map_err(failed)?;
    Ok((config.node.data_dir, restored))
}

/// Of a file that is no whole snapshot: what is wrong with it, and what to do.
pub fn unusable(file: &Path, error: &SnapshotError) -> CliError {
    let advice = match error {
        SnapshotError::Corrupt(_) => "use another backup (metcd snapshot save makes one)",
        SnapshotError::TooNew { .. } => "use the build that wrote it, or a newer one",
        SnapshotError::Io { .. } => "name a file that metcd snapshot save wrote",
        SnapshotError::State(_) | SnapshotError::Store(_) => return failed(error),
    };
    CliError::Failed(format!("{}: {error}: {advice}", file.display()))
}

/// Makes the member that is left a cluster of its own.
pub fn recover(args: &RecoverArgs) -> Result<(), CliError> {
    if !args.force_new_cluster {
        return Err(CliError::Usage(
            "a recovery gives up the old cluster, and with it every write that only its other members have: if a majority of them is lost \
             for ever, repeat the command with --force-new-cluster; if they are only down, start them again instead"
                .to_owned(),
        ));
    }
    let config = config_of(args)?;
    let peer_url = args.peer_url.as_deref().map(config::parse_peer_url).transpose();
    let peer_url = peer_url.map_err(|why| CliError::Usage(format!("--peer-url: {why}")))?;
    let restored = restore::force_new_cluster(&config, peer_url.as_deref()).map_err(failed)?;
    let kept = restored.kept.clone().unwrap_or_default();
    print(&format!(
        "{} is the only member, {}, of {}; what was there is kept in {}; new members come with --join\n",
        args.data_dir.display(),
        restored.id,
        described(&restored),
        kept.display(),
    ))?;
    warn(
        "warning: writes that only the other members of the old cluster had are gone. Those that are left must stay stopped: empty their data \
         directories, and they can join this cluster as new members, with their old ids or with others",
    );
    Ok(())
}

/// The cluster that it belongs to.
pub fn described(restored: &Restored) -> String {
    format!("the new cluster {:016x}, at revision {}", restored.cluster_id, restored.revision)
}

/// The directory knows which member it is and which engines wrote it.
fn config_of(args: &RecoverArgs) -> Result<config::Config, CliError> {
    let identity = DataDir::open_offline(&args.data_dir).map_err(failed)?.identity().clone();
    let id = identity
        .node_id
        .ok_or_else(|| CliError::Failed(format!("{} belongs to no member yet", args.data_dir.display())))?;
    let flag = |path: &str, value: FlagValue| Flag {
        path: path.to_owned(),
        value,
        origin: format!("{} of the data directory", path),
    };
    let mut flags = vec![
        flag("node.id", FlagValue::Text(id.to_string())),
        flag("node.data_dir", FlagValue::Text(args.data_dir.display().to_string())),
        flag("store.backend", FlagValue::Text(identity.store_backend)),
        flag("wal.engine", FlagValue::Text(identity.wal_engine)),
    ];
    if !identity.cluster_name.is_empty() {
        flags.push(flag("cluster.name", FlagValue::Text(identity.cluster_name)));
    }
    let sources = Sources {
        file: None,
        env: Vec::new(),
        flags,
    };
    config::load(&sources).map(|loaded| loaded.config).map_err(failed)
}

fn failed(error: impl std::fmt::Display) -> CliError {
    CliError::Failed(error.to_string())
}
