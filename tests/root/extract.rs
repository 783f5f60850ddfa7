//! Layers as files: what containerd's applier makes of them, and nothing outside the directory.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};

use speedy::image::extract::{Durability, Extract, Extracted, Whiteouts, extract};
use speedy::image::{
    Attributes, Below, Compression, EntryFault, ImageError, Limit, Limits, NothingBelow, Source, build,
};
use speedy::layer::attach::{Attacher, Mode};

use crate::maker::tars::{Item, Tar};
use crate::process::require_root;

const GO_ON: &(dyn Fn() -> bool + Sync) = &|| false;

fn how<'a>(whiteouts: Whiteouts, limits: &'a Limits) -> Extract<'a> {
    Extract { whiteouts, below: &NothingBelow, limits, durability: Durability::Unsynced }
}

fn source(tar: &[u8]) -> Source<&[u8]> {
    Source { blob: tar, compression: Compression::Plain }
}

fn apply(tar: &[u8], dir: &Path, whiteouts: Whiteouts) -> Result<Extracted, ImageError> {
    extract(source(tar), dir, &how(whiteouts, &Limits::default()), GO_ON)
}

/// Everything that can be seen of a file, but for what differs by nature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) mode: u32,
    owner: (u32, u32),
    pub(crate) mtime: (i64, i64),
    device: u64,
    links: u64,
    content: Vec<u8>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The first path of the same inode.
    same_as: PathBuf,
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0; 65536];
    let length = rustix::fs::llistxattr(path, &mut names[..]).unwrap();
    let names = names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let value = |name: &[u8]| {
        let mut value = vec![0; 65536];
        let length = rustix::fs::lgetxattr(path, name, &mut value[..]).unwrap();
        value[..length].to_vec()
    };
    names.map(|name| (name.to_vec(), value(name))).collect()
}

/// The tree below `top`, without `top` itself.
pub(crate) fn tree(top: &Path) -> BTreeMap<PathBuf, Seen> {
    let mut found = BTreeMap::new();
    let mut inodes: BTreeMap<u64, PathBuf> = BTreeMap::new();
    let mut directories = vec![top.to_owned()];
    let mut paths = Vec::new();
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                directories.push(entry.path());
            }
            paths.push(entry.path());
        }
    }
    paths.sort();
    for path in paths {
        let meta = fs::symlink_metadata(&path).unwrap();
        let kind = meta.file_type();
        let content = match () {
            () if kind.is_symlink() => fs::read_link(&path).unwrap().as_os_str().as_bytes().to_vec(),
            () if kind.is_file() => fs::read(&path).unwrap(),
            () => Vec::new(),
        };
        let is_whiteout = kind.is_char_device() && meta.rdev() == 0;
        let name = path.strip_prefix(top).unwrap().to_owned();
        let same_as = inodes.entry(meta.ino()).or_insert_with(|| name.clone()).clone();
        let seen = Seen {
            mode: meta.mode(),
            owner: (meta.uid(), meta.gid()),
            // Overlayfs never shows a whiteout's time.
            mtime: if is_whiteout { (0, 0) } else { (meta.mtime(), meta.mtime_nsec()) },
            device: meta.rdev(),
            links: if kind.is_dir() { 0 } else { meta.nlink() },
            content,
            xattrs: xattrs(&path),
            same_as,
        };
        found.insert(name, seen);
    }
    found
}

struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Place {
        require_root();
        let dir = tempfile::Builder::new().prefix("spd").tempdir().unwrap();
        for name in ["files", "outside", "l"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        fs::write(dir.path().join("outside/precious"), "precious").unwrap();
        Place { dir }
    }

    fn files(&self) -> PathBuf {
        self.dir.path().join("files")
    }

    fn outside(&self) -> PathBuf {
        self.dir.path().join("outside")
    }

    fn require_untouched(&self) {
        assert_eq!(fs::read_to_string(self.outside().join("precious")).unwrap(), "precious");
        assert_eq!(fs::read_dir(self.outside()).unwrap().count(), 1);
        let meta = fs::metadata(self.outside().join("precious")).unwrap();
        assert_eq!((meta.nlink(), meta.uid()), (1, 0));
    }
}

/// A bit of everything that a layer can hold.
fn sample() -> Vec<Item> {
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    vec![
        Item::dir("./"),
        Item::dir("etc/").mode(0o2750).owner(3, 4).mtime(5),
        Item::file("etc/passwd", b"root").owner(1000, 2000).xattr("user.note", b"x"),
        Item::file("bin/su", b"su").mode(0o4755).xattr("security.capability", &capability),
        Item::link("bin/also-su", "bin/su").mode(0o4711),
        Item::symlink("lib", "usr/lib").owner(7, 8).mtime(77),
        Item::file("lib/libc.so", &[9; 100_000]),
        Item::symlink("abs", "/usr"),
        Item::file("abs/share/doc", b"doc"),
        Item::file("usr/lib/.wh.old", b""),
        Item::file("var/.wh..wh..opq", b""),
        Item { device: (1, 3), ..Item::new(b'3', "dev/null").mode(0o666) },
        Item { device: (8, 257), ..Item::new(b'4', "dev/disk") },
        Item::new(b'6', "run/fifo").mode(0o1600),
        Item::file("empty", b"").pax("mtime", b"1234567890.123456789"),
        Item::file("twice", b"first"),
        Item::file("twice", b"second"),
        Item::dir("becomes"),
        Item::file("becomes/gone", b"x"),
        Item::file("becomes", b"file"),
        Item::file("trusted", b"x").xattr("trusted.overlay.redirect", b"/etc").xattr("btrfs.x", b"y"),
        Item::symlink("to-file", "empty").xattr("user.ignored", b"x"),
    ]
}

#[test]
fn a_layer_becomes_files() {
    let place = Place::new();
    let tar = Tar::of(&sample());
    let extracted = apply(&tar, &place.files(), Whiteouts::Overlay).unwrap();
    assert_eq!(extracted.tar_size, tar.len() as u64);
    let mut sha256 = speedy::oci::Sha256::default();
    sha256.update(&tar);
    assert_eq!(extracted.diff_id.0, sha256.digest());
    let seen = tree(&place.files());
    let at = |name: &str| &seen[Path::new(name)];
    assert_eq!((at("etc").mode, at("etc").owner, at("etc").mtime), (0o042_750, (3, 4), (5, 0)));
    assert_eq!(at("etc/passwd").xattrs[&b"user.note"[..]], b"x");
    assert_eq!((at("bin/su").mode, at("bin/su").links), (0o104_711, 2));
    assert_eq!(at("bin/su").same_as, Path::new("bin/also-su"));
    assert_eq!(at("bin").mtime, (1_600_000_000, 0));
    assert_eq!((at("lib").owner, at("lib").mtime), ((7, 8), (77, 0)));
    assert_eq!(at("usr/lib/libc.so").content.len(), 100_000);
    assert_eq!(at("usr/share/doc").content, b"doc");
    assert_eq!((at("usr/lib/old").mode, at("usr/lib/old").device), (0o020_000, 0));
    assert_eq!(at("var").xattrs[&b"trusted.overlay.opaque"[..]], b"y");
    assert_eq!(at("dev/null").device, (1 << 8) | 3);
    assert_eq!(at("run/fifo").mode, 0o011_600);
    assert_eq!(at("empty").mtime, (1_234_567_890, 123_456_789));
    assert_eq!(at("twice").content, b"second");
    assert_eq!(at("becomes").content, b"file");
    assert!(at("trusted").xattrs.is_empty() && at("to-file").xattrs.is_empty());
    place.require_untouched();
}

/// What [`build`] shows of the same layer, attached.
fn built(place: &Place, attacher: &Attacher, tar: &[u8]) -> Result<BTreeMap<PathBuf, Seen>, ImageError> {
    let path = place.dir.path().join("layer.erofs");
    let image = fs::File::create(&path).unwrap();
    let facts = build(source(tar), &image, &NothingBelow, &Limits::default(), GO_ON)?;
    let checked = speedy::image::check::check(&fs::File::open(&path).unwrap(), &facts.layout).unwrap();
    assert_eq!(
        (checked.inodes, checked.root_uid, checked.root_gid),
        (facts.inodes, facts.root_uid, facts.root_gid)
    );
    drop(image);
    let point = attacher.point(1);
    attacher.attach(&path, &point).unwrap();
    let seen = tree(&point.join("fs"));
    attacher.detach(&point).unwrap();
    Ok(seen)
}

fn require_equal(name: &str, files: &BTreeMap<PathBuf, Seen>, image: &BTreeMap<PathBuf, Seen>) {
    for path in files.keys().chain(image.keys()) {
        assert_eq!(files.get(path), image.get(path), "{name}: {}", path.display());
    }
}

#[test]
fn files_and_image_of_a_layer_are_the_same() {
    let place = Place::new();
    let attacher = Attacher::open(place.dir.path(), Mode::Auto).unwrap();
    let tar = Tar::of(&sample());
    let image = built(&place, &attacher, &tar).unwrap();
    apply(&tar, &place.files(), Whiteouts::Overlay).unwrap();
    require_equal("sample", &tree(&place.files()), &image);
}

/// The same numbers in every run.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        usize::try_from(self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33).unwrap() % limit
    }

    fn path(&mut self) -> String {
        let depth = 1 + self.below(3);
        let names: Vec<&str> = (0..depth).map(|_| ["a", "b", "c", "d"][self.below(4)]).collect();
        names.join("/")
    }

    pub(crate) fn item(&mut self) -> Item {
        let path = self.path();
        let item = match self.below(16) {
            0..4 => Item::file(&path, &vec![b'x'; [0, 1, 5000][self.below(3)]]),
            4..8 => Item::dir(&path),
            8..11 => {
                let (above, inside, other) = (self.path(), self.path(), self.path());
                let through = format!("{inside}/../{above}");
                let targets =
                    [format!("/{above}"), inside, format!("../{other}"), ".".into(), "..".into(), through];
                Item::symlink(&path, &targets[self.below(6)])
            }
            11 => Item::link(&path, &self.path()),
            12 => Item::new(b'6', &path),
            13 => Item::new(b'g', &path),
            14 => {
                let (above, name) = path.rsplit_once('/').unwrap_or(("", &path));
                Item::file(&format!("{above}/.wh.{name}"), b"")
            }
            _ => Item::file(&format!("{path}/.wh..wh..opq"), b""),
        };
        let item = item.mode([0o755, 0o644, 0o2775, 0o4711][self.below(4)]);
        let item = item.owner(u32::try_from(self.below(3)).unwrap(), u32::try_from(self.below(3)).unwrap());
        let item = item.mtime(1_000_000 + self.below(1000) as u64);
        match self.below(6) {
            0 if item.kind != b'g' => item.xattr(&format!("user.{}", self.below(2)), b"value"),
            _ => item,
        }
    }
}

#[test]
fn generated_layers_become_the_same_files_as_images() {
    let place = Place::new();
    let attacher = Attacher::open(place.dir.path(), Mode::Auto).unwrap();
    let mut random = Random(0x5eed);
    let (mut equal, mut refused) = (0, 0);
    for round in 0..400 {
        let items: Vec<Item> = (0..1 + random.below(14)).map(|_| random.item()).collect();
        let tar = Tar::of(&items);
        fs::create_dir(place.files().join("t")).unwrap();
        let files = apply(&tar, &place.files().join("t"), Whiteouts::Overlay);
        match (built(&place, &attacher, &tar), files) {
            (Ok(image), Ok(_)) => {
                equal += 1;
                require_equal(&format!("round {round}: {items:#?}"), &tree(&place.files().join("t")), &image);
            }
            (Err(ImageError::Entry { fault: a, .. }), Err(ImageError::Entry { fault: b, .. })) => {
                refused += 1;
                assert_eq!(a, b, "round {round}: {items:#?}");
            }
            (image, files) => {
                panic!("round {round}: image {:?}, files {files:?}: {items:#?}", image.map(|_| ()))
            }
        }
        speedy::sys::tree::remove(&place.files().join("t"), &|| false).unwrap();
        place.require_untouched();
    }
    println!("{equal} layers equal, {refused} refused by both");
    assert!(equal > 100 && refused > 50, "{equal} {refused}");
}

/// Links that lead out, by name or through others, before the layer or in it.
#[test]
fn nothing_outside_is_touched() {
    let place = Place::new();
    let outside = place.outside().display().to_string();
    let up = "../".repeat(12);
    let far = format!("{up}{}", &outside[1..]);
    let cases: Vec<Vec<Item>> = vec![
        vec![Item::symlink("link", &outside), Item::file("link/new", b"x")],
        vec![Item::symlink("link", &outside), Item::file("link/precious", b"x")],
        vec![Item::symlink("link", &far), Item::file("link/precious", b"x")],
        vec![Item::symlink("link", &format!("{outside}/precious")), Item::file("link", b"x")],
        vec![Item::symlink("link", &format!("{outside}/precious")), Item::link("hard", "link")],
        vec![Item::symlink("link", &outside), Item::link("hard", "link/precious")],
        vec![Item::link("hard", &format!("{outside}/precious"))],
        vec![Item::link("hard", &far)],
        vec![Item::symlink("link", &outside), Item::file("link/.wh.precious", b"")],
        vec![Item::symlink("link", &outside), Item::file("link/.wh..wh..opq", b"")],
        vec![Item::symlink("a", "b"), Item::symlink("b", &outside), Item::file("a/new", b"x")],
        vec![Item::symlink("a", "b/c"), Item::symlink("b", &up), Item::file("a/new", b"x")],
        vec![Item::file(&format!("{up}tmp/escaped"), b"x")],
        vec![Item::file(&format!("{outside}/new"), b"x")],
        vec![Item::dir("d"), Item::symlink("d", &outside), Item::dir("d").mode(0o777)],
        vec![Item::dir("d/e"), Item::symlink("d", &outside)],
        vec![Item::symlink("p", "/proc/self/root"), Item::file("p/tmp/x", b"x")],
        vec![Item::symlink("p", "/proc/self/cwd"), Item::file("p/x", b"x")],
        vec![Item::symlink("loop", "loop"), Item::file("loop/x", b"x")],
        vec![Item::symlink("l1", "l2"), Item::symlink("l2", "l1"), Item::link("x", "l1/y")],
        vec![Item::file("file", b"x"), Item::file("file/below", b"x")],
        vec![Item::file(".wh.", b"")],
        vec![Item::file(".wh...", b"")],
        vec![Item::file("a/.wh..", b"")],
        vec![Item::file("old/.wh.precious", b"")],
    ];
    for whiteouts in [Whiteouts::Overlay, Whiteouts::Remove] {
        for items in &cases {
            let dir = place.files().join("t");
            fs::create_dir(&dir).unwrap();
            // A link that was there before the layer.
            symlink(&outside, dir.join("old")).unwrap();
            let result = apply(&Tar::of(items), &dir, whiteouts);
            println!("{:?}: {result:?}", items.iter().map(|i| (&i.name, &i.link)).collect::<Vec<_>>());
            place.require_untouched();
            speedy::sys::tree::remove(&dir, &|| false).unwrap();
        }
    }
    assert!(!Path::new("/tmp/escaped").exists());
}

#[test]
fn the_directory_itself_must_not_be_a_link() {
    let place = Place::new();
    let link = place.dir.path().join("link");
    symlink(place.outside(), &link).unwrap();
    let refused = apply(&Tar::of(&[Item::file("x", b"x")]), &link, Whiteouts::Overlay);
    assert!(matches!(refused, Err(ImageError::Extract { .. })), "{refused:?}");
    let refused = apply(&Tar::of(&[]), &place.dir.path().join("nowhere"), Whiteouts::Overlay);
    assert!(matches!(refused, Err(ImageError::Extract { .. })), "{refused:?}");
    place.require_untouched();
}

#[test]
fn whiteouts_remove_what_is_there() {
    let place = Place::new();
    let dir = place.files();
    fs::create_dir_all(dir.join("d/sub/deep")).unwrap();
    fs::create_dir(dir.join("kept")).unwrap();
    for name in ["gone", "d/old", "d/sub/old", "d/sub/deep/old", "kept/file"] {
        fs::write(dir.join(name), "old").unwrap();
    }
    symlink(place.outside(), dir.join("d/sub/out")).unwrap();
    let layer = [
        Item::file(".wh.gone", b""),
        Item::file(".wh.never-there", b""),
        Item::file("d/new", b"new"),
        Item::dir("d/sub"),
        Item::file("d/sub/new", b"new"),
        Item::file("d/.wh..wh..opq", b""),
        Item::file("d/late", b"new"),
        Item::file("d/.wh..wh..opq", b""),
        Item::file("kept/more", b"new"),
    ];
    apply(&Tar::of(&layer), &dir, Whiteouts::Remove).unwrap();
    let names: Vec<PathBuf> = tree(&dir).into_keys().collect();
    let expected = ["d", "d/late", "d/new", "d/sub", "d/sub/new", "kept", "kept/file", "kept/more"];
    assert_eq!(names, expected.map(PathBuf::from));
    place.require_untouched();
}

/// A container's own changes come back onto what its upperdir holds.
#[test]
fn a_layer_is_applied_onto_what_is_there() {
    let place = Place::new();
    let dir = place.files();
    fs::create_dir_all(dir.join("etc/conf")).unwrap();
    fs::write(dir.join("etc/hosts"), "old").unwrap();
    fs::write(dir.join("etc/conf/kept"), "kept").unwrap();
    fs::create_dir_all(dir.join("tree/deep")).unwrap();
    let layer = [
        Item::dir("etc").mode(0o700).mtime(42),
        Item::file("etc/hosts", b"new"),
        Item::file("tree", b"now a file"),
        Item::dir("etc/hosts.d"),
    ];
    apply(&Tar::of(&layer), &dir, Whiteouts::Overlay).unwrap();
    let seen = tree(&dir);
    assert_eq!(seen[Path::new("etc")].mode, 0o040_700);
    assert_eq!(seen[Path::new("etc")].mtime, (42, 0));
    assert_eq!(seen[Path::new("etc/hosts")].content, b"new");
    assert_eq!(seen[Path::new("etc/conf/kept")].content, b"kept");
    assert_eq!(seen[Path::new("tree")].content, b"now a file");
    // The same again changes nothing.
    apply(&Tar::of(&layer), &dir, Whiteouts::Overlay).unwrap();
    require_equal("again", &tree(&dir), &seen);

    fs::write(dir.join("gone"), "x").unwrap();
    let occupied = apply(&Tar::of(&[Item::file(".wh.gone", b"")]), &dir, Whiteouts::Overlay);
    let Err(ImageError::Entry { fault: EntryFault::WhiteoutOccupied, .. }) = occupied else {
        panic!("{occupied:?}");
    };
}

struct Lower;

impl Below for Lower {
    fn directory(&self, path: &[&[u8]]) -> std::io::Result<Option<Attributes>> {
        let xattrs = vec![
            speedy::image::tar::Xattr { name: b"user.of".to_vec(), value: b"below".to_vec() },
            speedy::image::tar::Xattr { name: b"trusted.overlay.opaque".to_vec(), value: b"y".to_vec() },
        ];
        match path {
            [b"srv"] => Ok(Some(Attributes { mode: 0o1777, uid: 8, gid: 9, xattrs })),
            [b"broken"] => Err(std::io::ErrorKind::TimedOut.into()),
            _ => Ok(None),
        }
    }
}

#[test]
fn implied_directories_are_like_those_below() {
    let place = Place::new();
    let limits = Limits::default();
    let with_lower = Extract { below: &Lower, ..how(Whiteouts::Overlay, &limits) };
    let tar = Tar::of(&[Item::file("srv/data/file", b"x").mtime(9)]);
    extract(source(&tar), &place.files(), &with_lower, GO_ON).unwrap();
    let seen = tree(&place.files());
    let srv = &seen[Path::new("srv")];
    assert_eq!((srv.mode, srv.owner, srv.mtime), (0o041_777, (8, 9), (9, 0)));
    assert_eq!(srv.xattrs, BTreeMap::from([(b"user.of".to_vec(), b"below".to_vec())]));
    assert_eq!(seen[Path::new("srv/data")].mode, 0o040_755);
    let broken = extract(source(&Tar::of(&[Item::dir("broken/x")])), &place.files(), &with_lower, GO_ON);
    assert!(matches!(broken, Err(ImageError::Below { .. })), "{broken:?}");
}

#[test]
fn holes_stay_holes() {
    let place = Place::new();
    // GNU's sparse format 1.0 in PAX: the map is the first block of the data.
    let mut content = b"1\n1048576\n4096\n".to_vec();
    content.resize(512, 0);
    content.extend([7; 4096]);
    let sparse = Item::file("GNUSparseFile.0/sparse", &content)
        .pax("GNU.sparse.major", b"1")
        .pax("GNU.sparse.minor", b"0")
        .pax("GNU.sparse.name", b"sparse")
        .pax("GNU.sparse.realsize", b"8388608");
    apply(&Tar::of(&[sparse]), &place.files(), Whiteouts::Overlay).unwrap();
    let path = place.files().join("sparse");
    let meta = fs::metadata(&path).unwrap();
    assert!(meta.len() == 8_388_608 && meta.blocks() * 512 < 65_536, "{meta:?}");
    let bytes = fs::read(&path).unwrap();
    assert!(bytes[1_048_576..1_052_672].iter().all(|byte| *byte == 7));
    assert_eq!(bytes.iter().filter(|byte| **byte != 0).count(), 4096);
}

#[test]
fn what_fails_says_what_and_where() {
    let place = Place::new();
    let files = place.files();
    let limits = Limits { metadata: 300, entries: 2, ..Limits::default() };
    let many: Vec<Item> = (0..9).map(|n| Item::dir(&format!("d{n}"))).collect();
    let refused = extract(source(&Tar::of(&many)), &files, &how(Whiteouts::Overlay, &limits), GO_ON);
    assert!(matches!(refused, Err(ImageError::Limit { limit: Limit::Metadata, .. })), "{refused:?}");
    // As many files as memory allows: a layer with more of them than an image may have is written as files.
    let files_of = |count| (0..count).map(|n| Item::file(&format!("f{n}"), b"")).collect::<Vec<_>>();
    let written = extract(source(&Tar::of(&files_of(10))), &files, &how(Whiteouts::Remove, &limits), GO_ON);
    assert!(written.is_ok(), "{written:?}");
    let refused = extract(source(&Tar::of(&files_of(20))), &files, &how(Whiteouts::Remove, &limits), GO_ON);
    assert!(matches!(refused, Err(ImageError::Limit { limit: Limit::Metadata, .. })), "{refused:?}");
    let cancelled =
        extract(source(&Tar::of(&sample())), &files, &how(Whiteouts::Overlay, &Limits::default()), &|| true);
    assert!(matches!(cancelled, Err(ImageError::Cancelled)), "{cancelled:?}");
    let xattr = Item::file("bad", b"").xattr("security.capability", b"nonsense");
    let malformed = apply(&Tar::of(&[xattr]), &files, Whiteouts::Overlay);
    assert!(matches!(malformed, Err(ImageError::Entry { fault: EntryFault::Xattr, .. })), "{malformed:?}");
    let cut = Tar::of(&sample());
    let truncated = apply(&cut[..cut.len() - 100_000], &files, Whiteouts::Overlay);
    assert!(matches!(truncated, Err(ImageError::Tar { .. })), "{truncated:?}");
}

#[test]
fn a_full_disk_is_told_apart() {
    let place = Place::new();
    let small = place.dir.path().join("small");
    fs::create_dir(&small).unwrap();
    let mount = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=64k", "none"])
        .arg(&small)
        .status();
    assert!(mount.unwrap().success());
    let full = apply(&Tar::of(&[Item::file("big", &[1; 200_000])]), &small, Whiteouts::Overlay);
    let umount = std::process::Command::new("umount").arg(&small).status();
    assert!(umount.unwrap().success());
    match full {
        Err(ImageError::Extract { path, source }) => {
            assert_eq!((path.as_str(), source.kind()), ("/big", std::io::ErrorKind::StorageFull));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn names_are_bytes_and_synced_files_are_there() {
    let place = Place::new();
    let limits = Limits::default();
    let synced = Extract { durability: Durability::Synced, ..how(Whiteouts::Overlay, &limits) };
    let long = "n".repeat(255);
    let items = [
        Item::file("x", b"1").pax("path", b"not \xff utf-8\n/\x01"),
        Item::file("x", b"2").pax("path", long.as_bytes()),
        Item::symlink("x", "y").pax("path", b"s").pax("linkpath", &[b'z'; 4000]),
    ];
    extract(source(&Tar::of(&items)), &place.files(), &synced, GO_ON).unwrap();
    let odd = place.files().join(OsStr::from_bytes(b"not \xff utf-8\n")).join("\u{1}");
    assert_eq!(fs::read(odd).unwrap(), b"1");
    assert_eq!(fs::read(place.files().join(long)).unwrap(), b"2");
    assert_eq!(fs::read_link(place.files().join("s")).unwrap().as_os_str().len(), 4000);
}
