//! A store whose chunks are what their ids say (**C1**).

use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;

use super::store::{ChunkPrune, ChunkSink, ChunkStore, Deletion, Stored};
use super::{ChunkError, ChunkId, ChunkRef};

/// Checks the hash of every chunk that comes out of `S` and of every one that goes in. What comes out wrong is fetched once
/// more, since the wire may have spoilt it; what is wrong twice is [`ChunkError::Corrupt`].
#[derive(Debug)]
pub struct Verified<S> {
    inner: S,
    spoilt: AtomicU64,
}

impl<S> Verified<S> {
    /// Around `inner`.
    pub fn new(inner: S) -> Verified<S> {
        Verified { inner, spoilt: AtomicU64::new(0) }
    }

    /// How many answers were wrong so far, those that were right when asked for again included.
    pub fn spoilt(&self) -> u64 {
        self.spoilt.load(Ordering::Relaxed)
    }
}

impl<S: ChunkStore> Verified<S> {
    async fn fetch(&self, chunk: ChunkRef) -> Result<Bytes, ChunkError> {
        let plain = self.inner.get(chunk).await?;
        if plain.len() as u64 == u64::from(chunk.length) && ChunkId::of(&plain) == chunk.id {
            return Ok(plain);
        }
        let problem = format!("its {} bytes have another hash", plain.len());
        Err(ChunkError::Corrupt { id: chunk.id, problem })
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<S: ChunkStore> ChunkStore for Verified<S> {
    async fn get(&self, chunk: ChunkRef) -> Result<Bytes, ChunkError> {
        match self.fetch(chunk).await {
            Err(ChunkError::Corrupt { .. }) => {
                self.spoilt.fetch_add(1, Ordering::Relaxed);
                self.fetch(chunk).await
            }
            answer => answer,
        }
    }

    async fn contains(&self, id: ChunkId) -> Result<bool, ChunkError> {
        self.inner.contains(id).await
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<S: ChunkSink> ChunkSink for Verified<S> {
    async fn put(&self, id: ChunkId, plain: Bytes) -> Result<u64, ChunkError> {
        if ChunkId::of(&plain) != id {
            return Err(ChunkError::Mismatch { id });
        }
        self.inner.put(id, plain).await
    }

    async fn renew(&self, id: ChunkId) -> Result<(), ChunkError> {
        self.inner.renew(id).await
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<S: ChunkPrune> ChunkPrune for Verified<S> {
    async fn list(&self, first: u8) -> Result<Vec<Stored>, ChunkError> {
        self.inner.list(first).await
    }

    async fn delete(&self, id: ChunkId, young_from: i64) -> Result<Deletion, ChunkError> {
        self.inner.delete(id, young_from).await
    }
}
