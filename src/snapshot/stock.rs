//! Storage Ids made ahead, so that a Prepare is one durable write.
//!
//! An Id must be recorded before anything exists on storage (M4), and its storage must be durable before a snapshot is
//! recorded on it. Both are done here, ahead, in batches: each Id in stock is Pending in the records and has its empty
//! directories. When the stock is empty, the caller makes one for itself, so an error on storage reaches the call that meets
//! it, and a burst is slower but not blocked.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::SnapshotError;
use super::metastore::MetaStore;
use crate::driver::{Driver, DriverError, Id};
use crate::sys;

/// How many Ids are kept at most.
pub const CAPACITY: usize = 64;
const LOW: usize = CAPACITY / 2;
const RETRY: Duration = Duration::from_secs(1);

/// See the module's page.
#[derive(Debug)]
pub struct Stock {
    meta: Arc<MetaStore>,
    driver: Arc<dyn Driver>,
    ids: Mutex<Vec<Id>>,
    low: Notify,
}

impl Stock {
    /// An empty stock; [`Stock::fill`] fills it.
    pub fn new(meta: Arc<MetaStore>, driver: Arc<dyn Driver>) -> Stock {
        Stock { meta, driver, ids: Mutex::new(Vec::with_capacity(CAPACITY)), low: Notify::new() }
    }

    /// An Id with empty storage, Pending in the records.
    pub async fn take(&self) -> Result<Id, SnapshotError> {
        let taken = {
            let mut ids = self.ids.lock();
            let taken = ids.pop();
            if ids.len() < LOW {
                self.low.notify_one();
            }
            taken
        };
        match taken {
            Some(id) => Ok(id),
            None => self.make_one().await,
        }
    }

    async fn make_one(&self) -> Result<Id, SnapshotError> {
        let ids = self.meta.reserve(1).await?;
        let made = self.make_storage(ids.clone()).await;
        match (ids.first(), made) {
            (Some(id), Ok(())) => Ok(*id),
            (Some(id), Err(error)) => {
                self.meta.give_up(*id).await;
                Err(error)
            }
            (None, _) => Err(DriverError::Unsupported("no id was reserved".into()).into()),
        }
    }

    /// All of it or nothing: on a disk that is nearly full, half-made storage would keep others from what room there is.
    async fn make_storage(&self, ids: Vec<Id>) -> Result<(), SnapshotError> {
        let driver = Arc::clone(&self.driver);
        blocking(move || {
            let made = driver.reserve(&ids);
            if made.is_err() {
                for id in &ids {
                    if let Err(error) = driver.remove(*id, &|| false) {
                        tracing::warn!(serial = id.serial, %error, "half-made storage stays until the next start");
                    }
                }
            }
            made
        })
        .await
    }

    /// Keeps the stock filled until `stop`.
    pub async fn fill(&self, stop: CancellationToken) {
        let mut refill = Refill::default();
        loop {
            if self.ids.lock().len() >= LOW {
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = self.low.notified() => {}
                }
            }
            if stop.is_cancelled() {
                return;
            }
            if let Err(error) = self.refill(&mut refill).await {
                // Once, not once a second.
                if !std::mem::replace(&mut refill.failing, true) {
                    tracing::warn!(%error, "cannot make storage ahead; trying again");
                }
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep(RETRY) => {}
                }
            }
        }
    }

    /// Makes what is wanted at once, or a single one after a failure: on a full disk that must not eat one batch of Ids a second.
    async fn refill(&self, refill: &mut Refill) -> Result<(), SnapshotError> {
        if refill.recorded.is_empty() {
            let wanted = CAPACITY.saturating_sub(self.ids.lock().len());
            refill.recorded = self.meta.reserve(if refill.failing { 1 } else { wanted }).await?;
        }
        let count = if refill.failing { 1 } else { refill.recorded.len() };
        self.make_storage(refill.recorded[..count].to_vec()).await?;
        refill.failing = false;
        // The oldest serial is taken first: directories in use stay close together.
        let mut fresh: Vec<Id> = refill.recorded.drain(..count).rev().collect();
        let mut ids = self.ids.lock();
        fresh.append(&mut ids);
        *ids = fresh;
        Ok(())
    }
}

/// Where the filling stands.
#[derive(Debug, Default)]
struct Refill {
    /// Pending Ids that have no storage yet.
    recorded: Vec<Id>,
    failing: bool,
}

/// [`sys::blocking()`] for errors of ours and for those of lower tiers.
pub(super) async fn blocking<T, E>(
    run: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, SnapshotError>
where
    T: Send + 'static,
    E: Into<SnapshotError> + Send + 'static,
{
    sys::blocking(|| run().map_err(Into::into)).await
}
