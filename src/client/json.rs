//! JSON as the HTTP contract has it: text where bytes are UTF-8, base64 in a field of its own where they are not.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::de::{DeserializeOwned, Error as _};
use serde::ser::SerializeMap as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

use super::ClientError;

/// A whole number without a fraction, as the server writes it: `30`, not `30.0`.
pub(super) fn number<S: Serializer>(number: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    // Beyond 2^53 not every whole number is an f64, and no lease is so long.
    if number.fract() == 0.0 && number.abs() < 9e15 {
        serializer.serialize_i64(*number as i64)
    } else {
        serializer.serialize_f64(*number)
    }
}

/// A key with its value and what the store knows of it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct KeyValue {
    /// The key.
    pub key: Vec<u8>,
    /// The value; empty where only keys were asked for, and in a deletion.
    pub value: Vec<u8>,
    /// The revision that made the key.
    pub create_revision: u64,
    /// The revision that wrote it last, or deleted it.
    pub mod_revision: u64,
    /// How often it was written since it was made; 0 in a deletion.
    pub version: u64,
    /// The lease it is attached to.
    pub lease: Option<u64>,
}

#[derive(Deserialize)]
struct Wire {
    key: Option<String>,
    key_base64: Option<String>,
    value: Option<String>,
    value_base64: Option<String>,
    #[serde(default)]
    create_revision: u64,
    #[serde(default)]
    mod_revision: u64,
    #[serde(default)]
    version: u64,
    lease: Option<String>,
}

impl<'de> Deserialize<'de> for KeyValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<KeyValue, D::Error> {
        let wire = Wire::deserialize(deserializer)?;
        let lease = wire
            .lease
            .map(|id| id.parse().map_err(|_| D::Error::custom("`lease` is not a number")));
        let key = bytes("key", wire.key, wire.key_base64).map_err(D::Error::custom)?;
        Ok(KeyValue {
            key: key.ok_or_else(|| D::Error::missing_field("key"))?,
            value: bytes("value", wire.value, wire.value_base64)
                .map_err(D::Error::custom)?
                .unwrap_or_default(),
            create_revision: wire.create_revision,
            mod_revision: wire.mod_revision,
            version: wire.version,
            lease: lease.transpose()?,
        })
    }
}

impl Serialize for KeyValue {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (name, base64_name, bytes) in [("key", "key_base64", &self.key), ("value", "value_base64", &self.value)] {
            match std::str::from_utf8(bytes) {
                Ok(text) => map.serialize_entry(name, text)?,
                Err(_) => map.serialize_entry(base64_name, &STANDARD.encode(bytes))?,
            }
        }
        map.serialize_entry("create_revision", &self.create_revision)?;
        map.serialize_entry("mod_revision", &self.mod_revision)?;
        map.serialize_entry("version", &self.version)?;
        if let Some(lease) = self.lease {
            map.serialize_entry("lease", &lease.to_string())?;
        }
        map.end()
    }
}

fn bytes(name: &str, text: Option<String>, base64: Option<String>) -> Result<Option<Vec<u8>>, String> {
    match (text, base64) {
        (Some(text), None) => Ok(Some(text.into_bytes())),
        (None, Some(base64)) => STANDARD
            .decode(base64)
            .map(Some)
            .map_err(|_| format!("`{name}_base64` is not base64")),
        (None, None) => Ok(None),
        (Some(_), Some(_)) => Err(format!("both `{name}` and `{name}_base64`")),
    }
}

/// Sets `name` or `name_base64`.
pub(super) fn set_bytes(object: &mut Map<String, Value>, name: &str, bytes: &[u8]) {
    match std::str::from_utf8(bytes) {
        Ok(text) => object.insert(name.to_owned(), text.into()),
        Err(_) => object.insert(format!("{name}_base64"), STANDARD.encode(bytes).into()),
    };
}

/// Reads an answer.
pub(super) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ClientError> {
    serde_json::from_slice(body).map_err(|error| ClientError::Protocol(error.to_string()))
}

/// A request's body.
pub(super) fn to_bytes(value: &impl Serialize) -> Result<Bytes, ClientError> {
    serde_json::to_vec(value)
        .map(Bytes::from)
        .map_err(|error| ClientError::Invalid(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back_as_they_went() {
        let kv = KeyValue {
            key: b"\xff\0".to_vec(),
            value: "ä\n".into(),
            create_revision: 2,
            mod_revision: 3,
            version: 4,
            lease: Some(u64::MAX),
        };
        let text = serde_json::to_string(&kv).unwrap();
        assert!(
            text.contains(r#""key_base64":"/wA=""#) && text.contains(r#""lease":"18446744073709551615""#),
            "{text}"
        );
        assert_eq!(serde_json::from_str::<KeyValue>(&text).unwrap(), kv);
    }

    #[test]
    fn a_deletion_has_no_value_and_a_value_alone_is_no_key() {
        let kv: KeyValue = serde_json::from_str(r#"{"key":"a","mod_revision":7}"#).unwrap();
        assert_eq!((kv.key.as_slice(), kv.value.len(), kv.mod_revision), (&b"a"[..], 0, 7));
        assert!(serde_json::from_str::<KeyValue>(r#"{"value":"a"}"#).is_err());
        assert!(serde_json::from_str::<KeyValue>(r#"{"key":"a","key_base64":"YQ=="}"#).is_err());
    }
}
