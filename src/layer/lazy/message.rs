//! What is said on a FUSE connection, as far as a directory of read-only files needs it.
//!
//! **What.** [`parse`] reads a request; the functions named after answers write one's body; [`header`] goes before it.
//!
//! **Format.** `linux/fuse.h` (protocol 7.31, Linux 5.4, and newer): little structures in the machine's byte order. Node 1 is the
//! directory; the node of a layer image is its serial + 1, and its name the serial in decimal.
//!
//! **When it fails.** What is not understood is [`Request::Other`], to be answered with ENOSYS; a message that is cut short is `None`.

/// The longest message that we want from the kernel: it sends no data.
pub const LONGEST: usize = 8192;
/// As much of a message as is ever looked at.
pub const LOOKED_AT: usize = 256;
/// The longest answer to a read: 256 pages.
pub const LONGEST_READ: u32 = 1 << 20;
/// How many reads the kernel may have under way.
pub const BACKGROUND: u16 = 256;

const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;
const ROOT: u64 = 1;

const ASYNC_READ: u32 = 1;
const ASYNC_DIO: u32 = 1 << 15;
const MAX_PAGES: u32 = 1 << 22;
/// How long what we say of a file stays true, in seconds: nothing of it ever changes.
const FOR_EVER: u64 = 1 << 31;

/// A request without its header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// The first one.
    Init {
        /// Protocol version.
        version: (u32, u32),
        /// What the kernel can do.
        flags: u32,
        /// How far it would read ahead.
        read_ahead: u32,
    },
    /// Which node has this name.
    Lookup {
        /// The name, if it is one that a layer image can have.
        serial: Option<u64>,
    },
    /// What a node is.
    Attributes,
    /// A file or the directory is opened.
    Open,
    /// Bytes are wanted.
    Read {
        /// From here on.
        offset: u64,
        /// So many at most.
        size: u32,
    },
    /// The file system's size.
    Statistics,
    /// Needs no more than a yes.
    Nothing,
    /// Needs no answer.
    Silent,
    /// Anything else.
    Other,
}

/// A request with what every request has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// What the answer is sent to.
    pub unique: u64,
    /// Whom it is about.
    pub node: u64,
    /// What is asked.
    pub request: Request,
}

/// The layer image of a node.
pub fn serial(node: u64) -> Option<u64> {
    node.checked_sub(2).map(|serial| serial + 1)
}

/// The node of a layer image.
pub fn node(serial: u64) -> u64 {
    serial + 1
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// Reads the first [`LOOKED_AT`] bytes of a message, or all of a shorter one.
pub fn parse(bytes: &[u8]) -> Option<Message> {
    let (opcode, unique, node) = (u32_at(bytes, 4)?, u64_at(bytes, 8)?, u64_at(bytes, 16)?);
    let body = bytes.get(IN_HEADER..)?;
    let request = match opcode {
        26 => Request::Init {
            version: (u32_at(body, 0)?, u32_at(body, 4)?),
            read_ahead: u32_at(body, 8)?,
            flags: u32_at(body, 12)?,
        },
        1 => Request::Lookup { serial: (node == ROOT).then(|| named(body)).flatten() },
        3 => Request::Attributes,
        14 | 27 => Request::Open,
        15 => Request::Read { offset: u64_at(body, 8)?, size: u32_at(body, 16)? },
        17 => Request::Statistics,
        // RELEASE, FLUSH, RELEASEDIR, DESTROY.
        18 | 25 | 29 | 38 => Request::Nothing,
        // FORGET, INTERRUPT, BATCH_FORGET: a read that nobody waits for any more is answered all the same.
        2 | 36 | 42 => Request::Silent,
        _ => Request::Other,
    };
    Some(Message { unique, node, request })
}

fn named(body: &[u8]) -> Option<u64> {
    let end = body.iter().position(|byte| *byte == 0)?;
    let name = std::str::from_utf8(&body[..end]).ok()?;
    crate::sys::decimal::parse(name).filter(|serial| *serial > 0)
}

/// The header of an answer with `body` bytes behind it; `errno` is 0 or positive.
pub fn header(unique: u64, errno: i32, body: usize) -> [u8; OUT_HEADER] {
    let mut bytes = [0; OUT_HEADER];
    let length = u32::try_from(OUT_HEADER + body).unwrap_or(u32::MAX);
    bytes[..4].copy_from_slice(&length.to_ne_bytes());
    bytes[4..8].copy_from_slice(&(-errno).to_ne_bytes());
    bytes[8..].copy_from_slice(&unique.to_ne_bytes());
    bytes
}

/// The kernel is asked to send again what it has sent and got no answer to (`FUSE_NOTIFY_RESEND`, Linux 6.9).
pub fn resend() -> [u8; OUT_HEADER] {
    let mut bytes = header(0, 0, 0);
    bytes[4..8].copy_from_slice(&7_i32.to_ne_bytes());
    bytes
}

#[derive(Default)]
struct Body(Vec<u8>);

impl Body {
    fn u16(mut self, value: u16) -> Body {
        self.0.extend(value.to_ne_bytes());
        self
    }
    fn u32(mut self, value: u32) -> Body {
        self.0.extend(value.to_ne_bytes());
        self
    }
    fn u64(mut self, value: u64) -> Body {
        self.0.extend(value.to_ne_bytes());
        self
    }
    fn zeros(mut self, count: usize) -> Body {
        self.0.resize(self.0.len() + count, 0);
        self
    }
    /// `struct fuse_attr`.
    fn attributes(self, node: u64, size: u64) -> Body {
        let mode = if node == ROOT { 0o040_500 } else { 0o100_400 };
        let times = self.u64(node).u64(size).u64(size.div_ceil(512)).zeros(3 * 8 + 3 * 4);
        times.u32(mode).u32(1).zeros(3 * 4).u32(4096).u32(0)
    }
}

/// The answer to [`Request::Init`]; `None` if the kernel cannot do what is needed.
pub fn init(version: (u32, u32), flags: u32, read_ahead: u32) -> Option<Vec<u8>> {
    let wanted = ASYNC_READ | ASYNC_DIO | MAX_PAGES;
    if version.0 != 7 || version.1 < 31 || flags & wanted != wanted {
        return None;
    }
    let minor = version.1.min(38);
    let body = Body::default().u32(7).u32(minor).u32(read_ahead).u32(wanted);
    // Not congested before all are under way: the kernel would hold readers back.
    let body = body.u16(BACKGROUND).u16(BACKGROUND).u32(4096).u32(1);
    let pages = u16::try_from(LONGEST_READ / 4096).unwrap_or(u16::MAX);
    Some(body.u16(pages).u16(0).zeros(32).0)
}

/// The answer to [`Request::Lookup`].
pub fn entry(serial: u64, size: u64) -> Vec<u8> {
    let node = node(serial);
    // The name is asked again each time: another root, with other layers under the same serials, may be served next.
    let body = Body::default().u64(node).u64(0).u64(0).u64(FOR_EVER).u32(0).u32(0);
    body.attributes(node, size).0
}

/// The answer to [`Request::Attributes`].
pub fn attributes(node: u64, size: u64) -> Vec<u8> {
    Body::default().u64(FOR_EVER).u32(0).u32(0).attributes(node, size).0
}

/// The answer to [`Request::Open`].
pub fn opened() -> Vec<u8> {
    Body::default().zeros(16).0
}

/// The answer to [`Request::Statistics`].
pub fn statistics() -> Vec<u8> {
    // blocks, bfree, bavail, files, ffree; bsize, namelen, frsize.
    Body::default().zeros(40).u32(4096).u32(255).u32(4096).zeros(4 + 24).0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(IN_HEADER + body.len()).unwrap();
        let header = Body::default().u32(length).u32(opcode).u64(77).u64(node).zeros(16);
        [&header.0, body].concat()
    }

    #[test]
    fn the_structures_have_the_kernels_sizes() {
        assert_eq!(init((7, 40), u32::MAX, 0).unwrap().len(), 64);
        assert_eq!(entry(5, 100).len(), 128);
        assert_eq!(attributes(1, 0).len(), 104);
        assert_eq!((opened().len(), statistics().len()), (16, 80));
    }

    #[test]
    fn a_kernel_that_reads_one_at_a_time_is_refused() {
        assert_eq!(init((7, 40), ASYNC_READ | MAX_PAGES, 0), None);
        assert_eq!(init((7, 30), u32::MAX, 0), None);
        assert_eq!(init((8, 40), u32::MAX, 0), None);
    }

    #[test]
    fn a_read_says_where_and_how_much() {
        let body = Body::default().u64(0).u64(8192).u32(4096).zeros(20).0;
        let read = Message { unique: 77, node: 6, request: Request::Read { offset: 8192, size: 4096 } };
        assert_eq!(parse(&request(15, 6, &body)), Some(read));
        assert_eq!(serial(6), Some(5));
        assert_eq!((serial(1), serial(0), node(5)), (None, None, 6));
    }

    #[test]
    fn only_serials_are_names() {
        let lookup = |name: &[u8], node| match parse(&request(1, node, name)).unwrap().request {
            Request::Lookup { serial } => serial,
            other => panic!("{other:?}"),
        };
        assert_eq!(lookup(b"17\0", 1), Some(17));
        for name in
            [&b"017\0"[..], b"0\0", b"17", b"x\0", b"../17\0", b"\0", b"-1\0", b"99999999999999999999\0"]
        {
            assert_eq!(lookup(name, 1), None, "{name:?}");
        }
        assert_eq!(lookup(b"17\0", 5), None);
    }

    #[test]
    fn what_is_cut_short_is_nothing() {
        let body = Body::default().u64(0).u64(8192).u32(4096).zeros(20).0;
        let whole = request(15, 6, &body);
        for length in 0..IN_HEADER + 20 {
            assert_eq!(parse(&whole[..length]), None, "{length}");
        }
    }
}
