//! One entry after the other, done to a directory.

use std::collections::hash_map::RandomState;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::hash::BuildHasher;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{Extract, Whiteouts};
use crate::image::ImageError;
use crate::image::error::{EntryFault, shown};
use crate::image::follow::{follow, names};
use crate::image::limits::Limit;
use crate::image::tar::{Chunk, Entry, EntryPath, Kind, Reader, Time, Whiteout, Xattr};
use crate::sys::beneath::{Attributed, Dir, NodeType, Special, XattrAnswer};
use crate::sys::idmap;
use crate::sys::tree::TreeError;

const DEFAULT_MODE: u16 = 0o755;
/// What a path that was made takes in memory, at least.
const APPLIED: u64 = 16;

pub(super) fn at(path: &[u8], source: io::Error) -> ImageError {
    ImageError::Extract { path: format!("/{}", shown(path)), source }
}

/// A directory without symlinks in its path.
struct Place {
    /// From the root, without a slash at the beginning.
    path: Vec<u8>,
    dir: Dir,
}

impl Place {
    fn path_of(&self, name: &[u8]) -> Vec<u8> {
        if self.path.is_empty() { name.to_vec() } else { [&self.path, &b"/"[..], name].concat() }
    }
}

/// A layer being written.
pub(super) struct Extraction<'a> {
    root: Dir,
    how: &'a Extract<'a>,
    cancelled: &'a dyn Fn() -> bool,
    leave_devices_out: bool,
    /// Where the last entry went, by the directory of its path: most entries follow one of the same directory.
    last: Option<(Vec<u8>, Place)>,
    /// Whether something was removed for this entry.
    removed: bool,
    /// Directories that got their entry, by its path: the last time, and after how many others.
    times: HashMap<Vec<u8>, (u64, Time)>,
    /// Implied directories, by path without symlinks.
    implied: Vec<(Vec<u8>, Time)>,
    /// Bytes that these two take.
    remembered: u64,
    /// Hashes of the paths that this layer put something at; only to apply whiteouts.
    applied: HashSet<u64>,
    hasher: RandomState,
    /// Directories that were emptied of what is not of this layer.
    emptied: HashSet<u64>,
}

impl<'a> Extraction<'a> {
    pub(super) fn begin(
        dir: &Path,
        how: &'a Extract<'a>,
        cancelled: &'a dyn Fn() -> bool,
    ) -> Result<Extraction<'a>, ImageError> {
        Ok(Extraction {
            root: Dir::open(dir).map_err(|source| at(b"", source))?,
            how,
            cancelled,
            leave_devices_out: idmap::in_user_namespace(),
            last: None,
            removed: false,
            times: HashMap::new(),
            implied: Vec::new(),
            remembered: 0,
            applied: HashSet::new(),
            hasher: RandomState::new(),
            emptied: HashSet::new(),
        })
    }

    /// Does what `entry` says; its data is read from `reader`.
    pub(super) fn apply(&mut self, entry: &Entry, reader: &mut Reader<'_>) -> Result<(), ImageError> {
        let Some((directory, name)) = entry.path.split() else { return Ok(()) };
        let is_device = matches!(entry.kind, Kind::CharDevice { .. } | Kind::BlockDevice { .. });
        if is_device && self.leave_devices_out {
            tracing::warn!(path = %shown(entry.path.as_bytes()), "a device is left out in a user namespace");
            return Ok(());
        }
        self.removed = false;
        let (key, parent) = self.parent(directory, entry)?;
        match (entry.path.whiteout()?, self.how.whiteouts) {
            (Some(whiteout), Whiteouts::Overlay) => mark(&parent, whiteout, entry)?,
            (Some(Whiteout::Opaque), Whiteouts::Remove) => self.empty(&parent)?,
            (Some(Whiteout::Of(name)), Whiteouts::Remove) => self.remove(&parent, name)?,
            (None, _) => self.apply_file(&parent, name, entry, reader)?,
        }
        // What was removed may have been on the way.
        self.last = (!self.removed).then_some((key, parent));
        Ok(())
    }

    /// The directory that `directory` means, made with all that is missing of it; with `directory`, to be remembered.
    fn parent(&mut self, directory: &[u8], entry: &Entry) -> Result<(Vec<u8>, Place), ImageError> {
        if let Some(last) = self.last.take_if(|(path, _)| path == directory) {
            return Ok(last);
        }
        let plain = self.root.find(directory).map_err(|source| at(directory, source))?;
        let place = match plain {
            Some(dir) => Place { path: directory.to_vec(), dir },
            None => self.make_parents(directory, entry)?,
        };
        Ok((directory.to_vec(), place))
    }

    fn make_parents(&mut self, directory: &[u8], entry: &Entry) -> Result<Place, ImageError> {
        let path = self.resolve(directory, entry.path.as_bytes())?;
        let mut place = Place { path: Vec::new(), dir: self.open_root()? };
        for name in names(&path) {
            let below = place.path_of(name);
            let dir = match place.dir.child(name) {
                Ok(dir) => dir,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    self.imply(&place, name, entry.mtime)?;
                    place.dir.child(name).map_err(|source| at(&below, source))?
                }
                Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
                    return Err(ImageError::entry(entry.path.as_bytes(), EntryFault::NotADirectory));
                }
                Err(error) => return Err(at(&below, error)),
            };
            place = Place { path: below, dir };
        }
        Ok(place)
    }

    /// `directory` without symlinks; it need not be there. `entry` is what errors are about.
    fn resolve(&self, directory: &[u8], entry: &[u8]) -> Result<Vec<u8>, ImageError> {
        let longest = self.how.limits.path;
        let followed = follow(&self.root, directory, longest);
        let followed = followed.map_err(|lost| lost.refuse(entry, longest, |error| at(directory, error)))?;
        Ok(followed.path[1..].to_vec())
    }

    fn open_root(&self) -> Result<Dir, ImageError> {
        let root = self.root.find(b"").map_err(|source| at(b"", source))?;
        root.ok_or_else(|| at(b"", io::ErrorKind::NotFound.into()))
    }

    /// Makes a directory that the layer has no entry for.
    fn imply(&mut self, parent: &Place, name: &[u8], mtime: Time) -> Result<(), ImageError> {
        let path = parent.path_of(name);
        let failed = |source| at(&path, source);
        parent.dir.make_directory(name).map_err(failed)?;
        let node = parent.dir.node(name).map_err(failed)?;
        node.set_mode(DEFAULT_MODE).map_err(failed)?;
        let components: Vec<&[u8]> = names(&path).collect();
        let found = self.how.below.directory(&components);
        let found = found.map_err(|source| ImageError::Below { path: shown(&path), source })?;
        if let Some(attributes) = found {
            node.set_owner(Some(attributes.uid), Some(attributes.gid)).map_err(failed)?;
            node.set_mode(attributes.mode & 0o7777).map_err(failed)?;
            // What the kernel gave the new directory, a label for instance, stays.
            let add = |name: &[u8], value: &[u8]| node.add_xattr(name, value);
            set_xattrs(add, NodeType::Directory, &attributes.xattrs, &path)?;
        }
        self.remember(&path)?;
        self.implied.push((path, mtime));
        Ok(())
    }

    fn remember(&mut self, path: &[u8]) -> Result<(), ImageError> {
        // The path and what a map's entry takes.
        self.remembered += 64 + path.len() as u64;
        let allowed = self.how.limits.metadata;
        if self.remembered > allowed { Err(ImageError::limit(Limit::Metadata, allowed)) } else { Ok(()) }
    }

    fn apply_file(
        &mut self,
        parent: &Place,
        name: &[u8],
        entry: &Entry,
        reader: &mut Reader<'_>,
    ) -> Result<(), ImageError> {
        let path = parent.path_of(name);
        let failed = |source| at(&path, source);
        let present = parent.dir.kind(name).map_err(failed)?;
        let merged = present == Some(NodeType::Directory) && entry.kind == Kind::Directory;
        if present.is_some() && !merged {
            self.remove(parent, name)?;
        }
        self.note(&path)?;
        let special = |special| parent.dir.make_special(name, special);
        let made = match &entry.kind {
            Kind::File => {
                let file = parent.dir.make_file(name).map_err(failed)?;
                copy(reader, &file, entry, &path)?;
                return set_attributes(&file, NodeType::File, entry, &path);
            }
            Kind::Directory if merged => Ok(()),
            Kind::Directory => parent.dir.make_directory(name),
            Kind::Symlink { target } => parent.dir.make_symlink(name, target),
            Kind::HardLink { target } => return self.link(parent, name, target, entry),
            Kind::CharDevice { major, minor } => {
                special(Special::CharDevice { major: *major, minor: *minor })
            }
            Kind::BlockDevice { major, minor } => {
                special(Special::BlockDevice { major: *major, minor: *minor })
            }
            Kind::Fifo => special(Special::Fifo),
            Kind::Global => return Ok(()),
        };
        made.map_err(failed)?;
        let node = parent.dir.node(name).map_err(failed)?;
        set_attributes(&node, node.kind().map_err(failed)?, entry, &path)?;
        if entry.kind == Kind::Directory {
            self.remember_time(entry)?;
        }
        Ok(())
    }

    fn remember_time(&mut self, entry: &Entry) -> Result<(), ImageError> {
        let after = self.times.len() as u64;
        let path = entry.path.as_bytes();
        if let Some(known) = self.times.get_mut(path) {
            // Later than all others so far, as the applier's list has it; gaps in the numbers mean nothing.
            *known = (after.max(known.0) + 1, entry.mtime);
            return Ok(());
        }
        self.remember(path)?;
        self.times.insert(path.to_vec(), (after, entry.mtime));
        Ok(())
    }

    fn link(&self, parent: &Place, name: &[u8], target: &EntryPath, entry: &Entry) -> Result<(), ImageError> {
        let refuse = |fault| ImageError::entry(entry.path.as_bytes(), fault);
        let Some((directory, other)) = target.split() else {
            return Err(refuse(EntryFault::LinkToDirectory));
        };
        let failed = |source| at(entry.path.as_bytes(), source);
        let directory = self.resolve(directory, entry.path.as_bytes())?;
        let from = self.root.find(&directory).map_err(failed)?;
        let from = from.ok_or_else(|| refuse(EntryFault::LinkTargetMissing))?;
        let kind = match from.kind(other).map_err(failed)? {
            None => return Err(refuse(EntryFault::LinkTargetMissing)),
            Some(NodeType::Directory) => return Err(refuse(EntryFault::LinkToDirectory)),
            Some(kind) => kind,
        };
        parent.dir.make_link(name, &from, other).map_err(failed)?;
        let node = parent.dir.node(name).map_err(failed)?;
        set_attributes(&node, kind, entry, entry.path.as_bytes())
    }

    /// Removes what is called `name`, as a whole.
    fn remove(&mut self, parent: &Place, name: &[u8]) -> Result<(), ImageError> {
        self.removed = true;
        parent.dir.remove(name, self.cancelled).map_err(|error| match error {
            TreeError::Cancelled => ImageError::Cancelled,
            TreeError::MountPoint(_) => at(&parent.path_of(name), io::ErrorKind::ResourceBusy.into()),
            TreeError::Io { source, .. } => at(&parent.path_of(name), source),
        })
    }

    /// Keeps in mind that this layer made the path.
    fn note(&mut self, path: &[u8]) -> Result<(), ImageError> {
        if self.how.whiteouts == Whiteouts::Overlay {
            return Ok(());
        }
        // By what it takes, not by the number of entries: this is where layers with too many for an image end up.
        let allowed = self.how.limits.metadata;
        if self.applied.len() as u64 * APPLIED >= allowed {
            return Err(ImageError::limit(Limit::Metadata, allowed));
        }
        self.applied.insert(self.hasher.hash_one(path));
        Ok(())
    }

    /// Removes all that this layer did not put into a directory, once.
    fn empty(&mut self, parent: &Place) -> Result<(), ImageError> {
        if !self.emptied.insert(self.hasher.hash_one(&parent.path)) {
            return Ok(());
        }
        let mut paths = vec![parent.path.clone()];
        while let Some(path) = paths.pop() {
            let failed = |source| at(&path, source);
            let Some(dir) = self.root.find(&path).map_err(failed)? else { continue };
            let entries = dir.list().map_err(failed)?;
            let place = Place { path, dir };
            for (name, kind) in entries {
                let below = place.path_of(&name);
                if !self.applied.contains(&self.hasher.hash_one(&below)) {
                    self.remove(&place, &name)?;
                } else if kind == NodeType::Directory {
                    paths.push(below);
                }
            }
        }
        Ok(())
    }

    /// Sets the times of directories, which everything that was made in them has changed.
    pub(super) fn finish(self) -> Result<(), ImageError> {
        for (path, time) in &self.implied {
            // What has taken its place has a time of its own.
            if let Some(dir) = self.root.find(path).map_err(|source| at(path, source))? {
                set_time(&dir.as_node().map_err(|source| at(path, source))?, *time, path)?;
            }
        }
        let mut times: Vec<(&Vec<u8>, &(u64, Time))> = self.times.iter().collect();
        times.sort_by_key(|(_, (after, _))| *after);
        for (path, (_, time)) in times {
            let gone = || ImageError::entry(path, EntryFault::DirectoryGone);
            let resolved = self.resolve(path, path).map_err(|error| match error {
                ImageError::Entry { .. } | ImageError::Limit { .. } => gone(),
                error => error,
            })?;
            let node = self.root.look(&resolved).map_err(|source| at(path, source))?;
            set_time(&node.ok_or_else(gone)?, *time, path)?;
        }
        Ok(())
    }
}

/// Makes a whiteout in overlayfs's form.
fn mark(parent: &Place, whiteout: Whiteout<'_>, entry: &Entry) -> Result<(), ImageError> {
    let failed = |source| at(entry.path.as_bytes(), source);
    match whiteout {
        Whiteout::Opaque => {
            let set = parent.dir.as_node().and_then(|dir| dir.set_xattr(b"trusted.overlay.opaque", b"y"));
            match set.map_err(failed)? {
                XattrAnswer::Set => Ok(()),
                XattrAnswer::Forbidden => Err(failed(io::ErrorKind::PermissionDenied.into())),
                _ => Err(failed(io::ErrorKind::Unsupported.into())),
            }
        }
        Whiteout::Of(name) if parent.dir.kind(name).map_err(failed)?.is_some() => {
            Err(ImageError::entry(entry.path.as_bytes(), EntryFault::WhiteoutOccupied))
        }
        Whiteout::Of(name) => {
            let made = parent.dir.make_special(name, Special::CharDevice { major: 0, minor: 0 });
            let node = made.and_then(|()| parent.dir.node(name)).map_err(failed)?;
            node.set_owner(entry.uid, entry.gid).map_err(failed)
        }
    }
}

fn copy(reader: &mut Reader<'_>, file: &File, entry: &Entry, path: &[u8]) -> Result<(), ImageError> {
    let mut end = 0;
    let mut hole = false;
    while let Some(chunk) = reader.chunk()? {
        hole = matches!(chunk, Chunk::Hole(_));
        match chunk {
            Chunk::Bytes(bytes) => {
                file.write_all_at(bytes, end).map_err(|source| at(path, source))?;
                end += bytes.len() as u64;
            }
            Chunk::Hole(length) => end += length,
        }
    }
    debug_assert_eq!(end, entry.size, "the reader counts");
    if hole { file.set_len(end).map_err(|source| at(path, source)) } else { Ok(()) }
}

/// Owner first, which takes capabilities and setuid away; then those.
fn set_attributes(
    node: &impl Attributed,
    kind: NodeType,
    entry: &Entry,
    path: &[u8],
) -> Result<(), ImageError> {
    node.set_owner(entry.uid, entry.gid).map_err(|source| at(path, source))?;
    set_xattrs(|name, value| node.set_xattr(name, value), kind, &entry.xattrs, path)?;
    if kind != NodeType::Symlink {
        node.set_mode(entry.mode).map_err(|source| at(path, source))?;
    }
    set_time(node, entry.mtime, path)
}

pub(super) fn set_time(node: &impl Attributed, time: Time, path: &[u8]) -> Result<(), ImageError> {
    node.set_times(time.seconds, time.nanoseconds).map_err(|source| at(path, source))
}

pub(super) fn set_xattrs(
    set: impl Fn(&[u8], &[u8]) -> io::Result<XattrAnswer>,
    kind: NodeType,
    xattrs: &[Xattr],
    path: &[u8],
) -> Result<(), ImageError> {
    for Xattr { name, value } in xattrs.iter().filter(|xattr| !xattr.name.starts_with(b"trusted.")) {
        match set(name, value).map_err(|source| at(path, source))? {
            XattrAnswer::Set => {}
            XattrAnswer::Forbidden
                if name.starts_with(b"user.") && matches!(kind, NodeType::Symlink | NodeType::Special) => {}
            XattrAnswer::Unsupported => {
                tracing::warn!(path = %shown(path), xattr = %shown(name), "an extended attribute is left out");
            }
            XattrAnswer::Forbidden => return Err(at(path, io::ErrorKind::PermissionDenied.into())),
            XattrAnswer::Malformed => return Err(ImageError::entry(path, EntryFault::Xattr)),
        }
    }
    Ok(())
}
