//! Reading an image's metadata in bounded pieces, and answering questions about single paths.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::directory::{self, Entry};
use super::record::{self, INODE, Inode, Kind, NID_UNIT, Superblock};
use super::{CheckError, NodeInfo, Part, Xattr, refused, require, require_layout};
use crate::image::{BLOCK, Layout};

/// Bytes read at a time where all are read.
pub(super) const PIECE: u64 = 256 * 1024;

/// Bytes of an image by their place in it.
pub trait ReadAt {
    /// Fills `buffer` with what stands from byte `at` on; fails where the image ends before.
    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<()>;
}

impl ReadAt for File {
    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        self.read_exact_at(buffer, at)
    }
}

/// The two parts of an image that are checked, in memory.
#[derive(Debug, Clone, Copy)]
pub struct Parts<'a> {
    /// Block 0.
    pub head: &'a [u8],
    /// The metadata region.
    pub metadata: &'a [u8],
    /// Where the metadata region begins in the image.
    pub metadata_at: u64,
}

impl ReadAt for Parts<'_> {
    fn read_at(&self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        let (part, at) = match at.checked_sub(self.metadata_at) {
            Some(at) => (self.metadata, at),
            None => (self.head, at),
        };
        let found = usize::try_from(at).ok().and_then(|at| part.get(at..at.checked_add(buffer.len())?));
        buffer.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// A piece of the metadata region in memory, moved along as reading goes on.
pub(super) struct Window<'a> {
    image: &'a dyn ReadAt,
    region: Range<u64>,
    piece: u64,
    at: u64,
    bytes: Vec<u8>,
}

impl<'a> Window<'a> {
    /// A window that is moved on by `piece` bytes at least.
    fn new(image: &'a dyn ReadAt, region: Range<u64>, piece: u64) -> Window<'a> {
        Window { image, at: region.start, region, piece, bytes: Vec::new() }
    }

    /// The bytes of `range`, which must lie in the region and be shorter than 2 MiB.
    pub(super) fn bytes(&mut self, range: Range<u64>) -> Result<&[u8], CheckError> {
        if range.start < self.region.start || range.end > self.region.end {
            return Err(refused(Part::Layout, range.start, "what is read lies in the metadata"));
        }
        let held = self.at..self.at + self.bytes.len() as u64;
        if range.start < held.start || range.end > held.end {
            let end = (range.start + self.piece).max(range.end).min(self.region.end);
            // Nothing is held if the read fails.
            let mut bytes = std::mem::take(&mut self.bytes);
            bytes.resize(length(&(range.start..end)), 0);
            self.image.read_at(&mut bytes, range.start)?;
            (self.at, self.bytes) = (range.start, bytes);
        }
        let from = length(&(self.at..range.start));
        Ok(&self.bytes[from..from + length(&range)])
    }
}

/// The length of a range that is known to be short.
fn length(range: &Range<u64>) -> usize {
    usize::try_from(range.end - range.start).expect("ranges in memory are short")
}

/// The metadata of one image, read as needed. Every record that is touched is checked as [`super::check`] does; what
/// holds between records is not.
#[derive(Debug)]
pub struct Metadata<R> {
    image: R,
    layout: Layout,
    pub(super) superblock: Superblock,
}

impl<R: ReadAt> Metadata<R> {
    /// Reads the superblock.
    pub fn open(image: R, layout: &Layout) -> Result<Metadata<R>, CheckError> {
        require_layout(layout)?;
        let mut block = vec![0; length(&(0..BLOCK))];
        image.read_at(&mut block, 0)?;
        let superblock = Superblock::parse(&block, layout)?;
        Ok(Metadata { image, layout: layout.clone(), superblock })
    }

    /// Where the parts of the image are.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// What stands at `path` below the layer root, which is the empty path. Links are not followed. `None` where
    /// nothing stands, also where something on the way is not a directory.
    pub fn lookup<'p>(
        &self,
        path: impl IntoIterator<Item = &'p [u8]>,
    ) -> Result<Option<NodeInfo>, CheckError> {
        let mut window = self.window(BLOCK);
        let mut inode = self.root(&mut window)?;
        for name in [&b"fs"[..]].into_iter().chain(path) {
            if inode.kind != Kind::Directory || name == b"." || name == b".." {
                return Ok(None);
            }
            match directory::find(&mut window, &inode, name)? {
                Some(nid) => inode = self.inode(&mut window, nid)?,
                None => return Ok(None),
            }
        }
        self.info(&mut window, &inode).map(Some)
    }

    /// The layer's root.
    pub(in crate::image) fn layer_root(&self) -> Result<NodeInfo, CheckError> {
        let mut window = self.window(BLOCK);
        let inode = self.layer_root_inode(&mut window)?;
        self.info(&mut window, &inode)
    }

    /// What a single name stands for in a directory of this image.
    pub(in crate::image) fn child(
        &self,
        directory: &NodeInfo,
        name: &[u8],
    ) -> Result<Option<NodeInfo>, CheckError> {
        let mut window = self.window(BLOCK);
        let directory = self.inode(&mut window, directory.nid)?;
        let Some(nid) = directory::find(&mut window, &directory, name)? else { return Ok(None) };
        let inode = self.inode(&mut window, nid)?;
        self.info(&mut window, &inode).map(Some)
    }

    /// Calls `visit` with each path below the layer root (names joined by `/`; the root itself is empty) and what
    /// stands there: a directory before its entries, those in the order of their names. Ends early when `visit`
    /// answers an error.
    pub fn walk<E: From<CheckError>>(
        &self,
        mut visit: impl FnMut(&[u8], &NodeInfo) -> Result<(), E>,
    ) -> Result<(), E> {
        let (mut window, mut blocks) = (self.window(PIECE), self.window(PIECE));
        let mut path = Vec::new();
        let inode = self.layer_root_inode(&mut window)?;
        visit(&path, &self.info(&mut window, &inode)?)?;
        // A directory that holds itself would be walked for ever.
        let mut left = self.superblock.inodes;
        let mut stack = vec![Level { entries: self.names((&mut window, &mut blocks), &inode)?, path: 0 }];
        while let Some(level) = stack.last_mut() {
            path.truncate(level.path);
            let Some(entry) = level.entries.next() else {
                stack.pop();
                continue;
            };
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(&entry.name);
            let inode = self.inode(&mut window, entry.nid)?;
            visit(&path, &self.info(&mut window, &inode)?)?;
            if inode.kind == Kind::Directory {
                left = left.checked_sub(1).ok_or_else(|| refused(Part::Tree, inode.at, "a tree"))?;
                stack.push(Level {
                    entries: self.names((&mut window, &mut blocks), &inode)?,
                    path: path.len(),
                });
            }
        }
        Ok(())
    }

    pub(super) fn window(&self, piece: u64) -> Window<'_> {
        Window::new(&self.image, self.layout.metadata.clone(), piece)
    }

    pub(super) fn root(&self, window: &mut Window<'_>) -> Result<Inode, CheckError> {
        self.inode(window, self.superblock.root_nid)
    }

    fn layer_root_inode(&self, window: &mut Window<'_>) -> Result<Inode, CheckError> {
        let root = self.root(window)?;
        let fs = directory::find(window, &root, b"fs")?;
        let fs = fs.ok_or_else(|| refused(Part::Tree, root.at, "the image root has `fs`"))?;
        self.inode(window, fs)
    }

    pub(super) fn inode(&self, window: &mut Window<'_>, nid: u64) -> Result<Inode, CheckError> {
        let at = nid.checked_mul(NID_UNIT).and_then(|offset| offset.checked_add(self.layout.metadata.start));
        let at = at.filter(|at| at.is_multiple_of(INODE) && *at < self.layout.metadata.end);
        let at =
            at.ok_or_else(|| refused(Part::Inode, self.layout.metadata.start, "a nid in the metadata"))?;
        self.inode_at(window, at)
    }

    /// The inode at byte `at`, a multiple of [`INODE`] in the metadata.
    pub(super) fn inode_at(&self, window: &mut Window<'_>, at: u64) -> Result<Inode, CheckError> {
        Inode::parse(window.bytes(at..at + INODE)?, at, &self.layout)
    }

    pub(super) fn xattrs(&self, window: &mut Window<'_>, inode: &Inode) -> Result<Vec<Xattr>, CheckError> {
        record::xattrs(window.bytes(inode.xattr_range())?, inode)
    }

    pub(super) fn target(&self, window: &mut Window<'_>, inode: &Inode) -> Result<Vec<u8>, CheckError> {
        if inode.kind != Kind::Symlink {
            return Ok(Vec::new());
        }
        let place = inode.inline_range();
        let target = window.bytes(place.clone())?;
        require(!target.contains(&0), Part::Symlink, place.start, "a target without NUL")?;
        Ok(target.to_vec())
    }

    fn info(&self, window: &mut Window<'_>, inode: &Inode) -> Result<NodeInfo, CheckError> {
        let xattrs = self.xattrs(window, inode)?;
        let target = self.target(window, inode)?;
        Ok(NodeInfo {
            nid: inode.nid,
            mode: inode.mode,
            uid: inode.uid,
            gid: inode.gid,
            mtime: inode.mtime,
            links: inode.links,
            xattrs,
            kind: inode.node_kind(target),
        })
    }

    fn names<'i>(
        &self,
        windows: (&mut Window<'i>, &mut Window<'i>),
        inode: &Inode,
    ) -> Result<std::vec::IntoIter<Owned>, CheckError> {
        let mut names = Vec::new();
        directory::each(windows, inode, &mut |entry: Entry<'_>| {
            if entry.name != b"." && entry.name != b".." {
                names.push(Owned { nid: entry.nid, name: entry.name.to_vec() });
            }
            Ok(())
        })?;
        Ok(names.into_iter())
    }
}

struct Owned {
    nid: u64,
    name: Vec<u8>,
}

struct Level {
    entries: std::vec::IntoIter<Owned>,
    /// Length of the directory's own path.
    path: usize,
}
