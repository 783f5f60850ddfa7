//! What is counted about the store.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What has happened on one store since it was opened.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct StoreStats {
    /// Requests sent, extra ones included.
    pub requests: u64,
    /// Bytes of objects that arrived whole.
    pub read: u64,
    /// Bytes of objects that were written.
    pub written: u64,
    /// Requests that were made again after a failure.
    pub retries: u64,
    /// Second requests for what was slow to come.
    pub hedges: u64,
    /// Those of them that were the first to be answered.
    pub hedges_won: u64,
    /// Requests that failed in transport, time-outs included.
    pub failures: u64,
    /// Calls that came to nothing because the store did not answer.
    pub unreachable: u64,
    /// Calls refused at once because the store did not answer others.
    pub refused: u64,
    /// How often the store was given up for a while.
    pub opened: u64,
    /// For how long it is still left alone; `None` while it is in use.
    pub resting: Option<Duration>,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) requests: Counter,
    pub(super) read: Counter,
    pub(super) written: Counter,
    pub(super) retries: Counter,
    pub(super) hedges: Counter,
    pub(super) hedges_won: Counter,
    pub(super) failures: Counter,
    pub(super) unreachable: Counter,
    pub(super) refused: Counter,
}

#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    fn read(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Counters {
    pub(super) fn snapshot(&self) -> StoreStats {
        StoreStats {
            requests: self.requests.read(),
            read: self.read.read(),
            written: self.written.read(),
            retries: self.retries.read(),
            hedges: self.hedges.read(),
            hedges_won: self.hedges_won.read(),
            failures: self.failures.read(),
            unreachable: self.unreachable.read(),
            refused: self.refused.read(),
            opened: 0,
            resting: None,
        }
    }
}
