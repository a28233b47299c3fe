//! What clients and watches have heard, as the oracles of the simulation (`tests/common`) take it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use parking_lot::Mutex;
use serde_json::Value;

use super::asking::{Answer, Done};
use crate::common::Micros;
use crate::common::floor::Floor;
use crate::common::history::{History, KeyChange};
use crate::common::linear::{Action, Checked, Expect, Linear};

/// Keys in use at a time.
pub const SLOTS: u64 = 6;
/// A key is left for a new one after so many operations, or so many of unknown outcome: the search for an order never has too much to
/// try, however long a run is and however much goes wrong.
const OPERATIONS_OF_A_KEY: u64 = 300;
const UNKNOWN_OF_A_KEY: u64 = 6;

/// The server counts a lease's time in whole milliseconds.
const ROUNDING: Micros = 2_000;

pub const ACCOUNTS: usize = 4;
pub const DEPOSIT: i64 = 100;

/// When a request was first sent, and what was known then.
#[derive(Clone, Copy)]
pub struct Asked {
    pub at: Micros,
    floor: u64,
}

#[derive(Default)]
struct Slot {
    generation: u64,
    operations: u64,
    unknown: u64,
}

/// What happened, counted.
#[derive(Debug, Default, Clone)]
pub struct Tallies {
    pub operations: u64,
    pub retries: u64,
    pub replayed: u64,
    pub refused: u64,
    pub not_applied: u64,
    pub unknown: u64,
    pub transfers: u64,
    pub bank_reads: u64,
    pub leases: u64,
    pub renewals: u64,
    pub expired: u64,
    pub streams: u64,
    pub watched: u64,
}

#[derive(Default)]
struct Inner {
    linear: Linear,
    history: History,
    floor: Floor,
    slots: [Slot; SLOTS as usize],
    keys: BTreeSet<String>,
    /// What watches of a prefix delivered, for the end.
    watched: BTreeMap<String, Vec<(u64, Vec<KeyChange>)>>,
    /// By the key that is attached to it.
    leases: BTreeMap<String, Lease>,
    tallies: Tallies,
    fault: Option<String>,
}

#[derive(Default)]
struct Lease {
    /// It must live until then.
    until: Micros,
    /// When somebody first heard of its end.
    gone: Option<Micros>,
}

pub struct Book {
    begun: Instant,
    last_time: AtomicU64,
    last_value: AtomicU64,
    inner: Mutex<Inner>,
}

/// An account as it was read: what the transaction that changes it compares, and what is on it.
#[derive(Clone, Copy)]
pub struct Account {
    pub mod_revision: u64,
    pub amount: i64,
}

impl Book {
    pub fn new() -> Book {
        Book {
            begun: Instant::now(),
            last_time: AtomicU64::new(0),
            last_value: AtomicU64::new(0),
            inner: Mutex::default(),
        }
    }

    /// Later than whatever was noted before, were it within the same microsecond.
    pub fn now(&self) -> Micros {
        let elapsed = self.begun.elapsed().as_micros() as Micros;
        let later = |last: Micros| elapsed.max(last + 1);
        let last = self
            .last_time
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |last| Some(later(last)));
        last.map_or(elapsed, later)
    }

    /// A value that nobody else writes.
    pub fn new_value(&self) -> u64 {
        self.last_value.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// The key of a slot for the next operation.
    pub fn key(&self, slot: u64) -> String {
        let mut inner = self.inner.lock();
        let current = &mut inner.slots[slot as usize];
        if current.operations >= OPERATIONS_OF_A_KEY || current.unknown >= UNKNOWN_OF_A_KEY {
            *current = Slot {
                generation: current.generation + 1,
                ..Slot::default()
            };
        }
        current.operations += 1;
        let key = key_name(slot, current.generation);
        inner.keys.insert(key.clone());
        key
    }

    /// All keys that were ever in use.
    pub fn keys(&self) -> BTreeSet<String> {
        self.inner.lock().keys.clone()
    }

    /// A request is about to be sent.
    pub fn asked(&self) -> Asked {
        let mut inner = self.inner.lock();
        inner.tallies.operations += 1;
        let floor = inner.floor.known();
        drop(inner);
        Asked { at: self.now(), floor }
    }

    /// What the oracle says; the first no is kept.
    fn judge(&self, look: impl FnOnce(&mut Inner, Micros) -> Result<(), String>) {
        let now = self.now();
        let mut inner = self.inner.lock();
        if let Err(fault) = look(&mut inner, now) {
            inner.fault.get_or_insert(fault);
        }
    }

    pub fn fault(&self, fault: String) {
        self.judge(|_, _| Err(fault));
    }

    pub fn tally(&self, count: impl FnOnce(&mut Tallies)) {
        count(&mut self.inner.lock().tallies);
    }

    pub fn tallies(&self) -> Tallies {
        self.inner.lock().tallies.clone()
    }

    /// Nothing that was promised is broken so far.
    pub fn check(&self) {
        if let Some(fault) = &self.inner.lock().fault {
            panic!("{fault}");
        }
    }

    pub fn put(&self, asked: Asked, key: &str, value: u64, expect: Expect, answer: &Answer) {
        self.judge(|inner, now| {
            let (action, revision, is_change) = match answer {
                Answer::Done(done) => {
                    inner.history.note_acknowledged(key, Some(&text_of(value)), done.revision);
                    (
                        write(expect, Some(value), Some(true), Some(done.status != 201)),
                        done.revision,
                        true,
                    )
                }
                Answer::Refused { revision, .. } => {
                    inner.tallies.refused += 1;
                    inner.history.note_refused(&text_of(value))?;
                    (write(expect, Some(value), Some(false), None), *revision, false)
                }
                Answer::NotApplied => return inner.not_applied(&[text_of(value)]),
                Answer::Unknown => {
                    inner.note_unknown(asked, key, expect, Some(value));
                    return Ok(());
                }
            };
            inner.linear.note(key, asked.at, now, action);
            inner.floor.note(revision, asked.floor, is_change, "a put")
        });
    }

    pub fn delete(&self, asked: Asked, key: &str, expect: Expect, answer: &Answer) {
        self.judge(|inner, now| {
            let (action, revision, is_change) = match answer {
                Answer::Done(done) => {
                    inner.history.note_acknowledged(key, None, done.revision);
                    (write(expect, None, Some(true), Some(true)), done.revision, true)
                }
                Answer::Refused { code, revision } => {
                    inner.tallies.refused += 1;
                    let action = if code == "not_found" {
                        Action::Read(None)
                    } else {
                        write(expect, None, Some(false), None)
                    };
                    (action, *revision, false)
                }
                Answer::NotApplied => return inner.not_applied(&[]),
                Answer::Unknown => {
                    inner.note_unknown(asked, key, expect, None);
                    return Ok(());
                }
            };
            inner.linear.note(key, asked.at, now, action);
            inner.floor.note(revision, asked.floor, is_change, "a delete")
        });
    }

    /// Gives the value that was read, and its revision.
    pub fn read(&self, asked: Asked, key: &str, is_linearizable: bool, answer: &Answer) -> Option<(u64, u64)> {
        let (revision, found) = seen(answer)?;
        let value = found.as_ref().and_then(|(_, text)| value_of(text));
        self.judge(|inner, now| {
            let text = found.as_ref().map(|(_, text)| text.as_str());
            inner.history.note_seen(revision, key, text, "a client");
            if !is_linearizable {
                return Ok(());
            }
            inner.linear.note(key, asked.at, now, Action::Read(value));
            inner.floor.note(revision, asked.floor, false, "a read")
        });
        found.and_then(|(mod_revision, _)| Some((mod_revision, value?)))
    }

    /// Every key, by one linearizable list of a member.
    pub fn read_all(&self, asked: Asked, found: &BTreeMap<String, (String, u64)>) {
        self.judge(|inner, now| {
            for key in &inner.keys {
                let value = found.get(key).and_then(|(text, _)| value_of(text));
                inner.linear.note(key, asked.at, now, Action::Read(value));
            }
            Ok(())
        });
    }

    /// A transaction that writes two keys if the first has a value.
    pub fn swap(&self, asked: Asked, (key, seen, value): (&str, u64, u64), (other, other_value): (&str, u64), answer: &Answer) {
        self.judge(|inner, now| {
            let texts = [text_of(value), text_of(other_value)];
            let (succeeded, revision) = match answer {
                Answer::Done(done) => (succeeded(done)?, done.revision),
                Answer::Refused { code, .. } => return Err(format!("a transaction was answered with {code}")),
                Answer::NotApplied => return inner.not_applied(&texts),
                Answer::Unknown => {
                    inner.note_unknown(asked, key, Expect::Is(seen), Some(value));
                    inner.note_unknown(asked, other, Expect::Anything, Some(other_value));
                    return Ok(());
                }
            };
            let action = write(Expect::Is(seen), Some(value), Some(succeeded), None);
            inner.linear.note(key, asked.at, now, action);
            if succeeded {
                let action = write(Expect::Anything, Some(other_value), Some(true), None);
                inner.linear.note(other, asked.at, now, action);
                for (key, text) in [key, other].iter().zip(&texts) {
                    inner.history.note_acknowledged(key, Some(text), revision);
                }
            } else {
                inner.tallies.refused += 1;
                inner.refuse(&texts)?;
            }
            inner.floor.note(revision, asked.floor, succeeded, "a transaction")
        });
    }

    /// The accounts in order, if they were read.
    pub fn bank(&self, asked: Asked, is_linearizable: bool, answer: &Answer) -> Option<Vec<Account>> {
        let Answer::Done(done) = answer else { return None };
        let list: Value = serde_json::from_slice(&done.body).unwrap_or(Value::Null);
        let revision = list["revision"].as_u64().unwrap_or(0);
        let kvs = list["kvs"].as_array().cloned().unwrap_or_default();
        let text = |kv: &Value, name: &str| kv[name].as_str().unwrap_or_default().to_owned();
        let accounts: Vec<Account> = kvs
            .iter()
            .map(|kv| Account {
                mod_revision: kv["mod_revision"].as_u64().unwrap_or(0),
                amount: amount_of(&text(kv, "value")),
            })
            .collect();
        self.judge(|inner, _| {
            inner.tallies.bank_reads += 1;
            for kv in &kvs {
                let value = text(kv, "value");
                inner
                    .history
                    .note_seen(revision, &text(kv, "key"), Some(&value), "a reader of the bank");
            }
            let total: i64 = accounts.iter().map(|account| account.amount).sum();
            if accounts.len() != ACCOUNTS || total != ACCOUNTS as i64 * DEPOSIT {
                return Err(format!("the bank is {list}"));
            }
            if is_linearizable {
                inner.floor.note(revision, asked.floor, false, "a list")?;
            }
            Ok(())
        });
        (accounts.len() == ACCOUNTS).then_some(accounts)
    }

    /// A transaction that writes these if nothing has changed meanwhile.
    pub fn transfer(&self, asked: Asked, writes: &[(String, String)], answer: &Answer) {
        self.judge(|inner, _| {
            let texts: Vec<String> = writes.iter().map(|(_, text)| text.clone()).collect();
            match answer {
                Answer::Done(done) if succeeded(done)? => {
                    inner.tallies.transfers += 1;
                    for (key, text) in writes {
                        inner.history.note_acknowledged(key, Some(text), done.revision);
                    }
                    inner.floor.note(done.revision, asked.floor, true, "a transfer")
                }
                Answer::Done(_) => inner.refuse(&texts),
                Answer::Refused { code, .. } => Err(format!("a transfer was answered with {code}")),
                Answer::NotApplied => inner.not_applied(&texts),
                Answer::Unknown => {
                    inner.tallies.unknown += 1;
                    Ok(())
                }
            }
        });
    }

    /// A write of a key of somebody's own, which is not looked at for linearizability.
    pub fn own_put(&self, asked: Asked, key: &str, text: &str, answer: &Answer) {
        self.judge(|inner, _| match answer {
            Answer::Done(done) => {
                inner.history.note_acknowledged(key, Some(text), done.revision);
                inner.floor.note(done.revision, asked.floor, true, "a put")
            }
            Answer::Refused { .. } => inner.refuse(&[text.to_owned()]),
            Answer::NotApplied => inner.not_applied(&[text.to_owned()]),
            Answer::Unknown => {
                inner.tallies.unknown += 1;
                Ok(())
            }
        });
    }

    /// A read of such a key.
    pub fn own_read(&self, asked: Asked, key: &str, answer: &Answer) {
        let Some((revision, found)) = seen(answer) else { return };
        self.judge(|inner, _| {
            let text = found.as_ref().map(|(_, text)| text.as_str());
            inner.history.note_seen(revision, key, text, "the owner of a lease");
            inner.floor.note(revision, asked.floor, false, "a read")
        });
    }

    /// A lease was granted or renewed, and lives until then.
    pub fn promised(&self, key: &str, until: Micros) {
        self.judge(|inner, _| {
            let lease = inner.leases.entry(key.to_owned()).or_default();
            lease.until = lease.until.max(until);
            inner.check_lease(key)
        });
    }

    /// An answer has shown that a lease has ended.
    pub fn gone(&self, key: &str) {
        self.judge(|inner, now| inner.note_gone(key, now));
    }

    pub fn note_acknowledged(&self, key: &str, text: &str, revision: u64) {
        self.inner.lock().history.note_acknowledged(key, Some(text), revision);
    }

    pub fn note_refused(&self, text: &str) {
        self.judge(|inner, _| inner.history.note_refused(text));
    }

    /// A watch of everything, or of a prefix, delivered a revision.
    pub fn watched(&self, prefix: &str, revision: u64, changes: Vec<KeyChange>) {
        self.judge(|inner, now| {
            inner.tallies.watched += 1;
            for (key, _) in changes.iter().filter(|(_, value)| value.is_none()) {
                inner.note_gone(key, now)?;
            }
            if prefix.is_empty() {
                return inner.history.take(revision, changes);
            }
            inner.watched.entry(prefix.to_owned()).or_default().push((revision, changes));
            Ok(())
        });
    }

    /// The last revision up to `until` that changed a key of this prefix, as far as watches of everything have shown.
    pub fn last_change(&self, prefix: &str, until: u64) -> u64 {
        let changes = self.inner.lock().history.between(prefix, 1, until);
        changes.last().map_or(1, |(revision, _)| *revision)
    }

    /// Everything that can only be seen at the end, which all watches have passed.
    pub fn check_end(&self, end: u64) -> Result<Checked, String> {
        let mut inner = self.inner.lock();
        if let Some(fault) = inner.fault.take() {
            return Err(fault);
        }
        inner.history.check_end()?;
        for (prefix, found) in &inner.watched {
            let found: Vec<_> = found.iter().filter(|(revision, _)| *revision <= end).cloned().collect();
            if found != inner.history.between(prefix, 1, end) {
                return Err(format!(
                    "a watch of {prefix} did not deliver exactly what changed: {} revisions",
                    found.len()
                ));
            }
        }
        inner.linear.check()
    }
}

impl Inner {
    fn note_unknown(&mut self, asked: Asked, key: &str, expect: Expect, to: Option<u64>) {
        self.tallies.unknown += 1;
        for (number, slot) in self.slots.iter_mut().enumerate() {
            slot.unknown += u64::from(key == key_name(number as u64, slot.generation));
        }
        self.linear.note(key, asked.at, Micros::MAX, write(expect, to, None, None));
    }

    /// Keys without a lease may go at any time.
    fn note_gone(&mut self, key: &str, now: Micros) -> Result<(), String> {
        if let Some(lease) = self.leases.get_mut(key) {
            lease.gone.get_or_insert(now);
        }
        self.check_lease(key)
    }

    fn check_lease(&self, key: &str) -> Result<(), String> {
        match self.leases.get(key) {
            Some(&Lease { until, gone: Some(gone) }) if gone + ROUNDING < until => {
                Err(format!("{key} was gone at {gone} us, and its lease was promised until {until} us"))
            }
            Some(_) | None => Ok(()),
        }
    }

    fn not_applied(&mut self, texts: &[String]) -> Result<(), String> {
        self.tallies.not_applied += 1;
        self.refuse(texts)
    }

    fn refuse(&mut self, texts: &[String]) -> Result<(), String> {
        texts.iter().try_for_each(|text| self.history.note_refused(text))
    }
}

/// Revision, and what a GET found there: the key's revision and value.
fn seen(answer: &Answer) -> Option<(u64, Option<(u64, String)>)> {
    match answer {
        Answer::Done(done) => {
            let text = String::from_utf8_lossy(&done.body).into_owned();
            Some((done.revision, Some((done.mod_revision, text))))
        }
        Answer::Refused { revision, .. } => Some((*revision, None)),
        Answer::NotApplied | Answer::Unknown => None,
    }
}

fn succeeded(done: &Done) -> Result<bool, String> {
    let body: Value = serde_json::from_slice(&done.body).unwrap_or(Value::Null);
    let odd = || format!("a transaction was answered with {}", String::from_utf8_lossy(&done.body));
    body["succeeded"].as_bool().ok_or_else(odd)
}

fn write(expect: Expect, to: Option<u64>, happened: Option<bool>, existed: Option<bool>) -> Action {
    Action::Write {
        expect,
        to,
        happened,
        existed,
    }
}

fn key_name(slot: u64, generation: u64) -> String {
    format!("k{slot}-{generation}")
}

pub fn text_of(value: u64) -> String {
    format!("v{value}")
}

fn value_of(text: &str) -> Option<u64> {
    text.strip_prefix('v')?.parse().ok()
}

pub fn account(n: usize) -> String {
    format!("bank/{n}")
}

fn amount_of(text: &str) -> i64 {
    let amount = text.split(':').next().and_then(|amount| amount.parse().ok());
    amount.unwrap_or(i64::MIN / 1_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn done(status: u16, revision: u64, body: &str) -> Answer {
        Answer::Done(Done {
            status,
            revision,
            mod_revision: revision,
            is_replayed: false,
            body: body.to_owned().into(),
        })
    }

    fn absent(revision: u64) -> Answer {
        Answer::Refused {
            code: "not_found".to_owned(),
            revision,
        }
    }

    /// What a watch of everything shows of a put.
    fn shown(book: &Book, revision: u64, key: &str, value: u64) {
        book.watched("", revision, vec![(key.to_owned(), Some(text_of(value)))]);
    }

    /// A key with the values 1 and 2, one after the other.
    fn two_puts() -> (Book, String) {
        let book = Book::new();
        let key = book.key(0);
        for (value, status) in [(1, 201), (2, 204)] {
            book.put(book.asked(), &key, value, Expect::Anything, &done(status, value + 1, ""));
            shown(&book, value + 1, &key, value);
        }
        (book, key)
    }

    #[test]
    fn what_may_be_is_accepted() {
        let (book, key) = two_puts();
        book.read(book.asked(), &key, true, &done(200, 3, "v2"));
        book.read(book.asked(), &key, false, &done(200, 2, "v1"));
        book.put(book.asked(), &key, 3, Expect::Anything, &Answer::NotApplied);
        book.put(book.asked(), &key, 4, Expect::Is(2), &Answer::Unknown);
        book.read(book.asked(), &key, true, &done(200, 3, "v2"));
        shown(&book, 4, &key, 4);
        book.read(book.asked(), &key, true, &done(200, 4, "v4"));
        let checked = book.check_end(4).unwrap();
        assert_eq!((checked.operations, checked.given_up), (6, 0));
    }

    #[test]
    fn a_stale_read_is_refused_with_whatever_revision_it_comes() {
        for answer in [done(200, 3, "v1"), done(200, 2, "v1"), absent(3)] {
            let (book, key) = two_puts();
            book.read(book.asked(), &key, true, &answer);
            assert!(book.check_end(3).is_err());
        }
    }

    #[test]
    fn a_stale_read_is_refused_without_a_look_at_revisions() {
        let (book, key) = two_puts();
        book.read(book.asked(), &key, true, &done(200, 3, "v1"));
        assert!(book.inner.lock().linear.check().is_err());
    }

    #[test]
    fn a_lost_write_is_refused() {
        let (book, key) = two_puts();
        book.put(book.asked(), &key, 3, Expect::Anything, &done(204, 4, ""));
        assert!(book.check_end(3).is_err(), "no watch has it");
        book.read(book.asked(), &key, true, &done(200, 4, "v2"));
        assert!(book.inner.lock().linear.check().is_err(), "nor a read");
    }

    #[test]
    fn a_write_that_was_not_applied_and_is_seen_is_refused() {
        let (book, key) = two_puts();
        book.put(book.asked(), &key, 3, Expect::Anything, &Answer::NotApplied);
        book.read(book.asked(), &key, true, &done(200, 4, "v3"));
        assert!(book.inner.lock().linear.check().is_err(), "a read has it");
        shown(&book, 4, &key, 3);
        assert!(book.check_end(4).is_err(), "and a watch");
    }

    #[test]
    fn a_write_that_happens_twice_is_refused() {
        let (book, key) = two_puts();
        shown(&book, 4, &key, 1);
        assert!(book.check_end(4).is_err(), "a watch has it");
        book.read(book.asked(), &key, true, &done(200, 4, "v2"));
        book.read(book.asked(), &key, true, &done(200, 4, "v1"));
        assert!(book.inner.lock().linear.check().is_err(), "and two reads");
    }

    #[test]
    fn a_condition_that_held_or_failed_against_the_value_is_refused() {
        let (book, key) = two_puts();
        book.put(book.asked(), &key, 3, Expect::Is(1), &done(204, 4, ""));
        assert!(book.inner.lock().linear.check().is_err());
        let (book, key) = two_puts();
        let failed = Answer::Refused {
            code: "precondition_failed".to_owned(),
            revision: 3,
        };
        book.delete(book.asked(), &key, Expect::Is(2), &failed);
        assert!(book.inner.lock().linear.check().is_err());
    }

    #[test]
    fn a_watch_of_a_prefix_that_leaves_something_out_is_refused() {
        let change = |value| vec![("k0-0".to_owned(), Some(text_of(value)))];
        let (book, _) = two_puts();
        book.watched("k", 2, change(1));
        assert!(book.check_end(3).is_err());
        book.watched("k", 3, change(2));
        assert!(book.check_end(3).is_ok());
        assert_eq!((book.last_change("k", 9), book.last_change("x", 9)), (3, 1));
    }

    #[test]
    fn a_bank_with_another_total_is_refused() {
        let list = |amounts: [i64; ACCOUNTS]| {
            let kv =
                |(n, amount): (usize, &i64)| serde_json::json!({ "key": account(n), "value": format!("{amount}:{n}"), "mod_revision": 2 });
            let kvs: Vec<Value> = amounts.iter().enumerate().map(kv).collect();
            done(200, 2, &serde_json::json!({ "revision": 2, "kvs": kvs }).to_string())
        };
        let book = Book::new();
        let accounts = book.bank(book.asked(), true, &list([90, 110, 100, 100])).unwrap();
        assert_eq!(accounts[1].amount, 110);
        assert_eq!(book.inner.lock().fault, None);
        book.bank(book.asked(), true, &list([90, 100, 100, 100]));
        assert!(book.inner.lock().fault.is_some());
    }

    #[test]
    fn a_lease_that_ends_early_is_refused_whichever_is_known_first() {
        let far = 1 << 40;
        let book = Book::new();
        book.promised("lease/1", 0);
        book.gone("lease/1");
        assert_eq!(book.inner.lock().fault, None);
        book.promised("lease/1", far);
        assert!(book.inner.lock().fault.is_some());
        let book = Book::new();
        book.promised("lease/1", far);
        book.watched("", 2, vec![("lease/2".to_owned(), None)]);
        assert_eq!(book.inner.lock().fault, None);
        book.watched("", 3, vec![("lease/1".to_owned(), None)]);
        assert!(book.inner.lock().fault.is_some());
    }

    #[test]
    fn a_key_is_left_when_too_much_of_it_is_unknown() {
        let book = Book::new();
        let first = book.key(0);
        for value in 0..UNKNOWN_OF_A_KEY {
            assert_eq!(book.key(0), first);
            book.put(book.asked(), &first, value, Expect::Anything, &Answer::Unknown);
        }
        assert_ne!(book.key(0), first);
        assert_eq!(book.keys().len(), 2);
        assert!(book.check_end(1).is_ok());
    }
}
