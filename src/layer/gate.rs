//! Who may fetch when: reads that somebody waits for, before what is fetched because it will be wanted.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit};
use tokio::time::Instant;

use crate::chunk::BLOCK;

/// How many bytes of chunks that somebody waits for may be on their way or not written yet, all layers together.
const ROOM_DEMAND: u32 = 24 << 20;
/// The same for those that nobody waits for yet.
const ROOM_AHEAD: u32 = 24 << 20;
/// How long after the last read that waited others stand back: a program that starts reads again and again.
const CALM: Duration = Duration::from_secs(1);
/// How long what was only just found stands back for a container that may be about to start.
const HEAD_START: Duration = Duration::from_secs(2);
/// How often others look whether it is their turn.
const LOOK: Duration = Duration::from_millis(50);
/// How long a fill stands back for readers altogether: from then on one chunk at a time is fetched, whoever reads, so that all comes to
/// an end.
const PATIENCE: Duration = Duration::from_secs(30);
/// How many chunks that will be read next are fetched while somebody reads, and how many others.
const NEXT: usize = 16;
const REST: usize = 1;

/// See the module's page.
#[derive(Debug)]
pub struct Gate {
    waited_for: AtomicUsize,
    /// When somebody last waited, or may have begun to.
    busy: Mutex<Option<Instant>>,
    next: Semaphore,
    rest: Semaphore,
    /// Layers of which only what will be read next is fetched; by how many.
    held: Mutex<HashMap<u64, usize>>,
    demand: Arc<Semaphore>,
    ahead: Arc<Semaphore>,
}

impl Default for Gate {
    fn default() -> Gate {
        let room = |bytes: u32| Arc::new(Semaphore::new((bytes / BLOCK) as usize));
        let (demand, ahead) = (room(ROOM_DEMAND), room(ROOM_AHEAD));
        let (next, rest) = (Semaphore::new(NEXT), Semaphore::new(REST));
        let (waited_for, busy) = (AtomicUsize::new(0), Mutex::default());
        Gate { waited_for, busy, next, rest, held: Mutex::default(), demand, ahead }
    }
}

/// Whether somebody waits for a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Urgency {
    /// A read does.
    Demand,
    /// It will be wanted.
    Ahead,
}

/// Somebody may fetch as long as this lives.
#[derive(Debug)]
pub struct Turn<'a> {
    _permit: Option<SemaphorePermit<'a>>,
}

/// Some layers are not filled as long as this lives.
#[derive(Debug)]
pub struct Held {
    gate: Arc<Gate>,
    serials: Vec<u64>,
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut held = self.gate.held.lock();
        for serial in &self.serials {
            if let Some(by) = held.get_mut(serial) {
                *by -= 1;
                if *by == 0 {
                    held.remove(serial);
                }
            }
        }
    }
}

/// Somebody waits as long as this lives.
#[derive(Debug)]
pub struct Demand<'a>(&'a Gate);

impl Drop for Demand<'_> {
    fn drop(&mut self) {
        self.0.waited_for.fetch_sub(1, Ordering::AcqRel);
        self.0.is_busy_until(Instant::now() + CALM);
    }
}

impl Gate {
    /// A read waits.
    pub fn demand(&self) -> Demand<'_> {
        self.waited_for.fetch_add(1, Ordering::AcqRel);
        Demand(self)
    }

    /// A layer was found that somebody is going to read lazily.
    pub fn expect_readers(&self) {
        self.is_busy_until(Instant::now() + HEAD_START);
    }

    /// Of these layers only what readers will want next is fetched as long as the answer lives: something knows better what to
    /// fetch, and what of them is not read in time would only take its place on the link.
    pub fn hold(self: &Arc<Self>, serials: Vec<u64>) -> Held {
        let mut held = self.held.lock();
        serials.iter().for_each(|serial| *held.entry(*serial).or_default() += 1);
        drop(held);
        Held { gate: Arc::clone(self), serials }
    }

    fn is_held(&self, serial: u64) -> bool {
        self.held.lock().contains_key(&serial)
    }

    fn is_busy_until(&self, until: Instant) {
        let mut busy = self.busy.lock();
        *busy = Some(busy.map_or(until, |busy| busy.max(until)));
    }

    /// For how long others are to stand back.
    fn busy_for(&self) -> Option<Duration> {
        if self.waited_for.load(Ordering::Acquire) > 0 {
            return Some(CALM);
        }
        let left = (*self.busy.lock())?.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    }

    /// Returns when a chunk may be fetched that a reader will want next: some at once.
    pub async fn next(&self) -> Turn<'_> {
        Turn { _permit: self.next.acquire().await.ok() }
    }

    /// Returns when it is the turn of what nobody is known to want, in a fill of this layer that began then: when nobody reads and
    /// nothing holds it. After `PATIENCE` one chunk of all layers is fetched at a time although somebody reads.
    pub async fn rest(&self, serial: u64, began: Instant) -> Turn<'_> {
        loop {
            let held = self.is_held(serial);
            let busy = match self.busy_for() {
                Some(busy) => busy,
                None if held => LOOK,
                None => return Turn { _permit: None },
            };
            let waits = held || began.elapsed() < PATIENCE;
            tokio::select! {
                permit = self.rest.acquire(), if !waits => return Turn { _permit: permit.ok() },
                () = tokio::time::sleep(busy.min(LOOK)) => {}
            }
        }
    }

    /// Room in memory for a chunk of so many bytes, until it is written.
    pub async fn room(&self, bytes: u32, urgency: Urgency) -> Option<OwnedSemaphorePermit> {
        let room = match urgency {
            Urgency::Demand => &self.demand,
            Urgency::Ahead => &self.ahead,
        };
        Arc::clone(room).acquire_many_owned(bytes.div_ceil(BLOCK)).await.ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    #[tokio::test(start_paused = true)]
    async fn what_nobody_wants_waits_while_somebody_reads() {
        let gate = Gate::default();
        let began = Instant::now();
        let all: Vec<_> = futures::future::join_all((0..100).map(|_| gate.rest(5, began))).await;
        assert_eq!((began.elapsed(), all.len()), (Duration::ZERO, 100));
        let demand = gate.demand();
        let next: Vec<_> = futures::future::join_all((0..NEXT).map(|_| gate.next())).await;
        assert!(gate.next().now_or_never().is_none(), "no more at once");
        drop(next);
        assert!(tokio::time::timeout(PATIENCE / 2, gate.rest(5, began)).await.is_err());
        // In the end one at a time, all layers together.
        let one = gate.rest(6, began).await;
        assert_eq!(began.elapsed(), PATIENCE);
        assert!(tokio::time::timeout(CALM, gate.rest(7, began)).await.is_err());
        drop((one, demand));
        let (read, later) = (Instant::now(), Instant::now());
        drop(gate.rest(5, later).await);
        assert_eq!(read.elapsed(), CALM);
        gate.expect_readers();
        drop(gate.rest(5, later).await);
        assert_eq!(read.elapsed(), CALM + HEAD_START);
    }

    #[tokio::test(start_paused = true)]
    async fn the_rest_of_what_is_held_is_not_fetched() {
        let gate = Arc::new(Gate::default());
        let (held, twice) = (gate.hold(vec![5, 6]), gate.hold(vec![5]));
        let began = Instant::now();
        drop(gate.rest(7, began).await);
        for serial in [5, 6] {
            let not_soon = tokio::time::timeout(2 * PATIENCE, gate.rest(serial, began)).await;
            assert!(not_soon.is_err());
        }
        drop(held);
        drop(gate.rest(6, began).await);
        assert!(tokio::time::timeout(2 * PATIENCE, gate.rest(5, began)).await.is_err());
        drop(twice);
        drop(gate.rest(5, began).await);
        assert!(gate.held.lock().is_empty());
    }
}
