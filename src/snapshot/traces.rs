//! Learned traces: what starts of an image read is recorded by the nodes that start it first, and fetched first by all others.
//!
//! **Where.** Told by `snapshotter` when the layers of an image are found and when a snapshot is made on them; calls
//! [`crate::content`] for the traces of others, [`crate::layer`] to see reads and to have chunks fetched, and `layers`.
//!
//! **Words.** An image is known by the *chain* of its uppermost layer. A *start* is a snapshot that somebody makes on it and is not
//! going to commit as one of its layers.
//!
//! **Invariants.**
//! * Nobody waits for anything here: without traces everything is as it is with them, but later.
//! * A trace is used only to choose the order in which chunks of the image's own layers are fetched; what it says of others, or of
//!   chunks that there are not, is passed over.
//! * A layer is kept from being native only while a start is being recorded: a minute at most.
//!
//! **When it fails.** A trace that was not written is written by the next node that starts the image. What was being recorded when the
//! daemon ends is lost.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::time::Instant;

use super::layers::Layers;
use super::locks::KeyedLocks;
use super::metastore::{LayerRecord, MetaStore, Record};
use super::remote;
use super::report::TraceState;
use super::{Key, Kind};
use crate::content::index::IndexDigest;
use crate::content::trace::{self, MOST_STEPS, Step, Trace};
use crate::content::{ContentError, ContentStore};
use crate::layer::cold::Cold;
use crate::layer::gate::Window;
use crate::layer::lazy::ColdLayers;
use crate::layer::lazy::touches::Watch;
use crate::layer::work::Work;
use crate::object::ObjectError;
use crate::oci::ChainId;

/// So many traces of an image are enough: starts of one image differ little.
const ENOUGH: usize = 3;
/// How long the store is asked for traces, and how long its answer is good for.
const ASKED: Duration = Duration::from_secs(5);
const FRESH: Duration = Duration::from_secs(60);
/// How long after a layer was found the next one above it is asked for, if it is not the image's uppermost.
const SETTLED: Duration = Duration::from_millis(100);
/// How soon it mostly is: the store need not be asked for the traces of a layer that has one above it.
const NEXT_LAYER: Duration = Duration::from_millis(20);
/// How many chunks are fetched at once, at least, to begin with and at most: less than the store is asked for at once, so that readers
/// find a place, and than [`ColdLayers`] have room for; and the same of a far store.
const AT_ONCE: (usize, usize, usize) = (8, 16, 48);
const FAR_AT_ONCE: (usize, usize, usize) = (8, 96, 144);
/// A fill of what was prefetched stands back until nobody has read for so long, and no longer than that.
const QUIET: Duration = Duration::from_secs(2);
const MOST_HELD: Duration = Duration::from_secs(30);
/// A start is over when nothing new was read for so long, and at the latest after that.
const OVER: Duration = Duration::from_secs(10);
const MOST_RECORDED: Duration = Duration::from_secs(60);
/// How often it is looked whether it is.
const LOOK: Duration = Duration::from_millis(200);
/// How many images are remembered.
const MOST_IMAGES: usize = 256;

/// See the module's page.
#[derive(Debug)]
pub struct Traces {
    meta: Arc<MetaStore>,
    layers: Arc<Layers>,
    cold: Arc<ColdLayers>,
    content: Arc<ContentStore>,
    images: Mutex<HashMap<ChainId, Image>>,
    asking: KeyedLocks<ChainId>,
    /// Whether the store does not let this node write.
    denied: AtomicBool,
    counts: Counts,
    work: Work,
}

/// What is going on with an image.
#[derive(Debug, Clone)]
struct Image {
    used: Instant,
    /// When a layer on top of it was asked for.
    below_another: Option<Instant>,
    /// When it was learned that this is the uppermost layer of an image that is being pulled.
    expected: Option<Instant>,
    known: Option<Arc<Known>>,
    prefetching: bool,
    starting: bool,
    /// Whether a container, not only a view, was made on it since the start began.
    is_run: bool,
    /// For people.
    said: String,
}

/// What the store knows of an image.
#[derive(Debug)]
struct Known {
    at: Instant,
    trace: Trace,
    /// How many traces tell of each layer.
    by_layer: HashMap<IndexDigest, usize>,
    starts: usize,
    own: Option<Trace>,
}

#[derive(Debug, Default)]
struct Counts {
    read: AtomicU64,
    passed_over: AtomicU64,
    written: AtomicU64,
    failed: AtomicU64,
    recording: AtomicUsize,
    chunks: AtomicU64,
    bytes: AtomicU64,
    expected: AtomicU64,
    used: AtomicU64,
}

impl Traces {
    /// Nothing happens yet. `None` where layers are not read lazily: nothing can be seen of starts there, and nothing gained.
    pub fn new(meta: Arc<MetaStore>, layers: Arc<Layers>, content: Arc<ContentStore>) -> Option<Traces> {
        let cold = Arc::clone(layers.lazily()?);
        let (images, asking, denied) = (Mutex::default(), KeyedLocks::default(), AtomicBool::new(false));
        let (counts, work) = (Counts::default(), Work::default());
        Some(Traces { meta, layers, cold, content, images, asking, denied, counts, work })
    }

    /// Ends what is under way.
    pub async fn end(&self) {
        self.work.end().await;
    }

    /// A layer on top of this one is asked for: this one is not the uppermost of the image that is being pulled.
    pub(super) fn is_below_another(&self, below: &Key) {
        if let Some(chain) = self.meta.get(below).and_then(|record| chain_of(&record)) {
            self.note(&chain, |image| image.below_another = Some(Instant::now()));
        }
    }

    /// This is the uppermost layer of an image that is being pulled: the store is asked for its starts before the layer is found.
    pub(super) fn expect(self: &Arc<Self>, chain: &ChainId) {
        self.note(chain, |image| image.expected = Some(Instant::now()));
        let (this, chain) = (Arc::clone(self), chain.clone());
        self.spawn(async move { drop(this.ask(&chain).await) });
    }

    /// A layer was found in the store, and this committed snapshot has it. If it turns out to be the uppermost of an image whose starts
    /// are known, they are prepared for.
    pub(super) fn found(self: &Arc<Self>, name: &Key) {
        let began = Instant::now();
        let Some((chain, layers)) = self.image_of(name) else { return };
        let this = Arc::clone(self);
        self.spawn(async move {
            let is_uppermost = || this.note(&chain, |image| image.below_another.is_none_or(|at| at <= began));
            let is_expected = || {
                this.note(&chain, |image| image.expected.is_some_and(|at| began.duration_since(at) < FRESH))
            };
            if !is_expected() {
                tokio::time::sleep(NEXT_LAYER).await;
            }
            if !is_uppermost() {
                return;
            }
            let Some(known) = this.ask(&chain).await else { return };
            if !is_expected() {
                tokio::time::sleep_until(began + SETTLED).await;
            }
            if is_uppermost() {
                this.prefetch(&chain, &layers, &known).await;
            }
        });
    }

    /// Somebody makes a snapshot on this committed one, to look into it or to run it.
    pub(super) fn starting(self: &Arc<Self>, parent: &Key, kind: Kind) {
        let Some((chain, layers)) = self.image_of(parent) else { return };
        let is_first = self.note(&chain, |image| {
            image.is_run |= kind == Kind::Active;
            !std::mem::replace(&mut image.starting, true)
        });
        if !is_first {
            return;
        }
        let serials: Vec<u64> = layers.iter().map(|layer| layer.id.serial).collect();
        let watch = self.cold.touches().watch(serials.clone(), MOST_STEPS);
        // Before it is known whether that is needed: the reads come soon.
        self.layers.watch(&serials);
        let this = Arc::clone(self);
        self.spawn(async move {
            let known = this.ask(&chain).await;
            let is_wanted = known.as_ref().is_some_and(|known| this.is_wanted(known, &layers));
            if !is_wanted {
                this.layers.unwatch(&serials).await;
            }
            if let Some(known) = &known {
                let (later, chain, layers, known) =
                    (Arc::clone(&this), chain.clone(), layers.clone(), Arc::clone(known));
                this.spawn(async move { later.prefetch(&chain, &layers, &known).await });
            }
            this.see_out(&watch, is_wanted).await;
            if is_wanted {
                this.layers.unwatch(&serials).await;
            }
            let is_run = this.note(&chain, |image| {
                image.starting = false;
                std::mem::take(&mut image.is_run)
            });
            let own = known.and_then(|known| {
                this.count_used(&watch, &layers, &known);
                known.own.clone()
            });
            if is_wanted && is_run {
                this.write(&chain, recorded(&layers, &watch.order()), own).await;
            }
        });
    }

    /// What people are told.
    pub fn state(&self, policy: &str) -> TraceState {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counts = &self.counts;
        TraceState {
            policy: policy.to_owned(),
            read: read(&counts.read),
            passed_over: read(&counts.passed_over),
            written: read(&counts.written),
            failed: read(&counts.failed),
            recording: counts.recording.load(Ordering::Relaxed),
            chunks: read(&counts.chunks),
            bytes: read(&counts.bytes),
            expected: read(&counts.expected),
            used: read(&counts.used),
        }
    }

    /// What people are told of an image.
    pub(super) fn explain(&self, chain: &ChainId) -> Option<String> {
        let said = self.images.lock().get(chain)?.said.clone();
        Some(said).filter(|said| !said.is_empty())
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.work.spawn(&Handle::current(), task);
    }

    /// The chain of a committed snapshot, and the layers of it whose reads can be seen, if there are any.
    fn image_of(&self, name: &Key) -> Option<(ChainId, Vec<Arc<LayerRecord>>)> {
        let chain = chain_of(self.meta.get(name)?.as_ref())?;
        let layers = self.layers.seen_of(&self.meta.stack_with(name)?.layers);
        if layers.is_empty() { None } else { Some((chain, layers)) }
    }

    fn note<T>(&self, chain: &ChainId, change: impl FnOnce(&mut Image) -> T) -> T {
        let (mut images, now) = (self.images.lock(), Instant::now());
        if images.len() >= MOST_IMAGES && !images.contains_key(chain) {
            let idle = images.iter().filter(|(_, image)| !image.starting && !image.prefetching);
            if let Some(oldest) = idle.min_by_key(|(_, image)| image.used).map(|(chain, _)| chain.clone()) {
                images.remove(&oldest);
            }
        }
        let image = images.entry(chain.clone()).or_insert_with(|| Image {
            used: now,
            below_another: None,
            expected: None,
            known: None,
            prefetching: false,
            starting: false,
            is_run: false,
            said: String::new(),
        });
        image.used = now;
        change(image)
    }

    /// What the store knows of the image; `None` if that cannot be said.
    async fn ask(&self, chain: &ChainId) -> Option<Arc<Known>> {
        let lock = self.asking.of(chain.clone());
        let _turn = lock.lock().await;
        let known = self.note(chain, |image| image.known.clone());
        if let Some(known) = known.filter(|known| known.at.elapsed() < FRESH) {
            return Some(known);
        }
        let asked = tokio::time::timeout(ASKED, self.content.traces(chain)).await;
        let traces = match asked.unwrap_or(Err(ContentError::TooLate)) {
            Ok(traces) => traces,
            Err(error) => {
                tracing::debug!(%chain, %error, "the traces of an image cannot be read");
                return None;
            }
        };
        let mut by_layer = HashMap::new();
        for digest in traces.traces.iter().flat_map(Trace::layers) {
            *by_layer.entry(*digest).or_default() += 1;
        }
        let known = Arc::new(Known {
            at: Instant::now(),
            trace: trace::merge(&traces.traces),
            by_layer,
            starts: traces.traces.len(),
            own: traces.own,
        });
        self.counts.read.fetch_add(number(traces.traces.len()), Ordering::Relaxed);
        self.counts.passed_over.fetch_add(number(traces.passed_over), Ordering::Relaxed);
        self.note(chain, |image| image.known = Some(Arc::clone(&known)));
        Some(known)
    }

    /// Whether a start on these layers is to be recorded.
    fn is_wanted(&self, known: &Known, layers: &[Arc<LayerRecord>]) -> bool {
        let told = |layer: &Arc<LayerRecord>| {
            digest_of(layer).is_none_or(|digest| {
                known.by_layer.get(&digest).is_some_and(|starts| *starts >= ENOUGH)
                    || known.own.as_ref().is_some_and(|own| own.layers().contains(&digest))
            })
        };
        !layers.iter().all(told) && !self.denied.load(Ordering::Relaxed)
    }

    /// Until the start is over, as far as one can tell.
    async fn see_out(&self, watch: &Watch, is_recorded: bool) {
        let began = Instant::now();
        let recording = usize::from(is_recorded);
        self.counts.recording.fetch_add(recording, Ordering::Relaxed);
        while watch.without_news() < OVER && began.elapsed() < MOST_RECORDED {
            tokio::time::sleep(LOOK).await;
        }
        self.counts.recording.fetch_sub(recording, Ordering::Relaxed);
    }

    /// Has the chunks of the trace fetched, over all layers at once, in its order; the rest is filled when the start is over.
    async fn prefetch(&self, chain: &ChainId, layers: &[Arc<LayerRecord>], known: &Known) {
        if known.trace.steps().is_empty()
            || self.note(chain, |image| std::mem::replace(&mut image.prefetching, true))
        {
            return;
        }
        let mut colds: HashMap<IndexDigest, Arc<Cold>> = HashMap::new();
        for layer in layers {
            if let (Some(digest), Some(cold)) = (digest_of(layer), self.layers.unfilled(layer.id.serial)) {
                colds.insert(digest, cold);
            }
        }
        let serials: Vec<u64> = colds.values().map(|cold| cold.serial()).collect();
        let (watch, held) = (self.cold.touches().watch(serials.clone(), 0), self.cold.hold(serials));
        let wanted = wanted(known, &colds);
        if wanted.is_empty() {
            self.note(chain, |image| image.prefetching = false);
            return;
        }
        let (count, began) = (wanted.len(), Instant::now());
        self.say(chain, format!("{count} chunks, from {} starts, are being fetched first", known.starts));
        wanted.iter().for_each(|(cold, at)| cold.foretell(*at));
        let bytes = self.fetch(wanted).await;
        colds.values().for_each(|cold| cold.nothing_is_foretold());
        self.say(
            chain,
            format!(
                "{count} chunks, from {} starts; {bytes} bytes of them were fetched first, in {:.1} s",
                known.starts,
                began.elapsed().as_secs_f32()
            ),
        );
        let began = Instant::now();
        while watch.quiet() < QUIET && began.elapsed() < MOST_HELD {
            tokio::time::sleep(LOOK).await;
        }
        drop(held);
        self.note(chain, |image| image.prefetching = false);
    }

    /// How many bytes were fetched.
    async fn fetch(&self, wanted: Vec<(Arc<Cold>, usize)>) -> u64 {
        let at_once = if self.content.is_far() { FAR_AT_ONCE } else { AT_ONCE };
        let (mut all, mut window, mut wanted) = (0, Window::new(at_once), wanted.into_iter());
        let mut under_way = FuturesUnordered::new();
        loop {
            let free = window.at_once().saturating_sub(under_way.len());
            under_way.extend(wanted.by_ref().take(free).map(|(cold, at)| {
                // Boxed: the compiler cannot tell otherwise that the whole may move between threads.
                async move {
                    let began = Instant::now();
                    (cold.prefetch(at).await, began.elapsed())
                }
                .boxed()
            }));
            let Some((answer, took)) = under_way.next().await else { return all };
            match answer {
                Ok(0) => {}
                Ok(bytes) => {
                    window.took(took, self.content.distance());
                    all += u64::from(bytes);
                    self.counts.chunks.fetch_add(1, Ordering::Relaxed);
                    self.counts.bytes.fetch_add(bytes.into(), Ordering::Relaxed);
                }
                Err(error) => {
                    tracing::debug!(%error, "a chunk of a trace cannot be had");
                    if error.is_outage() {
                        return all;
                    }
                }
            }
        }
    }

    fn say(&self, chain: &ChainId, said: String) {
        tracing::debug!(%chain, said, "trace");
        self.note(chain, |image| image.said = said);
    }

    /// How many chunks of the trace were read, of those whose reads could be seen.
    fn count_used(&self, watch: &Watch, layers: &[Arc<LayerRecord>], known: &Known) {
        let digests: HashMap<u64, IndexDigest> =
            layers.iter().filter_map(|layer| Some((layer.id.serial, digest_of(layer)?))).collect();
        let read: HashSet<(IndexDigest, usize)> = watch
            .order()
            .into_iter()
            .filter_map(|(serial, chunk)| Some((*digests.get(&serial)?, chunk)))
            .collect();
        let (mut expected, mut used) = (0, 0);
        for step in known.trace.steps() {
            let digest = known.trace.layers()[usize::from(step.layer)];
            if digests.values().any(|seen| *seen == digest) {
                expected += 1;
                let is_read = usize::try_from(step.chunk).is_ok_and(|chunk| read.contains(&(digest, chunk)));
                used += u64::from(is_read);
            }
        }
        self.counts.expected.fetch_add(expected, Ordering::Relaxed);
        self.counts.used.fetch_add(used, Ordering::Relaxed);
    }

    async fn write(&self, chain: &ChainId, seen: Option<Trace>, own: Option<Trace>) {
        let Some(seen) = seen else { return };
        // What this node saw of other layers, when these were here already.
        let trace = trace::merge(&[seen].into_iter().chain(own).collect::<Vec<_>>());
        let chunks = trace.steps().len();
        match self.content.publish_trace(chain, &trace).await {
            Ok(()) => {
                self.counts.written.fetch_add(1, Ordering::Relaxed);
                tracing::info!(%chain, chunks, "what a start read was recorded for other nodes");
                self.note(chain, |image| {
                    image.known = None;
                    image.said = format!("a start that read {chunks} chunks was recorded here");
                });
            }
            Err(error) => self.not_written(chain, &error),
        }
    }

    fn not_written(&self, chain: &ChainId, error: &ContentError) {
        self.counts.failed.fetch_add(1, Ordering::Relaxed);
        let denied = matches!(error, ContentError::Object(ObjectError::Denied(_)));
        if denied && !self.denied.swap(true, Ordering::Relaxed) {
            tracing::info!(%error, "this node records no starts of images: it may not write traces to the store");
        } else {
            tracing::debug!(%chain, %error, "what a start read could not be recorded");
        }
    }
}

/// The chunks of the trace that there are.
fn wanted(known: &Known, colds: &HashMap<IndexDigest, Arc<Cold>>) -> Vec<(Arc<Cold>, usize)> {
    let layers: Vec<Option<&Arc<Cold>>> =
        known.trace.layers().iter().map(|digest| colds.get(digest)).collect();
    let wanted = known.trace.steps().iter().filter_map(|step| {
        let (cold, at) = (layers[usize::from(step.layer)]?, usize::try_from(step.chunk).ok()?);
        (at < cold.index().chunks().len()).then(|| (Arc::clone(cold), at))
    });
    wanted.collect()
}

/// What was seen as a trace; `None` if that is nothing.
fn recorded(layers: &[Arc<LayerRecord>], order: &[(u64, usize)]) -> Option<Trace> {
    let mut digests = Vec::new();
    let mut numbers = HashMap::new();
    for layer in layers {
        let digest = digest_of(layer)?;
        if !digests.contains(&digest) {
            numbers.insert(layer.id.serial, u16::try_from(digests.len()).ok()?);
            digests.push(digest);
        }
    }
    let step = |(serial, chunk): &(u64, usize)| {
        Some(Step { layer: *numbers.get(serial)?, chunk: u32::try_from(*chunk).ok()? })
    };
    let steps: Vec<Step> = order.iter().filter_map(step).collect();
    if steps.is_empty() { None } else { Trace::new(digests, steps).ok() }
}

fn digest_of(layer: &LayerRecord) -> Option<IndexDigest> {
    layer.index.map(IndexDigest::from_bytes)
}

fn chain_of(record: &Record) -> Option<ChainId> {
    remote::chain_of(&record.info.labels, &record.info.name)
}

fn number(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::memory::Memory;
    use crate::content::trust::{PublisherKey, Trust};
    use crate::content::{Options, Parts};
    use crate::driver::Id;
    use crate::image::{Facts, Layout};
    use crate::layer::LayerStore;
    use crate::layer::attach::Attacher;
    use crate::layer::fill::Supply;
    use crate::object::Objects;
    use crate::oci::{DiffId, Digest};
    use crate::snapshot::Timestamp;
    use crate::snapshot::metastore::{Origin, Progress};

    fn digest(byte: u8) -> Digest {
        Digest::parse(&format!("sha256:{}", format!("{byte:02x}").repeat(32))).unwrap()
    }

    fn chain(byte: u8) -> ChainId {
        ChainId(digest(byte))
    }

    fn index(byte: u8) -> IndexDigest {
        IndexDigest::from_bytes([byte; 32])
    }

    fn layer(serial: u64, index: u8) -> Arc<LayerRecord> {
        let layout = Layout { data: 0..0, metadata: 0..0, size: 0 };
        let (diff_id, attributes) = (DiffId(digest(index)), None);
        let (tar_size, root_uid, root_gid, inodes, bytes) = (0, 0, 0, 0, 0);
        let facts = Facts { diff_id, attributes, tar_size, layout, root_uid, root_gid, inodes, bytes };
        Arc::new(LayerRecord {
            id: Id { serial, slot: 0 },
            facts,
            origin: Origin::Fetched,
            progress: Progress::Filling,
            blob: None,
            index: Some([index; 32]),
            published: None,
            used: Timestamp(0),
            fetched: 0,
            shared: 0,
        })
    }

    fn trace(layers: &[u8], steps: &[(u16, u32)]) -> Trace {
        let steps = steps.iter().map(|(layer, chunk)| Step { layer: *layer, chunk: *chunk }).collect();
        Trace::new(layers.iter().map(|byte| index(*byte)).collect(), steps).unwrap()
    }

    fn store(objects: &Objects, seed: u8) -> Arc<ContentStore> {
        let (chunks, key) = (Arc::new(Memory::default()), PublisherKey::from_seed([seed; 32]));
        let parts = Parts { objects: objects.clone(), chunks, key, trust: Trust::Keys(Vec::new()) };
        Arc::new(ContentStore::new(parts, Options::default()))
    }

    fn traces(root: &std::path::Path, objects: &Objects) -> Traces {
        let meta = Arc::new(MetaStore::open(root, "overlayfs").unwrap());
        let files = Arc::new(LayerStore::open(root, Attacher::untried(root)).unwrap());
        let content = store(objects, 1);
        let cold = Arc::new(ColdLayers::new(Supply::new(&files, &content)));
        let layers = Arc::new(Layers::new(Arc::clone(&meta), files, Some(Arc::clone(&cold)), None));
        assert!(Traces::new(Arc::clone(&meta), Arc::clone(&layers), Arc::clone(&content)).is_none());
        let (images, asking, denied) = (Mutex::default(), KeyedLocks::default(), AtomicBool::new(false));
        let (counts, work) = (Counts::default(), Work::default());
        Traces { meta, layers, cold, content, images, asking, denied, counts, work }
    }

    #[test]
    fn what_was_seen_names_layers_by_their_indexes() {
        let layers = [layer(70, 7), layer(80, 8)];
        let seen = recorded(&layers, &[(80, 3), (99, 1), (70, 5)]).unwrap();
        assert_eq!(seen, trace(&[7, 8], &[(1, 3), (0, 5)]));
        assert_eq!(recorded(&layers, &[]), None);
        assert_eq!(recorded(&layers, &[(99, 1)]), None);
    }

    #[tokio::test]
    async fn a_start_is_recorded_until_enough_are_known() {
        let (dir, objects) = (tempfile::tempdir().unwrap(), Objects::memory());
        let traces = traces(dir.path(), &objects);
        let layers = [layer(70, 7), layer(80, 8)];
        for seed in 2..5 {
            let known = traces.ask(&chain(seed)).await.unwrap();
            assert!(traces.is_wanted(&known, &layers));
            // The others have one of the layers from another image.
            store(&objects, seed).publish_trace(&chain(1), &trace(&[7], &[(0, seed.into())])).await.unwrap();
        }
        let known = traces.ask(&chain(1)).await.unwrap();
        assert_eq!((known.starts, known.trace.steps().len()), (3, 3));
        assert!(traces.is_wanted(&known, &layers) && !traces.is_wanted(&known, &layers[..1]));

        traces.write(&chain(1), recorded(&layers[1..], &[(80, 3)]), None).await;
        let known = traces.ask(&chain(1)).await.unwrap();
        assert_eq!(known.starts, 4, "its own is among them at once");
        assert!(!traces.is_wanted(&known, &layers), "it has seen the other layer itself");
        traces.write(&chain(1), recorded(&layers[..1], &[(70, 9)]), known.own.clone()).await;
        let own = traces.ask(&chain(1)).await.unwrap().own.clone();
        assert_eq!(own, Some(trace(&[7, 8], &[(0, 9), (1, 3)])), "and does not forget it");
        traces.write(&chain(1), None, own).await;
        let state = traces.state("auto");
        assert_eq!((state.read, state.written, state.failed), (3 + 4 + 4, 2, 0));
        assert_eq!(traces.explain(&chain(1)).unwrap(), "a start that read 2 chunks was recorded here");
        assert_eq!(traces.explain(&chain(9)), None);
    }

    #[tokio::test]
    async fn the_store_is_asked_once_a_minute() {
        let (dir, objects) = (tempfile::tempdir().unwrap(), Objects::memory());
        let traces = traces(dir.path(), &objects);
        assert_eq!(traces.ask(&chain(1)).await.unwrap().starts, 0);
        store(&objects, 2).publish_trace(&chain(1), &trace(&[7], &[(0, 1)])).await.unwrap();
        assert_eq!(traces.ask(&chain(1)).await.unwrap().starts, 0);
        tokio::time::pause();
        tokio::time::advance(FRESH).await;
        tokio::time::resume();
        assert_eq!(traces.ask(&chain(1)).await.unwrap().starts, 1);
    }

    #[tokio::test]
    async fn a_node_that_may_not_write_records_nothing_any_more() {
        let dir = tempfile::tempdir().unwrap();
        let traces = traces(dir.path(), &Objects::memory());
        let layers = [layer(70, 7)];
        let known = traces.ask(&chain(1)).await.unwrap();
        assert!(traces.is_wanted(&known, &layers));
        traces.not_written(&chain(1), &ContentError::TooLate);
        assert!(traces.is_wanted(&known, &layers));
        traces.not_written(&chain(1), &ContentError::Object(ObjectError::Denied("403".into())));
        assert!(!traces.is_wanted(&known, &layers));
        let state = traces.state("auto");
        assert_eq!((state.written, state.failed), (0, 2));
    }

    #[tokio::test]
    async fn few_images_are_remembered_and_those_that_are_starting_always() {
        let (dir, objects) = (tempfile::tempdir().unwrap(), Objects::memory());
        let traces = traces(dir.path(), &objects);
        traces.note(&chain(0), |image| image.starting = true);
        for n in 0..MOST_IMAGES + 10 {
            let chain = ChainId(Digest::parse(&format!("sha256:{n:064x}")).unwrap());
            traces.note(&chain, |_| ());
        }
        assert_eq!(traces.images.lock().len(), MOST_IMAGES);
        assert!(traces.images.lock().contains_key(&chain(0)));
    }

    /// A trace of chunks that there are not, and of layers that are not this image's.
    #[tokio::test]
    async fn what_there_is_not_is_not_fetched() {
        let (dir, objects) = (tempfile::tempdir().unwrap(), Objects::memory());
        let traces = traces(dir.path(), &objects);
        store(&objects, 2).publish_trace(&chain(1), &trace(&[7, 8], &[(0, 1), (1, 1)])).await.unwrap();
        let known = traces.ask(&chain(1)).await.unwrap();
        assert!(wanted(&known, &HashMap::new()).is_empty());
        traces.prefetch(&chain(1), &[layer(70, 7)], &known).await;
        assert!(!traces.note(&chain(1), |image| image.prefetching));
        assert_eq!(traces.state("auto").chunks, 0);
    }
}
