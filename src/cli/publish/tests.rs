//! Images from layouts and archives made by hand, published to a store in memory.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::archive::Archive;
use super::show::{self, Meter, Outcome};
use super::source::{Image, Source};
use super::work::{Present, Work};
use crate::chunk::remote::Remote;
use crate::chunk::verified::Verified;
use crate::containerd::manifest::Platform;
use crate::content::trust::{PublisherKey, Trust};
use crate::content::{ContentStore, Found, Lookup, Options, Parts};
use crate::image::Limits;
use crate::object::Objects;
use crate::oci::{ChainId, Digest, Sha256};

const PLAIN: &str = "application/vnd.oci.image.layer.v1.tar";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

fn sha256(bytes: &[u8]) -> Digest {
    let mut hasher = Sha256::default();
    hasher.update(bytes);
    hasher.digest()
}

/// A layer's tar: names with a slash at the end are directories with this mode.
fn layer(entries: &[(&str, u32, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, mode, content) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(*mode);
        header.set_entry_type(if name.ends_with('/') {
            tar::EntryType::Directory
        } else {
            tar::EntryType::Regular
        });
        tar.append_data(&mut header, name, *content).unwrap();
    }
    tar.into_inner().unwrap()
}

fn base() -> Vec<u8> {
    layer(&[("etc/", 0o750, b""), ("etc/base", 0o644, &[b'b'; 9000])])
}

/// Implies `etc`.
fn above() -> Vec<u8> {
    layer(&[("etc/above", 0o644, &[b'a'; 5000])])
}

fn config(layers: &[Vec<u8>]) -> Vec<u8> {
    let diff_ids: Vec<String> = layers.iter().map(|layer| sha256(layer).to_string()).collect();
    let config = json!({ "os": "linux", "architecture": "amd64", "rootfs": { "type": "layers", "diff_ids": diff_ids } });
    serde_json::to_vec(&config).unwrap()
}

/// An OCI layout with one image of each of these, tagged.
fn layout(images: &[(&str, &[Vec<u8>])]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(dir.path().join("blobs/sha256")).unwrap();
    std::fs::write(dir.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let add = |media_type: &str, bytes: &[u8]| -> Value {
        let digest = sha256(bytes);
        std::fs::write(dir.path().join("blobs/sha256").join(&digest.as_str()[7..]), bytes).unwrap();
        json!({ "mediaType": media_type, "digest": digest.as_str(), "size": bytes.len() })
    };
    let mut manifests = Vec::new();
    for (tag, layers) in images {
        let config = add("application/vnd.oci.image.config.v1+json", &config(layers));
        let layers: Vec<Value> = layers.iter().map(|layer| add(PLAIN, layer)).collect();
        let manifest = json!({ "schemaVersion": 2, "config": config, "layers": layers });
        let mut entry = add(MANIFEST, &serde_json::to_vec(&manifest).unwrap());
        entry["annotations"] = json!({ "org.opencontainers.image.ref.name": tag });
        manifests.push(entry);
    }
    let index = json!({ "schemaVersion": 2, "manifests": manifests });
    std::fs::write(dir.path().join("index.json"), index.to_string()).unwrap();
    dir
}

fn store(objects: &Objects) -> Arc<ContentStore> {
    let chunks = Arc::new(Verified::new(Remote::new(objects.clone())));
    let key = PublisherKey::from_seed([1; 32]);
    let parts = Parts { objects: objects.clone(), chunks, key, trust: Trust::Keys(Vec::new()) };
    Arc::new(ContentStore::new(parts, Options::default()))
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}

async fn resolve(source: &mut Source, name: &str) -> anyhow::Result<Image> {
    source.image(name, &Platform::parse("linux/amd64").unwrap()).await
}

async fn publish(
    objects: &Objects,
    mut source: Source,
    name: &str,
    present: Present,
) -> anyhow::Result<(Image, Vec<Outcome>)> {
    let temp = tempfile::tempdir().unwrap();
    let image = resolve(&mut source, name).await?;
    let meter = Arc::new(Meter::new(&image, true));
    let (store, limits) = (store(objects), Limits::default());
    let work = Work { store, source, image, temp: temp.path().to_owned(), present, limits, meter };
    let outcomes = work.run().await?;
    assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 0, "layer images are left");
    Ok((work.image, outcomes))
}

async fn publish_layout(
    objects: &Objects,
    dir: &Path,
    name: &str,
    present: Present,
) -> (Image, Vec<Outcome>) {
    let source = Source::layout(dir.to_str().unwrap()).unwrap();
    publish(objects, source, name, present).await.unwrap()
}

async fn found(objects: &Objects, chain: &ChainId) -> Found {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    match store(objects).lookup(chain, deadline).await.unwrap() {
        Lookup::Found(found) => found,
        other => panic!("{other:?}"),
    }
}

fn message(error: &anyhow::Error) -> String {
    format!("{error:#}")
}

#[test]
fn a_layout_is_published_once() {
    run(async {
        let (objects, dir) = (Objects::memory(), layout(&[("1", &[base(), above()])]));
        let (image, outcomes) = publish_layout(&objects, dir.path(), "app:1", Present::Skip).await;
        assert_eq!(image.reference, "docker.io/library/app:1");
        assert!(outcomes.iter().all(|outcome| matches!(outcome, Outcome::Published(p) if p.new_chunks > 0)));
        for layer in &image.layers {
            let seen = found(&objects, &layer.chain).await;
            assert_eq!(seen.index.facts().diff_id, layer.diff_id);
            let chunks = seen.index.chunks().map(|(_, chunk)| chunk);
            assert_eq!(store(&objects).missing(chunks).await.unwrap(), []);
        }
        let images = store(&objects).images(10).await.unwrap().images;
        assert_eq!(images[0].image.reference, image.reference);
        assert_eq!(images[0].image.media_type, MANIFEST);
        assert_eq!(images[0].image.chains.last(), Some(&image.layers[1].chain));

        let (_, again) = publish_layout(&objects, dir.path(), "app:1", Present::Skip).await;
        assert!(again.iter().all(|outcome| matches!(outcome, Outcome::Present { .. })));
        let (_, forced) = publish_layout(&objects, dir.path(), "app:1", Present::PublishAgain).await;
        assert!(forced.iter().all(|outcome| matches!(outcome, Outcome::Published(p) if p.new_chunks == 0)));
    });
}

#[test]
fn implied_directories_are_as_in_the_layers_below_wherever_those_are() {
    run(async {
        let whole = layout(&[("1", &[base(), above()])]);
        let objects = Objects::memory();
        let (image, _) = publish_layout(&objects, whole.path(), "app:1", Present::Skip).await;
        let at_once = found(&objects, &image.layers[1].chain).await;
        assert!(at_once.index.facts().attributes.is_some(), "etc is 0750 below");

        // The lower layer is in the store already, its image is nowhere on this machine.
        let objects = Objects::memory();
        let lower = layout(&[("1", &[base()])]);
        publish_layout(&objects, lower.path(), "base:1", Present::Skip).await;
        let (image, outcomes) = publish_layout(&objects, whole.path(), "app:1", Present::Skip).await;
        assert!(matches!(outcomes[..], [Outcome::Present { .. }, Outcome::Published(_)]));
        let later = found(&objects, &image.layers[1].chain).await;
        assert_eq!(later.digest, at_once.digest);

        // On nothing, the same layer is another image.
        let alone = layout(&[("1", &[above()])]);
        let (image, _) = publish_layout(&objects, alone.path(), "alone:1", Present::Skip).await;
        let alone = found(&objects, &image.layers[0].chain).await;
        assert_eq!(alone.index.facts().attributes, None);
        assert_ne!(alone.digest, later.digest);
    });
}

#[test]
fn a_layer_that_occurs_twice_is_published_for_each_place() {
    run(async {
        let (a, b) = (base(), layer(&[("usr/", 0o755, b""), ("usr/b", 0o644, b"b")]));
        let (objects, dir) = (Objects::memory(), layout(&[("1", &[a.clone(), b, a])]));
        let (image, outcomes) = publish_layout(&objects, dir.path(), "aba:1", Present::Skip).await;
        assert_eq!(outcomes.len(), 3);
        assert!(matches!(&outcomes[2], Outcome::Published(published) if published.new_chunks == 0));
        let (first, third) = (&image.layers[0].chain, &image.layers[2].chain);
        assert_ne!(first, third);
        assert_eq!(found(&objects, first).await.digest, found(&objects, third).await.digest);
    });
}

#[test]
fn a_layout_with_several_images_wants_a_tag() {
    run(async {
        let dir = layout(&[("one", &[base()]), ("two", &[above()])]);
        let path = dir.path().to_str().unwrap();
        let mut tagged = Source::layout(&format!("{path}:two")).unwrap();
        assert_eq!(resolve(&mut tagged, "x").await.unwrap().layers[0].diff_id.0, sha256(&above()));
        for wrong in [path.to_owned(), format!("{path}:three")] {
            let error = resolve(&mut Source::layout(&wrong).unwrap(), "x").await.unwrap_err();
            assert!(message(&error).contains("one, two"), "{error:#}");
        }
        assert!(Source::layout("/nonexistent").is_err());
    });
}

#[test]
fn a_damaged_layout_is_refused() {
    run(async {
        let blob =
            |dir: &TempDir, bytes: &[u8]| dir.path().join("blobs/sha256").join(&sha256(bytes).as_str()[7..]);
        let failed = async |dir: &TempDir| {
            let objects = Objects::memory();
            let source = Source::layout(dir.path().to_str().unwrap()).unwrap();
            let error = publish(&objects, source, "app:1", Present::Skip).await.unwrap_err();
            assert_eq!(store(&objects).images(10).await.unwrap().images, []);
            message(&error)
        };
        let dir = layout(&[("1", &[base(), above()])]);
        std::fs::write(blob(&dir, &above()), base()).unwrap();
        let error = failed(&dir).await;
        assert!(error.contains("layer 2 of 2") && error.contains("it unpacks to"), "{error}");
        std::fs::remove_file(blob(&dir, &above())).unwrap();
        let error = failed(&dir).await;
        assert!(error.contains("lacks a layer"), "{error}");
        std::fs::write(blob(&dir, &config(&[base(), above()])), b"{}").unwrap();
        let error = failed(&dir).await;
        assert!(error.contains("damaged"), "{error}");
        let dir = layout(&[("1", &[base()])]);
        std::fs::write(blob(&dir, &base()), &base()[..base().len() / 2]).unwrap();
        let error = failed(&dir).await;
        assert!(error.contains("not a proper tar"), "{error}");
    });
}

/// An archive with these files, in this order; a content that begins with `@` is a symlink.
fn archive(files: &[(&str, Vec<u8>)]) -> (TempDir, Vec<u8>) {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        match content.strip_prefix(b"@") {
            Some(target) => {
                header.set_entry_type(tar::EntryType::Symlink);
                header.set_size(0);
                tar.append_link(&mut header, name, std::str::from_utf8(target).unwrap()).unwrap();
            }
            None => {
                header.set_size(content.len() as u64);
                tar.append_data(&mut header, name, content.as_slice()).unwrap();
            }
        }
    }
    (tempfile::tempdir().unwrap(), tar.into_inner().unwrap())
}

/// As `docker save` wrote it for ten years, with a layer that is a link to another.
fn saved() -> (TempDir, Vec<u8>) {
    let layers = [base(), above(), base()];
    let config = config(&layers);
    let name = format!("{}.json", &sha256(&config).as_str()[7..]);
    let long = "d".repeat(120);
    let layer_names = ["aa/layer.tar".to_owned(), format!("{long}/layer.tar"), "cc/layer.tar".to_owned()];
    let manifest = json!([
        { "Config": name, "RepoTags": ["app:1", "app:latest"], "Layers": layer_names },
        { "Config": name, "RepoTags": null, "Layers": ["gone/layer.tar", "aa/layer.tar", "aa/layer.tar"] },
    ]);
    archive(&[
        (&layer_names[0], layers[0].clone()),
        (&layer_names[1], layers[1].clone()),
        (&layer_names[2], b"@../aa/layer.tar".to_vec()),
        (&name, config),
        ("./manifest.json", manifest.to_string().into_bytes()),
    ])
}

fn write(dir: &TempDir, bytes: &[u8]) -> std::path::PathBuf {
    let path = dir.path().join("image.tar");
    std::fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn a_docker_archive_is_published() {
    run(async {
        let (dir, bytes) = saved();
        let objects = Objects::memory();
        let source = Source::archive(&write(&dir, &bytes)).unwrap();
        let (image, outcomes) = publish(&objects, source, "app:1", Present::Skip).await.unwrap();
        assert_eq!(outcomes.len(), 3);
        let layers: Vec<Digest> = image.layers.iter().map(|layer| layer.diff_id.0.clone()).collect();
        assert_eq!(layers, [sha256(&base()), sha256(&above()), sha256(&base())]);
        assert_eq!(image.manifest.digest, sha256(&config(&[base(), above(), base()])));
        // The same as from a layout.
        let layout = layout(&[("1", &[base(), above(), base()])]);
        let (_, again) = publish_layout(&objects, layout.path(), "app:1", Present::Skip).await;
        assert!(again.iter().all(|outcome| matches!(outcome, Outcome::Present { .. })));
    });
}

#[test]
fn a_docker_archive_that_is_damaged_is_refused() {
    run(async {
        let (dir, bytes) = saved();
        let error = resolve(&mut Source::archive(&write(&dir, &bytes)).unwrap(), "other").await.unwrap_err();
        assert!(message(&error).contains("app:1, app:latest"), "{error:#}");
        // Without the end of the archive, or of anything in it.
        for length in (0..bytes.len() - 1024).step_by(512) {
            let opened = Source::archive(&write(&dir, &bytes[..length]));
            assert!(opened.is_err(), "cut at {length}");
        }
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let at = text.find("amd64").unwrap();
        let mut wrong = bytes.clone();
        wrong[at] = b'b';
        let error = resolve(&mut Source::archive(&write(&dir, &wrong)).unwrap(), "app").await.unwrap_err();
        assert!(message(&error).contains("damaged"), "{error:#}");

        let manifest = json!([{ "Config": "gone.json", "RepoTags": ["app:1"], "Layers": ["gone.tar"] }]);
        let (dir, bytes) = archive(&[("manifest.json", manifest.to_string().into_bytes())]);
        let error = resolve(&mut Source::archive(&write(&dir, &bytes)).unwrap(), "app:1").await.unwrap_err();
        assert!(message(&error).contains("does not have it"), "{error:#}");
        let (dir, bytes) = archive(&[("other", b"x".to_vec())]);
        assert!(Source::archive(&write(&dir, &bytes)).is_err());
    });
}

#[test]
fn a_docker_archive_never_breaks_its_reader() {
    let (dir, bytes) = saved();
    let mut state = 1_u64;
    let mut next = |limit: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 33).unwrap() % limit
    };
    for _ in 0..2000 {
        let mut wrong = bytes.clone();
        for _ in 0..=next(3) {
            let at = next(wrong.len());
            wrong[at] = u8::try_from(next(256)).unwrap();
        }
        if let Ok(archive) = Archive::open(&write(&dir, &wrong)) {
            drop(archive.image("app:1"));
        }
    }
}

#[test]
fn the_result_names_everything() {
    run(async {
        let (objects, dir) = (Objects::memory(), layout(&[("1", &[base(), above()])]));
        let (image, outcomes) = publish_layout(&objects, dir.path(), "app:1", Present::Skip).await;
        let start = std::time::Instant::now();
        let result = show::to_json(&image, &outcomes, start);
        assert_eq!(result["image"], "docker.io/library/app:1");
        assert_eq!(result["platform"], "linux/amd64");
        assert_eq!(result["layers"][1]["outcome"], "published");
        assert_eq!(result["layers"][1]["chain_id"], image.layers[1].chain.to_string());
        let fields: BTreeMap<String, Value> = serde_json::from_value(result["layers"][0].clone()).unwrap();
        for field in ["index", "chunks", "new_chunks", "bytes", "new_bytes", "uploaded_bytes", "diff_id"] {
            assert!(fields.contains_key(field), "{field}");
        }
        let text = show::human(&image, &outcomes, start);
        assert!(text.starts_with("published docker.io/library/app:1 (linux/amd64): 2 layers, "), "{text}");
    });
}
