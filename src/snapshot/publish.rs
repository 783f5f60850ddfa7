//! Publishing in the background: what this node pulled is put on the store for the others.
//!
//! **What.** Works off the queue that Commit writes to, oldest first, one layer at a time. The queue is part of the records: it
//! survives restarts, and an outage of the store only makes it longer.
//!
//! **Where.** Owned by `snapshotter`; calls [`crate::content`] to publish, `layers` for images, [`crate::containerd`] for the
//! blobs of layers whose files were unpacked, and `names`, which names an image after its last layer.
//!
//! **Invariants.** An entry leaves the queue when its layer is durable in the store, or with a reason that `explain` shows.
//!
//! **When it fails.** An entry is tried again, later each time; nothing of it is visible in the store before its ref is.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::below::BelowSnapshot;
use super::blob::{self, BlobError};
use super::layers::Layers;
use super::metastore::{MetaStore, Progress, PublishEntry, Record, Stack};
use super::names::Names;
pub use super::names::Uses;
use super::remote;
use super::report::{Problem, PublishState};
use super::{Key, Kind, SnapshotError, Timestamp};
use crate::containerd::blob::Blobs;
use crate::content::index::IndexDigest;
use crate::content::publish::{PublishRequest, Published};
use crate::content::{ContentError, ContentStore};
use crate::image::{Facts, Limits};
use crate::oci::ChainId;

/// The longest time between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// The same while the store does not answer: asking costs little then, the object store's breaker answers most of the time.
const OUTAGE_PAUSE: Duration = Duration::from_secs(10);

/// How often a blob that is not there is looked for: containerd labels it only after the commit.
const PATIENCE: u32 = 4;

/// Why a layer is not published yet.
#[derive(Debug, thiserror::Error)]
enum PublishError {
    #[error(transparent)]
    Content(#[from] ContentError),
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    #[error(transparent)]
    Blob(#[from] BlobError),
}

impl PublishError {
    /// Whether trying again is of no use after so many attempts.
    fn is_final(&self, attempts: u32) -> bool {
        match self {
            PublishError::Blob(error) => {
                error.is_of_its_bytes() || (error.is_final() && attempts >= PATIENCE)
            }
            // Too large for an index, say: it always will be.
            PublishError::Content(ContentError::Index(_)) => true,
            PublishError::Content(_) | PublishError::Snapshot(_) => false,
        }
    }

    fn is_outage(&self) -> bool {
        matches!(self, PublishError::Content(error) if error.is_outage())
    }
}

/// What the publisher has done since it began.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct PublishCounts {
    /// Layers.
    pub layers: u64,
    /// Plain bytes of their chunks.
    pub bytes: u64,
    /// Bytes that were uploaded.
    pub uploaded: u64,
    /// Names of images.
    pub names: u64,
    /// Attempts that failed.
    pub failures: u64,
}

/// What people are told of a queue, without what its publisher has done.
pub(super) fn state_of(queue: &[PublishEntry], policy: &str) -> PublishState {
    let problem = |entry: &PublishEntry| Problem {
        chain: entry.chain.to_string(),
        image: None,
        retried: entry.dropped.is_none(),
        message: entry.dropped.clone().unwrap_or_else(|| entry.message.clone()),
    };
    let pending = queue.iter().filter(|entry| entry.dropped.is_none()).count();
    PublishState {
        policy: policy.to_owned(),
        pending,
        dropped: queue.len() - pending,
        problems: queue.iter().map(problem).filter(|problem| !problem.message.is_empty()).collect(),
        ..PublishState::default()
    }
}

/// See the module's page.
#[derive(Debug)]
pub struct Publisher {
    meta: Arc<MetaStore>,
    layers: Arc<Layers>,
    content: Arc<ContentStore>,
    blobs: Blobs,
    limits: Limits,
    points: PathBuf,
    queued: Notify,
    due: Mutex<HashMap<ChainId, Instant>>,
    held: Mutex<HashSet<ChainId>>,
    counts: Mutex<PublishCounts>,
    names: Names,
}

impl Publisher {
    /// Nothing happens yet: [`Publisher::run`] does.
    pub fn new(
        meta: Arc<MetaStore>,
        layers: Arc<Layers>,
        content: Arc<ContentStore>,
        blobs: Blobs,
        limits: Limits,
        root: &Path,
    ) -> Publisher {
        let (due, held, counts) = (Mutex::default(), Mutex::default(), Mutex::default());
        let names = Names::new(Arc::clone(&meta), Arc::clone(&content), blobs.clone());
        Publisher {
            meta,
            layers,
            content,
            blobs,
            limits,
            points: root.join("l"),
            queued: Notify::new(),
            due,
            held,
            counts,
            names,
        }
    }

    /// Something was queued.
    pub fn wake(&self) {
        self.queued.notify_one();
    }

    /// containerd's images have changed: one may have all of its layers in the store.
    pub fn images_changed(&self) {
        self.names.images_changed();
    }

    /// A snapshot that is no layer is made on this committed one: its image is in use.
    pub(super) fn starting(&self, parent: &Key) {
        self.names.starting(parent);
    }

    /// What came of noting which images are used here.
    pub fn uses(&self) -> Uses {
        self.names.uses()
    }

    /// What was done so far.
    pub fn counts(&self) -> PublishCounts {
        let (names, failures) = self.names.counts();
        let counts = *self.counts.lock();
        PublishCounts { names, failures: counts.failures + failures, ..counts }
    }

    /// What came of the names of the images whose uppermost layer makes this chain.
    pub(super) fn explain_names(&self, chain: &ChainId) -> Vec<String> {
        self.names.explain(chain)
    }

    /// What people are told of it.
    pub fn state(&self, policy: &str) -> PublishState {
        let PublishCounts { layers, bytes, uploaded, names, failures } = self.counts();
        let mut state = state_of(&self.meta.publish_queue(), policy);
        state.pending += self.names.pending();
        state.problems.extend(self.names.problems());
        let Uses { written: uses, failures: unnoted_uses } = self.uses();
        PublishState { layers, bytes, uploaded, names, failures, uses, unnoted_uses, ..state }
    }

    /// Works the queue off, and names images, until `stop`. What is under way then begins anew at the next start.
    pub async fn run(&self, stop: CancellationToken) {
        tokio::join!(self.run_queue(stop.clone()), self.names.run(stop));
    }

    async fn run_queue(&self, stop: CancellationToken) {
        loop {
            let next = tokio::select! {
                () = stop.cancelled() => return,
                next = self.work_off() => next,
            };
            let pause = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.queued.notified() => {}
                () = pause => {}
            }
        }
    }

    /// Everything that is due; answers when the next entry will be.
    async fn work_off(&self) -> Option<Instant> {
        loop {
            let now = Instant::now();
            let queue = self.meta.publish_queue();
            let waiting = queue.into_iter().filter(|entry| entry.dropped.is_none());
            let due = |entry: &PublishEntry| self.due.lock().get(&entry.chain).copied();
            let (ready, later): (Vec<_>, Vec<_>) =
                waiting.partition(|entry| due(entry).is_none_or(|at| at <= now));
            self.hold_blobs().await;
            let Some(entry) = ready.into_iter().next() else {
                return later.iter().filter_map(due).min();
            };
            self.attempt(entry).await;
        }
    }

    /// Keeps containerd from collecting the blobs of layers without an image while they wait.
    async fn hold_blobs(&self) {
        for entry in self.meta.publish_queue() {
            let waits = entry.dropped.is_none() && entry.layer.is_none();
            if !waits || self.held.lock().contains(&entry.chain) {
                continue;
            }
            match blob::hold(&self.blobs, &entry).await {
                Ok(()) => drop(self.held.lock().insert(entry.chain)),
                Err(error) => tracing::debug!(chain = %entry.chain, %error, "cannot hold a blob yet"),
            }
        }
    }

    /// Lets go of what was held for an entry that has left the queue.
    async fn release_blob(&self, entry: &PublishEntry) {
        if entry.layer.is_some() {
            return;
        }
        self.held.lock().remove(&entry.chain);
        if let Err(error) = blob::release(&self.blobs, entry).await {
            tracing::debug!(chain = %entry.chain, %error, "a lease is left to expire");
        }
    }

    async fn attempt(&self, entry: PublishEntry) {
        let chain = entry.chain.clone();
        let recorded = match self.publish(&entry).await {
            Ok(()) => {
                self.due.lock().remove(&chain);
                self.release_blob(&entry).await;
                // Before as well: what is pending is not nothing in between.
                self.names.images_changed();
                let recorded = self.meta.requeue(chain.clone(), None).await;
                self.names.published(&chain);
                recorded
            }
            Err(error) if error.is_final(entry.attempts) => {
                tracing::warn!(%chain, %error, "a layer is not published");
                self.release_blob(&entry).await;
                let dropped = Some(error.to_string());
                let given_up = PublishEntry { dropped, ..entry };
                let recorded = self.meta.requeue(chain.clone(), Some(given_up)).await;
                self.names.images_changed();
                recorded
            }
            Err(error) => {
                self.counts.lock().failures += 1;
                let attempts = entry.attempts.saturating_add(1);
                let longest = if error.is_outage() { OUTAGE_PAUSE } else { LONGEST_PAUSE };
                let pause = Duration::from_secs(1 << attempts.min(9)).min(longest);
                self.due.lock().insert(chain.clone(), Instant::now() + pause);
                tracing::warn!(%chain, %error, attempts, again_in = ?pause, "cannot publish a layer yet");
                let message = error.to_string();
                self.meta.requeue(chain.clone(), Some(PublishEntry { attempts, message, ..entry })).await
            }
        };
        if let Err(error) = recorded {
            tracing::warn!(%chain, %error, "cannot record what came of publishing a layer");
            self.due.lock().insert(chain, Instant::now() + LONGEST_PAUSE);
        }
    }

    async fn publish(&self, entry: &PublishEntry) -> Result<(), PublishError> {
        match entry.layer.and_then(|serial| self.meta.layer(serial)) {
            Some(layer) if layer.progress == Progress::Complete => {
                let image = self.layers.store.read(layer.id.serial).map_err(SnapshotError::from)?;
                let published = self.publish_image(&image, &layer.facts, entry).await?;
                self.keep_index(layer.id.serial, published.index).await
            }
            _ => {
                let below = self.below(&entry.chain).ok_or(BlobError::Removed)?;
                let made =
                    blob::image_of(&self.blobs, entry, &self.layers.store, (below, self.limits.clone()))
                        .await?;
                self.publish_image(&made.file, &made.facts, entry).await.map(|_| ())
            }
        }
    }

    /// What lies below the committed snapshot of a chain.
    fn below(&self, chain: &ChainId) -> Option<BelowSnapshot> {
        let records = self.meta.all();
        let is_it = |record: &&Arc<Record>| {
            let named = remote::chain_of(&record.info.labels, &record.info.name);
            record.info.kind == Kind::Committed && named.as_ref() == Some(chain)
        };
        let parent = records.iter().find(is_it)?.info.parent.clone();
        let stack = match parent {
            None => Stack::default(),
            Some(parent) => self.meta.stack_with(&parent)?,
        };
        Some(BelowSnapshot::new(&stack, Some(Arc::clone(&self.layers)), &self.points))
    }

    async fn publish_image(
        &self,
        image: &File,
        facts: &Facts,
        entry: &PublishEntry,
    ) -> Result<Published, PublishError> {
        let request = PublishRequest { image, facts, chains: std::slice::from_ref(&entry.chain) };
        let published = self.content.publish(request, &|_| (), &CancellationToken::new()).await?;
        let mut counts = self.counts.lock();
        counts.layers += 1;
        counts.bytes += published.bytes;
        counts.uploaded += published.stored_bytes;
        Ok(published)
    }

    /// The index is kept beside the image, so that other layers find its chunks here.
    async fn keep_index(&self, serial: u64, digest: IndexDigest) -> Result<(), PublishError> {
        let index = self.content.index(digest).await?;
        if let Err(error) = self.layers.store.write_index(serial, &index.encode()) {
            tracing::warn!(serial, %error, "the layer index is not kept; chunks of this layer are not shared");
        }
        self.layers.share(serial, &index);
        self.meta.indexed(serial, *digest.as_bytes(), Some(Timestamp::now())).await?;
        Ok(())
    }
}
