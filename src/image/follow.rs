//! What a path of a layer leads to, as containerd's `RootPath` finds it (`continuity/fs/path.go`).
//!
//! Symlinks of the layer are followed inside its root, in passes: each pass goes through the names from left to right and
//! replaces a symlink by its target as text, where `..` takes a name away without asking what that is; a pass in which no
//! symlink is met ends it. What is not there is taken for a name. A target is not followed further in the same pass, so that
//! links to links need several; the kernel, which RootPath asks about each name, then follows relative ones, and absolute ones
//! lead it out of the root: those count as absent here.

use std::io;

use super::error::{EntryFault, ImageError};
use super::limits::Limit;
use crate::sys::beneath::{Dir, NodeType};

/// More symlinks on one path are taken for a loop, as by the kernel: nobody could open such a path. (containerd stops at 255.)
const LINKS_MAX: u32 = 40;
/// So are more names looked up for one path: links can be laid so that each pass has more of them than the last. A path without
/// symlinks has 2,048.
const NAMES_MAX: u32 = 10_000;

/// The files of one layer: in memory, in an image, or on disk.
pub(super) trait Files {
    type Directory;
    type Error;

    /// The layer's root.
    fn root(&self) -> Result<Self::Directory, Self::Error>;

    /// What `name`, a single one, stands for in a directory.
    fn look(&self, directory: &Self::Directory, name: &[u8]) -> Result<There<Self::Directory>, Self::Error>;
}

/// What is at a path.
pub(super) enum There<D> {
    Nothing,
    Directory(D),
    /// With its target.
    Symlink(Vec<u8>),
    Other,
}

/// A path that was followed to its end.
pub(super) struct Followed<D> {
    /// Without symlinks: clean names, each behind a slash; at least one slash. What it names need not be there.
    pub(super) path: Vec<u8>,
    /// What it names; never a symlink.
    pub(super) there: There<D>,
}

/// Why a path leads nowhere.
pub(super) enum Lost<E> {
    Loop,
    NotADirectory,
    TooLong,
    /// What was asked failed.
    Failed(E),
}

impl<E> From<E> for Lost<E> {
    fn from(error: E) -> Lost<E> {
        Lost::Failed(error)
    }
}

impl<E> Lost<E> {
    /// What becomes of the entry on whose path this is.
    pub(super) fn refuse(
        self,
        entry: &[u8],
        longest: usize,
        failed: impl FnOnce(E) -> ImageError,
    ) -> ImageError {
        match self {
            Lost::Loop => ImageError::entry(entry, EntryFault::SymlinkLoop),
            Lost::NotADirectory => ImageError::entry(entry, EntryFault::NotADirectory),
            Lost::TooLong => ImageError::limit(Limit::Path, longest as u64),
            Lost::Failed(error) => failed(error),
        }
    }
}

/// Follows `path`, of which no state on the way may have more than `longest` bytes. One without a slash at the beginning counts
/// from the root as well; only, if its first name is a symlink, `..` in the target of that is not taken for text.
pub(super) fn follow<F: Files>(
    files: &F,
    path: &[u8],
    longest: usize,
) -> Result<Followed<F::Directory>, Lost<F::Error>> {
    let mut walk = Walk { files, longest, links: 0, names: 0 };
    let mut path = path.to_vec();
    loop {
        let before = walk.links;
        let (at, there) = walk.pass(&path)?;
        if walk.links == before {
            return Ok(Followed { path: at, there });
        }
        path = at;
    }
}

/// The following of one path.
struct Walk<'f, F> {
    files: &'f F,
    longest: usize,
    /// Symlinks that passes met.
    links: u32,
    /// Names that were looked up.
    names: u32,
}

type Step<F, T> = Result<T, Lost<<F as Files>::Error>>;

impl<F: Files> Walk<'_, F> {
    /// One pass. Where it met no symlink its result is clean and begins with a slash.
    fn pass(&mut self, path: &[u8]) -> Step<F, (Vec<u8>, There<F::Directory>)> {
        let mut at = b"/".to_vec();
        // What `at` leads to, as long as that is known.
        let mut here = Some(There::Directory(self.files.root()?));
        // The first name of a path that does not begin at the root gives way to its target as that stands there.
        let mut is_bare = !path.starts_with(b"/");
        for name in names(path) {
            let known = here.take().filter(|_| name != b"." && name != b"..");
            let candidate = match known {
                Some(_) => [at.as_slice(), if at.len() > 1 { b"/" } else { b"" }, name].concat(),
                None => join(&at, name),
            };
            if candidate.len() > self.longest {
                return Err(Lost::TooLong);
            }
            let there = match known {
                Some(here) => self.step(&here, name)?,
                None => self.lstat(&candidate)?,
            };
            at = match there {
                There::Symlink(_) if self.links == LINKS_MAX => return Err(Lost::Loop),
                There::Symlink(target) => {
                    self.links += 1;
                    if is_bare || target.starts_with(b"/") { target } else { join(&at, &target) }
                }
                there => {
                    here = Some(there);
                    candidate
                }
            };
            is_bare = false;
        }
        Ok((at, here.unwrap_or(There::Nothing)))
    }

    /// What a name leads to from what is no symlink.
    fn step(&mut self, here: &There<F::Directory>, name: &[u8]) -> Step<F, There<F::Directory>> {
        match here {
            There::Directory(_) if self.names == NAMES_MAX => Err(Lost::Loop),
            There::Directory(directory) => {
                self.names += 1;
                Ok(self.files.look(directory, name)?)
            }
            There::Symlink(_) | There::Other => Err(Lost::NotADirectory),
            There::Nothing => Ok(There::Nothing),
        }
    }

    /// As the kernel's: symlinks before the last name are followed.
    fn lstat(&mut self, path: &[u8]) -> Step<F, There<F::Directory>> {
        let mut left: Vec<Vec<u8>> = names(path).rev().map(<[u8]>::to_vec).collect();
        // The names of the directories that led here, for `..`.
        let mut way: Vec<Vec<u8>> = Vec::new();
        let mut here = There::Directory(self.files.root()?);
        let mut links = 0;
        while let Some(name) = left.pop() {
            match (&here, name.as_slice()) {
                (There::Directory(_), b".") => {}
                // Above the root is the host, of which nothing is asked.
                (There::Directory(_), b"..") if way.is_empty() => return Ok(There::Nothing),
                (There::Directory(_), b"..") => {
                    way.pop();
                    here = There::Directory(self.files.root()?);
                    for name in &way {
                        here = self.step(&here, name)?;
                    }
                }
                _ => match self.step(&here, &name)? {
                    There::Nothing => return Ok(There::Nothing),
                    There::Symlink(_) if !left.is_empty() && links == LINKS_MAX => return Err(Lost::Loop),
                    There::Symlink(target) if !left.is_empty() => {
                        links += 1;
                        if target.starts_with(b"/") {
                            return Ok(There::Nothing);
                        }
                        left.extend(names(&target).rev().map(<[u8]>::to_vec));
                    }
                    there => {
                        way.push(name);
                        here = there;
                    }
                },
            }
        }
        Ok(here)
    }
}

/// What is below an open directory.
impl Files for Dir {
    type Directory = Dir;
    type Error = io::Error;

    fn root(&self) -> io::Result<Dir> {
        self.find(b"")?.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn look(&self, directory: &Dir, name: &[u8]) -> io::Result<There<Dir>> {
        Ok(match directory.kind(name)? {
            None => There::Nothing,
            Some(NodeType::Directory) => There::Directory(directory.child(name)?),
            Some(NodeType::Symlink) => There::Symlink(directory.node(name)?.target()?),
            Some(NodeType::File | NodeType::Special) => There::Other,
        })
    }
}

/// The names of a path, in which slashes at the ends and doubled ones mean nothing.
pub(super) fn names(path: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
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
