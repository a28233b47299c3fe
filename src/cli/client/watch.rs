//! `metcd watch`.

use std::ffi::OsString;
use std::pin::{Pin, pin};
use std::process::Stdio;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser as _};
use serde_json::{Value, json};

use super::args::{key, prefix};
use super::kv::shortened;
use super::output::{self, Format, visible};
use super::process::Command;
use super::{Session, print};
use crate::cli::CliError;
use crate::client::watch::{Event, EventKind, Message, WatchOptions};

/// `metcd watch`
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  metcd watch greeting\n  metcd watch --prefix session/ --output json\n  metcd watch --prefix config/ -- ./reload.sh\n\n\
                        The command is run once for each change of a key, one after another, with METCD_EVENT (put or delete), METCD_KEY and \
                        METCD_REVISION in its environment and the value on its standard input. A watch with --count ends with 1 if it failed \
                        for one of them. A watch that is interrupted stops the command first: SIGTERM, 5 s later SIGKILL."
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
    /// Only puts (put), or only deletions (delete).
    #[arg(long, value_name = "KIND", value_parser = PossibleValuesParser::new([PUT, DELETE]).map(|name| kind(&name)), hide_possible_values = true)]
    only: Option<EventKind>,
    /// End after so many changed keys.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Run this for each change.
    #[arg(last = true, value_name = "CMD")]
    command: Vec<OsString>,
}

const PUT: &str = "put";
const DELETE: &str = "delete";

/// Which of the two a name is.
fn kind(name: &str) -> EventKind {
    match name {
        PUT => EventKind::Put,
        _ => EventKind::Delete,
    }
}

impl WatchArgs {
    /// It runs a command for each change, which must not outlive it.
    pub(super) fn runs_a_command(&self) -> bool {
        !self.command.is_empty()
    }
}

/// Watches to the end. With a command, `stop` (which names a signal) ends it and what the command is doing; without one, it is not polled,
/// and signals do what they always do.
pub(super) async fn run(session: &Session, args: &WatchArgs, stop: impl Future<Output = u8>) -> Result<(), CliError> {
    let mut stop = pin!(async {
        if args.runs_a_command() {
            stop.await
        } else {
            std::future::pending().await
        }
    });
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
    if session.format == Format::Table && !args.runs_a_command() {
        head(args.prev)?;
    }
    while left > 0 {
        let message = tokio::select! {
            message = watch.next() => message?,
            signal = &mut stop => return Err(CliError::Interrupted(signal)),
        };
        let (revision, events) = match message {
            Message::Change { revision, events } => (revision, events),
            Message::Interrupted { why } => {
                output::warn(&format!("the watch is interrupted and tries to go on: {why}"));
                continue;
            }
            Message::Open { .. } | Message::Progress { .. } => continue,
        };
        let events: Vec<Event> = events.into_iter().take(usize::try_from(left).unwrap_or(usize::MAX)).collect();
        left -= events.len() as u64;
        if args.runs_a_command() {
            runs += events.len() as u64;
            failed += run_for_each(&args.command, revision, &events, stop.as_mut()).await?;
        } else {
            show(session.format, revision, &events)?;
        }
    }
    match failed {
        0 => Ok(()),
        failed => Err(CliError::Failed(format!("the command failed for {failed} of {runs} changes"))),
    }
}

/// Columns of a table whose rows are not known yet: revision, event, key, value, value before.
const WIDTHS: [usize; 5] = [10, 6, 24, 24, 0];

fn head(prev: bool) -> Result<(), CliError> {
    let names = ["REVISION", "EVENT", "KEY", "VALUE", "BEFORE"].map(str::to_owned);
    let shown = names.get(..if prev { 5 } else { 4 }).unwrap_or_default();
    print(&format!("{}\n", output::bold(&output::aligned(shown, &WIDTHS))))
}

/// Prints a change: plain and table are a line for each key; JSON has the change on a line.
fn show(format: Format, revision: u64, events: &[Event]) -> Result<(), CliError> {
    let lines: String = match format {
        Format::Json => {
            let events: Vec<Value> = events.iter().map(event_json).collect();
            return output::json(&json!({"revision": revision, "events": events}));
        }
        Format::Plain => events.iter().map(|event| format!("{}\n", plain(revision, event))).collect(),
        Format::Table => events
            .iter()
            .map(|event| format!("{}\n", output::aligned(&cells(revision, event), &WIDTHS)))
            .collect(),
    };
    print(&lines)
}

/// `put KEY VALUE` or `delete KEY`.
fn plain(revision: u64, event: &Event) -> String {
    let key = visible(&event.kv.key, false);
    let mut line = match event.kind {
        EventKind::Put => format!("{revision}\tput\t{key}\t{}", visible(&event.kv.value, false)),
        EventKind::Delete => format!("{revision}\tdelete\t{key}"),
    };
    if let Some(prev) = &event.prev {
        line.push_str(&format!("\twas\t{}", visible(&prev.value, false)));
    }
    line
}

fn cells(revision: u64, event: &Event) -> [String; 5] {
    let value = match event.kind {
        EventKind::Put => shortened(&event.kv.value),
        EventKind::Delete => "-".to_owned(),
    };
    [
        revision.to_string(),
        name(event.kind).to_owned(),
        visible(&event.kv.key, false),
        value,
        event.prev.as_ref().map_or_else(String::new, |prev| shortened(&prev.value)),
    ]
}

fn name(kind: EventKind) -> &'static str {
    match kind {
        EventKind::Put => PUT,
        EventKind::Delete => DELETE,
    }
}

fn event_json(event: &Event) -> Value {
    let mut kv = serde_json::to_value(&event.kv).unwrap_or_default();
    if event.kind == EventKind::Delete
        && let Some(kv) = kv.as_object_mut()
    {
        for absent in ["value", "create_revision", "version"] {
            kv.shift_remove(absent);
        }
    }
    let mut described = json!({"type": event.kind, "kv": kv});
    if let Some(prev) = &event.prev {
        described["prev"] = serde_json::to_value(prev).unwrap_or_default();
    }
    described
}

/// Runs the command for each; how often it failed.
async fn run_for_each(
    command: &[OsString],
    revision: u64,
    events: &[Event],
    mut stop: Pin<&mut impl Future<Output = u8>>,
) -> Result<u64, CliError> {
    use std::os::unix::ffi::OsStringExt as _;
    let mut failed = 0;
    for event in events {
        let mut child = Command::new(command)?;
        child.env("METCD_EVENT", name(event.kind));
        child.env("METCD_REVISION", revision.to_string());
        // The environment cannot hold a NUL; such a key comes percent-encoded.
        let key = match event.kv.key.contains(&0) {
            true => crate::client::percent_encode(&event.kv.key).into_bytes(),
            false => event.kv.key.clone(),
        };
        child.env("METCD_KEY", OsString::from_vec(key));
        child.stdin(Stdio::piped());
        let mut running = child.spawn()?.feed(event.kv.value.clone());
        let ended = tokio::select! {
            ended = running.wait() => ended?,
            signal = &mut stop => {
                // It may be in a process group of its own, where no Ctrl-C reaches it.
                running.stop().await?;
                return Err(CliError::Interrupted(signal));
            }
        };
        if let Some(trouble) = ended.trouble() {
            output::warn(&format!("the command {trouble} for revision {revision}"));
            failed += 1;
        }
    }
    Ok(failed)
}
