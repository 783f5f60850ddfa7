//! Id mappings that clients ask for by label.
//!
//! `containerd.io/snapshot/uidmapping` and `.../gidmapping` carry `container:host:size[,...]`. They are obeyed only on
//! snapshots that a container will run on: an extraction snapshot (one with [`LABEL_REF`]) gets labels copied from the
//! image's manifest, so there they are whatever the image's author wrote, and are ignored.
//!
//! Source: containerd, `core/snapshots` (label names) and `internal/userns` (meaning of the ranges).

use super::Labels;
use super::remote::LABEL_REF;
use crate::driver::{IdMapping, Owner};

/// Ranges for users.
pub const LABEL_UIDS: &str = "containerd.io/snapshot/uidmapping";
/// Ranges for groups.
pub const LABEL_GIDS: &str = "containerd.io/snapshot/gidmapping";

/// Why a mapping cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MappingError {
    /// Not `container:host:size[,...]` of numbers in range.
    #[error("label {label} is not container:host:size[,container:host:size...]")]
    Malformed {
        /// Which label.
        label: &'static str,
    },
    /// The container would have no root.
    #[error("label {label} maps no host id to the container's id 0")]
    NoRoot {
        /// Which label.
        label: &'static str,
    },
    /// One of the two is missing.
    #[error("labels {LABEL_UIDS} and {LABEL_GIDS} are needed together")]
    Incomplete,
}

/// The mapping that `labels` ask for, if they ask and may.
pub fn from_labels(labels: &Labels) -> Result<Option<IdMapping>, MappingError> {
    if labels.contains_key(LABEL_REF) {
        return Ok(None);
    }
    match (labels.get(LABEL_UIDS), labels.get(LABEL_GIDS)) {
        (None, None) => Ok(None),
        (Some(uids), Some(gids)) => {
            let root = Owner { uid: host_root(LABEL_UIDS, uids)?, gid: host_root(LABEL_GIDS, gids)? };
            Ok(Some(IdMapping { uids: uids.clone(), gids: gids.clone(), root }))
        }
        _ => Err(MappingError::Incomplete),
    }
}

/// Where the container's id 0 lands. Every range is checked: the text goes into mount options as it is.
fn host_root(label: &'static str, ranges: &str) -> Result<u32, MappingError> {
    let mut root = None;
    for range in ranges.split(',') {
        let [container, host, size] = parse_range(range).ok_or(MappingError::Malformed { label })?;
        // The largest id is reserved: (uid_t)-1 means "no id" to the kernel.
        let fits = |start: u32| start.checked_add(size).is_some();
        if size == 0 || !fits(container) || !fits(host) {
            return Err(MappingError::Malformed { label });
        }
        if container == 0 {
            root = Some(host);
        }
    }
    root.ok_or(MappingError::NoRoot { label })
}

fn parse_range(range: &str) -> Option<[u32; 3]> {
    let mut numbers = range.split(':').map(|n| match n.bytes().all(|b| b.is_ascii_digit()) {
        true => n.parse().ok(),
        false => None,
    });
    let range = [numbers.next()??, numbers.next()??, numbers.next()??];
    numbers.next().is_none().then_some(range)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(uids: &str, gids: &str) -> Labels {
        Labels::from([(LABEL_UIDS.into(), uids.into()), (LABEL_GIDS.into(), gids.into())])
    }

    #[test]
    fn a_mapping_tells_where_root_lands() {
        let mapping = from_labels(&labels("0:100000:65536", "5:1:2,0:200000:65536")).unwrap().unwrap();
        assert_eq!(mapping.root, Owner { uid: 100_000, gid: 200_000 });
        assert_eq!(mapping.gids, "5:1:2,0:200000:65536");
        assert_eq!(from_labels(&Labels::new()), Ok(None));
    }

    #[test]
    fn forged_or_broken_mappings_are_refused() {
        for bad in [
            "",
            "0",
            "0:1",
            "0:1:",
            "0:1:2:3",
            "a:b:c",
            "0:1:2,",
            "-1:0:5",
            "0:+1:5",
            " 0:1:2",
            "0:1:0",
            "0:4294967295:2",
            "0:1:4294967295",
            "0:99999999999:1",
            "0:1:2\n",
            "0:1:2,lowerdir=/",
        ] {
            assert_eq!(
                from_labels(&labels(bad, "0:1:1")),
                Err(MappingError::Malformed { label: LABEL_UIDS }),
                "{bad:?}"
            );
        }
        assert_eq!(from_labels(&labels("1:1:1", "0:1:1")), Err(MappingError::NoRoot { label: LABEL_UIDS }));
        let one = Labels::from([(LABEL_UIDS.into(), "0:1:1".into())]);
        assert_eq!(from_labels(&one), Err(MappingError::Incomplete));
    }

    /// An image's author can put any label under containerd's prefix on an extraction snapshot.
    #[test]
    fn an_extraction_snapshot_is_never_mapped() {
        let mut forged = labels("0:0:1", "0:0:1");
        forged.insert(LABEL_REF.into(), "anything".into());
        assert_eq!(from_labels(&forged), Ok(None));
    }
}
