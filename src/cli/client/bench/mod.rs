//! `metcd bench`: load, measured from where the users are.

mod args;
mod conn;
mod keys;
mod load;
mod report;
mod watch;

use std::io::{self, IsTerminal as _};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use http::Uri;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

pub use args::BenchCommand;

use self::args::{Choice, LoadArgs, WatchArgs};
use self::keys::{Distribution, Zipf};
use self::load::{Base, Live, Plan};
use self::report::Tally;
use super::output::{self, Format, bold};
use super::{ClientArgs, print, runtime};
use crate::cli::CliError;

/// How often the progress line is drawn.
const DRAWN_EVERY: Duration = Duration::from_millis(200);
/// Filling takes no longer than this.
const FILL_LIMIT: Duration = Duration::from_secs(3600);

pub(super) fn run(args: &ClientArgs, command: &BenchCommand) -> Result<(), CliError> {
    match command {
        BenchCommand::Put(load) => run_load(args, "put", load, 0),
        BenchCommand::Get(load) => run_load(args, "get", load, 100),
        BenchCommand::Mixed { load, reads } => run_load(args, "mixed", load, *reads),
        BenchCommand::Watch(watch) => run_watch(args, watch),
    }
}

fn run_load(args: &ClientArgs, name: &str, load: &LoadArgs, reads: u8) -> Result<(), CliError> {
    let plan = plan(args, load, reads)?;
    if reads > 0 && !load.no_fill {
        fill(&plan, load)?;
    }
    let live = Arc::new(Live::default());
    let total = plan.warm_up + plan.duration;
    let (tally, took) = with_progress(name, total, &live, || load::run(&plan, &live))?;
    let measured = took.saturating_sub(plan.warm_up).max(Duration::from_millis(1));
    let title = format!(
        "{name}: {}, {} connections, {} keys of {} bytes, values of {} bytes{}",
        plan.bases.iter().map(|base| base.url.as_str()).collect::<Vec<_>>().join(","),
        plan.connections,
        load.keys,
        load.key_size,
        load.value_size,
        load.rate.map(|rate| format!(", {rate} requests/s wanted")).unwrap_or_default(),
    );
    conclude(args, name, &title, &tally, measured, live.ended())
}

fn plan(args: &ClientArgs, load: &LoadArgs, reads: u8) -> Result<Plan, CliError> {
    let bases = args.endpoints().iter().map(|url| base(url)).collect::<Result<Vec<_>, _>>()?;
    if usize::from(load.key_size) < load.prefix.len() + 1 {
        return Err(CliError::Usage(format!(
            "--key-size {} is too small for the prefix {:?}",
            load.key_size, load.prefix
        )));
    }
    Ok(Plan {
        bases,
        connections: load.connections,
        threads: load.threads.min(load.connections),
        reads,
        fill: false,
        distribution: match load.distribution {
            Choice::Zipf if load.theta > 0.0 => Distribution::Zipf(Zipf::new(load.keys, load.theta)),
            Choice::Zipf | Choice::Uniform => Distribution::Uniform { keys: load.keys },
        },
        prefix: load.prefix.clone(),
        key_size: usize::from(load.key_size),
        value_size: load.value_size as usize,
        get_query: if args.serializable() { "?consistency=serializable" } else { "" },
        rate: load.rate,
        warm_up: load.warm_up,
        duration: load.duration,
        patience: args.timeout().unwrap_or(load::PATIENCE),
        requests: load.requests,
        seed: load.seed,
    })
}

/// Any base URL will do: keys are put and got below it.
fn base(url: &str) -> Result<Base, CliError> {
    let wrong = || CliError::Usage(format!("{url:?} is not a base URL: write it as http://host:port"));
    let uri: Uri = url.parse().map_err(|_| wrong())?;
    let authority = uri
        .authority()
        .filter(|_| uri.scheme_str() == Some("http") && uri.query().is_none())
        .ok_or_else(wrong)?;
    let port = authority.port_u16().unwrap_or(80);
    Ok(Base {
        url: url.to_owned(),
        address: format!("{}:{port}", authority.host()),
        path: uri.path().trim_end_matches('/').to_owned(),
    })
}

/// Writes every key once, so that reads find them.
fn fill(plan: &Plan, load: &LoadArgs) -> Result<(), CliError> {
    let plan = Plan {
        reads: 0,
        fill: true,
        rate: None,
        connections: plan.connections.max(16),
        warm_up: Duration::ZERO,
        duration: FILL_LIMIT,
        requests: Some(load.keys),
        ..plan.clone()
    };
    let live = Arc::new(Live::default());
    let (tally, _) = with_progress("fill", Duration::ZERO, &live, || load::run(&plan, &live))?;
    live.ended()
        .inspect_err(|_| output::warn("interrupted while the keys were written: nothing is measured yet"))?;
    match tally.failure() {
        Some(failure) => Err(CliError::Failed(format!(
            "the keys could not be written ({failure}): is the server well?"
        ))),
        None => Ok(()),
    }
}

/// Runs `work` with a live line on stderr, if that is a terminal; returns its result and how long it took.
fn with_progress(
    name: &str,
    total: Duration,
    live: &Arc<Live>,
    work: impl FnOnce() -> io::Result<Tally> + Send,
) -> Result<(Tally, Duration), CliError> {
    let bar = bar(name, total);
    let start = Instant::now();
    let (done, finished) = std::sync::mpsc::sync_channel::<()>(1);
    let tally = std::thread::scope(|scope| {
        scope.spawn({
            let bar = &bar;
            move || draw(bar, live, start, &finished)
        });
        let tally = work();
        drop(done);
        tally
    });
    let took = start.elapsed();
    bar.finish_and_clear();
    let tally = tally.map_err(|error| CliError::Failed(format!("the load generator failed: {error}")))?;
    Ok((tally, took))
}

fn bar(name: &str, total: Duration) -> ProgressBar {
    let target = if io::stderr().is_terminal() {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    };
    let bar = ProgressBar::with_draw_target(Some(total.as_millis() as u64), target);
    let template = if total.is_zero() {
        "{prefix} {spinner} {msg}"
    } else {
        "{prefix} {wide_bar} {msg}"
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.with_prefix(name.to_owned())
}

fn draw(bar: &ProgressBar, live: &Live, start: Instant, finished: &std::sync::mpsc::Receiver<()>) {
    let mut before = (start, 0);
    while finished.recv_timeout(DRAWN_EVERY) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
        let now = Instant::now();
        let answered = live.answered.load(Ordering::Relaxed);
        let rate = (answered - before.1) as f64 / (now - before.0).as_secs_f64();
        before = (now, answered);
        bar.set_position(start.elapsed().as_millis() as u64);
        bar.set_message(format!(
            "{rate:.0}/s, {answered} requests, {} failed",
            live.failed.load(Ordering::Relaxed)
        ));
    }
}

fn run_watch(args: &ClientArgs, watch: &WatchArgs) -> Result<(), CliError> {
    let session = args.session()?;
    let measured = runtime()?.block_on(async {
        // If this fails, nothing was written.
        let measured = watch::run(&session.client, watch).await?;
        watch::clean_up(&session.client, watch).await;
        Ok::<_, CliError>(measured)
    })?;
    let title = format!("watch: {} watchers, {} changes/s wanted", watch.watchers, watch.rate);
    conclude(args, "watch", &title, &measured.tally, measured.took, measured.ended)
}

/// Reports what was measured, also if it was `ended` before its time.
fn conclude(
    args: &ClientArgs,
    name: &str,
    title: &str,
    tally: &Tally,
    took: Duration,
    ended: Result<(), CliError>,
) -> Result<(), CliError> {
    let seconds = took.as_secs_f64();
    let was_interrupted = matches!(ended, Err(CliError::Interrupted(_)));
    match args.format() {
        Format::Json => {
            let mut report = tally.to_json(seconds);
            report["bench"] = name.into();
            report["endpoints"] = args.endpoints().into();
            report["interrupted"] = was_interrupted.into();
            output::json(&report)?;
        }
        Format::Plain => print(&format!("{title}\n{}", tally.to_text(seconds, bold)))?,
        Format::Table => tally.print_tables(seconds)?,
    }
    if was_interrupted {
        output::warn(&format!(
            "interrupted: the report is of {seconds:.1} s, and of what was answered until then"
        ));
    }
    ended?;
    match (tally.succeeded, tally.failure()) {
        (0, Some(failure)) => Err(CliError::Failed(format!("no request succeeded ({failure}): is the server well?"))),
        (0, None) => Err(CliError::Failed("no request was answered in time: is the server well?".to_owned())),
        _ => Ok(()),
    }
}
