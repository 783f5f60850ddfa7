//! Bringing back what a store lacks: from this node's layer images, from containerd's content store, and by publishing images again; [`registry`](super::registry)
//! does so with what it fetches.
//!
//! In the order in which a publish writes: chunks, indexes, refs, documents, names. Whatever it is killed in leaves sound objects, and
//! repeating it goes on. At the end each finding is looked at again: only what is sound then counts as repaired.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::show::Meter;
use crate::chunk::ChunkId;
use crate::cli::publish;
use crate::config::Config;
use crate::containerd::Containerd;
use crate::containerd::manifest::{LONGEST_DOCUMENT, Platform};
use crate::content::document::Document;
use crate::content::fsck::{Checker, Finding, Object, Report, TouchedImage};
use crate::content::index::{IndexDigest, LayerIndex, Limits};
use crate::content::name;
use crate::content::publish::PublishRequest;
use crate::content::{ContentError, ContentStore, digest_of};
use crate::layer::{self, LayerStore};
use crate::object::layout::Kind;
use crate::object::{ObjectError, Objects};
use crate::oci::{ChainId, Digest};

/// What became of a finding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It is sound.
    Repaired,
    /// It is as it was, and why.
    Left(String),
}

/// One repair.
pub(super) struct Repair<'a> {
    config: &'a Config,
    checker: &'a Checker,
    findings: &'a [Finding],
    objects: Objects,
    content: Arc<ContentStore>,
    temp: PathBuf,
    /// Why the store cannot be written, once that is known.
    refused: Option<String>,
    /// What went wrong with publishing an image again.
    failed: HashMap<TouchedImage, String>,
}

impl<'a> Repair<'a> {
    pub(super) fn new(
        config: &'a Config,
        objects: &Objects,
        checker: &'a Checker,
        report: &'a Report,
        temp: Option<&Path>,
    ) -> anyhow::Result<Repair<'a>> {
        let doubted = report.findings.iter().filter_map(chunk_of).collect();
        let content = publish::content_store(config, objects, Arc::new(doubted))?;
        Ok(Repair {
            config,
            checker,
            findings: &report.findings,
            objects: objects.clone(),
            content: Arc::new(content),
            temp: temp.map_or_else(|| config.root.clone(), Path::to_owned),
            refused: None,
            failed: HashMap::new(),
        })
    }

    /// Does what can be done; what became of each finding. The registry is asked if there is a place for its configuration.
    pub(super) async fn run(
        mut self,
        registry: Option<Option<&Path>>,
        meter: &Meter,
    ) -> anyhow::Result<Vec<Outcome>> {
        meter.say(0, 4, "repairing from this node's layer images");
        if let Err(error) = self.use_layers(meter).await {
            self.refused_or(error)?;
        }
        if self.refused.is_none() {
            meter.say(3, 4, "publishing again from containerd");
            self.use_containerd().await?;
            if let Some(hosts) = registry {
                self.use_registry(hosts, meter).await?;
            }
        }
        let mut outcomes = Vec::with_capacity(self.findings.len());
        for (done, finding) in self.findings.iter().enumerate() {
            meter.say(done, self.findings.len(), "looking again");
            outcomes.push(match self.checker.is_sound(finding).await? {
                true => Outcome::Repaired,
                false => Outcome::Left(self.why_left(finding)),
            });
        }
        Ok(outcomes)
    }

    /// A store that refuses to be written leaves everything as it is; every other failure ends the repair.
    fn refused_or(&mut self, error: ContentError) -> Result<(), ContentError> {
        match refusal(&error) {
            Some(told) => {
                self.refused = Some(told);
                Ok(())
            }
            None => Err(error),
        }
    }

    fn why_left(&self, finding: &Finding) -> String {
        if let Some(refused) = &self.refused {
            return format!("the store cannot be written with these credentials: {refused}");
        }
        if let Object::Kept(Kind::Name | Kind::Ref, place) = finding.object {
            let key = format!("{:016x}", place.key);
            if key != self.content.publisher().id() {
                return format!(
                    "only the node with the key {key} can sign it: run this there, or publish the image again"
                );
            }
        }
        if let Some(failed) = finding.images.iter().find_map(|image| self.failed.get(image)) {
            return failed.clone();
        }
        match finding.image_count {
            0 => "neither this node's layer images nor an image of containerd has it".to_owned(),
            _ => "neither this node's layer images nor containerd have these bytes; with --from-registry they are fetched"
                .to_owned(),
        }
    }

    // --- from this node's layer images ------------------------------------------------------------------------------

    async fn use_layers(&mut self, meter: &Meter) -> Result<(), ContentError> {
        // Whoever writes first describes the store.
        self.objects.tidy(std::time::Duration::from_secs(24 * 3600)).await?;
        let layers = LayerStore::at(&self.config.root);
        let serials = layer::images_below(&self.config.root).unwrap_or_default();
        let mut chunks: HashSet<ChunkId> = self.findings.iter().filter_map(chunk_of).collect();
        let local = serials.into_iter().filter(|serial| layers.is_complete(*serial));
        let local: Vec<(u64, LayerIndex, Vec<u8>)> = local
            .filter_map(|serial| {
                let bytes = layers.read_index(serial)?;
                Some((serial, LayerIndex::decode(&bytes, Limits::default()).ok()?, bytes))
            })
            .collect();
        for (done, (serial, index, _)) in local.iter().enumerate() {
            meter.say(done, local.len(), "repairing chunks from this node's layer images");
            self.restore_chunks(&layers, *serial, index, &mut chunks).await?;
        }
        let wanted = self.kept(Kind::Index);
        for (serial, index, bytes) in &local {
            if wanted.contains(IndexDigest::of(bytes).as_bytes()) {
                self.content.restore_index(bytes.clone().into()).await?;
                // One that ignores damage may have read the wrong bytes, and take chunks that it did not know to be needed.
                if self.content.is_collected().await? {
                    self.publish_layer(&layers, *serial, index, &[]).await?;
                }
            }
        }
        self.restore_refs(&layers, &local).await
    }

    async fn restore_chunks(
        &self,
        layers: &LayerStore,
        serial: u64,
        index: &LayerIndex,
        wanted: &mut HashSet<ChunkId>,
    ) -> Result<(), ContentError> {
        let here: Vec<_> = index.chunks().filter(|(_, chunk)| wanted.contains(&chunk.id)).collect();
        if here.is_empty() {
            return Ok(());
        }
        // Given up meanwhile: another layer may have them.
        let Ok(file) = layers.read(serial) else { return Ok(()) };
        for (offset, chunk) in here {
            let mut plain = vec![0; chunk.length as usize];
            let right = file.read_exact_at(&mut plain, offset).is_ok() && ChunkId::of(&plain) == chunk.id;
            if right && wanted.remove(&chunk.id) {
                self.content.restore_chunk(chunk.id, plain.into()).await?;
            }
        }
        Ok(())
    }

    /// Which layer makes a chain is arithmetic: the chain below it and its diff ID give it, or it is another layer.
    async fn restore_refs(
        &self,
        layers: &LayerStore,
        local: &[(u64, LayerIndex, Vec<u8>)],
    ) -> Result<(), ContentError> {
        let touched =
            self.findings.iter().filter(|finding| matches!(finding.object, Object::Kept(Kind::Ref, _)));
        for layer in touched.flat_map(|finding| &finding.layers) {
            let Some(chain) = &layer.chain else { continue };
            let makes =
                |index: &LayerIndex| ChainId::of(layer.below.as_ref(), &index.facts().diff_id) == *chain;
            for (serial, index, _) in local.iter().filter(|(_, index, _)| makes(index)) {
                self.publish_layer(layers, *serial, index, std::slice::from_ref(chain)).await?;
            }
        }
        Ok(())
    }

    /// Chunks, index and refs of a layer that is here, in this order.
    async fn publish_layer(
        &self,
        layers: &LayerStore,
        serial: u64,
        index: &LayerIndex,
        chains: &[ChainId],
    ) -> Result<(), ContentError> {
        // Given up meanwhile: containerd may have its blob.
        let Ok(file) = layers.read(serial) else { return Ok(()) };
        let request = PublishRequest { image: &file, facts: index.facts(), chains };
        match self.content.publish(request, &|_| (), &CancellationToken::new()).await {
            // Damaged itself: right bytes have to come from elsewhere.
            Ok(_) | Err(ContentError::Image(_) | ContentError::OtherImage { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn kept(&self, wanted: Kind) -> HashSet<[u8; 32]> {
        let hash = |finding: &Finding| match finding.object {
            Object::Kept(kind, place) if kind == wanted => Some(place.hash),
            _ => None,
        };
        self.findings.iter().filter_map(hash).collect()
    }

    // --- from containerd --------------------------------------------------------------------------------------------

    async fn use_containerd(&mut self) -> anyhow::Result<()> {
        let Ok(containerd) = Containerd::open(&self.config.containerd, "default").await else {
            return Ok(());
        };
        for namespace in containerd.namespaces().await.unwrap_or_default() {
            let Ok(containerd) = containerd.in_namespace(&namespace) else { continue };
            if let Err(error) = self.documents(&containerd).await {
                self.refused_or(error)?;
                return Ok(());
            }
            self.images(&containerd, &namespace).await?;
        }
        Ok(())
    }

    async fn documents(&self, containerd: &Containerd) -> Result<(), ContentError> {
        for hash in self.kept(Kind::Document) {
            let digest: Digest = digest_of(&hash);
            let Ok(bytes) = containerd.read(&digest, LONGEST_DOCUMENT).await else { continue };
            let document = Document::of(bytes);
            if *document.digest() == digest {
                self.content.restore_document(&document).await?;
            }
        }
        Ok(())
    }

    /// Publishes those images of this namespace again that are touched by what is still wrong.
    async fn images(&mut self, containerd: &Containerd, namespace: &str) -> anyhow::Result<()> {
        let mut touched: BTreeSet<TouchedImage> = BTreeSet::new();
        let mut names: HashMap<[u8; 32], u64> = HashMap::new();
        for finding in self.wrong().await? {
            touched.extend(finding.images.iter().cloned());
            if let Object::Kept(Kind::Name, place) = finding.object {
                names.insert(place.hash, place.key);
            }
        }
        for image in containerd.images().await.unwrap_or_default() {
            // What a damaged name said is told by its place: no other image has it.
            let platform = Platform::host().to_string();
            if names.contains_key(&name::place(&image.name, &platform)) {
                touched.insert(TouchedImage { reference: image.name.clone(), platform });
            }
        }
        for image in touched {
            if containerd.image(&image.reference).await.ok().flatten().is_none() {
                continue;
            }
            if let Err(error) = self.again(namespace, &image).run().await {
                self.fail(image, format!("publishing it again failed: {error:#}"));
            }
        }
        Ok(())
    }

    /// An image of containerd to be published again, by its own name.
    pub(super) fn again<'b>(&'b self, namespace: &'b str, image: &'b TouchedImage) -> publish::Again<'b> {
        publish::Again {
            config: self.config,
            content: Arc::clone(&self.content),
            namespace,
            record: &image.reference,
            reference: &image.reference,
            platform: &image.platform,
            temp: &self.temp,
        }
    }

    /// What is not sound by now.
    pub(super) async fn wrong(&self) -> Result<Vec<&'a Finding>, ContentError> {
        let mut wrong = Vec::new();
        for finding in self.findings {
            if !self.checker.is_sound(finding).await? {
                wrong.push(finding);
            }
        }
        Ok(wrong)
    }

    pub(super) fn fail(&mut self, image: TouchedImage, told: String) {
        self.failed.insert(image, told);
    }

    pub(super) fn config(&self) -> &'a Config {
        self.config
    }

    pub(super) fn content(&self) -> &ContentStore {
        &self.content
    }
}

/// The store's words if it is that it refuses to be written.
fn refusal(error: &ContentError) -> Option<String> {
    use crate::chunk::ChunkError;
    match error {
        ContentError::Object(
            source @ (ObjectError::Denied(_) | ObjectError::Full(_) | ObjectError::Foreign { .. }),
        )
        | ContentError::Chunk(ChunkError::Store {
            source: source @ (ObjectError::Denied(_) | ObjectError::Full(_) | ObjectError::Foreign { .. }),
            ..
        }) => Some(source.to_string()),
        _ => None,
    }
}

fn chunk_of(finding: &Finding) -> Option<ChunkId> {
    match finding.object {
        Object::Kept(Kind::Chunk, place) => Some(ChunkId::from_bytes(place.hash)),
        _ => None,
    }
}
