//! Snapshots: what containerd asks for, kept truthfully.
//!
//! **What.** The domain of the project: keys, kinds, labels, the tree of parents, and the use cases over them. A file per
//! concern: [`snapshotter`] (the use cases), [`metastore`] (the records), [`filter`] (containerd's filter language),
//! [`remote`] (what labels ask for), [`mapping`] (id mappings), [`reconcile`] (records against storage).
//!
//! **Where.** Called by `service`; calls [`crate::driver`] for storage and [`crate::content`] for remote layers.
//!
//! **Words.** A snapshot has a *key* while it is active or a view and a *name* once committed; both live in one space and
//! are opaque text. [`Id`](crate::driver::Id) is our own stable number beneath it, never shown.
//!
//! **Invariants** (tests carry their names):
//! * **M1** Keys and names share one space; a snapshot has exactly one of them.
//! * **M2** Only a committed snapshot is a parent; a parent outlives its children.
//! * **M3** An `Id` never changes and its serial is never reused; commit renames, storage does not move.
//! * **M4** Nothing exists on storage whose `Id` was not recorded first; nothing is forgotten before storage is released.
//! * **M5** At most one committed snapshot answers for a (ref, parent).
//! * **M6** `List` shows exactly the snapshots containerd created or was told about.
//!
//! **When it fails.** An answered call is durable. A call that fails, is cancelled or dies with the process is wholly done or
//! not at all; what it may leave is storage of an Id that no snapshot has, which [`reconcile`] removes.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::driver::{DriverError, Mount};

pub mod apply;
mod below;
mod blob;
pub mod filter;
mod foresight;
mod hit;
pub mod layers;
mod locks;
pub mod mapping;
pub mod metastore;
mod names;
pub mod pins;
pub mod publish;
pub mod reconcile;
pub mod remote;
pub mod report;
mod schema;
pub mod snapshotter;
pub mod stock;
pub mod traces;

/// The longest key: containerd keeps keys in bolt, whose limit this is.
pub const MAX_KEY_BYTES: usize = 32 * 1024;
/// The longest label, key and value together: containerd's own limit (`pkg/labels`).
pub const MAX_LABEL_BYTES: usize = 4096;
/// All labels of one snapshot together, so that every answer fits containerd's 16 MiB message.
pub const MAX_LABELS_BYTES: usize = 12 * 1024 * 1024;

/// A key or name: opaque, never empty, never used as a file name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(Arc<str>);

impl Key {
    /// Takes any text of 1 to [`MAX_KEY_BYTES`] bytes.
    pub fn new(text: &str) -> Result<Key, SnapshotError> {
        match text.len() {
            0 => Err(SnapshotError::InvalidKey { problem: "it is empty".into() }),
            1..=MAX_KEY_BYTES => Ok(Key(text.into())),
            n => Err(SnapshotError::InvalidKey {
                problem: format!("it has {n} bytes, more than the {MAX_KEY_BYTES} that are allowed"),
            }),
        }
    }

    /// An empty text means "no parent" in containerd's API.
    pub fn optional(text: &str) -> Result<Option<Key>, SnapshotError> {
        if text.is_empty() { Ok(None) } else { Key::new(text).map(Some) }
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Key {
    /// Escaped and shortened: for messages and logs, where a hostile key must not forge lines.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown: String = self.0.chars().take(200).flat_map(char::escape_debug).collect();
        f.write_str(&shown)?;
        if self.0.len() > shown.len() { f.write_str("...") } else { Ok(()) }
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

/// What a snapshot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Read-only, on top of a parent or empty; never committed.
    View,
    /// Being written.
    Active,
    /// Finished: the only kind that can be a parent.
    Committed,
}

impl Kind {
    /// containerd's word, as in filters.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::View => "view",
            Kind::Active => "active",
            Kind::Committed => "committed",
        }
    }
}

/// Nanoseconds since 1970, UTC; good until 2262.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp(pub i64);

impl Timestamp {
    /// The clock, as given to the daemon's parts.
    pub fn now() -> Timestamp {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Timestamp(i64::try_from(since.as_nanos()).unwrap_or(i64::MAX))
    }
}

/// Labels as containerd gives them: stored as they are, sorted.
pub type Labels = BTreeMap<String, String>;

/// Checks labels against containerd's own limit and against what a message can carry.
pub fn check_labels(labels: &Labels) -> Result<(), SnapshotError> {
    let mut total = 0;
    for (key, value) in labels {
        let bytes = key.len() + value.len();
        total += bytes + 16;
        if bytes > MAX_LABEL_BYTES {
            let shown: String = key.chars().take(64).flat_map(char::escape_debug).collect();
            return Err(SnapshotError::InvalidLabels {
                problem: format!(
                    "key and value of \"{shown}\" have {bytes} bytes, more than the {MAX_LABEL_BYTES} that are allowed"
                ),
            });
        }
    }
    if total > MAX_LABELS_BYTES {
        return Err(SnapshotError::InvalidLabels {
            problem: format!(
                "together they have {total} bytes, more than the {MAX_LABELS_BYTES} that are allowed"
            ),
        });
    }
    Ok(())
}

/// What is known of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// Key or name.
    pub name: Key,
    /// The committed snapshot below.
    pub parent: Option<Key>,
    /// What it is.
    pub kind: Kind,
    /// When it was prepared, or committed.
    pub created: Timestamp,
    /// When its labels last changed.
    pub updated: Timestamp,
    /// Its labels.
    pub labels: Labels,
}

impl filter::Subject for Info {
    fn field(&self, path: &[String]) -> Option<Cow<'_, str>> {
        // As containerd's own: what follows a plain field is not looked at.
        let (field, rest) = path.split_first()?;
        match field.as_str() {
            "name" => Some(self.name.as_str().into()),
            "parent" => Some(self.parent.as_ref().map_or("", Key::as_str).into()),
            "kind" => Some(self.kind.as_str().into()),
            "labels" => self.labels.get(&rest.join(".")).map(Into::into),
            _ => None,
        }
    }
}

/// What a snapshot takes, without its parents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Allocated bytes.
    pub bytes: u64,
    /// Inodes.
    pub inodes: u64,
}

/// What Prepare came to. A hit is not an error inside the house.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prepared {
    /// An active snapshot, to be mounted so.
    Mounts(Vec<Mount>),
    /// The layer is already here as a committed snapshot of this name; nothing is to be fetched.
    AlreadyCommitted(Key),
}

/// How labels are to change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LabelUpdate {
    /// These and no others.
    Replace(Labels),
    /// Only the named ones: set, or deleted where there is no value.
    Merge(BTreeMap<String, Option<String>>),
}

/// What can go wrong, as a caller can act on it. `service::status` gives each its gRPC code.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// No snapshot of this key or name.
    #[error("snapshot {key} does not exist")]
    NotFound {
        /// Asked for.
        key: Key,
    },
    /// The parent does not exist.
    #[error("parent snapshot {parent} does not exist")]
    ParentNotFound {
        /// Asked for.
        parent: Key,
    },
    /// The key or name is taken.
    #[error("snapshot {key} already exists")]
    AlreadyExists {
        /// Taken.
        key: Key,
    },
    /// The parent given to Prepare or View is not committed.
    #[error("parent {parent} is not a committed snapshot")]
    ParentNotCommitted {
        /// Asked for.
        parent: Key,
    },
    /// The parent given to Commit is not committed.
    #[error("cannot commit on {parent}: it is not a committed snapshot")]
    RebaseOntoUncommitted {
        /// Asked for.
        parent: Key,
    },
    /// The driver cannot give a snapshot a parent at Commit.
    #[error(
        "snapshot {key} cannot be put on {parent}: a thin volume has its parent from the beginning; do not give the capability \
         rebase to this snapshotter"
    )]
    CannotRebase {
        /// The active snapshot.
        key: Key,
        /// Asked for.
        parent: Key,
    },
    /// Commit names another parent than the snapshot has.
    #[error("snapshot {key} already has another parent, {parent}")]
    ParentMismatch {
        /// The active snapshot.
        key: Key,
        /// What it stands on.
        parent: Key,
    },
    /// The snapshot is not active.
    #[error("snapshot {key} is not active")]
    NotActive {
        /// Asked for.
        key: Key,
    },
    /// Mounts of a committed snapshot.
    #[error("snapshot {key} is committed: only active snapshots and views can be mounted")]
    NotMountable {
        /// Asked for.
        key: Key,
    },
    /// Something stands on it.
    #[error("cannot remove snapshot {key}: it has children")]
    HasChildren {
        /// Asked for.
        key: Key,
    },
    /// Not usable as a key.
    #[error("invalid key: {problem}")]
    InvalidKey {
        /// Why.
        problem: String,
    },
    /// Labels that cannot be kept.
    #[error("invalid labels: {problem}")]
    InvalidLabels {
        /// Why.
        problem: String,
    },
    /// An update of something that cannot be changed.
    #[error("cannot change {path:?} of a snapshot: only labels can be changed")]
    ImmutableField {
        /// The path of the mask.
        path: String,
    },
    /// Not containerd's filter language.
    #[error(transparent)]
    Filter(#[from] filter::FilterError),
    /// Labels that ask for an id mapping which is none.
    #[error(transparent)]
    Mapping(#[from] mapping::MappingError),
    /// The storage driver failed.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// The records could not be read or written.
    #[error(transparent)]
    Meta(#[from] metastore::MetaError),
    /// A layer image was removed while it was being put to use.
    #[error("layer image {serial} was removed meanwhile; try again")]
    LayerGone {
        /// Its serial.
        serial: u64,
    },
    /// The data of a layer cannot be had now.
    #[error("layer {layer} is unavailable, its data cannot be fetched: {problem}")]
    LayerUnavailable {
        /// Its diff ID.
        layer: String,
        /// Which chunk, and why.
        problem: String,
    },
    /// Layer images of this node.
    #[error(transparent)]
    Layer(#[from] crate::layer::LayerError),
    /// A layer cannot be applied.
    #[error(transparent)]
    Apply(#[from] apply::ApplyError),
    /// The daemon is going down.
    #[error("speedy is shutting down")]
    ShuttingDown,
}

impl From<tokio::task::JoinError> for SnapshotError {
    fn from(_: tokio::task::JoinError) -> SnapshotError {
        SnapshotError::ShuttingDown
    }
}
