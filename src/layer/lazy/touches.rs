//! What is read of layer images, in the order of the first reads: what traces are made of.
//!
//! While nobody watches, a read costs one look at a number.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// Who watches what.
#[derive(Debug, Default)]
pub struct Touches {
    watches: AtomicUsize,
    by_serial: Mutex<HashMap<u64, Vec<Arc<Mutex<Seen>>>>>,
}

/// What was read of some layer images since somebody began to watch, until this is dropped.
#[derive(Debug)]
pub struct Watch {
    touches: Arc<Touches>,
    serials: Vec<u64>,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Debug)]
struct Seen {
    order: Vec<(u64, usize)>,
    known: HashSet<(u64, usize)>,
    most: usize,
    read: Instant,
    news: Instant,
}

impl Touches {
    /// Chunks of a layer image are being read.
    pub fn touched(&self, serial: u64, chunks: impl FnOnce() -> Range<usize>) {
        if self.watches.load(Ordering::Acquire) == 0 {
            return;
        }
        let watching = self.by_serial.lock().get(&serial).cloned().unwrap_or_default();
        if watching.is_empty() {
            return;
        }
        let (chunks, now) = (chunks(), Instant::now());
        for seen in watching {
            let mut seen = seen.lock();
            seen.read = now;
            for chunk in chunks.clone() {
                if seen.order.len() < seen.most && seen.known.insert((serial, chunk)) {
                    seen.order.push((serial, chunk));
                    seen.news = now;
                }
            }
        }
    }

    /// Watches reads of these layer images; remembers so many chunks at most.
    pub fn watch(self: &Arc<Self>, serials: Vec<u64>, most: usize) -> Watch {
        let (order, known, now) = (Vec::new(), HashSet::new(), Instant::now());
        let seen = Arc::new(Mutex::new(Seen { order, known, most, read: now, news: now }));
        let mut by_serial = self.by_serial.lock();
        for serial in &serials {
            by_serial.entry(*serial).or_default().push(Arc::clone(&seen));
        }
        drop(by_serial);
        self.watches.fetch_add(1, Ordering::AcqRel);
        Watch { touches: Arc::clone(self), serials, seen }
    }
}

impl Watch {
    /// The chunks that were read, each once, with the serials of their layer images.
    pub fn order(&self) -> Vec<(u64, usize)> {
        self.seen.lock().order.clone()
    }

    /// For how long nothing was read.
    pub fn quiet(&self) -> Duration {
        self.seen.lock().read.elapsed()
    }

    /// For how long nothing was read that had not been read before.
    pub fn without_news(&self) -> Duration {
        self.seen.lock().news.elapsed()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut by_serial = self.touches.by_serial.lock();
        for serial in &self.serials {
            if let Some(watching) = by_serial.get_mut(serial) {
                watching.retain(|seen| !Arc::ptr_eq(seen, &self.seen));
                if watching.is_empty() {
                    by_serial.remove(serial);
                }
            }
        }
        drop(by_serial);
        self.touches.watches.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn each_chunk_is_remembered_once_in_the_order_of_first_reads() {
        let touches = Arc::new(Touches::default());
        touches.touched(1, || unreachable!("nobody watches"));
        let watch = touches.watch(vec![1, 2], 5);
        let other = touches.watch(vec![2], 5);
        touches.touched(3, || unreachable!("nobody watches that one"));
        touches.touched(2, || 7..9);
        touches.touched(1, || 7..8);
        tokio::time::advance(Duration::from_secs(3)).await;
        touches.touched(2, || 8..9);
        assert_eq!(watch.order(), [(2, 7), (2, 8), (1, 7)]);
        assert_eq!((watch.quiet(), watch.without_news()), (Duration::ZERO, Duration::from_secs(3)));
        assert_eq!(other.order(), [(2, 7), (2, 8)]);
        drop(other);
        touches.touched(2, || 0..100);
        assert_eq!(watch.order(), [(2, 7), (2, 8), (1, 7), (2, 0), (2, 1)]);
        drop(watch);
        touches.touched(1, || unreachable!("nobody watches any more"));
        assert!(touches.by_serial.lock().is_empty());
    }
}
