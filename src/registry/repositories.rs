//! Which documents belong to which repositories, in the words of the accepted publishers.
//!
//! A pull begins with a tag, whose name on the store is found by itself and lists the image's documents; those are remembered here.
//! One that begins with a digest finds nobody's name by itself: the names of the store are listed then, and those that are new
//! since the last time are read.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::content::name::{ImageName, repository};
use crate::content::{ContentError, ContentStore};
use crate::oci::Digest;

/// The most names that are read.
const MOST_NAMES: usize = 1 << 16;
/// The most documents that are remembered.
const MOST_DOCUMENTS: usize = 1 << 19;
/// How many names are read before what they say is kept: a listing that is cut short goes on there.
const PIECE: usize = 512;
/// How soon the names are listed again for a document that nobody has named.
const AGAIN: Duration = Duration::from_secs(10);

/// A document of a repository, or an object on the store: the hash of its name.
type Key = [u8; 16];

/// See the module's page.
#[derive(Debug, Default)]
pub(super) struct Repositories {
    state: Mutex<State>,
    /// When the names were listed last; locked while somebody lists them.
    listed: tokio::sync::Mutex<Option<Instant>>,
}

#[derive(Debug, Default)]
struct State {
    documents: HashSet<Key>,
    /// Names that were read, with the times at which they were written.
    names: HashMap<Key, i64>,
}

fn key(parts: [&str; 2]) -> Key {
    let hash = blake3::hash(parts.join("\0").as_bytes());
    let mut key = [0; 16];
    key.copy_from_slice(&hash.as_bytes()[..16]);
    key
}

impl Repositories {
    /// The documents of this image belong to its repository.
    pub(super) fn remember(&self, image: &ImageName) {
        let mut state = self.state.lock();
        if state.documents.len() + image.documents.len() > MOST_DOCUMENTS {
            *state = State::default();
        }
        let repository = repository(&image.reference);
        state.documents.extend(image.documents.iter().map(|digest| key([repository, digest.as_str()])));
    }

    /// Whether an accepted publisher has named an image of this repository that has this document.
    pub(super) async fn has(
        &self,
        content: &ContentStore,
        repository: &str,
        digest: &Digest,
    ) -> Result<bool, ContentError> {
        let key = key([repository, digest.as_str()]);
        let is_known = || self.state.lock().documents.contains(&key);
        if is_known() {
            return Ok(true);
        }
        let mut listed = self.listed.lock().await;
        let is_due = listed.is_none_or(|listed| listed.elapsed() >= AGAIN);
        if !is_known() && is_due {
            self.list(content).await?;
            *listed = Some(Instant::now());
        }
        Ok(is_known())
    }

    async fn list(&self, content: &ContentStore) -> Result<(), ContentError> {
        let mut listed = content.name_objects(MOST_NAMES).await?;
        {
            let state = self.state.lock();
            listed.retain(|object| state.names.get(&key(["", &object.name])) != Some(&object.modified));
        }
        for piece in listed.chunks(PIECE) {
            let read = content.read_names(piece.to_vec()).await?;
            read.images.iter().for_each(|found| self.remember(&found.image));
            let names = piece.iter().map(|object| (key(["", &object.name]), object.modified));
            self.state.lock().names.extend(names);
        }
        Ok(())
    }
}
