//! Where remote layers come from.
//!
//! **What.** Answers one question for `snapshot`: is this layer to be had without containerd fetching it, and if so, write its
//! content there. The source for now is `memory`: layers listed in a file, for trials and tests of everything around it. The
//! object store takes its place behind the same two calls.
//!
//! **Where.** Called by `snapshot`; knows no snapshot.
//!
//! **Invariants.** A layer that is answered can be written. A failure here is never containerd's problem: the caller falls back
//! to an ordinary pull.

use std::io;
use std::path::{Path, PathBuf};

use crate::oci::ChainId;

mod memory;

/// Why a source cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    /// No such kind of store.
    #[error("store {url:?} is not known: use memory:FILE, or leave `store` empty for none")]
    UnknownStore {
        /// As configured.
        url: String,
    },
    /// The file of an in-memory source cannot be read.
    #[error("{path}: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
}

/// A layer at hand.
#[derive(Debug, Clone)]
pub struct Layer(memory::Tree);

impl Layer {
    /// Writes the layer's tree into the empty directory `dir`, in overlayfs's own form of a layer.
    pub fn write_to(&self, dir: &Path) -> io::Result<()> {
        self.0.write_to(dir)
    }
}

/// The configured source of layers.
#[derive(Debug)]
pub struct ContentStore {
    layers: memory::Layers,
}

impl ContentStore {
    /// Opens the store that `url` names; an empty text is no store.
    pub fn open(url: &str) -> Result<Option<ContentStore>, ContentError> {
        match url.split_once(':') {
            _ if url.is_empty() => Ok(None),
            Some(("memory", file)) if !file.is_empty() => {
                let path = PathBuf::from(file);
                let layers = memory::Layers::read(&path)
                    .map_err(|source| ContentError::Unreadable { path, source })?;
                Ok(Some(ContentStore { layers }))
            }
            _ => Err(ContentError::UnknownStore { url: url.to_owned() }),
        }
    }

    /// The layer that makes the chain `chain` when put on the layers below it, if this store has it.
    pub async fn lookup(&self, chain: &ChainId) -> Result<Option<Layer>, ContentError> {
        Ok(self.layers.get(chain).cloned().map(Layer))
    }
}
