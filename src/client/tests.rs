//! What is asked again, where, and what is said of it: against servers that follow a script.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::watch::{Message, WatchOptions};
use super::{Client, ClientError, Condition, ListOptions, Outcome, Range};

/// What a scripted server does with a request.
#[derive(Clone)]
enum Step {
    /// Answers with status, headers and body.
    Answer(u16, &'static str, &'static str),
    /// Reads the request and closes the connection.
    Drop,
    /// Reads the request and says nothing more.
    Hang,
}

const CREATED: Step = Step::Answer(201, "metcd-revision: 7\r\n", "");
const NO_LEADER: Step = Step::Answer(503, "", r#"{"status":503,"code":"no_leader","detail":"d","outcome":"not_applied"}"#);
const OVERLOADED: Step = Step::Answer(
    429,
    "retry-after: 1\r\n",
    r#"{"status":429,"code":"overloaded","detail":"d","outcome":"not_applied"}"#,
);
const LATE: Step = Step::Answer(504, "", r#"{"status":504,"code":"timeout","detail":"d","outcome":"unknown"}"#);
const QUOTA: Step = Step::Answer(
    507,
    "",
    r#"{"status":507,"code":"quota_exceeded","detail":"d","outcome":"not_applied"}"#,
);

/// Follows its steps, one for each request, the last one for ever; keeps what it was sent.
struct Scripted {
    url: String,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Scripted {
    async fn new(steps: &[Step]) -> Scripted {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (seen, steps) = (requests.clone(), steps.to_vec());
        tokio::spawn(async move {
            let mut number = 0;
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                while let Some(request) = read_request(&mut stream).await {
                    seen.lock().unwrap().push(request);
                    let step = steps.get(number).or(steps.last()).cloned();
                    number += 1;
                    match step {
                        Some(Step::Answer(status, headers, body)) => answer(&mut stream, status, headers, body).await,
                        Some(Step::Hang) => std::future::pending().await,
                        Some(Step::Drop) | None => break,
                    }
                }
            }
        });
        Scripted { url, requests }
    }

    fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

async fn read_request(stream: &mut TcpStream) -> Option<String> {
    let mut request = Vec::new();
    let mut piece = [0; 4096];
    loop {
        let read = stream.read(&mut piece).await.ok().filter(|read| *read > 0)?;
        request.extend_from_slice(&piece[..read]);
        let text = String::from_utf8_lossy(&request).into_owned();
        let Some((head, body)) = text.split_once("\r\n\r\n") else {
            continue;
        };
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        if body.len() >= length.map_or(0, |length| length.parse().unwrap()) {
            return Some(text);
        }
    }
}

async fn answer(stream: &mut TcpStream, status: u16, headers: &str, body: &str) {
    let text = format!("HTTP/1.1 {status} x\r\n{headers}content-length: {}\r\n\r\n{body}", body.len());
    stream.write_all(text.as_bytes()).await.unwrap();
}

fn key_of(request: &str) -> &str {
    request
        .lines()
        .find_map(|line| line.strip_prefix("idempotency-key: "))
        .expect("a key")
}

/// Nobody listens there.
async fn nobody() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

fn client(urls: &[&str]) -> Client {
    Client::new(urls).unwrap().with_timeout(Duration::from_secs(3))
}

#[tokio::test]
async fn a_refused_connection_and_a_busy_member_are_passed_over_and_not_asked_again_first() {
    let (busy, good) = (Scripted::new(&[NO_LEADER]).await, Scripted::new(&[CREATED]).await);
    let client = client(&[&nobody().await, &busy.url, &good.url]);
    assert_eq!(client.put(b"a", "1").await.unwrap().revision, 7);
    assert_eq!(client.put(b"a", "1").await.unwrap().revision, 7);
    assert_eq!((busy.requests().len(), good.requests().len()), (1, 2));
}

#[tokio::test]
async fn a_lost_put_is_sent_again_under_the_same_key_and_other_puts_have_others() {
    let (losing, good) = (Scripted::new(&[Step::Drop]).await, Scripted::new(&[CREATED]).await);
    let client = client(&[&losing.url, &good.url]);
    assert_eq!(client.put(b"a", "1").await.unwrap().revision, 7);
    client.put(b"a", "1").await.unwrap();
    let (lost, sent) = (losing.requests(), good.requests());
    assert_eq!(key_of(&lost[0]), key_of(&sent[0]));
    assert_ne!(key_of(&sent[0]), key_of(&sent[1]));
    assert_eq!(key_of(&sent[0]).len(), 32);
}

#[tokio::test]
async fn a_lost_mutation_without_a_key_is_unknown_and_not_sent_again() {
    let (losing, good) = (Scripted::new(&[Step::Drop]).await, Scripted::new(&[CREATED]).await);
    let error = client(&[&losing.url, &good.url]).remove_member(3, false).await.unwrap_err();
    assert!(
        matches!(
            error,
            ClientError::Lost {
                outcome: Outcome::Unknown,
                ..
            }
        ),
        "{error:?}"
    );
    assert!(good.requests().is_empty());
    // What was surely not applied may be asked elsewhere.
    let busy = Scripted::new(&[NO_LEADER]).await;
    client(&[&busy.url, &good.url]).remove_member(3, false).await.unwrap();
}

#[tokio::test]
async fn an_overloaded_member_is_passed_over_also_without_a_key_and_asked_again_if_it_is_the_only_one() {
    let (full, good) = (Scripted::new(&[OVERLOADED]).await, Scripted::new(&[CREATED]).await);
    let both = client(&[&full.url, &good.url]);
    assert_eq!(both.put(b"a", "1").await.unwrap().revision, 7);
    assert_eq!((full.requests().len(), good.requests().len()), (1, 1));
    assert_eq!(key_of(&full.requests()[0]), key_of(&good.requests()[0]));
    let (full, good) = (Scripted::new(&[OVERLOADED]).await, Scripted::new(&[CREATED]).await);
    client(&[&full.url, &good.url]).remove_member(3, false).await.unwrap();
    assert_eq!((full.requests().len(), good.requests().len()), (1, 1));

    let recovering = Scripted::new(&[OVERLOADED, OVERLOADED, CREATED]).await;
    client(&[&recovering.url]).remove_member(3, false).await.unwrap();
    assert_eq!(recovering.requests().len(), 3);

    let full = Scripted::new(&[OVERLOADED]).await;
    let hurried = client(&[&full.url]).with_timeout(Duration::from_millis(400));
    let error = hurried.put(b"a", "1").await.unwrap_err();
    assert_eq!((error.code(), error.outcome()), (Some("overloaded"), Outcome::NotApplied));
}

#[tokio::test]
async fn a_mutation_without_a_key_that_came_too_late_is_unknown_and_not_sent_again() {
    let (late, good) = (Scripted::new(&[LATE]).await, Scripted::new(&[CREATED]).await);
    let error = client(&[&late.url, &good.url]).remove_member(3, false).await.unwrap_err();
    assert_eq!((error.code(), error.outcome()), (Some("timeout"), Outcome::Unknown));
    assert_eq!((late.requests().len(), good.requests().len()), (1, 0));
    // With a key the server sees to it that it happens once.
    client(&[&late.url, &good.url]).put(b"a", "1").await.unwrap();
    assert_eq!((late.requests().len(), good.requests().len()), (2, 1));
    assert_eq!(key_of(&late.requests()[1]), key_of(&good.requests()[0]));
}

#[tokio::test]
async fn a_refusal_after_a_lost_attempt_does_not_claim_that_nothing_happened() {
    let losing = Scripted::new(&[Step::Drop, QUOTA]).await;
    let error = client(&[&losing.url]).put(b"a", "1").await.unwrap_err();
    assert_eq!((error.code(), error.outcome()), (Some("quota_exceeded"), Outcome::Unknown));
    let quota = Scripted::new(&[QUOTA]).await;
    let error = client(&[&quota.url]).put(b"a", "1").await.unwrap_err();
    assert_eq!((error.outcome(), quota.requests().len()), (Outcome::NotApplied, 1));
}

#[tokio::test]
async fn the_deadline_bounds_all_attempts_together() {
    let busy = Scripted::new(&[NO_LEADER]).await;
    let hurried = client(&[&busy.url]).with_timeout(Duration::from_millis(400));
    let begun = std::time::Instant::now();
    let error = hurried.put(b"a", "1").await.unwrap_err();
    assert_eq!((error.code(), error.outcome()), (Some("no_leader"), Outcome::NotApplied));
    assert!(
        begun.elapsed() < Duration::from_secs(2) && busy.requests().len() > 1,
        "{}",
        busy.requests().len()
    );
    let hanging = Scripted::new(&[Step::Hang]).await;
    let hurried = client(&[&hanging.url]).with_timeout(Duration::from_millis(300));
    assert_eq!(hurried.put(b"a", "1").await.unwrap_err().outcome(), Outcome::Unknown);
    assert_eq!(hurried.get(b"a").await.unwrap_err().outcome(), Outcome::NotApplied);
}

#[tokio::test]
async fn a_member_that_hangs_does_not_use_up_the_deadline() {
    let (hanging, good) = (Scripted::new(&[Step::Hang]).await, Scripted::new(&[CREATED]).await);
    let client = client(&[&hanging.url, &good.url]).with_timeout(Duration::from_secs(20));
    let late = Scripted::new(&[LATE, CREATED]).await;
    assert_eq!(client.only(1).unwrap().put(b"a", "1").await.unwrap().revision, 7);
    assert_eq!(
        super::tests::client(&[&late.url]).put(b"a", "1").await.unwrap().revision,
        7,
        "a late answer is asked for again"
    );
    let begun = std::time::Instant::now();
    assert_eq!(client.put(b"a", "1").await.unwrap().revision, 7);
    assert!(begun.elapsed() < Duration::from_secs(15));
}

#[tokio::test]
async fn nobody_there_is_said_at_once() {
    let begun = std::time::Instant::now();
    let error = client(&[&nobody().await, &nobody().await]).put(b"a", "1").await.unwrap_err();
    assert!(
        matches!(error, ClientError::Unreachable(_)) && error.outcome() == Outcome::NotApplied,
        "{error:?}"
    );
    assert!(begun.elapsed() < Duration::from_secs(2));
}

#[tokio::test]
async fn requests_are_spelled_as_the_contract_wants() {
    let server = Scripted::new(&[Step::Answer(204, "metcd-revision: 7\r\n", "")]).await;
    let client = client(&[&server.url]).with_serializable_reads(true);
    client
        .put_with(
            b"..",
            "1",
            &super::PutOptions {
                condition: Condition::Revision(3),
                ..Default::default()
            },
        )
        .await
        .unwrap();
    client.delete(b"a/\xff", Condition::Exists).await.unwrap();
    let _ = client.get(b"a b").await;
    assert!(client.put(b"", "1").await.is_err(), "an empty key is never sent");
    let seen = server.requests();
    assert!(
        seen[0].starts_with("PUT /v1/kv/..?timeout=") && seen[0].contains("if-match: \"3\"\r\n"),
        "{}",
        seen[0]
    );
    assert!(
        seen[1].starts_with("DELETE /v1/kv/a%2F%FF?timeout=") && seen[1].contains("if-match: *\r\n"),
        "{}",
        seen[1]
    );
    assert!(
        seen[2].starts_with("GET /v1/kv/a%20b?consistency=serializable&timeout="),
        "{}",
        seen[2]
    );
    assert_eq!(seen.len(), 3);
}

#[tokio::test]
async fn a_list_that_breaks_off_is_an_error() {
    let cut = "{\"key\":\"a\",\"value\":\"1\",\"mod_revision\":2}\n";
    let server = Scripted::new(&[Step::Answer(200, "", cut)]).await;
    let mut scan = client(&[&server.url])
        .scan(&Range::Prefix(Vec::new()), &ListOptions::default())
        .await
        .unwrap();
    assert_eq!(scan.next().await.unwrap().unwrap().value, b"1");
    assert!(matches!(scan.next().await, Err(ClientError::Protocol(_))));
}

#[tokio::test]
async fn an_interruption_that_lasts_is_told_once() {
    const FIRST: &str = "{\"type\":\"open\",\"revision\":4}\n";
    const THEN: &str = "{\"type\":\"open\",\"revision\":4}\n{\"type\":\"change\",\"revision\":5,\"events\":[]}\n";
    let mut steps = vec![Step::Answer(200, "", FIRST)];
    // More than fit into the first attempt to go on, whatever the pauses between them come to.
    steps.resize(20, NO_LEADER);
    steps.push(Step::Answer(200, "", THEN));
    let server = Scripted::new(&steps).await;
    let mut watch = client(&[&server.url]).watch(WatchOptions::key(b"a")).await.unwrap();
    assert_eq!(watch.next().await.unwrap(), Message::Open { revision: 4 });
    let Message::Interrupted { why } = watch.next().await.unwrap() else {
        panic!("not told");
    };
    assert!(why.contains("no_leader"), "{why}");
    assert!(matches!(watch.next().await.unwrap(), Message::Change { revision: 5, .. }));
}

#[tokio::test]
async fn a_broken_watch_goes_on_where_it_stopped_and_compacted_history_ends_it() {
    const FIRST: &str =
        "{\"type\":\"open\",\"revision\":4}\n{\"type\":\"change\",\"revision\":5,\"events\":[]}\n{\"type\":\"change\",\"rev";
    const SECOND: &str = "{\"type\":\"open\",\"revision\":5}\n{\"type\":\"change\",\"revision\":6,\"events\":[]}\n\
                          {\"type\":\"error\",\"code\":\"shutting_down\",\"detail\":\"d\"}\n";
    const THIRD: &str = "{\"type\":\"error\",\"code\":\"compacted\",\"detail\":\"d\",\"compacted_revision\":9}\n";
    let server = Scripted::new(&[
        Step::Answer(200, "", FIRST),
        NO_LEADER,
        Step::Answer(200, "", SECOND),
        Step::Answer(200, "", THIRD),
    ])
    .await;
    let mut watch = client(&[&server.url]).watch(WatchOptions::key(b"a")).await.unwrap();
    assert_eq!(watch.next().await.unwrap(), Message::Open { revision: 4 });
    for revision in [5, 6] {
        assert_eq!(
            watch.next().await.unwrap(),
            Message::Change {
                revision,
                events: Vec::new()
            }
        );
    }
    let error = watch.next().await.unwrap_err();
    assert_eq!(
        (error.code(), error.problem().unwrap().compacted_revision),
        (Some("compacted"), Some(9))
    );
    let resumed: Vec<Option<String>> = server
        .requests()
        .iter()
        .map(|request| {
            request
                .lines()
                .find_map(|line| line.strip_prefix("last-event-id: "))
                .map(str::to_owned)
        })
        .collect();
    assert_eq!(resumed, [None, Some("5".to_owned()), Some("5".to_owned()), Some("6".to_owned())]);
}
