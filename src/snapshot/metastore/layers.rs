//! The records of layer images on this node, and of what is to be published.
//!
//! A layer image has an [`Id`] of its own, Ready from the moment its record is there. Snapshots refer to it; one that no
//! snapshot refers to is *unclaimed*: a cache, never listed, removed when room is wanted.

use std::sync::Arc;

use super::index::Change;
use super::{Done, MetaStore, OpError, Room, layer_tables};
use crate::driver::Id;
use crate::image::Facts;
use crate::oci::{ChainId, Digest};
use crate::snapshot::{Key, SnapshotError, Timestamp};

/// Where a layer image came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Origin {
    /// Made on this node from a blob whose diff ID was checked.
    Applied,
    /// From the store, on its publisher's word.
    Fetched,
}

/// Whether all bytes of a layer image are on this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Its metadata is; data is still being fetched.
    Filling,
    /// They are, checked and durable.
    Complete,
}

/// One layer image as recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerRecord {
    /// Its storage.
    pub id: Id,
    /// What it is.
    pub facts: Facts,
    /// Where it came from.
    pub origin: Origin,
    /// Whether it is all here.
    pub progress: Progress,
    /// The compressed blob it was made from.
    pub blob: Option<Digest>,
    /// Its layer index, once that is known.
    pub index: Option<[u8; 32]>,
    /// When it was last known to be durable in the store.
    pub published: Option<Timestamp>,
    /// When a snapshot last began to use it.
    pub used: Timestamp,
    /// Bytes that came from the store.
    pub fetched: u64,
    /// Bytes that other layer images of this node had.
    pub shared: u64,
}

/// A layer image to be recorded; its Id is Pending until then.
#[derive(Debug, Clone)]
pub struct NewLayer {
    /// Its storage.
    pub id: Id,
    /// What it is.
    pub facts: Facts,
    /// Where it came from.
    pub origin: Origin,
    /// Whether it is all here.
    pub progress: Progress,
    /// The compressed blob it was made from.
    pub blob: Option<Digest>,
    /// Its layer index.
    pub index: Option<[u8; 32]>,
    /// When.
    pub now: Timestamp,
}

/// Which layer image a snapshot is to use.
#[derive(Debug, Clone)]
pub enum LayerChoice {
    /// None: its own directory.
    Own,
    /// One that is recorded.
    Known(Id),
    /// One that is recorded with it.
    New(NewLayer),
}

/// A layer that is to be published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishEntry {
    /// What it makes of the layers below it.
    pub chain: ChainId,
    /// The stack below it; none for the first layer of an image.
    pub below: Option<ChainId>,
    /// containerd's namespace, where the blob is.
    pub namespace: String,
    /// Its image, if there is one.
    pub layer: Option<u64>,
    /// When it was queued.
    pub added: Timestamp,
    /// How often it was tried.
    pub attempts: u32,
    /// Given up: why.
    pub dropped: Option<String>,
    /// What went wrong last.
    pub message: String,
}

impl MetaStore {
    /// The layer image of this serial.
    pub fn layer(&self, serial: u64) -> Option<Arc<LayerRecord>> {
        self.index.read().layer(serial).cloned()
    }

    /// All layer images, by serial.
    pub fn layers(&self) -> Vec<Arc<LayerRecord>> {
        self.index.read().layers()
    }

    /// The layer image with this content from there, if it is on this node.
    pub fn layer_of(&self, facts: &Facts, origin: Origin) -> Option<Arc<LayerRecord>> {
        self.index.read().layer_of(facts, origin).cloned()
    }

    /// The complete layer image that was made from this blob, if it depends on nothing else.
    pub fn layer_of_blob(&self, blob: &Digest) -> Option<Arc<LayerRecord>> {
        let index = self.index.read();
        index.layers().into_iter().find(|layer| {
            let same = layer.blob.as_ref() == Some(blob) && layer.origin == Origin::Applied;
            same && layer.progress == Progress::Complete && layer.facts.attributes.is_none()
        })
    }

    /// For each layer image some snapshot uses: how many do.
    pub fn claims(&self) -> std::collections::HashMap<u64, usize> {
        self.index.read().claims()
    }

    /// The layer images below active snapshots and views.
    pub fn layers_in_use(&self) -> std::collections::HashSet<u64> {
        self.index.read().layers_in_use()
    }

    /// The snapshot whose storage this is.
    pub fn by_serial(&self, serial: u64) -> Option<Arc<super::Record>> {
        self.index.read().by_serial(serial)
    }

    /// Records that an active snapshot's content is this layer image. One with the same content that is recorded already takes
    /// its place: the answer says which it is, and an Id that was offered for nothing is still Pending.
    pub async fn applied(&self, key: Key, layer: LayerChoice) -> Result<Arc<LayerRecord>, SnapshotError> {
        self.submit(Room::Takes, move |db, _| layer_tables::applied(db, &key, &layer)).await
    }

    /// All bytes of this layer image are here, durable; so many came from the store and from other layer images.
    pub async fn completed(&self, serial: u64, fetched: u64, shared: u64) -> Result<(), SnapshotError> {
        self.change_layer(serial, move |layer| {
            layer.progress = Progress::Complete;
            layer.fetched = fetched;
            layer.shared = shared;
        })
        .await
    }

    /// Not all bytes of this layer image are here any more.
    pub async fn demoted(&self, serial: u64) -> Result<(), SnapshotError> {
        self.change_layer(serial, |layer| layer.progress = Progress::Filling).await
    }

    /// This layer image has this index, and is durable in the store since `published`.
    pub async fn indexed(
        &self,
        serial: u64,
        digest: [u8; 32],
        published: Option<Timestamp>,
    ) -> Result<(), SnapshotError> {
        self.change_layer(serial, move |layer| {
            layer.index = Some(digest);
            layer.published = published.or(layer.published);
        })
        .await
    }

    /// Layer images that nobody claims are to be removed. One that was claimed meanwhile stays.
    pub async fn evict(&self, serials: Vec<u64>) -> Result<(), SnapshotError> {
        self.submit(Room::Frees, move |db, _| layer_tables::evict(db, &serials)).await
    }

    /// What is to be published, oldest first, what was given up included.
    pub fn publish_queue(&self) -> Vec<PublishEntry> {
        self.index.read().publish_queue()
    }

    /// Queues a layer to be published; changes nothing if its chain is queued.
    pub async fn enqueue(&self, entry: PublishEntry) -> Result<(), SnapshotError> {
        self.submit(Room::Takes, move |db, _| layer_tables::enqueue(db, &entry)).await
    }

    /// The entry as it is now, or gone.
    pub async fn requeue(&self, chain: ChainId, entry: Option<PublishEntry>) -> Result<(), SnapshotError> {
        self.submit(Room::Frees, move |db, _| layer_tables::requeue(db, &chain, entry.as_ref())).await
    }

    async fn change_layer(
        &self,
        serial: u64,
        change: impl Fn(&mut LayerRecord) + Send + 'static,
    ) -> Result<(), SnapshotError> {
        self.submit(Room::Takes, move |db, _| {
            let Some(mut layer) = layer_tables::find(db, serial)? else {
                return Ok(Done { answer: (), changes: Vec::new() });
            };
            change(&mut layer);
            layer_tables::write(db, &layer)?;
            Ok::<_, OpError>(Done { answer: (), changes: vec![Change::Layer(Arc::new(layer))] })
        })
        .await
    }
}
