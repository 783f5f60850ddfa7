//! The maps of sparse files: which parts of a file are in the tar.

use super::BLOCK;

/// Offset and length of each part that has data.
pub(super) type Pairs = Vec<(u64, u64)>;

/// What comes next in a sparse file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Hole(u64),
    /// At most as many bytes of data as the tar has left.
    Data(u64),
}

/// A map on its way through a file.
#[derive(Debug)]
pub(super) struct Map {
    pairs: std::vec::IntoIter<(u64, u64)>,
    current: Option<(u64, u64)>,
    at: u64,
    size: u64,
}

impl Map {
    /// `None` if the parts are not in order, overlap, or reach beyond the file.
    pub(super) fn new(pairs: Pairs, size: u64) -> Option<Map> {
        let mut end = 0;
        for (offset, length) in &pairs {
            let this = offset.checked_add(*length).filter(|this| *offset >= end && *this <= size)?;
            end = this;
        }
        Some(Map { pairs: pairs.into_iter(), current: None, at: 0, size })
    }

    /// The next part; holes count as passed. `available` is what the tar has left.
    pub(super) fn next(&mut self, available: u64) -> Option<Part> {
        while self.current.is_none_or(|(offset, length)| offset + length <= self.at) {
            self.current = self.pairs.next();
            if self.current.is_none() {
                break;
            }
        }
        let (offset, length) = self.current.unwrap_or((self.size, 0));
        if self.at < offset {
            let hole = offset - self.at;
            self.at = offset;
            return Some(Part::Hole(hole));
        }
        let left = offset + length - self.at;
        if left > 0 { Some(Part::Data(left.min(available))) } else { None }
    }

    /// `length` bytes of data were taken.
    pub(super) fn advance(&mut self, length: u64) {
        self.at += length;
    }
}

/// A map as text: a count, then offsets and lengths, each on a line, in whole blocks.
#[derive(Debug, Default)]
pub(super) struct Text {
    line: Vec<u8>,
    numbers: Vec<u64>,
}

impl Text {
    /// Takes the next block; `false` if it is malformed. What follows the map in its last block is padding.
    pub(super) fn feed(&mut self, block: &[u8; BLOCK]) -> bool {
        for byte in block {
            if self.is_complete() {
                break;
            }
            if *byte != b'\n' {
                self.line.push(*byte);
                continue;
            }
            let line = std::mem::take(&mut self.line);
            let number = std::str::from_utf8(&line).ok().and_then(|line| line.parse::<i64>().ok());
            let Some(number) = number.and_then(|number| u64::try_from(number).ok()) else { return false };
            self.numbers.push(number);
        }
        true
    }

    pub(super) fn is_complete(&self) -> bool {
        let given = (self.numbers.len() as u64).saturating_sub(1);
        self.numbers.first().is_some_and(|count| given == count.saturating_mul(2))
    }

    pub(super) fn pairs(self) -> Option<Pairs> {
        Some(self.numbers.get(1..)?.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_gives_holes_and_data_in_turn() {
        let mut map = Map::new(vec![(0, 0), (4, 3), (7, 1), (10, 0), (12, 2)], 20).unwrap();
        let mut seen = Vec::new();
        while let Some(part) = map.next(2) {
            seen.push(part);
            if let Part::Data(length) = part {
                map.advance(length);
            }
        }
        let (hole, data) = (Part::Hole, Part::Data);
        assert_eq!(seen, [hole(4), data(2), data(1), data(1), hole(2), hole(2), data(2), hole(6)]);
    }

    #[test]
    fn maps_that_cannot_be_are_none() {
        for (pairs, size) in [
            (vec![(0, 5)], 4),
            (vec![(5, 0)], 4),
            (vec![(2, 2), (3, 1)], 9),
            (vec![(2, 2), (0, 1)], 9),
            (vec![(u64::MAX, 1)], u64::MAX),
        ] {
            assert!(Map::new(pairs.clone(), size).is_none(), "{pairs:?}");
        }
        assert!(Map::new(Vec::new(), 5).is_some());
    }

    #[test]
    fn a_text_map_ends_with_its_last_number() {
        let mut text = Text::default();
        let mut block = [0; BLOCK];
        block[..12].copy_from_slice(b"2\n0\n5\n512\n7\n");
        assert!(text.feed(&block) && text.is_complete());
        assert_eq!(text.pairs(), Some(vec![(0, 5), (512, 7)]));
        for bad in [&b"x\n"[..], b"-1\n", b"1\n\n", b"99999999999999999999\n"] {
            let mut block = [b'\n'; BLOCK];
            block[..bad.len()].copy_from_slice(bad);
            assert!(!Text::default().feed(&block), "{bad:?}");
        }
    }
}
