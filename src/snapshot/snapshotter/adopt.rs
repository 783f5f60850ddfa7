//! Prepare with a ref: the committed snapshot that answers it, found or made.

use std::sync::Arc;

use super::Snapshotter;
use crate::content::memory::{Layer, MemoryError};
use crate::driver::Id;
use crate::oci::ChainId;
use crate::snapshot::hit::{Hit, HitError};
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
        match self.try_find_layer(request, parent, labels).await {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(chain = %request.chain, %error, "remote layer not usable; it is pulled instead");
                None
            }
        }
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
                None => self.adopt_tree(&request.chain, layer, parent, labels).await.map(Some),
            };
        }
        let Some(hits) = &self.hits else { return Ok(None) };
        let Some(hit) = hits.find(&request.chain).await? else { return Ok(None) };
        let adopted = match there {
            Some(record) => Ok(record),
            None => self.adopt_hit(&request.chain, &hit, parent, labels).await,
        };
        // Recorded by somebody else meanwhile, or not at all.
        let used = adopted.as_ref().ok().and_then(|record| record.layer);
        if let Some(id) = hit.reserved.filter(|id| used != Some(id.serial)) {
            hits.give_up(id).await;
        }
        let record = adopted?;
        hits.adopted(&record, hit.reserved);
        Ok(Some(record.info.name.clone()))
    }

    /// The committed snapshot of a layer that the store has.
    async fn adopt_hit(
        &self,
        chain: &ChainId,
        hit: &Hit,
        parent: Option<&Key>,
        labels: &Labels,
    ) -> Result<Arc<Record>, LayerError> {
        let id = self.stock.take().await?;
        let adopted = match Key::new(&remote::committed_name(id.serial, chain)) {
            Ok(key) => {
                let (parent, labels) = (parent.cloned(), labels.clone());
                let new =
                    NewSnapshot { id, key, parent, kind: Kind::Committed, labels, now: Timestamp::now() };
                self.meta.adopt(new, chain.to_string(), hit.layer.clone()).await
            }
            Err(error) => Err(error),
        };
        match adopted {
            Ok(Adopted::Created(record)) => {
                self.committed.notify_one();
                Ok(record)
            }
            Ok(Adopted::AlreadyThere(record)) => {
                self.stock.discard(id).await;
                Ok(record)
            }
            Err(error) => {
                self.stock.discard(id).await;
                Err(error.into())
            }
        }
    }

    async fn adopt_tree(
        &self,
        chain: &ChainId,
        layer: Layer,
        parent: Option<&Key>,
        labels: &Labels,
    ) -> Result<Key, LayerError> {
        let id = self.stock.take().await?;
        let adopted = match self.fill_layer(id, layer, parent).await {
            Ok(()) => {
                let key = Key::new(&remote::committed_name(id.serial, chain))?;
                let (parent, labels) = (parent.cloned(), labels.clone());
                let new =
                    NewSnapshot { id, key, parent, kind: Kind::Committed, labels, now: Timestamp::now() };
                self.meta.adopt(new, chain.to_string(), LayerChoice::Own).await
            }
            Err(error) => Err(error),
        };
        match adopted {
            Ok(Adopted::Created(record)) => {
                self.committed.notify_one();
                Ok(record.info.name.clone())
            }
            Ok(Adopted::AlreadyThere(record)) => {
                self.stock.discard(id).await;
                Ok(record.info.name.clone())
            }
            Err(error) => {
                self.stock.discard(id).await;
                Err(error.into())
            }
        }
    }

    async fn fill_layer(&self, id: Id, layer: Layer, parent: Option<&Key>) -> Result<(), SnapshotError> {
        self.make_storage(id, parent, None).await?;
        let driver = Arc::clone(&self.driver);
        blocking(move || driver.fill(id, &mut |dir| layer.write_to(dir))).await
    }
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
