//! Applying a layer: the blob that containerd fetched becomes the content of an active snapshot.
//!
//! **What.** Of a layer for an image that is being unpacked, a layer image is made and recorded as the snapshot's content; for
//! every other active snapshot (a container's own being restored, say), and where no layer image can be made, the layer's files
//! are written into its directory, as containerd's own differ does it.
//!
//! **Where.** Called by `service`; calls [`crate::image`] to read the blob and `layers` for files and records.
//!
//! **Invariants.** Nothing is answered that is not durable, so that Commit stays one small transaction. Mounts that are not this
//! daemon's are recognised without any I/O.
//!
//! **When it fails.** An unfinished layer image is a Pending Id's file, which is freed. Files that were written into a directory
//! before an error stay there, as with containerd's own differ; containerd removes the snapshot then.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::below::BelowSnapshot;
use super::layers::Layers;
use super::locks::KeyedLocks;
use super::metastore::{LayerChoice, LayerRecord, MetaStore, NewLayer, Origin, Progress, Record, Stack};
use super::remote::{EXTRACT, client_key};
use super::stock::blocking;
use super::{Kind, SnapshotError, Timestamp};
use crate::containerd::blob::OpenBlob;
use crate::driver::{Driver, Id, Mount, Storage};
use crate::image::extract::{self, Durability, Extract, Whiteouts};
use crate::image::{self, Compression, Facts, ImageError, Limits, Source};
use crate::layer::LayerError;
use crate::oci::{DiffId, Digest};

/// Why a layer cannot be applied.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The mounts are not those of an active snapshot of this daemon.
    #[error("these mounts are not of an active snapshot of speedy")]
    NotOurs,
    /// The blob is not named by a SHA-256 digest.
    #[error("the layer's digest is not sha256: and 64 hexadecimal digits")]
    NotADigest,
    /// The layer cannot be read, or is not one.
    #[error("layer {blob}: {source}")]
    Layer {
        /// The blob.
        blob: Digest,
        /// Why.
        #[source]
        source: ImageError,
    },
    /// The blob cannot be read.
    #[error("layer {blob} cannot be read from containerd: {source}")]
    Blob {
        /// The blob.
        blob: Digest,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
}

/// A layer to be applied.
pub struct ApplyRequest {
    /// The blob's digest.
    pub blob: Digest,
    /// Its media type.
    pub media_type: String,
    /// What the snapshot's mounts are, as this daemon answered them.
    pub mounts: Vec<Mount>,
    /// Opens the blob; called again for a second reading.
    pub open: OpenBlob,
}

impl std::fmt::Debug for ApplyRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ApplyRequest").field("blob", &self.blob).field("mounts", &self.mounts).finish()
    }
}

/// What was applied, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// The digest of the uncompressed tar.
    pub diff_id: DiffId,
    /// Its length in bytes.
    pub tar_size: u64,
    /// What the content became.
    pub how: How,
}

/// What an applied layer became.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum How {
    /// A layer image.
    Image,
    /// A layer image that this node had already.
    Known,
    /// Files in the snapshot's directory.
    Files,
}

impl How {
    /// The word for it in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            How::Image => "image",
            How::Known => "known",
            How::Files => "files",
        }
    }
}

/// Applies layers.
#[derive(Debug)]
pub struct Applier {
    meta: Arc<MetaStore>,
    driver: Arc<dyn Driver>,
    layers: Option<Arc<Layers>>,
    limits: Limits,
    points: PathBuf,
    locks: KeyedLocks<u64>,
}

impl Applier {
    /// For the snapshots below `root`; without `layers` every layer's files are written.
    pub fn new(
        meta: Arc<MetaStore>,
        driver: Arc<dyn Driver>,
        layers: Option<Arc<Layers>>,
        limits: Limits,
        root: &Path,
    ) -> Applier {
        Applier { meta, driver, layers, limits, points: root.join("l"), locks: KeyedLocks::default() }
    }

    /// Whether these are mounts of this daemon, without any I/O.
    pub fn is_ours(&self, mounts: &[Mount]) -> bool {
        self.serial_of(mounts).is_some()
    }

    /// Applies a layer to the active snapshot that has these mounts.
    pub async fn apply(&self, request: ApplyRequest) -> Result<Applied, SnapshotError> {
        let Some((serial, whiteouts)) = self.serial_of(&request.mounts) else {
            return Err(ApplyError::NotOurs.into());
        };
        let compression = Compression::of_media_type(&request.media_type)
            .map_err(|source| ApplyError::Layer { blob: request.blob.clone(), source })?;
        let lock = self.locks.of(serial);
        let _one_at_a_time = lock.lock().await;
        let record = self.meta.by_serial(serial).filter(|record| record.info.kind == Kind::Active);
        let Some(record) = record else { return Err(ApplyError::NotOurs.into()) };
        let Some((_, stack)) = self.meta.get_with_stack(&record.info.name) else {
            return Err(ApplyError::NotOurs.into());
        };
        let job = Job { request, compression, record, stack, whiteouts };
        if let Some(layers) = &self.layers
            && self.may_have_image(&job.record).await?
        {
            if let Some(known) = self.known(&job, layers) {
                return self.use_known(&job, &known).await;
            }
            match self.make_image(&job, layers).await {
                Err(SnapshotError::Apply(ApplyError::Layer { source, blob }))
                    if source.is_limit_of_images() =>
                {
                    tracing::warn!(%blob, %source, "no layer image can be made; its files are written instead");
                }
                Ok(None) => {}
                Ok(Some(made)) => return Ok(made),
                Err(error) => return Err(error),
            }
        }
        self.write_files(job).await
    }

    /// The active snapshot whose directory these mounts are of, and what whiteouts become there.
    fn serial_of(&self, mounts: &[Mount]) -> Option<(u64, Whiteouts)> {
        let [mount] = mounts else { return None };
        if let Some(serial) = self.driver.volume_of(mount) {
            return Some((serial, Whiteouts::Remove));
        }
        let (dir, whiteouts) = match mount.kind.as_str() {
            "bind" => (mount.source.as_str(), Whiteouts::Remove),
            "overlay" => {
                let dir = mount.options.iter().find_map(|option| option.strip_prefix("upperdir="))?;
                (dir, Whiteouts::Overlay)
            }
            _ => return None,
        };
        let name = Path::new(dir).strip_prefix(&self.points).ok()?.to_str()?.strip_suffix("/fs")?;
        let serial = crate::sys::decimal::parse(name)?;
        Some((serial, whiteouts))
    }

    /// Only an image's layer, only once, and only where nothing was written yet.
    async fn may_have_image(&self, record: &Record) -> Result<bool, SnapshotError> {
        if record.layer.is_some() || !client_key(record.info.name.as_str()).starts_with(EXTRACT) {
            return Ok(false);
        }
        let (driver, id) = (Arc::clone(&self.driver), record.id);
        blocking(move || driver.is_unused(id)).await
    }

    /// A layer image that was made from the same blob.
    fn known(&self, job: &Job, layers: &Layers) -> Option<Arc<LayerRecord>> {
        let known = self.meta.layer_of_blob(&job.request.blob)?;
        if layers.store.is_complete(known.id.serial) { Some(known) } else { None }
    }

    async fn use_known(&self, job: &Job, known: &LayerRecord) -> Result<Applied, SnapshotError> {
        let key = job.record.info.name.clone();
        let layer = self.meta.applied(key, LayerChoice::Known(known.id)).await?;
        let facts = &layer.facts;
        Ok(Applied { diff_id: facts.diff_id.clone(), tar_size: facts.tar_size, how: How::Known })
    }

    /// `None` if what is recorded of the layer is an image of another form.
    async fn make_image(&self, job: &Job, layers: &Arc<Layers>) -> Result<Option<Applied>, SnapshotError> {
        let ids = self.meta.reserve(1).await?;
        let Some(id) = ids.first().copied() else { return Err(SnapshotError::ShuttingDown) };
        let made = self.try_make_image(job, layers, id).await;
        let is_used = |made: &Option<(Applied, Arc<LayerRecord>)>| {
            made.as_ref().is_some_and(|(_, layer)| layer.id == id)
        };
        let used = made.as_ref().is_ok_and(is_used);
        if !used {
            self.meta.give_up(id).await;
        }
        Ok(made?.map(|(applied, _)| applied))
    }

    async fn try_make_image(
        &self,
        job: &Job,
        layers: &Arc<Layers>,
        id: Id,
    ) -> Result<Option<(Applied, Arc<LayerRecord>)>, SnapshotError> {
        let cancel = CancellationToken::new();
        let _end = cancel.clone().drop_guard();
        let (below, store) = (self.below(&job.stack), Arc::clone(&layers.store));
        let (open, blob) = (Arc::clone(&job.request.open), job.request.blob.clone());
        let (compression, limits) = (job.compression, self.limits.clone());
        let facts = blocking(move || {
            let source = open().map_err(|source| ApplyError::Blob { blob: blob.clone(), source })?;
            let file = store.create(id.serial)?;
            let cancelled = || cancel.is_cancelled();
            let source = Source { blob: source, compression };
            let built = image::build(source, &file, &below, &limits, &cancelled);
            let facts = built.map_err(|source| no_room(&store.image(id.serial), blob, source))?;
            store.mark_new(id.serial)?;
            store.complete(id.serial, &file)?;
            Ok::<Facts, SnapshotError>(facts)
        })
        .await?;
        let (diff_id, tar_size) = (facts.diff_id.clone(), facts.tar_size);
        let is_lost = |layer: &LayerRecord| {
            layer.progress == Progress::Complete && !layers.store.is_complete(layer.id.serial)
        };
        if let Some(known) = self.meta.layer_of(&facts, Origin::Applied)
            && known.facts.layout != facts.layout
            && is_lost(&known)
        {
            tracing::warn!(
                serial = known.id.serial,
                "the file of a layer image that an older version made is missing, and this one would make another: files are written instead"
            );
            return Ok(None);
        }
        let new = NewLayer {
            id,
            facts,
            origin: Origin::Applied,
            progress: Progress::Complete,
            blob: Some(job.request.blob.clone()),
            index: None,
            now: Timestamp::now(),
        };
        let layer = self.meta.applied(job.record.info.name.clone(), LayerChoice::New(new)).await?;
        if layer.id != id && is_lost(&layer) {
            tracing::warn!(
                serial = layer.id.serial,
                "the file of a layer image was missing; it is here again"
            );
            let (store, lost) = (Arc::clone(&layers.store), layer.id.serial);
            blocking(move || store.replace(lost, id.serial)).await?;
        }
        if layer.id == id {
            let store = Arc::clone(&layers.store);
            if let Err(error) = blocking(move || store.unmark_new(id.serial)).await {
                // It means nothing beside a record, and goes with the layer.
                tracing::warn!(serial = id.serial, %error, "a mark that a layer image is new stays");
            }
        }
        Ok(Some((Applied { diff_id, tar_size, how: How::Image }, layer)))
    }

    async fn write_files(&self, job: Job) -> Result<Applied, SnapshotError> {
        let (id, driver) = (job.record.id, Arc::clone(&self.driver));
        let dir = self.points.join(format!("{}/fs", id.serial));
        // A volume has in it what is below.
        let is_volume = driver.storage() == Storage::Volumes;
        let stack = if is_volume { Stack::default() } else { job.stack.clone() };
        let (below, limits) = (self.below(&stack), self.limits.clone());
        let cancel = CancellationToken::new();
        let _end = cancel.clone().drop_guard();
        let extracted = blocking(move || {
            let blob = job.request.blob.clone();
            let source =
                (job.request.open)().map_err(|source| ApplyError::Blob { blob: blob.clone(), source })?;
            let cancelled = || cancel.is_cancelled();
            let (whiteouts, durability) = (job.whiteouts, Durability::Synced);
            let how = Extract { whiteouts, below: &below, limits: &limits, durability };
            let source = Source { blob: source, compression: job.compression };
            if !is_volume {
                return extract::extract(source, &dir, &how, &cancelled)
                    .map_err(|source| no_room(&dir, blob, source));
            }
            let (mut source, mut extracted) = (Some(source), None);
            let filled = driver.fill(id, &mut |dir| {
                extracted = source.take().map(|source| extract::extract(source, dir, &how, &cancelled));
                match &extracted {
                    Some(Ok(_)) => Ok(()),
                    _ => Err(std::io::ErrorKind::Other.into()),
                }
            });
            match extracted {
                // What is wrong with the layer says more than that the volume was not filled.
                Some(Err(source)) => Err(no_room(&dir, blob, source)),
                Some(Ok(extracted)) => filled.map(|()| extracted).map_err(SnapshotError::from),
                None => Err(filled.err().map_or(SnapshotError::ShuttingDown, SnapshotError::from)),
            }
        })
        .await?;
        Ok(Applied { diff_id: extracted.diff_id, tar_size: extracted.tar_size, how: How::Files })
    }
}

impl Applier {
    /// What the attributes of implied directories are taken from.
    fn below(&self, stack: &Stack) -> BelowSnapshot {
        BelowSnapshot::new(stack, self.layers.clone(), &self.points)
    }
}

/// One call, resolved.
struct Job {
    request: ApplyRequest,
    compression: Compression,
    record: Arc<Record>,
    stack: Stack,
    whiteouts: Whiteouts,
}

/// A full disk is told apart from a bad layer.
fn no_room(path: &Path, blob: Digest, source: ImageError) -> SnapshotError {
    match source {
        ImageError::Write(error) => LayerError::at(path, error).into(),
        ImageError::Read(source) => ApplyError::Blob { blob, source }.into(),
        source => ApplyError::Layer { blob, source }.into(),
    }
}
