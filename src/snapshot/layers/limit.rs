//! What all layer images may take (`layers.limit`): who gives up room, and which fills may begin.
//!
//! **Who.** First what no snapshot uses, then complete layers that nobody reads, then chunks of layers that are read through us, then
//! complete layers that are read. Of each the one that was read longest ago; how much a native layer is read is known by its loop
//! device's own count. A fill begins only if all of its layer fits, with an eighth of the limit to spare, so that it never makes
//! others give up anything: what is fetched because it is read does.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::{Layers, Progress};
use crate::layer::LayerError;
use crate::layer::cold::Cold;
use crate::snapshot::SnapshotError;
use crate::snapshot::report::DiskCounts;
use crate::snapshot::stock::blocking;
use crate::sys::loopdev;

/// How often it is looked how much is used, while nobody needs room; and how often at most.
const LOOK: (Duration, Duration) = (Duration::from_secs(10), Duration::from_millis(500));
/// What was not read for so long is given up for what is read now.
const IDLE: Duration = Duration::from_secs(10);
/// How long what could not be given up is left alone.
const REFUSED: Duration = Duration::from_secs(20);
/// How often a fill looks whether there is room.
const WAIT: Duration = Duration::from_secs(2);
/// What is missing of a layer that is filled without asking.
const LITTLE: u64 = 1 << 20;

/// There is room for all of a layer image as long as this lives.
pub(super) struct Promise<'a> {
    layers: &'a Layers,
    serial: u64,
}

impl Drop for Promise<'_> {
    fn drop(&mut self) {
        self.layers.disk.promised.lock().remove(&self.serial);
        self.layers.disk.waiting.lock().remove(&self.serial);
    }
}

impl Layers {
    /// What was given up, checked and repaired since the daemon started.
    pub fn disk_counts(&self) -> DiskCounts {
        use std::sync::atomic::Ordering::Relaxed;
        let disk = &self.disk;
        let allowance = self.cold.as_ref().map(|cold| cold.allowance());
        DiskCounts {
            limit: allowance.and_then(|allowance| allowance.limit()),
            given_up: allowance.map_or(0, |allowance| allowance.punched()),
            demotions: disk.demotions.load(Relaxed),
            scrubbed: disk.scrubbed.load(Relaxed),
            damaged: disk.found.load(Relaxed),
            repaired: disk.repaired.load(Relaxed),
        }
    }

    /// Returns when there is room for all of it.
    pub(super) async fn wait_for_room(&self, cold: &Arc<Cold>) -> Promise<'_> {
        let serial = cold.serial();
        let promise = Promise { layers: self, serial };
        while !self.promise(cold) {
            self.disk.waiting.lock().insert(serial);
            tokio::time::sleep(WAIT).await;
        }
        self.disk.waiting.lock().remove(&serial);
        promise
    }

    fn promise(&self, cold: &Arc<Cold>) -> bool {
        let Some(allowance) = self.cold.as_ref().map(|layers| layers.allowance()) else { return true };
        let mut promised = self.disk.promised.lock();
        let missing = cold.missing();
        let others: u64 = promised.values().map(|cold| cold.missing()).sum();
        // Nothing can be read that is not here where it cannot be read lazily.
        let fits = self.lazy.is_none()
            || missing <= LITTLE
            || allowance.limit().is_none_or(|limit| allowance.used() + others + missing <= limit / 8 * 7);
        if fits {
            promised.insert(cold.serial(), Arc::clone(cold));
        }
        fits
    }

    /// For ever.
    pub(super) async fn keep_within_limit(self: &Arc<Self>) {
        let limited = self.cold.as_ref().map(|cold| cold.allowance()).filter(|room| room.limit().is_some());
        let Some(allowance) = limited else { return std::future::pending().await };
        if self.lazy.is_none() {
            tracing::warn!("layers.limit holds for unused layers only: others cannot be read lazily here");
        }
        loop {
            if let Err(error) = self.make_room().await {
                tracing::warn!(%error, "cannot keep layer images within their limit yet");
            }
            let (idle, least) = LOOK;
            tokio::select! {
                () = allowance.pressure.notified() => {}
                () = tokio::time::sleep(idle) => {}
            }
            tokio::time::sleep(least).await;
        }
    }

    /// Brings what is used below the limit, if that can be.
    pub async fn make_room(self: &Arc<Self>) -> Result<(), SnapshotError> {
        let Some(cold) = self.cold.clone() else { return Ok(()) };
        let is_pressed = cold.allowance().was_pressed();
        let mut over = self.measure().await?;
        if over > 0 {
            self.remove_unclaimed(over).await?;
            self.detach_unused().await;
            over = self.measure().await?;
        }
        if over == 0 && !is_pressed {
            return Ok(());
        }
        let coldest = self.coldest().await?;
        // For what is read now a single one is given up at a time.
        let mut wanted = over.max(1);
        for (serial, _) in coldest.iter().filter(|(_, idle)| *idle) {
            wanted = wanted.saturating_sub(self.try_demote(*serial).await);
            if wanted == 0 {
                break;
            }
        }
        over = self.measure().await?;
        if over > 0 {
            let allowance = Arc::clone(cold.allowance());
            blocking(move || Ok::<_, LayerError>(allowance.make_room(over))).await?;
            over = self.measure().await?;
        }
        for (serial, _) in coldest.iter().filter(|(_, idle)| !idle) {
            if over == 0 {
                break;
            }
            over = over.saturating_sub(self.try_demote(*serial).await);
        }
        if over > 0 {
            tracing::warn!(
                bytes = over,
                "layer images take more than their limit: what is left cannot be given up"
            );
        }
        Ok(())
    }

    /// How many bytes more than the limit are used.
    async fn measure(self: &Arc<Self>) -> Result<u64, SnapshotError> {
        let Some(allowance) = self.cold.as_ref().map(|cold| Arc::clone(cold.allowance())) else {
            return Ok(0);
        };
        let this = Arc::clone(self);
        blocking(move || {
            let before = allowance.estimate();
            let used = this.meta.layers().iter().map(|layer| this.store.allocated(layer.id.serial)).sum();
            allowance.correct(before, used);
            Ok::<_, LayerError>(allowance.used().saturating_sub(allowance.limit().unwrap_or(u64::MAX)))
        })
        .await
    }

    async fn remove_unclaimed(self: &Arc<Self>, bytes: u64) -> Result<(), SnapshotError> {
        for serial in self.evict(u64::MAX, bytes).await? {
            let this = Arc::clone(self);
            blocking(move || this.free(serial)).await?;
        }
        Ok(())
    }

    /// How many bytes that freed.
    async fn try_demote(self: &Arc<Self>, serial: u64) -> u64 {
        match self.demote(serial).await {
            Ok(Some(freed)) => return freed,
            Ok(None) => tracing::debug!(serial, "a layer cannot be given up now"),
            Err(error) => tracing::warn!(serial, %error, "the data of a layer cannot be given up now"),
        }
        self.disk.refused.lock().insert(serial, Instant::now());
        0
    }

    /// Complete layer images that can be given up, the one that was read longest ago first, and whether nobody reads it now.
    async fn coldest(self: &Arc<Self>) -> Result<Vec<(u64, bool)>, SnapshotError> {
        let store = Arc::clone(&self.store);
        let devices = blocking(move || {
            let with_reads =
                |(serial, device): (u64, PathBuf)| loopdev::reads(&device).map(|reads| (serial, reads)).ok();
            Ok::<_, LayerError>(
                store.devices()?.into_iter().filter_map(with_reads).collect::<HashMap<_, _>>(),
            )
        })
        .await?;
        let mut seen = self.disk.reads.lock();
        seen.retain(|serial, _| devices.contains_key(serial));
        for (serial, reads) in devices {
            let known = seen.entry(serial).or_insert((reads, Instant::now()));
            if known.0 != reads {
                *known = (reads, Instant::now());
            }
        }
        let mut refused = self.disk.refused.lock();
        refused.retain(|_, since| since.elapsed() < REFUSED);
        let attached = self.attached.lock();
        let mut coldest: Vec<_> = (self.meta.layers().into_iter())
            .filter(|layer| layer.progress == Progress::Complete && self.can_be_fetched_again(layer))
            .filter(|layer| !self.is_kept(layer.id.serial))
            .filter(|layer| !refused.contains_key(&layer.id.serial))
            // Mounted from its file.
            .filter(|layer| seen.contains_key(&layer.id.serial) || !attached.contains_key(&layer.id.serial))
            .map(|layer| (seen.get(&layer.id.serial).map(|(_, since)| *since), layer.used, layer.id.serial))
            .collect();
        coldest.sort();
        let is_idle = |since: Option<Instant>| since.is_none_or(|since| since.elapsed() >= IDLE);
        Ok(coldest.into_iter().map(|(since, _, serial)| (serial, is_idle(since))).collect())
    }
}
