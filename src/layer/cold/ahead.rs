//! What readers of a layer image are expected to want next, told by what they read.
//!
//! As the kernel's readahead: a reader that goes forward gets a window before it, which is moved on before it has come to its end, and
//! which grows with the way that the reader has gone. Several readers go their ways in one layer image, each through a file of its own.

use std::ops::Range;

/// How many chunks are fetched before a reader that goes forward, to begin with and at most: 32 of half a MiB are what a link of
/// 1 Gbit/s and 100 ms has on its way.
const FIRST: usize = 4;
const MOST: usize = 32;
/// Before a reader that seems to jump.
const BESIDE: usize = 1;
/// How many readers are told apart.
const READERS: usize = 8;

/// One reader that goes forward, or may.
#[derive(Debug, Clone, Default)]
struct Reader {
    /// Behind the chunk that it read last.
    at: usize,
    /// What it has read in one go, in chunks.
    way: usize,
    /// The end of what is expected of it.
    end: usize,
}

/// See the module's page.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    /// The one that read last is the last one.
    readers: Vec<Reader>,
}

impl Ahead {
    /// Somebody reads these chunks of `count`, which were here or not. `goes_on` says whether the chunk before them is here. Whether
    /// more is expected now than before.
    pub(super) fn read(
        &mut self,
        chunks: &Range<usize>,
        count: usize,
        was_here: bool,
        goes_on: impl FnOnce() -> bool,
    ) -> bool {
        let is_its =
            |reader: &Reader| reader.at <= chunks.start + 1 && chunks.start <= reader.end.max(reader.at);
        let known = self.readers.iter().rposition(is_its);
        let mut reader = match known {
            Some(known) => self.readers.remove(known),
            // Nothing is expected of those who find all here.
            None if was_here => return false,
            None => {
                if self.readers.len() == READERS {
                    self.readers.remove(0);
                }
                let ahead = if goes_on() { FIRST } else { BESIDE };
                Reader { at: chunks.end, way: 0, end: chunks.end + ahead }
            }
        };
        let before = reader.end;
        reader.way += chunks.end.saturating_sub(reader.at);
        reader.at = reader.at.max(chunks.end);
        let window = (reader.way / 2).clamp(FIRST, MOST);
        // Not before half of it is read: a window that is moved by one chunk at a time has one chunk at a time fetched.
        if reader.way > 0 && reader.end < reader.at + window / 2 {
            reader.end = reader.at + window;
        }
        reader.end = reader.end.min(count).max(before.min(count));
        let more = reader.end > before || known.is_none();
        self.readers.push(reader);
        more
    }

    /// What is expected to be wanted, in this order.
    pub(super) fn expected(&self) -> impl Iterator<Item = usize> {
        self.readers.iter().rev().flat_map(|reader| reader.at..reader.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COUNT: usize = 1000;

    fn expected(ahead: &Ahead) -> Vec<usize> {
        ahead.expected().collect()
    }

    #[test]
    fn a_window_is_before_a_reader_and_grows_with_its_way() {
        let mut ahead = Ahead::default();
        assert!(ahead.read(&(100..101), COUNT, false, || true));
        assert_eq!(expected(&ahead), (101..105).collect::<Vec<_>>());
        let mut moved = 0;
        for at in 101..300 {
            moved += usize::from(ahead.read(&(at..at + 1), COUNT, true, || unreachable!()));
            let window = ahead.expected().count();
            assert!((2..=MOST).contains(&window), "{window} chunks before {at}");
        }
        assert!(moved < 30, "moved {moved} times");
        assert!(ahead.expected().count() >= MOST / 2);
        for at in 300..COUNT {
            ahead.read(&(at..at + 1), COUNT, true, || unreachable!());
        }
        assert!(expected(&ahead).is_empty());
    }

    #[test]
    fn whoever_jumps_gets_the_chunk_beside() {
        let mut ahead = Ahead::default();
        for at in [500, 20, 800] {
            assert!(ahead.read(&(at..at + 1), COUNT, false, || false));
            assert_eq!(ahead.expected().next(), Some(at + 1));
        }
        assert_eq!(expected(&ahead), [801, 21, 501]);
        // It goes forward after all.
        assert!(ahead.read(&(21..22), COUNT, true, || unreachable!()));
        assert_eq!(expected(&ahead)[..4], (22..26).collect::<Vec<_>>());
    }

    #[test]
    fn readers_go_their_ways_side_by_side() {
        let mut ahead = Ahead::default();
        for step in 0..50 {
            for begin in [0, 200, 400] {
                let was_here = step > 0;
                ahead.read(&(begin + step..begin + step + 1), COUNT, was_here, || true);
            }
        }
        for begin in [0, 200, 400] {
            assert!(expected(&ahead).contains(&(begin + 60)));
        }
        // No more of them than there may be.
        for at in 0..100 {
            ahead.read(&(at * 10..at * 10 + 1), COUNT, false, || false);
        }
        assert_eq!(ahead.readers.len(), READERS);
    }

    #[test]
    fn a_reader_that_finds_all_here_is_left_alone() {
        let mut ahead = Ahead::default();
        assert!(!ahead.read(&(5..7), COUNT, true, || true));
        assert!(expected(&ahead).is_empty());
        assert!(ahead.read(&(COUNT - 1..COUNT), COUNT, false, || true));
        assert!(expected(&ahead).is_empty());
    }
}
