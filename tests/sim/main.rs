//! The seeded simulation: a whole cluster of the product's own protocol, state machine, log and lease clock in one thread, on a virtual
//! clock, with everything that can go wrong going wrong. See `README.md` beside this file.

#![allow(clippy::print_stdout, reason = "reports and traces are printed")]
#![allow(clippy::wildcard_enum_match_arm, reason = "an oracle looks at what it knows")]
#![allow(clippy::wrong_self_convention, reason = "the names of the driver's own functions")]

/// Whether a bug of the simulation's own driver is switched on: see `src/mutants.rs`.
#[cfg(feature = "mutants")]
macro_rules! known_bug {
    ($name:ident) => {
        metcd::mutants::is_on(metcd::mutants::Mutant::$name)
    };
}
#[cfg(not(feature = "mutants"))]
macro_rules! known_bug {
    ($name:ident) => {
        false
    };
}

mod admin;
mod calls;
mod clients;
#[path = "../common/mod.rs"]
mod common;
mod faults;
mod machine;
mod network;
mod node;
mod oracle;
mod plan;
mod report;
mod rng;
mod run;
mod stats;
mod trace;
mod watching;
mod world;

use plan::Settings;
use run::run;

/// As in the program: a third of the time would go into the system's allocator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What CI runs: always the same seeds.
const CI_SEEDS: u64 = 200;

#[test]
fn the_same_seed_has_the_same_history() {
    for seed in [3, 17] {
        let first = run(Settings::new(seed));
        let second = run(Settings::new(seed));
        assert_eq!(first.trace_hash, second.trace_hash, "seed {seed}");
        assert_eq!(first.stats.events, second.stats.events, "seed {seed}");
    }
}

#[test]
fn nothing_promised_is_broken_whatever_fails() {
    let stats = report::explore(0, CI_SEEDS, report::Asked::default());
    // Nor is it because nothing failed, or nothing was looked at.
    for kind in plan::FAULT_KINDS {
        assert!(stats.faults.get(&kind).is_some_and(|&count| count > 0), "{kind:?} never struck");
    }
    let looked_at = [
        ("operations checked for linearizability", stats.checked),
        ("revisions watched", stats.watched),
        ("leases renewed", stats.renewals),
        ("leases ended", stats.expired),
        ("snapshots installed", stats.installs),
        ("members removed", stats.removed),
        ("states compared", stats.compared),
    ];
    for (what, count) in looked_at {
        assert!(count > 0, "no {what}");
    }
}

/// Seeds that once failed (README.md says how).
#[test]
fn what_was_mended_stays_so() {
    for seed in [2551, 14957, 22690] {
        report::explore(seed, 1, report::Asked::default());
    }
}

/// For `scripts/simulate`.
#[test]
#[ignore = "run by scripts/simulate"]
fn explore() {
    let asked = report::Asked::from_environment();
    report::explore(asked.from, asked.seeds, asked);
}

/// Every known bug that is put back in is found.
#[cfg(feature = "mutants")]
#[test]
#[ignore = "run by scripts/simulate --mutants"]
fn mutants_are_found() {
    report::find_mutants(400);
}
