//! Watching: every change, in order, once, across broken connections.

use std::time::Duration;

use http::HeaderName;
use serde::Deserialize;
use tokio::time::{Instant, sleep, timeout};

use super::encode::Target;
use super::error::Problem;
use super::stream::{ByteStream, Lines};
use super::{Client, ClientError, KeyValue, Range, json};

/// The server says something every 10 s. After this long without a word the connection counts as dead.
const SILENCE: Duration = Duration::from_secs(30);
/// Between attempts to go on.
const RESUME_PAUSE: Duration = Duration::from_millis(200);
/// An interruption that lasts longer than a change of the leader is told.
const TELL_AFTER: Duration = Duration::from_secs(2);

/// What to watch.
#[derive(Debug, Clone)]
pub struct WatchOptions {
    target: WatchTarget,
    /// Begin with the changes of this revision instead of the next one.
    pub from_revision: Option<u64>,
    /// Tell what was there before.
    pub prev: bool,
    /// Only puts, or only deletions.
    pub only: Option<EventKind>,
    /// How long to try to go on after the stream broke, before it ends with the last attempt's error.
    pub outage: Duration,
}

#[derive(Debug, Clone)]
enum WatchTarget {
    Key(Vec<u8>),
    Range(Range),
}

impl WatchOptions {
    /// One key.
    #[must_use]
    pub fn key(key: &[u8]) -> WatchOptions {
        WatchOptions::new(WatchTarget::Key(key.to_vec()))
    }

    /// Many keys.
    #[must_use]
    pub fn range(range: Range) -> WatchOptions {
        WatchOptions::new(WatchTarget::Range(range))
    }

    fn new(target: WatchTarget) -> WatchOptions {
        WatchOptions {
            target,
            from_revision: None,
            prev: false,
            only: None,
            outage: Duration::from_secs(60),
        }
    }
}

/// What happened to a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum EventKind {
    /// It was written.
    Put,
    /// It was deleted, or its lease ended.
    Delete,
}

/// One key's part in a change.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Event {
    /// What happened.
    #[serde(rename = "type")]
    pub kind: EventKind,
    /// The key as it is now; after a deletion only key and mod_revision.
    pub kv: KeyValue,
    /// As it was before, if that was asked for and it existed.
    pub prev: Option<KeyValue>,
}

/// What a watch tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// It is in place: every change after this revision will come. Told once; not when the watch goes on after an interruption.
    Open {
        /// The revision it begins after.
        revision: u64,
    },
    /// All that one revision changed of what is watched.
    Change {
        /// The revision.
        revision: u64,
        /// At least one, each key once.
        events: Vec<Event>,
    },
    /// Nothing happened up to this revision that was not told.
    Progress {
        /// The revision.
        revision: u64,
    },
    /// The stream broke two seconds ago or longer; the watch tries to go on. Told once until it does.
    Interrupted {
        /// What went wrong.
        why: String,
    },
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Wire {
    Open {
        revision: u64,
    },
    Change {
        revision: u64,
        events: Vec<Event>,
    },
    Progress {
        revision: u64,
    },
    Error {
        code: String,
        #[serde(default)]
        detail: String,
        compacted_revision: Option<u64>,
    },
}

/// A watch that goes on by itself. Dropping it ends it.
#[derive(Debug)]
pub struct Watch {
    client: Client,
    options: WatchOptions,
    lines: Option<Lines>,
    /// Everything up to this revision was told.
    seen: Option<u64>,
    opened: bool,
    broken_since: Option<Instant>,
    /// Whether this interruption was told.
    told: bool,
}

impl Client {
    /// Begins a watch.
    ///
    /// # Errors
    /// See [`ClientError`]; `compacted` if the history asked for is gone.
    pub async fn watch(&self, options: WatchOptions) -> Result<Watch, ClientError> {
        let mut watch = Watch {
            client: self.clone(),
            options,
            lines: None,
            seen: None,
            opened: false,
            broken_since: None,
            told: false,
        };
        watch.connect().await?;
        Ok(watch)
    }
}

impl Watch {
    /// The next message. May be cancelled: nothing is lost.
    ///
    /// # Errors
    /// `compacted` if the history needed to go on is gone; otherwise what went wrong last when the outage lasted too long.
    pub async fn next(&mut self) -> Result<Message, ClientError> {
        loop {
            let problem = match self.next_wire().await {
                Ok(Wire::Open { revision }) if self.opened => {
                    self.note(revision);
                    continue;
                }
                Ok(Wire::Open { revision }) => {
                    self.opened = true;
                    self.note(revision);
                    return Ok(Message::Open { revision });
                }
                Ok(Wire::Change { revision, events }) => {
                    self.note(revision);
                    return Ok(Message::Change { revision, events });
                }
                Ok(Wire::Progress { revision }) => {
                    self.note(revision);
                    return Ok(Message::Progress { revision });
                }
                Ok(Wire::Error {
                    code,
                    detail,
                    compacted_revision,
                }) => refusal(code, detail, compacted_revision),
                Err(error) => error,
            };
            self.lines = None;
            if let Some(interrupted) = self.go_on_after(problem)? {
                return Ok(interrupted);
            }
        }
    }

    fn note(&mut self, revision: u64) {
        self.seen = Some(revision);
        self.broken_since = None;
        self.told = false;
    }

    async fn next_wire(&mut self) -> Result<Wire, ClientError> {
        if self.lines.is_none() {
            sleep(RESUME_PAUSE).await;
            self.connect().await?;
        }
        let broken = |why: &str| ClientError::Protocol(why.to_owned());
        let lines = self.lines.as_mut().ok_or_else(|| broken("no stream"))?;
        let line = timeout(SILENCE, lines.next()).await;
        match line.map_err(|_elapsed| broken("the watch went silent"))?? {
            Some(line) => json::parse(&line),
            None => Err(broken("the watch ended")),
        }
    }

    /// Gives up, or says once that it goes on trying.
    fn go_on_after(&mut self, problem: ClientError) -> Result<Option<Message>, ClientError> {
        let since = *self.broken_since.get_or_insert_with(Instant::now);
        // Such a request will not be answered better by another member.
        let hopeless = problem
            .problem()
            .is_some_and(|problem| problem.status < 500 && problem.status != 429);
        if hopeless || since.elapsed() >= self.options.outage {
            return Err(problem);
        }
        let is_news = !self.told && since.elapsed() >= TELL_AFTER;
        self.told |= is_news;
        Ok(is_news.then(|| Message::Interrupted { why: problem.to_string() }))
    }

    async fn connect(&mut self) -> Result<(), ClientError> {
        let mut target = Target::new("/v1/watch");
        match &self.options.target {
            WatchTarget::Key(key) => target.set("key", key),
            WatchTarget::Range(range) => range.set(&mut target),
        }
        target.set_flag("prev", self.options.prev);
        match self.options.only {
            Some(EventKind::Put) => target.set("only", "put"),
            Some(EventKind::Delete) => target.set("only", "delete"),
            None => {}
        }
        if self.seen.is_none() {
            target.set_number("from_revision", self.options.from_revision);
        }
        let mut call = self.client.reading(target).accept("application/x-ndjson");
        if let Some(seen) = self.seen {
            call = call.header(HeaderName::from_static("last-event-id"), seen.to_string())?;
        }
        let received = self.client.stream(&call).await?;
        self.lines = Some(Lines::new(ByteStream::new(received)));
        Ok(())
    }
}

/// An `error` message as the refusal it would have been before the stream began.
fn refusal(code: String, detail: String, compacted_revision: Option<u64>) -> ClientError {
    let status = if code == "compacted" { 410 } else { 503 };
    ClientError::Refused(Box::new(Problem {
        status,
        code,
        detail,
        outcome: None,
        compacted_revision,
        current_revision: None,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_read_as_the_contract_has_them() {
        let wire: Wire =
            json::parse(br#"{"type":"change","revision":43,"events":[{"type":"delete","kv":{"key":"a","mod_revision":43}}]}"#).unwrap();
        let Wire::Change { revision: 43, events } = wire else {
            panic!("not a change")
        };
        assert_eq!((events[0].kind, events[0].kv.key.as_slice()), (EventKind::Delete, &b"a"[..]));
        let wire: Wire = json::parse(br#"{"type":"error","code":"compacted","detail":"d","compacted_revision":9}"#).unwrap();
        assert!(matches!(
            wire,
            Wire::Error {
                compacted_revision: Some(9),
                ..
            }
        ));
    }

    #[test]
    fn compacted_is_an_answer_no_other_member_can_better() {
        assert_eq!(
            refusal("compacted".to_owned(), String::new(), Some(9))
                .problem()
                .map(|problem| problem.status),
            Some(410)
        );
        assert_eq!(
            refusal("shutting_down".to_owned(), String::new(), None)
                .problem()
                .map(|problem| problem.status),
            Some(503)
        );
    }
}
