//! What keeps a web page from reaching a server on its visitor's machine or network: checks of `Host` (DNS rebinding), `Origin` and
//! `Sec-Fetch-Site`, before anything else is looked at.

use std::net::{Ipv4Addr, Ipv6Addr};

use http::header::{HeaderMap, HeaderName, HeaderValue, ORIGIN};
use http::request::Parts;
use http::{Method, Version, header};

use super::error::{ApiError, Problem};
use crate::config::Config;

static SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// Longest request target in bytes. The longest that has a meaning is a list from one key to another, both of 4 KiB and every byte
/// escaped, with the token of such a key.
const MAX_TARGET_BYTES: usize = 32 << 10;
/// Most bytes of all header names and values together.
const MAX_HEADER_BYTES: usize = 64 << 10;

/// How long a browser may keep the answer to a preflight.
const PREFLIGHT_SECONDS: &str = "600";

/// Refuses a body that would not be understood, and heads that are larger than any honest one: [`crate::serve`] bounds what is buffered of
/// them, with room to say which part it was.
pub(super) fn check_head(parts: &Parts) -> Result<(), ApiError> {
    let bytes = parts.uri.path_and_query().map_or(0, |target| target.as_str().len());
    if bytes > MAX_TARGET_BYTES {
        let max = MAX_TARGET_BYTES;
        return Err(Problem::UriTooLong { bytes, max }.into());
    }
    let is_chunked = |coding: &HeaderValue| coding.as_bytes().eq_ignore_ascii_case(b"chunked");
    let mut codings = parts.headers.get_all(header::TRANSFER_ENCODING).iter();
    if !codings.next().is_none_or(is_chunked) || codings.next().is_some() {
        // Only the chunks are undone: the rest of it would become part of the value.
        let detail = "`Transfer-Encoding` may only be `chunked`, once: send the body as it is".to_owned();
        return Err(Problem::InvalidRequest(detail).into());
    }
    let headers: usize = parts.headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    if headers > MAX_HEADER_BYTES {
        return Err(Problem::HeadersTooLarge { max: MAX_HEADER_BYTES }.into());
    }
    Ok(())
}

/// The checks, prepared from the configuration.
#[derive(Debug)]
pub(super) struct Guard {
    /// Lower case, without port: the advertised host and `http.allowed_hosts`.
    hosts: Vec<String>,
    /// Lower case: the advertised origin.
    own_origin: String,
    /// Lower case: `http.allowed_origins`.
    allowed_origins: Vec<String>,
}

impl Guard {
    /// From `[advertise]` and `[http]`.
    pub(super) fn new(config: &Config) -> Guard {
        let own_origin = config.advertise.client_url.trim_end_matches('/').to_ascii_lowercase();
        let advertised = own_origin
            .split_once("://")
            .map_or("", |(_, authority)| host_of(authority))
            .to_owned();
        let configured = config
            .http
            .allowed_hosts
            .iter()
            .map(|host| host_of(host.trim()).trim_end_matches('.').to_ascii_lowercase());
        let mut hosts: Vec<String> = configured.collect();
        hosts.push(advertised);
        let allowed_origins = config
            .http
            .allowed_origins
            .iter()
            .map(|origin| origin.trim_end_matches('/').to_ascii_lowercase())
            .collect();
        Guard {
            hosts,
            own_origin,
            allowed_origins,
        }
    }

    /// Whether the same request may be answered otherwise for a page of another origin: caches must know.
    pub(super) fn depends_on_origin(&self) -> bool {
        !self.allowed_origins.is_empty()
    }

    /// Lets a request in or refuses it. The answer is the origin to name in CORS headers: set only if `http.allowed_origins` lists it.
    pub(super) fn check(&self, parts: &Parts) -> Result<Option<HeaderValue>, ApiError> {
        let authority = self.check_host(parts)?;
        let Some(origin) = parts.headers.get(ORIGIN) else {
            return match parts.headers.get(&SEC_FETCH_SITE) {
                Some(site) if site.as_bytes().eq_ignore_ascii_case(b"cross-site") => Err(cross_origin("cross-site")),
                _ => Ok(None),
            };
        };
        let Ok(text) = origin.to_str() else {
            return Err(cross_origin("unreadable"));
        };
        if parts.headers.get_all(ORIGIN).iter().count() == 1 {
            let text = text.to_ascii_lowercase();
            if self.allowed_origins.contains(&text) {
                return Ok(Some(origin.clone()));
            }
            let cross_site = parts
                .headers
                .get(&SEC_FETCH_SITE)
                .is_some_and(|site| site.as_bytes().eq_ignore_ascii_case(b"cross-site"));
            if !cross_site && (text == self.own_origin || is_origin_of(&text, authority)) {
                return Ok(None);
            }
        }
        Err(cross_origin(text))
    }

    /// The host the client believes to speak to, checked; empty if it names none.
    fn check_host<'a>(&self, parts: &'a Parts) -> Result<&'a str, ApiError> {
        let authority = match parts.uri.authority() {
            // HTTP/2's `:authority` and the absolute form of HTTP/1: it overrides `Host`.
            Some(authority) => authority.as_str(),
            None => match single_host(&parts.headers)? {
                Some(host) => host,
                // Nothing to check; HTTP/1.0 had no `Host`, and every browser sends one.
                None if parts.version < Version::HTTP_11 => return Ok(""),
                None => return Err(Problem::InvalidRequest("the `Host` header is missing".to_owned()).into()),
            },
        };
        // A request-target with user information is not sent by any well-meaning client.
        let host = host_of(authority);
        if !authority.contains('@') && self.knows(host) {
            return Ok(authority);
        }
        let shown: String = host.chars().take(80).collect();
        let detail =
            format!("`{shown}` is not a name of this server: `http.allowed_hosts` lists those let in besides IP addresses and localhost");
        Err(Problem::UnknownHost(detail).into())
    }

    fn knows(&self, host: &str) -> bool {
        let host = host.strip_suffix('.').unwrap_or(host);
        let v6 = host.strip_prefix('[').and_then(|inner| inner.strip_suffix(']'));
        host.eq_ignore_ascii_case("localhost")
            || host.parse::<Ipv4Addr>().is_ok()
            || v6.is_some_and(|inner| inner.parse::<Ipv6Addr>().is_ok())
            || (!host.is_empty() && self.hosts.iter().any(|known| known.eq_ignore_ascii_case(host)))
    }
}

fn single_host(headers: &HeaderMap) -> Result<Option<&str>, ApiError> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let Some(host) = hosts.next() else { return Ok(None) };
    if hosts.next().is_some() {
        return Err(Problem::InvalidRequest("the `Host` header is given twice".to_owned()).into());
    }
    match host.to_str() {
        Ok(host) => Ok(Some(host)),
        Err(_) => Err(Problem::UnknownHost("the `Host` header is not readable".to_owned()).into()),
    }
}

/// The host of `host[:port]`; an IPv6 literal keeps its brackets.
fn host_of(authority: &str) -> &str {
    match authority.rfind(':') {
        Some(colon) if authority[colon + 1..].bytes().all(|byte| byte.is_ascii_digit()) && !authority[colon..].contains(']') => {
            &authority[..colon]
        }
        _ => authority,
    }
}

/// Whether a (lower case) origin is `http://<authority>`, the port 80 being the one that goes without saying.
fn is_origin_of(origin: &str, authority: &str) -> bool {
    let Some(of_origin) = origin.strip_prefix("http://") else {
        return false;
    };
    let plain = |authority: &str| authority.strip_suffix(":80").unwrap_or(authority).to_ascii_lowercase();
    !authority.is_empty() && plain(of_origin) == plain(authority)
}

fn cross_origin(origin: &str) -> ApiError {
    let shown: String = origin.chars().take(80).collect();
    Problem::CrossOrigin(format!(
        "requests from pages of another origin ({shown}) are refused unless `http.allowed_origins` lists it"
    ))
    .into()
}

/// Lets a page of a listed origin read the answer.
pub(super) fn add_cors(headers: &mut HeaderMap, origin: HeaderValue, method: &Method, allow: &'static str) {
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    let exposed = "ETag, Link, Retry-After, Metcd-Member, Metcd-Revision, Idempotent-Replayed, traceparent";
    headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(exposed));
    if method == Method::OPTIONS {
        headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static(allow));
        let allowed = "Accept, Content-Type, If-Match, If-None-Match, Idempotency-Key, Last-Event-ID, traceparent";
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static(allowed));
        headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static(PREFLIGHT_SECONDS));
    }
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn guard() -> Guard {
        Guard {
            hosts: vec!["kv.example".to_owned(), "db.example".to_owned()],
            own_origin: "http://kv.example:3379".to_owned(),
            allowed_origins: vec!["https://console.example".to_owned()],
        }
    }

    fn check(headers: &[(&'static str, &'static str)]) -> Result<Option<HeaderValue>, &'static str> {
        let mut request = Request::builder().uri("/a");
        for &(name, value) in headers {
            request = request.header(name, value);
        }
        let (parts, ()) = request.body(()).unwrap().into_parts();
        guard().check(&parts).map_err(|error| error.problem.code())
    }

    #[test]
    fn hosts_are_literals_localhost_and_the_listed_ones() {
        for host in [
            "127.0.0.1:3379",
            "10.1.2.3",
            "[::1]:3379",
            "[fe80::1]",
            "localhost",
            "LocalHost:1",
            "kv.example:3379",
            "KV.example.",
            "db.example",
        ] {
            assert_eq!(check(&[("host", host)]), Ok(None), "{host}");
        }
        for host in [
            "evil.example",
            "localhost.evil.example",
            "kv.example.evil",
            "127.0.0.1.evil.example",
            "[::1",
            "",
            "a@127.0.0.1",
            "256.1.1.1",
            "::1",
        ] {
            assert_eq!(check(&[("host", host)]), Err("unknown_host"), "{host}");
        }
        assert_eq!(check(&[]), Err("invalid_request"));
        assert_eq!(check(&[("host", "localhost"), ("host", "localhost")]), Err("invalid_request"));
    }

    #[test]
    fn http_2_authority_overrides_the_host() {
        let (parts, ()) = Request::builder()
            .uri("http://evil.example/a")
            .header("host", "localhost")
            .body(())
            .unwrap()
            .into_parts();
        assert_eq!(guard().check(&parts).unwrap_err().problem.code(), "unknown_host");
    }

    #[test]
    fn the_own_origin_passes_and_others_do_not() {
        for origin in ["http://localhost:3379", "http://LOCALHOST:3379", "http://kv.example:3379"] {
            assert_eq!(check(&[("host", "localhost:3379"), ("origin", origin)]), Ok(None), "{origin}");
        }
        for origin in [
            "http://localhost:4000",
            "https://localhost:3379",
            "http://evil.example",
            "null",
            "http://localhost:33790",
        ] {
            assert_eq!(
                check(&[("host", "localhost:3379"), ("origin", origin)]),
                Err("cross_origin"),
                "{origin}"
            );
        }
        assert_eq!(check(&[("host", "127.0.0.1"), ("origin", "http://127.0.0.1:80")]), Ok(None));
    }

    #[test]
    fn cross_site_fetches_are_refused_unless_listed() {
        let host = ("host", "localhost:3379");
        assert_eq!(check(&[host, ("sec-fetch-site", "cross-site")]), Err("cross_origin"));
        assert_eq!(check(&[host, ("sec-fetch-site", "same-origin")]), Ok(None));
        assert_eq!(check(&[host, ("sec-fetch-site", "none")]), Ok(None));
        assert_eq!(
            check(&[host, ("sec-fetch-site", "cross-site"), ("origin", "http://localhost:3379")]),
            Err("cross_origin")
        );
        let listed = check(&[host, ("sec-fetch-site", "cross-site"), ("origin", "https://console.example")]);
        assert_eq!(listed, Ok(Some(HeaderValue::from_static("https://console.example"))));
    }
}
