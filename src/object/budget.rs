//! What may be asked twice: a budget for retries and hedges, so that an outage does not multiply the load that caused it.
//!
//! A bucket of tokens, one for each extra request. Every request that succeeds earns a tenth of a token, and one token comes
//! back each second: extra requests are at most a tenth of the useful ones, and a quiet store can always be asked again.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

const CAPACITY: f64 = 32.0;
const EARNED: f64 = 0.1;
const PER_SECOND: f64 = 1.0;
/// Hedges are a luxury: they leave this much to retries.
const KEPT_FOR_RETRIES: f64 = CAPACITY / 2.0;

#[derive(Debug)]
pub(super) struct Budget(Mutex<Tokens>);

#[derive(Debug)]
struct Tokens {
    left: f64,
    at: Option<Instant>,
}

impl Budget {
    pub(super) fn new() -> Budget {
        Budget(Mutex::new(Tokens { left: CAPACITY, at: None }))
    }

    /// A request has succeeded.
    pub(super) fn earn(&self) {
        let mut tokens = self.0.lock();
        tokens.left = (tokens.left + EARNED).min(CAPACITY);
    }

    /// Whether there may be one more retry; takes its token.
    pub(super) fn retry(&self) -> bool {
        self.take(0.0)
    }

    /// Whether there may be one more hedge; takes its token.
    pub(super) fn hedge(&self) -> bool {
        self.take(KEPT_FOR_RETRIES)
    }

    fn take(&self, kept: f64) -> bool {
        let mut tokens = self.0.lock();
        let now = Instant::now();
        let passed = tokens.at.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        tokens.at = Some(now);
        tokens.left = (tokens.left + passed.as_secs_f64() * PER_SECOND).min(CAPACITY);
        let enough = tokens.left >= kept + 1.0;
        if enough {
            tokens.left -= 1.0;
        }
        enough
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn runs_dry_and_fills_again() {
        let budget = Budget::new();
        assert_eq!((0..100).filter(|_| budget.hedge()).count(), 16);
        assert_eq!((0..100).filter(|_| budget.retry()).count(), 16);
        tokio::time::advance(Duration::from_secs(3)).await;
        assert_eq!((0..100).filter(|_| budget.retry()).count(), 3);
        (0..101).for_each(|_| budget.earn());
        assert_eq!((0..100).filter(|_| budget.retry()).count(), 10);
        tokio::time::advance(Duration::from_secs(1000)).await;
        assert_eq!((0..100).filter(|_| budget.retry()).count(), 32);
    }
}
