//! Layer images made visible: an image is mounted at its attach point, `<root>/l/<serial>`, and taken away again.
//!
//! **What.** [`Attacher::open`] finds by trying which way of mounting works on this node; [`Attacher::attach`] and
//! [`Attacher::detach`] do it; [`Attacher::attached`] lists what is attached, from the kernel's table.
//!
//! **Words.** *file-backed*: the kernel mounts the image file itself (Linux 6.12). *loop*: a read-only loop device stands
//! between.
//!
//! **Invariants.**
//! * **A1** An image is shown at its attach point only after its directory `fs` was seen in it: what is mounted but not
//!   visible, in this or another mount namespace, has no `l/<serial>/fs`, and a container's mount fails instead of having
//!   an empty layer.
//! * **A2** No step leaves anything that needs to be known to be cleaned: a mount shows in the mount table, a directory
//!   without one is empty, a loop device goes with its last user.
//! * **A3** Links are not followed at the attach point.
//! * **A4** Overlays hold their own copies of the mounts below them: detaching neither hinders them nor takes their files
//!   away, and the image file may be unlinked (never truncated or punched) at once.
//!
//! Calls for different serials may run at the same time. Calls for one serial must not: the caller holds a lock for it.
//! The metadata of an image that came from a store must have been accepted by [`crate::image::check`] before.
//!
//! **When it fails.** [`AttachError::Unsupported`] is the node's, once: no layer images here. [`AttachError::Refused`] and
//! [`AttachError::NoTree`] are the image's; the attach point is as it was before.

use std::collections::HashMap;
use std::fmt;
use std::fs::{DirBuilder, File};
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::trial::Trial;
use crate::sys::decimal;
use crate::sys::loopdev::{self, LoopDevice};
use crate::sys::mount::{self, DetachedErofs, ErofsIo, PointState, Unmount};
use crate::sys::{mountinfo, readahead};

/// The directory at the root of every layer image that holds the layer.
pub const TREE: &str = "fs";
/// How long what was written stays in memory, most probably.
pub const FRESH: Duration = Duration::from_secs(120);
/// An image reads ahead as far as files on its disk do, within these, in KiB. More has made reads in order slower again.
const READ_AHEAD: RangeInclusive<u32> = 128..=1024;
/// More than this many mounts on top of each other are nobody's attach point.
const STACKED: u32 = 64;

/// Which ways of mounting may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// File-backed where the kernel has it, else loop devices.
    #[default]
    Auto,
    /// File-backed only.
    FileBacked,
    /// Loop devices only.
    Loop,
}

/// The way that works on this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The kernel mounts the file.
    FileBacked(ErofsIo),
    /// Through a loop device.
    Loop,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Way::FileBacked(_) => "file-backed EROFS",
            Way::Loop => "EROFS on loop devices",
        })
    }
}

/// Why an image is not attached or not detached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// Neither way works here; no layer image is made on this node.
    #[error(
        "layer images cannot be mounted on this node (from a file: {}; through a loop device: {}): layers are unpacked \
         as files; to have layer images, load the modules (modprobe erofs loop) and run speedy as root with /dev/loop-control",
        reason(.file_backed), reason(.loop_device)
    )]
    Unsupported {
        /// What became of a file-backed trial; `None` if it was not allowed.
        file_backed: Option<io::Error>,
        /// What became of a trial with a loop device; `None` if it was not allowed.
        loop_device: Option<io::Error>,
    },
    /// There is no such image file.
    #[error("{0} is missing")]
    Missing(PathBuf),
    /// The kernel does not take the image.
    #[error("the kernel refuses to mount {image}: {source}; see the kernel log (dmesg) for the reason")]
    Refused {
        /// The image file.
        image: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The image has no directory `fs`.
    #[error("{0} is not a layer image: it has no directory fs at its root")]
    NoTree(PathBuf),
    /// Something else stands at the attach point. It was left alone.
    #[error("{0} is in use by something else")]
    Occupied(PathBuf),
    /// The mount succeeded, but cannot be seen at the attach point.
    #[error("{0} was mounted but does not show its layer: something hides it")]
    Hidden(PathBuf),
    /// The system refused.
    #[error("{path}: {source}")]
    Io {
        /// Where.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

fn reason(tried: &Option<io::Error>) -> String {
    tried.as_ref().map_or_else(|| "not tried".into(), io::Error::to_string)
}

impl AttachError {
    fn at(path: &Path, source: io::Error) -> AttachError {
        AttachError::Io { path: path.to_owned(), source }
    }
}

/// One attached layer image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// The name of its attach point.
    pub serial: u64,
    /// The image file; ` (deleted)` stands behind the name of a removed one below a loop device. `None` if the kernel
    /// does not tell.
    pub image: Option<PathBuf>,
    /// The loop device that it is mounted from, if one stands between.
    pub device: Option<PathBuf>,
}

/// Mounts layer images below one root.
#[derive(Debug, Clone)]
pub struct Attacher {
    layers: PathBuf,
    way: Way,
    /// Whether there may be a mount that reads through the page cache of its file and need not.
    cached: Arc<AtomicBool>,
}

impl Attacher {
    /// Finds out by trying, on an image of its own in a scratch directory below `root`, how images can be mounted there.
    pub fn open(root: &Path, mode: Mode) -> Result<Attacher, AttachError> {
        let way = Attacher::probe(root, mode)?;
        Ok(Attacher::new(root, way))
    }

    fn new(root: &Path, way: Way) -> Attacher {
        // Whoever was here before may have left some.
        Attacher { layers: root.join("l"), way, cached: Arc::new(AtomicBool::new(true)) }
    }

    /// The way that [`Attacher::open`] would use. What a killed trial leaves is a directory whose name begins with
    /// `.probe-`, which the next start of the daemon removes.
    pub fn probe(root: &Path, mode: Mode) -> Result<Way, AttachError> {
        let trial = Trial::new(root).map_err(|error| AttachError::at(root, error))?;
        let (mut file_backed, mut loop_device) = (None, None);
        let ways = [Way::FileBacked(ErofsIo::Direct), Way::FileBacked(ErofsIo::Default), Way::Loop];
        for way in ways {
            let refused = match (way, mode) {
                (Way::FileBacked(_), Mode::Loop) | (Way::Loop, Mode::FileBacked) => continue,
                (Way::FileBacked(_), _) => &mut file_backed,
                (Way::Loop, _) => &mut loop_device,
            };
            let mounted = mount_image(&trial.image(), way);
            match mounted.and_then(|mounted| trial.require_readable(mounted)) {
                Ok(()) => return Ok(way),
                Err(error) => *refused = Some(error),
            }
        }
        Err(AttachError::Unsupported { file_backed, loop_device })
    }

    /// Without a trial, for a start on a full disk: the way that newer kernels have.
    pub fn untried(root: &Path) -> Attacher {
        Attacher::new(root, Way::FileBacked(ErofsIo::Default))
    }

    /// The way in use.
    pub fn way(&self) -> Way {
        self.way
    }

    /// The attach point of a serial.
    pub fn point(&self, serial: u64) -> PathBuf {
        self.layers.join(serial.to_string())
    }

    /// Mounts `image` at `point`, a direct child of `<root>/l`, which is made if it is not there; succeeds when that very
    /// image is there already. A directory with anything in it is not covered.
    pub fn attach(&self, image: &Path, point: &Path) -> Result<(), AttachError> {
        let way = self.way_for(image);
        attach_with(image, point, || mount_image(image, way))?;
        self.note(way);
        Ok(())
    }

    /// Mounts `image` from its file on top of what is mounted at `point`, at once for whoever looks there next; nothing happens
    /// where files cannot be mounted.
    pub fn cover(&self, image: &Path, point: &Path) -> Result<(), AttachError> {
        if self.way == Way::Loop {
            return Ok(());
        }
        let (PointState::Erofs, Some(top)) =
            mount::look(point).map_err(|error| AttachError::at(point, error))?
        else {
            return Err(AttachError::Occupied(point.to_owned()));
        };
        let way = self.way_for(image);
        mount_at(image, point, top, || mount_image(image, way))?;
        self.note(way);
        Ok(())
    }

    fn way_for(&self, image: &Path) -> Way {
        match self.way {
            Way::FileBacked(ErofsIo::Direct) if is_fresh(image) => Way::FileBacked(ErofsIo::Default),
            way => way,
        }
    }

    /// What was mounted so is in the table by now.
    fn note(&self, way: Way) {
        if way != self.way {
            self.cached.store(true, Ordering::Release);
        }
    }

    /// The layer images that are read through the page cache of their files, as fresh ones are, where the kernel can do
    /// without it.
    pub fn cached(&self) -> Result<Vec<u64>, AttachError> {
        let may_be =
            self.way == Way::FileBacked(ErofsIo::Direct) && self.cached.swap(false, Ordering::AcqRel);
        if !may_be {
            return Ok(Vec::new());
        }
        let mut found: Vec<u64> = self
            .mounts()
            .inspect_err(|_| self.cached.store(true, Ordering::Release))?
            .into_iter()
            .filter_map(|(serial, entry)| mount::is_cached(&entry).then_some(serial))
            .collect();
        found.dedup();
        Ok(found)
    }

    /// What [`Attacher::cached`] found at `point`, with this file, is read past the page cache from now on, also by who uses
    /// it already; not yet if it is fresh still.
    pub fn settle(&self, image: &Path, point: &Path) -> Result<(), AttachError> {
        if is_fresh(image) {
            self.cached.store(true, Ordering::Release);
            return Ok(());
        }
        let at_point = |error| AttachError::at(point, error);
        match mount::look(point).map_err(at_point)? {
            (PointState::Erofs, Some(root)) => mount::read_past_cache(root)
                .inspect_err(|_| self.cached.store(true, Ordering::Release))
                .map_err(at_point),
            // Detached in between.
            _ => Ok(()),
        }
    }

    /// Mounts `image` at `point` through a loop device, whatever the way in use is, so that its file can be exchanged later;
    /// otherwise like [`Attacher::attach`].
    pub fn attach_by_device(&self, image: &Path, point: &Path) -> Result<(), AttachError> {
        attach_with(image, point, || mount_image(image, Way::Loop))
    }

    /// Takes what covers a layer image away again: all but the lowest of what is mounted at `point`.
    pub fn uncover(&self, point: &Path) -> Result<(), AttachError> {
        let at_point = |error| AttachError::at(point, error);
        while self.mounts()?.iter().filter(|(serial, _)| self.point(*serial) == point).count() > 1 {
            match mount::unmount(point, Unmount::IfUnused) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                    mount::unmount(point, Unmount::FromSight).map_err(at_point)?
                }
                done => done.map_err(at_point)?,
            };
        }
        Ok(())
    }

    /// The loop devices that layer images are mounted from, by serial, below whatever covers them.
    pub fn devices(&self) -> Result<HashMap<u64, PathBuf>, AttachError> {
        let mut devices = HashMap::new();
        for (serial, entry) in self.mounts()? {
            // The lowest comes first.
            devices.entry(serial).or_insert(PathBuf::from(entry.source));
        }
        devices.retain(|_, source| source.starts_with("/dev"));
        Ok(devices)
    }

    /// Unmounts what is attached at `point` and removes the directory; succeeds when nothing is there. An image whose
    /// files are open through the attach point itself (somebody looks around in it) goes out of sight and is released
    /// when they are closed.
    pub fn detach(&self, point: &Path) -> Result<(), AttachError> {
        let at_point = |error| AttachError::at(point, error);
        for _ in 0..STACKED {
            match mount::look(point).map_err(at_point)?.0 {
                PointState::Absent => return Ok(()),
                PointState::Other => return Err(AttachError::Occupied(point.to_owned())),
                PointState::Directory => return remove_empty(point),
                PointState::Erofs => {}
            }
            match mount::unmount(point, Unmount::IfUnused) {
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                    tracing::info!(point = %point.display(), "files are open at an attach point; it is taken out of sight");
                    mount::unmount(point, Unmount::FromSight).map_err(at_point)?
                }
                done => done.map_err(at_point)?,
            };
        }
        Err(AttachError::Occupied(point.to_owned()))
    }

    /// What is attached below the root, in this process's mount namespace, by serial.
    pub fn attached(&self) -> Result<Vec<Attached>, AttachError> {
        let mut found = Vec::new();
        for (serial, entry) in self.mounts()? {
            let image = image_of(&entry).map_err(|error| AttachError::at(&self.layers, error))?;
            let device = Some(PathBuf::from(entry.source)).filter(|source| source.starts_with("/dev"));
            found.push(Attached { serial, image, device });
        }
        found.sort_by_key(|attached| attached.serial);
        // Of several mounts at one point the last one in the table is on top.
        found.reverse();
        found.dedup_by_key(|attached| attached.serial);
        found.reverse();
        Ok(found)
    }
}

impl Attacher {
    /// Every mount of a layer image below the root, with its serial; of several at one point the lowest comes first.
    fn mounts(&self) -> Result<Vec<(u64, mountinfo::MountEntry)>, AttachError> {
        let at_layers = |error| AttachError::at(&self.layers, error);
        let layers = match std::fs::canonicalize(&self.layers) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            path => path.map_err(at_layers)?,
        };
        let mut table = mountinfo::of_this_process().map_err(at_layers)?;
        table.retain(|entry| entry.kind == "erofs");
        let ours = |entry: mountinfo::MountEntry| {
            let name = entry.point.strip_prefix(&layers).ok().and_then(Path::to_str);
            // Only the canonical form is ours: not `007`, not `7/fs`.
            Some((name.and_then(decimal::parse)?, entry))
        };
        Ok(table.into_iter().filter_map(ours).collect())
    }
}

/// See [`Attacher::attach`]; `mount` makes the mount.
fn attach_with(
    image: &Path,
    point: &Path,
    mount: impl FnOnce() -> io::Result<DetachedErofs>,
) -> Result<(), AttachError> {
    let at_point = |error| AttachError::at(point, error);
    let (state, _) = mount::look(point).map_err(at_point)?;
    match state {
        PointState::Erofs => return require_same(image, point),
        PointState::Other => return Err(AttachError::Occupied(point.to_owned())),
        PointState::Directory => {}
        PointState::Absent => DirBuilder::new().mode(0o700).create(point).map_err(at_point)?,
    }
    let attached = attach_at(image, point, mount);
    if attached.is_err() && state == PointState::Absent {
        // An empty directory does no harm, but nobody would know whose it is.
        if let Err(error) = std::fs::remove_dir(point) {
            tracing::warn!(point = %point.display(), %error, "cannot remove an attach point that was not used");
        }
    }
    attached
}

fn attach_at(
    image: &Path,
    point: &Path,
    mount: impl FnOnce() -> io::Result<DetachedErofs>,
) -> Result<(), AttachError> {
    mount_at(image, point, empty_directory(point)?, mount)
}

fn mount_at(
    image: &Path,
    point: &Path,
    dir: OwnedFd,
    mount: impl FnOnce() -> io::Result<DetachedErofs>,
) -> Result<(), AttachError> {
    let mounted = mount().map_err(|error| explain(image, error))?;
    let refused = |source| AttachError::Refused { image: image.to_owned(), source };
    if !mounted.has_directory(TREE).map_err(refused)? {
        return Err(AttachError::NoTree(image.to_owned()));
    }
    mounted.attach(&dir).map_err(|error| AttachError::at(point, error))?;
    require_visible(point)
}

/// Mounts an open layer image at `point` through a loop device with direct I/O, which reads ahead so many bytes; otherwise like
/// [`Attacher::attach`]. For a file whose bytes may have to be fetched: this waits for them.
pub fn attach_device(file: &File, name: &Path, point: &Path, read_ahead: u32) -> Result<(), AttachError> {
    attach_with(name, point, || {
        let device = LoopDevice::open(file, name)?;
        // Without it one read is under way at a time, and every byte is kept three times.
        if !device.is_direct()? {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "no direct I/O below the loop device"));
        }
        device.set_read_ahead(read_ahead)?;
        DetachedErofs::mount(device.path(), ErofsIo::Default)
    })
}

/// Whether what is at `point` is `image`.
fn require_same(image: &Path, point: &Path) -> Result<(), AttachError> {
    // The file of an unattached mount has no path that leads to it.
    let path = std::fs::canonicalize(image).unwrap_or_else(|_| image.to_owned());
    let point_path = std::fs::canonicalize(point).map_err(|error| AttachError::at(point, error))?;
    let table = mountinfo::of_this_process().map_err(|error| AttachError::at(point, error))?;
    let top = table.iter().rfind(|entry| entry.point == point_path);
    let mounted = top.map(image_of).transpose().map_err(|error| AttachError::at(point, error))?;
    // The table keeps the name that the file had when it was mounted, before it was complete.
    let stem = |path: &Path| path.with_extension("");
    if mounted.flatten().map(|mounted| stem(&mounted)) != Some(stem(&path)) {
        return Err(AttachError::Occupied(point.to_owned()));
    }
    require_visible(point)
}

fn require_visible(point: &Path) -> Result<(), AttachError> {
    match mount::shows_erofs_with(point, TREE) {
        Ok(true) => Ok(()),
        Ok(false) => Err(AttachError::Hidden(point.to_owned())),
        Err(error) => Err(AttachError::at(point, error)),
    }
}

fn empty_directory(point: &Path) -> Result<OwnedFd, AttachError> {
    let at_point = |error| AttachError::at(point, error);
    let (PointState::Directory, Some(dir)) = mount::look(point).map_err(at_point)? else {
        return Err(AttachError::Occupied(point.to_owned()));
    };
    if std::fs::read_dir(point).map_err(at_point)?.next().is_some() {
        return Err(AttachError::Occupied(point.to_owned()));
    }
    Ok(dir)
}

fn remove_empty(point: &Path) -> Result<(), AttachError> {
    match std::fs::remove_dir(point) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error)
            if matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::ResourceBusy) =>
        {
            Err(AttachError::Occupied(point.to_owned()))
        }
        removed => removed.map_err(|error| AttachError::at(point, error)),
    }
}

/// Whether the image was written so lately that its bytes are still in memory: reading them from there is quicker than past it, until
/// they are dropped; see [`Attacher::settle`].
fn is_fresh(image: &Path) -> bool {
    let written = std::fs::metadata(image).and_then(|file| file.modified());
    written.is_ok_and(|at| at.elapsed().is_ok_and(|age| age < FRESH))
}

fn mount_image(image: &Path, way: Way) -> io::Result<DetachedErofs> {
    // The table shows the name as it was given here.
    let image = std::fs::canonicalize(image)?;
    match way {
        Way::FileBacked(io) => {
            let mounted = DetachedErofs::mount(&image, io)?;
            let ahead =
                readahead::of_disk(&image).map(|kib| kib.clamp(*READ_AHEAD.start(), *READ_AHEAD.end()));
            if let Some(Err(error)) = ahead.map(|kib| mounted.set_read_ahead(kib)) {
                tracing::debug!(image = %image.display(), %error, "an image reads ahead no further than the kernel has it");
            }
            Ok(mounted)
        }
        Way::Loop => {
            let device = LoopDevice::open(&File::open(&image)?, &image)?;
            DetachedErofs::mount(device.path(), ErofsIo::Default)
        }
    }
}

fn image_of(entry: &mountinfo::MountEntry) -> io::Result<Option<PathBuf>> {
    let source = Path::new(&entry.source);
    match loopdev::backing_file(source)? {
        Some(image) => Ok(Some(image)),
        None if source.starts_with("/dev") || source.is_relative() => Ok(None),
        None => Ok(Some(source.to_owned())),
    }
}

fn explain(image: &Path, source: io::Error) -> AttachError {
    match source.kind() {
        io::ErrorKind::NotFound => AttachError::Missing(image.to_owned()),
        _ => AttachError::Refused { image: image.to_owned(), source },
    }
}
