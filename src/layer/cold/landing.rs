//! How a checked chunk gets into the file, and whether the disk has it then.
//!
//! What a reader waits for, or will want next, goes through the page cache, from where its next reads of the same chunk are answered.
//! The rest of a fill goes past it: nobody reads it from there (a loop device with direct I/O does not), and pages that the kernel
//! has to find, clear and copy to take more of a processor than all else that is done with a chunk. It is read back at once, while
//! other chunks are on their way, instead of after the last one.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use tokio::sync::OwnedSemaphorePermit;

use super::Cold;
use crate::layer::LayerError;
use crate::layer::fill::Supplier;
use crate::sys::blocking;
use crate::sys::direct::Direct;
use crate::sys::extent;

/// After how many bytes the disk is given something to do: it would stand still until the end else.
const WRITEBACK: u64 = 16 << 20;

/// See the module's page.
#[derive(Debug, Clone)]
pub(super) enum Way {
    /// Through the page cache.
    Cached,
    /// Past it.
    Past(Arc<Direct>),
}

/// A chunk is being written.
pub(super) type Writing = tokio::task::JoinHandle<Result<(), LayerError>>;

/// A bit for each chunk.
#[derive(Debug)]
pub(super) struct Bits(Vec<AtomicU64>);

impl Bits {
    /// None is set.
    pub(super) fn new(chunks: usize) -> Bits {
        Bits((0..chunks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    pub(super) fn has(&self, at: usize) -> bool {
        self.0[at / 64].load(Ordering::Acquire) & (1 << (at % 64)) != 0
    }

    /// Writes nothing where nothing changes: other processors have the word, too.
    pub(super) fn set(&self, at: usize) {
        if !self.has(at) {
            self.0[at / 64].fetch_or(1 << (at % 64), Ordering::AcqRel);
        }
    }

    /// Whether it was set.
    pub(super) fn clear(&self, at: usize) -> bool {
        let bit = 1 << (at % 64);
        self.0[at / 64].fetch_and(!bit, Ordering::AcqRel) & bit != 0
    }

    pub(super) fn clear_all(&self) {
        self.0.iter().for_each(|word| word.store(0, Ordering::Release));
    }
}

impl Cold {
    /// Past the page cache, if the file can be opened so.
    pub(super) async fn way_past(&self) -> Way {
        let file = Arc::clone(&self.file);
        match blocking(move || Direct::open_to_write(&file)).await {
            Ok(direct) => Way::Past(Arc::new(direct)),
            Err(error) => {
                tracing::debug!(serial = self.serial, %error, "a layer is written through the page cache");
                Way::Cached
            }
        }
    }

    /// Holds a checked chunk in memory until it is written.
    pub(super) fn keep(
        self: &Arc<Self>,
        at: usize,
        (bytes, supplier): (Bytes, Supplier),
        way: Way,
        room: Option<OwnedSemaphorePermit>,
    ) -> Option<Writing> {
        {
            let mut memory = self.memory.lock();
            if self.has(at) || memory.contains_key(&at) {
                return None;
            }
            memory.insert(at, bytes.clone());
        }
        let this = Arc::clone(self);
        Some(tokio::task::spawn_blocking(move || {
            let written = this.write(&bytes, at, &way);
            match &written {
                Ok(()) => this.count(
                    at,
                    match supplier {
                        Supplier::Store => &this.progress.fetched,
                        Supplier::Node => &this.progress.shared,
                    },
                ),
                // Over the allowance, most probably.
                Err(error) if error.kind() == std::io::ErrorKind::QuotaExceeded => {}
                Err(error) if !this.full.swap(true, Ordering::AcqRel) => {
                    tracing::error!(serial = this.serial, %error, "a layer cannot be kept; it is read from the store as it is wanted");
                }
                Err(_) => {}
            }
            this.memory.lock().remove(&at);
            drop(room);
            written.map_err(|error| LayerError::at(&this.path, error))
        }))
    }

    /// Writes a checked chunk, if it may.
    fn write(&self, bytes: &Bytes, at: usize, way: &Way) -> std::io::Result<()> {
        let length = bytes.len() as u64;
        if self.is_distrusted() {
            return Err(std::io::Error::other("an fsync of it failed"));
        }
        if self.is_held() {
            self.allowance.add(length);
        } else if !self.allowance.take(length) {
            return Err(std::io::ErrorKind::QuotaExceeded.into());
        }
        let offset = self.index.chunk(at).0;
        let written = match way {
            Way::Cached => self.write_cached(bytes, offset),
            Way::Past(disk) => match disk.write(bytes, offset) {
                // The disk has longer blocks than ours.
                Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => {
                    self.write_cached(bytes, offset)
                }
                Err(error) => Err(error),
                Ok(()) => {
                    // What cannot be read, or is something else, is found at the end.
                    if disk.read(offset, bytes.len()).is_ok_and(|found| found.as_ref() == bytes) {
                        self.on_disk.set(at);
                    }
                    Ok(())
                }
            },
        };
        self.allowance.landed(length, written.is_ok());
        written
    }

    fn write_cached(&self, bytes: &Bytes, offset: u64) -> std::io::Result<()> {
        let file: &File = &self.file;
        file.write_all_at(bytes, offset)?;
        let length = bytes.len() as u64;
        if self.unwritten.fetch_add(length, Ordering::Relaxed) + length >= WRITEBACK {
            self.unwritten.store(0, Ordering::Relaxed);
            extent::begin_writing(file);
        }
        Ok(())
    }

    /// The file's bytes of a chunk are not to be believed any more.
    pub(super) fn doubt(&self, at: usize) {
        self.on_disk.clear(at);
        if let Some(presence) = &self.presence {
            presence.clear(at);
        }
    }
}
