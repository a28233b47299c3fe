//! What can go wrong, and whether a change may have happened all the same.

use std::time::Duration;

use http::{HeaderMap, StatusCode, header};
use serde::Deserialize;

/// What is known about a mutation that failed. A read has no effect: it is always `NotApplied`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It is not applied and never will be: asking again is safe.
    NotApplied,
    /// It may be applied, now or later.
    Unknown,
}

/// Why a request did not succeed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ClientError {
    /// The request cannot be made as asked; nothing was sent.
    #[error("{0}")]
    Invalid(String),
    /// No endpoint could be connected to; nothing was sent. One reason for each endpoint tried.
    #[error("no endpoint answers ({0}): is the server running? Name others with --endpoints")]
    Unreachable(String),
    /// The connection broke before the answer was complete.
    #[error("the connection to {endpoint} was lost: {cause}{}", doubt(*.outcome))]
    Lost {
        /// The endpoint.
        endpoint: String,
        /// What the transport says.
        cause: String,
        /// Whether the change may have happened.
        outcome: Outcome,
    },
    /// The deadline passed.
    #[error("no answer within {}{}", seconds(*.timeout), more_time(*.outcome))]
    Deadline {
        /// How long was waited.
        timeout: Duration,
        /// Whether the change may have happened.
        outcome: Outcome,
    },
    /// The server refused.
    #[error("{0}")]
    Refused(Box<Problem>),
    /// The answer is not what the HTTP contract says.
    #[error("unexpected answer: {0}")]
    Protocol(String),
}

fn doubt(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::NotApplied => "",
        Outcome::Unknown => "; the change may or may not have been made, so look before asking again",
    }
}

fn more_time(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::NotApplied => ": is there a quorum (`metcd status`)? --timeout allows more",
        Outcome::Unknown => doubt(outcome),
    }
}

fn seconds(timeout: Duration) -> String {
    format!("{} s", timeout.as_secs_f64())
}

impl ClientError {
    /// Whether the change may have happened.
    #[must_use]
    pub fn outcome(&self) -> Outcome {
        match self {
            Self::Invalid(_) | Self::Unreachable(_) => Outcome::NotApplied,
            Self::Lost { outcome, .. } | Self::Deadline { outcome, .. } => *outcome,
            Self::Refused(problem) => problem.outcome.unwrap_or(Outcome::NotApplied),
            Self::Protocol(_) => Outcome::Unknown,
        }
    }

    /// The server's stable `code`, if it is the server that refused.
    #[must_use]
    pub fn code(&self) -> Option<&str> {
        self.problem().map(|problem| problem.code.as_str())
    }

    /// The server's refusal.
    #[must_use]
    pub fn problem(&self) -> Option<&Problem> {
        match self {
            Self::Refused(problem) => Some(problem),
            Self::Invalid(_) | Self::Unreachable(_) | Self::Lost { .. } | Self::Deadline { .. } | Self::Protocol(_) => None,
        }
    }

    /// Something asked for is not there, or a condition does not hold: an answer rather than a failure.
    #[must_use]
    pub fn is_not_met(&self) -> bool {
        let status = self.problem().map(|problem| problem.status);
        matches!(status, Some(404 | 412)) && self.code() != Some("unknown_route")
    }

    /// Says that an earlier attempt may have been applied.
    pub(super) fn unsettle(mut self) -> ClientError {
        match &mut self {
            Self::Lost { outcome, .. } | Self::Deadline { outcome, .. } => *outcome = Outcome::Unknown,
            Self::Refused(problem) if !decided_at_apply(problem.status) => problem.outcome = Some(Outcome::Unknown),
            Self::Unreachable(endpoints) => {
                return Self::Lost {
                    endpoint: "every endpoint".to_owned(),
                    cause: std::mem::take(endpoints),
                    outcome: Outcome::Unknown,
                };
            }
            Self::Refused(_) | Self::Invalid(_) | Self::Protocol(_) => {}
        }
        self
    }
}

/// Such a refusal is recorded under the idempotency key: it is the answer to every attempt.
fn decided_at_apply(status: u16) -> bool {
    matches!(status, 404 | 412)
}

/// A refusal as the server words it (RFC 9457).
#[derive(Debug, Clone, PartialEq, Deserialize, thiserror::Error)]
#[error("{detail} ({code}){}", doubt(.outcome.unwrap_or(Outcome::NotApplied)))]
pub struct Problem {
    /// The HTTP status.
    pub status: u16,
    /// Stable; listed in the HTTP contract.
    pub code: String,
    /// A sentence for people.
    #[serde(default)]
    pub detail: String,
    /// Given on mutations.
    pub outcome: Option<Outcome>,
    /// History before it is gone; given with `compacted`.
    pub compacted_revision: Option<u64>,
    /// The key's revision; given with `precondition_failed` if the key exists.
    #[serde(skip)]
    pub current_revision: Option<u64>,
}

impl Problem {
    /// Reads a refusal; a body that is none (a proxy's, say) becomes one with the code `http`.
    pub(super) fn read(status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Problem {
        let mut problem = serde_json::from_slice(body).unwrap_or_else(|_| Problem {
            status: status.as_u16(),
            code: "http".to_owned(),
            detail: format!("the answer is {status}, and not one of metcd's"),
            outcome: None,
            compacted_revision: None,
            current_revision: None,
        });
        problem.current_revision = headers.get(header::ETAG).and_then(|tag| revision_of_tag(tag.as_bytes()));
        problem
    }
}

/// The revision in `"7"` or `"7-json"`.
pub(super) fn revision_of_tag(tag: &[u8]) -> Option<u64> {
    let digits = std::str::from_utf8(tag).ok()?.strip_prefix('"')?.strip_suffix('"')?;
    digits.strip_suffix("-json").unwrap_or(digits).parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(status: u16, code: &str, outcome: Option<Outcome>) -> ClientError {
        let body = serde_json::json!({"status": status, "code": code, "detail": "d"});
        let mut problem = Problem::read(
            StatusCode::from_u16(status).unwrap(),
            &HeaderMap::new(),
            body.to_string().as_bytes(),
        );
        problem.outcome = outcome;
        ClientError::Refused(Box::new(problem))
    }

    #[test]
    fn an_earlier_attempt_in_doubt_makes_every_refusal_but_a_recorded_one_unknown() {
        for (error, outcome) in [
            (refused(507, "quota_exceeded", Some(Outcome::NotApplied)), Outcome::Unknown),
            (refused(503, "no_leader", Some(Outcome::NotApplied)), Outcome::Unknown),
            (ClientError::Unreachable("x".to_owned()), Outcome::Unknown),
            (refused(412, "precondition_failed", Some(Outcome::NotApplied)), Outcome::NotApplied),
            (refused(404, "not_found", Some(Outcome::NotApplied)), Outcome::NotApplied),
        ] {
            assert_eq!(error.clone().unsettle().outcome(), outcome, "{error:?}");
        }
    }

    #[test]
    fn not_found_and_a_failed_condition_are_answers() {
        assert!(refused(404, "not_found", None).is_not_met());
        assert!(refused(412, "precondition_failed", None).is_not_met());
        assert!(!refused(404, "unknown_route", None).is_not_met());
        assert!(!refused(409, "member_exists", None).is_not_met());
    }

    #[test]
    fn a_body_that_is_no_problem_is_still_a_refusal() {
        let problem = Problem::read(StatusCode::BAD_GATEWAY, &HeaderMap::new(), b"<html>");
        assert_eq!((problem.status, problem.code.as_str()), (502, "http"));
    }

    #[test]
    fn tags_hold_revisions_in_both_forms() {
        assert_eq!(revision_of_tag(b"\"7\""), Some(7));
        assert_eq!(revision_of_tag(b"\"7-json\""), Some(7));
        assert_eq!(revision_of_tag(b"W/\"7\""), None);
    }
}
