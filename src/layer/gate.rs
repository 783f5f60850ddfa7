//! Who may fetch when: reads that somebody waits for, before what is fetched because it will be wanted.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, SemaphorePermit};
use tokio::time::Instant;

use super::pace::Pace;
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
/// How many chunks of a far store a fill fetches while somebody reads: a reader waits for the way and not for what else is on the link, so that
/// a fill that stands back only has the link stand idle.
const FAR_AT_ONCE: (usize, usize, usize) = (1, 32, 144);
/// By how much a chunk is longer than its stored form, roughly: of a far store most chunks that were asked for are on the way, and take no
/// memory yet. Should the disk be slower than the link they take so much more: three times [`ROOM_AHEAD`] at most.
const SHRINKS: u32 = 3;

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
    far: Far,
    pace: Pace,
}

/// How many fetches are under way: as many as do not wait for each other, so that a long way is filled (300 ms at 1 Gbit/s are 37 MB)
/// and what a container asks for itself need not wait behind them on a thin one.
#[derive(Debug)]
pub struct Window {
    at_once: usize,
    least: usize,
    most: usize,
    quickest: Duration,
}

impl Window {
    /// Of so many at least, to begin with, and at most.
    pub fn new((least, first, most): (usize, usize, usize)) -> Window {
        Window { at_once: first, least, most, quickest: Duration::MAX }
    }

    /// How many may be under way now.
    pub fn at_once(&self) -> usize {
        self.at_once
    }

    /// A fetch took so long; one that was quicker than `distance` did not come from the store.
    pub fn took(&mut self, took: Duration, distance: Duration) {
        self.quickest = self.quickest.min(took);
        // The way may have become longer since.
        let alone = self.quickest.max(distance);
        if took < alone * 2 {
            self.at_once = (self.at_once + 1).min(self.most);
        } else if took > alone * 4 {
            self.at_once = (self.at_once - 1).max(self.least);
        }
    }
}

/// What of a far store is fetched although somebody reads.
#[derive(Debug)]
struct Far {
    window: Mutex<Window>,
    under_way: AtomicUsize,
    freed: Notify,
}

impl Default for Far {
    fn default() -> Far {
        let (window, under_way) = (Mutex::new(Window::new(FAR_AT_ONCE)), AtomicUsize::new(0));
        Far { window, under_way, freed: Notify::new() }
    }
}

impl Far {
    fn begin(&self, distance: Duration) -> Option<Way<'_>> {
        let window = self.window.lock();
        if self.under_way.load(Ordering::Acquire) >= window.at_once() {
            return None;
        }
        self.under_way.fetch_add(1, Ordering::AcqRel);
        Some(Way { far: self, distance, began: Some(Instant::now()) })
    }
}

/// A chunk of a far store is on its way.
#[derive(Debug)]
struct Way<'a> {
    far: &'a Far,
    distance: Duration,
    /// `None` if nothing was fetched after all.
    began: Option<Instant>,
}

impl Drop for Way<'_> {
    fn drop(&mut self) {
        if let Some(began) = self.began {
            self.far.window.lock().took(began.elapsed(), self.distance);
        }
        self.far.under_way.fetch_sub(1, Ordering::AcqRel);
        self.far.freed.notify_one();
    }
}

impl Default for Gate {
    fn default() -> Gate {
        Gate::new(0)
    }
}

impl Gate {
    /// What nobody waits for may be fetched at this rate, in bytes each second; 0 for no limit.
    pub fn new(rate: u64) -> Gate {
        let room = |bytes: u32| Arc::new(Semaphore::new((bytes / BLOCK) as usize));
        let (demand, ahead) = (room(ROOM_DEMAND), room(ROOM_AHEAD));
        let (next, rest) = (Semaphore::new(NEXT), Semaphore::new(REST));
        let (waited_for, busy) = (AtomicUsize::new(0), Mutex::default());
        let (held, far) = (Mutex::default(), Far::default());
        let pace = Pace::new(rate);
        Gate { waited_for, busy, next, rest, held, demand, ahead, far, pace }
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
    way: Option<Way<'a>>,
    /// How many bytes of the rate it has taken.
    bytes: u32,
}

impl<'a> Turn<'a> {
    fn with(permit: Option<SemaphorePermit<'a>>) -> Turn<'a> {
        Turn { _permit: permit, way: None, bytes: 0 }
    }

    /// Nothing is fetched: it says nothing of the link.
    fn is_not_used(&mut self) {
        if let Some(way) = &mut self.way {
            way.began = None;
        }
    }
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
        Turn::with(self.next.acquire().await.ok())
    }

    /// Returns when it is the turn of what nobody is known to want, in a fill of this layer that began then: when nobody reads and
    /// nothing holds it. After `PATIENCE` one chunk of all layers is fetched at a time although somebody reads; from a far store some at once,
    /// from the beginning, as long as they come as quickly as if they were alone.
    pub async fn rest(&self, serial: u64, began: Instant, far: Option<Duration>) -> Turn<'_> {
        loop {
            let freed = self.far.freed.notified();
            let held = self.is_held(serial);
            let busy = match self.busy_for() {
                Some(busy) => busy,
                None if held => LOOK,
                None => return Turn::with(None),
            };
            if let Some(distance) = far.filter(|_| !held)
                && let Some(way) = self.far.begin(distance)
            {
                return Turn { _permit: None, way: Some(way), bytes: 0 };
            }
            let waits = held || began.elapsed() < PATIENCE;
            tokio::select! {
                permit = self.rest.acquire(), if !waits => return Turn::with(permit.ok()),
                () = freed, if far.is_some() && !held => {}
                () = tokio::time::sleep(busy.min(LOOK)) => {}
            }
        }
    }

    /// [`Gate::rest`], and what `take` takes then, at the rate that there may be; `take` also says how many bytes of it have to be fetched.
    pub(super) async fn paced_rest<T>(
        &self,
        serial: u64,
        began: Instant,
        far: Option<Duration>,
        take: impl Fn() -> (T, u32),
    ) -> (Turn<'_>, T) {
        loop {
            // Without a turn: who waits here keeps nobody from theirs.
            self.pace.due().await;
            let mut turn = self.rest(serial, began, far).await;
            if let Some((taken, bytes)) = self.pace.take(&take) {
                turn.bytes = bytes;
                return (turn, taken);
            }
            turn.is_not_used();
        }
    }

    /// What was taken at this turn had not to be fetched.
    pub(super) fn give_back(&self, turn: &Turn<'_>) {
        self.pace.give_back(turn.bytes);
    }

    /// Whether there is a rate.
    pub(super) fn is_paced(&self) -> bool {
        self.pace.is_limited()
    }

    /// Room in memory for a chunk of so many bytes, until it is written.
    pub async fn room(&self, bytes: u32, urgency: Urgency, far: bool) -> Option<OwnedSemaphorePermit> {
        let (room, shrinks) = match urgency {
            Urgency::Demand => (&self.demand, 1),
            Urgency::Ahead => (&self.ahead, if far { SHRINKS } else { 1 }),
        };
        Arc::clone(room).acquire_many_owned(bytes.div_ceil(BLOCK * shrinks)).await.ok()
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
        let all: Vec<_> = futures::future::join_all((0..100).map(|_| gate.rest(5, began, None))).await;
        assert_eq!((began.elapsed(), all.len()), (Duration::ZERO, 100));
        let demand = gate.demand();
        let next: Vec<_> = futures::future::join_all((0..NEXT).map(|_| gate.next())).await;
        assert!(gate.next().now_or_never().is_none(), "no more at once");
        drop(next);
        assert!(tokio::time::timeout(PATIENCE / 2, gate.rest(5, began, None)).await.is_err());
        // In the end one at a time, all layers together.
        let one = gate.rest(6, began, None).await;
        assert_eq!(began.elapsed(), PATIENCE);
        assert!(tokio::time::timeout(CALM, gate.rest(7, began, None)).await.is_err());
        drop((one, demand));
        let (read, later) = (Instant::now(), Instant::now());
        drop(gate.rest(5, later, None).await);
        assert_eq!(read.elapsed(), CALM);
        gate.expect_readers();
        drop(gate.rest(5, later, None).await);
        assert_eq!(read.elapsed(), CALM + HEAD_START);
    }

    #[test]
    fn as_many_are_fetched_at_once_as_do_not_wait_for_each_other() {
        let (mut window, ms) = (Window::new((8, 16, 48)), Duration::from_millis);
        let none = Duration::ZERO;
        (0..100).for_each(|n| window.took(ms(300 + n), none));
        assert_eq!(window.at_once(), 48);
        window.took(ms(5), none);
        (0..10).for_each(|_| window.took(ms(15), none));
        assert_eq!(window.at_once(), 48);
        (0..100).for_each(|_| window.took(ms(50), none));
        assert_eq!(window.at_once(), 8);
    }

    #[test]
    fn what_another_layer_of_the_node_had_says_nothing_of_the_way_to_the_store() {
        // Found with 300 ms: one chunk that was copied within a millisecond made all that came from the store seem late.
        let (mut window, ms) = (Window::new((8, 16, 48)), Duration::from_millis);
        window.took(ms(1), ms(300));
        (0..100).for_each(|n| window.took(ms(310 + n), ms(300)));
        assert_eq!(window.at_once(), 48);
        // And a way that has become longer is no sign of a queue.
        (0..100).for_each(|n| window.took(ms(1310 + n), ms(1300)));
        assert_eq!(window.at_once(), 48);
    }

    #[tokio::test(start_paused = true)]
    async fn a_fill_from_a_far_store_goes_on_while_somebody_reads() {
        let (gate, far) = (Arc::new(Gate::default()), Some(Duration::from_millis(300)));
        let began = Instant::now();
        let _demand = gate.demand();
        let mut ways = Vec::new();
        for _ in 0..FAR_AT_ONCE.1 {
            ways.push(gate.rest(5, began, far).now_or_never().expect("it need not wait"));
        }
        // Each that comes in time makes room for two.
        let mut next = std::pin::pin!(gate.rest(6, began, far));
        assert!(next.as_mut().now_or_never().is_none(), "no more at once");
        drop(ways.pop());
        let first = next.now_or_never().expect("it is told at once");
        let second = gate.rest(6, began, far).now_or_never().expect("the window has grown");
        drop((first, second, ways));
        assert!(
            tokio::time::timeout(PATIENCE / 2, gate.rest(5, began, None)).await.is_err(),
            "a near one stands back"
        );
        let _held = gate.hold(vec![6]);
        assert!(gate.rest(6, began, far).now_or_never().is_none(), "what is held waits, however far");
    }

    #[tokio::test(start_paused = true)]
    async fn most_of_what_a_far_store_was_asked_for_takes_no_memory_yet() {
        let (gate, chunk) = (Gate::default(), 512 << 10);
        for (urgency, far, most) in [
            (Urgency::Ahead, false, ROOM_AHEAD / chunk),
            (Urgency::Ahead, true, ROOM_AHEAD / chunk * SHRINKS),
            (Urgency::Demand, true, ROOM_DEMAND / chunk),
        ] {
            let mut held = Vec::new();
            // Not as many at once as tokio lets a task have.
            while let Some(Some(room)) =
                tokio::task::unconstrained(gate.room(chunk, urgency, far)).now_or_never()
            {
                held.push(room);
            }
            let count = u32::try_from(held.len()).unwrap();
            // Blocks are not divided.
            assert!((most - most / 40..=most).contains(&count), "{urgency:?}, {far}: {count} of {most}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_rest_of_what_is_held_is_not_fetched() {
        let gate = Arc::new(Gate::default());
        let (held, twice) = (gate.hold(vec![5, 6]), gate.hold(vec![5]));
        let began = Instant::now();
        drop(gate.rest(7, began, None).await);
        for serial in [5, 6] {
            let not_soon = tokio::time::timeout(2 * PATIENCE, gate.rest(serial, began, None)).await;
            assert!(not_soon.is_err());
        }
        drop(held);
        drop(gate.rest(6, began, None).await);
        assert!(tokio::time::timeout(2 * PATIENCE, gate.rest(5, began, None)).await.is_err());
        drop(twice);
        drop(gate.rest(5, began, None).await);
        assert!(gate.held.lock().is_empty());
    }
}
