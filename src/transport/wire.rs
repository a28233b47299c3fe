//! What travels in `POST /raft`: raft messages as length-delimited protobuf, and who sends them as one header.
//!
//! Decoding takes arbitrary bytes. Before the protobuf library sees a message, [`scan`] walks its framing: every length must fit into
//! what is there (the library would allocate first), groups are refused (the schema has none), and what few bytes could blow up in
//! memory (entries, unknown fields) is counted.

use std::{fmt, time::Duration};

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use bytes::Bytes;
use protobuf::{CodedOutputStream, Message as _};
use raft::eraftpb::Message;

use super::Identity;

/// Names cluster, sender, its incarnation and the receiver; one header instead of four, because each costs on every message.
pub(super) const PEER: HeaderName = HeaderName::from_static("metcd-peer");
/// Where the sender is reached. A header of its own, so that members which do not know it yet still understand the other one.
pub(super) const PEER_URL: HeaderName = HeaderName::from_static("metcd-peer-url");
/// The newest start of the receiver that the sender knows of. Left out if it knows of none.
pub(super) const RECEIVER_BOOT: HeaderName = HeaderName::from_static("metcd-receiver-boot");
/// Who answers, for people.
pub(super) const MEMBER: HeaderName = HeaderName::from_static("metcd-member");
/// In an answer: for how long, in milliseconds, its sender has not been able to send to whom it answers. Left out if it is.
pub(super) const UNREACHED_MS: HeaderName = HeaderName::from_static("metcd-unreached-ms");
/// Place of an append batch in its stream.
pub(super) const STREAM: HeaderName = HeaderName::from_static("metcd-stream");
/// How long the sender of a relayed request waits, in milliseconds.
pub(super) const DEADLINE_MS: HeaderName = HeaderName::from_static("metcd-deadline-ms");

/// Entries of one body; an entry takes about 150 bytes of memory however small it is on the wire.
const MAX_ENTRIES: usize = 1 << 18;
/// Messages of one body.
const MAX_MESSAGES: usize = 1 << 16;
/// Fields this build does not know, in one body. Newer members may add some.
const MAX_UNKNOWN_FIELDS: usize = 1 << 16;

/// Who sends a request, as its headers say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SenderIdentity<'a> {
    /// The sender's cluster.
    pub cluster_id: u64,
    /// The sender; 0 if it has no id yet.
    pub member: u64,
    /// Its data directory.
    pub incarnation: u64,
    /// Where it says it is reached: its word only, and nothing is believed because of it.
    pub peer_url: Option<&'a str>,
}

/// The headers' content: the sender and the receiver it means (0: whoever listens there).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Addressing<'a> {
    pub(super) sender: SenderIdentity<'a>,
    pub(super) to: u64,
}

/// The headers of every request of `own` to `to`.
pub(super) fn own_headers(own: &Identity, to: u64) -> HeaderMap {
    let addressing = Addressing::new(own, to);
    let mut headers = HeaderMap::from_iter([(PEER, addressing.header())]);
    if let Ok(url) = HeaderValue::from_str(&own.peer_url) {
        headers.insert(PEER_URL, url);
    }
    headers
}

/// What the sender knows of the receiver's starts: `None` if nothing, or nothing that this node understands.
pub(super) fn known_boot(headers: &HeaderMap) -> Option<u64> {
    headers.get(RECEIVER_BOOT)?.to_str().ok()?.parse().ok()
}

/// How long the sender of an answer has not been able to send to this node.
pub(super) fn unreached(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(UNREACHED_MS)?.to_str().ok()?;
    text.parse().ok().map(Duration::from_millis)
}

impl<'a> Addressing<'a> {
    fn new(own: &Identity, to: u64) -> Addressing<'_> {
        Addressing {
            sender: SenderIdentity {
                cluster_id: own.cluster_id,
                member: own.member,
                incarnation: own.incarnation,
                peer_url: Some(&own.peer_url),
            },
            to,
        }
    }

    pub(super) fn header(&self) -> HeaderValue {
        let SenderIdentity {
            cluster_id,
            member,
            incarnation,
            peer_url: _,
        } = self.sender;
        let text = format!(
            "cluster={cluster_id:016x};from={member};incarnation={incarnation:016x};to={}",
            self.to
        );
        // Hexadecimal and decimal digits are always a valid header value.
        HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static(""))
    }

    pub(super) fn parse(headers: &'a HeaderMap) -> Option<Addressing<'a>> {
        let text = headers.get(PEER)?.to_str().ok()?;
        let mut parts = text.split(';');
        let mut part = |name: &str| parts.next()?.strip_prefix(name)?.strip_prefix('=');
        let hex = |text: &str| u64::from_str_radix(text, 16).ok();
        let sender = SenderIdentity {
            cluster_id: hex(part("cluster")?)?,
            member: part("from")?.parse().ok()?,
            incarnation: hex(part("incarnation")?)?,
            peer_url: headers.get(PEER_URL).and_then(|url| url.to_str().ok()),
        };
        let to = part("to")?.parse().ok()?;
        parts.next().is_none().then_some(Addressing { sender, to })
    }
}

/// One stream of append batches: a sender's boot, and how often it began anew since. Later ones are greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Epoch {
    pub(super) boot: u64,
    pub(super) count: u64,
}

/// The place of a batch: `seq` counts from 1 within the epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct StreamPosition {
    pub(super) epoch: Epoch,
    pub(super) seq: u64,
}

impl fmt::Display for StreamPosition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.epoch.boot, self.epoch.count, self.seq)
    }
}

impl StreamPosition {
    pub(super) fn header(&self) -> HeaderValue {
        HeaderValue::try_from(self.to_string()).unwrap_or(HeaderValue::from_static(""))
    }

    /// `Ok(None)`: the header is absent, so the batch belongs to no stream.
    pub(super) fn parse(headers: &HeaderMap) -> Result<Option<StreamPosition>, WireError> {
        let Some(value) = headers.get(STREAM) else { return Ok(None) };
        let malformed = || WireError("the stream header is malformed".into());
        let mut numbers = value.to_str().map_err(|_| malformed())?.split('.').map(str::parse);
        let (Some(Ok(boot)), Some(Ok(count)), Some(Ok(seq)), None) = (numbers.next(), numbers.next(), numbers.next(), numbers.next())
        else {
            return Err(malformed());
        };
        Ok(Some(StreamPosition {
            epoch: Epoch { boot, count },
            seq,
        }))
    }
}

/// Bytes that are no batch of messages, with the reason.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct WireError(pub String);

/// Appends `message` with its length in front. The length is exact: [`protobuf`] counts before it writes.
pub(super) fn encode_into(buffer: &mut Vec<u8>, message: &Message) -> Result<(), WireError> {
    let size = message.compute_size();
    buffer.reserve(size as usize + 5);
    let mut out = CodedOutputStream::vec(buffer);
    out.write_raw_varint32(size)
        .and_then(|()| message.write_to_with_cached_sizes(&mut out))
        .and_then(|()| out.flush())
        .map_err(|err| WireError(err.to_string()))
}

/// All messages of a body. The byte fields of the entries are slices of `body`, which should therefore hold nothing else.
pub(super) fn decode_batch(body: &Bytes) -> Result<Vec<Message>, WireError> {
    let mut budget = Budget::default();
    let mut messages = Vec::new();
    let mut at = 0;
    while at < body.len() {
        let (message, next) = decode_one(body, at, &mut budget)?;
        if messages.len() == MAX_MESSAGES {
            return Err(WireError(format!("more than {MAX_MESSAGES} messages")));
        }
        messages.push(message);
        at = next;
    }
    Ok(messages)
}

/// The first message of a body that goes on with something else, and where that begins. `Ok(None)`: not all of it is there yet.
pub(super) fn decode_first(body: &Bytes, max_bytes: usize) -> Result<Option<(Message, usize)>, WireError> {
    let mut cursor = Cursor { bytes: body, at: 0 };
    let Some(length) = cursor.varint() else {
        return if body.len() < 10 { Ok(None) } else { Err(truncated()) };
    };
    if length > max_bytes as u64 {
        return Err(WireError(format!("a message of {length} bytes, more than {max_bytes}")));
    }
    if cursor.take(length).is_none() {
        return Ok(None);
    }
    decode_one(body, 0, &mut Budget::default()).map(Some)
}

fn decode_one(body: &Bytes, at: usize, budget: &mut Budget) -> Result<(Message, usize), WireError> {
    let mut cursor = Cursor { bytes: body, at };
    let length = cursor.varint().ok_or_else(truncated)?;
    let begin = cursor.at;
    let bytes = cursor.take(length).ok_or_else(truncated)?;
    scan(bytes, Level::Message, budget)?;
    let message = Message::parse_from_carllerche_bytes(&body.slice(begin..cursor.at)).map_err(|err| WireError(err.to_string()))?;
    Ok((message, cursor.at))
}

fn truncated() -> WireError {
    WireError("a message is cut short".into())
}

/// What one body may still contain.
struct Budget {
    entries: usize,
    unknown: usize,
}

impl Default for Budget {
    fn default() -> Self {
        Budget {
            entries: MAX_ENTRIES,
            unknown: MAX_UNKNOWN_FIELDS,
        }
    }
}

/// The messages of the raft schema that nest.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Level {
    Message,
    Entry,
    Snapshot,
    Metadata,
    ConfState,
}

impl Level {
    /// The level of a nested message in `field`.
    fn nested(self, field: u64) -> Option<Level> {
        match (self, field) {
            (Level::Message, 7) => Some(Level::Entry),
            (Level::Message, 9) => Some(Level::Snapshot),
            (Level::Snapshot, 2) => Some(Level::Metadata),
            (Level::Metadata, 1) => Some(Level::ConfState),
            _ => None,
        }
    }

    /// The highest field number this build knows.
    fn last_field(self) -> u64 {
        match self {
            Level::Message => 16,
            Level::Entry => 6,
            Level::Snapshot => 2,
            Level::Metadata => 3,
            Level::ConfState => 5,
        }
    }
}

/// Checks the framing of one message. Recursion is bounded by the schema.
fn scan(bytes: &[u8], level: Level, budget: &mut Budget) -> Result<(), WireError> {
    let mut cursor = Cursor { bytes, at: 0 };
    while cursor.at < bytes.len() {
        let tag = cursor.varint().ok_or_else(truncated)?;
        let (field, wire_type) = (tag >> 3, tag & 7);
        if field > level.last_field() {
            budget.unknown = budget
                .unknown
                .checked_sub(1)
                .ok_or_else(|| WireError("too many unknown fields".into()))?;
        }
        match wire_type {
            0 => drop(cursor.varint().ok_or_else(truncated)?),
            1 => drop(cursor.take(8).ok_or_else(truncated)?),
            5 => drop(cursor.take(4).ok_or_else(truncated)?),
            2 => {
                let length = cursor.varint().ok_or_else(truncated)?;
                let inner = cursor.take(length).ok_or_else(truncated)?;
                if let Some(nested) = level.nested(field) {
                    if nested == Level::Entry {
                        budget.entries = budget.entries.checked_sub(1).ok_or_else(|| WireError("too many entries".into()))?;
                    }
                    scan(inner, nested, budget)?;
                }
            }
            _ => return Err(WireError(format!("wire type {wire_type}"))),
        }
    }
    Ok(())
}

/// Reads protobuf framing without ever going past the end.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = *self.bytes.get(self.at)?;
            self.at += 1;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, length: u64) -> Option<&'a [u8]> {
        let end = self.at.checked_add(usize::try_from(length).ok()?)?;
        let taken = self.bytes.get(self.at..end)?;
        self.at = end;
        Some(taken)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use raft::eraftpb::{Entry, MessageType};

    use super::*;

    fn message(index: u64, entries: usize) -> Message {
        let mut message = Message {
            from: 1,
            to: 2,
            term: 3,
            index,
            log_term: 3,
            ..Message::default()
        };
        message.set_msg_type(MessageType::MsgAppend);
        let entry = |i| Entry {
            index: index + 1 + i as u64,
            term: 3,
            data: vec![i as u8; 40].into(),
            context: vec![9; 8].into(),
            ..Entry::default()
        };
        message.set_entries((0..entries).map(entry).collect::<Vec<_>>().into());
        message
    }

    fn batch(messages: &[Message]) -> Bytes {
        let mut buffer = Vec::new();
        for message in messages {
            encode_into(&mut buffer, message).expect("encodes");
        }
        buffer.into()
    }

    #[test]
    fn a_batch_comes_back_as_it_was() {
        let messages = [message(5, 3), message(8, 0), message(8, 1)];
        assert_eq!(decode_batch(&batch(&messages)), Ok(messages.to_vec()));
        assert_eq!(decode_batch(&Bytes::new()), Ok(vec![]));
    }

    #[test]
    fn groups_are_refused() {
        // A mebibyte of "a group begins", behind its length.
        let body = [&[0x80, 0x80, 0x40][..], &[0x0b; 1 << 20]].concat();
        assert_eq!(decode_batch(&body.into()), Err(WireError("wire type 3".into())));
    }

    #[test]
    fn more_entries_than_memory_is_meant_for_are_refused() {
        // An empty entry is two bytes on the wire.
        let inner = [0x3a, 0].repeat(MAX_ENTRIES + 1);
        assert_eq!(inner.len(), 2 + (0x20 << 14), "the length in front");
        let body = [&[0x82, 0x80, 0x20][..], &inner].concat();
        assert_eq!(decode_batch(&body.into()), Err(WireError("too many entries".into())));
    }

    #[test]
    fn the_first_message_is_found_as_soon_as_it_is_whole() {
        let whole = batch(&[message(5, 2)]);
        for cut in 0..whole.len() {
            assert_eq!(decode_first(&whole.slice(..cut), 1 << 20), Ok(None), "cut at {cut}");
        }
        let followed: Bytes = [&whole[..], b"rest"].concat().into();
        assert_eq!(decode_first(&followed, 1 << 20), Ok(Some((message(5, 2), whole.len()))));
        assert!(decode_first(&followed, 10).is_err());
    }

    #[test]
    fn headers_come_back_as_they_were() {
        let own = Identity {
            cluster_id: 0xfeed,
            member: 3,
            incarnation: u64::MAX,
            boot: 4,
            peer_url: "http://[::1]:6380".into(),
        };
        let position = StreamPosition {
            epoch: Epoch { boot: 4, count: 7 },
            seq: 9,
        };
        let mut headers = own_headers(&own, 2);
        headers.insert(STREAM, position.header());
        assert_eq!(Addressing::parse(&headers), Some(Addressing::new(&own, 2)));
        assert_eq!(StreamPosition::parse(&headers), Ok(Some(position)));
        assert_eq!(Addressing::parse(&HeaderMap::new()), None);
    }

    proptest! {
        #[test]
        fn rule_27_no_bytes_panic_the_decoder(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = decode_batch(&Bytes::from(bytes.clone()));
            let _ = decode_first(&Bytes::from(bytes), 1 << 20);
        }

        #[test]
        fn rule_27_no_flipped_bits_panic_the_decoder(flips in proptest::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..6)) {
            let mut bytes = batch(&[message(5, 3), message(8, 2)]).to_vec();
            for (at, bit) in flips {
                let at = at.index(bytes.len());
                bytes[at] ^= 1 << bit;
            }
            if let Ok(messages) = decode_batch(&bytes.into()) {
                for message in &messages {
                    let _ = super::super::validate::check(message, 1, 2);
                }
            }
        }

        #[test]
        fn rule_27_no_header_panics_the_parser(text in "[ -~]{0,80}") {
            if let Ok(value) = HeaderValue::try_from(text) {
                let headers = HeaderMap::from_iter([(PEER, value.clone()), (STREAM, value)]);
                let _ = Addressing::parse(&headers);
                let _ = StreamPosition::parse(&headers);
            }
        }
    }
}
