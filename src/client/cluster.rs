//! Members, the leader, and what operators ask.

use http::Method;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::encode::Target;
use super::request::Call;
use super::{ByteStream, Client, ClientError, json};

/// One member.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub struct Member {
    /// Never used again once removed.
    pub id: u64,
    /// What people call it.
    #[serde(default)]
    pub name: String,
    /// Where the other members reach it.
    #[serde(default)]
    pub peer_url: String,
    /// Where clients reach it; empty until it has said so.
    #[serde(default)]
    pub client_url: String,
    /// `voter` or `learner`.
    #[serde(default)]
    pub role: String,
    /// What it will be once it has caught up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wanted_role: Option<String>,
    /// Whose place it takes, or took.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replaces: Option<u64>,
    /// Whether it answers the leader.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub healthy: Option<bool>,
    /// The last entry it is known to have.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub match_index: Option<u64>,
}

/// The whole cluster.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub struct Members {
    /// 16 hexadecimal digits.
    pub cluster_id: String,
    /// The leader's id, if there is one.
    pub leader: Option<u64>,
    /// All members.
    pub members: Vec<Member>,
}

/// A member to be added.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct NewMember {
    /// Its id; the cluster assigns one if it is left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<u64>,
    /// Where the other members will reach it.
    pub peer_url: String,
    /// Where clients will.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client_url: Option<String>,
    /// What people call it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// `voter` (the default) or `learner`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
}

/// The leader.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
pub struct Leader {
    /// Its id.
    pub id: u64,
    /// Its term.
    pub term: u64,
    /// Where clients reach it.
    pub client_url: Option<String>,
}

impl Client {
    /// The members, as the leader sees them; with serializable reads, as the answering member does.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn members(&self) -> Result<Members, ClientError> {
        self.answer(&self.reading(Target::new("/members"))).await?.json()
    }

    /// Adds a member; `false` if it was there already, with this address.
    ///
    /// # Errors
    /// See [`ClientError`]; 409 with `member_exists`, `member_id_used`, `change_in_progress`.
    pub async fn add_member(&self, member: &NewMember) -> Result<(Member, bool), ClientError> {
        let call = Call::once(Method::POST, Target::new("/members"), json::to_bytes(member)?);
        let answer = self.answer(&call).await?;
        Ok((answer.json()?, answer.status == http::StatusCode::CREATED))
    }

    /// Removes a member for ever; `force` although the rest has no healthy quorum.
    ///
    /// # Errors
    /// See [`ClientError`]; 409 `unsafe_change`.
    pub async fn remove_member(&self, id: u64, force: bool) -> Result<(), ClientError> {
        let mut target = Target::new(&format!("/members/{id}"));
        target.set_flag("force", force);
        self.answer(&Call::once(Method::DELETE, target, "")).await?;
        Ok(())
    }

    /// Makes a learner a voter.
    ///
    /// # Errors
    /// See [`ClientError`]; 409 `not_a_learner`, or `unsafe_change` if it is not caught up.
    pub async fn promote_member(&self, id: u64) -> Result<Member, ClientError> {
        let target = Target::new(&format!("/members/{id}/promote"));
        self.answer(&Call::once(Method::POST, target, "")).await?.json()
    }

    /// Changes what is known of a member: `peer_url`, `client_url`, `name`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn update_member(&self, id: u64, fields: &Value) -> Result<Member, ClientError> {
        let target = Target::new(&format!("/members/{id}"));
        let call = Call::once(Method::PATCH, target, json::to_bytes(fields)?).harmless();
        self.answer(&call).await?.json()
    }

    /// Replaces a member; `false` if it is still under way.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn replace_member(&self, remove: u64, add: &NewMember) -> Result<(Member, bool), ClientError> {
        let body = json::to_bytes(&json!({"remove": remove, "add": add}))?;
        let answer = self
            .answer(&Call::once(Method::POST, Target::new("/members/replace"), body))
            .await?;
        Ok((answer.json()?, answer.status != http::StatusCode::ACCEPTED))
    }

    /// The leader.
    ///
    /// # Errors
    /// See [`ClientError`]; `no_leader`.
    pub async fn leader(&self) -> Result<Leader, ClientError> {
        self.answer(&self.reading(Target::new("/leader"))).await?.json()
    }

    /// Hands leadership to a member; returns when it leads.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn transfer_leader(&self, id: u64) -> Result<Leader, ClientError> {
        let body = json::to_bytes(&json!({"id": id}))?;
        self.answer(&Call::once(Method::POST, Target::new("/leader"), body).harmless())
            .await?
            .json()
    }

    /// What the answering member says of itself.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn status(&self) -> Result<Value, ClientError> {
        self.answer(&Call::read(Target::new("/status")).untimed()).await?.json()
    }

    /// Whether a linearizable read works; an error says why not.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn health(&self) -> Result<Value, ClientError> {
        self.answer(&Call::read(Target::new("/health"))).await?.json()
    }

    /// Drops history before a revision; returns the answer.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn compact(&self, revision: u64) -> Result<Value, ClientError> {
        let body = json::to_bytes(&json!({"revision": revision}))?;
        self.answer(&Call::keyed(Method::POST, Target::new("/v1/compact"), body))
            .await?
            .json()
    }

    /// The digest of the store at a revision, or now: `{"revision","hash"}`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn hash(&self, revision: Option<u64>) -> Result<Value, ClientError> {
        let mut target = Target::new("/v1/hash");
        target.set_number("revision", revision);
        self.answer(&self.reading(target)).await?.json()
    }

    /// A consistent backup as a stream of bytes, with its own checksum inside.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn snapshot(&self) -> Result<ByteStream, ClientError> {
        Ok(ByteStream::new(self.stream(&self.reading(Target::new("/v1/snapshot"))).await?))
    }
}
