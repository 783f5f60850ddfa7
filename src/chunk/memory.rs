//! Chunks in memory, for tests of everything above. Passes the same suite as the real stores; nothing outlives it.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;

use super::store::{ChunkPrune, ChunkSink, ChunkStore, Deletion, Stored};
use super::{ChunkError, ChunkId, ChunkRef};

/// As it says. Answers what it was given, hash or not.
#[derive(Debug, Default)]
pub struct Memory(Mutex<HashMap<ChunkId, Kept>>);

#[derive(Debug)]
struct Kept {
    plain: Bytes,
    modified: i64,
}

fn now() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

impl Memory {
    /// Replaces the bytes of a chunk that is there, as a bad disk would.
    pub fn damage(&self, id: ChunkId, plain: Bytes) {
        if let Some(kept) = self.0.lock().get_mut(&id) {
            kept.plain = plain;
        }
    }

    /// Makes a chunk that is there older.
    pub fn age(&self, id: ChunkId, by: Duration) {
        if let Some(kept) = self.0.lock().get_mut(&id) {
            kept.modified -= i64::try_from(by.as_secs()).unwrap_or(0);
        }
    }
}

#[async_trait]
impl ChunkStore for Memory {
    async fn get(&self, chunk: ChunkRef) -> Result<Bytes, ChunkError> {
        let id = chunk.id;
        let kept = self.0.lock().get(&id).map(|kept| kept.plain.clone()).ok_or(ChunkError::Missing { id })?;
        if kept.len() as u64 != u64::from(chunk.length) {
            let problem = format!("it has {} bytes and should have {}", kept.len(), chunk.length);
            return Err(ChunkError::Corrupt { id, problem });
        }
        Ok(kept)
    }

    async fn contains(&self, id: ChunkId) -> Result<bool, ChunkError> {
        Ok(self.0.lock().contains_key(&id))
    }
}

#[async_trait]
impl ChunkSink for Memory {
    async fn put(&self, id: ChunkId, plain: Bytes) -> Result<u64, ChunkError> {
        let size = plain.len() as u64;
        self.0.lock().insert(id, Kept { plain, modified: now() });
        Ok(size)
    }

    async fn renew(&self, id: ChunkId) -> Result<(), ChunkError> {
        self.0.lock().get_mut(&id).map(|kept| kept.modified = now()).ok_or(ChunkError::Missing { id })
    }
}

#[async_trait]
impl ChunkPrune for Memory {
    async fn list(&self, first: u8) -> Result<Vec<Stored>, ChunkError> {
        let chunks = self.0.lock();
        let those = chunks.iter().filter(|(id, _)| id.as_bytes()[0] == first);
        Ok(those
            .map(|(id, kept)| Stored { id: *id, size: kept.plain.len() as u64, modified: kept.modified })
            .collect())
    }

    async fn delete(&self, id: ChunkId, young_from: i64) -> Result<Deletion, ChunkError> {
        let mut chunks = self.0.lock();
        match chunks.get(&id) {
            None => Ok(Deletion::Absent),
            Some(kept) if kept.modified >= young_from => Ok(Deletion::Young),
            Some(_) => {
                chunks.remove(&id);
                Ok(Deletion::Deleted)
            }
        }
    }
}
