//! One table: pages in key order, and the values too long for them.

use std::{collections::BTreeMap, ops::Bound, sync::Arc};

use super::super::{KeyRange, Order, Visitor};
use super::page::{MAX_PACKED_VALUE, Page, Stored};
use super::separator::Separator;

/// What an entry of the page map costs besides the page's own heap: the page, its separator, and the map's share.
const PAGE_OVERHEAD: usize = size_of::<Page>() + size_of::<Separator>() + 32;
/// Reference counts in front of a shared value, and the slot that holds it.
const SLOT_OVERHEAD: usize = 16 + size_of::<Option<Arc<[u8]>>>();

/// Long values, by slot. Slots of removed values are used again.
#[derive(Debug, Default)]
pub(super) struct Slab {
    slots: Vec<Option<Arc<[u8]>>>,
    free: Vec<u32>,
    bytes: usize,
}

impl Slab {
    fn insert(&mut self, value: Arc<[u8]>) -> u32 {
        self.bytes += value.len() + SLOT_OVERHEAD;
        if let Some(slot) = self.free.pop() {
            self.slots[slot as usize] = Some(value);
            return slot;
        }
        self.slots.push(Some(value));
        (self.slots.len() - 1) as u32
    }

    fn remove(&mut self, slot: u32) {
        if let Some(value) = self.slots[slot as usize].take() {
            self.bytes -= value.len() + SLOT_OVERHEAD;
            self.free.push(slot);
        }
    }

    fn get(&self, slot: u32) -> Option<&Arc<[u8]>> {
        self.slots.get(slot as usize)?.as_ref()
    }
}

/// How a bounded part of a scan ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// The range is at its end, or the visitor has had enough.
    Done,
    /// The limit was reached; the scan goes on behind this key.
    After(Vec<u8>),
}

/// See the module.
///
/// *Invariants*: a page holds the keys from its separator up to the next one, and at least one record. The least separator is
/// empty unless the first page was removed; the next insert below the first separator then makes a page with the empty one.
#[derive(Debug)]
pub(super) struct Table {
    pages: BTreeMap<Separator, Page>,
    slab: Slab,
    page_heap: usize,
    /// Room of each page.
    room: u16,
}

impl Table {
    /// An empty one, of pages of so many bytes.
    pub(super) fn new(room: u16) -> Table {
        Table {
            pages: BTreeMap::new(),
            slab: Slab::default(),
            page_heap: 0,
            room,
        }
    }

    /// Empties it; what was in it is returned.
    pub(super) fn take(&mut self) -> Table {
        std::mem::replace(self, Table::new(self.room))
    }

    /// The value of `key`. Short ones are copied out: cheaper in memory than a reference count for each.
    pub(super) fn get(&self, key: &[u8]) -> Option<Arc<[u8]>> {
        let (_, page) = self.pages.range::<[u8], _>(up_to(key)).next_back()?;
        match page.record(page.search(key).ok()?).1 {
            Stored::Packed(bytes) => Some(Arc::from(bytes)),
            Stored::Slot(slot) => self.slab.get(slot).cloned(),
        }
    }

    /// Sets `key` to `value`.
    pub(super) fn put(&mut self, key: &[u8], value: &Arc<[u8]>) {
        let Some((_, page)) = self.pages.range_mut::<[u8], _>(up_to(key)).next_back() else {
            let stored = store_value(&mut self.slab, value);
            let mut page = Page::new(self.room);
            page.insert(0, key, stored);
            return self.add_page(Separator::default(), page);
        };
        let heap_before = page.heap();
        let position = page.search(key);
        if let Ok(i) = position {
            if let Stored::Slot(slot) = page.record(i).1 {
                self.slab.remove(slot);
            }
            page.remove(i);
        }
        let i = position.unwrap_or_else(|i| i);
        let stored = store_value(&mut self.slab, value);
        let new_page = insert(page, i, key, stored);
        self.page_heap = self.page_heap + page.heap() - heap_before;
        if let Some((separator, page)) = new_page {
            self.add_page(separator, page);
        }
    }

    /// Removes `key` if it is there.
    pub(super) fn delete(&mut self, key: &[u8]) {
        let Some((separator, page)) = self.pages.range_mut::<[u8], _>(up_to(key)).next_back() else {
            return;
        };
        let Ok(i) = page.search(key) else { return };
        if let Stored::Slot(slot) = page.record(i).1 {
            self.slab.remove(slot);
        }
        let heap_before = page.heap();
        page.remove(i);
        self.page_heap = self.page_heap + page.heap() - heap_before;
        if page.len() == 0 {
            let separator = separator.clone();
            self.remove_page(separator.bytes());
        } else if page.is_sparse() {
            let separator = separator.clone();
            self.join_neighbours(separator.bytes());
        }
    }

    /// Visits at most `limit` records of the range.
    pub(super) fn scan(&self, range: KeyRange<'_>, order: Order, limit: usize, visit: Visitor<'_>) -> Step {
        match order {
            Order::Asc => self.scan_up(range, limit, visit),
            Order::Desc => self.scan_down(range, limit, visit),
        }
    }

    /// Heap held, estimated.
    pub(super) fn heap(&self) -> usize {
        self.page_heap + self.slab.bytes
    }

    fn scan_up(&self, (low, high): KeyRange<'_>, mut limit: usize, visit: Visitor<'_>) -> Step {
        // Most scans are point reads, which end in the page that they begin in: the rest of the pages is looked up only then.
        let (separator, first) = match self.first_page(low) {
            Some((separator, page)) => (Bound::Excluded(separator), Some((page, lower_index(page, low)))),
            None => (Bound::Unbounded, None),
        };
        let rest = std::iter::once_with(|| self.pages.range::<[u8], _>((separator, Bound::Unbounded)))
            .flatten()
            .map(|(_, page)| (page, 0));
        for (page, begin) in first.into_iter().chain(rest) {
            for i in begin..page.len() {
                let (key, value) = page.record(i);
                if !is_below(key, high) || visit(key, self.value(value)).is_break() {
                    return Step::Done;
                }
                limit -= 1;
                if limit == 0 {
                    return Step::After(key.to_vec());
                }
            }
        }
        Step::Done
    }

    fn scan_down(&self, (low, high): KeyRange<'_>, mut limit: usize, visit: Visitor<'_>) -> Step {
        let last = match high {
            Bound::Included(key) | Bound::Excluded(key) => Bound::Included(key),
            Bound::Unbounded => Bound::Unbounded,
        };
        let mut from = Some(high);
        for (_, page) in self.pages.range::<[u8], _>((Bound::Unbounded, last)).rev() {
            let end = from.take().map_or(page.len(), |high| upper_index(page, high));
            for i in (0..end).rev() {
                let (key, value) = page.record(i);
                if !is_above(key, low) || visit(key, self.value(value)).is_break() {
                    return Step::Done;
                }
                limit -= 1;
                if limit == 0 {
                    return Step::After(key.to_vec());
                }
            }
        }
        Step::Done
    }

    fn value<'a>(&'a self, value: Stored<'a>) -> &'a [u8] {
        match value {
            Stored::Packed(bytes) => bytes,
            Stored::Slot(slot) => self.slab.get(slot).map_or(&[], |value| value),
        }
    }

    /// The page in which a scan from `low` begins, with its separator; `None`: the very first one.
    fn first_page(&self, low: Bound<&[u8]>) -> Option<(&[u8], &Page)> {
        match low {
            Bound::Included(key) | Bound::Excluded(key) => {
                let page = self.pages.range::<[u8], _>(up_to(key)).next_back();
                page.map(|(separator, page)| (separator.bytes(), page))
            }
            Bound::Unbounded => None,
        }
    }

    fn add_page(&mut self, separator: Separator, page: Page) {
        self.page_heap += PAGE_OVERHEAD + separator.heap() + page.heap();
        self.pages.insert(separator, page);
    }

    fn remove_page(&mut self, separator: &[u8]) -> Option<Page> {
        let (separator, page) = self.pages.remove_entry(separator)?;
        self.page_heap -= PAGE_OVERHEAD + separator.heap() + page.heap();
        Some(page)
    }

    /// Joins a small page with its left or its right neighbour, so that compaction leaves no trail of nearly empty pages.
    fn join_neighbours(&mut self, separator: &[u8]) {
        let Some(page) = self.pages.get(separator) else { return };
        let left = self
            .pages
            .range::<[u8], _>((Bound::Unbounded, Bound::Excluded(separator)))
            .next_back();
        let right = self.pages.range::<[u8], _>((Bound::Excluded(separator), Bound::Unbounded)).next();
        let (keep, remove) = match (left, right) {
            (Some((left, neighbour)), _) if page.can_join(neighbour) => (left.clone(), Separator::new(separator)),
            (_, Some((right, neighbour))) if page.can_join(neighbour) => (Separator::new(separator), right.clone()),
            _ => return,
        };
        let Some(next) = self.remove_page(remove.bytes()) else { return };
        if let Some(page) = self.pages.get_mut(keep.bytes()) {
            let heap_before = page.heap();
            page.join(next);
            self.page_heap = self.page_heap + page.heap() - heap_before;
        }
    }
}

/// The form in which a page holds a value.
fn store_value<'a>(slab: &mut Slab, value: &'a Arc<[u8]>) -> Stored<'a> {
    match value.len() {
        0..=MAX_PACKED_VALUE => Stored::Packed(value),
        _ => Stored::Slot(slab.insert(value.clone())),
    }
}

/// Inserts a record in front of record `i`. If it does not fit, it begins a new page behind this one where the keys come in ascending order (as
/// history does: full pages stay full); otherwise the page is split.
fn insert(page: &mut Page, i: usize, key: &[u8], stored: Stored<'_>) -> Option<(Separator, Page)> {
    if page.has_room_for(key, stored) {
        page.insert(i, key, stored);
        return None;
    }
    if i == page.len() {
        let mut next = page.successor();
        next.insert(0, key, stored);
        return Some((Separator::between(page.key(page.len() - 1), key), next));
    }
    let (kept, mut right) = page.split(i);
    // Between the two it goes where there is more room.
    let is_right = right.len() > 0 && (i > kept || (i == kept && right.size() <= page.size()));
    if is_right {
        right.insert(i - kept, key, stored);
    } else {
        page.insert(i, key, stored);
    }
    (right.len() > 0).then(|| (Separator::between(page.key(page.len() - 1), right.key(0)), right))
}

/// Index of the first record not below `low`.
fn lower_index(page: &Page, low: Bound<&[u8]>) -> usize {
    match low {
        Bound::Included(key) => page.search(key).unwrap_or_else(|i| i),
        Bound::Excluded(key) => page.search(key).map_or_else(|i| i, |i| i + 1),
        Bound::Unbounded => 0,
    }
}

/// Index behind the last record not above `high`.
fn upper_index(page: &Page, high: Bound<&[u8]>) -> usize {
    match high {
        Bound::Included(key) => page.search(key).map_or_else(|i| i, |i| i + 1),
        Bound::Excluded(key) => page.search(key).unwrap_or_else(|i| i),
        Bound::Unbounded => page.len(),
    }
}

fn is_below(key: &[u8], high: Bound<&[u8]>) -> bool {
    match high {
        Bound::Included(bound) => key <= bound,
        Bound::Excluded(bound) => key < bound,
        Bound::Unbounded => true,
    }
}

fn is_above(key: &[u8], low: Bound<&[u8]>) -> bool {
    match low {
        Bound::Included(bound) => key >= bound,
        Bound::Excluded(bound) => key > bound,
        Bound::Unbounded => true,
    }
}

/// The separators among which the last one is that of the page for `key`.
fn up_to(key: &[u8]) -> (Bound<&[u8]>, Bound<&[u8]>) {
    (Bound::Unbounded, Bound::Included(key))
}
