//! Layer after layer, from the bottom up: build its image, publish it.
//!
//! While a layer is being published the next one is being built. An image's name is written when all of its layers are there.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use anyhow::{Context, ensure};
use tokio_util::sync::CancellationToken;

use super::show::{Meter, Outcome};
use super::source::{Image, Source};
use crate::containerd::manifest::Resolved;
use crate::content::below::{Lower, Stack, unnamed_file};
use crate::content::name::ImageName;
use crate::content::publish::PublishRequest;
use crate::content::reference::Ref;
use crate::content::{ContentStore, Word};
use crate::image::{self, Compression, Facts, Limits};
use crate::oci::DiffId;

/// What is done with layers that the store has already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Present {
    Skip,
    PublishAgain,
}

/// One publish.
pub(super) struct Work {
    pub(super) store: Arc<ContentStore>,
    pub(super) source: Source,
    pub(super) image: Image,
    /// Where layer images are made.
    pub(super) temp: PathBuf,
    pub(super) present: Present,
    pub(super) limits: Limits,
    pub(super) meter: Arc<Meter>,
}

/// A layer image that is here.
#[derive(Clone)]
struct Built {
    position: usize,
    facts: Arc<Facts>,
    file: Arc<File>,
}

impl Work {
    /// Publishes everything; what became of each layer, from the bottom up.
    pub(super) async fn run(&self) -> anyhow::Result<Vec<Outcome>> {
        let count = self.image.layers.len();
        let mut outcomes: Vec<Option<Outcome>> = (0..count).map(|_| None).collect();
        let mut below = Stack::default();
        let mut made: HashMap<DiffId, Built> = HashMap::new();
        let mut ready: Option<Built> = None;
        for position in 0..count {
            let layer = &self.image.layers[position];
            if let Some(Ref { index, publisher }) = self.is_present(position).await? {
                let outcome = Outcome::Present { publisher: publisher.to_string() };
                self.meter.done(position, layer, &outcome)?;
                outcomes[position] = Some(outcome);
                below.0.push(Arc::new(Lower::stored(Arc::clone(&self.store), index, self.temp.clone())));
                continue;
            }
            let next = async {
                match made.get(&layer.diff_id) {
                    Some(built) => Ok(Built { position, ..built.clone() }),
                    None => self.build(position, below.clone()).await,
                }
            };
            let (published, built) = tokio::join!(self.publish(ready.take()), next);
            outcomes.extend_at(published?);
            let built = built?;
            if built.facts.attributes.is_none() {
                made.insert(layer.diff_id.clone(), built.clone());
            }
            below.0.push(Arc::new(Lower::built(built.file.try_clone()?, &built.facts.layout)?));
            ready = Some(built);
        }
        outcomes.extend_at(self.publish(ready).await?);
        self.publish_name().await?;
        Ok(outcomes.into_iter().flatten().collect())
    }

    async fn is_present(&self, position: usize) -> anyhow::Result<Option<Ref>> {
        if self.present == Present::PublishAgain {
            return Ok(None);
        }
        match self.store.word(&self.image.layers[position].chain).await? {
            Word::Accepted(found) => Ok(Some(found)),
            Word::Silence | Word::Refused(_) => Ok(None),
        }
    }

    async fn build(&self, position: usize, below: Stack) -> anyhow::Result<Built> {
        let layer = &self.image.layers[position];
        let whose = || format!("layer {} of {}, {}", position + 1, self.image.layers.len(), layer.diff_id);
        let compression = Compression::of_media_type(&layer.blob.media_type).with_context(whose)?;
        let blob = self.source.open(&self.image, position).await.with_context(whose)?;
        let file = unnamed_file(&self.temp).with_context(|| self.temp.display().to_string())?;
        // Dropped with this call, and then the thread has nobody to work for.
        let stop = CancellationToken::new();
        let _stop_when_dropped = stop.clone().drop_guard();
        let (meter, limits) = (Arc::clone(&self.meter), self.limits.clone());
        let building = tokio::task::spawn_blocking(move || {
            let blob = Counted { blob, read: 0, position, meter };
            let source = image::Source { blob, compression };
            let facts = image::build(source, &file, &below, &limits, &|| stop.is_cancelled())?;
            Ok::<_, image::ImageError>((facts, file))
        });
        let (facts, file) = building.await?.with_context(whose)?;
        ensure!(
            facts.diff_id == layer.diff_id,
            "{}: its blob is damaged, or belongs to another image: it unpacks to {}",
            whose(),
            facts.diff_id
        );
        Ok(Built { position, facts: Arc::new(facts), file: Arc::new(file) })
    }

    async fn publish(&self, built: Option<Built>) -> anyhow::Result<Option<(usize, Outcome)>> {
        let Some(Built { position, facts, file }) = built else { return Ok(None) };
        let layer = &self.image.layers[position];
        let uploaded = AtomicU64::new(0);
        let chains = [layer.chain.clone()];
        let request = PublishRequest { image: &file, facts: &facts, chains: &chains };
        let progress = |progress| self.meter.published(position, progress, &uploaded);
        let published = self.store.publish(request, &progress, &CancellationToken::new()).await;
        let published = published.with_context(|| format!("layer {}, {}", position + 1, layer.chain))?;
        let outcome = Outcome::Published(published);
        self.meter.done(position, layer, &outcome)?;
        Ok(Some((position, outcome)))
    }

    async fn publish_name(&self) -> anyhow::Result<()> {
        let Image { reference, platform, target, manifest, documents, layers } = self.image.clone();
        let digests = documents.iter().map(|document| document.digest().clone()).collect();
        let resolved = Resolved { platform, target, manifest, documents: digests, layers };
        let name = ImageName::of(&reference, &resolved);
        let published = self.store.publish_name(&name, &documents).await;
        published.context("every layer is published, but not the image's name")
    }
}

trait ExtendAt {
    fn extend_at(&mut self, outcome: Option<(usize, Outcome)>);
}

impl ExtendAt for Vec<Option<Outcome>> {
    fn extend_at(&mut self, outcome: Option<(usize, Outcome)>) {
        if let Some((position, outcome)) = outcome {
            self[position] = Some(outcome);
        }
    }
}

/// A blob whose bytes are counted as they are read.
struct Counted {
    blob: Box<dyn Read + Send>,
    read: u64,
    position: usize,
    meter: Arc<Meter>,
}

impl Read for Counted {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let length = self.blob.read(into)?;
        self.read += length as u64;
        self.meter.built(self.position, self.read);
        Ok(length)
    }
}
