//! Naming an image: its documents and its name, when all of its layers are there and will stay.
//!
//! **Invariants.**
//! * **C2** The name is written last.
//! * **C4** A ref that a name relies on is young, or is made young before: a collection whose listing does not show the name yet
//!   spares it. A collection that is under way is waited for ([`super::notice`]).
//!
//! **When it fails.** Nothing but documents was written, which the next collection takes; the caller tries again.

use bytes::Bytes;
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use tokio::time::{Instant, sleep};

use super::document::Document;
use super::name::{ImageName, NameError};
use super::notice::SETTLED;
use super::{CLOCKS_DIFFER, ContentError, ContentStore, LONGEST_LOOK, REQUESTS, Word, reference};
use crate::object::{Touched, layout};
use crate::oci::ChainId;

/// How often everything is looked at before it is given up.
const PASSES: u32 = 3;

/// A ref that a name relies on.
struct Relied {
    name: String,
    bytes: Bytes,
}

impl ContentStore {
    /// Writes an image's documents, which are those that its name lists, and then its name; durable on return. Refused while a
    /// layer has no accepted ref (**C2**).
    pub async fn publish_name(&self, image: &ImageName, documents: &[Document]) -> Result<(), ContentError> {
        let bytes = Bytes::from(image.encode(&self.parts.key)?);
        if !documents.iter().map(Document::digest).eq(&image.documents) {
            return Err(NameError::OtherDocuments.into());
        }
        let mut relied: Vec<Relied> = Vec::new();
        let mut settled = false;
        for _ in 0..PASSES {
            let (began, by_clock) = (Instant::now(), self.parts.objects.now());
            // Those of the pass before: what was made young then may have been deleted since.
            self.restore(&relied).await?;
            // Something is written in any case, and that tells the store's time.
            relied = self.rely(image, documents.is_empty()).await?;
            self.put_documents(documents).await?;
            let document = documents.first().map(|document| layout::document(document.digest()));
            if let Some(written) = document.as_ref().or(relied.first().map(|relied| &relied.name)) {
                self.check_clock(written).await?;
            }
            let took = self.parts.objects.now().saturating_sub(by_clock);
            if began.elapsed() > LONGEST_LOOK || took > LONGEST_LOOK.as_secs().cast_signed() {
                continue;
            }
            if !settled && self.is_collected().await? {
                sleep(SETTLED).await;
                settled = true;
                continue;
            }
            let name = image.object(self.publisher());
            self.parts.objects.put(&name, bytes.clone()).await?;
            if self.is_collected().await? {
                sleep(SETTLED).await;
                self.restore(&[Relied { name, bytes }]).await?;
            }
            return Ok(());
        }
        Err(ContentError::TooSlow)
    }

    /// Whether this machine's clock can tell ages, by an object that was just written: with another one an old ref seems to be young,
    /// and a notice to be old.
    async fn check_clock(&self, written: &str) -> Result<(), ContentError> {
        let Some(found) = self.parts.objects.stat(written).await? else { return Ok(()) };
        let seconds = found.modified.abs_diff(self.parts.objects.now());
        match seconds > CLOCKS_DIFFER {
            true => Err(ContentError::Clock { seconds }),
            false => Ok(()),
        }
    }

    /// Sees to it that each layer has an accepted ref that stays; `renew` makes it young however young it is.
    async fn rely(&self, image: &ImageName, renew: bool) -> Result<Vec<Relied>, ContentError> {
        let asked = image.chains.clone().into_iter().map(|chain| {
            // Boxed: the compiler cannot tell otherwise that the whole may move between threads.
            async move {
                match self.word(&chain).await? {
                    Word::Accepted(said) => {
                        self.keep_ref(reference::name(&chain, &said.publisher), chain, renew).await
                    }
                    Word::Silence | Word::Refused(_) => Err(ContentError::LayerMissing { chain }),
                }
            }
            .boxed()
        });
        stream::iter(asked).buffered(REQUESTS).try_collect().await
    }

    async fn keep_ref(&self, name: String, chain: ChainId, renew: bool) -> Result<Relied, ContentError> {
        let objects = &self.parts.objects;
        let missing = || ContentError::LayerMissing { chain: chain.clone() };
        let bytes = objects.get(&name, reference::LONGEST).await?.ok_or_else(missing)?;
        let found = objects.stat(&name).await?.ok_or_else(missing)?;
        let age = objects.now().saturating_sub(found.modified);
        let old = renew || age >= self.options.renew_after.as_secs().cast_signed();
        if old && objects.touch(&name).await? != Touched::Done {
            objects.put(&name, bytes.clone()).await?;
        }
        Ok(Relied { name, bytes })
    }

    /// Writes again what is missing.
    async fn restore(&self, written: &[Relied]) -> Result<(), ContentError> {
        for Relied { name, bytes } in written {
            if self.parts.objects.stat(name).await?.is_none() {
                self.parts.objects.put(name, bytes.clone()).await?;
            }
        }
        Ok(())
    }
}
