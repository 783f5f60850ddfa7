//! One header block. The layouts are those of `tar_core`; how a field is read is Go's way.

use tar_core::{GnuExtSparseHeader, GnuSparseHeader};

use super::sparse::Pairs;
use super::{BLOCK, Time};
use crate::image::error::TarFault;

/// A header's fields, as they stand there.
#[derive(Debug, Default)]
pub(super) struct Header {
    pub(super) kind: u8,
    pub(super) name: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) size: i64,
    pub(super) mode: i64,
    pub(super) uid: i64,
    pub(super) gid: i64,
    pub(super) mtime: Stamp,
    pub(super) major: i64,
    pub(super) minor: i64,
}

/// A time as a tar has it; the nanoseconds have the sign of the whole.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Stamp {
    pub(super) seconds: i64,
    pub(super) nanoseconds: i64,
}

impl Stamp {
    /// containerd's `boundTime`: what is before 1970, or has more than 2^63 - 1 nanoseconds since, is 1970.
    pub(super) fn bounded(self) -> Time {
        let total = i128::from(self.seconds) * 1_000_000_000 + i128::from(self.nanoseconds);
        let Ok(total) = i64::try_from(total).and_then(u64::try_from) else { return Time::default() };
        let nanoseconds = u32::try_from(total % 1_000_000_000).unwrap_or(0);
        Time { seconds: total / 1_000_000_000, nanoseconds }
    }
}

/// Which layout the fields behind the common ones have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    V7,
    Ustar,
    Star,
    Gnu,
}

impl Format {
    fn of(block: &[u8; BLOCK]) -> Format {
        let ustar = tar_core::Header::from_bytes(block).as_ustar();
        match (&ustar.magic, &ustar.version) {
            (b"ustar\0", _) if block[508..] == *b"tar\0" => Format::Star,
            (b"ustar\0", _) => Format::Ustar,
            (b"ustar ", b" \0") => Format::Gnu,
            _ => Format::V7,
        }
    }
}

impl Header {
    pub(super) fn parse(block: &[u8; BLOCK]) -> Result<Header, TarFault> {
        let ustar = tar_core::Header::from_bytes(block).as_ustar();
        let (unsigned, signed) = checksums(block);
        let stated = octal(&ustar.cksum).ok_or(TarFault::Checksum)?;
        if stated != unsigned && stated != signed {
            return Err(TarFault::Checksum);
        }
        let number = |field: &[u8]| numeric(field).ok_or(TarFault::Number);
        let mut header = Header {
            kind: ustar.typeflag[0],
            name: text(&ustar.name).to_vec(),
            link: text(&ustar.linkname).to_vec(),
            size: number(&ustar.size)?,
            mode: number(&ustar.mode)?,
            uid: number(&ustar.uid)?,
            gid: number(&ustar.gid)?,
            mtime: Stamp { seconds: number(&ustar.mtime)?, nanoseconds: 0 },
            major: 0,
            minor: 0,
        };
        let format = Format::of(block);
        if format == Format::V7 {
            return Ok(header);
        }
        header.major = number(&ustar.dev_major)?;
        header.minor = number(&ustar.dev_minor)?;
        let prefix = match format {
            Format::V7 => &[],
            Format::Ustar => text(&ustar.prefix),
            Format::Star => {
                number(&block[476..488])?;
                number(&block[488..500])?;
                text(&block[345..476])
            }
            Format::Gnu => gnu_prefix(block),
        };
        if !prefix.is_empty() {
            header.name = [prefix, b"/", &header.name].concat();
        }
        Ok(header)
    }

    /// Links, devices, directories and fifos have no data, whatever their size says.
    pub(super) fn is_without_data(&self) -> bool {
        matches!(self.kind, b'1'..=b'6')
    }
}

/// GNU headers have no prefix, but those of Go before 1.8 may have one where the times of access and change should be.
fn gnu_prefix(block: &[u8; BLOCK]) -> &[u8] {
    let gnu = tar_core::Header::from_bytes(block).as_gnu();
    let is_time = |field: &[u8]| field[0] == 0 || numeric(field).is_some();
    let prefix = text(&block[345..500]);
    if is_time(&gnu.atime) && is_time(&gnu.ctime) || !prefix.is_ascii() { &[] } else { prefix }
}

/// The sum of all bytes with spaces for the checksum itself; old tars added signed bytes.
fn checksums(block: &[u8; BLOCK]) -> (i64, i64) {
    let (mut unsigned, mut signed) = (0, 0);
    for (at, byte) in block.iter().enumerate() {
        let byte = if (148..156).contains(&at) { b' ' } else { *byte };
        unsigned += i64::from(byte);
        signed += i64::from(byte.cast_signed());
    }
    (unsigned, signed)
}

/// Up to the first NUL.
pub(super) fn text(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// A number in octal, or in binary if the first bit is set.
fn numeric(field: &[u8]) -> Option<i64> {
    match field.first() {
        Some(first) if first & 0x80 != 0 => binary(field),
        _ => octal(field),
    }
}

/// Two's complement without the first bit, big endian.
fn binary(field: &[u8]) -> Option<i64> {
    let invert = if field[0] & 0x40 != 0 { 0xff } else { 0 };
    let mut value: u64 = 0;
    for (at, byte) in field.iter().enumerate() {
        let byte = (byte ^ invert) & if at == 0 { 0x7f } else { 0xff };
        if value >> 56 != 0 {
            return None;
        }
        value = value << 8 | u64::from(byte);
    }
    let value = i64::try_from(value).ok()?;
    Some(if invert == 0 { value } else { !value })
}

/// Octal digits between spaces and NULs; nothing is 0.
fn octal(field: &[u8]) -> Option<i64> {
    let is_padding = |byte: &u8| matches!(byte, b' ' | 0);
    let Some(start) = field.iter().position(|byte| !is_padding(byte)) else { return Some(0) };
    let end = field.iter().rposition(|byte| !is_padding(byte)).map_or(start, |last| last + 1);
    let mut value: u64 = 0;
    for byte in text(&field[start..end]) {
        if !matches!(byte, b'0'..=b'7') || value >> 61 != 0 {
            return None;
        }
        value = value << 3 | u64::from(byte - b'0');
    }
    Some(value.cast_signed())
}

/// The map of an old GNU sparse file: four pairs in the header, 21 in each block that extends it.
#[derive(Debug)]
pub(super) struct OldGnuMap {
    pub(super) size: i64,
    pub(super) is_extended: bool,
    pub(super) pairs: Pairs,
}

impl OldGnuMap {
    pub(super) fn parse(block: &[u8; BLOCK]) -> Result<OldGnuMap, TarFault> {
        if Format::of(block) != Format::Gnu {
            return Err(TarFault::Sparse);
        }
        let gnu = tar_core::Header::from_bytes(block).as_gnu();
        let size = numeric(&gnu.realsize).ok_or(TarFault::Number)?;
        let mut map = OldGnuMap { size, is_extended: gnu.isextended[0] > 0, pairs: Pairs::new() };
        map.add(&gnu.sparse)?;
        Ok(map)
    }

    pub(super) fn extend(&mut self, block: &[u8; BLOCK]) -> Result<(), TarFault> {
        let mut sparse = [GnuSparseHeader::default(); 21];
        for (pair, field) in sparse.iter_mut().zip(block.chunks_exact(size_of::<GnuSparseHeader>())) {
            pair.offset.copy_from_slice(&field[..12]);
            pair.numbytes.copy_from_slice(&field[12..]);
        }
        const { assert!(size_of::<GnuExtSparseHeader>() == BLOCK) };
        self.is_extended = block[504] > 0;
        self.add(&sparse)
    }

    fn add(&mut self, sparse: &[GnuSparseHeader]) -> Result<(), TarFault> {
        for pair in sparse.iter().take_while(|pair| pair.offset[0] != 0) {
            let number = |field| numeric(field).and_then(|n| u64::try_from(n).ok()).ok_or(TarFault::Sparse);
            self.pairs.push((number(&pair.offset)?, number(&pair.numbytes)?));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_binary() {
        for (field, value) in [
            (&b"0000644\0"[..], Some(0o644)),
            (b"     12 ", Some(0o12)),
            (b"\0\0 7\0 \0", Some(7)),
            (b"", Some(0)),
            (b"        ", Some(0)),
            (b"12\x003   ", Some(0o12)),
            (b"8", None),
            (b"-1", None),
            (b"1 2", None),
            (b"1777777777777777777777", Some(-1)),
            (b"7777777777777777777777", None),
            (b"\x80\0\0\0\0\0\x01\0", Some(256)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff", Some(-1)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x00", Some(-256)),
            (b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", Some(i64::MAX)),
            (b"\x80\0\0\0\x80\0\0\0\0\0\0\0", None),
            (b"\x80\x01\0\0\0\0\0\0\0\0\0\0", None),
        ] {
            assert_eq!(numeric(field), value, "{field:?}");
        }
    }

    #[test]
    fn times_are_bounded_as_containerd_bounds_them() {
        let bounded = |seconds, nanoseconds| {
            let time = Stamp { seconds, nanoseconds }.bounded();
            (time.seconds, time.nanoseconds)
        };
        assert_eq!(bounded(5, 7), (5, 7));
        assert_eq!(bounded(0, -1), (0, 0));
        assert_eq!(bounded(-5, 0), (0, 0));
        assert_eq!(bounded(9_223_372_036, 854_775_807), (9_223_372_036, 854_775_807));
        assert_eq!(bounded(9_223_372_036, 854_775_808), (0, 0));
        assert_eq!(bounded(i64::MAX, 0), (0, 0));
        assert_eq!(bounded(i64::MIN, -999_999_999), (0, 0));
    }
}
