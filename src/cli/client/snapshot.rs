//! `metcd snapshot save`: a backup from a running cluster.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use indicatif::ProgressBar;

use super::output::{self, Format};
use super::process::unless_interrupted;
use super::transfer::{Unit, progress};
use super::whole_file::WholeFile;
use super::{Session, print};
use crate::cli::{CliError, backup};
use crate::client::ByteStream;
use crate::snapshot::{SnapshotMeta, tally_file, verify_file};

/// `metcd snapshot …`
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Write a consistent backup of the whole store.
    Save(SaveArgs),
    /// Check a backup to its last byte and say what is in it.
    #[command(after_help = "Example:\n  metcd snapshot status backup.snap")]
    Status {
        /// The backup.
        file: PathBuf,
    },
    /// Make the data directory of a member of a new cluster from a backup.
    Restore(Box<backup::RestoreArgs>),
}

/// `metcd snapshot save`
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  metcd snapshot save backup-$(date +%F).snap")]
pub struct SaveArgs {
    /// The file; it is there whole or not at all.
    file: PathBuf,
}

pub(super) async fn save(session: &Session, args: &SaveArgs) -> Result<(), CliError> {
    if args.file.as_os_str() == "-" {
        return Err(CliError::Usage(
            "a backup is checked before it is kept, so it needs a file: name one (./- if that is its name), or pipe \
             `curl -f http://…/v1/snapshot` and check what arrives with `metcd snapshot status`"
                .to_owned(),
        ));
    }
    let meta = unless_interrupted(write(session, &args.file)).await?;
    match session.format {
        Format::Json => output::json(&serde_json::json!({
            "file": args.file.display().to_string(), "revision": meta.revision, "bytes": meta.bytes,
        })),
        Format::Plain => print(&format!("saved revision {}, {}\n", meta.revision, output::size(meta.bytes))),
        Format::Table => output::row(
            ["FILE", "REVISION", "SIZE"],
            [args.file.display().to_string(), meta.revision.to_string(), output::size(meta.bytes)],
        ),
    }
}

async fn write(session: &Session, file: &Path) -> Result<SnapshotMeta, CliError> {
    let output = WholeFile::create(file, "name a file, which is written whole or not at all")?;
    let mut stream = session.client.snapshot().await?;
    copy(&mut stream, &mut output.file())
        .await?
        .map_err(|error| output.unwritable(&error))?;
    // The stream carries its own checksums: what is kept under the name asked for has passed them. To read it all takes its time, and
    // whoever interrupts it shall not wait.
    let partial = output.partial().to_owned();
    let verified = tokio::task::spawn_blocking(move || verify_file(&partial)).await;
    let verified = verified.map_err(|error| CliError::Failed(format!("the backup could not be checked: {error}")))?;
    let meta = verified.map_err(|error| CliError::Failed(format!("what arrived is not whole: {error}")))?;
    output.keep().await?;
    Ok(meta)
}

async fn copy(stream: &mut ByteStream, output: &mut impl Write) -> Result<io::Result<()>, CliError> {
    let bar = match stream.expected_bytes() {
        Some(bytes) => progress("save", Unit::Bytes, bytes),
        None => progress("save", Unit::EstimatedBytes, stream.estimated_bytes().unwrap_or(0)),
    };
    while let Some(piece) = stream.next().await? {
        if let Err(error) = output.write_all(&piece) {
            return Ok(Err(error));
        }
        advance(&bar, piece.len() as u64);
    }
    bar.finish_and_clear();
    Ok(Ok(()))
}

/// So many more bytes have arrived. The total may have been estimated too low; no more than all of it is ever shown.
fn advance(bar: &ProgressBar, bytes: u64) {
    let arrived = bar.position() + bytes;
    if bar.length().is_some_and(|length| length < arrived) {
        bar.set_length(arrived);
    }
    bar.set_position(arrived);
}

/// Checks a file and says what is in it.
pub(super) fn status(file: &Path, format: Format) -> Result<(), CliError> {
    let (meta, content) = tally_file(file).map_err(|error| backup::unusable(file, &error))?;
    let (keys, hash) = (content.keys(), format!("{:032x}", content.hash()));
    let digest: String = meta.digest.iter().map(|byte| format!("{byte:02x}")).collect();
    let cluster = format!("{:016x}", meta.cluster_id);
    let (index, voters) = (meta.applied.index, &meta.applied.conf_state.voters);
    match format {
        Format::Json => output::json(&serde_json::json!({
            "cluster_id": cluster, "revision": meta.revision, "compacted_revision": meta.compacted_revision,
            "keys": keys, "hash": hash, "applied_index": index, "voters": voters, "records": meta.records, "bytes": meta.bytes, "blake3": digest,
        })),
        Format::Plain => print(&format!(
            "whole\ncluster   {cluster}\nrevision  {}, history from {}\nkeys      {keys}, hash {hash}\n\
             index     {index}, members {voters:?}\nrecords   {} in {} bytes\nblake3    {digest}\n",
            meta.revision, meta.compacted_revision, meta.records, meta.bytes,
        )),
        Format::Table => output::row(
            [
                "CLUSTER",
                "REVISION",
                "COMPACTED",
                "KEYS",
                "HASH",
                "INDEX",
                "MEMBERS",
                "RECORDS",
                "BYTES",
                "BLAKE3",
            ],
            [
                cluster,
                meta.revision.to_string(),
                meta.compacted_revision.to_string(),
                keys.to_string(),
                hash,
                index.to_string(),
                voters.iter().map(u64::to_string).collect::<Vec<_>>().join(","),
                meta.records.to_string(),
                meta.bytes.to_string(),
                digest,
            ],
        ),
    }
}

/// Makes the data directory of a member of a new cluster.
pub(super) fn restore(args: &backup::RestoreArgs, format: Format) -> Result<(), CliError> {
    let (dir, restored) = backup::restore(args)?;
    let cluster = format!("{:016x}", restored.cluster_id);
    match format {
        Format::Json => output::json(&serde_json::json!({
            "data_dir": dir.display().to_string(), "id": restored.id, "cluster_id": cluster, "revision": restored.revision,
        })),
        Format::Plain => print(&format!(
            "{} is member {} of {}\n",
            dir.display(),
            restored.id,
            backup::described(&restored)
        )),
        Format::Table => output::row(
            ["DATA DIRECTORY", "ID", "CLUSTER", "REVISION"],
            [
                dir.display().to_string(),
                restored.id.to_string(),
                cluster,
                restored.revision.to_string(),
            ],
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_never_over_its_total_however_low_that_was_estimated() {
        let bar = progress("save", Unit::EstimatedBytes, 100);
        let mut seen = Vec::new();
        for bytes in [60, 30, 30, 5] {
            advance(&bar, bytes);
            seen.push((bar.position(), bar.length()));
        }
        assert_eq!(seen, [(60, Some(100)), (90, Some(100)), (120, Some(120)), (125, Some(125))]);
        let unknown = progress("save", Unit::EstimatedBytes, 0);
        advance(&unknown, 60);
        assert_eq!((unknown.position(), unknown.length()), (60, None));
    }
}
