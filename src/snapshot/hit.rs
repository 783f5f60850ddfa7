//! Remote hits: a layer that need not be pulled, because the store has it.
//!
//! **Where.** Called by `snapshotter` for a Prepare with a ref; calls [`crate::content`] for what the store says and `layers` for
//! what this node has.
//!
//! **Invariants.** containerd holds a lock during Prepare that its collector waits for, so nothing is awaited here but the ref,
//! the index and the metadata, within a deadline; data is fetched in the background and awaited in Mounts. A hit is answered
//! only if no chunk is found to be missing, of some that are asked for. Every failure is a miss: the layer is then pulled as with any
//! snapshotter.
//!
//! **When it fails.** After a deadline that passed, the store is left alone for a while, so that an ordinary pull is delayed by one
//! time-out, not by one for each layer.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use futures::future;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::Instant;

use self::foreseen::Foreseen;
use super::layers::Layers;
use super::metastore::{LayerChoice, LayerRecord, MetaStore, NewLayer, Origin, Progress, Record};
use super::stock::blocking;
use super::{SnapshotError, Timestamp};
use crate::chunk::ChunkId;
use crate::content::index::LayerIndex;
use crate::content::{ContentError, ContentStore, Lookup};
use crate::driver::Id;
use crate::image::check;
use crate::layer::LayerError;
use crate::oci::ChainId;

pub(super) mod foreseen;

/// Layers with less data than this are fetched whole before they are answered.
const SMALL: u64 = 4 * 1024 * 1024;
/// How long the store is left alone after a deadline has passed.
const REST: Duration = Duration::from_secs(30);
/// How long it may take to make a volume of a layer.
const WHOLE: Duration = Duration::from_secs(60);
/// How long a Prepare may still take once containerd's collector waits for it.
const HURRY: Duration = Duration::from_millis(600);

/// What a lookup can come to, in one word.
const OUTCOMES: [&str; 14] = [
    "hit",
    "hit_local",
    "missing",
    "late",
    "resting",
    "hurried",
    "detached",
    "broken",
    "other_index",
    "untrusted",
    "incomplete",
    "damaged",
    "store",
    "node",
];

/// How many answers are remembered.
const ANSWERS: usize = 4096;

/// Why a layer of the store is not used.
#[derive(Debug, thiserror::Error)]
pub(super) enum HitError {
    #[error(transparent)]
    Content(#[from] ContentError),
    #[error(transparent)]
    Layer(#[from] LayerError),
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    #[error("its metadata is not what a layer image may have: {0}")]
    Metadata(#[from] check::CheckError),
    #[error("{missing} of its chunks are not in the store, {first} among them")]
    Incomplete { missing: usize, first: ChunkId },
    #[error("its ref is signed by {0} only, which this node does not trust; to trust it: {1}")]
    Untrusted(String, String),
    #[error("the store did not answer within {0:?}")]
    Late(Duration),
    #[error("the store was late a moment ago and is left alone for a while")]
    Resting,
    #[error("its data could not be fetched not long ago")]
    Broken,
    #[error(
        "this node has the layer by another publisher's index; it can be taken when that is unused and gone"
    )]
    OtherIndex,
    #[error("this node has no room for its {0} bytes while a volume is made of them")]
    NoRoom(u64),
    #[error("it was asked for without the layers below it")]
    Detached,
    #[error("containerd wants to collect: no more time for the store")]
    Hurried,
}

impl HitError {
    /// One word for it, of [`OUTCOMES`].
    fn kind(&self) -> &'static str {
        match self {
            HitError::Late(_) | HitError::Content(ContentError::TooLate) => "late",
            HitError::Resting => "resting",
            HitError::Hurried => "hurried",
            HitError::Detached => "detached",
            HitError::Broken => "broken",
            HitError::OtherIndex => "other_index",
            HitError::Untrusted(..) => "untrusted",
            HitError::Incomplete { .. } => "incomplete",
            HitError::Metadata(_)
            | HitError::Content(
                ContentError::Ref { .. }
                | ContentError::MissingIndex { .. }
                | ContentError::DamagedIndex { .. }
                | ContentError::Index(_),
            ) => "damaged",
            HitError::Content(_) => "store",
            HitError::Layer(LayerError::Chunk { .. }) => "store",
            HitError::Layer(_) | HitError::Snapshot(_) | HitError::NoRoom(_) => "node",
        }
    }

    /// Whether the next layer had better not ask: the time is over, or nobody answers.
    fn is_outage(&self) -> bool {
        match self {
            HitError::Late(_) => true,
            HitError::Content(error) | HitError::Layer(LayerError::Chunk { source: error, .. }) => {
                error.is_outage()
            }
            _ => false,
        }
    }
}

/// Looks layers up in the store.
#[derive(Debug)]
pub(super) struct Hits {
    meta: Arc<MetaStore>,
    layers: Arc<Layers>,
    content: Arc<ContentStore>,
    deadline: Duration,
    rest_until: Mutex<Option<Instant>>,
    hurry: watch::Sender<Option<Instant>>,
    answers: Mutex<Answers>,
    /// How many lookups came to what.
    lookups: Mutex<BTreeMap<&'static str, u64>>,
    foreseen: Foreseen,
}

/// What came of the last lookups, for people who ask why a layer was pulled.
#[derive(Debug, Default)]
struct Answers {
    by_chain: HashMap<ChainId, String>,
    order: VecDeque<ChainId>,
}

impl Answers {
    fn keep(&mut self, chain: &ChainId, answer: String) {
        if self.by_chain.insert(chain.clone(), answer).is_none() {
            self.order.push_back(chain.clone());
        }
        if self.order.len() > ANSWERS
            && let Some(oldest) = self.order.pop_front()
        {
            self.by_chain.remove(&oldest);
        }
    }
}

/// A layer image that holds a requested layer; to be recorded with the snapshot that uses it.
#[derive(Debug)]
pub(super) struct Hit {
    pub(super) layer: LayerChoice,
    /// An Id that was reserved for it, to be given up if the record does not come to be.
    pub(super) reserved: Option<Id>,
}

impl Hits {
    pub(super) fn new(
        meta: Arc<MetaStore>,
        layers: Arc<Layers>,
        content: Arc<ContentStore>,
        deadline: Duration,
    ) -> Hits {
        let (rest_until, hurry, answers) = (Mutex::default(), watch::Sender::new(None), Mutex::default());
        let lookups = Mutex::new(OUTCOMES.map(|outcome| (outcome, 0)).into());
        let foreseen = Foreseen::default();
        Hits { meta, layers, content, deadline, rest_until, hurry, answers, lookups, foreseen }
    }

    /// containerd is about to collect: who waits for the store gives up soon, so that the collector, and everybody behind it,
    /// does not wait for them.
    pub(super) fn hurry(&self) {
        self.hurry.send_replace(Some(Instant::now()));
    }

    /// Ends when whoever began then has no more time, because containerd's collector waits for it.
    pub(super) async fn hurried(&self, began: Instant) {
        let mut hurry = self.hurry.subscribe();
        // Also for one that began when the news was just there: the collector may still be waiting. It has the same time as others.
        let soon = |told: &Option<Instant>| told.is_some_and(|told| began < told + HURRY);
        let told = hurry.wait_for(soon).await.map_or(None, |told| *told);
        tokio::time::sleep_until(told.map_or(began, |told| told.max(began)) + HURRY).await;
    }

    /// What came of the last lookup of this chain.
    pub(super) fn answer(&self, chain: &ChainId) -> Option<String> {
        self.answers.lock().by_chain.get(chain).cloned()
    }

    /// The layer image that makes `chain` when put on the layers below it, from the store; `None` if the store does not have it.
    ///
    /// `first` says that nothing lies below it. A client that unpacks in parallel and does not say so (containerd 2.2 and older)
    /// asks like this for every layer; one that is not the first of its chain is no hit then.
    pub(super) async fn find(&self, chain: &ChainId, first: bool) -> Result<Option<Hit>, HitError> {
        let found = match self.foreseen(chain, first).await {
            Some(found) => found,
            None => self.find_in_time(chain, first, true).await,
        };
        let answer = match &found {
            Ok(Some(Hit { reserved: Some(_), .. })) => "found in the store".to_owned(),
            Ok(Some(_)) => "found in the store, and already on this node".to_owned(),
            Ok(None) => "not in the store when it was pulled".to_owned(),
            Err(error) => error.to_string(),
        };
        self.answers.lock().keep(chain, answer);
        let outcome = match &found {
            Ok(Some(Hit { reserved: Some(_), .. })) => "hit",
            Ok(Some(_)) => "hit_local",
            Ok(None) => "missing",
            Err(error) => error.kind(),
        };
        *self.lookups.lock().entry(outcome).or_default() += 1;
        found
    }

    /// How many layers that were asked for had been looked up before, since the daemon started.
    pub(super) fn foreseen_used(&self) -> u64 {
        self.foreseen.used()
    }

    /// Ends what was begun for layers that are going to be asked for.
    pub(super) async fn end(&self) {
        self.foreseen.end().await;
    }

    /// How many lookups came to what since the daemon started.
    pub(super) fn lookups(&self) -> Vec<(&'static str, u64)> {
        self.lookups.lock().iter().map(|(outcome, count)| (*outcome, *count)).collect()
    }

    /// `waited_for` says that a call of containerd's waits: others leave nobody with the news that the store is late.
    async fn find_in_time(
        &self,
        chain: &ChainId,
        first: bool,
        waited_for: bool,
    ) -> Result<Option<Hit>, HitError> {
        if self.is_resting() {
            return Err(HitError::Resting);
        }
        let (reserved, began) = (Mutex::new(None), Instant::now());
        let found = tokio::select! {
            found = self.look_up(chain, first, &reserved) => found,
            () = tokio::time::sleep(self.deadline) => Err(HitError::Late(self.deadline)),
            () = self.hurried(began) => Err(HitError::Hurried),
        };
        if waited_for && found.as_ref().is_err_and(HitError::is_outage) {
            self.rest();
        }
        let unused = reserved.lock().take();
        if let (Err(_), Some(id)) = (&found, unused) {
            self.meta.give_up(id).await;
        }
        found
    }

    fn is_resting(&self) -> bool {
        self.rest_until.lock().is_some_and(|until| Instant::now() < until)
    }

    fn rest(&self) {
        *self.rest_until.lock() = Some(Instant::now() + REST);
    }

    async fn look_up(
        &self,
        chain: &ChainId,
        first: bool,
        reserved: &Mutex<Option<Id>>,
    ) -> Result<Option<Hit>, HitError> {
        let found = match self.content.lookup(chain, Instant::now() + self.deadline).await? {
            Lookup::Found(found) => found,
            Lookup::Missing => return Ok(None),
            Lookup::Refused { keys } => {
                let names = keys.iter().map(ToString::to_string).collect::<Vec<_>>();
                let line = format!("trust.keys = {names:?}");
                return Err(HitError::Untrusted(names.join(", "), line));
            }
        };
        let (index, digest) = (found.index, *found.digest.as_bytes());
        if first && index.facts().diff_id.0 != chain.0 {
            return Err(HitError::Detached);
        }
        if self.layers.is_broken(&digest) {
            return Err(HitError::Broken);
        }
        for origin in [Origin::Applied, Origin::Fetched] {
            if let Some(layer) = self.meta.layer_of(index.facts(), origin)
                && self.is_usable(&layer, digest)
            {
                return Ok(Some(Hit { layer: LayerChoice::Known(layer.id), reserved: None }));
            }
        }
        // One record for a layer: whoever uses it gets what was checked under its index.
        let other =
            self.meta.layer_of(index.facts(), Origin::Fetched).filter(|layer| layer.index != Some(digest));
        if other.is_some() {
            return Err(HitError::OtherIndex);
        }
        let ids = self.meta.reserve(1).await?;
        let Some(id) = ids.first().copied() else { return Err(SnapshotError::ShuttingDown.into()) };
        *reserved.lock() = Some(id);
        self.fetch_metadata(id, &index).await?;
        let layer = LayerChoice::New(NewLayer {
            id,
            facts: index.facts().clone(),
            origin: Origin::Fetched,
            progress: Progress::Filling,
            blob: None,
            index: Some(digest),
            now: Timestamp::now(),
        });
        Ok(Some(Hit { layer, reserved: Some(id) }))
    }

    /// What was fetched under another index with the same diff ID is not what this publisher vouches for.
    fn is_usable(&self, layer: &LayerRecord, digest: [u8; 32]) -> bool {
        let same = layer.origin == Origin::Applied || layer.index == Some(digest);
        same && self.is_here(layer)
    }

    /// Whether this node has its image, or is getting it.
    fn is_here(&self, layer: &LayerRecord) -> bool {
        layer.progress == Progress::Filling || self.layers.store.is_complete(layer.id.serial)
    }

    async fn fetch_metadata(&self, id: Id, index: &Arc<LayerIndex>) -> Result<(), HitError> {
        let Some(layers) = self.layers.cold().cloned() else {
            return Err(SnapshotError::ShuttingDown.into());
        };
        let (store, serial) = (Arc::clone(&self.layers.store), id.serial);
        let (bytes, opened) = (index.encode(), Arc::clone(index));
        let cold = blocking(move || {
            store.write_index(serial, &bytes)?;
            store.create(serial)?;
            layers.open(serial, || Some(opened))
        })
        .await?;
        let plain: u64 = index.data_chunks().map(|(_, chunk)| u64::from(chunk.length)).sum();
        let metadata = async {
            match plain < SMALL {
                true => cold.fetch(0..index.chunks().len()).await?,
                false => cold.fetch(index.metadata_places()).await?,
            }
            let (file, layout) = (Arc::clone(cold.file()), index.facts().layout.clone());
            blocking(move || Ok::<_, SnapshotError>(check::check(&*file, &layout))).await??;
            Ok(())
        };
        future::try_join(metadata, self.ask_for_some(index, plain)).await.map(drop)
    }

    /// Whether the store has chunks of a layer whose data was not fetched.
    async fn ask_for_some(&self, index: &LayerIndex, plain: u64) -> Result<(), HitError> {
        if plain < SMALL {
            return Ok(());
        }
        let wanted = index.data_chunks().map(|(_, chunk)| chunk);
        let wanted = wanted.filter(|chunk| !self.layers.has_chunk(&chunk.id));
        let missing = self.content.sample(wanted).await?;
        match missing.first() {
            None => Ok(()),
            Some(first) => Err(HitError::Incomplete { missing: missing.len(), first: first.id }),
        }
    }

    /// Waits for what makes a volume of a layer, while a Prepare may.
    pub(super) async fn in_time<T>(
        &self,
        chain: &ChainId,
        work: impl Future<Output = Result<T, HitError>>,
    ) -> Result<T, HitError> {
        let made = tokio::select! {
            made = work => made,
            () = tokio::time::sleep(WHOLE) => Err(HitError::Late(WHOLE)),
            () = self.hurried(Instant::now()) => Err(HitError::Hurried),
        };
        if let Err(error) = &made {
            if error.is_outage() {
                self.rest();
            }
            self.answers.lock().keep(chain, error.to_string());
            *self.lookups.lock().entry(error.kind()).or_default() += 1;
        }
        made
    }

    /// The image of a layer that was found, with all its data, of which each chunk was checked. It is not durable, nor recorded.
    pub(super) async fn fetch_whole(&self, serial: u64) -> Result<Arc<File>, HitError> {
        let Some(cold) = self.layers.cold().and_then(|cold| cold.get(serial)) else {
            return Err(SnapshotError::ShuttingDown.into());
        };
        let (store, missing) = (Arc::clone(&self.layers.store), cold.missing());
        let space =
            blocking(move || store.space().map_err(|error| LayerError::at(&store.image(serial), error)))
                .await?;
        // A tenth stays free.
        if space.bytes_free.saturating_sub(space.bytes / 10) < missing {
            return Err(HitError::NoRoom(missing));
        }
        cold.fetch(0..cold.index().chunks().len()).await?;
        Ok(Arc::clone(cold.file()))
    }

    /// The image of a layer that was found is not needed any more.
    pub(super) async fn throw_away(&self, hit: Hit) {
        let Some(id) = hit.reserved else { return };
        let layers = Arc::clone(&self.layers);
        if let Err(error) = blocking(move || layers.free(id.serial)).await {
            tracing::warn!(serial = id.serial, %error, "a layer image is freed later");
        }
        self.meta.give_up(id).await;
    }

    /// How recording the snapshot that uses the layer ended: the layer's data is fetched from now on, or its Id given up.
    pub(super) async fn adopted(
        &self,
        hit: Hit,
        record: Result<Arc<Record>, SnapshotError>,
    ) -> Result<Arc<Record>, SnapshotError> {
        // Recorded by somebody else meanwhile, or not at all.
        let used = record.as_ref().ok().and_then(|record| record.layer);
        if let Some(id) = hit.reserved.filter(|id| used != Some(id.serial)) {
            self.meta.give_up(id).await;
        }
        let layer = used.and_then(|serial| self.meta.layer(serial));
        if let Some(layer) = layer.filter(|layer| layer.progress == Progress::Filling) {
            drop(self.layers.fill(layer.id.serial));
        }
        record
    }
}
