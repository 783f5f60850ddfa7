//! The format of a layer image: EROFS, of which this uses what Linux 5.15 knows and no optional feature.
//!
//! Source: the kernel's `fs/erofs/erofs_fs.h` and `Documentation/filesystems/erofs.rst`. Everything is little endian.
//!
//! ```text
//! superblock, at byte 1024 of the image           extended inode, 64 bytes
//!  0 magic e2 e1 f5 e0        u32                  0 format: bit 0 extended,   u16
//!  4 checksum, unused: 0      u32                    bits 1-3 data layout: 0 plain, 2 inline
//!  8 compatible features: 0   u32                  2 xattr count (see below)   u16
//! 12 log2 of block size: 12    u8                  4 mode with file type       u16
//! 13 extension slots: 0        u8                  6 reserved: 0               u16
//! 14 nid of the image root    u16                  8 size                      u64
//! 16 inodes                   u64                 16 first block, or device    u32
//! 24 time, unused: 0     u64, u32                 20 inode number, for stat    u32
//! 36 blocks, tail included    u32                 24 owner, 28 group           u32
//! 40 block of the metadata    u32                 32 mtime, seconds            u64
//! 44 shared xattrs, unused: 0 u32                 40 mtime, nanoseconds        u32
//! 48 uuid: 0                 16 B                 44 links                     u32
//! 64 volume name: 0          16 B                 48 reserved: 0              16 B
//! 80 incompatible features: 0 u32
//! 84 to 128: 0
//!
//! xattrs, right behind the inode, if there are any: 12 bytes of 0, then the entries, sorted by prefix and name,
//! each from a multiple of 4 on:
//!  0 length of the name without its prefix u8, 1 prefix u8, 2 length of the value u16, 4 name, value
//! their length in all is 12 + 4 × (count - 1) bytes
//!
//! directory: blocks of entries, then their names in the same order, then 0; sorted by name, `.` and `..` among them
//!  0 nid u64, 8 where the name begins in the block u16, 10 type u8, 11 reserved: 0 u8
//! ```
//!
//! The metadata is: 64 bytes of nothing, so that no inode has the number 0; the inodes from the image root on, parents before
//! children, those of a directory next to each other, each from a multiple of 64 bytes on; from the next block on, the blocks of
//! the directories in the same order. A symlink's target stands behind its inode and xattrs and does not cross a block (which may
//! leave the rest of a block empty before it). A directory's size ends with its last name. The image root is 0755, 0:0, of 1970,
//! and holds `fs` alone, the layer's root.

use std::collections::VecDeque;

use super::data::{Data, block_number};
use super::error::{ImageError, Unrepresentable};
use super::tar::{Time, Xattr};
use super::tree::{Body, Node, NodeId, Tree};
use super::{BLOCK, Layout, RESERVED};

const MAGIC: u32 = 0xe0f5_e1e2;
const SUPERBLOCK: usize = 1024;
const BLOCK_BYTES: usize = 4096;
const INODE: u64 = 64;
/// nids count units of this many bytes.
const NID_UNIT: u64 = 32;
const DIRENT: usize = 12;

const DIRECTORY: u8 = 2;
/// The layer's root in the image.
const LAYER_ROOT: &[u8] = b"fs";

/// What an inode is in a directory entry, and in its mode.
fn kind(body: &Body) -> (u8, u16) {
    match body {
        Body::File { .. } => (1, 0o100_000),
        Body::Directory(_) => (DIRECTORY, 0o040_000),
        Body::CharDevice { .. } => (3, 0o020_000),
        Body::BlockDevice { .. } => (4, 0o060_000),
        Body::Fifo => (5, 0o010_000),
        Body::Symlink(_) => (7, 0o120_000),
    }
}

/// Where everything in the metadata goes.
struct Plan {
    /// In the order of the inodes: the image root, then these. With the directory that holds a directory.
    order: Vec<(NodeId, NodeId)>,
    /// By [`NodeId`]: where the inode begins, in bytes from the beginning of the metadata; 0 for what has no name.
    places: Vec<u64>,
    /// Where the directories' blocks begin.
    directories: u64,
}

/// Where the image root and the layer's root begin.
const IMAGE_ROOT: u64 = INODE;
const LAYER_ROOT_PLACE: u64 = IMAGE_ROOT + INODE;

impl Plan {
    fn of(tree: &Tree<'_>) -> Result<Plan, ImageError> {
        let mut plan = Plan { order: Vec::new(), places: vec![0; tree.len()], directories: 0 };
        let mut end = plan.place(tree, (Tree::ROOT, Tree::ROOT), LAYER_ROOT_PLACE)?;
        let mut directories = VecDeque::from([Tree::ROOT]);
        while let Some(directory) = directories.pop_front() {
            for id in tree.children(directory).map(|(_, id)| id) {
                // A file has several names; the first one found places it.
                if plan.places[id.index()] != 0 {
                    continue;
                }
                end = plan.place(tree, (id, directory), end)?;
                if matches!(tree.node(id).body, Body::Directory(_)) {
                    directories.push_back(id);
                }
            }
        }
        plan.directories = end.next_multiple_of(BLOCK);
        Ok(plan)
    }

    /// Places an inode at or behind `at`; where the next one may begin.
    fn place(&mut self, tree: &Tree<'_>, node: (NodeId, NodeId), at: u64) -> Result<u64, ImageError> {
        let inode = tree.node(node.0);
        let body = INODE + xattr_size(&inode.xattrs);
        let (mut at, mut end) = (at, at + body);
        if let Body::Symlink(target) = &inode.body {
            let length = target.len() as u64;
            let crosses = |end: u64| end / BLOCK != (end + length - 1) / BLOCK;
            if crosses(end) {
                at = (end.next_multiple_of(BLOCK) - body).next_multiple_of(INODE);
                end = at + body;
            }
            if crosses(end) {
                let path = tree.name_of(node.0, node.1);
                return Err(ImageError::Unrepresentable { path, reason: Unrepresentable::Symlink });
            }
            end += length;
        }
        self.places[node.0.index()] = at;
        self.order.push(node);
        Ok(end.next_multiple_of(INODE))
    }

    /// Directories and what holds them, in the order of their inodes.
    fn directories_of(&self, tree: &Tree<'_>) -> impl Iterator<Item = (NodeId, NodeId)> {
        let nodes = self.order.iter().copied();
        nodes.filter(|(id, _)| matches!(tree.node(*id).body, Body::Directory(_)))
    }

    fn nid(&self, id: NodeId) -> u64 {
        self.places[id.index()] / NID_UNIT
    }
}

/// Writes the metadata of `tree` behind the data, and head and tail around all; where everything is then, and how many inodes
/// the layer has.
pub(super) fn write(tree: &Tree<'_>, mut data: Data<'_>, allowed: u64) -> Result<(Layout, u64), ImageError> {
    let start = data.end_files(allowed)?;
    let plan = Plan::of(tree)?;
    write_inodes(tree, &plan, start, &mut data)?;
    pad(&mut data, start + plan.directories)?;
    write_directory(&mut data, image_root())?;
    for (id, parent) in plan.directories_of(tree) {
        write_directory(&mut data, entries(tree, &plan, id, parent))?;
    }
    data.align()?;
    let end = data.position();
    let inodes = plan.order.len() as u64;
    let size = data.finish(&|size| superblock(start, size, inodes + 1))?;
    Ok((Layout { data: RESERVED..start, metadata: start..end, size }, inodes))
}

fn write_inodes(tree: &Tree<'_>, plan: &Plan, start: u64, data: &mut Data<'_>) -> Result<(), ImageError> {
    let mut next = start + plan.directories;
    let mut place = |inode: &mut Inode, entries: &mut dyn Iterator<Item = Dirent<'_>>| {
        let mut blocks = DirectoryBlocks::default();
        entries.for_each(|entry| blocks.count(entry.name));
        (inode.size, inode.word) = (blocks.size(), block_number(next));
        next += inode.size.next_multiple_of(BLOCK);
    };
    data.put(&[0; 64])?;
    let mut root = Inode { links: 3, ..Inode::new(0o040_755) };
    place(&mut root, &mut image_root());
    data.put(&root.encode(IMAGE_ROOT))?;
    for (id, parent) in &plan.order {
        let node = tree.node(*id);
        let mut inode = Inode::of(node);
        if matches!(node.body, Body::Directory(_)) {
            place(&mut inode, &mut entries(tree, plan, *id, *parent));
            let is_directory = |(_, id): &(&[u8], NodeId)| matches!(tree.node(*id).body, Body::Directory(_));
            let below = tree.children(*id).filter(is_directory).count();
            inode.links = u32::try_from(2 + below).unwrap_or(u32::MAX);
        }
        pad(data, start + plan.places[id.index()])?;
        data.put(&inode.encode(plan.places[id.index()]))?;
        data.put(&encode_xattrs(&node.xattrs))?;
        if let Body::Symlink(target) = &node.body {
            data.put(target)?;
        }
    }
    Ok(())
}

/// What is in the image root.
fn image_root() -> impl Iterator<Item = Dirent<'static>> {
    let names = [(&b"."[..], IMAGE_ROOT), (b"..", IMAGE_ROOT), (LAYER_ROOT, LAYER_ROOT_PLACE)];
    names.into_iter().map(|(name, place)| Dirent { name, nid: place / NID_UNIT, kind: DIRECTORY })
}

fn pad(data: &mut Data<'_>, to: u64) -> Result<(), ImageError> {
    let length = to.checked_sub(data.position()).and_then(|length| usize::try_from(length).ok());
    data.put(&vec![0; length.expect("inodes are placed one behind the other")])
}

fn superblock(metadata: u64, size: u64, inodes: u64) -> Vec<u8> {
    let mut block = vec![0; BLOCK_BYTES];
    let mut put = |at: usize, field: &[u8]| {
        block[SUPERBLOCK + at..SUPERBLOCK + at + field.len()].copy_from_slice(field);
    };
    put(0, &MAGIC.to_le_bytes());
    put(12, &[12]);
    let root = u16::try_from(IMAGE_ROOT / NID_UNIT).expect("the image root is the first inode");
    put(14, &root.to_le_bytes());
    put(16, &inodes.to_le_bytes());
    put(36, &block_number(size).to_le_bytes());
    put(40, &block_number(metadata).to_le_bytes());
    block
}

/// Reads where an image's parts are from its superblock; `None` if that is none of ours, or does not fit a file of `size` bytes.
pub(super) fn layout(block: &[u8], size: u64) -> Option<Layout> {
    let field = block.get(SUPERBLOCK..SUPERBLOCK + 128)?;
    let word = |at: usize| field.get(at..)?.first_chunk().map(|word| u32::from_le_bytes(*word));
    let is_ours = word(0)? == MAGIC && word(8)? == 0 && word(80)? == 0 && field[12] == 12;
    let metadata = u64::from(word(40)?) * BLOCK;
    let end = size.checked_sub(RESERVED)?;
    let fits = u64::from(word(36)?).checked_mul(BLOCK)? == size && RESERVED <= metadata && metadata < end;
    (is_ours && fits).then_some(Layout { data: RESERVED..metadata, metadata: metadata..end, size })
}

/// An extended inode.
struct Inode {
    inline: bool,
    xattrs: u64,
    mode: u16,
    size: u64,
    word: u32,
    uid: u32,
    gid: u32,
    mtime: Time,
    links: u32,
}

impl Inode {
    fn new(mode: u16) -> Inode {
        let mtime = Time::default();
        Inode { inline: false, xattrs: 0, mode, size: 0, word: 0, uid: 0, gid: 0, mtime, links: 1 }
    }

    fn of(node: &Node) -> Inode {
        let (size, word) = match &node.body {
            Body::File { size, block } => (*size, *block),
            Body::Symlink(target) => (target.len() as u64, 0),
            Body::CharDevice { major, minor } | Body::BlockDevice { major, minor } => {
                // The kernel's new_encode_dev.
                (0, (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12))
            }
            Body::Directory(_) | Body::Fifo => (0, 0),
        };
        Inode {
            inline: matches!(node.body, Body::Symlink(_)),
            xattrs: xattr_size(&node.xattrs),
            mode: kind(&node.body).1 | node.mode,
            size,
            word,
            uid: node.uid,
            gid: node.gid,
            mtime: node.mtime,
            links: node.links,
        }
    }

    /// `place`: where it begins in the metadata.
    fn encode(&self, place: u64) -> [u8; 64] {
        let mut bytes = [0; 64];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        let count = if self.xattrs == 0 { 0 } else { (self.xattrs - 12) / 4 + 1 };
        let count = u16::try_from(count).expect("a limit keeps xattrs to what can be counted");
        let number = u32::try_from((place / NID_UNIT) & u64::from(u32::MAX)).unwrap_or(0);
        put(0, &[1 | if self.inline { 2 << 1 } else { 0 }]);
        put(2, &count.to_le_bytes());
        put(4, &self.mode.to_le_bytes());
        put(8, &self.size.to_le_bytes());
        put(16, &self.word.to_le_bytes());
        put(20, &number.to_le_bytes());
        put(24, &self.uid.to_le_bytes());
        put(28, &self.gid.to_le_bytes());
        put(32, &self.mtime.seconds.to_le_bytes());
        put(40, &self.mtime.nanoseconds.to_le_bytes());
        put(44, &self.links.to_le_bytes());
        bytes
    }
}

/// Prefix number and the rest of the name.
fn split_name(name: &[u8]) -> (u8, &[u8]) {
    for (number, prefix) in [(1, &b"user."[..]), (4, b"trusted."), (6, b"security.")] {
        if let Some(rest) = name.strip_prefix(prefix) {
            return (number, rest);
        }
    }
    // The tree keeps no others.
    (0, name)
}

fn xattr_entry_size(xattr: &Xattr) -> u64 {
    (4 + split_name(&xattr.name).1.len() + xattr.value.len()).next_multiple_of(4) as u64
}

fn xattr_size(xattrs: &[Xattr]) -> u64 {
    if xattrs.is_empty() { 0 } else { 12 + xattrs.iter().map(xattr_entry_size).sum::<u64>() }
}

fn encode_xattrs(xattrs: &[Xattr]) -> Vec<u8> {
    if xattrs.is_empty() {
        return Vec::new();
    }
    let mut sorted: Vec<(u8, &[u8], &[u8])> = xattrs
        .iter()
        .map(|xattr| {
            let (prefix, name) = split_name(&xattr.name);
            (prefix, name, xattr.value.as_slice())
        })
        .collect();
    sorted.sort_unstable();
    let mut bytes = vec![0; 12];
    for (prefix, name, value) in sorted {
        bytes.push(u8::try_from(name.len()).expect("names have at most 255 bytes"));
        bytes.push(prefix);
        let length = u16::try_from(value.len()).expect("the tree keeps values to 65,535 bytes");
        bytes.extend(length.to_le_bytes());
        bytes.extend(name);
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

/// An entry of a directory.
struct Dirent<'a> {
    name: &'a [u8],
    nid: u64,
    kind: u8,
}

/// All entries of a directory, sorted, with `.` and `..` where they belong.
fn entries<'t>(
    tree: &'t Tree<'_>,
    plan: &'t Plan,
    id: NodeId,
    parent: NodeId,
) -> impl Iterator<Item = Dirent<'t>> {
    let above = if id == Tree::ROOT { IMAGE_ROOT / NID_UNIT } else { plan.nid(parent) };
    let dot = |name, nid| Dirent { name, nid, kind: DIRECTORY };
    let mut dots = [dot(&b"."[..], plan.nid(id)), dot(b"..", above)].into_iter().peekable();
    let mut children = tree.children(id).peekable();
    std::iter::from_fn(move || {
        let is_dot = match (dots.peek(), children.peek()) {
            (Some(dot), Some((name, _))) => dot.name < *name,
            (dot, _) => dot.is_some(),
        };
        if is_dot {
            return dots.next();
        }
        let (name, id) = children.next()?;
        Some(Dirent { name, nid: plan.nid(id), kind: kind(&tree.node(id).body).0 })
    })
}

/// How many blocks entries take.
#[derive(Default)]
struct DirectoryBlocks {
    full: u64,
    used: usize,
}

impl DirectoryBlocks {
    /// Whether an entry still fits the block.
    fn fits(&self, name: &[u8]) -> bool {
        self.used + DIRENT + name.len() <= BLOCK_BYTES
    }

    fn count(&mut self, name: &[u8]) {
        if !self.fits(name) {
            self.full += 1;
            self.used = 0;
        }
        self.used += DIRENT + name.len();
    }

    fn size(&self) -> u64 {
        self.full * BLOCK + self.used as u64
    }
}

fn write_directory<'t>(
    data: &mut Data<'_>,
    entries: impl Iterator<Item = Dirent<'t>>,
) -> Result<(), ImageError> {
    let mut block: Vec<Dirent<'_>> = Vec::new();
    let mut blocks = DirectoryBlocks::default();
    for entry in entries {
        if !blocks.fits(entry.name) {
            write_directory_block(data, &block)?;
            block.clear();
        }
        blocks.count(entry.name);
        block.push(entry);
    }
    write_directory_block(data, &block)
}

fn write_directory_block(data: &mut Data<'_>, entries: &[Dirent<'_>]) -> Result<(), ImageError> {
    let mut bytes = Vec::with_capacity(BLOCK_BYTES);
    let mut name_at = entries.len() * DIRENT;
    for entry in entries {
        bytes.extend(entry.nid.to_le_bytes());
        bytes.extend(u16::try_from(name_at).expect("a block has 4096 bytes").to_le_bytes());
        bytes.extend([entry.kind, 0]);
        name_at += entry.name.len();
    }
    entries.iter().for_each(|entry| bytes.extend(entry.name));
    data.put(&bytes)?;
    data.align()
}
