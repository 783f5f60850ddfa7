//! Chunks: pieces of layer images, named by the hash of their bytes.
//!
//! **What.** What a chunk is ([`ChunkId`], [`ChunkRef`]), where a layer image is cut ([`chunker`]), what is stored of it
//! ([`codec`]), and where chunks can be had: three traits in [`store`], an implementation on the object store ([`remote`]) and
//! one for tests ([`memory`]), and wrappers that add one thing each: [`verified`] checks, [`merged`] asks once. A node stacks
//! them as `Merged<Verified<Remote>>`.
//!
//! **Where.** Called by `content` and `layer`; calls [`crate::object`]. Knows no layer and no snapshot.
//!
//! **Words.** A *chunk* is whole 4 KiB blocks of a layer image, at most [`MAX_CHUNK`] bytes; its *id* is the BLAKE3-256 hash of
//! its plain bytes. The *stored form* is what an object holds: the bytes as zstd, or plain where that does not pay.
//!
//! **Invariants.**
//! * **C1** Bytes leave [`store::ChunkStore::get`] only if their hash is their id.
//!
//! **When it fails.** A chunk that is missing, one that is damaged and a store that cannot be reached are told apart
//! ([`ChunkError`]): callers do different things about them.

use std::fmt;

pub mod chunker;
pub mod codec;
pub mod memory;
pub mod merged;
pub mod remote;
pub mod store;
pub mod verified;

/// A block: chunks begin and end between blocks.
pub const BLOCK: u32 = 4096;
/// The longest chunk, plain.
pub const MAX_CHUNK: u32 = 1024 * 1024;

/// The BLAKE3-256 hash of a chunk's plain bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkId([u8; 32]);

impl ChunkId {
    /// The id of these bytes.
    pub fn of(plain: &[u8]) -> ChunkId {
        ChunkId(*blake3::hash(plain).as_bytes())
    }

    /// From the 32 bytes of the hash.
    pub fn from_bytes(hash: [u8; 32]) -> ChunkId {
        ChunkId(hash)
    }

    /// The 32 bytes of the hash.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl fmt::Debug for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// A chunk as a layer index names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ChunkRef {
    /// Its id.
    pub id: ChunkId,
    /// Its plain length in bytes: whole blocks, at most [`MAX_CHUNK`].
    pub length: u32,
}

/// Why a chunk cannot be had or kept.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ChunkError {
    /// The store does not have it.
    #[error("chunk {id} is not in the store")]
    Missing {
        /// Asked for.
        id: ChunkId,
    },
    /// What the store has is not it.
    #[error("chunk {id} is damaged in the store: {problem}")]
    Corrupt {
        /// Asked for.
        id: ChunkId,
        /// How one can tell.
        problem: String,
    },
    /// The bytes given to be stored are not the chunk.
    #[error("the bytes to store are not chunk {id}")]
    Mismatch {
        /// What they should have been.
        id: ChunkId,
    },
    /// The chunks could not be listed.
    #[error("chunks cannot be listed: {source}")]
    List {
        /// Why.
        #[source]
        source: crate::object::ObjectError,
    },
    /// The store could not be asked.
    #[error("chunk {id}: {source}")]
    Store {
        /// Asked for.
        id: ChunkId,
        /// Why.
        #[source]
        source: crate::object::ObjectError,
    },
}
