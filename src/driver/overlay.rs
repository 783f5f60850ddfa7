//! The overlayfs driver: one short directory per snapshot under one parent.
//!
//! ```text
//! <root>/l/<serial>/fs     upperdir, later a lowerdir of its children; mode 0755, owner as the parent's
//! <root>/l/<serial>/work   overlayfs's workdir; mode 0711
//! <root>/l/<serial>/filling  while a remote layer's content is being written
//! ```
//!
//! All lowerdirs lie under one parent and have short names: the options of an overlay mount must fit one page, which
//! containerd makes so by changing into the lowerdirs' common parent, and id-mapped mounts are made of that parent. 128
//! layers take about 1.2 KiB.
//!
//! The mounts are those of containerd's own overlayfs snapshotter, option for option: that shape is what the applier,
//! the differ, the shim and BuildKit take apart again.

use std::collections::HashSet;
use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::{
    Access, Cancelled, Creation, Driver, DriverError, Id, Inventory, Measure, Mount, MountRequest, Owner,
    Purpose,
};
use crate::sys::decimal;
use crate::sys::tree::{self, TreeError};

/// The options of every overlay mount beside its directories.
#[derive(Debug, Clone, Default)]
pub struct OverlayOptions {
    /// From the configuration and the probe, in this order (`volatile`, `userxattr`, `index=off`, ...).
    pub mount_options: Vec<String>,
}

/// See the module's page.
#[derive(Debug)]
pub struct Overlay {
    layers: PathBuf,
    mount_options: Vec<String>,
}

impl Overlay {
    /// Opens the storage below `root`, making `l` if needed. It is 0700: layers hold setuid files of
    /// strangers, which no local user may reach by path.
    pub fn open(root: &Path, options: OverlayOptions) -> Result<Overlay, DriverError> {
        let overlay = Overlay::at(root, options);
        make_dir(&overlay.layers, 0o700)?;
        Ok(overlay)
    }

    /// The storage below `root` as it is; nothing is made.
    pub fn at(root: &Path, options: OverlayOptions) -> Overlay {
        Overlay { layers: root.join("l"), mount_options: options.mount_options }
    }

    fn dir(&self, serial: u64) -> PathBuf {
        self.layers.join(serial.to_string())
    }

    fn upper(&self, id: Id) -> PathBuf {
        self.dir(id.serial).join("fs")
    }

    /// There while a layer's content is being written: what lies in `fs` then is half a layer.
    fn filling(&self, id: Id) -> PathBuf {
        self.dir(id.serial).join("filling")
    }

    /// Whether the directory of `id` holds anything that `reserve` and `fill` do not make beside `fs`.
    fn has_strangers(&self, id: Id) -> bool {
        let ours = |name: &std::ffi::OsStr| name == "work" || name == "filling";
        let mut entries = std::fs::read_dir(self.dir(id.serial)).into_iter().flatten().flatten();
        entries.any(|entry| !ours(&entry.file_name()))
    }

    fn work(&self, id: Id) -> PathBuf {
        self.dir(id.serial).join("work")
    }

    /// A layer without parents is its own root file system; a view of one layer is that layer.
    fn bind(source: &Path, access: Access, mut options: Vec<String>) -> Vec<Mount> {
        let access = match access {
            Access::ReadWrite => "rw",
            Access::ReadOnly => "ro",
        };
        options.extend([access.to_owned(), "rbind".to_owned()]);
        vec![Mount { kind: "bind".into(), source: source.display().to_string(), options }]
    }

    fn overlay(options: Vec<String>) -> Vec<Mount> {
        vec![Mount { kind: "overlay".into(), source: "overlay".into(), options }]
    }
}

impl Driver for Overlay {
    fn reserve(&self, ids: &[Id]) -> Result<(), DriverError> {
        for id in ids {
            make_dir(&self.dir(id.serial), 0o700)?;
            make_dir(&self.upper(*id), 0o755)?;
            make_dir(&self.work(*id), 0o711)?;
        }
        // A record must never outlive its directories through a power cut, so the directories go first. One call for all:
        // ext4 and xfs write their journal in order, and btrfs logs the new directories below the one it is asked for.
        sync_dir(&self.layers)
    }

    fn create(&self, new: &Creation) -> Result<(), DriverError> {
        let Creation { id, parent, root, .. } = *new;
        let upper = self.upper(id);
        let owner = match (root, parent) {
            (Some(owner), _) => owner,
            (None, Some(parent)) => {
                let below = self.upper(parent);
                let found = std::fs::metadata(&below).map_err(|error| missing_or(&below, error))?;
                Owner { uid: found.uid(), gid: found.gid() }
            }
            (None, None) => return Ok(()),
        };
        let found = std::fs::metadata(&upper).map_err(|error| missing_or(&upper, error))?;
        if (found.uid(), found.gid()) == (owner.uid, owner.gid) {
            return Ok(());
        }
        std::os::unix::fs::lchown(&upper, Some(owner.uid), Some(owner.gid))
            .map_err(|error| DriverError::at(&upper, error))?;
        // The record that follows overwrites its log in place, which does not carry the new owner to the disk.
        sync_dir(&upper)
    }

    fn mounts(&self, request: &MountRequest<'_>) -> Vec<Mount> {
        let mut options = Vec::with_capacity(6 + self.mount_options.len());
        if let Some(mapping) = request.mapping {
            options.push(format!("uidmap={}", mapping.uids));
            options.push(format!("gidmap={}", mapping.gids));
        }
        let id = request.id;
        match (request.access, request.parents) {
            (Access::ReadWrite, []) if request.purpose == Purpose::DetachedLayer => {
                options.push(format!("upperdir={}", self.upper(id).display()));
                return Overlay::overlay(options);
            }
            (access, []) => return Overlay::bind(&self.upper(id), access, options),
            (Access::ReadOnly, [only]) => {
                return Overlay::bind(&self.upper(*only), Access::ReadOnly, options);
            }
            (Access::ReadWrite, _) => {
                options.push(format!("workdir={}", self.work(id).display()));
                options.push(format!("upperdir={}", self.upper(id).display()));
            }
            (Access::ReadOnly, _) => {}
        }
        let mut lowerdirs = String::from("lowerdir=");
        for (n, parent) in request.parents.iter().enumerate() {
            if n > 0 {
                lowerdirs.push(':');
            }
            lowerdirs.push_str(&self.upper(*parent).to_string_lossy());
        }
        options.push(lowerdirs);
        options.extend(self.mount_options.iter().cloned());
        Overlay::overlay(options)
    }

    fn fill(&self, id: Id, write: &mut dyn FnMut(&Path) -> io::Result<()>) -> Result<(), DriverError> {
        let (upper, filling) = (self.upper(id), self.filling(id));
        std::fs::File::create(&filling).map_err(|error| missing_or(&filling, error))?;
        write(&upper).map_err(|error| DriverError::at(&upper, error))?;
        tree::sync_file_system(&upper).map_err(|error| missing_or(&upper, error))?;
        std::fs::remove_file(&filling).map_err(|error| DriverError::at(&filling, error))
    }

    fn usage(&self, id: Id, cancelled: Cancelled<'_>) -> Result<Measure, DriverError> {
        tree::measure(&self.upper(id), cancelled).map_err(from_tree)
    }

    fn remove(&self, id: Id, cancelled: Cancelled<'_>) -> Result<(), DriverError> {
        tree::remove(&self.dir(id.serial), cancelled).map_err(from_tree)
    }

    fn inventory(&self) -> Result<Inventory, DriverError> {
        let mut serials = HashSet::new();
        let entries = match std::fs::read_dir(&self.layers) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Inventory::Serials(Vec::new()));
            }
            entries => entries.map_err(|error| DriverError::at(&self.layers, error))?,
        };
        for entry in entries {
            let name = entry.map_err(|error| DriverError::at(&self.layers, error))?.file_name();
            // Only names this driver could have given; anything else is somebody else's and stays.
            let serial = name.to_str().and_then(decimal::parse);
            match serial {
                Some(serial) => {
                    serials.insert(serial);
                }
                None => tracing::warn!(entry = ?name, "unknown entry in the layer directory; left alone"),
            }
        }
        Ok(Inventory::Serials(serials.into_iter().collect()))
    }

    fn is_unused(&self, id: Id) -> Result<bool, DriverError> {
        let upper = self.upper(id);
        match std::fs::read_dir(&upper) {
            Ok(mut entries) => Ok(entries.next().is_none() || self.filling(id).exists()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(!self.has_strangers(id)),
            Err(error) => Err(DriverError::at(&upper, error)),
        }
    }

    fn upperdir(&self, id: Id) -> Option<PathBuf> {
        Some(self.upper(id))
    }
}

fn make_dir(path: &Path, mode: u32) -> Result<(), DriverError> {
    match DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(DriverError::at(path, error)),
        Ok(()) => {}
    }
    // The process's umask may have taken bits away; a container's root must be 0755 whatever started us.
    let found = std::fs::metadata(path).map_err(|error| DriverError::at(path, error))?;
    if found.permissions().mode() & 0o7777 != mode {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
            .map_err(|error| DriverError::at(path, error))?;
    }
    Ok(())
}

fn sync_dir(path: &Path) -> Result<(), DriverError> {
    std::fs::File::open(path).and_then(|dir| dir.sync_all()).map_err(|error| DriverError::at(path, error))
}

fn missing_or(path: &Path, error: io::Error) -> DriverError {
    match error.kind() {
        io::ErrorKind::NotFound => DriverError::Missing(path.to_owned()),
        _ => DriverError::at(path, error),
    }
}

fn from_tree(error: TreeError) -> DriverError {
    match error {
        TreeError::MountPoint(_) => DriverError::Busy(error.to_string()),
        TreeError::Cancelled => DriverError::Cancelled,
        TreeError::Io { path, source } => missing_or(&path, source),
    }
}
