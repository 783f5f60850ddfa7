//! The files of a layer as containerd's applier would leave them in an empty upperdir, in memory and without their data.
//!
//! **What.** [`Tree::apply`] takes entries one by one and does what the applier does with a directory (`pkg/archive/tar.go`,
//! `tar_unix.go`, `tar_opts_linux.go` of containerd 2.4, and what the kernel does when it is told so by root): a file replaces
//! what is there, directories merge, hard links share an inode and set its attributes again, whiteouts become character
//! devices 0:0 and an xattr, parents that the layer lacks are made with the attributes they have below.
//!
//! **Where.** Fed by `build` from a `tar::Reader`; laid out by `erofs`.
//!
//! **Words.** *implied*: a directory on an entry's path that the layer has no entry for before that. *below*: the layers under
//! this one, see [`Below`].
//!
//! **Invariants.**
//! * **T1** The tree depends on the entries and on what [`Below`] answered, on nothing else; [`Tree::attributes_key`] is `None`
//!   if all answers could as well have been "nothing there".
//! * **T2** Times that the applier takes from the clock are times of the layer: an implied directory has that of the entry that
//!   implied it, the root that of the layer's first entry, a whiteout that of 1970.
//! * **T3** Every name is that of exactly one child; a directory has one name; `links` of a file are its names.
//!
//! **When it fails.** An entry that the applier refuses is refused; the tree is then not to be used any more.

mod path;
mod xattrs;

use std::collections::BTreeMap;
use std::io;

use super::error::{EntryFault, ImageError, shown};
use super::limits::{Limit, Limits};
use super::tar::{Entry, Kind, Time, Whiteout, Xattr};

const SETGID: u16 = 0o2000;
const DEFAULT_MODE: u16 = 0o755;
const OPAQUE: &[u8] = b"trusted.overlay.opaque";

/// What a directory has beside its content.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Attributes {
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Extended attributes, in any order. Those of `user.` and `security.` are taken over, and nothing else.
    pub xattrs: Vec<Xattr>,
}

/// The layers under the one that is read: where implied directories get their attributes.
pub trait Below {
    /// What the directory at `path` (names from the root; none for the root itself) is like.
    ///
    /// As containerd's applier looks it up (`mkparent`): the layers are asked from the top down, each by itself with the symlinks
    /// in it followed inside its own root, the last name too. The first that has something there decides: its attributes if it is
    /// a directory, else `None`; `None` as well if no layer has it. For the root only the owner counts: a snapshot's own root is
    /// always 0755 and has the owner of its parent's.
    fn directory(&self, path: &[&[u8]]) -> io::Result<Option<Attributes>>;
}

/// No layers below.
#[derive(Debug, Clone, Copy)]
pub struct NothingBelow;

impl Below for NothingBelow {
    fn directory(&self, _path: &[&[u8]]) -> io::Result<Option<Attributes>> {
        Ok(None)
    }
}

/// Number of an inode in its tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct NodeId(u32);

/// An inode.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) body: Body,
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Names of a file; 0 when it has none any more.
    pub(super) links: u32,
    pub(super) mtime: Time,
    /// Sorted by name.
    pub(super) xattrs: Vec<Xattr>,
}

#[derive(Debug)]
pub(super) enum Body {
    Directory(BTreeMap<Box<[u8]>, NodeId>),
    /// Size in bytes, and the image's block where the data begins (0 if there is none).
    File {
        size: u64,
        block: u32,
    },
    Symlink(Box<[u8]>),
    CharDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Fifo,
}

/// The tree of one layer.
pub(super) struct Tree<'a> {
    nodes: Vec<Node>,
    below: &'a dyn Below,
    limits: &'a Limits,
    /// Entries and implied directories so far.
    entries: u64,
    /// About what the image's metadata takes, and what is remembered until the end.
    metadata: u64,
    /// Path and time of each directory entry: containerd sets these times again at the very end.
    times: Vec<(Box<[u8]>, Time)>,
    taken: BTreeMap<NodeId, Taken>,
}

/// Attributes that an implied directory took from below and would not have had otherwise.
struct Taken {
    path: Vec<u8>,
    attributes: Attributes,
}

impl Tree<'_> {
    pub(super) const ROOT: NodeId = NodeId(0);
}

impl<'a> Tree<'a> {
    /// An empty layer.
    pub(super) fn new(below: &'a dyn Below, limits: &'a Limits) -> Result<Tree<'a>, ImageError> {
        let above = below.directory(&[]).map_err(|source| ImageError::Below { path: "/".into(), source })?;
        let mut root = Node::new(Body::Directory(BTreeMap::new()));
        root.mode = DEFAULT_MODE;
        let owner = above.map_or((0, 0), |attributes| (attributes.uid, attributes.gid));
        (root.uid, root.gid) = owner;
        let mut taken = BTreeMap::new();
        if owner != (0, 0) {
            let attributes =
                Attributes { mode: DEFAULT_MODE, uid: root.uid, gid: root.gid, xattrs: Vec::new() };
            taken.insert(Tree::ROOT, Taken { path: Vec::new(), attributes });
        }
        Ok(Tree { nodes: vec![root], below, limits, entries: 0, metadata: 0, times: Vec::new(), taken })
    }

    pub(super) fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }

    /// Inodes that were ever made, the root among them.
    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Names and inodes in a directory, sorted by name; nothing for what is none.
    pub(super) fn children(&self, directory: NodeId) -> impl Iterator<Item = (&[u8], NodeId)> {
        let children = match &self.node(directory).body {
            Body::Directory(children) => Some(children),
            _ => None,
        };
        children.into_iter().flatten().map(|(name, id)| (&**name, *id))
    }

    /// A name for people: that of `id` in `directory`.
    pub(super) fn name_of(&self, id: NodeId, directory: NodeId) -> String {
        self.children(directory).find(|(_, child)| *child == id).map_or("/".into(), |(name, _)| shown(name))
    }

    fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id.index()]
    }

    /// Does what `entry` says. The inode of a regular file is returned: its data is to be given to [`Tree::set_data`].
    pub(super) fn apply(&mut self, entry: &Entry) -> Result<Option<NodeId>, ImageError> {
        if self.entries == 0 {
            self.node_mut(Tree::ROOT).mtime = entry.mtime;
        }
        self.count_entry()?;
        let Some((directory, name)) = entry.path.split() else { return Ok(None) };
        let parent = self.resolve(directory, entry.path.as_bytes())?;
        let parent = self.make_parents(&parent, entry)?;
        match entry.path.whiteout()? {
            Some(whiteout) => self.apply_whiteout(parent, whiteout, entry).map(|()| None),
            None => self.apply_file(parent, name, entry),
        }
    }

    /// Where a file's data is in the image.
    pub(super) fn set_data(&mut self, file: NodeId, size: u64, block: u32) {
        self.node_mut(file).body = Body::File { size, block };
    }

    fn count_entry(&mut self) -> Result<(), ImageError> {
        self.entries += 1;
        if self.entries > self.limits.entries {
            return Err(ImageError::limit(Limit::Entries, self.limits.entries));
        }
        Ok(())
    }

    fn count_metadata(&mut self, bytes: usize) -> Result<(), ImageError> {
        self.metadata += bytes as u64;
        if self.metadata > self.limits.metadata {
            return Err(ImageError::limit(Limit::Metadata, self.limits.metadata));
        }
        Ok(())
    }

    fn child(&self, directory: NodeId, name: &[u8]) -> Option<NodeId> {
        match &self.node(directory).body {
            Body::Directory(children) => children.get(name).copied(),
            _ => None,
        }
    }

    fn is_directory(&self, id: NodeId) -> bool {
        matches!(self.node(id).body, Body::Directory(_))
    }

    /// A new inode under a name that is free. It has the group that the kernel gives: the directory's, if that is setgid.
    fn insert(&mut self, parent: NodeId, name: &[u8], body: Body) -> Result<NodeId, ImageError> {
        let own = match &body {
            // A directory takes a block at least.
            Body::Directory(_) => 4096,
            Body::Symlink(target) => target.len(),
            Body::File { .. } | Body::CharDevice { .. } | Body::BlockDevice { .. } | Body::Fifo => 0,
        };
        self.count_metadata(64 + own)?;
        let id = u32::try_from(self.nodes.len()).map(NodeId);
        let id = id.map_err(|_| ImageError::limit(Limit::Entries, self.limits.entries))?;
        let mut node = Node::new(body);
        node.gid = self.inherited_gid(parent);
        self.nodes.push(node);
        self.link(parent, name, id)?;
        Ok(id)
    }

    fn inherited_gid(&self, parent: NodeId) -> u32 {
        let parent = self.node(parent);
        if parent.mode & SETGID == 0 { 0 } else { parent.gid }
    }

    fn link(&mut self, parent: NodeId, name: &[u8], id: NodeId) -> Result<(), ImageError> {
        self.count_metadata(12 + name.len())?;
        let Body::Directory(children) = &mut self.node_mut(parent).body else {
            unreachable!("names are put into directories only");
        };
        children.insert(name.into(), id);
        self.node_mut(id).links += 1;
        Ok(())
    }

    /// Takes a name away, and everything below it.
    fn remove(&mut self, parent: NodeId, name: &[u8]) {
        let Body::Directory(children) = &mut self.node_mut(parent).body else { return };
        let mut gone: Vec<NodeId> = children.remove(name).into_iter().collect();
        while let Some(id) = gone.pop() {
            let node = self.node_mut(id);
            node.links -= 1;
            if let Body::Directory(children) = &mut node.body {
                gone.extend(std::mem::take(children).into_values());
            }
        }
    }

    fn apply_whiteout(
        &mut self,
        parent: NodeId,
        whiteout: Whiteout<'_>,
        entry: &Entry,
    ) -> Result<(), ImageError> {
        match whiteout {
            Whiteout::Opaque => {
                let opaque = Xattr { name: OPAQUE.to_vec(), value: b"y".to_vec() };
                self.set_xattr(parent, opaque, entry.path.as_bytes())
            }
            Whiteout::Of(name) if self.child(parent, name).is_some() => {
                Err(ImageError::entry(entry.path.as_bytes(), EntryFault::WhiteoutOccupied))
            }
            Whiteout::Of(name) => {
                let id = self.insert(parent, name, Body::CharDevice { major: 0, minor: 0 })?;
                self.node_mut(id).own(entry);
                Ok(())
            }
        }
    }

    fn apply_file(
        &mut self,
        parent: NodeId,
        name: &[u8],
        entry: &Entry,
    ) -> Result<Option<NodeId>, ImageError> {
        let present = self.child(parent, name);
        let merged = present.filter(|id| self.is_directory(*id) && entry.kind == Kind::Directory);
        if merged.is_none() {
            self.remove(parent, name);
        }
        let id = match (merged, self.body(entry)?) {
            (Some(id), _) => id,
            (None, Made::Body(body)) => self.insert(parent, name, body)?,
            (None, Made::Linked(id)) => {
                self.link(parent, name, id)?;
                // To change a file's owner, as is done next, takes its capabilities away.
                self.remove_xattr(id, b"security.capability");
                id
            }
            (None, Made::Nothing) => return Ok(None),
        };
        self.node_mut(id).own(entry);
        self.set_xattrs(id, entry)?;
        let node = self.node_mut(id);
        if !matches!(node.body, Body::Symlink(_)) {
            node.mode = entry.mode;
        }
        node.mtime = entry.mtime;
        if entry.kind == Kind::Directory {
            self.remember_time(entry)?;
            self.forget_taken(id);
        }
        Ok(Some(id).filter(|_| entry.kind == Kind::File))
    }

    fn remember_time(&mut self, entry: &Entry) -> Result<(), ImageError> {
        let path = entry.path.as_bytes();
        self.count_metadata(32 + path.len())?;
        self.times.push((path.into(), entry.mtime));
        Ok(())
    }

    fn body(&self, entry: &Entry) -> Result<Made, ImageError> {
        Ok(Made::Body(match &entry.kind {
            Kind::Directory => Body::Directory(BTreeMap::new()),
            Kind::File => Body::File { size: 0, block: 0 },
            Kind::Symlink { target } => Body::Symlink(target.as_slice().into()),
            Kind::CharDevice { major, minor } => Body::CharDevice { major: *major, minor: *minor },
            Kind::BlockDevice { major, minor } => Body::BlockDevice { major: *major, minor: *minor },
            Kind::Fifo => Body::Fifo,
            Kind::HardLink { target } => return self.link_target(target, entry).map(Made::Linked),
            Kind::Global => return Ok(Made::Nothing),
        }))
    }

    /// Makes what is missing of `path`, which is free of symlinks, and returns its last directory.
    fn make_parents(&mut self, path: &[u8], entry: &Entry) -> Result<NodeId, ImageError> {
        let mut at = Tree::ROOT;
        let mut end = 0;
        for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
            end += name.len() + 1;
            at = match self.child(at, name) {
                Some(id) if self.is_directory(id) => id,
                Some(_) => return Err(ImageError::entry(entry.path.as_bytes(), EntryFault::NotADirectory)),
                None => self.imply(at, name, &path[..end], entry.mtime)?,
            };
        }
        Ok(at)
    }

    /// Makes a directory that the layer has no entry for. `path` begins with a slash.
    fn imply(&mut self, parent: NodeId, name: &[u8], path: &[u8], mtime: Time) -> Result<NodeId, ImageError> {
        self.count_entry()?;
        let id = self.insert(parent, name, Body::Directory(BTreeMap::new()))?;
        let names: Vec<&[u8]> = path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()).collect();
        let found = self.below.directory(&names);
        let found = found.map_err(|source| ImageError::Below { path: shown(path), source })?;
        let node = self.node_mut(id);
        (node.mode, node.mtime) = (DEFAULT_MODE, mtime);
        let Some(mut attributes) = found else { return Ok(id) };
        attributes.mode &= 0o7777;
        attributes.xattrs.retain(xattrs::is_taken_over);
        attributes.xattrs.sort();
        let plain = Attributes { mode: DEFAULT_MODE, uid: node.uid, gid: node.gid, xattrs: Vec::new() };
        (node.mode, node.uid, node.gid) = (attributes.mode, attributes.uid, attributes.gid);
        for xattr in &attributes.xattrs {
            self.set_xattr(id, xattr.clone(), path)?;
        }
        if attributes != plain {
            self.taken.insert(id, Taken { path: path[1..].to_vec(), attributes });
        }
        Ok(id)
    }

    /// An entry of its own takes the place of all that a directory took from below, unless something else may have followed
    /// from that: xattrs stay, and a setgid bit gave its group to what was made meanwhile.
    fn forget_taken(&mut self, id: NodeId) {
        let Some(Taken { attributes, .. }) = self.taken.get(&id) else { return };
        if attributes.mode & SETGID == 0 && attributes.xattrs.is_empty() {
            self.taken.remove(&id);
        }
    }

    /// Sets the times of directories again, as containerd does when all entries are applied: symlinks that have taken a
    /// directory's place by then are followed, and a path that leads nowhere is an error.
    pub(super) fn finish(&mut self) -> Result<(), ImageError> {
        for (path, mtime) in std::mem::take(&mut self.times) {
            let gone = || ImageError::entry(&path, EntryFault::DirectoryGone);
            let resolved = self.resolve(&path, &path).map_err(|_| gone())?;
            let id = self.find(&resolved).ok_or_else(gone)?;
            self.node_mut(id).mtime = mtime;
        }
        Ok(())
    }

    /// BLAKE3 over what implied directories took from below and would not have had otherwise, sorted by path:
    ///
    /// ```text
    /// "speedy: implied directories, 1\n"
    /// each: path, mode u32, uid u32, gid u32, number of xattrs u32, each: name, value
    /// path, name, value: length u32, bytes. Numbers are little endian.
    /// ```
    pub(super) fn attributes_key(&self) -> Option<super::AttributesKey> {
        // What was removed again left nothing behind, unless its group did.
        let counts =
            |(id, taken): &(&NodeId, &Taken)| taken.attributes.mode & SETGID != 0 || self.is_used(**id);
        let mut taken: Vec<&Taken> = self.taken.iter().filter(counts).map(|(_, taken)| taken).collect();
        // Equal paths stay in the order in which they were made.
        taken.sort_by(|a, b| a.path.cmp(&b.path));
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"speedy: implied directories, 1\n");
        let number = |hasher: &mut blake3::Hasher, number: u32| {
            hasher.update(&number.to_le_bytes());
        };
        let bytes = |hasher: &mut blake3::Hasher, bytes: &[u8]| {
            hasher.update(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes());
            hasher.update(bytes);
        };
        for Taken { path, attributes, .. } in &taken {
            bytes(&mut hasher, path);
            number(&mut hasher, attributes.mode.into());
            number(&mut hasher, attributes.uid);
            number(&mut hasher, attributes.gid);
            number(&mut hasher, u32::try_from(attributes.xattrs.len()).unwrap_or(u32::MAX));
            for xattr in &attributes.xattrs {
                bytes(&mut hasher, &xattr.name);
                bytes(&mut hasher, &xattr.value);
            }
        }
        if taken.is_empty() { None } else { Some(*hasher.finalize().as_bytes()) }
    }

    fn is_used(&self, id: NodeId) -> bool {
        id == Tree::ROOT || self.node(id).links > 0
    }
}

/// What an entry makes.
enum Made {
    Body(Body),
    Linked(NodeId),
    Nothing,
}

impl Node {
    fn new(body: Body) -> Node {
        let mode = if matches!(body, Body::Symlink(_)) { 0o777 } else { 0 };
        Node { body, mode, uid: 0, gid: 0, links: 0, mtime: Time::default(), xattrs: Vec::new() }
    }

    fn own(&mut self, entry: &Entry) {
        self.uid = entry.uid.unwrap_or(self.uid);
        self.gid = entry.gid.unwrap_or(self.gid);
    }
}

impl NodeId {
    pub(super) fn index(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}
