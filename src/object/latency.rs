//! How long the store takes to begin an answer, and when it is worth asking a second time.

use std::time::Duration;

use parking_lot::Mutex;

/// So many recent answers are looked at.
const RECENT: usize = 128;
/// Fewer say nothing.
const ENOUGH: usize = 16;
/// The percentile is looked up anew after so many answers.
const EVERY: usize = 16;
const UNKNOWN: Duration = Duration::from_secs(1);
const SHORTEST: Duration = Duration::from_millis(20);
const LONGEST: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub(super) struct Latency(Mutex<Ring>);

#[derive(Debug)]
struct Ring {
    recent: Vec<Duration>,
    next: usize,
    delay: Duration,
}

impl Latency {
    pub(super) fn new() -> Latency {
        Latency(Mutex::new(Ring { recent: Vec::with_capacity(RECENT), next: 0, delay: UNKNOWN }))
    }

    /// An answer began after `took`.
    pub(super) fn record(&self, took: Duration) {
        let mut ring = self.0.lock();
        let at = ring.next % RECENT;
        match ring.recent.get_mut(at) {
            Some(slot) => *slot = took,
            None => ring.recent.push(took),
        }
        ring.next += 1;
        if ring.recent.len() >= ENOUGH && ring.next.is_multiple_of(EVERY) {
            let mut sorted = ring.recent.clone();
            sorted.sort_unstable();
            let p95 = sorted[sorted.len() * 95 / 100];
            ring.delay = (p95 + p95 / 2).clamp(SHORTEST, LONGEST);
        }
    }

    /// After how long without an answer a second request is worth its token: half as long again as all but one in twenty of
    /// the recent answers took, within bounds.
    pub(super) fn hedge_after(&self) -> Duration {
        self.0.lock().delay
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_delay_follows_what_was_seen() {
        let latency = Latency::new();
        assert_eq!(latency.hedge_after(), UNKNOWN);
        (1..=100).for_each(|ms| latency.record(Duration::from_millis(ms)));
        assert!((130..=150).contains(&latency.hedge_after().as_millis()), "{:?}", latency.hedge_after());
        (0..200).for_each(|_| latency.record(Duration::from_micros(300)));
        assert_eq!(latency.hedge_after(), SHORTEST);
        (0..200).for_each(|_| latency.record(Duration::from_secs(30)));
        assert_eq!(latency.hedge_after(), LONGEST);
    }
}
