//! One record at a time: the superblock, an inode, its extended attributes.
//!
//! Source of the format: the kernel's `fs/erofs/erofs_fs.h` and `Documentation/filesystems/erofs.rst`. Everything is
//! little endian.
//!
//! ```text
//! superblock, at byte 1024 of the image           extended inode, 64 bytes
//!  0 magic e2 e1 f5 e0        u32                  0 format: bit 0 extended,   u16
//!  4 checksum, unused: 0      u32                    bits 1-3 data layout: 0 plain, 2 inline
//!  8 compatible features: 0   u32                  2 xattr count (see below)   u16
//! 12 log2 of block size: 12    u8                  4 mode with file type       u16
//! 13 extension slots: 0        u8                  6 reserved                  u16
//! 14 nid of the image root    u16                  8 size                      u64
//! 16 inodes                   u64                 16 block number, or device   u32
//! 24 time, unused: 0     u64, u32                 20 the inode's own nid       u32
//! 36 blocks                   u32                 24 owner, 28 group           u32
//! 40 block of the metadata    u32                 32 mtime, seconds            u64
//! 44 shared xattrs, unused: 0 u32                 40 mtime, nanoseconds        u32
//! 48 uuid, unused: 0         16 B                 44 links                     u32
//! 64 volume name: 0          16 B                 48 reserved                 16 B
//! 80 incompatible features: 0 u32
//! 84 to 128: 0
//!
//! xattrs behind an inode: 12 bytes of zero, then entries, each from a multiple of 4 on:
//!  0 length of the name without its prefix u8, 1 prefix u8, 2 length of the value u16, 4 name, value
//! their length in all is 12 + 4 × (count - 1) bytes; none with a count of 0
//! ```

use std::ops::Range;

use super::{CheckError, NodeKind, Part, Time, Xattr, require};
use crate::image::erofs::crosses;
use crate::image::{BLOCK, Layout};

/// Bytes of an extended inode, and what every inode is aligned to.
pub(super) const INODE: u64 = 64;
/// Bytes of the unit in which the kernel numbers inodes.
pub(super) const NID_UNIT: u64 = 32;
/// Where the superblock is in block 0.
const SUPERBLOCK: usize = 1024;
const SUPERBLOCK_END: usize = SUPERBLOCK + 128;
const MAGIC: u32 = 0xe0f5_e1e2;
const XATTR_HEADER: usize = 12;

const EXTENDED: u16 = 1;
const FLAT_PLAIN: u16 = 0;
const FLAT_INLINE: u16 = 2;

pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

pub(super) fn is_zero(bytes: &[u8]) -> bool {
    const ZEROS: [u8; 4096] = [0; 4096];
    bytes.chunks(ZEROS.len()).all(|chunk| chunk == &ZEROS[..chunk.len()])
}

/// What the superblock says that the layout does not.
#[derive(Debug, Clone, Copy)]
pub(super) struct Superblock {
    pub(super) root_nid: u64,
    pub(super) inodes: u64,
}

impl Superblock {
    /// Reads block 0 (at least [`BLOCK`] bytes).
    pub(super) fn parse(block: &[u8], layout: &Layout) -> Result<Superblock, CheckError> {
        let rule = |kept, at, rule| require(kept, Part::Superblock, at, rule);
        rule(is_zero(&block[..SUPERBLOCK]), 0, "nothing stands before the superblock")?;
        rule(is_zero(&block[SUPERBLOCK_END..]), 1152, "nothing stands behind the superblock")?;
        let field = &block[SUPERBLOCK..SUPERBLOCK_END];
        rule(u32_at(field, 0) == MAGIC, 1024, "EROFS's magic number")?;
        rule(is_zero(&field[4..12]), 1028, "no checksum and no compatible feature")?;
        rule(field[12] == 12 && field[13] == 0, 1036, "blocks of 4096 bytes, no extension")?;
        rule(is_zero(&field[24..36]), 1048, "no time of making")?;
        rule(u64::from(u32_at(field, 36)) == layout.size / BLOCK, 1060, "as many blocks as the image has")?;
        let metadata = u64::from(u32_at(field, 40)) * BLOCK;
        rule(metadata == layout.metadata.start, 1064, "metadata where the layout says")?;
        rule(is_zero(&field[44..80]), 1068, "no shared extended attributes, no uuid, no name")?;
        rule(is_zero(&field[80..]), 1104, "no feature, no compression, no second device")?;
        let root_nid = u64::from(u16_at(field, 14));
        rule(root_nid == INODE / NID_UNIT, 1038, "the image root is the first inode")?;
        Ok(Superblock { root_nid, inodes: u64_at(field, 16) })
    }
}

/// The type of an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Directory,
    CharDevice,
    BlockDevice,
    Fifo,
    Symlink,
}

impl Kind {
    fn of_mode(mode: u16) -> Option<Kind> {
        match mode & 0o170_000 {
            0o100_000 => Some(Kind::File),
            0o040_000 => Some(Kind::Directory),
            0o020_000 => Some(Kind::CharDevice),
            0o060_000 => Some(Kind::BlockDevice),
            0o010_000 => Some(Kind::Fifo),
            0o120_000 => Some(Kind::Symlink),
            _ => None,
        }
    }

    /// The number that stands for it in a directory.
    pub(super) fn in_directory(self) -> u8 {
        match self {
            Kind::File => 1,
            Kind::Directory => 2,
            Kind::CharDevice => 3,
            Kind::BlockDevice => 4,
            Kind::Fifo => 5,
            Kind::Symlink => 7,
        }
    }
}

/// One inode, every field within its range.
#[derive(Debug, Clone, Copy)]
pub(super) struct Inode {
    /// Where it begins in the image.
    pub(super) at: u64,
    pub(super) nid: u64,
    pub(super) kind: Kind,
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Time,
    pub(super) links: u32,
    /// Bytes of a file, a directory or a symlink's target; else 0.
    pub(super) size: u64,
    /// Bytes of the extended attributes behind it.
    pub(super) xattrs: u64,
    inline: bool,
    word: u32,
}

impl Inode {
    /// Reads the 64 bytes that stand at byte `at` of the image, which must be in the metadata.
    pub(super) fn parse(bytes: &[u8], at: u64, layout: &Layout) -> Result<Inode, CheckError> {
        let rule = |kept, rule| require(kept, Part::Inode, at, rule);
        let (format, mode) = (u16_at(bytes, 0), u16_at(bytes, 4));
        rule(format & EXTENDED != 0 && format >> 1 <= FLAT_INLINE, "an extended inode with flat data")?;
        let kind = Kind::of_mode(mode);
        rule(kind.is_some(), "a known file type")?;
        let kind = kind.unwrap_or(Kind::File);
        let xattrs = match u64::from(u16_at(bytes, 2)) {
            0 => 0,
            count => 12 + 4 * (count - 1),
        };
        let inode = Inode {
            at,
            nid: (at - layout.metadata.start) / NID_UNIT,
            kind,
            mode: mode & 0o7777,
            uid: u32_at(bytes, 24),
            gid: u32_at(bytes, 28),
            mtime: Time { seconds: u64_at(bytes, 32), nanoseconds: u32_at(bytes, 40) },
            links: u32_at(bytes, 44),
            size: u64_at(bytes, 8),
            xattrs,
            inline: format >> 1 == FLAT_INLINE,
            word: u32_at(bytes, 16),
        };
        rule(inode.inline || format >> 1 == FLAT_PLAIN, "flat data")?;
        rule(u64::from(u32_at(bytes, 20)) == inode.nid & u64::from(u32::MAX), "its own number")?;
        rule(inode.mtime.nanoseconds < 1_000_000_000, "less than a second of nanoseconds")?;
        rule(inode.mtime.seconds <= i64::MAX.cast_unsigned(), "a time since 1970")?;
        rule(inode.links > 0, "at least one link")?;
        rule(is_zero(&bytes[6..8]) && is_zero(&bytes[48..64]), "nothing in reserved fields")?;
        inode.require_body(layout)?;
        Ok(inode)
    }

    /// Size and place of what the inode holds.
    fn require_body(&self, layout: &Layout) -> Result<(), CheckError> {
        let rule = |kept, rule| require(kept, Part::Inode, self.at, rule);
        let is_inline = match self.kind {
            Kind::Symlink => self.inline,
            Kind::Directory => true,
            _ => !self.inline,
        };
        rule(is_inline, "inline data in symlinks and directories, and nowhere else")?;
        rule(self.end() <= layout.metadata.end, "attributes and what is inline end in the metadata")?;
        let inline = self.inline_range();
        rule(!crosses(inline.start, inline.end - inline.start), "what is inline does not cross a block")?;
        match self.kind {
            Kind::File if self.size == 0 => rule(self.word == 0, "an empty file has no block"),
            Kind::File => rule(within(self.start(), self.size, &layout.data), "a file's data is in the data"),
            Kind::Directory => {
                rule(self.size > 0, "a directory has entries")?;
                rule(!self.inline || !inline.is_empty(), "an inline directory has entries behind its inode")?;
                if self.blocks() == 0 {
                    return rule(self.word == 0, "a directory without blocks leads to none");
                }
                let blocks = self.blocks().saturating_mul(BLOCK);
                rule(within(self.start(), blocks, &layout.metadata), "its blocks are in the metadata")
            }
            Kind::Symlink => {
                rule(self.word == 0, "a symlink has no block")?;
                rule((1..BLOCK).contains(&self.size), "a target has 1 to 4095 bytes")
            }
            Kind::CharDevice | Kind::BlockDevice => rule(self.size == 0, "a device has no size"),
            Kind::Fifo => rule(self.size == 0 && self.word == 0, "a fifo has neither size nor device"),
        }
    }

    /// Where its blocks begin, in bytes from the beginning of the image. For files and directories.
    pub(super) fn start(&self) -> u64 {
        u64::from(self.word) * BLOCK
    }

    /// Where its extended attributes are.
    pub(super) fn xattr_range(&self) -> Range<u64> {
        self.at + INODE..self.at + INODE + self.xattrs
    }

    /// Where the target of a symlink is, or what a directory has behind its full blocks; empty where nothing is inline.
    pub(super) fn inline_range(&self) -> Range<u64> {
        let start = self.xattr_range().end;
        let length = match self.kind {
            _ if !self.inline => 0,
            Kind::Directory => self.size % BLOCK,
            _ => self.size,
        };
        start..start.saturating_add(length)
    }

    /// How many blocks a directory has beside what is inline.
    pub(super) fn blocks(&self) -> u64 {
        if self.inline { self.size / BLOCK } else { self.size.div_ceil(BLOCK) }
    }

    /// Where the names of a directory are that stand in its block of this number, the inline ones being the last.
    pub(super) fn names_at(&self, number: u64) -> Range<u64> {
        if number >= self.blocks() {
            return self.inline_range();
        }
        let at = self.start() + number * BLOCK;
        at..at + BLOCK
    }

    /// Where the inode ends with all that stands right behind it.
    pub(super) fn end(&self) -> u64 {
        self.inline_range().end
    }

    /// What it is; `target` is that of a symlink.
    pub(super) fn node_kind(&self, target: Vec<u8>) -> NodeKind {
        // The kernel's 32-bit form of a device number (new_encode_dev).
        let major = (self.word & 0x000f_ff00) >> 8;
        let minor = (self.word & 0xff) | ((self.word >> 12) & 0x000f_ff00);
        match self.kind {
            Kind::Directory => NodeKind::Directory,
            Kind::File if self.size == 0 => NodeKind::File { data: 0..0 },
            Kind::File => NodeKind::File { data: self.start()..self.start() + self.size },
            Kind::Symlink => NodeKind::Symlink { target },
            Kind::CharDevice => NodeKind::CharDevice { major, minor },
            Kind::BlockDevice => NodeKind::BlockDevice { major, minor },
            Kind::Fifo => NodeKind::Fifo,
        }
    }
}

/// Whether `size` bytes from `start` on, in whole blocks, lie in `region`.
fn within(start: u64, size: u64, region: &Range<u64>) -> bool {
    let end = size.checked_next_multiple_of(BLOCK).and_then(|size| start.checked_add(size));
    start >= region.start && end.is_some_and(|end| end <= region.end)
}

/// Reads what stands behind `inode`: exactly [`Inode::xattr_range`].
pub(super) fn xattrs(bytes: &[u8], inode: &Inode) -> Result<Vec<Xattr>, CheckError> {
    let at = inode.xattr_range().start;
    let rule = |kept, rule| require(kept, Part::Xattrs, at, rule);
    if bytes.is_empty() {
        return Ok(Vec::new());
    }
    rule(bytes.len() > XATTR_HEADER && is_zero(&bytes[..XATTR_HEADER]), "an empty header and an entry")?;
    let mut rest = &bytes[XATTR_HEADER..];
    let mut found: Vec<Xattr> = Vec::new();
    let mut last: Option<(u8, &[u8])> = None;
    while !rest.is_empty() {
        rule(rest.len() >= 4, "an entry has a head")?;
        let (name_length, prefix) = (usize::from(rest[0]), rest[1]);
        let value_length = usize::from(u16_at(rest, 2));
        let used = 4 + name_length + value_length;
        let padded = used.next_multiple_of(4);
        rule(rest.len() >= padded, "an entry ends before the last one does")?;
        let name = &rest[4..4 + name_length];
        rule(is_zero(&rest[used..padded]), "entries are padded with zeros")?;
        rule(last < Some((prefix, name)), "entries are sorted and distinct")?;
        let xattr = Xattr { name: full_name(prefix, name, at)?, value: rest[4 + name_length..used].to_vec() };
        rule(
            is_allowed(&xattr, inode.kind),
            "trusted: opaque=y on directories; user: files and directories",
        )?;
        found.push(xattr);
        last = Some((prefix, name));
        rest = &rest[padded..];
    }
    Ok(found)
}

fn full_name(prefix: u8, name: &[u8], at: u64) -> Result<Vec<u8>, CheckError> {
    let rule = |kept, rule| require(kept, Part::Xattrs, at, rule);
    let text: &[u8] = match prefix {
        1 => b"user.",
        4 => b"trusted.",
        6 => b"security.",
        _ => b"",
    };
    rule(!text.is_empty(), "a known prefix")?;
    rule(!name.is_empty(), "a name behind the prefix")?;
    rule(!name.contains(&0), "a name without NUL")?;
    rule(text.len() + name.len() <= 255, "a name of at most 255 bytes")?;
    Ok([text, name].concat())
}

fn is_allowed(xattr: &Xattr, kind: Kind) -> bool {
    let is_opaque = || xattr.name == b"trusted.overlay.opaque" && xattr.value == b"y";
    match xattr.name.first() {
        Some(b't') => kind == Kind::Directory && is_opaque(),
        Some(b'u') => matches!(kind, Kind::File | Kind::Directory),
        _ => true,
    }
}
