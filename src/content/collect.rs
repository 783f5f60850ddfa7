//! Collection: what no image needs is deleted, some time after the last one that needed it.
//!
//! **What.** [`Collector::plan`] reads everything and says what would go and why; it writes nothing. [`Collector::execute`] reads names and refs
//! again and deletes what *both* readings have found to be needed by nothing, if it is old enough when it is looked at for the last time.
//!
//! **Where.** Called by `cli`. Walks by [`super::inventory`]; [`keep`] are the rules for names.
//!
//! **What is needed.** A name needs the refs of its chains, whoever wrote them, and its documents; a ref needs its index, an index its chunks.
//! A ref that no name covers is needed until it is [`Rules::unnamed`] old: names are written after all layers, which may take days when a store
//! or a node is away. An index that no ref names is needed until it is [`Rules::grace`] old, with its chunks; a collection *renews the index*
//! before it deletes the last ref of it. So who found a layer just before its ref went has the grace period to fetch it. (If the store loses
//! the last ref of a layer that no name has, and its index is older than that, nothing tells that somebody may still be fetching it.)
//!
//! **Why it is safe beside publishers, without locks and without conditional writes.** Let *C* be the hour by which two clocks may differ, *L* the
//! hour by which a listing may be late, *P* the time between a publisher's look at what is there and the ref (or name) that relies on it, bounded by
//! `LONGEST_LOOK` and two hours for requests, *R* the age from which a publisher renews what it reuses
//! ([`super::Options::renew_after`]), and *E* the time for which a collection deletes after its second reading began (`LONGEST`).
//! 1. A ref that the second reading sees is marked: nothing that it needs is deleted.
//! 2. A ref that it does not see was written later than *L* before it. What it relies on was looked at *P* before that at the earliest, and was
//!    then younger than *R + C*, or was made young. When it is looked at for deletion, its age is below *R + C + P + L + E* = 24 + 1 + 8 + 1 + 6 =
//!    40 hours, and a grace period has [`LEAST_GRACE`] at least. It is young, and stays.
//! 3. What is made young between a collector's last look and its deletion is what [`super::notice`] is for.
//! 4. The same holds for names over refs and documents.
//!
//! 5. A name that the first reading kept, or did not see, is kept by the second with all that it needs, whatever the rules say of it by
//!    then: between the two may be days.
//!
//! Four steps of this have names ([`super::guard`]): a test takes them away, and the simulated fleet notices.
//!
//! Two collectors at once delete what each of them alone would have deleted.
//!
//! **Who may do what.** Names and refs of all keys count, accepted or not: with write access to a store one can keep garbage alive, by a name of
//! one's own; whoever can delete objects needs no collector for it.
//!
//! **Order.** Names, refs, traces and uses, documents, indexes, chunks. A collection that is killed leaves what nothing names; the next one finds
//! it. Nothing about a collection is recorded, so there is nothing to resume from: it begins again, with less to do.
//!
//! **Memory.** 8 bytes for each distinct chunk that is needed, at most twice that while they are read, and never more than 256 MiB: beyond, indexes
//! are read in several rounds, each for a part of the chunk ids. Beside it about a kilobyte for each name, a hundred bytes for each ref and index,
//! and eight parts of a listing.
//!
//! **When it fails.** A store that holds something of a newer version is left alone, one that holds something damaged, or lacks the ref of a
//! layer of a named image (the index that would make another one is needed by nothing else), too, unless it is told
//! otherwise: what a damaged object needs cannot be known, and a repair may want it. Even then only that is ignored which plan and execution
//! both find damaged: a single answer may have been damaged on its way. A repair of an index beside it sees the notice, and publishes
//! the layer's chunks again (`super::restore`). Every failure of the store ends the collection where it is; what was deleted is
//! deleted rightly.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use crate::object::Objects;
use crate::object::layout::Kind;

use self::keep::KeepRule;
use self::roots::Roots;
use super::ContentError;
use super::guard::{Guard, Guards};
use super::inventory::{Entry, Inventory};

mod execute;
pub mod keep;
mod mark;
mod plan;
mod roots;
#[cfg(test)]
pub(crate) mod tests;

/// The least grace period beside publishers.
pub const LEAST_GRACE: Duration = Duration::from_secs(48 * 3600);
/// For how long a collection deletes before it has to read again.
const LONGEST: Duration = Duration::from_secs(6 * 3600);
/// The most marks in memory: 8 bytes each, and twice that at times.
const MOST_MARKS: usize = 16 << 20;
/// How many deletions are under way at once.
const DELETIONS: usize = 16;

/// What a collection goes by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// How old something must be to be deleted.
    pub grace: Duration,
    /// For how long a ref without a name is kept.
    pub unnamed: Duration,
    /// Which images are kept; all, if no rule says otherwise.
    pub keep: Vec<KeepRule>,
    /// Nobody publishes or pulls meanwhile: the grace period may be shorter, and nobody is waited for.
    pub alone: bool,
    /// What is damaged needs nothing, and goes.
    pub ignore_damage: bool,
    /// That no image has a name is right.
    pub no_names: bool,
    /// How many objects are deleted each second at most.
    pub rate: u32,
    /// All hold but in tests.
    pub guards: Guards,
}

impl Default for Rules {
    fn default() -> Rules {
        Rules {
            grace: LEAST_GRACE,
            unnamed: Duration::from_secs(7 * 24 * 3600),
            keep: Vec::new(),
            alone: false,
            ignore_damage: false,
            no_names: false,
            rate: 1000,
            guards: Guards::default(),
        }
    }
}

impl Rules {
    /// An error if publishers could not keep up with them.
    pub fn check(&self) -> Result<(), CollectError> {
        match !self.alone && self.grace < LEAST_GRACE {
            true => Err(CollectError::ShortGrace { grace: self.grace }),
            false => Ok(()),
        }
    }
}

/// Why nothing was deleted.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// The store failed.
    #[error(transparent)]
    Content(#[from] ContentError),
    /// A grace period that publishers cannot keep up with.
    #[error(
        "a grace period of {} is shorter than publishers need (48h): give a longer one, or --alone if nothing publishes to this store \
         and nothing pulls from it meanwhile",
        keep::spelled(*grace)
    )]
    ShortGrace {
        /// The period.
        grace: Duration,
    },
    /// Objects that only a newer version can read.
    #[error(
        "{count} objects of a newer version of Speedy are in the store, such as {name} ({problem}): collect with that version"
    )]
    Newer {
        /// How many.
        count: usize,
        /// One of them.
        name: String,
        /// What is said of it.
        problem: String,
    },
    /// Objects that nobody can read.
    #[error(
        "{count} objects are damaged or missing, such as {name} ({problem}): run speedy fsck --repair first; --ignore-damage collects what only \
         they need"
    )]
    Damaged {
        /// How many.
        count: usize,
        /// One of them.
        name: String,
        /// What is said of it.
        problem: String,
    },
    /// Something that the plan could still read.
    #[error(
        "{name} is damaged or missing ({problem}), and was not when this collection was planned: nothing of what it needs was deleted; run it again"
    )]
    DamagedSince {
        /// The object.
        name: String,
        /// What is said of it.
        problem: String,
    },
    /// Not one image has a name.
    #[error(
        "no image in this store has a name, so all {refs} layers would go; if that is right, add --no-names"
    )]
    NoNames {
        /// How many refs there are.
        refs: u64,
    },
}

/// Objects and their bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tally {
    /// How many.
    pub objects: u64,
    /// Their bytes, as stored.
    pub bytes: u64,
}

impl std::iter::Sum for Tally {
    fn sum<I: Iterator<Item = Tally>>(tallies: I) -> Tally {
        tallies.fold(Tally::default(), |sum, tally| Tally {
            objects: sum.objects + tally.objects,
            bytes: sum.bytes + tally.bytes,
        })
    }
}

impl Tally {
    fn add(&mut self, size: u64) {
        self.objects += 1;
        self.bytes += size;
    }
}

/// What becomes of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// Something needs it.
    Needed,
    /// Nothing does, and it is old.
    Dead,
    /// Nothing does but what goes now: it is kept for another grace period.
    Later,
    /// Nothing does, and it is young.
    Young,
}

/// What there is of a kind, and what becomes of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KindReport {
    /// The kind.
    pub kind: Kind,
    /// What something needs.
    pub needed: Tally,
    /// What goes now.
    pub dead: Tally,
    /// What goes a grace period after this collection.
    pub later: Tally,
    /// What nothing needs, and is too young to go.
    pub young: Tally,
    /// When the oldest of what goes now was written, seconds since 1970 UTC.
    pub oldest: Option<i64>,
    /// Objects with foreign names, which are left alone.
    pub foreign: u64,
}

impl KindReport {
    fn new(kind: Kind) -> KindReport {
        let none = Tally::default();
        KindReport { kind, needed: none, dead: none, later: none, young: none, oldest: None, foreign: 0 }
    }

    fn count(&mut self, entry: &Entry, verdict: Verdict) {
        match verdict {
            Verdict::Needed => self.needed.add(entry.size),
            Verdict::Later => self.later.add(entry.size),
            Verdict::Young => self.young.add(entry.size),
            Verdict::Dead => {
                self.dead.add(entry.size);
                self.oldest = Some(self.oldest.map_or(entry.modified, |oldest| oldest.min(entry.modified)));
            }
        }
    }
}

/// An image that goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removed {
    /// Its reference.
    pub reference: String,
    /// Its platform.
    pub platform: String,
    /// When its name was written last, seconds since 1970 UTC.
    pub published: i64,
    /// When it was used last.
    pub used: i64,
    /// Why it goes.
    pub why: String,
}

/// Something that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// The object.
    pub name: String,
    /// What is wrong.
    pub problem: String,
    /// That only a newer version can read it.
    pub newer: bool,
}

/// What a plan says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// What there is, in the order in which it is deleted.
    pub kinds: Vec<KindReport>,
    /// How many images stay.
    pub images: usize,
    /// The images that go.
    pub removed: Vec<Removed>,
    /// What cannot be read.
    pub damage: Vec<Damage>,
    /// In how many rounds chunks were looked at.
    pub rounds: u32,
}

impl Report {
    /// What is said of a kind.
    pub fn kind(&self, kind: Kind) -> &KindReport {
        self.kinds.iter().find(|report| report.kind == kind).expect("there is a report for each kind")
    }

    fn kind_mut(&mut self, kind: Kind) -> &mut KindReport {
        self.kinds.iter_mut().find(|report| report.kind == kind).expect("there is a report for each kind")
    }

    /// What goes now, of all kinds.
    pub fn dead(&self) -> Tally {
        self.sum(|report| report.dead)
    }

    /// What goes a grace period later.
    pub fn later(&self) -> Tally {
        self.sum(|report| report.later)
    }

    fn sum(&self, of: impl Fn(&KindReport) -> Tally) -> Tally {
        self.kinds.iter().map(of).sum()
    }
}

/// What was found, to be executed.
#[derive(Debug)]
pub struct Plan {
    roots: Roots,
    /// What is to be shown of it.
    pub report: Report,
}

/// What was deleted.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Freed {
    /// By kind.
    pub kinds: Vec<(Kind, Tally)>,
    /// What the plan had, and was needed or young when it was looked at again.
    pub spared: u64,
    /// Whether there is more: the time for one reading was over.
    pub unfinished: bool,
}

impl Freed {
    /// Everything that was deleted.
    pub fn total(&self) -> Tally {
        self.kinds.iter().map(|(_, tally)| *tally).sum()
    }

    /// Adds what a later execution freed.
    pub fn add(&mut self, more: &Freed) {
        for (kind, tally) in &more.kinds {
            match self.kinds.iter_mut().find(|(known, _)| known == kind) {
                Some((_, known)) => *known = [*known, *tally].into_iter().sum(),
                None => self.kinds.push((*kind, *tally)),
            }
        }
        self.spared += more.spared;
        self.unfinished = more.unfinished;
    }
}

/// How far a collection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// What is being done.
    pub doing: &'static str,
    /// How much of it is done.
    pub done: u64,
    /// How much there is; 0 if nobody knows.
    pub total: u64,
}

/// Who wants to know how far a collection is.
pub type Watch<'a> = &'a (dyn Fn(Step) + Sync);

/// See the module's page.
#[derive(Debug)]
pub struct Collector {
    inventory: Inventory,
    rules: Rules,
    most_marks: usize,
}

impl Collector {
    /// On this store; waits for it as long as `objects` does.
    pub fn new(objects: Objects, rules: Rules) -> Result<Collector, CollectError> {
        rules.check()?;
        // A ref is given up no sooner than anything else.
        let rules = Rules { unnamed: rules.unnamed.max(rules.grace), ..rules };
        Ok(Collector { inventory: Inventory::new(objects), rules, most_marks: MOST_MARKS })
    }

    /// What was written before it is older than the grace period, at this time.
    fn young_from(&self, now: i64) -> i64 {
        if !self.rules.guards.hold(Guard::Grace) {
            return i64::MAX;
        }
        now.saturating_sub(self.rules.grace.as_secs().cast_signed())
    }
}

/// A set of hashes.
type Hashes = HashSet<[u8; 32]>;
/// Indexes, each with a ref that names it.
type Named = HashMap<[u8; 32], Entry>;
