//! Which directory a path of an entry means, as containerd's `RootPath` finds it (`continuity/fs/path.go`).
//!
//! The rules are those of `super::super::tree::path`, asked of a real directory: symlinks are followed inside it, in passes; a
//! pass goes through the names from left to right and replaces a symlink by its target as text, where `..` takes a name away
//! without asking what that is; a pass in which no symlink is met ends it. What is not there is taken for a name. Where the
//! kernel would follow a link out of the directory, nothing is there.

use std::io::ErrorKind;

use super::write::at;
use crate::image::error::{EntryFault, ImageError};
use crate::image::limits::{Limit, Limits};
use crate::sys::beneath::{Dir, NodeType};

/// More symlinks on one path are taken for a loop.
const LINKS_MAX: u32 = 255;

/// `path` without symlinks: clean names between slashes, without one at the beginning; what it names need not be there.
/// `entry` is what errors are about.
pub(super) fn resolve(root: &Dir, path: &[u8], limits: &Limits, entry: &[u8]) -> Result<Vec<u8>, ImageError> {
    let mut path = path.to_vec();
    let mut links = 0;
    // Entries' paths count from the root.
    let mut is_bare = false;
    loop {
        let before = links;
        path = pass(root, &path, is_bare, &mut links, (limits, entry))?;
        if links == before {
            return Ok(path.strip_prefix(b"/").unwrap_or(&path).to_vec());
        }
        is_bare = !path.starts_with(b"/");
    }
}

fn pass(
    root: &Dir,
    path: &[u8],
    mut is_bare: bool,
    links: &mut u32,
    (limits, entry): (&Limits, &[u8]),
) -> Result<Vec<u8>, ImageError> {
    let mut resolved = b"/".to_vec();
    for name in names(path) {
        let candidate = join(&resolved, name);
        if candidate.len() > limits.path {
            return Err(ImageError::limit(Limit::Path, limits.path as u64));
        }
        if *links > LINKS_MAX {
            return Err(ImageError::entry(entry, EntryFault::SymlinkLoop));
        }
        resolved = match symlink(root, &candidate[1..], entry)? {
            None => candidate,
            Some(target) => {
                *links += 1;
                // The first name of a path that does not begin at the root gives way to its target as that stands there.
                if is_bare || target.starts_with(b"/") { target } else { join(&resolved, &target) }
            }
        };
        is_bare = false;
    }
    Ok(resolved)
}

/// The target, if there is a symlink at `path`.
fn symlink(root: &Dir, path: &[u8], entry: &[u8]) -> Result<Option<Vec<u8>>, ImageError> {
    let node = match root.look(path) {
        Ok(Some(node)) => node,
        Ok(None) => return Ok(None),
        Err(error) if error.kind() == ErrorKind::NotADirectory => {
            return Err(ImageError::entry(entry, EntryFault::NotADirectory));
        }
        Err(error) => return Err(at(path, error)),
    };
    match node.kind().map_err(|error| at(path, error))? {
        NodeType::Symlink => node.target().map(Some).map_err(|error| at(path, error)),
        _ => Ok(None),
    }
}

pub(super) fn names(path: &[u8]) -> impl Iterator<Item = &[u8]> {
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
