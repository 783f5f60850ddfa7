//! Writing an image's bytes from front to back: files, then metadata.
//!
//! Every file begins on a block boundary. A file whose content was there before is taken back and refers to the earlier one.
//! Blocks of zeros are left out: the image is sparse. What is kept in memory is 1 MiB, and 40 bytes for each different file.
//!
//! **Invariant.** Behind the bytes that are to stay the file ends: what is taken back is cut off, so that what is left out later
//! reads as zeros.

use std::collections::HashMap;
use std::fs::File;
use std::hash::{BuildHasherDefault, Hasher};
use std::os::unix::fs::FileExt;

use super::error::ImageError;
use super::limits::Limit;
use super::{BLOCK, RESERVED};

const BUFFER: usize = 1 << 20;
const BLOCK_BYTES: usize = 4096;
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// The writing end of an image.
pub(super) struct Data<'a> {
    out: &'a File,
    /// Bytes from `start` on that are not written yet.
    buffer: Vec<u8>,
    /// A multiple of the block size.
    start: u64,
    /// Where the file that is being written begins, and its hash so far.
    file: u64,
    hasher: blake3::Hasher,
    known: HashMap<[u8; 32], u32, BuildHasherDefault<FirstBytes>>,
    /// No byte behind this one.
    limit: u64,
    allowed: u64,
}

/// Keys are hashes already.
#[derive(Default)]
pub(super) struct FirstBytes(u64);

impl Hasher for FirstBytes {
    fn write(&mut self, bytes: &[u8]) {
        if let Some(first) = bytes.first_chunk() {
            self.0 = u64::from_le_bytes(*first);
        }
    }

    fn write_usize(&mut self, _length: usize) {}

    fn finish(&self) -> u64 {
        self.0
    }
}

impl<'a> Data<'a> {
    /// Empties `out` and begins behind the head. At most `allowed` bytes may follow.
    pub(super) fn new(out: &'a File, allowed: u64) -> Result<Data<'a>, ImageError> {
        out.set_len(0).map_err(ImageError::Write)?;
        Ok(Data {
            out,
            buffer: Vec::with_capacity(BUFFER),
            start: RESERVED,
            file: RESERVED,
            hasher: blake3::Hasher::new(),
            known: HashMap::default(),
            // Block numbers have 32 bits.
            limit: RESERVED.saturating_add(allowed).min(u64::from(u32::MAX) * BLOCK),
            allowed,
        })
    }

    /// Where the next byte goes.
    pub(super) fn position(&self) -> u64 {
        self.start + self.buffer.len() as u64
    }

    /// The next bytes of a file.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        self.hasher.update(bytes);
        self.put(bytes)
    }

    /// The next zeros of a file.
    pub(super) fn write_zeros(&mut self, length: u64) -> Result<(), ImageError> {
        self.expect(length)?;
        each_zeros(length, |zeros| {
            self.hasher.update(zeros);
            Ok(())
        })?;
        let padding = (self.buffer.len().next_multiple_of(BLOCK_BYTES) - self.buffer.len()) as u64;
        let whole = length.saturating_sub(padding) / BLOCK * BLOCK;
        if whole == 0 {
            return each_zeros(length, |zeros| self.put(zeros));
        }
        each_zeros(padding, |zeros| self.put(zeros))?;
        self.flush()?;
        self.start += whole;
        each_zeros(length - padding - whole, |zeros| self.put(zeros))
    }

    /// Ends a file of at least one byte; the block where its content begins.
    pub(super) fn end_file(&mut self) -> Result<u32, ImageError> {
        let hash = *self.hasher.finalize().as_bytes();
        self.hasher.reset();
        if let Some(block) = self.known.get(&hash) {
            let block = *block;
            self.take_back()?;
            return Ok(block);
        }
        let block = block_number(self.file);
        self.known.insert(hash, block);
        self.align()?;
        self.file = self.position();
        Ok(block)
    }

    fn take_back(&mut self) -> Result<(), ImageError> {
        if let Some(kept) = self.file.checked_sub(self.start) {
            self.buffer.truncate(usize::try_from(kept).unwrap_or(usize::MAX));
            return Ok(());
        }
        self.buffer.clear();
        self.start = self.file;
        self.out.set_len(self.start).map_err(ImageError::Write)
    }

    /// Bytes of the metadata.
    pub(super) fn put(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        self.expect(bytes.len() as u64)?;
        let mut rest = bytes;
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(BUFFER - self.buffer.len()));
            self.buffer.extend_from_slice(now);
            rest = later;
            if self.buffer.len() == BUFFER {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn expect(&self, length: u64) -> Result<(), ImageError> {
        match self.position().checked_add(length) {
            Some(end) if end <= self.limit => Ok(()),
            _ => Err(ImageError::limit(Limit::Data, self.allowed)),
        }
    }

    /// Fills the block with zeros.
    pub(super) fn align(&mut self) -> Result<(), ImageError> {
        let length = self.buffer.len().next_multiple_of(BLOCK_BYTES);
        self.buffer.resize(length, 0);
        if length == BUFFER { self.flush() } else { Ok(()) }
    }

    /// Writes the whole blocks of the buffer that are not all zeros.
    fn flush(&mut self) -> Result<(), ImageError> {
        let whole = self.buffer.len() / BLOCK_BYTES * BLOCK_BYTES;
        let is_hole = |at: usize| self.buffer[at..at + BLOCK_BYTES] == ZEROS[..BLOCK_BYTES];
        let mut written = 0;
        for at in (0..whole).step_by(BLOCK_BYTES) {
            if is_hole(at) {
                self.write_out(written..at)?;
                written = at + BLOCK_BYTES;
            }
        }
        self.write_out(written..whole)?;
        self.start += whole as u64;
        self.buffer.drain(..whole);
        Ok(())
    }

    fn write_out(&self, range: std::ops::Range<usize>) -> Result<(), ImageError> {
        if range.is_empty() {
            return Ok(());
        }
        let at = self.start + range.start as u64;
        self.out.write_all_at(&self.buffer[range], at).map_err(ImageError::Write)
    }

    /// Where the next byte goes, with everything before it written and nothing behind it. The files are complete then, and what
    /// is [`put`](Data::put) next is metadata.
    pub(super) fn end_files(&mut self, allowed: u64) -> Result<u64, ImageError> {
        self.flush()?;
        self.known = HashMap::default();
        self.allowed = allowed;
        self.limit = self.start.saturating_add(allowed).min(u64::from(u32::MAX) * BLOCK);
        Ok(self.start)
    }

    /// Writes what is left, gives the file its length with the tail, and puts `head` into block 0.
    pub(super) fn finish(mut self, head: &dyn Fn(u64) -> Vec<u8>) -> Result<u64, ImageError> {
        self.align()?;
        self.flush()?;
        let size = self.start + RESERVED;
        self.out.set_len(size).map_err(ImageError::Write)?;
        self.out.write_all_at(&head(size), 0).map_err(ImageError::Write)?;
        Ok(size)
    }
}

/// Calls `take` with zeros, `length` in all.
fn each_zeros(length: u64, mut take: impl FnMut(&[u8]) -> Result<(), ImageError>) -> Result<(), ImageError> {
    let mut left = length;
    while left > 0 {
        let now = usize::try_from(left).unwrap_or(usize::MAX).min(ZEROS.len());
        take(&ZEROS[..now])?;
        left -= now as u64;
    }
    Ok(())
}

/// The number of the block at `offset`, which is below the limit.
pub(super) fn block_number(offset: u64) -> u32 {
    u32::try_from(offset / BLOCK).expect("the limit keeps block numbers to 32 bits")
}
