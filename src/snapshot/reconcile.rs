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

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use super::metastore::{MetaStore, Recorded};
use super::stock::blocking;
use super::{Key, SnapshotError};
use crate::driver::{Driver, DriverError, Id};

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
}

impl Plan {
    /// Whether records and storage agree.
    pub fn is_empty(&self) -> bool {
        self.unknown.is_empty() && self.beyond.is_empty() && self.missing.is_empty()
    }
}

/// Compares. `inventory` must have been taken before `recorded` was read: an Id is recorded before it is on storage, so
/// nothing that a running daemon makes meanwhile can look unknown.
pub fn plan(recorded: &Recorded, inventory: &[u64]) -> Plan {
    let named: HashSet<u64> = (recorded.ready.iter().map(|(serial, _)| *serial))
        .chain(recorded.pending.iter().copied())
        .chain(recorded.removing.iter().copied())
        .collect();
    let present: HashSet<u64> = inventory.iter().copied().collect();
    let mut plan = Plan::default();
    for serial in inventory.iter().filter(|serial| !named.contains(serial)) {
        match *serial > recorded.last_serial {
            true => plan.beyond.push(*serial),
            false => plan.unknown.push(*serial),
        }
    }
    plan.missing = recorded.ready.iter().filter(|(serial, _)| !present.contains(serial)).cloned().collect();
    plan.unknown.sort_unstable();
    plan.beyond.sort_unstable();
    plan
}

/// Frees what is to be freed. One pass at a time, by one owner.
#[derive(Debug)]
pub struct Reconciler {
    meta: Arc<MetaStore>,
    driver: Arc<dyn Driver>,
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
    pub fn new(meta: Arc<MetaStore>, driver: Arc<dyn Driver>) -> Reconciler {
        Reconciler {
            meta,
            driver,
            wanted: Notify::new(),
            passes: watch::Sender::new(Passes::default()),
            reported: Mutex::default(),
            unknown: Mutex::default(),
        }
    }

    /// Before anything is served: compares, frees what an earlier process left half-made, and reports damage. What earlier
    /// processes were told to remove is left to [`Reconciler::run`], so that a start does not wait for it.
    pub async fn start(&self) -> Result<Plan, SnapshotError> {
        let driver = Arc::clone(&self.driver);
        let inventory = blocking(move || driver.inventory()).await?;
        let recorded = self.meta.recorded().await?;
        let plan = plan(&recorded, &inventory);
        for (serial, key) in &plan.missing {
            tracing::error!(serial, %key, "storage of a snapshot is missing: it cannot be mounted; remove it and pull again");
        }
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
        let (unused, kept): (Vec<Id>, Vec<Id>) = blocking(move || {
            Ok::<_, SnapshotError>(pending.into_iter().partition(|id| driver.is_unused(*id).unwrap_or(false)))
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
        for ids in self.meta.removing().chunks(FORGET) {
            let freed = self.free(ids.to_vec(), stop).await;
            self.forget(freed).await;
            if stop.is_cancelled() {
                return;
            }
        }
    }

    /// Frees storage and answers the Ids whose storage is free now.
    async fn free(&self, ids: Vec<Id>, stop: &CancellationToken) -> Vec<Id> {
        let (driver, stop) = (Arc::clone(&self.driver), stop.clone());
        let removed = blocking(move || {
            let cancelled = || stop.is_cancelled();
            let remove = |id| (id, driver.remove(id, &cancelled));
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
                Err(DriverError::Cancelled) => {}
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
            last_serial: 6,
        }
    }

    #[test]
    fn agreement_is_an_empty_plan() {
        assert!(plan(&recorded(), &[1, 2, 3, 4]).is_empty());
        assert!(plan(&recorded(), &[1, 2]).is_empty());
    }

    #[test]
    fn each_difference_is_told_apart() {
        let plan = plan(&recorded(), &[1, 7, 5, 3]);
        assert_eq!(plan.unknown, [5]);
        assert_eq!(plan.beyond, [7]);
        assert_eq!(plan.missing, [(2, Key::new("two").unwrap())]);
    }
}
