//! `status`, `health`, `compact`, `hash`.

use std::time::{Duration, Instant};

use clap::Args;
use futures_util::future::join_all;
use serde_json::{Value, json};

use super::output::{self, Format, Table, age, size};
use super::{Session, print};
use crate::cli::CliError;
use crate::client::{Client, ClientError, Member};

/// A member that does not answer within this time is shown as unreachable, unless `--timeout` says otherwise.
const STATUS_TIMEOUT: Duration = Duration::from_secs(2);

/// Of the time that is given, this much is left for members that were heard of late.
const LEAST_TIMEOUT: Duration = Duration::from_millis(200);

/// `metcd compact`
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  metcd compact 12000")]
pub struct CompactArgs {
    /// History before this revision goes.
    revision: u64,
}

/// `metcd hash`
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  for n in 3379 4379 5379; do metcd hash --revision 12000 --endpoints http://127.0.0.1:$n; done")]
pub struct HashArgs {
    /// At this revision; now if left out.
    #[arg(long, value_name = "N")]
    revision: Option<u64>,
}

/// One member's row.
struct Seen {
    url: String,
    status: Result<Value, ClientError>,
    /// What the others say of one that does not answer.
    known: Option<Member>,
}

pub(super) async fn status(session: &Session) -> Result<(), CliError> {
    let seen = look_at_all(session).await?;
    if seen.iter().all(|seen| seen.status.is_err()) {
        let reasons: Vec<String> = seen.iter().map(|seen| reason(&seen.status)).collect();
        return Err(CliError::Failed(format!(
            "no member answers ({}): is the server running? Name others with --endpoints",
            reasons.join("; ")
        )));
    }
    if session.format != Format::Json {
        return table(&seen);
    }
    let members: Vec<Value> = seen
        .iter()
        .map(|seen| match &seen.status {
            Ok(status) => json!({"endpoint": seen.url, "status": status}),
            Err(error) => match &seen.known {
                Some(member) => json!({"endpoint": seen.url, "id": member.id, "name": member.name, "error": error.to_string()}),
                None => json!({"endpoint": seen.url, "error": error.to_string()}),
            },
        })
        .collect();
    output::json(&json!({"members": members}))
}

fn reason(status: &Result<Value, ClientError>) -> String {
    match status {
        Err(ClientError::Unreachable(reason)) => reason.clone(),
        Err(error) => error.to_string(),
        Ok(_) => String::new(),
    }
}

/// Asks the endpoints given, then the members they know of that were not among them.
async fn look_at_all(session: &Session) -> Result<Vec<Seen>, CliError> {
    let timeout = session.timeout.unwrap_or(STATUS_TIMEOUT);
    let deadline = Instant::now() + timeout;
    let given: Vec<String> = session.client.endpoints().map(str::to_owned).collect();
    // All at once: one that does not answer uses up no more than its own time.
    let (seen, rest) = tokio::join!(look_at(given.clone(), timeout), async {
        let client = session.client.clone().with_serializable_reads(true).with_timeout(timeout);
        let members = client.members().await.map(|known| known.members).unwrap_or_default();
        let others: Vec<&Member> = members.iter().filter(|member| is_elsewhere(member, &given)).collect();
        let urls = others.iter().map(|member| member.client_url.clone()).collect();
        let left = deadline.saturating_duration_since(Instant::now()).max(LEAST_TIMEOUT);
        let looks = look_at(urls, left).await?;
        let ids: Vec<u64> = others.iter().map(|member| member.id).collect();
        Ok::<_, CliError>((members, ids.into_iter().zip(looks)))
    });
    let mut seen = seen?;
    let (members, others) = rest?;
    let answered: Vec<u64> = seen
        .iter()
        .filter_map(|seen| seen.status.as_ref().ok()?.get("id")?.as_u64())
        .collect();
    // Those that answered by another URL are there already.
    seen.extend(others.filter(|(id, _)| !answered.contains(id)).map(|(_, seen)| seen));
    for seen in seen.iter_mut().filter(|seen| seen.status.is_err()) {
        seen.known = members.iter().find(|member| is_at(member, &seen.url)).cloned();
    }
    let silent = members
        .into_iter()
        .filter(|member| member.client_url.is_empty() && !answered.contains(&member.id));
    seen.extend(silent.map(|member| Seen {
        url: format!("member {}", member.id),
        status: Err(ClientError::Unreachable("it has not told its client URL yet".to_owned())),
        known: Some(member),
    }));
    seen.sort_by_key(|seen| {
        let answered = seen.status.as_ref().ok().and_then(|status| status.get("id")?.as_u64());
        answered.or(seen.known.as_ref().map(|member| member.id)).unwrap_or(u64::MAX)
    });
    Ok(seen)
}

fn is_at(member: &Member, url: &str) -> bool {
    member.client_url.trim_end_matches('/') == url.trim_end_matches('/')
}

/// It has told where it is, and that is none of these.
fn is_elsewhere(member: &Member, urls: &[String]) -> bool {
    !member.client_url.is_empty() && !urls.iter().any(|url| is_at(member, url))
}

async fn look_at(urls: Vec<String>, timeout: Duration) -> Result<Vec<Seen>, CliError> {
    let looks = urls.into_iter().map(|url| async move {
        let client = Client::new([&url])?.with_timeout(timeout);
        let status = client.status().await;
        Ok(Seen { url, status, known: None })
    });
    join_all(looks).await.into_iter().collect()
}

fn table(seen: &[Seen]) -> Result<(), CliError> {
    let mut table = Table::new(&[
        "ENDPOINT",
        "ID",
        "NAME",
        "ROLE",
        "TERM",
        "REVISION",
        "COMMITTED",
        "APPLIED",
        "STORE",
        "WAL",
        "UPTIME",
        "NOTE",
    ]);
    for seen in seen {
        let Ok(status) = &seen.status else {
            let note = format!("unreachable: {}", reason(&seen.status));
            let known = match &seen.known {
                Some(member) => [member.id.to_string(), member.name.clone(), member.role.clone()],
                None => ["-", "-", "-"].map(str::to_owned),
            };
            let dashes = std::iter::repeat_n("-".to_owned(), 7);
            table.row(std::iter::once(seen.url.clone()).chain(known).chain(dashes).chain([note]));
            continue;
        };
        let text = |pointer: &str| match status.pointer(pointer) {
            None | Some(Value::Null) => "-".to_owned(),
            Some(Value::String(text)) => text.clone(),
            Some(other) => other.to_string(),
        };
        let bytes = |pointer: &str| size(status.pointer(pointer).and_then(Value::as_u64).unwrap_or(0));
        table.row([
            seen.url.clone(),
            text("/id"),
            text("/name"),
            text("/role"),
            text("/term"),
            text("/revision"),
            text("/commit_index"),
            text("/applied_index"),
            format!("{} {}", text("/store/backend"), bytes("/store/bytes")),
            format!("{} {}", text("/wal/engine"), bytes("/wal/bytes")),
            age(status.pointer("/uptime_seconds").and_then(Value::as_u64).unwrap_or(0)),
            note(status),
        ]);
    }
    table.print()
}

/// What is wrong with a member that answers.
fn note(status: &Value) -> String {
    let text = |name: &str| status.get(name).and_then(Value::as_str);
    match (text("quarantined"), text("not_ready_reason")) {
        (Some(reason), _) => format!("quarantined: {reason}"),
        (None, Some(reason)) => format!("not ready: {reason}"),
        (None, None) if status.get("leader").is_none_or(Value::is_null) => "no leader".to_owned(),
        (None, None) => String::new(),
    }
}

pub(super) async fn health(session: &Session) -> Result<(), CliError> {
    let health = session.client.health().await?;
    match session.format {
        Format::Json => output::json(&health),
        Format::Plain => print("healthy\n"),
        Format::Table => output::row(["HEALTH"], ["healthy".to_owned()]),
    }
}

pub(super) async fn compact(session: &Session, args: &CompactArgs) -> Result<(), CliError> {
    let (answer, already) = match session.client.compact(args.revision).await {
        Ok(answer) => (answer, ""),
        // The history that was to go is gone: what was asked is so.
        Err(error) if error.code() == Some("compacted") => {
            let known = error.problem().and_then(|problem| problem.compacted_revision);
            (json!({"compacted_revision": known.unwrap_or(args.revision)}), " already")
        }
        Err(error) => return Err(error.into()),
    };
    let compacted = answer.get("compacted_revision").and_then(Value::as_u64).unwrap_or(args.revision);
    match session.format {
        Format::Json => output::json(&answer),
        Format::Plain => print(&format!("compacted to revision {compacted}{already}\n")),
        Format::Table => output::row(["COMPACTED REVISION"], [compacted.to_string()]),
    }
}

pub(super) async fn hash(session: &Session, args: &HashArgs) -> Result<(), CliError> {
    let answer = session.client.hash(args.revision).await?;
    let hash = answer.get("hash").and_then(Value::as_str).unwrap_or("-");
    let revision = answer.get("revision").and_then(Value::as_u64).unwrap_or(0);
    match session.format {
        Format::Json => output::json(&answer),
        Format::Plain => print(&format!("{hash} revision {revision}\n")),
        Format::Table => output::row(["REVISION", "HASH"], [revision.to_string(), hash.to_owned()]),
    }
}
