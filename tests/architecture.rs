//! ARCHITECTURE.md promises tests by name: they must exist.

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
