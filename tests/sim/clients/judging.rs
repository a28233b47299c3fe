//! What an answer says, to the oracles and to the client that asked.

use metcd::state::outcome::{KeyValue, Outcome, Refusal, Success};

use super::{ACCOUNTS, DEPOSIT, Intent, Pending, account, amount_of, key_name, text_of, value_of};
use crate::calls::{Answer, Request};
use crate::oracle::linear::{Action, Expect};
use crate::plan::Micros;
use crate::world::World;

impl World {
    pub(super) fn judge(&mut self, client: usize, pending: &Pending, answer: Answer) -> Result<(), String> {
        let asked = pending.asked;
        match answer {
            Answer::Unknown => {
                self.stats.unknown += 1;
                self.judge_unknown(pending);
                Ok(())
            }
            Answer::NotApplied => {
                self.stats.not_applied += 1;
                pending
                    .intent
                    .texts()
                    .iter()
                    .try_for_each(|text| self.oracle.history.note_refused(text))
            }
            Answer::Page { revision, kvs } => self.judge_page(client, pending, revision, &kvs),
            Answer::Renewed { ttl_ms } => {
                if let Intent::KeepAlive { lease } = pending.intent {
                    self.oracle.lease.note_alive(lease, asked, ttl_ms);
                    self.stats.renewals += 1;
                }
                Ok(())
            }
            Answer::Gone => {
                if let Intent::KeepAlive { lease } = pending.intent {
                    self.clients[client].leases.retain(|&other| other != lease);
                }
                Ok(())
            }
            Answer::Outcome(outcome) => self.judge_outcome(client, pending, &outcome),
        }
    }

    fn judge_unknown(&mut self, pending: &Pending) {
        let mut note = |key: &str, expect, to| {
            let action = Action::Write {
                expect,
                to,
                happened: None,
                existed: None,
            };
            self.oracle.linear.note(key, pending.asked, Micros::MAX, action);
        };
        match &pending.intent {
            Intent::Put { key, value, expect } => note(key, *expect, Some(*value)),
            Intent::Delete { key, expect } => {
                note(key, *expect, None);
                self.oracle.deletes.note_unknown(key);
            }
            Intent::Swap {
                key,
                seen,
                value,
                other,
                other_value,
            } => {
                note(key, Expect::Is(*seen), Some(*value));
                note(other, Expect::Anything, Some(*other_value));
            }
            Intent::DeleteAll => {
                (0..self.plan.keys + 2).for_each(|n| {
                    note(&key_name(n), Expect::Anything, None);
                    self.oracle.deletes.note_unknown(&key_name(n));
                });
            }
            Intent::Grant => self.oracle.lease.note_grant_unknown(),
            _ => {}
        }
    }

    fn judge_page(&mut self, client: usize, pending: &Pending, revision: u64, kvs: &[KeyValue]) -> Result<(), String> {
        let Request::Read { barrier, min_revision, .. } = pending.request else {
            return Ok(());
        };
        if barrier {
            self.oracle.note_revision(revision, pending.floor, false, "a read");
        }
        if revision < min_revision {
            return Err(format!("a read at {revision} or later was answered at {min_revision}"));
        }
        let who = format!("c{client}");
        let known = &mut self.clients[client];
        known.last_revision = known.last_revision.max(revision);
        match &pending.intent {
            Intent::Read { key } => {
                let found = kvs.first().map(|kv| String::from_utf8_lossy(&kv.value).into_owned());
                self.oracle.history.note_seen(revision, key, found.as_deref(), &who);
                let value = found.as_deref().and_then(value_of);
                let mod_revision = kvs.first().map_or(0, |kv| kv.mod_revision);
                self.clients[client].known.insert(key.clone(), (mod_revision, value));
                if barrier {
                    self.oracle.linear.note(key, pending.asked, self.now, Action::Read(value));
                }
            }
            Intent::ReadBank => {
                let amounts: Vec<(u64, i64)> = kvs.iter().map(|kv| (kv.mod_revision, amount_of(&kv.value))).collect();
                let total: i64 = amounts.iter().map(|(_, amount)| amount).sum();
                if !amounts.is_empty() && (amounts.len() as u64 != ACCOUNTS || total != ACCOUNTS as i64 * DEPOSIT) {
                    return Err(format!("the bank holds {amounts:?} at revision {revision}"));
                }
                self.clients[client].bank = amounts;
            }
            _ => {}
        }
        Ok(())
    }

    fn judge_outcome(&mut self, client: usize, pending: &Pending, outcome: &Outcome) -> Result<(), String> {
        if let Intent::Again { first } = &pending.intent {
            let is_same = outcome.replayed && (outcome.revision, &outcome.result) == (first.revision, &first.result);
            return match is_same {
                true => Ok(()),
                false => Err(format!("asked again, it was answered with {outcome:?}, and first with {first:?}")),
            };
        }
        let revision = outcome.revision;
        let made_change = match &outcome.result {
            Ok(Success::Put { .. } | Success::Delete { .. }) => true,
            Ok(Success::Txn { succeeded, .. }) => *succeeded,
            Ok(_) | Err(_) => false,
        };
        if !outcome.replayed || made_change {
            self.oracle.note_revision(revision, pending.floor, made_change, "a write");
        }
        let known = &mut self.clients[client];
        known.last_revision = known.last_revision.max(revision);
        let now = self.now;
        let mut note = |key: &str, action| self.oracle.linear.note(key, pending.asked, now, action);
        let write = |expect, to, happened, existed| Action::Write {
            expect,
            to,
            happened: Some(happened),
            existed,
        };
        match (&pending.intent, &outcome.result) {
            (Intent::Put { key, value, expect }, Ok(Success::Put { created, .. })) => {
                note(key, write(*expect, Some(*value), true, Some(!created)));
                self.oracle.history.note_acknowledged(key, Some(&text_of(*value)), revision);
                self.clients[client].known.insert(key.clone(), (revision, Some(*value)));
            }
            (Intent::Put { key, value, expect }, Err(Refusal::PreconditionFailed { .. })) => {
                note(key, write(*expect, Some(*value), false, None));
                self.oracle.history.note_refused(&text_of(*value))?;
            }
            (Intent::Delete { key, expect }, Ok(Success::Delete { .. })) => {
                note(key, write(*expect, None, true, Some(true)));
                self.oracle.history.note_acknowledged(key, None, revision);
                self.oracle.deletes.note(key, revision)?;
            }
            (Intent::Delete { key, .. }, Err(Refusal::NotFound)) => note(key, Action::Read(None)),
            (Intent::Delete { key, expect }, Err(Refusal::PreconditionFailed { .. })) => note(key, write(*expect, None, false, None)),
            (Intent::DeleteAll, Ok(Success::DeleteRange { deleted })) => {
                (0..self.plan.keys + 2).for_each(|n| note(&key_name(n), write(Expect::Anything, None, true, None)));
                self.oracle.deletes.note_all(*deleted, revision)?;
            }
            (
                Intent::Swap {
                    key,
                    seen,
                    value,
                    other,
                    other_value,
                },
                Ok(Success::Txn { succeeded, .. }),
            ) => {
                note(key, write(Expect::Is(*seen), Some(*value), *succeeded, None));
                if *succeeded {
                    note(other, write(Expect::Anything, Some(*other_value), true, None));
                    self.oracle.history.note_acknowledged(key, Some(&text_of(*value)), revision);
                    self.oracle.history.note_acknowledged(other, Some(&text_of(*other_value)), revision);
                } else {
                    self.oracle.history.note_refused(&text_of(*value))?;
                    self.oracle.history.note_refused(&text_of(*other_value))?;
                }
            }
            (Intent::FoundBank { text }, Ok(Success::Txn { succeeded, .. })) => {
                if *succeeded {
                    (0..ACCOUNTS).for_each(|n| self.oracle.history.note_acknowledged(&account(n), Some(text), revision));
                } else {
                    self.oracle.history.note_refused(text)?;
                }
            }
            (Intent::Transfer { texts }, Ok(Success::Txn { succeeded, .. })) => {
                for (key, text) in texts {
                    match succeeded {
                        true => self.oracle.history.note_acknowledged(key, Some(text), revision),
                        false => self.oracle.history.note_refused(text)?,
                    }
                }
                self.clients[client].bank.clear();
            }
            (Intent::Grant, Ok(Success::LeaseGrant { id, ttl_ms })) => {
                self.oracle.lease.note_granted(*id)?;
                self.oracle.lease.note_alive(*id, pending.asked, *ttl_ms);
                self.clients[client].leases.push(*id);
                self.stats.leases += 1;
            }
            (Intent::PutLeased { key, text }, Ok(Success::Put { .. })) => {
                self.oracle.history.note_acknowledged(key, Some(text), revision);
            }
            (Intent::PutLeased { text, .. }, Err(Refusal::LeaseNotFound { .. })) => self.oracle.history.note_refused(text)?,
            (Intent::Put { .. } | Intent::Delete { .. } | Intent::Swap { .. } | Intent::Transfer { .. }, unexpected) => {
                return Err(format!("{:?} was answered with {unexpected:?}", pending.intent));
            }
            _ => {}
        }
        Ok(())
    }
}
