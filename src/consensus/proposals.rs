//! Proposals of this member that wait for their result: handed to raft, handed again after a failover, until applied or past their deadline.
//!
//! *Invariants*
//! - A command gets its sequence when it arrives here, so the low-water mark in every entry covers all that still wait (Raft thesis §6.3).
//! - A command handed to raft once keeps its identity for ever (rule 15); state applies it once (rule 14).
//! - A command whose gate was cancelled before it was handed over is never handed over: that is what makes `not_applied` true.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};

use bytes::Bytes;

use crate::state::command::FEATURE_LEVEL;

/// Ticks after which an entry under way no longer makes others wait.
const MAX_GATHERING_TICKS: u64 = 3;
/// Commands of so many bytes make an entry that is worth its costs, whatever is under way.
const MIN_GATHERED_BYTES: usize = 256 << 10;

const QUEUED: u8 = 0;
const HANDED: u8 = 1;
const CANCELLED: u8 = 2;

/// Decides, once, whether a command was handed to raft or given up before.
#[derive(Debug, Default)]
pub struct Gate {
    state: AtomicU8,
    /// One more than the protocol's time in milliseconds when it was handed to raft first; 0: not yet.
    handed_ms: AtomicU64,
    /// What is counted down when neither side has it any more.
    counter: Option<Arc<AtomicUsize>>,
}

impl Drop for Gate {
    fn drop(&mut self) {
        if let Some(counter) = &self.counter {
            counter.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Gate {
    /// A gate that counts in `counter` for as long as somebody waits for its command, or raft's side may still hand it over.
    pub fn counted(counter: &Arc<AtomicUsize>) -> Gate {
        counter.fetch_add(1, Ordering::Relaxed);
        Gate {
            state: AtomicU8::new(QUEUED),
            handed_ms: AtomicU64::new(0),
            counter: Some(counter.clone()),
        }
    }

    fn is_cancelled(&self) -> bool {
        self.state.load(Ordering::Acquire) == CANCELLED
    }

    /// The waiting side gives up. `true`: it was never handed to raft, and never will be.
    pub fn cancel(&self) -> bool {
        match self.state.compare_exchange(QUEUED, CANCELLED, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => true,
            Err(now) => now == CANCELLED || mutant!(CancelAfterHandOver),
        }
    }

    /// When it was handed to raft first, in milliseconds of the driver's clock. For figures only.
    pub fn handed_ms(&self) -> Option<u64> {
        self.handed_ms.load(Ordering::Relaxed).checked_sub(1)
    }

    /// Raft's side takes it. `false`: cancelled before.
    fn hand_over(&self, now_ms: u64) -> bool {
        match self.state.compare_exchange(QUEUED, HANDED, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => {
                self.handed_ms.store(now_ms.saturating_add(1), Ordering::Relaxed);
                true
            }
            Err(now) => now == HANDED,
        }
    }
}

/// A command on its way in: everything of [`crate::state::command::Command`] but the sequence, encoded.
#[derive(Debug, Clone)]
pub struct Proposal {
    /// Encoded `Command` without its `seq`.
    pub body: Bytes,
    /// See [`Gate`].
    pub gate: Arc<Gate>,
    /// After so many ticks from its arrival nobody waits for it any more.
    pub ttl_ticks: u64,
}

#[derive(Debug)]
struct Pending {
    body: Bytes,
    gate: Arc<Gate>,
    deadline_tick: u64,
    /// When it was last handed to raft, and in which term; `None`: not since it was queued (or dropped).
    handed: Option<(u64, u64)>,
}

/// The table of waiting proposals.
#[derive(Debug)]
pub struct Proposals {
    member: u64,
    boot: u64,
    next_seq: u64,
    /// The driver's clock, for [`Gate::handed_ms`] only.
    now_ms: u64,
    pending: BTreeMap<u64, Pending>,
    /// Sequences to hand to raft at the next opportunity, in order.
    queue: BTreeSet<u64>,
    /// Bytes of what is in the queue.
    queued_bytes: usize,
    /// (last sequence, tick) of each entry that is under way, oldest first.
    entries: VecDeque<(u64, u64)>,
}

impl Proposals {
    /// Nothing waits yet.
    pub fn new(member: u64, boot: u64) -> Proposals {
        Proposals {
            member,
            boot,
            next_seq: 1,
            now_ms: 0,
            pending: BTreeMap::new(),
            queue: BTreeSet::new(),
            queued_bytes: 0,
            entries: VecDeque::new(),
        }
    }

    /// The current time of the driver's monotonic clock. Nothing is decided by it.
    pub fn set_now(&mut self, now_ms: u64) {
        self.now_ms = now_ms;
    }

    /// Takes a proposal in and gives it its sequence.
    pub fn add(&mut self, proposal: Proposal, tick: u64) -> u64 {
        let seq = self.next_seq;
        self.next_seq += 1;
        let deadline_tick = tick.saturating_add(proposal.ttl_ticks);
        self.pending.insert(
            seq,
            Pending {
                body: proposal.body,
                gate: proposal.gate,
                deadline_tick,
                handed: None,
            },
        );
        self.enqueue(seq);
        seq
    }

    /// It was applied: nobody needs to propose it any more.
    pub fn settle(&mut self, seq: u64) {
        self.dequeue(seq);
        self.pending.remove(&seq);
        while self.entries.front().is_some_and(|(last, _)| !self.pending.contains_key(last)) {
            self.entries.pop_front();
        }
    }

    fn enqueue(&mut self, seq: u64) {
        if self.queue.insert(seq) {
            self.queued_bytes += self.pending.get(&seq).map_or(0, |pending| pending.body.len());
        }
    }

    fn dequeue(&mut self, seq: u64) {
        if self.queue.remove(&seq) {
            self.queued_bytes -= self.pending.get(&seq).map_or(0, |pending| pending.body.len());
        }
    }

    /// Whether what is queued had better wait for more: an entry is under way, and one more of this size would only cost every member
    /// an append, a sync and an answer more. An entry that is under way for long may be lost and makes nobody wait.
    pub fn is_gathering(&self, tick: u64) -> bool {
        let is_fresh = |(_, since): &(u64, u64)| tick.saturating_sub(*since) < MAX_GATHERING_TICKS;
        self.queued_bytes < MIN_GATHERED_BYTES && self.entries.iter().any(is_fresh)
    }

    /// Proposals that still wait.
    pub fn waiting(&self) -> usize {
        self.pending.len()
    }

    /// Handed to raft and not yet settled.
    pub fn in_flight(&self) -> usize {
        self.pending.len() - self.queue.len()
    }

    /// Whether anything is to be handed to raft.
    pub fn has_queued(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Drops what nobody waits for any more, or was given up before it was handed over; returns their sequences.
    pub fn expire(&mut self, tick: u64) -> Vec<u64> {
        let expired: Vec<u64> = self
            .pending
            .iter()
            .filter(|(_, p)| p.deadline_tick <= tick || p.gate.is_cancelled())
            .map(|(&seq, _)| seq)
            .collect();
        for seq in &expired {
            self.settle(*seq);
        }
        expired
    }

    /// Queues again what was handed over in another term, or longer than `patience` ticks ago (rule 18).
    pub fn requeue(&mut self, term: u64, tick: u64, patience: u64) {
        if mutant!(NewSequence) {
            return self.requeue_as_new(term, tick, patience);
        }
        let stale = self.stale(term, tick, patience);
        if !stale.is_empty() {
            self.entries.clear();
        }
        for seq in stale {
            self.enqueue(seq);
        }
    }

    fn stale(&self, term: u64, tick: u64, patience: u64) -> Vec<u64> {
        let is_stale = |pending: &Pending| {
            pending
                .handed
                .is_some_and(|(at, handed_term)| handed_term != term || tick.saturating_sub(at) >= patience)
        };
        self.pending
            .iter()
            .filter(|(_, pending)| is_stale(pending))
            .map(|(&seq, _)| seq)
            .collect()
    }

    #[cfg(not(feature = "mutants"))]
    fn requeue_as_new(&mut self, _term: u64, _tick: u64, _patience: u64) {}

    #[cfg(feature = "mutants")]
    fn requeue_as_new(&mut self, term: u64, tick: u64, patience: u64) {
        for seq in self.stale(term, tick, patience) {
            if let Some(pending) = self.pending.remove(&seq) {
                self.pending.insert(self.next_seq, pending);
                self.enqueue(self.next_seq);
                self.next_seq += 1;
            }
        }
    }

    /// Packs queued commands into the data of one entry of at most `max_bytes` (a larger single command gets an entry of its own)
    /// and hands them over. `None` if nothing is left to hand over.
    pub fn pack(&mut self, max_bytes: usize, term: u64, tick: u64) -> Option<(Vec<u8>, Vec<u64>)> {
        let low_water = self.pending.keys().next().copied().unwrap_or(self.next_seq);
        let mut data = Vec::new();
        put_field(&mut data, 1, u64::from(FEATURE_LEVEL));
        put_field(&mut data, 2, self.member);
        put_field(&mut data, 3, self.boot);
        put_field(&mut data, 4, low_water);
        let mut packed = Vec::new();
        while let Some(&seq) = self.queue.first() {
            let size = self.pending.get(&seq).map_or(0, |pending| pending.body.len());
            if !packed.is_empty() && data.len() + size > max_bytes {
                break;
            }
            self.dequeue(seq);
            let Some(pending) = self.pending.get_mut(&seq) else { continue };
            if !pending.gate.hand_over(self.now_ms) {
                self.pending.remove(&seq);
                continue;
            }
            pending.handed = Some((tick, term));
            put_command(&mut data, seq, &pending.body);
            packed.push(seq);
        }
        self.entries.push_back((*packed.last()?, tick));
        Some((data, packed))
    }

    /// Raft dropped an entry that was packed: its commands wait for the next opportunity.
    pub fn dropped(&mut self, seqs: &[u64]) {
        for &seq in seqs {
            if let Some(pending) = self.pending.get_mut(&seq) {
                pending.handed = None;
                self.enqueue(seq);
            }
        }
        self.entries.pop_back();
    }
}

/// Appends a protobuf varint field. The payload is put together from commands that are already encoded, so its frame is written by hand
/// ([`crate::state::command::EntryPayload`] reads it; a test holds the two together).
fn put_field(data: &mut Vec<u8>, tag: u32, value: u64) {
    prost::encoding::encode_varint(u64::from(tag << 3), data);
    prost::encoding::encode_varint(value, data);
}

fn put_command(data: &mut Vec<u8>, seq: u64, body: &[u8]) {
    let seq_len = 1 + prost::encoding::encoded_len_varint(seq);
    prost::encoding::encode_varint(5 << 3 | 2, data);
    prost::encoding::encode_varint((seq_len + body.len()) as u64, data);
    put_field(data, 1, seq);
    data.extend_from_slice(body);
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;
    use crate::state::command::{Body, Command, EntryPayload, Put};

    fn proposal(key: &str, ttl_ticks: u64) -> (Proposal, Arc<Gate>) {
        let put = Put {
            key: Bytes::copy_from_slice(key.as_bytes()),
            value: Bytes::from_static(b"v"),
            ..Default::default()
        };
        let command = Command {
            seq: 0,
            idempotency: None,
            body: Some(Body::Put(put)),
        };
        let gate = Arc::new(Gate::default());
        (
            Proposal {
                body: command.encode_to_vec().into(),
                gate: gate.clone(),
                ttl_ticks,
            },
            gate,
        )
    }

    fn unpack(data: &[u8]) -> (u64, Vec<u64>) {
        let payload = EntryPayload::decode(data).unwrap();
        assert_eq!((payload.member, payload.boot, payload.feature_level), (7, 3, FEATURE_LEVEL));
        for command in &payload.commands {
            assert!(matches!(&command.body, Some(Body::Put(put)) if &put.value[..] == b"v"));
        }
        (payload.low_water, payload.commands.iter().map(|command| command.seq).collect())
    }

    #[test]
    fn many_commands_travel_in_one_entry_that_decodes() {
        let mut proposals = Proposals::new(7, 3);
        for key in ["a", "b", "c"] {
            proposals.add(proposal(key, 10).0, 0);
        }
        let (data, seqs) = proposals.pack(1 << 20, 1, 0).unwrap();
        assert_eq!(unpack(&data), (1, vec![1, 2, 3]));
        assert_eq!(seqs, [1, 2, 3]);
        assert!(proposals.pack(1 << 20, 1, 0).is_none());
    }

    #[test]
    fn the_low_water_mark_is_the_oldest_that_waits() {
        let mut proposals = Proposals::new(7, 3);
        for key in ["a", "b", "c"] {
            proposals.add(proposal(key, 10).0, 0);
        }
        proposals.pack(1 << 20, 1, 0);
        proposals.settle(1);
        proposals.add(proposal("d", 10).0, 0);
        assert_eq!(unpack(&proposals.pack(1 << 20, 1, 0).unwrap().0), (2, vec![4]));
    }

    #[test]
    fn a_cancelled_command_is_never_handed_over_and_a_handed_one_cannot_be_cancelled() {
        let mut proposals = Proposals::new(7, 3);
        let (first, first_gate) = proposal("a", 10);
        let (second, second_gate) = proposal("b", 10);
        proposals.add(first, 0);
        proposals.add(second, 0);
        assert!(first_gate.cancel());
        assert_eq!(unpack(&proposals.pack(1 << 20, 1, 0).unwrap().0).1, [2]);
        assert!(!second_gate.cancel());
        assert!(first_gate.cancel());
    }

    #[test]
    fn a_new_term_hands_pending_commands_over_again_under_their_old_sequence() {
        let mut proposals = Proposals::new(7, 3);
        proposals.add(proposal("a", 100).0, 0);
        proposals.pack(1 << 20, 1, 0);
        proposals.requeue(1, 5, 20);
        assert!(proposals.pack(1 << 20, 1, 5).is_none());
        proposals.requeue(2, 6, 20);
        assert_eq!(unpack(&proposals.pack(1 << 20, 2, 6).unwrap().0).1, [1]);
        proposals.requeue(2, 26, 20);
        assert_eq!(unpack(&proposals.pack(1 << 20, 2, 26).unwrap().0).1, [1]);
    }

    #[test]
    fn no_proposal_outlives_its_deadline() {
        let mut proposals = Proposals::new(7, 3);
        proposals.add(proposal("a", 10).0, 0);
        proposals.pack(1 << 20, 1, 0);
        assert!(proposals.expire(9).is_empty());
        assert_eq!(proposals.expire(10), [1]);
        proposals.requeue(2, 30, 20);
        assert!(!proposals.has_queued());
    }

    #[test]
    fn small_commands_gather_while_an_entry_is_under_way_but_not_for_long() {
        let mut proposals = Proposals::new(7, 3);
        proposals.add(proposal("a", 100).0, 0);
        assert!(!proposals.is_gathering(0));
        proposals.pack(1 << 20, 1, 0);
        proposals.add(proposal("b", 100).0, 0);
        assert!(proposals.is_gathering(0));
        assert!(!proposals.is_gathering(MAX_GATHERING_TICKS));
        proposals.settle(1);
        assert!(!proposals.is_gathering(0));
    }

    #[test]
    fn large_commands_do_not_wait_for_each_other() {
        let mut proposals = Proposals::new(7, 3);
        proposals.add(proposal("a", 100).0, 0);
        proposals.pack(1 << 20, 1, 0);
        let mut large = proposal("b", 100).0;
        large.body = vec![0; MIN_GATHERED_BYTES].into();
        proposals.add(large, 0);
        assert!(!proposals.is_gathering(0));
    }

    #[test]
    fn an_entry_is_closed_at_its_size_unless_one_command_is_larger() {
        let mut proposals = Proposals::new(7, 3);
        for key in ["a", "b"] {
            proposals.add(proposal(key, 10).0, 0);
        }
        assert_eq!(proposals.pack(1, 1, 0).unwrap().1, [1]);
        assert_eq!(proposals.pack(1, 1, 0).unwrap().1, [2]);
    }

    #[test]
    fn what_is_given_up_before_it_is_handed_over_counts_until_the_next_tick_and_goes_with_it() {
        let waiting = Arc::default();
        let mut proposals = Proposals::new(1, 1);
        let gates = [(); 2].map(|()| Arc::new(Gate::counted(&waiting)));
        let seqs = gates.clone().map(|gate| {
            let (proposal, _) = proposal("a", 1000);
            proposals.add(Proposal { gate, ..proposal }, 0)
        });
        assert!(gates[0].cancel());
        drop(gates);
        assert_eq!(waiting.load(Ordering::Relaxed), 2, "raft's side has them still");
        assert_eq!(proposals.expire(1), [seqs[0]]);
        assert_eq!(waiting.load(Ordering::Relaxed), 1);
        proposals.settle(seqs[1]);
        assert_eq!(waiting.load(Ordering::Relaxed), 0);
    }
}
