//! The effective configuration as text that can be read again.

use std::path::Path;

use toml::Value;

use super::schema::{SCHEMA, section_of};
use super::units::{format_duration, format_size};
use super::{Config, Loaded, LogPeriod, LogRotation};

/// Every key with its value in force, as TOML, with where it comes from behind it.
pub fn show(loaded: &Loaded) -> String {
    let mut text = String::new();
    let mut section = "";
    for key in SCHEMA {
        let name = key.path.split_once('.').map_or(key.path, |(_, name)| name);
        if section_of(key.path) != section {
            section = section_of(key.path);
            let gap = if text.is_empty() { "" } else { "\n" };
            text.push_str(&format!("{gap}[{section}]\n"));
        }
        let origin = loaded.origins.get(key.path).map_or("default", String::as_str);
        match value_of(&loaded.config, key.path) {
            Some(value) => text.push_str(&format!("{name} = {value}  # {origin}\n")),
            None => text.push_str(&format!("# {name} is not set\n")),
        }
    }
    text
}

/// The value of a key; `None` where none is in force.
fn value_of(config: &Config, path: &str) -> Option<Value> {
    let (node, listen, raft, limits, log) = (&config.node, &config.listen, &config.raft, &config.limits, &config.log);
    match path {
        "node.id" => node.id.map(number),
        "node.name" => config.name().map(Value::from),
        "node.data_dir" => Some(path_value(&node.data_dir)),
        "listen.client" => Some(Value::from(listen.client.to_string())),
        "listen.peer" => Some(Value::from(listen.peer.to_string())),
        "advertise.client_url" => Some(Value::from(config.advertise.client_url.as_str())),
        "advertise.peer_url" => Some(Value::from(config.advertise.peer_url.as_str())),
        "cluster.name" => Some(Value::from(config.cluster.name.as_str())),
        "cluster.members" => (!config.cluster.members.is_empty()).then(|| members(config)),
        "cluster.join" => Some(texts(&config.cluster.join)),
        "raft.tick" => Some(Value::from(format_duration(raft.tick))),
        "raft.heartbeat_ticks" => Some(count(raft.heartbeat_ticks)),
        "raft.election_ticks" => Some(count(raft.election_ticks)),
        "raft.max_inflight" => Some(count(raft.max_inflight)),
        "raft.max_message_bytes" => Some(Value::from(format_size(raft.max_message_bytes))),
        "raft.proposal_queue" => Some(count(raft.proposal_queue)),
        "raft.snapshot_entries" => Some(number(raft.snapshot_entries)),
        "raft.keep_entries" => Some(number(raft.keep_entries)),
        "wal.engine" => Some(Value::from(config.wal.engine.name())),
        "wal.sync" => Some(Value::from(config.wal.sync)),
        "store.backend" => Some(Value::from(config.store.backend.name())),
        "history.retain" => Some(Value::from(format_duration(config.history.retain))),
        "history.retain_revisions" => Some(number(config.history.retain_revisions)),
        "limits.max_value_bytes" => Some(Value::from(format_size(limits.max_value_bytes))),
        "limits.max_txn_ops" => Some(count(limits.max_txn_ops)),
        "limits.max_request_bytes" => Some(Value::from(format_size(limits.max_request_bytes))),
        "limits.max_range_delete" => Some(number(limits.max_range_delete)),
        "limits.max_stream" => Some(Value::from(format_duration(limits.max_stream))),
        "limits.min_free_disk" => Some(Value::from(format_size(limits.min_free_disk))),
        "limits.max_store_bytes" => Some(Value::from(format_size(limits.max_store_bytes))),
        "limits.max_connections" => Some(count(limits.max_connections)),
        "limits.max_watchers" => Some(count(limits.max_watchers)),
        "limits.request_timeout" => Some(Value::from(format_duration(limits.request_timeout))),
        "limits.max_timeout" => Some(Value::from(format_duration(limits.max_timeout))),
        "limits.header_timeout" => Some(Value::from(format_duration(limits.header_timeout))),
        "idempotency.retain" => Some(Value::from(format_duration(config.idempotency.retain))),
        "idempotency.max_entries" => Some(number(config.idempotency.max_entries)),
        "http.allowed_origins" => Some(texts(&config.http.allowed_origins)),
        "http.allowed_hosts" => Some(texts(&config.http.allowed_hosts)),
        "log.level" => Some(Value::from(log.level.as_str())),
        "log.format" => Some(Value::from(log.format.name())),
        "log.directory" => log.directory.as_deref().map(path_value),
        "log.rotation" => Some(Value::from(rotation(log.rotation))),
        "log.keep_files" => Some(count(log.keep_files)),
        "log.access_log" => Some(Value::from(log.access_log)),
        _ => None,
    }
}

fn number(n: u64) -> Value {
    Value::Integer(i64::try_from(n).unwrap_or(i64::MAX))
}

fn count(n: usize) -> Value {
    number(u64::try_from(n).unwrap_or(u64::MAX))
}

fn path_value(path: &Path) -> Value {
    Value::from(path.display().to_string())
}

fn texts(items: &[String]) -> Value {
    Value::Array(items.iter().map(|item| Value::from(item.as_str())).collect())
}

fn rotation(rotation: LogRotation) -> String {
    let period = rotation.period.map(|period| match period {
        LogPeriod::Hourly => "hourly".to_owned(),
        LogPeriod::Daily => "daily".to_owned(),
    });
    let parts: Vec<String> = period.into_iter().chain(rotation.max_bytes.map(format_size)).collect();
    if parts.is_empty() { "never".to_owned() } else { parts.join(",") }
}

fn members(config: &Config) -> Value {
    let member = |member: &super::FoundingMember| {
        let mut table = toml::Table::new();
        table.insert("id".to_owned(), number(member.id));
        table.insert("peer_url".to_owned(), Value::from(member.peer_url.as_str()));
        Value::Table(table)
    };
    Value::Array(config.cluster.members.iter().map(member).collect())
}
