//! The layer images of this node in use: filled in the background, attached when somebody mounts them, removed when nobody
//! needs them and room is wanted.
//!
//! **Where.** Called by `snapshotter`, `hit`, `apply`, `publish` and `reconcile`; calls [`crate::layer`] for files and mounts
//! and `metastore` for records.
//!
//! **Words.** A layer image is *claimed* by the snapshots that refer to it; an unclaimed one is a cache. It is *ready* when it is
//! complete and attached.
//!
//! **Invariants.** A layer image is attached before a mount that names it is answered by `Mounts`. One below an active snapshot
//! or a view is never detached or removed.
//!
//! **When it fails.** A fill that fails is reported to whoever waits for it and begun anew when somebody asks again, and when
//! the daemon starts; if nobody does, it is tried now and then and stays failed until that succeeds. What was fetched stays.

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::SnapshotError;
use super::locks::KeyedLocks;
use super::metastore::{LayerRecord, MetaStore, Origin, Progress};
use super::pins::Pins;
use super::report::LayerReport;
use super::stock::blocking;
use crate::content::index::{IndexDigest, LayerIndex, Limits};
use crate::driver::Id;
use crate::layer::attach::Attached;
use crate::layer::cold::Cold;
use crate::layer::lazy::{self, ColdLayers, Lazy};
use crate::layer::work::Work;
use crate::layer::{LayerError, LayerStore};

mod demotion;
mod filling;
mod limit;
mod scrub;
mod settling;
mod watched;

/// After which time whoever waits for a layer asks for its data again.
const HURRY: Duration = Duration::from_secs(1);
/// How long a layer whose data could not be fetched is pulled instead.
const BROKEN: Duration = Duration::from_secs(3600);
/// How many of these are remembered.
const MOST_BROKEN: usize = 4096;

/// See the module's page.
#[derive(Debug)]
pub struct Layers {
    meta: Arc<MetaStore>,
    /// The files.
    pub store: Arc<LayerStore>,
    cold: Option<Arc<ColdLayers>>,
    lazy: Option<Arc<Lazy>>,
    pins: Option<Arc<Pins>>,
    fills: Mutex<HashMap<u64, Arc<Fill>>>,
    /// Layer indexes whose data could not be fetched, and when.
    broken: Mutex<HashMap<[u8; 32], Instant>>,
    attach_locks: KeyedLocks<u64>,
    attached: Mutex<HashMap<u64, How>>,
    /// Those whose reads somebody wants to see; by how many.
    watched: Mutex<HashMap<u64, usize>>,
    filled: Filled,
    upkeep: Upkeep,
    disk: Disk,
    work: Work,
}

/// What is done for layer images that are here.
#[derive(Debug, Clone, Copy, Default)]
pub struct Upkeep {
    /// How many bytes of them are read again and checked each second; none if 0.
    pub scrub_rate: u64,
    /// How long one that was checked is left alone.
    pub scrub_every: Duration,
}

/// What was given up of layer images, and what was found wrong with them.
#[derive(Debug, Default)]
struct Disk {
    /// Fills that have begun, for which there is room.
    promised: Mutex<HashMap<u64, Arc<Cold>>>,
    /// Those that wait for room.
    waiting: Mutex<HashSet<u64>>,
    /// What could not be given up, and when.
    refused: Mutex<HashMap<u64, Instant>>,
    /// How many reads of its device there were, and since when.
    reads: Mutex<HashMap<u64, (u64, Instant)>>,
    /// How many chunks of it were found damaged.
    doubted: Mutex<HashMap<u64, u64>>,
    /// Damage that cannot be repaired.
    damaged: Mutex<HashMap<u64, String>>,
    demotions: AtomicU64,
    scrubbed: AtomicU64,
    found: AtomicU64,
    repaired: AtomicU64,
}

/// What was filled since the daemon started.
#[derive(Debug, Default)]
struct Filled {
    done: AtomicU64,
    failed: AtomicU64,
}

/// The same at one moment.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct FillCounts {
    /// Layer images that became complete.
    pub done: u64,
    /// Those that were given up, for now.
    pub failed: u64,
    /// Plain bytes that came from the store, those of the metadata and of fills that failed included.
    pub fetched: u64,
    /// Plain bytes that other layer images of this node had.
    pub shared: u64,
}

/// How a layer image is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// From its local file.
    Native,
    /// From our FUSE file.
    Lazy,
}

/// A fill that runs or has failed.
#[derive(Debug)]
pub struct Fill {
    state: watch::Sender<State>,
    /// The layer image is to be removed.
    gone: CancellationToken,
}

#[derive(Debug, Clone)]
enum State {
    Running,
    /// All bytes are here and checked, but not durable yet.
    Usable,
    Done,
    Failed(Arc<str>),
    /// The disk failed: it is read through us as long as we live, and never natively.
    Forbidden(Arc<str>),
}

impl Layers {
    /// Nothing happens yet: [`Layers::start`] does.
    ///
    /// Without `cold` nothing can be filled, without `lazy` whatever is mounted must be complete.
    pub fn new(
        meta: Arc<MetaStore>,
        store: Arc<LayerStore>,
        cold: Option<Arc<ColdLayers>>,
        lazy: Option<Arc<Lazy>>,
    ) -> Layers {
        Layers {
            meta,
            store,
            cold,
            lazy,
            pins: None,
            fills: Mutex::default(),
            broken: Mutex::default(),
            attach_locks: KeyedLocks::default(),
            attached: Mutex::default(),
            watched: Mutex::default(),
            filled: Filled::default(),
            upkeep: Upkeep::default(),
            disk: Disk::default(),
            work: Work::default(),
        }
    }

    /// With some of them kept whole.
    pub fn with_pins(self, pins: Option<Arc<Pins>>) -> Layers {
        Layers { pins, ..self }
    }

    /// With this done for them while [`Layers::run`] runs.
    pub fn with_upkeep(self, upkeep: Upkeep) -> Layers {
        Layers { upkeep, ..self }
    }

    /// Learns what is attached and what chunks are here, and goes on with what was being filled.
    pub async fn start(self: &Arc<Self>) -> Result<(), SnapshotError> {
        let this = Arc::clone(self);
        let layers = self.meta.layers();
        let known = layers.clone();
        blocking(move || {
            let how = |attached: &Attached| match attached.image.as_deref().and_then(lazy::serial_below) {
                Some(_) => How::Lazy,
                None => How::Native,
            };
            let found = this.store.attached()?;
            this.revive(&found);
            *this.attached.lock() = found.iter().map(|attached| (attached.serial, how(attached))).collect();
            for layer in known.iter().filter(|layer| layer.progress == Progress::Complete) {
                // A crash may have left it. Beside lost records it would say that the image never was in any.
                this.store.unmark_new(layer.id.serial)?;
                this.store.remove_part(layer.id.serial)?;
                if !this.store.is_complete(layer.id.serial) {
                    tracing::error!(
                        serial = layer.id.serial, diff_id = %layer.facts.diff_id,
                        "a layer image is missing: snapshots on it cannot be mounted; remove the image and pull it again"
                    );
                } else if let Some(index) = this.sidecar(layer) {
                    this.share(layer.id.serial, &index);
                }
            }
            Ok::<_, LayerError>(())
        })
        .await?;
        let is_lazy = |serial: u64| self.attached.lock().get(&serial) == Some(&How::Lazy);
        for layer in layers {
            if layer.progress == Progress::Filling || is_lazy(layer.id.serial) {
                self.fill(layer.id.serial);
            }
        }
        Ok(())
    }

    /// Layer images that were attached from a connection that ended can be read again.
    fn revive(&self, attached: &[Attached]) {
        let Some(lazy) = self.lazy.as_ref().filter(|lazy| !lazy.is_resumed()) else { return };
        for found in attached {
            let is_lazy = found.image.as_deref().and_then(lazy::serial_below) == Some(found.serial);
            if let (true, Some(device)) = (is_lazy, &found.device) {
                match lazy.revive(found.serial, device) {
                    Ok(()) => tracing::warn!(
                        serial = found.serial,
                        "reads of a layer failed while nobody served it; they work again"
                    ),
                    Err(error) => {
                        tracing::error!(serial = found.serial, %error, "reads of a layer fail; restart the containers on it")
                    }
                }
            }
        }
    }

    /// Until `stop`; what is being filled is given up then and goes on at the next start.
    pub async fn run(self: &Arc<Self>, stop: CancellationToken) {
        let upkeep = async { tokio::join!(self.keep_within_limit(), self.scrub(), self.settle()) };
        tokio::select! {
            () = stop.cancelled() => {}
            _ = upkeep => {}
        }
        self.work.end().await;
    }

    /// The layer images that are not wholly here, where there is a store.
    pub(super) fn cold(&self) -> Option<&Arc<ColdLayers>> {
        self.cold.as_ref()
    }

    /// Whether some complete layer image on this node has the chunk.
    pub(super) fn has_chunk(&self, id: &crate::chunk::ChunkId) -> bool {
        self.cold.as_ref().is_some_and(|cold| cold.supply().local.contains(id))
    }

    /// The chunks of a complete layer image may be used for others.
    pub(super) fn share(&self, serial: u64, index: &LayerIndex) {
        if let Some(cold) = &self.cold {
            cold.supply().local.add(serial, index);
        }
    }

    /// Whether the data of this layer index could not be fetched not long ago: what promises it again ends in a container that does
    /// not start.
    pub(super) fn is_broken(&self, index: &[u8; 32]) -> bool {
        self.broken.lock().get(index).is_some_and(|since| since.elapsed() < BROKEN)
    }

    /// What was filled since the daemon started.
    pub fn fill_counts(&self) -> FillCounts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (fetched, shared) = self.cold.as_ref().map_or((0, 0), |cold| cold.supply().counts.read());
        FillCounts { done: read(&self.filled.done), failed: read(&self.filled.failed), fetched, shared }
    }

    /// The layer index kept beside an image, if it is the recorded one.
    pub(super) fn sidecar(&self, layer: &LayerRecord) -> Option<LayerIndex> {
        let bytes = self.store.read_index(layer.id.serial)?;
        let digest = *IndexDigest::of(&bytes).as_bytes();
        if layer.index != Some(digest) {
            return None;
        }
        LayerIndex::decode(&bytes, Limits::default()).ok()
    }

    /// Why the last fill of a layer image failed, if it did.
    pub fn failed(&self, serial: u64) -> Option<String> {
        match &*self.fills.lock().get(&serial)?.state.borrow() {
            State::Failed(problem) | State::Forbidden(problem) => Some(problem.to_string()),
            _ => None,
        }
    }

    /// Attaches them, complete or, where that can be, lazily. Every failure names the layer.
    pub async fn ready(self: &Arc<Self>, layers: &[Id]) -> Result<(), SnapshotError> {
        self.readable(layers).await?;
        self.attach(layers).await
    }

    /// Waits until all of them can be attached.
    pub(super) async fn readable(self: &Arc<Self>, layers: &[Id]) -> Result<(), SnapshotError> {
        for id in layers {
            if self.is_pinned(id.serial) || !self.can_be_lazy(id.serial) {
                self.wait(id.serial).await?;
            }
        }
        Ok(())
    }

    /// Whether all of them can be attached at once, without asking anybody.
    pub fn are_usable(&self, layers: &[Id]) -> bool {
        layers.iter().all(|id| self.is_whole(id.serial))
    }

    fn is_complete(&self, serial: u64) -> bool {
        self.meta.layer(serial).is_some_and(|layer| layer.progress == Progress::Complete)
    }

    /// Whether all bytes are here, durable or not.
    fn is_whole(&self, serial: u64) -> bool {
        let usable = |fill: &Arc<Fill>| matches!(*fill.state.borrow(), State::Usable);
        self.is_complete(serial) || self.fills.lock().get(&serial).is_some_and(usable)
    }

    /// Whether nothing of it may be read before all of it is here.
    fn is_pinned(&self, serial: u64) -> bool {
        self.pins.as_ref().is_some_and(|pins| pins.is_wanted_whole(serial))
    }

    /// Whether it is not to be given up, whatever happens.
    fn is_kept(&self, serial: u64) -> bool {
        self.pins.as_ref().is_some_and(|pins| pins.is_kept(serial))
    }

    /// Whether it can be read although it is not here: its data is known not to be out of reach.
    fn can_be_lazy(&self, serial: u64) -> bool {
        let lazy = self.lazy.as_ref().is_some_and(|lazy| !lazy.has_ended());
        let failed = |fill: &Arc<Fill>| matches!(*fill.state.borrow(), State::Failed(_));
        lazy && !self.fills.lock().get(&serial).is_some_and(failed)
            && self.meta.layer(serial).is_some_and(|layer| layer.progress == Progress::Filling)
    }

    /// Fetches all of a layer, for whoever waits for its fill: that alone would stand back for those who read something else. What goes
    /// wrong is the fill's to tell.
    async fn hurry(&self, serial: u64) -> Infallible {
        loop {
            if let Some(cold) = self.cold.as_ref().and_then(|cold| cold.get(serial)) {
                drop(cold.fetch(0..cold.index().chunks().len()).await);
            }
            // It may not be open yet, and the fill may try again.
            tokio::time::sleep(HURRY).await;
        }
    }

    async fn wait(self: &Arc<Self>, serial: u64) -> Result<(), SnapshotError> {
        let Some(layer) = self.meta.layer(serial) else { return Err(SnapshotError::LayerGone { serial }) };
        if layer.progress == Progress::Complete {
            return Ok(());
        }
        let fill = self.fill(serial);
        let mut state = fill.state.subscribe();
        let ended = tokio::select! {
            ended = state.wait_for(|state| !matches!(state, State::Running)) => ended,
            never = self.hurry(serial) => match never {},
        };
        let ended = ended.map_err(|_| SnapshotError::ShuttingDown)?.clone();
        match ended {
            State::Failed(problem) | State::Forbidden(problem) => Err(SnapshotError::LayerUnavailable {
                layer: layer.facts.diff_id.to_string(),
                problem: problem.to_string(),
            }),
            State::Running | State::Usable | State::Done => Ok(()),
        }
    }

    async fn attach(self: &Arc<Self>, layers: &[Id]) -> Result<(), SnapshotError> {
        let missing = {
            let attached = self.attached.lock();
            layers
                .iter()
                .map(|id| id.serial)
                .filter(|serial| !attached.contains_key(serial))
                .collect::<Vec<_>>()
        };
        for serial in missing {
            let lock = self.attach_locks.of(serial);
            let _held = lock.lock().await;
            if self.attached.lock().contains_key(&serial) {
                continue;
            }
            // What is not durable yet may never be: where it can be read lazily until then, it is.
            let is_native = self.lazy.is_none() || (self.is_complete(serial) && !self.is_watched(serial));
            let how = if is_native { How::Native } else { How::Lazy };
            let this = Arc::clone(self);
            blocking(move || this.attach_now(serial, how)).await?;
            self.attached.lock().insert(serial, how);
        }
        Ok(())
    }

    fn attach_now(&self, serial: u64, how: How) -> Result<(), SnapshotError> {
        match (how, &self.lazy) {
            (How::Lazy, Some(lazy)) => {
                let attached = lazy.attach(serial, &self.store.point(serial));
                Ok(attached.map_err(LayerError::from)?)
            }
            _ if self.must_be_switchable(serial) => Ok(self.store.attach_by_device(serial)?),
            _ => Ok(self.store.attach(serial)?),
        }
    }

    fn detach_now(&self, serial: u64, how: How) -> Result<(), LayerError> {
        match (how, &self.lazy) {
            (How::Lazy, Some(lazy)) => Ok(lazy.detach(&self.store.point(serial))?),
            _ => self.store.detach(serial),
        }
    }

    /// Detaches what lies below no active snapshot and no view.
    pub(super) async fn detach_unused(self: &Arc<Self>) {
        let attached: Vec<u64> = self.attached.lock().keys().copied().collect();
        for serial in attached {
            let lock = self.attach_locks.of(serial);
            let _held = lock.lock().await;
            // In this order: whoever still found it attached has recorded a snapshot by now, which keeps it; whoever does
            // not waits for the lock and attaches it again.
            let Some(how) = self.attached.lock().remove(&serial) else { continue };
            if self.meta.layers_in_use().contains(&serial) {
                self.attached.lock().insert(serial, how);
                continue;
            }
            let this = Arc::clone(self);
            if let Err(error) = blocking(move || this.detach_now(serial, how)).await {
                tracing::warn!(serial, %error, "cannot detach a layer image yet; it will be tried again");
                self.attached.lock().insert(serial, how);
            }
        }
    }

    /// How many bytes fewer than `floor` percent of the root's file system are free.
    pub(super) fn short_of(&self, floor: u8) -> std::io::Result<u64> {
        let space = self.store.space()?;
        Ok((space.bytes / 100 * u64::from(floor)).saturating_sub(space.bytes_free))
    }

    /// Chooses unclaimed layer images to be removed: the least recently used beyond `budget` bytes, and all that it takes to
    /// have `wanted` more bytes free. Their files are freed later.
    pub(super) async fn evict(&self, budget: u64, wanted: u64) -> Result<Vec<u64>, SnapshotError> {
        let claims = self.meta.claims();
        let mut unclaimed: Vec<(Arc<LayerRecord>, u64)> = (self.meta.layers().into_iter())
            .filter(|layer| !claims.contains_key(&layer.id.serial) && !self.is_kept(layer.id.serial))
            .map(|layer| (Arc::clone(&layer), self.store.allocated(layer.id.serial)))
            .collect();
        unclaimed.sort_by_key(|(layer, _)| layer.used);
        let mut kept: u64 = unclaimed.iter().map(|(_, bytes)| bytes).sum();
        let mut freed = 0;
        let mut chosen = Vec::new();
        for (layer, bytes) in unclaimed {
            if kept <= budget && freed >= wanted {
                break;
            }
            kept -= bytes;
            freed += bytes;
            chosen.push(layer.id.serial);
        }
        if chosen.is_empty() {
            return Ok(chosen);
        }
        tracing::info!(layers = chosen.len(), bytes = freed, "removing layer images that nobody uses");
        for serial in &chosen {
            if let Some(cold) = &self.cold {
                cold.supply().local.forget(*serial);
            }
        }
        self.meta.evict(chosen.clone()).await?;
        // Others were claimed meanwhile.
        chosen.retain(|serial| self.meta.layer(*serial).is_none());
        let mut fills = self.fills.lock();
        chosen.iter().filter_map(|serial| fills.remove(serial)).for_each(|fill| fill.gone.cancel());
        Ok(chosen)
    }

    /// What was read through us since the daemon started.
    pub fn lazy_counts(&self) -> lazy::session::Numbers {
        self.lazy.as_ref().map(|lazy| lazy.counts().numbers()).unwrap_or_default()
    }

    /// Ends what is under way for readers: the next process goes on with it.
    pub async fn end_reads(&self) {
        if let Some(cold) = &self.cold {
            cold.work().end().await;
        }
    }

    /// Whether some container may read through us.
    pub fn has_lazy(&self) -> bool {
        self.attached.lock().values().any(|how| *how == How::Lazy)
    }

    /// What people are told of a layer image; `claims` as the records have them. Blocking.
    pub fn report(&self, layer: &LayerRecord, claims: usize) -> LayerReport {
        let serial = layer.id.serial;
        let data = layer.facts.bytes.max(1);
        let how = self.attached.lock().get(&serial).copied();
        let (mut state, mut percent) = ("complete", 100);
        let mut problem = self.disk.damaged.lock().get(&serial).cloned();
        let (mut fetched, mut shared, mut evicted) = (layer.fetched, layer.shared, 0);
        if layer.progress == Progress::Filling {
            let waits = self.disk.waiting.lock().contains(&serial);
            (state, percent) = (if waits { "cold" } else { "filling" }, 0);
            if let Some(cold) = self.cold.as_ref().and_then(|cold| cold.get(serial)) {
                let there = (cold.progress.present().min(data) * 99 / data).min(99);
                percent = u8::try_from(there).unwrap_or(0);
                fetched = cold.progress.fetched.load(Ordering::Relaxed);
                shared = cold.progress.shared.load(Ordering::Relaxed);
                evicted = cold.progress.evicted.load(Ordering::Relaxed);
            }
            problem = self.failed(serial);
            state = if problem.is_some() { "failed" } else { state };
        } else if !self.store.is_complete(serial) {
            (state, percent, problem) = ("failed", 0, Some("its file is missing".to_owned()));
        }
        LayerReport {
            serial,
            diff_id: layer.facts.diff_id.to_string(),
            origin: if layer.origin == Origin::Applied { "applied" } else { "fetched" }.to_owned(),
            state: state.to_owned(),
            percent,
            problem,
            bytes: self.store.allocated(serial),
            fetched,
            shared,
            evicted,
            inodes: layer.facts.inodes,
            snapshots: claims,
            attached: how.is_some(),
            lazy: how == Some(How::Lazy),
            pinned: self.is_pinned(serial),
            published: layer.published.is_some(),
            used: layer.used.0 / 1_000_000_000,
        }
    }

    /// Frees the files of a layer image. Blocking.
    pub(super) fn free(&self, serial: u64) -> Result<(), LayerError> {
        let how = self.attached.lock().remove(&serial);
        if how == Some(How::Lazy) {
            self.detach_now(serial, How::Lazy)?;
        }
        if let Some(cold) = &self.cold {
            cold.close(serial);
        }
        self.store.remove(serial)
    }
}
