//! What one HTTP/2 connection may ask of the process.

use super::*;

const RST_STREAM: u8 = 3;
/// Error codes of RFC 9113, section 7.
const REFUSED_STREAM: u32 = 7;
const ENHANCE_YOUR_CALM: u32 = 11;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

fn begin() -> Vec<u8> {
    [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".as_slice(), &frame(4, 0, 0, &[])].concat()
}

fn error_code(payload: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(*payload.last_chunk()?))
}

/// "Rapid reset" (CVE-2023-44487): streams that are opened and given up at once cost their sender nothing and are in no limit of streams.
#[tokio::test]
async fn whoever_opens_streams_only_to_reset_them_is_sent_away() {
    let server = Server::start(router(), ServeLimits::default()).await;
    let mut stream = server.connect().await;
    let get_root = [0x82, 0x84, 0x86, 0x41, 1, b'a'];
    let mut sent = begin();
    for id in (1..20_000).step_by(2) {
        sent.extend(frame(HEADERS, 5, id, &get_root));
        sent.extend(frame(RST_STREAM, 0, id, &8_u32.to_be_bytes()));
    }
    // It may hang up before all of it is taken.
    let (mut reading, mut writing) = stream.split();
    let write = async {
        let _ = writing.write_all(&sent).await;
    };
    let mut answer = Vec::new();
    let read = async {
        let _ = reading.read_to_end(&mut answer).await;
    };
    timeout(PATIENCE, async { tokio::join!(write, read) })
        .await
        .expect("sent away in time");
    let mut rest = answer.as_slice();
    let mut goaway = None;
    while let Some((head, after)) = rest.split_first_chunk::<9>() {
        let length = usize::from(head[1]) << 8 | usize::from(head[2]);
        let Some((payload, after)) = after.split_at_checked(length) else {
            break;
        };
        if head[3] == GOAWAY {
            goaway = payload.get(..8).and_then(error_code);
        }
        rest = after;
    }
    // What it is told is lost if it is still sending when the connection is closed.
    assert!(goaway.is_none_or(|code| code == ENHANCE_YOUR_CALM), "{goaway:?}");
    // Others are served.
    let mut other = server.connect().await;
    other.write_all(&http2_get_root()).await.expect("sent");
    assert_eq!(next_frame(&mut other, HEADERS).await.first(), Some(&0x88));
}

#[tokio::test]
async fn streams_beyond_the_limit_are_refused_and_the_others_go_on() {
    let limits = ServeLimits {
        max_streams: 3,
        ..ServeLimits::default()
    };
    let server = Server::start(router(), limits).await;
    let mut stream = server.connect().await;
    let post_echo = [&[0x83, 0x86, 0x44, 5][..], b"/echo", &[0x41, 1, b'a']].concat();
    let mut sent = begin();
    for id in [1, 3, 5, 7] {
        sent.extend(frame(HEADERS, 4, id, &post_echo));
    }
    stream.write_all(&sent).await.expect("sent");
    let refused = next_frame(&mut stream, RST_STREAM).await;
    assert_eq!(error_code(&refused), Some(REFUSED_STREAM));
    // The end of the first one's body.
    stream.write_all(&frame(0, 1, 1, b"body")).await.expect("sent");
    assert_eq!(next_frame(&mut stream, HEADERS).await.first(), Some(&0x88), ":status 200");
}
