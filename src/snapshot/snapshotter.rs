//! The use cases: one function for each thing containerd asks.
//!
//! Where the blocking world (driver, metadata writer) and the async one (service, content) meet. Reads are answered from
//! memory. A change is: check, prepare storage, record; the record is the moment it happens, and nothing before it is visible.
//! Callers that may go away run these on a task of their own (`service` does), so that a use case that has begun comes to
//! its end.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;

use super::filter::Filter;
use super::metastore::{Adopted, Counts, MetaStore, NewCommit, NewSnapshot, Record};
use super::reconcile::Reconciler;
use super::remote::{self, LayerRequest};
use super::stock::{Stock, blocking};
use super::{
    Info, Key, Kind, LabelUpdate, Labels, Prepared, SnapshotError, Timestamp, Usage, check_labels, mapping,
};
use crate::content::{ContentError, ContentStore, Layer};
use crate::driver::{Access, Driver, Id, Mount, MountRequest, Owner, Purpose};
use crate::oci::ChainId;

/// containerd's label for the directory that holds a snapshot's changes.
pub const LABEL_UPPERDIR: &str = "containerd.io/snapshot/overlay.upperdir";

/// How many trees are measured at once: more would take the threads that Prepare needs, and the disk.
const WALKS: usize = 4;
/// How long after a commit its snapshot is measured.
const MEASURE_DELAY: Duration = Duration::from_secs(2);

/// Whose pulled layers may answer a Prepare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// Only the layer source; what a namespace pulled itself is not shown to another.
    Isolated,
    /// Any committed snapshot on the node with the same chain ID and parent.
    Node,
}

/// Whether answers carry [`LABEL_UPPERDIR`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UpperdirLabel {
    /// They do.
    Shown,
    /// They do not.
    Hidden,
}

/// What the use cases can be told to do differently.
#[derive(Debug, Clone, Copy)]
pub struct Policy {
    /// Whose layers may be answered.
    pub sharing: Sharing,
    /// See [`LABEL_UPPERDIR`].
    pub upperdir_label: UpperdirLabel,
    /// How long a Cleanup call may take.
    pub cleanup_limit: Duration,
}

/// See the module's page.
#[derive(Debug)]
pub struct Snapshotter {
    meta: Arc<MetaStore>,
    driver: Arc<dyn Driver>,
    content: Option<ContentStore>,
    policy: Policy,
    stock: Stock,
    reconciler: Reconciler,
    committed: Notify,
    layer_locks: KeyedLocks<(String, Option<Key>)>,
    walks: Semaphore,
}

impl Snapshotter {
    /// Nothing happens yet: [`Snapshotter::start`] and [`Snapshotter::run`] do.
    pub fn new(
        meta: Arc<MetaStore>,
        driver: Arc<dyn Driver>,
        content: Option<ContentStore>,
        policy: Policy,
    ) -> Snapshotter {
        Snapshotter {
            stock: Stock::new(Arc::clone(&meta), Arc::clone(&driver)),
            reconciler: Reconciler::new(Arc::clone(&meta), Arc::clone(&driver)),
            meta,
            driver,
            content,
            policy,
            committed: Notify::new(),
            layer_locks: KeyedLocks::default(),
            walks: Semaphore::new(WALKS),
        }
    }

    /// Brings records and storage together. To be awaited before the first call.
    pub async fn start(&self) -> Result<(), SnapshotError> {
        self.reconciler.start().await.map(|_| ())
    }

    /// The background work, until `stop`: storage made ahead, freed storage, usage of what was committed.
    pub async fn run(&self, stop: CancellationToken) {
        tokio::join!(
            self.stock.fill(stop.clone()),
            self.reconciler.run(stop.clone()),
            self.measure_committed(stop)
        );
    }

    /// A writable snapshot on `parent`, or the news that the layer it was to hold is already there.
    pub async fn prepare(
        &self,
        key: Key,
        parent: Option<Key>,
        labels: Labels,
    ) -> Result<Prepared, SnapshotError> {
        self.check_new(&key, parent.as_ref(), &labels)?;
        if let Some(request) = remote::layer_request(&labels, parent.as_ref())
            && let Some(name) = self.find_layer(&request, parent.as_ref(), &labels).await
        {
            return Ok(Prepared::AlreadyCommitted(name));
        }
        self.create(key, parent, Kind::Active, labels).await.map(Prepared::Mounts)
    }

    /// A read-only view of `parent`.
    pub async fn view(
        &self,
        key: Key,
        parent: Option<Key>,
        labels: Labels,
    ) -> Result<Vec<Mount>, SnapshotError> {
        self.check_new(&key, parent.as_ref(), &labels)?;
        self.create(key, parent, Kind::View, labels).await
    }

    /// What to mount for an active snapshot or a view.
    pub fn mounts(&self, key: &Key) -> Result<Vec<Mount>, SnapshotError> {
        let Some((record, ancestors)) = self.meta.get_with_ancestors(key) else {
            return Err(SnapshotError::NotFound { key: key.clone() });
        };
        self.mounts_of(&record, &ancestors)
    }

    /// Makes an active snapshot a committed one.
    pub async fn commit(
        &self,
        name: Key,
        key: Key,
        parent: Option<Key>,
        labels: Labels,
    ) -> Result<(), SnapshotError> {
        check_labels(&labels)?;
        // First, as the caller may go away while the record is written; the measuring waits a while anyway.
        self.committed.notify_one();
        self.meta.commit(NewCommit { name, key, parent, labels, now: Timestamp::now() }).await?;
        Ok(())
    }

    /// Takes a snapshot out of the records. Its storage is freed later.
    pub async fn remove(&self, key: Key) -> Result<(), SnapshotError> {
        self.meta.remove(key).await
    }

    /// What is known of a snapshot.
    pub fn stat(&self, key: &Key) -> Result<Info, SnapshotError> {
        match self.meta.get(key) {
            Some(record) => Ok(self.info(&record)),
            None => Err(SnapshotError::NotFound { key: key.clone() }),
        }
    }

    /// Changes labels; answers what is known afterwards.
    pub async fn update(&self, key: Key, update: LabelUpdate) -> Result<Info, SnapshotError> {
        let record = self.meta.update(key, update, Timestamp::now()).await?;
        Ok(self.info(&record))
    }

    /// The snapshots that match, in the order of their keys.
    pub fn list(&self, filter: &Filter) -> Vec<Arc<Record>> {
        let mut records = self.meta.all();
        if !filter.is_everything() {
            records.retain(|record| filter.matches(&record.info));
        }
        records
    }

    /// What a snapshot takes without its parents. Measured now for an active one; kept for a committed one.
    pub async fn usage(&self, key: &Key) -> Result<Usage, SnapshotError> {
        let Some(record) = self.meta.get(key) else {
            return Err(SnapshotError::NotFound { key: key.clone() });
        };
        match (record.info.kind, record.usage) {
            (Kind::View, _) => Ok(Usage { bytes: 0, inodes: 0 }),
            (_, Some(usage)) => Ok(usage),
            (Kind::Active, None) => self.measure(record.id).await,
            (Kind::Committed, None) => {
                let usage = self.measure(record.id).await?;
                self.meta.measured(vec![(record.id, usage)]).await?;
                Ok(usage)
            }
        }
    }

    /// Frees the storage of removed snapshots, within the configured time.
    pub async fn cleanup(&self) {
        self.reconciler.cleanup(self.policy.cleanup_limit).await;
    }

    /// How many there are of each.
    pub fn counts(&self) -> Counts {
        self.meta.counts()
    }

    /// What containerd is shown of a record.
    pub fn info(&self, record: &Record) -> Info {
        let mut info = record.info.clone();
        if self.policy.upperdir_label == UpperdirLabel::Shown
            && let Some(dir) = self.driver.upperdir(record.id)
        {
            info.labels.insert(LABEL_UPPERDIR.into(), dir.display().to_string());
        }
        info
    }

    /// Refuses early what would be refused when it is recorded, before storage is touched; in containerd's order.
    fn check_new(&self, key: &Key, parent: Option<&Key>, labels: &Labels) -> Result<(), SnapshotError> {
        check_labels(labels)?;
        if let Some(parent) = parent {
            match self.meta.get(parent) {
                None => return Err(SnapshotError::ParentNotFound { parent: parent.clone() }),
                Some(record) if record.info.kind != Kind::Committed => {
                    return Err(SnapshotError::ParentNotCommitted { parent: parent.clone() });
                }
                Some(_) => {}
            }
        }
        match self.meta.get(key) {
            Some(_) => Err(SnapshotError::AlreadyExists { key: key.clone() }),
            None => Ok(()),
        }
    }

    async fn create(
        &self,
        key: Key,
        parent: Option<Key>,
        kind: Kind,
        labels: Labels,
    ) -> Result<Vec<Mount>, SnapshotError> {
        let root = mapping::from_labels(&labels)?.map(|mapping| mapping.root);
        let id = self.stock.take().await?;
        let made = match self.make_storage(id, parent.as_ref(), root).await {
            Ok(()) => {
                let now = Timestamp::now();
                self.meta.create(NewSnapshot { id, key, parent, kind, labels, now }).await
            }
            Err(error) => Err(error),
        };
        match made {
            Ok(record) => match self.meta.get_with_ancestors(&record.info.name) {
                Some((record, ancestors)) => self.mounts_of(&record, &ancestors),
                // Removed by somebody else between its record and this line.
                None => Err(SnapshotError::NotFound { key: record.info.name.clone() }),
            },
            Err(error) => {
                self.stock.discard(id).await;
                Err(error)
            }
        }
    }

    async fn make_storage(
        &self,
        id: Id,
        parent: Option<&Key>,
        root: Option<Owner>,
    ) -> Result<(), SnapshotError> {
        let parent = match parent {
            None => None,
            Some(key) => match self.meta.get(key) {
                Some(record) => Some(record.id),
                None => return Err(SnapshotError::ParentNotFound { parent: key.clone() }),
            },
        };
        let driver = Arc::clone(&self.driver);
        blocking(move || driver.create(id, parent, root)).await
    }

    fn mounts_of(&self, record: &Record, ancestors: &[Id]) -> Result<Vec<Mount>, SnapshotError> {
        let info = &record.info;
        let access = match info.kind {
            Kind::Active => Access::ReadWrite,
            Kind::View => Access::ReadOnly,
            Kind::Committed => return Err(SnapshotError::NotMountable { key: info.name.clone() }),
        };
        let mapping = mapping::from_labels(&info.labels)?;
        let purpose = match remote::is_detached(&info.labels, info.parent.as_ref()) {
            true => Purpose::DetachedLayer,
            false => Purpose::Ordinary,
        };
        Ok(self.driver.mounts(&MountRequest {
            id: record.id,
            parents: ancestors,
            access,
            mapping: mapping.as_ref(),
            purpose,
        }))
    }

    /// The committed snapshot that holds the requested layer on this parent, made now if the source has the layer. Every
    /// failure is a miss: the layer is then pulled as with any snapshotter.
    async fn find_layer(&self, request: &LayerRequest, parent: Option<&Key>, labels: &Labels) -> Option<Key> {
        match self.try_find_layer(request, parent, labels).await {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(chain = %request.chain, %error, "remote layer not usable; it is pulled instead");
                None
            }
        }
    }

    async fn try_find_layer(
        &self,
        request: &LayerRequest,
        parent: Option<&Key>,
        labels: &Labels,
    ) -> Result<Option<Key>, LayerError> {
        let chain = request.chain.to_string();
        // One at a time for a layer on a parent: the others find what the first one made.
        let lock = self.layer_locks.of((chain.clone(), parent.cloned()));
        let _held = lock.lock().await;
        let there = self.meta.answering(&chain, parent);
        if let (Some(record), Sharing::Node) = (&there, self.policy.sharing) {
            return Ok(Some(record.info.name.clone()));
        }
        let Some(content) = &self.content else { return Ok(None) };
        let Some(layer) = content.lookup(&request.chain).await? else { return Ok(None) };
        if let Some(record) = there {
            return Ok(Some(record.info.name.clone()));
        }
        self.adopt_layer(&request.chain, layer, parent, labels).await.map(Some)
    }

    async fn adopt_layer(
        &self,
        chain: &ChainId,
        layer: Layer,
        parent: Option<&Key>,
        labels: &Labels,
    ) -> Result<Key, LayerError> {
        let id = self.stock.take().await?;
        let adopted = match self.fill_layer(id, layer, parent).await {
            Ok(()) => {
                let key = Key::new(&remote::committed_name(id.serial, chain))?;
                let (parent, labels) = (parent.cloned(), labels.clone());
                let new =
                    NewSnapshot { id, key, parent, kind: Kind::Committed, labels, now: Timestamp::now() };
                self.meta.adopt(new, chain.to_string()).await
            }
            Err(error) => Err(error),
        };
        match adopted {
            Ok(Adopted::Created(record)) => {
                self.committed.notify_one();
                Ok(record.info.name.clone())
            }
            Ok(Adopted::AlreadyThere(record)) => {
                self.stock.discard(id).await;
                Ok(record.info.name.clone())
            }
            Err(error) => {
                self.stock.discard(id).await;
                Err(error.into())
            }
        }
    }

    async fn fill_layer(&self, id: Id, layer: Layer, parent: Option<&Key>) -> Result<(), SnapshotError> {
        self.make_storage(id, parent, None).await?;
        let driver = Arc::clone(&self.driver);
        blocking(move || driver.fill(id, &mut |dir| layer.write_to(dir))).await
    }

    /// Measures committed snapshots off every caller's path: some time after a commit, so that the layers of a pull are measured
    /// together, recorded in one transaction, and what is gone by then not at all. One that cannot be measured (its storage is
    /// damaged) is passed over until something else is committed.
    async fn measure_committed(&self, stop: CancellationToken) {
        let mut skip = HashSet::new();
        loop {
            let mut measured = Vec::new();
            while let Some(record) = self.meta.unmeasured(&skip) {
                skip.insert(record.id);
                let usage = tokio::select! {
                    () = stop.cancelled() => return,
                    usage = self.measure(record.id) => usage,
                };
                match usage {
                    Ok(usage) => measured.push((record.id, usage)),
                    Err(_) if self.meta.get(&record.info.name).is_none() => {}
                    Err(error) => {
                        tracing::warn!(key = %record.info.name, %error, "cannot measure a committed snapshot");
                    }
                }
            }
            if !measured.is_empty()
                && let Err(error) = self.meta.measured(measured).await
            {
                tracing::warn!(%error, "cannot record what snapshots take; it is measured again when asked for");
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.committed.notified() => {}
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(MEASURE_DELAY) => {}
            }
            skip.clear();
        }
    }

    async fn measure(&self, id: Id) -> Result<Usage, SnapshotError> {
        let _turn = self.walks.acquire().await.map_err(|_| SnapshotError::ShuttingDown)?;
        let cancel = CancellationToken::new();
        // Dropped with the caller's future: a walk nobody waits for ends.
        let _end = cancel.clone().drop_guard();
        let driver = Arc::clone(&self.driver);
        let measure = blocking(move || driver.usage(id, &|| cancel.is_cancelled())).await?;
        Ok(Usage { bytes: measure.bytes, inodes: measure.inodes })
    }
}

/// Why a remote layer could not be used. Never reaches containerd.
#[derive(Debug, thiserror::Error)]
enum LayerError {
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    #[error(transparent)]
    Content(#[from] ContentError),
}

/// One lock for each key that somebody holds or waits for.
#[derive(Debug)]
struct KeyedLocks<K>(Mutex<HashMap<K, Weak<tokio::sync::Mutex<()>>>>);

impl<K> Default for KeyedLocks<K> {
    fn default() -> KeyedLocks<K> {
        KeyedLocks(Mutex::default())
    }
}

impl<K: Eq + Hash> KeyedLocks<K> {
    fn of(&self, key: K) -> Arc<tokio::sync::Mutex<()>> {
        let mut locks = self.0.lock();
        locks.retain(|_, lock| lock.strong_count() > 0);
        if let Some(lock) = locks.get(&key).and_then(Weak::upgrade) {
            return lock;
        }
        let lock = Arc::new(tokio::sync::Mutex::new(()));
        locks.insert(key, Arc::downgrade(&lock));
        lock
    }
}
