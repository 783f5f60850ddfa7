//! A store that is slow, fails or lies when it is told to, and a layer image on it that this node does not have.

#![allow(dead_code, reason = "each test program uses its own part of it")]

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use speedy::chunk::memory::Memory;
use speedy::chunk::merged::Merged;
use speedy::chunk::store::{ChunkSink, ChunkStore};
use speedy::chunk::verified::Verified;
use speedy::chunk::{ChunkError, ChunkId, ChunkRef};
use speedy::content::index::LayerIndex;
use speedy::content::publish::PublishRequest;
use speedy::content::trust::{PublisherKey, Trust};
use speedy::content::{ContentStore, Options, Parts};
use speedy::image::{self, Compression, Limits, NothingBelow};
use speedy::layer::LayerStore;
use speedy::layer::allowance::Allowance;
use speedy::layer::attach::Attacher;
use speedy::layer::fill::Supply;
use speedy::layer::lazy::ColdLayers;
use speedy::object::{ObjectError, Objects};
use speedy::oci::{ChainId, Digest};
use tokio_util::sync::CancellationToken;

/// Chunks in memory behind a delay.
#[derive(Debug, Default)]
pub(crate) struct Slow {
    pub(crate) memory: Memory,
    /// Of each get, in milliseconds.
    pub(crate) delay: AtomicU64,
    /// So many gets fail from now on.
    pub(crate) failures: AtomicUsize,
    /// So many gets answer other bytes from now on.
    pub(crate) lies: AtomicUsize,
    pub(crate) gets: AtomicUsize,
    /// What was asked for, in order.
    pub(crate) asked: Mutex<Vec<ChunkId>>,
    under_way: AtomicUsize,
    pub(crate) most_under_way: AtomicUsize,
}

fn take_one(counter: &AtomicUsize) -> bool {
    counter.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
}

/// The same store below the wrappers.
#[derive(Debug, Clone)]
struct Below(Arc<Slow>);

#[async_trait]
impl ChunkStore for Below {
    async fn get(&self, chunk: ChunkRef) -> Result<Bytes, ChunkError> {
        let slow = &self.0;
        slow.gets.fetch_add(1, Ordering::SeqCst);
        slow.asked.lock().unwrap().push(chunk.id);
        let now = slow.under_way.fetch_add(1, Ordering::SeqCst) + 1;
        slow.most_under_way.fetch_max(now, Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(slow.delay.load(Ordering::SeqCst))).await;
        slow.under_way.fetch_sub(1, Ordering::SeqCst);
        if take_one(&slow.failures) {
            let source = ObjectError::Unreachable("it was told to fail".into());
            return Err(ChunkError::Store { id: chunk.id, source });
        }
        let bytes = slow.memory.get(chunk).await?;
        if take_one(&slow.lies) {
            let mut wrong = bytes.to_vec();
            wrong[17] ^= 1;
            return Ok(wrong.into());
        }
        Ok(bytes)
    }

    async fn contains(&self, id: ChunkId) -> Result<bool, ChunkError> {
        self.0.memory.contains(id).await
    }
}

#[async_trait]
impl ChunkSink for Below {
    async fn put(&self, id: ChunkId, plain: Bytes) -> Result<u64, ChunkError> {
        self.0.memory.put(id, plain).await
    }

    async fn renew(&self, id: ChunkId) -> Result<(), ChunkError> {
        self.0.memory.renew(id).await
    }
}

/// A node that has nothing, and a store that has one layer.
pub(crate) struct Cold {
    pub(crate) store: Arc<Slow>,
    pub(crate) index: Arc<LayerIndex>,
    /// The whole layer image.
    pub(crate) bytes: Vec<u8>,
    pub(crate) files: Arc<LayerStore>,
    pub(crate) layers: Arc<ColdLayers>,
}

/// xorshift: does not compress, and is never a block of zeros.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for word in bytes.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes()[..word.len()]);
    }
    bytes
}

impl Cold {
    /// With a layer of these files.
    pub(crate) async fn new(root: &Path, files: &[(&str, &[u8])]) -> Cold {
        let store = Arc::new(Slow::default());
        let content = Arc::new(content(&store));
        let (index, bytes) = publish(root, &content, files).await;
        let files = Arc::new(LayerStore::open(root, Attacher::untried(root)).unwrap());
        let layers = cold_layers(&files, &content);
        Cold { store, index, bytes, files, layers }
    }

    /// As another process would see it: nothing of the memory of the first.
    pub(crate) fn again(&self) -> Arc<ColdLayers> {
        self.again_on(&self.files)
    }

    /// The same with other files.
    pub(crate) fn again_on(&self, files: &Arc<LayerStore>) -> Arc<ColdLayers> {
        cold_layers(files, &Arc::new(content(&self.store)))
    }

    /// The same with so much room.
    pub(crate) fn with_room(&self, limit: u64) -> Arc<ColdLayers> {
        let content = Arc::new(content(&self.store));
        Arc::new(
            ColdLayers::new(Supply::new(&self.files, &content)).with_allowance(Allowance::new(Some(limit))),
        )
    }

    /// The same with a limit for what nobody waits for, in bytes each second.
    pub(crate) fn with_rate(&self, rate: u64) -> Arc<ColdLayers> {
        let content = Arc::new(content(&self.store));
        Arc::new(ColdLayers::new(Supply::new(&self.files, &content)).with_rate(rate))
    }

    /// The layer under this serial, with its metadata here, as a hit leaves it.
    pub(crate) async fn begin(&self, serial: u64) -> Arc<speedy::layer::cold::Cold> {
        self.begin_in(&self.layers, serial).await
    }

    pub(crate) async fn begin_in(&self, layers: &ColdLayers, serial: u64) -> Arc<speedy::layer::cold::Cold> {
        self.files.write_index(serial, &self.index.encode()).unwrap();
        self.files.create(serial).unwrap();
        let cold = layers.open(serial, || Some(Arc::clone(&self.index))).unwrap();
        cold.fetch(self.index.metadata_places()).await.unwrap();
        cold
    }
}

/// A layer's tar with these files.
pub(crate) fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, *content).unwrap();
    }
    tar.into_inner().unwrap()
}

/// Puts a layer of these files on the store: its index, and the whole layer image.
pub(crate) async fn publish(
    root: &Path,
    content: &ContentStore,
    files: &[(&str, &[u8])],
) -> (Arc<LayerIndex>, Vec<u8>) {
    let tar = tar_of(files);
    let path = root.join("published.erofs");
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    let source = image::Source { blob: &tar[..], compression: Compression::Plain };
    let facts = image::build(source, &file, &NothingBelow, &Limits::default(), &|| false).unwrap();
    let chain = ChainId(Digest::parse(&format!("sha256:{}", "a".repeat(64))).unwrap());
    let request = PublishRequest { image: &file, facts: &facts, chains: &[chain] };
    let published = content.publish(request, &|_| {}, &CancellationToken::new()).await.unwrap();
    let index = Arc::new(content.index(published.index).await.unwrap());
    let bytes = std::fs::read(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    (index, bytes)
}

pub(crate) fn content(store: &Arc<Slow>) -> ContentStore {
    let chunks = Arc::new(Merged::new(Verified::new(Below(Arc::clone(store)))));
    let key = PublisherKey::from_seed([1; 32]);
    let objects = Objects::memory();
    ContentStore::new(Parts { objects, chunks, key, trust: Trust::Keys(Vec::new()) }, Options::default())
}

fn cold_layers(files: &Arc<LayerStore>, content: &Arc<ContentStore>) -> Arc<ColdLayers> {
    Arc::new(ColdLayers::new(Supply::new(files, content)))
}
