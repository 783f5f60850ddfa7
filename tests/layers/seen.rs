//! What can be seen of a tree of files, however it is looked at.

use std::collections::BTreeMap;

/// A file by its path from the root, which is empty.
pub(crate) type Tree = BTreeMap<Vec<u8>, Seen>;

/// One file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    /// With the type.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Of files.
    pub(crate) size: u64,
    /// BLAKE3 of a file's content; a symlink's target.
    pub(crate) content: Vec<u8>,
    pub(crate) device: (u32, u32),
    pub(crate) links: u32,
    /// The first name of the same inode, if that is another.
    pub(crate) same_as: Option<Vec<u8>>,
    pub(crate) mtime: (i64, u32),
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Seen {
    pub(crate) fn kind(&self) -> u32 {
        self.mode & 0o170_000
    }

    pub(crate) fn is_directory(&self) -> bool {
        self.kind() == 0o040_000
    }

    pub(crate) fn is_whiteout(&self) -> bool {
        self.kind() == 0o020_000 && self.device == (0, 0)
    }
}

/// Reads a layer image with a reader of EROFS that is not ours.
pub(crate) fn in_image(image: &std::fs::File) -> Tree {
    use erofs_rs::EroFS;
    let image = Trimmed::read(image);
    let fs = EroFS::new(image).unwrap();
    let mut tree = Tree::new();
    let mut first = BTreeMap::new();
    let mut path: Vec<Vec<u8>> = Vec::new();
    for entry in fs.walk_dir("/").unwrap() {
        let entry = entry.unwrap();
        path.truncate(entry.depth - 1);
        path.push(entry.dir_entry.file_name().to_vec());
        assert_eq!(path[0], b"fs", "the image root holds something else");
        let inode = entry.inode;
        let content = if inode.is_file() {
            content_of(fs.open_inode_file(inode).unwrap())
        } else if inode.is_symlink() {
            fs.read_link_inode(inode).unwrap().as_bytes().to_vec()
        } else {
            Vec::new()
        };
        let name = path[1..].join(&b'/');
        let same_as = (!inode.is_dir()).then(|| first.entry(inode.id()).or_insert(name.clone()).clone());
        let kind = match inode.file_type() {
            rustix::fs::FileType::RegularFile => 0o100_000,
            rustix::fs::FileType::Directory => 0o040_000,
            rustix::fs::FileType::Symlink => 0o120_000,
            rustix::fs::FileType::CharacterDevice => 0o020_000,
            rustix::fs::FileType::BlockDevice => 0o060_000,
            rustix::fs::FileType::Fifo => 0o010_000,
            other => panic!("{other:?}"),
        };
        let mode = std::os::unix::fs::PermissionsExt::mode(&inode.permissions()) & 0o7777;
        let seen = Seen {
            mode: kind | mode,
            uid: inode.uid(),
            gid: inode.gid(),
            size: if inode.is_file() { inode.data_size() } else { 0 },
            content,
            device: inode.device().unwrap_or_default(),
            links: inode.nlink(),
            same_as: same_as.filter(|first| *first != name),
            mtime: inode.modified_unix(),
            xattrs: fs.xattrs_inode(inode).unwrap(),
        };
        assert!(tree.insert(name, seen).is_none(), "a name twice");
    }
    assert_eq!(fs.super_block().inos, 1 + inodes(&tree));
    tree
}

/// How many inodes a tree has.
pub(crate) fn inodes(tree: &Tree) -> u64 {
    tree.values().filter(|seen| seen.same_as.is_none()).count() as u64
}

fn content_of(mut file: impl std::io::Read) -> Vec<u8> {
    let mut hasher = blake3::Hasher::new();
    std::io::copy(&mut file, &mut hasher).unwrap();
    hasher.finalize().as_bytes().to_vec()
}

/// An image without its head and tail, which are holes: tests make thousands.
struct Trimmed {
    block: Vec<u8>,
    bytes: Vec<u8>,
    size: u64,
}

impl Trimmed {
    fn read(image: &std::fs::File) -> Trimmed {
        use std::os::unix::fs::FileExt;
        let layout = speedy::image::Layout::of_image(image).unwrap();
        let mut block = vec![0; 4096];
        image.read_exact_at(&mut block, 0).unwrap();
        let mut bytes = vec![0; usize::try_from(layout.metadata.end - layout.data.start).unwrap()];
        image.read_exact_at(&mut bytes, layout.data.start).unwrap();
        Trimmed { block, bytes, size: layout.size }
    }
}

impl erofs_rs::backend::Image for Trimmed {
    fn get<R: std::ops::RangeBounds<u64>>(&self, range: R) -> Option<&[u8]> {
        use std::ops::Bound;
        let start = match range.start_bound() {
            Bound::Included(start) => *start,
            Bound::Excluded(start) => start + 1,
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(end) => end + 1,
            Bound::Excluded(end) => *end,
            Bound::Unbounded => self.size,
        };
        let (bytes, from) =
            if end <= 4096 { (&self.block, 0) } else { (&self.bytes, speedy::image::RESERVED) };
        let at = |offset: u64| usize::try_from(offset.checked_sub(from)?).ok();
        bytes.get(at(start)?..at(end)?)
    }

    fn len(&self) -> u64 {
        self.size
    }
}

/// Reads a directory of this machine.
pub(crate) fn in_directory(root: &std::path::Path) -> Tree {
    use std::os::unix::ffi::OsStrExt;
    let mut tree = Tree::new();
    let mut first = BTreeMap::new();
    let mut left = vec![(Vec::new(), root.to_owned())];
    while let Some((name, path)) = left.pop() {
        let (seen, inode) = seen_at(&path);
        if seen.is_directory() {
            for entry in std::fs::read_dir(&path).unwrap() {
                let entry = entry.unwrap();
                let child = entry.file_name();
                let separator: &[u8] = if name.is_empty() { b"" } else { b"/" };
                left.push(([&name, separator, child.as_bytes()].concat(), entry.path()));
            }
        } else {
            first.entry(inode).or_insert_with(Vec::new).push(name.clone());
        }
        tree.insert(name, seen);
    }
    for names in first.values_mut() {
        names.sort();
        for name in &names[1..] {
            tree.get_mut(name).unwrap().same_as = Some(names[0].clone());
        }
    }
    tree
}

fn seen_at(path: &std::path::Path) -> (Seen, u64) {
    use std::os::unix::ffi::OsStrExt;
    let stat = rustix::fs::lstat(path).unwrap();
    let content = match stat.st_mode & 0o170_000 {
        0o100_000 => content_of(std::fs::File::open(path).unwrap()),
        0o120_000 => std::fs::read_link(path).unwrap().as_os_str().as_bytes().to_vec(),
        _ => Vec::new(),
    };
    let is_file = stat.st_mode & 0o170_000 == 0o100_000;
    let seen = Seen {
        mode: stat.st_mode,
        uid: stat.st_uid,
        gid: stat.st_gid,
        size: if is_file { u64::try_from(stat.st_size).unwrap() } else { 0 },
        content,
        device: (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev)),
        links: u32::try_from(stat.st_nlink).unwrap(),
        same_as: None,
        mtime: (stat.st_mtime, u32::try_from(stat.st_mtime_nsec).unwrap()),
        xattrs: xattrs_at(path),
    };
    (seen, stat.st_ino)
}

fn xattrs_at(path: &std::path::Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0; 1 << 16];
    let length = rustix::fs::llistxattr(path, names.as_mut_slice()).unwrap();
    let names = names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let value = |name: &[u8]| {
        let mut value = vec![0; 1 << 16];
        let length = rustix::fs::lgetxattr(path, name, value.as_mut_slice()).unwrap();
        value.truncate(length);
        value
    };
    names.map(|name| (name.to_vec(), value(name))).collect()
}

/// A name for people.
pub(crate) fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}
