//! Storage drivers: where the bytes of snapshots live.
//!
//! **Where.** Called by `snapshot` only; calls `sys`. Blocking: the caller puts calls on a blocking thread.
//!
//! **Words.** An [`Id`] names one snapshot's storage for its whole life; [`Access`] says whether it is written to;
//! [`Mount`] is what containerd is told to mount.
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

/// A storage driver. Implementations pass `tests/it/suite/driver.rs`.
pub trait Driver: Send + Sync + std::fmt::Debug {
    /// Makes empty storage for `id`, durably, ahead of its use. Calling it again is harmless.
    fn reserve(&self, ids: &[Id]) -> Result<(), DriverError>;

    /// Turns reserved storage into a snapshot on top of `parent`: its root gets mode 0755 and the owner `root`, or
    /// else the parent's.
    fn create(&self, id: Id, parent: Option<Id>, root: Option<Owner>) -> Result<(), DriverError>;

    /// What to mount. Touches nothing (**D1**).
    fn mounts(&self, request: &MountRequest<'_>) -> Vec<Mount>;

    /// Writes the content of a whole layer: `write` is given the directory that is the layer's root, and what it wrote
    /// is durable when this returns.
    fn fill(&self, id: Id, write: &mut dyn FnMut(&Path) -> io::Result<()>) -> Result<(), DriverError>;

    /// Measures `id` without its parents. May be slow.
    fn usage(&self, id: Id, cancelled: Cancelled<'_>) -> Result<Measure, DriverError>;

    /// Frees the storage of `id`; succeeds when nothing is there.
    fn remove(&self, id: Id, cancelled: Cancelled<'_>) -> Result<(), DriverError>;

    /// The serial of every Id found on storage, known or not.
    fn inventory(&self) -> Result<Vec<u64>, DriverError>;

    /// Whether the storage of an Id that no snapshot has holds nothing worth keeping: nothing at all, or a layer that was still
    /// being written.
    fn is_unused(&self, id: Id) -> Result<bool, DriverError>;

    /// Where a writable snapshot's changes are kept on this host, if that is a directory.
    fn upperdir(&self, id: Id) -> Option<PathBuf>;
}
