//! The entries of a layer's tar, one after the other, with their data.
//!
//! **What.** [`Reader`] turns the uncompressed stream of a layer into [`Entry`] values and the data that belongs to each. It
//! knows the formats of layers: V7, ustar, PAX, GNU, STAR; long names, sparse files, xattrs, large numbers.
//!
//! **Where.** Made by `stream`; consumed by whoever turns a layer into an image, or into files.
//!
//! **How it decides.** containerd's applier reads with Go's `archive/tar`, and a layer must have one meaning on every node,
//! whoever unpacks it. So where readers of tar differ (which of two names wins, what a size means for a directory, what ends an
//! archive), this one decides as Go's does (`src/archive/tar/reader.go`, Go 1.26), and an entry means what containerd's applier
//! makes of it (`pkg/archive/tar.go`, 2.4). The exceptions, none of which an honest layer meets:
//! * a path that begins with `..` when it is clean is refused; containerd takes it from the root. (An absolute path is taken
//!   from the root here as well.) The same goes for the targets of hard links, which may not contain `..` or end in `/` either;
//! * a symlink's target with more than 4095 bytes and a NUL in a path are refused here instead of by the kernel later;
//! * old GNU sparse files (type `S`) are regular files; containerd refuses them;
//! * a path with more than 40 symlinks on it is refused, as the kernel does when somebody wants to open it; containerd follows 255;
//! * headers of one entry together have at most [`Limits::headers`] bytes; Go limits each of them.
//!
//! **When it fails.** [`ImageError::Tar`] for a stream that is no tar, [`ImageError::Entry`] for an entry that means nothing.
//! After an error the reader is not to be used any more.

mod header;
mod pax;
mod sparse;

use std::io::{self, BufRead};

use header::Header;
use pax::Records;
use sparse::Map;

use super::ImageError;
use super::error::{EntryFault, TarFault};
use super::limits::{Limit, Limits};

const BLOCK: usize = 512;
/// The longest name in a directory (`NAME_MAX`).
const NAME_MAX: usize = 255;
/// The longest target of a symlink (`PATH_MAX` with its NUL).
const TARGET_MAX: usize = 4095;
const WHITEOUT: &[u8] = b".wh.";

/// What to do at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Where.
    pub path: EntryPath,
    /// What.
    pub kind: Kind,
    /// Permission bits with setuid, setgid and sticky: at most 0o7777. Of no meaning for symlinks.
    pub mode: u16,
    /// Owner; `None` for 2^32 - 1, which `chown` takes for "as it is".
    pub uid: Option<u32>,
    /// Group, likewise.
    pub gid: Option<u32>,
    /// When the file was changed, as containerd's applier sets it: never before 1970 (a time before, or after 2262, is 1970).
    pub mtime: Time,
    /// Extended attributes, sorted by name, with whatever names the tar has.
    pub xattrs: Vec<Xattr>,
    /// Bytes of a file with its holes; else 0.
    pub size: u64,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A directory; merged with one that is there.
    Directory,
    /// A regular file, whose data [`Reader::chunk`] gives.
    File,
    /// Another name of a file that an earlier entry of the layer made.
    HardLink {
        /// The other name.
        target: EntryPath,
    },
    /// A symlink.
    Symlink {
        /// As it is stored: 1 to 4095 bytes without NUL.
        target: Vec<u8>,
    },
    /// A character device. The numbers are those that the kernel keeps: 12 and 20 bits.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
    /// A global PAX header. It means nothing for the entries that follow, but containerd's applier handles its name like any
    /// other up to the point where the file would be made: parents are made, what is there is removed.
    Global,
}

/// Seconds and nanoseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Time {
    /// Whole seconds.
    pub seconds: u64,
    /// 0 to 999,999,999.
    pub nanoseconds: u32,
}

/// One extended attribute.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Xattr {
    /// The whole name, its prefix included: `security.capability`.
    pub name: Vec<u8>,
    /// Any bytes.
    pub value: Vec<u8>,
}

/// A clean path from the layer's root: names between single slashes, none of them empty, `.` or `..`. Empty for the root.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct EntryPath(Vec<u8>);

/// What a whiteout entry stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whiteout<'a> {
    /// `.wh..wh..opq`: the directory that holds it hides what the layers below have there.
    Opaque,
    /// `.wh.NAME`: NAME of the layers below is hidden. (Other names that begin with `.wh..wh.` are no exceptions.)
    Of(&'a [u8]),
}

impl EntryPath {
    /// All of it.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether it is the layer's root. containerd's applier skips such entries: the root belongs to the snapshot.
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// The names on the way, the last one included.
    pub fn components(&self) -> impl DoubleEndedIterator<Item = &[u8]> {
        self.0.split(|byte| *byte == b'/').filter(|name| !name.is_empty())
    }

    /// The directory and the name in it; `None` for the root.
    pub fn split(&self) -> Option<(&[u8], &[u8])> {
        match self.0.iter().rposition(|byte| *byte == b'/') {
            _ if self.0.is_empty() => None,
            Some(at) => Some((&self.0[..at], &self.0[at + 1..])),
            None => Some((&[], &self.0)),
        }
    }

    /// What the name means as a whiteout, whatever the entry's type is; `None` if it is none.
    pub fn whiteout(&self) -> Result<Option<Whiteout<'_>>, ImageError> {
        let Some((_, name)) = self.split() else { return Ok(None) };
        match name.strip_prefix(WHITEOUT) {
            None => Ok(None),
            Some(b".wh..opq") => Ok(Some(Whiteout::Opaque)),
            Some(b"" | b"." | b"..") => Err(ImageError::entry(&self.0, EntryFault::WhiteoutName)),
            Some(name) => Ok(Some(Whiteout::Of(name))),
        }
    }

    /// Cleans a path as it stands in a tar (Go's `filepath.Clean`, then from the root).
    fn clean(raw: &[u8], limits: &Limits) -> Result<EntryPath, ImageError> {
        if raw.len() > limits.path {
            return Err(ImageError::limit(Limit::Path, limits.path as u64));
        }
        let refuse = |fault| Err(ImageError::entry(raw, fault));
        if raw.contains(&0) {
            return refuse(EntryFault::Nul);
        }
        let rooted = raw.first() == Some(&b'/');
        let mut names: Vec<&[u8]> = Vec::new();
        for name in raw.split(|byte| *byte == b'/') {
            match name {
                b"" | b"." => {}
                b".." if names.pop().is_some() || rooted => {}
                b".." => return refuse(EntryFault::Escapes),
                name => names.push(name),
            }
        }
        let last = names.last().map_or(0, |name| name.strip_prefix(WHITEOUT).unwrap_or(name).len());
        let above = names.len().saturating_sub(1);
        if last > NAME_MAX || names[..above].iter().any(|name| name.len() > NAME_MAX) {
            return refuse(EntryFault::NameTooLong);
        }
        Ok(EntryPath(names.join(&b'/')))
    }
}

/// A part of a file's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chunk<'a> {
    /// The next bytes.
    Bytes(&'a [u8]),
    /// As many zeros, of a hole in a sparse file.
    Hole(u64),
}

/// Reads a tar from a stream.
pub struct Reader<'a> {
    source: &'a mut dyn BufRead,
    limits: &'a Limits,
    /// Bytes consumed.
    at: u64,
    /// Bytes given out by [`chunk`](Reader::chunk) and not consumed yet.
    lent: usize,
    /// Data of the current entry that has not been consumed, and what pads it to a block.
    left: u64,
    padding: usize,
    /// Where the current entry's data goes, if it is sparse.
    map: Option<Map>,
    /// Bytes of files so far, with their holes.
    files: u64,
    ended: bool,
}

impl std::fmt::Debug for Reader<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").field("at", &self.at).field("left", &self.left).finish_non_exhaustive()
    }
}

impl<'a> Reader<'a> {
    /// A reader at the beginning of a tar. Errors of `source` that wrap an [`ImageError`] come out as that.
    pub fn new(source: &'a mut dyn BufRead, limits: &'a Limits) -> Reader<'a> {
        Reader { source, limits, at: 0, lent: 0, left: 0, padding: 0, map: None, files: 0, ended: false }
    }

    /// The next entry; `None` at the end. What was not read of the current one's data is skipped.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, ImageError> {
        let mut extensions = Extensions::default();
        loop {
            if self.ended || !self.skip_data()? {
                return Ok(None);
            }
            let Some(block) = self.header()? else { return Ok(None) };
            let mut header = Header::parse(&block).map_err(|fault| self.fault(fault))?;
            self.expect_data(&header)?;
            match header.kind {
                b'x' => extensions.pax = Some(self.records(&mut extensions.bytes)?),
                b'g' => {
                    let records = self.records(&mut extensions.bytes)?;
                    if let name @ [_, ..] = records.value(b"path") {
                        header.name = name.to_vec();
                    }
                    return self.global(header).map(Some);
                }
                b'L' => extensions.name = self.text(&mut extensions.bytes)?,
                b'K' => extensions.link = self.text(&mut extensions.bytes)?,
                _ => return self.entry(header, &block, extensions).map(Some),
            }
        }
    }

    /// The next part of the current entry's data; `None` at its end.
    pub fn chunk(&mut self) -> Result<Option<Chunk<'_>>, ImageError> {
        self.give_back();
        let mut longest = self.left;
        if let Some(map) = &mut self.map {
            match map.next(self.left) {
                Some(sparse::Part::Hole(length)) => return Ok(Some(Chunk::Hole(length))),
                Some(sparse::Part::Data(length)) => longest = length,
                None if self.left > 0 => return Err(self.fault(TarFault::Sparse)),
                None => return Ok(None),
            }
            if longest == 0 {
                return Err(self.fault(TarFault::Sparse));
            }
        }
        if longest == 0 {
            return Ok(None);
        }
        let available = self.source.fill_buf().map_err(ImageError::of_stream)?;
        if available.is_empty() {
            return Err(ImageError::Tar { at: self.at, fault: TarFault::Truncated });
        }
        let length = usize::try_from(longest).unwrap_or(usize::MAX).min(available.len());
        self.lent = length;
        if let Some(map) = &mut self.map {
            map.advance(length as u64);
        }
        Ok(Some(Chunk::Bytes(&available[..length])))
    }

    fn give_back(&mut self) {
        let lent = std::mem::take(&mut self.lent);
        self.source.consume(lent);
        self.at += lent as u64;
        self.left -= lent as u64;
    }

    fn fault(&self, fault: TarFault) -> ImageError {
        ImageError::Tar { at: self.at, fault }
    }

    /// Whether there may be more: an archive may end in the middle of its last entry's padding.
    fn skip_data(&mut self) -> Result<bool, ImageError> {
        self.give_back();
        let left = std::mem::take(&mut self.left);
        self.map = None;
        if self.skip(left)? != left {
            return Err(self.fault(TarFault::Truncated));
        }
        let padding = std::mem::take(&mut self.padding) as u64;
        let more = self.skip(padding)? == padding;
        self.ended = !more;
        Ok(more)
    }

    fn skip(&mut self, length: u64) -> Result<u64, ImageError> {
        let mut skipped = 0;
        while skipped < length {
            let available = self.source.fill_buf().map_err(ImageError::of_stream)?.len();
            if available == 0 {
                break;
            }
            let now = usize::try_from(length - skipped).unwrap_or(usize::MAX).min(available);
            self.source.consume(now);
            self.at += now as u64;
            skipped += now as u64;
        }
        Ok(skipped)
    }

    /// One block; `None` if the stream ends before it.
    fn block(&mut self) -> Result<Option<[u8; BLOCK]>, ImageError> {
        let mut block = [0; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            match self.source.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(self.fault(TarFault::Truncated)),
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(ImageError::of_stream(error)),
            }
        }
        self.at += BLOCK as u64;
        Ok(Some(block))
    }

    /// The next header's block; `None` at the end: no more bytes, two blocks of zeros, or one and no more bytes.
    fn header(&mut self) -> Result<Option<[u8; BLOCK]>, ImageError> {
        let is_zero = |block: &[u8; BLOCK]| block.iter().all(|byte| *byte == 0);
        match self.block()? {
            Some(block) if is_zero(&block) => {
                self.ended = true;
                match self.block()? {
                    Some(second) if !is_zero(&second) => Err(self.fault(TarFault::ZeroBlock)),
                    _ => Ok(None),
                }
            }
            Some(block) => Ok(Some(block)),
            None => {
                self.ended = true;
                Ok(None)
            }
        }
    }

    fn expect_data(&mut self, header: &Header) -> Result<(), ImageError> {
        let size = if header.is_without_data() { 0 } else { header.size };
        self.left = u64::try_from(size).map_err(|_| self.fault(TarFault::Number))?;
        self.padding = usize::try_from(self.left.wrapping_neg() % BLOCK as u64).unwrap_or(0);
        Ok(())
    }

    /// The data of a header that extends the next one. `sum` is what they have together.
    fn extension(&mut self, sum: &mut u64) -> Result<Vec<u8>, ImageError> {
        *sum = sum.saturating_add(self.left).saturating_add(BLOCK as u64);
        if *sum > self.limits.headers {
            return Err(ImageError::limit(Limit::Headers, self.limits.headers));
        }
        let mut bytes = Vec::new();
        while let Some(Chunk::Bytes(chunk)) = self.chunk()? {
            bytes.extend_from_slice(chunk);
        }
        Ok(bytes)
    }

    fn records(&mut self, sum: &mut u64) -> Result<Records, ImageError> {
        let bytes = self.extension(sum)?;
        Records::parse(&bytes).ok_or_else(|| self.fault(TarFault::Pax))
    }

    fn text(&mut self, sum: &mut u64) -> Result<Vec<u8>, ImageError> {
        let bytes = self.extension(sum)?;
        Ok(header::text(&bytes).to_vec())
    }

    fn global(&self, header: Header) -> Result<Entry, ImageError> {
        Ok(Entry {
            path: EntryPath::clean(&header.name, self.limits)?,
            kind: Kind::Global,
            mode: 0,
            uid: Some(0),
            gid: Some(0),
            mtime: Time::default(),
            xattrs: Vec::new(),
            size: 0,
        })
    }

    fn entry(
        &mut self,
        mut header: Header,
        block: &[u8; BLOCK],
        extensions: Extensions,
    ) -> Result<Entry, ImageError> {
        let records = extensions.pax.unwrap_or_default();
        records.amend(&mut header).map_err(|fault| self.fault(fault))?;
        for (name, longer) in [(&mut header.name, extensions.name), (&mut header.link, extensions.link)] {
            if !longer.is_empty() {
                *name = longer;
            }
        }
        if header.kind == 0 {
            header.kind = if header.name.ends_with(b"/") { b'5' } else { b'0' };
        }
        self.expect_data(&header)?;
        let size = self.sparse(&mut header, block, &records)?;
        let path = EntryPath::clean(&header.name, self.limits)?;
        let kind = self.kind(&header, &path)?;
        let size = if kind == Kind::File { size } else { 0 };
        self.files = self.files.saturating_add(size);
        if self.files > self.limits.plain {
            return Err(ImageError::limit(Limit::Plain, self.limits.plain));
        }
        Ok(Entry {
            path,
            kind,
            mode: u16::try_from(header.mode & 0o7777).unwrap_or(0),
            uid: owner(header.uid),
            gid: owner(header.gid),
            mtime: header.mtime.bounded(),
            xattrs: records.into_xattrs(),
            size,
        })
    }

    /// Finds out whether the data is that of a sparse file; the file's size.
    fn sparse(
        &mut self,
        header: &mut Header,
        block: &[u8; BLOCK],
        records: &Records,
    ) -> Result<u64, ImageError> {
        let map = match header.kind {
            b'S' => Some(self.old_gnu_map(header, block)?),
            _ => match records.sparse_version() {
                None => None,
                Some(version) => {
                    records.amend_sparse(header).map_err(|fault| self.fault(fault))?;
                    let pairs = match version {
                        pax::SparseVersion::InRecords => records.sparse_map(),
                        pax::SparseVersion::InData => self.map_in_data()?,
                    };
                    Some(pairs.ok_or_else(|| self.fault(TarFault::Sparse))?)
                }
            },
        };
        // Without data the size means nothing; with data it was found to be one.
        let size = u64::try_from(header.size);
        let Some(pairs) = map else { return Ok(size.unwrap_or(0)) };
        let size = size.map_err(|_| self.fault(TarFault::Sparse))?;
        if header.is_without_data() {
            return Err(self.fault(TarFault::Sparse));
        }
        self.map = Some(Map::new(pairs, size).ok_or_else(|| self.fault(TarFault::Sparse))?);
        Ok(size)
    }

    fn old_gnu_map(&mut self, header: &mut Header, block: &[u8; BLOCK]) -> Result<sparse::Pairs, ImageError> {
        let mut old = header::OldGnuMap::parse(block).map_err(|fault| self.fault(fault))?;
        header.size = old.size;
        let mut bytes = 0;
        while old.is_extended {
            bytes += BLOCK as u64;
            if bytes > self.limits.headers {
                return Err(ImageError::limit(Limit::Headers, self.limits.headers));
            }
            let more = self.block()?.ok_or_else(|| self.fault(TarFault::Truncated))?;
            old.extend(&more).map_err(|fault| self.fault(fault))?;
        }
        Ok(old.pairs)
    }

    /// GNU's PAX format 1.0: the map stands before the data, in whole blocks.
    fn map_in_data(&mut self) -> Result<Option<sparse::Pairs>, ImageError> {
        let mut text = sparse::Text::default();
        let mut bytes = 0;
        while !text.is_complete() {
            bytes += BLOCK as u64;
            if bytes > self.limits.headers {
                return Err(ImageError::limit(Limit::Headers, self.limits.headers));
            }
            if self.left < BLOCK as u64 {
                return Err(self.fault(TarFault::Sparse));
            }
            let block = self.block()?.ok_or_else(|| self.fault(TarFault::Truncated))?;
            self.left -= BLOCK as u64;
            if !text.feed(&block) {
                return Ok(None);
            }
        }
        Ok(text.pairs())
    }

    fn kind(&self, header: &Header, path: &EntryPath) -> Result<Kind, ImageError> {
        let refuse = |fault| Err(ImageError::entry(path.as_bytes(), fault));
        let devices = (u32::try_from(header.major), u32::try_from(header.minor));
        let (major, minor) = match (header.kind, devices) {
            (b'3' | b'4' | b'6', (Ok(major), Ok(minor))) => (major & 0xfff, minor & 0xf_ffff),
            (b'3' | b'4' | b'6', _) => return refuse(EntryFault::DeviceNumber),
            _ => (0, 0),
        };
        Ok(match header.kind {
            b'0' | b'S' => Kind::File,
            b'1' => Kind::HardLink { target: link_target(&header.link, path, self.limits)? },
            b'2' if header.link.is_empty() || header.link.len() > TARGET_MAX => {
                return refuse(EntryFault::SymlinkTarget);
            }
            b'2' if header.link.contains(&0) => return refuse(EntryFault::Nul),
            b'2' => Kind::Symlink { target: header.link.clone() },
            b'3' => Kind::CharDevice { major, minor },
            b'4' => Kind::BlockDevice { major, minor },
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => return refuse(EntryFault::Type(char::from(other))),
        })
    }
}

/// containerd resolves the directories of a link's target and not its last name; that is the same as cleaning it first, but
/// for the forms that are refused here.
fn link_target(raw: &[u8], path: &EntryPath, limits: &Limits) -> Result<EntryPath, ImageError> {
    if raw.ends_with(b"/") || raw.split(|byte| *byte == b'/').any(|name| name == b"..") {
        return Err(ImageError::entry(path.as_bytes(), EntryFault::Escapes));
    }
    EntryPath::clean(raw, limits)
}

/// `chown` keeps 32 bits, and takes all ones for "as it is".
fn owner(number: i64) -> Option<u32> {
    let [a, b, c, d, ..] = number.to_le_bytes();
    Some(u32::from_le_bytes([a, b, c, d])).filter(|id| *id != u32::MAX)
}

/// What headers before an entry's own say of it.
#[derive(Default)]
struct Extensions {
    pax: Option<Records>,
    name: Vec<u8>,
    link: Vec<u8>,
    /// Bytes of all of them.
    bytes: u64,
}
