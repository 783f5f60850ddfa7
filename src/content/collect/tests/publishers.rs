//! What publishers do so that a collection takes nothing of theirs, and what a collection does so.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::catalogue::{Catalogue, key, keys, node};
use crate::chunk::remote::Remote;
use crate::chunk::store::{ChunkSink, ChunkStore};
use crate::chunk::verified::Verified;
use crate::chunk::{ChunkError, ChunkId, ChunkRef};
use crate::content::collect::{Collector, Rules};
use crate::content::name::ImageName;
use crate::content::publish::PublishRequest;
use crate::content::trust::Trust;
use crate::content::{ContentError, ContentStore, Options, Parts, reference};
use crate::object::layout;
use crate::object::simulated::World;

const HOUR: Duration = Duration::from_secs(3600);
const PATIENCE: Duration = Duration::from_secs(600);

/// Publishes the lowest layer of an image.
async fn publish(store: &ContentStore, catalogue: &Catalogue, image: usize) -> Result<(), ContentError> {
    let layer = &catalogue.layers[catalogue.images[image][0]];
    let chains = [catalogue.chain(image, 0)];
    let request = PublishRequest { image: &layer.image, facts: &layer.facts, chains: &chains };
    store.publish(request, &|_| (), &CancellationToken::new()).await.map(drop)
}

fn written(world: &World, name: &str) -> Option<i64> {
    world.objects().into_iter().find(|(object, _)| object == name).map(|(_, modified)| modified)
}

/// Chunks of which the first that is put takes longer than a publisher may look.
#[derive(Debug)]
struct Late {
    chunks: Verified<Remote>,
    was_late: AtomicBool,
}

#[async_trait]
impl ChunkStore for Late {
    async fn get(&self, chunk: ChunkRef) -> Result<Bytes, ChunkError> {
        self.chunks.get(chunk).await
    }

    async fn contains(&self, id: ChunkId) -> Result<bool, ChunkError> {
        self.chunks.contains(id).await
    }
}

#[async_trait]
impl ChunkSink for Late {
    async fn put(&self, id: ChunkId, plain: Bytes) -> Result<u64, ChunkError> {
        if !self.was_late.swap(true, Ordering::SeqCst) {
            sleep(7 * HOUR).await;
        }
        self.chunks.put(id, plain).await
    }

    async fn renew(&self, id: ChunkId) -> Result<(), ChunkError> {
        self.chunks.renew(id).await
    }
}

/// Chunks that were young enough to be left alone were no more so when the ref was written.
#[tokio::test(start_paused = true)]
async fn a_publisher_that_was_slow_looks_at_everything_again() {
    let (catalogue, world) = (Catalogue::make().await, World::new(1, Duration::ZERO));
    let objects = world.seen_by(0, 0).patient(PATIENCE);
    publish(&node(&objects, 0, Duration::ZERO, 0).0, &catalogue, 0).await.unwrap();
    let chunks = &catalogue.layers[0].chunks;
    assert!(chunks.len() > 1 && world.harm(&chunks[0], true));
    sleep(23 * HOUR).await;
    let late = Late { chunks: Verified::new(Remote::new(objects.clone())), was_late: AtomicBool::new(false) };
    let (chunks_of, trust) = (Arc::new(late), Trust::Keys(keys()));
    let parts = Parts { objects: objects.clone(), chunks: chunks_of, key: key(1), trust };
    publish(&ContentStore::new(parts, Options::default()), &catalogue, 0).await.unwrap();
    for chunk in chunks {
        let age = world.now() - written(&world, chunk).unwrap();
        assert!(age < 3600, "{chunk} is {age} s old beside its ref");
    }
}

/// A collector had looked at a chunk before the publisher did, and deleted it when the publisher relied on it.
#[tokio::test(start_paused = true)]
async fn a_publisher_waits_for_a_collection_and_looks_again() {
    let (catalogue, world) = (Catalogue::make().await, World::new(1, Duration::ZERO));
    let objects = world.seen_by(0, 0).patient(PATIENCE);
    let (store, _) = node(&objects, 0, Duration::ZERO, 0);
    objects.put(layout::COLLECTION, Bytes::from_static(b"{}")).await.unwrap();
    let chunk = &catalogue.layers[0].chunks[0];
    let deleted = async {
        while written(&world, &catalogue.layers[0].index).is_none() {
            sleep(Duration::from_millis(100)).await;
        }
        sleep(Duration::from_secs(30)).await;
        assert!(world.harm(chunk, true));
    };
    let (published, ()) = tokio::join!(publish(&store, &catalogue, 0), deleted);
    published.unwrap();
    assert!(written(&world, chunk).is_some(), "a ref needs what is gone");
}

#[tokio::test(start_paused = true)]
async fn a_name_makes_the_refs_young_that_it_relies_on() {
    let (catalogue, world) = (Catalogue::make().await, World::new(1, Duration::ZERO));
    let objects = world.seen_by(0, 0).patient(PATIENCE);
    let (store, _) = node(&objects, 0, Duration::ZERO, 0);
    publish(&store, &catalogue, 0).await.unwrap();
    sleep(30 * HOUR).await;
    store.publish_name(&catalogue.name(0), &Catalogue::document(0)).await.unwrap();
    let made = written(&world, &reference::name(&catalogue.chain(0, 0), key(0).public())).unwrap();
    assert!(world.now() - made < 3600, "the ref is {} s old", world.now() - made);
}

#[tokio::test(start_paused = true)]
async fn a_name_whose_layer_is_missing_is_not_written() {
    let (catalogue, world) = (Catalogue::make().await, World::new(1, Duration::ZERO));
    let (store, _) = node(&world.seen_by(0, 0).patient(PATIENCE), 0, Duration::ZERO, 0);
    publish(&store, &catalogue, 1).await.unwrap();
    let refused = store.publish_name(&catalogue.name(1), &Catalogue::document(1)).await.unwrap_err();
    assert!(matches!(refused, ContentError::LayerMissing { .. }), "{refused}");
    assert_eq!(written(&world, &catalogue.name(1).object(key(0).public())), None);
}

#[tokio::test(start_paused = true)]
async fn a_publisher_whose_clock_is_wrong_writes_no_ref() {
    let (catalogue, world) = (Catalogue::make().await, World::new(1, Duration::ZERO));
    let (store, _) = node(&world.seen_by(2 * 3600, 0).patient(PATIENCE), 0, Duration::ZERO, 0);
    let refused = publish(&store, &catalogue, 0).await.unwrap_err();
    assert!(matches!(refused, ContentError::Clock { .. }), "{refused}");
    assert_eq!(written(&world, &reference::name(&catalogue.chain(0, 0), key(0).public())), None);
}

/// Its layers were there already, so nobody had looked at its clock: old refs seemed to be young.
#[tokio::test(start_paused = true)]
async fn a_publisher_whose_clock_is_wrong_writes_no_name() {
    let (catalogue, world) = (Catalogue::make().await, World::new(1, Duration::ZERO));
    publish(&node(&world.seen_by(0, 0).patient(PATIENCE), 0, Duration::ZERO, 0).0, &catalogue, 0)
        .await
        .unwrap();
    for ahead in [-2 * 3600, 2 * 3600] {
        let (wrong, _) = node(&world.seen_by(ahead, 0).patient(PATIENCE), 1, Duration::ZERO, 0);
        let whole = (catalogue.name(0), Catalogue::document(0).to_vec());
        let bare = (ImageName { documents: Vec::new(), ..catalogue.name(0) }, Vec::new());
        for (name, documents) in [whole, bare] {
            let refused = wrong.publish_name(&name, &documents).await.unwrap_err();
            assert!(matches!(refused, ContentError::Clock { .. }), "{refused}");
            assert_eq!(written(&world, &name.object(key(1).public())), None);
        }
    }
}

/// A listing shows chunks as they were before they were made young.
#[tokio::test(start_paused = true)]
async fn what_a_late_listing_calls_old_is_looked_at_before_it_goes() {
    let world = World::new(1, Duration::from_secs(1800));
    let objects = world.seen_by(0, 0).patient(PATIENCE);
    let names: Vec<String> = (0..30_u8).map(|n| layout::chunk(blake3::hash(&[n]).as_bytes())).collect();
    for name in &names {
        objects.put(name, Bytes::from_static(b"chunk")).await.unwrap();
    }
    sleep(2400 * HOUR).await;
    let collector = Collector::new(objects.clone(), Rules::default()).unwrap();
    let plan = collector.plan(&|_| ()).await.unwrap();
    assert_eq!(plan.report.dead().objects, 30);
    for name in &names {
        objects.put(name, Bytes::from_static(b"chunk")).await.unwrap();
    }
    let freed = collector.execute(&plan, &|_| ()).await.unwrap();
    assert!(freed.total().objects == 0 && freed.spared > 0, "{freed:?}");
}

/// Chunks, index, ref, documents, name: whoever sees one finds what it needs.
#[tokio::test(start_paused = true)]
async fn a_publisher_writes_nothing_before_what_it_needs() {
    let (catalogue, world) = (Catalogue::make().await, World::new(1, Duration::ZERO));
    let (store, _) = node(&world.seen_by(0, 0).patient(PATIENCE), 0, Duration::ZERO, 0);
    let [reference, index, needs @ ..] = &catalogue.needs(0, &[*key(0).public()])[..] else { panic!() };
    let (reference, index) = (reference[0].clone(), index[0].clone());
    let needs: Vec<String> = needs.iter().flatten().cloned().collect();
    let name = catalogue.name(0).object(key(0).public());
    let wrong: Arc<Mutex<Vec<String>>> = Arc::default();
    let found = Arc::clone(&wrong);
    world.on_change(move |change| {
        let mut needed: Vec<&String> = Vec::new();
        let is = |name: &str| change.name == name;
        if is(&index) || is(&reference) || is(&name) {
            needed.extend(needs.iter().filter(|need| is(&name) || need.starts_with("chunks/")));
        }
        needed.extend((is(&reference) || is(&name)).then_some(&index));
        needed.extend(is(&name).then_some(&reference));
        let missing = needed.into_iter().filter(|need| !(change.is_there)(need));
        found.lock().extend(missing.map(|need| format!("{} before {need}", change.name)));
    });
    catalogue.publish(&store, 0).await;
    assert_eq!(*wrong.lock(), Vec::<String>::new());
    assert!(written(&world, &catalogue.name(0).object(key(0).public())).is_some());
}
