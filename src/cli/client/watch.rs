//! `metcd watch`.

use std::ffi::OsString;
use std::process::Stdio;

use clap::Args;
use serde_json::{Value, json};

use super::args::{key, prefix};
use super::output::{self, Format, visible};
use super::process::Command;
use super::{Session, print};
use crate::cli::CliError;
use crate::client::watch::{Event, EventKind, Message, WatchOptions};

/// `metcd watch`
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  metcd watch greeting\n  metcd watch --prefix session/ --output json\n  metcd watch --prefix config/ -- ./reload.sh\n\n\
                        The command is run once for each change of a key, one after another, with METCD_EVENT (put or delete), METCD_KEY and\n\
                        METCD_REVISION in its environment and the value on its standard input. A watch with --count ends with 1 if it failed for one of them."
)]
pub struct WatchArgs {
    /// The key.
    #[arg(required_unless_present = "prefix", conflicts_with = "prefix")]
    key: Option<OsString>,
    /// All keys that begin so; an empty one is every key.
    #[arg(long, value_name = "PREFIX")]
    prefix: Option<OsString>,
    /// Begin with the changes of this revision.
    #[arg(long, value_name = "N")]
    from_revision: Option<u64>,
    /// Tell what was there before.
    #[arg(long)]
    prev: bool,
    /// Only puts, or only deletions.
    #[arg(long, value_name = "KIND", value_parser = kind)]
    only: Option<EventKind>,
    /// End after so many changed keys.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Run this for each change.
    #[arg(last = true, value_name = "CMD")]
    command: Vec<OsString>,
}

fn kind(text: &str) -> Result<EventKind, String> {
    match text {
        "put" => Ok(EventKind::Put),
        "delete" => Ok(EventKind::Delete),
        _ => Err("put or delete".to_owned()),
    }
}

pub(super) async fn run(session: &Session, args: &WatchArgs) -> Result<(), CliError> {
    let mut options = match &args.key {
        Some(single) => WatchOptions::key(key(single)?),
        None => WatchOptions::range(prefix(args.prefix.as_ref())),
    };
    options.from_revision = args.from_revision;
    options.prev = args.prev;
    options.only = args.only;
    let mut watch = session.client.watch(options).await?;
    let mut left = args.count.unwrap_or(u64::MAX);
    let (mut runs, mut failed) = (0, 0);
    while left > 0 {
        let (revision, events) = match watch.next().await? {
            Message::Change { revision, events } => (revision, events),
            Message::Interrupted { why } => {
                output::warn(&format!("the watch is interrupted and tries to go on: {why}"));
                continue;
            }
            Message::Open { .. } | Message::Progress { .. } => continue,
        };
        let events: Vec<Event> = events.into_iter().take(usize::try_from(left).unwrap_or(usize::MAX)).collect();
        left -= events.len() as u64;
        if args.command.is_empty() {
            show(session.format, revision, &events)?;
        } else {
            runs += events.len() as u64;
            failed += run_for_each(&args.command, revision, &events).await?;
        }
    }
    match failed {
        0 => Ok(()),
        failed => Err(CliError::Failed(format!("the command failed for {failed} of {runs} changes"))),
    }
}

/// Prints a change: plain is a line for each key, `put KEY VALUE` or `delete KEY`; JSON the change on a line.
pub(super) fn show(format: Format, revision: u64, events: &[Event]) -> Result<(), CliError> {
    if format == Format::Json {
        let events: Vec<Value> = events.iter().map(event_json).collect();
        return output::json(&json!({"revision": revision, "events": events}));
    }
    let mut out = String::new();
    for event in events {
        let key = visible(&event.kv.key, false);
        let line = match event.kind {
            EventKind::Put => format!("{revision}\tput\t{key}\t{}", visible(&event.kv.value, false)),
            EventKind::Delete => format!("{revision}\tdelete\t{key}"),
        };
        out.push_str(&line);
        if let Some(prev) = &event.prev {
            out.push_str(&format!("\twas\t{}", visible(&prev.value, false)));
        }
        out.push('\n');
    }
    print(&out)
}

fn event_json(event: &Event) -> Value {
    let mut kv = serde_json::to_value(&event.kv).unwrap_or_default();
    if event.kind == EventKind::Delete
        && let Some(kv) = kv.as_object_mut()
    {
        for absent in ["value", "create_revision", "version"] {
            kv.remove(absent);
        }
    }
    let mut described = json!({"type": event.kind, "kv": kv});
    if let Some(prev) = &event.prev {
        described["prev"] = serde_json::to_value(prev).unwrap_or_default();
    }
    described
}

/// Runs the command for each; how often it failed.
async fn run_for_each(command: &[OsString], revision: u64, events: &[Event]) -> Result<u64, CliError> {
    use std::os::unix::ffi::OsStringExt as _;
    let mut failed = 0;
    for event in events {
        let name = match event.kind {
            EventKind::Put => "put",
            EventKind::Delete => "delete",
        };
        let mut child = Command::new(command)?;
        child.env("METCD_EVENT", name);
        child.env("METCD_REVISION", revision.to_string());
        // The environment cannot hold a NUL; such a key comes percent-encoded.
        let key = match event.kv.key.contains(&0) {
            true => crate::client::percent_encode(&event.kv.key).into_bytes(),
            false => event.kv.key.clone(),
        };
        child.env("METCD_KEY", OsString::from_vec(key));
        child.stdin(Stdio::piped());
        let ended = child.spawn()?.feed(event.kv.value.clone()).wait().await?;
        if let Some(trouble) = ended.trouble() {
            output::warn(&format!("the command {trouble} for revision {revision}"));
            failed += 1;
        }
    }
    Ok(failed)
}
