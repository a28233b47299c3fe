//! Who a data directory belongs to: `identity.toml`, and `boot`, the count of its starts.
//!
//! Both are short texts that end with a line holding a checksum of what stands above: a flipped bit in an id must not make another member.

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use super::DataDirError;
use super::disk::write_atomically;

/// The format this program writes, and the newest it reads.
pub const FORMAT: u32 = 1;

pub(super) const IDENTITY_NAME: &str = "identity.toml";
pub(super) const BOOT_NAME: &str = "boot";

/// What begins the last line.
const CHECKSUM_MARK: &str = "# checksum ";

/// Whose data this is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Version of the directory's layout.
    pub format: u32,
    /// `cluster.name` when the directory was made to found that cluster; empty for one that joined, whose members do not tell its name.
    pub cluster_name: String,
    /// The cluster; `None` until it was founded or joined. A TOML integer has 63 bits and this has 64, so it is written in hexadecimal.
    #[serde(with = "hex", default, skip_serializing_if = "Option::is_none")]
    pub cluster_id: Option<u64>,
    /// The member; `None` while a joiner waits for its id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_id: Option<u64>,
    /// Random, drawn once per directory: tells a wiped and reused id from the member it was.
    #[serde(with = "hex_always")]
    pub incarnation: u64,
    /// Engine of the log.
    pub wal_engine: String,
    /// Backend of the store.
    pub store_backend: String,
    /// The log was made: if it is not there later, it was lost, and with it entries that this member acknowledged.
    #[serde(default)]
    pub has_log: bool,
}

impl Identity {
    /// Reads `identity.toml`; `None` if there is none.
    pub(super) fn read(data_dir: &Path) -> Result<Option<Self>, DataDirError> {
        let path = data_dir.join(IDENTITY_NAME);
        let Some(text) = read_text(&path)? else { return Ok(None) };
        refuse_newer(&path, &text)?;
        let body = verified(&path, &text)?;
        toml::from_str(body)
            .map(Some)
            .map_err(|e| DataDirError::damaged(&path, e.message()))
    }

    /// Writes it durably.
    pub(super) fn write(&self, data_dir: &Path) -> Result<(), DataDirError> {
        let path = data_dir.join(IDENTITY_NAME);
        let body = toml::to_string(self).map_err(|e| DataDirError::io(&path, io::Error::other(e)))?;
        write_verified(
            &path,
            &format!("# Whose data this directory holds. Written by metcd; do not edit.\n{body}"),
        )
    }
}

/// Reads the count of starts; `None` if there is no file.
pub(super) fn read_boot(data_dir: &Path) -> Result<Option<u64>, DataDirError> {
    let path = data_dir.join(BOOT_NAME);
    let Some(text) = read_text(&path)? else { return Ok(None) };
    let count = verified(&path, &text)?
        .trim()
        .parse()
        .map_err(|_| DataDirError::damaged(&path, "not a number"))?;
    Ok(Some(count))
}

/// Writes it durably.
pub(super) fn write_boot(data_dir: &Path, boot: u64) -> Result<(), DataDirError> {
    write_verified(&data_dir.join(BOOT_NAME), &format!("{boot}\n"))
}

fn read_text(path: &Path) -> Result<Option<String>, DataDirError> {
    match std::fs::read(path) {
        Ok(bytes) => String::from_utf8(bytes)
            .map(Some)
            .map_err(|_| DataDirError::damaged(path, "not UTF-8")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(DataDirError::io(path, error)),
    }
}

/// Comes before the checksum: a newer format may have another one.
fn refuse_newer(path: &Path, text: &str) -> Result<(), DataDirError> {
    let format = toml::from_str::<toml::Table>(text)
        .ok()
        .and_then(|table| table.get("format")?.as_integer());
    match format {
        Some(format) if format > i64::from(FORMAT) => Err(DataDirError::NewerFormat {
            path: path.display().to_string(),
            format,
        }),
        Some(_) | None => Ok(()),
    }
}

fn verified<'a>(path: &Path, text: &'a str) -> Result<&'a str, DataDirError> {
    let (body, mark) = text
        .rfind(CHECKSUM_MARK)
        .map(|at| text.split_at(at))
        .ok_or_else(|| DataDirError::damaged(path, "no checksum"))?;
    if mark != checksum_line(body) {
        return Err(DataDirError::damaged(path, "the checksum does not fit"));
    }
    Ok(body)
}

fn write_verified(path: &Path, body: &str) -> Result<(), DataDirError> {
    let text = format!("{body}{}", checksum_line(body));
    write_atomically(path, text.as_bytes()).map_err(|e| DataDirError::io(path, e))
}

fn checksum_line(body: &str) -> String {
    format!("{CHECKSUM_MARK}{:016x}\n", xxh3_64(body.as_bytes()))
}

/// A `u64` as 16 hexadecimal digits.
mod hex_always {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(value: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format!("{value:016x}"))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        let text = String::deserialize(deserializer)?;
        u64::from_str_radix(&text, 16).map_err(D::Error::custom)
    }
}

/// The same for an `Option`.
mod hex {
    use serde::{Deserializer, Serializer};

    pub fn serialize<S: Serializer>(value: &Option<u64>, serializer: S) -> Result<S::Ok, S::Error> {
        match value {
            Some(value) => super::hex_always::serialize(value, serializer),
            None => serializer.serialize_none(),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
        super::hex_always::deserialize(deserializer).map(Some)
    }
}
