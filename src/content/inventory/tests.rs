use futures::TryStreamExt;

use super::*;
use crate::content::trust::PublisherKey;
use crate::object::layout;

fn key() -> PublisherKey {
    PublisherKey::from_seed([1; 32])
}

fn image(reference: &str) -> ImageName {
    ImageName {
        reference: reference.into(),
        platform: "linux/amd64".into(),
        target_media_type: String::new(),
        target: digest_of(&[3; 32]),
        media_type: String::new(),
        documents: Vec::new(),
        manifest: digest_of(&[3; 32]),
        chains: vec![ChainId(digest_of(&[4; 32]))],
    }
}

async fn put(objects: &Objects, name: &str, bytes: &[u8]) {
    objects.put(name, bytes.to_vec().into()).await.unwrap();
}

#[tokio::test]
async fn what_is_there_is_found_and_what_is_foreign_is_counted() {
    let objects = Objects::memory();
    let inventory = Inventory::new(objects.clone());
    let mut expected = Vec::new();
    for n in 0..40_u8 {
        let place = Place { hash: *blake3::hash(&[n]).as_bytes(), key: 0 };
        put(&objects, &Kind::Chunk.object(&place), &[0; 7]).await;
        expected.push(place);
    }
    for foreign in ["chunks/00/README", "chunks/00/ab/cd", &format!("chunks/00/{}", "ff".repeat(32))] {
        put(&objects, foreign, b"x").await;
    }
    let parts: Vec<Part> = inventory.parts(Kind::Chunk).try_collect().await.unwrap();
    assert_eq!(parts.len(), 256);
    let mut found: Vec<Place> = parts.iter().flat_map(|part| &part.entries).map(|e| e.place).collect();
    found.sort();
    expected.sort();
    assert_eq!(found, expected);
    assert!(parts.iter().flat_map(|part| &part.entries).all(|e| e.size == 7 && e.modified > 0));
    assert_eq!(parts.iter().map(|part| part.foreign).sum::<u64>(), 3);
    for kind in Kind::ALL.into_iter().filter(|kind| *kind != Kind::Chunk) {
        let parts: Vec<Part> = inventory.parts(kind).try_collect().await.unwrap();
        assert!(parts.iter().all(|part| *part == Part::default()), "{kind:?}");
    }
}

#[tokio::test]
async fn names_and_refs_say_something_or_why_not() {
    let (objects, key) = (Objects::memory(), key());
    let inventory = Inventory::new(objects.clone());
    let good = image("r.example/app:1");
    put(&objects, &good.object(key.public()), &good.encode(&key).unwrap()).await;
    let bad = image("r.example/app:2");
    put(&objects, &bad.object(key.public()), b"rubbish").await;
    let newer = image("r.example/app:3");
    put(&objects, &newer.object(key.public()), &[0x08, 0x7f]).await;
    let long = image("r.example/app:4");
    put(&objects, &long.object(key.public()), &vec![0; 70_000]).await;
    let names: Vec<Read<_>> = inventory.names().try_collect().await.unwrap();
    let of = |image: &ImageName| {
        let name = image.object(key.public());
        names.iter().find(|read| read.entry.name() == name).unwrap().said.clone()
    };
    assert_eq!(of(&good), Ok((good.clone(), *key.public())));
    assert!(matches!(of(&bad), Err(Unreadable::Damaged(_))));
    assert!(matches!(of(&newer), Err(Unreadable::Newer(_))));
    assert!(matches!(of(&long), Err(Unreadable::Damaged(_))));

    let chain = |byte| ChainId(digest_of(&[byte; 32]));
    let digest = IndexDigest::of(b"index");
    let said = reference::encode(&chain(1), digest, &key);
    put(&objects, &reference::name(&chain(1), key.public()), &said).await;
    // The word about another chain.
    put(&objects, &reference::name(&chain(2), key.public()), &said).await;
    put(&objects, &reference::name(&chain(3), key.public()), &[&[0x08, 2], &said[2..]].concat()).await;
    let refs: Vec<Read<Ref>> = inventory.refs().try_collect().await.unwrap();
    let of = |byte| refs.iter().find(|read| read.entry.chain() == chain(byte)).unwrap().said.clone();
    assert_eq!(of(1), Ok(Ref { index: digest, publisher: *key.public() }));
    assert!(matches!(of(2), Err(Unreadable::Damaged(_))));
    assert!(matches!(of(3), Err(Unreadable::Newer(_))));
}

#[tokio::test]
async fn an_index_is_read_by_its_digest() {
    let objects = Objects::memory();
    let inventory = Inventory::new(objects.clone());
    let digest = IndexDigest::of(&[0x08, 9]);
    assert_eq!(inventory.index(digest).await.unwrap(), Reading::Gone);
    put(&objects, &layout::index(digest.as_bytes()), b"other bytes").await;
    let read = inventory.index(digest).await.unwrap();
    assert!(matches!(read, Reading::Unreadable(Unreadable::Damaged(_))), "{read:?}");
    put(&objects, &layout::index(digest.as_bytes()), &[0x08, 9]).await;
    let read = inventory.index(digest).await.unwrap();
    assert!(matches!(read, Reading::Unreadable(Unreadable::Newer(_))), "{read:?}");
}

/// What is not a matter of one object ends the walk: a store that is only half seen is not walked.
#[tokio::test]
async fn a_store_of_another_format_is_not_walked() {
    let objects = Objects::memory();
    put(&objects, "chunks/00/x", b"").await;
    let newer = br#"{"format": 2}"#;
    objects.put(layout::STORE, newer.to_vec().into()).await.unwrap();
    let again = objects.clone();
    again.forget_description();
    let inventory = Inventory::new(again);
    let walked: Result<Vec<Part>, _> = inventory.parts(Kind::Chunk).try_collect().await;
    assert!(matches!(walked, Err(ContentError::Object(ObjectError::Format { found: 2, .. }))), "{walked:?}");
}
