//! Layer images as the kernel, `fsck.erofs` and `blkid` see them, beside what containerd's own applier makes of the same layers.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, SystemTime};

use speedy::image::below::{self, Found};
use speedy::image::check::Metadata;
use speedy::image::{Attributes, Below, Facts, ImageError};

use crate::layers::cases::{self, Fate};
use crate::layers::seen::{self, Tree};
use crate::layers::{Item, Tar, image_on, random};
use crate::process::require_root;

/// A file system of its own, so that what it can hold does not depend on where the tests run.
struct Disk {
    dir: tempfile::TempDir,
}

impl Disk {
    fn new() -> Disk {
        require_root();
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        File::create(&disk).unwrap().set_len(2 << 30).unwrap();
        run(Command::new("mkfs.ext4").args(["-q", "-O", "ea_inode", "-N", "200000"]).arg(&disk));
        let at = dir.path().join("at");
        std::fs::create_dir(&at).unwrap();
        run(Command::new("mount").args(["-o", "loop"]).arg(&disk).arg(&at));
        Disk { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("at").join(name)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        umount(&self.dir.path().join("at"));
    }
}

/// Children that other tests start hold our open files until they become their programs.
fn umount(at: &Path) {
    let umount = || Command::new("umount").arg(at).output().is_ok_and(|output| output.status.success());
    let busy = (0..100).take_while(|_| !umount()).map(|_| sleep(Duration::from_millis(20))).count();
    assert!(busy < 100 || std::thread::panicking(), "{} is still in use", at.display());
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// containerd's applier as a program: `CONTAINERD_APPLIER`, or built here.
fn applier() -> PathBuf {
    if let Some(path) = std::env::var_os("CONTAINERD_APPLIER") {
        return path.into();
    }
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("apply");
    let module = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/conformance");
    run(Command::new("go").arg("build").arg("-o").arg(&path).arg("./apply").current_dir(module));
    path
}

fn apply(layers: &[PathBuf], parents: &[PathBuf]) {
    let parents: Vec<&str> = parents.iter().map(|path| path.to_str().unwrap()).collect();
    run(Command::new(applier()).arg("-parents").arg(parents.join(":")).args(layers));
}

/// What the kernel shows of an image.
fn mounted(image: &Path, at: &Path) -> Tree {
    std::fs::create_dir_all(at).unwrap();
    run(Command::new("mount").args(["-t", "erofs", "-o", "ro,loop"]).arg(image).arg(at));
    let tree = std::panic::catch_unwind(|| {
        let names: Vec<_> = std::fs::read_dir(at).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["fs"]);
        seen::in_directory(&at.join("fs"))
    });
    umount(at);
    tree.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Time stamps that the applier took from the clock are of no interest.
fn assert_same(name: &str, ours: &Tree, theirs: &Tree, during: std::ops::Range<i64>) {
    for (path, their) in theirs {
        let path_shown = seen::shown(path);
        let mut our = ours.get(path).unwrap_or_else(|| panic!("{name}: {path_shown} is missing")).clone();
        let mut their = their.clone();
        if during.contains(&their.mtime.0) {
            assert!(their.is_directory() || their.is_whiteout(), "{name}: {path_shown}");
            our.mtime = their.mtime;
        }
        if their.is_directory() {
            // Not every file system counts the links of directories.
            our.links = their.links;
        }
        // The kernel of the test machine may label all files.
        their.xattrs.remove(&b"security.selinux"[..]);
        assert_eq!(our, their, "{name}: {path_shown}");
    }
    let more: Vec<_> =
        ours.keys().filter(|path| !theirs.contains_key(*path)).map(|path| seen::shown(path)).collect();
    assert!(more.is_empty(), "{name}: {more:?} should not be there");
}

fn now() -> i64 {
    i64::try_from(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()).unwrap()
}

/// One layer, both ways. `true` if it was kept.
fn compare(disk: &Disk, name: &str, at: &Path, fate: Option<Fate>, below: &dyn Below, start: i64) -> bool {
    let tar = std::fs::read(at).unwrap();
    let image = at.with_extension("erofs");
    let ours: Result<Facts, ImageError> = image_on(&tar, &File::create_new(&image).unwrap(), below);
    let refusal = std::fs::read_to_string(at.with_extension("error")).ok();
    match (&ours, &refusal) {
        (Ok(_), None) => {
            run(Command::new("fsck.erofs").arg(&image));
            let theirs = seen::in_directory(&at.with_extension(""));
            let during = start - 1..now() + 1;
            assert_same(name, &seen::in_image(&File::open(&image).unwrap()), &theirs, during.clone());
            assert_same(name, &mounted(&image, &disk.path("mnt")), &theirs, during);
        }
        (Err(_), Some(_)) => {}
        (Ok(_), Some(_)) if fate == Some(Fate::KeptHere) => mounted(&image, &disk.path("mnt")).clear(),
        (Err(_), None) if fate == Some(Fate::RefusedHere) => {}
        _ => panic!("{name}: here {ours:?}, containerd {refusal:?}"),
    }
    std::fs::remove_file(&image).unwrap();
    ours.is_ok() && refusal.is_none()
}

#[test]
fn i3_every_case_is_what_containerd_makes_of_it() {
    let disk = Disk::new();
    let cases = cases::all();
    let path = |number: usize| disk.path(&format!("case{number}.tar"));
    for (number, case) in cases.iter().enumerate() {
        std::fs::write(path(number), &case.tar).unwrap();
    }
    let start = now();
    apply(&(0..cases.len()).map(path).collect::<Vec<_>>(), &[]);
    for (number, case) in cases.iter().enumerate() {
        let nothing = speedy::image::NothingBelow;
        let kept = compare(&disk, case.name, &path(number), Some(case.fate), &nothing, start);
        assert_eq!(kept, case.fate == Fate::Kept, "{}", case.name);
    }
}

#[test]
fn i3_random_layers_are_what_containerd_makes_of_them() {
    let disk = Disk::new();
    let count = std::env::var("RANDOM_LAYERS").map_or(600, |count| count.parse().unwrap());
    let path = |seed: u64| disk.path(&format!("random{seed}.tar"));
    for seed in 0..count {
        std::fs::write(path(seed), random::layer(seed)).unwrap();
    }
    let start = now();
    apply(&(0..count).map(path).collect::<Vec<_>>(), &[]);
    let nothing = speedy::image::NothingBelow;
    let kept = (0..count)
        .filter(|seed| compare(&disk, &format!("seed {seed}"), &path(*seed), None, &nothing, start))
        .count();
    println!("{kept} of {count} random layers were kept");
    assert!(kept as u64 > count / 4);
}

/// Layers on this machine, the topmost first.
enum Lowers {
    Directories(Vec<PathBuf>),
    Images(Vec<Metadata<File>>),
}

impl Below for Lowers {
    fn directory(&self, path: &[&[u8]]) -> std::io::Result<Option<Attributes>> {
        let mut found: Box<dyn Iterator<Item = std::io::Result<Found>>> = match self {
            Lowers::Directories(roots) => Box::new(roots.iter().map(|root| below::in_directory(root, path))),
            Lowers::Images(images) => Box::new(images.iter().map(|image| below::in_image(image, path))),
        };
        match found.find(|found| !matches!(found, Ok(Found::Nothing))).transpose()? {
            Some(Found::Directory(attributes)) => Ok(Some(attributes)),
            _ => Ok(None),
        }
    }
}

/// A stack of layers, the lowest first, unpacked by containerd's applier.
struct Unpacked<'d> {
    disk: &'d Disk,
    name: String,
    /// The topmost first.
    directories: Vec<PathBuf>,
    images: Vec<Metadata<File>>,
}

impl<'d> Unpacked<'d> {
    fn new(disk: &'d Disk, name: &str, layers: &[Vec<Item>]) -> Unpacked<'d> {
        let (name, directories, images) = (name.to_owned(), Vec::new(), Vec::new());
        let mut unpacked = Unpacked { disk, name, directories, images };
        for (number, layer) in layers.iter().enumerate() {
            let path = unpacked.write(&number.to_string(), layer);
            apply(std::slice::from_ref(&path), &unpacked.directories);
            assert!(!path.with_extension("error").exists(), "{path:?}");
            let image = File::create_new(path.with_extension("lower")).unwrap();
            let tar = std::fs::read(&path).unwrap();
            let lowers = Lowers::Images(std::mem::take(&mut unpacked.images));
            let layout = image_on(&tar, &image, &lowers).unwrap().layout;
            let Lowers::Images(mut images) = lowers else { unreachable!() };
            let image = File::open(path.with_extension("lower")).unwrap();
            images.insert(0, Metadata::open(image, &layout).unwrap());
            unpacked.images = images;
            unpacked.directories.insert(0, path.with_extension(""));
        }
        unpacked
    }

    fn write(&self, layer: &str, items: &[Item]) -> PathBuf {
        let path = self.disk.path(&format!("{}-{layer}.tar", self.name));
        std::fs::write(&path, Tar::of(items.to_vec())).unwrap();
        path
    }

    /// What a layer on top becomes. `true` if it was kept.
    fn compare(self, top: &[Item], fate: Option<Fate>) -> bool {
        let path = self.write("top", top);
        let start = now();
        apply(std::slice::from_ref(&path), &self.directories);
        let on = |lowers: &Lowers| compare(self.disk, &self.name, &path, fate, lowers, start);
        let kept = on(&Lowers::Directories(self.directories.clone()));
        assert_eq!(on(&Lowers::Images(self.images)), kept, "{}", self.name);
        kept
    }
}

#[test]
fn i3_implied_directories_are_what_containerd_makes_of_them() {
    let disk = Disk::new();
    let bottom = vec![
        Item::dir("usr").mode(0o751).owner(1, 2).mtime(5),
        Item::dir("usr/lib").mode(0o2775).owner(3, 4).xattr("user.below", b"1"),
        Item::symlink("lib", "/usr/lib"),
        Item::dir("var").mode(0o700),
        Item::dir("var/tmp").mode(0o1777),
        Item::dir("gone").mode(0o700),
        Item::file("file", b""),
    ];
    let middle = vec![
        Item::file("usr/.wh..wh..opq", b""),
        Item::dir("usr").mode(0o755).owner(9, 9),
        Item::file(".wh.gone", b""),
        Item::dir("file").mode(0o711),
    ];
    let top = [
        Item::file("usr/lib/new/a", b"x"),
        Item::file("lib/b", b"x"),
        Item::file("var/tmp/c", b"x"),
        Item::file("gone/d", b"x"),
        Item::file("file/e", b"x"),
        Item::file("nowhere/f", b"x"),
        Item::file("usr/lib/.wh.g", b""),
        Item::dir("var").mode(0o755),
    ];
    assert!(Unpacked::new(&disk, "on two layers", &[bottom, middle]).compare(&top, None));
}

/// Attributes of what a layer implies were looked up as the kernel follows symlinks; containerd follows them as text, asks each
/// layer by itself, and sets xattrs that the new directory does not have.
#[test]
fn i3_implied_directories_follow_symlinks_below_as_containerd_does() {
    let disk = Disk::new();
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let name = |n: usize| format!("l{n:02}");
    let chain = |length: usize| {
        let link = move |n| Item::symlink(name(n), if n + 1 == length { "end".into() } else { name(n + 1) });
        (0..length).map(link).chain([Item::dir("end").mode(0o705)]).collect::<Vec<_>>()
    };
    let bottom = vec![
        Item::dir("a").mode(0o701),
        Item::dir("a/b").mode(0o702).xattr("user.one", b"1").xattr("user.more", b"2"),
        Item::dir("a/c").mode(0o703),
        Item::dir("c").mode(0o704).xattr("security.capability", capability),
        Item::symlink("s", "a/b"),
        Item::symlink("abs", "/a/b"),
        Item::symlink("textual", "s/../c"),
        Item::symlink("a/up", "../../../../c"),
        Item::symlink("dangling", "nowhere/at/all"),
        Item::symlink("to-file", "file"),
        Item::file("file", b""),
    ];
    let above = vec![
        // The same name in another layer: the layer alone decides where it leads.
        Item::dir("d").mode(0o706).xattr("user.two", b"2"),
        Item::symlink("redirected", "d"),
        Item::symlink("nothing-here", "a/b"),
    ];
    let top =
        ["s", "abs", "textual", "a/up", "dangling", "dangling/x", "to-file", "redirected", "nothing-here"]
            .map(|path| Item::file(format!("{path}/file"), b"x"));
    assert!(Unpacked::new(&disk, "links below", &[bottom, above]).compare(&top, None));
    let implied = |path: &str| [Item::file(format!("{path}/file"), b"x")];
    assert!(Unpacked::new(&disk, "forty", &[chain(40)]).compare(&implied("l00"), None));
    // Nobody could open what containerd takes the attributes of.
    let refused = Some(Fate::RefusedHere);
    assert!(!Unpacked::new(&disk, "more", &[chain(41)]).compare(&implied("l00"), refused));
    let endless = vec![Item::symlink("loop", "loop")];
    assert!(!Unpacked::new(&disk, "a loop", &[endless]).compare(&implied("loop"), None));
    // containerd fails where a file below is in the way of a directory further down.
    let file = vec![Item::file("f", b"")];
    assert!(!Unpacked::new(&disk, "a file", &[file]).compare(&implied("f/g"), Some(Fate::KeptHere)));
}

/// A block device's content that `blkid` takes for something.
fn signatures() -> Vec<(&'static str, Vec<u8>)> {
    let mut ext4 = tempfile::NamedTempFile::new().unwrap();
    ext4.as_file().set_len(4 << 20).unwrap();
    run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(ext4.path()));
    ext4.flush().unwrap();
    let blank = || vec![0_u8; 8 << 20];
    let put =
        |bytes: &mut Vec<u8>, at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);

    let mut lvm = blank();
    put(&mut lvm, 512, b"LABELONE\x01\0\0\0\0\0\0\0\0\0\0\0\x20\0\0\0LVM2 001");
    put(&mut lvm, 544, b"0123456789abcdef0123456789abcdef");
    // LVM's checksum: that of zlib with another beginning and no inversion at the end.
    let sum = crc(&lvm[532..1024], 0xedb8_8320, 0xf597_a6cf);
    put(&mut lvm, 528, &sum.to_le_bytes());

    let mut md = blank();
    put(&mut md, 4096, &[0xfc, 0x4e, 0x2b, 0xa9, 1]);
    put(&mut md, 4096 + 16, b"0123456789abcdef");
    put(&mut md, 4096 + 144, &8_u64.to_le_bytes());

    let mut btrfs = blank();
    put(&mut btrfs, 65536 + 32, b"0123456789abcdef");
    put(&mut btrfs, 65536 + 48, &65536_u64.to_le_bytes());
    put(&mut btrfs, 65536 + 64, b"_BHRfS_M");
    put(&mut btrfs, 65536 + 144, &[0, 16, 0, 0, 0, 64, 0, 0]);
    let sum = !crc(&btrfs[65536 + 32..65536 + 4096], 0x82f6_3b78, u32::MAX);
    put(&mut btrfs, 65536, &sum.to_le_bytes());

    // What is looked for farther in than the rest.
    let mut luks = blank();
    put(&mut luks, 4 << 20, b"SKUL\xba\xbe\0\x02");
    put(&mut luks, (4 << 20) + 168, b"01234567-89ab-cdef-0123-456789abcdef");
    put(&mut luks, (4 << 20) + 256, &(4_u64 << 20).to_be_bytes());
    let mut vmfs = blank();
    put(&mut vmfs, 1 << 20, b"\x0d\xd0\x01\xc0");
    let mut promise = blank();
    let end = promise.len();
    put(&mut promise, end - 3087 * 512, b"Promise Technology, Inc.");

    vec![
        ("ext4", std::fs::read(ext4.path()).unwrap()),
        ("LVM2_member", lvm),
        ("linux_raid_member", md),
        ("btrfs", btrfs),
        ("crypto_LUKS", luks),
        ("VMFS_volume_member", vmfs),
        ("promise_fasttrack_raid_member", promise),
    ]
}

fn crc(bytes: &[u8], polynomial: u32, beginning: u32) -> u32 {
    bytes.iter().fold(beginning, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| (sum >> 1) ^ if sum & 1 == 1 { polynomial } else { 0 })
    })
}

/// All that `blkid` finds on a device, also when it finds several things.
fn blkid(file: &Path) -> String {
    let output = Command::new("blkid").args(["-p", "-o", "export"]).arg(file).output().unwrap();
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

#[test]
fn i2_no_byte_of_a_layer_is_taken_for_a_signature() {
    let disk = Disk::new();
    for (name, content) in signatures() {
        let alone = disk.path("alone");
        std::fs::write(&alone, &content).unwrap();
        let found = blkid(&alone);
        assert!(found.contains(&format!("TYPE={name}")), "{name} is not found where it is: {found}");
        // The same at every distance from both ends that a block boundary allows and somebody looks at: a file begins
        // and ends where head and tail do, but for the metadata between.
        let layer = Tar::of([
            Item::file("first", &content),
            Item::symlink("in-the-metadata", b"Promise Technology, Inc.".repeat(160)),
            Item::file("last", [&b"different"[..], &content].concat()),
            Item::file("very-last", &content[content.len() / 2..]),
        ]);
        let path = disk.path(&format!("{name}.erofs"));
        image_on(&layer, &File::create(&path).unwrap(), &speedy::image::NothingBelow).unwrap();
        let found = blkid(&path);
        let types: Vec<_> = found.lines().filter(|line| line.starts_with("TYPE=")).collect();
        assert_eq!(types, ["TYPE=erofs"], "{name}: {found}");
        assert!(!found.contains("ambivalent") && !found.contains("PTTYPE"), "{name}: {found}");
    }
}
