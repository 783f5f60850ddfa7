//! Layer images on their way: filled in the background, made durable, and then no longer read through us.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{BROKEN, Fill, How, Layers, MOST_BROKEN, State};
use crate::content::ContentError;
use crate::content::index::{IndexDigest, LayerIndex};
use crate::layer::LayerError;
use crate::layer::cold::Cold;
use crate::snapshot::SnapshotError;
use crate::snapshot::metastore::{LayerRecord, Progress};
use crate::snapshot::stock::blocking;
use crate::sys::memory;

/// How often a fill is tried before whoever waits is told.
const ATTEMPTS: u32 = 3;
/// How long a fill waits before it is tried again; doubled each time.
const PAUSE: Duration = Duration::from_millis(500);

/// How long after it failed a fill is tried again, to begin with and at most; doubled each time.
const AGAIN: (Duration, Duration) = (Duration::from_secs(20), Duration::from_secs(600));
/// How long after the last fill its memory is given back: the threads that wrote and hashed end after 10 s without work, and
/// their buffers with them.
const IDLE: Duration = Duration::from_secs(15);

impl Fill {
    /// Its layer image is gone: no failure, but whoever waits for it is told.
    fn removed(&self) {
        self.state.send_replace(State::Failed("the layer image was removed".into()));
    }
}

/// Why a fill did not come to its end.
#[derive(Debug, thiserror::Error)]
pub(super) enum FillError {
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
    #[error(
        "the disk does not keep it, it is read from the store and never natively until speedy is started again: {0}"
    )]
    Sync(#[source] LayerError),
}

impl FillError {
    /// Whether there was no room.
    pub(super) fn is_full(&self) -> bool {
        matches!(self, FillError::Layer(LayerError::Full { .. }))
    }

    /// What is wrong, without the layer, which whoever waits for it names.
    pub(super) fn problem(&self) -> String {
        match self {
            FillError::Layer(LayerError::Chunk { source, .. }) => source.to_string(),
            other => other.to_string(),
        }
    }
}

impl Layers {
    /// Begins to fill, unless that is going on.
    pub(in crate::snapshot) fn fill(self: &Arc<Self>, serial: u64) -> Arc<Fill> {
        let mut fills = self.fills.lock();
        if let Some(fill) = fills.get(&serial)
            && !matches!(*fill.state.borrow(), State::Failed(_))
        {
            return Arc::clone(fill);
        }
        let fill =
            Arc::new(Fill { state: watch::Sender::new(State::Running), gone: CancellationToken::new() });
        fills.insert(serial, Arc::clone(&fill));
        let (this, mine) = (Arc::clone(self), Arc::clone(&fill));
        let run = async move {
            tokio::select! {
                () = this.run_fill(serial, &mine) => {}
                () = mine.gone.cancelled() => mine.removed(),
            }
        };
        self.work.spawn(&Handle::current(), run);
        fill
    }

    async fn run_fill(self: &Arc<Self>, serial: u64, fill: &Arc<Fill>) {
        let mut pause = PAUSE;
        for attempt in 1..=ATTEMPTS {
            match self.try_fill(serial, fill).await {
                Ok(()) => return self.finish(serial, fill).await,
                Err(error @ FillError::Sync(_)) => {
                    let text = error.problem();
                    self.filled.failed.fetch_add(1, Ordering::Relaxed);
                    tracing::error!(serial, error = text, "a layer is not read natively");
                    fill.state.send_replace(State::Forbidden(text.into()));
                    return;
                }
                Err(_) if self.meta.layer(serial).is_none() => return fill.removed(),
                Err(error) if attempt == ATTEMPTS => {
                    let text = error.problem();
                    self.filled.failed.fetch_add(1, Ordering::Relaxed);
                    tracing::error!(serial, error = text, "a layer cannot be fetched from the store");
                    self.keep_broken(serial);
                    fill.state.send_replace(State::Failed(text.into()));
                    return self.try_again(serial, fill, error.is_full()).await;
                }
                Err(error) => tracing::warn!(serial, %error, "fetching a layer failed; trying again"),
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
    }

    /// A fill that failed is tried now and then as long as nobody has begun it anew: what a container reads already nobody asks for
    /// again. Until it succeeds it stays failed for everybody who asks. One that found no room is tried as soon as there seems to be
    /// enough, too; the other times are for what only seems to be full.
    async fn try_again(self: &Arc<Self>, serial: u64, fill: &Arc<Fill>, mut was_full: bool) {
        let (mut pause, mut waited, mut free) = (AGAIN.0, Duration::ZERO, self.room());
        loop {
            tokio::time::sleep(AGAIN.0).await;
            waited += AGAIN.0;
            let is_its = self.fills.lock().get(&serial).is_some_and(|other| Arc::ptr_eq(other, fill));
            let missing = match self.unfilled(serial) {
                Some(cold) if is_its => cold.missing(),
                _ => return,
            };
            let now_fits = was_full && self.room() > free.max(missing);
            if waited < pause && !now_fits {
                continue;
            }
            let apart = Fill { state: watch::Sender::new(State::Running), gone: CancellationToken::new() };
            match self.try_fill(serial, &apart).await {
                Ok(()) => return self.finish(serial, fill).await,
                Err(error) => {
                    tracing::debug!(serial, %error, "a layer that failed cannot be fetched yet");
                    was_full = error.is_full();
                    fill.state.send_replace(State::Failed(error.problem().into()));
                }
            }
            (pause, waited, free) = ((pause * 2).min(AGAIN.1), Duration::ZERO, self.room());
        }
    }

    /// Bytes that fit on the disk.
    fn room(&self) -> u64 {
        self.store.space().map_or(0, |space| space.bytes_free)
    }

    /// Everything is here.
    async fn finish(&self, serial: u64, fill: &Fill) {
        if let Some(index) = self.meta.layer(serial).and_then(|layer| layer.index) {
            self.broken.lock().remove(&index);
        }
        self.filled.done.fetch_add(1, Ordering::Relaxed);
        fill.state.send_replace(State::Done);
        self.fills.lock().remove(&serial);
        self.give_memory_back().await;
    }

    /// A fill is over: if it was the last one, what all of them took is of no use any more.
    async fn give_memory_back(&self) {
        let is_idle = || {
            let fills = self.fills.lock();
            !fills.values().any(|fill| matches!(*fill.state.borrow(), State::Running | State::Usable))
        };
        if !is_idle() {
            return;
        }
        tokio::time::sleep(IDLE).await;
        if is_idle() {
            let given = blocking(|| {
                memory::give_back();
                Ok::<(), SnapshotError>(())
            });
            given.await.ok();
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

    async fn try_fill(self: &Arc<Self>, serial: u64, fill: &Fill) -> Result<(), FillError> {
        let Some(layer) = self.meta.layer(serial) else {
            return Err(SnapshotError::LayerGone { serial }.into());
        };
        let cold = self.open_cold(&layer).await?;
        if !self.store.is_complete(serial) {
            if self.lazy.is_some() {
                cold.expect_readers();
            }
            let _promise = self.wait_for_room(&cold).await;
            // Until its file has its name, and from then on: what is punched after it was verified is zeros below a native mount.
            let held = cold.hold();
            let began = Instant::now();
            cold.fill().await?;
            let fetched = began.elapsed();
            // Checked bytes in the file are as good as any for a container that starts now: only the record, which says that nothing
            // need be hashed after a crash, waits for the disk.
            fill.state.send_replace(State::Usable);
            self.sync(&cold).await?;
            let synced = began.elapsed();
            cold.verify().await?;
            tracing::debug!(serial, ?fetched, ?synced, verified = ?began.elapsed(), "a layer is on the disk");
            let (store, file) = (Arc::clone(&self.store), Arc::clone(cold.file()));
            blocking(move || store.complete(serial, &file)).await?;
            held.for_good();
        }
        self.store.remove_part(serial)?;
        self.share(serial, cold.index());
        if layer.progress == Progress::Filling {
            let bytes = |counted: &std::sync::atomic::AtomicU64| counted.load(Ordering::Relaxed);
            let (fetched, shared) = (bytes(&cold.progress.fetched), bytes(&cold.progress.shared));
            self.meta.completed(serial, fetched, shared).await?;
        }
        self.store.remove_map(serial)?;
        // One that is watched, by whoever watches it, in the end.
        if !self.is_watched(serial) {
            self.make_native(serial).await?;
        }
        self.was_repaired(serial);
        Ok(())
    }

    /// An error means that nobody knows what the disk holds, nor will a second attempt tell: the kernel reports it once, and forgets
    /// what it could not write.
    async fn sync(&self, cold: &Arc<Cold>) -> Result<(), FillError> {
        let (store, synced) = (Arc::clone(&self.store), Arc::clone(cold));
        let sync = move || Ok::<_, LayerError>(store.sync(synced.serial(), synced.file()));
        match blocking(sync).await? {
            Ok(()) => Ok(()),
            Err(error) => {
                cold.distrust();
                Err(FillError::Sync(error))
            }
        }
    }

    async fn open_cold(&self, layer: &LayerRecord) -> Result<Arc<Cold>, FillError> {
        let cold = self.cold.as_ref().ok_or(FillError::NoStore)?;
        let serial = layer.id.serial;
        if let Some(open) = cold.get(serial) {
            return Ok(open);
        }
        let index = self.index_of(layer).await?;
        let cold = Arc::clone(cold);
        Ok(blocking(move || cold.open(serial, || Some(index.into()))).await?)
    }

    /// The layer index, from beside the image or from the store.
    pub(super) async fn index_of(&self, layer: &LayerRecord) -> Result<LayerIndex, FillError> {
        if let Some(index) = self.sidecar(layer) {
            return Ok(index);
        }
        let cold = self.cold.as_ref().ok_or(FillError::NoStore)?;
        let digest = layer.index.ok_or(FillError::NoIndex)?;
        Ok(cold.supply().content.index(IndexDigest::from_bytes(digest)).await?)
    }

    /// A complete layer image that is attached lazily is read without us from now on.
    pub(super) async fn make_native(self: &Arc<Self>, serial: u64) -> Result<(), FillError> {
        let lock = self.attach_locks.of(serial);
        let _held = lock.lock().await;
        if self.attached.lock().get(&serial) == Some(&How::Lazy) {
            let this = Arc::clone(self);
            blocking(move || this.switch(serial)).await?;
            self.attached.lock().insert(serial, How::Native);
        }
        if let Some(cold) = &self.cold {
            cold.close(serial);
        }
        Ok(())
    }

    fn switch(&self, serial: u64) -> Result<(), LayerError> {
        let attached = self.store.attached()?;
        let device = attached.into_iter().find(|found| found.serial == serial).and_then(|found| found.device);
        match (device, &self.lazy) {
            (Some(device), Some(lazy)) => {
                lazy.to_native(serial, &device, &self.store.image(serial))?;
                if self.must_be_switchable(serial) { Ok(()) } else { self.store.cover(serial) }
            }
            // Unmounted behind our back.
            _ => Ok(()),
        }
    }
}
