//! Records against storage: one routine for start-up, Cleanup and `speedy check`.
//!
//! **What.** [`plan`] compares what is recorded with what is on storage and touches nothing; [`Reconciler`] executes a plan. The
//! metadata store is the only authority: what it does not name is garbage, and what it names and is not there is damage, which
//! is reported and never papered over.
//!
//! **Invariants.** Storage is released before its Id is forgotten (M4). Storage with a serial that was never given out is never
//! touched: it means the records are older than the disk (a restored backup, say), and the data may be the only copy.
//!
//! **When it fails.** Stopping at any point leaves a state that the next run continues from.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use super::layers::Layers;
use super::metastore::{MetaStore, Progress, Recorded};
use super::stock::blocking;
use super::{Key, SnapshotError};
use crate::driver::{self, Driver, DriverError, Id};

/// How many Ids are freed, and then forgotten in one transaction, at a time.
const FORGET: usize = 64;
/// How long a removed snapshot's storage waits for a Cleanup call before it is freed without one.
const IDLE: Duration = Duration::from_secs(60);

/// What a comparison found.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Plan {
    /// On storage, not recorded: to be freed.
    pub unknown: Vec<u64>,
    /// On storage with a serial that was never given out: not to be touched.
    pub beyond: Vec<u64>,
    /// Recorded as a snapshot, not on storage: damage.
    pub missing: Vec<(u64, Key)>,
    /// Layer images that are recorded as complete and not on storage: damage.
    pub missing_layers: Vec<u64>,
    /// Slots in use on storage that no record has: somebody else's, not to be touched.
    pub strangers: Vec<u32>,
}

impl Plan {
    /// Whether records and storage agree.
    pub fn is_empty(&self) -> bool {
        let Plan { unknown, beyond, missing, missing_layers, strangers } = self;
        unknown.is_empty()
            && beyond.is_empty()
            && missing.is_empty()
            && missing_layers.is_empty()
            && strangers.is_empty()
    }
}

/// Compares. `inventory` must have been taken before `recorded` was read: an Id is recorded before it is on storage, so
/// nothing that a running daemon makes meanwhile can look unknown.
pub fn plan(recorded: &Recorded, inventory: &Inventory) -> Plan {
    let named: HashSet<u64> = (recorded.ready.iter().map(|(serial, _)| *serial))
        .chain(recorded.layers.iter().map(|(serial, _)| *serial))
        .chain(recorded.pending.iter().copied())
        .chain(recorded.removing.iter().copied())
        .collect();
    let mut plan = Plan::default();
    for serial in inventory.directories.union(&inventory.images).filter(|serial| !named.contains(serial)) {
        match *serial > recorded.last_serial {
            true => plan.beyond.push(*serial),
            false => plan.unknown.push(*serial),
        }
    }
    match &inventory.volumes {
        None => {
            let is_missing = |serial: &u64| !inventory.directories.contains(serial);
            plan.missing = recorded.ready.iter().filter(|(serial, _)| is_missing(serial)).cloned().collect();
        }
        Some(volumes) => {
            let missing = recorded.volumes.iter().filter(|(id, _)| !volumes.contains(&id.slot));
            plan.missing = missing.map(|(id, key)| (id.serial, key.clone())).collect();
            let slots: HashSet<u32> = recorded.ids.iter().map(|id| id.slot).collect();
            plan.strangers = volumes.iter().copied().filter(|slot| !slots.contains(slot)).collect();
        }
    }
    let complete = recorded.layers.iter().filter(|(_, progress)| *progress == Progress::Complete);
    plan.missing_layers =
        complete.map(|(serial, _)| *serial).filter(|serial| !inventory.images.contains(serial)).collect();
    plan
}

/// What is on storage.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Inventory {
    /// Serials that have a snapshot's directory.
    pub directories: BTreeSet<u64>,
    /// Serials that have a layer image.
    pub images: BTreeSet<u64>,
    /// Slots that have a volume, where snapshots are volumes; there are no directories then.
    pub volumes: Option<BTreeSet<u32>>,
}

impl Inventory {
    /// What a driver has, and these layer images.
    pub fn of(driver: &dyn Driver, images: Vec<u64>) -> Result<Inventory, DriverError> {
        let images = images.into_iter().collect();
        Ok(match driver.inventory()? {
            driver::Inventory::Serials(serials) => {
                Inventory { directories: serials.into_iter().collect(), images, volumes: None }
            }
            driver::Inventory::Slots(slots) => {
                Inventory { images, volumes: Some(slots.into_iter().collect()), ..Inventory::default() }
            }
        })
    }
}

/// What is kept free, and what unclaimed layer images may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Bytes that layer images nobody claims may take.
    pub budget: u64,
    /// Share of the root's file system, in percent, below which unclaimed layer images are removed.
    pub floor: u8,
}

/// Frees what is to be freed. One pass at a time, by one owner.
#[derive(Debug)]
pub struct Reconciler {
    meta: Arc<MetaStore>,
    driver: Arc<dyn Driver>,
    layers: Option<Arc<Layers>>,
    room: Room,
    wanted: Notify,
    passes: watch::Sender<Passes>,
    reported: Mutex<HashSet<u64>>,
    /// On storage without a record, found at the start.
    unknown: Mutex<Vec<Id>>,
}

#[derive(Debug, Default, Clone, Copy)]
struct Passes {
    asked: u64,
    done: u64,
}

impl Reconciler {
    /// For these records and this storage.
    pub fn new(
        meta: Arc<MetaStore>,
        driver: Arc<dyn Driver>,
        layers: Option<Arc<Layers>>,
        room: Room,
    ) -> Reconciler {
        Reconciler {
            meta,
            driver,
            layers,
            room,
            wanted: Notify::new(),
            passes: watch::Sender::new(Passes::default()),
            reported: Mutex::default(),
            unknown: Mutex::default(),
        }
    }

    /// Before anything is served: compares, frees what an earlier process left half-made, and reports damage. What earlier
    /// processes were told to remove is left to [`Reconciler::run`], so that a start does not wait for it.
    pub async fn start(&self) -> Result<Plan, SnapshotError> {
        let (driver, layers) = (Arc::clone(&self.driver), self.layers.clone());
        let recorded = self.meta.recorded().await?;
        let known = recorded.known();
        let inventory = blocking(move || {
            driver.recover(&known)?;
            let images = layers.map_or_else(|| Ok(Vec::new()), |layers| layers.store.inventory())?;
            Ok::<_, SnapshotError>(Inventory::of(&*driver, images)?)
        })
        .await?;
        let plan = plan(&recorded, &inventory);
        for (serial, key) in &plan.missing {
            tracing::error!(serial, %key, "storage of a snapshot is missing: it cannot be mounted; remove it and pull again");
        }
        for slot in &plan.strangers {
            tracing::error!(
                slot,
                "the pool has a volume that no record names: it is left alone, and its number is not used"
            );
        }
        self.meta.hold(plan.strangers.clone()).await?;
        self.meta.claim(plan.beyond.clone()).await?;
        self.discard_unused().await?;
        for serial in &plan.unknown {
            tracing::info!(serial, "storage that no record names is going to be freed");
        }
        // Left to the background: a start must not wait for somebody's million files.
        *self.unknown.lock() = plan.unknown.iter().map(|serial| Id { serial: *serial, slot: 0 }).collect();
        Ok(plan)
    }

    /// Pending Ids of an earlier process are to be freed, but only if they hold nothing: a restored older `metadata.db` knows
    /// as Pending what later became somebody's layer.
    async fn discard_unused(&self) -> Result<(), SnapshotError> {
        let (driver, pending) = (Arc::clone(&self.driver), self.meta.pending());
        let layers = self.layers.clone();
        let (unused, kept): (Vec<Id>, Vec<Id>) = blocking(move || {
            // A half-made layer image is worth nothing, nor is one that was never recorded; others may be what somebody's
            // snapshots consist of.
            let no_image = |id: &Id| layers.as_ref().is_none_or(|l| !l.store.was_recorded(id.serial));
            let is_unused = |id: &Id| no_image(id) && driver.is_unused(*id).unwrap_or(false);
            Ok::<_, SnapshotError>(pending.into_iter().partition(is_unused))
        })
        .await?;
        for id in kept {
            tracing::error!(
                serial = id.serial,
                "storage with content that no snapshot names: is metadata.db older than the disk? It is left alone"
            );
        }
        self.meta.discard(unused).await
    }

    /// Frees storage of removed snapshots whenever asked, and some time after removals without being asked, until `stop`.
    pub async fn run(&self, stop: CancellationToken) {
        loop {
            let asked = self.passes.borrow().asked;
            self.pass(&stop).await;
            self.passes.send_modify(|passes| passes.done = asked);
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.wanted.notified() => {}
                () = tokio::time::sleep(IDLE) => {}
            }
        }
    }

    /// Asks for a pass and waits for its end, but not longer than `limit`; what is left then goes on without the caller.
    pub async fn cleanup(&self, limit: Duration) {
        let mut passes = self.passes.subscribe();
        self.passes.send_modify(|passes| passes.asked += 1);
        let mine = self.passes.borrow().asked;
        self.wanted.notify_one();
        let done = passes.wait_for(|passes| passes.done >= mine);
        if tokio::time::timeout(limit, done).await.is_err() {
            tracing::info!(left = self.meta.removing().len(), "cleanup goes on in the background");
        }
    }

    async fn pass(&self, stop: &CancellationToken) {
        let unknown = std::mem::take(&mut *self.unknown.lock());
        self.free(unknown, stop).await;
        let driver = Arc::clone(&self.driver);
        if let Err(error) = blocking(move || driver.tend()).await {
            tracing::warn!(%error, "cannot see to the storage");
        }
        self.evict().await;
        // The newest first: a view has the volume of its parent open.
        let mut removing = self.meta.removing();
        removing.sort_unstable_by_key(|id| std::cmp::Reverse(id.serial));
        for ids in removing.chunks(FORGET) {
            let freed = self.free(ids.to_vec(), stop).await;
            self.forget(freed).await;
            if stop.is_cancelled() {
                return;
            }
        }
        if let Some(layers) = &self.layers {
            layers.detach_unused().await;
        }
    }

    /// Gives up unclaimed layer images when they are too many or the disk is too full.
    async fn evict(&self) {
        let Some(layers) = &self.layers else { return };
        let wanted = match layers.short_of(self.room.floor) {
            Ok(wanted) => wanted,
            Err(error) => return tracing::warn!(%error, "cannot tell how full the disk is"),
        };
        if let Err(error) = layers.evict(self.room.budget, wanted).await.map(drop) {
            tracing::warn!(%error, "cannot give up unused layer images yet");
        }
    }

    /// Frees storage and answers the Ids whose storage is free now.
    async fn free(&self, ids: Vec<Id>, stop: &CancellationToken) -> Vec<Id> {
        let (driver, layers, stop) = (Arc::clone(&self.driver), self.layers.clone(), stop.clone());
        let removed = blocking(move || {
            let cancelled = || stop.is_cancelled();
            let remove = |id: Id| {
                // First what may be mounted at the directory's place.
                let freed = layers.as_ref().map_or(Ok(()), |layers| layers.free(id.serial));
                let freed = freed.map_err(SnapshotError::from);
                (id, freed.and_then(|()| driver.remove(id, &cancelled).map_err(SnapshotError::from)))
            };
            let results = ids.into_iter().take_while(|_| !stop.is_cancelled()).map(remove);
            Ok::<Vec<_>, SnapshotError>(results.collect())
        });
        let mut freed = Vec::new();
        for (id, result) in removed.await.unwrap_or_default() {
            match result {
                Ok(()) => {
                    self.reported.lock().remove(&id.serial);
                    freed.push(id);
                }
                Err(SnapshotError::Driver(DriverError::Cancelled)) => {}
                // Once for each, not once a minute.
                Err(error) if self.reported.lock().insert(id.serial) => {
                    tracing::warn!(serial = id.serial, %error, "cannot free storage yet; it will be tried again");
                }
                Err(_) => {}
            }
        }
        freed
    }

    async fn forget(&self, ids: Vec<Id>) {
        if ids.is_empty() {
            return;
        }
        if let Err(error) = self.meta.forget(ids).await {
            tracing::warn!(%error, "cannot forget freed storage yet; it will be tried again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorded() -> Recorded {
        let key = |text| Key::new(text).unwrap();
        Recorded {
            ready: vec![(1, key("one")), (2, key("two"))],
            pending: vec![3],
            removing: vec![4],
            layers: vec![(6, Progress::Complete), (8, Progress::Filling)],
            last_serial: 8,
            ids: [(1, 0), (2, 1), (3, 2), (4, 3)].map(|(serial, slot)| Id { serial, slot }).into(),
            volumes: vec![(Id { serial: 1, slot: 0 }, key("one"))],
        }
    }

    fn inventory(directories: &[u64], images: &[u64]) -> Inventory {
        let (directories, images) = (directories.iter().copied().collect(), images.iter().copied().collect());
        Inventory { directories, images, volumes: None }
    }

    /// A view, here "two", has no volume of its own.
    #[test]
    fn volumes_are_known_by_their_slots() {
        let plan_of = |slots: &[u32]| {
            let volumes = Some(slots.iter().copied().collect());
            plan(&recorded(), &Inventory { volumes, images: [6].into(), ..Inventory::default() })
        };
        assert!(plan_of(&[0, 2, 3]).is_empty());
        let found = plan_of(&[2, 5]);
        assert_eq!((found.missing, found.strangers), (vec![(1, Key::new("one").unwrap())], vec![5]));
    }

    #[test]
    fn agreement_is_an_empty_plan() {
        assert!(plan(&recorded(), &inventory(&[1, 2, 3, 4], &[6, 8])).is_empty());
        assert!(plan(&recorded(), &inventory(&[1, 2], &[6])).is_empty());
    }

    #[test]
    fn each_difference_is_told_apart() {
        let plan = plan(&recorded(), &inventory(&[1, 9, 5, 3], &[7, 10]));
        assert_eq!(plan.unknown, [5, 7]);
        assert_eq!(plan.beyond, [9, 10]);
        assert_eq!(plan.missing, [(2, Key::new("two").unwrap())]);
        assert_eq!(plan.missing_layers, [6]);
    }
}
