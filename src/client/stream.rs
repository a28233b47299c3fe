//! Answers that are read piece by piece.

use bytes::{Buf as _, Bytes, BytesMut};
use http::{HeaderMap, header};
use http_body_util::BodyExt as _;
use hyper::body::{Body as _, Incoming};

use super::ClientError;
use super::connection::{Received, root_cause};
use super::error::Outcome;
use super::request::number;

/// The body of an answer as it comes.
#[derive(Debug)]
pub struct ByteStream {
    headers: HeaderMap,
    body: Incoming,
}

impl ByteStream {
    pub(super) fn new(received: Received<Incoming>) -> ByteStream {
        ByteStream {
            headers: received.headers,
            body: received.body,
        }
    }

    /// The revision the stream is of, if it has one.
    #[must_use]
    pub fn revision(&self) -> Option<u64> {
        number(&self.headers, "metcd-revision")
    }

    /// How many bytes it will have, if the server said so.
    #[must_use]
    pub fn expected_bytes(&self) -> Option<u64> {
        number(&self.headers, header::CONTENT_LENGTH.as_str()).or_else(|| self.body.size_hint().exact())
    }

    /// About how many bytes it will have, if the server gave an estimate: it may come to more or less.
    #[must_use]
    pub fn estimated_bytes(&self) -> Option<u64> {
        number(&self.headers, "metcd-snapshot-bytes-estimate")
    }

    /// The next piece; `None` at the proper end.
    ///
    /// # Errors
    /// [`ClientError::Lost`] if the stream broke off.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        while let Some(frame) = self.body.frame().await {
            let frame = frame.map_err(|error| ClientError::Lost {
                endpoint: "the server".to_owned(),
                cause: root_cause(&error),
                outcome: Outcome::NotApplied,
            })?;
            if let Ok(data) = frame.into_data()
                && !data.is_empty()
            {
                return Ok(Some(data));
            }
        }
        Ok(None)
    }
}

/// A stream cut into lines.
#[derive(Debug)]
pub(super) struct Lines {
    stream: ByteStream,
    buffer: BytesMut,
    /// No line ends before this.
    searched: usize,
}

impl Lines {
    pub(super) fn new(stream: ByteStream) -> Lines {
        Lines {
            stream,
            buffer: BytesMut::new(),
            searched: 0,
        }
    }

    pub(super) fn stream(&self) -> &ByteStream {
        &self.stream
    }

    /// The next line without its end; `None` at the end of the stream. A last line without an end is dropped: it is not whole.
    /// May be cancelled: nothing is lost.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        loop {
            let unsearched = self.buffer.get(self.searched..).unwrap_or_default();
            if let Some(at) = unsearched.iter().position(|&byte| byte == b'\n') {
                let line = self.buffer.split_to(self.searched + at).freeze();
                self.buffer.advance(1);
                self.searched = 0;
                return Ok(Some(line));
            }
            self.searched = self.buffer.len();
            match self.stream.next().await? {
                Some(piece) => self.buffer.extend_from_slice(&piece),
                None => return Ok(None),
            }
        }
    }
}
