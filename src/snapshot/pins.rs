//! Pinned images: their layers are on the disk before a container of them starts, and stay there.
//!
//! **Where.** Asked by `layers`; told by `snapshotter` of what is pulled and started, and by `daemon` of containerd's events; calls
//! [`crate::containerd`] for the images that there are.
//!
//! **What is pinned.** Every layer of an image whose name matches a pattern, for as long as containerd has the image: its collector, and
//! the kubelet's, are not ours to overrule. Which layers an image has is containerd's to say. While it is being pulled there is no image
//! yet: then the label says so that containerd sets if it is configured to (`enable_remote_snapshot_annotations`), and else nothing need be
//! known before something is started.
//!
//! **When it fails.** As long as containerd has not answered, nothing is given up, and what is started waits for it for a second.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::metastore::{MetaStore, Record};
use super::{Labels, remote};
use crate::containerd::ContainerdError;
use crate::containerd::blob::Blobs;
use crate::containerd::manifest::Platform;
use crate::content::pattern::Pattern;
use crate::oci::{ChainId, Digest};

/// The image that is being pulled, on request also of clients other than CRI.
const LABEL_IMAGE: &str = "containerd.io/snapshot/cri.image-ref";
/// How long containerd is asked before something starts.
const ASKED: Duration = Duration::from_secs(1);
/// How long a pull may take.
const PULL: Duration = Duration::from_secs(3600);
/// The most images that are pinned, and layers of them that are remembered while they are pulled.
const MOST_IMAGES: usize = 4096;
const MOST_PULLED: usize = 65_536;
/// What happens within this time is looked at together.
const SETTLE: Duration = Duration::from_millis(300);
/// How long until containerd is asked again when it did not answer.
const PAUSE: Duration = Duration::from_secs(5);

/// See the module's page.
#[derive(Debug)]
pub struct Pins {
    patterns: Vec<Pattern>,
    meta: Arc<MetaStore>,
    blobs: Blobs,
    platform: Platform,
    changed: Notify,
    /// One look at a time.
    looking: tokio::sync::Mutex<()>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The chains of the layers of those that containerd has, by what the name stands for.
    images: HashMap<Digest, Vec<ChainId>>,
    /// All of these.
    chains: HashSet<ChainId>,
    /// The chains of what is being pulled, and since when.
    pulled: HashMap<ChainId, Instant>,
    /// The layer images of both.
    serials: HashSet<u64>,
    /// Whether containerd was asked.
    is_known: bool,
}

impl State {
    fn has(&self, chain: &ChainId) -> bool {
        self.pulled.contains_key(chain) || self.chains.contains(chain)
    }
}

impl Pins {
    /// Images with such names; `None` if there are no patterns.
    pub fn new(patterns: Vec<Pattern>, meta: Arc<MetaStore>, blobs: Blobs) -> Option<Pins> {
        let (changed, looking, state) = (Notify::new(), tokio::sync::Mutex::default(), Mutex::default());
        let pins = Pins { patterns, meta, blobs, platform: Platform::host(), changed, looking, state };
        (!pins.patterns.is_empty()).then_some(pins)
    }

    /// Whether a layer image is to be here before it is read.
    pub(super) fn is_wanted_whole(&self, serial: u64) -> bool {
        self.state.lock().serials.contains(&serial)
    }

    /// Whether a layer image is not to be given up: also as long as nothing is known.
    pub(super) fn is_kept(&self, serial: u64) -> bool {
        let state = self.state.lock();
        !state.is_known || state.serials.contains(&serial)
    }

    /// A layer with these labels was found for a pull.
    pub(super) fn found(&self, chain: &ChainId, labels: &Labels, record: &Record) {
        let is_ours = labels.get(LABEL_IMAGE).is_some_and(|name| self.matches(name));
        let mut state = self.state.lock();
        if is_ours && state.pulled.len() < MOST_PULLED {
            state.pulled.insert(chain.clone(), Instant::now());
        }
        if let Some(serial) = record.layer.filter(|_| state.has(chain)) {
            state.serials.insert(serial);
        }
    }

    /// containerd has another image, or another one under a name.
    pub(super) fn images_changed(&self) {
        self.changed.notify_one();
    }

    /// Something is about to start: containerd may have named its image just now.
    pub(super) async fn starting(&self) {
        let looked = tokio::time::timeout(ASKED, self.look()).await;
        match looked {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "cannot see whether an image that is started is pinned"),
            Err(_) => tracing::warn!(
                "cannot see whether an image that is started is pinned: containerd did not answer in {ASKED:?}"
            ),
        }
    }

    /// Looks whenever something has happened, until `stop`.
    pub(super) async fn run(&self, stop: CancellationToken) {
        loop {
            let looked = tokio::select! {
                () = stop.cancelled() => return,
                looked = self.look() => looked,
            };
            let again = async {
                match looked {
                    Ok(()) => self.changed.notified().await,
                    Err(error) => {
                        tracing::warn!(%error, "cannot see which images are pinned; nothing is given up meanwhile");
                        tokio::time::sleep(PAUSE).await;
                    }
                }
                tokio::time::sleep(SETTLE).await;
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = again => {}
            }
        }
    }

    fn matches(&self, name: &str) -> bool {
        self.patterns.iter().any(|pattern| pattern.matches(name))
    }

    async fn look(&self) -> Result<(), ContainerdError> {
        let _one = self.looking.lock().await;
        let images = self.images().await?;
        let chains: HashSet<ChainId> = images.values().flatten().cloned().collect();
        let mut state = self.state.lock();
        // What was pulled is an image now, and no longer pinned once that is removed.
        state.pulled.retain(|chain, since| since.elapsed() < PULL && !chains.contains(chain));
        (state.images, state.chains) = (images, chains);
        let ours = |record: &Arc<Record>| {
            let chain = remote::chain_of(&record.info.labels, &record.info.name)?;
            record.layer.filter(|_| state.has(&chain))
        };
        state.serials = self.meta.all().iter().filter_map(ours).collect();
        state.is_known = true;
        Ok(())
    }

    async fn images(&self) -> Result<HashMap<Digest, Vec<ChainId>>, ContainerdError> {
        let mut images = HashMap::new();
        let containerd = self.blobs.containerd("default").await?;
        for namespace in containerd.namespaces().await? {
            let containerd = containerd.in_namespace(&namespace)?;
            for image in containerd.images().await?.into_iter().filter(|image| self.matches(&image.name)) {
                let target = image.target.digest.clone();
                if images.len() >= MOST_IMAGES || images.contains_key(&target) {
                    continue;
                }
                let known = self.state.lock().images.get(&target).cloned();
                let chains = match known {
                    Some(chains) => chains,
                    None => match containerd.resolve_image(&image, &self.platform).await {
                        Ok(found) => found.layers.into_iter().map(|layer| layer.chain).collect(),
                        Err(error @ (ContainerdError::Connect(_) | ContainerdError::Call(_))) => {
                            return Err(error);
                        }
                        // Not of this platform, or not wholly fetched: nothing of it can start.
                        Err(error) => {
                            tracing::debug!(image = %image.name, %error, "a pinned image has no layers here");
                            continue;
                        }
                    },
                };
                images.insert(target, chains);
            }
        }
        Ok(images)
    }
}
