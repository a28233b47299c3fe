//! Running many seeds, and telling about it.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::plan::{FAULT_KINDS, Micros, SECOND, Settings};
use crate::run::{Report, run};
use crate::stats::Stats;

/// What somebody wants to see, from `SIM_*` in the environment.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    pub from: u64,
    pub seeds: u64,
    pub jobs: u64,
    pub trace: bool,
    pub shrink: bool,
    pub go_on: bool,
}

impl Default for Asked {
    fn default() -> Asked {
        Asked {
            from: 0,
            seeds: 1,
            jobs: std::thread::available_parallelism().map_or(1, |n| n.get() as u64),
            trace: false,
            shrink: true,
            go_on: false,
        }
    }
}

impl Asked {
    pub fn from_environment() -> Asked {
        let number = |name: &str, default| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default);
        let default = Asked::default();
        Asked {
            from: number("SIM_FROM", 0),
            seeds: number("SIM_SEEDS", 1),
            jobs: number("SIM_JOBS", default.jobs),
            trace: number("SIM_TRACE", 0) != 0,
            shrink: number("SIM_SHRINK", 1) != 0,
            go_on: number("SIM_GO_ON", 0) != 0,
        }
    }
}

/// Runs the seeds, prints what happened, and fails with the first violation and the command that repeats it.
pub fn explore(from: u64, seeds: u64, asked: Asked) -> Stats {
    let begun = Instant::now();
    let next = AtomicU64::new(from);
    let total = Mutex::new((Stats::default(), Vec::<(u64, String)>::new()));
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= from + seeds {
                return;
            }
            let mut settings = Settings::new(seed);
            settings.trace = asked.trace;
            #[cfg(feature = "mutants")]
            {
                settings.mutant = mutant_of_environment();
            }
            let Report { stats, violation, .. } = run(settings);
            let mut total = total.lock().unwrap();
            total.0.add(&stats);
            if let Some(what) = violation {
                println!("seed {seed}: {what}");
                total.1.push((seed, what));
                if !asked.go_on {
                    next.store(u64::MAX / 2, Ordering::Relaxed);
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..asked.jobs.max(1) {
            scope.spawn(work);
        }
    });
    let (stats, mut violations) = total.into_inner().unwrap();
    violations.sort();
    tell(&stats, seeds, begun.elapsed().as_secs_f64());
    if let Some((seed, what)) = violations.first() {
        if asked.shrink && !asked.trace {
            shrink(*seed);
        }
        panic!("seed {seed}: {what}\n\nTo see it again:\n  scripts/simulate --seeds 1 --from {seed} --trace\n");
    }
    stats
}

/// The known bug named by `SIM_MUTANT`.
#[cfg(feature = "mutants")]
fn mutant_of_environment() -> Option<metcd::mutants::Mutant> {
    let name = std::env::var("SIM_MUTANT").ok().filter(|name| !name.is_empty())?;
    let found = metcd::mutants::ALL.iter().find(|mutant| format!("{mutant:?}") == name);
    Some(*found.unwrap_or_else(|| panic!("there is no mutant {name}")))
}

/// Puts each known bug back in and counts the seeds until it is found. Fails if one is not.
#[cfg(feature = "mutants")]
pub fn find_mutants(seeds: u64) {
    let mut survivors = Vec::new();
    for &mutant in metcd::mutants::ALL {
        let found = (0..seeds).find_map(|seed| {
            let settings = Settings {
                mutant: Some(mutant),
                ..Settings::new(seed)
            };
            run(settings).violation.map(|what| (seed, what))
        });
        match found {
            Some((seed, what)) => println!("| {mutant:?} | {} | {} |", seed + 1, what.lines().next().unwrap_or("")),
            None => survivors.push(mutant),
        }
    }
    assert!(survivors.is_empty(), "not found within {seeds} seeds: {survivors:?}");
}

fn tell(stats: &Stats, seeds: u64, wall: f64) {
    let simulated = stats.simulated as f64 / SECOND as f64;
    println!(
        "{seeds} seeds: {simulated:.0} s simulated in {wall:.1} s ({:.0} times as fast{}), {} events, {} messages",
        simulated / wall,
        cpu_seconds().map_or(String::new(), |cpu| format!(", {:.0} times the processor's time", simulated / cpu)),
        stats.events,
        stats.messages
    );
    println!(
        "operations: {} asked, {} retried, {} unknown, {} not applied, {} checked for linearizability, {} given up",
        stats.operations, stats.retries, stats.unknown, stats.not_applied, stats.checked, stats.given_up
    );
    println!(
        "cluster: {} terms with a leader, {} configuration entries, {} snapshots, {} installed, {} introductions, {} removed members, {} equal states compared, {} reads from the log",
        stats.elections,
        stats.conf_changes,
        stats.snapshots,
        stats.installs,
        stats.introductions,
        stats.removed,
        stats.compared,
        stats.fetches
    );
    println!(
        "leases: {} granted, {} renewals, {} expired; watches: {} revisions delivered",
        stats.leases, stats.renewals, stats.expired, stats.watched
    );
    println!("faults: {:?}", stats.faults);
}

/// What this process has used of the processors, on Linux: on a busy machine the wall says little.
fn cpu_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // Fields 14 and 15, in hundredths of a second; the name before them may contain anything but ends with the last parenthesis.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |field: usize| fields.get(field - 3)?.parse::<f64>().ok();
    let seconds = (ticks(14)? + ticks(15)?) / 100.0;
    (seconds > 0.0).then_some(seconds)
}

/// Looks for a smaller history of the same seed that fails too: fewer kinds of fault, and an earlier end of the faults.
fn shrink(seed: u64) {
    let mut best = Settings::new(seed);
    let fails = |settings: &Settings| run(settings.clone()).violation.is_some();
    for kind in FAULT_KINDS {
        let mut smaller = best.clone();
        smaller.without.push(kind);
        if fails(&smaller) {
            best = smaller;
        }
    }
    let mut until: Micros = 128 * SECOND;
    while until > SECOND {
        let smaller = Settings {
            faults_until: until / 2,
            ..best.clone()
        };
        if !fails(&smaller) {
            break;
        }
        until /= 2;
        best = smaller;
    }
    println!(
        "it also fails without {:?}, with faults until {} s",
        best.without,
        best.faults_until / SECOND
    );
}
