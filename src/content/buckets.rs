//! What is known of chunks, in bounded memory: sorted lists by the first byte of their ids.
//!
//! **What.** [`Buckets`] takes items for all 256 first bytes and drops what is the same. When more are kept than there may be, it lets go of
//! the upper half of the bytes that it covers: whoever fills it looks at [`Buckets::covered`] afterwards, and comes again for the rest.
//!
//! **Invariants.** At most `most` items are kept, beside what one byte alone has; a list has room for at most twice its items, and is sorted
//! again each time it has doubled. What was dropped is never covered.

use std::ops::Range;

/// Below so many items a list is not worth sorting.
const FEW: usize = 4096;

/// See the module's page.
#[derive(Debug)]
pub(super) struct Buckets<T> {
    covered: Range<usize>,
    most: usize,
    same: fn(&mut T, &mut T) -> bool,
    lists: Vec<List<T>>,
    total: usize,
}

#[derive(Debug)]
struct List<T> {
    items: Vec<T>,
    /// How many there were when they were sorted last.
    sorted: usize,
}

impl<T: Ord + Copy> Buckets<T> {
    /// For the bytes from `from` on. `same` tells which neighbours, in order, are one: the first of them stays.
    pub(super) fn new(from: usize, most: usize, same: fn(&mut T, &mut T) -> bool) -> Buckets<T> {
        let lists = (0..256).map(|_| List { items: Vec::new(), sorted: 0 }).collect();
        Buckets { covered: from..256, most, same, lists, total: 0 }
    }

    /// Keeps an item of this byte, if it is covered.
    pub(super) fn add(&mut self, first: u8, item: T) {
        if !self.covered.contains(&usize::from(first)) {
            return;
        }
        let list = &mut self.lists[usize::from(first)];
        list.items.push(item);
        self.total += 1;
        if list.items.len() >= 2 * list.sorted.max(FEW) {
            self.total -= list.sort(self.same);
        }
        if self.total > self.most {
            self.shrink();
        }
    }

    fn shrink(&mut self) {
        self.seal();
        // With some room left: to sort everything for each item would take for ever.
        while self.total > self.most / 4 * 3 && self.covered.len() > 1 {
            let middle = self.covered.start + self.covered.len() / 2;
            for list in &mut self.lists[middle..self.covered.end] {
                self.total -= list.items.len();
                *list = List { items: Vec::new(), sorted: 0 };
            }
            self.covered.end = middle;
        }
    }

    /// Sorts everything; to be called before it is looked at.
    pub(super) fn seal(&mut self) {
        for list in &mut self.lists[self.covered.clone()] {
            self.total -= list.sort(self.same);
        }
    }

    /// The bytes of which everything is here.
    pub(super) fn covered(&self) -> Range<usize> {
        self.covered.clone()
    }

    /// The items of a byte, in order.
    pub(super) fn items(&self, first: u8) -> &[T] {
        &self.lists[usize::from(first)].items
    }
}

impl<T: Ord + Copy> List<T> {
    /// Answers how many were dropped.
    fn sort(&mut self, same: fn(&mut T, &mut T) -> bool) -> usize {
        let before = self.items.len();
        self.items.sort_unstable();
        // The neighbour that stays comes first.
        self.items.dedup_by(|later, earlier| same(earlier, later));
        self.sorted = self.items.len();
        before - self.sorted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn equal(a: &mut u64, b: &mut u64) -> bool {
        a == b
    }

    #[test]
    fn what_is_the_same_is_kept_once() {
        let mut buckets = Buckets::new(0, 1_000_000, equal);
        for round in 0..50_u64 {
            for n in 0..1000 {
                buckets.add(7, n + round % 2);
            }
        }
        buckets.seal();
        assert_eq!(buckets.items(7), (0..=1000).collect::<Vec<u64>>());
        assert_eq!((buckets.total, buckets.covered()), (1001, 0..256));
    }

    #[test]
    fn too_much_is_taken_in_several_rounds() {
        let most = 10_000;
        let (mut from, mut found, mut rounds) = (0, 0, 0);
        while from < 256 {
            let mut buckets = Buckets::new(from, most, equal);
            for n in 0..100_000_u64 {
                buckets.add(u8::try_from(n % 256).unwrap(), n);
                assert!(buckets.total <= most);
            }
            buckets.seal();
            let covered = buckets.covered();
            assert!(covered.start == from && !covered.is_empty());
            found +=
                covered.clone().map(|byte| buckets.items(u8::try_from(byte).unwrap()).len()).sum::<usize>();
            (from, rounds) = (covered.end, rounds + 1);
        }
        assert_eq!(found, 100_000);
        assert!((10..40).contains(&rounds), "{rounds}");
    }

    /// One byte alone may have more than there may be: there is nothing to halve.
    #[test]
    fn one_byte_is_always_covered() {
        let mut buckets = Buckets::new(255, 10, equal);
        (0..1000).for_each(|n| buckets.add(255, n));
        buckets.seal();
        assert_eq!((buckets.items(255).len(), buckets.covered()), (1000, 255..256));
    }

    /// Ten million chunks, each in three indexes: `GC_CHUNKS=10000000 cargo test --lib -- memory_is_bounded --nocapture`.
    #[test]
    fn memory_is_bounded_by_what_is_distinct() {
        let chunks =
            std::env::var("GC_CHUNKS").ok().and_then(|text| text.parse().ok()).unwrap_or(1_500_000_u64);
        let mut buckets = Buckets::new(0, 16 << 20, equal);
        let (mut most, mut peak) = (0, 0);
        for _ in 0..3 {
            for n in 0..chunks {
                let id = xxhash_rust::xxh3::xxh3_64(&n.to_le_bytes());
                buckets.add(id.to_be_bytes()[0], id);
                most = most.max(buckets.total);
            }
            peak = peak.max(buckets.lists.iter().map(|list| list.items.capacity() * 8).sum::<usize>());
        }
        buckets.seal();
        assert_eq!((buckets.total as u64, buckets.covered()), (chunks, 0..256));
        println!("{chunks} chunks: at most {most} items, {peak} bytes");
        assert!(peak as u64 <= 2 * 16 * chunks.max(FEW as u64 * 256), "{peak}");
    }
}
