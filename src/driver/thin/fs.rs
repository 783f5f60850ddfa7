//! File systems on thin devices: made once, looked at, grown, written to.
//!
//! A file system is made in a sparse file and its blocks that are not zero are copied to the template's device: a thin device reads as
//! zeros where nothing was written, so inode tables and journal take no room and are not initialised again at every first mount.
//! Growing is done by the kernel, in a mount that nobody else sees.
//!
//! **When it fails.** Without `mkfs.ext4` or `mkfs.xfs` an error says what to install. A file system that is too small stays as it is.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::table::BLOCK_BYTES;
use crate::driver::DriverError;
use crate::sys::mount::PrivateMount;
use crate::sys::{blockdev, extent};

const EXT4_MAGIC: u16 = 0xef53;
/// `INCOMPAT_64BIT`.
const EXT4_64BIT: u32 = 0x80;
const XFS_MAGIC: &[u8] = b"XFSB";
/// Where programs for file systems are, whatever the environment says.
const SBIN: &str = "/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin";

/// What snapshots are formatted with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// ext4.
    Ext4,
    /// xfs.
    Xfs,
}

impl Kind {
    /// As mount(2) has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Ext4 => "ext4",
            Kind::Xfs => "xfs",
        }
    }

    /// What each mount needs: all of them are copies with one UUID, which xfs refuses to mount twice.
    pub(super) fn options(self) -> &'static [&'static str] {
        match self {
            Kind::Ext4 => &[],
            Kind::Xfs => &["nouuid"],
        }
    }

    /// What a mount needs that must not write, not even a journal that was left behind.
    pub(super) fn options_for_reading(self) -> &'static [&'static str] {
        match self {
            Kind::Ext4 => &["ro", "noload"],
            Kind::Xfs => &["ro", "norecovery", "nouuid"],
        }
    }

    /// The smallest that its mkfs makes.
    pub fn smallest(self) -> u64 {
        match self {
            Kind::Ext4 => 16 << 20,
            Kind::Xfs => 300 << 20,
        }
    }
}

/// A file system as its superblock says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) kind: Kind,
    pub(super) blocks: u64,
    pub(super) block: u64,
    /// Of xfs: what share inodes may take.
    inode_share: u8,
}

impl Found {
    pub(super) fn bytes(self) -> u64 {
        self.blocks.saturating_mul(self.block)
    }
}

/// What a device has on it; `None` if that is none of the two.
pub(super) fn look(device: &Path) -> Result<Option<Found>, DriverError> {
    let mut head = [0; 2048];
    let read = File::open(device).and_then(|mut file| file.read_exact(&mut head));
    read.map_err(|error| DriverError::at(device, error))?;
    Ok(parse(&head))
}

fn parse(head: &[u8; 2048]) -> Option<Found> {
    let bytes = |at: usize, count: usize| head.get(at..at + count).unwrap_or(&[]);
    let little =
        |at: usize, count: usize| bytes(at, count).iter().rev().fold(0_u64, |n, b| n << 8 | u64::from(*b));
    let big = |at: usize, count: usize| bytes(at, count).iter().fold(0_u64, |n, b| n << 8 | u64::from(*b));
    if bytes(0, 4) == XFS_MAGIC {
        let block = big(4, 4);
        let is_block = block.is_power_of_two() && (512..=65536).contains(&block);
        let inode_share = head[127].min(100);
        return is_block.then(|| Found { kind: Kind::Xfs, blocks: big(8, 8), block, inode_share });
    }
    if little(1024 + 56, 2) != u64::from(EXT4_MAGIC) {
        return None;
    }
    let high = if little(1024 + 0x60, 4) & u64::from(EXT4_64BIT) != 0 { little(1024 + 0x150, 4) } else { 0 };
    let power = little(1024 + 24, 4);
    let blocks = high << 32 | little(1024 + 4, 4);
    (power <= 6).then(|| Found { kind: Kind::Ext4, blocks, block: 1024 << power, inode_share: 0 })
}

/// Makes an empty file system of this size in a new sparse file.
pub(super) fn make(kind: Kind, image: &Path, bytes: u64) -> Result<(), DriverError> {
    let refused = |error| DriverError::at(image, error);
    match std::fs::remove_file(image) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(refused(error)),
        _ => {}
    }
    let mut options = File::options();
    let file = options.write(true).create_new(true).mode(0o600).open(image).map_err(refused)?;
    file.set_len(bytes).map_err(refused)?;
    let (program, package, arguments): (_, _, &[&str]) = match kind {
        Kind::Ext4 => (
            "mkfs.ext4",
            "e2fsprogs",
            &[
                "-q",
                "-F",
                "-m",
                "0",
                "-b",
                "4096",
                "-E",
                "nodiscard,lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0",
            ],
        ),
        // Sectors of 4096 bytes go on every device; those of 512, which a file gets, do not.
        Kind::Xfs => ("mkfs.xfs", "xfsprogs", &["-q", "-f", "-K", "-s", "size=4096"]),
    };
    let path = format!("{SBIN}:{}", std::env::var("PATH").unwrap_or_default());
    let made =
        Command::new(program).args(arguments).arg(image).env("PATH", path).stdin(Stdio::null()).output();
    match made {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(DriverError::Unsupported(format!("{program} is not there: install {package}")))
        }
        Err(error) => Err(DriverError::at(Path::new(program), error)),
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(DriverError::Unsupported(format!("{program} failed ({}): {}", output.status, said.trim())))
        }
    }
}

/// Copies what is not zero, durably.
pub(super) fn copy(image: &Path, device: &Path) -> Result<(), DriverError> {
    let copied = || {
        let (from, to) = (File::open(image)?, File::options().write(true).open(device)?);
        let length = usize::try_from(BLOCK_BYTES).map_err(io::Error::other)?;
        let (mut piece, mut at) = (vec![0; length], 0);
        while let Some(range) = extent::next_data(&from, at)? {
            // Whole blocks of the pool, whatever holes the file has within them.
            at = range.start / BLOCK_BYTES * BLOCK_BYTES;
            while at < range.end {
                let read = extent::read_up_to(&from, &mut piece, at)?;
                if piece[..read].iter().any(|byte| *byte != 0) {
                    to.write_all_at(&piece[..read], at)?;
                }
                at += BLOCK_BYTES;
            }
        }
        to.sync_all()
    };
    copied().map_err(|error| DriverError::at(device, error))
}

/// Makes the root directory what containers expect: empty, and open to all.
pub(super) fn tidy(kind: Kind, device: &Path) -> Result<(), DriverError> {
    write(kind, device, &mut |root| {
        match std::fs::remove_dir(root.join("lost+found")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        std::fs::set_permissions(root, std::fs::Permissions::from_mode(0o755))
    })
}

/// Has `write` change the file system, which is mounted for that where nobody else sees it; durable afterwards.
pub(super) fn write(
    kind: Kind,
    device: &Path,
    write: &mut dyn FnMut(&Path) -> io::Result<()>,
) -> Result<(), DriverError> {
    let refused = |error| DriverError::at(device, error);
    let mounted = PrivateMount::new(kind.as_str(), device, kind.options()).map_err(refused)?;
    let path: PathBuf = mounted.path();
    write(&path).map_err(refused)?;
    crate::sys::tree::sync_file_system(&path).map_err(refused)
}

/// Grows a file system to the size of its device.
pub(super) fn grow(found: Found, device: &Path, bytes: u64) -> Result<(), DriverError> {
    let grown = || {
        let mounted = PrivateMount::new(found.kind.as_str(), device, found.kind.options())?;
        let (root, blocks) = (mounted.root()?, bytes / found.block);
        match found.kind {
            Kind::Ext4 => blockdev::grow_ext4(&root, blocks),
            Kind::Xfs => blockdev::grow_xfs(&root, blocks, u32::from(found.inode_share)),
        }?;
        crate::sys::tree::sync_file_system(&mounted.path())
    };
    grown().map_err(|error| DriverError::at(device, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn superblocks_are_read() {
        let mut head = [0; 2048];
        assert_eq!(parse(&head), None);
        head[1024 + 56..1024 + 58].copy_from_slice(&EXT4_MAGIC.to_le_bytes());
        head[1024 + 4..1024 + 8].copy_from_slice(&1000_u32.to_le_bytes());
        head[1024 + 24] = 2;
        let found = parse(&head).unwrap();
        assert_eq!((found.kind, found.bytes()), (Kind::Ext4, 4_096_000));
        head[1024 + 0x150] = 1;
        assert_eq!(parse(&head).unwrap().blocks, 1000, "only with the feature");
        head[1024 + 0x60] = 0x80;
        assert_eq!(parse(&head).unwrap().blocks, (1 << 32) + 1000);
        head[1024 + 24] = 77;
        assert_eq!(parse(&head), None);
        head[..4].copy_from_slice(XFS_MAGIC);
        assert_eq!(parse(&head), None, "blocks of no size");
        head[4..8].copy_from_slice(&4096_u32.to_be_bytes());
        head[8..16].copy_from_slice(&500_u64.to_be_bytes());
        head[127] = 25;
        let found = parse(&head).unwrap();
        assert_eq!((found.kind, found.bytes(), found.inode_share), (Kind::Xfs, 2_048_000, 25));
    }

    #[test]
    fn only_what_is_not_zero_is_copied() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let file = File::create(&from).unwrap();
        file.set_len(10 * BLOCK_BYTES + 100).unwrap();
        file.write_all_at(b"one", 5).unwrap();
        file.write_all_at(&[0; 4096], 4 * BLOCK_BYTES).unwrap();
        file.write_all_at(b"end", 10 * BLOCK_BYTES + 97).unwrap();
        File::create(&to).unwrap().set_len(10 * BLOCK_BYTES + 100).unwrap();
        copy(&from, &to).unwrap();
        assert_eq!(std::fs::read(&from).unwrap(), std::fs::read(&to).unwrap());
        let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&to).unwrap());
        assert!(blocks * 512 <= 2 * BLOCK_BYTES, "{blocks}");
    }
}
