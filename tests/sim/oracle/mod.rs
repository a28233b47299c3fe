//! What must hold, whatever happens. Each oracle is small and knows nothing of how the product achieves it.

pub mod deletes;
pub mod history;
pub mod lease;
pub mod raft;
pub mod state;

use std::collections::BTreeSet;

use crate::common::floor::Floor;
pub use crate::common::linear;
use crate::plan::Micros;

/// All oracles of a run.
#[derive(Default)]
pub struct Oracle {
    pub raft: raft::RaftOracle,
    pub state: state::StateOracle,
    pub history: history::History,
    pub deletes: deletes::Deletes,
    pub lease: lease::LeaseOracle,
    pub linear: linear::Linear,
    /// Members that somebody asked to remove.
    pub removals: BTreeSet<u64>,
    floor: Floor,
    fault: Option<String>,
}

impl Oracle {
    pub fn fault(&mut self, what: String) {
        self.fault.get_or_insert(what);
    }

    pub fn take_fault(&mut self) -> Option<String> {
        self.fault
            .take()
            .or_else(|| self.state.take_fault())
            .or_else(|| self.lease.take_fault())
    }

    /// The highest revision that an answer has shown so far: whatever begins now comes after it.
    pub fn floor(&self) -> u64 {
        self.floor.known()
    }

    /// A linearizable answer showed this revision; the request began when `floor` was known. A change makes a revision above it.
    pub fn note_revision(&mut self, revision: u64, floor: u64, is_change: bool, what: &str) {
        if let Err(late) = self.floor.note(revision, floor, is_change, what) {
            self.fault(late);
        }
    }

    /// Everything that can only be seen at the end.
    pub fn check_end(&mut self) -> Result<linear::Checked, String> {
        self.history.check_end()?;
        self.deletes.check_end(&self.history)?;
        self.lease.check_end()?;
        self.linear.check()
    }
}

/// Milliseconds as a text.
pub fn at(time: Micros) -> String {
    format!("{:.6} s", time as f64 / 1e6)
}
