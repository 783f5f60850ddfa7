//! How a layer's blob is compressed, and reading through that.
//!
//! As containerd does it (`core/images/mediatypes.go` `DiffCompression`, `pkg/archive/compression`): the media type says
//! *whether* a layer may be compressed, its first bytes say *how*. A layer that is called gzip and holds a plain tar or zstd is
//! read as what it is; an OCI layer that is called a plain tar is never looked at.

use std::io::{self, BufReader, Cursor, Read};

use flate2::bufread::MultiGzDecoder;

use super::ImageError;

/// What the media type says of a layer's compression.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// A tar, whatever its first bytes look like.
    Plain,
    /// The first bytes say it: gzip, zstd, or else a plain tar.
    ByMagic,
}

const DOCKER: [&str; 5] = [
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
];
const OCI: [&str; 2] =
    ["application/vnd.oci.image.layer.v1.tar", "application/vnd.oci.image.layer.nondistributable.v1.tar"];

impl Compression {
    /// What a layer's media type says. [`ImageError::Encrypted`] and [`ImageError::UnknownMediaType`] for all that is not a
    /// layer's or is wrapped into something that is not compression.
    pub fn of_media_type(media_type: &str) -> Result<Compression, ImageError> {
        let mut parts = media_type.split('+');
        let base = parts.next().unwrap_or_default();
        let wrappings: Vec<&str> = parts.collect();
        if wrappings.contains(&"encrypted") {
            return Err(ImageError::Encrypted { media_type: media_type.to_owned() });
        }
        let compressed = !wrappings.is_empty() && wrappings.iter().all(|w| matches!(*w, "gzip" | "zstd"));
        match (OCI.contains(&base), DOCKER.contains(&base)) {
            (true, _) if compressed => Ok(Compression::ByMagic),
            (true, _) if wrappings.is_empty() => Ok(Compression::Plain),
            (_, true) if wrappings.is_empty() => Ok(Compression::ByMagic),
            _ => Err(ImageError::UnknownMediaType { media_type: media_type.to_owned() }),
        }
    }
}

/// What [`decompress`] reads from the blob at once.
const PIECE: usize = 128 * 1024;

/// A reader of the uncompressed layer. Members of gzip and frames of zstd may follow each other. A blob without a byte is an
/// empty layer.
pub(super) fn decompress<'a>(
    compression: Compression,
    mut blob: impl Read + 'a,
) -> io::Result<Box<dyn Read + 'a>> {
    let mut magic = Vec::new();
    if compression == Compression::ByMagic {
        blob.by_ref().take(10).read_to_end(&mut magic)?;
    }
    let is_gzip = magic.starts_with(&[0x1f, 0x8b, 0x08]);
    let is_zstd = is_zstd(&magic);
    let whole = Cursor::new(magic).chain(blob);
    if is_gzip {
        Ok(Box::new(MultiGzDecoder::new(BufReader::with_capacity(PIECE, whole))))
    } else if is_zstd {
        // Windows beyond libzstd's default of 128 MiB are refused: they are memory that the layer's author chooses.
        Ok(Box::new(zstd::stream::read::Decoder::with_buffer(BufReader::with_capacity(PIECE, whole))?))
    } else {
        Ok(Box::new(whole))
    }
}

/// A frame, or a skippable frame (RFC 8878, section 3.1) with its length.
fn is_zstd(magic: &[u8]) -> bool {
    let skippable = magic.len() >= 8 && magic[0] & 0xf0 == 0x50 && magic[1..4] == [0x2a, 0x4d, 0x18];
    magic.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) || skippable
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn media_types_are_read_as_containerd_reads_them() {
        for (media_type, expected) in [
            ("application/vnd.oci.image.layer.v1.tar", Compression::Plain),
            ("application/vnd.oci.image.layer.v1.tar+gzip", Compression::ByMagic),
            ("application/vnd.oci.image.layer.v1.tar+zstd", Compression::ByMagic),
            ("application/vnd.oci.image.layer.nondistributable.v1.tar", Compression::Plain),
            ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", Compression::ByMagic),
            ("application/vnd.oci.image.layer.nondistributable.v1.tar+zstd", Compression::ByMagic),
            ("application/vnd.docker.image.rootfs.diff.tar", Compression::ByMagic),
            ("application/vnd.docker.image.rootfs.diff.tar.gzip", Compression::ByMagic),
            ("application/vnd.docker.image.rootfs.diff.tar.zstd", Compression::ByMagic),
            ("application/vnd.docker.image.rootfs.foreign.diff.tar", Compression::ByMagic),
            ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", Compression::ByMagic),
        ] {
            assert_eq!(Compression::of_media_type(media_type).unwrap(), expected, "{media_type}");
        }
        for media_type in [
            "application/vnd.oci.image.layer.v1.tar+encrypted",
            "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
            "application/vnd.docker.image.rootfs.diff.tar.gzip+encrypted",
        ] {
            let error = Compression::of_media_type(media_type);
            assert!(matches!(error, Err(ImageError::Encrypted { .. })), "{media_type}");
        }
        for media_type in [
            "",
            "application/vnd.oci.image.layer.v1.tar+xz",
            "application/vnd.oci.image.layer.v1.tar+",
            "application/vnd.docker.image.rootfs.diff.tar+gzip",
            "application/vnd.erofs.layer.v1",
            "application/vnd.oci.image.config.v1+json",
        ] {
            let error = Compression::of_media_type(media_type);
            assert!(matches!(error, Err(ImageError::UnknownMediaType { .. })), "{media_type}");
        }
    }

    fn read(compression: Compression, blob: &[u8]) -> io::Result<Vec<u8>> {
        let mut plain = Vec::new();
        decompress(compression, blob)?.read_to_end(&mut plain)?;
        Ok(plain)
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn the_first_bytes_say_how_unless_the_media_type_says_plain() {
        let text = b"some text, some text, some text".as_slice();
        let zstd = zstd::encode_all(text, 1).unwrap();
        assert_eq!(read(Compression::ByMagic, text).unwrap(), text);
        assert_eq!(read(Compression::ByMagic, &gzip(text)).unwrap(), text);
        assert_eq!(read(Compression::ByMagic, &zstd).unwrap(), text);
        assert_eq!(read(Compression::Plain, &gzip(text)).unwrap(), gzip(text));
        for short in [&b""[..], b"\x1f", b"\x1f\x8b", b"\x28\xb5"] {
            assert_eq!(read(Compression::ByMagic, short).unwrap(), short);
        }
    }

    #[test]
    fn members_and_frames_follow_each_other() {
        let members = [gzip(b"one "), gzip(b""), gzip(b"two")].concat();
        assert_eq!(read(Compression::ByMagic, &members).unwrap(), b"one two");
        let skippable = [&[0x5a, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"abc"].concat();
        let frame = |text: &[u8]| zstd::encode_all(text, 1).unwrap();
        let frames = [skippable.clone(), frame(b"one "), skippable, frame(b"two")].concat();
        assert_eq!(read(Compression::ByMagic, &frames).unwrap(), b"one two");
    }

    #[test]
    fn damage_is_an_error() {
        let text = vec![7; 100_000];
        for whole in [gzip(&text), zstd::encode_all(&text[..], 1).unwrap()] {
            read(Compression::ByMagic, &whole).unwrap();
            read(Compression::ByMagic, &whole[..whole.len() - 3]).unwrap_err();
            read(Compression::ByMagic, &[&whole[..], b"garbage behind it"].concat()).unwrap_err();
        }
        let mut flipped = gzip(&text);
        let last = flipped.len() - 6;
        flipped[last] ^= 1;
        read(Compression::ByMagic, &flipped).unwrap_err();
    }
}
