//! W3C trace context: a request belongs to the trace its `traceparent` names, or to a new one, and the answer says which.
//!
//! - A `traceparent` that is malformed, given twice or of the forbidden version `ff` is ignored: the request begins a new trace. Of a
//!   later version only what version 00 knows is read.
//! - The sampled flag is the caller's. A trace that begins here is sampled if this member records it: as a span in the log or as a line
//!   of the access log.
//! - The span is of level DEBUG under the target [`TARGET`]. At the default filter it costs a look at a flag; the two ids are what a
//!   request pays always.

use std::fmt;

use bytes::Bytes;
use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use tracing::Span;

/// Target of the requests' spans and of the event that ends each: `PUT /debug/log` with `info,request=debug` shows them.
pub(super) const TARGET: &str = "request";
/// The header, in both directions.
pub(super) static TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// `00-<32 digits>-<16 digits>-<2 digits>`
const LENGTH: usize = 55;
const SAMPLED: u8 = 1;

/// A trace id as it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TraceId(u128);

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// Where a request belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TraceContext {
    pub(super) trace: TraceId,
    /// The caller's span, if there was a valid `traceparent`.
    parent: Option<u64>,
    /// The span of this request.
    span: u64,
    sampled: bool,
}

impl TraceContext {
    /// Of a request: its caller's trace or a new one.
    pub(super) fn of(headers: &HeaderMap) -> TraceContext {
        let mut given = headers.get_all(&TRACEPARENT).iter();
        let parsed = given.next().and_then(|value| parse(value.as_bytes()));
        match parsed.filter(|_| given.next().is_none()) {
            Some((trace, parent, flags)) => TraceContext {
                trace: TraceId(trace),
                parent: Some(parent),
                span: random_id(),
                sampled: flags & SAMPLED != 0,
            },
            None => TraceContext {
                // 0 is what an absent id looks like.
                trace: TraceId(rand::random::<u128>().max(1)),
                parent: None,
                span: random_id(),
                sampled: false,
            },
        }
    }

    /// The request's span; disabled unless the filter asks for it. `logged`: the request is a line of the access log.
    pub(super) fn span(&mut self, parts: &Parts, logged: bool) -> Span {
        let span = tracing::debug_span!(
            target: TARGET,
            "request",
            trace_id = %self.trace,
            span_id = %format_args!("{:016x}", self.span),
            parent_id = self.parent.map(|parent| tracing::field::display(format!("{parent:016x}"))),
            method = %parts.method,
            target = %parts.uri,
        );
        if self.parent.is_none() {
            self.sampled = logged || !span.is_disabled();
        }
        span
    }

    /// What the answer carries: this trace, with this request's span as the parent of what follows.
    pub(super) fn header(&self) -> HeaderValue {
        let mut text = Vec::with_capacity(LENGTH);
        text.extend_from_slice(b"00-");
        push_hex(&mut text, &self.trace.0.to_be_bytes());
        text.push(b'-');
        push_hex(&mut text, &self.span.to_be_bytes());
        text.extend_from_slice(if self.sampled { b"-01" } else { b"-00" });
        // Digits and dashes are legal in a header value.
        HeaderValue::from_maybe_shared(Bytes::from(text)).unwrap_or(HeaderValue::from_static("00"))
    }
}

fn random_id() -> u64 {
    rand::random::<u64>().max(1)
}

/// Trace id, parent id and flags.
fn parse(text: &[u8]) -> Option<(u128, u64, u8)> {
    let (head, rest) = text.split_at_checked(LENGTH)?;
    let [v0, v1, b'-', fields @ ..] = head else { return None };
    let version = hex(&[*v0, *v1])?;
    // Version 00 ends here; a later one may go on after another dash.
    let is_known = version == 0 && rest.is_empty();
    let is_later = version != 0 && version != 0xff && (rest.is_empty() || rest.first() == Some(&b'-'));
    if !is_known && !is_later {
        return None;
    }
    let (trace, fields) = fields.split_at_checked(32)?;
    let (parent, flags) = fields.strip_prefix(b"-")?.split_at_checked(16)?;
    let trace = hex(trace).filter(|&id| id != 0)?;
    let parent = hex(parent).and_then(|id| u64::try_from(id).ok()).filter(|&id| id != 0)?;
    let flags = hex(flags.strip_prefix(b"-")?).and_then(|flags| u8::try_from(flags).ok())?;
    Some((trace, parent, flags))
}

/// A number of at most 32 digits, in lower case as the specification demands.
fn hex(digits: &[u8]) -> Option<u128> {
    digits.iter().try_fold(0, |number: u128, digit| {
        let value = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        Some(number << 4 | u128::from(value))
    })
}

fn push_hex(text: &mut Vec<u8>, bytes: &[u8]) {
    let digit = |value: u8| if value < 10 { b'0' + value } else { b'a' + value - 10 };
    text.extend(bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]));
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIVEN: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn context(values: &[&str]) -> TraceContext {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(&TRACEPARENT, HeaderValue::from_str(value).unwrap());
        }
        TraceContext::of(&headers)
    }

    #[test]
    fn the_callers_trace_goes_on_under_a_span_of_this_member() {
        let context = context(&[GIVEN]);
        let answer = context.header();
        let answer = answer.to_str().unwrap();
        assert_eq!(context.parent, Some(0x00f0_67aa_0ba9_02b7));
        assert!(
            answer.starts_with("00-4bf92f3577b34da6a3ce929d0e0e4736-") && answer.ends_with("-01"),
            "{answer}"
        );
        assert!(!answer.contains("00f067aa0ba902b7"), "{answer}");
        assert_eq!(
            parse(answer.as_bytes()).unwrap().1,
            context.span,
            "the answer is a traceparent itself"
        );
    }

    #[test]
    fn what_is_malformed_begins_a_new_trace() {
        let later = GIVEN.replacen("00", "cc", 1);
        for good in [GIVEN, &later, &format!("{later}-more"), &GIVEN.replace("-01", "-fe")] {
            assert!(context(&[good]).parent.is_some(), "{good}");
        }
        for bad in [
            "",
            "x",
            &GIVEN[..54],
            &format!("{GIVEN}0"),
            &format!("{GIVEN}-more"),
            &format!("{later}0"),
            &GIVEN.replacen("00", "ff", 1),
            &GIVEN.to_uppercase(),
            &GIVEN.replace("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32)),
            &GIVEN.replace("00f067aa0ba902b7", &"0".repeat(16)),
            &GIVEN.replace("-01", "-0x"),
            &GIVEN.replace("-01", "_01"),
        ] {
            let context = context(&[bad]);
            assert!(context.parent.is_none() && !context.sampled && context.trace.0 != 0, "{bad}");
            assert!(!context.header().to_str().unwrap().contains("4bf92f"), "{bad}");
        }
        assert!(context(&[GIVEN, GIVEN]).parent.is_none(), "two are none");
        assert_ne!(context(&[]).trace, context(&[]).trace);
    }
}
