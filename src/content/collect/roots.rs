//! Where needing begins: names, uses and refs, as one reading finds them.

use std::collections::{HashMap, HashSet};
use std::pin::pin;

use futures::TryStreamExt;

use super::keep::{self, Candidate};
use super::{Collector, Damage, Hashes, KindReport, Named, Removed, Step, Verdict, Watch};
use crate::content::inventory::{Entry, Read, Unreadable};
use crate::content::name::ImageName;
use crate::content::{ContentError, digest_of, raw};
use crate::object::layout::{self, Kind};
use crate::oci::ChainId;

/// One reading.
#[derive(Debug, Clone)]
pub(super) struct Roots {
    /// What time it was then, for ages.
    pub(super) now: i64,
    /// The hashes of the names that stay.
    pub(super) images: Hashes,
    /// The chains and documents of these.
    pub(super) chains: Hashes,
    pub(super) documents: Hashes,
    /// A name for each of the chains.
    named_by: HashMap<[u8; 32], Entry>,
    /// Names that go.
    pub(super) dead_names: HashSet<Entry>,
    pub(super) removed: Vec<Removed>,
    /// Refs that go, each with its index, where it can be read.
    pub(super) dead_refs: HashMap<Entry, Option<[u8; 32]>>,
    /// The chains of the refs that stay.
    pub(super) ref_chains: Hashes,
    /// Indexes that refs that stay name, and those that only refs that go do.
    pub(super) indexes: Named,
    pub(super) decaying: Hashes,
    pub(super) damage: Vec<Damage>,
    /// Names and refs.
    pub(super) reports: [KindReport; 2],
}

/// What all publishers say of an image.
#[derive(Debug, Default)]
struct Image {
    reference: String,
    platform: String,
    published: i64,
    entries: Vec<Entry>,
    chains: Vec<[u8; 32]>,
    documents: Vec<[u8; 32]>,
}

impl Image {
    fn add(&mut self, entry: Entry, name: ImageName) {
        self.published = self.published.max(entry.modified);
        self.entries.push(entry);
        let new = |known: &[[u8; 32]], hash: [u8; 32]| (!known.contains(&hash)).then_some(hash);
        for hash in name.chains.iter().map(|chain| raw(&chain.0)) {
            self.chains.extend(new(&self.chains, hash));
        }
        for hash in name.documents.iter().map(raw) {
            self.documents.extend(new(&self.documents, hash));
        }
        (self.reference, self.platform) = (name.reference, name.platform);
    }
}

impl Collector {
    /// Reads names, uses and refs; ages are told at `now`. Of what goes by a reading again only what went by the `first` one, too, does:
    /// the rest needs what it needs.
    pub(super) async fn read_roots(
        &self,
        now: i64,
        first: Option<&Roots>,
        watch: Watch<'_>,
    ) -> Result<Roots, ContentError> {
        let reports = [KindReport::new(Kind::Name), KindReport::new(Kind::Ref)];
        let mut roots = Roots {
            now,
            images: Hashes::new(),
            chains: Hashes::new(),
            documents: Hashes::new(),
            named_by: HashMap::new(),
            dead_names: HashSet::new(),
            removed: Vec::new(),
            dead_refs: HashMap::new(),
            ref_chains: Hashes::new(),
            indexes: Named::new(),
            decaying: Hashes::new(),
            damage: Vec::new(),
            reports,
        };
        self.read_names(&mut roots, first, watch).await?;
        self.read_refs(&mut roots, watch).await?;
        Ok(roots)
    }

    async fn read_names(
        &self,
        roots: &mut Roots,
        first: Option<&Roots>,
        watch: Watch<'_>,
    ) -> Result<(), ContentError> {
        let mut images: HashMap<[u8; 32], Image> = HashMap::new();
        let mut names = pin!(self.inventory.names());
        let mut read = 0;
        while let Some(Read { entry, said }) = names.try_next().await? {
            read += 1;
            watch(Step { doing: "reading names of images", done: read, total: 0 });
            match said {
                Ok((name, _)) => images.entry(entry.place.hash).or_default().add(entry, name),
                Err(problem) => {
                    let verdict = self.of_unreadable(roots, &entry, &problem);
                    if verdict == Verdict::Dead {
                        roots.dead_names.insert(entry);
                    }
                    roots.reports[0].count(&entry, verdict);
                }
            }
        }
        let mut used: HashMap<[u8; 32], i64> = HashMap::new();
        let mut uses = pin!(self.inventory.parts(Kind::Use));
        while let Some(part) = uses.try_next().await? {
            for entry in part.entries {
                let newest = used.entry(entry.place.hash).or_insert(entry.modified);
                *newest = entry.modified.max(*newest);
            }
        }
        self.judge(roots, first, images, &used);
        Ok(())
    }

    /// Applies the rules for names.
    fn judge(
        &self,
        roots: &mut Roots,
        first: Option<&Roots>,
        images: HashMap<[u8; 32], Image>,
        used: &HashMap<[u8; 32], i64>,
    ) {
        let images: Vec<([u8; 32], Image)> = images.into_iter().collect();
        let candidate = |(hash, image): &([u8; 32], Image)| {
            (image.published, used.get(hash).map_or(image.published, |used| image.published.max(*used)))
        };
        let times: Vec<(i64, i64)> = images.iter().map(candidate).collect();
        let candidates: Vec<Candidate<'_>> = images
            .iter()
            .zip(&times)
            .map(|((_, image), (published, used))| Candidate {
                reference: &image.reference,
                platform: &image.platform,
                published: *published,
                used: *used,
            })
            .collect();
        let verdicts = keep::judge(&self.rules.keep, &candidates, roots.now);
        for (((hash, image), (published, used)), verdict) in images.into_iter().zip(times).zip(verdicts) {
            let went = |entry: &Entry| first.is_none_or(|first| first.dead_names.contains(entry));
            let verdict = verdict.filter(|_| image.entries.iter().all(went));
            let becomes = if verdict.is_some() { Verdict::Dead } else { Verdict::Needed };
            image.entries.iter().for_each(|entry| roots.reports[0].count(entry, becomes));
            match verdict {
                None => {
                    roots.images.insert(hash);
                    if let Some(entry) = image.entries.first() {
                        roots.named_by.extend(image.chains.iter().map(|chain| (*chain, *entry)));
                    }
                    roots.chains.extend(image.chains);
                    roots.documents.extend(image.documents);
                }
                Some(why) => {
                    roots.dead_names.extend(image.entries);
                    let Image { reference, platform, .. } = image;
                    roots.removed.push(Removed { reference, platform, published, used, why });
                }
            }
        }
        roots.removed.sort_by(|a, b| (&a.reference, &a.platform).cmp(&(&b.reference, &b.platform)));
    }

    async fn read_refs(&self, roots: &mut Roots, watch: Watch<'_>) -> Result<(), ContentError> {
        let unnamed = roots.now.saturating_sub(self.rules.unnamed.as_secs().cast_signed());
        let mut publishers: HashSet<u64> = roots.named_by.values().map(|entry| entry.place.key).collect();
        let mut refs = pin!(self.inventory.refs());
        let mut read = 0;
        while let Some(Read { entry, said }) = refs.try_next().await? {
            read += 1;
            publishers.insert(entry.place.key);
            watch(Step { doing: "reading refs", done: read, total: 0 });
            let named = roots.chains.contains(&entry.place.hash);
            match said {
                Ok(said) if named || entry.modified >= unnamed => {
                    roots.ref_chains.insert(entry.place.hash);
                    roots.indexes.insert(*said.index.as_bytes(), entry);
                    roots.reports[1].count(&entry, if named { Verdict::Needed } else { Verdict::Young });
                }
                Ok(said) => {
                    roots.decaying.insert(*said.index.as_bytes());
                    roots.dead_refs.insert(entry, Some(*said.index.as_bytes()));
                    roots.reports[1].count(&entry, Verdict::Dead);
                }
                Err(problem) => {
                    let verdict = self.of_unreadable(roots, &entry, &problem);
                    if verdict == Verdict::Dead {
                        roots.dead_refs.insert(entry, None);
                    }
                    roots.reports[1].count(&entry, verdict);
                }
            }
        }
        let indexes = &roots.indexes;
        roots.decaying.retain(|digest| !indexes.contains_key(digest));
        self.miss_refs(roots, &publishers).await
    }

    /// A layer of a named image without a ref is damage: by its index a ref could be written again, and nothing else keeps that.
    async fn miss_refs(&self, roots: &mut Roots, publishers: &HashSet<u64>) -> Result<(), ContentError> {
        let objects = self.inventory.objects();
        let unread: Hashes = roots.dead_refs.keys().map(|entry| entry.place.hash).collect();
        let named = std::mem::take(&mut roots.named_by);
        let silent = |chain: &[u8; 32]| !roots.ref_chains.contains(chain) && !unread.contains(chain);
        let missed: Vec<([u8; 32], Entry)> = named.into_iter().filter(|(chain, _)| silent(chain)).collect();
        for (chain, name) in missed {
            // The listing may be late, and the name may have gone since.
            let unreadable = roots.damage.iter().any(|damage| damage.name.starts_with(&refs(&chain)));
            let keys = std::iter::once(name.place.key).chain(publishers.iter().copied());
            if unreadable
                || self.inventory.has_ref(&chain, keys).await?
                || objects.stat(&name.name()).await?.is_none()
            {
                continue;
            }
            let problem = format!("{} names the layer, and it has no ref", name.name());
            roots.damage.push(Damage { name: refs(&chain), problem, newer: false });
        }
        Ok(())
    }

    /// What becomes of a name or a ref that says nothing.
    fn of_unreadable(&self, roots: &mut Roots, entry: &Entry, problem: &Unreadable) -> Verdict {
        let newer = matches!(problem, Unreadable::Newer(_));
        roots.damage.push(Damage { name: entry.name(), problem: problem.to_string(), newer });
        match entry.modified < self.young_from(roots.now) && self.rules.ignore_damage && !newer {
            true => Verdict::Dead,
            false => Verdict::Young,
        }
    }
}

/// Where the refs of a chain are.
fn refs(chain: &[u8; 32]) -> String {
    layout::refs(&ChainId(digest_of(chain)))
}
