//! How much of anything a layer may have before it is refused.
//!
//! The defaults hold for every layer that was met so far with room to spare; what exceeds them would fill a node's memory or
//! disk before anybody noticed. A limit that is exceeded is [`ImageError::Limit`](super::ImageError::Limit), which names it.

/// What a layer may have at most.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Entries of the tar, with the directories they imply.
    pub entries: u64,
    /// Bytes of a path, as the tar has it and as it is when symlinks of the layer are followed.
    pub path: usize,
    /// Bytes of metadata: what inodes, names, link targets and xattrs take in an image, and about what they take in memory,
    /// with the path of each directory's entry.
    pub metadata: u64,
    /// Bytes of one inode's xattrs in an image.
    pub xattrs: u64,
    /// Bytes of an image's data, holes included.
    pub data: u64,
    /// Bytes of the uncompressed layer, and bytes of its files when the holes of sparse files are counted.
    pub plain: u64,
    /// Uncompressed bytes for each compressed one, once [`ratio_from`](Limits::ratio_from) are exceeded.
    pub ratio: u64,
    /// Uncompressed bytes from which on [`ratio`](Limits::ratio) is asked for: zeros compress a thousandfold, and a small
    /// layer may consist of them.
    pub ratio_from: u64,
    /// Bytes of PAX and GNU headers that belong to one entry, their blocks included; also of the map of a sparse file.
    pub headers: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        const MIB: u64 = 1 << 20;
        Limits {
            entries: 2_000_000,
            path: 4096,
            metadata: 512 * MIB,
            xattrs: 128 * 1024,
            data: 256 * 1024 * MIB,
            plain: 256 * 1024 * MIB,
            ratio: 200,
            ratio_from: 16 * 1024 * MIB,
            headers: MIB + 4096,
        }
    }
}

/// Which of the [`Limits`] was exceeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// [`Limits::entries`].
    Entries,
    /// [`Limits::path`].
    Path,
    /// [`Limits::metadata`].
    Metadata,
    /// [`Limits::xattrs`].
    Xattrs,
    /// [`Limits::data`].
    Data,
    /// [`Limits::plain`].
    Plain,
    /// [`Limits::ratio`].
    Ratio,
    /// [`Limits::headers`].
    Headers,
}

impl Limit {
    /// Whether it is there for the image's sake: files in a directory may have more.
    pub(super) fn is_of_images(self) -> bool {
        match self {
            Limit::Entries | Limit::Metadata | Limit::Xattrs | Limit::Data => true,
            Limit::Path | Limit::Plain | Limit::Ratio | Limit::Headers => false,
        }
    }
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Limit::Entries => "entries",
            Limit::Path => "bytes in a path",
            Limit::Metadata => "bytes of metadata",
            Limit::Xattrs => "bytes of xattrs on one file",
            Limit::Data => "bytes of file data",
            Limit::Plain => "uncompressed bytes",
            Limit::Ratio => "uncompressed bytes for each compressed one",
            Limit::Headers => "bytes of headers for one entry",
        })
    }
}
