//! The mounts Speedy itself makes: short trials that show what the kernel and the backing file system can do, layer
//! images, and volumes that are written to where nobody sees it.
//!
//! Snapshots are never mounted here; containerd mounts what `Mounts` describes.
//!
//! A layer image is mounted read-only and with no other flag. `nodev` or `nosuid` would be inherited by the bind mounts
//! of single layers that containerd makes from the attach point, and devices and setuid files of the image would not work
//! in them; what keeps local users away from these files is the attach points' parent directory, which is 0700.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, MountFlags, MoveMountFlags, UnmountFlags,
    fsconfig_create, fsconfig_reconfigure, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, fspick,
    move_mount,
};

use super::mountinfo::MountEntry;
use super::readahead;

/// `f_type` of EROFS (`EROFS_SUPER_MAGIC_V1` of `linux/magic.h`).
const EROFS_MAGIC: u64 = 0xe0f5_e1e2;

/// The option of an EROFS that is mounted from a file: its data is read past that file's page cache (Linux 6.13).
const DIRECT: &str = "directio";

/// A mounted EROFS that is not visible anywhere yet; it is gone when dropped before it was put somewhere.
#[derive(Debug)]
pub struct DetachedErofs {
    mount: OwnedFd,
}

/// How an EROFS reads the file that it is mounted from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErofsIo {
    /// As the kernel does by default.
    Default,
    /// Past the page cache of the backing file (`directio`, for file-backed mounts): each page is then held once, not
    /// twice.
    Direct,
}

impl DetachedErofs {
    /// Mounts `source`, a block device or (where the kernel has it: Linux 6.12) a regular file.
    ///
    /// ENOTBLK: the kernel mounts no files. ENODEV: it has no EROFS. EINVAL, EUCLEAN: this is no image that it takes.
    pub fn mount(source: &Path, io: ErofsIo) -> io::Result<DetachedErofs> {
        let context = fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(&context, "source", source)?;
        fsconfig_set_flag(&context, "ro")?;
        if io == ErofsIo::Direct {
            fsconfig_set_flag(&context, DIRECT)?;
        }
        fsconfig_create(&context)?;
        let flags = MountAttrFlags::MOUNT_ATTR_RDONLY;
        let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, flags)?;
        Ok(DetachedErofs { mount })
    }

    /// Whether the image has a directory of this name at its root.
    pub fn has_directory(&self, name: &str) -> io::Result<bool> {
        is_directory(&self.mount, name)
    }

    /// Reads ahead so many KiB; for an image that is mounted from a file.
    pub fn set_read_ahead(&self, kib: u32) -> io::Result<()> {
        readahead::set(root(&self.mount)?, kib)
    }

    /// Makes the mount visible at `point`, a descriptor of a directory.
    pub fn attach(self, point: impl AsFd) -> io::Result<()> {
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        Ok(move_mount(&self.mount, "", point, "", flags)?)
    }
}

/// A file system that is mounted where nobody sees it; it is unmounted when dropped, and when the process ends.
#[derive(Debug)]
pub struct PrivateMount {
    mount: OwnedFd,
}

impl PrivateMount {
    /// Mounts the block device `source` as a `kind`, with these options (`name` or `name=value`).
    pub fn new(kind: &str, source: &Path, options: &[&str]) -> io::Result<PrivateMount> {
        let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(&context, "source", source)?;
        for option in options {
            match option.split_once('=') {
                Some((name, value)) => fsconfig_set_string(&context, name, value)?,
                None => fsconfig_set_flag(&context, *option)?,
            }
        }
        fsconfig_create(&context)?;
        let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
        Ok(PrivateMount { mount })
    }

    /// Its root directory, opened.
    pub fn root(&self) -> io::Result<OwnedFd> {
        root(&self.mount)
    }

    /// A path to its root directory that works in this process.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/.", std::os::fd::AsRawFd::as_raw_fd(&self.mount)))
    }
}

fn root(mount: impl AsFd) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(mount, ".", flags, Mode::empty())?)
}

/// Whether an EROFS, mounted from a file, reads its data through that file's page cache.
pub fn is_cached(entry: &MountEntry) -> bool {
    entry.kind == "erofs"
        && !entry.source.starts_with("/dev/")
        && entry.super_options.iter().all(|option| option != DIRECT)
}

/// The EROFS that `root` is the root directory of (`O_PATH` is enough) reads its data past the page cache of its file from
/// now on, for whoever uses it wherever it is mounted.
pub fn read_past_cache(root: impl AsFd) -> io::Result<()> {
    let context = fspick(root, "", FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH)?;
    fsconfig_set_flag(&context, DIRECT)?;
    Ok(fsconfig_reconfigure(&context)?)
}

fn is_directory(parent: impl AsFd, name: &str) -> io::Result<bool> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat(parent, name, flags, Mode::empty()) {
        Ok(_) => Ok(true),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// What stands at a path that may be an attach point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PointState {
    /// Nothing.
    Absent,
    /// A directory on which no EROFS is mounted.
    Directory,
    /// An EROFS is mounted there.
    Erofs,
    /// Something else: a file, or a symlink wherever it leads.
    Other,
}

/// A path looked at without following a link at its end; with the directory, where it is one.
pub fn look(point: &Path) -> io::Result<(PointState, Option<OwnedFd>)> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::open(point, flags, Mode::empty()) {
        Ok(dir) if is_erofs(&dir)? => Ok((PointState::Erofs, Some(dir))),
        Ok(dir) => Ok((PointState::Directory, Some(dir))),
        Err(Errno::NOENT) => Ok((PointState::Absent, None)),
        Err(Errno::NOTDIR | Errno::LOOP) => Ok((PointState::Other, None)),
        Err(errno) => Err(errno.into()),
    }
}

/// Whether `point` shows, in this mount namespace, an EROFS with the directory `name` at its root.
pub fn shows_erofs_with(point: &Path, name: &str) -> io::Result<bool> {
    match look(point)? {
        (PointState::Erofs, Some(dir)) => is_directory(&dir, name),
        _ => Ok(false),
    }
}

fn is_erofs(dir: impl AsFd) -> io::Result<bool> {
    let found = rustix::fs::fstatfs(dir)?;
    Ok(u64::try_from(found.f_type).is_ok_and(|kind| kind == EROFS_MAGIC))
}

/// How a mount goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unmount {
    /// At once and in full, or not at all (EBUSY): nobody holds a file open through this mount. An overlay on top holds
    /// its own copy of the mount, so it neither hinders this nor notices.
    IfUnused,
    /// Out of sight now; whoever still holds a file open there goes on reading it.
    FromSight,
}

/// Unmounts what is on top at `point`, without following a link at its end. `false` if nothing is mounted there.
pub fn unmount(point: &Path, how: Unmount) -> io::Result<bool> {
    let flags = match how {
        Unmount::IfUnused => UnmountFlags::NOFOLLOW,
        Unmount::FromSight => UnmountFlags::NOFOLLOW | UnmountFlags::DETACH,
    };
    match rustix::mount::unmount(point, flags) {
        Ok(()) => Ok(true),
        // EINVAL: not a mount point.
        Err(Errno::INVAL | Errno::NOENT) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// A mount that is taken away when dropped.
#[derive(Debug)]
pub struct TrialMount {
    target: PathBuf,
}

impl TrialMount {
    /// Mounts an overlay with these comma-joined options on `target`.
    pub fn overlay(target: &Path, options: &str) -> io::Result<TrialMount> {
        let data = std::ffi::CString::new(options)?;
        rustix::mount::mount("overlay", target, "overlay", MountFlags::empty(), data.as_c_str())?;
        Ok(TrialMount { target: target.to_owned() })
    }
}

/// Unmounts `target` if something is mounted there.
pub fn unmount_leftover(target: &Path) {
    // Not a mount point is the ordinary case, and an error: there is nothing to do then.
    while rustix::mount::unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).is_ok() {}
}

impl Drop for TrialMount {
    fn drop(&mut self) {
        if let Err(error) = rustix::mount::unmount(&self.target, UnmountFlags::DETACH) {
            tracing::warn!(target = %self.target.display(), %error, "cannot unmount a trial mount");
        }
    }
}
