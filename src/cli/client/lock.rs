//! `metcd lock` and `metcd elect`: one holder at a time, in the order in which they asked.
//!
//! Each candidate puts a key of its own under a common prefix, attached to a lease. The one whose key is oldest holds; every other one
//! watches the key just before its own, so that one release wakes one candidate. The revision that made a key is its **fencing token**:
//! it grows from holder to holder, so that whatever the holder writes to can refuse an earlier one that does not know yet that it lost.

use std::ffi::OsString;
use std::pin::pin;
use std::time::Duration;

use clap::Args;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout_at};

use super::args::{bytes, duration, key};
use super::lease::renewal;
use super::output::{self, Format};
use super::process::{Command, Ended, interrupted};
use super::{Session, print};
use crate::cli::CliError;
use crate::client::watch::{EventKind, Message, WatchOptions};
use crate::client::{Client, ClientError, Condition, KeyValue, Lease, ListOptions, PutOptions, Range};

/// The lease ends for its holder after this part of its time without a keepalive, before it can end for anybody else.
const CAUTION: f64 = 0.9;
/// Failed keepalives are repeated after this.
const RETRY: Duration = Duration::from_millis(200);

const ENVIRONMENT: &str = "The command gets METCD_FENCING_TOKEN (a number that grows from holder to holder), METCD_LOCK_KEY and \
                           METCD_LEASE_ID in its environment. It gets SIGTERM, and SIGKILL 5 s later, if the lease is lost: exit code 1. \
                           A signal to metcd (SIGTERM, SIGINT, SIGQUIT, SIGHUP) is passed on to it, with SIGKILL 5 s later as well. Its exit code is \
                           passed on; of a command that a signal ended it is 128 and the signal's number.";

/// `metcd lock`
#[derive(Debug, Args)]
#[command(after_help = format!("Examples:\n  metcd lock backup -- ./backup.sh\n  metcd lock backup --wait 10s -- ./backup.sh\n  metcd lock backup    # hold it until Ctrl-C\n\n{ENVIRONMENT}"))]
pub struct LockArgs {
    /// The lock.
    name: OsString,
    #[command(flatten)]
    hold: HoldArgs,
}

/// `metcd elect`
#[derive(Debug, Args)]
#[command(after_help = format!("Examples:\n  metcd elect scheduler node-7 -- ./scheduler\n  metcd elect scheduler    # who leads?\n\n{ENVIRONMENT}"))]
pub struct ElectArgs {
    /// The election.
    name: OsString,
    /// What the leader is known by; left out, the present leader is printed.
    value: Option<OsString>,
    #[command(flatten)]
    hold: HoldArgs,
}

#[derive(Debug, Args)]
struct HoldArgs {
    /// How long it stays held if this process dies.
    #[arg(long, value_parser = duration, default_value = "10s", value_name = "TIME")]
    ttl: Duration,
    /// Give up, with exit code 3, if it is not had in this time.
    #[arg(long, value_parser = duration, value_name = "TIME")]
    wait: Option<Duration>,
    /// Run this while it is held.
    #[arg(last = true, value_name = "CMD")]
    command: Vec<OsString>,
}

/// A place in the queue.
struct Claim {
    key: Vec<u8>,
    /// The revision that made it.
    token: u64,
    lease: String,
}

pub(super) async fn lock(session: &Session, args: &LockArgs) -> Result<(), CliError> {
    compete(session, &queue("lock", &args.name)?, b"", &args.hold).await
}

pub(super) async fn elect(session: &Session, args: &ElectArgs) -> Result<(), CliError> {
    let queue = queue("elect", &args.name)?;
    match &args.value {
        Some(value) => compete(session, &queue, bytes(value), &args.hold).await,
        None if args.hold.command.is_empty() => {
            let kvs = candidates(&session.client, &queue).await?.1;
            let leader = kvs.into_iter().min_by_key(|kv| kv.create_revision);
            let leader = leader.ok_or_else(|| CliError::NotMet("nobody leads".to_owned()))?;
            match session.format {
                Format::Json => output::json(&leader),
                Format::Plain => output::value(&leader.value),
                Format::Table => super::kv::table(&[leader]),
            }
        }
        None => Err(CliError::Usage(
            "a candidate needs a value: metcd elect NAME VALUE -- CMD".to_owned(),
        )),
    }
}

/// The prefix of all candidates' keys.
fn queue(kind: &str, name: &OsString) -> Result<Vec<u8>, CliError> {
    Ok([kind.as_bytes(), b"/", key(name)?, b"/"].concat())
}

async fn compete(session: &Session, queue: &[u8], value: &[u8], args: &HoldArgs) -> Result<(), CliError> {
    let client = &session.client;
    let lease = client.grant_lease(args.ttl).await?;
    let (lost_tx, mut lost) = oneshot::channel();
    let keeper = tokio::spawn(keep(client.clone(), lease.clone(), lost_tx));
    let result = hold(session, queue, value, args, &lease, &mut lost).await;
    keeper.abort();
    // At worst the lease ends by itself: whoever does not want to wait for the answer need not.
    tokio::select! {
        _ = client.revoke_lease(&lease.id) => {}
        _ = interrupted() => {}
    }
    result
}

async fn hold(
    session: &Session,
    queue: &[u8],
    value: &[u8],
    args: &HoldArgs,
    lease: &Lease,
    lost: &mut oneshot::Receiver<String>,
) -> Result<(), CliError> {
    // Listened to from here on without a pause, in which one would be lost.
    let mut stop = pin!(interrupted());
    let acquired = acquire(&session.client, queue, value, lease);
    let claim = tokio::select! {
        claim = within(args.wait, acquired) => claim?,
        why = &mut *lost => return Err(lease_lost(why)),
        number = &mut stop => return Err(CliError::Interrupted(number)),
    };
    let taken_away = taken_away(&session.client, &claim);
    if args.command.is_empty() {
        announce(session.format, &claim)?;
        return tokio::select! {
            why = lost => Err(lease_lost(why)),
            () = taken_away => Err(deleted(&claim)),
            _ = &mut stop => Ok(()),
        };
    }
    let mut command = Command::new(&args.command)?;
    command.env("METCD_FENCING_TOKEN", claim.token.to_string());
    command.env("METCD_LEASE_ID", &claim.lease);
    command.env("METCD_LOCK_KEY", {
        use std::os::unix::ffi::OsStringExt as _;
        OsString::from_vec(claim.key.clone())
    });
    let mut running = command.spawn()?;
    let ended = tokio::select! {
        ended = running.wait() => return passed_on(ended?),
        why = &mut *lost => lease_lost(why),
        () = taken_away => deleted(&claim),
        number = &mut stop => return passed_on(running.stop_with(number.into()).await?),
    };
    running.stop().await?;
    Err(ended)
}

fn passed_on(ended: Ended) -> Result<(), CliError> {
    match ended.trouble() {
        None => Ok(()),
        Some(trouble) => Err(CliError::Command {
            code: ended.code(),
            trouble: format!("the command {trouble}"),
        }),
    }
}

fn lease_lost(why: Result<String, oneshot::error::RecvError>) -> CliError {
    let why = why.unwrap_or_else(|_| "its keeper ended".to_owned());
    CliError::Failed(format!("the lease is lost ({why}): somebody else may hold it now"))
}

fn deleted(claim: &Claim) -> CliError {
    let key = output::visible(&claim.key, false);
    CliError::Failed(format!(
        "the lease is lost, or somebody deleted the key {key}: somebody else may hold it now"
    ))
}

fn announce(format: Format, claim: &Claim) -> Result<(), CliError> {
    match format {
        Format::Json => output::json(&serde_json::json!({
            "key": output::visible(&claim.key, false), "fencing_token": claim.token, "lease": claim.lease,
        })),
        Format::Plain => print(&format!("held, fencing token {}\n", claim.token)),
        Format::Table => output::row(
            ["KEY", "FENCING TOKEN", "LEASE"],
            [output::visible(&claim.key, false), claim.token.to_string(), claim.lease.clone()],
        ),
    }
}

async fn within(wait: Option<Duration>, acquired: impl Future<Output = Result<Claim, CliError>>) -> Result<Claim, CliError> {
    match wait {
        None => acquired.await,
        Some(wait) => timeout_at(Instant::now() + wait, acquired).await.unwrap_or_else(|_| {
            Err(CliError::NotMet(
                "somebody else holds it: wait longer (--wait), or see who with `metcd ls lock/` (or `elect/`)".to_owned(),
            ))
        }),
    }
}

/// Queues up and waits until nobody is before.
async fn acquire(client: &Client, queue: &[u8], value: &[u8], lease: &Lease) -> Result<Claim, CliError> {
    let key = [queue, lease.id.as_bytes()].concat();
    let options = PutOptions {
        lease: lease.id.parse().ok(),
        condition: Condition::Absent,
        ..PutOptions::default()
    };
    let token = client.put_with(&key, value.to_vec(), &options).await?.revision;
    loop {
        let (revision, kvs) = candidates(client, queue).await?;
        if !kvs.iter().any(|kv| kv.key == key) {
            return Err(CliError::Failed(
                "the key of this candidate is gone: somebody deleted it".to_owned(),
            ));
        }
        let before = kvs
            .into_iter()
            .filter(|kv| kv.create_revision < token)
            .max_by_key(|kv| kv.create_revision);
        match before {
            None => {
                let lease = lease.id.clone();
                return Ok(Claim { key, token, lease });
            }
            Some(before) => wait_for_end(client, &before.key, revision).await?,
        }
    }
}

async fn candidates(client: &Client, queue: &[u8]) -> Result<(u64, Vec<KeyValue>), CliError> {
    let range = Range::Prefix(queue.to_vec());
    let mut options = ListOptions::default();
    let mut all = Vec::new();
    loop {
        let page = client.list(&range, &options).await?;
        all.extend(page.kvs);
        if page.next.is_none() {
            return Ok((page.revision, all));
        }
        options.after = page.next;
    }
}

/// Returns when a key that existed at `revision` has been deleted, or may have been.
async fn wait_for_end(client: &Client, key: &[u8], revision: u64) -> Result<(), CliError> {
    let mut options = WatchOptions::key(key);
    options.from_revision = Some(revision + 1);
    options.only = Some(EventKind::Delete);
    options.outage = Duration::MAX;
    let message = async {
        let mut watch = client.watch(options).await?;
        loop {
            if let Message::Change { .. } = watch.next().await? {
                return Ok(());
            }
        }
    };
    match message.await {
        Ok(()) => Ok(()),
        // The queue is read anew.
        Err(error) if ClientError::code(&error) == Some("compacted") => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Returns when the key of this claim has been deleted, which lets the next one in. While nothing can be reached, the lease decides.
async fn taken_away(client: &Client, claim: &Claim) {
    let mut seen = claim.token;
    loop {
        let looked = match wait_for_end(client, &claim.key, seen).await {
            Ok(()) => client
                .list(&Range::Prefix(claim.key.clone()), &ListOptions::default())
                .await
                .map_err(CliError::from),
            Err(error) => Err(error),
        };
        match looked {
            Ok(page) if page.kvs.iter().any(|kv| kv.key == claim.key && kv.create_revision == claim.token) => seen = page.revision,
            Ok(_) => return,
            Err(_) => sleep(RETRY).await,
        }
    }
}

/// Keeps a lease alive until that fails for too long; then it says why.
async fn keep(client: Client, lease: Lease, lost: oneshot::Sender<String>) {
    let ttl = Duration::try_from_secs_f64(lease.ttl * CAUTION).unwrap_or(Duration::from_secs(1));
    let client = client.with_timeout((ttl / 3).max(Duration::from_millis(100)));
    let mut valid_until = Instant::now() + ttl;
    let why = loop {
        let asked = Instant::now();
        match timeout_at(valid_until, client.keep_lease_alive(&lease.id)).await {
            Ok(Ok(lease)) => {
                // The server's time begins after the request was sent, ours before.
                valid_until = asked + ttl;
                sleep(renewal(&lease)).await;
            }
            Ok(Err(error)) if error.is_not_met() => break error.to_string(),
            Ok(Err(error)) if Instant::now() + RETRY >= valid_until => break error.to_string(),
            Ok(Err(_)) => sleep(RETRY).await,
            Err(_elapsed) => break "no keepalive was answered in time".to_owned(),
        }
    };
    // Nobody waits for it any more if the command has ended.
    let _ = lost.send(why);
}
