//! What is given up again of a layer image that is not wholly here: chunks that were not read since the hand came by last.
//!
//! **Order.** A chunk is marked absent before its hole is punched, while nobody reads the file: whoever finds it absent fetches it,
//! whoever found it present has its bytes. A crash between the two leaves bytes that nobody takes for present; after a reboot
//! nothing is taken for present anyway.

use std::sync::atomic::Ordering;

use super::Cold;
use crate::sys::extent;

/// Nothing of the layer image is given up as long as this lives.
#[derive(Debug)]
#[must_use]
pub struct Hold<'a>(&'a Cold);

impl Hold<'_> {
    /// The same for as long as the layer image is open: something else than it may read its file.
    pub fn for_good(self) {
        std::mem::forget(self);
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        self.0.holds.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Cold {
    /// Whatever is fetched meanwhile is kept, and nothing is given up.
    pub fn hold(&self) -> Hold<'_> {
        // Nothing is being given up now.
        let _nothing_is_given_up = self.reading.read();
        self.holds.fetch_add(1, Ordering::AcqRel);
        Hold(self)
    }

    pub(super) fn is_held(&self) -> bool {
        self.holds.load(Ordering::Acquire) > 0
    }

    /// When it was read last, in milliseconds of its process.
    pub fn last_read(&self) -> u64 {
        self.last_read.load(Ordering::Relaxed)
    }

    /// These chunks are being read.
    pub(super) fn mark_read(&self, chunks: impl Iterator<Item = usize>) {
        self.last_read.store(super::clock(), Ordering::Relaxed);
        for at in chunks {
            self.seen.set(at);
        }
    }

    /// Whether a chunk was read since this was asked last.
    fn was_read(&self, at: usize) -> bool {
        self.seen.clear(at)
    }

    /// Gives up chunks of data until that frees so many bytes, if there are as many; how many it were. Metadata stays. Blocking.
    pub(in crate::layer) fn give_up(&self, bytes: u64) -> u64 {
        let Some(presence) = self.presence.as_ref().filter(|_| !self.data.is_empty()) else { return 0 };
        let mut freed = 0;
        // Once to forget what was read, once to take it.
        for _ in 0..2 * self.data.len() {
            if freed >= bytes || self.is_held() {
                break;
            }
            let at = self.data.start + self.hand.fetch_add(1, Ordering::Relaxed) % self.data.len();
            if presence.has(at) && !self.was_read(at) {
                freed += self.punch(at);
            }
        }
        freed
    }

    fn punch(&self, at: usize) -> u64 {
        let Some(presence) = &self.presence else { return 0 };
        let (offset, chunk) = self.index.chunk(at);
        let length = u64::from(chunk.length);
        let punched = {
            let _nobody_reads = self.reading.write();
            if !presence.has(at) || self.is_held() {
                return 0;
            }
            self.doubt(at);
            extent::punch(&self.file, offset..offset + length)
        };
        self.progress.evicted.fetch_add(length, Ordering::Relaxed);
        match punched {
            Ok(true) => {
                self.allowance.give_punched(length);
                length
            }
            Ok(false) => {
                tracing::warn!(
                    serial = self.serial,
                    "this file system punches no holes: chunks are not given up"
                );
                0
            }
            Err(error) => {
                tracing::warn!(serial = self.serial, %error, "a chunk cannot be given up");
                0
            }
        }
    }
}
