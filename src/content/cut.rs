//! Reading a layer image piece by piece, on a thread of its own.
//!
//! The image's parts are cut one by one, so that no chunk crosses from the data into the metadata. What was read waits in memory
//! until it is uploaded: the thread takes a permit for every block of a chunk and stands still where there is none.

use std::fs::File;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::ContentError;
use crate::chunk::{BLOCK, ChunkRef, chunker};
use crate::image::{self, Form, Layout};

/// The bytes of one permit.
pub(super) const PERMIT: u32 = BLOCK;

/// What is read, and how much of it may be in memory.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) image: File,
    pub(super) layout: Layout,
    pub(super) memory: Arc<Semaphore>,
}

/// A chunk in its place.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) offset: u64,
    pub(super) chunk: ChunkRef,
    pub(super) plain: Bytes,
    _memory: OwnedSemaphorePermit,
}

/// Reads the whole image and hands its pieces over in order; ends early, and well, when nobody takes them any more. What form it has.
pub(super) fn read(source: &Source, pieces: &mpsc::Sender<Piece>) -> Result<Form, ContentError> {
    check(source)?;
    let form = Form::of_image(&source.image, &source.layout).map_err(ContentError::Image)?;
    let Layout { data, metadata, .. } = &source.layout;
    let parts = [0..image::BLOCK, data.clone(), metadata.clone()];
    let mut cutter = chunker::cut_regions(&source.image, &parts);
    while let Some(piece) = cutter.next() {
        let chunker::Piece { offset, chunk } = piece.map_err(ContentError::Image)?;
        let memory = Arc::clone(&source.memory).acquire_many_owned(chunk.length / PERMIT);
        let Ok(memory) = Handle::current().block_on(memory) else { break };
        let plain = Bytes::copy_from_slice(cutter.bytes());
        if pieces.blocking_send(Piece { offset, chunk, plain, _memory: memory }).is_err() {
            break;
        }
    }
    Ok(form)
}

/// Whether the file is the image of this layout: what is published under these facts can be mounted by them.
fn check(source: &Source) -> Result<(), ContentError> {
    match Layout::of_image(&source.image) {
        Ok(found) if found == source.layout => Ok(()),
        Ok(_) => {
            Err(ContentError::OtherImage { problem: "its superblock says that its parts are elsewhere" })
        }
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            Err(ContentError::OtherImage { problem: "it is no layer image, or not a whole one" })
        }
        Err(error) => Err(ContentError::Image(error)),
    }
}
