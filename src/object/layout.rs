//! What a store holds and what its objects are called: the format of a store.
//!
//! ```text
//! speedy.json                       format version and parameters of the store (Description)
//! chunks/<2 hex>/<64 hex>           a chunk in its stored form; the name is its id, the 2 digits its first byte
//! indexes/<2 hex>/<64 hex>          a layer index; the name is the BLAKE3-256 of its bytes
//! refs/<2 hex>/<64 hex>/<16 hex>    chain ID → index, signed; the last part names the publisher's key
//! documents/<2 hex>/<64 hex>        an image's index, manifest or configuration as the registry gave it; the name is its SHA-256
//! images/<2 hex>/<64 hex>/<16 hex>  an image's name, signed; written after the refs of all its layers and its documents
//! traces/<2 hex>/<64 hex>/<16 hex>  chain ID → what a start read, a hint; the last part names the node's key
//! uses/<2 hex>/<64 hex>/<16 hex>    empty; renewed by a node that uses the image whose name has the same hash
//! collection.json                   renewed while a collection deletes (`content::notice`)
//! ```
//!
//! `speedy.json` is written by whoever writes to the store first, always with the same bytes, so that two who come at once do
//! not harm each other. `format` counts the changes that an older reader must not ignore. The other fields are parameters:
//! a reader works with any, a writer only with its own, so that the same layer always makes the same chunks. Fields that a
//! version does not know are ignored.

use serde::{Deserialize, Serialize};

use crate::oci::{ChainId, Digest};

/// The store's own description.
pub const STORE: &str = "speedy.json";

/// What a collection renews while it deletes.
pub const COLLECTION: &str = "collection.json";

/// The only format there is.
pub const FORMAT: u32 = 1;

/// Where layer images are cut, in bytes. `chunk::chunker` says how these are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cutting {
    /// Chunks begin and end between blocks of this size.
    pub block: u32,
    /// No chunk is shorter, but before a hole and at the end of a region.
    pub min: u32,
    /// What is aimed at.
    pub average: u32,
    /// No chunk is longer.
    pub max: u32,
    /// Zeros of this length and more belong to no chunk.
    pub hole: u32,
}

/// How every layer of a store of [`FORMAT`] is cut.
pub const CUTTING: Cutting =
    Cutting { block: 4096, min: 128 << 10, average: 512 << 10, max: 1 << 20, hole: 64 << 10 };

/// What `speedy.json` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// [`FORMAT`].
    pub format: u32,
    /// How layers are cut.
    pub cutting: Cutting,
    /// The hash that names chunks and indexes: `blake3`.
    pub hash: String,
    /// How chunks are compressed: `zstd`.
    pub compression: String,
}

impl Description {
    /// Of a store that this version writes to.
    pub fn own() -> Description {
        Description {
            format: FORMAT,
            cutting: CUTTING,
            hash: "blake3".to_owned(),
            compression: "zstd".to_owned(),
        }
    }

    /// As the object holds it: always the same bytes.
    pub fn to_json(&self) -> Vec<u8> {
        let mut json = serde_json::to_vec_pretty(self).expect("numbers and strings have a JSON form");
        json.push(b'\n');
        json
    }
}

/// The kinds of objects of which a store has many: `<prefix>/<2 hex>/<64 hex>`, and for some `/<16 hex>` behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Names of images.
    Name,
    /// Refs of chains.
    Ref,
    /// Starts of images that were recorded.
    Trace,
    /// Uses of images.
    Use,
    /// Manifests and configurations.
    Document,
    /// Layer indexes.
    Index,
    /// Chunks.
    Chunk,
}

impl Kind {
    /// All of them, in the order in which a collection deletes: what names before what is named.
    pub const ALL: [Kind; 7] =
        [Kind::Name, Kind::Ref, Kind::Trace, Kind::Use, Kind::Document, Kind::Index, Kind::Chunk];

    /// Under what they all are.
    pub fn prefix(self) -> &'static str {
        match self {
            Kind::Name => "images",
            Kind::Ref => "refs",
            Kind::Trace => "traces",
            Kind::Use => "uses",
            Kind::Document => "documents",
            Kind::Index => "indexes",
            Kind::Chunk => "chunks",
        }
    }

    /// Whether each node has its own object, named by its key.
    pub fn has_key(self) -> bool {
        matches!(self, Kind::Name | Kind::Ref | Kind::Trace | Kind::Use)
    }

    /// The name of an object of this kind.
    pub fn object(self, place: &Place) -> String {
        let name = hashed(self.prefix(), &place.hash);
        if self.has_key() { format!("{name}/{:016x}", place.key) } else { name }
    }

    /// Where the object of this kind with this name is; `None` for a name that is not exactly such a one.
    pub fn place(self, name: &str) -> Option<Place> {
        let (hashed, key) = match self.has_key() {
            true => name.rsplit_once('/').map(|(hashed, key)| (hashed, u64::from_str_radix(key, 16).ok()))?,
            false => (name, Some(0)),
        };
        let place = Place { hash: hash_of(hashed)?, key: key? };
        (self.object(&place) == name).then_some(place)
    }
}

/// What tells an object from the others of its kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// The hash in its name.
    pub hash: [u8; 32],
    /// The id of a node's key; 0 for kinds without.
    pub key: u64,
}

/// The name of a chunk.
pub fn chunk(id: &[u8; 32]) -> String {
    hashed("chunks", id)
}

/// Under what the chunks are whose ids begin with this byte.
pub fn chunks(first: u8) -> String {
    format!("chunks/{first:02x}")
}

/// The name of a layer index.
pub fn index(digest: &[u8; 32]) -> String {
    hashed("indexes", digest)
}

/// The name of a document.
pub fn document(digest: &Digest) -> String {
    of_digest("documents", digest)
}

/// Under what the refs of a chain are.
pub fn refs(chain: &ChainId) -> String {
    of_digest("refs", &chain.0)
}

/// Under what the traces of a chain are.
pub fn traces(chain: &ChainId) -> String {
    of_digest("traces", &chain.0)
}

fn of_digest(kind: &str, digest: &Digest) -> String {
    let hex = digest.as_str().trim_start_matches("sha256:");
    format!("{kind}/{}/{hex}", &hex[..2])
}

/// The 32 bytes that the last part of a name of a chunk or an index stands for, if it is one.
pub fn hash_of(name: &str) -> Option<[u8; 32]> {
    let hex = name.rsplit('/').next()?;
    let canonical = hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if canonical { blake3::Hash::from_hex(hex).ok().map(|hash| *hash.as_bytes()) } else { None }
}

fn hashed(kind: &str, hash: &[u8; 32]) -> String {
    let hex = blake3::Hash::from_bytes(*hash).to_hex();
    format!("{kind}/{}/{hex}", &hex[..2])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_format() {
        let hash = *blake3::hash(b"abc").as_bytes();
        let hex = "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85";
        assert_eq!(chunk(&hash), format!("chunks/64/{hex}"));
        assert_eq!(index(&hash), format!("indexes/64/{hex}"));
        assert_eq!(chunks(0x0a), "chunks/0a");
        assert_eq!(hash_of(&chunk(&hash)), Some(hash));
        for other in ["chunks/64", "chunks/64/zz", "", &format!("chunks/64/{}", hex.to_uppercase())] {
            assert_eq!(hash_of(other), None, "{other}");
        }
        let digest = Digest::parse(&format!("sha256:{hex}")).unwrap();
        assert_eq!(document(&digest), format!("documents/64/{hex}"));
        let chain = ChainId(digest);
        assert_eq!(refs(&chain), format!("refs/64/{hex}"));
        assert_eq!(traces(&chain), format!("traces/64/{hex}"));
    }

    #[test]
    fn a_name_that_is_not_exactly_one_of_its_kind_has_no_place() {
        let place = Place { hash: *blake3::hash(b"abc").as_bytes(), key: 0xfe };
        for kind in Kind::ALL {
            let key = if kind.has_key() { place.key } else { 0 };
            let name = kind.object(&place);
            assert_eq!(kind.place(&name), Some(Place { key, ..place }), "{name}");
            let others = [
                name.to_uppercase(),
                format!("{name}/x"),
                format!("{name}0"),
                name.replacen("/64/", "/65/", 1),
                name.replacen(kind.prefix(), "other", 1),
                format!("{name}#1"),
                format!("/{name}"),
                kind.prefix().to_owned(),
                String::new(),
            ];
            for other in others {
                assert_eq!(kind.place(&other), None, "{other}");
            }
        }
        assert_eq!(Kind::Ref.place(&format!("refs/64/{}/+00000000000000f", "64".repeat(32))), None);
    }

    /// A change here is a change of the format: bump [`FORMAT`].
    #[test]
    fn the_description_is_always_the_same_bytes() {
        let json = r#"{
  "format": 1,
  "cutting": {
    "block": 4096,
    "min": 131072,
    "average": 524288,
    "max": 1048576,
    "hole": 65536
  },
  "hash": "blake3",
  "compression": "zstd"
}
"#;
        assert_eq!(String::from_utf8(Description::own().to_json()).unwrap(), json);
    }
}
