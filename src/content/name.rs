//! Names of images: which images the store can give whole.
//!
//! **What.** An [`ImageName`] says that every layer of an image is published for a platform. It is written after all of them,
//! so that they are there; a ref may be of another publisher that this one trusts, and whoever reads the name has to trust it, too.
//! Nothing on the way of a pull reads it; it is for tools that list what a store has.
//!
//! **Format.** The message `ImageName` of `proto/speedy/v1/layer.proto`, version 1, canonical, in the object
//! `images/<2 hex>/<hash>/<key id>`, where the hash is the BLAKE3-256 of reference, a zero byte and platform. Signed is
//!
//! ```text
//! "speedy image name v1" 00 | the message's bytes without the signature
//! ```
//!
//! A publisher that publishes the same name again (a tag that moved) replaces its own object and nobody else's.

use std::fmt;

use prost::Message;

use super::trust::{PublicKey, PublisherKey};
use super::{digest_of, raw};
use crate::containerd::manifest::{Descriptor, Layer, Platform};
use crate::oci::{ChainId, Digest};
use crate::proto::speedy::v1 as wire;

const FORMAT: u32 = 1;
const CONTEXT: &str = "speedy image name v1";
/// Under what all names are.
pub(super) const PREFIX: &str = "images";
/// The longest text of a reference, a platform or a media type, in bytes.
const LONGEST_TEXT: usize = 1024;
/// The most layers of an image. overlayfs takes some 500.
const MOST_LAYERS: usize = 1024;
/// More than any name has, in bytes.
pub(super) const LONGEST: u64 = 64 * 1024;

/// An image of which every layer is published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageName {
    /// Its full reference, such as `docker.io/library/alpine:3.22`.
    pub reference: String,
    /// For which platform, such as `linux/amd64`.
    pub platform: String,
    /// The media type of its manifest; empty where there is none (a docker archive).
    pub media_type: String,
    /// The digest of its manifest, or of its configuration where there is no manifest.
    pub manifest: Digest,
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
    /// The name of an image with these layers, from the bottom up.
    pub fn of(reference: &str, platform: &Platform, manifest: &Descriptor, layers: &[Layer]) -> ImageName {
        ImageName {
            reference: reference.to_owned(),
            platform: platform.to_string(),
            media_type: manifest.media_type.clone(),
            manifest: manifest.digest.clone(),
            chains: layers.iter().map(|layer| layer.chain.clone()).collect(),
        }
    }

    /// The name of the object in which this publisher speaks of it.
    pub fn object(&self, publisher: &PublicKey) -> String {
        format!("{}/{}", self.objects(), publisher.id())
    }

    /// Under what all publishers' objects of it are.
    pub(super) fn objects(&self) -> String {
        let hash =
            blake3::hash(&[self.reference.as_bytes(), &[0], self.platform.as_bytes()].concat()).to_hex();
        format!("{PREFIX}/{}/{hash}", &hash[..2])
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
        if message.format != FORMAT {
            return Err(NameError::UnknownFormat { found: message.format });
        }
        if message.encode_to_vec() != bytes {
            return Err(NameError::Malformed("not in canonical form"));
        }
        let publisher = PublicKey::from_bytes(&message.key).map_err(|_| NameError::Malformed("no key"))?;
        let signature = std::mem::take(&mut message.signature);
        if !publisher.signed(CONTEXT, &message.encode_to_vec(), &signature) {
            return Err(NameError::Forged { publisher });
        }
        let (chains, rest) = message.chain_ids.as_chunks::<32>();
        let manifest = <[u8; 32]>::try_from(message.manifest.as_slice());
        let (Ok(manifest), []) = (manifest, rest) else {
            return Err(NameError::Malformed("a digest is not 32 bytes"));
        };
        let image = ImageName {
            manifest: digest_of(&manifest),
            chains: chains.iter().map(|chain| ChainId(digest_of(chain))).collect(),
            reference: message.reference,
            platform: message.platform,
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
        if !good(&self.media_type) {
            return Err(NameError::Malformed("not a printable media type"));
        }
        if self.chains.len() > MOST_LAYERS {
            return Err(NameError::Malformed("more layers than an image has"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> ImageName {
        ImageName {
            reference: "registry.example/app:1".into(),
            platform: "linux/amd64".into(),
            media_type: "application/vnd.oci.image.manifest.v1+json".into(),
            manifest: digest_of(&[3; 32]),
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
}
