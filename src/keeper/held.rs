//! What is held, and the clock that runs while nobody owns it.
//!
//! **Where.** `process` asks and tells the time; nothing here looks at a clock, a socket or a file system.
//!
//! **Invariants.** The clock runs only between [`DeadMan::start`] and [`DeadMan::stop`]; starting it again while it runs does
//! not prolong it.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use super::protocol::{MOST_HELD, NAMES_PER_ANSWER, Name};

/// Descriptors by name.
#[derive(Debug, Default)]
pub(super) struct Held(BTreeMap<Name, OwnedFd>);

impl Held {
    /// Holds a descriptor, in place of one of the same name. `false`: there is no room, and it was dropped.
    pub(super) fn put(&mut self, name: Name, descriptor: OwnedFd) -> bool {
        if self.0.len() >= MOST_HELD && !self.0.contains_key(&name) {
            return false;
        }
        self.0.insert(name, descriptor);
        true
    }

    pub(super) fn get(&self, name: &Name) -> Option<&OwnedFd> {
        self.0.get(name)
    }

    /// Drops one; `false` if there is none.
    pub(super) fn remove(&mut self, name: &Name) -> bool {
        self.0.remove(name).is_some()
    }

    /// Drops all; how many there were.
    pub(super) fn clear(&mut self) -> usize {
        std::mem::take(&mut self.0).len()
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&Name, &OwnedFd)> {
        self.0.iter()
    }

    /// The next names after one, and whether there are others after these.
    pub(super) fn names_after(&self, after: Option<&Name>) -> (Vec<Name>, bool) {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let mut rest = self.0.range::<Name, _>((from, Bound::Unbounded)).map(|(name, _)| name.clone());
        let names = rest.by_ref().take(NAMES_PER_ANSWER).collect();
        (names, rest.next().is_some())
    }
}

/// How long descriptors wait for an owner, and what depends on them.
#[derive(Debug)]
pub(super) struct DeadMan {
    pub(super) limit: Duration,
    /// The FUSE connection that is aborted at the end.
    pub(super) connection: Option<u32>,
    until: Option<Instant>,
}

impl DeadMan {
    pub(super) fn new(limit: Duration) -> DeadMan {
        DeadMan { limit, connection: None, until: None }
    }

    pub(super) fn start(&mut self, now: Instant) {
        let limit = self.limit;
        self.until.get_or_insert_with(|| now + limit);
    }

    /// Goes on where a predecessor's clock stood.
    pub(super) fn resume(&mut self, now: Instant, left: Duration) {
        self.until = Some(now + left);
    }

    pub(super) fn stop(&mut self) {
        self.until = None;
    }

    /// What is left; `None` while the clock does not run.
    pub(super) fn left(&self, now: Instant) -> Option<Duration> {
        self.until.map(|until| until.saturating_duration_since(now))
    }

    pub(super) fn is_over(&self, now: Instant) -> bool {
        self.left(now) == Some(Duration::ZERO)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    const SECOND: Duration = Duration::from_secs(1);

    fn name(number: usize) -> Name {
        Name::new(format!("n{number:04}")).unwrap()
    }

    fn null() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    #[test]
    fn there_is_room_for_so_many_and_for_replacing() {
        let mut held = Held::default();
        // One descriptor for all would do in the kernel, but each entry owns its own.
        for number in 0..300 {
            assert!(held.put(name(number), null()));
        }
        assert!(held.put(name(0), null()));
        assert_eq!(held.len(), 300);
        let (first, more) = held.names_after(None);
        assert_eq!((first.len(), more), (NAMES_PER_ANSWER, true));
        let (rest, more) = held.names_after(first.last());
        assert_eq!((rest.len(), more, rest.last()), (44, false, Some(&name(299))));
        assert!(held.remove(&name(7)) && !held.remove(&name(7)) && held.get(&name(7)).is_none());
        assert_eq!((held.clear(), held.is_empty()), (299, true));
    }

    #[test]
    fn the_clock_runs_from_the_first_start_to_the_stop() {
        let start = Instant::now();
        let mut dead_man = DeadMan::new(10 * SECOND);
        assert!(dead_man.left(start).is_none() && !dead_man.is_over(start + 99 * SECOND));
        dead_man.start(start);
        dead_man.start(start + 5 * SECOND);
        assert_eq!(dead_man.left(start + 9 * SECOND), Some(SECOND));
        assert!(!dead_man.is_over(start + 9 * SECOND) && dead_man.is_over(start + 10 * SECOND));
        dead_man.stop();
        assert!(!dead_man.is_over(start + 10 * SECOND));
        dead_man.resume(start, SECOND);
        assert!(dead_man.is_over(start + SECOND));
    }
}
