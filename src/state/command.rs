//! What travels in the log: one [`EntryPayload`] per raft entry, many [`Command`]s in it.
//!
//! Protobuf, so that fields can be added; the payload's feature level guards those that change a result: a member that meets a level
//! above its own stops instead of skipping what it does not know.

use bytes::Bytes;

/// The feature level this build writes and understands.
pub const FEATURE_LEVEL: u32 = 1;

/// The data of one normal raft entry: commands of one member, in the order of their sequence numbers.
///
/// An empty entry (a new leader's first) has no payload at all. The entry's raft `context` holds the leader's stamp, see [`Stamp`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct EntryPayload {
    /// Feature level needed to apply this entry.
    #[prost(uint32, tag = "1")]
    pub feature_level: u32,
    /// The member that proposes.
    #[prost(uint64, tag = "2")]
    pub member: u64,
    /// Its boot id: grows with every start of that member. A newer one supersedes the older one's entries.
    #[prost(uint64, tag = "3")]
    pub boot: u64,
    /// The lowest sequence that member still waits for (Raft thesis §6.3). Anything below is never applied (again).
    #[prost(uint64, tag = "4")]
    pub low_water: u64,
    /// The commands.
    #[prost(message, repeated, tag = "5")]
    pub commands: Vec<Command>,
}

/// The leader's stamp in `Entry.context`: its cluster time in milliseconds when it appended the entry, 8 bytes big endian.
/// The proposing member leaves the context empty; the leader fills it in, also in proposals forwarded to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stamp(pub u64);

impl Stamp {
    /// As the context of an entry.
    pub fn encode(self) -> Bytes {
        Bytes::copy_from_slice(&self.0.to_be_bytes())
    }

    /// From the context of an entry; an absent or odd one is no stamp.
    pub fn decode(context: &[u8]) -> Option<Stamp> {
        context.try_into().ok().map(|bytes| Stamp(u64::from_be_bytes(bytes)))
    }
}

/// One command with its identity within (member, boot).
#[derive(Clone, PartialEq, prost::Message)]
pub struct Command {
    /// Sequence number, from 1, unique within (member, boot).
    #[prost(uint64, tag = "1")]
    pub seq: u64,
    /// The user's `Idempotency-Key`, if the request had one.
    #[prost(message, optional, tag = "2")]
    pub idempotency: Option<Idempotency>,
    /// What to do.
    #[prost(oneof = "Body", tags = "10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20")]
    pub body: Option<Body>,
}

/// `Idempotency-Key` and the identity of the request it belongs to.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Idempotency {
    /// 1 to 64 printable ASCII characters.
    #[prost(string, tag = "1")]
    pub key: String,
    /// Digest of method, decoded key, conditions, parameters but `timeout`, and the body.
    #[prost(bytes = "bytes", tag = "2")]
    pub fingerprint: Bytes,
    /// The configured `idempotency.max_entries` of the member that proposed; applied as the bound.
    #[prost(uint64, tag = "3")]
    pub max_entries: u64,
    /// While the records take as many bytes, a new one is refused as at `max_entries`; 0: no bound.
    #[prost(uint64, tag = "4")]
    pub max_bytes: u64,
}

/// The commands.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Body {
    /// Sets one key.
    #[prost(message, tag = "10")]
    Put(Put),
    /// Deletes one key.
    #[prost(message, tag = "11")]
    Delete(Delete),
    /// Deletes a range.
    #[prost(message, tag = "12")]
    DeleteRange(DeleteRange),
    /// Compares, then one of two branches.
    #[prost(message, tag = "13")]
    Txn(Txn),
    /// Grants a lease.
    #[prost(message, tag = "14")]
    LeaseGrant(LeaseGrant),
    /// Revokes a lease: its keys go in one revision.
    #[prost(message, tag = "15")]
    LeaseRevoke(LeaseRevoke),
    /// The leader found a lease expired. Void unless the entry's term is `term`.
    #[prost(message, tag = "16")]
    LeaseExpire(LeaseExpire),
    /// Forgets history.
    #[prost(message, tag = "17")]
    Compact(Compact),
    /// The leader evicts idempotency records. Void unless the entry's term is `term`.
    #[prost(message, tag = "18")]
    Evict(Evict),
    /// A member publishes its name and client URL, or an operator changes them (PATCH).
    #[prost(message, tag = "19")]
    MemberUpdate(MemberUpdate),
    /// A member's state hash at an applied index, for comparison in band.
    #[prost(message, tag = "20")]
    HashReport(HashReport),
}

/// Conditions of a PUT or DELETE, decided at apply. Absent parts hold.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Conditions {
    /// `If-Match: *`: the key exists.
    #[prost(bool, tag = "1")]
    pub if_match_any: bool,
    /// `If-Match: "7", "9"`: the key's mod_revision is one of these.
    #[prost(uint64, repeated, tag = "2")]
    pub if_match: Vec<u64>,
    /// `If-None-Match: *`: the key does not exist.
    #[prost(bool, tag = "3")]
    pub if_none_match_any: bool,
    /// `If-None-Match: "7"`: the key's mod_revision is none of these.
    #[prost(uint64, repeated, tag = "4")]
    pub if_none_match: Vec<u64>,
    /// An `If-Match` was given, though no tag in it can match (weak or foreign tags): fails.
    #[prost(bool, tag = "5")]
    pub if_match_never: bool,
}

/// `PUT /{key}`, and a put within a txn.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Put {
    /// Key bytes.
    #[prost(bytes = "bytes", tag = "1")]
    pub key: Bytes,
    /// Value bytes. A slice of the entry: copy what is kept.
    #[prost(bytes = "bytes", tag = "2")]
    pub value: Bytes,
    /// Conditions.
    #[prost(message, optional, tag = "3")]
    pub conditions: Option<Conditions>,
    /// Attach this existing lease (0 = none). Refused with `LeaseNotFound` if it is gone.
    #[prost(uint64, tag = "4")]
    pub lease: u64,
    /// Attach a lease of this many milliseconds that belongs to the key alone (0 = none).
    #[prost(uint64, tag = "5")]
    pub ttl_ms: u64,
    /// Answer with the previous key-value.
    #[prost(bool, tag = "6")]
    pub want_prev: bool,
}

/// `DELETE /{key}`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Delete {
    /// Key bytes.
    #[prost(bytes = "bytes", tag = "1")]
    pub key: Bytes,
    /// Conditions.
    #[prost(message, optional, tag = "3")]
    pub conditions: Option<Conditions>,
    /// Answer with the previous key-value.
    #[prost(bool, tag = "6")]
    pub want_prev: bool,
}

/// Keys `start..end` in byte order; an absent `end` means to the last key, an empty `start` from the first.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct KeySpan {
    /// First key.
    #[prost(bytes = "bytes", tag = "1")]
    pub start: Bytes,
    /// The key after the last one.
    #[prost(bytes = "bytes", optional, tag = "2")]
    pub end: Option<Bytes>,
}

impl KeySpan {
    /// Exactly one key.
    pub fn single(key: &[u8]) -> KeySpan {
        let mut end = Vec::with_capacity(key.len() + 1);
        end.extend_from_slice(key);
        end.push(0);
        KeySpan {
            start: Bytes::copy_from_slice(key),
            end: Some(end.into()),
        }
    }

    /// All keys that begin with `prefix`; the empty prefix is everything.
    pub fn prefix(prefix: &[u8]) -> KeySpan {
        let mut end = prefix.to_vec();
        while let Some(last) = end.pop() {
            if last < 0xff {
                end.push(last + 1);
                return KeySpan {
                    start: Bytes::copy_from_slice(prefix),
                    end: Some(end.into()),
                };
            }
        }
        KeySpan {
            start: Bytes::copy_from_slice(prefix),
            end: None,
        }
    }

    /// Whether `key` lies within.
    pub fn contains(&self, key: &[u8]) -> bool {
        key >= &self.start[..] && self.end.as_ref().is_none_or(|end| key < &end[..])
    }
}

/// `DELETE /v1/kv?prefix=`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct DeleteRange {
    /// Which keys.
    #[prost(message, required, tag = "1")]
    pub span: KeySpan,
    /// More keys than this: refused with `RangeTooLarge`, nothing changed.
    #[prost(uint64, tag = "2")]
    pub max_keys: u64,
}

/// `POST /v1/txn`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Txn {
    /// All must hold for `then`.
    #[prost(message, repeated, tag = "1")]
    pub compare: Vec<Compare>,
    /// Run if they do.
    #[prost(message, repeated, tag = "2")]
    pub then: Vec<TxnOp>,
    /// Run if they do not.
    #[prost(message, repeated, tag = "3")]
    pub or_else: Vec<TxnOp>,
    /// Its gets may answer so many bytes, else it is refused with `AnswerTooLarge` before anything is done; 0: no bound. The answer is
    /// made by every member, and kept by every member under an `Idempotency-Key`.
    #[prost(uint64, tag = "4")]
    pub max_answer_bytes: u64,
    /// Its gets and deletes may look at so many keys, else it is refused with `TooManyKeys`; 0: no bound. While it looks, nothing else
    /// is applied.
    #[prost(uint64, tag = "5")]
    pub max_keys: u64,
}

/// What a compare looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum CompareTarget {
    /// The value's bytes.
    Value = 0,
    /// Number of writes since the key was created; 0 if absent.
    Version = 1,
    /// Revision that created the key; 0 if absent.
    CreateRevision = 2,
    /// Revision of the last change; 0 if absent.
    ModRevision = 3,
    /// Attached lease; 0 if none.
    Lease = 4,
}

/// How it is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum CompareOp {
    /// Equal.
    Equal = 0,
    /// Not equal.
    NotEqual = 1,
    /// The key's side is less than the given one.
    Less = 2,
    /// The key's side is greater than the given one.
    Greater = 3,
}

/// One compare. A value compare on an absent key fails, whatever the operator (as in etcd).
#[derive(Clone, PartialEq, prost::Message)]
pub struct Compare {
    /// Key bytes.
    #[prost(bytes = "bytes", tag = "1")]
    pub key: Bytes,
    /// Left side.
    #[prost(enumeration = "CompareTarget", tag = "2")]
    pub target: i32,
    /// Operator.
    #[prost(enumeration = "CompareOp", tag = "3")]
    pub op: i32,
    /// Right side for numbers.
    #[prost(uint64, tag = "4")]
    pub number: u64,
    /// Right side for values.
    #[prost(bytes = "bytes", tag = "5")]
    pub value: Bytes,
}

/// One operation of a txn's branch.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TxnOp {
    /// Which.
    #[prost(oneof = "TxnOpBody", tags = "1, 2, 3")]
    pub body: Option<TxnOpBody>,
}

/// The operations a txn can hold.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum TxnOpBody {
    /// A put (without conditions of its own).
    #[prost(message, tag = "1")]
    Put(Put),
    /// A read of the state as this transaction has left it so far.
    #[prost(message, tag = "2")]
    Get(TxnGet),
    /// Deletes a key or a range.
    #[prost(message, tag = "3")]
    Delete(DeleteRange),
}

/// A get within a txn.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TxnGet {
    /// Which keys.
    #[prost(message, required, tag = "1")]
    pub span: KeySpan,
    /// At most this many (0 = the server's default limit of a list).
    #[prost(uint64, tag = "2")]
    pub limit: u64,
    /// Descending order.
    #[prost(bool, tag = "3")]
    pub descending: bool,
    /// Without values.
    #[prost(bool, tag = "4")]
    pub keys_only: bool,
    /// Only the number of keys.
    #[prost(bool, tag = "5")]
    pub count_only: bool,
    /// A single key was asked for, not a range: shapes the answer only.
    #[prost(bool, tag = "6")]
    pub single: bool,
}

/// `POST /v1/leases`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct LeaseGrant {
    /// Time to live in milliseconds.
    #[prost(uint64, tag = "1")]
    pub ttl_ms: u64,
    /// Wanted id, 0 = assigned at apply.
    #[prost(uint64, tag = "2")]
    pub id: u64,
}

/// `DELETE /v1/leases/{id}`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct LeaseRevoke {
    /// Lease id.
    #[prost(uint64, tag = "1")]
    pub id: u64,
}

/// A lease's time is over, says the leader of `term`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct LeaseExpire {
    /// Lease id.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// The term of the leader that decided. In an entry of another term the command is void: keepalives answered since would be broken otherwise.
    #[prost(uint64, tag = "2")]
    pub term: u64,
}

/// `POST /v1/compact`, and the leader's own by `[history]`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Compact {
    /// History below this revision is forgotten (reads *at* it still work).
    #[prost(uint64, tag = "1")]
    pub revision: u64,
}

/// Evicts idempotency records whose stamp is at most `up_to_stamp`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Evict {
    /// Records made at this cluster time (ms) or before go.
    #[prost(uint64, tag = "1")]
    pub up_to_stamp: u64,
    /// See [`LeaseExpire::term`].
    #[prost(uint64, tag = "2")]
    pub term: u64,
}

/// Changes what is known of a member; absent fields stay.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MemberUpdate {
    /// Member id.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// New name.
    #[prost(string, optional, tag = "2")]
    pub name: Option<String>,
    /// New client URL.
    #[prost(string, optional, tag = "3")]
    pub client_url: Option<String>,
    /// New peer URL.
    #[prost(string, optional, tag = "4")]
    pub peer_url: Option<String>,
    /// Binds the member's data directory at first contact; refused if another one is bound.
    #[prost(uint64, optional, tag = "5")]
    pub incarnation: Option<u64>,
    /// Feature level the member advertises.
    #[prost(uint32, optional, tag = "6")]
    pub feature_level: Option<u32>,
    /// New wanted role, see [`MemberRole`].
    #[prost(enumeration = "MemberRole", optional, tag = "7")]
    pub wanted_role: Option<i32>,
}

/// A member's state hash at an applied index.
#[derive(Clone, PartialEq, prost::Message)]
pub struct HashReport {
    /// Who reports.
    #[prost(uint64, tag = "1")]
    pub member: u64,
    /// At which applied index.
    #[prost(uint64, tag = "2")]
    pub index: u64,
    /// The digest, 16 bytes.
    #[prost(bytes = "bytes", tag = "3")]
    pub hash: Bytes,
}

/// Role of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum MemberRole {
    /// Votes.
    Voter = 0,
    /// Receives the log, does not vote.
    Learner = 1,
}

/// The `context` of a raft configuration change: what it means to the member table. The raft part (`ConfChangeV2`) must agree with it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MembershipChange {
    /// (member, boot, seq) of the proposer, so that the one that waits is answered once.
    #[prost(uint64, tag = "1")]
    pub proposer: u64,
    /// See [`EntryPayload::boot`].
    #[prost(uint64, tag = "2")]
    pub boot: u64,
    /// See [`Command::seq`]; a number space of its own.
    #[prost(uint64, tag = "3")]
    pub seq: u64,
    /// Members that enter, as learners (or already known ones that become voters: id only).
    #[prost(message, repeated, tag = "4")]
    pub add: Vec<MemberRecord>,
    /// Ids to promote to voter.
    #[prost(uint64, repeated, tag = "5")]
    pub promote: Vec<u64>,
    /// Ids to remove.
    #[prost(uint64, repeated, tag = "6")]
    pub remove: Vec<u64>,
    /// `POST /members/replace`: the pair is remembered with the new learner until it is done.
    #[prost(uint64, tag = "7")]
    pub replaces: u64,
}

/// What replicated state knows of a member.
#[derive(Clone, PartialEq, Eq, prost::Message, serde::Serialize, serde::Deserialize)]
pub struct MemberRecord {
    /// Id, never used again once removed.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// Name; may be empty until the member publishes it.
    #[prost(string, tag = "2")]
    pub name: String,
    /// Where its peers reach it.
    #[prost(string, tag = "3")]
    pub peer_url: String,
    /// Where clients reach it; empty until published.
    #[prost(string, tag = "4")]
    pub client_url: String,
    /// Data directory it is bound to, 0 before first contact.
    #[prost(uint64, tag = "5")]
    pub incarnation: u64,
    /// The role it shall have; a learner that is wanted as a voter is promoted once caught up.
    #[prost(enumeration = "MemberRole", tag = "6")]
    pub wanted_role: i32,
    /// Member that this one replaces once caught up, 0 = none.
    #[prost(uint64, tag = "7")]
    pub replaces: u64,
    /// Feature level it advertises.
    #[prost(uint32, tag = "8")]
    pub feature_level: u32,
    /// Added by hand, before its data directory was known: the first one that comes from `peer_url` is it, and no other.
    #[prost(bool, tag = "9")]
    #[serde(default)]
    pub bound_by_url: bool,
}
