//! The stored form of a chunk: what an object under `chunks/` holds.
//!
//! ```text
//!  0   4  magic: "SpCh"
//!  4   1  version: 1
//!  5   1  codec: 0 plain, 1 zstd
//!  6   2  zero
//!  8   4  length of the plain bytes, little-endian
//! 12      the bytes: as they are, or one zstd frame
//! ```
//!
//! Which form a chunk has is up to its writer and depends on what pays: the id is of the plain bytes. A reader takes both.
//!
//! What is decoded was written by somebody else. Whoever asks for a chunk knows its length; nothing is allocated beyond that,
//! whatever the header or the frame declare. That the bytes are right is not checked here but by their hash.

use std::cell::RefCell;

use bytes::Bytes;
use parking_lot::Mutex;
use zstd::bulk::{Compressor, Decompressor};

use super::MAX_CHUNK;
use crate::sys::direct::Blocks;

/// Bytes before the chunk's.
pub const HEADER: usize = 12;
/// The longest stored form that is accepted.
pub const LONGEST: u64 = MAX_CHUNK as u64 + HEADER as u64;
/// How hard zstd tries. On an image family level 3 stores 0.587 of what gzip blobs take, 6 stores 0.554; a core
/// compresses 130 and 53 MB/s. Each chunk is compressed once in a fleet, in the background, and carried to every node
/// (`contrib/bench dedup`).
pub const LEVEL: i32 = 6;

const MAGIC: [u8; 4] = *b"SpCh";
const VERSION: u8 = 1;
const PLAIN: u8 = 0;
const ZSTD: u8 = 1;

/// Why bytes are not the stored form of a chunk of a given length.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// No header, or another one.
    #[error("it has no chunk header")]
    Header,
    /// A version that this one does not know.
    #[error("its form has version {0}, this version of Speedy knows {VERSION}")]
    Version(u8),
    /// A codec that this version does not know.
    #[error("its codec {0} is not known")]
    Codec(u8),
    /// Another length than the chunk has.
    #[error("it has {found} bytes and should have {expected}")]
    Length {
        /// As declared or found.
        found: u64,
        /// As asked for.
        expected: u32,
    },
    /// Not a zstd frame of that length.
    #[error("zstd: {0}")]
    Zstd(String),
}

/// A context for compressing takes some 5 MB at this level, so there are as many as compress at once, not one for each thread that
/// ever did: the threads of a runtime that may block are dozens.
static COMPRESSORS: Mutex<Vec<Compressor<'static>>> = Mutex::new(Vec::new());

thread_local! {
    // 160 KB: one for each thread that ever needs it.
    static DECOMPRESSOR: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

/// The stored form: zstd where that saves a twentieth or more.
pub fn encode(plain: &[u8]) -> Bytes {
    let worthwhile = plain.len() - plain.len() / 20;
    let mut stored = vec![0; HEADER + worthwhile];
    // What does not fit in is not worth it: zstd stops early with an error.
    let (codec, length) = match compress(plain, &mut stored[HEADER..]) {
        Some(length) => (ZSTD, length),
        None => {
            stored.truncate(HEADER);
            stored.extend_from_slice(plain);
            (PLAIN, plain.len())
        }
    };
    stored.truncate(HEADER + length);
    stored[..4].copy_from_slice(&MAGIC);
    stored[4] = VERSION;
    stored[5] = codec;
    let declared = u32::try_from(plain.len()).unwrap_or(u32::MAX);
    stored[8..12].copy_from_slice(&declared.to_le_bytes());
    stored.shrink_to_fit();
    Bytes::from(stored)
}

fn compress(plain: &[u8], into: &mut [u8]) -> Option<usize> {
    let kept = COMPRESSORS.lock().pop();
    let mut compressor = match kept {
        Some(compressor) => compressor,
        None => Compressor::new(LEVEL).ok()?,
    };
    let length = compressor.compress_to_buffer(plain, into).ok();
    COMPRESSORS.lock().push(compressor);
    length
}

/// The plain bytes, exactly `length` of them.
pub fn decode(stored: &Bytes, length: u32) -> Result<Bytes, CodecError> {
    let (header, body) = stored.split_at_checked(HEADER).ok_or(CodecError::Header)?;
    if header[..4] != MAGIC || header[6..8] != [0, 0] {
        return Err(CodecError::Header);
    }
    if header[4] != VERSION {
        return Err(CodecError::Version(header[4]));
    }
    let declared = u32::from_le_bytes([header[8], header[9], header[10], header[11]]);
    if declared != length || length > MAX_CHUNK {
        return Err(CodecError::Length { found: u64::from(declared), expected: length });
    }
    match header[5] {
        PLAIN if body.len() as u64 == u64::from(length) => Ok(stored.slice(HEADER..)),
        PLAIN => Err(CodecError::Length { found: body.len() as u64, expected: length }),
        ZSTD => decompress(body, length),
        other => Err(CodecError::Codec(other)),
    }
}

/// The length that a stored form declares, for those who do not know it. Says nothing about its being true.
pub fn declared_length(stored: &[u8]) -> Option<u32> {
    let length: [u8; 4] = stored.get(8..HEADER)?.try_into().ok()?;
    Some(u32::from_le_bytes(length)).filter(|length| *length <= MAX_CHUNK)
}

/// Whether the stored form of a chunk of this length can have this size; of any chunk, if the length is not known.
pub fn can_have(size: u64, length: Option<u32>) -> bool {
    let Some(length) = length.map(u64::from) else { return (HEADER as u64 + 1..=LONGEST).contains(&size) };
    let header = HEADER as u64;
    size == header + length || (header + 1..=header + length - length / 20).contains(&size)
}

fn decompress(body: &[u8], length: u32) -> Result<Bytes, CodecError> {
    let failed = |error: std::io::Error| CodecError::Zstd(error.to_string());
    let mut plain = Blocks::take(length as usize);
    let found = DECOMPRESSOR.with_borrow_mut(|kept| {
        let decompressor = match kept {
            Some(decompressor) => decompressor,
            None => kept.insert(Decompressor::new().map_err(failed)?),
        };
        decompressor.decompress_to_buffer(body, plain.as_mut()).map_err(failed)
    })?;
    if found as u64 != u64::from(length) {
        return Err(CodecError::Length { found: found as u64, expected: length });
    }
    Ok(Bytes::from_owner(plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(length: usize) -> Vec<u8> {
        let mut state = 1_u64;
        let next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        std::iter::repeat_with(next).take(length).collect()
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        let text = b"all work and no play ".repeat(40_000);
        for plain in
            [&b""[..], b"x", &noise(4096), &text[..4096], &text[..262_144], &noise(1 << 20), &[0; 1 << 20]]
        {
            let stored = encode(plain);
            assert!(stored.len() as u64 <= LONGEST);
            let length = u32::try_from(plain.len()).unwrap();
            assert_eq!(decode(&stored, length).unwrap(), plain);
            assert_eq!(declared_length(&stored), Some(length));
        }
    }

    #[test]
    fn noise_is_stored_as_it_is() {
        let plain = noise(262_144);
        let stored = encode(&plain);
        assert_eq!((stored[5], stored.len()), (PLAIN, HEADER + plain.len()));
        assert_eq!(encode(&[7; 262_144])[5], ZSTD);
    }

    #[test]
    fn the_form_is_the_documented_one() {
        let stored = encode(b"0123");
        assert_eq!(stored, &b"SpCh\x01\x00\x00\x00\x04\x00\x00\x000123"[..]);
    }

    #[test]
    fn anything_else_is_refused() {
        let good = encode(&[7; 8192]);
        let with = |at: usize, byte: u8| {
            let mut bad = good.to_vec();
            bad[at] = byte;
            decode(&Bytes::from(bad), 8192)
        };
        assert_eq!(with(0, b'x'), Err(CodecError::Header));
        assert_eq!(with(4, 2), Err(CodecError::Version(2)));
        assert_eq!(with(5, 9), Err(CodecError::Codec(9)));
        assert_eq!(with(6, 1), Err(CodecError::Header));
        assert!(matches!(with(HEADER, 0), Err(CodecError::Zstd(_))));
        assert!(matches!(with(5, PLAIN), Err(CodecError::Length { .. })));
        for length in [0, 4096, 8191, 8193, u32::MAX] {
            assert!(matches!(decode(&good, length), Err(CodecError::Length { .. })), "{length}");
        }
        for cut in 0..good.len() {
            assert!(decode(&good.slice(..cut), 8192).is_err(), "{cut}");
        }
    }

    /// A frame may declare anything: what is allocated is what was asked for.
    #[test]
    fn a_bomb_does_not_go_off() {
        let zeros = vec![0_u8; 64 << 20];
        let frame = zstd::bulk::compress(&zeros, 1).unwrap();
        let mut bomb = b"SpCh\x01\x01\x00\x00\x00\x10\x00\x00".to_vec();
        bomb.extend_from_slice(&frame);
        assert!(matches!(decode(&Bytes::from(bomb), 4096), Err(CodecError::Zstd(_))));
    }

    proptest::proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(mut bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..300), length in 0_u32..70_000) {
            drop(decode(&Bytes::from(bytes.clone()), length));
            if bytes.len() > HEADER {
                bytes[..4].copy_from_slice(&MAGIC);
                bytes[4..8].copy_from_slice(&[VERSION, ZSTD, 0, 0]);
                bytes[8..12].copy_from_slice(&length.to_le_bytes());
                drop(decode(&Bytes::from(bytes), length));
            }
        }
    }
}
