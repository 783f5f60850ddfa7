//! A store in memory whose chunks are counted, and layer images to put into it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use speedy::chunk::store::{ChunkSink, ChunkStore};
use speedy::chunk::{ChunkError, ChunkId, ChunkRef};
use speedy::content::publish::{PublishRequest, Published};
use speedy::content::trust::{PublisherKey, Trust};
use speedy::content::{ContentError, ContentStore, Found, Lookup, Options, Parts};
use speedy::image::{self, Below, Compression, Facts, Limits, NothingBelow};
use speedy::object::{ObjectError, Objects, layout};
use speedy::oci::{ChainId, Digest, Sha256};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

const MIB: u64 = 1 << 20;

/// Chunks as plain objects; what is done to them is counted, and one put can be made to fail.
#[derive(Debug)]
pub(super) struct Counted {
    objects: Objects,
    pub(super) puts: AtomicUsize,
    pub(super) renewals: AtomicUsize,
    /// Bytes of chunks that are being put, and the most there ever were.
    in_flight: AtomicU64,
    pub(super) most_in_flight: AtomicU64,
    /// The put with this number fails.
    pub(super) fails_at: AtomicUsize,
}

impl Counted {
    pub(super) fn new(objects: &Objects) -> Arc<Counted> {
        Arc::new(Counted {
            objects: objects.clone(),
            puts: AtomicUsize::new(0),
            renewals: AtomicUsize::new(0),
            in_flight: AtomicU64::new(0),
            most_in_flight: AtomicU64::new(0),
            fails_at: AtomicUsize::new(usize::MAX),
        })
    }

    pub(super) fn puts(&self) -> usize {
        self.puts.load(Ordering::SeqCst)
    }
}

fn store_error(id: ChunkId) -> impl FnOnce(ObjectError) -> ChunkError {
    move |source| ChunkError::Store { id, source }
}

#[async_trait]
impl ChunkStore for Counted {
    async fn get(&self, chunk: ChunkRef) -> Result<Bytes, ChunkError> {
        let name = layout::chunk(chunk.id.as_bytes());
        let bytes = self.objects.get(&name, MIB).await.map_err(store_error(chunk.id))?;
        let bytes = bytes.ok_or(ChunkError::Missing { id: chunk.id })?;
        if ChunkId::of(&bytes) != chunk.id {
            return Err(ChunkError::Corrupt { id: chunk.id, problem: "hash".into() });
        }
        Ok(bytes)
    }

    async fn contains(&self, id: ChunkId) -> Result<bool, ChunkError> {
        let found = self.objects.stat(&layout::chunk(id.as_bytes())).await.map_err(store_error(id))?;
        Ok(found.is_some())
    }
}

#[async_trait]
impl ChunkSink for Counted {
    async fn put(&self, id: ChunkId, plain: Bytes) -> Result<u64, ChunkError> {
        assert_eq!(ChunkId::of(&plain), id);
        let length = plain.len() as u64;
        let now = self.in_flight.fetch_add(length, Ordering::SeqCst) + length;
        self.most_in_flight.fetch_max(now, Ordering::SeqCst);
        let number = self.puts.fetch_add(1, Ordering::SeqCst);
        // Others get their turn, so that puts overlap and a publish can be dropped between them.
        tokio::time::sleep(Duration::from_millis(5)).await;
        let put = match number == self.fails_at.load(Ordering::SeqCst) {
            true => Err(ObjectError::Unreachable("it was told to fail".into())),
            false => self.objects.put(&layout::chunk(id.as_bytes()), plain).await,
        };
        self.in_flight.fetch_sub(length, Ordering::SeqCst);
        put.map(|()| length).map_err(store_error(id))
    }

    async fn renew(&self, id: ChunkId) -> Result<(), ChunkError> {
        self.renewals.fetch_add(1, Ordering::SeqCst);
        if self.contains(id).await? { Ok(()) } else { Err(ChunkError::Missing { id }) }
    }
}

pub(super) fn key(seed: u8) -> PublisherKey {
    PublisherKey::from_seed([seed; 32])
}

/// A node with this key and trust on these objects.
pub(super) fn node(objects: &Objects, key: PublisherKey, trust: Trust) -> (ContentStore, Arc<Counted>) {
    let chunks = Counted::new(objects);
    let parts = Parts { objects: objects.clone(), chunks: chunks.clone(), key, trust };
    (ContentStore::new(parts, Options::default()), chunks)
}

pub(super) fn chain(text: &str) -> ChainId {
    ChainId(digest(text))
}

pub(super) fn digest(text: &str) -> Digest {
    let mut hasher = Sha256::default();
    hasher.update(text.as_bytes());
    hasher.digest()
}

/// A layer image.
pub(super) struct Image {
    pub(super) path: PathBuf,
    pub(super) facts: Facts,
    pub(super) bytes: Vec<u8>,
}

impl Image {
    /// With a file of `data` bytes of noise, different for each `seed`, and 1 MiB of zeros in the middle of it if it is longer
    /// than 4 MiB.
    pub(super) fn make(dir: &Path, seed: u64, data: u64) -> Image {
        let mut content = vec![0; usize::try_from(data).unwrap()];
        noise(seed, &mut content);
        if data > 4 * MIB {
            let hole = usize::try_from((data / 2).next_multiple_of(4096)).unwrap();
            content[hole..hole + (1 << 20)].fill(0);
        }
        let path = dir.join(format!("{seed}.erofs"));
        let facts = build(&path, &layer(&[("etc/data", &content)]), &NothingBelow);
        let bytes = std::fs::read(&path).unwrap();
        Image { path, facts, bytes }
    }

    pub(super) async fn publish(
        &self,
        store: &ContentStore,
        chains: &[ChainId],
    ) -> Result<Published, ContentError> {
        let file = File::open(&self.path).unwrap();
        let request = PublishRequest { image: &file, facts: &self.facts, chains };
        store.publish(request, &|_| {}, &CancellationToken::new()).await
    }
}

pub(super) use crate::cold::tar_of as layer;

pub(super) fn build(path: &Path, layer: &[u8], below: &dyn Below) -> Facts {
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap();
    let source = image::Source { blob: layer, compression: Compression::Plain };
    image::build(source, &file, below, &Limits::default(), &|| false).unwrap()
}

/// xorshift: does not compress, and is never a block of zeros.
pub(super) fn noise(seed: u64, into: &mut [u8]) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for word in into.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes()[..word.len()]);
    }
}

pub(super) async fn lookup(store: &ContentStore, chain: &ChainId) -> Result<Lookup, ContentError> {
    store.lookup(chain, Instant::now() + Duration::from_secs(10)).await
}

pub(super) async fn found(store: &ContentStore, chain: &ChainId) -> Found {
    match lookup(store, chain).await.unwrap() {
        Lookup::Found(found) => found,
        other => panic!("{other:?}"),
    }
}

/// The image as the store gives it back.
pub(super) async fn fetch(store: &ContentStore, found: &Found) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(found.index.facts().layout.size).unwrap()];
    for (offset, chunk) in found.index.chunks() {
        let plain = store.chunk(chunk).await.unwrap();
        let offset = usize::try_from(offset).unwrap();
        bytes[offset..offset + plain.len()].copy_from_slice(&plain);
    }
    bytes
}
