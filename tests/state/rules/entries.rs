//! Entries that are none of this build's, or none at all.

use super::*;

#[test]
fn an_entry_of_a_newer_feature_level_stops_the_node() {
    let mut node = Node::new();
    let newer = EntryPayload {
        feature_level: FEATURE_LEVEL + 1,
        ..payload(1, 1, 1, Vec::new())
    };
    let error = node.state.apply(&[entry(2, 1, &newer)]).unwrap_err();
    assert!(matches!(error, StateError::TooNew { index: 2, level, own } if level == own + 1));
}

#[test]
fn a_hole_in_the_log_stops_the_node() {
    let mut node = Node::new();
    assert!(matches!(
        node.state.apply(&[entry(3, 1, &payload(1, 1, 1, Vec::new()))]),
        Err(StateError::Corrupt(_))
    ));
}

#[test]
fn an_entry_that_cannot_be_decoded_stops_the_node_without_a_panic() {
    let mut node = Node::new();
    let mut damaged = entry(2, 1, &payload(1, 1, 1, Vec::new()));
    damaged.data = Bytes::from_static(b"\xff\xff\xff");
    assert!(matches!(node.state.apply(&[damaged]), Err(StateError::Corrupt(_))));
}

#[test]
fn an_empty_entry_moves_the_applied_index_only() {
    let mut node = Node::new();
    let mut empty = Entry::default();
    (empty.index, empty.term) = (2, 9);
    assert_eq!(node.state.apply(&[empty]).unwrap(), []);
    let applied = node.reader().applied();
    assert_eq!((applied.index, applied.term, node.reader().revision()), (2, 9, 1));
}

#[tokio::test]
async fn waiters_are_woken_when_their_index_and_revision_are_applied() {
    let mut node = Node::new();
    let reader = node.reader();
    let waiting = tokio::spawn(async move {
        reader.wait_applied(3).await;
        reader.wait_revision(3).await;
        (reader.applied_index(), reader.revision())
    });
    tokio::task::yield_now().await;
    node.put(b"a", b"1");
    tokio::task::yield_now().await;
    assert!(!waiting.is_finished());
    node.put(b"a", b"2");
    let (applied, revision) = tokio::time::timeout(std::time::Duration::from_secs(10), waiting)
        .await
        .unwrap()
        .unwrap();
    assert!(applied >= 3 && revision >= 3);
}
