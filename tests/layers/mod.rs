//! Layers for tests: a writer of tars that can also write wrong ones, the cases that matter, and random ones.

#![allow(dead_code, reason = "each test program uses its own part of it")]

pub(crate) mod cases;
pub(crate) mod random;
pub(crate) mod seen;

use std::fs::File;

use speedy::image::{Below, Compression, Facts, ImageError, Limits, NothingBelow, Source, build};

/// One entry as a test wants it.
#[derive(Debug, Clone)]
pub(crate) struct Item {
    pub(crate) kind: u8,
    pub(crate) name: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) mode: u32,
    pub(crate) uid: u64,
    pub(crate) gid: u64,
    pub(crate) mtime: u64,
    pub(crate) device: (u64, u64),
    pub(crate) data: Vec<u8>,
    /// What the header says instead of the data's length.
    pub(crate) size: Option<u64>,
    pub(crate) pax: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Item {
    pub(crate) fn new(kind: u8, name: impl AsRef<[u8]>) -> Item {
        Item {
            kind,
            name: name.as_ref().to_vec(),
            link: Vec::new(),
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: 1_000_000_000,
            device: (0, 0),
            data: Vec::new(),
            size: None,
            pax: Vec::new(),
        }
    }

    pub(crate) fn file(name: impl AsRef<[u8]>, data: impl AsRef<[u8]>) -> Item {
        Item { data: data.as_ref().to_vec(), ..Item::new(b'0', name) }
    }

    pub(crate) fn dir(name: impl AsRef<[u8]>) -> Item {
        Item::new(b'5', name).mode(0o755)
    }

    pub(crate) fn symlink(name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Item {
        Item { link: target.as_ref().to_vec(), ..Item::new(b'2', name).mode(0o777) }
    }

    pub(crate) fn hard_link(name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Item {
        Item { link: target.as_ref().to_vec(), ..Item::new(b'1', name) }
    }

    pub(crate) fn device(kind: u8, name: &str, major: u64, minor: u64) -> Item {
        Item { device: (major, minor), ..Item::new(kind, name) }
    }

    pub(crate) fn mode(mut self, mode: u32) -> Item {
        self.mode = mode;
        self
    }

    pub(crate) fn owner(mut self, uid: u64, gid: u64) -> Item {
        (self.uid, self.gid) = (uid, gid);
        self
    }

    pub(crate) fn mtime(mut self, mtime: u64) -> Item {
        self.mtime = mtime;
        self
    }

    pub(crate) fn pax(mut self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Item {
        self.pax.push((key.as_ref().to_vec(), value.as_ref().to_vec()));
        self
    }

    pub(crate) fn xattr(self, name: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Item {
        self.pax([b"SCHILY.xattr.", name.as_ref()].concat(), value)
    }

    fn size(&self) -> u64 {
        self.size.unwrap_or(self.data.len() as u64)
    }
}

/// A tar in the making.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tar(pub(crate) Vec<u8>);

impl Tar {
    pub(crate) fn new() -> Tar {
        Tar::default()
    }

    pub(crate) fn of(items: impl IntoIterator<Item = Item>) -> Vec<u8> {
        items.into_iter().fold(Tar::new(), Tar::with).finish()
    }

    /// With PAX records for what the header cannot say.
    pub(crate) fn with(mut self, mut item: Item) -> Tar {
        for (key, field) in [("path", &mut item.name), ("linkpath", &mut item.link)] {
            if field.len() > 100 {
                item.pax.push((key.into(), field.clone()));
                field.truncate(100);
            }
        }
        if !item.pax.is_empty() {
            let records = pax(&item.pax);
            self = self.with_raw(&Item { data: records, ..Item::new(b'x', "PaxHeaders/x") });
        }
        self.with_raw(&item)
    }

    pub(crate) fn with_raw(mut self, item: &Item) -> Tar {
        self.0.extend(header(item));
        self.0.extend(&item.data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub(crate) fn bytes(mut self, bytes: &[u8]) -> Tar {
        self.0.extend(bytes);
        self
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.bytes(&[0; 1024]).0
    }
}

/// PAX records.
pub(crate) fn pax(records: &[(Vec<u8>, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (key, value) in records {
        let rest = key.len() + value.len() + 3;
        let mut length = rest + 1;
        while rest + length.to_string().len() != length {
            length = rest + length.to_string().len();
        }
        bytes.extend(format!("{length} ").into_bytes());
        bytes.extend(key);
        bytes.push(b'=');
        bytes.extend(value);
        bytes.push(b'\n');
    }
    bytes
}

/// A ustar header with GNU's binary numbers where octal ones do not fit.
pub(crate) fn header(item: &Item) -> [u8; 512] {
    let mut block = [0; 512];
    let mut put = |at: usize, field: &[u8]| block[at..at + field.len()].copy_from_slice(field);
    put(0, &item.name);
    put(100, &number(u64::from(item.mode), 8));
    put(108, &number(item.uid, 8));
    put(116, &number(item.gid, 8));
    put(124, &number(item.size(), 12));
    put(136, &number(item.mtime, 12));
    put(156, &[item.kind]);
    put(157, &item.link);
    put(257, b"ustar\x0000");
    put(329, &number(item.device.0, 8));
    put(337, &number(item.device.1, 8));
    seal(block)
}

/// Puts the checksum in.
pub(crate) fn seal(mut block: [u8; 512]) -> [u8; 512] {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

fn number(value: u64, length: usize) -> Vec<u8> {
    let octal = format!("{value:0width$o}\0", width = length - 1);
    if octal.len() == length {
        return octal.into_bytes();
    }
    // What is beyond i64 stands for the negative number with the same bits.
    let sign = if value > i64::MAX as u64 { 0xff } else { 0 };
    let mut bytes = [vec![sign; length.saturating_sub(8)], value.to_be_bytes().to_vec()].concat();
    bytes.drain(..bytes.len() - length);
    bytes[0] |= 0x80;
    bytes
}

/// The image of a plain tar, in `out`.
pub(crate) fn image(tar: &[u8], out: &File) -> Result<Facts, ImageError> {
    image_on(tar, out, &NothingBelow)
}

pub(crate) fn image_on(tar: &[u8], out: &File, below: &dyn Below) -> Result<Facts, ImageError> {
    let source = Source { blob: tar, compression: Compression::Plain };
    build(source, out, below, &Limits::default(), &|| false)
}
