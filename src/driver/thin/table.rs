//! What is said to the kernel about pools and thin devices, and what it answers: text, made and read. Pure.
//!
//! The kernel's `Documentation/admin-guide/device-mapper/thin-provisioning.rst` is the description of all of it.

use super::device::Table;

/// Bytes of a sector, the unit of device-mapper.
pub(super) const SECTOR: u64 = 512;
/// Sectors of a block of the pool: 64 KiB, the smallest there is. What is written is copied in such pieces.
pub(super) const BLOCK: u64 = 128;
/// Bytes of a block of the pool.
pub(super) const BLOCK_BYTES: u64 = BLOCK * SECTOR;
/// Bytes of a block of a pool's metadata.
pub(super) const METADATA_BLOCK: u64 = 4096;

/// A pool: an error, and no waiting, when it is full; discards go down to the data device.
pub(super) fn pool(metadata: (u32, u32), data: (u32, u32), data_bytes: u64) -> Table {
    let sectors = data_bytes / BLOCK_BYTES * BLOCK;
    let parameters =
        format!("{}:{} {}:{} {BLOCK} 0 1 error_if_no_space", metadata.0, metadata.1, data.0, data.1);
    Table { sectors, target: "thin-pool", parameters }
}

/// A thin device.
pub(super) fn thin(pool: (u32, u32), thin_id: u32, bytes: u64) -> Table {
    let parameters = format!("{}:{} {thin_id}", pool.0, pool.1);
    Table { sectors: bytes.div_ceil(SECTOR), target: "thin", parameters }
}

/// The devices that a pool's table names: of metadata and of data.
pub(super) fn devices_of(parameters: &str) -> Option<[(u32, u32); 2]> {
    let mut words = parameters.split_whitespace();
    let numbers = |word: &str| {
        let (major, minor) = word.split_once(':')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    };
    Some([numbers(words.next()?)?, numbers(words.next()?)?])
}

/// So many of so many blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Share {
    /// Blocks in use.
    pub used: u64,
    /// Blocks in all.
    pub total: u64,
}

impl Share {
    fn parse(text: &str) -> Option<Share> {
        let (used, total) = text.split_once('/')?;
        Some(Share { used: used.parse().ok()?, total: total.parse().ok()? })
    }

    /// How much of it is free, in percent, rounded down.
    pub fn free_percent(self) -> u64 {
        self.total.saturating_sub(self.used).saturating_mul(100) / self.total.max(1)
    }
}

/// What a pool still does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Everything.
    ReadWrite,
    /// No new blocks: its data device is full.
    OutOfData,
    /// No changes at all.
    ReadOnly,
    /// Nothing.
    Failed,
}

/// How a pool is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolStatus {
    /// What its user counts with.
    pub transaction: u64,
    /// Blocks of 4 KiB for metadata.
    pub metadata: Share,
    /// Blocks of 64 KiB for data.
    pub data: Share,
    /// What it still does.
    pub mode: Mode,
    /// Its metadata is to be checked before it can be written again.
    pub needs_check: bool,
}

impl PoolStatus {
    /// Whether no block is left for metadata. The kernel then makes the pool read-only, and says no more than that.
    pub fn is_out_of_metadata(&self) -> bool {
        self.mode == Mode::ReadOnly && self.metadata.total > 0 && self.metadata.used >= self.metadata.total
    }

    /// Reads what the kernel says; `None` if that is no status of a pool.
    pub(super) fn parse(text: &str) -> Option<PoolStatus> {
        let words: Vec<&str> = text.split_whitespace().collect();
        if let ["Fail" | "Error", ..] = words[..] {
            let none = Share::default();
            return Some(PoolStatus {
                transaction: 0,
                metadata: none,
                data: none,
                mode: Mode::Failed,
                needs_check: true,
            });
        }
        let mode = match *words.get(4)? {
            "rw" => Mode::ReadWrite,
            "ro" => Mode::ReadOnly,
            "out_of_data_space" => Mode::OutOfData,
            _ => return None,
        };
        Some(PoolStatus {
            transaction: words.first()?.parse().ok()?,
            metadata: Share::parse(words.get(1)?)?,
            data: Share::parse(words.get(2)?)?,
            mode,
            needs_check: words.get(5..)?.contains(&"needs_check"),
        })
    }
}

/// The highest sector that a thin device has, from its status; `None` if it has nothing or has failed.
pub(super) fn highest_sector(status: &str) -> Option<u64> {
    status.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_the_kernels() {
        let table = pool((7, 0), (7, 1), 10 * BLOCK_BYTES + 5);
        assert_eq!((table.sectors, table.target), (1280, "thin-pool"));
        assert_eq!(table.parameters, "7:0 7:1 128 0 1 error_if_no_space");
        assert_eq!(devices_of(&table.parameters), Some([(7, 0), (7, 1)]));
        assert_eq!(
            thin((253, 0), 16, 1 << 20),
            Table { sectors: 2048, target: "thin", parameters: "253:0 16".into() }
        );
        for broken in ["", "7:0", "7 7:1", "a:b c:d"] {
            assert_eq!(devices_of(broken), None, "{broken}");
        }
    }

    #[test]
    fn a_status_is_read_and_nothing_else_is_taken_for_one() {
        let text = "64 33/4096 12/1600 - rw discard_passdown error_if_no_space - 1024";
        let status = PoolStatus::parse(text).unwrap();
        assert_eq!((status.transaction, status.mode, status.needs_check), (64, Mode::ReadWrite, false));
        assert_eq!(status.metadata, Share { used: 33, total: 4096 });
        assert_eq!(status.data.free_percent(), 99);
        let text = "0 4/8 5/5 - out_of_data_space discard_passdown error_if_no_space needs_check 1";
        let status = PoolStatus::parse(text).unwrap();
        assert_eq!((status.mode, status.needs_check), (Mode::OutOfData, true));
        assert_eq!(status.data.free_percent(), 0);
        assert!(!status.is_out_of_metadata(), "of data");
        let status =
            PoolStatus::parse("0 512/512 929/8192 - ro discard_passdown error_if_no_space - 128").unwrap();
        assert!(status.is_out_of_metadata() && !status.needs_check);
        assert!(!PoolStatus::parse("0 511/512 929/8192 - ro x y needs_check").unwrap().is_out_of_metadata());
        assert_eq!(PoolStatus::parse("Fail").unwrap().mode, Mode::Failed);
        assert!(!PoolStatus::parse("Fail").unwrap().is_out_of_metadata());
        for broken in ["", "x", "1 2/3 4/5 - odd", "1 2 3 - rw", "-1 1/2 1/2 - rw a b c"] {
            assert_eq!(PoolStatus::parse(broken), None, "{broken}");
        }
        assert_eq!(Share::default().free_percent(), 0);
    }

    #[test]
    fn the_end_of_a_thin_device_is_known_if_it_has_one() {
        assert_eq!(highest_sector("2048 4095"), Some(4095));
        assert_eq!(highest_sector("0 -"), None);
        assert_eq!(highest_sector("Fail"), None);
    }
}
