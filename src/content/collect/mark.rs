//! Which indexes are needed, and by them which chunks.

use std::pin::pin;

use futures::{FutureExt, StreamExt, TryStreamExt, stream};

use super::roots::Roots;
use super::{Collector, Damage, KindReport, Report, Step, Verdict, Watch};
use crate::content::ContentError;
use crate::content::buckets::Buckets;
use crate::content::index::IndexDigest;
use crate::content::inventory::{Entry, Part, Reading, Unreadable};
use crate::object::layout::Kind;

/// How many indexes are read at once: one may have 36 MiB, most have some kilobytes.
const READS: usize = 8;

/// The indexes that need chunks, and those that go.
#[derive(Debug, Default)]
pub(super) struct Indexes {
    /// With whether the chunks are kept only for another grace period.
    pub(super) needing: Vec<([u8; 32], bool)>,
    pub(super) dead: Vec<Entry>,
    pub(super) report: Option<KindReport>,
}

/// Chunks that are needed: of each id 63 bits, and whether only what goes needs it. Two chunks that share them are kept for each other.
pub(super) struct Marks(Buckets<u64>);

impl Marks {
    fn new(from: usize, most: usize) -> Marks {
        // Of the same chunk the mark that says "needed" is the smaller one.
        Marks(Buckets::new(from, most, |earlier, later| *earlier >> 1 == *later >> 1))
    }

    fn key(id: &[u8; 32]) -> u64 {
        let [_, bytes @ ..] = id.first_chunk::<9>().expect("an id has 32 bytes");
        u64::from_be_bytes(*bytes) & !1
    }

    fn add(&mut self, id: &[u8; 32], later: bool) {
        self.0.add(id[0], Marks::key(id) | u64::from(later));
    }

    fn verdict(&self, entry: &Entry, young_from: i64) -> Verdict {
        let (key, items) = (Marks::key(&entry.place.hash), self.0.items(entry.place.hash[0]));
        let at = items.partition_point(|mark| *mark < key);
        match items.get(at) {
            Some(mark) if *mark == key => Verdict::Needed,
            Some(mark) if *mark == key | 1 => Verdict::Later,
            _ if entry.modified >= young_from => Verdict::Young,
            _ => Verdict::Dead,
        }
    }
}

/// What is made of the parts of a listing.
pub(super) trait Sweep {
    /// A part of the chunks, with what becomes of each.
    fn part(
        &mut self,
        part: Vec<(Entry, Verdict)>,
        foreign: u64,
    ) -> impl Future<Output = Result<(), ContentError>> + Send;
    /// Whether to go on.
    fn goes_on(&self) -> bool;
}

impl Collector {
    /// What becomes of the indexes by these readings.
    pub(super) async fn indexes(
        &self,
        readings: &[&Roots],
        young_from: i64,
        watch: Watch<'_>,
    ) -> Result<Indexes, ContentError> {
        let named = |digest: &[u8; 32]| readings.iter().any(|roots| roots.indexes.contains_key(digest));
        let decaying = |digest: &[u8; 32]| readings.iter().any(|roots| roots.decaying.contains(digest));
        let mut found = Indexes::default();
        let mut report = KindReport::new(Kind::Index);
        // Not from the listing, which may be late.
        let mut needing: std::collections::HashMap<[u8; 32], bool> =
            readings.iter().flat_map(|roots| &roots.decaying).map(|digest| (*digest, true)).collect();
        needing.extend(readings.iter().flat_map(|roots| roots.indexes.keys()).map(|digest| (*digest, false)));
        let mut parts = pin!(self.inventory.parts(Kind::Index));
        let mut listed = 0;
        while let Some(part) = parts.try_next().await? {
            report.foreign += part.foreign;
            listed += 1;
            watch(Step { doing: "listing indexes", done: listed, total: 256 });
            let judged = stream::iter(part.entries)
                .map(|entry| {
                    self.judge_index(entry, named(&entry.place.hash), decaying(&entry.place.hash), young_from)
                        .boxed()
                })
                .buffered(READS);
            let judged: Vec<Option<(Entry, Verdict)>> = judged.try_collect().await?;
            for (entry, verdict) in judged.into_iter().flatten() {
                report.count(&entry, verdict);
                match verdict {
                    Verdict::Dead => found.dead.push(entry),
                    Verdict::Young => drop(needing.entry(entry.place.hash).or_insert(true)),
                    Verdict::Needed | Verdict::Later => {}
                }
            }
        }
        found.needing = needing.into_iter().collect();
        found.needing.sort_unstable();
        found.report = Some(report);
        Ok(found)
    }

    /// An index that no ref names goes only if it is old when it is looked at: a listing may not show that a collection has renewed
    /// it, and it is its age that keeps its chunks.
    async fn judge_index(
        &self,
        entry: Entry,
        named: bool,
        decaying: bool,
        young_from: i64,
    ) -> Result<Option<(Entry, Verdict)>, ContentError> {
        let verdict = match (named, decaying) {
            (true, _) => Verdict::Needed,
            (false, true) => Verdict::Later,
            (false, false) => match self.inventory.objects().stat(&entry.name()).await? {
                None => return Ok(None),
                Some(now) if now.modified >= young_from => Verdict::Young,
                Some(_) => Verdict::Dead,
            },
        };
        Ok(Some((entry, verdict)))
    }

    /// Marks the chunks that these indexes need, and hands over all chunks with what becomes of them; answers what could not be
    /// read, and in how many rounds it was done. What forbids to go on ([`Collector::refuse`]) ends it before.
    pub(super) async fn sweep(
        &self,
        readings: &[&Roots],
        needing: &[([u8; 32], bool)],
        young_from: i64,
        to: &mut impl Sweep,
        known: Option<&Report>,
        watch: Watch<'_>,
    ) -> Result<(Vec<Damage>, u32), ContentError> {
        let (mut from, mut rounds, mut damage) = (0, 0, Vec::new());
        while from < 256 && to.goes_on() {
            rounds += 1;
            let (marks, found) = self.mark(readings, needing, from, watch).await?;
            // Each round finds the same.
            damage = found;
            if self.refuse(&damage, known).is_err() {
                // What it needs is not known: no verdict is right.
                return Ok((damage, rounds));
            }
            let covered = marks.0.covered();
            let mut parts = pin!(self.inventory.parts_within(Kind::Chunk, covered.clone()));
            let mut done = covered.start as u64;
            while let Some(Part { entries, foreign }) = parts.try_next().await? {
                done += 1;
                watch(Step { doing: "looking at chunks", done, total: 256 });
                let judged = entries.into_iter().map(|entry| (entry, marks.verdict(&entry, young_from)));
                to.part(judged.collect(), foreign).await?;
                if !to.goes_on() {
                    break;
                }
            }
            from = covered.end;
        }
        Ok((damage, rounds))
    }

    async fn mark(
        &self,
        readings: &[&Roots],
        needing: &[([u8; 32], bool)],
        from: usize,
        watch: Watch<'_>,
    ) -> Result<(Marks, Vec<Damage>), ContentError> {
        let mut marks = Marks::new(from, self.most_marks);
        let mut damage = Vec::new();
        let read = |(digest, later): ([u8; 32], bool)| {
            async move {
                let read = self.inventory.index(IndexDigest::from_bytes(digest)).await?;
                Ok::<_, ContentError>((digest, later, read))
            }
            .boxed()
        };
        let mut indexes = stream::iter(needing.iter().copied()).map(read).buffer_unordered(READS);
        let mut done = 0;
        while let Some((digest, later, read)) = indexes.try_next().await? {
            done += 1;
            watch(Step { doing: "reading indexes", done, total: needing.len() as u64 });
            match read {
                Reading::Said(index) => {
                    index.chunks().for_each(|(_, chunk)| marks.add(chunk.id.as_bytes(), later));
                }
                Reading::Gone => damage.extend(self.missing_index(readings, digest).await?),
                Reading::Unreadable(problem) => {
                    let newer = matches!(problem, Unreadable::Newer(_));
                    let name = crate::object::layout::index(&digest);
                    damage.push(Damage { name, problem: problem.to_string(), newer });
                }
            }
        }
        marks.0.seal();
        Ok((marks, damage))
    }

    /// An index that is not there is damage only if a ref still names it.
    async fn missing_index(
        &self,
        readings: &[&Roots],
        digest: [u8; 32],
    ) -> Result<Option<Damage>, ContentError> {
        let Some(by) = readings.iter().find_map(|roots| roots.indexes.get(&digest)) else { return Ok(None) };
        if self.inventory.objects().stat(&by.name()).await?.is_none() {
            return Ok(None);
        }
        let problem = format!("{} names it, and it is not there", by.name());
        Ok(Some(Damage { name: crate::object::layout::index(&digest), problem, newer: false }))
    }
}
