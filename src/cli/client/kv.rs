//! `put`, `get`, `del`, `ls`.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::time::Duration;

use clap::Args;
use serde_json::json;

use super::args::{bytes, duration, key, prefix, read_input};
use super::output::{self, Format, Table, push_key, size, visible};
use super::{Session, print, print_bytes};
use crate::cli::CliError;
use crate::client::{Condition, GetOptions, KeyValue, ListOptions, PutOptions, Waited};

/// Keys asked for at once.
const PAGE: u64 = 1000;

/// `metcd put`
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  metcd put greeting hello\n  metcd put config - < config.json\n  metcd put session/7 alice --ttl 30s\n  \
                        metcd put counter 8 --if-match 42\n  metcd put --if-absent -- -key- -value-"
)]
pub struct PutArgs {
    /// The key.
    key: OsString,
    /// The value; - reads it from standard input.
    value: OsString,
    /// Delete the key by itself after this time.
    #[arg(long, value_parser = duration, value_name = "TIME", conflicts_with = "lease")]
    ttl: Option<Duration>,
    /// Attach the key to this lease.
    #[arg(long, value_name = "ID")]
    lease: Option<u64>,
    /// Only if the key is at this revision; * is any.
    #[arg(long, value_name = "REVISION", value_parser = if_match, conflicts_with = "if_absent")]
    if_match: Option<Condition>,
    /// Only if there is no such key.
    #[arg(long)]
    if_absent: bool,
    /// Print what was there before.
    #[arg(long)]
    prev: bool,
}

/// `metcd get`
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  metcd get greeting\n  metcd get greeting --revision 7\n  metcd get greeting --wait 30s    # wait for its next change\n  \
                        metcd get greeting --output json"
)]
pub struct GetArgs {
    /// The key.
    key: OsString,
    /// As it was at this revision.
    #[arg(long, value_name = "N")]
    revision: Option<u64>,
    /// Wait at most so long for the key's next change.
    #[arg(long, value_parser = duration, value_name = "TIME", conflicts_with = "revision")]
    wait: Option<Duration>,
    /// With --wait: until the key is no longer at this revision.
    #[arg(long, value_name = "REVISION", requires = "wait")]
    since: Option<u64>,
}

/// `metcd del`
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  metcd del greeting\n  metcd del --prefix session/\n  metcd del greeting --if-match 42")]
pub struct DelArgs {
    /// The key; with --prefix how the keys begin.
    key: OsString,
    /// All keys that begin so.
    #[arg(long)]
    prefix: bool,
    /// Only if the key is at this revision; * is any.
    #[arg(long, value_name = "REVISION", value_parser = if_match, conflicts_with = "prefix")]
    if_match: Option<Condition>,
}

/// `metcd ls`
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  metcd ls\n  metcd ls session/ --limit 10\n  metcd ls session/ --count\n  metcd ls --output table")]
pub struct LsArgs {
    /// How the keys begin; all keys if left out.
    prefix: Option<OsString>,
    /// The same, as `del` and `watch` write it.
    #[arg(long = "prefix", value_name = "PREFIX", hide = true, conflicts_with = "prefix")]
    prefix_flag: Option<OsString>,
    /// At most so many.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// As it was at this revision.
    #[arg(long, value_name = "N")]
    revision: Option<u64>,
    /// From the last to the first.
    #[arg(long)]
    desc: bool,
    /// Only how many there are.
    #[arg(long, conflicts_with_all = ["limit", "desc"])]
    count: bool,
    /// The values too; plain separates them from the key by a tab.
    #[arg(long)]
    values: bool,
}

impl PutArgs {
    pub(super) fn reads_stdin(&self) -> bool {
        self.value == "-"
    }
}

fn if_match(text: &str) -> Result<Condition, String> {
    if text == "*" {
        return Ok(Condition::Exists);
    }
    let digits = text.trim_matches('"');
    digits
        .parse()
        .map(Condition::Revision)
        .map_err(|_| "write a revision, or *".to_owned())
}

pub(super) async fn put(session: &Session, args: &PutArgs) -> Result<(), CliError> {
    let value = match args.reads_stdin() {
        true => read_input(Path::new("-"))?,
        false => bytes(&args.value).to_vec(),
    };
    let options = PutOptions {
        ttl: args.ttl,
        lease: args.lease,
        condition: if args.if_absent {
            Condition::Absent
        } else {
            args.if_match.unwrap_or_default()
        },
        prev: args.prev,
    };
    let put = session.client.put_with(key(&args.key)?, value, &options).await?;
    match session.format {
        Format::Json => output::json(&put),
        Format::Plain if args.prev => match &put.prev {
            Some(prev) => output::value(&prev.value),
            None => Ok(()),
        },
        Format::Plain => print(&format!("revision {}\n", put.revision)),
        Format::Table if args.prev => {
            let was = |text: fn(&KeyValue) -> String| put.prev.as_ref().map_or_else(|| "-".to_owned(), text);
            output::row(
                ["REVISION", "CREATED", "REVISION BEFORE", "VALUE BEFORE"],
                [
                    put.revision.to_string(),
                    put.created.to_string(),
                    was(|kv| kv.mod_revision.to_string()),
                    was(|kv| shortened(&kv.value)),
                ],
            )
        }
        Format::Table => output::row(["REVISION", "CREATED"], [put.revision.to_string(), put.created.to_string()]),
    }
}

pub(super) async fn get(session: &Session, args: &GetArgs) -> Result<(), CliError> {
    let key = key(&args.key)?;
    let found = match args.wait {
        Some(wait) => match session.client.wait(key, args.since, wait).await? {
            Waited::Changed(kv) => Some(kv),
            Waited::Absent => None,
            Waited::TimedOut => return Err(CliError::NotMet("the key did not change in this time".to_owned())),
        },
        None => {
            let options = GetOptions {
                revision: args.revision,
                min_revision: None,
            };
            session.client.get_with(key, &options).await?
        }
    };
    let kv = found.ok_or_else(|| no_such_key(&args.key))?;
    match session.format {
        Format::Plain => output::value(&kv.value),
        Format::Json => output::json(&kv),
        Format::Table => table(&[kv]),
    }
}

fn no_such_key(key: &OsStr) -> CliError {
    CliError::NotMet(format!("there is no such key: {}", key.display()))
}

pub(super) async fn del(session: &Session, args: &DelArgs) -> Result<(), CliError> {
    let deleted = if args.prefix {
        session.client.delete_range(&prefix(Some(&args.key))).await?
    } else {
        let condition = args.if_match.unwrap_or_default();
        session
            .client
            .delete(key(&args.key)?, condition)
            .await?
            .ok_or_else(|| no_such_key(&args.key))?
    };
    match session.format {
        Format::Json => output::json(&deleted),
        Format::Plain if args.prefix => print(&format!("deleted {}, revision {}\n", deleted.deleted, deleted.revision)),
        Format::Plain => print(&format!("revision {}\n", deleted.revision)),
        Format::Table => {
            let mut table = Table::new(&["REVISION", "DELETED"]);
            table.row([deleted.revision.to_string(), deleted.deleted.to_string()]);
            table.print()
        }
    }
}

pub(super) async fn ls(session: &Session, args: &LsArgs) -> Result<(), CliError> {
    let with_values = args.values || session.format == Format::Table;
    let mut options = ListOptions {
        limit: Some(args.limit.unwrap_or(PAGE).min(PAGE)),
        revision: args.revision,
        keys_only: !with_values,
        count_only: args.count,
        descending: args.desc,
        after: None,
    };
    if args.count {
        options.limit = None;
    }
    let range = prefix(args.prefix.as_ref().or(args.prefix_flag.as_ref()));
    let mut left = args.limit.unwrap_or(u64::MAX);
    let mut all = Vec::new();
    loop {
        let page = session.client.list(&range, &options).await?;
        if args.count {
            return count(session, page.revision, page.count);
        }
        left = left.saturating_sub(page.kvs.len() as u64);
        if session.format == Format::Plain {
            print_plain(&page.kvs, args.values)?;
        } else {
            all.extend(page.kvs);
        }
        if left == 0 || page.next.is_none() {
            finish(session, args, page.revision, page.count, &all)?;
            if let Some(hint) = not_all(args.limit, page.count) {
                output::hint(&hint);
            }
            return Ok(());
        }
        options.limit = Some(left.min(PAGE));
        options.after = page.next;
    }
}

/// What to say if the limit has left something out.
fn not_all(limit: Option<u64>, count: u64) -> Option<String> {
    let limit = limit.filter(|limit| *limit < count)?;
    Some(format!(
        "{limit} of {count} keys: the others come with a larger --limit, or without one"
    ))
}

fn count(session: &Session, revision: u64, count: u64) -> Result<(), CliError> {
    match session.format {
        Format::Json => output::json(&json!({"revision": revision, "count": count})),
        Format::Plain => print(&format!("{count}\n")),
        Format::Table => output::row(["REVISION", "COUNT"], [revision.to_string(), count.to_string()]),
    }
}

fn print_plain(kvs: &[KeyValue], values: bool) -> Result<(), CliError> {
    let mut out = Vec::new();
    for kv in kvs {
        if values {
            out.extend_from_slice(visible(&kv.key, false).as_bytes());
            out.push(b'\t');
            out.extend_from_slice(visible(&kv.value, false).as_bytes());
            out.push(b'\n');
        } else {
            push_key(&mut out, &kv.key);
        }
    }
    print_bytes(&out)
}

fn finish(session: &Session, args: &LsArgs, revision: u64, count: u64, all: &[KeyValue]) -> Result<(), CliError> {
    match session.format {
        Format::Plain => Ok(()),
        Format::Table => table(all),
        Format::Json => {
            let mut kvs = serde_json::to_value(all).map_err(|error| CliError::Failed(error.to_string()))?;
            if !args.values {
                // Without values asked for, none is shown; an empty one would be a lie.
                for kv in kvs.as_array_mut().into_iter().flatten() {
                    kv.as_object_mut().map(|kv| kv.shift_remove("value"));
                }
            }
            output::json(&json!({"revision": revision, "count": count, "kvs": kvs}))
        }
    }
}

/// Longest part of a value that is shown in a table.
const SHOWN: usize = 60;

/// A value in the cell of a table.
pub(super) fn shortened(value: &[u8]) -> String {
    let shown = visible(value, false);
    match shown.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", shown.get(..end).unwrap_or_default()),
        None => shown,
    }
}

pub(super) fn table(kvs: &[KeyValue]) -> Result<(), CliError> {
    let mut table = Table::new(&["KEY", "REVISION", "VERSION", "LEASE", "SIZE", "VALUE"]);
    for kv in kvs {
        table.row([
            visible(&kv.key, false),
            kv.mod_revision.to_string(),
            kv.version.to_string(),
            kv.lease.map_or_else(|| "-".to_owned(), |lease| lease.to_string()),
            size(kv.value.len() as u64),
            shortened(&kv.value),
        ]);
    }
    table.print()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_that_leaves_keys_out_is_told() {
        assert_eq!(not_all(None, 5), None);
        assert_eq!(not_all(Some(5), 5), None);
        assert!(not_all(Some(2), 5).is_some_and(|hint| hint.starts_with("2 of 5 keys")));
    }

    #[test]
    fn a_long_value_is_cut_between_characters() {
        assert_eq!(shortened("ä".repeat(60).as_bytes()), "ä".repeat(60));
        assert_eq!(shortened("ä".repeat(61).as_bytes()), format!("{}…", "ä".repeat(60)));
    }
}
