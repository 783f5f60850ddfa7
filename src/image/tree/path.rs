//! Finding what a path of an entry leads to in the layer so far; see [`follow`].

use std::convert::Infallible;

use super::{Body, NodeId, Tree};
use crate::image::error::{EntryFault, ImageError};
use crate::image::follow::{Files, There, follow, names};
use crate::image::tar::{Entry, EntryPath};

impl Files for Tree<'_> {
    type Directory = NodeId;
    type Error = Infallible;

    fn root(&self) -> Result<NodeId, Infallible> {
        Ok(Tree::ROOT)
    }

    fn look(&self, directory: &NodeId, name: &[u8]) -> Result<There<NodeId>, Infallible> {
        let Some(id) = self.child(*directory, name) else { return Ok(There::Nothing) };
        Ok(match &self.node(id).body {
            Body::Directory(_) => There::Directory(id),
            Body::Symlink(target) => There::Symlink(target.to_vec()),
            _ => There::Other,
        })
    }
}

impl Tree<'_> {
    /// `directory` without symlinks, beginning with a slash; it need not be there. `entry` is what errors are about.
    pub(super) fn resolve(&self, directory: &[u8], entry: &[u8]) -> Result<Vec<u8>, ImageError> {
        let longest = self.limits.path;
        let followed = follow(self, directory, longest);
        followed
            .map(|followed| followed.path)
            .map_err(|lost| lost.refuse(entry, longest, |never| match never {}))
    }

    /// What is at a path that is free of symlinks, but for its last name.
    pub(super) fn find(&self, path: &[u8]) -> Option<NodeId> {
        names(path).try_fold(Tree::ROOT, |at, name| self.child(at, name))
    }

    /// The inode that a hard link names. Symlinks are followed to the last name, which may be a symlink itself.
    pub(super) fn link_target(&self, target: &EntryPath, entry: &Entry) -> Result<NodeId, ImageError> {
        let path = entry.path.as_bytes();
        let refuse = |fault| ImageError::entry(path, fault);
        let Some((directory, name)) = target.split() else {
            return Err(refuse(EntryFault::LinkToDirectory));
        };
        let directory = self.resolve(directory, path)?;
        let found = self.find(&directory).and_then(|directory| self.child(directory, name));
        match found {
            None => Err(refuse(EntryFault::LinkTargetMissing)),
            Some(id) if self.is_directory(id) => Err(refuse(EntryFault::LinkToDirectory)),
            Some(id) => Ok(id),
        }
    }
}
