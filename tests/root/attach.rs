//! Layer images in the kernel: mounted both ways, below overlays, through id-mapped mounts, and given back.

use std::fs;
use std::io::{Read, Seek};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use speedy::driver::probe;
use speedy::layer::attach::{AttachError, Attached, Attacher, FRESH, Mode, Way};
use speedy::sys::idmap::IdMapped;
use speedy::sys::loopdev::LoopDevice;
use speedy::sys::mount::{self, DetachedErofs, ErofsIo, Unmount};
use speedy::sys::{mountinfo, readahead};

use crate::maker::{Maker, Node};
use crate::process::{drop_caches, require_root};

/// A root with attach points; whatever a failed test left mounted goes when it is dropped.
struct Root {
    dir: tempfile::TempDir,
}

impl Root {
    fn new() -> Root {
        require_root();
        let dir = tempfile::Builder::new().prefix("spd").tempdir().unwrap();
        fs::create_dir(dir.path().join("l")).unwrap();
        Root { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn image(&self, name: &str, maker: &Maker) -> PathBuf {
        let path = self.path(name);
        maker.make().write(&path);
        path
    }

    fn attacher(&self, mode: Mode) -> Attacher {
        Attacher::open(self.dir.path(), mode).unwrap()
    }

    /// Loop devices with a file below this root.
    fn loops(&self) -> Vec<String> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/sys/block").unwrap().flatten() {
            let backing = fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
            if backing.starts_with(self.dir.path().to_str().unwrap()) {
                found.push(format!("{:?}: {backing}", entry.file_name()));
            }
        }
        found
    }

    /// A device is let go a moment after its last user, whom we may not know (udev looks at every new one).
    fn require_no_loops(&self) {
        let end = Instant::now() + Duration::from_secs(5);
        while !self.loops().is_empty() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(self.loops(), Vec::<String>::new());
    }

    fn mounts(&self) -> Vec<PathBuf> {
        let below = |entry: &mountinfo::MountEntry| entry.point.starts_with(self.dir.path());
        let table = mountinfo::of_this_process().unwrap();
        table.into_iter().filter(below).map(|entry| entry.point).collect()
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        for point in self.mounts().iter().rev() {
            mount::unmount(point, Unmount::FromSight).unwrap();
        }
    }
}

struct Mounted(PathBuf);

impl Mounted {
    fn overlay(root: &Root, lower: &[PathBuf], name: &str) -> Mounted {
        for part in ["upper", "work", "merged"] {
            fs::create_dir_all(root.path(name).join(part)).unwrap();
        }
        let at = |part: &str| root.path(name).join(part).display().to_string();
        let lower: Vec<String> = lower.iter().map(|dir| dir.display().to_string()).collect();
        let options = format!("lowerdir={},upperdir={},workdir={}", lower.join(":"), at("upper"), at("work"));
        let target = root.path(name).join("merged");
        let mut mount = Command::new("mount");
        mount.args(["-t", "overlay", "overlay", "-o", &options]).arg(&target);
        assert!(mount.status().unwrap().success());
        Mounted(target)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        mount::unmount(&self.0, Unmount::FromSight).unwrap();
    }
}

/// The ways that this kernel has: files are mounted from Linux 6.12 on.
fn ways() -> Vec<Mode> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(['.', '-']).map(|part| part.trim().parse::<u32>().unwrap_or(0));
    match (numbers.next().unwrap(), numbers.next().unwrap()) >= (6, 12) {
        true => vec![Mode::FileBacked, Mode::Loop],
        false => vec![Mode::Loop],
    }
}

/// A layer of which every part is told from others by `mark`.
fn layer(mark: &str) -> Maker {
    let content = mark.repeat(3000);
    Maker::new()
        .root(Node::dir().owner(5, 6))
        .with("etc", Node::dir())
        .with(&format!("etc/{mark}"), Node::file(content.as_bytes()).xattr(1, b"mark", mark.as_bytes()))
        .with("etc/shared", Node::file(mark.as_bytes()).owner(1000, 1001))
        .with("suid", Node { mode: 0o104_755, ..Node::file(b"x") })
        .with("null", Node::special(0o020_666, 0x0103))
        .with("link", Node::symlink(b"etc/shared"))
        .link("again", "etc/shared")
}

#[test]
fn an_image_is_attached_read_and_detached_both_ways() {
    for mode in ways() {
        let root = Root::new();
        let attacher = root.attacher(mode);
        assert_eq!(attacher.way() == Way::Loop, mode == Mode::Loop);
        assert!(root.mounts().is_empty() && root.loops().is_empty());
        assert_eq!(fs::read_dir(root.dir.path()).unwrap().count(), 1, "the probe left something");
        let image = root.image("a.erofs", &layer("a"));
        let point = attacher.point(7);
        attacher.attach(&image, &point).unwrap();
        attacher.attach(&image, &point).unwrap();
        assert_eq!(root.mounts(), vec![point.clone()]);
        let image_path = fs::canonicalize(&image).unwrap();
        let [Attached { serial, image: below, device }] = &attacher.attached().unwrap()[..] else { panic!() };
        assert_eq!((*serial, below), (7, &Some(image_path)));
        assert_eq!(device.is_some(), mode == Mode::Loop);

        let fs_dir = point.join("fs");
        assert_eq!(fs::read_to_string(fs_dir.join("etc/a")).unwrap(), "a".repeat(3000));
        assert_eq!(fs::read_to_string(fs_dir.join("link")).unwrap(), "a");
        let shared = fs::metadata(fs_dir.join("etc/shared")).unwrap();
        assert_eq!((shared.uid(), shared.gid(), shared.nlink()), (1000, 1001, 2));
        assert_eq!((shared.mtime(), shared.mtime_nsec()), (1_000_000_000, 5));
        assert_eq!(shared.ino(), fs::metadata(fs_dir.join("again")).unwrap().ino());
        // Neither nosuid nor nodev: a bind mount of this directory would inherit them.
        assert_eq!(fs::metadata(fs_dir.join("suid")).unwrap().mode() & 0o7777, 0o4755);
        let mut null = String::new();
        fs::File::open(fs_dir.join("null")).unwrap().read_to_string(&mut null).unwrap();
        let table = mountinfo::of_this_process().unwrap();
        let entry = table.iter().find(|entry| entry.point == point).unwrap();
        assert!(entry.is_read_only() && !entry.options.iter().any(|o| o == "nosuid" || o == "nodev"));

        let other = root.image("b.erofs", &layer("b"));
        assert!(matches!(attacher.attach(&other, &point), Err(AttachError::Occupied(_))));
        attacher.detach(&point).unwrap();
        assert!(!point.exists() && root.mounts().is_empty());
        assert!(attacher.attached().unwrap().is_empty());
        attacher.detach(&point).unwrap();
        root.require_no_loops();
    }
}

/// What is attached through a loop device is covered by a mount of the file: who looks there next has that, who is there keeps his.
#[test]
fn a_loop_device_is_covered_under_whoever_uses_it() {
    let root = Root::new();
    if !ways().contains(&Mode::FileBacked) {
        // Nothing is covered there.
        let (image, point) = (root.image("a.erofs", &layer("a")), root.path("l/7"));
        root.attacher(Mode::Auto).attach(&image, &point).unwrap();
        root.attacher(Mode::Auto).cover(&image, &point).unwrap();
        return assert_eq!(root.mounts(), [point]);
    }
    let image = root.image("a.erofs", &layer("a"));
    let point = root.attacher(Mode::Loop).point(7);
    root.attacher(Mode::Loop).attach(&image, &point).unwrap();
    let overlay = Mounted::overlay(&root, &[point.join("fs")], "one");
    let file = fs::File::open(overlay.0.join("etc/a")).unwrap();
    let attacher = root.attacher(Mode::FileBacked);
    attacher.cover(&image, &point).unwrap();
    assert_eq!(attacher.attached().unwrap()[0].device, None);
    assert_eq!(std::io::read_to_string(&file).unwrap(), "a".repeat(3000));
    assert_eq!(fs::read_to_string(point.join("fs/etc/a")).unwrap(), "a".repeat(3000));
    let other = Mounted::overlay(&root, &[point.join("fs")], "two");
    attacher.detach(&point).unwrap();
    assert!(!point.exists());
    for overlay in [&overlay, &other] {
        assert_eq!(fs::read_to_string(overlay.0.join("etc/shared")).unwrap(), "a");
    }
    assert_eq!(root.loops().len(), 1);
    drop((file, overlay));
    root.require_no_loops();
}

/// An image that was written just now is read from memory, and later past it, also by who has it open; nothing is to do for it where
/// the kernel has only one of the two.
#[test]
fn a_fresh_image_is_read_from_memory_and_later_past_it() {
    let root = Root::new();
    let attacher = root.attacher(Mode::Auto);
    let (image, point) = (root.image("a.erofs", &layer("a")), attacher.point(7));
    attacher.attach(&image, &point).unwrap();
    let is_cached = || {
        let table = mountinfo::of_this_process().unwrap();
        mount::is_cached(table.iter().rfind(|entry| entry.point == point).unwrap())
    };
    if attacher.way() != Way::FileBacked(ErofsIo::Direct) {
        return assert!(attacher.cached().unwrap().is_empty());
    }
    assert_eq!((attacher.cached().unwrap(), is_cached()), (vec![7], true));
    assert!(attacher.cached().unwrap().is_empty(), "it is looked for only once");
    assert_eq!(root.attacher(Mode::Auto).cached().unwrap(), [7], "by a daemon that was started later, too");
    attacher.settle(&image, &point).unwrap();
    assert_eq!(
        (attacher.cached().unwrap(), is_cached()),
        (vec![7], true),
        "too early: it is looked for again"
    );

    let overlay = Mounted::overlay(&root, &[point.join("fs")], "one");
    let open = fs::File::open(overlay.0.join("etc/a")).unwrap();
    let mut first = [0; 1000];
    open.read_exact_at(&mut first, 0).unwrap();
    let old = std::time::SystemTime::now() - FRESH - Duration::from_secs(1);
    fs::File::options().append(true).open(&image).unwrap().set_modified(old).unwrap();
    attacher.settle(&image, &point).unwrap();
    assert!(!is_cached() && attacher.cached().unwrap().is_empty());
    for cached in ["memory", "disk"] {
        assert_eq!(std::io::read_to_string(&open).unwrap(), "a".repeat(3000), "from {cached}");
        drop_caches();
        (&open).rewind().unwrap();
    }
    assert!(root.attacher(Mode::Auto).cached().unwrap().is_empty());
    // One that is old enough is attached so at once.
    drop((open, overlay));
    attacher.detach(&point).unwrap();
    attacher.settle(&image, &point).unwrap();
    attacher.attach(&image, &point).unwrap();
    assert!(!is_cached());
    let ahead = readahead::of_mount(fs::File::open(&point).unwrap());
    let disk = readahead::of_disk(&image).unwrap_or(128);
    assert_eq!(ahead.unwrap(), disk.clamp(128, 1024), "as the disk, but within these");
    attacher.detach(&point).unwrap();
}

#[test]
fn an_overlay_on_attached_layers_works_and_outlives_them() {
    for mode in ways() {
        let root = Root::new();
        let attacher = root.attacher(mode);
        let lower = layer("low").with("gone", Node::file(b"x")).with("dir", Node::dir());
        let lower = lower.with("dir/hidden", Node::file(b"x")).with("kept", Node::dir());
        let lower = lower.with("kept/below", Node::file(b"x"));
        let upper = layer("up").with("gone", Node::whiteout()).with("dir", Node::dir().opaque());
        let upper = upper.with("dir/new", Node::file(b"new")).with("kept", Node::dir());
        let images = [root.image("low.erofs", &lower), root.image("up.erofs", &upper)];
        let points = [attacher.point(1), attacher.point(2)];
        for (image, point) in images.iter().zip(&points) {
            attacher.attach(image, point).unwrap();
        }
        let overlay = Mounted::overlay(&root, &[points[1].join("fs"), points[0].join("fs")], "c");
        let merged = &overlay.0;
        let names = |dir: &str| {
            let entries = fs::read_dir(merged.join(dir)).unwrap();
            let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        assert_eq!(names("etc"), ["low", "shared", "up"]);
        assert_eq!(names("dir"), ["new"]);
        assert_eq!(names("kept"), ["below"]);
        assert!(!merged.join("gone").exists());
        assert_eq!(fs::read_to_string(merged.join("etc/shared")).unwrap(), "up");
        fs::write(merged.join("etc/low"), "changed").unwrap();
        fs::remove_file(merged.join("etc/up")).unwrap();

        // What the container has open, and what it has not yet seen, both stay.
        let open = fs::File::open(merged.join("kept/below")).unwrap();
        for (image, point) in images.iter().zip(&points) {
            attacher.detach(point).unwrap();
            fs::remove_file(image).unwrap();
        }
        assert!(attacher.attached().unwrap().is_empty());
        assert_eq!(root.mounts(), vec![merged.clone()]);
        let drop_caches = fs::write("/proc/sys/vm/drop_caches", "3");
        assert!(drop_caches.is_ok());
        let mut byte = [0];
        open.read_exact_at(&mut byte, 0).unwrap();
        assert_eq!(&byte, b"x");
        assert_eq!(fs::read_to_string(merged.join("dir/new")).unwrap(), "new");
        assert_eq!(fs::read_to_string(merged.join("etc/low")).unwrap(), "changed");
        assert_eq!(names("etc"), ["low", "shared"]);
        drop(open);
        drop(overlay);
        root.require_no_loops();
    }
}

#[test]
fn a_file_open_at_the_attach_point_is_read_on_after_a_detach() {
    let root = Root::new();
    let attacher = root.attacher(Mode::Loop);
    let image = root.image("a.erofs", &layer("a"));
    attacher.attach(&image, &attacher.point(1)).unwrap();
    let mut open = fs::File::open(attacher.point(1).join("fs/etc/a")).unwrap();
    attacher.detach(&attacher.point(1)).unwrap();
    assert!(!attacher.point(1).exists());
    let mut text = String::new();
    open.read_to_string(&mut text).unwrap();
    assert_eq!(text.len(), 3000);
    assert_eq!(root.loops().len(), 1);
    drop(open);
    root.require_no_loops();
}

/// As containerd mounts a container of a user namespace: one recursive id-mapped clone of the lowerdirs' parent.
#[test]
fn an_id_mapped_clone_of_the_parent_shows_the_layers_mapped() {
    for mode in ways() {
        let root = Root::new();
        let attacher = root.attacher(mode);
        let image = root.image("a.erofs", &layer("a"));
        for serial in [1, 2] {
            attacher.attach(&image, &attacher.point(serial)).unwrap();
        }
        let target = root.path("mapped");
        fs::create_dir(&target).unwrap();
        let mapped = IdMapped::mount(&root.path("l"), &target, 100_000, 65_536).unwrap();
        for serial in ["1", "2"] {
            let shared = fs::metadata(target.join(serial).join("fs/etc/shared")).unwrap();
            assert_eq!((shared.uid(), shared.gid()), (101_000, 101_001));
        }
        let overlay = Mounted::overlay(&root, &[target.join("1/fs"), root.path("l/2/fs")], "c");
        assert_eq!(fs::metadata(overlay.0.join("etc/shared")).unwrap().uid(), 101_000);
        drop(mapped);
        assert_eq!(fs::read_to_string(overlay.0.join("etc/shared")).unwrap(), "a");
        drop(overlay);
        for serial in [1, 2] {
            attacher.detach(&attacher.point(serial)).unwrap();
        }
        root.require_no_loops();
    }
}

/// In a mount namespace that does not see the mount, the lowerdir is not there.
#[test]
fn where_the_mount_is_not_visible_there_is_no_layer() {
    let root = Root::new();
    let attacher = root.attacher(Mode::Auto);
    let image = root.image("a.erofs", &layer("a"));
    let mut elsewhere = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", "read go; ls \"$0\""])
        .arg(attacher.point(1))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(300));
    attacher.attach(&image, &attacher.point(1)).unwrap();
    drop(elsewhere.stdin.take());
    let seen = elsewhere.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(seen.stdout).unwrap(), "");
    attacher.detach(&attacher.point(1)).unwrap();
}

#[test]
fn what_stands_at_an_attach_point_is_left_alone() {
    for mode in ways() {
        let root = Root::new();
        let attacher = root.attacher(mode);
        let image = root.image("a.erofs", &layer("a"));
        let elsewhere = root.path("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        symlink(&elsewhere, attacher.point(1)).unwrap();
        fs::write(attacher.point(2), "x").unwrap();
        fs::create_dir_all(attacher.point(3).join("fs")).unwrap();
        fs::create_dir(attacher.point(4)).unwrap();
        let tmpfs = Command::new("mount").args(["-t", "tmpfs", "none"]).arg(attacher.point(4)).status();
        assert!(tmpfs.unwrap().success());
        fs::write(attacher.point(4).join("file"), "x").unwrap();
        for serial in 1..=4 {
            let refused = attacher.attach(&image, &attacher.point(serial));
            assert!(matches!(refused, Err(AttachError::Occupied(_))), "{serial}: {refused:?}");
            let refused = attacher.detach(&attacher.point(serial));
            assert!(matches!(refused, Err(AttachError::Occupied(_))), "{serial}: {refused:?}");
        }
        assert!(attacher.point(3).join("fs").exists() && attacher.point(4).join("file").exists());
        assert!(fs::read_dir(&elsewhere).unwrap().next().is_none());
        root.require_no_loops();
    }
}

#[test]
fn images_that_the_kernel_refuses_leave_nothing_behind() {
    for mode in ways() {
        let root = Root::new();
        let attacher = root.attacher(mode);
        let good = layer("a").make();
        let point = attacher.point(1);
        let attach = |bytes: &[u8]| {
            let image = root.path("bad.erofs");
            fs::write(&image, bytes).unwrap();
            let refused = attacher.attach(&image, &point).unwrap_err();
            assert!(!point.exists() && root.mounts().is_empty(), "{refused}");
            refused
        };
        let patched = |at: usize, byte: u8| {
            let mut bytes = good.bytes.clone();
            bytes[at] = byte;
            bytes
        };
        assert!(matches!(attach(&[]), AttachError::Refused { .. }));
        assert!(matches!(attach(&[0; 65536]), AttachError::Refused { .. }));
        assert!(matches!(attach(&good.bytes[..8192]), AttachError::Refused { .. }));
        assert!(matches!(attach(&patched(1024, 0)), AttachError::Refused { .. }));
        assert!(matches!(attach(&patched(1024 + 12, 30)), AttachError::Refused { .. }));
        assert!(matches!(attach(&patched(1024 + 83, 0x80)), AttachError::Refused { .. }));
        // The root is a file, and its number leads to nothing.
        assert!(matches!(attach(&patched(good.inodes[""] + 5, 0x81)), AttachError::Refused { .. }));
        assert!(matches!(attach(&patched(1024 + 14, 0xf0)), AttachError::Refused { .. }));
        let name = good.blocks[""] + usize::from(good.bytes[good.blocks[""] + 24 + 8]);
        assert!(matches!(attach(&patched(name, b'g')), AttachError::NoTree(_)));
        let missing = attacher.attach(&root.path("nowhere.erofs"), &point);
        assert!(matches!(missing, Err(AttachError::Missing(_))), "{missing:?}");
        // A directory that was there before stays.
        fs::create_dir(&point).unwrap();
        fs::write(root.path("bad.erofs"), [0; 8192]).unwrap();
        assert!(attacher.attach(&root.path("bad.erofs"), &point).is_err());
        assert!(point.exists());
        attacher.attach(&root.image("good.erofs", &layer("a")), &point).unwrap();
        attacher.detach(&point).unwrap();
        root.require_no_loops();
    }
}

#[test]
fn two_hundred_layers_are_attached_at_once() {
    for mode in ways() {
        let root = Root::new();
        let attacher = root.attacher(mode);
        let images: Vec<PathBuf> =
            (0..200).map(|n| root.image(&format!("{n}.erofs"), &layer(&format!("m{n}")))).collect();
        let begin = Instant::now();
        std::thread::scope(|scope| {
            for half in 0..2 {
                let (attacher, images) = (&attacher, &images);
                scope.spawn(move || {
                    for (serial, image) in images.iter().enumerate().filter(|(serial, _)| serial % 2 == half)
                    {
                        attacher.attach(image, &attacher.point(serial as u64)).unwrap();
                    }
                });
            }
        });
        let attaching = begin.elapsed();
        let serials: Vec<u64> = attacher.attached().unwrap().iter().map(|a| a.serial).collect();
        assert_eq!(serials, (0..200).collect::<Vec<u64>>());
        let lower: Vec<PathBuf> = (0..100).map(|serial| root.path(&format!("l/{serial}/fs"))).collect();
        // Short names: a hundred lowerdirs must fit a page of options.
        std::env::set_current_dir("/").unwrap();
        let overlay = Mounted::overlay(&root, &lower[..60], "c");
        assert_eq!(fs::read_to_string(overlay.0.join("etc/m59")).unwrap(), "m59".repeat(3000));
        drop(overlay);
        let begin = Instant::now();
        (0..200).for_each(|serial| attacher.detach(&attacher.point(serial)).unwrap());
        println!("{mode:?}: 200 attached in {attaching:?}, detached in {:?}", begin.elapsed());
        root.require_no_loops();
    }
}

/// One after the other: what a container's start waits for.
#[test]
fn attaching_takes_milliseconds() {
    for mode in ways() {
        let root = Root::new();
        let attacher = root.attacher(mode);
        let image = root.image("a.erofs", &layer("a"));
        let (mut attaching, mut detaching) = (Vec::new(), Vec::new());
        for serial in 0..50 {
            let point = attacher.point(serial);
            let begin = Instant::now();
            attacher.attach(&image, &point).unwrap();
            attaching.push(begin.elapsed());
            let begin = Instant::now();
            attacher.detach(&point).unwrap();
            detaching.push(begin.elapsed());
        }
        attaching.sort();
        detaching.sort();
        println!(
            "{mode:?} ({}): attach {:?} (longest {:?}), detach {:?} (longest {:?})",
            attacher.way(),
            attaching[25],
            attaching[49],
            detaching[25],
            detaching[49]
        );
        assert!(attaching[25] < Duration::from_millis(500));
    }
}

/// The descriptors of a killed process are closed by the kernel, whatever it had done so far.
#[test]
fn what_is_mounted_but_not_shown_goes_with_its_holder() {
    let root = Root::new();
    let image = root.image("a.erofs", &layer("a"));
    let device = LoopDevice::open(&fs::File::open(&image).unwrap(), &image).unwrap();
    assert!(fs::metadata(device.path()).unwrap().file_type().is_block_device());
    assert_eq!(root.loops().len(), 1);
    let sysfs = Path::new("/sys/block").join(device.path().file_name().unwrap());
    let read = |name: &str| fs::read_to_string(sysfs.join(name)).unwrap().trim().to_owned();
    assert_eq!((read("ro"), read("loop/autoclear")), ("1".into(), "1".into()));
    assert_eq!((read("queue/logical_block_size"), read("loop/dio")), ("4096".into(), "1".into()));
    let mounted = DetachedErofs::mount(device.path(), ErofsIo::Default).unwrap();
    drop(device);
    assert_eq!(root.loops().len(), 1);
    assert!(mounted.has_directory("fs").unwrap() && !mounted.has_directory("fx").unwrap());
    drop(mounted);
    root.require_no_loops();
    assert!(root.mounts().is_empty());
}

const CHILD: &str = "TEST_ATTACH_ROOT";

/// Probes, attaches and detaches until it is killed.
#[test]
#[ignore = "a part of a_killed_process_leaves_what_the_next_one_cleans, which starts it"]
fn child_that_is_killed() {
    let root = PathBuf::from(std::env::var_os(CHILD).unwrap());
    for round in 0.. {
        let ways = ways();
        let mode = ways[round % ways.len()];
        let attacher = Attacher::open(&root, mode).unwrap();
        for serial in 0..5 {
            attacher.attach(&root.join("a.erofs"), &attacher.point(serial)).unwrap();
        }
        (0..5).for_each(|serial| attacher.detach(&attacher.point(serial)).unwrap());
    }
}

#[test]
fn a_killed_process_leaves_what_the_next_one_cleans() {
    let root = Root::new();
    let image = root.image("a.erofs", &layer("a"));
    for round in 0..25 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "attach::child_that_is_killed", "--ignored"])
            .env(CHILD, root.dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(20 + round * 7));
        assert!(child.try_wait().unwrap().is_none(), "the child ended by itself");
        child.kill().unwrap();
        child.wait().unwrap();

        probe::clear_leftovers(root.dir.path());
        let attacher = root.attacher(ways()[usize::try_from(round).unwrap() % ways().len()]);
        for serial in 0..5 {
            // Both are right for what may be there: going on with it, and taking it away.
            if serial == 0 {
                attacher.attach(&image, &attacher.point(serial)).unwrap();
                assert!(attacher.point(serial).join("fs/etc/a").exists());
            }
            attacher.detach(&attacher.point(serial)).unwrap();
        }
        assert!(root.mounts().is_empty() && attacher.attached().unwrap().is_empty());
        let mut left: Vec<_> =
            fs::read_dir(root.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["a.erofs", "l"]);
        assert_eq!(fs::read_dir(root.path("l")).unwrap().count(), 0);
        root.require_no_loops();
    }
}

/// Without the rights to mount: the reason is named, nothing is left.
#[test]
fn a_node_without_mounts_says_so() {
    let root = Root::new();
    // An image on an overlay: a file-backed mount refuses a backing file system that is stacked itself... a loop takes it.
    fs::create_dir(root.path("low")).unwrap();
    let overlay = Mounted::overlay(&root, &[root.path("low")], "c");
    let way = Attacher::probe(&overlay.0, Mode::Auto).unwrap();
    println!("on an overlay: {way}");
    let nowhere = Attacher::probe(&root.path("nowhere"), Mode::Auto);
    assert!(matches!(nowhere, Err(AttachError::Io { .. })), "{nowhere:?}");
    let unsupported = AttachError::Unsupported {
        file_backed: Some(std::io::ErrorKind::Unsupported.into()),
        loop_device: None,
    };
    let text = unsupported.to_string();
    assert!(text.contains("modprobe erofs loop") && text.contains("not tried"), "{text}");
}
