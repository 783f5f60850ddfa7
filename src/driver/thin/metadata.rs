//! A pool's metadata, read where it lies on its device: which thin devices there are, and which blocks each of them wrote itself.
//!
//! The kernel has no call that lists the thin devices of a pool. It can keep a copy of its metadata as they are at one moment
//! (`reserve_metadata_snap`), which is read here beside the kernel's own work on the newer ones.
//!
//! **Format** (`drivers/md/dm-thin-metadata.c` and `persistent-data/dm-btree-internal.h` of Linux; little-endian, blocks of 4096 bytes):
//! block 0 is the superblock (magic at 32, transaction at 48, the block of the kept copy at 56, the roots of the mappings at 320 and
//! of the devices at 328, sectors of a data block at 336). A node has flags at 4 (1 internal, 2 leaf), its own block at 8, the number
//! of entries at 16, room for entries at 20, the size of a value at 24; keys from 32 on, then values.
//!
//! **Invariants.** Nothing that is read is trusted: depth, number of nodes and every number are bounded, and a node that does not
//! name itself is damage.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;

use super::table::METADATA_BLOCK;
use crate::sys::direct::{Blocks, Direct};

const MAGIC: u64 = 27_022_010;
const INTERNAL: u32 = 1;
const LEAF: u32 = 2;
const HEADER: usize = 32;
/// A tree of 2^64 keys is not deeper.
const DEEPEST: u32 = 16;
/// Nodes of one reading: 16 GiB of metadata have no more.
const MOST_NODES: u64 = 1 << 22;

/// The first block of a metadata device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Superblock {
    /// Only zeros: the kernel makes a new pool of it.
    Blank,
    /// A pool's.
    Pool(Roots),
    /// Something else.
    Foreign,
}

/// Where things begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Roots {
    pub(super) transaction: u64,
    /// Sectors of a data block.
    pub(super) data_block: u32,
    kept: u64,
    mappings: u64,
    devices: u64,
}

/// A thin device as the pool knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Device {
    /// Blocks that it has, those shared with others included.
    pub(super) mapped: u64,
    /// The pool's clock when it was made.
    created: u32,
}

/// Reads blocks of a metadata device past every cache.
#[derive(Debug)]
pub(super) struct Reader {
    device: Direct,
    nodes: u64,
}

impl Reader {
    pub(super) fn open(device: &File) -> io::Result<Reader> {
        Ok(Reader { device: Direct::open(device)?, nodes: 0 })
    }

    fn block(&mut self, number: u64) -> io::Result<Blocks> {
        self.nodes += 1;
        let offset = number.checked_mul(METADATA_BLOCK).filter(|_| self.nodes <= MOST_NODES);
        self.device.read(offset.ok_or_else(|| damaged("too many nodes"))?, block_length())
    }

    /// What the device holds.
    pub(super) fn superblock(&mut self) -> io::Result<Superblock> {
        let block = self.block(0)?;
        if block.as_ref().iter().all(|byte| *byte == 0) {
            return Ok(Superblock::Blank);
        }
        Ok(roots(block.as_ref()).map_or(Superblock::Foreign, Superblock::Pool))
    }

    /// The roots of the copy that the kernel keeps at the moment; `None` if it keeps none.
    pub(super) fn kept(&mut self) -> io::Result<Option<Roots>> {
        let Superblock::Pool(live) = self.superblock()? else { return Err(damaged("no superblock")) };
        if live.kept == 0 {
            return Ok(None);
        }
        roots(self.block(live.kept)?.as_ref()).map(Some).ok_or_else(|| damaged("the kept superblock"))
    }

    /// All thin devices.
    pub(super) fn devices(&mut self, roots: &Roots) -> io::Result<BTreeMap<u32, Device>> {
        let mut devices = BTreeMap::new();
        self.walk(roots.devices, 24, &mut |key, value| {
            let id = u32::try_from(key).map_err(|_| damaged("the number of a thin device"))?;
            let (mapped, created) = (word(value, 0), half(value, 16));
            devices.insert(id, Device { mapped, created });
            Ok(())
        })?;
        Ok(devices)
    }

    /// How many blocks a thin device has written since it was made: those that it shares with its origin are older.
    pub(super) fn own_blocks(&mut self, roots: &Roots, id: u32, device: Device) -> io::Result<u64> {
        let (mut tree, mut own) = (None, 0);
        self.walk(roots.mappings, 8, &mut |key, value| {
            if key == u64::from(id) {
                tree = Some(word(value, 0));
            }
            Ok(())
        })?;
        let Some(tree) = tree else { return Ok(0) };
        self.walk(tree, 8, &mut |_, value| {
            // The block in the upper 40 bits, the time in the lower 24.
            own += u64::from(word(value, 0) & 0x00ff_ffff >= u64::from(device.created));
            Ok(())
        })?;
        Ok(own)
    }

    /// Every entry of a tree's leaves.
    fn walk(
        &mut self,
        root: u64,
        value_size: usize,
        each: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut todo = vec![(root, 0)];
        while let Some((number, depth)) = todo.pop() {
            let block = self.block(number)?;
            let block = block.as_ref();
            let (flags, entries, room) = (half(block, 4), half(block, 16), half(block, 20));
            let size = if flags == INTERNAL { 8 } else { value_size };
            let (entries, room) = (length(entries), length(room));
            let fits = entries <= room && room.saturating_mul(8 + size) <= block_length() - HEADER;
            let is_node = word(block, 8) == number && (flags == INTERNAL || flags == LEAF);
            if !fits || !is_node || length(half(block, 24)) != size || depth > DEEPEST {
                return Err(damaged("a node"));
            }
            for at in 0..entries {
                let value = HEADER + room * 8 + at * size;
                let value = &block[value..value + size];
                match flags {
                    INTERNAL => todo.push((word(value, 0), depth + 1)),
                    _ => each(word(block, HEADER + at * 8), value)?,
                }
            }
        }
        Ok(())
    }
}

fn roots(block: &[u8]) -> Option<Roots> {
    (word(block, 32) == MAGIC).then(|| Roots {
        transaction: word(block, 48),
        kept: word(block, 56),
        mappings: word(block, 320),
        devices: word(block, 328),
        data_block: half(block, 336),
    })
}

fn block_length() -> usize {
    usize::try_from(METADATA_BLOCK).unwrap_or(4096)
}

fn length(number: u32) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

fn word(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
}

fn half(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the pool's metadata are damaged: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn node(file: &File, number: u64, flags: u32, room: u32, entries: &[(u64, Vec<u8>)]) {
        let size = entries.first().map_or(8, |(_, value)| value.len());
        let mut block = vec![0; 4096];
        block[4..8].copy_from_slice(&flags.to_le_bytes());
        block[8..16].copy_from_slice(&number.to_le_bytes());
        block[16..20].copy_from_slice(&u32::try_from(entries.len()).unwrap().to_le_bytes());
        block[20..24].copy_from_slice(&room.to_le_bytes());
        block[24..28].copy_from_slice(&u32::try_from(size).unwrap().to_le_bytes());
        for (at, (key, value)) in entries.iter().enumerate() {
            block[32 + at * 8..40 + at * 8].copy_from_slice(&key.to_le_bytes());
            let place = 32 + length(room) * 8 + at * size;
            block[place..place + size].copy_from_slice(value);
        }
        file.write_all_at(&block, number * 4096).unwrap();
    }

    fn superblock(file: &File, number: u64, kept: u64) {
        let mut block = vec![0; 4096];
        for (at, value) in [(32, MAGIC), (48, 7), (56, kept), (320, 2), (328, 3)] {
            block[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        block[336..340].copy_from_slice(&128_u32.to_le_bytes());
        file.write_all_at(&block, number * 4096).unwrap();
    }

    fn details(mapped: u64, created: u32) -> Vec<u8> {
        let mut value = mapped.to_le_bytes().to_vec();
        value.extend([0; 8]);
        value.extend(created.to_le_bytes());
        value.extend([0; 4]);
        value
    }

    fn number(n: u64) -> Vec<u8> {
        n.to_le_bytes().to_vec()
    }

    /// A pool with the devices 0 and 16; 16 is a snapshot that wrote two of its three blocks.
    fn pool() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(16 * 4096).unwrap();
        superblock(&file, 0, 1);
        superblock(&file, 1, 0);
        node(&file, 2, LEAF, 252, &[(0, number(5)), (16, number(6))]);
        node(&file, 3, INTERNAL, 252, &[(0, number(4)), (16, number(7))]);
        node(&file, 4, LEAF, 126, &[(0, details(2, 0))]);
        node(&file, 7, LEAF, 126, &[(16, details(3, 4))]);
        node(&file, 5, LEAF, 252, &[(0, number(1 << 24 | 1)), (9, number(2 << 24 | 3))]);
        let mapped = [(0, number(1 << 24 | 1)), (3, number(9 << 24 | 4)), (9, number(8 << 24 | 6))];
        node(&file, 6, LEAF, 252, &mapped);
        file
    }

    #[test]
    fn devices_and_their_own_blocks_are_read() {
        let file = pool();
        let mut reader = Reader::open(&file).unwrap();
        let Superblock::Pool(live) = reader.superblock().unwrap() else { panic!() };
        assert_eq!((live.transaction, live.data_block), (7, 128));
        let kept = reader.kept().unwrap().unwrap();
        let devices = reader.devices(&kept).unwrap();
        assert_eq!(devices.keys().copied().collect::<Vec<_>>(), [0, 16]);
        assert_eq!(reader.own_blocks(&kept, 16, devices[&16]).unwrap(), 2);
        assert_eq!(reader.own_blocks(&kept, 0, devices[&0]).unwrap(), 2);
        assert_eq!(reader.own_blocks(&kept, 99, devices[&16]).unwrap(), 0);
        superblock(&file, 0, 0);
        assert_eq!(Reader::open(&file).unwrap().kept().unwrap(), None);
    }

    #[test]
    fn what_is_no_pool_is_told_apart() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        assert_eq!(Reader::open(&file).unwrap().superblock().unwrap(), Superblock::Blank);
        file.write_all_at(b"something else", 1024).unwrap();
        assert_eq!(Reader::open(&file).unwrap().superblock().unwrap(), Superblock::Foreign);
        assert!(Reader::open(&file).unwrap().kept().is_err());
    }

    #[test]
    fn damage_is_an_error_and_neither_a_panic_nor_endless() {
        let harms: [&dyn Fn(&File); 6] = [
            // A node that names another block, a loop, too many entries, too much room, a wrong size of values, a block beyond the end.
            &|file| node(file, 3, LEAF, 126, &[]),
            &|file| node(file, 4, INTERNAL, 252, &[(0, number(3))]),
            &|file| node(file, 4, LEAF, 0, &[]),
            &|file| file.write_all_at(&u32::MAX.to_le_bytes(), 4 * 4096 + 20).unwrap(),
            &|file| file.write_all_at(&77_u32.to_le_bytes(), 4 * 4096 + 24).unwrap(),
            &|file| node(file, 3, INTERNAL, 252, &[(0, number(u64::MAX))]),
        ];
        for (at, harm) in harms.iter().enumerate() {
            let file = pool();
            harm(&file);
            if at == 0 {
                file.write_all_at(&9_u64.to_le_bytes(), 3 * 4096 + 8).unwrap();
            }
            if at == 2 {
                file.write_all_at(&5_u32.to_le_bytes(), 4 * 4096 + 16).unwrap();
            }
            let mut reader = Reader::open(&file).unwrap();
            let kept = reader.kept().unwrap().unwrap();
            assert!(reader.devices(&kept).is_err(), "harm {at}");
        }
        // Any byte that flips is an error or other numbers.
        for at in 0..16 * 4096 {
            if at % 37 == 0 {
                let file = pool();
                file.write_all_at(&[0xff], at).unwrap();
                let mut reader = Reader::open(&file).unwrap();
                if let Ok(Some(kept)) = reader.kept() {
                    drop(reader.devices(&kept));
                }
            }
        }
    }
}
