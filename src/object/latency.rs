//! How long the store takes to begin an answer, and when it is worth asking a second time.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// So many recent answers are looked at.
const RECENT: usize = 128;
/// Fewer say nothing.
const ENOUGH: usize = 16;
/// The percentile is looked up anew after so many answers.
const EVERY: usize = 16;
const UNKNOWN: Duration = Duration::from_secs(1);
const SHORTEST: Duration = Duration::from_millis(20);
const LONGEST: Duration = Duration::from_secs(2);
/// For how long the quickest answer tells how far the store is, once and once more.
const EPOCH: Duration = Duration::from_secs(600);

#[derive(Debug)]
pub(super) struct Latency(Mutex<Ring>);

#[derive(Debug)]
struct Ring {
    recent: Vec<Duration>,
    next: usize,
    delay: Duration,
    /// Of this epoch, since then, and of the one before.
    quickest: (Duration, Instant),
    before: Duration,
}

impl Latency {
    pub(super) fn new() -> Latency {
        let recent = Vec::with_capacity(RECENT);
        let quickest = (Duration::MAX, Instant::now());
        Latency(Mutex::new(Ring { recent, next: 0, delay: UNKNOWN, quickest, before: Duration::MAX }))
    }

    /// An answer began after `took`.
    pub(super) fn record(&self, took: Duration) {
        let mut ring = self.0.lock();
        if ring.quickest.1.elapsed() >= EPOCH {
            ring.before = std::mem::replace(&mut ring.quickest, (Duration::MAX, Instant::now())).0;
        }
        ring.quickest.0 = ring.quickest.0.min(took);
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

    /// The time in which the store has begun its quickest answer of late: no wait behind others is in it, if there was a moment without any.
    pub(super) fn quickest(&self) -> Option<Duration> {
        let ring = self.0.lock();
        Some(ring.quickest.0.min(ring.before)).filter(|quickest| *quickest < Duration::MAX)
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

    #[tokio::test(start_paused = true)]
    async fn the_quickest_answer_counts_for_an_epoch_or_two() {
        let (latency, ms) = (Latency::new(), Duration::from_millis);
        assert_eq!(latency.quickest(), None);
        for took in [30, 20, 90] {
            latency.record(ms(took));
        }
        assert_eq!(latency.quickest(), Some(ms(20)));
        tokio::time::advance(EPOCH).await;
        latency.record(ms(300));
        assert_eq!(latency.quickest(), Some(ms(20)));
        tokio::time::advance(EPOCH).await;
        latency.record(ms(310));
        assert_eq!(latency.quickest(), Some(ms(300)));
    }
}
