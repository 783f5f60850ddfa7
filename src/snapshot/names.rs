//! Names of images in the background: what this node pulled is named on the store once all of its layers are there.
//!
//! **What.** Looks at the images of all of containerd's namespaces and writes the name ([`crate::content::name`]) of each one
//! whose layers are snapshots of ours and published, with its documents. One that an accepted publisher has named so already is left at that.
//!
//! Notes beside it which named images this node starts containers on ([`crate::content::uses`]).
//!
//! **Where.** Owned by `publish`, which tells of every layer that it has published; told of containerd's events by `daemon`. Calls
//! [`crate::containerd`] for images and [`crate::content`] for names. No call of containerd waits for it.
//!
//! **Invariants.** Which images there are is containerd's to say, and which are named the store's: nothing is recorded here. A
//! look after a start, or after an outage of either, finds what was missed. At most [`MOST_IMAGES`] are known.
//!
//! **When it fails.** An image whose name cannot be written is tried again, later each time. One that cannot be named (no image
//! of this platform, a layer that nobody published) stays without a name until it or one of its layers changes; `explain` says
//! why. An image that is removed from containerd before its name is written gets none.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::metastore::{MetaStore, PublishEntry};
use super::report::Problem;
use super::{Key, Kind, remote};
use crate::containerd::ContainerdError;
use crate::containerd::blob::Blobs;
use crate::containerd::image::Image;
use crate::containerd::manifest::{LONGEST_DOCUMENT, Platform};
use crate::content::document::Document;
use crate::content::name::{ImageName, repository};
use crate::content::trust::PublicKey;
use crate::content::{ContentError, ContentStore};
use crate::oci::{ChainId, Digest};

/// The most images that are looked at.
const MOST_IMAGES: usize = 4096;
/// What happens within this time is looked at together: a pull makes several images, CRI's three.
const SETTLE: Duration = Duration::from_millis(300);
/// How often uses are looked for where nothing else is to be done.
const USES: Duration = Duration::from_secs(3600);
/// How long a use that was noted, or could not be, is left at that.
const USE_NOTED: Duration = Duration::from_secs(24 * 3600);
/// The longest time between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// See the module's page.
#[derive(Debug)]
pub(super) struct Names {
    meta: Arc<MetaStore>,
    content: Arc<ContentStore>,
    blobs: Blobs,
    platform: Platform,
    changed: Notify,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    look: Look,
    /// By reference.
    images: BTreeMap<String, Known>,
    /// Names written.
    written: u64,
    /// Attempts that failed.
    failures: u64,
    /// Committed snapshots on which others were made since the last look.
    started: HashSet<Key>,
    /// When the use of an image was noted last, by its reference.
    noted: HashMap<String, Instant>,
    uses: Uses,
}

/// What came of noting uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Uses {
    /// Uses that were written.
    pub written: u64,
    /// Those that could not be: without leave to write, say.
    pub failures: u64,
}

/// How the last look at containerd's images is.
#[derive(Debug, PartialEq, Eq)]
enum Look {
    /// Something has happened since it began.
    Due,
    /// It goes on.
    UnderWay,
    Done,
    /// They cannot be seen.
    Failed(String),
}

#[derive(Debug, Clone)]
struct Known {
    target: Digest,
    /// Once its documents were read.
    name: Option<ImageName>,
    came: Came,
}

/// What came of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Came {
    /// To be looked at again with the others.
    Waits(String),
    /// To be tried again.
    Failed(String),
    /// It cannot be named as it is.
    Refused(String),
    Named(PublicKey),
}

/// What a look needs to know of this node.
struct Here {
    /// The chains of committed snapshots.
    chains: HashSet<ChainId>,
    /// Those of them on which a container may run, or has begun to since the last look.
    used: HashSet<ChainId>,
    queue: Vec<PublishEntry>,
}

impl Names {
    pub(super) fn new(meta: Arc<MetaStore>, content: Arc<ContentStore>, blobs: Blobs) -> Names {
        let state = State {
            look: Look::Due,
            images: BTreeMap::new(),
            written: 0,
            failures: 0,
            started: HashSet::new(),
            noted: HashMap::new(),
            uses: Uses::default(),
        };
        let (changed, state) = (Notify::new(), Mutex::new(state));
        Names { meta, content, blobs, platform: Platform::host(), changed, state }
    }

    /// containerd's images have changed.
    pub(super) fn images_changed(&self) {
        self.state.lock().look = Look::Due;
        self.changed.notify_one();
    }

    /// A snapshot that is no layer is made on this committed one.
    pub(super) fn starting(&self, parent: &Key) {
        let mut state = self.state.lock();
        if state.started.len() < MOST_IMAGES {
            state.started.insert(parent.clone());
        }
    }

    /// What came of noting uses.
    pub(super) fn uses(&self) -> Uses {
        self.state.lock().uses
    }

    /// A layer is in the store: images that lacked it may have all of theirs now.
    pub(super) fn published(&self, chain: &ChainId) {
        {
            let mut state = self.state.lock();
            for known in state.images.values_mut() {
                let lacked = known.name.as_ref().is_some_and(|name| name.chains.contains(chain));
                if lacked && matches!(known.came, Came::Refused(_)) {
                    known.came = Came::Waits("one of its layers was published just now".into());
                }
            }
        }
        self.images_changed();
    }

    /// Names that are to be written, a look at the images that is still to be made counting as one.
    pub(super) fn pending(&self) -> usize {
        let state = self.state.lock();
        let look = matches!(state.look, Look::Due | Look::UnderWay);
        usize::from(look)
            + state.images.values().filter(|known| matches!(known.came, Came::Failed(_))).count()
    }

    /// How many were written, and how many attempts failed.
    pub(super) fn counts(&self) -> (u64, u64) {
        let state = self.state.lock();
        (state.written, state.failures)
    }

    /// What goes wrong with those that are tried again.
    pub(super) fn problems(&self) -> Vec<Problem> {
        let state = self.state.lock();
        let problem = |image: &str, chain: Option<&ChainId>, message: &str| Problem {
            chain: chain.map(ToString::to_string).unwrap_or_default(),
            image: Some(image.to_owned()),
            retried: true,
            message: message.to_owned(),
        };
        let look = match &state.look {
            Look::Failed(message) => Some(problem("(the images of containerd)", None, message)),
            _ => None,
        };
        let images = state.images.iter().filter_map(|(reference, known)| match &known.came {
            Came::Failed(message) => {
                let top = known.name.as_ref().and_then(|name| name.chains.last());
                Some(problem(reference, top, message))
            }
            _ => None,
        });
        look.into_iter().chain(images).collect()
    }

    /// What came of the images whose uppermost layer makes this chain, a line for each.
    pub(super) fn explain(&self, chain: &ChainId) -> Vec<String> {
        let state = self.state.lock();
        let named = state.images.values().filter_map(|known| Some((known.name.as_ref()?, &known.came)));
        let those = named.filter(|(name, _)| name.chains.last() == Some(chain));
        those.map(|(name, came)| format!("{name}: {}", sentence(came))).collect()
    }

    /// Looks whenever something has happened, until `stop`.
    pub(super) async fn run(&self, stop: CancellationToken) {
        let mut failed = 0;
        loop {
            let complete = tokio::select! {
                () = stop.cancelled() => return,
                complete = self.look() => complete,
            };
            failed = if complete { 0 } else { (failed + 1).min(9) };
            let pause = async {
                match failed {
                    0 => tokio::time::sleep(USES).await,
                    n => tokio::time::sleep(Duration::from_secs(1 << n).min(LONGEST_PAUSE)).await,
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.changed.notified() => {}
                () = pause => {}
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(SETTLE) => {}
            }
        }
    }

    /// Names what can be named; whether nothing is left to be tried again.
    async fn look(&self) -> bool {
        self.state.lock().look = Look::UnderWay;
        let looked = self.look_at_images().await;
        let mut state = self.state.lock();
        if state.look == Look::UnderWay {
            state.look = match &looked {
                Ok(()) => Look::Done,
                Err(error) => Look::Failed(error.to_string()),
            };
        }
        looked.is_ok() && !state.images.values().any(|known| matches!(known.came, Came::Failed(_)))
    }

    async fn look_at_images(&self) -> Result<(), ContainerdError> {
        let listed = self.images().await?;
        self.state.lock().images.retain(|reference, _| listed.contains_key(reference));
        let here = self.here();
        let mut outages = 0;
        for (reference, (namespace, image)) in listed {
            let known = self.state.lock().images.get(&reference).cloned();
            let known = known.filter(|known| known.target == image.target.digest);
            let name = match known {
                Some(Known { came: Came::Named(_) | Came::Refused(_), .. }) => continue,
                Some(Known { name: Some(name), .. }) => Ok(name),
                _ => self.resolve(&namespace, &image).await?,
            };
            let (name, came) = match name {
                Ok(name) => (Some(name.clone()), self.name(&name, &namespace, &here).await),
                Err(came) => (None, Ok(came)),
            };
            outages = if came.as_ref().is_err_and(ContentError::is_outage) { outages + 1 } else { 0 };
            let came = came.unwrap_or_else(|error| {
                tracing::warn!(image = %reference, %error, "cannot write the name of an image yet");
                Came::Failed(error.to_string())
            });
            let mut state = self.state.lock();
            state.failures += u64::from(matches!(came, Came::Failed(_)));
            state.images.insert(reference, Known { target: image.target.digest, name, came });
            // One alone may be an object that the store cannot give.
            if outages == 2 {
                break;
            }
        }
        self.note_uses(&here).await;
        Ok(())
    }

    /// Nobody waits for it, and nothing depends on it: what cannot be noted is counted, and left for a day.
    async fn note_uses(&self, here: &Here) {
        let due: Vec<(String, ImageName)> = {
            let state = self.state.lock();
            let is_due =
                |reference: &String| state.noted.get(reference).is_none_or(|at| at.elapsed() >= USE_NOTED);
            let named = state
                .images
                .iter()
                .filter(|(reference, known)| matches!(known.came, Came::Named(_)) && is_due(reference));
            let names = named.filter_map(|(reference, known)| Some((reference.clone(), known.name.clone()?)));
            names.filter(|(_, name)| name.chains.last().is_some_and(|top| here.used.contains(top))).collect()
        };
        for (reference, name) in due {
            let came = self.content.record_use(&name).await;
            let mut state = self.state.lock();
            state.noted.insert(reference, Instant::now());
            match came {
                Ok(written) => state.uses.written += u64::from(written),
                Err(error) => {
                    state.uses.failures += 1;
                    tracing::debug!(image = %name, %error, "the use of an image is not noted");
                    if error.is_outage() {
                        break;
                    }
                }
            }
        }
    }

    /// The images worth naming, each with its namespace, by reference: where several namespaces have one, as it was changed last.
    async fn images(&self) -> Result<BTreeMap<String, (String, Image)>, ContainerdError> {
        let containerd = self.blobs.containerd("default").await?;
        let mut newest: BTreeMap<String, (String, Image)> = BTreeMap::new();
        for namespace in containerd.namespaces().await? {
            for image in worth_naming(containerd.in_namespace(&namespace)?.images().await?) {
                let older = newest.get(&image.name).is_some_and(|(_, other)| other.updated >= image.updated);
                if !older && (newest.len() < MOST_IMAGES || newest.contains_key(&image.name)) {
                    newest.insert(image.name.clone(), (namespace.clone(), image));
                }
            }
        }
        Ok(newest)
    }

    fn here(&self) -> Here {
        let records = self.meta.all();
        let started = std::mem::take(&mut self.state.lock().started);
        let below = records.iter().filter(|record| {
            record.info.kind != Kind::Committed
                && !remote::client_key(record.info.name.as_str()).starts_with(remote::EXTRACT)
        });
        let stood_on: HashSet<Key> =
            below.filter_map(|record| record.info.parent.clone()).chain(started).collect();
        let mut here =
            Here { chains: HashSet::new(), used: HashSet::new(), queue: self.meta.publish_queue() };
        for record in records.iter().filter(|record| record.info.kind == Kind::Committed) {
            let Some(chain) = remote::chain_of(&record.info.labels, &record.info.name) else { continue };
            if stood_on.contains(&record.info.name) {
                here.used.insert(chain.clone());
            }
            here.chains.insert(chain);
        }
        here
    }

    /// Its name, or why it has none; an error if containerd cannot be asked.
    async fn resolve(
        &self,
        namespace: &str,
        image: &Image,
    ) -> Result<Result<ImageName, Came>, ContainerdError> {
        let containerd = self.blobs.containerd(namespace).await?;
        match containerd.resolve_image(image, &self.platform).await {
            Ok(found) => Ok(Ok(ImageName::of(&image.name, &found))),
            Err(error @ ContainerdError::Connect(_)) => Err(error),
            Err(error) => Ok(Err(came_of(&error))),
        }
    }

    /// The bytes of its documents: read when they are needed, because those of thousands of images may be megabytes each.
    async fn documents(&self, namespace: &str, name: &ImageName) -> Result<Vec<Document>, ContainerdError> {
        let containerd = self.blobs.containerd(namespace).await?;
        let mut documents = Vec::new();
        for digest in &name.documents {
            documents.push(Document::of(containerd.read(digest, LONGEST_DOCUMENT).await?));
        }
        Ok(documents)
    }

    async fn name(&self, name: &ImageName, namespace: &str, here: &Here) -> Result<Came, ContentError> {
        let Some(top) = name.chains.last() else { return Ok(Came::Refused("it has no layers".into())) };
        if !here.chains.contains(top) {
            return Ok(Came::Waits("it is not unpacked by this snapshotter".into()));
        }
        if let Some(entry) = here.queue.iter().find(|entry| name.chains.contains(&entry.chain)) {
            return Ok(match &entry.dropped {
                None => Came::Waits(format!("layer {} is still to be published", entry.chain)),
                Some(why) => Came::Refused(format!("layer {} was given up: {why}", entry.chain)),
            });
        }
        if let Some(publisher) = self.content.named(name).await? {
            return Ok(Came::Named(publisher));
        }
        let documents = match self.documents(namespace, name).await {
            Ok(documents) => documents,
            Err(error) => return Ok(came_of(&error)),
        };
        match self.content.publish_name(name, &documents).await {
            Ok(()) => {
                self.state.lock().written += 1;
                tracing::info!(image = %name, "every layer of an image is published, and so its name");
                Ok(Came::Named(*self.content.publisher()))
            }
            Err(error @ (ContentError::LayerMissing { .. } | ContentError::Name(_))) => {
                Ok(Came::Refused(error.to_string()))
            }
            Err(error) => Err(error),
        }
    }
}

/// What comes of an image whose documents containerd does not give.
fn came_of(error: &ContainerdError) -> Came {
    match error {
        // Of another platform, or not fetched: it may be yet.
        ContainerdError::NoBlob { .. } => Came::Waits(error.to_string()),
        // It may be this one blob: the others are not to wait for it.
        ContainerdError::Call(_) | ContainerdError::Connect(_) => Came::Failed(error.to_string()),
        _ => Came::Refused(error.to_string()),
    }
}

fn sentence(came: &Came) -> String {
    match came {
        Came::Waits(why) => format!("waits: {why}"),
        Came::Failed(why) => format!("is tried again: {why}"),
        Came::Refused(why) => format!("has no name: {why}"),
        Came::Named(publisher) => format!("named by {publisher}"),
    }
}

/// Without what is no reference (CRI keeps each image under the digest of its configuration too), and without names by digest of
/// what has a tag of the same repository.
fn worth_naming(images: Vec<Image>) -> Vec<Image> {
    let tagged: HashSet<(String, Digest)> = images
        .iter()
        .filter(|image| !image.name.contains('@'))
        .map(|image| (repository(&image.name).to_owned(), image.target.digest.clone()))
        .collect();
    let is_worth_it = |image: &Image| {
        let told = (repository(&image.name).to_owned(), image.target.digest.clone());
        Digest::parse(&image.name).is_err() && !(image.name.contains('@') && tagged.contains(&told))
    };
    images.into_iter().filter(is_worth_it).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::containerd::manifest::Descriptor;

    fn digest(digit: char) -> Digest {
        Digest::parse(&format!("sha256:{}", String::from(digit).repeat(64))).unwrap()
    }

    fn worth(names: &[(&str, char)]) -> Vec<String> {
        let image = |(name, digit): &(&str, char)| Image {
            name: (*name).to_owned(),
            target: Descriptor { media_type: String::new(), digest: digest(*digit), size: 0 },
            updated: (0, 0),
            labels: std::collections::HashMap::new(),
        };
        worth_naming(names.iter().map(image).collect()).into_iter().map(|image| image.name).collect()
    }

    #[test]
    fn an_image_is_named_as_people_name_it() {
        let by_digest = format!("r.example:5000/app@{}", digest('a'));
        // As CRI keeps an image: by tag, by digest, and by the digest of its configuration.
        let id = digest('c').to_string();
        let cri = [("r.example:5000/app:1", 'a'), (by_digest.as_str(), 'a'), (id.as_str(), 'a')];
        assert_eq!(worth(&cri), ["r.example:5000/app:1"]);
        // The tag has moved on, or is another repository's, or there is none.
        assert_eq!(worth(&[("r.example:5000/app:1", 'b'), (&by_digest, 'a')]).len(), 2);
        assert_eq!(worth(&[("r.example:5000/other:1", 'a'), (&by_digest, 'a')]).len(), 2);
        assert_eq!(worth(&[(&by_digest, 'a')]), std::slice::from_ref(&by_digest));
        assert_eq!(worth(&[("r.example:5000/app", 'a'), (&by_digest, 'a')]), ["r.example:5000/app"]);
    }
}
