//! `If-Match` and `If-None-Match`: lists of entity tags, over one header line or several.

use http::header::{HeaderMap, HeaderName, IF_MATCH, IF_NONE_MATCH};

use super::error::{ApiError, Problem};
use super::params::decimal;
use crate::state::command::Conditions;
use crate::state::outcome::KeyValue;

/// The tags of one condition header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Tags {
    /// `*`
    Any,
    /// A list. Tags that this server never makes are left out: they match nothing.
    List(Vec<Tag>),
}

/// A tag that names a revision, in either form (`"7"`, `"7-json"`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tag {
    /// The mod_revision.
    pub(super) revision: u64,
    /// `W/"7"`: never matches `If-Match`.
    pub(super) weak: bool,
}

impl Tags {
    /// `If-Match` on a key that exists.
    pub(super) fn matches_strongly(&self, mod_revision: u64) -> bool {
        match self {
            Tags::Any => true,
            Tags::List(tags) => tags.iter().any(|tag| tag.revision == mod_revision && !tag.weak),
        }
    }

    /// `If-None-Match` on a key that exists.
    pub(super) fn matches_weakly(&self, mod_revision: u64) -> bool {
        match self {
            Tags::Any => true,
            Tags::List(tags) => tags.iter().any(|tag| tag.revision == mod_revision),
        }
    }
}

/// Both headers of a request.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct ConditionHeaders {
    /// `If-Match`
    pub(super) if_match: Option<Tags>,
    /// `If-None-Match`
    pub(super) if_none_match: Option<Tags>,
}

impl ConditionHeaders {
    /// Parses them; what is neither `*` nor a list of quoted tags is refused.
    pub(super) fn parse(headers: &HeaderMap) -> Result<ConditionHeaders, ApiError> {
        Ok(ConditionHeaders {
            if_match: parse_header(headers, &IF_MATCH)?,
            if_none_match: parse_header(headers, &IF_NONE_MATCH)?,
        })
    }

    /// `If-Match` of a GET. A key that does not exist is not found, whatever the condition (RFC 9110, section 13.2.1).
    pub(super) fn if_match_holds(&self, kv: Option<&KeyValue>) -> bool {
        match (&self.if_match, kv) {
            (Some(tags), Some(kv)) => tags.matches_strongly(kv.mod_revision),
            (Some(_), None) | (None, _) => true,
        }
    }

    /// As a command carries them, sorted; `None` if there are none.
    pub(super) fn into_command(self) -> Option<Conditions> {
        let mut conditions = Conditions::default();
        match self.if_match {
            None => {}
            Some(Tags::Any) => conditions.if_match_any = true,
            Some(Tags::List(tags)) => {
                conditions.if_match = sorted(tags.into_iter().filter(|tag| !tag.weak));
                conditions.if_match_never = conditions.if_match.is_empty();
            }
        }
        match self.if_none_match {
            None => {}
            Some(Tags::Any) => conditions.if_none_match_any = true,
            Some(Tags::List(tags)) => conditions.if_none_match = sorted(tags.into_iter()),
        }
        (conditions != Conditions::default()).then_some(conditions)
    }
}

fn sorted(tags: impl Iterator<Item = Tag>) -> Vec<u64> {
    let mut revisions: Vec<u64> = tags.map(|tag| tag.revision).collect();
    revisions.sort_unstable();
    revisions.dedup();
    revisions
}

fn parse_header(headers: &HeaderMap, name: &HeaderName) -> Result<Option<Tags>, ApiError> {
    let mut lines = headers.get_all(name).iter().peekable();
    if lines.peek().is_none() {
        return Ok(None);
    }
    let mut any = false;
    let mut members = 0;
    let mut tags = Vec::new();
    for line in lines {
        let mut rest = line.as_bytes().trim_ascii();
        while !rest.is_empty() {
            if let Some(after) = rest.strip_prefix(b",") {
                rest = after.trim_ascii_start();
                continue;
            }
            members += 1;
            let after;
            if let Some(tail) = rest.strip_prefix(b"*") {
                any = true;
                after = tail;
            } else {
                let (tag, tail) = parse_tag(rest).ok_or_else(|| malformed(name))?;
                tags.extend(tag);
                after = tail;
            }
            rest = after.trim_ascii_start();
            if !rest.is_empty() && !rest.starts_with(b",") {
                return Err(malformed(name));
            }
        }
    }
    match (any, members) {
        (_, 0) => Err(malformed(name)),
        (true, 1) => Ok(Some(Tags::Any)),
        (true, _) => Err(malformed(name)),
        (false, _) => Ok(Some(Tags::List(tags))),
    }
}

/// One `[W/]"..."` at the front, and the rest. The tag is `None` if it is not one of ours.
fn parse_tag(text: &[u8]) -> Option<(Option<Tag>, &[u8])> {
    let (weak, quoted) = match text.strip_prefix(b"W/") {
        Some(quoted) => (true, quoted),
        None => (false, text),
    };
    let inner = quoted.strip_prefix(b"\"")?;
    let end = inner.iter().position(|&byte| byte == b'"')?;
    let (opaque, rest) = (&inner[..end], &inner[end + 1..]);
    if opaque.iter().any(|&byte| byte <= b' ' || byte == 0x7f) {
        return None;
    }
    Some((revision_of(opaque).map(|revision| Tag { revision, weak }), rest))
}

/// `7` or `7-json`, written as this server writes them.
fn revision_of(opaque: &[u8]) -> Option<u64> {
    let digits = opaque.strip_suffix(b"-json").unwrap_or(opaque);
    if digits.starts_with(b"0") {
        return None;
    }
    decimal(digits)
}

fn malformed(name: &HeaderName) -> ApiError {
    let name = if name == IF_MATCH { "If-Match" } else { "If-None-Match" };
    Problem::InvalidRequest(format!("`{name}` must be `*` or a list of quoted tags such as `\"7\"`")).into()
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn parse(lines: &[&'static str]) -> Result<Option<Tags>, ApiError> {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(IF_MATCH, HeaderValue::from_static(line));
        }
        parse_header(&headers, &IF_MATCH)
    }

    fn list(revisions: &[(u64, bool)]) -> Option<Tags> {
        Some(Tags::List(
            revisions.iter().map(|&(revision, weak)| Tag { revision, weak }).collect(),
        ))
    }

    #[test]
    fn lists_lines_both_forms_and_weak_tags() {
        assert_eq!(parse(&[]).unwrap(), None);
        assert_eq!(parse(&["*"]).unwrap(), Some(Tags::Any));
        assert_eq!(
            parse(&["\"7\", \"8-json\",W/\"9\""]).unwrap(),
            list(&[(7, false), (8, false), (9, true)])
        );
        assert_eq!(parse(&["\"7\"", " \"8\" ,"]).unwrap(), list(&[(7, false), (8, false)]));
    }

    #[test]
    fn foreign_tags_match_nothing() {
        assert_eq!(parse(&["\"abc\", \"07\", \"7,8\", \"\""]).unwrap(), list(&[]));
    }

    #[test]
    fn garbage_is_refused() {
        for bad in ["7", "", ",", "\"7", "*, \"7\"", "\"7\" \"8\"", "w/\"7\"", "\"7 8\"", "* *", "'7'"] {
            let mut headers = HeaderMap::new();
            headers.append(IF_MATCH, HeaderValue::from_static(bad));
            assert!(parse_header(&headers, &IF_MATCH).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_weak_tag_never_matches_if_match_but_does_match_if_none_match() {
        let weak = Tags::List(vec![Tag { revision: 7, weak: true }]);
        assert!(!weak.matches_strongly(7));
        assert!(weak.matches_weakly(7));
        let conditions = ConditionHeaders {
            if_match: Some(weak.clone()),
            if_none_match: Some(weak),
        }
        .into_command()
        .unwrap();
        assert!(conditions.if_match_never && conditions.if_match.is_empty());
        assert_eq!(conditions.if_none_match, [7]);
    }

    #[test]
    fn no_header_is_no_condition() {
        assert_eq!(ConditionHeaders::default().into_command(), None);
    }
}
