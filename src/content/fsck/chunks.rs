//! All chunks, a part of them at a time.

use std::collections::HashMap;
use std::ops::RangeInclusive;

use futures::{FutureExt, StreamExt, TryStreamExt, stream};

use super::walk::{AT_ONCE, Walk};
use super::{Checker, Finding, Object, Problem};
use crate::chunk::{ChunkError, ChunkId, codec};
use crate::content::ContentError;
use crate::content::inventory::Reading;
use crate::object::layout::{Kind, Place};

/// A chunk to be looked at.
#[derive(Debug, Clone, Copy)]
struct Wanted {
    hash: [u8; 32],
    /// Its plain length, if an index names it.
    length: Option<u32>,
    /// What it takes in the store, if it was listed.
    size: Option<u64>,
}

impl Walk<'_> {
    pub(super) async fn chunks(&mut self) -> Result<(), ContentError> {
        let total = self.chunk_counts.iter().sum();
        let mut done = 0;
        for range in ranges(&self.chunk_counts, self.checker.at_once) {
            let named = self.named(&range).await?;
            let wanted = self.wanted(named, range).await?;
            done = self.look(wanted, done, total).await?;
        }
        self.report.count("chunk", done);
        self.attribute().await
    }

    /// The chunks that indexes name and whose ids begin with these bytes.
    async fn named(&self, range: &RangeInclusive<u8>) -> Result<HashMap<[u8; 32], u32>, ContentError> {
        let mut named = HashMap::new();
        for digest in &self.readable {
            // One that is gone meanwhile names nothing any more.
            let Reading::Said(index) = self.checker.inventory.index(*digest).await? else { continue };
            for (_, chunk) in index.chunks().filter(|(_, chunk)| range.contains(&chunk.id.as_bytes()[0])) {
                named.insert(*chunk.id.as_bytes(), chunk.length);
            }
        }
        Ok(named)
    }

    /// These, and those that are there without being named.
    async fn wanted(
        &mut self,
        mut named: HashMap<[u8; 32], u32>,
        range: RangeInclusive<u8>,
    ) -> Result<Vec<Wanted>, ContentError> {
        let mut wanted = Vec::with_capacity(named.len());
        let checker = self.checker;
        let firsts = usize::from(*range.start())..usize::from(*range.end()) + 1;
        let mut parts = std::pin::pin!(checker.inventory.parts_within(Kind::Chunk, firsts));
        while let Some(part) = parts.try_next().await? {
            self.report.foreign += part.foreign;
            wanted.extend(part.entries.iter().map(|entry| {
                let hash = entry.place.hash;
                Wanted { hash, length: named.remove(&hash), size: Some(entry.size) }
            }));
        }
        wanted.extend(named.into_iter().map(|(hash, length)| Wanted {
            hash,
            length: Some(length),
            size: None,
        }));
        Ok(wanted)
    }

    /// Answers how many chunks have been looked at.
    async fn look(&mut self, wanted: Vec<Wanted>, before: u64, total: u64) -> Result<u64, ContentError> {
        let (checker, mut done) = (self.checker, before);
        let mut found = Vec::new();
        {
            let pace = &self.pace;
            let look = |wanted: Wanted| {
                // Boxed: the compiler cannot tell otherwise that the whole may move between threads.
                async move {
                    let (problem, bytes) = match checker.options.quick {
                        true => (checker.quick_problem(wanted).await?, 0),
                        false => checker.chunk_problem(wanted.hash, wanted.length).await?,
                    };
                    pace.spent(bytes).await;
                    Ok::<_, ContentError>((wanted, problem, bytes))
                }
                .boxed()
            };
            let mut looked = stream::iter(wanted).map(look).buffer_unordered(AT_ONCE);
            while let Some((wanted, problem, bytes)) = looked.try_next().await? {
                done += 1;
                self.report.bytes += bytes;
                // What is not named and not there is nothing.
                if let Some(problem) = problem.filter(|p| wanted.length.is_some() || *p != Problem::Missing) {
                    found.push((wanted, problem));
                }
                if done % 64 == 0 {
                    self.show("chunks", done, total);
                }
            }
        }
        for (wanted, problem) in found {
            let object = Object::Kept(Kind::Chunk, Place { hash: wanted.hash, key: 0 });
            let finding = self.finding(object, problem, Vec::new(), Vec::new());
            self.report.add(Finding { length: wanted.length, ..finding });
        }
        self.show("chunks", done, total);
        Ok(done)
    }

    /// Which layers and images the chunks that were found touch; those that are missing and touch nothing any more are no
    /// findings.
    async fn attribute(&mut self) -> Result<(), ContentError> {
        let is_chunk = |finding: &Finding| matches!(finding.object, Object::Kept(Kind::Chunk, _));
        let (mut chunks, others): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.report.findings).into_iter().partition(is_chunk);
        self.report.findings = others;
        if chunks.is_empty() {
            return Ok(());
        }
        let place = |(number, finding): (usize, &Finding)| match finding.object {
            Object::Kept(_, place) => Some((place.hash, number)),
            Object::Description => None,
        };
        let places: HashMap<[u8; 32], usize> = chunks.iter().enumerate().filter_map(place).collect();
        let mut stays = vec![false; chunks.len()];
        for digest in &self.readable {
            let Reading::Said(index) = self.checker.inventory.index(*digest).await? else { continue };
            let mut touched: Vec<usize> =
                index.chunks().filter_map(|(_, chunk)| places.get(chunk.id.as_bytes()).copied()).collect();
            touched.sort_unstable();
            touched.dedup();
            if touched.is_empty() {
                continue;
            }
            let is_named = self.any_ref_stays(digest.as_bytes()).await?;
            for number in touched {
                stays[number] |= is_named;
                self.touch(&mut chunks[number], digest.as_bytes(), Some(&index));
            }
        }
        let kept = chunks.into_iter().zip(stays);
        let kept = kept.filter(|(finding, stays)| *stays || finding.problem != Problem::Missing);
        self.report.findings.extend(kept.map(|(finding, _)| finding));
        Ok(())
    }
}

/// Ranges of first bytes with at most so many chunks each, but for those of a single byte.
fn ranges(counts: &[u64; 256], at_once: u64) -> Vec<RangeInclusive<u8>> {
    let (mut ranges, mut from, mut sum) = (Vec::new(), 0_u8, 0);
    for first in 0..=u8::MAX {
        let count = counts[usize::from(first)];
        if sum > 0 && sum + count > at_once {
            ranges.push(from..=first - 1);
            (from, sum) = (first, 0);
        }
        sum += count;
    }
    ranges.push(from..=u8::MAX);
    ranges
}

impl Checker {
    /// What is wrong with a chunk as far as its size tells.
    async fn quick_problem(&self, wanted: Wanted) -> Result<Option<Problem>, ContentError> {
        let size = match wanted.size {
            Some(size) => size,
            None => {
                match self.objects().stat(&Kind::Chunk.object(&Place { hash: wanted.hash, key: 0 })).await? {
                    Some(found) => found.size,
                    None => return Ok(Some(Problem::Missing)),
                }
            }
        };
        let can_be = codec::can_have(size, wanted.length);
        Ok((!can_be).then(|| Problem::Damaged(format!("{size} bytes, which no chunk of its length has"))))
    }

    /// What is wrong with a chunk, and how many bytes were read for it.
    pub(super) async fn chunk_problem(
        &self,
        hash: [u8; 32],
        length: Option<u32>,
    ) -> Result<(Option<Problem>, u64), ContentError> {
        let id = ChunkId::from_bytes(hash);
        let mut examined = self.chunks.examine(id, length).await;
        if matches!(examined, Err(ChunkError::Corrupt { .. })) {
            // The wire may have spoilt it.
            examined = self.chunks.examine(id, length).await;
        }
        match examined {
            Ok(bytes) => Ok((None, bytes)),
            Err(ChunkError::Missing { .. }) => Ok((Some(Problem::Missing), 0)),
            Err(ChunkError::Corrupt { problem, .. }) => {
                Ok((Some(Problem::Damaged(problem)), u64::from(length.unwrap_or(0))))
            }
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_is_looked_at_in_parts_that_fit() {
        let mut counts = [0; 256];
        assert_eq!(ranges(&counts, 10), [0..=255]);
        counts.fill(4);
        let parts = ranges(&counts, 10);
        assert_eq!((parts.len(), parts[0].clone(), parts[127].clone()), (128, 0..=1, 254..=255));
        counts[7] = 1000;
        let parts = ranges(&counts, 10);
        assert!(parts.contains(&(7..=7)) && parts.contains(&(6..=6)), "{parts:?}");
        let covered: Vec<u8> = parts.into_iter().flatten().collect();
        assert_eq!(covered, (0..=255).collect::<Vec<u8>>());
    }
}
