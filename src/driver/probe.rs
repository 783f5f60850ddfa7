//! What this kernel and this backing file system can do for the overlayfs driver, found by trying.
//!
//! Called once at start and by `speedy check`. Versions are not compared: distributions backport, and a trial mount
//! tells the truth.

use std::io;
use std::path::{Path, PathBuf};

use super::DriverError;
use crate::sys::mount::TrialMount;
use crate::sys::{idmap, tree};

/// The options every overlay mount must carry here, beside its directories: what the user configured, then `userxattr`
/// and `index=off` where they apply. An error says what to change.
pub fn overlay_options(root: &Path, configured: &[String]) -> Result<Vec<String>, DriverError> {
    let mut options = configured.to_vec();
    if !has_option(&options, "userxattr") && idmap::in_user_namespace() {
        options.push("userxattr".into());
    }
    // Options are last-wins in the kernel: adding index=off after a configured index=on would override it silently.
    if !has_option(&options, "index") && Path::new("/sys/module/overlay/parameters/index").exists() {
        options.push("index=off".into());
    }
    match try_overlay(root, &options) {
        // A start must be possible on a full disk: it is the way to free it.
        Err(error @ DriverError::Full { .. }) => {
            tracing::warn!(%error, "overlayfs is not tried on a full disk; taken for working");
            Ok(options)
        }
        tried => tried.map(|()| options),
    }
}

fn try_overlay(root: &Path, options: &[String]) -> Result<(), DriverError> {
    let trial = Trial::new(root)?;
    trial.require_types(root)?;
    trial.require_overlay(root, options)
}

/// Whether this is the name of a trial's directory, of a start or of `speedy check`.
pub fn is_leftover(name: &str) -> bool {
    name.starts_with(".probe-") || name.starts_with(".check-")
}

/// Takes away what a start or a check that was killed in the middle of a trial has left, its mounts included.
pub fn clear_leftovers(root: &Path) {
    let Ok(entries) = std::fs::read_dir(root) else { return };
    for dir in entries.flatten().filter(|e| is_leftover(&e.file_name().to_string_lossy())).map(|e| e.path()) {
        let inside = std::fs::read_dir(&dir).into_iter().flatten().flatten();
        inside.for_each(|entry| crate::sys::mount::unmount_leftover(&entry.path()));
        if let Err(error) = tree::remove(&dir, &|| false) {
            tracing::warn!(dir = %dir.display(), %error, "cannot remove what an earlier trial left");
        }
    }
}

/// Whether `options` has `key`, alone or as `key=value`.
pub fn has_option(options: &[String], key: &str) -> bool {
    options.iter().any(|option| option.split('=').next() == Some(key))
}

/// A scratch directory below the root with what a trial needs, removed when dropped.
struct Trial {
    dir: PathBuf,
}

impl Trial {
    fn new(root: &Path) -> Result<Trial, DriverError> {
        let dir = root.join(format!(".probe-{}", std::process::id()));
        let made = ["lower1/dir", "lower2", "upper", "work", "merged"]
            .iter()
            .try_for_each(|name| std::fs::create_dir_all(dir.join(name)))
            .and_then(|()| std::fs::write(dir.join("lower1/file"), "x"));
        let trial = Trial { dir };
        made.map_err(|error| DriverError::at(root, error))?;
        Ok(trial)
    }

    fn require_types(&self, root: &Path) -> Result<(), DriverError> {
        match tree::tells_types(&self.dir.join("lower1")) {
            Ok(true) => Ok(()),
            Ok(false) => Err(DriverError::Unsupported(format!(
                "the file system of {} does not tell file types when a directory is read (d_type), which overlayfs \
                 needs: on xfs, make it anew with mkfs.xfs -n ftype=1; or put `root` on ext4, xfs or btrfs",
                root.display()
            ))),
            Err(error) => Err(DriverError::at(root, error)),
        }
    }

    fn require_overlay(&self, root: &Path, options: &[String]) -> Result<(), DriverError> {
        let at = |name: &str| self.dir.join(name).display().to_string();
        let mut data = format!(
            "workdir={},upperdir={},lowerdir={}:{}",
            at("work"),
            at("upper"),
            at("lower1"),
            at("lower2")
        );
        for option in options {
            data.push(',');
            data.push_str(option);
        }
        let merged = self.dir.join("merged");
        let mounted = TrialMount::overlay(&merged, &data).map_err(|error| explain(root, options, error))?;
        // A whiteout and a copied-up file are what a real container does first.
        let used = std::fs::remove_file(merged.join("file"))
            .and_then(|()| std::fs::write(merged.join("dir/new"), "x"))
            .and_then(|()| match merged.join("file").exists() {
                true => Err(io::Error::other("a removed file is still visible")),
                false => Ok(()),
            });
        drop(mounted);
        used.map_err(|error| match DriverError::at(root, error) {
            full @ DriverError::Full { .. } => full,
            error => DriverError::Unsupported(format!(
                "an overlay can be mounted but not used ({error}): put `root` on ext4, xfs or btrfs"
            )),
        })
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        if let Err(error) = tree::remove(&self.dir, &|| false) {
            tracing::warn!(dir = %self.dir.display(), %error, "cannot remove the probe's directory");
        }
    }
}

fn explain(root: &Path, options: &[String], error: io::Error) -> DriverError {
    if error.kind() == io::ErrorKind::StorageFull {
        return DriverError::at(root, error);
    }
    const ENODEV: i32 = 19;
    let hint = match (error.kind(), error.raw_os_error()) {
        (io::ErrorKind::PermissionDenied, _) => {
            "run speedy as root (it needs CAP_SYS_ADMIN), or in a user namespace on Linux 5.11 or newer"
        }
        (_, Some(ENODEV)) => "load the overlay module (modprobe overlay) or use a kernel that has it",
        (io::ErrorKind::InvalidInput, _) => {
            "the file system below cannot carry an upperdir (overlay on overlay, NFS), or one of the options is unknown \
             to this kernel: put `root` on ext4, xfs or btrfs and look at overlayfs.mount_options"
        }
        _ => "see the kernel log (dmesg) for the reason",
    };
    DriverError::Unsupported(format!(
        "overlayfs does not work on {} with options [{}]: {error}; {hint}",
        root.display(),
        options.join(",")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_found_with_and_without_a_value() {
        let options = ["index=on".to_owned(), "volatile".to_owned()];
        assert!(has_option(&options, "index"));
        assert!(has_option(&options, "volatile"));
        assert!(!has_option(&options, "userxattr"));
    }
}
