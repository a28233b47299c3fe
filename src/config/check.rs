//! Checks that need more than one value, and the warnings.

use std::collections::BTreeSet;

use super::error::{ConfigError, Problem};
use super::load::Settings;
use super::units::format_duration;
use super::{Config, StoreBackend, WalEngine, url};

/// Refuses what does not fit together; returns what is to be said at every start.
pub(super) fn between_values(config: &Config, settings: &Settings) -> Result<Vec<String>, ConfigError> {
    let mut problems = Problems {
        settings,
        found: Vec::new(),
    };
    raft(config, &mut problems);
    timeouts(config, &mut problems);
    listeners(config, &mut problems);
    members(config, &mut problems);
    engines(config, &mut problems);
    if problems.found.is_empty() {
        Ok(warnings(config, settings))
    } else {
        Err(ConfigError { problems: problems.found })
    }
}

struct Problems<'a> {
    settings: &'a Settings,
    found: Vec<Problem>,
}

impl Problems<'_> {
    /// Blames the first of `paths` that somebody set.
    fn add(&mut self, paths: &[&str], message: String) {
        let blamed = paths.iter().find(|path| self.settings.is_given(path)).or(paths.first());
        let origin = blamed.map_or("configuration", |path| self.settings.origin(path));
        self.found.push(Problem {
            origin: origin.to_owned(),
            message,
            is_refusal: true,
        });
    }
}

fn raft(config: &Config, problems: &mut Problems<'_>) {
    let raft = &config.raft;
    if raft.election_ticks <= raft.heartbeat_ticks {
        let message = format!(
            "raft.election_ticks = {} must be more than raft.heartbeat_ticks = {}: allowed here is {} to 1000",
            raft.election_ticks,
            raft.heartbeat_ticks,
            raft.heartbeat_ticks + 1
        );
        problems.add(&["raft.election_ticks", "raft.heartbeat_ticks"], message);
    }
}

fn timeouts(config: &Config, problems: &mut Problems<'_>) {
    let limits = &config.limits;
    if limits.request_timeout > limits.max_timeout {
        let (request, max) = (format_duration(limits.request_timeout), format_duration(limits.max_timeout));
        let message = format!("limits.request_timeout = {request:?} must be at most limits.max_timeout = {max:?}");
        problems.add(&["limits.request_timeout", "limits.max_timeout"], message);
    }
}

fn listeners(config: &Config, problems: &mut Problems<'_>) {
    let listen = &config.listen;
    if listen.client == listen.peer && listen.client.port() != 0 {
        let message = format!(
            "listen.client and listen.peer are both \"{}\": give them different ports",
            listen.client
        );
        problems.add(&["listen.peer", "listen.client"], message);
    }
}

fn members(config: &Config, problems: &mut Problems<'_>) {
    let (mut ids, mut urls) = (BTreeSet::new(), BTreeSet::new());
    for member in &config.cluster.members {
        if !ids.insert(member.id) {
            problems.add(&["cluster.members"], format!("cluster.members has the id {} twice", member.id));
        }
        if !urls.insert(&member.peer_url) {
            problems.add(
                &["cluster.members"],
                format!("cluster.members has the peer_url {:?} twice", member.peer_url),
            );
        }
    }
    // Whom a cluster was founded by is of no interest any more to a member that has its data.
    if crate::datadir::has_a_cluster(&config.node.data_dir) {
        return;
    }
    if ids.len() > 1 && config.cluster.join.is_empty() && !config.node.id_is_given {
        let message = "cluster.members lists several members: set node.id (--id) to say which of them this is".to_owned();
        return problems.add(&["cluster.members"], message);
    }
    let own_is_listed = config.node.id.is_some_and(|id| ids.contains(&id));
    if config.cluster.join.is_empty() && !own_is_listed {
        let own = config.node.id.unwrap_or_default();
        let listed = ids.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
        let message =
            format!("node.id = {own} is not in cluster.members (ids {listed}): set node.id (--id) to this member's, or add it there");
        problems.add(&["node.id", "cluster.members"], message);
    }
}

fn engines(config: &Config, problems: &mut Problems<'_>) {
    for (key, others) in engines_not_built(config, cfg!(feature = "rocksdb")) {
        let message = format!(
            "{key} = \"rocksdb\": this build has no RocksDB: rebuild with `cargo build --release --features rocksdb`, or choose {others}"
        );
        problems.add(&[key], message);
    }
}

/// Keys that ask for an engine which this build lacks, with the others to choose from.
fn engines_not_built(config: &Config, has_rocksdb: bool) -> Vec<(&'static str, &'static str)> {
    let wal = (config.wal.engine == WalEngine::RocksDb).then_some(("wal.engine", "\"sled\" or \"raft-engine\""));
    let store = (config.store.backend == StoreBackend::RocksDb).then_some(("store.backend", "\"memory\" or \"sled\""));
    wal.into_iter().chain(store).filter(|_| !has_rocksdb).collect()
}

fn warnings(config: &Config, settings: &Settings) -> Vec<String> {
    let mut warnings = Vec::new();
    for (key, address) in [("listen.client", config.listen.client), ("listen.peer", config.listen.peer)] {
        if !address.ip().is_loopback() {
            warnings.push(format!(
                "{key} = \"{address}\" is open to other machines without TLS and without users (not built yet): anybody who reaches it can read and change everything"
            ));
        }
    }
    if !config.wal.sync {
        warnings.push("wal.sync = false: acknowledged writes can be lost in a power cut; this is for tests only".to_owned());
    }
    if !config.cluster.join.is_empty() && settings.is_given("cluster.members") {
        warnings.push("cluster.members is ignored because cluster.join is set: this node joins a running cluster".to_owned());
    }
    warnings.extend(peer_url_warning(config));
    if config.raft.election_ticks < 5 * config.raft.heartbeat_ticks {
        warnings.push(format!(
            "raft.election_ticks = {} is less than five heartbeats ({} ticks each): a short pause of the leader causes an election",
            config.raft.election_ticks, config.raft.heartbeat_ticks
        ));
    }
    warnings
}

/// The addresses may differ on purpose (a proxy, a member that moved), so this is not an error.
fn peer_url_warning(config: &Config) -> Option<String> {
    let own = config.cluster.members.iter().find(|member| Some(member.id) == config.node.id)?;
    let advertised = &config.advertise.peer_url;
    if own.peer_url != *advertised {
        return Some(format!(
            "cluster.members says this member is at {}, advertise.peer_url says {advertised}",
            own.peer_url
        ));
    }
    let listening = config.listen.peer.port();
    let reached = url::port(advertised)?;
    (listening != 0 && reached != listening).then(|| {
        format!("peers are told {advertised}, but listen.peer has port {listening}: right only if something forwards between them")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rocksdb_is_refused_by_a_build_without_it() {
        let mut config = Config::default();
        assert!(engines_not_built(&config, false).is_empty());
        (config.wal.engine, config.store.backend) = (WalEngine::RocksDb, StoreBackend::RocksDb);
        let keys: Vec<&str> = engines_not_built(&config, false).into_iter().map(|(key, _)| key).collect();
        assert_eq!(keys, ["wal.engine", "store.backend"]);
        assert!(engines_not_built(&config, true).is_empty());
    }
}
