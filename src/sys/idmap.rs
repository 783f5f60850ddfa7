//! Id-mapped mounts: a directory seen with other owners (mount_setattr(2), Linux 5.12; below overlayfs since 5.19).
//!
//! containerd's mounter makes one for each container in a user namespace. Speedy makes one only to find out whether
//! that works here: by trying, on a directory of its own.

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::fs::CWD;
use rustix::mount::{MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};
use rustix::thread::UnshareFlags;

/// Whether this process is in another user namespace than the first: then it can make no devices. One whose map was not written
/// yet is another as well; without the file the kernel has no user namespaces (user_namespaces(7)).
pub fn in_user_namespace() -> bool {
    std::fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| !is_first(&map))
}

fn is_first(uid_map: &str) -> bool {
    uid_map.split_whitespace().eq(["0", "0", "4294967295"])
}

/// A directory mounted with mapped owners, taken away when dropped.
#[derive(Debug)]
pub struct IdMapped {
    target: PathBuf,
}

impl IdMapped {
    /// Mounts `source` on `target`, with the owners 0..`size` shown as `host`..`host + size`.
    pub fn mount(source: &Path, target: &Path, host: u32, size: u32) -> io::Result<IdMapped> {
        let namespace = user_namespace(host, size)?;
        let flags =
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
        let tree = rustix::mount::open_tree(CWD, source, flags)?;
        set_mapping(&tree, &namespace)?;
        rustix::mount::move_mount(&tree, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
        Ok(IdMapped { target: target.to_owned() })
    }
}

impl Drop for IdMapped {
    fn drop(&mut self) {
        if let Err(error) = rustix::mount::unmount(&self.target, UnmountFlags::DETACH) {
            tracing::warn!(target = %self.target.display(), %error, "cannot unmount a trial mount");
        }
    }
}

/// A user namespace in which 0..`size` are `host`..`host + size`.
///
/// A process of several threads cannot enter a new user namespace, so a child does and waits there until the
/// namespace's descriptor is taken.
fn user_namespace(host: u32, size: u32) -> io::Result<OwnedFd> {
    let mut command = Command::new("cat");
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).env_clear().current_dir("/");
    command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    // SAFETY: the closure runs between fork and exec and makes one system call: it neither allocates nor locks.
    // Nothing of the file table is shared with the parent there, so what `unshare` may change concerns the child only.
    unsafe {
        command.pre_exec(|| Ok(rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER)?));
    }
    let mut waiting = Waiting(command.spawn()?);
    let map = format!("0 {host} {size}\n");
    let process = PathBuf::from(format!("/proc/{}", waiting.0.id()));
    std::fs::write(process.join("uid_map"), &map)?;
    std::fs::write(process.join("gid_map"), &map)?;
    let namespace = File::open(process.join("ns/user"))?;
    // A child that is gone would have left its number to somebody else.
    match waiting.0.try_wait()? {
        None => Ok(namespace.into()),
        Some(status) => Err(io::Error::other(format!("the child in the user namespace ended: {status}"))),
    }
}

/// A child that is ended and waited for when dropped.
struct Waiting(Child);

impl Drop for Waiting {
    fn drop(&mut self) {
        let ended = self.0.kill().and_then(|()| self.0.wait());
        if let Err(error) = ended {
            tracing::warn!(%error, "cannot end the child of a trial");
        }
    }
}

/// Gives a detached mount tree the mapping of a user namespace.
fn set_mapping(tree: &OwnedFd, namespace: &OwnedFd) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: MountPropagationFlags::PRIVATE.bits().into(),
        userns_fd: u64::try_from(namespace.as_fd().as_raw_fd()).map_err(io::Error::other)?,
    };
    // SAFETY: both descriptors are open for the whole call, the path is an empty C string (the descriptor itself is
    // meant), and `attributes` is the structure the call reads, with its own size beside it.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_user_namespace_maps_all_ids_to_themselves() {
        assert!(is_first("         0          0 4294967295\n"));
        assert!(!is_first("         0     100000      65536\n"));
        assert!(!is_first("0 0 1\n1 1 4294967294\n"));
        assert!(!is_first(""), "not written yet");
    }
}
