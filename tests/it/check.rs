//! The parser that stands before the kernel: what it accepts, what it refuses, and that nothing makes it fail otherwise.

use std::collections::BTreeMap;

use crate::maker::tars::{Item, Tar};
use erofs_rs::EroFS;
use erofs_rs::backend::SliceImage;
use speedy::image::check::{CheckError, Metadata, NodeInfo, NodeKind, Part, Parts, check};
use speedy::image::tar::Time;
use speedy::image::{BLOCK, Compression, Layout, Limits, NothingBelow, RESERVED, Source, build};

use crate::fuzz;
use crate::maker::{Image, Maker, Node};

fn at(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

fn parts<'a>(bytes: &'a [u8], layout: &Layout) -> Parts<'a> {
    let metadata = &bytes[at(layout.metadata.start)..at(layout.metadata.end)];
    Parts { head: &bytes[..at(BLOCK)], metadata, metadata_at: layout.metadata.start }
}

fn verdict(image: &Image) -> Result<u64, CheckError> {
    check(&parts(&image.bytes, &image.layout), &image.layout).map(|checked| checked.inodes)
}

fn refusal(image: &Image) -> (Part, &'static str) {
    match verdict(image) {
        Err(CheckError::Refused { part, rule, .. }) => (part, rule),
        other => panic!("{other:?}"),
    }
}

/// A bit of everything.
fn sample() -> Maker {
    let long = "n".repeat(255);
    Maker::new()
        .root(Node::dir().owner(7, 8).xattr(1, b"note", b"root"))
        .with("empty", Node::file(b""))
        .with("a", Node::dir().opaque())
        .with("a/file", Node::file(&[7; 5000]).xattr(6, b"capability", &[1; 20]).xattr(1, b"x", b""))
        .with("a/gone", Node::whiteout())
        .with("a/link", Node::symlink(b"../empty"))
        .with("a/sub", Node::dir().xattr(6, b"selinux", b"label"))
        .with("a/sub/fifo", Node::special(0o010_600, 0))
        .with("a/sub/tty", Node::special(0o020_620, 0x0502))
        .with("a/sub/disk", Node::special(0o060_660, 0x0010_0801))
        .with(&long, Node { mtime: (9_223_372_036, 999_999_999), ..Node::file(b"long") })
        .link("a/sub/same", "a/file")
}

/// Everything an image holds, from our own parser.
fn contents(image: Parts<'_>, layout: &Layout) -> Result<BTreeMap<Vec<u8>, NodeInfo>, CheckError> {
    let metadata = Metadata::open(image, layout)?;
    let mut found = BTreeMap::new();
    metadata.walk(|path, info| {
        assert!(found.insert(path.to_vec(), info.clone()).is_none(), "{path:?} twice");
        Ok::<(), CheckError>(())
    })?;
    for (path, info) in &found {
        let names = path.split(|byte| *byte == b'/').filter(|name| !name.is_empty());
        assert_eq!(metadata.lookup(names)?.as_ref(), Some(info), "{}", path.escape_ascii());
    }
    Ok(found)
}

/// An accepted image, read by another reader: both must see the same. That reader knows no device larger than the image.
fn require_agreement(bytes: &[u8], layout: &Layout) {
    let ours = contents(parts(bytes, layout), layout).unwrap();
    let theirs = EroFS::new(SliceImage::new(bytes)).unwrap();
    let mut names = 0;
    for entry in theirs.walk_dir("/fs").unwrap() {
        let entry = entry.unwrap();
        let path = entry.dir_entry.path();
        let path = path.as_bytes().strip_prefix(b"/fs/").unwrap();
        if path.ends_with(b"/.") || path.ends_with(b"/..") || path == b"." || path == b".." {
            continue;
        }
        names += 1;
        let (info, inode) = (&ours[path], entry.inode);
        assert_eq!((info.uid, info.gid, info.links), (inode.uid(), inode.gid(), inode.nlink()));
        let (seconds, nanoseconds) = inode.modified_unix();
        assert_eq!((info.mtime.seconds.cast_signed(), info.mtime.nanoseconds), (seconds, nanoseconds));
        let permissions = std::os::unix::fs::PermissionsExt::mode(&inode.permissions());
        assert_eq!(u32::from(info.mode), permissions & 0o7777);
        let xattrs = theirs.xattrs_inode(inode).unwrap();
        let xattrs: BTreeMap<Vec<u8>, Vec<u8>> =
            xattrs.iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect();
        let mine: BTreeMap<_, _> = info.xattrs.iter().map(|x| (x.name.clone(), x.value.clone())).collect();
        assert_eq!(mine, xattrs);
        match &info.kind {
            NodeKind::File { data } => {
                assert!(inode.is_file() && inode.data_size() == data.end - data.start);
                assert!(data.is_empty() || layout.data.start <= data.start && data.end <= layout.data.end);
            }
            NodeKind::Symlink { target } => {
                assert_eq!(theirs.read_link_inode(inode).unwrap().as_bytes(), &target[..]);
            }
            NodeKind::CharDevice { major, minor } | NodeKind::BlockDevice { major, minor } => {
                assert_eq!(inode.device(), Some((*major, *minor)));
            }
            NodeKind::Directory => assert!(inode.is_dir()),
            NodeKind::Fifo => assert_eq!(inode.data_size(), 0),
        }
    }
    assert_eq!(names + 1, ours.len());
}

#[test]
fn an_image_is_accepted_and_read() {
    let image = sample().make();
    let checked = check(&parts(&image.bytes, &image.layout), &image.layout).unwrap();
    assert_eq!((checked.inodes, checked.root_uid, checked.root_gid), (11, 7, 8));
    require_agreement(&image.bytes, &image.layout);

    let metadata = Metadata::open(parts(&image.bytes, &image.layout), &image.layout).unwrap();
    let lookup = |path: &str| {
        metadata.lookup(path.split('/').filter(|name| !name.is_empty()).map(str::as_bytes)).unwrap()
    };
    assert_eq!(lookup("").unwrap().xattrs[0].name, b"user.note");
    let file = lookup("a/file").unwrap();
    assert_eq!(file.xattrs[1].name, b"security.capability");
    assert_eq!((file.links, file.nid), (2, lookup("a/sub/same").unwrap().nid));
    let NodeKind::File { data } = file.kind else { panic!() };
    assert_eq!(&image.bytes[at(data.start)..at(data.end)], &[7; 5000]);
    assert_eq!(lookup("a/gone").unwrap().kind, NodeKind::CharDevice { major: 0, minor: 0 });
    assert_eq!(lookup("a/sub/disk").unwrap().kind, NodeKind::BlockDevice { major: 8, minor: 257 });
    assert_eq!(lookup("a/link").unwrap().kind, NodeKind::Symlink { target: b"../empty".to_vec() });
    let long = lookup(&"n".repeat(255)).unwrap();
    assert_eq!(long.mtime, Time { seconds: 9_223_372_036, nanoseconds: 999_999_999 });
    for nothing in ["b", "a/file/x", "a/link/x", "a/..", "."] {
        assert_eq!(lookup(nothing), None, "{nothing}");
    }
}

#[test]
fn the_smallest_and_a_wide_and_a_deep_image_are_accepted() {
    assert_eq!(verdict(&Maker::new().make()).unwrap(), 1);
    let mut wide = Maker::new();
    for number in 0..3000 {
        wide = wide.with(&format!("name-of-some-length-{number}"), Node::file(b""));
        wide = wide.with(&format!("link-{number}"), Node::symlink(&vec![b'x'; number + 1]));
    }
    for wide in [wide.make(), wide.plain().make()] {
        assert_eq!(verdict(&wide).unwrap(), 6001);
        require_agreement(&wide.bytes, &wide.layout);
    }

    let (mut deep, mut path) = (Maker::new(), String::from("d"));
    for _ in 0..1500 {
        deep = deep.with(&path, Node::dir());
        path.push_str("/d");
    }
    let deep = deep.make();
    assert_eq!(verdict(&deep).unwrap(), 1501);
    assert_eq!(contents(parts(&deep.bytes, &deep.layout), &deep.layout).unwrap().len(), 1501);
}

#[test]
fn a_file_on_disk_is_read_in_pieces() {
    let image = sample().make();
    let file = tempfile::NamedTempFile::new().unwrap();
    image.write(file.path());
    let checked = check(file.as_file(), &image.layout).unwrap();
    assert_eq!(checked.inodes, 11);
    file.as_file().set_len(image.layout.metadata.end - 1).unwrap();
    assert!(matches!(check(file.as_file(), &image.layout), Err(CheckError::Read(_))));
}

/// Writes `bytes` into the inode of `path`, or into its blocks.
fn patched(image: &Image, place: usize, bytes: &[u8]) -> Image {
    let mut image = image.clone();
    image.bytes[place..place + bytes.len()].copy_from_slice(bytes);
    image
}

#[test]
fn the_superblock_is_ours_to_the_bit() {
    let mut image = sample().make();
    for place in 0..4096 {
        image.bytes[place] ^= 0x10;
        assert!(verdict(&image).is_err(), "byte {place}");
        image.bytes[place] ^= 0x10;
    }
    let few = patched(&image, 1040, &11_u64.to_le_bytes());
    assert!(verdict(&few).is_err());
    let many = patched(&image, 1040, &u64::MAX.to_le_bytes());
    assert!(verdict(&many).is_err());
}

#[test]
fn layouts_that_cannot_be_are_refused() {
    let image = sample().make();
    let right = &image.layout;
    let wrong = [
        Layout { data: 0..right.data.end, ..right.clone() },
        Layout { data: right.data.start..right.data.end + BLOCK, ..right.clone() },
        Layout { metadata: right.metadata.start..right.metadata.start, ..right.clone() },
        Layout { metadata: right.metadata.start..right.metadata.end + 1, ..right.clone() },
        Layout { size: right.size + BLOCK, ..right.clone() },
        Layout { data: RESERVED..u64::MAX - 4095, metadata: u64::MAX - 4095..u64::MAX, size: 0 },
        Layout {
            data: RESERVED..1 << 45,
            metadata: 1 << 45..(1 << 45) + BLOCK,
            size: (1 << 45) + BLOCK + RESERVED,
        },
    ];
    for layout in wrong {
        let refused = Metadata::open(parts(&image.bytes, right), &layout);
        assert!(matches!(refused, Err(CheckError::Refused { part: Part::Layout, .. })), "{layout:?}");
    }
    let metadata = RESERVED..RESERVED + (1 << 30) + BLOCK;
    let layout = Layout { data: RESERVED..RESERVED, size: metadata.end + RESERVED, metadata };
    assert!(matches!(check(&parts(&image.bytes, right), &layout), Err(CheckError::TooLarge { .. })));
}

#[test]
fn what_an_inode_may_not_say() {
    for image in [sample().make(), sample().plain().make()] {
        refuses_wrong_inodes(&image);
    }
    // What only an inline directory may say wrongly: a size without a rest, and one that leads into the next block.
    let more = |maker: Maker, number| maker.with(&format!("z{number}"), Node::file(b""));
    let image = (0..100).fold(sample(), more).make();
    let sub = image.inodes["fs/a"];
    for (bytes, rule) in [
        (8192_u64, "an inline directory has entries behind its inode"),
        (4095, "what is inline does not cross a block"),
        (2 * 4096 + 20, "its blocks are in the metadata"),
    ] {
        assert_eq!(refusal(&patched(&image, sub + 8, &bytes.to_le_bytes())), (Part::Inode, rule));
    }
    let wrong = (Part::Inode, "a directory without blocks leads to none");
    assert_eq!(refusal(&patched(&image, sub + 16, &[1])), wrong);
    // And a plain one of the same image.
    let plain = sample().plain().make();
    let wrong = (Part::Inode, "its blocks are in the metadata");
    assert_eq!(refusal(&patched(&plain, plain.inodes["fs/a/sub"] + 16, &[0; 4])), wrong);
}

fn refuses_wrong_inodes(image: &Image) {
    let (file, link, sub) = (image.inodes["fs/a/file"], image.inodes["fs/a/link"], image.inodes["fs/a/sub"]);
    let data = u32::try_from(image.layout.data.end / BLOCK).unwrap();
    let cases: [(usize, &[u8], &str); 17] = [
        (file, &[0], "an extended inode with flat data"),
        (file, &[9], "an extended inode with flat data"),
        (file, &[5], "inline data in symlinks and directories, and nowhere else"),
        (file, &[3], "flat data"),
        (file + 4, &[0, 0], "a known file type"),
        (file + 5, &[0xc1], "a known file type"),
        (file + 20, &[0], "its own number"),
        (file + 39, &[0x80], "a time since 1970"),
        (file + 8, &[0xff; 8], "a file's data is in the data"),
        (file + 16, &(data - 1).to_le_bytes(), "a file's data is in the data"),
        (file + 16, &[0; 4], "a file's data is in the data"),
        (file + 40, &[0xff; 4], "less than a second of nanoseconds"),
        (file + 44, &[0; 4], "at least one link"),
        (file + 63, &[1], "nothing in reserved fields"),
        (link + 8, &4096_u64.to_le_bytes(), "attributes and what is inline end in the metadata"),
        (link + 8, &0_u64.to_le_bytes(), "a target has 1 to 4095 bytes"),
        (sub + 44, &1_u32.to_le_bytes(), "two links"),
    ];
    for (place, bytes, rule) in cases {
        let refused = refusal(&patched(image, place, bytes));
        if rule.starts_with("attributes and what") {
            assert_eq!(refused.0, Part::Inode);
            continue;
        }
        assert_eq!(refused, (Part::Inode, rule), "byte {place}");
    }
    assert_eq!(refusal(&patched(image, link + 64, b"\0")).0, Part::Symlink);
    // A file that leads to where the metadata is.
    let metadata = patched(image, file + 16, &data.to_le_bytes());
    assert_eq!(refusal(&metadata), (Part::Inode, "a file's data is in the data"));
}

#[test]
fn what_xattrs_may_not_say() {
    let make = |node: Node| Maker::new().with("x", node).make();
    for (name, node) in [
        ("redirect", Node::dir().xattr(4, b"overlay.redirect", b"/etc")),
        ("metacopy", Node::file(b"").xattr(4, b"overlay.metacopy", b"")),
        ("opaque file", Node::file(b"").opaque()),
        ("opaque otherwise", Node::dir().xattr(4, b"overlay.opaque", b"x")),
        ("lustre", Node::file(b"").xattr(5, b"name", b"")),
        ("long prefix", Node::file(b"").xattr(0x81, b"name", b"")),
        ("no name", Node::file(b"").xattr(1, b"", b"")),
        ("ACL", Node::file(b"").xattr(2, b"", b"")),
        ("user of a fifo", Node::special(0o010_600, 0).xattr(1, b"a", b"")),
        ("NUL", Node::file(b"").xattr(1, b"a\0b", b"")),
        ("long", Node::file(b"").xattr(1, &[b'a'; 251], b"")),
        ("twice", Node::file(b"").xattr(1, b"a", b"1").xattr(1, b"a", b"2")),
    ] {
        assert_eq!(refusal(&make(node)).0, Part::Xattrs, "{name}");
    }
    let image = make(Node::file(b"").xattr(1, b"a", b"12").xattr(1, b"b", b""));
    let place = image.inodes["fs/x"] + 64;
    for (byte, value) in [(0, 1), (4, 1), (12, 9), (12, 200), (14, 200), (19, 1), (2 + 18, 9)] {
        assert_eq!(refusal(&patched(&image, place + byte, &[value])).0, Part::Xattrs, "byte {byte}");
    }
    // The count covers less, nothing, or all the metadata.
    for count in [1_u16, 2, 4, 6, u16::MAX] {
        assert!(verdict(&patched(&image, place - 62, &count.to_le_bytes())).is_err(), "{count}");
    }
}

#[test]
fn what_a_directory_may_not_say() {
    refuses_wrong_directories(&sample().make());
    let plain = sample().plain().make();
    refuses_wrong_directories(&plain);
    let behind = patched(&plain, plain.blocks["fs/a"] + 4000, &[1]);
    assert_eq!(refusal(&behind), (Part::Directory, "behind the directory's size are zeros"));
}

fn refuses_wrong_directories(image: &Image) {
    let block = image.blocks["fs/a"];
    let names: Vec<usize> = (0..6).map(|n| block + n * 12).collect();
    let name_at = |entry: usize| block + usize::from(image.bytes[entry + 8]);
    let nid = |path: &str| ((image.inodes[path] - at(image.layout.metadata.start)) / 32) as u64;
    let directory = |place: usize, bytes: &[u8]| {
        let refused = refusal(&patched(image, place, bytes));
        assert_eq!(refused.0, Part::Directory, "{refused:?}");
        refused.1
    };
    // The entries are `.`, `..`, file, gone, link, sub.
    assert_eq!(directory(names[2] + 10, &[2]), "the type is that of the inode");
    assert_eq!(directory(names[2] + 11, &[1]), "nothing in an entry's reserved byte");
    assert_eq!(directory(names[2], &nid("fs/a/sub").to_le_bytes()), "the type is that of the inode");
    assert_eq!(directory(names[2], &(nid("fs/a/file") + 1).to_le_bytes()), "a name leads to an inode");
    assert_eq!(directory(names[2], &u64::MAX.to_le_bytes()), "a name leads to an inode");
    assert_eq!(directory(names[0], &nid("fs").to_le_bytes()), "`.` is the directory itself");
    assert_eq!(
        directory(names[5], &nid("fs").to_le_bytes()),
        "a directory has one name, in the order of the inodes"
    );
    assert_eq!(
        directory(names[5], &nid("").to_le_bytes()),
        "a directory has one name, in the order of the inodes"
    );
    assert_eq!(directory(name_at(names[3]), b"fila"), "names are sorted and distinct");
    assert_eq!(directory(name_at(names[3]), b"zzzz"), "names are sorted and distinct");
    assert_eq!(directory(name_at(names[3]), b"g/ne"), "a name has neither NUL nor slash");
    assert_eq!(directory(name_at(names[3]), b"g\0ne"), "a name has neither NUL nor slash");
    assert_eq!(directory(block + 8, &[0, 0]), "names follow the entries");
    assert_eq!(directory(block + 8, &[73, 0]), "names follow the entries");
    assert_eq!(directory(block + 20, &[72, 0]), "names follow each other in the block");
    // `..` becomes another name of `empty`.
    let twice = patched(image, names[1], &nid("fs/empty").to_le_bytes());
    let twice = patched(&twice, image.inodes["fs/empty"] + 44, &[2]);
    let twice = patched(&patched(&twice, names[1] + 10, &[1]), name_at(names[1]), b".-");
    assert_eq!(refusal(&twice).1, "`.` and `..` are there");
    // `gone` becomes a second name of `empty`, which has but one link; both are not directories.
    let twice = patched(image, names[3], &nid("fs/empty").to_le_bytes());
    assert!(verdict(&patched(&twice, names[3] + 10, &[1])).is_err());
    // `..` leads to itself.
    assert_eq!(directory(names[1], &nid("fs/a").to_le_bytes()), "`..` is the directory that holds it");
    // More links than names.
    let file = image.inodes["fs/a/file"];
    assert_eq!(refusal(&patched(image, file + 44, &[3])), (Part::Tree, "as many names as links"));
}

/// Two directories that hold each other, beside the tree.
#[test]
fn directories_beside_the_tree_are_refused() {
    let image = Maker::new().with("a", Node::dir()).with("a/b", Node::dir()).with("c", Node::dir()).make();
    let nid = |path: &str| ((image.inodes[path] - at(image.layout.metadata.start)) / 32) as u64;
    // `fs/a` now leads to c, and c is taken from the end; a and b lie in each other.
    let (fs, a, b) = (image.blocks["fs"], image.blocks["fs/a"], image.blocks["fs/a/b"]);
    let mut island = patched(&image, fs + 24, &nid("fs/c").to_le_bytes());
    // b gets an entry for a: three entries, names `.`, `..`, `a`.
    let mut block = Vec::new();
    for (nid, name_at) in [(nid("fs/a/b"), 36_u16), (nid("fs/a"), 37), (nid("fs/a"), 39)] {
        block.extend(nid.to_le_bytes());
        block.extend(name_at.to_le_bytes());
        block.extend([2, 0]);
    }
    block.extend(b"...a");
    island = patched(&island, b, &block);
    island = patched(&island, image.inodes["fs/a/b"] + 8, &40_u64.to_le_bytes());
    island = patched(&island, image.inodes["fs/a/b"] + 44, &3_u32.to_le_bytes());
    island = patched(&island, a + 12, &nid("fs/a/b").to_le_bytes());
    // fs: `.`, `..`, `a` (which is c); the entry `c` goes.
    let mut block = Vec::new();
    for (nid, name_at) in [(nid("fs"), 36_u16), (nid(""), 37), (nid("fs/c"), 39)] {
        block.extend(nid.to_le_bytes());
        block.extend(name_at.to_le_bytes());
        block.extend([2, 0]);
    }
    block.extend(b"...a");
    block.resize(64, 0);
    island = patched(&island, fs, &block);
    island = patched(&island, image.inodes["fs"] + 8, &40_u64.to_le_bytes());
    island = patched(&island, image.inodes["fs"] + 44, &3_u32.to_le_bytes());
    assert_eq!(refusal(&island), (Part::Directory, "a directory has one name, in the order of the inodes"));
    // A walk ends, too.
    assert_eq!(contents(parts(&island.bytes, &island.layout), &island.layout).unwrap().len(), 2);
}

#[test]
fn inodes_without_a_name_are_refused() {
    let image = Maker::new().with("a", Node::dir()).with("b", Node::file(b"")).make();
    // The size of `fs` ends before `b`, whose name is the last one; its entry becomes one of `a`.
    let nid = |path: &str| ((image.inodes[path] - at(image.layout.metadata.start)) / 32) as u64;
    let mut block = Vec::new();
    for (nid, name_at) in [(nid("fs"), 36_u16), (nid(""), 37), (nid("fs/a"), 39)] {
        block.extend(nid.to_le_bytes());
        block.extend(name_at.to_le_bytes());
        block.extend([2, 0]);
    }
    block.extend(b"...a");
    block.resize(64, 0);
    let nameless = patched(&image, image.blocks["fs"], &block);
    let nameless = patched(&nameless, image.inodes["fs"] + 8, &40_u64.to_le_bytes());
    assert_eq!(refusal(&nameless), (Part::Tree, "each inode has a name, in the order of the inodes"));
}

/// A root that is a symlink, with names where its target should be. Found by `fuzz_metadata`: a walk read them, a lookup did not. (No such
/// image was accepted.)
#[test]
fn a_symlink_is_no_directory_whatever_is_inline() {
    let image = Maker::new().with("a", Node::file(b"")).make();
    let link = patched(&image, image.inodes[""] + 4, &0o120_755_u16.to_le_bytes());
    let link = patched(&link, image.inodes[""] + 44, &1_u32.to_le_bytes());
    assert!(verdict(&link).is_err());
    let metadata = Metadata::open(parts(&link.bytes, &link.layout), &link.layout).unwrap();
    assert_eq!(metadata.lookup([]).unwrap(), None);
    let walked = metadata.walk(|_, _| Ok::<(), CheckError>(()));
    assert!(matches!(walked, Err(CheckError::Refused { part: Part::Tree, .. })), "{walked:?}");
}

#[test]
fn the_image_root_holds_fs_alone() {
    let image = Maker::new().make();
    let (root, block) = (image.inodes[""], image.blocks[""]);
    assert_eq!(refusal(&patched(&image, root + 24, &[1])).0, Part::Tree);
    assert_eq!(refusal(&patched(&image, root + 4, &0o040_777_u16.to_le_bytes())).0, Part::Tree);
    let name = block + usize::from(image.bytes[block + 24 + 8]);
    assert_eq!(refusal(&patched(&image, name, b"fx")).0, Part::Tree);
}

#[test]
fn bytes_that_belong_to_nothing_are_refused() {
    let image = sample().make();
    let start = at(image.layout.metadata.start);
    assert!(verdict(&patched(&image, start, &[1])).is_err());
    let tail = image.inodes["fs/a/link"] + 64 + "../empty".len();
    assert_eq!(refusal(&patched(&image, tail, &[1])).0, Part::Padding);
    // A block more than the directories take.
    let mut longer = image.clone();
    let end = at(image.layout.metadata.end);
    longer.bytes.splice(end..end, vec![0; 4096]);
    longer.layout.metadata.end += BLOCK;
    longer.layout.size += BLOCK;
    let blocks = u32::try_from(longer.layout.size / BLOCK).unwrap().to_le_bytes();
    assert_eq!(refusal(&patched(&longer, 1060, &blocks)).0, Part::Padding);
}

/// Every byte of the metadata, each with all bits turned and with one: refused, or still an image that another reader
/// sees as we do.
#[test]
fn no_single_byte_makes_an_accepted_image_a_wrong_one() {
    let maker =
        Maker::new().root(Node::dir().opaque()).with("file", Node::file(b"x").xattr(1, b"name", b"value"));
    let mut image = maker.with("link", Node::symlink(b"file")).link("same", "file").make();
    let (mut accepted, mut refused) = (0, 0);
    let metadata = at(image.layout.metadata.start)..at(image.layout.metadata.end);
    for place in (1024..1152).chain(metadata) {
        for mask in [0xff, 0x01] {
            image.bytes[place] ^= mask;
            match verdict(&image) {
                Ok(_) => {
                    accepted += 1;
                    require_agreement(&image.bytes, &image.layout);
                }
                Err(CheckError::Refused { .. }) => refused += 1,
                Err(other) => panic!("byte {place}: {other}"),
            }
            image.bytes[place] ^= mask;
        }
    }
    assert!(accepted > 100 && refused > 5_000, "{accepted} accepted, {refused} refused");
    verdict(&image).unwrap();
}

/// What the writer makes of a tar is accepted, and is what the tar says.
#[test]
fn images_of_the_writer_are_accepted() {
    let long = "l".repeat(90);
    let items = [
        Item::dir("etc").owner(1, 2),
        Item::file("etc/file", &[3; 9000]).xattr("user.z", b"1").xattr("security.a", b"2"),
        Item::link("etc/link", "etc/file"),
        Item::symlink("sym", &long),
        Item::file("implied/deep/.wh.gone", b""),
        Item::file("implied/.wh..wh..opq", b""),
    ];
    let many: Vec<Item> = (0..2000).map(|n| Item::symlink(&format!("s{n}"), &long[..1 + n % 90])).collect();
    for items in [&items[..], &many[..], &[]] {
        let tar = Tar::of(items);
        let out = tempfile::tempfile().unwrap();
        let source = Source { blob: &tar[..], compression: Compression::Plain };
        let facts = build(source, &out, &NothingBelow, &Limits::default(), &|| false).unwrap();
        let checked = check(&out, &facts.layout).unwrap();
        assert_eq!(
            (checked.inodes, checked.root_uid, checked.root_gid),
            (facts.inodes, facts.root_uid, facts.root_gid)
        );
        let metadata = Metadata::open(out.try_clone().unwrap(), &facts.layout).unwrap();
        for item in items.iter().filter(|item| item.kind == b'2') {
            let found = metadata.lookup([item.name.as_bytes()]).unwrap().unwrap();
            assert_eq!(found.kind, NodeKind::Symlink { target: item.link.clone().into_bytes() });
        }
        if items.len() == 6 {
            let implied = metadata.lookup([&b"implied"[..]]).unwrap().unwrap();
            assert_eq!(implied.attributes().xattrs[0].name, b"trusted.overlay.opaque");
            let file = metadata.lookup([&b"etc"[..], b"link"]).unwrap().unwrap();
            let names: Vec<_> = file.xattrs.iter().map(|xattr| xattr.name.as_slice()).collect();
            assert_eq!((file.links, names), (2, vec![&b"user.z"[..], b"security.a"]));
        }
    }
}

/// Directories of all sizes, with xattrs and without: inline, beside blocks, and where that would cross a block, in blocks alone. Both
/// readers find every name.
#[test]
fn directories_of_all_sizes_are_accepted() {
    let mut items = Vec::new();
    for count in (0..150).chain([290, 300, 310]) {
        let directory = Item::dir(&format!("d{count}"));
        let value = "v".repeat(count % 90);
        items.push(if count % 2 == 0 { directory } else { directory.xattr("user.note", value.as_bytes()) });
        items.extend((0..count).map(|n| Item::file(&format!("d{count}/name-{n:03}-of-a-file"), b"")));
    }
    // 4090 bytes of names: 13 and 14 for the dots, 102 for each long name, 85 for the last.
    for (name, value) in [("full", &b""[..]), ("fuller", b"12345")] {
        items.push(Item::dir(name).xattr("user.a", value));
        items.extend((0..39).map(|n| Item::file(&format!("{name}/{n:02}{}", "x".repeat(88)), b"")));
        items.push(Item::file(&format!("{name}/{}", "z".repeat(73)), b""));
    }
    let tar = Tar::of(&items);
    let out = tempfile::NamedTempFile::new().unwrap();
    let source = Source { blob: &tar[..], compression: Compression::Plain };
    let facts = build(source, out.as_file(), &NothingBelow, &Limits::default(), &|| false).unwrap();
    assert_eq!(check(out.as_file(), &facts.layout).unwrap().inodes, facts.inodes);
    let bytes = std::fs::read(out.path()).unwrap();
    require_agreement(&bytes, &facts.layout);
    let found = contents(parts(&bytes, &facts.layout), &facts.layout).unwrap();
    assert_eq!(found.len(), items.len() + 1);
    // Inodes and names one behind the other, and less than half a block lost for each directory.
    let names: usize = items.iter().map(|item| item.name.len() + 12).sum();
    let room = facts.layout.metadata.end - facts.layout.metadata.start;
    assert!(room < (items.len() * 64 + names) as u64 + 155 * 2048, "{room}");
}

/// The input is the metadata; block 0 and the layout are made to fit it. There is no data but room for some.
fn from_input(input: &[u8]) -> (Vec<u8>, Vec<u8>, Layout) {
    let mut metadata = input.to_vec();
    metadata.resize(metadata.len().next_multiple_of(4096).max(4096), 0);
    let start = RESERVED + 16 * BLOCK;
    let end = start + metadata.len() as u64;
    let layout = Layout { data: RESERVED..start, metadata: start..end, size: end + RESERVED };
    let inodes =
        metadata.chunks(64).filter(|slot| slot[0] & 1 == 1 && slot[1] == 0 && slot[5] >= 0x10).count();
    let mut head = vec![0; 4096];
    let mut put = |at: usize, field: &[u8]| head[1024 + at..1024 + at + field.len()].copy_from_slice(field);
    put(0, &0xe0f5_e1e2_u32.to_le_bytes());
    put(12, &[12, 0, 2, 0]);
    put(16, &(inodes as u64).to_le_bytes());
    put(36, &u32::try_from(layout.size / BLOCK).unwrap().to_le_bytes());
    put(40, &u32::try_from(layout.metadata.start / BLOCK).unwrap().to_le_bytes());
    (head, metadata, layout)
}

/// Mutations of the metadata that reach every rule: those of block 0 would mostly be found before.
#[test]
fn fuzz_metadata() {
    let small = Maker::new().with("a", Node::file(b"")).with("b", Node::symlink(b"a")).with("c", Node::dir());
    let with_attributes = Maker::new().root(Node::dir().xattr(1, b"name", b"value")).with("c", Node::dir());
    let mut wide = Maker::new();
    for number in 0..150 {
        wide = wide.with(&format!("a-name-that-fills-more-than-a-block-{number}"), Node::file(b""));
    }
    let corpus: Vec<Vec<u8>> = [sample(), sample().plain(), small, with_attributes, wide]
        .iter()
        .map(|maker| {
            let image = maker.make();
            // Data is at the same place as in `from_input`.
            let mut metadata = image.metadata().to_vec();
            let moved = (RESERVED + 16 * BLOCK - image.layout.metadata.start) / BLOCK;
            for path in image.blocks.keys() {
                let field = image.inodes[path] - at(image.layout.metadata.start) + 16;
                let block = u32::from_le_bytes(*metadata[field..].first_chunk().unwrap());
                // 0: all its names are inline.
                let block = if block == 0 { 0 } else { block + u32::try_from(moved).unwrap() };
                metadata[field..field + 4].copy_from_slice(&block.to_le_bytes());
            }
            metadata
        })
        .collect();
    for metadata in &corpus {
        let (head, metadata, layout) = from_input(metadata);
        check(&Parts { head: &head, metadata: &metadata, metadata_at: layout.metadata.start }, &layout)
            .unwrap();
    }
    fuzz::run("image-metadata", &corpus, |input| {
        let (head, metadata, layout) = from_input(input);
        let image = Parts { head: &head, metadata: &metadata, metadata_at: layout.metadata.start };
        let accepted = check(&image, &layout).is_ok();
        match contents(image, &layout) {
            Ok(_) if accepted => {
                let mut bytes = vec![0; at(layout.size)];
                bytes[..head.len()].copy_from_slice(&head);
                bytes[at(layout.metadata.start)..at(layout.metadata.end)].copy_from_slice(&metadata);
                require_agreement(&bytes, &layout);
            }
            Ok(_) => {}
            Err(error) => assert!(!accepted, "{error}"),
        }
    });
}

/// Block 0 and metadata as they are, at the places the right layout says.
#[test]
fn fuzz_head() {
    let image = sample().make();
    let corpus = [[&image.bytes[..4096], image.metadata()].concat()];
    fuzz::run("image-head", &corpus, |input| {
        let (head, metadata) = input.split_at(input.len().min(4096));
        let image_of = Parts { head, metadata, metadata_at: image.layout.metadata.start };
        if check(&image_of, &image.layout).is_ok() {
            assert_eq!(&head[..4096], &image.bytes[..4096]);
        }
    });
}
