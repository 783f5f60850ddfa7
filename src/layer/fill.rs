//! Filling a layer image: every chunk of its index is made present, from another layer of this node if one has it, else from
//! the store.
//!
//! Chunks arrive in any order and are written where they belong; each was checked against its id by whoever it came from. A
//! file that an earlier process left half filled is believed chunk by chunk, by hash.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures::{FutureExt, StreamExt, TryStreamExt};

use super::chunks::LocalChunks;
use super::{LayerError, LayerStore};
use crate::chunk::{ChunkId, ChunkRef};
use crate::content::ContentStore;
use crate::content::index::LayerIndex;
use crate::sys::blocking;

/// How many chunks of one layer are on their way at once: 32 of a quarter MiB keep a link of 1 Gbit/s and 20 ms busy.
const AT_ONCE: usize = 32;

/// How far a filling is, in plain bytes.
#[derive(Debug, Default)]
pub struct FillProgress {
    /// Bytes of all chunks.
    pub total: AtomicU64,
    /// Bytes that came from the store.
    pub fetched: AtomicU64,
    /// Bytes that another layer of this node had.
    pub shared: AtomicU64,
    /// Bytes that were there already.
    pub kept: AtomicU64,
}

impl FillProgress {
    /// Bytes that are present.
    pub fn present(&self) -> u64 {
        [&self.fetched, &self.shared, &self.kept].iter().map(|n| n.load(Ordering::Relaxed)).sum()
    }
}

/// Whether a file may hold chunks from an earlier attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// It was just made.
    Empty,
    /// It may: each chunk is hashed before it is fetched.
    Resumed,
}

/// What chunks are made present with.
#[derive(Debug, Clone)]
pub struct Filler {
    /// Where the files are.
    pub layers: Arc<LayerStore>,
    /// What this node has already.
    pub local: Arc<LocalChunks>,
    /// Where the rest comes from.
    pub content: Arc<ContentStore>,
}

impl Filler {
    /// Makes `chunks` (offset in the image, chunk) present in `file`. Not synced.
    pub async fn fill(
        &self,
        index: &LayerIndex,
        chunks: Vec<(u64, ChunkRef)>,
        target: Target<'_>,
    ) -> Result<(), LayerError> {
        let bytes: u64 = chunks.iter().map(|(_, chunk)| u64::from(chunk.length)).sum();
        target.progress.total.fetch_add(bytes, Ordering::Relaxed);
        let diff_id = index.facts().diff_id.to_string();
        futures::stream::iter(chunks)
            // Boxed: the compiler cannot tell otherwise that the whole may move between threads.
            .map(|(offset, chunk)| self.make_present(offset, chunk, &target, &diff_id).boxed())
            .buffer_unordered(AT_ONCE)
            .try_collect::<()>()
            .await
    }

    async fn make_present(
        &self,
        offset: u64,
        chunk: ChunkRef,
        target: &Target<'_>,
        diff_id: &str,
    ) -> Result<(), LayerError> {
        let length = u64::from(chunk.length);
        let (file, start) = (Arc::clone(target.file), target.start);
        let (local, layers) = (Arc::clone(&self.local), Arc::clone(&self.layers));
        let found = blocking(move || {
            if start == Start::Resumed && is_present(&file, offset, chunk) {
                return Ok(Found::Kept);
            }
            if !local.contains(&chunk.id) {
                return Ok(Found::Nowhere);
            }
            match local.read(chunk, |serial| layers.read(serial).ok()) {
                Some(bytes) => file.write_all_at(&bytes, offset).map(|()| Found::Shared),
                None => Ok(Found::Nowhere),
            }
        });
        let written = |error| LayerError::at(target.path, error);
        let counted = match found.await.map_err(written)? {
            Found::Kept => &target.progress.kept,
            Found::Shared => &target.progress.shared,
            Found::Nowhere => {
                let fetched = self.content.chunk(chunk).await;
                let bytes: Bytes =
                    fetched.map_err(|source| LayerError::Chunk { layer: diff_id.to_owned(), source })?;
                let file = Arc::clone(target.file);
                blocking(move || file.write_all_at(&bytes, offset)).await.map_err(written)?;
                &target.progress.fetched
            }
        };
        counted.fetch_add(length, Ordering::Relaxed);
        Ok(())
    }
}

/// The file that is filled.
#[derive(Debug)]
pub struct Target<'a> {
    /// Open for reading and writing.
    pub file: &'a Arc<File>,
    /// Its name, for messages.
    pub path: &'a Path,
    /// Whether it may hold chunks already.
    pub start: Start,
    /// What is counted.
    pub progress: &'a FillProgress,
}

enum Found {
    Kept,
    Shared,
    Nowhere,
}

fn is_present(file: &File, offset: u64, chunk: ChunkRef) -> bool {
    let mut bytes = vec![0; usize::try_from(chunk.length).unwrap_or(0)];
    file.read_exact_at(&mut bytes, offset).is_ok() && ChunkId::of(&bytes) == chunk.id
}
