//! The format of layer indexes.

use prost::Message;
use speedy::chunk::{ChunkId, ChunkRef};
use speedy::content::index::{IndexDigest, IndexError, LayerIndex, Limits};
use speedy::image::{BLOCK, Facts, Form, Layout, RESERVED};
use speedy::oci::DiffId;
use speedy::proto::speedy::v1 as wire;

use super::support::digest;
use crate::fuzz;

/// An index that was written once and must be read for ever.
const GOLDEN: &[u8] = include_bytes!("index-2.bin");
/// `b3sum` of that file.
const GOLDEN_DIGEST: &str = "eda1563f51d83a8843848dd7aead872adcc6fe97854fec37f9d61bb53f502e48";
/// One of the version before, which stores still hold.
const FIRST: &[u8] = include_bytes!("index-1.bin");

const MIB: u64 = 1 << 20;
const METADATA: u64 = RESERVED + 5 * MIB;
const END: u64 = METADATA + 64 * BLOCK;

fn facts() -> Facts {
    Facts {
        diff_id: DiffId(digest("golden")),
        attributes: Some([7; 32]),
        tar_size: 5_000_192,
        layout: Layout { data: RESERVED..METADATA, metadata: METADATA..END, size: END + RESERVED },
        root_uid: 1000,
        root_gid: 100,
        inodes: 321,
        bytes: 4_999_000,
    }
}

fn chunk(number: u64, blocks: u32) -> ChunkRef {
    ChunkRef { id: ChunkId::of(&number.to_le_bytes()), length: blocks * 4096 }
}

/// Block 0, three chunks of data around a hole, two of metadata around another.
fn chunks() -> Vec<(u64, ChunkRef)> {
    vec![
        (0, chunk(0, 1)),
        (RESERVED, chunk(1, 256)),
        (RESERVED + MIB, chunk(2, 16)),
        (RESERVED + 3 * MIB, chunk(3, 200)),
        (METADATA, chunk(4, 32)),
        (METADATA + 33 * BLOCK, chunk(5, 31)),
    ]
}

fn golden() -> LayerIndex {
    LayerIndex::new(&facts(), Form::Inline, chunks()).unwrap()
}

fn decode(bytes: &[u8]) -> Result<LayerIndex, IndexError> {
    LayerIndex::decode(bytes, Limits::default())
}

/// The golden index, changed.
fn changed(change: impl FnOnce(&mut wire::LayerIndex)) -> Vec<u8> {
    let mut message = wire::LayerIndex::decode(GOLDEN).unwrap();
    change(&mut message);
    message.encode_to_vec()
}

#[test]
fn the_stored_index_is_read_and_written_as_ever() {
    let read = decode(GOLDEN).unwrap();
    assert_eq!(read, golden());
    assert_eq!(golden().encode(), GOLDEN);
    assert_eq!(IndexDigest::of(GOLDEN).to_string(), GOLDEN_DIGEST);
    assert_eq!(read.facts(), &facts());
}

/// It says the same, and keeps its bytes, hence its digest, which refs name.
#[test]
fn an_index_of_the_first_version_is_read_and_stays_what_it_is() {
    let read = decode(FIRST).unwrap();
    assert_eq!(read.facts(), &facts());
    assert_eq!(read.chunks().collect::<Vec<_>>(), chunks());
    assert_eq!(read.encode(), FIRST);
    let digest = "f871ff59fb22c8f7270a3148b465aedbedc52f64addad6cd3b76916df17e30f3";
    assert_eq!(IndexDigest::of(FIRST).to_string(), digest);
    assert_eq!(&FIRST[2..], &GOLDEN[2..], "only the version differs");
    // An image of that form, published again.
    assert_eq!(LayerIndex::new(&facts(), Form::Blocks, chunks()).unwrap().encode(), FIRST);
}

#[test]
fn chunks_are_told_apart_by_what_they_hold() {
    let index = golden();
    let all = chunks();
    assert_eq!(index.chunks().collect::<Vec<_>>(), all);
    assert_eq!(index.metadata_chunks().collect::<Vec<_>>(), [all[0], all[4], all[5]]);
    assert_eq!(index.data_chunks().collect::<Vec<_>>(), all[1..4]);
    assert_eq!(index.plain_bytes(), BLOCK * (1 + 256 + 16 + 200 + 32 + 31));
}

#[test]
fn a_layer_without_data_has_an_index() {
    let metadata = RESERVED..RESERVED + BLOCK;
    let layout = Layout { data: RESERVED..RESERVED, metadata, size: 2 * RESERVED + BLOCK };
    let facts = Facts { attributes: None, bytes: 0, inodes: 1, tar_size: 0, layout, ..facts() };
    let index = LayerIndex::new(&facts, Form::Inline, [(0, chunk(0, 1)), (RESERVED, chunk(1, 1))]).unwrap();
    assert_eq!(index.data_chunks().count(), 0);
    assert_eq!(index.metadata_chunks().count(), 2);
    assert_eq!(decode(&index.encode()).unwrap(), index);
}

#[test]
fn another_version_is_an_error_of_its_own() {
    for found in [0_u8, 3, 100] {
        let newer = [&[0x08, found], &GOLDEN[2..]].concat();
        assert_eq!(decode(&newer), Err(IndexError::UnknownFormat { found: found.into() }));
    }
    // Whatever else is in it.
    assert_eq!(decode(&[0x08, 3, 0xff, 0xff]), Err(IndexError::UnknownFormat { found: 3 }));
    for none in [&b""[..], b"\x08", b"\x0a\x01a", b"{}", &[0x08; 1], &[0x08, 0x80, 0x80]] {
        assert!(matches!(decode(none), Err(IndexError::Malformed(_))), "{none:?}");
    }
}

type Change = fn(&mut wire::LayerIndex);

#[test]
fn an_index_that_lies_is_refused() {
    let lies: &[(&str, Change)] = &[
        ("diff ID", |m| m.diff_id.truncate(31)),
        ("attributes", |m| m.attributes.push(0)),
        ("tar size", |m| m.tar_size = u64::MAX),
        ("image size", |m| m.image_size += BLOCK),
        ("image size", |m| m.image_size = 0),
        ("metadata in the head", |m| m.metadata_offset = 0),
        ("metadata not on a block", |m| m.metadata_offset += 1),
        ("metadata without end", |m| m.metadata_length = u64::MAX),
        ("no metadata", |m| (m.metadata_length, m.image_size) = (0, METADATA + RESERVED)),
        ("no inodes", |m| m.inodes = 0),
        ("inodes", |m| m.inodes = 64 * BLOCK / 32 + 1),
        ("more data than there is room for", |m| m.data_bytes = 5 * MIB + 1),
        ("columns", |m| m.ids.truncate(5 * 32)),
        ("columns", |m| m.ids.truncate(6 * 32 - 1)),
        ("columns", |m| m.skips.push(0)),
        ("columns", |m| m.lengths.truncate(5)),
        ("no chunks", |m| (m.skips, m.lengths, m.ids) = Default::default()),
        ("no superblock", |m| m.skips[0] = 1),
        ("superblock", |m| m.lengths[0] = 2),
        ("only the superblock", |m| {
            m.skips.truncate(1);
            m.lengths.truncate(1);
            m.ids.truncate(32);
        }),
        ("a chunk in the head", |m| m.skips[1] -= 1),
        ("an empty chunk", |m| m.lengths[2] = 0),
        ("a chunk too long", |m| m.lengths[1] = 257),
        ("from data into metadata", |m| m.lengths[3] = 256),
        ("from data into metadata", |m| m.skips[3] += 60),
        ("behind the metadata", |m| m.lengths[5] = 32),
        ("in the tail", |m| m.skips[5] = 40),
        ("far behind", |m| m.skips[5] = u32::MAX),
    ];
    for (what, lie) in lies {
        assert!(matches!(decode(&changed(*lie)), Err(IndexError::Malformed(_))), "{what}");
    }
}

#[test]
fn only_the_canonical_form_is_read() {
    let unknown_field = [GOLDEN, &[0x78, 1]].concat();
    let twice = [GOLDEN, &[0x50, 0xe8, 0x07]].concat();
    let default_written_out = [&GOLDEN[..2], &[0x50, 0], &GOLDEN[2..]].concat();
    let long_number = [&[0x08, 0x81, 0], &GOLDEN[2..]].concat();
    let twice_the_same = [GOLDEN, GOLDEN].concat();
    for other in [unknown_field, twice, default_written_out, long_number, twice_the_same] {
        assert!(matches!(decode(&other), Err(IndexError::Malformed(_))));
    }
    for end in 0..GOLDEN.len() {
        assert!(decode(&GOLDEN[..end]).is_err(), "cut at {end}");
    }
}

#[test]
fn an_index_beyond_the_limits_is_refused() {
    let few = Limits { chunks: 5, ..Limits::default() };
    let refused = LayerIndex::decode(GOLDEN, few);
    assert_eq!(refused, Err(IndexError::TooLarge { what: "chunks", found: 6, limit: 5 }));
    let small = Limits { image: END + RESERVED - 1, ..Limits::default() };
    assert!(matches!(
        LayerIndex::decode(GOLDEN, small),
        Err(IndexError::TooLarge { what: "bytes of image", .. })
    ));
    let none = Limits { chunks: 0, ..Limits::default() };
    assert!(matches!(LayerIndex::decode(GOLDEN, none), Err(IndexError::TooLarge { what: "bytes", .. })));
    let huge = changed(|m| m.image_size = 1 << 44);
    assert!(matches!(decode(&huge), Err(IndexError::TooLarge { what: "bytes of image", .. })));
}

#[test]
fn an_image_that_cannot_have_an_index_is_refused() {
    let refused = |chunks: &[(u64, ChunkRef)]| {
        assert!(matches!(
            LayerIndex::new(&facts(), Form::Inline, chunks.iter().copied()),
            Err(IndexError::Malformed(_))
        ));
    };
    let all = chunks();
    refused(&[]);
    refused(&all[1..]);
    refused(&all[..4]);
    refused(&[all[0], all[2], all[1], all[4]]);
    refused(&[all[0], all[1], all[1], all[4]]);
    refused(&[all[0], (RESERVED + 1, all[1].1), all[4]]);
    refused(&[all[0], (RESERVED, ChunkRef { length: 4095, ..all[1].1 }), all[4]]);
    refused(&[all[0], (RESERVED, ChunkRef { length: u32::MAX - 4095, ..all[1].1 }), all[4]]);
    let facts = Facts { inodes: 0, ..facts() };
    assert!(matches!(LayerIndex::new(&facts, Form::Inline, all), Err(IndexError::Malformed(_))));
}

#[test]
fn fuzz_index() {
    let corpus = [
        GOLDEN.to_vec(),
        FIRST.to_vec(),
        changed(|m| m.attributes.clear()),
        changed(|m| (m.root_uid, m.root_gid) = (0, 0)),
        changed(|m| m.skips[5] = u32::MAX),
    ];
    fuzz::run("layer-index", &corpus, |bytes| {
        let Ok(index) = decode(bytes) else { return };
        assert_eq!(index.encode(), bytes, "what is read is what would be written");
        let layout = &index.facts().layout;
        let mut end = 0;
        for (offset, chunk) in index.chunks() {
            assert!(offset >= end && chunk.length > 0);
            end = offset + u64::from(chunk.length);
            assert!(end <= layout.metadata.end);
            assert!(end <= layout.metadata.start || offset >= layout.metadata.start);
        }
        let parts = index.metadata_chunks().count() + index.data_chunks().count();
        assert_eq!(parts, index.chunks().count());
    });
}

#[test]
#[ignore = "writes the golden file, for a new version of the format"]
fn write_golden() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/content/index-2.bin");
    std::fs::write(path, golden().encode()).unwrap();
    println!("{}", IndexDigest::of(&golden().encode()));
}
