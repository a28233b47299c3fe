//! The least an HTTP server can do on this machine: axum alone, which reads the body of a PUT and forgets it, and answers each GET with
//! the same 256 bytes. `scripts/bench` measures the server beside it, to see how much of the time is not HTTP's.
//!
//! usage: ceiling ADDRESS:PORT

use std::net::SocketAddr;

use axum::{
    Router,
    body::Bytes,
    http::{Method, StatusCode},
    response::{IntoResponse, Response},
};
use tokio::net::TcpListener;

static VALUE: [u8; 256] = [b'v'; 256];

async fn answer(method: Method, body: Bytes) -> Response {
    drop(body);
    if method == Method::GET {
        Bytes::from_static(&VALUE).into_response()
    } else {
        StatusCode::NO_CONTENT.into_response()
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let address: SocketAddr = std::env::args().nth(1).ok_or("usage: ceiling ADDRESS:PORT")?.parse()?;
    let listener = TcpListener::bind(address).await?;
    axum::serve(listener, Router::new().fallback(answer)).await?;
    Ok(())
}
