//! What images take on a store: of each its bytes, and those that nothing else needs.
//!
//! **What.** [`Survey::of`] walks names, refs, indexes and chunks ([`super::inventory`]) and answers a line for each image. Bytes are stored bytes of
//! chunks: *own* bytes are those of chunks that no other image needs, which is what removing this one alone would free.
//!
//! **Invariants.** Reads only. Memory is bounded as for a collection ([`super::collect`]): 16 bytes for each chunk of each layer.
//!
//! **When it fails.** What cannot be read makes an image incomplete, with the reason; a store that does not answer ends the survey.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::pin::pin;

use futures::{FutureExt, StreamExt, TryStreamExt, stream};

use super::buckets::Buckets;
use super::collect::{Step, Watch};
use super::index::IndexDigest;
use super::inventory::{Entry, Inventory, Read, Reading};
use super::name::ImageName;
use super::{ContentError, raw};
use crate::object::Objects;
use crate::object::layout::Kind;

/// The most chunks in memory, 16 bytes each.
const MOST: usize = 12 << 20;
/// How many indexes are read at once.
const READS: usize = 8;
/// The most reasons that are kept for an image.
const MOST_PROBLEMS: usize = 8;

/// An image on the store.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Line {
    /// Its reference.
    pub reference: String,
    /// Its platform.
    pub platform: String,
    /// The digest of its manifest.
    pub manifest: String,
    /// Who has named it.
    pub publishers: Vec<String>,
    /// When its name was written last, seconds since 1970 UTC.
    pub published: i64,
    /// When a node used it last, as far as nodes tell; else when it was published.
    pub used: i64,
    /// How many layers it has.
    pub layers: usize,
    /// Its chunks, as stored.
    pub bytes: u64,
    /// Those of them that no other image needs.
    pub own_bytes: u64,
    /// What is missing or cannot be read; nothing, if it is complete.
    pub problems: Vec<String>,
    /// The objects that name it.
    pub objects: Vec<Entry>,
}

impl Line {
    /// Whether everything that it needs is there.
    pub fn is_complete(&self) -> bool {
        self.problems.is_empty()
    }

    fn lacks(&mut self, problem: String) {
        if self.problems.len() < MOST_PROBLEMS && !self.problems.contains(&problem) {
            self.problems.push(problem);
        }
    }
}

/// What a store holds, by images.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Survey {
    /// The images, in the order of their names.
    pub images: Vec<Line>,
    /// How many names cannot be read.
    pub unreadable: u64,
    /// All chunks, as stored.
    pub chunk_bytes: u64,
    /// Those that no image needs.
    pub unused_bytes: u64,
}

/// What is walked, and who wants to know how far that is.
struct Walk<'a> {
    inventory: Inventory,
    watch: Watch<'a>,
}

impl Walk<'_> {
    fn at(&self, doing: &'static str, done: usize, total: usize) {
        (self.watch)(Step { doing, done: done as u64, total: total as u64 });
    }
}

/// What is gathered on the way.
#[derive(Default)]
struct Gathered {
    lines: Vec<Line>,
    /// By chain, the images that have it.
    chains: HashMap<[u8; 32], BTreeSet<u32>>,
    /// By document, the images that have it.
    documents: HashMap<[u8; 32], BTreeSet<u32>>,
    /// Indexes, each with the images that need it.
    indexes: Vec<([u8; 32], Vec<u32>)>,
}

impl Survey {
    /// Of this store.
    pub async fn of(objects: Objects, watch: Watch<'_>) -> Result<Survey, ContentError> {
        Survey::bounded(objects, MOST, watch).await
    }

    async fn bounded(objects: Objects, most: usize, watch: Watch<'_>) -> Result<Survey, ContentError> {
        let walk = Walk { inventory: Inventory::new(objects), watch };
        let mut survey = Survey::default();
        let mut gathered = Gathered::default();
        names(&walk, &mut gathered, &mut survey).await?;
        refs(&walk, &mut gathered).await?;
        documents(&walk, &mut gathered).await?;
        let mut from = 0;
        while from < 256 {
            let chunks = read_indexes(&walk, &mut gathered, from, most).await?;
            let covered = chunks.covered();
            count(&walk, &mut gathered, &chunks, &mut survey).await?;
            from = covered.end;
        }
        survey.images = gathered.lines;
        survey.images.sort_by(|a, b| (&a.reference, &a.platform).cmp(&(&b.reference, &b.platform)));
        Ok(survey)
    }
}

async fn names(walk: &Walk<'_>, gathered: &mut Gathered, survey: &mut Survey) -> Result<(), ContentError> {
    let mut images: BTreeMap<[u8; 32], u32> = BTreeMap::new();
    let mut names = pin!(walk.inventory.names());
    let mut read = 0;
    while let Some(Read { entry, said }) = names.try_next().await? {
        read += 1;
        walk.at("reading names of images", read, 0);
        let Ok((name, publisher)) = said else {
            survey.unreadable += 1;
            continue;
        };
        let next = u32::try_from(gathered.lines.len()).unwrap_or(u32::MAX);
        let number = *images.entry(entry.place.hash).or_insert(next);
        if number == next {
            gathered.lines.push(Line::default());
        }
        add_name(gathered, number, &entry, name, publisher.to_string());
    }
    let mut uses = pin!(walk.inventory.parts(Kind::Use));
    while let Some(part) = uses.try_next().await? {
        for entry in part.entries {
            if let Some(number) = images.get(&entry.place.hash) {
                let line = &mut gathered.lines[*number as usize];
                line.used = line.used.max(entry.modified);
            }
        }
    }
    Ok(())
}

fn add_name(gathered: &mut Gathered, number: u32, entry: &Entry, name: ImageName, publisher: String) {
    for chain in &name.chains {
        gathered.chains.entry(raw(&chain.0)).or_default().insert(number);
    }
    for document in &name.documents {
        gathered.documents.entry(raw(document)).or_default().insert(number);
    }
    let line = &mut gathered.lines[number as usize];
    line.objects.push(*entry);
    line.publishers.push(publisher);
    line.used = line.used.max(entry.modified);
    // Publishers may differ; the last word is shown.
    if entry.modified >= line.published {
        line.published = entry.modified;
        line.layers = name.chains.len();
        line.manifest = name.manifest.to_string();
    }
    (line.reference, line.platform) = (name.reference, name.platform);
}

async fn refs(walk: &Walk<'_>, gathered: &mut Gathered) -> Result<(), ContentError> {
    let mut indexes: HashMap<[u8; 32], BTreeSet<u32>> = HashMap::new();
    let mut found: BTreeSet<[u8; 32]> = BTreeSet::new();
    let mut refs = pin!(walk.inventory.refs());
    let mut read = 0;
    while let Some(Read { entry, said }) = refs.try_next().await? {
        read += 1;
        walk.at("reading refs", read, 0);
        let Some(images) = gathered.chains.get(&entry.place.hash) else { continue };
        match said {
            Ok(said) => {
                found.insert(entry.place.hash);
                indexes.entry(*said.index.as_bytes()).or_default().extend(images);
            }
            Err(problem) => {
                for image in images.clone() {
                    gathered.lines[image as usize].lacks(format!("{}: {problem}", entry.name()));
                }
            }
        }
    }
    let Gathered { lines, chains, .. } = gathered;
    for (chain, images) in chains.iter().filter(|(chain, _)| !found.contains(*chain)) {
        for image in images {
            lines[*image as usize].lacks(format!("layer {} has no ref", super::digest_of(chain)));
        }
    }
    let mut sorted: Vec<_> =
        indexes.into_iter().map(|(digest, images)| (digest, images.into_iter().collect())).collect();
    sorted.sort_unstable();
    gathered.indexes = sorted;
    Ok(())
}

async fn documents(walk: &Walk<'_>, gathered: &mut Gathered) -> Result<(), ContentError> {
    let mut parts = pin!(walk.inventory.parts(Kind::Document));
    while let Some(part) = parts.try_next().await? {
        for entry in part.entries {
            gathered.documents.remove(&entry.place.hash);
        }
    }
    let Gathered { lines, documents, .. } = gathered;
    for (document, images) in std::mem::take(documents) {
        for image in images {
            lines[image as usize].lacks(format!("document {} is missing", super::digest_of(&document)));
        }
    }
    Ok(())
}

/// Of each chunk the indexes that have it: 64 bits of its id, the number of the index.
async fn read_indexes(
    walk: &Walk<'_>,
    gathered: &mut Gathered,
    from: usize,
    most: usize,
) -> Result<Buckets<(u64, u32)>, ContentError> {
    let mut chunks = Buckets::new(from, most, |a, b| a == b);
    let numbered: Vec<(u32, [u8; 32])> =
        (0..).zip(gathered.indexes.iter().map(|(digest, _)| *digest)).collect();
    let read = |(number, digest): (u32, [u8; 32])| {
        async move {
            let read = walk.inventory.index(IndexDigest::from_bytes(digest)).await?;
            Ok::<_, ContentError>((number, read))
        }
        .boxed()
    };
    let mut indexes = stream::iter(numbered).map(read).buffer_unordered(READS);
    let mut done = 0;
    while let Some((number, read)) = indexes.try_next().await? {
        done += 1;
        walk.at("reading indexes", done, gathered.indexes.len());
        let problem = match read {
            Reading::Said(index) => {
                for (_, chunk) in index.chunks() {
                    chunks.add(chunk.id.as_bytes()[0], (key(chunk.id.as_bytes()), number));
                }
                continue;
            }
            Reading::Gone => "is missing".to_owned(),
            Reading::Unreadable(problem) => problem.to_string(),
        };
        let Gathered { lines, indexes, .. } = gathered;
        let (digest, images) = &indexes[number as usize];
        for image in images {
            lines[*image as usize].lacks(format!("index {}: {problem}", IndexDigest::from_bytes(*digest)));
        }
    }
    chunks.seal();
    Ok(chunks)
}

async fn count(
    walk: &Walk<'_>,
    gathered: &mut Gathered,
    chunks: &Buckets<(u64, u32)>,
    survey: &mut Survey,
) -> Result<(), ContentError> {
    let mut firsts = chunks.covered().filter_map(|byte| u8::try_from(byte).ok());
    let mut parts = pin!(walk.inventory.parts_within(Kind::Chunk, chunks.covered()));
    while let Some(part) = parts.try_next().await? {
        let Some(first) = firsts.next() else { break };
        walk.at("looking at chunks", usize::from(first) + 1, 256);
        let mut sizes: Vec<(u64, u64)> =
            part.entries.iter().map(|entry| (key(&entry.place.hash), entry.size)).collect();
        sizes.sort_unstable();
        survey.chunk_bytes += sizes.iter().map(|(_, size)| size).sum::<u64>();
        let mut used = 0;
        for group in chunks.items(first).chunk_by(|a, b| a.0 == b.0) {
            let images: BTreeSet<u32> =
                group.iter().flat_map(|(_, index)| &gathered.indexes[*index as usize].1).copied().collect();
            let at = sizes.binary_search_by_key(&group[0].0, |(key, _)| *key);
            let size = at.map(|at| sizes[at].1);
            used += size.unwrap_or(0);
            for image in &images {
                let line = &mut gathered.lines[*image as usize];
                match size {
                    Ok(size) => {
                        line.bytes += size;
                        line.own_bytes += if images.len() == 1 { size } else { 0 };
                    }
                    Err(_) => line.lacks("chunks are missing".to_owned()),
                }
            }
        }
        survey.unused_bytes += sizes.iter().map(|(_, size)| size).sum::<u64>() - used;
    }
    Ok(())
}

/// 64 bits of an id, without the first byte.
fn key(id: &[u8; 32]) -> u64 {
    let [_, bytes @ ..] = id.first_chunk::<9>().expect("an id has 32 bytes");
    u64::from_be_bytes(*bytes)
}
