//! The way back: intake first, then what was taken in, then the threads. Leadership goes while requests in flight are still answered.
//!
//! What was taken in is waited for as long as it can still be carried out. When all members stop together, the last ones are left without
//! a quorum, and waiting would only hold up the end: so a stopping member looks at the others, and as soon as nothing can be committed
//! any more it answers with what it knows, `unknown` for what was handed to raft and `not_applied` for the rest.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use serde::Deserialize as _;
use tokio::task::{JoinError, JoinHandle};
use tokio::time::Instant;

use super::admission::MemberTable;
use super::peer_thread::PeerThread;
use crate::driver::{self, Event};
use crate::leader::LeaderService;
use crate::node::Shared;
use crate::transport::Transport;

/// Time for a leader to hand over.
const HAND_OVER_WITHIN: Duration = Duration::from_secs(3);
/// Between two looks at the other members.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// A member that does not answer a look within this time is taken for gone.
const LOOK_TIMEOUT: Duration = Duration::from_millis(500);
/// So many looks in a row must find that nothing can be committed.
const HOPELESS_LOOKS: u32 = 3;

/// What a look finds of another member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    Serving,
    Stopping,
    Gone,
}

/// The parts of a running member, to be ended.
pub(super) struct Running {
    pub shared: Arc<Shared>,
    pub leader: Arc<LeaderService>,
    pub transport: Transport,
    pub peer_server: JoinHandle<()>,
    pub threads: driver::Threads,
    pub peer_thread: PeerThread,
}

/// Ends everything in order.
pub(super) async fn shut_down(running: Running, mut client_server: JoinHandle<()>) {
    let Running {
        shared,
        leader,
        transport,
        peer_server,
        threads,
        peer_thread,
    } = running;
    shared.begin_stop();
    let others = Others {
        shared: &shared,
        transport: &transport,
    };
    let drained = async {
        others.hand_over(&leader).await;
        log_join((&mut client_server).await);
        // Leadership may have come (back) meanwhile.
        others.hand_over(&leader).await;
    };
    let is_hopeless = tokio::select! {
        () = drained => false,
        () = others.until_hopeless() => true,
    };
    if is_hopeless {
        tracing::info!("the other members are gone: nothing can be committed, and what waits for it is answered so");
        shared.give_up();
        if !client_server.is_finished() {
            log_join(client_server.await);
        }
    }
    shared.send(Event::Stop);
    threads.join().await;
    shared.close();
    log_join(peer_server.await);
    peer_thread.stop().await;
}

fn log_join(result: Result<(), JoinError>) {
    if let Err(error) = result {
        tracing::error!(%error, "a part of the server ended abnormally");
    }
}

/// The other members, as a stopping one sees them.
struct Others<'a> {
    shared: &'a Shared,
    transport: &'a Transport,
}

impl Others<'_> {
    /// Asks all other voters at once.
    async fn look(&self) -> BTreeMap<u64, Seen> {
        let voters = self.shared.view().voters;
        let members = self.shared.reader.members().into_iter();
        let others = members.filter(|member| member.id != self.shared.id && voters.contains(&member.id));
        join_all(others.map(async |member| (member.id, self.look_at(&member.peer_url).await)))
            .await
            .into_iter()
            .collect()
    }

    async fn look_at(&self, url: &str) -> Seen {
        let answer = self.transport.fetch_members(url, LOOK_TIMEOUT).await.ok();
        match answer.and_then(|answer| MemberTable::deserialize(answer).ok()) {
            Some(table) if table.stopping => Seen::Stopping,
            Some(_) => Seen::Serving,
            None => Seen::Gone,
        }
    }

    /// Gives leadership to a member that goes on, if this one leads and there is one.
    async fn hand_over(&self, leader: &LeaderService) {
        let deadline = Instant::now() + HAND_OVER_WITHIN;
        while Instant::now() < deadline && self.shared.leader() == Some(self.shared.id) {
            let seen = self.look().await;
            let candidates: Vec<u64> = seen
                .into_iter()
                .filter(|(_, seen)| *seen == Seen::Serving)
                .map(|(id, _)| id)
                .collect();
            if candidates.is_empty() {
                return;
            }
            tokio::select! {
                result = leader.hand_over(&candidates, deadline) => return match result {
                    Ok(()) => tracing::info!("handed leadership over"),
                    Err(error) => tracing::info!(%error, "could not hand leadership over; the others elect a leader"),
                },
                () = self.until_gone(&candidates) => {}
            }
        }
    }

    /// Until one of these is gone.
    async fn until_gone(&self, members: &[u64]) {
        loop {
            tokio::time::sleep(LOOK_INTERVAL).await;
            let seen = self.look().await;
            if members.iter().any(|id| seen.get(id) == Some(&Seen::Gone)) {
                return;
            }
        }
    }

    /// Until nothing can be committed any more, however long one waits.
    async fn until_hopeless(&self) {
        let mut hopeless_looks = 0;
        while hopeless_looks < HOPELESS_LOOKS {
            tokio::time::sleep(LOOK_INTERVAL).await;
            let seen = self.look().await;
            let view = self.shared.view();
            let can_commit = can_commit(self.shared.id, self.shared.leader(), &view.voters, &seen);
            hopeless_looks = if can_commit { 0 } else { hopeless_looks + 1 };
        }
    }
}

/// Whether a majority is there, with a leader or somebody who stays to become one. Two halves of a joint configuration are taken as
/// one: at worst, what could just have been committed is answered as unknown.
fn can_commit(own: u64, leader: Option<u64>, voters: &[u64], seen: &BTreeMap<u64, Seen>) -> bool {
    let is_there = |id: u64| id == own || seen.get(&id).is_some_and(|seen| *seen != Seen::Gone);
    let there = voters.iter().filter(|&&voter| is_there(voter)).count();
    let is_led = leader.is_some_and(is_there);
    let has_successor = seen.values().any(|seen| *seen == Seen::Serving);
    there > voters.len() / 2 && (is_led || has_successor)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(second: Seen, third: Seen) -> BTreeMap<u64, Seen> {
        BTreeMap::from([(2, second), (3, third)])
    }

    #[test]
    fn there_is_hope_while_a_majority_is_there_and_led_or_about_to_be() {
        use Seen::{Gone, Serving, Stopping};
        let voters = [1, 2, 3];
        for (leader, second, third, hope) in [
            (Some(1), Gone, Stopping, true),
            (Some(1), Gone, Gone, false),
            (Some(2), Stopping, Gone, true),
            (Some(2), Gone, Serving, true),
            (Some(2), Gone, Stopping, false),
            (None, Stopping, Stopping, false),
            (None, Serving, Gone, true),
        ] {
            assert_eq!(
                can_commit(1, leader, &voters, &seen(second, third)),
                hope,
                "{leader:?} {second:?} {third:?}"
            );
        }
        assert!(can_commit(1, Some(1), &[1], &BTreeMap::new()), "a sole voter needs nobody");
        assert!(
            !can_commit(4, Some(2), &voters, &seen(Stopping, Gone)),
            "a learner is no part of the majority"
        );
    }
}
