//! Walks over directory trees that containers have written: removing one, and measuring one.
//!
//! The content is hostile: trees may be deeper than a stack or a descriptor table, names are arbitrary bytes, symlinks
//! point anywhere, and something may be mounted inside. So a walk holds two descriptors at most whatever the depth
//! (it goes up again through `..` and checks that it arrived where it came from), opens every directory relative to
//! its parent without following links, and lets the kernel refuse mount points (`RESOLVE_NO_XDEV`, Linux 5.6).
//!
//! Invariant **D3**: no recursive delete crosses a mount point.

use std::collections::HashSet;
use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RawDir, ResolveFlags, Stat};
use rustix::io::Errno;

/// Asked between steps; `true` ends the walk with [`TreeError::Cancelled`].
pub type Cancelled<'a> = &'a dyn Fn() -> bool;

/// Why a walk did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// Something is mounted inside the tree. Nothing below the mount point was touched.
    #[error("{0} is a mount point; unmount it first")]
    MountPoint(PathBuf),
    /// The caller asked to stop. What was removed is gone; the rest is as it was.
    #[error("stopped before the end")]
    Cancelled,
    /// The system refused.
    #[error("{path}: {source}")]
    Io {
        /// Where.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

/// What a tree takes.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Measure {
    /// Allocated bytes (512-byte blocks of each inode), each inode once.
    pub bytes: u64,
    /// Distinct inodes, the top directory included.
    pub inodes: u64,
}

/// Removes the tree at `top`, `top` included. Succeeds when nothing is there. What cannot be removed (a mount point, an
/// immutable file) stays with the directories above it; everything else goes, and the first such error is returned.
pub fn remove(top: &Path, cancelled: Cancelled<'_>) -> Result<(), TreeError> {
    let Some(dir) = open_top(top)? else { return Ok(()) };
    let mut walk = Walk::new(top, dir);
    let mut first_error = None;
    walk.run(cancelled, &mut |walk: &Walk<'_>, event: Event<'_>| {
        let removed = match event {
            Event::Leaf(name) => unlink(walk, name, AtFlags::empty()),
            Event::Left(name) => unlink(walk, name, AtFlags::REMOVEDIR),
            Event::Entered => Ok(()),
            Event::MountPoint(name) => Err(TreeError::MountPoint(walk.path_of(name))),
        };
        if let Err(error) = removed {
            first_error.get_or_insert(error);
        }
        Ok(())
    })?;
    if let Some(error) = first_error {
        return Err(error);
    }
    match std::fs::remove_dir(top) {
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
            Err(TreeError::MountPoint(top.to_owned()))
        }
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(TreeError::Io { path: top.to_owned(), source: error })
        }
        _ => Ok(()),
    }
}

/// Measures the tree at `top`, without what is mounted inside. Entries that disappear during the walk are skipped: a
/// container may be writing there.
pub fn measure(top: &Path, cancelled: Cancelled<'_>) -> Result<Measure, TreeError> {
    let Some(dir) = open_top(top)? else {
        return Err(TreeError::Io { path: top.to_owned(), source: io::ErrorKind::NotFound.into() });
    };
    let mut measure = Measure::default();
    // Only files with several links can be met twice; remembering just those keeps the set small.
    let mut linked: HashSet<(u64, u64)> = HashSet::new();
    let mut count = |stat: &Stat, directory: bool| {
        if directory || stat.st_nlink < 2 || linked.insert((stat.st_dev, stat.st_ino)) {
            measure.inodes += 1;
            measure.bytes += u64::try_from(stat.st_blocks).unwrap_or(0) * 512;
        }
    };
    let mut walk = Walk::new(top, dir);
    walk.run(cancelled, &mut |walk: &Walk<'_>, event: Event<'_>| {
        match event {
            Event::Leaf(name) => {
                match rustix::fs::statat(&walk.dir, name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT) {
                    Ok(stat) => count(&stat, false),
                    Err(Errno::NOENT) => {}
                    Err(errno) => return Err(walk.error(name, errno)),
                }
            }
            Event::Entered => {
                let stat = rustix::fs::fstat(&walk.dir).map_err(|e| walk.error(c"", e))?;
                count(&stat, true);
            }
            Event::Left(_) | Event::MountPoint(_) => {}
        }
        Ok(())
    })?;
    Ok(measure)
}

/// Writes everything of the file system that holds `path` to its device (syncfs(2)).
pub fn sync_file_system(path: &Path) -> io::Result<()> {
    let dir = std::fs::File::open(path)?;
    Ok(rustix::fs::syncfs(&dir)?)
}

/// Whether reading the directory `path` tells the type of each entry (`d_type`), which overlayfs needs for whiteouts.
/// The directory must hold at least one entry beside `.` and `..`.
pub fn tells_types(path: &Path) -> io::Result<bool> {
    let dir = std::fs::File::open(path)?;
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut entries = RawDir::new(&dir, &mut buffer);
    let mut told = true;
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let dots = entry.file_name() == c"." || entry.file_name() == c"..";
        told &= dots || entry.file_type() != FileType::Unknown;
    }
    Ok(told)
}

/// What a walk meets, in this order: a directory is entered, its leaves follow, then each of its sub-directories is
/// entered and left (the walk is then back in the parent).
enum Event<'a> {
    Entered,
    Leaf(&'a CStr),
    Left(&'a CStr),
    MountPoint(&'a CStr),
}

/// One directory on the way down: what it is, and its sub-directories that are still to be visited.
struct Frame {
    identity: (u64, u64),
    name: CString,
    directories: Vec<CString>,
}

struct Walk<'a> {
    top: &'a Path,
    dir: OwnedFd,
    frames: Vec<Frame>,
}

type Visit<'v> = &'v mut dyn FnMut(&Walk<'_>, Event<'_>) -> Result<(), TreeError>;

impl<'a> Walk<'a> {
    fn new(top: &'a Path, dir: OwnedFd) -> Walk<'a> {
        Walk { top, dir, frames: Vec::new() }
    }

    fn run(&mut self, cancelled: Cancelled<'_>, visit: Visit<'_>) -> Result<(), TreeError> {
        self.enter(CString::default(), cancelled, visit)?;
        while let Some(frame) = self.frames.last_mut() {
            if cancelled() {
                return Err(TreeError::Cancelled);
            }
            if let Some(name) = frame.directories.pop() {
                match open_below(&self.dir, &name) {
                    Ok(child) => {
                        self.dir = child;
                        self.enter(name, cancelled, visit)?;
                    }
                    Err(Errno::XDEV) => visit(self, Event::MountPoint(&name))?,
                    Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
                    Err(errno) => return Err(self.error(&name, errno)),
                }
                continue;
            }
            self.leave(visit)?;
        }
        Ok(())
    }

    /// Reads the directory just opened: leaves are visited at once, sub-directories kept for later.
    fn enter(&mut self, name: CString, cancelled: Cancelled<'_>, visit: Visit<'_>) -> Result<(), TreeError> {
        let stat = rustix::fs::fstat(&self.dir).map_err(|e| self.error(&name, e))?;
        visit(self, Event::Entered)?;
        let mut directories = Vec::new();
        let mut buffer = [MaybeUninit::uninit(); 16 * 1024];
        // A second open file description, so that unlinking while reading does not disturb the walk's own descriptor.
        let reader = open_below(&self.dir, c".").map_err(|e| self.error(&name, e))?;
        let mut entries = RawDir::new(&reader, &mut buffer);
        let mut seen = 0_u32;
        while let Some(entry) = entries.next() {
            let entry = entry.map_err(|e| self.error(&name, e))?;
            let child = entry.file_name();
            if child == c"." || child == c".." {
                continue;
            }
            seen = seen.wrapping_add(1);
            if seen.is_multiple_of(256) && cancelled() {
                return Err(TreeError::Cancelled);
            }
            if is_directory(&self.dir, child, entry.file_type()) {
                directories.push(child.to_owned());
            } else {
                visit(self, Event::Leaf(child))?;
            }
        }
        self.frames.push(Frame { identity: (stat.st_dev, stat.st_ino), name, directories });
        Ok(())
    }

    fn leave(&mut self, visit: Visit<'_>) -> Result<(), TreeError> {
        let Some(done) = self.frames.pop() else { return Ok(()) };
        let Some(parent) = self.frames.last() else { return Ok(()) };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let up = rustix::fs::openat(&self.dir, c"..", flags, Mode::empty())
            .map_err(|e| self.error(&done.name, e))?;
        let stat = rustix::fs::fstat(&up).map_err(|e| self.error(&done.name, e))?;
        if (stat.st_dev, stat.st_ino) != parent.identity {
            // Somebody moved the directory while we were in it: going on from there could leave the tree.
            return Err(TreeError::Io {
                path: self.path_of(&done.name),
                source: io::Error::other("the directory was moved during the walk"),
            });
        }
        self.dir = up;
        visit(self, Event::Left(&done.name))
    }

    /// Where `name` in the current directory is, for messages.
    fn path_of(&self, name: &CStr) -> PathBuf {
        let mut path = self.top.to_owned();
        let names = self.frames.iter().map(|f| f.name.as_c_str()).chain([name]);
        names.filter(|n| !n.is_empty()).for_each(|n| path.push(OsStr::from_bytes(n.to_bytes())));
        path
    }

    fn error(&self, name: &CStr, errno: Errno) -> TreeError {
        TreeError::Io { path: self.path_of(name), source: errno.into() }
    }
}

fn unlink(walk: &Walk<'_>, name: &CStr, flags: AtFlags) -> Result<(), TreeError> {
    match rustix::fs::unlinkat(&walk.dir, name, flags) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::BUSY) => Err(TreeError::MountPoint(walk.path_of(name))),
        Err(errno) => Err(walk.error(name, errno)),
    }
}

fn open_top(top: &Path) -> Result<Option<OwnedFd>, TreeError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat(CWD, top, flags, Mode::empty()) {
        Ok(dir) => Ok(Some(dir)),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(TreeError::Io { path: top.to_owned(), source: errno.into() }),
    }
}

fn open_below(dir: impl AsFd, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NOATIME;
    let resolve = ResolveFlags::NO_XDEV | ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    match rustix::fs::openat2(&dir, name, flags, Mode::empty(), resolve) {
        // O_NOATIME is for the owner only; the walk matters more than the access time.
        Err(Errno::PERM) => rustix::fs::openat2(&dir, name, flags - OFlags::NOATIME, Mode::empty(), resolve),
        other => other,
    }
}

fn is_directory(dir: &OwnedFd, name: &CStr, kind: FileType) -> bool {
    match kind {
        FileType::Directory => true,
        FileType::Unknown => rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)
            .is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::Directory),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    const GO_ON: Cancelled<'static> = &|| false;

    #[test]
    fn removes_everything_and_follows_no_link() {
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("precious"), "x").unwrap();
        let top = dir.path().join("top");
        fs::create_dir_all(top.join("a/b/c")).unwrap();
        fs::write(top.join("a/b/file"), "x").unwrap();
        std::os::unix::fs::symlink(&outside, top.join("a/link")).unwrap();
        std::os::unix::fs::symlink("nowhere", top.join("dangling")).unwrap();
        fs::write(top.join(OsStr::from_bytes(b"not \xff utf-8\n")), "x").unwrap();
        remove(&top, GO_ON).unwrap();
        assert!(!top.exists());
        assert!(outside.join("precious").exists());
        remove(&top, GO_ON).unwrap();
    }

    /// A container can nest directories deeper than a thread's stack, a path or the descriptor table allow.
    #[test]
    fn depth_is_bounded_by_neither_stack_nor_descriptors() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("top");
        fs::create_dir(&top).unwrap();
        let mut at = open_top(&top).unwrap().unwrap();
        for _ in 0..3_000 {
            rustix::fs::mkdirat(&at, c"deeper", Mode::RWXU).unwrap();
            at = open_below(&at, c"deeper").unwrap();
        }
        drop(at);
        assert_eq!(measure(&top, GO_ON).unwrap().inodes, 3_001);
        remove(&top, GO_ON).unwrap();
        assert!(!top.exists());
    }

    #[test]
    fn many_entries_in_one_directory_all_go() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("top");
        fs::create_dir(&top).unwrap();
        for n in 0..5_000 {
            fs::write(top.join(format!("file-{n}")), "").unwrap();
        }
        assert_eq!(measure(&top, GO_ON).unwrap().inodes, 5_001);
        remove(&top, GO_ON).unwrap();
        assert!(!top.exists());
    }

    #[test]
    fn hard_links_count_once_and_holes_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path();
        fs::write(top.join("one"), vec![1_u8; 8192]).unwrap();
        fs::hard_link(top.join("one"), top.join("two")).unwrap();
        fs::File::create(top.join("hole")).unwrap().set_len(1 << 30).unwrap();
        let measure = measure(top, GO_ON).unwrap();
        assert_eq!(measure.inodes, 3);
        assert!(measure.bytes < 64 * 1024, "{measure:?}");
    }

    #[test]
    fn a_cancelled_removal_stops_and_can_be_taken_up_again() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("top");
        for n in 0..10 {
            fs::create_dir_all(top.join(format!("{n}/x"))).unwrap();
        }
        let steps = std::cell::Cell::new(0);
        let after_five = || {
            steps.set(steps.get() + 1);
            steps.get() > 5
        };
        assert!(matches!(remove(&top, &after_five), Err(TreeError::Cancelled)));
        assert!(top.exists());
        remove(&top, GO_ON).unwrap();
        assert!(!top.exists());
    }
}
