//! Ranges of files: shared, copied, allocated, punched out, found.
//!
//! Offsets and lengths are bytes. Nothing here makes anything durable; callers sync.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

/// Lets `length` bytes of `to`, from `to_at` on, share the blocks of `from` at `from_at` (FICLONERANGE). `false` where
/// that cannot be: other file systems, one that shares no blocks (ext4), offsets that are not on its block boundaries.
pub fn reflink_range(from: &File, from_at: u64, to: &File, to_at: u64, length: u64) -> io::Result<bool> {
    if length == 0 {
        // The kernel would share all up to the end.
        return Ok(true);
    }
    let range = libc::file_clone_range {
        src_fd: i64::from(from.as_raw_fd()),
        src_offset: from_at,
        src_length: length,
        dest_offset: to_at,
    };
    // SAFETY: `range` is the structure that the request reads, and both descriptors are open during the call.
    let done = unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONERANGE, &raw const range) };
    if done == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::XDEV | Errno::OPNOTSUPP | Errno::NOTTY | Errno::NOSYS | Errno::INVAL) => Ok(false),
        _ => Err(error),
    }
}

/// Copies `length` bytes within the kernel (copy_file_range(2)), which shares blocks where the file system can. The two
/// ranges must not overlap in one file. `false` where the kernel cannot, with nothing promised about the target range.
pub fn copy_range(from: &File, from_at: u64, to: &File, to_at: u64, length: u64) -> io::Result<bool> {
    let (mut from_at, mut to_at, mut left) = (from_at, to_at, length);
    while left > 0 {
        let step = usize::try_from(left).unwrap_or(usize::MAX).min(1 << 30);
        match rustix::fs::copy_file_range(from, Some(&mut from_at), to, Some(&mut to_at), step) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(done) => left -= done as u64,
            Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => return Ok(false),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(true)
}

/// Has the kernel begin to write what is not on the disk yet. Nothing is durable for it, but a sync later on has less to do; its
/// errors are that sync's.
pub fn begin_writing(file: &File) {
    // SAFETY: no memory is involved, and the descriptor is open during the call.
    unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
}

/// Gives the blocks of a range back; it then reads as zeros. The file keeps its length. `false` where the file system
/// cannot.
pub fn punch(file: &File, range: Range<u64>) -> io::Result<bool> {
    fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, range)
}

/// Reserves the blocks of a range, so that writing there cannot run out of space; the file grows to hold it. `false`
/// where the file system cannot.
pub fn allocate(file: &File, range: Range<u64>) -> io::Result<bool> {
    fallocate(file, FallocateFlags::empty(), range)
}

fn fallocate(file: &File, flags: FallocateFlags, range: Range<u64>) -> io::Result<bool> {
    if range.is_empty() {
        return Ok(true);
    }
    loop {
        match rustix::fs::fallocate(file, flags, range.start, range.end - range.start) {
            Ok(()) => return Ok(true),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(false),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Fills the buffer from `at` on, or as much of it as the file has; how much that is.
pub fn read_up_to(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    use std::os::unix::fs::FileExt;
    let mut length = 0;
    while length < buffer.len() {
        match file.read_at(&mut buffer[length..], at.saturating_add(length as u64))? {
            0 => break,
            read => length += read,
        }
    }
    Ok(length)
}

/// The first range from `at` on that holds data (SEEK_DATA, SEEK_HOLE); `None` if only holes follow. A file system that
/// knows no holes says that all is data.
pub fn next_data(file: &File, at: u64) -> io::Result<Option<Range<u64>>> {
    let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    let end = rustix::fs::seek(file, SeekFrom::Hole(start))?;
    Ok(Some(start..end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    fn file_with(length: usize) -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![7; length], 0).unwrap();
        file
    }

    #[test]
    fn a_range_is_copied_and_shared_where_that_can_be() {
        let from = file_with(3 * 4096);
        let to = file_with(0);
        assert!(copy_range(&from, 4096, &to, 8192, 4096).unwrap());
        let mut read = vec![0; 12288];
        to.read_exact_at(&mut read, 0).unwrap();
        assert!(read[..8192].iter().all(|b| *b == 0) && read[8192..].iter().all(|b| *b == 7));
        let beyond = copy_range(&from, 8192, &to, 0, 8192).unwrap_err();
        assert_eq!(beyond.kind(), io::ErrorKind::UnexpectedEof);

        let to = file_with(0);
        to.set_len(4096).unwrap();
        let shared = reflink_range(&from, 0, &to, 0, 4096).unwrap();
        let mut read = [0];
        to.read_exact_at(&mut read, 0).unwrap();
        assert_eq!(read[0] == 7, shared);
        assert!(reflink_range(&from, 0, &to, 0, 0).unwrap());
        assert!(!reflink_range(&from, 1, &to, 0, 4096).unwrap());
        let read_only = File::open("/proc/self/exe").unwrap();
        assert!(!reflink_range(&from, 0, &read_only, 0, 4096).unwrap_or(false));
    }

    #[test]
    fn a_hole_gives_its_blocks_back_and_is_found() {
        let file = file_with(256 * 1024);
        file.sync_all().unwrap();
        if !punch(&file, 65536..131_072).unwrap() {
            return;
        }
        assert_eq!(file.metadata().unwrap().len(), 256 * 1024);
        assert_eq!(next_data(&file, 0).unwrap(), Some(0..65536));
        assert_eq!(next_data(&file, 65536).unwrap(), Some(131_072..262_144));
        assert_eq!(next_data(&file, 262_144).unwrap(), None);
        assert!(punch(&file, 0..0).unwrap());
    }

    #[test]
    fn allocated_blocks_are_taken() {
        let file = tempfile::tempfile().unwrap();
        if allocate(&file, 0..65536).unwrap() {
            let found = file.metadata().unwrap();
            assert!(found.len() == 65536 && found.blocks() * 512 >= 65536);
        }
    }
}
