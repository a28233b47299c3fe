//! `export` and `import`: key-values as JSON lines, the form of `GET /v1/kv` with `Accept: application/x-ndjson`.
//!
//! The last line says how many there were, so that a file that was cut off is known as one.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, IsTerminal as _, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};

use super::args::prefix;
use super::kv::shortened;
use super::output::{Format, json as print_json, row, warn};
use super::process::unless_interrupted;
use super::whole_file::WholeFile;
use super::{Session, print};
use crate::cli::CliError;
use crate::client::{Client, KeyValue, ListOptions, put_operation};

/// Keys written in one transaction, below the server's default of 128 operations.
const BATCH_KEYS: usize = 100;
/// About the bytes of a transaction, well below the server's limit even as base64.
const BATCH_BYTES: usize = 1 << 20;

/// `metcd export`
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  metcd export > all.jsonl\n  metcd export config/ --file config.jsonl\n  metcd export --revision 12000 | gzip > then.jsonl.gz"
)]
pub struct ExportArgs {
    /// How the keys begin; all keys if left out.
    prefix: Option<OsString>,
    /// Write here, whole or not at all; standard output for - or if left out.
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// As it was at this revision.
    #[arg(long, value_name = "N")]
    revision: Option<u64>,
}

/// `metcd import`
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  metcd import all.jsonl\n  zcat then.jsonl.gz | metcd import\n\nKeys that are there already are overwritten; leases are not restored. Lines need a key and a value, as in {\"key\":\"a\",\"value\":\"b\"}; the last one is {\"end\":true}, without which the input counts as cut off: exit code 1."
)]
pub struct ImportArgs {
    /// The file; standard input if left out.
    #[arg(default_value = "-", hide_default_value = true)]
    file: PathBuf,
}

pub(super) async fn export(session: &Session, args: &ExportArgs) -> Result<(), CliError> {
    let Some(file) = args.file.as_deref().filter(|file| *file != Path::new("-")) else {
        let mut stdout = BufWriter::new(io::stdout().lock());
        let done = write_all(session, args, &mut stdout).await;
        return match done {
            // A reader that has gone away (`metcd export | head`) is not an error.
            Err(Trouble::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            other => other.map(|_| ()).map_err(|trouble| trouble.into_error(Path::new("stdout"))),
        };
    };
    let count = unless_interrupted(write_file(session, args, file)).await?;
    match session.format {
        Format::Json => print_json(&json!({"exported": count, "file": file.display().to_string()})),
        Format::Plain => print(&format!("exported {count} keys\n")),
        Format::Table => row(["FILE", "EXPORTED"], [file.display().to_string(), count.to_string()]),
    }
}

async fn write_file(session: &Session, args: &ExportArgs, file: &Path) -> Result<u64, CliError> {
    let output = WholeFile::create(file, "name a file, which is written whole or not at all, or - for standard output")?;
    let written = write_all(session, args, &mut BufWriter::new(output.file())).await;
    let count = written.map_err(|trouble| trouble.into_error(file))?;
    output.keep().await?;
    Ok(count)
}

/// Whose fault it was.
enum Trouble {
    Output(io::Error),
    Other(CliError),
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Trouble {
        Trouble::Output(error)
    }
}

impl From<crate::client::ClientError> for Trouble {
    fn from(error: crate::client::ClientError) -> Trouble {
        Trouble::Other(error.into())
    }
}

impl Trouble {
    fn into_error(self, file: &Path) -> CliError {
        match self {
            Self::Output(error) => CliError::Failed(format!("cannot write {}: {error}", file.display())),
            Self::Other(error) => error,
        }
    }
}

async fn write_all(session: &Session, args: &ExportArgs, out: &mut impl Write) -> Result<u64, Trouble> {
    let range = prefix(args.prefix.as_ref());
    let counted = ListOptions {
        count_only: true,
        revision: args.revision,
        ..ListOptions::default()
    };
    let page = session.client.list(&range, &counted).await?;
    let options = ListOptions {
        revision: Some(args.revision.unwrap_or(page.revision)),
        ..ListOptions::default()
    };
    let bar = progress("export", Unit::Keys, page.count);
    let mut scan = session.client.scan(&range, &options).await?;
    let mut count = 0;
    while let Some(kv) = scan.next().await? {
        serde_json::to_writer(&mut *out, &kv).map_err(io::Error::from)?;
        out.write_all(b"\n")?;
        count += 1;
        bar.inc(1);
    }
    writeln!(out, "{}", json!({"end": true, "count": count}))?;
    out.flush()?;
    bar.finish_and_clear();
    Ok(count)
}

/// What a progress bar counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    Bytes,
    /// The total is an estimate.
    EstimatedBytes,
    Keys,
}

impl Unit {
    fn template(self, is_total_known: bool) -> &'static str {
        match (self, is_total_known) {
            (Self::Bytes, true) => "{prefix} {wide_bar} {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec} {eta}",
            (Self::EstimatedBytes, true) => {
                "{prefix} {wide_bar} {binary_bytes} of about {binary_total_bytes}, {binary_bytes_per_sec} {eta}"
            }
            (Self::Bytes | Self::EstimatedBytes, false) => "{prefix} {spinner} {binary_bytes}, {binary_bytes_per_sec}",
            (Self::Keys, true) => "{prefix} {wide_bar} {pos} of {len} keys, {per_sec} {eta}",
            (Self::Keys, false) => "{prefix} {spinner} {pos} keys, {per_sec}",
        }
    }
}

/// A bar on stderr, if that is a terminal. Nothing to count (0) is a spinner.
pub(super) fn progress(name: &str, unit: Unit, total: u64) -> ProgressBar {
    let target = if io::stderr().is_terminal() {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    };
    let bar = ProgressBar::with_draw_target((total > 0).then_some(total), target);
    if let Ok(style) = ProgressStyle::with_template(unit.template(total > 0)) {
        bar.set_style(style);
    }
    bar.with_prefix(name.to_owned())
}

pub(super) async fn import(session: &Session, args: &ImportArgs) -> Result<(), CliError> {
    let is_stdin = args.file == Path::new("-");
    let unreadable = |error: io::Error| {
        CliError::Failed(format!(
            "cannot read {}: {error}: name a file that metcd export wrote, or - for standard input",
            args.file.display()
        ))
    };
    let (input, bytes): (Box<dyn BufRead>, u64) = if is_stdin {
        (Box::new(BufReader::new(io::stdin())), 0)
    } else {
        let file = File::open(&args.file).map_err(unreadable)?;
        let found = file.metadata().map_err(unreadable)?;
        if found.is_dir() {
            // It can be opened, and fails at the first line.
            return Err(unreadable(io::ErrorKind::IsADirectory.into()));
        }
        (Box::new(BufReader::with_capacity(1 << 20, file)), found.len())
    };
    let bar = progress("import", Unit::Bytes, bytes);
    let mut import = Import::new(&session.client);
    let result = read_all(&mut import, input, &bar).await;
    bar.finish_and_clear();
    result.map_err(|error| CliError::Failed(format!("{error}; {} keys were imported before", import.imported)))?;
    if import.leased > 0 {
        warn(&format!("leases are not imported; keys that had one: {}", import.leased));
    }
    if !import.ended {
        // An export that was cut off between two lines looks like this. Whoever restores from it in a script would take half for the whole.
        return Err(CliError::Failed(format!(
            "{} has no end line, so it may have been cut off: the {} keys in it were imported; if that is all of them, end it with {{\"end\":true}}",
            if is_stdin {
                "standard input".to_owned()
            } else {
                args.file.display().to_string()
            },
            import.imported
        )));
    }
    match session.format {
        Format::Json => print_json(&json!({"imported": import.imported})),
        Format::Plain => print(&format!("imported {} keys\n", import.imported)),
        Format::Table => row(["IMPORTED"], [import.imported.to_string()]),
    }
}

async fn read_all(import: &mut Import<'_>, mut input: Box<dyn BufRead>, bar: &ProgressBar) -> Result<(), CliError> {
    let mut line = Vec::new();
    for number in 1u64.. {
        line.clear();
        let read = input
            .read_until(b'\n', &mut line)
            .map_err(|error| CliError::Failed(format!("cannot read line {number}: {error}")))?;
        if read == 0 {
            break;
        }
        bar.inc(read as u64);
        if !line.trim_ascii().is_empty() {
            import.line(number, line.trim_ascii()).await?;
        }
    }
    import.flush().await
}

/// A line of the file.
struct Line {
    number: u64,
    key: Vec<u8>,
    value_bytes: usize,
}

/// Lines on their way into transactions.
struct Import<'a> {
    client: &'a Client,
    batch: Vec<Value>,
    /// Where the operations of the batch come from.
    lines: Vec<Line>,
    keys: HashSet<Vec<u8>>,
    bytes: usize,
    read: u64,
    imported: u64,
    leased: u64,
    ended: bool,
}

impl Import<'_> {
    fn new(client: &Client) -> Import<'_> {
        Import {
            client,
            batch: Vec::new(),
            lines: Vec::new(),
            keys: HashSet::new(),
            bytes: 0,
            read: 0,
            imported: 0,
            leased: 0,
            ended: false,
        }
    }

    async fn line(&mut self, number: u64, line: &[u8]) -> Result<(), CliError> {
        let wrong = |why: String| CliError::Failed(format!("line {number}: {why}"));
        if self.ended {
            return Err(wrong("something follows the end line".to_owned()));
        }
        let value: Value = serde_json::from_slice(line).map_err(|error| wrong(format!("not JSON: {error}")))?;
        if value.get("end").is_some_and(|end| end == true) {
            self.ended = true;
            let count = value.get("count").and_then(Value::as_u64);
            return match count {
                Some(count) if count != self.read => Err(wrong(format!("there should be {count} keys, and there are {}", self.read))),
                _ => Ok(()),
            };
        }
        if value.get("value").is_none() && value.get("value_base64").is_none() {
            return Err(wrong("there is no value".to_owned()));
        }
        let kv: KeyValue = serde_json::from_value(value).map_err(|error| wrong(error.to_string()))?;
        if kv.key.is_empty() {
            return Err(wrong("the key is empty".to_owned()));
        }
        self.read += 1;
        self.leased += u64::from(kv.lease.is_some());
        let size = kv.key.len() + kv.value.len();
        let is_full = self.batch.len() >= BATCH_KEYS || self.bytes + size > BATCH_BYTES;
        // A transaction puts a key once.
        if is_full || self.keys.contains(&kv.key) {
            self.flush().await?;
        }
        self.bytes += size;
        self.batch.push(put_operation(&kv.key, &kv.value));
        self.lines.push(Line {
            number,
            key: kv.key.clone(),
            value_bytes: kv.value.len(),
        });
        self.keys.insert(kv.key);
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), CliError> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let operations = std::mem::take(&mut self.batch);
        let lines = std::mem::take(&mut self.lines);
        self.keys.clear();
        self.bytes = 0;
        match self.client.txn(&json!({"then": operations})).await {
            Ok(_) => {
                self.imported += lines.len() as u64;
                Ok(())
            }
            Err(error) => Err(CliError::Failed(format!("{}: {error}", blame(&lines, error.code())))),
        }
    }
}

/// The line that a refusal with this code is about, or else all of the transaction's. The server names no line, but what is too large for
/// it is surely the largest.
fn blame(lines: &[Line], code: Option<&str>) -> String {
    let culprit = match code {
        Some("value_too_large" | "request_too_large") => lines.iter().max_by_key(|line| line.value_bytes),
        Some("key_too_large") => lines.iter().max_by_key(|line| line.key.len()),
        _ => None,
    };
    match (culprit, lines) {
        (Some(line), _) => format!(
            "line {}, key {}, a value of {} bytes",
            line.number,
            shortened(&line.key),
            line.value_bytes
        ),
        (None, [first, .., last]) => format!("lines {} to {}", first.number, last.number),
        (None, [only]) => format!("line {}", only.number),
        (None, []) => "no line".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_has_units() {
        for (unit, known, needed) in [
            (Unit::Bytes, true, "{binary_total_bytes}"),
            (Unit::Bytes, false, "{binary_bytes}"),
            (Unit::EstimatedBytes, true, "of about {binary_total_bytes}"),
            (Unit::EstimatedBytes, false, "{binary_bytes}"),
            (Unit::Keys, true, " keys"),
            (Unit::Keys, false, " keys"),
        ] {
            let template = unit.template(known);
            assert!(template.contains(needed), "{template}");
            assert!(ProgressStyle::with_template(template).is_ok(), "{template}");
        }
    }

    #[test]
    fn a_refusal_names_the_line_it_is_about() {
        let line = |number, key: &str, value_bytes| Line {
            number,
            key: key.as_bytes().to_vec(),
            value_bytes,
        };
        let lines = [line(3, "a", 1), line(5, "big", 900), line(6, "a-long-key", 2)];
        assert_eq!(blame(&lines, Some("value_too_large")), "line 5, key big, a value of 900 bytes");
        assert!(blame(&lines, Some("key_too_large")).starts_with("line 6, key a-long-key,"));
        assert_eq!(blame(&lines, Some("no_leader")), "lines 3 to 6");
        assert_eq!(blame(&lines[..1], None), "line 3");
    }
}
