//! The circuit breaker: a store that does not answer is left alone for a while, and its users are told at once.
//!
//! *closed*: everything passes. *open*: nothing passes until a time. *probing*: that time has come and one request is under
//! way to see whether the store is back; everything else waits for what it finds. (Were it refused meanwhile, callers of which
//! several fail together at the first error would give up their own probe, every time, and the store would never be found
//! to be back.) Whatever the store answers, an object or "there
//! is none" or "you may not", shows that it is there; only silence and garbage count against it.
//!
//! Who cannot go on without the store ([`Patience::UntilDeadline`]) tries again sooner than who can.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use super::call::Patience;

/// So many failures with no success between them, over all callers, open the breaker.
const FAILURES: u32 = 8;
const FIRST_REST: Duration = Duration::from_secs(15);
/// For those who wait for the store.
const SHORT_REST: Duration = Duration::from_secs(5);
const LONGEST_REST: Duration = Duration::from_secs(30);
/// How soon to ask again while somebody else's probe is under way.
const PROBE_POLL: Duration = Duration::from_millis(100);

#[derive(Debug)]
enum State {
    Closed { failures: u32 },
    Open { since: Instant, rest: Duration, why: String },
    Probing { rest: Duration, why: String },
}

#[derive(Debug)]
struct Inner {
    state: State,
    last_success: Option<Instant>,
    opened: u64,
}

#[derive(Debug)]
pub(super) struct Breaker(Mutex<Inner>);

/// The breaker is open.
#[derive(Debug)]
pub(super) struct Refused {
    /// When it makes sense to ask again.
    pub(super) again: Instant,
    /// What opened it.
    pub(super) why: String,
    /// A probe is under way, so that this will be known soon.
    pub(super) probing: bool,
}

/// Leave to make one request; what came of it is told by [`Pass::answered`] or [`Pass::failed`].
#[derive(Debug)]
pub(super) struct Pass<'a> {
    breaker: &'a Breaker,
    probe: bool,
}

impl Breaker {
    pub(super) fn new() -> Breaker {
        Breaker(Mutex::new(Inner { state: State::Closed { failures: 0 }, last_success: None, opened: 0 }))
    }

    /// Leave for one request, or not.
    pub(super) fn pass(&self, patience: Patience) -> Result<Pass<'_>, Refused> {
        let mut inner = self.0.lock();
        if let Some(refused) = inner.refusal(patience) {
            return Err(refused);
        }
        let probe = match &inner.state {
            State::Closed { .. } => return Ok(Pass { breaker: self, probe: false }),
            State::Open { rest, why, .. } | State::Probing { rest, why } => {
                State::Probing { rest: *rest, why: why.clone() }
            }
        };
        inner.state = probe;
        Ok(Pass { breaker: self, probe: true })
    }

    /// Refusal without asking for leave: does not become the probe.
    pub(super) fn refusal(&self, patience: Patience) -> Option<Refused> {
        self.0.lock().refusal(patience)
    }

    /// A whole call has come to nothing, with all its attempts: one that had nobody's success beside it since it began is
    /// proof enough. So an unreachable store costs its users one time-out, not one for each of the failures.
    pub(super) fn call_failed(&self, began: Instant, why: &str) {
        let mut inner = self.0.lock();
        if inner.last_success.is_none_or(|at| at <= began) {
            inner.open(why);
        }
    }

    /// How long it stays open, or zero while a probe is under way; `None` when closed.
    pub(super) fn open_for(&self) -> Option<Duration> {
        match &self.0.lock().state {
            State::Closed { .. } => None,
            State::Open { since, rest, .. } => Some(rest.saturating_sub(since.elapsed())),
            State::Probing { .. } => Some(Duration::ZERO),
        }
    }

    /// How often it has opened.
    pub(super) fn opened(&self) -> u64 {
        self.0.lock().opened
    }
}

impl Inner {
    fn refusal(&self, patience: Patience) -> Option<Refused> {
        let now = Instant::now();
        let (again, why, probing) = match &self.state {
            State::Closed { .. } => return None,
            State::Open { since, rest, why } => match patience {
                Patience::None => (*since + *rest, why, false),
                Patience::UntilDeadline => (*since + SHORT_REST.min(*rest), why, false),
            },
            State::Probing { why, .. } => (now + PROBE_POLL, why, true),
        };
        (now < again).then(|| Refused { again, why: why.clone(), probing })
    }

    fn open(&mut self, why: &str) {
        let rest = match &self.state {
            State::Closed { .. } => FIRST_REST,
            // Those whose requests were under way when it opened have nothing new to say.
            State::Open { .. } => return,
            State::Probing { rest, .. } => (*rest * 2).min(LONGEST_REST),
        };
        self.opened += 1;
        self.state = State::Open { since: Instant::now(), rest, why: why.to_owned() };
    }
}

impl Pass<'_> {
    /// Whether this request decides if the breaker closes; it should not take long.
    pub(super) fn is_probe(&self) -> bool {
        self.probe
    }

    /// The store answered as stores do.
    pub(super) fn answered(mut self) {
        let mut inner = self.breaker.0.lock();
        inner.last_success = Some(Instant::now());
        inner.state = State::Closed { failures: 0 };
        self.probe = false;
    }

    /// It did not.
    pub(super) fn failed(mut self, why: &str) {
        let mut inner = self.breaker.0.lock();
        let probe = std::mem::take(&mut self.probe);
        match &mut inner.state {
            State::Closed { failures } => {
                *failures += 1;
                if *failures >= FAILURES {
                    inner.open(why);
                }
            }
            State::Probing { .. } if probe => inner.open(why),
            State::Open { .. } | State::Probing { .. } => {}
        }
    }
}

/// A request given up by its caller says nothing about the store; if it was the probe, the next one is.
impl Drop for Pass<'_> {
    fn drop(&mut self) {
        if !self.probe {
            return;
        }
        let mut inner = self.breaker.0.lock();
        if let State::Probing { rest, why } = &inner.state {
            let now = Instant::now();
            let over =
                State::Open { since: now.checked_sub(*rest).unwrap_or(now), rest: *rest, why: why.clone() };
            inner.state = over;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fail(breaker: &Breaker, times: u32) {
        for _ in 0..times {
            breaker.pass(Patience::None).unwrap().failed("refused");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn opens_after_failures_in_a_row_and_lets_one_probe_through() {
        let breaker = Breaker::new();
        fail(&breaker, FAILURES - 1);
        breaker.pass(Patience::None).unwrap().answered();
        fail(&breaker, FAILURES - 1);
        assert!(breaker.open_for().is_none());
        fail(&breaker, 1);
        assert_eq!(breaker.pass(Patience::None).unwrap_err().why, "refused");
        assert_eq!(breaker.open_for(), Some(FIRST_REST));

        tokio::time::advance(FIRST_REST).await;
        let probe = breaker.pass(Patience::None).unwrap();
        assert!(probe.is_probe());
        assert!(breaker.pass(Patience::None).is_err());
        assert!(breaker.refusal(Patience::None).is_some());
        probe.failed("still refused");
        assert_eq!(breaker.open_for(), Some(FIRST_REST * 2));

        tokio::time::advance(FIRST_REST * 2).await;
        breaker.pass(Patience::None).unwrap().answered();
        assert!(!breaker.pass(Patience::None).unwrap().is_probe());
        assert_eq!(breaker.opened(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn rests_no_longer_than_half_a_minute() {
        let breaker = Breaker::new();
        fail(&breaker, FAILURES);
        for _ in 0..8 {
            tokio::time::advance(LONGEST_REST).await;
            breaker.pass(Patience::None).unwrap().failed("refused");
        }
        assert_eq!(breaker.open_for(), Some(LONGEST_REST));
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_the_store_tries_sooner() {
        let breaker = Breaker::new();
        fail(&breaker, FAILURES);
        assert!(breaker.pass(Patience::UntilDeadline).is_err());
        tokio::time::advance(SHORT_REST).await;
        assert!(breaker.pass(Patience::None).is_err());
        breaker.pass(Patience::UntilDeadline).unwrap().answered();
        assert!(breaker.open_for().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_probe_given_up_is_made_again() {
        let breaker = Breaker::new();
        fail(&breaker, FAILURES);
        tokio::time::advance(FIRST_REST).await;
        drop(breaker.pass(Patience::None).unwrap());
        assert!(breaker.pass(Patience::None).unwrap().is_probe());
    }

    #[tokio::test(start_paused = true)]
    async fn one_whole_call_opens_it_unless_others_succeeded() {
        let breaker = Breaker::new();
        let began = Instant::now();
        tokio::time::advance(Duration::from_secs(1)).await;
        breaker.pass(Patience::None).unwrap().answered();
        breaker.call_failed(began, "one slow object");
        assert!(breaker.open_for().is_none());
        tokio::time::advance(Duration::from_secs(1)).await;
        breaker.call_failed(Instant::now(), "nobody is there");
        assert!(breaker.open_for().is_some());
    }

    /// Requests that were under way when it opened end after it: they neither prolong the rest nor end the probe.
    #[tokio::test(start_paused = true)]
    async fn late_failures_change_nothing_and_a_late_success_closes() {
        let breaker = Breaker::new();
        let (one, two, three) = (
            breaker.pass(Patience::None).unwrap(),
            breaker.pass(Patience::None).unwrap(),
            breaker.pass(Patience::None).unwrap(),
        );
        fail(&breaker, FAILURES);
        tokio::time::advance(FIRST_REST / 2).await;
        one.failed("late");
        assert_eq!(breaker.open_for(), Some(FIRST_REST / 2));
        tokio::time::advance(FIRST_REST).await;
        let probe = breaker.pass(Patience::None).unwrap();
        two.failed("later");
        assert_eq!(breaker.open_for(), Some(Duration::ZERO));
        three.answered();
        assert!(breaker.open_for().is_none());
        drop(probe);
        assert!(breaker.open_for().is_none());
    }
}
