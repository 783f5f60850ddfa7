//! Documents of images: index, manifest and configuration, as the registry gave them.
//!
//! **What.** A [`Document`] is kept under its own SHA-256, the digest that OCI gives it, with the name of the image that has it
//! ([`super::name`]). Whoever knows the digest checks the bytes with it, so a document carries no signature: which one a tag means is
//! what a publisher signs. [`ContentStore::find_name`] is the way from a tag to the first of them.
//!
//! **Where.** Written by [`ContentStore::publish_name`]; read by `registry`, which gives them to who cannot reach the registry.
//!
//! **Invariants.** A document leaves this module only if it has the digest that was asked for, and is never longer than
//! [`LONGEST_DOCUMENT`].
//!
//! **When it fails.** A document that is damaged in the store is an error that names it, never other bytes. Each publish of an
//! image writes all of its documents again, which mends them and makes them young.

use bytes::Bytes;
use futures::{FutureExt, StreamExt, TryStreamExt, stream};

use super::name::{ImageName, objects};
use super::trust::{PublicKey, Trust};
use super::{ContentError, ContentStore, ListedImage, MOST_PUBLISHERS, REQUESTS};
use crate::containerd::manifest::LONGEST_DOCUMENT;
use crate::object::{ObjectError, layout};
use crate::oci::{Digest, Sha256};

/// A document with its digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    digest: Digest,
    bytes: Bytes,
}

impl Document {
    /// The document with these bytes.
    pub fn of(bytes: Bytes) -> Document {
        let mut hasher = Sha256::default();
        hasher.update(&bytes);
        Document { digest: hasher.digest(), bytes }
    }

    /// The SHA-256 of its bytes.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// Its bytes.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }
}

impl ContentStore {
    /// The document with this digest, or `None` where the store has none.
    pub async fn document(&self, digest: &Digest) -> Result<Option<Bytes>, ContentError> {
        let damaged = || ContentError::DamagedDocument { digest: digest.clone() };
        let bytes = match self.parts.objects.get(&layout::document(digest), LONGEST_DOCUMENT).await {
            Err(ObjectError::TooLarge { .. }) => return Err(damaged()),
            got => got?,
        };
        let Some(bytes) = bytes else { return Ok(None) };
        let document = Document::of(bytes);
        if document.digest == *digest { Ok(Some(document.bytes)) } else { Err(damaged()) }
    }

    /// Written again where they are already: a collection spares what is young.
    pub(super) async fn put_documents(&self, documents: &[Document]) -> Result<(), ContentError> {
        for Document { digest, bytes } in documents {
            self.parts.objects.put(&layout::document(digest), bytes.clone()).await?;
        }
        Ok(())
    }

    /// What this reference is for this platform, in the words of the accepted publisher that has written last. Names that are
    /// damaged say nothing.
    pub async fn find_name(
        &self,
        reference: &str,
        platform: &str,
    ) -> Result<Option<ListedImage>, ContentError> {
        let below = objects(reference, platform);
        let written = match &self.parts.trust {
            Trust::Any => {
                let listed = self.parts.objects.list(&below, MOST_PUBLISHERS).await?;
                listed.into_iter().map(|object| (object.name, object.modified)).collect()
            }
            Trust::Keys(keys) => self.written_by(&below, keys).await?,
        };
        let read = stream::iter(written).map(|(name, published)| {
            async move {
                let decoded = self.read_name(&name).await?;
                Ok::<_, ContentError>(decoded.map(|decoded| (decoded, published)))
            }
            .boxed()
        });
        let read: Vec<_> = read.buffered(REQUESTS).try_collect().await?;
        let names = read.into_iter().flatten().filter_map(|(decoded, published)| {
            let (image, publisher): (ImageName, PublicKey) = decoded.ok()?;
            self.accepts(&publisher).then_some(ListedImage { image, publisher, published })
        });
        Ok(names.max_by_key(|found| found.published))
    }

    /// The objects of these publishers and this one below a prefix, with the times at which they were written.
    async fn written_by(&self, below: &str, keys: &[PublicKey]) -> Result<Vec<(String, i64)>, ContentError> {
        let others = keys.iter().filter(|key| *key != self.publisher());
        let names: Vec<String> = std::iter::once(self.publisher())
            .chain(others)
            .map(|key| format!("{below}/{}", key.id()))
            .collect();
        let asked = stream::iter(names).map(|name| {
            async move {
                let found = self.parts.objects.stat(&name).await?;
                Ok::<_, ContentError>(found.map(|found| (name, found.modified)))
            }
            .boxed()
        });
        asked.buffered(REQUESTS).try_filter_map(|found| async move { Ok(found) }).try_collect().await
    }
}
