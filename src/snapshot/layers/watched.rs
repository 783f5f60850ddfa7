//! Layer images that are read through us for a while although they are all here, because somebody wants to see what is read.

use std::sync::Arc;

use super::{How, Layers};
use crate::driver::Id;
use crate::layer::cold::Cold;
use crate::layer::lazy::ColdLayers;
use crate::snapshot::metastore::{LayerRecord, Progress};

impl Layers {
    /// Those of them that are read through us, or are going to be: their reads can be seen.
    pub(in crate::snapshot) fn seen_of(&self, layers: &[Id]) -> Vec<Arc<LayerRecord>> {
        if self.lazy.as_ref().is_none_or(|lazy| lazy.has_ended()) {
            return Vec::new();
        }
        let attached = self.attached.lock();
        let is_seen = |layer: &Arc<LayerRecord>| match attached.get(&layer.id.serial) {
            Some(how) => *how == How::Lazy,
            None => layer.progress == Progress::Filling,
        };
        layers.iter().filter_map(|id| self.meta.layer(id.serial)).filter(is_seen).collect()
    }

    /// They are not switched to their local files until [`Layers::unwatch`], and attached from ours.
    pub(in crate::snapshot) fn watch(&self, serials: &[u64]) {
        let mut watched = self.watched.lock();
        serials.iter().for_each(|serial| *watched.entry(*serial).or_default() += 1);
    }

    /// What is complete of them, and watched by nobody else, is switched now.
    pub(in crate::snapshot) async fn unwatch(self: &Arc<Self>, serials: &[u64]) {
        let mut free = Vec::new();
        {
            let mut watched = self.watched.lock();
            for serial in serials {
                if let Some(by) = watched.get_mut(serial) {
                    *by -= 1;
                    if *by == 0 {
                        watched.remove(serial);
                        free.push(*serial);
                    }
                }
            }
        }
        // After that: a fill that comes to its end meanwhile sees that nobody watches.
        for serial in free {
            if self.is_complete(serial)
                && let Err(error) = self.make_native(serial).await
            {
                tracing::warn!(serial, %error, "a layer stays lazy until the next start");
            }
        }
    }

    pub(super) fn is_watched(&self, serial: u64) -> bool {
        self.watched.lock().contains_key(&serial)
    }

    /// The layer image with what of it is here, if it is being filled.
    pub(in crate::snapshot) fn unfilled(&self, serial: u64) -> Option<Arc<Cold>> {
        self.cold.as_ref()?.get(serial).filter(|cold| !cold.is_complete())
    }

    /// The layer images that are not wholly here, where some are read before they are.
    pub(in crate::snapshot) fn lazily(&self) -> Option<&Arc<ColdLayers>> {
        self.cold.as_ref().filter(|_| self.lazy.is_some())
    }
}
