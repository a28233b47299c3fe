//! Judges a value by a schema of the OpenAPI document, as far as its answers use JSON Schema. It is stricter in one thing: where a schema names
//! fields, others are refused, also where the document would let a client expect more of them.

use std::collections::BTreeSet;

use serde_json::Value;

/// A document, and which of its named fields answers had.
pub struct Schemas<'a> {
    pub document: &'a Value,
    pub seen: BTreeSet<String>,
}

impl<'a> Schemas<'a> {
    /// The description itself, behind a reference, and the name of the reference.
    fn resolved(&self, schema: &'a Value) -> (&'a Value, Option<&'a str>) {
        let Some(reference) = schema["$ref"].as_str() else {
            return (schema, None);
        };
        let path = reference.strip_prefix('#').expect("within the document");
        let found = self.document.pointer(path).unwrap_or_else(|| panic!("{reference}"));
        (found, path.rsplit('/').next())
    }

    /// What is wrong with the value, if anything is; `at` says where it stands.
    pub fn check(&mut self, schema: &'a Value, value: &Value, at: &str) -> Result<(), String> {
        let (schema, name) = self.resolved(schema);
        if schema["items"].is_null() && value.as_array().is_some_and(|elements| !elements.is_empty()) {
            return Err(format!("{at}: what is in it is not documented: {value}"));
        }
        for (keyword, wanted) in schema.as_object().into_iter().flatten() {
            let holds = match keyword.as_str() {
                "type" => match wanted.as_array() {
                    Some(kinds) => kinds.iter().any(|kind| is_of(value, kind)),
                    None => is_of(value, wanted),
                },
                "const" => value == wanted,
                "enum" => wanted.as_array().is_some_and(|values| values.contains(value)),
                "minimum" => value.as_f64().is_none_or(|number| Some(number) >= wanted.as_f64()),
                "pattern" => value.as_str().is_none_or(|text| matches(text, wanted.as_str().unwrap_or_default())),
                "required" => {
                    let mut names = wanted.as_array().into_iter().flatten().filter_map(Value::as_str);
                    !value.is_object() || names.all(|name| value.get(name).is_some())
                }
                "properties" => {
                    self.fields(name, wanted, value, at)?;
                    true
                }
                "items" => {
                    for (number, element) in value.as_array().into_iter().flatten().enumerate() {
                        self.check(wanted, element, &format!("{at}/{number}"))?;
                    }
                    true
                }
                "oneOf" => self.fitting(wanted, value, at) == 1,
                "anyOf" => self.fitting(wanted, value, at) >= 1,
                "description" | "examples" | "format" | "contentEncoding" => true,
                other => panic!("{other} is a keyword that no answer had before"),
            };
            if !holds {
                return Err(format!("{at}: {value} is not as {keyword} {wanted} wants"));
            }
        }
        Ok(())
    }

    fn fields(&mut self, name: Option<&str>, documented: &'a Value, value: &Value, at: &str) -> Result<(), String> {
        for (field, inner) in value.as_object().into_iter().flatten() {
            let Some(schema) = documented.get(field) else {
                return Err(format!("{at}: {field} is not documented, in {value}"));
            };
            if let Some(name) = name {
                self.seen.insert(format!("{name}.{field}"));
            }
            self.check(schema, inner, &format!("{at}/{field}"))?;
        }
        Ok(())
    }

    fn fitting(&mut self, schemas: &'a Value, value: &Value, at: &str) -> usize {
        let schemas = schemas.as_array().expect("a list");
        schemas.iter().filter(|schema| self.check(schema, value, at).is_ok()).count()
    }
}

fn is_of(value: &Value, kind: &Value) -> bool {
    match kind.as_str() {
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("string") => value.is_string(),
        Some("integer") => value.is_u64() || value.is_i64(),
        Some("number") => value.is_number(),
        Some("boolean") => value.is_boolean(),
        Some("null") => value.is_null(),
        _ => panic!("{kind} is no type"),
    }
}

/// The one form of pattern that answers have: so many hexadecimal digits.
fn matches(text: &str, pattern: &str) -> bool {
    let digits = pattern.strip_prefix("^[0-9a-f]{").and_then(|rest| rest.strip_suffix("}$"));
    let digits: usize = digits.and_then(|digits| digits.parse().ok()).unwrap_or_else(|| panic!("{pattern}"));
    text.len() == digits && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[test]
fn what_a_schema_does_not_allow_is_found() {
    let document = serde_json::json!({"components": {"schemas": {"One": {
        "type": "object",
        "properties": {
            "id": {"type": "integer", "minimum": 1},
            "role": {"enum": ["voter"]},
            "next": {"type": ["string", "null"]},
            "parts": {"type": "array", "items": {"$ref": "#/components/schemas/Part"}},
            "hash": {"type": "string", "pattern": "^[0-9a-f]{2}$"},
            "any": {"type": "array"},
        },
        "required": ["id"],
    }, "Part": {"oneOf": [{"type": "boolean"}, {"const": 1}]}}}});
    let schema = serde_json::json!({"$ref": "#/components/schemas/One"});
    let mut schemas = Schemas {
        document: &document,
        seen: BTreeSet::new(),
    };
    let mut judge = |text: &str| schemas.check(&schema, &serde_json::from_str(text).unwrap(), "");
    assert_eq!(judge(r#"{"id":1,"role":"voter","next":null,"parts":[true,1],"hash":"0f"}"#), Ok(()));
    for bad in [
        "[]",
        "{}",
        r#"{"id":"1"}"#,
        r#"{"id":0}"#,
        r#"{"id":1.5}"#,
        r#"{"id":1,"role":"boss"}"#,
        r#"{"id":1,"next":2}"#,
        r#"{"id":1,"parts":[2]}"#,
        r#"{"id":1,"hash":"0F"}"#,
        r#"{"id":1,"any":[1]}"#,
        r#"{"id":1,"more":1}"#,
    ] {
        assert!(judge(bad).is_err(), "{bad}");
    }
    assert_eq!(schemas.seen.len(), 6, "{:?}", schemas.seen);
}
