//! Documents of images, and the way from a reference to them.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use speedy::content::document::Document;
use speedy::content::name::ImageName;
use speedy::content::trust::{PublisherKey, Trust};
use speedy::content::{ContentError, ContentStore};
use speedy::object::{Objects, StoreOptions, layout};

use super::support::{Image, chain, digest, key, node};
use crate::support::runtime;

const REFERENCE: &str = "registry.example/app:1";
const PLATFORM: &str = "linux/amd64";

fn document(text: &str) -> Document {
    Document::of(Bytes::copy_from_slice(text.as_bytes()))
}

/// An image whose manifest has this text, under [`REFERENCE`].
async fn name(store: &ContentStore, manifest: &str) -> ImageName {
    let documents = [document(manifest), document("config")];
    let name = ImageName {
        reference: REFERENCE.into(),
        platform: PLATFORM.into(),
        target_media_type: "m".into(),
        target: digest(manifest),
        media_type: "m".into(),
        manifest: digest(manifest),
        documents: documents.iter().map(|document| document.digest().clone()).collect(),
        chains: vec![chain("a")],
    };
    store.publish_name(&name, &documents).await.unwrap();
    name
}

#[test]
fn a_document_comes_back_as_it_was_or_not_at_all() {
    runtime().block_on(async {
        let (objects, dir) = (Objects::memory(), tempfile::tempdir().unwrap());
        let (store, _) = node(&objects, key(1), Trust::Keys(Vec::new()));
        Image::make(dir.path(), 1, 100_000).publish(&store, &[chain("a")]).await.unwrap();
        name(&store, "manifest").await;
        assert_eq!(store.document(&digest("manifest")).await.unwrap().unwrap(), "manifest");
        assert_eq!(store.document(&digest("other")).await.unwrap(), None);
        for wrong in [&b"manifest "[..], b"", &[b'x'; (8 << 20) + 1]] {
            let object = layout::document(&digest("manifest"));
            objects.put(&object, Bytes::copy_from_slice(wrong)).await.unwrap();
            let error = store.document(&digest("manifest")).await.unwrap_err();
            assert!(matches!(error, ContentError::DamagedDocument { .. }), "{error}");
        }
        // A publish mends it.
        name(&store, "manifest").await;
        assert!(store.document(&digest("manifest")).await.unwrap().is_some());
    });
}

/// Two publishers pull a tag before and after it moves: who is asked later must get where it moved to, in whatever order the keys
/// are listed.
#[test]
fn of_several_that_are_accepted_the_newest_name_counts() {
    runtime().block_on(async {
        let (at, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let url = format!("file://{}", at.path().display());
        let objects = Objects::open(&url, &StoreOptions::default()).unwrap();
        let open = |own: PublisherKey, trust: Trust| node(&objects, own, trust).0;
        let image = Image::make(dir.path(), 1, 100_000);
        let mut names = Vec::new();
        for seed in 1..=4 {
            let store = open(key(seed), Trust::Keys(Vec::new()));
            image.publish(&store, &[chain("a")]).await.unwrap();
            names.push(name(&store, &format!("of {seed}")).await);
        }
        let age = |seed: u8, hours: u64| {
            let object = names[usize::from(seed) - 1].object(key(seed).public());
            let file = std::fs::File::options().append(true).open(at.path().join(object)).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(hours * 3600)).unwrap();
        };
        let listed = |keys: &[u8]| Trust::Keys(keys.iter().map(|seed| *key(*seed).public()).collect());
        for (ages, own, trust, newest) in [
            ([1, 2, 3, 4], 1, listed(&[2, 3]), 1),
            ([4, 3, 2, 1], 1, listed(&[2, 3]), 3),
            ([4, 2, 3, 1], 1, listed(&[3, 2]), 2),
            ([4, 3, 2, 1], 9, Trust::Any, 4),
            ([4, 3, 2, 1], 9, listed(&[1]), 1),
        ] {
            (1..).zip(ages).for_each(|(seed, hours)| age(seed, hours));
            let store = open(key(own), trust);
            let found = store.find_name(REFERENCE, PLATFORM).await.unwrap().unwrap();
            assert_eq!(found.publisher, *key(newest).public(), "{ages:?} {own}");
            assert_eq!(found.image, names[usize::from(newest) - 1]);
        }
        let stranger = open(key(9), listed(&[8]));
        assert_eq!(stranger.find_name(REFERENCE, PLATFORM).await.unwrap(), None);
        assert_eq!(stranger.find_name("registry.example/app:2", PLATFORM).await.unwrap(), None);
        let arm = open(key(1), listed(&[])).find_name(REFERENCE, "linux/arm64").await.unwrap();
        assert_eq!(arm, None);
        // One that is damaged says nothing; the next one counts.
        let object = names[0].object(key(1).public());
        objects.put(&object, Bytes::from_static(b"rubbish")).await.unwrap();
        let found = open(key(1), listed(&[2])).find_name(REFERENCE, PLATFORM).await.unwrap().unwrap();
        assert_eq!(found.publisher, *key(2).public());
    });
}
