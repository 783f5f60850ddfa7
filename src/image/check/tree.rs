//! What holds between the records of an image: every byte belongs to something, every inode is reached, and the
//! directories are a tree.
//!
//! The writer puts inodes in the order in which they are met when the tree is walked breadth first, names in their
//! order, and the full blocks of directories in the order of their inodes. So one counter is enough to see that each inode is
//! reached, that a directory has one name, and that none lies in itself: a name leads to the next inode that none has led
//! to, or, if that is no directory, to one before.

use super::directory::{self, Entry};
use super::reader::{Metadata, PIECE, ReadAt, Window};
use super::record::{INODE, Inode, Kind, is_zero};
use super::{CheckError, Checked, Part, Time, refused, require};
use crate::image::BLOCK;
use crate::image::erofs::crosses;

/// Reads all metadata of an image and accepts it only if every rule of the module's page is kept.
pub fn check(image: &impl ReadAt, layout: &crate::image::Layout) -> Result<Checked, CheckError> {
    let metadata = Metadata::open(Borrowed(image), layout)?;
    let mut census = Census::take(&metadata)?;
    census.follow_entries(&metadata)?;
    let mut window = metadata.window(BLOCK);
    let root = metadata.root(&mut window)?;
    let fs = require_root(&metadata, &mut window, &root)?;
    Ok(Checked { inodes: metadata.superblock.inodes - 1, root_uid: fs.uid, root_gid: fs.gid })
}

/// So that the caller keeps the image.
struct Borrowed<'a, R>(&'a R);

impl<R: ReadAt> ReadAt for Borrowed<'_, R> {
    fn read_at(&self, buffer: &mut [u8], at: u64) -> std::io::Result<()> {
        self.0.read_at(buffer, at)
    }
}

/// What is remembered of an inode until all entries are known.
struct Seen {
    /// Its place in the metadata in units of [`INODE`]: 1 GiB of metadata has 2^24.
    slot: u32,
    kind: Kind,
    /// Links that no entry has accounted for yet.
    links: u32,
    /// Index of the directory that a directory lies in, once that is known.
    parent: u32,
}

struct Census {
    /// By slot; the image root first.
    seen: Vec<Seen>,
    /// How many of them have a name.
    reached: usize,
}

impl Census {
    /// Reads all inodes, one behind the other. Directories' blocks are where they should be.
    fn take<R: ReadAt>(metadata: &Metadata<R>) -> Result<Census, CheckError> {
        let region = &metadata.layout().metadata;
        let mut window = metadata.window(PIECE);
        let mut seen = Vec::new();
        // Where each directory begins, counted from the first one.
        let (mut blocks, mut first_block) = (0, None);
        // Nothing has the number 0.
        let mut end = region.start + INODE;
        require_zeros(&mut window, region.start, end)?;
        for _ in 0..metadata.superblock.inodes {
            let at = skip_zeros(&mut window, end, region.end)?;
            let inode = metadata.inode_at(&mut window, at)?;
            require(at == place(&inode, end), Part::Padding, end, "inodes in a row")?;
            metadata.xattrs(&mut window, &inode)?;
            metadata.target(&mut window, &inode)?;
            let mut links = inode.links;
            if inode.kind == Kind::Directory {
                // The name in the parent and `.`; each sub-directory's `..` is taken off when it is met.
                links = links.checked_sub(2).ok_or_else(|| refused(Part::Inode, at, "two links"))?;
                if inode.blocks() > 0 {
                    let first = *first_block.get_or_insert(inode.start());
                    let rule = "directories lie behind each other";
                    require(inode.start() == first + blocks, Part::Inode, at, rule)?;
                    blocks += inode.blocks() * BLOCK;
                }
            }
            let slot = u32::try_from((at - region.start) / INODE)
                .map_err(|_| refused(Part::Layout, at, "metadata within the limit"))?;
            seen.push(Seen { slot, kind: inode.kind, links, parent: 0 });
            end = inode.end().next_multiple_of(INODE).min(region.end);
            require_zeros(&mut window, inode.end(), end)?;
        }
        let first = end.next_multiple_of(BLOCK);
        require_zeros(&mut window, end, first)?;
        let is_behind = first_block.is_none_or(|block| block == first);
        require(is_behind, Part::Padding, end, "directories begin behind the inodes")?;
        require(first + blocks == region.end, Part::Padding, first + blocks, "directories end the metadata")?;
        Ok(Census { seen, reached: 1 })
    }

    /// Reads all directories and counts what leads where.
    fn follow_entries<R: ReadAt>(&mut self, metadata: &Metadata<R>) -> Result<(), CheckError> {
        let region = &metadata.layout().metadata;
        let (mut inodes, mut blocks) = (metadata.window(PIECE), metadata.window(PIECE));
        for index in 0..self.seen.len() {
            let at = region.start + u64::from(self.seen[index].slot) * INODE;
            require(
                index < self.reached,
                Part::Tree,
                at,
                "each inode has a name, in the order of the inodes",
            )?;
            if self.seen[index].kind != Kind::Directory {
                continue;
            }
            let directory = metadata.inode_at(&mut inodes, at)?;
            let mut dots = 0;
            directory::each((&mut inodes, &mut blocks), &directory, &mut |entry| {
                dots += u32::from(entry.name == b"." || entry.name == b"..");
                self.follow(index, &directory, &entry)
            })?;
            require(dots == 2, Part::Directory, at, "`.` and `..` are there")?;
        }
        for seen in &self.seen {
            let at = region.start + u64::from(seen.slot) * INODE;
            require(seen.links == 0, Part::Tree, at, "as many names as links")?;
        }
        Ok(())
    }

    fn follow(&mut self, index: usize, directory: &Inode, entry: &Entry<'_>) -> Result<(), CheckError> {
        let rule = |kept, rule| require(kept, Part::Directory, directory.at, rule);
        let child = self.index_of(entry.nid);
        let child =
            child.ok_or_else(|| refused(Part::Directory, directory.at, "a name leads to an inode"))?;
        rule(entry.kind == self.seen[child].kind.in_directory(), "the type is that of the inode")?;
        match entry.name {
            b"." => return rule(child == index, "`.` is the directory itself"),
            b".." => {
                let parent = usize::try_from(self.seen[index].parent);
                return rule(parent == Ok(child), "`..` is the directory that holds it");
            }
            _ => {}
        }
        // A sub-directory's link to its parent, or this name's link to the inode.
        let mut counted = child;
        if self.seen[child].kind == Kind::Directory {
            rule(child == self.reached, "a directory has one name, in the order of the inodes")?;
            self.seen[child].parent = u32::try_from(index).unwrap_or(u32::MAX);
            counted = index;
        }
        rule(child <= self.reached, "names lead to inodes in their order")?;
        self.reached += usize::from(child == self.reached);
        let links = self.seen[counted].links.checked_sub(1);
        rule(links.is_some(), "no more names than links")?;
        self.seen[counted].links = links.unwrap_or_default();
        Ok(())
    }

    fn index_of(&self, nid: u64) -> Option<usize> {
        // nids count units of 32 bytes, slots of 64.
        let slot = u32::try_from(nid / 2).ok().filter(|_| nid.is_multiple_of(2))?;
        match self.seen.get(self.reached) {
            Some(next) if next.slot == slot => Some(self.reached),
            _ => self.seen.binary_search_by_key(&slot, |seen| seen.slot).ok(),
        }
    }
}

/// Where an inode goes if the one before ended at `end`: right there, but where what is inline would cross a block.
fn place(inode: &Inode, end: u64) -> u64 {
    let inline = inode.inline_range();
    let (body, length) = (inline.start - inode.at, inline.end - inline.start);
    if !crosses(end + body, length) {
        return end;
    }
    ((end + body).next_multiple_of(BLOCK) - body).next_multiple_of(INODE)
}

/// Where the next inode is: our writer leaves less than a block empty before one.
fn skip_zeros(window: &mut Window<'_>, from: u64, end: u64) -> Result<u64, CheckError> {
    let mut at = from;
    while at < end && at < from + BLOCK && is_zero(window.bytes(at..at + INODE)?) {
        at += INODE;
    }
    require(at < end, Part::Superblock, 1040, "as many inodes as the superblock says")?;
    Ok(at)
}

fn require_zeros(window: &mut Window<'_>, from: u64, to: u64) -> Result<(), CheckError> {
    require(is_zero(window.bytes(from..to)?), Part::Padding, from, "zeros between records")
}

/// The image root holds `fs` and nothing else, and is like every other image's.
fn require_root<R: ReadAt>(
    metadata: &Metadata<R>,
    window: &mut Window<'_>,
    root: &Inode,
) -> Result<Inode, CheckError> {
    let rule = |kept, rule| require(kept, Part::Tree, root.at, rule);
    let plain = (root.mode, root.uid, root.gid, root.xattrs, root.mtime) == (0o755, 0, 0, 0, Time::default());
    rule(root.kind == Kind::Directory && plain, "the image root is a directory with plain attributes")?;
    let (mut names, mut fs) = (0, None);
    directory::each((window, &mut metadata.window(BLOCK)), root, &mut |entry| {
        names += 1;
        fs = fs.or((entry.name == b"fs").then_some(entry.nid));
        Ok(())
    })?;
    rule(names == 3, "the image root holds `fs` alone")?;
    let fs = fs.ok_or_else(|| refused(Part::Tree, root.at, "the image root holds `fs`"))?;
    let fs = metadata.inode(window, fs)?;
    rule(fs.kind == Kind::Directory, "`fs` is a directory")?;
    Ok(fs)
}
