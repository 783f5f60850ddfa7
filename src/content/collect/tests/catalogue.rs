//! A fleet to try things on: three nodes with a key each, and the layers and images that they may publish.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::chunk::remote::Remote;
use crate::chunk::store::{ChunkSink, ChunkStore};
use crate::chunk::verified::Verified;
use crate::chunk::{ChunkError, ChunkId, ChunkRef};
use crate::content::document::Document;
use crate::content::name::ImageName;
use crate::content::publish::PublishRequest;
use crate::content::trust::{PublicKey, PublisherKey, Trust};
use crate::content::{ContentStore, Options, Parts, reference};
use crate::image::{self, Compression, Facts, Limits, NothingBelow};
use crate::object::simulated::Random;
use crate::object::{Objects, layout};
use crate::oci::ChainId;

const HOUR: u64 = 3600;
pub(crate) const NODES: u8 = 3;

/// A layer that can be published.
pub(crate) struct Layer {
    pub(crate) image: File,
    pub(crate) facts: Facts,
    pub(crate) index: String,
    pub(crate) chunks: Vec<String>,
}

/// What there is to publish: layers that share files, images that share layers. Made once.
pub(crate) struct Catalogue {
    pub(crate) layers: Vec<Layer>,
    /// By number of the image, its layers from the bottom up.
    pub(crate) images: Vec<Vec<usize>>,
    /// Has `N/layer` for each node N, with all layers, and its key.
    pub(crate) dir: tempfile::TempDir,
}

impl Catalogue {
    pub(crate) async fn make() -> Catalogue {
        let dir = tempfile::tempdir().unwrap();
        let mut layers = Vec::new();
        let objects = Objects::memory();
        let (store, _) = node(&objects, 9, Duration::ZERO, 0);
        for n in 0..7_u64 {
            let path = dir.path().join(format!("{n}.erofs"));
            let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
            let mut archive = tar::Builder::new(Vec::new());
            for part in [n, n + 1, 20 + n] {
                let mut random = Random::new(part);
                let content: Vec<u8> = (0..90_000).map(|_| random.below(256).to_le_bytes()[0]).collect();
                let mut header = tar::Header::new_gnu();
                header.set_size(content.len() as u64);
                header.set_mode(0o644);
                archive.append_data(&mut header, format!("f{part}"), &content[..]).unwrap();
            }
            let blob = archive.into_inner().unwrap();
            let source = image::Source { blob: &blob[..], compression: Compression::Plain };
            let facts = image::build(source, &file, &NothingBelow, &Limits::default(), &|| false).unwrap();
            let request = PublishRequest { image: &file, facts: &facts, chains: &[] };
            let published = store.publish(request, &|_| (), &CancellationToken::new()).await.unwrap();
            let index = store.index(published.index).await.unwrap();
            for node in 0..NODES {
                let here = dir.path().join(node.to_string()).join("layer");
                std::fs::create_dir_all(&here).unwrap();
                std::fs::hard_link(&path, here.join(format!("{}.erofs", n + 1))).unwrap();
                std::fs::write(here.join(format!("{}.index", n + 1)), index.encode()).unwrap();
            }
            let chunks = index.chunks().map(|(_, chunk)| layout::chunk(chunk.id.as_bytes())).collect();
            let index = layout::index(published.index.as_bytes());
            layers.push(Layer { image: file, facts, index, chunks });
        }
        for number in 0..NODES {
            key(number).save(&dir.path().join(number.to_string()).join("publisher.key"));
        }
        let images = vec![vec![0], vec![0, 1], vec![0, 1, 2], vec![3, 4], vec![4, 5], vec![6]];
        Catalogue { layers, images, dir }
    }

    /// The root of a node.
    pub(crate) fn root(&self, node: u8) -> std::path::PathBuf {
        Path::join(self.dir.path(), node.to_string())
    }

    /// The chain of the layer at this place of an image.
    pub(crate) fn chain(&self, image: usize, place: usize) -> ChainId {
        let layers = &self.images[image][..=place];
        let chain = layers.iter().fold(None, |below: Option<ChainId>, layer| {
            Some(ChainId::of(below.as_ref(), &self.layers[*layer].facts.diff_id))
        });
        chain.unwrap()
    }

    pub(crate) fn document(image: usize) -> [Document; 2] {
        [
            Document::of(format!("manifest {image}").into()),
            Document::of(format!("config {}", image % 2).into()),
        ]
    }

    pub(crate) fn name(&self, image: usize) -> ImageName {
        let documents: Vec<_> =
            Catalogue::document(image).iter().map(|document| document.digest().clone()).collect();
        ImageName {
            reference: format!("r.example/app:{image}"),
            platform: "linux/amd64".into(),
            target_media_type: String::new(),
            target: documents[0].clone(),
            media_type: String::new(),
            manifest: documents[0].clone(),
            documents,
            chains: (0..self.images[image].len()).map(|place| self.chain(image, place)).collect(),
        }
    }

    /// Publishes an image at once.
    pub(crate) async fn publish(&self, store: &ContentStore, image: usize) {
        for (place, layer) in self.images[image].iter().enumerate() {
            let chains = [self.chain(image, place)];
            let Layer { image, facts, .. } = &self.layers[*layer];
            let request = PublishRequest { image, facts, chains: &chains };
            store.publish(request, &|_| (), &CancellationToken::new()).await.unwrap();
        }
        store.publish_name(&self.name(image), &Catalogue::document(image)).await.unwrap();
    }

    /// What must be there while a name of the image is: of each inner list one.
    pub(crate) fn needs(&self, image: usize, keys: &[PublicKey]) -> Vec<Vec<String>> {
        let mut needs: Vec<Vec<String>> = Vec::new();
        for (place, layer) in self.images[image].iter().enumerate() {
            let chain = self.chain(image, place);
            needs.push(keys.iter().map(|key| reference::name(&chain, key)).collect());
            needs.push(vec![self.layers[*layer].index.clone()]);
            needs.extend(self.layers[*layer].chunks.iter().map(|chunk| vec![chunk.clone()]));
        }
        needs.extend(
            Catalogue::document(image).iter().map(|document| vec![layout::document(document.digest())]),
        );
        needs
    }
}

/// Chunks that take their time: up to hours, and now and then longer than a publisher may look.
#[derive(Debug)]
struct Slow {
    chunks: Verified<Remote>,
    random: Mutex<Random>,
    longest: u64,
}

impl Slow {
    async fn wait(&self) {
        let time = {
            let mut random = self.random.lock();
            match random.below(60) {
                0 => random.seconds(self.longest),
                1..=6 => random.seconds(HOUR),
                _ => Duration::ZERO,
            }
        };
        sleep(time).await;
    }
}

#[async_trait]
impl ChunkStore for Slow {
    async fn get(&self, chunk: ChunkRef) -> Result<Bytes, ChunkError> {
        self.chunks.get(chunk).await
    }

    async fn contains(&self, id: ChunkId) -> Result<bool, ChunkError> {
        self.chunks.contains(id).await
    }
}

#[async_trait]
impl ChunkSink for Slow {
    async fn put(&self, id: ChunkId, plain: Bytes) -> Result<u64, ChunkError> {
        self.wait().await;
        self.chunks.put(id, plain).await
    }

    async fn renew(&self, id: ChunkId) -> Result<(), ChunkError> {
        self.wait().await;
        self.chunks.renew(id).await
    }
}

pub(crate) fn key(node: u8) -> PublisherKey {
    PublisherKey::from_seed([node + 1; 32])
}

pub(crate) fn keys() -> Vec<PublicKey> {
    (0..NODES).map(|node| *key(node).public()).collect()
}

pub(crate) fn node(objects: &Objects, number: u8, patience: Duration, seed: u64) -> (ContentStore, Objects) {
    slow_node(objects, number, patience, seed, 7 * HOUR)
}

/// One to whom now and then a chunk takes up to so many seconds.
pub(crate) fn slow_node(
    objects: &Objects,
    number: u8,
    patience: Duration,
    seed: u64,
    longest: u64,
) -> (ContentStore, Objects) {
    let objects = if patience.is_zero() { objects.clone() } else { objects.patient(patience) };
    let plain = Verified::new(Remote::new(objects.clone()));
    let chunks: Arc<dyn ChunkSink> = match patience.is_zero() {
        true => Arc::new(plain),
        false => Arc::new(Slow { chunks: plain, random: Mutex::new(Random::new(seed)), longest }),
    };
    let parts = Parts { objects: objects.clone(), chunks, key: key(number), trust: Trust::Keys(keys()) };
    (ContentStore::new(parts, Options::default()), objects)
}
