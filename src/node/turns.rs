//! What a thread is at, for whoever looks whether it still comes forward.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counts what one thread begins with, and that it is done with everything: odd while it is at something.
#[derive(Debug, Default)]
pub(crate) struct Turns(AtomicU64);

impl Turns {
    /// The thread begins with something. Only that thread calls this.
    pub(crate) fn begin(&self) {
        self.0.store((self.0.load(Ordering::Relaxed) + 1) | 1, Ordering::Relaxed);
    }

    /// The thread has nothing more to do. Only that thread calls this.
    pub(crate) fn end(&self) {
        self.0.store((self.0.load(Ordering::Relaxed) | 1) + 1, Ordering::Relaxed);
    }

    /// What the thread is at, as a number that is never the same for two things; `None` while it has nothing to do.
    pub(crate) fn current(&self) -> Option<u64> {
        let turns = self.0.load(Ordering::Relaxed);
        (turns % 2 == 1).then_some(turns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_beginning_has_a_number_of_its_own_and_an_end_has_none() {
        let turns = Turns::default();
        let mut seen = Vec::new();
        for _ in 0..3 {
            assert_eq!(turns.current(), None);
            turns.begin();
            seen.push(turns.current());
            turns.begin();
            seen.push(turns.current());
            turns.end();
            turns.end();
        }
        let numbers: std::collections::BTreeSet<u64> = seen.iter().copied().flatten().collect();
        assert_eq!(numbers.len(), seen.len(), "{seen:?}");
    }
}
