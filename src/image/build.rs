//! A layer's blob becomes a layer image, in one pass.
//!
//! ```text
//! blob ─▶ stream ─▶ tar ─┬─ entries ─▶ tree ──────────────┐
//!         (threads)      └─ data ────▶ data ─▶ image file ◀┴─ erofs: metadata, behind the data
//! ```

use std::fs::File;
use std::io::Read;

use super::compression::Compression;
use super::data::Data;
use super::limits::Limits;
use super::tree::{Below, Tree};
use super::{Facts, ImageError, erofs, stream, tar};

/// Where a layer comes from and how it is to be read.
#[derive(Debug)]
pub struct Source<R> {
    /// Its bytes, as a registry has them.
    pub blob: R,
    /// What its media type says.
    pub compression: Compression,
}

/// Makes the layer image of a layer and writes it to `out`, whose content is replaced.
///
/// The bytes depend on the uncompressed layer and, where [`Facts::attributes`] says so, on what `below` answered: not on the
/// machine, the time, or how the blob is compressed. `out` is not synced: whoever wants it durable does that. After an error its
/// content means nothing. `cancelled` is asked every 256 KiB. Memory: 6 MiB, and for each file about 200 bytes and its names.
///
/// The caller compares [`Facts::diff_id`] with what the image's configuration says.
pub fn build(
    source: Source<impl Read + Send>,
    out: &File,
    below: &dyn Below,
    limits: &Limits,
    cancelled: &(dyn Fn() -> bool + Sync),
) -> Result<Facts, ImageError> {
    let consume = |reader: &mut tar::Reader<'_>| {
        let mut tree = Tree::new(below, limits)?;
        let mut data = Data::new(out, limits.data)?;
        while let Some(entry) = reader.next_entry()? {
            if let Some(file) = tree.apply(&entry)?.filter(|_| entry.size > 0) {
                write_file(reader, &mut data)?;
                tree.set_data(file, entry.size, data.end_file()?);
            }
        }
        tree.finish()?;
        Ok((tree, data))
    };
    let ((tree, data), plain) = stream::read(source.blob, source.compression, limits, cancelled, consume)?;
    let (layout, inodes) = erofs::write(&tree, data, limits.metadata)?;
    let root = tree.node(Tree::ROOT);
    Ok(Facts {
        diff_id: plain.diff_id,
        attributes: tree.attributes_key(),
        tar_size: plain.size,
        root_uid: root.uid,
        root_gid: root.gid,
        inodes,
        bytes: layout.data.end - layout.data.start,
        layout,
    })
}

fn write_file(reader: &mut tar::Reader<'_>, data: &mut Data<'_>) -> Result<(), ImageError> {
    while let Some(chunk) = reader.chunk()? {
        match chunk {
            tar::Chunk::Bytes(bytes) => data.write(bytes)?,
            tar::Chunk::Hole(length) => data.write_zeros(length)?,
        }
    }
    Ok(())
}
