//! ARCHITECTURE.md promises tests by name: they must exist. What the program relies on in its own build must be there, and a release has no known bugs.

use std::path::Path;
use std::process::Command;

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

/// Compiles `src/mutants.rs`, which needs nothing else, with the feature and without; what the compiler complains of, or nothing.
fn compile_mutants(options: &[&str]) -> Option<String> {
    let directory = tempfile::tempdir().expect("a directory");
    let output = Command::new(Path::new(env!("CARGO")).with_file_name("rustc"))
        .args([
            "--edition",
            "2024",
            "--crate-type",
            "lib",
            "--emit",
            "metadata",
            "--cap-lints",
            "allow",
        ])
        .args(options)
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/mutants.rs"))
        .arg("-o")
        .arg(directory.path().join("mutants.rmeta"))
        .output()
        .expect("the compiler");
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    (!output.status.success()).then_some(complaint)
}

#[test]
fn a_release_cannot_contain_the_known_bugs() {
    let with_bugs = r#"feature="mutants""#;
    let complaint = compile_mutants(&["-O", "--cfg", with_bugs]).expect("an optimised build without assertions refuses them");
    assert!(complaint.contains("never for a release build"), "{complaint}");
    // It is that which is refused, and not the file.
    assert_eq!(compile_mutants(&["-O"]), None);
    assert_eq!(compile_mutants(&["-O", "-C", "debug-assertions=on", "--cfg", with_bugs]), None);

    // The refusal is part of every build of the library, a release has no assertions, and nothing asks for the feature unasked.
    let lib = include_str!("../src/lib.rs");
    assert!(lib.contains("\n#[macro_use]\npub mod mutants;\n"));
    let manifest: toml::Table = include_str!("../Cargo.toml").parse().expect("a manifest");
    assert!(manifest["profile"]["release"].get("debug-assertions").is_none());
    for (feature, needs) in manifest["features"].as_table().expect("features") {
        let needs = needs.as_array().expect("a list");
        assert!(
            needs.iter().all(|need| need.as_str() != Some("mutants")),
            "{feature} asks for the known bugs"
        );
    }
}
