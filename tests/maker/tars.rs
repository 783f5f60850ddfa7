//! Tars written by hand, byte by byte, the odd ones too.

/// A tar in the making.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tar {
    bytes: Vec<u8>,
}

/// One entry as a test wants it.
#[derive(Debug, Clone)]
pub(crate) struct Item {
    pub(crate) name: String,
    pub(crate) kind: u8,
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    pub(crate) mtime: u64,
    pub(crate) link: String,
    pub(crate) content: Vec<u8>,
    pub(crate) device: (u32, u32),
    /// Records of a PAX header before it.
    pub(crate) pax: Vec<(String, Vec<u8>)>,
}

impl Item {
    pub(crate) fn new(kind: u8, name: &str) -> Item {
        Item {
            name: name.into(),
            kind,
            mode: if kind == b'5' { 0o755 } else { 0o644 },
            owner: (0, 0),
            mtime: 1_600_000_000,
            link: String::new(),
            content: Vec::new(),
            device: (0, 0),
            pax: Vec::new(),
        }
    }

    pub(crate) fn file(name: &str, content: &[u8]) -> Item {
        Item { content: content.to_vec(), ..Item::new(b'0', name) }
    }

    pub(crate) fn dir(name: &str) -> Item {
        Item::new(b'5', name)
    }

    pub(crate) fn symlink(name: &str, target: &str) -> Item {
        Item { link: target.into(), ..Item::new(b'2', name) }
    }

    pub(crate) fn link(name: &str, target: &str) -> Item {
        Item { link: target.into(), ..Item::new(b'1', name) }
    }

    pub(crate) fn mode(self, mode: u32) -> Item {
        Item { mode, ..self }
    }

    pub(crate) fn owner(self, uid: u32, gid: u32) -> Item {
        Item { owner: (uid, gid), ..self }
    }

    pub(crate) fn mtime(self, mtime: u64) -> Item {
        Item { mtime, ..self }
    }

    pub(crate) fn pax(mut self, key: &str, value: &[u8]) -> Item {
        self.pax.push((key.into(), value.to_vec()));
        self
    }

    pub(crate) fn xattr(self, name: &str, value: &[u8]) -> Item {
        self.pax(&format!("SCHILY.xattr.{name}"), value)
    }
}

impl Tar {
    pub(crate) fn of(items: &[Item]) -> Vec<u8> {
        let mut tar = Tar::default();
        items.iter().for_each(|item| tar.add(item));
        tar.finish()
    }

    pub(crate) fn add(&mut self, item: &Item) {
        if !item.pax.is_empty() {
            let records: Vec<u8> = item.pax.iter().flat_map(|(key, value)| record(key, value)).collect();
            self.bytes.extend(header(&Item::new(b'x', "pax"), records.len()));
            self.data(&records);
        }
        self.bytes.extend(header(item, item.content.len()));
        self.data(&item.content);
    }

    fn data(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
    }

    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.bytes.extend([0; 1024]);
        self.bytes
    }
}

fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let body = 1 + key.len() + 1 + value.len() + 1;
    let mut length = body + 1;
    while length != body + length.to_string().len() {
        length = body + length.to_string().len();
    }
    [length.to_string().as_bytes(), b" ", key.as_bytes(), b"=", value, b"\n"].concat()
}

fn header(item: &Item, size: usize) -> [u8; 512] {
    let mut block = [0; 512];
    let mut put = |at: usize, field: &[u8]| block[at..at + field.len()].copy_from_slice(field);
    assert!(item.name.len() <= 100 && item.link.len() <= 100, "longer names are for PAX records");
    put(0, item.name.as_bytes());
    put(100, format!("{:07o}\0", item.mode).as_bytes());
    put(108, format!("{:07o}\0", item.owner.0).as_bytes());
    put(116, format!("{:07o}\0", item.owner.1).as_bytes());
    put(124, format!("{size:011o}\0").as_bytes());
    put(136, format!("{:011o}\0", item.mtime).as_bytes());
    put(148, b"        ");
    put(156, &[item.kind]);
    put(157, item.link.as_bytes());
    put(257, b"ustar\x0000");
    put(329, format!("{:07o}\0", item.device.0).as_bytes());
    put(337, format!("{:07o}\0", item.device.1).as_bytes());
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}
