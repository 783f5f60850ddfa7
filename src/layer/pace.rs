//! How much is fetched each second that nobody waits for.

use std::time::Duration;

use tokio::sync::{Mutex, MutexGuard};
use tokio::time::Instant;

/// A limit that all fills of a node share. What was fetched is waited for afterwards: the first chunk comes at once, and nothing is
/// saved up for later.
#[derive(Debug)]
pub(super) struct Pace {
    /// Bytes; `None` for no limit.
    rate: Option<u64>,
    /// When the next chunk may be fetched.
    next: Mutex<Instant>,
}

/// The turn to fetch one chunk; the next one waits for what is told of it.
#[derive(Debug)]
pub(super) struct Paced<'a>(Option<(u64, MutexGuard<'a, Instant>)>);

impl Pace {
    /// So many bytes each second, as they are on the disk; 0 for no limit.
    pub(super) fn new(rate: u64) -> Pace {
        Pace { rate: Some(rate).filter(|rate| *rate > 0), next: Mutex::new(Instant::now()) }
    }

    /// Returns when a chunk may be fetched.
    pub(super) async fn turn(&self) -> Paced<'_> {
        let Some(rate) = self.rate else { return Paced(None) };
        let next = self.next.lock().await;
        tokio::time::sleep_until(*next).await;
        Paced(Some((rate, next)))
    }
}

impl Paced<'_> {
    /// A chunk of so many bytes is fetched now.
    pub(super) fn spend(self, bytes: u32) {
        if let Some((rate, mut next)) = self.0 {
            *next = Instant::now() + Duration::from_secs_f64(f64::from(bytes) / rate as f64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn all_together_fetch_so_much_each_second() {
        let (pace, began) = (Pace::new(1000), Instant::now());
        let fetch = async || {
            for _ in 0..10 {
                pace.turn().await.spend(500);
            }
        };
        futures::join!(fetch(), fetch(), fetch());
        // The first one comes at once.
        assert_eq!(began.elapsed().as_millis(), 29 * 500);
        // A turn that is not used costs nobody anything, and a pause earns nothing.
        tokio::time::advance(Duration::from_secs(60)).await;
        let again = Instant::now();
        drop(pace.turn().await);
        fetch().await;
        assert_eq!(again.elapsed().as_millis(), 9 * 500);
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_limit_nobody_waits() {
        let (pace, began) = (Pace::new(0), Instant::now());
        let (one, other) = (pace.turn().await, pace.turn().await);
        one.spend(u32::MAX);
        other.spend(u32::MAX);
        assert!(began.elapsed().is_zero());
    }
}
