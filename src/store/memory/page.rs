//! One page: neighbouring records of a table, packed into a single allocation in key order.
//!
//! A record is `key length (u16) | value length (u16) | key | value`, little endian. A value too long to be packed lies in the
//! table's [`Slab`](super::table::Slab), and the record holds its slot (u32) instead.

use std::cmp::Ordering;

/// Longest value that is packed into a page. Longer ones are shared, never copied.
pub(super) const MAX_PACKED_VALUE: usize = 1024;

const HEADER: usize = 4;
/// Value length of a record whose value lies in the slab.
const IN_SLAB: u16 = u16::MAX;

/// A value as a page holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stored<'a> {
    /// The bytes themselves, at most [`MAX_PACKED_VALUE`].
    Packed(&'a [u8]),
    /// A slot of the slab.
    Slot(u32),
}

/// See the module. *Invariant*: `starts` are the offsets of whole records in `bytes`, ascending, and so are their keys.
#[derive(Debug)]
pub(super) struct Page {
    bytes: Vec<u8>,
    /// A u16 is enough: what does not fit splits a page first, so that even with the longest keys one stays below 54 KiB.
    starts: Vec<u16>,
    /// Bytes of records that it is allocated for, at most 16 KiB; it is split when a record does not fit. All pages of a table being allocated
    /// at this size, they use each other's holes in the heap: with pages that grew as needed a load of a million records took 10 % more.
    room: u16,
}

impl Page {
    /// An empty one.
    pub(super) fn new(room: u16) -> Page {
        Page {
            bytes: Vec::new(),
            starts: Vec::new(),
            room,
        }
    }

    /// An empty one for the same table.
    pub(super) fn successor(&self) -> Page {
        Page::new(self.room)
    }

    fn room(&self) -> usize {
        usize::from(self.room)
    }

    /// Whether a record fits; an empty page takes any.
    pub(super) fn has_room_for(&self, key: &[u8], value: Stored<'_>) -> bool {
        self.len() == 0 || self.size() + record_len(key, value) <= self.room()
    }

    /// Whether so little is in it that it should join a neighbour.
    pub(super) fn is_sparse(&self) -> bool {
        self.size() < self.room() * 3 / 8
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
        let record = &self.bytes[usize::from(self.starts[i])..];
        let key_len = usize::from(u16::from_le_bytes([record[0], record[1]]));
        &record[HEADER..HEADER + key_len]
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

    /// Removes record `i` and gives memory back when more than half of it is unused.
    pub(super) fn remove(&mut self, i: usize) {
        let (start, end) = (self.start(i), self.start(i + 1));
        self.bytes.drain(start..end);
        self.starts.remove(i);
        for later in &mut self.starts[i..] {
            *later -= (end - start) as u16;
        }
        if self.bytes.capacity() - self.bytes.len() > self.room() / 2 {
            self.bytes.shrink_to(self.bytes.len().next_multiple_of(self.room() / 8));
            self.starts.shrink_to_fit();
        }
    }

    /// Moves the upper records to a new page, to make room in front of record `i`; a page of one record stays whole. Returns how many stay.
    ///
    /// Half of them, but an eighth where `i` is near an end: keys that come nearly in order (many clients counting up together) would otherwise
    /// leave a trail of pages that stay half empty.
    pub(super) fn split(&mut self, i: usize) -> (usize, Page) {
        let eighth = self.bytes.len() / 8;
        let cut = match self.start(i) {
            near_begin if near_begin <= eighth => eighth,
            near_end if near_end >= 7 * eighth => 7 * eighth,
            _ => 4 * eighth,
        };
        let at = self
            .starts
            .partition_point(|start| usize::from(*start) < cut)
            .min(self.len().saturating_sub(1))
            .max(1);
        let cut = self.start(at);
        let mut right = self.successor();
        right.reserve(self.bytes.len() - cut);
        right.bytes.extend_from_slice(&self.bytes[cut..]);
        right.starts = self.starts[at..].iter().map(|start| start - cut as u16).collect();
        self.bytes.truncate(cut);
        self.starts.truncate(at);
        (at, right)
    }

    /// Whether this page and its neighbour are small enough to become one that the next insert does not split again.
    pub(super) fn can_join(&self, neighbour: &Page) -> bool {
        self.size() + neighbour.size() <= self.room() * 3 / 4
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
            self.bytes.reserve_exact(needed.max(self.room()) - self.bytes.len());
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
