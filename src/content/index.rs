//! Layer indexes: a layer image as a list of chunks.
//!
//! **What.** [`LayerIndex`] is the checked form, its bytes are the message `LayerIndex` of `proto/speedy/v1/layer.proto`. It can
//! only be made by [`LayerIndex::new`] and [`LayerIndex::decode`], which check the same things, so whoever holds one may use its
//! numbers without looking at them again.
//!
//! **Format.** Version 2 for images of the form [`Form::Inline`], and version 1, otherwise the same, for those of [`Form::Blocks`]: who knows
//! only that could not mount the others. Canonical protobuf: the bytes are exactly those that [`LayerIndex::encode`] writes, everything else is
//! refused, so that one image has one index and one digest. The digest of an index is the BLAKE3-256 of its bytes and the name
//! of its object.
//!
//! ```text
//! image    [ block 0 | hole | data ... | metadata ... | hole ]       chunks never cross a `|`
//! chunk n  starts `skips[n]` blocks behind the end of chunk n - 1, has `lengths[n]` blocks and the id `ids[32 n .. 32 n + 32]`
//! ```
//!
//! **Invariants.**
//! * The first chunk is block 0 alone, which holds the superblock; the rest of the head and the whole tail are a hole.
//! * Chunks are in order, do not overlap, have 1 to 256 blocks, and lie in the data or in the metadata, never in both.
//! * What no chunk covers reads as zeros. The file system's own parser decides whether zeros are good metadata.
//! * No number in it leads out of the image, and no image is larger than [`Limits::image`].
//!
//! **When it fails.** [`IndexError`]: a version from the future is told apart from bytes that are no index.

use std::fmt;
use std::ops::Range;

use prost::Message;

use super::{digest_of, raw};
use crate::chunk::{self, ChunkId, ChunkRef};
use crate::image::{BLOCK, Facts, Form, Layout, RESERVED};
use crate::oci::DiffId;
use crate::proto::speedy::v1 as wire;

/// The newest version that is known. The one before is read as well, and written for images of that form.
pub const FORMAT: u32 = 2;

/// The smallest inode that EROFS has, in bytes.
const SMALLEST_INODE: u64 = 32;

/// What an index may ask of a reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The largest image, in bytes.
    pub image: u64,
    /// The most chunks.
    pub chunks: usize,
}

impl Default for Limits {
    /// Images of less than 16 TiB (32 bits count their blocks) and 2^20 chunks: some 256 GiB of data, an index of 36 MiB.
    fn default() -> Limits {
        Limits { image: u64::from(u32::MAX) * BLOCK, chunks: 1 << 20 }
    }
}

impl Limits {
    /// The most bytes that an index within these limits has.
    pub fn encoded(&self) -> u64 {
        // An id, a length of at most two bytes and a skip of at most five; the fixed fields have less than 256.
        256 + u64::try_from(self.chunks).unwrap_or(u64::MAX).saturating_mul(32 + 2 + 5)
    }
}

/// Why bytes are no layer index, or why an image cannot have one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IndexError {
    /// Written by a newer Speedy.
    #[error("layer index has format version {found}, this speedy knows {FORMAT}: upgrade it")]
    UnknownFormat {
        /// Its version.
        found: u64,
    },
    /// More than a reader is ready to hold.
    #[error("layer index has {found} {what}, more than the {limit} there can be")]
    TooLarge {
        /// What there is too much of.
        what: &'static str,
        /// So many.
        found: u64,
        /// The limit.
        limit: u64,
    },
    /// Bytes that no Speedy wrote.
    #[error("layer index is malformed: {0}")]
    Malformed(&'static str),
}

/// The BLAKE3-256 of a layer index's bytes: the name of its object.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IndexDigest([u8; 32]);

impl IndexDigest {
    /// The digest of these bytes.
    pub fn of(bytes: &[u8]) -> IndexDigest {
        IndexDigest(*blake3::hash(bytes).as_bytes())
    }

    /// From the 32 bytes of the hash.
    pub fn from_bytes(hash: [u8; 32]) -> IndexDigest {
        IndexDigest(hash)
    }

    /// The 32 bytes of the hash.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for IndexDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl fmt::Debug for IndexDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// A chunk in its place; counted in blocks, which takes 40 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Placed {
    block: u32,
    blocks: u16,
    id: ChunkId,
}

impl Placed {
    fn end(&self) -> u64 {
        u64::from(self.block) + u64::from(self.blocks)
    }

    fn offset(&self) -> u64 {
        u64::from(self.block) * BLOCK
    }

    fn chunk(&self) -> ChunkRef {
        ChunkRef { id: self.id, length: u32::from(self.blocks) * chunk::BLOCK }
    }
}

/// A layer image as a list of chunks, checked.
#[derive(Clone, PartialEq, Eq)]
pub struct LayerIndex {
    /// The version of its bytes: an index that was read keeps its digest.
    format: u32,
    facts: Facts,
    chunks: Vec<Placed>,
    /// How many of `chunks` come before the metadata.
    before_metadata: usize,
}

impl fmt::Debug for LayerIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LayerIndex").field("facts", &self.facts).field("chunks", &self.chunks.len()).finish()
    }
}

impl LayerIndex {
    /// The index of an image of this form with these facts, which is cut so: the offset of each chunk in bytes, in order.
    pub fn new(
        facts: &Facts,
        form: Form,
        chunks: impl IntoIterator<Item = (u64, ChunkRef)>,
    ) -> Result<LayerIndex, IndexError> {
        let limits = Limits::default();
        check_facts(facts, limits)?;
        let mut building = Building::new(facts, limits);
        for (offset, chunk) in chunks {
            if !offset.is_multiple_of(BLOCK) || !chunk.length.is_multiple_of(chunk::BLOCK) {
                return Err(IndexError::Malformed("a chunk is not whole blocks"));
            }
            building.add(offset / BLOCK, chunk.length / chunk::BLOCK, chunk.id)?;
        }
        building.finish(match form {
            Form::Blocks => 1,
            Form::Inline => FORMAT,
        })
    }

    /// The index that these bytes are.
    pub fn decode(bytes: &[u8], limits: Limits) -> Result<LayerIndex, IndexError> {
        let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        if length > limits.encoded() {
            return Err(IndexError::TooLarge { what: "bytes", found: length, limit: limits.encoded() });
        }
        let format = read_format(bytes)?;
        let message = wire::LayerIndex::decode(bytes).map_err(|_| IndexError::Malformed("not a message"))?;
        let facts = facts_of(&message)?;
        check_facts(&facts, limits)?;
        let (ids, rest) = message.ids.as_chunks::<32>();
        if !rest.is_empty() || ids.len() != message.lengths.len() || ids.len() != message.skips.len() {
            return Err(IndexError::Malformed("its columns differ in length"));
        }
        let mut building = Building::new(&facts, limits);
        for ((id, length), skip) in ids.iter().zip(&message.lengths).zip(&message.skips) {
            building.add(building.end + u64::from(*skip), *length, ChunkId::from_bytes(*id))?;
        }
        let index = building.finish(format)?;
        drop(message);
        if index.encode() != bytes {
            return Err(IndexError::Malformed("not in canonical form"));
        }
        Ok(index)
    }

    /// Its bytes, always the same ones.
    pub fn encode(&self) -> Vec<u8> {
        let mut end = 0;
        let skip = |placed: &Placed| {
            let skip = u64::from(placed.block) - end;
            end = placed.end();
            u32::try_from(skip).expect("blocks of an image are counted in 32 bits")
        };
        let mut ids = Vec::with_capacity(self.chunks.len() * 32);
        self.chunks.iter().for_each(|placed| ids.extend_from_slice(placed.id.as_bytes()));
        let layout = &self.facts.layout;
        let message = wire::LayerIndex {
            format: self.format,
            diff_id: raw(&self.facts.diff_id.0).to_vec(),
            attributes: self.facts.attributes.map(Vec::from).unwrap_or_default(),
            tar_size: self.facts.tar_size,
            image_size: layout.size,
            metadata_offset: layout.metadata.start,
            metadata_length: layout.metadata.end - layout.metadata.start,
            inodes: self.facts.inodes,
            data_bytes: self.facts.bytes,
            root_uid: self.facts.root_uid,
            root_gid: self.facts.root_gid,
            skips: self.chunks.iter().map(skip).collect(),
            lengths: self.chunks.iter().map(|placed| placed.blocks.into()).collect(),
            ids,
        };
        message.encode_to_vec()
    }

    /// What is known of the image beside its bytes.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// All chunks with their offsets in bytes, in order. The first is block 0.
    pub fn chunks(&self) -> impl ExactSizeIterator<Item = (u64, ChunkRef)> + Clone + '_ {
        placed(&self.chunks)
    }

    /// What must be here before the image can be mounted: block 0 and the metadata, with offsets in bytes.
    pub fn metadata_chunks(&self) -> impl Iterator<Item = (u64, ChunkRef)> + Clone + '_ {
        placed(&self.chunks[..1]).chain(placed(&self.chunks[self.before_metadata..]))
    }

    /// The chunks of file data with their offsets in bytes.
    pub fn data_chunks(&self) -> impl ExactSizeIterator<Item = (u64, ChunkRef)> + Clone + '_ {
        placed(&self.chunks[1..self.before_metadata])
    }

    /// One chunk with its offset in bytes, by its place in [`LayerIndex::chunks`].
    pub fn chunk(&self, at: usize) -> (u64, ChunkRef) {
        let placed = &self.chunks[at];
        (placed.offset(), placed.chunk())
    }

    /// The places of the chunks that have bytes in a range.
    pub fn covering(&self, range: &Range<u64>) -> Range<usize> {
        let first = self.chunks.partition_point(|placed| placed.end() * BLOCK <= range.start);
        let end = self.chunks.partition_point(|placed| placed.offset() < range.end);
        first..end.max(first)
    }

    /// The places of what must be here before the image can be mounted.
    pub fn metadata_places(&self) -> impl Iterator<Item = usize> + use<> {
        std::iter::once(0).chain(self.before_metadata..self.chunks.len())
    }

    /// The places of the chunks of file data that have bytes in a range.
    pub fn data_covering(&self, range: &Range<u64>) -> Range<usize> {
        let chunks = self.covering(range);
        chunks.start.max(1)..chunks.end.min(self.before_metadata)
    }

    /// The plain bytes of all chunks: the image without its holes.
    pub fn plain_bytes(&self) -> u64 {
        self.chunks.iter().map(|placed| u64::from(placed.chunk().length)).sum()
    }
}

fn placed(chunks: &[Placed]) -> impl ExactSizeIterator<Item = (u64, ChunkRef)> + Clone + '_ {
    chunks.iter().map(|placed| (placed.offset(), placed.chunk()))
}

/// The chunks of an index, each checked as it comes.
struct Building<'a> {
    facts: &'a Facts,
    limits: Limits,
    chunks: Vec<Placed>,
    before_metadata: usize,
    /// The block behind the last chunk.
    end: u64,
}

impl<'a> Building<'a> {
    fn new(facts: &'a Facts, limits: Limits) -> Building<'a> {
        Building { facts, limits, chunks: Vec::new(), before_metadata: 0, end: 0 }
    }

    fn add(&mut self, block: u64, blocks: u32, id: ChunkId) -> Result<(), IndexError> {
        let malformed = |problem| Err(IndexError::Malformed(problem));
        if self.chunks.len() >= self.limits.chunks {
            let limit = u64::try_from(self.limits.chunks).unwrap_or(u64::MAX);
            return Err(IndexError::TooLarge { what: "chunks", found: limit.saturating_add(1), limit });
        }
        if blocks == 0 || blocks > chunk::MAX_CHUNK / chunk::BLOCK {
            return malformed("a chunk has no length that a chunk can have");
        }
        if block < self.end {
            return malformed("chunks overlap or are not in order");
        }
        let layout = &self.facts.layout;
        let end = block.saturating_add(blocks.into());
        let boundary = layout.metadata.start / BLOCK;
        match (self.chunks.is_empty(), block < boundary) {
            (true, _) if (block, blocks) != (0, 1) => return malformed("the first chunk is not block 0"),
            (true, _) => {}
            (false, _) if block < RESERVED / BLOCK => return malformed("a chunk lies in the reserved head"),
            (false, true) if end > boundary => return malformed("a chunk crosses into the metadata"),
            (false, false) if end > layout.metadata.end / BLOCK => {
                return malformed("a chunk ends behind the metadata");
            }
            (false, _) => {}
        }
        let narrow = (u32::try_from(block), u16::try_from(blocks));
        let (Ok(block), Ok(blocks)) = narrow else {
            return malformed("a chunk lies behind the image");
        };
        self.chunks.push(Placed { block, blocks, id });
        self.end = end;
        if u64::from(block) < boundary {
            self.before_metadata = self.chunks.len();
        }
        Ok(())
    }

    fn finish(self, format: u32) -> Result<LayerIndex, IndexError> {
        if self.chunks.len() == self.before_metadata {
            return Err(IndexError::Malformed("no superblock or no metadata"));
        }
        let mut chunks = self.chunks;
        chunks.shrink_to_fit();
        let facts = self.facts.clone();
        Ok(LayerIndex { format, facts, chunks, before_metadata: self.before_metadata })
    }
}

/// Before anything else is looked at: another version may have another shape. Canonical bytes begin with the version.
fn read_format(bytes: &[u8]) -> Result<u32, IndexError> {
    let malformed = IndexError::Malformed("it does not begin with its format version");
    let Some((&0x08, mut rest)) = bytes.split_first() else { return Err(malformed) };
    match prost::encoding::decode_varint(&mut rest) {
        Ok(found) => match u32::try_from(found) {
            Ok(format @ 1..=FORMAT) => Ok(format),
            _ => Err(IndexError::UnknownFormat { found }),
        },
        Err(_) => Err(malformed),
    }
}

fn facts_of(message: &wire::LayerIndex) -> Result<Facts, IndexError> {
    let diff_id = <[u8; 32]>::try_from(message.diff_id.as_slice());
    let diff_id = diff_id.map_err(|_| IndexError::Malformed("the diff ID is not 32 bytes"))?;
    let attributes = match message.attributes.as_slice() {
        [] => None,
        hash => {
            Some(hash.try_into().map_err(|_| IndexError::Malformed("the attributes key is not 32 bytes"))?)
        }
    };
    let metadata_end = message.metadata_offset.checked_add(message.metadata_length);
    let metadata_end = metadata_end.ok_or(IndexError::Malformed("the metadata has no end"))?;
    Ok(Facts {
        diff_id: DiffId(digest_of(&diff_id)),
        attributes,
        tar_size: message.tar_size,
        layout: Layout {
            data: RESERVED..message.metadata_offset,
            metadata: message.metadata_offset..metadata_end,
            size: message.image_size,
        },
        root_uid: message.root_uid,
        root_gid: message.root_gid,
        inodes: message.inodes,
        bytes: message.data_bytes,
    })
}

/// Whether the numbers beside the chunks can be those of an image.
fn check_facts(facts: &Facts, limits: Limits) -> Result<(), IndexError> {
    let Layout { data, metadata, size } = &facts.layout;
    let malformed = |problem| Err(IndexError::Malformed(problem));
    if *size > limits.image {
        return Err(IndexError::TooLarge { what: "bytes of image", found: *size, limit: limits.image });
    }
    if data.start != RESERVED || data.end < data.start || data.end != metadata.start {
        return malformed("the data is not between head and metadata");
    }
    if metadata.is_empty() || metadata.end.checked_add(RESERVED) != Some(*size) {
        return malformed("the metadata is not between data and tail");
    }
    if !metadata.start.is_multiple_of(BLOCK) || !metadata.end.is_multiple_of(BLOCK) {
        return malformed("the metadata is not whole blocks");
    }
    if facts.bytes > data.end - data.start {
        return malformed("more bytes of files than of data");
    }
    if facts.inodes == 0 || facts.inodes > (metadata.end - metadata.start) / SMALLEST_INODE {
        return malformed("a number of inodes that the metadata cannot hold");
    }
    if i64::try_from(facts.tar_size).is_err() {
        return malformed("the tar has no length that a file can have");
    }
    Ok(())
}
