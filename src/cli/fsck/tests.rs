//! A store in memory with two images on it, whose objects are lost, cut and flipped at random; and a node that has their layers.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use bytes::Bytes;
use futures::FutureExt;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::chunk::ChunkId;
use crate::chunk::codec;
use crate::content::ContentStore;
use crate::content::document::Document;
use crate::content::fsck::{Finding, Problem};
use crate::content::index::LayerIndex;
use crate::content::name::ImageName;
use crate::content::publish::PublishRequest;
use crate::image::{self, Compression, Facts, Limits, NothingBelow};
use crate::layer::LayerStore;
use crate::object::{Objects, layout};
use crate::oci::ChainId;

mod beside;
mod month;

/// A byte somewhere in an object.
const MIDDLE: usize = 1_000_003;
const MEDIA_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

struct World {
    root: TempDir,
    config: Config,
    objects: Objects,
    /// Every object but the description, as it was written.
    sound: BTreeMap<String, Bytes>,
    /// Each chunk with the indexes that have it.
    chunks: BTreeMap<String, (u32, Vec<String>)>,
    /// Each index with its refs.
    indexes: BTreeMap<String, Vec<String>>,
    /// Each ref with the names that have its chain.
    refs: BTreeMap<String, Vec<String>>,
    /// Each document with the names that list it.
    documents: BTreeMap<String, Vec<String>>,
}

fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    let mut bytes = vec![0; length];
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

/// A layer with a file of noise, and one that compresses.
fn build(path: &std::path::Path, seed: u64, length: usize) -> Facts {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, content) in
        [("noise", noise(seed, length)), ("text", seed.to_string().repeat(40_000).into_bytes())]
    {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, content.as_slice()).unwrap();
    }
    let blob = tar.into_inner().unwrap();
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap();
    let source = image::Source { blob: blob.as_slice(), compression: Compression::Plain };
    image::build(source, &file, &NothingBelow, &Limits::default(), &|| false).unwrap()
}

impl World {
    /// Three layers, two images: both have the first layer.
    async fn new() -> World {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("layer")).unwrap();
        let config = Config {
            root: root.path().to_owned(),
            containerd: root.path().join("no-containerd.sock"),
            ..Config::default()
        };
        let objects = Objects::memory();
        let mut world = World {
            config,
            objects: objects.clone(),
            sound: BTreeMap::new(),
            chunks: BTreeMap::new(),
            indexes: BTreeMap::new(),
            refs: BTreeMap::new(),
            documents: BTreeMap::new(),
            root,
        };
        let content = publish::content_store(&world.config, &objects, Arc::default()).unwrap();
        let base = world.layer(&content, 1, None, 700_000).await;
        let left = world.layer(&content, 2, Some(&base), 300_000).await;
        let right = world.layer(&content, 3, Some(&base), 1_200_000).await;
        world.image(&content, "r.example/left:1", vec![base.clone(), left]).await;
        world.image(&content, "r.example/right:1", vec![base, right]).await;
        for kind in ["images", "documents", "refs", "indexes", "chunks"] {
            for object in objects.list(kind, usize::MAX).await.unwrap() {
                let bytes = objects.get(&object.name, u64::MAX).await.unwrap().unwrap();
                world.sound.insert(object.name, bytes);
            }
        }
        world
    }

    async fn layer(
        &mut self,
        content: &ContentStore,
        serial: u64,
        below: Option<&ChainId>,
        length: usize,
    ) -> ChainId {
        let layers = LayerStore::at(self.root.path());
        let facts = build(&layers.image(serial), serial, length);
        let chain = ChainId::of(below, &facts.diff_id);
        let file = layers.read(serial).unwrap();
        let request = PublishRequest { image: &file, facts: &facts, chains: std::slice::from_ref(&chain) };
        let published = content.publish(request, &|_| (), &CancellationToken::new()).await.unwrap();
        let index = content.index(published.index).await.unwrap();
        layers.write_index(serial, &index.encode()).unwrap();
        let name = layout::index(published.index.as_bytes());
        for (_, chunk) in index.chunks() {
            let known =
                self.chunks.entry(layout::chunk(chunk.id.as_bytes())).or_insert((chunk.length, Vec::new()));
            known.1.push(name.clone());
        }
        let reference = format!("{}/{}", layout::refs(&chain), content.publisher().id());
        self.indexes.insert(name, vec![reference.clone()]);
        self.refs.insert(reference, Vec::new());
        chain
    }

    async fn image(&mut self, content: &ContentStore, reference: &str, chains: Vec<ChainId>) {
        let documents =
            ["manifest", "config"].map(|what| Document::of(format!("{what} of {reference}").into()));
        let digests: Vec<_> = documents.iter().map(|document| document.digest().clone()).collect();
        let image = ImageName {
            reference: reference.into(),
            platform: "linux/amd64".into(),
            target_media_type: MEDIA_TYPE.into(),
            target: digests[0].clone(),
            media_type: MEDIA_TYPE.into(),
            manifest: digests[0].clone(),
            documents: digests.clone(),
            chains: chains.clone(),
        };
        content.publish_name(&image, &documents).await.unwrap();
        let name = image.object(content.publisher());
        for chain in chains {
            let reference = format!("{}/{}", layout::refs(&chain), content.publisher().id());
            self.refs.get_mut(&reference).unwrap().push(name.clone());
        }
        for digest in digests {
            self.documents.insert(layout::document(&digest), vec![name.clone()]);
        }
    }

    /// Does it; whether the object is another one than before.
    async fn harm(&self, object: &str, fault: Fault) -> bool {
        let bytes = self.objects.get(object, u64::MAX).await.unwrap().unwrap().to_vec();
        let harmed = match fault {
            Fault::Lost => {
                self.objects.delete(object).await.unwrap();
                return true;
            }
            Fault::Cut(at) => bytes[..at % bytes.len()].to_vec(),
            Fault::Flipped(at, bit) => {
                let mut harmed = bytes.clone();
                // The second byte of what is signed is its version, and another version is no damage.
                let is_version = |at: usize| at == 1 && !object.starts_with("chunks/");
                let at = at % bytes.len();
                harmed[at + usize::from(is_version(at))] ^= 1 << bit;
                harmed
            }
        };
        self.objects.put(object, harmed.clone().into()).await.unwrap();
        // zstd does not mind every bit.
        let same = self.chunks.get(object).is_some_and(|(length, _)| {
            let plain = codec::decode(&harmed.into(), *length);
            plain.is_ok_and(|plain| layout::chunk(ChunkId::of(&plain).as_bytes()) == object)
        });
        if same {
            self.objects.put(object, bytes.into()).await.unwrap();
        }
        !same
    }

    /// Whether a check can see that this object was harmed, so, where these are harmed.
    fn shows(&self, object: &str, fault: Fault, harmed: &BTreeMap<String, Fault>) -> bool {
        let any_sound = |names: &[String]| names.iter().any(|name| !harmed.contains_key(name));
        if let Some(names) = self.documents.get(object) {
            return any_sound(names);
        }
        if !matches!(fault, Fault::Lost) {
            return true;
        }
        if let Some(names) = self.refs.get(object) {
            return any_sound(names);
        }
        if let Some(refs) = self.indexes.get(object) {
            return any_sound(refs);
        }
        let indexes = &self.chunks[object].1;
        indexes.iter().any(|index| !harmed.contains_key(index) && any_sound(&self.indexes[index]))
    }

    fn checker(&self, quick: bool) -> Checker {
        Checker::new(self.objects.clone(), Options { quick, rate: 0 }).at_once(4)
    }

    async fn check(&self) -> Report {
        self.checker(false).check(&|_| ()).await.unwrap()
    }

    async fn repair(&self, report: &Report) -> Vec<Outcome> {
        let checker = self.checker(false);
        let repair = Repair::new(&self.config, &self.objects, &checker, report, None).unwrap();
        repair.run(None, &Meter::new(true)).await.unwrap()
    }

    /// What is not as it was written.
    async fn differing(&self) -> BTreeSet<String> {
        let mut differing = BTreeSet::new();
        for (name, sound) in &self.sound {
            if self.objects.get(name, u64::MAX).await.unwrap().as_ref() != Some(sound) {
                differing.insert(name.clone());
            }
        }
        differing
    }

    async fn restore_all(&self) {
        for name in self.differing().await {
            self.objects.put(&name, self.sound[&name].clone()).await.unwrap();
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Fault {
    Lost,
    Cut(usize),
    Flipped(usize, u8),
}

fn faults() -> impl Strategy<Value = Vec<(prop::sample::Index, Fault)>> {
    let fault = prop_oneof![
        Just(Fault::Lost),
        any::<usize>().prop_map(Fault::Cut),
        (any::<usize>(), 0..8_u8).prop_map(|(at, bit)| Fault::Flipped(at, bit)),
    ];
    prop::collection::vec((any::<prop::sample::Index>(), fault), 1..12)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn found(report: &Report) -> BTreeSet<String> {
    report.findings.iter().map(|finding| finding.object.name()).collect()
}

fn finding<'a>(report: &'a Report, object: &str) -> &'a Finding {
    report.findings.iter().find(|finding| finding.object.name() == object).unwrap()
}

/// What is harmed is found, nothing else is; and what a node's layer images can bring back comes back, byte by byte, in as many
/// rounds as things hide behind each other.
#[test]
fn everything_that_is_harmed_is_found_and_what_is_here_comes_back() {
    let runtime = runtime();
    let world = runtime.block_on(World::new());
    let names: Vec<String> = world.sound.keys().cloned().collect();
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(48);
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    let tried = TestRunner::new(config).run(&faults(), |faults| {
        runtime.block_on(async {
            // A case that failed leaves what it had harmed, and smaller ones are tried after it.
            world.restore_all().await;
            let mut harmed = BTreeMap::new();
            for (at, fault) in faults {
                let name = at.get(&names);
                // A name that is gone is nothing that a store misses; a cut at the very end is none.
                let is_name = name.starts_with("images/") && matches!(fault, Fault::Lost);
                if !is_name && !harmed.contains_key(name) && world.harm(name, fault).await {
                    harmed.insert(name.clone(), fault);
                }
            }
            let expected: BTreeSet<String> = harmed
                .iter()
                .filter(|(name, fault)| world.shows(name, **fault, &harmed))
                .map(|(name, _)| name.clone())
                .collect();
            let mut report = world.check().await;
            prop_assert_eq!(found(&report), expected);
            // An index behind a ref, a chunk behind an index; names and documents are not here.
            for _ in 0..3 {
                world.repair(&report).await;
                report = world.check().await;
            }
            let left: BTreeSet<String> = world.differing().await;
            let elsewhere = |name: &&String| name.starts_with("images/") || name.starts_with("documents/");
            let hidden = |name: &&String| {
                // Without a name that can be read nothing tells of a chain, nor of what only its ref names.
                harmed.keys().any(|name| name.starts_with("images/")) && !name.starts_with("documents/")
            };
            let lost: Vec<_> = left.iter().filter(|name| !elsewhere(name) && !hidden(name)).collect();
            prop_assert!(lost.is_empty(), "not repaired: {:?}", lost);
            world.restore_all().await;
            prop_assert!(world.check().await.is_clean());
            Ok(())
        })
    });
    tried.unwrap();
}

#[test]
fn a_finding_says_whom_it_touches_and_what_came_of_it() {
    runtime().block_on(async {
        let world = World::new().await;
        let (chunk, _) = world.chunks.iter().find(|(_, (_, indexes))| indexes.len() == 1).unwrap();
        let index = world.chunks[chunk].1[0].clone();
        world.harm(chunk, Fault::Lost).await;
        let name = world.sound.keys().find(|name| name.starts_with("images/")).unwrap();
        world.objects.put(name, Bytes::from_static(b"no name")).await.unwrap();
        let report = world.check().await;
        let lost = finding(&report, chunk);
        assert_eq!(lost.problem, Problem::Missing);
        assert_eq!(lost.layer_count, 1);
        let touched = lost.layers[0].index.unwrap();
        assert_eq!(layout::index(touched.as_bytes()), index);
        assert!(lost.layers[0].diff_id.is_some());
        assert!(matches!(finding(&report, name).problem, Problem::Damaged(_)));
        let outcomes = world.repair(&report).await;
        let of = |object: &str| {
            let number = report.findings.iter().position(|finding| finding.object.name() == object).unwrap();
            outcomes[number].clone()
        };
        assert_eq!(of(chunk), Outcome::Repaired);
        assert!(matches!(of(name), Outcome::Left(why) if why.contains("neither this node's layer images")));
        let found = Found { store: report, outcomes, node: None };
        assert_eq!(found.code(), DAMAGED);
        let (text, json) = (show::human(&found, true), show::json(&found, found.code()));
        assert!(text.contains(&format!("missing    {chunk}: 1 layer, no named image")), "{text}");
        assert!(
            text.contains("2 objects were missing or damaged, 1 were repaired, 1 could not be"),
            "{text}"
        );
        assert_eq!(json["findings"].as_array().unwrap().len(), 2);
        assert_eq!(json["code"], 1);
    });
}

/// What a power loss leaves of an object is often nothing at all. An empty one was once taken for a newer format's.
#[test]
fn what_was_cut_to_nothing_is_damaged() {
    runtime().block_on(async {
        let world = World::new().await;
        for name in world.sound.keys() {
            world.harm(name, Fault::Cut(0)).await;
            let report = world.check().await;
            assert_eq!(found(&report), BTreeSet::from([name.clone()]));
            assert!(matches!(finding(&report, name).problem, Problem::Damaged(_)), "{name}");
            world.restore_all().await;
        }
    });
}

/// A repair that is killed leaves each object as it was or sound, and repeating it goes on.
#[test]
fn a_repair_may_end_at_any_point() {
    runtime().block_on(async {
        let world = World::new().await;
        let harmed: Vec<&String> = world
            .sound
            .keys()
            .filter(|name| !name.starts_with("images/") && !name.starts_with("documents/"))
            .collect();
        for polls in (1..60).step_by(3) {
            for name in &harmed {
                let fault =
                    if name.starts_with("indexes/") { Fault::Lost } else { Fault::Flipped(MIDDLE, 3) };
                world.harm(name, fault).await;
            }
            let before = world.check().await;
            assert!(before.findings.len() > 10, "{polls}");
            {
                let mut repair = pin!(world.repair(&before));
                let mut left = polls;
                std::future::poll_fn(|context| {
                    left -= 1;
                    if left == 0 || repair.poll_unpin(context).is_ready() {
                        Poll::Ready(())
                    } else {
                        Poll::Pending
                    }
                })
                .await;
            }
            let differing = world.differing().await;
            assert!(differing.len() <= harmed.len());
            for _ in 0..2 {
                let report = world.check().await;
                world.repair(&report).await;
            }
            assert!(world.check().await.is_clean(), "after {polls} polls");
            assert_eq!(world.differing().await, BTreeSet::new());
        }
    });
}

#[test]
fn a_quick_look_finds_what_is_lost_and_what_has_an_impossible_size() {
    runtime().block_on(async {
        let world = World::new().await;
        let mut chunks = world.chunks.keys();
        let (lost, empty, flipped) = (chunks.next().unwrap(), chunks.next().unwrap(), chunks.next().unwrap());
        let document = world.documents.keys().next().unwrap();
        world.objects.delete(lost).await.unwrap();
        world.objects.put(empty, Bytes::new()).await.unwrap();
        world.harm(flipped, Fault::Flipped(MIDDLE, 0)).await;
        world.objects.delete(document).await.unwrap();
        let report = world.checker(true).check(&|_| ()).await.unwrap();
        assert_eq!(found(&report), [lost, empty, document].into_iter().cloned().collect());
        assert_eq!(report.bytes, 0);
    });
}

#[test]
fn what_is_newer_is_neither_clean_nor_damaged() {
    runtime().block_on(async {
        let world = World::new().await;
        let reference = world.refs.keys().next().unwrap();
        let newer = [&[0x08, 9], &world.sound[reference][2..]].concat();
        world.objects.put(reference, newer.into()).await.unwrap();
        let report = world.check().await;
        let code = |store| Found { store, outcomes: Vec::new(), node: None }.code();
        assert_eq!(report.newer, std::slice::from_ref(reference));
        assert_eq!(code(report), CANNOT_TELL);
        world.restore_all().await;
        assert_eq!(code(world.check().await), CLEAN);
        // A whole store of a newer version.
        world.objects.put(layout::STORE, Bytes::from_static(b"{\"format\": 9}")).await.unwrap();
        let fresh = world.objects.afresh();
        let refused = Checker::new(fresh, Options::default()).check(&|_| ()).await.unwrap_err();
        assert!(refused.to_string().contains("format 9"), "{refused}");
    });
}

#[test]
fn a_description_that_is_lost_is_written_again() {
    runtime().block_on(async {
        let mut world = World::new().await;
        world.objects.delete(layout::STORE).await.unwrap();
        world.objects = world.objects.afresh();
        let report = world.check().await;
        assert_eq!(found(&report), BTreeSet::from([layout::STORE.to_owned()]));
        assert_eq!(world.repair(&report).await, [Outcome::Repaired]);
        assert!(world.check().await.is_clean());
    });
}

/// Layer images of the node are compared with their own index, which nobody but the node has to have.
#[test]
fn a_damaged_layer_image_of_the_node_is_told() {
    runtime().block_on(async {
        let world = World::new().await;
        let look = |quick| node::check(&world.config, quick, 0, false, &METER);
        let sound = look(false).await.unwrap();
        assert_eq!((sound.checked, sound.without_index, sound.damaged.len()), (3, 0, 0));
        let image = LayerStore::at(world.root.path()).image(2);
        let mut bytes = std::fs::read(&image).unwrap();
        let at = bytes.windows(64).position(|bytes| bytes == &noise(2, 64)[..]).unwrap();
        bytes[at] ^= 1;
        std::fs::write(&image, &bytes).unwrap();
        let found = look(false).await.unwrap();
        assert_eq!((found.damaged.len(), found.damaged[0].serial), (1, 2));
        assert!(look(true).await.unwrap().damaged.is_empty(), "sizes are right");
        std::fs::write(&image, &bytes[..at]).unwrap();
        assert_eq!(look(true).await.unwrap().damaged.len(), 1);
    });
}

/// Layers that are filled as containers read them were passed over.
#[test]
fn of_a_layer_that_is_not_wholly_here_what_is_here_is_compared() {
    runtime().block_on(async {
        let world = World::new().await;
        let look = async || node::check(&world.config, false, 0, false, &METER).await.unwrap();
        let whole = look().await.bytes;
        let store = LayerStore::at(world.root.path());
        std::fs::rename(store.image(2), store.part(2)).unwrap();
        let found = look().await;
        assert_eq!((found.checked, found.incomplete, found.unvouched), (2, 0, 1));
        let index =
            LayerIndex::decode(&store.read_index(2).unwrap(), crate::content::index::Limits::default())
                .unwrap();
        let of_two: u64 = index.chunks().map(|(_, chunk)| u64::from(chunk.length)).sum();
        let (presence, _) = store.presence(2, &index).unwrap();
        let ((offset, _), (_, second)) = (index.chunk(0), index.chunk(1));
        let mut bytes = std::fs::read(store.part(2)).unwrap();
        bytes[usize::try_from(offset).unwrap()] ^= 1;
        std::fs::write(store.part(2), bytes).unwrap();
        presence.set(1);
        let found = look().await;
        assert_eq!(
            (found.checked, found.incomplete, found.damaged.len()),
            (3, 1, 0),
            "nobody vouches for it"
        );
        assert_eq!(found.bytes, whole - of_two + u64::from(second.length));
        presence.set(0);
        let found = look().await;
        assert_eq!((found.damaged.len(), found.damaged[0].serial), (1, 2));
        std::fs::remove_file(store.image(2).with_extension("index")).unwrap();
        let found = look().await;
        assert_eq!((found.checked, found.without_index, found.damaged.len()), (2, 1, 0));
    });
}

static METER: std::sync::LazyLock<Meter> = std::sync::LazyLock::new(|| Meter::new(true));

#[test]
fn an_index_is_restored_only_with_its_own_bytes() {
    runtime().block_on(async {
        let world = World::new().await;
        let content = publish::content_store(&world.config, &world.objects, Arc::default()).unwrap();
        let index = world.indexes.keys().next().unwrap();
        let mut bytes = world.sound[index].to_vec();
        let digest = content.restore_index(bytes.clone().into()).await.unwrap();
        assert_eq!(layout::index(digest.as_bytes()), *index);
        bytes.push(0);
        content.restore_index(bytes.into()).await.unwrap_err();
        assert!(world.check().await.is_clean());
    });
}
