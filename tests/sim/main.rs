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

use std::os::unix::fs::PermissionsExt as _;

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
    let stats = report::explore(0, CI_SEEDS, &report::Asked::default());
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
        ("retries on another member", stats.retries_elsewhere),
        ("retries in a later term", stats.retries_in_later_terms),
    ];
    for (what, count) in looked_at {
        assert!(count > 0, "no {what}");
    }
    for kind in ["put", "conditional write", "delete", "transaction", "grant"] {
        assert!(
            stats.replays.contains_key(kind),
            "no {kind} was answered with what an earlier try came to"
        );
    }
    assert_eq!(stats.given_up, 0, "keys of whose operations nothing is known");
}

/// What `scripts/simulate` makes of a command that was printed, without running it.
fn understood(command: &str) -> Settings {
    let (script, options) = command.split_once(' ').unwrap();
    let bin = tempfile::tempdir().unwrap();
    // In the place of cargo: shows what it was told.
    let cargo = bin.path().join("cargo");
    std::fs::write(&cargo, "#!/bin/sh\nexec env\n").unwrap();
    std::fs::set_permissions(&cargo, std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", bin.path().display(), std::env::var("PATH").unwrap());
    let output = std::process::Command::new("sh")
        .arg(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(script))
        .args(options.split(' '))
        .env("PATH", path)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let variable = |wanted: &str| {
        let mut pairs = text.lines().filter_map(|line| line.split_once('='));
        pairs.find(|(name, _)| *name == wanted).map(|(_, value)| value.to_owned())
    };
    let asked = report::Asked::from(&variable);
    assert_eq!(asked.seeds, 1, "{command}: {text}");
    asked.settings(asked.from)
}

#[test]
fn a_command_that_is_printed_means_what_it_says() {
    let whole = Settings {
        trace: true,
        ..Settings::new(8)
    };
    assert_eq!(understood(&report::command(&whole)), whole);
    let smaller = Settings {
        without: vec![plan::FaultKind::Loss, plan::FaultKind::ClockJump],
        faults_until: 16 * plan::SECOND,
        ..whole
    };
    assert_eq!(understood(&report::command(&smaller)), smaller);
}

/// With a known bug put back in: what is printed after a failure, shrunk as it is, fails in the same way.
#[cfg(feature = "mutants")]
#[test]
fn a_failure_is_repeated_by_the_command_that_is_printed() {
    use metcd::mutants::Mutant;
    for mutant in [Mutant::ApplyTwice, Mutant::OldOffer, Mutant::ShortLeases] {
        let failed = (0..400).find_map(|seed| {
            let settings = Settings {
                mutant: Some(mutant),
                ..Settings::new(seed)
            };
            run(settings.clone()).violation.map(|what| (settings, what))
        });
        let (settings, what) = failed.unwrap();
        let (smaller, what) = report::shrink(&settings, &what);
        assert!(smaller.without.len() > 1, "{mutant:?} needs few kinds of fault: {smaller:?}");
        let told = Settings {
            trace: false,
            ..understood(&report::command(&smaller))
        };
        assert_eq!(run(told).violation, Some(what), "{mutant:?}");
    }
}

/// For `scripts/simulate`.
#[test]
#[ignore = "run by scripts/simulate"]
fn explore() {
    let asked = report::Asked::from_environment();
    report::explore(asked.from, asked.seeds, &asked);
}

/// Every known bug that is put back in is found.
#[cfg(feature = "mutants")]
#[test]
#[ignore = "run by scripts/simulate --mutants"]
fn mutants_are_found() {
    report::find_mutants(400);
}
