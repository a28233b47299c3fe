//! Running many seeds, and telling about it.

use std::fmt::Debug;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::plan::{FAULT_KINDS, FaultKind, Micros, SECOND, Settings};
use crate::run::{Report, run};
use crate::stats::Stats;

/// Faults end with it anyway.
const LONGEST_SAFETY_PHASE: Micros = 128 * SECOND;

/// What somebody wants to see, from `SIM_*` in the environment, where `scripts/simulate` puts it.
#[derive(Debug, Clone)]
pub struct Asked {
    pub from: u64,
    pub seeds: u64,
    pub jobs: u64,
    pub trace: bool,
    pub shrink: bool,
    pub go_on: bool,
    /// Kinds of fault that do not happen.
    pub without: Vec<FaultKind>,
    /// No faults from then on.
    pub faults_until: Micros,
    /// A known bug that is put back in.
    #[cfg(feature = "mutants")]
    pub mutant: Option<metcd::mutants::Mutant>,
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
            without: Vec::new(),
            faults_until: Micros::MAX,
            #[cfg(feature = "mutants")]
            mutant: None,
        }
    }
}

impl Asked {
    pub fn from_environment() -> Asked {
        Asked::from(&|name| std::env::var(name).ok())
    }

    pub fn from(variable: &dyn Fn(&str) -> Option<String>) -> Asked {
        let text = |name: &str| variable(name).filter(|text| !text.is_empty());
        let number = |name: &str, default| {
            let parse = |text: String| text.parse().unwrap_or_else(|_| panic!("{name} is no number: {text}"));
            text(name).map_or(default, parse)
        };
        let default = Asked::default();
        Asked {
            from: number("SIM_FROM", 0),
            seeds: number("SIM_SEEDS", 1),
            jobs: number("SIM_JOBS", default.jobs),
            trace: number("SIM_TRACE", 0) != 0,
            shrink: number("SIM_SHRINK", 1) != 0,
            go_on: number("SIM_GO_ON", 0) != 0,
            without: text("SIM_WITHOUT").map_or(Vec::new(), |names| names.split(',').map(|name| named(&FAULT_KINDS, name)).collect()),
            faults_until: number("SIM_FAULTS_UNTIL", Micros::MAX).saturating_mul(SECOND),
            #[cfg(feature = "mutants")]
            mutant: text("SIM_MUTANT").map(|name| named(metcd::mutants::ALL, &name)),
        }
    }

    /// For one seed of it.
    pub fn settings(&self, seed: u64) -> Settings {
        Settings {
            faults_until: self.faults_until,
            without: self.without.clone(),
            trace: self.trace,
            #[cfg(feature = "mutants")]
            mutant: self.mutant,
            ..Settings::new(seed)
        }
    }
}

fn named<T: Copy + Debug>(all: &[T], name: &str) -> T {
    let found = all.iter().find(|one| format!("{one:?}") == name);
    *found.unwrap_or_else(|| panic!("there is no {name}: {all:?}"))
}

/// What to run to see this history, event by event.
pub fn command(settings: &Settings) -> String {
    let mut command = format!("scripts/simulate --seeds 1 --from {}", settings.seed);
    if !settings.without.is_empty() {
        let names: Vec<String> = settings.without.iter().map(|kind| format!("{kind:?}")).collect();
        command.push_str(&format!(" --without {}", names.join(",")));
    }
    if settings.faults_until < Micros::MAX {
        command.push_str(&format!(" --faults-until {}", settings.faults_until / SECOND));
    }
    #[cfg(feature = "mutants")]
    if let Some(mutant) = settings.mutant {
        command.push_str(&format!(" --mutant {mutant:?}"));
    }
    command.push_str(" --trace");
    command
}

/// Runs the seeds, prints what happened, and fails with the first violation and the command that repeats it.
pub fn explore(from: u64, seeds: u64, asked: &Asked) -> Stats {
    let begun = Instant::now();
    let next = AtomicU64::new(from);
    let total = Mutex::new((Stats::default(), Vec::<(u64, String)>::new()));
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= from + seeds {
                return;
            }
            let Report { stats, violation, .. } = run(asked.settings(seed));
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
        let settings = asked.settings(*seed);
        if asked.shrink && !asked.trace {
            let (smaller, what) = shrink(&settings, what);
            println!("\nA smaller history that fails: {what}\n  {}", command(&smaller));
        }
        panic!("seed {seed}: {what}\n\nTo see it again:\n  {}\n", command(&settings));
    }
    stats
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
        "operations: {} asked, {} unknown, {} not applied, {} checked for linearizability, {} given up",
        stats.operations, stats.unknown, stats.not_applied, stats.checked, stats.given_up
    );
    println!(
        "retries: {}, of them {} on another member and {} in a later term; answered with what an earlier try came to: {:?}",
        stats.retries, stats.retries_elsewhere, stats.retries_in_later_terms, stats.replays
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

/// Looks for a smaller history of the same seed that fails too: fewer kinds of fault, and an earlier end of the faults. With what is
/// wrong in it.
pub fn shrink(failed: &Settings, what: &str) -> (Settings, String) {
    let mut best = (failed.clone(), what.to_owned());
    for kind in FAULT_KINDS.into_iter().filter(|kind| !failed.without.contains(kind)) {
        let mut smaller = best.0.clone();
        smaller.without.push(kind);
        if let Some(what) = run(smaller.clone()).violation {
            best = (smaller, what);
        }
    }
    let mut until = LONGEST_SAFETY_PHASE;
    while until > SECOND {
        until /= 2;
        let smaller = Settings {
            faults_until: until.min(best.0.faults_until),
            ..best.0.clone()
        };
        let Some(what) = run(smaller.clone()).violation else { break };
        best = (smaller, what);
    }
    best
}
