//! What a store holds and what its objects are called: the format of a store.
//!
//! ```text
//! speedy.json                       format version and parameters of the store (Description)
//! chunks/<2 hex>/<64 hex>           a chunk in its stored form; the name is its id, the 2 digits its first byte
//! indexes/<2 hex>/<64 hex>          a layer index; the name is the BLAKE3-256 of its bytes
//! refs/<2 hex>/<64 hex>/<16 hex>    chain ID → index, signed; the last part names the publisher's key
//! images/<2 hex>/<64 hex>/<16 hex>  an image's name, signed; written after the refs of all its layers
//! traces/<2 hex>/<64 hex>/<16 hex>  chain ID → what a start read, a hint; the last part names the node's key
//! ```
//!
//! `speedy.json` is written by whoever writes to the store first, always with the same bytes, so that two who come at once do
//! not harm each other. `format` counts the changes that an older reader must not ignore. The other fields are parameters:
//! a reader works with any, a writer only with its own, so that the same layer always makes the same chunks. Fields that a
//! version does not know are ignored.

use serde::{Deserialize, Serialize};

use crate::oci::ChainId;

/// The store's own description.
pub const STORE: &str = "speedy.json";

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
    Cutting { block: 4096, min: 64 << 10, average: 256 << 10, max: 1 << 20, hole: 64 << 10 };

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

/// Under what the refs of a chain are.
pub fn refs(chain: &ChainId) -> String {
    of_chain("refs", chain)
}

/// Under what the traces of a chain are.
pub fn traces(chain: &ChainId) -> String {
    of_chain("traces", chain)
}

fn of_chain(kind: &str, chain: &ChainId) -> String {
    let hex = chain.0.as_str().trim_start_matches("sha256:");
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
        let chain = ChainId(crate::oci::Digest::parse(&format!("sha256:{hex}")).unwrap());
        assert_eq!(refs(&chain), format!("refs/64/{hex}"));
        assert_eq!(traces(&chain), format!("traces/64/{hex}"));
    }

    /// A change here is a change of the format: bump [`FORMAT`].
    #[test]
    fn the_description_is_always_the_same_bytes() {
        let json = r#"{
  "format": 1,
  "cutting": {
    "block": 4096,
    "min": 65536,
    "average": 262144,
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
