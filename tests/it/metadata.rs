//! The metadata store: its invariants by name, and what it does with files that are not its own.

use std::sync::Arc;

use speedy::driver::memory::Memory;
use speedy::driver::overlay::{Overlay, OverlayOptions};
use speedy::driver::{Driver, Id};
use speedy::snapshot::filter::Filter;
use speedy::snapshot::metastore::{
    self, Adopted, LayerChoice, MetaError, MetaStore, NewCommit, NewSnapshot, Own,
};
use speedy::snapshot::remote::LABEL_REF;
use speedy::snapshot::{Key, Kind, LabelUpdate, Labels, SnapshotError, Timestamp};

use crate::support::{POLICY, Running, key, labels, no_labels, runtime};

const CHAIN: &str = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";

async fn reserve(meta: &MetaStore) -> Id {
    meta.reserve(1).await.unwrap()[0]
}

async fn create(meta: &MetaStore, name: &str, parent: Option<&str>, kind: Kind) -> Result<Id, SnapshotError> {
    let id = reserve(meta).await;
    let new = NewSnapshot {
        id,
        key: key(name),
        parent: parent.map(key),
        kind,
        labels: no_labels(),
        now: Timestamp::now(),
    };
    meta.create(new, LayerChoice::Own).await.map(|record| record.id)
}

async fn commit(meta: &MetaStore, name: &str, active: &str, labels: Labels) -> Result<Id, SnapshotError> {
    let commit = NewCommit {
        name: key(name),
        key: key(active),
        parent: None,
        labels,
        own: Own::Used,
        publish: None,
        now: Timestamp::now(),
    };
    meta.commit(commit).await.map(|record| record.id)
}

fn open(dir: &tempfile::TempDir) -> MetaStore {
    MetaStore::open(dir.path(), "memory").unwrap()
}

#[test]
fn m1_keys_and_names_share_one_space() {
    let dir = tempfile::tempdir().unwrap();
    let meta = open(&dir);
    runtime().block_on(async {
        create(&meta, "a", None, Kind::Active).await.unwrap();
        create(&meta, "b", None, Kind::Active).await.unwrap();
        commit(&meta, "name", "a", no_labels()).await.unwrap();
        for taken in ["name", "b"] {
            for kind in [Kind::Active, Kind::View] {
                let again = create(&meta, taken, None, kind).await;
                assert!(matches!(again, Err(SnapshotError::AlreadyExists { .. })), "{again:?}");
            }
        }
        let onto_key = commit(&meta, "b", "b", no_labels()).await;
        assert!(matches!(onto_key, Err(SnapshotError::AlreadyExists { .. })));
        assert!(meta.get(&key("a")).is_none(), "a committed snapshot has lost its key");
    });
}

#[test]
fn m2_parent_is_committed() {
    let dir = tempfile::tempdir().unwrap();
    let meta = open(&dir);
    runtime().block_on(async {
        create(&meta, "active", None, Kind::Active).await.unwrap();
        create(&meta, "view", None, Kind::View).await.unwrap();
        for parent in ["active", "view"] {
            let child = create(&meta, "child", Some(parent), Kind::Active).await;
            assert!(matches!(child, Err(SnapshotError::ParentNotCommitted { .. })), "{child:?}");
        }
        let orphan = create(&meta, "child", Some("nobody"), Kind::Active).await;
        assert!(matches!(orphan, Err(SnapshotError::ParentNotFound { .. })));
    });
}

#[test]
fn m2_parent_outlives_its_children() {
    let dir = tempfile::tempdir().unwrap();
    let meta = open(&dir);
    runtime().block_on(async {
        create(&meta, "a", None, Kind::Active).await.unwrap();
        commit(&meta, "base", "a", no_labels()).await.unwrap();
        create(&meta, "child", Some("base"), Kind::View).await.unwrap();
        assert!(matches!(meta.remove(key("base")).await, Err(SnapshotError::HasChildren { .. })));
        meta.remove(key("child")).await.unwrap();
        meta.remove(key("base")).await.unwrap();
    });
}

#[test]
fn m3_ids_stay_and_serials_are_never_reused() {
    let dir = tempfile::tempdir().unwrap();
    let first = {
        let meta = open(&dir);
        runtime().block_on(async {
            let id = create(&meta, "a", None, Kind::Active).await.unwrap();
            assert_eq!(commit(&meta, "name", "a", no_labels()).await.unwrap(), id);
            meta.remove(key("name")).await.unwrap();
            meta.forget(vec![id]).await.unwrap();
            id
        })
    };
    let meta = open(&dir);
    runtime().block_on(async {
        let next = create(&meta, "a", None, Kind::Active).await.unwrap();
        assert!(next.serial > first.serial, "{next:?} after {first:?}");
        assert_eq!(next.slot, first.slot, "slots are small because they are used again");
        assert_eq!(meta.last_serial().await.unwrap(), next.serial);
        meta.claim(vec![1000]).await.unwrap();
        assert_eq!(reserve(&meta).await.serial, 1001);
    });
}

#[test]
fn m4_an_id_is_recorded_first_and_forgotten_last() {
    let dir = tempfile::tempdir().unwrap();
    let meta = open(&dir);
    runtime().block_on(async {
        let pending = reserve(&meta).await;
        assert_eq!(meta.pending(), [pending]);
        let unrecorded = Id { serial: 99, slot: 99 };
        let new = NewSnapshot {
            id: unrecorded,
            key: key("x"),
            parent: None,
            kind: Kind::Active,
            labels: no_labels(),
            now: Timestamp::now(),
        };
        let refused = meta.create(new, LayerChoice::Own).await;
        assert!(matches!(refused, Err(SnapshotError::Meta(MetaError::NotPending { serial: 99 }))));
        let used = create(&meta, "a", None, Kind::Active).await.unwrap();
        meta.forget(vec![used]).await.unwrap();
        assert!(meta.get(&key("a")).is_some(), "a snapshot's id is not forgotten");
        meta.remove(key("a")).await.unwrap();
        assert_eq!(meta.removing(), [used]);
        meta.forget(vec![used]).await.unwrap();
        assert_eq!(meta.removing(), []);
    });
}

#[test]
fn m5_one_snapshot_answers_for_a_ref_on_a_parent() {
    let dir = tempfile::tempdir().unwrap();
    let meta = open(&dir);
    let of_chain = labels(&[(LABEL_REF, CHAIN)]);
    let adopt = async |name: &str, parent: Option<&str>| {
        let new = NewSnapshot {
            id: reserve(&meta).await,
            key: key(name),
            parent: parent.map(key),
            kind: Kind::Committed,
            labels: of_chain.clone(),
            now: Timestamp::now(),
        };
        meta.adopt(new, CHAIN.into(), LayerChoice::Own).await.unwrap()
    };
    runtime().block_on(async {
        assert!(matches!(adopt("one", None).await, Adopted::Created(_)));
        let Adopted::AlreadyThere(first) = adopt("two", None).await else { panic!("two answer") };
        assert_eq!(first.info.name, key("one"));
        // Another parent is another place in the tree.
        assert!(matches!(adopt("three", Some("one")).await, Adopted::Created(_)));
        // An ordinary pull in another namespace may commit the same layer: it is kept, but does not answer.
        create(&meta, "pulled", None, Kind::Active).await.unwrap();
        commit(&meta, "four", "pulled", of_chain.clone()).await.unwrap();
        assert_eq!(meta.answering(CHAIN, None).unwrap().info.name, key("one"));
        meta.remove(key("three")).await.unwrap();
        meta.remove(key("one")).await.unwrap();
        assert!(meta.answering(CHAIN, None).is_none());
        assert!(matches!(adopt("five", None).await, Adopted::Created(_)));
        // containerd finds a hit by its label; one that lost it does not answer any more.
        let update = LabelUpdate::Replace(no_labels());
        meta.update(key("five"), update, Timestamp::now()).await.unwrap();
        assert!(meta.answering(CHAIN, None).is_none());
    });
}

#[test]
fn m6_list_shows_what_was_made_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let running = Running::start(dir.path(), Arc::new(Memory::default()), POLICY, "").await;
        let snapshotter = &running.snapshotter;
        let names = || -> Vec<String> {
            let all = snapshotter.list(&Filter::parse(&[]).unwrap());
            all.iter().map(|r| r.info.name.as_str().to_owned()).collect()
        };
        assert_eq!(names(), [""; 0], "storage made ahead is not listed");
        snapshotter.prepare(key("b"), None, no_labels()).await.unwrap();
        snapshotter.view(key("a"), None, no_labels()).await.unwrap();
        assert_eq!(names(), ["a", "b"]);
        snapshotter.commit(key("c"), key("b"), None, no_labels()).await.unwrap();
        assert_eq!(names(), ["a", "c"]);
        snapshotter.remove(key("c")).await.unwrap();
        assert_eq!(names(), ["a"]);
        running.stop().await;
    });
}

#[test]
fn records_survive_a_restart_as_they_were() {
    let dir = tempfile::tempdir().unwrap();
    let odd = "ns/1/with space\nnewline\0nul \u{1f980}";
    let before = {
        let meta = open(&dir);
        runtime().block_on(async {
            create(&meta, odd, None, Kind::Active).await.unwrap();
            commit(&meta, "base", odd, labels(&[("a", "1"), ("empty", "")])).await.unwrap();
            create(&meta, odd, Some("base"), Kind::View).await.unwrap();
        });
        meta.all()
    };
    assert_eq!(before.len(), 2);
    assert_eq!(open(&dir).all(), before);
}

#[test]
fn operations_that_wait_together_are_each_answered() {
    let dir = tempfile::tempdir().unwrap();
    let meta = Arc::new(open(&dir));
    runtime().block_on(async {
        let calls = (0..200).map(|n| {
            let meta = Arc::clone(&meta);
            async move { create(&meta, &format!("key-{}", n % 50), None, Kind::Active).await.is_ok() }
        });
        let mut tasks = tokio::task::JoinSet::new();
        calls.for_each(|call| drop(tasks.spawn(call)));
        let made = tasks.join_all().await.into_iter().filter(|made| *made).count();
        assert_eq!(made, 50, "each key once");
        assert_eq!(meta.all().len(), 50);
        assert_eq!(meta.pending().len(), 150);
    });
}

#[test]
fn a_closed_store_refuses() {
    let dir = tempfile::tempdir().unwrap();
    let meta = open(&dir);
    meta.close();
    let refused = runtime().block_on(meta.reserve(1));
    assert!(matches!(refused, Err(SnapshotError::Meta(MetaError::Closed))));
}

fn refused(dir: &tempfile::TempDir, content: &[u8]) -> MetaError {
    let file = dir.path().join("metadata.db");
    std::fs::write(&file, content).unwrap();
    let error = MetaStore::open(dir.path(), "memory").unwrap_err();
    assert_eq!(std::fs::read(&file).unwrap(), content, "the file was touched");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "something was put beside it");
    error
}

#[test]
fn a_foreign_metadata_file_is_refused_and_not_touched() {
    let dir = tempfile::tempdir().unwrap();
    let bolt = [&[0; 16][..], &[0xed, 0xda, 0x0c, 0xed], &[0; 4000]].concat();
    let other_sqlite = [&b"SQLite format 3\0"[..], &[0; 84]].concat();
    for content in [&bolt[..], &other_sqlite, b"", b"SQLite", b"text"] {
        let error = refused(&dir, content);
        assert!(matches!(error, MetaError::Foreign { .. }), "{error}");
        assert!(error.to_string().contains("nothing was touched"), "{error}");
    }
}

#[test]
fn another_version_is_refused_and_not_touched() {
    let dir = tempfile::tempdir().unwrap();
    open(&dir).close();
    let mut content = std::fs::read(dir.path().join("metadata.db")).unwrap();
    for leftover in ["metadata.db-wal", "metadata.db-shm"] {
        drop(std::fs::remove_file(dir.path().join(leftover)));
    }
    content[60..64].copy_from_slice(&99_u32.to_be_bytes());
    let error = refused(&dir, &content);
    assert!(matches!(error, MetaError::Version { found: 99, known: 2, .. }), "{error}");
}

#[test]
fn another_drivers_root_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    open(&dir).close();
    let error = MetaStore::open(dir.path(), "overlayfs").unwrap_err();
    assert!(matches!(&error, MetaError::OtherDriver { found, .. } if found == "memory"), "{error}");
    assert!(open(&dir).all().is_empty());
}

/// The file gets its name when it is complete: a start that is killed while making it leaves only the unfinished one.
#[test]
fn an_unfinished_metadata_file_is_made_anew() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("metadata.db.new"), "half").unwrap();
    std::fs::write(dir.path().join("metadata.db.new-journal"), "half").unwrap();
    open(&dir).close();
    assert!(!dir.path().join("metadata.db.new").exists());
    assert!(metastore::is_present(dir.path()).unwrap());
}

#[test]
fn a_start_frees_what_no_record_names_and_keeps_what_was_never_given_out() {
    let dir = tempfile::tempdir().unwrap();
    let driver: Arc<dyn Driver> = Arc::new(Overlay::open(dir.path(), OverlayOptions::default()).unwrap());
    let layer = |serial: u64| dir.path().join("l").join(serial.to_string());
    runtime().block_on(async {
        let running = Running::start(dir.path(), Arc::clone(&driver), POLICY, "").await;
        running.snapshotter.prepare(key("kept"), None, no_labels()).await.unwrap();
        running.snapshotter.prepare(key("gone"), None, no_labels()).await.unwrap();
        running.snapshotter.remove(key("gone")).await.unwrap();
        let kept = running.meta.get(&key("kept")).unwrap().id.serial;
        let gone = running.meta.removing()[0].serial;
        let ahead = running.meta.pending();
        running.stop().await;

        // What a kill may leave: storage whose record is gone. And what it can not: a serial from the future.
        std::fs::create_dir_all(layer(1_000_000).join("fs/precious")).unwrap();
        speedy::sys::tree::remove(&layer(kept), &|| false).unwrap();
        let running = Running::start(dir.path(), Arc::clone(&driver), POLICY, "").await;
        running.snapshotter.cleanup().await;
        assert!(!layer(gone).exists());
        assert!(ahead.iter().all(|id| !layer(id.serial).exists()), "an earlier process's stock is freed");
        assert!(layer(1_000_000).exists(), "never given out: may be the only copy of something");
        assert!(running.meta.get(&key("kept")).is_some(), "damage is reported, the record stays");
        let fresh = running.meta.reserve(1).await.unwrap()[0];
        assert!(fresh.serial > 1_000_000);
        running.stop().await;

        // The first start moved the serials beyond it, which once made the second one take it for garbage.
        let running = Running::start(dir.path(), driver, POLICY, "").await;
        running.snapshotter.cleanup().await;
        assert!(layer(1_000_000).join("fs/precious").exists());
        running.stop().await;
    });
}

/// A copy of metadata.db made while the daemon runs knows as Pending what becomes the next layers. Restored, it once had their
/// storage freed as leftovers of a killed process.
#[test]
fn a_restored_older_file_costs_no_layer() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("metadata.db");
    let driver: Arc<dyn Driver> = Arc::new(Overlay::open(dir.path(), OverlayOptions::default()).unwrap());
    runtime().block_on(async {
        let running = Running::start(dir.path(), Arc::clone(&driver), POLICY, "").await;
        running.snapshotter.prepare(key("first"), None, no_labels()).await.unwrap();
        let backup = sqlite_backup(&file);
        running.snapshotter.prepare(key("later"), None, no_labels()).await.unwrap();
        let serial = running.meta.get(&key("later")).unwrap().id.serial;
        let precious = dir.path().join(format!("l/{serial}/fs/precious"));
        std::fs::write(&precious, "x").unwrap();
        running.stop().await;

        std::fs::write(&file, backup).unwrap();
        for _ in 0..2 {
            let running = Running::start(dir.path(), Arc::clone(&driver), POLICY, "").await;
            running.snapshotter.cleanup().await;
            assert!(precious.exists());
            assert!(running.meta.get(&key("later")).is_none(), "the records are the older ones");
            running.stop().await;
        }
    });
}

/// What `sqlite3 metadata.db ".backup copy"` gives: one consistent file.
fn sqlite_backup(file: &std::path::Path) -> Vec<u8> {
    let copy = file.with_extension("copy");
    let db = rusqlite::Connection::open(file).unwrap();
    db.execute("VACUUM INTO ?1", [copy.to_str().unwrap()]).unwrap();
    std::fs::read(copy).unwrap()
}

#[test]
fn an_update_cannot_make_a_snapshot_unmountable() {
    let dir = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let running = Running::start(dir.path(), Arc::new(Memory::default()), POLICY, "").await;
        running.snapshotter.prepare(key("k"), None, no_labels()).await.unwrap();
        let junk = labels(&[("containerd.io/snapshot/uidmapping", "junk")]);
        let refused = running.snapshotter.update(key("k"), LabelUpdate::Replace(junk)).await;
        assert!(matches!(refused, Err(SnapshotError::Mapping(_))), "{refused:?}");
        running.snapshotter.mounts(&key("k")).await.unwrap();
        running.stop().await;
    });
}

#[test]
fn records_can_be_read_beside_a_running_daemon() {
    let dir = tempfile::tempdir().unwrap();
    assert!(metastore::read_recorded(dir.path()).unwrap().is_none());
    let meta = open(&dir);
    runtime().block_on(async {
        let id = create(&meta, "a", None, Kind::Active).await.unwrap();
        let ahead = reserve(&meta).await;
        let recorded = metastore::read_recorded(dir.path()).unwrap().unwrap();
        assert_eq!(recorded.ready, [(id.serial, Key::new("a").unwrap())]);
        assert_eq!(recorded.pending, [ahead.serial]);
        assert_eq!(recorded.last_serial, ahead.serial);
    });
}
