//! The mount table of a process, as `/proc/<pid>/mountinfo` shows it.
//!
//! Where: `speedy check` looks up the file system below the root and compares our table with containerd's; `layer` looks
//! for what is attached. Pure but for [`of_this_process`]: text in, values out.
//!
//! Words: mounts of one *peer group* see each other's mounts; a *slave* of a group sees the group's.
//!
//! Invariants: lines that cannot be read are left out; later mounts hide earlier ones at the same point.
//!
//! When it fails: [`parse`] does not.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// Device number of the file system, `major:minor`.
    pub device: String,
    /// Which directory of the file system is mounted.
    pub root: PathBuf,
    /// Where it is mounted.
    pub point: PathBuf,
    /// Options of this mount.
    pub options: Vec<String>,
    /// The peer group it belongs to.
    pub shared: Option<u32>,
    /// The peer group it is a slave of.
    pub master: Option<u32>,
    /// The type of file system.
    pub kind: String,
    /// The device or name it was mounted from.
    pub source: String,
    /// Options of the file system.
    pub super_options: Vec<String>,
}

impl MountEntry {
    /// Whether nothing can be written through it.
    pub fn is_read_only(&self) -> bool {
        self.options.iter().chain(&self.super_options).any(|option| option == "ro")
    }
}

/// The mounts that this process sees.
pub fn of_this_process() -> io::Result<Vec<MountEntry>> {
    // Names are arbitrary bytes; only those of others' mounts are changed by reading them as text.
    let bytes = std::fs::read("/proc/self/mountinfo")?;
    Ok(parse(&String::from_utf8_lossy(&bytes)))
}

/// The mounts of a table.
pub fn parse(text: &str) -> Vec<MountEntry> {
    text.lines().filter_map(entry).collect()
}

fn entry(line: &str) -> Option<MountEntry> {
    // Fields are separated by single spaces; a field with a space in it has it written as \040.
    let (before, after) = line.split_once(" - ")?;
    let mut fields = before.split(' ').skip(2);
    let (device, root, point, options) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    let (mut shared, mut master) = (None, None);
    for tag in fields {
        match tag.split_once(':') {
            Some(("shared", group)) => shared = group.parse().ok(),
            Some(("master", group)) => master = group.parse().ok(),
            _ => {}
        }
    }
    let mut after = after.split(' ');
    let (kind, source) = (after.next()?, after.next()?);
    let list = |text: &str| text.split(',').map(str::to_owned).collect();
    Some(MountEntry {
        device: device.to_owned(),
        root: unescape(root),
        point: unescape(point),
        options: list(options),
        shared,
        master,
        kind: kind.to_owned(),
        source: unescape(source).to_string_lossy().into_owned(),
        super_options: list(after.next().unwrap_or_default()),
    })
}

/// Octal escapes of three digits, as the kernel writes them.
fn unescape(text: &str) -> PathBuf {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let digits = text.get(at + 1..at + 4).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match digits {
            Some(byte) if bytes[at] == b'\\' => {
                out.push(byte);
                at += 4;
            }
            _ => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    PathBuf::from(OsString::from_vec(out))
}

/// The mount that holds `path`, which must be absolute and without links.
pub fn holding<'a>(entries: &'a [MountEntry], path: &Path) -> Option<&'a MountEntry> {
    // Among mounts at the same point the last one is on top; `max_by_key` returns the last of equals.
    entries
        .iter()
        .filter(|entry| path.starts_with(&entry.point))
        .max_by_key(|entry| entry.point.components().count())
}

/// What the second namespace sees of mounts made in the first, below these two mounts of one directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Propagation {
    /// Each sees the other's.
    BothWays,
    /// The second sees the first's.
    Forward,
    /// Nothing.
    None,
}

/// How mounts made below `ours` reach `theirs`.
pub fn propagation(ours: &MountEntry, theirs: &MountEntry) -> Propagation {
    match ours.shared {
        Some(group) if theirs.shared == Some(group) => Propagation::BothWays,
        Some(group) if theirs.master == Some(group) => Propagation::Forward,
        _ => Propagation::None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro
40 27 8:2 /sub /var/lib rw shared:2 master:7 - xfs /dev/sdb1 rw,attr2
41 40 0:40 / /var/lib/with\\040space\\134x ro - tmpfs tmpfs rw
42 40 0:41 / /var/lib ro master:7 propagate_from:3 - tmpfs none ro,size=1k
broken line
43 40 0:42 / /odd rw - nosource";

    #[test]
    fn fields_are_where_they_belong() {
        let entries = parse(TABLE);
        assert_eq!(entries.len(), 5);
        assert_eq!(entries[1].kind, "ext4");
        assert_eq!(entries[1].source, "/dev/sda1");
        assert_eq!((entries[1].shared, entries[1].master), (Some(1), None));
        assert_eq!((entries[2].shared, entries[2].master), (Some(2), Some(7)));
        assert_eq!(entries[2].root, Path::new("/sub"));
        assert_eq!(entries[2].device, "8:2");
        assert_eq!(entries[3].point, Path::new("/var/lib/with space\\x"));
        assert!(entries[3].is_read_only() && entries[4].is_read_only() && !entries[1].is_read_only());
    }

    #[test]
    fn the_topmost_longest_mount_holds_a_path() {
        let entries = parse(TABLE);
        assert_eq!(holding(&entries, Path::new("/etc")).unwrap().point, Path::new("/"));
        assert_eq!(holding(&entries, Path::new("/var/lib/speedy")).unwrap().kind, "tmpfs");
        assert_eq!(holding(&entries, Path::new("/var/library")).unwrap().kind, "ext4");
        assert!(holding(&[], Path::new("/")).is_none());
    }

    #[test]
    fn propagation_follows_the_groups() {
        let with = |tags: &str| parse(&format!("1 0 8:1 / / rw {tags} - ext4 /dev/sda1 rw")).remove(0);
        let cases = [
            ("shared:1", "shared:1", Propagation::BothWays),
            ("shared:1", "master:1", Propagation::Forward),
            ("shared:1", "shared:2 master:1", Propagation::Forward),
            ("shared:1", "shared:2", Propagation::None),
            ("master:1", "shared:1", Propagation::None),
            ("", "shared:1", Propagation::None),
        ];
        for (ours, theirs, expected) in cases {
            assert_eq!(propagation(&with(ours), &with(theirs)), expected, "{ours} to {theirs}");
        }
    }
}
