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

impl Drop for TrialMount {
    fn drop(&mut self) {
        if let Err(error) = rustix::mount::unmount(&self.target, UnmountFlags::DETACH) {
            tracing::warn!(target = %self.target.display(), %error, "cannot unmount a trial mount");
        }
    }
}
