//! Query parameters: bytes, decoded once, each at most once, and none that the route does not know.

use std::time::Duration;

use super::error::{ApiError, Problem};
use super::percent;
use crate::config::units::read_duration;

/// The parameters of one request. A handler takes the ones it knows and calls [`finish`](Self::finish) before it has any effect.
#[derive(Debug, Default)]
pub(super) struct Params {
    pairs: Vec<Pair>,
    /// What the handler asked for: offered when a name is mistyped.
    known: Vec<&'static str>,
}

#[derive(Debug)]
struct Pair {
    name: Vec<u8>,
    value: Vec<u8>,
    /// Its name stands alone, without `=`.
    bare: bool,
    taken: bool,
}

impl Params {
    /// Splits and decodes a query string.
    pub(super) fn parse(query: Option<&str>) -> Result<Params, ApiError> {
        let mut pairs: Vec<Pair> = Vec::new();
        for part in query.unwrap_or_default().split('&').filter(|part| !part.is_empty()) {
            let (name, value, bare) = part.split_once('=').map_or((part, "", true), |(name, value)| (name, value, false));
            let name = decode(name, "a parameter's name", Problem::InvalidRequest)?;
            // Keys are keys wherever they stand in a URL.
            let broken = match &name[..] {
                b"key" | b"prefix" | b"start" | b"end" => Problem::InvalidKey,
                _ => Problem::InvalidRequest,
            };
            let value = decode(value, &shown(&name), broken)?;
            if pairs.iter().any(|pair| pair.name == name) {
                return Err(invalid(format!("the parameter `{}` is given twice", shown(&name))));
            }
            pairs.push(Pair {
                name,
                value,
                bare,
                taken: false,
            });
        }
        Ok(Params { pairs, known: Vec::new() })
    }

    /// The bytes of a parameter.
    pub(super) fn bytes(&mut self, name: &'static str) -> Option<Vec<u8>> {
        if self.pairs.is_empty() {
            return None;
        }
        if !self.known.contains(&name) {
            self.known.push(name);
        }
        let pair = self.pairs.iter_mut().find(|pair| pair.name == name.as_bytes())?;
        pair.taken = true;
        Some(pair.value.clone())
    }

    /// Whether a parameter is given by its name alone.
    pub(super) fn is_bare(&self, name: &str) -> bool {
        self.pairs.iter().any(|pair| pair.bare && pair.name == name.as_bytes())
    }

    /// A parameter that is text.
    pub(super) fn text(&mut self, name: &'static str) -> Result<Option<String>, ApiError> {
        let Some(value) = self.bytes(name) else { return Ok(None) };
        String::from_utf8(value)
            .map(Some)
            .map_err(|_| invalid(format!("`{name}` is not UTF-8")))
    }

    /// A switch: `true` or `false`; the bare name means `true`.
    pub(super) fn flag(&mut self, name: &'static str) -> Result<bool, ApiError> {
        match self.bytes(name).as_deref() {
            None | Some(b"false") => Ok(false),
            Some(b"true" | b"") => Ok(true),
            Some(_) => Err(invalid(format!("`{name}` must be `true` or `false`"))),
        }
    }

    /// A decimal number.
    pub(super) fn number(&mut self, name: &'static str) -> Result<Option<u64>, ApiError> {
        let Some(value) = self.bytes(name) else { return Ok(None) };
        match decimal(&value) {
            Some(number) => Ok(Some(number)),
            None => Err(invalid(format!("`{name}` must be a decimal number below 2^64"))),
        }
    }

    /// A revision: a number from 1.
    pub(super) fn revision(&mut self, name: &'static str) -> Result<Option<u64>, ApiError> {
        match self.number(name)? {
            Some(0) => Err(invalid(format!("`{name}` must be at least 1: an empty store is at revision 1"))),
            other => Ok(other),
        }
    }

    /// A duration within `1ms..=max`, or 0 where `zero` allows it.
    pub(super) fn duration(&mut self, name: &'static str, zero: bool, max: Duration) -> Result<Option<Duration>, ApiError> {
        let Some(value) = self.text(name)? else { return Ok(None) };
        let Some(duration) = parse_duration(&value) else {
            return Err(invalid(format!("`{name}` must be a duration such as `2s`, `500ms` or `1m`")));
        };
        if duration.is_zero() && !zero {
            return Err(invalid(format!("`{name}` must be at least 1ms")));
        }
        if duration > max {
            return Err(invalid(format!("`{name}` must be at most {}ms", max.as_millis())));
        }
        Ok(Some(duration))
    }

    /// Refuses what nobody took: a mistyped parameter must not silently change a request's meaning.
    pub(super) fn finish(&self) -> Result<(), ApiError> {
        let Some(unknown) = self.pairs.iter().find(|pair| !pair.taken) else {
            return Ok(());
        };
        let name = shown(&unknown.name);
        let nearest = self.known.iter().map(|known| (strsim::osa_distance(&name, known), known)).min();
        let hint = match nearest {
            Some((distance, known)) if distance <= 2 => format!("; did you mean `{known}`?"),
            _ if self.known.is_empty() => "; this request takes none".to_owned(),
            _ => format!("; this request takes `{}`", self.known.join("`, `")),
        };
        Err(Problem::UnknownParameter(format!("unknown parameter `{name}`{hint}")).into())
    }

    /// The query again, without one parameter.
    pub(super) fn without(&self, name: &str) -> String {
        let kept = self.pairs.iter().filter(|pair| pair.name != name.as_bytes());
        kept.map(|pair| format!("{}={}", percent::encode(&pair.name), percent::encode(&pair.value)))
            .collect::<Vec<_>>()
            .join("&")
    }

    /// All parameters but `timeout`, in the order of their names: part of a request's identity.
    pub(super) fn identity(&self) -> Vec<(&[u8], &[u8])> {
        let mut pairs: Vec<_> = self
            .pairs
            .iter()
            .filter(|pair| pair.name != b"timeout")
            .map(|pair| (&pair.name[..], &pair.value[..]))
            .collect();
        pairs.sort_unstable();
        pairs
    }
}

fn decode(raw: &str, what: &str, broken: fn(String) -> Problem) -> Result<Vec<u8>, ApiError> {
    percent::decode(raw.as_bytes()).ok_or_else(|| broken(format!("a broken percent escape in `{what}` of the query")).into())
}

/// A name as it can be quoted in an error: short, and without control characters.
fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name)
        .chars()
        .take(64)
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

fn invalid(detail: String) -> ApiError {
    Problem::InvalidRequest(detail).into()
}

/// Digits only (no sign, no blanks), in the range of a u64.
pub(super) fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// `2s`, `500ms`, `1m`, `1h30m`, `0.5s`; a bare whole number is in seconds, as in the JSON bodies. Rounded down to milliseconds.
fn parse_duration(text: &str) -> Option<Duration> {
    match decimal(text.as_bytes()) {
        Some(seconds) => Some(Duration::from_secs(seconds)),
        None => read_duration(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(error: ApiError) -> &'static str {
        error.problem.code()
    }

    #[test]
    fn values_are_bytes_decoded_once_and_plus_is_a_plus() {
        let mut params = Params::parse(Some("prefix=a+b%2Fc%00%ff&start=x=y")).unwrap();
        assert_eq!(params.bytes("prefix").unwrap(), b"a+b/c\0\xff");
        assert_eq!(params.bytes("start").unwrap(), b"x=y");
        params.finish().unwrap();
    }

    #[test]
    fn a_parameter_given_twice_is_refused_even_if_spelled_differently() {
        assert_eq!(code(Params::parse(Some("ttl=1s&%74tl=2s")).unwrap_err()), "invalid_request");
    }

    #[test]
    fn an_unknown_parameter_is_named_with_the_nearest_known_one() {
        let mut params = Params::parse(Some("tll=30s")).unwrap();
        assert_eq!(params.duration("ttl", false, Duration::MAX).unwrap(), None);
        assert_eq!(params.bytes("ttl"), None);
        assert_eq!(params.known, ["ttl"], "named once, however often it is asked for");
        let error = params.finish().unwrap_err();
        assert_eq!(error.problem.code(), "unknown_parameter");
        assert!(
            error.problem.detail().contains("`tll`") && error.problem.detail().contains("`ttl`"),
            "{}",
            error.problem.detail()
        );
    }

    #[test]
    fn a_broken_escape_in_the_query_is_refused() {
        for (query, expected) in [
            ("a=%zz", "invalid_request"),
            ("%zz=a", "invalid_request"),
            ("prefix=%zz", "invalid_key"),
        ] {
            assert_eq!(code(Params::parse(Some(query)).unwrap_err()), expected, "{query}");
        }
    }

    #[test]
    fn numbers_are_plain_decimals() {
        for bad in ["-1", "+1", "", "1.0", "0x1", "18446744073709551616", " 1"] {
            let query = format!("n={}", percent::encode(bad.as_bytes()));
            assert!(Params::parse(Some(&query)).unwrap().number("n").is_err(), "{bad:?}");
        }
        assert_eq!(
            Params::parse(Some("n=18446744073709551615")).unwrap().number("n").unwrap(),
            Some(u64::MAX)
        );
    }

    #[test]
    fn durations_have_units_and_bounds() {
        let cases = [
            ("2s", 2000),
            ("500ms", 500),
            ("1m", 60_000),
            ("1m30s", 90_000),
            ("1.5s", 1500),
            ("30", 30_000),
            ("1h", 3_600_000),
        ];
        for (text, ms) in cases {
            assert_eq!(parse_duration(text), Some(Duration::from_millis(ms)), "{text}");
        }
        for bad in ["", "s", "2x", "-2s", "2 s", "1e3s", ".5s", "2s3", "99999999999999999999h"] {
            assert_eq!(parse_duration(bad), None, "{bad:?}");
        }
        let minute = Duration::from_secs(60);
        assert!(Params::parse(Some("t=61s")).unwrap().duration("t", false, minute).is_err());
        assert!(Params::parse(Some("t=0s")).unwrap().duration("t", false, minute).is_err());
        assert_eq!(
            Params::parse(Some("t=0s")).unwrap().duration("t", true, minute).unwrap(),
            Some(Duration::ZERO)
        );
    }

    #[test]
    fn switches_are_true_false_or_bare() {
        for (query, expected) in [("v", true), ("v=true", true), ("v=false", false), ("", false)] {
            assert_eq!(Params::parse(Some(query)).unwrap().flag("v").unwrap(), expected, "{query}");
        }
        assert!(Params::parse(Some("v=1")).unwrap().flag("v").is_err());
    }
}
