//! Block devices, and file systems on them that grow while they are mounted.
//!
//! Offsets and lengths are bytes unless said otherwise.
//!
//! **When it fails.** With the kernel's errno; EBUSY from [`open_exclusive`] means that somebody uses the device.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

/// `BLKDISCARD` of `linux/fs.h`.
const BLKDISCARD: libc::c_ulong = 0x1277;
/// `EXT4_IOC_RESIZE_FS`, `_IOW('f', 16, __u64)`.
const EXT4_RESIZE: libc::c_ulong = 0x4008_6610;
/// `XFS_IOC_FSGROWFSDATA`, `_IOW('X', 110, struct xfs_growfs_data)`.
const XFS_GROW: libc::c_ulong = 0x4010_586e;

/// `struct xfs_growfs_data`.
#[repr(C)]
struct XfsGrow {
    blocks: u64,
    inode_share: u32,
    padding: u32,
}

/// Opens a block device that nobody else uses: neither mounted, nor below another device, nor held so by others.
pub fn open_exclusive(path: &Path) -> io::Result<File> {
    let file =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_EXCL | libc::O_CLOEXEC).open(path)?;
    match file.metadata()?.file_type().is_block_device() {
        true => Ok(file),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "this is no block device")),
    }
}

/// Major and minor number of a block device.
pub fn numbers(path: &Path) -> io::Result<(u32, u32)> {
    let found = std::fs::metadata(path)?;
    if !found.file_type().is_block_device() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "this is no block device"));
    }
    Ok((rustix::fs::major(found.rdev()), rustix::fs::minor(found.rdev())))
}

/// Its length.
pub fn length(mut device: &File) -> io::Result<u64> {
    device.seek(SeekFrom::End(0))
}

/// Says that nobody needs what a part of a device holds.
pub fn discard(device: &File, offset: u64, length: u64) -> io::Result<()> {
    let range = [offset, length];
    // SAFETY: the request reads two numbers of 64 bits, and the descriptor is open during the call.
    let done = unsafe { libc::ioctl(device.as_raw_fd(), BLKDISCARD, range.as_ptr()) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Grows the ext4 that holds the open directory to so many blocks of its own size.
pub fn grow_ext4(dir: impl AsFd, blocks: u64) -> io::Result<()> {
    // SAFETY: the request reads one number of 64 bits, and the descriptor is open during the call.
    let done = unsafe { libc::ioctl(dir.as_fd().as_raw_fd(), EXT4_RESIZE, &raw const blocks) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Grows the xfs that holds the open directory to so many blocks of its own size; its inodes may take this share, in percent.
pub fn grow_xfs(dir: impl AsFd, blocks: u64, inode_share: u32) -> io::Result<()> {
    let grow = XfsGrow { blocks, inode_share, padding: 0 };
    // SAFETY: `grow` is the structure that the request reads, and the descriptor is open during the call.
    let done = unsafe { libc::ioctl(dir.as_fd().as_raw_fd(), XFS_GROW, &raw const grow) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_block_device_is_refused() {
        for path in ["/dev/null", "/proc/self/status"] {
            let path = Path::new(path);
            assert_eq!(numbers(path).unwrap_err().kind(), io::ErrorKind::InvalidInput);
            assert!(open_exclusive(path).is_err());
        }
        let file = tempfile::tempfile().unwrap();
        file.set_len(12345).unwrap();
        assert_eq!(length(&file).unwrap(), 12345);
        assert!(discard(&file, 0, 4096).is_err());
        assert!(grow_ext4(&file, 1).is_err() && grow_xfs(&file, 1, 25).is_err());
    }
}
