//! How many bytes of the log lie where: an entry may carry one command or a thousand, so a bound in entries alone bounds nothing.

use std::collections::VecDeque;

use raft::eraftpb::Entry;

/// What an entry costs besides its data.
const ENTRY_OVERHEAD: u64 = 64;

/// Sizes of the entries appended since the start, by index.
#[derive(Debug, Default)]
pub(super) struct LogSize {
    sizes: VecDeque<(u64, u64)>,
}

impl LogSize {
    /// Entries are appended; what they overwrite is gone.
    pub(super) fn note(&mut self, entries: &[Entry]) {
        let Some(first) = entries.first() else { return };
        while self.sizes.back().is_some_and(|&(index, _)| index >= first.index) {
            self.sizes.pop_back();
        }
        let sized = entries.iter().map(|entry| (entry.index, entry.data.len() as u64 + ENTRY_OVERHEAD));
        self.sizes.extend(sized);
    }

    /// Entries up to `index` are removed from the log.
    pub(super) fn forget(&mut self, index: u64) {
        while self.sizes.front().is_some_and(|&(front, _)| front <= index) {
            self.sizes.pop_front();
        }
    }

    /// Bytes after `index`.
    pub(super) fn bytes_after(&self, index: u64) -> u64 {
        self.sizes
            .iter()
            .rev()
            .take_while(|&&(at, _)| at > index)
            .map(|&(_, size)| size)
            .sum()
    }

    /// The lowest index after which, up to `index`, lie at most `max_bytes`.
    pub(super) fn keep_after(&self, index: u64, max_bytes: u64) -> u64 {
        let mut bytes = 0;
        for &(at, size) in self.sizes.iter().rev().filter(|&&(at, _)| at <= index) {
            bytes += size;
            if bytes > max_bytes {
                return at;
            }
        }
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(index: u64, bytes: usize) -> Entry {
        Entry {
            index,
            data: vec![0; bytes - ENTRY_OVERHEAD as usize].into(),
            ..Default::default()
        }
    }

    #[test]
    fn the_log_kept_behind_a_snapshot_is_bounded_in_bytes() {
        let mut size = LogSize::default();
        size.note(&(1..=10).map(|index| entry(index, 100)).collect::<Vec<_>>());
        assert_eq!(size.bytes_after(7), 300);
        assert_eq!(size.keep_after(8, 250), 6);
        assert_eq!(size.keep_after(8, 10_000), 0);
        size.forget(4);
        assert_eq!(size.bytes_after(0), 600);
    }

    #[test]
    fn what_is_overwritten_does_not_count() {
        let mut size = LogSize::default();
        size.note(&[entry(1, 100), entry(2, 100), entry(3, 100)]);
        size.note(&[entry(2, 200)]);
        assert_eq!(size.bytes_after(0), 300);
    }
}
