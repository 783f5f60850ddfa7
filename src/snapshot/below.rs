//! What lies below a snapshot, as far as the attributes of directories go: directories are looked at where they are, layer images
//! are read by our own reader, attached or not.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use super::layers::Layers;
use super::metastore::Stack;
use crate::driver::Id;
use crate::image::below::{self, Found};
use crate::image::check::Metadata;
use crate::image::{Attributes, Below, Layout};

#[derive(Debug)]
pub(super) struct BelowSnapshot {
    lowers: Vec<Lower>,
    layers: Option<Arc<Layers>>,
}

#[derive(Debug)]
enum Lower {
    Directory(PathBuf),
    Image { id: Id, metadata: OnceLock<Metadata<File>> },
}

impl BelowSnapshot {
    /// The layers of `stack`; directories of snapshots are below `points`.
    pub(super) fn new(stack: &Stack, layers: Option<Arc<Layers>>, points: &Path) -> BelowSnapshot {
        let lower = |id: &Id| match stack.layers.contains(id) {
            true => Lower::Image { id: *id, metadata: OnceLock::new() },
            false => Lower::Directory(points.join(format!("{}/fs", id.serial))),
        };
        BelowSnapshot { lowers: stack.below.iter().map(lower).collect(), layers }
    }
}

impl Below for BelowSnapshot {
    fn directory(&self, path: &[&[u8]]) -> io::Result<Option<Attributes>> {
        for lower in &self.lowers {
            let found = match lower {
                Lower::Directory(dir) => below::in_directory(dir, path)?,
                Lower::Image { id, metadata } => self.look_in_image(*id, metadata, path)?,
            };
            match found {
                Found::Nothing => {}
                Found::Other => return Ok(None),
                Found::Directory(attributes) => return Ok(Some(attributes)),
            }
        }
        Ok(None)
    }
}

impl BelowSnapshot {
    fn look_in_image(
        &self,
        id: Id,
        metadata: &OnceLock<Metadata<File>>,
        path: &[&[u8]],
    ) -> io::Result<Found> {
        let Some(layers) = &self.layers else { return Ok(Found::Nothing) };
        let metadata = match metadata.get() {
            Some(metadata) => metadata,
            None => {
                let opened: File = layers.store.read_any(id.serial).map_err(io::Error::other)?;
                let layout = Layout::of_image(&opened)?;
                let read = Metadata::open(opened, &layout).map_err(io::Error::other)?;
                metadata.get_or_init(|| read)
            }
        };
        below::in_image(metadata, path)
    }
}
