//! Thin volumes on a real pool: the driver by itself, and the daemon over it, killed at each of its steps.
//!
//! They need device-mapper, and change the machine's devices: `contrib/test` runs them in a virtual machine, as
//! `contrib/vm --file target/debug/speedy -- ROOT_TESTS thin:: --ignored --test-threads=1` does.

use std::fs;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use speedy::driver::thin::{Devices, Kind, PoolOptions, Thin, ThinOptions};
use speedy::driver::{
    Access, Creation, Driver, DriverError, Id, Inventory, Known, Mount, MountRequest, Purpose,
};
use speedy::image::Limits;
use speedy::oci::Digest;
use speedy::proto::containerd::services::snapshots::v1 as wire;
use speedy::snapshot::apply::{Applier, ApplyRequest, How};
use speedy::snapshot::metastore::{self, MetaStore};
use speedy::snapshot::reconcile::{self, Room};
use speedy::snapshot::snapshotter::{Policy, Remote, Sharing, Snapshotter, UpperdirLabel};
use speedy::snapshot::{Key, Labels, Prepared};

mod answers;
mod disks;
mod faults;
mod power;
mod remote;

use crate::crash::{self, Loop};
use crate::driver_suite;
use crate::layers::{Item, Tar};
use crate::process::{Client, Daemon, Place, commit, list, prepare, require_root, runtime};
use crate::serve::{asked, metrics_of};

const NEVER: &dyn Fn() -> bool = &|| false;
const MIB: u64 = 1 << 20;

fn sh(command: &str) -> String {
    let output = Command::new("sh").args(["-ec", command]).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command}: {}\n{out}{err}", output.status);
    out.into_owned()
}

fn id(serial: u64) -> Id {
    Id { serial, slot: u32::try_from(serial).unwrap() }
}

/// Takes away all devices of a tag.
fn clear(tag: &str) {
    sh(&format!(
        "for pass in 1 2 3; do for name in $(dmsetup ls | cut -f1 | grep '^speedy-{tag}-' | sort -r); do \
         dmsetup remove \"$name\" 2>/dev/null || true; done; done; rm -f /dev/mapper/speedy-{tag}-*"
    ));
}

struct Node {
    dir: tempfile::TempDir,
    options: ThinOptions,
}

impl Node {
    fn new(tag: &str, kind: Kind, pool: u64) -> Node {
        require_root();
        clear(tag);
        let size = kind.smallest().max(64 * MIB);
        let pool = PoolOptions { devices: Devices::Loop { bytes: pool }, reserve: 10 };
        let mount_options = vec!["discard".to_owned()];
        let options = ThinOptions { tag: tag.into(), kind, size, mount_options, discard: true, pool };
        Node { dir: tempfile::tempdir().unwrap(), options }
    }

    fn open(&self) -> Result<Thin, DriverError> {
        Thin::open(self.dir.path(), self.options.clone())
    }

    /// With records that have given out a thousand serials, and have these Ids.
    fn recovered(&self, ids: &[Id]) -> Thin {
        let driver = self.open().unwrap();
        let last_serial = if ids.is_empty() { 0 } else { 1000 };
        driver.recover(&Known { ids: ids.to_vec(), newest: 0, last_serial }).unwrap();
        driver
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join("pool").join(name)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        clear(&self.options.tag);
    }
}

fn request(id: Id, parents: &[Id], access: Access, size: Option<u64>) -> MountRequest<'_> {
    MountRequest { id, parents, access, mapping: None, purpose: Purpose::Ordinary, size }
}

/// A mount as containerd makes it.
struct Mounted(tempfile::TempDir);

impl Mounted {
    fn new(mount: &Mount) -> Mounted {
        let dir = tempfile::tempdir().unwrap();
        let options = mount.options.join(",");
        let options = if options.is_empty() { String::new() } else { format!("-o {options}") };
        sh(&format!("mount -t {} {options} {} {}", mount.kind, mount.source, dir.path().display()));
        Mounted(dir)
    }

    fn of(driver: &Thin, request: &MountRequest<'_>) -> Mounted {
        driver.activate(request).unwrap();
        Mounted::new(&driver.mounts(request).remove(0))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        sh(&format!("umount {}", self.0.path().display()));
    }
}

fn bytes_on_disk(path: &Path) -> u64 {
    std::os::unix::fs::MetadataExt::blocks(&fs::metadata(path).unwrap()) * 512
}

#[test]
#[ignore = "needs device-mapper"]
fn suite_on_ext4_and_xfs() {
    for kind in [Kind::Ext4, Kind::Xfs] {
        let node = Node::new("suite", kind, 1024 * MIB);
        driver_suite::run(&node.recovered(&[]));
        // A second start finds its template and pool.
        driver_suite::run(&node.recovered(&[id(900)]));
        clear("suite");
        driver_suite::run(&node.recovered(&[id(900)]));
    }
}

#[test]
#[ignore = "needs device-mapper"]
fn snapshots_share_until_they_are_written() {
    let node = Node::new("share", Kind::Ext4, 1024 * MIB);
    let driver = node.recovered(&[]);
    let empty = driver.status().unwrap().data.used;
    driver.reserve(&[id(1), id(2), id(3), id(4)]).unwrap();
    driver.create(&Creation::active(id(1), None)).unwrap();
    let below = Mounted::of(&driver, &request(id(1), &[], Access::ReadWrite, None));
    let entries: Vec<_> = fs::read_dir(below.0.path()).unwrap().collect();
    assert!(entries.is_empty(), "{entries:?}");
    fs::write(below.path("one"), vec![7; 8 << 20]).unwrap();
    drop(below);

    driver.create(&Creation::active(id(2), Some(id(1)))).unwrap();
    let above = Mounted::of(&driver, &request(id(2), &[id(1)], Access::ReadWrite, None));
    assert_eq!(fs::read(above.path("one")).unwrap(), vec![7; 8 << 20]);
    fs::write(above.path("two"), vec![8; 2 << 20]).unwrap();
    sh("sync");
    let (one, two) = (driver.usage(id(1), NEVER).unwrap().bytes, driver.usage(id(2), NEVER).unwrap().bytes);
    assert!((8 * MIB..12 * MIB).contains(&one) && (2 * MIB..6 * MIB).contains(&two), "{one} {two}");
    // Snapshotted while it is mounted: what was written is there.
    driver.create(&Creation::active(id(3), Some(id(2)))).unwrap();
    fs::write(above.path("two"), "changed").unwrap();
    drop(above);
    let third = Mounted::of(&driver, &request(id(3), &[id(2), id(1)], Access::ReadWrite, None));
    assert_eq!(fs::read(third.path("two")).unwrap(), vec![8; 2 << 20]);
    drop(third);

    let below = [id(1)];
    let view = request(id(4), &below, Access::ReadOnly, None);
    driver.create(&Creation { access: Access::ReadOnly, ..Creation::active(id(4), Some(id(1))) }).unwrap();
    let seen = Mounted::of(&driver, &view);
    assert_eq!(fs::read(seen.path("one")).unwrap().len(), 8 << 20);
    assert!(fs::write(seen.path("new"), "x").is_err());
    drop(seen);
    let source = driver.mounts(&view).remove(0).source;
    // The kernel lets root open it for writing, and refuses each write.
    let opened = fs::OpenOptions::new().write(true).open(&source).unwrap();
    assert!(opened.write_all_at(&[1; 4096], 0).is_err(), "the device itself is read-only");
    drop(opened);
    assert_eq!(driver.volume_of(&driver.mounts(&view)[0]), None);

    let busy = Mounted::of(&driver, &request(id(3), &[id(2)], Access::ReadWrite, None));
    assert!(matches!(driver.require_unused(id(3)), Err(DriverError::Busy(_))));
    assert!(matches!(driver.remove(id(3), NEVER), Err(DriverError::Busy(_))));
    assert!(busy.path("one").exists(), "whoever uses it goes on");
    drop(busy);
    let before = bytes_on_disk(&node.file("data"));
    for serial in [4, 3, 2, 1] {
        driver.remove(id(serial), NEVER).unwrap();
    }
    assert_eq!(driver.inventory().unwrap(), Inventory::Slots(vec![]));
    let (left, after) = (driver.status().unwrap().data.used, bytes_on_disk(&node.file("data")));
    assert_eq!(left, empty);
    assert!(after + 8 * MIB < before, "{before} bytes of the file, {after} afterwards");
    assert!(!Path::new("/dev/mapper/speedy-share-1").exists());
}

#[test]
#[ignore = "needs device-mapper"]
fn a_container_can_have_more_room_than_its_image() {
    for kind in [Kind::Ext4, Kind::Xfs] {
        let node = Node::new("size", kind, 1024 * MIB);
        let driver = node.recovered(&[]);
        driver.reserve(&[id(1), id(2)]).unwrap();
        driver.create(&Creation::active(id(1), None)).unwrap();
        let size = node.options.size;
        let refused = driver.activate(&request(id(1), &[], Access::ReadWrite, Some(size / 2)));
        assert!(matches!(refused, Err(DriverError::Invalid(_))), "{refused:?}");
        driver.create(&Creation::active(id(2), Some(id(1)))).unwrap();
        for _ in 0..2 {
            let grown = Mounted::of(&driver, &request(id(2), &[id(1)], Access::ReadWrite, Some(2 * size)));
            let space = speedy::sys::space::space(grown.0.path()).unwrap();
            assert!(space.bytes > size * 3 / 2, "{space:?}");
        }
        // It is as large after everything was gone, and so is what stands on it.
        clear("size");
        let driver = node.recovered(&[id(1), id(2), id(3)]);
        driver.reserve(&[id(3)]).unwrap();
        driver.create(&Creation::active(id(3), Some(id(2)))).unwrap();
        for serial in [2, 3] {
            let grown = Mounted::of(&driver, &request(id(serial), &[], Access::ReadWrite, None));
            assert!(speedy::sys::space::space(grown.0.path()).unwrap().bytes > size * 3 / 2);
        }
    }
}

/// A volume whose user was killed has a journal to be replayed, which a view must not do.
#[test]
#[ignore = "needs device-mapper"]
fn a_volume_that_was_not_unmounted_can_be_viewed() {
    for kind in [Kind::Ext4, Kind::Xfs] {
        let node = Node::new("unclean", kind, 1024 * MIB);
        let driver = node.recovered(&[]);
        driver.reserve(&[id(1), id(2), id(3)]).unwrap();
        driver.create(&Creation::active(id(1), None)).unwrap();
        let used = Mounted::of(&driver, &request(id(1), &[], Access::ReadWrite, None));
        fs::write(used.path("file"), vec![7; 1 << 20]).unwrap();
        fs::File::open(used.path("file")).unwrap().sync_all().unwrap();
        // As the power would leave it, not as a snapshot of ours does.
        sh(
            "dmsetup suspend --nolockfs speedy-unclean-1; dmsetup message speedy-unclean-pool 0 'create_snap 18 17'; \
            dmsetup resume speedy-unclean-1",
        );
        drop(used);
        let below = [id(2)];
        let view = request(id(3), &below, Access::ReadOnly, None);
        driver
            .create(&Creation { access: Access::ReadOnly, ..Creation::active(id(3), Some(id(2))) })
            .unwrap();
        let seen = Mounted::of(&driver, &view);
        assert!(fs::write(seen.path("new"), "x").is_err());
    }
}

/// Half of the blocks are kept free: a snapshot is refused before those that are there meet the end.
#[test]
#[ignore = "needs device-mapper"]
fn a_full_pool_refuses_snapshots_and_is_freed_by_removing_some() {
    let mut node = Node::new("full", Kind::Ext4, 64 * MIB);
    node.options.pool.reserve = 50;
    let driver = node.recovered(&[]);
    driver.reserve(&[id(1), id(2), id(3)]).unwrap();
    driver.create(&Creation::active(id(1), None)).unwrap();
    let written = Mounted::of(&driver, &request(id(1), &[], Access::ReadWrite, None));
    fs::write(written.path("large"), vec![1; 40 << 20]).unwrap();
    drop(written);
    let refused = driver.create(&Creation::active(id(2), Some(id(1))));
    assert!(matches!(refused, Err(DriverError::Full { .. })), "{refused:?}");
    driver.create(&Creation { access: Access::ReadOnly, ..Creation::active(id(3), Some(id(1))) }).unwrap();
    driver.activate(&request(id(3), &[id(1)], Access::ReadOnly, None)).unwrap();
    driver.remove(id(3), NEVER).unwrap();
    // The end itself: an error, and no waiting.
    drop(driver);
    node.options.pool.reserve = 0;
    let driver = node.recovered(&[id(1), id(2)]);
    driver.create(&Creation::active(id(2), None)).unwrap();
    let over = Mounted::of(&driver, &request(id(2), &[], Access::ReadWrite, None));
    let wrote = fs::write(over.path("large"), vec![1; 40 << 20])
        .and_then(|()| fs::File::open(over.path("large"))?.sync_all());
    assert!(wrote.is_err());
    assert!(driver.create(&Creation::active(id(3), None)).is_err(), "out of data is no place for another");
    sh(&format!("umount {} || umount -l {}", over.0.path().display(), over.0.path().display()));
    std::mem::forget(over);
    driver.remove(id(2), NEVER).unwrap();
    driver.remove(id(1), NEVER).unwrap();
    // A larger file is a larger pool.
    node.options.pool.devices = Devices::Loop { bytes: 256 * MIB };
    drop(driver);
    let driver = node.recovered(&[id(3)]);
    assert_eq!(driver.status().unwrap().data.total, 256 * MIB / 65536);
    driver.create(&Creation::active(id(3), None)).unwrap();
}

/// Whatever is not ours is named and left as it is.
#[test]
#[ignore = "needs device-mapper"]
fn what_belongs_to_others_is_not_touched() {
    let node = Node::new("others", Kind::Ext4, 256 * MIB);
    // containerd's devmapper snapshotter leaves the transaction at 0 and counts from 1: its second snapshot was taken for a template of
    // ours that a kill had left half-made, and deleted.
    let driver = node.open().unwrap();
    sh("dmsetup message speedy-others-pool 0 'create_thin 2'");
    let told = driver.recover(&Known::default()).unwrap_err().to_string();
    assert!(told.contains("another program uses it"), "{told}");
    sh("dmsetup message speedy-others-pool 0 'delete 2'");
    drop(driver);
    let driver = node.recovered(&[]);
    driver.reserve(&[id(9)]).unwrap();
    sh("dmsetup message speedy-others-pool 0 'create_thin 21'");
    assert_eq!(driver.inventory().unwrap(), Inventory::Slots(vec![5]));
    let taken = driver.create(&Creation::active(id(5), None)).unwrap_err();
    assert!(taken.to_string().contains("not ours"), "{taken}");
    // The same with an origin that is in use: it goes on whatever became of the snapshot.
    driver.create(&Creation::active(id(1), None)).unwrap();
    let used = Mounted::of(&driver, &request(id(1), &[], Access::ReadWrite, None));
    driver.create(&Creation::active(id(5), Some(id(1)))).unwrap_err();
    assert_eq!(sh("dmsetup info -c --noheadings -o suspended speedy-others-1").trim(), "Active");
    fs::write(used.path("goes"), "on").unwrap();
    drop(used);
    driver.remove(id(5), NEVER).unwrap();
    assert_eq!(driver.inventory().unwrap(), Inventory::Slots(vec![1, 5]), "what is not ours stays");
    driver.remove(id(1), NEVER).unwrap();
    // Records that know nothing of it, older ones, and those of another pool.
    let refusal = |known: Known| driver.recover(&known).unwrap_err().to_string();
    let told = refusal(Known::default());
    assert!(told.contains("another program uses it"), "{told}");
    let told = refusal(Known { last_serial: 3, ..Known::default() });
    assert!(told.contains("metadata.db is an older copy"), "{told}");
    let told = refusal(Known { last_serial: 90, newest: 50, ..Known::default() });
    assert!(told.contains("older than the records"), "{told}");
    drop(driver);
    // A device of our name that is somebody else's.
    sh("dmsetup create speedy-others-77 --table '0 8 error'");
    let told = node.open().unwrap().recover(&Known { last_serial: 90, ..Known::default() }).unwrap_err();
    assert!(told.to_string().contains("another program"), "{told}");
    sh("dmsetup remove speedy-others-77");
    clear("others");
    // Files that hold something else.
    for (file, what) in [("metadata", "no pool"), ("data", "")] {
        let mut bytes = fs::read(node.file(file)).unwrap();
        bytes.truncate(4096);
        let path = node.file(file);
        let opened = fs::OpenOptions::new().write(true).open(&path).unwrap();
        opened.write_all_at(b"somebody's", 32).unwrap();
        let answer = node.open();
        if file == "metadata" {
            assert!(answer.unwrap_err().to_string().contains(what));
        }
        opened.write_all_at(&bytes, 0).unwrap();
        drop(opened);
        clear("others");
    }
    assert!(node.open().is_ok());
}

#[test]
#[ignore = "needs device-mapper"]
fn devices_given_are_taken_only_if_nobody_has_them() {
    let mut node = Node::new("direct", Kind::Ext4, 0);
    let files = tempfile::tempdir().unwrap();
    let device = |name: &str, mib: u64| {
        let path = files.path().join(name);
        fs::File::create(&path).unwrap().set_len(mib * MIB).unwrap();
        PathBuf::from(sh(&format!("losetup -f; losetup -f {}", path.display())).trim())
    };
    let (metadata, data) = (device("metadata", 8), device("data", 256));
    node.options.pool.devices = Devices::Direct { data: data.clone(), metadata: metadata.clone() };
    let held = fs::OpenOptions::new().read(true).custom_flags(0o200).open(&data).unwrap();
    let told = node.open().unwrap_err().to_string();
    assert!(told.contains("in use by another program"), "{told}");
    drop(held);
    sh(&format!("mke2fs -q -F {}", data.display()));
    let told = node.open().unwrap_err().to_string();
    assert!(told.contains("nothing was touched"), "{told}");
    sh(&format!("dd if=/dev/zero of={} bs=1M count=1 2>/dev/null; sync", data.display()));
    let driver = node.recovered(&[]);
    driver.reserve(&[id(1)]).unwrap();
    driver.create(&Creation::active(id(1), None)).unwrap();
    drop(driver);
    clear("direct");
    // It is there again when its devices are, and not without them.
    let gone = ThinOptions {
        pool: PoolOptions {
            devices: Devices::Direct { data: "/dev/not-there".into(), metadata: metadata.clone() },
            reserve: 10,
        },
        ..node.options.clone()
    };
    let told = Thin::open(node.dir.path(), gone).unwrap_err().to_string();
    assert!(told.contains("is not there"), "{told}");
    let driver = node.recovered(&[id(1)]);
    assert_eq!(driver.inventory().unwrap(), Inventory::Slots(vec![1]));
    clear("direct");
    sh(&format!("losetup -d {}; losetup -d {}", metadata.display(), data.display()));
}

/// Two layers as containerd hands them over, the second of which removes something of the first.
#[test]
#[ignore = "needs device-mapper"]
fn layers_are_applied_to_volumes() {
    let node = Node::new("apply", Kind::Ext4, 1024 * MIB);
    runtime().block_on(async {
        let meta = Arc::new(MetaStore::open(node.dir.path(), "thin").unwrap());
        let driver: Arc<dyn Driver> = Arc::new(node.open().unwrap());
        let applier =
            Applier::new(Arc::clone(&meta), Arc::clone(&driver), None, Limits::default(), node.dir.path());
        let policy = Policy {
            sharing: Sharing::Isolated,
            upperdir_label: UpperdirLabel::Hidden,
            cleanup_limit: Duration::from_secs(20),
            lookup_deadline: Duration::from_secs(5),
            room: Room { budget: 0, floor: 0 },
        };
        let snapshotter = Snapshotter::new(Arc::clone(&meta), driver, applier, Remote::default(), policy);
        snapshotter.start().await.unwrap();
        let first = Tar::of([
            Item::dir("etc"),
            Item::file("etc/kept", b"kept"),
            Item::file("etc/removed", b"x"),
            Item::file("bin/tool", b"tool"),
        ]);
        let second = Tar::of([Item::file("etc/.wh.removed", b""), Item::file("bin/other", b"other")]);
        let mut parent = None;
        for (at, tar) in [first, second].into_iter().enumerate() {
            let key = |name: &str| Key::new(&format!("default/{at}/{name}")).unwrap();
            let prepared =
                snapshotter.prepare(key("extract-1"), parent.clone(), Labels::new()).await.unwrap();
            let Prepared::Mounts(mounts) = prepared else { panic!("{prepared:?}") };
            assert!(snapshotter.is_ours(&mounts));
            let (blob, open) = (tar.clone(), tar.clone());
            let request = ApplyRequest {
                blob: Digest::parse(&format!("sha256:{}", "b".repeat(64))).unwrap(),
                media_type: "application/vnd.oci.image.layer.v1.tar".into(),
                mounts,
                open: Arc::new(move || Ok(Box::new(std::io::Cursor::new(open.clone())))),
            };
            let applied = snapshotter.apply(request).await.unwrap();
            assert_eq!((applied.how, applied.tar_size), (How::Files, blob.len() as u64));
            snapshotter.commit(key("layer"), key("extract-1"), None, Labels::new()).await.unwrap();
            parent = Some(key("layer"));
        }
        let looked = Key::new("default/3/look").unwrap();
        let seen = Mounted::new(&snapshotter.view(looked, parent, Labels::new()).await.unwrap()[0]);
        assert_eq!(fs::read(seen.path("etc/kept")).unwrap(), b"kept");
        assert_eq!(fs::read(seen.path("bin/tool")).unwrap(), b"tool");
        assert_eq!(fs::read(seen.path("bin/other")).unwrap(), b"other");
        assert!(!seen.path("etc/removed").exists() && !seen.path("etc/.wh.removed").exists());
        drop(seen);
        meta.close();
    });
}

// ---------------------------------------------------------------- the daemon

/// A daemon of thin volumes with its tag.
struct Served {
    place: Place,
    pool: PoolOptions,
}

impl Served {
    fn new() -> Served {
        let pool = PoolOptions { devices: Devices::Loop { bytes: 2048 * MIB }, reserve: 10 };
        Served { place: Place::new(), pool }
    }

    fn command(&self, crash: Option<&str>) -> Command {
        let mut command = self.place.command();
        command.env("SPEEDY_DRIVER", "thin").env("SPEEDY_THIN_SIZE", "64MiB");
        command.env("SPEEDY_POOL_RESERVE", format!("{}%", self.pool.reserve));
        match &self.pool.devices {
            Devices::Loop { bytes } => command.env("SPEEDY_POOL_SIZE", format!("{}MiB", bytes / MIB)),
            Devices::Direct { data, metadata } => command
                .env("SPEEDY_POOL_MODE", "direct")
                .env("SPEEDY_POOL_DATA", data)
                .env("SPEEDY_POOL_METADATA", metadata),
        };
        if let Some(step) = crash {
            command.env("THIN_CRASH", step);
        }
        command
    }

    fn tag(&self) -> String {
        metastore::read_property(&self.place.root(), "thin.tag").unwrap().unwrap()
    }

    /// Records, pool and devices agree, and nothing waits to be freed; the pool's blocks that are in use.
    fn require_equal(&self, context: &str) -> u64 {
        let root = self.place.root();
        let recorded = metastore::read_recorded(&root).unwrap().unwrap();
        let (kind, pool) = (Kind::Ext4, self.pool.clone());
        let options =
            ThinOptions { tag: self.tag(), kind, size: 64 * MIB, mount_options: vec![], discard: true, pool };
        let driver = Thin::open(&root, options).unwrap();
        let inventory = reconcile::Inventory::of(&driver, Vec::new()).unwrap();
        let plan = reconcile::plan(&recorded, &inventory);
        assert!(plan.is_empty(), "{context}: {plan:?}");
        assert!(recorded.removing.is_empty(), "{context}: {:?} not freed", recorded.removing);
        let used: Vec<u32> = recorded.volumes.iter().map(|(id, _)| id.slot).collect();
        let extra: Vec<u32> =
            inventory.volumes.unwrap().into_iter().filter(|slot| !used.contains(slot)).collect();
        assert!(extra.is_empty(), "{context}: volumes {extra:?} are no snapshot's");
        let known: Vec<String> = recorded.ids.iter().map(|id| id.serial.to_string()).collect();
        let prefix = format!("speedy-{}-", self.tag());
        for name in sh("dmsetup ls | cut -f1").lines().filter_map(|name| name.strip_prefix(&prefix)) {
            assert!(name == "pool" || known.iter().any(|serial| serial == name), "{context}: device {name}");
        }
        driver.status().unwrap().data.used
    }

    /// What `thin_check` says when nothing is active any more, where it is there.
    fn thin_check(&self, context: &str) {
        clear(&self.tag());
        let there = Command::new("pdata_tools").args(["thin_check", "-V"]).output().is_ok();
        let metadata = match &self.pool.devices {
            Devices::Loop { .. } => self.place.root().join("pool/metadata"),
            Devices::Direct { metadata, .. } => metadata.clone(),
        };
        if there {
            println!("{context}: {}", sh(&format!("pdata_tools thin_check {} 2>&1", metadata.display())));
        } else {
            println!("{context}: thin_check is not there, so the metadata were not checked");
        }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if let Ok(Some(tag)) = metastore::read_property(&self.place.root(), "thin.tag") {
            clear(&tag);
        }
    }
}

fn mount_of(mounts: Vec<speedy::proto::containerd::types::Mount>) -> Mount {
    let mount = mounts.into_iter().next().unwrap();
    Mount { kind: mount.r#type, source: mount.source, options: mount.options }
}

async fn started(served: &Served, crash: Option<&str>) -> (Daemon, Client) {
    let mut daemon = served.place.start_command(served.command(crash));
    let client = daemon.client(&served.place.socket()).await;
    (daemon, client)
}

/// One layer with a file, committed; a container on it that is removed; another child while the layer is still mounted.
async fn work(client: &mut Client, name: &str) -> Result<(), tonic::Status> {
    let (active, child) = (format!("{name}-active"), format!("{name}-child"));
    let answer = client.prepare(prepare(&active, "", &[])).await?.into_inner();
    let mounted = Mounted::new(&mount_of(answer.mounts));
    fs::write(mounted.path("file"), name.repeat(100_000)).unwrap();
    sh("sync");
    client.commit(commit(name, &active)).await?;
    client.prepare(prepare(&child, name, &[])).await?;
    drop(mounted);
    client.remove(wire::RemoveSnapshotRequest { key: child, ..Default::default() }).await?;
    client.cleanup(wire::CleanupRequest::default()).await?;
    Ok(())
}

async fn require_content(client: &mut Client, name: &str) {
    let key = format!("look at {name}");
    let view = wire::ViewSnapshotRequest { key: key.clone(), parent: name.into(), ..Default::default() };
    let seen = Mounted::new(&mount_of(client.view(view).await.unwrap().into_inner().mounts));
    assert_eq!(fs::read(seen.path("file")).unwrap(), name.repeat(100_000).into_bytes(), "{name}");
    drop(seen);
    client.remove(wire::RemoveSnapshotRequest { key, ..Default::default() }).await.unwrap();
}

#[test]
#[ignore = "needs device-mapper"]
fn kill_at_each_step_loses_nothing_and_leaks_nothing() {
    let served = Served::new();
    runtime().block_on(async {
        for step in ["template created", "template written"] {
            let mut daemon = served.place.start_command(served.command(Some(step)));
            assert!(!daemon.wait().success(), "{step}: {}", daemon.log());
        }
        let steps = [
            "snapshot made",
            "origin suspended",
            "device removed",
            "blocks discarded",
            "thin device deleted",
        ];
        for (at, step) in steps.into_iter().enumerate() {
            let (mut daemon, mut client) = started(&served, None).await;
            work(&mut client, &format!("whole{at}")).await.unwrap();
            daemon.signal("TERM");
            assert!(daemon.wait().success());
            let (mut daemon, mut client) = started(&served, Some(step)).await;
            let cut = work(&mut client, &format!("cut{at}")).await;
            assert!(cut.is_err(), "{step} was not reached");
            assert!(!daemon.wait().success());

            let (mut daemon, mut client) = started(&served, None).await;
            let names: Vec<String> = list(&mut client).await.into_iter().map(|info| info.name).collect();
            for name in names.iter().filter(|name| !name.contains('-')) {
                require_content(&mut client, name).await;
            }
            for name in names.iter().filter(|name| name.contains('-')) {
                let remove = wire::RemoveSnapshotRequest { key: name.clone(), ..Default::default() };
                client.remove(remove).await.unwrap();
            }
            assert!(names.contains(&format!("whole{at}")), "{step}: {names:?}");
            client.cleanup(wire::CleanupRequest::default()).await.unwrap();
            daemon.signal("TERM");
            assert!(daemon.wait().success(), "{}", daemon.log());
            served.require_equal(step);
        }
    });
    served.thin_check("killed at each step");
}

#[test]
#[ignore = "needs device-mapper"]
fn kill_at_any_instant_loses_no_answered_call() {
    let served = Served::new();
    let rounds = crash::number("CRASH_ROUNDS", 12);
    let answered = crash::kill_again_and_again(
        &served.place,
        &Loop {
            rounds,
            first_seed: crash::number("CRASH_SEED", 1),
            longest: Duration::from_millis(2500),
            command: &|| served.command(None),
            require_equal: &|context| {
                served.require_equal(context);
            },
        },
    );
    println!("{rounds} kills, {answered} answered calls");
    served.thin_check("killed at any instant");
}

#[test]
#[ignore = "needs device-mapper"]
fn the_daemon_serves_thin_volumes_beside_overlayfs() {
    let served = Served::new();
    let own = served.place.path("thin");
    runtime().block_on(async {
        let mut command = served.place.command();
        command
            .env("SPEEDY_THIN_ROOT", &own)
            .env("SPEEDY_THIN_SIZE", "64MiB")
            .env("SPEEDY_POOL_SIZE", "1GiB")
            .args(["--metrics", "127.0.0.1:0"]);
        let mut daemon = served.place.start_command(command);
        let mut client = daemon.client(&served.place.socket()).await;
        let of = |snapshotter: &str| wire::PrepareSnapshotRequest {
            snapshotter: snapshotter.into(),
            ..prepare("box", "", &[])
        };
        // One key, in two worlds.
        let stacked = mount_of(client.prepare(of("speedy")).await.unwrap().into_inner().mounts);
        let thin = mount_of(client.prepare(of("speedy-thin")).await.unwrap().into_inner().mounts);
        assert_eq!((stacked.kind.as_str(), thin.kind.as_str()), ("bind", "ext4"));
        let mounted = Mounted::new(&thin);
        let removed = |snapshotter: &str| wire::RemoveSnapshotRequest {
            snapshotter: snapshotter.into(),
            key: "box".into(),
        };
        let busy = client.remove(removed("speedy-thin")).await.unwrap_err();
        assert_eq!(busy.code(), tonic::Code::FailedPrecondition, "{busy:?}");
        assert!(busy.message().contains("is mounted or open; unmount it"), "{busy:?}");
        // Each root has its own numbers.
        let metrics = asked(&metrics_of(&daemon), "/metrics", "x");
        for line in [
            "speedy_snapshots{kind=\"active\"} 1",
            "speedy_snapshots{kind=\"active\",snapshotter=\"speedy-thin\"} 1",
            "speedy_pending_removals{snapshotter=\"speedy-thin\"} 0",
            "speedy_pool_free_percent{device=\"data\",snapshotter=\"speedy-thin\"} 99",
            "speedy_pool_trouble{snapshotter=\"speedy-thin\"} 0",
        ] {
            assert!(metrics.contains(line), "{line} is not in\n{metrics}");
        }
        let page = asked(&metrics_of(&daemon), "/", "127.0.0.1");
        assert!(page.contains("speedy-thin: 1 active"), "{page}");
        drop(mounted);
        client.remove(removed("speedy-thin")).await.unwrap();
        client.remove(removed("speedy")).await.unwrap();
        let label = [("containerd.io/snapshot/max-size", "134217728")];
        let sized = wire::PrepareSnapshotRequest {
            snapshotter: "speedy-thin".into(),
            ..prepare("large", "", &label)
        };
        let large = Mounted::new(&mount_of(client.prepare(sized).await.unwrap().into_inner().mounts));
        assert!(speedy::sys::space::space(large.0.path()).unwrap().bytes > 96 * MIB);
        drop(large);
        let small = [("containerd.io/snapshot/max-size", "33554432")];
        let sized = wire::PrepareSnapshotRequest {
            snapshotter: "speedy-thin".into(),
            ..prepare("small", "", &small)
        };
        let refused = client.prepare(sized).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{refused:?}");
        assert!(refused.message().contains("set thin.size to the smallest"), "{refused:?}");
        daemon.signal("TERM");
        assert!(daemon.wait().success(), "{}", daemon.log());
        assert!(daemon.log().contains("to try it out only"), "{}", daemon.log());
        // The root of one driver is not the other's.
        for (driver, root, made_by) in
            [("overlayfs", &own, "thin"), ("thin", &served.place.root(), "overlayfs")]
        {
            let mut other = Command::new(env!("CARGO_BIN_EXE_speedy"));
            other.env_clear().env("SPEEDY_DRIVER", driver).args(["serve", "--root"]).arg(root);
            let refused = other.arg("--address").arg(served.place.socket()).output().unwrap();
            let told = String::from_utf8_lossy(&refused.stderr).into_owned();
            let wanted = format!("was made by the driver {made_by}, not {driver}");
            assert!(!refused.status.success() && told.contains(&wanted), "{told}");
        }
    });
    let tag = metastore::read_property(&own, "thin.tag").unwrap().unwrap();
    clear(&tag);
}
