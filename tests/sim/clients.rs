//! Clients: each does one thing after the other, on any member, and tells the oracles what it heard.

mod judging;

use std::collections::BTreeMap;

use bytes::Bytes;
use metcd::state::command::{
    Body, Command, Compact, Compare, CompareOp, CompareTarget, Conditions, Delete, DeleteRange, Idempotency, KeySpan, LeaseGrant,
    LeaseRevoke, Put, Txn, TxnOp, TxnOpBody,
};
use metcd::state::outcome::{Outcome, Refusal};

use crate::calls::{Answer, Request};
use crate::oracle::linear::{Expect, Value};
use crate::plan::{MS, Micros, SECOND};
use crate::world::{Event, World};

const ACCOUNTS: u64 = 4;
const DEPOSIT: i64 = 100;
/// Leases of one client at a time.
const MAX_LEASES: usize = 3;

/// What a client knows and waits for.
#[derive(Default)]
pub struct Client {
    pending: Option<Pending>,
    /// Key → revision and value as last read.
    known: BTreeMap<String, (u64, Value)>,
    /// The bank as last read: revision and amount of each account.
    bank: Vec<(u64, i64)>,
    leases: Vec<u64>,
    last_revision: u64,
    /// Finished operations.
    pub done: u64,
}

struct Pending {
    call: u64,
    intent: Intent,
    request: Request,
    /// When it was first sent, and what was known then.
    asked: Micros,
    floor: u64,
    /// The member it was first sent to, and how many terms had a leader then.
    slot: usize,
    elections: usize,
    /// It was sent before, and nobody knows what became of that.
    is_retried: bool,
}

/// What a client wants to find out or change.
#[derive(Debug, Clone)]
enum Intent {
    Read {
        key: String,
    },
    Put {
        key: String,
        value: u64,
        expect: Expect,
    },
    Delete {
        key: String,
        expect: Expect,
    },
    DeleteAll,
    /// If `key` holds `seen`: both keys are written.
    Swap {
        key: String,
        seen: u64,
        value: u64,
        other: String,
        other_value: u64,
    },
    ReadBank,
    FoundBank {
        text: String,
    },
    Transfer {
        texts: [(String, String); 2],
    },
    Grant,
    PutLeased {
        key: String,
        text: String,
    },
    KeepAlive {
        lease: u64,
    },
    Revoke,
    Other,
    /// The same request once more, with its idempotency key: the same answer, and nothing else.
    Again {
        first: Box<Outcome>,
    },
}

/// No call: the client waits before it asks again.
const NO_CALL: u64 = 0;

impl World {
    /// Whether every client has heard of everything it asked for.
    pub fn clients_are_idle(&self) -> bool {
        self.clients.iter().all(|client| client.pending.is_none())
    }

    /// A member that could be asked: any that runs; now and then one that does not.
    fn pick_member(&mut self) -> usize {
        match self.pick_live() {
            Some(slot) if !self.rng.chance(30) => slot,
            _ => self.rng.range(0, self.machines.len() as u64) as usize,
        }
    }

    pub fn pick_live(&mut self) -> Option<usize> {
        let live: Vec<usize> = (0..self.machines.len())
            .filter(|&slot| self.machines[slot].process.is_some())
            .collect();
        self.rng.pick(&live).copied()
    }

    /// The client's next operation.
    pub fn act(&mut self, client: usize) {
        if self.is_healed || self.clients[client].pending.is_some() {
            return;
        }
        let (intent, mut request) = self.choose(client);
        if let Request::Write(command, _) = &mut request
            && intent.may_have_key()
            && self.rng.chance(400)
        {
            let id = self.new_value();
            command.idempotency = Some(Idempotency {
                key: format!("op-{id}"),
                fingerprint: Bytes::from(text_of(id)),
                max_entries: 100_000,
                max_bytes: 0,
            });
        }
        // Whoever keeps leases alive does not wait for long, and asks somebody else.
        let (shortest, longest) = if self.plan.keeps_leases() {
            (300 * MS, 2 * SECOND)
        } else {
            (SECOND, 8 * SECOND)
        };
        let patience = self.rng.range(shortest, longest);
        self.ask(client, intent, request, patience);
    }

    fn ask(&mut self, client: usize, intent: Intent, request: Request, patience: Micros) {
        let request = match request {
            Request::Write(command, _) => Request::Write(command, patience),
            other => other,
        };
        let slot = self.pick_member();
        let floor = self.oracle.floor();
        self.trace(|| format!("c{client} asks n{}: {intent:?}", slot + 1));
        let call = self.call(client, slot, request.clone(), patience);
        self.stats.operations += 1;
        self.clients[client].pending = Some(Pending {
            call,
            intent,
            request,
            asked: self.now,
            floor,
            slot,
            elections: self.oracle.raft.elections(),
            is_retried: false,
        });
    }

    /// The client has waited, perhaps for another leader, and asks again.
    pub fn ask_again_now(&mut self, client: usize) {
        if let Some(pending) = self.clients[client].pending.take_if(|pending| pending.call == NO_CALL) {
            self.retry(client, pending);
        }
    }

    /// The same request under the same idempotency key, to any member.
    fn retry(&mut self, client: usize, mut pending: Pending) {
        let slot = self.pick_member();
        pending.call = self.call(client, slot, pending.request.clone(), 5 * SECOND);
        self.stats.retries += 1;
        self.stats.retries_elsewhere += u64::from(slot != pending.slot);
        self.stats.retries_in_later_terms += u64::from(self.oracle.raft.elections() > pending.elections);
        self.clients[client].pending = Some(pending);
    }

    /// In the end every member is asked for every key.
    pub fn ask_everything(&mut self) {
        for slot in 0..self.machines.len() {
            if self.machines[slot].process.is_none() {
                continue;
            }
            for n in 0..=self.plan.keys {
                let client = self.clients.len();
                self.clients.push(Client::default());
                let key = key_name(n);
                let (intent, span) = if n == self.plan.keys {
                    (Intent::ReadBank, KeySpan::prefix(b"b"))
                } else {
                    (Intent::Read { key: key.clone() }, KeySpan::single(key.as_bytes()))
                };
                let request = read(span, true, 0);
                let floor = self.oracle.floor();
                let call = self.call(client, slot, request.clone(), 20 * SECOND);
                self.clients[client].pending = Some(Pending {
                    call,
                    intent,
                    request,
                    asked: self.now,
                    floor,
                    slot,
                    elections: self.oracle.raft.elections(),
                    is_retried: false,
                });
            }
        }
    }

    fn new_value(&mut self) -> u64 {
        self.last_value += 1;
        self.last_value
    }

    fn choose(&mut self, client: usize) -> (Intent, Request) {
        let n = self.rng.range(0, self.plan.keys);
        let key = key_name(n);
        let known = self.clients[client].known.get(&key).copied();
        if self.rng.range(0, 100) < self.plan.lease_share {
            return self.choose_lease(client);
        }
        match self.rng.range(0, 91) {
            0..20 => self.choose_put(key, Expect::Anything, None),
            20..24 => self.choose_put(key, Expect::Absent, None),
            24..36 => match known {
                Some((revision, Some(value))) => self.choose_put(key, Expect::Is(value), Some(revision)),
                Some((_, None)) | None => self.choose_put(key, Expect::Present, None),
            },
            36..52 => choose_read(key, true, 0),
            52..57 => choose_read(key, false, 0),
            57..60 => choose_read(key, false, self.clients[client].last_revision),
            60..65 => choose_delete(key, Expect::Present, None),
            65..67 => match known {
                Some((revision, Some(value))) => choose_delete(key, Expect::Is(value), Some(revision)),
                Some((_, None)) | None => choose_read(key, true, 0),
            },
            67..68 => (
                Intent::DeleteAll,
                write(Body::DeleteRange(DeleteRange {
                    span: KeySpan::prefix(b"k"),
                    max_keys: 0,
                })),
            ),
            68..74 => match known {
                Some((_, Some(seen))) => self.choose_swap(key, seen),
                Some((_, None)) | None => choose_read(key, true, 0),
            },
            74..80 => (Intent::ReadBank, read(KeySpan::prefix(b"b"), true, 0)),
            80..81 => (Intent::ReadBank, read(KeySpan::prefix(b"b"), false, 0)),
            81..90 => self.choose_transfer(client),
            _ => {
                let revision = self.clients[client].last_revision;
                (Intent::Other, write(Body::Compact(Compact { revision })))
            }
        }
    }

    fn choose_put(&mut self, key: String, expect: Expect, revision: Option<u64>) -> (Intent, Request) {
        let value = self.new_value();
        let body = Body::Put(Put {
            key: key.clone().into(),
            value: text_of(value).into(),
            conditions: conditions(expect, revision),
            ..Put::default()
        });
        (Intent::Put { key, value, expect }, write(body))
    }

    fn choose_swap(&mut self, key: String, seen: u64) -> (Intent, Request) {
        let n = self.rng.range(0, self.plan.keys);
        let mut other = key_name(n);
        if other == key {
            other = key_name(self.plan.keys + 1);
        }
        let (value, other_value) = (self.new_value(), self.new_value());
        let txn = Txn {
            compare: vec![Compare {
                key: key.clone().into(),
                target: CompareTarget::Value as i32,
                op: CompareOp::Equal as i32,
                value: text_of(seen).into(),
                ..Compare::default()
            }],
            then: vec![put_op(&key, text_of(value)), put_op(&other, text_of(other_value))],
            ..Txn::default()
        };
        let intent = Intent::Swap {
            key,
            seen,
            value,
            other,
            other_value,
        };
        (intent, write(Body::Txn(txn)))
    }

    fn choose_transfer(&mut self, client: usize) -> (Intent, Request) {
        let bank = &self.clients[client].bank;
        if bank.len() < ACCOUNTS as usize {
            let id = self.new_value();
            let text = format!("{DEPOSIT}:{id}");
            let compare = |n| version_is_zero(&account(n));
            let txn = Txn {
                compare: (0..ACCOUNTS).map(compare).collect(),
                then: (0..ACCOUNTS).map(|n| put_op(&account(n), text.clone())).collect(),
                ..Txn::default()
            };
            return (Intent::FoundBank { text }, write(Body::Txn(txn)));
        }
        let from = self.rng.range(0, ACCOUNTS);
        let to = (from + self.rng.range(1, ACCOUNTS)) % ACCOUNTS;
        let amount = self.rng.range(1, 20) as i64;
        let id = self.new_value();
        let bank = &self.clients[client].bank;
        let of = |n: u64, change: i64| (account(n), format!("{}:{id}", bank[n as usize].1 + change));
        let texts = [of(from, -amount), of(to, amount)];
        let compare = |n: u64| Compare {
            key: account(n).into(),
            target: CompareTarget::ModRevision as i32,
            op: CompareOp::Equal as i32,
            number: bank[n as usize].0,
            ..Compare::default()
        };
        let txn = Txn {
            compare: vec![compare(from), compare(to)],
            then: texts.iter().map(|(key, text)| put_op(key, text.clone())).collect(),
            ..Txn::default()
        };
        (Intent::Transfer { texts }, write(Body::Txn(txn)))
    }

    fn choose_lease(&mut self, client: usize) -> (Intent, Request) {
        let leases = self.clients[client].leases.clone();
        let Some(&lease) = self
            .rng
            .pick(&leases)
            .filter(|_| leases.len() >= MAX_LEASES || !self.rng.chance(300))
        else {
            let all = if self.plan.keeps_leases() {
                [2_000, 3_000, 5_000]
            } else {
                [500, 2_000, 10_000]
            };
            let ttl_ms = all[self.rng.range(0, 3) as usize];
            return (Intent::Grant, write(Body::LeaseGrant(LeaseGrant { ttl_ms, id: 0 })));
        };
        match self.rng.range(0, if self.plan.keeps_leases() { 40 } else { 10 }) {
            0..2 => {
                let (key, id) = (format!("l{lease}"), self.new_value());
                let text = format!("l:{id}");
                let body = Body::Put(Put {
                    key: key.clone().into(),
                    value: text.clone().into(),
                    lease,
                    ..Put::default()
                });
                (Intent::PutLeased { key, text }, write(body))
            }
            2 => {
                self.oracle.lease.note_revoked(lease);
                self.clients[client].leases.retain(|&other| other != lease);
                (Intent::Revoke, write(Body::LeaseRevoke(LeaseRevoke { id: lease })))
            }
            _ => (Intent::KeepAlive { lease }, Request::KeepAlive(lease)),
        }
    }

    /// An answer reached the client.
    pub fn hear(&mut self, client: usize, call: u64, answer: Answer) {
        let is_awaited = self.clients[client].pending.as_ref().is_some_and(|pending| pending.call == call);
        if !is_awaited {
            return;
        }
        let Some(mut pending) = self.clients[client].pending.take() else {
            return;
        };
        self.trace(|| format!("c{client} hears {answer:?} to {:?}", pending.intent));
        let has_key = matches!(&pending.request, Request::Write(command, _) if command.idempotency.is_some());
        let failed = matches!(answer, Answer::Unknown | Answer::NotApplied);
        // With an Idempotency-Key a client may simply ask again: whatever comes, it happens once.
        if failed && has_key && (self.is_healed || self.rng.chance(800)) {
            pending.is_retried |= matches!(answer, Answer::Unknown);
            if self.is_healed || self.rng.chance(700) {
                return self.retry(client, pending);
            }
            pending.call = NO_CALL;
            self.clients[client].pending = Some(pending);
            let at = self.now + self.rng.skewed(100 * MS, 8 * SECOND);
            return self.schedule(at, Event::Retry { client });
        }
        // What an earlier try may have done is not undone by a later refusal.
        let answer = if pending.is_retried && matches!(answer, Answer::NotApplied) {
            Answer::Unknown
        } else {
            answer
        };
        let outcome = match &answer {
            Answer::Outcome(outcome) if has_key => Some(outcome.clone()),
            _ => None,
        };
        if let Err(fault) = self.judge(client, &pending, answer) {
            self.violation(fault);
        }
        self.clients[client].done += 1;
        if let Some(outcome) = outcome {
            if pending.is_retried && outcome.replayed {
                *self.stats.replays.entry(pending.intent.kind()).or_default() += 1;
            }
            // Somebody on the way sends it twice, although it was answered.
            if is_remembered(&outcome) && !self.is_healed && self.rng.chance(100) {
                let first = Box::new(outcome);
                return self.ask(client, Intent::Again { first }, pending.request, 5 * SECOND);
            }
        }
        let at = self.now + self.rng.skewed(MS, self.plan.think);
        self.schedule(at, Event::Act { client });
    }
}

impl Intent {
    /// The values it would write.
    fn texts(&self) -> Vec<String> {
        match self {
            Intent::Put { value, .. } => vec![text_of(*value)],
            Intent::Swap { value, other_value, .. } => vec![text_of(*value), text_of(*other_value)],
            Intent::Transfer { texts } => texts.iter().map(|(_, text)| text.clone()).collect(),
            Intent::FoundBank { text } | Intent::PutLeased { text, .. } => vec![text.clone()],
            Intent::Read { .. }
            | Intent::Delete { .. }
            | Intent::DeleteAll
            | Intent::ReadBank
            | Intent::Grant
            | Intent::KeepAlive { .. }
            | Intent::Revoke
            | Intent::Other
            | Intent::Again { .. } => Vec::new(),
        }
    }

    /// Whether it may be sent with an idempotency key.
    fn may_have_key(&self) -> bool {
        match self {
            Intent::Put { .. }
            | Intent::Delete { .. }
            | Intent::DeleteAll
            | Intent::Swap { .. }
            | Intent::FoundBank { .. }
            | Intent::Transfer { .. }
            | Intent::Grant
            | Intent::PutLeased { .. } => true,
            Intent::Read { .. } | Intent::ReadBank | Intent::KeepAlive { .. } | Intent::Revoke | Intent::Other | Intent::Again { .. } => {
                false
            }
        }
    }

    /// For the figures.
    fn kind(&self) -> &'static str {
        match self {
            Intent::Put { expect, .. } | Intent::Delete { expect, .. } if matches!(expect, Expect::Is(_) | Expect::Absent) => {
                "conditional write"
            }
            Intent::Put { .. } | Intent::PutLeased { .. } => "put",
            Intent::Delete { .. } | Intent::DeleteAll => "delete",
            Intent::Swap { .. } | Intent::FoundBank { .. } | Intent::Transfer { .. } => "transaction",
            Intent::Grant => "grant",
            _ => "other",
        }
    }
}

/// Whether an answer is kept for whoever asks again.
fn is_remembered(outcome: &Outcome) -> bool {
    match &outcome.result {
        Ok(_) => true,
        Err(refusal) => matches!(
            refusal,
            Refusal::NotFound | Refusal::PreconditionFailed { .. } | Refusal::LeaseNotFound { .. }
        ),
    }
}

fn key_name(n: u64) -> String {
    format!("k{n}")
}

fn account(n: u64) -> String {
    format!("b{n}")
}

fn text_of(value: u64) -> String {
    format!("v{value}")
}

fn value_of(text: &str) -> Value {
    text.strip_prefix('v')?.parse().ok()
}

fn amount_of(value: &[u8]) -> i64 {
    let text = String::from_utf8_lossy(value);
    text.split(':')
        .next()
        .and_then(|amount| amount.parse().ok())
        .unwrap_or(i64::MIN / 1000)
}

fn write(body: Body) -> Request {
    let command = Command {
        seq: 0,
        idempotency: None,
        body: Some(body),
    };
    Request::Write(command, 0)
}

fn read(span: KeySpan, barrier: bool, min_revision: u64) -> Request {
    Request::Read {
        span,
        barrier,
        min_revision,
    }
}

fn choose_read(key: String, barrier: bool, min_revision: u64) -> (Intent, Request) {
    let request = read(KeySpan::single(key.as_bytes()), barrier, min_revision);
    (Intent::Read { key }, request)
}

fn choose_delete(key: String, expect: Expect, revision: Option<u64>) -> (Intent, Request) {
    let body = Body::Delete(Delete {
        key: key.clone().into(),
        conditions: revision.and_then(|revision| conditions(expect, Some(revision))),
        want_prev: false,
    });
    (Intent::Delete { key, expect }, write(body))
}

fn conditions(expect: Expect, revision: Option<u64>) -> Option<Conditions> {
    let mut conditions = Conditions::default();
    match expect {
        Expect::Anything => return None,
        Expect::Present => conditions.if_match_any = true,
        Expect::Absent => conditions.if_none_match_any = true,
        Expect::Is(_) => conditions.if_match.extend(revision),
    }
    Some(conditions)
}

fn put_op(key: &str, text: String) -> TxnOp {
    let put = Put {
        key: Bytes::copy_from_slice(key.as_bytes()),
        value: text.into(),
        ..Put::default()
    };
    TxnOp {
        body: Some(TxnOpBody::Put(put)),
    }
}

fn version_is_zero(key: &str) -> Compare {
    Compare {
        key: Bytes::copy_from_slice(key.as_bytes()),
        target: CompareTarget::Version as i32,
        op: CompareOp::Equal as i32,
        ..Compare::default()
    }
}
