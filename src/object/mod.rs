//! Objects: one handle on the configured object store.
//!
//! **What.** [`Objects`] reads and writes whole small objects by name, wherever the URL says they are: `file:///DIR`,
//! `s3://BUCKET/PREFIX`, `gs://BUCKET/PREFIX`, `az://CONTAINER/PREFIX`. [`layout`] says what they are called. All that makes a
//! store bearable that is slow, overloaded or away is here, once, for chunks, indexes and refs alike: limited concurrency,
//! deadlines, retries with jitter from a budget (`budget`), a second request for what is slow to come (`latency`), and a
//! breaker that answers at once while the store does not (`breaker`).
//!
//! **Where.** Called by `chunk` and `content`, which are async. The only module that knows the `object_store` crate.
//!
//! **Words.** A *call* is what a caller asks for, within a total time; an *attempt* is one request of it. A *miss* is a clear
//! answer that there is no such object: it is success. *Transient* is what another attempt may better.
//!
//! **Invariants.**
//! * **O1** A call ends within its total time, whatever the store does.
//! * **O2** An object is written whole or not at all, and is durable when [`Objects::put`] returns. No call depends on
//!   conditional writes: some stores ignore the condition and report success.
//! * **O3** A body is returned only if it has as many bytes as the store announced. Whether they are the right ones is
//!   checked by those who know their hash.
//! * **O4** Nothing is read from or written to a store of an unknown format.
//! * **O5** No message holds a credential, a signature or a query.
//!
//! **When it fails.** Missing is not an error ([`Objects::get`] answers `None`); the other ways are told apart by
//! [`ObjectError`]. A crash while writing into a directory leaves a file `NAME#N` beside the object: no listing shows it, and
//! [`Objects::tidy`] removes it.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use object_store::ObjectStore;
use object_store::path::Path;
use tokio::time::Instant;

pub mod layout;

mod breaker;
mod budget;
mod call;
mod credentials;
mod description;
mod directory;
mod failure;
mod latency;
mod open;
mod request;
#[cfg(test)]
pub(crate) mod simulated;
mod stats;

use call::{Conduct, Patience};
use credentials::FileCredentials;
use description::Access;
use failure::Failure;
use open::{Engine, Opened};

/// How long it may take to get ready for requests.
const GETTING_READY: Duration = Duration::from_secs(10);
/// A directory has no way to be filled: more reads at once only take memory.
const DIRECTORY_READS: usize = 32;
/// A store that takes so long to begin an answer is far.
const FAR: Duration = Duration::from_millis(50);

pub use directory::Touched;
pub use open::Settings;
pub use stats::{Attempts, BOUNDS, StoreStats};

/// Why an object cannot be read or written.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ObjectError {
    /// The URL names no store that can be used.
    #[error("store {url:?}: {problem}")]
    Url {
        /// As configured, without secrets.
        url: String,
        /// What is wrong.
        problem: String,
    },
    /// The store did not answer, or not as a store does, within the time there was.
    #[error("store is not reachable: {0}")]
    Unreachable(String),
    /// The store refused: credentials or permissions.
    #[error("store refuses access: {0}")]
    Denied(String),
    /// The store does not understand what is asked of it, and will not when asked again.
    #[error("store rejects the request: {0}; check the store's URL, endpoint and region")]
    Rejected(String),
    /// The object is larger than anything of its kind can be.
    #[error("object {path} has {size} bytes, more than the {limit} there can be")]
    TooLarge {
        /// Its name.
        path: String,
        /// Its size.
        size: u64,
        /// The limit.
        limit: u64,
    },
    /// No room in the store.
    #[error("store is full: {0}")]
    Full(String),
    /// The store was made by a version of Speedy that does things another way.
    #[error(
        "store has format {found}, this version of Speedy knows format {known}: update Speedy, or use another store or prefix"
    )]
    Format {
        /// The store's.
        found: u64,
        /// Ours.
        known: u32,
    },
    /// The store's `speedy.json` is not what this version writes.
    #[error("speedy.json of the store cannot be used: {problem}")]
    Foreign {
        /// How it differs.
        problem: String,
    },
}

/// Whether a slow answer is asked for a second time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hedging {
    /// On stores that are reached over a network.
    Auto,
    /// Never.
    Off,
}

/// How a store is used.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// What a call may take in all, its wait for a free place included. [`Objects::within`] sets another.
    pub total: Duration,
    /// How long an attempt waits for the beginning of an answer, and how long the bytes of an answer may pause. An
    /// upload has this time and one second more for each 64 KiB.
    pub attempt: Duration,
    /// How many attempts a call makes at most.
    pub attempts: u32,
    /// How many reads are under way at once.
    pub reads: usize,
    /// How many writes are under way at once.
    pub writes: usize,
    /// Second requests.
    pub hedging: Hedging,
    /// Endpoints and credentials.
    pub settings: Settings,
}

impl Default for StoreOptions {
    fn default() -> StoreOptions {
        StoreOptions {
            total: Duration::from_secs(60),
            attempt: Duration::from_secs(10),
            attempts: 4,
            reads: 160,
            writes: 16,
            hedging: Hedging::Auto,
            settings: Settings::default(),
        }
    }
}

/// What came of a deletion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deletion {
    /// It is gone.
    Deleted,
    /// Nothing was there.
    Absent,
    /// Somebody has renewed it: it stays.
    Young,
}

/// One object as a listing shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Its name below the store's prefix.
    pub name: String,
    /// Its size in bytes.
    pub size: u64,
    /// When it was last written, seconds since 1970 UTC by the store's clock.
    pub modified: i64,
}

/// What time it is here, as a whole number of seconds since 1970 UTC.
#[derive(Clone)]
struct Clock(Arc<dyn Fn() -> i64 + Send + Sync>);

impl std::fmt::Debug for Clock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Clock")
    }
}

/// The machine's.
fn machine_clock() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// The store. Cheap to clone; clones share connections, limits and what is known of the store's health.
#[derive(Debug, Clone)]
pub struct Objects {
    handle: Arc<Handle>,
    total: Duration,
    patience: Patience,
}

/// What the clones share.
#[derive(Debug)]
struct Handle {
    clock: Clock,
    engine: Engine,
    prefix: Path,
    hint: Option<&'static str>,
    credentials: Option<FileCredentials>,
    options: StoreOptions,
    conduct: Conduct,
    known: description::Examined,
}

impl Objects {
    /// The store that `url` names. Does not look at it: that it can be reached, and that its format is known, shows at its
    /// first use. Must be used inside a tokio runtime.
    pub fn open(url: &str, options: &StoreOptions) -> Result<Objects, ObjectError> {
        let opened = open::open(url, options)?;
        Ok(Objects::new(opened, options.clone()))
    }

    /// The same store as if it had never been looked at. For tests.
    #[cfg(test)]
    pub(crate) fn afresh(&self) -> Objects {
        self.handle.forget();
        self.clone()
    }

    /// A store in memory, for tests.
    pub fn memory() -> Objects {
        Objects::over(Arc::new(object_store::memory::InMemory::new()), StoreOptions::default())
    }

    fn over(store: Arc<dyn ObjectStore>, options: StoreOptions) -> Objects {
        Objects::new(Opened::plain(Engine::Remote(store)), options)
    }

    /// The same by another clock.
    #[cfg(test)]
    fn by_clock(store: Arc<dyn ObjectStore>, options: StoreOptions, clock: Clock) -> Objects {
        let mut objects = Objects::over(store, options);
        let handle = Arc::get_mut(&mut objects.handle).expect("nobody else has it yet");
        handle.clock = clock;
        objects
    }

    fn new(opened: Opened, options: StoreOptions) -> Objects {
        let Opened { engine, prefix, hint, credentials } = opened;
        let most = if matches!(engine, Engine::Directory { .. }) { DIRECTORY_READS } else { usize::MAX };
        let options = StoreOptions { reads: options.reads.min(most), ..options };
        let (conduct, total) = (Conduct::new(&options), options.total);
        let (clock, known) = (Clock(Arc::new(machine_clock)), description::Examined::default());
        let handle = Handle { clock, engine, prefix, hint, credentials, options, conduct, known };
        Objects { handle: Arc::new(handle), total, patience: Patience::None }
    }

    /// The same store for a caller who has this much time for each call, and something else to do when the store is away.
    pub fn within(&self, total: Duration) -> Objects {
        Objects { handle: Arc::clone(&self.handle), total, patience: Patience::None }
    }

    /// The same store for a caller who cannot do without it: a call goes on asking until its time is over, through a rest
    /// of the store that others are not kept waiting for.
    pub fn patient(&self, total: Duration) -> Objects {
        Objects { handle: Arc::clone(&self.handle), total, patience: Patience::UntilDeadline }
    }

    /// What time it is by this machine's clock, seconds since 1970 UTC: to be compared with [`ObjectInfo::modified`], which is by
    /// the store's.
    pub fn now(&self) -> i64 {
        (self.handle.clock.0)()
    }

    /// Whether it is the way to the store, rather than what else is on the link, that an answer takes its time for: by what was seen in
    /// the last minutes.
    pub fn is_far(&self) -> bool {
        self.distance() >= FAR
    }

    /// How long the store takes to begin an answer when it has nothing else to do; nothing, as long as that is not known.
    pub fn distance(&self) -> Duration {
        self.handle.conduct.latency.quickest().unwrap_or_default()
    }

    /// Sees to it that the next requests go out at once: the store's description is known, and so many connections to a far store are open. Of
    /// what goes wrong nobody is told, the breaker neither: whoever needs the store asks himself.
    pub async fn get_ready(&self, connections: usize) {
        let path = self.path(layout::STORE);
        let ready = async {
            let attempt = self.handle.get_once(&path, layout::STORE, description::LONGEST);
            if !self.is_known() && attempt.await.is_err() {
                return;
            }
            if self.ready(Access::Read, self.deadline()).await.is_ok() && self.is_far() {
                futures::future::join_all((0..connections).map(|_| self.handle.connect(&path))).await;
            }
        };
        drop(tokio::time::timeout(GETTING_READY, ready).await);
    }

    /// Whether requests are looks into a directory, and cost next to nothing.
    pub fn is_directory(&self) -> bool {
        matches!(self.handle.engine, Engine::Directory { .. })
    }

    /// What has happened on this store so far, over all clones.
    pub fn stats(&self) -> StoreStats {
        let conduct = &self.handle.conduct;
        StoreStats {
            opened: conduct.breaker.opened(),
            resting: conduct.breaker.open_for(),
            ..conduct.counters.snapshot()
        }
    }

    /// How long the attempts so far took, by what was asked and how they ended, over all clones.
    pub fn attempts(&self) -> Vec<Attempts> {
        self.handle.conduct.counters.timings.read()
    }

    /// The bytes of an object, or `None` if there is none; an object of more than `limit` bytes is an error.
    pub async fn get(&self, name: &str, limit: u64) -> Result<Option<Bytes>, ObjectError> {
        let until = self.deadline();
        self.ready(Access::Read, until).await?;
        self.fetch(name, limit, until).await
    }

    /// Writes an object whole, over what may be there; durable on return.
    pub async fn put(&self, name: &str, bytes: Bytes) -> Result<(), ObjectError> {
        let until = self.deadline();
        self.ready(Access::Write, until).await?;
        self.store(name, bytes, until).await
    }

    /// What is known of an object without its bytes, or `None` if there is none.
    pub async fn stat(&self, name: &str) -> Result<Option<ObjectInfo>, ObjectError> {
        let until = self.deadline();
        self.ready(Access::Read, until).await?;
        self.head(name, until).await
    }

    /// The objects whose names begin with `prefix` and a slash, at most `limit` of them, in no order.
    pub async fn list(&self, prefix: &str, limit: usize) -> Result<Vec<ObjectInfo>, ObjectError> {
        let until = self.deadline();
        self.ready(Access::Read, until).await?;
        self.enumerate(prefix, limit, until).await
    }

    /// Deletes an object; succeeds when there is none.
    pub async fn delete(&self, name: &str) -> Result<(), ObjectError> {
        let until = self.deadline();
        self.ready(Access::Write, until).await?;
        self.remove(name, until).await
    }

    /// Deletes an object unless it was written at `young_from` (seconds since 1970 UTC by the store's clock) or later. Looks right
    /// before it deletes, and takes no longer for both than one call may take: no store deletes under a condition.
    pub async fn delete_unless_young(&self, name: &str, young_from: i64) -> Result<Deletion, ObjectError> {
        let until = self.deadline();
        self.ready(Access::Write, until).await?;
        match self.head(name, until).await? {
            None => Ok(Deletion::Absent),
            Some(info) if info.modified >= young_from => Ok(Deletion::Young),
            Some(_) => self.remove(name, until).await.map(|()| Deletion::Deleted),
        }
    }

    /// When a call that begins now is over.
    fn deadline(&self) -> Instant {
        Instant::now() + self.total
    }
}

#[cfg(test)]
mod tests;
