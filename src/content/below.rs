//! What the layers below say about a directory that a layer implies.
//!
//! **What.** [`Stack`] answers for [`crate::image::build()`] from the layer images below. A layer whose image is on this machine is
//! asked there; one that only the store has, by its metadata, which is fetched when it is asked for the first time, and checked
//! as if it were to be mounted.
//!
//! **Where.** Called by whoever builds a layer that is not the first of its chain, on a thread that may block.
//!
//! **When it fails.** An [`io::Error`] with the reason in it, and with it the build: a layer image made from a guess would be
//! another one on every node.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use tokio::runtime::Handle;

use super::ContentStore;
use super::index::IndexDigest;
use crate::image::below::{self, Found};
use crate::image::check::{self, Metadata};
use crate::image::{Attributes, Below, Layout};

/// What the names of temporary files begin with while they have one.
const TEMPORARY: &str = ".image-";

/// One of the layers below.
#[derive(Debug)]
pub struct Lower {
    metadata: OnceLock<Metadata<File>>,
    /// Where the metadata is, until it is here.
    stored: Option<Stored>,
}

#[derive(Debug)]
struct Stored {
    store: Arc<ContentStore>,
    index: IndexDigest,
    temp: PathBuf,
    runtime: Handle,
}

impl Lower {
    /// A layer whose image, or at least its metadata, is in this file.
    pub fn built(image: File, layout: &Layout) -> io::Result<Lower> {
        let metadata = Metadata::open(image, layout).map_err(io::Error::other)?;
        Ok(Lower { metadata: OnceLock::from(metadata), stored: None })
    }

    /// A layer that the store has; fetches its metadata into `temp` should it be asked.
    pub fn stored(store: Arc<ContentStore>, index: IndexDigest, temp: PathBuf) -> Lower {
        let stored = Stored { store, index, temp, runtime: Handle::current() };
        Lower { metadata: OnceLock::new(), stored: Some(stored) }
    }

    fn metadata(&self) -> io::Result<&Metadata<File>> {
        if let (None, Some(stored)) = (self.metadata.get(), &self.stored) {
            let fetched = stored.runtime.block_on(stored.fetch())?;
            drop(self.metadata.set(fetched));
        }
        self.metadata.get().ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl Stored {
    async fn fetch(&self) -> io::Result<Metadata<File>> {
        let index = self.store.index(self.index).await.map_err(io::Error::other)?;
        let layout = &index.facts().layout;
        let file = unnamed_file(&self.temp)?;
        file.set_len(layout.size)?;
        for (offset, chunk) in index.metadata_chunks() {
            let plain = self.store.chunk(chunk).await.map_err(io::Error::other)?;
            file.write_all_at(&plain, offset)?;
        }
        check::check(&file, layout).map_err(io::Error::other)?;
        Metadata::open(file, layout).map_err(io::Error::other)
    }
}

/// The layers below, from the bottom up.
#[derive(Debug, Clone, Default)]
pub struct Stack(pub Vec<Arc<Lower>>);

impl Below for Stack {
    fn directory(&self, path: &[&[u8]]) -> io::Result<Option<Attributes>> {
        for lower in self.0.iter().rev() {
            match below::in_image(lower.metadata()?, path)? {
                Found::Nothing => {}
                Found::Other => return Ok(None),
                Found::Directory(attributes) => return Ok(Some(attributes)),
            }
        }
        Ok(None)
    }
}

/// A file without a name, for this process alone: it is gone when it is closed, however that comes about.
pub fn unnamed_file(directory: &Path) -> io::Result<File> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let path = directory.join(format!("{}{}-{number}", TEMPORARY, std::process::id()));
    // Left over by a process of the same number that was killed between the next two calls.
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}
