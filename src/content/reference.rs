//! Refs: what a publisher says about a chain.
//!
//! **What.** A [`Ref`] says that the layer which makes a chain is the one with this index, signed by a publisher. Its object is
//! `refs/<2 hex>/<chain>/<key id>`: each publisher has its own, so none can take another's away.
//!
//! **Format.** The message `Ref` of `proto/speedy/v1/layer.proto`, version 1, canonical. Signed is
//!
//! ```text
//! "speedy ref v1" 00 | SHA-256 of the chain, 32 bytes | BLAKE3-256 of the index, 32 bytes
//! ```
//!
//! The index is pinned by its digest and pins every chunk by its id, so this one signature is one over the index and over every
//! byte of the image: indexes and chunks carry no signatures of their own.
//!
//! **Invariants.** A [`Ref`] that was decoded is for the chain that was asked for, under the name it has, and signed by the
//! publisher it names. Whether that publisher is believed is the caller's question ([`super::trust::Trust`]).

use prost::Message;

use super::index::IndexDigest;
use super::raw;
use super::trust::{PublicKey, PublisherKey};
use crate::object::layout;
use crate::oci::ChainId;
use crate::proto::speedy::v1 as wire;

/// The version that is written, and the only one that is read.
const FORMAT: u32 = 1;
/// Begins what is signed; names the version.
const CONTEXT: &str = "speedy ref v1";
/// More than any ref has, in bytes.
pub(super) const LONGEST: u64 = 1024;

/// Why an object is no ref.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RefError {
    /// Written by a newer Speedy.
    #[error("format version {found}, this speedy knows {FORMAT}: upgrade it")]
    UnknownFormat {
        /// Its version.
        found: u32,
    },
    /// Bytes that no Speedy wrote.
    #[error("malformed")]
    Malformed,
    /// A ref that was made for something else, or that another publisher made.
    #[error("it belongs to another name")]
    Misplaced,
    /// The signature is not this publisher's over this.
    #[error("the signature is not that of {publisher}")]
    Forged {
        /// Whom it names.
        publisher: PublicKey,
    },
}

/// What a publisher says about a chain; the signature has been checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ref {
    /// The index of the chain's uppermost layer.
    pub index: IndexDigest,
    /// Who says so.
    pub publisher: PublicKey,
}

/// The name of the object in which the publisher with this key speaks about this chain.
pub fn name(chain: &ChainId, publisher: &PublicKey) -> String {
    format!("{}/{}", layout::refs(chain), publisher.id())
}

/// The bytes of the ref by which the owner of `key` says that `index` makes `chain`; always the same ones.
pub fn encode(chain: &ChainId, index: IndexDigest, key: &PublisherKey) -> Vec<u8> {
    let message = wire::Ref {
        format: FORMAT,
        chain_id: raw(&chain.0).to_vec(),
        index: index.as_bytes().to_vec(),
        key: key.public().as_bytes().to_vec(),
        signature: key.sign(CONTEXT, &signed(chain, &index)).to_vec(),
    };
    message.encode_to_vec()
}

/// What the object `name` says about `chain`.
pub fn decode(bytes: &[u8], chain: &ChainId, name: &str) -> Result<Ref, RefError> {
    let message = wire::Ref::decode(bytes).map_err(|_| RefError::Malformed)?;
    match message.format {
        FORMAT => {}
        // An empty object is a message, too: one of no version.
        0 => return Err(RefError::Malformed),
        found => return Err(RefError::UnknownFormat { found }),
    }
    if message.encode_to_vec() != bytes {
        return Err(RefError::Malformed);
    }
    let publisher = PublicKey::from_bytes(&message.key).map_err(|_| RefError::Malformed)?;
    let index = <[u8; 32]>::try_from(message.index.as_slice()).map_err(|_| RefError::Malformed)?;
    let index = IndexDigest::from_bytes(index);
    if message.chain_id != raw(&chain.0) || name != self::name(chain, &publisher) {
        return Err(RefError::Misplaced);
    }
    if !publisher.signed(CONTEXT, &signed(chain, &index), &message.signature) {
        return Err(RefError::Forged { publisher });
    }
    Ok(Ref { index, publisher })
}

fn signed(chain: &ChainId, index: &IndexDigest) -> Vec<u8> {
    [raw(&chain.0), *index.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::digest_of;

    fn chain(byte: u8) -> ChainId {
        ChainId(digest_of(&[byte; 32]))
    }

    #[test]
    fn a_ref_says_what_was_signed() {
        let (key, index) = (PublisherKey::from_seed([1; 32]), IndexDigest::of(b"index"));
        let bytes = encode(&chain(1), index, &key);
        assert!(u64::try_from(bytes.len()).unwrap() < LONGEST);
        let name = name(&chain(1), key.public());
        assert_eq!(name.len(), "refs/".len() + 3 + 65 + 16);
        let read = decode(&bytes, &chain(1), &name).unwrap();
        assert_eq!(read, Ref { index, publisher: *key.public() });
    }

    #[test]
    fn a_ref_is_good_in_its_own_place_only() {
        let (key, other) = (PublisherKey::from_seed([1; 32]), PublisherKey::from_seed([2; 32]));
        let bytes = encode(&chain(1), IndexDigest::of(b"index"), &key);
        let replayed = decode(&bytes, &chain(2), &name(&chain(2), key.public()));
        assert_eq!(replayed, Err(RefError::Misplaced));
        assert_eq!(decode(&bytes, &chain(1), &name(&chain(1), other.public())), Err(RefError::Misplaced));
    }

    #[test]
    fn no_byte_of_a_ref_can_be_changed() {
        let key = PublisherKey::from_seed([1; 32]);
        let bytes = encode(&chain(1), IndexDigest::of(b"index"), &key);
        let name = name(&chain(1), key.public());
        for at in 0..bytes.len() {
            let mut wrong = bytes.clone();
            wrong[at] ^= 1 << (at % 8);
            assert!(decode(&wrong, &chain(1), &name).is_err(), "byte {at}");
            // Of no version but this one, not even where nothing is left.
            let cut = decode(&bytes[..at], &chain(1), &name).unwrap_err();
            assert!(!matches!(cut, RefError::UnknownFormat { .. }), "cut at {at}");
        }
        // A field that this version does not know, and the same field twice.
        assert_eq!(decode(&[&bytes[..], &[0x30, 1]].concat(), &chain(1), &name), Err(RefError::Malformed));
        assert_eq!(decode(&[&bytes[..], &[0x08, 1]].concat(), &chain(1), &name), Err(RefError::Malformed));
        let newer = [&[0x08, 2], &bytes[2..]].concat();
        assert_eq!(decode(&newer, &chain(1), &name), Err(RefError::UnknownFormat { found: 2 }));
    }

    #[test]
    fn a_signature_for_another_index_is_forged() {
        let key = PublisherKey::from_seed([1; 32]);
        let mut message = wire::Ref::decode(&encode(&chain(1), IndexDigest::of(b"a"), &key)[..]).unwrap();
        message.index = IndexDigest::of(b"b").as_bytes().to_vec();
        let decoded = decode(&message.encode_to_vec(), &chain(1), &name(&chain(1), key.public()));
        assert_eq!(decoded, Err(RefError::Forged { publisher: *key.public() }));
    }
}
