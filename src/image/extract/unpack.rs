//! A layer image written out as files, on top of what is below it.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::write::{at, set_time, set_xattrs};
use crate::image::check::{CheckError, Metadata, NodeInfo, NodeKind};
use crate::image::error::EntryFault;
use crate::image::tar::Time;
use crate::image::{ImageError, Layout};
use crate::sys::beneath::{Attributed, Dir, NodeType, Special};
use crate::sys::idmap;
use crate::sys::tree::TreeError;

/// What is read of a file at a time; pieces of zeros become holes.
const PIECE: u64 = 64 * 1024;
const OPAQUE: &[u8] = b"trusted.overlay.opaque";

impl From<CheckError> for ImageError {
    fn from(error: CheckError) -> ImageError {
        ImageError::Read(io::Error::other(error))
    }
}

/// Writes what a layer image holds into `dir`, in which is what the layers below it hold: whiteouts remove, opaque directories are
/// emptied first. As [`super::extract()`] with [`super::Whiteouts::Remove`] does it, but that a directory which the layer only implies
/// has the image's time. Not synced. The image's metadata must have been accepted by [`crate::image::check`], and its bytes be those
/// of its chunks. `cancelled` is asked before each file and 64 KiB.
///
/// An image does not tell implied directories from others. Where a directory meets a symlink below, an extraction would follow that in
/// one case and replace it in the other: such a layer is refused.
pub fn unpack(
    image: &File,
    layout: &Layout,
    dir: &Path,
    cancelled: &(dyn Fn() -> bool + Sync),
) -> Result<(), ImageError> {
    let metadata = Metadata::open(image.try_clone().map_err(ImageError::Read)?, layout)?;
    let mut unpacking = Unpacking {
        root: Dir::open(dir).map_err(|source| at(b"", source))?,
        image,
        cancelled,
        leave_devices_out: idmap::in_user_namespace(),
        last: None,
        links: HashMap::new(),
        times: Vec::new(),
    };
    metadata.walk(|path, node| unpacking.put(path, node))?;
    unpacking.finish()
}

struct Unpacking<'a> {
    root: Dir,
    image: &'a File,
    cancelled: &'a (dyn Fn() -> bool + Sync),
    leave_devices_out: bool,
    /// The directory of the last path.
    last: Option<(Vec<u8>, Dir)>,
    /// The first path of what has several, by the number of the inode.
    links: HashMap<u64, Vec<u8>>,
    /// Directories, which get their times at the end.
    times: Vec<(Vec<u8>, Time)>,
}

/// The directory of a path, and its last name.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (b"", path),
    }
}

impl Unpacking<'_> {
    fn put(&mut self, path: &[u8], node: &NodeInfo) -> Result<(), ImageError> {
        if (self.cancelled)() {
            return Err(ImageError::Cancelled);
        }
        let is_opaque = node.xattrs.iter().any(|xattr| xattr.name == OPAQUE);
        if path.is_empty() {
            // No layer says anything about the root itself.
            return if is_opaque { self.empty(&self.directory(b"")?, path) } else { Ok(()) };
        }
        let (above, name) = split(path);
        let parent = match self.last.take_if(|(last, _)| last == above) {
            Some((_, dir)) => dir,
            None => self.directory(above)?,
        };
        let put = match node.kind {
            NodeKind::Directory => self.put_directory(&parent, name, path, node, is_opaque),
            _ => self.put_file(&parent, name, path, node),
        };
        self.last = Some((above.to_vec(), parent));
        put
    }

    fn directory(&self, path: &[u8]) -> Result<Dir, ImageError> {
        let found = self.root.find(path).map_err(|source| at(path, source))?;
        found.ok_or_else(|| at(path, io::ErrorKind::NotADirectory.into()))
    }

    fn put_directory(
        &mut self,
        parent: &Dir,
        name: &[u8],
        path: &[u8],
        node: &NodeInfo,
        is_opaque: bool,
    ) -> Result<(), ImageError> {
        let failed = |source| at(path, source);
        match parent.kind(name).map_err(failed)? {
            None => parent.make_directory(name).map_err(failed)?,
            Some(NodeType::Directory) if is_opaque => {
                self.empty(&parent.child(name).map_err(failed)?, path)?;
            }
            Some(NodeType::Directory) => {}
            Some(NodeType::Symlink) => return Err(ImageError::entry(path, EntryFault::NotADirectory)),
            Some(_) => {
                self.remove(parent, name, path)?;
                parent.make_directory(name).map_err(failed)?;
            }
        }
        set_attributes(&parent.node(name).map_err(failed)?, node, NodeType::Directory, path)?;
        self.times.push((path.to_vec(), node.mtime));
        Ok(())
    }

    fn put_file(
        &mut self,
        parent: &Dir,
        name: &[u8],
        path: &[u8],
        node: &NodeInfo,
    ) -> Result<(), ImageError> {
        let failed = |source| at(path, source);
        if parent.kind(name).map_err(failed)?.is_some() {
            self.remove(parent, name, path)?;
        }
        let special = match node.kind {
            NodeKind::CharDevice { major: 0, minor: 0 } => return Ok(()),
            NodeKind::CharDevice { major, minor } => Some(Special::CharDevice { major, minor }),
            NodeKind::BlockDevice { major, minor } => Some(Special::BlockDevice { major, minor }),
            NodeKind::Fifo => Some(Special::Fifo),
            _ => None,
        };
        if self.leave_devices_out && matches!(special, Some(special) if special != Special::Fifo) {
            return Ok(());
        }
        if let Some(first) = self.links.get(&node.nid) {
            let (above, other) = split(first);
            return parent.make_link(name, &self.directory(above)?, other).map_err(failed);
        }
        if node.links > 1 {
            self.links.insert(node.nid, path.to_vec());
        }
        match (&node.kind, special) {
            (NodeKind::File { data }, _) => {
                let file = parent.make_file(name).map_err(failed)?;
                self.copy(data.clone(), &file, path)?;
                set_attributes(&file, node, NodeType::File, path)?;
                return set_time(&file, node.mtime, path);
            }
            (NodeKind::Symlink { target }, _) => parent.make_symlink(name, target),
            (_, Some(special)) => parent.make_special(name, special),
            (_, None) => Ok(()),
        }
        .map_err(failed)?;
        let made = parent.node(name).map_err(failed)?;
        set_attributes(&made, node, made.kind().map_err(failed)?, path)?;
        set_time(&made, node.mtime, path)
    }

    fn copy(&self, data: Range<u64>, file: &File, path: &[u8]) -> Result<(), ImageError> {
        let failed = |source| at(path, source);
        let mut piece = Vec::new();
        for from in (data.start..data.end).step_by(usize::try_from(PIECE).unwrap_or(usize::MAX)) {
            if (self.cancelled)() {
                return Err(ImageError::Cancelled);
            }
            piece.resize(usize::try_from(PIECE.min(data.end - from)).unwrap_or_default(), 0);
            self.image.read_exact_at(&mut piece, from).map_err(ImageError::Read)?;
            if piece.iter().any(|byte| *byte != 0) {
                file.write_all_at(&piece, from - data.start).map_err(failed)?;
            }
        }
        file.set_len(data.end - data.start).map_err(failed)
    }

    fn remove(&self, parent: &Dir, name: &[u8], path: &[u8]) -> Result<(), ImageError> {
        parent.remove(name, self.cancelled).map_err(|error| match error {
            TreeError::Cancelled => ImageError::Cancelled,
            TreeError::MountPoint(_) => at(path, io::ErrorKind::ResourceBusy.into()),
            TreeError::Io { source, .. } => at(path, source),
        })
    }

    fn empty(&self, directory: &Dir, path: &[u8]) -> Result<(), ImageError> {
        for (name, _) in directory.list().map_err(|source| at(path, source))? {
            self.remove(directory, &name, path)?;
        }
        Ok(())
    }

    fn finish(self) -> Result<(), ImageError> {
        for (path, time) in &self.times {
            let node = self.directory(path)?.as_node().map_err(|source| at(path, source))?;
            set_time(&node, *time, path)?;
        }
        Ok(())
    }
}

/// All but the time. Owner first, which takes capabilities and setuid away; then those.
fn set_attributes(
    made: &impl Attributed,
    node: &NodeInfo,
    kind: NodeType,
    path: &[u8],
) -> Result<(), ImageError> {
    made.set_owner(Some(node.uid), Some(node.gid)).map_err(|source| at(path, source))?;
    set_xattrs(|name, value| made.set_xattr(name, value), kind, &node.xattrs, path)?;
    match kind {
        NodeType::Symlink => Ok(()),
        _ => made.set_mode(node.mode).map_err(|source| at(path, source)),
    }
}
