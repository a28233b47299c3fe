//! Transactions: compare, then one of two branches, all in one revision. What a branch may cost is checked before anything of it is done.

use super::super::StateError;
use super::super::command::{Compare, CompareOp, CompareTarget, Txn, TxnGet, TxnOp, TxnOpBody};
use super::super::outcome::{Refusal, Success, TxnResponse};
use super::Batch;

/// The limit of a txn's get that names none: the default limit of a list.
const DEFAULT_GET_LIMIT: u64 = 1000;
/// What a key of an answer costs besides key and value: numbers, and the framing of its record.
const ANSWER_OVERHEAD: u64 = 64;

impl Batch<'_> {
    pub(super) fn txn(&mut self, txn: &Txn) -> Result<Result<Success, Refusal>, StateError> {
        let mut succeeded = true;
        for compare in &txn.compare {
            succeeded = succeeded && self.compare(compare)?;
        }
        let ops = if succeeded { &txn.then } else { &txn.or_else };
        if let Some(refusal) = self.check_reads(ops, txn.max_keys, txn.max_answer_bytes)? {
            return Ok(Err(refusal));
        }
        if let Some(refusal) = self.check_branch(ops)? {
            return Ok(Err(refusal));
        }
        let mut responses = Vec::with_capacity(ops.len());
        for op in ops {
            responses.extend(self.txn_op(op)?);
        }
        Ok(Ok(Success::Txn { succeeded, responses }))
    }

    fn compare(&mut self, compare: &Compare) -> Result<bool, StateError> {
        let current = self.current(&compare.key)?;
        let version = current.as_ref().map(|current| &current.version);
        let ordering = match compare.target() {
            CompareTarget::Value => match &current {
                None => return Ok(false),
                Some(current) => self.load(current)?.value.cmp(&compare.value),
            },
            CompareTarget::Version => version.map_or(0, |version| version.version).cmp(&compare.number),
            CompareTarget::CreateRevision => version.map_or(0, |version| version.create_revision).cmp(&compare.number),
            CompareTarget::ModRevision => version.map_or(0, |version| version.revision).cmp(&compare.number),
            CompareTarget::Lease => version.map_or(0, |version| version.lease).cmp(&compare.number),
        };
        Ok(match compare.op() {
            CompareOp::Equal => ordering.is_eq(),
            CompareOp::NotEqual => ordering.is_ne(),
            CompareOp::Less => ordering.is_lt(),
            CompareOp::Greater => ordering.is_gt(),
        })
    }

    /// Refuses a branch that would look at too many keys, or answer too many bytes, before anything of it is done. What the branch itself puts
    /// is counted wherever it may be found.
    fn check_reads(&mut self, ops: &[TxnOp], max_keys: u64, max_answer_bytes: u64) -> Result<Option<Refusal>, StateError> {
        let bound = |max| if max == 0 { u64::MAX } else { max };
        let (max_keys, max_bytes) = (bound(max_keys), bound(max_answer_bytes));
        let (mut keys, mut bytes) = (0u64, 0u64);
        for op in ops {
            let (span, get) = match &op.body {
                Some(TxnOpBody::Get(get)) => (&get.span, Some(get)),
                Some(TxnOpBody::Delete(delete)) => (&delete.span, None),
                Some(TxnOpBody::Put(_)) | None => continue,
            };
            keys = keys.saturating_add(self.count_within(span, max_keys.saturating_sub(keys))?);
            if keys > max_keys {
                return Ok(Some(Refusal::TooManyKeys { max: max_keys }));
            }
            let Some(get) = get.filter(|get| !get.count_only) else { continue };
            let size = |key: &[u8], value_len: u64| ANSWER_OVERHEAD + key.len() as u64 + if get.keys_only { 0 } else { value_len };
            for (key, current) in self.list(&get.span, get.descending, get_limit(get))? {
                bytes = bytes.saturating_add(size(&key, current.version.value_len));
            }
            for op in ops {
                if let Some(TxnOpBody::Put(put)) = &op.body
                    && get.span.contains(&put.key)
                {
                    bytes = bytes.saturating_add(size(&put.key, put.value.len() as u64));
                }
            }
            if bytes > max_bytes {
                return Ok(Some(Refusal::AnswerTooLarge { max: max_bytes }));
            }
        }
        Ok(None)
    }

    /// Refuses a branch before anything of it is done. A range delete counts the keys there are before the txn plus those the
    /// txn puts into the range: never fewer than it would find, and known beforehand.
    fn check_branch(&mut self, ops: &[TxnOp]) -> Result<Option<Refusal>, StateError> {
        let puts = || {
            ops.iter().filter_map(|op| match &op.body {
                Some(TxnOpBody::Put(put)) => Some(put),
                Some(TxnOpBody::Get(_) | TxnOpBody::Delete(_)) | None => None,
            })
        };
        if let Some(put) = puts().find(|put| put.ttl_ms == 0 && put.lease != 0 && !self.core.leases.is_attachable(put.lease)) {
            return Ok(Some(Refusal::LeaseNotFound { id: put.lease }));
        }
        for op in ops {
            if let Some(TxnOpBody::Delete(delete)) = &op.body
                && delete.max_keys != 0
            {
                let keys = self.count(&delete.span)? + puts().filter(|put| delete.span.contains(&put.key)).count() as u64;
                if keys > delete.max_keys {
                    return Ok(Some(Refusal::RangeTooLarge {
                        keys,
                        max: delete.max_keys,
                    }));
                }
            }
        }
        Ok(None)
    }

    fn txn_op(&mut self, op: &TxnOp) -> Result<Option<TxnResponse>, StateError> {
        Ok(match &op.body {
            None => None,
            Some(TxnOpBody::Put(put)) => {
                let current = self.current(&put.key)?;
                self.put_key(put, current.as_ref());
                Some(TxnResponse::Put {
                    created: current.is_none(),
                })
            }
            Some(TxnOpBody::Get(get)) => Some(self.txn_get(get)?),
            Some(TxnOpBody::Delete(delete)) => {
                let keys = self.list(&delete.span, false, usize::MAX)?;
                for (key, current) in &keys {
                    self.delete_key(key, &current.version);
                }
                Some(TxnResponse::Delete {
                    deleted: keys.len() as u64,
                })
            }
        })
    }

    fn txn_get(&mut self, get: &TxnGet) -> Result<TxnResponse, StateError> {
        let count = self.count(&get.span)?;
        if get.count_only {
            return Ok(TxnResponse::Get {
                kvs: Vec::new(),
                count,
                more: false,
            });
        }
        let keys = self.list(&get.span, get.descending, get_limit(get))?;
        let mut kvs = Vec::with_capacity(keys.len());
        for (key, current) in &keys {
            kvs.push(if get.keys_only {
                current.version.without_value(key.clone())
            } else {
                self.load(current)?
            });
        }
        let more = count > kvs.len() as u64;
        Ok(TxnResponse::Get { kvs, count, more })
    }
}

/// How many keys a get of a txn lists.
fn get_limit(get: &TxnGet) -> usize {
    let limit = if get.limit == 0 { DEFAULT_GET_LIMIT } else { get.limit };
    usize::try_from(limit).unwrap_or(usize::MAX)
}
