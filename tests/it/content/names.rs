//! Names of images, written by the publisher of a node whose containerd is a stand-in.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use speedy::containerd::blob::Blobs;
use speedy::containerd::manifest::Platform;
use speedy::content::ContentStore;
use speedy::content::document::Document;
use speedy::content::trust::{PublisherKey, Trust};
use speedy::image::Limits;
use speedy::layer::LayerStore;
use speedy::layer::attach::Attacher;
use speedy::object::Objects;
use speedy::oci::{ChainId, DiffId, Digest, Sha256};
use speedy::snapshot::Timestamp;
use speedy::snapshot::layers::Layers;
use speedy::snapshot::metastore::{
    LayerChoice, MetaStore, NewCommit, NewLayer, NewSnapshot, Origin, Own, Progress, PublishEntry,
};
use speedy::snapshot::publish::Publisher;
use speedy::snapshot::{Key, Kind, Labels};
use tokio_util::sync::CancellationToken;

use super::containerd::{Fake, State, start};
use super::support::{Image, digest, key, layer, node, noise};
use crate::support::runtime;

const REFERENCE: &str = "registry.example/app:1";

/// A layer image with its place in a chain.
struct Pulled {
    image: Image,
    chain: ChainId,
    below: Option<ChainId>,
}

fn layers(dir: &Path, seeds: &[u64]) -> Vec<Pulled> {
    let mut below: Option<ChainId> = None;
    let pull = |seed: &u64| {
        let image = Image::make(dir, *seed, 100_000);
        let chain = ChainId::of(below.as_ref(), &image.facts.diff_id);
        Pulled { image, below: below.replace(chain.clone()), chain }
    };
    seeds.iter().map(pull).collect()
}

/// The documents of an image with these layers: an index with it and an image of another platform, which is not here.
fn document(state: &mut State, pulled: &[Pulled], architecture: &str) -> Digest {
    let mut keep = |value: serde_json::Value| {
        let text = value.to_string();
        let kept = digest(&text);
        state.blobs.insert(kept.to_string(), text.into_bytes());
        kept
    };
    let diff_ids: Vec<String> = pulled.iter().map(|layer| layer.image.facts.diff_id.to_string()).collect();
    let blob = |digest: &Digest| json!({ "mediaType": "m", "digest": digest.as_str(), "size": 1 });
    let config = json!({ "os": "linux", "architecture": architecture, "rootfs": { "diff_ids": diff_ids } });
    let config = keep(config);
    let blobs: Vec<_> = diff_ids.iter().map(|diff| blob(&digest(diff))).collect();
    let manifest = keep(json!({ "schemaVersion": 2, "config": blob(&config), "layers": blobs }));
    let mut here = blob(&manifest);
    here["platform"] = json!({ "os": "linux", "architecture": architecture });
    let mut other = blob(&digest("not here"));
    other["platform"] = json!({ "os": "linux", "architecture": "s390x" });
    keep(json!({ "schemaVersion": 2, "manifests": [other, here] }))
}

fn host() -> String {
    Platform::host().architecture
}

/// A node's publisher.
struct Node {
    meta: Arc<MetaStore>,
    layers: Arc<LayerStore>,
    content: Arc<ContentStore>,
    publisher: Arc<Publisher>,
    stop: CancellationToken,
    work: tokio::task::JoinSet<()>,
}

impl Node {
    fn open(root: &Path, socket: &Path, objects: &Objects, own: PublisherKey, trust: Trust) -> Node {
        let meta = Arc::new(MetaStore::open(root, "test").unwrap());
        let layers = Arc::new(LayerStore::open(root, Attacher::untried(root)).unwrap());
        let content = Arc::new(node(objects, own, trust).0);
        let images = Arc::new(Layers::new(Arc::clone(&meta), Arc::clone(&layers), None, None));
        let blobs = Blobs::new(socket.to_owned());
        let publisher =
            Publisher::new(Arc::clone(&meta), images, Arc::clone(&content), blobs, Limits::default(), root);
        let publisher = Arc::new(publisher);
        let (stop, work) = (CancellationToken::new(), tokio::task::JoinSet::new());
        Node { meta, layers, content, publisher, stop, work }
    }

    fn run(&mut self) {
        let (publisher, stop) = (Arc::clone(&self.publisher), self.stop.clone());
        self.work.spawn(async move { publisher.run(stop).await });
    }

    /// Prepare, Apply, Commit of one layer, to be published or not.
    async fn pull(&self, layer: &Pulled, publish: bool) {
        let ids = self.meta.reserve(2).await.unwrap();
        let committed = |chain: &ChainId| Key::new(&format!("test/{}/{chain}", ids[0].serial)).unwrap();
        let parent = layer.below.as_ref().map(|chain| {
            let all = self.meta.all();
            let below = all.iter().find(|record| record.info.name.as_str().ends_with(&chain.to_string()));
            below.unwrap().info.name.clone()
        });
        let active = Key::new(&format!("test/{}/extract-1 {}", ids[0].serial, layer.chain)).unwrap();
        let (key, now) = (active.clone(), Timestamp(1));
        let new = NewSnapshot { id: ids[0], key, parent, kind: Kind::Active, labels: Labels::new(), now };
        self.meta.create(new, LayerChoice::Own).await.unwrap();
        let mut file = self.layers.create(ids[1].serial).unwrap();
        file.write_all(&layer.image.bytes).unwrap();
        self.layers.complete(ids[1].serial, &file).unwrap();
        let choice = LayerChoice::New(NewLayer {
            id: ids[1],
            facts: layer.image.facts.clone(),
            origin: Origin::Applied,
            progress: Progress::Complete,
            blob: None,
            index: None,
            now,
        });
        self.meta.applied(active.clone(), choice).await.unwrap();
        let entry = entry(&layer.chain, layer.below.as_ref());
        let (name, publish) = (committed(&layer.chain), publish.then_some(entry));
        let labels = Labels::new();
        let commit = NewCommit { name, key: active, parent: None, labels, own: Own::Unused, publish, now };
        self.meta.commit(commit).await.unwrap();
        self.publisher.wake();
    }

    /// Prepare and Commit of a first layer whose files another differ wrote.
    async fn unpack(&self, chain: &ChainId) {
        let id = self.meta.reserve(1).await.unwrap()[0];
        let now = Timestamp(1);
        let key = Key::new(&format!("test/{}/extract-1 {chain}", id.serial)).unwrap();
        let new = NewSnapshot {
            id,
            key: key.clone(),
            parent: None,
            kind: Kind::Active,
            labels: Labels::new(),
            now,
        };
        self.meta.create(new, LayerChoice::Own).await.unwrap();
        let name = Key::new(&format!("test/{}/{chain}", id.serial)).unwrap();
        let (labels, publish) = (Labels::new(), Some(entry(chain, None)));
        let commit = NewCommit { name, key, parent: None, labels, own: Own::Used, publish, now };
        self.meta.commit(commit).await.unwrap();
        self.publisher.wake();
    }

    /// Waits until nothing is to be published.
    async fn settle(&self) {
        for _ in 0..1000 {
            if self.publisher.state("auto").pending == 0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{:?}", self.publisher.state("auto"));
    }

    async fn names(&self) -> Vec<String> {
        let listed = self.content.images(100).await.unwrap();
        listed.images.into_iter().map(|image| image.image.to_string()).collect()
    }

    async fn stop(mut self) {
        self.stop.cancel();
        while let Some(ended) = self.work.join_next().await {
            ended.unwrap();
        }
        self.meta.close();
    }
}

fn entry(chain: &ChainId, below: Option<&ChainId>) -> PublishEntry {
    PublishEntry {
        chain: chain.clone(),
        below: below.cloned(),
        namespace: "test".into(),
        layer: None,
        added: Timestamp(1),
        attempts: 0,
        dropped: None,
        message: String::new(),
    }
}

fn only_own() -> Trust {
    Trust::Keys(Vec::new())
}

fn named(reference: &str) -> String {
    format!("{reference} (linux/{})", host())
}

#[test]
fn an_image_is_named_after_its_last_layer_and_once() {
    runtime().block_on(async {
        let (objects, dir) = (Objects::memory(), tempfile::tempdir().unwrap());
        let pulled = layers(dir.path(), &[1, 2]);
        let mut state = State::default();
        let target = document(&mut state, &pulled, &host());
        let by_digest = format!("registry.example/app@{target}");
        for name in [REFERENCE, &by_digest, digest("id").as_str()] {
            state.images.insert(name.to_owned(), target.to_string());
        }
        let (_fake, _, sockets, _serving) = start(state).await;
        let socket = sockets.path().join("containerd.sock");

        let root = tempfile::tempdir().unwrap();
        let mut node = Node::open(root.path(), &socket, &objects, key(1), only_own());
        node.pull(&pulled[0], true).await;
        node.run();
        node.settle().await;
        assert!(node.names().await.is_empty(), "a layer is missing");
        node.pull(&pulled[1], true).await;
        node.settle().await;
        assert_eq!(node.names().await, [named(REFERENCE)]);
        assert_eq!(node.publisher.counts().names, 1);
        let found = node.content.find_name(REFERENCE, &Platform::host().to_string()).await.unwrap().unwrap();
        assert_eq!((&found.image.target, found.image.documents.len()), (&target, 3));
        for digest in &found.image.documents {
            let kept = node.content.document(digest).await.unwrap().unwrap();
            assert_eq!(*Document::of(kept).digest(), *digest);
        }
        node.stop().await;

        // The next daemon finds it named.
        let mut node = Node::open(root.path(), &socket, &objects, key(1), only_own());
        node.run();
        node.settle().await;
        assert_eq!((node.names().await.len(), node.publisher.counts().names), (1, 0));
        node.stop().await;
    });
}

#[test]
fn what_happened_while_nobody_looked_is_found() {
    runtime().block_on(async {
        let (objects, dir) = (Objects::memory(), tempfile::tempdir().unwrap());
        let pulled = layers(dir.path(), &[1]);
        let mut state = State::default();
        let target = document(&mut state, &pulled, &host());
        let (fake, _, sockets, _serving) = start(state).await;
        let socket = sockets.path().join("containerd.sock");
        let root = tempfile::tempdir().unwrap();
        let mut node = Node::open(root.path(), &socket, &objects, key(1), only_own());
        node.run();
        node.pull(&pulled[0], true).await;
        node.settle().await;
        // As the image is made after its layers were committed.
        let tag = |fake: &Fake, name: &str| {
            fake.0.lock().unwrap().images.insert(name.to_owned(), target.to_string());
        };
        tag(&fake, REFERENCE);
        node.publisher.images_changed();
        node.settle().await;
        assert_eq!(node.names().await, [named(REFERENCE)]);
        node.stop().await;

        tag(&fake, "registry.example/app:2");
        let mut node = Node::open(root.path(), &socket, &objects, key(1), only_own());
        node.run();
        node.settle().await;
        assert_eq!(node.names().await, [named(REFERENCE), named("registry.example/app:2")]);
        node.stop().await;
    });
}

#[test]
fn an_image_that_cannot_be_named_is_not_waited_for() {
    runtime().block_on(async {
        let (objects, dir) = (Objects::memory(), tempfile::tempdir().unwrap());
        let (ours, other, strange) =
            (layers(dir.path(), &[1, 2]), layers(dir.path(), &[3]), layers(dir.path(), &[1]));
        let mut state = State::default();
        let images = [
            // A layer was pulled before there was a store.
            ("registry.example/unpublished:1", document(&mut state, &ours, &host())),
            // Another snapshotter's.
            ("registry.example/elsewhere:1", document(&mut state, &other, &host())),
            // For another platform.
            ("registry.example/platform:1", document(&mut state, &strange, "riscv64")),
            ("registry.example/gone:1", digest("gone")),
            ("registry.example/rubbish:1", digest("rubbish")),
        ];
        state.blobs.insert(digest("rubbish").to_string(), b"rubbish".to_vec());
        for (name, target) in images {
            state.images.insert(name.to_owned(), target.to_string());
        }
        let (_fake, _, sockets, _serving) = start(state).await;
        let socket = sockets.path().join("containerd.sock");
        let root = tempfile::tempdir().unwrap();
        let mut node = Node::open(root.path(), &socket, &objects, key(1), only_own());
        node.pull(&ours[0], true).await;
        node.pull(&ours[1], false).await;
        node.run();
        node.settle().await;
        assert!(node.names().await.is_empty());
        let state = node.publisher.state("auto");
        assert_eq!((state.layers, state.problems), (1, Vec::new()));
        node.stop().await;
    });
}

#[test]
fn what_somebody_who_is_trusted_has_named_is_not_named_again() {
    runtime().block_on(async {
        let (objects, dir) = (Objects::memory(), tempfile::tempdir().unwrap());
        let pulled = layers(dir.path(), &[1]);
        let mut state = State::default();
        let target = document(&mut state, &pulled, &host());
        state.images.insert(REFERENCE.to_owned(), target.to_string());
        let (_fake, _, sockets, _serving) = start(state).await;
        let socket = sockets.path().join("containerd.sock");
        for (own, trust, written) in [
            (1, only_own(), 1),
            (2, Trust::Keys(vec![*key(1).public()]), 0),
            (3, Trust::Any, 0),
            (4, only_own(), 1),
        ] {
            let root = tempfile::tempdir().unwrap();
            let mut node = Node::open(root.path(), &socket, &objects, key(own), trust);
            node.pull(&pulled[0], true).await;
            node.run();
            node.settle().await;
            assert_eq!(node.publisher.counts().names, written, "node {own}");
            assert_eq!(node.names().await[0], named(REFERENCE));
            node.stop().await;
        }
    });
}

/// Layers of which another differ unpacked the files are published from their blobs. These were read as plain tars, so that none that
/// is compressed was ever published; an encrypted one that begins as gzip does is nobody's layer, and nobody waits for it.
#[test]
fn a_blob_is_published_as_its_first_bytes_say_or_given_up_with_the_reason() {
    let tar = layer(&[("etc/data", b"some data")]);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&tar).unwrap();
    let gzip = gzip.finish().unwrap();
    let mut encrypted = vec![0; 4000];
    noise(1, &mut encrypted);
    encrypted[..10].copy_from_slice(&gzip[..10]);
    let mut hasher = Sha256::default();
    hasher.update(&tar);
    let diff = DiffId(hasher.digest());
    let chain = ChainId::of(None, &diff);
    for (blob, published, told) in [(tar, 1, ""), (gzip, 1, ""), (encrypted, 0, "compressed data is damaged")]
    {
        runtime().block_on(async {
            let objects = Objects::memory();
            let mut state = State::default();
            state.blobs.insert(digest("blob").to_string(), blob);
            state.labels.insert("containerd.io/uncompressed".into(), diff.0.to_string());
            let (_fake, _, sockets, _serving) = start(state).await;
            let root = tempfile::tempdir().unwrap();
            let socket = sockets.path().join("containerd.sock");
            let mut node = Node::open(root.path(), &socket, &objects, key(1), only_own());
            node.unpack(&chain).await;
            node.run();
            node.settle().await;
            let state = node.publisher.state("auto");
            assert_eq!((state.layers, state.dropped), (published, 1 - usize::try_from(published).unwrap()));
            let problems: Vec<_> =
                state.problems.iter().map(|problem| (problem.retried, &problem.message)).collect();
            assert_eq!(problems.len(), state.dropped);
            assert!(
                problems.iter().all(|(retried, message)| !retried && message.contains(told)),
                "{problems:?}"
            );
            node.stop().await;
        });
    }
}

#[test]
fn without_containerd_nothing_is_pending() {
    runtime().block_on(async {
        let (objects, root) = (Objects::memory(), tempfile::tempdir().unwrap());
        let nobody = root.path().join("nobody.sock");
        let mut node = Node::open(root.path(), &nobody, &objects, key(1), only_own());
        node.run();
        node.settle().await;
        let problems = node.publisher.state("auto").problems;
        assert!(problems[0].message.contains("containerd"), "{problems:?}");
        node.stop().await;
    });
}
