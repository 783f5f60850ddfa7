//! Layer images that were attached while their bytes were still in memory, from being written: as long as they are there, they are
//! read from there. Later that would only be a second page cache on the way.

use std::sync::Arc;
use std::time::Duration;

use super::Layers;
use crate::layer::LayerError;
use crate::snapshot::SnapshotError;
use crate::snapshot::stock::blocking;

/// How often it is looked for some. It costs nothing where none was attached since.
const LOOK: Duration = Duration::from_secs(30);

impl Layers {
    /// For ever.
    pub(super) async fn settle(self: &Arc<Self>) {
        let mut warned = false;
        loop {
            tokio::time::sleep(LOOK).await;
            match self.settle_all().await {
                Ok(()) => warned = false,
                // It is tried again, and said once.
                Err(error) if !std::mem::replace(&mut warned, true) => {
                    tracing::warn!(%error, "layer images go on being read through two page caches");
                }
                Err(_) => {}
            }
        }
    }

    async fn settle_all(self: &Arc<Self>) -> Result<(), SnapshotError> {
        let store = Arc::clone(&self.store);
        let mut settled = Ok(());
        for serial in blocking(move || store.cached()).await? {
            let lock = self.attach_locks.of(serial);
            let _held = lock.lock().await;
            let store = Arc::clone(&self.store);
            // One that cannot be changed is none of the others' business.
            if let Err(error) = blocking(move || -> Result<(), LayerError> { store.settle(serial) }).await {
                settled = Err(error);
            }
        }
        settled
    }
}
