//! Layer images made by hand: a second writer, independent of the product's, for tests that need odd ones.
//!
//! ```text
//! 0      superblock at 1024
//! head   file data, each file from a block on
//! then   inodes (64 bytes, xattrs, symlink target or last names; aligned to 64), then full directory blocks
//! tail   nothing
//! ```

#![allow(dead_code, reason = "each test program uses its own part of it")]

pub(crate) mod tars;

use std::collections::BTreeMap;
use std::path::Path;

use speedy::image::{BLOCK, Layout, RESERVED};

/// One inode as a test wants it.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: (u64, u32),
    pub(crate) device: u32,
    /// File data, or a symlink's target.
    pub(crate) content: Vec<u8>,
    /// Prefix number, rest of the name, value.
    pub(crate) xattrs: Vec<(u8, Vec<u8>, Vec<u8>)>,
}

impl Node {
    fn new(mode: u16, content: &[u8]) -> Node {
        let content = content.to_vec();
        Node { mode, uid: 0, gid: 0, mtime: (1_000_000_000, 5), device: 0, content, xattrs: Vec::new() }
    }

    pub(crate) fn dir() -> Node {
        Node::new(0o040_755, b"")
    }

    pub(crate) fn file(content: &[u8]) -> Node {
        Node::new(0o100_644, content)
    }

    pub(crate) fn symlink(target: &[u8]) -> Node {
        Node::new(0o120_777, target)
    }

    pub(crate) fn whiteout() -> Node {
        Node::new(0o020_000, b"")
    }

    pub(crate) fn special(mode: u16, device: u32) -> Node {
        Node { device, ..Node::new(mode, b"") }
    }

    pub(crate) fn opaque(mut self) -> Node {
        self.xattrs.push((4, b"overlay.opaque".to_vec(), b"y".to_vec()));
        self
    }

    pub(crate) fn owner(mut self, uid: u32, gid: u32) -> Node {
        (self.uid, self.gid) = (uid, gid);
        self
    }

    pub(crate) fn xattr(mut self, prefix: u8, name: &[u8], value: &[u8]) -> Node {
        self.xattrs.push((prefix, name.to_vec(), value.to_vec()));
        self
    }

    fn is_dir(&self) -> bool {
        self.mode & 0o170_000 == 0o040_000
    }

    fn kind(&self) -> u8 {
        match self.mode & 0o170_000 {
            0o100_000 => 1,
            0o040_000 => 2,
            0o020_000 => 3,
            0o060_000 => 4,
            0o010_000 => 5,
            0o140_000 => 6,
            _ => 7,
        }
    }
}

/// An image and where its parts are.
#[derive(Debug, Clone)]
pub(crate) struct Image {
    pub(crate) bytes: Vec<u8>,
    pub(crate) layout: Layout,
    /// Where each inode begins, by path (`fs`, `fs/a`; the image root is empty).
    pub(crate) inodes: BTreeMap<String, usize>,
    /// Where the names of each directory begin.
    pub(crate) blocks: BTreeMap<String, usize>,
}

impl Image {
    pub(crate) fn write(&self, path: &Path) {
        std::fs::write(path, &self.bytes).unwrap();
    }

    pub(crate) fn metadata(&self) -> &[u8] {
        &self.bytes[at(self.layout.metadata.start)..at(self.layout.metadata.end)]
    }
}

fn at(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

/// A layer to be made: paths below the layer root.
#[derive(Debug, Clone, Default)]
pub(crate) struct Maker {
    root: Option<Node>,
    nodes: BTreeMap<String, Node>,
    links: BTreeMap<String, String>,
    /// All names of directories are in blocks, as in index format 1.
    plain: bool,
}

impl Maker {
    pub(crate) fn new() -> Maker {
        Maker::default()
    }

    pub(crate) fn root(mut self, node: Node) -> Maker {
        self.root = Some(node);
        self
    }

    pub(crate) fn with(mut self, path: &str, node: Node) -> Maker {
        self.nodes.insert(format!("fs/{path}"), node);
        self
    }

    pub(crate) fn link(mut self, path: &str, to: &str) -> Maker {
        self.links.insert(format!("fs/{path}"), format!("fs/{to}"));
        self
    }

    /// As index format 1 had it: no names behind inodes.
    pub(crate) fn plain(mut self) -> Maker {
        self.plain = true;
        self
    }

    pub(crate) fn make(&self) -> Image {
        let mut nodes = self.nodes.clone();
        nodes.insert("fs".into(), self.root.clone().unwrap_or_else(Node::dir));
        let image_root = Node { mtime: (0, 0), ..Node::dir() };
        nodes.insert(String::new(), image_root);
        let mut image = Image {
            bytes: vec![0; at(RESERVED)],
            layout: Layout { data: RESERVED..RESERVED, metadata: 0..0, size: 0 },
            inodes: BTreeMap::new(),
            blocks: BTreeMap::new(),
        };
        let mut places = BTreeMap::new();
        for (path, node) in nodes.iter().filter(|(_, node)| node.mode & 0o170_000 == 0o100_000) {
            if !node.content.is_empty() {
                places.insert(path.clone(), image.bytes.len() / 4096);
                image.bytes.extend(&node.content);
                pad(&mut image.bytes, 4096);
            }
        }
        let metadata = image.bytes.len();
        image.layout.data.end = metadata as u64;
        self.place_inodes(&nodes, &mut image);
        let inode_end = image.bytes.len();
        pad(&mut image.bytes, 4096);
        self.write_directories(&nodes, &mut image, metadata);
        for (path, node) in &nodes {
            let links = self.links_of(path, node, &nodes);
            let inode = image.inodes[path];
            let mut place = places.get(path).copied();
            let (mut size, mut inline) = (node.content.len(), node.kind() == 7);
            if node.is_dir() {
                size = self.names_of(path, &nodes, &image, metadata).len();
                inline = !self.plain && is_inline(inode, node, size);
                let has_blocks = !inline || size > 4096;
                place = Some(if has_blocks { image.blocks[path] / 4096 } else { 0 });
            }
            write_inode(&mut image.bytes[inode..inode_end], node, place, size, links, inline);
            let number = u32::try_from((inode - metadata) / 32).unwrap();
            image.bytes[inode + 20..inode + 24].copy_from_slice(&number.to_le_bytes());
        }
        image.layout.metadata = metadata as u64..image.bytes.len() as u64;
        image.bytes.resize(image.bytes.len() + at(RESERVED), 0);
        image.layout.size = image.bytes.len() as u64;
        write_superblock(&mut image, nodes.len());
        image
    }

    /// Breadth first; a file where its first name is.
    fn order(&self, nodes: &BTreeMap<String, Node>) -> Vec<String> {
        let mut order: Vec<String> = Vec::new();
        let mut seen = std::collections::BTreeSet::new();
        let mut queue = std::collections::VecDeque::from([String::new()]);
        order.push(String::new());
        let mut below: BTreeMap<&str, BTreeMap<Vec<u8>, &str>> = BTreeMap::new();
        let all = nodes.keys().map(|path| (path, path)).chain(&self.links);
        for (name, to) in all.filter(|(name, _)| !name.is_empty()) {
            let last = name.rsplit('/').next().unwrap();
            below.entry(parent_of(name)).or_default().insert(last.as_bytes().to_vec(), to);
        }
        while let Some(directory) = queue.pop_front() {
            for path in below.get(directory.as_str()).into_iter().flat_map(BTreeMap::values) {
                if seen.insert(*path) {
                    order.push((*path).to_owned());
                    queue.extend(nodes[*path].is_dir().then(|| (*path).to_owned()));
                }
            }
        }
        order
    }

    fn place_inodes(&self, nodes: &BTreeMap<String, Node>, image: &mut Image) {
        // The first slot stays empty: an inode number of 0 is no number for a reader of directories.
        let metadata = image.bytes.len();
        let mut end = metadata + 64;
        for path in self.order(nodes) {
            let node = &nodes[&path];
            let body = 64 + xattr_bytes(node).len();
            let inline = match node.kind() {
                7 => node.content.len(),
                2 if !self.plain => self.names_of(&path, nodes, image, metadata).len() % 4096,
                _ => 0,
            };
            let moved = ((end + body).next_multiple_of(4096) - body).next_multiple_of(64);
            let crosses = |at: usize| inline > 0 && (at + body) / 4096 != (at + body + inline - 1) / 4096;
            let (at, length) = match (crosses(end), crosses(moved)) {
                (false, _) => (end, body + inline),
                (true, false) => (moved, body + inline),
                (true, true) => (end, body),
            };
            image.inodes.insert(path, at);
            end = (at + length).next_multiple_of(64);
        }
        image.bytes.resize(end, 0);
    }

    /// A directory's names as they are in blocks; of inodes that have no place yet the number is 0.
    fn names_of(
        &self,
        path: &str,
        nodes: &BTreeMap<String, Node>,
        image: &Image,
        metadata: usize,
    ) -> Vec<u8> {
        let nid = |path: &str| image.inodes.get(path).map_or(0, |at| ((at - metadata) / 32) as u64);
        let mut entries = vec![(b".".to_vec(), nid(path), 2), (b"..".to_vec(), nid(parent_of(path)), 2)];
        let all = nodes.keys().map(|path| (path, path)).chain(&self.links);
        for (name, to) in all.filter(|(name, _)| !name.is_empty() && parent_of(name) == path) {
            let name = name.rsplit('/').next().unwrap().as_bytes().to_vec();
            entries.push((name, nid(to), nodes[to].kind()));
        }
        entries.sort();
        let mut bytes = Vec::new();
        write_entries(&mut bytes, &entries);
        bytes
    }

    fn write_directories(&self, nodes: &BTreeMap<String, Node>, image: &mut Image, metadata: usize) {
        for path in self.order(nodes).iter().filter(|path| nodes[*path].is_dir()) {
            let (inode, node) = (image.inodes[path], &nodes[path]);
            let names = self.names_of(path, nodes, image, metadata);
            let behind = inode + 64 + xattr_bytes(node).len();
            let inline = !self.plain && is_inline(inode, node, names.len());
            let (blocks, last) = names.split_at(if inline { names.len() / 4096 * 4096 } else { names.len() });
            image.blocks.insert(path.clone(), if blocks.is_empty() { behind } else { image.bytes.len() });
            image.bytes[behind..behind + last.len()].copy_from_slice(last);
            image.bytes.extend(blocks);
            pad(&mut image.bytes, 4096);
        }
    }

    fn links_of(&self, path: &str, node: &Node, nodes: &BTreeMap<String, Node>) -> usize {
        if node.is_dir() {
            let below = |(name, node): &(&String, &Node)| {
                !name.is_empty() && node.is_dir() && parent_of(name) == path
            };
            return 2 + nodes.iter().filter(below).count();
        }
        1 + self.links.values().filter(|to| *to == path).count()
    }
}

/// Whether what a directory of this size has behind its full blocks stands behind its inode.
fn is_inline(inode: usize, node: &Node, size: usize) -> bool {
    let (behind, last) = (inode + 64 + xattr_bytes(node).len(), size % 4096);
    last > 0 && behind / 4096 == (behind + last - 1) / 4096
}

fn parent_of(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(parent, _)| parent)
}

fn pad(bytes: &mut Vec<u8>, unit: usize) {
    bytes.resize(bytes.len().next_multiple_of(unit), 0);
}

/// Blocks of names, the last one without what pads it.
fn write_entries(bytes: &mut Vec<u8>, entries: &[(Vec<u8>, u64, u8)]) {
    let mut rest = entries;
    loop {
        let mut used = 0;
        let fits = |entry: &&(Vec<u8>, u64, u8)| {
            used += 12 + entry.0.len();
            used <= 4096
        };
        let (now, later) = rest.split_at(rest.iter().take_while(fits).count());
        let mut name_at = now.len() * 12;
        for (name, nid, kind) in now {
            bytes.extend(nid.to_le_bytes());
            bytes.extend(u16::try_from(name_at).unwrap().to_le_bytes());
            bytes.extend([*kind, 0]);
            name_at += name.len();
        }
        now.iter().for_each(|(name, ..)| bytes.extend(name));
        if later.is_empty() {
            return;
        }
        pad(bytes, 4096);
        rest = later;
    }
}

fn xattr_bytes(node: &Node) -> Vec<u8> {
    let mut xattrs = node.xattrs.clone();
    xattrs.sort();
    let mut bytes = if xattrs.is_empty() { Vec::new() } else { vec![0; 12] };
    for (prefix, name, value) in xattrs {
        bytes.extend([u8::try_from(name.len()).unwrap(), prefix]);
        bytes.extend(u16::try_from(value.len()).unwrap().to_le_bytes());
        bytes.extend(name);
        bytes.extend(value);
        pad(&mut bytes, 4);
    }
    bytes
}

fn write_inode(bytes: &mut [u8], node: &Node, place: Option<usize>, size: usize, links: usize, inline: bool) {
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    let xattrs = xattr_bytes(node);
    let count = if xattrs.is_empty() { 0 } else { (xattrs.len() - 12) / 4 + 1 };
    put(0, &(1 | if inline { 2_u16 << 1 } else { 0 }).to_le_bytes());
    put(2, &u16::try_from(count).unwrap().to_le_bytes());
    put(4, &node.mode.to_le_bytes());
    put(8, &(size as u64).to_le_bytes());
    put(16, &place.map_or(node.device, |block| u32::try_from(block).unwrap()).to_le_bytes());
    put(24, &node.uid.to_le_bytes());
    put(28, &node.gid.to_le_bytes());
    put(32, &node.mtime.0.to_le_bytes());
    put(40, &node.mtime.1.to_le_bytes());
    put(44, &u32::try_from(links).unwrap().to_le_bytes());
    put(64, &xattrs);
    if node.kind() == 7 {
        put(64 + xattrs.len(), &node.content);
    }
}

fn write_superblock(image: &mut Image, inodes: usize) {
    let layout = image.layout.clone();
    let root = (image.inodes[""] - at(layout.metadata.start)) / 32;
    let mut put =
        |at: usize, field: &[u8]| image.bytes[1024 + at..1024 + at + field.len()].copy_from_slice(field);
    put(0, &0xe0f5_e1e2_u32.to_le_bytes());
    put(12, &[12]);
    put(14, &u16::try_from(root).unwrap().to_le_bytes());
    put(16, &(inodes as u64).to_le_bytes());
    put(36, &u32::try_from(layout.size / BLOCK).unwrap().to_le_bytes());
    put(40, &u32::try_from(layout.metadata.start / BLOCK).unwrap().to_le_bytes());
}
