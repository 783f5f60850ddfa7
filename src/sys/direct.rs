//! Files past the page cache (`O_DIRECT`), and memory that suits.
//!
//! A transfer begins and ends at multiples of [`ALIGNED`], in the file as in memory: what open(2) asks for on every common disk. Where a
//! file system knows no `O_DIRECT` (tmpfs before Linux 6.6, some network file systems) the page cache is used.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use parking_lot::Mutex;

/// What offsets, lengths and addresses are multiples of.
pub const ALIGNED: usize = 4096;

/// Memory that is done with. It is used again: the kernel takes longer to give new pages than zstd to fill them.
static KEPT: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());
/// How many are kept, and of which length: 32 MiB at most.
const MOST_KEPT: usize = 32;
const WORTH_KEEPING: std::ops::RangeInclusive<usize> = (64 << 10)..=(1 << 20) + ALIGNED;

/// Aligned memory. What it holds to begin with is what somebody left there.
#[derive(Debug)]
pub struct Blocks {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl Blocks {
    /// Of so many bytes.
    pub fn take(length: usize) -> Blocks {
        let memory = Blocks::kept(length).unwrap_or_else(|| vec![0; length.next_power_of_two() + ALIGNED]);
        let start = memory.as_ptr().align_offset(ALIGNED);
        Blocks { memory, start, length }
    }

    /// Nothing for what is short, which would hold the memory of something long for as long as it is wanted.
    fn kept(length: usize) -> Option<Vec<u8>> {
        if length < *WORTH_KEEPING.start() {
            return None;
        }
        let mut kept = KEPT.lock();
        let fits = kept.iter().rposition(|memory| memory.len() >= length + ALIGNED)?;
        Some(kept.swap_remove(fits))
    }

    /// A copy of these bytes.
    pub fn copy_of(bytes: &[u8]) -> Blocks {
        let mut blocks = Blocks::take(bytes.len());
        blocks.as_mut().copy_from_slice(bytes);
        blocks
    }
}

impl AsRef<[u8]> for Blocks {
    fn as_ref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.length]
    }
}

impl AsMut<[u8]> for Blocks {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.length]
    }
}

impl Drop for Blocks {
    fn drop(&mut self) {
        if WORTH_KEEPING.contains(&self.memory.len()) {
            let mut kept = KEPT.lock();
            if kept.len() < MOST_KEPT {
                kept.push(std::mem::take(&mut self.memory));
            }
        }
    }
}

/// A file past the page cache, where its file system can.
#[derive(Debug)]
pub struct Direct(File);

impl Direct {
    /// Opens a file once more, whatever its name is by now, to be read.
    pub fn open(file: &File) -> io::Result<Direct> {
        Direct::open_by(OpenOptions::new().read(true), file)
    }

    /// The same, to be read and written.
    pub fn open_to_write(file: &File) -> io::Result<Direct> {
        Direct::open_by(OpenOptions::new().read(true).write(true), file)
    }

    fn open_by(options: &mut OpenOptions, file: &File) -> io::Result<Direct> {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        match options.custom_flags(libc::O_DIRECT).open(&path) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => options.custom_flags(0).open(&path),
            opened => opened,
        }
        .map(Direct)
    }

    /// The bytes from `offset` on.
    pub fn read(&self, offset: u64, length: usize) -> io::Result<Blocks> {
        let mut blocks = Blocks::take(length);
        self.0.read_exact_at(blocks.as_mut(), offset)?;
        Ok(blocks)
    }

    /// Writes these bytes, which are copied if they do not lie as they should.
    pub fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if bytes.as_ptr().align_offset(ALIGNED) == 0 {
            self.0.write_all_at(bytes, offset)
        } else {
            self.0.write_all_at(Blocks::copy_of(bytes).as_ref(), offset)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_past_the_cache_is_read_by_both_ways() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 10).unwrap();
        // In the cache: a hole, which must not be read from there afterwards.
        let mut cached = vec![9; 16 << 10];
        file.read_exact_at(&mut cached, 0).unwrap();
        let direct = Direct::open_to_write(&file).unwrap();
        let bytes: Vec<u8> = (0..=255).cycle().take(8193).collect();
        // One of them is aligned at most.
        direct.write(&bytes[..8192], 4096).unwrap();
        direct.write(&bytes[1..], 12288).unwrap();
        assert_eq!(direct.read(4096, 8192).unwrap().as_ref(), &bytes[..8192]);
        file.read_exact_at(&mut cached, 4096).unwrap();
        assert_eq!((&cached[..8192], &cached[8192..]), (&bytes[..8192], &bytes[1..]));
        assert_eq!(direct.read(0, 4096).unwrap().as_ref(), &[0; 4096]);
        assert_eq!(direct.read(65536, 4096).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert!(Direct::open(&file).unwrap().write(&bytes[..4096], 0).is_err(), "it was opened to be read");
    }

    #[test]
    fn memory_is_aligned_and_used_again() {
        for length in [0, 1, 4096, 100_000, 1 << 20, 5 << 20] {
            let mut blocks = Blocks::take(length);
            assert_eq!((blocks.as_ref().len(), blocks.as_mut().as_ptr().align_offset(ALIGNED)), (length, 0));
        }
        assert!(KEPT.lock().len() <= MOST_KEPT);
    }
}
