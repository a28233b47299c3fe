//! Watches: ordered, unique, atomic, gap-free, resumable (rule 29).

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use metcd::state::StateError;
use metcd::state::command::{Body, Compact, KeySpan};
use metcd::state::reader::{RangeQuery, ReadError};
use metcd::state::watch::{EventKind, WatchFilter};

use crate::support::{Node, all_keys, command, delete, delete_prefix, drain, everything, payload, put};

fn prefix(prefix: &[u8]) -> WatchFilter {
    WatchFilter {
        span: KeySpan::prefix(prefix),
        ..everything(false)
    }
}

fn revisions(changes: &[metcd::state::watch::Change]) -> Vec<u64> {
    changes.iter().map(|change| change.revision).collect()
}

/// Puts `count` keys in one entry.
fn put_many(node: &mut Node, key: &[u8], count: u64) {
    let commands = (0..count)
        .map(|n| command(node.seq + n, Body::Put(put(key, &n.to_be_bytes()))))
        .collect();
    let low_water = node.seq;
    node.seq += count;
    node.apply(&payload(1, 1, low_water, commands));
}

#[test]
fn a_watch_delivers_what_comes_after_its_revision_and_nothing_twice() {
    let mut node = Node::new();
    node.put(b"a", b"1");
    let mut watcher = node.reader().watch(everything(false), 1).unwrap();
    node.put(b"a", b"2");
    assert_eq!(revisions(&drain(&mut watcher)), [2, 3]);
    assert_eq!(revisions(&drain(&mut watcher)), [] as [u64; 0]);
    assert!(matches!(
        node.reader().watch(everything(false), 4),
        Err(ReadError::FutureRevision { revision: 4, current: 3 })
    ));
}

#[test]
fn all_changes_of_one_revision_come_as_one() {
    let mut node = Node::new();
    (b'a'..=b'e').for_each(|key| drop(node.put(&[key], b"1")));
    let mut watcher = node.reader().watch(everything(true), 6).unwrap();
    node.run(delete_prefix(b""));
    let changes = drain(&mut watcher);
    assert_eq!((changes.len(), changes[0].events.len()), (1, 5));
    assert!(
        changes[0]
            .events
            .iter()
            .all(|event| event.kind == EventKind::Delete && event.prev.as_ref().unwrap().value == "1")
    );
}

#[test]
fn a_filter_passes_only_what_it_names() {
    let mut node = Node::new();
    let reader = node.reader();
    let mut puts = reader
        .watch(
            WatchFilter {
                deletes: false,
                ..everything(false)
            },
            1,
        )
        .unwrap();
    let mut deletes = reader
        .watch(
            WatchFilter {
                puts: false,
                ..everything(false)
            },
            1,
        )
        .unwrap();
    let mut single = reader
        .watch(
            WatchFilter {
                span: KeySpan::single(b"a"),
                ..everything(false)
            },
            1,
        )
        .unwrap();
    let span = KeySpan {
        start: "b".into(),
        end: Some("d".into()),
    };
    let mut range = reader.watch(WatchFilter { span, ..everything(false) }, 1).unwrap();
    for key in [&b"a"[..], b"a\0", b"b", b"c", b"d"] {
        node.put(key, b"1");
    }
    node.run(delete(b"a"));
    assert_eq!(revisions(&drain(&mut puts)), [2, 3, 4, 5, 6]);
    assert_eq!(revisions(&drain(&mut deletes)), [7]);
    assert_eq!(revisions(&drain(&mut single)), [2, 7]);
    assert_eq!(revisions(&drain(&mut range)), [4, 5]);
    assert!([&puts, &deletes, &single, &range].iter().all(|watcher| watcher.position() == 7));
}

#[test]
fn the_position_of_an_idle_watch_follows_other_changes_and_a_pending_change_holds_it() {
    let mut node = Node::new();
    let mut watcher = node.reader().watch(prefix(b"mine/"), 1).unwrap();
    node.put(b"other", b"1");
    assert!(watcher.next().now_or_never().is_none());
    node.put(b"other", b"2");
    assert_eq!(watcher.position(), 3);
    node.put(b"mine/a", b"1");
    node.put(b"other", b"3");
    assert_eq!(watcher.position(), 3);
    assert_eq!(revisions(&drain(&mut watcher)), [4]);
    assert_eq!(watcher.position(), 5);
}

#[test]
fn an_idle_watch_is_not_hurt_by_the_compaction_of_what_it_did_not_want() {
    let mut node = Node::new();
    let mut watcher = node.reader().watch(prefix(b"mine/"), 1).unwrap();
    put_many(&mut node, b"other", 100);
    node.run(Body::Compact(Compact { revision: 90 }));
    node.collect_all_garbage();
    node.put(b"mine/a", b"1");
    assert_eq!(revisions(&drain(&mut watcher)), [102]);
}

#[test]
fn a_watch_that_fell_far_behind_reads_every_change_from_history() {
    let mut node = Node::new();
    let mut watcher = node.reader().watch(prefix(b"mine"), 1).unwrap();
    for _ in 0..20 {
        put_many(&mut node, b"mine", 1000);
        put_many(&mut node, b"other", 500);
    }
    let seen = revisions(&drain(&mut watcher));
    let expected: Vec<u64> = (0..20).flat_map(|round| (0..1000).map(move |n| 2 + round * 1500 + n)).collect();
    assert_eq!(seen, expected);
    assert_eq!(watcher.position(), node.reader().revision());
}

#[test]
fn a_watch_behind_the_compacted_revision_is_told() {
    let mut node = Node::new();
    let mut behind = node.reader().watch(everything(false), 1).unwrap();
    put_many(&mut node, b"a", 2000);
    node.run(Body::Compact(Compact { revision: 1900 }));
    node.collect_all_garbage();
    let refused = behind.next().now_or_never().unwrap();
    assert!(matches!(refused, Err(ReadError::Compacted { compacted_revision: 1900 })));
    assert!(matches!(
        node.reader().watch(everything(false), 1899),
        Err(ReadError::Compacted { .. })
    ));
    let mut at = node.reader().watch(everything(false), 1900).unwrap();
    assert_eq!(drain(&mut at).len(), 101);
}

#[test]
fn watchers_of_the_same_events_share_them_and_their_encoding() {
    let mut node = Node::new();
    let reader = node.reader();
    let mut watchers = [reader.watch(prefix(b"a"), 1).unwrap(), reader.watch(everything(false), 1).unwrap()];
    node.put(b"a", b"1");
    let [first, second] = watchers.each_mut().map(|watcher| drain(watcher).pop().unwrap());
    assert!(Arc::ptr_eq(&first.events, &second.events));
    first.encoded.json_line.set("encoded once".into()).unwrap();
    assert_eq!(second.encoded.json_line.get().unwrap(), "encoded once");
}

#[test]
fn a_watch_survives_the_installation_of_a_snapshot_that_still_has_its_history() {
    let mut node = Node::new();
    let mut watcher = node.reader().watch(everything(false), 1).unwrap();
    let mut leader = Node::new();
    put_many(&mut leader, b"a", 10);
    node.store.clear().unwrap();
    let mut batch = metcd::store::WriteBatch::default();
    leader
        .records()
        .into_iter()
        .for_each(|record| batch.put(record.table, record.key, record.value));
    node.store.write(batch).unwrap();
    node.state.reload().unwrap();
    assert_eq!(revisions(&drain(&mut watcher)), (2..=11).collect::<Vec<_>>());
    node.seq = leader.seq;
    put_many(&mut node, b"b", 1);
    assert_eq!(revisions(&drain(&mut watcher)), [12]);
}

/// What is read while a snapshot takes the state's place is of neither: it is an error, and never a shorter whole.
#[test]
fn nothing_is_read_of_a_store_that_is_emptied_for_a_snapshot() {
    let mut leader = Node::new();
    put_many(&mut leader, b"a", 2000);
    let records = leader.records();
    let mut node = Node::new();
    put_many(&mut node, b"a", 2000);
    let reader = node.reader();
    // It has to read history: more than is in memory.
    let mut behind = reader.watch(everything(false), 1).unwrap();
    let pin = reader.pin(Some(1000)).unwrap();
    let mut backup = node.state.snapshot_view();
    backup.next_records(1).unwrap();
    let whole = RangeQuery {
        revision: Some(1000),
        limit: 10,
        ..all_keys()
    };
    assert!(reader.range(&whole).is_ok());

    node.state.begin_replacement();
    let is_replaced = |error: ReadError| matches!(error, ReadError::State(StateError::Replaced));
    let mut assert_unread = || {
        assert_eq!(drain(&mut behind), []);
        assert!(is_replaced(reader.range(&whole).unwrap_err()));
        assert!(is_replaced(reader.get(b"a", None).unwrap_err()));
        assert!(is_replaced(reader.pin(None).unwrap_err()));
        assert!(is_replaced(reader.recompute_hash(2000).unwrap_err()));
        assert!(matches!(backup.next_records(1), Err(StateError::Replaced)));
    };
    assert_unread();
    node.store.clear().unwrap();
    assert_unread();
    for some in records.chunks(500) {
        let mut batch = metcd::store::WriteBatch::default();
        some.iter()
            .for_each(|record| batch.put(record.table, record.key.clone(), record.value.clone()));
        node.store.write(batch).unwrap();
        assert_unread();
    }
    node.state.reload().unwrap();

    assert_eq!(
        revisions(&drain(&mut behind)),
        (2..=2001).collect::<Vec<_>>(),
        "the same revisions, all of them, once"
    );
    assert!(reader.range(&whole).is_ok() && reader.get(b"a", None).is_ok());
    assert!(matches!(backup.next_records(1), Err(StateError::Replaced)), "its moment is gone");
    assert!(matches!(backup.fork().next_records(1), Err(StateError::Replaced)));
    // What was pinned before holds nothing now, and lets go of nothing either.
    let newer = reader.pin(Some(1000)).unwrap();
    drop(pin);
    node.seq = leader.seq;
    let low_water = node.seq;
    node.apply(&payload(
        1,
        1,
        low_water,
        vec![command(low_water, Body::Compact(Compact { revision: 1500 }))],
    ));
    assert!(reader.range(&whole).is_ok(), "held by the newer pin");
    drop(newer);
    assert!(matches!(reader.range(&whole), Err(ReadError::Compacted { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watchers_on_other_threads_see_every_revision_once_while_the_state_goes_on() {
    const ENTRIES: u64 = 300;
    let mut node = Node::new();
    let last = 1 + ENTRIES * 5;
    let follow = |mut watcher: metcd::state::watch::Watcher| async move {
        let mut seen = Vec::new();
        while seen.last() != Some(&last) {
            // Dropping the future at any point loses nothing.
            match tokio::time::timeout(Duration::from_micros(50), watcher.next()).await {
                Ok(changes) => seen.extend(changes.unwrap().iter().map(|change| change.revision)),
                Err(_) => tokio::task::yield_now().await,
            }
        }
        seen
    };
    let watchers: Vec<_> = (0..8)
        .map(|_| tokio::spawn(follow(node.reader().watch(prefix(b"a"), 1).unwrap())))
        .collect();
    let node = tokio::task::spawn_blocking(move || {
        (0..ENTRIES).for_each(|_| put_many(&mut node, b"a", 5));
        node
    });
    for watcher in watchers {
        let seen = tokio::time::timeout(Duration::from_secs(60), watcher).await.unwrap().unwrap();
        assert_eq!(seen, (2..=last).collect::<Vec<_>>());
    }
    drop(node.await.unwrap());
}
