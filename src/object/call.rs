//! One call on the store: its attempts, and when it gives up.
//!
//! A call waits for its turn (a limited number of requests is under way at once, reads and writes apart), asks the breaker, and
//! makes attempts until one is answered, until it may not retry any more, or until its time is over. It never takes longer
//! than that time. Pauses between attempts are random up to a limit that doubles ("full jitter"), so that many who
//! failed together do not come back together.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Instant, sleep_until, timeout_at};

use super::breaker::{Breaker, Pass, Refused};
use super::budget::Budget;
use super::failure::Failure;
use super::latency::Latency;
use super::stats::{Counters, Operation, Outcome};
use super::{ObjectError, StoreOptions};

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// What a probe may take that is made by somebody in a hurry: it should not wait for a store that is not there.
const PROBE: Duration = Duration::from_secs(1);
/// Silence of this length counts against the store although the caller gave up before the attempt's time was over.
const TELLING: Duration = Duration::from_secs(1);

/// Reads and writes do not stand in each other's queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lane {
    Read,
    Write,
}

/// What a caller does when the store is known not to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Patience {
    /// It has something else to do: tell it at once, or when the probe that is under way has ended.
    None,
    /// It needs the object: wait for the store until the time is over.
    UntilDeadline,
}

/// Who calls, and until when.
#[derive(Debug, Clone, Copy)]
pub(super) struct Call<'a> {
    /// For messages: `GET chunks/...`.
    pub(super) what: &'a str,
    pub(super) operation: Operation,
    pub(super) lane: Lane,
    pub(super) deadline: Instant,
    /// What one attempt may take.
    pub(super) attempt: Duration,
    pub(super) patience: Patience,
}

/// What all calls on one store share.
#[derive(Debug)]
pub(super) struct Conduct {
    reads: Semaphore,
    writes: Semaphore,
    attempts: u32,
    pub(super) breaker: Breaker,
    pub(super) budget: Budget,
    pub(super) latency: Latency,
    pub(super) counters: Counters,
}

impl Conduct {
    pub(super) fn new(options: &StoreOptions) -> Conduct {
        Conduct {
            reads: Semaphore::new(options.reads.max(1)),
            writes: Semaphore::new(options.writes.max(1)),
            attempts: options.attempts.max(1),
            breaker: Breaker::new(),
            budget: Budget::new(),
            latency: Latency::new(),
            counters: Counters::default(),
        }
    }

    /// Makes attempts until there is an answer or no hope.
    pub(super) async fn run<T, F>(&self, call: Call<'_>, attempt: impl Fn() -> F) -> Result<T, ObjectError>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        let began = Instant::now();
        let (mut tried, mut telling) = (0, false);
        loop {
            let (permit, pass) = self.turn(&call).await?;
            tried += 1;
            let outcome = self.once(&call, pass, &attempt).await;
            drop(permit);
            let why = match outcome {
                Ok(answer) => return Ok(answer),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Transient(why)) => {
                    telling = true;
                    why
                }
                Err(Failure::TooSoon(why)) => why,
            };
            if !self.pause(&call, tried).await {
                if telling {
                    self.breaker.call_failed(began, &why);
                }
                self.counters.unreachable.add(1);
                let took = began.elapsed().as_secs_f32();
                let times = if tried == 1 { String::new() } else { format!(", {tried} attempts") };
                return Err(ObjectError::Unreachable(format!(
                    "{}: {why} (after {took:.1} s{times})",
                    call.what
                )));
            }
            self.counters.retries.add(1);
        }
    }

    /// Waits for a free place and for the breaker's leave.
    async fn turn(&self, call: &Call<'_>) -> Result<(SemaphorePermit<'_>, Pass<'_>), ObjectError> {
        let lane = match call.lane {
            Lane::Read => &self.reads,
            Lane::Write => &self.writes,
        };
        loop {
            // Before the queue: those in it may be waiting for the breaker themselves.
            if let Some(refused) = self.breaker.refusal(call.patience) {
                self.wait_out(call, refused).await?;
                continue;
            }
            let permit = match timeout_at(call.deadline, lane.acquire()).await {
                Ok(permit) => permit.expect("the semaphore is never closed"),
                Err(_) => {
                    let why = format!("{}: too many other requests are under way", call.what);
                    return Err(ObjectError::Unreachable(why));
                }
            };
            match self.breaker.pass(call.patience) {
                Ok(pass) => return Ok((permit, pass)),
                Err(refused) => {
                    drop(permit);
                    self.wait_out(call, refused).await?;
                }
            }
        }
    }

    async fn wait_out(&self, call: &Call<'_>, refused: Refused) -> Result<(), ObjectError> {
        if refused.probing || call.patience == Patience::UntilDeadline {
            sleep_until(refused.again.min(call.deadline)).await;
            if Instant::now() < call.deadline {
                return Ok(());
            }
        }
        self.counters.refused.add(1);
        let why = format!("{}: not tried, since it did not answer others: {}", call.what, refused.why);
        Err(ObjectError::Unreachable(why))
    }

    async fn once<T, F>(
        &self,
        call: &Call<'_>,
        pass: Pass<'_>,
        attempt: &impl Fn() -> F,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        let began = Instant::now();
        let hurried = pass.is_probe() && call.patience == Patience::None;
        let allowed = if hurried { PROBE.min(call.attempt) } else { call.attempt };
        self.counters.requests.add(1);
        let outcome = match timeout_at(call.deadline.min(began + allowed), attempt()).await {
            Ok(outcome) => outcome,
            Err(_) => {
                let waited = began.elapsed();
                let why = format!("no answer within {:.1} s", waited.as_secs_f32());
                let telling = waited >= TELLING.min(allowed);
                Err(if telling { Failure::Transient(why) } else { Failure::TooSoon(why) })
            }
        };
        self.counters.timings.add(call.operation, Outcome::of(&outcome), began.elapsed());
        match &outcome {
            Err(Failure::Transient(why)) => {
                self.counters.failures.add(1);
                pass.failed(why);
            }
            Ok(_) => {
                self.budget.earn();
                pass.answered();
            }
            Err(Failure::Final(_)) => pass.answered(),
            Err(Failure::TooSoon(_)) => drop(pass),
        }
        outcome
    }

    /// Waits before the next attempt; `false` if there is none.
    async fn pause(&self, call: &Call<'_>, tried: u32) -> bool {
        if call.patience == Patience::None && tried >= self.attempts {
            return false;
        }
        loop {
            let longest = FIRST_PAUSE.saturating_mul(1 << tried.min(8)).min(LONGEST_PAUSE);
            let until = Instant::now() + longest.mul_f64(random());
            if until >= call.deadline {
                return false;
            }
            sleep_until(until).await;
            if self.budget.retry() {
                return true;
            }
            if call.patience == Patience::None {
                return false;
            }
        }
    }
}

/// Between 0 and 1. Good enough to spread requests over time.
fn random() -> f64 {
    let bits = u32::try_from(RandomState::new().build_hasher().finish() >> 32).unwrap_or(0);
    f64::from(bits) / f64::from(u32::MAX)
}
