//! Room on a file system.

use std::io;
use std::path::Path;

/// What is left for an unprivileged writer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Space {
    /// Bytes in all.
    pub bytes: u64,
    /// Bytes that can still be written.
    pub bytes_free: u64,
    /// Inodes in all; 0 where the file system makes them as needed.
    pub inodes: u64,
    /// Inodes that can still be made.
    pub inodes_free: u64,
}

/// The room on the file system that holds `path`.
pub fn space(path: &Path) -> io::Result<Space> {
    let stat = rustix::fs::statvfs(path)?;
    Ok(Space {
        bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
        bytes_free: stat.f_bavail.saturating_mul(stat.f_frsize),
        inodes: stat.f_files,
        inodes_free: stat.f_favail,
    })
}

/// Bytes that an unprivileged writer could still take on the file system that holds `path` (statvfs(3), `f_bavail`).
pub fn free_bytes(path: &Path) -> io::Result<u64> {
    Ok(space(path)?.bytes_free)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_has_room() {
        let space = space(Path::new("/")).unwrap();
        assert!(space.bytes > 0 && space.bytes_free <= space.bytes);
        assert!(super::space(Path::new("/nonexistent")).is_err());
    }
}
