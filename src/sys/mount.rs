//! The mounts Speedy itself makes: short trials that show what the kernel and the backing file system can do.
//!
//! Snapshots are never mounted here; containerd mounts what `Mounts` describes.

use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags};

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
