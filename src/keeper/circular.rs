//! Whether a process would wait for itself: what it needs may lie on a file system that the daemon serves.
//!
//! **What.** [`refuse`] looks where the mount table has some paths. Nothing is read there: who reads what nobody serves waits.
//!
//! **Words.** *Ours*: an EROFS at an attach point (`<root>/l/<serial>`), or an overlay with a lower directory on one.
//!
//! **When it fails.** What is ours cannot always be told: in a container the attach points of its layers may not be in
//! sight. Then there is a warning, and no more.

use std::io;
use std::path::{Path, PathBuf};

use crate::sys::decimal;
use crate::sys::mountinfo::{self, MountEntry};

/// Overlays on overlays are followed so far.
const DEPTH: usize = 4;

/// A process would wait for itself.
#[derive(Debug, thiserror::Error)]
#[error(
    "{what} {path} lies on layers that Speedy serves (mounted at {point}): who waits for the daemon could not be what the daemon \
     waits for. Install speedy on the node's own disk, with its directories there"
)]
pub struct Circular {
    what: &'static str,
    path: PathBuf,
    point: PathBuf,
}

/// Where a path lies.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    /// On what we serve, mounted here.
    Ours(PathBuf),
    /// On what could be.
    Unknown(PathBuf),
    Other,
}

/// Refuses to go on if this program, or one of these paths, lies on what the daemon serves.
pub fn refuse(paths: &[(&'static str, &Path)]) -> io::Result<Result<(), Circular>> {
    let table = mountinfo::of_this_process()?;
    let program = std::env::current_exe()?;
    for &(what, path) in [("the program", program.as_path())].iter().chain(paths) {
        let path = std::path::absolute(path)?;
        match place(&table, &path, DEPTH) {
            Place::Ours(point) => return Ok(Err(Circular { what, path, point })),
            Place::Unknown(point) => tracing::warn!(
                path = %path.display(),
                mounted = %point.display(),
                "{what} may lie on layers; if they are served by Speedy it waits for itself: install it on the node's own disk"
            ),
            Place::Other => {}
        }
    }
    Ok(Ok(()))
}

fn place(table: &[MountEntry], path: &Path, depth: usize) -> Place {
    let Some(mount) = mountinfo::holding(table, path) else { return Place::Other };
    let point = || mount.point.clone();
    match &mount.kind[..] {
        // A container whose root is one layer has its directory `fs`.
        "erofs" if mount.root.starts_with("/fs") || is_attached(table, &mount.device) => Place::Ours(point()),
        "erofs" => Place::Unknown(point()),
        "overlay" if depth > 0 => {
            let lowers = lowers(mount).filter(|lower| lower.is_absolute());
            let mut places = lowers.map(|lower| place(table, &lower, depth - 1));
            match places.any(|place| matches!(place, Place::Ours(_))) {
                true => Place::Ours(point()),
                false => Place::Unknown(point()),
            }
        }
        _ => Place::Other,
    }
}

/// Whether this file system is mounted at an attach point.
fn is_attached(table: &[MountEntry], device: &str) -> bool {
    table.iter().filter(|mount| mount.device == device).any(|mount| {
        let mut names = mount.point.iter().rev().map(|name| name.to_str().unwrap_or_default());
        names.next().and_then(decimal::parse).is_some() && names.next() == Some("l")
    })
}

fn lowers(mount: &MountEntry) -> impl Iterator<Item = PathBuf> + '_ {
    let lists = mount
        .super_options
        .iter()
        .filter_map(|option| option.strip_prefix("lowerdir=").or_else(|| option.strip_prefix("lowerdir+=")));
    lists.flat_map(|list| list.split(':')).filter(|lower| !lower.is_empty()).map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
        21 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n\
        22 21 7:3 / /var/lib/speedy/l/7 ro - erofs /dev/loop3 ro\n\
        23 21 0:40 / /run/k/rootfs rw - overlay overlay rw,lowerdir=/var/lib/speedy/l/8/fs:/var/lib/speedy/l/7/fs,upperdir=/u\n\
        24 21 0:41 / /run/own/rootfs rw - overlay overlay rw,lowerdir=/var/lib/speedy/l/8/fs,upperdir=/u\n\
        25 21 0:42 / /run/twice rw - overlay overlay rw,lowerdir+=/run/k/rootfs/usr\n\
        26 21 7:3 / /elsewhere ro - erofs /dev/loop3 ro\n\
        27 21 7:4 /fs /run/view ro - erofs /dev/loop4 ro\n\
        28 21 7:5 / /usr ro - erofs /dev/loop5 ro\n\
        29 21 0:43 / /run/near rw - overlay overlay rw,lowerdir=8/fs:7/fs,upperdir=/u\n";

    #[test]
    fn what_is_served_is_told_from_what_is_not() {
        let table = mountinfo::parse(TABLE);
        let place = |path: &str| place(&table, Path::new(path), DEPTH);
        let ours = |point: &str| Place::Ours(point.into());
        let unknown = |point: &str| Place::Unknown(point.into());
        assert_eq!(place("/usr/local/bin/speedy"), unknown("/usr"));
        assert_eq!(place("/opt/speedy"), Place::Other);
        assert_eq!(place("/var/lib/speedy"), Place::Other);
        assert_eq!(place("/var/lib/speedy/l/7/fs/bin/speedy"), ours("/var/lib/speedy/l/7"));
        assert_eq!(place("/elsewhere/fs/bin/speedy"), ours("/elsewhere"));
        assert_eq!(place("/run/view/bin/speedy"), ours("/run/view"));
        assert_eq!(place("/run/k/rootfs/bin/speedy"), ours("/run/k/rootfs"));
        assert_eq!(place("/run/twice/bin/speedy"), ours("/run/twice"));
        // Unpacked as files: the daemon serves nothing of it. And names that only mean something elsewhere.
        assert_eq!(place("/run/own/rootfs/bin/speedy"), unknown("/run/own/rootfs"));
        assert_eq!(place("/run/near/bin/speedy"), unknown("/run/near"));
    }
}
