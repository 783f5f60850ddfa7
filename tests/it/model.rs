//! Random operations against the snapshotter and against a small model in memory: both must answer alike and hold the same.
//!
//! `PROPTEST_CASES` sets the number of sequences. A failure is shrunk to the shortest sequence that shows it.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use speedy::driver::memory::Memory;
use speedy::snapshot::filter::Filter;
use speedy::snapshot::snapshotter::Snapshotter;
use speedy::snapshot::{Kind, LabelUpdate, Labels, Prepared, SnapshotError};

use crate::support::{POLICY, Running, key, labels, runtime};

/// Few names, so that operations meet.
const NAMES: [&str; 6] = ["a", "b", "c", "d", "e", "f"];

#[derive(Debug, Clone)]
enum Op {
    Prepare { key: usize, parent: Option<usize>, label: u8 },
    View { key: usize, parent: Option<usize> },
    Commit { name: usize, key: usize, parent: Option<usize>, label: u8 },
    Remove { key: usize },
    Replace { key: usize, label: u8 },
    Merge { key: usize, label: u8, value: Option<u8> },
    Stat { key: usize },
    Mounts { key: usize },
    Usage { key: usize },
    Cleanup,
    Restart,
}

fn op() -> impl Strategy<Value = Op> {
    let name = || 0..NAMES.len();
    let parent = || proptest::option::weighted(0.7, 0..NAMES.len());
    prop_oneof![
        6 => (name(), parent(), 0..3_u8).prop_map(|(key, parent, label)| Op::Prepare { key, parent, label }),
        2 => (name(), parent()).prop_map(|(key, parent)| Op::View { key, parent }),
        6 => (name(), name(), proptest::option::weighted(0.2, name()), 0..3_u8)
            .prop_map(|(name, key, parent, label)| Op::Commit { name, key, parent, label }),
        5 => name().prop_map(|key| Op::Remove { key }),
        1 => (name(), 0..3_u8).prop_map(|(key, label)| Op::Replace { key, label }),
        1 => (name(), 0..3_u8, proptest::option::of(0..3_u8))
            .prop_map(|(key, label, value)| Op::Merge { key, label, value }),
        1 => name().prop_map(|key| Op::Stat { key }),
        1 => name().prop_map(|key| Op::Mounts { key }),
        1 => name().prop_map(|key| Op::Usage { key }),
        1 => Just(Op::Cleanup),
        1 => Just(Op::Restart),
    ]
}

/// What an operation came to, without what the model cannot know (times, numbers).
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Done,
    NotFound,
    AlreadyExists,
    InvalidArgument,
    FailedPrecondition,
    Is(Kind, Option<String>, Labels),
}

fn outcome<T>(result: Result<T, SnapshotError>) -> Outcome {
    match result {
        Ok(_) => Outcome::Done,
        Err(SnapshotError::NotFound { .. } | SnapshotError::ParentNotFound { .. }) => Outcome::NotFound,
        Err(SnapshotError::AlreadyExists { .. }) => Outcome::AlreadyExists,
        Err(SnapshotError::ParentNotCommitted { .. } | SnapshotError::ParentMismatch { .. }) => {
            Outcome::InvalidArgument
        }
        Err(
            SnapshotError::NotActive { .. }
            | SnapshotError::NotMountable { .. }
            | SnapshotError::HasChildren { .. }
            | SnapshotError::RebaseOntoUncommitted { .. },
        ) => Outcome::FailedPrecondition,
        Err(other) => panic!("{other}"),
    }
}

fn label(n: u8) -> Labels {
    labels(&[("label", ["x", "y", "z"][usize::from(n)])])
}

/// The contract's section 1.2, in as few lines as it takes.
#[derive(Debug, Default, Clone)]
struct Model(BTreeMap<usize, (Kind, Option<usize>, Labels)>);

impl Model {
    fn kind(&self, key: usize) -> Option<Kind> {
        self.0.get(&key).map(|(kind, ..)| *kind)
    }

    fn new_snapshot(&mut self, key: usize, parent: Option<usize>, kind: Kind, labels: Labels) -> Outcome {
        match parent.map(|parent| self.kind(parent)) {
            Some(None) => return Outcome::NotFound,
            Some(Some(Kind::Active | Kind::View)) => return Outcome::InvalidArgument,
            Some(Some(Kind::Committed)) | None => {}
        }
        if self.0.contains_key(&key) {
            return Outcome::AlreadyExists;
        }
        self.0.insert(key, (kind, parent, labels));
        Outcome::Done
    }

    fn commit(&mut self, name: usize, key: usize, asked: Option<usize>, labels: Labels) -> Outcome {
        if self.0.contains_key(&name) {
            return Outcome::AlreadyExists;
        }
        let Some((kind, has, _)) = self.0.get(&key).cloned() else { return Outcome::NotFound };
        if kind != Kind::Active {
            return Outcome::FailedPrecondition;
        }
        if asked.is_some() && has.is_some() && asked != has {
            return Outcome::InvalidArgument;
        }
        let parent = asked.or(has);
        match parent.map(|parent| self.kind(parent)) {
            Some(None) => return Outcome::NotFound,
            Some(Some(Kind::Active | Kind::View)) => return Outcome::FailedPrecondition,
            Some(Some(Kind::Committed)) | None => {}
        }
        self.0.remove(&key);
        self.0.insert(name, (Kind::Committed, parent, labels));
        Outcome::Done
    }

    fn apply(&mut self, op: &Op) -> Outcome {
        match *op {
            Op::Prepare { key, parent, label: l } => self.new_snapshot(key, parent, Kind::Active, label(l)),
            Op::View { key, parent } => self.new_snapshot(key, parent, Kind::View, Labels::new()),
            Op::Commit { name, key, parent, label: l } => self.commit(name, key, parent, label(l)),
            Op::Remove { key } => match self.kind(key) {
                None => Outcome::NotFound,
                Some(_) if self.0.values().any(|(_, parent, _)| *parent == Some(key)) => {
                    Outcome::FailedPrecondition
                }
                Some(_) => {
                    self.0.remove(&key);
                    Outcome::Done
                }
            },
            Op::Replace { key, label: l } => match self.0.get_mut(&key) {
                None => Outcome::NotFound,
                Some((.., labels)) => {
                    *labels = label(l);
                    Outcome::Done
                }
            },
            Op::Merge { key, label: l, value } => match self.0.get_mut(&key) {
                None => Outcome::NotFound,
                Some((.., labels)) => {
                    match value {
                        Some(value) => labels.insert(format!("m{l}"), value.to_string()),
                        None => labels.remove(&format!("m{l}")),
                    };
                    Outcome::Done
                }
            },
            Op::Stat { key } => match self.0.get(&key) {
                None => Outcome::NotFound,
                Some((kind, parent, labels)) => {
                    Outcome::Is(*kind, parent.map(|p| NAMES[p].to_owned()), labels.clone())
                }
            },
            Op::Mounts { key } => match self.kind(key) {
                None => Outcome::NotFound,
                Some(Kind::Committed) => Outcome::FailedPrecondition,
                Some(Kind::Active | Kind::View) => Outcome::Done,
            },
            Op::Usage { key } => match self.kind(key) {
                None => Outcome::NotFound,
                Some(_) => Outcome::Done,
            },
            Op::Cleanup | Op::Restart => Outcome::Done,
        }
    }
}

async fn apply(snapshotter: &Snapshotter, op: &Op) -> Outcome {
    let at = |n: usize| key(NAMES[n]);
    match *op {
        Op::Prepare { key, parent, label: l } => {
            let prepared = snapshotter.prepare(at(key), parent.map(at), label(l)).await;
            assert!(!matches!(prepared, Ok(Prepared::AlreadyCommitted(_))));
            outcome(prepared)
        }
        Op::View { key, parent } => outcome(snapshotter.view(at(key), parent.map(at), Labels::new()).await),
        Op::Commit { name, key, parent, label: l } => {
            outcome(snapshotter.commit(at(name), at(key), parent.map(at), label(l)).await)
        }
        Op::Remove { key } => outcome(snapshotter.remove(at(key)).await),
        Op::Replace { key, label: l } => {
            outcome(snapshotter.update(at(key), LabelUpdate::Replace(label(l))).await)
        }
        Op::Merge { key, label: l, value } => {
            let entry = (format!("m{l}"), value.map(|v| v.to_string()));
            outcome(snapshotter.update(at(key), LabelUpdate::Merge([entry].into())).await)
        }
        Op::Stat { key } => match snapshotter.stat(&at(key)) {
            Ok(info) => Outcome::Is(info.kind, info.parent.map(|p| p.as_str().to_owned()), info.labels),
            Err(error) => outcome::<()>(Err(error)),
        },
        Op::Mounts { key } => outcome(snapshotter.mounts(&at(key)).await),
        Op::Usage { key } => outcome(snapshotter.usage(&at(key)).await),
        Op::Cleanup => {
            snapshotter.cleanup().await;
            Outcome::Done
        }
        Op::Restart => Outcome::Done,
    }
}

fn held(snapshotter: &Snapshotter) -> BTreeMap<String, (Kind, Option<String>, Labels)> {
    let all = snapshotter.list(&Filter::parse(&[]).unwrap());
    let text = |key: &speedy::snapshot::Key| key.as_str().to_owned();
    all.iter()
        .map(|r| (text(&r.info.name), (r.info.kind, r.info.parent.as_ref().map(text), r.info.labels.clone())))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn snapshotter_and_model_agree(ops in proptest::collection::vec(op(), 1..60)) {
        runtime().block_on(async {
            let dir = scratch();
            let driver = Arc::new(Memory::default());
            let mut running = Running::start(dir.path(), driver.clone(), POLICY, "").await;
            let mut model = Model::default();
            for (at, op) in ops.iter().enumerate() {
                if matches!(op, Op::Restart) {
                    running.stop().await;
                    running = Running::start(dir.path(), driver.clone(), POLICY, "").await;
                }
                let expected = model.apply(op);
                let found = apply(&running.snapshotter, op).await;
                prop_assert_eq!(found, expected, "step {} of {:?}", at, ops);
            }
            let expected: BTreeMap<_, _> = model.0.into_iter()
                .map(|(key, (kind, parent, labels))| {
                    (NAMES[key].to_owned(), (kind, parent.map(|p| NAMES[p].to_owned()), labels))
                })
                .collect();
            prop_assert_eq!(held(&running.snapshotter), expected);
            running.snapshotter.cleanup().await;
            prop_assert!(running.meta.removing().is_empty());
            running.stop().await;
            Ok(())
        })?;
    }
}

/// In memory where that is to be had: thousands of sequences need no real disk, the crash test has one.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").map_or(2000, |n| n.parse().unwrap())
}
