//! The descriptor of a FUSE connection, and a mount of it that no path leads to (fuse(4), `fsopen`, `fsmount`).
//!
//! **What.** [`open`] makes a connection, [`mount`] a file system on it; [`Mount::open`] opens a file of it. What is said on the
//! connection is [`crate::layer::lazy`]'s.
//!
//! **Words.** *unattached*: in nobody's mount table, so that `df` and node exporters never wait for us.
//!
//! **Invariants.** A connection ends when its last descriptor is closed: every read that waits then fails.
//!
//! **When it fails.** ENOENT or ENODEV: this kernel has no FUSE. Calls on the mounted file system wait for whoever serves the
//! connection, and cannot be killed while that is dead: only a helper process may make them.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
    fsmount, fsopen,
};

/// A new connection, which nothing is mounted on yet.
pub fn open() -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    Ok(rustix::fs::open("/dev/fuse", flags, Mode::empty())?)
}

/// Mounts a read-only file system of root's on the connection, unattached. Its first request (`FUSE_INIT`) is on the connection
/// when this returns; nobody need have answered it.
pub fn mount(connection: &OwnedFd) -> io::Result<Mount> {
    let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "source", "speedy")?;
    fsconfig_set_string(&context, "fd", connection.as_raw_fd().to_string())?;
    for (key, value) in [("rootmode", "40000"), ("user_id", "0"), ("group_id", "0")] {
        fsconfig_set_string(&context, key, value)?;
    }
    fsconfig_set_flag(&context, "ro")?;
    fsconfig_create(&context)?;
    let flags = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(Mount { root: fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, flags)? })
}

/// An unattached mount; it is gone when this and every open file of it are closed.
#[derive(Debug)]
pub struct Mount {
    root: OwnedFd,
}

impl Mount {
    /// The mount that this descriptor was made for by [`mount`], in an earlier process perhaps.
    pub fn from_fd(root: OwnedFd) -> Mount {
        Mount { root }
    }

    /// The descriptor, to be kept by somebody.
    pub fn into_fd(self) -> OwnedFd {
        self.root
    }

    /// Opens a file at the root of it for reading. May wait for whoever serves the connection.
    pub fn open(&self, name: &str) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&self.root, name, flags, Mode::empty())?.into())
    }

    /// The device number of its files, as stat(2) and loop devices have it. Asks nobody.
    pub fn device(&self) -> io::Result<u64> {
        let found = self.stat()?;
        Ok(rustix::fs::makedev(found.stx_dev_major, found.stx_dev_minor))
    }

    /// The number of the connection: that of its directory in `/sys/fs/fuse/connections`. Asks nobody.
    pub fn connection(&self) -> io::Result<u32> {
        Ok(self.stat()?.stx_dev_minor)
    }

    fn stat(&self) -> io::Result<rustix::fs::Statx> {
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        Ok(rustix::fs::statx(&self.root, "", flags, StatxFlags::INO)?)
    }
}

impl AsFd for Mount {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }
}

/// Writes one message. ENOENT: the request that it answers is gone, because its reader is or because it was answered before.
pub fn write(connection: &OwnedFd, parts: &[io::IoSlice<'_>]) -> io::Result<()> {
    let expected: usize = parts.iter().map(|part| part.len()).sum();
    match rustix::io::writev(connection, parts)? {
        written if written == expected => Ok(()),
        _ => Err(io::ErrorKind::WriteZero.into()),
    }
}
