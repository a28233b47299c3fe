//! The few answers given below HTTP: to heads that hyper refuses or that do not arrive, and to connections over the limit.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use super::connection::Shared;

/// Connections that may be turned away politely at a time; more are closed without a word.
const MAX_TURNING_AWAY: usize = 64;
/// How long, and how many bytes, a client that is turned away may go on sending. Closing earlier would reset the connection and could
/// destroy the answer before it is read.
const LINGER: Duration = Duration::from_millis(500);
const LINGER_BYTES: usize = 64 * 1024;

/// A whole HTTP/1.1 answer with a problem document, after which the connection is closed. Nobody here knows the request's method, so
/// that each says what is true of a mutation: it was not applied.
pub(super) fn answer(status: u16, member: &AtomicU64) -> Vec<u8> {
    let (title, code, detail, more) = match status {
        408 => ("Request Timeout", "request_timeout", "the request head did not arrive in time", ""),
        414 => ("URI Too Long", "uri_too_long", "the request target is too long", ""),
        431 => (
            "Request Header Fields Too Large",
            "headers_too_large",
            "the request head is too large or has too many fields",
            "",
        ),
        429 => (
            "Too Many Requests",
            "overloaded",
            "too many connections (limits.max_connections)",
            "retry-after: 1\r\n",
        ),
        _ => (
            "Bad Request",
            "invalid_request",
            "this is not a well-formed HTTP/1.1 or HTTP/2 request (in a URL, escape blanks, quotes, #, < and >)",
            "",
        ),
    };
    let status = if title == "Bad Request" { 400 } else { status };
    let body = format!(
        r#"{{"type":"about:blank","title":"{title}","status":{status},"detail":"{detail}","code":"{code}","outcome":"not_applied"}}"#
    );
    let member = match member.load(Relaxed) {
        0 => String::new(),
        id => format!("metcd-member: {id}\r\n"),
    };
    format!(
        "HTTP/1.1 {status} {title}\r\ncontent-type: application/problem+json\r\nx-content-type-options: nosniff\r\n{member}{more}\
         connection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// The status of an answer that hyper makes by itself: a bare head of class 4.
pub(super) fn automatic_status(head: &[u8]) -> Option<u16> {
    let rest = head.strip_prefix(b"HTTP/1.1 ").or_else(|| head.strip_prefix(b"HTTP/1.0 "))?;
    let [b'4', tens @ b'0'..=b'9', ones @ b'0'..=b'9', b' ', ..] = rest else {
        return None;
    };
    head.ends_with(b"\r\n\r\n")
        .then(|| 400 + u16::from(tens - b'0') * 10 + u16::from(ones - b'0'))
}

/// Answers `429` to a connection over the limit and closes it, in a task of its own.
pub(super) fn turn_away(mut stream: TcpStream, shared: &Arc<Shared>) {
    if !shared.connections.enter_turning_away(MAX_TURNING_AWAY) {
        return;
    }
    let shared = shared.clone();
    tokio::spawn(async move {
        let polite = async {
            stream.write_all(&answer(429, &shared.limits.member)).await?;
            stream.shutdown().await?;
            tokio::io::copy(&mut (&mut stream).take(LINGER_BYTES as u64), &mut tokio::io::sink()).await
        };
        // Too slow or already gone: there is nobody to tell.
        let _ = timeout(LINGER, polite).await;
        shared.connections.leave_turning_away();
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_bare_head_of_class_4_is_taken_for_hypers_own_answer() {
        assert_eq!(
            automatic_status(b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\n\r\n"),
            Some(431)
        );
        assert_eq!(automatic_status(b"HTTP/1.1 200 OK\r\n\r\n"), None);
        assert_eq!(automatic_status(b"HTTP/1.1 4"), None);
        assert_eq!(automatic_status(b"\0\0\x12\x04\0"), None);
        assert_eq!(automatic_status(b"HTTP/1.1 404 Not Found\r\n\r\nbody"), None);
    }

    #[test]
    fn answers_are_whole_and_their_bodies_are_json() {
        for status in [400, 408, 414, 429, 431] {
            let text = String::from_utf8(answer(status, &AtomicU64::new(7))).expect("ASCII");
            let (head, body) = text.split_once("\r\n\r\n").expect("a head and a body");
            assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{head}");
            assert!(
                head.contains(&format!("content-length: {}", body.len())) && head.contains("metcd-member: 7"),
                "{head}"
            );
            let json: serde_json::Value = serde_json::from_str(body).expect("JSON");
            assert_eq!(json["status"], status);
        }
    }
}
