//! What can be wrong with a layer.

use std::io;

use super::limits::Limit;

/// Why a layer did not become an image (or files).
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Not a layer, or one in a form that nobody here can read.
    #[error(
        "media type {media_type:?} is not one of a layer that can be unpacked (tar, tar+gzip or tar+zstd)"
    )]
    UnknownMediaType {
        /// As the descriptor has it.
        media_type: String,
    },
    /// An encrypted layer: its keys are not given to snapshotters.
    #[error("media type {media_type:?} is encrypted; let containerd decrypt it with a stream processor")]
    Encrypted {
        /// As the descriptor has it.
        media_type: String,
    },
    /// The compressed stream is damaged or ends too early.
    #[error("the layer's compressed data is damaged: {0}")]
    Compressed(#[source] io::Error),
    /// The tar is damaged, ends too early, or is none.
    #[error("the layer is not a proper tar: {fault} (near byte {at} of the uncompressed layer)")]
    Tar {
        /// Bytes read so far.
        at: u64,
        /// What is wrong.
        fault: TarFault,
    },
    /// An entry that cannot be applied, for containerd's own applier neither.
    #[error("the layer's entry {path:?} is refused: {fault}")]
    Entry {
        /// The entry's name, cleaned; shortened where it is very long.
        path: String,
        /// What is wrong.
        fault: EntryFault,
    },
    /// More of something than is allowed.
    #[error("the layer has more than {allowed} {limit}")]
    Limit {
        /// What there is too much of.
        limit: Limit,
        /// What is allowed.
        allowed: u64,
    },
    /// Proper, but a layer image cannot hold it.
    #[error("a layer image cannot hold the layer's entry {path:?}: {reason}")]
    Unrepresentable {
        /// The entry's name.
        path: String,
        /// Why.
        reason: Unrepresentable,
    },
    /// The blob could not be read.
    #[error("reading the layer's blob: {0}")]
    Read(#[source] io::Error),
    /// The image could not be written; a full disk shows here.
    #[error("writing the layer image: {0}")]
    Write(#[source] io::Error),
    /// A file of the layer could not be written, or a name be looked up; a full disk shows here.
    #[error("extracting {path:?}: {source}")]
    Extract {
        /// What it is about, from the directory's root.
        path: String,
        /// The system's answer.
        source: io::Error,
    },
    /// The layers below could not say what a directory is like.
    #[error("reading the attributes of {path:?} in the layers below: {source}")]
    Below {
        /// The directory, from the layer's root.
        path: String,
        /// What reading said.
        source: io::Error,
    },
    /// The caller did not want it any more.
    #[error("cancelled")]
    Cancelled,
}

/// What is wrong with a tar.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TarFault {
    /// The header's checksum is wrong: no tar, or a damaged one.
    #[error("a header with a wrong checksum")]
    Checksum,
    /// A number in a header is none or too large.
    #[error("a header with a malformed number")]
    Number,
    /// A zero block in the middle.
    #[error("a single block of zeros between entries")]
    ZeroBlock,
    /// The stream ends within an entry.
    #[error("it ends in the middle of an entry")]
    Truncated,
    /// A record of a PAX header is malformed.
    #[error("a malformed PAX header")]
    Pax,
    /// The map of a sparse file is malformed or contradicts the data.
    #[error("a malformed map of a sparse file")]
    Sparse,
}

/// What is wrong with an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EntryFault {
    /// Its type is none of a layer's.
    #[error("entries of type {0:?} are not supported")]
    Type(char),
    /// The path leads out of the layer.
    #[error("it leads out of the layer with `..`")]
    Escapes,
    /// A NUL in a path.
    #[error("a path with a NUL byte")]
    Nul,
    /// A name is longer than a file system can hold.
    #[error("a name of more than 255 bytes")]
    NameTooLong,
    /// A symlink points nowhere, or farther than a path can.
    #[error("a symlink's target must have 1 to 4095 bytes")]
    SymlinkTarget,
    /// Symlinks that never end.
    #[error("too many symlinks on the way")]
    SymlinkLoop,
    /// Something on the path is not a directory.
    #[error("something on its path is not a directory")]
    NotADirectory,
    /// A hard link to what the layer does not hold.
    #[error("the file that it links to is not in the layer before it")]
    LinkTargetMissing,
    /// A hard link to a directory.
    #[error("a hard link to a directory")]
    LinkToDirectory,
    /// A whiteout that names nothing, or the directory itself, or the one above.
    #[error("a whiteout without a proper name")]
    WhiteoutName,
    /// A whiteout where the layer itself put something.
    #[error("a whiteout of something that the same layer holds")]
    WhiteoutOccupied,
    /// Major or minor number out of range.
    #[error("a device number out of range")]
    DeviceNumber,
    /// An xattr that no file system accepts.
    #[error("a malformed extended attribute")]
    Xattr,
    /// A directory whose time is set last is not there any more.
    #[error("a later entry put something else into the place of this directory")]
    DirectoryGone,
}

/// Why an image cannot hold an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unrepresentable {
    /// Access control lists, which change with the mode.
    #[error("it has a POSIX access control list")]
    Acl,
    /// A value of 65,536 bytes.
    #[error("an extended attribute's value is longer than 65,535 bytes")]
    XattrValue,
    /// A symlink whose target fills a block, with xattrs.
    #[error("a long symlink with extended attributes")]
    Symlink,
}

impl ImageError {
    /// Whether writing the layer's files into a directory may succeed where making an image did not: the layer is proper,
    /// only more than an image holds.
    pub fn is_limit_of_images(&self) -> bool {
        match self {
            ImageError::Unrepresentable { .. } => true,
            ImageError::Limit { limit, .. } => limit.is_of_images(),
            ImageError::UnknownMediaType { .. }
            | ImageError::Encrypted { .. }
            | ImageError::Compressed(_)
            | ImageError::Tar { .. }
            | ImageError::Entry { .. }
            | ImageError::Read(_)
            | ImageError::Write(_)
            | ImageError::Extract { .. }
            | ImageError::Below { .. }
            | ImageError::Cancelled => false,
        }
    }

    /// What the stream's end of a pipeline of readers said: ours where it is one of ours.
    pub(super) fn of_stream(error: io::Error) -> ImageError {
        match error.downcast::<ImageError>() {
            Ok(ours) => ours,
            Err(error) => ImageError::Read(error),
        }
    }

    pub(super) fn entry(path: &[u8], fault: EntryFault) -> ImageError {
        ImageError::Entry { path: shown(path), fault }
    }

    pub(super) fn limit(limit: Limit, allowed: u64) -> ImageError {
        ImageError::Limit { limit, allowed }
    }
}

/// A path for people; a hostile one does not fill the log.
pub(super) fn shown(path: &[u8]) -> String {
    const LONGEST: usize = 256;
    match path.get(..LONGEST) {
        Some(start) => format!("{}…", String::from_utf8_lossy(start)),
        None => String::from_utf8_lossy(path).into_owned(),
    }
}
