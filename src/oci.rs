//! The names OCI gives to content: digests, and the chain ID that names a stack of layers.
//!
//! Pure values; used by every tier above. A [`Digest`] can only be made by parsing, so whoever holds one holds a
//! well-formed `sha256:<64 lower-case hex digits>` and may use it as an object or file name part.
//!
//! Source: the OCI image specification, "Digests" (descriptor.md) and "Layer ChainID" (config.md).

use std::fmt;
use std::sync::Arc;

/// A SHA-256 digest in OCI's text form. Only SHA-256 is accepted: every digest containerd's unpacker computes is one.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(Arc<str>);

/// What is wrong with a text that should have been a digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a digest: expected sha256: and 64 lower-case hexadecimal digits")]
pub struct DigestError;

impl Digest {
    /// Parses `sha256:<64 lower-case hex digits>` and nothing else.
    pub fn parse(text: &str) -> Result<Digest, DigestError> {
        let hex = text.strip_prefix("sha256:").ok_or(DigestError)?;
        let well_formed = hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if well_formed { Ok(Digest(text.into())) } else { Err(DigestError) }
    }

    /// The text form, `sha256:...`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Names a stack of layers, from the bottom up to one layer: OCI's ChainID.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChainId(pub Digest);

impl fmt::Display for ChainId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for ChainId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The digest of a layer's uncompressed tar: OCI's DiffID.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DiffId(pub Digest);

impl fmt::Display for DiffId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for DiffId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl ChainId {
    /// The chain of `diff` put on `below` (OCI image specification, "Layer ChainID").
    pub fn of(below: Option<&ChainId>, diff: &DiffId) -> ChainId {
        match below {
            None => ChainId(diff.0.clone()),
            Some(below) => {
                let mut hasher = Sha256::default();
                hasher.update(format!("{below} {diff}").as_bytes());
                ChainId(hasher.digest())
            }
        }
    }
}

/// SHA-256 of a stream, for what OCI names by it.
#[derive(Clone)]
pub struct Sha256(aws_lc_rs::digest::Context);

impl Default for Sha256 {
    fn default() -> Sha256 {
        Sha256(aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256))
    }
}

impl fmt::Debug for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sha256")
    }
}

impl Sha256 {
    /// The next bytes of the stream.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of all bytes.
    pub fn digest(self) -> Digest {
        let mut text = String::with_capacity(71);
        text.push_str("sha256:");
        for byte in self.0.finish().as_ref() {
            text.push(char::from_digit(u32::from(byte >> 4), 16).unwrap_or('0'));
            text.push(char::from_digit(u32::from(byte & 15), 16).unwrap_or('0'));
        }
        Digest(text.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_canonical_form_is_a_digest() {
        let hex = "0123456789abcdef".repeat(4);
        assert!(Digest::parse(&format!("sha256:{hex}")).is_ok());
        for bad in [
            String::new(),
            "sha256:".into(),
            hex.clone(),
            format!("sha256:{}", hex.to_uppercase()),
            format!("sha256:{hex}0"),
            format!("sha512:{hex}"),
            format!("sha256:{hex}\n"),
            format!("sha256:../../{}", &hex[6..]),
        ] {
            assert_eq!(Digest::parse(&bad), Err(DigestError), "{bad:?}");
        }
    }

    #[test]
    fn chains_are_those_of_the_specification() {
        let mut hasher = Sha256::default();
        hasher.update(b"abc");
        let abc = hasher.digest();
        assert_eq!(abc.as_str(), "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        let first = ChainId::of(None, &DiffId(abc.clone()));
        assert_eq!(first.0, abc);
        let second = ChainId::of(Some(&first), &DiffId(abc));
        // printf 'sha256:ba78... sha256:ba78...' | sha256sum
        assert_eq!(
            second.to_string(),
            "sha256:95bbd0d1bf2f6edd073d53e1caa6d4b4778912f6b19bad7a45d56c58e23533bd"
        );
    }
}
