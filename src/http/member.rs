//! The cluster: members, their changes, and the leader. Changes are carried out by the leader, and answered once they are applied on
//! the member that answers.

use std::net::IpAddr;

use http::{StatusCode, Uri};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::call::{Call, Reply};
use super::error::{ApiError, Problem};
use super::json::{Object, invalid};
use super::lease::odd_reply;
use super::params::decimal;
use super::respond;
use crate::config::{MAX_MEMBER_ID, MAX_NAME_BYTES};
use crate::leader::{LeaderReply, LeaderRequest, NewMember};
use crate::node::PeerProgress;
use crate::state::Applied;
use crate::state::command::{Body, MemberRecord, MemberRole, MemberUpdate};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AddJson {
    id: Option<u64>,
    peer_url: String,
    client_url: Option<String>,
    name: Option<String>,
    role: Option<RoleJson>,
    /// The data directory the member will come from, sent by a member that registers itself; decimal digits.
    incarnation: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum RoleJson {
    Voter,
    Learner,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct UpdateJson {
    peer_url: Option<String>,
    client_url: Option<String>,
    name: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ReplaceJson {
    remove: u64,
    pub(super) add: Object<AddJson>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TransferJson {
    id: u64,
}

/// `GET /members`
pub(super) async fn list(call: &mut Call<'_>) -> Reply {
    let deadline = call.deadline()?;
    let consistency = call.consistency()?;
    call.params.finish()?;
    call.settle(consistency, deadline).await?;
    let node = &call.app.node;
    // Without a quorum there is nobody to ask how the others are.
    let asked = !consistency.serializable;
    let peers = if !asked {
        node.status().peers
    } else {
        let reply = node.call_leader(LeaderRequest::Progress, deadline).await?;
        let LeaderReply::Progress { peers, .. } = reply else {
            return Err(odd_reply(&reply));
        };
        peers
    };
    let leader = node.status().leader;
    let reader = node.reader();
    let applied = reader.applied();
    let members: Vec<Value> = reader
        .members()
        .iter()
        .map(|member| {
            let mut described = describe(call, member, &applied);
            let progress = peers.iter().find(|peer| peer.id == member.id);
            described["healthy"] = is_healthy(member.id, leader, node.id(), progress, asked);
            if let Some(progress) = progress {
                described["match_index"] = progress.match_index.into();
            }
            described
        })
        .collect();
    let body = json!({"cluster_id": cluster_id(reader.cluster_id()), "leader": leader, "members": members});
    Ok(respond::json(StatusCode::OK, &body))
}

/// The leader reaches itself; of the others it says whether they answered lately. Whom it does not know yet has not. `null`: the leader
/// was not asked.
fn is_healthy(id: u64, leader: Option<u64>, own: u64, progress: Option<&PeerProgress>, asked: bool) -> Value {
    match progress {
        _ if Some(id) == leader => true.into(),
        Some(progress) => progress.active.into(),
        None if id == own => true.into(),
        None if asked => false.into(),
        None => Value::Null,
    }
}

/// The cluster's id as it is written everywhere: 16 hexadecimal digits (a JSON number would lose its last bits in many readers).
pub(super) fn cluster_id(id: u64) -> String {
    format!("{id:016x}")
}

fn describe(call: &Call<'_>, member: &MemberRecord, applied: &Applied) -> Value {
    let conf = &applied.conf_state;
    let votes = conf.voters.contains(&member.id) || conf.voters_outgoing.contains(&member.id);
    let mut described = json!({
        "id": member.id,
        "name": member.name,
        "peer_url": member.peer_url,
        "client_url": client_url(call, member),
        "role": if votes { "voter" } else { "learner" },
    });
    if !votes && member.wanted_role == MemberRole::Voter as i32 {
        described["wanted_role"] = "voter".into();
    }
    if member.replaces != 0 {
        described["replaces"] = member.replaces.into();
    }
    described
}

/// Where clients reach a member. Each publishes it through the log soon after it starts; of itself it knows it before.
fn client_url<'a>(call: &'a Call<'_>, member: &'a MemberRecord) -> &'a str {
    if member.client_url.is_empty() && member.id == call.app.node.id() {
        &call.app.config.advertise.client_url
    } else {
        &member.client_url
    }
}

/// `POST /members`
pub(super) async fn add(call: &mut Call<'_>) -> Reply {
    let deadline = call.deadline()?;
    call.params.finish()?;
    let member = new_member(call.read_json(deadline).await?)?;
    let reply = call.app.node.call_leader(LeaderRequest::AddMember(member), deadline).await?;
    let LeaderReply::Member { id, existed } = reply else {
        return Err(odd_reply(&reply));
    };
    let status = if existed { StatusCode::OK } else { StatusCode::CREATED };
    applied_here(call, deadline).await?;
    Ok(respond::json(status, &described(call, id)))
}

/// `POST /members/replace`
pub(super) async fn replace(call: &mut Call<'_>) -> Reply {
    let deadline = call.deadline()?;
    call.params.finish()?;
    let replace: ReplaceJson = call.read_json(deadline).await?;
    let add = new_member(replace.add.0).map_err(|error| error.within("add"))?;
    if !add.voter {
        return Err(invalid(
            "`add.role` must be `voter`: the new member takes the other's place; add a learner with `POST /members`".to_owned(),
        ));
    }
    if add.id == Some(replace.remove) {
        return Err(invalid("`add.id` and `remove` are the same; an id is never used again".to_owned()));
    }
    let reply = call
        .app
        .node
        .call_leader(
            LeaderRequest::Replace {
                remove: replace.remove,
                add,
            },
            deadline,
        )
        .await?;
    let (status, id) = if let LeaderReply::Underway { id } = reply {
        (StatusCode::ACCEPTED, id)
    } else if let LeaderReply::Member { id, .. } = reply {
        (StatusCode::OK, id)
    } else {
        return Err(odd_reply(&reply));
    };
    if status == StatusCode::OK && replace.remove != call.app.node.id() {
        applied_here(call, deadline).await?;
    }
    Ok(respond::json(status, &described(call, id)))
}

/// `POST /members/{id}/promote`
pub(super) async fn promote(call: &mut Call<'_>) -> Reply {
    let id = member_id(call)?;
    let deadline = call.deadline()?;
    call.params.finish()?;
    call.read_nothing(deadline).await?;
    call.app.node.call_leader(LeaderRequest::Promote { id }, deadline).await?;
    applied_here(call, deadline).await?;
    Ok(respond::json(StatusCode::OK, &described(call, id)))
}

/// `PATCH /members/{id}`
pub(super) async fn update(call: &mut Call<'_>) -> Reply {
    let id = member_id(call)?;
    let deadline = call.deadline()?;
    call.params.finish()?;
    let update: UpdateJson = call.read_json(deadline).await?;
    if update.peer_url.is_none() && update.client_url.is_none() && update.name.is_none() {
        return Err(invalid("nothing to change: give `peer_url`, `client_url` or `name`".to_owned()));
    }
    let command = MemberUpdate {
        id,
        name: update.name.map(check_name).transpose()?,
        client_url: update.client_url.map(|url| check_url("client_url", &url)).transpose()?,
        peer_url: update.peer_url.map(|url| check_url("peer_url", &url)).transpose()?,
        incarnation: None,
        feature_level: None,
        wanted_role: None,
    };
    call.propose(Body::MemberUpdate(command), None, deadline).await?;
    Ok(respond::json(StatusCode::OK, &described(call, id)))
}

/// `DELETE /members/{id}`
pub(super) async fn remove(call: &mut Call<'_>) -> Reply {
    let id = member_id(call)?;
    let deadline = call.deadline()?;
    let force = call.params.flag("force")?;
    call.params.finish()?;
    call.app.node.call_leader(LeaderRequest::Remove { id, force }, deadline).await?;
    // A member that removed itself cannot ask the others any more.
    if id != call.app.node.id() {
        removed_here(call, id, deadline).await?;
    }
    Ok(respond::json(StatusCode::OK, &json!({"id": id, "removed": true})))
}

/// `GET /leader`
pub(super) async fn leader(call: &mut Call<'_>) -> Reply {
    let deadline = call.deadline()?;
    let consistency = call.consistency()?;
    call.params.finish()?;
    call.settle(consistency, deadline).await?;
    let status = call.app.node.status();
    let Some(id) = status.leader else {
        return Err(Problem::NoLeader.into());
    };
    Ok(respond::json(StatusCode::OK, &describe_leader(call, id, status.term)))
}

/// `POST /leader`
pub(super) async fn transfer(call: &mut Call<'_>) -> Reply {
    let deadline = call.deadline()?;
    call.params.finish()?;
    let TransferJson { id: to } = call.read_json(deadline).await?;
    let reply = call.app.node.call_leader(LeaderRequest::Transfer { to }, deadline).await?;
    let LeaderReply::Transferred { id, term } = reply else {
        return Err(odd_reply(&reply));
    };
    Ok(respond::json(StatusCode::OK, &describe_leader(call, id, term)))
}

fn describe_leader(call: &Call<'_>, id: u64, term: u64) -> Value {
    let members = call.app.node.reader().members();
    let client_url = members.iter().find(|member| member.id == id).map(|member| client_url(call, member));
    json!({"id": id, "term": term, "client_url": client_url})
}

/// Waits until a change that the leader reported is applied here too. The change is made: what goes wrong now leaves it unknown.
async fn applied_here(call: &Call<'_>, deadline: Instant) -> Result<(), ApiError> {
    let late = "the change is made, but was not seen applied on this member within the request's timeout";
    call.app
        .node
        .read_barrier(deadline)
        .await
        .map_err(|_| Problem::Timeout(late).into())
}

/// The same for a removal. Who sees it here already asks nobody: by force it may have cost the quorum.
async fn removed_here(call: &Call<'_>, id: u64, deadline: Instant) -> Result<(), ApiError> {
    let reader = call.app.node.reader();
    let is_seen = async {
        loop {
            let next = reader.applied_index() + 1;
            if reader.is_removed(id) {
                return;
            }
            reader.wait_applied(next).await;
        }
    };
    tokio::select! {
        () = is_seen => Ok(()),
        asked = applied_here(call, deadline) => asked,
    }
}

fn described(call: &Call<'_>, id: u64) -> Value {
    let reader = call.app.node.reader();
    match reader.members().iter().find(|member| member.id == id) {
        Some(member) => describe(call, member, &reader.applied()),
        None => json!({"id": id}),
    }
}

fn member_id(call: &Call<'_>) -> Result<u64, ApiError> {
    decimal(&call.argument).filter(|&id| id > 0).ok_or_else(|| {
        invalid("a member's id is a decimal number from 1; a key whose name begins with `members/` is at `/v1/kv/members/…`".to_owned())
    })
}

pub(super) fn new_member(add: AddJson) -> Result<NewMember, ApiError> {
    if add.id.is_some_and(|id| !(1..=MAX_MEMBER_ID).contains(&id)) {
        return Err(invalid(format!("`id` must be 1 to {MAX_MEMBER_ID}")));
    }
    let incarnation = match &add.incarnation {
        None => None,
        Some(digits) => Some(decimal(digits.as_bytes()).ok_or_else(|| invalid("`incarnation` must be decimal digits".to_owned()))?),
    };
    Ok(NewMember {
        id: add.id,
        peer_url: check_url("peer_url", &add.peer_url)?,
        client_url: add.client_url.map(|url| check_url("client_url", &url)).transpose()?,
        name: add.name.map(check_name).transpose()?,
        voter: add.role != Some(RoleJson::Learner),
        incarnation,
    })
}

fn check_name(name: String) -> Result<String, ApiError> {
    if name.is_empty() || name.len() > MAX_NAME_BYTES || name.chars().any(char::is_control) {
        return Err(invalid(format!(
            "`name` must be 1 to {MAX_NAME_BYTES} bytes without control characters"
        )));
    }
    Ok(name)
}

/// An address that others can reach: `http://host:port`, and nothing that only makes sense on the machine that listens.
pub(super) fn check_url(name: &str, url: &str) -> Result<String, ApiError> {
    let refuse = |why: &str| invalid(format!("`{name}` {why}: write it as `http://host:port`"));
    if url.get(..6).is_some_and(|scheme| scheme.eq_ignore_ascii_case("https:")) {
        return Err(refuse("is https, which this build does not speak yet"));
    }
    let parsed: Uri = url.parse().map_err(|_| refuse("is not a URL"))?;
    if parsed.scheme_str() != Some("http") {
        return Err(refuse("is not an http URL"));
    }
    let authority = parsed.authority().ok_or_else(|| refuse("has no host"))?;
    if authority.as_str().contains('@') {
        return Err(refuse("has user information"));
    }
    if !matches!(parsed.path(), "" | "/") || parsed.query().is_some() || url.contains('#') {
        return Err(refuse("has more than host and port"));
    }
    let host = authority.host();
    match (parsed.port_u16(), authority.as_str().trim_start_matches(host)) {
        (Some(1..), _) => {}
        (None, "" | ":") => return Err(refuse("has no port")),
        (Some(0) | None, _) => return Err(refuse("has a port that is not a number from 1 to 65535")),
    }
    let address: Option<IpAddr> = host.trim_start_matches('[').trim_end_matches(']').parse().ok();
    if host.is_empty() || host == "*" || address.is_some_and(|ip| ip.to_canonical().is_unspecified()) {
        return Err(refuse("has no host that others can reach"));
    }
    Ok(format!("http://{authority}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::json::parse;

    #[test]
    fn urls_are_http_with_a_reachable_host_and_a_port() {
        for good in ["http://127.0.0.1:6380", "http://[::1]:6380", "http://kv-4.example:80/"] {
            assert_eq!(check_url("peer_url", good).unwrap(), good.trim_end_matches('/'));
        }
        for (bad, why) in [
            ("https://127.0.0.1:6380", "https"),
            ("127.0.0.1:6380", "URL"),
            ("http://127.0.0.1", "has no port"),
            ("http://127.0.0.1:", "has no port"),
            ("http://127.0.0.1:0", "1 to 65535"),
            ("http://a:99999", "1 to 65535"),
            ("http://0.0.0.0:6380", "reach"),
            ("http://[::]:6380", "reach"),
            ("http://[::ffff:0.0.0.0]:6380", "reach"),
            ("http://a:1/raft", "more"),
            ("http://a:1?x", "more"),
            ("http://u@a:1", "user"),
            ("ftp://a:1", "http"),
            ("", "URL"),
        ] {
            let detail = check_url("peer_url", bad).expect_err(bad).problem.detail();
            assert!(detail.contains("peer_url") && detail.contains(why), "{bad}: {detail}");
        }
    }

    #[test]
    fn a_new_member_is_a_voter_unless_it_says_learner() {
        let member = |body: &str| parse(body.as_bytes()).and_then(new_member).map_err(|error| error.problem.detail());
        let plain = member(r#"{"id":4,"peer_url":"http://127.0.0.1:6380"}"#).unwrap();
        assert!(plain.voter && plain.id == Some(4) && plain.incarnation.is_none());
        assert!(!member(r#"{"peer_url":"http://a:1","role":"learner"}"#).unwrap().voter);
        assert!(member(r#"{"id":0,"peer_url":"http://a:1"}"#).unwrap_err().contains("id"));
        assert!(member(r#"{"id":"4","peer_url":"http://a:1"}"#).unwrap_err().contains("id"));
        assert!(member(r#"{"id":4}"#).unwrap_err().contains("peer_url"));
        assert!(member(r#"{"peer_url":"http://a:1","role":"boss"}"#).unwrap_err().contains("boss"));
    }

    #[test]
    fn health_is_what_the_leader_says() {
        let progress = PeerProgress {
            id: 2,
            match_index: 5,
            active: false,
            snapshot: false,
        };
        assert_eq!(is_healthy(1, Some(1), 3, None, true), true);
        assert_eq!(is_healthy(2, Some(1), 3, Some(&progress), true), false);
        assert_eq!(is_healthy(2, Some(1), 3, None, true), false, "added just now: not heard of yet");
        assert_eq!(is_healthy(2, None, 3, None, false), Value::Null);
    }
}
