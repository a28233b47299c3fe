//! A whole range, of one revision, streamed.

use serde::Deserialize;

use super::stream::{ByteStream, Lines};
use super::{Client, ClientError, KeyValue, ListOptions, Range, json};

/// The keys of a range as they come, all of one revision.
#[derive(Debug)]
pub struct Scan {
    lines: Lines,
    count: u64,
    ended: bool,
}

#[derive(Deserialize)]
struct End {
    end: bool,
    count: u64,
}

impl Client {
    /// Streams a range; `after` of the options is not used.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn scan(&self, range: &Range, options: &ListOptions) -> Result<Scan, ClientError> {
        let call = self.list_call(range, options).accept("application/x-ndjson");
        let lines = Lines::new(ByteStream::new(self.stream(&call).await?));
        Ok(Scan {
            lines,
            count: 0,
            ended: false,
        })
    }
}

impl Scan {
    /// The revision all keys are of.
    #[must_use]
    pub fn revision(&self) -> Option<u64> {
        self.lines.stream().revision()
    }

    /// The next key; `None` when all have come, which the server has confirmed.
    ///
    /// # Errors
    /// [`ClientError::Protocol`] if the stream ends before the server said that it is complete.
    pub async fn next(&mut self) -> Result<Option<KeyValue>, ClientError> {
        if self.ended {
            return Ok(None);
        }
        let cut = || ClientError::Protocol("the list broke off before its end".to_owned());
        let line = self.lines.next().await?.ok_or_else(cut)?;
        if line.starts_with(b"{\"end\"") {
            let End { end, count } = json::parse(&line)?;
            if !end || count != self.count {
                return Err(cut());
            }
            self.ended = true;
            return Ok(None);
        }
        self.count += 1;
        json::parse(&line).map(Some)
    }
}
