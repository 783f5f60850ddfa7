//! kill -9 at random instants under 16 clients: every answered call is there afterwards, an unanswered one is wholly done or not
//! at all, and after a Cleanup records and storage are equal.
//!
//! `CRASH_ROUNDS` sets the number of kills (200), `CRASH_SEED` the first seed; each round prints nothing unless
//! it fails, and then its seed.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

use speedy::driver::overlay::{Overlay, OverlayOptions};
use speedy::proto::containerd::services::snapshots::v1 as wire;
use speedy::snapshot::{metastore, reconcile};

use crate::process::{Client, Place, commit, list, prepare, runtime};

const CLIENTS: usize = 16;
const MOST: usize = 24;

#[derive(Debug, Clone, PartialEq, Eq)]
struct Snapshot {
    kind: wire::Kind,
    parent: String,
    label: String,
}

/// What one client has been answered: its own part of the key space.
#[derive(Debug, Clone, Default)]
struct Known {
    snapshots: BTreeMap<String, Snapshot>,
    next: u64,
}

#[derive(Debug, Clone)]
enum Op {
    Prepare { key: String, parent: String },
    View { key: String, parent: String },
    Commit { name: String, key: String },
    Remove { key: String },
    Label { key: String, value: String },
}

/// xorshift64*: a seed that is printed is all that is wanted of it.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let wide = u128::from(self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)) * bound as u128;
        usize::try_from(wide >> 64).unwrap()
    }
}

impl Known {
    fn pick(&self, random: &mut Random, wanted: impl Fn(&String, &Snapshot) -> bool) -> Option<String> {
        let found: Vec<&String> =
            self.snapshots.iter().filter(|(k, s)| wanted(k, s)).map(|(k, _)| k).collect();
        (!found.is_empty()).then(|| found[random.below(found.len())].clone())
    }

    fn choose(&mut self, client: usize, random: &mut Random) -> Op {
        self.next += 1;
        let key = format!("client {client}/{}", self.next);
        let leaf = |key: &String, _: &Snapshot| !self.snapshots.values().any(|s| s.parent == *key);
        let chosen = match random.below(if self.snapshots.len() > MOST { 4 } else { 12 }) {
            0..=3 => self.pick(random, leaf).map(|key| Op::Remove { key }),
            4..=6 => self
                .pick(random, |_, s| s.kind == wire::Kind::Active)
                .map(|active| Op::Commit { name: key.clone(), key: active }),
            7 => self.pick(random, |_, _| true).map(|key| Op::Label { key, value: self.next.to_string() }),
            _ => None,
        };
        let parent = self.pick(random, |_, s| s.kind == wire::Kind::Committed).unwrap_or_default();
        chosen.unwrap_or_else(|| match random.below(5) {
            0 => Op::View { key, parent },
            _ => Op::Prepare { key, parent },
        })
    }

    fn apply(&mut self, op: &Op) {
        let new = |kind, parent: &String| Snapshot { kind, parent: parent.clone(), label: String::new() };
        match op {
            Op::Prepare { key, parent } => {
                self.snapshots.insert(key.clone(), new(wire::Kind::Active, parent));
            }
            Op::View { key, parent } => {
                self.snapshots.insert(key.clone(), new(wire::Kind::View, parent));
            }
            Op::Commit { name, key } => {
                let parent = self.snapshots.remove(key).unwrap().parent;
                self.snapshots.insert(name.clone(), new(wire::Kind::Committed, &parent));
            }
            Op::Remove { key } => {
                self.snapshots.remove(key);
            }
            Op::Label { key, value } => self.snapshots.get_mut(key).unwrap().label = value.clone(),
        }
    }
}

async fn call(client: &mut Client, op: &Op) -> Result<(), tonic::Status> {
    match op {
        Op::Prepare { key, parent } => drop(client.prepare(prepare(key, parent, &[])).await?),
        Op::View { key, parent } => {
            let request =
                wire::ViewSnapshotRequest { key: key.clone(), parent: parent.clone(), ..Default::default() };
            drop(client.view(request).await?);
        }
        Op::Commit { name, key } => drop(client.commit(commit(name, key)).await?),
        Op::Remove { key } => {
            let request = wire::RemoveSnapshotRequest { key: key.clone(), ..Default::default() };
            drop(client.remove(request).await?);
        }
        Op::Label { key, value } => {
            let labels = [("label".to_owned(), value.clone())].into();
            let info = wire::Info { name: key.clone(), labels, ..Default::default() };
            drop(
                client.update(wire::UpdateSnapshotRequest { info: Some(info), ..Default::default() }).await?,
            );
        }
    }
    Ok(())
}

/// Calls until the daemon is gone; answers what is known and the call that got no answer.
async fn run_client(
    mut client: Client,
    number: usize,
    mut known: Known,
    seed: u64,
) -> (Known, Option<Op>, usize) {
    let mut random = Random(seed);
    for answered in 0.. {
        let op = known.choose(number, &mut random);
        match call(&mut client, &op).await {
            Ok(()) => known.apply(&op),
            Err(status) => {
                let lost = matches!(
                    status.code(),
                    tonic::Code::Unavailable
                        | tonic::Code::Unknown
                        | tonic::Code::Cancelled
                        | tonic::Code::Internal
                );
                assert!(lost, "{op:?} was refused: {status:?}\nknown: {known:?}");
                return (known, Some(op), answered);
            }
        }
    }
    unreachable!("the daemon is killed")
}

fn part_of(all: &[wire::Info], client: usize) -> BTreeMap<String, Snapshot> {
    let prefix = format!("client {client}/");
    let snapshot = |info: &wire::Info| Snapshot {
        kind: info.kind(),
        parent: info.parent.clone(),
        label: info.labels.get("label").cloned().unwrap_or_default(),
    };
    all.iter().filter(|i| i.name.starts_with(&prefix)).map(|i| (i.name.clone(), snapshot(i))).collect()
}

/// The records must be what was answered, or that with the unanswered call done.
fn settle(known: &mut Known, doubt: Option<Op>, found: BTreeMap<String, Snapshot>, context: &str) {
    if known.snapshots == found {
        return;
    }
    let before = known.snapshots.clone();
    if let Some(op) = &doubt {
        known.apply(op);
    }
    assert_eq!(known.snapshots, found, "{context}: answered {before:#?}\nin doubt {doubt:?}");
}

pub(crate) fn require_equal(place: &Place, context: &str) {
    let driver = Overlay::open(&place.root(), OverlayOptions::default()).unwrap();
    let images = speedy::layer::images_below(&place.root()).unwrap();
    let inventory = reconcile::Inventory::of(&driver, images).unwrap();
    let recorded = metastore::read_recorded(&place.root()).unwrap().unwrap();
    let plan = reconcile::plan(&recorded, &inventory);
    assert!(plan.is_empty(), "{context}: {plan:?}");
    assert!(recorded.removing.is_empty(), "{context}: {:?} not freed", recorded.removing);
}

/// Which rounds there are, and what they are tried on.
pub(crate) struct Loop<'a> {
    pub(crate) rounds: u64,
    pub(crate) first_seed: u64,
    /// How long a daemon lives at most.
    pub(crate) longest: Duration,
    pub(crate) command: &'a dyn Fn() -> Command,
    /// Whether records and storage agree.
    pub(crate) require_equal: &'a dyn Fn(&str),
}

/// Starts the daemon and kills it, again and again; answers how many calls were answered.
pub(crate) fn kill_again_and_again(place: &Place, kills: &Loop<'_>) -> usize {
    let mut known = vec![Known::default(); CLIENTS];
    let mut doubts: Vec<Option<Op>> = vec![None; CLIENTS];
    let mut answered_in_all = 0;
    for round in 0..kills.rounds {
        let seed = kills.first_seed + round;
        let context = format!("CRASH_SEED={seed} CRASH_ROUNDS=1 (round {round})");
        let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        runtime().block_on(async {
            let mut daemon = place.start_command((kills.command)());
            let mut client = daemon.client(&place.socket()).await;
            let all = list(&mut client).await;
            for (number, known) in known.iter_mut().enumerate() {
                settle(known, doubts[number].take(), part_of(&all, number), &context);
            }
            client.cleanup(wire::CleanupRequest::default()).await.unwrap();
            (kills.require_equal)(&context);

            let mut tasks = tokio::task::JoinSet::new();
            for (number, known) in known.iter().enumerate() {
                let (client, known) = (client.clone(), known.clone());
                let seed = seed.wrapping_mul(1000) + number as u64 + 1;
                tasks.spawn(async move { (number, run_client(client, number, known, seed).await) });
            }
            let most = usize::try_from(kills.longest.as_micros()).unwrap();
            tokio::time::sleep(Duration::from_micros(random.below(most) as u64)).await;
            daemon.kill();
            for (number, (now_known, doubt, answered)) in tasks.join_all().await {
                known[number] = now_known;
                doubts[number] = doubt;
                answered_in_all += answered;
            }
        });
    }
    answered_in_all
}

pub(crate) fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |n| n.parse().unwrap())
}

#[test]
fn kill_at_any_instant_loses_no_answered_call() {
    let (rounds, first_seed) = (number("CRASH_ROUNDS", 200), number("CRASH_SEED", 1));
    let place = Place::new();
    let answered = kill_again_and_again(
        &place,
        &Loop {
            rounds,
            first_seed,
            longest: Duration::from_millis(150),
            command: &|| place.command(),
            require_equal: &|context| require_equal(&place, context),
        },
    );
    assert!(answered > usize::try_from(rounds).unwrap() * 10, "only {answered} calls in {rounds} rounds");
    println!("{rounds} kills, {answered} answered calls");
}
