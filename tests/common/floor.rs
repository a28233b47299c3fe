//! Revisions agree with real time: whatever begins after an answer has shown a revision comes after it.

#[derive(Default)]
pub struct Floor(u64);

impl Floor {
    /// The highest revision that an answer has shown so far.
    pub fn known(&self) -> u64 {
        self.0
    }

    /// A linearizable answer showed this revision; the request began when `floor` was known. A change makes a revision above it.
    pub fn note(&mut self, revision: u64, floor: u64, is_change: bool, what: &str) -> Result<(), String> {
        self.0 = self.0.max(revision);
        let is_late = if is_change { revision <= floor } else { revision < floor };
        if is_late {
            return Err(format!(
                "{what} answered with revision {revision}, though {floor} was known before it began"
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_from_before_what_was_known_is_refused() {
        let mut floor = Floor::default();
        assert_eq!(floor.note(7, 0, true, "a write"), Ok(()));
        assert_eq!(floor.known(), 7);
        assert_eq!(floor.note(7, 7, false, "a read"), Ok(()));
        assert!(floor.note(6, 7, false, "a read").is_err());
        assert!(floor.note(7, 7, true, "a write").is_err());
        assert_eq!(floor.note(6, 5, true, "a write that overlapped"), Ok(()));
        assert_eq!(floor.known(), 7);
    }
}
