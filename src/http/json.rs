//! JSON in and out: key-values written straight into a buffer, bodies parsed strictly with errors that name the field.

use std::marker::PhantomData;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeOwned, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::error::{ApiError, Problem};
use crate::state::outcome::KeyValue;

/// Appends the KV object: `{"key","value","create_revision","mod_revision","version","lease"?}`.
pub(super) fn write_kv(out: &mut Vec<u8>, kv: &KeyValue, with_value: bool) {
    out.push(b'{');
    write_bytes(out, "key", &kv.key);
    if with_value {
        out.push(b',');
        write_bytes(out, "value", &kv.value);
    }
    write_number(out, ",\"create_revision\":", kv.create_revision);
    write_number(out, ",\"mod_revision\":", kv.mod_revision);
    write_number(out, ",\"version\":", kv.version);
    if kv.lease != 0 {
        write_number(out, ",\"lease\":\"", kv.lease);
        out.push(b'"');
    }
    out.push(b'}');
}

/// Appends `"name":"text"` if the bytes are UTF-8, otherwise `"name_base64":"..."`.
pub(super) fn write_bytes(out: &mut Vec<u8>, name: &str, bytes: &[u8]) {
    out.push(b'"');
    out.extend_from_slice(name.as_bytes());
    match std::str::from_utf8(bytes) {
        Ok(text) => {
            out.extend_from_slice(b"\":");
            write_text(out, text);
        }
        Err(_) => {
            out.extend_from_slice(b"_base64\":\"");
            out.extend_from_slice(to_base64(bytes).as_bytes());
            out.push(b'"');
        }
    }
}

/// Base64 in the standard alphabet, padded.
pub(super) fn to_base64(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

/// Appends a JSON string.
pub(super) fn write_text(out: &mut Vec<u8>, text: &str) {
    // Writing a string into memory cannot fail.
    let _ = serde_json::to_writer(out, text);
}

/// Appends a number after `before`.
pub(super) fn write_number(out: &mut Vec<u8>, before: &str, number: u64) {
    out.extend_from_slice(before.as_bytes());
    out.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
}

/// Parses a body. Unknown and repeated fields, trailing garbage and wrong types are refused, with the path of the field.
pub(super) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let Object(parsed) = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        let at = if path == "." || path == "?" {
            String::new()
        } else {
            format!("`{path}`: ")
        };
        invalid(format!("the JSON body: {at}{}", plain_words(&error.inner().to_string())))
    })?;
    deserializer.end().map_err(|error| invalid(format!("the JSON body: {error}")))?;
    Ok(parsed)
}

/// serde's message without the names of Rust's types.
fn plain_words(message: &str) -> String {
    let plain = [
        ("expected u64", "expected a whole number from 0 to 18446744073709551615"),
        ("expected f64", "expected a number"),
        ("invalid type: sequence", "an array"),
        ("invalid type: map", "an object"),
        ("expected a sequence", "expected an array"),
        ("floating point `", "the number `"),
    ];
    plain
        .iter()
        .fold(message.to_owned(), |message, (rust, json)| message.replace(rust, json))
}

/// What must be a JSON object: serde by itself takes an array for a struct as well, field by field, and nobody means that.
#[derive(Debug)]
pub(super) struct Object<T>(pub(super) T);

impl<'de, T: DeserializeOwned> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Object<T>, D::Error> {
        struct Fields<T>(PhantomData<T>);
        impl<'de, T: DeserializeOwned> Visitor<'de> for Fields<T> {
            type Value = Object<T>;
            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, fields: A) -> Result<Object<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(fields)).map(Object)
            }
        }
        deserializer.deserialize_map(Fields(PhantomData))
    }
}

/// The bytes of a pair of fields of which exactly one is given.
pub(super) fn bytes_of(name: &str, text: Option<String>, base64: Option<String>) -> Result<Vec<u8>, ApiError> {
    match (text, base64) {
        (Some(text), None) => Ok(text.into_bytes()),
        (None, Some(base64)) => STANDARD
            .decode(base64)
            .map_err(|_| invalid(format!("`{name}_base64` is not base64 (standard alphabet, padded)"))),
        _ => Err(invalid(format!("exactly one of `{name}` and `{name}_base64` is needed"))),
    }
}

/// Milliseconds as a JSON number of seconds: whole where it is whole.
pub(super) fn seconds(ms: u64) -> serde_json::Number {
    if ms.is_multiple_of(1000) {
        return (ms / 1000).into();
    }
    serde_json::Number::from_f64(ms as f64 / 1000.0).unwrap_or_else(|| (ms / 1000).into())
}

/// A 400 that names what is wrong.
pub(super) fn invalid(detail: String) -> ApiError {
    Problem::InvalidRequest(detail).into()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn kv(key: &'static [u8], value: &'static [u8], lease: u64) -> Value {
        let kv = KeyValue {
            key: key.into(),
            value: value.into(),
            create_revision: 2,
            mod_revision: 7,
            version: 3,
            lease,
        };
        let mut out = Vec::new();
        write_kv(&mut out, &kv, true);
        serde_json::from_slice(&out).unwrap()
    }

    #[test]
    fn text_stays_text_and_other_bytes_are_base64() {
        assert_eq!(
            kv(b"a\"\n", b"", 0),
            json!({"key": "a\"\n", "value": "", "create_revision": 2, "mod_revision": 7, "version": 3})
        );
        assert_eq!(
            kv(b"\xff", b"\0\xfe", u64::MAX),
            json!({"key_base64": "/w==", "value_base64": "AP4=", "create_revision": 2, "mod_revision": 7, "version": 3,
                   "lease": "18446744073709551615"})
        );
    }

    #[test]
    fn exactly_one_of_a_pair() {
        assert_eq!(bytes_of("key", Some("a".into()), None).unwrap(), b"a");
        assert_eq!(bytes_of("key", None, Some("/w==".into())).unwrap(), b"\xff");
        assert!(bytes_of("key", None, None).is_err());
        assert!(bytes_of("key", Some("a".into()), Some("YQ==".into())).is_err());
        for bad in ["/w", "_w==", "/w==\n", "%"] {
            assert!(bytes_of("key", None, Some(bad.into())).is_err(), "{bad:?}");
        }
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Outer {
        #[expect(dead_code, reason = "only parsed")]
        inner: Vec<Object<Inner>>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Inner {
        #[expect(dead_code, reason = "only parsed")]
        ttl: u64,
    }

    #[test]
    fn an_array_is_not_taken_for_an_object() {
        for body in ["[]", "[[]]", " \n[[[3]]]", r#"{"inner":[[3]]}"#] {
            let detail = parse::<Outer>(body.as_bytes()).unwrap_err().problem.detail();
            assert!(detail.contains("array"), "{body}: {detail}");
        }
    }

    #[test]
    fn bodies_are_strict_and_errors_name_the_field() {
        parse::<Outer>(br#" {"inner":[{"ttl":3}]} "#).unwrap();
        for (body, named) in [
            (r#"{"inner":[{"tll":3}]}"#, "tll"),
            (r#"{"inner":[{"ttl":"3"}]}"#, "inner[0].ttl"),
            (r#"{"inner":[{"ttl":3,"ttl":4}]}"#, "ttl"),
            (
                r#"{"inner":[{"ttl":99999999999999999999}]}"#,
                "inner[0].ttl`: invalid type: the number `1e+20`, expected a whole number",
            ),
            (r#"{"inner":{}}"#, "`inner`: an object, expected an array"),
            (r#"{"inner":[]} x"#, "trailing"),
            (r#"{"inner":[]"#, "EOF"),
            ("", "EOF"),
        ] {
            let detail = parse::<Outer>(body.as_bytes()).unwrap_err().problem.detail();
            assert!(detail.contains(named), "{body}: {detail}");
        }
        assert!(
            parse::<Value>(format!("{{\"a\":{}", "[".repeat(100_000)).as_bytes()).is_err(),
            "deep nesting is refused, not followed"
        );
    }

    #[test]
    fn seconds_are_whole_where_they_can_be() {
        assert_eq!(seconds(30_000).to_string(), "30");
        assert_eq!(seconds(1_500).to_string(), "1.5");
    }
}
