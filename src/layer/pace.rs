//! How much is fetched each second that nobody waits for.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// How much later than its time a chunk may be taken for what is behind it to keep its own: timers are late by a millisecond or two.
const LATE: Duration = Duration::from_millis(10);

/// A limit that all fills of a node share. What was fetched is waited for afterwards: the first chunk comes at once, and nothing is
/// saved up for later.
#[derive(Debug)]
pub(super) struct Pace {
    /// Bytes; `None` for no limit.
    rate: Option<u64>,
    /// When the next chunk may be taken.
    next: Mutex<Instant>,
}

impl Pace {
    /// So many bytes each second, as they are on the disk; 0 for no limit.
    pub(super) fn new(rate: u64) -> Pace {
        Pace { rate: Some(rate).filter(|rate| *rate > 0), next: Mutex::new(Instant::now()) }
    }

    pub(super) fn is_limited(&self) -> bool {
        self.rate.is_some()
    }

    /// Returns when it seems to be time to take a chunk; somebody else may be quicker.
    pub(super) async fn due(&self) {
        while self.rate.is_some() {
            let next = *self.next.lock();
            if next <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(next).await;
        }
    }

    /// Takes what `take` finds, which also says how many bytes of it have to be fetched, if it is time.
    pub(super) fn take<T>(&self, take: impl FnOnce() -> (T, u32)) -> Option<(T, u32)> {
        let Some(rate) = self.rate else { return Some(take()) };
        let (mut next, now) = (self.next.lock(), Instant::now());
        if *next > now {
            return None;
        }
        let (taken, bytes) = take();
        if bytes > 0 {
            let from = now.checked_sub(LATE).map_or(now, |late| late.max(*next));
            *next = from + Duration::from_secs_f64(f64::from(bytes) / rate as f64);
        }
        Some((taken, bytes))
    }

    /// So many of the bytes that were taken had not to be fetched.
    pub(super) fn give_back(&self, bytes: u32) {
        let Some(rate) = self.rate else { return };
        let mut next = self.next.lock();
        *next = next.checked_sub(Duration::from_secs_f64(f64::from(bytes) / rate as f64)).unwrap_or(*next);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn fetch(pace: &Pace, chunks: usize, bytes: u32) {
        for _ in 0..chunks {
            loop {
                pace.due().await;
                if pace.take(|| ((), bytes)).is_some() {
                    break;
                }
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn all_together_fetch_so_much_each_second() {
        let (pace, began) = (Pace::new(1000), Instant::now());
        futures::join!(fetch(&pace, 10, 500), fetch(&pace, 10, 500), fetch(&pace, 10, 500));
        // The first one comes at once.
        assert_eq!(began.elapsed().as_millis(), 29 * 500);
        // What need not be fetched costs nobody anything, and a pause earns next to nothing.
        tokio::time::advance(Duration::from_secs(60)).await;
        let again = Instant::now();
        fetch(&pace, 100, 0).await;
        fetch(&pace, 10, 500).await;
        assert_eq!(again.elapsed(), Duration::from_millis(9 * 500) - LATE);
    }

    #[tokio::test(start_paused = true)]
    async fn quick_chunks_are_not_slowed_by_late_timers() {
        let (pace, began) = (Pace::new(1 << 30), Instant::now());
        fetch(&pace, 2048, 512 << 10).await;
        let took = began.elapsed().as_secs_f64();
        assert!((0.98..1.02).contains(&took), "{took} s for a GiB at a GiB each second");
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_limit_nobody_waits() {
        let (pace, began) = (Pace::new(0), Instant::now());
        fetch(&pace, 100, u32::MAX).await;
        assert!(began.elapsed().is_zero() && !pace.is_limited());
    }
}
