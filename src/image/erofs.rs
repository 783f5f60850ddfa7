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
//! children, those of a directory next to each other, each from a multiple of 64 bytes on; from the next block on, the full blocks
//! of the directories in the same order. A symlink's target, and what a directory has behind its full blocks, stands *inline*: behind
//! its inode and xattrs, and does not cross a block (which may leave the rest of a block empty before it). Where a directory's would
//! even so, because of its xattrs, all of it is in blocks. A directory's size ends with its last name. The image root is 0755, 0:0,
//! of 1970, and holds `fs` alone, the layer's root.
//!
//! Inline, because the kernel reads the metadata of an image block by block, without readahead: a tree of 5,072 directories took 5,576 reads
//! to list when each had a block of its own. Layer images of index format 1 are like that; they are read, and not made any more.

use std::collections::VecDeque;

use super::data::{Data, block_number};
use super::error::{ImageError, Unrepresentable};
use super::tar::{Time, Xattr};
use super::tree::{Body, NodeId, Tree};
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

/// Where the image root and the layer's root begin: behind the image root's inode are the entries `.`, `..` and `fs`.
pub(super) const IMAGE_ROOT: u64 = INODE;
const LAYER_ROOT_PLACE: u64 = IMAGE_ROOT + 2 * INODE;

/// Whether an inode that begins with these bytes has something behind it.
pub(super) fn is_inline(format: [u8; 2]) -> bool {
    u16::from_le_bytes(format) >> 1 & 7 == 2
}

/// Whether `length` bytes from `at` on, in bytes from a block boundary, are in more blocks than one.
pub(super) fn crosses(at: u64, length: u64) -> bool {
    length > 0 && at / BLOCK != (at + length - 1) / BLOCK
}

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
        let inline = match &inode.body {
            Body::Symlink(target) => target.len() as u64,
            Body::Directory(_) => directory_size(tree, node.0) % BLOCK,
            _ => 0,
        };
        let mut place = at;
        if crosses(at + body, inline) {
            place = ((at + body).next_multiple_of(BLOCK) - body).next_multiple_of(INODE);
        }
        let mut end = place + body + inline;
        if crosses(place + body, inline) {
            if let Body::Symlink(_) = &inode.body {
                let path = tree.name_of(node.0, node.1);
                return Err(ImageError::Unrepresentable { path, reason: Unrepresentable::Symlink });
            }
            (place, end) = (at, at + body);
        }
        self.places[node.0.index()] = place;
        self.order.push(node);
        Ok(end.next_multiple_of(INODE))
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
    let in_need = write_inodes(tree, &plan, start, &mut data)?;
    pad(&mut data, start + plan.directories)?;
    for (id, parent, blocks) in in_need {
        for (_, block) in (0..blocks).zip(in_blocks(entries(tree, &plan, id, parent))) {
            data.put(&encode_entries(&block))?;
            data.align()?;
        }
    }
    data.align()?;
    let end = data.position();
    let inodes = plan.order.len() as u64;
    let size = data.finish(&|size| superblock(start, size, inodes + 1))?;
    Ok((Layout { data: RESERVED..start, metadata: start..end, size }, inodes))
}

/// Which directories need blocks, with what holds them and how many, in the order of their inodes.
fn write_inodes(
    tree: &Tree<'_>,
    plan: &Plan,
    start: u64,
    data: &mut Data<'_>,
) -> Result<Vec<(NodeId, NodeId, u64)>, ImageError> {
    let mut in_need = Vec::new();
    let mut next = start + plan.directories;
    data.put(&[0; 64])?;
    let names = encode_entries(&image_root());
    let root = Inode { inline: true, size: names.len() as u64, links: 3, ..Inode::new(0o040_755) };
    data.put(&root.encode(IMAGE_ROOT))?;
    data.put(&names)?;
    for (id, parent) in &plan.order {
        let (node, place) = (tree.node(*id), plan.places[id.index()]);
        let mut inode = Inode::of(tree, *id, place);
        if inode.blocks() > 0 {
            inode.word = block_number(next);
            next += inode.blocks() * BLOCK;
            in_need.push((*id, *parent, inode.blocks()));
        }
        pad(data, start + place)?;
        data.put(&inode.encode(place))?;
        data.put(&encode_xattrs(&node.xattrs))?;
        match &node.body {
            Body::Symlink(target) => data.put(target)?,
            Body::Directory(_) if inode.inline => {
                let last = in_blocks(entries(tree, plan, *id, *parent)).last().unwrap_or_default();
                data.put(&encode_entries(&last))?;
            }
            _ => {}
        }
    }
    Ok(in_need)
}

/// What is in the image root.
fn image_root() -> [Dirent<'static>; 3] {
    let names = [(&b"."[..], IMAGE_ROOT), (b"..", IMAGE_ROOT), (LAYER_ROOT, LAYER_ROOT_PLACE)];
    names.map(|(name, place)| Dirent { name, nid: place / NID_UNIT, kind: DIRECTORY })
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

    /// That of a node which begins at `place` of the metadata. Where its blocks are, if it is a directory, is not said yet.
    fn of(tree: &Tree<'_>, id: NodeId, place: u64) -> Inode {
        let node = tree.node(id);
        let xattrs = xattr_size(&node.xattrs);
        let (size, word) = match &node.body {
            Body::File { size, block } => (*size, *block),
            Body::Symlink(target) => (target.len() as u64, 0),
            Body::CharDevice { major, minor } | Body::BlockDevice { major, minor } => {
                // The kernel's new_encode_dev.
                (0, (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12))
            }
            Body::Directory(_) => (directory_size(tree, id), 0),
            Body::Fifo => (0, 0),
        };
        let (inline, links) = match &node.body {
            Body::Symlink(_) => (true, node.links),
            Body::Directory(_) => {
                let is_directory =
                    |(_, id): &(&[u8], NodeId)| matches!(tree.node(*id).body, Body::Directory(_));
                let below = tree.children(id).filter(is_directory).count();
                let last = size % BLOCK;
                let inline = last > 0 && !crosses(place + INODE + xattrs, last);
                (inline, u32::try_from(2 + below).unwrap_or(u32::MAX))
            }
            _ => (false, node.links),
        };
        Inode {
            inline,
            xattrs,
            mode: kind(&node.body).1 | node.mode,
            size,
            word,
            uid: node.uid,
            gid: node.gid,
            mtime: node.mtime,
            links,
        }
    }

    /// How many blocks of names there are; none where this is no directory.
    fn blocks(&self) -> u64 {
        match self.mode & 0o170_000 {
            0o040_000 if self.inline => self.size / BLOCK,
            0o040_000 => self.size.div_ceil(BLOCK),
            _ => 0,
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

/// All names in a directory, sorted, with `.` and `..`, which are no nodes, where they belong.
fn names<'t>(tree: &'t Tree<'_>, id: NodeId) -> impl Iterator<Item = (&'t [u8], Option<NodeId>)> {
    let mut dots = [&b"."[..], b".."].into_iter().peekable();
    let mut children = tree.children(id).peekable();
    std::iter::from_fn(move || {
        let is_dot = match (dots.peek(), children.peek()) {
            (Some(dot), Some((name, _))) => dot < name,
            (dot, _) => dot.is_some(),
        };
        if is_dot {
            return dots.next().map(|dot| (dot, None));
        }
        children.next().map(|(name, id)| (name, Some(id)))
    })
}

/// All entries of a directory, sorted.
fn entries<'t>(
    tree: &'t Tree<'_>,
    plan: &'t Plan,
    id: NodeId,
    parent: NodeId,
) -> impl Iterator<Item = Dirent<'t>> {
    let above = if id == Tree::ROOT { IMAGE_ROOT / NID_UNIT } else { plan.nid(parent) };
    names(tree, id).map(move |(name, child)| match child {
        Some(child) => Dirent { name, nid: plan.nid(child), kind: kind(&tree.node(child).body).0 },
        None => Dirent { name, nid: if name == b"." { plan.nid(id) } else { above }, kind: DIRECTORY },
    })
}

/// The bytes that a directory's entries take: full blocks, and what the last ones need.
fn directory_size(tree: &Tree<'_>, id: NodeId) -> u64 {
    let (mut full, mut used) = (0, 0);
    for (name, _) in names(tree, id) {
        (full, used) = match with_entry(used, name) {
            Some(now) => (full, now),
            None => (full + 1, DIRENT + name.len()),
        };
    }
    full * BLOCK + used as u64
}

/// What one more entry makes of the `used` bytes of a block, if it fits.
fn with_entry(used: usize, name: &[u8]) -> Option<usize> {
    Some(used + DIRENT + name.len()).filter(|used| *used <= BLOCK_BYTES)
}

/// As many entries as fit, block by block.
fn in_blocks<'t>(entries: impl Iterator<Item = Dirent<'t>>) -> impl Iterator<Item = Vec<Dirent<'t>>> {
    let mut entries = entries.peekable();
    std::iter::from_fn(move || {
        let (mut block, mut used) = (Vec::new(), 0);
        while let Some(now) = entries.peek().and_then(|entry| with_entry(used, entry.name)) {
            used = now;
            block.extend(entries.next());
        }
        (!block.is_empty()).then_some(block)
    })
}

fn encode_entries(entries: &[Dirent<'_>]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(BLOCK_BYTES);
    let mut name_at = entries.len() * DIRENT;
    for entry in entries {
        bytes.extend(entry.nid.to_le_bytes());
        bytes.extend(u16::try_from(name_at).expect("a block has 4096 bytes").to_le_bytes());
        bytes.extend([entry.kind, 0]);
        name_at += entry.name.len();
    }
    entries.iter().for_each(|entry| bytes.extend(entry.name));
    bytes
}
