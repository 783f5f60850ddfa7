//! Right bytes over wrong ones: what a repair writes. Each object is checked before it is written, and nothing is ever deleted. Refs and names
//! are written by publishing only, which minds collections.

use bytes::Bytes;

use super::document::Document;
use super::index::{IndexDigest, LayerIndex};
use super::{ContentError, ContentStore};
use crate::chunk::ChunkId;
use crate::object::layout;

impl ContentStore {
    /// Writes a chunk over what may be there; its bytes must have its id. Durable on return.
    pub async fn restore_chunk(&self, id: ChunkId, plain: Bytes) -> Result<(), ContentError> {
        Ok(self.parts.chunks.put(id, plain).await.map(drop)?)
    }

    /// Writes a layer index over what may be there. Durable on return. Only after its chunks (**C2**). A collection that is under way
    /// ([`ContentStore::is_collected`], asked afterwards) may not know that it needs them: then they have to be published again.
    pub async fn restore_index(&self, bytes: Bytes) -> Result<IndexDigest, ContentError> {
        LayerIndex::decode(&bytes, self.options.limits)?;
        let digest = IndexDigest::of(&bytes);
        self.parts.objects.put(&layout::index(digest.as_bytes()), bytes).await?;
        Ok(digest)
    }

    /// Writes a document over what may be there. Durable on return.
    pub async fn restore_document(&self, document: &Document) -> Result<(), ContentError> {
        self.put_documents(std::slice::from_ref(document)).await
    }
}
