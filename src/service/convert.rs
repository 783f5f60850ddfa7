//! containerd's messages ⇄ the domain's values. Pure.

use std::collections::{BTreeMap, HashMap};

use prost_types::FieldMask;

use crate::driver;
use crate::proto::containerd::services::snapshots::v1 as wire;
use crate::proto::containerd::types;
use crate::snapshot::{Info, Kind, LabelUpdate, Labels, SnapshotError, Timestamp, Usage};

const NANOS: i64 = 1_000_000_000;

pub(super) fn labels(labels: HashMap<String, String>) -> Labels {
    labels.into_iter().collect()
}

pub(super) fn mounts(mounts: Vec<driver::Mount>) -> Vec<types::Mount> {
    let mount = |m: driver::Mount| types::Mount {
        r#type: m.kind,
        source: m.source,
        target: String::new(),
        options: m.options,
    };
    mounts.into_iter().map(mount).collect()
}

pub(super) fn driver_mounts(mounts: Vec<types::Mount>) -> Vec<driver::Mount> {
    let mount = |m: types::Mount| driver::Mount { kind: m.r#type, source: m.source, options: m.options };
    mounts.into_iter().map(mount).collect()
}

pub(super) fn info(info: Info) -> wire::Info {
    wire::Info {
        name: info.name.as_str().to_owned(),
        parent: info.parent.map_or_else(String::new, |parent| parent.as_str().to_owned()),
        kind: kind(info.kind).into(),
        created_at: Some(timestamp(info.created)),
        updated_at: Some(timestamp(info.updated)),
        labels: info.labels.into_iter().collect(),
    }
}

pub(super) fn usage(usage: Usage) -> wire::UsageResponse {
    let signed = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    wire::UsageResponse { size: signed(usage.bytes), inodes: signed(usage.inodes) }
}

/// What an Update asks for. Only labels can change; `info`'s other fields mean nothing, whatever they hold (containerd's
/// metadata layer sends year 1 as times and "committed" as any kind it does not know).
pub(super) fn label_update(
    info: HashMap<String, String>,
    mask: Option<FieldMask>,
) -> Result<LabelUpdate, SnapshotError> {
    let paths = mask.map(|mask| mask.paths).unwrap_or_default();
    if let Some(path) = paths.iter().find(|p| *p != "labels" && !p.starts_with("labels.")) {
        return Err(SnapshotError::ImmutableField { path: path.clone() });
    }
    if paths.is_empty() || paths.iter().any(|path| path == "labels") {
        // An empty value is no label: containerd's own stores drop it.
        return Ok(LabelUpdate::Replace(info.into_iter().filter(|(_, value)| !value.is_empty()).collect()));
    }
    let entry = |path: &String| {
        let key = path["labels.".len()..].to_owned();
        let value = info.get(&key).filter(|value| !value.is_empty()).cloned();
        (key, value)
    };
    Ok(LabelUpdate::Merge(paths.iter().map(entry).collect::<BTreeMap<_, _>>()))
}

fn kind(kind: Kind) -> wire::Kind {
    match kind {
        Kind::View => wire::Kind::View,
        Kind::Active => wire::Kind::Active,
        Kind::Committed => wire::Kind::Committed,
    }
}

fn timestamp(time: Timestamp) -> prost_types::Timestamp {
    let nanos = i32::try_from(time.0.rem_euclid(NANOS)).unwrap_or(0);
    prost_types::Timestamp { seconds: time.0.div_euclid(NANOS), nanos }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(entries: &[(&str, &str)]) -> HashMap<String, String> {
        entries.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    fn mask(paths: &[&str]) -> Option<FieldMask> {
        Some(FieldMask { paths: paths.iter().map(|p| (*p).to_owned()).collect() })
    }

    #[test]
    fn no_mask_an_empty_one_and_labels_all_replace() {
        let replaced = LabelUpdate::Replace(Labels::from([("a".into(), "1".into())]));
        for mask in [None, mask(&[]), mask(&["labels"]), mask(&["labels.b", "labels"])] {
            assert_eq!(label_update(map(&[("a", "1"), ("empty", "")]), mask).unwrap(), replaced);
        }
    }

    #[test]
    fn a_path_sets_or_deletes_one_label_dots_and_all() {
        let update =
            label_update(map(&[("a.b/c", "1"), ("x", "")]), mask(&["labels.a.b/c", "labels.x", "labels.y"]));
        let expected = [("a.b/c", Some("1")), ("x", None), ("y", None)];
        let expected = expected.map(|(k, v)| (k.to_owned(), v.map(str::to_owned)));
        assert_eq!(update.unwrap(), LabelUpdate::Merge(BTreeMap::from(expected)));
    }

    #[test]
    fn nothing_but_labels_can_change() {
        for path in ["parent", "kind", "name", "created_at", "Labels", "labelsx", ""] {
            let update = label_update(map(&[]), mask(&["labels.a", path]));
            assert!(matches!(update, Err(SnapshotError::ImmutableField { .. })), "{path:?}");
        }
    }

    #[test]
    fn times_keep_their_nanoseconds_before_1970_too() {
        assert_eq!(timestamp(Timestamp(1_500_000_000_000_000_007)).nanos, 7);
        let before = timestamp(Timestamp(-1));
        assert_eq!((before.seconds, before.nanos), (-1, 999_999_999));
    }
}
