//! What the labels of a Prepare ask of the layer source.
//!
//! While it unpacks an image, containerd prepares each layer's snapshot with the chain ID it is going to have. If the source
//! has that layer, the answer is *already exists* and containerd fetches nothing. Labels are hostile input: only
//! [`LABEL_REF`] is always written by containerd itself, everything else under its prefix may come from the image's author.
//! They are parsed once, here, into a [`LayerRequest`] or nothing; nothing is never an error, just an ordinary pull.
//!
//! Source: containerd `core/unpack` (who sets them), `core/metadata/snapshot.go` (what the answer must look like).

use super::{Info, Key, Kind, Labels, SnapshotError};
use crate::oci::{ChainId, Digest};
use crate::sys::decimal;

/// The chain ID the snapshot is going to have. On extraction snapshots only.
pub const LABEL_REF: &str = "containerd.io/snapshot.ref";
/// The chain ID of the layer below; set by containerd 2.3 and newer for every layer but the first.
pub const LABEL_PARENT_CHAIN: &str = "containerd.io/snapshot/parent-chain-id";

/// How many bytes a container may have at most; set by clients of containerd 2.4 and newer.
pub const LABEL_MAX_SIZE: &str = "containerd.io/snapshot/max-size";

/// A layer that containerd is about to fetch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerRequest {
    /// The stack of layers up to and including this one.
    pub chain: ChainId,
    /// How to say that it need not be fetched.
    pub answer: HitAnswer,
}

/// How containerd is told that a layer need not be fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HitAnswer {
    /// *Already exists*, and there is a committed snapshot on the request's parent.
    Committed,
    /// *Staged*: an active snapshot that has its content, with read-only mounts; containerd commits it on its parent. For layers
    /// that are prepared away from their parent (see [`is_detached`]), where *already exists* would cut the chain.
    Staged,
}

/// The layer that a Prepare with these labels on this parent asks for.
pub fn layer_request(labels: &Labels, parent: Option<&Key>) -> Option<LayerRequest> {
    let chain = ChainId(Digest::parse(labels.get(LABEL_REF)?).ok()?);
    let answer = if is_detached(labels, parent) { HitAnswer::Staged } else { HitAnswer::Committed };
    Some(LayerRequest { chain, answer })
}

/// Whether this is a layer with something below it that is only told at Commit.
///
/// In parallel unpack (capability `rebase`) containerd prepares every layer without a parent and names it at Commit. For the first
/// layer of an image the label is the author's to forge. That gives its extraction an overlay without a lowerdir, which the
/// applier handles as well, or a staged answer, which containerd commits as well: harmless.
pub fn is_detached(labels: &Labels, parent: Option<&Key>) -> bool {
    let below = labels.get(LABEL_PARENT_CHAIN).is_some_and(|chain| Digest::parse(chain).is_ok());
    parent.is_none() && labels.contains_key(LABEL_REF) && below
}

/// The chain ID that a committed snapshot of an image's layer has: its ref, or else its name, as clients that set no ref give it.
pub fn chain_of(labels: &Labels, name: &Key) -> Option<ChainId> {
    let text = labels.get(LABEL_REF).map_or_else(|| client_key(name.as_str()), String::as_str);
    Digest::parse(text).ok().map(ChainId)
}

/// A key or name as the client gave it: containerd puts a namespace and a number before it.
pub fn client_key(key: &str) -> &str {
    let mut parts = key.splitn(3, '/');
    match (parts.next(), parts.next(), parts.next()) {
        (Some(_), Some(number), Some(rest)) if number.bytes().all(|b| b.is_ascii_digit()) => rest,
        _ => key,
    }
}

/// What containerd calls the active snapshots of an image that it unpacks.
pub const EXTRACT: &str = "extract-";

/// The size that the labels of a snapshot ask for, if they may: those of an extraction are whatever the image's author wrote.
pub fn size_of(info: &Info) -> Result<Option<u64>, SnapshotError> {
    let is_layer = info.labels.contains_key(LABEL_REF) || client_key(info.name.as_str()).starts_with(EXTRACT);
    match info.labels.get(LABEL_MAX_SIZE).filter(|_| !is_layer && info.kind == Kind::Active) {
        None => Ok(None),
        Some(text) => match decimal::parse(text).filter(|size| *size > 0) {
            Some(size) => Ok(Some(size)),
            None => {
                let problem = format!("{LABEL_MAX_SIZE} is not a number of bytes");
                Err(SnapshotError::InvalidLabels { problem })
            }
        },
    }
}

/// The name of the committed snapshot made for a hit. No client's key can look so: containerd prefixes keys with a
/// namespace, and a namespace starts with a letter or digit.
pub fn committed_name(serial: u64, chain: &ChainId) -> String {
    format!("@layer/{serial}/{chain}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(digit: char) -> String {
        format!("sha256:{}", String::from(digit).repeat(64))
    }

    #[test]
    fn a_chain_id_is_a_request() {
        let labels = Labels::from([(LABEL_REF.into(), chain('a'))]);
        assert_eq!(layer_request(&labels, None).unwrap().chain.to_string(), chain('a'));
    }

    #[test]
    fn a_forged_ref_is_an_ordinary_pull() {
        for forged in ["", "latest", "sha256:../../../etc/passwd", "sha256:A", "../x\n", &"a".repeat(4000)] {
            let labels = Labels::from([(LABEL_REF.into(), forged.into())]);
            assert_eq!(layer_request(&labels, None), None, "{forged:?}");
        }
    }

    #[test]
    fn a_layer_prepared_away_from_its_parent_is_staged_not_committed() {
        let labels = Labels::from([(LABEL_REF.into(), chain('a')), (LABEL_PARENT_CHAIN.into(), chain('b'))]);
        assert!(is_detached(&labels, None));
        assert_eq!(layer_request(&labels, None).unwrap().answer, HitAnswer::Staged);
        let parent = Key::new("p").unwrap();
        assert!(!is_detached(&labels, Some(&parent)));
        assert_eq!(layer_request(&labels, Some(&parent)).unwrap().answer, HitAnswer::Committed);
    }

    #[test]
    fn a_size_is_obeyed_on_containers_only() {
        let info = |key: &str, kind: Kind, label: &str| Info {
            name: Key::new(key).unwrap(),
            parent: None,
            kind,
            created: crate::snapshot::Timestamp(0),
            updated: crate::snapshot::Timestamp(0),
            labels: Labels::from([(LABEL_MAX_SIZE.into(), label.into())]),
        };
        assert_eq!(size_of(&info("default/1/box", Kind::Active, "1048576")).unwrap(), Some(1 << 20));
        assert_eq!(size_of(&info("default/1/extract-1 x", Kind::Active, "1048576")).unwrap(), None);
        assert_eq!(size_of(&info("default/1/box", Kind::View, "1048576")).unwrap(), None);
        for bad in ["", "0", "-1", "10GiB", "0x10", "99999999999999999999"] {
            assert!(size_of(&info("default/1/box", Kind::Active, bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_key_of_the_client_is_what_follows_namespace_and_number() {
        for (key, client) in [
            ("k8s.io/12/extract-1-abcd sha256:ff", "extract-1-abcd sha256:ff"),
            ("default/7//a/host/path", "/a/host/path"),
            ("extract-1", "extract-1"),
            ("a/b/extract-1", "a/b/extract-1"),
            ("a/1", "a/1"),
        ] {
            assert_eq!(client_key(key), client);
        }
    }
}
