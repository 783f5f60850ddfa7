//! Storage that fails, layers that cannot be had, callers that go away: nothing is lost, nothing is left, pulls go on.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use speedy::driver::memory::Memory;
use speedy::driver::overlay::{Overlay, OverlayOptions};
use speedy::driver::{Cancelled, Creation, Driver, DriverError, Id, Inventory, Measure, Mount, MountRequest};
use speedy::snapshot::filter::Filter;
use speedy::snapshot::remote::LABEL_REF;
use speedy::snapshot::snapshotter::{Policy, Sharing};
use speedy::snapshot::{Kind, Prepared, SnapshotError};

use crate::support::{POLICY, Running, key, labels, no_labels, runtime};

const CHAIN: &str = "sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb";

/// A driver that can be told to fail.
#[derive(Debug, Default)]
struct Faulty {
    inner: Memory,
    full: AtomicBool,
    busy: AtomicBool,
    unwritable: AtomicBool,
}

impl Faulty {
    fn check_full(&self) -> Result<(), DriverError> {
        match self.full.load(Ordering::SeqCst) {
            true => Err(DriverError::at(Path::new("/faulty"), io::ErrorKind::StorageFull.into())),
            false => Ok(()),
        }
    }
}

impl Driver for Faulty {
    fn reserve(&self, ids: &[Id]) -> Result<(), DriverError> {
        self.check_full()?;
        self.inner.reserve(ids)
    }

    fn create(&self, new: &Creation) -> Result<(), DriverError> {
        self.check_full()?;
        self.inner.create(new)
    }

    fn mounts(&self, request: &MountRequest<'_>) -> Vec<Mount> {
        self.inner.mounts(request)
    }

    fn fill(&self, id: Id, write: &mut dyn FnMut(&Path) -> io::Result<()>) -> Result<(), DriverError> {
        match self.unwritable.load(Ordering::SeqCst) {
            true => Err(DriverError::at(Path::new("/faulty"), io::ErrorKind::Other.into())),
            false => self.inner.fill(id, write),
        }
    }

    fn usage(&self, id: Id, cancelled: Cancelled<'_>) -> Result<Measure, DriverError> {
        self.inner.usage(id, cancelled)
    }

    fn remove(&self, id: Id, cancelled: Cancelled<'_>) -> Result<(), DriverError> {
        match self.busy.load(Ordering::SeqCst) {
            true => Err(DriverError::Busy("in use".into())),
            false => self.inner.remove(id, cancelled),
        }
    }

    fn inventory(&self) -> Result<Inventory, DriverError> {
        self.inner.inventory()
    }

    fn is_unused(&self, id: Id) -> Result<bool, DriverError> {
        self.inner.is_unused(id)
    }

    fn upperdir(&self, id: Id) -> Option<PathBuf> {
        self.inner.upperdir(id)
    }
}

#[test]
fn full_storage_fails_the_call_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let driver = Arc::new(Faulty::default());
    runtime().block_on(async {
        let running = Running::start(dir.path(), driver.clone(), POLICY, "").await;
        driver.full.store(true, Ordering::SeqCst);
        for n in 0..100 {
            let refused = running.snapshotter.prepare(key(&format!("k{n}")), None, no_labels()).await;
            assert!(matches!(refused, Err(SnapshotError::Driver(DriverError::Full { .. }))), "{refused:?}");
        }
        assert!(running.meta.all().is_empty());
        driver.full.store(false, Ordering::SeqCst);
        running.snapshotter.prepare(key("k0"), None, no_labels()).await.unwrap();
        running.snapshotter.cleanup().await;
        assert!(running.meta.removing().is_empty());
        running.stop().await;
    });
}

#[test]
fn busy_storage_is_kept_until_it_can_be_freed() {
    let dir = tempfile::tempdir().unwrap();
    let driver = Arc::new(Faulty::default());
    runtime().block_on(async {
        let running = Running::start(dir.path(), driver.clone(), POLICY, "").await;
        running.snapshotter.prepare(key("k"), None, no_labels()).await.unwrap();
        driver.busy.store(true, Ordering::SeqCst);
        running.snapshotter.remove(key("k")).await.unwrap();
        running.snapshotter.prepare(key("k"), None, no_labels()).await.expect("the key is free at once");
        running.snapshotter.cleanup().await;
        assert_eq!(running.meta.removing().len(), 1);
        driver.busy.store(false, Ordering::SeqCst);
        running.snapshotter.cleanup().await;
        assert_eq!(running.meta.removing().len(), 0);
        running.stop().await;
    });
}

fn store(dir: &tempfile::TempDir) -> String {
    let file = dir.path().join("layers.json");
    std::fs::write(&file, format!(r#"{{"{CHAIN}": {{"etc/hello": "world"}}}}"#)).unwrap();
    format!("memory:{}", file.display())
}

#[test]
fn a_layer_that_cannot_be_written_is_pulled_instead() {
    let dirs = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let driver = Arc::new(Faulty::default());
    runtime().block_on(async {
        let running = Running::start(dirs.0.path(), driver.clone(), POLICY, &store(&dirs.1)).await;
        driver.unwritable.store(true, Ordering::SeqCst);
        let of_chain = || labels(&[(LABEL_REF, CHAIN)]);
        let miss = running.snapshotter.prepare(key("one"), None, of_chain()).await.unwrap();
        assert!(matches!(miss, Prepared::Mounts(_)), "{miss:?}");
        driver.unwritable.store(false, Ordering::SeqCst);
        let hit = running.snapshotter.prepare(key("two"), None, of_chain()).await.unwrap();
        assert!(matches!(hit, Prepared::AlreadyCommitted(_)), "{hit:?}");
        assert!(running.meta.get(&key("two")).is_none(), "the key of a hit is not left behind");
        running.stop().await;
    });
}

#[test]
fn a_hit_holds_the_layer_and_many_at_once_make_one() {
    let dirs = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let driver = Arc::new(Overlay::open(dirs.0.path(), OverlayOptions::default()).unwrap());
    runtime().block_on(async {
        let running = Running::start(dirs.0.path(), driver, POLICY, &store(&dirs.1)).await;
        let mut calls = tokio::task::JoinSet::new();
        for n in 0..16 {
            let snapshotter = Arc::clone(&running.snapshotter);
            let of_chain = labels(&[(LABEL_REF, CHAIN)]);
            calls.spawn(async move { snapshotter.prepare(key(&format!("k{n}")), None, of_chain).await });
        }
        let names: std::collections::BTreeSet<String> = calls
            .join_all()
            .await
            .into_iter()
            .map(|prepared| match prepared.unwrap() {
                Prepared::AlreadyCommitted(name) => name.as_str().to_owned(),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(names.len(), 1);
        let found = running.snapshotter.list(&Filter::parse(&[]).unwrap());
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].info.kind, Kind::Committed);
        let upper = dirs.0.path().join(format!("l/{}/fs", found[0].id.serial));
        assert_eq!(std::fs::read(upper.join("etc/hello")).unwrap(), b"world");
        running.stop().await;
    });
}

#[test]
fn sharing_between_namespaces_is_a_switch() {
    for (sharing, shared) in [(Sharing::Isolated, false), (Sharing::Node, true)] {
        let dir = tempfile::tempdir().unwrap();
        let policy = Policy { sharing, cleanup_limit: Duration::from_secs(1), ..crate::support::POLICY };
        runtime().block_on(async {
            let running = Running::start(dir.path(), Arc::new(Memory::default()), policy, "").await;
            let of_chain = || labels(&[(LABEL_REF, CHAIN)]);
            running.snapshotter.prepare(key("one/1/x"), None, of_chain()).await.unwrap();
            running.snapshotter.commit(key("one/2/c"), key("one/1/x"), None, of_chain()).await.unwrap();
            let second = running.snapshotter.prepare(key("two/3/x"), None, of_chain()).await.unwrap();
            assert_eq!(matches!(second, Prepared::AlreadyCommitted(_)), shared);
            running.stop().await;
        });
    }
}

#[test]
fn what_is_committed_is_measured_without_being_asked() {
    let dir = tempfile::tempdir().unwrap();
    runtime().block_on(async {
        let running = Running::start(dir.path(), Arc::new(Memory::default()), POLICY, "").await;
        running.snapshotter.prepare(key("k"), None, no_labels()).await.unwrap();
        running.snapshotter.commit(key("c"), key("k"), None, no_labels()).await.unwrap();
        let measured = async {
            while running.meta.get(&key("c")).unwrap().usage.is_none() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), measured).await.unwrap();
        running.stop().await;
    });
}
