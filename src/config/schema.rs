//! The table of all keys: where a key lives, what it may hold. Names, suggestions, range messages and the documentation test
//! come from here; the defaults are the text of `config/metcd.toml`.

use std::net::SocketAddr;
use std::time::Duration;

use toml::Value;

use super::units::{format_duration, format_size, parse_duration, parse_size};
use super::{FoundingMember, LogPeriod, LogRotation, MAX_NAME_BYTES, url};

/// What a key may hold.
pub enum Kind {
    /// `true` or `false`.
    Bool,
    /// A whole number, bounds inclusive.
    Integer { min: u64, max: u64 },
    /// Bytes, bounds inclusive; a string with a unit, or a number.
    Size { min: u64, max: u64 },
    /// A duration as a string, bounds inclusive.
    Duration { min: Duration, max: Duration },
    /// One of some words.
    Choice(&'static [&'static str]),
    /// A string that passes the check.
    Text(fn(&str) -> Result<(), String>),
    /// A list of such strings.
    TextList(fn(&str) -> Result<(), String>),
    /// `[{ id, peer_url }, …]`.
    Members,
}

/// One key.
pub struct Key {
    /// `section.key`.
    pub path: &'static str,
    /// What it may hold.
    pub kind: Kind,
}

const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

const fn days(n: u64) -> Duration {
    Duration::from_secs(n * 86_400)
}

const fn key(path: &'static str, kind: Kind) -> Key {
    Key { path, kind }
}

/// A billion: a bound that means "not by mistake".
const BILLION: u64 = 1_000_000_000;
/// Ids must survive JSON readers that only know doubles.
pub const MAX_MEMBER_ID: u64 = (1 << 53) - 1;

/// Every key, in the order of `config/metcd.toml`.
pub const SCHEMA: &[Key] = &[
    key(
        "node.id",
        Kind::Integer {
            min: 1,
            max: MAX_MEMBER_ID,
        },
    ),
    key("node.name", Kind::Text(check_name)),
    key("node.data_dir", Kind::Text(check_path)),
    key("listen.client", Kind::Text(check_listen)),
    key("listen.peer", Kind::Text(check_listen)),
    key("advertise.client_url", Kind::Text(url::check_client_url)),
    key("advertise.peer_url", Kind::Text(url::check_peer_url)),
    key("cluster.name", Kind::Text(check_name)),
    key("cluster.members", Kind::Members),
    key("cluster.join", Kind::TextList(url::check_join_url)),
    key(
        "raft.tick",
        Kind::Duration {
            min: ms(10),
            max: ms(1_000),
        },
    ),
    key("raft.heartbeat_ticks", Kind::Integer { min: 1, max: 100 }),
    key("raft.election_ticks", Kind::Integer { min: 2, max: 1_000 }),
    key("raft.max_inflight", Kind::Integer { min: 1, max: 1_024 }),
    key(
        "raft.max_message_bytes",
        Kind::Size {
            min: 4 << 10,
            max: 64 << 20,
        },
    ),
    key("raft.proposal_queue", Kind::Integer { min: 1, max: 1_000_000 }),
    key("raft.snapshot_entries", Kind::Integer { min: 1, max: BILLION }),
    key("raft.keep_entries", Kind::Integer { min: 0, max: BILLION }),
    key("wal.engine", Kind::Choice(&["sled", "raft-engine", "rocksdb"])),
    key("wal.sync", Kind::Bool),
    key("store.backend", Kind::Choice(&["memory", "sled", "rocksdb"])),
    key(
        "history.retain",
        Kind::Duration {
            min: ms(1_000),
            max: days(3_650),
        },
    ),
    key(
        "history.retain_revisions",
        Kind::Integer {
            min: 1,
            max: 1_000 * BILLION,
        },
    ),
    key("limits.max_value_bytes", Kind::Size { min: 1, max: 32 << 20 }),
    key("limits.max_txn_ops", Kind::Integer { min: 1, max: 10_000 }),
    key(
        "limits.max_request_bytes",
        Kind::Size {
            min: 1 << 10,
            max: 64 << 20,
        },
    ),
    key("limits.max_range_delete", Kind::Integer { min: 1, max: 10_000_000 }),
    key(
        "limits.max_stream",
        Kind::Duration {
            min: ms(1_000),
            max: days(1),
        },
    ),
    key("limits.min_free_disk", Kind::Size { min: 0, max: 1 << 50 }),
    key("limits.max_store_bytes", Kind::Size { min: 0, max: 1 << 50 }),
    key("limits.max_connections", Kind::Integer { min: 1, max: 1_000_000 }),
    key("limits.max_watchers", Kind::Integer { min: 1, max: 1_000_000 }),
    key(
        "limits.request_timeout",
        Kind::Duration {
            min: ms(10),
            max: ms(600_000),
        },
    ),
    key(
        "limits.max_timeout",
        Kind::Duration {
            min: ms(10),
            max: ms(600_000),
        },
    ),
    key(
        "limits.header_timeout",
        Kind::Duration {
            min: ms(100),
            max: ms(600_000),
        },
    ),
    key(
        "idempotency.retain",
        Kind::Duration {
            min: ms(1_000),
            max: days(7),
        },
    ),
    key("idempotency.max_entries", Kind::Integer { min: 1, max: 10_000_000 }),
    key("http.allowed_origins", Kind::TextList(url::check_origin)),
    key("http.allowed_hosts", Kind::TextList(url::check_host)),
    key("log.level", Kind::Text(check_filter)),
    key("log.format", Kind::Choice(&["text", "json"])),
    key("log.directory", Kind::Text(check_path)),
    key("log.rotation", Kind::Text(check_rotation)),
    key("log.keep_files", Kind::Integer { min: 0, max: 10_000 }),
    key("log.access_log", Kind::Bool),
];

/// Names of sections that are reserved for what is not built yet; setting anything below them refuses the start.
pub const RESERVED: &[&str] = &["tls", "auth"];

/// The key at `section.key`.
pub fn find(path: &str) -> Option<&'static Key> {
    SCHEMA.iter().find(|key| key.path == path)
}

/// Whether some key lives in this section.
pub fn is_section(name: &str) -> bool {
    SCHEMA.iter().any(|key| section_of(key.path) == name)
}

/// `raft` of `raft.tick`.
pub fn section_of(path: &str) -> &str {
    path.split_once('.').map_or(path, |(section, _)| section)
}

/// Why `path` is not a key: reserved, or unknown with the nearest name that is one.
pub fn explain_unknown(path: &str) -> String {
    if RESERVED.contains(&section_of(path)) {
        return format!("{path:?} sets TLS or users, which are not built yet: remove it; it does not protect anything");
    }
    let (section, name) = path.split_once('.').unwrap_or((path, ""));
    if name.is_empty() {
        return unknown_section(section);
    }
    let nearest = nearest_key(section, name);
    match nearest {
        Some(nearest) => format!("unknown key {path:?}: did you mean {nearest:?}?"),
        None if is_section(section) => format!("unknown key {path:?}: [{section}] has {}", names_in(section)),
        None => unknown_section(section),
    }
}

fn unknown_section(section: &str) -> String {
    if is_section(section) {
        return format!("[{section}] is a section, not a key: it has {}", names_in(section));
    }
    let home = SCHEMA
        .iter()
        .find(|key| key.path.split_once('.').is_some_and(|(_, name)| name == section));
    if let Some(home) = home {
        return format!("{section:?} is not a section: did you mean {:?}?", home.path);
    }
    let nearest = nearest(section, SCHEMA.iter().map(|key| section_of(key.path)));
    match nearest {
        Some(nearest) => format!("unknown section [{section}]: did you mean [{nearest}]?"),
        None => format!("unknown section [{section}]: `metcd config show` lists all sections and keys"),
    }
}

/// The nearest key: in its own section, in a section that is spelt alike, or of the same name elsewhere.
fn nearest_key(section: &str, name: &str) -> Option<&'static str> {
    let full = format!("{section}.{name}");
    let same_section = SCHEMA.iter().filter(|key| section_of(key.path) == section).map(|key| key.path);
    nearest(&full, same_section)
        .or_else(|| {
            SCHEMA
                .iter()
                .map(|key| key.path)
                .find(|path| path.split_once('.').is_some_and(|(_, other)| other == name))
        })
        .or_else(|| nearest(&full, SCHEMA.iter().map(|key| key.path)))
}

/// The candidate with the fewest edits, if those are few enough to be a slip of the fingers.
fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let allowed = (name.len() / 4).clamp(2, 4);
    let name = name.to_lowercase();
    candidates
        .map(|candidate| (strsim::damerau_levenshtein(&name, candidate), candidate))
        .filter(|(edits, _)| *edits <= allowed)
        .min_by_key(|(edits, _)| *edits)
        .map(|(_, candidate)| candidate)
}

fn names_in(section: &str) -> String {
    let names = SCHEMA
        .iter()
        .filter_map(|key| key.path.split_once('.'))
        .filter(|(s, _)| *s == section)
        .map(|(_, name)| name);
    names.collect::<Vec<_>>().join(", ")
}

impl Kind {
    /// Checks one value by itself.
    ///
    /// # Errors
    /// A sentence without the key's name: what is wrong and what is allowed.
    pub fn check(&self, value: &Value) -> Result<(), String> {
        match self {
            Self::Bool => value.as_bool().map(|_| ()).ok_or_else(|| expected("true or false", value)),
            Self::Integer { min, max } => {
                refuse_negative(value, *min, *max, |n| n.to_string())?;
                check_range(integer(value)?, *min, *max, |n| n.to_string())
            }
            Self::Size { min, max } => {
                refuse_negative(value, *min, *max, format_size)?;
                check_range(size(value)?, *min, *max, format_size)
            }
            Self::Duration { min, max } => check_range(duration(value)?, *min, *max, format_duration),
            Self::Choice(words) => check_choice(text(value)?, words),
            Self::Text(check) => check(text(value)?),
            Self::TextList(check) => list(value)?.iter().try_for_each(|item| check(text(item)?)),
            Self::Members => members(value).map(|_| ()),
        }
    }

    /// Reads a value from the environment or a flag, where everything is text. Lists are separated by commas, or written as in TOML or JSON.
    ///
    /// # Errors
    /// As [`check`](Self::check), which is still to be called on the result.
    pub fn parse_text(&self, raw: &str) -> Result<Value, String> {
        let raw = raw.trim();
        match self {
            Self::Bool => raw
                .parse()
                .map(Value::Boolean)
                .map_err(|_| format!("expected true or false, found {raw:?}")),
            Self::Integer { min, max } => raw.parse().map(Value::Integer).map_err(|_| match raw.parse::<i128>() {
                Ok(_) => format!("{raw} is out of range: allowed is {min} to {max}"),
                Err(_) => format!("expected a whole number, found {raw:?}"),
            }),
            Self::Size { .. } | Self::Duration { .. } | Self::Choice(_) | Self::Text(_) => unquote(raw),
            Self::TextList(_) | Self::Members if raw.starts_with('[') => {
                // Whoever writes JSON, as tools that fill environments do, is understood; the message is TOML's.
                parse_toml_value(raw).or_else(|error| serde_json::from_str(raw).map_err(|_| error))
            }
            Self::TextList(_) => Ok(Value::Array(split_list(raw).map(Value::from).collect())),
            Self::Members => split_list(raw).map(parse_member).collect::<Result<Vec<_>, _>>().map(Value::Array),
        }
    }
}

/// Reads `2=http://10.0.0.2:3380` as a member.
///
/// # Errors
/// A sentence that says how it is written.
pub fn parse_member(raw: &str) -> Result<Value, String> {
    let wrong = || format!("{raw:?} is not a member: write it like 2=http://10.0.0.2:3380");
    let (id, peer_url) = raw.split_once('=').ok_or_else(wrong)?;
    let id: i64 = id.trim().parse().map_err(|_| wrong())?;
    let mut member = toml::Table::new();
    member.insert("id".to_owned(), Value::Integer(id));
    member.insert("peer_url".to_owned(), Value::from(peer_url.trim()));
    Ok(Value::Table(member))
}

fn split_list(raw: &str) -> impl Iterator<Item = &str> {
    raw.split(',').map(str::trim).filter(|item| !item.is_empty())
}

/// A string is taken as it stands; one in quotes is read as TOML would.
fn unquote(raw: &str) -> Result<Value, String> {
    if raw.starts_with('"') || raw.starts_with('\'') {
        parse_toml_value(raw)
    } else {
        Ok(Value::from(raw))
    }
}

fn parse_toml_value(raw: &str) -> Result<Value, String> {
    let document: toml::Table =
        toml::from_str(&format!("v = {raw}")).map_err(|e| format!("{raw:?} is not a TOML value: {}", e.message()))?;
    document.get("v").cloned().ok_or_else(|| format!("{raw:?} is not a TOML value"))
}

fn expected(what: &str, found: &Value) -> String {
    format!("expected {what}, found {}", describe(found))
}

fn describe(value: &Value) -> String {
    match value {
        Value::String(s) => format!("the string {s:?}"),
        Value::Integer(n) => format!("the number {n}"),
        Value::Float(n) => format!("the number {n}"),
        Value::Boolean(b) => b.to_string(),
        Value::Datetime(_) => "a date".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Table(_) => "a table".to_owned(),
    }
}

fn check_range<T: PartialOrd + Copy>(value: T, min: T, max: T, show: impl Fn(T) -> String) -> Result<(), String> {
    if value < min || value > max {
        return Err(format!(
            "{} is out of range: allowed is {} to {}",
            show(value),
            show(min),
            show(max)
        ));
    }
    Ok(())
}

/// What is below zero is below every range: that is said with the range.
fn refuse_negative(value: &Value, min: u64, max: u64, show: impl Fn(u64) -> String) -> Result<(), String> {
    match value.as_integer().filter(|&number| number < 0) {
        Some(number) => Err(format!("{number} is out of range: allowed is {} to {}", show(min), show(max))),
        None => Ok(()),
    }
}

fn check_choice(word: &str, words: &[&str]) -> Result<(), String> {
    if words.contains(&word) {
        return Ok(());
    }
    let hint = nearest(word, words.iter().copied())
        .map(|near| format!(" (did you mean {near:?}?)"))
        .unwrap_or_default();
    let all = words.iter().map(|word| format!("{word:?}")).collect::<Vec<_>>().join(", ");
    Err(format!("{word:?} is not one of {all}{hint}"))
}

/// A whole number that is not negative.
pub fn integer(value: &Value) -> Result<u64, String> {
    let number = value.as_integer().ok_or_else(|| expected("a whole number", value))?;
    u64::try_from(number).map_err(|_| format!("{number} is negative"))
}

/// Bytes.
pub fn size(value: &Value) -> Result<u64, String> {
    match value {
        Value::String(text) => parse_size(text),
        Value::Integer(_) => integer(value),
        Value::Float(_) | Value::Boolean(_) | Value::Datetime(_) | Value::Array(_) | Value::Table(_) => {
            Err(expected("a size like \"64MiB\"", value))
        }
    }
}

/// A duration.
pub fn duration(value: &Value) -> Result<Duration, String> {
    let text = value
        .as_str()
        .ok_or_else(|| expected("a duration with its unit, like \"10s\"", value))?;
    parse_duration(text)
}

/// A string.
pub fn text(value: &Value) -> Result<&str, String> {
    value.as_str().ok_or_else(|| expected("a string in quotes", value))
}

/// A list.
pub fn list(value: &Value) -> Result<&[Value], String> {
    value.as_array().map(Vec::as_slice).ok_or_else(|| expected("a list in [ ]", value))
}

/// The founding members, in the order given.
pub fn members(value: &Value) -> Result<Vec<FoundingMember>, String> {
    list(value)?.iter().map(member).collect()
}

fn member(value: &Value) -> Result<FoundingMember, String> {
    let table = value
        .as_table()
        .ok_or_else(|| expected("a member like { id = 1, peer_url = \"http://127.0.0.1:3380\" }", value))?;
    if let Some(unknown) = table.keys().find(|name| !["id", "peer_url"].contains(&name.as_str())) {
        return Err(format!("a member has id and peer_url, not {unknown:?}"));
    }
    let id = table.get("id").ok_or_else(|| "a member needs an id".to_owned()).and_then(integer)?;
    check_range(id, 1, MAX_MEMBER_ID, |n| format!("the id {n}"))?;
    let peer_url = table.get("peer_url").ok_or_else(|| format!("member {id} needs a peer_url"))?;
    let peer_url = url::parse_peer_url(text(peer_url)?)?;
    Ok(FoundingMember { id, peer_url })
}

fn check_name(name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > MAX_NAME_BYTES || name.chars().any(|c| c.is_control()) {
        return Err(format!(
            "{name:?} is not a name: 1 to {MAX_NAME_BYTES} bytes, no control characters"
        ));
    }
    Ok(())
}

fn check_path(path: &str) -> Result<(), String> {
    if path.is_empty() || path.contains('\0') {
        Err(format!("{path:?} is not a path"))
    } else {
        Ok(())
    }
}

fn check_listen(address: &str) -> Result<(), String> {
    let wrong = |_| {
        format!("{address:?} is not an address to listen on: write an IP address and a port, like \"127.0.0.1:3379\" or \"[::1]:3379\"")
    };
    address.parse::<SocketAddr>().map(|_| ()).map_err(wrong)
}

fn check_rotation(text: &str) -> Result<(), String> {
    parse_rotation(text).map(|_| ())
}

/// `never`, `hourly`, `daily`, a size of at least 4 KiB, or a period and a size with a comma between them.
pub fn parse_rotation(text: &str) -> Result<LogRotation, String> {
    if text == "never" {
        return Ok(LogRotation::default());
    }
    let wrong = || {
        format!(
            "{text:?} is not a rotation: write \"never\", \"hourly\", \"daily\", a size of 4KiB or more, like \"100MiB\", or both, like \"daily,100MiB\""
        )
    };
    let mut rotation = LogRotation::default();
    for part in text.split(',').map(str::trim) {
        let is_new = match part {
            "hourly" => rotation.period.replace(LogPeriod::Hourly).is_none(),
            "daily" => rotation.period.replace(LogPeriod::Daily).is_none(),
            size => {
                let bytes = parse_size(size).ok().filter(|&bytes| bytes >= 4096).ok_or_else(wrong)?;
                rotation.max_bytes.replace(bytes).is_none()
            }
        };
        if !is_new {
            return Err(wrong());
        }
    }
    Ok(rotation)
}

fn check_filter(filter: &str) -> Result<(), String> {
    crate::telemetry::parse_filter(filter).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rotation_is_a_period_a_size_or_both() {
        let parsed = |text| parse_rotation(text).map(|rotation| (rotation.period, rotation.max_bytes));
        assert_eq!(parsed("never"), Ok((None, None)));
        assert_eq!(parsed("daily"), Ok((Some(LogPeriod::Daily), None)));
        assert_eq!(parsed("4KiB"), Ok((None, Some(4096))));
        for both in ["hourly,100MiB", "100MiB, hourly"] {
            assert_eq!(parsed(both), Ok((Some(LogPeriod::Hourly), Some(100 << 20))), "{both}");
        }
        for bad in ["", "weekly", "never,1MiB", "daily,hourly", "1MiB,2MiB", "1KiB", "daily,"] {
            assert!(parsed(bad).is_err_and(|error| error.contains("daily,100MiB")), "{bad:?}");
        }
    }

    #[test]
    fn an_unknown_key_is_answered_with_the_nearest_name() {
        for (typed, meant) in [
            ("raft.tik", "raft.tick"),
            ("raft.election_tick", "raft.election_ticks"),
            ("raft.data_dir", "node.data_dir"),
            ("lisen.client", "listen.client"),
            ("log.acces_log", "log.access_log"),
        ] {
            let text = explain_unknown(typed);
            assert!(text.contains(&format!("did you mean {meant:?}?")), "{typed}: {text}");
        }
        assert!(explain_unknown("raft.colour").contains("[raft] has tick, heartbeat_ticks"));
        assert!(explain_unknown("raft").contains("[raft] is a section, not a key: it has tick"));
        assert!(explain_unknown("rafd").contains("did you mean [raft]?"));
        assert!(explain_unknown("data_dir").contains("did you mean \"node.data_dir\"?"));
    }

    #[test]
    fn reserved_sections_say_that_they_are_not_built() {
        for path in ["tls", "tls.client", "tls.peer.cert", "auth", "auth.users"] {
            assert!(explain_unknown(path).contains("not built yet"), "{path}");
        }
    }

    #[test]
    fn a_value_out_of_range_is_answered_with_the_range() {
        let tick = &find("raft.tick").expect("raft.tick").kind;
        assert_eq!(
            tick.check(&Value::from("5ms")),
            Err("5ms is out of range: allowed is 10ms to 1s".to_owned())
        );
        assert_eq!(tick.check(&Value::from("1s")), Ok(()));
        assert!(tick.check(&Value::Integer(50)).is_err_and(|e| e.contains("with its unit")));
        let size = &find("limits.max_value_bytes").expect("limits.max_value_bytes").kind;
        assert_eq!(
            size.check(&Value::from("33MiB")),
            Err("33MiB is out of range: allowed is 1B to 32MiB".to_owned())
        );
        let id = &find("node.id").expect("node.id").kind;
        assert!(id.check(&Value::Integer(0)).is_err_and(|e| e.contains("allowed is 1 to")));
        assert_eq!(
            id.check(&Value::Integer(-4)),
            Err(format!("-4 is out of range: allowed is 1 to {MAX_MEMBER_ID}"))
        );
    }

    #[test]
    fn a_wrong_word_is_answered_with_the_right_ones() {
        let engine = &find("wal.engine").expect("wal.engine").kind;
        let error = engine.check(&Value::from("raft_engine")).expect_err("no such engine");
        assert!(error.contains("did you mean \"raft-engine\"?"), "{error}");
    }

    #[test]
    fn text_of_the_environment_becomes_the_kinds_value() {
        let members = &find("cluster.members").expect("cluster.members").kind;
        let plain = members.parse_text("1=http://a:1, 2=http://b:2").expect("plain");
        let inline = members
            .parse_text("[{id = 1, peer_url = \"http://a:1\"}, {id = 2, peer_url = 'http://b:2'}]")
            .expect("inline");
        assert_eq!(plain, inline);
        let json = members
            .parse_text(r#"[{"id": 1, "peer_url": "http://a:1"}, {"id": 2, "peer_url": "http://b:2"}]"#)
            .expect("JSON");
        assert_eq!(plain, json);
        assert!(
            members
                .parse_text("[{1: 2}]")
                .is_err_and(|error| error.contains("is not a TOML value"))
        );
        let join = &find("cluster.join").expect("cluster.join").kind;
        assert_eq!(
            join.parse_text("http://a:1,http://b:2"),
            join.parse_text("[\"http://a:1\", \"http://b:2\"]")
        );
        let name = &find("node.name").expect("node.name").kind;
        assert_eq!(name.parse_text("\"a b\""), Ok(Value::from("a b")));
        assert_eq!(name.parse_text("17"), Ok(Value::from("17")));
    }

    #[test]
    fn no_key_is_listed_twice() {
        for (position, key) in SCHEMA.iter().enumerate() {
            assert!(SCHEMA.iter().skip(position + 1).all(|other| other.path != key.path), "{}", key.path);
        }
    }
}
