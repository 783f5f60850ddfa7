//! The inventory: everything that a store holds, kind by kind.
//!
//! **What.** The one walk that all who look at a whole store share: names → refs → indexes → chunks, and documents, traces and uses
//! beside them. [`Inventory::parts`] lists a kind in 256 parts, by the first byte of the hash in the name, so that memory is bounded by a part
//! and not by the store; a kind of which there are few is listed at once. [`Inventory::names`], [`Inventory::refs`] and [`Inventory::index`] read what is listed.
//!
//! **Where.** Used by [`super::collect`] and whoever else looks at a whole store. Calls [`crate::object`].
//!
//! **Words.** A *place* is what an object's name says: its hash, and the id of a key. *Foreign* is what lies under a kind's prefix and
//! has no name that Speedy gives: it is counted and never touched.
//!
//! **Invariants.**
//! * Names and refs of all keys are walked, accepted or not: whose word is taken is another question than what is in use.
//! * A listing may be late; reading an object is not. What was listed and is gone when it is read is passed over.
//! * What cannot be read is told apart from what cannot be asked: [`Unreadable`] is a finding, an error ends the walk.
//!
//! **When it fails.** The walk ends with the store's error; it has changed nothing.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use futures::{FutureExt, Stream, StreamExt, TryFutureExt, TryStreamExt, stream};

use super::index::{IndexDigest, IndexError, LayerIndex, Limits};
use super::name::{self, ImageName, NameError};
use super::reference::{self, Ref, RefError};
use super::trust::PublicKey;
use super::{ContentError, MOST_PUBLISHERS, digest_of};
use crate::object::layout::{self, Kind, Place};
use crate::object::{ObjectError, ObjectInfo, Objects};
use crate::oci::ChainId;

/// How many parts of a kind are listed at once.
const LISTINGS: usize = 8;
/// How many objects are read at once.
const READS: usize = 32;
/// A kind of which there are no more comes in one listing instead of 256: five pages of S3's.
const FEW: usize = 5000;
/// The most objects that one part may have: a billion chunks in all.
const MOST_IN_PART: usize = 4_000_000;

/// An object as a listing shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Entry {
    /// Which kind of object it is.
    pub kind: Kind,
    /// Which of its kind.
    pub place: Place,
    /// Its size in bytes.
    pub size: u64,
    /// When it was last written, seconds since 1970 UTC by the store's clock.
    pub modified: i64,
}

impl Entry {
    /// The object's name.
    pub fn name(&self) -> String {
        self.kind.object(&self.place)
    }

    /// The chain that a ref or a trace tells of.
    pub fn chain(&self) -> ChainId {
        ChainId(digest_of(&self.place.hash))
    }
}

/// One part of a kind.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Part {
    /// Its objects, in no order.
    pub entries: Vec<Entry>,
    /// Objects with names that Speedy gives to nothing.
    pub foreign: u64,
}

/// Why an object says nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    /// A newer Speedy wrote it: only that one knows what it means.
    #[error("{0}")]
    Newer(String),
    /// Nobody can read it.
    #[error("{0}")]
    Damaged(String),
}

/// What came of reading an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reading<T> {
    /// What it says.
    Said(T),
    /// It is not there (any more).
    Gone,
    /// It says nothing.
    Unreadable(Unreadable),
}

/// An object with what came of reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Read<T> {
    /// The object as it was listed.
    pub entry: Entry,
    /// What it says, or why it says nothing.
    pub said: Result<T, Unreadable>,
}

/// See the module's page.
#[derive(Debug, Clone)]
pub struct Inventory {
    objects: Objects,
    limits: Limits,
}

impl Inventory {
    /// Of this store.
    pub fn new(objects: Objects) -> Inventory {
        Inventory { objects, limits: Limits::default() }
    }

    /// The store that is walked.
    pub fn objects(&self) -> &Objects {
        &self.objects
    }

    /// The objects of a kind whose hashes begin with this byte.
    async fn part(&self, kind: Kind, first: u8) -> Result<Part, ContentError> {
        let prefix = format!("{}/{first:02x}", kind.prefix());
        let listed = self.objects.list(&prefix, MOST_IN_PART).await?;
        if listed.len() >= MOST_IN_PART {
            return Err(ContentError::TooMany { prefix, limit: MOST_IN_PART });
        }
        let mut part = Part { entries: Vec::with_capacity(listed.len()), foreign: 0 };
        for object in listed {
            match entry(kind, &object) {
                Some(entry) => part.entries.push(entry),
                None => part.foreign += 1,
            }
        }
        Ok(part)
    }

    /// Whether somebody's ref makes this chain now. A listing may be late in both ways, so each is asked for by name: those that are
    /// listed, and those that these keys would have written.
    pub async fn has_ref(
        &self,
        chain: &[u8; 32],
        keys: impl IntoIterator<Item = u64>,
    ) -> Result<bool, ContentError> {
        let listed = self.objects.list(&layout::refs(&ChainId(digest_of(chain))), MOST_PUBLISHERS).await?;
        let mut asked = HashSet::new();
        let of_key = |key| Kind::Ref.object(&Place { hash: *chain, key });
        let keys = keys.into_iter().take(MOST_PUBLISHERS).map(of_key);
        for name in listed.into_iter().map(|object| object.name).chain(keys) {
            if asked.contains(&name) {
                continue;
            }
            if self.objects.stat(&name).await?.is_some() {
                return Ok(true);
            }
            asked.insert(name);
        }
        Ok(false)
    }

    /// All parts of a kind by one listing, if there are few objects of it.
    async fn few(&self, kind: Kind) -> Result<Option<Vec<Part>>, ContentError> {
        let listed = self.objects.list(kind.prefix(), FEW + 1).await?;
        if listed.len() > FEW {
            return Ok(None);
        }
        let mut parts = vec![Part::default(); 256];
        for object in listed {
            match entry(kind, &object) {
                Some(entry) => parts[usize::from(entry.place.hash[0])].entries.push(entry),
                None => parts[first_byte(&object.name)].foreign += 1,
            }
        }
        Ok(Some(parts))
    }

    /// All parts of a kind, in the order of their first bytes.
    pub fn parts(&self, kind: Kind) -> impl Stream<Item = Result<Part, ContentError>> + Send + '_ {
        self.parts_within(kind, 0..256)
    }

    /// The parts of a kind with these first bytes, in their order.
    pub fn parts_within(
        &self,
        kind: Kind,
        firsts: Range<usize>,
    ) -> impl Stream<Item = Result<Part, ContentError>> + Send + '_ {
        let few = self.few(kind).boxed();
        let parts = few.map_ok(move |few| match few {
            Some(mut parts) => {
                let wanted = parts.drain(..firsts.end.min(256)).skip(firsts.start).collect::<Vec<Part>>();
                stream::iter(wanted.into_iter().map(Ok)).left_stream()
            }
            None => {
                let firsts = firsts.filter_map(|first| u8::try_from(first).ok());
                stream::iter(firsts)
                    .map(move |first| self.part(kind, first).boxed())
                    .buffered(LISTINGS)
                    .right_stream()
            }
        });
        parts.try_flatten_stream()
    }

    /// All names of images.
    pub fn names(
        &self,
    ) -> impl Stream<Item = Result<Read<(ImageName, PublicKey)>, ContentError>> + Send + '_ {
        self.read_all(Kind::Name, name::LONGEST, |entry, bytes| {
            ImageName::decode(bytes, &entry.name()).map_err(|error| match error {
                NameError::UnknownFormat { .. } => Unreadable::Newer(error.to_string()),
                _ => Unreadable::Damaged(error.to_string()),
            })
        })
    }

    /// All refs.
    pub fn refs(&self) -> impl Stream<Item = Result<Read<Ref>, ContentError>> + Send + '_ {
        self.read_all(Kind::Ref, reference::LONGEST, |entry, bytes| {
            reference::decode(bytes, &entry.chain(), &entry.name()).map_err(|error| match error {
                RefError::UnknownFormat { .. } => Unreadable::Newer(error.to_string()),
                _ => Unreadable::Damaged(error.to_string()),
            })
        })
    }

    /// The index with this digest.
    pub async fn index(&self, digest: IndexDigest) -> Result<Reading<Arc<LayerIndex>>, ContentError> {
        Ok(match super::read_index(&self.objects, digest, self.limits).await {
            Ok(index) => Reading::Said(Arc::new(index)),
            Err(ContentError::MissingIndex { .. }) => Reading::Gone,
            Err(ContentError::DamagedIndex { .. }) => damaged(&"its bytes have another hash"),
            Err(ContentError::Object(error @ ObjectError::TooLarge { .. })) => damaged(&error),
            Err(ContentError::Index(error)) => match error {
                IndexError::UnknownFormat { .. } | IndexError::TooLarge { .. } => {
                    Reading::Unreadable(Unreadable::Newer(error.to_string()))
                }
                _ => damaged(&error),
            },
            Err(error) => return Err(error),
        })
    }

    /// Every object of a kind with what it says; those that are gone when they are read are left out.
    fn read_all<T: Send + 'static>(
        &self,
        kind: Kind,
        limit: u64,
        decode: fn(&Entry, &[u8]) -> Result<T, Unreadable>,
    ) -> impl Stream<Item = Result<Read<T>, ContentError>> + Send + '_ {
        let entries = self.parts(kind).map_ok(|part| stream::iter(part.entries).map(Ok)).try_flatten();
        let read = move |entry: Entry| {
            // Boxed: the compiler cannot tell otherwise that the whole may move between threads.
            async move {
                let said = match self.objects.get(&entry.name(), limit).await {
                    Ok(Some(bytes)) => decode(&entry, &bytes),
                    Ok(None) => return Ok(None),
                    Err(error @ ObjectError::TooLarge { .. }) => Err(Unreadable::Damaged(error.to_string())),
                    Err(error) => return Err(ContentError::from(error)),
                };
                Ok(Some(Read { entry, said }))
            }
            .boxed()
        };
        entries.map_ok(read).try_buffered(READS).try_filter_map(|found| async move { Ok(found) })
    }
}

/// A listed object of a kind, if it has such a name.
fn entry(kind: Kind, object: &ObjectInfo) -> Option<Entry> {
    let place = kind.place(&object.name)?;
    Some(Entry { kind, place, size: object.size, modified: object.modified })
}

/// In which part an object with a foreign name is counted.
fn first_byte(name: &str) -> usize {
    let directory = name.split('/').nth(1).filter(|directory| directory.len() == 2);
    directory.and_then(|hex| usize::from_str_radix(hex, 16).ok()).unwrap_or(0)
}

fn damaged<T>(problem: &impl ToString) -> Reading<T> {
    Reading::Unreadable(Unreadable::Damaged(problem.to_string()))
}

#[cfg(test)]
mod tests;
