//! The receiving end of append streams: batches travel over several connections and are stepped in the order they were sent.
//!
//! A batch ahead of its turn is held; when the missing one does not come within the gap timeout it is given up and the rest is
//! stepped: to raft that is one lost message, which it answers by probing. Older epochs and duplicates are dropped.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use raft::eraftpb::Message;
use tokio::{sync::Notify, time::timeout};

use super::{
    Busy,
    wire::{Epoch, StreamPosition},
};

/// Batches held at a time; a sender has fewer in flight.
const MAX_HELD: usize = 16;

/// What became of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Delivered {
    /// Stepped, in its turn or after the gap before it was given up.
    Stepped,
    /// Of an older epoch, or seen before: dropped.
    Stale,
}

/// All streams, by sender. Bounded by the membership: only admitted senders come here.
#[derive(Default)]
pub(super) struct Streams(Mutex<HashMap<u64, Arc<Stream>>>);

impl Streams {
    pub(super) fn of(&self, sender: u64) -> Arc<Stream> {
        self.0.lock().entry(sender).or_default().clone()
    }
}

/// One sender's stream.
#[derive(Default)]
pub(super) struct Stream {
    state: Mutex<State>,
    moved: Notify,
}

#[derive(Default)]
struct State {
    /// `None` before the first batch: that one says where the stream stands.
    epoch: Option<Epoch>,
    next: u64,
    held: BTreeMap<u64, Held>,
    held_bytes: usize,
}

struct Held {
    messages: Vec<Message>,
    bytes: usize,
}

enum Arrival {
    Done(Result<Delivered, Busy>),
    Held,
}

impl Stream {
    /// Hands a batch to `step` when its turn has come. Returns once that is decided; `Busy` if a queue was full for this batch, or for
    /// one it made room for, or if too much is held.
    pub(super) async fn deliver<F>(
        &self,
        position: StreamPosition,
        messages: Vec<Message>,
        bytes: usize,
        limits: WindowLimits,
        step: F,
    ) -> Result<Delivered, Busy>
    where
        F: Fn(Vec<Message>) -> Result<(), Busy>,
    {
        let arrival = self
            .state
            .lock()
            .arrive(position, Held { messages, bytes }, limits.max_held_bytes, &step);
        match arrival {
            Arrival::Done(done) => {
                self.moved.notify_waiters();
                done
            }
            Arrival::Held => self.await_turn(position, limits.gap_timeout, step).await,
        }
    }

    async fn await_turn<F>(&self, position: StreamPosition, gap_timeout: Duration, step: F) -> Result<Delivered, Busy>
    where
        F: Fn(Vec<Message>) -> Result<(), Busy>,
    {
        let turn = async {
            loop {
                let moved = self.moved.notified();
                if !self.state.lock().holds(position) {
                    return;
                }
                moved.await;
            }
        };
        if timeout(gap_timeout, turn).await.is_ok() {
            return Ok(Delivered::Stepped);
        }
        let done = self.state.lock().give_up_gap_before(position, &step);
        self.moved.notify_waiters();
        done.map(|()| Delivered::Stepped)
    }
}

/// Bounds of a stream.
#[derive(Debug, Clone, Copy)]
pub(super) struct WindowLimits {
    pub(super) gap_timeout: Duration,
    pub(super) max_held_bytes: usize,
}

impl State {
    fn arrive(
        &mut self,
        position: StreamPosition,
        batch: Held,
        max_held_bytes: usize,
        step: &impl Fn(Vec<Message>) -> Result<(), Busy>,
    ) -> Arrival {
        self.enter_epoch(position);
        if self.epoch != Some(position.epoch) || position.seq < self.next || self.held.contains_key(&position.seq) {
            return Arrival::Done(Ok(Delivered::Stale));
        }
        if position.seq > self.next {
            if self.held.len() >= MAX_HELD || self.held_bytes + batch.bytes > max_held_bytes {
                return Arrival::Done(Err(Busy));
            }
            self.held_bytes += batch.bytes;
            self.held.insert(position.seq, batch);
            return Arrival::Held;
        }
        self.next = self.next.saturating_add(1);
        let stepped = step(batch.messages);
        let followed = self.step_consecutive(step);
        Arrival::Done(stepped.and(followed).map(|()| Delivered::Stepped))
    }

    fn enter_epoch(&mut self, position: StreamPosition) {
        if self.epoch.is_some_and(|epoch| epoch >= position.epoch) {
            return;
        }
        // This side may have restarted in the middle of a stream: then the first batch heard of is as good as any.
        self.next = if self.epoch.is_none() { position.seq } else { 1 };
        self.epoch = Some(position.epoch);
        self.held.clear();
        self.held_bytes = 0;
    }

    fn step_consecutive(&mut self, step: &impl Fn(Vec<Message>) -> Result<(), Busy>) -> Result<(), Busy> {
        let mut outcome = Ok(());
        while let Some(batch) = self.held.remove(&self.next) {
            self.held_bytes = self.held_bytes.saturating_sub(batch.bytes);
            self.next = self.next.saturating_add(1);
            outcome = step(batch.messages).and(outcome);
        }
        outcome
    }

    fn holds(&self, position: StreamPosition) -> bool {
        self.epoch == Some(position.epoch) && self.held.contains_key(&position.seq)
    }

    fn give_up_gap_before(&mut self, position: StreamPosition, step: &impl Fn(Vec<Message>) -> Result<(), Busy>) -> Result<(), Busy> {
        let mut outcome = Ok(());
        while self.holds(position) {
            let Some((&first, _)) = self.held.first_key_value() else { break };
            self.next = first;
            outcome = self.step_consecutive(step).and(outcome);
        }
        outcome
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use futures_util::future::join_all;

    use super::*;

    const PATIENT: WindowLimits = WindowLimits {
        gap_timeout: Duration::from_secs(30),
        max_held_bytes: 1000,
    };
    const HASTY: WindowLimits = WindowLimits {
        gap_timeout: Duration::from_millis(30),
        max_held_bytes: 1000,
    };

    fn at(count: u64, seq: u64) -> StreamPosition {
        StreamPosition {
            epoch: Epoch { boot: 1, count },
            seq,
        }
    }

    fn batch(index: u64) -> Vec<Message> {
        vec![Message {
            index,
            ..Message::default()
        }]
    }

    struct Stepped(RefCell<Vec<u64>>);

    impl Stepped {
        fn step(&self, messages: Vec<Message>) -> Result<(), Busy> {
            self.0.borrow_mut().extend(messages.iter().map(|message| message.index));
            Ok(())
        }
    }

    async fn deliver_all(stream: &Stream, limits: WindowLimits, positions: &[StreamPosition]) -> (Vec<Result<Delivered, Busy>>, Vec<u64>) {
        let stepped = Stepped(RefCell::default());
        let one =
            |&position: &StreamPosition| stream.deliver(position, batch(position.seq), 100, limits, |messages| stepped.step(messages));
        let outcomes = join_all(positions.iter().map(one)).await;
        (outcomes, stepped.0.into_inner())
    }

    #[tokio::test]
    async fn batches_that_overtake_each_other_are_stepped_in_order() {
        let stream = Stream::default();
        let (outcomes, stepped) = deliver_all(&stream, PATIENT, &[at(0, 1), at(0, 4), at(0, 3), at(0, 2), at(0, 5)]).await;
        assert_eq!(stepped, [1, 2, 3, 4, 5]);
        assert_eq!(outcomes, vec![Ok(Delivered::Stepped); 5]);
    }

    #[tokio::test]
    async fn a_gap_that_stays_is_given_up_and_a_late_batch_dropped() {
        let stream = Stream::default();
        let (_, stepped) = deliver_all(&stream, HASTY, &[at(0, 1), at(0, 3), at(0, 4), at(0, 6)]).await;
        assert_eq!(stepped, [1, 3, 4, 6]);
        let (outcomes, stepped) = deliver_all(&stream, HASTY, &[at(0, 2), at(0, 5), at(0, 7)]).await;
        assert_eq!(stepped, [7]);
        assert_eq!(outcomes, [Ok(Delivered::Stale), Ok(Delivered::Stale), Ok(Delivered::Stepped)]);
    }

    #[tokio::test]
    async fn duplicates_are_dropped() {
        let stream = Stream::default();
        let (outcomes, stepped) = deliver_all(&stream, HASTY, &[at(0, 1), at(0, 1), at(0, 3), at(0, 3), at(0, 2), at(0, 2)]).await;
        assert_eq!(stepped, [1, 2, 3]);
        assert_eq!(outcomes.iter().filter(|outcome| **outcome == Ok(Delivered::Stale)).count(), 3);
    }

    #[tokio::test]
    async fn a_new_epoch_begins_at_one_and_ends_the_old() {
        let stream = Stream::default();
        deliver_all(&stream, HASTY, &[at(3, 1), at(3, 2)]).await;
        let (outcomes, stepped) = deliver_all(&stream, PATIENT, &[at(4, 2), at(3, 3), at(4, 1)]).await;
        assert_eq!(stepped, [1, 2]);
        assert_eq!(outcomes, [Ok(Delivered::Stepped), Ok(Delivered::Stale), Ok(Delivered::Stepped)]);
    }

    #[tokio::test]
    async fn a_receiver_that_restarted_takes_a_stream_up_where_it_is() {
        let (outcomes, stepped) = deliver_all(&Stream::default(), PATIENT, &[at(2, 77), at(2, 78), at(2, 76)]).await;
        assert_eq!(stepped, [77, 78]);
        assert_eq!(outcomes[2], Ok(Delivered::Stale));
    }

    #[tokio::test]
    async fn what_is_held_is_bounded() {
        let stream = Stream::default();
        deliver_all(&stream, HASTY, &[at(0, 1)]).await;
        let ahead: Vec<_> = (3..20).map(|seq| at(0, seq)).collect();
        let (outcomes, _) = deliver_all(&stream, HASTY, &ahead).await;
        assert_eq!(
            outcomes.iter().filter(|outcome| outcome.is_err()).count(),
            7,
            "ten batches of 100 bytes fit"
        );
    }

    #[tokio::test]
    async fn a_full_queue_is_reported() {
        let outcome = Stream::default().deliver(at(0, 1), batch(1), 100, HASTY, |_| Err(Busy)).await;
        assert_eq!(outcome, Err(Busy));
    }
}
