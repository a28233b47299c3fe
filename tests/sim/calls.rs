//! Requests of clients that are on their way or being served: each is answered once, or never.

use std::collections::BTreeMap;
use std::sync::Arc;

use metcd::consensus::proposals::Gate;
use metcd::state::command::{Command, KeySpan};
use metcd::state::outcome::{KeyValue, Outcome, Refusal};
use metcd::state::reader::{RangeQuery, StateReader};

use crate::plan::{MS, Micros};
use crate::world::{Event, World};

/// What a client asks a member.
#[derive(Debug, Clone)]
pub enum Request {
    /// A command, and how long the client waits for it.
    Write(Command, Micros),
    /// A list: linearizable behind the barrier, serializable without.
    Read {
        span: KeySpan,
        barrier: bool,
        min_revision: u64,
    },
    KeepAlive(u64),
}

/// What it hears.
#[derive(Debug, Clone)]
pub enum Answer {
    Outcome(Outcome),
    Page {
        revision: u64,
        kvs: Vec<KeyValue>,
    },
    /// A lease was renewed.
    Renewed {
        ttl_ms: u64,
    },
    /// There is no such lease.
    Gone,
    /// Nothing happened, and nothing will.
    NotApplied,
    /// Nobody knows.
    Unknown,
}

struct Call {
    client: usize,
    slot: usize,
    boot: u64,
    until: Micros,
    request: Request,
    gate: Option<Arc<Gate>>,
}

/// All of them.
#[derive(Default)]
pub struct Calls {
    open: BTreeMap<u64, Call>,
    last: u64,
}

impl Calls {
    pub fn note_gate(&mut self, call: u64, gate: Arc<Gate>) {
        if let Some(call) = self.open.get_mut(&call) {
            call.gate = Some(gate);
        }
    }

    /// Lease and end of the client's patience.
    pub fn renewal(&self, call: u64) -> Option<(u64, Micros)> {
        let call = self.open.get(&call)?;
        match call.request {
            Request::KeepAlive(lease) => Some((lease, call.until)),
            Request::Write(..) | Request::Read { .. } => None,
        }
    }
}

impl World {
    /// A client sends a request to the member in this slot, and waits `patience`.
    pub fn call(&mut self, client: usize, slot: usize, request: Request, patience: Micros) -> u64 {
        self.calls.last += 1;
        let id = self.calls.last;
        let until = self.now + patience;
        let boot = self.machines[slot].boot;
        let call = Call {
            client,
            slot,
            boot,
            until,
            request,
            gate: None,
        };
        self.calls.open.insert(id, call);
        let at = self.now + self.rng.skewed(50, 3 * MS);
        self.schedule(at, Event::Request { call: id });
        self.schedule(until, Event::CallTimeout { call: id });
        id
    }

    /// The request reaches the machine.
    pub fn deliver_request(&mut self, id: u64) {
        let Some(call) = self.calls.open.get_mut(&id) else { return };
        let (slot, request) = (call.slot, call.request.clone());
        let machine = &mut self.machines[slot];
        if machine.is_paused {
            machine.stalled.push(Event::Request { call: id });
            return;
        }
        if machine.process.is_none() {
            // Connection refused: nobody has seen the request.
            return self.refuse(id);
        }
        call.boot = machine.boot;
        self.with_process(slot, |process, world| process.request(world, id, request));
    }

    /// The request's time is over.
    pub fn call_timeout(&mut self, id: u64) {
        let Some(call) = self.calls.open.get(&id) else { return };
        let machine = &self.machines[call.slot];
        if machine.process.is_some() && !machine.is_paused && machine.boot == call.boot {
            self.give_up(id);
        } else {
            // The client's own clock: nothing is known.
            self.answer(id, Answer::Unknown);
        }
    }

    /// A process died: whatever it was serving is unknown.
    pub fn drop_calls_of(&mut self, slot: usize) {
        let boot = self.machines[slot].boot;
        let of = |call: &Call| call.slot == slot && call.boot == boot;
        let dead: Vec<u64> = self.calls.open.iter().filter(|(_, call)| of(call)).map(|(&id, _)| id).collect();
        for id in dead {
            self.answer(id, Answer::Unknown);
        }
    }

    /// The member's deadline: the gate tells whether the command was handed to raft.
    pub fn give_up(&mut self, id: u64) {
        let Some(call) = self.calls.open.get(&id) else { return };
        let is_cancelled = match (&call.gate, &call.request) {
            (Some(gate), _) => gate.cancel(),
            (None, Request::Write(..)) => false,
            (None, Request::Read { .. } | Request::KeepAlive(_)) => true,
        };
        let answer = if is_cancelled { Answer::NotApplied } else { Answer::Unknown };
        self.answer(id, answer);
    }

    /// The member refuses before anything was proposed.
    pub fn refuse(&mut self, id: u64) {
        self.answer(id, Answer::NotApplied);
    }

    pub fn answer_outcome(&mut self, id: u64, outcome: Outcome) {
        let answer = match outcome.result {
            Err(Refusal::AlreadyApplied) => Answer::Unknown,
            _ => Answer::Outcome(outcome),
        };
        self.answer(id, answer);
    }

    /// `false`: the member is not as far as the client wants.
    pub fn answer_read(&mut self, id: u64, reader: &StateReader) -> bool {
        let Some(call) = self.calls.open.get(&id) else { return true };
        let Request::Read { span, min_revision, .. } = &call.request else {
            return true;
        };
        if reader.revision() < *min_revision {
            return false;
        }
        let query = RangeQuery {
            span: span.clone(),
            revision: None,
            limit: 10_000,
            after: None,
            descending: false,
            keys_only: false,
            count_only: false,
            with_count: false,
            max_bytes: usize::MAX,
        };
        match reader.range(&query) {
            Ok(page) => self.answer(
                id,
                Answer::Page {
                    revision: page.revision,
                    kvs: page.kvs,
                },
            ),
            Err(error) => self.violation(format!("a read of the current revision failed: {error}")),
        }
        true
    }

    pub fn answer_renewal(&mut self, id: u64, ttl_ms: Option<u64>, gone: bool) {
        let answer = match ttl_ms {
            Some(ttl_ms) => Answer::Renewed { ttl_ms },
            None if gone => Answer::Gone,
            None => Answer::Unknown,
        };
        self.answer(id, answer);
    }

    /// The one place where a call ends. Now and then the connection breaks just then.
    fn answer(&mut self, id: u64, answer: Answer) {
        let Some(call) = self.calls.open.remove(&id) else { return };
        let is_lost = self.faults_are_on() && self.rng.chance(10);
        let answer = if is_lost { Answer::Unknown } else { answer };
        let at = self.now + self.rng.skewed(50, 3 * MS);
        let client = call.client;
        self.schedule(at, Event::Answer { client, call: id, answer });
    }
}
