//! `Accept`: which of the offered forms the client likes best.

use http::header::{ACCEPT, HeaderMap};

/// A media type that a route can answer with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// `application/octet-stream`
    Raw,
    /// `application/json`
    Json,
    /// `application/x-ndjson`
    Ndjson,
    /// `text/event-stream`
    EventStream,
}

impl Form {
    fn name(self) -> (&'static str, &'static str) {
        match self {
            Form::Raw => ("application", "octet-stream"),
            Form::Json => ("application", "json"),
            Form::Ndjson => ("application", "x-ndjson"),
            Form::EventStream => ("text", "event-stream"),
        }
    }
}

/// How well a form suits: quality in thousandths, then how precisely it was named, then how early. Larger is better.
type Rank = (u16, u8, std::cmp::Reverse<usize>);

/// The better of two forms. The default also answers clients that accept neither, which is kinder than a 406, and wins between
/// equals (wildcards). A type named in full beats a wildcard of the same quality, so `application/json, */*` is JSON.
pub(super) fn negotiate(headers: &HeaderMap, default: Form, other: Form) -> Form {
    if !headers.contains_key(ACCEPT) {
        return default;
    }
    match (rank(headers, default), rank(headers, other)) {
        (_, None | Some((0, ..))) => default,
        (None, Some(_)) => other,
        (Some(default_rank), Some(other_rank)) if other_rank > default_rank => other,
        _ => default,
    }
}

/// The rank by the most precise range that matches; `None` if nothing matches.
fn rank(headers: &HeaderMap, form: Form) -> Option<Rank> {
    let lines = headers.get_all(ACCEPT).iter().filter_map(|line| line.to_str().ok());
    let ranges = lines.flat_map(|line| line.split(',')).enumerate();
    let matching = ranges.filter_map(|(at, range)| {
        let mut parts = range.split(';').map(str::trim);
        let (kind, sub) = parts.next()?.split_once('/')?;
        let precision = precision(form, kind, sub)?;
        let quality = parts
            .find_map(|part| part.strip_prefix("q=").or(part.strip_prefix("Q=")))
            .map_or(1000, quality);
        Some((precision, std::cmp::Reverse(at), quality))
    });
    matching
        .max()
        .map(|(precision, at, quality)| (quality, precision, if precision == 2 { at } else { std::cmp::Reverse(usize::MAX) }))
}

fn precision(form: Form, kind: &str, sub: &str) -> Option<u8> {
    let (own_kind, own_sub) = form.name();
    match (kind, sub) {
        ("*", "*") => Some(0),
        (kind, "*") if kind.eq_ignore_ascii_case(own_kind) => Some(1),
        (kind, sub) if kind.eq_ignore_ascii_case(own_kind) && sub.eq_ignore_ascii_case(own_sub) => Some(2),
        _ => None,
    }
}

/// Thousandths; what is not a number counts as 1.
fn quality(text: &str) -> u16 {
    let value = text.trim().parse::<f32>().ok().filter(|value| value.is_finite()).unwrap_or(1.0);
    (value.clamp(0.0, 1.0) * 1000.0) as u16
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn pick(accept: &'static str, default: Form, other: Form) -> Form {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, HeaderValue::from_static(accept));
        negotiate(&headers, default, other)
    }

    #[test]
    fn a_key_is_raw_unless_json_is_named() {
        assert_eq!(negotiate(&HeaderMap::new(), Form::Raw, Form::Json), Form::Raw);
        for (accept, expected) in [
            ("*/*", Form::Raw),
            ("application/*", Form::Raw),
            ("application/json", Form::Json),
            ("Application/JSON; charset=utf-8", Form::Json),
            ("application/json, text/plain, */*", Form::Json),
            ("application/json;q=0.5, */*", Form::Raw),
            ("application/json;q=0, */*", Form::Raw),
            ("application/octet-stream, application/json", Form::Raw),
            ("application/json, application/octet-stream", Form::Json),
            ("application/octet-stream;q=0.1, application/json;q=0.2", Form::Json),
            ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", Form::Raw),
            ("text/html", Form::Raw),
            ("garbage;;q=x,/,", Form::Raw),
            ("", Form::Raw),
        ] {
            assert_eq!(pick(accept, Form::Raw, Form::Json), expected, "{accept:?}");
        }
    }

    #[test]
    fn a_list_streams_only_when_ndjson_is_named() {
        assert_eq!(pick("application/x-ndjson", Form::Json, Form::Ndjson), Form::Ndjson);
        assert_eq!(pick("*/*", Form::Json, Form::Ndjson), Form::Json);
        assert_eq!(pick("application/json, application/x-ndjson", Form::Json, Form::Ndjson), Form::Json);
    }
}
