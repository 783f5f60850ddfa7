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
use crate::sys::extent::Direct;

/// How many bytes are read back from the disk at once, at least a chunk, and how many times at once.
const RUN: usize = 2 << 20;
const VERIFIERS: usize = 2;

impl Cold {
    /// Whether the disk itself has the right bytes of all chunks; to be asked after the file was synced.
    pub async fn verify(&self) -> Result<(), LayerError> {
        let (next, began) = (AtomicUsize::new(0), Instant::now());
        future::try_join_all((0..VERIFIERS).map(|_| self.verify_runs(&next, began).boxed())).await.map(drop)
    }

    /// Looks at runs of chunks until none is left; where the next one begins is shared by those who do this at once.
    async fn verify_runs(&self, next: &AtomicUsize, began: Instant) -> Result<(), LayerError> {
        let io = |error| LayerError::at(&self.path, error);
        let mut disk = Direct::open(&self.file, RUN).map_err(io)?;
        let run_from = |first| (first < self.index.chunks().len()).then(|| self.run(first).end);
        while let Ok(first) = next.fetch_update(Ordering::AcqRel, Ordering::Acquire, run_from) {
            let _turn = self.gate.rest(self.serial, began).await;
            let (index, run) = (Arc::clone(&self.index), self.run(first));
            let bad = blocking(move || {
                let bad = first_bad(&mut disk, &index, run)?;
                Ok::<_, std::io::Error>((disk, bad))
            });
            let (back, bad) = bad.await.map_err(io)?;
            disk = back;
            if let Some(at) = bad {
                // To be fetched again.
                if let Some(presence) = &self.presence {
                    presence.clear(at);
                }
                let chunk = self.index.chunk(at).1.id;
                return Err(LayerError::Damaged { path: self.path.clone(), chunk });
            }
        }
        Ok(())
    }

    /// As many chunks from this one on as are read from the disk at once.
    fn run(&self, first: usize) -> Range<usize> {
        let begin = self.index.chunk(first).0;
        let fits = |at: &usize| {
            let (offset, chunk) = self.index.chunk(*at);
            offset + u64::from(chunk.length) - begin <= RUN as u64
        };
        first..first + 1 + (first + 1..self.index.chunks().len()).take_while(fits).count()
    }
}

/// The first chunk of a run that the disk has wrong.
fn first_bad(disk: &mut Direct, index: &LayerIndex, run: Range<usize>) -> std::io::Result<Option<usize>> {
    let (begin, (last, end)) = (index.chunk(run.start).0, index.chunk(run.end - 1));
    let within = |offset: u64| usize::try_from(offset - begin).map_err(std::io::Error::other);
    let bytes = disk.read(begin, within(last + u64::from(end.length))?)?;
    for at in run {
        let (offset, chunk) = index.chunk(at);
        let start = within(offset)?;
        if ChunkId::of(&bytes[start..start + chunk.length as usize]) != chunk.id {
            return Ok(Some(at));
        }
    }
    Ok(None)
}
