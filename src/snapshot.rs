//! Snapshots as a stream of bytes: for a peer that is too far behind, for the restart of a node whose store is memory, for backups.
//!
//! ```text
//! "metcdsnp" | header frame | chunk frame … | trailer frame
//! frame   = kind: u8 | payload length: u32 | crc32c of kind, length and payload: u32 | payload        (big endian)
//! header  = what it is a snapshot of (protobuf)      chunk = records: table, key length, key, value length, value
//! trailer = number of chunks and records, blake3 of all bytes before the trailer frame (protobuf)
//! ```
//!
//! *Invariants*
//! - Every frame is checked when it is read, the whole by the trailer; nothing may follow it (rule 8).
//! - [`install`] verifies the whole file before it changes anything: a truncated or altered one is refused, and the store is as before.
//! - Neither side ever holds more than one chunk: about [`CHUNK_BYTES`], or one record if that is larger.

pub(crate) mod fuzzing;

use std::fs::{self, File};
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use prost::Message;
use prost::encoding::{decode_varint, encode_varint};

use crate::datadir::disk::Headroom;
use crate::state::{ContentTally, Record, SnapshotView, StateError};
use crate::store::{KvStore, StoreError, TABLES, WriteBatch};

/// The first bytes of every snapshot.
pub const MAGIC: &[u8; 8] = b"metcdsnp";
/// Version of the format that this build writes and reads.
pub const FORMAT_VERSION: u32 = 1;
/// About the bytes of records in a chunk. A single larger record makes a larger chunk.
pub const CHUNK_BYTES: usize = 256 << 10;

const HEADER: u8 = 1;
const CHUNK: u8 = 2;
const TRAILER: u8 = 3;
const FRAME_HEAD: usize = 9;
/// Larger frames are refused: no record comes near.
const MAX_FRAME: usize = 1 << 30;

/// Why a snapshot could not be written, read or installed.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The operating system refused.
    #[error("snapshot: {what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Its answer.
        source: io::Error,
    },
    /// It is no snapshot, or a truncated or altered one. Nothing was changed.
    #[error("snapshot: damaged: {0}")]
    Corrupt(String),
    /// It was written by a newer build.
    #[error("snapshot: format version {found}, this build reads up to {FORMAT_VERSION}")]
    TooNew {
        /// Its version.
        found: u32,
    },
    /// The state it was to be made of could not be read.
    #[error(transparent)]
    State(#[from] StateError),
    /// The store it was to be installed into failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn corrupt(what: impl Into<String>) -> SnapshotError {
    SnapshotError::Corrupt(what.into())
}

fn io_error(what: &str, path: &Path) -> impl FnOnce(io::Error) -> SnapshotError {
    let what = format!("{what} {}", path.display());
    move |source| SnapshotError::Io { what, source }
}

#[derive(Clone, PartialEq, prost::Message)]
struct HeaderRecord {
    #[prost(uint32, tag = "1")]
    version: u32,
    #[prost(uint64, tag = "2")]
    cluster_id: u64,
    #[prost(uint64, tag = "3")]
    applied_index: u64,
    #[prost(uint64, tag = "4")]
    applied_term: u64,
    #[prost(uint64, tag = "5")]
    revision: u64,
    #[prost(uint64, tag = "6")]
    compacted_revision: u64,
    #[prost(uint64, repeated, tag = "7")]
    voters: Vec<u64>,
    #[prost(uint64, repeated, tag = "8")]
    learners: Vec<u64>,
    #[prost(uint64, repeated, tag = "9")]
    voters_outgoing: Vec<u64>,
    #[prost(uint64, repeated, tag = "10")]
    learners_next: Vec<u64>,
    #[prost(bool, tag = "11")]
    auto_leave: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
struct TrailerRecord {
    #[prost(uint64, tag = "1")]
    chunks: u64,
    #[prost(uint64, tag = "2")]
    records: u64,
    #[prost(bytes = "bytes", tag = "3")]
    blake3: Bytes,
}

/// What a snapshot says of itself. The last three are known only when it was read to its end.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SnapshotMeta {
    /// The cluster it belongs to.
    pub cluster_id: u64,
    /// Index, term and configuration.
    pub applied: crate::state::Applied,
    /// The current revision.
    pub revision: u64,
    /// History below this revision is not in it.
    pub compacted_revision: u64,
    /// Number of records.
    pub records: u64,
    /// Bytes of the whole stream.
    pub bytes: u64,
    /// blake3 of everything before the trailer: its identity.
    pub digest: [u8; 32],
}

impl From<&SnapshotView> for HeaderRecord {
    fn from(view: &SnapshotView) -> HeaderRecord {
        let conf = &view.applied.conf_state;
        HeaderRecord {
            version: FORMAT_VERSION,
            cluster_id: view.cluster_id,
            applied_index: view.applied.index,
            applied_term: view.applied.term,
            revision: view.revision,
            compacted_revision: view.compacted_revision,
            voters: conf.voters.clone(),
            learners: conf.learners.clone(),
            voters_outgoing: conf.voters_outgoing.clone(),
            learners_next: conf.learners_next.clone(),
            auto_leave: conf.auto_leave,
        }
    }
}

impl From<HeaderRecord> for SnapshotMeta {
    fn from(header: HeaderRecord) -> SnapshotMeta {
        let mut meta = SnapshotMeta {
            cluster_id: header.cluster_id,
            revision: header.revision,
            compacted_revision: header.compacted_revision,
            ..SnapshotMeta::default()
        };
        meta.applied.index = header.applied_index;
        meta.applied.term = header.applied_term;
        let conf = &mut meta.applied.conf_state;
        conf.set_voters(header.voters);
        conf.set_learners(header.learners);
        conf.set_voters_outgoing(header.voters_outgoing);
        conf.set_learners_next(header.learners_next);
        conf.set_auto_leave(header.auto_leave);
        meta
    }
}

/// Where the records of a snapshot come from.
pub trait RecordSource: Send {
    /// The next records, about `max_bytes` of them; `None` when there are no more.
    fn next_records(&mut self, max_bytes: usize) -> Result<Option<Vec<Record>>, SnapshotError>;
}

impl RecordSource for SnapshotView {
    fn next_records(&mut self, max_bytes: usize) -> Result<Option<Vec<Record>>, SnapshotError> {
        Ok(SnapshotView::next_records(self, max_bytes)?)
    }
}

/// Makes the stream, piece by piece. Reads the store: call it from a blocking thread.
pub struct SnapshotWriter {
    header: HeaderRecord,
    source: Box<dyn RecordSource>,
    hasher: blake3::Hasher,
    step: Step,
    chunks: u64,
    records: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Header,
    Chunks,
    End,
}

impl SnapshotWriter {
    /// A stream of what `view` sees.
    pub fn new(view: SnapshotView) -> SnapshotWriter {
        SnapshotWriter::of(HeaderRecord::from(&view), Box::new(view))
    }

    fn of(header: HeaderRecord, source: Box<dyn RecordSource>) -> SnapshotWriter {
        SnapshotWriter {
            header,
            source,
            hasher: blake3::Hasher::new(),
            step: Step::Header,
            chunks: 0,
            records: 0,
        }
    }

    /// The next piece of the stream; `None` after the last one.
    pub fn next_chunk(&mut self) -> Result<Option<Bytes>, SnapshotError> {
        match self.step {
            Step::End => Ok(None),
            Step::Header => {
                self.step = Step::Chunks;
                let mut piece = MAGIC.to_vec();
                push_frame(&mut piece, HEADER, &self.header.encode_to_vec())?;
                self.hasher.update(&piece);
                Ok(Some(piece.into()))
            }
            Step::Chunks => match self.source.next_records(CHUNK_BYTES)? {
                Some(records) => {
                    let mut payload = Vec::with_capacity(CHUNK_BYTES + 4096);
                    records.iter().for_each(|record| push_record(&mut payload, record));
                    self.chunks += 1;
                    self.records += records.len() as u64;
                    let mut piece = Vec::with_capacity(payload.len() + FRAME_HEAD);
                    push_frame(&mut piece, CHUNK, &payload)?;
                    self.hasher.update(&piece);
                    Ok(Some(piece.into()))
                }
                None => {
                    self.step = Step::End;
                    let blake3 = Bytes::copy_from_slice(self.hasher.finalize().as_bytes());
                    let trailer = TrailerRecord {
                        chunks: self.chunks,
                        records: self.records,
                        blake3,
                    };
                    let mut piece = Vec::new();
                    push_frame(&mut piece, TRAILER, &trailer.encode_to_vec())?;
                    Ok(Some(piece.into()))
                }
            },
        }
    }
}

fn push_frame(out: &mut Vec<u8>, kind: u8, payload: &[u8]) -> Result<(), SnapshotError> {
    let too_large = || corrupt(format!("a record of {} bytes is too large for a snapshot", payload.len()));
    let length = u32::try_from(payload.len())
        .ok()
        .filter(|_| payload.len() <= MAX_FRAME)
        .ok_or_else(too_large)?;
    let start = out.len();
    out.push(kind);
    out.extend_from_slice(&length.to_be_bytes());
    let crc = crc32c::crc32c_append(crc32c::crc32c(&out[start..]), payload);
    out.extend_from_slice(&crc.to_be_bytes());
    out.extend_from_slice(payload);
    Ok(())
}

fn push_record(out: &mut Vec<u8>, record: &Record) {
    out.push(record.table as u8);
    encode_varint(record.key.len() as u64, out);
    out.extend_from_slice(&record.key);
    encode_varint(record.value.len() as u64, out);
    out.extend_from_slice(&record.value);
}

fn read_record(rest: &mut &[u8]) -> Option<Record> {
    let (tag, after) = rest.split_first()?;
    *rest = after;
    let table = TABLES.into_iter().find(|table| *table as u8 == *tag)?;
    let key = read_part(rest)?.to_vec();
    let value = Arc::from(read_part(rest)?);
    Some(Record { table, key, value })
}

fn read_part<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = usize::try_from(decode_varint(rest).ok()?).ok()?;
    let (part, after) = rest.split_at_checked(length)?;
    *rest = after;
    Some(part)
}

/// Reads a stream and checks it on the way. The records are to be believed only when [`next_records`](Self::next_records) has returned `None`.
pub struct SnapshotReader<R> {
    input: R,
    hasher: blake3::Hasher,
    meta: SnapshotMeta,
    chunks: u64,
    is_finished: bool,
}

impl<R: Read> SnapshotReader<R> {
    /// Begins to read: magic and header.
    pub fn new(mut input: R) -> Result<SnapshotReader<R>, SnapshotError> {
        let mut magic = [0; MAGIC.len()];
        input.read_exact(&mut magic).map_err(read_error)?;
        if magic != *MAGIC {
            return Err(corrupt("this is no metcd snapshot"));
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(&magic);
        let meta = SnapshotMeta {
            bytes: magic.len() as u64,
            ..SnapshotMeta::default()
        };
        let mut reader = SnapshotReader {
            input,
            hasher,
            meta,
            chunks: 0,
            is_finished: false,
        };
        let (kind, head, payload) = reader.read_frame()?;
        let header = HeaderRecord::decode(&payload[..]).map_err(|error| corrupt(format!("header: {error}")))?;
        if kind != HEADER {
            return Err(corrupt("it does not begin with a header"));
        }
        if header.version > FORMAT_VERSION {
            return Err(SnapshotError::TooNew { found: header.version });
        }
        reader.hash(&head, &payload);
        reader.meta = SnapshotMeta {
            bytes: reader.meta.bytes,
            ..header.into()
        };
        Ok(reader)
    }

    /// What the snapshot says of itself.
    pub fn meta(&self) -> &SnapshotMeta {
        &self.meta
    }

    /// The records of the next chunk; `None` when the end was reached and everything is as it was written.
    pub fn next_records(&mut self) -> Result<Option<Vec<Record>>, SnapshotError> {
        if self.is_finished {
            return Ok(None);
        }
        let (kind, head, payload) = self.read_frame()?;
        match kind {
            CHUNK => {
                self.hash(&head, &payload);
                let mut rest = &payload[..];
                let mut records = Vec::new();
                while !rest.is_empty() {
                    records.push(read_record(&mut rest).ok_or_else(|| corrupt("a record cannot be decoded"))?);
                }
                self.chunks += 1;
                self.meta.records += records.len() as u64;
                Ok(Some(records))
            }
            TRAILER => self.finish(&payload).map(|()| None),
            other => Err(corrupt(format!("a frame of unknown kind {other}"))),
        }
    }

    fn finish(&mut self, payload: &[u8]) -> Result<(), SnapshotError> {
        let trailer = TrailerRecord::decode(payload).map_err(|error| corrupt(format!("trailer: {error}")))?;
        let digest = self.hasher.finalize();
        if trailer.chunks != self.chunks || trailer.records != self.meta.records || trailer.blake3[..] != digest.as_bytes()[..] {
            return Err(corrupt("the trailer does not fit the content"));
        }
        let mut one = [0];
        match self.input.read(&mut one) {
            Ok(0) => {}
            Ok(_) => return Err(corrupt("something follows the end")),
            Err(error) => return Err(read_error(error)),
        }
        self.meta.digest = *digest.as_bytes();
        self.is_finished = true;
        Ok(())
    }

    fn hash(&mut self, head: &[u8], payload: &[u8]) {
        self.hasher.update(head);
        self.hasher.update(payload);
    }

    /// One frame: kind, its head as read, payload.
    fn read_frame(&mut self) -> Result<(u8, [u8; FRAME_HEAD], Vec<u8>), SnapshotError> {
        let mut head = [0; FRAME_HEAD];
        self.input.read_exact(&mut head).map_err(read_error)?;
        let [kind, a, b, c, d, e, f, g, h] = head;
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        let crc = u32::from_be_bytes([e, f, g, h]);
        if length > MAX_FRAME {
            return Err(corrupt("a frame claims to be impossibly large"));
        }
        // Grows as bytes arrive: a wrong length costs no memory.
        let mut payload = Vec::with_capacity(length.min(CHUNK_BYTES * 2));
        let got = (&mut self.input)
            .take(length as u64)
            .read_to_end(&mut payload)
            .map_err(read_error)?;
        if got != length {
            return Err(corrupt("it is cut off"));
        }
        if crc32c::crc32c_append(crc32c::crc32c(&head[..5]), &payload) != crc {
            return Err(corrupt("a frame fails its checksum"));
        }
        self.meta.bytes += (FRAME_HEAD + length) as u64;
        Ok((kind, head, payload))
    }
}

fn read_error(source: io::Error) -> SnapshotError {
    if source.kind() == io::ErrorKind::UnexpectedEof {
        return corrupt("it is cut off");
    }
    SnapshotError::Io {
        what: "reading".into(),
        source,
    }
}

/// A reader of a file's records, whose end says whether they are to be believed.
pub fn open_reader(path: &Path) -> Result<SnapshotReader<BufReader<File>>, SnapshotError> {
    let file = File::open(path).map_err(io_error("opening", path))?;
    SnapshotReader::new(BufReader::with_capacity(1 << 20, file))
}

/// Reads a whole snapshot file and checks everything.
pub fn verify_file(path: &Path) -> Result<SnapshotMeta, SnapshotError> {
    verify(open_reader(path)?)
}

/// Reads a whole stream and checks everything.
pub fn verify(mut reader: SnapshotReader<impl Read>) -> Result<SnapshotMeta, SnapshotError> {
    while reader.next_records()?.is_some() {}
    Ok(reader.meta)
}

/// Reads a whole snapshot file, checks everything, and counts the keys that live in it.
pub fn tally_file(path: &Path) -> Result<(SnapshotMeta, ContentTally), SnapshotError> {
    let mut reader = open_reader(path)?;
    let mut tally = ContentTally::default();
    while let Some(records) = reader.next_records()? {
        for record in &records {
            tally.note(record)?;
        }
    }
    Ok((reader.meta, tally))
}

/// Verifies the file, then replaces everything in the store by it, durably. Read the state anew afterwards
/// ([`State::open`](crate::state::State::open) or [`State::reload`](crate::state::State::reload)).
///
/// A crash in between leaves a store that is neither the old nor the new one: the caller marks the installation as begun
/// before (by the file's name) and installs again when it finds the mark.
pub fn install(path: &Path, store: &dyn KvStore) -> Result<SnapshotMeta, SnapshotError> {
    verify_file(path)?;
    load(open_reader(path)?, store)
}

/// The second half of [`install`]: what is read must have been verified before.
pub fn load(mut reader: SnapshotReader<impl Read>, store: &dyn KvStore) -> Result<SnapshotMeta, SnapshotError> {
    store.clear()?;
    while let Some(records) = reader.next_records()? {
        let mut batch = WriteBatch::default();
        batch.ops.reserve(records.len());
        for Record { table, key, value } in records {
            batch.put(table, key, value);
        }
        store.write(batch)?;
    }
    store.sync()?;
    Ok(reader.meta)
}

/// Writes a snapshot to `path`, so that after a crash there is either nothing or all of it under that name: a temporary file
/// beside it, synced, renamed, and the directory synced (rule 4).
pub fn write_file(view: SnapshotView, path: &Path) -> Result<SnapshotMeta, SnapshotError> {
    write_to(SnapshotWriter::new(view), path)
}

/// The same with the records of `more` after those of `view`, which have what else there is to say.
pub fn write_file_with(view: SnapshotView, more: impl RecordSource + 'static, path: &Path) -> Result<SnapshotMeta, SnapshotError> {
    let header = HeaderRecord::from(&view);
    write_to(SnapshotWriter::of(header, Box::new(Chained { view, more })), path)
}

struct Chained<S> {
    view: SnapshotView,
    more: S,
}

impl<S: RecordSource> RecordSource for Chained<S> {
    fn next_records(&mut self, max_bytes: usize) -> Result<Option<Vec<Record>>, SnapshotError> {
        match self.view.next_records(max_bytes)? {
            Some(records) => Ok(Some(records)),
            None => self.more.next_records(max_bytes),
        }
    }
}

fn write_to(writer: SnapshotWriter, path: &Path) -> Result<SnapshotMeta, SnapshotError> {
    let temporary = temporary_name(path);
    let written = write_temporary(writer, &temporary);
    if written.is_err() {
        // Best effort: the error that is reported is the one that happened first.
        let _ = fs::remove_file(&temporary);
    }
    let meta = written?;
    fs::rename(&temporary, path).map_err(io_error("renaming to", path))?;
    sync_directory_of(path)?;
    Ok(meta)
}

fn temporary_name(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".tmp");
    path.with_file_name(name)
}

fn write_temporary(mut writer: SnapshotWriter, path: &Path) -> Result<SnapshotMeta, SnapshotError> {
    let mut meta = SnapshotMeta::from(writer.header.clone());
    let mut file = File::create(path).map_err(io_error("creating", path))?;
    let mut headroom = Headroom::new(path);
    while let Some(piece) = writer.next_chunk()? {
        headroom.check(piece.len()).map_err(io_error("writing", path))?;
        file.write_all(&piece).map_err(io_error("writing", path))?;
        meta.bytes += piece.len() as u64;
    }
    file.sync_all().map_err(io_error("syncing", path))?;
    meta.records = writer.records;
    meta.digest = *writer.hasher.finalize().as_bytes();
    Ok(meta)
}

fn sync_directory_of(path: &Path) -> Result<(), SnapshotError> {
    let directory = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(io_error("syncing", directory))
}
