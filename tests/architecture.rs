//! ARCHITECTURE.md promises tests by name: they must exist. And what the program relies on in its own build must be there.

use std::path::Path;

const TEXT: &str = include_str!("../ARCHITECTURE.md");

/// The rows of the table of rules: number, proofs as (file, function).
fn rules() -> Vec<(u32, Vec<(&'static str, &'static str)>)> {
    let row = |line: &'static str| {
        let mut cells = line.strip_prefix("| ")?.splitn(3, " | ");
        let number = cells.next()?.parse().ok()?;
        let proofs = cells.nth(1)?.split('`').filter_map(|quoted| quoted.split_once("::")).collect();
        Some((number, proofs))
    };
    TEXT.lines().filter_map(row).collect()
}

#[test]
fn there_are_thirty_rules_in_order() {
    let numbers: Vec<u32> = rules().into_iter().map(|(number, _)| number).collect();
    assert_eq!(numbers, (1..=30).collect::<Vec<_>>());
}

#[test]
fn every_test_that_is_named_as_a_proof_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (number, proofs) in rules() {
        for (file, function) in proofs {
            let text = std::fs::read_to_string(root.join(file)).unwrap_or_else(|e| panic!("rule {number}: {file}: {e}"));
            assert!(
                text.contains(&format!("fn {function}(")),
                "rule {number}: {file} has no test {function}"
            );
        }
    }
}

/// A panic in one thread leaves the others with what it was at half done: raft-rs and the engines panic where nothing may go on (rule 5).
#[test]
fn a_panic_ends_the_program_that_is_shipped() {
    let manifest = include_str!("../Cargo.toml").parse::<toml::Table>().unwrap();
    let profiles = manifest["profile"].as_table().unwrap();
    assert_eq!(profiles["release"]["panic"].as_str(), Some("abort"));
    for (name, profile) in profiles.iter().filter(|(name, _)| *name != "release") {
        let inherits_it = profile.get("inherits").is_some_and(|of| of.as_str() == Some("release"));
        assert!(!inherits_it || profile.get("panic").is_none(), "profile {name} takes it back");
    }
}
