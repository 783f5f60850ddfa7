//! Names of images: which images the store can give whole.
//!
//! **What.** An [`ImageName`] says that every layer of an image is published for a platform, and its documents ([`super::document`])
//! with it. It is written after all of them, so that they are there; a ref may be of another publisher that this one trusts, and
//! whoever reads the name has to trust it, too. No snapshot waits for it; it is for tools that list what a store has, and for
//! those who cannot reach the registry.
//!
//! **Format.** The message `ImageName` of `proto/speedy/v1/layer.proto`, version 2, canonical, in the object
//! `images/<2 hex>/<hash>/<key id>`, where the hash is the BLAKE3-256 of reference, a zero byte and platform. Signed is
//!
//! ```text
//! "speedy image name v2" 00 | the message's bytes without the signature
//! ```
//!
//! A publisher that publishes the same name again (a tag that moved) replaces its own object and nobody else's. Version 1, which
//! had no documents, is not read.

use std::fmt;

use prost::Message;

use super::trust::{PublicKey, PublisherKey};
use super::{digest_of, raw};
use crate::containerd::manifest::Resolved;
use crate::oci::{ChainId, Digest};
use crate::proto::speedy::v1 as wire;

const FORMAT: u32 = 2;
const CONTEXT: &str = "speedy image name v2";
/// Under what all names are.
pub(super) const PREFIX: &str = "images";
/// The longest text of a reference, a platform or a media type, in bytes.
const LONGEST_TEXT: usize = 1024;
/// The most layers of an image. overlayfs takes some 500.
const MOST_LAYERS: usize = 1024;
/// The most documents of an image: indexes in indexes, a manifest, a configuration.
const MOST_DOCUMENTS: usize = 8;
/// More than any name has, in bytes.
pub(super) const LONGEST: u64 = 64 * 1024;

/// An image of which every layer is published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageName {
    /// Its full reference, such as `docker.io/library/alpine:3.22`.
    pub reference: String,
    /// For which platform, such as `linux/amd64`.
    pub platform: String,
    /// The media type of what the reference resolves to; empty where there is no manifest.
    pub target_media_type: String,
    /// The digest of what the reference resolves to: an index, or the manifest.
    pub target: Digest,
    /// The media type of its manifest; empty where there is none (a docker archive).
    pub media_type: String,
    /// The digest of its manifest, or of its configuration where there is no manifest.
    pub manifest: Digest,
    /// The digests of its documents, all of which the store keeps, from the target down to the configuration; none where
    /// there is no manifest.
    pub documents: Vec<Digest>,
    /// The chains of its layers, from the bottom up.
    pub chains: Vec<ChainId>,
}

/// Why something is no name of an image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Written by a newer Speedy.
    #[error("image name has format version {found}, this speedy knows {FORMAT}: upgrade it")]
    UnknownFormat {
        /// Its version.
        found: u32,
    },
    /// Written by an older one.
    #[error("image name has format version {found}, which is no longer read: publish the image again")]
    OldFormat {
        /// Its version.
        found: u32,
    },
    /// What is to be written with the name is not what it names.
    #[error("the documents of the image are not those that its name lists: publish it again")]
    OtherDocuments,
    /// It has a part that no image name has.
    #[error("image name is malformed: {0}")]
    Malformed(&'static str),
    /// The signature is not this publisher's over this, or it belongs to another name.
    #[error("image name is not signed by {publisher}")]
    Forged {
        /// Whom it names.
        publisher: PublicKey,
    },
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.reference, self.platform)
    }
}

impl ImageName {
    /// The name of an image of which this is known.
    pub fn of(reference: &str, image: &Resolved) -> ImageName {
        ImageName {
            reference: reference.to_owned(),
            platform: image.platform.to_string(),
            target_media_type: image.target.media_type.clone(),
            target: image.target.digest.clone(),
            media_type: image.manifest.media_type.clone(),
            manifest: image.manifest.digest.clone(),
            documents: image.documents.clone(),
            chains: image.layers.iter().map(|layer| layer.chain.clone()).collect(),
        }
    }

    /// The name of the object in which this publisher speaks of it.
    pub fn object(&self, publisher: &PublicKey) -> String {
        format!("{}/{}", self.objects(), publisher.id())
    }

    /// Under what all publishers' objects of it are.
    pub(super) fn objects(&self) -> String {
        objects(&self.reference, &self.platform)
    }

    /// Its bytes, signed with this key; always the same ones.
    pub fn encode(&self, key: &PublisherKey) -> Result<Vec<u8>, NameError> {
        self.check()?;
        let mut message = self.message(key.public());
        message.signature = key.sign(CONTEXT, &message.encode_to_vec()).to_vec();
        Ok(message.encode_to_vec())
    }

    /// What the object `name` says, and who says it; the signature has been checked.
    pub fn decode(bytes: &[u8], name: &str) -> Result<(ImageName, PublicKey), NameError> {
        let mut message =
            wire::ImageName::decode(bytes).map_err(|_| NameError::Malformed("not a message"))?;
        match message.format {
            FORMAT => {}
            // An empty object is a message, too: one of no version.
            0 => return Err(NameError::Malformed("no format version")),
            found @ 1..FORMAT => return Err(NameError::OldFormat { found }),
            found => return Err(NameError::UnknownFormat { found }),
        }
        if message.encode_to_vec() != bytes {
            return Err(NameError::Malformed("not in canonical form"));
        }
        let publisher = PublicKey::from_bytes(&message.key).map_err(|_| NameError::Malformed("no key"))?;
        let signature = std::mem::take(&mut message.signature);
        if !publisher.signed(CONTEXT, &message.encode_to_vec(), &signature) {
            return Err(NameError::Forged { publisher });
        }
        let image = ImageName {
            target: one(&message.target)?,
            manifest: one(&message.manifest)?,
            documents: several(&message.documents)?,
            chains: several(&message.chain_ids)?.into_iter().map(ChainId).collect(),
            reference: message.reference,
            platform: message.platform,
            target_media_type: message.target_media_type,
            media_type: message.media_type,
        };
        image.check()?;
        if image.object(&publisher) != name {
            return Err(NameError::Forged { publisher });
        }
        Ok((image, publisher))
    }

    fn message(&self, publisher: &PublicKey) -> wire::ImageName {
        wire::ImageName {
            format: FORMAT,
            reference: self.reference.clone(),
            platform: self.platform.clone(),
            media_type: self.media_type.clone(),
            manifest: raw(&self.manifest).to_vec(),
            chain_ids: self.chains.iter().flat_map(|chain| raw(&chain.0)).collect(),
            key: publisher.as_bytes().to_vec(),
            signature: Vec::new(),
            target: raw(&self.target).to_vec(),
            target_media_type: self.target_media_type.clone(),
            documents: self.documents.iter().flat_map(raw).collect(),
        }
    }

    /// What both who writes and who reads a name rely on; the texts end up on terminals.
    fn check(&self) -> Result<(), NameError> {
        let good = |text: &str| text.len() <= LONGEST_TEXT && !text.chars().any(char::is_control);
        if self.reference.is_empty() || !good(&self.reference) {
            return Err(NameError::Malformed("no reference, or not a printable one"));
        }
        if self.platform.is_empty() || !good(&self.platform) {
            return Err(NameError::Malformed("no platform, or not a printable one"));
        }
        if !good(&self.media_type) || !good(&self.target_media_type) {
            return Err(NameError::Malformed("not a printable media type"));
        }
        if self.chains.len() > MOST_LAYERS {
            return Err(NameError::Malformed("more layers than an image has"));
        }
        if self.documents.len() > MOST_DOCUMENTS {
            return Err(NameError::Malformed("more documents than an image has"));
        }
        // From the target by way of the manifest down to the configuration; or there is no manifest, and they are one.
        let in_order = match self.documents.as_slice() {
            [] => self.target == self.manifest,
            [above @ .., _] => above.first() == Some(&self.target) && above.last() == Some(&self.manifest),
        };
        if in_order { Ok(()) } else { Err(NameError::Malformed("its documents are not those of an image")) }
    }
}

/// A reference without its tag and its digest: the registry and the repository.
pub fn repository(reference: &str) -> &str {
    let name = reference.split('@').next().unwrap_or_default();
    // What follows a colon in front of a slash is a port.
    let tag = name.rfind(':').filter(|at| !name[*at..].contains('/'));
    &name[..tag.unwrap_or(name.len())]
}

/// Under what all publishers' objects are that name an image of this platform so.
pub(super) fn objects(reference: &str, platform: &str) -> String {
    let hash = blake3::Hash::from_bytes(place(reference, platform)).to_hex();
    format!("{PREFIX}/{}/{hash}", &hash[..2])
}

/// The hash by which the objects are called that name an image of this platform so.
pub fn place(reference: &str, platform: &str) -> [u8; 32] {
    *blake3::hash(&[reference.as_bytes(), &[0], platform.as_bytes()].concat()).as_bytes()
}

fn one(bytes: &[u8]) -> Result<Digest, NameError> {
    let bytes = <[u8; 32]>::try_from(bytes).map_err(|_| NameError::Malformed("a digest is not 32 bytes"))?;
    Ok(digest_of(&bytes))
}

fn several(bytes: &[u8]) -> Result<Vec<Digest>, NameError> {
    match bytes.as_chunks::<32>() {
        (digests, []) => Ok(digests.iter().map(digest_of).collect()),
        _ => Err(NameError::Malformed("a digest is not 32 bytes")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> ImageName {
        ImageName {
            reference: "registry.example/app:1".into(),
            platform: "linux/amd64".into(),
            target_media_type: "application/vnd.oci.image.index.v1+json".into(),
            target: digest_of(&[2; 32]),
            media_type: "application/vnd.oci.image.manifest.v1+json".into(),
            manifest: digest_of(&[3; 32]),
            documents: vec![digest_of(&[2; 32]), digest_of(&[3; 32]), digest_of(&[6; 32])],
            chains: vec![ChainId(digest_of(&[4; 32])), ChainId(digest_of(&[5; 32]))],
        }
    }

    #[test]
    fn a_name_says_what_was_signed() {
        let key = PublisherKey::from_seed([1; 32]);
        let bytes = image().encode(&key).unwrap();
        let read = ImageName::decode(&bytes, &image().object(key.public())).unwrap();
        assert_eq!(read, (image(), *key.public()));
        let longest = ImageName {
            reference: "r".repeat(LONGEST_TEXT),
            platform: "p".repeat(LONGEST_TEXT),
            media_type: "m".repeat(LONGEST_TEXT),
            target_media_type: "m".repeat(LONGEST_TEXT),
            chains: vec![image().chains[0].clone(); MOST_LAYERS],
            ..image()
        };
        assert!(u64::try_from(longest.encode(&key).unwrap().len()).unwrap() < LONGEST);
    }

    #[test]
    fn no_byte_of_a_name_can_be_changed() {
        let key = PublisherKey::from_seed([1; 32]);
        let bytes = image().encode(&key).unwrap();
        let name = image().object(key.public());
        for at in 0..bytes.len() {
            let mut wrong = bytes.clone();
            wrong[at] ^= 1 << (at % 8);
            assert!(ImageName::decode(&wrong, &name).is_err(), "byte {at}");
            assert!(ImageName::decode(&bytes[..at], &name).is_err(), "cut at {at}");
        }
        let elsewhere = ImageName { reference: "registry.example/app:2".into(), ..image() };
        let replayed = ImageName::decode(&bytes, &elsewhere.object(key.public()));
        assert_eq!(replayed, Err(NameError::Forged { publisher: *key.public() }));
    }

    #[test]
    fn a_name_that_no_terminal_should_show_is_refused() {
        let key = PublisherKey::from_seed([1; 32]);
        for bad in ["", "a\x1b[2J", "a\nb", &"a".repeat(LONGEST_TEXT + 1)] {
            let bad = ImageName { reference: bad.into(), ..image() };
            assert!(matches!(bad.encode(&key), Err(NameError::Malformed(_))));
        }
        let bad = ImageName { chains: vec![image().chains[0].clone(); MOST_LAYERS + 1], ..image() };
        assert!(matches!(bad.encode(&key), Err(NameError::Malformed(_))));
    }

    #[test]
    fn documents_lead_from_the_target_to_the_configuration() {
        let key = PublisherKey::from_seed([1; 32]);
        let digests = |bytes: &[u8]| bytes.iter().map(|byte| digest_of(&[*byte; 32])).collect::<Vec<_>>();
        let with = |documents: &[u8]| ImageName { documents: digests(documents), ..image() }.encode(&key);
        // An index in an index; the target is 2, the manifest 3.
        assert!(with(&[2, 9, 3, 6]).is_ok());
        for wrong in [&[][..], &[2], &[2, 3], &[3, 6], &[2, 6, 3], &[9, 3, 6], &[2, 9, 9, 9, 9, 9, 9, 3, 6]] {
            assert!(matches!(with(wrong), Err(NameError::Malformed(_))), "{wrong:?}");
        }
        let direct = ImageName { target: digest_of(&[3; 32]), ..image() };
        assert!(ImageName { documents: digests(&[3, 6]), ..direct.clone() }.encode(&key).is_ok());
        // A docker archive has no manifest: nothing is kept.
        assert!(ImageName { documents: Vec::new(), ..direct }.encode(&key).is_ok());
    }

    #[test]
    fn a_reference_begins_with_its_repository() {
        for (reference, expected) in [
            ("docker.io/library/alpine:3.22", "docker.io/library/alpine"),
            ("r.example:5000/app", "r.example:5000/app"),
            ("r.example:5000/app:1@sha256:00", "r.example:5000/app"),
            ("r.example/app@sha256:00", "r.example/app"),
            ("", ""),
        ] {
            assert_eq!(repository(reference), expected);
        }
    }

    #[test]
    fn other_formats_are_told_apart() {
        let key = PublisherKey::from_seed([1; 32]);
        let bytes = image().encode(&key).unwrap();
        for (format, expected) in [
            (0, NameError::Malformed("no format version")),
            (1, NameError::OldFormat { found: 1 }),
            (3, NameError::UnknownFormat { found: 3 }),
        ] {
            let mut message = wire::ImageName::decode(bytes.as_slice()).unwrap();
            message.format = format;
            let read = ImageName::decode(&message.encode_to_vec(), &image().object(key.public()));
            assert_eq!(read, Err(expected));
        }
    }
}
