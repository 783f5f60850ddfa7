//! Memory that outlives a process: a file, or a memory file that somebody else holds too, mapped shared.
//!
//! **What.** [`Shared`] maps a descriptor; what is in it is read and written as atomic words ([`Shared::words`]), or filled by
//! the kernel ([`Shared::read_into`]).
//!
//! **Invariants.** Two processes may map the same bytes at the same time, the older one being about to die: so nothing here
//! hands out a plain reference to them. All bytes of a mapped file are allocated, else a full disk would be a SIGBUS.
//!
//! **When it fails.** With the system's errno. A mapped file must not be truncated by anybody: that would be a SIGBUS as well.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, ProtFlags};

/// Some bytes that others may hold as well.
#[derive(Debug)]
pub struct Shared {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: the mapping belongs to this value alone, and everything in it is reached by atomic or kernel accesses only.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

/// A new memory file of `length` zeros.
pub fn memory(name: &str, length: u64) -> io::Result<OwnedFd> {
    let memory = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&memory, length)?;
    Ok(memory)
}

impl Shared {
    /// Maps the first `length` bytes, a multiple of 8, of a descriptor that is open for reading and writing and is that long.
    pub fn map(memory: impl AsFd, length: usize) -> io::Result<Shared> {
        let there = rustix::fs::fstat(&memory)?.st_size;
        if length == 0 || !length.is_multiple_of(8) || u64::try_from(there).is_ok_and(|n| n < length as u64) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at a place of the kernel's choice touches no other memory.
        let start = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), length, protection, MapFlags::SHARED, memory, 0)?
        };
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Shared { start, length })
    }

    /// The bytes as words of the machine.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is as long, is aligned to pages, lives as long as `self`, and any bits are a word.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast::<AtomicU64>(), self.length / 8) }
    }

    /// A copy of `count` bytes from `at` on, both multiples of 8.
    pub fn copy(&self, at: usize, count: usize) -> Vec<u8> {
        let words = &self.words()[at / 8..(at + count) / 8];
        words.iter().flat_map(|word| word.load(Ordering::Acquire).to_ne_bytes()).collect()
    }

    /// Lets the kernel read from `source` straight into the `count` bytes from `at` on; answers how many came.
    pub fn read_into(&self, at: usize, count: usize, source: BorrowedFd<'_>) -> io::Result<usize> {
        if at.checked_add(count).is_none_or(|end| end > self.length) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the range lies in the mapping, the descriptor is open during the call, and no reference to these bytes exists.
        let read = unsafe { libc::read(source.as_raw_fd(), self.start.as_ptr().add(at).cast(), count) };
        usize::try_from(read).map_err(|_| io::Error::last_os_error())
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` with this length, and nothing refers to it any more.
        if unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.length) }.is_err() {
            tracing::warn!("cannot unmap shared memory");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn two_mappings_show_the_same_bytes() {
        let memory = memory("test", 4096).unwrap();
        let (one, two) = (Shared::map(&memory, 4096).unwrap(), Shared::map(&memory, 4096).unwrap());
        one.words()[7].store(0x1122, Ordering::Release);
        assert_eq!(two.copy(56, 8), 0x1122_u64.to_ne_bytes());
    }

    #[test]
    fn the_kernel_reads_into_it() {
        let memory = memory("test", 4096).unwrap();
        let shared = Shared::map(&memory, 4096).unwrap();
        let (source, mut sink) = std::io::pipe().unwrap();
        sink.write_all(b"12345678").unwrap();
        assert_eq!(shared.read_into(512, 1024, source.as_fd()).unwrap(), 8);
        assert_eq!(shared.copy(512, 8), b"12345678");
        assert!(shared.read_into(4000, 1024, source.as_fd()).is_err());
    }

    #[test]
    fn what_is_too_short_is_not_mapped() {
        let memory = memory("test", 100).unwrap();
        for length in [0, 12, 104] {
            assert!(Shared::map(&memory, length).is_err());
        }
    }
}
