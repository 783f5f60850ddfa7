//! What layer images may take on the disk, all together (`layers.limit`).
//!
//! **Invariants.** A chunk that a reader waited for is kept only if there is room for it; where there is none, chunks that were not
//! read for long are given up first, else it is handed out and not kept. What must be here (metadata, and fills, which begin only
//! if all of a layer fits) is counted without being asked.
//!
//! **When it fails.** The count is an estimate between two measurements ([`Allowance::correct`]); it errs on the side of too much.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::cold::Cold;

/// How much room is made at once.
const STEP: u64 = 4 << 20;

/// See the module's page.
#[derive(Debug)]
pub struct Allowance {
    limit: Option<u64>,
    used: AtomicU64,
    /// Taken, but perhaps not in a file yet.
    flying: AtomicU64,
    open: Mutex<Vec<Weak<Cold>>>,
    making_room: Mutex<()>,
    pressed: AtomicBool,
    /// Reads had to make room for what they fetched.
    pub pressure: Notify,
    punched: AtomicU64,
}

/// The count at one moment, to be compared with what is measured from then on.
#[derive(Debug, Clone, Copy)]
pub struct Estimate {
    used: u64,
    flying: u64,
}

impl Allowance {
    /// So many bytes; without a limit everything is kept.
    pub fn new(limit: Option<u64>) -> Allowance {
        Allowance {
            limit,
            used: AtomicU64::new(0),
            flying: AtomicU64::new(0),
            open: Mutex::default(),
            making_room: Mutex::default(),
            pressed: AtomicBool::new(false),
            pressure: Notify::new(),
            punched: AtomicU64::new(0),
        }
    }

    /// So many bytes may be taken, if that is limited.
    pub fn limit(&self) -> Option<u64> {
        self.limit
    }

    /// So many are.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Acquire)
    }

    /// So many were given back chunk by chunk.
    pub fn punched(&self) -> u64 {
        self.punched.load(Ordering::Relaxed)
    }

    /// Whether reads had to make room since this was asked last.
    pub fn was_pressed(&self) -> bool {
        self.pressed.swap(false, Ordering::AcqRel)
    }

    /// To be asked before the files are measured.
    pub fn estimate(&self) -> Estimate {
        Estimate { used: self.used(), flying: self.flying.load(Ordering::Acquire) }
    }

    /// The files took so many bytes. What was taken since `before` counts on top of it.
    pub fn correct(&self, before: Estimate, measured: u64) {
        self.change(|used| (used + measured + before.flying).saturating_sub(before.used));
    }

    pub(super) fn register(&self, cold: &Arc<Cold>) {
        let mut open = self.open.lock();
        open.retain(|cold| cold.strong_count() > 0);
        open.push(Arc::downgrade(cold));
    }

    /// So many bytes are going to be written, come what may.
    pub(super) fn add(&self, bytes: u64) {
        self.flying.fetch_add(bytes, Ordering::AcqRel);
        self.used.fetch_add(bytes, Ordering::AcqRel);
    }

    /// So many bytes are going to be written if there is room for them, or if it can be made. Blocking.
    pub(super) fn take(&self, bytes: u64) -> bool {
        if self.try_take(bytes) {
            return true;
        }
        if !self.pressed.swap(true, Ordering::AcqRel) {
            self.pressure.notify_one();
        }
        let _one_at_a_time = self.making_room.lock();
        self.try_take(bytes) || {
            self.make_room(bytes.max(STEP.min(self.limit.unwrap_or(u64::MAX) / 16)));
            self.try_take(bytes)
        }
    }

    fn try_take(&self, bytes: u64) -> bool {
        let limit = self.limit.unwrap_or(u64::MAX);
        let fits = |used: u64| used.checked_add(bytes).filter(|used| *used <= limit);
        let taken = self.used.fetch_update(Ordering::AcqRel, Ordering::Acquire, fits).is_ok();
        if taken {
            self.flying.fetch_add(bytes, Ordering::AcqRel);
        }
        taken
    }

    /// What was taken is written, or will not be.
    pub(super) fn landed(&self, bytes: u64, is_written: bool) {
        self.flying.fetch_sub(bytes, Ordering::AcqRel);
        if !is_written {
            self.give(bytes);
        }
    }

    /// So many bytes were given back to the disk.
    pub(super) fn give_punched(&self, bytes: u64) {
        self.punched.fetch_add(bytes, Ordering::Relaxed);
        self.give(bytes);
    }

    /// So many bytes less are used.
    pub fn give(&self, bytes: u64) {
        self.change(|used| used.saturating_sub(bytes));
    }

    fn change(&self, change: impl Fn(u64) -> u64) {
        self.used.fetch_update(Ordering::AcqRel, Ordering::Acquire, |used| Some(change(used))).ok();
    }

    /// Gives chunks up until so many bytes are free, those of the layer that was read longest ago first; how many it were. Blocking.
    pub fn make_room(&self, bytes: u64) -> u64 {
        let mut open: Vec<Arc<Cold>> = self.open.lock().iter().filter_map(Weak::upgrade).collect();
        open.sort_by_key(|cold| cold.last_read());
        let mut freed = 0;
        for cold in open {
            if freed >= bytes {
                break;
            }
            freed += cold.give_up(bytes - freed);
        }
        freed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_taken_than_there_is() {
        let allowance = Allowance::new(Some(100));
        assert!(allowance.take(60) && !allowance.take(60) && allowance.was_pressed());
        allowance.landed(60, true);
        allowance.give_punched(10);
        assert!(allowance.take(50) && !allowance.was_pressed());
        allowance.landed(50, false);
        assert_eq!((allowance.used(), allowance.punched()), (50, 10));
        allowance.add(70);
        assert_eq!(allowance.used(), 120);
        assert!(Allowance::new(None).take(u64::MAX));
    }

    #[test]
    fn a_measurement_forgets_nothing_that_was_taken_meanwhile() {
        let allowance = Allowance::new(Some(1000));
        allowance.add(100);
        let before = allowance.estimate();
        assert!(allowance.take(30));
        // The 100 are in no file yet.
        allowance.correct(before, 500);
        assert_eq!(allowance.used(), 630);
    }
}
