//! The power fails below a pool and its records: they are on one disk whose writes are recorded in one order, and what it would hold
//! after any number of them is served again.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use speedy::driver::thin::{Devices, PoolOptions};
use speedy::proto::containerd::services::snapshots::v1 as wire;

use super::{Mounted, Served, clear, mount_of, sh, started};
use crate::cold::noise;
use crate::crash;
use crate::power::{DISKS, Recorded, Undo, disk_size};
use crate::process::{Client, Place, commit, list, prepare, require_root, runtime};

/// What each part of the disk has, in sectors; the file system of the records takes the rest.
const METADATA: u64 = 8 << 11;
const DATA: u64 = 112 << 11;

/// What a committed snapshot has; nothing is promised of one that is written to.
type Content = Option<BTreeMap<String, Vec<u8>>>;
type Snapshots = BTreeMap<String, Content>;

/// The pool's two devices and a file system for the root, on one disk; taken away in this order.
struct Parts {
    _mounted: Undo,
    _devices: Vec<Undo>,
}

impl Parts {
    fn of(disk: &str, name: &str, root: &Path, fresh: bool) -> (Parts, PoolOptions) {
        let sectors: u64 = sh(&format!("blockdev --getsz {disk}")).trim().parse().unwrap();
        let path = |part: &str| PathBuf::from(format!("/dev/mapper/{name}-{part}"));
        let parts = [
            ("metadata", 0, METADATA),
            ("data", METADATA, DATA),
            ("root", METADATA + DATA, sectors - METADATA - DATA),
        ];
        let devices = parts.map(|(part, from, length)| {
            sh(&format!("dmsetup create {name}-{part} --table '0 {length} linear {disk} {from}'"));
            Undo(format!("dmsetup remove {name}-{part}"))
        });
        if fresh {
            sh(&format!("mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 {}", path("root").display()));
        }
        fs::create_dir_all(root).unwrap();
        sh(&format!("mount -t ext4 {} {}", path("root").display(), root.display()));
        let mounted = Undo(format!("umount {}", root.display()));
        let devices_of = Devices::Direct { data: path("data"), metadata: path("metadata") };
        (
            Parts { _mounted: mounted, _devices: devices.into() },
            PoolOptions { devices: devices_of, reserve: 0 },
        )
    }
}

/// A client that marks in the log what it has been answered.
struct Marked {
    client: Client,
    /// After each call.
    states: Vec<Snapshots>,
}

impl Marked {
    fn answered(&mut self, change: impl FnOnce(&mut Snapshots)) {
        let mut state = self.states.last().cloned().unwrap_or_default();
        change(&mut state);
        sh(&format!("dmsetup message recorded 0 mark answer-{}", self.states.len()));
        self.states.push(state);
    }

    async fn prepare(&mut self, key: &str, parent: &str, files: &[(&str, u64)]) {
        let answer = self.client.prepare(prepare(key, parent, &[])).await.unwrap().into_inner();
        self.answered(|state| drop(state.insert(key.into(), None)));
        let mounted = Mounted::new(&mount_of(answer.mounts));
        for (name, seed) in files {
            fs::write(mounted.path(name), noise(*seed, 300_000)).unwrap();
        }
    }

    async fn layer(&mut self, name: &str, parent: &str, files: &[(&str, u64)]) {
        let active = format!("{name}-active");
        self.prepare(&active, parent, files).await;
        self.client.commit(commit(name, &active)).await.unwrap();
        self.answered(|state| {
            let mut content = state.get(parent).cloned().flatten().unwrap_or_default();
            content.extend(files.iter().map(|(file, seed)| ((*file).to_owned(), noise(*seed, 300_000))));
            state.remove(&active);
            state.insert(name.into(), Some(content));
        });
    }

    async fn remove(&mut self, key: &str) {
        remove(&mut self.client, key).await;
        self.answered(|state| drop(state.remove(key)));
        self.client.cleanup(wire::CleanupRequest::default()).await.unwrap();
        self.answered(|_| {});
    }
}

async fn remove(client: &mut Client, key: &str) {
    client.remove(wire::RemoveSnapshotRequest { key: key.into(), ..Default::default() }).await.unwrap();
}

/// Layers, containers on them, and some that go, on a recorded disk; what there was after each answer, and the blocks of an empty pool.
fn record(disk: &str, log: &str) -> (Vec<Snapshots>, u64) {
    sh(&format!("dmsetup create recorded --table '0 {} log-writes {disk} {log}'", disk_size(disk) / 512));
    let _recorded = Undo("dmsetup remove recorded".into());
    let place = Place::new();
    let (_parts, pool) = Parts::of("/dev/mapper/recorded", "power", &place.root(), true);
    let served = Served { place, pool };
    runtime().block_on(async {
        let (mut daemon, client) = started(&served, None).await;
        let empty = served.require_equal("empty");
        sh("sync");
        let mut marked = Marked { client, states: Vec::new() };
        marked.answered(|_| {});
        marked.layer("base", "", &[("one", 1), ("two", 2)]).await;
        marked.layer("middle", "base", &[("two", 3), ("three", 4)]).await;
        marked.prepare("box", "middle", &[("four", 5)]).await;
        marked.layer("top", "middle", &[("one", 6)]).await;
        marked.remove("box").await;
        marked.layer("other", "", &[("one", 7)]).await;
        marked.remove("top").await;
        marked.layer("new", "middle", &[("one", 8), ("five", 9)]).await;
        marked.prepare("last", "new", &[("six", 10)]).await;
        daemon.signal("TERM");
        assert!(daemon.wait().success(), "{}", daemon.log());
        sh("dmsetup message recorded 0 mark end");
        (marked.states, empty)
    })
}

async fn require_snapshots(client: &mut Client, allowed: &[Snapshots], context: &str) -> Vec<String> {
    let found: Vec<String> = list(client).await.into_iter().map(|info| info.name).collect();
    let is_it =
        |state: &&Snapshots| state.len() == found.len() && found.iter().all(|name| state.contains_key(name));
    let Some(state) = allowed.iter().find(is_it) else {
        let allowed: Vec<_> = allowed.iter().map(|state| state.keys().collect::<Vec<_>>()).collect();
        panic!("{context}: {found:?}, and answered was one of {allowed:?}");
    };
    for (name, content) in state {
        let Some(content) = content else { continue };
        let view =
            wire::ViewSnapshotRequest { key: "look".into(), parent: name.clone(), ..Default::default() };
        let seen = Mounted::new(&mount_of(client.view(view).await.unwrap().into_inner().mounts));
        let files = fs::read_dir(seen.0.path()).unwrap().count();
        assert_eq!(files, content.len(), "{context}: files of {name}");
        for (file, bytes) in content {
            let read =
                fs::read(seen.path(file)).unwrap_or_else(|error| panic!("{context}: {name}/{file}: {error}"));
            assert!(read == *bytes, "{context}: {name}/{file} has other bytes");
        }
        drop(seen);
        remove(client, "look").await;
    }
    found
}

/// Serves what the disk holds: all of it is as it was answered, and in the end the pool is as empty as it was at first.
fn serve_after(disk: &str, allowed: &[Snapshots], empty: u64, context: &str) {
    let place = Place::new();
    let (_parts, pool) = Parts::of(disk, "again", &place.root(), false);
    let served = Served { place, pool };
    let Devices::Direct { metadata, .. } = &served.pool.devices else { unreachable!("as Parts makes it") };
    let check = format!("pdata_tools thin_check -q {}", metadata.display());
    sh(&check);
    runtime().block_on(async {
        let (mut daemon, mut client) = started(&served, None).await;
        let mut left = require_snapshots(&mut client, allowed, context).await;
        let parent = if left.iter().any(|name| name == "base") { "base" } else { "" };
        client.prepare(prepare("again", parent, &[])).await.unwrap();
        left.push("again".into());
        for _ in 0..left.len() {
            let mut parents = Vec::new();
            for key in left {
                let request = wire::RemoveSnapshotRequest { key: key.clone(), ..Default::default() };
                if client.remove(request).await.is_err() {
                    parents.push(key);
                }
            }
            left = parents;
        }
        assert!(left.is_empty(), "{context}: {left:?} cannot be removed");
        client.cleanup(wire::CleanupRequest::default()).await.unwrap();
        daemon.signal("TERM");
        assert!(daemon.wait().success(), "{}", daemon.log());
        assert_eq!(served.require_equal(context), empty, "{context}: blocks that nobody has");
    });
    clear(&served.tag());
    sh(&check);
}

#[test]
#[ignore = "needs device-mapper and two empty disks, named by TEST_POWER_DISKS: contrib/test runs it in a virtual machine"]
fn nothing_that_was_committed_is_lost_with_the_power() {
    require_root();
    let disks = std::env::var(DISKS).unwrap();
    let (disk, log) = disks.split_once(':').unwrap();
    let (states, empty) = record(disk, log);
    let recorded = Recorded::read(log);
    let marks: Vec<usize> = (0..states.len()).map(|at| recorded.mark(&format!("answer-{at}"))).collect();
    let (begin, end) = (marks[0] + 1, recorded.mark("end"));
    let mut points = recorded.points(begin);
    points.retain(|point| *point <= end);
    let wanted = usize::try_from(crash::number("TEST_POWER_POINTS", 16)).unwrap();
    points = points.iter().copied().step_by(points.len().div_ceil(wanted)).collect();
    points.push(end);
    println!("{} writes recorded, {} answers, {} moments", end - begin, states.len(), points.len());
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk");
    for entries in points {
        let answered = marks.iter().filter(|mark| **mark < entries).count();
        recorded.replay(entries, disk_size(disk), &image);
        let device = sh(&format!("losetup -f; losetup $(losetup -f) {}", image.display()));
        let _loop = Undo(format!("losetup -d {}", device.trim()));
        let allowed = &states[answered - 1..states.len().min(answered + 1)];
        let context = format!("entry {entries}, after answer {}", answered - 1);
        println!("{context}");
        serve_after(device.trim(), allowed, empty, &context);
    }
}
