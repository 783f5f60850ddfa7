//! Files below one directory, whose names others chose: made, changed and found without ever leaving it.
//!
//! **What.** [`Dir`] is an open directory in which names are used; [`Node`] is one file, held without being opened, whose
//! attributes are set. Both keep meaning the same file whatever happens to names.
//!
//! **Invariants.** Every operation on a name takes a single name and follows no symlink. Paths of several names go through
//! openat2(2) with `RESOLVE_BENEATH`: the kernel itself refuses to leave the directory. Nothing here crosses a mount.
//!
//! **When it fails.** With the kernel's errno.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, XattrFlags,
};
use rustix::fs::{Gid, Uid};
use rustix::io::Errno;

use super::tree::{self, Cancelled, TreeError};

const PATH: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// The kernel's limit for a list of names, and for a value (`XATTR_LIST_MAX`, `XATTR_SIZE_MAX`).
const XATTRS_MAX: usize = 64 * 1024;

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeType {
    /// A directory.
    Directory,
    /// A symlink.
    Symlink,
    /// A regular file.
    File,
    /// A device, a fifo or a socket.
    Special,
}

impl NodeType {
    fn of(stat: &Stat) -> NodeType {
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => NodeType::Directory,
            FileType::Symlink => NodeType::Symlink,
            FileType::RegularFile => NodeType::File,
            _ => NodeType::Special,
        }
    }
}

/// A special file to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special {
    /// A character device.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
}

/// An open directory.
#[derive(Debug)]
pub struct Dir {
    fd: OwnedFd,
}

impl Dir {
    /// Opens the directory at `path`, which must not be a symlink itself.
    pub fn open(path: &Path) -> io::Result<Dir> {
        let fd = rustix::fs::openat(CWD, path, PATH | OFlags::DIRECTORY, Mode::empty())?;
        Ok(Dir { fd })
    }

    /// The directory at `path` (names between slashes; empty for this one). `None` if something on the way is missing, no
    /// directory, or a symlink.
    pub fn find(&self, path: &[u8]) -> io::Result<Option<Dir>> {
        let path = if path.is_empty() { b"." } else { path };
        match self.resolve(path, PATH | OFlags::DIRECTORY, ResolveFlags::NO_SYMLINKS) {
            Ok(fd) => Ok(Some(Dir { fd })),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// What is at `path`, where symlinks before the last name are followed as long as they stay below this directory.
    /// `None` where nothing is, where it leads out of here, and where links go on for too long; ENOTDIR where something
    /// on the way is not a directory.
    pub fn look(&self, path: &[u8]) -> io::Result<Option<Node>> {
        let path = if path.is_empty() { b"." } else { path };
        match self.resolve(path, PATH, ResolveFlags::empty()) {
            Ok(fd) => Ok(Some(Node { fd })),
            Err(Errno::NOENT | Errno::XDEV | Errno::LOOP) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    fn resolve(&self, path: &[u8], flags: OFlags, more: ResolveFlags) -> Result<OwnedFd, Errno> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV | more;
        loop {
            // EAGAIN: something was renamed meanwhile, and the kernel could not be sure.
            match rustix::fs::openat2(&self.fd, path, flags, Mode::empty(), resolve) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                done => return done,
            }
        }
    }

    /// What `name` stands for; `None` if there is nothing of this name.
    pub fn kind(&self, name: &[u8]) -> io::Result<Option<NodeType>> {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        match rustix::fs::statat(&self.fd, single(name)?, flags) {
            Ok(stat) => Ok(Some(NodeType::of(&stat))),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The file called `name`.
    pub fn node(&self, name: &[u8]) -> io::Result<Node> {
        Ok(Node { fd: rustix::fs::openat(&self.fd, single(name)?, PATH, Mode::empty())? })
    }

    /// The directory called `name`; ENOTDIR if it is anything else.
    pub fn child(&self, name: &[u8]) -> io::Result<Dir> {
        let fd = rustix::fs::openat(&self.fd, single(name)?, PATH | OFlags::DIRECTORY, Mode::empty())?;
        Ok(Dir { fd })
    }

    /// Makes a directory for its owner alone.
    pub fn make_directory(&self, name: &[u8]) -> io::Result<()> {
        Ok(rustix::fs::mkdirat(&self.fd, single(name)?, Mode::RWXU)?)
    }

    /// Makes an empty file for its owner alone, open for writing.
    pub fn make_file(&self, name: &[u8]) -> io::Result<File> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&self.fd, single(name)?, flags, Mode::RUSR | Mode::WUSR)?.into())
    }

    /// Makes a symlink with any target.
    pub fn make_symlink(&self, name: &[u8], target: &[u8]) -> io::Result<()> {
        Ok(rustix::fs::symlinkat(target, &self.fd, single(name)?)?)
    }

    /// Makes a special file without permissions.
    pub fn make_special(&self, name: &[u8], special: Special) -> io::Result<()> {
        let (kind, device) = match special {
            Special::CharDevice { major, minor } => {
                (FileType::CharacterDevice, rustix::fs::makedev(major, minor))
            }
            Special::BlockDevice { major, minor } => {
                (FileType::BlockDevice, rustix::fs::makedev(major, minor))
            }
            Special::Fifo => (FileType::Fifo, 0),
        };
        Ok(rustix::fs::mknodat(&self.fd, single(name)?, kind, Mode::empty(), device)?)
    }

    /// Makes `name` another name of what `other` is in `from`, which may be a symlink.
    pub fn make_link(&self, name: &[u8], from: &Dir, other: &[u8]) -> io::Result<()> {
        Ok(rustix::fs::linkat(&from.fd, single(other)?, &self.fd, single(name)?, AtFlags::empty())?)
    }

    /// Removes `name` and everything below it; succeeds when nothing is there.
    pub fn remove(&self, name: &[u8], cancelled: Cancelled<'_>) -> Result<(), TreeError> {
        let at = |source: io::Error| TreeError::Io { path: self.magic_path(name), source };
        match rustix::fs::unlinkat(&self.fd, single(name).map_err(at)?, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(Errno::ISDIR) => tree::remove(&self.magic_path(name), cancelled),
            Err(errno) => Err(at(errno.into())),
        }
    }

    /// Names and types of what is in here, without `.` and `..`.
    pub fn list(&self) -> io::Result<Vec<(Vec<u8>, NodeType)>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let reader = rustix::fs::openat(&self.fd, ".", flags, Mode::empty())?;
        let mut found = Vec::new();
        for entry in rustix::fs::Dir::new(reader)? {
            let name = entry?.file_name().to_bytes().to_vec();
            if name != b"." && name != b".." {
                let kind = self.kind(&name)?;
                found.extend(kind.map(|kind| (name, kind)));
            }
        }
        Ok(found)
    }

    /// Permission bits (with setuid, setgid and sticky), owner and group.
    pub fn ownership(&self) -> io::Result<(u16, u32, u32)> {
        let stat = rustix::fs::fstat(&self.fd)?;
        Ok((u16::try_from(stat.st_mode & 0o7777).unwrap_or_default(), stat.st_uid, stat.st_gid))
    }

    /// Names and values of all extended attributes that this process may see.
    pub fn xattrs(&self) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let path = magic_path(&self.fd);
        let mut names = vec![0; XATTRS_MAX];
        let length = match rustix::fs::listxattr(&path, &mut names) {
            Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
            length => length?,
        };
        names.truncate(length);
        let mut found = Vec::new();
        for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
            let mut value = vec![0; XATTRS_MAX];
            match rustix::fs::getxattr(&path, name, &mut value) {
                Ok(length) => found.push((name.to_vec(), value[..length].to_vec())),
                // Taken away between the two calls, or listed by a layer of the kernel that does not have it.
                Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(found)
    }

    /// The directory itself, to set its attributes.
    pub fn as_node(&self) -> io::Result<Node> {
        Ok(Node { fd: self.fd.try_clone()? })
    }

    /// A path that leads through the descriptor, for calls that take nothing else.
    fn magic_path(&self, name: &[u8]) -> PathBuf {
        use std::os::unix::ffi::OsStrExt;
        magic_path(&self.fd).join(std::ffi::OsStr::from_bytes(name))
    }
}

fn magic_path(fd: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// Names are used one at a time: a slash in one would be a path, `..` would lead up.
fn single(name: &[u8]) -> io::Result<&[u8]> {
    match name {
        b"" | b"." | b".." => Err(io::ErrorKind::InvalidInput.into()),
        name if name.contains(&b'/') => Err(io::ErrorKind::InvalidInput.into()),
        name => Ok(name),
    }
}

/// A file of any kind that is held, but not opened.
#[derive(Debug)]
pub struct Node {
    fd: OwnedFd,
}

impl Node {
    /// What it is.
    pub fn kind(&self) -> io::Result<NodeType> {
        Ok(NodeType::of(&rustix::fs::fstat(&self.fd)?))
    }

    /// Sets an extended attribute, unless the file has it.
    pub fn add_xattr(&self, name: &[u8], value: &[u8]) -> io::Result<XattrAnswer> {
        match rustix::fs::setxattr(magic_path(&self.fd), name, value, XattrFlags::CREATE) {
            Err(Errno::EXIST) => Ok(XattrAnswer::Set),
            set => answer(set),
        }
    }

    /// The target of a symlink.
    pub fn target(&self) -> io::Result<Vec<u8>> {
        Ok(rustix::fs::readlinkat(&self.fd, "", Vec::new())?.into_bytes())
    }
}

impl Attributed for Node {
    fn set_owner(&self, uid: Option<u32>, gid: Option<u32>) -> io::Result<()> {
        set_owner(&self.fd, uid, gid)
    }

    fn set_mode(&self, mode: u16) -> io::Result<()> {
        let mode = Mode::from_raw_mode(mode.into());
        Ok(rustix::fs::chmodat(CWD, magic_path(&self.fd), mode, AtFlags::empty())?)
    }

    fn set_xattr(&self, name: &[u8], value: &[u8]) -> io::Result<XattrAnswer> {
        // The link in /proc leads to the very file; what that is, a symlink for instance, is not followed.
        answer(rustix::fs::setxattr(magic_path(&self.fd), name, value, XattrFlags::empty()))
    }

    fn set_times(&self, seconds: u64, nanoseconds: u32) -> io::Result<()> {
        let times = times(seconds, nanoseconds);
        Ok(rustix::fs::utimensat(&self.fd, "", &times, AtFlags::EMPTY_PATH)?)
    }
}

/// A file whose attributes can be set: one that is held, or (with one call less each) one that is open for writing.
pub trait Attributed {
    /// Sets owner and group; what is `None` stays. As always, this takes setuid, setgid and capabilities away.
    fn set_owner(&self, uid: Option<u32>, gid: Option<u32>) -> io::Result<()>;
    /// Sets the permission bits, setuid, setgid and sticky. Not for symlinks, which have none.
    fn set_mode(&self, mode: u16) -> io::Result<()>;
    /// Sets an extended attribute, also of a symlink itself.
    fn set_xattr(&self, name: &[u8], value: &[u8]) -> io::Result<XattrAnswer>;
    /// Sets the times of access and change, in seconds and nanoseconds since 1970.
    fn set_times(&self, seconds: u64, nanoseconds: u32) -> io::Result<()>;
}

/// What the kernel says to an extended attribute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum XattrAnswer {
    /// It is set.
    Set,
    /// Nobody here knows attributes of this name, or of this kind of file.
    Unsupported,
    /// Not allowed: `user.` attributes of what is neither a file nor a directory, `trusted.` without the right to.
    Forbidden,
    /// Name or value cannot be.
    Malformed,
}

fn answer(set: Result<(), Errno>) -> io::Result<XattrAnswer> {
    match set {
        Ok(()) => Ok(XattrAnswer::Set),
        Err(Errno::OPNOTSUPP) => Ok(XattrAnswer::Unsupported),
        Err(Errno::PERM) => Ok(XattrAnswer::Forbidden),
        Err(Errno::INVAL | Errno::RANGE | Errno::TOOBIG) => Ok(XattrAnswer::Malformed),
        Err(errno) => Err(errno.into()),
    }
}

impl Attributed for File {
    fn set_owner(&self, uid: Option<u32>, gid: Option<u32>) -> io::Result<()> {
        set_owner(self, uid, gid)
    }

    fn set_mode(&self, mode: u16) -> io::Result<()> {
        Ok(rustix::fs::fchmod(self, Mode::from_raw_mode(mode.into()))?)
    }

    fn set_xattr(&self, name: &[u8], value: &[u8]) -> io::Result<XattrAnswer> {
        answer(rustix::fs::fsetxattr(self, name, value, XattrFlags::empty()))
    }

    fn set_times(&self, seconds: u64, nanoseconds: u32) -> io::Result<()> {
        Ok(rustix::fs::futimens(self, &times(seconds, nanoseconds))?)
    }
}

fn set_owner(file: impl AsFd, uid: Option<u32>, gid: Option<u32>) -> io::Result<()> {
    let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
    Ok(rustix::fs::chownat(file, "", uid, gid, AtFlags::EMPTY_PATH)?)
}

fn times(seconds: u64, nanoseconds: u32) -> Timestamps {
    let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
    let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() };
    Timestamps { last_access: time, last_modification: time }
}
