//! One page: neighbouring records of a table, packed into a single allocation in key order.
//!
//! A record is `key length (u16) | value length (u16) | key | value`, little endian. A value too long to be packed lies in the
//! table's [`Slab`](super::table::Slab), and the record holds its slot (u32) instead.

use std::cmp::Ordering;

/// Longest value that is packed into a page. Longer ones are shared, never copied.
pub(super) const MAX_PACKED_VALUE: usize = 1024;
/// Room of a page; it is split when a record does not fit. Small enough that moving half of it takes a fraction of a microsecond.
/// All pages being allocated at this size, they use each other's holes in the heap: with pages that grew as needed a load of a million
/// records took 10 % more.
pub(super) const MAX_PAGE: usize = 16 * 1024;
/// A page below this looks for a neighbour to join.
pub(super) const MIN_PAGE: usize = MAX_PAGE * 3 / 8;
/// Two neighbours join if they fit in this: below the maximum, so that the next insert does not split them again.
const MAX_JOINED: usize = MAX_PAGE * 3 / 4;

const HEADER: usize = 4;
/// Value length of a record whose value lies in the slab.
const IN_SLAB: u16 = u16::MAX;
/// A page that removals left with more unused room than this gives it back.
const MAX_SLACK: usize = MAX_PAGE / 2;

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
    /// A u16 is enough: what does not fit splits a page first, so that even with the longest keys one stays below 54 KiB.
    starts: Vec<u16>,
}

impl Page {
    /// Whether a record fits; an empty page takes any.
    pub(super) fn has_room_for(&self, key: &[u8], value: Stored<'_>) -> bool {
        self.len() == 0 || self.size() + record_len(key, value) <= MAX_PAGE
    }

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

    /// Inserts a record in front of record `i`.
    pub(super) fn insert(&mut self, i: usize, key: &[u8], stored: Stored<'_>) {
        let start = self.start(i);
        let slot;
        let (value_len, value) = match stored {
            Stored::Packed(bytes) => (bytes.len() as u16, bytes),
            Stored::Slot(n) => {
                slot = n.to_le_bytes();
                (IN_SLAB, slot.as_slice())
            }
        };
        let len = record_len(key, stored);
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
        if self.bytes.capacity() - self.bytes.len() > MAX_SLACK {
            self.bytes.shrink_to(self.bytes.len().next_multiple_of(MAX_SLACK / 4));
            self.starts.shrink_to_fit();
        }
    }

    /// Moves the upper half of the records to a new page; a page of one record stays whole. Returns how many stay.
    pub(super) fn split(&mut self) -> (usize, Page) {
        let half = self.bytes.len() / 2;
        let at = self
            .starts
            .partition_point(|start| usize::from(*start) < half)
            .min(self.len().saturating_sub(1))
            .max(1);
        let cut = self.start(at);
        let mut right = Page::default();
        right.reserve(self.bytes.len() - cut);
        right.bytes.extend_from_slice(&self.bytes[cut..]);
        right.starts = self.starts[at..].iter().map(|start| start - cut as u16).collect();
        self.bytes.truncate(cut);
        self.starts.truncate(at);
        (at, right)
    }

    /// Whether this page and its neighbour are small enough to become one.
    pub(super) fn can_join(&self, neighbour: &Page) -> bool {
        self.size() + neighbour.size() <= MAX_JOINED
    }

    /// Takes over the records of the next page.
    pub(super) fn join(&mut self, next: Page) {
        let base = self.bytes.len() as u16;
        self.reserve(next.bytes.len());
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
        self.reserve(len);
        self.bytes.resize(old_len + len, 0);
        self.bytes.copy_within(at..old_len, at + len);
    }

    fn reserve(&mut self, additional: usize) {
        let needed = self.bytes.len() + additional;
        if self.bytes.capacity() < needed {
            self.bytes.reserve_exact(needed.max(MAX_PAGE) - self.bytes.len());
        }
    }
}

fn record_len(key: &[u8], value: Stored<'_>) -> usize {
    let value_len = match value {
        Stored::Packed(bytes) => bytes.len(),
        Stored::Slot(_) => size_of::<u32>(),
    };
    HEADER + key.len() + value_len
}
