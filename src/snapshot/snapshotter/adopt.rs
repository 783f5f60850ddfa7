//! Prepare with a ref: the snapshot that answers it, found or made.

use std::sync::Arc;

use super::{STAGED_SINCE, Snapshotter};
use crate::content::memory::{Layer, MemoryError};
use crate::driver::{Access, Creation, Id, Mount, Storage};
use crate::oci::ChainId;
use crate::snapshot::hit::HitError;
use crate::snapshot::metastore::{Adopted, LayerChoice, NewSnapshot, Record};
use crate::snapshot::remote::{self, LayerRequest};
use crate::snapshot::snapshotter::Sharing;
use crate::snapshot::stock::blocking;
use crate::snapshot::{Key, Kind, Labels, SnapshotError, Timestamp};

impl Snapshotter {
    /// The committed snapshot that holds the requested layer on this parent, made now if the source has the layer. Every
    /// failure is a miss: the layer is then pulled as with any snapshotter.
    pub(super) async fn find_layer(
        &self,
        request: &LayerRequest,
        parent: Option<&Key>,
        labels: &Labels,
    ) -> Option<Key> {
        if let (Some(traces), Some(parent)) = (&self.remote.traces, parent) {
            traces.is_below_another(parent);
        }
        or_miss(&request.chain, self.try_find_layer(request, parent, labels).await)
    }

    async fn try_find_layer(
        &self,
        request: &LayerRequest,
        parent: Option<&Key>,
        labels: &Labels,
    ) -> Result<Option<Key>, LayerError> {
        let chain = request.chain.to_string();
        // One at a time for a layer on a parent: the others find what the first one made.
        let lock = self.layer_locks.of((chain.clone(), parent.cloned()));
        let _held = lock.lock().await;
        let there = self.meta.answering(&chain, parent);
        if let (Some(record), Sharing::Node) = (&there, self.policy.sharing) {
            return Ok(Some(record.info.name.clone()));
        }
        let listed = match &self.remote.source {
            Some(source) => source.lookup(&request.chain).await?,
            None => None,
        };
        if let Some(layer) = listed {
            return match there {
                Some(record) => Ok(Some(record.info.name.clone())),
                None => {
                    let id = self.stock.take().await?;
                    let filled = self.fill_layer(id, layer, parent).await;
                    let adopted =
                        self.adopt(id, filled.map(|()| LayerChoice::Own), request, parent, labels).await;
                    Ok(Some(adopted?.info.name.clone()))
                }
            };
        }
        let Some(hits) = &self.hits else { return Ok(None) };
        self.asked_for(&request.chain, parent.is_none());
        let Some(hit) = hits.find(&request.chain, parent.is_none()).await? else { return Ok(None) };
        if self.driver.storage() == Storage::Volumes {
            let made = match there {
                Some(record) => Ok(record),
                None => self.make_volume(hits, &hit, request, parent, labels).await,
            };
            hits.throw_away(hit).await;
            return Ok(Some(made?.info.name.clone()));
        }
        let adopted = match there {
            Some(record) => Ok(record),
            None => match self.stock.take().await {
                Ok(id) => self.adopt(id, Ok(hit.layer.clone()), request, parent, labels).await,
                Err(error) => Err(error),
            },
        };
        let record = hits.adopted(hit, adopted).await?;
        if let Some(pins) = &self.remote.pins {
            pins.found(&request.chain, labels, &record);
        }
        if let Some(traces) = &self.remote.traces {
            traces.found(&record.info.name);
        }
        Ok(Some(record.info.name.clone()))
    }

    /// Mounts that tell containerd that the requested layer need not be fetched, of a new active snapshot that has it; `None` if
    /// that is no answer here. Nobody mounts them: containerd commits the snapshot on its parent.
    pub(super) async fn stage_layer(
        &self,
        chain: &ChainId,
        key: &Key,
        labels: &Labels,
    ) -> Option<Vec<Mount>> {
        if self.driver.storage() == Storage::Volumes {
            // Nothing can be put below a volume when it is committed.
            return None;
        }
        let version = self.containerd.lock().as_deref().and_then(crate::containerd::numbers);
        if version.is_none_or(|version| version < STAGED_SINCE) {
            return None;
        }
        or_miss(chain, self.try_stage_layer(chain, key, labels).await)
    }

    async fn try_stage_layer(
        &self,
        chain: &ChainId,
        key: &Key,
        labels: &Labels,
    ) -> Result<Option<Vec<Mount>>, LayerError> {
        let Some(hits) = &self.hits else { return Ok(None) };
        self.asked_for(chain, false);
        let lock = self.layer_locks.of((chain.to_string(), None));
        let _held = lock.lock().await;
        let Some(hit) = hits.find(chain, false).await? else { return Ok(None) };
        let created = match self.stock.take().await {
            Ok(id) => {
                let (key, labels, now) = (key.clone(), labels.clone(), Timestamp::now());
                let new = NewSnapshot { id, key, parent: None, kind: Kind::Active, labels, now };
                self.record(new, hit.layer.clone(), None).await
            }
            Err(error) => Err(error),
        };
        let record = hits.adopted(hit, created).await?;
        if let Some(pins) = &self.remote.pins {
            pins.found(chain, labels, &record);
        }
        let Some((record, stack)) = self.meta.get_with_stack(&record.info.name) else { return Ok(None) };
        Ok(Some(self.mounts_with(Access::ReadOnly, &record, &stack)?))
    }

    /// Records the committed snapshot of `id` that answers the request and consists of `layer`, unless another does by now.
    async fn adopt(
        &self,
        id: Id,
        layer: Result<LayerChoice, SnapshotError>,
        request: &LayerRequest,
        parent: Option<&Key>,
        labels: &Labels,
    ) -> Result<Arc<Record>, SnapshotError> {
        let adopted = match (layer, Key::new(&remote::committed_name(id.serial, &request.chain))) {
            (Ok(layer), Ok(key)) => {
                let (parent, labels) = (parent.cloned(), labels.clone());
                let new =
                    NewSnapshot { id, key, parent, kind: Kind::Committed, labels, now: Timestamp::now() };
                self.meta.adopt(new, request.chain.to_string(), layer).await
            }
            (Err(error), _) | (_, Err(error)) => Err(error),
        };
        match adopted {
            Ok(Adopted::Created(record)) => {
                self.committed.notify_one();
                Ok(record)
            }
            Ok(Adopted::AlreadyThere(record)) => {
                self.meta.give_up(id).await;
                Ok(record)
            }
            Err(error) => {
                self.meta.give_up(id).await;
                Err(error)
            }
        }
    }

    async fn fill_layer(&self, id: Id, layer: Layer, parent: Option<&Key>) -> Result<(), SnapshotError> {
        self.make_storage(Creation::active(id, None), parent).await?;
        let driver = Arc::clone(&self.driver);
        blocking(move || driver.fill(id, &mut |dir| layer.write_to(dir))).await
    }
}

/// Every failure is a miss.
fn or_miss<T>(chain: &ChainId, found: Result<Option<T>, LayerError>) -> Option<T> {
    found.unwrap_or_else(|error| {
        tracing::warn!(%chain, %error, "remote layer not usable; it is pulled instead");
        None
    })
}

/// Why a remote layer could not be used. Never reaches containerd.
#[derive(Debug, thiserror::Error)]
enum LayerError {
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Hit(#[from] HitError),
}
