//! The same rules once more, written in the simplest way: a map per revision, nothing shared with the state machine.

use std::collections::BTreeMap;

use metcd::state::command::{Body, Command, Compare, CompareOp, CompareTarget, Conditions, KeySpan, Put, TxnGet, TxnOp, TxnOpBody};
use metcd::state::outcome::{KeyValue, Outcome, Refusal, Success, TxnResponse};
use metcd::state::watch::{Event, EventKind};

pub type Keys = BTreeMap<Vec<u8>, KeyValue>;

/// A version of a key for the count of logical bytes.
struct Counted {
    bytes: u64,
    dead_at: u64,
}

#[derive(Default)]
pub struct Model {
    /// Contents at each revision, from 0.
    pub at: Vec<Keys>,
    /// Events of each revision.
    pub events: BTreeMap<u64, Vec<Event>>,
    pub compacted_revision: u64,
    pub leases: BTreeMap<u64, (u64, bool)>,
    last_lease: u64,
    counted: Vec<Counted>,
    newest: BTreeMap<Vec<u8>, usize>,
    idempotency: BTreeMap<String, (Vec<u8>, u64, Outcome)>,
    /// Contents while a command runs, and the changes it made.
    now: Keys,
    changes: Vec<Event>,
}

const OVERHEAD: u64 = 64;

impl Model {
    pub fn new() -> Model {
        Model {
            at: vec![Keys::new(), Keys::new()],
            ..Model::default()
        }
    }

    pub fn revision(&self) -> u64 {
        self.at.len() as u64 - 1
    }

    pub fn current(&self) -> &Keys {
        self.at.last().unwrap()
    }

    pub fn logical_bytes(&self) -> u64 {
        self.counted
            .iter()
            .filter(|version| version.dead_at > self.compacted_revision)
            .map(|version| version.bytes)
            .sum()
    }

    pub fn lease_keys(&self, id: u64) -> Vec<Vec<u8>> {
        self.current()
            .values()
            .filter(|kv| kv.lease == id)
            .map(|kv| kv.key.to_vec())
            .collect()
    }

    pub fn run(&mut self, command: &Command, term: u64, time_ms: u64) -> Outcome {
        if let Some(wanted) = &command.idempotency {
            match self.idempotency.get(&wanted.key) {
                Some((fingerprint, _, outcome)) if *fingerprint == wanted.fingerprint[..] => {
                    return Outcome {
                        replayed: true,
                        ..outcome.clone()
                    };
                }
                Some(_) => return self.outcome(Err(Refusal::IdempotencyKeyReused)),
                None if self.idempotency.len() as u64 >= wanted.max_entries => {
                    return self.outcome(Err(Refusal::IdempotencyTableFull));
                }
                None => {}
            }
        }
        self.now = self.current().clone();
        self.changes.clear();
        let result = self.execute(command.body.as_ref().unwrap(), term);
        if !self.changes.is_empty() {
            self.at.push(self.now.clone());
            self.events.insert(self.revision(), std::mem::take(&mut self.changes));
        }
        let outcome = self.outcome(result);
        let is_recorded = matches!(
            outcome.result,
            Ok(_) | Err(Refusal::NotFound | Refusal::PreconditionFailed { .. } | Refusal::LeaseNotFound { .. })
        );
        if let Some(wanted) = &command.idempotency
            && is_recorded
        {
            self.idempotency
                .insert(wanted.key.clone(), (wanted.fingerprint.to_vec(), time_ms, outcome.clone()));
        }
        outcome
    }

    fn outcome(&self, result: Result<Success, Refusal>) -> Outcome {
        Outcome {
            revision: self.revision(),
            replayed: false,
            result,
        }
    }

    fn next_revision(&self) -> u64 {
        self.at.len() as u64
    }

    fn count(&mut self, key: &[u8], value_len: u64, is_tombstone: bool) {
        let revision = self.next_revision();
        if let Some(old) = self.newest.remove(key) {
            self.counted[old].dead_at = revision;
        }
        let bytes = key.len() as u64 + value_len + OVERHEAD;
        self.counted.push(Counted {
            bytes,
            dead_at: if is_tombstone { revision } else { u64::MAX },
        });
        if !is_tombstone {
            self.newest.insert(key.to_vec(), self.counted.len() - 1);
        }
    }

    fn set(&mut self, put: &Put) -> (bool, u64) {
        let revision = self.next_revision();
        let old = self.now.get(&put.key[..]).cloned();
        let lease = if put.ttl_ms > 0 {
            self.grant(0, put.ttl_ms, true)
        } else {
            put.lease
        };
        if let Some(old) = &old
            && old.lease != lease
        {
            self.drop_owned(old.lease);
        }
        let kv = KeyValue {
            key: put.key.clone(),
            value: put.value.clone(),
            create_revision: old.as_ref().map_or(revision, |old| old.create_revision),
            mod_revision: revision,
            version: old.as_ref().map_or(0, |old| old.version) + 1,
            lease,
        };
        self.count(&put.key, put.value.len() as u64, false);
        self.now.insert(put.key.to_vec(), kv.clone());
        self.changes.push(Event {
            kind: EventKind::Put,
            kv,
            prev: None,
        });
        (old.is_none(), lease)
    }

    fn remove(&mut self, key: &[u8]) {
        let old = self.now.remove(key).unwrap();
        self.drop_owned(old.lease);
        self.count(key, 0, true);
        let kv = KeyValue {
            key: old.key,
            value: Default::default(),
            create_revision: 0,
            mod_revision: self.next_revision(),
            version: 0,
            lease: 0,
        };
        self.changes.push(Event {
            kind: EventKind::Delete,
            kv,
            prev: None,
        });
    }

    fn drop_owned(&mut self, lease: u64) {
        if self.leases.get(&lease).is_some_and(|(_, is_owned)| *is_owned) {
            self.leases.remove(&lease);
        }
    }

    fn grant(&mut self, id: u64, ttl_ms: u64, is_owned: bool) -> u64 {
        let mut given = id;
        while given == 0 || (id == 0 && self.leases.contains_key(&given)) {
            self.last_lease += 1;
            given = self.last_lease;
        }
        self.leases.insert(given, (ttl_ms, is_owned));
        given
    }

    fn is_attachable(&self, put: &Put) -> bool {
        put.ttl_ms > 0 || put.lease == 0 || self.leases.get(&put.lease).is_some_and(|(_, is_owned)| !is_owned)
    }

    fn keys_in(&self, span: &KeySpan) -> Vec<Vec<u8>> {
        self.now.keys().filter(|key| span.contains(key)).cloned().collect()
    }

    fn execute(&mut self, body: &Body, term: u64) -> Result<Success, Refusal> {
        match body {
            Body::Put(put) => {
                check(put.conditions.as_ref(), self.now.get(&put.key[..]))?;
                if !self.is_attachable(put) {
                    return Err(Refusal::LeaseNotFound { id: put.lease });
                }
                let prev = self.now.get(&put.key[..]).filter(|_| put.want_prev).cloned();
                let (created, lease) = self.set(put);
                Ok(Success::Put { created, prev, lease })
            }
            Body::Delete(delete) => {
                let old = self.now.get(&delete.key[..]).cloned();
                check(delete.conditions.as_ref(), old.as_ref())?;
                let old = old.ok_or(Refusal::NotFound)?;
                self.remove(&delete.key);
                Ok(Success::Delete {
                    prev: Some(old).filter(|_| delete.want_prev),
                })
            }
            Body::DeleteRange(delete) => {
                let keys = self.keys_in(&delete.span);
                let found = keys.len() as u64;
                if delete.max_keys != 0 && found > delete.max_keys {
                    return Err(Refusal::RangeTooLarge {
                        keys: found,
                        max: delete.max_keys,
                    });
                }
                keys.iter().for_each(|key| self.remove(key));
                Ok(Success::DeleteRange { deleted: found })
            }
            Body::Txn(txn) => {
                let succeeded = txn.compare.iter().all(|compare| self.holds(compare));
                let responses = self.branch(if succeeded { &txn.then } else { &txn.or_else })?;
                Ok(Success::Txn { succeeded, responses })
            }
            Body::LeaseGrant(grant) if self.leases.contains_key(&grant.id) => Err(Refusal::LeaseExists { id: grant.id }),
            Body::LeaseGrant(grant) => Ok(Success::LeaseGrant {
                id: self.grant(grant.id, grant.ttl_ms, false),
                ttl_ms: grant.ttl_ms,
            }),
            Body::LeaseRevoke(revoke) => self.end_lease(revoke.id),
            Body::LeaseExpire(expire) if expire.term != term => Err(Refusal::Void),
            Body::LeaseExpire(expire) => self.end_lease(expire.id),
            Body::Compact(compact) if compact.revision > self.revision() => Err(Refusal::FutureRevision { current: self.revision() }),
            Body::Compact(compact) if compact.revision <= self.compacted_revision => Err(Refusal::Compacted {
                compacted_revision: self.compacted_revision,
            }),
            Body::Compact(compact) => {
                self.compacted_revision = compact.revision;
                Ok(Success::Compact {
                    compacted_revision: compact.revision,
                })
            }
            Body::Evict(evict) if evict.term != term => Err(Refusal::Void),
            Body::Evict(evict) => {
                self.idempotency.retain(|_, (_, stamp_ms, _)| *stamp_ms > evict.up_to_stamp);
                Ok(Success::Done)
            }
            Body::MemberUpdate(_) | Body::HashReport(_) => Ok(Success::Done),
        }
    }

    fn end_lease(&mut self, id: u64) -> Result<Success, Refusal> {
        if !self.leases.contains_key(&id) {
            return Err(Refusal::LeaseNotFound { id });
        }
        let keys: Vec<Vec<u8>> = self.now.values().filter(|kv| kv.lease == id).map(|kv| kv.key.to_vec()).collect();
        keys.iter().for_each(|key| self.remove(key));
        self.leases.remove(&id);
        Ok(Success::LeaseRevoke {
            deleted: keys.len() as u64,
        })
    }

    fn holds(&self, compare: &Compare) -> bool {
        let kv = self.now.get(&compare.key[..]);
        let number = |pick: fn(&KeyValue) -> u64| kv.map_or(0, pick).cmp(&compare.number);
        let ordering = match compare.target() {
            CompareTarget::Value => match kv {
                None => return false,
                Some(kv) => kv.value.cmp(&compare.value),
            },
            CompareTarget::Version => number(|kv| kv.version),
            CompareTarget::CreateRevision => number(|kv| kv.create_revision),
            CompareTarget::ModRevision => number(|kv| kv.mod_revision),
            CompareTarget::Lease => number(|kv| kv.lease),
        };
        match compare.op() {
            CompareOp::Equal => ordering.is_eq(),
            CompareOp::NotEqual => ordering.is_ne(),
            CompareOp::Less => ordering.is_lt(),
            CompareOp::Greater => ordering.is_gt(),
        }
    }

    fn branch(&mut self, ops: &[TxnOp]) -> Result<Vec<TxnResponse>, Refusal> {
        let bodies: Vec<&TxnOpBody> = ops.iter().filter_map(|op| op.body.as_ref()).collect();
        let puts = || {
            bodies
                .iter()
                .filter_map(|body| if let TxnOpBody::Put(put) = body { Some(put) } else { None })
        };
        if let Some(put) = puts().find(|put| !self.is_attachable(put)) {
            return Err(Refusal::LeaseNotFound { id: put.lease });
        }
        for body in &bodies {
            if let TxnOpBody::Delete(delete) = body
                && delete.max_keys != 0
            {
                let keys = (self.keys_in(&delete.span).len() + puts().filter(|put| delete.span.contains(&put.key)).count()) as u64;
                if keys > delete.max_keys {
                    return Err(Refusal::RangeTooLarge {
                        keys,
                        max: delete.max_keys,
                    });
                }
            }
        }
        let run = bodies.iter().map(|body| match body {
            TxnOpBody::Put(put) => TxnResponse::Put { created: self.set(put).0 },
            TxnOpBody::Get(get) => self.get(get),
            TxnOpBody::Delete(delete) => {
                let keys = self.keys_in(&delete.span);
                keys.iter().for_each(|key| self.remove(key));
                TxnResponse::Delete {
                    deleted: keys.len() as u64,
                }
            }
        });
        Ok(run.collect())
    }

    fn get(&self, get: &TxnGet) -> TxnResponse {
        let mut kvs: Vec<KeyValue> = self.now.values().filter(|kv| get.span.contains(&kv.key)).cloned().collect();
        let count = kvs.len() as u64;
        if get.count_only {
            return TxnResponse::Get {
                kvs: Vec::new(),
                count,
                more: false,
            };
        }
        if get.descending {
            kvs.reverse();
        }
        kvs.truncate(if get.limit == 0 { 1000 } else { get.limit as usize });
        if get.keys_only {
            kvs.iter_mut().for_each(|kv| kv.value = Default::default());
        }
        let more = count > kvs.len() as u64;
        TxnResponse::Get { kvs, count, more }
    }
}

fn check(conditions: Option<&Conditions>, kv: Option<&KeyValue>) -> Result<(), Refusal> {
    let Some(conditions) = conditions else {
        return Ok(());
    };
    let current = kv.map(|kv| kv.mod_revision);
    let wants_match = conditions.if_match_any || !conditions.if_match.is_empty();
    let matches = current.is_some_and(|revision| conditions.if_match_any || conditions.if_match.contains(&revision));
    let is_excluded = current.is_some_and(|revision| conditions.if_none_match_any || conditions.if_none_match.contains(&revision));
    if conditions.if_match_never || (wants_match && !matches) || is_excluded {
        return Err(Refusal::PreconditionFailed { current });
    }
    Ok(())
}
