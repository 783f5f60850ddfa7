//! Where the chunks of a layer image come from: another layer of this node if one has it, else the store.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use super::LayerStore;
use super::chunks::LocalChunks;
use crate::chunk::ChunkRef;
use crate::content::{ContentError, ContentStore};
use crate::sys::blocking;

/// How far a layer image is, in plain bytes.
#[derive(Debug, Default)]
pub struct FillProgress {
    /// Bytes that came from the store.
    pub fetched: AtomicU64,
    /// Bytes that another layer of this node had.
    pub shared: AtomicU64,
    /// Bytes that were there already.
    pub kept: AtomicU64,
    /// Bytes that were there and were given up.
    pub evicted: AtomicU64,
}

impl FillProgress {
    /// Bytes that are present.
    pub fn present(&self) -> u64 {
        let came: u64 =
            [&self.fetched, &self.shared, &self.kept].iter().map(|n| n.load(Ordering::Relaxed)).sum();
        came.saturating_sub(self.evicted.load(Ordering::Relaxed))
    }
}

/// The same of all layers, since the daemon started.
#[derive(Debug, Default)]
pub struct SupplyCounts {
    fetched: AtomicU64,
    shared: AtomicU64,
}

impl SupplyCounts {
    /// Plain bytes that came from the store, and from other layers of this node.
    pub fn read(&self) -> (u64, u64) {
        (self.fetched.load(Ordering::Relaxed), self.shared.load(Ordering::Relaxed))
    }
}

/// Whom a chunk came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Supplier {
    /// The store.
    Store,
    /// Another layer image of this node.
    Node,
}

/// What chunks are had from.
#[derive(Debug, Clone)]
pub struct Supply {
    /// Where the files are.
    pub layers: Arc<LayerStore>,
    /// What this node has already.
    pub local: Arc<LocalChunks>,
    /// Where the rest comes from.
    pub content: Arc<ContentStore>,
    /// What it gave.
    pub counts: Arc<SupplyCounts>,
}

impl Supply {
    /// Of a node of whose layers nothing is known yet.
    pub fn new(layers: &Arc<LayerStore>, content: &Arc<ContentStore>) -> Supply {
        let (layers, content) = (Arc::clone(layers), Arc::clone(content));
        Supply { layers, local: Arc::default(), content, counts: Arc::default() }
    }

    /// The checked bytes of a chunk.
    pub async fn get(&self, chunk: ChunkRef) -> Result<(Bytes, Supplier), ContentError> {
        if self.local.contains(&chunk.id) {
            let (local, layers) = (Arc::clone(&self.local), Arc::clone(&self.layers));
            let read = move || Ok::<_, std::io::Error>(local.read(chunk, |serial| layers.read(serial).ok()));
            if let Ok(Some(bytes)) = blocking(read).await {
                self.counts.shared.fetch_add(chunk.length.into(), Ordering::Relaxed);
                return Ok((bytes.into(), Supplier::Node));
            }
        }
        let bytes = self.content.chunk(chunk).await?;
        self.counts.fetched.fetch_add(chunk.length.into(), Ordering::Relaxed);
        Ok((bytes, Supplier::Store))
    }
}
