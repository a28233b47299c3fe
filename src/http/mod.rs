//! The client API (API.md) as an axum router over [`crate::node::Node`].
