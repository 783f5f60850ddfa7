//! One layer image of which not all is here: which chunks are, and how the others come.
//!
//! **What.** [`Cold::read`] gives the bytes of any range, fetching what is missing; [`Cold::fill`] makes chunks present ahead of
//! any reader. Both end in the same file.
//!
//! **Invariants.**
//! * Bytes leave here only if they were checked against the id of their chunk, in this life of the machine: those in the file
//!   because [`Presence`] says so, those of a file that it says nothing of by hashing them.
//! * A read is answered as soon as its chunks are checked; they are written to the file afterwards. Until then they are in
//!   memory, of which all cold layers together take a bounded part ([`Gate::room`]).
//! * Nothing is synced here.
//! * Whoever reads the file holds `reading` from the moment it found its chunks present: none is given up ([`eviction`]) meanwhile.
//!
//! **When it fails.** A read whose chunk cannot be had is tried again until its deadline. A chunk that cannot be written (the disk
//! is full) is handed out all the same, and fetched again by the next who wants it. After a failed fsync nobody knows what the
//! file holds: nothing is read from it any more ([`Cold::distrust`]).

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::{FutureExt, StreamExt, TryStreamExt, future};
use parking_lot::{Mutex, RwLock};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::LayerError;
use super::allowance::Allowance;
use super::fill::{FillProgress, Supply};
use super::gate::{Gate, Turn, Urgency};
use super::presence::{Earlier, Presence};
use crate::chunk::{ChunkId, ChunkRef};
use crate::content::index::LayerIndex;
use crate::sys::blocking;

mod ahead;
pub mod eviction;
mod landing;
mod verify;

use ahead::Ahead;
use landing::{Bits, Way, Writing};

/// How many chunks of one layer are on their way at once: 32 of half a MiB keep a link of 1 Gbit/s and 40 ms busy.
const AT_ONCE: usize = 32;
/// The same of a far store: most of them are on the way.
const FAR_AT_ONCE: usize = 64;
/// A fill that takes longer is looked at again as a whole when it is done.
const SEEN_LATELY: Duration = Duration::from_secs(30);
/// How long a read waits for a store that does not give its chunk.
const DEADLINE: Duration = Duration::from_secs(60);
/// How long one waits for a chunk that the store says it does not have, or has wrong.
const HOPELESS: Duration = Duration::from_secs(5);
/// How long a failed fetch waits before it is tried again; doubled each time, up to the second.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// See the module's page.
#[derive(Debug)]
pub struct Cold {
    serial: u64,
    index: Arc<LayerIndex>,
    file: Arc<File>,
    path: PathBuf,
    /// `None` for one that is complete.
    presence: Option<Presence>,
    earlier: Earlier,
    /// Checked, not in the file yet.
    memory: Mutex<HashMap<usize, Bytes>>,
    ahead: Mutex<Ahead>,
    /// Those that a trace has fetched: whoever reads one of them is expected to go the trace's way, and not forward.
    foretold: Bits,
    moved: Notify,
    supply: Supply,
    gate: Arc<Gate>,
    full: AtomicBool,
    /// Bytes that the kernel was not told to write to the disk yet.
    unwritten: AtomicU64,
    allowance: Arc<Allowance>,
    /// Taken for writing by whoever gives chunks up.
    reading: RwLock<()>,
    /// Those that were read of late.
    seen: Bits,
    /// Those that the disk was seen to have; not worth anything once they were given up.
    on_disk: Bits,
    last_read: AtomicU64,
    /// The chunks of data, and which of them is looked at next when some are given up.
    data: Range<usize>,
    hand: AtomicUsize,
    holds: AtomicUsize,
    distrusted: AtomicBool,
    /// How far it is.
    pub progress: FillProgress,
}

/// What every layer image is filled with, and what they share.
#[derive(Debug, Clone)]
pub struct Means {
    /// What chunks are had from.
    pub supply: Supply,
    /// Who may fetch when.
    pub gate: Arc<Gate>,
    /// What they may take.
    pub allowance: Arc<Allowance>,
}

impl Cold {
    /// The layer image of this serial, as far as it is here. Blocking.
    pub fn open(serial: u64, index: Arc<LayerIndex>, means: Means) -> Result<Cold, LayerError> {
        match means.supply.layers.read(serial) {
            Ok(file) => Ok(Cold::with(serial, index, means, file, None)),
            Err(_) => {
                let file = means.supply.layers.reopen(serial)?;
                Cold::filling(serial, index, means, file)
            }
        }
    }

    /// A new one without anything in it, whether it is complete or not. Blocking.
    pub fn begin(serial: u64, index: Arc<LayerIndex>, means: Means) -> Result<Cold, LayerError> {
        let file = means.supply.layers.create(serial)?;
        Cold::filling(serial, index, means, file)
    }

    fn filling(serial: u64, index: Arc<LayerIndex>, means: Means, file: File) -> Result<Cold, LayerError> {
        let store = Arc::clone(&means.supply.layers);
        let path = store.image(serial);
        let io = |error| LayerError::at(&path, error);
        let size = index.facts().layout.size;
        let is_new = file.metadata().map_err(io)?.len() != size;
        if is_new {
            store.remove_map(serial)?;
            file.set_len(size).map_err(io)?;
        }
        let (presence, earlier) = store.presence(serial, &index)?;
        let earlier = if is_new { Earlier::Believed } else { earlier };
        Ok(Cold::with(serial, index, means, file, Some((presence, earlier))))
    }

    fn with(
        serial: u64,
        index: Arc<LayerIndex>,
        means: Means,
        file: File,
        presence: Option<(Presence, Earlier)>,
    ) -> Cold {
        let Means { supply, gate, allowance } = means;
        let (presence, earlier) =
            presence.map_or((None, Earlier::Believed), |(map, earlier)| (Some(map), earlier));
        let chunks = index.chunks().len();
        let data = 1..index.metadata_places().nth(1).unwrap_or(chunks).max(1);
        let cold = Cold {
            serial,
            index,
            file: Arc::new(file),
            path: supply.layers.image(serial),
            presence,
            earlier,
            memory: Mutex::default(),
            ahead: Mutex::default(),
            foretold: Bits::new(chunks),
            moved: Notify::new(),
            supply,
            gate,
            full: AtomicBool::new(false),
            unwritten: AtomicU64::new(0),
            allowance,
            reading: RwLock::new(()),
            seen: Bits::new(chunks),
            on_disk: Bits::new(chunks),
            last_read: AtomicU64::new(clock()),
            data,
            hand: AtomicUsize::new(0),
            holds: AtomicUsize::new(0),
            distrusted: AtomicBool::new(false),
            progress: FillProgress::default(),
        };
        let kept = (0..chunks).filter(|at| cold.has(*at));
        let kept: u64 = kept.map(|at| u64::from(cold.index.chunk(at).1.length)).sum();
        cold.progress.kept.store(kept, Ordering::Relaxed);
        cold
    }

    /// Its serial.
    pub fn serial(&self) -> u64 {
        self.serial
    }

    /// Somebody is going to read it before it is all here.
    pub fn expect_readers(&self) {
        self.gate.expect_readers();
    }

    /// Its layer index.
    pub fn index(&self) -> &LayerIndex {
        &self.index
    }

    /// The file of it.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Whether all of it is in the file.
    pub fn is_complete(&self) -> bool {
        self.presence.as_ref().is_none_or(Presence::is_complete)
    }

    fn has(&self, at: usize) -> bool {
        !self.is_distrusted() && self.presence.as_ref().is_none_or(|presence| presence.has(at))
    }

    /// Nobody knows any more what its file holds: an fsync failed. Nothing is read from it from now on, nor written to it.
    pub fn distrust(&self) {
        self.distrusted.store(true, Ordering::Release);
        (0..self.index.chunks().len()).for_each(|at| self.doubt(at));
    }

    /// Whether that has happened.
    pub fn is_distrusted(&self) -> bool {
        self.distrusted.load(Ordering::Acquire)
    }

    /// How many bytes are not here.
    pub fn missing(&self) -> u64 {
        let missing = (0..self.index.chunks().len()).filter(|at| !self.has(*at));
        missing.map(|at| u64::from(self.index.chunk(at).1.length)).sum()
    }

    /// The bytes of a range if nothing of it need be fetched. Blocking.
    pub fn read_now(&self, range: Range<u64>) -> Option<Vec<Bytes>> {
        let chunks = self.index.covering(&range);
        self.mark_read(chunks.clone());
        let memory = self.memory.lock();
        let mut held = HashMap::new();
        for at in chunks.clone() {
            if !self.has(at) {
                held.insert(at, memory.get(&at)?.clone());
            }
        }
        drop(memory);
        self.follow(&chunks, true);
        self.assemble(&range, &held).ok().flatten()
    }

    /// The bytes of a range, wherever they are now.
    pub async fn read(self: &Arc<Self>, range: Range<u64>) -> Result<Vec<Bytes>, LayerError> {
        let chunks = self.index.covering(&range);
        let demand = self.gate.demand();
        self.follow(&chunks, false);
        self.mark_read(chunks.clone());
        let began = Instant::now();
        let until = began + DEADLINE;
        let mut held: HashMap<usize, Bytes> = HashMap::new();
        loop {
            let wanted = chunks.clone().filter(|at| !held.contains_key(at)).map(|at| async move {
                let bytes = self.chunk_until(at, until).await?;
                Ok::<_, LayerError>(bytes.map(|bytes| (at, bytes)))
            });
            let got = future::try_join_all(wanted).await?;
            held.extend(got.into_iter().flatten());
            // What is in the file was written a moment ago, or is read ahead: not worth another thread.
            let assembled =
                self.assemble(&range, &held).map_err(|error| LayerError::at(&self.path, error))?;
            if let Some(pieces) = assembled {
                drop(demand);
                tracing::debug!(serial = self.serial, ?range, ?chunks, waited = ?began.elapsed(), "a read waited");
                return Ok(pieces);
            }
        }
    }

    /// Puts a range together from the file and from what is not in it yet; `None` if a chunk was given up meanwhile. Between the
    /// chunks the file is a hole, which reads as the zeros that are meant.
    fn assemble(
        &self,
        range: &Range<u64>,
        held: &HashMap<usize, Bytes>,
    ) -> std::io::Result<Option<Vec<Bytes>>> {
        let _nothing_is_given_up = self.reading.read();
        if !self.index.covering(range).all(|at| held.contains_key(&at) || self.has(at)) {
            return Ok(None);
        }
        let mut pieces = Vec::new();
        let mut done = range.start;
        for at in self.index.covering(range) {
            let Some(bytes) = held.get(&at) else { continue };
            let (offset, chunk) = self.index.chunk(at);
            let end = (offset + u64::from(chunk.length)).min(range.end);
            let begin = offset.max(range.start);
            self.read_file(done..begin, &mut pieces)?;
            let within = |position: u64| usize::try_from(position - offset).map_err(std::io::Error::other);
            pieces.push(bytes.slice(within(begin)?..within(end)?));
            done = end;
        }
        self.read_file(done..range.end, &mut pieces)?;
        Ok(Some(pieces))
    }

    fn read_file(&self, range: Range<u64>, pieces: &mut Vec<Bytes>) -> std::io::Result<()> {
        if !range.is_empty() {
            let length = usize::try_from(range.end - range.start).map_err(std::io::Error::other)?;
            let mut bytes = vec![0; length];
            // Only what lies between chunks is asked for then.
            if !self.is_distrusted() {
                self.file.read_exact_at(&mut bytes, range.start)?;
            }
            pieces.push(bytes.into());
        }
        Ok(())
    }

    async fn chunk_until(self: &Arc<Self>, at: usize, until: Instant) -> Result<Option<Bytes>, LayerError> {
        let (mut pause, longest) = PAUSES;
        let began = Instant::now();
        loop {
            let error =
                match tokio::time::timeout_at(until, self.chunk(at, Urgency::Demand, &Way::Cached)).await {
                    Ok(Ok((bytes, _))) => return Ok(bytes),
                    Ok(Err(error)) => error,
                    Err(_) => self.unavailable(crate::content::ContentError::TooLate),
                };
            let until = if error.is_outage() { until } else { until.min(began + HOPELESS) };
            if Instant::now() + pause >= until {
                tracing::error!(serial = self.serial, %error, "a read of a layer fails: its data cannot be had");
                return Err(error);
            }
            tracing::warn!(serial = self.serial, %error, "a read of a layer waits for its data; trying again");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(longest);
        }
    }

    /// Of a far store.
    fn distance(&self) -> Option<Duration> {
        let content = &self.supply.content;
        content.is_far().then(|| content.distance())
    }

    fn unavailable(&self, source: crate::content::ContentError) -> LayerError {
        LayerError::Chunk { layer: self.index.facts().diff_id.to_string(), source }
    }

    /// Makes a chunk present: its bytes if they are not in the file yet, and what writes them there.
    async fn chunk(
        self: &Arc<Self>,
        at: usize,
        urgency: Urgency,
        way: &Way,
    ) -> Result<(Option<Bytes>, Option<Writing>), LayerError> {
        if self.has(at) {
            return Ok((None, None));
        }
        if let Some(bytes) = self.memory.lock().get(&at) {
            return Ok((Some(bytes.clone()), None));
        }
        let (offset, chunk) = self.index.chunk(at);
        if self.earlier == Earlier::Doubted && self.is_in_file(at, offset, chunk).await {
            return Ok((None, None));
        }
        let room = self.gate.room(chunk.length, urgency, self.distance().is_some()).await;
        let got = self.supply.get(chunk).await;
        let (bytes, supplier) = got.map_err(|source| self.unavailable(source))?;
        Ok((Some(bytes.clone()), self.keep(at, (bytes, supplier), way.clone(), room)))
    }

    /// Whether the file has the right bytes of a chunk after all; it is present then.
    async fn is_in_file(self: &Arc<Self>, at: usize, offset: u64, chunk: ChunkRef) -> bool {
        let this = Arc::clone(self);
        let hash = move || {
            let _nothing_is_given_up = this.reading.read();
            let mut bytes = vec![0; usize::try_from(chunk.length).unwrap_or(0)];
            this.file.read_exact_at(&mut bytes, offset)?;
            let is_it = !this.is_distrusted() && ChunkId::of(&bytes) == chunk.id;
            if is_it {
                this.count(at, &this.progress.kept);
            }
            Ok::<_, std::io::Error>(is_it)
        };
        blocking(hash).await.unwrap_or(false)
    }

    /// The chunk is in the file now.
    fn count(&self, at: usize, counter: &AtomicU64) {
        let trusted = self.presence.as_ref().filter(|_| !self.is_distrusted());
        if trusted.is_some_and(|presence| presence.set(at)) {
            counter.fetch_add(u64::from(self.index.chunk(at).1.length), Ordering::Relaxed);
            if self.is_complete() {
                // Whoever fills it may be waiting for a turn that nobody needs any more.
                self.moved.notify_waiters();
            }
        }
    }

    /// Makes these chunks present, because somebody waits for all of them; returns when they are in the file. Not synced.
    pub async fn fetch(self: &Arc<Self>, chunks: impl IntoIterator<Item = usize>) -> Result<(), LayerError> {
        let _all_is_kept = self.hold();
        let missing: Vec<usize> = chunks.into_iter().filter(|at| !self.has(*at)).collect();
        futures::stream::iter(missing)
            // Boxed: the compiler cannot tell otherwise that the whole may move between threads.
            .map(|at| self.make_present(at, Urgency::Demand, &Way::Cached).boxed())
            .buffer_unordered(AT_ONCE)
            .try_for_each(|_| future::ready(Ok(())))
            .await
    }

    /// These chunks are going to be prefetched. Until that is over, which [`Cold::nothing_is_foretold`] tells, a read of one of them that is
    /// not here yet has nothing else fetched ahead: on a thin link that would take the place of what is foretold.
    pub fn foretell(&self, at: usize) {
        self.foretold.set(at);
    }

    /// Readers are on their own again.
    pub fn nothing_is_foretold(&self) {
        self.foretold.clear_all();
    }

    /// Has a chunk ready for readers that will want it; how many bytes of it were not here. Whoever reads goes first.
    pub async fn prefetch(self: &Arc<Self>, at: usize) -> Result<u32, LayerError> {
        if self.memory.lock().contains_key(&at) {
            return Ok(0);
        }
        let (bytes, _) = self.chunk(at, Urgency::Ahead, &Way::Cached).await?;
        Ok(if bytes.is_some() { self.index.chunk(at).1.length } else { 0 })
    }

    /// Makes all chunks present, those before readers first; returns when they are in the file. Not synced.
    pub async fn fill(self: &Arc<Self>) -> Result<(), LayerError> {
        let _all_is_kept = self.hold();
        let claims = Claims::default();
        let (began, past) = (Instant::now(), self.way_past().await);
        let worker = |_| async {
            loop {
                // Before looking: what is expected from then on wakes it.
                let moved = self.moved.notified();
                let (at, turn, way) = match self.claim(&claims, true) {
                    Some(at) => (at, self.gate.next().await, &Way::Cached),
                    None if self.is_claimed(&claims) => return Ok(()),
                    None => tokio::select! {
                        () = moved => continue,
                        taken = self.take_rest(&claims, began) => match taken {
                            (turn, Some(at)) => (at, turn, &past),
                            (_, None) => continue,
                        },
                    },
                };
                let made = self.make_present(at, Urgency::Ahead, way).await;
                claims.claimed.lock().remove(&at);
                if let Made::Found = made? {
                    self.gate.give_back(&turn);
                }
            }
        };
        let at_once = if self.distance().is_some() { FAR_AT_ONCE } else { AT_ONCE };
        let workers = (0..at_once.min(self.index.chunks().len())).map(|number| worker(number).boxed());
        let filled: Result<Vec<()>, LayerError> = future::try_join_all(workers).await;
        filled?;
        if began.elapsed() > SEEN_LATELY {
            self.on_disk.clear_all();
        }
        Ok(())
    }

    /// The next chunk that nobody is known to want, when it is its turn.
    async fn take_rest(&self, claims: &Claims, began: Instant) -> (Turn<'_>, Option<usize>) {
        // One of a fill is enough to wait for the rate.
        let _alone = if self.gate.is_paced() { Some(claims.paced.lock().await) } else { None };
        let take = || match self.claim(claims, false) {
            // What another layer has costs the network nothing.
            Some(at) if self.supply.local.contains(&self.index.chunk(at).1.id) => (Some(at), 0),
            Some(at) => (Some(at), self.index.chunk(at).1.length),
            None => (None, 0),
        };
        self.gate.paced_rest(self.serial, began, self.distance(), take).await
    }

    /// What a reader will want next is fetched before the rest.
    fn follow(&self, read: &Range<usize>, was_here: bool) {
        let is_foretold = || read.clone().all(|at| self.foretold.has(at));
        if self.is_complete() || !was_here && is_foretold() {
            return;
        }
        let goes_on = || read.start == 0 || self.has(read.start - 1);
        if self.ahead.lock().read(read, self.index.chunks().len(), was_here, goes_on) {
            self.moved.notify_waiters();
        }
    }

    /// The next chunk that is not here and that nobody else fills: one that a reader will want, or else, unless `only_next`, any.
    fn claim(&self, claims: &Claims, only_next: bool) -> Option<usize> {
        let count = self.index.chunks().len();
        let mut claimed = claims.claimed.lock();
        let free = |at: &usize| !self.has(*at) && !claimed.contains(at);
        let next = self.ahead.lock().expected().find(free);
        let at = next.or_else(|| {
            let first =
                (claims.from.load(Ordering::Relaxed)..count).find(|at| !self.has(*at)).unwrap_or(count);
            claims.from.store(first, Ordering::Relaxed);
            if only_next { None } else { (first..count).find(free) }
        })?;
        claimed.insert(at);
        Some(at)
    }

    /// Whether there is nothing to fill that nobody fills.
    fn is_claimed(&self, claims: &Claims) -> bool {
        let claimed = claims.claimed.lock();
        let from = claims.from.load(Ordering::Relaxed);
        (from..self.index.chunks().len()).all(|at| self.has(at) || claimed.contains(&at))
    }

    async fn make_present(
        self: &Arc<Self>,
        at: usize,
        urgency: Urgency,
        way: &Way,
    ) -> Result<Made, LayerError> {
        loop {
            match self.chunk(at, urgency, way).await? {
                (None, _) => return Ok(Made::Found),
                (Some(_), Some(writing)) => {
                    let gone = |error: tokio::task::JoinError| LayerError::at(&self.path, error.into());
                    writing.await.map_err(gone)??;
                    return Ok(Made::Fetched);
                }
                // Somebody else writes it.
                (Some(_), None) => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        }
    }
}

/// How a chunk has become present.
enum Made {
    /// It was in the file, or somebody else has fetched it.
    Found,
    /// By us.
    Fetched,
}

/// What the workers of one fill have taken on.
#[derive(Default)]
struct Claims {
    claimed: Mutex<HashSet<usize>>,
    /// Before this one everything is here.
    from: AtomicUsize,
    /// Held by the one that waits for the rate.
    paced: tokio::sync::Mutex<()>,
}

/// Milliseconds since this process asked first.
fn clock() -> u64 {
    static BEGAN: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
    u64::try_from(BEGAN.get_or_init(std::time::Instant::now).elapsed().as_millis()).unwrap_or(u64::MAX)
}
