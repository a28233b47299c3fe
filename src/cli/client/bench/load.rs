//! The load: connections that send requests one after another, as fast as they are answered or on time.
//!
//! With a rate the loop is open: request k is due at a fixed moment, and its latency counts from then on, not from when a connection was
//! free to send it. So a server that stalls is charged with everything that had to wait (no coordinated omission). Only the timer's own
//! slack, on a connection that had nothing to do, is not the server's.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::task::LocalSet;
use tokio::time::{sleep, sleep_until};

use super::super::process::interrupted;
use super::conn::Connection;
use super::keys::{Distribution, Random, push_key};
use super::report::{Kind, Tally};
use crate::cli::CliError;

/// After a connection broke or could not be made.
const PAUSE: Duration = Duration::from_millis(20);
/// After the end of the measurement answers still under way get this long, unless `--timeout` says otherwise.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// A server: where to connect, and what stands before the key.
#[derive(Debug, Clone)]
pub(super) struct Base {
    /// As given.
    pub(super) url: String,
    /// `host:port`.
    pub(super) address: String,
    /// Without a slash at the end.
    pub(super) path: String,
}

/// One run of the generator.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) bases: Vec<Base>,
    pub(super) connections: u32,
    pub(super) threads: u32,
    /// Of a hundred requests.
    pub(super) reads: u8,
    /// Keys one after another, each once, instead of at random.
    pub(super) fill: bool,
    pub(super) distribution: Distribution,
    pub(super) prefix: String,
    pub(super) key_size: usize,
    pub(super) value_size: usize,
    pub(super) get_query: &'static str,
    pub(super) rate: Option<f64>,
    pub(super) warm_up: Duration,
    pub(super) duration: Duration,
    /// How long answers still under way are waited for at the end.
    pub(super) patience: Duration,
    pub(super) requests: Option<u64>,
    pub(super) seed: u64,
}

/// What is counted while it runs, for the progress line.
#[derive(Debug, Default)]
pub(super) struct Live {
    /// Requests begun in the measured time; numbers them too.
    begun: AtomicU64,
    /// Requests answered, warm-up included.
    pub(super) answered: AtomicU64,
    /// Those that failed.
    pub(super) failed: AtomicU64,
    /// The number of the signal that ended it early; 0 is none.
    signal: AtomicU8,
}

impl Live {
    /// Whether it was ended early, and by which signal.
    pub(super) fn ended(&self) -> Result<(), CliError> {
        match self.signal.load(Ordering::Relaxed) {
            0 => Ok(()),
            signal => Err(CliError::Interrupted(signal)),
        }
    }
}

/// Runs the plan on its threads, or until a signal; returns everything counted.
pub(super) fn run(plan: &Plan, live: &Arc<Live>) -> std::io::Result<Tally> {
    let start = Instant::now();
    let mut total = Tally::new();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..plan.threads)
            .map(|thread| scope.spawn(move || run_thread(plan, live, thread, start)))
            .collect();
        for thread in threads {
            let tally = thread
                .join()
                .map_err(|_| std::io::Error::other("a thread of the generator failed"))??;
            total.add(&tally);
        }
        Ok::<(), std::io::Error>(())
    })?;
    Ok(total)
}

fn run_thread(plan: &Plan, live: &Arc<Live>, thread: u32, start: Instant) -> std::io::Result<Tally> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let tally = Rc::new(RefCell::new(Tally::new()));
    let local = LocalSet::new();
    let plan = Rc::new(plan.clone());
    for number in (thread..plan.connections).step_by(plan.threads as usize) {
        let worker = Worker::new(plan.clone(), live.clone(), tally.clone(), number, start);
        local.spawn_local(worker.run());
    }
    let limit = tokio::time::Instant::from_std(start + plan.warm_up + plan.duration + plan.patience);
    runtime.block_on(async {
        // What does not end by then has no latency to report; it is dropped, and missing in the counts.
        tokio::select! {
            _ = tokio::time::timeout_at(limit, local) => {}
            signal = interrupted() => live.signal.store(signal, Ordering::Relaxed),
        }
    });
    drop(runtime);
    let mut total = Tally::new();
    total.add(&tally.borrow());
    Ok(total)
}

struct Worker {
    plan: Rc<Plan>,
    live: Arc<Live>,
    tally: Rc<RefCell<Tally>>,
    number: u32,
    base: Base,
    random: Random,
    request: Vec<u8>,
    value: Vec<u8>,
    measure_from: Instant,
    end: Instant,
    start: Instant,
}

impl Worker {
    fn new(plan: Rc<Plan>, live: Arc<Live>, tally: Rc<RefCell<Tally>>, number: u32, start: Instant) -> Worker {
        let base = plan.bases.get(number as usize % plan.bases.len().max(1)).cloned();
        let base = base.unwrap_or_else(|| Base {
            url: String::new(),
            address: String::new(),
            path: String::new(),
        });
        let mut random = Random::new(plan.seed.wrapping_add(u64::from(number) << 32));
        let value = (0..plan.value_size).map(|_| b'a' + random.below(26) as u8).collect();
        let measure_from = start + plan.warm_up;
        Worker {
            end: measure_from + plan.duration,
            plan,
            live,
            tally,
            number,
            base,
            random,
            request: Vec::with_capacity(1024),
            value,
            measure_from,
            start,
        }
    }

    async fn run(mut self) {
        let mut connection: Option<Connection> = None;
        let mut turn: u64 = 0;
        loop {
            let Some(due) = self.due(turn).await else { return };
            let measured = due >= self.measure_from;
            let Some(ordinal) = self.begin(measured) else { return };
            turn += 1;
            let kind = self.next_request(ordinal);
            let answered = self.ask_in_time(&mut connection).await;
            self.live.answered.fetch_add(1, Ordering::Relaxed);
            let ok = answered
                .as_ref()
                .is_ok_and(|&status| status < 400 || (status == 404 && kind == Kind::Get));
            if !ok {
                self.live.failed.fetch_add(1, Ordering::Relaxed);
            }
            let is_spoilt = self.plan.fill && !ok;
            if measured {
                let latency = due.elapsed();
                self.tally
                    .borrow_mut()
                    .note(kind, answered.as_ref().map_err(ToString::to_string).copied(), ok, latency);
            }
            if is_spoilt {
                // Without this key the measurement does not begin.
                return;
            }
            if answered.is_err() {
                sleep(PAUSE).await;
            }
        }
    }

    /// When the next request is due: it waits for that moment. None: it is over.
    async fn due(&self, turn: u64) -> Option<Instant> {
        let now = Instant::now();
        let due = match self.plan.rate {
            None => now,
            Some(rate) => {
                let number = turn * u64::from(self.plan.connections) + u64::from(self.number);
                self.start + Duration::from_secs_f64(number as f64 / rate)
            }
        };
        if due >= self.end || now >= self.end + self.plan.patience {
            return None;
        }
        if due <= now {
            return Some(due);
        }
        sleep_until(tokio::time::Instant::from_std(due)).await;
        Some(Instant::now())
    }

    /// The request's number among those counted, unless there were enough.
    fn begin(&self, measured: bool) -> Option<u64> {
        if !measured {
            return Some(0);
        }
        let ordinal = self.live.begun.fetch_add(1, Ordering::Relaxed);
        self.plan.requests.is_none_or(|requests| ordinal < requests).then_some(ordinal)
    }

    fn next_request(&mut self, ordinal: u64) -> Kind {
        let reads = self.plan.reads > 0 && self.random.below(100) < u64::from(self.plan.reads);
        let key = if self.plan.fill {
            ordinal
        } else {
            self.plan.distribution.next(&mut self.random)
        };
        let out = &mut self.request;
        out.clear();
        out.extend_from_slice(if reads { b"GET " } else { b"PUT " });
        out.extend_from_slice(self.base.path.as_bytes());
        out.push(b'/');
        push_key(out, &self.plan.prefix, key, self.plan.key_size);
        if reads {
            out.extend_from_slice(self.plan.get_query.as_bytes());
        }
        out.extend_from_slice(b" HTTP/1.1\r\nhost: ");
        out.extend_from_slice(self.base.address.as_bytes());
        if reads {
            out.extend_from_slice(b"\r\n\r\n");
            return Kind::Get;
        }
        out.extend_from_slice(b"\r\ncontent-length: ");
        out.extend_from_slice(itoa::Buffer::new().format(self.value.len()).as_bytes());
        out.extend_from_slice(b"\r\n\r\n");
        out.extend_from_slice(&self.value);
        Kind::Put
    }

    /// Nothing bounds the time of a fill, so each of its requests has its own bound.
    async fn ask_in_time(&self, connection: &mut Option<Connection>) -> std::io::Result<u16> {
        if !self.plan.fill {
            return self.ask(connection).await;
        }
        let asked = tokio::time::timeout(self.plan.patience, self.ask(connection)).await;
        asked.unwrap_or_else(|_elapsed| Err(std::io::Error::new(std::io::ErrorKind::TimedOut, "no answer in time")))
    }

    async fn ask(&self, connection: &mut Option<Connection>) -> std::io::Result<u16> {
        let mut open = match connection.take() {
            Some(open) => open,
            None => Connection::open(&self.base.address).await?,
        };
        let status = open.exchange(&self.request).await?;
        if !open.is_closing() {
            *connection = Some(open);
        }
        Ok(status)
    }
}
