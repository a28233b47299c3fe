//! What is applied of each member's proposals: exactly once, whatever is proposed again (rules 13 to 15).
//!
//! A session holds the boot id, the low-water mark (the proposer waits for nothing below it) and the sequences applied above it with
//! what is needed to rebuild the usual results. Sequences are kept in blocks, one record each, so that a batch rewrites little. The
//! window is bounded by the proposer, which stops proposing when it is full.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use imbl::OrdMap;
use prost::Message;
use prost::encoding::{decode_varint, encode_varint};

use super::StateError;
use super::command::{Body, Command};
use super::outcome::{Outcome, Refusal, Success};
use crate::store::{KvStore, Table, WriteBatch};

/// Sequences per block.
const BLOCK: u64 = 256;

/// A result that can be rebuilt from one byte and the revision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Code {
    /// Applied, but the result is not kept.
    Unknown = 0,
    Created = 1,
    Replaced = 2,
    Deleted = 3,
    NotFound = 4,
    Done = 5,
}

impl Code {
    fn from_byte(byte: u8) -> Code {
        match byte {
            1 => Code::Created,
            2 => Code::Replaced,
            3 => Code::Deleted,
            4 => Code::NotFound,
            5 => Code::Done,
            _ => Code::Unknown,
        }
    }

    fn of(command: &Command, outcome: &Outcome) -> Code {
        let wants_prev = match &command.body {
            Some(Body::Put(put)) => put.want_prev,
            Some(Body::Delete(delete)) => delete.want_prev,
            _ => false,
        };
        match &outcome.result {
            Ok(Success::Put { created, lease: 0, .. }) if !wants_prev => {
                if *created {
                    Code::Created
                } else {
                    Code::Replaced
                }
            }
            Ok(Success::Delete { .. }) if !wants_prev => Code::Deleted,
            Ok(Success::Done) => Code::Done,
            Err(Refusal::NotFound) => Code::NotFound,
            _ => Code::Unknown,
        }
    }
}

/// An applied sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Done {
    offset: u8,
    code: Code,
    revision: u64,
}

impl Done {
    /// The outcome as far as it is known.
    pub(super) fn outcome(&self) -> Outcome {
        let result = match self.code {
            Code::Unknown => Err(Refusal::AlreadyApplied),
            Code::Created => Ok(Success::Put {
                created: true,
                prev: None,
                lease: 0,
            }),
            Code::Replaced => Ok(Success::Put {
                created: false,
                prev: None,
                lease: 0,
            }),
            Code::Deleted => Ok(Success::Delete { prev: None }),
            Code::NotFound => Err(Refusal::NotFound),
            Code::Done => Ok(Success::Done),
        };
        Outcome {
            revision: self.revision,
            replayed: true,
            result,
        }
    }
}

/// One member's session.
#[derive(Debug, Clone, Default)]
struct Session {
    boot: u64,
    low_water: u64,
    /// Block number → its applied sequences, ascending.
    blocks: OrdMap<u64, Vec<Done>>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct HeaderRecord {
    #[prost(uint64, tag = "1")]
    boot: u64,
    #[prost(uint64, tag = "2")]
    low_water: u64,
}

/// What is known of a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seen {
    /// Not applied yet.
    Fresh,
    /// Applied.
    Applied(Done),
    /// Below the low-water mark: never to be applied, and nobody waits.
    Dropped,
}

/// All sessions.
#[derive(Debug, Clone, Default)]
pub(super) struct Sessions {
    by_member: OrdMap<u64, Session>,
    /// Records to write: the header (`None`) or a block, with whether it still exists looked up then.
    dirty: BTreeSet<(u64, Option<u64>)>,
    /// Some member's boot id is another one than when it was last asked.
    boots_changed: bool,
}

impl Sessions {
    pub(super) fn load(store: &dyn KvStore) -> Result<Sessions, StateError> {
        let mut sessions = Sessions::default();
        super::tables::read_all(store, Table::Session, &mut |key, record| sessions.load_record(key, record))?;
        Ok(sessions)
    }

    fn load_record(&mut self, key: &[u8], record: &[u8]) -> Option<()> {
        let (member, rest) = key.split_first_chunk::<8>()?;
        let member = u64::from_be_bytes(*member);
        let session = self.by_member.entry(member).or_default();
        if rest.is_empty() {
            let header = HeaderRecord::decode(record).ok()?;
            (session.boot, session.low_water) = (header.boot, header.low_water);
        } else {
            let block = u64::from_be_bytes(rest.try_into().ok()?);
            session.blocks.insert(block, decode_block(record)?);
        }
        Some(())
    }

    /// Takes note of a payload's header. Returns whether its commands may be applied: not if a newer boot of the member is known.
    pub(super) fn enter(&mut self, member: u64, boot: u64, low_water: u64) -> bool {
        let is_new = !self.by_member.contains_key(&member);
        let session = self.by_member.entry(member).or_default();
        if boot < session.boot {
            return false;
        }
        if boot > session.boot || is_new {
            self.dirty.extend(session.blocks.keys().map(|block| (member, Some(*block))));
            *session = Session {
                boot,
                low_water,
                blocks: OrdMap::new(),
            };
            self.dirty.insert((member, None));
            self.boots_changed = true;
        } else if low_water > session.low_water {
            session.low_water = low_water;
            self.dirty.insert((member, None));
            while let Some((block, _)) = session.blocks.get_min()
                && (block + 1).saturating_mul(BLOCK) <= low_water
            {
                let block = *block;
                session.blocks.remove(&block);
                self.dirty.insert((member, Some(block)));
            }
        }
        true
    }

    /// What is known of a sequence of the member's current boot.
    pub(super) fn seen(&self, member: u64, seq: u64) -> Seen {
        let Some(session) = self.by_member.get(&member) else {
            return Seen::Fresh;
        };
        if mutant!(ApplyTwice) {
            return Seen::Fresh;
        }
        if seq < session.low_water {
            return if mutant!(ForgetLowWater) { Seen::Fresh } else { Seen::Dropped };
        }
        let Some(block) = session.blocks.get(&(seq / BLOCK)) else {
            return Seen::Fresh;
        };
        let offset = (seq % BLOCK) as u8;
        match block.binary_search_by_key(&offset, |done| done.offset) {
            Ok(at) => block.get(at).map_or(Seen::Fresh, |done| Seen::Applied(*done)),
            Err(_) => Seen::Fresh,
        }
    }

    /// The command was applied.
    pub(super) fn record(&mut self, member: u64, command: &Command, outcome: &Outcome) {
        let Some(session) = self.by_member.get_mut(&member) else {
            return;
        };
        let number = command.seq / BLOCK;
        let done = Done {
            offset: (command.seq % BLOCK) as u8,
            code: Code::of(command, outcome),
            revision: outcome.revision,
        };
        let block = session.blocks.entry(number).or_default();
        let at = block.partition_point(|known| known.offset < done.offset);
        block.insert(at, done);
        self.dirty.insert((member, Some(number)));
    }

    /// The member was removed: nothing of it is applied any more, so nothing needs to be known.
    pub(super) fn remove(&mut self, member: u64) {
        if let Some(session) = self.by_member.remove(&member) {
            self.boots_changed = true;
            self.dirty.insert((member, None));
            self.dirty.extend(session.blocks.keys().map(|block| (member, Some(*block))));
        }
    }

    /// The newest boot id known of each member; `None` if they are those of the last call.
    pub(super) fn changed_boots(&mut self) -> Option<Arc<BTreeMap<u64, u64>>> {
        std::mem::take(&mut self.boots_changed).then(|| self.boots())
    }

    /// The newest boot id known of each member.
    pub(super) fn boots(&self) -> Arc<BTreeMap<u64, u64>> {
        Arc::new(self.by_member.iter().map(|(member, session)| (*member, session.boot)).collect())
    }

    /// Writes what changed since the last call.
    pub(super) fn store(&mut self, batch: &mut WriteBatch) {
        while let Some((member, block)) = self.dirty.pop_first() {
            let key = record_key(member, block);
            match self.encode(member, block) {
                Some(record) => batch.put(Table::Session, key, record),
                None => batch.delete(Table::Session, key),
            }
        }
    }

    fn encode(&self, member: u64, block: Option<u64>) -> Option<Vec<u8>> {
        let session = self.by_member.get(&member)?;
        match block {
            None => Some(
                HeaderRecord {
                    boot: session.boot,
                    low_water: session.low_water,
                }
                .encode_to_vec(),
            ),
            Some(block) => session.blocks.get(&block).map(|block| encode_block(block)),
        }
    }

    /// The record that follows `after`, for snapshots.
    pub(super) fn record_after(&self, after: Option<&[u8]>) -> Option<(Vec<u8>, Vec<u8>)> {
        let (member, block) = match after {
            None => (*self.by_member.get_min().map(|(member, _)| member)?, None),
            Some(key) => {
                let (member, rest) = key.split_first_chunk::<8>()?;
                let member = u64::from_be_bytes(*member);
                // `None`: no block can follow the last one.
                let from = rest
                    .try_into()
                    .ok()
                    .map_or(Some(0), |block| u64::from_be_bytes(block).checked_add(1));
                let session = self.by_member.get(&member);
                let next_block = session.and_then(|session| session.blocks.range(from?..).next());
                match next_block {
                    Some((block, _)) => (member, Some(*block)),
                    None => (*self.by_member.range(member.checked_add(1)?..).next()?.0, None),
                }
            }
        };
        Some((record_key(member, block), self.encode(member, block)?))
    }
}

fn record_key(member: u64, block: Option<u64>) -> Vec<u8> {
    let mut key = member.to_be_bytes().to_vec();
    if let Some(block) = block {
        key.extend_from_slice(&block.to_be_bytes());
    }
    key
}

/// The first revision, then (offset, code, revision beyond the one before) of each: sequences are applied in order of revision.
fn encode_block(block: &[Done]) -> Vec<u8> {
    let mut out = Vec::with_capacity(10 + block.len() * 4);
    let mut previous = 0u64;
    for done in block {
        out.push(done.offset);
        out.push(done.code as u8);
        encode_varint(done.revision.wrapping_sub(previous), &mut out);
        previous = done.revision;
    }
    out
}

fn decode_block(mut record: &[u8]) -> Option<Vec<Done>> {
    let mut block = Vec::new();
    let mut previous = 0u64;
    while let Some(([offset, code], rest)) = record.split_first_chunk::<2>() {
        record = rest;
        previous = previous.wrapping_add(decode_varint(&mut record).ok()?);
        block.push(Done {
            offset: *offset,
            code: Code::from_byte(*code),
            revision: previous,
        });
    }
    record.is_empty().then_some(block)
}
