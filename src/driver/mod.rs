//! Storage drivers: where the bytes of snapshots live.
//!
//! **Where.** Called by `snapshot` only; calls `sys`. Blocking: the caller puts calls on a blocking thread.
//!
//! **Words.** An [`Id`] names one snapshot's storage for its whole life; [`Access`] says whether it is written to;
//! [`Mount`] is what containerd is told to mount.
//!
//! [`Storage`] says how a snapshot and what is below it hang together.
//!
//! **Invariants.** A driver knows no key, label, digest or layer, and keeps no record: everything it needs is in its
//! arguments and on its storage.
//! * **D1** `mounts` depends only on its arguments and the configuration.
//! * **D3** no recursive delete crosses a mount point (`sys::tree`).
//!
//! **When it fails.** `create` and `remove` can be called again after a crash at any point and come to the same end;
//! what a crash leaves is found by `inventory` and removed by reconcile.

use std::io;
use std::path::{Path, PathBuf};

pub mod memory;
pub mod overlay;
pub mod probe;
#[cfg(feature = "devicemapper")]
pub mod thin;

pub use crate::sys::tree::Cancelled;

/// A snapshot's storage: `serial` is never reused, `slot` is the smallest number free when the Id was made (device
/// ids of thin pools have 24 bits).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id {
    /// Grows by one for each Id; directory and device names derive from it.
    pub serial: u64,
    /// Small and reusable.
    pub slot: u32,
}

/// Whether a snapshot is written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// An active snapshot.
    ReadWrite,
    /// A view.
    ReadOnly,
}

/// User and group of a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// User id on the host.
    pub uid: u32,
    /// Group id on the host.
    pub gid: u32,
}

/// The id mapping of a user-namespace container: the ranges as containerd's mounter takes them, and where the
/// container's root lands on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdMapping {
    /// `container:host:size[,...]` for users.
    pub uids: String,
    /// The same for groups.
    pub gids: String,
    /// The host ids of the container's root.
    pub root: Owner,
}

/// How a snapshot and what is below it hang together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// Each snapshot is a directory with its own changes; it is mounted together with all below it.
    Directories,
    /// Each snapshot is a block device with everything below it in it, whose blocks are shared.
    Volumes,
}

/// What a snapshot's storage is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Creation {
    /// The snapshot.
    pub id: Id,
    /// What it stands on.
    pub parent: Option<Id>,
    /// How it will be used.
    pub access: Access,
    /// Who its root directory belongs to, if not to the owner of the parent's.
    pub root: Option<Owner>,
}

impl Creation {
    /// A snapshot that is written to.
    pub fn active(id: Id, parent: Option<Id>) -> Creation {
        Creation { id, parent, access: Access::ReadWrite, root: None }
    }
}

/// Every Id found on storage, by what the storage knows of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Inventory {
    /// The serials.
    Serials(Vec<u64>),
    /// The slots.
    Slots(Vec<u32>),
}

/// What the records say at a start, for a driver to compare with what it finds.
#[derive(Debug, Default)]
pub struct Known {
    /// Every Id that is recorded.
    pub ids: Vec<Id>,
    /// The largest serial that a snapshot has.
    pub newest: u64,
    /// The largest serial ever given out; 0 in new records.
    pub last_serial: u64,
}

/// What `mounts` is asked for: one snapshot and all below it, nearest first.
#[derive(Debug, Clone)]
pub struct MountRequest<'a> {
    /// The snapshot.
    pub id: Id,
    /// Its ancestors, parent first.
    pub parents: &'a [Id],
    /// How it is used.
    pub access: Access,
    /// Id mapping, where the client asked for one.
    pub mapping: Option<&'a IdMapping>,
    /// What is going to happen with it.
    pub purpose: Purpose,
    /// How many bytes the container may see, where somebody asked for a number.
    pub size: Option<u64>,
}

/// What the mounts are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Run on it, or extract a layer on top of its parents.
    Ordinary,
    /// Extract a layer whose parent is only told at Commit (containerd's parallel unpack): the applier must keep
    /// whiteouts although nothing is below.
    DetachedLayer,
}

/// A mount as containerd's API has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// File system type, or `bind`.
    pub kind: String,
    /// Device, directory or a plain word, by type.
    pub source: String,
    /// Options, joined by commas for mount(2).
    pub options: Vec<String>,
}

/// What a snapshot's own storage takes, without its parents.
pub use crate::sys::tree::Measure;

/// What a driver can fail with.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// No room: bytes, inodes or quota.
    #[error("no space left under {path}")]
    Full {
        /// Where.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Storage that should be there is not.
    #[error("storage of snapshot is missing: {0}")]
    Missing(PathBuf),
    /// In use; to be tried again.
    #[error("busy: {0}")]
    Busy(String),
    /// What was asked for cannot be.
    #[error("{0}")]
    Invalid(String),
    /// Where the storage of this Id would be is something else, which was not touched: the Id is of no use, and nothing of it is to
    /// be freed.
    #[error("{0}")]
    Taken(String),
    /// The caller asked to stop.
    #[error("stopped before the end")]
    Cancelled,
    /// The kernel or the file system cannot carry this driver.
    #[error("{0}")]
    Unsupported(String),
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

impl DriverError {
    /// Gives an I/O error its meaning.
    pub fn at(path: &Path, source: io::Error) -> DriverError {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                DriverError::Full { path: path.to_owned(), source }
            }
            _ => DriverError::Io { path: path.to_owned(), source },
        }
    }
}

/// How a pool is that snapshots have their blocks from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolHealth {
    /// What is free for data, in percent.
    pub data_free: u64,
    /// What is free for its metadata, in percent.
    pub metadata_free: u64,
    /// What is wrong with it, and the way out.
    pub trouble: Option<String>,
}

/// A storage driver. Implementations pass `tests/it/suite/driver.rs`.
pub trait Driver: Send + Sync + std::fmt::Debug {
    /// How snapshots hang together.
    fn storage(&self) -> Storage {
        Storage::Directories
    }

    /// Before anything else of a process: makes good what an earlier one left half-done, and compares. What cannot be made good
    /// is an error that says what to do.
    fn recover(&self, _known: &Known) -> Result<(), DriverError> {
        Ok(())
    }

    /// Makes empty storage for `id`, durably, ahead of its use. Calling it again is harmless.
    fn reserve(&self, ids: &[Id]) -> Result<(), DriverError>;

    /// Turns reserved storage into a snapshot: its root gets mode 0755 and the owner asked for, or else the parent's.
    fn create(&self, new: &Creation) -> Result<(), DriverError>;

    /// What to mount. Touches nothing (**D1**).
    fn mounts(&self, request: &MountRequest<'_>) -> Vec<Mount>;

    /// Makes what `mounts` answers to the same request usable, whatever has happened since it was last called; called before the
    /// answer is given where the storage is [`Storage::Volumes`].
    fn activate(&self, _request: &MountRequest<'_>) -> Result<(), DriverError> {
        Ok(())
    }

    /// The serial of the writable snapshot whose volume this is a mount of. Touches nothing.
    fn volume_of(&self, _mount: &Mount) -> Option<u64> {
        None
    }

    /// Writes the content of a whole layer: `write` is given the directory that is the layer's root, and what it wrote
    /// is durable when this returns.
    fn fill(&self, id: Id, write: &mut dyn FnMut(&Path) -> io::Result<()>) -> Result<(), DriverError>;

    /// Measures `id` without its parents. May be slow.
    fn usage(&self, id: Id, cancelled: Cancelled<'_>) -> Result<Measure, DriverError>;

    /// Lets go of what only a snapshot that is written to needs; nobody writes to this one any more.
    fn seal(&self, _id: Id) -> Result<(), DriverError> {
        Ok(())
    }

    /// An error if somebody uses the storage of `id`, so that it cannot be removed now; asked where the storage is
    /// [`Storage::Volumes`].
    fn require_unused(&self, _id: Id) -> Result<(), DriverError> {
        Ok(())
    }

    /// Frees the storage of `id`; succeeds when nothing is there.
    fn remove(&self, id: Id, cancelled: Cancelled<'_>) -> Result<(), DriverError>;

    /// Every Id found on storage, recorded or not.
    fn inventory(&self) -> Result<Inventory, DriverError>;

    /// Whether the storage of an Id that no snapshot has holds nothing worth keeping: nothing at all, or a layer that was still
    /// being written.
    fn is_unused(&self, id: Id) -> Result<bool, DriverError>;

    /// Now and then: takes over what has changed around the storage.
    fn tend(&self) -> Result<(), DriverError> {
        Ok(())
    }

    /// How its pool is, where it has one. May wait for the kernel.
    fn pool(&self) -> Option<PoolHealth> {
        None
    }

    /// Where a writable snapshot's changes are kept on this host, if that is a directory.
    fn upperdir(&self, id: Id) -> Option<PathBuf>;
}
