//! How long a change takes from the request that makes it to those who watch.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Mutex, oneshot};
use tokio::task::JoinSet;
use tokio::time::{sleep_until, timeout};

use super::args::WatchArgs;
use super::report::{Kind, Tally};
use crate::cli::CliError;
use crate::client::Client;
use crate::client::watch::{Message, WatchOptions};

/// How long watchers may take to see the last change.
const PATIENCE: Duration = Duration::from_secs(5);

/// Runs the load; the result holds one latency for each change and watcher, and the puts' own.
pub(super) async fn run(client: &Client, args: &WatchArgs) -> Result<Tally, CliError> {
    let start = Instant::now();
    let tally = Arc::new(Mutex::new(Tally::new()));
    let mut watchers = JoinSet::new();
    let mut enough = Vec::new();
    for _ in 0..args.watchers {
        let mut watch = client.watch(WatchOptions::key(args.key.as_bytes())).await?;
        // Only a watch that is open sees the first change.
        watch.next().await?;
        let (stop, stopped) = oneshot::channel::<u64>();
        enough.push(stop);
        let tally = tally.clone();
        watchers.spawn(follow(watch, tally, start, stopped));
    }
    let last = write(client, args, &tally, start).await?;
    for stop in enough {
        // A watcher that has failed does not listen any more; its error is returned below.
        let _ = stop.send(last);
    }
    while let Some(ended) = watchers.join_next().await {
        ended.map_err(|error| CliError::Failed(error.to_string()))??;
    }
    let mut total = Tally::new();
    total.add(&*tally.lock().await);
    Ok(total)
}

/// Writes at the rate, each value beginning with the moment it was due; returns the last revision.
async fn write(client: &Client, args: &WatchArgs, tally: &Mutex<Tally>, start: Instant) -> Result<u64, CliError> {
    let begin = Instant::now();
    let mut last = 0;
    for number in 0u64.. {
        let due = begin + Duration::from_secs_f64(number as f64 / args.rate);
        if due >= begin + args.duration {
            break;
        }
        sleep_until(due.into()).await;
        let mut value = (start.elapsed().as_micros() as u64).to_string().into_bytes();
        value.push(b' ');
        value.resize(value.len().max(args.value_size as usize), b'.');
        let asked = Instant::now();
        last = client.put(args.key.as_bytes(), value).await?.revision;
        tally.lock().await.note(Kind::Put, Ok(204), true, asked.elapsed());
    }
    Ok(last)
}

async fn follow(
    mut watch: crate::client::watch::Watch,
    tally: Arc<Mutex<Tally>>,
    start: Instant,
    mut stopped: oneshot::Receiver<u64>,
) -> Result<(), CliError> {
    let (mut seen, mut last) = (0, None);
    while last.is_none_or(|last| seen < last) {
        let message = tokio::select! {
            message = watch.next() => message?,
            stop = &mut stopped, if last.is_none() => {
                last = Some(stop.unwrap_or(0));
                continue;
            }
            () = tokio::time::sleep(PATIENCE), if last.is_some() => {
                return Err(CliError::Failed(format!("a watcher did not see the last change within {} s", PATIENCE.as_secs())));
            }
        };
        let Message::Change { revision, events } = message else { continue };
        let now = start.elapsed();
        seen = revision;
        for event in &events {
            let sent = event.kv.value.split(|&byte| byte == b' ').next().unwrap_or_default();
            if let Some(sent) = std::str::from_utf8(sent).ok().and_then(|digits| digits.parse().ok()) {
                let latency = now.saturating_sub(Duration::from_micros(sent));
                tally.lock().await.note(Kind::Watch, Ok(200), true, latency);
            }
        }
    }
    Ok(())
}

/// Deletes the key that was written, as far as that is quickly done.
pub(super) async fn clean_up(client: &Client, args: &WatchArgs) {
    let _ = timeout(PATIENCE, client.delete(args.key.as_bytes(), crate::client::Condition::Always)).await;
}
