//! Why a configuration is refused.

use std::fmt;

/// One thing that is wrong, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// `node1.toml:12`, `METCD__RAFT__TICK`, `--listen-client`, or a key for what concerns several.
    pub origin: String,
    /// What is wrong and what would be right.
    pub message: String,
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
            problems: vec![Problem {
                origin: origin.into(),
                message: message.into(),
            }],
        }
    }

    /// Whether all of it is the command line's fault: wrong usage rather than a wrong file.
    pub fn is_usage(&self) -> bool {
        self.problems.iter().all(|problem| problem.origin.starts_with("--"))
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
            n => write!(f, " (and {} more: see `metcd config check`)", n - 1),
        }
    }
}

impl std::error::Error for ConfigError {}
