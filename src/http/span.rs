//! Ranges of keys in requests: a prefix, or `start`..`end`.

use super::error::ApiError;
use super::json::invalid;
use super::params::Params;
use super::route::check_key_size;
use crate::state::command::KeySpan;

/// `?prefix=` or `?start=&end=` (either may be absent); `None` if there is none of them.
pub(super) fn from_params(params: &mut Params) -> Result<Option<KeySpan>, ApiError> {
    let (prefix, start, end) = (params.bytes("prefix"), params.bytes("start"), params.bytes("end"));
    from_bounds(prefix, start, end)
}

/// The same from any source. An empty prefix is everything; `start` alone reaches to the last key, `end` alone from the first.
pub(super) fn from_bounds(prefix: Option<Vec<u8>>, start: Option<Vec<u8>>, end: Option<Vec<u8>>) -> Result<Option<KeySpan>, ApiError> {
    for bound in [&prefix, &start].into_iter().flatten() {
        check_key_size(bound)?;
    }
    if let Some(end) = &end {
        // What comes next after the longest key has one byte more.
        check_key_size(end.strip_suffix(b"\0").unwrap_or(end))?;
    }
    match (prefix, start, end) {
        (None, None, None) => Ok(None),
        (Some(prefix), None, None) => Ok(Some(KeySpan::prefix(&prefix))),
        (Some(_), _, _) => Err(invalid("`prefix` and `start` or `end` exclude each other".to_owned())),
        // Most likely a variable that was not set, and no key lies before the empty one.
        (None, _, Some(end)) if end.is_empty() => Err(invalid("`end` is empty; leave it out to reach to the last key".to_owned())),
        (None, start, end) => Ok(Some(KeySpan {
            start: start.unwrap_or_default().into(),
            end: end.map(Into::into),
        })),
    }
}

/// What is to be deleted may be everything only if that is said: an empty `start` is most likely a variable that was not set.
pub(super) fn refuse_bare_start(start: Option<&[u8]>, end: Option<&[u8]>) -> Result<(), ApiError> {
    match (start, end) {
        (Some(b""), None) => Err(invalid(
            "`start` is empty, which would delete everything; say so with an empty `prefix`".to_owned(),
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(query: &str) -> Result<Option<KeySpan>, ApiError> {
        from_params(&mut Params::parse(Some(query)).unwrap())
    }

    #[test]
    fn prefixes_and_ranges_with_either_end_open() {
        assert_eq!(span("").unwrap(), None);
        assert_eq!(
            span("prefix=").unwrap(),
            Some(KeySpan {
                start: "".into(),
                end: None
            })
        );
        assert_eq!(
            span("prefix=a/").unwrap(),
            Some(KeySpan {
                start: "a/".into(),
                end: Some("a0".into())
            })
        );
        assert_eq!(
            span("start=b").unwrap(),
            Some(KeySpan {
                start: "b".into(),
                end: None
            })
        );
        assert_eq!(
            span("end=b").unwrap(),
            Some(KeySpan {
                start: "".into(),
                end: Some("b".into())
            })
        );
        assert_eq!(
            span("start=a&end=b").unwrap(),
            Some(KeySpan {
                start: "a".into(),
                end: Some("b".into())
            })
        );
    }

    #[test]
    fn a_prefix_excludes_a_range_and_an_empty_end_is_a_mistake() {
        for query in ["prefix=a&start=b", "prefix=a&end=b", "start=a&end="] {
            assert_eq!(span(query).unwrap_err().problem.code(), "invalid_request", "{query}");
        }
        let longest = "x".repeat(4096);
        for query in [format!("prefix={longest}x"), format!("start={longest}x"), format!("end={longest}x")] {
            assert_eq!(span(&query).unwrap_err().problem.code(), "key_too_large", "{query}");
        }
        assert!(
            span(&format!("start={longest}&end={longest}%00")).is_ok(),
            "the range of the longest key alone"
        );
    }
}
