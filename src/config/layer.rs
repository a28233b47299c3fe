//! One layer of settings, checked key by key while it is still known where each value was written: the `config` crate merges
//! layers but forgets the lines.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::ops::Range;

use config::{ConfigError as MergeError, Map, Source, ValueKind};
use serde::Deserialize;
use toml::de::{DeTable, DeValue, ValueDeserializer};
use toml::{Spanned, Value};

use super::error::Problem;
use super::schema::{self, Kind};

/// What environment variables that are settings begin with.
const ENV_PREFIX: &str = "METCD__";

/// A setting written with single underscores, as other programs have it, would be passed over in silence.
fn single_underscores(name: &str) -> Option<Problem> {
    let rest = name.strip_prefix("METCD_")?.to_lowercase();
    let key = schema::SCHEMA.iter().find(|key| key.path.replace('.', "_") == rest)?;
    let right = key.path.replace('.', "__").to_uppercase();
    Some(Problem::new(
        name,
        format!("two underscores stand between the parts of a setting's name: did you mean {ENV_PREFIX}{right}?"),
    ))
}

/// A value and where it was written.
#[derive(Debug, Clone, PartialEq)]
pub struct Setting {
    /// The value, checked by itself.
    pub value: Value,
    /// `node1.toml:12`, `METCD__RAFT__TICK`, `--set`, …
    pub origin: String,
}

/// A setting given on the command line.
#[derive(Debug, Clone, PartialEq)]
pub struct Flag {
    /// `section.key`.
    pub path: String,
    /// The value as text or, from a repeatable flag, as a list.
    pub value: FlagValue,
    /// `--listen-client`.
    pub origin: String,
}

/// The value of a [`Flag`].
#[derive(Debug, Clone, PartialEq)]
pub enum FlagValue {
    /// One value as text.
    Text(String),
    /// Items of a list.
    List(Vec<String>),
}

/// Settings of one layer, by path.
#[derive(Debug, Clone, Default)]
pub struct Layer {
    settings: BTreeMap<&'static str, Setting>,
}

impl Layer {
    /// Reads a TOML text. `name` is the file's name for messages. Problems come in the order of the file.
    pub fn from_toml(name: &str, text: &str) -> Result<Self, Vec<Problem>> {
        let document = DeTable::parse(text).map_err(|e| vec![syntax_problem(name, text, &e)])?;
        let mut layer = Self::default();
        let mut problems = Vec::new();
        for (section, content) in document.into_inner() {
            layer.read_section(&Place { name, text }, section, content, &mut problems);
        }
        problems.sort_by_key(|(at, _)| *at);
        if problems.is_empty() {
            Ok(layer)
        } else {
            Err(problems.into_iter().map(|(_, problem)| problem).collect())
        }
    }

    fn read_section(&mut self, place: &Place<'_>, section: Spanned<Text<'_>>, content: Spanned<DeValue<'_>>, problems: &mut Vec<Located>) {
        let section_span = section.span();
        let section = section.into_inner();
        let DeValue::Table(table) = content.into_inner() else {
            return problems.push(place.problem(section_span, schema::explain_unknown(&section)));
        };
        // Of what is reserved, each thing in it is named at its own line.
        let names_more = schema::RESERVED.contains(&&*section) && !table.is_empty();
        if !schema::is_section(&section) && !names_more {
            return problems.push(place.problem(section_span, schema::explain_unknown(&section)));
        }
        for (name, value) in table {
            let name_span = name.span();
            let path = format!("{section}.{}", name.into_inner());
            match schema::find(&path) {
                None => problems.push(place.problem(name_span, schema::explain_unknown(&path))),
                Some(key) => match checked(&key.kind, value) {
                    Ok(value) => {
                        self.settings.insert(
                            key.path,
                            Setting {
                                value,
                                origin: place.origin(&name_span),
                            },
                        );
                    }
                    Err((span, message)) => problems.push(place.problem(span, format!("{path}: {message}"))),
                },
            }
        }
    }

    /// Reads the `METCD__SECTION__KEY` variables out of an environment; others are none of our business.
    pub fn from_env(variables: impl IntoIterator<Item = (OsString, OsString)>) -> Result<Self, Vec<Problem>> {
        let mut layer = Self::default();
        let mut problems = Vec::new();
        for (variable, value) in variables {
            let Some(name) = variable.to_str() else { continue };
            if !name.starts_with(ENV_PREFIX) {
                problems.extend(single_underscores(name));
                continue;
            }
            let path = name.trim_start_matches(ENV_PREFIX).to_lowercase().replace("__", ".");
            let result = match value.to_str() {
                Some(text) => layer.read_text(&path, &FlagValue::Text(text.to_owned()), name),
                None => Err("the value is not valid UTF-8".to_owned()),
            };
            problems.extend(result.err().map(|message| Problem::new(name, message)));
        }
        problems.sort_by(|a, b| a.origin.cmp(&b.origin));
        if problems.is_empty() { Ok(layer) } else { Err(problems) }
    }

    /// Reads the command line's settings. The same key twice is refused: which one was meant?
    pub fn from_flags(flags: &[Flag]) -> Result<Self, Vec<Problem>> {
        let mut layer = Self::default();
        let mut problems = Vec::new();
        for flag in flags {
            let result = match layer.settings.get(flag.path.as_str()) {
                Some(first) => Err(format!("{} is already given by {}", flag.path, first.origin)),
                None => layer.read_text(&flag.path, &flag.value, &flag.origin),
            };
            problems.extend(result.err().map(|message| Problem {
                is_refusal: names_a_url(flag),
                ..Problem::new(&flag.origin, message)
            }));
        }
        if problems.is_empty() { Ok(layer) } else { Err(problems) }
    }

    /// Gives all settings one origin instead of their lines.
    pub fn set_origin(&mut self, origin: &str) {
        self.settings
            .values_mut()
            .for_each(|setting| origin.clone_into(&mut setting.origin));
    }

    fn read_text(&mut self, path: &str, value: &FlagValue, origin: &str) -> Result<(), String> {
        let key = schema::find(path).ok_or_else(|| schema::explain_unknown(path))?;
        let value = match (value, &key.kind) {
            (FlagValue::Text(text), kind) => kind.parse_text(text)?,
            (FlagValue::List(items), Kind::Members) => {
                Value::Array(items.iter().map(|i| schema::parse_member(i)).collect::<Result<_, _>>()?)
            }
            (FlagValue::List(items), _) => Value::Array(items.iter().map(|item| Value::from(item.as_str())).collect()),
        };
        key.kind.check(&value)?;
        self.settings.insert(
            key.path,
            Setting {
                value,
                origin: origin.to_owned(),
            },
        );
        Ok(())
    }
}

/// What a TOML key is.
type Text<'i> = toml::de::DeString<'i>;
/// A problem and the byte it is at, for sorting.
type Located = (usize, Problem);

/// A file that is being read.
struct Place<'a> {
    name: &'a str,
    text: &'a str,
}

impl Place<'_> {
    fn origin(&self, span: &Range<usize>) -> String {
        format!("{}:{}", self.name, line_of(self.text, span.start))
    }

    fn problem(&self, span: Range<usize>, message: String) -> Located {
        (span.start, Problem::new(self.origin(&span), message))
    }
}

/// Converts and checks a value; of a list, the item that is wrong is pointed at.
fn checked(kind: &Kind, value: Spanned<DeValue<'_>>) -> Result<Value, (Range<usize>, String)> {
    let span = value.span();
    let items: Vec<Range<usize>> = value
        .get_ref()
        .as_array()
        .map(|items| items.iter().map(Spanned::span).collect())
        .unwrap_or_default();
    let value =
        Value::deserialize(ValueDeserializer::from(value)).map_err(|e| (e.span().unwrap_or(span.clone()), e.message().to_owned()))?;
    let Err(message) = kind.check(&value) else { return Ok(value) };
    let bad_item = value
        .as_array()
        .and_then(|list| list.iter().position(|item| kind.check(&Value::Array(vec![item.clone()])).is_err()));
    Err((bad_item.and_then(|n| items.get(n).cloned()).unwrap_or(span), message))
}

fn syntax_problem(name: &str, text: &str, error: &toml::de::Error) -> Problem {
    let line = error.span().map_or(1, |span| line_of(text, span.start));
    let message = format!("not valid TOML: {}", error.message().replace('\n', "; "));
    Problem::new(format!("{name}:{line}"), message)
}

/// A URL that is wrong is well written, and refused: it asks for TLS, say, or cannot be connected to. Of members that is `ID=URL`.
fn names_a_url(flag: &Flag) -> bool {
    let has_form = |item: &str| match flag.path.as_str() {
        "cluster.members" => item
            .split_once('=')
            .is_some_and(|(id, url)| id.trim().parse::<u64>().is_ok() && url.contains("://")),
        _ => item.contains("://"),
    };
    match &flag.value {
        FlagValue::Text(text) => has_form(text),
        FlagValue::List(items) => items.iter().any(|item| has_form(item)),
    }
}

/// The line of a byte, counted from 1.
fn line_of(text: &str, at: usize) -> usize {
    1 + text.bytes().take(at).filter(|byte| *byte == b'\n').count()
}

impl Source for Layer {
    fn clone_into_box(&self) -> Box<dyn Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<Map<String, config::Value>, MergeError> {
        let pairs = self
            .settings
            .iter()
            .map(|(path, setting)| ((*path).to_owned(), to_merge_value(&setting.value, Some(&setting.origin))));
        Ok(pairs.collect())
    }
}

fn to_merge_value(value: &Value, origin: Option<&String>) -> config::Value {
    let kind = match value {
        Value::String(text) => ValueKind::String(text.clone()),
        Value::Integer(number) => ValueKind::I64(*number),
        Value::Float(number) => ValueKind::Float(*number),
        Value::Boolean(flag) => ValueKind::Boolean(*flag),
        Value::Datetime(date) => ValueKind::String(date.to_string()),
        Value::Array(items) => ValueKind::Array(items.iter().map(|item| to_merge_value(item, None)).collect()),
        Value::Table(table) => ValueKind::Table(
            table
                .iter()
                .map(|(key, value)| (key.clone(), to_merge_value(value, None)))
                .collect(),
        ),
    };
    config::Value::new(origin, kind)
}

/// The settings after merging; `section.key` of every value that some layer gave.
pub fn from_merged(merged: config::Value) -> BTreeMap<String, Setting> {
    let mut settings = BTreeMap::new();
    for (section, content) in table(merged) {
        for (name, value) in table(content) {
            let origin = value.origin().unwrap_or_default().to_owned();
            settings.insert(
                format!("{section}.{name}"),
                Setting {
                    value: from_merge_value(value),
                    origin,
                },
            );
        }
    }
    settings
}

fn table(value: config::Value) -> Map<String, config::Value> {
    if let ValueKind::Table(table) = value.kind {
        table
    } else {
        Map::new()
    }
}

fn from_merge_value(value: config::Value) -> Value {
    match value.kind {
        ValueKind::String(text) => Value::String(text),
        ValueKind::I64(number) => Value::Integer(number),
        ValueKind::Float(number) => Value::Float(number),
        ValueKind::Boolean(flag) => Value::Boolean(flag),
        ValueKind::Array(items) => Value::Array(items.into_iter().map(from_merge_value).collect()),
        ValueKind::Table(table) => Value::Table(table.into_iter().map(|(key, value)| (key, from_merge_value(value))).collect()),
        // Kinds that no layer produces; as text they fail the reader's type check instead of being guessed at.
        other @ (ValueKind::Nil | ValueKind::I128(_) | ValueKind::U64(_) | ValueKind::U128(_)) => Value::String(other.to_string()),
    }
}
