//! Whose word about a layer is taken.

use bytes::Bytes;
use speedy::content::document::Document;
use speedy::content::index::IndexDigest;
use speedy::content::name::{ImageName, NameError};
use speedy::content::reference::{self, RefError};
use speedy::content::trust::Trust;
use speedy::content::{ContentError, Lookup, Word};
use speedy::object::{Objects, StoreOptions, layout};
use tokio::time::{Duration, Instant};

use super::support::{Image, chain, digest, fetch, found, key, lookup, node};
use crate::support::runtime;

fn only_own() -> Trust {
    Trust::Keys(Vec::new())
}

#[test]
fn a_layer_of_an_unknown_publisher_is_refused_and_named() {
    runtime().block_on(async {
        let (objects, dir) = (Objects::memory(), tempfile::tempdir().unwrap());
        let (publisher, _) = node(&objects, key(1), only_own());
        let (stranger, _) = node(&objects, key(2), only_own());
        let image = Image::make(dir.path(), 1, 3 << 20);
        image.publish(&publisher, &[chain("a")]).await.unwrap();

        match lookup(&stranger, &chain("a")).await.unwrap() {
            Lookup::Refused { keys } => assert_eq!(keys, [*key(1).public()]),
            other => panic!("{other:?}"),
        }
        let (friend, _) = node(&objects, key(3), Trust::Keys(vec![*key(9).public(), *key(1).public()]));
        let seen = found(&friend, &chain("a")).await;
        assert_eq!(seen.publisher, *key(1).public());
        assert_eq!(fetch(&friend, &seen).await, image.bytes);
        let (anybody, _) = node(&objects, key(4), Trust::Any);
        assert_eq!(found(&anybody, &chain("a")).await.publisher, *key(1).public());
        assert!(matches!(lookup(&friend, &chain("b")).await.unwrap(), Lookup::Missing));
        assert!(matches!(lookup(&anybody, &chain("b")).await.unwrap(), Lookup::Missing));
    });
}

#[test]
fn publishers_do_not_overwrite_one_another() {
    runtime().block_on(async {
        let (objects, dir) = (Objects::memory(), tempfile::tempdir().unwrap());
        let (first, _) = node(&objects, key(1), only_own());
        let (second, _) = node(&objects, key(2), only_own());
        let (one, other) = (Image::make(dir.path(), 1, 1 << 20), Image::make(dir.path(), 5, 1 << 20));
        let one = one.publish(&first, &[chain("a")]).await.unwrap();
        let other = other.publish(&second, &[chain("a")]).await.unwrap();
        assert_ne!(one.index, other.index);
        assert_eq!(found(&first, &chain("a")).await.digest, one.index);
        assert_eq!(found(&second, &chain("a")).await.digest, other.index);
        // Its own first, then in the order of the list.
        let (third, _) = node(&objects, key(3), Trust::Keys(vec![*key(2).public(), *key(1).public()]));
        assert_eq!(found(&third, &chain("a")).await.digest, other.index);
    });
}

#[test]
fn a_ref_with_a_wrong_signature_is_no_layer() {
    runtime().block_on(async {
        let (objects, dir) = (Objects::memory(), tempfile::tempdir().unwrap());
        let (publisher, _) = node(&objects, key(1), only_own());
        Image::make(dir.path(), 1, 1 << 20).publish(&publisher, &[chain("a")]).await.unwrap();
        let name = reference::name(&chain("a"), key(1).public());
        let mut bytes = objects.get(&name, 4096).await.unwrap().unwrap().to_vec();
        *bytes.last_mut().unwrap() ^= 1;
        objects.put(&name, Bytes::from(bytes)).await.unwrap();
        let (friend, _) = node(&objects, key(2), Trust::Keys(vec![*key(1).public()]));
        for store in [&publisher, &friend] {
            let error = lookup(store, &chain("a")).await.unwrap_err();
            assert!(matches!(&error, ContentError::Ref { source: RefError::Forged { .. }, .. }), "{error}");
        }
        // A stranger's damaged ref is nobody's.
        let (stranger, _) = node(&objects, key(3), only_own());
        assert!(matches!(lookup(&stranger, &chain("a")).await.unwrap(), Lookup::Missing));
        let (anybody, _) = node(&objects, key(4), Trust::Any);
        assert!(matches!(lookup(&anybody, &chain("a")).await.unwrap(), Lookup::Missing));
        // And it does not hide another accepted publisher's good one.
        Image::make(dir.path(), 1, 1 << 20).publish(&stranger, &[chain("a")]).await.unwrap();
        let both = Trust::Keys(vec![*key(1).public(), *key(3).public()]);
        let (both, _) = node(&objects, key(2), both);
        assert_eq!(found(&both, &chain("a")).await.publisher, *key(3).public());
    });
}

#[test]
fn a_ref_replayed_for_another_chain_is_refused() {
    runtime().block_on(async {
        let (objects, dir) = (Objects::memory(), tempfile::tempdir().unwrap());
        let (publisher, _) = node(&objects, key(1), only_own());
        Image::make(dir.path(), 1, 1 << 20).publish(&publisher, &[chain("a")]).await.unwrap();
        let good = objects.get(&reference::name(&chain("a"), key(1).public()), 4096).await.unwrap().unwrap();
        objects.put(&reference::name(&chain("b"), key(1).public()), good).await.unwrap();
        let error = lookup(&publisher, &chain("b")).await.unwrap_err();
        assert!(matches!(error, ContentError::Ref { source: RefError::Misplaced, .. }), "{error}");
    });
}

#[test]
fn an_oversized_ref_is_malformed() {
    runtime().block_on(async {
        let objects = Objects::memory();
        let (store, _) = node(&objects, key(1), only_own());
        let name = reference::name(&chain("a"), key(1).public());
        objects.put(&name, Bytes::from(vec![0; 5000])).await.unwrap();
        let error = lookup(&store, &chain("a")).await.unwrap_err();
        assert!(matches!(error, ContentError::Ref { source: RefError::Malformed, .. }), "{error}");
    });
}

#[test]
fn an_index_that_was_tampered_with_is_refused() {
    runtime().block_on(async {
        let (objects, dir) = (Objects::memory(), tempfile::tempdir().unwrap());
        let (store, _) = node(&objects, key(1), only_own());
        let published = Image::make(dir.path(), 1, 1 << 20).publish(&store, &[chain("a")]).await.unwrap();
        let name = layout::index(published.index.as_bytes());
        let good = objects.get(&name, 1 << 20).await.unwrap().unwrap();
        let mut wrong = good.to_vec();
        wrong[40] ^= 1;
        for wrong in [wrong, good[..good.len() - 1].to_vec(), Vec::new()] {
            objects.put(&name, Bytes::from(wrong)).await.unwrap();
            let error = lookup(&store, &chain("a")).await.unwrap_err();
            assert!(
                matches!(error, ContentError::DamagedIndex { digest } if digest == published.index),
                "{error}"
            );
        }
        objects.delete(&name).await.unwrap();
        let error = lookup(&store, &chain("a")).await.unwrap_err();
        assert!(matches!(error, ContentError::MissingIndex { .. }), "{error}");
        // Publishing again mends it.
        Image::make(dir.path(), 1, 1 << 20).publish(&store, &[chain("a")]).await.unwrap();
        found(&store, &chain("a")).await;
    });
}

#[test]
fn a_malformed_index_with_a_good_signature_is_refused() {
    runtime().block_on(async {
        let objects = Objects::memory();
        let (store, _) = node(&objects, key(1), only_own());
        let bytes = b"\x08\x01 is no index";
        let digest = IndexDigest::of(bytes);
        objects.put(&layout::index(digest.as_bytes()), Bytes::from_static(bytes)).await.unwrap();
        let signed = reference::encode(&chain("a"), digest, &key(1));
        objects.put(&reference::name(&chain("a"), key(1).public()), signed.into()).await.unwrap();
        let error = lookup(&store, &chain("a")).await.unwrap_err();
        assert!(matches!(error, ContentError::Index(_)), "{error}");
        assert!(matches!(store.word(&chain("a")).await.unwrap(), Word::Accepted(_)));
    });
}

#[test]
fn c2_a_name_is_written_only_when_all_layers_are_there() {
    runtime().block_on(async {
        let (objects, dir) = (Objects::memory(), tempfile::tempdir().unwrap());
        let (store, _) = node(&objects, key(1), only_own());
        let image = Image::make(dir.path(), 1, 1 << 20);
        let name = ImageName {
            reference: "registry.example/app:1".into(),
            platform: "linux/amd64".into(),
            target_media_type: String::new(),
            target: digest("manifest"),
            media_type: String::new(),
            manifest: digest("manifest"),
            documents: vec![digest("manifest"), digest("config")],
            chains: vec![chain("a"), chain("b")],
        };
        image.publish(&store, &[chain("a")]).await.unwrap();
        let documents = ["manifest", "config"].map(|text| Document::of(Bytes::from_static(text.as_bytes())));
        let others = store.publish_name(&name, &documents[..1]).await.unwrap_err();
        assert!(matches!(others, ContentError::Name(NameError::OtherDocuments)), "{others}");
        let error = store.publish_name(&name, &documents).await.unwrap_err();
        assert!(
            matches!(&error, ContentError::LayerMissing { chain: lacking } if *lacking == chain("b")),
            "{error}"
        );
        assert_eq!(store.images(100).await.unwrap().images, []);
        assert_eq!(store.document(&digest("config")).await.unwrap(), None);
        image.publish(&store, &[chain("b")]).await.unwrap();
        store.publish_name(&name, &documents).await.unwrap();
        for text in ["manifest", "config"] {
            assert_eq!(store.document(&digest(text)).await.unwrap().unwrap(), text.as_bytes());
        }
        let listed = store.images(100).await.unwrap();
        assert_eq!((listed.images.len(), listed.passed_over), (1, 0));
        assert_eq!(listed.images[0].image, name);
        assert_eq!(listed.images[0].publisher, *key(1).public());

        // Others do not see it, and what is no name is passed over.
        let (stranger, _) = node(&objects, key(2), only_own());
        assert_eq!(stranger.images(100).await.unwrap().passed_over, 1);
        objects.put("images/00/rubbish/00", Bytes::from_static(b"rubbish")).await.unwrap();
        objects.put("images/00/large/00", Bytes::from(vec![0; 1 << 17])).await.unwrap();
        let listed = store.images(100).await.unwrap();
        assert_eq!((listed.images.len(), listed.passed_over), (1, 2));
    });
}

#[test]
fn a_store_that_does_not_answer_is_given_up_in_time() {
    runtime().block_on(async {
        // Takes connections and says nothing.
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", silent.local_addr().unwrap());
        let settings = [
            ("AWS_ENDPOINT", endpoint.as_str()),
            ("AWS_ALLOW_HTTP", "true"),
            ("AWS_ACCESS_KEY_ID", "key"),
            ("AWS_SECRET_ACCESS_KEY", "secret"),
            ("AWS_REGION", "anywhere"),
        ];
        let settings =
            settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let options = StoreOptions { settings, ..StoreOptions::default() };
        let objects = Objects::open("s3://bucket/prefix", &options).unwrap();
        let (store, _) = node(&objects, key(1), only_own());
        let start = Instant::now();
        for (time, least) in
            [(Duration::from_millis(300), Duration::from_millis(300)), (Duration::ZERO, Duration::ZERO)]
        {
            let late = store.lookup(&chain("a"), Instant::now() + time).await.unwrap_err();
            assert!(matches!(late, ContentError::TooLate), "{late}");
            assert!(
                start.elapsed() >= least && start.elapsed() < Duration::from_secs(5),
                "{:?}",
                start.elapsed()
            );
        }
    });
}
