//! Who this member is: settled before anything else starts. A founder asks its peers whether they know its id from another data
//! directory; a joiner registers with a running cluster.

use std::time::Duration;

use serde::Deserialize;
use serde_json::json;

use super::ServerError;
use crate::config::Config;
use crate::datadir::{DataDir, founding_cluster_id};

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
    let client = http_client()?;
    if config.cluster.join.is_empty() {
        return found(config, data_dir, &client).await;
    }
    let (id, cluster_id) = register(config, data_dir.node_id(), &client).await?;
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
    client
        .timeout(REQUEST_TIMEOUT)
        .build()
        .map_err(|error| ServerError::Refused(format!("cannot make an HTTP client: {error}")))
}

async fn found(config: &Config, data_dir: &DataDir, client: &reqwest::Client) -> Result<Settled, ServerError> {
    let id = data_dir
        .node_id()
        .ok_or_else(|| ServerError::Refused("a founding member needs an id: give --id".into()))?;
    let cluster_id = founding_cluster_id(&config.cluster.name, &config.cluster.members);
    let own = data_dir.identity().incarnation;
    for member in config.cluster.members.iter().filter(|member| member.id != id) {
        let Ok(known) = fetch_table(client, &member.peer_url).await else {
            continue;
        };
        let other = known
            .members
            .iter()
            .find(|there| there.id == id && there.incarnation != 0 && there.incarnation != own);
        if other.is_some() || known.removed.contains(&id) {
            return Err(ServerError::Refused(format!(
                "member {} at {} knows member {id} from another data directory (or as removed), and {} is empty: a member that lost its disk must not vote again. Remove member {id}, then start this one under a new id with --join",
                member.id,
                member.peer_url,
                data_dir.path().display()
            )));
        }
    }
    Ok(Settled {
        id,
        cluster_id,
        founds: true,
    })
}

/// `GET /raft/members`.
#[derive(Debug, Deserialize)]
struct MemberTable {
    members: Vec<crate::state::command::MemberRecord>,
    #[serde(default)]
    removed: Vec<u64>,
}

async fn fetch_table(client: &reqwest::Client, peer_url: &str) -> Result<MemberTable, reqwest::Error> {
    client
        .get(format!("{peer_url}/raft/members"))
        .timeout(PROBE_TIMEOUT)
        .send()
        .await?
        .error_for_status()?
        .json()
        .await
}

/// `POST /members` and `GET /members` of the client API, as far as they matter here.
#[derive(Debug, Deserialize)]
struct Registered {
    id: u64,
}

#[derive(Debug, Deserialize)]
struct Cluster {
    cluster_id: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Problem {
    code: String,
    detail: String,
}

async fn register(config: &Config, id: Option<u64>, client: &reqwest::Client) -> Result<(u64, u64), ServerError> {
    let mut request = json!({ "peer_url": config.advertise.peer_url, "client_url": config.advertise.client_url });
    if let Some(id) = id {
        request["id"] = json!(id);
    }
    if let Some(name) = config.name() {
        request["name"] = json!(name);
    }
    loop {
        for url in &config.cluster.join {
            match register_at(client, url.trim_end_matches('/'), &request).await? {
                Ok(registered) => return Ok(registered),
                Err(reason) => tracing::warn!(url, reason, "cannot join the cluster yet; trying again"),
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// The outer error is final; the inner one is worth another try.
async fn register_at(client: &reqwest::Client, url: &str, request: &serde_json::Value) -> Result<Result<(u64, u64), String>, ServerError> {
    let answer = match client.post(format!("{url}/members")).json(request).send().await {
        Ok(answer) => answer,
        Err(error) => return Ok(Err(error.to_string())),
    };
    let status = answer.status();
    if status.is_client_error() && status != reqwest::StatusCode::TOO_MANY_REQUESTS {
        let problem: Problem = answer.json().await.unwrap_or_default();
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

async fn fetch_cluster(client: &reqwest::Client, url: &str) -> Result<Cluster, reqwest::Error> {
    client.get(format!("{url}/members")).send().await?.error_for_status()?.json().await
}
