//! The chunks that complete layer images of this node hold, so that none is fetched that is already here.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use parking_lot::RwLock;

use crate::chunk::{ChunkId, ChunkRef};
use crate::content::index::LayerIndex;

/// Where a chunk lies on this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    serial: u64,
    /// In blocks.
    block: u32,
}

/// See the module's page. Some 60 bytes of memory for each chunk.
#[derive(Debug, Default)]
pub struct LocalChunks(RwLock<HashMap<ChunkId, Place>>);

impl LocalChunks {
    /// The chunks of a complete layer image can be had from now on.
    pub fn add(&self, serial: u64, index: &LayerIndex) {
        let mut places = self.0.write();
        for (offset, chunk) in index.chunks() {
            if let Ok(block) = u32::try_from(offset / u64::from(crate::chunk::BLOCK)) {
                places.entry(chunk.id).or_insert(Place { serial, block });
            }
        }
    }

    /// The layer image is going to be removed.
    pub fn forget(&self, serial: u64) {
        self.0.write().retain(|_, place| place.serial != serial);
    }

    /// Whether some layer image on this node has it.
    pub fn contains(&self, id: &ChunkId) -> bool {
        self.0.read().contains_key(id)
    }

    /// The bytes of a chunk from another layer image on this node, checked; `None` if there is none or it is not what it was.
    /// Blocking.
    pub fn read(&self, chunk: ChunkRef, open: impl Fn(u64) -> Option<File>) -> Option<Vec<u8>> {
        let place = *self.0.read().get(&chunk.id)?;
        let file = open(place.serial)?;
        let mut bytes = vec![0; usize::try_from(chunk.length).ok()?];
        let offset = u64::from(place.block) * u64::from(crate::chunk::BLOCK);
        file.read_exact_at(&mut bytes, offset).ok()?;
        if ChunkId::of(&bytes) == chunk.id { Some(bytes) } else { None }
    }
}
