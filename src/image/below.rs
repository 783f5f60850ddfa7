//! What a layer says about one of its directories, whether it is a layer image or a tree of files: where implied directories of
//! the layers above get their attributes.
//!
//! As containerd's applier asks it (`mkparent` in `pkg/archive/tar.go`): symlinks are followed inside the layer's own root, see
//! `follow`. containerd fails where a name on the way is not that of a directory; here the layer has something else there.

use std::io;
use std::path::Path;

use super::Attributes;
use super::check::{CheckError, Metadata, NodeInfo, NodeKind, ReadAt};
use super::error::EntryFault;
use super::follow::{Files, Lost, There, follow};
use super::tar::Xattr;
use crate::sys::beneath::Dir;

/// The longest path that is followed, as by the kernel.
const PATH_MAX: usize = 4096;

/// What one layer has at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// Nothing: the layer below it is asked.
    Nothing,
    /// Something that is no directory: nobody else is asked.
    Other,
    /// A directory.
    Directory(Attributes),
}

/// What a layer image has at `path` (names from its root). An error if it cannot be read, or if its symlinks lead on and on.
pub fn in_image<R: ReadAt>(layer: &Metadata<R>, path: &[&[u8]]) -> io::Result<Found> {
    // By far the most paths have no symlink on them.
    let plain = layer.lookup(path.iter().copied()).map_err(io::Error::other)?;
    if let Some(node) = plain.filter(|node| node.kind == NodeKind::Directory) {
        return Ok(Found::Directory(node.attributes()));
    }
    found(layer, path, io::Error::other, |node| Ok(node.attributes()))
}

/// What a tree of files has at `path` (names from its root). An error as from [`in_image`].
pub fn in_directory(root: &Path, path: &[&[u8]]) -> io::Result<Found> {
    let root = Dir::open(root)?;
    match root.find(&path.join(&b'/'))? {
        Some(plain) => attributes(&plain).map(Found::Directory),
        None => found(&root, path, |error| error, attributes),
    }
}

fn found<F: Files>(
    layer: &F,
    path: &[&[u8]],
    failed: impl FnOnce(F::Error) -> io::Error,
    attributes: impl FnOnce(&F::Directory) -> io::Result<Attributes>,
) -> io::Result<Found> {
    let path = [b"/", path.join(&b'/').as_slice()].concat();
    match follow(layer, &path, PATH_MAX).map(|followed| followed.there) {
        Ok(There::Nothing) => Ok(Found::Nothing),
        Ok(There::Directory(directory)) => attributes(&directory).map(Found::Directory),
        Ok(There::Symlink(_) | There::Other) | Err(Lost::NotADirectory) => Ok(Found::Other),
        Err(Lost::Loop | Lost::TooLong) => Err(io::Error::other(EntryFault::SymlinkLoop)),
        Err(Lost::Failed(error)) => Err(failed(error)),
    }
}

fn attributes(directory: &Dir) -> io::Result<Attributes> {
    let (mode, uid, gid) = directory.ownership()?;
    let xattrs = directory.xattrs()?.into_iter().map(|(name, value)| Xattr { name, value }).collect();
    Ok(Attributes { mode, uid, gid, xattrs })
}

impl<R: ReadAt> Files for Metadata<R> {
    type Directory = NodeInfo;
    type Error = CheckError;

    fn root(&self) -> Result<NodeInfo, CheckError> {
        self.layer_root()
    }

    fn look(&self, directory: &NodeInfo, name: &[u8]) -> Result<There<NodeInfo>, CheckError> {
        let Some(node) = self.child(directory, name)? else { return Ok(There::Nothing) };
        Ok(match node.kind {
            NodeKind::Directory => There::Directory(node),
            NodeKind::Symlink { target } => There::Symlink(target),
            _ => There::Other,
        })
    }
}
