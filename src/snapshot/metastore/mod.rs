//! The metadata store: the only authority on what exists.
//!
//! **What.** The records of all snapshots and of all storage Ids, durable before a call is answered, in one SQLite file
//! (`schema.rs` has its layout).
//!
//! **Where.** Called by `snapshotter` and `reconcile`. One writer thread owns the database connection; callers hand it
//! operations over a bounded queue. Operations that wait together share one transaction and so one fsync. Reads are answered
//! from memory (`index.rs`), which the writer brings up to date before it answers.
//!
//! **Words.** An Id's life is Pending → Ready → Removing → gone: Pending before anything is on storage, Ready while a snapshot
//! has it, Removing from the snapshot's removal until the storage is freed.
//!
//! **Invariants.** M1–M5 (see [`crate::snapshot`]) are constraints of the tables or checked in the transaction that writes.
//!
//! **When it fails.** A transaction that cannot be written is rolled back and every caller in it gets the error; if several
//! shared it, each is tried alone first, so that one bad operation does not fail the others. After a failed fsync nobody
//! knows what the disk holds: the store then refuses every write until the daemon is started again and has read the file anew.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::{Mutex, RwLock};
use rusqlite::Connection;
use tokio::sync::{mpsc, oneshot};

use super::{Key, Kind, LabelUpdate, Labels, SnapshotError, Timestamp, Usage, schema};
use crate::driver::{Id, Known};
use crate::sys::reserve::Reserve;

mod index;
mod layer_tables;
mod layers;
mod root;
mod tables;

use index::{Change, Index, Slots};
pub use index::{Counts, Own, Record, Stack};
pub use layers::{LayerChoice, LayerRecord, NewLayer, Origin, Progress, PublishEntry};
pub use root::read_property;

/// The directory below the root that holds room for freeing room.
pub const RESERVE: &str = "reserve";
/// How many operations may wait for the writer; callers beyond wait for room.
const QUEUE: usize = 1024;
/// How many operations share one transaction at most.
const BATCH: usize = 256;

/// What can go wrong with the records themselves.
#[derive(Debug, thiserror::Error)]
pub enum MetaError {
    /// The file is not one of ours; it was not touched.
    #[error(
        "{path} is not a metadata file of Speedy; nothing was touched: choose another root, or move that file away if it is \
         not needed"
    )]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// The file has another version; it was not touched.
    #[error(
        "{path} has format version {found}, this Speedy knows {known}; nothing was touched: run the version that wrote it, \
         or choose another root"
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: i32,
        /// Ours.
        known: i32,
    },
    /// The root belongs to another storage driver; it was not touched.
    #[error(
        "{path} was made by the driver {found}, not {wanted}; nothing was touched: set driver = \"{found}\" or choose \
         another root"
    )]
    OtherDriver {
        /// The file.
        path: PathBuf,
        /// The driver that made it.
        found: String,
        /// The configured one.
        wanted: String,
    },
    /// No room for the records.
    #[error("no space left for the metadata store")]
    Full(#[source] rusqlite::Error),
    /// SQLite failed.
    #[error("metadata store: {0}")]
    Sqlite(#[source] rusqlite::Error),
    /// A file operation failed.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// An fsync failed earlier.
    #[error(
        "the metadata store could not write to its disk earlier and refuses to go on: check the disk, restart speedy"
    )]
    Poisoned,
    /// An Id was used twice: an error in this program, caught before it did harm.
    #[error("storage id {serial} is not pending")]
    NotPending {
        /// The Id's serial.
        serial: u64,
    },
    /// The writer has ended.
    #[error("the metadata store is closed")]
    Closed,
}

impl From<rusqlite::Error> for MetaError {
    fn from(error: rusqlite::Error) -> MetaError {
        match error.sqlite_error_code() {
            Some(rusqlite::ErrorCode::DiskFull) => MetaError::Full(error),
            _ => MetaError::Sqlite(error),
        }
    }
}

/// A snapshot to be recorded on a Pending Id.
#[derive(Debug, Clone)]
pub struct NewSnapshot {
    /// Its storage, already prepared.
    pub id: Id,
    /// Key, or name if `kind` is committed.
    pub key: Key,
    /// What it stands on.
    pub parent: Option<Key>,
    /// What it is.
    pub kind: Kind,
    /// Its labels.
    pub labels: Labels,
    /// When.
    pub now: Timestamp,
}

/// A commit to be recorded.
#[derive(Debug, Clone)]
pub struct NewCommit {
    /// The new name.
    pub name: Key,
    /// The active snapshot.
    pub key: Key,
    /// The parent to adopt, if the active has none (rebase).
    pub parent: Option<Key>,
    /// The labels from now on; those of the active are not inherited.
    pub labels: Labels,
    /// Whether the directory of an active snapshot with a layer image holds anything.
    pub own: Own,
    /// Queued with the commit: the layer is to be published.
    pub publish: Option<PublishEntry>,
    /// When.
    pub now: Timestamp,
}

/// What came of recording a committed snapshot for a remote layer.
#[derive(Debug, Clone)]
pub enum Adopted {
    /// Recorded.
    Created(Arc<Record>),
    /// Another one answers for this (ref, parent); the Id offered is still Pending.
    AlreadyThere(Arc<Record>),
}

/// A finished operation: the caller's answer and what it does to the index.
struct Done<T> {
    answer: T,
    changes: Vec<Change>,
}

/// Why an operation did not finish.
enum OpError {
    /// It may not; nothing was written, the transaction goes on.
    Refused(SnapshotError),
    /// The database failed; the transaction is lost.
    Failed(rusqlite::Error),
}

impl From<SnapshotError> for OpError {
    fn from(error: SnapshotError) -> OpError {
        OpError::Refused(error)
    }
}

impl From<MetaError> for OpError {
    fn from(error: MetaError) -> OpError {
        OpError::Refused(error.into())
    }
}

impl From<rusqlite::Error> for OpError {
    fn from(error: rusqlite::Error) -> OpError {
        OpError::Failed(error)
    }
}

/// An operation on its way through the writer.
trait Operation: Send {
    /// Runs inside a transaction; may be run again if that is rolled back.
    fn run(&mut self, db: &Connection, slots: &mut Slots<'_>) -> Result<Vec<Change>, rusqlite::Error>;
    /// Whether it leads to room on a full disk.
    fn room(&self) -> Room;
    /// Tells the caller how it ended.
    fn answer(self: Box<Self>, outcome: Result<(), MetaError>);
}

/// What an operation does to the room on the disk. One that frees some must not fail for want of it: containerd's collector
/// gives up a whole pass when one Remove fails, and nothing would ever be freed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Room {
    Takes,
    Frees,
}

struct Request<T, F> {
    run: F,
    room: Room,
    result: Option<Result<T, SnapshotError>>,
    reply: oneshot::Sender<Result<T, SnapshotError>>,
}

impl<T, F> Operation for Request<T, F>
where
    T: Send,
    F: FnMut(&Connection, &mut Slots<'_>) -> Result<Done<T>, OpError> + Send,
{
    fn run(&mut self, db: &Connection, slots: &mut Slots<'_>) -> Result<Vec<Change>, rusqlite::Error> {
        let (result, changes) = match (self.run)(db, slots) {
            Ok(done) => (Ok(done.answer), done.changes),
            Err(OpError::Refused(error)) => (Err(error), Vec::new()),
            Err(OpError::Failed(error)) => return Err(error),
        };
        self.result = Some(result);
        Ok(changes)
    }

    fn room(&self) -> Room {
        self.room
    }

    fn answer(self: Box<Self>, outcome: Result<(), MetaError>) {
        let result = match (outcome, self.result) {
            (Ok(()), Some(result)) => result,
            (Ok(()), None) => Err(MetaError::Closed.into()),
            (Err(error), _) => Err(error.into()),
        };
        // A caller that has gone away does not want the answer; what was done stays done.
        drop(self.reply.send(result));
    }
}

/// See the module's page.
#[derive(Debug)]
pub struct MetaStore {
    index: Arc<RwLock<Index>>,
    queue: Mutex<Option<mpsc::Sender<Box<dyn Operation>>>>,
    writer: Mutex<Option<JoinHandle<()>>>,
    path: PathBuf,
}

impl MetaStore {
    /// Opens `<root>/metadata.db`, making it where there is none, and starts the writer.
    pub fn open(root: &Path, driver: &str) -> Result<MetaStore, MetaError> {
        let path = root.join("metadata.db");
        let io = |source| MetaError::Io { path: path.clone(), source };
        let mut reserve = Reserve::given_up(root.join(RESERVE)).map_err(io)?;
        let db = schema::open(&path, driver)?;
        let mut index = Index::default();
        tables::load(&db)?.into_iter().for_each(|change| index.apply(change));
        let index = Arc::new(RwLock::new(index));
        let (queue, operations) = mpsc::channel(QUEUE);
        reserve.hold();
        let writer = Writer { db, index: Arc::clone(&index), reserve, poisoned: false };
        let writer = std::thread::Builder::new()
            .name("metastore".into())
            .spawn(move || writer.run(operations))
            .map_err(io)?;
        Ok(MetaStore { index, queue: Mutex::new(Some(queue)), writer: Mutex::new(Some(writer)), path })
    }

    /// The largest serial ever given out.
    pub async fn last_serial(&self) -> Result<u64, SnapshotError> {
        self.submit(Room::Frees, |db, _| {
            let last = tables::last_serial(db).map_err(|error| OpError::Refused(error.into()))?;
            Ok(Done { answer: last, changes: Vec::new() })
        })
        .await
    }

    /// Everything that is recorded.
    pub async fn recorded(&self) -> Result<Recorded, SnapshotError> {
        let last_serial = self.last_serial().await?;
        Ok(Recorded::of(&self.index.read(), last_serial))
    }

    /// Records storage that was found and never given out, as Pending: it is named from now on, so that it is neither freed
    /// nor given to a snapshot, and serials begin above it.
    pub async fn claim(&self, serials: Vec<u64>) -> Result<(), SnapshotError> {
        self.submit(Room::Frees, move |db, slots| tables::claim(db, &serials, &slots.take(serials.len())))
            .await
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The snapshot of this key or name.
    pub fn get(&self, key: &Key) -> Option<Arc<Record>> {
        self.index.read().get(key).cloned()
    }

    /// The snapshot with all that lies below it: one consistent view.
    pub fn get_with_stack(&self, key: &Key) -> Option<(Arc<Record>, Stack)> {
        let index = self.index.read();
        let record = index.get(key)?;
        Some((Arc::clone(record), index.stack(record)))
    }

    /// What is mounted below a child of this committed snapshot.
    pub fn stack_with(&self, key: &Key) -> Option<Stack> {
        let index = self.index.read();
        Some(index.stack_with(index.get(key)?))
    }

    /// All snapshots, by key (M6).
    pub fn all(&self) -> Vec<Arc<Record>> {
        self.index.read().all()
    }

    /// The committed snapshot that answers for a chain ID on this parent.
    pub fn answering(&self, chain: &str, parent: Option<&Key>) -> Option<Arc<Record>> {
        self.index.read().answering(chain, parent).cloned()
    }

    /// A committed snapshot whose usage is not known yet, other than those to skip.
    pub fn unmeasured(&self, skip: &HashSet<Id>) -> Option<Arc<Record>> {
        self.index.read().unmeasured(skip)
    }

    /// Ids made ahead.
    pub fn pending(&self) -> Vec<Id> {
        self.index.read().pending()
    }

    /// Ids whose storage is to be freed.
    pub fn removing(&self) -> Vec<Id> {
        self.index.read().removing()
    }

    /// How many there are of each.
    pub fn counts(&self) -> Counts {
        self.index.read().counts()
    }

    /// Records `count` new Pending Ids.
    pub async fn reserve(&self, count: usize) -> Result<Vec<Id>, SnapshotError> {
        self.submit(Room::Takes, move |db, slots| tables::reserve(db, &slots.take(count))).await
    }

    /// Records an active snapshot or a view; an active one may have its content already, as if it had been applied.
    pub async fn create(&self, new: NewSnapshot, layer: LayerChoice) -> Result<Arc<Record>, SnapshotError> {
        self.submit(Room::Takes, move |db, _| tables::create(db, &new, &layer)).await
    }

    /// Records the committed snapshot that answers for `chain` on its parent, unless there is one.
    pub async fn adopt(
        &self,
        new: NewSnapshot,
        chain: String,
        layer: LayerChoice,
    ) -> Result<Adopted, SnapshotError> {
        self.submit(Room::Takes, move |db, _| tables::adopt(db, &new, &chain, &layer)).await
    }

    /// Records a commit.
    pub async fn commit(&self, commit: NewCommit) -> Result<Arc<Record>, SnapshotError> {
        self.submit(Room::Takes, move |db, _| tables::commit(db, &commit)).await
    }

    /// Removes a snapshot; its Id is Removing from now on.
    pub async fn remove(&self, key: Key) -> Result<(), SnapshotError> {
        self.submit(Room::Frees, move |db, _| tables::remove(db, &key)).await
    }

    /// Changes labels.
    pub async fn update(
        &self,
        key: Key,
        update: LabelUpdate,
        now: Timestamp,
    ) -> Result<Arc<Record>, SnapshotError> {
        self.submit(Room::Takes, move |db, _| tables::update(db, &key, &update, now)).await
    }

    /// Keeps what committed snapshots take.
    pub async fn measured(&self, usages: Vec<(Id, Usage)>) -> Result<(), SnapshotError> {
        self.submit(Room::Takes, move |db, _| tables::measured(db, &usages)).await
    }

    /// Pending Ids that no snapshot will use are to be removed.
    pub async fn discard(&self, ids: Vec<Id>) -> Result<(), SnapshotError> {
        self.submit(Room::Frees, move |db, _| tables::discard(db, &ids)).await
    }

    /// The same for one Id, where the caller has something else to answer: what cannot be recorded now is done by the next start.
    pub async fn give_up(&self, id: Id) {
        if let Err(error) = self.discard(vec![id]).await {
            tracing::warn!(serial = id.serial, %error, "an unused id stays until the next start");
        }
    }

    /// The storage of these Ids is freed (M4): they are gone.
    pub async fn forget(&self, ids: Vec<Id>) -> Result<(), SnapshotError> {
        self.submit(Room::Frees, move |db, _| tables::forget(db, &ids)).await
    }

    /// Waits for what is queued, then closes the file. Later writes are refused.
    pub fn close(&self) {
        drop(self.queue.lock().take());
        if let Some(writer) = self.writer.lock().take()
            && writer.join().is_err()
        {
            tracing::error!("the metadata writer panicked");
        }
    }

    async fn submit<T, F>(&self, room: Room, run: F) -> Result<T, SnapshotError>
    where
        T: Send + 'static,
        F: FnMut(&Connection, &mut Slots<'_>) -> Result<Done<T>, OpError> + Send + 'static,
    {
        let queue = self.queue.lock().clone().ok_or(MetaError::Closed)?;
        let (reply, answer) = oneshot::channel();
        let request = Request { run, room, result: None, reply };
        queue.send(Box::new(request)).await.map_err(|_| MetaError::Closed)?;
        answer.await.map_err(|_| MetaError::Closed)?
    }
}

impl Drop for MetaStore {
    fn drop(&mut self) {
        self.close();
    }
}

struct Writer {
    db: Connection,
    index: Arc<RwLock<Index>>,
    reserve: Reserve,
    poisoned: bool,
}

impl Writer {
    fn run(mut self, mut operations: mpsc::Receiver<Box<dyn Operation>>) {
        let mut batch = Vec::new();
        while operations.blocking_recv_many(&mut batch, BATCH) > 0 {
            self.write(std::mem::take(&mut batch));
        }
        if let Err(error) = self.db.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)") {
            tracing::warn!(%error, "cannot fold the write-ahead log into the metadata file; the next start will");
        }
    }

    fn write(&mut self, mut batch: Vec<Box<dyn Operation>>) {
        let frees = batch.iter().any(|operation| operation.room() == Room::Frees);
        match self.transact(&mut batch) {
            Ok(()) => {
                if frees {
                    self.reserve.hold();
                }
                batch.into_iter().for_each(|operation| operation.answer(Ok(())));
            }
            // One of them may be the cause: each alone, so that only that one fails.
            Err(_) if batch.len() > 1 => {
                batch.into_iter().for_each(|operation| self.write(vec![operation]));
            }
            Err(MetaError::Full(_)) if frees && self.reserve.give_up().unwrap_or(false) => {
                tracing::warn!("the disk is full; the reserve was given up to free room");
                self.write(batch);
            }
            Err(error) => {
                let mut error = Some(error);
                batch.into_iter().for_each(|o| o.answer(Err(error.take().unwrap_or(MetaError::Closed))));
            }
        }
    }

    fn transact(&mut self, batch: &mut [Box<dyn Operation>]) -> Result<(), MetaError> {
        if self.poisoned {
            return Err(MetaError::Poisoned);
        }
        let written = self.try_transact(batch);
        if let Err(error) = &written {
            self.poisoned = is_lost_write(error);
            tracing::error!(%error, poisoned = self.poisoned, "metadata transaction failed");
        }
        written.map_err(MetaError::from)
    }

    fn try_transact(&mut self, batch: &mut [Box<dyn Operation>]) -> Result<(), rusqlite::Error> {
        let tx = self.db.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        let mut changes = Vec::new();
        {
            let index = self.index.read();
            let mut slots = Slots::new(&index);
            for operation in batch {
                changes.append(&mut operation.run(&tx, &mut slots)?);
            }
        }
        tx.commit()?;
        let mut index = self.index.write();
        changes.into_iter().for_each(|change| index.apply(change));
        Ok(())
    }
}

/// Whether the disk may hold something else than SQLite believes.
fn is_lost_write(error: &rusqlite::Error) -> bool {
    use rusqlite::ffi::{SQLITE_IOERR_DIR_FSYNC, SQLITE_IOERR_FSYNC};
    let code = error.sqlite_error().map(|e| e.extended_code);
    matches!(code, Some(SQLITE_IOERR_FSYNC | SQLITE_IOERR_DIR_FSYNC))
}

/// What is recorded in `<root>/metadata.db`, read beside a running daemon.
#[derive(Debug)]
pub struct Recorded {
    /// Serials in use by snapshots.
    pub ready: Vec<(u64, Key)>,
    /// Serials made ahead.
    pub pending: Vec<u64>,
    /// Serials whose storage is to be freed.
    pub removing: Vec<u64>,
    /// Serials of layer images.
    pub layers: Vec<(u64, Progress)>,
    /// The largest serial ever given.
    pub last_serial: u64,
    /// Every Id that is recorded, in whatever state.
    pub ids: Vec<Id>,
    /// The snapshots that have a volume of their own where snapshots are volumes: all but views.
    pub volumes: Vec<(Id, Key)>,
}

impl Recorded {
    fn of(index: &Index, last_serial: u64) -> Recorded {
        let serials = |ids: Vec<Id>| ids.into_iter().map(|id| id.serial).collect();
        Recorded {
            ready: index.all().iter().map(|r| (r.id.serial, r.info.name.clone())).collect(),
            pending: serials(index.pending()),
            removing: serials(index.removing()),
            layers: index.layers().iter().map(|layer| (layer.id.serial, layer.progress)).collect(),
            last_serial,
            ids: index.ids(),
            volumes: index
                .volumes()
                .into_iter()
                .map(|record| (record.id, record.info.name.clone()))
                .collect(),
        }
    }

    /// What a driver is told of it.
    pub fn known(&self) -> Known {
        let newest = self.ready.iter().map(|(serial, _)| *serial).max().unwrap_or(0);
        Known { ids: self.ids.clone(), newest, last_serial: self.last_serial }
    }
}

/// Whether `root` has a metadata file; an error if it is not one that this program may open. Touches nothing.
pub fn is_present(root: &Path) -> Result<bool, MetaError> {
    Ok(schema::recognise(&root.join("metadata.db"))?.is_some())
}

/// Reads the records without a daemon and without changing anything; `None` where there are none.
pub fn read_recorded(root: &Path) -> Result<Option<Recorded>, MetaError> {
    let Some(mut db) = schema::open_read_only(&root.join("metadata.db"))? else { return Ok(None) };
    let tx = db.transaction()?;
    let mut index = Index::default();
    tables::load(&tx)?.into_iter().for_each(|change| index.apply(change));
    Ok(Some(Recorded::of(&index, tables::last_serial(&tx)?)))
}
