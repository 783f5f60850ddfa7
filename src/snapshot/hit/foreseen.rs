//! Lookups for layers that are going to be asked for: begun before, and kept for a while.
//!
//! **Invariants.** A layer that was foreseen is handed over once, as if it had been looked up just then: what this node has by now comes first, and
//! a lookup that was given up for containerd's collector before somebody waited for it is begun anew. What nobody asks for within [`KEPT`] is
//! thrown away.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures::{FutureExt, StreamExt, stream};
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::{Hit, HitError, Hits};
use crate::layer::work::Work;
use crate::oci::ChainId;
use crate::snapshot::foresight::Ahead;
use crate::snapshot::metastore::{LayerChoice, Origin};

/// How many connections to a far store are opened before an image's metadata and chunks are asked for: each takes a way there and back.
pub(in crate::snapshot) const CONNECTIONS: usize = 96;
/// For how long they stay open without a use.
const IDLE: Duration = Duration::from_secs(40);
/// How many layers are looked up ahead at once: beside the one that is waited for, and of which small ones are fetched whole; and from a
/// far store.
const AT_ONCE: usize = 2;
const FAR_AT_ONCE: usize = 8;
/// For how long a layer that was found is kept for whoever is going to ask for it.
const KEPT: Duration = Duration::from_secs(20);

type Found = Result<Option<Hit>, HitError>;

/// What is being looked up, or was.
#[derive(Debug, Default)]
pub(super) struct Foreseen {
    by_chain: Mutex<HashMap<ChainId, Promise>>,
    next: AtomicU64,
    /// How many were asked for in the end.
    used: AtomicU64,
    /// When the store was made ready last.
    ready: Mutex<Option<Instant>>,
    work: Work,
}

#[derive(Debug)]
struct Promise {
    number: u64,
    /// Whether it is being looked up.
    begun: Arc<AtomicBool>,
    found: oneshot::Receiver<Found>,
}

/// A layer to look up.
struct Order {
    chain: ChainId,
    number: u64,
    begun: Arc<AtomicBool>,
    to: oneshot::Sender<Found>,
}

impl Foreseen {
    fn order(&self, chain: &ChainId) -> Option<Order> {
        let mut by_chain = self.by_chain.lock();
        if by_chain.contains_key(chain) {
            return None;
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let ((to, found), begun) = (oneshot::channel(), Arc::new(AtomicBool::new(false)));
        by_chain.insert(chain.clone(), Promise { number, begun: Arc::clone(&begun), found });
        Some(Order { chain: chain.clone(), number, begun, to })
    }

    fn take(&self, chain: &ChainId, is_it: impl Fn(&Promise) -> bool) -> Option<Promise> {
        let mut by_chain = self.by_chain.lock();
        by_chain.get(chain).filter(|promise| is_it(promise))?;
        by_chain.remove(chain)
    }

    pub(super) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Ends what is under way. Ids that were reserved for it are given up at the next start.
    pub(super) async fn end(&self) {
        self.work.end().await;
    }
}

impl Hits {
    /// An image is being pulled, or may soon be: the store is made ready for many requests.
    pub(in crate::snapshot) fn get_ready(&self, connections: usize) {
        {
            let mut ready = self.foreseen.ready.lock();
            if connections > 0 && ready.is_some_and(|at| at.elapsed() < IDLE) {
                return;
            }
            *ready = (connections > 0).then(Instant::now);
        }
        let content = Arc::clone(&self.content);
        self.foreseen.work.spawn(&Handle::current(), async move { content.get_ready(connections).await });
    }

    /// These layers are going to be asked for: they are looked up now.
    pub(in crate::snapshot) fn foresee(self: &Arc<Self>, ahead: &Ahead) {
        let orders: Vec<Order> = ahead.chains().filter_map(|chain| self.foreseen.order(chain)).collect();
        let kept: Vec<_> = orders.iter().map(|order| (order.chain.clone(), order.number)).collect();
        let this = Arc::clone(self);
        self.foreseen.work.spawn(&Handle::current(), async move {
            this.look_ahead(orders).await;
            tokio::time::sleep(KEPT).await;
            this.throw_unused(kept).await;
        });
    }

    async fn look_ahead(self: &Arc<Self>, orders: Vec<Order>) {
        // How far it is has to be known.
        self.content.get_ready(0).await;
        let at_once = if self.content.is_far() { FAR_AT_ONCE } else { AT_ONCE };
        stream::iter(orders)
            .for_each_concurrent(at_once, |Order { chain, begun, to, .. }| {
                let this = Arc::clone(self);
                async move {
                    begun.store(true, Ordering::Release);
                    // Somebody who could not wait for the beginning looks it up himself.
                    if to.is_closed() {
                        return;
                    }
                    if let Err(Ok(Some(hit))) = to.send(this.find_in_time(&chain, false, false).await) {
                        this.throw_away(hit).await;
                    }
                }
                .boxed()
            })
            .await;
    }

    async fn throw_unused(&self, kept: Vec<(ChainId, u64)>) {
        for (chain, number) in kept {
            let promise = self.foreseen.take(&chain, |promise| promise.number == number);
            if let Some(Ok(Ok(Some(hit)))) = promise.map(|mut promise| promise.found.try_recv()) {
                tracing::debug!(%chain, "nobody asked for a layer that was foreseen");
                self.throw_away(hit).await;
            }
        }
    }

    /// What was foreseen for this chain, once it is there; `None` if it has to be looked up. `first` says that nothing lies below it: no such
    /// layer is foreseen.
    pub(super) async fn foreseen(&self, chain: &ChainId, first: bool) -> Option<Found> {
        let mut promise =
            self.foreseen.take(chain, |promise| !first && promise.begun.load(Ordering::Acquire))?;
        let (found, waited) = match promise.found.try_recv() {
            Ok(found) => (found, false),
            // It was late for the layer below: containerd waits for it once.
            Err(_) if self.is_resting() => return None,
            Err(_) => (promise.found.await.ok()?, true),
        };
        let usable = match &found {
            Ok(Some(hit)) => self.is_current(hit),
            // Of a store that was late a moment ago.
            Err(error) if error.is_outage() || matches!(error, HitError::Hurried | HitError::Resting) => {
                waited
            }
            Ok(None) | Err(_) => true,
        };
        if usable {
            self.foreseen.used.fetch_add(1, Ordering::Relaxed);
            if found.as_ref().is_err_and(HitError::is_outage) {
                self.rest();
            }
            return Some(found);
        }
        if let Ok(Some(hit)) = found {
            self.throw_away(hit).await;
        }
        None
    }

    /// Whether a lookup would still say so: a layer of the node is still there, and one of the store is not here yet.
    fn is_current(&self, hit: &Hit) -> bool {
        match &hit.layer {
            LayerChoice::Known(id) => self.meta.layer(id.serial).is_some_and(|layer| self.is_here(&layer)),
            LayerChoice::New(new) => {
                let here = |origin| self.meta.layer_of(&new.facts, origin).is_some();
                !here(Origin::Applied) && !here(Origin::Fetched)
            }
            LayerChoice::Own => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::content::collect::tests::catalogue::{Catalogue, node};
    use crate::layer::LayerStore;
    use crate::layer::attach::Attacher;
    use crate::layer::fill::Supply;
    use crate::layer::lazy::ColdLayers;
    use crate::object::Objects;
    use crate::snapshot::foresight::Foresight;
    use crate::snapshot::layers::Layers;
    use crate::snapshot::metastore::MetaStore;

    const DEADLINE: Duration = Duration::from_secs(5);

    /// A node beside a store that has the image of three layers.
    async fn hits(root: &Path) -> (Arc<Hits>, Vec<ChainId>) {
        let (objects, catalogue) = (Objects::memory(), Catalogue::make().await);
        let (publisher, _) = node(&objects, 0, Duration::ZERO, 0);
        catalogue.publish(&publisher, 2).await;
        let (content, _) = node(&objects, 1, Duration::ZERO, 0);
        let (content, meta) = (Arc::new(content), Arc::new(MetaStore::open(root, "overlayfs").unwrap()));
        let files = Arc::new(LayerStore::open(root, Attacher::untried(root)).unwrap());
        let cold = Some(Arc::new(ColdLayers::new(Supply::new(&files, &content))));
        let layers = Arc::new(Layers::new(Arc::clone(&meta), files, cold, None));
        let chains = (0..3).map(|place| catalogue.chain(2, place)).collect();
        (Arc::new(Hits::new(meta, layers, content, DEADLINE)), chains)
    }

    /// The layers above the first.
    fn ahead(chains: &[ChainId]) -> Ahead {
        let foresight = Foresight::default();
        assert_eq!(foresight.stored(chains.to_vec()), None);
        foresight.asks(&chains[0], true).pop().unwrap()
    }

    async fn all_begun(hits: &Hits) {
        let begun =
            || hits.foreseen.by_chain.lock().values().all(|promise| promise.begun.load(Ordering::Acquire));
        while !begun() {
            tokio::task::yield_now().await;
        }
    }

    fn indexes(root: &Path) -> usize {
        let files = std::fs::read_dir(root.join("layer")).into_iter().flatten().flatten();
        files.filter(|file| file.path().extension().is_some_and(|ending| ending == "index")).count()
    }

    /// Until so many layers have been found.
    async fn found(root: &Path, count: usize) {
        let until = Instant::now() + Duration::from_secs(20);
        while indexes(root) < count {
            assert!(Instant::now() < until, "{} of {count} layers", indexes(root));
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn is_new(found: Found) -> bool {
        found.unwrap().is_some_and(|hit| hit.reserved.is_some())
    }

    #[tokio::test]
    async fn a_layer_that_was_foreseen_is_handed_over_once() {
        let dir = tempfile::tempdir().unwrap();
        let (hits, chains) = hits(dir.path()).await;
        hits.foresee(&ahead(&chains));
        assert!(is_new(hits.find(&chains[0], true).await));
        assert_eq!(hits.foreseen_used(), 0, "the first one is asked for by containerd");
        all_begun(&hits).await;
        assert!(is_new(hits.find(&chains[1], false).await));
        assert!(is_new(hits.find(&chains[2], false).await));
        assert_eq!(hits.foreseen_used(), 2);
        assert!(is_new(hits.find(&chains[2], false).await), "looked up anew");
        assert_eq!(hits.foreseen_used(), 2);
        assert_eq!(hits.lookups().iter().find(|(outcome, _)| *outcome == "hit"), Some(&("hit", 4)));
    }

    #[tokio::test]
    async fn a_layer_is_foreseen_for_the_place_that_it_has() {
        let dir = tempfile::tempdir().unwrap();
        let (hits, chains) = hits(dir.path()).await;
        hits.foresee(&ahead(&chains));
        all_begun(&hits).await;
        // Somebody who unpacks in parallel asks for it as if nothing were below it: no hit, whatever was foreseen.
        assert!(matches!(hits.find(&chains[1], true).await, Err(HitError::Detached)));
        assert_eq!(hits.foreseen_used(), 0);
    }

    #[tokio::test]
    async fn who_comes_before_it_has_begun_looks_it_up_himself() {
        let dir = tempfile::tempdir().unwrap();
        let (hits, chains) = hits(dir.path()).await;
        // Nothing of it has run yet.
        hits.foresee(&ahead(&chains));
        assert!(is_new(hits.find(&chains[2], false).await));
        assert_eq!(hits.foreseen_used(), 0);
    }

    #[tokio::test]
    async fn what_nobody_waits_for_does_not_have_the_store_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (hits, chains) = hits(dir.path()).await;
        let late = || Err(HitError::Late(DEADLINE));
        let order = hits.foreseen.order(&chains[1]).unwrap();
        order.begun.store(true, Ordering::Release);
        order.to.send(late()).unwrap();
        assert!(is_new(hits.find(&chains[1], false).await), "it was late a moment ago");
        let order = hits.foreseen.order(&chains[2]).unwrap();
        order.begun.store(true, Ordering::Release);
        let (found, ()) = tokio::join!(hits.find(&chains[2], false), async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            order.to.send(late()).unwrap();
        });
        assert!(matches!(found, Err(HitError::Late(_))), "containerd waited");
        assert!(matches!(hits.find(&chains[0], true).await, Err(HitError::Resting)));
    }

    #[tokio::test]
    async fn a_late_store_is_waited_for_once() {
        // Found by a store whose every request took 5 s: the layer above waited for what had been begun for it, too.
        let dir = tempfile::tempdir().unwrap();
        let (hits, chains) = hits(dir.path()).await;
        let order = hits.foreseen.order(&chains[1]).unwrap();
        order.begun.store(true, Ordering::Release);
        hits.rest();
        let found = tokio::time::timeout(DEADLINE, hits.find(&chains[1], false)).await;
        assert!(matches!(found, Ok(Err(HitError::Resting))), "{found:?}");
    }

    #[tokio::test]
    async fn what_nobody_asks_for_is_thrown_away() {
        let dir = tempfile::tempdir().unwrap();
        let (hits, chains) = hits(dir.path()).await;
        hits.foresee(&ahead(&chains));
        found(dir.path(), 2).await;
        // The metastore's writer is a thread, which knows nothing of a paused clock.
        tokio::time::sleep(Duration::from_millis(300)).await;
        tokio::time::pause();
        tokio::time::advance(KEPT).await;
        tokio::time::resume();
        let until = Instant::now() + Duration::from_secs(20);
        while indexes(dir.path()) > 0 || !hits.foreseen.by_chain.lock().is_empty() {
            assert!(Instant::now() < until, "{} layers are left", indexes(dir.path()));
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    #[tokio::test]
    async fn a_layer_that_came_here_meanwhile_is_not_taken_a_second_time() {
        let dir = tempfile::tempdir().unwrap();
        let (hits, chains) = hits(dir.path()).await;
        let first = hits.find(&chains[1], false).await.unwrap().unwrap();
        hits.foresee(&ahead(&chains));
        all_begun(&hits).await;
        found(dir.path(), 3).await;
        let LayerChoice::New(new) = &first.layer else { panic!("{first:?}") };
        let key = crate::snapshot::Key::new("another image").unwrap();
        let ids = hits.meta.reserve(1).await.unwrap();
        let snapshot = crate::snapshot::metastore::NewSnapshot {
            id: ids[0],
            key,
            parent: None,
            kind: crate::snapshot::Kind::Active,
            labels: crate::snapshot::Labels::default(),
            now: crate::snapshot::Timestamp::now(),
        };
        hits.meta.create(snapshot, LayerChoice::New(new.clone())).await.unwrap();
        let found = hits.find(&chains[1], false).await.unwrap().unwrap();
        assert!(matches!(found.layer, LayerChoice::Known(id) if id == new.id), "{found:?}");
        assert_eq!(hits.foreseen_used(), 0);
    }
}
