//! One page: neighbouring records of a table, packed into a single allocation in key order.
//!
//! A record is `key length (u16) | value length (u16) | key | value`, little endian. A value too long to be packed lies in the
//! table's [`Slab`](super::table::Slab), and the record holds its slot (u32) instead.

use std::cmp::Ordering;

/// Longest value that is packed into a page. Longer ones are shared, never copied.
pub(super) const MAX_PACKED_VALUE: usize = 1024;
/// A page above this is split. Small enough that moving half of it is a matter of 100 ns.
pub(super) const MAX_PAGE: usize = 8 * 1024;
/// A page below this looks for a neighbour to join.
pub(super) const MIN_PAGE: usize = MAX_PAGE / 4;
/// Two neighbours join if they fit in this: well below the maximum, so that the next insert does not split them again.
const MAX_JOINED: usize = MAX_PAGE / 2;

const HEADER: usize = 4;
/// Value length of a record whose value lies in the slab.
const IN_SLAB: u16 = u16::MAX;
/// Pages grow in steps: few reallocations against little slack.
const GROWTH_STEP: usize = 512;

/// A value as a page holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stored<'a> {
    /// The bytes themselves, at most [`MAX_PACKED_VALUE`].
    Packed(&'a [u8]),
    /// A slot of the slab.
    Slot(u32),
}

/// See the module. *Invariant*: `starts` are the offsets of whole records in `bytes`, ascending, and so are their keys.
#[derive(Debug, Default)]
pub(super) struct Page {
    bytes: Vec<u8>,
    starts: Vec<u16>,
}

impl Page {
    /// Number of records.
    pub(super) fn len(&self) -> usize {
        self.starts.len()
    }

    /// Bytes of all records.
    pub(super) fn size(&self) -> usize {
        self.bytes.len()
    }

    /// Heap held, without the allocator's own overhead.
    pub(super) fn heap(&self) -> usize {
        self.bytes.capacity() + self.starts.capacity() * size_of::<u16>()
    }

    /// Key and value of record `i`.
    pub(super) fn record(&self, i: usize) -> (&[u8], Stored<'_>) {
        let record = &self.bytes[usize::from(self.starts[i])..];
        let key_len = usize::from(u16::from_le_bytes([record[0], record[1]]));
        let value_len = u16::from_le_bytes([record[2], record[3]]);
        let (key, rest) = record[HEADER..].split_at(key_len);
        let value = match value_len {
            IN_SLAB => Stored::Slot(u32::from_le_bytes([rest[0], rest[1], rest[2], rest[3]])),
            len => Stored::Packed(&rest[..usize::from(len)]),
        };
        (key, value)
    }

    /// The key of record `i`.
    pub(super) fn key(&self, i: usize) -> &[u8] {
        self.record(i).0
    }

    /// Where `key` is (`Ok`), or where it would have to be inserted (`Err`).
    pub(super) fn search(&self, key: &[u8]) -> Result<usize, usize> {
        let (mut low, mut high) = (0, self.len());
        while low < high {
            let middle = low.midpoint(high);
            match self.key(middle).cmp(key) {
                Ordering::Less => low = middle + 1,
                Ordering::Equal => return Ok(middle),
                Ordering::Greater => high = middle,
            }
        }
        Err(low)
    }

    /// Inserts a record in front of record `i`. The page may be above [`MAX_PAGE`] afterwards, by one record: the caller splits it.
    pub(super) fn insert(&mut self, i: usize, key: &[u8], value: Stored<'_>) {
        let start = self.start(i);
        let slot;
        let (value_len, value) = match value {
            Stored::Packed(bytes) => (bytes.len() as u16, bytes),
            Stored::Slot(n) => {
                slot = n.to_le_bytes();
                (IN_SLAB, slot.as_slice())
            }
        };
        let len = HEADER + key.len() + value.len();
        self.open_gap(start, len);
        let mut at = start;
        for part in [&(key.len() as u16).to_le_bytes()[..], &value_len.to_le_bytes(), key, value] {
            self.bytes[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        }
        for later in &mut self.starts[i..] {
            *later += len as u16;
        }
        if self.starts.len() == self.starts.capacity() {
            self.starts.reserve_exact((self.starts.len() / 4).max(8));
        }
        self.starts.insert(i, start as u16);
    }

    /// Removes record `i` and gives memory back when much of it is unused.
    pub(super) fn remove(&mut self, i: usize) {
        let (start, end) = (self.start(i), self.start(i + 1));
        self.bytes.drain(start..end);
        self.starts.remove(i);
        for later in &mut self.starts[i..] {
            *later -= (end - start) as u16;
        }
        if self.bytes.capacity() - self.bytes.len() > (2 * GROWTH_STEP).max(self.bytes.len() / 4) {
            self.trim();
        }
    }

    /// Moves the records from `i` on to a new page.
    pub(super) fn split_off(&mut self, i: usize) -> Page {
        let cut = self.start(i);
        let right = Page { bytes: self.bytes[cut..].to_vec(), starts: self.starts[i..].iter().map(|start| start - cut as u16).collect() };
        self.bytes.truncate(cut);
        self.starts.truncate(i);
        self.trim();
        right
    }

    /// Where to split a page that grew too large by an insert at `inserted`: behind the others if the keys come in ascending order
    /// (history does), so that full pages stay full; otherwise in the middle.
    pub(super) fn split_point(&self, inserted: usize) -> usize {
        let last = self.len() - 1;
        if inserted == last {
            return last;
        }
        let half = self.bytes.len() / 2;
        self.starts.partition_point(|start| usize::from(*start) < half).clamp(1, last)
    }

    /// Whether this page and its neighbour are small enough to become one.
    pub(super) fn can_join(&self, neighbour: &Page) -> bool {
        self.size() + neighbour.size() <= MAX_JOINED
    }

    /// Takes over the records of the next page.
    pub(super) fn join(&mut self, next: Page) {
        let base = self.bytes.len() as u16;
        self.bytes.reserve_exact(next.bytes.len());
        self.bytes.extend_from_slice(&next.bytes);
        self.starts.reserve_exact(next.starts.len());
        self.starts.extend(next.starts.iter().map(|start| start + base));
    }

    /// Offset of record `i`, or of the end.
    fn start(&self, i: usize) -> usize {
        self.starts.get(i).map_or(self.bytes.len(), |start| usize::from(*start))
    }

    fn open_gap(&mut self, at: usize, len: usize) {
        let old_len = self.bytes.len();
        if self.bytes.capacity() < old_len + len {
            self.bytes.reserve_exact((old_len + len).next_multiple_of(GROWTH_STEP) - old_len);
        }
        self.bytes.resize(old_len + len, 0);
        self.bytes.copy_within(at..old_len, at + len);
    }

    fn trim(&mut self) {
        self.bytes.shrink_to_fit();
        self.starts.shrink_to_fit();
    }
}
