//! Who may fetch when: reads that somebody waits for, before what is fetched because it will be wanted.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit};
use tokio::time::Instant;

use crate::chunk::BLOCK;

/// How many bytes of chunks that somebody waits for may be on their way or not written yet, all layers together.
const ROOM_DEMAND: u32 = 24 << 20;
/// The same for those that nobody waits for yet.
const ROOM_AHEAD: u32 = 16 << 20;
/// How long after the last read that waited others stand back: a program that starts reads again and again.
const CALM: Duration = Duration::from_secs(1);
/// How long what was only just found stands back for a container that may be about to start.
const HEAD_START: Duration = Duration::from_secs(2);
/// How often others look whether it is their turn.
const LOOK: Duration = Duration::from_millis(50);
/// How many chunks that will be read next are fetched meanwhile, and how many others, so that all comes to an end.
const NEXT: usize = 8;
const REST: usize = 1;

/// See the module's page.
#[derive(Debug)]
pub struct Gate {
    waited_for: AtomicUsize,
    /// When somebody last waited, or may have begun to.
    busy: Mutex<Option<Instant>>,
    /// The layer that was read last.
    read: AtomicU64,
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
        let (read, held) = (AtomicU64::new(0), Mutex::default());
        Gate { waited_for, busy, read, next, rest, held, demand, ahead }
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
    /// Only what a reader will want next.
    pub only_next: bool,
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
    /// A read of a layer waits.
    pub fn demand(&self, serial: u64) -> Demand<'_> {
        self.read.store(serial, Ordering::Release);
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

    /// Returns when it is the turn of what nobody waits for. While somebody reads that is what will be read next in the layer that
    /// was read last, some at once, and one of all the rest; of a layer that is held nothing of the rest, whoever reads.
    pub async fn turn(&self, serial: u64) -> Turn<'_> {
        loop {
            let held = self.is_held(serial);
            let busy = match self.busy_for() {
                Some(busy) => busy,
                None if held => LOOK,
                None => return Turn { only_next: false, _permit: None },
            };
            let read = self.read.load(Ordering::Acquire) == serial;
            let next = async {
                match read {
                    true => self.next.acquire().await.ok(),
                    false => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                permit = next => return Turn { only_next: true, _permit: permit },
                permit = self.rest.acquire(), if !held => return Turn { only_next: false, _permit: permit.ok() },
                () = tokio::time::sleep(busy.min(LOOK)) => {}
            }
        }
    }

    /// The turn for the rest of a layer, if it is free.
    pub fn try_rest(&self, serial: u64) -> Option<Turn<'_>> {
        if self.is_held(serial) {
            return None;
        }
        let permit = self.rest.try_acquire().ok()?;
        Some(Turn { only_next: false, _permit: Some(permit) })
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

    #[tokio::test(start_paused = true)]
    async fn what_nobody_waits_for_goes_slowly_while_somebody_reads() {
        let gate = Gate::default();
        let began = Instant::now();
        let all: Vec<_> = futures::future::join_all((0..100).map(|_| gate.turn(5))).await;
        assert_eq!(began.elapsed(), Duration::ZERO);
        assert!(all.iter().all(|turn| !turn.only_next));
        drop(all);
        let demand = gate.demand(5);
        let slowly: Vec<_> = futures::future::join_all((0..NEXT + REST).map(|_| gate.turn(5))).await;
        assert_eq!(slowly.iter().filter(|turn| turn.only_next).count(), NEXT);
        assert!(gate.try_rest(5).is_none());
        assert_eq!(began.elapsed(), Duration::ZERO);
        drop(demand);
        assert!(!gate.turn(5).await.only_next);
        assert_eq!(began.elapsed(), CALM);
        drop(slowly);
        gate.expect_readers();
        assert!(gate.turn(5).await.only_next);
        // Another layer than the one that is read.
        let one = gate.turn(6).await;
        assert!(!one.only_next);
        assert_eq!(began.elapsed(), CALM);
        drop(gate.turn(6).await);
        assert_eq!(began.elapsed(), CALM + HEAD_START);
        drop(one);
    }

    #[tokio::test(start_paused = true)]
    async fn of_what_is_held_only_what_a_reader_wants_next_is_fetched() {
        let gate = Arc::new(Gate::default());
        let (held, twice) = (gate.hold(vec![5, 6]), gate.hold(vec![5]));
        assert!(gate.try_rest(5).is_none() && gate.try_rest(7).is_some());
        assert!(!gate.turn(7).await.only_next);
        let not_soon = tokio::time::timeout(Duration::from_secs(100), gate.turn(5)).await;
        assert!(not_soon.is_err(), "nobody has read it");
        drop(gate.demand(5));
        assert!(gate.turn(5).await.only_next);
        tokio::time::sleep(2 * CALM).await;
        assert!(gate.turn(5).await.only_next, "nor later");
        drop(held);
        assert!(gate.try_rest(5).is_none() && gate.try_rest(6).is_some());
        drop(twice);
        tokio::time::sleep(CALM).await;
        assert!(!gate.turn(5).await.only_next);
        assert!(gate.held.lock().is_empty());
    }
}
