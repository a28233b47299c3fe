//! Checks of addresses: base URLs of members, web origins, host names.

use std::net::IpAddr;

use reqwest::Url;

/// What a base URL is for; decides what is allowed in it.
#[derive(Clone, Copy, PartialEq)]
enum Purpose {
    /// Others are told to connect there.
    Advertised,
    /// This node connects there.
    Dialled,
}

/// Checks a peer URL.
pub fn check_peer_url(text: &str) -> Result<(), String> {
    parse_peer_url(text).map(|_| ())
}

/// Checks the URL that clients are told.
pub fn check_client_url(text: &str) -> Result<(), String> {
    parse_client_url(text).map(|_| ())
}

/// Checks a client URL of a running cluster.
pub fn check_join_url(text: &str) -> Result<(), String> {
    parse_join_url(text).map(|_| ())
}

/// A peer URL in its one spelling: `http://host:port`, no slash at the end. `https` is refused until TLS is built.
pub fn parse_peer_url(text: &str) -> Result<String, String> {
    let url = parse_base_url(text, Purpose::Advertised)?;
    refuse_https(&url, text)?;
    Ok(spelling(&url))
}

/// A client URL that is advertised. `https` is refused until TLS is built: the other members and the command line connect to it.
pub fn parse_client_url(text: &str) -> Result<String, String> {
    let url = parse_base_url(text, Purpose::Advertised)?;
    refuse_https(&url, text)?;
    Ok(spelling(&url))
}

/// A client URL that this node connects to. `https` is refused until TLS is built.
pub fn parse_join_url(text: &str) -> Result<String, String> {
    let url = parse_base_url(text, Purpose::Dialled)?;
    refuse_https(&url, text)?;
    Ok(spelling(&url))
}

/// The port of a URL that one of the functions above returned.
pub fn port(url: &str) -> Option<u16> {
    Url::parse(url).ok()?.port_or_known_default()
}

fn refuse_https(url: &Url, text: &str) -> Result<(), String> {
    if url.scheme() == "https" {
        return Err(format!("{text:?}: TLS is not built yet: use http:// on a network that you trust"));
    }
    Ok(())
}

fn parse_base_url(text: &str, purpose: Purpose) -> Result<Url, String> {
    let wrong = |why: &str| format!("{text:?} {why}: write it like \"http://10.0.0.1:3380\"");
    let url = Url::parse(text).map_err(|e| wrong(&format!("is not a URL ({e})")))?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err("a URL here cannot carry a user name or password (users are not built yet)".to_owned());
    }
    if !["http", "https"].contains(&url.scheme()) || url.host_str().is_none() {
        return Err(wrong("is not an http URL"));
    }
    if url.path() != "/" || url.query().is_some() || url.fragment().is_some() {
        return Err(wrong("has something behind the address"));
    }
    if url.port() == Some(0) {
        return Err(wrong("has port 0, which nobody can connect to"));
    }
    if purpose == Purpose::Advertised && is_wildcard(&url) {
        return Err(wrong("is a wildcard address, which nobody can connect to"));
    }
    Ok(url)
}

fn is_wildcard(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    host.parse::<IpAddr>().is_ok_and(|ip| ip.to_canonical().is_unspecified())
}

fn spelling(url: &Url) -> String {
    url.as_str().trim_end_matches('/').to_owned()
}

/// Checks a web origin as browsers send it.
pub fn check_origin(text: &str) -> Result<(), String> {
    let wrong = || format!("{text:?} is not an origin: write scheme, host and port only, like \"https://console.example.com\"");
    let url = Url::parse(text).map_err(|_| wrong())?;
    let origin = url.origin();
    if origin.is_tuple() && origin.ascii_serialization() == text {
        Ok(())
    } else {
        Err(wrong())
    }
}

/// Checks a host name as it stands in `Host`, without a port.
pub fn check_host(text: &str) -> Result<(), String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    if text.is_empty() || text.len() > 253 || !text.chars().all(allowed) {
        return Err(format!(
            "{text:?} is not a host name: write it without scheme and port, like \"kv.example.com\""
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_url_has_one_spelling() {
        assert_eq!(parse_peer_url("http://127.0.0.1:3380/"), Ok("http://127.0.0.1:3380".to_owned()));
        assert_eq!(
            parse_peer_url("HTTP://Node-1.Example:3380"),
            Ok("http://node-1.example:3380".to_owned())
        );
        assert_eq!(parse_peer_url("http://[::1]:3380"), Ok("http://[::1]:3380".to_owned()));
        assert_eq!(parse_client_url("http://kv.example.com"), Ok("http://kv.example.com".to_owned()));
        assert_eq!((port("http://a"), port("http://a:17")), (Some(80), Some(17)));
    }

    #[test]
    fn addresses_nobody_can_connect_to_are_refused() {
        for text in ["http://0.0.0.0:3380", "http://[::]:3380", "http://0:3380"] {
            assert!(parse_peer_url(text).is_err_and(|e| e.contains("wildcard")), "{text}");
            assert!(parse_client_url(text).is_err_and(|e| e.contains("wildcard")), "{text}");
        }
        assert!(parse_peer_url("http://127.0.0.1:0").is_err_and(|e| e.contains("port 0")));
    }

    #[test]
    fn https_is_refused_where_a_member_would_have_to_speak_it() {
        assert!(parse_client_url("https://a:1").is_err_and(|e| e.contains("TLS is not built yet")));
        assert!(parse_peer_url("https://a:1").is_err_and(|e| e.contains("TLS is not built yet")));
        assert!(parse_join_url("https://a:1").is_err_and(|e| e.contains("TLS is not built yet")));
    }

    #[test]
    fn what_is_not_a_base_url_is_refused_and_a_password_is_not_repeated() {
        for text in [
            "",
            "127.0.0.1:3380",
            "ftp://a:1",
            "http://a:1/raft",
            "http://a:1?x",
            "http://a:1#x",
            "http://a:99999",
            "unix:/x",
        ] {
            assert!(parse_peer_url(text).is_err(), "{text}");
        }
        assert!(parse_join_url("http://root:hunter2@a:1").is_err_and(|e| !e.contains("hunter2")));
    }

    #[test]
    fn origins_and_hosts_are_checked() {
        assert_eq!(check_origin("https://console.example.com"), Ok(()));
        for text in ["*", "null", "https://a/", "https://a/x", "a.example", "https://A.example"] {
            assert!(check_origin(text).is_err(), "{text}");
        }
        assert_eq!(check_host("kv.example.com"), Ok(()));
        for text in ["", "http://a", "a:80", "a/b", "ä"] {
            assert!(check_host(text).is_err(), "{text}");
        }
    }
}
