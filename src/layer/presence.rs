//! Which chunks of a layer image are in its file: `<serial>.map`.
//!
//! **Format.** The machine's words: magic; boot id (2 words); digest of the layer index (4 words); number of chunks; then a bit
//! for each chunk, the lowest bit of the first word being chunk 0.
//!
//! **Invariants.** A bit is set only after the chunk's checked bytes were written to the file. The map is mapped memory of a file:
//! it survives a kill at any instant, but says nothing after a reboot, because the bytes it vouches for may not have reached the
//! disk: another boot id means that nothing is taken for present.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::sys::extent;
use crate::sys::shared::Shared;

const MAGIC: u64 = u64::from_be_bytes(*b"SpdyMap1");
const HEAD: usize = 8;

/// See the module's page.
#[derive(Debug)]
pub struct Presence {
    bits: Shared,
    chunks: usize,
    present: AtomicUsize,
}

/// What the map of an earlier process is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Earlier {
    /// It is believed, or there was none and the file is new.
    Believed,
    /// There was none, or it is from before a reboot: what the file holds must be hashed.
    Doubted,
}

/// What this start of the machine is called.
pub fn boot_id() -> io::Result<[u64; 2]> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let hex: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let half = |part: Option<&str>| part.and_then(|part| u64::from_str_radix(part, 16).ok());
    match (half(hex.get(..16)), half(hex.get(16..32))) {
        (Some(high), Some(low)) => Ok([high, low]),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "boot_id is not 32 hexadecimal digits")),
    }
}

impl Presence {
    /// The map in `file`, which is made one if it is none for this index and this boot.
    pub fn open(
        file: &File,
        index: &[u8; 32],
        chunks: usize,
        boot: [u64; 2],
    ) -> io::Result<(Presence, Earlier)> {
        let words = HEAD + chunks.div_ceil(64);
        let length = (words * 8) as u64;
        file.set_len(length)?;
        if !extent::allocate(file, 0..length)? {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let bits = Shared::map(file, words * 8)?;
        let head = head(index, chunks, boot);
        let same =
            bits.words().iter().zip(&head).all(|(word, wanted)| word.load(Ordering::Acquire) == *wanted);
        if !same {
            // The magic last: a map that was being made is none.
            bits.words().iter().for_each(|word| word.store(0, Ordering::Release));
            for at in (0..HEAD).rev() {
                bits.words()[at].store(head[at], Ordering::Release);
            }
        }
        let present =
            bits.words()[HEAD..].iter().map(|word| word.load(Ordering::Acquire).count_ones() as usize).sum();
        let presence = Presence { bits, chunks, present: AtomicUsize::new(present) };
        Ok((presence, if same { Earlier::Believed } else { Earlier::Doubted }))
    }

    /// The digest of the layer index that a map was made for.
    pub fn index_of(file: &File) -> io::Result<Option<[u8; 32]>> {
        let bits = Shared::map(file, HEAD * 8)?;
        if bits.words()[0].load(Ordering::Acquire) != MAGIC {
            return Ok(None);
        }
        Ok(bits.copy(3 * 8, 32).try_into().ok())
    }

    /// How many chunks there are in all.
    pub fn chunks(&self) -> usize {
        self.chunks
    }

    /// How many are present.
    pub fn present(&self) -> usize {
        self.present.load(Ordering::Acquire)
    }

    /// Whether all are.
    pub fn is_complete(&self) -> bool {
        self.present() >= self.chunks
    }

    /// Whether this one is.
    pub fn has(&self, chunk: usize) -> bool {
        self.bits.words()[HEAD + chunk / 64].load(Ordering::Acquire) & (1 << (chunk % 64)) != 0
    }

    /// Its bytes are in the file; `true` if that is news.
    pub fn set(&self, chunk: usize) -> bool {
        let bit = 1 << (chunk % 64);
        let news = self.bits.words()[HEAD + chunk / 64].fetch_or(bit, Ordering::AcqRel) & bit == 0;
        if news {
            self.present.fetch_add(1, Ordering::AcqRel);
        }
        news
    }

    /// Its bytes are not to be believed any more.
    pub fn clear(&self, chunk: usize) {
        let bit = 1 << (chunk % 64);
        if self.bits.words()[HEAD + chunk / 64].fetch_and(!bit, Ordering::AcqRel) & bit != 0 {
            self.present.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

/// What a map with these bytes says of each chunk, if it is one for this index and this boot: for who only looks.
pub fn read(map: &[u8], index: &[u8; 32], chunks: usize, boot: [u64; 2]) -> Option<Vec<bool>> {
    let words = map.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap_or_default()));
    let words: Vec<u64> = words.collect();
    let (found, bits) = words.split_at_checked(HEAD)?;
    let is_it = found == head(index, chunks, boot) && bits.len() >= chunks.div_ceil(64);
    is_it.then(|| (0..chunks).map(|chunk| bits[chunk / 64] & (1 << (chunk % 64)) != 0).collect())
}

fn head(index: &[u8; 32], chunks: usize, boot: [u64; 2]) -> [u64; HEAD] {
    let word = |at: usize| u64::from_ne_bytes(index[at..at + 8].try_into().unwrap_or_default());
    [MAGIC, boot[0], boot[1], word(0), word(8), word(16), word(24), chunks as u64]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_survive_the_process_but_not_a_reboot() {
        let file = tempfile::tempfile().unwrap();
        let (map, earlier) = Presence::open(&file, &[7; 32], 130, [1, 2]).unwrap();
        assert_eq!((earlier, map.present()), (Earlier::Doubted, 0));
        assert!(map.set(0) && map.set(64) && map.set(129) && !map.set(64));
        drop(map);
        let (map, earlier) = Presence::open(&file, &[7; 32], 130, [1, 2]).unwrap();
        assert_eq!((earlier, map.present()), (Earlier::Believed, 3));
        assert!(map.has(0) && map.has(64) && map.has(129) && !map.has(1));
        map.clear(64);
        map.clear(64);
        assert_eq!(map.present(), 2);
        assert_eq!(Presence::index_of(&file).unwrap(), Some([7; 32]));
        let (map, earlier) = Presence::open(&file, &[7; 32], 130, [1, 3]).unwrap();
        assert_eq!((earlier, map.present()), (Earlier::Doubted, 0));
    }

    #[test]
    fn a_map_of_another_layer_is_none() {
        let file = tempfile::tempfile().unwrap();
        let (map, _) = Presence::open(&file, &[7; 32], 130, [1, 2]).unwrap();
        map.set(5);
        let (map, earlier) = Presence::open(&file, &[8; 32], 130, [1, 2]).unwrap();
        assert_eq!((earlier, map.present()), (Earlier::Doubted, 0));
        map.set(5);
        let (map, earlier) = Presence::open(&file, &[8; 32], 131, [1, 2]).unwrap();
        assert_eq!((earlier, map.present()), (Earlier::Doubted, 0));
    }

    #[test]
    fn a_boot_has_a_name() {
        assert_eq!(boot_id().unwrap(), boot_id().unwrap());
    }
}
