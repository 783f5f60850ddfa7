//! Chunks on the object store.

use std::sync::LazyLock;
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::Semaphore;

use super::codec::{self, CodecError};
use super::store::{ChunkPrune, ChunkSink, ChunkStore, Deletion, RENEWED, Stored};
use super::{BLOCK, ChunkError, ChunkId, ChunkRef, MAX_CHUNK};
use crate::object::{ObjectError, Objects, Touched, layout};

/// Each chunk is an object, in its stored form. Does not check hashes: [`super::verified::Verified`] does.
#[derive(Debug, Clone)]
pub struct Remote {
    objects: Objects,
    now: Option<fn() -> SystemTime>,
}

impl Remote {
    /// On this store.
    pub fn new(objects: Objects) -> Remote {
        Remote { objects, now: None }
    }

    /// The same with another idea of what time it is.
    pub fn by_clock(objects: Objects, now: fn() -> SystemTime) -> Remote {
        Remote { objects, now: Some(now) }
    }

    async fn stored(&self, id: ChunkId) -> Result<Bytes, ChunkError> {
        match self.objects.get(&layout::chunk(id.as_bytes()), codec::LONGEST).await {
            Ok(Some(stored)) => Ok(stored),
            Ok(None) => Err(ChunkError::Missing { id }),
            Err(error @ ObjectError::TooLarge { .. }) => {
                Err(ChunkError::Corrupt { id, problem: error.to_string() })
            }
            Err(source) => Err(ChunkError::Store { id, source }),
        }
    }

    /// Reads a chunk only to see whether it is right, without memory of its length where none is known; answers its stored size.
    pub async fn examine(&self, id: ChunkId, length: Option<u32>) -> Result<u64, ChunkError> {
        let stored = self.stored(id).await?;
        let size = stored.len() as u64;
        self.check(id, length, stored).await.map(|()| size)
    }

    /// Whether this is a stored form of the chunk.
    async fn check(&self, id: ChunkId, length: Option<u32>, stored: Bytes) -> Result<(), ChunkError> {
        let length = length.or_else(|| codec::declared_length(&stored));
        let length = length.ok_or(CodecError::Header).map_err(corrupt(id))?;
        let is_it = move || codec::decode(&stored, length).map(|plain| ChunkId::of(&plain) == id);
        match apart(length as usize, is_it).await.map_err(store(id))?.map_err(corrupt(id))? {
            true => Ok(()),
            false => {
                Err(ChunkError::Corrupt { id, problem: format!("its {length} bytes have another hash") })
            }
        }
    }

    fn is_young(&self, modified: i64) -> bool {
        let now = self.now.map_or_else(
            || u64::try_from(self.objects.now()).unwrap_or(0),
            |now| now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs(),
        );
        u64::try_from(modified).unwrap_or(0).saturating_add(RENEWED.as_secs()) >= now
    }
}

/// As many chunks are compressed at once as there are processors: more gain nothing and each takes memory.
static ENCODING: LazyLock<Semaphore> =
    LazyLock::new(|| Semaphore::new(std::thread::available_parallelism().map_or(1, usize::from)));

/// Of so many bytes zstd makes short work; more of them would keep other tasks of the thread waiting.
const SHORT_WORK: usize = 32 * 1024;

/// Runs zstd's work on a chunk of `length` bytes, not on the threads that answer calls unless it is short: measured, it is as
/// quick there, and a ticker beside 32 fetches is late by a third of what it is otherwise.
async fn apart<T: Send + 'static>(
    length: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ObjectError> {
    if length <= SHORT_WORK {
        return Ok(work());
    }
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| ObjectError::Unreachable(format!("the runtime ends: {error}")))
}

fn corrupt(id: ChunkId) -> impl Fn(CodecError) -> ChunkError {
    move |error| ChunkError::Corrupt { id, problem: error.to_string() }
}

fn store(id: ChunkId) -> impl Fn(ObjectError) -> ChunkError {
    move |source| ChunkError::Store { id, source }
}

#[async_trait]
impl ChunkStore for Remote {
    async fn get(&self, chunk: ChunkRef) -> Result<Bytes, ChunkError> {
        let stored = self.stored(chunk.id).await?;
        let decode = move || codec::decode(&stored, chunk.length);
        apart(chunk.length as usize, decode).await.map_err(store(chunk.id))?.map_err(corrupt(chunk.id))
    }

    async fn contains(&self, id: ChunkId) -> Result<bool, ChunkError> {
        let found = self.objects.stat(&layout::chunk(id.as_bytes())).await;
        found.map(|info| info.is_some()).map_err(store(id))
    }
}

#[async_trait]
impl ChunkSink for Remote {
    async fn put(&self, id: ChunkId, plain: Bytes) -> Result<u64, ChunkError> {
        let whole_blocks = plain.len().is_multiple_of(BLOCK as usize) && !plain.is_empty();
        if !whole_blocks || plain.len() > MAX_CHUNK as usize {
            return Err(ChunkError::Mismatch { id });
        }
        let length = plain.len();
        let turn = ENCODING.acquire().await;
        let encoded = apart(length, move || codec::encode(&plain)).await;
        drop(turn);
        let stored = encoded.map_err(store(id))?;
        let size = stored.len() as u64;
        self.objects.put(&layout::chunk(id.as_bytes()), stored).await.map_err(store(id))?;
        Ok(size)
    }

    /// A directory has the time of the file set. Everywhere else the chunk is read, checked, so that nothing damaged is made
    /// young and nothing sound is overwritten by what the wire made of it, and written again: object stores know no other way
    /// that works on all of them.
    async fn renew(&self, id: ChunkId) -> Result<(), ChunkError> {
        let name = layout::chunk(id.as_bytes());
        let info = self.objects.stat(&name).await.map_err(store(id))?.ok_or(ChunkError::Missing { id })?;
        if self.is_young(info.modified) {
            return Ok(());
        }
        match self.objects.touch(&name).await.map_err(store(id))? {
            Touched::Done => return Ok(()),
            Touched::Missing => return Err(ChunkError::Missing { id }),
            Touched::Unsupported => {}
        }
        let stored = self.stored(id).await?;
        self.check(id, None, stored.clone()).await?;
        self.objects.put(&name, stored).await.map_err(store(id))
    }
}

#[async_trait]
impl ChunkPrune for Remote {
    async fn list(&self, first: u8) -> Result<Vec<Stored>, ChunkError> {
        let listed = self.objects.list(&layout::chunks(first), usize::MAX).await;
        let listed = listed.map_err(|source| ChunkError::List { source })?;
        // What somebody else put there is not ours to look at.
        let ours = listed.into_iter().filter_map(|info| {
            let id = ChunkId::from_bytes(layout::hash_of(&info.name)?);
            let own_name = layout::chunk(id.as_bytes()) == info.name;
            own_name.then_some(Stored { id, size: info.size, modified: info.modified })
        });
        Ok(ours.collect())
    }

    async fn delete(&self, id: ChunkId, young_from: i64) -> Result<Deletion, ChunkError> {
        self.objects.delete_unless_young(&layout::chunk(id.as_bytes()), young_from).await.map_err(store(id))
    }
}
