//! Room on a file system.

use std::io;
use std::path::Path;

/// Bytes that an unprivileged writer could still take on the file system that holds `path` (statvfs(3), `f_bavail`).
pub fn free_bytes(path: &Path) -> io::Result<u64> {
    let found = rustix::fs::statvfs(path)?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}
