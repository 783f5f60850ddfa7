//! The use cases: one function for each thing containerd asks.
//!
//! Where the blocking world (driver, metadata writer) and the async one (service, content) meet. Reads are answered from
//! memory. A change is: check, prepare storage, record; the record is the moment it happens, and nothing before it is visible.
//! Callers that may go away run these on a task of their own (`service` does), so that a use case that has begun comes to
//! its end.

use std::sync::Arc;
use std::time::Duration;

use futures::future::OptionFuture;
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::apply::{Applied, Applier, ApplyRequest};
use super::filter::Filter;
use super::foresight::{Ahead, Foresight};
use super::hit::Hits;
use super::hit::foreseen::CONNECTIONS;
use super::layers::Layers;
use super::locks::KeyedLocks;
use super::metastore::{
    Counts, LayerChoice, MetaStore, NewCommit, NewSnapshot, Origin, Own, PublishEntry, Record, Stack,
};
use super::pins::Pins;
use super::publish::Publisher;
use super::reconcile::{Reconciler, Room};
use super::remote::{self, HitAnswer};
use super::stock::{Stock, blocking};
use super::traces::Traces;
use super::{
    Info, Key, Kind, LabelUpdate, Labels, Prepared, SnapshotError, Timestamp, Usage, check_labels, mapping,
};
use crate::content::ContentStore;
use crate::content::memory::MemorySource;
use crate::driver::{Access, Creation, Driver, DriverError, Id, Mount, Owner, Storage};
use crate::oci::ChainId;

mod adopt;
mod report;
mod storage;
mod usage;
mod volume;

/// containerd's label for the directory that holds a snapshot's changes.
pub const LABEL_UPPERDIR: &str = "containerd.io/snapshot/overlay.upperdir";

/// How many trees are measured at once: more would take the threads that Prepare needs, and the disk.
const WALKS: usize = 4;

/// The first containerd that takes read-only mounts for a layer which need not be fetched; older ones write into them.
const STAGED_SINCE: (u32, u32) = (2, 4);

/// How long a view waits for data that is still being fetched.
const VIEW_WAIT: Duration = Duration::from_secs(60);

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
    /// How long a Prepare may look for its layer in the store.
    pub lookup_deadline: Duration,
    /// What is kept free, and what unclaimed layer images may take.
    pub room: Room,
}

/// Where layers come from and go to, beside containerd.
#[derive(Debug, Default)]
pub struct Remote {
    /// Layers from a file, for trials.
    pub source: Option<MemorySource>,
    /// Layer images of this node; none where the kernel cannot mount them.
    pub layers: Option<Arc<Layers>>,
    /// The store.
    pub content: Option<Arc<ContentStore>>,
    /// What publishes in the background, if that is wanted.
    pub publisher: Option<Arc<Publisher>>,
    /// What is known of starts, if that is wanted.
    pub traces: Option<Arc<Traces>>,
    /// Images that are to be here whole.
    pub pins: Option<Arc<Pins>>,
}

/// See the module's page.
#[derive(Debug)]
pub struct Snapshotter {
    meta: Arc<MetaStore>,
    driver: Arc<dyn Driver>,
    remote: Remote,
    hits: Option<Arc<Hits>>,
    foresight: Foresight,
    applier: Applier,
    policy: Policy,
    stock: Stock,
    reconciler: Reconciler,
    committed: Notify,
    layer_locks: KeyedLocks<(String, Option<Key>)>,
    walks: Semaphore,
    containerd: Mutex<Option<String>>,
}

impl Snapshotter {
    /// Nothing happens yet: [`Snapshotter::start`] and [`Snapshotter::run`] do.
    pub fn new(
        meta: Arc<MetaStore>,
        driver: Arc<dyn Driver>,
        applier: Applier,
        remote: Remote,
        policy: Policy,
    ) -> Snapshotter {
        let hits = remote.layers.clone().zip(remote.content.clone()).map(|(layers, content)| {
            Arc::new(Hits::new(Arc::clone(&meta), layers, content, policy.lookup_deadline))
        });
        Snapshotter {
            stock: Stock::new(Arc::clone(&meta), Arc::clone(&driver)),
            reconciler: Reconciler::new(
                Arc::clone(&meta),
                Arc::clone(&driver),
                remote.layers.clone(),
                policy.room,
            ),
            meta,
            driver,
            remote,
            hits,
            foresight: Foresight::default(),
            applier,
            policy,
            committed: Notify::new(),
            layer_locks: KeyedLocks::default(),
            walks: Semaphore::new(WALKS),
            containerd: Mutex::default(),
        }
    }

    /// Brings records and storage together. To be awaited before the first call.
    pub async fn start(&self) -> Result<(), SnapshotError> {
        self.remove_unfinished().await?;
        self.reconciler.start().await?;
        match &self.remote.layers {
            Some(layers) => layers.start().await,
            None => Ok(()),
        }
    }

    /// The background work, until `stop`: storage made ahead, freed storage, usage of what was committed, layers on their way.
    pub async fn run(&self, stop: CancellationToken) {
        let layers = self.remote.layers.as_ref().map(|layers| layers.run(stop.clone()));
        let publish = self.remote.publisher.as_ref().map(|publisher| publisher.run(stop.clone()));
        let pins = self.remote.pins.as_ref().map(|pins| pins.run(stop.clone()));
        if let Some(hits) = &self.hits {
            hits.get_ready(0);
        }
        let background = async {
            stop.cancelled().await;
            if let Some(traces) = &self.remote.traces {
                traces.end().await;
            }
            if let Some(hits) = &self.hits {
                hits.end().await;
            }
        };
        tokio::join!(
            self.stock.fill(stop.clone()),
            self.reconciler.run(stop.clone()),
            self.measure_committed(stop.clone()),
            OptionFuture::from(layers),
            OptionFuture::from(publish),
            background,
            OptionFuture::from(pins)
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
        if let Some(request) = remote::layer_request(&labels, parent.as_ref()) {
            match request.answer {
                HitAnswer::Committed => {
                    if let Some(name) = self.find_layer(&request, parent.as_ref(), &labels).await {
                        return Ok(Prepared::AlreadyCommitted(name));
                    }
                }
                HitAnswer::Staged => {
                    if let Some(mounts) = self.stage_layer(&request.chain, &key, &labels).await {
                        return Ok(Prepared::Mounts(mounts));
                    }
                }
            }
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
        self.wait_for_view(parent.as_ref()).await?;
        self.create(key, parent, Kind::View, labels).await
    }

    /// What to mount for an active snapshot or a view. The layer images below it are complete and attached when this answers.
    pub async fn mounts(&self, key: &Key) -> Result<Vec<Mount>, SnapshotError> {
        let Some((record, stack)) = self.meta.get_with_stack(key) else {
            return Err(SnapshotError::NotFound { key: key.clone() });
        };
        let mounts = self.usable_mounts_of(&record, &stack).await?;
        if let (Some(layers), false) = (&self.remote.layers, stack.layers.is_empty()) {
            layers.ready(&stack.layers).await?;
        }
        Ok(mounts)
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
        let active = self.meta.get(&key);
        if let (Some(parent), Storage::Volumes) = (&parent, self.driver.storage())
            && active.as_ref().is_some_and(|active| active.info.parent.is_none())
        {
            // Its blocks are what they are: nothing can be put below them any more.
            return Err(SnapshotError::CannotRebase { key, parent: parent.clone() });
        }
        let own = match active.as_ref().filter(|record| record.layer.is_some()) {
            Some(record) => self.own_of(record.id).await?,
            None => Own::Used,
        };
        let found = active.as_ref().is_some_and(|active| self.is_fetched(active)).then(|| name.clone());
        let below = parent.clone().or_else(|| active.and_then(|record| record.info.parent.clone()));
        let publish = self.to_publish(&name, &key, below.as_ref(), &labels);
        let queued = publish.is_some();
        // First, as the caller may go away while the record is written; the measuring waits a while anyway.
        self.committed.notify_one();
        let commit = NewCommit { name, key, parent, labels, own, publish, now: Timestamp::now() };
        self.meta.commit(commit).await?;
        if let (Some(publisher), true) = (&self.remote.publisher, queued) {
            publisher.wake();
        }
        if let (Some(traces), Some(name)) = (&self.remote.traces, found) {
            below.iter().for_each(|below| traces.is_below_another(below));
            traces.found(&name);
        }
        Ok(())
    }

    fn is_fetched(&self, record: &Record) -> bool {
        let layer = record.layer.and_then(|serial| self.meta.layer(serial));
        layer.is_some_and(|layer| layer.origin == Origin::Fetched)
    }

    /// Makes a layer the content of the active snapshot that has the given mounts.
    pub async fn apply(&self, request: ApplyRequest) -> Result<Applied, SnapshotError> {
        self.applier.apply(request).await
    }

    /// Whether these are mounts of ours, without any I/O.
    pub fn is_ours(&self, mounts: &[Mount]) -> bool {
        self.applier.is_ours(mounts)
    }

    /// The version of the containerd that asks from now on, such as `v2.4.2`; `None` while that is not known.
    pub fn containerd_is(&self, version: Option<&str>) {
        *self.containerd.lock() = version.map(str::to_owned);
    }

    /// Its version, while it is there.
    pub fn containerd_version(&self) -> Option<String> {
        self.containerd.lock().clone()
    }

    /// Something was removed from containerd. Its collector is about to wait for calls that wait for the store: they are not to take long
    /// any more. And it may have been a pinned image.
    pub fn removed(&self) {
        if let Some(hits) = &self.hits {
            hits.hurry();
        }
        if let Some(pins) = &self.remote.pins {
            pins.images_changed();
        }
    }

    /// containerd has another image, or another one under a name.
    pub fn images_changed(&self) {
        if let Some(publisher) = &self.remote.publisher {
            publisher.images_changed();
        }
        if let Some(pins) = &self.remote.pins {
            pins.images_changed();
        }
    }

    /// containerd has the configuration of an image with these layers, from the bottom up. If it is going to ask for them, the store is asked now.
    pub fn configuration_stored(&self, chains: Vec<ChainId>) {
        self.foresee(self.foresight.stored(chains).as_slice());
    }

    /// Whether layers may come from a store, more than one at a time: a volume is made of each before the next can be.
    pub fn looks_ahead(&self) -> bool {
        self.hits.is_some() && self.driver.storage() != Storage::Volumes
    }

    /// containerd asks for this layer; `alone`, as if nothing were below it.
    fn asked_for(&self, chain: &ChainId, alone: bool) {
        if self.looks_ahead() {
            self.foresee(&self.foresight.asks(chain, alone));
        }
    }

    fn foresee(&self, ahead: &[Ahead]) {
        let Some(hits) = self.hits.as_ref().filter(|_| !ahead.is_empty()) else { return };
        hits.get_ready(CONNECTIONS);
        for ahead in ahead {
            if let (Some(traces), Some(top)) = (&self.remote.traces, ahead.top()) {
                traces.expect(top);
            }
            hits.foresee(ahead);
        }
    }

    /// Whether anything was written into the directory of a snapshot that has a layer image.
    async fn own_of(&self, id: Id) -> Result<Own, SnapshotError> {
        let driver = Arc::clone(&self.driver);
        let unused = blocking(move || driver.is_unused(id)).await?;
        Ok(if unused { Own::Unused } else { Own::Used })
    }

    /// What Commit queues: a layer that was unpacked for an image, under the chain ID it has now.
    fn to_publish(
        &self,
        name: &Key,
        key: &Key,
        below: Option<&Key>,
        labels: &Labels,
    ) -> Option<PublishEntry> {
        self.remote.publisher.as_ref()?;
        if self.is_fetched(self.meta.get(key)?.as_ref()) {
            return None;
        }
        remote::client_key(key.as_str()).strip_prefix(remote::EXTRACT)?;
        let chain = remote::chain_of(labels, name)?;
        let below = match below {
            None => None,
            // A layer on something that is no layer cannot be named by a chain ID.
            Some(key) => Some(remote::chain_of(&self.meta.get(key)?.info.labels, key)?),
        };
        Some(PublishEntry {
            chain,
            below,
            namespace: key.as_str().split('/').next().unwrap_or_default().to_owned(),
            layer: None,
            added: Timestamp::now(),
            attempts: 0,
            dropped: None,
            message: String::new(),
        })
    }

    /// Takes a snapshot out of the records. Its storage is freed later.
    pub async fn remove(&self, key: Key) -> Result<(), SnapshotError> {
        self.require_unused(&key).await?;
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
            (Kind::Active, None) => self.measure(&record).await,
            (Kind::Committed, None) => {
                let usage = self.measure(&record).await?;
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
        let is_layer = labels.contains_key(remote::LABEL_REF)
            || remote::client_key(key.as_str()).starts_with(remote::EXTRACT);
        let start = parent.clone().filter(|_| !is_layer);
        if let (Some(pins), Some(layers), Some(below)) = (&self.remote.pins, &self.remote.layers, &start)
            && self.meta.stack_with(below).is_some_and(|stack| !layers.are_usable(&stack.layers))
        {
            pins.starting().await;
        }
        let new = NewSnapshot { id, key, parent, kind, labels, now: Timestamp::now() };
        let record = self.record(new, LayerChoice::Own, root).await?;
        match self.meta.get_with_stack(&record.info.name) {
            Some((record, stack)) => {
                if let (Some(publisher), Some(parent)) = (&self.remote.publisher, &start) {
                    publisher.starting(parent);
                }
                if let (Some(traces), Some(parent)) = (&self.remote.traces, start) {
                    traces.starting(&parent, kind);
                }
                self.attach_early(&record, &stack).await;
                let mounts = self.usable_mounts_of(&record, &stack).await;
                if mounts.is_err() && self.driver.storage() == Storage::Volumes {
                    // Nobody learns of it, so nobody would remove it.
                    self.meta.remove(record.info.name.clone()).await?;
                }
                mounts
            }
            // Removed by somebody else between its record and this line.
            None => Err(SnapshotError::NotFound { key: record.info.name.clone() }),
        }
    }

    /// Makes the storage of an active snapshot or a view, and records it; its Id is given up if that fails.
    async fn record(
        &self,
        new: NewSnapshot,
        layer: LayerChoice,
        root: Option<Owner>,
    ) -> Result<Arc<Record>, SnapshotError> {
        let id = new.id;
        let access = if new.kind == Kind::View { Access::ReadOnly } else { Access::ReadWrite };
        let storage = Creation { id, parent: None, access, root };
        let recorded = match self.make_storage(storage, new.parent.as_ref()).await {
            Ok(()) => self.meta.create(new, layer).await,
            Err(error) => Err(error),
        };
        match &recorded {
            Ok(_) => {}
            // To free it would be to free somebody else's.
            Err(SnapshotError::Driver(DriverError::Taken(_))) => self.meta.leave(id).await?,
            Err(_) => self.meta.give_up(id).await,
        }
        recorded
    }

    /// For a client that mounts what Prepare answers without asking Mounts. What is not complete cannot be attached, and nothing
    /// is awaited here: the answer's lowerdirs do not exist then, and a mount of them fails.
    async fn attach_early(&self, record: &Record, stack: &Stack) {
        let Some(layers) = self.remote.layers.as_ref().filter(|_| !stack.layers.is_empty()) else { return };
        let attached = match layers.are_usable(&stack.layers) || record.info.kind == Kind::View {
            // For a view the data was waited for, unless it is read lazily.
            true => layers.ready(&stack.layers).await,
            // Another differ reads the attributes of directories from what lies below.
            false if record.info.labels.contains_key(remote::LABEL_REF) => {
                let ready = layers.ready(&stack.layers);
                tokio::time::timeout(self.policy.lookup_deadline, ready).await.unwrap_or(Ok(()))
            }
            false => Ok(()),
        };
        if let Err(error) = attached {
            tracing::warn!(key = %record.info.name, %error, "the layers below a new snapshot are not attached yet");
        }
    }

    /// Who asks for a view mounts what it answers: nerdctl looks into an image so before it runs it, and nobody asks Mounts. So the
    /// data that is still on its way is awaited here. containerd's collector has to wait as well if it comes now, and everybody
    /// behind it, so there is a little time only from then on.
    async fn wait_for_view(&self, parent: Option<&Key>) -> Result<(), SnapshotError> {
        let (Some(layers), Some(parent)) = (&self.remote.layers, parent) else { return Ok(()) };
        let below = self.meta.stack_with(parent).unwrap_or_default();
        let began = Instant::now();
        let collected = async {
            match &self.hits {
                Some(hits) => hits.hurried(began).await,
                None => std::future::pending().await,
            }
            tokio::time::sleep(self.policy.lookup_deadline).await;
        };
        tokio::select! {
            readable = layers.readable(&below.layers) => return readable,
            () = collected => {}
            () = tokio::time::sleep(VIEW_WAIT) => {}
        }
        Err(SnapshotError::LayerUnavailable {
            layer: format!("below {parent}"),
            problem: format!("still being fetched after {:.1} s; try again", began.elapsed().as_secs_f32()),
        })
    }
}
