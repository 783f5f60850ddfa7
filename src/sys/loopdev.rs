//! Loop devices: a file as a read-only block device (loop(4), `LOOP_CONFIGURE` of Linux 5.8).
//!
//! **What.** [`LoopDevice::open`] takes a free device, puts a file below it and hands back an open descriptor;
//! [`LoopDevice::change`] puts another file below one under a live mount; [`backing_file`] tells what is below a device.
//!
//! **Words.** *autoclear*: the kernel takes the file away when the last user of the device is gone, be it a descriptor or
//! a mount.
//!
//! **Invariants.** Every device is read-only (but for [`LoopDevice::open_writable`]), with blocks of 4096 bytes, direct I/O where the file system below can, and
//! autoclear: whatever kills us, no device stays behind. A file whose length is no multiple of 4096 would lose its tail
//! and is refused.
//!
//! **When it fails.** With the kernel's errno: ENOENT without the loop driver or without `/dev/loop-control`, EACCES or
//! EPERM without the rights, EBUSY when others take the free devices faster than we do.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

const LOOP_CONFIGURE: libc::c_ulong = 0x4c0a;
const LOOP_CHANGE_FD: libc::c_ulong = 0x4c06;
const LOOP_GET_STATUS64: libc::c_ulong = 0x4c05;
const LOOP_SET_CAPACITY: libc::c_ulong = 0x4c07;
const LOOP_SET_DIRECT_IO: libc::c_ulong = 0x4c08;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4c82;
/// `BLKRASET` of `linux/fs.h`.
const BLKRASET: libc::c_ulong = 0x1262;
/// What `BLKRASET` counts in.
const SECTOR: u32 = 512;
const READ_ONLY: u32 = 1;
const AUTOCLEAR: u32 = 4;
const DIRECT_IO: u32 = 16;
const BLOCK: u32 = 4096;
/// How often a free device may be snatched away before we give up.
const TRIES: u32 = 64;

/// `struct loop_info64` of `linux/loop.h`.
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` of `linux/loop.h`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// A loop device that is held open; the file below it goes when this and every mount of it are gone.
#[derive(Debug)]
pub struct LoopDevice {
    path: PathBuf,
    device: OwnedFd,
}

impl LoopDevice {
    /// Makes a read-only device of `file`, whose `name` is shown by losetup(8).
    pub fn open(file: &File, name: &Path) -> io::Result<LoopDevice> {
        LoopDevice::attach(file, name, READ_ONLY)
    }

    /// Makes a device of `file` that can be written to. Discards of it punch holes into the file.
    pub fn open_writable(file: &File, name: &Path) -> io::Result<LoopDevice> {
        LoopDevice::attach(file, name, 0)
    }

    fn attach(file: &File, name: &Path, flags: u32) -> io::Result<LoopDevice> {
        let length = file.metadata()?.len();
        if length == 0 || !length.is_multiple_of(u64::from(BLOCK)) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a length that is no multiple of 4096"));
        }
        let control = File::open("/dev/loop-control")?;
        for _ in 0..TRIES {
            // Between the two calls others may take the same device.
            match LoopDevice::take(&control, file, name, flags) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
                done => return done,
            }
        }
        Err(io::ErrorKind::ResourceBusy.into())
    }

    fn take(control: &File, file: &File, name: &Path, flags: u32) -> io::Result<LoopDevice> {
        // SAFETY: this request takes no argument and writes nothing of ours.
        let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let writable = flags & READ_ONLY == 0;
        let device =
            OpenOptions::new().read(true).write(writable).custom_flags(libc::O_CLOEXEC).open(&path)?;
        let config = config(file, name, flags)?;
        // SAFETY: `config` is the structure that the request reads, and both descriptors are open during the call.
        let done = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(LoopDevice { path, device: device.into() })
    }

    /// A device that has a file below it already. It cannot lose it while this is open.
    pub fn existing(path: &Path) -> io::Result<LoopDevice> {
        let device = OpenOptions::new().read(true).custom_flags(libc::O_CLOEXEC).open(path)?;
        Ok(LoopDevice { path: path.to_owned(), device: device.into() })
    }

    /// `/dev/loopN`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Device and inode numbers of the file below. The kernel asks that file's file system.
    pub fn below(&self) -> io::Result<(u64, u64)> {
        let mut info = LoopInfo::empty();
        // SAFETY: `info` is the structure that the request fills, and the descriptor is open during the call.
        let done = unsafe { libc::ioctl(self.device.as_raw_fd(), LOOP_GET_STATUS64, &raw mut info) };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok((info.device, info.inode))
    }

    /// Puts another file of the same length below, under whatever is mounted (`LOOP_CHANGE_FD`). Reads that have begun end on the
    /// old file first: this waits for them, and whoever waits here cannot be killed.
    pub fn change(&self, file: &File) -> io::Result<()> {
        // SAFETY: the request takes a descriptor as its argument, which is open during the call.
        let done = unsafe { libc::ioctl(self.device.as_raw_fd(), LOOP_CHANGE_FD, file.as_raw_fd()) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Asks for direct I/O; whether it is used is what [`LoopDevice::is_direct`] says.
    pub fn set_direct(&self) -> io::Result<()> {
        // SAFETY: the request takes a number as its argument.
        let done = unsafe { libc::ioctl(self.device.as_raw_fd(), LOOP_SET_DIRECT_IO, 1 as libc::c_ulong) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Whether the file below is read past the page cache.
    pub fn is_direct(&self) -> io::Result<bool> {
        let name = self.path.file_name().unwrap_or_default();
        let text = std::fs::read_to_string(Path::new("/sys/block").join(name).join("loop/dio"))?;
        Ok(text.trim() == "1")
    }

    /// Takes over the length that the file below has by now.
    pub fn grow(&self) -> io::Result<()> {
        // SAFETY: the request takes no argument and writes nothing of ours.
        let done = unsafe { libc::ioctl(self.device.as_raw_fd(), LOOP_SET_CAPACITY) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// How far a file system on it reads ahead, in bytes.
    pub fn set_read_ahead(&self, bytes: u32) -> io::Result<()> {
        // SAFETY: the request takes a number as its argument.
        let done =
            unsafe { libc::ioctl(self.device.as_raw_fd(), BLKRASET, libc::c_ulong::from(bytes / SECTOR)) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl LoopInfo {
    fn empty() -> LoopInfo {
        LoopInfo {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: 0,
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        }
    }
}

impl AsFd for LoopDevice {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.device.as_fd()
    }
}

fn config(file: &File, name: &Path, flags: u32) -> io::Result<LoopConfig> {
    let mut file_name = [0; 64];
    // For people to read only: the end of a long name says more than its beginning. The last byte stays zero.
    let bytes = name.as_os_str().as_bytes();
    let shown = &bytes[bytes.len().saturating_sub(63)..];
    file_name[..shown.len()].copy_from_slice(shown);
    let info = LoopInfo { flags: flags | AUTOCLEAR | DIRECT_IO, file_name, ..LoopInfo::empty() };
    let fd = u32::try_from(file.as_raw_fd()).map_err(io::Error::other)?;
    Ok(LoopConfig { fd, block_size: BLOCK, info, reserved: [0; 8] })
}

/// How many reads of `/dev/loopN` there were.
pub fn reads(device: &Path) -> io::Result<u64> {
    let name = device.file_name().unwrap_or_default();
    let text = std::fs::read_to_string(Path::new("/sys/block").join(name).join("stat"))?;
    let first = text.split_whitespace().next().and_then(|number| number.parse().ok());
    first.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// The file below `/dev/loopN`; `None` if the device has none or is no loop device. A file that was removed has
/// ` (deleted)` behind its name.
pub fn backing_file(device: &Path) -> io::Result<Option<PathBuf>> {
    let Some(name) = device.strip_prefix("/dev").ok().filter(|name| name.components().count() == 1) else {
        return Ok(None);
    };
    match std::fs::read(Path::new("/sys/block").join(name).join("loop/backing_file")) {
        Ok(mut bytes) => {
            if bytes.last() == Some(&b'\n') {
                bytes.pop();
            }
            Ok(Some(PathBuf::from(std::ffi::OsStr::from_bytes(&bytes))))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structures_have_the_kernels_sizes() {
        assert_eq!((size_of::<LoopInfo>(), size_of::<LoopConfig>()), (232, 304));
    }

    #[test]
    fn a_file_that_would_lose_its_tail_is_refused() {
        for length in [0, 4095, 8193] {
            let file = tempfile::tempfile().unwrap();
            file.set_len(length).unwrap();
            let refused = LoopDevice::open(&file, Path::new("x")).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
        }
    }

    #[test]
    fn what_is_no_loop_device_has_no_file_below() {
        for path in ["/dev/null", "/dev/loop999999", "/etc/passwd", "/dev/../etc", "overlay"] {
            assert_eq!(backing_file(Path::new(path)).unwrap(), None, "{path}");
        }
    }
}
