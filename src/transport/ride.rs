//! The way back: what raft answers travels in the answer of the request it answers.
//!
//! A follower that gets an append acknowledges it a sync later. A request of its own for that would cost both members about as much as
//! the append did, so the append's request waits a little, and the acknowledgement rides in its `200`. Whoever sent the request checks
//! the answer's messages as it checks those of a request.
//!
//! Per peer and lane one request waits at most: the next one lets it go with an empty answer, so that a sender never has fewer places in
//! flight than it counts on. After [`PATIENCE`] it is let go in any case. A ride that nobody waits for becomes a request.

use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use raft::eraftpb::{Message, MessageType};
use tokio::sync::oneshot;

use super::lane::LaneKind;

/// How long a request waits for what may ride in its answer: several syncs of a fast disk.
const PATIENCE: Duration = Duration::from_millis(20);

/// The requests of one peer that wait for an answer's content, by lane.
#[derive(Default)]
pub(super) struct Rides(Mutex<Places>);

#[derive(Default)]
struct Places {
    control: Option<oneshot::Sender<Bytes>>,
    append: Option<oneshot::Sender<Bytes>>,
}

impl Rides {
    /// Waits for something to answer a request of this lane with. Empty: nothing came.
    pub(super) async fn wait(&self, kind: LaneKind) -> Bytes {
        let (place, filled) = oneshot::channel();
        {
            let mut places = self.0.lock();
            match kind {
                LaneKind::Control => places.control = Some(place),
                LaneKind::Append => places.append = Some(place),
            }
        }
        match tokio::time::timeout(PATIENCE, filled).await {
            Ok(Ok(body)) => body,
            // The next request took its place, or the time is over.
            Ok(Err(_)) | Err(_) => Bytes::new(),
        }
    }

    /// Whether a request seems to wait.
    pub(super) fn is_any(&self) -> bool {
        let places = self.0.lock();
        places.append.is_some() || places.control.is_some()
    }

    /// Hands a body of messages to a request that waits, given back if none does. Never both: what was taken is not sent otherwise.
    pub(super) fn give(&self, body: Bytes) -> Result<(), Bytes> {
        let mut body = body;
        loop {
            let place = {
                let mut places = self.0.lock();
                places.append.take().or_else(|| places.control.take())
            };
            let Some(place) = place else { return Err(body) };
            match place.send(body) {
                Ok(()) => return Ok(()),
                // It gave up meanwhile.
                Err(returned) => body = returned,
            }
        }
    }
}

/// Whether raft answers one of these soon, so that waiting for it may pay.
pub(super) fn asks(messages: &[Message]) -> bool {
    messages.iter().any(|message| {
        matches!(
            message.get_msg_type(),
            MessageType::MsgAppend
                | MessageType::MsgHeartbeat
                | MessageType::MsgReadIndex
                | MessageType::MsgRequestVote
                | MessageType::MsgRequestPreVote
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_ride_goes_to_the_request_that_waits_and_otherwise_comes_back() {
        let rides = Rides::default();
        assert_eq!(rides.give(Bytes::from_static(b"a")), Err(Bytes::from_static(b"a")));
        let (answer, ()) = tokio::join!(rides.wait(LaneKind::Append), async {
            assert!(rides.is_any());
            assert_eq!(rides.give(Bytes::from_static(b"a")), Ok(()));
        });
        assert_eq!(answer, b"a"[..]);
        assert!(!rides.is_any());
    }

    #[tokio::test]
    async fn the_next_request_of_a_lane_lets_the_one_before_it_go_empty() {
        let rides = Rides::default();
        let (first, second, other, ()) = tokio::join!(
            rides.wait(LaneKind::Append),
            rides.wait(LaneKind::Append),
            rides.wait(LaneKind::Control),
            async {
                assert_eq!(rides.give(Bytes::from_static(b"1")), Ok(()));
                assert_eq!(rides.give(Bytes::from_static(b"2")), Ok(()));
            }
        );
        assert_eq!(
            (first, second, other),
            (Bytes::new(), Bytes::from_static(b"1"), Bytes::from_static(b"2"))
        );
    }

    #[tokio::test]
    async fn who_waited_long_enough_goes_empty_and_takes_nothing_with_it() {
        let rides = Rides::default();
        assert_eq!(rides.wait(LaneKind::Control).await, Bytes::new());
        assert_eq!(rides.give(Bytes::from_static(b"late")), Err(Bytes::from_static(b"late")));
    }
}
