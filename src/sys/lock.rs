//! A whole-file lock that dies with its process.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FlockOperation, flock};

/// An exclusive lock on a file, held until dropped or until the process ends, however it ends.
#[derive(Debug)]
pub struct FileLock(#[expect(dead_code, reason = "held for its lock, released when closed")] File);

impl FileLock {
    /// Takes the lock at once or answers `None` when another process holds it. Creates the file (0600) if needed.
    pub fn try_exclusive(path: &Path) -> io::Result<Option<FileLock>> {
        let file =
            OpenOptions::new().create(true).truncate(false).read(true).write(true).mode(0o600).open(path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(FileLock(file))),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// Whether whoever holds the lock on this file was killed and only waits for the kernel to let it go: in a call that cannot be
/// interrupted, say.
pub fn holder_is_dying(path: &Path) -> io::Result<bool> {
    let inode = std::fs::metadata(path)?.ino();
    let locks = std::fs::read_to_string("/proc/locks")?;
    let holders = locks.lines().filter_map(|line| holder(line, inode)).collect::<Vec<_>>();
    Ok(!holders.is_empty() && holders.into_iter().all(is_dying))
}

/// The process of a line of `/proc/locks`, `1: FLOCK  ADVISORY  WRITE 123 fe:00:456 0 EOF`, about this inode.
fn holder(line: &str, inode: u64) -> Option<u32> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let [_, "FLOCK", _, _, pid, file, ..] = fields[..] else { return None };
    (file.rsplit(':').next()?.parse() == Ok(inode)).then(|| pid.parse().ok())?
}

fn is_dying(pid: u32) -> bool {
    let Ok(status) = std::fs::read_to_string(format!("/proc/{pid}/status")) else { return true };
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let killed = |name: &str| {
        let pending = field(name).and_then(|signals| u64::from_str_radix(signals, 16).ok());
        pending.is_some_and(|pending| pending & (1 << (libc::SIGKILL - 1)) != 0)
    };
    field("State:").is_some_and(|state| state.starts_with(['Z', 'X']))
        || killed("SigPnd:")
        || killed("ShdPnd:")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_holder_of_a_lock_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let lock = FileLock::try_exclusive(&path).unwrap().unwrap();
        let inode = std::fs::metadata(&path).unwrap().ino();
        let locks = std::fs::read_to_string("/proc/locks").unwrap();
        let holders: Vec<u32> = locks.lines().filter_map(|line| holder(line, inode)).collect();
        assert!(holders.contains(&std::process::id()), "{locks}");
        assert!(!holder_is_dying(&path).unwrap());
        drop(lock);
        assert!(!holder_is_dying(&path).unwrap());
    }

    #[test]
    fn other_locks_are_not_looked_at() {
        for line in
            ["", "1: POSIX  ADVISORY  WRITE 7 fe:00:5 0 EOF", "1: -> FLOCK  ADVISORY  WRITE 7 fe:00:5 0 EOF"]
        {
            assert_eq!(holder(line, 5), None);
        }
        assert_eq!(holder("1: FLOCK  ADVISORY  WRITE 7 fe:00:5 0 EOF", 5), Some(7));
        assert_eq!(holder("1: FLOCK  ADVISORY  WRITE 7 fe:00:55 0 EOF", 5), None);
    }
}
