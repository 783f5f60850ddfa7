//! The blobs of layers whose files were unpacked by another differ: found in containerd's content store by the label that
//! containerd puts on a blob it unpacked, and made into a layer image only to be published.
//!
//! Which blob made a chain is told by arithmetic: the chain ID below and the blob's diff ID give the chain ID, or it is another
//! blob. The diff ID itself is checked when the layer image is made.

use std::fs::File;
use std::path::PathBuf;

use tokio_util::sync::CancellationToken;

use super::SnapshotError;
use super::below::BelowSnapshot;
use super::metastore::PublishEntry;
use super::stock::blocking;
use crate::containerd::blob::Blobs;
use crate::containerd::content::{BlobInfo, LABEL_UNCOMPRESSED};
use crate::containerd::{Containerd, ContainerdError};
use crate::image::{self, Compression, Facts, ImageError, Limits, Source};
use crate::layer::{LayerError, LayerStore};
use crate::oci::{ChainId, DiffId, Digest};

/// The most blobs of a namespace that are looked at.
const MOST_BLOBS: usize = 100_000;
/// How long containerd keeps a blob for us.
const LEASE: std::time::Duration = std::time::Duration::from_secs(24 * 60 * 60);

/// Why there is no layer image of a blob.
#[derive(Debug, thiserror::Error)]
pub(super) enum BlobError {
    /// It is gone, and nobody will bring it back.
    #[error("its blob is not in containerd's content store any more")]
    Gone,
    /// It is not a layer that can be made into an image.
    #[error("no layer image can be made of its blob: {0}")]
    Unusable(#[source] ImageError),
    /// It cannot be read now.
    #[error("its blob cannot be read from containerd: {0}")]
    Unread(#[source] std::io::Error),
    /// Its snapshot was removed before it was published.
    #[error("its snapshot was removed before it was published")]
    Removed,
    /// containerd cannot be asked.
    #[error(transparent)]
    Containerd(#[from] ContainerdError),
    /// The layer image cannot be written.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// The daemon is going down.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
}

impl BlobError {
    /// Whether the blob's own bytes are the reason: encrypted, say, which is nothing that anybody can tell by looking at them.
    pub(super) fn is_of_its_bytes(&self) -> bool {
        use ImageError::{Compressed, Entry, Limit, Tar, Unrepresentable};
        let BlobError::Unusable(error) = self else { return false };
        matches!(error, Compressed(_) | Tar { .. } | Entry { .. } | Limit { .. } | Unrepresentable { .. })
    }

    /// Whether trying again is of no use.
    pub(super) fn is_final(&self) -> bool {
        matches!(self, BlobError::Gone | BlobError::Unusable(_) | BlobError::Removed)
    }
}

/// A layer image made from a blob; its file is removed when this is dropped.
#[derive(Debug)]
pub(super) struct Made {
    path: PathBuf,
    /// Its bytes.
    pub(super) file: File,
    /// What it is.
    pub(super) facts: Facts,
}

impl Drop for Made {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove a temporary layer image");
        }
    }
}

/// Keeps the blobs of a queued layer from being collected, as far as they are there already.
pub(super) async fn hold(blobs: &Blobs, entry: &PublishEntry) -> Result<(), BlobError> {
    let containerd = blobs.containerd(&entry.namespace).await?;
    let blob = find(&containerd, entry).await?;
    let lease = lease_of(&entry.chain);
    containerd.create_lease(&lease, LEASE).await?;
    Ok(containerd.lease_blob(&lease, &blob.digest).await?)
}

/// Lets go of them.
pub(super) async fn release(blobs: &Blobs, entry: &PublishEntry) -> Result<(), BlobError> {
    let containerd = blobs.containerd(&entry.namespace).await?;
    Ok(containerd.delete_lease(&lease_of(&entry.chain)).await?)
}

fn lease_of(chain: &ChainId) -> String {
    format!("speedy-publish-{}", &chain.0.as_str()["sha256:".len()..][..32])
}

async fn find(containerd: &Containerd, entry: &PublishEntry) -> Result<BlobInfo, BlobError> {
    let unpacked = containerd.blobs(&format!("labels.\"{LABEL_UNCOMPRESSED}\""), MOST_BLOBS).await?;
    let makes_the_chain = |blob: &BlobInfo| {
        let diff = blob.labels.get(LABEL_UNCOMPRESSED).and_then(|diff| Digest::parse(diff).ok());
        diff.is_some_and(|diff| ChainId::of(entry.below.as_ref(), &DiffId(diff)) == entry.chain)
    };
    unpacked.into_iter().find(makes_the_chain).ok_or(BlobError::Gone)
}

/// The layer image of a queued layer, in a temporary file of `store`.
pub(super) async fn image_of(
    blobs: &Blobs,
    entry: &PublishEntry,
    store: &LayerStore,
    (below, limits): (BelowSnapshot, Limits),
) -> Result<Made, BlobError> {
    let containerd = blobs.containerd(&entry.namespace).await?;
    let blob = find(&containerd, entry).await?;
    let open = blobs.opener(&entry.namespace, &blob.digest);
    let (path, file) = store.temporary()?;
    let cancel = CancellationToken::new();
    let _end = cancel.clone().drop_guard();
    let (chain_below, chain) = (entry.below.clone(), entry.chain.clone());
    blocking(move || {
        let source = open().map_err(|error| LayerError::at(&path, error));
        let made = source.map_err(BlobError::from).and_then(|source| {
            // The media type is not known: its first bytes tell.
            let source = Source { blob: source, compression: Compression::ByMagic };
            let built = image::build(source, &file, &below, &limits, &|| cancel.is_cancelled());
            built.map_err(|error| match error {
                ImageError::Write(error) => LayerError::at(&path, error).into(),
                ImageError::Read(error) => BlobError::Unread(error),
                error => BlobError::Unusable(error),
            })
        });
        let facts = match made {
            Ok(facts) => facts,
            Err(error) => {
                std::fs::remove_file(&path).map_err(|gone| LayerError::at(&path, gone))?;
                return Ok(Err(error));
            }
        };
        let made = Made { path, file, facts };
        let is_it = ChainId::of(chain_below.as_ref(), &made.facts.diff_id) == chain;
        Ok::<_, SnapshotError>(if is_it { Ok(made) } else { Err(BlobError::Gone) })
    })
    .await?
}
