//! Layer images: an OCI layer as one plain EROFS file.
//!
//! ```text
//! 0          head: superblock at 1024 in block 0, the rest a hole
//! 8 MiB      data of the files, in tar order, each from a block boundary on, identical files once
//! metadata   inodes with short directories, then blocks of longer ones; the root directory's only entry is `fs`, the root of the layer
//! tail       8 MiB, a hole
//! ```
//!
//! **What.** [`build()`] makes one from a layer's blob; [`stream`] and [`tar`] read the blob for whoever wants files instead.
//! `tree` says what the layer's files are, `erofs` is the format, `data` writes.
//!
//! **Where.** Called by `layer`, `content` and `cli`; calls nothing but [`crate::oci`] and, to write files, [`crate::sys`].
//! Knows no store and no snapshot.
//!
//! **Words.** *implied*: a directory that a layer has no entry for, though for something in it. *whiteout*, *opaque*: as in
//! overlayfs, whose form an image has.
//!
//! **Invariants.**
//! * **I1** The image of a layer is a function of its diff ID and, where [`Facts::attributes`] is set, of that. Whoever makes it,
//!   wherever, with a version of Speedy that makes images of the same [`Form`], gets the same bytes.
//! * **I2** No byte of a layer lies in the first or last [`RESERVED`] bytes, where the host looks for signatures.
//! * **I3** What a layer's files are is what containerd's own applier makes of it; see [`tar`] and `tree`.
//! * **I4** Memory does not grow with the data of a layer, and with its files only up to [`Limits::metadata`].
//!
//! **When it fails.** [`ImageError`]; the file that was written to means nothing then and is to be removed. After a crash the same
//! holds for every image that nothing durable calls complete: nothing is synced here.

pub mod below;
mod build;
pub mod check;
mod compression;
mod data;
mod erofs;
mod error;
pub mod extract;
mod follow;
mod limits;
pub mod stream;
pub mod tar;
mod tree;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

pub use build::{Source, build};
pub use compression::Compression;
pub use error::{EntryFault, ImageError, TarFault, Unrepresentable};
pub use limits::{Limit, Limits};
pub use tree::{Attributes, Below, NothingBelow};

use crate::oci::DiffId;

/// Blocks of a layer image.
pub const BLOCK: u64 = 4096;
/// The reserved head and the reserved tail: every place where blkid, udev, LVM, md, btrfs and ZFS look for a signature.
///
/// libblkid 2.38 looks as far as 4 MiB behind the beginning (second headers of LUKS2; VMFS at 1 and 2 MiB) and 1.6 MB before
/// the end (Promise's RAID), and both are holes, so they may as well be larger.
pub const RESERVED: u64 = 8 * 1024 * 1024;

/// Where the parts of a layer image are, in bytes; each part begins and ends on a block boundary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// File data; directly behind the head. Empty where no file has any.
    pub data: Range<u64>,
    /// Inodes and directories; directly behind the data.
    pub metadata: Range<u64>,
    /// The whole file, the tail included.
    pub size: u64,
}

impl Layout {
    /// Reads it from an image's superblock. [`io::ErrorKind::InvalidData`] if the file is no layer image; that it is one, or a
    /// whole one, is not said by this.
    pub fn of_image(image: &File) -> io::Result<Layout> {
        let mut block = [0; 4096];
        let size = image.metadata()?.len();
        let no_image = || io::Error::new(io::ErrorKind::InvalidData, "not a layer image");
        match image.read_exact_at(&mut block, 0) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(no_image()),
            read => read?,
        }
        erofs::layout(&block, size).ok_or_else(no_image)
    }
}

/// Where the names of directories stand in a layer image. One layer has one image of each form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// All in blocks, behind all inodes. Read, and not made any more.
    Blocks,
    /// Behind the directory's inode, as far as they do not fill blocks.
    Inline,
}

impl Form {
    /// That of an image of this layout.
    pub fn of_image(image: &File, layout: &Layout) -> io::Result<Form> {
        let mut root = [0; 2];
        image.read_exact_at(&mut root, layout.metadata.start + erofs::IMAGE_ROOT)?;
        Ok(if erofs::is_inline(root) { Form::Inline } else { Form::Blocks })
    }
}

/// The hash of the attributes that a layer's implied directories took from the layers below.
pub type AttributesKey = [u8; 32];

/// What is known of a layer image beside its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// The digest of the tar it was made from.
    pub diff_id: DiffId,
    /// There if some directory that the layer implies but does not carry took attributes from below that are not the
    /// default ones (mode 0755, owner 0:0, no xattrs): then the image depends on them too.
    pub attributes: Option<AttributesKey>,
    /// Length of the tar in bytes.
    pub tar_size: u64,
    /// Where its parts are.
    pub layout: Layout,
    /// Owner of the layer's root directory.
    pub root_uid: u32,
    /// Group of the layer's root directory.
    pub root_gid: u32,
    /// Inodes below and with the layer's root.
    pub inodes: u64,
    /// Bytes of file data that the image takes.
    pub bytes: u64,
}
