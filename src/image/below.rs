//! What a layer says about one of its directories, whether it is a layer image or a tree of files: where implied directories of
//! the layers above get their attributes. As containerd's applier looks: symlinks are followed inside the layer's own root.

use std::collections::VecDeque;
use std::io;
use std::path::Path;

use super::Attributes;
use super::check::{Metadata, NodeInfo, NodeKind, ReadAt};
use super::tar::Xattr;
use crate::sys::look::{self, Look};

/// How many symlinks are followed for one path. containerd's `fs.RootPath` gives up at 255.
const LINKS: usize = 255;

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

/// What a layer image has at `path` (names from its root).
pub fn in_image<R: ReadAt>(layer: &Metadata<R>, path: &[&[u8]]) -> io::Result<Found> {
    Ok(match resolve(layer, path)? {
        None => Found::Nothing,
        Some(node) if node.kind == NodeKind::Directory => Found::Directory(Attributes {
            mode: node.mode & 0o7777,
            uid: node.uid,
            gid: node.gid,
            xattrs: node.xattrs.into_iter().map(|x| Xattr { name: x.name, value: x.value }).collect(),
        }),
        Some(_) => Found::Other,
    })
}

/// What a tree of files has at `path` (names from its root).
pub fn in_directory(root: &Path, path: &[&[u8]]) -> io::Result<Found> {
    Ok(match look::in_root(root, path)? {
        None => Found::Nothing,
        Some(Look::Other) => Found::Other,
        Some(Look::Directory { mode, uid, gid, xattrs }) => Found::Directory(Attributes {
            mode: permissions(mode),
            uid,
            gid,
            xattrs: xattrs.into_iter().map(|(name, value)| Xattr { name, value }).collect(),
        }),
    })
}

fn permissions(mode: u32) -> u16 {
    u16::try_from(mode & 0o7777).unwrap_or_default()
}

fn resolve<R: ReadAt>(layer: &Metadata<R>, path: &[&[u8]]) -> io::Result<Option<NodeInfo>> {
    let lookup = |path: &[Vec<u8>]| layer.lookup(path.iter().map(Vec::as_slice)).map_err(io::Error::other);
    let mut left: VecDeque<Vec<u8>> = path.iter().map(|name| name.to_vec()).collect();
    let (mut at, mut links) = (Vec::new(), 0);
    while let Some(name) = left.pop_front() {
        match name.as_slice() {
            b"" | b"." => continue,
            b".." => {
                at.pop();
                continue;
            }
            _ => at.push(name),
        }
        let Some(node) = lookup(&at)? else { return Ok(None) };
        let NodeKind::Symlink { target } = node.kind else { continue };
        links += 1;
        if links > LINKS {
            return Ok(None);
        }
        at.pop();
        if target.starts_with(b"/") {
            at.clear();
        }
        target.split(|byte| *byte == b'/').rev().for_each(|part| left.push_front(part.to_vec()));
    }
    lookup(&at)
}
