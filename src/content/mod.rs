//! Layers on the object store.
//!
//! **What.** [`ContentStore`] finds the layer that makes a chain ([`ContentStore::lookup`]), gives its chunks, and publishes
//! layer images ([`publish`]), the names of images ([`name`]) and their documents ([`document`]). [`index`], [`mod@reference`], [`name`] and [`trace`] are the formats,
//! [`trust`] says whose word is taken. [`below`] answers what a layer takes over from the layers below it. [`memory`] is a source of layers for trials.
//!
//! **Where.** Called by `snapshot`, `daemon` and `cli`; calls [`crate::chunk`], [`crate::object`] and [`crate::image`]. Knows no
//! snapshot and nothing of this node's disk but the image file that it is given.
//!
//! **Words.** A *layer index* is a layer image's list of chunks. A *ref* is a publisher's signed word that a chain is made by
//! the layer with some index. To *publish* is to upload what the store lacks.
//!
//! **Invariants.**
//! * **C2** A ref is visible only after its index, an index only after its chunks, an image's name only after the refs of all its
//!   layers and its documents. Each is durable before the next is written.
//! * A layer leaves [`ContentStore::lookup`] only if its ref is signed by a key that is accepted and its index has the digest
//!   that the ref names: the signature of a ref covers index and chunks.
//!
//! **When it fails.** Half a publish is invisible, and repeating it uploads only what is still missing. A failure here is never
//! containerd's problem: the caller falls back to an ordinary pull.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use tokio::time::Instant;

use crate::chunk::store::ChunkSink;
use crate::chunk::{ChunkError, ChunkId, ChunkRef};
use crate::object::{ObjectError, ObjectInfo, Objects, layout};
use crate::oci::{ChainId, Digest};

use self::index::{IndexDigest, IndexError, LayerIndex, Limits};
use self::name::{ImageName, NameError};
use self::reference::{Ref, RefError};
use self::trust::{PublicKey, PublisherKey, Trust};

pub mod below;
pub mod collect;
pub mod document;
pub mod fsck;
pub mod guard;
pub mod index;
pub mod inventory;
pub mod memory;
pub mod name;
pub mod notice;
pub mod pattern;
pub mod publish;
pub mod reference;
mod restore;
pub mod survey;
pub mod trace;
pub mod trust;
pub mod uses;

mod buckets;
mod cut;
mod naming;

/// How many small requests are under way at once.
const REQUESTS: usize = 32;
/// How many chunks a sample has: a layer of 1 GB has 4000, and a gateway answers some 1000 such requests a second. A directory is asked
/// for all that can be asked for in that time.
const SAMPLE: usize = 16;
const SAMPLE_TIME: Duration = Duration::from_millis(100);
/// The most publishers of one chain that are looked at.
const MOST_PUBLISHERS: usize = 64;

/// The longest time between a publisher's look at what is there already and the ref or name that relies on it; what takes longer looks
/// again. [`collect`] says what it is for.
const LONGEST_LOOK: Duration = Duration::from_secs(6 * 3600);
/// By how much this machine's clock and the store's may differ, in seconds.
const CLOCKS_DIFFER: u64 = 3600;

/// Why a layer cannot be had or published.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    /// The object store cannot be used.
    #[error(transparent)]
    Object(#[from] ObjectError),
    /// A chunk cannot be had or kept.
    #[error(transparent)]
    Chunk(#[from] ChunkError),
    /// The store did not answer in the time there was.
    #[error("the store did not answer in time")]
    TooLate,
    /// An object under an accepted publisher's name is not that publisher's ref.
    #[error("ref {name}: {source}")]
    Ref {
        /// The object.
        name: String,
        /// What is wrong with it.
        #[source]
        source: RefError,
    },
    /// A ref names an index that is not there.
    #[error("layer index {digest} is not in the store, although a ref names it")]
    MissingIndex {
        /// The index.
        digest: IndexDigest,
    },
    /// What is there under an index's name is something else.
    #[error("layer index {digest} is damaged in the store")]
    DamagedIndex {
        /// The index.
        digest: IndexDigest,
    },
    /// An index cannot be read or made.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// A name of an image cannot be made.
    #[error(transparent)]
    Name(#[from] NameError),
    /// An image whose name is to be written lacks a layer.
    #[error("layer {chain} is not published, so the image's name is not written: publish it first")]
    LayerMissing {
        /// The chain of the layer.
        chain: ChainId,
    },
    /// What is there under a document's name is something else.
    #[error("document {digest} is damaged in the store; publish an image that has it again")]
    DamagedDocument {
        /// The document.
        digest: Digest,
    },
    /// The layer image cannot be read.
    #[error("the layer image cannot be read: {0}")]
    Image(#[source] std::io::Error),
    /// The layer image is not the one it is said to be.
    #[error("the layer image is not what was built: {problem}; build it again")]
    OtherImage {
        /// How one can tell.
        problem: &'static str,
    },
    /// More objects than there can be.
    #[error("{prefix} holds {limit} objects or more, which no store of ours does: look at who writes to it")]
    TooMany {
        /// Under what they are.
        prefix: String,
        /// The limit.
        limit: usize,
    },
    /// What was written at the beginning may be too old for what is to be written at the end.
    #[error(
        "it took longer than a collection allows, each time; publish it again when store and network are quicker"
    )]
    TooSlow,
    /// Ages cannot be told.
    #[error("this machine's clock and the store's differ by {seconds} s: set them right, and repeat it")]
    Clock {
        /// By how much.
        seconds: u64,
    },
    /// Other collectors are in the way.
    #[error("other collections begin and end all the time; wait for them, and run this one again")]
    Contended,
    /// The caller gave up.
    #[error("stopped before it was complete; repeat it to go on")]
    Cancelled,
}

impl ContentError {
    /// Whether nobody answers: what is asked next gets no answer either.
    pub fn is_outage(&self) -> bool {
        match self {
            ContentError::TooLate | ContentError::Object(ObjectError::Unreachable(_)) => true,
            ContentError::Chunk(ChunkError::Store { source, .. }) => {
                matches!(source, ObjectError::Unreachable(_))
            }
            _ => false,
        }
    }
}

/// How the store is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// What an index may ask of this node.
    pub limits: Limits,
    /// Chunks older than this are made young again when a layer with them is published: less than the time for which a
    /// collection spares what no ref names.
    pub renew_after: Duration,
    /// Chunks that a publish writes although the store has them: what it has is damaged.
    pub doubted: Arc<HashSet<ChunkId>>,
    /// How many chunks a publish has under way at once.
    pub uploads: usize,
    /// How many bytes of chunks a publish has in memory at once, plain.
    pub in_flight: u32,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            limits: Limits::default(),
            renew_after: Duration::from_secs(24 * 60 * 60),
            doubted: Arc::default(),
            uploads: 48,
            in_flight: 32 << 20,
        }
    }
}

/// What a [`ContentStore`] is made of.
#[derive(Debug)]
pub struct Parts {
    /// The object store.
    pub objects: Objects,
    /// Its chunks, with everything that makes them quick and safe.
    pub chunks: Arc<dyn ChunkSink>,
    /// This node's own key; its own refs are always accepted.
    pub key: PublisherKey,
    /// Whose refs are accepted beside.
    pub trust: Trust,
}

/// The layers on an object store.
#[derive(Debug)]
pub struct ContentStore {
    parts: Parts,
    options: Options,
}

/// What the store says about a chain.
#[derive(Debug, Clone)]
pub enum Lookup {
    /// It has the layer.
    Found(Found),
    /// It has not.
    Missing,
    /// It has, but only in the words of publishers that are not accepted.
    Refused {
        /// Their keys.
        keys: Vec<PublicKey>,
    },
}

/// A layer that the store has.
#[derive(Debug, Clone)]
pub struct Found {
    /// Its chunks.
    pub index: Arc<LayerIndex>,
    /// The digest of its index.
    pub digest: IndexDigest,
    /// Who published it.
    pub publisher: PublicKey,
}

/// What the store's refs say about a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Word {
    /// An accepted publisher names an index.
    Accepted(Ref),
    /// Nobody has said anything.
    Silence,
    /// Only publishers that are not accepted have.
    Refused(Vec<PublicKey>),
}

/// An image whose name was found in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedImage {
    /// The image.
    pub image: ImageName,
    /// Who published it.
    pub publisher: PublicKey,
    /// When, in seconds since 1970 UTC by the store's clock.
    pub published: i64,
}

/// The images of a store.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Images {
    /// Those whose name is signed by a publisher that is accepted.
    pub images: Vec<ListedImage>,
    /// How many names are damaged, from the future, or signed by somebody else.
    pub passed_over: usize,
}

impl ContentStore {
    /// A store made of these parts.
    pub fn new(parts: Parts, options: Options) -> ContentStore {
        ContentStore { parts, options }
    }

    /// This node's own public key.
    pub fn publisher(&self) -> &PublicKey {
        self.parts.key.public()
    }

    /// Whose refs are accepted beside its own.
    pub fn trust(&self) -> &Trust {
        &self.parts.trust
    }

    /// The layer that makes this chain when put on the layers below it, with its index; asks until `deadline`.
    pub async fn lookup(&self, chain: &ChainId, deadline: Instant) -> Result<Lookup, ContentError> {
        if Instant::now() >= deadline {
            return Err(ContentError::TooLate);
        }
        let found = async {
            match self.word(chain).await? {
                Word::Accepted(Ref { index: digest, publisher }) => {
                    let index = Arc::new(self.index(digest).await?);
                    Ok(Lookup::Found(Found { index, digest, publisher }))
                }
                Word::Silence => Ok(Lookup::Missing),
                Word::Refused(keys) => Ok(Lookup::Refused { keys }),
            }
        };
        tokio::time::timeout_at(deadline, found).await.unwrap_or(Err(ContentError::TooLate))
    }

    /// What the refs of this chain say; asks the accepted publishers first and lists the others only if those are silent.
    pub async fn word(&self, chain: &ChainId) -> Result<Word, ContentError> {
        let listed = match &self.parts.trust {
            Trust::Keys(keys) => keys.as_slice(),
            Trust::Any => &[],
        };
        let mut keys = vec![*self.publisher()];
        keys.extend(listed.iter().filter(|key| *key != self.publisher()));
        let names: Vec<String> = keys.iter().map(|key| reference::name(chain, key)).collect();
        let mut asked = stream::iter(names).map(|name| self.read_ref(chain, name).boxed()).buffered(REQUESTS);
        let mut failed = None;
        while let Some(answer) = asked.next().await {
            match answer {
                Ok(Some(found)) => return Ok(Word::Accepted(found)),
                Ok(None) => {}
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        drop(asked);
        match failed {
            None => self.word_of_others(chain, &keys).await,
            Some(error) => Err(error),
        }
    }

    async fn word_of_others(&self, chain: &ChainId, asked: &[PublicKey]) -> Result<Word, ContentError> {
        let listed = match self.parts.objects.list(&layout::refs(chain), MOST_PUBLISHERS).await {
            // Who may read but not list learns nothing of strangers, and needs them for nothing but to name them.
            Err(ObjectError::Denied(_)) if self.parts.trust != Trust::Any => return Ok(Word::Silence),
            listed => listed?,
        };
        let mut names: Vec<String> = listed.into_iter().map(|object| object.name).collect();
        names.sort();
        let read = stream::iter(names).map(|name| self.read_ref(chain, name).boxed()).buffered(REQUESTS);
        let read: Vec<_> = read.collect().await;
        let mut found = Vec::new();
        for answer in read {
            match answer {
                Ok(answer) => found.extend(answer.filter(|found| !asked.contains(&found.publisher))),
                // A stranger's rubbish: nobody can be named for it.
                Err(ContentError::Ref { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        match self.parts.trust {
            Trust::Any if !found.is_empty() => Ok(Word::Accepted(found.swap_remove(0))),
            _ if found.is_empty() => Ok(Word::Silence),
            _ => Ok(Word::Refused(found.into_iter().map(|found| found.publisher).collect())),
        }
    }

    async fn read_ref(&self, chain: &ChainId, name: String) -> Result<Option<Ref>, ContentError> {
        let bytes = match self.parts.objects.get(&name, reference::LONGEST).await {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Ok(None),
            Err(ObjectError::TooLarge { .. }) => {
                return Err(ContentError::Ref { name, source: RefError::Malformed });
            }
            Err(error) => return Err(error.into()),
        };
        let read = reference::decode(&bytes, chain, &name);
        read.map(Some).map_err(|source| ContentError::Ref { name, source })
    }

    /// The index with this digest.
    pub async fn index(&self, digest: IndexDigest) -> Result<LayerIndex, ContentError> {
        read_index(&self.parts.objects, digest, self.options.limits).await
    }

    /// Some of these chunks, other ones each time, that the store is found to lack: a ref is written after its chunks, so this only
    /// finds a store that has lost many. Takes a moment.
    pub async fn sample(
        &self,
        chunks: impl IntoIterator<Item = ChunkRef>,
    ) -> Result<Vec<ChunkRef>, ContentError> {
        match self.parts.objects.is_directory() {
            true => self.lacking(chunks, usize::MAX, SAMPLE_TIME).await,
            false => self.lacking(chunks, SAMPLE, Duration::MAX).await,
        }
    }

    /// Those of these chunks that the store lacks, each once; does not look at their bytes.
    pub async fn missing(
        &self,
        chunks: impl IntoIterator<Item = ChunkRef>,
    ) -> Result<Vec<ChunkRef>, ContentError> {
        self.lacking(chunks, usize::MAX, Duration::MAX).await
    }

    async fn lacking(
        &self,
        chunks: impl IntoIterator<Item = ChunkRef>,
        most: usize,
        within: Duration,
    ) -> Result<Vec<ChunkRef>, ContentError> {
        // The order of a hash map is another one each time.
        let distinct: HashMap<ChunkId, ChunkRef> =
            chunks.into_iter().map(|chunk| (chunk.id, chunk)).collect();
        let asked = distinct.into_values().take(most).map(|chunk| {
            // Boxed: the compiler cannot tell otherwise that the whole may move between threads.
            async move {
                let there = self.parts.chunks.contains(chunk.id).await?;
                Ok::<_, ContentError>((!there).then_some(chunk))
            }
            .boxed()
        });
        let lacking = stream::iter(asked)
            .buffer_unordered(REQUESTS)
            .take_until(tokio::time::sleep(within))
            .try_filter_map(|lacking| async move { Ok(lacking) });
        lacking.try_collect().await
    }

    /// Whether the store is far: [`Objects::is_far`].
    pub fn is_far(&self) -> bool {
        self.parts.objects.is_far()
    }

    /// How far: [`Objects::distance`].
    pub fn distance(&self) -> Duration {
        self.parts.objects.distance()
    }

    /// Sees to it that the next requests go out at once: [`Objects::get_ready`].
    pub async fn get_ready(&self, connections: usize) {
        self.parts.objects.get_ready(connections).await;
    }

    /// The plain bytes of a chunk, which have its id.
    pub async fn chunk(&self, chunk: ChunkRef) -> Result<Bytes, ContentError> {
        Ok(self.parts.chunks.get(chunk).await?)
    }

    /// The accepted publisher that has written exactly this name, if one has. Objects that are damaged say nothing.
    pub async fn named(&self, image: &ImageName) -> Result<Option<PublicKey>, ContentError> {
        let names: Vec<String> = match &self.parts.trust {
            Trust::Keys(keys) => {
                std::iter::once(self.publisher()).chain(keys).map(|key| image.object(key)).collect()
            }
            Trust::Any => {
                let listed = self.parts.objects.list(&image.objects(), MOST_PUBLISHERS).await?;
                listed.into_iter().map(|object| object.name).collect()
            }
        };
        for name in names {
            match self.read_name(&name).await? {
                Some(Ok((said, publisher))) if said == *image => return Ok(Some(publisher)),
                _ => {}
            }
        }
        Ok(None)
    }

    /// What the object `name` says, if there is one.
    async fn read_name(
        &self,
        name: &str,
    ) -> Result<Option<Result<(ImageName, PublicKey), NameError>>, ContentError> {
        let bytes = match self.parts.objects.get(name, name::LONGEST).await {
            Err(ObjectError::TooLarge { .. }) => {
                return Ok(Some(Err(NameError::Malformed("longer than a name is"))));
            }
            got => got?,
        };
        Ok(bytes.map(|bytes| ImageName::decode(&bytes, name)))
    }

    /// The images that accepted publishers have published, in the order of their names; looks at `limit` names at most.
    pub async fn images(&self, limit: usize) -> Result<Images, ContentError> {
        let listed = self.name_objects(limit).await?;
        self.read_names(listed).await
    }

    /// The objects that name images, whoever wrote them; `limit` of them at most.
    pub async fn name_objects(&self, limit: usize) -> Result<Vec<ObjectInfo>, ContentError> {
        Ok(self.parts.objects.list(name::PREFIX, limit).await?)
    }

    /// The images that these objects name, those that accepted publishers have published, in the order of their names.
    pub async fn read_names(&self, listed: Vec<ObjectInfo>) -> Result<Images, ContentError> {
        let mut read = stream::iter(listed)
            .map(|object| {
                // Boxed: the compiler cannot tell otherwise that the whole may move between threads.
                async move {
                    let decoded = self.read_name(&object.name).await?;
                    Ok::<_, ContentError>((decoded, object.modified))
                }
                .boxed()
            })
            .buffered(REQUESTS);
        let mut images = Images::default();
        while let Some((decoded, published)) = read.try_next().await? {
            match decoded {
                Some(Ok((image, publisher))) if self.accepts(&publisher) => {
                    images.images.push(ListedImage { image, publisher, published });
                }
                _ => images.passed_over += 1,
            }
        }
        images.images.sort_by(|a, b| {
            (&a.image.reference, &a.image.platform).cmp(&(&b.image.reference, &b.image.platform))
        });
        Ok(images)
    }

    /// Whether a collection may be deleting just now.
    pub async fn is_collected(&self) -> Result<bool, ContentError> {
        notice::is_up(&self.parts.objects).await
    }

    /// Whether this publisher's word is taken.
    pub fn accepts(&self, publisher: &PublicKey) -> bool {
        publisher == self.publisher()
            || match &self.parts.trust {
                Trust::Keys(keys) => keys.contains(publisher),
                Trust::Any => true,
            }
    }
}

/// The index with this digest.
async fn read_index(
    objects: &Objects,
    digest: IndexDigest,
    limits: Limits,
) -> Result<LayerIndex, ContentError> {
    let bytes = objects.get(&layout::index(digest.as_bytes()), limits.encoded()).await?;
    let bytes = bytes.ok_or(ContentError::MissingIndex { digest })?;
    if IndexDigest::of(&bytes) != digest {
        return Err(ContentError::DamagedIndex { digest });
    }
    Ok(LayerIndex::decode(&bytes, limits)?)
}

/// The 32 bytes of a digest.
fn raw(digest: &Digest) -> [u8; 32] {
    let hex = digest.as_str().trim_start_matches("sha256:");
    // Any 32 bytes in hexadecimal are such a hash.
    *blake3::Hash::from_hex(hex).expect("a digest has 64 hexadecimal digits").as_bytes()
}

/// The digest with these 32 bytes.
pub fn digest_of(bytes: &[u8; 32]) -> Digest {
    let text = format!("sha256:{}", blake3::Hash::from_bytes(*bytes).to_hex());
    Digest::parse(&text).expect("64 lower-case hexadecimal digits")
}
