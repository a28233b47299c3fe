//! Who this member is: settled before anything else starts. A founder asks its peers whether they know its id from another data
//! directory; a joiner registers with a running cluster.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use raft::eraftpb::Message;
use serde::Deserialize;
use serde_json::json;
use tokio::runtime::Handle;

use super::ServerError;
use super::admission::MemberTable;
use crate::config::Config;
use crate::datadir::{DataDir, founding_cluster_id};
use crate::driver::Event;
use crate::node::{Phase, Shared};
use crate::transport::{FetchError, Identity, Peer, PeerEvents, SenderIdentity, Transport, TransportLimits, with_sources};

/// Between two rounds over the URLs to join.
const RETRY: Duration = Duration::from_secs(1);
/// For one request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(6);
/// For one founder asked about this member's id.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

/// Who this member is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settled {
    pub id: u64,
    pub cluster_id: u64,
    /// A founding member's first start.
    pub founds: bool,
}

/// Settles id and cluster. A joiner tries until it is registered; the caller ends that by dropping the future.
pub async fn settle(config: &Config, data_dir: &mut DataDir) -> Result<Settled, ServerError> {
    if let (Some(cluster_id), Some(id)) = (data_dir.identity().cluster_id, data_dir.node_id()) {
        return Ok(Settled {
            id,
            cluster_id,
            founds: false,
        });
    }
    if config.cluster.join.is_empty() {
        return found(config, data_dir).await;
    }
    let client = http_client()?;
    let (id, cluster_id) = register(config, data_dir.node_id(), data_dir.identity().incarnation, &client).await?;
    data_dir.set_cluster(cluster_id, id)?;
    Ok(Settled {
        id,
        cluster_id,
        founds: false,
    })
}

fn http_client() -> Result<reqwest::Client, ServerError> {
    let client = reqwest::Client::builder()
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never());
    client.timeout(REQUEST_TIMEOUT).build().map_err(no_client)
}

fn no_client(error: reqwest::Error) -> ServerError {
    ServerError::Refused(format!("cannot make an HTTP client: {error}"))
}

/// Nobody is to hear anything from a member that only asks.
struct NoEvents;

impl PeerEvents for NoEvents {
    fn unreachable(&self, _peer: u64) {}
    fn snapshot_sent(&self, _peer: u64, _ok: bool) {}
    fn answered(&self, _sender: &SenderIdentity<'_>, _messages: Vec<Message>) {}
    fn unreached(&self, _: u64, _: Option<Duration>) {}
    fn removed(&self, _detail: String) {}
    fn refused(&self, _peer: u64, _code: &str, _detail: String) {}
}

async fn found(config: &Config, data_dir: &DataDir) -> Result<Settled, ServerError> {
    let id = data_dir
        .node_id()
        .ok_or_else(|| ServerError::Refused("a founding member needs an id: give --id".into()))?;
    let cluster_id = founding_cluster_id(&config.cluster.name, &config.cluster.members);
    let identity = Identity {
        cluster_id,
        member: id,
        incarnation: data_dir.identity().incarnation,
        boot: data_dir.boot(),
        peer_url: config.advertise.peer_url.as_str().into(),
    };
    let own_incarnation = identity.incarnation;
    let transport = Transport::start(identity, TransportLimits::default(), Arc::new(NoEvents), Handle::current()).map_err(no_client)?;
    for member in config.cluster.members.iter().filter(|member| member.id != id) {
        match transport.fetch_members(&member.peer_url, PROBE_TIMEOUT).await {
            Ok(table) => check_is_new(&table, id, own_incarnation).map_err(|what| {
                ServerError::Refused(format!(
                    "{} is empty, and member {} at {} {what}: a member that lost its disk must not vote again. Remove member {id} from the cluster, then start this one under a new id with --join",
                    data_dir.path().display(),
                    member.id,
                    member.peer_url,
                ))
            })?,
            // Not started yet, like this one.
            Err(FetchError::Unreachable(error)) => tracing::debug!(member = member.id, error, "a founding member does not answer yet"),
            Err(error) => tracing::warn!(
                member = member.id,
                url = member.peer_url,
                %error,
                "a founding member does not know this cluster: are cluster.name and cluster.members the same on all of them?"
            ),
        }
    }
    Ok(Settled {
        id,
        cluster_id,
        founds: true,
    })
}

/// Whether `id` was never used by another data directory; otherwise the rest of a sentence about the member that knows it.
fn check_is_new(table: &serde_json::Value, id: u64, own_incarnation: u64) -> Result<(), String> {
    let table = MemberTable::deserialize(table).map_err(|error| format!("answers what this version does not understand ({error})"))?;
    if table.removed.contains(&id) {
        return Err(format!("knows member {id} as removed"));
    }
    let known = table
        .members
        .iter()
        .find(|there| there.id == id)
        .map_or(0, |there| there.incarnation);
    if known != 0 && known != own_incarnation {
        return Err(format!("knows member {id} with another data directory"));
    }
    Ok(())
}

/// `POST /members` and `GET /members` of the client API, as far as they matter here.
#[derive(Debug, Deserialize)]
struct Registered {
    id: u64,
}

#[derive(Debug, Deserialize)]
struct Cluster {
    cluster_id: String,
    members: Vec<Address>,
}

#[derive(Debug, Deserialize)]
struct Address {
    id: u64,
    peer_url: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Problem {
    code: String,
    detail: String,
}

async fn register(config: &Config, id: Option<u64>, incarnation: u64, client: &reqwest::Client) -> Result<(u64, u64), ServerError> {
    let mut request = json!({
        "peer_url": config.advertise.peer_url,
        "client_url": config.advertise.client_url,
        "incarnation": incarnation.to_string(),
    });
    if let Some(id) = id {
        request["id"] = json!(id);
    }
    if let Some(name) = config.name() {
        request["name"] = json!(name);
    }
    let mut said = BTreeMap::new();
    loop {
        for url in &config.cluster.join {
            match register_at(client, url.trim_end_matches('/'), &request).await? {
                Ok(registered) => return Ok(registered),
                // Said once, until it is another one.
                Err(reason) if said.get(url) == Some(&reason) => {}
                Err(reason) => {
                    tracing::warn!(url, reason, "cannot join the cluster yet; trying again every second");
                    said.insert(url, reason);
                }
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// The outer error is final; the inner one is worth another try.
async fn register_at(client: &reqwest::Client, url: &str, request: &serde_json::Value) -> Result<Result<(u64, u64), String>, ServerError> {
    let answer = match client.post(format!("{url}/members")).json(request).send().await {
        Ok(answer) => answer,
        Err(error) => return Ok(Err(with_sources(&error))),
    };
    let status = answer.status();
    if status.is_client_error() && status != reqwest::StatusCode::TOO_MANY_REQUESTS {
        let Ok(problem) = answer.json::<Problem>().await else {
            return Err(ServerError::Refused(format!(
                "{url} answers {status} without a reason that metcd would give: is a member of the cluster listening there? --join wants a client URL"
            )));
        };
        if problem.code == "change_in_progress" {
            return Ok(Err(problem.detail));
        }
        return Err(ServerError::Refused(format!(
            "{url} refuses this member ({status} {}): {}",
            problem.code, problem.detail
        )));
    }
    if !status.is_success() {
        return Ok(Err(format!("answered {status}")));
    }
    let registered: Registered = match answer.json().await {
        Ok(registered) => registered,
        Err(error) => return Ok(Err(error.to_string())),
    };
    match fetch_cluster(client, url).await {
        Ok(cluster) => match u64::from_str_radix(&cluster.cluster_id, 16) {
            Ok(cluster_id) => Ok(Ok((registered.id, cluster_id))),
            Err(_) => Err(ServerError::Refused(format!(
                "{url} names its cluster {:?}, which is no cluster id: is it metcd?",
                cluster.cluster_id
            ))),
        },
        Err(error) => Ok(Err(error.to_string())),
    }
}

/// A joiner that has no state yet hears the leader and does not know where to answer: it asks the cluster for the members' addresses,
/// again and again (they may move), until its first snapshot tells it more.
pub async fn find_peers(config: Arc<Config>, shared: Arc<Shared>) {
    let mut phases = shared.phases();
    let Ok(client) = http_client() else { return };
    if config.cluster.join.is_empty() {
        tracing::warn!("this member has no state yet and cluster.join names nobody: give --join until it has caught up");
    }
    while shared.applied_index() == 0 && *phases.borrow_and_update() == Phase::Running {
        for url in &config.cluster.join {
            match fetch_cluster(&client, url.trim_end_matches('/')).await {
                Ok(cluster) => {
                    let peers = cluster.members.into_iter().map(|member| Peer {
                        id: member.id,
                        url: member.peer_url,
                        boot: 0,
                    });
                    shared.send(Event::PeersFound(peers.collect()));
                    break;
                }
                Err(error) => tracing::debug!(url, %error, "cannot ask for the members"),
            }
        }
        // A change of phase ends the wait early; that it is gone altogether ends the loop as well.
        let _ = tokio::time::timeout(RETRY, phases.changed()).await;
    }
}

async fn fetch_cluster(client: &reqwest::Client, url: &str) -> Result<Cluster, reqwest::Error> {
    client.get(format!("{url}/members")).send().await?.error_for_status()?.json().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_founder_is_new_unless_its_id_was_bound_or_removed() {
        let record = |id, incarnation| crate::state::command::MemberRecord {
            id,
            incarnation,
            ..Default::default()
        };
        let table = json!({ "cluster_id": "c1", "members": [record(1, 0), record(2, 77)], "removed": [3] });
        assert_eq!(check_is_new(&table, 1, 55), Ok(()));
        assert_eq!(check_is_new(&table, 2, 77), Ok(()));
        assert_eq!(check_is_new(&table, 4, 55), Ok(()));
        assert!(check_is_new(&table, 2, 55).unwrap_err().contains("another data directory"));
        assert!(check_is_new(&table, 3, 55).unwrap_err().contains("removed"));
        assert!(check_is_new(&json!([]), 1, 55).is_err());
    }
}
