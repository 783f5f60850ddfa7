//! Reading back what was written, past the page cache: whether the disk has it.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures::{FutureExt, future};
use tokio::time::Instant;

use super::Cold;
use crate::chunk::ChunkId;
use crate::content::index::LayerIndex;
use crate::layer::LayerError;
use crate::sys::blocking;
use crate::sys::direct::Direct;

/// How many bytes are read back from the disk at once, at least a chunk, and how many times at once.
const RUN: u64 = 2 << 20;
const VERIFIERS: usize = 2;

impl Cold {
    /// Whether the disk itself has the right bytes of all chunks of which that was not seen when they were written; to be asked after
    /// the file was synced.
    pub async fn verify(&self) -> Result<(), LayerError> {
        let (next, began) = (AtomicUsize::new(0), Instant::now());
        future::try_join_all((0..VERIFIERS).map(|_| self.verify_runs(&next, began).boxed())).await.map(drop)
    }

    /// Looks at runs of chunks until none is left; where the next one is looked for is shared by those who do this at once.
    async fn verify_runs(&self, next: &AtomicUsize, began: Instant) -> Result<(), LayerError> {
        let io = |error| LayerError::at(&self.path, error);
        let disk = Arc::new(Direct::open(&self.file).map_err(io)?);
        let behind = |from| self.run_from(from).map(|run| run.end);
        while let Ok(from) = next.fetch_update(Ordering::AcqRel, Ordering::Acquire, behind) {
            let Some(run) = self.run_from(from) else { break };
            let _turn = self.gate.rest(self.serial, began, None).await;
            let (index, disk) = (Arc::clone(&self.index), Arc::clone(&disk));
            if let Some(at) = blocking(move || first_bad(&disk, &index, run)).await.map_err(io)? {
                // To be fetched again.
                self.doubt(at);
                let chunk = self.index.chunk(at).1.id;
                return Err(LayerError::Damaged { path: self.path.clone(), chunk });
            }
        }
        Ok(())
    }

    /// The first chunks from this one on that are to be looked at, as many as are read from the disk at once.
    fn run_from(&self, from: usize) -> Option<Range<usize>> {
        let count = self.index.chunks().len();
        let first = (from..count).find(|at| !self.on_disk.has(*at))?;
        let begin = self.index.chunk(first).0;
        let belongs = |at: &usize| {
            let (offset, chunk) = self.index.chunk(*at);
            !self.on_disk.has(*at) && offset + u64::from(chunk.length) - begin <= RUN
        };
        Some(first..first + 1 + (first + 1..count).take_while(belongs).count())
    }
}

/// The first chunk of a run that the disk has wrong.
fn first_bad(disk: &Direct, index: &LayerIndex, run: Range<usize>) -> std::io::Result<Option<usize>> {
    let (begin, (last, end)) = (index.chunk(run.start).0, index.chunk(run.end - 1));
    let within = |offset: u64| usize::try_from(offset - begin).map_err(std::io::Error::other);
    let found = disk.read(begin, within(last + u64::from(end.length))?)?;
    for at in run {
        let (offset, chunk) = index.chunk(at);
        let start = within(offset)?;
        if ChunkId::of(&found.as_ref()[start..start + chunk.length as usize]) != chunk.id {
            return Ok(Some(at));
        }
    }
    Ok(None)
}
