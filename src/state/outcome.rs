//! What a command came to: the same value on every member, decided at apply.

use bytes::Bytes;

/// The answer to one command.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Revision the answer reflects: the one it made if it changed something, otherwise the current one.
    pub revision: u64,
    /// Found under its `Idempotency-Key` (or already applied under its sequence): nothing was changed this time.
    pub replayed: bool,
    /// What happened.
    pub result: Result<Success, Refusal>,
}

/// Results by command.
#[derive(Debug, Clone, PartialEq)]
pub enum Success {
    /// Put: `created` if the key was new; `prev` if it was asked for and existed; `lease` is the attached one (0 = none).
    Put {
        /// The key was new.
        created: bool,
        /// The key before, if it was asked for and existed.
        prev: Option<KeyValue>,
        /// The attached lease, 0 = none.
        lease: u64,
    },
    /// Delete of one key; `prev` if it was asked for.
    Delete {
        /// The key before, if it was asked for.
        prev: Option<KeyValue>,
    },
    /// Range delete: number of keys deleted. The revision is new only if it is not 0.
    DeleteRange {
        /// Number of keys deleted.
        deleted: u64,
    },
    /// Txn.
    Txn {
        /// All compares held.
        succeeded: bool,
        /// One for each operation of the branch that was run.
        responses: Vec<TxnResponse>,
    },
    /// A lease was granted.
    LeaseGrant {
        /// Its id.
        id: u64,
        /// Its time to live in milliseconds.
        ttl_ms: u64,
    },
    /// A lease and its keys are gone.
    LeaseRevoke {
        /// Number of keys deleted.
        deleted: u64,
    },
    /// Compacted; the revision below which history is gone.
    Compact {
        /// What is compacted now.
        compacted_revision: u64,
    },
    /// Anything that has nothing to say.
    Done,
}

/// Refusals decided at apply: deterministic, not failures of the node.
#[derive(Debug, Clone, PartialEq)]
pub enum Refusal {
    /// Delete of a key that is not there (404).
    NotFound,
    /// A condition does not hold (412); the key's current mod_revision if it exists.
    PreconditionFailed {
        /// The key's mod_revision if it exists.
        current: Option<u64>,
    },
    /// The lease is not (or no longer) there (404).
    LeaseNotFound {
        /// The lease asked for.
        id: u64,
    },
    /// The wanted lease id is taken.
    LeaseExists {
        /// The lease asked for.
        id: u64,
    },
    /// A range delete of more keys than allowed (400).
    RangeTooLarge {
        /// Keys in the range.
        keys: u64,
        /// Keys allowed.
        max: u64,
    },
    /// The gets of a txn would answer more bytes than allowed (400).
    AnswerTooLarge {
        /// Bytes allowed.
        max: u64,
    },
    /// The gets and deletes of a txn would look at more keys than allowed (400).
    TooManyKeys {
        /// Keys allowed.
        max: u64,
    },
    /// The same `Idempotency-Key` came with another request (422).
    IdempotencyKeyReused,
    /// The table of idempotency records is full (429).
    IdempotencyTableFull,
    /// Compaction beyond the current revision (400).
    FutureRevision {
        /// The current revision.
        current: u64,
    },
    /// Already compacted (410).
    Compacted {
        /// What is compacted.
        compacted_revision: u64,
    },
    /// No such member (404).
    MemberNotFound {
        /// The member asked for.
        id: u64,
    },
    /// Membership change that cannot be (409), with the code of API.md and a sentence.
    Conflict {
        /// Which conflict.
        code: ConflictCode,
        /// A sentence for the user.
        detail: String,
    },
    /// The command belongs to another term's leader and is void. Never seen by users.
    Void,
    /// Applied before under the same sequence, and the first result is no longer known: the outcome is unknown to the caller (504).
    AlreadyApplied,
}

/// The `409` codes of API.md.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ConflictCode {
    /// The id is there with another address.
    MemberExists,
    /// The id was removed once.
    MemberIdUsed,
    /// Another change is under way.
    ChangeInProgress,
    /// It would cost the quorum.
    UnsafeChange,
    /// Promotion of something that is no learner.
    NotALearner,
}

/// One key-value with its metadata.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyValue {
    /// Key bytes.
    pub key: Bytes,
    /// Value bytes; empty in a `keys_only` answer.
    pub value: Bytes,
    /// Revision that created the key.
    pub create_revision: u64,
    /// Revision of this value.
    pub mod_revision: u64,
    /// Number of writes since it was created, from 1.
    pub version: u64,
    /// Attached lease, 0 = none.
    pub lease: u64,
}

/// The response of one operation of a txn.
#[derive(Debug, Clone, PartialEq)]
pub enum TxnResponse {
    /// Of a put.
    Put {
        /// The key was new.
        created: bool,
    },
    /// Of a get.
    Get {
        /// The key-values, in the order asked for.
        kvs: Vec<KeyValue>,
        /// Keys in the whole span.
        count: u64,
        /// There are more than were returned.
        more: bool,
    },
    /// Of a delete.
    Delete {
        /// Number of keys deleted.
        deleted: u64,
    },
}
