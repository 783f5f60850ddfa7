//! Complete layer images that are made incomplete again: to have room, or because the disk has changed them.
//!
//! **Order.** The record says *filling* before the file loses its name, and the device reads through us before the file goes. Every
//! crash between leaves a layer that is recorded as filling and has a complete file: the next start records it as complete again.
//!
//! **Invariants.** A file that was below a mount is never punched: giving a layer up removes its file, once nothing has it open, and
//! what is fetched from then on goes into another one. Only what the store has, and gives at that moment, is given up. What is
//! mounted from its file, without a device between, stays: such a mount cannot be switched.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::filling::FillError;
use super::{How, Layers};
use crate::content::ContentError;
use crate::content::index::LayerIndex;
use crate::layer::LayerError;
use crate::layer::cold::Cold;
use crate::layer::lazy::{self, ColdLayers};
use crate::snapshot::SnapshotError;
use crate::snapshot::metastore::{LayerRecord, Origin, Progress};
use crate::snapshot::stock::blocking;
use crate::sys::loopdev;

/// How long the store has to say that it has chunks and to give one.
const PROOF: Duration = Duration::from_secs(5);
/// The kernel lets go of a file a moment after whoever had it open is done with it.
const LET_GO: (u32, Duration) = (20, Duration::from_millis(10));

impl Layers {
    /// Whether the store has it, so that it can be fetched again, and is read through us meanwhile.
    pub(super) fn can_be_fetched_again(&self, layer: &LayerRecord) -> bool {
        let is_there =
            layer.index.is_some() && (layer.origin == Origin::Fetched || layer.published.is_some());
        let serial = layer.id.serial;
        is_there
            && self.cold.is_some()
            && self.lazy.as_ref().is_some_and(|lazy| !lazy.has_ended())
            && !self
                .meta
                .publish_queue()
                .iter()
                .any(|entry| entry.layer == Some(serial) && entry.dropped.is_none())
    }

    /// Whether a complete layer image is to be attached so that it can be demoted while it is in use: as soon as half of what there
    /// may be is used. Mounted from the file itself it is read more quickly, but then it stays.
    pub(super) fn must_be_switchable(&self, serial: u64) -> bool {
        let Some(cold) = &self.cold else { return false };
        let is_limited = cold.allowance().limit().is_some_and(|limit| cold.allowance().used() > limit / 2);
        is_limited && self.meta.layer(serial).is_some_and(|layer| self.can_be_fetched_again(&layer))
    }

    /// Gives up the data of a complete layer image; how many bytes that freed, `None` if it has to stay.
    pub(super) async fn demote(self: &Arc<Self>, serial: u64) -> Result<Option<u64>, FillError> {
        let lock = self.attach_locks.of(serial);
        let _held = lock.lock().await;
        let Some((layer, device)) = self.demotable(serial).await? else { return Ok(None) };
        let cold = self.cold.as_ref().ok_or(FillError::NoStore)?;
        let index = Arc::new(self.index_of(&layer).await?);
        if !is_given(cold, &index).await? {
            return Ok(None);
        }
        let before = self.store.allocated(serial);
        let fresh = match self.begin_again(serial, &index).await {
            Ok(fresh) => fresh,
            Err(error) => {
                self.store.remove_part(serial)?;
                self.store.remove_map(serial)?;
                return Err(error);
            }
        };
        cold.supply().local.forget(serial);
        self.meta.demoted(serial).await?;
        cold.put(&fresh);
        let (this, below) = (Arc::clone(self), device.clone());
        let gone = blocking(move || this.let_go(serial, below.as_deref())).await;
        if let Ok(true) = gone {
            if device.is_some() {
                self.attached.lock().insert(serial, How::Lazy);
            }
            let freed = before.saturating_sub(self.store.allocated(serial));
            cold.allowance().give(freed);
            self.disk.demotions.fetch_add(1, Ordering::Relaxed);
            tracing::info!(serial, bytes = freed, "the data of a layer was given up for want of room");
            drop(self.fill(serial));
            return Ok(Some(freed));
        }
        // Its file is whole and here: it is recorded so, and read natively again.
        cold.close(serial);
        self.look_below(serial, device.as_deref());
        drop(self.fill(serial));
        Ok(gone.map(|_| None)?)
    }

    /// A complete layer image that can be demoted, with its loop device if it is attached.
    async fn demotable(
        self: &Arc<Self>,
        serial: u64,
    ) -> Result<Option<(Arc<LayerRecord>, Option<PathBuf>)>, FillError> {
        let Some(layer) = self.meta.layer(serial).filter(|layer| layer.progress == Progress::Complete) else {
            return Ok(None);
        };
        if !self.can_be_fetched_again(&layer) {
            return Ok(None);
        }
        let device = self.device(serial).await?;
        let is_attached = self.attached.lock().contains_key(&serial);
        Ok((device.is_some() || !is_attached).then_some((layer, device)))
    }

    async fn device(&self, serial: u64) -> Result<Option<PathBuf>, SnapshotError> {
        let store = Arc::clone(&self.store);
        Ok(blocking(move || store.devices()).await?.remove(&serial))
    }

    /// The layer image with its metadata only, beside the complete one.
    async fn begin_again(&self, serial: u64, index: &Arc<LayerIndex>) -> Result<Arc<Cold>, FillError> {
        let cold = self.cold.as_ref().ok_or(FillError::NoStore)?;
        let (store, layers, index) = (Arc::clone(&self.store), Arc::clone(cold), Arc::clone(index));
        let begin = move || {
            store.write_index(serial, &index.encode())?;
            layers.begin_beside(serial, index)
        };
        let fresh = blocking(begin).await?;
        fresh.fetch(fresh.index().metadata_places()).await?;
        Ok(fresh)
    }

    /// Has a layer image read through us, and removes its complete file; `false` if something else still has that open.
    fn let_go(&self, serial: u64, device: Option<&Path>) -> Result<bool, LayerError> {
        if let Some(device) = device {
            self.switch_back(serial, device, &self.store.image(serial))?;
        }
        let (tries, pause) = LET_GO;
        for _ in 0..tries {
            if self.store.discard_complete(serial)? {
                return Ok(true);
            }
            std::thread::sleep(pause);
        }
        Ok(false)
    }

    fn switch_back(&self, serial: u64, device: &Path, image: &Path) -> Result<(), LayerError> {
        self.store.uncover(serial)?;
        if let Some(lazy) = &self.lazy {
            lazy.to_lazy(serial, device, image)?;
        }
        let below = loopdev::backing_file(device).map_err(|error| LayerError::at(device, error))?;
        match below.as_deref().and_then(lazy::serial_below) {
            Some(found) if found == serial => Ok(()),
            _ => Err(LayerError::Missing(device.to_owned())),
        }
    }

    /// Learns from the kernel how a layer image is attached.
    fn look_below(&self, serial: u64, device: Option<&Path>) {
        let Some(device) = device else { return };
        let below = loopdev::backing_file(device).ok().flatten();
        let how = match below.as_deref().and_then(lazy::serial_below) {
            Some(_) => How::Lazy,
            None => How::Native,
        };
        self.attached.lock().insert(serial, how);
    }

    /// A complete layer image has chunks with wrong bytes: from now on it is read through us, where that can be, until they were
    /// fetched again into the same file and all of it was verified.
    pub(super) async fn doubt(self: &Arc<Self>, serial: u64, damaged: &[usize]) -> Result<(), FillError> {
        let lock = self.attach_locks.of(serial);
        let _held = lock.lock().await;
        let Some(layer) = self.meta.layer(serial).filter(|layer| layer.progress == Progress::Complete) else {
            return Ok(());
        };
        if !self.can_be_fetched_again(&layer) {
            let problem =
                format!("{} of its chunks are damaged on the disk and nobody else has them", damaged.len());
            tracing::error!(serial, diff_id = %layer.facts.diff_id, problem, "remove the image and pull it again");
            self.disk.damaged.lock().insert(serial, problem);
            return Ok(());
        }
        let cold = self.cold.as_ref().ok_or(FillError::NoStore)?;
        let (index, device) = (Arc::new(self.index_of(&layer).await?), self.device(serial).await?);
        let is_attached = self.attached.lock().contains_key(&serial);
        if is_attached && device.is_none() {
            tracing::error!(
                serial,
                chunks = damaged.len(),
                "a damaged layer is mounted from its file and cannot be switched: containers may read wrong bytes until it is repaired"
            );
        }
        cold.supply().local.forget(serial);
        self.disk.demotions.fetch_add(1, Ordering::Relaxed);
        *self.disk.doubted.lock().entry(serial).or_default() += damaged.len() as u64;
        self.meta.demoted(serial).await?;
        let (this, layers, damaged) = (Arc::clone(self), Arc::clone(cold), damaged.to_vec());
        let below = device.clone();
        let switched = blocking(move || {
            this.reopen(&layers, serial, &index, &damaged)?;
            below.map_or(Ok(()), |device| this.switch_back(serial, &device, &this.store.part(serial)))
        })
        .await;
        self.look_below(serial, device.as_deref());
        drop(self.fill(serial));
        Ok(switched?)
    }

    /// The file of a complete layer image is one that is being filled, in which all but these chunks are.
    fn reopen(
        &self,
        layers: &ColdLayers,
        serial: u64,
        index: &Arc<LayerIndex>,
        damaged: &[usize],
    ) -> Result<(), LayerError> {
        let store = &self.store;
        store.write_index(serial, &index.encode())?;
        store.remove_map(serial)?;
        let (map, _) = store.presence(serial, index)?;
        for at in (0..index.chunks().len()).filter(|at| !damaged.contains(at)) {
            map.set(at);
        }
        store.reopen_complete(serial)?;
        layers.close(serial);
        let cold = layers.open(serial, || Some(Arc::clone(index)))?;
        // A mount of the file itself may be in use.
        cold.hold().for_good();
        Ok(())
    }

    /// A layer image is complete again.
    pub(super) fn was_repaired(&self, serial: u64) {
        if let Some(chunks) = self.disk.doubted.lock().remove(&serial) {
            self.disk.repaired.fetch_add(chunks, Ordering::Relaxed);
            tracing::warn!(
                serial,
                chunks,
                "damaged chunks of a layer were fetched again; all of it is verified"
            );
        }
    }
}

/// Whether the store has the data and gives it: what is given up while it does not answer is lost to containers that run.
async fn is_given(cold: &ColdLayers, index: &LayerIndex) -> Result<bool, ContentError> {
    let content = &cold.supply().content;
    let wanted = index.data_chunks().map(|(_, chunk)| chunk);
    let given = async {
        if !content.sample(wanted.clone()).await?.is_empty() {
            return Ok(false);
        }
        if let Some(chunk) = wanted.last() {
            content.chunk(chunk).await?;
        }
        Ok(true)
    };
    tokio::time::timeout(PROOF, given).await.unwrap_or(Err(ContentError::TooLate))
}
