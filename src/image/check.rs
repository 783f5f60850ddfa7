//! Whether the kernel may be shown a layer image whose bytes came from a store.
//!
//! **What.** The kernel parses an image's metadata with all its rights, so this parser reads it first and accepts
//! only what our own writer makes or made, in either [`super::Form`]: anything else is refused, valid EROFS or not. [`check`] reads the whole metadata
//! once; [`Metadata`] answers single questions about an image (what is at this path, which attributes has it) without
//! mounting it, and believes nothing of what it touches either.
//!
//! **Where.** Called by `layer` and `content` before an image is mounted or its attributes are used. Reads through
//! [`ReadAt`]: a file, or bytes just fetched. `record` knows one record, `directory` one block of names, `tree` what
//! holds between them.
//!
//! **Words.** *nid*: the kernel's number of an inode, its offset in the metadata in units of 32 bytes. *slot*: the same
//! in units of 64 bytes, which is where our inodes begin. *image root*: the directory whose only entry is `fs`;
//! *layer root*: that `fs`.
//!
//! **Invariants** of an accepted image:
//! * **K1** The superblock has no feature bit, no second device, no compression, no packed or shared metadata.
//! * **K2** Every byte of the metadata is accounted for: inodes with their xattrs and what is inline (symlink targets, the last names
//!   of directories) in a row, in the writer's order, then the blocks of the directories in the same order; what pads them is zero.
//!   A directory with all its names in blocks, as in images of index format 1, is accepted as well. (Of the data region only
//!   ranges are checked: it holds what the layer's author wrote, and the kernel never parses it. Neither head beyond
//!   the superblock's block nor tail are read: they hold no byte of the image.)
//! * **K3** File data lies in the data region, from a block boundary on.
//! * **K4** Names of a directory are sorted, distinct, 1 to 255 bytes long, without `/` and NUL; types in a directory are
//!   those of the inodes; `.` and `..` are there and right.
//! * **K5** Directories form a tree from the image root; every inode is reached through exactly as many entries as its
//!   link count says.
//! * **K6** Of overlayfs's own attributes only `trusted.overlay.opaque=y` on directories occurs: no redirect, no
//!   metacopy, nothing else that would make the kernel look elsewhere. No ACLs.
//!
//! **When it fails.** [`CheckError::Refused`] names the rule and the place: the image is not ours or was damaged, and
//! must not be mounted. Memory: 16 bytes per inode and two windows of 256 KiB; time: two passes over the inodes with what is inline,
//! one over the blocks of directories.

mod directory;
mod reader;
mod record;
mod tree;

use std::io;
use std::ops::Range;

use super::tar::{Time, Xattr};
use super::{Attributes, BLOCK, Layout, RESERVED};
pub use reader::{Metadata, Parts, ReadAt};
pub use tree::check;

/// The most metadata that is read, in bytes: 50,000 files have some 10 MB.
pub const METADATA_LIMIT: u64 = 1 << 30;

/// Why an image is not accepted.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The bytes could not be read.
    #[error("reading the image's metadata: {0}")]
    Read(#[from] io::Error),
    /// More metadata than any layer of ours has.
    #[error("the image has {bytes} bytes of metadata, more than {METADATA_LIMIT}")]
    TooLarge {
        /// What the layout says.
        bytes: u64,
    },
    /// Something in it is not as our writer makes it.
    #[error("the image is damaged or not one of ours: {part} at byte {at} of the image: {rule}")]
    Refused {
        /// What kind of record.
        part: Part,
        /// Where it begins, in bytes from the beginning of the image.
        at: u64,
        /// What should have been.
        rule: &'static str,
    },
}

/// The parts of an image's metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Where things are, as the layer index says.
    Layout,
    /// Block 0.
    Superblock,
    /// One inode.
    Inode,
    /// The extended attributes behind an inode.
    Xattrs,
    /// Where a symlink points.
    Symlink,
    /// A block of names.
    Directory,
    /// How directories and inodes belong together.
    Tree,
    /// Bytes that belong to nothing.
    Padding,
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Part::Layout => "layout",
            Part::Superblock => "superblock",
            Part::Inode => "inode",
            Part::Xattrs => "extended attributes",
            Part::Symlink => "symlink",
            Part::Directory => "directory",
            Part::Tree => "tree",
            Part::Padding => "padding",
        })
    }
}

/// What an accepted image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checked {
    /// Inodes below and with the layer root (as in [`super::Facts`]).
    pub inodes: u64,
    /// Owner of the layer root.
    pub root_uid: u32,
    /// Group of the layer root.
    pub root_gid: u32,
}

/// What stands at a path of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeInfo {
    /// The kernel's number of the inode: equal for hard links, different for everything else.
    pub nid: u64,
    /// Permission bits with setuid, setgid and sticky: at most 0o7777.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// When it was last changed.
    pub mtime: Time,
    /// Names that lead here; of a directory 2 and one for each sub-directory.
    pub links: u32,
    /// Sorted by prefix and name.
    pub xattrs: Vec<Xattr>,
    /// What it is.
    pub kind: NodeKind,
}

impl NodeInfo {
    /// What a layer on top takes over for a directory that it implies.
    pub fn attributes(&self) -> Attributes {
        Attributes { mode: self.mode, uid: self.uid, gid: self.gid, xattrs: self.xattrs.clone() }
    }
}

/// What an inode is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeKind {
    /// A directory.
    Directory,
    /// A regular file and where its bytes are in the image.
    File {
        /// Byte range in the image; empty for an empty file.
        data: Range<u64>,
    },
    /// A symlink.
    Symlink {
        /// Where it points; 1 to 4095 bytes without NUL.
        target: Vec<u8>,
    },
    /// A character device; 0:0 is a whiteout.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
}

fn refused(part: Part, at: u64, rule: &'static str) -> CheckError {
    CheckError::Refused { part, at, rule }
}

/// `Ok` if the rule is kept.
fn require(kept: bool, part: Part, at: u64, rule: &'static str) -> Result<(), CheckError> {
    if kept { Ok(()) } else { Err(refused(part, at, rule)) }
}

/// Whether a layout is one that our writer can have made, whatever the image holds.
fn require_layout(layout: &Layout) -> Result<(), CheckError> {
    let rule = |kept, at, rule| require(kept, Part::Layout, at, rule);
    rule(layout.data.start == RESERVED, layout.data.start, "data begins behind the head")?;
    rule(layout.data.start <= layout.data.end, layout.data.end, "data ends behind its beginning")?;
    rule(layout.data.end.is_multiple_of(BLOCK), layout.data.end, "data ends on a block boundary")?;
    rule(layout.metadata.start == layout.data.end, layout.metadata.start, "metadata begins behind the data")?;
    rule(layout.metadata.start < layout.metadata.end, layout.metadata.end, "there is metadata")?;
    rule(
        layout.metadata.end.is_multiple_of(BLOCK),
        layout.metadata.end,
        "metadata ends on a block boundary",
    )?;
    let size = layout.metadata.end.checked_add(RESERVED);
    rule(size == Some(layout.size), layout.size, "the image ends with the tail")?;
    rule(layout.size / BLOCK <= u64::from(u32::MAX), layout.size, "block numbers have 32 bits")?;
    let bytes = layout.metadata.end - layout.metadata.start;
    if bytes > METADATA_LIMIT { Err(CheckError::TooLarge { bytes }) } else { Ok(()) }
}
