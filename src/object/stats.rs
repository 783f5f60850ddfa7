//! What is counted about the store.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::ObjectError;
use super::failure::Failure;

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

/// Upper bounds of the times that are told apart, in seconds.
pub const BOUNDS: [f64; 10] = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0];

/// What is asked of a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    /// An object's bytes.
    Get,
    /// An object is written.
    Put,
    /// What is known of an object.
    Head,
    /// The names of objects.
    List,
    /// An object is deleted, or made young.
    Change,
}

/// How an attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// With an answer; that there is no such object is one.
    Ok,
    /// The store refused access.
    Denied,
    /// The store has no room.
    Full,
    /// The store does not do what was asked.
    Rejected,
    /// The way to the store or the store itself failed, time-outs included.
    Failed,
    /// Its caller had no more time.
    Abandoned,
}

/// Attempts of one kind that ended one way, since the store was opened.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Attempts {
    /// What was asked.
    pub operation: &'static str,
    /// How they ended.
    pub outcome: &'static str,
    /// How long they took together, in seconds.
    pub seconds: f64,
    /// How many took no longer than each of [`BOUNDS`] and longer than the one before; the last longer than all.
    pub counts: [u64; BOUNDS.len() + 1],
}

impl Operation {
    const ALL: [Operation; 5] =
        [Operation::Get, Operation::Put, Operation::Head, Operation::List, Operation::Change];

    fn as_str(self) -> &'static str {
        match self {
            Operation::Get => "get",
            Operation::Put => "put",
            Operation::Head => "head",
            Operation::List => "list",
            Operation::Change => "change",
        }
    }
}

impl Outcome {
    const ALL: [Outcome; 6] =
        [Outcome::Ok, Outcome::Denied, Outcome::Full, Outcome::Rejected, Outcome::Failed, Outcome::Abandoned];

    fn as_str(self) -> &'static str {
        match self {
            Outcome::Ok => "ok",
            Outcome::Denied => "denied",
            Outcome::Full => "full",
            Outcome::Rejected => "rejected",
            Outcome::Failed => "failed",
            Outcome::Abandoned => "abandoned",
        }
    }

    pub(super) fn of<T>(outcome: &Result<T, Failure>) -> Outcome {
        match outcome {
            Ok(_) => Outcome::Ok,
            Err(Failure::Final(ObjectError::Denied(_))) => Outcome::Denied,
            Err(Failure::Final(ObjectError::Full(_))) => Outcome::Full,
            Err(Failure::Final(_)) => Outcome::Rejected,
            Err(Failure::Transient(_)) => Outcome::Failed,
            Err(Failure::TooSoon(_)) => Outcome::Abandoned,
        }
    }
}

#[derive(Debug, Default)]
struct Times {
    nanoseconds: Counter,
    counts: [Counter; BOUNDS.len() + 1],
}

/// The times of all attempts.
#[derive(Debug, Default)]
pub(super) struct Timings([[Times; Outcome::ALL.len()]; Operation::ALL.len()]);

impl Timings {
    pub(super) fn add(&self, operation: Operation, outcome: Outcome, took: Duration) {
        let times = &self.0[operation as usize][outcome as usize];
        times.nanoseconds.add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
        let bucket = BOUNDS.iter().position(|bound| took.as_secs_f64() <= *bound);
        times.counts[bucket.unwrap_or(BOUNDS.len())].add(1);
    }

    /// Those that there were.
    pub(super) fn read(&self) -> Vec<Attempts> {
        let all = Operation::ALL.into_iter().flat_map(|operation| {
            Outcome::ALL.into_iter().map(move |outcome| {
                let times = &self.0[operation as usize][outcome as usize];
                Attempts {
                    operation: operation.as_str(),
                    outcome: outcome.as_str(),
                    seconds: Duration::from_nanos(times.nanoseconds.read()).as_secs_f64(),
                    counts: times.counts.each_ref().map(Counter::read),
                }
            })
        });
        all.filter(|attempts| attempts.counts.iter().any(|count| *count > 0)).collect()
    }
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) timings: Timings,
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
