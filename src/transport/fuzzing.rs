//! See [`crate::fuzzing`].

use bytes::Bytes;
use http::HeaderMap;
use raft::eraftpb::Message;

use super::validate;
use super::wire::{self, Addressing, StreamPosition};
use crate::consensus::fuzzing::{OWN, PEERS};

/// The messages of a body that the transport would hand to the driver. Sender and receiver are made to fit.
pub(crate) fn received(body: &[u8]) -> Vec<Message> {
    let body = Bytes::copy_from_slice(body);
    let first = wire::decode_first(&body, 1 << 20);
    let Ok(messages) = wire::decode_batch(&body) else {
        return Vec::new();
    };
    if let (Some(message), Ok(Some((first, _)))) = (messages.first(), first) {
        assert_eq!(*message, first, "one message is read as many are");
    }
    encode_again(&messages);
    let mut admitted = Vec::new();
    for mut message in messages {
        let (from, to) = (message.from, message.to);
        // It must only not panic.
        let _ = validate::check_snapshot(&message, from, to);
        message.from = PEERS[(from % 2) as usize];
        message.to = OWN;
        if validate::check(&message, message.from, OWN).is_ok() {
            admitted.push(message);
        }
    }
    admitted
}

fn encode_again(messages: &[Message]) {
    let mut bytes = Vec::new();
    for message in messages {
        assert_eq!(wire::encode_into(&mut bytes, message), Ok(()));
    }
    // As text: of a message that was there twice, the decoder keeps an empty table of unknown fields, which is not equal to none.
    let text = |messages: &[Message]| format!("{messages:?}");
    assert_eq!(wire::decode_batch(&bytes.into()).as_deref().map(text), Ok(text(messages)));
}

/// The headers of a peer's request.
pub(crate) fn headers(headers: &HeaderMap) {
    if let Some(addressing) = Addressing::parse(headers) {
        let again = HeaderMap::from_iter([(wire::PEER, addressing.header())]);
        // The address of the sender has a header of its own.
        let named = |it: &Addressing<'_>| (it.sender.cluster_id, it.sender.member, it.sender.incarnation, it.to);
        assert_eq!(Addressing::parse(&again).as_ref().map(named), Some(named(&addressing)));
    }
    if let Ok(Some(position)) = StreamPosition::parse(headers) {
        let again = HeaderMap::from_iter([(wire::STREAM, position.header())]);
        assert_eq!(StreamPosition::parse(&again), Ok(Some(position)));
    }
}
