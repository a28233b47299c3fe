//! Leases.

use std::time::Duration;

use bytes::Bytes;
use http::Method;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::encode::Target;
use super::request::Call;
use super::{Client, ClientError, json};

/// A lease.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
pub struct Lease {
    /// Its id, in decimal.
    pub id: String,
    /// Its length in seconds.
    #[serde(serialize_with = "json::number")]
    pub ttl: f64,
}

/// A lease and what hangs on it.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
pub struct LeaseDetail {
    /// Its id, in decimal.
    pub id: String,
    /// Its length in seconds.
    #[serde(serialize_with = "json::number")]
    pub ttl: f64,
    /// Seconds until it ends; the leader knows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remaining: Option<f64>,
    /// Made by a put with a ttl: it lives and dies with its key.
    #[serde(default)]
    pub owned: bool,
    /// Its keys, those that are UTF-8.
    #[serde(default)]
    pub keys: Vec<String>,
    /// The others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys_base64: Vec<String>,
}

#[derive(Deserialize)]
struct Leases {
    leases: Vec<LeaseDetail>,
}

impl Client {
    /// Makes a lease.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn grant_lease(&self, ttl: Duration) -> Result<Lease, ClientError> {
        let body = json::to_bytes(&json!({"ttl": ttl.as_secs_f64()}))?;
        self.answer(&Call::keyed(Method::POST, Target::new("/v1/leases"), body))
            .await?
            .json()
    }

    /// All leases.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn leases(&self) -> Result<Vec<LeaseDetail>, ClientError> {
        let leases: Leases = self.answer(&self.reading(Target::new("/v1/leases"))).await?.json()?;
        Ok(leases.leases)
    }

    /// One lease with its keys.
    ///
    /// # Errors
    /// See [`ClientError`]; `lease_not_found`.
    pub async fn lease(&self, id: &str) -> Result<LeaseDetail, ClientError> {
        self.answer(&self.reading(lease_target(id, ""))).await?.json()
    }

    /// Starts a lease's time anew.
    ///
    /// # Errors
    /// See [`ClientError`]; `lease_not_found` if it has ended.
    pub async fn keep_lease_alive(&self, id: &str) -> Result<Lease, ClientError> {
        let call = Call::once(Method::POST, lease_target(id, "/keepalive"), Bytes::new()).harmless();
        self.answer(&call).await?.json()
    }

    /// Ends a lease and deletes its keys in one revision.
    ///
    /// # Errors
    /// See [`ClientError`]; `lease_not_found`.
    pub async fn revoke_lease(&self, id: &str) -> Result<(), ClientError> {
        self.answer(&Call::keyed(Method::DELETE, lease_target(id, ""), Bytes::new()))
            .await?;
        Ok(())
    }
}

fn lease_target(id: &str, rest: &str) -> Target {
    Target::new(&format!("/v1/leases/{}{rest}", super::percent_encode(id.as_bytes())))
}
