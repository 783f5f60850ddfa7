//! The records of a PAX extended header (POSIX `pax`, "pax Extended Header").

use std::collections::BTreeMap;

use super::Xattr;
use super::header::{Header, Stamp};
use super::sparse::Pairs;
use crate::image::error::TarFault;

const XATTR: &[u8] = b"SCHILY.xattr.";
const SPARSE_MAP: &[u8] = b"GNU.sparse.map";

/// Key to value; the last of equal keys.
#[derive(Debug, Default)]
pub(super) struct Records(BTreeMap<Vec<u8>, Vec<u8>>);

/// Where a sparse file's map is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SparseVersion {
    /// GNU's formats 0.0 and 0.1.
    InRecords,
    /// GNU's format 1.0.
    InData,
}

impl Records {
    /// `None` if anything in it is malformed.
    pub(super) fn parse(mut bytes: &[u8]) -> Option<Records> {
        let mut records = BTreeMap::new();
        // Format 0.0 repeats two keys; it is turned into 0.1, one value with commas.
        let mut pairs: Vec<&[u8]> = Vec::new();
        while !bytes.is_empty() {
            let (key, value, rest) = record(bytes)?;
            bytes = rest;
            match key {
                b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                    let expected =
                        if pairs.len().is_multiple_of(2) { b"offset".as_slice() } else { b"numbytes" };
                    if !key.ends_with(expected) || value.contains(&b',') {
                        return None;
                    }
                    pairs.push(value);
                }
                _ => drop(records.insert(key.to_vec(), value.to_vec())),
            }
        }
        if !pairs.is_empty() {
            records.insert(SPARSE_MAP.to_vec(), pairs.join(&b','));
        }
        Some(Records(records))
    }

    /// The value; empty if there is none, which PAX takes for the same.
    pub(super) fn value(&self, key: &[u8]) -> &[u8] {
        self.0.get(key).map_or(&[], Vec::as_slice)
    }

    fn text(&self, key: &[u8]) -> Option<&str> {
        Some(self.value(key)).filter(|value| !value.is_empty()).map(|value| {
            // What is no text is no number either.
            std::str::from_utf8(value).unwrap_or("?")
        })
    }

    /// Puts what the records say in the place of what the header says.
    pub(super) fn amend(&self, header: &mut Header) -> Result<(), TarFault> {
        for (key, field) in [("path", &mut header.name), ("linkpath", &mut header.link)] {
            let value = self.value(key.as_bytes());
            if !value.is_empty() {
                *field = value.to_vec();
            }
        }
        for (key, field) in [("uid", &mut header.uid), ("gid", &mut header.gid), ("size", &mut header.size)] {
            if let Some(value) = self.text(key.as_bytes()) {
                *field = value.parse().map_err(|_| TarFault::Pax)?;
            }
        }
        for key in ["atime", "ctime", "mtime"] {
            let Some(value) = self.text(key.as_bytes()) else { continue };
            let stamp = stamp(value).ok_or(TarFault::Pax)?;
            if key == "mtime" {
                header.mtime = stamp;
            }
        }
        Ok(())
    }

    /// Whether it is a sparse file. Unknown versions are none.
    pub(super) fn sparse_version(&self) -> Option<SparseVersion> {
        match (self.value(b"GNU.sparse.major"), self.value(b"GNU.sparse.minor")) {
            (b"0", b"0" | b"1") => Some(SparseVersion::InRecords),
            (b"1", b"0") => Some(SparseVersion::InData),
            (b"", b"") if !self.value(SPARSE_MAP).is_empty() => Some(SparseVersion::InRecords),
            _ => None,
        }
    }

    /// Puts a sparse file's own name and size in the place of those of its condensed form.
    pub(super) fn amend_sparse(&self, header: &mut Header) -> Result<(), TarFault> {
        let name = self.value(b"GNU.sparse.name");
        if !name.is_empty() {
            header.name = name.to_vec();
        }
        if let Some(size) = self.text(b"GNU.sparse.size").or_else(|| self.text(b"GNU.sparse.realsize")) {
            header.size = size.parse().map_err(|_| TarFault::Sparse)?;
        }
        Ok(())
    }

    /// The map in the records; `None` if it is malformed.
    pub(super) fn sparse_map(&self) -> Option<Pairs> {
        let stated: i64 = self.text(b"GNU.sparse.numblocks")?.parse().ok()?;
        let map = self.text(SPARSE_MAP).unwrap_or_default();
        let numbers = map.split(',').filter(|_| !map.is_empty()).map(|n| n.parse::<i64>());
        let numbers: Vec<u64> =
            numbers.map(|n| n.ok().and_then(|n| u64::try_from(n).ok())).collect::<Option<_>>()?;
        let pairs: Pairs = numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
        let whole = numbers.len().is_multiple_of(2) && i64::try_from(pairs.len()).ok() == Some(stated);
        whole.then_some(pairs)
    }

    /// The xattrs among them, sorted by name.
    pub(super) fn into_xattrs(self) -> Vec<Xattr> {
        let xattr = |(key, value): (Vec<u8>, Vec<u8>)| {
            key.strip_prefix(XATTR).map(<[u8]>::to_vec).map(|name| Xattr { name, value })
        };
        self.0.into_iter().filter_map(xattr).collect()
    }
}

/// One record, `LENGTH KEY=VALUE\n`, and what follows it.
fn record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().position(|byte| *byte == b' ')?;
    let length: i64 = std::str::from_utf8(&bytes[..space]).ok()?.parse().ok()?;
    let length = usize::try_from(length).ok().filter(|length| (5..=bytes.len()).contains(length))?;
    let (record, rest) = bytes.split_at(length);
    let record = record.get(space + 1..)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|byte| *byte == b'=')?;
    let (key, value) = (&record[..equals], &record[equals + 1..]);
    let text = match key {
        b"path" | b"linkpath" | b"uname" | b"gname" => value,
        _ => key,
    };
    if key.is_empty() || text.contains(&0) { None } else { Some((key, value, rest)) }
}

/// `SECONDS[.FRACTION]`, possibly negative; digits beyond nanoseconds are cut off.
fn stamp(text: &str) -> Option<Stamp> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let digits = fraction.bytes().chain(std::iter::repeat(b'0')).take(9);
    let nanoseconds = digits.fold(0, |sum, digit| sum * 10 + i64::from(digit - b'0'));
    let nanoseconds = if whole.starts_with('-') { -nanoseconds } else { nanoseconds };
    Some(Stamp { seconds, nanoseconds })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_read_to_the_last_byte() {
        let records = Records::parse(b"9 path=a\n20 SCHILY.xattr.x==\n9 path=b\n").unwrap();
        assert_eq!(records.value(b"path"), b"b");
        assert_eq!(records.into_xattrs(), [Xattr { name: b"x".to_vec(), value: b"=".to_vec() }]);
        for bad in [
            &b"9 path=a"[..],
            b"11 path=a\n",
            b"8 path=a\n",
            b"path=a\n",
            b"4 =\n",
            b"5 =a\n",
            b"6 path\n",
            b"x path=a\n",
            b"-9 path=a\n",
            b"99999999999999999999 path=a\n",
            b"9 path=\0\n",
            b"9 pa\0h=a\n",
            b"9 path=a\n\0",
            b"0 a=b\n",
        ] {
            assert!(Records::parse(bad).is_none(), "{:?}", String::from_utf8_lossy(bad));
        }
    }

    #[test]
    fn times_have_fractions_and_signs() {
        let read = |text| stamp(text).map(|stamp| (stamp.seconds, stamp.nanoseconds));
        assert_eq!(read("1.5"), Some((1, 500_000_000)));
        assert_eq!(read("-0.25"), Some((0, -250_000_000)));
        assert_eq!(read("-3"), Some((-3, 0)));
        assert_eq!(read("7."), Some((7, 0)));
        assert_eq!(read("7.1234567899"), Some((7, 123_456_789)));
        for bad in ["", ".5", "1.5s", "1.-5", "1e3", "99999999999999999999", "?"] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }

    #[test]
    fn sparse_maps_come_in_two_forms() {
        let record = |text: &str| format!("{} {text}\n", text.len() + 4).into_bytes();
        let old =
            ["GNU.sparse.numblocks=2", "GNU.sparse.offset=0", "GNU.sparse.numbytes=5"].map(record).concat();
        let more = ["GNU.sparse.offset=512", "GNU.sparse.numbytes=1"].map(record).concat();
        let records = Records::parse(&[old.clone(), more].concat()).unwrap();
        assert_eq!(records.sparse_version(), Some(SparseVersion::InRecords));
        assert_eq!(records.sparse_map(), Some(vec![(0, 5), (512, 1)]));
        assert_eq!(Records::parse(&old).unwrap().sparse_map(), None, "one pair of two");
        let twice = ["GNU.sparse.offset=512", "GNU.sparse.offset=1"].map(record).concat();
        assert!(Records::parse(&twice).is_none());
        for (map, count) in [("1,2,3", 1), ("1,-2", 1), ("a,b", 1), ("1,2", 2)] {
            let text = [format!("GNU.sparse.map={map}"), format!("GNU.sparse.numblocks={count}")];
            let records = Records::parse(&text.map(|text| record(&text)).concat()).unwrap();
            assert_eq!(records.sparse_map(), None, "{map}");
        }
    }
}
