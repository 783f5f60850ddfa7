//! From the names down to the indexes, and who names what.

use std::collections::{BTreeSet, HashMap, HashSet};

use futures::{FutureExt, StreamExt, TryStreamExt, stream};

use super::{
    Checker, Finding, MOST_NAMED, Object, Pace, Problem, Progress, Report, TouchedImage, TouchedLayer,
    of_object,
};
use crate::containerd::manifest::LONGEST_DOCUMENT;
use crate::content::document::Document;
use crate::content::index::{IndexDigest, LayerIndex};
use crate::content::inventory::{Reading, Unreadable};
use crate::content::name::ImageName;
use crate::content::{ContentError, digest_of, raw};
use crate::object::layout::{self, Kind, Place};
use crate::oci::ChainId;

/// How many objects are looked at at once.
pub(super) const AT_ONCE: usize = 16;

type Hash = [u8; 32];

/// What names a chain.
#[derive(Debug, Default)]
struct Chain {
    images: Vec<u32>,
    below: Option<Hash>,
    /// Whose ref it should have: that of who wrote the name.
    key: u64,
    has_ref: bool,
}

/// One check.
pub(super) struct Walk<'a> {
    pub(super) checker: &'a Checker,
    pub(super) report: Report,
    pub(super) pace: Pace,
    progress: &'a (dyn Fn(Progress) + Sync),
    images: Vec<(TouchedImage, Place)>,
    chains: HashMap<Hash, Chain>,
    documents: HashMap<Hash, Vec<u32>>,
    /// The ids of the keys of all who have written something.
    publishers: BTreeSet<u64>,
    /// The chains that an index makes.
    indexes: HashMap<Hash, Vec<Hash>>,
    /// Indexes that can be read, in the order in which they were.
    pub(super) readable: Vec<IndexDigest>,
    /// How many chunks they have, by first byte; one in several of them counts in each.
    pub(super) chunk_counts: Box<[u64; 256]>,
}

impl<'a> Walk<'a> {
    pub(super) fn new(checker: &'a Checker, progress: &'a (dyn Fn(Progress) + Sync)) -> Walk<'a> {
        Walk {
            checker,
            report: Report::default(),
            pace: Pace::new(checker.options.rate),
            progress,
            images: Vec::new(),
            chains: HashMap::new(),
            documents: HashMap::new(),
            publishers: BTreeSet::new(),
            indexes: HashMap::new(),
            readable: Vec::new(),
            chunk_counts: Box::new([0; 256]),
        }
    }

    pub(super) fn show(&self, phase: &'static str, done: u64, total: u64) {
        let findings = self.report.findings.len() as u64 + self.report.unlisted;
        (self.progress)(Progress { phase, done, total: total.max(done), findings });
    }

    pub(super) async fn names(&mut self) -> Result<(), ContentError> {
        let inventory = self.checker.inventory.clone();
        let mut names = std::pin::pin!(inventory.names());
        while let Some(read) = names.try_next().await? {
            self.report.count("name", 1);
            self.publishers.insert(read.entry.place.key);
            match read.said {
                Ok((image, _)) => self.add_image(&image, read.entry.place),
                Err(problem) => self.unreadable(Object::Kept(Kind::Name, read.entry.place), problem),
            }
            self.show("names", self.images.len() as u64, 0);
        }
        Ok(())
    }

    fn add_image(&mut self, image: &ImageName, place: Place) {
        let number = u32::try_from(self.images.len()).unwrap_or(u32::MAX);
        let touched = TouchedImage { reference: image.reference.clone(), platform: image.platform.clone() };
        self.images.push((touched, place));
        let mut below = None;
        for chain in &image.chains {
            let hash = raw(&chain.0);
            let known = self.chains.entry(hash).or_default();
            if known.images.last() != Some(&number) {
                known.images.push(number);
            }
            known.below = below.or(known.below);
            known.key = place.key;
            below = Some(hash);
        }
        for document in &image.documents {
            self.documents.entry(raw(document)).or_default().push(number);
        }
    }

    pub(super) async fn documents(&mut self) -> Result<(), ContentError> {
        let named: Vec<Hash> = self.documents.keys().copied().collect();
        let (total, checker, pace) = (named.len() as u64, self.checker, &self.pace);
        let look = |hash: Hash| {
            async move {
                let place = Place { hash, key: 0 };
                let (problem, bytes) = match checker.options.quick {
                    true => (
                        checker
                            .objects()
                            .stat(&Kind::Document.object(&place))
                            .await?
                            .map_or(Some(Problem::Missing), |_| None),
                        0,
                    ),
                    false => checker.document_problem(place).await?,
                };
                pace.spent(bytes).await;
                Ok::<_, ContentError>((hash, problem, bytes))
            }
            .boxed()
        };
        let looked: Vec<_> = stream::iter(named).map(look).buffer_unordered(AT_ONCE).try_collect().await?;
        self.report.count("document", total);
        for (hash, problem, bytes) in looked {
            self.report.bytes += bytes;
            let Some(problem) = problem else { continue };
            let images = self.documents.get(&hash).cloned().unwrap_or_default();
            if problem == Problem::Missing && !self.any_name_stays(&images).await? {
                continue;
            }
            let finding = self.finding(
                Object::Kept(Kind::Document, Place { hash, key: 0 }),
                problem,
                Vec::new(),
                images,
            );
            self.report.add(finding);
        }
        self.show("documents", total, total);
        Ok(())
    }

    pub(super) async fn refs(&mut self) -> Result<(), ContentError> {
        let inventory = self.checker.inventory.clone();
        let mut refs = std::pin::pin!(inventory.refs());
        let (mut wrong, mut done) = (HashSet::new(), 0);
        while let Some(read) = refs.try_next().await? {
            done += 1;
            let hash = read.entry.place.hash;
            self.publishers.insert(read.entry.place.key);
            match read.said {
                Ok(said) => {
                    self.chains.entry(hash).or_default().has_ref = true;
                    let chains = self.indexes.entry(*said.index.as_bytes()).or_default();
                    if !chains.contains(&hash) {
                        chains.push(hash);
                    }
                }
                Err(problem) => {
                    wrong.insert(hash);
                    self.unreadable(Object::Kept(Kind::Ref, read.entry.place), problem);
                }
            }
            self.show("refs", done, 0);
        }
        self.report.count("ref", done);
        let silent: Vec<Hash> = self
            .chains
            .iter()
            .filter(|(hash, chain)| !chain.has_ref && !wrong.contains(*hash))
            .map(|(hash, _)| *hash)
            .collect();
        for hash in silent {
            let chain = &self.chains[&hash];
            let (images, place) = (chain.images.clone(), Place { hash, key: chain.key });
            // Written since the listing, or named by nothing any more.
            if self.has_ref(&hash, place.key).await? || !self.any_name_stays(&images).await? {
                continue;
            }
            let finding =
                self.finding(Object::Kept(Kind::Ref, place), Problem::Missing, vec![(None, hash)], images);
            self.report.add(finding);
        }
        Ok(())
    }

    pub(super) async fn indexes(&mut self) -> Result<(), ContentError> {
        let inventory = self.checker.inventory.clone();
        let mut all: BTreeSet<Hash> = self.indexes.keys().copied().collect();
        let mut parts = std::pin::pin!(inventory.parts(Kind::Index));
        while let Some(part) = parts.try_next().await? {
            self.report.foreign += part.foreign;
            all.extend(part.entries.iter().map(|entry| entry.place.hash));
        }
        let total = all.len() as u64;
        for (done, hash) in all.into_iter().enumerate() {
            let digest = IndexDigest::from_bytes(hash);
            let object = Object::Kept(Kind::Index, Place { hash, key: 0 });
            match self.checker.inventory.index(digest).await? {
                Reading::Said(index) => {
                    self.readable.push(digest);
                    index.chunks().for_each(|(_, chunk)| {
                        self.chunk_counts[usize::from(chunk.id.as_bytes()[0])] += 1;
                    });
                }
                Reading::Gone => self.missing_index(object, hash).await?,
                Reading::Unreadable(problem) => self.unreadable(object, problem),
            }
            self.show("indexes", done as u64 + 1, total);
        }
        self.report.count("index", total);
        Ok(())
    }

    async fn missing_index(&mut self, object: Object, hash: Hash) -> Result<(), ContentError> {
        if !self.any_ref_stays(&hash).await? {
            return Ok(());
        }
        let finding = self.of_index(object, Problem::Missing, &hash, None);
        self.report.add(finding);
        Ok(())
    }

    /// A store that holds something has a description.
    pub(super) async fn description(&mut self) -> Result<(), ContentError> {
        self.report.count("description", 1);
        let holds = self.report.checked.iter().any(|(kind, count)| *kind != "description" && *count > 0);
        if holds && self.checker.objects().stat(layout::STORE).await?.is_none() {
            let finding = self.finding(Object::Description, Problem::Missing, Vec::new(), Vec::new());
            self.report.add(finding);
        }
        Ok(())
    }

    fn unreadable(&mut self, object: Object, problem: Unreadable) {
        let told = match problem {
            Unreadable::Newer(_) => return self.report.newer.push(object.name()),
            Unreadable::Damaged(told) => Problem::Damaged(told),
        };
        let finding = match object {
            Object::Kept(Kind::Index, place) => self.of_index(object, told, &place.hash, None),
            Object::Kept(Kind::Ref, place) => {
                let images =
                    self.chains.get(&place.hash).map(|chain| chain.images.clone()).unwrap_or_default();
                self.finding(object, told, vec![(None, place.hash)], images)
            }
            _ => self.finding(object, told, Vec::new(), Vec::new()),
        };
        self.report.add(finding);
    }

    /// A finding about an index, or about something that is in it.
    fn of_index(&self, object: Object, problem: Problem, index: &Hash, read: Option<&LayerIndex>) -> Finding {
        let mut finding = self.finding(object, problem, Vec::new(), Vec::new());
        self.touch(&mut finding, index, read);
        finding
    }

    /// What is in this index is touched by the finding, too.
    pub(super) fn touch(&self, finding: &mut Finding, index: &Hash, read: Option<&LayerIndex>) {
        let chains = self.indexes.get(index).cloned().unwrap_or_default();
        let diff_id = read.map(|index| index.facts().diff_id.clone());
        let layer = |chain: Option<Hash>| TouchedLayer {
            chain: chain.map(|chain| ChainId(digest_of(&chain))),
            below: chain.and_then(|chain| self.below(&chain)),
            index: Some(IndexDigest::from_bytes(*index)),
            diff_id: diff_id.clone(),
        };
        let layers: Vec<_> = match chains.is_empty() {
            true => vec![layer(None)],
            false => chains.iter().map(|chain| layer(Some(*chain))).collect(),
        };
        finding.layer_count += layers.len();
        finding.layers.extend(layers.into_iter().take(MOST_NAMED.saturating_sub(finding.layers.len())));
        for number in chains.iter().filter_map(|chain| self.chains.get(chain)).flat_map(|chain| &chain.images)
        {
            let image = &self.images[*number as usize].0;
            if !finding.images.contains(image) {
                finding.image_count += 1;
                if finding.images.len() < MOST_NAMED {
                    finding.images.push(image.clone());
                }
            }
        }
    }

    fn below(&self, chain: &Hash) -> Option<ChainId> {
        self.chains.get(chain)?.below.map(|below| ChainId(digest_of(&below)))
    }

    pub(super) fn finding(
        &self,
        object: Object,
        problem: Problem,
        layers: Vec<(Option<IndexDigest>, Hash)>,
        images: Vec<u32>,
    ) -> Finding {
        let layer = |(index, chain): (Option<IndexDigest>, Hash)| TouchedLayer {
            below: self.below(&chain),
            chain: Some(ChainId(digest_of(&chain))),
            index,
            diff_id: None,
        };
        let (layer_count, image_count) = (layers.len(), images.len());
        let images = images.iter().take(MOST_NAMED).map(|number| self.images[*number as usize].0.clone());
        let layers = layers.into_iter().take(MOST_NAMED).map(layer).collect();
        Finding { object, problem, length: None, layers, layer_count, images: images.collect(), image_count }
    }

    /// Whether one of these names is still there.
    async fn any_name_stays(&self, images: &[u32]) -> Result<bool, ContentError> {
        for number in images {
            let place = &self.images[*number as usize].1;
            if self.checker.objects().stat(&Kind::Name.object(place)).await?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    async fn has_ref(&self, chain: &Hash, key: u64) -> Result<bool, ContentError> {
        let keys = std::iter::once(key).chain(self.publishers.iter().copied());
        self.checker.inventory.has_ref(chain, keys).await
    }

    /// Whether a ref still leads to this index.
    pub(super) async fn any_ref_stays(&self, index: &Hash) -> Result<bool, ContentError> {
        for chain in self.indexes.get(index).map(Vec::as_slice).unwrap_or_default() {
            let key = self.chains.get(chain).map_or(0, |chain| chain.key);
            if self.has_ref(chain, key).await? {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

impl Checker {
    /// What is wrong with a document, and how many bytes were read for it.
    pub(super) async fn document_problem(
        &self,
        place: Place,
    ) -> Result<(Option<Problem>, u64), ContentError> {
        let bytes = match self.objects().get(&Kind::Document.object(&place), LONGEST_DOCUMENT).await {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Ok((Some(Problem::Missing), 0)),
            Err(error) if of_object(&error) => return Ok((Some(Problem::Damaged(error.to_string())), 0)),
            Err(error) => return Err(error.into()),
        };
        let length = bytes.len() as u64;
        let is_it = raw(Document::of(bytes).digest()) == place.hash;
        let problem = (!is_it).then(|| Problem::Damaged("its bytes have another SHA-256".to_owned()));
        Ok((problem, length))
    }
}
