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
//! **When it fails.** A fill that fails is reported to whoever waits for it and tried again when somebody asks again, and when
//! the daemon starts; what was fetched stays.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::SnapshotError;
use super::locks::KeyedLocks;
use super::metastore::{LayerRecord, MetaStore, Origin, Progress};
use super::report::LayerReport;
use super::stock::blocking;
use crate::content::index::{IndexDigest, LayerIndex, Limits};
use crate::content::{ContentError, ContentStore};
use crate::driver::Id;
use crate::layer::chunks::LocalChunks;
use crate::layer::fill::{FillProgress, Filler, Start, Target};
use crate::layer::{LayerError, LayerStore};

/// How often a fill is tried before whoever waits is told.
const ATTEMPTS: u32 = 3;
/// How long a fill waits before it is tried again; doubled each time.
const PAUSE: Duration = Duration::from_millis(500);

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
    local: Arc<LocalChunks>,
    content: Option<Arc<ContentStore>>,
    fills: Mutex<HashMap<u64, Arc<Fill>>>,
    /// Layer indexes whose data could not be fetched, and when.
    broken: Mutex<HashMap<[u8; 32], Instant>>,
    attach_locks: KeyedLocks<u64>,
    attached: Mutex<HashSet<u64>>,
    filled: Filled,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// What was filled since the daemon started.
#[derive(Debug, Default)]
struct Filled {
    done: AtomicU64,
    failed: AtomicU64,
    fetched: AtomicU64,
    shared: AtomicU64,
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

/// A fill that runs or has failed.
#[derive(Debug)]
pub struct Fill {
    /// How far it is.
    pub progress: FillProgress,
    state: watch::Sender<State>,
}

#[derive(Debug, Clone)]
enum State {
    Running,
    /// All bytes are here and checked, but not durable yet.
    Usable,
    Done,
    Failed(Arc<str>),
}

/// Why a fill did not come to its end.
#[derive(Debug, thiserror::Error)]
enum FillError {
    #[error(transparent)]
    Layer(#[from] LayerError),
    #[error(transparent)]
    Content(#[from] ContentError),
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    #[error("no store is configured")]
    NoStore,
    #[error("its layer index is not known")]
    NoIndex,
}

impl FillError {
    /// What is wrong, without the layer, which whoever waits for it names.
    fn problem(&self) -> String {
        match self {
            FillError::Layer(LayerError::Chunk { source, .. }) => source.to_string(),
            other => other.to_string(),
        }
    }
}

impl Layers {
    /// Nothing happens yet: [`Layers::start`] does.
    pub fn new(meta: Arc<MetaStore>, store: Arc<LayerStore>, content: Option<Arc<ContentStore>>) -> Layers {
        Layers {
            meta,
            store,
            local: Arc::default(),
            content,
            fills: Mutex::default(),
            broken: Mutex::default(),
            attach_locks: KeyedLocks::default(),
            attached: Mutex::default(),
            filled: Filled::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        }
    }

    /// Learns what is attached and what chunks are here, and goes on with what was being filled.
    pub async fn start(self: &Arc<Self>) -> Result<(), SnapshotError> {
        let this = Arc::clone(self);
        let layers = self.meta.layers();
        let known = layers.clone();
        blocking(move || {
            *this.attached.lock() = this.store.attached()?.into_iter().collect();
            for layer in known.iter().filter(|layer| layer.progress == Progress::Complete) {
                // A crash may have left it. Beside lost records it would say that the image never was in any.
                this.store.unmark_new(layer.id.serial)?;
                if !this.store.is_complete(layer.id.serial) {
                    tracing::error!(
                        serial = layer.id.serial, diff_id = %layer.facts.diff_id,
                        "a layer image is missing: snapshots on it cannot be mounted; remove the image and pull it again"
                    );
                } else if let Some(index) = this.sidecar(layer) {
                    this.local.add(layer.id.serial, &index);
                }
            }
            Ok::<_, LayerError>(())
        })
        .await?;
        for layer in layers.iter().filter(|layer| layer.progress == Progress::Filling) {
            self.fill(layer.id.serial, Start::Resumed);
        }
        Ok(())
    }

    /// Until `stop`; what is being filled is given up then and goes on at the next start.
    pub async fn run(&self, stop: CancellationToken) {
        stop.cancelled().await;
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// What fills layer images.
    pub(super) fn filler(&self, content: &Arc<ContentStore>) -> Filler {
        let (layers, local) = (Arc::clone(&self.store), Arc::clone(&self.local));
        Filler { layers, local, content: Arc::clone(content) }
    }

    /// Whether some complete layer image on this node has the chunk.
    pub(super) fn has_chunk(&self, id: &crate::chunk::ChunkId) -> bool {
        self.local.contains(id)
    }

    /// The chunks of a complete layer image may be used for others.
    pub(super) fn share(&self, serial: u64, index: &LayerIndex) {
        self.local.add(serial, index);
    }

    /// Begins to fill, unless that is going on.
    pub(super) fn fill(self: &Arc<Self>, serial: u64, start: Start) -> Arc<Fill> {
        let mut fills = self.fills.lock();
        if let Some(fill) = fills.get(&serial)
            && !matches!(*fill.state.borrow(), State::Failed(_))
        {
            return Arc::clone(fill);
        }
        let fill =
            Arc::new(Fill { progress: FillProgress::default(), state: watch::Sender::new(State::Running) });
        fills.insert(serial, Arc::clone(&fill));
        let (this, mine) = (Arc::clone(self), Arc::clone(&fill));
        self.tasks.spawn(async move {
            let stop = this.stop.clone();
            tokio::select! {
                () = stop.cancelled() => {}
                () = this.run_fill(serial, start, &mine) => {}
            }
        });
        fill
    }

    async fn run_fill(&self, serial: u64, mut start: Start, fill: &Fill) {
        let mut pause = PAUSE;
        for attempt in 1..=ATTEMPTS {
            match self.try_fill(serial, start, fill).await {
                Ok(()) => {
                    self.count(&fill.progress);
                    self.filled.done.fetch_add(1, Ordering::Relaxed);
                    fill.state.send_replace(State::Done);
                    self.fills.lock().remove(&serial);
                    return;
                }
                Err(error) if attempt == ATTEMPTS || self.meta.layer(serial).is_none() => {
                    let text = error.problem();
                    self.count(&fill.progress);
                    self.filled.failed.fetch_add(1, Ordering::Relaxed);
                    tracing::error!(serial, error = text, "a layer cannot be fetched from the store");
                    self.keep_broken(serial);
                    fill.state.send_replace(State::Failed(text.into()));
                    return;
                }
                Err(error) => tracing::warn!(serial, %error, "fetching a layer failed; trying again"),
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
            start = Start::Resumed;
        }
    }

    fn keep_broken(&self, serial: u64) {
        let Some(index) = self.meta.layer(serial).and_then(|layer| layer.index) else { return };
        let mut broken = self.broken.lock();
        broken.retain(|_, since| since.elapsed() < BROKEN);
        if broken.len() < MOST_BROKEN {
            broken.insert(index, Instant::now());
        }
    }

    /// Whether the data of this layer index could not be fetched not long ago: what promises it again ends in a container that does
    /// not start.
    pub(super) fn is_broken(&self, index: &[u8; 32]) -> bool {
        self.broken.lock().get(index).is_some_and(|since| since.elapsed() < BROKEN)
    }

    async fn try_fill(&self, serial: u64, start: Start, fill: &Fill) -> Result<(), FillError> {
        let content = self.content.as_ref().ok_or(FillError::NoStore)?;
        let Some(layer) = self.meta.layer(serial) else {
            return Err(SnapshotError::LayerGone { serial }.into());
        };
        let index = match self.sidecar(&layer) {
            Some(index) => index,
            None => {
                let digest = layer.index.ok_or(FillError::NoIndex)?;
                content.index(IndexDigest::from_bytes(digest)).await?
            }
        };
        if !self.store.is_complete(serial) {
            let file = Arc::new(self.store.reopen(serial)?);
            let path = self.store.image(serial);
            file.set_len(layer.facts.layout.size).map_err(|error| LayerError::at(&path, error))?;
            // The metadata of an empty start was written and checked before the layer was recorded.
            let chunks = match start {
                Start::Empty => index.data_chunks().collect(),
                Start::Resumed => index.chunks().collect(),
            };
            let target = Target { file: &file, path: &path, start, progress: &fill.progress };
            self.filler(content).fill(&index, chunks, target).await?;
            // Checked bytes in the page cache are as good as any for a container that starts now: only the record, which says that
            // nothing need be hashed after a crash, waits for the disk.
            fill.state.send_replace(State::Usable);
            let store = Arc::clone(&self.store);
            blocking(move || store.complete(serial, &file)).await?;
        }
        self.local.add(serial, &index);
        let bytes = |counted: &AtomicU64| counted.load(Ordering::Relaxed);
        let (fetched, shared) = (bytes(&fill.progress.fetched), bytes(&fill.progress.shared));
        self.meta.completed(serial, fetched, shared).await?;
        Ok(())
    }

    /// Adds what was fetched to what is counted; once for each progress.
    pub(super) fn count(&self, progress: &FillProgress) {
        self.filled.fetched.fetch_add(progress.fetched.load(Ordering::Relaxed), Ordering::Relaxed);
        self.filled.shared.fetch_add(progress.shared.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// What was filled since the daemon started; bytes when the fill is over.
    pub fn fill_counts(&self) -> FillCounts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let Filled { done, failed, fetched, shared } = &self.filled;
        FillCounts { done: read(done), failed: read(failed), fetched: read(fetched), shared: read(shared) }
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

    /// How far the fill of a layer image is, if it runs or has failed.
    pub fn filling(&self, serial: u64) -> Option<(Arc<Fill>, Option<String>)> {
        let fill = self.fills.lock().get(&serial).cloned()?;
        let failed = match &*fill.state.borrow() {
            State::Failed(problem) => Some(problem.to_string()),
            _ => None,
        };
        Some((fill, failed))
    }

    /// Waits until all of them are complete, then attaches them. Every failure names the layer.
    pub async fn ready(self: &Arc<Self>, layers: &[Id]) -> Result<(), SnapshotError> {
        self.filled(layers).await?;
        self.attach(layers).await
    }

    /// Waits until all of them are complete.
    pub(super) async fn filled(self: &Arc<Self>, layers: &[Id]) -> Result<(), SnapshotError> {
        for id in layers {
            self.wait(id.serial).await?;
        }
        Ok(())
    }

    /// Whether all of them can be attached.
    pub fn are_usable(&self, layers: &[Id]) -> bool {
        let complete = |id: &Id| self.meta.layer(id.serial).is_some_and(|l| l.progress == Progress::Complete);
        let usable = |id: &Id| {
            self.fills
                .lock()
                .get(&id.serial)
                .is_some_and(|fill| matches!(*fill.state.borrow(), State::Usable))
        };
        layers.iter().all(|id| complete(id) || usable(id))
    }

    async fn wait(self: &Arc<Self>, serial: u64) -> Result<(), SnapshotError> {
        let Some(layer) = self.meta.layer(serial) else { return Err(SnapshotError::LayerGone { serial }) };
        if layer.progress == Progress::Complete {
            return Ok(());
        }
        let fill = self.fill(serial, Start::Resumed);
        let mut state = fill.state.subscribe();
        let ended = state.wait_for(|state| !matches!(state, State::Running)).await;
        let ended = ended.map_err(|_| SnapshotError::ShuttingDown)?.clone();
        match ended {
            State::Failed(problem) => Err(SnapshotError::LayerUnavailable {
                layer: layer.facts.diff_id.to_string(),
                problem: problem.to_string(),
            }),
            State::Running | State::Usable | State::Done => Ok(()),
        }
    }

    async fn attach(self: &Arc<Self>, layers: &[Id]) -> Result<(), SnapshotError> {
        let missing = {
            let attached = self.attached.lock();
            layers.iter().map(|id| id.serial).filter(|serial| !attached.contains(serial)).collect::<Vec<_>>()
        };
        for serial in missing {
            let lock = self.attach_locks.of(serial);
            let _held = lock.lock().await;
            if self.attached.lock().contains(&serial) {
                continue;
            }
            let store = Arc::clone(&self.store);
            blocking(move || store.attach(serial)).await?;
            self.attached.lock().insert(serial);
        }
        Ok(())
    }

    /// Detaches what lies below no active snapshot and no view.
    pub(super) async fn detach_unused(self: &Arc<Self>) {
        let attached: Vec<u64> = self.attached.lock().iter().copied().collect();
        if attached.is_empty() {
            return;
        }
        for serial in attached {
            let lock = self.attach_locks.of(serial);
            let _held = lock.lock().await;
            // In this order: whoever still found it attached has recorded a snapshot by now, which keeps it; whoever does
            // not waits for the lock and attaches it again.
            self.attached.lock().remove(&serial);
            if self.meta.layers_in_use().contains(&serial) {
                self.attached.lock().insert(serial);
                continue;
            }
            let store = Arc::clone(&self.store);
            if let Err(error) = blocking(move || store.detach(serial)).await {
                tracing::warn!(serial, %error, "cannot detach a layer image yet; it will be tried again");
                self.attached.lock().insert(serial);
            }
        }
    }

    /// How many bytes fewer than `floor` percent of the root's file system are free.
    pub(super) fn short_of(&self, floor: u8) -> std::io::Result<u64> {
        let space = self.store.space()?;
        Ok((space.bytes / 100 * u64::from(floor)).saturating_sub(space.bytes_free))
    }

    /// Chooses unclaimed layer images to be removed: the least recently used beyond `budget` bytes, and all that it takes to
    /// have `wanted` more bytes free.
    pub(super) async fn evict(&self, budget: u64, wanted: u64) -> Result<(), SnapshotError> {
        let claims = self.meta.claims();
        let mut unclaimed: Vec<(Arc<LayerRecord>, u64)> = (self.meta.layers().into_iter())
            .filter(|layer| !claims.contains_key(&layer.id.serial))
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
            return Ok(());
        }
        tracing::info!(layers = chosen.len(), bytes = freed, "removing layer images that nobody uses");
        for serial in &chosen {
            self.local.forget(*serial);
            self.fills.lock().remove(serial);
        }
        self.meta.evict(chosen).await
    }

    /// What people are told of a layer image; `claims` as the records have them. Blocking.
    pub fn report(&self, layer: &LayerRecord, claims: usize) -> LayerReport {
        let serial = layer.id.serial;
        let data = layer.facts.bytes.max(1);
        let (mut state, mut percent, mut problem) = ("complete", 100, None);
        let (mut fetched, mut shared) = (layer.fetched, layer.shared);
        if layer.progress == Progress::Filling {
            (state, percent) = ("filling", 0);
            if let Some((fill, failed)) = self.filling(serial) {
                let there = (fill.progress.present().min(data) * 99 / data).min(99);
                percent = u8::try_from(there).unwrap_or(0);
                fetched = fill.progress.fetched.load(Ordering::Relaxed);
                shared = fill.progress.shared.load(Ordering::Relaxed);
                state = if failed.is_some() { "failed" } else { "filling" };
                problem = failed;
            }
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
            inodes: layer.facts.inodes,
            snapshots: claims,
            attached: self.attached.lock().contains(&serial),
            published: layer.published.is_some(),
            used: layer.used.0 / 1_000_000_000,
        }
    }

    /// Frees the files of a layer image. Blocking.
    pub(super) fn free(&self, serial: u64) -> Result<(), LayerError> {
        self.attached.lock().remove(&serial);
        self.store.remove(serial)
    }
}
