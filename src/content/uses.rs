//! Uses of images: which node has used what, and when.
//!
//! An empty object `uses/<2 hex>/<hash>/<key id>`, with the hash that the image's name has. Its last modification says when this node used the
//! image last, to within a day. Nobody signs it: whoever can write to a store can keep an image in use, which is what he could do by
//! using it.

use bytes::Bytes;

use super::name::{ImageName, PREFIX};
use super::{ContentError, ContentStore};
use crate::object::Touched;
use crate::object::layout::Kind;

/// How often it is written, in seconds.
const RENEWAL: i64 = 24 * 3600;

impl ContentStore {
    /// Notes that this node uses the image; at most once a day for each image. Answers whether something was written.
    pub async fn record_use(&self, image: &ImageName) -> Result<bool, ContentError> {
        let name = self.use_of(image);
        let objects = &self.parts.objects;
        let found = objects.stat(&name).await?;
        if found.as_ref().is_some_and(|found| objects.now().saturating_sub(found.modified) < RENEWAL) {
            return Ok(false);
        }
        if found.is_none() || objects.touch(&name).await? != Touched::Done {
            objects.put(&name, Bytes::new()).await?;
        }
        Ok(true)
    }

    fn use_of(&self, image: &ImageName) -> String {
        format!("{}{}", Kind::Use.prefix(), image.object(self.publisher()).trim_start_matches(PREFIX))
    }
}
