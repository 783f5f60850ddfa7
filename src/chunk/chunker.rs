//! Where a layer image is cut into chunks: block-aligned, content-defined. Part of the store's format.
//!
//! **What.** [`cut_regions`] walks the given regions of an image and yields its chunks in order. The same bytes are cut the same
//! way on every machine; an image that differs from another in one file differs in few chunks.
//!
//! **How.** A region is a sequence of 4 KiB blocks. In each region by itself:
//! * `hole / block` or more blocks of zeros in a row are a *hole*: they belong to no chunk, and a hole ends the chunk before it.
//!   Fewer are data as any other. Only the bytes count, not whether the file is sparse.
//! * A chunk ends after its *n*-th block when *n* is `max / block`; or when *n* is at least `min / block`, the block is not all
//!   zeros, and its XXH3-64 (seed 0) is less than a threshold. The threshold is `2^64 / (4 × average)` up to the average
//!   length and `2^64 × 4 / average` behind it, in blocks: so lengths gather around the average, and few chunks end where
//!   nothing but their length says so.
//! * It ends at the end of its region.
//!
//! [`layout::CUTTING`] has the numbers. A block that is the last of its chunk in one image is so in another one that holds the
//! same blocks for long enough before it: insertions of whole blocks change the chunks around them only.
//!
//! **Invariants.** Chunks and holes tile each region, in order. A chunk is whole blocks and has at most `max` bytes.
//!
//! **When it fails.** An error of the source is yielded once, then the walk is over.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use xxhash_rust::xxh3::xxh3_64;

use super::{BLOCK, ChunkId, ChunkRef};
use crate::object::layout::{self, Cutting};

const BLOCK_SIZE: usize = BLOCK as usize;
const ZEROS: [u8; BLOCK_SIZE] = [0; BLOCK_SIZE];
/// So much is read at once.
const READ: usize = 64 * BLOCK_SIZE;
/// Room for a chunk, zeros that are not decided about, and several reads: bytes are moved to the front seldom.
const ROOM: usize = 4 << 20;

/// A chunk in its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Where it begins in the image, in bytes.
    pub offset: u64,
    /// What it is.
    pub chunk: ChunkRef,
}

/// The image, by offset.
pub trait Source {
    /// Fills `bytes` with what begins at `offset`; less than that is an error.
    fn read_at(&mut self, offset: u64, bytes: &mut [u8]) -> io::Result<()>;

    /// An offset before which, from `offset` on, there are only zeros: what a sparse file knows without reading
    /// (`SEEK_DATA`). `offset` itself where nothing is known.
    fn data_after(&mut self, offset: u64) -> io::Result<u64> {
        Ok(offset)
    }
}

impl Source for &File {
    fn read_at(&mut self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(bytes, offset)
    }
}

impl Source for &[u8] {
    fn read_at(&mut self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let from = usize::try_from(offset).ok().and_then(|at| self.get(at..)?.get(..bytes.len()));
        bytes.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// The chunks of these regions, cut as every layer is. Regions begin and end between blocks and do not overlap.
pub fn cut_regions<S: Source>(source: S, regions: &[Range<u64>]) -> Cutter<S> {
    cut_regions_as(layout::CUTTING, source, regions)
}

/// The same with other numbers, for measurements.
pub fn cut_regions_as<S: Source>(cutting: Cutting, source: S, regions: &[Range<u64>]) -> Cutter<S> {
    let blocks = |bytes: u32| (bytes / BLOCK) as usize;
    let average = u64::from(cutting.average / BLOCK).max(1);
    let owned = regions.to_vec();
    Cutter {
        source,
        regions: owned.into_iter(),
        region: 0..0,
        min: blocks(cutting.min),
        average: blocks(cutting.average),
        max: blocks(cutting.max).max(1),
        hole: blocks(cutting.hole).max(1),
        rarely: u64::MAX / (4 * average),
        often: (u64::MAX / average).saturating_mul(4),
        buffer: vec![0; ROOM.max(2 * (cutting.max + cutting.hole) as usize + READ)],
        start: 0,
        filled: 0,
        chunk: 0,
        data: 0,
        zeros: 0,
        in_hole: true,
        last: 0..0,
        over: false,
    }
}

/// An iterator over chunks; [`Cutter::bytes`] has those of the last one.
#[derive(Debug)]
pub struct Cutter<S> {
    source: S,
    regions: std::vec::IntoIter<Range<u64>>,
    /// From the first byte that is in no chunk and no hole yet.
    region: Range<u64>,
    min: usize,
    average: usize,
    max: usize,
    hole: usize,
    rarely: u64,
    often: u64,
    buffer: Vec<u8>,
    /// Where `region.start` is in the buffer.
    start: usize,
    /// Up to where the buffer is filled.
    filled: usize,
    /// From `start` on, in blocks: what is in the chunk,
    chunk: usize,
    /// what is data and not yet in it,
    data: usize,
    /// and zeros that are data or the beginning of a hole.
    zeros: usize,
    in_hole: bool,
    last: Range<usize>,
    over: bool,
}

impl<S: Source> Cutter<S> {
    /// The bytes of the chunk that was yielded last.
    pub fn bytes(&self) -> &[u8] {
        &self.buffer[self.last.clone()]
    }

    fn step(&mut self) -> io::Result<Option<Piece>> {
        loop {
            if self.data > 0 {
                if self.take_block() {
                    return Ok(Some(self.cut()));
                }
            } else if self.zeros >= self.hole || self.in_hole && self.zeros > 0 {
                if self.chunk > 0 {
                    return Ok(Some(self.cut()));
                }
                self.in_hole = self.zeros >= self.hole || self.in_hole;
                self.leave(self.zeros);
                self.zeros = 0;
            } else if self.examined() < self.region_blocks() {
                self.examine()?;
            } else if self.zeros > 0 {
                // Too few for a hole, and the region ends.
                self.data = std::mem::take(&mut self.zeros);
            } else if self.chunk > 0 {
                return Ok(Some(self.cut()));
            } else if !self.next_region()? {
                return Ok(None);
            }
        }
    }

    /// Moves one block of data into the chunk; whether the chunk ends with it.
    fn take_block(&mut self) -> bool {
        let at = self.start + self.chunk * BLOCK_SIZE;
        self.chunk += 1;
        self.data -= 1;
        if self.chunk >= self.max {
            return true;
        }
        // What cannot be cut need not be hashed.
        if self.chunk < self.min {
            return false;
        }
        let block = &self.buffer[at..at + BLOCK_SIZE];
        let threshold = if self.chunk < self.average { self.rarely } else { self.often };
        xxh3_64(block) < threshold && block != ZEROS
    }

    fn cut(&mut self) -> Piece {
        let length = self.chunk * BLOCK_SIZE;
        self.last = self.start..self.start + length;
        let offset = self.region.start;
        self.leave(self.chunk);
        self.chunk = 0;
        let id = ChunkId::of(self.bytes());
        let length = u32::try_from(length).expect("a chunk has at most `max` bytes");
        Piece { offset, chunk: ChunkRef { id, length } }
    }

    /// The first blocks are done with.
    fn leave(&mut self, blocks: usize) {
        self.start += blocks * BLOCK_SIZE;
        self.region.start += (blocks * BLOCK_SIZE) as u64;
    }

    fn examined(&self) -> u64 {
        (self.chunk + self.data + self.zeros) as u64
    }

    fn region_blocks(&self) -> u64 {
        (self.region.end - self.region.start) / u64::from(BLOCK)
    }

    /// Looks at the next block: zeros or data?
    fn examine(&mut self) -> io::Result<()> {
        let mut at = self.start + (self.chunk + self.data + self.zeros) * BLOCK_SIZE;
        if at == self.filled {
            if self.in_hole && self.skip_sparse()? {
                return Ok(());
            }
            at -= self.fill()?;
        }
        if self.buffer[at..at + BLOCK_SIZE] == ZEROS {
            self.zeros += 1;
        } else {
            self.data = std::mem::take(&mut self.zeros) + 1;
            self.in_hole = false;
        }
        Ok(())
    }

    /// Goes over what the source knows to be zeros; only inside a hole, where nothing is waiting to be decided.
    fn skip_sparse(&mut self) -> io::Result<bool> {
        let data = self.source.data_after(self.region.start)?.min(self.region.end);
        let blocks = data.saturating_sub(self.region.start) / u64::from(BLOCK);
        self.region.start += blocks * u64::from(BLOCK);
        Ok(blocks > 0)
    }

    /// Reads on; answers by how much the bytes in the buffer have moved to the front.
    fn fill(&mut self) -> io::Result<usize> {
        let moved = if self.buffer.len() - self.filled < READ { self.start } else { 0 };
        if moved > 0 {
            self.buffer.copy_within(self.start..self.filled, 0);
            self.filled -= moved;
            self.start = 0;
        }
        let offset = self.region.start + (self.filled - self.start) as u64;
        let left = usize::try_from(self.region.end - offset).unwrap_or(usize::MAX);
        let until = self.filled + READ.min(left);
        self.source.read_at(offset, &mut self.buffer[self.filled..until])?;
        self.filled = until;
        Ok(moved)
    }

    fn next_region(&mut self) -> io::Result<bool> {
        let Some(region) = self.regions.next() else { return Ok(false) };
        let aligned = [region.start, region.end].iter().all(|at| at.is_multiple_of(u64::from(BLOCK)));
        if !aligned || region.start > region.end || region.start < self.region.end {
            let problem = format!("regions of an image are whole blocks in order: {region:?}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
        }
        self.region = region;
        (self.start, self.filled) = (0, 0);
        self.in_hole = false;
        Ok(true)
    }
}

impl<S: Source> Iterator for Cutter<S> {
    type Item = io::Result<Piece>;

    fn next(&mut self) -> Option<io::Result<Piece>> {
        if self.over {
            return None;
        }
        let stepped = self.step().transpose();
        self.over = !matches!(stepped, Some(Ok(_)));
        stepped
    }
}

#[cfg(test)]
mod tests;
