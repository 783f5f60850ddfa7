//! Layer images in the records: what a snapshot consists of, what lies below it, what may go.

use std::path::Path;
use std::sync::Arc;

use speedy::driver::Id;
use speedy::driver::memory::Memory;
use speedy::image::{Facts, Layout, RESERVED};
use speedy::layer::LayerStore;
use speedy::layer::attach::Attacher;
use speedy::oci::{ChainId, DiffId, Digest};
use speedy::snapshot::Kind;
use speedy::snapshot::layers::Layers;
use speedy::snapshot::metastore::{
    Adopted, LayerChoice, MetaStore, NewCommit, NewLayer, NewSnapshot, Origin, Own, Progress, PublishEntry,
};
use speedy::snapshot::reconcile::Reconciler;
use speedy::snapshot::{Key, SnapshotError, Timestamp};

use crate::support::{POLICY, key, no_labels, runtime};

fn digest(digit: char) -> Digest {
    Digest::parse(&format!("sha256:{}", String::from(digit).repeat(64))).unwrap()
}

fn facts(digit: char) -> Facts {
    Facts {
        diff_id: DiffId(digest(digit)),
        attributes: None,
        tar_size: 10240,
        layout: Layout {
            data: RESERVED..RESERVED + 8192,
            metadata: RESERVED + 8192..RESERVED + 12288,
            size: 2 * RESERVED + 12288,
        },
        root_uid: 0,
        root_gid: 7,
        inodes: 3,
        bytes: 8192,
    }
}

fn layer(id: Id, digit: char, origin: Origin) -> LayerChoice {
    LayerChoice::New(NewLayer {
        id,
        facts: facts(digit),
        origin,
        progress: Progress::Complete,
        blob: Some(digest('b')),
        index: None,
        now: Timestamp(5),
    })
}

async fn reserve(meta: &MetaStore) -> Id {
    meta.reserve(1).await.unwrap()[0]
}

async fn prepare(meta: &MetaStore, name: &str, parent: Option<&str>) -> Id {
    let id = reserve(meta).await;
    let (key, parent) = (key(name), parent.map(key));
    let new = NewSnapshot { id, key, parent, kind: Kind::Active, labels: no_labels(), now: Timestamp(1) };
    meta.create(new, LayerChoice::Own).await.unwrap();
    id
}

async fn commit(meta: &MetaStore, active: &str, name: &str, own: Own) {
    let (name, key) = (key(name), key(active));
    let labels = no_labels();
    let commit = NewCommit { name, key, parent: None, labels, own, publish: None, now: Timestamp(2) };
    meta.commit(commit).await.unwrap();
}

/// Prepare, Apply, Commit of one layer; answers the layer's Id.
async fn pull(meta: &MetaStore, name: &str, parent: Option<&str>, digit: char) -> Id {
    let active = format!("extract-{name}");
    prepare(meta, &active, parent).await;
    let id = reserve(meta).await;
    let recorded = meta.applied(key(&active), layer(id, digit, Origin::Applied)).await.unwrap();
    if recorded.id != id {
        meta.discard(vec![id]).await.unwrap();
    }
    commit(meta, &active, name, Own::Unused).await;
    recorded.id
}

fn open(root: &Path) -> MetaStore {
    MetaStore::open(root, "test").unwrap()
}

fn below(meta: &MetaStore, name: &str) -> Vec<u64> {
    let (_, stack) = meta.get_with_stack(&key(name)).unwrap();
    stack.below.iter().map(|id| id.serial).collect()
}

#[test]
fn an_older_file_is_brought_up_and_keeps_everything() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("metadata.db");
    let db = rusqlite::Connection::open(&file).unwrap();
    db.execute_batch(include_str!("data/metadata-v1.sql")).unwrap();
    db.close().unwrap();

    let recorded = speedy::snapshot::metastore::read_recorded(dir.path()).unwrap().unwrap();
    assert_eq!(recorded.ready.len(), 2, "an older file is also read without being changed");
    assert_eq!((recorded.pending, recorded.removing), (vec![7], vec![9]));

    runtime().block_on(async {
        let meta = open(dir.path());
        let work = meta.get(&key("ns/2/work")).unwrap();
        assert_eq!((work.own, work.layer, work.id.serial), (Own::Used, None, 4));
        assert_eq!(below(&meta, "ns/2/work"), [3]);
        assert_eq!(meta.answering("sha256:aa", None).unwrap().info.name, key("ns/1/base"));
        let id = reserve(&meta).await;
        assert!(id.serial > 9, "{id:?}");
        meta.close();
        assert_eq!(open(dir.path()).get(&key("ns/1/base")).unwrap().usage.unwrap().bytes, 4096);
    });
}

#[test]
fn a_layer_image_is_below_what_stands_on_its_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let meta = open(dir.path());
        let one = pull(&meta, "one", None, '1').await;
        let two = pull(&meta, "two", Some("one"), '2').await;
        prepare(&meta, "container", Some("two")).await;
        assert_eq!(below(&meta, "container"), [two.serial, one.serial]);
        assert_eq!(meta.layers_in_use(), [one.serial, two.serial].into());
        meta.close();
        let meta = open(dir.path());
        assert_eq!(below(&meta, "container"), [two.serial, one.serial], "and after a restart");
        assert_eq!(meta.layer(one.serial).unwrap().facts, facts('1'));
    });
}

#[test]
fn a_layer_that_occurs_several_times_is_mounted_where_it_is_uppermost() {
    let dir = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let meta = open(dir.path());
        let a = pull(&meta, "1", None, 'a').await;
        let b = pull(&meta, "2", Some("1"), 'b').await;
        assert_eq!(pull(&meta, "3", Some("2"), 'a').await, a, "stored once");
        prepare(&meta, "aba", Some("3")).await;
        assert_eq!(below(&meta, "aba"), [a.serial, b.serial]);
        let mut parent = "3".to_owned();
        for n in 4..9 {
            let name = n.to_string();
            pull(&meta, &name, Some(&parent), 'e').await;
            parent = name;
        }
        prepare(&meta, "empty", Some(&parent)).await;
        assert_eq!(below(&meta, "empty").len(), 3);
        assert_eq!(meta.claims()[&a.serial], 2);
    });
}

#[test]
fn files_above_a_layer_image_are_part_of_the_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let meta = open(dir.path());
        let own = prepare(&meta, "extract-x", None).await;
        let id = reserve(&meta).await;
        meta.applied(key("extract-x"), layer(id, '1', Origin::Applied)).await.unwrap();
        assert_eq!(below(&meta, "extract-x"), [id.serial], "it is below what is written afterwards");
        let again = meta.applied(key("extract-x"), LayerChoice::Known(id)).await;
        assert!(matches!(again, Err(SnapshotError::NotActive { .. })), "{again:?}");
        commit(&meta, "extract-x", "x", Own::Used).await;
        prepare(&meta, "container", Some("x")).await;
        assert_eq!(below(&meta, "container"), [own.serial, id.serial]);
    });
}

#[test]
fn the_same_layer_from_a_blob_and_from_the_store_are_kept_apart() {
    let dir = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let meta = open(dir.path());
        let applied = pull(&meta, "one", None, '1').await;
        let (id, own) = (reserve(&meta).await, reserve(&meta).await);
        let new = NewSnapshot {
            id: own,
            key: key("hit"),
            parent: None,
            kind: Kind::Committed,
            labels: no_labels(),
            now: Timestamp(3),
        };
        let adopted = meta.adopt(new, "sha256:cc".into(), layer(id, '1', Origin::Fetched)).await.unwrap();
        let Adopted::Created(record) = adopted else { panic!("{adopted:?}") };
        assert_eq!((record.layer, record.own), (Some(id.serial), Own::Unused));
        assert_eq!(meta.layer_of(&facts('1'), Origin::Applied).unwrap().id, applied);
        assert_eq!(meta.layer_of(&facts('1'), Origin::Fetched).unwrap().id, id);
        assert_eq!(
            meta.layer_of_blob(&digest('b')).unwrap().id,
            applied,
            "a blob vouches for what it became only"
        );
    });
}

#[test]
fn only_layers_that_nobody_needs_are_evicted() {
    let dir = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let meta = open(dir.path());
        let (kept, queued, gone) = (
            pull(&meta, "kept", None, '1').await,
            pull(&meta, "queued", None, '2').await,
            pull(&meta, "gone", None, '3').await,
        );
        let entry = PublishEntry {
            chain: ChainId(digest('2')),
            below: None,
            namespace: "ns".into(),
            layer: Some(queued.serial),
            added: Timestamp(1),
            attempts: 0,
            dropped: None,
            message: String::new(),
        };
        meta.enqueue(entry.clone()).await.unwrap();
        for name in ["queued", "gone"] {
            meta.remove(Key::new(name).unwrap()).await.unwrap();
        }
        meta.evict(vec![kept.serial, queued.serial, gone.serial]).await.unwrap();
        let left: Vec<u64> = meta.layers().iter().map(|layer| layer.id.serial).collect();
        assert_eq!(left, [kept.serial, queued.serial]);
        assert!(meta.removing().contains(&gone));
        meta.close();

        let meta = open(dir.path());
        assert_eq!(meta.publish_queue(), std::slice::from_ref(&entry), "the queue outlives a restart");
        let given_up =
            PublishEntry { dropped: Some("no use".into()), message: "no use".into(), ..entry.clone() };
        meta.requeue(entry.chain.clone(), Some(given_up)).await.unwrap();
        meta.evict(vec![queued.serial]).await.unwrap();
        assert!(meta.publish_queue().is_empty(), "an entry goes with its layer");
        meta.requeue(entry.chain.clone(), Some(entry)).await.unwrap();
        assert!(meta.publish_queue().is_empty(), "and does not come back");
    });
}

/// A kill between the renaming of a finished image and its record left a complete image of a Pending Id, which looks like one of
/// a newer `metadata.db`: each start reported it, and nobody ever removed it. What was never recorded is marked now.
#[test]
fn an_image_that_was_never_recorded_is_garbage_at_the_next_start() {
    let dir = tempfile::tempdir().unwrap();
    let meta = Arc::new(MetaStore::open(dir.path(), "memory").unwrap());
    let store = Arc::new(LayerStore::open(dir.path(), Attacher::untried(dir.path())).unwrap());
    let layers = Arc::new(Layers::new(Arc::clone(&meta), Arc::clone(&store), None, None));
    runtime().block_on(async {
        let (killed, newer, half) = (reserve(&meta).await, reserve(&meta).await, reserve(&meta).await);
        store.mark_new(killed.serial).unwrap();
        for id in [killed, newer] {
            store.complete(id.serial, &store.create(id.serial).unwrap()).unwrap();
        }
        store.create(half.serial).unwrap();
        let driver = Arc::new(Memory::default());
        let reconciler = Reconciler::new(Arc::clone(&meta), driver, Some(layers), POLICY.room);
        reconciler.start().await.unwrap();
        assert_eq!(meta.pending(), [newer]);
        for id in meta.removing() {
            store.remove(id.serial).unwrap();
        }
        assert_eq!(store.inventory().unwrap(), [newer.serial]);
        // What is recorded is marked no longer.
        store.mark_new(newer.serial).unwrap();
        store.unmark_new(newer.serial).unwrap();
        store.unmark_new(newer.serial).unwrap();
        assert!(store.was_recorded(newer.serial));
    });
}
