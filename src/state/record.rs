//! Outcomes as records: what an `Idempotency-Key` remembers. Only outcomes that are replayed have one.

use bytes::Bytes;

use super::outcome::{KeyValue, Outcome, Refusal, Success, TxnResponse};

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct OutcomeRecord {
    #[prost(uint64, tag = "1")]
    revision: u64,
    #[prost(oneof = "ResultRecord", tags = "10, 11, 12, 13, 14, 15, 16, 17, 20, 21, 22")]
    result: Option<ResultRecord>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum ResultRecord {
    #[prost(message, tag = "10")]
    Put(PutRecord),
    #[prost(message, tag = "11")]
    Delete(DeleteRecord),
    #[prost(uint64, tag = "12")]
    DeleteRange(u64),
    #[prost(message, tag = "13")]
    Txn(TxnRecord),
    #[prost(message, tag = "14")]
    LeaseGrant(LeaseGrantRecord),
    #[prost(uint64, tag = "15")]
    LeaseRevoke(u64),
    #[prost(uint64, tag = "16")]
    Compact(u64),
    #[prost(bool, tag = "17")]
    Done(bool),
    #[prost(bool, tag = "20")]
    NotFound(bool),
    /// The current revision, 0 if the key does not exist.
    #[prost(uint64, tag = "21")]
    PreconditionFailed(u64),
    #[prost(uint64, tag = "22")]
    LeaseNotFound(u64),
}

#[derive(Clone, PartialEq, prost::Message)]
struct PutRecord {
    #[prost(bool, tag = "1")]
    created: bool,
    #[prost(message, optional, tag = "2")]
    prev: Option<KeyValueRecord>,
    #[prost(uint64, tag = "3")]
    lease: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct DeleteRecord {
    #[prost(message, optional, tag = "1")]
    prev: Option<KeyValueRecord>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct LeaseGrantRecord {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(uint64, tag = "2")]
    ttl_ms: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct TxnRecord {
    #[prost(bool, tag = "1")]
    succeeded: bool,
    #[prost(message, repeated, tag = "2")]
    responses: Vec<ResponseRecord>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ResponseRecord {
    #[prost(oneof = "ResponseBody", tags = "1, 2, 3")]
    body: Option<ResponseBody>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum ResponseBody {
    #[prost(bool, tag = "1")]
    Put(bool),
    #[prost(message, tag = "2")]
    Get(GetRecord),
    #[prost(uint64, tag = "3")]
    Delete(u64),
}

#[derive(Clone, PartialEq, prost::Message)]
struct GetRecord {
    #[prost(message, repeated, tag = "1")]
    kvs: Vec<KeyValueRecord>,
    #[prost(uint64, tag = "2")]
    count: u64,
    #[prost(bool, tag = "3")]
    more: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
struct KeyValueRecord {
    #[prost(bytes = "bytes", tag = "1")]
    key: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    value: Bytes,
    #[prost(uint64, tag = "3")]
    create_revision: u64,
    #[prost(uint64, tag = "4")]
    mod_revision: u64,
    #[prost(uint64, tag = "5")]
    version: u64,
    #[prost(uint64, tag = "6")]
    lease: u64,
}

impl From<&KeyValue> for KeyValueRecord {
    fn from(kv: &KeyValue) -> KeyValueRecord {
        let KeyValue {
            key,
            value,
            create_revision,
            mod_revision,
            version,
            lease,
        } = kv.clone();
        KeyValueRecord {
            key,
            value,
            create_revision,
            mod_revision,
            version,
            lease,
        }
    }
}

impl From<KeyValueRecord> for KeyValue {
    fn from(record: KeyValueRecord) -> KeyValue {
        let KeyValueRecord {
            key,
            value,
            create_revision,
            mod_revision,
            version,
            lease,
        } = record;
        KeyValue {
            key,
            value,
            create_revision,
            mod_revision,
            version,
            lease,
        }
    }
}

impl OutcomeRecord {
    /// The record of an outcome that a retry gets again (2xx, 404, 412); `None` for what is refused without being recorded.
    pub(super) fn from_outcome(outcome: &Outcome) -> Option<OutcomeRecord> {
        let result = match &outcome.result {
            Ok(success) => ResultRecord::from(success),
            Err(Refusal::NotFound) => ResultRecord::NotFound(true),
            Err(Refusal::PreconditionFailed { current }) => ResultRecord::PreconditionFailed(current.unwrap_or(0)),
            Err(Refusal::LeaseNotFound { id }) => ResultRecord::LeaseNotFound(*id),
            Err(
                Refusal::LeaseExists { .. }
                | Refusal::RangeTooLarge { .. }
                | Refusal::AnswerTooLarge { .. }
                | Refusal::TooManyKeys { .. }
                | Refusal::IdempotencyKeyReused
                | Refusal::IdempotencyTableFull
                | Refusal::FutureRevision { .. }
                | Refusal::Compacted { .. }
                | Refusal::MemberNotFound { .. }
                | Refusal::Conflict { .. }
                | Refusal::Void
                | Refusal::AlreadyApplied,
            ) => return None,
        };
        Some(OutcomeRecord {
            revision: outcome.revision,
            result: Some(result),
        })
    }

    /// The outcome again.
    pub(super) fn into_outcome(self) -> Option<Outcome> {
        let result = match self.result? {
            ResultRecord::Put(PutRecord { created, prev, lease }) => Ok(Success::Put {
                created,
                prev: prev.map(Into::into),
                lease,
            }),
            ResultRecord::Delete(DeleteRecord { prev }) => Ok(Success::Delete {
                prev: prev.map(Into::into),
            }),
            ResultRecord::DeleteRange(deleted) => Ok(Success::DeleteRange { deleted }),
            ResultRecord::Txn(TxnRecord { succeeded, responses }) => {
                let responses = responses
                    .into_iter()
                    .map(ResponseRecord::into_response)
                    .collect::<Option<Vec<_>>>()?;
                Ok(Success::Txn { succeeded, responses })
            }
            ResultRecord::LeaseGrant(LeaseGrantRecord { id, ttl_ms }) => Ok(Success::LeaseGrant { id, ttl_ms }),
            ResultRecord::LeaseRevoke(deleted) => Ok(Success::LeaseRevoke { deleted }),
            ResultRecord::Compact(compacted_revision) => Ok(Success::Compact { compacted_revision }),
            ResultRecord::Done(_) => Ok(Success::Done),
            ResultRecord::NotFound(_) => Err(Refusal::NotFound),
            ResultRecord::PreconditionFailed(current) => Err(Refusal::PreconditionFailed {
                current: (current != 0).then_some(current),
            }),
            ResultRecord::LeaseNotFound(id) => Err(Refusal::LeaseNotFound { id }),
        };
        Some(Outcome {
            revision: self.revision,
            replayed: false,
            result,
        })
    }
}

impl From<&Success> for ResultRecord {
    fn from(success: &Success) -> ResultRecord {
        match success {
            Success::Put { created, prev, lease } => ResultRecord::Put(PutRecord {
                created: *created,
                prev: prev.as_ref().map(Into::into),
                lease: *lease,
            }),
            Success::Delete { prev } => ResultRecord::Delete(DeleteRecord {
                prev: prev.as_ref().map(Into::into),
            }),
            Success::DeleteRange { deleted } => ResultRecord::DeleteRange(*deleted),
            Success::Txn { succeeded, responses } => ResultRecord::Txn(TxnRecord {
                succeeded: *succeeded,
                responses: responses.iter().map(Into::into).collect(),
            }),
            Success::LeaseGrant { id, ttl_ms } => ResultRecord::LeaseGrant(LeaseGrantRecord { id: *id, ttl_ms: *ttl_ms }),
            Success::LeaseRevoke { deleted } => ResultRecord::LeaseRevoke(*deleted),
            Success::Compact { compacted_revision } => ResultRecord::Compact(*compacted_revision),
            Success::Done => ResultRecord::Done(true),
        }
    }
}

impl From<&TxnResponse> for ResponseRecord {
    fn from(response: &TxnResponse) -> ResponseRecord {
        let body = match response {
            TxnResponse::Put { created } => ResponseBody::Put(*created),
            TxnResponse::Get { kvs, count, more } => ResponseBody::Get(GetRecord {
                kvs: kvs.iter().map(Into::into).collect(),
                count: *count,
                more: *more,
            }),
            TxnResponse::Delete { deleted } => ResponseBody::Delete(*deleted),
        };
        ResponseRecord { body: Some(body) }
    }
}

impl ResponseRecord {
    fn into_response(self) -> Option<TxnResponse> {
        Some(match self.body? {
            ResponseBody::Put(created) => TxnResponse::Put { created },
            ResponseBody::Get(GetRecord { kvs, count, more }) => TxnResponse::Get {
                kvs: kvs.into_iter().map(Into::into).collect(),
                count,
                more,
            },
            ResponseBody::Delete(deleted) => TxnResponse::Delete { deleted },
        })
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    #[test]
    fn every_replayed_outcome_survives_its_record() {
        let kv = KeyValue {
            key: "k".into(),
            value: "v".into(),
            create_revision: 2,
            mod_revision: 5,
            version: 3,
            lease: 9,
        };
        let results = [
            Ok(Success::Put {
                created: true,
                prev: None,
                lease: 4,
            }),
            Ok(Success::Put {
                created: false,
                prev: Some(kv.clone()),
                lease: 0,
            }),
            Ok(Success::Delete { prev: Some(kv.clone()) }),
            Ok(Success::DeleteRange { deleted: 0 }),
            Ok(Success::Txn {
                succeeded: false,
                responses: vec![
                    TxnResponse::Put { created: false },
                    TxnResponse::Get {
                        kvs: vec![kv],
                        count: 7,
                        more: true,
                    },
                    TxnResponse::Delete { deleted: 0 },
                ],
            }),
            Ok(Success::LeaseGrant { id: 1, ttl_ms: 2 }),
            Ok(Success::LeaseRevoke { deleted: 3 }),
            Ok(Success::Compact { compacted_revision: 4 }),
            Ok(Success::Done),
            Err(Refusal::NotFound),
            Err(Refusal::PreconditionFailed { current: None }),
            Err(Refusal::PreconditionFailed { current: Some(8) }),
            Err(Refusal::LeaseNotFound { id: 6 }),
        ];
        for result in results {
            let outcome = Outcome {
                revision: 11,
                replayed: false,
                result,
            };
            let bytes = OutcomeRecord::from_outcome(&outcome).unwrap().encode_to_vec();
            assert_eq!(OutcomeRecord::decode(&bytes[..]).unwrap().into_outcome(), Some(outcome));
        }
    }

    #[test]
    fn refusals_that_are_not_replayed_have_no_record() {
        let outcome = Outcome {
            revision: 1,
            replayed: false,
            result: Err(Refusal::IdempotencyTableFull),
        };
        assert_eq!(OutcomeRecord::from_outcome(&outcome), None);
    }
}
