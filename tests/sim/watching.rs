//! Watches of clients: opened behind a barrier, polled now and then, resumed on another member when theirs dies. What they deliver is
//! compared with the history: ordered, unique, atomic, gap-free.

use std::task::Poll;

use metcd::state::StateReader;
use metcd::state::command::KeySpan;
use metcd::state::reader::ReadError;
use metcd::state::watch::{WatchFilter, Watcher};

use crate::node::Waiter;
use crate::oracle::history::{key_change, poll_watch};
use crate::plan::{MS, SECOND};
use crate::world::{Event, World};

/// A client that watches.
pub struct Watching {
    prefix: &'static str,
    slot: usize,
    boot: u64,
    open: Option<Watcher>,
    is_waiting: bool,
    /// Everything up to here was delivered; `None` before the first opening.
    pub position: Option<u64>,
    floor: u64,
}

/// Every change of every key.
pub fn everything() -> WatchFilter {
    filter("")
}

fn filter(prefix: &str) -> WatchFilter {
    WatchFilter {
        span: KeySpan::prefix(prefix.as_bytes()),
        puts: true,
        deletes: true,
        want_prev: false,
    }
}

impl World {
    pub fn add_watch(&mut self) {
        let prefixes = ["", "k", "b", "l"];
        let prefix = self.rng.pick(&prefixes).copied().unwrap_or("");
        let watch = self.watches.len();
        self.watches.push(Watching {
            prefix,
            slot: 0,
            boot: 0,
            open: None,
            is_waiting: false,
            position: None,
            floor: 0,
        });
        self.schedule(self.now + SECOND, Event::Watch { watch });
    }

    /// A client looks for news, or opens its watch somewhere.
    pub fn poll_watch(&mut self, watch: usize) {
        let at = self.now + self.rng.range(50 * MS, 800 * MS);
        self.schedule(at, Event::Watch { watch });
        let watching = &mut self.watches[watch];
        if watching.open.is_some() {
            if self.machines[watching.slot].is_paused {
                return;
            }
            if self.rng.chance(30) {
                // The client goes elsewhere.
                watching.open = None;
            } else {
                self.look(watch);
            }
        } else if !watching.is_waiting || self.machines[watching.slot].boot != watching.boot {
            self.reopen(watch);
        }
    }

    fn reopen(&mut self, watch: usize) {
        let Some(slot) = self.pick_live() else { return };
        let floor = self.oracle.floor();
        let boot = self.machines[slot].boot;
        let watching = &mut self.watches[watch];
        (watching.slot, watching.boot, watching.is_waiting) = (slot, boot, true);
        match watching.position {
            // A new watch begins at what is current: linearizable.
            None => {
                watching.floor = floor;
                self.with_process(slot, |process, world| {
                    if process.reader.applied_index() > 0 {
                        process.join_barrier(world, Waiter::Watch(watch));
                    }
                });
            }
            Some(position) => {
                let Some(reader) = self.machines[slot].process.as_ref().map(|process| process.reader.clone()) else {
                    return;
                };
                self.watches[watch].is_waiting = false;
                self.resume_watch(watch, &reader, position);
            }
        }
    }

    /// The barrier let the watch through.
    pub fn open_watch(&mut self, watch: usize, slot: usize, reader: &StateReader) {
        let watching = &mut self.watches[watch];
        if !watching.is_waiting || watching.slot != slot || watching.open.is_some() {
            return;
        }
        watching.is_waiting = false;
        let revision = reader.revision();
        let floor = watching.floor;
        if revision < floor {
            return self.violation(format!(
                "a watch opens after revision {revision}, though {floor} was known before it was asked for"
            ));
        }
        watching.position = Some(revision);
        self.resume_watch(watch, reader, revision);
    }

    fn resume_watch(&mut self, watch: usize, reader: &StateReader, after: u64) {
        let watching = &mut self.watches[watch];
        match reader.watch(filter(watching.prefix), after) {
            Ok(watcher) => watching.open = Some(watcher),
            // The member is behind: it says so, and the client tries elsewhere.
            Err(ReadError::FutureRevision { .. }) => {}
            Err(ReadError::Compacted { compacted_revision }) if after < compacted_revision => watching.position = None,
            Err(error) => self.violation(format!("a watch cannot be resumed after {after}: {error}")),
        }
    }

    fn look(&mut self, watch: usize) {
        loop {
            let watching = &mut self.watches[watch];
            let (Some(watcher), Some(position)) = (&mut watching.open, watching.position) else {
                return;
            };
            match poll_watch(watcher) {
                Poll::Pending => {
                    let seen = watcher.position();
                    let prefix = watching.prefix;
                    watching.position = Some(seen.max(position));
                    let missed = self.oracle.history.between(prefix, position, seen);
                    if !missed.is_empty() || seen < position {
                        self.violation(format!(
                            "a watch of {prefix:?} went from {position} to {seen} and skipped {missed:?}"
                        ));
                    }
                    return;
                }
                Poll::Ready(Ok(changes)) => {
                    let prefix = watching.prefix;
                    let until = changes.last().map_or(position, |change| change.revision);
                    let found: Vec<_> = changes
                        .iter()
                        .map(|change| (change.revision, change.events.iter().map(key_change).collect::<Vec<_>>()))
                        .collect();
                    watching.position = Some(until);
                    self.stats.watched += found.len() as u64;
                    let expected = self.oracle.history.between(prefix, position, until);
                    if found != expected {
                        let who = self.watches[watch].slot + 1;
                        self.violation(format!(
                            "a watch of {prefix:?} after {position} on n{who} delivered {found:?}, and the history has {expected:?}"
                        ));
                        return;
                    }
                }
                Poll::Ready(Err(ReadError::Compacted { .. })) => {
                    watching.open = None;
                    watching.position = None;
                    return;
                }
                Poll::Ready(Err(error)) => return self.violation(format!("a watch failed: {error}")),
            }
        }
    }

    pub fn close_watches_of(&mut self, slot: usize) {
        for watching in self.watches.iter_mut().filter(|watching| watching.slot == slot) {
            watching.open = None;
            watching.is_waiting = false;
        }
    }
}
