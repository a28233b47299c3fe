//! How long a change takes from the moment it is due to those who watch.
//!
//! The loop is open: change k is due at a fixed moment and begins then, whatever became of those before it, and every latency counts from
//! that moment. So a server that stalls is charged with everything that had to wait (no coordinated omission). Only when [`IN_FLIGHT`]
//! puts are under way does the next one wait for an answer; how late that made it is in its latency, and in the report.

use std::cell::OnceCell;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Mutex, oneshot};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{sleep_until, timeout};

use super::super::process::interrupted;
use super::args::WatchArgs;
use super::report::{Kind, Tally};
use crate::cli::CliError;
use crate::client::Client;
use crate::client::watch::{Message, WatchOptions};

/// How long watchers may take to see the last change.
const PATIENCE: Duration = Duration::from_secs(5);
/// So many puts may be under way, each on a connection of its own. `--rate` names the number in its help.
const IN_FLIGHT: usize = 256;
/// A timer has steps of a millisecond. What begins so little after its moment counts from when it began: that is not the server's.
const SLACK: Duration = Duration::from_millis(2);

/// What was measured, and how it ended.
pub(super) struct Measured {
    pub(super) tally: Tally,
    pub(super) took: Duration,
    pub(super) ended: Result<(), CliError>,
}

/// Runs the load until its end or a signal; the result holds one latency for each change and watcher, and the puts' own.
pub(super) async fn run(client: &Client, args: &WatchArgs) -> Result<Measured, CliError> {
    let tally = Arc::new(Mutex::new(Tally::new()));
    let start = OnceCell::new();
    let ended = tokio::select! {
        ended = measure(client, args, &tally, &start) => ended,
        signal = interrupted() => Err(CliError::Interrupted(signal)),
    };
    // Before the first change there is nothing to report.
    let Some(start) = start.get() else {
        return Err(ended.err().unwrap_or_else(|| CliError::Failed("nothing was measured".to_owned())));
    };
    let took = start.elapsed();
    let tally = std::mem::take(&mut *tally.lock().await);
    Ok(Measured { tally, took, ended })
}

/// Sets `start` when everybody watches and the changes begin.
async fn measure(client: &Client, args: &WatchArgs, tally: &Arc<Mutex<Tally>>, start: &OnceCell<Instant>) -> Result<(), CliError> {
    let mut watches = Vec::new();
    for _ in 0..args.watchers {
        let mut watch = client.watch(WatchOptions::key(args.key.as_bytes())).await?;
        // Only a watch that is open sees the first change.
        watch.next().await?;
        watches.push(watch);
    }
    let start = *start.get_or_init(Instant::now);
    let mut watchers = JoinSet::new();
    let mut enough = Vec::new();
    for watch in watches {
        let (stop, stopped) = oneshot::channel::<u64>();
        enough.push(stop);
        watchers.spawn(follow(watch, tally.clone(), start, stopped));
    }
    let last = write(client, args, IN_FLIGHT, tally, start).await?;
    for stop in enough {
        // A watcher that has failed does not listen any more; its error is returned below.
        let _ = stop.send(last);
    }
    while let Some(ended) = watchers.join_next().await {
        ended.map_err(failed)??;
    }
    Ok(())
}

fn failed(error: JoinError) -> CliError {
    CliError::Failed(error.to_string())
}

/// Puts every change when it is due, at most `in_flight` at once; returns the last revision when all are answered.
async fn write(client: &Client, args: &WatchArgs, in_flight: usize, tally: &Arc<Mutex<Tally>>, start: Instant) -> Result<u64, CliError> {
    let all = (args.duration.as_secs_f64() * args.rate).ceil() as u64;
    let mut puts = JoinSet::new();
    let mut last = 0;
    // It is in the report also if there is none.
    tally.lock().await.lateness();
    for number in 0..all {
        let due = start + Duration::from_secs_f64(number as f64 / args.rate);
        sleep_until(due.into()).await;
        while let Some(revision) = puts.try_join_next() {
            last = last.max(revision.map_err(failed)?);
        }
        while puts.len() >= in_flight
            && let Some(revision) = puts.join_next().await
        {
            last = last.max(revision.map_err(failed)?);
        }
        let now = Instant::now();
        if now >= start + args.duration + PATIENCE {
            tally.lock().await.lateness().never_begun = all - number;
            break;
        }
        let late = now.saturating_duration_since(due);
        let from = if late <= SLACK { now } else { due };
        if late > SLACK {
            tally.lock().await.lateness().note(late);
        }
        let value = value(from.saturating_duration_since(start), args.value_size as usize);
        puts.spawn(put(client.clone(), args.key.clone(), value, from, tally.clone()));
    }
    while let Some(revision) = puts.join_next().await {
        last = last.max(revision.map_err(failed)?);
    }
    Ok(last)
}

/// It begins with the moment from which its latency counts.
fn value(due: Duration, bytes: usize) -> Vec<u8> {
    let mut value = due.as_micros().to_string().into_bytes();
    value.push(b' ');
    value.resize(value.len().max(bytes), b'.');
    value
}

/// The revision it made; 0 if it failed, which is counted and told in the report.
async fn put(client: Client, key: String, value: Vec<u8>, from: Instant, tally: Arc<Mutex<Tally>>) -> u64 {
    let answered = client.put(key.as_bytes(), value).await;
    let latency = from.elapsed();
    let (revision, result) = match answered {
        Ok(put) => (put.revision, Ok(if put.created { 201 } else { 204 })),
        Err(error) => (0, error.problem().map(|problem| problem.status).ok_or_else(|| error.to_string())),
    };
    tally.lock().await.note(Kind::Put, result, revision > 0, latency);
    revision
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
    let deleted = client.delete(args.key.as_bytes(), crate::client::Condition::Always);
    tokio::select! {
        _ = timeout(PATIENCE, deleted) => {}
        _ = interrupted() => {}
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::time::sleep;

    use super::*;

    /// Answers every put after `pause`; keeps the moments that came in the values.
    async fn slow_server(pause: Duration) -> (String, Arc<Mutex<Vec<u64>>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let moments = Arc::new(Mutex::new(Vec::new()));
        let revision = Arc::new(AtomicU64::new(0));
        let seen = moments.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, pause, seen.clone(), revision.clone()));
            }
        });
        (url, moments)
    }

    async fn serve(stream: TcpStream, pause: Duration, seen: Arc<Mutex<Vec<u64>>>, revision: Arc<AtomicU64>) {
        let mut stream = BufReader::new(stream);
        loop {
            let mut length = 0;
            loop {
                let mut line = String::new();
                if stream.read_line(&mut line).await.unwrap_or(0) == 0 {
                    return;
                }
                if let Some(text) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                    length = text.trim().parse().unwrap();
                }
                if line == "\r\n" {
                    break;
                }
            }
            let mut body = vec![0; length];
            stream.read_exact(&mut body).await.unwrap();
            let text = String::from_utf8(body).unwrap();
            seen.lock().await.push(text.split(' ').next().unwrap().parse().unwrap());
            sleep(pause).await;
            let revision = revision.fetch_add(1, Ordering::Relaxed) + 1;
            let answer = format!("HTTP/1.1 204 No Content\r\nmetcd-revision: {revision}\r\n\r\n");
            // The other side may have given up.
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    }

    fn args(rate: f64, duration: Duration) -> WatchArgs {
        WatchArgs {
            watchers: 1,
            rate,
            duration,
            value_size: 64,
            key: "k".to_owned(),
        }
    }

    /// The report of a load on a server that takes `pause` for each answer, how long it took, and the moments in the values.
    async fn load(pause: Duration, rate: f64, in_flight: usize) -> (serde_json::Value, Duration, Vec<u64>) {
        let (url, moments) = slow_server(pause).await;
        let tally = Arc::new(Mutex::new(Tally::new()));
        let client = Client::new([url]).unwrap();
        let args = args(rate, Duration::from_millis(400));
        let start = Instant::now();
        let last = write(&client, &args, in_flight, &tally, start).await.unwrap();
        let took = start.elapsed();
        let report = tally.lock().await.to_json(1.0);
        assert_eq!(
            report["latency_us"]["put"]["count"], last,
            "all were answered before it returned: {report}"
        );
        let mut moments = moments.lock().await.clone();
        moments.sort_unstable();
        (report, took, moments)
    }

    /// Every value names the moment its change was due, however late it was sent.
    fn are_due_every(interval_us: u64, moments: &[u64]) {
        for (number, moment) in (0..).zip(moments) {
            let due = number * interval_us;
            assert!((due..=due + SLACK.as_micros() as u64).contains(moment), "{moments:?}");
        }
    }

    #[tokio::test]
    async fn a_put_begins_when_it_is_due_though_none_before_it_is_answered() {
        let (report, took, moments) = load(Duration::from_secs(1), 50.0, 256).await;
        assert_eq!(moments.len(), 20);
        are_due_every(20_000, &moments);
        // One after another they would take 20 s.
        assert!(took < Duration::from_secs(8), "{took:?}");
        assert!(report["latency_us"]["put"]["min"].as_u64() >= Some(990_000), "{report}");
    }

    #[tokio::test]
    async fn what_the_bound_holds_back_is_late_in_its_latency_and_in_the_report() {
        let (report, took, moments) = load(Duration::from_millis(100), 50.0, 1).await;
        assert_eq!(moments.len(), 20);
        are_due_every(20_000, &moments);
        assert!(took >= Duration::from_secs(2), "{took:?}");
        let late = &report["begun_late"];
        assert!(
            late["count"].as_u64() >= Some(18) && late["max_us"].as_u64() >= Some(1_400_000),
            "{report}"
        );
        assert!(report["latency_us"]["put"]["max"].as_u64() >= Some(1_500_000), "{report}");
    }
}
