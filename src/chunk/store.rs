//! Where chunks can be had, kept and deleted: three traits, each wider than the one before, so that holding one is permission.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use super::{ChunkError, ChunkId, ChunkRef};
pub use crate::object::Deletion;

/// Reading chunks.
#[async_trait]
pub trait ChunkStore: Send + Sync + std::fmt::Debug {
    /// The plain bytes of a chunk (**C1**), exactly `chunk.length` of them.
    async fn get(&self, chunk: ChunkRef) -> Result<Bytes, ChunkError>;

    /// Whether the store has it; does not look at its bytes.
    async fn contains(&self, id: ChunkId) -> Result<bool, ChunkError>;
}

/// Adding chunks.
#[async_trait]
pub trait ChunkSink: ChunkStore {
    /// Stores a chunk and answers its stored size in bytes; durable on return. Doing it twice is harmless. `plain` must be
    /// whole blocks, at most [`super::MAX_CHUNK`]; its hash must be `id`.
    async fn put(&self, id: ChunkId, plain: Bytes) -> Result<u64, ChunkError>;

    /// Makes an existing chunk as young as a new one, so that a collection does not take it (**C3**); "as young" to within
    /// [`RENEWED`]. A chunk that is not there, or is there damaged, is an error: put it.
    async fn renew(&self, id: ChunkId) -> Result<(), ChunkError>;
}

/// A chunk of at most this age, by the store's clock, is young already: renewing it does nothing. Far less than any grace
/// period of a collection may be.
pub const RENEWED: std::time::Duration = std::time::Duration::from_secs(3600);

/// A chunk as a listing shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// Its id.
    pub id: ChunkId,
    /// Its size in the store, in bytes.
    pub size: u64,
    /// When it was written or renewed last, seconds since 1970 UTC by the store's clock.
    pub modified: i64,
}

/// Deleting chunks.
#[async_trait]
pub trait ChunkPrune: ChunkSink {
    /// All chunks whose ids begin with this byte, in no order.
    async fn list(&self, first: u8) -> Result<Vec<Stored>, ChunkError>;

    /// Deletes a chunk unless it was written or renewed at `young_from` (seconds since 1970 UTC by the store's clock) or later.
    /// Looks right before it deletes; that nobody renews it in between is what grace periods are for.
    async fn delete(&self, id: ChunkId, young_from: i64) -> Result<Deletion, ChunkError>;
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<T: ChunkStore + ?Sized> ChunkStore for Arc<T> {
    async fn get(&self, chunk: ChunkRef) -> Result<Bytes, ChunkError> {
        (**self).get(chunk).await
    }

    async fn contains(&self, id: ChunkId) -> Result<bool, ChunkError> {
        (**self).contains(id).await
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<T: ChunkSink + ?Sized> ChunkSink for Arc<T> {
    async fn put(&self, id: ChunkId, plain: Bytes) -> Result<u64, ChunkError> {
        (**self).put(id, plain).await
    }

    async fn renew(&self, id: ChunkId) -> Result<(), ChunkError> {
        (**self).renew(id).await
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<T: ChunkPrune + ?Sized> ChunkPrune for Arc<T> {
    async fn list(&self, first: u8) -> Result<Vec<Stored>, ChunkError> {
        (**self).list(first).await
    }

    async fn delete(&self, id: ChunkId, young_from: i64) -> Result<Deletion, ChunkError> {
        (**self).delete(id, young_from).await
    }
}
