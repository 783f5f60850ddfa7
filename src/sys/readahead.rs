//! How far the kernel reads ahead of whoever reads in order.
//!
//! **What.** A file system on a disk reads ahead as far as its disk says; one that is mounted from a file has 128 KiB,
//! whatever the disk below the file says, and so asks a quick disk for too little at a time. [`of_disk`] is the one,
//! [`set`] changes the other.
//!
//! **Words.** *backing device information* (bdi): where the kernel keeps it, `/sys/class/bdi/NAME/read_ahead_kb`
//! (`Documentation/ABI/testing/sysfs-class-bdi`).
//!
//! **When it fails.** With the kernel's errno: ENOTTY where a file system does not tell its name (`FS_IOC_GETFSSYSFSPATH`,
//! Linux 6.9), EROFS where `/sys` cannot be written to. Reads are right without it.

use std::ffi::{CStr, OsStr};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// `_IOR(0x15, 1, struct fs_sysfs_path)` of `linux/fs.h`.
const GET_SYSFS_PATH: libc::c_ulong = 0x8081_1501;

/// `struct fs_sysfs_path` of `linux/fs.h`: what the file system is called below `/sys/fs`, with a zero behind it.
#[repr(C)]
struct SysfsPath {
    length: u8,
    name: [u8; 128],
}

/// What the disk that holds the file has, in KiB. `None` where several disks or none do (btrfs, overlayfs, tmpfs).
pub fn of_disk(file: &Path) -> Option<u32> {
    let device = std::fs::metadata(file).ok()?.dev();
    let device = format!("/sys/dev/block/{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    // A partition has its disk's.
    let places = [format!("{device}/queue/read_ahead_kb"), format!("{device}/../queue/read_ahead_kb")];
    places.iter().find_map(|place| std::fs::read_to_string(place).ok())?.trim().parse().ok()
}

/// What the file system that the open directory is on has, in KiB; not where it is on a block device, which has its own.
pub fn of_mount(dir: impl AsFd) -> io::Result<u32> {
    let text = std::fs::read_to_string(place(dir)?)?;
    text.trim().parse().map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "no number"))
}

/// Gives the file system that the open directory is on so much, in KiB.
pub fn set(dir: impl AsFd, kib: u32) -> io::Result<()> {
    std::fs::write(place(dir)?, kib.to_string())
}

fn place(dir: impl AsFd) -> io::Result<PathBuf> {
    let mut path = SysfsPath { length: 0, name: [0; 128] };
    // SAFETY: `path` is the structure that the request fills in, and the descriptor is open during the call.
    let done = unsafe { libc::ioctl(dir.as_fd().as_raw_fd(), GET_SYSFS_PATH, &raw mut path) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    let unknown = || {
        io::Error::new(io::ErrorKind::InvalidData, "the kernel names a file system in a way we do not know")
    };
    let name = CStr::from_bytes_until_nul(&path.name).map_err(|_| unknown())?;
    // "erofs/NAME": the kernel gives both directories one name where the file system has no block device.
    let name = Path::new(OsStr::from_bytes(name.to_bytes())).file_name().ok_or_else(unknown)?;
    Ok(Path::new("/sys/class/bdi").join(name).join("read_ahead_kb"))
}
