//! A layer's files written into a directory, as containerd's own applier writes them: for layers of which no image can be
//! made, and for snapshots that are not layers.
//!
//! **What.** [`extract()`] applies a layer's entries to an overlay's upperdir ([`Whiteouts::Overlay`]) or to a plain
//! directory ([`Whiteouts::Remove`]), which may hold files already. The result is what [`super::build()`] would show, and
//! what containerd's applier would have made (`pkg/archive/tar.go`, `tar_unix.go`, `tar_opts_linux.go`, 2.4). [`unpack()`] writes out
//! a layer image, for snapshots that are volumes.
//!
//! **Where.** `stream` and `tar` read the layer; `follow` says which directory a path means, [`crate::sys::beneath`] does
//! what is asked for in it.
//!
//! **Words.** As in [`super`]: *implied*, *whiteout*, *opaque*, *below*.
//!
//! **Invariants.**
//! * **X1** Nothing outside the directory is made, changed, removed or asked about, whatever the layer's symlinks say. Every
//!   name is used in an open directory that was reached without symlinks and is below the one given.
//! * **X2** A file has all of its attributes, or the extraction has failed. Directories get their times at the very end.
//! * **X3** Memory: what `stream` takes, and about 100 bytes and the path of each directory of the layer (at most
//!   [`Limits::metadata`]); to apply whiteouts ([`Whiteouts::Remove`]), 16 bytes for each entry (at most
//!   [`Limits::entries`] of them).
//!
//! **When it fails.** What was written so far stays; the caller throws the directory away, or applies the layer again.

mod unpack;
mod write;

use std::io::Read;
use std::path::Path;

use super::limits::Limits;
use super::{Below, ImageError, Source, stream};
use crate::oci::DiffId;
use crate::sys::tree;
pub use unpack::unpack;
use write::Extraction;

/// What becomes of whiteouts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whiteouts {
    /// The directory is an overlay's upperdir: they become character devices 0:0 and `trusted.overlay.opaque`.
    Overlay,
    /// The directory is all there is: what they name is removed from it.
    Remove,
}

/// Whether the files survive a power cut once [`extract()`] returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// All of the file system that holds the directory is written out (syncfs(2)).
    Synced,
    /// The caller sees to it.
    Unsynced,
}

/// How a layer is extracted.
#[derive(Clone, Copy)]
pub struct Extract<'a> {
    /// What becomes of whiteouts.
    pub whiteouts: Whiteouts,
    /// Where implied directories get their attributes.
    pub below: &'a dyn Below,
    /// What a layer may have at most.
    pub limits: &'a Limits,
    /// Whether the files survive a power cut.
    pub durability: Durability,
}

impl std::fmt::Debug for Extract<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Extract").field("whiteouts", &self.whiteouts).finish_non_exhaustive()
    }
}

/// What is known of an extracted layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extracted {
    /// The digest of its tar, which the caller compares with what the image's configuration says.
    pub diff_id: DiffId,
    /// Length of the tar in bytes.
    pub tar_size: u64,
}

/// Writes the files of a layer into `dir`, which must be a directory and not a symlink to one.
///
/// Root is needed to give files their owners and to make devices; in a user namespace devices are left out, as containerd
/// does. `cancelled` is asked every 256 KiB of the layer and while something is removed.
pub fn extract(
    source: Source<impl Read + Send>,
    dir: &Path,
    how: &Extract<'_>,
    cancelled: &(dyn Fn() -> bool + Sync),
) -> Result<Extracted, ImageError> {
    let consume = |reader: &mut super::tar::Reader<'_>| {
        let mut extraction = Extraction::begin(dir, how, cancelled)?;
        while let Some(entry) = reader.next_entry()? {
            extraction.apply(&entry, reader)?;
        }
        extraction.finish()
    };
    let ((), plain) = stream::read(source.blob, source.compression, how.limits, cancelled, consume)?;
    if how.durability == Durability::Synced {
        tree::sync_file_system(dir).map_err(|source| write::at(b"", source))?;
    }
    Ok(Extracted { diff_id: plain.diff_id, tar_size: plain.size })
}
