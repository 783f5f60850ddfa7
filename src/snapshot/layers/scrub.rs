//! Complete layer images are read again, slowly, past every cache, and compared with their index: disks change what they hold.
//!
//! What is found damaged is fetched again ([`Layers::doubt`]). A layer that was made here and was not published has no index:
//! nothing can be said of it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::Instant;

use super::filling::FillError;
use super::{Layers, Progress};
use crate::chunk::{ChunkId, ChunkRef};
use crate::content::index::LayerIndex;
use crate::layer::LayerError;
use crate::snapshot::metastore::LayerRecord;
use crate::snapshot::stock::blocking;
use crate::sys::direct::Direct;

/// How often it is looked whether there is something to check.
const LOOK: Duration = Duration::from_secs(60);

impl Layers {
    /// For ever.
    pub(super) async fn scrub(self: &Arc<Self>) {
        if self.upkeep.scrub_rate == 0 {
            return std::future::pending().await;
        }
        let mut looked = std::collections::HashMap::new();
        loop {
            for layer in self.meta.layers() {
                let is_due = looked
                    .get(&layer.id.serial)
                    .is_none_or(|at: &Instant| at.elapsed() >= self.upkeep.scrub_every);
                if !is_due || layer.progress != Progress::Complete {
                    continue;
                }
                if let Err(error) = self.scrub_layer(&layer).await {
                    tracing::warn!(serial = layer.id.serial, %error, "a layer cannot be checked now");
                }
                looked.insert(layer.id.serial, Instant::now());
            }
            looked.retain(|serial, _| self.meta.layer(*serial).is_some());
            tokio::time::sleep(self.upkeep.scrub_every.clamp(Duration::from_millis(100), LOOK)).await;
        }
    }

    async fn scrub_layer(self: &Arc<Self>, layer: &LayerRecord) -> Result<(), FillError> {
        let serial = layer.id.serial;
        let Some(index) = self.sidecar(layer) else { return Ok(()) };
        let damaged = self.damaged(serial, &index).await?;
        if damaged.is_empty() {
            self.disk.damaged.lock().remove(&serial);
            return Ok(());
        }
        self.disk.found.fetch_add(damaged.len() as u64, Ordering::Relaxed);
        tracing::error!(
            serial, diff_id = %layer.facts.diff_id, chunks = damaged.len(), first = %index.chunk(damaged[0]).1.id,
            "the disk has changed a layer; it is fetched again"
        );
        self.doubt(serial, &damaged).await
    }

    /// The chunks that the disk has other bytes of. As soon as there is one, there is no time to lose.
    async fn damaged(&self, serial: u64, index: &LayerIndex) -> Result<Vec<usize>, FillError> {
        let path = self.store.image(serial);
        let opened = self.store.read(serial)?;
        let at_path = |error| LayerError::at(&path, error);
        let disk = Arc::new(Direct::open(&opened).map_err(at_path)?);
        drop(opened);
        let mut damaged = Vec::new();
        for (at, (offset, chunk)) in index.chunks().enumerate() {
            let began = Instant::now();
            let (disk, path) = (Arc::clone(&disk), path.clone());
            let read = move || is_right(&disk, offset, chunk).map_err(|error| LayerError::at(&path, error));
            let right = blocking(read).await?;
            if !right {
                damaged.push(at);
            }
            self.disk.scrubbed.fetch_add(chunk.length.into(), Ordering::Relaxed);
            if damaged.is_empty() {
                let pace = f64::from(chunk.length) / self.upkeep.scrub_rate as f64;
                tokio::time::sleep_until(began + Duration::from_secs_f64(pace)).await;
            }
        }
        Ok(damaged)
    }
}

/// An error of the disk is damage, too.
fn is_right(disk: &Direct, offset: u64, chunk: ChunkRef) -> std::io::Result<bool> {
    match disk.read(offset, chunk.length as usize) {
        Ok(found) => Ok(ChunkId::of(found.as_ref()) == chunk.id),
        Err(error) if error.raw_os_error() == Some(5) => Ok(false),
        Err(error) => Err(error),
    }
}
