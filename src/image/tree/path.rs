//! Finding what a path of an entry leads to, as containerd's `RootPath` does (`continuity/fs/path.go`).
//!
//! Symlinks of the layer are followed inside its root, in passes: each pass goes through the names from left to right and
//! replaces a symlink by its target as text, where `..` takes a name away without asking what that is; a pass in which no
//! symlink is met ends it. What is not there is taken for a name. A target is not followed further in the same pass, so that
//! links to links need several; the kernel, which RootPath asks about each name, then follows relative ones, and absolute ones
//! lead it out of the root: those count as absent here.

use super::{Body, NodeId, Tree};
use crate::image::error::{EntryFault, ImageError};
use crate::image::limits::Limit;
use crate::image::tar::{Entry, EntryPath};

/// More symlinks on one path are taken for a loop, as by the kernel: nobody could open such a path. (containerd stops at 255.)
const LINKS_MAX: u32 = 40;

/// What is at a path.
#[derive(Debug, Clone, Copy)]
enum Found {
    Nothing,
    Node(NodeId),
    /// A name on the way is not that of a directory.
    NotADirectory,
}

/// Why a path leads nowhere.
#[derive(Debug, Clone, Copy)]
pub(super) enum Lost {
    Loop,
    NotADirectory,
    TooLong,
}

impl Tree<'_> {
    /// `directory` without symlinks, beginning with a slash; it need not be there.
    pub(super) fn resolve(&self, directory: &[u8], path: &EntryPath) -> Result<Vec<u8>, ImageError> {
        self.resolve_bytes(directory).map_err(|lost| match lost {
            Lost::Loop => ImageError::entry(path.as_bytes(), EntryFault::SymlinkLoop),
            Lost::NotADirectory => ImageError::entry(path.as_bytes(), EntryFault::NotADirectory),
            Lost::TooLong => ImageError::limit(Limit::Path, self.limits.path as u64),
        })
    }

    pub(super) fn resolve_bytes(&self, path: &[u8]) -> Result<Vec<u8>, Lost> {
        if self.is_plain(path) {
            return Ok(join(path, b""));
        }
        let mut path = path.to_vec();
        let mut links = 0;
        loop {
            let before = links;
            path = self.pass(&path, &mut links)?;
            if links == before {
                return Ok(path);
            }
        }
    }

    /// Whether no symlink, and nothing else that is no directory, is on the way: by far the most paths.
    fn is_plain(&self, path: &[u8]) -> bool {
        let mut at = Tree::ROOT;
        for name in names(path) {
            match self.child(at, name) {
                Some(id) if self.is_directory(id) => at = id,
                Some(_) => return false,
                None => break,
            }
        }
        names(path).all(|name| name != b"." && name != b"..")
    }

    /// One pass. Where it met no symlink its result is clean and begins with a slash.
    fn pass(&self, path: &[u8], links: &mut u32) -> Result<Vec<u8>, Lost> {
        let mut at = b"/".to_vec();
        // What `at` leads to, as long as that is known.
        let mut here = Some(Found::Node(Tree::ROOT));
        // The first name of a path that does not begin at the root gives way to its target as that stands there.
        let mut is_bare = !path.starts_with(b"/");
        for name in names(path) {
            let is_plain = here.is_some() && name != b"." && name != b"..";
            let found = here.filter(|_| is_plain).map(|here| self.step(here, name));
            let candidate = if is_plain {
                [at.as_slice(), if at.len() > 1 { b"/" } else { b"" }, name].concat()
            } else {
                join(&at, name)
            };
            if candidate.len() > self.limits.path {
                return Err(Lost::TooLong);
            }
            let found = found.unwrap_or_else(|| self.look(&candidate));
            here = Some(found);
            at = match self.symlink(found)? {
                None => candidate,
                Some(_) if *links == LINKS_MAX => return Err(Lost::Loop),
                Some(target) => {
                    *links += 1;
                    here = None;
                    if is_bare || target.starts_with(b"/") { target.to_vec() } else { join(&at, target) }
                }
            };
            is_bare = false;
        }
        Ok(at)
    }

    /// What a name leads to from what is no symlink.
    fn step(&self, here: Found, name: &[u8]) -> Found {
        match here {
            Found::Node(id) if self.is_directory(id) => {
                self.child(id, name).map_or(Found::Nothing, Found::Node)
            }
            Found::Node(_) | Found::NotADirectory => Found::NotADirectory,
            Found::Nothing => Found::Nothing,
        }
    }

    /// The target, if it is a symlink.
    fn symlink(&self, found: Found) -> Result<Option<&[u8]>, Lost> {
        match found {
            Found::NotADirectory => Err(Lost::NotADirectory),
            Found::Node(id) => match &self.node(id).body {
                Body::Symlink(target) => Ok(Some(target)),
                _ => Ok(None),
            },
            Found::Nothing => Ok(None),
        }
    }

    /// As `lstat` would: symlinks before the last name are followed.
    fn look(&self, path: &[u8]) -> Found {
        let mut names: Vec<&[u8]> = names(path).collect();
        names.reverse();
        // The directories on the way, for `..`.
        let mut way = vec![Tree::ROOT];
        let mut links = 0;
        while let Some(name) = names.pop() {
            let directory = way.last().copied().unwrap_or(Tree::ROOT);
            let Body::Directory(children) = &self.node(directory).body else { return Found::NotADirectory };
            match name {
                b"." => continue,
                // Above the root is the host, of which nothing is asked.
                b".." if way.len() == 1 => return Found::Nothing,
                b".." => {
                    way.pop();
                    continue;
                }
                _ => {}
            }
            let Some(id) = children.get(name).copied() else { return Found::Nothing };
            match &self.node(id).body {
                Body::Symlink(target) if !names.is_empty() => {
                    links += 1;
                    if target.starts_with(b"/") || links > LINKS_MAX {
                        return Found::Nothing;
                    }
                    names.extend(target.split(|byte| *byte == b'/').filter(|name| !name.is_empty()).rev());
                }
                _ => way.push(id),
            }
        }
        way.last().map_or(Found::Nothing, |id| Found::Node(*id))
    }

    /// What is at a path that is free of symlinks, but for its last name.
    pub(super) fn find(&self, path: &[u8]) -> Option<NodeId> {
        names(path).try_fold(Tree::ROOT, |at, name| self.child(at, name))
    }

    /// The inode that a hard link names. Symlinks are followed to the last name, which may be a symlink itself.
    pub(super) fn link_target(&self, target: &EntryPath, entry: &Entry) -> Result<NodeId, ImageError> {
        let refuse = |fault| ImageError::entry(entry.path.as_bytes(), fault);
        let Some((directory, name)) = target.split() else {
            return Err(refuse(EntryFault::LinkToDirectory));
        };
        let directory = self.resolve(directory, &entry.path)?;
        let found = self.find(&directory).and_then(|directory| self.child(directory, name));
        match found {
            None => Err(refuse(EntryFault::LinkTargetMissing)),
            Some(id) if self.is_directory(id) => Err(refuse(EntryFault::LinkToDirectory)),
            Some(id) => Ok(id),
        }
    }
}

fn names(path: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/').filter(|name| !name.is_empty())
}

/// `path`, then `rest`, clean and from the root (Go's `filepath.Join`).
fn join(path: &[u8], rest: &[u8]) -> Vec<u8> {
    let mut kept: Vec<&[u8]> = Vec::new();
    for name in names(path).chain(names(rest)) {
        match name {
            b"." => {}
            b".." => drop(kept.pop()),
            name => kept.push(name),
        }
    }
    [b"/", kept.join(&b'/').as_slice()].concat()
}
