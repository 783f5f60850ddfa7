//! What stands at a path inside a directory, as somebody would see it whose root that directory is.

use std::io;
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Look {
    /// A directory with these attributes.
    Directory {
        /// Permission bits with setuid, setgid and sticky.
        mode: u32,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
        /// Extended attributes: names and values.
        xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    },
    /// Something else.
    Other,
}

/// What `path` (names from the root) leads to inside `root`, symlinks followed, the last one too, none out of `root`; `None` for
/// nothing.
pub fn in_root(root: &Path, path: &[&[u8]]) -> io::Result<Option<Look>> {
    let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, root, directory | OFlags::NOFOLLOW, Mode::empty())?;
    let path = if path.is_empty() { b".".to_vec() } else { path.join(&b'/') };
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let found = loop {
        match rustix::fs::openat2(&root, path.as_slice(), flags, Mode::empty(), resolve) {
            // EAGAIN: something was renamed meanwhile, and the kernel could not be sure.
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
            found => break found?,
        }
    };
    let stat = rustix::fs::fstat(&found)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return Ok(Some(Look::Other));
    }
    let opened = rustix::fs::openat(&found, ".", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let xattrs = xattrs(&opened)?;
    Ok(Some(Look::Directory { mode: stat.st_mode & 0o7777, uid: stat.st_uid, gid: stat.st_gid, xattrs }))
}

fn xattrs(file: &std::os::fd::OwnedFd) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    /// The kernel's limit for a list of names, and for a value.
    const LARGEST: usize = 64 * 1024;
    let mut names = vec![0; LARGEST];
    let length = match rustix::fs::flistxattr(file, &mut names) {
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        length => length?,
    };
    names.truncate(length);
    let mut found = Vec::new();
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; LARGEST];
        match rustix::fs::fgetxattr(file, name, &mut value) {
            Ok(length) => {
                value.truncate(length);
                found.push((name.to_vec(), value));
            }
            // Taken away between the two calls.
            Err(Errno::NODATA) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_stay_inside_the_root() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("usr/lib")).unwrap();
        std::fs::write(root.path().join("file"), "").unwrap();
        std::os::unix::fs::symlink("/usr/lib", root.path().join("lib")).unwrap();
        std::os::unix::fs::symlink("../../../..", root.path().join("up")).unwrap();
        let look = |path: &[&[u8]]| in_root(root.path(), path).unwrap();
        assert!(matches!(look(&[b"lib"]), Some(Look::Directory { .. })));
        assert_eq!(look(&[b"up", b"usr"]), look(&[b"usr"]));
        assert_eq!(look(&[b"up"]), look(&[]));
        assert_eq!(look(&[b"file"]), Some(Look::Other));
        assert_eq!(look(&[b"file", b"x"]), None);
        assert_eq!(look(&[b"nothing"]), None);
    }
}
