//! The check of a whole store: what is missing, what is damaged, and which images and layers it touches.
//!
//! **What.** [`Checker::check`] walks names → documents, refs → indexes → chunks, reads everything (with [`Options::quick`]: asks for
//! existence and sizes of chunks and documents), and answers a [`Report`]. [`Checker::is_sound`] looks at one finding again, after a repair.
//!
//! **Where.** Used by `speedy fsck` and by the daemon's scrub of the store. Calls [`super::inventory`] and [`crate::chunk`]. Writes nothing: a
//! repair is an ordinary publish that takes no doubted chunk for present ([`super::Options::doubted`]).
//!
//! **Words.** An object is *missing* if another one names it and it is not there, *damaged* if its bytes are not what its name or its
//! signature says. What a newer Speedy wrote is neither: it is told apart ([`Report::newer`]).
//!
//! **Invariants.**
//! * **F1** Nothing is called missing that a listing lacks: listings may be late. Each is asked for by name; a ref, whose name has a publisher in it,
//!   for each publisher that was seen. (One that has just begun to publish, of whom a late listing shows nothing, is not known.)
//! * **F2** Nothing is called missing that nothing names any more: a collection deletes what names before what is named, so what names a
//!   missing object is looked at again after it was missed.
//! * **F3** Memory is bounded: by names, refs and a million chunks at a time, whatever the store holds; indexes are read again for each million.
//! * What is damaged on the wire is asked for twice.
//!
//! **When it fails.** A store that does not answer, refuses or has a newer format ends the check with its error: nothing can be told then.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use super::index::IndexDigest;
use super::inventory::{Inventory, Reading};
use super::name::{self, ImageName};
use super::{ContentError, digest_of, reference};
use crate::chunk::remote::Remote;
use crate::object::layout::{self, Kind, Place};
use crate::object::{ObjectError, Objects};
use crate::oci::{ChainId, DiffId};

mod chunks;
mod walk;

/// How many layers and images are named with each finding.
pub const MOST_NAMED: usize = 16;
/// The most findings that are kept; further ones are counted.
const MOST_FINDINGS: usize = 1_000_000;

/// How a store is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Options {
    /// Chunks and documents are not read: whether they are there, and of a size that they can have.
    pub quick: bool,
    /// The most bytes a second that are read; 0 for no limit.
    pub rate: u64,
}

/// What is wrong with an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Problem {
    /// It is not there.
    Missing,
    /// It is not what it should be; how one can tell.
    Damaged(String),
}

/// What an object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Object {
    /// `speedy.json`.
    Description,
    /// One of the objects that there are many of.
    Kept(Kind, Place),
}

impl Object {
    /// Its name in the store.
    pub fn name(&self) -> String {
        match self {
            Object::Description => layout::STORE.to_owned(),
            Object::Kept(kind, place) => kind.object(place),
        }
    }

    /// What people call its kind.
    pub fn kind(&self) -> &'static str {
        match self {
            Object::Description => "description",
            Object::Kept(Kind::Name, _) => "name",
            Object::Kept(Kind::Ref, _) => "ref",
            Object::Kept(Kind::Trace, _) => "trace",
            Object::Kept(Kind::Use, _) => "use",
            Object::Kept(Kind::Document, _) => "document",
            Object::Kept(Kind::Index, _) => "index",
            Object::Kept(Kind::Chunk, _) => "chunk",
        }
    }
}

/// An object that is missing or damaged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The object.
    pub object: Object,
    /// What is wrong with it.
    pub problem: Problem,
    /// Plain bytes of a chunk that an index names.
    pub length: Option<u32>,
    /// The layers that it touches, at most [`MOST_NAMED`] of them.
    pub layers: Vec<TouchedLayer>,
    /// How many layers it touches.
    pub layer_count: usize,
    /// The images that it touches, at most [`MOST_NAMED`] of them.
    pub images: Vec<TouchedImage>,
    /// How many images it touches.
    pub image_count: usize,
}

/// A layer that a finding touches.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct TouchedLayer {
    /// Its chain, if a ref or a name tells.
    pub chain: Option<ChainId>,
    /// What the chain is put on, if a name tells.
    pub below: Option<ChainId>,
    /// Its index, if a ref tells.
    pub index: Option<IndexDigest>,
    /// The digest of its tar, if its index tells.
    pub diff_id: Option<DiffId>,
}

/// An image that a finding touches.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TouchedImage {
    /// Its full reference.
    pub reference: String,
    /// For which platform.
    pub platform: String,
}

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Objects that were looked at, by kind.
    pub checked: BTreeMap<&'static str, u64>,
    /// Bytes that were read of chunks and documents.
    pub bytes: u64,
    /// What is wrong, names first, chunks last.
    pub findings: Vec<Finding>,
    /// How many more there are.
    pub unlisted: u64,
    /// Objects that a newer Speedy wrote: nothing can be said about them, nor about what only they name.
    pub newer: Vec<String>,
    /// Objects with names that Speedy gives to nothing.
    pub foreign: u64,
}

impl Report {
    /// Whether everything that was looked at is sound.
    pub fn is_clean(&self) -> bool {
        self.findings.is_empty() && self.unlisted == 0
    }

    fn add(&mut self, finding: Finding) {
        match self.findings.len() < MOST_FINDINGS {
            true => self.findings.push(finding),
            false => self.unlisted += 1,
        }
    }

    fn count(&mut self, kind: &'static str, number: u64) {
        *self.checked.entry(kind).or_default() += number;
    }
}

/// How far a check is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// What is being looked at.
    pub phase: &'static str,
    /// Objects of this phase that were looked at.
    pub done: u64,
    /// How many there are, as far as that is known.
    pub total: u64,
    /// What is wrong so far.
    pub findings: u64,
}

/// See the module's page.
#[derive(Debug, Clone)]
pub struct Checker {
    inventory: Inventory,
    chunks: Remote,
    options: Options,
    /// How many chunks are held in memory at a time.
    at_once: u64,
}

impl Checker {
    /// Of this store.
    pub fn new(objects: Objects, options: Options) -> Checker {
        let chunks = Remote::new(objects.clone());
        Checker { inventory: Inventory::new(objects), chunks, options, at_once: 1 << 20 }
    }

    /// With another bound on the chunks that are held in memory, for tests.
    pub fn at_once(self, at_once: u64) -> Checker {
        Checker { at_once, ..self }
    }

    /// Looks at the whole store.
    pub async fn check(&self, progress: &(dyn Fn(Progress) + Sync)) -> Result<Report, ContentError> {
        let mut walk = walk::Walk::new(self, progress);
        walk.names().await?;
        walk.documents().await?;
        walk.refs().await?;
        walk.indexes().await?;
        walk.chunks().await?;
        walk.description().await?;
        Ok(walk.report)
    }

    /// Whether what was found wrong is sound now.
    pub async fn is_sound(&self, finding: &Finding) -> Result<bool, ContentError> {
        let problem = match finding.object {
            Object::Description => {
                self.objects().stat(layout::STORE).await?.map_or(Some(Problem::Missing), |_| None)
            }
            Object::Kept(Kind::Chunk, place) => self.chunk_problem(place.hash, finding.length).await?.0,
            Object::Kept(Kind::Document, place) => self.document_problem(place).await?.0,
            Object::Kept(kind, place) => self.problem_of(kind, place).await?,
        };
        Ok(problem.is_none())
    }

    /// What is wrong with an object that is read whole and says what it is.
    async fn problem_of(&self, kind: Kind, place: Place) -> Result<Option<Problem>, ContentError> {
        if kind == Kind::Index {
            return Ok(match self.inventory.index(IndexDigest::from_bytes(place.hash)).await? {
                Reading::Said(_) => None,
                Reading::Gone => Some(Problem::Missing),
                Reading::Unreadable(problem) => Some(Problem::Damaged(problem.to_string())),
            });
        }
        let name = kind.object(&place);
        let bytes = match self.objects().get(&name, name::LONGEST).await {
            Ok(bytes) => bytes,
            Err(error) if of_object(&error) => return Ok(Some(Problem::Damaged(error.to_string()))),
            Err(error) => return Err(error.into()),
        };
        let chain = ChainId(digest_of(&place.hash));
        let Some(bytes) = bytes else {
            // A chain is made by whoever's ref.
            let others =
                kind == Kind::Ref && !self.objects().list(&layout::refs(&chain), 1).await?.is_empty();
            return Ok((!others).then_some(Problem::Missing));
        };
        let said = match kind {
            Kind::Name => ImageName::decode(&bytes, &name).map(drop).map_err(|error| error.to_string()),
            _ => reference::decode(&bytes, &chain, &name).map(drop).map_err(|error| error.to_string()),
        };
        Ok(said.err().map(Problem::Damaged))
    }

    fn objects(&self) -> &Objects {
        self.inventory.objects()
    }
}

/// Keeps to a rate.
#[derive(Debug)]
struct Pace {
    rate: u64,
    next: tokio::sync::Mutex<Instant>,
}

impl Pace {
    fn new(rate: u64) -> Pace {
        Pace { rate, next: tokio::sync::Mutex::new(Instant::now()) }
    }

    /// Returns when these bytes may be followed by others.
    async fn spent(&self, bytes: u64) {
        if self.rate == 0 {
            return;
        }
        let mut next = self.next.lock().await;
        #[expect(clippy::cast_precision_loss, reason = "a pause need not be exact")]
        let pause = Duration::from_secs_f64(bytes as f64 / self.rate as f64);
        *next = (*next).max(Instant::now()) + pause;
        let until = *next;
        drop(next);
        tokio::time::sleep_until(until).await;
    }
}

/// Whether an error is said of this object alone.
fn of_object(error: &ObjectError) -> bool {
    matches!(error, ObjectError::TooLarge { .. })
}
