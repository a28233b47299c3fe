//! Why a configuration is refused.

use std::fmt;

/// One thing that is wrong, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// `node1.toml:12`, `METCD__RAFT__TICK`, `--listen-client`, or a key for what concerns several.
    pub origin: String,
    /// What is wrong and what would be right.
    pub message: String,
    /// It is well written, and refused all the same: what it asks for is not possible, or does not fit the rest.
    pub is_refusal: bool,
}

impl Problem {
    /// Something that cannot be read.
    pub(super) fn new(origin: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            origin: origin.into(),
            message: message.into(),
            is_refusal: false,
        }
    }

    /// Not in the environment or on the command line, which `metcd config check` does not see.
    fn is_in_a_file(&self) -> bool {
        !self.origin.starts_with("METCD_") && !self.origin.starts_with("--")
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.origin, self.message)
    }
}

/// Everything that is wrong with a configuration, at least one problem. Displayed in one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// The problems, by layer, then by place.
    pub problems: Vec<Problem>,
}

impl ConfigError {
    /// One problem.
    pub(super) fn one(origin: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            problems: vec![Problem::new(origin, message)],
        }
    }

    /// The same, as a refusal of what is well written.
    pub(super) fn refusing(mut self) -> Self {
        self.problems.iter_mut().for_each(|problem| problem.is_refusal = true);
        self
    }

    /// Whether all of it is wrong usage of the command line, rather than a configuration that is refused: a flag that cannot be read.
    /// `--set` is configuration, as a line of a file is.
    pub fn is_usage(&self) -> bool {
        self.problems
            .iter()
            .all(|problem| problem.origin.starts_with("--") && !problem.origin.starts_with("--set") && !problem.is_refusal)
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(first) = self.problems.first() else {
            return f.write_str("no problem");
        };
        write!(f, "{first}")?;
        match self.problems.len() {
            1 => Ok(()),
            n if self.problems.iter().all(Problem::is_in_a_file) => write!(f, " (and {} more: see `metcd config check`)", n - 1),
            n => write!(f, " (and {} more)", n - 1),
        }
    }
}

impl std::error::Error for ConfigError {}
