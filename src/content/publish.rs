//! Publishing a layer image: cut, upload what the store lacks, then the index, then the refs.
//!
//! **What.** [`ContentStore::publish`] reads the image once. A thread of its own reads, cuts and hashes (`cut`); for each
//! chunk the store is asked whether it has it, and only what it lacks is compressed and uploaded, many at once.
//!
//! **Invariants.**
//! * **C2** All chunks are durable before the index is written, and the index before the first ref.
//! * **C3** A chunk that is reused is made young, if it is not, and the ref follows before it is old again: who takes longer looks at
//!   all chunks once more. A collection that is under way is waited for ([`super::notice`]).
//! * At most [`super::Options::in_flight`] plain bytes are in memory at once, and their stored forms.
//!
//! **When it fails.** Dropped or killed at any point it leaves chunks that no ref names, which is harmless: repeated, it finds
//! them there and goes on behind them. Two publishers of one layer write the same chunks and the same index, if their images are of one
//! [`Form`], and each its own ref.

use std::collections::HashSet;
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::cut::{self, Piece};
use super::index::{IndexDigest, LayerIndex};
use super::notice::SETTLED;
use super::{CLOCKS_DIFFER, ContentError, ContentStore, LONGEST_LOOK, reference};
use crate::chunk::store::ChunkSink;
use crate::chunk::{ChunkError, ChunkId, ChunkRef, MAX_CHUNK};
use crate::image::{BLOCK, Facts, Form, Layout};
use crate::object::{Objects, layout};
use crate::oci::ChainId;

/// How many chunks wait between the reader and the uploads.
const QUEUE: usize = 8;
/// How often everything is looked at before it is given up.
const PASSES: u32 = 4;

/// What to publish.
#[derive(Debug, Clone, Copy)]
pub struct PublishRequest<'a> {
    /// The layer image.
    pub image: &'a File,
    /// What is known of it since it was built.
    pub facts: &'a Facts,
    /// The chains that this layer makes: for each one a ref is written.
    pub chains: &'a [ChainId],
}

/// How far a publish is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Bytes of the image that are in the store.
    pub done: u64,
    /// Bytes of the image, without its reserved parts.
    pub total: u64,
    /// Bytes uploaded, in stored form.
    pub uploaded: u64,
}

/// What was published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Published {
    /// The digest of the layer's index.
    pub index: IndexDigest,
    /// How many chunks the image has; one that it holds several times counts each time.
    pub chunks: u64,
    /// How many of them the store lacked.
    pub new_chunks: u64,
    /// Plain bytes of the chunks.
    pub bytes: u64,
    /// Plain bytes of those that the store lacked.
    pub new_bytes: u64,
    /// What they take in the store.
    pub stored_bytes: u64,
}

impl Published {
    /// What was published by this and by another look at the same.
    fn and_then(self, again: &Published) -> Published {
        Published {
            new_chunks: self.new_chunks + again.new_chunks,
            new_bytes: self.new_bytes + again.new_bytes,
            stored_bytes: self.stored_bytes + again.stored_bytes,
            ..self
        }
    }
}

/// The chunks in the order of the image.
struct Table {
    chunks: Vec<(u64, ChunkRef)>,
    seen: HashSet<ChunkId>,
    end: u64,
}

impl Table {
    fn new(layout: &Layout) -> Table {
        // The head is no hole to count: only its first block is read.
        Table { chunks: Vec::new(), seen: HashSet::new(), end: layout.data.start }
    }

    /// Whether it is the first with this id, and how long the hole before it is.
    fn add(&mut self, piece: &Piece) -> (bool, u64) {
        self.chunks.push((piece.offset, piece.chunk));
        let hole = piece.offset.saturating_sub(self.end);
        self.end = self.end.max(piece.offset + u64::from(piece.chunk.length));
        (self.seen.insert(piece.chunk.id), hole)
    }
}

/// What came of bringing all chunks into the store.
struct Pass {
    form: Form,
    chunks: Vec<(u64, ChunkRef)>,
    published: Published,
    /// When the oldest chunk was written that was left as it was.
    oldest: Option<i64>,
}

/// What was done so far.
struct Tally {
    progress: Progress,
    published: Published,
    oldest: Option<i64>,
}

impl Tally {
    fn new(total: u64) -> Tally {
        let published = Published {
            index: IndexDigest::from_bytes([0; 32]),
            chunks: 0,
            new_chunks: 0,
            bytes: 0,
            new_bytes: 0,
            stored_bytes: 0,
        };
        Tally { progress: Progress { total, ..Progress::default() }, published, oldest: None }
    }

    fn add(&mut self, kept: &Kept) -> Progress {
        let Kept { plain, hole, stored, written } = *kept;
        self.oldest = self.oldest.into_iter().chain(written).min();
        let (published, progress) = (&mut self.published, &mut self.progress);
        published.chunks += 1;
        published.bytes += plain;
        if let Some(stored) = stored {
            published.new_chunks += 1;
            published.new_bytes += plain;
            published.stored_bytes += stored;
            progress.uploaded += stored;
        }
        progress.done = (progress.done + hole + plain).min(progress.total);
        *progress
    }
}

/// What became of one chunk.
struct Kept {
    /// Its length.
    plain: u64,
    /// The length of the hole before it.
    hole: u64,
    /// What it takes in the store, if it was not there.
    stored: Option<u64>,
    /// When it was written, if it was there and is left as it is.
    written: Option<i64>,
}

impl Kept {
    /// The store has it already.
    fn again(piece: &Piece, hole: u64) -> Kept {
        Kept { plain: u64::from(piece.chunk.length), hole, stored: None, written: None }
    }
}

impl ContentStore {
    /// Publishes a layer image; durable on return. `progress` is called for every chunk.
    pub async fn publish(
        &self,
        request: PublishRequest<'_>,
        progress: &(dyn Fn(Progress) + Sync),
        cancel: &CancellationToken,
    ) -> Result<Published, ContentError> {
        let published = cancel.run_until_cancelled(self.publish_whole(request, progress)).await;
        published.unwrap_or(Err(ContentError::Cancelled))
    }

    async fn publish_whole(
        &self,
        request: PublishRequest<'_>,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<Published, ContentError> {
        let mut first: Option<Published> = None;
        let mut settled = false;
        for _ in 0..PASSES {
            let began = (Instant::now(), self.parts.objects.now());
            // What was told before is not told again.
            let silent = |_: Progress| ();
            let told: &(dyn Fn(Progress) + Sync) = if first.is_none() { progress } else { &silent };
            let Pass { form, chunks, published, oldest } = self.publish_chunks(request, told).await?;
            let index = LayerIndex::new(request.facts, form, chunks)?;
            let bytes = index.encode();
            let digest = IndexDigest::of(&bytes);
            let so_far = first.map_or(published, |before| before.and_then(&published));
            first = Some(Published { index: digest, ..so_far });
            // Written even if it is there: that makes it young, and whole should it be damaged.
            let name = layout::index(digest.as_bytes());
            self.parts.objects.put(&name, bytes.into()).await?;
            if self.is_late(&name, began, oldest).await? {
                continue;
            }
            if !settled && self.is_collected().await? {
                sleep(SETTLED).await;
                settled = true;
                continue;
            }
            self.publish_refs(request.chains, digest).await?;
            return Ok(Published { index: digest, ..so_far });
        }
        Err(ContentError::TooSlow)
    }

    /// Whether so much time has gone by that a collection may take what this pass relies on.
    async fn is_late(
        &self,
        index: &str,
        (began, by_clock): (Instant, i64),
        oldest: Option<i64>,
    ) -> Result<bool, ContentError> {
        let objects = &self.parts.objects;
        // Just written, so this is what the store's clock says.
        let Some(found) = objects.stat(index).await? else { return Ok(true) };
        let here = objects.now();
        let seconds = found.modified.abs_diff(here);
        if seconds > CLOCKS_DIFFER {
            return Err(ContentError::Clock { seconds });
        }
        let longest = LONGEST_LOOK.as_secs().cast_signed();
        let spared = longest + self.options.renew_after.as_secs().cast_signed();
        Ok(began.elapsed() > LONGEST_LOOK
            || here.saturating_sub(by_clock) > longest
            || oldest.is_some_and(|oldest| found.modified.saturating_sub(oldest) > spared))
    }

    async fn publish_refs(&self, chains: &[ChainId], index: IndexDigest) -> Result<(), ContentError> {
        for chain in chains {
            self.publish_ref(chain, index).await?;
        }
        if self.is_collected().await? {
            sleep(SETTLED).await;
            for chain in chains {
                let name = reference::name(chain, self.publisher());
                if self.parts.objects.stat(&name).await?.is_none() {
                    self.publish_ref(chain, index).await?;
                }
            }
        }
        Ok(())
    }

    /// Brings all chunks of the image into the store, and says where each is in the image.
    async fn publish_chunks(
        &self,
        request: PublishRequest<'_>,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<Pass, ContentError> {
        let layout = &request.facts.layout;
        let (sender, mut pieces) = mpsc::channel(QUEUE);
        let source = cut::Source {
            image: request.image.try_clone().map_err(ContentError::Image)?,
            layout: layout.clone(),
            // One chunk at least, or nothing would ever move.
            memory: Arc::new(Semaphore::new((self.options.in_flight.max(MAX_CHUNK) / cut::PERMIT) as usize)),
        };
        // Ends with `pieces`: at its next chunk it finds nobody there to take it.
        let reader = tokio::task::spawn_blocking(move || cut::read(&source, &sender));
        let keeper = Keeper {
            objects: self.parts.objects.clone(),
            chunks: Arc::clone(&self.parts.chunks),
            renew_after: self.options.renew_after,
            doubted: Arc::clone(&self.options.doubted),
        };
        // Tasks, so that compression is spread over the processors; they end with this call.
        let mut under_way = JoinSet::new();
        let mut table = Table::new(layout);
        let mut tally = Tally::new(BLOCK + (layout.metadata.end - layout.data.start));
        let mut reading = true;
        while reading || !under_way.is_empty() {
            tokio::select! {
                piece = pieces.recv(), if reading && under_way.len() < self.options.uploads.max(1) => match piece {
                    Some(piece) => {
                        let (is_first, hole) = table.add(&piece);
                        match is_first {
                            true => drop(under_way.spawn(keeper.clone().keep(piece, hole))),
                            false => progress(tally.add(&Kept::again(&piece, hole))),
                        }
                    }
                    None => reading = false,
                },
                Some(kept) = under_way.join_next() => progress(tally.add(&kept.map_err(lost)??)),
            }
        }
        // Without its word the pieces may have ended too early.
        let form = reader.await.map_err(lost)??;
        progress(Progress { done: tally.progress.total, ..tally.progress });
        Ok(Pass { form, chunks: table.chunks, published: tally.published, oldest: tally.oldest })
    }

    async fn publish_ref(&self, chain: &ChainId, index: IndexDigest) -> Result<(), ContentError> {
        let name = reference::name(chain, self.publisher());
        let bytes = reference::encode(chain, index, &self.parts.key);
        Ok(self.parts.objects.put(&name, bytes.into()).await?)
    }
}

/// A thread or task that did not come to its end: it panicked, or the runtime is going down.
fn lost(error: JoinError) -> ContentError {
    ContentError::Image(std::io::Error::other(error))
}

/// What a chunk on its way needs.
#[derive(Clone)]
struct Keeper {
    objects: Objects,
    chunks: Arc<dyn ChunkSink>,
    renew_after: Duration,
    doubted: Arc<HashSet<ChunkId>>,
}

impl Keeper {
    /// Sees to it that the store has this chunk and will keep it until a ref names it.
    async fn keep(self, piece: Piece, hole: u64) -> Result<Kept, ContentError> {
        let id = piece.chunk.id;
        let already = Kept::again(&piece, hole);
        let doubted = self.doubted.contains(&id);
        if !doubted && let Some(found) = self.objects.stat(&layout::chunk(id.as_bytes())).await? {
            let age = self.objects.now().saturating_sub(found.modified);
            if age < self.renew_after.as_secs().cast_signed() {
                return Ok(Kept { written: Some(found.modified), ..already });
            }
            match self.chunks.renew(id).await {
                Ok(()) => return Ok(already),
                // Collected since it was looked for, or of no use: then it is put.
                Err(ChunkError::Missing { .. } | ChunkError::Corrupt { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        // Cloned, not moved: the permit is held until the upload is over.
        let stored = self.chunks.put(id, piece.plain.clone()).await?;
        Ok(Kept { stored: Some(stored), ..already })
    }
}
